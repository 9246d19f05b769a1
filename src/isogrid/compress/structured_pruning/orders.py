"""What each module of a model loses with every structure it gives up: orders, errors, and the numbers that are left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.compress.calibrate import Moments
from isogrid.errors import IsogridError
from isogrid.fitting import Metric, Removal, kept_weights, removal_cost, removal_order, swapped, widened
from isogrid.linear import Coupled, linear_matrix

CRITERIA = ("obs", "magnitude")
# Ridge relative to the mean of the diagonal, as the authors' code has it.
DAMPING = 0.01
# Below this part of the second moment a variance is rounding.
DEAD = 1e-12


@dataclass(frozen=True)
class How:
    """How structures are chosen and what becomes of the rest.

    Attributes:
        criterion: "obs", by the loss of outputs with all others refitted; "magnitude", by the norm of the writer's
            columns, nothing refitted.
        bias: whether the writer's bias takes up the mean of what is lost; a writer without one gains one.
        damping: ridge of second moments, relative to the mean of their diagonal.
        swaps: exchanges that may improve each set of heads; greedy sets are not the best ones.
        channel_swaps: the same for the sets of channels that are chosen in the end.
    """

    criterion: str = "obs"
    bias: bool = True
    damping: float = DAMPING
    swaps: int = 64
    channel_swaps: int = 0

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise IsogridError(f"criterion is one of {', '.join(CRITERIA)}, got {self.criterion!r}")
        if not self.damping >= 0 or min(self.swaps, self.channel_swaps) < 0:
            raise IsogridError(
                f"damping and swaps are 0 or more, got damping={self.damping:g}, swaps={self.swaps}, "
                f"channel_swaps={self.channel_swaps}"
            )


@dataclass
class Ordered:
    """One module with the order in which its structures go.

    Attributes:
        module: as it is in the model.
        layer: its writer.
        metric: of the writer's inputs.
        how: see `How`.
        removal: the order.
        total: ``E ||W x||²``: what removing all costs.
    """

    module: Coupled
    layer: nn.Module
    metric: Metric
    how: How
    removal: Removal
    total: float
    _sets: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, module: Coupled, layer: nn.Module, metric: Metric, how: How) -> Ordered:
        """Measure one module.

        Raises:
            IsogridError: NaN or infinite weights; names the layer.
        """
        matrix = linear_matrix(layer)
        if not torch.isfinite(matrix).all():
            raise IsogridError(f"layer {module.writer!r}: its weight has NaN or infinite entries; repair it first")
        hessian = damped(metric, how)
        weight = widened(matrix)
        if how.criterion == "magnitude":
            norms = weight.square().view(weight.shape[0], module.units, module.width).sum((0, 2))
            order = norms.argsort()
            removal = Removal(order, torch.cat([norms.new_zeros(1), norms[order].cumsum(0)]))
            return cls(module, layer, metric, how, removal, float(norms.sum()))
        removal = removal_order(weight, hessian, width=module.width)
        return cls(module, layer, metric, how, removal, float(removal.costs[-1]))

    def kept(self, units: int) -> Tensor:
        """The structures that are kept when so many are, ascending; heads are swapped for better ones."""
        if units not in self._sets:
            kept = self.removal.kept(units)
            if self.how.criterion == "obs" and self.module.kind == "attention" and self.how.swaps:
                kept = self._swapped(kept, self.how.swaps)
            self._sets[units] = kept
        return self._sets[units]

    def error(self, units: int) -> float:
        """What that costs as a part of what removing all costs, 0 to 1: what sizes are chosen by.

        By the criterion's own measure and before channels are swapped; see `output_error` for what comes of it.
        """
        if self.total <= 0:
            return 0.0
        if self.how.criterion == "magnitude" or self.module.kind != "attention" or not self.how.swaps:
            return min(self.removal.cost(units) / self.total, 1.0)
        cost = removal_cost(self._weight(), damped(self.metric, self.how), self.kept(units), width=self.module.width)
        return min(cost / self.total, 1.0)

    def output_error(self, units: int, numbers: tuple[Tensor, Tensor | None]) -> float:
        """Relative squared error of the writer's outputs, of what they vary by where the bias takes up their mean.

        Args:
            units: structures kept.
            numbers: what the writer gets; see `numbers`.
        """
        weight, moment = self._weight(), self.metric.moment
        lost = weight.clone()
        lost[:, self.module.columns(self.kept(units)).to(weight.device)] -= widened(numbers[0])
        moment = moment.to(weight.device)
        least = DEAD * float(((weight @ moment) * weight).sum())
        if numbers[1] is not None and self.metric.mean is not None:
            mean = self.metric.mean.to(weight.device)
            moment = moment - torch.outer(mean, mean)
        size = float(((weight @ moment) * weight).sum())
        return max(float(((lost @ moment) * lost).sum()) / size, 0.0) if size > least else 0.0

    def polish(self, units: int) -> bool:
        """Swap channels of a chosen size for better ones; whether any was."""
        if self.how.criterion != "obs" or self.module.kind != "feed_forward" or not self.how.channel_swaps:
            return False
        before = self.kept(units)
        self._sets[units] = self._swapped(before, self.how.channel_swaps)
        return not torch.equal(self._sets[units], before)

    def numbers(self, units: int) -> tuple[Tensor, Tensor | None]:
        """The writer's ``(out, kept columns)`` matrix in its own dtype, and its bias; None: as it was, or none."""
        matrix, kept = linear_matrix(self.layer), self.kept(units)
        columns = self.module.columns(kept).to(matrix.device)
        if self.how.criterion == "magnitude" or units == self.module.units:
            return matrix[:, columns], None
        weight = widened(matrix)
        found = kept_weights(weight, damped(self.metric, self.how), kept, width=self.module.width)
        bias: Any = self.layer.bias
        if self.how.bias and self.metric.mean is not None:
            mean = self.metric.mean.to(weight.device)
            lost = weight @ mean - found @ mean[columns]
            bias = lost if bias is None else widened(bias.detach()) + lost
            return found.to(matrix), bias.to(matrix)
        return found.to(matrix), None

    def _weight(self) -> Tensor:
        return widened(linear_matrix(self.layer))

    def _swapped(self, kept: Tensor, swaps: int) -> Tensor:
        hessian = damped(self.metric, self.how)
        return swapped(self._weight(), hessian, kept, width=self.module.width, swaps=swaps)


