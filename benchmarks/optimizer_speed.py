"""Step time and peak memory of ProjectedAdamW on SmolLM2-135M against galore-torch and torch.optim.AdamW.

    pip install --no-deps galore-torch
    python benchmarks/optimizer_speed.py [--threads 1] [--ranks 16 144]

float32, the same made-up gradients for all. galore-torch projects the same 210 matrices at the same rank and interval.
Ratios are of medians of interleaved steps in one process, in this process' CPU time where there is one thread: what
others on the machine take is left out. Peaks are of one process each, with state and one refresh.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from isogrid.data import load_pretrained
from isogrid.optim import PRESETS, projected_groups

LR = 1e-7
NEVER = 10**6


def galore_adamw() -> Any:
    """The class of galore-torch. Its package imports bitsandbytes for the 8-bit variant, which is not needed here."""
    distribution = importlib.metadata.distribution("galore-torch")
    package = types.ModuleType("galore_torch")
    package.__path__ = [str(Path(str(distribution.locate_file("galore_torch"))))]
    sys.modules["galore_torch"] = package
    from galore_torch.adamw import AdamW  # type: ignore[import-not-found]

    return AdamW


def makers(model: Any, rank: int) -> dict[str, Callable[[], Any]]:
    """Name and maker of every optimizer; each projects what `projected_groups` names, and nothing is decayed."""
    groups = projected_groups(model)

    def theirs() -> Any:
        plain = [{"params": [parameter for _, parameter in group["params"]]} for group in groups]
        plain[0] |= {"rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
        return galore_adamw()(plain, lr=LR, no_deprecation_warning=True)

    def ours(name: str) -> Callable[[], Any]:
        return lambda: PRESETS[name]([dict(group) for group in groups], LR, rank=rank, refresh=NEVER)

    return {
        "galore-torch": theirs,
        "galore": ours("galore"),
        "default": ours("default"),
        "default, no residual": lambda: PRESETS["default"](
            [dict(group) for group in groups], LR, rank=rank, refresh=NEVER, residual="none"
        ),
        "fira": ours("fira"),
        "ldadam": lambda: PRESETS["ldadam"]([dict(group) for group in groups], LR, rank=rank),
        "AdamW": lambda: torch.optim.AdamW(model.parameters(), LR),
        "AdamW, fused": lambda: torch.optim.AdamW(model.parameters(), LR, fused=True),
    }


def model_with_gradients() -> Any:
    """SmolLM2-135M with a gradient everywhere."""
    model, _ = load_pretrained("smollm2-135m")
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=draw)
    return model


def refresh_of(optimizer: Any) -> None:
    """Make the next step find new bases."""
    for state in optimizer.state.values():
        if hasattr(state.get("projector"), "update_proj_gap"):
            state["projector"].update_proj_gap = 1
        if "next_refresh" in state:
            state["next_refresh"] = state["step"]


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run; on one thread those that it was running."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    run()
    return clock() - begun


def times(rank: int, repeats: int, names: list[str]) -> None:
    """Print steady and refreshing steps of every optimizer."""
    model = model_with_gradients()
    made = {name: make() for name, make in makers(model, rank).items() if name in names}
    for optimizer in made.values():
        optimizer.step()
    steady: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(repeats):
        for name, optimizer in made.items():
            steady[name].append(timed(optimizer.step))
    print(f"rank {rank}, steady step, median of {repeats}:")
    medians = {name: statistics.median(found) for name, found in steady.items()}
    for name, median in medians.items():
        ratios = ", ".join(
            f"{medians[other] / median:.2f} x as fast as {other}"
            for other in ("galore-torch", "AdamW", "AdamW, fused")
            if other in medians and other != name
        )
        print(f"  {name}: {1000 * median:.0f} ms; {ratios}")
    refreshed = {}
    for name, optimizer in made.items():
        if name.startswith("AdamW"):
            continue
        refresh_of(optimizer)
        refreshed[name] = timed(optimizer.step)
    for name, seconds in refreshed.items():
        if "galore-torch" in refreshed:
            print(f"  refresh, {name}: {refreshed['galore-torch'] / seconds:.2f} x as fast as galore-torch")


def high_water() -> int:
    """The most memory this program has held resident since its peak was cleared; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peak(rank: int, name: str) -> None:
    """Print the peak memory of this process after two steps, the second of which finds new bases."""
    model = model_with_gradients()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = high_water()
    optimizer = makers(model, rank)[name]()
    optimizer.step()
    refresh_of(optimizer)
    optimizer.step()
    print(json.dumps({"peak": high_water(), "before": before}))


def main() -> None:
    """Measure and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 144])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=None, help="names of optimizers")
    parser.add_argument("--peak", default=None, help="measure this one's peak memory and end")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak is not None:
        peak(arguments.ranks[0], arguments.peak)
        return
    names = arguments.only or [
        *("galore-torch", "galore", "default", "default, no residual", "fira", "ldadam", "AdamW", "AdamW, fused")
    ]
    print(f"{arguments.threads} threads, torch {torch.__version__}")
    for rank in arguments.ranks:
        times(rank, arguments.repeats, names)
        found = {}
        for name in names:
            command = [sys.executable, __file__, "--ranks", str(rank), "--threads", str(arguments.threads)]
            answer = subprocess.run([*command, "--peak", name], check=True, capture_output=True, text=True).stdout
            found[name] = json.loads(answer.splitlines()[-1])
        base = found[names[0]]
        for name, sizes in found.items():
            print(
                f"  peak, {name}: {sizes['peak'] / base['peak']:.3f} of {names[0]}'s; "
                f"above model and gradients {(sizes['peak'] - sizes['before']) / 2**20:,.0f} MiB"
            )


if __name__ == "__main__":
    main()
