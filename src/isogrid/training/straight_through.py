"""Fine-tuning towards a format: the model computes with the factors, and a dense matrix behind them is trained.

The straight-through factorizer of DSFormer (Chand et al. 2023), for any format whose fit improves a start: in every
step the factors are fitted anew to a latent matrix, from where they stood; the gradient with respect to their product
is taken for that of the latent matrix; and the latent matrix is pulled a little towards the product, without which what
the format cannot see of it drifts away. At the end the factors alone are tuned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from isogrid.errors import IsogridError
from isogrid.fitting import Metric
from isogrid.formats import Factors, Format, as_format
from isogrid.linear import StructuredLinear, is_linear, linear_matrix

PULL = 0.02


class StraightThroughLinear(nn.Module):
    """A linear layer whose latent ``weight (out, in)`` is trained and whose factors compute.

    Args:
        weight: ``(out, in)``, where training begins.
        bias: ``(out,)`` or None.
        format: of the factors, with its size.
        metric: of the inputs; None is the identity.
        options: of every refit.
        start: factors to begin with; None: the format's own fit.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        format: Format,
        *,
        metric: Metric | None = None,
        options: Mapping[str, Any] | None = None,
        start: Factors | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.format, self.metric, self.options = format, metric, dict(options or {})
        self.factors: Factors = format.fit(self.weight, metric) if start is None else dict(start)
        self.register_buffer("product", format.dense(self.factors, *weight.shape).detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)`` with the factors' product; its gradient goes to the latent matrix."""
        product: Tensor = self.product
        return functional.linear(x, product.to(self.weight) + (self.weight - self.weight.detach()), self.bias)

    @torch.no_grad()
    def refresh(self, pull: float = PULL) -> None:
        """Fit the factors anew to the latent matrix, from where they stand, and pull it towards their product.

        Args:
            pull: from 0, the latent matrix is left alone, to 1, it becomes the product.
        """
        self.factors = self.format.fit(self.weight, self.metric, start=self.factors, **self.options)
        self.product = self.format.dense(self.factors, *self.weight.shape).detach()
        self.weight.lerp_(self.product.to(self.weight), pull)

    def settled(self) -> StructuredLinear:
        """The layer of the factors alone, which computes the same."""
        bias = None if self.bias is None else self.bias.detach().clone()
        factors = {name: value.contiguous() for name, value in self.factors.items()}
        return StructuredLinear.from_factors(self.format, factors, *self.weight.shape, bias=bias).train(self.training)


def straight_through(
    model: nn.Module,
    format: Format | str | Mapping[str, Any],
    layers: Mapping[str, Metric | None],
    *,
    start: Mapping[str, Factors] | None = None,
    **options: Any,
) -> list[str]:
    """Replace linear layers by `StraightThroughLinear`, in place.

    Args:
        model: changed in place.
        format: of the factors, its size chosen.
        layers: name to the metric of its inputs, or None.
        start: factors to begin with, by name; of layers without, the format's own fit.
        options: of every refit; a single round or sweep serves, since the latent matrix moves little.

    Returns:
        The names.

    Raises:
        IsogridError: a name is no linear layer of the model, its weight is shared, or the format doesn't suit it;
            nothing is changed then.
    """
    chosen = as_format(format)
    known = dict(model.named_modules())
    owners: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(parameter_name)
    made: dict[str, StraightThroughLinear] = {}
    for name, metric in layers.items():
        module = known.get(name)
        if module is None or not is_linear(module):
            raise IsogridError(f"layer {name!r}: the model has no linear layer of this name")
        if len(shared := owners[id(module.weight)]) > 1:
            raise IsogridError(f"layer {name!r}: its weight is shared ({', '.join(shared)}); leave it out")
        bias: Tensor | None = module.bias
        try:
            made[name] = StraightThroughLinear(
                linear_matrix(module), bias, chosen, metric=metric, options=options, start=(start or {}).get(name)
            )
        except IsogridError as error:
            raise IsogridError(f"layer {name!r}: {error}") from error
        made[name].train(module.training)
    for name, layer in made.items():
        model.set_submodule(name, layer)
    return list(made)


def refresh_factors(model: nn.Module, pull: float = PULL) -> None:
    """`StraightThroughLinear.refresh` of all such layers: to be called after each step of the optimizer.

    Raises:
        IsogridError: pull is not in [0, 1], or the model has no such layer.
    """
    if not 0 <= pull <= 1:
        raise IsogridError(f"pull is between 0 and 1, got {pull}")
    for _, layer in _layers_of(model):
        layer.refresh(pull)


def settle_factors(model: nn.Module) -> list[str]:
    """Replace all such layers by those of their factors alone, in place; the model computes the same.

    Returns:
        The names. Tune the factors of these layers at the end: a tenth of the steps or more.
    """
    found = list(_layers_of(model))
    for name, layer in found:
        model.set_submodule(name, layer.settled())
    return [name for name, _ in found]


def _layers_of(model: nn.Module) -> Iterator[tuple[str, StraightThroughLinear]]:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, StraightThroughLinear)]
    if not found:
        raise IsogridError("the model has no straight-through layer; make some with `straight_through`")
    yield from found
