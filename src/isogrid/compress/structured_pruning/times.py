"""How much time each module saves at each size, measured on this machine.

A block of the model is timed as it is and with one module cut to each size, in turns, on the inputs that it gets in the
model; so is the whole model beside its blocks. Time is never replaced by operation counts: it is flat below some widths
and steps at the processor's tiles. What looks for the fastest sizes would choose noise: more structures are taken to
cost no less time, and what all blocks save together is what the whole model saves with every module cut to a half.
Tables are kept in the user's cache, one file for a machine, a model and its inputs.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.compress.calibrate import forward_calls
from isogrid.errors import IsogridError, IsogridWarning
from isogrid.evaluation import Timing, evaluating, interleaved_medians
from isogrid.kernels import cache_folder
from isogrid.linear import Coupled, shrink
from isogrid.report import read_json, write_json

WARMUP = 2
WHOLE_REPEATS = 31
# Sizes timed in turns; the block as it is among them each time.
TOGETHER = 8
MOST_CORRECTION = 2.0
# Keys of configs that name a block's activation.
ACTIVATIONS = ("hidden_act", "activation_function", "hidden_activation")
LEAST_SECONDS, MOST_REPEATS = 2.0, 101


@dataclass(frozen=True)
class SavedTimes:
    """Milliseconds.

    Attributes:
        base: a pass of the dense model.
        saved: by module, by structures kept: what the pass takes less; below 0 where it takes more.
    """

    base: float
    saved: Mapping[str, Mapping[int, float]]

    def predicted(self, units: Mapping[str, int]) -> float:
        """A pass with these numbers of structures; modules that aren't named are dense."""
        return self.base - sum(self.saved[name][kept] for name, kept in units.items())

    def corrected(self, units: Mapping[str, int], measured: float) -> SavedTimes:
        """All that is saved in the proportion that makes these sizes take so many milliseconds.

        No more than by a factor of `MOST_CORRECTION`: what is further off is no matter of proportion.
        """
        said, true = self.base - self.predicted(units), self.base - measured
        factor = min(max(true / said, 1 / MOST_CORRECTION), MOST_CORRECTION) if said > 0 else 1.0
        saved = {name: {kept: value * factor for kept, value in of.items()} for name, of in self.saved.items()}
        return SavedTimes(self.base, saved)


def measure_times(
    model: nn.Module,
    modules: Mapping[str, Coupled],
    levels: Mapping[str, Sequence[int]],
    inputs: Any,
    *,
    repeats: int = 9,
    cached: bool = True,
    say: Callable[[str], object] = lambda _: None,
) -> SavedTimes:
    """Time a model and its blocks.

    Args:
        model: dense; it is left as it is.
        modules: see `find_coupled`.
        levels: by module, the numbers of structures to time; the whole number costs nothing to ask for.
        inputs: one batch as the model takes it: the batch size, length and dtype that the time counts for.
        repeats: of each call, at least; medians count.
        cached: take what was measured here before for the same model, inputs and threads; what is measured is kept
            either way.
        say: told what happens.

    Raises:
        IsogridError: a module outside of the model's repeated blocks, or inputs that the model can't take.
    """
    kinds: dict[str, list[str]] = {}
    for name, module in modules.items():
        kinds.setdefault(_kind(model, module, levels[name]), []).append(name)
    place = _place(model, kinds, inputs)
    known = _kept(place) if cached else None
    if known is None:
        say(f"timing {sum(len(levels[names[0]]) for names in kinds.values())} sizes of {len(kinds)} kinds of modules")
        known = _measured(model, modules, levels, kinds, inputs, repeats)
        try:
            write_json({"milliseconds": known}, place)
        except OSError as error:
            warnings.warn(f"measured times are not kept: {error}", IsogridWarning, stacklevel=2)
    saved: dict[str, dict[int, float]] = {}
    for number, names in enumerate(kinds.values()):
        for name in names:
            of = {units: known[f"{number} {units}"] for units in levels[name] if units != modules[name].units}
            saved[name] = of | {modules[name].units: 0.0}
    return SavedTimes(known["base"], {name: saved[name] for name in modules})


