"""Isogrid as a quantization method of transformers, so that ``from_pretrained`` reads structured models.

Registered when transformers' quantizers are first imported, not before: transformers takes seconds to import, and
``import isogrid`` shall not.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from isogrid.checkpoint.headers import TensorHeader, check_headers, check_inside, read_headers
from isogrid.checkpoint.layers import (
    MARK,
    QUANT_METHOD,
    attach_layers,
    mark_structured,
    parse_config,
)
from isogrid.checkpoint.pruned import attach_pruned, check_cut, parse_pruned
from isogrid.errors import CheckpointError
from isogrid.linear import StructuredLinear

HOST = "transformers.quantizers.auto"


def install() -> None:
    """Register the method now if transformers' quantizers are imported, else as soon as they are."""
    if HOST in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the import of transformers' quantizer registry go its way and registers the method after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """None for every module but the registry; for that, its own spec with a loader that registers afterwards."""
        if fullname != HOST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """The inner loader's."""
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register."""
        self.inner.exec_module(module)
        _register()


def _register() -> None:
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if QUANT_METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return

    @register_quantization_config(QUANT_METHOD)
    class IsogridConfig(QuantizationConfigMixin):
        """``quantization_config`` of a structured model; see `isogrid.checkpoint.layers`."""

        def __init__(
            self,
            quant_method: str = QUANT_METHOD,
            format_version: int | None = None,
            default: dict[str, Any] | None = None,
            layers: dict[str, Any] | None = None,
            pruned: dict[str, Any] | None = None,
            **unknown: Any,
        ) -> None:
            if unknown:
                raise CheckpointError(f"quantization_config has unknown entries {sorted(unknown)}; upgrade isogrid")
            self.quant_method = quant_method
            self.format_version = format_version
            self.default = default
            self.layers = layers
            self.pruned = pruned if pruned is not None else {}

    @register_quantizer(QUANT_METHOD)
    class IsogridQuantizer(HfQuantizer):
        """Puts structured layers into the skeleton before weights are read, and checks them after."""

        requires_calibration = True

        def is_serializable(self) -> bool:
            """Structured models are saved like any other."""
            return True

        @property
        def is_trainable(self) -> bool:
            """Factors are ordinary parameters."""
            return True

        @property
        def is_qat_trainable(self) -> bool:
            """Trainer may train the factors without adapters."""
            return True

        @property
        def is_compileable(self) -> bool:
            """Products are plain torch operations."""
            return True

        def _process_model_before_weight_loading(
            self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
        ) -> None:
            source = model.config._name_or_path or "the checkpoint"
            layers = parse_config(self.quantization_config.to_dict(), source)
            pruned = parse_pruned(self.quantization_config.to_dict(), source)
            self.cut_layers, self.pruned = attach_pruned(model, pruned, source)
            headers: dict[str, TensorHeader] = {}
            if checkpoint_files:
                files = [Path(file) for file in checkpoint_files]
                # A name in an index may be absolute, so only the folder that was asked for tells what is inside. A
                # model from the hub has no such folder; its files lie together in the cache.
                asked = Path(model.config._name_or_path or "")
                check_inside(files, asked if model.config._name_or_path and asked.is_dir() else files[0].parent)
                headers = read_headers(files)
                check_headers(layers, headers, source, complete=False)
            resolved = attach_layers(model, layers, source)
            self.cut_layers = [name for name in self.cut_layers if name not in resolved.values()]
            check_cut(model, self.cut_layers, {name: one.shape for name, one in headers.items()}, source)
            ignored = {rf"(^|\.){re.escape(name)}\.{MARK}$" for name in (*resolved, *resolved.values(), *layers)}
            model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            for name, module in model.named_modules():
                if not isinstance(module, StructuredLinear):
                    continue
                # Buffers too: a lost permutation or code would be whatever lay in memory.
                for key, value in (*module.named_parameters(), *module.named_buffers()):
                    if not value.is_meta and not getattr(value, "_is_hf_initialized", False):
                        raise CheckpointError(f"layer {name!r}: factor {key!r} was not in the checkpoint")
            for name in self.cut_layers:
                for key, value in model.get_submodule(name).named_parameters(recurse=False):
                    if not value.is_meta and not getattr(value, "_is_hf_initialized", False):
                        raise CheckpointError(f"layer {name!r}: {key!r} was not in the checkpoint")
            # From here on it is an ordinary model: .float(), Trainer and save_pretrained(state_dict=…) work.
            for attribute in ("hf_quantizer", "quantization_method"):
                if hasattr(model, attribute):
                    delattr(model, attribute)
            model.is_quantized = False
            model.config.quantization_config = self.quantization_config.to_dict()
            mark_structured(model, pruned=self.pruned)
            return model
