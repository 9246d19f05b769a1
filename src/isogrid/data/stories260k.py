"""Stories260K: a trained language model so small that a unit test can run it.

260,032 parameters in Llama's architecture, trained on children's stories by A. Karpathy for llama2.c (MIT).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from isogrid.data.lookup import find_dataset
from isogrid.errors import IsogridError

_BOS = 1
_FIRST_BYTE = 3  # the token of byte b is b + 3
_HEADER = ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocabulary", "context")


class StoriesTokenizer:
    """llama2.c's tokenizer: greedy merges by best score, bytes for what no token covers.

    Called as transformers' tokenizers are, as far as `token_windows` needs it.

    Args:
        tokens: the bytes of each token, by id.
        scores: the merge score of each.
    """

    bos_token_id = _BOS

    def __init__(self, tokens: Sequence[bytes], scores: Sequence[float]) -> None:
        self.tokens = list(tokens)
        self.scores = list(scores)
        # The first 259 ids are the special tokens and the raw bytes, whose names must not match text.
        self._ids = {token: index for index, token in enumerate(self.tokens) if index >= _FIRST_BYTE + 256}
        self._words: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        """``{"input_ids": [...]}``, with the beginning-of-story token first where ``add_special_tokens``."""
        return {"input_ids": self.encode(text, add_special_tokens=add_special_tokens)}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; a space is put before it, as in training."""
        ids = [_BOS] if add_special_tokens else []
        # No token holds a space after another sign, so no merge crosses the beginning of a word.
        for word in re.findall(r" *[^ ]+| +", f" {text}" if text else ""):
            if word not in self._words:
                self._words[word] = self._merge(word)
            ids += self._words[word]
        return ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of ids, without special tokens and the space before the first word."""
        parts = []
        for index in ids.tolist() if isinstance(ids, Tensor) else ids:
            if index >= _FIRST_BYTE + 256:
                parts.append(self.tokens[index])
            elif index >= _FIRST_BYTE:
                parts.append(bytes([index - _FIRST_BYTE]))
        return b"".join(parts).decode("utf-8", errors="replace").removeprefix(" ")

    def _merge(self, word: str) -> list[int]:
        ids: list[int] = []
        for sign in word:
            data = sign.encode("utf-8")
            ids += [self._ids[data]] if data in self._ids else [byte + _FIRST_BYTE for byte in data]
        while True:
            pairs = [
                (self.scores[merged], -place, merged)
                for place in range(len(ids) - 1)
                if (merged := self._ids.get(self.tokens[ids[place]] + self.tokens[ids[place + 1]])) is not None
            ]
            if not pairs:
                return ids
            _, place, merged = max(pairs)  # the best score, and of equal ones the first
            ids[-place : -place + 2] = [merged]


def load_stories260k(data_dir: Path | str | None = None) -> tuple[Any, StoriesTokenizer]:
    """The model as a transformers ``LlamaForCausalLM`` in eval mode, float32, and its tokenizer.

    Args:
        data_dir: where data sets are looked up; see `data_folders`.

    Raises:
        IsogridError: the data set can't be found, or a file is cut short.
    """
    folder = find_dataset("stories260k", data_dir)
    return _model(folder / "stories260K.bin"), _tokenizer(folder / "tok512.bin")


def _model(path: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    data = path.read_bytes()
    if len(data) < 4 * len(_HEADER):
        raise IsogridError(f"{path}: cut short at {len(data)} bytes, in the header")
    size = dict(zip(_HEADER, struct.unpack_from("<7i", data), strict=True))
    hidden, layers, heads = size["hidden"], size["layers"], size["heads"]
    key_width = hidden // heads * size["kv_heads"]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=size["intermediate"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=size["kv_heads"],
        vocab_size=size["vocabulary"],
        max_position_embeddings=size["context"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=_BOS,
        eos_token_id=_BOS,  # a new story begins where one ends
        pad_token_id=None,
    )
    stacks = {  # one array a name, the layers one after another
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_width, hidden),
        "self_attn.v_proj": (key_width, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (size["intermediate"], hidden),
        "mlp.down_proj": (hidden, size["intermediate"]),
        "mlp.up_proj": (size["intermediate"], hidden),
    }
    reader = _Floats(path, data, 4 * len(_HEADER))
    state = {"model.embed_tokens.weight": reader.take(size["vocabulary"], hidden)}
    for name, shape in stacks.items():
        stack = reader.take(layers, *shape)
        for layer in range(layers):
            weight = stack[layer]
            if name.endswith(("q_proj", "k_proj")):
                weight = _half_split(weight, hidden // heads)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    state["model.norm.weight"] = reader.take(hidden)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def _half_split(weight: Tensor, head: int) -> Tensor:
    """Rows for rotary angles that pair row i with i + head/2, from rows that pair 2i with 2i + 1."""
    return weight.view(-1, head // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


class _Floats:
    """Reads little-endian float32 arrays one after another."""

    def __init__(self, path: Path, data: bytes, offset: int) -> None:
        self.path, self.data, self.offset = path, data, offset

    def take(self, *shape: int) -> Tensor:
        count = int(numpy.prod(shape))
        if self.offset + 4 * count > len(self.data):
            raise IsogridError(f"{self.path}: cut short at {len(self.data)} bytes, in an array of {shape}")
        values = numpy.frombuffer(self.data, "<f4", count, self.offset).reshape(shape)
        self.offset += 4 * count
        return torch.tensor(values)


def _tokenizer(path: Path) -> StoriesTokenizer:
    data = path.read_bytes()
    tokens, scores, offset = [], [], 4  # the first number is the longest token's length
    while offset < len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        tokens.append(data[offset + 8 : offset + 8 + length])
        scores.append(score)
        offset += 8 + length
    return StoriesTokenizer(tokens, scores)
