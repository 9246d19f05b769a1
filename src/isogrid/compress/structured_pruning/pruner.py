"""ZipLM: a transformer with fewer heads and channels, as fast as it is asked to be on this machine.

Structures are found from the model (`isogrid.linear.find_coupled`), ordered in one pass over calibration data
(`orders`), timed where they run (`times`), and shared out over the modules by a search (`search`). The order holds for
all sizes, so that one pass gives a model for every speedup.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.checkpoint import PrunedEntry, describe_pruned, mark_structured
from isogrid.compress.batches import as_batches
from isogrid.compress.calibrate import Moments, collect_moments, evaluation_mode, forward_calls
from isogrid.compress.distill import distance, rows_of
from isogrid.compress.milliseconds import one_row
from isogrid.compress.structured_pruning.orders import How, Ordered, order_modules
from isogrid.compress.structured_pruning.search import Found, Units, probed, require_speedup, search, solve
from isogrid.compress.structured_pruning.summary import ModuleReport, PruningReport
from isogrid.compress.structured_pruning.times import SavedTimes, measure_times, share_of_time
from isogrid.compress.summary import count_parameters, stored_bytes
from isogrid.compress.team import Team
from isogrid.errors import BudgetError, IsogridError, IsogridWarning
from isogrid.linear import Coupled, Refused, shrink, survey_coupled

ALLOCATIONS = ("search", "errors", "uniform")
# Widths that are offered: each this part of the one before.
WIDTH_STEP = 0.9
LEAST_WIDTH = 0.05
# Widths are multiples of what products are blocked by, where there are many channels.
MULTIPLES = ((512, 16), (128, 8))
# Parts of a module's structures with which the model is asked what the rest is worth.
PROBES = (0.5, 0.0)
JUDGED_TOKENS = 2048
# Tables add up what modules save alone; a cut model is timed so many times, until they agree with it this well.
CHECKS, CLOSE = 3, 0.02


class Pruner:
    """Everything about a model that does not depend on the speedup, measured once.

    Args:
        model: a transformers model with modules that `find_coupled` knows; dense, or pruned before. It is left as it
            is.
        calibration: see `as_batches`; the more the better: rows beyond the number of channels.
        inputs: one batch, of the size, length and dtype that the speedup is asked for; None: the first row of the data.
        tokenizer: for texts.
        length: window length in tokens, for texts.
        how: see `How`.
        select: patterns of module names, or "attention" and "feed_forward"; None: all. Others stay as they
            are, and may be of a kind that can't be cut.
        times: a table measured before, on the dense model of the same sizes; None: it is measured.
        repeats: of each timed call.
        checks: times that the table is corrected by a cut model's measured time before sizes are chosen; None: 3, and
            none where ``times`` are given.
        cached: keep measured times for the next call on this machine.
        seed: of the search.
        say: told what happens.
        team: of processes that all make this call; the first one's times count.

    Raises:
        IsogridError: unknown architecture, tied or non-finite weights, calibration that doesn't reach a module or is
            not finite; names the layer. No repeats, or checks below 0.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Any,
        *,
        inputs: Any = None,
        tokenizer: Any = None,
        length: int = 512,
        how: How | None = None,
        select: str | Sequence[str] | None = None,
        times: SavedTimes | None = None,
        repeats: int = 9,
        checks: int | None = None,
        cached: bool = True,
        seed: int = 0,
        say: Callable[[str], object] = lambda _: None,
        team: Team | None = None,
    ) -> None:
        if not hasattr(model, "save_pretrained"):
            raise IsogridError(f"{type(model).__name__} is no transformers model; its config has to hold the sizes")
        if repeats < 1 or (checks is not None and checks < 0):
            raise IsogridError(
                f"a call is timed once at least and checked 0 times or more, got repeats={repeats}, checks={checks}"
            )
        self.model, self.how, self.seed, self.say = model, how or How(), seed, say
        every, refused = survey_coupled(model)
        self.modules = _selected(every, refused, select)
        self.batches = as_batches(calibration, tokenizer, length, model=model, training=True)
        self.inputs = one_row(self.batches) if inputs is None else inputs
        checks = (CHECKS if times is None else 0) if checks is None else checks
        if times is None:
            known = {name: levels_of(module) for name, module in self.modules.items()}
            measure = partial(measure_times, model, self.modules, known, self.inputs)
            times = (team or Team()).first(lambda: measure(repeats=repeats, cached=cached, say=say))
        for name in self.modules:
            if name not in times.saved:
                raise IsogridError(f"module {name!r} is not in the given times; measure them with the same select")
        for name, of in times.saved.items():
            if name in refused:
                raise IsogridError(f"module {name!r} is in the given times: {refused[name].why}")
            if name in every and every[name].units not in of:
                unit = every[name].unit
                raise IsogridError(
                    f"module {name!r} has {every[name].units} {unit}s, a number that the given times don't know; "
                    "measure them anew"
                )
        self.times = times
        self.checks, self._repeats = checks, repeats
        # What the model's modules have now: less than all where it was pruned before, none where they are gone.
        self._whole = {name: every[name].units if name in every else 0 for name in times.saved}
        say(f"calibrating {len(self.modules)} modules")
        writers = {module.writer: model.get_submodule(module.writer) for module in self.modules.values()}
        moments = collect_moments(model, writers, self.batches)
        self.calibration = f"{moments.rows} rows, {moments.source}"
        self.warnings = _few_rows(self.modules, moments.rows)
        for message in self.warnings:
            warnings.warn(message, IsogridWarning, stacklevel=2)
        self._order(moments)

    def otherwise(self, how: How) -> Pruner:
        """One that prunes the same model in another way: its data and times are this one's, and not measured again."""
        other = copy.copy(self)
        other.how = how
        other._order(Moments({order.module.writer: order.metric for order in self.orders.values()}))
        return other

    def _order(self, moments: Moments) -> None:
        self.orders = order_modules(self.model, self.modules, moments, self.how)
        # A model that was pruned before may only become smaller; modules that are gone stay so.
        self._curves = {
            name: {u: self.orders[name].error(u) for u in of if u <= self.modules[name].units}
            if name in self.modules
            else {self._whole[name]: 0.0}
            for name, of in self.times.saved.items()
        }
        self._probed: tuple[dict[str, dict[int, float]], int] | None = None
        self._judge = Judge(self.model, self.orders, self.batches, JUDGED_TOKENS)

    def choose(self, speedup: float, *, allocate: str = "search", trials: int = 32) -> Found:
        """How many structures each module keeps.

        Args:
            speedup: of a pass of the whole model, against the dense one.
            allocate: "search", by what the model says of each module alone, then perturbed and judged as a whole;
                "errors", the least sum of relative errors, without asking the model; "uniform", of all modules the same
                part.
            trials: perturbed sets that are judged.

        Raises:
            BudgetError: it can't be reached; names the largest that can.
            IsogridError: a speedup that is none, another way to allocate, or trials below 0.
        """
        require_choice(speedup, allocate, trials)
        first = self._checked(speedup)  # also says where nothing is fast enough
        if allocate == "errors":
            return Found(first)
        if allocate == "uniform":
            units = self._uniform(speedup)
            return Found(units if not self.checks or self._agrees(units) else self._uniform(speedup))
        with evaluation_mode(self.model), torch.no_grad():
            if self._probed is None:
                self.say(f"asking the model what each of {len(self.modules)} modules is worth")
                probes = {name: _probes(of) for name, of in self._curves.items()}
                self._probed = probed(self._curves, probes, self._judge)
            costs, asked = self._probed
            self.say(f"searching sizes for a speedup of {speedup:g}")
            for check in range(min(self.checks, 1) + 1):
                found = search([costs, self._curves], self.times, speedup, self._judge, trials=trials, seed=self.seed)
                asked += found.judged
                if check == min(self.checks, 1) or self._agrees(found.units):
                    break
        return Found(found.units, found.loss, found.first, asked)

    def _checked(self, speedup: float) -> Units:
        """The sizes of the least sum of errors, by times that agree with what these sizes take."""
        units = solve(self._curves, self.times, speedup)
        for _ in range(self.checks):
            if self._agrees(units):
                break
            units = solve(self._curves, self.times, speedup)
        return units

    def _agrees(self, units: Units) -> bool:
        """Whether the table tells the time that these sizes take; where it does not, it is corrected."""
        cut = {name: units[name] for name in self.modules}
        share = share_of_time(self.model, self.modules, cut, self.inputs, self._repeats)
        measured, said = share * self.times.predicted(self._whole), self.times.predicted(units)
        self.say(f"these sizes take {measured:.4g} ms, said {said:.4g}")
        if abs(measured / said - 1) < CLOSE:
            return True
        self.times = self.times.corrected(units, measured)
        return False

    def loss(self, units: Units) -> float:
        """Change of the model's output with modules cut to these numbers, as the search judges it."""
        with evaluation_mode(self.model), torch.no_grad():
            return self._judge(units)

    def apply(self, found: Found, speedup: float, model: nn.Module | None = None) -> PruningReport:
        """Cut a model, in place.

        Args:
            found: the sizes.
            speedup: that was asked for, for the report.
            model: a copy of the pruner's; None: itself, and the pruner is spent.

        Returns:
            The report, without measured times. What became of the parameters is in ``cuts``, for optimizers.
        """
        target: Any = self.model if model is None else model
        entries = describe_pruned(target)
        report = PruningReport(speedup, calibration=self.calibration, warnings=list(self.warnings))
        report.dense_parameters, report.dense_bytes = count_parameters(target), stored_bytes(target)
        report.base_milliseconds, report.predicted_milliseconds = self.times.base, self.times.predicted(found.units)
        numbers: dict[str, tuple[Tensor, Tensor | None]] = {}
        polished = [name for name in self.modules if self.orders[name].polish(found.units[name])]
        self._judge.forget(polished)
        for name, module in self.modules.items():
            units, order, error = found.units[name], self.orders[name], 0.0
            known = entries.get(name, PrunedEntry(module.units, module.units))
            if units < module.units:
                numbers[name] = order.numbers(units)
                error = order.output_error(units, numbers[name])
                gained = numbers[name][1] is not None and order.layer.bias is None
                entries[name] = PrunedEntry(units, known.of, gained or known.bias)
            saved = self.times.saved[name][units]
            report.modules.append(ModuleReport(name, module.unit, units, known.of, error, saved))
        report.first_loss, report.judged = found.first, found.judged
        report.loss = self.loss(found.units) if polished and found.loss is not None else found.loss
        # All numbers are there: from here nothing can fail.
        self.cuts = []
        for name, (weight, bias) in numbers.items():
            kept = self.orders[name].kept(found.units[name])
            self.cuts += shrink(target, self.modules[name], kept, weight=weight, bias=bias)
        mark_structured(target, pruned=entries)
        report.parameters, report.bytes = count_parameters(target), stored_bytes(target)
        return report

    def _uniform(self, speedup: float) -> Units:
        """Of every module the same part, as large as the time allows."""
        limit = self.times.base / speedup
        fits = [
            units
            for share in sorted({units / max(of) for of in self._curves.values() if len(of) > 1 for units in of})
            if self.times.predicted(units := self._at_share(share)) <= limit
        ]
        if not fits:
            raise BudgetError(
                f"a speedup of {speedup:g} can't be reached with the same part of every module; ask for less, or "
                "allocate='search'"
            )
        return fits[-1]

    def _at_share(self, share: float) -> Units:
        return {
            name: min(of, key=lambda units: (abs(units - share * max(of)), -units)) for name, of in self._curves.items()
        }


