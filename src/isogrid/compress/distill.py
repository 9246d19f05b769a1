"""End-to-end distillation: the last step, on what the model as a whole says instead of what its blocks give.

Blocks refined one by one can't know which of their errors matter; here the compressed model's factors, gains and biases
learn the original model's predictions (Kullback-Leibler divergence of the next token's distribution), or where a model
predicts nothing, its outputs. The third level of the published three-level recipes (activation-aware document 3.10).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.compress.calibrate import forward_calls, real_rows
from isogrid.compress.tuning import Tuned, Tuning, first_tensor, row_loss, trainable, tune
from isogrid.errors import IsogridError


@dataclass(frozen=True)
class Distillation(Tuning):
    """How the whole model is trained: as blocks are, in fewer and smaller steps."""

    steps: int = 100
    rate: float = 0.001


def original_view(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its matrices and keeps its vectors: the teacher, nearly without memory.

    The model's layers may be replaced and its vectors trained afterwards; the copy stays as it is now.
    """
    shared: dict[int, Any] = {id(value): value for value in model.parameters() if value.ndim > 1}
    shared |= {id(value): value for value in model.buffers()}
    return copy.deepcopy(model, shared)  # a memo maps ids to what stands for them


def distill(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Any],
    settings: Distillation,
    *,
    seed: int = 0,
    on_look: Callable[[int, float], None] | None = None,
) -> Tuned:
    """Train a compressed model in place towards a teacher's predictions on calibration batches.

    Args:
        model: in eval mode; its structured layers and vectors are trained.
        teacher: the original model, in eval mode.
        batches: small ones: one pass over a batch, forward and back, is held in memory at once.
        settings: see `Distillation`.
        seed: of the order of windows.
        on_look: called with (step, measure on the held-out windows).

    Returns:
        What was reached: mean divergence in nats a token, or the relative error of outputs.

    Raises:
        IsogridError: fewer than two batches, or outputs that are no tensors.
    """
    if len(batches) < 2:
        raise IsogridError(
            f"distillation trains on some batches and holds out others, got {len(batches)}; give more windows"
        )
    places = range(len(batches))
    student_runs, teacher_runs = forward_calls(model, batches), forward_calls(teacher, batches)

    def loss(place: int) -> Tensor:
        with torch.no_grad():
            wanted = teacher_runs[place]()
        return distance(student_runs[place](), wanted, batches[place])

    @torch.no_grad()
    def measure(some: Sequence[int]) -> float:
        return sum(float(loss(place)) for place in some) / len(some)

    with trainable(model) as parameters:
        return tune(
            parameters,
            places,
            loss,
            measure,
            settings,
            rows=lambda place: _tokens(batches[place]),
            seed=seed,
            seconds=None if settings.minutes is None else 60 * settings.minutes,
            on_look=on_look,
        )


def distance(found: Any, wanted: Any, batch: Any) -> Tensor:
    """Of two outputs of a model for one batch: mean divergence in nats a row of logits, else `row_loss`."""
    logits, truth = getattr(found, "logits", None), getattr(wanted, "logits", None)
    if isinstance(logits, Tensor) and isinstance(truth, Tensor):
        ours = real_rows(logits, batch).log_softmax(-1, dtype=torch.float32)
        theirs = real_rows(truth, batch).log_softmax(-1, dtype=torch.float32)
        return nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    pair = [real_rows(_outputs(one), batch).to(torch.float32) for one in (found, wanted)]
    return row_loss(pair[0], pair[1])


def _outputs(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        output = next((value for value in output.values() if isinstance(value, Tensor)), None)
    return first_tensor(output)


def _tokens(batch: Any) -> int:
    """Rows of a batch: tokens of its first tensor of integers, or rows of features."""
    tensors = [batch] if isinstance(batch, Tensor) else list(batch.values() if isinstance(batch, Mapping) else batch)
    first = next((value for value in tensors if isinstance(value, Tensor)), None)
    if first is None:
        return 1
    return first.numel() if not first.is_floating_point() else first.shape[:-1].numel()
