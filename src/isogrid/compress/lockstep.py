"""All calibration batches through a model at once, halting together before every selected layer.

Sequential compression wants each layer's inputs from the part of the model that is already compressed. Running the
whole model again for every layer costs a square of its depth; knowing how blocks are wired ties the code to
architectures. Instead each batch runs its ordinary forward pass in a thread of its own; before a selected layer it
halts until all batches have come there, the layer is replaced, and all go on through the new one. One pass, any wiring.
Only one thread runs at any time, in a fixed order, so results don't depend on scheduling.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.compress.frugal import frugal_memory
from isogrid.errors import IsogridError

_UNKNOWN = object()


@dataclass
class Halt:
    """A batch that waits before a module, and what the module was called with.

    Attributes:
        index: of the batch; passes through the original model are numbered after the others.
        original: whether it goes through the modules as they were.
        args: positional arguments.
        kwargs: arguments by name.
        output: what the module gives, where `Visit` has computed it already: the pass goes on with that.
    """

    index: int
    original: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = _UNKNOWN

    @property
    def input(self) -> Tensor:
        """The first argument, ``(..., in)`` for a linear layer."""
        # nn.Linear calls its input so, Conv1D calls it x.
        found: Tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return found


Visit = Callable[[str, list[Halt]], nn.Module]


class _Stop(BaseException):
    """Ends a forward pass whose rest is not needed; no handler of ``Exception`` in a model may swallow it."""


class _Runner:
    """One batch's forward pass in its own thread, run and halted by hand."""

    def __init__(self, index: int, forward: Callable[[], Any], stack: _Current, *, original: bool = False) -> None:
        self.index = index
        self.original = original
        self.waiting: tuple[str, Halt] | None = None
        self.finished = False
        self.error: BaseException | None = None
        self.answer: nn.Module | None = None
        self._forward = forward
        self._current = stack
        self._go = threading.Semaphore(0)
        self._halted = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"isogrid-calibration-{index}")
        self._stopping = False
        self._threads = torch.get_num_threads()

    def _run(self) -> None:
        self._go.acquire()
        self._current.runner = self
        # A new thread's matrix products would use all cores whatever the caller has set, and round differently.
        torch.set_num_threads(self._threads)
        try:
            with torch.no_grad():
                self._forward()
        except _Stop:
            pass
        except BaseException as error:  # carried over to the thread that asked
            self.error = error
        self.finished = True
        self._halted.release()

    def resume(self, answer: nn.Module | None = None) -> None:
        """Run until the next halt or the end."""
        self.answer, self.waiting = answer, None
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._halted.acquire()
        if self.finished:
            self._thread.join()

    def halt(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Halt, nn.Module]:
        """Called inside the forward pass: wait at a module; returns the one that takes its place."""
        halt = Halt(self.index, self.original, args, kwargs)
        if not self._stopping:
            self.waiting = (name, halt)
            self._halted.release()
            self._go.acquire()
        if self._stopping or self.answer is None:
            raise _Stop
        return halt, self.answer

    def stop(self) -> None:
        """End the forward pass at its next layer, wherever it is now, and wait for that."""
        self._stopping = True
        self.waiting = None
        if self._thread.ident is not None:
            self._go.release()
            self._thread.join()


class _Current(threading.local):
    """The runner of this thread; None outside of one."""

    runner: _Runner | None = None


