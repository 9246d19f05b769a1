import pytest
import torch

from isogrid import LowRank, select_layers
from isogrid.compress import allocate_uniform, estimate_seconds
from tests import models


@pytest.mark.parametrize("rows", [0, 10_000])
def test_estimate_is_a_time_and_leaves_no_trace(rows):
    model = models.blocks()
    layers = select_layers(model)
    before, draws = models.snapshot(model), torch.get_rng_state()
    seconds = estimate_seconds(layers, allocate_uniform(layers, LowRank(), 0.5), calibration_tokens=rows)
    assert 0 < seconds < 60
    models.assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), draws)


def test_more_rows_and_more_layers_take_longer():
    sizes = []
    for depth, rows in ((2, 0), (2, 10**9), (40, 10**9)):
        layers = select_layers(models.Blocks(depth=depth))
        sized = allocate_uniform(layers, LowRank(), 0.5)
        # The best of a few: other work on the machine only ever slows a probe down.
        sizes.append(min(estimate_seconds(layers, sized, calibration_tokens=rows) for _ in range(3)))
    assert sizes[0] < sizes[1] < sizes[2]
