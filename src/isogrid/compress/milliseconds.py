"""Budgets in time: what one forward pass of the model takes on this machine.

A layer's own time is measured where it runs, inside the model; a member's as a quotient, beside the dense product of
the same sizes, in turns (`isogrid.evaluation.compare`). Quotients are kept in the machine's table of speeds.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.compress.calibrate import forward_calls
from isogrid.compress.distill import original_view
from isogrid.compress.prices import Prices
from isogrid.errors import BudgetError, IsogridError
from isogrid.evaluation import Timing, compare, evaluating, interleaved_medians, wait_for_gpu
from isogrid.formats import Budget, Dense, Format, new_factors
from isogrid.linear import keeps_its_codes, linear_matrix, prefers_dense, speed_table

# Shares of the dense parameters at which formats are timed where a share of the time is asked for.
SHARES = tuple(0.05 * step for step in range(1, 20))
# Passes that are not timed: so many at least, and for so long: an idle processor takes its time to run fast.
WARMUP, WARM_SECONDS = 2, 1


@dataclass(frozen=True)
class Milliseconds:
    """How long one forward pass of the whole model may take, on this machine with its threads as they are.

    Attributes:
        limit: milliseconds.
        inputs: one batch as the model takes it: token windows ``(1, 512)``, a mapping of keyword arguments, …; None:
            the first row of the calibration data.
        repeats: timed passes and products; medians count.
    """

    limit: float
    inputs: Any = None
    repeats: int = 9

    def __post_init__(self) -> None:
        if not self.limit > 0 or self.repeats < 1:
            raise IsogridError(
                f"Milliseconds: the limit is above 0 and there is a repeat at least, got {self.limit:g} ms, "
                f"{self.repeats} repeats"
            )

    def __str__(self) -> str:
        return f"{self.limit:g} ms"


class TimedPrices(Prices):
    """Nanoseconds of the layers' products in one pass.

    Args:
        model: dense; it is left as it is.
        layers: name to dense layer.
        budget: for its inputs and repeats.
        batches: calibration batches, for inputs that the budget doesn't name.

    Attributes:
        total: nanoseconds of a pass of the dense model.
        outside: of it, outside the layers.

    Raises:
        IsogridError: no inputs, or the model can't take them.
    """

    sizes = 16
    multiple = 16  # blocks of products on all processors that we know

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], budget: Milliseconds, batches: Sequence[Any] | None
    ) -> None:
        super().__init__(layers)
        self.repeats = budget.repeats
        self.inputs = one_row(batches) if budget.inputs is None else budget.inputs
        own, self._rows, self.total = _watched(model, layers, self.inputs, budget.repeats)
        # Layers of one kind take the same time: what differs between them is noise.
        kinds: dict[tuple[int, ...], list[float]] = {}
        for name, taken in own.items():
            kinds.setdefault(self._kind(name), []).append(taken)
        self._dense = {name: round(statistics.median(kinds[self._kind(name)])) for name in own}
        self.outside = self.total - sum(self._dense.values())
        self._quotients: dict[tuple[Any, ...], float] = {}

    def of(self, name: str, member: Format) -> int:
        """Nanoseconds of the layer in the format; 0 for a layer that the pass doesn't reach."""
        if name not in self._dense:
            return 0
        return round(self._dense[name] * (1.0 if isinstance(member, Dense) else self._quotient(name, member)))

    def within(self, name: str, fmt: Format, limit: int) -> Format:
        """Of the members at `SHARES`, the largest that is fast enough."""
        out_features, in_features = linear_matrix(self.layers[name]).shape
        members: list[Format] = []
        for share in SHARES:
            try:
                members.append(fmt.sized(out_features, in_features, Budget.keep(share, out_features, in_features)))
            except BudgetError:
                continue
        prices = {member: self.of(name, member) for member in members}
        allowed = [member for member in members if prices[member] <= limit]
        if not allowed:
            least = min(prices.values(), default=0)
            raise BudgetError(
                f"layer {name!r}: the fastest member of {fmt.label()} takes {least / 1e6:.3f} ms of {limit / 1e6:.3f}; "
                "allow more, allocate='global', or skip the layer"
            )
        return allowed[-1]

    def predicted(self, members: Mapping[str, Format]) -> float:
        """Milliseconds of a pass with layers in these members."""
        return (self.outside + sum(self.of(name, member) for name, member in members.items())) / 1e6

    def limit(self, budget: Milliseconds) -> tuple[int, float]:
        """Nanoseconds that the budget leaves to the layers, and the share of their own time that it is.

        Raises:
            BudgetError: more than the dense model takes, or less than it takes outside the layers.
        """
        left = round(1e6 * budget.limit) - self.outside
        whole = self.whole()
        if not 0 < left < whole:
            raise BudgetError(
                f"a pass of the dense model takes {self.total / 1e6:.4g} ms, {self.outside / 1e6:.4g} of it outside "
                f"the selected layers; the budget is {budget}: give something between"
            )
        return left, left / whole

    def _kind(self, name: str) -> tuple[int, ...]:
        return (*linear_matrix(self.layers[name]).shape, self._rows.get(name, 0))

    def _quotient(self, name: str, member: Format) -> float:
        """A member's time over the dense product's."""
        matrix = linear_matrix(self.layers[name])
        (out_features, in_features), rows = matrix.shape, self._rows[name]
        key = (member, out_features, in_features, rows, getattr(self.layers[name], "bias", None) is not None)
        if key not in self._quotients:
            table = speed_table()
            bias = getattr(self.layers[name], "bias", None)
            sizes = (member.label(), out_features, in_features, matrix.dtype, rows)
            times = table.times(*sizes, bias=bias is not None)
            if times is None:
                factors = new_factors(member, out_features, in_features, dtype=matrix.dtype, device=matrix.device)
                member.initialize(factors, out_features, in_features, torch.Generator().manual_seed(0))
                times = compare(
                    member, factors, out_features, in_features, matrix.dtype, rows, bias=bias, repeats=self.repeats
                )
                table.learn(*sizes, times, bias=bias is not None)
                table.save()
            # A layer that is slower multiplies densely, unless it is there to save memory.
            densely = prefers_dense(times) and not keeps_its_codes(member, out_features, in_features)
            self._quotients[key] = 1.0 if densely else times["structured"] / times["dense"]
        return self._quotients[key]


