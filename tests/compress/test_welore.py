"""WeLore's rule on given spectra, and what a model makes of it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from isogrid import BudgetError, IsogridError, LowRank, LowRankLight, Monarch, compress, select_layers
from isogrid.compress.prices import StoredPrices
from isogrid.compress.welore import (
    RankChoice,
    allocate_welore,
    analyze_spectra,
    choices,
    effective_rank_reduction,
    freeze_other_than_low_rank,
    low_rank_components,
    normalised,
    threshold_for_reduction,
)
from isogrid.formats import Dense
from tests import models

F64 = torch.float64


def power(alpha, n=64):
    return torch.arange(1, n + 1, dtype=F64) ** -alpha


def test_the_documented_ranks_and_bookkeeping():
    found = choices({"heavy": power(1.5), "light": power(0.4)}, 0.175)
    assert (found["heavy"].rank, found["light"].rank) == (3, 15)
    # Document 6: p = 64, 64, 48, 48 and pruned 61, 49, 28, 6.
    spectra = {"a": power(1.5), "b": power(0.4), "c": torch.zeros(48), "d": torch.zeros(48)}
    by_hand = {
        "a": RankChoice(3, True),
        "b": RankChoice(15, True),
        "c": RankChoice(20, True),
        "d": RankChoice(42, False),
    }
    assert effective_rank_reduction(spectra, by_hand) == pytest.approx(144 / 224)
    assert effective_rank_reduction(spectra, by_hand, achieved=True) == pytest.approx(138 / 224)


spectrum = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 2.0]), min_size=1, max_size=8).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=F64)
)


@given(st.lists(spectrum, min_size=1, max_size=4), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_choices_equal_counting(spectra, threshold):
    named = {str(place): one for place, one in enumerate(spectra)}
    for name, one in choices(named, threshold).items():
        values = named[name].tolist()
        top, bottom = values[0], values[-1]
        z = [(v - bottom) / (top - bottom) if top > bottom else 1.0 for v in values]
        kept = 1 if top == 0 else max(sum(not v < threshold for v in z), 1)
        assert one.rank == kept
        if top > 0:
            assert one.low_rank == ((len(values) - kept) / len(values) > 0.5)


@given(st.lists(spectrum, min_size=1, max_size=4), st.floats(0, 1))
def test_the_threshold_is_the_smallest_that_reaches_the_reduction(spectra, reduction):
    pooled = torch.cat([normalised(one) for one in spectra])
    threshold = threshold_for_reduction({str(i): one for i, one in enumerate(spectra)}, reduction)

    def reached(k):
        return int((pooled < k).sum())

    wanted = reduction * len(pooled) - 1e-9
    feasible = [k for k in [0.0, *torch.unique(pooled).tolist(), 1.0] if reached(k) >= wanted]
    assert threshold == (min(feasible) if feasible else 1.0)


def test_scale_doesnt_matter_and_ranks_fall_with_the_threshold():
    spectra = {"a": power(0.7), "b": 50 * power(1.2)}
    last = None
    for threshold in (0.0, 0.05, 0.1, 0.3, 1.0):
        found = choices(spectra, threshold)
        assert found == choices({"a": 9 * spectra["a"], "b": spectra["b"]}, threshold)
        if last is not None:
            assert all(found[name].rank <= last[name].rank for name in found)
        last = found
    assert choices(spectra, 0.0)["a"].rank == 64


def test_half_is_not_low_rank_yet():
    flat_half = torch.tensor([2.0, 2.0, 1.0, 1.0], dtype=F64)
    assert choices({"a": flat_half}, 0.5)["a"] == RankChoice(2, False)
    assert choices({"a": torch.tensor([2.0, 1.0, 1.0], dtype=F64)}, 0.5)["a"] == RankChoice(1, True)


@pytest.mark.parametrize("fmt", [LowRank(), LowRankLight()])
def test_a_models_categories_are_the_rules(fmt):
    model = models.llama()
    layers = select_layers(model)
    spectra = analyze_spectra(layers)
    total = sum(one.weight.numel() for one in layers.values())
    limit = round(0.7 * total)
    members = allocate_welore(layers, fmt, StoredPrices(layers), limit)
    # Some threshold gives just these, and the next smaller one is over the budget.
    pooled = torch.unique(torch.cat([normalised(one) for one in spectra.values()]))

    def under(threshold):
        return {
            name: fmt.with_size(one.rank) if one.low_rank else Dense()
            for name, one in choices(spectra, threshold).items()
        }

    def cost(found):
        return sum(one.cost(*layers[name].weight.shape).parameters for name, one in found.items())

    at = next(k for k in [0.0, *pooled.tolist()] if under(k) == members)
    assert cost(members) <= limit
    assert at == 0 or cost(under(float(pooled[pooled < at][-1]))) > limit
    report = compress(model, fmt, keep=0.7, allocate="welore")
    assert {layer.name: layer.format for layer in report.layers} == members
    assert low_rank_components(model).keys() == {name for name, one in members.items() if one != Dense()}


def test_only_low_rank_components_are_trained():
    model = models.llama()
    compress(model, LowRank(), keep=0.6, allocate="welore")
    count = freeze_other_than_low_rank(model, train_norms=False)
    expected = sum(layer.cost().parameters for layer in low_rank_components(model).values())
    assert count == expected > 0
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == expected
    models_output = model(**models.token_batch()).logits.square().mean()
    models_output.backward()
    assert all((value.grad is not None) == value.requires_grad for value in model.parameters())


def trained_mlp(seed):
    """The document's small network (section 6), shortened: heavy-tailed spectra come from training."""
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16))
    model = nn.Sequential(
        *[part for a, b in ((32, 96), (96, 96), (96, 96), (96, 96)) for part in (nn.Linear(a, b), nn.ReLU())],
        nn.Linear(96, 16),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for step in range(800):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 800)
        x = torch.randn(256, 32)
        loss = (model(x) - teacher(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_ranks_by_the_threshold_serve_a_trained_network_better_than_equal_ranks(seed):
    model = trained_mlp(seed)
    names = ["2", "4", "6"]
    spectra = analyze_spectra({name: model.get_submodule(name) for name in names})
    x = torch.randn(2000, 32, generator=models.generator(7))
    wanted = model(x).detach()

    @torch.no_grad()
    def error(ranks):
        smaller = copy.deepcopy(model)
        for name in names:
            weight = smaller.get_submodule(name).weight
            u, s, vh = torch.linalg.svd(weight)
            weight.copy_(u[:, : ranks[name]] * s[: ranks[name]] @ vh[: ranks[name]])
        return float((smaller(x) - wanted).square().mean() / wanted.square().mean())

    for reduction in (0.5, 0.7):
        ranks = {name: one.rank for name, one in choices(spectra, threshold_for_reduction(spectra, reduction)).items()}
        equal = dict.fromkeys(names, 96 - int(reduction * 96))
        assert sum(ranks.values()) <= sum(equal.values())
        assert error(ranks) < error(equal)


def test_bad_requests():
    with pytest.raises(IsogridError, match="chooses ranks of low_rank"):
        compress(models.llama(), Monarch(2), allocate="welore")
    with pytest.raises(IsogridError, match="one format"):
        compress(models.llama(), ["low_rank", "low_rank_light"], allocate="welore")
    with pytest.raises(BudgetError, match="keep at least"):
        compress(models.llama(), LowRank(), keep=0.01, allocate="welore")
    with pytest.raises(IsogridError, match=r"in \[0, 1\]"):
        threshold_for_reduction({"a": power(1.0)}, 1.5)
