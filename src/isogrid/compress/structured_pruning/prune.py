"""Prune a model to a speedup, or to several: in one shot, or step by step with distillation in between."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from isogrid.compress.calibrate import evaluation_mode
from isogrid.compress.distill import TokenDistillation, distill, original_view
from isogrid.compress.milliseconds import measured_together
from isogrid.compress.structured_pruning.pruner import CHECKS, Pruner, require_choice
from isogrid.compress.structured_pruning.search import Found
from isogrid.compress.structured_pruning.summary import PruningReport
from isogrid.compress.team import Team
from isogrid.compress.tuning import new_optimizer
from isogrid.errors import BudgetError, IsogridError
from isogrid.optim import follow_cuts

# Of training that is given minutes.
MOST_STEPS = 1_000_000


def prune(
    model: nn.Module,
    calibration: Any,
    *,
    speedup: float,
    allocate: str = "search",
    trials: int = 32,
    train: TokenDistillation | float | None = None,
    **options: Any,
) -> PruningReport:
    """Make a transformers model faster, in place: fewer heads, groups of heads and channels, whole modules gone.

    Args:
        model: Llama's kind (grouped keys and values too), BERT's, GPT-2's or ViT's. Hidden size, embeddings and norms
            stay; `isogrid.save` and ``save_pretrained`` write the smaller layers, ``from_pretrained`` reads them.
        calibration: data that the model is kept right on: see `as_batches`.
        speedup: of a pass of the whole model on this machine, above 1.
        allocate: see `Pruner.choose`.
        trials: likewise.
        train: afterwards, distillation from the model as it was, on the same data: minutes, or a `TokenDistillation`.
        options: of `Pruner`: ``inputs`` (the batch whose time counts), ``tokenizer``, ``length``, ``how``, ``select``,
            ``repeats``, ``seed``, ``say``; ``accelerator``, see `prune_family`.

    Raises:
        IsogridError: see `Pruner`; the model is then as it was.
        BudgetError: the speedup can't be reached; names the largest that can.
    """
    found = prune_family(
        model, calibration, speedups=[speedup], allocate=allocate, trials=trials, train=train, in_place=True, **options
    )
    return next(found)[1]


def prune_family(
    model: nn.Module,
    calibration: Any,
    *,
    speedups: Sequence[float],
    gradual: bool = False,
    allocate: str = "search",
    trials: int = 32,
    train: TokenDistillation | float | None = None,
    in_place: bool = False,
    accelerator: Any = None,
    **options: Any,
) -> Iterator[tuple[nn.Module, PruningReport]]:
    """A model for each speedup, from one calibration and one table of times.

    Args:
        model: see `prune`; left as it is unless ``in_place``.
        calibration: likewise.
        speedups: of a pass of the whole model, each against the dense one.
        gradual: each model comes from the one before, pruned further and trained again (ZipLM's way); otherwise each
            comes from the dense one.
        allocate: see `Pruner.choose`.
        trials: likewise.
        train: see `prune`; for each of the models.
        in_place: the model itself is pruned: for one speedup, or gradually. Save each model before asking for the next.
        accelerator: an ``accelerate.Accelerator`` whose processes all make this call, each with the model on its own
            device: times and choices are the first one's, training is shared. None: this process alone.
        options: of `Pruner`.

    Yields:
        Each model, in eval mode, and its report. The gradual way yields the same model again, smaller.

    Raises:
        IsogridError: no speedups, or several in place that aren't gradual; see `prune`. What can be known to be wrong
            is refused before anything is measured.
    """
    if not speedups:
        raise IsogridError("prune takes a speedup, such as 1.5")
    for speedup in speedups:
        require_choice(speedup, allocate, trials)
    asked = sorted(set(speedups))
    if in_place and not gradual and len(asked) > 1:
        raise IsogridError(f"one model can't have the speedups {asked} at once; prune gradually, or not in place")
    if gradual and train is None:
        raise IsogridError("gradual pruning trains between its steps: give minutes of training, or a TokenDistillation")
    # Dense layers take many steps to recover: minutes are all used, unless nothing is gained any more.
    settings = TokenDistillation(minutes=train, steps=MOST_STEPS) if isinstance(train, int | float) else train
    begun = time.perf_counter()
    if options.get("checks") is None:
        options["checks"] = 0 if options.get("times") is not None else CHECKS
    team = Team(accelerator)
    options["team"] = team
    pruner = Pruner(model, calibration, **options)
    if settings is not None and len(pruner.batches) < 2:
        raise IsogridError(
            f"training after pruning holds out some batches, the calibration has {len(pruner.batches)}; give more "
            "windows"
        )
    for speedup in asked:  # all are known to be in reach before the first is worked on
        _chosen(team, pruner, speedup, allocate="errors")
    # Its own numbers, as training changes the model's; a view is enough where nothing is trained.
    dense = copy.deepcopy(model) if settings is not None and in_place else original_view(model)
    current: nn.Module = model if in_place else copy.deepcopy(model)
    optimizer: torch.optim.Optimizer | None = None
    left: list[str] = []
    for number, speedup in enumerate(asked):
        if number and gradual:
            if not left:
                raise BudgetError(f"a speedup of {speedup:g} can't be reached: all modules are gone; ask for less")
            options["times"] = pruner.times
            options["select"] = left
            pruner = Pruner(current, pruner.batches, **options)  # data may be read once only
        elif number:
            current = copy.deepcopy(model)
        found = _chosen(team, pruner, speedup, allocate=allocate, trials=trials)
        report = pruner.apply(found, speedup, current)
        team.settle(current)
        repeats = options.get("repeats", 9)
        left = [name for name in pruner.modules if found.units[name]]
        both = {"dense": dense, "pruned": current}
        report.milliseconds = team.first(partial(measured_together, both, pruner.inputs, repeats))
        if settings is not None:
            if gradual and optimizer is not None:
                follow_cuts(optimizer, pruner.cuts)
            carried = optimizer if gradual else None
            optimizer = _trained(current, dense, pruner, settings, report, carried, accelerator)
        report.seconds, begun = time.perf_counter() - begun, time.perf_counter()
        yield current.eval(), report


def _chosen(team: Team, pruner: Pruner, speedup: float, **how: Any) -> Found:
    """`Pruner.choose`, in the first process: it times what it chooses, and corrects its table of times by that."""
    found, pruner.times = team.first(lambda: (pruner.choose(speedup, **how), pruner.times))
    return found


def _trained(
    model: nn.Module,
    teacher: nn.Module,
    pruner: Pruner,
    settings: TokenDistillation,
    report: PruningReport,
    carried: torch.optim.Optimizer | None,
    accelerator: Any,
) -> torch.optim.Optimizer:
    used: list[torch.optim.Optimizer] = []

    def optimizer(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        # A bias that a layer has gained since is new to the optimizer.
        one = carried
        if one is None:
            one = new_optimizer(parameters, settings.rate)
        else:
            held = {id(value) for group in one.param_groups for value in group["params"]}
            for value in parameters:
                if id(value) not in held:
                    one.add_param_group({"params": [value], "lr": settings.rate})
        used.append(one)
        return one

    most = f"{settings.steps} steps" if settings.minutes is None else f"{settings.minutes:g} minutes"
    pruner.say(f"training towards the dense model: {most} of {settings.rows} tokens a step at most")
    with evaluation_mode(teacher), evaluation_mode(model):
        report.distilled = distill(
            model, teacher, pruner.batches, settings, seed=pruner.seed, optimizer=optimizer, accelerator=accelerator
        )
    return used[0]
