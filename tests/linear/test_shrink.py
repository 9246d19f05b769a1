import copy
import re

import pytest
import torch
import transformers
from torch import nn

from isogrid import IsogridError, compress
from isogrid.linear import NoAttention, find_coupled, is_linear, linear_matrix, shrink, survey_coupled
from tests import models


def _of(cls, config, **sizes):
    common = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return models.shake(cls(config(**(common | sizes), vocab_size=models.VOCABULARY)), 0).eval()


def qwen3():
    """Norms over heads, heads of a width of their own."""
    return _of(transformers.Qwen3ForCausalLM, transformers.Qwen3Config, num_key_value_heads=2, head_dim=8)


def qwen2():
    """Biases on queries, keys and values only."""
    return _of(transformers.Qwen2ForCausalLM, transformers.Qwen2Config, num_key_value_heads=1)


def mistral():
    return _of(transformers.MistralForCausalLM, transformers.MistralConfig, num_key_value_heads=4, sliding_window=8)


def roberta():
    return _of(transformers.RobertaModel, transformers.RobertaConfig, max_position_embeddings=40)


BUILDS = {name: models.TRANSFORMERS[name].build for name in models.TRANSFORMERS if name != "t5"}
BUILDS |= {"qwen3": qwen3, "qwen2": qwen2, "mistral": mistral, "roberta": roberta}
BATCHES = {name: models.TRANSFORMERS[name].batch for name in models.TRANSFORMERS}
BATCHES |= {"qwen3": models.token_batch, "qwen2": models.token_batch, "mistral": models.token_batch}
BATCHES |= {"roberta": models.padded_batch}
KEPT = {
    "every other": lambda place, units: range(1, units, 2),
    "the first": lambda place, units: range(1),
    "all but the last": lambda place, units: range(units - 1),
    "none": lambda place, units: (),
    "none of some": lambda place, units: range(units if place % 3 == 0 else 0),
}


def mask(model, one, kept):
    """Zeros in the writer's columns of all structures that aren't kept: what a shrunk module has to compute."""
    layer = model.get_submodule(one.writer)
    gone = one.columns(torch.tensor([unit for unit in range(one.units) if unit not in kept], dtype=torch.int64))
    with torch.no_grad():
        (layer.weight if isinstance(layer, nn.Linear) else layer.weight.mT)[:, gone] = 0


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", BUILDS)
def test_shrunk_is_masked(name, kept):
    small = BUILDS[name]()
    masked = copy.deepcopy(small)
    before = sum(value.numel() for value in small.parameters())
    for place, one in enumerate(find_coupled(small).values()):
        units = list(KEPT[kept](place, one.units))
        shrink(small, one, units)
        mask(masked, one, units)
        writer = small.get_submodule(one.writer)
        assert tuple(linear_matrix(writer).shape)[1] == len(units) * one.width
    assert sum(value.numel() for value in small.parameters()) < before
    batch = BATCHES[name]()
    torch.testing.assert_close(models.output(small, batch), models.output(masked, batch), rtol=1e-5, atol=1e-5)
    if name in models.TRANSFORMERS and models.TRANSFORMERS[name].generates:
        # With a cache of keys and values, which modules without heads have to keep count in.
        ids = models.tokens(2, 5, 1)
        told = [model.generate(ids, max_new_tokens=6, do_sample=False) for model in (small, masked)]
        assert torch.equal(*told)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_one_row_of_one_token_in_bfloat16(name):
    model = BUILDS[name]().bfloat16()
    for place, one in enumerate(find_coupled(model).values()):
        shrink(model, one, range(place % 2))
    ids = models.tokens(1, 1, 0)
    assert torch.isfinite(models.output(model, {"input_ids": ids})).all()
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "vit"])
def test_what_is_left_trains(name):
    model = BUILDS[name]().train()
    for place, one in enumerate(find_coupled(model).values()):
        shrink(model, one, range(0 if place == 1 else one.units - 1))
    out = model(**BATCHES[name]())
    (out.logits if "logits" in out else out.last_hidden_state).square().sum().backward()
    assert all(torch.isfinite(value.grad).all() for value in model.parameters() if value.grad is not None)
    assert all(module.training for module in model.modules())