def damped(metric: Metric, how: How) -> Tensor:
    """The second moment of a writer's inputs, about their mean where the bias takes that up, with its ridge."""
    moment = metric.moment
    if how.bias and metric.mean is not None:
        moment = moment - torch.outer(metric.mean, metric.mean)
        # An input that never changes is left with rounding; it is dead then.
        dead = moment.diagonal() <= DEAD * metric.moment.diagonal()
        moment = moment.masked_fill(dead[:, None] | dead[None, :], 0.0)
    size = moment.diagonal().mean()
    ridge = torch.where(moment.diagonal() > 0, how.damping * size, 0.0)
    return moment + torch.diag(ridge)


def order_modules(
    model: nn.Module,
    modules: Mapping[str, Coupled],
    moments: Moments,
    how: How,
    on_module: Callable[[str], None] | None = None,
) -> dict[str, Ordered]:
    """Measure every module.

    Args:
        model: dense; it is left as it is.
        modules: see `find_coupled`.
        moments: of the writers' inputs.
        how: see `How`.
        on_module: called with each name.

    Raises:
        IsogridError: calibration does not reach a module, or its numbers are not finite; names the layer.
    """
    found: dict[str, Ordered] = {}
    for name, module in modules.items():
        if module.writer not in moments.metrics:
            raise IsogridError(f"layer {module.writer!r}: calibration has no rows for it; give text that reaches it")
        layer = model.get_submodule(module.writer)
        found[name] = Ordered.of(module, layer, moments.metrics[module.writer], how)
        if on_module is not None:
            on_module(name)
    return found
