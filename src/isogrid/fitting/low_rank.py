"""The best rank-k matrix under a metric, and the lossless choice of its pivot inputs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting.metric import Metric

# Below this side length the exact SVD costs nothing; above it the Gram matrix halves the time and more.
GRAM_FROM = 16
# The Gram matrix squares the condition number: below this ratio of eigenvalues (float64) its directions are noise.
GRAM_RESOLUTION = 1e-11
# Batches with fewer numbers are done before a thread has started.
SHARE_FROM = 2**15

Solver = Literal["default", "svd", "gram", "randomized"]


def leading_left(
    a: Tensor, rank: int, *, solver: Solver = "default", generator: torch.Generator | None = None
) -> Tensor:
    """Orthonormal basis ``(..., m, rank)`` of the leading left singular directions of ``a`` (..., m, n), float64.

    Args:
        a: one matrix or a batch.
        rank: at most ``min(m, n)``.
        solver: "svd" is exact; "gram" takes the eigenvectors of the smaller Gram matrix; "randomized" is subspace
            iteration with 10 extra directions and two power steps (Halko, Martinsson, Tropp 2011, Alg. 4.4);
            "default" picks "gram" for large matrices wherever it resolves the directions, else "svd".
        generator: source of the randomised start.

    Raises:
        IsogridError: unknown solver.
    """
    m, n = a.shape[-2:]
    if solver == "randomized":
        size = min(rank + 10, m, n)
        drawn_on = generator.device if generator is not None else "cpu"
        sketch = torch.randn(*a.shape[:-2], n, size, dtype=a.dtype, generator=generator, device=drawn_on).to(a.device)
        q = torch.linalg.qr(a @ sketch).Q
        for _ in range(2):
            q = torch.linalg.qr(a @ torch.linalg.qr(a.mT @ q).Q).Q
        inner = torch.linalg.svd(q.mT @ a, full_matrices=False).U
        return q @ inner[..., :rank]
    if solver == "gram" or (solver == "default" and min(m, n) >= GRAM_FROM):
        wide = m <= n
        values, vectors = shared_out(torch.linalg.eigh, a @ a.mT if wide else a.mT @ a)
        kept = vectors[..., values.shape[-1] - rank :].flip(-1)
        smallest, largest = values[..., -rank], values[..., -1]
        if solver == "gram" or bool((smallest > GRAM_RESOLUTION * largest).all()):
            return kept if wide else torch.linalg.qr(a @ kept).Q
    elif solver not in ("default", "svd"):
        raise IsogridError(f"unknown solver {solver!r}; low rank has: default, svd, gram, randomized")
    return torch.linalg.svd(a, full_matrices=False).U[..., :rank]


def truncated_svd(a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``u (..., m, rank)``, ``sigma (..., rank)``, ``vh (..., rank, n)`` of one matrix or a batch, float64.

    From the eigenvectors of the smaller Gram matrix, three times as fast; matrices whose leading directions that does
    not resolve get a full decomposition.
    """
    m, n = a.shape[-2:]
    if min(m, n) < GRAM_FROM or rank == 0:
        u, sigma, vh = shared_out(torch.linalg.svd, a)
        return u[..., :rank], sigma[..., :rank], vh[..., :rank, :]
    wide = m <= n
    a = a.contiguous()  # blocks cut from a matrix: a batched product would copy them every time
    values, vectors = shared_out(torch.linalg.eigh, a @ a.mT if wide else a.mT @ a)
    values, vectors = values[..., -rank:].flip(-1).clamp(min=0), vectors[..., -rank:].flip(-1)
    blurred = values[..., -1] <= GRAM_RESOLUTION * values[..., 0]
    sigma = values.sqrt()
    inverse = torch.where(blurred.unsqueeze(-1), torch.ones_like(sigma), 1 / sigma)
    u = vectors if wide else (a @ vectors) * inverse.unsqueeze(-2)
    vh = (vectors.mT @ a) * inverse.unsqueeze(-1) if wide else vectors.mT.clone()
    if blurred.any():
        left, kept, right = torch.linalg.svd(a[blurred], full_matrices=False)
        u[blurred], sigma[blurred], vh[blurred] = left[..., :rank], kept[..., :rank], right[..., :rank, :]
    return u, sigma, vh


