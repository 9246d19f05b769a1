import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from isogrid import IsogridError
from isogrid.optim import EnergyRank, ProjectedAdamW, ThresholdRank
from isogrid.training import FactoredLinear, factorize_trainable, merge_factors, truncate_factors
from isogrid.training.factored import break_even_rank, factored_flops, factored_layers, trainable
from tests import models


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(10, 14)
        self.k = Conv1D(8, 14)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        return self.classifier(torch.tanh(self.k(self.q(x))))


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return Network().to(dtype)


def inputs(dtype=torch.float64):
    return torch.randn(5, 10, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_full_rank_changes_nothing_and_merges_back(dtype):
    model, x = network(dtype), inputs(dtype)
    before = model(x)
    assert factorize_trainable(model, 1.0, targets=["q", "k"]) == ["q", "k"]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert (model(x) - before).abs().max() <= tolerance
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert merge_factors(model) == ["q", "k"]
    assert (type(model.q), type(model.k)) == (nn.Linear, Conv1D)
    assert model.k.weight.shape == (14, 8)
    assert (model(x) - before).abs().max() <= tolerance
    wanted = network(dtype)
    assert {name: one.shape for name, one in model.named_parameters()} == {
        name: one.shape for name, one in wanted.named_parameters()
    }
    assert not model.k.bias.requires_grad
    assert model.k.weight.requires_grad


def test_a_merged_gpt2_is_saved_and_loaded_as_itself(tmp_path):
    model = models.gpt2().eval()
    batch = models.token_batch(0)
    factorize_trainable(model, 3, targets=["*.c_attn", "*.c_proj"])
    wanted = model(**batch).logits
    merge_factors(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(again(**batch).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_factors_are_the_best_of_their_rank(rank):
    model = network()
    sigma = torch.linalg.svdvals(model.q.weight.detach())
    weight = model.q.weight.detach().clone()
    factorize_trainable(model, rank, targets=["q"])
    error = (model.q.dense() - weight).norm()
    assert error.item() == pytest.approx(sigma[rank:].square().sum().sqrt().item(), rel=1e-9)
    x = inputs()
    assert torch.allclose(model.q(x), x @ model.q.dense().mT + model.q.bias, atol=1e-12)


def test_what_trains_is_what_the_source_trains():
    model = network()
    factorize_trainable(model, 3, targets=["q", "k"], train=["classifier.*"])
    names = [name for name, _ in trainable(model)]
    assert names == [
        *("q.left", "q.scale", "q.right", "k.left", "k.scale", "k.right"),
        *("classifier.weight", "classifier.bias"),
    ]
    factors = sum(parameter.numel() for name, parameter in trainable(model) if name[0] in "qk")
    assert factors == 3 * (10 + 14 + 1) + 3 * (14 + 8 + 1)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("freeze", [False, True])
def test_biases_of_factored_layers_are_named_like_others(freeze, frozen):
    model = network()
    model.requires_grad_(not frozen)
    model.k.bias.requires_grad_(frozen)
    factorize_trainable(model, 3, targets=["q", "k"], train=["q.bias", "classifier.bias"], freeze=freeze)
    biases = {name for name, _ in trainable(model) if name.endswith("bias")}
    assert biases == (
        {"q.bias", "classifier.bias"} if freeze else {"k.bias"} if frozen else {"q.bias", "classifier.bias"}
    )


def test_the_forward_pass_never_forms_the_product():
    model = network()
    factorize_trainable(model, 2, targets=["q", "k"])
    layers = [model.q, model.k]
    with FlopCounterMode(display=False) as counter:
        for layer in layers:
            layer(torch.randn(6, layer.in_features, dtype=torch.float64))
    # The counter sees products, not the scaling of r numbers a token.
    assert counter.get_total_flops() == factored_flops(layers, 6) - 6 * 2 * 2


@pytest.mark.parametrize(
    ("rule", "wanted"), [(ThresholdRank(0.5, 8), lambda s: int((s >= 0.5 * s[0]).sum())), (EnergyRank(0.9, 8), None)]
)
def test_singular_values_choose_each_layers_rank(rule, wanted):
    model = network()
    spectra = {"q": torch.linalg.svdvals(model.q.weight.detach()), "k": torch.linalg.svdvals(model.k.weight.detach())}
    factorize_trainable(model, rule, targets=["q", "k"])
    for name, layer in factored_layers(model).items():
        sigma = spectra[name]
        held = torch.cumsum(sigma.square(), 0) / sigma.square().sum()
        count = wanted(sigma) if wanted else int((held < 0.9).sum()) + 1
        assert layer.rank == min(8, count)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, ProjectedAdamW])
def test_truncation_is_the_best_approximation_and_training_goes_on(optimizer_class):
    model = network()
    factorize_trainable(model, 6, targets=["q", "k"], train=["classifier.*"])
    options = {"rank": None} if optimizer_class is ProjectedAdamW else {}
    optimizer = optimizer_class([parameter for _, parameter in trainable(model)], lr=0.01, **options)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs()).square().mean().backward()
        optimizer.step()
    product = model.q.dense().detach()
    sigma = torch.linalg.svdvals(product)
    kept = copy.deepcopy(optimizer.state[model.classifier.weight])
    assert truncate_factors(model, 3, optimizer) == {"q": 3, "k": 3}
    assert (model.q.dense() - product).norm().item() == pytest.approx(sigma[3:].norm().item(), rel=1e-8)
    assert model.q.left not in optimizer.state
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for _, parameter in trainable(model)}
    hooked = ProjectedAdamW([parameter for _, parameter in trainable(model)], rank=None, in_backward=True)
    with pytest.raises(IsogridError, match="steps during the backward pass"):
        truncate_factors(model, 2, hooked)
    hooked.remove_hooks()
    assert torch.equal(optimizer.state[model.classifier.weight]["exp_avg"], kept["exp_avg"])
    before = model.q.dense().detach()
    optimizer.zero_grad()
    model(inputs()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.q.dense(), before)
    assert model.q.rank == 3


