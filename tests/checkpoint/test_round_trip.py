import copy
import json
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import isogrid
from isogrid import IsogridError, Permuted, StructuredLinear, Sum, compress
from isogrid.checkpoint import dense_copy
from isogrid.compress import stored_bytes, structured_layers
from isogrid.formats import LowRank, Monarch
from tests import models

FORMATS = {  # one of each kind: plain factors, integer factors, nested
    "llama": "low_rank_light",
    "llama_tied": "monarch(blocks=2)",
    "bert": "low_rank",
    "bert_masked": "monarch(blocks=4)",
    "bert_classifier": "block_tensor_train",
    "gpt2": "low_rank_light",
    "t5": "low_rank",
    "vit": "monarch(blocks=2)",
    "dinov2": "low_rank",
    "mlp": "low_rank_light",
    "blocks": "monarch(blocks=4)",
}
WAYS = {
    "one file": (torch.float32, {}),
    "shards": (torch.float32, {"max_shard_size": "20KB"}),
    "bf16": (torch.bfloat16, {}),
}


def compressed(name, dtype=torch.float32, **options):
    model = models.ARCHITECTURES[name].build().to(dtype)
    report = compress(model, FORMATS[name], keep=0.6, **options)
    return model, report


def weight_bytes(folder):
    """Every safetensors file of a folder, by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def data_bytes(folder):
    """Bytes of tensors in the files, headers left out."""
    return sum(len(data) - 8 - int.from_bytes(data[:8], "little") for data in weight_bytes(folder).values())


def batch_for(name, dtype=torch.float32):
    batch = models.ARCHITECTURES[name].batch(3)
    if isinstance(batch, torch.Tensor):
        return batch.to(dtype)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def assert_same_tensors(one, two):
    ours, theirs = (
        {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        for folder in (one, two)
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name


def assert_same_model(one, two):
    numbers, others = one.state_dict(), two.state_dict()
    assert numbers.keys() == others.keys()
    for name, value in numbers.items():
        assert value.dtype == others[name].dtype, name
        assert torch.equal(value, others[name]), name
    ours, theirs = structured_layers(one), structured_layers(two)
    assert {name: layer.format for name, layer in ours.items()} == {n: layer.format for n, layer in theirs.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", models.TRANSFORMERS)
def test_transformers_models(name, way, tmp_path):
    dtype, options = WAYS[way]
    model, report = compressed(name, dtype)
    batch = batch_for(name, dtype)
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first, **options)

    assert {file.suffix for file in first.iterdir()} <= {".json", ".safetensors"}
    assert (len(weight_bytes(first)) > 1) == (way == "shards")
    assert data_bytes(first) == report.model_bytes

    again = type(model).from_pretrained(first)
    assert_same_model(model, again)
    assert len(structured_layers(again)) == models.TRANSFORMERS[name].selected
    assert not again.training
    assert {value.dtype for value in again.parameters()} == {dtype}
    if dtype == torch.float32:
        assert torch.equal(models.exact_output(again, batch), models.exact_output(model, batch))
    else:  # .to(bfloat16) also rounds buffers that from_pretrained keeps exact: only reloads are comparable
        model = again
        again = type(model).from_pretrained(first)
        assert torch.equal(models.exact_output(again, batch), models.exact_output(model, batch))

    again.save_pretrained(second, **options)
    if way == "shards":  # transformers deals tensors out to shards in another order, dense models' too
        assert_same_tensors(first, second)
    else:
        assert weight_bytes(first) == weight_bytes(second)
    assert json.loads((first / "config.json").read_text()) == json.loads((second / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_save_and_load(name, dtype, tmp_path):
    model, report = compressed(name, dtype)
    folder = isogrid.save(model, tmp_path / "model")
    assert {file.suffix for file in folder.iterdir()} <= {".json", ".safetensors"}
    assert data_bytes(folder) == report.model_bytes == stored_bytes(model)
    plain = name in models.PLAIN
    again = isogrid.load(folder, models.ARCHITECTURES[name].build().to(dtype) if plain else None)
    assert_same_model(model, again)
    if dtype == torch.float32 or plain:
        batch = batch_for(name, dtype)
        assert torch.equal(models.exact_output(again, batch), models.exact_output(model, batch))
    isogrid.save(again, tmp_path / "again")
    assert weight_bytes(folder) == weight_bytes(tmp_path / "again")


def test_load_reads_shards_too(tmp_path):
    model, _ = compressed("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert_same_model(isogrid.load(tmp_path / "model"), model)


def test_load_passes_options_on(tmp_path):
    model, _ = compressed("llama")
    isogrid.save(model, tmp_path / "model")
    again = isogrid.load(tmp_path / "model", dtype=torch.bfloat16)
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}
    assert {layer.order.dtype for layer in structured_layers(again).values()} == {torch.int32}
    for key, value in structured_layers(model)["model.layers.0.mlp.up_proj"].factors.items():
        wanted = value.bfloat16() if value.is_floating_point() else value
        assert torch.equal(again.model.layers[0].mlp.up_proj.factors[key], wanted)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_device_map(device_map, tmp_path):
    model, _ = compressed("gpt2")
    isogrid.save(model, tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map)
    assert_same_model(again, model)


@pytest.mark.parametrize("format", [Sum((LowRank(rank=2), Monarch(blocks=2, rank=1))), Permuted(Monarch(blocks=4))])
def test_nested_formats(format, tmp_path):
    model = models.llama()
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        model.set_submodule(name, StructuredLinear.from_linear(model.get_submodule(name), format))
    isogrid.save(model, tmp_path / "model")
    again = isogrid.load(tmp_path / "model")
    assert_same_model(model, again)
    assert again.model.layers[0].mlp.up_proj.format == format
    batch = models.token_batch(3)
    assert torch.equal(models.exact_output(model, batch), models.exact_output(again, batch))


# ---- the files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "blocks"])
def test_what_the_files_say(name, tmp_path):
    model, _ = compressed(name)
    folder = isogrid.save(model, tmp_path / "model")
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "isogrid"
    assert described["format_version"] == 1
    layers = structured_layers(model)
    assert described["layers"].keys() == layers.keys()
    for layer, entry in described["layers"].items():
        module = layers[layer]
        assert entry == {
            "format": module.format.to_dict(),
            "in": module.in_features,
            "out": module.out_features,
            "bias": module.bias is not None,
        }
    with safe_open(folder / "model.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"
        for layer, module in layers.items():
            assert opened.get_slice(f"{layer}.weight").get_shape() == [0]
            for key, value in module.factors.items():
                assert tuple(opened.get_slice(f"{layer}.{key}").get_shape()) == value.shape


def test_a_tokenizer_is_saved_beside(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    model, _ = compressed("gpt2")
    folder = isogrid.save(model, tmp_path / "model", tokenizer=Tokenizer())
    assert (folder / "tokenizer.json").read_text() == "{}"


def test_a_dense_model_is_saved_without_a_word_of_structure(tmp_path):
    model = models.gpt2()
    folder = isogrid.save(model, tmp_path / "model")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert torch.equal(
        models.exact_output(isogrid.load(folder), models.token_batch()),
        models.exact_output(model, models.token_batch()),
    )


def test_a_model_merged_back_saves_as_a_dense_one(tmp_path):
    model, _ = compressed("llama")
    for name, layer in structured_layers(model).items():
        model.set_submodule(name, layer.merge())
    folder = isogrid.save(model, tmp_path / "model")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert_same_model(transformers.LlamaForCausalLM.from_pretrained(folder), model)


def test_saving_leaves_the_model_as_it_is(tmp_path):
    model, _ = compressed("bert_classifier")
    model.train()
    before = models.snapshot(model)
    isogrid.save(model, tmp_path / "structured")
    isogrid.save(model, tmp_path / "dense", dense=True)
    models.assert_untouched(model, before)
    assert all(module.training for module in model.modules())
    assert model.config.quantization_config["quant_method"] == "isogrid"


# ---- the other classes of transformers ----------------------------------------------------------------------------


def test_body_of_a_language_model(tmp_path):
    model, _ = compressed("llama")
    isogrid.save(model, tmp_path / "model")
    body = transformers.AutoModel.from_pretrained(tmp_path / "model")
    assert type(body).__name__ == "LlamaModel"
    assert len(structured_layers(body)) == 14
    batch = models.token_batch(3)
    assert torch.equal(models.exact_output(body, batch), models.exact_output(model.model, batch))


def test_classifier_from_a_language_model(tmp_path):
    model, _ = compressed("llama")
    isogrid.save(model, tmp_path / "model")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3)
    assert len(structured_layers(classifier)) == 14
    batch = models.token_batch(3)
    assert torch.equal(models.exact_output(classifier.model, batch), models.exact_output(model.model, batch))
    assert torch.isfinite(models.output(classifier, batch)).all()
    # And on: its own checkpoint is whole.
    isogrid.save(classifier, tmp_path / "classifier")
    assert_same_model(isogrid.load(tmp_path / "classifier"), classifier)


def test_language_model_from_a_body(tmp_path):
    body = models.llama(classes=transformers.LlamaModel)
    compress(body, "low_rank", keep=0.6)
    isogrid.save(body, tmp_path / "body")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    assert len(structured_layers(model)) == 14
    batch = models.token_batch(3)
    assert torch.equal(models.exact_output(model.model, batch), models.exact_output(body, batch))


def test_body_saved_out_of_a_whole_model(tmp_path):
    model, _ = compressed("bert_classifier")
    batch = models.padded_batch(3)
    wanted = models.exact_output(model.bert, batch)
    isogrid.save(model.bert, tmp_path / "body")
    assert torch.equal(models.exact_output(isogrid.load(tmp_path / "body"), batch), wanted)
    # The whole model, which shares its config with the body, is saved no worse for that.
    isogrid.save(model, tmp_path / "whole")
    assert_same_model(isogrid.load(tmp_path / "whole"), model)


@pytest.mark.parametrize("name", [name for name, each in models.TRANSFORMERS.items() if each.generates])
def test_generation(name, tmp_path):
    model, _ = compressed(name)
    isogrid.save(model, tmp_path / "model")
    again = isogrid.load(tmp_path / "model")
    prompt = {"input_ids": models.tokens(2, 5, 3), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    texts = [each.generate(**prompt, max_new_tokens=6, do_sample=False) for each in (model, again)]
    assert torch.equal(*texts)
    assert texts[0].shape[1] > 1


# ---- a reloaded model is an ordinary model ------------------------------------------------------------------------


@pytest.fixture
def reloaded(tmp_path):
    model, _ = compressed("llama")
    isogrid.save(model, tmp_path / "model")
    return isogrid.load(tmp_path / "model")


def test_deepcopy_is_a_model_of_its_own(reloaded, tmp_path):
    batch = models.token_batch(3)
    twin = copy.deepcopy(reloaded)
    wanted = models.exact_output(reloaded, batch)
    assert torch.equal(models.exact_output(twin, batch), wanted)
    with torch.no_grad():
        for value in twin.parameters():
            value.zero_()
    assert torch.equal(models.exact_output(reloaded, batch), wanted)
    isogrid.save(copy.deepcopy(reloaded), tmp_path / "twin")
    assert_same_model(isogrid.load(tmp_path / "twin"), reloaded)


def test_to_other_precisions_and_back(reloaded, tmp_path):
    half = copy.deepcopy(reloaded).half()
    assert {value.dtype for value in half.parameters()} == {torch.float16}
    wide = half.float()
    assert {value.dtype for value in wide.parameters()} == {torch.float32}
    assert {layer.order.dtype for layer in structured_layers(wide).values()} == {torch.int32}
    wide.double().save_pretrained(tmp_path / "double")
    again = isogrid.load(tmp_path / "double")
    assert {value.dtype for value in again.parameters()} == {torch.float64}


def test_save_pretrained_with_a_given_state_dict(reloaded, tmp_path):
    state = {name: value * 2 if value.is_floating_point() else value for name, value in reloaded.state_dict().items()}
    reloaded.save_pretrained(tmp_path / "doubled", state_dict=state)
    again = isogrid.load(tmp_path / "doubled")
    assert len(structured_layers(again)) == 14
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_training_step_changes_the_factors_and_saves_again(reloaded, tmp_path):
    before = {name: value.detach().clone() for name, value in reloaded.named_parameters()}
    reloaded.train()
    assert all(value.requires_grad for value in reloaded.parameters())
    optimizer = torch.optim.AdamW(reloaded.parameters(), lr=1e-2)
    batch = models.token_batch(5)
    losses = []
    for _ in range(5):
        loss = reloaded(**batch, labels=batch["input_ids"]).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    for name, layer in structured_layers(reloaded).items():
        for key, value in layer.named_parameters():
            assert not torch.equal(value, before[f"{name}.{key}"]), f"{name}.{key}"
    isogrid.save(reloaded, tmp_path / "trained")
    assert_same_model(isogrid.load(tmp_path / "trained"), reloaded)


def test_state_dict_goes_into_another_instance(reloaded):
    other, _ = compressed("llama")
    with torch.no_grad():
        for value in other.parameters():
            value.normal_()
    other.load_state_dict(reloaded.state_dict())
    assert_same_model(other, reloaded)


# ---- dense export -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.TRANSFORMERS)
def test_dense_export(name, tmp_path):
    model, _ = compressed(name, calibration=[models.TRANSFORMERS[name].batch(seed) for seed in range(4)])
    folder = isogrid.save(model, tmp_path / "dense", dense=True)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == [type(model).__name__]
    plain = type(model).from_pretrained(folder)
    assert not structured_layers(plain)
    batch = batch_for(name)
    torch.testing.assert_close(models.output(plain, batch), models.output(model, batch), rtol=0, atol=1e-5)
    for layer, module in structured_layers(model).items():
        weight = plain.get_submodule(layer).weight
        matrix = weight if isinstance(plain.get_submodule(layer), nn.Linear) else weight.mT
        assert torch.equal(matrix, module.dense())
    assert structured_layers(model)  # the model itself stays structured
    same_shapes = {key: value.shape for key, value in models.TRANSFORMERS[name].build().state_dict().items()}
    assert {key: value.shape for key, value in plain.state_dict().items()} == same_shapes


def test_dense_export_of_a_reloaded_model_in_16_bits(tmp_path):
    model, _ = compressed("gpt2", torch.bfloat16)
    isogrid.save(model, tmp_path / "structured")
    folder = isogrid.save(isogrid.load(tmp_path / "structured"), tmp_path / "dense", dense=True)
    plain = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert {value.dtype for value in plain.parameters()} == {torch.bfloat16}
    for name, layer in structured_layers(model).items():
        assert torch.equal(plain.get_submodule(name).weight.mT, layer.dense())


def test_dense_copy_keeps_the_generation_settings():
    model, _ = compressed("llama")
    model.generation_config.max_new_tokens = 7
    assert dense_copy(model).generation_config.max_new_tokens == 7


def test_dense_copy_runs_as_it_is():
    model, _ = compressed("llama_tied")
    batch = models.token_batch(3)
    dense = dense_copy(model)
    torch.testing.assert_close(models.output(dense, batch), models.output(model, batch), rtol=0, atol=1e-5)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight


def test_dense_export_of_a_plain_module_is_refused(tmp_path):
    model, _ = compressed("mlp")
    with pytest.raises(IsogridError, match="merge"):
        isogrid.save(model, tmp_path / "dense", dense=True)
    assert not list(tmp_path.iterdir())


# ---- plain modules ------------------------------------------------------------------------------------------------


def test_plain_module_is_filled_in_place(tmp_path):
    model, _ = compressed("blocks")
    model.calls.fill_(5)
    isogrid.save(model, tmp_path / "model")
    other = models.blocks(seed=9)
    again = isogrid.load(tmp_path / "model", other)
    assert again is other
    assert int(again.calls) == 5
    assert_same_model(again, model)


@pytest.mark.parametrize("training", [True, False])
def test_plain_module_keeps_its_mode(training, tmp_path):
    model, _ = compressed("blocks")
    isogrid.save(model, tmp_path / "model")
    again = isogrid.load(tmp_path / "model", models.blocks().train(training))
    assert {module.training for module in again.modules()} == {training}


def test_plain_module_of_another_dtype_keeps_its_own(tmp_path):
    model, _ = compressed("blocks", torch.bfloat16)
    isogrid.save(model, tmp_path / "model")
    again = isogrid.load(tmp_path / "model", models.blocks())
    assert {value.dtype for value in again.parameters()} == {torch.float32}
    assert all(torch.equal(value, model.state_dict()[name].float()) for name, value in again.named_parameters())


class Tied(nn.Module):
    """An embedding tied to the head, one buffer under two names, and a layer between."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 24)
        self.layer = nn.Linear(24, 24)
        self.head = nn.Linear(24, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((24,), 0.5))
        self.layer.register_buffer("scale", self.scale)

    def forward(self, ids):
        return self.head(torch.tanh(self.layer(self.embedding(ids) * self.scale)))


