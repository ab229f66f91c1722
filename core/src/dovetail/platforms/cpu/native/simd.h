// Vectors of 32-bit lanes for the instruction set this file is compiled for. Every multiply-add is written out
// (`vec_fma`), and the build forbids the compiler to fuse others: a row of data must give the same bits in every
// kernel that it passes through, whatever else is in the batch.
#ifndef DOVETAIL_SIMD_H
#define DOVETAIL_SIMD_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)

#include <immintrin.h>
#define LANES 16
#define TILE_VECS 4  // register tile: TILE_ROWS x TILE_VECS accumulators
typedef __m512 vec;

INLINE vec vec_set(float x) { return _mm512_set1_ps(x); }
INLINE vec vec_load(const void *p) { return _mm512_loadu_ps(p); }
INLINE void vec_store(void *p, vec x) { _mm512_storeu_ps(p, x); }
INLINE vec vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec vec_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec vec_div(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec vec_max(vec a, vec b) { return _mm512_max_ps(a, b); }  // b where either is NaN
INLINE vec vec_min(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec vec_round(vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec vec_exp2_int(vec n) {  // 2^n for whole n in -126 .. 127
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
INLINE vec vec_zero_below(vec x, float limit, vec y) {  // y, but 0 where x < limit
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, vec_set(limit), _CMP_LT_OQ), _mm512_setzero_ps());
}
INLINE float vec_sum(vec x) { return _mm512_reduce_add_ps(x); }
INLINE float vec_largest(vec x) { return _mm512_reduce_max_ps(x); }
INLINE vec vec_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
#if defined(__AVX512BF16__)
INLINE void vec_store_bf16(uint16_t *p, vec x) {  // round to nearest even; NaN stays NaN, denormals become 0
    _mm256_storeu_si256((void *)p, (__m256i)_mm512_cvtneps_pbh(x));
}
#else
INLINE void vec_store_bf16(uint16_t *p, vec x) {  // round to nearest even; NaN stays NaN
    __m512i u = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16(rounded));
}
#endif
INLINE vec vec_low_bf16(vec x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16)); }
INLINE vec vec_high_bf16(vec x) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32((int)0xffff0000)));
}

#elif defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>
#define LANES 8
#define TILE_VECS 2
typedef __m256 vec;

