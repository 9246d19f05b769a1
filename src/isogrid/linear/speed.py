"""Which product is the faster here: a layer's own, or a dense one with the matrix multiplied out.

Times are measured by ``isogrid tune`` and kept in the user's cache, one file for a machine and a number of threads;
where a layer was not measured, its operation count decides.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import filelock
import torch

import isogrid.kernels
from isogrid.errors import IsogridWarning
from isogrid.files import replace_file
from isogrid.formats import Format
from isogrid.kernels import cache_folder
from isogrid.kernels.native.build import unsuitable

# Where the dense product is faster by this much it is taken: times on a shared machine are no better known.
WIN = 1.02
# Without measured times: a layer that saves fewer operations than this multiplies densely.
LEAST_SAVING = 1.1

# From so many rows on a product is busy multiplying: twice the rows take twice the time.
MANY_ROWS = 64
# Measured numbers of rows that are further apart say nothing of those between.
NEAR = 16

Times = dict[str, float]


class SpeedTable:
    """Measured milliseconds of layers on one machine.

    Args:
        place: the file; it need not be there.
        products: what the times were measured with; the times of other products in the file don't count.
    """

    def __init__(self, place: Path, products: str = "") -> None:
        self.place = place
        self.products = products
        self._known = self._read()

    def _read(self) -> dict[str, dict[str, Times]]:
        try:
            described = json.loads(self.place.read_text())
            if described["products"] == self.products:
                layers = described["layers"].items()
                return {key: {str(int(rows)): dict(times) for rows, times in points.items()} for key, points in layers}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no file, or not one of these
            pass
        return {}

    def times(
        self, label: str, out_features: int, in_features: int, dtype: torch.dtype, rows: int, *, bias: bool = False
    ) -> Times | None:
        """``{"structured": ms, "dense": ms}`` at a number of rows, or None where nothing near was measured.

        Between two measured numbers of rows, logarithms of times are linear in the logarithm of rows. Beyond the
        largest, if it is one of many rows, time grows with the rows.
        """
        known = self._known.get(_key(label, out_features, in_features, dtype, bias), {})
        points = {int(count): one for count, one in known.items()}
        if rows in points:
            return dict(points[rows])
        low = max((count for count in points if count < rows), default=0)
        high = min((count for count in points if count > rows), default=0)
        if low >= MANY_ROWS and not high:
            return {name: ms * rows / low for name, ms in points[low].items()}
        if not low or not high or high > NEAR * low:
            return None
        share = math.log(rows / low) / math.log(high / low)
        return {name: ms * (points[high][name] / ms) ** share for name, ms in points[low].items()}

    def learn(
        self,
        label: str,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        rows: int,
        times: Mapping[str, float],
        *,
        bias: bool = False,
    ) -> None:
        """Take times into the table; `save` keeps them."""
        self._known.setdefault(_key(label, out_features, in_features, dtype, bias), {})[str(rows)] = dict(times)

    def save(self) -> None:
        """Write the file, whole or not at all; what other processes have written meanwhile stays."""
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{self.place}.lock"):
                for key, points in self._read().items():
                    self._known[key] = points | self._known.get(key, {})
                described = {"torch": torch.__version__, "products": self.products, "layers": self._known}
                replace_file(self.place, json.dumps(described, indent=1).encode())
        except OSError as error:  # what was measured serves this process all the same
            warnings.warn(f"measured times are not kept: {error}", IsogridWarning, stacklevel=2)


def _key(label: str, out_features: int, in_features: int, dtype: torch.dtype, bias: bool) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{label} {out_features}x{in_features} {name}{' with bias' if bias else ''}"


def prefers_dense(times: Mapping[str, float]) -> bool:
    """Whether these times say that the dense product is the faster."""
    return times["dense"] * WIN < times["structured"]


def keeps_its_codes(fmt: Format, out_features: int, in_features: int) -> bool:
    """Whether a layer in the format is never multiplied densely unasked: the memory of its codes is what it is for."""
    return any(spec.role == "code" for spec in fmt.factors(out_features, in_features).values())


def speed_table() -> SpeedTable:
    """The table of this machine: its processor, this version of torch, the number of threads set now.

    It is kept in ``$ISOGRID_SPEED``, or in the user's cache. Times that other products of Isogrid took don't count.
    """
    named = os.environ.get("ISOGRID_SPEED")
    return _table(Path(named) if named else cache_folder(), torch.get_num_threads())


@cache
def _table(folder: Path, threads: int) -> SpeedTable:
    processor = torch.cpu.get_capabilities().get("cpu_name") or "cpu"
    # A file for each state of the products: native ones and portable ones, or two versions, may take turns.
    name = f"speed-{processor}-{torch.__version__}-{threads}-{products()}.json"
    return SpeedTable(folder / name.replace(" ", "_").replace("/", "_"), products())


@cache
def products() -> str:
    """The state of the products that times are measured with: a hash of their sources, and whether they are native."""
    digest = hashlib.sha256()
    folder = Path(isogrid.kernels.__file__).parent
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(path.read_bytes())
    return f"{digest.hexdigest()[:12]}{'' if unsuitable() is None else ' portable'}"
