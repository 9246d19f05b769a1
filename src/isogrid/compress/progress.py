"""The plan and the finished blocks of a compression, kept on disk: an interrupted one goes on where it stopped.

One safetensors file a block (factors, biases, trained vectors) and one JSON file beside it (formats and reports), both
written whole or not at all. The folder belongs to one compression: its request, its data and the model's weights make a
fingerprint, and blocks of another are not taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from isogrid.compress.layerwise import take_flags
from isogrid.compress.plan import Plan
from isogrid.compress.refine import BlockReport
from isogrid.compress.summary import LayerReport
from isogrid.errors import IsogridError
from isogrid.formats import as_format
from isogrid.linear import StructuredLinear
from isogrid.report import read_json, replace_file, write_json


class Progress:
    """The plan and the finished blocks in a folder.

    Args:
        folder: made with the plan, when missing.
        fingerprint: of the compression (see `fingerprint`).

    Raises:
        IsogridError: the folder holds blocks of another compression.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder = Path(folder)
        self._fingerprint = fingerprint
        self._place = self.folder / "compression.json"
        if self._place.is_file() and read_json(self._place).get("fingerprint") != fingerprint:
            raise IsogridError(
                f"{self.folder} holds finished blocks of another compression (other model, data or options); "
                "give another folder, or delete it"
            )

    def plan(self, make: Callable[[], Plan]) -> Plan:
        """The plan that was kept, or a new one, made and kept: times measured again would lead to another."""
        if self._place.is_file():
            return Plan.from_dict(read_json(self._place)["plan"])
        made = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json({"fingerprint": self._fingerprint, "plan": made.to_dict()}, self._place)
        return made

    def store(self, name: str, block: nn.Module, layers: Sequence[LayerReport], refined: BlockReport | None) -> None:
        """Keep a finished block: the JSON file comes last and says that the other is whole."""
        inside = {layer.name.removeprefix(name).removeprefix("."): layer for layer in layers}
        state = {key: value.detach().contiguous() for key, value in _stored(block, inside)}
        replace_file(self.folder / f"{name}.safetensors", safetensors.torch.save(state))
        write_json(
            {
                "layers": [layer.to_dict() for layer in layers],
                "refined": None if refined is None else refined.to_dict(),
            },
            self.folder / f"{name}.json",
        )

    def holds(self, name: str) -> bool:
        """Whether a block is finished."""
        return (self.folder / f"{name}.json").is_file()

    def restore(self, name: str, block: nn.Module) -> tuple[list[LayerReport], BlockReport | None] | None:
        """Put a finished block's layers and vectors into the block; None where it is not finished.

        Returns:
            The reports of its layers and of its refinement.
        """
        if not self.holds(name):
            return None
        told = read_json(self.folder / f"{name}.json")
        # Copies lie where the allocator aligns them, as fresh factors do: products round by where their numbers lie.
        state = {
            key: value.clone()
            for key, value in safetensors.torch.load_file(self.folder / f"{name}.safetensors").items()
        }
        layers = [_layer_report(entry) for entry in told["layers"]]
        for layer in layers:
            inner = layer.name.removeprefix(name).removeprefix(".")
            prefix = f"{inner}." if inner else ""
            own = {
                key.removeprefix(prefix): value
                for key, value in state.items()
                if key.startswith(prefix) and "." not in key.removeprefix(prefix)
            }
            bias = own.pop("bias", None)
            old = block.get_submodule(inner)
            new = StructuredLinear.from_factors(
                layer.format, own, layer.out_features, layer.in_features, bias=bias
            ).train(old.training)
            take_flags(new, old)
            block.set_submodule(inner, new)
        with torch.no_grad():
            for key, value in block.named_parameters():
                if value.ndim <= 1 and key in state:
                    value.copy_(state[key])
        refined = told["refined"]
        return layers, None if refined is None else BlockReport(**refined)


def fingerprint(model: nn.Module, batches: Sequence[Any], request: Mapping[str, Any]) -> str:
    """What a compression depends on, in one word: the weights, the data, and all that was asked for."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode())
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):  # a module may keep anything there (get_extra_state)
            continue
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        # Not every number: sums tell two trained models apart, in a thousandth of the time.
        digest.update(repr(float(value.double().sum())).encode())
    for batch in batches:
        for value in torch.utils._pytree.tree_leaves(batch):
            digest.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()


def _stored(block: nn.Module, layers: Mapping[str, LayerReport]) -> list[tuple[str, Tensor]]:
    found: dict[str, Tensor] = {}
    for name in layers:
        module = block.get_submodule(name)
        prefix = f"{name}." if name else ""
        found |= {prefix + key: value for key, value in module.state_dict(keep_vars=True).items()}
    found |= {key: value for key, value in block.named_parameters() if value.ndim <= 1}
    return list(found.items())


def _layer_report(entry: Mapping[str, Any]) -> LayerReport:
    known = dict(entry)
    known["format"] = as_format(known["format"])
    known["out_features"], known["in_features"] = known.pop("out"), known.pop("in")
    return LayerReport(**known)


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b""