def test_cutting_twice_is_cutting_once():
    twice, once = models.llama(), models.llama()
    for name in list(find_coupled(twice)):
        shrink(twice, find_coupled(twice)[name], range(1, find_coupled(twice)[name].units))
        shrink(twice, find_coupled(twice)[name], range(find_coupled(twice)[name].units - 1))
        one = find_coupled(once)[name]
        shrink(once, one, range(1, one.units - 1))
    for (name, a), (_, b) in zip(twice.state_dict().items(), once.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_given_numbers_and_a_gained_bias():
    model = models.llama()
    one = find_coupled(model)["model.layers.0.mlp"]
    weight, bias = torch.randn(32, 2), torch.randn(32)
    shrink(model, one, [3, 5], weight=weight, bias=bias)
    writer = model.get_submodule(one.writer)
    assert torch.equal(writer.weight, weight)
    assert torch.equal(writer.bias, bias)
    assert model.get_submodule("model.layers.0.mlp").intermediate_size == 2
    assert all(is_linear(model.get_submodule(layer)) for layer in one.layers)


def test_structures_that_are_found():
    llama = find_coupled(models.llama())
    assert [(one.kind, one.unit, one.units, one.heads, one.width) for one in llama.values()] == [
        ("attention", "group", 2, 2, 16),
        ("feed_forward", "channel", 48, 0, 1),
    ] * 2
    gpt2 = find_coupled(models.gpt2())["transformer.h.1.attn"]
    assert (gpt2.unit, gpt2.units, gpt2.width, gpt2.producers[0].parts) == ("head", 4, 6, 3)
    assert gpt2.producers[0].rows(4, torch.tensor([2])).tolist() == [*range(12, 18), *range(36, 42), *range(60, 66)]


def test_no_heads_left_is_no_attention():
    model = models.llama()
    shrink(model, find_coupled(model)["model.layers.1.self_attn"], [])
    assert isinstance(model.model.layers[1].self_attn, NoAttention)
    assert list(find_coupled(model)) == ["model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.mark.parametrize("name", ["qwen3", "llama", "bert", "gpt2"])
@pytest.mark.parametrize("kept", [range(0), range(1)])
def test_cuts_name_every_parameter_that_is_gone(name, kept):
    """Norms over heads go with the last head, though none of their numbers belongs to one."""
    model = BUILDS[name]()
    before = {id(value): key for key, value in model.named_parameters()}
    cuts = [cut for one in list(find_coupled(model).values()) for cut in shrink(model, one, kept)]
    after = {id(value): value for value in model.parameters()}
    assert sorted(before[id(cut.old)] for cut in cuts) == sorted(before[key] for key in before.keys() - after.keys())
    assert all(cut.new is None or cut.new is after[id(cut.new)] for cut in cuts)


def broken(change):
    model = models.llama()
    change(model.model.layers[0])
    return model


def _uneven(layer):
    attention = layer.self_attn
    attention.k_proj, attention.v_proj = nn.Linear(32, 24), nn.Linear(32, 24)  # 3 groups, 4 heads


def _no_whole_heads(layer):
    layer.self_attn.q_proj = nn.Linear(32, 30)


def _wrong_writer(layer):
    layer.self_attn.o_proj = nn.Linear(40, 32)


def _extra(layer):
    layer.self_attn.sinks = nn.Parameter(torch.zeros(4))


def _headless(layer):
    del layer.self_attn.head_dim


def _mixed(layer):
    layer.mlp.gate_proj = nn.Linear(32, 40)


def gpt_bigcode(**sizes):
    """Queries, keys and values in one nn.Linear, interleaved by head."""
    return _of(transformers.GPTBigCodeForCausalLM, transformers.GPTBigCodeConfig, n_inner=40, n_positions=32, **sizes)


def bitnet():
    return _of(transformers.BitNetForCausalLM, transformers.BitNetConfig, num_key_value_heads=2)


def gemma3n(sparsity=0.0):
    """Two of four layers take their keys and values from others."""
    return _of(
        transformers.Gemma3nForCausalLM,
        transformers.Gemma3nTextConfig,
        num_hidden_layers=4,
        num_key_value_heads=2,
        num_kv_shared_layers=2,
        head_dim=8,
        vocab_size_per_layer_input=models.VOCABULARY,
        hidden_size_per_layer_input=4,
        laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[sparsity] * 4,
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: broken(_uneven), r"layers.0.self_attn' has 4 heads over 3 groups"),
        (lambda: broken(_no_whole_heads), r"q_proj' has 30 outputs, no whole number of heads of 8"),
        (lambda: broken(_wrong_writer), r"o_proj' \(32, 40\) doesn't fit to 4 heads of 8"),
        (lambda: broken(_extra), r"parameter 'sinks' \(4,\)"),
        (lambda: broken(_headless), "doesn't say how wide a head is"),
        (lambda: broken(_mixed), r"gate_proj' has 40 outputs, .*down_proj' 48 inputs"),
        (models.t5, "no attention or feed-forward modules that are known here"),
        (models.mlp, "no attention or feed-forward modules that are known here"),
    ],
)
def test_unknown_and_odd_models(model, message):
    with pytest.raises(IsogridError, match=message):
        find_coupled(model())


