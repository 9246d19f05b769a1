"""Optimal brain surgeon for structures: which blocks of inputs a matrix can do without, and what the others become.

The step of ZipLM (Kurtic, Frantar & Alistarh 2023, arXiv 2302.04089) on the block formulae of Optimal Brain Compression
(Frantar, Singh & Alistarh 2022). A structure is a block of ``width`` neighbouring columns of ``W`` (out, in): a head of
an attention output, one channel of a feed-forward. With ``H`` the second moment of the inputs and ``B = H⁻¹`` on the
columns that are left, forcing structure M to zero and refitting all others raises ``E ||(V - W) x||²`` by
``tr(W_M (B_MM)⁻¹ W_Mᵀ)``; the least is removed first, then all is updated, until nothing is left.

``W`` enters only through ``G = WᵀW``, so one pass keeps two (in, in) matrices. Removals are applied to them in panels:
inside a panel only the rows that are needed are brought up to date, at its end one product updates everything and the
removed columns are dropped. All sizes come out of one pass: the first s of the order cost ``costs[s]``, and the best
weights of any set are one solve away (`kept_weights`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting.metric import cholesky, widened

# Columns of a panel: enough for products to pay, few enough for its own rows to stay in the cache.
PANEL = 64
# A swap has to lower the cost by this part of it: less is rounding.
LEAST_SWAP = 1e-9
# Of an input's second moment the part that the inputs before it don't explain, below which the matrix is singular.
SINGULAR = 1e-8


@dataclass(frozen=True)
class Removal:
    """The order in which structures go.

    Attributes:
        order: ``(structures,)`` indices, the first to be removed first.
        costs: ``(structures + 1,)`` rise of ``E ||(V - W) x||²`` when the first s are gone; 0 first, not decreasing.
    """

    order: Tensor
    costs: Tensor

    def kept(self, count: int) -> Tensor:
        """The last ``count`` structures to go, ascending."""
        return self.order[len(self.order) - count :].sort().values

    def cost(self, count: int) -> float:
        """What keeping ``count`` structures costs."""
        return float(self.costs[len(self.order) - count])


def columns_of(structures: Tensor, width: int) -> Tensor:
    """The columns of some structures, ``width`` neighbouring ones each, in their order."""
    return (structures[:, None] * width + torch.arange(width, device=structures.device)).flatten()


def removal_order(weight: Tensor, hessian: Tensor, *, width: int = 1, panel: int = PANEL) -> Removal:
    """Remove structures one by one, always the one whose loss is the least.

    Args:
        weight: ``(out, in)``.
        hessian: ``(in, in)`` second moment of the inputs, damped as it shall be. Inputs that are always zero, and
            matrices that are singular to rounding, are taken: the former go first and cost nothing.
        width: columns of a structure.
        panel: columns that are removed before everything is brought up to date; any number gives the same.

    Raises:
        IsogridError: sizes that don't belong together, NaN or infinite numbers.
    """
    weight, hessian = _checked(weight, hessian, width)
    if not weight.shape[1]:
        return Removal(torch.zeros(0, dtype=torch.int64, device=weight.device), weight.new_zeros(1))
    inverse = _inverse(hessian)
    gram = weight.mT @ weight
    alive = torch.arange(weight.shape[1] // width, device=weight.device)
    order: list[Tensor] = []
    costs = [torch.zeros(1, dtype=torch.float64, device=weight.device)]
    while len(alive):
        steps = min(max(panel // width, 1), len(alive))
        chosen, paid, inverse, gram = _remove_panel(inverse, gram, width, steps)
        order.append(alive[chosen])
        costs.append(paid)
        rest = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        rest[chosen] = False
        alive = alive[rest]
    return Removal(torch.cat(order), torch.cat(costs).cumsum(0))


def _remove_panel(inverse: Tensor, gram: Tensor, width: int, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Remove ``steps`` structures: (which, what each cost, inverse and gram of the columns that are left).

    With ``u = L⁻¹ B_M,:`` and ``a = W_M L⁻ᵀ`` (``L Lᵀ = B_MM``) of each removal stacked to U (t, n) and A (out, t),
    the current matrices are ``B - UᵀU`` and ``W - A U``. A itself is never needed: V = WᵀA and Q = AᵀA are.
    """
    n = inverse.shape[0]
    count = n // width
    u_all = inverse.new_zeros(steps * width, n)
    v_all = inverse.new_zeros(n, steps * width)
    q_all = inverse.new_zeros(steps * width, steps * width)
    inverses = _diagonal_blocks(inverse, width)  # (structures, width, width), kept up to date
    grams = _diagonal_blocks(gram, width)
    gone = torch.zeros(count, dtype=torch.bool, device=inverse.device)
    chosen: list[int] = []
    paid: list[Tensor] = []
    for step in range(steps):
        scores = _scores(inverses, grams).masked_fill(gone, torch.inf)
        at = int(scores.argmin())
        done = step * width
        mine, new = slice(at * width, (at + 1) * width), slice(done, done + width)
        u, v, q = u_all[:done], v_all[:, :done], q_all[:done, :done]
        u_mine = u[:, mine]
        row = inverse[mine] - u_mine.mT @ u
        root = cholesky(row[:, mine])
        fresh_u = torch.linalg.solve_triangular(root, row, upper=False)  # (width, n)
        fresh_v = _over_root(gram[:, mine] - v @ u_mine, root)  # Wᵀa, (n, width)
        with_old = _over_root(v[mine].mT - q @ u_mine, root)  # Aᵀa, (done, width)
        with_self = _over_root(torch.linalg.solve_triangular(root, grams[at], upper=False), root)  # aᵀa
        u_all[new], v_all[:, new] = fresh_u, fresh_v
        q_all[:done, new], q_all[new, :done], q_all[new, new] = with_old, with_old.mT, with_self
        # Of the current W: (W - A U)ᵀ a, by structure; and u by structure.
        correlation = (fresh_v - u.mT @ with_old).view(count, width, width)
        blocks = fresh_u.view(width, count, width).transpose(0, 1)
        cross = correlation @ blocks
        grams = grams - cross - cross.mT + blocks.mT @ with_self @ blocks
        inverses = inverses - blocks.mT @ blocks
        gone[at] = True
        chosen.append(at)
        paid.append(with_self.diagonal().sum().clamp_min(0))
    left = (~gone).repeat_interleave(width)
    u, v = u_all[:, left], v_all[left]
    cross = v @ u
    inverse = inverse[left][:, left] - u.mT @ u
    gram = gram[left][:, left] - cross - cross.mT + u.mT @ q_all @ u
    return torch.tensor(chosen, device=gone.device), torch.stack(paid), inverse, gram


