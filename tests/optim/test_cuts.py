import copy

import pytest
import torch
from torch import nn

from isogrid import IsogridError, optim
from isogrid.linear import find_coupled, shrink
from isogrid.optim import follow_cuts
from tests import models


def trained(model, make, steps=3):
    optimizer = make(model.parameters())
    for step in range(steps):
        _step(model, optimizer, step)
    return optimizer


def _step(model, optimizer, seed):
    batch = models.token_batch(seed) if hasattr(model, "lm_head") else models.padded_batch(seed)
    out = model(**batch)
    (out.logits if "logits" in out else out.last_hidden_state).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def cut(model):
    """Keep odd structures of every module but the last attention, of which nothing stays."""
    cuts = []
    found = list(find_coupled(model).values())
    gone = [one for one in found if one.kind == "attention"][-1]
    for one in found:
        cuts += shrink(model, one, [] if one is gone else range(1, one.units, 2))
    return cuts


@pytest.mark.parametrize("build", [models.llama, models.bert, models.gpt2])
def test_moments_are_cut_as_their_parameters_were(build):
    model = build()
    optimizer = trained(model, lambda values: torch.optim.AdamW(values, lr=1e-3, amsgrad=True))
    before = {id(value): (name, dict(optimizer.state[value])) for name, value in model.named_parameters()}
    cuts = cut(model)
    follow_cuts(optimizer, cuts)
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    assert held == {id(value) for value in model.parameters() if value.numel()}
    assert {id(value) for value in optimizer.state} <= held
    for one in cuts:
        if one.new is None or not one.new.numel():  # nothing of it is trained any more
            continue
        _, state = before[id(one.old)]
        now = optimizer.state[one.new]
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert now[key].shape == one.new.shape
            wanted = state[key].index_select(one.dim, one.index)
            assert torch.equal(now[key], wanted if wanted.shape == one.new.shape else wanted.mT)
        assert now["step"] == 3
    for step in range(2):
        _step(model, optimizer, step)
    steps = [optimizer.state[value] for value in model.parameters()]  # a pooler's that no loss reaches has none
    assert {float(state["step"]) for state in steps if state} == {5.0}


def test_training_goes_on_as_if_the_model_had_always_been_small():
    model = models.llama()
    optimizer = trained(model, lambda values: torch.optim.AdamW(values, lr=1e-2))
    follow_cuts(optimizer, cut(model))
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if ours in optimizer.state:
            other.state[theirs] = copy.deepcopy(optimizer.state[ours])
    for step in range(3):
        _step(model, optimizer, step)
        _step(twin, other, step)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_factored_moments():
    model = models.bert()
    optimizer = trained(model, lambda values: torch.optim.Adafactor(values, lr=1e-3))
    one = find_coupled(model)["encoder.layer.0.intermediate"]
    up = model.get_submodule(one.producers[0].layer).weight
    rows, columns = optimizer.state[up]["row_var"].clone(), optimizer.state[up]["col_var"].clone()
    follow_cuts(optimizer, shrink(model, one, [2, 7]))
    now = optimizer.state[model.get_submodule(one.producers[0].layer).weight]
    assert torch.equal(now["row_var"], rows[[2, 7]])
    assert torch.equal(now["col_var"], columns)
    _step(model, optimizer, 0)


def test_parameters_of_others_stay():
    model = models.llama()
    extra = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([{"params": [extra]}, {"params": [model.lm_head.weight], "lr": 1.0}], lr=0.1)
    follow_cuts(optimizer, cut(model))
    assert [group["params"][0] for group in optimizer.param_groups] == [extra, model.lm_head.weight]


def test_a_state_that_cannot_be_cut():
    model = models.llama()
    optimizer = trained(model, lambda values: torch.optim.AdamW(values))
    one = find_coupled(model)["model.layers.0.mlp"]
    up = model.get_submodule(one.producers[1].layer).weight
    optimizer.state[up]["basis"] = torch.zeros(5, 5)
    before = [id(value) for group in optimizer.param_groups for value in group["params"]]
    with pytest.raises(IsogridError, match=r"'basis' \(5, 5\) of a parameter \(48, 32\) can't be cut"):
        follow_cuts(optimizer, shrink(model, one, [0]))
    assert [id(value) for group in optimizer.param_groups for value in group["params"]] == before


@pytest.mark.parametrize("make", [optim.apollo_mini, optim.galore])
def test_a_projection_is_not_cut(make):
    model = models.llama()
    optimizer = trained(model, make)
    one = find_coupled(model)["model.layers.0.mlp"]
    with pytest.raises(IsogridError, match=r"projection of a parameter \(\d+, \d+\) can't be cut"):
        follow_cuts(optimizer, shrink(model, one, [0]))
