"""Models made dense again, in place and as copies: the same numbers for whoever reads them."""

import json

import pytest
import torch
from torch import nn

import isogrid
from isogrid import CheckpointError, IsogridError, StructuredLinear, compress
from isogrid.checkpoint import PrunedEntry, mark_structured
from isogrid.compress import structured_layers
from isogrid.linear import find_coupled, shrink
from tests import models


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_merged_models_are_of_their_architecture(name, dense, tmp_path):
    model, batch = models.TRANSFORMERS[name].build(), models.TRANSFORMERS[name].batch(3)
    kinds = {key: type(module) for key, module in model.named_modules()}
    compress(model, "low_rank", keep=0.7)
    wanted = models.output(model, batch)
    isogrid.merge(model)
    assert {key: type(module) for key, module in model.named_modules()} == kinds
    torch.testing.assert_close(models.output(model, batch), wanted, rtol=0, atol=1e-5)
    again = isogrid.load(isogrid.save(model, tmp_path / "m", dense=dense))
    torch.testing.assert_close(models.output(again, batch), wanted, rtol=0, atol=1e-5)


def test_a_dense_export_turns_linear_layers_that_stand_for_conv1d(tmp_path):
    model, batch = models.gpt2(), models.token_batch(3)
    compress(model, "low_rank", keep=0.7)
    wanted = models.output(model, batch)
    for name, layer in structured_layers(model).items():
        model.set_submodule(name, layer.merge())
    again = isogrid.load(isogrid.save(model, tmp_path / "m", dense=True))
    torch.testing.assert_close(models.output(again, batch), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_a_pruned_gpt2_is_merged_to_its_sizes(dense, tmp_path):
    model, batch, entries = models.gpt2(), models.token_batch(1), {}
    for name, one in find_coupled(model).items():
        shrink(model, one, range(2))
        entries[name] = PrunedEntry(2, one.units)
    mark_structured(model, pruned=entries)
    compress(model, "low_rank", keep=0.8, skip=["*mlp*"])
    wanted = models.output(model, batch)
    again = isogrid.load(isogrid.save(isogrid.merge(model), tmp_path / "m", dense=dense))
    torch.testing.assert_close(models.output(again, batch), wanted, rtol=0, atol=1e-5)


def test_a_transformers_model_inside_a_module_is_merged_by_its_architecture(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = models.gpt2()

        def forward(self, **batch):
            return self.body(**batch)

    model, batch = Wrapped().eval(), models.token_batch(3)
    compress(model, "low_rank", keep=0.7)
    wanted = models.output(model, batch)
    isogrid.save(isogrid.merge(model), tmp_path / "m")
    again = isogrid.load(tmp_path / "m", Wrapped().eval())
    torch.testing.assert_close(models.output(again, batch), wanted, rtol=0, atol=1e-5)


def test_layers_without_a_bias_fit_into_conv1d():
    model, batch = models.gpt2(), models.token_batch(3)
    layer = StructuredLinear(24, 72, "low_rank(rank=4)", bias=False).eval()
    model.set_submodule("transformer.h.0.attn.c_attn", layer)
    wanted = models.output(model, batch)
    torch.testing.assert_close(models.output(isogrid.merge(model), batch), wanted, rtol=0, atol=1e-5)


def test_frozen_layers_stay_frozen():
    model = models.gpt2()
    compress(model, "low_rank", keep=0.7)
    frozen = "transformer.h.0.mlp.c_fc"
    model.get_submodule(frozen).requires_grad_(False)
    names = list(structured_layers(model))
    isogrid.merge(model)
    for name in names:
        assert {value.requires_grad for value in model.get_submodule(name).parameters()} == {name != frozen}


def test_a_model_that_its_config_does_not_build_is_left_alone():
    class Odd(type(models.gpt2())):
        def __init__(self, config, size):
            super().__init__(config)
            self.size = size

    model = Odd(models.gpt2().config, 3)
    compress(model, "low_rank", keep=0.7)
    before = models.snapshot(model)
    with pytest.raises(IsogridError, match=r"Odd can't be built from its config alone .*layer.merge\(\)"):
        isogrid.merge(model)
    models.assert_untouched(model, before)


# ---- one layer in several places ----------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer with two names, and a part with two."""

    def __init__(self, layer):
        super().__init__()
        self.a = self.b = layer
        self.part = self.again = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x):
        return self.again(torch.tanh(self.part(self.b(torch.tanh(self.a(x))))))


@pytest.mark.parametrize("trained", [True, False])
def test_a_layer_in_two_places_is_saved_loaded_and_merged_as_one(trained, tmp_path):
    model, x = Twice(StructuredLinear(8, 8, "low_rank(rank=2)")).eval(), torch.randn(5, 8)
    model.part[0] = StructuredLinear(8, 8, "monarch(blocks=2)").eval().requires_grad_(trained)
    wanted = model(x).detach()
    folder = isogrid.save(model, tmp_path / "m")
    again = isogrid.load(folder, Twice(nn.Linear(8, 8)).eval())
    assert again.a is again.b
    assert again.part is again.again
    assert torch.equal(again(x), wanted)
    isogrid.merge(model)
    assert model.a is model.b
    assert {type(layer) for layer in (model.a, model.part[0])} == {nn.Linear}
    assert model.part[0].weight.requires_grad == trained
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5)
    dense = isogrid.load(isogrid.save(model, tmp_path / "m"), Twice(nn.Linear(8, 8)).eval())
    torch.testing.assert_close(dense(x), wanted, rtol=0, atol=1e-5)


