import json
import os
import shutil
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import isogrid
from isogrid import CheckpointError, IsogridError, StructuredLinear, compress
from isogrid.checkpoint import write_folder
from isogrid.compress import structured_layers
from tests import models

LLAMA_LAYER = "model.layers.0.mlp.up_proj"
PLAIN_LAYER = "blocks.0.up"
FORMAT = "low_rank_light"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """One sound checkpoint of each kind, written once; tests damage copies."""
    folder = tmp_path_factory.mktemp("sound")
    llama, plain = models.llama(), models.blocks()
    compress(llama, FORMAT, keep=0.5)
    compress(plain, FORMAT, keep=0.5)
    isogrid.save(llama, folder / "llama")
    llama.save_pretrained(folder / "shards", max_shard_size="20KB")
    isogrid.save(plain, folder / "plain")
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    """A fresh copy of the three checkpoints."""
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    state = {name: value.clone() for name, value in load_file(path).items()}
    change(state)
    save_file(state, path, metadata=metadata)


def layer_of(kind):
    return PLAIN_LAYER if kind == "plain" else LLAMA_LAYER


def read(kind, folder):
    """Load one of the kinds; a plain module must come through a failure unchanged."""
    if kind != "plain":
        return isogrid.load(folder / kind)
    model = models.blocks(seed=4)
    before = models.snapshot(model)
    try:
        return isogrid.load(folder / kind, model)
    except BaseException:
        models.assert_untouched(model, before)
        raise


KINDS = ("llama", "plain")


def test_the_copies_are_sound(folder):
    assert len(structured_layers(read("llama", folder))) == len(structured_layers(read("shards", folder))) == 14
    assert len(structured_layers(read("plain", folder))) == 4


