"""Layers of other packages beside ours: torch-structured's Monarch, and the Block Tensor-Train of tensorly-torch.

    pip install -e ".[peers]"
    python benchmarks/layer_peers.py [--threads 1] [--widths 768 2048] [--rows 1 16 256] [--repeats 31]

Each pair holds the same numbers and is checked to compute the same. What tensorly-torch calls BlockTT is a tensor train
whose cores carry a row and a column digit each: our TensorTrain; our BlockTensorTrain is the one of Qiu et al. 2024,
which no package has. Quotients of interleaved medians in one process; of forward passes and of passes with backward.
Either package may be missing: its lines are then left out. torch-structured does not import without triton.
"""

from __future__ import annotations

import argparse
import itertools
import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from isogrid import StructuredLinear
from isogrid.errors import IsogridError
from isogrid.evaluation import interleaved_times, ratio_interval

warnings.filterwarnings("ignore")  # of the peers: deprecations, missing CUDA extensions
Pair = tuple[str, StructuredLinear, nn.Module]


def monarchs(width: int, dtype: torch.dtype) -> Iterator[Pair]:
    """Monarch with 4 blocks and 16."""
    try:
        from torch_structured.monarch.monarch_linear import MonarchLinear  # type: ignore[import-not-found]
    except ImportError as error:
        print(f"without torch-structured ({error})")
        return
    for blocks in (4, 16):
        ours = StructuredLinear(width, width, f"monarch(blocks={blocks})", bias=False, dtype=dtype)
        theirs = MonarchLinear(width, width, bias=False, nblocks=blocks).to(dtype)
        with torch.no_grad():
            theirs.w1.copy_(ours.right)
            theirs.w2.copy_(ours.left)
        yield "torch-structured", ours, theirs


def trains(width: int, dtype: torch.dtype) -> Iterator[Pair]:
    """Two cores with bonds of 4 and 16."""
    try:
        from tltorch import FactorizedLinear  # type: ignore[import-not-found]
    except ImportError as error:
        print(f"without tensorly-torch ({error})")
        return
    for rank in (4, 16):
        ours = StructuredLinear(width, width, f"tensor_train(rank={rank})", bias=False, dtype=dtype)
        m, n = ours.format.sides(width, width)  # type: ignore[attr-defined]
        theirs = FactorizedLinear(tuple(n), tuple(m), bias=False, factorization="blocktt", rank=rank).to(dtype)
        with torch.no_grad():
            for core, factor in zip(theirs.parameters(), ours.factors.values(), strict=True):
                core.copy_(factor)
        yield "tensorly-torch", ours, theirs


def check(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Raise unless both compute the same."""
    with torch.no_grad():
        one, other = ours(x).float(), theirs(x).float()
    error = float((one - other).norm() / one.norm())
    if error > (1e-4 if x.dtype == torch.float32 else 3e-2):
        raise IsogridError(f"{type(theirs).__name__} computes something else than ours: relative error {error:.3g}")


def passes(layer: nn.Module, x: Tensor, gradient: Tensor, *, backward: bool) -> Callable[[], None]:
    """A forward pass in inference, or one with backward."""

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def both() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(gradient)

    return both if backward else forward


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 2048])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--repeats", type=int, default=31)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {asked.threads} threads; ms are medians, quotients have 95 % intervals")
    means: dict[tuple[str, str, bool], list[float]] = {}
    for width, dtype in itertools.product(asked.widths, (torch.float32, torch.bfloat16)):
        for package, ours, theirs in itertools.chain(monarchs(width, dtype), trains(width, dtype)):
            dense = nn.Linear(width, width, bias=False, dtype=dtype)
            ours.product = "structured"
            check(ours, theirs, torch.randn(7, width, dtype=dtype))
            for rows, backward in itertools.product(asked.rows, (False, True)):
                x = torch.randn(rows, width, dtype=dtype, requires_grad=backward)
                gradient = torch.randn(rows, width, dtype=dtype)
                layers = {"ours": ours.train(backward), "theirs": theirs.train(backward), "dense": dense}
                times = interleaved_times(
                    {name: passes(layer, x, gradient, backward=backward) for name, layer in layers.items()},
                    repeats=asked.repeats,
                )
                over, speedup = (ratio_interval(times[name], times["ours"]) for name in ("theirs", "dense"))
                name = str(dtype).removeprefix("torch.")
                means.setdefault((package, name, backward), []).append(over.value)
                print(
                    f"{package}, {ours.format.label()}, {width} x {width}, {rows} rows, {name}, "
                    f"{'forward + backward' if backward else 'forward'}: {over.value:.2f} x theirs "
                    f"[{over.lower:.2f}, {over.upper:.2f}], {speedup.value:.2f} x dense"
                )
    for (package, name, backward), quotients in means.items():
        mean = math.exp(sum(map(math.log, quotients)) / len(quotients))
        print(
            f"{package}, {name}, {'forward + backward' if backward else 'forward'}: {mean:.2f} x theirs, geometric "
            f"mean of {len(quotients)}"
        )


if __name__ == "__main__":
    main()
