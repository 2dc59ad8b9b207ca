"""Device functions that the expert GEMMs share: they find a tile's expert, multiply by its weights and activate.

Experts' matrices stay where they were loaded: kernels get one base pointer and, per expert, an offset from it in elements.
So nothing is stacked or copied when a placement changes.

Shape legend: R rows sorted by expert, E experts, K input features of the product, N output columns of a tile's matrix.
"""

from typing import Any

import triton
import triton.language as tl

from moiety_kernels.gpu.numbers import multiplied, narrowed
from moiety_kernels.reference.activation import Activation

# Weight formats: `KIND` of the kernels.
PLAIN, FP8, INT8, INT4, MXFP4 = (tl.constexpr(kind) for kind in range(5))


@triton.jit
def tiles_of(OFFSETS, E: tl.constexpr, E_PAD: tl.constexpr, BM: tl.constexpr):
    """Returns each expert's number of row tiles, and the inclusive running sums of these numbers, both [E_PAD]."""
    experts = tl.arange(0, E_PAD)
    first = tl.load(OFFSETS + experts, mask=experts < E, other=0)
    last = tl.load(OFFSETS + experts + 1, mask=experts < E, other=0)
    first, last = first.to(tl.int32), last.to(tl.int32)  # offsets may be int32 or int64
    tiles = (last - first + BM - 1) // BM
    return tiles, tl.cumsum(tiles, 0)


@triton.jit
def find_tile(OFFSETS, tiles, ends, tile, BM: tl.constexpr):
    """Returns the expert of row tile `tile`, the tile's first row, and the row after the expert's last."""
    passed = ends <= tile
    expert = tl.sum(passed.to(tl.int32), 0)
    before = tl.sum(tl.where(passed, tiles, 0), 0)
    row = tl.load(OFFSETS + expert).to(tl.int32) + (tile - before) * BM
    return expert, row, tl.load(OFFSETS + expert + 1).to(tl.int32)


