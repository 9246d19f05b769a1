"""Where data sets are found on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from isogrid.errors import IsogridError

# The folder a data set lives in, and one file that has to be in it for the folder to count.
DATASETS: dict[str, str] = {
    "cifar10": "train.npz",
    "ett": "ETTh1.csv",
    "kodak": "01.png",
    "spoken_digits": "spoken_digits.npz",
    "sst2": "train.tsv",
    "stories260k": "stories260K.bin",
    "stsb": "sts-dev.csv",
    "tiny_shakespeare": "input.txt",
    "uci": "",
    "wikitext2": "evaluation.txt",
}


class DatasetNotFoundError(IsogridError):
    """No folder of that name where data is looked up; the message names every place tried."""


def data_folders(data_dir: Path | str | None = None) -> list[Path]:
    """The folders that may hold data sets, in the order they are tried.

    Args:
        data_dir: the only folder to look into; None looks into ``$ISOGRID_DATA``, then ``data`` and ``../shared/data``
            as seen from the working directory, and from the project where Isogrid runs from its source.
    """
    if data_dir is not None:
        return [Path(data_dir).expanduser()]
    places = []
    if named := os.environ.get("ISOGRID_DATA"):
        places.append(Path(named).expanduser())
    roots = [Path.cwd()]
    source = Path(__file__).resolve().parents[3]  # project/src/isogrid/data/lookup.py
    if (source / "pyproject.toml").is_file():
        roots.append(source)
    for root in roots:
        places += [root / "data", root.parent / "shared" / "data"]
    return list(dict.fromkeys(places))


def find_dataset(name: str, data_dir: Path | str | None = None) -> Path:
    """The folder of one data set.

    Args:
        name: a key of ``DATASETS``, such as ``"wikitext2"``.
        data_dir: see `data_folders`.

    Raises:
        IsogridError: the name is unknown.
        DatasetNotFoundError: no place holds it; the message names each one and the remedy.
    """
    if name not in DATASETS:
        raise IsogridError(f"data set {name!r} is unknown; there are {', '.join(DATASETS)}")
    places = data_folders(data_dir)
    for place in places:
        folder = place / name
        if folder.is_dir() and (folder / DATASETS[name]).exists():
            return folder
    sought = Path(name) / DATASETS[name]
    tried = ", ".join(str(place) for place in places)
    raise DatasetNotFoundError(
        f"data set {name!r}: no {sought} in {tried}; "
        f"name the folder that holds {name}/ with --data DIR (data_dir=) or the variable ISOGRID_DATA"
    )
