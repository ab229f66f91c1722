// y = x wᵀ + bias over weights packed into panels.
#include "panels.h"
#include "parallel.h"

long dovetail_packed_bytes(int bf16, long outputs, long inputs) {
    return panels_of(outputs) * steps_of(bf16, inputs) * PANEL_BYTES;
}

struct pack {
    const char *weight;
    char *packed;
    long outputs, inputs, steps;
    int bf16;
};

static void pack_panel(const void *context, long panel) {
    const struct pack *p = context;
    long size = p->bf16 ? 2 : 4, row_bytes = p->inputs * size;
    char *to = p->packed + panel * p->steps * PANEL_BYTES;
    memset(to, 0, p->steps * PANEL_BYTES);
    for (long i = 0; i < PANEL && panel * PANEL + i < p->outputs; i++) {
        const char *row = p->weight + (panel * PANEL + i) * row_bytes;
        for (long step = 0; step < p->steps; step++) {
            long left = row_bytes - step * 4;
            memcpy(to + step * PANEL_BYTES + i * 4, row + step * 4, left < 4 ? left : 4);
        }
    }
}

void dovetail_pack(int bf16, const void *weight, void *packed, long outputs, long inputs) {
    struct pack p = {weight, packed, outputs, inputs, steps_of(bf16, inputs), bf16};
    parallel_for(panels_of(outputs), parallel_threads(), pack_panel, &p);
}

struct linear {
    const char *x, *packed;
    const void *bias;
    void *y;
    long rows, inputs, outputs, x_stride, steps, panels;
};

INLINE void linear_tile(int bf16, int rows, const struct linear *l, long row, long panel, int part) {
    const char *a[TILE_ROWS];
    vec acc[TILE_ROWS][TILE_VECS];
    for (int r = 0; r < rows; r++) a[r] = element(bf16, l->x, (row + r) * l->x_stride);
    panel_tile(bf16, rows, acc, a, l->packed + panel * l->steps * PANEL_BYTES, part, l->steps);
    for (int j = 0; j < TILE_VECS; j++) {
        long output = panel * PANEL + part + j * LANES;
        if (output >= l->outputs) break;
        vec bias = l->bias ? load_upto(bf16, l->bias, output, l->outputs) : vec_set(0);
        for (int r = 0; r < rows; r++) {
            vec y = l->bias ? vec_add(acc[r][j], bias) : acc[r][j];
            store_upto(bf16, element_mut(bf16, l->y, (row + r) * l->outputs), output, l->outputs, y);
        }
    }
}

INLINE void linear_item(int bf16, const struct linear *l, long item) {
    long block = item / l->panels, panel = item % l->panels;
    long first = block * BLOCK_ROWS, end = first + BLOCK_ROWS < l->rows ? first + BLOCK_ROWS : l->rows;
    for (int part = 0; part < PANEL; part += TILE_VECS * LANES) {
        for (long row = first; row < end; row += TILE_ROWS) {
#define TILE(n) linear_tile(bf16, n, l, row, panel, part)
            WITH_ROWS(end - row < TILE_ROWS ? end - row : TILE_ROWS, TILE)
#undef TILE
        }
    }
}

static void linear_fp32(const void *context, long item) { linear_item(0, context, item); }
static void linear_bf16(const void *context, long item) { linear_item(1, context, item); }

// x: [rows, inputs] with x_stride elements between rows; bf16 needs an even number of inputs. y: [rows, outputs].
void dovetail_linear(int bf16, const void *x, long x_stride, const void *packed, const void *bias, void *y, long rows,
                     long inputs, long outputs) {
    long panels = panels_of(outputs), blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    struct linear l = {x, packed, bias, y, rows, inputs, outputs, x_stride, bf16 ? inputs / 2 : inputs, panels};
    parallel_for(panels * blocks, parallel_threads(), bf16 ? linear_bf16 : linear_fp32, &l);
}

struct gather {
    const int64_t *ids;
    const char *packed;
    char *out;
    long count, steps;
};

static void gather_row(const void *context, long row) {
    const struct gather *g = context;
    const char *from = g->packed + g->ids[row] / PANEL * g->steps * PANEL_BYTES + g->ids[row] % PANEL * 4;
    char *to = g->out + row * g->steps * 4;
    for (long step = 0; step < g->steps; step++) memcpy(to + step * 4, from + step * PANEL_BYTES, 4);
}

// Rows of a packed weight, as it was before packing; bf16 needs an even number of inputs. Returns 0, or 1 when an id is
// outside 0 .. outputs - 1; then nothing is written.
int dovetail_gather(int bf16, const int64_t *ids, long count, const void *packed, void *out, long inputs, long outputs) {
    struct gather g = {ids, packed, out, count, bf16 ? inputs / 2 : inputs};
    for (long i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= outputs) return 1;
    parallel_for(count, count < 8 ? 1 : parallel_threads(), gather_row, &g);
    return 0;
}