def lockstep(
    model: nn.Module,
    forwards: Sequence[Callable[[], Any]],
    layers: Mapping[str, nn.Module],
    visit: Visit,
    originals: Sequence[Callable[[], Any]] = (),
    *,
    finish_originals: bool = False,
) -> set[str]:
    """Run all forward passes, calling ``visit`` once for each selected layer.

    Args:
        model: the model whose layers are replaced in place, one after the other.
        forwards: one callable per batch; each runs the model on it.
        layers: name to module, in the order the model defines them; the modules must be in the model under these
            names, and none within another. They may be layers or whole blocks.
        visit: ``(name, halts) -> module that takes the layer's place`` (it may be the layer itself), halts in batch
            order. Where it sets a halt's ``output``, that pass goes on with it, and no module is called.
        originals: further forward passes, numbered after the others; they halt with them, and go on through the layers
            as they were. With them, layers are replaced in the model when all is done.
        finish_originals: let those run to their end; else they stop where the last layer has been visited.

    Returns:
        Names of the layers that were visited; the others were reached by no batch.

    Raises whatever a forward pass or ``visit`` raises; layers replaced until then stay replaced.
    """
    with frugal_memory() as give_back:
        return _run_together(model, forwards, layers, visit, originals, give_back, finish_originals)


def _run_together(
    model: nn.Module,
    forwards: Sequence[Callable[[], Any]],
    layers: Mapping[str, nn.Module],
    visit: Visit,
    originals: Sequence[Callable[[], Any]],
    give_back: Callable[[], None],
    finish_originals: bool,
) -> set[str]:
    current = _Current()
    replaced: dict[str, nn.Module] = {}
    answered: set[str] = set()  # modules that the passes have got outputs for: they have changed inside
    order = {name: place for place, name in enumerate(layers)}

    def gate(name: str, layer: nn.Module) -> Callable[..., Any]:
        own_forward = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            runner = current.runner
            module = replaced.get(name)
            if runner is not None and name in answered:
                raise IsogridError(f"block {name!r} is run more than once in a pass; compress without refinement")
            if module is None and runner is not None:
                halt, module = runner.halt(name, args, kwargs)
                if halt.output is not _UNKNOWN:
                    return halt.output
            if module is None or module is layer or (runner is not None and runner.original):
                return own_forward(*args, **kwargs)
            return module(args[0] if args else next(iter(kwargs.values())))

        return forward

    # Others (accelerate's hooks) have put a forward of their own there: theirs comes back.
    own = {name: layer.__dict__["forward"] for name, layer in layers.items() if "forward" in layer.__dict__}
    runners = [
        _Runner(index, forward, current, original=index >= len(forwards))
        for index, forward in enumerate([*forwards, *originals])
    ]

    def check(runner: _Runner) -> None:
        if runner.error is not None:
            raise runner.error

    try:
        for name, layer in layers.items():
            layer.forward = gate(name, layer)
        for runner in runners:
            runner.resume()
            check(runner)
        while len(replaced) < len(layers):
            halted = [runner for runner in runners if runner.waiting is not None]
            if not halted:
                break
            # Where batches took different ways (experts), the layer that the model defines first goes first: the
            # batches that wait before it have yet to reach the layers behind it.
            name = min((runner.waiting[0] for runner in halted if runner.waiting is not None), key=order.__getitem__)
            here = [runner for runner in halted if runner.waiting is not None and runner.waiting[0] == name]
            halts = [runner.waiting[1] for runner in here if runner.waiting is not None]
            new = visit(name, halts)
            if any(halt.output is not _UNKNOWN for halt in halts):
                answered.add(name)
            del halts
            give_back()
            # An original that comes here once more has to find the layer as it was.
            if new is not layers[name] and not originals:
                model.set_submodule(name, new)
            replaced[name] = new
            if len(replaced) == len(layers):
                break
            for runner in here:
                runner.resume(new)
                check(runner)
        for runner in runners:
            if finish_originals and runner.original and runner.waiting is not None:
                runner.resume(replaced[runner.waiting[0]])
                check(runner)
    finally:
        try:
            for runner in runners:
                runner.stop()
        finally:
            for name, layer in layers.items():
                layer.__dict__.pop("forward", None)
                if name in own:
                    layer.__dict__["forward"] = own[name]
            for name, new in replaced.items():
                if originals and new is not layers[name]:
                    model.set_submodule(name, new)
    return set(replaced)
