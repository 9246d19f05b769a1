"""Advice: stand-ins have the errors they stand for, sizes are exact, recipes can be stored and followed."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from isogrid import IsogridError, LowRank, LowRankLight, Metric, compress
from isogrid.compress import (
    Advisor,
    Distillation,
    Effort,
    Plan,
    Prediction,
    Recipe,
    Refinement,
    select_layers,
    stored_bytes,
)
from isogrid.compress.advise import _token_loss
from isogrid.compress.stand_ins import StandIn, standing_in
from isogrid.fitting import squared_norm
from isogrid.formats import Budget, Dense
from tests import models

EFFORTS = (
    Effort("one shot"),
    Effort("refined", refine=Refinement(steps=20, rows=64, rate=0.01)),
    Effort("distilled", refine=Refinement(steps=20, rows=64, rate=0.01), distill=Distillation(steps=10, rows=64)),
)


def told(model, count=12, length=16):
    """Windows that the model tells itself: any change makes it worse at them."""
    torch.manual_seed(0)
    return model.generate(
        torch.ones(count, 1, dtype=torch.int64), max_length=length, min_length=length, do_sample=True, top_k=0
    )


def language_model():
    model = models.llama(seed=3)
    with torch.no_grad():
        model.lm_head.weight *= 8
        for linear in select_layers(model).values():
            linear.weight *= 4
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@given(part=st.floats(0.001, 1.0), rows=st.integers(3, 14), columns=st.integers(3, 14), seed=st.integers(0, 9))
def test_a_stand_in_has_just_the_error_it_stands_for(part, rows, columns, seed):
    source = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=source)
    known = Metric.from_rows(torch.randn(40, columns, generator=source) + 2)
    for has_bias, metric in ((False, known), (True, known.centred)):
        stand_in = StandIn.of(matrix, known, has_bias=has_bias)
        wanted = part * squared_norm(matrix.double(), metric)
        found = squared_norm((matrix - stand_in.with_error(matrix, wanted)).double(), metric)
        assert found == pytest.approx(wanted, rel=1e-3)


def test_the_model_is_as_it_was_whatever_happens_inside():
    model = models.bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = select_layers(model)
    metrics = {name: Metric(torch.eye(layer.in_features), mean=torch.ones(layer.in_features))
               for name, layer in layers.items()}  # fmt: skip
    stand_ins = {name: StandIn.of(layer.weight.detach(), metrics[name]) for name, layer in layers.items()}
    errors = {name: 0.3 * float(layer.weight.detach().square().sum()) for name, layer in layers.items()}
    inside = standing_in(layers, stand_ins, errors)
    inside.__enter__()
    moved = {name: value.clone() for name, value in model.state_dict().items()}
    inside.__exit__(None, None, None)
    with pytest.raises(KeyError), standing_in(layers, stand_ins, errors):
        raise KeyError
    name = next(iter(layers))
    assert not torch.equal(moved[f"{name}.weight"], before[f"{name}.weight"])
    # The bias makes up for the mean of what the matrix has lost.
    lost = (before[f"{name}.weight"] - moved[f"{name}.weight"]).sum(1)
    torch.testing.assert_close(moved[f"{name}.bias"] - before[f"{name}.bias"], lost, atol=1e-5, rtol=1e-4)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.fixture(scope="module")
def advised():
    model = language_model()
    data = told(model, 96)
    before = models.snapshot(model)
    advisor = Advisor(model, data, formats=("low_rank_light", "monarch"), efforts=EFFORTS)
    recipes = advisor.for_keep(0.6)
    models.assert_untouched(model, before)
    return model, data, advisor, recipes


def test_recipes_are_followed_to_the_byte(advised):
    model, data, _, recipes = advised
    assert [one.predicted.gap for one in recipes] == sorted(one.predicted.gap for one in recipes)
    assert {one.effort.name for one in recipes} == {"one shot", "refined", "distilled"}
    for recipe in recipes:
        smaller = copy.deepcopy(model)
        report = compress(smaller, recipe.plan, calibration=data, **recipe.options())
        assert report.parameters == recipe.predicted.parameters <= 0.6 * report.dense_parameters
        assert report.achieved_keep == recipe.predicted.keep == report.requested_keep
        assert report.model_bytes == stored_bytes(smaller) == recipe.predicted.model_bytes
        assert {layer.name: layer.format for layer in report.layers} == recipe.plan.members
        assert report.allocation == "global"
        assert recipe.predicted.gap > 0


def test_a_stored_recipe_is_the_same(advised):
    import json

    for recipe in advised[3]:
        told_again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
        assert told_again == recipe


def test_predictions_fall_with_size(advised):
    advisor = advised[2]
    recipes = [advisor.predict(advisor.plan(keep), EFFORTS[0]) for keep in (0.4, 0.6, 0.8)]
    gaps = [recipe.predicted.gap for recipe in recipes]
    assert gaps == sorted(gaps, reverse=True)
    # The time is that of following the plan: nothing is surveyed again.
    assert recipes[0].predicted.seconds == advisor._effect(recipes[0].plan, EFFORTS[0])[1]


def test_sizes_that_are_no_compression_are_refused(advised):
    advisor = advised[2]
    for limit in (0, 10**9):
        with pytest.raises(IsogridError, match=f"the limit is {limit}, the selected matrices take .* give less"):
            advisor.for_limit(limit)
    with pytest.raises(IsogridError, match="between 0 and 1"):
        advisor.for_keep(1)


def test_the_smallest_model_within_a_gap(advised):
    advisor = advised[2]
    sizes = []
    for gap in (0.1, 0.4):
        found = advisor.for_gap(gap)
        assert all(one.predicted.gap <= gap for one in found)
        sizes.append({one.effort.name: one.predicted.parameters for one in found})
        assert [one.predicted.parameters for one in found] == sorted(one.predicted.parameters for one in found)
    assert all(sizes[1][name] < size for name, size in sizes[0].items())
    with pytest.raises(IsogridError, match="positive, got 0"):
        advisor.for_gap(0)
    with pytest.raises(IsogridError, match=r"no recipe within 0\.98"):
        advisor.for_gap(1e-9)


def test_encoders_are_measured_by_their_outputs():
    model = models.bert()
    data = [models.padded_batch(seed) for seed in range(10)]
    advisor = Advisor(model, data, formats=[LowRankLight()], efforts=EFFORTS[:2], unit=Budget(bytes=0))
    assert advisor.unit_of_gap == "squared relative error of outputs"
    assert all(one.mean is not None for one in advisor._stand_ins.values()), "their biases take up mean errors"
    assert advisor._held == [data[5]], "from the middle: texts come sorted by their length"
    limit = sum(linear.weight.nbytes for linear in select_layers(model).values()) // 2
    for recipe in advisor.for_limit(limit):
        smaller = copy.deepcopy(model)
        report = compress(smaller, recipe.plan, calibration=data, **recipe.options())
        assert report.model_bytes == recipe.predicted.model_bytes
        assert 0 < recipe.predicted.gap < 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_models_of_other_dtypes(dtype):
    model = language_model()
    data = told(model)
    before = models.snapshot(model.to(dtype))
    (recipe,) = Advisor(model, data, formats=[LowRankLight()], efforts=EFFORTS[2:]).for_keep(0.6)
    models.assert_untouched(model, before)
    assert 0 < recipe.predicted.gap < 10


def test_token_loss_leaves_padding_out():
    model, ids = language_model(), models.tokens(3, 10, 0)
    mask = models.padding_mask(3, 10)
    output = model(input_ids=ids, attention_mask=mask)
    rows = [
        nn.functional.cross_entropy(output.logits[row, : int(mask[row].sum()) - 1], ids[row, 1 : int(mask[row].sum())],
                                    reduction="none")
        for row in range(3)
    ]  # fmt: skip
    found = _token_loss(output, {"input_ids": ids, "attention_mask": mask})
    assert found == pytest.approx(float(torch.cat(rows).mean()), rel=1e-5)
    assert math.isfinite(found)
    assert _token_loss(SimpleNamespace(logits=output.logits[..., :3]), {"input_ids": ids}) is None
    assert _token_loss(models.bert()(input_ids=ids), {"input_ids": ids}) is None


def test_guesses_of_masked_tokens_are_no_next_tokens():
    model = models.bert_masked()
    data = [models.padded_batch(seed) for seed in range(6)]
    advisor = Advisor(model, data, formats=[LowRankLight()], efforts=EFFORTS[:1])
    assert advisor.unit_of_gap == "nats a prediction"
    assert advisor.for_keep(0.5)[0].predicted.gap > advisor.for_keep(0.9)[0].predicted.gap > 0


def test_bad_input():
    model = language_model()
    with pytest.raises(IsogridError, match="got 1 of 3 batches; give more"):
        Advisor(model, told(model, 1))
    with pytest.raises(IsogridError, match="trains on two others, got 2 of 3 batches; give more"):
        Advisor(model, told(model, 2))
    nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    with pytest.raises(IsogridError, match=r"'model\.layers\.1\.mlp\.up_proj': its weight is computed"):
        Advisor(model, told(model))
    model = language_model()
    plan = Plan({"elsewhere": LowRank(2)}, (LowRank(),))
    with pytest.raises(IsogridError, match="the plan doesn't know it"):
        compress(model, plan)
    layers = select_layers(model)
    plan = Plan({**dict.fromkeys(layers, Dense()), "elsewhere": LowRank(2)}, (LowRank(),))
    with pytest.raises(IsogridError, match="'elsewhere': it is planned, but not selected"):
        compress(model, plan)
    for described in ({}, {"effort": "x"}, {"members": 3}):
        with pytest.raises(IsogridError, match="not a recipe that advise has written"):
            Recipe.from_dict(described)
    with pytest.raises(IsogridError, match="not a plan of layers"):
        Plan.from_dict({"members": {}})
    Recipe(EFFORTS[0], plan, Prediction(1, 0.5, 2, 0.1, 3.0))
