"""AdamW for what is not projected: vectors, groups without a rank, and sparse gradients of Top-R."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from isogrid.errors import IsogridWarning
from isogrid.optim.moments import State, adam_directions, read, step_size, write
from isogrid.optim.sharding import like_parameter, local, overall_norm, rows_of

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def step_plain(group: dict[str, Any], parameters: list[Tensor], states: list[State], names: list[str]) -> None:
    """Step parameters of one group; one whose gradient is not finite is skipped and counted, else untouched."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    largest = [
        rows_of(parameter, name).sum(overall_norm(gradient.detach())).float().cpu()
        for parameter, gradient, name in zip(parameters, gradients, names, strict=True)
    ]
    fine = torch.isfinite(torch.stack(largest)).tolist() if largest else []
    alive = []
    for parameter, gradient, state, name, healthy in zip(parameters, gradients, states, names, fine, strict=True):
        if not state:
            state.update({"step": 0, "skipped": 0})
        if not healthy:
            state["skipped"] += 1
            continue
        if parameter.numel():  # of the whole: a rank without rows keeps the same state as the others
            kept = top_entries(gradient, group["rank"]["fraction"], name) if group["projector"] == "top" else gradient
            weight = local(parameter.detach())
            if kept.stride() != weight.stride():  # fused kernels walk memory in one order
                kept = torch.empty_like(weight).copy_(kept)
            state["step"] += 1
            alive.append((parameter, kept, state))
    if not alive:
        return
    if group["core"] == "sgd":
        for parameter, gradient, _ in alive:
            weight = local(parameter.detach())
            weight.mul_(1 - group["lr"] * group["weight_decay"] * group["decoupled"])
            coupled = 0 if group["decoupled"] else group["weight_decay"]
            weight.add_(gradient + coupled * weight if coupled else gradient, alpha=-group["lr"])
        return
    if group["state"] == "float32" and all(p.dtype in (torch.float32, torch.float64) for p, *_ in alive):
        for step in sorted({state["step"] for *_, state in alive}):
            _functional(group, [entry for entry in alive if entry[2]["step"] == step], step)
    else:
        for parameter, gradient, state in alive:
            _by_hand(group, parameter, gradient, state)


def top_entries(gradient: Tensor, fraction: float, name: str) -> Tensor:
    """The gradient with all but exactly ``floor(fraction · numel)`` entries of largest magnitude set to zero."""
    count = math.floor(fraction * gradient.numel())
    if count == 0:
        warnings.warn(
            f"{name}: a fraction {fraction:g} of {gradient.numel()} entries is none; it will not move",
            IsogridWarning,
            stacklevel=2,
        )
    flat = gradient.reshape(-1)
    kept = torch.zeros_like(flat)
    places = flat.abs().topk(count, sorted=False).indices
    kept[places] = flat[places]
    return kept.view(gradient.shape)


def _functional(group: dict[str, Any], alive: list[tuple[Tensor, Tensor, State]], step: int) -> None:
    """torch's own step, fused where the device has it, for parameters that stand at the same step."""
    for parameter, _, state in alive:
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state:
                state[key] = like_parameter(torch.zeros_like(local(parameter.detach())), parameter)
    weights = [local(parameter.detach()) for parameter, *_ in alive]
    beta1, beta2 = group["betas"]
    lr, eps, decay = group["lr"], group["eps"], group["weight_decay"]
    if group["style"] == "hf":
        # m / (sqrt(v) + eps) is torch's direction with another eps and rate; the decay comes last.
        root = (1 - beta2**step) ** 0.5
        eps = eps / root
        lr = lr if group["correct_bias"] else lr * (1 - beta1**step) / root
        decay = decay if not group["decoupled"] else 0.0
    fused = all(weight.device.type in FUSED_DEVICES for weight in weights)
    (adamw if group["decoupled"] else adam)(
        weights,
        [gradient for _, gradient, _ in alive],
        [local(state["exp_avg"]) for *_, state in alive],
        [local(state["exp_avg_sq"]) for *_, state in alive],
        [],
        # The counter is a Python number in the state; torch wants tensors that it may count up.
        [torch.tensor(float(step - 1), device=weight.device if fused else "cpu") for weight in weights],
        fused=fused,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=decay,
        eps=eps,
        maximize=False,
    )
    if group["style"] == "hf" and group["decoupled"] and group["weight_decay"]:
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])


def _by_hand(group: dict[str, Any], parameter: Tensor, gradient: Tensor, state: State) -> None:
    """The step in float32 at least, for other conventions and for states in other precisions."""
    weight = local(parameter.detach())
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    stepped, gradient = weight.to(dtype), gradient.to(dtype)
    if not group["decoupled"]:
        gradient = gradient + group["weight_decay"] * stepped
    shrink = 1 - group["lr"] * group["weight_decay"] if group["decoupled"] else 1.0
    moments = [
        read(state, key, dtype) if key in state else torch.zeros_like(gradient) for key in ("exp_avg", "exp_avg_sq")
    ]
    step = state["step"]
    (direction,), _ = adam_directions(
        [gradient], moments[:1], moments[1:], [step], group["betas"], group["eps"], group["style"]
    )
    for key, values in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
        write(state, key, values, group["state"], lambda new: like_parameter(new, parameter))
    size = step_size(group["lr"], step, group["betas"], group["correct_bias"])
    if group["style"] == "torch":
        stepped = (stepped * shrink).add_(direction, alpha=-size)
    else:
        stepped = stepped.add(direction, alpha=-size).mul_(shrink)
    weight.copy_(stepped)
