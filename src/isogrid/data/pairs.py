"""Sentence pairs with the similarity people gave them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isogrid.data.hub import sts_columns
from isogrid.data.lookup import DatasetNotFoundError, find_dataset
from isogrid.errors import IsogridError


@dataclass(frozen=True)
class SentencePairs:
    """Pairs of sentences and how alike they mean.

    Attributes:
        first: the first sentences.
        second: the second sentences, as many.
        scores: float32 ``(pairs,)``, 0 (unrelated) to 5 (the same).
    """

    first: list[str]
    second: list[str]
    scores: Tensor

    def __post_init__(self) -> None:
        if not len(self.first) == len(self.second) == len(self.scores):
            raise IsogridError(
                f"sentence pairs: {len(self.first)} first sentences, {len(self.second)} second ones, "
                f"{len(self.scores)} scores; there has to be one of each a pair"
            )

    def __len__(self) -> int:
        return len(self.first)

    def every(self, step: int) -> SentencePairs:
        """Every ``step``-th pair, from the first on: a smaller set with the same mix of sources."""
        return SentencePairs(self.first[::step], self.second[::step], self.scores[::step])


def load_sts(split: str = "dev", data_dir: Path | str | None = None) -> SentencePairs:
    """The semantic textual similarity benchmark: 1,500 ``dev`` or 5,749 ``train`` pairs.

    Source: Cer et al. 2017, SemEval-2017 task 1.

    Args:
        split: ``"dev"`` or ``"train"``.
        data_dir: where data sets are looked up; see `data_folders`.

    Raises:
        IsogridError: another split, a data set that can't be found, or a damaged file.
    """
    if split not in ("dev", "train"):
        raise IsogridError(f"STS-B: split {split!r} is unknown; there are dev and train")
    try:
        path = find_dataset("stsb", data_dir) / f"sts-{split}.csv"
    except DatasetNotFoundError as missing:
        try:
            first, second, scores = sts_columns(split)
        except IsogridError as error:
            raise DatasetNotFoundError(f"{missing}. Then {error}") from error
        return SentencePairs(first, second, torch.tensor(scores))
    first, second, scores = [], [], []
    # Split on line feeds alone: some sentences hold signs that `splitlines` takes for line ends. Nothing is quoted.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        columns = line.rstrip("\r").split("\t")
        try:
            scores.append(float(columns[4]))
            first.append(columns[5])
            second.append(columns[6])
        except (IndexError, ValueError) as error:
            raise IsogridError(f"{path}, line {number}: no score and two sentences in columns 5 to 7") from error
    return SentencePairs(first, second, torch.tensor(scores))