def test_layers_that_one_model_shares_fill_one_that_does_not(tmp_path):
    model, x = Twice(StructuredLinear(8, 8, "low_rank(rank=2)")).eval(), torch.randn(5, 8)
    other = Twice(nn.Linear(8, 8)).eval()
    other.b = nn.Linear(8, 8)
    isogrid.load(isogrid.save(model, tmp_path / "m"), other)
    assert other.a is not other.b
    assert torch.equal(other(x), model(x))


def test_a_dense_export_of_a_layer_in_two_places(tmp_path):
    model, batch = models.llama(), models.token_batch()
    layers = model.model.layers
    layers[0].mlp.up_proj = layers[1].mlp.up_proj = StructuredLinear(32, 48, "low_rank(rank=4)", bias=False)
    wanted = models.output(model.eval(), batch)
    again = isogrid.load(isogrid.save(model, tmp_path / "m", dense=True))
    torch.testing.assert_close(models.output(again, batch), wanted, rtol=0, atol=1e-5)


def test_a_layer_alone_is_refused(tmp_path):
    layer = StructuredLinear(8, 8, "low_rank(rank=2)")
    with pytest.raises(IsogridError, match=r"of a single layer take layer.merge\(\)"):
        isogrid.merge(layer)
    with pytest.raises(IsogridError, match=r"a structured layer alone .* nn.Sequential\(layer\)"):
        isogrid.save(layer, tmp_path / "m")
    assert not list(tmp_path.iterdir())


# ---- a structured head over tied embeddings -----------------------------------------------------------------------

TIED = r"layer 'lm_head' is structured, .* ties its weight to 'model.embed_tokens.weight'; set tie_word_embeddings to"


@pytest.fixture
def headed():
    model = models.llama(tied=True)
    model.lm_head = StructuredLinear(32, models.VOCABULARY, "low_rank(rank=4)", bias=False).eval()
    return model


def test_a_structured_head_that_the_config_ties_is_refused(headed, tmp_path):
    before = models.snapshot(headed)
    for dense in (False, True):
        with pytest.raises(IsogridError, match=TIED):
            isogrid.save(headed, tmp_path / "m", dense=dense)
    with pytest.raises(IsogridError, match=TIED):
        isogrid.merge(headed)
    models.assert_untouched(headed, before)
    assert not list(tmp_path.iterdir())


def test_a_file_whose_config_ties_a_structured_head_is_refused(headed, tmp_path):
    headed.config.tie_word_embeddings = False
    config = isogrid.save(headed, tmp_path / "m") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    for read in (isogrid.load, type(headed).from_pretrained):
        with pytest.raises(CheckpointError, match=TIED):
            read(tmp_path / "m")


@pytest.mark.parametrize("way", ["structured", "dense", "merged"])
def test_an_untied_structured_head_is_kept(headed, way, tmp_path):
    headed.config.tie_word_embeddings = False  # as the refusal says
    batch = models.token_batch()
    wanted = models.output(headed, batch)
    model = isogrid.merge(headed) if way == "merged" else headed
    again = isogrid.load(isogrid.save(model, tmp_path / "m", dense=way == "dense"))
    torch.testing.assert_close(models.output(again, batch), wanted, rtol=0, atol=1e-5)


def test_a_tied_model_inside_a_module_keeps_a_structured_head(headed, tmp_path):
    model, batch = nn.ModuleDict({"inner": headed}), models.token_batch()
    wanted = models.output(headed, batch)
    twin = models.llama(seed=5)
    again = isogrid.load(isogrid.save(model, tmp_path / "m"), nn.ModuleDict({"inner": twin}))
    torch.testing.assert_close(models.output(again["inner"], batch), wanted, rtol=0, atol=1e-5)
