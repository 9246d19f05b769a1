"""A resumed run is the same run."""

import io

import pytest
import torch

from isogrid.optim import (
    PRESETS,
    ProjectedAdamW,
)
from tests.optim.small import PRESET_OPTIONS, loss_of, network, train


@pytest.mark.parametrize(
    "extra", [{}, {"state": "bfloat16"}, {"state": "8bit"}, {"projector_bits": 4}, {"adaptive": {}}]
)
@pytest.mark.parametrize("name", PRESETS)
def test_a_resumed_run_goes_on_to_the_last_digit(name, extra):
    if name in ("apollo", "apollo_mini") and "projector_bits" in extra:
        pytest.skip("no basis is stored")
    options = PRESET_OPTIONS[name] | ({} if name in ("ldadam", "top_r") else {"refresh": 3}) | extra
    if name == "top_r":
        options = {key: value for key, value in options.items() if key in ("state", "fraction")}
    whole = network()
    optimizer = PRESETS[name](whole.named_parameters(), 0.01, **options)
    train(whole, optimizer, 4)
    stored = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, stored)
    wanted = train(whole, optimizer, 5, start=4)

    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)
    resumed = network(seed=9)
    resumed.load_state_dict(loaded["model"])
    again = PRESETS[name](resumed.named_parameters(), 0.5, **options)
    again.load_state_dict(loaded["optimizer"])
    for key, state in loaded["optimizer"]["state"].items():
        for slot, value in state.items():
            if isinstance(value, torch.Tensor):
                assert again.state_dict()["state"][key][slot].dtype == value.dtype
    assert train(resumed, again, 5, start=4) == wanted
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_states_hold_tensors_and_numbers_only():
    for name in PRESETS:
        model = network()
        optimizer = PRESETS[name](model.named_parameters(), 0.01, **PRESET_OPTIONS[name])
        train(model, optimizer, 2)
        for state in optimizer.state.values():
            assert all(type(value) in (torch.Tensor, int, float) for value in state.values())
            assert isinstance(state["step"], int)


def test_a_closure_is_evaluated_with_gradients():
    model = network()
    optimizer = ProjectedAdamW(model.parameters(), 0.01, rank=2)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure).item() < first.item()
