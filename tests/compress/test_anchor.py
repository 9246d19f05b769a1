"""Anchored targets: known answers of fitting theory 9, and what they repair in a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isogrid import IsogridError, LowRank, Metric, Monarch, compress
from isogrid.compress.anchor import DriftSum, anchored_target, output_distance
from tests.formats.test_known_answers import theory

F64 = torch.float64


def test_the_documented_target_from_drift_alone():
    t = theory()
    found = anchored_target(t["W"], Metric(t["C'"]), t["K"] - t["C'"])
    assert torch.allclose(found, t["T"], atol=1e-10)
    half = anchored_target(t["W"], Metric(t["C'"]), t["K"] - t["C'"], 0.5)
    assert torch.allclose(half, (t["W"] + t["T"]) / 2, atol=1e-10)


def test_the_documented_anchored_objective():
    t = theory()
    factors = LowRank(4).fit(t["T"], Metric(t["C'"]))
    near = LowRank(4).dense(factors, 12, 16)
    energy = float((t["W"] @ t["C"] @ t["W"].T).trace())
    distance = output_distance(t["W"], near, cross=t["K"] - t["C'"], moment=t["C'"], energy=energy)
    assert distance == pytest.approx(9.186794, abs=1e-6)
    least = output_distance(t["W"], t["T"], cross=t["K"] - t["C'"], moment=t["C'"], energy=energy)
    assert least == pytest.approx(6.916584626969, abs=1e-9)


def test_sums_in_pieces_are_the_means():
    torch.manual_seed(0)
    x = torch.randn(400, 6) + 5
    moved = 0.8 * x + 0.3 * torch.randn(400, 6) - 1
    sums = DriftSum()
    for piece in range(0, 400, 80):
        sums.add(x[piece : piece + 80], moved[piece : piece + 80])
    drift = sums.drift()
    wide, there = x.double(), moved.double()
    assert torch.allclose(drift.shift, (wide - there).mean(0), atol=1e-6)
    assert torch.allclose(drift.cross, (wide - there).T @ there / 400, atol=1e-4)
    about = there - there.mean(0)
    assert torch.allclose(drift.centred, (wide - there).T @ about / 400, atol=1e-4)
    assert DriftSum().drift() is None


def deep(bias):
    torch.manual_seed(3)
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(24, 24, bias=bias), nn.Tanh()))).double()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("fmt", [LowRank(), Monarch(3)], ids=str)
def test_anchoring_brings_the_outputs_nearer(fmt, bias):
    data = torch.randn(2048, 24, generator=torch.Generator().manual_seed(1), dtype=F64)
    data = data * torch.logspace(0, -1.5, 24, dtype=F64)
    model = deep(bias)
    wish = model(data)
    errors = {}
    for anchor in (0.0, 1.0):
        smaller = deep(bias)
        report = compress(smaller, fmt, keep=0.4, calibration=list(data.split(256)), anchor=anchor)
        errors[anchor] = float((smaller(data) - wish).norm().detach() / wish.norm().detach())
        for layer in report.layers:
            assert 0 <= layer.upstream <= layer.error
            assert layer.least_error is None or layer.least_error <= layer.error
        assert report.layers[0].upstream == pytest.approx(0, abs=1e-3), "nothing is lost before the first layer"
    assert errors[1.0] < errors[0.0]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("anchor", [0.25, 1.0])
def test_the_reported_error_is_the_measured_one(anchor, bias):
    data = 0.5 + torch.randn(1024, 24, generator=torch.Generator().manual_seed(1), dtype=F64)
    original, smaller = deep(bias), deep(bias)
    report = compress(smaller, LowRank(), keep=0.4, calibration=[data], anchor=anchor)
    ours, theirs = data, data
    for i in (0, 2, 4):
        ours, theirs = torch.tanh(smaller[i](ours)), torch.tanh(original[i](theirs))
    difference = smaller[6](ours) - original[6](theirs)
    about = original[6](theirs) - (original[6](theirs).mean(0) if bias else 0.0)
    measured = float((difference.square().sum() / about.square().sum()).sqrt().detach())
    assert report.layers[3].error == pytest.approx(measured, rel=1e-3)
    assert report.layers[3].known_error == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rows", [64, 2048])  # few rows: much damping
def test_no_fit_goes_below_the_certificate(rows, bias):
    data = torch.randn(rows, 24, generator=torch.Generator().manual_seed(1), dtype=F64)
    second = {}
    for anchor in (0.25, 0.5, 0.75, 1.0):  # the first layer has no drift: the second's inputs are always the same
        report = compress(deep(bias), LowRank(), keep=0.4, calibration=[data], anchor=anchor, select=["0", "2"])
        second[anchor] = report.layers[1]
    best = second[1.0].error  # the optimum, in closed form
    assert second[1.0].least_error == pytest.approx(best, rel=1e-5)
    for layer in second.values():
        assert layer.upstream == pytest.approx(second[1.0].upstream, rel=1e-5)
        assert layer.upstream <= layer.least_error <= best * (1 + 1e-9)
        assert best * (1 - 1e-9) <= layer.error


def test_a_module_used_twice_stays_the_original_for_the_original():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))

    model = Twice().double()
    seen = []
    model.b.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    data = torch.randn(64, 8, dtype=F64)
    wish = Twice().double().a
    expected = torch.tanh(wish(torch.tanh(wish(data))))
    compress(model, LowRank(), keep=0.5, calibration=[data], anchor=1.0)
    assert any(torch.allclose(x, expected) for x in seen), "the original stream met the dense layer both times"


def test_bad_anchors_are_refused():
    data = torch.randn(64, 24, dtype=F64)
    with pytest.raises(IsogridError, match="between 0 and 1"):
        compress(deep(True), LowRank(), calibration=[data], anchor=1.5)
    with pytest.raises(IsogridError, match="give calibration batches"):
        compress(deep(True), LowRank(), anchor=1.0)
