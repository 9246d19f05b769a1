"""What a model's layers see: second moments of their inputs on calibration data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import IsogridError
from isogrid.fitting import Metric

# Rows of one batch of token windows: enough to keep the products busy, few enough for the activations.
ROWS_PER_BATCH = 2048


@dataclass
class MomentSum:
    """Running sums of one input: float32 products, float64 sums."""

    product: Tensor | None = None
    total: Tensor | None = None
    rows: int = 0

    def add(self, rows: Tensor) -> None:
        """Add rows ``(rows, n)``."""
        if rows.shape[0] == 0:
            return
        rows = rows.detach().to(torch.float32)
        product, total = rows.mT @ rows, rows.sum(0)
        if self.product is None or self.total is None:
            self.product, self.total = product.to(torch.float64), total.to(torch.float64)
        else:
            self.product += product
            self.total += total
        self.rows += rows.shape[0]

    def metric(self, layer: str) -> Metric:
        """The moment as a metric.

        Raises:
            IsogridError: no rows, or NaN or infinite inputs; names the layer.
        """
        if self.product is None or self.total is None:
            raise IsogridError(f"layer {layer!r}: calibration has no rows for it; give text that reaches it or skip it")
        if not (torch.isfinite(self.product).all() and torch.isfinite(self.total).all()):
            raise IsogridError(
                f"layer {layer!r}: its calibration inputs are NaN, infinite or overflow float32 when squared; "
                "run the model in float32 or bfloat16 and check the calibration data"
            )
        return Metric(self.product / self.rows, mean=self.total / self.rows, rows=self.rows)


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


def as_batches(calibration: Any, tokenizer: Any = None, length: int = 512) -> list[Any]:
    """Calibration data as a list of model inputs.

    Args:
        calibration: an iterable of batches (mappings of keyword arguments, tensors, or tuples of positional
            arguments), a tensor of token windows ``(windows, length)`` or of features ``(rows, …)``, one text, or a
            list of texts (the last two with a tokenizer).
        tokenizer: a transformers tokenizer.
        length: window length in tokens for one text; also where texts of a list are cut.

    Raises:
        IsogridError: texts without a tokenizer, or nothing at all.
    """
    if isinstance(calibration, str):
        calibration = _windows(calibration, _required(tokenizer), length)
    batches: list[Any]
    if isinstance(calibration, Tensor):
        rows = calibration.shape[0]
        per_row = calibration.shape[1] if calibration.ndim == 2 and not calibration.is_floating_point() else 1
        step = max(1, ROWS_PER_BATCH // max(per_row, 1))
        batches = [calibration[i : i + step] for i in range(0, rows, step)]
    elif isinstance(calibration, Mapping):
        batches = [calibration]
    else:
        if not isinstance(calibration, Iterable):
            raise IsogridError(
                f"calibration is text, a tensor or an iterable of batches, got {type(calibration).__name__}"
            )
        batches = list(calibration)
        if batches and all(isinstance(item, str) for item in batches):
            batches = _padded_texts(batches, _required(tokenizer), length)
    if not batches:
        raise IsogridError("calibration has no rows; give at least one batch, or None for a plain fit")
    return batches


def _required(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise IsogridError("calibration by text needs the model's tokenizer; pass tokenizer=…")
    return tokenizer


def _windows(text: str, tokenizer: Any, length: int) -> Tensor:
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if ids.numel() == 0:
        raise IsogridError("calibration has no rows: the text is empty")
    count = ids.numel() // length
    return ids[: count * length].view(count, length) if count else ids.unsqueeze(0)


def _padded_texts(texts: Sequence[str], tokenizer: Any, length: int) -> list[Any]:
    # Sorted by length: little padding, and the rows don't care for the order.
    texts = sorted(texts, key=len)
    out, at = [], 0
    while at < len(texts):
        longest = min(max(len(texts[min(at + 63, len(texts) - 1)]) // 3, 1), length)
        step = min(64, max(1, ROWS_PER_BATCH // longest))
        out.append(
            tokenizer(texts[at : at + step], padding=True, truncation=True, max_length=length, return_tensors="pt")
        )
        at += step
    return out


def forward_calls(model: nn.Module, batches: Sequence[Any]) -> list[Callable[[], Any]]:
    """One callable per batch that runs the model on it, on the model's device."""
    device = next((value.device for value in model.parameters()), torch.device("cpu"))

    # Keys and values of every layer, kept for a generation that never comes, would outweigh everything else.
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def call(batch: Any) -> Callable[[], Any]:
        def run() -> Any:
            if isinstance(batch, Mapping):
                return model(**extra | {key: _to(value, device) for key, value in batch.items()})
            if isinstance(batch, tuple | list):
                return model(*(_to(value, device) for value in batch), **extra)
            return model(_to(batch, device), **extra)

        return run

    return [call(batch) for batch in batches]


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
    for key in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == x.shape[:-1]:
            return flat[mask.reshape(-1).to(flat.device) != 0]
    for key in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.ndim == 2 and x.ndim == 2 and mask.numel() == flat.shape[0]:
            return flat[mask.reshape(-1).to(flat.device) != 0]
    return flat


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, each as it was afterwards; modules exchanged meanwhile keep their own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


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
    batches = as_batches(calibration, tokenizer, length)
    sums: dict[str, MomentSum] = {}
    owner: dict[str, str] = {}  # the layer whose sums hold this layer's input
    last: tuple[Tensor, int, str] | None = None
    batch: Any = None
    calls = calls_per_batch = 0

    class Enough(BaseException):
        """Every selected layer has seen this batch."""

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal last, calls
            x = args[0]
            if name not in owner:
                same = last is not None and last[0] is x and last[1] == x._version
                owner[name] = last[2] if same and last is not None else name
            if owner[name] == name:
                sums.setdefault(name, MomentSum()).add(real_rows(x, batch))
                last = (x, x._version, name)
            calls += 1
            if calls == calls_per_batch:
                raise Enough

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    try:
        with torch.no_grad(), evaluation_mode(model):
            for done, run in enumerate(forward_calls(model, batches)):
                batch, calls = batches[done], 0
                with suppress(Enough):
                    run()
                calls_per_batch = calls_per_batch or calls
                if on_batch is not None:
                    on_batch(done + 1, len(batches))
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise IsogridError(f"calibration reaches none of the {len(layers)} selected layers; check its form")
    metrics = {name: value.metric(name) for name, value in sums.items()}
    return Moments(
        {name: metrics[source] for name, source in owner.items()}, rows=max(value.rows for value in sums.values())
    )