class Judge:
    """What a model's output changes by when some of its modules are cut: divergence in nats a token, or relative error.

    Cut modules stand in at full size, with columns of zeros: the same numbers as smaller ones.

    Args:
        model: in eval mode while it judges; left as it is.
        orders: of its modules.
        batches: calibration data; so many are used that they have the tokens.
        tokens: to judge by.
    """

    def __init__(self, model: nn.Module, orders: Mapping[str, Ordered], batches: Sequence[Any], tokens: int) -> None:
        self._model, self._orders = model, orders
        some: list[Any] = []
        for batch in batches:
            if sum(map(rows_of, some)) >= tokens:
                break
            some.append(batch)
        self._batches = some
        self._runs = forward_calls(model, some)
        self._wanted: list[Any] = []
        # Refits cost more than looking: kept up to the model's own size.
        self._numbers: OrderedDict[tuple[str, int], tuple[Tensor, Tensor | None]] = OrderedDict()
        self._room = stored_bytes(model)

    def __call__(self, units: Mapping[str, int]) -> float:
        """The loss with these numbers of structures; modules that aren't named are whole."""
        if not self._wanted:
            self._wanted = [run() for run in self._runs]
        whole: list[tuple[nn.Module, Any, Any]] = []
        try:
            for name, kept in units.items():
                order = self._orders.get(name)
                if order is not None and kept < order.module.units:
                    whole.append((order.layer, order.layer.weight, order.layer.bias))
                    self._put(order, kept)
            pairs = zip(self._runs, self._wanted, self._batches, strict=True)
            losses = [float(distance(run(), wanted, batch)) for run, wanted, batch in pairs]
        finally:
            for layer, weight, bias in whole:
                layer.weight, layer.bias = weight, bias
        value = sum(losses) / len(losses)
        return value if value == value else float("inf")

    def forget(self, names: Iterable[str]) -> None:
        """Drop the numbers of modules whose structures are others now."""
        gone = set(names)
        for key in [key for key in self._numbers if key[0] in gone]:
            del self._numbers[key]

    def _put(self, order: Ordered, kept: int) -> None:
        weight, bias = self._found(order, kept)
        layer = order.layer
        full = weight.new_zeros(weight.shape[0], order.module.units * order.module.width)
        full[:, order.module.columns(order.kept(kept)).to(full.device)] = weight
        layer.weight = nn.Parameter(full if isinstance(layer, nn.Linear) else full.mT.contiguous(), False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, False)

    def _found(self, order: Ordered, kept: int) -> tuple[Tensor, Tensor | None]:
        key = order.module.name, kept
        if key not in self._numbers:
            self._numbers[key] = order.numbers(kept)
            while sum(weight.nbytes for weight, _ in self._numbers.values()) > self._room and len(self._numbers) > 1:
                self._numbers.popitem(last=False)
        self._numbers.move_to_end(key)
        return self._numbers[key]


