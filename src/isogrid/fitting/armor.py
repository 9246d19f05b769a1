"""ARMOR's own solvers (Liu et al. 2025), on its own objective: ``Σ h_q (W̄ - A S B)_pq²``, h the inputs' mean squares.

The published loop takes one Adam step on all three and then solves one group of the core in every block; nothing keeps
its error from rising. The variant that the paper's theorem covers descends on A, on B and on S with steps short enough
that none can overshoot. Both are here to compare with; `fit_wrapped_core` gets as far in a fraction of their time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from isogrid.fitting.report import OnStep
from isogrid.fitting.supports import Pattern, supports_of
from isogrid.fitting.wrapped_core import ROUNDING, WrappedCore, blocks_times, in_blocks, times_blocks

RATE = 1e-4
# No progress for so many iterations ends the published loop; what counts as progress is told by its two bounds.
PATIENCE, RELATIVE, ABSOLUTE = 100, 1e-6, 1e-8

Choose = Callable[[Tensor], Tensor]
"""Scores ``(…, groups)`` to the number of one group each."""


def published_loop(
    target: Tensor,
    power: Tensor,
    start: WrappedCore,
    pattern: Pattern,
    *,
    iterations: int,
    generator: torch.Generator,
    on_step: OnStep | None = None,
) -> WrappedCore:
    """Joint Adam (rate 1e-4) and one group of the core per block and iteration, drawn by its gradient's L1 norm.

    Args:
        target: ``(out, in)`` float64, normalised; ``in`` a multiple of the blocks' side, that one of the pattern's.
        power: ``(in,)`` mean square of each input.
        start: where to begin.
        pattern: of the core.
        iterations: most iterations; the loop stops by itself after 100 without progress.
        generator: of the draws.
        on_step: called with (iteration, error); 0 is the start.

    Returns:
        The last iterate, as published: not the best one.
    """
    whole = float((power * target.square()).sum())
    core, mask = start, start.mask
    names = ("outer", "values", "inner")
    leaves = {name: getattr(start, name).clone() for name in names}
    means = {name: torch.zeros_like(value) for name, value in leaves.items()}
    squares = {name: torch.zeros_like(value) for name, value in leaves.items()}
    before, waited = error_of(target, power, core), 0
    if on_step is not None:
        on_step(0, before)

    def drawn(scores: Tensor) -> Tensor:
        flat = scores.flatten(0, -2)
        # A block that nothing is left to gain in may take any.
        flat = torch.where(flat.sum(1, keepdim=True) > 0, flat, 1).cpu().float()
        chosen = torch.multinomial(flat, 1, generator=generator)
        return chosen[:, 0].view(scores.shape[:-1]).to(scores.device)

    for step in range(1, iterations + 1):
        for name, gradient in _gradients(target, power, core).items():
            gradient = gradient / whole if whole else gradient
            means[name].lerp_(gradient, 1 - 0.9)
            squares[name].lerp_(gradient.square(), 1 - 0.999)
            size = squares[name].sqrt() / (1 - 0.999**step) ** 0.5 + 1e-8
            leaves[name] = leaves[name] - RATE / (1 - 0.9**step) * means[name] / size
        leaves["values"] = leaves["values"] * mask
        core = solve_one_group(target, power, WrappedCore(mask=mask, **leaves), pattern, drawn)
        leaves["values"], mask = core.values, core.mask
        error = error_of(target, power, core)
        if on_step is not None:
            on_step(step, error)
        scale = whole or 1.0
        waited = waited + 1 if error > (1 - RELATIVE) * before or error > before - ABSOLUTE * scale else 0
        before = error
        if waited >= PATIENCE:
            break
    return core


def monotone_loop(
    target: Tensor,
    power: Tensor,
    start: WrappedCore,
    pattern: Pattern,
    *,
    iterations: int,
    on_step: OnStep | None = None,
) -> WrappedCore:
    """Gradient steps of length 1 / smoothness on A, on B and on S, then one group of the core per block.

    What the paper's convergence theorem is about: the error never rises from that of the start, which is asserted.
    The group is the one of largest gradient. Arguments: those of `published_loop`.
    """
    whole = float((power * target.square()).sum())
    core = start
    error = error_of(target, power, core)
    if on_step is not None:
        on_step(0, error)
    for step in range(1, iterations + 1):
        for name in ("outer", "inner", "values"):
            gradient, smooth = _gradients(target, power, core)[name], _smoothness(power, core)[name]
            core = replace(core, **{name: getattr(core, name) - gradient / smooth})
        core = solve_one_group(target, power, core, pattern, lambda scores: scores.argmax(-1))
        reached = error_of(target, power, core)
        assert reached <= error + ROUNDING * whole, f"the monotone loop raised the error from {error} to {reached}"
        error = reached
        if on_step is not None:
            on_step(step, error)
    return core


def error_of(target: Tensor, power: Tensor, core: WrappedCore) -> float:
    """``Σ h_q (W̄ - V)_pq²``."""
    return float((power * (target - core.dense).square()).sum())


def solve_one_group(target: Tensor, power: Tensor, core: WrappedCore, pattern: Pattern, choose: Choose) -> WrappedCore:
    """In every block of the core the best places and values of one group, all other entries as they are.

    Blocks (i, j) don't see each other, so all are solved at once. The error does not rise.
    """
    m, n = target.shape
    k, a, _ = core.outer.shape
    columns, b, _ = core.inner.shape
    each = b // pattern.of
    weighted = times_blocks((core.dense - target) * power, core.inner.mT)
    wish = -(core.outer.mT @ in_blocks(weighted, core.outer))  # (k, a, n): the falling gradient, halved
    groups = wish.view(k, a, columns, each, pattern.of).permute(0, 2, 1, 3, 4).flatten(2, 3)  # (k, columns, a each, of)
    number = choose(groups.abs().sum(-1))
    row, group = number // each, number % each  # (k, columns)
    blocks, place = torch.arange(k, device=target.device).unsqueeze(1), torch.arange(columns, device=target.device)
    seen = core.inner * power.view(columns, 1, b) @ core.inner.mT  # (columns, b, b)
    gathered = seen.view(columns, each, pattern.of, each, pattern.of).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    gram = gathered[place, group]  # (k, columns, of, of)
    strength = core.outer.square().sum(1)[blocks, row]
    values = in_blocks(core.values, core.outer).view(k, a, columns, each, pattern.of).clone()
    mask = in_blocks(core.mask, core.outer).view(k, a, columns, each, pattern.of).clone()
    spot = (blocks, row, place, group)
    inside = blocks * a + row < m  # rows beyond the matrix stay empty
    usable = inside & (strength > 0)
    gradient = groups[blocks, place, number] / torch.where(usable, strength, 1).unsqueeze(-1)
    new, places = _best_support(values[spot], gradient, gram, pattern)
    values[spot] = torch.where(usable.unsqueeze(-1), new, values[spot])
    mask[spot] = torch.where(usable.unsqueeze(-1), places, mask[spot])
    return replace(core, values=values.view(k * a, n)[:m], mask=mask.view(k * a, n)[:m])


def _best_support(old: Tensor, gradient: Tensor, gram: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The best support of each group under a metric of its own ``(…, of, of)``."""
    assert pattern.keep is not None
    supports = supports_of(pattern.of, pattern.keep).to(old.device)
    wish = gradient + (gram @ old.unsqueeze(-1)).squeeze(-1)
    both = (supports.unsqueeze(2) & supports.unsqueeze(1)).to(gram)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    floor = 1e-12 * diagonal + torch.finfo(gram.dtype).tiny
    scale = diagonal.mean(-1)[..., None, None, None].clamp(min=torch.finfo(gram.dtype).tiny)
    full = (gram + torch.diag_embed(floor)).unsqueeze(-3) * both + torch.diag_embed((~supports).to(gram)) * scale
    found = torch.linalg.solve(full, (wish.unsqueeze(-2) * supports).unsqueeze(-1)).squeeze(-1) * supports
    best = (found * wish.unsqueeze(-2)).sum(-1).argmax(-1)
    return found.gather(-2, best[..., None, None].expand(*best.shape, 1, pattern.of)).squeeze(-2), supports[best]


