"""Block refinement: train what a block has got so that its outputs come back to the original block's.

The last word of AA-SVD (Sinha & Fleuret 2026, section 3) and of fitting theory 6: after its layers are fitted, all
factors, gains and biases of one block are trained on the mean squared difference between its outputs on the compressed
model's inputs and the original block's outputs on the original ones. Part of the windows is held out: the state that is
best on them is kept, and the start where nothing is better.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.compress.calibrate import real_rows
from isogrid.compress.lockstep import Halt
from isogrid.errors import IsogridError
from isogrid.linear import StructuredLinear

# Held-out windows are looked at this often; the first look comes after as many steps.
LOOK_EVERY = 25
# Steps that are timed before the steps of a budget in minutes are known.
TIMED_STEPS = 3


@dataclass(frozen=True)
class Refinement:
    """How blocks are trained.

    Attributes:
        minutes: for all blocks together; None: all steps are taken.
        steps: of AdamW on each block, at most.
        rate: learning rate at its peak, relative to the root mean square of each tensor's entries (fitting theory 6).
        rows: tokens of a step; whole windows, one at least.
        held_out: share of the windows that is not trained on.
        patience: looks at the held-out windows without a gain of ``least_gain`` before a block is finished.
        least_gain: relative.
    """

    minutes: float | None = None
    steps: int = 200
    rate: float = 0.01
    rows: int = 2048
    held_out: float = 0.125
    patience: int = 2
    least_gain: float = 0.005

    def __post_init__(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise IsogridError(f"refinement takes a positive number of minutes, got {self.minutes}")
        if self.steps < 1 or self.rows < 1 or self.patience < 1:
            raise IsogridError(
                f"refinement takes at least one step, row and look, got steps={self.steps}, rows={self.rows}, "
                f"patience={self.patience}"
            )
        if not self.rate > 0:
            raise IsogridError(f"refinement's learning rate is positive, got {self.rate}")
        if not 0 <= self.held_out < 1:
            raise IsogridError(f"refinement holds out a share in [0, 1) of the windows, got {self.held_out}")


@dataclass(frozen=True)
class BlockReport:
    """What the refinement of one block did.

    Attributes:
        name: of the block.
        before: relative error of its outputs on the held-out windows before training.
        after: the same after it; not above ``before``.
        steps: taken.
        kept: the step whose state was kept; 0: the start.
        seconds: of the training.
    """

    name: str
    before: float
    after: float
    steps: int
    kept: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dict(vars(self))


@dataclass(frozen=True)
class Example:
    """One window at a block: how it is called, and what the original block gave.

    Attributes:
        halt: the call.
        wanted: ``(..., n)`` the original block's output.
        batch: the calibration batch it belongs to, for its mask.
    """

    halt: Halt
    wanted: Tensor
    batch: Any


def refine_block(
    name: str,
    block: nn.Module,
    examples: Sequence[Example],
    settings: Refinement,
    *,
    seed: int = 0,
    seconds: float | None = None,
) -> BlockReport:
    """Train a block in place; it comes back in its dtype and with its gradients' flags as they were.

    Trained are the factors of its structured layers and all vectors (gains of norms, biases); matrices that were left
    dense stay.

    Args:
        name: of the block, for errors and the report.
        block: the compressed block.
        examples: what it is called with, and what it should give.
        settings: see `Refinement`.
        seed: of the order of windows.
        seconds: time for this block; None: no limit.

    Raises:
        IsogridError: fewer than two examples, or a block whose outputs are no tensors.
    """
    begun = time.perf_counter()
    if len(examples) < 2:
        raise IsogridError(
            f"block {name!r}: refinement trains on some batches and holds out others, got {len(examples)}; "
            "give more calibration windows"
        )
    order = random.Random(seed)
    shuffled = order.sample(range(len(examples)), len(examples))
    count = min(max(round(settings.held_out * len(examples)), 1), len(examples) - 1) if settings.held_out else 0
    held, trained_on = [examples[i] for i in shuffled[:count]], [examples[i] for i in shuffled[count:]]
    if not held:
        held = trained_on
    with _trainable(block) as parameters:
        run = _Runs(block)
        before = best = run.error(held)
        state = [value.detach().clone() for value in parameters]
        optimizer = torch.optim.AdamW(
            _groups(parameters, settings.rate), lr=settings.rate, betas=(0.9, 0.999), weight_decay=0.0
        )
        peaks = [group["lr"] for group in optimizer.param_groups]
        per_step = max(1, round(settings.rows / max(_rows(trained_on[0]), 1)))
        source = _endless(trained_on, order)
        steps, step, kept, waited, marked = settings.steps, 0, 0, 0, before
        timed = time.perf_counter()
        while step < steps:
            if step == TIMED_STEPS and seconds is not None:
                each = (time.perf_counter() - timed) / TIMED_STEPS
                steps = min(steps, max(int((seconds - (timed - begun)) / max(each, 1e-9)), TIMED_STEPS))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * _schedule(step, steps)
            optimizer.zero_grad(set_to_none=True)
            for example in [next(source) for _ in range(per_step)]:
                (run.loss(example) / per_step).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            if step % LOOK_EVERY and step != steps:
                continue
            now = run.error(held)
            if now < best:
                best, kept, state = now, step, [value.detach().clone() for value in parameters]
            if now < marked * (1 - settings.least_gain):
                marked, waited = now, 0
            else:
                waited += 1
            if waited >= settings.patience or not math.isfinite(now):
                break
        with torch.no_grad():
            for value, good in zip(parameters, state, strict=True):
                value.copy_(good)
    return BlockReport(name, before, best, step, kept, time.perf_counter() - begun)


class _Runs:
    """Calls of a block in float32, and how far their outputs are from what is wanted."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def output(self, halt: Halt) -> Tensor:
        """The block's first output tensor."""
        wide = torch.utils._pytree.tree_map_only(
            Tensor, lambda x: x.to(torch.float32) if x.is_floating_point() else x, (halt.args, halt.kwargs)
        )
        return first_tensor(self.block(*wide[0], **wide[1]))

    def loss(self, example: Example) -> Tensor:
        """Mean squared difference of a row, relative to the mean square of what is wanted."""
        found = real_rows(self.output(example.halt), example.batch)
        wanted = real_rows(example.wanted, example.batch).to(torch.float32)
        return _row_loss(found, wanted)

    @torch.no_grad()
    def error(self, examples: Sequence[Example]) -> float:
        """Root of the mean loss of examples."""
        return (sum(float(self.loss(example)) for example in examples) / len(examples)) ** 0.5


