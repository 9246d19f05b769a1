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
from isogrid.optim.moments import MOMENTS, State, adam_directions, read, step_size, write
from isogrid.optim.sharding import Rows, Share, local, overall_norm, rows_of

# Bits of a magnitude that one histogram sorts by.
DIGIT = 16
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def step_plain(group: dict[str, Any], parameters: list[Tensor], states: list[State], names: list[str]) -> None:
    """Step parameters of one group; one whose gradient is not finite is skipped and counted, else untouched."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    shares = [Share(parameter, rows_of(parameter, name)) for parameter, name in zip(parameters, names, strict=True)]
    largest = [
        share.rows.sum(overall_norm(gradient.detach())).double().cpu()
        for share, gradient in zip(shares, gradients, strict=True)
    ]
    fine = torch.isfinite(torch.stack(largest)).tolist() if largest else []
    alive: list[tuple[Share, Tensor, State]] = []
    for share, gradient, state, name, healthy in zip(shares, gradients, states, names, fine, strict=True):
        parameter = share.parameter
        if not state:
            state.update({"step": 0, "skipped": 0})
        if not healthy:
            state["skipped"] += 1
            continue
        if parameter.numel():  # of the whole: a rank without rows keeps the same state as the others
            kept = gradient
            if group["projector"] == "top" and group["rank"] is not None:
                kept = top_entries(gradient, group["rank"]["fraction"], name, share.rows)
            weight = local(parameter.detach())
            kept = _laid_out_as(weight, kept)
            state["step"] += 1
            alive.append((share, kept, state))
    if not alive:
        return
    if group["core"] == "sgd":
        for share, gradient, _ in alive:
            weight = local(share.parameter.detach())
            weight.mul_(1 - group["lr"] * group["weight_decay"] * group["decoupled"])
            coupled = 0 if group["decoupled"] else group["weight_decay"]
            weight.add_(gradient + coupled * weight if coupled else gradient, alpha=-group["lr"])
        return
    exact = (torch.float32, torch.float64)
    if group["state"] == "float32" and all(share.parameter.dtype in exact for share, *_ in alive):
        for step in sorted({state["step"] for *_, state in alive}):
            _functional(group, [entry for entry in alive if entry[2]["step"] == step], step)
    else:
        for share, gradient, state in alive:
            _by_hand(group, share, gradient, state)


def top_entries(gradient: Tensor, fraction: float, name: str, rows: Rows) -> Tensor:
    """The gradient with all but exactly ``floor(fraction · numel)`` entries of largest magnitude set to zero.

    Args:
        gradient: the rows that are here.
        fraction: of the entries of all rows.
        name: for warnings.
        rows: which rows these are.
    """
    total = gradient.shape[1:].numel() * rows.total if gradient.ndim else 1
    count = math.floor(fraction * total)
    if count == 0:
        warnings.warn(
            f"{name}: a fraction {fraction:g} of {total} entries is none; it will not move",
            IsogridWarning,
            stacklevel=2,
        )
    flat = gradient.reshape(-1)
    if rows.group is not None:
        return torch.where(_among_largest(flat.abs(), count, rows), flat, 0).view(gradient.shape)
    kept = torch.zeros_like(flat)
    places = flat.abs().topk(count, sorted=False).indices
    kept[places] = flat[places]
    return kept.view(gradient.shape)


def _among_largest(sizes: Tensor, count: int, rows: Rows) -> Tensor:
    """Which of the magnitudes that are here are among the ``count`` largest of all ranks; of equals, the first.

    The bits of floats that are not negative are in their order: 16 bits at a time, ranks sum up histograms of those
    that share the bits so far with the last one to be kept. A histogram travels, never the gradient.
    """
    if count == 0:
        return torch.zeros_like(sizes, dtype=torch.bool)
    wide = sizes.dtype == torch.float64
    bits = sizes.view(torch.int64) if wide else sizes.float().view(torch.int32).long()
    found, wanted = 0, count
    for shift in (48, 32, 16, 0) if wide else (16, 0):
        digits = bits[bits >> shift >> DIGIT == found] >> shift & (1 << DIGIT) - 1
        larger = rows.sum(digits.bincount(minlength=1 << DIGIT)).flip(0).cumsum(0)
        digit = int((larger < wanted).sum())  # counted from the largest
        wanted -= int(larger[digit - 1]) if digit else 0
        found = found << DIGIT | (1 << DIGIT) - 1 - digit
    equal = bits == found
    # Equals are kept in the order of the rows: what ranks before this one hold comes first.
    held = torch.zeros(rows.total, dtype=torch.int64, device=bits.device)
    if rows.stop > rows.start:
        held[rows.start] = equal.sum()
    before = int(rows.sum(held)[: rows.start].sum())
    return (bits > found) | equal & (equal.cumsum(0) <= wanted - before)


def _functional(group: dict[str, Any], alive: list[tuple[Share, Tensor, State]], step: int) -> None:
    """torch's own step, fused where the device has it, for parameters that stand at the same step."""
    for share, _, state in alive:
        for key in MOMENTS:
            weight = local(share.parameter.detach())
            if key not in state:
                state[key] = share.wrap(torch.zeros_like(weight))
            elif (moved := _laid_out_as(weight, held := local(state[key]))) is not held:
                state[key] = share.wrap(moved)
    weights = [local(share.parameter.detach()) for share, *_ in alive]
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


def _laid_out_as(weight: Tensor, values: Tensor) -> Tensor:
    """Values with the weight's strides and dtype, themselves where they have them: fused kernels walk memory once."""
    if values.stride() == weight.stride() and values.dtype == weight.dtype:
        return values
    return torch.empty_like(weight).copy_(values)


def _by_hand(group: dict[str, Any], share: Share, gradient: Tensor, state: State) -> None:
    """The step in float32 at least, for other conventions and for states in other precisions."""
    weight = local(share.parameter.detach())
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    stepped, gradient = weight.to(dtype), gradient.to(dtype)
    if not group["decoupled"]:
        gradient = gradient + group["weight_decay"] * stepped
    shrink = 1 - group["lr"] * group["weight_decay"] if group["decoupled"] else 1.0
    moments = [read(state, key, dtype, share) if key in state else torch.zeros_like(gradient) for key in MOMENTS]
    step = state["step"]
    (direction,), _ = adam_directions(
        [gradient], moments[:1], moments[1:], [step], group["betas"], group["eps"], group["style"]
    )
    for key, values in zip(MOMENTS, moments, strict=True):
        write(state, key, values, group["state"], share)
    size = step_size(group["lr"], step, group["betas"], group["correct_bias"])
    if group["style"] == "torch":
        stepped = (stepped * shrink).add_(direction, alpha=-size)
    else:
        stepped = stepped.add(direction, alpha=-size).mul_(shrink)
    weight.copy_(stepped)