COMMON = r"self_attn' has its keys and values in common with other layers"
REFUSED = {
    "interleaved": (lambda: gpt_bigcode(multi_query=False), "attn", "how the queries, keys and values lie in the 72"),
    "one key": (lambda: gpt_bigcode(multi_query=True), "attn", "how the queries, keys and values lie in the 36"),
    "norm of channels": (bitnet, "mlp", r"a parameter 'ffn_sub_norm.weight' \(40,\) over its channels"),
    "norm of heads": (bitnet, "self_attn", r"a parameter 'attn_sub_norm.weight' \(24,\) that heads may share"),
    "keys of others": (gemma3n, "self_attn", COMMON),
    "channels that stand out": (lambda: gemma3n(0.5), "mlp", "lets through what stands out among all its channels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_modules_of_other_kinds_are_refused_and_those_beside_them_cut(case):
    build, kind, message = REFUSED[case]
    small, masked = build(), build()
    found, refused = survey_coupled(small)
    why = [one.why for name, one in refused.items() if name.rpartition(".")[2] == kind]
    assert len(why) == small.config.num_hidden_layers
    assert all(re.search(message, one) for one in why)
    assert not any(name.endswith(f".{kind}") for name in found)
    for one in found.values():
        shrink(small, one, range(1, one.units, 2))
        mask(masked, one, range(1, one.units, 2))
    batch = models.token_batch()
    torch.testing.assert_close(models.output(small, batch), models.output(masked, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [_uneven, _no_whole_heads, _wrong_writer, _extra, _headless])
def test_a_module_that_does_not_matter_may_be_odd(change):
    found = find_coupled(broken(change), {"model.layers.0.mlp"})
    assert list(found) == ["model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1.mlp"]
    with pytest.raises(IsogridError, match=r"layers.0.self_attn"):
        find_coupled(broken(change), {"model.layers.0.self_attn"})


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_refused_modules_keep_their_names_and_kinds(name):
    model = BUILDS[name]()
    wanted = find_coupled(model)
    compress(model, "low_rank", keep=0.5)
    found, refused = survey_coupled(model)
    assert not found
    assert {key: one.kind for key, one in refused.items()} == {key: one.kind for key, one in wanted.items()}


def test_tied_weights():
    model = models.llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(IsogridError, match=r"layers.0.mlp.up_proj' shares its weight.*untie"):
        find_coupled(model)
    assert "model.layers.0.mlp" not in find_coupled(model, {"model.layers.0.self_attn"})
    model = models.llama()
    model.model.layers[1] = model.model.layers[0]  # whole layers shared, as ALBERT's are
    with pytest.raises(IsogridError, match="shares its weight"):
        find_coupled(model)


def test_compressed_models():
    model = models.llama()
    compress(model, "low_rank", keep=0.5)
    with pytest.raises(IsogridError, match="prune first, then compress"):
        find_coupled(model)


@pytest.mark.parametrize("kept", [[2, 1], [1, 1], [-1], [48], [[1]]])
def test_bad_structures(kept):
    model = models.llama()
    before = models.snapshot(model)
    with pytest.raises(IsogridError, match="has 48 channels; kept are ascending indices"):
        shrink(model, find_coupled(model)["model.layers.0.mlp"], kept)
    models.assert_untouched(model, before)


def test_a_weight_of_another_size():
    model = models.llama()
    before = models.snapshot(model)
    with pytest.raises(IsogridError, match=r"down_proj' becomes 32 x 2, its weight is \(32, 3\)"):
        shrink(model, find_coupled(model)["model.layers.0.mlp"], [0, 1], weight=torch.zeros(32, 3))
    models.assert_untouched(model, before)


def test_a_bias_of_another_size_is_refused():
    model = models.llama()
    one = next(iter(find_coupled(model).values()))
    before = models.snapshot(model)
    with pytest.raises(IsogridError, match=r"its bias is \(3,\)"):
        shrink(model, one, [0], bias=torch.zeros(3))
    models.assert_untouched(model, before)
