"""The layer that holds one matrix in one format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import IsogridError
from isogrid.formats import Cost, Format, as_format, check_factors, new_factors
from isogrid.kernels import derived_bytes, forget
from isogrid.kernels.native import PLAIN
from isogrid.linear.dense_layers import linear_matrix
from isogrid.linear.dense_view import DenseView, Snapshot
from isogrid.linear.speed import LEAST_SAVING, keeps_its_codes, prefers_dense, speed_table

# Numbers of rows that a layer remembers its plans for.
MOST_PLANS = 4096


class StructuredLinear(nn.Module):
    """``y = x Wᵀ + b`` with W held in a format: drop-in for ``nn.Linear``.

    Args:
        in_features: inputs n.
        out_features: outputs m.
        format: a `Format`, its name (``"monarch(blocks=8)"``) or its description.
        bias: whether to add a bias ``(out,)``.
        device: where the factors live.
        dtype: floating dtype of the factors.
        generator: source of the random start; None takes torch's global generator.
        init: "default", the format's start; or "orthonormal", that start with all singular values of every block set
            to one (`Format.orthonormalize`), which structured feedforward layers train better from (Wei et al. 2024).

    The factors are ordinary parameters (weights, gains, structure) and buffers (indices, codes) of the module, under
    the names the format gives them: optimizers, ``state_dict``, DDP and FSDP see nothing special.

    Raises:
        IsogridError: the format doesn't suit the sizes, has no such start, or ``init`` is neither.
    """

    bias: nn.Parameter | None
    init: str = "default"
    product: str = "auto"
    """How inference multiplies: "structured" by the factors, "dense" by the matrix, kept in memory; "auto": `plan`."""
    small_memory: bool = False
    """Whether nothing may be kept beside the factors, at whatever cost in time; see `set_memory`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: Format | str | Mapping[str, Any],
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        init: str = "default",
    ) -> None:
        super().__init__()
        self.init = init  # kept for `reset_parameters`, which is called again on layers built on the meta device
        self._attach(
            in_features,
            out_features,
            as_format(format),
            new_factors(
                as_format(format),
                out_features,
                in_features,
                dtype=dtype or torch.get_default_dtype(),
                device=device,
            ),
            torch.empty(out_features, dtype=dtype, device=device) if bias else None,
        )
        if not self.floating_factor().is_meta:
            self.reset_parameters(generator)

    def _attach(
        self,
        in_features: int,
        out_features: int,
        format: Format,
        factors: Mapping[str, Tensor],
        bias: Tensor | None,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.format = format
        self._cached_dense: tuple[Snapshot, Tensor, int] | None = None
        self._plans: dict[tuple[int, str, int], str] = {}
        specs = format.factors(out_features, in_features)
        self._factor_names = tuple(specs)
        for name, spec in specs.items():
            if name in ("weight", "bias") or hasattr(self, name):
                raise IsogridError(f"{format.name}: a factor can't be called {name!r}, the layer uses that name")
            if spec.trainable:
                self.register_parameter(name, nn.Parameter(factors[name]))
            else:
                self.register_buffer(name, factors[name])
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    @classmethod
    def from_factors(
        cls,
        format: Format,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        *,
        bias: Tensor | None = None,
    ) -> StructuredLinear:
        """A layer around given factors; nothing is copied.

        Raises:
            IsogridError: names or shapes are not the format's.
        """
        check_factors(format, factors, out_features, in_features)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._attach(in_features, out_features, format, factors, bias)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        format: Format | str | Mapping[str, Any],
        *,
        metric: Any = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> StructuredLinear:
        """The layer nearest to an ``nn.Linear`` or a transformers ``Conv1D``: its matrix fitted, its bias copied.

        Args:
            linear: the trained layer; it is not changed.
            format: target format.
            metric: `Metric` of the inputs; None fits the matrix itself.
            generator: randomness of the fit.
            options: the format's solver options.

        Raises:
            IsogridError: not a linear layer, or a weight that can't be fitted.
        """
        fmt = as_format(format)
        matrix = linear_matrix(linear)
        factors = fmt.fit(matrix, metric, generator=generator, **options)
        bias = getattr(linear, "bias", None)
        layer = cls.from_factors(fmt, factors, *matrix.shape, bias=None if bias is None else bias.detach().clone())
        return layer.train(linear.training)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The start for training from scratch that the layer's ``init`` names; bias zero."""
        if self.init not in ("default", "orthonormal"):
            raise IsogridError(f"{self.format.name} layer: init is 'default' or 'orthonormal', got {self.init!r}")
        self.format.initialize(self.factors, self.out_features, self.in_features, generator)
        if self.init == "orthonormal":
            self.format.orthonormalize(self.factors, self.out_features, self.in_features)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def factors(self) -> dict[str, Tensor]:
        """The live factor tensors by name."""
        # Past `nn.Module.__getattr__`, which costs more than a small product; where a parametrization or a wrapper has
        # put something else in a parameter's place, through it.
        parameters = self._parameters
        found: dict[str, Tensor] = {}
        for name in self._factor_names:
            value = parameters.get(name)
            found[name] = getattr(self, name) if value is None else value
        return found

    def floating_factor(self) -> Tensor:
        """A factor that carries the layer's dtype and device."""
        return next(value for value in self.factors.values() if value.is_floating_point())

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``.

        Raises:
            IsogridError: another number of features, or an integer input.
        """
        if x.shape[-1:] != (self.in_features,):
            raise IsogridError(
                f"{self.format.name} layer takes (..., {self.in_features}), got {tuple(x.shape)}; check what feeds it"
            )
        if not (x.is_floating_point() or x.is_complex()):
            raise IsogridError(f"{self.format.name} layer multiplies floating input, got {x.dtype}; embed or cast it")
        if not self.training and self._multiplies_densely(x):
            kept = self._kept_dense()
            return torch.nn.functional.linear(x, self.dense() if kept is None else kept, self.bias)
        y = self.format.affine(self.factors, x, self.out_features, self.bias)
        if self.small_memory and not torch.compiler.is_compiling():
            self.let_go()
        return y

    def plan(self, rows: int) -> str:
        """How inference multiplies so many rows: "structured" or "dense", by measured times where there are any.

        The dense product keeps the whole matrix in memory (see `memory`). ``layer.product = "structured"`` rules it
        out, "dense" rules it in; with ``small_memory`` it is out whatever else is said. A layer of codes is never
        multiplied densely unasked: its memory is what it is for.
        """
        if self.product not in ("auto", "structured", "dense"):
            raise IsogridError(f"product is 'auto', 'structured' or 'dense', got {self.product!r}")
        if self.small_memory:
            return "structured"
        if self.product != "auto":
            return self.product
        like = self.floating_factor()
        if like.device.type != "cpu" or keeps_its_codes(self.format, self.out_features, self.in_features):
            return "structured"
        times = speed_table().times(
            self.format.label(), self.out_features, self.in_features, like.dtype, rows, bias=self.bias is not None
        )
        if times is not None:
            return "dense" if prefers_dense(times) else "structured"
        whole = self.out_features * self.in_features
        return "dense" if whole < LEAST_SAVING * self.cost().multiply_adds else "structured"

    def replan(self) -> None:
        """Look the times up again: they have been measured anew."""
        self._plans = {}

    def _multiplies_densely(self, x: Tensor) -> bool:
        # Every call comes through here: plans are looked up once, and what rules a dense product out is asked last.
        if self.product == "structured" or self.small_memory or torch.compiler.is_compiling():
            return False
        key = (x.numel() // self.in_features, self.product, torch.get_num_threads())
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans = {}
            plan = self._plans[key] = self.plan(key[0])
        if plan == "structured":
            return False
        tensors = self.factors.values()
        if torch.is_grad_enabled() and (x.requires_grad or any(value.requires_grad for value in tensors)):
            return False
        like = self.floating_factor()
        if x.dtype != like.dtype or torch._C._are_functorch_transforms_active():
            return False
        return type(like) in PLAIN and not like.is_inference()

    def _kept_dense(self) -> Tensor | None:
        """The kept matrix where it is current: no factor was changed, and nobody has written into the matrix."""
        kept = self._cached_dense
        if kept is None or not kept[0].is_current(self.factors) or kept[1]._version != kept[2]:
            return None
        return kept[1]

    def dense(self) -> Tensor:
        """The ``(out, in)`` matrix, differentiable in the factors; gathers sharded factors first."""
        factors = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in self.factors.items()
        }
        differentiates = torch.is_grad_enabled() and any(value.requires_grad for value in factors.values())
        if differentiates or self.training or torch.compiler.is_compiling():
            return self.format.dense(factors, self.out_features, self.in_features)
        if any(value.is_inference() for value in factors.values()):  # they don't tell when they change
            return self.format.dense(factors, self.out_features, self.in_features)
        kept = self._kept_dense()
        if kept is not None:
            return kept
        # Outside of inference mode: autograd may use afterwards what is computed here.
        with torch.inference_mode(False), torch.no_grad():
            # In the order of nn.Linear's weight: products by a transposed one are up to a tenth slower.
            dense = self.format.dense(factors, self.out_features, self.in_features).detach().contiguous()
        if self.small_memory:
            self.let_go()
        else:
            self._cached_dense = Snapshot(self.factors), dense, dense._version
        return dense

    @property
    def weight(self) -> Tensor:
        """The dense ``(out, in)`` view: computed when its numbers are used, kept in eval mode until a factor changes.

        It is a view to read: writing into it changes no factor.
        """
        return self.dense() if torch.compiler.is_compiling() else DenseView(self)

    def merge(self) -> nn.Linear:
        """The dense ``nn.Linear`` that computes the same, in the layer's dtype and on its device."""
        like = self.floating_factor()
        merged = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta", dtype=like.dtype
        )
        merged.weight = nn.Parameter(self.dense().detach().clone(memory_format=torch.contiguous_format))
        if self.bias is not None:
            merged.bias = nn.Parameter(self.bias.detach().clone())
        return merged.train(self.training)

    def cost(self) -> Cost:
        """Parameters, multiply-adds per row and bits of the matrix; the bias is not counted."""
        return self.format.cost(self.out_features, self.in_features, self.floating_factor().dtype)

    def memory(self) -> dict[str, int]:
        """Bytes held now, by what holds them: factors, bias, the cached dense view, factors in a product's order."""
        cached = 0 if self._cached_dense is None else self._cached_dense[1].nbytes
        return {
            "factors": sum(value.nbytes for value in self.factors.values()),
            "bias": 0 if self.bias is None else self.bias.nbytes,
            "dense view": cached,
            "derived": sum(derived_bytes(value) for value in self.factors.values()),
        }

    def train(self, mode: bool = True) -> StructuredLinear:
        """Training drops what is kept beside the factors: it would be stale after every step."""
        if mode:
            self.let_go()
        return super().train(mode)

    def let_go(self) -> None:
        """Drop what is kept beside the factors; it is made again when it is needed."""
        self._cached_dense = None
        for value in self.factors.values():
            forget(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StructuredLinear:
        self._cached_dense, self._plans = None, {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached_dense": None, "_plans": {}}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Checkpoints carry an empty tensor under this name, so that readers without Isogrid fail instead of
        # starting from random numbers. It holds nothing.
        mark = state_dict.get(prefix + "weight")
        if mark is not None and mark.numel() == 0:
            state_dict = {key: value for key, value in state_dict.items() if key != prefix + "weight"}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Sizes, format and bias."""
        return f"{self.in_features}, {self.out_features}, {self.format.label()}, bias={self.bias is not None}"
