"""ARMOR: known answers, and that no solver ever loses what it had."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from isogrid import Armor, IsogridError, Metric, SemiStructured
from isogrid.fitting import Kept, Pattern, normalized, pruned
from isogrid.fitting.armor import error_of, monotone_loop, published_loop, solve_one_group
from isogrid.fitting.wrapped_core import (
    WrappedCore,
    blocks_times,
    fit_wrapped_core,
    plain_core,
    settled,
    solve_inner,
    solve_outer,
    sweep_apart,
    sweep_core,
    times_blocks,
)
from isogrid.kernels import unpack_mask
from tests.formats.cases import gaussian, generator, ill_conditioned
from tests.formats.pruning_problems import F64, correlated_case, relative_loss

PATTERN = Pattern(2, 4)


def proxy_problem(block: int) -> tuple[Tensor, Tensor, WrappedCore]:
    """The published objective of the correlated case: normalised weight, mean squares of inputs, NoWag-P's core."""
    weight, inputs = correlated_case()
    power = inputs.square().mean(0)
    normed, _, _ = normalized(weight)
    _, mask = pruned(weight, Metric(inputs.mT @ inputs), Kept(keep=2, of=4), "nowag", 0.0)
    return normed, power, plain_core(normed * mask, mask, block)


def descent(target: Tensor, moment: Tensor, start: WrappedCore, rounds: int) -> tuple[WrappedCore, list[float]]:
    """Exact block descent, and its error after every round as a part of the target's."""
    whole, errors = float(((target @ moment) * target).sum()), []
    found = fit_wrapped_core(
        target, moment, start, PATTERN, rounds=rounds, tolerance=0.0, on_step=lambda _, error: errors.append(error)
    )
    return found, [error / whole for error in errors]


def test_nowag_on_the_hand_case() -> None:
    weight = torch.tensor([[4, 3, 2, 1], [1, -2, 3, -4], [0.5, 0.5, -0.5, 1], [2, 0, 0, -1]], dtype=F64)
    power = torch.tensor([1, 4, 0.25, 1], dtype=F64)
    normed, rows, columns = normalized(weight)
    assert columns.tolist() == pytest.approx([4.609782, 3.640065, 3.640065, 4.358909], rel=3e-5)
    assert rows.tolist() == pytest.approx([1.336683, 1.367594, 0.319590, 0.490791], rel=5e-5)
    assert normed[0].tolist() == pytest.approx([0.649159, 0.616572, 0.411048, 0.171630], rel=5e-5)
    assert torch.allclose(rows.unsqueeze(1) * normed * columns, weight, rtol=1e-12)
    values, mask = pruned(weight, Metric(torch.diag(power)), Kept(keep=2, of=4), "nowag", 0.0)
    assert mask.int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 0, 1], [1, 0, 0, 1]]
    assert torch.equal(values, weight * mask)
    ratio = float((power * (normed * ~mask).square()).sum() / (power * normed.square()).sum())
    assert ratio == pytest.approx(0.061870, abs=2e-6)


@pytest.mark.parametrize(
    ("block", "errors"),
    [
        (4, [0.082304, 0.069046, 0.062356, 0.054283, 0.048976, 0.045158]),
        (8, [0.082304, 0.058918, 0.049375, 0.039548, 0.034509, 0.030888]),
        (16, [0.082304, 0.042474, 0.030791, 0.021283, 0.016863, 0.013607]),
    ],
)
def test_block_descent_on_the_published_objective(block: int, errors: list[float]) -> None:
    target, power, start = proxy_problem(block)
    found, reached = descent(target, torch.diag(power), start, 20)
    # Later rounds part ways where two supports are worth the same to rounding.
    assert [reached[step] for step in (0, 1)] == pytest.approx(errors[:2], abs=2e-6)
    assert [reached[step] for step in (2, 5, 10, 20)] == pytest.approx(errors[2:], rel=0.01)
    assert all(later <= before * (1 + 1e-12) for before, later in itertools.pairwise(reached))
    assert ((found.mask.view(64, 32, 4).sum(-1)) == 2).all()


