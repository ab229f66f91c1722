// The one inner loop behind every matrix product here: a register tile of TILE_ROWS x TILE_VECS accumulators. Sums run
// over the steps in order, one accumulator per output, so an output has the same bits in every tile shape.
#ifndef DOVETAIL_TILE_H
#define DOVETAIL_TILE_H

#include "simd.h"

#define TILE_ROWS 6

// acc[r][j] += sum over steps of broadcast(a[r][step]) * b[j][step]. A step is 32 bits of `a`: one fp32 number, or two bf16.
INLINE void tile_steps(int bf16, int rows, int vecs, vec acc[TILE_ROWS][TILE_VECS], const char *const a[TILE_ROWS],
                       const char *const b[TILE_VECS], long b_stride, long steps) {
    for (long step = 0; step < steps; step++) {
        vec b_vec[TILE_VECS];
        for (int j = 0; j < vecs; j++) b_vec[j] = vec_load(b[j] + step * b_stride);
        for (int r = 0; r < rows; r++) {
            float pair;
            memcpy(&pair, a[r] + step * 4, 4);
            vec a_vec = vec_set(pair);
            for (int j = 0; j < vecs; j++)
                acc[r][j] = bf16 ? vec_dot2(acc[r][j], a_vec, b_vec[j]) : vec_fma(a_vec, b_vec[j], acc[r][j]);
        }
    }
}

// Calls `body(rows)` with a compile-time constant, so that its accumulators live in registers.
#define WITH_ROWS(rows, body) \
    switch (rows) {           \
        case 1: body(1); break; \
        case 2: body(2); break; \
        case 3: body(3); break; \
        case 4: body(4); break; \
        case 5: body(5); break; \
        default: body(6); break; \
    }

#endif
