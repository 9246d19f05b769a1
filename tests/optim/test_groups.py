"""Which parameters of a model are projected."""

import pytest
import torch
from torch import nn

from isogrid import IsogridError
from isogrid.models import add_lora
from isogrid.optim import ProjectedAdamW, make_optimizer, projected_adamw, projected_groups
from isogrid.training import factorize_trainable
from isogrid.training.factored import trainable


def test_groups_leave_embeddings_heads_and_vectors_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.inner = nn.Linear(4, 6)
            self.lm_head = nn.Linear(6, 10)
            self.frozen = nn.Linear(6, 6)
            self.frozen.requires_grad_(False)

    groups = projected_groups(Model(), weight_decay=0.1)
    names = [[name for name, _ in group["params"]] for group in groups]
    assert names == [["inner.weight"], ["embed.weight", "lm_head.weight"], ["inner.bias", "lm_head.bias"]]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    chosen = projected_groups(Model(), targets=["lm_head.*"])
    assert [name for name, _ in chosen[0]["params"]] == ["lm_head.weight"]
    with pytest.raises(IsogridError, match="target 'decoder' matches no trainable matrix"):
        projected_groups(Model(), targets=["decoder"])


def test_thin_factors_are_projected_where_that_saves_state():
    model = nn.Sequential(nn.Linear(20, 24), nn.Linear(24, 20), nn.Linear(20, 20))
    factorize_trainable(model, 12, targets=["0"], freeze=False)
    add_lora(model, 4, targets=["2"], train=["1.weight"])
    model[0].requires_grad_(True)
    model.lora_a = nn.Linear(20, 3, bias=False)
    factors = ["0.left", "0.right"]
    adapters = ["2.down", "2.up", "lora_a.weight"]

    def projected(**options):
        return [name for name, _ in projected_groups(model, **options)[0]["params"]]

    assert projected() == ["1.weight"]
    assert projected(rank=6) == ["1.weight"]
    assert projected(rank=5) == [*factors, "1.weight"]
    assert projected(rank=1) == [*factors, "1.weight", *adapters]
    assert projected(rank=1) == [name for name, _ in trainable(model) if name.split(".")[1] not in ("scale", "bias")]
    assert projected(targets=["*.left"]) == ["0.left"]
    for rank, names in ((5, factors), (6, ())):
        optimizer = make_optimizer(model, "galore", rank=rank)
        assert all(any(one is model.get_parameter(name) for one in optimizer.projected) for name in names)
        assert len(optimizer.projected) == len(names) + 1


def test_a_bucket_lies_on_one_device(monkeypatch):
    devices = ["cpu", "cpu", "meta", "meta", "cpu"]
    weights = [nn.Parameter(torch.zeros(4, 5, device=device)) for device in devices]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    buckets = []
    monkeypatch.setattr(
        projected_adamw,
        "step_projected",
        lambda bucket: buckets.append([work.parameter.device.type for work in bucket]),
    )
    ProjectedAdamW(weights, rank=2, foreach=True).step()
    assert buckets == [["cpu", "cpu"], ["meta", "meta"], ["cpu"]]
