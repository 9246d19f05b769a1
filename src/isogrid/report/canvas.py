"""Empty figures and their files.

Drawn on matplotlib's own canvas, never through pyplot, so nothing global changes and no window is needed. matplotlib
comes with ``pip install "isogrid[demo]"`` and is imported by the first figure.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from isogrid.errors import IsogridError
from isogrid.report.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT, GRID, BAND = "#222222", "#666666", "#dddddd", "#f3f1ec"


def empty_figure(size: tuple[float, float]) -> Figure:
    """An empty white figure with a canvas of its own.

    Raises:
        IsogridError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise IsogridError(f'figures need matplotlib ({error}); pip install "isogrid[demo]"') from error
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, 150 dots an inch, whole or not at all.

    Raises:
        OSError: the file cannot be written; an old one stays as it was.
    """
    return replace_file(path, png_bytes(figure))


def png_bytes(figure: Figure) -> bytes:
    """A figure as PNG, 150 dots an inch; the same figure gives the same bytes."""
    from PIL import Image  # comes with matplotlib

    drawn, stream = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150, metadata={"Software": None})
    # A line drawing has few colours: a palette makes the file a third as large.
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(stream, format="png", optimize=True)
    return stream.getvalue()
