"""Save and load models with structured layers: the two files that Hugging Face models have.

Folders are written beside their place and renamed, so a reader never meets half a checkpoint.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isogrid.checkpoint.dense import dense_copy
from isogrid.checkpoint.headers import CONFIG, INDEX, WEIGHTS, check_headers, read_config, read_headers, weight_files
from isogrid.checkpoint.layers import (
    MARK,
    QUANT_METHOD,
    add_marks,
    attach_layers,
    check_untied,
    config_of,
    describe_layers,
    mark_structured,
    matrix_like,
    parse_config,
    structured_places,
)
from isogrid.checkpoint.pruned import parse_pruned
from isogrid.checkpoint.rewrites import set_memory
from isogrid.data.pretrained import quiet_transformers
from isogrid.errors import CheckpointError, IsogridError
from isogrid.linear import StructuredLinear, check_memory


def save(model: Any, folder: str | Path, *, tokenizer: Any = None, dense: bool = False) -> Path:
    """Write a model to a folder: ``config.json`` and ``model.safetensors``, nothing pickled.

    Args:
        model: a transformers model or any module.
        folder: where to; a checkpoint that lies there is replaced, only when the new one is complete.
        tokenizer: saved beside the model when given.
        dense: multiply the factors out and write a plain checkpoint that needs no Isogrid (transformers models only).

    Returns:
        The folder.

    Raises:
        IsogridError: the folder holds something that is no checkpoint, ``dense`` for a plain module, a plain module
            whose state is more than tensors, a structured layer alone, or one whose weight the config ties to another,
            or a tokenizer that can't be saved.
    """
    folder = Path(folder)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise IsogridError(f"a {type(tokenizer).__name__} has no save_pretrained; save the model without it")
    if dense:
        if not hasattr(model, "save_pretrained"):
            raise IsogridError(
                "a dense export is a transformers checkpoint; for a plain module, isogrid.merge it first"
            )
        model = dense_copy(model)
    elif isinstance(model, StructuredLinear):
        raise IsogridError("a structured layer alone can't be saved; put it into a module: nn.Sequential(layer)")
    elif hasattr(model, "save_pretrained"):
        check_untied(model, structured_places(model))
        mark_structured(model)

    def write(to: Path) -> None:
        if hasattr(model, "save_pretrained"):
            with quiet_transformers():
                model.save_pretrained(to)
        else:
            state, aliases = _unshared(_tensors(model))
            add_marks(model, state)
            save_file(state, to / WEIGHTS, metadata={"format": "pt"})
            config = {"quantization_config": config_of(describe_layers(model)), "aliases": aliases}
            (to / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(to)

    return write_folder(folder, write)


def load(folder: str | Path, model: nn.Module | None = None, *, memory: str | None = None, **options: Any) -> nn.Module:
    """Read a model that `save` wrote.

    Args:
        folder: the checkpoint.
        model: for a plain module, a dense instance of it: it gets the structured layers and the numbers, in place. A
            transformers checkpoint needs none.
        memory: "fast" or "small": what layers may keep beside their factors (`set_memory`); None: as it was saved.
        options: for a transformers checkpoint, passed to ``from_pretrained``.

    Returns:
        The model; a transformers model in eval mode, as ``from_pretrained`` gives it.

    Raises:
        CheckpointError: half-written, truncated, corrupt, or of another model; ``model`` is then unchanged.
        IsogridError: ``model`` has state that is no tensor.
    """
    if memory is not None:
        check_memory(memory)
    loaded = _load(Path(folder), model, options)
    return loaded if memory is None else set_memory(loaded, memory)


def _load(folder: Path, model: nn.Module | None, options: dict[str, Any]) -> nn.Module:
    config = read_config(folder)
    if config.get("model_type") == "isogrid_vit_saliency":
        import isogrid.data.saliency  # noqa: F401  registers the architecture
    files = weight_files(folder)
    headers = read_headers(files)
    if config.get("architectures"):
        if model is not None:
            raise IsogridError(f"{folder} is a transformers checkpoint; load it without a model")
        if _is_structured(config):
            layers = parse_config(config["quantization_config"], str(folder))
            parse_pruned(config["quantization_config"], str(folder))
            check_headers(layers, headers, str(folder), complete=False)
        # Never a question on the terminal whether code of the folder may run.
        options = {"trust_remote_code": False} | options
        return _transformers_class(config, folder).from_pretrained(folder, **options)
    if model is None:
        raise IsogridError(f"{folder} holds a plain module; pass a dense instance of it as model=…")
    layers = parse_config(config.get("quantization_config"), str(folder))
    headers |= {name: headers[kept] for name, kept in _aliases(config, headers, str(folder)).items()}
    check_headers(layers, headers, str(folder))
    skeleton = _on_meta(model)
    places = list(attach_layers(skeleton, layers, str(folder)).values())
    expected = {name: tuple(value.shape) for name, value in _tensors(skeleton).items()}
    state = {name: value for file in files for name, value in load_file(file).items()}
    state |= {name: state[kept] for name, kept in _aliases(config, headers, str(folder)).items()}
    state = {name: value for name, value in state.items() if not _is_mark(name, value, layers)}
    _compare(expected, {name: tuple(value.shape) for name, value in state.items()}, str(folder))
    # Checked throughout; from here nothing can fail, and the model changes.
    dense = {place: model.get_submodule(place) for place in places}
    attach_layers(model, layers, str(folder))
    for place, layer in dense.items():
        model.get_submodule(place).to_empty(device=matrix_like(layer).device).train(layer.training)
    model.load_state_dict(state, assign=False)
    return model


def write_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Fill a new folder beside the place and rename it there; an earlier checkpoint gives way only then.

    Raises:
        IsogridError: see `check_place`.
    """
    check_place(folder)
    asked, folder = folder, folder.resolve()  # a link stays, what it points to is replaced
    folder.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f".{folder.name}.writing-", dir=folder.parent))
    fresh = room / "new"  # of the mode that the umask gives; the room is private
    try:
        fresh.mkdir()
        write(fresh)
        readable = fresh.stat().st_mode & 0o666
        for file in fresh.rglob("*"):
            if file.is_file():
                file.chmod(readable)  # safetensors writes files that only their owner may read
                _flush(file)
        with _exchanging:
            _exchange(fresh, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return asked


# Between its two renames there is no folder in the place; other threads wait.
_exchanging = threading.Lock()


def _exchange(fresh: Path, folder: Path) -> None:
    while not _renamed(fresh, folder):
        # A name of its own: a process killed between the two renames leaves the only copy there.
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.replaced-", dir=folder.parent))
        try:
            folder.rename(aside / "old")
        except FileNotFoundError:  # another process has just put it aside
            aside.rmdir()
            continue
        except BaseException:
            aside.rmdir()
            raise
        try:
            done = _renamed(fresh, folder)
        except BaseException:
            (aside / "old").rename(folder)
            aside.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)
        if done:
            return


