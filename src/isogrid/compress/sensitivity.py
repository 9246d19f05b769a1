"""What a layer's output errors cost the model's loss: the trace of the Fisher information of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.compress.calibrate import evaluation_mode, forward_calls, real_rows
from isogrid.compress.frugal import frugal_memory
from isogrid.errors import IsogridError


def loss_weights(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], *, seed: int = 0
) -> dict[str, float]:
    """``Σ ||g||² / (2 m N)`` of each layer, over its rows: g the gradient of the loss with respect to its m outputs.

    N are the rows of the model's output, without padding: tokens, or texts and images that are classed as a whole. For
    small errors that are alike in all directions, ``weight · E ||error||²`` is the expected rise of the loss of one of
    them (fitting theory 5.1); an expert that few tokens reach weighs little. The loss: cross entropy of labels drawn
    from the model's own logits, or, where a model has no logits or just one (a regression), its outputs times standard
    normal numbers, whose gradients see changes of all outputs alike.

    Args:
        model: it runs in eval mode and is left in the mode it was in; no parameter's gradient is touched.
        layers: name to module.
        batches: see `compress.as_batches`; few will do.
        seed: of the drawn labels.

    Returns:
        By layer name. A layer that no gradient reaches gets the median of the others.

    Raises:
        IsogridError: the model's output is no tensor, or no gradient reaches any layer.
    """
    source = torch.Generator().manual_seed(seed)
    squares: dict[str, float] = dict.fromkeys(layers, 0.0)
    scored = 0
    batch: Any = None

    def watch(name: str) -> Any:
        def on_output(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            first = not output.requires_grad  # on the way: from here on gradients are recorded
            if first:
                output = output.detach().requires_grad_()

            def on_gradient(gradient: Tensor) -> None:
                kept = real_rows(gradient, batch).to(torch.float32)
                squares[name] += float(kept.square().sum(dtype=torch.float64))

            output.register_hook(on_gradient)
            return output.clone() if first else output  # an activation may change it in place, but no leaf

        return on_output

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with frugal_memory(), torch.enable_grad(), evaluation_mode(model):
            for number, run in enumerate(forward_calls(model, batches)):
                batch = batches[number]
                rows, are_logits = _rows_of(run(), batch)
                scored += len(rows)
                loss = _sampled_loss(rows, are_logits, source)
                if loss.requires_grad:
                    loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    found = {name: squares[name] / scored / (2 * module_outputs(layers[name])) for name in layers if squares[name] > 0}
    if not found:
        raise IsogridError(f"no gradient reaches any of the {len(layers)} selected layers; allocate uniformly")
    median = sorted(found.values())[len(found) // 2]
    return {name: found.get(name, median) for name in layers}


def module_outputs(module: nn.Module) -> int:
    """Outputs of an ``nn.Linear`` or ``Conv1D``."""
    return int(getattr(module, "out_features", None) or module.nf)  # type: ignore[arg-type]  # Conv1D calls them nf


def _rows_of(output: Any, batch: Any) -> tuple[Tensor, bool]:
    """The rows ``(N, outputs)`` of a model's output without those of padding, and whether they are logits."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return real_rows(logits, batch), logits.shape[-1] > 1
    if isinstance(output, Mapping):
        output = next((value for value in output.values() if isinstance(value, Tensor)), None)
    elif isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise IsogridError(f"the model's output is a {type(output).__name__}, not a tensor; allocate uniformly")
    return real_rows(output if output.ndim > 1 else output.reshape(-1, 1), batch), False


def _sampled_loss(rows: Tensor, are_logits: bool, source: torch.Generator) -> Tensor:
    """Summed over rows, so that one row's gradient is its own."""
    if not are_logits:
        noise = torch.randn(rows.shape, generator=source).to(rows)
        return (rows * noise).sum()
    rows = rows.to(torch.float32)
    with torch.no_grad():
        uniform = torch.rand(len(rows), 1, generator=source).to(rows.device)
        labels = (rows.softmax(-1).cumsum(-1) < uniform).sum(-1).clamp(max=rows.shape[-1] - 1)
    return nn.functional.cross_entropy(rows, labels, reduction="sum")
