"""Two 4-bit codes in one byte."""

from __future__ import annotations

import torch


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [O, D] of values below 16 -> uint8 [O, D / 2], the even column of two in the low half."""
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).contiguous()


def unpack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((codes & 15, codes >> 4), dim=2).view(codes.shape[0], -1)