def _gradients(target: Tensor, power: Tensor, core: WrappedCore) -> dict[str, Tensor]:
    """Of the error with respect to A, to the kept entries of S and to B."""
    reached = times_blocks(core.values, core.inner)
    given = blocks_times(core.outer, core.values)
    residual = (blocks_times(core.outer, reached) - target) * power
    outer = 2 * in_blocks(residual, core.outer) @ in_blocks(reached, core.outer).mT
    back = core.outer.mT @ in_blocks(times_blocks(residual, core.inner.mT), core.outer)
    k, b, _ = core.inner.shape
    left, right = (piece.view(len(target), k, b).transpose(0, 1) for piece in (given, residual))
    return {
        "outer": outer,
        "values": 2 * back.flatten(0, 1)[: len(target)] * core.mask,
        "inner": 2 * left.mT @ right,
    }


def _smoothness(power: Tensor, core: WrappedCore) -> dict[str, Tensor]:
    """Smoothness of the error in each part alone: a step of its inverse never overshoots (armor.md 4.4)."""
    k, b, _ = core.inner.shape
    reached = in_blocks(times_blocks(core.values, core.inner), core.outer)
    given = blocks_times(core.outer, core.values).view(-1, k, b).transpose(0, 1)
    weights = power.view(k, b)
    seen = core.inner * weights.unsqueeze(1) @ core.inner.mT
    # Block (i, j) of S has its own constant; all of a block row's columns share A's.
    of_values = _largest(core.outer.mT @ core.outer).repeat_interleave(core.outer.shape[1])[: len(core.values), None]
    of_values = 2 * of_values * _largest(seen).repeat_interleave(b)
    return {
        "outer": 2 * _largest((reached * power) @ reached.mT)[:, None, None],
        "values": of_values,
        "inner": 2 * (_largest(given.mT @ given) * weights.amax(1))[:, None, None],
    }


def _largest(gram: Tensor) -> Tensor:
    """Largest eigenvalue of each, at least the least number there is: zeros move nothing."""
    return torch.linalg.eigvalsh(gram)[..., -1].clamp(min=torch.finfo(gram.dtype).tiny)
