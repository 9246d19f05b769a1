"""The bases of one parameter: when they are found anew, how they are stored, and what then happens to the moments."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting.ranks import as_rank_rule
from isogrid.kernels.subspaces import Scalar
from isogrid.optim.codes import decode_affine, encode_affine
from isogrid.optim.moments import MOMENTS, State, read, reproject, write
from isogrid.optim.sharding import GradientMatrix, Share
from isogrid.optim.subspaces import drawn_from, find_basis, resolve_side, tracked_basis


@dataclass
class Work:
    """One projected parameter in one step.

    Attributes:
        parameter: the parameter.
        name: for messages.
        index: place among all parameters, from which randomness is seeded.
        group: its options.
        state: its state; the integers in it say where it stands.
        gradient: the gradient as a matrix in the working dtype, the carried error added.
        side: left, right or both.
        bases: for each side of ``side``, ``(d, r)``.
        coordinates: of the gradient.
        squared: squared norm of the coordinates that are here.
        scales: what normalises the channels, None where the residual rule doesn't.
        outer: squared norm of the normalised gradient; on the left of the rows that are here.
        lost: what a change of basis took from the momentum, as lifts to subtract from the error.
    """

    parameter: Tensor
    name: str
    index: int
    group: dict[str, Any]
    state: State
    gradient: GradientMatrix
    side: str
    bases: dict[str, Tensor] = field(default_factory=dict)
    coordinates: Tensor = field(default_factory=lambda: torch.empty(0))
    squared: Scalar = 0.0
    scales: Tensor | None = None
    outer: Scalar = 0.0
    lost: list[tuple[dict[str, Tensor], Tensor]] = field(default_factory=list)

    @property
    def due(self) -> bool:
        """Whether this step finds a new basis."""
        return bool(self.state["step"] >= self.state["next_refresh"])

    @property
    def share(self) -> Share:
        """Of states with a row for each of the parameter's."""
        return Share(self.parameter, self.gradient.rows)

    @property
    def moment_share(self) -> Share | None:
        """Moments of a right basis have the parameter's rows; others are whole on every rank."""
        return self.share if self.side == "right" else None

    def moment(self, key: str) -> Tensor:
        """A moment in the working dtype."""
        return read(self.state, key, self.gradient.values.dtype, self.moment_share)


def fresh_state(rows: int, columns: int, refresh: int) -> State:
    """The integers of a parameter before its first step."""
    return {
        "step": 0,
        "moment_step": 0,
        "refreshes": 0,
        "next_refresh": 0,
        "gap": refresh,
        "skipped": 0,
        "rows": rows,
        "columns": columns,
    }


def sides(side: str) -> tuple[str, ...]:
    """The sides that hold a basis."""
    return ("left", "right") if side == "both" else (side,)


def load_bases(work: Work) -> dict[str, Tensor]:
    """The bases as stored, decoded or drawn again; empty before the first refresh."""
    state, dtype = work.state, work.gradient.values.dtype
    if state["refreshes"] == 0:
        return {}
    if work.group["projector"] == "random":  # never stored: the seed holds it
        return {side: _found(work, side, state["refreshes"] - 1) for side in sides(work.side)}
    bases = {}
    for side in sides(work.side):
        key = f"basis_{side}"
        if work.group["projector_bits"] is None:
            bases[side] = read(state, key, dtype)
            continue
        length = work.gradient.shape[0 if side == "left" else 1]
        shape = (length, state[f"{key}_rank"])
        bits = work.group["projector_bits"]
        bases[side] = decode_affine(state[key], state[f"{key}_scale"], state[f"{key}_zero"], bits, shape, dtype)
    return bases


def refresh(work: Work) -> None:
    """Find new bases from the gradient, carry the moments over, and set the step of the next refresh.

    Raises:
        IsogridError: the first decomposition did not converge; later ones that don't leave the basis as it was.
    """
    state, group = work.state, work.group
    old = load_bases(work)
    if old and group["projector"] in ("svd", "randomized") and float(work.gradient.squared_norm()) == 0:
        new = old  # nothing to learn from a gradient of zeros, nor how many directions it has
    else:
        new = {side: _anew(work, side, old) for side in sides(work.side)}
    state["refreshes"] += 1
    _store(work, new)
    work.bases = load_bases(work) if group["projector_bits"] is not None else new
    if old:
        _carry_moments(work, old)
    _plan(work, old)


