// A mixture of gated feed-forward experts over packed weights. Pairs of a token and one of its experts are sorted by expert;
// each expert then multiplies its rows as one matrix, and every token adds up its experts' results in the order of its choice.
// A row's sums run over the steps in order in every tile shape, so a token has the same bits whoever shares its experts.
#include "panels.h"
#include "parallel.h"

void dovetail_silu_and_mul(int bf16, const void *x, void *out, long rows, long size);

// Pair n is choice n % active of token n / active.
struct pairs {
    const int64_t *ids;
    long *start;  // [experts + 1]: an expert's rows among the sorted pairs
    long *block;  // [experts + 1]: the same in blocks of BLOCK_ROWS rows
    long *pair;   // [count]: which pair a row is
    long *row;    // [count]: which row a pair is, or -1 for one whose expert does not exist
    long count, active, experts;
};

// A projection of all experts.
struct projection {
    const struct pairs *pairs;
    const char *x, *packed;
    void *y;
    long inputs, outputs, steps, panels, expert_bytes;
    int by_token, bf16, y_bf16;  // whether rows of x are tokens, or sorted pairs
};

struct sum {
    const struct pairs *pairs;
    const float *weights, *y;
    void *out;
    long size;
};

static int exists(const struct pairs *p, long pair) { return p->ids[pair] >= 0 && p->ids[pair] < p->experts; }

static void sort_pairs(struct pairs *p) {
    memset(p->start, 0, (p->experts + 1) * sizeof(long));
    for (long n = 0; n < p->count; n++)
        if (exists(p, n)) p->start[p->ids[n] + 1]++;
    p->block[0] = 0;
    for (long e = 0; e < p->experts; e++) {
        p->block[e + 1] = p->block[e] + (p->start[e + 1] + BLOCK_ROWS - 1) / BLOCK_ROWS;
        p->start[e + 1] += p->start[e];
    }
    for (long n = 0; n < p->count; n++) {
        p->row[n] = exists(p, n) ? p->start[p->ids[n]]++ : -1;  // start[e] runs up to start[e + 1]
        if (p->row[n] >= 0) p->pair[p->row[n]] = n;
    }
    memmove(p->start + 1, p->start, p->experts * sizeof(long));
    p->start[0] = 0;
}

static long expert_of_block(const struct pairs *p, long block) {
    long low = 0, high = p->experts;
    while (high - low > 1) {
        long middle = (low + high) / 2;
        if (p->block[middle] <= block) low = middle;
        else high = middle;
    }
    return low;
}

INLINE void project_tile(int bf16, int rows, const struct projection *j, const char *panel, long row, long output, int part) {
    const char *a[TILE_ROWS];
    vec acc[TILE_ROWS][TILE_VECS];
    for (int r = 0; r < rows; r++) {
        long source = j->by_token ? j->pairs->pair[row + r] / j->pairs->active : row + r;
        a[r] = element(bf16, j->x, source * j->inputs);
    }
    panel_tile(bf16, rows, acc, a, panel, part, j->steps);
    for (int v = 0; v < TILE_VECS; v++) {
        long first = output + part + v * LANES;
        if (first >= j->outputs) break;
        for (int r = 0; r < rows; r++)
            store_upto(j->y_bf16, element_mut(j->y_bf16, j->y, (row + r) * j->outputs), first, j->outputs, acc[r][v]);
    }
}

INLINE void project_item(int bf16, const struct projection *j, long item) {
    const struct pairs *p = j->pairs;
    long block = item / j->panels, panel = item % j->panels, expert = expert_of_block(p, block);
    long first = p->start[expert] + (block - p->block[expert]) * BLOCK_ROWS;
    long end = first + BLOCK_ROWS < p->start[expert + 1] ? first + BLOCK_ROWS : p->start[expert + 1];
    const char *weights = j->packed + expert * j->expert_bytes + panel * j->steps * PANEL_BYTES;
    for (int part = 0; part < PANEL; part += TILE_VECS * LANES) {
        for (long row = first; row < end; row += TILE_ROWS) {
#define TILE(n) project_tile(bf16, n, j, weights, row, panel * PANEL, part)
            WITH_ROWS(end - row < TILE_ROWS ? end - row : TILE_ROWS, TILE)
#undef TILE
        }
    }
}

static void project_fp32(const void *context, long item) { project_item(0, context, item); }
static void project_bf16(const void *context, long item) { project_item(1, context, item); }

static void project(struct projection j) {
    j.steps = steps_of(j.bf16, j.inputs);
    j.panels = panels_of(j.outputs);
    j.expert_bytes = dovetail_packed_bytes(j.bf16, j.outputs, j.inputs);
    long blocks = j.pairs->block[j.pairs->experts];
    parallel_for(blocks * j.panels, parallel_threads(), j.bf16 ? project_bf16 : project_fp32, &j);
}

INLINE void sum_token(int bf16, const struct sum *s, long token) {
    const struct pairs *p = s->pairs;
    void *out = element_mut(bf16, s->out, token * s->size);
    for (long i = 0; i < s->size; i += LANES) {
        vec total = vec_set(0);
        for (long n = token * p->active; n < (token + 1) * p->active; n++)
            if (p->row[n] >= 0) total = vec_fma(vec_set(s->weights[n]), load_upto(0, s->y + p->row[n] * s->size, i, s->size), total);
        store_upto(bf16, out, i, s->size, total);
    }
}

static void sum_fp32(const void *context, long token) { sum_token(0, context, token); }
static void sum_bf16(const void *context, long token) { sum_token(1, context, token); }

// x, out: [tokens, hidden]; ids, weights: [tokens, active]. Weights are packed expert after expert; bf16 needs even sizes.
// Scratch: gate_up [tokens * active, 2 * inner] and gated [tokens * active, inner] in storage, down [tokens * active, hidden]
// in fp32, and 2 * (experts + 1 + tokens * active) longs for the order.
void dovetail_experts(int bf16, const void *x, const void *gate_up_packed, const void *down_packed, const int64_t *ids,
                      const float *weights, void *out, void *gate_up, void *gated, float *down, long *order, long tokens,
                      long active, long experts, long hidden, long inner) {
    long count = tokens * active;
    long *start = order, *block = start + experts + 1, *pair = block + experts + 1, *row = pair + count;
    struct pairs p = {ids, start, block, pair, row, count, active, experts};
    sort_pairs(&p);
    struct projection both = {.pairs = &p, .x = x, .packed = gate_up_packed, .y = gate_up, .inputs = hidden};
    both.outputs = 2 * inner, both.by_token = 1, both.bf16 = both.y_bf16 = bf16;
    project(both);
    dovetail_silu_and_mul(bf16, gate_up, gated, start[experts], inner);
    struct projection back = {.pairs = &p, .x = gated, .packed = down_packed, .y = down, .inputs = inner};
    back.outputs = hidden, back.bf16 = bf16;
    project(back);
    struct sum s = {&p, weights, down, out, hidden};
    parallel_for(tokens, count * hidden < 16384 ? 1 : parallel_threads(), bf16 ? sum_bf16 : sum_fp32, &s);
}
