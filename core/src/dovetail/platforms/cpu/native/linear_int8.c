// y = (x x_scale) (w scale)ᵀ of int8 x and w. Sums are exact in int32. The weight lies in panels of PANEL outputs:
// [panel][step][PANEL] of 32 bits, where a step is four inputs.
#include "codes.h"
#include "parallel.h"
#include "tile.h"

#define PANEL 64
#define PANEL_BYTES (PANEL * 4)
#define BLOCK_ROWS 96

struct linear_int8 {
    const int8_t *x;
    const float *x_scale, *scale;
    const int32_t *offset;
    const char *packed;
    void *y;
    long rows, inputs, outputs, panels;
    int bf16;
};

INLINE void tile_int8(int bf16, int rows, const struct linear_int8 *l, long row, long panel, int part) {
    ivec acc[TILE_ROWS][TILE_VECS];
    const char *b = l->packed + panel * (l->inputs / 4) * PANEL_BYTES + part * 4;
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < TILE_VECS; j++) acc[r][j] = ivec_set(0);
    for (long i = 0; i < l->inputs; i += 4, b += PANEL_BYTES) {
        ivec w[TILE_VECS];
        for (int j = 0; j < TILE_VECS; j++) w[j] = ivec_load(b + j * LANES * 4);
        for (int r = 0; r < rows; r++) {
            uint32_t four;
            memcpy(&four, l->x + (row + r) * l->inputs + i, 4);
            ivec a = ivec_set((int32_t)(four ^ 0x80808080u));  // x + 128, which `offset` undoes
            for (int j = 0; j < TILE_VECS; j++) acc[r][j] = ivec_dot4(acc[r][j], a, w[j]);
        }
    }
    for (int j = 0; j < TILE_VECS; j++) {
        long output = panel * PANEL + part + j * LANES;
        if (output >= l->outputs) break;
        ivec offset = ivec_load(l->offset + output);
        vec scale = load_upto(0, l->scale, output, l->outputs);
        for (int r = 0; r < rows; r++) {
            vec sum = ivec_to_vec(ivec_sub(acc[r][j], offset));
            vec y = vec_mul(vec_mul(sum, vec_set(l->x_scale[row + r])), scale);
            store_upto(bf16, element_mut(bf16, l->y, (row + r) * l->outputs), output, l->outputs, y);
        }
    }
}

static void int8_item(const void *context, long item) {
    const struct linear_int8 *l = context;
    long block = item / l->panels, panel = item % l->panels;
    long first = block * BLOCK_ROWS, end = first + BLOCK_ROWS < l->rows ? first + BLOCK_ROWS : l->rows;
    for (int part = 0; part < PANEL; part += TILE_VECS * LANES) {
        for (long row = first; row < end; row += TILE_ROWS) {
            long rows = end - row < TILE_ROWS ? end - row : TILE_ROWS;
#define TILE(n) (l->bf16 ? tile_int8(1, n, l, row, panel, part) : tile_int8(0, n, l, row, panel, part))
            WITH_ROWS(rows, TILE)
#undef TILE
        }
    }
}

// x: [rows, inputs], a multiple of 4 inputs; offset: 128 times the sum of each output's weights, zeros up to the last
// panel's end; y: bf16 or fp32.
void dovetail_linear_int8(int bf16, const int8_t *x, const float *x_scale, const void *packed, const int32_t *offset,
                          const float *scale, void *y, long rows, long inputs, long outputs) {
    long panels = (outputs + PANEL - 1) / PANEL, blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    struct linear_int8 l = {x, x_scale, scale, offset, packed, y, rows, inputs, outputs, panels, bf16};
    parallel_for(panels * blocks, parallel_threads(), int8_item, &l);
}
