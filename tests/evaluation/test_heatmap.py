import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from isogrid.errors import IsogridError
from isogrid.evaluation import heatmap_fidelity, heatmaps

IMAGES = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Maps that are a weighted sum of the channels."""

    def __init__(self, *weights: float, wrap: str | None = None) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))
        self.wrap = wrap

    def forward(self, images: torch.Tensor) -> object:
        maps = torch.einsum("nchw,c->nhw", images, self.weights)[:, None]
        return maps if self.wrap is None else SimpleNamespace(**{self.wrap: maps})


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("wrap", [None, "saliency", "logits"])
def test_it_is_the_mean_of_pearsons_correlations(batch, wrap):
    model, reference = Mixed(1.0, 2.0, 0.0, wrap=wrap), Mixed(1.0, -1.0, 0.5)
    expected = sum(
        torch.corrcoef(torch.stack([model_map.flatten(), reference_map.flatten()]))[0, 1].item()
        for model_map, reference_map in zip(heatmaps(model, IMAGES), heatmaps(reference, IMAGES), strict=True)
    )
    assert heatmap_fidelity(model, reference, IMAGES, batch=batch) == pytest.approx(expected / 5, abs=1e-6)
    assert heatmap_fidelity(model, heatmaps(reference, IMAGES), IMAGES) == pytest.approx(expected / 5, abs=1e-6)


def test_scale_and_offset_are_nothing_and_the_sign_is_all():
    model = Mixed(1.0, 2.0, 3.0)
    maps = heatmaps(model, IMAGES)
    assert heatmap_fidelity(model, 1e-4 * maps + 0.5, IMAGES) == pytest.approx(1, abs=1e-4)
    assert heatmap_fidelity(model, -maps, IMAGES) == pytest.approx(-1)


def test_a_flat_map_counts_nothing_and_a_broken_one_shows():
    reference = Mixed(1.0, 2.0, 3.0)
    assert heatmap_fidelity(Mixed(0.0, 0.0, 0.0), reference, IMAGES) == 0
    assert math.isnan(heatmap_fidelity(Mixed(math.nan, 0.0, 0.0), reference, IMAGES))


def test_bad_input():
    model = Mixed(1.0, 2.0, 3.0)
    with pytest.raises(IsogridError, match=r"\(5, 1, 4, 6\), reference \(5, 1, 4, 5\)"):
        heatmap_fidelity(model, torch.zeros(5, 1, 4, 5), IMAGES)
    with pytest.raises(IsogridError, match="0 images"):
        heatmaps(model, IMAGES[:0])
