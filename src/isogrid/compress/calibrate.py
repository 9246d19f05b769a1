"""What a model's layers see: second moments of their inputs on calibration data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.compress.batches import as_batches, with_decoder
from isogrid.compress.frugal import frugal_memory
from isogrid.errors import IsogridError
from isogrid.fitting import Metric, widened

# What models raise on input they can't take; errors of other classes are the model's own and pass through.
BAD_INPUT = (TypeError, ValueError, IndexError, AttributeError, KeyError, RuntimeError)


@dataclass
class MomentSum:
    """Running sums of one input about a fixed point: float32 products, float64 sums.

    The point is the mean of the first rows. Products of the inputs themselves would bury the variance of an input
    whose mean is large (the massive activations of language models) under the rounding of its square.
    """

    product: Tensor | None = None  # Σ (x - point)(x - point)ᵀ
    total: Tensor | None = None  # Σ (x - point)
    point: Tensor | None = None
    rows: int = 0

    def add(self, rows: Tensor) -> None:
        """Add rows ``(rows, n)``."""
        if rows.shape[0] == 0:
            return
        rows = rows.detach().to(torch.float32)
        if self.point is None:
            self.point = rows.mean(0)
        rows = rows - self.point
        product, total = widened(rows.mT @ rows), widened(rows.sum(0))
        if self.product is None or self.total is None:
            self.product, self.total = product, total
        else:
            self.product += product
            self.total += total
        self.rows += rows.shape[0]

    def merge(self, other: MomentSum) -> None:
        """Add another sum."""
        if other.product is None or other.total is None or other.point is None:
            return
        if self.product is None or self.total is None or self.point is None:
            self.product, self.total, self.point = other.product.clone(), other.total.clone(), other.point
        else:
            step = widened(other.point) - widened(self.point)
            self.product += _moved(other.product, other.total, step, other.rows)
            self.total += other.total + other.rows * step
        self.rows += other.rows

    def metric(self, layer: str) -> Metric:
        """The moment as a metric.

        Raises:
            IsogridError: no rows, or NaN or infinite inputs; names the layer.
        """
        if self.product is None or self.total is None or self.point is None:
            raise IsogridError(f"layer {layer!r}: calibration has no rows for it; give text that reaches it or skip it")
        if not (torch.isfinite(self.product).all() and torch.isfinite(self.total).all()):
            raise IsogridError(
                f"layer {layer!r}: its calibration inputs are NaN, infinite or overflow float32 when squared; "
                "run the model in float32 or bfloat16 and check the calibration data"
            )
        point = widened(self.point)
        product = _moved(self.product, self.total, point, self.rows)
        return Metric(product / self.rows, mean=point + self.total / self.rows, rows=self.rows)


def _moved(product: Tensor, total: Tensor, step: Tensor, rows: int) -> Tensor:
    """``Σ (d + step)(d + step)ᵀ`` from ``Σ d dᵀ`` and ``Σ d``."""
    cross = torch.outer(total, step)
    return product + cross + cross.mT + rows * torch.outer(step, step)


@dataclass
class Moments:
    """Metrics of a model's layers, measured once; several compressions of the same model may share them.

    Attributes:
        metrics: by layer name; layers with the same input hold the same `Metric`.
        rows: calibration rows that went through the model, padding left out.
        source: what the rows came from, in words.
    """

    metrics: dict[str, Metric] = field(default_factory=dict)
    rows: int = 0
    source: str = "moments of the dense model"


def forward_calls(model: nn.Module, batches: Sequence[Any], **options: Any) -> list[Callable[[], Any]]:
    """One callable per batch that runs the model on it, on the model's device, with further options of its forward."""
    device = next((value.device for value in model.parameters()), torch.device("cpu"))

    # Keys and values of every layer, kept for a generation that never comes, would outweigh everything else.
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    extra |= options

    def call(index: int, batch: Any) -> Callable[[], Any]:
        batch = with_decoder(model, batch)

        def forward() -> Any:
            if isinstance(batch, Mapping):
                return model(**extra | {key: _to(value, device) for key, value in batch.items()})
            if isinstance(batch, tuple | list):
                return model(*(_to(value, device) for value in batch), **extra)
            return model(_to(batch, device), **extra)

        def run() -> Any:
            try:
                return forward()
            except Exception as error:
                if type(error) not in BAD_INPUT:
                    raise
                raise IsogridError(
                    f"calibration batch {index} ({_form(batch)}) does not go through {type(model).__name__}: {error}; "
                    "batches are dicts of forward's keyword arguments, tensors, or tuples of positional arguments"
                ) from error

        return run

    return [call(index, batch) for index, batch in enumerate(batches)]


