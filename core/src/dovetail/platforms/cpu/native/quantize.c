// Rows in 8 bits, each group of elements scaled by its largest magnitude.
#include "codes.h"
#include "parallel.h"

struct quantize {
    const void *x;
    uint8_t *out;
    float *scale;
    long rows, size, x_stride, group, groups;
    int fp8;
};

// The scale of `count` elements: not finite if any of them is not.
INLINE float group_scale(int bf16, float limit, const void *x, long count) {
    vec largest = vec_set(0), poison = vec_set(0);
    for (long i = 0; i < count; i += LANES) {
        vec v = load_upto(bf16, x, i, count);
        largest = vec_max(largest, vec_max(v, vec_sub(vec_set(0), v)));
        poison = vec_fma(v, vec_set(0), poison);
    }
    float most = vec_largest(largest);
    return (most > 1e-12f ? most : 1e-12f) / limit + vec_sum(poison);
}

INLINE void quantize_group(int bf16, int fp8, const void *x, uint8_t *out, float *scale, long count) {
    float limit = fp8 ? 448.0f : 127.0f;
    *scale = group_scale(bf16, limit, x, count);
    for (long i = 0; i < count; i += LANES) {
        float v[LANES];
        long lanes = count - i < LANES ? count - i : LANES;
        vec scaled = vec_div(load_upto(bf16, x, i, count), vec_set(*scale));
        scaled = vec_max(vec_min(scaled, vec_set(limit)), vec_set(-limit));
        vec_store(v, fp8 ? scaled : vec_round(scaled));
        uint8_t codes[LANES];
        for (int j = 0; j < LANES; j++) codes[j] = fp8 ? encode_fp8(v[j]) : (uint8_t)(int8_t)v[j];
        memcpy(out + i, codes, lanes);
    }
}

INLINE void quantize_item(int bf16, const struct quantize *q, long row) {
    for (long g = 0, i = 0; g < q->groups; g++, i += q->group) {
        long count = q->size - i < q->group ? q->size - i : q->group;
        const void *x = element(bf16, q->x, row * q->x_stride + i);
        uint8_t *out = q->out + row * q->size + i;
        float *scale = q->scale + row * q->groups + g;
        if (q->fp8) quantize_group(bf16, 1, x, out, scale, count);
        else quantize_group(bf16, 0, x, out, scale, count);
    }
}

static void quantize_fp32(const void *context, long row) { quantize_item(0, context, row); }
static void quantize_bf16(const void *context, long row) { quantize_item(1, context, row); }

// x: [rows, size] with x_stride elements between rows; out: [rows, size]; scale: [rows, groups].
void dovetail_quantize(int fp8, int bf16, const void *x, long x_stride, uint8_t *out, float *scale, long rows, long size,
                       long group) {
    struct quantize q = {x, out, scale, rows, size, x_stride, group, (size + group - 1) / group, fp8};
    parallel_for(rows, rows * size < 8192 ? 1 : parallel_threads(), bf16 ? quantize_bf16 : quantize_fp32, &q);
}
