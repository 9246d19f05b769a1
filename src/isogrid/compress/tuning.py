"""A short training with an early end: what refinement of a block and distillation of the whole model share.

AdamW with each tensor's learning rate relative to its own size, warm-up and cosine; part of the examples is held out,
the state that is best on them is kept, and the start where nothing is better.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from isogrid.compress.team import Team
from isogrid.errors import IsogridError
from isogrid.linear import StructuredLinear, is_linear

# Steps that are timed before the steps of a budget in minutes are known.
TIMED_STEPS = 3
BETAS = (0.9, 0.999)
# What is left of the learning rate after a look that showed no gain. Steps that a poor fit gains by are too long for a
# good one, and how good a fit is nobody knows before the first look.
SHORTER = 0.3
T = TypeVar("T")


@dataclass(frozen=True)
class Tuning:
    """How a short training goes.

    Attributes:
        minutes: all of it together, looks and all; None: all steps are taken.
        steps: of AdamW, at most.
        rate: learning rate at its peak, relative to the root mean square of each tensor's entries (fitting theory 6);
            less of it after each look without a gain.
        rows: tokens of a step; whole windows, one at least.
        held_out: share of the windows that is not trained on.
        look_every: steps between looks at the held-out windows.
        patience: looks without a gain of ``least_gain`` before the end.
        least_gain: relative.
    """

    spoken: ClassVar[str] = "training"

    minutes: float | None = None
    steps: int = 200
    rate: float = 0.003
    rows: int = 512
    held_out: float = 0.125
    look_every: int = 25
    patience: int = 4
    least_gain: float = 0.005

    def __post_init__(self) -> None:
        what = self.spoken
        if self.minutes is not None and not self.minutes > 0:
            raise IsogridError(f"{what} takes a positive number of minutes, got {self.minutes}")
        if min(self.steps, self.rows, self.patience, self.look_every) < 1:
            raise IsogridError(
                f"{what} takes at least one step, row and look, got steps={self.steps}, rows={self.rows}, "
                f"patience={self.patience}, look_every={self.look_every}"
            )
        if not self.rate > 0:
            raise IsogridError(f"{what}: its learning rate is positive, got {self.rate}")
        if not 0 <= self.held_out < 1:
            raise IsogridError(f"{what} holds out a share in [0, 1) of the windows, got {self.held_out}")


@dataclass(frozen=True)
class Tuned:
    """What a short training did.

    Attributes:
        before: measure on the held-out examples at the start.
        after: the same at the end; not above ``before``.
        steps: taken.
        kept: the step whose state was kept; 0: the start.
        seconds: of all of it.
    """

    before: float
    after: float
    steps: int
    kept: int
    seconds: float


def tune(
    parameters: Sequence[nn.Parameter],
    examples: Sequence[T],
    loss: Callable[[T], Tensor],
    measure: Callable[[Sequence[T]], float],
    settings: Tuning,
    *,
    rows: Callable[[T], int],
    seed: int = 0,
    seconds: float | None = None,
    begun: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    on_look: Callable[[int, float], None] | None = None,
    team: Team | None = None,
) -> Tuned:
    """Train parameters in place on some examples, judged by others.

    A look that shows no gain takes them back to the best ones seen, and steps become shorter.

    Args:
        parameters: leaves, in float32.
        examples: two at least.
        loss: of one example, differentiable.
        measure: of several examples, without gradients; smaller is better.
        settings: see `Tuning`.
        rows: tokens of an example.
        seed: of the split and the order.
        seconds: time from ``begun`` on, kept but for `TIMED_STEPS` steps that are always taken; None: no limit.
        begun: a ``time.perf_counter()``; None: now.
        optimizer: one that `new_optimizer` made for these parameters, its state carried on; None: a new one.
        on_look: called with (step, measure).
        team: of processes that all make this call; each has its share of a step's examples. None: this one alone.
    """
    team = team or Team()
    begun = time.perf_counter() if begun is None else begun
    order = random.Random(seed)
    trained, held = split(examples, settings.held_out, order)
    looked = time.perf_counter()
    before = best = measure(held)
    look = time.perf_counter() - looked
    state = [value.detach().clone() for value in parameters]
    optimizer = optimizer or new_optimizer(parameters, settings.rate)
    rates = {id(group["params"][0]): group["lr"] for group in _groups(parameters, settings.rate)}
    peaks = [rates[id(group["params"][0])] for group in optimizer.param_groups]
    per_step = max(1, round(settings.rows / max(rows(trained[0]), 1)), team.size)
    source = _endless(trained, order)
    steps, step, kept, waited, marked, share = settings.steps, 0, 0, 0, before, 1.0
    timed, each = time.perf_counter(), 0.0

    def too_late() -> bool:
        """Whether a further step leaves no time for a look: steps may become slower than those that were timed."""
        return seconds is not None and time.perf_counter() - begun + each + look > seconds

    while step < steps:
        if step == TIMED_STEPS and seconds is not None:
            each = max((time.perf_counter() - timed) / TIMED_STEPS - look * (step // settings.look_every) / step, 1e-9)
            left = seconds - (timed - begun) - look  # the last look, wherever it falls
            affordable = max(int(left / (each + look / settings.look_every)), TIMED_STEPS)
            steps = min(steps, team.first(partial(int, affordable)))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = share * peak * _schedule(step, steps)
        optimizer.zero_grad(set_to_none=True)
        for example in team.share([next(source) for _ in range(per_step)]):
            (loss(example) / per_step).backward()
        team.add_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        late = seconds is not None and step >= TIMED_STEPS and team.first(too_late)
        if step % settings.look_every and step != steps and not late:
            continue
        now = measure(held)
        if on_look is not None:
            on_look(step, now)
        if now < best:
            best, kept = now, step
            for good, value in zip(state, parameters, strict=True):
                good.copy_(value.detach())
        else:
            share *= SHORTER
            _set(parameters, state)
        waited = 0 if now < marked * (1 - settings.least_gain) else waited + 1
        marked = min(marked, now) if waited == 0 else marked
        if late or waited >= settings.patience or not math.isfinite(now):
            break
    optimizer.zero_grad(set_to_none=True)
    _set(parameters, state)
    return Tuned(before, best, step, kept, time.perf_counter() - begun)


@torch.no_grad()
def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def new_optimizer(parameters: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """AdamW as `tune` uses it: one group a tensor."""
    return torch.optim.AdamW(_groups(parameters, rate), betas=BETAS, weight_decay=0.0)


def split(examples: Sequence[T], held_out: float, order: random.Random) -> tuple[list[T], list[T]]:
    """(trained on, held out), at random; without a part that is held out, both are all."""
    shuffled = order.sample(list(examples), len(examples))
    if not held_out:
        return shuffled, shuffled
    count = min(max(round(held_out * len(examples)), 1), len(examples) - 1)
    return shuffled[count:], shuffled[:count]


@contextmanager
def trainable(module: nn.Module, *, matrices: bool = False) -> Iterator[list[nn.Parameter]]:
    """The factors of structured layers and all vectors (norm gains, biases), as float32 leaves with gradients on.

    With ``matrices`` also those of dense layers; embeddings, and heads that share theirs, stay.

    All other parameters are off inside. Flags, gradients and dtypes are as before afterwards.
    """
    chosen: dict[int, nn.Parameter] = {}
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    for part in module.modules():
        layer = isinstance(part, StructuredLinear) or (matrices and is_linear(part))
        for value in part.parameters(recurse=False):
            wanted = (layer or value.ndim <= 1) and value.numel()  # nothing is left of a layer that was pruned away
            if wanted and value.is_floating_point() and id(value) not in embeddings:
                chosen[id(value)] = value
    flags = [(value, value.requires_grad, value.grad) for value in module.parameters()]
    try:
        with in_float32(module, list(chosen.values())):
            try:
                for value, _, _ in flags:
                    value.grad = None
                    value.requires_grad_(id(value) in chosen)
                with torch.enable_grad():
                    yield list(chosen.values())
            finally:
                for value, flag, _ in flags:
                    value.grad = None
                    value.requires_grad_(flag)
    finally:
        for value, _, gradient in flags:
            value.grad = gradient


@contextmanager
def in_float32(module: nn.Module, trained: Sequence[Tensor] = ()) -> Iterator[None]:
    """All floating tensors of a module in float32 inside; afterwards the very ones before, the trained ones rounded."""
    learnt = {id(value) for value in trained}
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    others = [(one, one.data) for one in tensors if one.is_floating_point() and one.dtype != torch.float32]
    try:
        for value, before in others:
            value.data = before.to(torch.float32)
        yield
    finally:
        for value, before in others:
            value.data = value.data.to(before.dtype) if id(value) in learnt else before


def as_float32(inputs: Any) -> Any:
    """What a module is called with, floating tensors in float32."""
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)  # torch's trees know none of transformers' mappings
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda x: x.to(torch.float32) if x.is_floating_point() else x, inputs
    )


def row_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over rows of the squared difference, relative to the square of the row that is wanted.

    Norms follow a block's output, so each row's relative error is what counts. Tokens with massive activations, whose
    squares are a thousand times the others', would otherwise be all that is trained on. Rows of a single number, which
    may be near zero by chance, are relative to the mean square of all.
    """
    size = wanted.square().mean(-1)
    if wanted.shape[-1] == 1:
        size = size.mean()
    return ((found - wanted).square().mean(-1) / size.clamp_min(1e-12)).mean()


def first_tensor(output: Any) -> Tensor:
    """A module's output, or the first of several.

    Raises:
        IsogridError: it is no tensor.
    """
    if isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise IsogridError(f"training compares tensors, a block gives {type(output).__name__}; compress without it")
    return output


def _groups(parameters: Sequence[nn.Parameter], rate: float) -> list[dict[str, Any]]:
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


def _endless(examples: Sequence[T], order: random.Random) -> Iterator[T]:
    while True:
        yield from order.sample(list(examples), len(examples))
