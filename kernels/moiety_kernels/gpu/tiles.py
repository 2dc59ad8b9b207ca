"""Which tile a grouped GEMM is cut into, by shape: one small table.

UNTUNED. No GPU has run these: they are estimates from what a Hopper SM holds (227 KiB of shared memory, 64 K registers, a
warpgroup multiplies 64 rows at a time), and all that was verified is that they compile for sm_90 without spilling
(`python -m moiety_kernels.gpu.aot`). `python -m moiety_kernels.bench --tune` measures and prints the table to put here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import gcd

import torch

from moiety_kernels.gpu.operand import KINDS, WHOLE, Operand


@dataclass(frozen=True, slots=True)
class Tile:
    """`rows` x `columns` of the output a program, `depth` of K at a time; a gated tile reads 2 x `columns` of weights."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int  # of depth in flight
    band: int = 8  # row tiles that share a strip of weights
    persistent: bool = False  # a program an SM, each computing tile after tile, instead of a program a tile
    descriptors: bool = False  # fetched by the tensor memory accelerator where the weights allow it


# (rows per expert up to, gated tile, plain tile). Decode: the tile is as narrow as the matrix unit allows, and what counts
# is bytes in flight, 64 KiB an SM and more, so deep strips of few columns. Prefill: 128 x 256 products, the largest whose
# sums fit the registers of two warpgroups (128 each a thread), at 64 columns, 128 bytes, a stage.
TABLE = (
    (16, Tile(16, 32, 128, 4, 4, band=1), Tile(16, 64, 128, 4, 4, band=1)),
    (32, Tile(32, 32, 128, 4, 4, band=2), Tile(32, 64, 128, 4, 4, band=2)),
    (96, Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4)),
    (None, Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4)),
)
DECODE_ROWS = 32  # per expert, and fewer: K may be split
FLOAT32 = Tile(32, 32, 32, 4, 2)  # exact float32 products run on the ordinary cores: registers are the limit
FIXED = Tile(64, 64, 64, 4, 4)  # for any number of rows: where bits must not depend on it
FILLS = 2  # programs on each SM that occupy it
SHALLOWEST = 4  # steps of depth that a part of a split sum is worth


def choose(rows: int, experts: int, columns: int, depth: int, dtype: torch.dtype, gated: bool) -> Tile:
    """The tile for `rows` in all over `experts`, `columns` of output and products of `depth`."""
    if dtype == torch.float32:
        return FLOAT32
    each = rows / max(1, min(experts, rows))
    _, *tiles = next(line for line in TABLE if line[0] is None or each <= line[0])
    tile = tiles[0] if gated else tiles[1]
    fits = tile.depth
    while fits > 32 and depth % fits:  # an end past K costs masks and wide loads: half a step does not
        fits //= 2
    return replace(tile, depth=fits)


def fitting(tile: Tile, matrices: Operand) -> Tile:
    """`tile` with a depth that whole groups of the matrices' scales fit, or that fits whole into one."""
    group, kind = matrices.group, KINDS[matrices.kind]
    if kind == "plain" or group == WHOLE:
        return tile
    depth = tile.depth
    if kind in ("fp8", "int4") and group >= depth:
        depth = gcd(depth, group)
        if group < matrices.shape[1] and tile.rows > 64:
            # Each step's product is scaled before it is added: two sets of sums where the plain tile has one, which would
            # spill (40 to 288 bytes a thread, compiled for sm_90).
            tile = replace(tile, rows=64, columns=tile.columns // 2, warps=4)
    elif group & (group - 1):
        depth = gcd(depth, group)
    depth = max(depth, 32 if kind == "mxfp4" else 16)
    if max(depth, group) % min(depth, group) or (group < depth and group & (group - 1)):
        raise ValueError(f"{kind} groups of {group} columns: must be a power of two, or a multiple of 16")
    return replace(tile, depth=depth)


@cache
def processors(device: torch.device) -> int:
    """SMs of a CUDA device; elsewhere, where kernels are only interpreted or compiled, an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def parts(tile: Tile, rows: int, experts: int, columns: int, depth: int, device: torch.device) -> int:
    """How many programs share one sum over K: enough to fill the device, none shallower than SHALLOWEST steps."""
    programs = min(experts, rows) * -(-columns // tile.columns)
    wanted, possible = -(-FILLS * processors(device) // max(programs, 1)), depth // (tile.depth * SHALLOWEST)
    return max(1, min(wanted, possible, 16)) if rows <= DECODE_ROWS * min(experts, rows) else 1
