"""Casts and products that agree on a GPU and in Triton's interpreter.

The interpreter truncates when it casts to bfloat16, and it cannot multiply bfloat16.
"""

import triton
import triton.language as tl

# Read once, at import, because `triton.jit` also decides at import.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def narrowed(value, DTYPE: tl.constexpr):
    """Casts float32 to DTYPE, rounding to nearest, ties to even; for float8_e4m3 the values must be within +-448."""
    if INTERPRETED:
        bits = value.to(tl.uint32, bitcast=True)
        if DTYPE == tl.bfloat16:
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            value = bits.to(tl.float32, bitcast=True)
        if DTYPE == tl.float8e4nv:  # 3 bits of mantissa, steps of at least 2^-9
            power = tl.maximum((bits & 0x7F800000) >> 23, 121) - 3
            step = (power << 23).to(tl.float32, bitcast=True)
            near = ((tl.abs(value) / step + 12582912.0) - 12582912.0) * step
            value = (near.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def multiplied(x, w, total, FRESH: tl.constexpr):
    """Returns the matrix product of x and w in float32, plus `total` unless FRESH."""
    if INTERPRETED:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    if FRESH:
        return tl.dot(x, w, input_precision="ieee")
    return tl.dot(x, w, total, input_precision="ieee")
