"""A format seen through fixed permutations of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import Metric, OnStep, squared_norm
from isogrid.formats.base import Format
from isogrid.formats.budget import Budget, Cost
from isogrid.formats.checks import require_solver
from isogrid.formats.factors import Factor, Factors, prefixed, unprefixed
from isogrid.formats.monarch import Monarch
from isogrid.formats.start import Component
from isogrid.kernels import in_order


@dataclass(frozen=True)
class Permuted(Format):
    """``W[i, input_order[j]] = inner[output_order[i], j]``: another order of the inputs and outputs for free.

    Attributes:
        inner: the format within.
    """

    inner: Format = field(default_factory=Monarch)

    name: ClassVar[str] = "permuted"

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Format):
            raise IsogridError(f"permuted: inner is a format, got {self.inner!r}")

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``input_order (in,)`` and ``output_order (out,)``, int32, and ``inner_…``."""
        return {
            "input_order": Factor((in_features,), torch.int32, "index"),
            "output_order": Factor((out_features,), torch.int32, "index"),
            **prefixed("inner_", self.inner.factors(out_features, in_features)),
        }

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """Gather, the inner product, gather."""
        x = in_order(x, factors["input_order"])
        y = self.inner.multiply(unprefixed("inner_", factors), x, out_features)
        return in_order(y, factors["output_order"])

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The inner matrix, its rows and columns put in place."""
        inner = self.inner.dense(unprefixed("inner_", factors), out_features, in_features)
        return inner.index_select(0, factors["output_order"]).index_select(1, factors["input_order"].argsort())

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """Those of the inner format."""
        return [
            Component(f"inner_{part.factor}", part.fan_in, part.fan_out, part.outputs)
            for part in self.inner.components(out_features, in_features)
        ]

    def cost(self, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Cost:
        """The inner format's, and the bits of the two orders."""
        orders = Cost(0, 0, 8 * self.cost_of_order(out_features, in_features))
        return self.inner.cost(out_features, in_features, dtype) + orders

    def deploy(
        self, factors: Mapping[str, Tensor], out_features: int, in_features: int
    ) -> tuple[Format, dict[str, Tensor]]:
        """The inner format's inference form in the same orders."""
        inner, own = self.inner.deploy(unprefixed("inner_", factors), out_features, in_features)
        orders = {name: factors[name] for name in ("input_order", "output_order")}
        return type(self)(inner), {**orders, **prefixed("inner_", own)}

    @torch.no_grad()
    def initialize(
        self,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """The inner format's start, in the order given by nature."""
        factors["input_order"].copy_(torch.arange(in_features))
        factors["output_order"].copy_(torch.arange(out_features))
        self.inner.initialize(unprefixed("inner_", factors), out_features, in_features, generator)

    def sized(self, out_features: int, in_features: int, budget: Budget) -> Self:
        """The inner format, sized to the budget less the indices."""
        return type(self)(
            self.inner.sized(out_features, in_features, self._inner_budget(out_features, in_features, budget))
        )

    def orthonormalize(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> None:
        """As the inner format does it."""
        self.inner.orthonormalize(unprefixed("inner_", factors), out_features, in_features)

    def _inner_budget(self, out_features: int, in_features: int, budget: Budget) -> Budget:
        orders = 0 if budget.bytes is None else self.cost_of_order(out_features, in_features)
        return budget.with_limit(budget.limit - orders)

    @staticmethod
    def cost_of_order(out_features: int, in_features: int) -> int:
        """Bytes of the two index vectors."""
        return 4 * (out_features + in_features)

    def candidates(self, out_features: int, in_features: int, budget: Budget) -> Iterable[Self]:
        """One for each candidate of the inner format."""
        left = self._inner_budget(out_features, in_features, budget)
        for inner in self.inner.candidates(out_features, in_features, left):
            yield type(self)(inner)

    def solve(
        self,
        target: Tensor,
        metric: Metric | None,
        *,
        solver: str,
        start: Factors | None,
        generator: torch.Generator,
        on_step: OnStep | None,
        trials: int = 0,
        orders: Sequence[tuple[Tensor, Tensor]] = (),
        **options: Any,
    ) -> Factors:
        """The best of inner fits in several orders.

        Its own order is tried, the start's or without one the natural order, then ``orders``, pairs
        ``(output_order (out,), input_order (in,))``, then, without a start, ``trials`` random ones (0).
        """
        require_solver(self, solver, ("default",))
        out_features, in_features = target.shape
        for pair in orders:
            for order, size in zip(pair, target.shape, strict=True):
                if not torch.equal(order.sort().values.cpu().long(), torch.arange(size)):
                    raise IsogridError(f"permuted: an order of {size} features holds each of 0 … {size - 1} once")
        begin = None if start is None else unprefixed("inner_", start)
        if start is not None:
            tried = [(start["output_order"].long(), start["input_order"].long()), *orders]
        else:
            tried = [(torch.arange(out_features), torch.arange(in_features)), *orders]
            tried += [
                (
                    torch.randperm(out_features, generator=generator, device=generator.device),
                    torch.randperm(in_features, generator=generator, device=generator.device),
                )
                for _ in range(trials)
            ]
        best: Factors = {}
        best_error = float("inf")
        for trial, (rows, columns) in enumerate(tried):
            rows, columns = rows.to(target.device).long(), columns.to(target.device).long()
            # target = inner[rows][:, argsort(columns)]  <=>  inner = target[argsort(rows)][:, columns]
            wish = target[rows.argsort()][:, columns]
            inner_metric = None if metric is None else metric.permuted(columns)
            own = begin if trial == 0 else None  # the start's factors mean nothing in another order
            inner = self.inner.fit(wish, inner_metric, start=own, generator=generator, **options)
            error = squared_norm(wish - self.inner.dense(inner, out_features, in_features), inner_metric)
            if on_step is not None:
                on_step(trial, error)
            if error < best_error or not best:
                best_error = error
                best = {"input_order": columns, "output_order": rows, **prefixed("inner_", inner)}
        return best
