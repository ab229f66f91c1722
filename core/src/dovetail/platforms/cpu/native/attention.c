// Attention of a ragged batch over a paged cache, with an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867)
// over tiles of keys at fixed positions (Dao et al. 2022, arXiv:2205.14135).
//
// A cache page holds strips of 16 tokens of one kv head. Keys of a strip are transposed, so that one vector holds the same
// element of 16 tokens: fp32 [K][16], bf16 [K / 2][16][2]. Values: fp32 [16][K], bf16 [8][K][2] (pairs of tokens). K is the
// head size rounded up to 16; the padding stays zero.
//
// The sums of one query row run over tiles of 64 absolute positions in order, whatever else is in the batch, and a
// tile that the row cannot see leaves its sums unchanged bit for bit. So a row's result depends on its own request alone.
#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "parallel.h"
#include "tile.h"

#define STRIP 16
#define TILE_TOKENS 64
#define TILE_STRIPS (TILE_TOKENS / STRIP)
#define BLOCK_ROWS 48  // query rows (token x query head) that share one pass over the keys
#define MAX_HEAD 512

struct step {  // one step's tables; mirrored in attention.py
    const int32_t *block_table, *query_start, *seq_lens;
    const int64_t *slot_mapping;
    long table_stride, requests, tokens;
};

struct cache {  // one layer's pages; mirrored in attention.py
    char *keys, *values;
    long kv_heads, head_size, block_size, bf16;
};

struct attention {
    const struct step *step;
    const struct cache *cache;
    const char *q, *k, *v;
    char *out;
    const long *first_item;  // of each request, in items of one kv head
    long q_stride, k_stride, v_stride, group, padded, strip_bytes;
    long window;     // 0: everything before
    int stored;      // the step's keys and values are in their pages
    float scale, soft_cap;  // 0: no cap
};

static long strip_offset(const struct attention *a, long block, long head, long offset) {
    long strips = a->cache->block_size / STRIP;
    return ((block * a->cache->kv_heads + head) * strips + offset / STRIP) * a->strip_bytes;
}

static long strip_at(const struct attention *a, long request, long head, long position) {
    long block_size = a->cache->block_size;
    long block = a->step->block_table[request * a->step->table_stride + position / block_size];
    return strip_offset(a, block, head, position % block_size);
}

// The second token of a pair is cleared with the first, so that a pair never holds what a former owner of the page left.
INLINE void write_token(int bf16, const struct attention *a, long token, long head) {
    long size = a->cache->head_size, slot = a->step->slot_mapping[token];
    long place = strip_offset(a, slot / a->cache->block_size, head, slot % a->cache->block_size), lane = slot % STRIP;
    const void *k = element(bf16, a->k, token * a->k_stride + head * size);
    const void *v = element(bf16, a->v, token * a->v_stride + head * size);
    uint32_t *keys = (uint32_t *)(a->cache->keys + place) + lane;
    if (bf16) {
        const uint16_t *from = v;
        uint16_t *to = (uint16_t *)(a->cache->values + place) + lane / 2 * 2 * a->padded;
        for (long i = 0; i < size / 2; i++) memcpy(keys + i * STRIP, (const char *)k + i * 4, 4);
        if (size % 2) {
            uint32_t last = ((const uint16_t *)k)[size - 1];
            memcpy(keys + size / 2 * STRIP, &last, 4);
        }
        if (lane % 2 == 0) {
            for (long i = 0; i < size; i++) ((uint32_t *)to)[i] = from[i];
        } else {
            for (long i = 0; i < size; i++) to[2 * i + 1] = from[i];
        }
    } else {
        for (long i = 0; i < size; i++) memcpy(keys + i * STRIP, (const char *)k + i * 4, 4);
        memcpy(a->cache->values + place + lane * a->padded * 4, v, size * 4);
    }
}

static void write_tokens(const struct attention *a, long request, long head) {
    for (long t = a->step->query_start[request]; t < a->step->query_start[request + 1]; t++) {
        if (a->cache->bf16) write_token(1, a, t, head);
        else write_token(0, a, t, head);
    }
}