def _kept(place: Path) -> dict[str, float] | None:
    try:
        known: dict[str, float] = read_json(place)["milliseconds"]
    except (OSError, IsogridError, KeyError):  # no file, half a file, one of another version
        return None
    return known


def _measured(
    model: nn.Module,
    modules: Mapping[str, Coupled],
    levels: Mapping[str, Sequence[int]],
    kinds: Mapping[str, Sequence[str]],
    inputs: Any,
    repeats: int,
) -> dict[str, float]:
    """``{"base": ms, "<kind> <units>": ms saved}``."""
    first = {number: modules[names[0]] for number, names in enumerate(kinds.values())}
    blocks = {number: block_of(model, module.name) for number, module in first.items()}
    calls = _captured(model, set(blocks.values()), inputs)
    (run,) = forward_calls(model, [inputs])
    found: dict[str, float] = {}
    with evaluating(model):
        dense = {place: partial(_call, model.get_submodule(place), *calls[place]) for place in calls}
        together = _in_turns({"": run, **dense}, repeats)
        found["base"] = together[""].median
        for number, module in first.items():
            place = blocks[number]
            sizes = [units for units in levels[module.name] if units != module.units]
            for begin in range(0, len(sizes), TOGETHER):
                some = sizes[begin : begin + TOGETHER]
                cut = {str(u): _cut_block(model.get_submodule(place), place, module, u) for u in some}
                others = {key: partial(_call, block, *calls[place]) for key, block in cut.items()}
                times = _in_turns({"": dense[place]} | others, repeats)
                for units in some:
                    # A quotient of calls in turns, in the milliseconds of blocks that ran in turns with the model.
                    share = 1 - times[str(units)].median / times[""].median
                    found[f"{number} {units}"] = together[place].median * share
            order = sorted(sizes)
            steady = falling([found[f"{number} {units}"] for units in order])
            found |= {f"{number} {units}": value for units, value in zip(order, steady, strict=True)}
        scale = _whole_scale(model, modules, levels, kinds, found, inputs, repeats)
    return {key: value if key == "base" else value * scale for key, value in found.items()}


def _whole_scale(
    model: nn.Module,
    modules: Mapping[str, Coupled],
    levels: Mapping[str, Sequence[int]],
    kinds: Mapping[str, Sequence[str]],
    found: Mapping[str, float],
    inputs: Any,
    repeats: int,
) -> float:
    """What the model saves with every module cut to about a half, over the sum of what the blocks alone save."""
    summed = 0.0
    halves = {}
    for number, names in enumerate(kinds.values()):
        for name in names:
            whole = modules[name].units
            _, halves[name] = min((abs(size - whole / 2), size) for size in levels[name])
            if halves[name] != whole:
                summed += found[f"{number} {halves[name]}"]
    saved = found["base"] * (1 - share_of_time(model, modules, halves, inputs, repeats))
    return saved / summed if min(saved, summed) > 0 else 1.0


def share_of_time(
    model: nn.Module, modules: Mapping[str, Coupled], units: Mapping[str, int], inputs: Any, repeats: int
) -> float:
    """A pass with modules cut to these numbers of structures over one of the model as it is, in turns.

    Args:
        model: left as it is; the cut one shares its numbers: which structures are cut does not matter to time.
        modules: of it.
        units: by module.
        inputs: one batch.
        repeats: of each pass, at least.
    """
    shared: dict[int, Any] = {id(value): value for value in (*model.parameters(), *model.buffers())}
    cut = copy.deepcopy(model, shared)
    for name, module in modules.items():
        if units[name] < module.units:
            shrink(cut, module, range(units[name]))
    runs = {"whole": forward_calls(model, [inputs])[0], "cut": forward_calls(cut.eval(), [inputs])[0]}
    with evaluating(model):
        times = _in_turns(runs, max(repeats, WHOLE_REPEATS))
    return times["cut"].median / times["whole"].median


