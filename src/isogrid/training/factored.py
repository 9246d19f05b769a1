"""Weight reduction: train a linear layer as its factors, ``W ≈ A diag(C) B``, and merge back.

The product is never formed: ``y = ((x Bᵀ) ∘ C) Aᵀ + b`` costs ``2 r (in + out)`` operations a token. (The source of the
method, Bal, Hariharane, Gobinathan 2025, multiplies ``A diag(C) B`` out in every step and saves nothing.)
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from isogrid.errors import IsogridError
from isogrid.fitting.low_rank import truncated_svd
from isogrid.fitting.ranks import EnergyRank, RankRule, ThresholdRank, as_rank_rule
from isogrid.linear import StructuredLinear, is_linear, linear_matrix


class FactoredLinear(nn.Module):
    """A linear layer held as ``left (out, r)``, ``scale (r,)`` and ``right (r, in)``.

    Args:
        left: A, orthonormal columns at the start.
        scale: C, the singular values at the start.
        right: B, orthonormal rows at the start.
        bias: ``(out,)`` or None.
        kind: the class it is merged into: ``nn.Linear``, or transformers' ``Conv1D``, whose weight is ``(in, out)``.
    """

    def __init__(
        self,
        left: Tensor,
        scale: Tensor,
        right: Tensor,
        bias: Tensor | None = None,
        kind: type[nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.left, self.scale, self.right = nn.Parameter(left), nn.Parameter(scale), nn.Parameter(right)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def in_features(self) -> int:
        """Features of the input."""
        return self.right.shape[1]

    @property
    def out_features(self) -> int:
        """Features of the output."""
        return self.left.shape[0]

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.scale.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``, the thin products first."""
        return functional.linear(functional.linear(x, self.right) * self.scale, self.left, self.bias)

    def dense(self) -> Tensor:
        """``A diag(C) B``, ``(out, in)``."""
        return (self.left * self.scale) @ self.right

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The dense layer of the class it came from, the product as its weight; what was frozen stays so."""
        with torch.device("meta"):
            merged: Any
            if self.kind is nn.Linear:
                merged = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            else:
                merged = self.kind(self.out_features, self.in_features)
        weight = self.dense() if self.kind is nn.Linear else self.dense().mT.contiguous()
        merged.weight = nn.Parameter(weight, requires_grad=self.left.requires_grad)
        if self.bias is not None:
            merged.bias = nn.Parameter(self.bias.clone(), requires_grad=self.bias.requires_grad)
        return merged.train(self.training)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def factorize_trainable(
    model: nn.Module,
    rank: RankRule | int | float,
    *,
    targets: Sequence[str],
    train: Sequence[str] = (),
    freeze: bool = True,
) -> list[str]:
    """Replace linear layers by `FactoredLinear` from the truncated SVD of their weights, in place.

    Args:
        model: changed in place.
        rank: a number, a fraction of the short side, or a rule; `isogrid.optim.ThresholdRank` and `EnergyRank` choose
            each layer's rank from the singular values of its weight (the SVT rank choice).
        targets: patterns of layer names: ``"*.q_lin"``.
        train: patterns of names of other parameters that stay trainable: ``"classifier.*"``, ``"*.q_lin.bias"``.
        freeze: freeze everything but factors and ``train``, the biases of factored layers included, as the source does;
            False leaves every other parameter as it was.

    Returns:
        The names of the replaced layers.

    Raises:
        IsogridError: a pattern matches nothing, a rank is beyond a shape, a weight is shared with another layer, or the
            model is itself the layer. The model is then as it was.
    """
    rule = as_rank_rule(rank)
    found = {name: module for name, module in model.named_modules() if is_linear(module)}
    chosen = {name: found[name] for name in found if any(fnmatch.fnmatch(name, pattern) for pattern in targets)}
    for pattern in targets:
        if not any(fnmatch.fnmatch(name, pattern) for name in found):
            raise IsogridError(f"target {pattern!r} matches no linear layer; names are like {next(iter(found), '')!r}")
    names = [name for name, _ in model.named_parameters()]
    for pattern in train:
        if not any(fnmatch.fnmatch(name, pattern) for name in names):
            raise IsogridError(f"train {pattern!r} matches no parameter; names are like {names[0]!r}")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    made = {}
    for name, layer in chosen.items():
        if not name:
            raise IsogridError(
                "factorize_trainable changes the layers within a model; of a single layer take nn.Sequential(layer)"
            )
        if isinstance(layer, StructuredLinear):
            raise IsogridError(f"layer {name!r} is a StructuredLinear already; leave it out of targets")
        shared = owners[id(layer.weight)]
        if len(shared) > 1:
            raise IsogridError(f"layer {name!r}: its weight is shared ({', '.join(shared)}); leave it out of targets")
        made[name] = factored(layer, rule, name)
    if freeze:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(any(fnmatch.fnmatch(parameter_name, pattern) for pattern in train))
    for name, layer in made.items():
        before: Any = chosen[name]
        layer.train(before.training)
        if layer.bias is not None:
            layer.bias.requires_grad_(before.bias.requires_grad)
        model.set_submodule(name, layer)
    return list(made)


@torch.no_grad()
def factored(layer: nn.Module, rule: RankRule, name: str = "") -> FactoredLinear:
    """The factored form of one layer: best approximation of its weight at the rank that the rule chooses.

    The SVD runs in float64; factors have the layer's dtype.

    Raises:
        IsogridError: the rank is beyond the shape.
    """
    weight = linear_matrix(layer)
    try:
        most = rule.most(*weight.shape)
    except IsogridError as error:
        raise IsogridError(f"layer {name!r}: {error}") from None
    wide = weight.double()
    u, sigma, vh = truncated_svd(wide, most)
    if isinstance(rule, ThresholdRank | EnergyRank):
        kept = rule.choose(sigma, wide.square().sum())
        u, sigma, vh = u[:, :kept], sigma[:kept], vh[:kept]
    bias = getattr(layer, "bias", None)
    return FactoredLinear(
        u.to(weight.dtype).contiguous(),
        sigma.to(weight.dtype),
        vh.to(weight.dtype).contiguous(),
        None if bias is None else bias.detach().clone(),
        nn.Linear if isinstance(layer, nn.Linear) else type(layer),
    )


def factored_layers(model: nn.Module) -> dict[str, FactoredLinear]:
    """All factored layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}


