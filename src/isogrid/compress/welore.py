"""WeLore: one threshold on normalised singular values tells which matrices are low rank, and of which rank.

Jaiswal et al. 2024 (arXiv 2407.11239), section 3: matrices that lose more than half of their singular values to the
threshold become low-rank components, the others stay dense. Fine-tuning then updates the low-rank components alone.
No data is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isogrid.compress.prices import Prices
from isogrid.errors import BudgetError, IsogridError
from isogrid.fitting import widened
from isogrid.formats import Dense, Format
from isogrid.linear import StructuredLinear, linear_matrix

LEAST_PRUNED = 0.5


@dataclass(frozen=True)
class RankChoice:
    """What the threshold says of one matrix.

    Attributes:
        rank: singular values that are kept.
        low_rank: whether it becomes a low-rank component; else it stays dense.
    """

    rank: int
    low_rank: bool


def analyze_spectra(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Singular values of each layer's matrix, descending, float64."""
    return {name: torch.linalg.svdvals(widened(linear_matrix(module).detach())) for name, module in layers.items()}


def normalised(spectrum: Tensor) -> Tensor:
    """``(s - s_min) / (s_max - s_min)``; ones for a flat spectrum."""
    top, bottom = spectrum[0], spectrum[-1]
    return (spectrum - bottom) / (top - bottom) if top > bottom else torch.ones_like(spectrum)


def choices(
    spectra: Mapping[str, Tensor], threshold: float, *, least_pruned: float = LEAST_PRUNED
) -> dict[str, RankChoice]:
    """Ranks and categories under a threshold in [0, 1]: values strictly below it are dropped.

    A matrix is a low-rank component where the dropped part is strictly more than ``least_pruned``. A zero matrix is
    one of rank 1.
    """
    found: dict[str, RankChoice] = {}
    for name, spectrum in spectra.items():
        whole = len(spectrum)
        if float(spectrum[0]) == 0:
            found[name] = RankChoice(1, whole > 1)
            continue
        rank = max(int((normalised(spectrum) >= threshold).sum()), 1)
        found[name] = RankChoice(rank, (whole - rank) / whole > least_pruned)
    return found


def effective_rank_reduction(
    spectra: Mapping[str, Tensor], found: Mapping[str, RankChoice], *, achieved: bool = False
) -> float:
    """Dropped singular values over all; ``achieved`` counts those of low-rank components only."""
    dropped = sum(len(spectra[name]) - one.rank for name, one in found.items() if one.low_rank or not achieved)
    return dropped / sum(map(len, spectra.values()))


def threshold_for_reduction(spectra: Mapping[str, Tensor], reduction: float) -> float:
    """The smallest threshold whose effective rank reduction is at least the one asked for (document 3.2)."""
    if not 0 <= reduction <= 1:
        raise IsogridError(f"an effective rank reduction is in [0, 1], got {reduction}")
    pooled = torch.cat([normalised(spectrum) for spectrum in spectra.values()]).sort().values
    needed = math.ceil(reduction * len(pooled) - 1e-9)
    if needed == 0:
        return 0.0
    above = pooled[pooled > pooled[needed - 1]]
    return float(above[0]) if len(above) else 1.0


def allocate_welore(layers: Mapping[str, nn.Module], fmt: Format, prices: Prices, limit: int) -> dict[str, Format]:
    """Ranks of the smallest threshold whose choices stay within a budget over all layers; dense where that is better.

    Args:
        layers: name to dense layer.
        fmt: a format whose size is a rank, left open: low rank or Light.
        prices: what costs are counted in.
        limit: over all layers together.

    Raises:
        IsogridError: the format has no rank.
        BudgetError: even the largest threshold stays above the budget; the message names what can be reached.
    """
    if not chooses_ranks(fmt):
        raise IsogridError(f"welore chooses ranks of low_rank or low_rank_light, got {fmt.label()}")
    spectra = analyze_spectra(layers)

    def members(threshold: float) -> dict[str, Format]:
        found = choices(spectra, threshold)
        return {name: fmt.with_size(one.rank) if one.low_rank else Dense() for name, one in found.items()}

    def spent(threshold: float) -> int:
        return sum(prices.of(name, member) for name, member in members(threshold).items())

    pooled = torch.cat([normalised(spectrum) for spectrum in spectra.values()])
    steps = [0.0, *torch.unique(pooled[pooled > 0]).tolist()]
    at = _first(lambda place: spent(steps[place]) <= limit, len(steps))
    if at is None:
        least = spent(steps[-1])
        raise BudgetError(
            f"welore reaches {least} at the least, the budget is {limit}; keep at least {least / prices.whole():.3f}"
        )
    return members(steps[at])


def chooses_ranks(fmt: Format) -> bool:
    """Whether a format's size is the rank of the whole matrix: the singular values tell all its errors."""
    return fmt.size_field == "rank" and fmt.traits.optimal_under_metric


def low_rank_components(model: nn.Module) -> dict[str, StructuredLinear]:
    """The layers that fine-tuning updates: structured and not dense, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StructuredLinear) and not isinstance(module.format, Dense)
    }


def freeze_other_than_low_rank(model: nn.Module, *, train_norms: bool = True) -> int:
    """Let only the factors of low-rank components be trained, and vectors (norm gains, biases) if wanted.

    Returns:
        Numbers that are trained.
    """
    components = {id(value) for layer in low_rank_components(model).values() for value in layer.factors.values()}
    count = 0
    for value in model.parameters():
        trained = id(value) in components or (train_norms and value.ndim <= 1)
        value.requires_grad_(trained)
        count += value.numel() if trained else 0
    return count


def _first(holds: Callable[[int], bool], count: int) -> int | None:
    """The smallest index where a condition holds that holds from there on; None: nowhere."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low if low < count else None