def _over_root(matrix: Tensor, root: Tensor) -> Tensor:
    """``matrix · root⁻ᵀ``."""
    return torch.linalg.solve_triangular(root, matrix.mT, upper=False).mT


def _diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """``(n / width, width, width)`` copies of the blocks on the diagonal."""
    count = matrix.shape[0] // width
    return matrix.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def _scores(inverses: Tensor, grams: Tensor) -> Tensor:
    """``tr((B_MM)⁻¹ W_Mᵀ W_M)`` of every structure."""
    if inverses.shape[-1] == 1:
        return (grams / inverses.clamp_min(torch.finfo(inverses.dtype).tiny)).flatten()
    return torch.cholesky_solve(grams, cholesky(_positive(inverses))).diagonal(dim1=-2, dim2=-1).sum(-1)


def _positive(blocks: Tensor) -> Tensor:
    """Blocks of removed structures are zero to rounding: an identity keeps their factorization defined."""
    empty = blocks.diagonal(dim1=-2, dim2=-1).amax(-1) <= 1e-14 * blocks.diagonal(dim1=-2, dim2=-1).max()
    return torch.where(empty[:, None, None], torch.eye(blocks.shape[-1]).to(blocks), blocks)


def removal_cost(weight: Tensor, hessian: Tensor, kept: Tensor, *, width: int = 1) -> float:
    """What keeping only some structures costs, the others' columns zero and these refitted.

    Args:
        weight: ``(out, in)``.
        hessian: ``(in, in)``.
        kept: indices of structures.
        width: columns of a structure.
    """
    weight, hessian = _checked(weight, hessian, width)
    removed = columns_of(_others(kept, weight.shape[1] // width), width)
    if len(removed) == 0:
        return 0.0
    columns = columns_of(kept, width)
    # The error of the removed part that the kept part can't take over: W_P (H_PP - H_PK H_KK⁻¹ H_KP) W_Pᵀ.
    across = torch.linalg.solve_triangular(
        cholesky(hessian[columns][:, columns]), hessian[columns][:, removed], upper=False
    )
    schur = hessian[removed][:, removed] - across.mT @ across
    lost = weight[:, removed]
    return max(float(((lost @ schur) * lost).sum()), 0.0)


def kept_weights(weight: Tensor, hessian: Tensor, kept: Tensor, *, width: int = 1) -> Tensor:
    """The columns of the kept structures, refitted to make up for the removed ones: ``W H_:K (H_KK)⁻¹``.

    Args:
        weight: ``(out, in)``.
        hessian: ``(in, in)``.
        kept: indices of structures, ascending.
        width: columns of a structure.

    Returns:
        ``(out, kept columns)``, float64.
    """
    weight, hessian = _checked(weight, hessian, width)
    columns, removed = columns_of(kept, width), columns_of(_others(kept, weight.shape[1] // width), width)
    if len(columns) == 0 or len(removed) == 0:
        return weight[:, columns]
    moved = torch.cholesky_solve(hessian[columns][:, removed], cholesky(hessian[columns][:, columns]))
    return weight[:, columns] + weight[:, removed] @ moved.mT


def swapped(weight: Tensor, hessian: Tensor, kept: Tensor, *, width: int = 1, swaps: int = 64) -> Tensor:
    """A better set of as many structures: the best exchange of a kept one for a removed one, again and again.

    All pairs are judged at once. With K kept, ``U = H_KK⁻¹ H_KP``, ``S_p`` the Schur complement of a removed p and
    ``A_p`` the weights it would get, adding p gains ``tr(A_p S_p A_pᵀ)``; then k costs ``tr((B'_kk)⁻¹ W'_kᵀ W'_k)``
    with ``B'_kk = B_kk + U_kp S_p⁻¹ U_kpᵀ`` and ``W'_k = W_k - A_p U_kpᵀ``.

    Args:
        weight: ``(out, in)``.
        hessian: ``(in, in)``.
        kept: indices of structures.
        width: columns of a structure.
        swaps: at most so many exchanges.

    Returns:
        Indices, ascending; their `removal_cost` is never above the given ones'.
    """
    weight, hessian = _checked(weight, hessian, width)
    count = weight.shape[1] // width
    kept = kept.sort().values
    removed = _others(kept, count)
    if len(kept) == 0 or len(removed) == 0:
        return kept
    cost = removal_cost(weight, hessian, kept, width=width)
    for _ in range(swaps):
        change = _swap_changes(weight, hessian, kept, removed, width)
        at = int(change.argmin())
        leaving, entering = at // len(removed), at % len(removed)
        tried = kept.clone()
        tried[leaving] = removed[entering]
        tried = tried.sort().values
        # Judged anew: the differences above are small numbers out of large ones.
        found = removal_cost(weight, hessian, tried, width=width)
        if not found < cost * (1 - LEAST_SWAP):
            break
        kept, cost = tried, found
        removed = _others(kept, count)
    return kept


def _swap_changes(weight: Tensor, hessian: Tensor, kept: Tensor, removed: Tensor, width: int) -> Tensor:
    """``(kept, removed)`` change of the cost when one takes the other's place."""
    k, p = len(kept), len(removed)
    inside, outside = columns_of(kept, width), columns_of(removed, width)
    inverse = _inverse(hessian[inside][:, inside])
    across = hessian[inside][:, outside]  # (k w, p w)
    moves = inverse @ across  # U
    lost = weight[:, outside]
    found = weight[:, inside] + lost @ moves.mT
    schurs = _diagonal_blocks(hessian[outside][:, outside], width)
    schurs = schurs - torch.einsum("kpi,kpj->pij", across.view(-1, p, width), moves.view(-1, p, width))
    # The residual's correlation with the removed inputs, W_P (H_PP - H_PK H_KK⁻¹ H_KP).
    pull = lost @ (hessian[outside][:, outside] - across.mT @ moves)
    entering = torch.cholesky_solve(pull.view(-1, p, width).permute(1, 2, 0), cholesky(schurs))  # A_pᵀ (p, w, out)
    gains = (entering * pull.view(-1, p, width).permute(1, 2, 0)).sum((1, 2))
    u = moves.view(k, width, p, width).permute(0, 2, 1, 3)  # (k, p, w, w)
    solved = torch.cholesky_solve(u.mT, cholesky(schurs).expand(k, p, width, width))  # S⁻¹ Uᵀ
    inverses = _diagonal_blocks(inverse, width)[:, None] + u @ solved
    both = (found.mT @ entering.permute(2, 0, 1).reshape(-1, p * width)).view(k, width, p, width).permute(0, 2, 1, 3)
    cross = both @ u.mT
    grams = _diagonal_blocks(found.mT @ found, width)[:, None] - cross - cross.mT
    grams = grams + u @ (entering @ entering.mT) @ u.mT
    if width == 1:
        leaving = (grams / inverses).view(k, p)
    else:
        leaving = torch.cholesky_solve(grams, cholesky(inverses)).diagonal(dim1=-2, dim2=-1).sum(-1)
    return leaving - gains


def _inverse(hessian: Tensor) -> Tensor:
    """The inverse; of a matrix that is singular to rounding with a ridge, which leaves half of the digits."""
    root, failed = torch.linalg.cholesky_ex(hessian)
    pivots = root.diagonal().square() / hessian.diagonal()
    if failed or float(pivots.min()) < SINGULAR:
        root = cholesky(hessian + SINGULAR * hessian.diagonal().mean() * torch.eye(len(hessian)).to(hessian))
    return torch.cholesky_inverse(root)


def _others(kept: Tensor, count: int) -> Tensor:
    rest = torch.ones(count, dtype=torch.bool, device=kept.device)
    rest[kept] = False
    return rest.nonzero().flatten()


def _checked(weight: Tensor, hessian: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Both in float64; inputs that are always zero get a size of their own and columns of zeros."""
    columns = weight.shape[-1]
    if weight.ndim != 2 or hessian.shape != (columns, columns):
        raise IsogridError(
            f"a matrix {tuple(weight.shape)} takes a second moment of its inputs, got {tuple(hessian.shape)}"
        )
    if width < 1 or columns % width:
        raise IsogridError(f"structures of {width} columns don't divide a matrix of {columns}")
    weight = widened(weight.detach())
    hessian = widened(hessian.detach()).to(weight.device)
    if not (torch.isfinite(weight).all() and torch.isfinite(hessian).all()):
        raise IsogridError("NaN or infinite entries in the matrix or the second moment of its inputs")
    dead = hessian.diagonal() <= 0
    if dead.any():
        alive = hessian.diagonal()[~dead]
        size = alive.mean() if len(alive) else hessian.new_ones(())
        hessian = hessian + torch.diag(torch.where(dead, size, 0.0))
        weight = weight.masked_fill(dead, 0.0)
    return weight, hessian
