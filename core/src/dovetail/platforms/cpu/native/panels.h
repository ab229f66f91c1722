// Weights in panels of PANEL outputs: [panel][step][PANEL] of 32 bits, where a step is one fp32 input or two bf16 inputs. A
// panel streams through memory in order; outputs beyond the last are zero.
#ifndef DOVETAIL_PANELS_H
#define DOVETAIL_PANELS_H

#include "tile.h"

#define PANEL 64
#define PANEL_BYTES (PANEL * 4)
#define BLOCK_ROWS 96  // rows of x that stay in the second-level cache while panels pass

INLINE long panels_of(long outputs) { return (outputs + PANEL - 1) / PANEL; }
INLINE long steps_of(int bf16, long inputs) { return bf16 ? (inputs + 1) / 2 : inputs; }

long dovetail_packed_bytes(int bf16, long outputs, long inputs);

// acc[r][j] = row a[r] times the outputs of a panel that begin at `part`.
INLINE void panel_tile(int bf16, int rows, vec acc[TILE_ROWS][TILE_VECS], const char *const a[TILE_ROWS],
                       const char *panel, int part, long steps) {
    const char *b[TILE_VECS];
    for (int j = 0; j < TILE_VECS; j++) {
        b[j] = panel + (part + j * LANES) * 4;
        for (int r = 0; r < rows; r++) acc[r][j] = vec_set(0);
    }
    tile_steps(bf16, rows, TILE_VECS, acc, a, b, PANEL_BYTES, steps);
}

#endif
