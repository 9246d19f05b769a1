"""Steps during the backward pass."""

import copy
import gc

import pytest
import torch
from torch import nn

from isogrid import IsogridError
from isogrid.optim import (
    PRESETS,
    ProjectedAdamW,
)
from tests.optim.small import PRESET_OPTIONS, generator, loss_of, matrix, network, train


@pytest.mark.parametrize("name", PRESETS)
def test_steps_during_the_backward_pass_are_the_same_and_free_every_gradient(name):
    options = PRESET_OPTIONS[name] | ({} if name in ("ldadam", "top_r") else {"refresh": 3})
    plain, hooked = network(), network()
    one = PRESETS[name](plain.named_parameters(), 0.01, **options)
    other = PRESETS[name](hooked.named_parameters(), 0.01, in_backward=True, **options)
    schedules = [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6) for optimizer in (one, other)]
    for step in range(6):
        for model, optimizer, schedule in zip((plain, hooked), (one, other), schedules, strict=True):
            loss_of(model, step).backward()
            if model is hooked:
                assert all(parameter.grad is None for parameter in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    for ours, theirs in zip(hooked.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_hooks_live_through_loading_and_are_not_copied():
    model, plain = network(), network()
    optimizer = ProjectedAdamW(model.named_parameters(), 0.01, rank=2, in_backward=True)
    other = ProjectedAdamW(plain.named_parameters(), 0.01, rank=2)
    train(plain, other, 2)
    model.load_state_dict(plain.state_dict())
    optimizer.load_state_dict(other.state_dict())
    for step in (2, 3):
        loss_of(model, step).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
    train(plain, other, 2, start=2)
    assert torch.equal(model[0].weight, plain[0].weight)
    late = matrix(seed=5)
    before = late.detach().clone()
    optimizer.add_param_group({"params": [("late", late)]})
    late.sum().backward()
    assert late.grad is None
    assert not torch.equal(late, before)
    optimizer.param_groups.pop()
    optimizer.state.pop(late)
    twin = copy.deepcopy(optimizer)
    assert not twin.in_backward
    assert len(twin.state_dict()["state"]) == 6


def test_accumulating_gradients_over_hooks_is_refused():
    model = network()
    optimizer = ProjectedAdamW(model.named_parameters(), 0.01, rank=2, in_backward=True)
    loss_of(model, 0).backward()
    with pytest.raises(IsogridError, match=r"second gradient before step\(\)"):
        loss_of(model, 1).backward()
    optimizer.remove_hooks()
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    assert model[0].weight.grad is not None


def test_a_weight_that_is_used_twice_steps_once():
    weight = matrix(5, 5)
    hooked = nn.Parameter(weight.detach().clone())
    one = ProjectedAdamW([weight], 0.1, rank=2)
    other = ProjectedAdamW([hooked], 0.1, rank=2, in_backward=True)
    x = torch.randn(3, 5, generator=generator(2))
    ((x @ weight).tanh() @ weight).sum().backward()
    one.step()
    ((x @ hooked).tanh() @ hooked).sum().backward()
    assert torch.equal(weight, hooked)
    other.step()


def test_an_optimizer_that_is_let_go_of_steps_no_more():
    model = network()
    ProjectedAdamW(model.named_parameters(), 0.5, rank=2, in_backward=True)
    gc.collect()
    loss_of(model, 0).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    optimizer = ProjectedAdamW(model.named_parameters(), 0.0, rank=2, in_backward=True)
    before = copy.deepcopy(model.state_dict())
    loss_of(model, 0).backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_optimizers_on_one_weight_are_an_error():
    weight = matrix()
    first = ProjectedAdamW([("w", weight)], 0.1, rank=2, in_backward=True)
    second = ProjectedAdamW([("w", weight)], 0.1, rank=2, in_backward=True)
    with pytest.raises(IsogridError, match=r"'w' \(6, 9\): another optimizer steps it .* remove_hooks"):
        weight.square().sum().backward()
    first.remove_hooks()
    weight.square().sum().backward()
    assert second.state[weight]["step"] == 1
