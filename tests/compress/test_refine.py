"""Refinement: better block outputs on windows that were not trained on, and nothing lost where it doesn't help."""

from __future__ import annotations

import copy
import gc
import sys

import pytest
import torch
from torch import nn

from isogrid import IsogridError, LowRank, LowRankLight, compress, select_layers
from isogrid.compress import tuning
from isogrid.compress.blockwise import enclosing_blocks
from isogrid.compress.layerwise import Seen
from isogrid.compress.lockstep import Halt
from isogrid.compress.refine import Example, Refinement, refine_block
from isogrid.linear import StructuredLinear
from tests import models

QUICK = Refinement(steps=60, rows=64, rate=0.01, patience=100)


def batches(architecture, count=12):
    return [architecture.batch(seed) for seed in range(count)]


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5", "vit", "blocks"])
def test_blocks_end_nearer_to_the_original_on_held_out_windows(name):
    architecture = models.ARCHITECTURES[name]
    model = architecture.build()
    report = compress(model, LowRank(), keep=0.5, calibration=batches(architecture), refine=QUICK)
    assert {block.name for block in report.blocks} == set(enclosing_blocks(architecture.build(), named(report)))
    assert all(block.after <= block.before for block in report.blocks)
    assert any(block.after < 0.95 * block.before for block in report.blocks)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def named(report):
    return {layer.name: nn.Identity() for layer in report.layers}


def test_the_models_outputs_come_nearer_too():
    architecture = models.ARCHITECTURES["llama"]
    dense, unseen = architecture.build(), architecture.batch(99)
    wanted = models.output(dense, unseen)
    errors = {}
    for refine in (None, QUICK):
        model = architecture.build()
        compress(model, LowRankLight(), keep=0.5, calibration=batches(architecture, 24), refine=refine)
        errors[refine] = float((models.output(model, unseen) - wanted).norm() / wanted.norm())
    assert errors[QUICK] < errors[None]


def test_the_reported_error_is_the_measured_one():
    """The last block's error, measured from outside on the very windows that were held out."""
    architecture = models.ARCHITECTURES["llama"]
    model, dense = architecture.build(), architecture.build()
    data = batches(architecture, 2)  # one to train on, one to look at
    report = compress(model, LowRank(), keep=0.5, calibration=data, refine=QUICK)
    name = report.blocks[-1].name
    seen = []
    for batch in data:
        rows = []
        for one in (model, dense):
            handle = one.get_submodule(name).register_forward_hook(lambda _, __, out: rows.append(out))  # noqa: B023
            models.output(one, batch)
            handle.remove()
        found, wanted = (row[0] if isinstance(row, tuple) else row for row in rows)
        relative = (found - wanted).square().mean(-1) / wanted.square().mean(-1)
        seen.append(float(relative.mean().sqrt()))
    assert min(abs(report.blocks[-1].after - one) for one in seen) < 1e-4


