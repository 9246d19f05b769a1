"""Circulant: a convolution with wrap-around, multiplied by fast Fourier transforms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isogrid.fitting import Metric, cholesky, widened
from isogrid.formats.base import Format
from isogrid.formats.budget import Cost
from isogrid.formats.checks import require_solver
from isogrid.formats.factors import Factor, Factors, prefixed
from isogrid.formats.monarch import Monarch
from isogrid.formats.permuted import Permuted
from isogrid.formats.product import Product
from isogrid.formats.sizes import pad_matrix, stride_order
from isogrid.formats.start import normal_
from isogrid.formats.traits import Traits

HALF = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class Circulant(Format):
    """``W[i, j] = kernel[(i - j) mod N]`` with ``N = max(out, in)``: N parameters, constant along wrapped diagonals.

    A rectangular matrix is cropped from the square one. The Fourier transform makes it diagonal, so a product takes
    about ``5/2 · N · log₂ N`` multiply-adds; half precision is computed in float32, which transforms need.
    """

    name: ClassVar[str] = "circulant"
    traits: ClassVar[Traits] = Traits(
        exact_on_members=True, optimal=True, optimal_under_metric=True, monotone_in_budget=True, linear_in_factors=True
    )

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``kernel (max(out, in),)``: the first column of the square matrix."""
        return {"kernel": Factor((max(out_features, in_features),))}

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """Transform, product of the spectra, transform back."""
        kernel = factors["kernel"]
        n = kernel.shape[0]
        kept = torch.promote_types(x.dtype, kernel.dtype)
        if not x.numel():  # transforms refuse empty batches; so do gradients that are missing
            return torch.nn.functional.linear(x, self.dense(factors, out_features, x.shape[-1]))
        wide = torch.float32 if kept in HALF else kept
        spectrum = torch.fft.rfft(x.to(wide), n=n) * torch.fft.rfft(kernel.to(wide))
        return torch.fft.irfft(spectrum, n=n)[..., :out_features].to(kept)

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The kernel, shifted down by one in every column."""
        kernel = factors["kernel"]
        i = torch.arange(out_features, device=kernel.device).unsqueeze(1)
        return kernel[(i - torch.arange(in_features, device=kernel.device)) % kernel.shape[0]]

    def cost(self, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Cost:
        """Two real transforms of N numbers, ``5/2 · N · log₂ N`` operations each, and N / 2 + 1 complex products.

        Two operations count as one multiply-add. That is what transforms of lengths with small prime factors take. The
        kernel's own transform is done once per call, not once per row, and isn't counted.
        """
        n = max(out_features, in_features)
        transforms = math.ceil(2.5 * n * math.log2(n))
        return Cost(parameters=n, multiply_adds=transforms + 4 * (n // 2 + 1), bits=n * dtype.itemsize * 8)

    @torch.no_grad()
    def initialize(
        self,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Gaussian, of the standard deviation that entries of a dense matrix of these sizes start with."""
        normal_(factors["kernel"], math.sqrt(min(out_features, in_features)) / in_features, generator)

    @torch.no_grad()
    def orthonormalize(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> None:
        """The spectrum's moduli set to one: the polar factor of the square matrix, again a circulant."""
        kernel = factors["kernel"]
        spectrum = torch.fft.rfft(widened(kernel))
        phases = torch.where(spectrum == 0, torch.ones_like(spectrum), spectrum)
        kernel.copy_(torch.fft.irfft(phases / phases.abs(), n=kernel.shape[0]))

    def solve(self, target: Tensor, metric: Metric | None, *, solver: str, **options: Any) -> Factors:
        """The mean of every wrapped diagonal; under a metric the least-squares kernel: the global minimum either way.

        Solvers: default; "projection" ignores the metric.
        """
        require_solver(self, solver, ("default", "projection"))
        (m, in_features), n = target.shape, max(target.shape)
        shift = torch.arange(n, device=target.device)
        # Entry (i, d): the column at which row i meets the wrapped diagonal d; it may lie beyond the matrix.
        column = (shift[:m].unsqueeze(1) - shift) % n
        count = (column < in_features).sum(0)
        kernel = pad_matrix(target, m, n).gather(1, column).sum(0) / count
        if metric is None or solver == "projection":
            return {"kernel": kernel}
        # Normal equations of what the means leave, so that a circulant stays what it is however bad the metric:
        # gram[d, e] = Σ_i M[i - d, i - e], a sum over m places of the metric's wrapped diagonal d - e.
        moment = metric.matrix
        left = (target - self.dense({"kernel": kernel}, m, in_features)) @ moment
        wish = pad_matrix(left, m, n).gather(1, column).sum(0)
        wrapped = pad_matrix(moment, n, n).gather(1, (shift.unsqueeze(1) + shift) % n)  # (r, c): M[r, r + c]
        sums = torch.nn.functional.pad(torch.cat([wrapped, wrapped]).cumsum(0), (0, 0, 1, 0))
        first = -shift % n
        gram = (sums[first + m] - sums[first]).gather(1, (shift.unsqueeze(1) - shift) % n)
        root = cholesky((gram + gram.mT) / 2)
        return {"kernel": kernel + torch.cholesky_solve(wish.unsqueeze(1), root).squeeze(1)}

    def rewritten(
        self, to: Format, factors: Mapping[str, Tensor], out_features: int, in_features: int
    ) -> tuple[Format, Factors] | None:
        """A square one as `Product` of two permuted Monarchs: the Fourier transform, and its way back by the spectrum.

        In real arithmetic: the first part maps n inputs to the n real and n imaginary parts of their transform, the
        second multiplies by the kernel's spectrum and transforms back (Dao et al. 2022, Prop. 2).
        ``to`` is a Product with its parts left at their default, or of two Permuted Monarchs without ranks; of width 2n
        or none. Blocks other than Monarch's default are kept; else they are the divisor of n that takes the fewest
        parameters, the root of a square n.
        """
        n = out_features
        if n != in_features or not isinstance(to, Product) or to.widths not in (None, (2 * n,)) or len(to.parts) != 2:
            return None
        members: list[Permuted] = []
        for part in (Permuted(), Permuted()) if to.parts == Product().parts else to.parts:
            if not isinstance(part, Permuted) or not isinstance(part.inner, Monarch) or part.inner.rank is not None:
                return None
            blocks = part.inner.blocks if part.inner.blocks != Monarch.blocks else _cheapest_blocks(n)
            if n % blocks:
                return None
            members.append(Permuted(Monarch(blocks, _transform_rank(n, blocks))))
        kernel = widened(factors["kernel"])
        there = _fourier(n).to(kernel.device)
        back = there.conj().T * torch.fft.fft(kernel)  # the spectrum scales the columns
        matrices = torch.cat([there.real, there.imag]), torch.cat([back.real, -back.imag], dim=1)
        out: Factors = {}
        for i, (member, matrix) in enumerate(zip(members, matrices, strict=True)):
            rows, columns = matrix.shape
            assert isinstance(member.inner, Monarch)
            orders = {
                "input_order": stride_order(columns, member.inner.blocks).to(kernel.device),
                "output_order": torch.arange(rows, device=kernel.device),
            }
            inner = member.inner.fit(matrix[:, orders["input_order"]])
            held = {name: order.int() for name, order in orders.items()} | prefixed("inner_", inner)
            out |= prefixed(f"part{i}_", held)
        return Product(tuple(members), (2 * n,)), out


def _fourier(n: int) -> Tensor:
    """``(n, n)`` unitary matrix of the Fourier transform, complex128."""
    index = torch.arange(n)
    angle = -2 * math.pi / n * (torch.outer(index, index) % n).double()  # reduced as integers: no digits are lost
    return torch.polar(torch.full_like(angle, n**-0.5), angle)


def _transform_rank(n: int, blocks: int) -> int:
    """Rank of the slices of a real transform of n numbers over strided inputs: enough for every spectrum.

    A slice has the complex rank p / g, where p = n / blocks and g is its greatest common divisor with blocks: so many
    frequencies meet in it. Their real and imaginary parts are twice as many directions, unless the frequencies come
    with their negatives, which they do in every slice when g is 1 or 2.
    """
    p = n // blocks
    g = math.gcd(p, blocks)
    return p // g if g <= 2 else 2 * p // g


def _cheapest_blocks(n: int) -> int:
    """The divisor of n with the fewest parameters, blocks · rank, and of these the nearest to the root."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return min(divisors, key=lambda d: (d * _transform_rank(n, d), abs(math.log(d * d / n)), d))
