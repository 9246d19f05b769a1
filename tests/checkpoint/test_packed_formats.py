"""Masks and codes on disk: what was saved comes back bit by bit, and takes the bytes that the cost says."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from torch import nn

from isogrid import (
    Armor,
    DenseSparse,
    Format,
    LowRank,
    Metric,
    Monarch,
    Quantized,
    SemiStructured,
    Sparse,
    Stored,
    StructuredLinear,
    TritPlanes,
    compress,
    load,
    save,
)
from tests import models
from tests.formats.cases import gaussian, generator

FORMATS = (
    Sparse(0.37),
    SemiStructured(),
    SemiStructured(3, 7),
    Quantized(3, 10),
    Quantized(4, None),
    Armor(8),
    Armor(7, 1, 3),
    DenseSparse(12, blocks=2),
    TritPlanes(group=16),
    TritPlanes(planes=3, group=16, packing="base_three"),
    Stored(LowRank(11), TritPlanes(group=16)),
    Stored(Monarch(3), TritPlanes(planes=1)),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label())
def test_bytes_on_disk_are_the_stated_cost(fmt: Format, dtype: torch.dtype, tmp_path) -> None:
    m, n = 30, 45
    linear = nn.Linear(n, m, bias=False)
    linear.weight.data.copy_(gaussian(m, n))
    metric = Metric.from_rows(gaussian(200, n, seed=1))
    model = nn.Sequential(StructuredLinear.from_linear(linear.to(dtype), fmt, metric=metric))
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved", model=nn.Sequential(nn.Linear(n, m, bias=False)).to(dtype))
    assert again[0].format == fmt
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
        assert again.state_dict()[name].dtype == value.dtype
    x = torch.randn(3, n, generator=generator()).to(dtype)
    for grad in (True, False):  # by the scattered matrix, and from what is stored
        with torch.set_grad_enabled(grad):
            assert torch.equal(again.eval()(x), model.eval()(x))
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        held = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert held == fmt.cost(m, n, dtype).bytes


def test_casting_and_moving_leave_masks_and_codes_alone() -> None:
    for fmt in FORMATS:
        layer = StructuredLinear(45, 30, fmt, generator=generator())
        before = {name: value.clone() for name, value in layer.named_buffers()}
        assert before
        after = dict(layer.to(torch.bfloat16).named_buffers())
        assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("text", ["trit_planes(group=16)", "stored(inner=low_rank, codes=trit_planes(group=16))"])
def test_from_pretrained_is_exact(text: str, tmp_path) -> None:
    model = models.llama()
    windows = torch.randint(3, models.VOCABULARY, (8, 16), generator=generator())
    compress(model, text, calibration=windows)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(windows).logits, model.eval()(windows).logits)
    held = model.state_dict()
    assert all(torch.equal(value, held[name]) for name, value in again.state_dict().items())