def _row_loss(found: Tensor, wanted: Tensor) -> Tensor:
    # Norms follow: what counts is each row's relative error. Tokens with massive activations, whose squares are a
    # thousand times the others', would otherwise be all that is trained on.
    size = wanted.square().mean(-1)
    return ((found - wanted).square().mean(-1) / size.clamp_min(1e-12)).mean()


def first_tensor(output: Any) -> Tensor:
    """A block's output, or the first of several."""
    if isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise IsogridError(f"refinement compares tensors, a block gives {type(output).__name__}; compress without it")
    return output


@contextmanager
def _trainable(block: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The parameters to train, as float32 leaves inside; flags, gradients and dtypes as before afterwards."""
    chosen: dict[int, nn.Parameter] = {}
    for module in block.modules():
        for value in module.parameters(recurse=False):
            if value.is_floating_point() and (isinstance(module, StructuredLinear) or value.ndim <= 1):
                chosen[id(value)] = value
    flags = [(value, value.requires_grad, value.grad) for value in block.parameters()]
    tensors: list[Tensor] = [*block.parameters(), *block.buffers()]
    narrow: list[tuple[Tensor, torch.dtype]] = [
        (value, value.dtype) for value in tensors if value.is_floating_point() and value.dtype != torch.float32
    ]
    try:
        for narrowed, _ in narrow:
            narrowed.data = narrowed.data.to(torch.float32)
        for value, _, _ in flags:
            value.grad = None
            value.requires_grad_(id(value) in chosen)
        with torch.enable_grad():
            yield list(chosen.values())
    finally:
        for value, flag, _ in flags:
            value.grad = None
            value.requires_grad_(flag)
        for narrowed, dtype in narrow:
            narrowed.data = narrowed.data.to(dtype)
        for value, _, gradient in flags:
            value.grad = gradient


def _groups(parameters: Sequence[Tensor], rate: float) -> list[dict[str, Any]]:
    """One group a tensor: steps of a share of its own size."""
    sizes = [float(value.detach().square().mean().sqrt()) for value in parameters]
    positive = sorted(size for size in sizes if size > 0)
    # A bias of zeros has no size yet: it moves as the middle one does.
    middle = positive[len(positive) // 2] if positive else 1.0
    return [{"params": [value], "lr": rate * (size or middle)} for value, size in zip(parameters, sizes, strict=True)]


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over a tenth, then a cosine down to a tenth."""
    warm = max(steps // 10, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def _endless(examples: Sequence[Example], order: random.Random) -> Iterator[Example]:
    while True:
        yield from order.sample(list(examples), len(examples))


def _rows(example: Example) -> int:
    return example.wanted[..., 0].numel()


OnBlock = Callable[[BlockReport], None]
