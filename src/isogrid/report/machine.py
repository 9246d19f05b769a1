"""What a table was measured on."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Any

import torch


def describe_machine(version: str) -> dict[str, Any]:
    """Processor, threads and versions, JSON-able; ``version`` is Isogrid's."""
    return {
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "isogrid": version,
    }


def today() -> str:
    """The date, ISO 8601."""
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
