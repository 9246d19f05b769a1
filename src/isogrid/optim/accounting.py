"""The memory of a training step, predicted from shapes and measured on live tensors.

Bytes are sums over tensors; step counters are Python numbers and weigh nothing. Activations are counted as the source
counts them: the outputs of all leaf modules in one training-mode forward pass (Bal, Hariharane, Gobinathan 2025), a
proxy. What autograd really keeps for the backward pass is measured beside it.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from isogrid.fitting.ranks import as_rank_rule
from isogrid.linear import StructuredLinear
from isogrid.optim.bases import side_of, sides
from isogrid.optim.codes import BLOCK, takes_codes
from isogrid.optim.projected_adamw import ProjectedAdamW
from isogrid.optim.required import projects
from isogrid.optim.sharding import local

LIMITED = ("normalized", "fira", "apollo_channel", "apollo_tensor")
Bytes = dict[str, int]


def state_bytes(optimizer: Optimizer) -> Bytes:
    """Bytes of the live state of any optimizer on this rank, by state key, largest first."""
    found: Bytes = defaultdict(int)
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                found[key] += local(value).nbytes
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def predicted_state_bytes(optimizer: ProjectedAdamW) -> Bytes:
    """What `state_bytes` will be after the first step, from shapes and options alone.

    Rank rules that look at singular values are counted at their limit.
    """
    found: Bytes = defaultdict(int)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and parameter.numel():
                for key, count in _of_parameter(group, parameter).items():
                    found[key] += count
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def _of_parameter(group: Mapping[str, Any], parameter: Tensor) -> Bytes:
    item = 8 if parameter.dtype == torch.float64 else 4
    precision = group["state"]

    def stored(key: str, count: int) -> Bytes:
        if precision == "8bit" and takes_codes(count):
            return {key: count, f"{key}_scale": 4 * count // BLOCK}
        return {key: count * (2 if precision == "bfloat16" else item)}

    if not projects(group, parameter):
        if group["core"] == "sgd":
            return {}
        return stored("exp_avg", parameter.numel()) | stored("exp_avg_sq", parameter.numel())
    rows = parameter.shape[0]
    columns = parameter.numel() // rows
    rank, side = as_rank_rule(group["rank"]).most(rows, columns), side_of(dict(group), rows, columns)
    found: Bytes = {}
    for one in sides(side):
        count = rank * (rows if one == "left" else columns)
        if group["projector"] == "random":
            continue
        if group["projector_bits"] is None:
            found[f"basis_{one}"] = count * (2 if precision == "bfloat16" else item)
            continue
        groups = -(-count // BLOCK)
        found[f"basis_{one}"] = groups * BLOCK * group["projector_bits"] // 8
        found[f"basis_{one}_scale"] = found[f"basis_{one}_zero"] = 4 * groups
    if group["adaptive"] is not None:
        found["cosines"] = 4 * group["adaptive"]["queue"]
    if group["core"] == "adam":
        count = rank * {"left": columns, "right": rows, "both": rank}[side]
        found |= stored("exp_avg", count) | stored("exp_avg_sq", count)
    if group["residual"] == "error_feedback":
        found |= stored("error", parameter.numel())
    if group["residual"] == "normalized":
        found["channel_sq"] = item * (rows if side == "left" else columns)
    if group["residual"] in LIMITED and group["limiter"] is not None:
        found["residual_norm"] = item
    return found


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of tensors on this rank, each counted once."""
    return sum({id(tensor): local(tensor).nbytes for tensor in tensors if tensor is not None}.values())


