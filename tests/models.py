"""Tiny random models of the architectures people have, each with a matching batch: built in milliseconds."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 48


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shake(model: nn.Module, seed: int) -> nn.Module:
    """Numbers of a trained model's size everywhere: no zero biases, no norms of one, no weights of 0.02."""
    draw = generator(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=draw)
            if value.ndim >= 2:
                value.copy_(noise / value[0].numel() ** 0.5)
            else:
                value.copy_((0.0 if name.endswith("bias") else 1.0) + 0.1 * noise)
    return model


def tokens(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator(seed))


def padding_mask(rows: int, length: int) -> Tensor:
    """Ones, with one more padding token at the end of every further row."""
    return (torch.arange(length) < length - torch.arange(rows).unsqueeze(1)).long()


def token_batch(seed: int = 0, rows: int = 4, length: int = 12) -> dict[str, Tensor]:
    return {"input_ids": tokens(rows, length, seed)}


def padded_batch(seed: int = 0, rows: int = 4, length: int = 12) -> dict[str, Tensor]:
    return {"input_ids": tokens(rows, length, seed), "attention_mask": padding_mask(rows, length)}


def pair_batch(seed: int = 0, rows: int = 4, length: int = 12) -> dict[str, Tensor]:
    """Encoder and decoder inputs of different lengths, both padded."""
    return {
        "input_ids": tokens(rows, length, seed),
        "attention_mask": padding_mask(rows, length),
        "decoder_input_ids": tokens(rows, length - 3, seed + 1),
        "decoder_attention_mask": padding_mask(rows, length - 3),
    }


def image_batch(seed: int = 0, rows: int = 4) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator(seed))}


def feature_batch(seed: int = 0, rows: int = 160, features: int = 24) -> Tensor:
    """Correlated features with a mean, as activations are."""
    draw = generator(seed)
    mixing = torch.randn(features, features, generator=generator(1000)) / features**0.5
    shift = 0.5 * torch.randn(features, generator=generator(1001))
    return torch.randn(rows, features, generator=draw) @ mixing + shift


def llama(*, tied: bool = False, classes: type | None = None, seed: int = 0) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return shake((classes or transformers.LlamaForCausalLM)(config), seed).eval()


def _bert_config() -> Any:
    return transformers.BertConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        num_labels=3,
    )


def bert(seed: int = 0) -> Any:
    return shake(transformers.BertModel(_bert_config()), seed).eval()


def bert_masked(seed: int = 0) -> Any:
    return shake(transformers.BertForMaskedLM(_bert_config()), seed).eval()


def bert_classifier(seed: int = 0) -> Any:
    return shake(transformers.BertForSequenceClassification(_bert_config()), seed).eval()


def bert_scorer(seed: int = 0) -> Any:
    """One logit: as cross-encoders, reward models and regressions have."""
    config = _bert_config()
    config.num_labels = 1
    return shake(transformers.BertForSequenceClassification(config), seed).eval()


def gpt2(seed: int = 0) -> Any:
    config = transformers.GPT2Config(
        n_embd=24,
        n_layer=2,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return shake(transformers.GPT2LMHeadModel(config), seed).eval()


def t5(seed: int = 0) -> Any:
    config = transformers.T5Config(
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return shake(transformers.T5ForConditionalGeneration(config), seed).eval()


def vit(seed: int = 0) -> Any:
    config = transformers.ViTConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=2,
        num_labels=3,
    )
    return shake(transformers.ViTForImageClassification(config), seed).eval()


def dinov2(seed: int = 0) -> Any:
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=8, patch_size=2
    )
    return shake(transformers.Dinov2Model(config), seed).eval()


def mlp(seed: int = 0, *, bias: bool = True) -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(24, 32, bias=bias), nn.Tanh(), nn.Linear(32, 40, bias=bias), nn.Tanh(), nn.Linear(40, 16, bias=bias)
    )
    return shake(model, seed).eval()  # type: ignore[return-value]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Blocks(nn.Module):
    """Residual blocks between a stem and a head."""

    def __init__(self, width: int = 24, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def blocks(seed: int = 0) -> Blocks:
    return shake(Blocks(), seed).eval()  # type: ignore[return-value]


@dataclass(frozen=True)
class Architecture:
    """A model, a batch for it, and the linear layers that compression takes by default."""

    build: Callable[[], Any]
    batch: Callable[..., Any]
    selected: int
    generates: bool = False


TRANSFORMERS: dict[str, Architecture] = {
    "llama": Architecture(llama, token_batch, 14, generates=True),
    "llama_tied": Architecture(lambda: llama(tied=True), token_batch, 14, generates=True),
    "bert": Architecture(bert, padded_batch, 12),
    "bert_masked": Architecture(bert_masked, padded_batch, 12),
    "bert_classifier": Architecture(bert_classifier, padded_batch, 12),
    "gpt2": Architecture(gpt2, token_batch, 8, generates=True),
    "t5": Architecture(t5, pair_batch, 32, generates=True),
    "vit": Architecture(vit, image_batch, 12),
    "dinov2": Architecture(dinov2, image_batch, 12),
}
PLAIN: dict[str, Architecture] = {
    "mlp": Architecture(mlp, feature_batch, 3),
    "blocks": Architecture(blocks, feature_batch, 4),
}
ARCHITECTURES = TRANSFORMERS | PLAIN


@torch.no_grad()
def output(model: Any, batch: Any) -> Tensor:
    """The model's main output on a batch."""
    out = model(batch) if isinstance(batch, Tensor) else model(**batch)
    if isinstance(out, Tensor):
        return out
    return out.logits if "logits" in out else out.last_hidden_state


def exact_output(model: Any, batch: Any) -> Tensor:
    """The output with all numbers copied to fresh memory, to compare models bit by bit.

    Products on the CPU round by where their operands lie in memory, and the tensors of a mapped file lie anywhere.
    """
    twin = copy.deepcopy(model)
    for value in [*twin.parameters(), *twin.buffers()]:
        value.data = value.data.clone(memory_format=torch.contiguous_format)
    return output(twin, batch)


def snapshot(model: nn.Module) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Which modules a model is made of, and a copy of its numbers."""
    return (
        {name: id(module) for name, module in model.named_modules()},
        {name: value.detach().clone() for name, value in model.state_dict().items()},
    )


def assert_untouched(model: nn.Module, before: tuple[dict[str, int], dict[str, Tensor]]) -> None:
    """Same modules, same numbers (NaN equals NaN), nothing left behind on any module."""
    modules, numbers = snapshot(model)
    assert modules == before[0]
    assert numbers.keys() == before[1].keys()
    for name, value in numbers.items():
        torch.testing.assert_close(value, before[1][name], rtol=0, atol=0, equal_nan=True, msg=name)
    for name, module in model.named_modules():
        assert "forward" not in vars(module), name
        assert not module._forward_pre_hooks, name
