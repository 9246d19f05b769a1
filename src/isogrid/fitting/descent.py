"""The fit of last resort: quasi-Newton descent on all factors of a format that only knows how to multiply.

Everything is regression on virtual samples: with ``M = L Lᵀ`` the objective ``||(T - V) M^½||_F²`` equals
``||Lᵀ Tᵀ - multiply(Lᵀ)||_F²``, so the n rows of Lᵀ stand for the whole calibration set (fitting theory 4.1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isogrid.fitting.metric import Metric
from isogrid.fitting.report import OnStep


@torch.inference_mode(False)  # a caller's inference mode would record no gradients
def descend(
    multiply: Callable[[dict[str, Tensor], Tensor], Tensor],
    start: dict[str, Tensor],
    trainable: set[str],
    target: Tensor,
    metric: Metric | None,
    *,
    steps: int = 200,
    tolerance: float = 1e-9,
    on_step: OnStep | None = None,
) -> dict[str, Tensor]:
    """Minimise the weighted error over the trainable factors by L-BFGS (history 20, strong Wolfe), float64.

    Args:
        multiply: ``(factors, rows (rows, in)) -> (rows, out)``.
        start: factors to begin with.
        trainable: names of the factors to move; the others stay.
        target: ``(out, in)`` float64.
        metric: metric of the inputs, or None.
        steps: most iterations.
        tolerance: relative change of the objective at which to stop.
        on_step: called with (iteration, objective).

    Returns:
        The best factors met, never worse than the start.
    """
    samples = torch.eye(target.shape[1], dtype=target.dtype, device=target.device)
    if metric is not None:
        samples = metric.root.mT.clone()
    wish = samples @ target.mT
    # A target of zero has no size of its own: its error counts as it is.
    size = wish.square().sum()
    size = torch.where(size > 0, size, torch.ones_like(size))
    # Contiguous: torch's L-BFGS flattens gradients with `view`.
    moving = {
        name: value.detach().clone(memory_format=torch.contiguous_format).requires_grad_(name in trainable)
        for name, value in start.items()
    }
    parameters = [value for name, value in moving.items() if name in trainable]
    best_value, best = float("inf"), {name: value.detach().clone() for name, value in moving.items()}

    def objective() -> Tensor:
        return (wish - multiply(moving, samples)).square().sum() / size

    def keep_best() -> float:
        nonlocal best_value, best
        with torch.no_grad():
            value = float(objective())
        if value < best_value:
            best_value = value
            best = {name: tensor.detach().clone() for name, tensor in moving.items()}
        return value

    before = keep_best()
    if on_step is not None:
        on_step(0, before * float(size))
    chunk = 20
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=chunk,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = objective()
        value.backward()
        return value

    for begun in range(0, steps, chunk):
        done = min(begun + chunk, steps)
        optimizer.param_groups[0].update(max_iter=done - begun, max_eval=(done - begun) * 5 // 4)
        optimizer.step(closure)
        after = keep_best()
        if on_step is not None:
            on_step(done, min(after, before) * float(size))
        if not after < before * (1 - tolerance) or after < 1e-28:
            break
        before = after
    return best
