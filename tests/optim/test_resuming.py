"""A resumed run is the same run."""

import io
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from isogrid.optim import (
    PRESETS,
    ProjectedAdamW,
)
from tests.optim.small import PRESET_OPTIONS, generator, loss_of, matrix, network, train


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


@pytest.mark.parametrize("late", ["loaded", "in place"])
@pytest.mark.parametrize("first", [torch.contiguous_format, torch.channels_last])
def test_moments_follow_a_weight_into_another_memory_format(first, late):
    (second,) = {torch.contiguous_format, torch.channels_last} - {first}
    start = torch.randn(4, 3, 5, 5, generator=generator(0))
    weight, wanted = nn.Parameter(start.clone(memory_format=first)), nn.Parameter(start.clone())
    optimizer, reference = ProjectedAdamW([weight], 0.1, rank=None), torch.optim.AdamW([wanted], 0.1, weight_decay=0)
    for step in range(6):
        if step == 3 and late == "loaded":
            weight = nn.Parameter(weight.detach().clone(memory_format=second))
            again = ProjectedAdamW([weight], 0.1, rank=None)
            again.load_state_dict(optimizer.state_dict())
            optimizer = again
        elif step == 3:
            weight.data = weight.data.clone(memory_format=second)
        weight.grad = torch.randn(4, 3, 5, 5, generator=generator(step))
        wanted.grad = weight.grad.clone()
        optimizer.step()
        reference.step()
    assert torch.allclose(weight, wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "default", "galore", "apollo", "ldadam"])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_a_state_goes_on_in_another_precision(name, dtypes):
    make = partial(ProjectedAdamW, rank=None) if name == "plain" else partial(PRESETS[name], rank=2)
    runs = []
    for load in (False, True):
        weight = matrix(dtype=dtypes[0])
        optimizer = make([weight], 0.01)
        for step in range(4):
            if load and step == 2:
                weight = nn.Parameter(weight.detach().to(dtypes[1]))
                again = make([weight], 0.01)
                again.load_state_dict(optimizer.state_dict())
                optimizer = again
            weight.grad = torch.randn(6, 9, generator=generator(step)).to(weight.dtype)
            optimizer.step()
        runs.append(weight.detach().float())
    assert torch.allclose(*runs, atol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_a_distributed_checkpoint_resumes_to_the_last_digit(name, tmp_path):
    options = PRESET_OPTIONS[name] | ({} if name in ("ldadam", "top_r") else {"refresh": 1})
    whole, resumed = network(), network(seed=9)
    optimizer = PRESETS[name](whole.named_parameters(), 0.01, **options)
    again = PRESETS[name](resumed.named_parameters(), 0.01, **options)
    train(whole, optimizer, 3)
    dcp.save(
        {"model": whole.state_dict(), "optimizer": get_optimizer_state_dict(whole, optimizer)}, checkpoint_id=tmp_path
    )
    wanted = train(whole, optimizer, 5, start=3)
    loaded = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, again)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    resumed.load_state_dict(loaded["model"])
    set_optimizer_state_dict(resumed, again, loaded["optimizer"])
    assert train(resumed, again, 5, start=3) == wanted


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