# ---- half-written and damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
class TestDamage:
    def test_no_folder(self, folder, kind):
        shutil.rmtree(folder / kind)
        with pytest.raises(CheckpointError, match="is not a folder"):
            read(kind, folder)

    def test_no_config(self, folder, kind):
        (folder / kind / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"no config\.json.*interrupted"):
            read(kind, folder)

    def test_no_weights(self, folder, kind):
        (folder / kind / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"no model\.safetensors.*interrupted"):
            read(kind, folder)

    @pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
    def test_truncated_weights(self, folder, kind, part):
        path = folder / kind / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: int(part * len(data))])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
            read(kind, folder)

    @pytest.mark.parametrize("data", [b"\0" * 64, b"\xff" * 64, b"garbage " * 100, (2**60).to_bytes(8, "little")])
    def test_garbage_weights(self, folder, kind, data):
        (folder / kind / "model.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            read(kind, folder)

    @pytest.mark.parametrize("text", [b"", b"{", b'{"a": 1', b"\xff\xfe\0", b"[]", b"null", b'"text"'])
    def test_config_that_is_no_json_object(self, folder, kind, text):
        (folder / kind / "config.json").write_bytes(text)
        with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
            read(kind, folder)

    def test_deeply_nested_config(self, folder, kind):
        (folder / kind / "config.json").write_text("[" * 200_000)
        with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
            read(kind, folder)

    @pytest.mark.parametrize("factor", ["order", "rest", "left"])
    def test_missing_factor(self, folder, kind, factor):
        edit_weights(folder / kind, lambda state: state.pop(f"{layer_of(kind)}.{factor}"))
        with pytest.raises(CheckpointError, match=f"'{layer_of(kind)}' lacks its '{factor}'"):
            read(kind, folder)

    @pytest.mark.parametrize("factor", ["order", "rest", "left"])
    def test_factor_of_wrong_shape(self, folder, kind, factor):
        name = f"{layer_of(kind)}.{factor}"
        edit_weights(folder / kind, lambda state: state.update({name: state[name][:-1].clone()}))
        with pytest.raises(CheckpointError, match=f"{name} has shape"):
            read(kind, folder)

    def test_dense_weight_beside_the_factors(self, folder, kind):
        edit_weights(folder / kind, lambda state: state.update({f"{layer_of(kind)}.weight": torch.zeros(48, 24)}))
        with pytest.raises(CheckpointError, match="dense weight beside its factors"):
            read(kind, folder)

    def test_weights_of_another_budget(self, folder, kind):
        """Both files are sound, but they don't belong together."""
        model = models.ARCHITECTURES["llama" if kind == "llama" else "blocks"].build()
        compress(model, FORMAT, keep=0.3)
        isogrid.save(model, folder / "other")
        shutil.copy(folder / "other" / "model.safetensors", folder / kind / "model.safetensors")
        with pytest.raises(CheckpointError, match="has shape"):
            read(kind, folder)


# ---- hostile and foreign descriptions -----------------------------------------------------------------------------


def entry(change):
    """A change of one layer's entry."""

    def apply(config, layer):
        change(config["quantization_config"]["layers"][layer])

    return apply


def top(**values):
    """A change of the description itself."""
    return lambda config, layer: config["quantization_config"].update(values)


DESCRIPTIONS = {
    "unknown format": (entry(lambda e: e["format"].update(name="low_rnak")), "unknown format 'low_rnak'"),
    "format without name": (entry(lambda e: e["format"].pop("name")), "layer"),
    "format is a list": (entry(lambda e: e.update(format=["low_rank"])), "layer"),
    "format is code": (entry(lambda e: e["format"].update(name="__import__('os')")), "unknown format"),
    "unknown parameter": (entry(lambda e: e["format"].update(ranks=3)), "'ranks'"),
    "rank is text": (entry(lambda e: e["format"].update(rank="9")), "layer"),
    "rank is a fraction": (entry(lambda e: e["format"].update(rank=9.5)), "layer|config.json asks for"),
    "rank is a list": (entry(lambda e: e["format"].update(rank=[9])), "layer"),
    "rank zero": (entry(lambda e: e["format"].update(rank=0)), "layer"),
    "rank negative": (entry(lambda e: e["format"].update(rank=-1)), "layer"),
    "rank missing": (entry(lambda e: e["format"].update(rank=None)), "layer"),
    "rank absurd": (entry(lambda e: e["format"].update(rank=2**40)), "layer"),
    "other rank": (entry(lambda e: e["format"].update(rank=e["format"]["rank"] - 1)), "config.json asks for"),
    "blocks zero": (entry(lambda e: e.update(format={"name": "monarch", "blocks": 0})), "layer"),
    "blocks absurd": (entry(lambda e: e.update(format={"name": "monarch", "blocks": 2**40})), "layer"),
    "sizes absurd": (entry(lambda e: e.update({"in": 2**40, "out": 2**40})), "layer.*sizes"),
    "size zero": (entry(lambda e: e.update({"in": 0})), "layer.*sizes"),
    "size negative": (entry(lambda e: e.update({"out": -48})), "layer.*sizes"),
    "size is text": (entry(lambda e: e.update({"in": "24"})), "layer.*sizes"),
    "size is infinite": (entry(lambda e: e.update({"in": float("inf")})), "layer.*sizes"),
    "size missing": (entry(lambda e: e.pop("in")), "incomplete entry"),
    "bias missing": (entry(lambda e: e.pop("bias")), "incomplete entry"),
    "bias that is not there": (entry(lambda e: e.update(bias=not e["bias"])), "bias|is not in the model"),
    "entry is a list": (
        lambda c, layer: c["quantization_config"]["layers"].update({layer: [1, 2]}),
        "incomplete entry",
    ),
    "entry is null": (lambda c, layer: c["quantization_config"]["layers"].update({layer: None}), "incomplete entry"),
    "newer version": (top(format_version=2), "format version 2.*upgrade isogrid"),
    "version zero": (top(format_version=0), "version 0"),
    "version is text": (top(format_version="1"), "version '1'"),
    "no version": (lambda c, _: c["quantization_config"].pop("format_version"), "version None"),
    "no layers": (lambda c, _: c["quantization_config"].pop("layers"), "'layers' is missing"),
    "layers is a list": (top(layers=[]), "'layers' is missing"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_description_that_makes_no_sense(folder, kind, case):
    change, message = DESCRIPTIONS[case]
    edit_config(folder / kind, lambda config: change(config, layer_of(kind)))
    with pytest.raises(CheckpointError, match=message):
        read(kind, folder)


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_transformers_own_door_is_as_watchful(folder, case):
    change, _ = DESCRIPTIONS[case]
    edit_config(folder / "llama", lambda config: change(config, LLAMA_LAYER))
    with pytest.raises((ValueError, RuntimeError)):  # CheckpointError, or what transformers says first
        transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")


@pytest.mark.parametrize("factor", ["order", "rest", "left"])
@pytest.mark.parametrize("kind", ["llama", "shards"])
def test_transformers_own_door_misses_no_factor(folder, kind, factor):
    name = f"{LLAMA_LAYER}.{factor}"
    for file in (folder / kind).glob("*.safetensors"):
        state = {key: value.clone() for key, value in load_file(file).items() if key != name}
        save_file(state, file, metadata={"format": "pt"})
    index = folder / kind / "model.safetensors.index.json"
    if index.is_file():
        held = json.loads(index.read_text())
        held["weight_map"].pop(name)
        index.write_text(json.dumps(held))
    with pytest.raises(CheckpointError, match=r"lacks its|was not in the checkpoint"):
        transformers.AutoModelForCausalLM.from_pretrained(folder / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_layer_is_missing_from_the_file(folder, kind):
    def remove(state):
        for name in [name for name in state if name.startswith(f"{layer_of(kind)}.")]:
            del state[name]

    edit_weights(folder / kind, remove)
    with pytest.raises(CheckpointError, match=r"lacks its|was not in the checkpoint"):
        read(kind, folder)
    if kind == "llama":
        with pytest.raises(CheckpointError, match=f"layer '{LLAMA_LAYER}'"):
            transformers.AutoModelForCausalLM.from_pretrained(folder / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_that_the_model_lacks(folder, kind):
    def rename(config):
        layers = config["quantization_config"]["layers"]
        layers[layer_of(kind).replace("0", "7")] = layers.pop(layer_of(kind))

    def rename_factors(state):
        for name in [name for name in state if name.startswith(f"{layer_of(kind)}.")]:
            state[name.replace("0", "7", 1)] = state.pop(name)

    edit_config(folder / kind, rename)
    edit_weights(folder / kind, rename_factors)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        read(kind, folder)


def test_layer_that_is_no_linear_layer(folder):
    def rename(config):
        layers = config["quantization_config"]["layers"]
        layers["blocks.0.norm"] = layers.pop(PLAIN_LAYER)

    def rename_factors(state):
        for name in [name for name in state if name.startswith(f"{PLAIN_LAYER}.")]:
            state[name.replace("up", "norm")] = state.pop(name)

    edit_config(folder / "plain", rename)
    edit_weights(folder / "plain", rename_factors)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        read("plain", folder)


def test_layer_of_other_sizes_than_the_models(folder):
    edit_config(folder / "llama", lambda config: config.update(intermediate_size=40))
    with pytest.raises(CheckpointError, match=r"in LlamaForCausalLM it is .*belongs to another model"):
        read("llama", folder)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_config_over_structured_weights(folder, kind):
    edit_config(folder / kind, lambda config: config.pop("quantization_config"))
    with pytest.raises((CheckpointError, RuntimeError)):
        read(kind, folder)


def test_config_of_another_method(folder):
    edit_config(folder / "plain", lambda config: config["quantization_config"].update(quant_method="gptq"))
    with pytest.raises(CheckpointError, match="no quant_method 'isogrid'"):
        read("plain", folder)


@pytest.mark.parametrize("aliases", ["{", "[]", '{"stem.weight": "nothing.weight"}', '{"stem.weight": 5}', "null"])
def test_hostile_names_of_shared_tensors(folder, aliases):
    """Wherever they are kept, they are checked like everything else."""
    path = folder / "plain" / "model.safetensors"
    state = {name: value.clone() for name, value in load_file(path).items() if name != "stem.weight"}
    save_file(state, path, metadata={"format": "pt", "isogrid_aliases": aliases})
    try:
        value = json.loads(aliases)
    except ValueError:
        value = aliases
    edit_config(folder / "plain", lambda config: config.update(aliases=value))
    with pytest.raises(CheckpointError):
        read("plain", folder)


@pytest.mark.parametrize(
    "architectures", ["LlamaForCausalLM", [5], [["LlamaForCausalLM"]], {"a": 1}, ["AutoTokenizer"]]
)
def test_architectures_that_make_no_sense(folder, architectures):
    edit_config(folder / "llama", lambda config: config.update(architectures=architectures))
    with pytest.raises(CheckpointError):
        read("llama", folder)


# ---- shards and their index ---------------------------------------------------------------------------------------


def edit_index(folder, change):
    path = folder / "shards" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_missing_shard(folder):
    next((folder / "shards").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="lacks the shard model-00002"):
        read("shards", folder)


def test_truncated_shard(folder):
    path = next((folder / "shards").glob("model-00002*"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model-00002.*truncated or corrupt"):
        read("shards", folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": 5}', '{"weight_map": {"a": 5}}']
)
def test_index_that_makes_no_sense(folder, text):
    (folder / "shards" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError):
        read("shards", folder)


def outside_names(folder):
    """Ways to name a file that lies beside the checkpoint."""
    return {"relative": "../outside.safetensors", "absolute": str(folder / "outside.safetensors")}


@pytest.mark.parametrize("how_many", ["one", "all"])
@pytest.mark.parametrize("way", ["relative", "absolute"])
@pytest.mark.parametrize("door", ["isogrid", "transformers"])
def test_index_must_not_point_outside(folder, door, way, how_many):
    if how_many == "one":
        shard = next((folder / "shards").glob("model-00002*"))
        moved = load_file(shard)
    else:
        moved = load_file(folder / "llama" / "model.safetensors")
    save_file({name: value.clone() for name, value in moved.items()}, folder / "outside.safetensors", {"format": "pt"})
    name = outside_names(folder)[way]
    edit_index(folder, lambda index: index["weight_map"].update(dict.fromkeys(moved, name)))
    load = isogrid.load if door == "isogrid" else transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises((CheckpointError, OSError), match="outside"):
        load(folder / "shards")


def test_a_link_to_the_weights_is_followed(folder):
    """Model caches are made of links."""
    path = folder / "llama" / "model.safetensors"
    path.rename(folder / "blob")
    path.symlink_to(folder / "blob")
    assert len(structured_layers(read("llama", folder))) == 14
    assert len(structured_layers(transformers.AutoModelForCausalLM.from_pretrained(folder / "llama"))) == 14


# ---- models that don't fit ----------------------------------------------------------------------------------------


class Wider(models.Blocks):
    def __init__(self):
        super().__init__(width=32)


class Deeper(models.Blocks):
    def __init__(self):
        super().__init__(depth=3)


class OtherHead(models.Blocks):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(24, 6)


class Unbiased(models.Blocks):
    def __init__(self):
        super().__init__()
        self.blocks[0].up = nn.Linear(24, 48, bias=False)


@pytest.mark.parametrize("build", [Wider, Deeper, OtherHead, models.mlp, models.bert])
def test_checkpoint_of_another_model_changes_nothing(folder, build):
    model = build()
    before = models.snapshot(model)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        isogrid.load(folder / "plain", model)
    models.assert_untouched(model, before)


def test_a_layer_that_gained_a_bias_loads(folder):
    """The checkpoint decides whether a structured layer has a bias."""
    model = Unbiased()
    isogrid.load(folder / "plain", model)
    assert model.blocks[0].up.bias is not None


def test_plain_checkpoint_without_a_model(folder):
    with pytest.raises(IsogridError, match="pass a dense instance"):
        isogrid.load(folder / "plain")


def test_transformers_checkpoint_with_a_model(folder):
    model = models.llama()
    before = models.snapshot(model)
    with pytest.raises(IsogridError, match="load it without a model"):
        isogrid.load(folder / "llama", model)
    models.assert_untouched(model, before)


def test_loading_twice_into_one_module(folder):
    model = isogrid.load(folder / "plain", models.blocks())
    again = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1)
    isogrid.load(folder / "plain", model)
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_a_network_built_of_structured_layers_loads_into_its_twin(tmp_path):
    def build():
        return nn.Sequential(StructuredLinear(12, 8, "monarch(rank=1)"), StructuredLinear(8, 4, "low_rank(rank=2)"))

    first, second, x = build(), build(), torch.randn(3, 12)
    isogrid.save(first, tmp_path / "net")
    isogrid.load(tmp_path / "net", second)
    assert torch.equal(first(x), second(x))


def test_merged_models_save_as_dense_ones(tmp_path):
    model = models.llama()
    compress(model, "low_rank", keep=0.5)
    isogrid.merge(model).save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    assert not any(isinstance(layer, StructuredLinear) for layer in again.modules())
    assert not hasattr(again.config, "quantization_config")


class Counting(nn.Module):
    """A layer whose state dict holds one thing more."""

    def __init__(self, state):
        super().__init__()
        self.layer, self.state = nn.Linear(24, 24), state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def test_state_that_is_no_tensor(tmp_path):
    plain, odd = nn.Sequential(nn.Linear(24, 24), Counting({"calls": 3})), Counting([1])
    for model, message in (
        (plain, r"module '1' \(Counting\) .* a dict \(get_extra_state\)"),
        (odd, "the model .* a list"),
    ):
        compress(model, "low_rank", keep=0.5)
        with pytest.raises(IsogridError, match=message + r".*; keep it in a buffer"):
            isogrid.save(model, tmp_path / "m")
        assert not list(tmp_path.iterdir())
    isogrid.save(Counting(torch.tensor([7, 8])), tmp_path / "m")
    assert isogrid.load(tmp_path / "m", Counting(torch.zeros(2, dtype=torch.long))).state.tolist() == [7, 8]
    with pytest.raises(IsogridError, match=r"the model .* a dict"):
        isogrid.load(tmp_path / "m", Counting({}))


# ---- writing ------------------------------------------------------------------------------------------------------


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small():
    model = models.blocks()
    compress(model, "low_rank", keep=0.5)
    return model


def test_saving_onto_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(IsogridError, match="is a file"):
        isogrid.save(small(), tmp_path / "file")
    assert contents(tmp_path) == {"file": b"mine"}


def test_saving_into_a_folder_with_other_files(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("mine")
    with pytest.raises(IsogridError, match="checkpoint"):
        isogrid.save(small(), tmp_path / "thesis")
    assert contents(tmp_path) == {"thesis/chapter1.tex": b"mine"}


@pytest.mark.parametrize("foreign", ["chapter1.tex", "src/main.py", ".git/HEAD", "checkpoint-500/optimizer.bin"])
def test_saving_into_a_project_that_happens_to_have_a_config_json(foreign, tmp_path):
    """config.json is a common name; whatever else stands beside it is not ours to delete."""
    (tmp_path / "project" / foreign).parent.mkdir(parents=True)
    (tmp_path / "project" / "config.json").write_text('{"colour": "green"}')
    (tmp_path / "project" / foreign).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(IsogridError):
        isogrid.save(small(), tmp_path / "project")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("foreign", ["notes.txt", "results.json", "CHANGES.md", "my.safetensors", "a.model"])
def test_files_that_only_end_like_those_of_a_checkpoint_survive(foreign, weights, tmp_path):
    project = tmp_path / "project"
    if weights:
        isogrid.save(small(), project)
    project.mkdir(exist_ok=True)
    (project / "config.json").write_text('{"colour": "green"}')
    (project / "README.md").write_text("mine")
    (project / foreign).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(IsogridError, match=rf"project holds '{foreign}', no part of a checkpoint; give an empty"):
        isogrid.save(small(), project)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("names", "missing"), [(["config.json", "README.md"], "model.safetensors"),
                                                (["model.safetensors", "vocab.txt"], "config.json")])  # fmt: skip
def test_half_of_a_checkpoint_is_none(names, missing, tmp_path):
    (tmp_path / "project").mkdir()
    for name in names:
        (tmp_path / "project" / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(IsogridError, match=rf"project holds .*, but no checkpoint: {missing} is missing; give"):
        isogrid.save(small(), tmp_path / "project")
    assert contents(tmp_path) == before


BESIDE = (
    "compression.json", "pruning.json", "evaluation.json", "README.md", ".gitattributes", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def test_what_belongs_to_a_checkpoint_is_replaced_with_it(tmp_path):
    isogrid.save(small(), tmp_path / "model")
    for name in BESIDE:
        (tmp_path / "model" / name).write_text('{"of": "old"}')
    isogrid.save(small(), tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    model = models.llama()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    isogrid.save(model, tmp_path / "shards")
    assert {path.suffix for path in (tmp_path / "shards").iterdir()} == {".json", ".safetensors"}
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 1


def test_saving_into_an_empty_folder_and_into_a_deep_new_one(tmp_path):
    (tmp_path / "empty").mkdir()
    isogrid.save(small(), tmp_path / "empty")
    isogrid.save(small(), tmp_path / "a" / "b" / "c")
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("spelling", [".", "", "absolute", "parent"])
def test_the_working_directory_is_not_pulled_away(spelling, tmp_path, monkeypatch):
    (tmp_path / "above" / "here").mkdir(parents=True)
    shutil.copytree(isogrid.save(small(), tmp_path / "sound"), tmp_path / "above", dirs_exist_ok=True)
    shutil.copytree(tmp_path / "sound", tmp_path / "above" / "here", dirs_exist_ok=True)
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path / "above" / "here")
    place = {"absolute": Path.cwd(), "parent": Path.cwd().parent}.get(spelling, spelling)
    with pytest.raises(IsogridError):
        isogrid.save(small(), place)
    assert Path.cwd() == tmp_path / "above" / "here"
    assert contents(tmp_path) == before


def test_saving_through_a_link_replaces_what_it_points_to(tmp_path):
    isogrid.save(small(), tmp_path / "run5")
    (tmp_path / "latest").symlink_to(tmp_path / "run5")
    model = models.shake(small(), 5)
    isogrid.save(model, tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "run5"}
    again = isogrid.load(tmp_path / "run5", models.blocks())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


class BreakdownError(RuntimeError):
    pass


@pytest.mark.parametrize("error", [BreakdownError, KeyboardInterrupt])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_failing_save_leaves_the_earlier_checkpoint_and_nothing_else(earlier, error, tmp_path):
    class Tokenizer:
        """Written last: the rest of the folder is complete by then."""

        def save_pretrained(self, folder):
            raise error("disk full")

    if earlier:
        isogrid.save(small(), tmp_path / "model")
    before = contents(tmp_path)
    with pytest.raises(error, match="disk full"):
        isogrid.save(models.shake(small(), 5), tmp_path / "model", tokenizer=Tokenizer())
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if earlier else [])


@pytest.mark.parametrize("failing", [2, 3])
def test_a_failing_exchange_leaves_the_earlier_checkpoint(failing, tmp_path, monkeypatch):
    """Putting the old folder aside, and then the new one into its place."""
    isogrid.save(small(), tmp_path / "model")
    before = contents(tmp_path)
    rename, renames = Path.rename, []

    def fail(self, target):
        renames.append(self)
        if len(renames) == failing:
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space left"):
        isogrid.save(models.shake(small(), 5), tmp_path / "model")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_another_process_exchanging_the_same_folder_is_waited_out(moment, tmp_path, monkeypatch):
    """It has put the old folder aside before we could, or its new one into the place that we had just emptied."""
    place, calls = tmp_path / "model", []
    isogrid.save(small(), place)
    rename = Path.rename

    def interfere(self, target):
        calls.append(self)
        if self == place and len(calls) == 2:
            if moment == "before":
                rename(place, tmp_path / "theirs")
            else:
                rename(place, target)
                place.mkdir()
                (place / "config.json").write_text('{"of": "theirs"}')
                return target
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interfere)
    write_folder(place, lambda to: (to / "config.json").write_text('{"of": "ours"}'))
    assert (place / "config.json").read_text() == '{"of": "ours"}'
    left = {path.name for path in tmp_path.iterdir()}
    assert left == ({"model", "theirs"} if moment == "before" else {"model"})


def test_readers_see_the_old_or_the_new_folder(tmp_path):
    isogrid.save(small(), tmp_path / "model")
    seen = []

    def write(to):
        (to / "config.json").write_text("{}")
        seen.append({path.name for path in (tmp_path / "model").iterdir()})

    write_folder(tmp_path / "model", write)
    assert seen == [{"config.json", "model.safetensors"}]
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json"}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_file_modes_follow_the_umask(mask, tmp_path):
    old = os.umask(mask)
    try:
        model = models.llama()
        compress(model, "low_rank", keep=0.5)
        isogrid.save(model, tmp_path / "model")
        isogrid.save(model, tmp_path / "dense", dense=True)
        isogrid.save(small(), tmp_path / "plain")
    finally:
        os.umask(old)
    for name in ("model", "dense", "plain"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o777 & ~mask
        files = list((tmp_path / name).iterdir())
        assert len(files) >= 2
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}
    assert os.umask(old) == old


def test_leftovers_of_a_killed_process_do_no_harm(tmp_path):
    leftover = tmp_path / ".model.writing-abc"
    leftover.mkdir()
    (leftover / "half.safetensors").write_text("half")
    isogrid.save(small(), tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"model", leftover.name}


@pytest.mark.parametrize("earlier", [True, False])
def test_threads_that_save_to_one_place_at_once(earlier, tmp_path):
    if earlier:
        isogrid.save(small(), tmp_path / "model")
    met = threading.Barrier(4)

    def write(number, to):
        met.wait(20)  # all have begun before one ends
        (to / "config.json").write_text(str(number))
        (to / "model.safetensors").write_text(str(number))

    def rounds(number):
        for _ in range(10):
            write_folder(tmp_path / "model", partial(write, number))

    mask = os.umask(0o022)
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(rounds, number) for number in range(4)]:
                done.result()
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(mask)
    written = contents(tmp_path)
    assert written.keys() == {"model/config.json", "model/model.safetensors"}
    assert len(set(written.values())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(IsogridError, match="a list has no save_pretrained"):
        isogrid.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "x", tokenizer=["a"])
    assert not (tmp_path / "x").exists()
