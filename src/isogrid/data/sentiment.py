"""Sentences with the sentiment people gave them: SST-2, and IMDB from a folder."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isogrid.data.hub import hub_rows
from isogrid.data.lookup import DatasetNotFoundError, find_dataset
from isogrid.errors import IsogridError

SST2_SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and their classes.

    Attributes:
        texts: the texts.
        labels: int64 ``(texts,)``; 1 is positive.
    """

    texts: list[str]
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise IsogridError(f"labelled texts: {len(self.texts)} texts and {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.texts)

    def sample(self, count: int, generator: torch.Generator) -> LabelledTexts:
        """``count`` of them drawn without replacement, all where there are no more."""
        order = torch.randperm(len(self.texts), generator=generator)[:count]
        return LabelledTexts([self.texts[index] for index in order.tolist()], self.labels[order])


def load_sst2(split: str = "train", data_dir: Path | str | None = None) -> LabelledTexts:
    """Movie-review phrases with two sentiments (Socher et al. 2013).

    Args:
        split: ``train`` (60,614), ``dev`` (6,735, of GLUE's training part) or ``test`` (872, GLUE's labelled dev).
        data_dir: where data sets are looked up; see `data_folders`.

    Raises:
        IsogridError: another split, a data set that can't be found, or a damaged file.
    """
    if split not in SST2_SPLITS:
        raise IsogridError(f"SST-2: split {split!r} is unknown; there are {', '.join(SST2_SPLITS)}")
    try:
        path = find_dataset("sst2", data_dir) / f"{split}.tsv"
    except DatasetNotFoundError as missing:
        if split == "dev":
            raise
        try:
            rows = hub_rows("nyu-mll/glue", "sst2", "validation" if split == "test" else "train")
        except IsogridError as error:
            raise DatasetNotFoundError(f"{missing}. Then {error}") from error
        return LabelledTexts(list(rows["sentence"]), torch.tensor(list(rows["label"])))
    return _read_table(path, delimiter="\t", text="sentence", label="label")


def load_imdb(folder: Path | str, split: str = "train") -> LabelledTexts:
    """Whole reviews (Maas et al. 2011) from a folder.

    Args:
        folder: either ``SPLIT.csv`` with columns ``text, label``, or the archive's own ``SPLIT/pos/*.txt`` and
            ``SPLIT/neg/*.txt``.
        split: ``train`` or ``test``.

    Raises:
        IsogridError: the folder holds neither.
    """
    folder = Path(folder).expanduser()
    table = folder / f"{split}.csv"
    if table.is_file():
        return _read_table(table, delimiter=",", text="text", label="label")
    texts, labels = [], []
    for label, name in ((1, "pos"), (0, "neg")):
        for path in sorted((folder / split / name).glob("*.txt")):
            texts.append(path.read_text(encoding="utf-8").replace("<br />", " "))
            labels.append(label)
    if not texts:
        raise IsogridError(f"{folder} holds neither {split}.csv nor {split}/pos and {split}/neg with .txt files")
    return LabelledTexts(texts, torch.tensor(labels))


def _read_table(path: Path, *, delimiter: str, text: str, label: str) -> LabelledTexts:
    texts, labels = [], []
    with path.open(encoding="utf-8", newline="") as stream:
        if delimiter == "\t":  # quotation marks are part of the sentences
            rows = csv.DictReader(stream, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        else:
            rows = csv.DictReader(stream)
        for number, row in enumerate(rows, start=2):
            try:
                labels.append(int(row[label]))
                texts.append(row[text].strip())
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise IsogridError(f"{path}, line {number}: no columns {text} and {label} (0 or 1)") from error
    return LabelledTexts(texts, torch.tensor(labels))
