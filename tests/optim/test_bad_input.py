"""Bad input: clear errors, nothing corrupted."""

import copy

import pytest
import torch
from torch import nn

from isogrid import IsogridError, IsogridWarning
from isogrid.optim import (
    PRESETS,
    FixedRank,
    ProjectedAdamW,
    galore,
    projected_groups,
    top_r,
)
from tests.optim.small import PRESET_OPTIONS, generator, matrix, network


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 7}, r"parameter 0 of group 0 \(6, 9\): rank 7 is beyond the 6 x 9 matrix; use at most 6"),
        ({"rank": 1.5}, r"rank fraction is 1.5; it lies in \(0, 1\]"),
        ({"rank": "many"}, "rank is 'many'"),
        ({"projector": "fourier"}, "projector is 'fourier'; it is one of svd, randomized"),
        ({"side": "top"}, "side is 'top'"),
        ({"refresh": 0}, "refresh is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"oversample": -1}, "oversample is -1"),
        ({"projector": "random", "residual": "fira"}, "not orthonormal"),
        ({"side": "both", "residual": "error_feedback"}, "side 'both'"),
        ({"core": "sgd", "residual": "fira"}, "no moments"),
        ({"projector_bits": 3}, "projector_bits is 3"),
        ({"adaptive": {"speed": 1}}, "adaptive is"),
        ({"correct_bias": False}, "correct_bias is False"),
        ({"projector": "top", "rank": 2}, "fraction of the entries"),
    ],
)
def test_options_out_of_range_name_the_value_and_the_remedy(options, words):
    with pytest.raises(IsogridError, match=words):
        ProjectedAdamW([matrix()], **{"rank": 2, "residual": "none", **options})


def test_a_rank_beyond_a_named_parameters_shape_names_it():
    with pytest.raises(IsogridError, match=r"parameter '2.weight' \(3, 1, 5\): rank 5 is beyond the 3 x 5 matrix"):
        ProjectedAdamW(network().named_parameters(), rank=FixedRank(5, clip=False))


def test_a_group_that_is_refused_is_not_left_behind():
    optimizer = ProjectedAdamW([matrix()], rank=2)
    with pytest.raises(IsogridError, match="parameter 0 of group 1"):
        optimizer.add_param_group({"params": [matrix(2, 3, 1)], "rank": 3})
    assert len(optimizer.param_groups) == 1


def test_no_parameters_at_all_is_an_error_and_an_empty_group_is_not():
    with pytest.raises(IsogridError, match="there are no parameters"):
        ProjectedAdamW([])
    with pytest.raises(IsogridError, match="there are no parameters"):
        ProjectedAdamW([{"params": []}])
    weight = matrix()
    optimizer = ProjectedAdamW([{"params": [weight]}, {"params": []}], rank=2)
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, before)
    assert ProjectedAdamW([{"params": weight}], rank=2).projected == [weight]


@pytest.mark.parametrize("name", PRESETS)
def test_a_sparse_gradient_stops_the_step_before_anything_moves(name):
    embedding, weight = nn.Embedding(8, 5, sparse=True), matrix()
    named = [("table", embedding.weight), ("matrix", weight)]
    optimizer = PRESETS[name](reversed(named), **PRESET_OPTIONS[name])
    before = weight.detach().clone()
    (embedding(torch.tensor([1, 2])).sum() + weight.sum()).backward()
    with pytest.raises(IsogridError, match=r"'table' \(8, 5\): its gradient is sparse .*use sparse=False"):
        optimizer.step()
    assert torch.equal(weight, before)
    assert not optimizer.state


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("when", [0, 2, 3])
@pytest.mark.parametrize("name", PRESETS)
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(name, when, bad):
    options = PRESET_OPTIONS[name] | ({} if name in ("ldadam", "top_r") else {"refresh": 2})
    weight, vector = matrix(), nn.Parameter(torch.ones(5))
    optimizer = PRESETS[name]([weight, vector], 0.01, **options)
    draw = generator(1)
    for step in range(5):
        weight.grad, vector.grad = torch.randn(6, 9, generator=draw), torch.randn(5, generator=draw)
        if step == when:
            weight.grad[3, 4] = vector.grad[2] = bad
            held = copy.deepcopy({key: dict(value) for key, value in enumerate(optimizer.state.values())})
            before = weight.detach().clone(), vector.detach().clone()
        optimizer.step()
        if step == when:
            assert torch.equal(weight, before[0])
            assert torch.equal(vector, before[1])
            for kept, now in zip(held.values(), optimizer.state.values(), strict=False):
                for key, value in kept.items():
                    if key != "skipped":
                        assert torch.allclose(
                            torch.as_tensor(value), torch.as_tensor(now[key]), rtol=0, atol=0, equal_nan=True
                        ), key
    assert optimizer.skipped == 2
    assert torch.isfinite(weight).all()
    assert torch.isfinite(vector).all()


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_without_gradient_stay_and_get_no_state(name):
    weight, idle = matrix(), matrix(seed=1)
    optimizer = PRESETS[name]([weight, idle], 0.01, **PRESET_OPTIONS[name])
    before = idle.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(idle, before)
    assert idle not in optimizer.state


