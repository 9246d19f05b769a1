"""Budgets in time: times are given here, so that only the arithmetic of the choice is tested."""

import copy

import pytest
import torch
from torch import nn

from isogrid.compress import Milliseconds, compress, milliseconds, select_layers
from isogrid.compress.milliseconds import TimedPrices, one_row
from isogrid.errors import BudgetError, IsogridError
from isogrid.formats import Dense, LowRank, Monarch, Sparse
from tests import models


class _Table:
    """A table of speeds that stays in memory."""

    def __init__(self):
        self.known = {}

    def times(self, *key, bias):
        return self.known.get((*key, bias))

    def learn(self, *key_and_times, bias):
        self.known[(*key_and_times[:-1], bias)] = key_and_times[-1]

    def save(self):
        pass


@pytest.fixture
def times(monkeypatch):
    """Products take what their operations say and a fifth of the dense product; a dense one 1 us an operation."""
    table, asked = _Table(), []

    def compare(fmt, factors, out_features, in_features, dtype, rows, *, bias, repeats):
        asked.append((fmt, out_features, in_features, rows))
        whole = out_features * in_features
        return {"structured": fmt.cost(out_features, in_features).multiply_adds + 0.2 * whole, "dense": float(whole)}

    def watched(model, layers, inputs, repeats):
        own = {name: 1000.0 * layer.weight.numel() for name, layer in layers.items()}
        return own, dict.fromkeys(own, 32), round(1.5 * sum(own.values()))

    monkeypatch.setattr(milliseconds, "speed_table", lambda: table)
    monkeypatch.setattr(milliseconds, "compare", compare)
    monkeypatch.setattr(milliseconds, "_watched", watched)
    return asked


def tokens(count=8):
    return models.tokens(count, 16, seed=0)


@pytest.mark.parametrize(
    ("fmt", "allocate"),
    [
        ("low_rank", "uniform"),
        ("low_rank", "global"),
        (["low_rank", "monarch(blocks=2)"], "global"),
        ("low_rank_light", "water_filling"),
        ("low_rank", "welore"),
    ],
)
def test_the_plan_stays_within_the_limit_and_says_what_it_takes(times, fmt, allocate):
    model = models.llama()
    layers = select_layers(model)
    whole = sum(layer.weight.numel() for layer in layers.values()) / 1000  # ms
    limit = 0.5 * whole + 0.7 * whole  # outside, and seven tenths of the layers' own time
    report = compress(model, fmt, budget=Milliseconds(limit, tokens(1)), calibration=tokens(), allocate=allocate)
    spent = sum(
        1.0 * one.out_features * one.in_features
        if one.format == Dense()
        else one.format.cost(one.out_features, one.in_features).multiply_adds + 0.2 * one.out_features * one.in_features
        for one in report.layers
    )
    assert report.predicted_milliseconds == pytest.approx(0.5 * whole + spent / 1000, rel=1e-6)
    assert report.predicted_milliseconds <= limit
    assert any(one.format != Dense() for one in report.layers)
    assert report.requested_keep == pytest.approx(report.achieved_keep)
    assert set(report.milliseconds) == {"structured", "dense"}
    assert report.to_dict()["milliseconds"]["structured"]["median"] > 0
    assert "predicted" in str(report)


def test_an_interrupted_plan_stays_the_plan_whatever_times_are_measured_then(times, monkeypatch, tmp_path):
    found = []
    for _ in range(2):
        model = models.llama()
        found.append(compress(model, "low_rank", budget=_budget(model), calibration=tokens(), resume=tmp_path))
        monkeypatch.setattr(milliseconds, "_watched", _slower(milliseconds._watched))
    assert [layer.format for layer in found[0].layers] == [layer.format for layer in found[1].layers]
    assert found[0].predicted_milliseconds == found[1].predicted_milliseconds


def _slower(watched):
    def measured(*given):
        own, rows, total = watched(*given)
        return {name: 1.5 * taken for name, taken in own.items()}, rows, round(1.5 * total)

    return measured


def test_members_are_timed_once_for_a_shape(times):
    model = models.llama()
    compress(model, "low_rank", budget=_budget(model), calibration=tokens())
    assert len(times) == len(set(times))


def _budget(model, share=0.7):
    whole = sum(layer.weight.numel() for layer in select_layers(model).values()) / 1000
    return Milliseconds((0.5 + share) * whole, tokens(1))


def test_codes_are_never_multiplied_densely_however_slow(times, monkeypatch):
    def slow(*_, bias, repeats):
        return {"structured": 3.0, "dense": 1.0}

    monkeypatch.setattr(milliseconds, "compare", slow)
    model = nn.Sequential(nn.Linear(32, 48))
    prices = TimedPrices(model, {"0": model[0]}, Milliseconds(1.0, torch.randn(64, 32), 1), None)
    assert prices.of("0", Sparse(density=0.5)) == 3 * prices.of("0", Dense())
    assert prices.of("0", LowRank(rank=3)) == prices.of("0", Dense())


def test_limits_that_cannot_be_met_say_what_can(times):
    model = models.llama()
    before = copy.deepcopy(model.state_dict())
    for limit in (1e-3, 1e9):
        with pytest.raises(BudgetError, match="give something between"):
            compress(model, "low_rank", budget=Milliseconds(limit, tokens(1)))
    with pytest.raises(BudgetError, match="the fastest member of low_rank"):
        compress(model, "low_rank", budget=_budget(model, 0.21))
    with pytest.raises(IsogridError, match="needs an input to time"):
        compress(model, "low_rank", budget=Milliseconds(1.0))
    with pytest.raises(IsogridError, match="above 0"):
        Milliseconds(0.0)
    with pytest.raises(IsogridError, match="above 0"):
        Milliseconds(1.0, repeats=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_first_row_of_any_batch():
    rows = torch.arange(12).view(4, 3)
    assert torch.equal(one_row([rows]), rows[:1])
    assert torch.equal(one_row([{"input_ids": rows, "flag": True}])["input_ids"], rows[:1])
    assert one_row([{"input_ids": rows, "flag": True}])["flag"] is True
    assert torch.equal(one_row([(rows, 1)])[0], rows[:1])


class _Twice(nn.Module):
    """One layer runs twice in a pass, one is called by its argument's name, one is not reached."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(input=self.a(torch.relu(self.a(x)))[:2])


def test_real_times_of_a_model():
    model = _Twice()
    layers = {"a": model.a, "b": model.b, "unused": model.unused}
    prices = TimedPrices(model, layers, Milliseconds(1.0, torch.randn(5, 8), repeats=3), None)
    assert prices.total > prices.dense("a") > 0
    assert prices.outside > 0
    assert prices.of("unused", Monarch(2)) == 0
    assert prices.predicted({"a": Dense(), "b": Dense()}) == pytest.approx(prices.total / 1e6, rel=1e-3)
    assert not model.a._forward_hooks
    assert not model.a._forward_pre_hooks


def test_members_of_a_layer_grow_with_their_limit(times):
    model = models.llama()
    layers = select_layers(model)
    prices = TimedPrices(model, layers, Milliseconds(1.0, tokens(1)), None)
    name = next(iter(layers))
    whole = prices.dense(name)
    found = [prices.within(name, LowRank(), round(share * whole)) for share in (0.4, 0.6, 0.9)]
    assert [one.rank for one in found] == sorted({one.rank for one in found})
    for one, share in zip(found, (0.4, 0.6, 0.9), strict=True):
        assert prices.of(name, one) <= share * whole
