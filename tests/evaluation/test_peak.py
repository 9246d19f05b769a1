"""Peak memory of a step, against what its tensors are known to take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isogrid import StructuredLinear
from isogrid.evaluation import peak_step_bytes, saved_bytes, training_peak_bytes
from isogrid.kernels import native

MIB = 2**20


def test_what_is_held_at_once_counts_and_what_was_freed_does_not():
    def chain() -> torch.Tensor:
        value = torch.zeros(MIB)  # 4 MiB
        for _ in range(5):
            value = value + 1  # two of them at a time
        return value

    assert peak_step_bytes(chain) == pytest.approx(8 * MIB, rel=0.01)
    assert peak_step_bytes(lambda: None) == 0
    assert peak_step_bytes(chain) == pytest.approx(8 * MIB, rel=0.01)  # nothing is left from the last time


def test_what_a_step_raises_is_raised():
    def fails() -> None:
        raise ValueError("no such step")

    with pytest.raises(ValueError, match="no such step"):
        peak_step_bytes(fails)
    assert peak_step_bytes(lambda: torch.zeros(MIB)) == 4 * MIB


def test_a_dense_layer_needs_its_output_and_its_gradients():
    layer, x = nn.Linear(512, 512, bias=False), torch.randn(1024, 512)
    output, gradients = 1024 * 512 * 4, (512 * 512 + 1024 * 512) * 4
    assert training_peak_bytes(layer, x) == pytest.approx(output + gradients, rel=0.1)
    assert layer.weight.grad is None


@pytest.mark.skipif(not native.loaded(), reason="no native products on this machine")
def test_a_structured_layer_keeps_its_input_and_its_factors():
    x = torch.randn(64, 512, requires_grad=True)
    for fmt in (
        "monarch(blocks=4)",
        "block_tensor_train(rank=2)",
        "blast(blocks=4, rank=20)",
        "block_diagonal(blocks=4)",
    ):
        layer = StructuredLinear(512, 512, fmt, bias=False)
        factors = sum(value.nbytes for value in layer.parameters())
        kept = saved_bytes(lambda layer=layer: layer(x))
        assert kept == x.nbytes + factors, fmt  # the intermediate is multiplied anew


@pytest.mark.skipif(not native.loaded(), reason="no native products on this machine")
def test_training_needs_less_than_twice_what_a_dense_layer_does():
    torch.manual_seed(0)
    x = torch.randn(2048, 512)
    dense = training_peak_bytes(nn.Linear(512, 512, bias=False), x)
    for fmt in ("monarch(blocks=4)", "block_tensor_train(rank=4)", "blast(blocks=4, rank=64)"):
        needed = training_peak_bytes(StructuredLinear(512, 512, fmt, bias=False), x)
        assert needed < 2 * dense, (fmt, needed / dense)
