import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import isogrid
from isogrid import CheckpointError, IsogridError, compress
from isogrid.checkpoint import PrunedEntry, describe_pruned, mark_structured
from isogrid.checkpoint.pruned import attach_pruned
from isogrid.compress import stored_bytes, structured_layers
from isogrid.linear import find_coupled, linear_matrix, shrink
from tests import models

NAMES = ("llama", "llama_tied", "bert", "bert_masked", "bert_classifier", "gpt2", "vit")
WAYS = ("some", "uneven", "none", "bias")


def pruned(name, way="uneven", dtype=torch.float32):
    model = models.TRANSFORMERS[name].build().to(dtype)
    entries = {}
    for place, (key, one) in enumerate(find_coupled(model).items()):
        counts = {"some": 1, "uneven": place % (one.units + 1), "none": 0, "bias": place % 2}
        kept = range(counts[way])
        out = linear_matrix(model.get_submodule(one.writer)).shape[0]
        gained = way == "bias" and model.get_submodule(one.writer).bias is None
        shrink(model, one, kept, bias=torch.randn(out, generator=models.generator(place)) if gained else None)
        entries[key] = PrunedEntry(len(kept), one.units, gained)
    mark_structured(model, pruned=entries)
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, way, tmp_path):
    model, batch = pruned(name, way), models.TRANSFORMERS[name].batch(1)
    isogrid.save(model, tmp_path / "one")
    again = isogrid.load(tmp_path / "one")
    assert describe_pruned(again) == describe_pruned(model)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert torch.equal(models.exact_output(again, batch), models.exact_output(model, batch))
    size = (tmp_path / "one" / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "one" / "model.safetensors").read_bytes()[:8], "little")
    assert size - 8 - header == stored_bytes(model)
    again.save_pretrained(tmp_path / "two", max_shard_size="20KB")
    third = type(model).from_pretrained(tmp_path / "two")
    assert torch.equal(models.exact_output(third, batch), models.exact_output(model, batch))


def test_bfloat16(tmp_path):
    model = pruned("llama", "bias", torch.bfloat16)
    isogrid.save(model, tmp_path / "m")
    again = isogrid.load(tmp_path / "m")
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_the_part_without_its_head(tmp_path):
    model = pruned("llama", "bias")
    isogrid.save(model, tmp_path / "m")
    base = transformers.AutoModel.from_pretrained(tmp_path / "m")
    for key, value in base.state_dict().items():
        assert torch.equal(value, model.state_dict()[f"model.{key}"]), key


OTHER_CLASSES = {
    "llama": transformers.AutoModel,
    "gpt2": transformers.AutoModel,
    "bert": transformers.AutoModelForSequenceClassification,
    "bert_masked": transformers.AutoModel,
}


@pytest.mark.parametrize("name", OTHER_CLASSES)
def test_a_model_of_another_class_is_saved_by_its_own_names(name, tmp_path):
    model, batch = pruned(name), models.TRANSFORMERS[name].batch(1)
    isogrid.save(model, tmp_path / "m")
    other = OTHER_CLASSES[name].from_pretrained(tmp_path / "m").eval()
    assert describe_pruned(other).keys() == find_coupled(type(other)(other.config)).keys()
    stored = describe_pruned(model)
    for key, entry in describe_pruned(other).items():
        assert [one for name, one in stored.items() if name.endswith(key) or key.endswith(name)] == [entry]
    assert other.config.quantization_config["pruned"].keys() == describe_pruned(other).keys()
    wanted = models.exact_output(other, batch)
    again = isogrid.load(isogrid.save(other, tmp_path / "again"))
    assert torch.equal(models.exact_output(again, batch), wanted)
    full = isogrid.load(isogrid.save(other, tmp_path / "dense", dense=True))
    assert not describe_pruned(full)
    torch.testing.assert_close(models.output(full, batch), wanted, rtol=1e-5, atol=1e-5)


def test_a_base_inside_a_whole_model_is_exported(tmp_path):
    model, batch = pruned("llama"), models.token_batch(1)
    wanted = models.exact_output(model.model, batch)
    full = isogrid.load(isogrid.save(model.model, tmp_path / "dense", dense=True))
    torch.testing.assert_close(models.output(full, batch), wanted, rtol=1e-5, atol=1e-5)
    again = isogrid.load(isogrid.save(model.model, tmp_path / "base"))
    assert torch.equal(models.exact_output(again, batch), wanted)
    # The whole model, which shares its config with the base, knows its modules all the same.
    again = isogrid.load(isogrid.save(model, tmp_path / "m"))
    assert torch.equal(models.exact_output(again, batch), models.exact_output(model, batch))


@pytest.mark.parametrize("name", ["llama_tied", "bert", "gpt2", "vit"])
def test_a_dense_export_computes_the_same_for_any_reader(name, tmp_path):
    model, batch = pruned(name), models.TRANSFORMERS[name].batch(1)
    isogrid.save(model, tmp_path / "dense", dense=True)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    full = type(model).from_pretrained(tmp_path / "dense")
    assert not describe_pruned(full)
    torch.testing.assert_close(models.output(full, batch), models.output(model, batch), rtol=1e-5, atol=1e-5)