def _anew(work: Work, side: str, old: dict[str, Tensor]) -> Tensor:
    if old and work.group["projector"] == "power":
        return _tracked(work, side, old[side])
    try:
        return _found(work, side, work.state["refreshes"])
    except torch.linalg.LinAlgError as error:
        if not old:
            raise IsogridError(
                f"{work.name}: no decomposition of its first gradient converges ({error}); "
                "begin with projector 'random_orthonormal', or leave the parameter to a group with rank=None"
            ) from error
        return old[side]


def _found(work: Work, side: str, number: int) -> Tensor:
    projector = "randomized" if work.group["projector"] == "power" else work.group["projector"]
    draw = number if side == "left" else -1 - number  # two sides never share a draw
    return find_basis(
        work.gradient,
        side,
        as_rank_rule(work.group["rank"]),
        projector=projector,
        oversample=work.group["oversample"],
        power_steps=work.group["power_steps"],
        sketch_factor=work.group["sketch_factor"],
        generator=partial(drawn_from, work.group["seed"], work.index, draw),
    )


def _tracked(work: Work, side: str, old: Tensor) -> Tensor:
    state, tracking = work.state, work.group["tracking"]
    momentum = None
    if tracking > 0 and "exp_avg" in state:
        momentum = work.moment("exp_avg") / (1 - work.group["betas"][0] ** state["moment_step"])
        if side == "right":
            momentum = work.gradient.rows.gather(momentum).mT
    return tracked_basis(work.gradient, side, old, momentum, tracking)


def _store(work: Work, bases: dict[str, Tensor]) -> None:
    if work.group["projector"] == "random":
        return
    bits = work.group["projector_bits"]
    for side, basis in bases.items():
        key = f"basis_{side}"
        if bits is None:
            # A new tensor, never in place: the old basis still carries the moments over.
            work.state[key] = basis.to(torch.bfloat16) if work.group["state"] == "bfloat16" else basis
            continue
        codes = encode_affine(basis, bits)
        work.state[key], work.state[f"{key}_scale"], work.state[f"{key}_zero"] = codes
        work.state[f"{key}_rank"] = basis.shape[1]


def _carry_moments(work: Work, old: dict[str, Tensor]) -> None:
    state, group = work.state, work.group
    if "exp_avg" not in state:
        return
    transition = group["transition"]
    resized = any(old[side].shape != work.bases[side].shape for side in old)
    if transition == "keep" and not resized:
        if group["residual"] == "error_feedback":
            kept = work.moment("exp_avg").clone()
            work.lost = [(old, kept), (work.bases, -kept)]
        return
    first, second = (work.moment(key) for key in MOMENTS)
    work.lost = [(old, first.clone())]  # the stored moments are overwritten in place
    if transition == "reproject":
        turns = {side: work.bases[side].mT @ old[side] for side in old}
        moved = reproject(first, second, state["moment_step"], group["betas"], turns.get("left"), turns.get("right"))
        work.lost.append((work.bases, -moved[0]))
        for key, values in zip(MOMENTS, moved, strict=True):
            write(state, key, values, group["state"], work.moment_share)
        return
    for key in MOMENTS:
        state.pop(key)
        state.pop(f"{key}_scale", None)
    state["moment_step"] = 0


def _plan(work: Work, old: dict[str, Tensor]) -> None:
    """Set the next refresh; an adaptive gap grows while the leading direction stays (Q-GaLore, Zhang et al. 2024)."""
    state, adaptive = work.state, work.group["adaptive"]
    if adaptive is not None and "cosines" not in state:  # from the first basis on: dcp loads into what is there
        state["cosines"] = torch.full((adaptive["queue"],), float("nan"))
    if adaptive is not None and old:
        queue = state["cosines"]
        side = sides(work.side)[0]
        before, after = old[side][:, 0], work.bases[side][:, 0]
        cosine = (before @ after).abs() / (before.norm() * after.norm()).clamp(min=1e-12)
        state["cosines"] = torch.cat([queue[1:], cosine.reshape(1).to(queue)])
        if float(state["cosines"].mean()) >= adaptive["threshold"]:  # not a number until the queue is full
            state["gap"] *= adaptive["factor"]
    state["next_refresh"] = state["step"] + state["gap"]


def side_of(group: dict[str, Any], rows: int, columns: int) -> str:
    """The side that a matrix of this shape is projected on."""
    return resolve_side(group["side"], rows, columns)
