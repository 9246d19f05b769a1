"""End-to-end distillation: the last step, on what the model as a whole says instead of what its blocks give.

Blocks refined one by one can't know which of their errors matter; here the compressed model's factors, gains and biases
learn the original model's predictions (Kullback-Leibler divergence of the next token's distribution), or where a model
predicts nothing, its outputs. The third level of the published three-level recipes (activation-aware document 3.10).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isogrid.compress.calibrate import forward_calls, real_rows
from isogrid.compress.team import Team
from isogrid.compress.tuning import Tuned, Tuning, as_float32, first_tensor, in_float32, row_loss, trainable, tune
from isogrid.errors import IsogridError

# What a picture counts for among tokens: its rows of pixels are many, its answer is one.
PICTURE_ROWS = 32


@dataclass(frozen=True)
class Distillation(Tuning):
    """How the whole model is trained: as blocks are, in fewer and smaller steps."""

    spoken: ClassVar[str] = "distillation"

    steps: int = 100
    rate: float = 0.001


@dataclass(frozen=True)
class TokenDistillation(Distillation):
    """Dense layers are trained too, and each token's hidden state after each block is to come near the original's.

    ZipLM's loss (arXiv 2302.04089): predictions and tokens, without labels. Blocks need no mapping, since pruning
    leaves their number and the hidden size as they are. Its weights and temperature are ours.

    Attributes:
        predictions: weight of the divergence of predictions, or where a model predicts nothing, of the squared relative
            error of its rows' mean output: a sentence encoder's embedding.
        tokens: weight of the squared relative errors of hidden states, mean over blocks and real tokens.
        temperature: of the compared predictions.
    """

    spoken: ClassVar[str] = "training after pruning"

    predictions: float = 1.0
    tokens: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.predictions, self.tokens) < 0 or self.predictions + self.tokens == 0 or not self.temperature > 0:
            raise IsogridError(
                f"distillation takes weights of 0 or more, not both 0, and a positive temperature; got predictions="
                f"{self.predictions:g}, tokens={self.tokens:g}, temperature={self.temperature:g}"
            )

    def loss(self, found: Any, wanted: Any, batch: Any) -> Tensor:
        """Of a student's and a teacher's output for one batch, with their hidden states."""
        total = self.predictions * _prediction_loss(found, wanted, batch, self.temperature) if self.predictions else 0.0
        if self.tokens:
            pairs = list(zip(found.hidden_states[1:], wanted.hidden_states[1:], strict=True))
            losses = [row_loss(real_rows(ours, batch), real_rows(theirs, batch)) for ours, theirs in pairs]
            total = total + self.tokens * torch.stack(losses).mean()
        return torch.as_tensor(total)


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
    optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer] | None = None,
    on_look: Callable[[int, float], None] | None = None,
    accelerator: Any = None,
) -> Tuned:
    """Train a compressed model in place towards a teacher's predictions on calibration batches.

    Args:
        model: in eval mode; its structured layers and vectors are trained, with `TokenDistillation` its dense layers.
        teacher: the original model, in eval mode.
        batches: small ones: one pass over a batch, forward and back, is held in memory at once.
        settings: see `Distillation`.
        seed: of the order of windows.
        optimizer: makes the optimizer of the trained parameters, or gives one whose state is carried on.
        on_look: called with (step, measure on the held-out windows).
        accelerator: an ``accelerate.Accelerator`` whose processes, each with the model on its own device, share every
            step's windows; None: this process alone.

    Returns:
        What was reached: mean divergence in nats a token, or the relative error of outputs; with `TokenDistillation`
        its loss.

    Raises:
        IsogridError: fewer than two batches, or outputs that are no tensors.
    """
    if len(batches) < 2:
        raise IsogridError(
            f"distillation trains on some batches and holds out others, got {len(batches)}; give more windows"
        )
    batches = [as_float32(batch) for batch in batches]
    places = range(len(batches))
    team = Team(accelerator)
    by_token = isinstance(settings, TokenDistillation)
    options = {"output_hidden_states": True} if by_token else {}
    student_runs, teacher_runs = (forward_calls(one, batches, **options) for one in (model, teacher))
    between = settings.loss if isinstance(settings, TokenDistillation) else distance

    def loss(place: int) -> Tensor:
        with team.autocast():
            with torch.no_grad():
                wanted = teacher_runs[place]()
            return between(student_runs[place](), wanted, batches[place])

    @torch.no_grad()
    def measure(some: Sequence[int]) -> float:
        return team.total(sum(float(loss(place)) for place in team.share(some))) / len(some)

    with trainable(model, matrices=by_token) as parameters, in_float32(teacher):
        return tune(
            parameters,
            places,
            loss,
            measure,
            settings,
            rows=lambda place: rows_of(batches[place]),
            seed=seed,
            seconds=None if settings.minutes is None else 60 * settings.minutes,
            optimizer=None if optimizer is None else optimizer(parameters),
            on_look=on_look,
            team=team,
        )


def distance(found: Any, wanted: Any, batch: Any) -> Tensor:
    """Of two outputs of a model for one batch: mean divergence in nats a row of logits, else `row_loss`."""
    ours, theirs = (real_rows(_outputs(one), batch) for one in (found, wanted))
    if _scored(found, wanted) and ours.shape[-1] > 1:
        return _divergence(ours, theirs)
    return row_loss(ours.to(torch.float32), theirs.to(torch.float32))  # also of single logits: no softmax knows them


def _prediction_loss(found: Any, wanted: Any, batch: Any, temperature: float) -> Tensor:
    """Divergence at a temperature, times its square to keep the gradients' size (Hinton et al. 2015), or `row_loss`."""
    if not _scored(found, wanted):
        means = [_mean_rows(_outputs(one).to(torch.float32), batch) for one in (found, wanted)]
        return row_loss(means[0], means[1])
    if found.logits.shape[-1] == 1:
        return distance(found, wanted, batch)
    ours, theirs = (real_rows(one.logits, batch) / temperature for one in (found, wanted))
    return temperature**2 * _divergence(ours, theirs)


def _divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean over rows of logits of the divergence from the distributions of theirs."""
    pair = [one.log_softmax(-1, dtype=torch.float32) for one in (ours, theirs)]
    return nn.functional.kl_div(pair[0], pair[1], reduction="batchmean", log_target=True)


def _scored(*outputs: Any) -> bool:
    return all(isinstance(getattr(one, "logits", None), Tensor) for one in outputs)


def _mean_rows(output: Tensor, batch: Any) -> Tensor:
    """The mean of a row's outputs over its real tokens, ``(rows, n)``."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != output.shape[:-1]:
        return output.flatten(1, -2).mean(1) if output.ndim > 2 else output
    real = mask.to(output).unsqueeze(-1)
    return (output * real).sum(1) / real.sum(1).clamp_min(1)


def _outputs(output: Any) -> Tensor:
    if _scored(output):
        return torch.as_tensor(output.logits)
    if isinstance(output, Mapping):
        output = next((value for value in output.values() if isinstance(value, Tensor)), None)
    return first_tensor(output)


def rows_of(batch: Any) -> int:
    """Rows of a batch: tokens of its first tensor of integers, or rows of features; `PICTURE_ROWS` of a picture."""
    tensors = [batch] if isinstance(batch, Tensor) else list(batch.values() if isinstance(batch, Mapping) else batch)
    first = next((value for value in tensors if isinstance(value, Tensor)), None)
    if first is None:
        return 1
    if not first.is_floating_point():
        return first.numel()
    return PICTURE_ROWS * first.shape[0] if first.ndim >= 4 else first.shape[:-1].numel()
