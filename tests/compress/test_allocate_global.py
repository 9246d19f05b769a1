"""One budget over all layers: the documented example, brute force, and models whose layers differ."""

from __future__ import annotations

import itertools
import math
from contextlib import suppress

import pytest
import torch
from torch import nn

from isogrid import BudgetError, IsogridError, LowRank, LowRankLight, Metric, Monarch, compress
from isogrid.compress import as_candidates, curves
from isogrid.compress.allocate import Option, choose, lagrangian_bound, water_fill
from isogrid.compress.curves import Curves, error_curve, sampled
from isogrid.fitting import rank_errors, squared_norm
from isogrid.formats import Budget, Dense

F64 = torch.float64
SPECTRA = {"a": ((8, 8), 10, 1), "b": ((8, 16), 4, 2), "c": ((16, 8), 1, 0.5)}


def documented(fmt, *, dense):
    """The example of fitting theory 5.2: squared singular values a i^-p, i = 1 … 8."""
    curves = {}
    for name, ((m, n), scale, power) in SPECTRA.items():
        sigma = (scale * torch.arange(1, 9, dtype=F64) ** -power).sqrt()
        matrix = torch.zeros(m, n, dtype=F64)
        matrix.diagonal().copy_(sigma)
        if dense:
            curves[name] = error_curve(fmt, matrix, None)
        else:  # ranks beyond what dense would cost take part, too
            ranks = [LowRank(rank) for rank in range(1, 9)]
            tails = [float(sigma[rank:].square().sum()) for rank in range(1, 9)]
            curves[name] = [
                Option(member, member.cost(m, n).parameters, tail) for member, tail in zip(ranks, tails, strict=True)
            ]
    return curves


@pytest.mark.parametrize(
    ("fmt", "dense", "budget", "ranks", "error"),
    [
        (LowRank(), False, 160, (7, 1, 1), 6.731125),
        (LowRank(), True, 160, ("dense", 2, 2), 3.774018),
        (LowRank(), True, 224, ("dense", 1, "dense"), 2.109688),
        (LowRankLight(), True, 224, ("dense", 3, 5), 1.805010),
    ],
)
def test_the_documented_example(fmt, dense, budget, ranks, error):
    chosen = choose(documented(fmt, dense=dense), budget)
    found = tuple("dense" if isinstance(one.format, Dense) else one.format.rank for one in chosen.values())
    assert sum(one.error for one in chosen.values()) == pytest.approx(error, abs=1e-6)
    assert found == ranks
    assert sum(one.cost for one in chosen.values()) <= budget


@pytest.mark.parametrize("seed", range(6))
def test_choose_equals_brute_force(seed):
    source = torch.Generator().manual_seed(seed)
    options = {
        str(layer): [
            Option(LowRank(size + 1), int(cost), float(error))
            for size, (cost, error) in enumerate(
                zip(torch.randint(1, 40, (4,), generator=source), torch.rand(4, generator=source), strict=True)
            )
        ]
        for layer in range(4)
    }  # fmt: skip
    for budget in (30, 60, 90):
        every = [
            sum(one.error for one in combination)
            for combination in itertools.product(*options.values())
            if sum(one.cost for one in combination) <= budget
        ]
        if not every:
            with pytest.raises(BudgetError, match="smallest members"):
                choose(options, budget)
            continue
        chosen = choose(options, budget)
        assert sum(one.error for one in chosen.values()) == pytest.approx(min(every))


def test_large_costs_are_rounded_within_the_budget():
    options = {
        str(layer): [Option(LowRank(r), r * 100_003, 1 / r) for r in range(1, 40)] for layer in range(20)
    }  # fmt: skip
    budget = 20 * 10 * 100_003
    chosen = choose(options, budget)
    cost = sum(one.cost for one in chosen.values())
    assert 0.995 * budget <= cost <= budget
    assert sum(one.error for one in chosen.values()) == pytest.approx(2.0, rel=0.01)


