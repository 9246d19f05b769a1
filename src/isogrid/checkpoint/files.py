"""Save and load models with structured layers: the two files that Hugging Face models have.

Folders are written beside their place and renamed, so a reader never meets half a checkpoint.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isogrid.checkpoint.headers import CONFIG, WEIGHTS, check_headers, read_config, read_headers, weight_files
from isogrid.checkpoint.layers import (
    MARK,
    QUANT_METHOD,
    add_marks,
    attach_layers,
    config_of,
    describe_layers,
    mark_structured,
    parse_config,
)
from isogrid.data.pretrained import quiet_transformers
from isogrid.errors import CheckpointError, IsogridError
from isogrid.linear import StructuredLinear


def save(model: Any, folder: str | Path, *, tokenizer: Any = None, dense: bool = False) -> Path:
    """Write a model to a folder: ``config.json`` and ``model.safetensors``, nothing pickled.

    Args:
        model: a transformers model or any module.
        folder: where to; a checkpoint that lies there is replaced, in one step and only when the new one is complete.
        tokenizer: saved beside the model when given.
        dense: multiply the factors out and write a plain checkpoint that needs no Isogrid (transformers models only).

    Returns:
        The folder.

    Raises:
        IsogridError: the folder holds something that is no checkpoint, or ``dense`` for a plain module.
    """
    folder = Path(folder)
    if dense:
        if not hasattr(model, "save_pretrained"):
            raise IsogridError(
                "a dense export is a transformers checkpoint; for a plain module save layer.merge() parts"
            )
        model = dense_copy(model)
    elif hasattr(model, "save_pretrained"):
        mark_structured(model)

    def write(to: Path) -> None:
        if hasattr(model, "save_pretrained"):
            with quiet_transformers():
                model.save_pretrained(to)
        else:
            state, aliases = _unshared(model.state_dict())
            add_marks(model, state)
            save_file(state, to / WEIGHTS, metadata={"format": "pt", "isogrid_aliases": json.dumps(aliases)})
            config = {"quantization_config": config_of(describe_layers(model))}
            (to / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(to)

    return write_folder(folder, write)


def load(folder: str | Path, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """Read a model that `save` wrote.

    Args:
        folder: the checkpoint.
        model: for a plain module, a dense instance of it: it gets the structured layers and the numbers, in place. A
            transformers checkpoint needs none.
        options: for a transformers checkpoint, passed to ``from_pretrained``.

    Returns:
        The model; a transformers model in eval mode, as ``from_pretrained`` gives it.

    Raises:
        CheckpointError: half-written, truncated, corrupt, or of another model; ``model`` is then unchanged.
    """
    folder = Path(folder)
    config = read_config(folder)
    headers = read_headers(weight_files(folder))
    if config.get("architectures"):
        if model is not None:
            raise IsogridError(f"{folder} is a transformers checkpoint; load it without a model")
        if _is_structured(config):
            layers = parse_config(config["quantization_config"], str(folder))
            check_headers(layers, headers, str(folder), complete=False)
        return _transformers_class(config, folder).from_pretrained(folder, **options)
    if model is None:
        raise IsogridError(f"{folder} holds a plain module; pass a dense instance of it as model=…")
    layers = parse_config(config.get("quantization_config"), str(folder))
    check_headers(layers, headers, str(folder))
    skeleton = _on_meta(model)
    attach_layers(skeleton, layers, str(folder))
    expected = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    state = load_file(folder / WEIGHTS)
    for name, kept in json.loads(_metadata(folder / WEIGHTS).get("isogrid_aliases", "{}")).items():
        state[name] = state[kept]
    state = {name: value for name, value in state.items() if not _is_mark(name, value, layers)}
    _compare(expected, {name: tuple(value.shape) for name, value in state.items()}, str(folder))
    # Checked throughout; from here nothing can fail, and the model changes.
    for name in attach_layers(model, layers, str(folder)).values():
        place = model.get_submodule(name)
        place.to_empty(device=next(iter(state.values())).device)
    model.load_state_dict(state, assign=False)
    return model


def dense_copy(model: Any) -> Any:
    """A dense transformers model that computes the same: structured layers multiplied out, the rest shared.

    Raises:
        IsogridError: not a transformers model.
    """
    if not hasattr(model, "save_pretrained"):
        raise IsogridError(f"{type(model).__name__} is not a transformers model")
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton = type(model)(config)
    state: dict[str, Tensor] = {}
    structured = {name: module for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
    for name, value in model.state_dict().items():
        layer = name.rpartition(".")[0]
        if layer not in structured or name.endswith(".bias"):
            state[name] = value
    for name, module in structured.items():
        place = skeleton.get_submodule(name)
        matrix = module.dense().detach()
        state[f"{name}.weight"] = (matrix if isinstance(place, nn.Linear) else matrix.mT).contiguous().clone()
        if module.bias is not None and place.bias is None:
            raise IsogridError(
                f"layer {name!r} has gained a bias that a dense {type(place).__name__} here does not have"
            )
    missing, unexpected = skeleton.load_state_dict(state, strict=False, assign=True)
    skeleton.tie_weights()
    untied = [key for key in missing if key not in (getattr(skeleton, "all_tied_weights_keys", None) or {})]
    if untied or unexpected:
        raise IsogridError(f"the model differs from its config: missing {untied[:3]}, unexpected {unexpected[:3]}")
    # Buffers that no file holds (rotary frequencies) were built without numbers; the model has them.
    for name, buffer in model.named_buffers():
        owner, _, key = name.rpartition(".")
        place = skeleton.get_submodule(owner)
        if key in place._buffers and place._buffers[key] is not None and place._buffers[key].is_meta:
            place._buffers[key] = buffer
    return skeleton.train(model.training)


def write_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Fill a new folder beside the place and rename it there; an earlier checkpoint gives way only then.

    Raises:
        IsogridError: the place is a file, or a folder that holds something else than a checkpoint.
    """
    if folder.is_file():
        raise IsogridError(f"{folder} is a file; give a folder to write to")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise IsogridError(f"{folder} holds files that are no checkpoint; give an empty or new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.parent / f".{folder.name}.writing-{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        write(fresh)
        for file in fresh.rglob("*"):
            # safetensors writes files that only their owner may read.
            file.chmod(_readable(file.is_dir()))
            if file.is_file():
                _flush(file)
        if folder.is_dir():
            old = folder.parent / f".{folder.name}.replaced-{os.getpid()}"
            folder.rename(old)
            fresh.rename(folder)
            shutil.rmtree(old)
        else:
            fresh.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _readable(is_folder: bool) -> int:
    mask = os.umask(0)
    os.umask(mask)
    return (0o777 if is_folder else 0o666) & ~mask


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unshared(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict with every shared tensor once, contiguous, and the other names of these tensors."""
    kept: dict[Any, str] = {}
    out: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in state.items():
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        if key in kept:
            aliases[name] = kept[key]
        else:
            kept[key] = name
            out[name] = value.detach().contiguous()
    return out, aliases


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


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

    name = config["architectures"][0]
    found = getattr(transformers, name, None)
    if found is not None:
        return found
    # A class registered by another package under its config's type.
    return transformers.AutoModel
