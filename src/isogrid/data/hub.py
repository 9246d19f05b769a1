"""Data sets through the `datasets` library, for machines that don't have the files."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from isogrid.errors import IsogridError

# The article that opens the calibration half of the raw WikiText-2 test articles; the evaluation half ends before it.
FIRST_CALIBRATION_ARTICLE = "No. 20 Squadron RAAF"


def hub_rows(path: str, name: str, split: str) -> Any:
    """The rows of one split of a data set on the Hugging Face hub.

    Args:
        path: the data set, such as ``"Salesforce/wikitext"``.
        name: its configuration.
        split: ``"train"``, ``"validation"`` or ``"test"``.

    Returns:
        A ``datasets.Dataset``; reading ``rows["column"]`` gives the column.

    Raises:
        IsogridError: `datasets` is missing, or the hub is out of reach and nothing of it was downloaded before.
    """
    try:
        import datasets
    except ImportError as error:
        raise IsogridError(
            f"{path} comes through the library `datasets`, which is missing: pip install datasets"
        ) from error
    online = hub_in_reach()
    try:
        with nullcontext() if online else offline():
            return datasets.load_dataset(path, name, split=split)
    except Exception as error:
        state = "failed" if online else "is not in the local cache and the hub is out of reach"
        raise IsogridError(f"{path} ({name}, {split}) through the library `datasets` {state}: {error}") from error


def hub_in_reach(timeout: float = 3.0) -> bool:
    """Whether the hub answers within ``timeout`` seconds (proxies and ``$HF_ENDPOINT`` are honoured)."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True  # it answers, if only to decline
    except (OSError, ValueError):
        return False


@contextmanager
def offline() -> Iterator[None]:
    """Hugging Face's offline mode: `datasets` takes what it downloaded before, or fails at once.

    Without it each file is asked for again and again for half a minute. The variable HF_HUB_OFFLINE would be the
    ordinary way in, but is read when the libraries are imported.
    """
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def wikitext2_half(half: str) -> str:
    """One half of the raw WikiText-2 test articles, ``"evaluation"`` (the first) or ``"calibration"``.

    Source: Merity et al. 2016, «Pointer Sentinel Mixture Models»; CC BY-SA 3.0.
    """
    text = "\n\n".join(hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", "test")["text"])
    evaluation, title, calibration = text.partition(f"\n = {FIRST_CALIBRATION_ARTICLE} = \n")
    if not title:
        raise IsogridError(
            f"Salesforce/wikitext: no article «{FIRST_CALIBRATION_ARTICLE}», at which the test split is cut in two"
        )
    return evaluation if half == "evaluation" else title + calibration


def sts_columns(split: str) -> tuple[list[str], list[str], list[float]]:
    """First sentences, second sentences and scores of STS-B's ``"train"`` or ``"dev"`` split (Cer et al. 2017)."""
    rows = hub_rows("nyu-mll/glue", "stsb", "validation" if split == "dev" else "train")
    return list(rows["sentence1"]), list(rows["sentence2"]), [float(score) for score in rows["label"]]
