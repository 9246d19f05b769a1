"""How faithful a vision model's maps are to those of the model it was made from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isogrid.errors import IsogridError
from isogrid.evaluation.mode import device_of, evaluating


def heatmap_fidelity(model: nn.Module, reference: nn.Module | Tensor, images: Tensor, *, batch: int = 8) -> float:
    """Pearson's correlation over the pixels of a map with its reference, averaged over images.

    Args:
        model: gives maps ``(images, …)``, itself or as ``.saliency`` or ``.logits``.
        reference: the dense model, or its maps as `heatmaps` computes them.
        images: ``(images, 3, height, width)``.
        batch: images in a forward pass.

    Returns:
        -1 to 1. An image counts 0 where one of its two maps is flat, since a flat map tells nothing; NaN where a map
        has NaN.

    Raises:
        IsogridError: no images, or maps of another shape than the reference's.
    """
    expected = reference if isinstance(reference, Tensor) else heatmaps(reference, images, batch=batch)
    maps = heatmaps(model, images, batch=batch)
    if maps.shape != expected.shape:
        raise IsogridError(f"heatmap_fidelity: maps of {tuple(maps.shape)}, reference {tuple(expected.shape)}")
    x, y = (side.flatten(1).double() for side in (maps, expected.cpu()))
    x, y = x - x.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    scale = x.norm(dim=1) * y.norm(dim=1)
    # Rounding leaves a flat map some 1e-16 of deviation, which is no picture.
    flat = scale <= 1e-12 * x.shape[1]
    correlation = torch.where(flat, 0.0, (x * y).sum(dim=1) / scale.clamp(min=torch.finfo(scale.dtype).tiny))
    return float(correlation.mean())


def heatmaps(model: nn.Module, images: Tensor, *, batch: int = 8) -> Tensor:
    """A model's maps, float32 on the CPU ``(images, …)``; the model is left in the mode it was in."""
    if len(images) == 0 or batch < 1:
        raise IsogridError(f"heatmaps: {len(images)} images in batches of {batch}; both have to be at least 1")
    device = device_of(model)
    maps = []
    with evaluating(model):
        for start in range(0, len(images), batch):
            output = model(images[start : start + batch].to(device))
            if not isinstance(output, Tensor):
                output = output.saliency if hasattr(output, "saliency") else output.logits
            maps.append(output.float().cpu())
    return torch.cat(maps)
