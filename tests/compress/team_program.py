"""Run as two processes by `test_team`: prunes a small model step by step, and writes what it got."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from isogrid.compress.distill import TokenDistillation
from isogrid.compress.structured_pruning import SavedTimes, prune_family
from tests import models
from tests.compress.test_structured_pruning import made_up


def pruned(accelerator: Accelerator | None) -> list[dict[str, Any]]:
    """What comes of a family of two, pruned step by step."""
    model = models.ARCHITECTURES["llama"].build().double()
    batches = [models.ARCHITECTURES["llama"].batch(seed) for seed in range(8)]
    times = made_up(model)
    if accelerator is not None and accelerator.process_index:  # what another process has measured does not count
        slower = {name: {units: 3 * ms for units, ms in of.items()} for name, of in times.saved.items()}
        times = SavedTimes(3 * times.base, slower)
    settings = TokenDistillation(steps=4, rows=2 * batches[0]["input_ids"].numel(), rate=0.01, look_every=2)
    family = prune_family(
        model, batches, speedups=[1.2, 1.5], gradual=True, train=settings, times=times, trials=2, repeats=1,
        accelerator=accelerator,
    )  # fmt: skip
    return [
        {
            "state": {key: value.clone() for key, value in model.state_dict().items()},
            "units": [module.kept for module in report.modules],
            "after": report.distilled.after,
            "milliseconds": report.milliseconds["pruned"].median,
        }
        for model, report in family
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    together = Accelerator(cpu=True)
    torch.save(pruned(together), Path(sys.argv[1]) / f"found-{together.process_index}.pt")
