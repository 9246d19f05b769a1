"""Lossless where one class contains another; else the error is said."""

import pytest
import torch

from isogrid import (
    BlockDense,
    BlockTensorTrain,
    IsogridError,
    Kronecker,
    LowRank,
    LowRankLight,
    Monarch,
    StructuredLinear,
    TensorTrain,
    convert,
)

PAIRS = [
    (LowRank(5), LowRankLight(), LowRankLight(5)),
    (LowRankLight(5), LowRank(), LowRank(5)),
    (LowRank(2), BlockTensorTrain(2), BlockTensorTrain(2)),
    (BlockDense(2, 3), LowRank(), LowRank(6)),
    (Kronecker(3), TensorTrain(), TensorTrain(3)),
    (TensorTrain(3), Kronecker(), Kronecker(3)),
    (Monarch(1, rank=4), LowRank(), LowRank(4)),
]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("first", "to", "found"), PAIRS, ids=str)
def test_classes_that_contain_each_other(first, to, found, dtype, bound):
    torch.manual_seed(0)
    layer = StructuredLinear(36, 24, first, dtype=dtype)
    torch.nn.init.normal_(layer.bias)
    converted, error = convert(layer, to)
    assert converted.format == found
    assert error <= bound
    x = torch.randn(7, 36, dtype=dtype)
    assert (converted(x) - layer(x)).norm() <= 4 * bound * layer(x).norm()
    assert converted.floating_factor().dtype == dtype


def test_there_and_back():
    layer = StructuredLinear(20, 30, LowRank(4), dtype=torch.float64)
    light, _ = convert(layer, "low_rank_light")
    back, _ = convert(light, "low_rank")
    assert torch.allclose(back.weight + 0, layer.weight + 0, atol=1e-12)
    assert light.cost().parameters == layer.cost().parameters - 16


def test_a_given_size_is_kept_and_its_error_said():
    layer = StructuredLinear(20, 30, "monarch(rank=2)")
    converted, error = convert(layer, LowRank(3))
    assert converted.format == LowRank(3)
    matrix = (layer.weight + 0).detach().double()
    tail = torch.linalg.svdvals(matrix)[3:].square().sum().sqrt() / matrix.norm()
    assert error == pytest.approx(float(tail), rel=1e-5)


def test_what_no_member_reaches_is_refused():
    layer = StructuredLinear(20, 30, LowRank(8), dtype=torch.float64)
    with pytest.raises(IsogridError, match="relative error"):
        convert(layer, "blast(blocks=2)", tolerance=0.0)


def test_half_precision_keeps_its_dtype():
    layer = StructuredLinear(20, 30, LowRank(4), dtype=torch.bfloat16)
    converted, error = convert(layer, LowRankLight(4))
    assert converted.floating_factor().dtype == torch.bfloat16
    assert error < 1e-6