struct rows {  // the state of one block of query rows
    float largest[BLOCK_ROWS], total[BLOCK_ROWS], decay[BLOCK_ROWS];
    long position[BLOCK_ROWS];
    float scores[BLOCK_ROWS][TILE_TOKENS] __attribute__((aligned(64)));  // overwritten by the weights, in storage type
    float q[BLOCK_ROWS * MAX_HEAD] __attribute__((aligned(64)));         // [row][padded], in storage type
    float out[BLOCK_ROWS * MAX_HEAD] __attribute__((aligned(64)));       // [row][padded]
};

INLINE void score_tile(int bf16, int rows, const struct attention *a, struct rows *s, long row, const char *const keys[]) {
    for (int first = 0; first < TILE_TOKENS; first += TILE_VECS * LANES) {
        const char *q[TILE_ROWS], *b[TILE_VECS];
        vec acc[TILE_ROWS][TILE_VECS];
        for (int r = 0; r < rows; r++) {
            q[r] = (const char *)s->q + (row + r) * a->padded * (bf16 ? 2 : 4);
            for (int j = 0; j < TILE_VECS; j++) acc[r][j] = vec_set(0);
        }
        for (int j = 0; j < TILE_VECS; j++) {
            int token = first + j * LANES;
            b[j] = keys[token / STRIP] + token % STRIP * 4;
        }
        tile_steps(bf16, rows, TILE_VECS, acc, q, b, STRIP * 4, bf16 ? a->padded / 2 : a->padded);
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < TILE_VECS; j++)
                vec_store(&s->scores[row + r][first + j * LANES], vec_mul(acc[r][j], vec_set(a->scale)));
    }
}

// cap * tanh(x / cap)
INLINE vec capped(vec x, float cap) {
    vec e = vec_exp(vec_mul(x, vec_set(2.0f / cap)));
    return vec_mul(vec_set(cap), vec_sub(vec_set(1), vec_div(vec_set(2), vec_add(e, vec_set(1)))));
}

static void mask_row(const struct attention *a, struct rows *s, long row, long base) {
    float *scores = s->scores[row];
    long visible = s->position[row] - base + 1;
    for (long i = visible < 0 ? 0 : visible; i < TILE_TOKENS; i++) scores[i] = -INFINITY;
    long hidden = a->window ? s->position[row] - a->window + 1 - base : 0;
    for (long i = 0; i < hidden && i < TILE_TOKENS; i++) scores[i] = -INFINITY;
}

// Scores of one row to weights; the row's maximum, sum and decay follow.
INLINE void weigh_row(int bf16, const struct attention *a, struct rows *s, long row, long base) {
    enum { VECS = TILE_TOKENS / LANES };
    float *scores = s->scores[row];
    if (a->soft_cap != 0)
        for (int j = 0; j < VECS; j++) vec_store(scores + j * LANES, capped(vec_load(scores + j * LANES), a->soft_cap));
    long position = s->position[row];
    if (position < base + TILE_TOKENS - 1 || (a->window && position - a->window + 1 > base)) mask_row(a, s, row, base);
    vec x[VECS], top = vec_load(scores);
    for (int j = 0; j < VECS; j++) {
        x[j] = vec_load(scores + j * LANES);
        top = vec_max(top, x[j]);
    }
    float largest = vec_largest(top), before = s->largest[row];
    largest = largest > before ? largest : before;
    vec sum = vec_set(0);
    for (int j = 0; j < VECS; j++) {
        vec weight = vec_exp(vec_sub(x[j], vec_set(largest)));
        sum = vec_add(sum, weight);
        store(bf16, scores, j * LANES, weight);
    }
    float decay = 1;
    if (largest != before) {
        vec_store(x, vec_exp(vec_set(before - largest)));
        memcpy(&decay, x, 4);
    }
    s->decay[row] = decay;
    s->total[row] = s->total[row] * decay + vec_sum(sum);
    s->largest[row] = largest;
}