def test_complex_parameters_are_refused():
    with pytest.raises(IsogridError, match=r"is complex; give torch\.view_as_real"):
        ProjectedAdamW([nn.Parameter(torch.zeros(3, 4, dtype=torch.complex64))], rank=2)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_four_dimensions_are_a_matrix_of_the_first(name, layout):
    start = torch.randn(6, 3, 2, 2, generator=generator(0))
    conv = nn.Parameter(start.clone().to(memory_format=layout))
    flat = nn.Parameter(start.reshape(6, 12).clone())
    options = PRESET_OPTIONS[name] | ({} if name in ("ldadam", "top_r") else {"refresh": 2})
    one, other = (PRESETS[name]([weight], 0.01, weight_decay=0.1, **options) for weight in (conv, flat))
    draw = generator(1)
    for _ in range(4):
        gradient = torch.randn(6, 12, generator=draw)
        conv.grad, flat.grad = gradient.view(6, 3, 2, 2).to(memory_format=layout), gradient.clone()
        one.step()
        other.step()
    assert torch.allclose(conv.detach().reshape(6, 12), flat.detach(), atol=1e-6)
    assert not torch.allclose(flat.detach(), start.view(6, 12), atol=1e-3)


def test_state_of_another_shape_is_refused_whole():
    one = galore([("w", matrix(6, 9))], rank=2)
    one.param_groups[0]["params"][0].grad = torch.ones(6, 9)
    one.step()
    other_weight = matrix(6, 8, 1)
    other = galore([("w", other_weight)], rank=2)
    other_weight.grad = torch.ones(6, 8)
    other.step()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(IsogridError, match=r"parameter 'w' \(6, 8\): the state is of a 6 x 9 matrix"):
        other.load_state_dict(one.state_dict())
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], before["state"][0]["exp_avg"])
    with pytest.raises(IsogridError, match="groups of"):
        galore([matrix(), matrix()], rank=2).load_state_dict(one.state_dict())
    adamw = torch.optim.AdamW([matrix()])
    with pytest.raises(IsogridError, match="it is not ProjectedAdamW's"):
        one.load_state_dict(adamw.state_dict())


def stepped(rank, shape=(6, 9), **options):
    weight, other = matrix(*shape), matrix(4, 5, 1)
    optimizer = ProjectedAdamW([("other", other), ("w", weight)], 0.1, rank, **options)
    weight.grad, other.grad = torch.ones_like(weight), torch.ones_like(other)
    optimizer.step()
    return optimizer, weight, other


@pytest.mark.parametrize("state", ["float32", "8bit"])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("shape", [(6, 8), (9, 6), (60, 90)])
def test_a_parameter_that_changed_its_shape_stops_the_step_before_anything_moves(rank, shape, state):
    optimizer, weight, other = stepped(rank, (32, 256), state=state)
    weight.grad = None
    weight.data = torch.zeros(shape)
    weight.grad = torch.ones(shape)
    before = other.detach().clone()
    with pytest.raises(IsogridError, match=r"parameter 'w' \(\d+, \d+\): the state .* begin a new optimizer"):
        optimizer.step()
    assert torch.equal(other, before)
    assert not weight.any()
    assert [held["step"] for held in optimizer.state.values()] == [1, 1]


@pytest.mark.parametrize("rank", [None, 2])
def test_a_gradient_of_another_shape_stops_the_step(rank):
    optimizer, weight, _ = stepped(rank)
    weight.data = torch.zeros(600, 900)
    with pytest.raises(IsogridError, match=r"'w' \(600, 900\): its gradient has shape \(6, 9\); call zero_grad"):
        optimizer.step()


@pytest.mark.parametrize(("rank", "later"), [(None, {"rule": "fixed", "rank": 2}), (2, None)])
def test_a_group_that_stops_or_begins_to_project_has_the_wrong_state(rank, later):
    optimizer, *_ = stepped(rank)
    optimizer.param_groups[0]["rank"] = later
    with pytest.raises(IsogridError, match=r"'other' \(4, 5\): the state is of a step (in|without) a subspace"):
        optimizer.step()


def test_top_r_says_when_it_keeps_nothing():
    weight = matrix(2, 3)
    optimizer = top_r([weight], 0.1, fraction=0.1)
    weight.grad = torch.ones(2, 3)
    with pytest.warns(IsogridWarning, match="fraction 0.1 of 6 entries is none"):
        optimizer.step()


def test_report_counts_what_is_projected_and_warns_of_nothing():
    model = network()
    assert "3 of 6 parameters projected" in ProjectedAdamW(projected_groups(model), rank=2).report()
    with pytest.warns(IsogridWarning, match="plain AdamW"):
        ProjectedAdamW(model.parameters(), rank=None).report()


def test_finite_gradients_whose_squares_leave_float16_are_stepped_by():
    parameter = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.float16))
    parameter.grad = torch.full_like(parameter, 1000.0)
    optimizer = ProjectedAdamW([parameter], lr=0.1, rank=None)
    optimizer.step()
    assert optimizer.skipped == 0
    assert float(parameter.detach().abs().min()) > 0


@pytest.mark.parametrize("rank", [None, 2])
def test_a_weight_that_is_a_part_of_other_memory_leaves_the_rest_alone(rank):
    whole, copied = torch.ones(10, 10), nn.Parameter(torch.ones(10, 5))
    part = nn.Parameter(whole[:, ::2])
    for weight in (part, copied):
        optimizer = ProjectedAdamW([weight], 0.1, rank)
        for step in range(3):
            weight.grad = torch.randn(10, 5, generator=generator(step))
            optimizer.step()
    assert torch.equal(whole[:, 1::2], torch.ones(10, 5))
    assert torch.allclose(part, copied, atol=1e-6)
