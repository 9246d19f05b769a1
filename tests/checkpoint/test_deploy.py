"""The inference form of layers: the same model, which saves as it computes."""

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from isogrid import Capped, IsogridError, LowRank, Monarch, Permuted, StructuredLinear, compress, deploy, set_memory
from tests import models


def test_deployed_models_compute_the_same_without_caps():
    source = torch.Generator().manual_seed(0)
    formats = (Capped(LowRank(3)), Permuted(Capped(Monarch(2))), LowRank(4))
    model = nn.Sequential(
        *(
            StructuredLinear(12, 12, fmt, bias=k > 0, dtype=torch.float64, generator=source)
            for k, fmt in enumerate(formats)
        )
    )
    model[0].product = "structured"
    x = torch.randn(5, 12, dtype=torch.float64, generator=source)
    before = model(x)
    assert deploy(model) == ["0", "1"]
    assert [layer.format for layer in model] == [LowRank(3), Permuted(Monarch(2)), LowRank(4)]
    assert model[0].product == "structured"
    assert torch.allclose(model(x), before, rtol=1e-12, atol=1e-12)
    model(x).sum().backward()
    assert all(value.grad is not None for value in model.parameters())
    assert deploy(model) == []


def test_deployed_checkpoints_are_read(tmp_path):
    model = models.llama()
    compress(model, "capped(inner=low_rank)", keep=0.5)
    model.requires_grad_(False)
    batch = models.token_batch(0)
    before = models.exact_output(model, batch)
    assert deploy(model)
    assert not any(value.requires_grad for value in model.parameters())
    after = models.exact_output(model, batch)
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(models.exact_output(LlamaForCausalLM.from_pretrained(tmp_path).eval(), batch), after)


def test_shared_layers_stay_shared_and_a_layer_alone_is_refused():
    layer = StructuredLinear(8, 8, Capped(LowRank(2)))
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert deploy(model) == ["0", "2"]
    assert model[0] is model[2]
    with pytest.raises(IsogridError, match="of a single layer take"):
        deploy(layer)


def test_small_memory_is_saved_with_the_model(tmp_path):
    model = models.llama()
    compress(model, "low_rank", keep=0.5)
    set_memory(model, "small")
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    layers = [module for module in again.modules() if isinstance(module, StructuredLinear)]
    assert layers
    assert all(layer.small_memory for layer in layers)