def require_choice(speedup: float, allocate: str, trials: int) -> None:
    """Raise IsogridError for what `Pruner.choose` can't choose by."""
    require_speedup(speedup)
    if allocate not in ALLOCATIONS:
        raise IsogridError(f"allocate is one of {', '.join(ALLOCATIONS)}, got {allocate!r}")
    if trials < 0:
        raise IsogridError(f"a search takes 0 trials or more, got trials={trials}")


def levels_of(module: Coupled) -> tuple[int, ...]:
    """The sizes that a module is offered: every number of heads; widths in steps, and none."""
    if module.kind == "attention":
        return tuple(range(module.units, -1, -1))
    multiple = next((multiple for least, multiple in MULTIPLES if module.units >= least), 1)
    widths = [module.units]
    share = WIDTH_STEP
    while share >= LEAST_WIDTH:
        width = multiple * max(round(share * module.units / multiple), 1)
        if width < widths[-1]:
            widths.append(width)
        share *= WIDTH_STEP
    return (*widths, 0)


def _probes(of: Mapping[int, float]) -> list[int]:
    """Of the sizes of one module those that the model is asked about."""
    most = max(of)
    return sorted({min(of, key=lambda units: abs(units - part * most)) for part in PROBES} - {most})


def _selected(
    modules: Mapping[str, Coupled], refused: Mapping[str, Refused], select: str | Sequence[str] | None
) -> dict[str, Coupled]:
    kinds = {name: one.kind for of in (modules, refused) for name, one in of.items()}
    found: set[str] = set()
    for pattern in ["*"] if select is None else [select] if isinstance(select, str) else select:
        hits = {n for n, kind in kinds.items() if pattern in (kind, n.rpartition(".")[2]) or fnmatchcase(n, pattern)}
        if not hits:
            raise IsogridError(f"no module matches {pattern!r}; there are {', '.join(list(kinds)[:4])}, …")
        found |= hits
    for name, one in refused.items():
        if name in found:
            raise IsogridError(f"{one.why}; to prune others without it, select them by name or kind")
    return {name: module for name, module in modules.items() if name in found}


def _few_rows(modules: Mapping[str, Coupled], rows: int) -> list[str]:
    widest = max(modules.values(), key=lambda one: one.units * one.width)
    if rows >= widest.units * widest.width:
        return []
    return [
        f"{rows} calibration rows for the {widest.units * widest.width} inputs of {widest.writer!r}: what is removed "
        "follows the sample; give 8 times as many rows as inputs"
    ]
