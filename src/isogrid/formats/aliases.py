"""Names from the literature for formats that are here under another name; `as_format` reads them as labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from isogrid.errors import IsogridError
from isogrid.formats.base import Format
from isogrid.formats.block_tensor_train import BlockTensorTrain
from isogrid.formats.monarch import Monarch
from isogrid.formats.sparse import Sparse


def block_shuffle(blocks: int = 4) -> Monarch:
    """BlockShuffle (Wei et al. 2024): Monarch by its layer rule, min(out, in) · (out + in) / blocks parameters.

    The two differ in their start alone: ``StructuredLinear(…, "block_shuffle(blocks=4)", init="orthonormal")``.
    """
    return Monarch(blocks)


def rank_one_monarch(blocks: int, out_features: int, in_features: int) -> BlockTensorTrain:
    """The thesis' rank-one Monarch (Camenisch 2025): slices of ``blocks`` rows and ``in / blocks`` columns, rank one.

    Its sizes are part of it, so it is told them. The thesis' slices take every ``out / blocks``-th row, ours take runs:
    for the very same matrices wrap it in `Permuted` and fit with ``orders=[(stride_order(out, blocks), natural)]``.

    Raises:
        IsogridError: ``blocks`` divides not both sizes.
    """
    if not isinstance(blocks, int) or blocks < 1 or out_features % blocks or in_features % blocks:
        raise IsogridError(
            f"rank_one_monarch: blocks={blocks!r} does not divide both sizes {out_features} x {in_features}; "
            "take a common divisor"
        )
    return BlockTensorTrain(1, out_factors=(out_features // blocks, blocks), in_factors=(blocks, in_features // blocks))


ALIASES: dict[str, Callable[..., Format]] = {
    "block_shuffle": block_shuffle,
    "rank_one_monarch": rank_one_monarch,
    "unstructured": Sparse,
}


def from_alias(name: str, hyper_parameters: dict[str, Any]) -> Format:
    """What ``name(hyper_parameters)`` stands for.

    Raises:
        IsogridError: a hyper-parameter is missing, unknown or of the wrong kind.
    """
    try:
        return ALIASES[name](**hyper_parameters)
    except TypeError as error:
        raise IsogridError(f"format {name!r}: {error}") from None
