"""Stand-ins: what a layer with an error of a certain size does to a model, before any fit is made.

Whatever the format that a layer will be written in, the low-rank matrix of the same error under the same metric stands
in for it: one decomposition gives it at any size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isogrid.fitting import Metric, truncated_svd, widened
from isogrid.linear import linear_matrix


@dataclass(frozen=True)
class StandIn:
    """A layer at every rank: the best under its metric are projections on leading left directions.

    Attributes:
        basis: ``(out, k)`` float32.
        errors: squared error of the first r directions, r = 0 … k.
        mean: ``(in,)`` of the inputs, float32; None where it isn't known.
    """

    basis: Tensor
    errors: list[float]
    mean: Tensor | None

    @classmethod
    def of(cls, matrix: Tensor, metric: Metric | None, *, has_bias: bool = False) -> StandIn:
        """The stand-in of a layer's ``(out, in)`` matrix under the metric of its inputs; a bias takes up means."""
        mean = None if metric is None or metric.mean is None else metric.mean.to(torch.float32)
        metric = metric.centred if metric is not None and has_bias else metric
        weighted = widened(matrix) if metric is None else widened(matrix).to(metric.root) @ metric.root
        u, sigma, _ = truncated_svd(weighted, min(weighted.shape))
        tails = sigma.square().flip(0).cumsum(0).flip(0).tolist()
        return cls(u.to(torch.float32), [*tails, 0.0], mean)

    def with_error(self, matrix: Tensor, error: float) -> Tensor:
        """``(out, in)`` float32 of a squared error: between two ranks, the direction at the edge counts in part."""
        rank = next(rank for rank, left in enumerate(self.errors) if left <= error)
        weights = torch.zeros(self.basis.shape[1])
        weights[:rank] = 1.0
        if rank > 0:
            span = self.errors[rank - 1] - self.errors[rank]
            if span > 0:
                # (1 - w)² of the edge's square is lost beside the tail.
                weights[rank - 1] = 1 - math.sqrt(min(max((error - self.errors[rank]) / span, 0.0), 1.0))
        basis = self.basis.to(matrix.device)
        return (basis * weights.to(basis)) @ (basis.mT @ matrix.to(torch.float32))


@contextmanager
def standing_in(
    layers: Mapping[str, nn.Module], stand_ins: Mapping[str, StandIn], errors: Mapping[str, float]
) -> Iterator[None]:
    """Layers of a model with their stand-ins of these squared errors inside, as they were afterwards."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for name, error in errors.items():
            if error <= 0:
                continue
            module, stand_in = layers[name], stand_ins[name]
            matrix, bias = linear_matrix(module), getattr(module, "bias", None)
            smaller = stand_in.with_error(matrix, error)
            if isinstance(bias, Tensor) and stand_in.mean is not None:
                kept.append((bias.detach(), bias.detach().clone()))
                bias.detach().add_((matrix.to(torch.float32) - smaller) @ stand_in.mean.to(smaller))
            kept.append((matrix, matrix.clone()))
            matrix.copy_(smaller)
        yield
    finally:
        for value, before in kept:
            value.copy_(before)
