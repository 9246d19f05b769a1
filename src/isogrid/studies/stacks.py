"""Methods that are compared: one format, pruning to a speedup, or a stack of such steps from a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isogrid.compress import as_candidates
from isogrid.compress.structured_pruning import How
from isogrid.compress.structured_pruning.pruner import require_choice
from isogrid.errors import IsogridError
from isogrid.formats import Format, as_format
from isogrid.report import read_json

FORMAT_KEYS = ("format", "keep", "bytes", "anchor", "allocate", "solver", "refine", "distill", "select", "skip")
SPEEDUP_KEYS = ("speedup", "allocate", "trials", "train", "select", "criterion", "bias")


@dataclass(frozen=True)
class Step:
    """One step of a method: a format for the matrices as they then are, or structured pruning.

    Attributes:
        format: spelled, several joined by "|", or "auto". A size in it ("low_rank(rank=64)") is taken as it is; one
            left open is chosen by the budget. Empty: the step prunes.
        keep: fraction of the parameters that the matrices of this step had before the first one; None: of what the
            comparison asks for. A matrix belongs to the first step that selects it.
        bytes: instead, a fraction of their bytes.
        speedup: what the step prunes to, of a pass of the model as it was before this step.
        options: of `compress`, or of `prune` and `How`.
    """

    format: str = ""
    keep: float | None = None
    bytes: float | None = None
    speedup: float | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def patterns(self) -> dict[str, Any]:
        """Which layers a format is for: arguments of `select_layers`."""
        return {key: value for key, value in self.options if key in ("select", "skip")}

    @property
    def fixed(self) -> bool:
        """Whether a format's size is given in its spelling, or it has none to choose."""
        formats = as_formats(self.format)
        return not isinstance(formats, str) and len(formats) == 1 and _fixed(self.format, formats[0])


@dataclass(frozen=True)
class Method:
    """Steps under one name."""

    label: str
    steps: tuple[Step, ...]


def as_method(spelled: str) -> Method:
    """A method from a format's spelling, or from a JSON file: ``{"label": …, "steps": [{"format": …, "keep": …}, …]}``.

    A step of a file may prune instead, ``{"speedup": 1.25}``: before steps that write the same matrices in formats.

    Raises:
        IsogridError: neither, or a value that is none of its kind; names what is amiss.
    """
    if not spelled.endswith(".json"):
        return Method(spelled, (_checked(Step(spelled)),))
    described = read_json(Path(spelled))
    steps = described.get("steps")
    if not isinstance(steps, list) or not steps:
        raise IsogridError(f'{spelled}: a stack has "steps", a list of formats with their budgets, or of speedups')
    found = []
    for number, step in enumerate(steps):
        if not isinstance(step, Mapping) or not any(
            keys[0] in step and {*step} <= {*keys} for keys in (FORMAT_KEYS, SPEEDUP_KEYS)
        ):
            raise IsogridError(
                f"{spelled}: step {number} is {step!r}; it has format, and maybe {', '.join(FORMAT_KEYS[1:])}; or "
                f"speedup, and maybe {', '.join(SPEEDUP_KEYS[1:])}"
            )
        own = {key: step[key] for key in ("format", "keep", "bytes", "speedup") if key in step}
        try:
            for key, value in step.items():
                _check_kind(key, value)
            options = {key: value for key, value in step.items() if key not in own}
            found.append(_checked(Step(**own, options=tuple(options.items()))))
        except IsogridError as error:
            raise IsogridError(f"{spelled}: step {number}: {error}") from error
    return Method(str(described.get("label", Path(spelled).stem)), tuple(found))


def pruned_to(speedup: float) -> Method:
    """Structured pruning alone, in one shot."""
    return Method(f"Pruned to {speedup:g}×", (Step(speedup=speedup),))


def as_formats(spelled: str) -> list[Format] | str:
    """The formats of a step, or "auto"."""
    return spelled if spelled == "auto" else [as_format(one.strip()) for one in spelled.split("|")]


def _check_kind(key: str, value: Any) -> None:
    """Raise IsogridError for a value that a file can't mean."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in ("keep", "bytes"):
        good, kind = number and 0 < value < 1, "a fraction in (0, 1)"
    elif key == "anchor":
        good, kind = number and 0 <= value <= 1, "a number between 0 and 1"
    elif key in ("refine", "distill", "train"):
        good, kind = number and value > 0, "a positive number of minutes"
    elif key == "trials":
        good, kind = isinstance(value, int) and number, "a whole number"
    elif key == "speedup":
        good, kind = number and value > 1, "a number above 1"
    elif key == "bias":
        good, kind = isinstance(value, bool), "true or false"
    elif key in ("select", "skip"):
        listed = value if isinstance(value, list) else [value]
        good, kind = bool(listed) and all(isinstance(one, str) for one in listed), "a pattern of names, or a list"
    else:
        good, kind = isinstance(value, str), "a word"
    if not good:
        raise IsogridError(f"{key} is {kind}, got {value!r}")


def _checked(step: Step) -> Step:
    """The step, if its parts go together."""
    options = dict(step.options)
    if step.speedup is not None:
        require_choice(step.speedup, options.get("allocate", "search"), options.get("trials", 0))
        How(**{key: options[key] for key in ("criterion", "bias") if key in options})
        return step
    formats = as_formats(step.format)
    given = {"keep": step.keep, "bytes": step.bytes, "allocate": options.get("allocate")}
    given = {key: value for key, value in given.items() if value is not None}
    if {"keep", "bytes"} <= {*given}:
        raise IsogridError(f"a budget is keep={step.keep:g} or bytes={step.bytes:g}, not both")
    if not step.fixed:
        as_candidates(formats)  # what is neither open nor given as a whole
    elif given:
        raise IsogridError(
            f"{step.format} has its size already; leave {', '.join(f'{key}={value}' for key, value in given.items())} "
            "out"
        )
    return step


def _fixed(spelled: str, fmt: Format) -> bool:
    inner = getattr(fmt, "inner", None)
    if isinstance(inner, Format):  # what wraps a format has its size
        return _fixed(spelled, inner)
    chosen = fmt.size_field or fmt.open_field
    if chosen is None:
        return type(fmt).sized is Format.sized
    return re.search(rf"\b{chosen}\s*=", spelled) is not None
