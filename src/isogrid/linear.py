"""The layer that holds one matrix in one format."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import IsogridError
from isogrid.fitting import widened
from isogrid.formats import Cost, Format, as_format, check_factors, new_factors

# Reading these of a dense view costs nothing; everything else needs the numbers.
_METADATA: frozenset[Any] = frozenset(
    {
        *(vars(torch._C.TensorBase)[name].__get__ for name in ("dtype", "device", "shape", "ndim", "layout")),
        *(vars(torch._C.TensorBase)[name].__get__ for name in ("is_cuda", "is_meta")),
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.element_size,
        torch.Tensor.is_floating_point,
    }
)


class DenseView(torch.Tensor):
    """A layer's dense ``(out, in)`` matrix that is computed when its numbers are first used.

    Libraries read ``layer.weight.dtype`` or ``.device`` on every forward pass (T5, PEFT); that must cost nothing. Any
    other use multiplies the factors out, under autograd where they require it.
    """

    _materialize: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, layer: StructuredLinear) -> DenseView:
        """A view that has the layer's sizes, dtype and device, and no storage."""
        like = layer.floating_factor()
        view = torch.Tensor._make_wrapper_subclass(
            cls, (layer.out_features, layer.in_features), dtype=like.dtype, device=like.device
        )
        view._materialize = layer.dense
        return view

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Metadata from the view itself, everything else from the dense matrix."""
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        # transformers initialises whatever has a weight: that must reach neither a factor nor the kept matrix.
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        args, kwargs = torch.utils._pytree.tree_map_only(
            DenseView,
            lambda view: view._materialize().clone() if writes else view._materialize(),
            (args, kwargs or {}),
        )
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Reached by code that bypasses ``__torch_function__``."""
        args, kwargs = torch.utils._pytree.tree_map_only(
            DenseView, lambda view: view._materialize(), (args, kwargs or {})
        )
        return func(*args, **kwargs)


class _Snapshot:
    """Which tensors the factors were, and in which state.

    Weak references, since an id is used again when its tensor is gone; the storage's address beside the version, since
    ``parameter.data = …`` changes the one and not the other.
    """

    def __init__(self, factors: Mapping[str, Tensor]) -> None:
        self.seen = [(weakref.ref(value), self._state(value)) for value in factors.values()]

    @staticmethod
    def _state(value: Tensor) -> tuple[int, int]:
        local = value.to_local() if hasattr(value, "to_local") else value
        return value._version, local.data_ptr()

    def is_current(self, factors: Mapping[str, Tensor]) -> bool:
        """Whether these are the same tensors, unchanged."""
        return all(
            reference() is value and state == self._state(value)
            for (reference, state), value in zip(self.seen, factors.values(), strict=True)
        )


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
        self._cached_dense: tuple[_Snapshot, Tensor] | None = None
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
        return {name: getattr(self, name) for name in self._factor_names}

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
        y = self.format.multiply(self.factors, x, self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense(self) -> Tensor:
        """The ``(out, in)`` matrix, differentiable in the factors; gathers sharded factors first."""
        factors = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in self.factors.items()
        }
        if torch.is_grad_enabled() and any(value.requires_grad for value in factors.values()):
            return self.format.dense(factors, self.out_features, self.in_features)
        if self.training or torch.compiler.is_compiling():
            return self.format.dense(factors, self.out_features, self.in_features)
        if torch.is_inference_mode_enabled():  # autograd can't use afterwards what is computed here
            return self.format.dense(factors, self.out_features, self.in_features)
        if self._cached_dense is None or not self._cached_dense[0].is_current(self.factors):
            dense = self.format.dense(factors, self.out_features, self.in_features).detach()
            self._cached_dense = _Snapshot(self.factors), dense
        return self._cached_dense[1]

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
        """Bytes held now, by what holds them: factors, bias, the cached dense view."""
        cached = 0 if self._cached_dense is None else self._cached_dense[1].nbytes
        return {
            "factors": sum(value.nbytes for value in self.factors.values()),
            "bias": 0 if self.bias is None else self.bias.nbytes,
            "dense view": cached,
        }

    def train(self, mode: bool = True) -> StructuredLinear:
        """Training drops the cached dense view: it would be stale after every step."""
        if mode:
            self._cached_dense = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StructuredLinear:
        self._cached_dense = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached_dense": None}

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


