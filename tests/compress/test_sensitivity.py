"""Sensitivities: what small errors of a layer cost the loss, whatever stands at padding and however rows are routed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from isogrid import select_layers
from isogrid.compress.plan import MOST_ROWS, few
from isogrid.compress.sensitivity import loss_weights
from tests import models

F64 = torch.float64


def test_weights_are_the_rise_of_the_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    batches = [torch.randn(4000, 6, dtype=F64)]
    weights = loss_weights(model, {"0": model[0], "1": model[1]}, batches)
    # With standard normal cotangents g = Wᵀ z, E ||g||² = ||W||² at the first layer, m at the last.
    assert weights["1"] == pytest.approx(0.5, rel=0.05)
    assert weights["0"] == pytest.approx(float(model[1].weight.detach().square().sum()) / 10, rel=0.05)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_what_stands_at_padding_has_no_weight():
    model, batch = models.bert_masked(), models.padded_batch()
    other = dict(batch, input_ids=torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7))
    one, two = (loss_weights(model, select_layers(model), [data]) for data in (batch, other))
    assert two == pytest.approx(one, rel=1e-4)


class Experts(nn.Module):
    """A row of sixteen goes to one layer, the others to another."""

    def __init__(self, outputs=5):
        super().__init__()
        self.rare, self.usual = nn.Linear(6, outputs), nn.Linear(6, outputs)

    def forward(self, x):
        rare = torch.arange(len(x)) % 16 == 0
        return torch.zeros(len(x), 5).index_put((rare,), self.rare(x[rare])).index_put((~rare,), self.usual(x[~rare]))


def test_an_expert_weighs_as_much_as_the_tokens_it_sees():
    model = Experts()
    weights = loss_weights(model, dict(model.named_children()), [torch.randn(8000, 6)])
    assert weights["rare"] == pytest.approx(0.5 / 16, rel=0.1)
    assert weights["usual"] == pytest.approx(0.5 * 15 / 16, rel=0.05)


def test_a_single_logit_has_weights_too():
    model, data = models.bert_scorer(), [models.padded_batch(seed) for seed in range(4)]
    weights = loss_weights(model, select_layers(model), data)
    assert len(set(weights.values())) == len(weights)
    assert min(weights.values()) > 0


def test_a_single_logit_is_a_number_to_come_near():
    class Scored(nn.Sequential):
        def forward(self, x):
            return SimpleNamespace(logits=super().forward(x))

    model = Scored(nn.Linear(6, 5), nn.Linear(5, 1))
    weights = loss_weights(model, dict(model.named_children()), [torch.randn(4000, 6)])
    assert weights["1"] == pytest.approx(0.5, rel=0.1)
    assert weights["0"] == pytest.approx(float(model[1].weight.detach().square().sum()) / 10, rel=0.1)


def test_activations_in_place_have_the_same_weights():
    def weights(in_place):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(in_place), nn.Linear(5, 5), nn.ReLU(in_place), nn.Linear(5, 4))
        data = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
        return loss_weights(model, {name: model[int(name)] for name in "024"}, [data])

    assert weights(True) == weights(False)


def test_sensitivities_see_as_many_rows_of_features_as_tokens():
    pieces = few([torch.randn(1500, 6), torch.randn(1500, 6)])
    assert {len(piece) for piece in pieces} <= {256, 1500 % 256}
    assert MOST_ROWS <= sum(len(piece) for piece in pieces) < MOST_ROWS + 256
    assert len(few([torch.randn(3, 6) for _ in range(5)])) == 5
    assert [tuple(piece.shape) for piece in few([torch.zeros(9, 300, dtype=torch.int64)])] == 8 * [(1, 256), (1, 44)]
