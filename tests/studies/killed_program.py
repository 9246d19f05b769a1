"""One fine-tuning run on made-up sentences, for a test that kills it: folder, then method."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from isogrid.data import LabelledTexts
from isogrid.studies.finetuning_run import Plan, train_run

WIDTH, WORDS = 24, 40


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(
            nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)), 0.1, self.training
        )


@dataclass
class Output:
    last_hidden_state: Tensor


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH)
        self.words, self.layers = nn.Embedding(WORDS, WIDTH), nn.ModuleList([Layer(), Layer()])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Output:
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        return Output(x)


def make_encoder() -> Encoder:
    torch.manual_seed(7)
    return Encoder()


def tokenizer(texts: list[str], max_length: int, **_: object) -> dict[str, Tensor]:
    rows = [[int(word) for word in text.split()][:max_length] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def sentences(count: int, seed: int) -> LabelledTexts:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=draw).tolist()
    words = [torch.randint(1, WORDS, (length,), generator=draw) for length in lengths]
    labels = torch.tensor([int(row.float().mean() > WORDS / 2) for row in words])
    return LabelledTexts([" ".join(map(str, row.tolist())) for row in words], labels)


def run(folder: Path, method: str, every: int, drawn: int = 0) -> dict:
    plan = Plan(epochs=4, batch=8, length=10, lr=0.01, refresh=7, checkpoint_every=every)
    train, test = sentences(240, drawn), sentences(40, 1)
    return train_run(method, 4, 3, make_encoder, tokenizer, train, test, plan, folder, {"drawn": drawn})


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), sys.argv[2], 3)