def _renamed(fresh: Path, folder: Path) -> bool:
    """Rename a folder; False where there is one already."""
    try:
        fresh.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def check_place(folder: Path) -> None:
    """Raise IsogridError unless a checkpoint may be written to a folder; long work asks before it begins.

    Raises:
        IsogridError: the place is a file, the working directory, a folder that holds something else than a
            checkpoint, or can't be written to.
    """
    folder = folder.resolve()
    if folder.is_file():
        raise IsogridError(f"{folder} is a file; give a folder to write to")
    if folder == Path.cwd() or folder in Path.cwd().parents:
        raise IsogridError(f"{folder} is the working directory, which can't be replaced; give a folder inside it")
    if folder.is_dir():
        with _exchanging:
            foreign = _foreign(folder) if folder.is_dir() else None
        if foreign is not None:
            raise IsogridError(f"{folder} holds {foreign}; give an empty or new folder")
    place = folder.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise IsogridError(f"{place} can't be written to; give another folder")


# What save_pretrained of models, tokenizers and processors writes, with the page of a model on a hub, and what our
# commands write beside it. Known by whole names: projects have JSON and text files, too.
CHECKPOINT_FILES = re.compile(
    r"""
    (config | generation_config | quantize_config | (video_)?preprocessor_config | processor_config)\.json
    | model(-\d+-of-\d+)?\.safetensors | model\.safetensors\.index\.json
    | (tokenizer(\.[\d.]+)? | tokenizer_config | special_tokens_map | added_tokens | chat_template)\.json
    | ([a-z]+_)?vocab(-[a-z]+)?\.(json|txt) | merges\.txt | chat_template\.jinja
    | (tokenizer | spiece | spm | spm_char | sentencepiece(\.bpe)?)\.model
    | README\.md | \.gitattributes
    | (compression | evaluation | pruning)\.json
    """,
    re.VERBOSE,
)


