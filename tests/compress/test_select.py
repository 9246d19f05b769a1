import pytest
import torch
from torch import nn

from isogrid import IsogridError, compress, select_layers
from tests import models

HEADS = ("lm_head", "classifier", "pooler", "predictions", "head", "stem", "shared", "embed")


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_default_takes_every_linear_layer_inside_blocks_and_no_head(name):
    architecture = models.ARCHITECTURES[name]
    model = architecture.build()
    layers = select_layers(model)
    assert len(layers) == architecture.selected
    assert not [layer for layer in layers if any(head in layer for head in HEADS)]
    assert all(model.get_submodule(layer) is module for layer, module in layers.items())


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_layers_come_in_the_order_of_the_model(name):
    model = models.ARCHITECTURES[name].build()
    order = {layer: at for at, (layer, _) in enumerate(model.named_modules())}
    places = [order[layer] for layer in select_layers(model)]
    assert places == sorted(places)


def test_model_without_blocks_gives_all_linear_layers():
    assert list(select_layers(models.mlp())) == ["0", "2", "4"]


def test_star_takes_heads_but_not_tied_ones():
    assert "lm_head" in select_layers(models.llama(), "*")
    assert "lm_head" not in select_layers(models.llama(tied=True), "*")
    assert "cls.predictions.decoder" not in select_layers(models.bert_masked(), "*")
    assert "cls.predictions.transform.dense" in select_layers(models.bert_masked(), "*")


def test_pattern_by_wildcard_by_last_name_and_by_whole_name():
    model = models.llama()
    assert list(select_layers(model, "*.mlp.*")) == [
        f"model.layers.{block}.mlp.{layer}_proj" for block in (0, 1) for layer in ("gate", "up", "down")
    ]
    assert list(select_layers(model, "q_proj")) == [f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)]
    assert list(select_layers(model, "model.layers.1.mlp.up_proj")) == ["model.layers.1.mlp.up_proj"]
    assert list(select_layers(model, "lm_head")) == ["lm_head"]


def test_several_patterns_join_in_model_order():
    names = list(select_layers(models.llama(), ["v_proj", "q_proj", "*.0.mlp.up_proj"]))
    assert names == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_a_name_does_not_match_inside_other_names():
    with pytest.raises(IsogridError, match="no linear layer matches 'proj'"):
        select_layers(models.llama(), "proj")


def test_skip_takes_away():
    layers = select_layers(models.llama(), skip=["down_proj", "*.1.self_attn.*"])
    assert len(layers) == 14 - 2 - 4
    assert not [name for name in layers if name.endswith("down_proj") or ".1.self_attn." in name]


@pytest.mark.parametrize("argument", ["select", "skip"])
def test_unknown_pattern_suggests_near_names(argument):
    with pytest.raises(IsogridError, match=r"'q_porj'.*did you mean.*'q_proj'"):
        select_layers(models.llama(), **{argument: "q_porj"})


def test_pattern_near_to_nothing_lists_what_there_is():
    with pytest.raises(IsogridError, match=r"'zzzz'.*last names: .*down_proj.*q_proj"):
        select_layers(models.llama(), "zzzz")


@pytest.mark.parametrize(
    ("build", "layer"),
    [(lambda: models.llama(tied=True), "lm_head"), (models.bert_masked, "cls.predictions.decoder")],
)
def test_tied_layer_asked_for_by_name_is_an_error(build, layer):
    with pytest.raises(IsogridError, match=f"'{layer}' shares its weight"):
        select_layers(build(), layer)
    with pytest.raises(IsogridError, match=f"'{layer}' shares its weight"):
        select_layers(build(), ["q_proj" if layer == "lm_head" else "query", layer])


def test_module_used_under_two_names_is_tied():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 4))
    assert list(select_layers(model)) == ["3"]


def test_weight_shared_by_two_modules_is_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert list(select_layers(model, "*")) == ["3"]


def test_nothing_left_is_an_error():
    with pytest.raises(IsogridError, match="leave no layer"):
        select_layers(models.mlp(), "0", skip="0")
    with pytest.raises(IsogridError, match="leave no layer"):
        select_layers(models.mlp(), skip="*")


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU()), nn.Identity()])
def test_model_without_linear_layers_inside_is_an_error(model):
    with pytest.raises(IsogridError, match="no linear layers inside"):
        select_layers(model)


def test_single_layer_is_pointed_to_its_own_way():
    with pytest.raises(IsogridError, match="from_linear"):
        select_layers(nn.Linear(3, 3))


def test_attention_built_of_parameters_is_left_alone_and_its_output_taken():
    model = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16)])
    assert list(select_layers(model)) == ["0.self_attn.out_proj", "0.linear1", "0.linear2"]


@pytest.mark.parametrize("build", [models.bert_classifier, models.llama, models.blocks])
def test_default_never_falls_back_to_heads_when_all_blocks_are_compressed(build):
    model = build()
    compress(model, "low_rank", keep=0.5)
    with pytest.raises(IsogridError):
        select_layers(model)


def test_default_skips_what_is_compressed_already():
    model = models.llama()
    compress(model, "low_rank", keep=0.5, select="*.mlp.*")
    assert len(select_layers(model)) == 8
    assert not [name for name in select_layers(model) if ".mlp." in name]


def test_selecting_changes_nothing():
    model = models.llama(tied=True)
    before = models.snapshot(model)
    draws = torch.get_rng_state()
    select_layers(model, "*")
    models.assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), draws)