def shared_out(decompose: Callable[..., Any], batch: Tensor) -> tuple[Tensor, ...]:
    """A batched decomposition, the batch shared out to as many threads as torch may use.

    LAPACK takes the matrices of a batch one after the other, on one core.
    """
    workers = torch.get_num_threads() if batch.device.type == "cpu" else 1
    options = {"full_matrices": False} if decompose is torch.linalg.svd else {}
    flat = batch.reshape(-1, *batch.shape[-2:])
    if workers == 1 or len(flat) < 4 * workers or flat.numel() < SHARE_FROM:
        return tuple(decompose(batch, **options))
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(lambda part: decompose(part, **options), flat.chunk(workers)))
    joined = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return tuple(piece.view(*batch.shape[:-2], *piece.shape[1:]) for piece in joined)


def low_rank(
    target: Tensor,
    metric: Metric | None,
    rank: int,
    *,
    solver: Solver = "default",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The minimiser of ``||(target - left right) M^½||_F`` over rank ``rank``: whitened truncated SVD.

    Returns ``left (out, rank)`` and ``right (rank, in)``, float64, balanced: column i of ``left`` and row i of
    ``right`` have equal norms, so neither overflows in half precision. A direction the target does not have gets a
    zero row on the right and a unit column on the left, so that training can still use it.

    With ``M = L Lᵀ`` the left directions are those of ``target L``; the right factor is the *left projection*
    ``Uᵀ target``, which needs no inverse of L (fitting theory 3.1).
    """
    weighted = target if metric is None else target @ metric.root
    u = leading_left(weighted, rank, solver=solver, generator=generator)
    right = u.mT @ target
    return balance(u, right)


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal ``left (..., m, k)`` and ``right (..., k, n)``, column i scaled against row i to equal norms."""
    norms = right.norm(dim=-1)  # (..., k)
    scale = torch.where(norms > norms.amax(-1, keepdim=True) * 1e-14, norms, torch.ones_like(norms)).sqrt()
    return left * scale.unsqueeze(-2), right / scale.unsqueeze(-1)


def dominant_inputs(basis: Tensor, bound: float = 1.05) -> tuple[Tensor, Tensor]:
    """Choose k of n inputs that carry a k-dimensional row space, and write the rest through them.

    Args:
        basis: ``(k, n)`` orthonormal rows, float64.
        bound: stop when no entry of the coefficients exceeds it in size.

    Returns:
        ``order (n,)``: the chosen inputs, then the others, ascending within each part; and ``coefficients (k, n - k)``
        with ``basis[:, order[k:]] = basis[:, order[:k]] @ coefficients``, entries at most ``bound`` in size.

    LU pivots give a start; then the largest coefficient beyond the bound exchanges its two inputs, which multiplies
    the chosen minor's volume by that coefficient (Goreinov et al. 2010; the bound is that of the strong
    rank-revealing QR of Gu and Eisenstat 1996).
    """
    k, n = basis.shape
    if k == n:
        return torch.arange(n, device=basis.device), basis.new_zeros(k, 0)
    pivots = torch.linalg.lu_factor(basis.mT.contiguous()).pivots.tolist()
    order = list(range(n))
    for i, pivot in enumerate(pivots[:k]):
        order[i], order[pivot - 1] = order[pivot - 1], order[i]
    index = torch.tensor(order, device=basis.device)
    coefficients = torch.linalg.solve(basis[:, index[:k]], basis[:, index[k:]])  # (k, n - k)
    # Each exchange grows the volume by more than `bound`, so the loop ends; the cap only guards against rounding.
    for _ in range(10 * n):
        flat = int(coefficients.abs().argmax())
        i, j = divmod(flat, n - k)
        pivot_value = coefficients[i, j].clone()
        if pivot_value.abs() <= bound:
            break
        row, column = coefficients[i].clone(), coefficients[:, j].clone()
        coefficients -= torch.outer(column, row / pivot_value)
        coefficients[i] = row / pivot_value
        coefficients[:, j] = -column / pivot_value
        coefficients[i, j] = 1 / pivot_value
        index[i], index[k + j] = index[k + j].clone(), index[i].clone()
    chosen, others = index[:k].sort(), index[k:].sort()
    order_out = torch.cat([chosen.values, others.values])
    # Solved anew: the exchanges have left their rounding in the running coefficients.
    return order_out, torch.linalg.solve(basis[:, order_out[:k]], basis[:, order_out[k:]])