def _foreign(folder: Path) -> str | None:
    """What in a folder is no part of a checkpoint; None where all of it may be replaced."""
    files = sorted(folder.iterdir())
    for file in files:
        if file.is_dir() or not CHECKPOINT_FILES.fullmatch(file.name):
            return f"{file.name!r}, no part of a checkpoint"
    names = [file.name for file in files]
    if not names or (CONFIG in names and (WEIGHTS in names or INDEX in names)):
        return None
    return f"{names[0]!r}, but no checkpoint: {WEIGHTS if CONFIG in names else CONFIG} is missing"


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """A module's state dict, which may hold nothing but tensors."""
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            owner = name.rpartition(".")[0]
            place = f"module {owner!r}" if owner else "the model"
            raise IsogridError(
                f"{place} ({type(model.get_submodule(owner)).__name__}) has state that is no tensor but a "
                f"{type(value).__name__} (get_extra_state), which no safetensors file holds; keep it in a buffer, or "
                "let get_extra_state give a tensor"
            )
    return state


def _unshared(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict with every shared tensor once, contiguous, and the other names of these tensors."""
    kept: dict[Any, str] = {}
    storages: set[int] = set()
    out: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in state.items():
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        if key in kept:
            aliases[name] = kept[key]
        else:
            kept[key] = name
            value = value.detach().contiguous()
            # Parts of one tensor (views, slices) are written each on its own.
            storage = value.untyped_storage().data_ptr()
            out[name] = value.clone() if storage in storages else value
            storages.add(storage)
    return out, aliases


def _aliases(config: dict[str, Any], held: Container[str], source: str) -> dict[str, str]:
    """Further names of tensors that the model holds more than once."""
    aliases = config.get("aliases", {})
    if not isinstance(aliases, dict) or not all(isinstance(kept, str) and kept in held for kept in aliases.values()):
        raise CheckpointError(f"{source}: 'aliases' in config.json does not name tensors of the file")
    return aliases


def _is_mark(name: str, value: Tensor, layers: Any) -> bool:
    layer, _, key = name.rpartition(".")
    return key == MARK and layer in layers and value.numel() == 0


def _compare(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], source: str) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        first = f"{missing[0]!r} is missing" if missing else f"{extra[0]!r} is not in the model"
        raise CheckpointError(f"{source}: {first}; the checkpoint belongs to another model")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{source}: {name!r} has shape {found[name]}, the model's is {shape}; it belongs to another model"
            )


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the module's skeleton without its numbers."""
    memo: dict[int, Any] = {}
    for value in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(value, device="meta")
        memo[id(value)] = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _is_structured(config: dict[str, Any]) -> bool:
    described = config.get("quantization_config")
    return isinstance(described, dict) and described.get("quant_method") == QUANT_METHOD


def _transformers_class(config: dict[str, Any], folder: Path) -> Any:
    import transformers

    names = config["architectures"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise CheckpointError(f"{folder}: 'architectures' in config.json is a list of class names, got {names!r}")
    found = getattr(transformers, names[0], None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    if found is not None:
        raise CheckpointError(f"{folder}: 'architectures' in config.json names {names[0]!r}, which is no model")
    # A class registered by another package under its config's type.
    return transformers.AutoModel
