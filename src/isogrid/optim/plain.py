"""AdamW for what is not projected: vectors, groups without a rank, and sparse gradients of Top-R."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from isogrid.errors import IsogridWarning
from isogrid.optim.codes import put_back
from isogrid.optim.moments import MOMENTS, State, adam_directions, read, step_size, write
from isogrid.optim.sharding import Rows, Share, local, overall_norm, rows_of

# Bits of a magnitude that one histogram sorts by.
DIGIT = 16
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass
class Plain:
    """One parameter that is not projected, in one step.

    Attributes:
        parameter: the parameter.
        name: for messages.
        index: place among all parameters, from which randomness is seeded.
        state: its state.
        gradient: what is here of it, as the weight lies in memory; empty before the step looks at it.
    """

    parameter: Tensor
    name: str
    index: int
    state: State
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))

    @cached_property
    def weight(self) -> Tensor:
        """The rows that are here."""
        return local(self.parameter.detach())

    @cached_property
    def share(self) -> Share:
        """Of states with a row for each of the parameter's."""
        return Share(self.parameter, rows_of(self.parameter, self.name))


def step_plain(group: dict[str, Any], works: Sequence[Plain]) -> None:
    """Step parameters of one group; one whose gradient is not finite is skipped and counted, else untouched."""
    gradients = [local(work.parameter.grad) for work in works if work.parameter.grad is not None]
    largest = [
        work.share.rows.sum(overall_norm(gradient.detach())).double().cpu()
        for work, gradient in zip(works, gradients, strict=True)
    ]
    fine = torch.isfinite(torch.stack(largest)).tolist() if largest else []
    alive = []
    for work, gradient, healthy in zip(works, gradients, fine, strict=True):
        state = work.state
        if not state:
            state.update({"step": 0, "skipped": 0})
        if not healthy:
            state["skipped"] += 1
            continue
        if work.parameter.numel():  # of the whole: a rank without rows keeps the same state as the others
            kept = gradient
            if group["projector"] == "top" and group["rank"] is not None:
                kept = top_entries(gradient, group["rank"]["fraction"], work.name, work.share.rows)
            work.gradient = _laid_out_as(work.weight, kept)
            state["step"] += 1
            alive.append(work)
    if group["core"] == "sgd":
        for work in alive:
            _descend(group, work)
    elif group["state"] == "float32" and all(_is_exact(work.weight) and _is_dense(work.weight) for work in alive):
        for step in sorted({work.state["step"] for work in alive}):
            _functional(group, [work for work in alive if work.state["step"] == step], step)
    else:
        for work in alive:
            _by_hand(group, work)


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


def _descend(group: dict[str, Any], work: Plain) -> None:
    """A step against the gradient itself."""
    weight, gradient = work.weight, work.gradient
    stepped = weight if _is_exact(weight) else weight.float()
    stepped.mul_(1 - group["lr"] * group["weight_decay"] * group["decoupled"])
    coupled = 0 if group["decoupled"] else group["weight_decay"]
    stepped.add_(gradient + coupled * stepped if coupled else gradient, alpha=-group["lr"])
    if stepped is not weight:
        put_back(weight, stepped, group, work.index, work.state["step"])


def _functional(group: dict[str, Any], alive: Sequence[Plain], step: int) -> None:
    """torch's own step, fused where the device has it, for parameters that stand at the same step."""
    weights = [work.weight for work in alive]
    for work, weight in zip(alive, weights, strict=True):
        for key in MOMENTS:
            if key not in work.state:
                work.state[key] = work.share.wrap(torch.zeros_like(weight))
            elif (moved := _laid_out_as(weight, held := local(work.state[key]))) is not held:
                work.state[key] = work.share.wrap(moved)
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
        [work.gradient for work in alive],
        [local(work.state["exp_avg"]) for work in alive],
        [local(work.state["exp_avg_sq"]) for work in alive],
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


def _is_exact(weight: Tensor) -> bool:
    return weight.dtype in (torch.float32, torch.float64)


def _is_dense(weight: Tensor) -> bool:
    """Whether memory holds its numbers and no others between: torch's fused kernels would step those too."""
    return torch.empty_like(weight, device="meta").stride() == weight.stride()


def _by_hand(group: dict[str, Any], work: Plain) -> None:
    """The step in float32 at least, for weights and states in other precisions or other memory than torch's takes."""
    weight, state, share = work.weight, work.state, work.share
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    stepped, gradient = weight.to(dtype), work.gradient.to(dtype)
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
    put_back(weight, stepped, group, work.index, step)
