"""An interrupted compression goes on where it stopped and ends as one that never did."""

from __future__ import annotations

import pytest
import torch

from isogrid import IsogridError, compress
from isogrid.compress import BlockReport, Refinement, blockwise, pipeline
from tests import models

QUICK = Refinement(steps=20, rows=48, rate=0.01)


def request(name, **changes):
    architecture = models.ARCHITECTURES[name]
    data = [architecture.batch(seed) for seed in range(6)]
    return architecture.build(), {"keep": 0.5, "calibration": data, **changes}


class Interrupted(BaseException):
    pass


def interrupt_after(count):
    seen = []

    def on_layer(layer):
        seen.append(layer.name)
        if len(seen) > count:
            raise Interrupted

    return on_layer, seen


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("changes", [{}, {"refine": QUICK}, {"anchor": 0.5, "allocate": "global", "refine": QUICK}])
@pytest.mark.parametrize("format", ["low_rank_light", "monarch(blocks=2)"])
def test_the_end_is_the_same(name, changes, format, tmp_path):
    through, asked = request(name, **changes)
    whole = compress(through, format, **asked)
    model, asked = request(name, **changes)
    before = models.snapshot(model)
    half = len(whole.layers) // 2 + 1
    stop, fitted = interrupt_after(half)
    with pytest.raises(Interrupted):
        compress(model, format, **asked, resume=tmp_path, on_layer=stop)
    models.assert_untouched(model, before)
    going_on, rest = interrupt_after(len(whole.layers))
    report = compress(model, format, **asked, resume=tmp_path, on_layer=going_on)
    assert len(fitted) > half
    assert 0 < len(rest) < len(whole.layers)  # the finished block was not fitted again
    for key, value in through.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    told, expected = report.to_dict()["layers"], whole.to_dict()["layers"]
    assert [{**layer, "seconds": 0} for layer in told] == [{**layer, "seconds": 0} for layer in expected]
    assert [block.after for block in report.blocks] == [block.after for block in whole.blocks]


def test_blocks_of_another_compression_are_refused(tmp_path):
    model, asked = request("llama")
    compress(model, "low_rank", **asked, resume=tmp_path)
    for other in ({"keep": 0.6}, {"seed": 3}, {"anchor": 1.0}):
        model, asked = request("llama", **other)
        with pytest.raises(IsogridError, match="another compression"):
            compress(model, "low_rank", **asked, resume=tmp_path)
    model, asked = request("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(IsogridError, match="another compression"):
        compress(model, "low_rank", **asked, resume=tmp_path)
    model, asked = request("llama")
    asked["calibration"] = asked["calibration"][::-1]
    with pytest.raises(IsogridError, match="another compression"):
        compress(model, "low_rank", **asked, resume=tmp_path)


def test_the_plan_is_kept(tmp_path, monkeypatch):
    model, asked = request("llama", allocate="global")
    stop, _ = interrupt_after(8)
    with pytest.raises(Interrupted):
        compress(model, "low_rank_light", **asked, resume=tmp_path, on_layer=stop)
    made = pipeline.plan
    monkeypatch.setattr(pipeline, "plan", lambda *_, **__: pytest.fail("layers are surveyed again"))
    report = compress(model, "low_rank_light", **asked, resume=tmp_path)
    monkeypatch.setattr(pipeline, "plan", made)
    model, asked = request("llama", allocate="global")
    whole = compress(model, "low_rank_light", **asked)
    assert [layer.format for layer in report.layers] == [layer.format for layer in whole.layers]
    assert (report.predicted_rise, report.least_rise) == (whole.predicted_rise, whole.least_rise)


def test_a_bad_request_leaves_no_folder(tmp_path):
    model, asked = request("llama", keep=0.0001)
    with pytest.raises(IsogridError, match="smallest"):
        compress(model, "low_rank", **asked, resume=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_minutes_of_finished_blocks_are_spent(tmp_path, monkeypatch):
    given = []

    def refine_block(name, *_, seconds, **__):
        given.append(seconds)
        return BlockReport(name, 1.0, 1.0, 0, 0, 100.0)

    monkeypatch.setattr(blockwise, "refine_block", refine_block)
    model, asked = request("llama", refine=10.0)
    stop, _ = interrupt_after(8)
    with pytest.raises(Interrupted):
        compress(model, "low_rank", **asked, resume=tmp_path, on_layer=stop)
    compress(model, "low_rank", **asked, resume=tmp_path)
    assert given == [300.0, 500.0]


def test_frozen_biases_stay_frozen(tmp_path):
    for _ in range(2):  # fitted, then restored
        model, asked = request("bert")
        for name, value in model.named_parameters():
            value.requires_grad_(not name.endswith("bias"))
        compress(model, "low_rank", **asked, resume=tmp_path)
        flags = {name: value.requires_grad for name, value in model.named_parameters()}
        assert flags == {name: not name.endswith("bias") for name in flags}


def test_resume_needs_data(tmp_path):
    with pytest.raises(IsogridError, match="give calibration"):
        compress(models.llama(), "low_rank", resume=tmp_path)
