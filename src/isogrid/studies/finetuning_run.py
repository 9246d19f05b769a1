"""One run of the fine-tuning study: train, evaluate, account, resume."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from isogrid.data import LabelledTexts
from isogrid.evaluation import forget_peak_memory, peak_memory_bytes
from isogrid.models import LoRALinear, SentenceClassifier
from isogrid.optim import ProjectedAdamW, memory_breakdown, projection_flops, refresh_flops
from isogrid.report import write_csv
from isogrid.studies.finetuning_methods import METHODS, Setting
from isogrid.training.factored import FactoredLinear, trainable

FILES = ("epoch_loss.csv", "epoch_peak_memory.csv", "flops.csv", "memory_breakdown.csv")


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


def inputs_with_gradient(model: nn.Module, ids: Tensor) -> frozenset[str]:
    """Names of the layers whose inputs take a gradient: all but the first ones of a model that is frozen below."""
    found = set()

    def look(module: nn.Module, given: tuple[Any, ...], name: str) -> None:
        if given and isinstance(given[0], Tensor) and given[0].requires_grad:
            found.add(name)

    handles = [module.register_forward_pre_hook(partial(look, name=name)) for name, module in model.named_modules()]
    training = model.training
    try:
        model.eval()(ids)  # without dropout, which would draw
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return frozenset(found)


def step_flops(model: nn.Module, below: frozenset[str]) -> tuple[int, int]:
    """Multiplications and additions of forward and backward pass: (for a token of the encoder, for a sentence).

    Closed form over the linear layers: a product of ``in`` and ``out`` features costs ``2 in out`` forward, as much for
    its input's gradient where that is needed, as much for its weight's where that trains. Attention's own products and
    what is elementwise are left out, as the source's profiler leaves out the first.

    Args:
        model: with an ``encoder`` and a head.
        below: what `inputs_with_gradient` gave.
    """
    token, sentence = 0, 0
    for name, module in model.named_modules():
        # (in, out, whether the weight trains, whether the input takes a gradient)
        products: list[tuple[int, int, bool, bool]] = []
        if isinstance(module, nn.Linear):
            needs = module.weight.requires_grad
            products = [(module.in_features, module.out_features, needs, name in below)]
        elif isinstance(module, FactoredLinear):
            thin = module.right.requires_grad or name in below or module.scale.requires_grad
            products = [
                (module.in_features, module.rank, module.right.requires_grad, name in below),
                (module.rank, module.out_features, module.left.requires_grad, thin),
            ]
        elif isinstance(module, LoRALinear):  # its frozen layer is a module of its own
            rank = module.down.shape[0]
            products = [
                (module.base.in_features, rank, True, name in below),
                (rank, module.base.out_features, True, True),
            ]
        cost = sum(2 * i * o * (1 + trains + needs) for i, o, trains, needs in products)
        if name.startswith("encoder."):
            token += cost
        else:
            sentence += cost
    return token, sentence


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
    settings: Mapping[str, Any] | None = None,
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
        settings: what else the run depends on; a checkpoint of other settings is left alone.

    Returns:
        The row of the study's table.
    """
    forget_peak_memory()
    setting = Setting(rank, plan.lr, plan.refresh, seed)
    encoder = make_encoder()
    generator = torch.Generator().manual_seed(seed)
    model = SentenceClassifier(encoder, encoder.config.hidden_size, generator=generator)
    first, _ = encoded(train.texts[:1], tokenizer, plan.length)
    dense = step_flops(model, inputs_with_gradient(model, first))
    made = METHODS[method]
    optimizer = made.begin(model, setting)
    below = inputs_with_gradient(model, first)
    model.train()
    begun = time.perf_counter()
    progress: dict[str, Any] = dict.fromkeys(("epoch", "batch", "step", "seen", "tokens", "sentences", "flops"), 0)
    progress |= {"loss": 0.0, "seconds": 0.0}
    epochs: list[dict[str, Any]] = []
    torch.manual_seed(seed)
    checkpoint = folder / "checkpoint.pt"
    described = {"method": method, "rank": rank, "seed": seed, "examples": len(train), **asdict(plan)}
    whole = described | {"settings": dict(settings or {})}
    if checkpoint.is_file() and plan.checkpoint_every:
        _resume(checkpoint, whole, model, optimizer, setting, progress, epochs)
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
            token, sentence = step_flops(model, below)  # factors may have shrunk
            progress["flops"] += token * ids.numel() + sentence * len(labels)
            progress["tokens"] += ids.numel()
            progress["sentences"] += len(labels)
            made.after_step(model, optimizer, setting, progress["step"])
            if plan.checkpoint_every and progress["step"] % plan.checkpoint_every == 0:
                kept = progress | {"peaks": peaks, "seconds": progress["seconds"] + time.perf_counter() - begun}
                _save(checkpoint, whole, model, optimizer, kept, epochs)
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
    projection = refreshing = 0
    if isinstance(optimizer, ProjectedAdamW):
        projection, refreshing = projection_flops(optimizer) * progress["step"], refresh_flops(optimizer)
    token, sentence = dense
    best = min(epochs, key=lambda row: row["eval_loss"])
    row = {
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
        "predicted_memory": parts["predicted"],
        "peaks": [{**peak, "accounted_bytes": total} for peak in peaks],
        "flops": {
            "steps": progress["step"],
            "tokens": progress["tokens"],
            "sentences": progress["sentences"],
            "training_flops": progress["flops"],
            "projection_flops": projection,
            "refresh_flops": refreshing,
            "total_flops": progress["flops"] + projection + refreshing,
            "dense_training_flops": token * progress["tokens"] + sentence * progress["sentences"],
        },
        "seconds": seconds,
        "epochs": epochs,
    }
    write_files(row, folder)
    checkpoint.unlink(missing_ok=True)
    return row


def write_files(row: Mapping[str, Any], folder: Path) -> None:
    """The four csv files of a run, from its row."""
    write_csv(row["epochs"], folder / "epoch_loss.csv")
    write_csv(row["peaks"], folder / "epoch_peak_memory.csv")
    write_csv([row["flops"]], folder / "flops.csv")
    predicted = row["predicted_memory"]
    write_csv(
        [
            {"part": part, "predicted_bytes": predicted.get(part), "measured_bytes": count}
            for part, count in row["memory"].items()
        ],
        folder / "memory_breakdown.csv",
    )


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
