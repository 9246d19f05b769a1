"""One run of the fine-tuning study: train, evaluate, account, resume."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from isogrid.data import LabelledTexts
from isogrid.evaluation import peak_memory_bytes
from isogrid.models import SentenceClassifier
from isogrid.optim import ProjectedAdamW, memory_breakdown, projection_flops
from isogrid.report import write_csv
from isogrid.studies.finetuning_methods import METHODS, Setting
from isogrid.training.factored import trainable


@dataclass(frozen=True)
class Plan:
    """What all runs of a study share.

    Attributes:
        epochs: passes over the training examples.
        batch: examples of an update.
        length: most tokens of an example.
        lr: learning rate, constant as in the source.
        refresh: steps between bases.
        checkpoint_every: steps between checkpoints from which a killed run goes on; 0 keeps none.
    """

    epochs: int = 2
    batch: int = 32
    length: int = 64
    lr: float = 2e-4
    refresh: int = 50
    checkpoint_every: int = 100


def batches(data: LabelledTexts, tokenizer: Any, plan: Plan, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches ``(ids, mask, labels)`` in an order of their own; examples of like length stand together.

    The order is drawn from the seed alone: shuffled, sorted by length within pieces of sixteen batches, the batches
    shuffled. Padding then is a few per cent.
    """
    draw = random.Random(seed)
    order = list(range(len(data)))
    draw.shuffle(order)
    piece = 16 * plan.batch
    groups = []
    for start in range(0, len(order), piece):
        part = sorted(order[start : start + piece], key=lambda index: len(data.texts[index]))
        groups += [part[i : i + plan.batch] for i in range(0, len(part), plan.batch)]
    draw.shuffle(groups)
    for group in groups:
        yield (*encoded([data.texts[index] for index in group], tokenizer, plan.length), data.labels[group])


def encoded(texts: list[str], tokenizer: Any, length: int) -> tuple[Tensor, Tensor]:
    """Padded ids and mask of texts, cut at a length."""
    found = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


@torch.no_grad()
def evaluate(model: nn.Module, data: LabelledTexts, tokenizer: Any, plan: Plan) -> tuple[float, float]:
    """(mean cross-entropy, accuracy) in evaluation mode."""
    model.eval()
    order = sorted(range(len(data)), key=lambda index: len(data.texts[index]))
    loss, right = 0.0, 0
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        logits = model(*encoded([data.texts[index] for index in part], tokenizer, plan.length))
        labels = data.labels[part]
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(1) == labels).sum())
    model.train()
    return loss / len(data), right / len(data)


def encoder_flops(encoder: nn.Module, tokens: int) -> int:
    """Multiplications and additions of the encoder's linear layers in one forward pass."""
    return sum(
        2 * tokens * layer.in_features * layer.out_features
        for layer in encoder.modules()
        if isinstance(layer, nn.Linear)
    )


