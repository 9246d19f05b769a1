"""Products with packed trit planes against dense ones, and how long it takes to find the trits.

    python benchmarks/trit_speed.py [--threads 1]

Times are medians of interleaved runs in one process. At one row weights are read from memory: calls go round copies
larger than the last cache.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from isogrid import StructuredLinear, TritPlanes
from isogrid.evaluation import interleaved_medians
from isogrid.kernels import native

COLD_BYTES = 128 * 2**20
FORMATS = (TritPlanes(), TritPlanes(packing="base_three"), TritPlanes(planes=1), TritPlanes(planes=3))
ROWS = (1, 4, 16, 256)
# A matrix of this shape is fitted, and its time taken for this many parameters.
FITTED, MODEL = (1536, 576), 135e6


def in_turn(layers: list[nn.Module], x: Tensor) -> Callable[[], object]:
    """A call of the next layer, and so on round."""
    turn = itertools.cycle(layers)
    return lambda: next(turn)(x)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=31)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    print(f"{given.threads} threads, torch {torch.__version__}, native products: {bool(native.loaded())}")
    print("| width | rows | dtype | format | bits a weight | dense ms | ours ms | times faster |\n|" + "---|" * 8)
    for width, dtype, rows in itertools.product((2048, 4096), (torch.float32, torch.bfloat16), ROWS):
        source = torch.Generator().manual_seed(0)
        x = torch.randn(rows, width, generator=source).to(dtype)

        def copies(size: int, rows: int = rows) -> int:
            return -(-COLD_BYTES // size) if rows == 1 else 1

        dense = [
            nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(copies(width * width * dtype.itemsize))
        ]
        calls = {"dense": in_turn(dense, x)}
        for fmt in FORMATS:
            one = StructuredLinear(width, width, fmt, bias=False, dtype=dtype, generator=source).eval()
            layers = [one]
            for _ in range(copies(one.cost().bytes) - 1):
                factors = {name: value.clone() for name, value in one.factors.items()}
                layers.append(StructuredLinear.from_factors(fmt, factors, width, width).eval())
            calls[fmt.label()] = in_turn(layers, x)
        found = interleaved_medians(calls, repeats=given.repeats if rows < 256 else 7)
        base = found["dense"].median
        for fmt in FORMATS:
            ours = found[fmt.label()].median
            bits = fmt.cost(width, width, dtype).bits / width**2
            print(
                f"| {width} | {rows} | {str(dtype).removeprefix('torch.')} | {fmt.label()} | {bits:.2f} | {base:.3f} | "
                f"{ours:.3f} | {base / ours:.2f} |"
            )
    matrix = torch.randn(*FITTED, generator=torch.Generator().manual_seed(0))
    for fmt, solver in ((FORMATS[0], "multistart"), (FORMATS[0], "ptqtp"), (FORMATS[2], "multistart"),
                        (FORMATS[3], "multistart")):  # fmt: skip
        begun = time.perf_counter()
        fmt.fit(matrix, solver=solver)
        seconds = time.perf_counter() - begun
        print(
            f"{fmt.label()}, {solver}: {seconds:.2f} s, {seconds * MODEL / matrix.numel():.0f} s for 135 M parameters"
        )


if __name__ == "__main__":
    main()