INLINE void value_tile(int bf16, int rows, int vecs, const struct attention *a, struct rows *s, long row, long first,
                       const char *const values[], long steps) {
    const long strip_steps = bf16 ? STRIP / 2 : STRIP, stride = a->padded * 4;
    vec acc[TILE_ROWS][TILE_VECS];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vecs; j++)
            acc[r][j] = vec_mul(vec_load(s->out + (row + r) * a->padded + first + j * LANES), vec_set(s->decay[row + r]));
    for (long done = 0, strip = 0; done < steps; done += strip_steps, strip++) {
        const char *weights[TILE_ROWS], *b[TILE_VECS];
        for (int r = 0; r < rows; r++) weights[r] = (const char *)s->scores[row + r] + done * 4;
        for (int j = 0; j < vecs; j++) b[j] = values[strip] + (first + j * LANES) * 4;
        tile_steps(bf16, rows, vecs, acc, weights, b, stride, steps - done < strip_steps ? steps - done : strip_steps);
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vecs; j++) vec_store(s->out + (row + r) * a->padded + first + j * LANES, acc[r][j]);
}

INLINE void tile_of_rows(int bf16, int rows, const struct attention *a, struct rows *s, long row, long base,
                         const char *const keys[], const char *const values[], long tokens) {
    score_tile(bf16, rows, a, s, row, keys);
    for (int r = 0; r < rows; r++) weigh_row(bf16, a, s, row + r, base);
    long steps = bf16 ? (tokens + 1) / 2 : tokens, first = 0;
    for (; first + TILE_VECS * LANES <= a->padded; first += TILE_VECS * LANES)
        value_tile(bf16, rows, TILE_VECS, a, s, row, first, values, steps);
    for (; first < a->padded; first += LANES) value_tile(bf16, rows, 1, a, s, row, first, values, steps);
}

// Row i of a request and kv head is query token i / group, query head i % group of that kv head.
INLINE void load_rows(int bf16, const struct attention *a, struct rows *s, long request, long head, long first, long count) {
    const long start = a->step->query_start[request], queries = a->step->query_start[request + 1] - start;
    const long size = a->cache->head_size, bytes = bf16 ? 2 : 4;
    for (long i = 0; i < count; i++) {
        long token = (first + i) / a->group, q_head = head * a->group + (first + i) % a->group;
        char *to = (char *)s->q + i * a->padded * bytes;
        memcpy(to, element(bf16, a->q, (start + token) * a->q_stride + q_head * size), size * bytes);
        memset(to + size * bytes, 0, (a->padded - size) * bytes);
        memset(s->out + i * a->padded, 0, a->padded * 4);
        s->position[i] = a->step->seq_lens[request] - queries + token;
        s->largest[i] = -FLT_MAX;
        s->total[i] = 0;
    }
}

INLINE void store_rows(int bf16, const struct attention *a, const struct rows *s, long request, long head, long first,
                       long count) {
    const long size = a->cache->head_size, width = a->cache->kv_heads * a->group * size;
    for (long i = 0; i < count; i++) {
        long token = a->step->query_start[request] + (first + i) / a->group, q_head = head * a->group + (first + i) % a->group;
        void *out = element_mut(bf16, a->out, token * width + q_head * size);
        vec factor = vec_set(1.0f / s->total[i]);
        for (long k = 0; k < size; k += LANES)
            store_upto(bf16, out, k, size, vec_mul(vec_load(s->out + i * a->padded + k), factor));
    }
}

