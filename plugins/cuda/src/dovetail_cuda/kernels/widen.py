"""Narrow numbers as the wide ones that they are multiplied with; every conversion is exact.

Compiled code converts four bytes at a time: a byte beside the upper half of a power of two is a wide number, from which
that power is subtracted (Kim et al. 2022, arXiv:2211.10017). fp8 has its bits moved into place, and its exponent's bias
corrected by a product; a NaN becomes a number.
"""

from __future__ import annotations

import triton
import triton.language as tl

INT8_TO_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 digits, signs, a, b, minus;
    and.b32 digits, $2, 0x7f7f7f7f;
    and.b32 signs, $2, 0x80808080;
    mov.b32 minus, 0xbf80bf80;
    prmt.b32 a, signs, 0x43434343, 0x4140;
    prmt.b32 b, digits, 0x43434343, 0x4140;
    fma.rn.bf16x2 $0, a, minus, b;
    prmt.b32 a, signs, 0x43434343, 0x4342;
    prmt.b32 b, digits, 0x43434343, 0x4342;
    fma.rn.bf16x2 $1, a, minus, b;
}""")
"""128 plus the low seven bits, minus 128, or minus 256 for negative ones."""
INT8_TO_FP16: tl.constexpr = tl.constexpr("""{
    .reg .b32 shifted, a, offset;
    xor.b32 shifted, $2, 0x80808080;
    mov.b32 offset, 0x64806480;
    prmt.b32 a, shifted, 0x64646464, 0x4140;
    sub.rn.f16x2 $0, a, offset;
    prmt.b32 a, shifted, 0x64646464, 0x4342;
    sub.rn.f16x2 $1, a, offset;
}""")
FP8_TO_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 wide, sign, rest, factor, zero;
    mov.b32 factor, 0x7b807b80;
    mov.b32 zero, 0x80008000;
    prmt.b32 wide, $2, 0, 0x1404;
    and.b32 sign, wide, 0x80008000;
    and.b32 rest, wide, 0x7f007f00;
    shr.b32 rest, rest, 4;
    or.b32 rest, rest, sign;
    fma.rn.bf16x2 $0, rest, factor, zero;
    prmt.b32 wide, $2, 0, 0x3424;
    and.b32 sign, wide, 0x80008000;
    and.b32 rest, wide, 0x7f007f00;
    shr.b32 rest, rest, 4;
    or.b32 rest, rest, sign;
    fma.rn.bf16x2 $1, rest, factor, zero;
}""")
PAIRS_TO_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 low, high, a, minus, offset;
    and.b32 low, $4, 0x0f0f0f0f;
    shr.b32 high, $4, 4;
    and.b32 high, high, 0x0f0f0f0f;
    mov.b32 minus, 0xc308c308;
    mov.b32 offset, 0x3f803f80;
    prmt.b32 a, low, 0x43434343, 0x4140;
    fma.rn.bf16x2 $0, a, offset, minus;
    prmt.b32 a, low, 0x43434343, 0x4342;
    fma.rn.bf16x2 $1, a, offset, minus;
    prmt.b32 a, high, 0x43434343, 0x4140;
    fma.rn.bf16x2 $2, a, offset, minus;
    prmt.b32 a, high, 0x43434343, 0x4342;
    fma.rn.bf16x2 $3, a, offset, minus;
}""")
PAIRS_TO_FP16: tl.constexpr = tl.constexpr("""{
    .reg .b32 low, high, a, offset;
    and.b32 low, $4, 0x0f0f0f0f;
    shr.b32 high, $4, 4;
    and.b32 high, high, 0x0f0f0f0f;
    mov.b32 offset, 0x64086408;
    prmt.b32 a, low, 0x64646464, 0x4140;
    sub.rn.f16x2 $0, a, offset;
    prmt.b32 a, low, 0x64646464, 0x4342;
    sub.rn.f16x2 $1, a, offset;
    prmt.b32 a, high, 0x64646464, 0x4140;
    sub.rn.f16x2 $2, a, offset;
    prmt.b32 a, high, 0x64646464, 0x4342;
    sub.rn.f16x2 $3, a, offset;
}""")
SCALED_PAIR_TO_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 both, one, minus;
    mad.lo.u32 both, $2, 4096, $2;
    lop3.b32 both, both, 0x000f000f, 0x43004300, 0xea;
    mov.b32 one, 0x3f803f80;
    mov.b32 minus, 0xc308c308;
    fma.rn.bf16x2 both, both, one, minus;
    fma.rn.bf16x2 both, both, one, $3;
    mul.rn.bf16x2 one, both, $5;
    fma.rn.bf16x2 both, both, $4, one;
    mov.b32 {$0, $1}, both;
}""")
"""The halves of one byte, less 8, plus an offset, times a scale that is the sum of two numbers of bfloat16: the
product is rounded about as one with a float32 is.
"""


@triton.jit
def widen(codes: tl.tensor, dtype: tl.constexpr, COMPILED: tl.constexpr) -> tl.tensor:
    """int8 or fp8 (e4m3) as ``dtype``."""
    if COMPILED and dtype == tl.bfloat16 and codes.dtype == tl.int8:
        wide = tl.inline_asm_elementwise(INT8_TO_BF16, "=r,=r,r", [codes], tl.bfloat16, True, 4)
    elif COMPILED and dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(FP8_TO_BF16, "=r,=r,r", [codes], tl.bfloat16, True, 4)
    elif COMPILED and dtype == tl.float16 and codes.dtype == tl.int8:
        wide = tl.inline_asm_elementwise(INT8_TO_FP16, "=r,=r,r", [codes], tl.float16, True, 4)
    else:
        wide = codes.to(dtype)
    return wide


@triton.jit
def widen_pairs(pairs: tl.tensor, dtype: tl.constexpr, COMPILED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The low and the high half of each byte, less 8, as ``dtype``."""
    if COMPILED and dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            PAIRS_TO_BF16, "=r,=r,=r,=r,r", [pairs], (tl.bfloat16, tl.bfloat16), True, 4
        )
    elif COMPILED and dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(
            PAIRS_TO_FP16, "=r,=r,=r,=r,r", [pairs], (tl.float16, tl.float16), True, 4
        )
    else:
        low, high = ((pairs & 15).to(tl.int8) - 8).to(dtype), ((pairs >> 4).to(tl.int8) - 8).to(dtype)
    return low, high
