"""Rows written as few atoms of a small dictionary, ``T = S D``: sparse coding, dictionary updates, and both in turn.

Orthogonal matching pursuit with least-squares updates, the orthonormal dictionary whose two steps are closed forms
(Procrustes and a threshold), and exact block descent under any metric from where they end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isogrid.fitting.report import OnStep
from isogrid.fitting.supports import Pattern, sweep_supports
from isogrid.fitting.sweep import largest_of_groups
from isogrid.fitting.wrapped_core import solve_blocks, times_blocks

# Rows are coded in pieces of about this many numbers.
CODING_NUMBERS = 2**24
# Added to an atom's own square: a second use of the same atom is finite, and gives nothing.
ATOM_RIDGE = 1e-10


def pursue(targets: Tensor, atoms: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit: each row as ``keep`` atoms, the one taken next that meets what is left best.

    Directions of the atoms taken are made orthogonal to each other as they come, so no system is solved until the end.

    Args:
        targets: ``(rows, b)``.
        atoms: ``(k, b)`` of unit length.
        keep: atoms of a row, at most k.

    Returns:
        ``codes (rows, k)`` and ``mask (rows, k)`` with exactly ``keep`` ones a row; ties go to the earlier atom.
    """
    gram, step = atoms @ atoms.mT, max(1, CODING_NUMBERS // max(keep * len(atoms), 1))
    parts = [_pursue(part @ atoms.mT, gram, keep) for part in targets.split(step)]
    if not parts:
        empty = targets.new_zeros(0, len(atoms))
        return empty, empty.bool()
    codes, mask = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return codes, mask


def _pursue(left: Tensor, gram: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """``left (rows, k)``: what each atom meets of each row."""
    rows, k = left.shape
    everyone = torch.arange(rows, device=left.device)
    left = left.clone()
    mask = torch.zeros(rows, k, dtype=torch.bool, device=left.device)
    taken = torch.zeros(rows, keep, dtype=torch.long, device=left.device)
    met = left.new_zeros(rows, keep)  # the row along each new direction
    seen = left.new_zeros(rows, keep, k)  # every atom along each new direction
    lower = left.new_zeros(rows, keep, keep)
    for t in range(keep):
        atom = left.abs().masked_fill(mask, -1).argmax(1)
        mask[everyone, atom], taken[:, t] = True, atom
        along = seen[everyone, :t, atom]  # (rows, t)
        length = (gram[atom, atom] + ATOM_RIDGE - along.square().sum(1)).clamp(min=ATOM_RIDGE).sqrt()
        lower[:, t, :t], lower[:, t, t] = along, length
        met[:, t] = left[everyone, atom] / length
        seen[:, t] = (gram[atom] - torch.bmm(along.unsqueeze(1), seen[:, :t]).squeeze(1)) / length.unsqueeze(1)
        left -= met[:, t, None] * seen[:, t]
    codes = torch.linalg.solve_triangular(lower.mT, met.unsqueeze(-1), upper=True).squeeze(-1)
    return left.new_zeros(rows, k).scatter_(1, taken, codes), mask


def unit_atoms(dictionary: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Atoms of unit length, their lengths in the codes; atoms of zeros stay."""
    lengths = dictionary.norm(dim=1)
    lengths = torch.where(lengths > 0, lengths, 1)
    return dictionary / lengths.unsqueeze(1), codes * lengths


def singular_start(targets: Tensor, atoms: int) -> Tensor:
    """``(atoms, b)`` orthonormal, at most b: leading right singular vectors."""
    missing = max(atoms - len(targets), 0)  # rows of zeros: more vectors, and none of the left that aren't needed
    return torch.linalg.svd(torch.nn.functional.pad(targets, (0, 0, 0, missing)), full_matrices=False).Vh[:atoms]


def spread_start(targets: Tensor, atoms: int, generator: torch.Generator) -> Tensor:
    """``(atoms, b)``: rows of the target, each drawn by what of it lies off the lines drawn before (k-means++)."""
    size = targets.square().sum(1)
    left, chosen = size.clone(), []
    for _ in range(atoms):
        odds = left if float(left.sum()) > 0 else torch.ones_like(left)
        row = int(torch.multinomial((odds / odds.max()).cpu().float(), 1, generator=generator))
        chosen.append(targets[row])
        line = targets[row] / targets[row].norm().clamp(min=torch.finfo(targets.dtype).tiny)
        left = torch.minimum(left, (size - (targets @ line).square()).clamp(min=0))
    drawn = torch.stack(chosen)
    noise = torch.randn(drawn.shape, generator=generator, dtype=torch.float32).to(drawn)
    empty = drawn.norm(dim=1, keepdim=True) == 0
    drawn = torch.where(empty, noise, drawn)
    return drawn / drawn.norm(dim=1, keepdim=True)


def procrustes(
    targets: Tensor, atoms: int, keep: int, rounds: int, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal atoms and the largest coefficients in turn; each is optimal given the other.

    Args:
        targets: ``(rows, b)``.
        atoms: at most b.
        keep: atoms of a row.
        rounds: of both steps.
        start: ``(atoms, b)``, whose nearest orthonormal atoms are begun with; None: singular vectors.

    Returns:
        ``codes (rows, atoms)``, ``mask``, ``dictionary (atoms, b)``.
    """
    dictionary = singular_start(targets, atoms) if start is None else _polar(start)
    for step in range(rounds + 1):
        met = targets @ dictionary.mT
        mask = largest_of_groups(met.abs(), keep, atoms)
        if step == rounds:
            break
        dictionary = _polar((met * mask).mT @ targets)
    return met * mask, mask, dictionary


def _polar(matrix: Tensor) -> Tensor:
    """The nearest matrix of orthonormal rows."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def matching_pursuit(targets: Tensor, start: Tensor, keep: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares atoms and pursuit in turn; a row's code changes only where its error falls.

    Args:
        targets: ``(rows, b)``.
        start: ``(atoms, b)`` of unit length.
        keep: atoms of a row.
        rounds: of both steps.

    Returns:
        ``codes (rows, atoms)``, ``mask``, ``dictionary (atoms, b)``; the error never rises from one round to the next.
    """
    dictionary = start
    codes, mask = pursue(targets, dictionary, keep)
    for _ in range(rounds):
        gram = codes.mT @ codes
        ridge = (ATOM_RIDGE * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)
        updated = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), codes.mT @ targets)
        used = mask.any(0) & (gram.diagonal() > 0)
        updated = torch.where(used.unsqueeze(1), updated, 0)
        dictionary, codes = unit_atoms(updated, codes)
        lost = (targets - codes @ dictionary).square().sum(1)
        free = (~used).nonzero()[:, 0]
        worst = lost.argsort(descending=True)[: len(free)]
        fresh = (targets - codes @ dictionary)[worst]
        length = fresh.norm(dim=1, keepdim=True)
        dictionary[free[: len(worst)]] = torch.where(length > 0, fresh / length, dictionary[free[: len(worst)]])
        tried, places = pursue(targets, dictionary, keep)
        better = (targets - tried @ dictionary).square().sum(1) < lost
        codes, mask = torch.where(better[:, None], tried, codes), torch.where(better[:, None], places, mask)
    return codes, mask, dictionary


def fit_codes_and_atoms(
    target: Tensor,
    moment: Tensor,
    start: tuple[Tensor, Tensor, Tensor],
    pattern: Pattern,
    *,
    rounds: int,
    tolerance: float,
    generator: torch.Generator,
    on_step: OnStep | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact block descent on ``tr((T - V) M (T - V)ᵀ)`` with ``V = codes · blockdiag(dictionary)``, float64.

    Args:
        target: ``(out, in)``.
        moment: ``(in, in)`` positive definite, blocks coupled as they may be.
        start: ``codes (out, blocks · k)``, ``mask`` and ``dictionary (blocks, k, b)``.
        pattern: of the codes.
        rounds: most rounds: one sweep over the codes, then the atoms block by block.
        tolerance: stop when a round lowers the error by less than this part.
        generator: of random orders.
        on_step: called with (round, error); 0 is the start.

    Returns:
        As the start; the error is at most its.
    """
    codes, mask, dictionary = start
    n = target.shape[1]
    weighted = target @ moment
    whole = float((weighted * target).sum())

    def error_of() -> float:
        residual = target - times_blocks(codes, dictionary, n)
        return float(((residual @ moment) * residual).sum())

    error = error_of()
    if on_step is not None:
        on_step(0, error)
    back: Callable[[Tensor], Tensor] = lambda rows: times_blocks(rows, dictionary.mT, codes.shape[1])  # noqa: E731
    for step in range(1, rounds + 1):
        before, kept = error, (codes, mask, dictionary)
        seen = back(back(moment).mT)  # D M Dᵀ
        codes, mask = sweep_supports(
            codes,
            mask,
            back(weighted),
            seen,
            pattern,
            whole=whole,
            sweeps=1,
            tolerance=0.0,
            generator=generator,
        )
        dictionary = solve_blocks(target, moment, codes, dictionary)
        error = error_of()
        if not error <= before:  # an error of rounding alone, or equations that are singular to it
            codes, mask, dictionary = kept
            break
        if on_step is not None:
            on_step(step, error)
        if before - error <= tolerance * before:
            break
    return codes, mask, dictionary