def test_plain_module_with_tied_parameters(tmp_path):
    model = models.shake(Tied(), 0)
    report = compress(model, "low_rank", keep=0.5)
    ids = models.tokens(3, 5, 0) % 20
    wanted = models.exact_output(model, ids)
    folder = isogrid.save(model, tmp_path / "model")
    with safe_open(folder / "model.safetensors", "pt") as opened:
        assert len({"embedding.weight", "head.weight"} & set(opened.keys())) == 1
    assert data_bytes(folder) == report.model_bytes
    again = isogrid.load(folder, models.shake(Tied(), 5))
    assert torch.equal(models.exact_output(again, ids), wanted)
    assert again.head.weight is again.embedding.weight


def test_plain_module_with_views_of_one_tensor(tmp_path):
    class Views(nn.Module):
        """Two buffers that are parts of one tensor."""

        def __init__(self, value=1.0):
            super().__init__()
            table = torch.full((6, 4), value)
            self.register_buffer("first", table[:2])
            self.register_buffer("second", table[1:])
            self.layer = nn.Linear(24, 24)

    model = Views(3.0)
    compress(model, "low_rank")
    isogrid.save(model, tmp_path / "model")
    again = isogrid.load(tmp_path / "model", Views(0.0))
    assert torch.equal(again.first, model.first)
    assert torch.equal(again.second, model.second)