def test_a_dense_export_has_no_place_for_a_gained_bias(tmp_path):
    with pytest.raises(IsogridError, match=r"has gained a bias that a dense Linear here does not have.*bias=False"):
        isogrid.save(pruned("llama", "bias"), tmp_path / "dense", dense=True)
    assert not (tmp_path / "dense").exists()


def test_formats_on_top(tmp_path):
    model, batch = pruned("llama", "some"), models.token_batch()
    shrunk = {key: tuple(linear_matrix(model.get_submodule(key)).shape) for key in ("model.layers.0.mlp.up_proj",)}
    compress(model, "low_rank", keep=0.5, skip=["*mlp*"])
    isogrid.save(model, tmp_path / "m")
    again = isogrid.load(tmp_path / "m")
    assert structured_layers(again).keys() == structured_layers(model).keys() != set()
    assert tuple(again.get_submodule("model.layers.0.mlp.up_proj").weight.shape) == shrunk["model.layers.0.mlp.up_proj"]
    assert torch.equal(models.exact_output(again, batch), models.exact_output(model, batch))


@pytest.mark.parametrize("dense", [False, True])
def test_modules_beside_others_that_cannot_be_cut(dense, tmp_path):
    """OLMo 2 normalizes queries and keys of all heads together: its attention stays as it is."""
    config = transformers.Olmo2Config(
        vocab_size=models.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = models.shake(transformers.Olmo2ForCausalLM(config), 0).eval()
    entries = {}
    for place in range(2):
        name = f"model.layers.{place}.mlp"
        shrink(model, find_coupled(model, {name})[name], range(5 * place))
        entries[name] = PrunedEntry(5 * place, 48)
    mark_structured(model, pruned=entries)
    isogrid.save(model, tmp_path / "m", dense=dense)
    again = transformers.Olmo2ForCausalLM.from_pretrained(tmp_path / "m") if dense else isogrid.load(tmp_path / "m")
    assert describe_pruned(again) == ({} if dense else entries)
    batch = models.token_batch(1)
    torch.testing.assert_close(models.output(again, batch), models.output(model, batch), rtol=1e-5, atol=1e-5)


def test_an_entry_of_a_module_that_cannot_be_cut(tmp_path):
    skeleton = models.llama()
    skeleton.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(CheckpointError, match="has a parameter 'sinks'"):
        attach_pruned(skeleton, {ATTENTION: PrunedEntry(1, 2)}, "config.json")
    assert attach_pruned(skeleton, {"model.layers.0.mlp": PrunedEntry(1, 48)}, "config.json")


def test_layers_of_which_nothing_is_left_are_not_rewritten():
    model = pruned("gpt2", "none")
    with pytest.raises(IsogridError, match=r"leave no layer to rewrite|no linear layers"):
        compress(model, "low_rank", keep=0.5)


@pytest.fixture
def folder(tmp_path):
    return isogrid.save(pruned("llama", "some"), tmp_path / "m")


def rewritten(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


ATTENTION = "model.layers.0.self_attn"
BROKEN = {
    "negative": (lambda q: q["pruned"][ATTENTION].update(units=-1), "keeps -1 of 2; no such sizes"),
    "more than there were": (lambda q: q["pruned"][ATTENTION].update(units=3), "keeps 3 of 2; no such sizes"),
    "no number": (lambda q: q["pruned"][ATTENTION].update(units="1"), "keeps '1' of 2; no such sizes"),
    "no entry": (lambda q: q["pruned"].update({ATTENTION: 1}), "keeps None of None"),
    "no table": (lambda q: q.update(pruned=[1]), "'pruned' in quantization_config is no table"),
    "another size": (lambda q: q["pruned"][ATTENTION].update(of=4), "had 4 groups before it was pruned"),
    "twice": (
        lambda q: q["pruned"].update({"layers.0.self_attn": {"units": 1, "of": 2}}),
        "'model.layers.0.self_attn' is described twice, once as 'layers.0.self_attn'",
    ),
    "no such module": (
        lambda q: q["pruned"].update({"model.layers.9.mlp": {"units": 1, "of": 48}}),
        "'model.layers.9.mlp' had 48 units before",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_entries(folder, case):
    change, message = BROKEN[case]
    rewritten(folder, change)
    with pytest.raises(CheckpointError, match=message):
        isogrid.load(folder)
    with pytest.raises(CheckpointError, match=message):
        transformers.LlamaForCausalLM.from_pretrained(folder)


def test_files_that_lack_a_layer(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{ATTENTION}.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"self_attn.q_proj': 'weight' was not in the checkpoint"):
        isogrid.load(folder)


def test_sizes_that_the_file_does_not_have(folder):
    rewritten(folder, lambda q: q["pruned"][ATTENTION].update(units=2))
    with pytest.raises(CheckpointError, match=r"q_proj.weight has shape \(16, 32\), config.json asks for \(32, 32\)"):
        isogrid.load(folder)
