"""What a compression did, as numbers that can be checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from isogrid.compress.refine import BlockReport
from isogrid.compress.tuning import Tuned
from isogrid.evaluation import Timing
from isogrid.formats import Format
from isogrid.linear import StructuredLinear, linear_matrix


@dataclass(frozen=True)
class LayerReport:
    """One rewritten layer.

    Attributes:
        name: its name in the model.
        format: the member of the format it is held in.
        out_features: rows of its matrix.
        in_features: columns of its matrix.
        parameters: trained numbers of the format, without the bias.
        dense_parameters: out · in.
        error: relative output error on the calibration rows, damped as for the fit: of the matrix on the inputs that it
            gets now or, anchored, against the original model's outputs. The relative Frobenius error of a plain fit.
        known_error: the same without the damping of anchored fits, just as it is on the rows that the fit knew.
        held_error: the same on calibration rows that the fit didn't know; far above ``known_error``, the fit follows
            its sample. None where no rows were held out.
        upstream: the part of the error that the layers before have caused and no matrix here can repair; known for
            anchored fits, else 0.
        least_error: no fit of this member can have a smaller error; None where no bound is known.
        iterations: of the solver; 0 for closed forms.
        calibrated: whether the fit knew the layer's inputs.
        rows: calibration rows, or None.
        bias_moved: whether the fit moved the mean error into the bias.
        seconds: time of the fit.
    """

    name: str
    format: Format
    out_features: int
    in_features: int
    parameters: int
    dense_parameters: int
    error: float
    known_error: float
    held_error: float | None
    least_error: float | None
    upstream: float
    iterations: int
    calibrated: bool
    rows: int | None
    bias_moved: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the short names that tables use."""
        return {
            "name": self.name,
            "format": self.format.label(),
            "out": self.out_features,
            "in": self.in_features,
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            "error": self.error,
            "known_error": self.known_error,
            "held_error": self.held_error,
            "least_error": self.least_error,
            "upstream": self.upstream,
            "iterations": self.iterations,
            "calibrated": self.calibrated,
            "rows": self.rows,
            "bias_moved": self.bias_moved,
            "seconds": self.seconds,
        }


@dataclass
class CompressionReport:
    """What `compress` did to a model.

    Attributes:
        formats: the formats asked for; several: the best was chosen for each layer.
        requested_keep: fraction of the selected dense parameters (or bytes) asked for.
        allocation: how the budget was spread over layers.
        predicted_rise: of the model's loss, by sensitivities and squared errors; None where it wasn't measured.
        least_rise: no choice within the budget has a smaller predicted rise; None likewise.
        predicted_milliseconds: of one pass of the whole model; None where the budget was not in time.
        predicted_speedup: over the dense model, timed just before; it holds where the machine changes its pace.
        milliseconds: what it takes, "structured" and "dense" measured in turns; None likewise.
        layers: the rewritten layers, in the order they were fitted.
        blocks: the refined blocks, in order; none without refinement.
        distilled: what training the whole model reached: mean divergence from the original's predictions in nats a
            token (or relative error of outputs) on held-out windows; None without it.
        model_bytes: bytes of all tensors of the whole model now, shared ones once: what its file holds.
        dense_model_bytes: the same before.
        model_parameters: parameters of the whole model now.
        dense_model_parameters: the same before.
        seconds: time of the whole compression.
        calibration: what the fits were calibrated on, in words; None for plain fits.
        warnings: what the user should know; also raised as `IsogridWarning`.
    """

    formats: tuple[Format, ...]
    requested_keep: float
    allocation: str = "uniform"
    predicted_rise: float | None = None
    least_rise: float | None = None
    predicted_milliseconds: float | None = None
    predicted_speedup: float | None = None
    milliseconds: dict[str, Timing] | None = None
    layers: list[LayerReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    distilled: Tuned | None = None
    model_bytes: int = 0
    dense_model_bytes: int = 0
    model_parameters: int = 0
    dense_model_parameters: int = 0
    seconds: float = 0.0
    calibration: str | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The formats asked for, in words."""
        return " or ".join(one.label() for one in self.formats)

    @property
    def parameters(self) -> int:
        """Trained numbers in the selected matrices now."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        """Numbers in the selected matrices before."""
        return sum(layer.dense_parameters for layer in self.layers)

    @property
    def achieved_keep(self) -> float:
        """``parameters / dense_parameters``."""
        return self.parameters / self.dense_parameters

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, all numbers included."""
        return {
            "formats": [one.to_dict() for one in self.formats],
            "label": self.label,
            "requested_keep": self.requested_keep,
            "achieved_keep": self.achieved_keep,
            "allocation": self.allocation,
            "predicted_rise": self.predicted_rise,
            "least_rise": self.least_rise,
            "predicted_milliseconds": self.predicted_milliseconds,
            "predicted_speedup": self.predicted_speedup,
            "milliseconds": None
            if self.milliseconds is None
            else {name: dict(vars(one)) for name, one in self.milliseconds.items()},
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            "model_bytes": self.model_bytes,
            "dense_model_bytes": self.dense_model_bytes,
            "model_parameters": self.model_parameters,
            "dense_model_parameters": self.dense_model_parameters,
            "seconds": self.seconds,
            "calibration": self.calibration,
            "warnings": list(self.warnings),
            "layers": [layer.to_dict() for layer in self.layers],
            "blocks": [block.to_dict() for block in self.blocks],
            "distilled": None if self.distilled is None else dict(vars(self.distilled)),
        }

    def __str__(self) -> str:
        errors = sorted(layer.error for layer in self.layers)
        how = f"calibrated on {self.calibration}" if self.calibration else "plain fits"
        times = ""
        if self.milliseconds is not None and self.predicted_milliseconds is not None:
            now, before = (self.milliseconds[name].median for name in ("structured", "dense"))
            times = f"a pass {before:.4g} -> {now:.4g} ms (predicted {self.predicted_milliseconds:.4g}), "
        return (
            f"{len(self.layers)} layers as {self.label}: kept {self.achieved_keep:.4f} of their parameters "
            f"(asked for {self.requested_keep:g}), whole model {self.dense_model_bytes / 1e6:.1f} -> "
            f"{self.model_bytes / 1e6:.1f} MB, {times}median layer error {errors[len(errors) // 2]:.4f}, {how}, "
            f"{self.seconds:.1f} s"
        )


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that a checkpoint of the model holds; shared tensors count once."""
    seen: dict[int, int] = {}
    for value in model.state_dict(keep_vars=True).values():
        if isinstance(value, Tensor):  # a module may keep anything there (get_extra_state)
            seen[id(value)] = value.nbytes
    return sum(seen.values())


def count_parameters(model: nn.Module) -> int:
    """Trained numbers of the whole model, shared ones once."""
    return sum(value.numel() for value in model.parameters())


def dense_parameters(layers: Mapping[str, nn.Module]) -> int:
    """Numbers in the matrices of linear layers, biases left out: what ``keep`` is a fraction of."""
    return sum(linear_matrix(layer).numel() for layer in layers.values())


def structured_layers(model: nn.Module) -> dict[str, StructuredLinear]:
    """The structured layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