def _form(value: Any) -> str:
    """What a batch is made of, in few words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "dict of " + ", ".join(f"{key}: {_form(item)}" for key, item in value.items())
    if isinstance(value, tuple | list):
        kind = type(value).__name__
        return f"{kind} of {', '.join(_form(item) for item in value[:3])}{', …' if len(value) > 3 else ''}"
    return type(value).__name__


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def real_rows(x: Tensor, batch: Any) -> Tensor:
    """Rows ``(rows, n)`` of a layer's input, without those of padding tokens.

    A row is padding where the batch's ``attention_mask`` (or ``decoder_attention_mask``) of the same leading sizes, or
    the same number of rows, is zero.
    """
    flat = x.reshape(-1, x.shape[-1])
    if not isinstance(batch, Mapping):
        return flat
    _check_masks(batch)
    for key in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == x.shape[:-1]:
            return flat[mask.reshape(-1).to(flat.device) != 0]
    for key in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.ndim == 2 and x.ndim == 2 and mask.numel() == flat.shape[0]:
            return flat[mask.reshape(-1).to(flat.device) != 0]
    return flat


def _check_masks(batch: Mapping[str, Any]) -> None:
    """Raise IsogridError where the sizes of a batch don't tell whose padding a row could be."""
    mask, decoder = batch.get("attention_mask"), batch.get("decoder_attention_mask")
    tokens = batch.get("decoder_input_ids", decoder)
    if not isinstance(mask, Tensor) or not isinstance(tokens, Tensor) or mask.shape != tokens.shape:
        return
    other = decoder if isinstance(decoder, Tensor) else torch.ones_like(mask)
    if not torch.equal(mask != 0, other != 0):
        raise IsogridError(
            f"a calibration batch has encoder and decoder inputs of one length, {mask.shape[1]}, with different "
            "padding: their rows can't be told apart; pad one of them by one token more"
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, each as it was afterwards; a module that took another's place, as that was.

    PyTorch's own attention and transformer layers have a fast path that reads weights and calls no layer; it is off.
    """
    modes = {name: (module, module.training) for name, module in model.named_modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.values():
            module.training = mode
        for name, (_, mode) in modes.items():
            with suppress(AttributeError):  # a parametrization goes with its layer
                model.get_submodule(name).training = mode


def collect_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    calibration: Any,
    *,
    tokenizer: Any = None,
    length: int = 512,
    on_batch: Callable[[int, int], None] | None = None,
) -> Moments:
    """Second moments of the inputs of layers, measured in one pass over a model that is not changed.

    Args:
        model: the model; it runs in eval mode and is left in the mode it was in.
        layers: name to module, as `select_layers` returns them.
        calibration: see `as_batches`.
        tokenizer: for texts.
        length: window length for texts.
        on_batch: called with (batches done, batches).

    Raises:
        IsogridError: no rows, or NaN or infinite inputs; names the layer.
    """
    batches = as_batches(calibration, tokenizer, length, model=model)
    # By the layers that shared the inputs. One key for q, k and v; more where batches take different ways.
    sums: dict[tuple[str, ...], MomentSum] = {}
    last: tuple[Tensor, int] | None = None
    sharing: list[str] = []  # the layers that have seen `last` so far
    piece = MomentSum()
    batch: Any = None
    called: list[str] = []
    usual: list[str] = []  # the calls of the first batch

    class Enough(BaseException):
        """Every selected layer has seen this batch."""

    def close() -> None:
        nonlocal last, piece
        if sharing:
            sums.setdefault(tuple(sharing), MomentSum()).merge(piece)
        last, piece = None, MomentSum()
        sharing.clear()

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal last
            x = args[0] if args else next(iter(kwargs.values()))
            if last is None or last[0] is not x or last[1] != x._version or name in sharing:
                close()
                piece.add(real_rows(x, batch))
                last = (x, x._version)
            sharing.append(name)
            called.append(name)
            # A batch may be cut short only where nothing can follow: all layers seen, in the usual order.
            if called == usual and len(set(usual)) == len(layers):
                raise Enough

        return hook

    handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in layers.items()]
    try:
        with frugal_memory(), torch.no_grad(), evaluation_mode(model):
            for done, run in enumerate(forward_calls(model, batches)):
                batch = batches[done]
                called.clear()
                with suppress(Enough):
                    run()
                close()
                usual = usual or list(called)
                if on_batch is not None:
                    on_batch(done + 1, len(batches))
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise IsogridError(f"calibration reaches none of the {len(layers)} selected layers; check its form")
    metrics: dict[tuple[tuple[str, ...], ...], Metric] = {}
    found: dict[str, Metric] = {}
    for name in layers:
        keys = tuple(key for key in sums if name in key)
        if not keys:
            continue
        if keys not in metrics:
            total = MomentSum()
            for key in keys:
                total.merge(sums[key])
            metrics[keys] = total.metric(name)
        found[name] = metrics[keys]
        for key in keys:  # sums weigh as much as the metrics they become
            if all(one in found for one in key):
                del sums[key]
    return Moments(found, rows=max(metric.rows or 0 for metric in found.values()))
