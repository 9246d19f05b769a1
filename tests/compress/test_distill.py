"""Distillation: predictions come nearer to the original's on windows that were not trained on."""

from __future__ import annotations

import pytest
import torch

from isogrid import IsogridError, LowRank, TokenDistillation, compress
from isogrid.compress.distill import Distillation, distance, distill, original_view
from tests import models

QUICK = Distillation(steps=80, rate=0.01, patience=100)


def divergence(model, dense, batch):
    with torch.no_grad():
        ours, theirs = (one(**batch).logits.double().log_softmax(-1) for one in (model, dense))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_predictions_come_nearer_on_unseen_windows():
    architecture = models.ARCHITECTURES["llama"]
    dense, unseen = architecture.build(), architecture.batch(99)
    data = [architecture.batch(seed) for seed in range(24)]
    reached = {}
    for settings in (None, QUICK):
        model = architecture.build()
        report = compress(model, LowRank(), keep=0.5, calibration=data, distill=settings)
        reached[settings] = divergence(model, dense, unseen)
    assert reached[QUICK] < 0.9 * reached[None]
    assert report.distilled.after < report.distilled.before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_reported_divergence_is_the_measured_one():
    architecture = models.ARCHITECTURES["llama"]
    dense, model = architecture.build(), architecture.build()
    data = [architecture.batch(seed) for seed in range(2)]
    report = compress(model, LowRank(), keep=0.5, calibration=data, distill=QUICK)
    assert min(abs(report.distilled.after - divergence(model, dense, batch)) for batch in data) < 1e-5


@pytest.mark.parametrize("name", ["bert", "t5", "vit", "blocks"])
def test_models_of_all_kinds(name):
    architecture = models.ARCHITECTURES[name]
    model = architecture.build()
    data = [architecture.batch(seed) for seed in range(48)]
    report = compress(model, LowRank(), keep=0.5, calibration=data, distill=QUICK)
    assert report.distilled.after < report.distilled.before


def test_single_logits_are_compared_as_numbers():
    """No softmax knows them: of one entry it is one, whatever the model says."""
    student, teacher, batch = models.bert_scorer(1), models.bert_scorer(0), models.padded_batch(5)
    found = student(**batch)
    with torch.no_grad():
        wanted = teacher(**batch)
    expected = float((found.logits.detach() - wanted.logits).square().mean() / wanted.logits.square().mean())
    assert expected > 0.01
    losses = [one(found, wanted, batch) for one in (distance, TokenDistillation(tokens=0).loss)]
    assert [loss.item() for loss in losses] == pytest.approx([expected, expected], rel=1e-5)
    assert float(distance(wanted, wanted, batch)) == 0
    losses[1].backward()
    assert float(student.bert.encoder.layer[0].output.dense.weight.grad.norm()) > 0


@pytest.mark.parametrize(
    "settings", [Distillation(steps=20, rate=0.01), TokenDistillation(steps=20, rate=0.01, tokens=0)]
)
def test_single_logits_are_distilled(settings):
    model, data = models.bert_scorer(), [models.padded_batch(seed) for seed in range(16)]
    compress(model, LowRank(), keep=0.5, calibration=data)
    done = distill(model, models.bert_scorer(), data, settings)
    assert done.after < 0.9 * done.before


def test_the_teacher_stays_as_it_was_and_shares_the_matrices():
    architecture = models.ARCHITECTURES["llama"]
    model = architecture.build()
    batch = architecture.batch(0)
    teacher = original_view(model)
    before = models.output(model, batch)
    mine, theirs = dict(model.named_parameters()), dict(teacher.named_parameters())
    assert all((mine[name] is theirs[name]) == (value.ndim > 1) for name, value in mine.items())
    compress(model, LowRank(), keep=0.5, calibration=[architecture.batch(s) for s in range(8)], refine=0.01)
    assert torch.equal(models.output(teacher, batch), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_models_of_other_dtypes(name, dtype):
    architecture = models.ARCHITECTURES[name]
    model = architecture.build().to(dtype)
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    data = [architecture.batch(seed) for seed in range(8)]
    data = [{key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()} for batch in data]
    report = compress(model, LowRank(), keep=0.5, calibration=data, distill=Distillation(steps=6, rate=0.01))
    assert report.distilled.after <= report.distilled.before
    assert {value.dtype for value in model.state_dict().values()} == {dtype}
    # What isn't trained is what it was, to the bit.
    stays = [key for key, value in model.state_dict().items() if value.ndim > 1 and key in dense]
    assert any("embed" in key for key in stays)
    assert all(torch.equal(model.state_dict()[key], dense[key]) for key in stays)


def test_a_teacher_of_its_own_stays_as_it_was():
    architecture = models.ARCHITECTURES["llama"]
    teacher, model = architecture.build().double(), architecture.build().bfloat16()
    before = models.snapshot(teacher)
    data = [architecture.batch(seed) for seed in range(4)]
    compress(model, LowRank(), keep=0.5, calibration=data)
    distill(model, teacher, data, Distillation(steps=3))
    models.assert_untouched(teacher, before)


def test_bad_requests():
    with pytest.raises(IsogridError, match="give calibration"):
        compress(models.llama(), LowRank(), distill=1.0)
    with pytest.raises(IsogridError, match="give more windows"):
        distill(models.llama(), models.llama(), [models.token_batch()], QUICK)
    with pytest.raises(IsogridError, match="distillation takes a positive number of minutes"):
        Distillation(minutes=-1)
