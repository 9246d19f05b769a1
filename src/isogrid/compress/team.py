"""Several processes that train one model together, by Accelerate; one alone where none were launched."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from isogrid.errors import IsogridError

T = TypeVar("T")


class Team:
    """What a training asks of the processes it runs in: all take the same steps, each on its share of the data.

    Args:
        accelerator: an ``accelerate.Accelerator``; None: this process is alone.

    Raises:
        IsogridError: mixed precision in float16, whose gradients would need scaling.
    """

    def __init__(self, accelerator: Any = None) -> None:
        self._accelerator = accelerator
        self.size: int = 1 if accelerator is None else accelerator.num_processes
        self.rank: int = 0 if accelerator is None else accelerator.process_index
        if accelerator is not None and accelerator.mixed_precision == "fp16":
            raise IsogridError("training after compression scales no gradients: mixed_precision is 'no' or 'bf16'")

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those that this process works on; together the processes have all."""
        return items[self.rank :: self.size]

    def first(self, compute: Callable[[], T]) -> T:
        """What the first process computes; the others wait for it. Where it raises, all do."""
        if self.size == 1:
            return compute()
        from accelerate.utils import broadcast_object_list

        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = compute()
            except Exception as error:
                told[1] = error
        broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        found: T = told[0]
        return found

    def total(self, value: float) -> float:
        """The sum over the processes."""
        if self.size == 1:
            return value
        device = self._accelerator.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        return float(self._accelerator.reduce(torch.tensor(value, dtype=wide, device=device), "sum"))

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Each gradient becomes the sum of the processes' own; one that a process lacks counts as zeros."""
        if self.size == 1:
            return
        for value in parameters:
            mine = torch.zeros_like(value) if value.grad is None else value.grad
            value.grad = self._accelerator.reduce(mine, "sum")

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        """Give every process the first one's numbers."""
        if self.size == 1:
            return
        from accelerate.utils import broadcast

        for value in [*model.parameters(), *model.buffers()]:
            value.copy_(broadcast(value.detach()))

    def autocast(self) -> AbstractContextManager[Any]:
        """The accelerator's mixed precision."""
        return nullcontext() if self._accelerator is None else self._accelerator.autocast()


def launched() -> Any:
    """An ``Accelerator`` where ``accelerate launch`` or ``torchrun`` started several processes, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import Accelerator

    return Accelerator()
