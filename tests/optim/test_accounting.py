"""Predicted memory against live tensors, and the source's table."""

import pytest
import torch
from torch import nn

from isogrid.formats import Circulant, TritPlanes
from isogrid.linear import StructuredLinear
from isogrid.optim import (
    PRESETS,
    ProjectedAdamW,
    memory_breakdown,
    predicted_state_bytes,
    state_bytes,
)
from isogrid.training import factorize_trainable


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 128), nn.LayerNorm(128), nn.Linear(128, 3)).to(
        dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "extra", [{}, {"state": "bfloat16"}, {"state": "8bit"}, {"side": "min_state"}, {"side": "both"}]
)
@pytest.mark.parametrize("name", PRESETS)
def test_prediction_is_what_is_there(name, extra, dtype):
    if extra.get("side") == "both" and name not in ("galore", "golore", "rsvd_adam", "q_galore"):
        pytest.skip("a residual needs one side")
    options = {"fraction": 0.5} if name == "top_r" else {} if name in ("rsvd_adam", "apollo_mini") else {"rank": 40}
    model = model_of(dtype)
    if "rank" in options and name == "default":
        options = {"rank": 40}
    optimizer = PRESETS[name](model.parameters(), **(options | extra))
    predicted = predicted_state_bytes(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert predicted == state_bytes(optimizer)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_breakdown_predicts_every_part_of_a_step(in_backward):
    model = model_of()

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)

    named = Named()
    optimizer = ProjectedAdamW(named.parameters(), rank=3, in_backward=in_backward)
    found = memory_breakdown(named, optimizer, {"x": torch.randn(7, 64)}, lambda y: y.square().mean())
    predicted, measured = found["predicted"], found["measured"]
    assert predicted.items() <= measured.items()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert measured["parameters"] == 4 * count
    assert measured["gradients"] == (4 * 96 * 128 if in_backward else 4 * count)
    assert measured["activations"] == 4 * 7 * (96 + 96 + 128 + 128 + 3)
    assert measured["saved for backward"] >= 4 * 7 * (64 + 96 + 96 + 128 + 128)
    assert all(parameter.grad is None for parameter in model.parameters())


class Forms(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        dense = nn.Linear(64, 64)
        self.trits = StructuredLinear.from_linear(dense, TritPlanes())
        self.round = StructuredLinear.from_linear(dense, Circulant())
        self.thin = nn.Linear(64, 48)
        factorize_trainable(self, 8, targets=["thin"], freeze=False)

    def forward(self, x):
        return self.thin(self.round(self.trits(x)))


@pytest.mark.parametrize(
    "make",
    [
        lambda values: torch.optim.SGD(values, 0.1),
        lambda values: torch.optim.Adagrad(values),
        lambda values: torch.optim.Adam(values, amsgrad=True),
        lambda values: torch.optim.AdamW([{"params": list(values)[:2]}]),
    ],
)
def test_codes_and_vectors_are_factors_and_only_known_states_are_predicted(make):
    model = Forms()
    optimizer = make(model.parameters())
    found = memory_breakdown(model, optimizer, {"x": torch.randn(5, 64)}, lambda y: y.square().mean())
    predicted, measured = found["predicted"], found["measured"]
    assert predicted.items() <= measured.items()
    held = sum(layer.memory()["factors"] for layer in (model.trits, model.round))
    assert measured["of which factors"] == held + 4 * 8 * (64 + 48 + 1)
    assert measured["parameters"] == measured["of which factors"] + 4 * (64 + 64 + 48)
    states = {part for part in measured if part.startswith("state: ")}
    known = isinstance(optimizer, torch.optim.Adam)
    assert {part for part in predicted if part.startswith("state: ")} == (states if known else set())
