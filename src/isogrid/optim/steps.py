"""One step of a bucket of projected parameters: basis, coordinates, moments, residual, weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isogrid.kernels.subspaces import Scalar, coordinates, lift_, moments_, squared_norm, takes
from isogrid.optim.bases import Work, load_bases, refresh
from isogrid.optim.codes import put_back
from isogrid.optim.moments import MOMENTS, adam_directions, eps_of, read, step_size, write
from isogrid.optim.residuals import TINY, Update, apollo, channel_scales, fira, normalized, squared_norms
from isogrid.optim.sharding import GradientMatrix, local, overall_norm


def step_projected(bucket: Sequence[Work]) -> None:
    """Step parameters whose options agree; one whose gradient is not finite is skipped and counted, else untouched."""
    alive = []
    for work in bucket:
        if not _prepare(work):
            work.state["skipped"] += 1
            continue
        if work.due:
            gradient = work.gradient
            if work.scales is not None:
                work.gradient = GradientMatrix(gradient.values * work.scales, gradient.rows)
            refresh(work)
            work.gradient = gradient
        else:
            work.bases = load_bases(work)
        _project(work)
        alive.append(work)
    # A product with every column of the gradient shows any entry that isn't finite: no pass of its own.
    healthy = _finite(alive)
    for work, fine in zip(alive, healthy, strict=True):
        work.state["skipped"] += not fine
    alive = [work for work, fine in zip(alive, healthy, strict=True) if fine]
    if not alive:
        return
    for work in alive:
        work.state["step"] += 1
        work.state["moment_step"] += 1
    for work, direction in zip(alive, _directions(alive), strict=True):
        update = _update(work, direction)
        _keep_error(work)
        _apply(work, update)


def _prepare(work: Work) -> bool:
    """Look at the whole gradient before it can spoil what is kept over steps; False where it is not finite."""
    residual, gradient = work.group["residual"], work.gradient
    if residual == "normalized":
        dim = 1 if work.side == "left" else 0
        squares, total = squared_norms(gradient, dim)
        if not math.isfinite(float(total)):
            return False
        held = local(work.state["channel_sq"]) if "channel_sq" in work.state else torch.zeros_like(squares)
        if "channel_sq" not in work.state or held.dtype != squares.dtype:
            held = held.to(squares.dtype)
            work.state["channel_sq"] = work.share.wrap(held) if work.side == "left" else held
        beta2, eps = work.group["betas"][1], work.group["eps"]
        work.scales, work.outer = channel_scales(squares, gradient.shape[dim], work.state, beta2, eps)
        return True
    if work.due or residual == "error_feedback":
        if not math.isfinite(float(gradient.rows.sum(overall_norm(gradient.values).square()))):
            return False
        _add_error(work)
    return True


def _project(work: Work) -> None:
    """Coordinates of the gradient, and the sum of their squares."""
    gradient, rows, bases = work.gradient, work.gradient.rows, work.bases
    if work.side == "right":
        found, squared = coordinates(gradient.values, bases["right"], False, work.scales)
    else:
        found, squared = coordinates(gradient.values, rows.part(bases["left"]), True, work.scales)
        if rows.group is not None:
            found = rows.sum(found)
            squared = squared_norm(found)
        if work.side == "both":
            found = found @ bases["right"]
    work.coordinates, work.squared = found, squared


def _finite(works: Sequence[Work]) -> list[bool]:
    """Whether coordinates are finite, on all ranks; one look at a GPU for all."""
    squares = [_over_rows(work, work.squared) for work in works]
    waited = [square for square in squares if isinstance(square, Tensor)]
    known = iter(torch.stack(waited).tolist() if waited else [])
    return [math.isfinite(next(known) if isinstance(square, Tensor) else square) for square in squares]


def _over_rows(work: Work, part: Scalar) -> Scalar:
    """The sum over ranks of a number that each has for its rows, where coordinates are sharded as the rows are."""
    return work.gradient.rows.sum_number(part, work.gradient.values) if work.side == "right" else part


def _lift(work: Work, bases: dict[str, Tensor], coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """The two thin factors whose product is the lift, ``(rows here, r)`` and ``(r, n)``."""
    rows = work.gradient.rows
    if work.side == "left":
        return rows.part(bases["left"]), coordinates
    if work.side == "right":
        return coordinates, bases["right"].mT
    return rows.part(bases["left"]), coordinates @ bases["right"].mT


@dataclass
class Direction:
    """Adam's direction in a subspace.

    Attributes:
        values: the direction, over the bias correction that the step size brings.
        slow: its squared norm; of the part that is here.
        fast: that of the direction without momentum.
    """

    values: Tensor
    slow: Scalar = 0.0
    fast: Scalar = 0.0


def _directions(works: Sequence[Work]) -> list[Direction]:
    group = works[0].group
    if group["core"] == "sgd":
        return [Direction(work.coordinates) for work in works]
    first, second = ([_moment(work, key) for work in works] for key in MOMENTS)
    betas, eps, style = group["betas"], group["eps"], group["style"]
    steps, taken = [work.state["moment_step"] for work in works], [work.coordinates for work in works]
    found = []
    if len(works) > 1 and not takes(*taken):
        for given, values, roots in zip(
            taken, *adam_directions(taken, first, second, steps, betas, eps, style), strict=True
        ):
            bare = given / roots if group["residual"] == "normalized" else values
            found.append(Direction(values, squared_norm(values), squared_norm(bare)))
    else:
        for given, step, mean, square in zip(taken, steps, first, second, strict=True):
            found.append(Direction(*moments_(given, mean, square, betas, eps_of(eps, step, betas, style))))
    for work, *moments in zip(works, first, second, strict=True):
        for key, values in zip(MOMENTS, moments, strict=True):
            write(work.state, key, values, group["state"], work.moment_share)
    return found


def _moment(work: Work, key: str) -> Tensor:
    return work.moment(key) if key in work.state else torch.zeros_like(work.coordinates)


def _update(work: Work, found: Direction) -> Update:
    group, residual, direction = work.group, work.group["residual"], found.values
    if residual == "normalized":
        step, (beta1, beta2) = work.state["moment_step"], group["betas"]
        inner, slow, fast = (_over_rows(work, part) for part in (work.squared, found.slow, found.fast))
        assert work.scales is not None
        outer = work.gradient.rows.sum_number(work.outer, work.scales) if work.side == "left" else work.outer
        return normalized(
            work.scales,
            outer,
            inner,
            (slow**0.5 / (fast**0.5 + TINY)) / (1 - beta1**step),
            work.coordinates,
            direction,
            work.state,
            gain=step_size(1.0, step, (beta1, beta2), group["correct_bias"]),
            scale=group["scale"],
            growth=group["limiter"],
        )
    if residual == "fira":
        return fira(
            work.gradient,
            work.side,
            work.coordinates,
            direction,
            work.state,
            scale=group["scale"],
            growth=group["limiter"],
            residual_of_scaled=group["residual_of_scaled"],
        )
    if residual in ("apollo_channel", "apollo_tensor"):
        return apollo(
            work.gradient,
            work.side,
            work.coordinates,
            direction,
            work.state,
            scale=group["scale"],
            growth=group["limiter"],
            per_channel=residual == "apollo_channel",
            scale_first=group["scale_first"],
        )
    return Update(direction if group["scale"] == 1 else group["scale"] * direction)


def _add_error(work: Work) -> None:
    """Put the error that was carried along into the gradient."""
    if work.group["residual"] == "error_feedback":
        values = work.gradient.values
        held = "error" in work.state
        carried = read(work.state, "error", values.dtype, work.share) if held else torch.zeros_like(values)
        work.gradient = GradientMatrix(carried.view_as(values).add_(values), work.gradient.rows)


def _keep_error(work: Work) -> None:
    """``E <- G - P R + b1 / (1 - b1) (P_old m_old - P m)``, in place (LDAdam, Robert et al. 2025, algorithm 1)."""
    if work.group["residual"] != "error_feedback":
        return
    error = work.gradient.values
    beta1 = work.group["betas"][0]
    error.addmm_(*_lift(work, work.bases, work.coordinates), alpha=-1)
    for bases, momentum in work.lost:
        error.addmm_(*_lift(work, bases, momentum), alpha=beta1 / (1 - beta1))

    write(work.state, "error", error.view(local(work.parameter).shape), work.group["state"], work.share)


def _apply(work: Work, update: Update) -> None:
    group, weight, gradient = work.group, local(work.parameter.detach()), work.gradient.values
    size = group["lr"]
    if group["core"] == "adam":
        size = step_size(size, work.state["moment_step"], group["betas"], group["correct_bias"])
    shrink = 1 - group["lr"] * group["weight_decay"] if group["decoupled"] else 1.0
    before, after = (shrink, 1.0) if group["style"] == "torch" else (1.0, shrink)
    exact = weight.dtype == gradient.dtype and weight.is_contiguous()
    # Elsewhere (half precision, channels_last) the step is made on a copy in the working dtype and rounded once.
    matrix = weight if exact else weight.to(gradient.dtype)
    if matrix.ndim != 2:
        matrix = matrix.reshape(gradient.shape)
    if update.coordinates is None:
        assert update.factor is not None
        if before != 1:
            matrix.mul_(before)
        matrix.addcmul_(gradient, update.factor, value=-size)
        if after != 1:
            matrix.mul_(after)
    else:
        left, right = _lift(work, work.bases, update.coordinates)
        lift_(matrix, left, right, size=size, gradient=gradient, factor=update.factor, before=before, after=after)
    if not exact:
        put_back(weight, matrix.view(weight.shape), group, work.index, work.state["step"])