def test_plain_module_with_non_contiguous_parameters(tmp_path):
    model = models.blocks()
    transposed = torch.randn(24, 24).t()
    model.stem.weight = nn.Parameter(transposed)
    model.head.weight = nn.Parameter(torch.randn(5, 48)[:, ::2])
    assert not model.stem.weight.is_contiguous()
    compress(model, "low_rank", keep=0.5)
    isogrid.save(model, tmp_path / "model")
    again = isogrid.load(tmp_path / "model", models.blocks())
    assert torch.equal(
        models.exact_output(again, models.feature_batch()), models.exact_output(model, models.feature_batch())
    )


def test_plain_module_compressed_into_mixed_formats(tmp_path):
    model = models.blocks()
    compress(model, "low_rank", keep=0.5, select="up")
    compress(model, "monarch(blocks=2)", keep=0.5, select="down")
    compress(model, "low_rank_light", keep=0.8, select=["stem", "head"])
    isogrid.save(model, tmp_path / "model")
    assert_same_model(isogrid.load(tmp_path / "model", models.blocks()), model)


def test_overwriting_an_earlier_checkpoint(tmp_path):
    first, _ = compressed("llama")
    second, _ = compressed("bert")
    first.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    isogrid.save(second, tmp_path / "model")
    assert len(weight_bytes(tmp_path / "model")) == 1
    assert_same_model(isogrid.load(tmp_path / "model"), second)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_over_the_folder_a_model_was_loaded_from(reloaded, tmp_path):
    folder = tmp_path / "model"
    wanted = models.exact_output(reloaded, models.token_batch())
    isogrid.save(reloaded, folder)
    assert torch.equal(models.exact_output(reloaded, models.token_batch()), wanted)
    assert torch.equal(models.exact_output(isogrid.load(folder), models.token_batch()), wanted)


