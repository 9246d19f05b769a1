"""Dense or structured: by measured times, else by operations; what is kept is counted, and never differentiates."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import isogrid
from isogrid import IsogridError, StructuredLinear, set_memory
from isogrid.evaluation import tune
from isogrid.linear import speed, speed_table
from isogrid.linear.speed import SpeedTable


@pytest.fixture
def table(tmp_path, monkeypatch):
    found = SpeedTable(tmp_path / "speed.json", "these products")
    monkeypatch.setattr("isogrid.linear.layer.speed_table", lambda: found)
    monkeypatch.setattr("isogrid.evaluation.tuning.speed_table", lambda: found)
    monkeypatch.setattr("isogrid.evaluation.tuning.COLD_BYTES", 2**15)
    return found


def layer(fmt: str = "monarch(blocks=4)") -> StructuredLinear:
    torch.manual_seed(0)
    return StructuredLinear(32, 48, fmt).eval().requires_grad_(False)


def test_measured_times_decide(table):
    one = layer()
    for rows, times in ((1, (1.0, 2.0)), (16, (4.0, 1.0)), (64, (1.01, 1.0))):
        described = {"structured": times[0], "dense": times[1]}
        table.learn(one.format.label(), 48, 32, torch.float32, rows, described, bias=True)
    # Half as long as dense at 1 row, four times as long at 16: they are equal in the third part of the way, at 2.5.
    plans = {rows: one.plan(rows) for rows in (0, 1, 2, 3, 16, 40, 63, 64, 4096)}
    assert [rows for rows, plan in plans.items() if plan == "dense"] == [3, 16, 40, 63]
    x = torch.randn(20, 32)
    wanted = one.format.multiply(one.factors, x, 48) + one.bias
    one(torch.randn(1, 32))
    assert one.memory()["dense view"] == 0
    torch.testing.assert_close(one(x), wanted)
    assert one.memory()["dense view"] == 48 * 32 * 4
    with torch.inference_mode():
        torch.testing.assert_close(one(x), wanted)
    one.right.mul_(2)  # in place: the kept matrix is stale
    torch.testing.assert_close(one(x), 2 * (wanted - one.bias) + one.bias)


def test_without_times_operations_decide(table):
    assert layer("monarch(blocks=4)").plan(16) == "structured"
    assert layer("low_rank(rank=19)").plan(16) == "dense"  # 19 · 80 of 1536 operations


def test_a_forced_product(table):
    one, x = layer(), torch.randn(3, 32)
    wanted = one(x)
    one.product = "dense"
    torch.testing.assert_close(one(x), wanted)
    assert one.memory()["dense view"] > 0
    assert one.plan(7) == "dense"
    small = layer("low_rank(rank=19)")
    small.product = "structured"
    small(x)
    assert small.memory()["dense view"] == 0
    assert "_cached_dense" not in str(small.state_dict().keys())


@pytest.mark.parametrize("fmt", ["monarch(blocks=4)", "low_rank(rank=5)", "block_tensor_train(rank=2)"])
def test_the_kept_matrix_lies_in_memory_as_that_of_a_dense_layer(table, fmt):
    one = layer(fmt)
    one.product = "dense"
    one(torch.randn(3, 32))
    assert one.dense().is_contiguous()
    assert one.memory()["dense view"] == one.dense().untyped_storage().nbytes() == 48 * 32 * 4


def test_training_multiplies_by_the_factors(table):
    one = layer("low_rank(rank=19)").requires_grad_().train()
    one(torch.randn(4, 32)).sum().backward()
    assert one.left.grad is not None
    one.eval()
    one.zero_grad()
    one(torch.randn(4, 32)).sum().backward()  # gradients asked for in eval mode, too
    assert one.left.grad is not None
    assert one.memory()["dense view"] == 0


def test_gradients_of_any_factor_rule_the_dense_product_out(table):
    one, x = layer("low_rank(rank=19)"), torch.randn(4, 32)
    one.left.requires_grad_()
    one(x).sum().backward()
    assert one.left.grad is not None
    assert one.memory()["dense view"] == 0


def test_times_between_measured_rows(table):
    for rows, ms in ((1, 1.0), (16, 4.0), (64, 64.0)):
        table.learn("f", 3, 2, torch.float32, rows, {"structured": ms, "dense": 2.0})
    found = {rows: table.times("f", 3, 2, torch.float32, rows)["structured"] for rows in (1, 4, 16, 32, 64, 640)}
    assert found == pytest.approx({1: 1, 4: 2, 16: 4, 32: 16, 64: 64, 640: 640})
    assert table.times("f", 3, 2, torch.float32, 640)["dense"] == pytest.approx(20)
    assert table.times("f", 3, 2, torch.float32, 0) is None
    assert table.times("f", 3, 2, torch.bfloat16, 1) is None
    assert table.times("f", 3, 2, torch.float32, 1, bias=True) is None


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.integers(1, 5000), st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 10_000))
def test_interpolated_times_lie_between_their_neighbours(points, rows):
    table = SpeedTable(speed_table().place.with_name("nothing.json"))
    for count, ms in points.items():
        table.learn("f", 1, 1, torch.float32, count, {"structured": ms})
    found = table.times("f", 1, 1, torch.float32, rows)
    below = max((n for n in points if n <= rows), default=None)
    above = min((n for n in points if n >= rows), default=None)
    if found is None:  # nothing near: no side, a wide gap, or too few rows to grow from
        assert below is None or (above is None and below < speed.MANY_ROWS) or above > speed.NEAR * below
    elif above is None:
        assert found["structured"] == pytest.approx(points[below] * rows / below)
    else:
        ends = points[below], points[above]
        assert min(ends) * (1 - 1e-9) <= found["structured"] <= max(ends) * (1 + 1e-9)


def test_plans_are_made_again_for_another_number_of_threads(table, monkeypatch):
    one, x = layer(), torch.randn(1, 32)
    one(x)
    table.learn(one.format.label(), 48, 32, torch.float32, 1, {"structured": 2.0, "dense": 1.0}, bias=True)
    one(x)
    assert one.memory()["dense view"] == 0  # as it was planned before
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    one(x)
    assert one.memory()["dense view"] > 0


def test_plans_of_many_numbers_of_rows_are_not_kept_for_ever(table, monkeypatch):
    monkeypatch.setattr("isogrid.linear.layer.MOST_PLANS", 5)
    one = layer()
    for rows in range(1, 40):
        assert torch.equal(one(torch.ones(rows, 32))[0], one(torch.ones(rows, 32))[-1])
        assert len(one._plans) <= 5


@pytest.mark.parametrize(
    "fmt", ["monarch(blocks=4)", "block_tensor_train(rank=2)", "low_rank(rank=19)", "kronecker(terms=2)"]
)
@pytest.mark.parametrize("product", ["auto", "dense"])
def test_small_memory_keeps_nothing(table, fmt, product):
    one = layer(fmt)
    one.product = product
    x = torch.randn(9, 32)
    wanted = one(x)
    one.weight.sum()
    set_memory(one, "small")
    for rows in (1, 9):
        torch.testing.assert_close(one(x[:rows]), wanted[:rows])
        one.weight.sum()
        one.merge()
        held = one.memory()
        assert held["dense view"] == held["derived"] == 0
        assert one.plan(rows) == "structured"
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other.small_memory
    set_memory(one, "fast")
    torch.testing.assert_close(one(x), wanted)
    assert (one.memory()["dense view"] > 0) == (one.plan(9) == "dense")


def test_memory_is_one_of_two_words():
    with pytest.raises(IsogridError, match="'fast' or 'small', got 'tiny'"):
        set_memory(layer(), "tiny")


def test_small_memory_is_saved_and_nothing_kept_is(table, tmp_path):
    def model(memory):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval().requires_grad_(False)
        isogrid.compress(net, "low_rank", keep=0.5, select="*", memory=memory)
        for one in net:
            if isinstance(one, StructuredLinear):
                one.product = "dense"
        net(torch.randn(2, 32))
        return net

    dense = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    fast, small = model("fast"), model("small")
    assert fast[0].memory()["dense view"] == 32 * 32 * 4
    assert small[0].memory()["dense view"] == 0
    sizes = [
        (isogrid.save(net, tmp_path / name) / "model.safetensors").stat().st_size
        for net, name in ((fast, "f"), (small, "s"))
    ]
    assert sizes[0] == sizes[1]
    assert [one.small_memory for one in isogrid.load(tmp_path / "s", copy.deepcopy(dense))[::2]] == [True, True]
    assert not isogrid.load(tmp_path / "f", copy.deepcopy(dense))[0].small_memory
    assert isogrid.load(tmp_path / "f", copy.deepcopy(dense), memory="small")[2].small_memory
    assert not isogrid.load(tmp_path / "s", copy.deepcopy(dense), memory="fast")[2].small_memory
    with pytest.raises(IsogridError, match="got 'none'"):
        isogrid.load(tmp_path / "s", copy.deepcopy(dense), memory="none")
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    config["quantization_config"]["layers"]["0"]["memory"] = "much"
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    with pytest.raises(isogrid.CheckpointError, match="layer '0': memory is 'fast' or 'small', got 'much'"):
        isogrid.load(tmp_path / "s", copy.deepcopy(dense))


def test_tuning_keeps_times_for_other_processes(table, tmp_path):
    model = nn.Sequential(layer(), nn.ReLU(), StructuredLinear(48, 32, "low_rank(rank=4)"))
    found = tune(model, rows=(1, 16), repeats=3)
    assert len(found) == 4
    assert {row["plan"] for row in found} <= {"dense", "structured"}
    again = SpeedTable(tmp_path / "speed.json", "these products")
    for row in found:
        times = again.times(row["format"], row["out"], row["in"], torch.float32, row["rows"], bias=row["bias"])
        assert times == {"structured": row["structured"], "dense": row["dense"]}
        assert (times["dense"] * speed.WIN < times["structured"]) == (row["plan"] == "dense")
    assert {row["bias"] for row in found} == {True}
    other = SpeedTable(tmp_path / "speed.json", "other products")
    assert other.times(row["format"], row["out"], row["in"], torch.float32, row["rows"], bias=True) is None
    assert json.loads((tmp_path / "speed.json").read_text())["torch"] == torch.__version__
    with pytest.raises(IsogridError, match="no structured layer"):
        tune(nn.Linear(3, 3))


def test_two_processes_tune_at_once(tmp_path):
    one, other = SpeedTable(tmp_path / "speed.json"), SpeedTable(tmp_path / "speed.json")
    one.learn("f", 1, 1, torch.float32, 1, {"structured": 1.0, "dense": 1.0})
    other.learn("f", 1, 1, torch.float32, 4, {"structured": 2.0, "dense": 2.0})
    one.save()
    other.save()
    both = SpeedTable(tmp_path / "speed.json")
    assert [both.times("f", 1, 1, torch.float32, rows)["dense"] for rows in (1, 4)] == [1, 2]


def test_a_long_call_ends_the_rows(table, monkeypatch):
    monkeypatch.setattr("isogrid.evaluation.tuning.LONG_MS", 0.0)
    assert [row["rows"] for row in tune(layer(), rows=(16, 1), repeats=1)] == [1]


def test_the_table_of_this_machine_is_not_the_users():
    assert "isogrid-speed-" in str(speed_table().place)


def test_half_a_file_is_no_table(tmp_path):
    place = tmp_path / "speed.json"
    place.write_text('{"layers": {"a')
    assert SpeedTable(place).times("monarch", 1, 1, torch.float32, 1) is None


def test_points_of_no_number_are_no_table(tmp_path):
    place = tmp_path / "speed.json"
    place.write_text('{"products": "", "layers": {"monarch 1x1 float32": {"many": {"dense": 1.0}}}}')
    assert SpeedTable(place).times("monarch", 1, 1, torch.float32, 1) is None


def test_nothing_lies_beside_a_table_that_cannot_be_saved(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("the disk is full")

    found = SpeedTable(tmp_path / "speed.json")
    monkeypatch.setattr("os.replace", broken)
    with pytest.warns(isogrid.IsogridWarning, match="measured times are not kept: the disk is full"):
        found.save()
    assert [one.name for one in tmp_path.iterdir() if not one.name.endswith(".lock")] == []


def test_native_and_portable_products_have_a_file_each(monkeypatch):
    speed._table.cache_clear()
    first = speed_table().place
    speed._table.cache_clear()
    monkeypatch.setattr("isogrid.linear.speed.products", lambda: "others")
    assert speed_table().place != first
    speed._table.cache_clear()


def test_writing_into_the_dense_matrix_changes_no_layer(table):
    one = layer("low_rank(rank=31)")  # planned dense
    x = torch.randn(4, 32)
    wanted = one(x).clone()
    one.dense().mul_(0)
    assert torch.equal(one(x), wanted)
    one.dense().mul_(0)
    assert torch.equal(torch.nn.functional.linear(x, one.merge().weight, one.bias), wanted)


def test_a_misspelt_product_is_no_dense_one():
    one = layer()
    one.product = "strucured"
    with pytest.raises(IsogridError, match="product is 'auto', 'structured' or 'dense', got 'strucured'"):
        one(torch.randn(3, one.in_features))
