// The index of the largest element of each row: the first of equals, or the first NaN where there is one.
#include <math.h>

#include "parallel.h"
#include "simd.h"

#define CHUNK 1024  // elements; a multiple of LANES

struct argmax {
    const void *x;
    int64_t *out;
    long rows, size, x_stride;
};

INLINE float number(int bf16, const void *x, long i) {
    if (!bf16) return ((const float *)x)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE int64_t argmax_row(int bf16, const void *x, long size) {
    long best_chunk = 0, whole = size / CHUNK * CHUNK;
    float best = -INFINITY;
    for (long chunk = 0; chunk < whole; chunk += CHUNK) {
        vec largest = load(bf16, x, chunk), poison = vec_set(0);
        for (long i = chunk; i < chunk + CHUNK; i += LANES) {
            vec v = load(bf16, x, i);
            largest = vec_max(largest, v);
            poison = vec_fma(v, vec_set(0), poison);  // NaN where v is not finite
        }
        float top = vec_largest(largest);
        if (!(vec_sum(poison) == 0)) {  // infinities are welcome, but NaN would get lost in the maximum
            top = -INFINITY;
            for (long i = chunk; i < chunk + CHUNK; i++) {
                float v = number(bf16, x, i);
                if (isnan(v)) return i;
                if (v > top) top = v;
            }
        }
        if (top > best) {
            best = top;
            best_chunk = chunk;
        }
    }
    int64_t index = -1;
    for (long i = best_chunk; i < best_chunk + CHUNK && i < whole && index < 0; i++)
        if (number(bf16, x, i) == best) index = i;
    for (long i = whole; i < size; i++) {
        float v = number(bf16, x, i);
        if (isnan(v)) return i;
        if (index < 0 || v > best) {
            best = v;
            index = i;
        }
    }
    return index;
}

static void argmax_item(const void *context, long row) {
    const struct argmax *a = context;
    a->out[row] = argmax_row(0, (const float *)a->x + row * a->x_stride, a->size);
}
static void argmax_item_bf16(const void *context, long row) {
    const struct argmax *a = context;
    a->out[row] = argmax_row(1, (const uint16_t *)a->x + row * a->x_stride, a->size);
}

void dovetail_argmax(int bf16, const void *x, long x_stride, int64_t *out, long rows, long size) {
    struct argmax a = {x, out, rows, size, x_stride};
    parallel_for(rows, parallel_threads(), bf16 ? argmax_item_bf16 : argmax_item, &a);
}