INLINE vec vec_set(float x) { return _mm256_set1_ps(x); }
INLINE vec vec_load(const void *p) { return _mm256_loadu_ps(p); }
INLINE void vec_store(void *p, vec x) { _mm256_storeu_ps(p, x); }
INLINE vec vec_add(vec a, vec b) { return _mm256_add_ps(a, b); }
INLINE vec vec_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
INLINE vec vec_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
INLINE vec vec_div(vec a, vec b) { return _mm256_div_ps(a, b); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec vec_max(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec vec_min(vec a, vec b) { return _mm256_min_ps(a, b); }
INLINE vec vec_round(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec vec_exp2_int(vec n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE vec vec_zero_below(vec x, float limit, vec y) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, vec_set(limit), _CMP_LT_OQ), y);
}
INLINE float vec_sum(vec x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
INLINE float vec_largest(vec x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
INLINE vec vec_load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
INLINE void vec_store_bf16(uint16_t *p, vec x) {
    __m256i u = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storeu_si128((void *)p, packed);
}
INLINE vec vec_low_bf16(vec x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
INLINE vec vec_high_bf16(vec x) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32((int)0xffff0000)));
}

#else  // the compiler's own vectors: 128 bits everywhere

#define LANES 4
#define TILE_VECS 4
typedef float vec __attribute__((vector_size(16)));
typedef int32_t vec_int __attribute__((vector_size(16)));
typedef uint32_t vec_bits __attribute__((vector_size(16)));

#define EACH(expression)                            \
    vec out;                                        \
    for (int i = 0; i < LANES; i++) out[i] = (expression); \
    return out
INLINE vec vec_set(float x) { return (vec){x, x, x, x}; }
INLINE vec vec_load(const void *p) { vec x; memcpy(&x, p, sizeof x); return x; }
INLINE void vec_store(void *p, vec x) { memcpy(p, &x, sizeof x); }
INLINE vec vec_add(vec a, vec b) { return a + b; }
INLINE vec vec_sub(vec a, vec b) { return a - b; }
INLINE vec vec_mul(vec a, vec b) { return a * b; }
INLINE vec vec_div(vec a, vec b) { return a / b; }
#if defined(__ARM_NEON)
#include <arm_neon.h>
INLINE vec vec_fma(vec a, vec b, vec c) { return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
INLINE vec vec_fma(vec a, vec b, vec c) { EACH(__builtin_fmaf(a[i], b[i], c[i])); }
#endif
INLINE vec vec_max(vec a, vec b) { EACH(a[i] > b[i] ? a[i] : b[i]); }
INLINE vec vec_min(vec a, vec b) { EACH(a[i] < b[i] ? a[i] : b[i]); }
INLINE vec vec_round(vec x) { EACH(__builtin_rintf(x[i])); }
INLINE vec vec_exp2_int(vec n) { return (vec)((__builtin_convertvector(n, vec_int) + 127) << 23); }
INLINE vec vec_zero_below(vec x, float limit, vec y) { return (vec)((vec_int)y & ~(vec_int)(x < vec_set(limit))); }
INLINE float vec_sum(vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
INLINE float vec_largest(vec x) {
    float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
}
INLINE vec vec_load_bf16(const uint16_t *p) {
    vec_bits u = {p[0], p[1], p[2], p[3]};
    return (vec)(u << 16);
}
INLINE void vec_store_bf16(uint16_t *p, vec x) {
    vec_bits u = (vec_bits)x, nan = (vec_bits)(x != x);
    vec_bits rounded = (u + ((u >> 16) & 1) + 0x7fff) >> 16;
    rounded = (rounded & ~nan) | (0x7fc0 & nan);
    for (int i = 0; i < LANES; i++) p[i] = (uint16_t)rounded[i];
}
INLINE vec vec_low_bf16(vec x) { return (vec)((vec_bits)x << 16); }
INLINE vec vec_high_bf16(vec x) { return (vec)((vec_bits)x & 0xffff0000u); }

#endif

// acc += a.low * b.low + a.high * b.high, where every lane holds two bf16 numbers.
INLINE vec vec_dot2(vec acc, vec a, vec b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
    acc = vec_fma(vec_low_bf16(a), vec_low_bf16(b), acc);
    return vec_fma(vec_high_bf16(a), vec_high_bf16(b), acc);
#endif
}

// exp within 2 ulp; 0 below the normal range, NaN stays NaN. Polynomial: Moshier, Cephes (expf).
INLINE vec vec_exp(vec x) {
    vec bounded = vec_min(vec_set(88.0f), vec_max(vec_set(-87.33f), x));
    vec n = vec_round(vec_mul(bounded, vec_set(1.44269504088896341f)));
    vec r = vec_fma(n, vec_set(-0.693359375f), bounded);
    r = vec_fma(n, vec_set(2.12194440e-4f), r);
    vec p = vec_fma(vec_set(1.9875691500e-4f), r, vec_set(1.3981999507e-3f));
    p = vec_fma(p, r, vec_set(8.3334519073e-3f));
    p = vec_fma(p, r, vec_set(4.1665795894e-2f));
    p = vec_fma(p, r, vec_set(1.6666665459e-1f));
    p = vec_fma(p, r, vec_set(5.0000001201e-1f));
    p = vec_add(vec_fma(p, vec_mul(r, r), r), vec_set(1.0f));
    return vec_zero_below(x, -87.33f, vec_mul(p, vec_exp2_int(n)));
}

// Storage: bf16 or fp32 elements at p + index, as fp32 lanes. `bf16` is a constant wherever these are inlined.
INLINE const void *element(int bf16, const void *p, long index) { return (const char *)p + index * (bf16 ? 2 : 4); }
INLINE void *element_mut(int bf16, void *p, long index) { return (char *)p + index * (bf16 ? 2 : 4); }
INLINE vec load(int bf16, const void *p, long index) {
    return bf16 ? vec_load_bf16(element(1, p, index)) : vec_load(element(0, p, index));
}
INLINE void store(int bf16, void *p, long index, vec x) {
    if (bf16) vec_store_bf16(element_mut(1, p, index), x);
    else vec_store(element_mut(0, p, index), x);
}
INLINE vec load_part(int bf16, const void *p, long index, long count) {  // zeros beyond count
    char buffer[LANES * 4] __attribute__((aligned(64))) = {0};
    memcpy(buffer, element(bf16, p, index), count * (bf16 ? 2 : 4));
    return load(bf16, buffer, 0);
}
INLINE void store_part(int bf16, void *p, long index, long count, vec x) {
    char buffer[LANES * 4] __attribute__((aligned(64)));
    store(bf16, buffer, 0, x);
    memcpy(element_mut(bf16, p, index), buffer, count * (bf16 ? 2 : 4));
}
INLINE vec load_upto(int bf16, const void *p, long index, long end) {
    return end - index >= LANES ? load(bf16, p, index) : load_part(bf16, p, index, end - index);
}
INLINE void store_upto(int bf16, void *p, long index, long end, vec x) {
    if (end - index >= LANES) store(bf16, p, index, x);
    else store_part(bf16, p, index, end - index, x);
}

#endif