@torch.no_grad()
def truncate_factors(
    model: nn.Module, rank: RankRule | int | float, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, int]:
    """Shrink every factored layer to the best approximation of its product with fewer directions.

    A QR of either side leaves an ``(r, r)`` core, whose SVD is the product's: ``O((m + n) r²)``. Each parameter is
    replaced by a smaller one, in the optimizer's groups too; the source instead writes zeros into the surplus columns,
    which are a dead saddle until stale moments move them again. Moments are coordinates of the old columns: they are
    dropped for what shrinks and begin anew.

    Args:
        model: changed in place.
        rank: the new rank, at most each layer's; a fraction is one of the layer's present rank.
        optimizer: over the model.

    Returns:
        The new rank of each layer.

    Raises:
        IsogridError: a rank beyond a layer's present one, or an optimizer that steps during the backward pass, whose
            hooks belong to the old parameters. Nothing was changed.
    """
    rule = as_rank_rule(rank)
    if getattr(optimizer, "in_backward", False):
        raise IsogridError("truncate_factors: the optimizer steps during the backward pass; make it anew afterwards")
    layers = factored_layers(model)
    for name, layer in layers.items():
        try:
            rule.most(layer.rank, layer.rank)
        except IsogridError as error:
            raise IsogridError(f"layer {name!r}: {error}") from None
    ranks = {}
    for name, layer in layers.items():
        most = rule.most(layer.rank, layer.rank)
        q_left, r_left = torch.linalg.qr((layer.left * layer.scale).double())
        q_right, r_right = torch.linalg.qr(layer.right.double().mT)
        u, sigma, vh = torch.linalg.svd(r_left @ r_right.mT)
        if isinstance(rule, ThresholdRank | EnergyRank):
            most = rule.choose(sigma[:most], sigma.square().sum())
        ranks[name] = most
        fresh = {"left": q_left @ u[:, :most], "scale": sigma[:most], "right": vh[:most] @ q_right.mT}
        for key, values in fresh.items():
            old = getattr(layer, key)
            # A new parameter: a graph that is still alive holds the old one's shape.
            new = nn.Parameter(values.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
            setattr(layer, key, new)
            if optimizer is not None:
                optimizer.state.pop(old, None)
                for group in optimizer.param_groups:
                    group["params"] = [new if held is old else held for held in group["params"]]
    return ranks


def merge_factors(model: nn.Module) -> list[str]:
    """Turn every factored layer back into the dense layer that it came from, with the product as its weight, in place.

    Returns:
        The names of the merged layers.
    """
    layers = factored_layers(model)
    for name, layer in layers.items():
        model.set_submodule(name, layer.merge())
    return list(layers)


def factored_flops(layers: Iterable[FactoredLinear], tokens: int) -> int:
    """Multiplications and additions of one forward pass: ``tokens · (2 r (in + out) + r)`` a layer."""
    return sum(tokens * layer.rank * (2 * (layer.in_features + layer.out_features) + 1) for layer in layers)


def trainable(model: nn.Module) -> list[tuple[str, Any]]:
    """Named parameters that train: what an optimizer is to be given."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def break_even_rank(in_features: int, out_features: int) -> int:
    """The largest rank at which factors hold fewer numbers than the matrix."""
    return max(0, math.ceil(in_features * out_features / (in_features + out_features + 1)) - 1)