def test_curves_are_the_errors_of_fits():
    matrix = torch.randn(12, 10, dtype=F64, generator=torch.Generator().manual_seed(0))
    metric = Metric.from_rows(torch.randn(50, 10, dtype=F64, generator=torch.Generator().manual_seed(1)))
    for fmt in (LowRank(), LowRankLight(), Monarch(2)):
        curve = error_curve(fmt, matrix, metric)
        assert [one.cost for one in curve] == sorted(one.cost for one in curve)
        assert isinstance(curve[-1].format, Dense)
        assert curve[-1].error == 0
        for one in curve[:-1]:
            factors = one.format.fit(matrix, metric)
            error = squared_norm(matrix - one.format.dense(factors, 12, 10), metric)
            # Between the probed sizes of a format without a closed curve, errors are interpolated.
            assert one.error == pytest.approx(error, rel=1e-6 if fmt.name != "monarch" else 0.5, abs=1e-9)


def unequal():
    """Three layers in a row, of which the first is nearly of rank three."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(24, 3, dtype=F64) @ torch.randn(3, 24, dtype=F64) / 8)
        model[0].weight += 0.01 * torch.randn(24, 24, dtype=F64)
    return model


def test_a_global_budget_serves_the_outputs_better_and_is_kept():
    data = torch.randn(1024, 24, dtype=F64, generator=torch.Generator().manual_seed(2))
    wish = unequal()(data).detach()
    errors, kept = {}, {}
    for allocate in ("uniform", "global"):
        model = unequal()
        report = compress(model, LowRankLight(), keep=0.5, calibration=[data], allocate=allocate)
        errors[allocate] = float((model(data).detach() - wish).norm() / wish.norm())
        kept[allocate] = report.achieved_keep
        assert report.achieved_keep <= 0.5
    assert errors["global"] < errors["uniform"]
    shares = {layer.name: layer.parameters / layer.dense_parameters for layer in report.layers}
    assert shares["0"] < min(shares["2"], shares["4"])


def test_dense_layers_take_part():
    curves = documented(LowRank(), dense=True)
    chosen = choose(curves, 160)
    assert isinstance(chosen["a"].format, Dense)
    assert math.isclose(sum(curve[-1].cost for curve in curves.values()), 320)


def test_bad_requests_are_refused():
    with pytest.raises(IsogridError, match="allocate is one of uniform, global"):
        compress(unequal(), LowRank(), calibration=[torch.randn(64, 24, dtype=F64)], allocate="best")
    with pytest.raises(IsogridError, match="give calibration"):
        compress(unequal(), LowRank(), allocate="global")


def spectra_only():
    return documented(LowRank(), dense=False)


def test_water_filling_spends_on_the_largest_values_per_cost():
    chosen = water_fill(spectra_only(), 160)
    assert tuple(one.format.rank for one in chosen.values()) == (7, 1, 1)
    assert sum(one.error for one in chosen.values()) == pytest.approx(6.731125, abs=1e-6)
    with pytest.raises(BudgetError, match="keep more"):
        water_fill(spectra_only(), 10)


@pytest.mark.parametrize("budget", [100, 160, 224, 300])
def test_the_bound_is_below_the_exact_choice_and_that_below_water_filling(budget):
    options = spectra_only()
    exact = sum(one.error for one in choose(options, budget).values())
    assert lagrangian_bound(options, budget) <= exact * (1 + 1e-9)
    assert exact <= sum(one.error for one in water_fill(options, budget).values()) * (1 + 1e-9)


def test_the_bound_is_tight_where_a_price_spends_just_the_budget():
    options = {"a": [Option(LowRank(1), 1, 4.0), Option(LowRank(2), 2, 1.0), Option(LowRank(3), 3, 0.5)]}
    assert lagrangian_bound(options, 2) == pytest.approx(1.0, rel=1e-6)


def test_water_filling_in_a_model():
    data = torch.randn(1024, 24, dtype=F64, generator=torch.Generator().manual_seed(2))
    model = unequal()
    report = compress(model, LowRank(), keep=0.5, calibration=[data], allocate="water_filling")
    assert report.achieved_keep <= 0.5
    assert min(layer.format.rank for layer in report.layers) < max(layer.format.rank for layer in report.layers)
    with pytest.raises(IsogridError, match="water filling chooses ranks"):
        compress(unequal(), Monarch(2), calibration=[data], allocate="water_filling")


def planted():
    """Three layers of one shape: a Monarch matrix, one of no structure, one of low rank."""
    source = torch.Generator().manual_seed(5)
    model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(3)]).double()
    shapes = Monarch(4, 2)
    factors = {
        name: torch.randn(spec.shape, generator=source, dtype=F64) for name, spec in shapes.factors(32, 32).items()
    }
    with torch.no_grad():
        model[2].weight.copy_(
            torch.randn(32, 5, generator=source, dtype=F64) @ torch.randn(5, 32, generator=source).double()
        )
        model[0].weight.copy_(shapes.dense(factors, 32, 32))
        model[1].weight.copy_(torch.randn(32, 32, generator=source, dtype=F64))
        for layer in model:
            layer.weight /= layer.weight.norm() / 6
    return model


def test_of_several_formats_each_layer_gets_the_better_one():
    data = torch.randn(2048, 32, dtype=F64, generator=torch.Generator().manual_seed(2))
    errors = {}
    for formats in (["low_rank"], ["monarch"], ["low_rank", "monarch"]):
        report = compress(planted(), formats, keep=0.5, calibration=[data])
        errors["+".join(formats)] = [layer.error for layer in report.layers]
        assert report.achieved_keep <= 0.5
    assert {layer.format.name for layer in report.layers} == {"low_rank", "monarch"}
    both, low_rank, monarch = (errors[key] for key in ("low_rank+monarch", "low_rank", "monarch"))
    assert both[0] < 1e-6 < low_rank[0]
    # The first layer is kept as it is, alone and here: the second has the same inputs.
    assert both[1] <= 1.02 * monarch[1]


@pytest.mark.parametrize(
    ("formats", "keep"),
    [
        (["monarch", "blast"], 0.05),
        (["block_tensor_train", "kronecker"], 0.03),
        (["low_rank_light", "blast"], 0.33),
        (["low_rank", "monarch"], 0.58),
    ],
)
def test_of_several_formats_each_layer_spends_its_share_and_no_more(formats, keep):
    def compressed(fmt):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False))
        return compress(model, fmt, keep=keep)

    alone = []
    for fmt in formats:
        with suppress(BudgetError):
            alone.append(compressed(fmt))
    report = compressed(formats)
    assert report.achieved_keep <= keep
    for layer, *others in zip(report.layers, *(one.layers for one in alone), strict=True):
        assert layer.format in [one.format for one in others]
        assert layer.error <= 1.05 * min(one.error for one in others)


def test_a_share_that_no_format_has_is_refused():
    with pytest.raises(BudgetError, match=r"layer '0': monarch.* have no member within 5 of its 576.*keep more"):
        compress(unequal(), ["monarch", "blast"], keep=0.01)


def test_a_matrix_of_one_column_is_left_dense():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 1), nn.Linear(1, 12)).double()
    report = compress(
        model, LowRank(), keep=0.8, calibration=[torch.randn(64, 12, dtype=F64)], allocate="water_filling"
    )
    assert [layer.format == Dense() for layer in report.layers] == [False, True, True]
    assert report.achieved_keep <= 0.8


def test_one_budget_over_several_formats_is_never_worse_than_the_best_of_them():
    data = torch.randn(2048, 32, dtype=F64, generator=torch.Generator().manual_seed(2))
    wish = planted()(data).detach()
    reached, predicted = {}, {}
    for formats in (["low_rank"], ["monarch"], ["low_rank", "monarch"]):
        model = planted()
        report = compress(model, formats, keep=0.5, calibration=[data], allocate="global")
        key = "+".join(formats)
        reached[key] = float((model(data).detach() - wish).norm() / wish.norm())
        predicted[key] = report.predicted_rise
        assert report.achieved_keep <= 0.5
        assert report.least_rise <= report.predicted_rise * (1 + 1e-9)
    assert reached["low_rank+monarch"] < 0.9 * min(reached["low_rank"], reached["monarch"])
    assert predicted["low_rank+monarch"] <= min(predicted["low_rank"], predicted["monarch"])


def test_one_decomposition_tells_all_low_ranks(monkeypatch):
    asked = []
    monkeypatch.setattr(curves, "rank_errors", lambda *of: asked.append(of) or rank_errors(*of))
    model = unequal()
    found = Curves({"0": model[0]}, [LowRank(), LowRankLight(), Monarch(2)])
    found.visit("0", None)
    assert len(asked) == 1
    assert {one.format.name for one in found.of("0")} == {"low_rank", "low_rank_light", "monarch", "dense"}


def test_curves_of_a_kind_come_from_its_samples():
    """Eight alike layers, two of them fitted: the others' predicted errors are near their fits'."""
    source = torch.Generator().manual_seed(3)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 24, bias=False)) for _ in range(8)).double()
    decay = torch.diag(torch.arange(1, 25, dtype=F64) ** -1.0)
    for block in blocks:
        block[0].weight.data = torch.randn(24, 24, generator=source, dtype=F64) @ decay
    layers = {f"{place}.0": block[0] for place, block in enumerate(blocks)}
    assert len(sampled(layers)) == 2
    curves = Curves(layers, [Monarch(4)])
    for name in layers:
        curves.visit(name, None)
    for name, layer in layers.items():
        for one in curves.of(name)[:-1]:
            error = squared_norm(layer.weight.detach() - one.format.dense(one.format.fit(layer.weight), 24, 24), None)
            assert one.error == pytest.approx(float(error), rel=0.35)


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_a_budget_in_bytes_is_kept_in_bytes(allocate):
    data = torch.randn(512, 24, dtype=F64, generator=torch.Generator().manual_seed(2))
    limit = 3 * 24 * 24 * 8 * 6 // 10
    model = unequal()
    report = compress(
        model, "low_rank_light", budget=Budget(bytes=limit, dtype=F64), calibration=[data], allocate=allocate
    )
    stored = sum(value.nbytes for name, value in model.state_dict().items() if not name.endswith(("bias", "weight")))
    assert 0.8 * limit < stored <= limit
    assert report.requested_keep == pytest.approx(0.6, abs=1e-3)
    with pytest.raises(IsogridError, match="give less"):
        compress(unequal(), "low_rank", budget=Budget(bytes=10**6, dtype=F64))


def test_auto_is_a_list_of_formats_that_exist():
    assert len(as_candidates("auto")) >= 3
    assert as_candidates(["low_rank", LowRank()]) == (LowRank(),)
    with pytest.raises(IsogridError, match="leave rank"):
        as_candidates(["low_rank(rank=3)"])
    with pytest.raises(IsogridError, match="needs a format"):
        as_candidates([])


def test_a_layer_left_dense_takes_no_solver_options():
    data = torch.randn(512, 24, dtype=F64, generator=torch.Generator().manual_seed(2))
    model = unequal()
    report = compress(model, Monarch(2), keep=0.85, calibration=[data], allocate="global", sweeps=1)
    assert {layer.format.name for layer in report.layers} == {"dense", "monarch"}


def test_water_filling_takes_nothing_that_costs_more_and_loses_no_less():
    def option(rank, cost, error):
        return Option(LowRank(rank=rank), cost, error)

    # A measured time: rank 2 takes longer than rank 3.
    of = [option(1, 10, 5.0), option(2, 30, 3.0), option(3, 20, 1.0), option(4, 40, 0.5)]
    assert water_fill({"a": of}, 35)["a"].format == LowRank(rank=3)
    assert water_fill({"a": of}, 40)["a"].format == LowRank(rank=4)
