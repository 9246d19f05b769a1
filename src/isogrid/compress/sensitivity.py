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
    """``E ||g||² / (2 m)`` of each layer, g the gradient of the loss with respect to its m outputs, a row at a time.

    For small errors that are alike in all directions, ``weight · E ||error||²`` is the expected rise of the loss
    (fitting theory 5.1). The loss: cross entropy of labels drawn from the model's own logits, or, where a model has
    none or a single one, its outputs times standard normal numbers, whose gradients see changes of all outputs alike.

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
    rows: dict[str, int] = dict.fromkeys(layers, 0)
    batch: Any = None

    def watch(name: str) -> Any:
        def on_output(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:  # the first layer on the way: from here on gradients are recorded
                output = output.detach().requires_grad_()

            def on_gradient(gradient: Tensor) -> None:
                kept = real_rows(gradient, batch).to(torch.float32)
                squares[name] += float(kept.square().sum(dtype=torch.float64))
                rows[name] += len(kept)

            output.register_hook(on_gradient)
            return output

        return on_output

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with frugal_memory(), torch.enable_grad(), evaluation_mode(model):
            for number, run in enumerate(forward_calls(model, batches)):
                batch = batches[number]
                loss = _sampled_loss(run(), source)
                if loss.requires_grad:
                    loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    found = {
        name: squares[name] / rows[name] / (2 * module_outputs(layers[name]))
        for name in layers
        if rows[name] and squares[name] > 0
    }
    if not found:
        raise IsogridError(f"no gradient reaches any of the {len(layers)} selected layers; allocate uniformly")
    median = sorted(found.values())[len(found) // 2]
    return {name: found.get(name, median) for name in layers}


def module_outputs(module: nn.Module) -> int:
    """Outputs of an ``nn.Linear`` or ``Conv1D``."""
    return int(getattr(module, "out_features", None) or module.nf)  # type: ignore[arg-type]  # Conv1D calls them nf


def _sampled_loss(output: Any, source: torch.Generator) -> Tensor:
    """Summed over rows, so that one row's gradient is its own."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.shape[-1] > 1:
        flat = logits.reshape(-1, logits.shape[-1]).to(torch.float32)
        with torch.no_grad():
            uniform = torch.rand(flat.shape[0], 1, generator=source).to(flat.device)
            labels = (flat.softmax(-1).cumsum(-1) < uniform).sum(-1).clamp(max=flat.shape[-1] - 1)
        return nn.functional.cross_entropy(flat, labels, reduction="sum")
    if isinstance(logits, Tensor):  # a single logit is an output like any other: labels of one class tell nothing
        output = logits
    elif isinstance(output, Mapping):
        output = next((value for value in output.values() if isinstance(value, Tensor)), None)
    elif isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise IsogridError(f"the model's output is a {type(output).__name__}, not a tensor; allocate uniformly")
    noise = torch.randn(output.shape, generator=source).to(output)
    return (output * noise).sum()
