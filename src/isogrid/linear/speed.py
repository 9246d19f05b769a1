"""Which product is the faster here: a layer's own, or a dense one with the matrix multiplied out.

Times are measured by ``isogrid tune`` and kept in the user's cache, one file a machine; where a layer was not measured,
its operation count decides.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from isogrid.kernels import cache_folder

# A measured number of rows speaks for those from it up to the next one.
ROW_STEPS = (1, 2, 5, 16, 64, 256)
# The dense product has to be faster by this much: times on a shared machine are no better known.
WIN = 1.05
# Without measured times: a layer that saves fewer operations than this multiplies densely.
LEAST_SAVING = 1.1

Times = dict[str, float]


class SpeedTable:
    """Measured milliseconds of layers on one machine.

    Args:
        place: the file; it need not be there.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._known: dict[str, Times] = {}
        if place.is_file():
            try:
                self._known = json.loads(place.read_text())["layers"]
            except (ValueError, KeyError):  # half a file of another version: measured anew
                self._known = {}

    def times(self, label: str, out_features: int, in_features: int, dtype: torch.dtype, rows: int) -> Times | None:
        """``{"structured": ms, "dense": ms}``, or None."""
        return self._known.get(self._key(label, out_features, in_features, dtype, rows))

    def learn(
        self, label: str, out_features: int, in_features: int, dtype: torch.dtype, rows: int, times: Mapping[str, float]
    ) -> None:
        """Take times into the table; `save` keeps them."""
        self._known[self._key(label, out_features, in_features, dtype, rows)] = dict(times)

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.place.parent.mkdir(parents=True, exist_ok=True)
        described: dict[str, Any] = {"torch": torch.__version__, "layers": self._known}
        with tempfile.NamedTemporaryFile("w", dir=self.place.parent, suffix=".json", delete=False) as file:
            json.dump(described, file, indent=1)
        os.replace(file.name, self.place)

    @staticmethod
    def _key(label: str, out_features: int, in_features: int, dtype: torch.dtype, rows: int) -> str:
        step = max((step for step in ROW_STEPS if step <= rows), default=ROW_STEPS[0])
        return f"{label} {out_features}x{in_features} {str(dtype).removeprefix('torch.')} {step}+"


@cache
def speed_table() -> SpeedTable:
    """The table of this machine: this processor, this version of torch, this number of threads."""
    processor = torch.cpu.get_capabilities().get("cpu_name") or "cpu"
    name = f"speed-{processor}-{torch.__version__}-{torch.get_num_threads()}.json".replace(" ", "_").replace("/", "_")
    return SpeedTable(cache_folder() / name)