# ---- other interpreters -------------------------------------------------------------------------------------------


def python(code, *arguments):
    """Run code in a fresh interpreter, away from the repository."""
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch; torch.set_num_threads(1)\n" + textwrap.dedent(code),
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=120,
    )


READ = """
    import sys
    batch = torch.load(sys.argv[2], weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    for value in model.parameters():
        value.data = value.data.clone()
    with torch.no_grad():
        torch.save(model(**batch).logits, sys.argv[3])
"""
IMPORTS = {
    "isogrid first": "import isogrid\nfrom transformers import AutoModelForCausalLM",
    "isogrid last": "from transformers import AutoModelForCausalLM\nimport isogrid",
    "isogrid after a model was loaded": (
        "from transformers import AutoModelForCausalLM\nimport sys\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[4])\nimport isogrid"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("imports", IMPORTS)
def test_a_fresh_interpreter_reads_it_bit_by_bit(imports, tmp_path):
    model, _ = compressed("gpt2")
    batch = models.token_batch(3)
    isogrid.save(model, tmp_path / "model")
    isogrid.save(models.llama(), tmp_path / "other")
    torch.save(batch, tmp_path / "batch")
    code = IMPORTS[imports] + textwrap.dedent(READ)
    done = python(code, tmp_path / "model", tmp_path / "batch", tmp_path / "logits", tmp_path / "other")
    assert done.returncode == 0, done.stderr
    logits = torch.load(tmp_path / "logits", weights_only=True)
    assert torch.equal(logits, models.exact_output(model, batch))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("llama", "model.layers.{0, 1}.mlp.up_proj.weight"),
        ("gpt2", "transformer.h.{0, 1}.mlp.c_fc.weight"),
        ("bert", "encoder.layer.{0, 1}.attention.self.query.weight"),
    ],
)
def test_a_reader_without_isogrid_stops_instead_of_guessing(name, layer, tmp_path):
    model, _ = compressed(name)
    isogrid.save(model, tmp_path / "model")
    code = """
        import sys
        import transformers
        try:
            getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])
        finally:
            print("isogrid imported:", "isogrid" in sys.modules)
    """
    done = python(code, tmp_path / "model", type(model).__name__)
    assert "isogrid imported: False" in done.stdout
    assert done.returncode != 0
    assert "RuntimeError" in done.stderr
    assert layer in done.stderr
    assert "MISMATCH" in done.stderr
    assert "torch.Size([0])" in done.stderr


@pytest.mark.slow
def test_importing_isogrid_imports_no_transformers_and_saves_seconds():
    done = python("import isogrid, sys; print('transformers' in sys.modules, 'accelerate' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_index_names_every_tensor_of_the_shards(tmp_path):
    model, _ = compressed("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in (tmp_path / "model").glob("*.safetensors") for name in load_file(file)}
    assert held == index["weight_map"]
    assert "model.layers.0.mlp.up_proj.weight" in held
