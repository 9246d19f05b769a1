"""How long a compression will take, said before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from isogrid.fitting import Metric
from isogrid.formats import Format
from isogrid.linear import linear_matrix


def estimate_seconds(
    layers: Mapping[str, nn.Module],
    sized: Mapping[str, Format],
    *,
    calibration_tokens: int = 0,
    fit_options: Mapping[str, Any] | None = None,
) -> float:
    """Seconds that calibrating and fitting these layers will take here, from one probe fit and one probe product.

    The probe fits a random matrix of the middle layer's size; a fit's work grows like out · in · min(out, in).

    Args:
        layers: name to dense layer.
        sized: name to format.
        calibration_tokens: rows that will go through the model; 0 for plain fits.
        fit_options: options of the format's solver.
    """
    shapes = {name: tuple(linear_matrix(layer).shape) for name, layer in layers.items()}
    work = {name: out * inn * min(out, inn) for name, (out, inn) in shapes.items()}
    middle = sorted(work, key=lambda name: work[name])[len(work) // 2]
    out_features, in_features = shapes[middle]
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(out_features, in_features, generator=generator)
    metric = None
    if calibration_tokens:
        rows = torch.randn(2 * in_features, in_features, generator=generator)
        metric = Metric.from_rows(rows)
    probe = _seconds(lambda: sized[middle].fit(target, metric, **(fit_options or {})))
    fits = probe * sum(work.values()) / work[middle]
    if not calibration_tokens:
        return fits
    rows = torch.randn(2048, 1024, generator=generator)
    square = torch.randn(1024, 1024, generator=generator)
    per_product = _seconds(lambda: rows @ square) / (2048 * 1024 * 1024)
    # A product with the matrix and, for about every second layer, one Gram matrix of the input.
    products = sum(out * inn + inn * inn / 2 for out, inn in shapes.values())
    return fits + 1.5 * calibration_tokens * products * per_product


def _seconds(call: Callable[[], object]) -> float:
    """The faster of two calls: the first pays for libraries that start up."""
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)
