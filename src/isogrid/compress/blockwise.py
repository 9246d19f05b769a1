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
from isogrid.compress.progress import Progress
from isogrid.compress.refine import BlockReport, Example, OnBlock, Refinement, refine_block
from isogrid.compress.summary import LayerReport
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


class ByBlocks:
    """Fits all layers of a block, refines it, keeps it on disk, and goes on with the next.

    Args:
        model: its layers are replaced in place, and vectors inside its blocks trained.
        layers: name to module.
        batches: calibration batches.
        visit: fits one layer.
        done: the reports of fitted layers, which ``visit`` adds to.
        settings: of the refinement; None: none.
        anchored: whether layer fits compare with the original model too.
        seed: of the order of windows.
        progress: where finished blocks are kept; None: nowhere.
        on_block: called with the report of each refined block.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        batches: Sequence[Any],
        visit: InOrder,
        done: list[LayerReport],
        settings: Refinement | None,
        *,
        anchored: bool,
        seed: int = 0,
        progress: Progress | None = None,
        on_block: OnBlock | None = None,
    ) -> None:
        self._model, self._layers, self._batches = model, layers, batches
        self._visit, self._done, self._settings = visit, done, settings
        self._anchored, self._seed, self._progress, self._on_block = anchored, seed, progress, on_block
        self._blocks = enclosing_blocks(model, layers)
        self._modules = {name: model.get_submodule(name) for name in self._blocks}
        self._trained = 0.0
        self.reports: list[BlockReport] = []

    def run(self) -> list[BlockReport]:
        """All blocks, in one pass; returns the reports of the refined ones.

        Raises:
            IsogridError: a block is run more than once in a pass.
        """
        originals = forward_calls(self._model, self._batches) if self._needs_originals else ()
        lockstep(self._model, forward_calls(self._model, self._batches), self._modules, self._on_unit, originals)
        return self.reports

    @property
    def _needs_originals(self) -> bool:
        return self._anchored or self._settings is not None

    def _on_unit(self, name: str, halts: list[Halt]) -> nn.Module:
        if name in self._layers:
            return self._visit(name, halts)
        block = self._modules[name]
        now, before = [h for h in halts if not h.original], [h for h in halts if h.original]
        if self._needs_originals and [h.index for h in before] != [h.index + len(self._batches) for h in now]:
            raise IsogridError(f"block {name!r}: the two models went different ways; compress without refinement")
        calls = _calls(block, now)
        if not self._anchored or (self._progress is not None and self._progress.holds(name)):
            for call in _calls(block, before, keep=True):
                call()
        known = None if self._progress is None else self._progress.restore(name, block)
        if known is not None:
            self._done.extend(known[0])
            if known[1] is not None:
                self.reports.append(known[1])
                self._trained += known[1].seconds
        else:
            self._fit(name, block, now, before, calls)
        for call in _calls(block, now, keep=True):
            call()
        return block

    def _fit(
        self, name: str, block: nn.Module, now: list[Halt], before: list[Halt], calls: list[Callable[[], Any]]
    ) -> None:
        inner = {layer.removeprefix(f"{name}."): self._layers[layer] for layer in self._blocks[name]}
        places = [h.index for h in now]

        def on_layer(layer: str, inside: list[Halt]) -> nn.Module:
            for halt in inside:  # batches that don't come here leave gaps in the numbers
                halt.index = places[halt.index % len(places)] + len(self._batches) * halt.original
            return self._visit(f"{name}.{layer}", inside)

        first = len(self._done)
        # What the original block gives comes from the very passes that layers are compared with.
        originals = _calls(block, before, keep=True) if self._anchored else ()
        lockstep(block, calls, inner, on_layer, originals, finish_originals=True)
        self._visit.forget()
        refined = None
        if self._settings is not None:
            examples = [
                Example(halt, first_tensor(original.output), self._batches[halt.index])
                for halt, original in zip(now, before, strict=True)
            ]
            refined = refine_block(name, block, examples, self._settings, seed=self._seed, seconds=self._left())
            self._trained += refined.seconds
            self.reports.append(refined)
        if self._progress is not None:
            self._progress.store(name, block, self._done[first:], refined)
        if refined is not None and self._on_block is not None:
            self._on_block(refined)

    def _left(self) -> float | None:
        """Seconds for the next block."""
        assert self._settings is not None
        if self._settings.minutes is None:
            return None
        waiting = sum(name not in self._layers for name in self._blocks) - len(self.reports)
        return max(60 * self._settings.minutes - self._trained, 0.0) / max(waiting, 1)


def _calls(block: nn.Module, halts: Sequence[Halt], *, keep: bool = False) -> list[Callable[[], Any]]:
    """The block's passes; with ``keep`` what they give is the output of their halts."""

    def call(halt: Halt) -> Any:
        with torch.no_grad():
            output = block(*halt.args, **halt.kwargs)
        if keep:
            halt.output = output
        return output

    return [partial(call, halt) for halt in halts]
