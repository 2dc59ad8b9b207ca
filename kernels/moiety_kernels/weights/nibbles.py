"""Two 4-bit codes in one byte."""

from __future__ import annotations

import torch


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Packs uint8 [O, D] of values below 16 into uint8 [O, D / 2], even columns in the low half of a byte."""
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).contiguous()


def unpack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Unpacks uint8 [O, D / 2] into uint8 [O, D]: the inverse of `pack_nibbles`."""
    return torch.stack((codes & 15, codes >> 4), dim=2).view(codes.shape[0], -1)
