"""A recipe: how to compress a model, written down with what is said to come of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isogrid.compress.distill import Distillation
from isogrid.compress.plan import Plan
from isogrid.compress.refine import Refinement
from isogrid.errors import IsogridError
from isogrid.report import read_json


@dataclass(frozen=True)
class Effort:
    """How much work a recipe takes beyond fitting.

    Attributes:
        name: in words.
        anchor: see `compress`.
        refine: see `compress`.
        distill: see `compress`.
    """

    name: str
    anchor: float = 0.5
    refine: Refinement | None = None
    distill: Distillation | None = None


EFFORTS = (
    Effort("one shot"),
    Effort("refined", refine=Refinement()),
    Effort("refined and distilled", refine=Refinement(), distill=Distillation()),
)


@dataclass(frozen=True)
class Prediction:
    """What a recipe is said to reach.

    Attributes:
        parameters: of the selected matrices; exact.
        keep: the same as a fraction of the dense ones.
        model_bytes: of the whole model's tensors; exact.
        gap: rise of the loss: nats a token on the calibration's own kind of text for language models; for others the
            divergence from the dense model's predictions, or without logits the outputs' mean squared relative error.
        seconds: of the compression.
    """

    parameters: int
    keep: float
    model_bytes: int
    gap: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dict(vars(self))


@dataclass(frozen=True)
class Recipe:
    """One way to compress a model, ready to be followed.

    Attributes:
        effort: what is done.
        plan: what each layer gets.
        predicted: what comes of it.
        calibration: what it is calibrated on, for the reader and the command: whatever the caller knows.
    """

    effort: Effort
    plan: Plan
    predicted: Prediction
    calibration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """In words."""
        return f"{' or '.join(one.label() for one in self.plan.formats)}, {self.effort.name}"

    def options(self) -> dict[str, Any]:
        """What `compress` is given beside the model, the plan and the calibration data."""
        return {"anchor": self.effort.anchor, "refine": self.effort.refine, "distill": self.effort.distill}

    def told(self, *keys: str) -> list[Any]:
        """What the recipe tells of its calibration.

        Raises:
            IsogridError: it doesn't tell all of these; names the first.
        """
        for key in keys:
            if key not in self.calibration:
                raise IsogridError(
                    f"the recipe's calibration tells no {key!r}; isogrid advise writes it, or follow the recipe from "
                    "Python: compress(model, recipe.plan, calibration=…, **recipe.options())"
                )
        return [self.calibration[key] for key in keys]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, read back by `from_dict`."""
        effort = self.effort
        return {
            "effort": effort.name,
            "anchor": effort.anchor,
            "refine": None if effort.refine is None else dict(vars(effort.refine)),
            "distill": None if effort.distill is None else dict(vars(effort.distill)),
            "calibration": dict(self.calibration),
            "predicted": self.predicted.to_dict(),
            "plan": self.plan.to_dict(),
        }

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """The recipe in a file of `isogrid advise`.

        Raises:
            IsogridError: the file is no recipe.
        """
        try:
            return cls.from_dict(read_json(path))
        except IsogridError as error:
            raise IsogridError(f"recipe {path}: {error}; isogrid advise writes recipes") from None

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Recipe:
        """The recipe of a description.

        Raises:
            IsogridError: not a recipe's description.
        """
        try:
            refine, distill = described["refine"], described["distill"]
            return cls(
                Effort(
                    str(described["effort"]),
                    float(described["anchor"]),
                    None if refine is None else Refinement(**refine),
                    None if distill is None else Distillation(**distill),
                ),
                Plan.from_dict(described["plan"]),
                Prediction(**described["predicted"]),
                dict(described["calibration"]),
            )
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise IsogridError(f"not a recipe that advise has written: {type(error).__name__} {error}") from None
