"""What to do with a model: recipes with their size, their time and their quality told beforehand.

A prediction is put together from three measurements. The *survey* tells what each layer loses in each format at each
size, and how sensitive the model is to it: their sum, the predicted rise, holds for small errors. The *response* tells
what becomes of large ones: every layer is replaced by the low-rank matrix of the same error, which one decomposition of
the survey gives at any size, and the model's real rise is measured. The *effect* of anchoring, refining and distilling
is tried out on a few blocks, the others dense: the part of the stand-ins' rise that is left there.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.compress.allocate import check_keep
from isogrid.compress.batches import as_batches
from isogrid.compress.blockwise import enclosing_blocks
from isogrid.compress.calibrate import evaluation_mode, forward_calls
from isogrid.compress.distill import distance, original_view
from isogrid.compress.pipeline import AUTO, as_candidates, compress
from isogrid.compress.plan import Plan, Survey
from isogrid.compress.prices import StoredPrices
from isogrid.compress.recipes import EFFORTS, Effort, Prediction, Recipe
from isogrid.compress.select import select_layers
from isogrid.compress.stand_ins import StandIn, standing_in
from isogrid.compress.summary import stored_bytes
from isogrid.errors import BudgetError, IsogridError
from isogrid.evaluation import is_language_model
from isogrid.fitting import Metric
from isogrid.formats import Budget, Dense, Format, as_format
from isogrid.linear import linear_matrix

# Part of the calibration that predictions are measured on; recipes are calibrated on all of it.
HELD_OUT = 0.125
# Blocks on which the effects of refinement and distillation are tried out.
PROBED_BLOCKS = 4
# Shares of the dense cost at which the response is measured; it is interpolated over the predicted rise.
RESPONSES = (0.95, 0.85, 0.7, 0.55, 0.4)
# A size for a wanted gap is found to this part of the dense parameters.
SIZE_STEP = 0.005
LEAST_KEEP, MOST_KEEP = 0.05, 0.98


class Advisor:
    """Measures a model once, then tells recipes for any size or gap.

    Args:
        model: dense; it is left as it is.
        calibration: data as for `compress`: what recipes will be calibrated on. An eighth of it is kept out of the
            survey, to measure predictions on.
        formats: what recipes may choose from: each alone, and all together.
        unit: a budget, for its unit; None: parameters.
        efforts: what recipes may do.
        tokenizer: for texts.
        length: window length in tokens, for texts.
        select: see `compress`.
        skip: see `compress`.
        seed: of fits, training and sensitivities.
        say: told what is being measured.

    Raises:
        IsogridError: bad input, as in `compress`; fewer than two batches, or three where an effort trains; a weight
            that is computed from others.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Any,
        *,
        formats: Sequence[Format | str] = AUTO,
        unit: Budget | None = None,
        efforts: Sequence[Effort] = EFFORTS,
        tokenizer: Any = None,
        length: int = 512,
        select: str | Sequence[str] | None = None,
        skip: str | Sequence[str] = (),
        seed: int = 0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._model, self._efforts, self._seed, self._say = model, tuple(efforts), seed, say
        self._formats = as_candidates([as_format(one) for one in formats])
        self._layers = select_layers(model, select, skip)
        self._batches = as_batches(calibration, tokenizer, length, model=model, training=True)
        self._check(trains=any(one.refine or one.distill for one in self._efforts))
        whole = len(self._batches)
        count = max(round(HELD_OUT * whole), 1)
        held = {(2 * place + 1) * whole // (2 * count) for place in range(count)}  # texts come sorted by their length
        self._held = [batch for place, batch in enumerate(self._batches) if place in held]
        self._known = [batch for place, batch in enumerate(self._batches) if place not in held]
        self._stand_ins: dict[str, StandIn] = {}
        self._effects: dict[tuple[tuple[Format, ...], str, int], tuple[float, float]] = {}
        self._wanted: list[Any] = []
        self._points: list[tuple[float, float]] = []
        self._plans_within: dict[int, list[Plan]] = {}
        say(f"surveying {len(self._layers)} layers in {len(self._formats)} formats")
        self._survey = Survey(self._layers, self._formats, StoredPrices(self._layers, unit))
        self._survey.measure(model, self._known, self._also)
        self._survey.weigh(model, self._known, seed)
        self._dense_loss = self._measured(model)
        self._dense_cost = self._survey.prices.whole()

    def _check(self, *, trains: bool) -> None:
        least = 3 if trains else 2
        if len(self._batches) < least:
            raise IsogridError(
                f"advise measures on a part of the data{' and trains on two others' if trains else ''}, got "
                f"{len(self._batches)} of {least} batches; give more"
            )
        for name, layer in self._layers.items():
            if "weight" not in dict(layer.named_parameters(recurse=False)):
                raise IsogridError(
                    f"layer {name!r}: its weight is computed from other parameters and can't be tried out; make it a "
                    "parameter (torch.nn.utils.parametrize.remove_parametrizations) or skip the layer"
                )

    @property
    def unit_of_gap(self) -> str:
        """What gaps of this model are counted in."""
        if self._wanted[0] is None:
            return "nats a token"
        logits = getattr(self._wanted[0], "logits", None)
        scores = isinstance(logits, Tensor) and logits.shape[-1] > 1  # as `distance` compares them
        return "nats a prediction" if scores else "squared relative error of outputs"

    def for_keep(self, keep: float) -> list[Recipe]:
        """One recipe an effort for a share of the dense cost, the best format choice in each, the smallest gap first.

        Raises:
            IsogridError: keep is no fraction in (0, 1).
            BudgetError: no format is that small.
        """
        check_keep(keep)
        return self.for_limit(math.floor(keep * self._dense_cost * (1 + 1e-12)))

    def for_limit(self, limit: int) -> list[Recipe]:
        """The same for an amount in the advisor's unit.

        Raises:
            IsogridError: not above 0 and below what the dense matrices take.
            BudgetError: no format is that small.
        """
        if not 0 < limit < self._dense_cost:
            raise IsogridError(
                f"the limit is {limit}, the selected matrices take {self._dense_cost}: give less, above 0"
            )
        plans = self._plans(limit)
        found = [self.predict(_finest(plans), effort) for effort in self._efforts]
        return sorted(found, key=lambda one: one.predicted.gap)

    def for_gap(self, gap: float) -> list[Recipe]:
        """For each effort the smallest recipe whose predicted gap is within one, the smallest first.

        Raises:
            IsogridError: the gap is not positive, or none reaches it.
        """
        if not gap > 0:
            raise IsogridError(f"a gap to stay within is positive, got {gap}")
        found = [self._smallest(effort, gap) for effort in self._efforts]
        reached = [one for one in found if one is not None]
        if not reached:
            raise IsogridError(f"no recipe within {MOST_KEEP:g} of the dense size is said to reach a gap of {gap:g}")
        return sorted(reached, key=lambda one: one.predicted.parameters)

    def predict(self, plan: Plan, effort: Effort) -> Recipe:
        """A plan of this advisor's, under an effort, with what comes of it."""
        return self._recipe(plan, effort, *self._effect(plan, effort))

    def _recipe(self, plan: Plan, effort: Effort, effect: float, seconds: float) -> Recipe:
        parameters, keep = plan.spent(self._layers)
        gap = effect * self._response(_rise(plan))
        return Recipe(effort, plan, Prediction(parameters.limit, keep, self._model_bytes(plan), gap, seconds))

    def plan(self, keep: float, formats: Sequence[Format | str] | None = None) -> Plan:
        """The plan of the least predicted rise for a share of the dense cost, from some of the formats."""
        chosen = None if formats is None else as_candidates([as_format(one) for one in formats])
        return self._survey.best(math.floor(keep * self._dense_cost * (1 + 1e-12)), keep, chosen)

    def _plans(self, limit: int) -> list[Plan]:
        if limit not in self._plans_within:
            self._plans_within[limit] = self._planned(limit)
        return self._plans_within[limit]

    def _planned(self, limit: int) -> list[Plan]:
        share = limit / self._dense_cost
        choices: list[tuple[Format, ...]] = [(one,) for one in self._formats]
        if len(self._formats) > 1:
            choices.append(self._formats)
        plans, refusal = [], None
        for formats in choices:
            try:
                plans.append(self._survey.best(limit, share, formats))
            except BudgetError as error:
                refusal = error
        if not plans:
            assert refusal is not None
            raise refusal
        return plans

    def _smallest(self, effort: Effort, gap: float) -> Recipe | None:
        # A first guess without the effort's effect says at what size to try that out.
        guess = self._smallest_plan(lambda plan: self._response(_rise(plan)) <= gap)
        effect, seconds = self._effect(guess or _finest(self._plans(int(MOST_KEEP * self._dense_cost))), effort)
        plan = self._smallest_plan(lambda plan: effect * self._response(_rise(plan)) <= gap)
        return None if plan is None else self._recipe(plan, effort, effect, seconds)

    def _smallest_plan(self, holds: Callable[[Plan], bool]) -> Plan | None:
        best, low, high = None, LEAST_KEEP, MOST_KEEP
        while high - low > SIZE_STEP:
            middle = (low + high) / 2
            try:
                plan: Plan | None = _finest(self._plans(int(middle * self._dense_cost)))
            except BudgetError:
                plan = None
            if plan is not None and holds(plan):
                best, high = plan, middle
            else:
                low = middle
        return best

    def _model_bytes(self, plan: Plan) -> int:
        total = stored_bytes(self._model)
        for name, member in plan.members.items():
            matrix = linear_matrix(self._layers[name])
            out_features, in_features = matrix.shape
            total += member.cost(out_features, in_features, matrix.dtype).bytes - matrix.nbytes
        return total

    # The response: what becomes of errors together.

    def _also(self, name: str, metric: Metric | None) -> None:
        """Part of the survey: keep what a layer's stand-ins are made of."""
        layer = self._layers[name]
        has_bias = getattr(layer, "bias", None) is not None
        self._stand_ins[name] = StandIn.of(linear_matrix(layer).detach(), metric, has_bias=has_bias)

    def _response(self, rise: float) -> float:
        """The real rise of the loss where the predicted one is this: a line in the logarithms between two measured."""
        if not self._points:
            self._say("measuring what becomes of errors together")
            for share in RESPONSES:
                try:
                    plan = _finest(self._plans(int(share * self._dense_cost)))
                except BudgetError:
                    continue
                found = self._rise_of(plan, self._layers)
                if found > 0 and _rise(plan) > 0:
                    self._points.append((math.log(_rise(plan)), math.log(found)))
            # Where the measurement's noise says that more errors harm less, it is wrong.
            rises, found_rises = zip(*sorted(self._points), strict=True) if self._points else ((), ())
            self._points = list(zip(rises, accumulate(found_rises, max), strict=True))
            if len(self._points) < 2:
                raise IsogridError("the model's loss does not rise with the errors of its layers; nothing to predict")
        wanted = math.log(max(rise, 1e-12))
        place = min(max(bisect_left(self._points, (wanted, -math.inf)), 1), len(self._points) - 1)
        (before, low), (after, high) = self._points[place - 1 : place + 1]
        return math.exp(low + (high - low) / max(after - before, 1e-12) * (wanted - before))

    def _rise_of(self, plan: Plan, names: Iterable[str]) -> float:
        """Measured rise with stand-ins of the planned errors in some layers."""
        errors = {name: self._error(name, plan.members[name]) for name in names}
        with standing_in(self._layers, self._stand_ins, errors):
            return self._measured(self._model) - self._dense_loss

    def _error(self, name: str, member: Format) -> float:
        if isinstance(member, Dense):
            return 0.0
        for one in self._survey.curves.of(name):
            if one.format == member:
                return one.error
        raise IsogridError(f"layer {name!r}: {member.label()} was not surveyed")

    @torch.no_grad()
    def _measured(self, model: nn.Module) -> float:
        """Mean loss on the held-out batches: nats a token, or the outputs' squared relative error."""
        first, total = not self._wanted, 0.0
        with evaluation_mode(model):
            for place, run in enumerate(forward_calls(model, self._held)):
                found, batch = run(), self._held[place]
                loss = _token_loss(found, batch) if is_language_model(model) else None
                if first:  # the dense model
                    self._wanted.append(found if loss is None else None)
                total += float(distance(found, self._wanted[place], batch)) if loss is None else loss
        return total / len(self._held)

    # The effect of anchoring, refinement and distillation.

    def _effect(self, plan: Plan, effort: Effort) -> tuple[float, float]:
        """(part of the stand-ins' rise that is left under an effort, seconds of the whole compression)."""
        key = (plan.formats, effort.name, round(math.log2(max(_rise(plan), 1e-12))))
        if key not in self._effects:
            blocks = list(enclosing_blocks(self._model, self._layers).values())
            count = min(PROBED_BLOCKS, len(blocks))
            probed = [blocks[(2 * place + 1) * len(blocks) // (2 * count)] for place in range(count)]
            names = [name for block in probed for name in block]
            self._say(f"trying {' or '.join(one.name for one in plan.formats)}, {effort.name}, on {count} blocks")
            trial = original_view(self._model)
            begun = time.perf_counter()
            report = compress(
                trial,
                Plan({name: plan.members[name] for name in names}, plan.formats, plan.allocation),
                calibration=self._known,
                anchor=effort.anchor,
                refine=effort.refine,
                distill=effort.distill,
                select=names,
                seed=self._seed,
            )
            whole = time.perf_counter() - begun
            last = 0.0 if report.distilled is None else report.distilled.seconds
            effect = (self._measured(trial) - self._dense_loss) / max(self._rise_of(plan, names), 1e-12)
            # A rise that is lost in the noise of the measurement still tells a size.
            self._effects[key] = (min(max(effect, 0.02), 2.0), (whole - last) * len(blocks) / count + last)
        return self._effects[key]


def _rise(plan: Plan) -> float:
    assert plan.rise is not None
    return plan.rise


def _finest(plans: Sequence[Plan]) -> Plan:
    return min(plans, key=_rise)


@torch.no_grad()
def _token_loss(output: Any, batch: Any) -> float | None:
    """Next-token cross entropy of one batch of tokens with a score for each; None for others."""
    logits = getattr(output, "logits", None)
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(logits, Tensor) or not isinstance(ids, Tensor) or ids.is_floating_point():
        return None
    if logits.shape[:-1] != ids.shape or ids.ndim != 2 or ids.shape[1] < 2 or ids.max() >= logits.shape[-1]:
        return None
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    real = torch.ones_like(ids[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:] != 0
    scored = logits[:, :-1][real.to(logits.device)].to(torch.float32)
    return float(nn.functional.cross_entropy(scored, ids[:, 1:][real].to(logits.device)))