def test_bad_input_leaves_the_model_as_it_was():
    model = network()
    cases = [
        ({"rank": 0, "targets": ["q"]}, "rank is 0"),
        ({"rank": 9, "targets": ["q", "k"]}, "layer 'k': rank 9 is beyond the 8 x 14 matrix"),
        ({"rank": 2, "targets": ["nothing"]}, "target 'nothing' matches no linear layer"),
        ({"rank": 2, "targets": ["q"], "train": ["heads.*"]}, r"train 'heads\.\*' matches no parameter"),
    ]
    for options, words in cases:
        with pytest.raises(IsogridError, match=words):
            factorize_trainable(model, **options)
        assert type(model.q) is nn.Linear
        assert all(parameter.requires_grad for parameter in model.parameters())
    alone = nn.Linear(3, 4)
    with pytest.raises(IsogridError, match=r"of a single layer take nn\.Sequential\(layer\)"):
        factorize_trainable(alone, 2, targets=["*"])
    assert alone.weight.requires_grad
    model.tied = nn.Linear(10, 14)
    model.tied.weight = model.q.weight
    with pytest.raises(IsogridError, match=r"layer 'q': its weight is shared \(q\.weight, tied\.weight\)"):
        factorize_trainable(model, 2, targets=["q"])
    factorize_trainable(model, 4, targets=["k"])
    with pytest.raises(IsogridError, match="layer 'k': rank 5 is beyond the 4 x 4"):
        truncate_factors(model, 5)
    assert model.k.rank == 4


@pytest.mark.parametrize("sizes", [(10, 14), (768, 768), (1, 5), (7, 7)])
def test_break_even(sizes):
    rank = break_even_rank(*sizes)
    numbers = [r * (sum(sizes) + 1) for r in (rank, rank + 1)]
    assert numbers[0] < sizes[0] * sizes[1] <= numbers[1]


def test_state_dict_loads_into_the_same_ranks():
    one, other = network(), network()
    for model in (one, other):
        factorize_trainable(model, 3, targets=["q"])
    with torch.no_grad():
        one.q.scale += 1
    other.load_state_dict(one.state_dict())
    assert isinstance(other.q, FactoredLinear)
    assert torch.equal(one(inputs()), other(inputs()))
