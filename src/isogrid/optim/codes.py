"""Optimizer state in few bits: block-wise 8-bit moments and affine low-bit projectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from isogrid.optim.subspaces import drawn_from

BLOCK = 256
SMALLEST = 4096


@cache
def dynamic_table(signed: bool) -> Tensor:
    """The 256 values of the dynamic 8-bit type, ascending (Dettmers et al. 2022, 8-bit optimizers).

    Seven decades; decade i holds ``2^i`` midpoints of a uniform partition of [0.1, 1] with either sign, or ``2^(i+1)``
    without signs; plus 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += middles + [-value for value in middles] * signed
    return torch.tensor(sorted(values), dtype=torch.float64)


@dataclass(frozen=True)
class Place:
    """Where flat values stand among all of a state, of which other ranks hold the rest.

    Blocks are blocks of the whole, whoever holds it: one that lies across two ranks has one scale. The scales, a
    sixty-fourth of the codes, are whole on every rank.

    Attributes:
        start: number of the first.
        total: of all ranks.
        largest: the largest over ranks of each entry.
    """

    start: int
    total: int
    largest: Callable[[Tensor], Tensor]


def _blocks(flat: Tensor, place: Place | None) -> tuple[Tensor, slice]:
    """``(blocks, 256)``, zeros where other ranks' values are, and which blocks of the whole these are."""
    if place is None:
        return flat.view(-1, BLOCK), slice(None)
    before = place.start % BLOCK
    first, filled = place.start // BLOCK, functional.pad(flat, (before, -(before + len(flat)) % BLOCK))
    return filled.view(-1, BLOCK), slice(first, first + len(filled) // BLOCK)


def takes_codes(count: int) -> bool:
    """Whether a state of this many numbers is stored in 8 bits: at least 4,096, in whole blocks of 256."""
    return count >= SMALLEST and count % BLOCK == 0


def encode(values: Tensor, signed: bool, place: Place | None = None) -> tuple[Tensor, Tensor]:
    """``codes`` uint8 of the values' shape, and one float32 ``scale`` per 256 consecutive values of the whole.

    The scale is the largest magnitude of the block, at least 1e-12; a code is the nearest of 256 table values.

    Args:
        values: the whole, or one rank's part of it.
        signed: whether values may be negative.
        place: of a part.
    """
    blocks, mine = _blocks(values.reshape(-1), place)
    scale = blocks.abs().amax(1).float()
    if place is not None:
        whole = scale.new_zeros(place.total // BLOCK)
        whole[mine] = scale
        scale = place.largest(whole)
    scale = scale.clamp(min=1e-12)
    table = dynamic_table(signed).to(values.device)
    between = ((table[1:] + table[:-1]) / 2).to(values.dtype)
    codes = torch.bucketize(blocks / scale[mine].to(values.dtype)[:, None], between).to(torch.uint8).view(-1)
    return _cut(codes, values.numel(), place).view(values.shape), scale


def decode(codes: Tensor, scale: Tensor, signed: bool, dtype: torch.dtype, place: Place | None = None) -> Tensor:
    """The values that `encode` stood for."""
    table = dynamic_table(signed).to(device=codes.device, dtype=dtype)
    blocks, mine = _blocks(codes.reshape(-1), place)
    values = (table[blocks.int()] * scale[mine].to(dtype)[:, None]).view(-1)
    return _cut(values, codes.numel(), place).view(codes.shape)


def _cut(filled: Tensor, count: int, place: Place | None) -> Tensor:
    return filled if place is None else filled[place.start % BLOCK :][:count]


def encode_affine(values: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of ``bits`` bits (4: two in a byte), with float32 scale and zero point per 256 consecutive values.

    ``s = (max - min) / (2^b - 1)``, at least 1e-5; ``z = clamp(-round(min / s))``; ``code = clamp(round(w / s) + z)``
    (Q-GaLore, Zhang et al. 2024), with ``min <= 0 <= max``. The last group is filled up with its last value.
    """
    flat = values.reshape(-1)
    short = -len(flat) % BLOCK
    if short:
        flat = torch.cat([flat, flat[-1:].expand(short)])
    groups = flat.view(-1, BLOCK)
    top = 2**bits - 1
    # Zero is among the values: a group of one sign would be cut to the zero point's range.
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / top).clamp(min=1e-5)
    zero = (-(low / scale).round()).clamp(0, top)
    codes = ((groups / scale).round() + zero).clamp(0, top).to(torch.uint8).view(-1)
    if bits == 4:
        codes = codes[0::2] | (codes[1::2] << 4)
    return codes, scale[:, 0].float(), zero[:, 0].float()


def decode_affine(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """``s (code - z)`` in the given shape."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], 1)
    groups = codes.reshape(-1, BLOCK).to(dtype)
    values = scale.to(dtype)[:, None] * (groups - zero.to(dtype)[:, None])
    return values.view(-1)[: shape[0] * shape[1]].view(shape)


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16 without bias: a uniform 16-bit integer is added below the cut, then the tail is dropped.

    Plain rounding loses every update that is smaller than 2^-8 of the weight.
    """
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32, device=generator.device)
    bits = values.contiguous().view(torch.int32) + noise.to(values.device)
    return (bits & -65536).view(torch.float32).to(torch.bfloat16)


def put_back(weight: Tensor, stepped: Tensor, group: Mapping[str, Any], index: int, step: int) -> None:
    """Write a weight that was stepped in a wider precision, rounded as its group says.

    Args:
        weight: overwritten.
        stepped: of its shape.
        group: options.
        index: of the parameter among all; with seed and step it gives the noise, drawn on the weight's device.
        step: its number.
    """
    if group["stochastic_rounding"] and weight.dtype == torch.bfloat16:
        # Refreshes never reach numbers this large.
        generator = drawn_from(group["seed"], index, 2**40 + step, weight.device)
        stepped = round_stochastically(stepped, generator)
    weight.copy_(stepped)
