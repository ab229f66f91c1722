// y = x (w s)ᵀ + bias over weights of 8 bits in panels of PANEL outputs: [panel][input][PANEL] codes. Codes become fp32 in
// registers, and sums are fp32. Every output and group of inputs has a scale in `scale` [groups][outputs], by which the sum
// over that group is multiplied; so may every row of x, in `x_scale` [rows][groups].
#include "codes.h"
#include "parallel.h"
#include "tile.h"

#define PANEL 64
#define WIDTH (TILE_VECS * LANES)  // outputs that one tile computes
#define BLOCK_ROWS 96              // rows of x that pass while a part of a panel is decoded
#define AHEAD 64                   // inputs by which memory is asked for before it is needed
#define STAGED_INPUTS 64           // inputs that are decoded at a time when several tiles read them: first-level cache

struct linear8 {
    const float *x, *x_scale, *scale;
    const uint8_t *packed;
    const void *bias;
    void *y;
    long rows, inputs, outputs, x_stride, group, groups, panels;
    int fp8, bf16;
};

// A part of a panel for a block of rows: where it lies, and its sums over the current group and over those before.
struct part {
    long row, output, begin, end;
    const uint8_t *codes;
    float sum[BLOCK_ROWS][WIDTH], total[BLOCK_ROWS][WIDTH];
    float staged[STAGED_INPUTS][WIDTH];
};

INLINE void tile_sums(int staged, int fp8, int rows, const struct linear8 *l, struct part *p, long first, long begin, long end,
                      vec acc[TILE_ROWS][TILE_VECS]) {
    const float *x[TILE_ROWS];
    for (int r = 0; r < rows; r++) {
        x[r] = l->x + (p->row + first + r) * l->x_stride;
        for (int j = 0; j < TILE_VECS; j++)
            acc[r][j] = begin > p->begin ? vec_load(p->sum[first + r] + j * LANES) : vec_set(0);
    }
    for (long i = begin; i < end; i++) {
        vec w[TILE_VECS];
        if (staged) {
            for (int j = 0; j < TILE_VECS; j++) w[j] = vec_load(p->staged[i - begin] + j * LANES);
        } else {
            __builtin_prefetch(p->codes + (i + AHEAD) * PANEL);
            decode(fp8, p->codes + i * PANEL, w);
        }
        for (int r = 0; r < rows; r++) {
            vec a = vec_set(x[r][i]);
            for (int j = 0; j < TILE_VECS; j++) acc[r][j] = vec_fma(a, w[j], acc[r][j]);
        }
    }
}

// Multiplies the sums over a whole group by their scales and adds them to the totals.
INLINE void tile_scale(int rows, const struct linear8 *l, struct part *p, long first, long group,
                       vec acc[TILE_ROWS][TILE_VECS]) {
    for (int j = 0; j < TILE_VECS; j++) {
        long output = p->output + j * LANES;
        if (output >= l->outputs) break;
        vec scale = load_upto(0, l->scale + group * l->outputs, output, l->outputs);
        for (int r = 0; r < rows; r++) {
            vec y = l->fp8 ? vec_mul(acc[r][j], vec_set(FP8_UNIT)) : acc[r][j];
            if (l->x_scale) y = vec_mul(y, vec_set(l->x_scale[(p->row + first + r) * l->groups + group]));
            y = vec_mul(y, scale);
            float *total = p->total[first + r] + j * LANES;
            vec_store(total, group ? vec_add(vec_load(total), y) : y);
        }
    }
}

INLINE void tile8(int staged, int fp8, int rows, const struct linear8 *l, struct part *p, long first, long begin, long end) {
    vec acc[TILE_ROWS][TILE_VECS];
    tile_sums(staged, fp8, rows, l, p, first, begin, end, acc);
    if (end == p->end) {
        tile_scale(rows, l, p, first, p->begin / l->group, acc);
        return;
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < TILE_VECS; j++) vec_store(p->sum[first + r] + j * LANES, acc[r][j]);
}

INLINE void group_sums(int staged, int fp8, const struct linear8 *l, struct part *p, long rows) {
    long step = staged ? STAGED_INPUTS : p->end - p->begin;
    for (long begin = p->begin; begin < p->end; begin += step) {
        long end = begin + step < p->end ? begin + step : p->end;
        for (long i = begin; staged && i < end; i++) {
            vec w[TILE_VECS];
            decode(fp8, p->codes + i * PANEL, w);
            for (int j = 0; j < TILE_VECS; j++) vec_store(p->staged[i - begin] + j * LANES, w[j]);
        }
        for (long first = 0; first < rows; first += TILE_ROWS) {
#define TILE(n) tile8(staged, fp8, n, l, p, first, begin, end)
            WITH_ROWS(rows - first < TILE_ROWS ? rows - first : TILE_ROWS, TILE)
#undef TILE
        }
    }
}

INLINE void store_rows(int bf16, const struct linear8 *l, const struct part *p, long rows) {
    for (int j = 0; j < TILE_VECS; j++) {
        long output = p->output + j * LANES;
        if (output >= l->outputs) break;
        vec bias = l->bias ? load_upto(bf16, l->bias, output, l->outputs) : vec_set(0);
        for (long r = 0; r < rows; r++) {
            vec y = vec_load(p->total[r] + j * LANES);
            if (l->bias) y = vec_add(y, bias);
            store_upto(bf16, element_mut(bf16, l->y, (p->row + r) * l->outputs), output, l->outputs, y);
        }
    }
}

INLINE void linear8_item(int fp8, const struct linear8 *l, long item) {
    struct part p;
    long panel = item % l->panels;
    p.row = item / l->panels * BLOCK_ROWS;
    long rows = l->rows - p.row < BLOCK_ROWS ? l->rows - p.row : BLOCK_ROWS;
    for (long at = 0; at < PANEL; at += WIDTH) {
        p.output = panel * PANEL + at;
        p.codes = l->packed + panel * l->inputs * PANEL + at;
        for (p.begin = 0; p.begin < l->inputs; p.begin = p.end) {
            p.end = p.begin + l->group < l->inputs ? p.begin + l->group : l->inputs;
            if (rows > TILE_ROWS) group_sums(1, fp8, l, &p, rows);
            else group_sums(0, fp8, l, &p, rows);
        }
        if (l->bf16) store_rows(1, l, &p, rows);
        else store_rows(0, l, &p, rows);
    }
}

static void linear8_int8(const void *context, long item) { linear8_item(0, context, item); }
static void linear8_fp8(const void *context, long item) { linear8_item(1, context, item); }

// x: fp32 [rows, inputs] with x_stride elements between rows; y and bias: bf16 or fp32. x_scale and bias may be NULL.
void dovetail_linear8(int fp8, int bf16, const float *x, long x_stride, const float *x_scale, const uint8_t *packed,
                      const float *scale, const void *bias, void *y, long rows, long inputs, long outputs, long group) {
    long panels = (outputs + PANEL - 1) / PANEL, blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    struct linear8 l = {x,    x_scale, scale,   packed,   bias,  y,   rows,
                        inputs, outputs, x_stride, group, (inputs + group - 1) / group, panels, fp8, bf16};
    parallel_for(panels * blocks, parallel_threads(), fp8 ? linear8_fp8 : linear8_int8, &l);
}
