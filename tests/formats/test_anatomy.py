"""The blocks that the anatomy finds are those that the formats document."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from isogrid import (
    Blast,
    BlockDiagonal,
    BlockTensorTrain,
    Capped,
    Circulant,
    IsogridError,
    Kronecker,
    LowRank,
    LowRankLight,
    Monarch,
    Permuted,
    Product,
    Sparse,
    Sum,
    TensorTrain,
)
from isogrid.formats import registered
from isogrid.formats.anatomy import anatomy, small_sizes
from tests.formats.cases import VARIANTS, middle_member, random_factors, suits
from tests.toy_format import ShuffledGroups


def footprints(fmt, m, n, factor):
    """``{index: (m, n) booleans}`` of a factor's blocks."""
    entry = next(entry for entry in anatomy(fmt, m, n)["factors"] if entry["name"] == factor)
    return {tuple(block["index"]): np.array(block["footprint"]).reshape(m, n) for block in entry["blocks"]}


def rows(m, n, chosen):
    return np.isin(np.arange(m), chosen)[:, None] & np.ones((m, n), bool)


def columns(m, n, chosen):
    return np.isin(np.arange(n), chosen)[None] & np.ones((m, n), bool)


@pytest.mark.parametrize(("m", "n", "blocks"), [(12, 12, 3), (24, 16, 4), (13, 7, 3), (13, 7, 5)])
def test_block_diagonal_blocks_are_disjoint_and_on_the_diagonal(m, n, blocks):
    found = footprints(BlockDiagonal(blocks=blocks), m, n, "diagonal")
    high, wide = -(-m // blocks), -(-n // blocks)
    for block in range(blocks):
        own = rows(m, n, range(block * high, (block + 1) * high)) & columns(
            m, n, range(block * wide, (block + 1) * wide)
        )
        assert (found[block,] == own).all()
    assert sum(mask.astype(int) for mask in found.values()).max() == 1


def test_shuffled_blocks_take_the_inputs_in_turn():
    found = footprints(BlockDiagonal(blocks=3, shuffle=True), 12, 12, "diagonal")
    for block in range(3):
        own = rows(12, 12, range(4 * block, 4 * block + 4)) & columns(12, 12, range(block, 12, 3))
        assert (found[block,] == own).all()


@pytest.mark.parametrize(("m", "n", "blocks"), [(24, 16, 4), (16, 24, 2), (13, 7, 3)])
def test_monarch_rows_are_strided_and_columns_contiguous(m, n, blocks):
    fmt = Monarch(blocks=blocks, rank=1)
    wide = -(-n // blocks)
    left, right = footprints(fmt, m, n, "left"), footprints(fmt, m, n, "right")
    for block in range(blocks):
        assert (left[block,] == rows(m, n, range(block, m, blocks))).all()
        assert (right[block,] == columns(m, n, range(block * wide, (block + 1) * wide))).all()


def test_low_rank_reaches_everything():
    for factor in ("left", "right"):
        found = footprints(LowRank(rank=2), 9, 5, factor)
        assert list(found) == [()]
        assert found[()].all()


def test_light_passes_the_chosen_inputs_by():
    fmt = LowRankLight(rank=3)
    found = anatomy(fmt, 8, 10)
    order = next(entry for entry in found["factors"] if entry["name"] == "order")
    assert sorted(order["values"]) == list(range(10))
    assert order["values"] != list(range(10))  # an order that shows
    rest = footprints(fmt, 8, 10, "rest")[()]
    assert (rest == columns(8, 10, order["values"][3:])).all()


@pytest.mark.parametrize(("m", "n"), [(24, 16), (13, 7)])
def test_blast_bases_belong_to_rows_and_columns_of_blocks(m, n):
    fmt = Blast(rank=2, blocks=4)
    high, wide = -(-m // 4), -(-n // 4)
    for factor in ("left", "coupling"):
        for (block,), mask in footprints(fmt, m, n, factor).items():
            assert (mask == rows(m, n, range(block * high, (block + 1) * high))).all()
    for (block,), mask in footprints(fmt, m, n, "right").items():
        assert (mask == columns(m, n, range(block * wide, (block + 1) * wide))).all()


def test_block_tensor_train_is_a_grid_of_contiguous_blocks():
    fmt = BlockTensorTrain(rank=1, out_factors=(3, 4), in_factors=(2, 5))
    for (block,), mask in footprints(fmt, 12, 10, "left").items():
        assert (mask == rows(12, 10, range(4 * block, 4 * block + 4))).all()
    for (block,), mask in footprints(fmt, 12, 10, "right").items():
        assert (mask == columns(12, 10, range(5 * block, 5 * block + 5))).all()


def test_kronecker_terms_reach_everything():
    for factor in ("outer", "inner"):
        assert all(mask.all() for mask in footprints(Kronecker(terms=3), 12, 8, factor).values())


def test_tensor_train_cores_see_one_digit_of_the_row():
    found = footprints(TensorTrain(rank=2), 12, 6, "core0")  # rows are (4, 3)
    assert list(found) == [(0, digit) for digit in range(4)]
    for (_, digit), mask in found.items():
        assert (mask == rows(12, 6, range(3 * digit, 3 * digit + 3))).all()
    for (_, digit), mask in footprints(TensorTrain(rank=2), 12, 6, "core1").items():
        assert (mask == rows(12, 6, range(digit, 12, 3))).all()


def test_sparse_values_stand_where_the_mask_says():
    found = anatomy(Sparse(density=0.3), 6, 8)
    values, mask = found["factors"]
    assert (values["blocks"][0]["rows"], values["blocks"][0]["columns"]) == (1, values["shape"][0])
    reached = np.array(values["blocks"][0]["footprint"])
    assert (np.packbits(reached, axis=1, bitorder="little").flatten() == mask["values"]).all()
    assert mask["role"] == "code"
    assert mask["blocks"] == []


def test_numbers_of_a_vector_are_told_apart():
    values, mask = anatomy(Sparse(density=0.3), 6, 8)["factors"]
    sources = np.array(values["sources"]).flatten()
    places = np.unpackbits(np.array(mask["values"], dtype=np.uint8), bitorder="little").astype(bool)
    assert (sources[places] == np.arange(*values["shape"])).all()
    assert (sources[~places] == -1).all()
    (kernel,) = anatomy(Circulant(), 6, 4)["factors"]
    assert kernel["sources"] == [[(i - j) % 6 for j in range(4)] for i in range(6)]


def test_a_chain_of_formats_is_one_term():
    found = anatomy(Product((Monarch(rank=1), LowRank(rank=2))), 12, 8)
    assert found["terms"] == [["part1_left", "part1_right", "part0_left", "part0_right"]]


def test_wrapped_formats_show_what_they_wrap():
    plain = footprints(Monarch(rank=1), 8, 8, "left")
    below = footprints(Capped(Monarch(rank=1)), 8, 8, "inner_left")
    assert all((plain[index] == below[index]).all() for index in plain)
    found = anatomy(Permuted(Monarch(rank=1)), 8, 8)
    order = next(entry["values"] for entry in found["factors"] if entry["name"] == "output_order")
    permuted = footprints(Permuted(Monarch(rank=1)), 8, 8, "inner_left")
    assert all((permuted[index] == plain[index][order]).all() for index in plain)


def test_terms_multiply_within_and_add_between():
    assert anatomy(Monarch(rank=1), 8, 8)["terms"] == [["left", "right"]]
    assert anatomy(Blast(rank=2), 8, 8)["terms"] == [["left", "coupling", "right"]]
    summed = Sum((LowRank(rank=1), Monarch(rank=1), BlockDiagonal()))
    assert anatomy(summed, 8, 8)["terms"] == [
        ["term0_left", "term0_right"],
        ["term1_left", "term1_right"],
        ["term2_diagonal"],
    ]
    gains = anatomy(Capped(LowRank(rank=1)), 8, 8)
    assert gains["terms"] == [["gain_left", "gain_right", "inner_left", "inner_right"]]
    assert "footprint" not in gains["factors"][-1]["blocks"][0]


def test_a_strangers_format_needs_nothing():
    found = footprints(ShuffledGroups(groups=2), 8, 6, "first")
    for (group,), mask in found.items():
        assert mask[:, 3 * group : 3 * group + 3].any()
        assert not mask[:, 3 * (1 - group) : 3 * (2 - group)].any()


@pytest.mark.parametrize("name", list(registered()))
@pytest.mark.parametrize(("m", "n"), [(12, 10), (13, 7), (1, 9)])
def test_every_format_has_an_anatomy_that_json_holds(name, m, n):
    for fmt in (middle_member(name, m, n), *VARIANTS.get(name, ())):
        if not suits(fmt, m, n):
            continue
        found = anatomy(fmt, m, n)
        assert json.loads(json.dumps(found)) == found
        assert found == anatomy(fmt, m, n)  # the same every time
        assert found["parameters"] == fmt.cost(m, n).parameters
        specs = fmt.factors(m, n)
        assert [entry["name"] for entry in found["factors"]] == list(specs)
        for entry in found["factors"]:
            numbers = sum(block["rows"] * block["columns"] for block in entry["blocks"]) or len(entry.get("values", ()))
            assert numbers == specs[entry["name"]].numel
        named = sorted(name for term in found["terms"] for name in term)
        assert named == sorted(name for name, spec in specs.items() if spec.trainable and spec.numel)


def same_indices(fmt, m, n, found):
    """Random factors below any cap, with the indices that the anatomy drew."""
    factors = random_factors(fmt, m, n, seed=7)
    for entry in found["factors"]:
        value = factors[entry["name"]]
        if entry["role"] == "weight":
            value.mul_(0.25)
        elif "values" in entry:
            value.copy_(torch.tensor(entry["values"]).view(value.shape))
    return factors


@pytest.mark.parametrize("name", list(registered()))
@pytest.mark.parametrize(("m", "n"), [(12, 10), (13, 7), (1, 9)])
def test_every_entry_that_can_differ_from_zero_is_in_a_footprint(name, m, n):
    for fmt in (middle_member(name, m, n), *VARIANTS.get(name, ())):
        if not suits(fmt, m, n):
            continue
        found = anatomy(fmt, m, n)
        dense = fmt.dense(same_indices(fmt, m, n, found), m, n)
        blocks = [block for entry in found["factors"] if entry["role"] == "weight" for block in entry["blocks"]]
        union = np.any([block["footprint"] for block in blocks], axis=0)
        assert (union == (dense.abs() > 1e-12 * dense.abs().max()).numpy()).all(), fmt.label()


@pytest.mark.parametrize("name", list(registered()))
def test_footprints_are_where_the_derivatives_are(name):
    m, n = 12, 10
    fmt = middle_member(name, m, n)
    found = anatomy(fmt, m, n)
    factors = same_indices(fmt, m, n, found)
    for entry in found["factors"]:
        if entry["role"] != "weight":
            continue
        value = factors[entry["name"]]
        slopes = torch.autograd.functional.jacobian(
            lambda changed, key=entry["name"]: fmt.dense({**factors, key: changed}, m, n), value
        )
        slopes = slopes.abs() > 1e-10 * slopes.abs().max()  # (out, in, *shape)
        for block in entry["blocks"]:
            own = slopes[(slice(None), slice(None), *block["index"])].reshape(m, n, -1).any(-1)
            assert own.tolist() == block["footprint"], (entry["name"], block["index"])


def test_too_many_blocks_are_refused():
    with pytest.raises(IsogridError, match="too many to trace"):
        anatomy(Monarch(blocks=64, rank=1), 4096, 4096)


def test_small_sizes_keep_proportions():
    assert small_sizes(768, 768) == (24, 24)
    assert small_sizes(768, 3072) == (6, 24)
    assert small_sizes(13, 7) == (13, 7)
    assert small_sizes(1, 5000, 16) == (1, 16)
