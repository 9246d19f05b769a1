"""What pruning did, as numbers that can be checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from isogrid.compress.tuning import Tuned
from isogrid.evaluation import Timing


@dataclass(frozen=True)
class ModuleReport:
    """One attention or feed-forward module.

    Attributes:
        name: in the model.
        unit: what its structures are: head, group or channel.
        kept: how many are left; 0: the module is gone.
        of: how many the dense model has.
        error: relative squared error of its outputs on the calibration data, with the structures and numbers that it
            has got: 0 for all, 1 for none; of what outputs vary by where a bias takes up their mean.
        saved: milliseconds of a pass, by the table.
    """

    name: str
    unit: str
    kept: int
    of: int
    error: float
    saved: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dict(vars(self))


@dataclass
class PruningReport:
    """What `prune` did to a model.

    Attributes:
        speedup: asked for.
        modules: of the model, in its order.
        base_milliseconds: a pass of the dense model, when the table was measured.
        predicted_milliseconds: a pass of the pruned one, by the table.
        milliseconds: of passes in turns, "dense" and "pruned"; None where they weren't measured.
        loss: change of the model's output by the pruning, as the search judges it; None without a search.
        first_loss: the same of the best sizes before any perturbation and before channels are swapped.
        judged: how many sets of sizes the model was asked about.
        distilled: what training reached; None without it.
        parameters: of the whole model now.
        dense_parameters: before.
        bytes: of all tensors now.
        dense_bytes: before.
        calibration: in words.
        seconds: of everything for this speedup.
        warnings: what the user should know; also raised as `IsogridWarning`.
    """

    speedup: float
    modules: list[ModuleReport] = field(default_factory=list)
    base_milliseconds: float = 0.0
    predicted_milliseconds: float = 0.0
    milliseconds: Mapping[str, Timing] | None = None
    loss: float | None = None
    first_loss: float | None = None
    judged: int = 0
    distilled: Tuned | None = None
    parameters: int = 0
    dense_parameters: int = 0
    bytes: int = 0
    dense_bytes: int = 0
    calibration: str = ""
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    @property
    def predicted(self) -> float:
        """The speedup that the table says."""
        return self.base_milliseconds / self.predicted_milliseconds

    @property
    def measured(self) -> float | None:
        """The speedup of whole passes in turns."""
        if self.milliseconds is None:
            return None
        return self.milliseconds["dense"].median / self.milliseconds["pruned"].median

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        described = dict(vars(self)) | {"predicted": self.predicted, "measured": self.measured}
        described["modules"] = [one.to_dict() for one in self.modules]
        described["distilled"] = None if self.distilled is None else dict(vars(self.distilled))
        timings = self.milliseconds
        described["milliseconds"] = None if timings is None else {key: dict(vars(one)) for key, one in timings.items()}
        return described

    def __str__(self) -> str:
        gone = sum(one.kept == 0 for one in self.modules)
        parts = []
        for unit in dict.fromkeys(one.unit for one in self.modules):
            kept = sum(one.kept for one in self.modules if one.unit == unit)
            parts.append(f"{kept} of {sum(one.of for one in self.modules if one.unit == unit)} {unit}s")
        measured = "" if self.measured is None else f", measured {self.measured:.3f}"
        share = self.parameters / self.dense_parameters
        return (
            f"speedup {self.speedup:g} asked for, predicted {self.predicted:.3f}{measured}; {', '.join(parts)} left, "
            f"{gone} of {len(self.modules)} modules gone; {share:.3f} of the parameters"
        )