def measured_beside_dense(
    model: nn.Module, dense: Mapping[str, nn.Module], inputs: Any, repeats: int
) -> dict[str, Timing]:
    """Times of a pass, "structured" as the model is and "dense" with other layers put in, in turns.

    Args:
        model: compressed; it is left as it is.
        dense: the layers that it had before.
        inputs: one batch.
        repeats: of each.
    """
    before = original_view(model)
    for name, module in dense.items():
        before.set_submodule(name, module)
    return measured_together({"structured": model, "dense": before}, inputs, repeats)


def measured_together(models: Mapping[str, nn.Module], inputs: Any, repeats: int) -> dict[str, Timing]:
    """Times of one pass of each model on the same batch, in turns."""
    with ExitStack() as states:
        for model in models.values():
            states.enter_context(evaluating(model))
        passes = {name: forward_calls(model, [inputs])[0] for name, model in models.items()}
        return interleaved_medians(passes, repeats=repeats, warmup=WARMUP)


def one_row(batches: Sequence[Any] | None) -> Any:
    """The first row of the first batch, of whatever kind; None where there is none.

    Raises:
        IsogridError: no batch to take it from.
    """
    if not batches:
        raise IsogridError("a budget in milliseconds needs an input to time: Milliseconds(limit, inputs=batch)")
    first = batches[0]
    if isinstance(first, Mapping):
        return {key: value[:1] if isinstance(value, Tensor) else value for key, value in first.items()}
    if isinstance(first, tuple | list):
        return tuple(value[:1] if isinstance(value, Tensor) else value for value in first)
    return first[:1]


def _now() -> int:
    wait_for_gpu()
    return time.perf_counter_ns()


def _watched(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any, repeats: int
) -> tuple[dict[str, float], dict[str, int], int]:
    """Nanoseconds of each layer in a pass and of the pass, medians over repeats, and each layer's rows in a call."""
    (run,) = forward_calls(model, [inputs])
    taken: dict[str, list[int]] = {}
    rows: dict[str, int] = {}
    now: dict[str, int] = {}
    begun: dict[str, int] = {}

    def before(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, arguments: Any, named: Any) -> None:
            rows[name] = (arguments[0] if arguments else next(iter(named.values()))).shape[:-1].numel()
            begun[name] = _now()

        return hook

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(*_: Any) -> None:  # a layer may run several times in a pass
            now[name] = now.get(name, 0) + _now() - begun[name]

        return hook

    hooks = [module.register_forward_pre_hook(before(name), with_kwargs=True) for name, module in layers.items()]
    hooks += [module.register_forward_hook(after(name)) for name, module in layers.items()]
    passes: list[int] = []
    try:
        with evaluating(model):
            warm = time.perf_counter_ns() + WARM_SECONDS * 1_000_000_000
            turns = itertools.count()
            while len(passes) < repeats:
                now.clear()
                start = _now()
                run()
                if next(turns) >= WARMUP and start >= warm:
                    passes.append(_now() - start)
                    for name, value in now.items():
                        taken.setdefault(name, []).append(value)
    finally:
        for hook in hooks:
            hook.remove()
    return (
        {name: float(statistics.median(values)) for name, values in taken.items()},
        rows,
        round(statistics.median(passes)),
    )
