"""Matrices held in trit planes: packing, the matrix, and the product that reads packed codes.

``W[i, j] = Σ_k scales[i, j // group, k] · trit[i, j, k]``, trits in {-1, 0, 1}. A row of codes is one section or
several. In a section of B bytes with d digits each, digit k of byte b is column ``k B + b``, so that bytes beside each
other hold columns beside each other; a row is filled up with zeros to whole bytes.

- "two_bit": two planes share a section of four bits a column, the first plane in the lower two; a plane that is left
  over has one of two bits. A trit t is stored as t + 1.
- "base_three": one section for each plane, five trits a byte. With ``q = 81 d₀ + 27 d₁ + 9 d₂ + 3 d₃ + d₄``, d = t + 1,
  the byte is ``⌊(256 q + 242) / 243⌋``, and ``d_k = ⌊3 ((byte · 3^k) mod 256) / 256⌋``.

On a CPU that has them the native products serve (`kernels.native`), elsewhere the portable ones of this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from isogrid.kernels import native

PACKINGS = ("two_bit", "base_three")
# Numbers of the matrix that the portable product writes out at once where nothing is differentiated.
WRITTEN_AT_ONCE = 2**22


class Section(NamedTuple):
    """Bytes ``start … start + width`` of a row: ``digits`` digits of base ``base`` each, for ``planes`` planes."""

    plane: int
    planes: int
    base: int
    digits: int
    start: int
    width: int


def sections(columns: int, planes: int, packing: str) -> Iterator[Section]:
    """The sections of a row."""
    start = plane = 0
    while plane < planes:
        pair = packing == "two_bit" and planes - plane > 1
        base, digits = (16, 2) if pair else (4, 4) if packing == "two_bit" else (3, 5)
        width = -(-columns // digits)
        yield Section(plane, 1 + pair, base, digits, start, width)
        start, plane = start + width, plane + 1 + pair


def row_bytes(columns: int, planes: int, packing: str) -> int:
    """Bytes of a row of codes."""
    return sum(section.width for section in sections(columns, planes, packing))


def pack_trits(trits: Tensor, packing: str) -> Tensor:
    """Trits ``(rows, columns, planes)`` to codes ``(rows, bytes)`` uint8."""
    rows, columns, planes = trits.shape
    raised = (trits + 1).to(torch.int32)
    parts = []
    for section in sections(columns, planes, packing):
        missing = section.digits * section.width - columns
        own = torch.nn.functional.pad(
            raised[..., section.plane : section.plane + section.planes], (0, 0, 0, missing), value=1
        )
        digit = own[..., 0] + 4 * own[..., 1] if section.planes == 2 else own[..., 0]
        digit = digit.view(rows, section.digits, section.width)
        if section.base == 3:
            powers = 3 ** torch.arange(4, -1, -1, dtype=torch.int32, device=trits.device)
            parts.append((256 * (digit * powers[:, None]).sum(1) + 242) // 243)
        else:
            powers = section.base ** torch.arange(section.digits, dtype=torch.int32, device=trits.device)
            parts.append((digit * powers[:, None]).sum(1))
    return torch.cat(parts, 1).to(torch.uint8)


def unpack_trits(codes: Tensor, columns: int, planes: int, packing: str) -> Tensor:
    """Codes ``(rows, bytes)`` to trits ``(rows, columns, planes)`` int8."""
    parts = []
    for section in sections(columns, planes, packing):
        packed = codes[:, section.start : section.start + section.width].unsqueeze(1)
        if section.base == 3:
            powers = 3 ** torch.arange(5, dtype=torch.uint8, device=codes.device)
            digit = (3 * (packed * powers[:, None]).to(torch.int16) >> 8).to(torch.uint8)  # bytes multiply modulo 256
        else:
            places = torch.arange(0, 8, 8 // section.digits, dtype=torch.uint8, device=codes.device)
            digit = packed >> places[:, None] & section.base - 1
        digit = digit.flatten(1)[:, :columns]
        parts += [digit & 3, digit >> 2] if section.planes == 2 else [digit]
    return torch.stack(parts, -1).to(torch.int8) - 1


def trit_matrix(codes: Tensor, scales: Tensor, columns: int, group: int, packing: str) -> Tensor:
    """The matrix ``(out, columns)`` in the dtype of the scales, differentiable in them.

    Args:
        codes: ``(out, bytes)`` uint8.
        scales: ``(out, groups, planes)``; the last group may be short.
        columns: inputs of the matrix.
        group: columns that share scales.
        packing: one of `PACKINGS`.
    """
    if columns and len(codes) and native.takes(scales) and _is_plain(codes):
        found: Tensor = torch.ops.isogrid.trit_matrix(codes, scales, columns, group, packing == "base_three")
        return found
    trits = unpack_trits(codes, columns, scales.shape[-1], packing)
    group = min(group, max(columns, 1))  # filled up to a group, but no further than a row
    width = scales.shape[1] * group
    if width != columns:
        trits = torch.nn.functional.pad(trits, (0, 0, 0, width - columns))
    grouped = trits.view(len(codes), scales.shape[1], group, -1)
    parts = [grouped[..., k] * scales[..., k].unsqueeze(-1) for k in range(scales.shape[-1])]
    return sum(parts[1:], parts[0]).reshape(len(codes), width)[:, :columns]


def trit_product(x: Tensor, codes: Tensor, scales: Tensor, group: int, packing: str) -> Tensor:
    """``x Wᵀ (..., out)`` for rows ``x (..., in)``, differentiable in x and the scales; see `trit_matrix`."""
    columns, out = x.shape[-1], len(codes)
    if columns and out and native.takes(x, scales) and _is_plain(codes):
        rows = x.reshape(-1, columns)
        found: Tensor = torch.ops.isogrid.trits(rows, codes, scales, group, packing == "base_three")
        return found.view(*x.shape[:-1], out)
    at_once = max(WRITTEN_AT_ONCE // max(columns, 1), 1)
    whole = torch.is_grad_enabled() and (x.requires_grad or scales.requires_grad)
    if whole or out <= at_once or torch.compiler.is_compiling():
        return torch.nn.functional.linear(x, trit_matrix(codes, scales, columns, group, packing))
    parts = [
        torch.nn.functional.linear(x, trit_matrix(some, own, columns, group, packing))
        for some, own in zip(codes.split(at_once), scales.split(at_once), strict=True)
    ]
    return torch.cat(parts, -1)


def _is_plain(codes: Tensor) -> bool:
    return codes.device.type == "cpu" and (torch.compiler.is_compiling() or type(codes) in native.PLAIN)