def activation_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of the outputs of all leaf modules during ``forward()``.

    Args:
        model: whose leaves are watched.
        forward: runs the model once.
    """
    total = 0

    def count(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.nbytes
        elif isinstance(output, tuple | list):
            total += sum(part.nbytes for part in output if isinstance(part, Tensor))

    handles = [
        module.register_forward_hook(count) for module in model.modules() if not any(True for _ in module.children())
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return total


def predicted_activation_bytes(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """`activation_bytes` of a forward pass on fake tensors: shapes flow, numbers don't.

    Args:
        model: stays where it is.
        batch: keyword arguments of the forward pass; tensors are replaced by their shapes.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    hollow: dict[str, Tensor] = {
        name: mode.from_tensor(value)
        for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for name, value in named
    }
    inputs = {key: mode.from_tensor(value) if isinstance(value, Tensor) else value for key, value in batch.items()}
    with mode:
        return activation_bytes(model, lambda: torch.func.functional_call(model, hollow, kwargs=inputs))


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> tuple[Any, int]:
    """What ``forward()`` returned, and the bytes that autograd keeps for its backward pass.

    Args:
        forward: runs the model with gradients.
        parameters: whose storages are not counted: they are there anyway.
    """
    own = {local(parameter).untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    return result, sum(kept.values())


def memory_breakdown(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Mapping[str, Any],
    loss_of: Callable[[Any], Tensor],
) -> dict[str, dict[str, int]]:
    """Predicted and measured bytes of one training step: parameters, gradients, optimizer state by key, activations.

    The step is taken: the model is one step further afterwards, and its gradients are freed. Factors are parameters
    like others, codes among them, and are named apart as ``of which factors``.

    Args:
        model: in the mode it is in; give it in training mode.
        optimizer: over its parameters.
        batch: keyword arguments of the forward pass.
        loss_of: a scalar from what the model returns.

    Returns:
        ``{"predicted": {…}, "measured": {…}}`` with keys ``parameters``, ``of which factors``, ``gradients``,
        ``state: KEY`` (predicted for `ProjectedAdamW` and torch's Adam and AdamW), ``activations`` (not predicted where
        the path of the forward pass depends on numbers), and under ``measured`` also ``saved for backward``.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    factors = list(_factors(model))
    fixed = {"parameters": tensor_bytes([*parameters, *factors]), "of which factors": tensor_bytes(factors)}
    predicted = dict(fixed)
    in_backward = getattr(optimizer, "in_backward", False)
    # Steps during the backward pass free each gradient; the largest one is what is there at a time.
    predicted["gradients"] = (
        max((local(p).nbytes for p in trained), default=0) if in_backward else tensor_bytes(trained)
    )
    if isinstance(optimizer, ProjectedAdamW):
        predicted |= {f"state: {key}": count for key, count in predicted_state_bytes(optimizer).items()}
    elif isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        predicted |= {f"state: {key}": count for key, count in _of_adam(optimizer).items()}
    # A model whose path depends on numbers, as on a mask of all ones, can't be predicted from shapes.
    with contextlib.suppress(RuntimeError):
        predicted["activations"] = predicted_activation_bytes(model, batch)

    measured = dict(fixed)
    result: list[Any] = []
    measured_activations = activation_bytes(
        model, lambda: result.append(saved_bytes(lambda: model(**batch), [*parameters, *factors]))
    )
    output, kept = result[0]
    largest = 0

    def seen(parameter: Tensor) -> None:
        nonlocal largest
        largest = max(largest, local(parameter).nbytes)

    handles = [p.register_post_accumulate_grad_hook(seen) for p in trained] if in_backward else []
    loss_of(output).backward()
    for handle in handles:
        handle.remove()
    measured["gradients"] = largest if in_backward else tensor_bytes(p.grad for p in parameters)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    measured |= {f"state: {key}": count for key, count in state_bytes(optimizer).items()}
    measured |= {"activations": measured_activations, "saved for backward": kept}
    return {"predicted": predicted, "measured": measured}


def _factors(model: nn.Module) -> Iterator[Tensor]:
    """What layers hold in a matrix's place: parameters of any shape, and codes and places, which are buffers."""
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            yield from module.factors.values()
        elif type(module).__name__ == "FactoredLinear":  # of a room that this one can't see
            yield from (module.left, module.scale, module.right)  # type: ignore[misc]


def _of_adam(optimizer: Optimizer) -> Bytes:
    found: Bytes = defaultdict(int)
    for group in optimizer.param_groups:
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
            found[key] += tensor_bytes(trained)
        found["step"] += 4 * len(trained)
    return found


def refresh_flops(optimizer: ProjectedAdamW) -> int:
    """Multiplications and additions with gradients in all refreshes so far, of sketches and of warm power iterations.

    A sketch of q columns and n rounds of power iteration is ``2 q m n (2 n + 2)``; a warm iteration ``4 m n r``. Exact
    decompositions and random bases are no such products and count nothing.
    """
    total = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            done = optimizer.state[parameter].get("refreshes", 0) if parameter in optimizer.state else 0
            if not done or group["projector"] not in ("randomized", "power"):
                continue
            rows = parameter.shape[0]
            columns = parameter.numel() // rows
            rank = as_rank_rule(group["rank"]).most(rows, columns)
            size = min(group["sketch_factor"] * rank + group["oversample"], rows, columns)
            sketch = 2 * size * rows * columns * (2 * group["power_steps"] + 2)
            bases = len(sides(side_of(group, rows, columns)))
            again = sketch if group["projector"] == "randomized" else 4 * rows * columns * rank
            total += bases * (sketch + (done - 1) * again)
    return total


def projection_flops(optimizer: ProjectedAdamW) -> int:
    """Multiplications and additions of projecting and lifting in one steady step: ``4 m n r`` a matrix."""
    total = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if projects(group, parameter) and parameter.numel():
                rows = parameter.shape[0]
                columns = parameter.numel() // rows
                total += 4 * rows * columns * as_rank_rule(group["rank"]).most(rows, columns)
    return total
