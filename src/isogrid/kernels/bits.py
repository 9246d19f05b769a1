"""Masks and codes of few bits, packed into bytes: what sparse and low-bit formats store beside their values.

A row of a matrix begins with a byte of its own; within it entries follow each other bit by bit, the lowest bit of a
byte first. A row of a mask is then what AVX-512 takes as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(entries: int, bits: int = 1) -> int:
    """Bytes of one packed row of so many entries."""
    return -(-entries * bits // 8)


def pack_mask(mask: Tensor) -> Tensor:
    """``(rows, n)`` booleans to ``(rows, ceil(n / 8))`` uint8."""
    rows, n = mask.shape
    width = packed_bytes(n)
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, 8 * width - n)).view(rows, width, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, n: int) -> Tensor:
    """``(rows, ceil(n / 8))`` uint8 to ``(rows, n)`` booleans."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> places & 1).flatten(1)[:, :n].bool()


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """``(rows, n)`` integers below ``2 ** bits``, bits in 1 … 8, to ``(rows, ceil(n · bits / 8))`` uint8."""
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    return pack_mask((codes.to(torch.uint8).unsqueeze(-1) >> places & 1).flatten(1).bool())


def unpack_codes(packed: Tensor, bits: int, n: int) -> Tensor:
    """``(rows, ceil(n · bits / 8))`` uint8 to ``(rows, n)`` uint8."""
    if bits == 8:
        return packed[:, :n]
    if 8 % bits == 0:  # whole codes in every byte
        places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return (packed.unsqueeze(-1) >> places & 2**bits - 1).flatten(1)[:, :n]
    apart = unpack_mask(packed, n * bits).view(packed.shape[0], n, bits).to(torch.uint8)
    weights = 2 ** torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (apart * weights).sum(-1, dtype=torch.uint8)
