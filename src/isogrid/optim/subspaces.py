"""Subspaces of gradients: which side is projected, and how an orthonormal basis is found.

A basis ``P (d, r)`` has orthonormal columns (the Gaussian one of APOLLO only in expectation). On the left side it spans
directions of the rows, ``d = m``: ``R = Pᵀ G (r, n)``, lifted ``P N``. On the right ``d = n``: ``R = G P (m, r)``,
lifted ``N Pᵀ``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from isogrid.fitting import leading_left
from isogrid.fitting.ranks import EnergyRank, RankRule, ThresholdRank
from isogrid.optim.sharding import GradientMatrix, Product

SIDES = ("auto", "left", "right", "both", "min_state")
PROJECTORS = ("svd", "randomized", "power", "random", "random_orthonormal", "identity", "top")
# Relative size of the noise that makes a decomposition converge which did not.
SHAKE = 1e-7


def resolve_side(side: str, rows: int, columns: int) -> str:
    """``left``, ``right`` or ``both``.

    ``auto`` projects the short side (GaLore's ``std``; a square matrix on the right): most directions per rank.
    ``min_state`` projects the long side: the fewest numbers, ``r (long + 2 short)`` instead of ``r (short + 2 long)``.
    """
    if side == "auto":
        return "right" if rows >= columns else "left"
    if side == "min_state":
        return "left" if rows >= columns else "right"
    return side


def drawn_from(seed: int, parameter: int, refresh: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one refresh of one parameter: the same on every rank and after a resume.

    What the CPU draws is the same for every device; a GPU draws other numbers, without a copy.
    """
    digest = hashlib.blake2b(f"{seed}/{parameter}/{refresh}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def project(gradient: GradientMatrix, basis: Tensor, side: str) -> Tensor:
    """Coordinates in the subspace: left ``(r, n)``, whole on every rank; right ``(rows here, r)``."""
    if side == "left":
        return gradient.rows.sum(gradient.rows.part(basis).mT @ gradient.values)
    return gradient.values @ basis


def canonical_signs(basis: Tensor) -> Tensor:
    """Columns with the sign that makes their largest entry positive.

    Moments that are kept over a refresh are coordinates in the basis; without a convention the trajectory would depend
    on the signs a LAPACK happens to return.
    """
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0).to(basis.dtype)


def randomized_basis(
    times: Product,
    transposed_times: Product,
    columns: int,
    rank: int,
    size: int,
    power_steps: int,
    generator: torch.Generator,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Leading ``rank`` left directions of ``A`` and their singular values, from a Gaussian sketch.

    Halko, Martinsson, Tropp 2011, algorithm 4.4, with a QR after every product.

    Args:
        times: ``A x``.
        transposed_times: ``Aᵀ y``.
        columns: of A.
        rank: directions to return.
        size: columns of the sketch, at least ``rank``.
        power_steps: rounds of subspace iteration.
        generator: on the CPU, so that all devices draw the same sketch.
        like: gives dtype and device.
    """
    sketch = torch.randn(columns, size, generator=generator, dtype=like.dtype).to(like.device)
    q = torch.linalg.qr(times(sketch)).Q
    for _ in range(power_steps):
        q = torch.linalg.qr(times(torch.linalg.qr(transposed_times(q)).Q)).Q
    # The SVD of Qᵀ A through a QR of its transpose: the decomposition itself is only (size, size).
    triangle = torch.linalg.qr(transposed_times(q), mode="r").R
    u, sigma, _ = torch.linalg.svd(triangle.mT, full_matrices=False)
    return canonical_signs(q @ u[:, :rank]), sigma[:rank]


def find_basis(
    gradient: GradientMatrix,
    side: str,
    rule: RankRule,
    *,
    projector: str,
    oversample: int,
    power_steps: int,
    sketch_factor: int = 1,
    generator: Callable[[], torch.Generator],
) -> Tensor:
    """A fresh basis ``(d, r)`` for one side, by any projector that needs no former one.

    A zero gradient gives the first r coordinate vectors; directions beyond the gradient's rank are arbitrary but
    orthonormal. Where LAPACK does not converge, the decomposition is tried again in float64, then on a gradient shaken
    by 1e-7 of its largest entry.

    Args:
        gradient: finite.
        side: left or right.
        rule: how many directions.
        projector: svd, randomized, power (starts as randomized), random, random_orthonormal or identity.
        oversample: extra columns of the sketch.
        power_steps: rounds of subspace iteration on the sketch.
        sketch_factor: the sketch has ``sketch_factor · r + oversample`` columns, at most the short side.
        generator: makes the source of randomness; called again for another try.
    """
    m, n = gradient.shape
    length = m if side == "left" else n
    rank = rule.most(m, n)
    like = gradient.values
    if projector == "identity":
        return torch.eye(length, rank, dtype=like.dtype, device=like.device)
    if projector in ("random", "random_orthonormal"):
        drawn = torch.randn(length, rank, generator=generator(), dtype=like.dtype).to(like.device)
        return drawn / rank**0.5 if projector == "random" else torch.linalg.qr(drawn).Q.contiguous()
    for attempt in range(3):
        tried = gradient
        if attempt:
            tried = GradientMatrix(gradient.values.double(), gradient.rows)
        if attempt == 2:
            scale = SHAKE * tried.values.abs().max() if tried.values.numel() else 0.0
            noise = torch.randn(m, n, generator=generator(), dtype=torch.float64).to(like.device)
            tried = GradientMatrix(tried.values + scale * tried.rows.part(noise), tried.rows)
        try:
            size = min(sketch_factor * rank + oversample, m, n)
            basis, sigma = _decomposed(tried, side, rank, projector, size, power_steps, generator())
            break
        except torch.linalg.LinAlgError:
            if attempt == 2:
                raise
    if isinstance(rule, ThresholdRank | EnergyRank):
        basis = basis[:, : rule.choose(sigma, gradient.squared_norm())]
    return basis.to(like.dtype).contiguous()


def _decomposed(
    gradient: GradientMatrix,
    side: str,
    rank: int,
    projector: str,
    size: int,
    power_steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    m, n = gradient.shape
    if projector == "svd":
        whole = gradient.whole().double()
        matrix = whole if side == "left" else whole.mT
        basis = canonical_signs(leading_left(matrix, rank))
        return basis, (basis.mT @ matrix).norm(dim=1)
    times, transposed_times = gradient.products(side)
    columns = n if side == "left" else m
    return randomized_basis(times, transposed_times, columns, rank, size, power_steps, generator, gradient.values)


def tracked_basis(
    gradient: GradientMatrix,
    side: str,
    basis: Tensor,
    momentum: Tensor | None,
    tracking: float,
) -> Tensor:
    """One warm power iteration, ``qr(B (Bᵀ P)).Q``, with ``B = tracking · lift(momentum) + (1 - tracking) · G``.

    LDAdam's subspace tracking (Robert et al. 2025, algorithm 1); B is never formed. A zero B keeps the old basis.

    Args:
        gradient: the gradient G.
        side: left or right.
        basis: the basis P of the last step, ``(d, r)``.
        momentum: first moment in that basis over its bias correction, whole on every rank, as ``(r, other)``; None
            tracks the gradient alone.
        tracking: share of the momentum.
    """
    times, transposed_times = gradient.products(side)
    if momentum is None:
        image = times(transposed_times(basis))
    else:
        inner = tracking * (momentum.mT @ (basis.mT @ basis)) + (1 - tracking) * transposed_times(basis)
        image = tracking * (basis @ (momentum @ inner)) + (1 - tracking) * times(inner)
    found = torch.linalg.qr(image).Q.contiguous()  # LAPACK's are turned, which native products don't take
    return torch.where(image.abs().amax() > 0, found, basis)