def convert(
    layer: StructuredLinear, to: Format | str | Mapping[str, Any], *, tolerance: float | None = None, **options: Any
) -> tuple[StructuredLinear, float]:
    """The same layer in another format, and the relative error of its matrix.

    Args:
        layer: the layer; it is not changed.
        to: the target format. Where an exact way is known (`Format.rewritten`: Monarch as a Block Tensor-Train, a
            square circulant as a product of permuted Monarchs), it is taken, and nothing is fitted. Else, where the
            size is open (``LowRankLight()``, ``Permuted(Monarch(8))``), the smallest member within the tolerance is
            found: low rank becomes Low-Rank Light of the same rank, BlockDense low rank of its rank, and so on.
        tolerance: relative Frobenius error allowed in that search; None: 1e-12 for float64 layers, else 1e-6.
        options: of the target format's fit; with any, the matrix is fitted also where an exact way is known.

    Returns:
        (layer in the layer's dtype and on its device, error measured in float64 before rounding to that dtype).

    Raises:
        IsogridError: no member of the format comes within the tolerance; the message says how near the largest does.
    """
    fmt = as_format(to)
    like = layer.floating_factor()
    wide = {name: widened(value) if value.is_floating_point() else value for name, value in layer.factors.items()}
    sizes = layer.out_features, layer.in_features
    with torch.no_grad():
        matrix = layer.format.dense(wide, *sizes).detach()
    norm = matrix.norm().clamp(min=torch.finfo(matrix.dtype).tiny)

    def fit(member: Format) -> tuple[dict[str, Tensor], float]:
        factors = member.fit(matrix, **options)
        return factors, float((matrix - member.dense(factors, *sizes)).norm() / norm)

    with torch.no_grad():
        exact = None if options else layer.format.rewritten(fmt, wide, *sizes)
    sizable = _sizable(fmt)
    if exact is not None:
        fmt, factors = exact
        error = float((matrix - fmt.dense(factors, *sizes)).norm() / norm)
    elif sizable is None or _fixed_size(sizable):
        factors, error = fit(fmt)
    else:
        allowed = tolerance if tolerance is not None else 1e-12 if like.dtype == torch.float64 else 1e-6
        low, high = 1, max(sizable.size_limit(*sizes), 1)
        fmt_high = _with_size(fmt, high)
        factors, error = fit(fmt_high)
        if error > allowed:
            raise IsogridError(
                f"{fmt.label()}: no {sizes[0]} x {sizes[1]} member comes within {allowed:g} of {layer.format.label()}; "
                f"the largest, {fmt_high.label()}, has relative error {error:.3g}"
            )
        best = fmt_high
        while low < high:
            middle = (low + high) // 2
            member = _with_size(fmt, middle)
            found, reached = fit(member)
            if reached <= allowed:
                high, best, factors, error = middle, member, found, reached
            else:
                low = middle + 1
        fmt = best
    specs = fmt.factors(*sizes)
    stored = {name: value.to(like.device, specs[name].dtype or like.dtype) for name, value in factors.items()}
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return StructuredLinear.from_factors(fmt, stored, *sizes, bias=bias).train(layer.training), error


def _sizable(fmt: Format) -> Format | None:
    """The format whose size a search moves: the format, or the one that it only wraps (Permuted, Capped); or None."""
    if fmt.size_field is not None:
        return fmt
    inner = getattr(fmt, "inner", None)
    return _sizable(inner) if isinstance(inner, Format) else None


def _with_size(fmt: Format, size: int) -> Format:
    """The member of another size, within what it is wrapped in."""
    if fmt.size_field is not None:
        return fmt.with_size(size)
    inner = getattr(fmt, "inner", None)
    assert isinstance(inner, Format)
    changes: dict[str, Any] = {"inner": _with_size(inner, size)}
    return dataclasses.replace(fmt, **changes)


def _fixed_size(fmt: Format) -> bool:
    """Whether a format's size was chosen by hand: then it is kept."""
    assert fmt.size_field is not None
    default = next(field.default for field in dataclasses.fields(fmt) if field.name == fmt.size_field)
    return bool(getattr(fmt, fmt.size_field) != default)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an ``nn.Linear`` or a transformers ``Conv1D`` (a linear layer with W transposed)."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    # By name: importing transformers to compare classes would cost every user seconds.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def linear_matrix(module: nn.Module) -> Tensor:
    """The detached ``(out, in)`` matrix of an ``nn.Linear`` or ``Conv1D``.

    Raises:
        IsogridError: the module is neither.
    """
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    if _is_conv1d(module):
        return module.weight.detach().mT  # type: ignore[operator]
    raise IsogridError(f"expected nn.Linear or transformers' Conv1D, got {type(module).__name__}")
