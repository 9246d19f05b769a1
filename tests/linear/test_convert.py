"""Lossless where one class contains another; else the error is said."""

import pytest
import torch

from isogrid import (
    BlockDense,
    BlockTensorTrain,
    Capped,
    Circulant,
    Dense,
    IsogridError,
    Kronecker,
    LowRank,
    LowRankLight,
    Monarch,
    Permuted,
    Product,
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
    (Monarch(4, rank=2), BlockTensorTrain(), Permuted(BlockTensorTrain(2, out_factors=(4, 6), in_factors=(4, 9)))),
    (Monarch(3, rank=1), BlockTensorTrain(3), Permuted(BlockTensorTrain(3, out_factors=(3, 8), in_factors=(3, 12)))),
    (Monarch(4), BlockTensorTrain(), Permuted(BlockTensorTrain(2, out_factors=(4, 6), in_factors=(4, 9)))),  # mixed
    (Monarch(6), Permuted(BlockTensorTrain()), Permuted(BlockTensorTrain(1, out_factors=(6, 4), in_factors=(6, 6)))),
    # An open size within a wrapper is searched too.
    (LowRank(3), Permuted(LowRankLight()), Permuted(LowRankLight(3))),
    (Monarch(4, rank=2), Capped(Monarch(4)), Capped(Monarch(4, rank=2))),
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


@pytest.mark.parametrize("fmt", [Monarch(4, rank=2), Monarch(4), Monarch(12), Monarch(1, rank=3)], ids=str)
def test_monarch_as_block_tensor_train_moves_numbers_and_computes_none(fmt):
    layer = StructuredLinear(36, 24, fmt, dtype=torch.float64)
    converted, error = convert(layer, "block_tensor_train")
    assert isinstance(converted.format, Permuted)
    assert error <= 1e-15
    for name in ("right", "left"):
        moved = converted.factors[f"inner_{name}"]
        assert torch.equal(moved[moved != 0].sort().values, layer.factors[name].flatten().sort().values)


@pytest.mark.parametrize(
    ("fmt", "to"),
    [
        (Monarch(5), BlockTensorTrain(6)),  # 5 divides neither size
        (Monarch(4, rank=3), BlockTensorTrain(2)),  # fewer directions than the slices have
        (Monarch(4, rank=2), BlockTensorTrain(2, out_factors=(3, 8), in_factors=(6, 6))),  # sizes chosen by hand
    ],
    ids=str,
)
def test_what_is_chosen_by_hand_is_fitted(fmt, to):
    converted, _ = convert(StructuredLinear(36, 24, fmt, dtype=torch.float64), to)
    assert converted.format == to


def test_a_product_left_open_holds_a_circulant_exactly():
    layer = StructuredLinear(16, 16, "circulant", dtype=torch.float64)
    converted, error = convert(layer, "product")
    assert error <= 1e-12
    assert converted.format == Product((Permuted(Monarch(4, rank=2)), Permuted(Monarch(4, rank=2))), (32,))


def test_options_are_those_of_a_fit_even_where_none_is_needed():
    layer = StructuredLinear(36, 24, Monarch(4, rank=2), dtype=torch.float64)
    with pytest.raises(IsogridError, match="no option 'colour'"):
        convert(layer, BlockTensorTrain(), colour=3)
    fitted, error = convert(layer, BlockTensorTrain(2), sweeps=1)
    assert fitted.format == BlockTensorTrain(2)
    assert error > 0.1


def test_only_square_circulants_are_rewritten_as_products():
    fmt = Product((Permuted(Monarch(2)), Permuted(Monarch(2))))
    assert Circulant().rewritten(fmt, {"kernel": torch.ones(8)}, 8, 6) is None
    assert Circulant().rewritten(fmt, {"kernel": torch.ones(9)}, 9, 9) is None  # 2 does not divide 9
    assert Circulant().rewritten(Product((Dense(), Dense())), {"kernel": torch.ones(8)}, 8, 8) is None
    ranked = Product((Permuted(Monarch(2, rank=1)), Permuted(Monarch(2))))
    assert Circulant().rewritten(ranked, {"kernel": torch.ones(8)}, 8, 8) is None
    assert Circulant().rewritten(Product(fmt.parts, (8,)), {"kernel": torch.ones(8)}, 8, 8) is None
    found = Circulant().rewritten(fmt, {"kernel": torch.ones(8)}, 8, 8)
    assert found is not None
    assert found[0] == Product((Permuted(Monarch(2, rank=2)), Permuted(Monarch(2, rank=2))), (16,))