@triton.jit
def matrix_rows(column, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """Returns the rows of the weight matrix that produce the BN output columns from `column` on.

    When GATED, these are 2 BN rows, alternately gate and up, whether or not the weights are INTERLEAVED. So one thread
    holds gate and up of a column, and the activation needs no exchange between threads. Rows past the end repeat the last.
    """
    if GATED:
        j = tl.arange(0, 2 * BN)
        if INTERLEAVED:
            rows = tl.minimum(2 * column + j, 2 * N - 1)
        else:
            rows = (j % 2) * N + tl.minimum(column + j // 2, N - 1)
    else:
        rows = tl.minimum(column + tl.arange(0, BN), N - 1)
    return rows


@triton.jit
def _e2m1(nibbles, scale):
    """Converts 4-bit floats (e2m1) [BN, BK] to float32 and multiplies them by `scale`.

    The two exponent bits and the mantissa bit, moved to float16's positions, give the value times 2^-14, also for
    subnormals.
    """
    bits = ((nibbles & 7) << 9) | ((nibbles & 8) << 12)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * (scale * 16384.0)


@triton.jit
def weight_tile(
    W,
    SCALE,
    ZERO,
    rows,
    k,
    k_start,
    stride_n,
    stride_k,
    scale_stride,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Returns BK columns from `k_start` of the given rows of an expert's matrix, in DTYPE: [rows, BK].

    mxfp4, and int4 in groups narrower than BK, are scaled here; `product` scales the other formats. Columns past K repeat
    earlier ones; x is zero there.
    """
    EVEN: tl.constexpr = K % BK == 0
    if KIND == INT4 or KIND == MXFP4:
        byte = k_start // 2 + tl.arange(0, BK // 2)
        if not EVEN:
            byte = tl.minimum(byte, K // 2 - 1)
        packed = tl.load(W + rows[:, None] * stride_n + byte[None, :])  # [BN, BK / 2], even columns in the low halves
        codes = tl.join(packed & 15, packed >> 4).reshape(packed.shape[0], BK).to(tl.int32)
        if KIND == INT4 and GROUP >= BK:
            zero = 8
            if ZERO is not None:
                zero = tl.load(ZERO + rows * scale_stride + k_start // GROUP).to(tl.int32)[:, None]
            tile = (codes - zero).to(tl.float32).to(DTYPE)
        else:
            shape: tl.constexpr = (packed.shape[0], BK // GROUP, GROUP)
            group = k_start // GROUP + tl.arange(0, BK // GROUP)
            if not EVEN:
                group = tl.minimum(group, K // GROUP - 1)
            at = rows[:, None] * scale_stride + group[None, :]
            scale = tl.load(SCALE + at).to(tl.float32)
            if KIND == MXFP4:
                scale = tl.exp2(scale - 127.0)
            scale = tl.broadcast_to(scale[:, :, None], shape).reshape(packed.shape[0], BK)
            if KIND == MXFP4:
                value = _e2m1(codes, scale)
            else:
                zero = 8
                if ZERO is not None:
                    zero = tl.load(ZERO + at).to(tl.int32)
                    zero = tl.broadcast_to(zero[:, :, None], shape).reshape(packed.shape[0], BK)
                value = (codes - zero).to(tl.float32) * scale
            tile = narrowed(value, DTYPE)
    else:
        if not EVEN:
            k = tl.minimum(k, K - 1)
        tile = tl.load(W + rows[:, None] * stride_n + k[None, :] * stride_k)
        if KIND == INT8:
            tile = (tile.to(tl.int32) - 128).to(tl.float32).to(DTYPE)
        elif tile.dtype != DTYPE:
            tile = tile.to(tl.float32).to(DTYPE)
    return tile


@triton.jit
def product(
    X,
    x_rows,
    x_stride,
    W,
    SCALE,
    ZERO,
    STARTS,
    expert,
    rows,
    stride_n,
    stride_k,
    scale_stride,
    k_first,
    k_last,
    E: tl.constexpr,
    KIND: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Multiplies x[x_rows, k_first:k_last] by one expert's matrix[rows, k_first:k_last], transposed: float32 [BM, rows].

    The result includes the weights' scales, but not those of fp8 rows. If one scale of int8, int4 or fp8 weights covers
    at least BK columns, float32 sums are scaled instead of weights: unscaled quantised weights are exact in bfloat16. If
    x is fp8, fp8 weights are multiplied as fp8. Sums run in order of k.
    """
    EVEN: tl.constexpr = K % BK == 0
    SCALED: tl.constexpr = (KIND == FP8 or KIND == INT8 or KIND == INT4) and GROUP >= BK  # scale after the product
    SPLIT: tl.constexpr = SCALED and GROUP < K  # there is more than one scale along k
    narrow: tl.constexpr = X.dtype.element_ty == tl.float8e4nv
    wide: tl.constexpr = tl.bfloat16 if narrow else X.dtype.element_ty
    dtype: tl.constexpr = tl.float8e4nv if narrow and KIND == FP8 else wide  # of the multiplied values
    start = tl.load(STARTS + expert)
    if ALIGNED:  # the compiler needs this for 16-byte loads and asynchronous copies
        start = tl.multiple_of(start, 16)
    W += start
    if SCALE is not None:
        SCALE += tl.load(STARTS + E + expert)
    if ZERO is not None:
        ZERO += tl.load(STARTS + 2 * E + expert)
    x_at = X + x_rows.to(tl.int64)[:, None] * x_stride
    total = tl.zeros((BM, rows.shape[0]), tl.float32)
    for k_start in range(k_first, k_last, BK):
        k = k_start + tl.arange(0, BK)
        if EVEN:
            x = tl.load(x_at + k[None, :])
        else:
            x = tl.load(x_at + k[None, :], mask=k[None, :] < K, other=0.0)
        w = weight_tile(W, SCALE, ZERO, rows, k, k_start, stride_n, stride_k, scale_stride, dtype, KIND, K, BK, GROUP)
        if x.dtype != dtype:
            x = x.to(tl.float32).to(dtype)
        if SPLIT:
            scale = tl.load(SCALE + (rows // GROUP_ROWS) * scale_stride + k_start // GROUP).to(tl.float32)
            total += multiplied(x, tl.trans(w), total, True) * scale[None, :]
        else:
            total = multiplied(x, tl.trans(w), total, False)
    if SCALED and not SPLIT:
        total *= tl.load(SCALE + (rows // GROUP_ROWS) * scale_stride).to(tl.float32)[None, :]
    return total


@triton.jit
def _erf_gelu(x):
    """Returns the exact GELU."""
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _tanh_gelu(x):
    """Returns the tanh approximation of GELU."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(2.0 * inner)  # (1 + tanh(y)) / 2 = sigmoid(2 y)


@triton.jit
def activate(total, ACTIVATION: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """Applies the activation of `reference/activation.py` in float32. When GATED, [BM, 2 BN] becomes [BM, BN]."""
    if GATED:
        gate, up = total.reshape(total.shape[0], total.shape[1] // 2, 2).split()
        if LIMIT is not None:
            gate = tl.where(gate > LIMIT, LIMIT, gate)  # NaN stays NaN, as in torch
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    else:
        gate, up = total, 1.0
    if ACTIVATION == "swiglu_clamped":
        value = (up + 1.0) * (gate * tl.sigmoid(gate * ALPHA))
    else:
        if ACTIVATION == "silu":
            value = gate * tl.sigmoid(gate)
        elif ACTIVATION == "gelu":
            value = _erf_gelu(gate)
        elif ACTIVATION == "gelu_pytorch_tanh":
            value = _tanh_gelu(gate)
        elif ACTIVATION == "relu":
            value = tl.where(gate < 0.0, 0.0, gate)
        elif ACTIVATION == "relu2":
            value = tl.where(gate < 0.0, 0.0, gate * gate)
        else:
            tl.static_assert(ACTIVATION == "none", "unknown activation")
            value = gate
        if GATED:
            value = value * up
    return value


def gate_options(activation: Activation | None) -> dict[str, Any]:
    """Returns the compile-time arguments of kernels that apply `activation`, or with None leave the products as they are."""
    if activation is None:
        return {"ACTIVATION": "none", "GATED": False, "INTERLEAVED": False, "LIMIT": None, "ALPHA": None}
    return {
        "ACTIVATION": activation.name,
        "GATED": activation.gated,
        "INTERLEAVED": activation.interleaved,
        "LIMIT": activation.limit,
        "ALPHA": activation.alpha,
    }