def train_run(
    method: str,
    rank: int,
    seed: int,
    make_encoder: Any,
    tokenizer: Any,
    train: LabelledTexts,
    test: LabelledTexts,
    plan: Plan,
    folder: Path,
) -> dict[str, Any]:
    """Train one model and write ``epoch_loss.csv``, ``epoch_peak_memory.csv``, ``flops.csv``, ``memory_breakdown.csv``.

    Args:
        method: a key of `METHODS`.
        rank: its rank.
        seed: of head, adapters, order, dropout and sketches.
        make_encoder: makes a fresh pretrained encoder.
        tokenizer: the encoder's.
        train: training examples.
        test: evaluation examples.
        plan: what all runs share.
        folder: for the files, and for a checkpoint while the run is unfinished.

    Returns:
        The row of the study's table.
    """
    setting = Setting(rank, plan.lr, plan.refresh, seed)
    encoder = make_encoder()
    generator = torch.Generator().manual_seed(seed)
    model = SentenceClassifier(encoder, encoder.config.hidden_size, generator=generator)
    dense_flops = encoder_flops(encoder, 1)
    made = METHODS[method]
    optimizer = made.begin(model, setting)
    model.train()
    begun = time.perf_counter()
    progress: dict[str, Any] = {"epoch": 0, "batch": 0, "step": 0, "loss": 0.0, "seen": 0, "tokens": 0, "seconds": 0.0}
    epochs: list[dict[str, Any]] = []
    torch.manual_seed(seed)
    checkpoint = folder / "checkpoint.pt"
    described = {"method": method, "rank": rank, "seed": seed, "examples": len(train), **asdict(plan)}
    if checkpoint.is_file() and plan.checkpoint_every:
        _resume(checkpoint, described, model, optimizer, setting, progress, epochs)
    peaks: list[dict[str, Any]] = list(progress.pop("peaks", []))
    while progress["epoch"] < plan.epochs:
        order = list(batches(train, tokenizer, plan, 1000 * seed + progress["epoch"]))
        for ids, mask, labels in order[progress["batch"] :]:
            loss = functional.cross_entropy(model(ids, mask), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress["step"] += 1
            progress["batch"] += 1
            progress["loss"] += float(loss.detach()) * len(labels)
            progress["seen"] += len(labels)
            progress["tokens"] += ids.numel()
            made.after_step(model, optimizer, setting, progress["step"])
            if plan.checkpoint_every and progress["step"] % plan.checkpoint_every == 0:
                kept = progress | {"peaks": peaks, "seconds": progress["seconds"] + time.perf_counter() - begun}
                _save(checkpoint, described, model, optimizer, kept, epochs)
        test_loss, accuracy = evaluate(model, test, tokenizer, plan)
        epochs.append(
            {
                "epoch": progress["epoch"] + 1,
                "train_loss": progress["loss"] / progress["seen"],
                "eval_loss": test_loss,
                "eval_accuracy": accuracy,
            }
        )
        peaks.append({"epoch": progress["epoch"] + 1, "process_peak_bytes": peak_memory_bytes()})
        progress |= {"epoch": progress["epoch"] + 1, "batch": 0, "loss": 0.0, "seen": 0}
    seconds = progress["seconds"] + time.perf_counter() - begun
    ids, _ = encoded(train.texts[: plan.batch], tokenizer, plan.length)
    parts = memory_breakdown(model, optimizer, {"input_ids": ids}, lambda out: out.square().mean())
    measured = parts["measured"]
    total = sum(count for part, count in measured.items() if part not in ("of which factors", "saved for backward"))
    projection = projection_flops(optimizer) * progress["step"] if isinstance(optimizer, ProjectedAdamW) else 0
    flops = {
        "steps": progress["step"],
        "tokens": progress["tokens"],
        "dense_step_flops_per_token": 3 * dense_flops,
        "projection_flops": projection,
        "dense_training_flops": 3 * dense_flops * progress["tokens"],
    }
    write_csv(epochs, folder / "epoch_loss.csv")
    write_csv([{**row, "accounted_bytes": total} for row in peaks], folder / "epoch_peak_memory.csv")
    write_csv([flops], folder / "flops.csv")
    write_csv(
        [
            {"part": part, "predicted_bytes": parts["predicted"].get(part), "measured_bytes": measured[part]}
            for part in measured
        ],
        folder / "memory_breakdown.csv",
    )
    checkpoint.unlink(missing_ok=True)
    best = min(epochs, key=lambda row: row["eval_loss"])
    return {
        **described,
        "label": made.label,
        "trainable": sum(parameter.numel() for _, parameter in trainable(model)),
        "train_loss": epochs[-1]["train_loss"],
        "eval_loss": epochs[-1]["eval_loss"],
        "best_eval_loss": best["eval_loss"],
        "best_epoch": best["epoch"],
        "accuracy": epochs[-1]["eval_accuracy"],
        "state_bytes": sum(count for part, count in measured.items() if part.startswith("state: ")),
        "accounted_bytes": total,
        "memory": measured,
        "seconds": seconds,
        "epochs": epochs,
    }


def _save(
    path: Path,
    described: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    epochs: list[dict[str, Any]],
) -> None:
    """A checkpoint beside its place, then renamed into it: a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    torch.save(
        {
            "described": described,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "progress": progress,
            "epochs": epochs,
        },
        beside,
    )
    os.replace(beside, path)


def _resume(
    path: Path,
    described: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    progress: dict[str, Any],
    epochs: list[dict[str, Any]],
) -> None:
    """Put model, optimizer, randomness and place back; a checkpoint of another run is left alone."""
    stored = torch.load(path, weights_only=True)
    if stored["described"] != described:
        return
    # Factors may have been truncated before the checkpoint: the shapes come first.
    METHODS[described["method"]].after_step(model, optimizer, setting, 0 if stored["progress"]["step"] >= 50 else 1)
    model.load_state_dict(stored["model"])
    optimizer.load_state_dict(stored["optimizer"])
    torch.set_rng_state(stored["random"])
    progress.update(stored["progress"])
    epochs.extend(stored["epochs"])