class Residual(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.linear(self.norm(x))


def structured(seed=0):
    block = models.shake(Residual(), seed)
    block.linear = StructuredLinear.from_linear(block.linear, LowRank(4))
    return block.eval()


def examples(block, count=6, *, noise=0.0, dtype=torch.float32):
    found = []
    for seed in range(count):
        x = torch.randn(16, 8, generator=models.generator(seed)).to(dtype)
        with torch.no_grad():
            wanted = block(x) + noise * torch.randn(16, 8, generator=models.generator(100 + seed)).to(dtype)
        found.append(Example(Halt(seed, False, (x,), {}), wanted, x))
    return found


def test_a_block_that_training_only_spoils_stays_as_it_was():
    block = structured()
    before = copy.deepcopy(block.state_dict())
    # Steps as large as the factors themselves lead away from a block that is right already.
    report = refine_block("b", block, examples(block), Refinement(steps=25, rows=16, rate=1.0))
    assert report.kept == 0
    assert report.after == report.before
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_steps_too_long_for_a_good_fit_become_shorter():
    """Noisy gradients, and a start that is nearer to the best values than one step is long."""
    best = torch.ones(200)
    noise = torch.randn(8, 200, generator=models.generator(0))
    value = nn.Parameter(best + 0.003 * torch.randn(200, generator=models.generator(1)))
    settings = tuning.Tuning(steps=200, rows=1, rate=0.3, held_out=0.25)
    found = tuning.tune(
        [value],
        range(8),
        lambda place: (value - best - 0.003 * noise[place]).square().sum(),
        lambda places: float((value.detach() - best).square().sum()),
        settings,
        rows=lambda _: 1,
    )
    assert found.after < 0.5 * found.before


def test_early_stop():
    block = structured()
    report = refine_block("b", block, examples(block, noise=1.0), Refinement(steps=5000, rows=16, patience=2))
    assert report.steps < 1000


def test_a_dense_matrix_of_the_block_stays():
    block = structured()
    block.other = nn.Linear(8, 8)
    flags = {key: value.requires_grad for key, value in block.named_parameters()}
    kept = block.other.weight.detach().clone()
    target = structured(1)
    report = refine_block("b", block, examples(target), QUICK)
    assert report.after < report.before
    assert torch.equal(block.other.weight, kept)
    assert {key: value.requires_grad for key, value in block.named_parameters()} == flags


def test_a_bfloat16_block_stays_in_bfloat16_and_gets_better():
    block, target = structured().to(torch.bfloat16), structured(1)
    report = refine_block("b", block, examples(target.to(torch.bfloat16), dtype=torch.bfloat16), QUICK)
    assert report.after < 0.9 * report.before
    assert {value.dtype for value in block.parameters()} == {torch.bfloat16}


def test_same_seed_same_result():
    def refined():
        block = structured()
        refine_block("b", block, examples(structured(1)), QUICK, seed=3)
        return block.state_dict()

    one, two = refined(), refined()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("slower", [1.0, 4.0])
@pytest.mark.parametrize("look_every", [1, 2, 25])
def test_looks_take_of_the_time_too(monkeypatch, look_every, slower):
    """By a clock that only steps and looks move, and steps that may become slower than those that were timed."""
    now, steps = 0.0, 0
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now)
    value = torch.nn.Parameter(torch.ones(3))

    def loss(_):
        nonlocal now, steps
        steps += 1
        now += 1.0 if steps <= 10 else slower
        return value.square().sum()

    def measure(_):
        nonlocal now
        now += 5.0
        return float(value.detach().square().sum())

    settings = tuning.Tuning(steps=10**6, rows=1, look_every=look_every, patience=10**6)
    found = tuning.tune([value], range(8), loss, measure, settings, rows=lambda _: 1, seconds=100.0)
    assert found.seconds == now
    assert 80 <= now <= 100 + slower - 1  # the one step that turns out slower
    assert found.steps == steps
    assert found.after < found.before


def test_minutes_limit_the_steps():
    block = structured()
    report = refine_block("b", block, examples(structured(1)), Refinement(steps=10**6, patience=10**6), seconds=0.5)
    assert report.steps < 10**5
    assert report.seconds < 60


def test_a_model_that_could_not_be_refined_is_as_before():
    architecture = models.ARCHITECTURES["llama"]
    model = architecture.build()
    before = models.snapshot(model)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, LowRank(), keep=0.5, calibration=batches(architecture), refine=QUICK, on_block=interrupt)
    models.assert_untouched(model, before)


def test_inputs_of_layers_are_let_go_of_before_training(monkeypatch):
    alive = []

    def counted(*args, **kwargs):
        alive.append(sum(type(one) is Seen for one in gc.get_objects()))
        return refine_block(*args, **kwargs)

    monkeypatch.setattr(sys.modules["isogrid.compress.blockwise"], "refine_block", counted)
    architecture = models.ARCHITECTURES["llama"]
    data = batches(architecture, 3)
    compress(architecture.build(), "low_rank", keep=0.5, calibration=data, anchor=0.5, refine=Refinement(steps=1))
    assert alive == [0, 0]


def test_a_block_used_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Residual(), Residual()])

        def forward(self, x):
            return self.layers[1](self.layers[0](self.layers[0](x)))

    model = models.shake(Twice(), 0).eval()
    before = models.snapshot(model)
    with pytest.raises(IsogridError, match="more than once"):
        compress(model, LowRank(), keep=0.5, calibration=[torch.randn(32, 8), torch.randn(32, 8)], refine=QUICK)
    models.assert_untouched(model, before)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"minutes": 0}, "positive number of minutes"),
        ({"steps": 0}, "at least one step"),
        ({"rate": -1.0}, "learning rate is positive"),
        ({"held_out": 1.0}, "share in"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(IsogridError, match=says):
        Refinement(**settings)


def test_refinement_needs_data_and_two_batches():
    with pytest.raises(IsogridError, match="give calibration"):
        compress(models.llama(), LowRank(), refine=1.0)
    with pytest.raises(IsogridError, match="more calibration windows"):
        compress(models.llama(), LowRank(), calibration=[models.token_batch()], refine=QUICK)


def test_enclosing_blocks():
    model = models.llama()
    layers = select_layers(model, "*")
    blocks = enclosing_blocks(model, layers)
    assert [name for name in blocks if "layers" in name] == ["model.layers.0", "model.layers.1"]
    assert len(blocks["model.layers.0"]) == 7
    assert sorted(name for of in blocks.values() for name in of) == sorted(layers)
