"""Files that are whole or absent: written beside their place and renamed into it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def replace_file(path: str | Path, content: bytes) -> Path:
    """Put ``content`` at ``path``; a reader sees the old file or the new one, never a part.

    Missing parent folders are made. When anything fails, the old file stays as it was and nothing is left beside it.

    Args:
        path: where the file shall stand.
        content: its bytes.

    Returns:
        The path.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, because a rename is atomic only within one file system.
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with beside.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path
