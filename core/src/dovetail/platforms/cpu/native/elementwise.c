// Normalisation, rotary embedding and gated activation: one row of one token at a time, fp32 arithmetic.
#include <math.h>

#include "parallel.h"
#include "simd.h"

#define SERIAL_ELEMENTS 16384  // below this a second thread costs more than it brings
#define ROWS_PER_ITEM 8

static int threads_for(long elements) { return elements < SERIAL_ELEMENTS ? 1 : parallel_threads(); }
static long items_for(long rows) { return (rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM; }
#define FOR_ROWS_OF(item, rows) \
    for (long row = (item) * ROWS_PER_ITEM; row < (rows) && row < ((item) + 1) * ROWS_PER_ITEM; row++)

struct norm {
    const void *x, *residual, *weight;
    void *out, *sum;
    long rows, size, x_stride;
    float eps;
};

// Without a residual: out = norm(x). With one: sum = x + residual, rounded to storage, and out = norm(sum). The weight may be
// fp32 beside bf16 rows.
INLINE void norm_row(int bf16, int weight_bf16, const struct norm *n, long row) {
    const void *x = element(bf16, n->x, row * n->x_stride);
    void *out = element_mut(bf16, n->out, row * n->size);
    vec squares[4] = {vec_set(0), vec_set(0), vec_set(0), vec_set(0)};
    if (n->residual) {
        const void *residual = element(bf16, n->residual, row * n->size);
        void *sum = element_mut(bf16, n->sum, row * n->size);
        for (long i = 0; i < n->size; i += LANES)
            store_upto(bf16, sum, i, n->size,
                       vec_add(load_upto(bf16, x, i, n->size), load_upto(bf16, residual, i, n->size)));
        x = sum;
    }
    for (long i = 0; i < n->size; i += LANES) {
        vec v = load_upto(bf16, x, i, n->size);
        int lane = (i / LANES) % 4;
        squares[lane] = vec_fma(v, v, squares[lane]);
    }
    float total = vec_sum(vec_add(vec_add(squares[0], squares[1]), vec_add(squares[2], squares[3])));
    vec scale = vec_set(1.0f / sqrtf(total / (float)n->size + n->eps));
    for (long i = 0; i < n->size; i += LANES) {
        vec v = vec_mul(load_upto(bf16, x, i, n->size), scale);
        store_upto(bf16, out, i, n->size, vec_mul(v, load_upto(weight_bf16, n->weight, i, n->size)));
    }
}

static void norm_fp32(const void *context, long item) {
    const struct norm *n = context;
    FOR_ROWS_OF(item, n->rows) norm_row(0, 0, n, row);
}
static void norm_bf16(const void *context, long item) {
    const struct norm *n = context;
    FOR_ROWS_OF(item, n->rows) norm_row(1, 1, n, row);
}
static void norm_bf16_by_fp32(const void *context, long item) {
    const struct norm *n = context;
    FOR_ROWS_OF(item, n->rows) norm_row(1, 0, n, row);
}

void dovetail_norm(int bf16, int weight_bf16, const void *x, long x_stride, const void *residual, const void *weight, void *out,
                   void *sum, long rows, long size, float eps) {
    struct norm n = {x, residual, weight, out, sum, rows, size, x_stride, eps};
    work_fn work = !bf16 ? norm_fp32 : weight_bf16 ? norm_bf16 : norm_bf16_by_fp32;
    parallel_for(items_for(rows), threads_for(rows * size), work, &n);
}

struct rotary {
    void *q, *k;
    const int64_t *positions;
    const float *cos_sin;
    long tokens, q_stride, k_stride;
    int q_heads, k_heads, head_size, rotary_size;
};

INLINE void rotate_heads(int bf16, void *x, int heads, int head_size, int rotary_size, const float *cos_sin) {
    long half = rotary_size / 2;
    for (int h = 0; h < heads; h++) {
        void *first = element_mut(bf16, x, (long)h * head_size), *second = element_mut(bf16, first, half);
        for (long i = 0; i < half; i += LANES) {
            vec a = load_upto(bf16, first, i, half), b = load_upto(bf16, second, i, half);
            vec cos = load_upto(0, cos_sin, i, half), sin = load_upto(0, cos_sin + half, i, half);
            vec minus_b_sin = vec_mul(vec_sub(vec_set(0), b), sin);
            store_upto(bf16, first, i, half, vec_fma(a, cos, minus_b_sin));
            store_upto(bf16, second, i, half, vec_fma(b, cos, vec_mul(a, sin)));
        }
    }
}

INLINE void rotary_row(int bf16, const struct rotary *r, long row) {
    const float *cos_sin = r->cos_sin + r->positions[row] * r->rotary_size;
    rotate_heads(bf16, element_mut(bf16, r->q, row * r->q_stride), r->q_heads, r->head_size, r->rotary_size, cos_sin);
    rotate_heads(bf16, element_mut(bf16, r->k, row * r->k_stride), r->k_heads, r->head_size, r->rotary_size, cos_sin);
}

static void rotary_fp32(const void *context, long item) {
    const struct rotary *r = context;
    FOR_ROWS_OF(item, r->tokens) rotary_row(0, r, row);
}
static void rotary_bf16(const void *context, long item) {
    const struct rotary *r = context;
    FOR_ROWS_OF(item, r->tokens) rotary_row(1, r, row);
}

// In place. Strides count elements from one token to the next; heads lie side by side.
void dovetail_rotary(int bf16, void *q, long q_stride, int q_heads, void *k, long k_stride, int k_heads, int head_size,
                     const int64_t *positions, const float *cos_sin, int rotary_size, long tokens) {
    struct rotary r = {q, k, positions, cos_sin, tokens, q_stride, k_stride, q_heads, k_heads, head_size, rotary_size};
    long elements = tokens * (q_heads + k_heads) * rotary_size;
    parallel_for(items_for(tokens), threads_for(elements), bf16 ? rotary_bf16 : rotary_fp32, &r);
}

struct gated {
    const void *x;
    void *out;
    long rows, size;
};

// gelu(g), tanh form: 0.5 g (1 + tanh u) = g sigmoid(2 u), where u = sqrt(2 / pi) (g + 0.044715 g^3).
INLINE vec twice_gelu_argument(vec g) {
    vec cube = vec_mul(vec_mul(g, g), vec_mul(g, vec_set(0.044715f)));
    return vec_mul(vec_add(g, cube), vec_set(1.5957691216057308f));
}

INLINE void gated_row(int bf16, int gelu, const struct gated *s, long row) {
    const void *gate = element(bf16, s->x, row * 2 * s->size), *up = element(bf16, gate, s->size);
    void *out = element_mut(bf16, s->out, row * s->size);
    for (long i = 0; i < s->size; i += LANES) {
        vec g = load_upto(bf16, gate, i, s->size);
        vec argument = gelu ? twice_gelu_argument(g) : g;
        vec one_plus = vec_add(vec_set(1), vec_exp(vec_sub(vec_set(0), argument)));
        store_upto(bf16, out, i, s->size, vec_mul(vec_div(g, one_plus), load_upto(bf16, up, i, s->size)));
    }
}

static void silu_fp32(const void *context, long item) {
    const struct gated *s = context;
    FOR_ROWS_OF(item, s->rows) gated_row(0, 0, s, row);
}
static void silu_bf16(const void *context, long item) {
    const struct gated *s = context;
    FOR_ROWS_OF(item, s->rows) gated_row(1, 0, s, row);
}
static void gelu_fp32(const void *context, long item) {
    const struct gated *s = context;
    FOR_ROWS_OF(item, s->rows) gated_row(0, 1, s, row);
}
static void gelu_bf16(const void *context, long item) {
    const struct gated *s = context;
    FOR_ROWS_OF(item, s->rows) gated_row(1, 1, s, row);
}

// out[row] = silu(x[row][:size]) * x[row][size:]
void dovetail_silu_and_mul(int bf16, const void *x, void *out, long rows, long size) {
    struct gated s = {x, out, rows, size};
    parallel_for(items_for(rows), threads_for(rows * size), bf16 ? silu_bf16 : silu_fp32, &s);
}

// The same with gelu.
void dovetail_gelu_tanh_and_mul(int bf16, const void *x, void *out, long rows, long size) {
    struct gated s = {x, out, rows, size};
    parallel_for(items_for(rows), threads_for(rows * size), bf16 ? gelu_bf16 : gelu_fp32, &s);
}
