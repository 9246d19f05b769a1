"""Dense or structured: by measured times, else by operations; what is kept is counted, and never differentiates."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from isogrid import IsogridError, StructuredLinear
from isogrid.evaluation import tune
from isogrid.linear import speed
from isogrid.linear.speed import SpeedTable


@pytest.fixture
def table(tmp_path, monkeypatch):
    found = SpeedTable(tmp_path / "speed.json")
    monkeypatch.setattr("isogrid.linear.layer.speed_table", lambda: found)
    monkeypatch.setattr("isogrid.evaluation.tuning.speed_table", lambda: found)
    return found


def layer(fmt: str = "monarch(blocks=4)") -> StructuredLinear:
    torch.manual_seed(0)
    return StructuredLinear(32, 48, fmt).eval().requires_grad_(False)


def test_measured_times_decide_for_the_rows_up_to_the_next(table):
    one = layer()
    for rows, times in ((1, (1.0, 2.0)), (16, (2.0, 1.0)), (64, (1.04, 1.0))):
        table.learn(one.format.label(), 48, 32, torch.float32, rows, {"structured": times[0], "dense": times[1]})
    assert [one.plan(rows) for rows in (1, 16, 63, 64)] == ["structured", "dense", "dense", "structured"]
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


def test_training_multiplies_by_the_factors(table):
    one = layer("low_rank(rank=19)").requires_grad_().train()
    one(torch.randn(4, 32)).sum().backward()
    assert one.left.grad is not None
    one.eval()
    one.zero_grad()
    one(torch.randn(4, 32)).sum().backward()  # gradients asked for in eval mode, too
    assert one.left.grad is not None
    assert one.memory()["dense view"] == 0


def test_tuning_keeps_times_for_other_processes(table, tmp_path):
    model = nn.Sequential(layer(), nn.ReLU(), StructuredLinear(48, 32, "low_rank(rank=4)"))
    found = tune(model, rows=(1, 16), repeats=3)
    assert len(found) == 4
    assert {row["plan"] for row in found} <= {"dense", "structured"}
    again = SpeedTable(tmp_path / "speed.json")
    for row in found:
        times = again.times(row["format"], row["out"], row["in"], torch.float32, row["rows"])
        assert times == {"structured": row["structured"], "dense": row["dense"]}
        assert (times["dense"] * speed.WIN < times["structured"]) == (row["plan"] == "dense")
    assert json.loads((tmp_path / "speed.json").read_text())["torch"] == torch.__version__
    with pytest.raises(IsogridError, match="no structured layer"):
        tune(nn.Linear(3, 3))


def test_half_a_file_is_no_table(tmp_path):
    place = tmp_path / "speed.json"
    place.write_text('{"layers": {"a')
    assert SpeedTable(place).times("monarch", 1, 1, torch.float32, 1) is None