def test_every_part_is_a_minimum_of_its_own() -> None:
    target, moment = gaussian(12, 20), ill_conditioned(20, condition=1e3).matrix
    mask = pruned(target, None, Kept(keep=2, of=4), "magnitude", 0.0)[1]
    core = plain_core(target * mask, mask, 4)
    core = WrappedCore(core.outer + 0.3 * gaussian(3, 4, 4, seed=1), core.values, mask, core.inner)

    def gradients(of: WrappedCore) -> tuple[Tensor, Tensor, Tensor]:
        leaves = [part.clone().requires_grad_() for part in (of.outer, of.values, of.inner)]
        residual = target - blocks_times(leaves[0], times_blocks(leaves[1], leaves[2]))
        ((residual @ moment) * residual).sum().backward()
        return tuple(leaf.grad for leaf in leaves)  # type: ignore[return-value]

    size = float(gradients(core)[0].norm())
    assert gradients(solve_outer(target, moment, core, proximal=0.0))[0].norm() < 1e-8 * size
    # The blocks of B see each other through the metric: only the last of one pass is at rest.
    assert gradients(solve_inner(target, moment, core, proximal=0.0))[2][-1].norm() < 1e-8 * size
    swept = core
    for _ in range(400):
        swept = sweep_core(target, moment, swept, PATTERN)
    assert (gradients(swept)[1] * swept.mask).norm() < 1e-6 * size


@pytest.mark.parametrize("shape", [(12, 20), (13, 17), (3, 9), (9, 2)], ids=str)
@pytest.mark.parametrize("block", [1, 4, 5, 50])
def test_never_worse_than_the_start(shape: tuple[int, int], block: int) -> None:
    m, n = shape
    target = gaussian(m, n)
    for moment in (ill_conditioned(n, condition=1e4).matrix, torch.diag(torch.rand(n, generator=generator()).double())):
        values, mask = pruned(target, Metric(moment), Kept(keep=2, of=4), "sparsegpt", 0.01)
        start = plain_core(values, mask, block)
        found, errors = descent(target, moment, start, 5)
        assert all(later <= before + 1e-12 for before, later in itertools.pairwise(errors))
        assert relative_loss(target, found.dense, moment) == pytest.approx(errors[-1], rel=1e-6, abs=1e-12)
        even = settled(found)
        assert torch.allclose(even.dense, found.dense, rtol=1e-9, atol=1e-11)
        assert torch.equal(even.mask, found.mask)


def test_blocks_of_one_are_nowag() -> None:
    target, power, start = proxy_problem(1)
    _, errors = descent(target, torch.diag(power), start, 3)
    assert errors == pytest.approx([errors[0]] * len(errors), rel=1e-6), "scaled rows and columns gain nothing here"


def test_a_start_inside_the_format_stays_exact() -> None:
    mask = pruned(gaussian(12, 20), None, Kept(keep=2, of=4), "magnitude", 0.0)[1]
    planted = WrappedCore(gaussian(3, 4, 4), gaussian(12, 20, seed=1) * mask, mask, gaussian(5, 4, 4, seed=2))
    _, errors = descent(planted.dense, torch.eye(20, dtype=F64), planted, 2)
    assert max(errors) < 1e-12


def test_one_group_of_every_block_never_loses() -> None:
    target, power, core = proxy_problem(8)
    error = error_of(target, power, core)
    for step in range(20):
        core = solve_one_group(
            target, power, core, PATTERN, lambda scores: torch.full(scores.shape[:-1], step % scores.shape[-1])  # noqa: B023
        )  # fmt: skip
        reached = error_of(target, power, core)
        assert reached <= error * (1 + 1e-12)
        error = reached
    assert ((core.mask.view(64, 32, 4).sum(-1)) == 2).all()


def test_the_monotone_loop_and_the_published_one() -> None:
    target, power, start = proxy_problem(8)
    whole = float((power * target.square()).sum())
    monotone: list[float] = []
    monotone_loop(target, power, start, PATTERN, iterations=30, on_step=lambda _, e: monotone.append(e / whole))
    assert monotone[0] == pytest.approx(0.082304, abs=1e-6)
    assert monotone == sorted(monotone, reverse=True)
    published: list[float] = []
    published_loop(
        target, power, start, PATTERN, iterations=60, generator=generator(),
        on_step=lambda _, e: published.append(e / whole),
    )  # fmt: skip
    assert published[0] == pytest.approx(monotone[0], rel=1e-12)
    assert published[-1] < published[0]
    _, exact = descent(target, torch.diag(power), start, 3)
    assert exact[-1] < min(monotone[-1], published[-1]), "three exact rounds are worth more"


@pytest.mark.slow
def test_block_descent_gets_as_far_as_the_published_loop() -> None:
    source = generator()
    side = 64
    weight = torch.randn(side, side, generator=source, dtype=F64)
    left, right = (torch.randn(*size, generator=source, dtype=F64) for size in ((side, 8), (8, side)))
    weight = (weight + 0.5 * left @ right / 8**0.5) * (0.5 + torch.rand(side, 1, generator=source, dtype=F64))
    power = torch.exp(torch.randn(side, generator=source, dtype=F64))
    normed, _, _ = normalized(weight)
    _, mask = pruned(weight, Metric(torch.diag(power)), Kept(keep=2, of=4), "nowag", 0.0)
    start = plain_core(normed * mask, mask, 8)
    loop = published_loop(normed, power, start, PATTERN, iterations=6000, generator=generator())
    found, _ = descent(normed, torch.diag(power), start, 200)
    assert error_of(normed, power, found) <= 1.03 * error_of(normed, power, loop)


