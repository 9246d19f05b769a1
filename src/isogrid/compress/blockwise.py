"""One block after the other: its layers fitted in order, then the whole block refined, before the next one begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from isogrid.compress.calibrate import forward_calls
from isogrid.compress.layerwise import InOrder
from isogrid.compress.lockstep import Halt, lockstep
from isogrid.compress.refine import BlockReport, Example, OnBlock, Refinement, refine_block
from isogrid.compress.tuning import first_tensor
from isogrid.errors import IsogridError


def enclosing_blocks(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The outermost members of ``nn.ModuleList``s that hold layers, with the layers; one outside stands for itself."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found: dict[str, list[str]] = {}
    for name in layers:
        outer = [head for head in lists if name.startswith(f"{head}.")]
        block = name
        if outer:
            depth = len(min(outer, key=len).split(".")) + 1
            block = ".".join(name.split(".")[:depth])
        found.setdefault(block, []).append(name)
    return found


def fit_by_blocks(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    visit: InOrder,
    settings: Refinement,
    *,
    anchored: bool,
    seed: int = 0,
    on_block: OnBlock | None = None,
) -> list[BlockReport]:
    """Fit all layers of a block, refine it, go on with the next.

    Args:
        model: its layers are replaced in place, and vectors inside its blocks trained.
        layers: name to module.
        batches: calibration batches.
        visit: fits one layer.
        settings: of the refinement.
        anchored: whether layer fits compare with the original model too.
        seed: of the order of windows.
        on_block: called with the report of each refined block.

    Returns:
        The report of each block that holds more than one layer alone.

    Raises:
        IsogridError: a block is run more than once in a pass.
    """
    blocks = enclosing_blocks(model, layers)
    modules = {name: model.get_submodule(name) for name in blocks}
    reports: list[BlockReport] = []
    trained = 0.0

    def left() -> float | None:
        if settings.minutes is None:
            return None
        waiting = sum(name not in layers for name in blocks) - len(reports)
        return max(60 * settings.minutes - trained, 0.0) / max(waiting, 1)

    def on_unit(name: str, halts: list[Halt]) -> nn.Module:
        nonlocal trained
        if name in layers:
            return visit(name, halts)
        block = modules[name]
        now, before = [h for h in halts if not h.original], [h for h in halts if h.original]
        if [h.index for h in before] != [h.index + len(batches) for h in now]:
            raise IsogridError(f"block {name!r}: the two models went different ways; compress without refinement")
        calls = _calls(block, now)
        for halt, call in zip(before, _calls(block, before), strict=True):
            halt.output = call()
        inner = {layer.removeprefix(f"{name}."): layers[layer] for layer in blocks[name]}
        places = [h.index for h in now]

        def on_layer(layer: str, inside: list[Halt]) -> nn.Module:
            for halt in inside:  # batches that don't come here leave gaps in the numbers
                halt.index = places[halt.index % len(places)] + len(batches) * halt.original
            return visit(f"{name}.{layer}", inside)

        lockstep(block, calls, inner, on_layer, _calls(block, before) if anchored else ())
        examples = [
            Example(halt, first_tensor(original.output), batches[halt.index])
            for halt, original in zip(now, before, strict=True)
        ]
        found = refine_block(name, block, examples, settings, seed=seed, seconds=left())
        trained += found.seconds
        reports.append(found)
        if on_block is not None:
            on_block(found)
        for halt, call in zip(now, calls, strict=True):
            halt.output = call()
        return block

    lockstep(model, forward_calls(model, batches), modules, on_unit, forward_calls(model, batches))
    return reports


def _calls(block: nn.Module, halts: Sequence[Halt]) -> list[Callable[[], Any]]:
    def call(halt: Halt) -> Any:
        with torch.no_grad():
            return block(*halt.args, **halt.kwargs)

    return [partial(call, halt) for halt in halts]
