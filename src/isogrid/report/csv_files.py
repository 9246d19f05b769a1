"""Rows as comma-separated files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isogrid.report.files import replace_file


def write_csv(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Write rows under a line of their keys, whole or not at all; a value that a row lacks is left empty.

    Args:
        rows: the keys of all rows together, in order of appearance, are the columns.
        path: the file; missing folders are made.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return replace_file(path, stream.getvalue().encode())
