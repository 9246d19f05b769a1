"""A sparse core between two block-diagonal matrices, ``V = A S B`` (ARMOR, Liu et al. 2025), fitted block by block.

Given the other two, each of A, B and one row of S is a least-squares problem with a closed form, under any metric M of
the inputs. One round solves for A (all blocks at once), for the blocks of B in turn, and for the values and places of S
row by row of the blocks (`Groups`). No part raises the error, which is asserted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isogrid.fitting.report import OnStep
from isogrid.fitting.supports import Groups, Pattern, solved_supports, supports_of

# Proximal term of the wrappers, relative to the mean diagonal of their equations: keeps what nothing depends on.
PROXIMAL = 1e-6
# A row of the core that reaches the output with less than this part of the strongest is left as it is.
DEAD_ROW = 1e-12
# By how much rounding may raise an error, relative to that of a matrix of zeros.
ROUNDING = 1e-10


@dataclass(frozen=True)
class WrappedCore:
    """``V = blockdiag(outer) · values · blockdiag(inner)``.

    Attributes:
        outer: ``(row blocks, a, a)``; the last may reach beyond ``out``, where it is not used.
        values: ``(out, in)``, zero outside of ``mask``.
        mask: ``(out, in)`` booleans.
        inner: ``(column blocks, b, b)``.
    """

    outer: Tensor
    values: Tensor
    mask: Tensor
    inner: Tensor

    @property
    def dense(self) -> Tensor:
        """``(out, in)``."""
        return blocks_times(self.outer, times_blocks(self.values, self.inner))


def plain_core(values: Tensor, mask: Tensor, block: int) -> WrappedCore:
    """A pruned matrix with identities around it; blocks are no larger than a side."""
    sides = []
    for size in values.shape:
        side = max(min(block, size), 1)
        identity = torch.eye(side, dtype=values.dtype, device=values.device)
        sides.append(identity.repeat(-(-size // side), 1, 1))
    return WrappedCore(sides[0], values, mask, sides[1])


def times_blocks(rows: Tensor, blocks: Tensor, features: int | None = None) -> Tensor:
    """``rows (r, …) · blockdiag(blocks (k, p, q))``, at most ``k p`` columns given, cut to ``features``, or as many."""
    k, p, q = blocks.shape
    features = rows.shape[1] if features is None else features
    padded = torch.nn.functional.pad(rows, (0, k * p - rows.shape[1])).view(len(rows), k, p)
    return torch.bmm(padded.transpose(0, 1), blocks).transpose(0, 1).reshape(len(rows), k * q)[:, :features]


def blocks_times(blocks: Tensor, matrix: Tensor) -> Tensor:
    """``blockdiag(blocks (k, a, a)) · matrix (m, n)``, ``k a >= m``, cut to m rows."""
    return torch.bmm(blocks, in_blocks(matrix, blocks)).flatten(0, 1)[: len(matrix)]


def in_blocks(matrix: Tensor, blocks: Tensor) -> Tensor:
    """``(m, n)`` as ``(k, a, n)``, zero rows appended."""
    k, a, _ = blocks.shape
    return torch.nn.functional.pad(matrix, (0, 0, 0, k * a - len(matrix))).view(k, a, -1)


def fit_wrapped_core(
    target: Tensor,
    moment: Tensor,
    start: WrappedCore,
    pattern: Pattern,
    *,
    rounds: int,
    tolerance: float,
    on_step: OnStep | None = None,
) -> WrappedCore:
    """Exact block descent on ``tr((T - V) M (T - V)ᵀ)``, float64.

    Args:
        target: ``(out, in)``.
        moment: ``(in, in)`` positive semidefinite; diagonal for the published objective.
        start: where to begin.
        pattern: of the core; few enough supports to try them all.
        rounds: most rounds.
        tolerance: stop when a round lowers the error by less than this part.
        on_step: called with (round, error); 0 is the start.

    Returns:
        A core whose error is at most the start's.
    """
    whole = float(((target @ moment) * target).sum())
    side = start.inner.shape[1]
    # Inputs that don't see each other leave the blocks of a row of the core on their own.
    apart = target.shape[1] % side == 0 and side % pattern.of == 0 and torch.equal(moment, moment.diagonal().diag())
    sweep = sweep_apart if apart else sweep_core
    found, error = start, _error(target, moment, start)
    if on_step is not None:
        on_step(0, error)
    for step in range(1, rounds + 1):
        before = error
        for part in (solve_outer, solve_inner):
            found = part(target, moment, found)
        found = sweep(target, moment, found, pattern)
        reached = _error(target, moment, found)
        assert reached <= before + ROUNDING * whole, f"block descent raised the error from {before} to {reached}"
        error = reached
        if on_step is not None:
            on_step(step, error)
        if before - error <= tolerance * before:
            break
    return found


def solve_outer(target: Tensor, moment: Tensor, core: WrappedCore, proximal: float = PROXIMAL) -> WrappedCore:
    """The best ``outer``, all blocks at once: ``A_i (C_i M C_iᵀ) = T_i M C_iᵀ`` with ``C_i = S_i B``."""
    reached = in_blocks(times_blocks(core.values, core.inner), core.outer)  # (k, a, n)
    weighted = reached @ moment
    gram = weighted @ reached.mT
    right = in_blocks(target, core.outer) @ weighted.mT
    ridge = _ridge(gram, proximal)
    right = right + core.outer * ridge.unsqueeze(-2)
    return replace(core, outer=torch.linalg.solve(gram + torch.diag_embed(ridge), right, left=False))


def solve_inner(target: Tensor, moment: Tensor, core: WrappedCore, proximal: float = PROXIMAL) -> WrappedCore:
    """The best ``inner``, one block after the other."""
    given = blocks_times(core.outer, core.values)
    return replace(core, inner=solve_blocks(target, moment, given, core.inner, proximal))


def solve_blocks(target: Tensor, moment: Tensor, given: Tensor, blocks: Tensor, proximal: float = PROXIMAL) -> Tensor:
    """The best blocks B in ``V = E · blockdiag(B)``, one after the other: ``E_jᵀ E_j ΔB_j M_jj = E_jᵀ (T - V) M_:j``.

    Args:
        target: ``(out, in)``.
        moment: ``(in, in)``.
        given: E ``(out, …)``, at most ``k p`` columns.
        blocks: where to begin, ``(k, p, q)`` with ``k q >= in``.
        proximal: keeps what nothing depends on; any value lowers the error.
    """
    residual = target - times_blocks(given, blocks, target.shape[1])
    blocks = blocks.clone()
    _, p, q = blocks.shape
    for j in range(len(blocks)):
        rows = slice(j * p, min((j + 1) * p, given.shape[1]))
        part = slice(j * q, min((j + 1) * q, target.shape[1]))
        own = given[:, rows]
        gram, weight = own.mT @ own, moment[part, part]
        right = (own.mT @ residual) @ moment[:, part]
        change = torch.linalg.solve(gram + torch.diag_embed(_ridge(gram, proximal)), right)
        change = torch.linalg.solve(weight + torch.diag_embed(_ridge(weight, proximal)), change, left=False)
        blocks[j, : change.shape[0], : change.shape[1]] += change
        residual[:, part] -= own @ change
    return blocks


def sweep_core(target: Tensor, moment: Tensor, core: WrappedCore, pattern: Pattern) -> WrappedCore:
    """The best places and values of every group of the core: first rows of all blocks, then second ones, and so on."""
    m = len(target)
    k, a, _ = core.outer.shape
    reach = core.outer.mT @ core.outer  # K (k, a, a)
    strength = reach.diagonal(dim1=-2, dim2=-1)
    alive = (strength > DEAD_ROW * strength.max()).flatten()
    alive[m:] = False  # rows of the last block that the core has not
    alive = alive.view(k, a)
    seen = times_blocks(times_blocks(moment, core.inner.mT).mT, core.inner.mT)  # N = B M Bᵀ
    values, mask = in_blocks(core.values, core.outer).clone(), in_blocks(core.mask, core.outer).clone()
    gradient = core.outer.mT @ in_blocks(times_blocks((target - core.dense) @ moment, core.inner.mT), core.outer)
    groups = Groups(seen, pattern)
    for r in range(a):
        rows = alive[:, r].nonzero()[:, 0]
        if not len(rows):
            continue
        new, places = values[rows, r], mask[rows, r]
        groups.improve(new, places, gradient[rows, r] / strength[rows, r, None])
        change = (new - values[rows, r]) @ seen
        gradient[rows] -= reach[rows, :, r].unsqueeze(-1) * change.unsqueeze(1)
        values[rows, r], mask[rows, r] = new, places
    return replace(core, values=values.flatten(0, 1)[:m], mask=mask.flatten(0, 1)[:m])


def sweep_apart(target: Tensor, moment: Tensor, core: WrappedCore, pattern: Pattern) -> WrappedCore:
    """`sweep_core` under a diagonal metric: one group of every block at a time, all blocks together.

    The side of the inner blocks divides ``in``, and is a multiple of the pattern's.
    """
    assert pattern.keep is not None
    m, (k, a, _), (columns, b, _), of = len(target), core.outer.shape, core.inner.shape, pattern.of
    supports = supports_of(of, pattern.keep).to(target.device)
    reach = core.outer.mT @ core.outer  # K (k, a, a)
    strength = reach.diagonal(dim1=-2, dim2=-1)
    alive = (strength > DEAD_ROW * strength.max()).flatten()
    alive[m:] = False
    alive, power = alive.view(k, a), moment.diagonal()
    seen = core.inner * power.view(columns, 1, b) @ core.inner.mT  # N (columns, b, b)
    solved = [solved_supports(seen[:, g : g + of, g : g + of], supports) for g in range(0, b, of)]

    def dealt(matrix: Tensor) -> Tensor:
        return in_blocks(matrix, core.outer).view(k, a, columns, b).permute(2, 0, 1, 3).contiguous()

    values, mask = dealt(core.values), dealt(core.mask)  # (columns, k, a, b)
    back = times_blocks((target - core.dense) * power, core.inner.mT)
    gradient = dealt((core.outer.mT @ in_blocks(back, core.outer)).flatten(0, 1))
    inverse = torch.where(alive, 1 / torch.where(alive, strength, 1), 0)
    for r in range(a):
        for number, inverses in enumerate(solved):
            group = slice(number * of, (number + 1) * of)
            old = values[:, :, r, group]
            wish = gradient[:, :, r, group] * inverse[:, r, None] + torch.bmm(old, seen[:, group, group])
            found = torch.bmm(wish, inverses).view(columns, k, len(supports), of)
            best = (found * wish.unsqueeze(2)).sum(-1).argmax(-1)
            new = found.gather(2, best[..., None, None].expand(columns, k, 1, of)).squeeze(2)
            keeps = alive[:, r, None]
            new = torch.where(keeps, new, old)
            change = torch.bmm(new - old, seen[:, group])  # (columns, k, b)
            gradient -= reach[:, :, r].unsqueeze(-1) * change.unsqueeze(2)
            values[:, :, r, group] = new
            mask[:, :, r, group] = torch.where(keeps, supports[best], mask[:, :, r, group])

    def together(blocks: Tensor) -> Tensor:
        return blocks.permute(1, 2, 0, 3).reshape(k * a, columns * b)[:m]

    return replace(core, values=together(values), mask=together(mask))


def settled(core: WrappedCore) -> WrappedCore:
    """The same matrix with wrappers whose core-side vectors have unit mean square; unused parts are zero.

    Scales pass freely between a wrapper and the core's rows or columns, and half precision wants them even.
    """
    m, n = core.values.shape
    outer, inner = core.outer.clone(), core.inner.clone()
    last_rows, last_columns = m - (len(outer) - 1) * outer.shape[1], n - (len(inner) - 1) * inner.shape[1]
    outer[-1, last_rows:], outer[-1, :, last_rows:] = 0, 0
    inner[-1, last_columns:], inner[-1, :, last_columns:] = 0, 0
    rows = outer.square().mean(1).sqrt()  # (k, a): column r of a block meets row r of the core
    columns = inner.square().mean(2).sqrt()
    # A vector of zeros keeps its scale: nothing passes through it.
    rows, columns = (torch.where(scale > 0, scale, 1) for scale in (rows, columns))
    values = core.values * rows.flatten()[:m].unsqueeze(1) * columns.flatten()[:n]
    return replace(core, outer=outer / rows.unsqueeze(1), inner=inner / columns.unsqueeze(2), values=values)


def _ridge(gram: Tensor, proximal: float) -> Tensor:
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    # A block that nothing reaches: any ridge does.
    return torch.where(mean > 0, proximal * mean, 1).expand(diagonal.shape)


def _error(target: Tensor, moment: Tensor, core: WrappedCore) -> float:
    residual = target - core.dense
    return float(((residual @ moment) * residual).sum())
