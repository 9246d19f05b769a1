"""The thesis' pictures: photographs written in every format at equal parameters.

Each colour channel of a photograph is one matrix of values in [0, 1], projected, clipped and put together again. Which
format wins says what structure photographs have: smooth and local. It does not say which wins on weights.
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isogrid.data import DatasetNotFoundError, open_photographs
from isogrid.errors import BudgetError
from isogrid.formats import Blast, BlockDiagonal, Budget, Format, Monarch, registered
from isogrid.report import format_duration, picture_sheet, progress, save_figure, write_report
from isogrid.studies.rows import Say, heading, remembered

KEEPS = (0.05, 0.1, 0.2)
SHEET_KEEP = 0.1
# What wraps other formats, or has no size to choose, has no picture of its own.
WRAPPERS = ("dense", "sum", "permuted", "capped", "product", "circulant")
PROTOTYPES: dict[str, Format] = {
    "blast": Blast(blocks=8),
    "monarch": Monarch(blocks=16),
    "block_diagonal": BlockDiagonal(blocks=16),
}


def formats_of_study() -> dict[str, Format]:
    """Every registered format that writes a matrix by itself, with hyper-parameters that suit a photograph."""
    return {
        name: PROTOTYPES.get(name, cls())
        for name, cls in registered().items()
        if name not in WRAPPERS and cls.__module__.startswith("isogrid.")
    }


def psnr(picture: Tensor, approximation: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels of values in [0, 1]."""
    error = float((picture - approximation).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def run_image_compression(
    out: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    command: str = "isogrid study image_compression",
    say: Say = print,
) -> dict[str, Any]:
    """Photographs in every format at 5, 10 and 20 % of their values, and a contact sheet of one of them.

    Args:
        out: folder for the table, the sheet and the page; rows that are there are not measured again.
        quick: two photographs instead of six.
        seed: of the fits.
        data_dir: where the Kodak photographs are looked up first; scikit-image's stand in where they can't be had.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The data of the table; ``quality`` is the mean PSNR in decibels, ``error`` the mean relative error.
    """
    count = 2 if quick else 6
    try:
        source, images = "Kodak", open_photographs("kodak", limit=count, data_dir=data_dir)
    except DatasetNotFoundError:
        source, images = "scikit-image", open_photographs("scikit-image", limit=count)
    pictures = {name: _as_tensor(image) for name, image in images.items()}
    formats = formats_of_study()
    say(f"{len(formats)} formats on {len(pictures)} photographs; about {'1' if quick else '5'} minutes on two cores")
    settings = {"photographs": f"{source}: {', '.join(pictures)}", "seed": seed}
    runs = Path("runs/study/image_compression")

    def measure(name: str, fmt: Format, keep: float) -> dict[str, Any]:
        begun = time.perf_counter()
        found = [compressed(picture, fmt, keep, seed) for picture in pictures.values()]
        ratios = [
            psnr(picture, approximation) for picture, (approximation, _) in zip(pictures.values(), found, strict=True)
        ]
        errors = [
            float((picture - approximation).norm() / picture.norm())
            for picture, (approximation, _) in zip(pictures.values(), found, strict=True)
        ]
        whole = sum(picture.numel() for picture in pictures.values())
        parameters = sum(used for _, used in found)
        return {
            "label": name.replace("_", " "),
            "format": name,
            "calibrated": False,
            "requested_keep": keep,
            "achieved_keep": parameters / whole,
            "parameters": parameters,
            "quality": sum(ratios) / len(ratios),
            "error": sum(errors) / len(errors),
            "seconds": time.perf_counter() - begun,
        }

    rows = []
    with progress("Projecting", len(formats) * len(KEEPS)) as step:
        for name, fmt in formats.items():
            for keep in KEEPS:
                try:
                    row = remembered(runs, f"{name}-{keep:g}", settings, partial(measure, name, fmt, keep))
                except BudgetError:
                    say(f"{name}: no member within {keep:g}")
                    continue
                finally:
                    step(name)
                rows.append(row)
                say(f"{name} at {keep:g}: {row['quality']:.2f} dB, {format_duration(row['seconds'])}")
    first, picture = next(iter(pictures.items()))
    sheet = [("original", picture)]
    for name, fmt in formats.items():
        try:
            approximation, used = compressed(picture, fmt, SHEET_KEEP, seed)
        except BudgetError:
            continue
        share, ratio = used / picture.numel(), psnr(picture, approximation)
        sheet.append((f"{name.replace('_', ' ')}, {100 * share:.1f} %, {ratio:.1f} dB", approximation))
    result = {
        **heading("Photographs in structured formats", command, settings),
        "quality": {"name": "PSNR (dB)", "better": "higher"},
        "dense": {
            "label": "Original",
            "format": "dense",
            "calibrated": False,
            "achieved_keep": 1.0,
            "parameters": sum(picture.numel() for picture in pictures.values()),
        },
        "rows": rows,
        "notes": [
            "Each colour channel is one matrix; parameters of all channels and photographs together.",
            "Sparse counts values only, not their positions, and is no image format: it is the reference line.",
            f"Contact sheet: sheet.png, {first} at {100 * SHEET_KEEP:g} %.",
        ],
    }
    write_report(result, out)
    save_figure(picture_sheet([(title, image.permute(1, 2, 0).numpy()) for title, image in sheet]), out / "sheet.png")
    return result


def compressed(picture: Tensor, fmt: Format, keep: float, seed: int) -> tuple[Tensor, int]:
    """(approximation clipped to [0, 1], parameters) of a picture ``(3, height, width)``, channel by channel."""
    _, height, width = picture.shape
    member = fmt.sized(height, width, Budget.keep(keep, height, width))
    channels = []
    for channel in picture:
        factors = member.fit(channel, generator=torch.Generator().manual_seed(seed))
        channels.append(member.dense(factors, height, width).clamp(0, 1))
    return torch.stack(channels), len(channels) * member.cost(height, width).parameters


def _as_tensor(image: Any) -> Tensor:
    """``(3, height, width)`` float64 in [0, 1] of a Pillow picture."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).to(torch.float64) / 255
