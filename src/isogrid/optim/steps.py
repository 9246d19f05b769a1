"""One step of a bucket of projected parameters: basis, coordinates, moments, residual, weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from isogrid.optim.bases import MOMENTS, Work, load_bases, refresh
from isogrid.optim.codes import round_stochastically
from isogrid.optim.moments import adam_directions, read, step_size, write
from isogrid.optim.residuals import TINY, Update, apollo, channel_scales, fira, normalized, squared_norms
from isogrid.optim.sharding import GradientMatrix, like_parameter, local, overall_norm
from isogrid.optim.subspaces import drawn_from, project


def step_projected(bucket: Sequence[Work]) -> None:
    """Step parameters whose options agree; one whose gradient is not finite is skipped and counted, else untouched."""
    alive = []
    for work in bucket:
        if not _prepare(work):
            work.state["skipped"] += 1
            continue
        if work.due:
            gradient = work.gradient
            if work.squares is not None:
                work.gradient = GradientMatrix(gradient.values * work.scales, gradient.rows)
            refresh(work)
            work.gradient = gradient
        else:
            work.bases = load_bases(work)
        work.coordinates = _project(work)
        alive.append(work)
    # A product with every column of the gradient shows any entry that isn't finite: no pass of its own.
    if alive:
        for work in alive:
            work.norm = overall_norm(work.coordinates)
        # Summed into a copy: a norm over the rows that are here is needed again.
        norms = [work.gradient.rows.sum(work.norm.clone()) for work in alive]
        healthy = [
            math.isfinite(norm) for norm in (torch.stack(norms).tolist() if len(norms) > 1 else [float(norms[0])])
        ]
        for work, fine in zip(alive, healthy, strict=True):
            work.state["skipped"] += not fine
        alive = [work for work, fine in zip(alive, healthy, strict=True) if fine]
    if not alive:
        return
    for work in alive:
        work.state["step"] += 1
        work.state["moment_step"] += 1
    for work, (direction, roots) in zip(alive, _directions(alive), strict=True):
        update = _update(work, direction, roots)
        _keep_error(work)
        _apply(work, update)


def _prepare(work: Work) -> bool:
    """Look at the whole gradient before it can spoil what is kept over steps; False where it is not finite."""
    residual, gradient = work.group["residual"], work.gradient
    if residual == "normalized":
        dim = 1 if work.side == "left" else 0
        work.squares = squared_norms(gradient, dim)
        total = work.squares.sum()
        if not math.isfinite(float(gradient.rows.sum(total) if work.side == "left" else total)):
            return False
        if "channel_sq" not in work.state:
            zeros = torch.zeros_like(work.squares)
            work.state["channel_sq"] = work.wrap_rows(zeros) if work.side == "left" else zeros
        beta2, eps = work.group["betas"][1], work.group["eps"]
        work.scales = channel_scales(work.squares, gradient.shape[dim], work.state, beta2, eps)
        return True
    if work.due or residual == "error_feedback":
        if not math.isfinite(float(gradient.rows.sum(overall_norm(gradient.values).square()))):
            return False
        _add_error(work)
    return True


def _project(work: Work) -> Tensor:
    gradient, rows, bases = work.gradient, work.gradient.rows, work.bases
    if work.side == "both":
        return project(gradient, bases["left"], "left") @ bases["right"]
    if work.squares is None:
        return project(gradient, bases[work.side], work.side)
    # The scales go into the thin basis, not into the gradient.
    if work.side == "left":
        return rows.sum((rows.part(bases["left"]) * work.scales).mT @ gradient.values)
    return gradient.values @ (bases["right"] * work.scales.mT)


def _lift(work: Work, bases: dict[str, Tensor], coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """The two thin factors whose product is the lift, ``(rows here, r)`` and ``(r, n)``."""
    rows = work.gradient.rows
    if work.side == "left":
        return rows.part(bases["left"]), coordinates
    if work.side == "right":
        return coordinates, bases["right"].mT
    return rows.part(bases["left"]), coordinates @ bases["right"].mT


def _directions(works: Sequence[Work]) -> list[tuple[Tensor, Tensor]]:
    """Adam's direction in each subspace, and its denominators."""
    group = works[0].group
    if group["core"] == "sgd":
        return [(work.coordinates, work.coordinates) for work in works]
    moments: list[list[Tensor]] = []
    for key in MOMENTS:
        held = []
        for work in works:
            found = key in work.state
            held.append(read(work.state, key, work.coordinates.dtype) if found else torch.zeros_like(work.coordinates))
        moments.append(held)
    steps = [work.state["moment_step"] for work in works]
    found_directions, roots = adam_directions(
        [work.coordinates for work in works],
        moments[0],
        moments[1],
        steps,
        group["betas"],
        group["eps"],
        group["style"],
    )
    for key, held in zip(MOMENTS, moments, strict=True):
        for work, values in zip(works, held, strict=True):
            write(work.state, key, values, group["state"], work.wrap_moment)
    return list(zip(found_directions, roots, strict=True))


def _update(work: Work, direction: Tensor, roots: Tensor) -> Update:
    group, residual = work.group, work.group["residual"]
    if residual == "normalized":
        step, (beta1, beta2) = work.state["moment_step"], group["betas"]
        bare = torch.div(work.coordinates, roots, out=roots)  # the direction without momentum
        sums = torch.stack([work.norm, overall_norm(direction), overall_norm(bare)]).square()
        inner, slow, fast = (work.gradient.rows.sum(sums) if work.side == "right" else sums).unbind()
        assert work.squares is not None
        outer = (work.scales.square() * work.squares).sum()
        return normalized(
            work.scales,
            work.gradient.rows.sum(outer) if work.side == "left" else outer,
            inner,
            (slow.sqrt() / (fast.sqrt() + TINY)) / (1 - beta1**step),
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
        carried = read(work.state, "error", values.dtype) if "error" in work.state else torch.zeros_like(values)
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

    def wrap(values: Tensor) -> Tensor:
        return like_parameter(values, work.parameter)

    write(work.state, "error", error.view(local(work.parameter).shape), work.group["state"], wrap)


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
    if update.coordinates is not None:
        matrix.addmm_(*_lift(work, work.bases, update.coordinates), beta=before, alpha=-size)
    elif before != 1:
        matrix.mul_(before)
    if update.factor is not None:
        matrix.addcmul_(gradient, update.factor, value=-size)
    if after != 1:
        matrix.mul_(after)
    if not exact:
        stepped = matrix.view(weight.shape)
        if group["stochastic_rounding"] and weight.dtype == torch.bfloat16:
            stepped = round_stochastically(stepped, drawn_from(group["seed"], work.index, 2**40 + work.state["step"]))
        weight.copy_(stepped)
