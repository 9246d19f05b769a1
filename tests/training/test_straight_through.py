"""The straight-through factorizer: what it promises exactly, and that it is worth its trouble."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from isogrid import Dense, DenseSparse, IsogridError, LowRank, Metric, SemiStructured, StructuredLinear
from isogrid.training import refresh_factors, settle_factors, straight_through

F64 = torch.float64
SIDE = 48


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def linear(weight: Tensor) -> nn.Sequential:
    layer = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return nn.Sequential(layer)


class Task:
    """A trained matrix, the task's own nearby, and inputs with variances 1 / i²."""

    def __init__(self, seed: int) -> None:
        self.trained = gaussian(SIDE, SIDE, seed=seed) / SIDE**0.5
        self.wanted = self.trained + 0.5 * gaussian(SIDE, SIDE, seed=seed + 10) / SIDE**0.5
        axes = torch.linalg.qr(gaussian(SIDE, SIDE, seed=seed + 20)).Q
        spectrum = torch.arange(1, SIDE + 1, dtype=F64) ** -1
        self.moment = (axes * spectrum) @ axes.mT * SIDE / spectrum.sum()
        self.metric = Metric(self.moment)

    def loss(self, weight: Tensor) -> Tensor:
        """Of the whole population, relative to that of zeros."""
        error = weight - self.wanted
        return ((error @ self.moment) * error).sum() / ((self.wanted @ self.moment) * self.wanted).sum()

    def train(self, model: nn.Module, steps: int, rate: float, pull: float | None = None) -> float:
        """Adam on the population's loss; factors are refreshed after each step where ``pull`` is given."""
        optimizer = torch.optim.Adam(model.parameters(), rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        identity = torch.eye(SIDE, dtype=F64)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(model(identity).mT).backward()
            optimizer.step()
            schedule.step()
            if pull is not None:
                refresh_factors(model, pull)
        with torch.no_grad():
            return float(self.loss(model(identity).mT))


def test_without_compression_it_is_dense_training() -> None:
    task = Task(0)
    dense, through = linear(task.trained), linear(task.trained)
    straight_through(through, Dense(), {"0": None})
    assert task.train(through, 20, 1e-2, pull=0.0) == pytest.approx(task.train(dense, 20, 1e-2), rel=1e-9)


def test_the_gradient_is_that_of_the_product() -> None:
    task = Task(0)
    model = linear(task.trained)
    straight_through(model, LowRank(5), {"0": None})
    layer = model[0]
    product = layer.product.clone().requires_grad_()
    x = gaussian(7, SIDE, seed=3)
    (x @ product.mT).square().sum().backward()
    model(x).square().sum().backward()
    assert torch.allclose(layer.weight.grad, product.grad, rtol=1e-10)


def test_a_whole_pull_without_a_gradient_collapses_the_matrix() -> None:
    model = linear(Task(0).trained)
    straight_through(model, SemiStructured(), {"0": None})
    refresh_factors(model, pull=1.0)
    assert torch.equal(model[0].weight, model[0].product)


def test_settling_changes_nothing() -> None:
    task = Task(0)
    model = linear(task.trained)
    straight_through(model, DenseSparse(16, 4), {"0": task.metric}, rounds=1, alternations=2)
    task.train(model, 5, 1e-2, pull=0.02)
    x = gaussian(3, SIDE, seed=1)
    before = model(x)
    assert settle_factors(model) == ["0"]
    assert isinstance(model[0], StructuredLinear)
    assert torch.allclose(model(x), before, rtol=1e-12)
    mask = model[0].mask.clone()
    task.train(model, 5, 1e-2)
    assert torch.equal(model[0].mask, mask), "tuning the factors leaves their places"


@pytest.mark.slow
def test_it_beats_tuning_the_factors_of_the_trained_matrix() -> None:
    fmt = DenseSparse(16, 4)
    for seed in (0, 1):
        task = Task(seed)

        def factors_alone(weight: Tensor, fmt: DenseSparse | LowRank, task: Task, steps: int) -> float:
            layer = StructuredLinear.from_factors(fmt, fmt.fit(weight, task.metric), SIDE, SIDE)
            return task.train(nn.Sequential(layer), steps, 1e-2)

        tuned = factors_alone(task.trained, fmt, task, 300)
        rank = fmt.cost(SIDE, SIDE).parameters // (2 * SIDE)
        low_rank = factors_alone(task.trained, LowRank(rank), task, 300)
        ends = {}
        for pull in (0.0, 0.02):
            model = linear(task.trained)
            straight_through(model, fmt, {"0": task.metric}, rounds=1)
            drifting = task.train(model, 210, 3e-3, pull=pull)
            settle_factors(model)
            ends[pull] = drifting, task.train(model, 90, 1e-2)
        assert ends[0.02][1] < tuned, "the straight-through factorizer, then its factors"
        assert ends[0.02][1] < low_rank, "as many numbers in low rank"
        assert ends[0.02][0] < ends[0.0][0], "without a pull the latent matrix drifts away"


def test_what_is_refused() -> None:
    model = linear(Task(0).trained)
    with pytest.raises(IsogridError, match="no straight-through layer"):
        refresh_factors(model)
    with pytest.raises(IsogridError, match="'1': the model has no linear layer"):
        straight_through(model, LowRank(3), {"1": None})
    with pytest.raises(IsogridError, match=r"layer '0': .*rank"):
        straight_through(model, "low_rank", {"0": None})
    straight_through(model, LowRank(3), {"0": None})
    with pytest.raises(IsogridError, match="pull is between 0 and 1"):
        refresh_factors(model, 1.5)
