"""Block refinement: train what a block has got so that its outputs come back to the original block's.

The last word of AA-SVD (Sinha & Fleuret 2026, section 3) and of fitting theory 6: after its layers are fitted, all
factors, gains and biases of one block are trained on the squared difference between its outputs on the compressed
model's inputs and the original block's outputs on the original ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isogrid.compress.calibrate import real_rows
from isogrid.compress.lockstep import Halt
from isogrid.compress.tuning import Tuning, as_float32, first_tensor, row_loss, trainable, tune
from isogrid.errors import IsogridError


@dataclass(frozen=True)
class Refinement(Tuning):
    """How blocks are trained: each takes ``steps``, and ``minutes`` are for all blocks together."""

    spoken: ClassVar[str] = "refinement"


@dataclass(frozen=True)
class BlockReport:
    """What the refinement of one block did.

    Attributes:
        name: of the block.
        before: relative error of its outputs on the held-out windows before training: the root of the mean over rows
            of ``||found - wanted||² / ||wanted||²``.
        after: the same after it; not above ``before``.
        steps: taken.
        kept: the step whose state was kept; 0: the start.
        seconds: of the training.
    """

    name: str
    before: float
    after: float
    steps: int
    kept: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dict(vars(self))


OnBlock = Callable[[BlockReport], None]


@dataclass(frozen=True)
class Example:
    """One batch at a block: how it is called, and what the original block gave.

    Attributes:
        halt: the call.
        wanted: ``(..., n)`` the original block's output.
        batch: the calibration batch it belongs to, for its mask.
    """

    halt: Halt
    wanted: Tensor
    batch: Any


def refine_block(
    name: str,
    block: nn.Module,
    examples: Sequence[Example],
    settings: Refinement,
    *,
    seed: int = 0,
    seconds: float | None = None,
) -> BlockReport:
    """Train a block in place; it comes back in its dtype and with its gradients' flags as they were.

    Trained are the factors of its structured layers and all vectors (gains of norms, biases); matrices that were left
    dense stay.

    Args:
        name: of the block, for errors and the report.
        block: the compressed block.
        examples: what it is called with, and what it should give.
        settings: see `Refinement`.
        seed: of the order of windows.
        seconds: time for this block; None: no limit.

    Raises:
        IsogridError: fewer than two examples, or a block whose outputs are no tensors.
    """
    begun = time.perf_counter()
    if len(examples) < 2:
        raise IsogridError(
            f"block {name!r}: refinement trains on some batches and holds out others, got {len(examples)}; "
            "give more calibration windows"
        )

    def loss(example: Example) -> Tensor:
        args, kwargs = as_float32((example.halt.args, example.halt.kwargs))
        found = real_rows(first_tensor(block(*args, **kwargs)), example.batch)
        return row_loss(found, real_rows(example.wanted, example.batch).to(torch.float32))

    @torch.no_grad()
    def measure(some: Sequence[Example]) -> float:
        return (sum(float(loss(example)) for example in some) / len(some)) ** 0.5

    with trainable(block) as parameters:
        found = tune(
            parameters,
            examples,
            loss,
            measure,
            settings,
            rows=lambda example: example.wanted[..., 0].numel(),
            seed=seed,
            seconds=seconds,
            begun=begun,
        )
    return BlockReport(name, found.before, found.after, found.steps, found.kept, found.seconds)
