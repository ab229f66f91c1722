// Numbers of 8 bits: int8, and fp8 with 4 bits of exponent and 3 of mantissa (Micikevicius et al. 2022, arXiv:2209.05433).
#ifndef DOVETAIL_CODES_H
#define DOVETAIL_CODES_H

#include "simd.h"

#define FP8_UNIT 256.0f  // fp8 codes are decoded to 1 / 256 of their value, which is the same bits as half precision

// TILE_VECS * LANES codes as fp32. The codes of NaN decode to some number.
#if defined(__AVX512F__)
INLINE void decode(int fp8, const uint8_t *p, vec out[TILE_VECS]) {
    if (!fp8) {
        for (int j = 0; j < TILE_VECS; j++)
            out[j] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(p + j * LANES))));
        return;
    }
    for (int j = 0; j < TILE_VECS; j += 2) {
        __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)(p + j * LANES)));
        __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16((short)0xbfff));
        out[j] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
        out[j + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
    }
}
#elif defined(__AVX2__) && defined(__FMA__)
INLINE void decode(int fp8, const uint8_t *p, vec out[TILE_VECS]) {
    for (int j = 0; j < TILE_VECS; j++) {
        __m128i codes = _mm_loadl_epi64((const void *)(p + j * LANES));
        __m128i half = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(codes), 7), _mm_set1_epi16((short)0xbfff));
        out[j] = fp8 ? _mm256_cvtph_ps(half) : _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
    }
}
#else
INLINE float decode_fp8(uint8_t code) {
    int exponent = code >> 3 & 15, mantissa = (code & 7) + (exponent ? 8 : 0);
    uint32_t bits = (uint32_t)(127 - 18 + (exponent ? exponent : 1)) << 23;  // 2^(exponent - 10) / FP8_UNIT
    float unit;
    memcpy(&unit, &bits, 4);
    return (code & 128 ? -unit : unit) * (float)mantissa;
}
INLINE void decode(int fp8, const uint8_t *p, vec out[TILE_VECS]) {
    for (int j = 0; j < TILE_VECS; j++, p += LANES) {
        float values[LANES];
        for (int i = 0; i < LANES; i++) values[i] = fp8 ? decode_fp8(p[i]) : (float)(int8_t)p[i];
        out[j] = vec_load(values);
    }
}
#endif

// The code nearest to x, of two that with the even mantissa; |x| is at most 448.
INLINE uint8_t encode_fp8(float x) {
    uint32_t bits, small_bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 24 & 128, magnitude = bits & 0x7fffffff;
    float absolute, small;
    memcpy(&absolute, &magnitude, 4);
    small = absolute + 16384.0f;  // its last bit is 2^-9, that of the smallest codes
    memcpy(&small_bits, &small, 4);
    uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    return (uint8_t)(sign | (absolute < 0.015625f ? small_bits - 0x46800000u : normal));
}

// Vectors of LANES int32.
#if defined(__AVX512F__)
typedef __m512i ivec;
INLINE ivec ivec_set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE ivec ivec_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE ivec ivec_sub(ivec a, ivec b) { return _mm512_sub_epi32(a, b); }
INLINE vec ivec_to_vec(ivec x) { return _mm512_cvtepi32_ps(x); }
#elif defined(__AVX2__) && defined(__FMA__)
typedef __m256i ivec;
INLINE ivec ivec_set(int32_t x) { return _mm256_set1_epi32(x); }
INLINE ivec ivec_load(const void *p) { return _mm256_loadu_si256(p); }
INLINE ivec ivec_sub(ivec a, ivec b) { return _mm256_sub_epi32(a, b); }
INLINE vec ivec_to_vec(ivec x) { return _mm256_cvtepi32_ps(x); }
#else
typedef vec_int ivec;
INLINE ivec ivec_set(int32_t x) { return (ivec){x, x, x, x}; }
INLINE ivec ivec_load(const void *p) { ivec x; memcpy(&x, p, sizeof x); return x; }
INLINE ivec ivec_sub(ivec a, ivec b) { return a - b; }
INLINE vec ivec_to_vec(ivec x) { return __builtin_convertvector(x, vec); }
#endif

// acc += the sum of a * b over the four bytes of a lane, exactly; `a` is unsigned, `b` signed.
INLINE ivec ivec_dot4(ivec acc, ivec a, ivec b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(acc, a, b);
#elif defined(__AVX512F__)
    __m512i a_even = _mm512_and_si512(a, _mm512_set1_epi16(255)), a_odd = _mm512_srli_epi16(a, 8);
    __m512i b_even = _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8), b_odd = _mm512_srai_epi16(b, 8);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(a_even, b_even));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(a_odd, b_odd));
#elif defined(__AVX2__) && defined(__FMA__)
    __m256i a_even = _mm256_and_si256(a, _mm256_set1_epi16(255)), a_odd = _mm256_srli_epi16(a, 8);
    __m256i b_even = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), b_odd = _mm256_srai_epi16(b, 8);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(a_even, b_even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a_odd, b_odd));
#else
    for (int shift = 0; shift < 32; shift += 8) acc += (a >> shift & 255) * (b << (24 - shift) >> 24);
    return acc;
#endif
}

#endif
