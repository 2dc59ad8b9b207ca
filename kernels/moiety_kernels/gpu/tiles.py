"""The tile sizes of grouped GEMMs by rows per expert (TABLE), and their choice for one product.

UNTUNED. No GPU has run these: they are estimates from a Hopper SM's resources (227 KiB of shared memory, 64 K registers, a
warpgroup multiplies 64 rows at a time). `python -m moiety_kernels.gpu.aot` compiles for sm_90, and checks
only that nothing spills and shared memory suffices. `python -m moiety_kernels.bench --tune` measures tiles and prints a
new TABLE.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import gcd

import torch

from moiety_kernels.gpu.operand import KINDS, WHOLE, Operand

SHARED = 227 * 1024  # bytes of shared memory that a program may use on sm_90


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's tile of a grouped GEMM: `rows` x `columns` of output, computed in steps of `depth` along K.

    A gated tile reads 2 x `columns` of weights.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int  # steps of `depth` in flight
    band: int = 8  # row tiles computed together on one strip of weights
    persistent: bool = False  # one program per SM computes tile after tile, instead of one program per tile
    descriptors: bool = False  # fetch by the tensor memory accelerator where the weights allow it


# (most rows per expert, gated tile, plain tile). Decode: tiles have as few rows as the matrix unit allows. Bytes in flight
# count, 64 KiB per SM and more, hence deep strips of few columns. Prefill: 128 x 256 products, the largest whose sums fit
# the registers of two warpgroups (128 per thread), with 64 columns of K, 128 bytes, per stage.
TABLE = (
    (16, Tile(16, 32, 128, 4, 4, band=1), Tile(16, 64, 128, 4, 4, band=1)),
    (32, Tile(32, 32, 128, 4, 4, band=2), Tile(32, 64, 128, 4, 4, band=2)),
    (96, Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4)),
    (None, Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4)),
)
DECODE_ROWS = 32  # up to this many rows per expert, K may be split
FLOAT32 = Tile(32, 32, 32, 4, 2)  # exact float32 products run on the CUDA cores: registers are the limit
FIXED = Tile(64, 64, 64, 4, 4)  # any number of rows, so that bits do not depend on that number
FILLS = 2  # programs that occupy one SM
SHALLOWEST = 4  # the fewest steps of depth in a part of a split sum


def choose(rows: int, experts: int, depth: int, dtype: torch.dtype, gated: bool) -> Tile:
    """Returns the tile for a grouped GEMM of `rows` rows in total, `experts` experts and `depth` inputs."""
    if dtype == torch.float32:
        return FLOAT32
    rows_per_expert = rows / max(1, min(experts, rows))
    _, *tiles = next(line for line in TABLE if line[0] is None or rows_per_expert <= line[0])
    tile = tiles[0] if gated else tiles[1]
    fits = tile.depth
    while fits > 32 and depth % fits:  # a step past the end of K costs masks and wide loads; half a step costs less
        fits //= 2
    return replace(tile, depth=fits)


def fit_to_groups(tile: Tile, matrices: Operand) -> Tile:
    """Returns `tile` with a depth that is a multiple or a divisor of the columns that share a scale.

    A tile of more than 64 rows may also be made smaller. Raises ValueError if no such depth is supported.
    """
    group, kind = matrices.group, KINDS[matrices.kind]
    if kind == "plain" or group == WHOLE:
        return tile
    depth = tile.depth
    if kind in ("fp8", "int4") and group >= depth:
        depth = gcd(depth, group)
        if group < matrices.shape[1] and tile.rows > 64:
            # Each step's product is scaled before it is added. That takes two sets of sums instead of one, which would
            # spill (40 to 288 bytes per thread, compiled for sm_90).
            tile = replace(tile, rows=64, columns=tile.columns // 2, warps=4)
    elif group & (group - 1):
        depth = gcd(depth, group)
    depth = max(depth, 32 if kind == "mxfp4" else 16)
    if max(depth, group) % min(depth, group) or (group < depth and group & (group - 1)):
        raise ValueError(f"{kind} groups of {group} columns: must be a power of two, or a multiple of 16")
    return replace(tile, depth=depth)


@cache
def processors(device: torch.device) -> int:
    """Returns the number of SMs of a CUDA device; that of an H100 for any other device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def split_count(tile: Tile, rows: int, experts: int, columns: int, depth: int, device: torch.device) -> int:
    """Returns into how many parts, 1 to 16, to split each sum over K; each part gets a program of its own.

    Enough parts to fill the device, if these have SHALLOWEST steps or more on average, else fewer. With more than
    DECODE_ROWS rows per expert on average, sums are not split: 1.
    """
    programs = min(experts, rows) * -(-columns // tile.columns)
    wanted, possible = -(-FILLS * processors(device) // max(programs, 1)), depth // (tile.depth * SHALLOWEST)
    return max(1, min(wanted, possible, 16)) if rows <= DECODE_ROWS * min(experts, rows) else 1