INLINE void attend_block(int bf16, const struct attention *a, long request, long head, long first, long count) {
    struct rows s;
    load_rows(bf16, a, &s, request, head, first, count);
    long last_position = s.position[count - 1];
    long first_visible = a->window ? s.position[0] - a->window + 1 : 0;
    for (long base = first_visible < 0 ? 0 : first_visible / TILE_TOKENS * TILE_TOKENS; base <= last_position;
         base += TILE_TOKENS) {
        const char *keys[TILE_STRIPS], *values[TILE_STRIPS];
        for (int i = 0; i < TILE_STRIPS; i++) {  // strips beyond the last token repeat the first; their scores are masked
            long position = base + i * STRIP <= last_position ? base + i * STRIP : base;
            long place = strip_at(a, request, head, position);
            keys[i] = a->cache->keys + place;
            values[i] = a->cache->values + place;
        }
        for (long row = 0; row < count; row += TILE_ROWS) {
            long rows = count - row < TILE_ROWS ? count - row : TILE_ROWS;
            long tokens = s.position[row + rows - 1] - base + 1;
            if (tokens <= 0) continue;
            tokens = tokens < TILE_TOKENS ? tokens : TILE_TOKENS;
#define TILE(n) tile_of_rows(bf16, n, a, &s, row, base, keys, values, tokens)
            WITH_ROWS(rows, TILE)
#undef TILE
        }
    }
    store_rows(bf16, a, &s, request, head, first, count);
}

static long rows_of(const struct attention *a, long request) {
    return (a->step->query_start[request + 1] - a->step->query_start[request]) * a->group;
}

static void write_item(const void *context, long item) {
    const struct attention *a = context;
    write_tokens(a, item / a->cache->kv_heads, item % a->cache->kv_heads);
}

static void attend_item(const void *context, long item) {
    const struct attention *a = context;
    long head = item % a->cache->kv_heads;
    // Last blocks first: they see the most keys, and short work at the end balances the threads.
    long index = a->first_item[a->step->requests] - 1 - item / a->cache->kv_heads;
    long low = 0, high = a->step->requests;
    while (high - low > 1) {
        long middle = (low + high) / 2;
        if (a->first_item[middle] <= index) low = middle;
        else high = middle;
    }
    long first = (index - a->first_item[low]) * BLOCK_ROWS, rows = rows_of(a, low);
    if (!a->stored) write_tokens(a, low, head);
    long count = rows - first < BLOCK_ROWS ? rows - first : BLOCK_ROWS;
    if (a->cache->bf16) attend_block(1, a, low, head, first, count);
    else attend_block(0, a, low, head, first, count);
}

// Stores this step's keys and values, then attends. out: [tokens, q_heads * head_size]; strides count elements per token.
// Returns 0, or 1 when memory ran out.
int dovetail_attention(const struct step *step, const struct cache *cache, const void *q, long q_stride, long q_heads,
                       const void *k, long k_stride, const void *v, long v_stride, void *out, float scale, long window,
                       float soft_cap) {
    const long padded = (cache->head_size + STRIP - 1) / STRIP * STRIP, bytes = cache->bf16 ? 2 : 4;
    long *first_item = malloc((step->requests + 1) * sizeof *first_item);
    if (!first_item) return 1;
    struct attention a = {
        .step = step, .cache = cache, .q = q, .k = k, .v = v, .out = out, .first_item = first_item,
        .q_stride = q_stride, .k_stride = k_stride, .v_stride = v_stride, .group = q_heads / cache->kv_heads,
        .padded = padded, .strip_bytes = padded * STRIP * bytes, .window = window, .scale = scale, .soft_cap = soft_cap,
    };
    first_item[0] = 0;
    for (long r = 0; r < step->requests; r++)
        first_item[r + 1] = first_item[r] + (rows_of(&a, r) + BLOCK_ROWS - 1) / BLOCK_ROWS;
    // A request may see pages that another one fills in this step: everything is stored before anything is read. A
    // lone request of one block stores what only that block reads.
    a.stored = step->requests > 1 || first_item[step->requests] > 1;
    if (a.stored) parallel_for(step->requests * cache->kv_heads, parallel_threads(), write_item, &a);
    parallel_for(first_item[step->requests] * cache->kv_heads, parallel_threads(), attend_item, &a);
    free(first_item);
    long used = step->query_start[step->requests], row_bytes = q_heads * cache->head_size * bytes;
    memset((char *)out + used * row_bytes, 0, (step->tokens - used) * row_bytes);
    return 0;
}