def falling(values: Sequence[float]) -> list[float]:
    """The nearest values, by squares, none of which is above the one before (pools of adjacent violators)."""
    pools: list[tuple[float, int]] = []  # (mean, how many)
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] < mean:
            before, others = pools.pop()
            mean, count = (mean * count + before * others) / (count + others), count + others
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Short calls are repeated more often: what else the machine does disturbs them more."""
    begun = time.perf_counter()
    for call in calls.values():
        call()
    once = time.perf_counter() - begun
    more = min(int(LEAST_SECONDS / max(once, 1e-9)), MOST_REPEATS)
    return interleaved_medians(calls, repeats=max(repeats, more), warmup=WARMUP)


def _cut_block(block: nn.Module, place: str, module: Coupled, units: int) -> nn.Module:
    """The block with one module of fewer structures; all other numbers are shared."""
    shared: dict[int, Any] = {id(value): value for value in (*block.parameters(), *block.buffers())}
    twin = copy.deepcopy(block, shared)  # a memo maps ids to what stands for them

    def within(name: str) -> str:
        return "" if name == place else name.removeprefix(f"{place}.")

    inside = replace(
        module,
        name=within(module.name),
        producers=tuple(replace(one, layer=within(one.layer)) for one in module.producers),
        writer=within(module.writer),
        holder=within(module.holder),
    )
    shrink(twin, inside, range(units))
    return twin.eval()


def _call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return block(*args, **kwargs)


def _captured(model: nn.Module, places: set[str], inputs: Any) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What blocks are called with in a pass."""
    (run,) = forward_calls(model, [inputs])
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def watch(place: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(place, (args, kwargs))

        return hook

    handles = [model.get_submodule(p).register_forward_pre_hook(watch(p), with_kwargs=True) for p in places]
    try:
        with evaluating(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(places - seen.keys())
    if missing:
        raise IsogridError(f"block {missing[0]!r} is not called by the inputs that are timed; give others")
    return seen


def block_of(model: nn.Module, name: str) -> str:
    """The repeated block (an element of a ``nn.ModuleList``) that a module lies in.

    Raises:
        IsogridError: it lies in none.
    """
    lists = [place for place, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    around = [place for place in lists if name.startswith(f"{place}.") or not place]
    if not around:
        raise IsogridError(f"module {name!r} is not in a repeated block (nn.ModuleList); its time can't be told apart")
    place = max(around, key=len)
    return f"{place}.{name.removeprefix(f'{place}.').partition('.')[0]}"


def _kind(model: nn.Module, module: Coupled, levels: Sequence[int]) -> str:
    """Modules of one kind take the same time at the same size."""
    block = model.get_submodule(block_of(model, module.name))
    shapes = [(key, tuple(value.shape), str(value.dtype)) for key, value in block.named_parameters()]
    return json.dumps([module.kind, module.units, module.width, list(levels), type(block).__name__, shapes])


def _place(model: nn.Module, kinds: Mapping[str, Sequence[str]], inputs: Any) -> Path:
    """The file of these times: of this processor, version of torch, number of threads, model and form of inputs."""
    described = [
        torch.cpu.get_capabilities().get("cpu_name"),
        torch.__version__,
        torch.get_num_threads(),
        next((str(value.device) for value in model.parameters()), "cpu"),
        getattr(getattr(model, "config", None), "_attn_implementation", None),
        {kind: len(names) for kind, names in kinds.items()},
        # What is outside of the blocks takes time, too.
        sorted([key, list(value.shape), str(value.dtype)] for key, value in model.named_parameters()),
        [str(getattr(getattr(model, "config", None), key, None)) for key in ACTIVATIONS],
        torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        _form(inputs),
    ]
    name = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    return cache_folder() / "modules" / f"{type(model).__name__}-{name}.json"


def _form(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return [str(inputs.dtype), list(inputs.shape)]
    if isinstance(inputs, Mapping):
        return {key: _form(value) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return [_form(value) for value in inputs]
    return repr(inputs)