@pytest.mark.parametrize("solver", ["default", "proxy", "published", "monotone"])
def test_solvers_of_the_format(solver: str) -> None:
    weight, inputs = correlated_case()
    metric = Metric(inputs.mT @ inputs)
    fmt = Armor(block=8)
    factors = fmt.fit(weight, metric, solver=solver, rounds=10, iterations=200)
    found = fmt.dense(factors, 64, 128)
    error = relative_loss(weight, found, metric.matrix)
    plain = SemiStructured().fit(weight, metric, solver="nowag" if solver != "default" else "sparsegpt")
    assert error < 0.9 * relative_loss(weight, SemiStructured().dense(plain, 64, 128), metric.matrix)
    assert (unpack_mask(factors["mask"], 128).view(64, 32, 4).sum(-1) == 2).all()
    again = fmt.fit(weight, metric, solver=solver, start=factors, rounds=1, iterations=1)
    assert relative_loss(weight, fmt.dense(again, 64, 128), metric.matrix) <= error * 1.02


def test_the_whole_metric_beats_the_published_objective() -> None:
    weight, inputs = correlated_case()
    metric = Metric(inputs.mT @ inputs)
    errors = [
        relative_loss(weight, Armor(8).dense(Armor(8).fit(weight, metric, solver=solver), 64, 128), metric.matrix)
        for solver in ("default", "proxy")
    ]
    assert errors[0] < 0.25 * errors[1]
    assert errors[0] < 0.0047, "what the methods note reached"
    coarse = [
        relative_loss(weight, Armor(block).dense(Armor(block).fit(weight, metric), 64, 128), metric.matrix)
        for block in (1, 4, 8, 16)
    ]
    assert coarse == sorted(coarse, reverse=True), "larger blocks, smaller error"


def test_overheads_of_real_models() -> None:
    # Qwen2.5 7B, 14B, 32B, 72B at block 128: what the paper states.
    sizes = ((3584, 18944, 512), (5120, 13824, 1024), (5120, 27648, 1024), (8192, 29568, 1024))
    for (hidden, wide, key), percent in zip(sizes, (4.95, 4.17, 3.44, 2.40), strict=True):
        shapes = [(hidden, hidden)] * 2 + [(key, hidden)] * 2 + [(wide, hidden)] * 2 + [(hidden, wide)]
        more = sum(Armor(128).cost(m, n).parameters - SemiStructured().cost(m, n).parameters for m, n in shapes)
        assert 100 * more / sum(m * n for m, n in shapes) == pytest.approx(percent, abs=0.006)


def test_what_armor_refuses() -> None:
    with pytest.raises(IsogridError, match="armor: block is a positive integer, got 0"):
        Armor(block=0)
    with pytest.raises(IsogridError, match="more supports than can all be tried"):
        Armor(keep=8, of=16)
    with pytest.raises(IsogridError, match=r"in_features=18 .* multiples of of=4"):
        Armor(4).fit(gaussian(6, 18), Metric(torch.eye(18)), solver="published")
    with pytest.raises(IsogridError, match="rounds=-1"):
        Armor(4).fit(gaussian(6, 16), rounds=-1)


def test_dead_inputs_and_rows() -> None:
    weight, rows = gaussian(10, 16), gaussian(40, 16, seed=1)
    weight[3], weight[:, 5], rows[:, 7] = 0, 0, 0
    for solver in ("default", "proxy", "published", "monotone"):
        factors = Armor(4).fit(weight, Metric.from_rows(rows), solver=solver, iterations=50)
        assert all(torch.isfinite(value.double()).all() for value in factors.values())
        assert Armor(4).dense(factors, 10, 16)[3].abs().max() < 1e-9


def test_blocks_apart_are_swept_as_blocks_together() -> None:
    target, power, core = proxy_problem(8)
    core = WrappedCore(core.outer + 0.2 * gaussian(8, 8, 8), core.values, core.mask, core.inner)
    one, other = (sweep(target, torch.diag(power), core, PATTERN) for sweep in (sweep_core, sweep_apart))
    assert torch.equal(one.mask, other.mask)
    assert torch.allclose(one.values, other.values, rtol=1e-8, atol=1e-10)
