"""Numbers and identities of the method pages: fitting theory 9 and 10, Monarch 6, BTT 2, 3, 5 and 8, the thesis 2."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from isogrid import BlockTensorTrain, Budget, Format, LowRank, LowRankLight, Metric, Monarch, Permuted, Sum
from isogrid.fitting import fit_slices, squared_norm
from isogrid.formats.block_tensor_train import balanced_pair, greedy_pair
from tests.formats.cases import case_id, gaussian, generator, ill_conditioned, over, random_factors

F64 = torch.float64


def fitted(fmt: Format, target: Tensor, metric: Metric | None = None, **options: object) -> Tensor:
    """The dense matrix of a fit."""
    return fmt.dense(fmt.fit(target, metric, **options), *target.shape)


def relative_error(fmt: Format, target: Tensor) -> float:
    """``||target - fit|| / ||target||``."""
    return float((target - fitted(fmt, target)).norm() / target.norm())


def numpy_normal(seed: int, *shape: int) -> Tensor:
    """The first draw of numpy's default generator."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def tail(matrix: Tensor, rank: int) -> float:
    """Sum of the squared singular values beyond the first ``rank``."""
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())


# ---- fitting theory, section 9 -------------------------------------------------------------------------------------


@cache
def theory() -> dict[str, Tensor]:
    """W (12, 16), C, C', K of section 9, and the anchored target and its constant."""
    i, j = torch.arange(12, dtype=F64)[:, None], torch.arange(16, dtype=F64)
    w = torch.cos(0.9 * i * j + 0.3 * i + 0.1 * j)
    s = 1 + 0.5 * torch.sin(j)
    c = 0.9 ** (j[:, None] - j).abs() * s[:, None] * s
    p = torch.eye(16, dtype=F64) + 0.1 * torch.diag(torch.ones(15, dtype=F64), 1)
    shifted = p @ c @ p.T + 0.1 * torch.diag(c.diagonal())
    cross = c @ p.T
    anchored = w @ cross @ torch.linalg.inv(shifted)
    constant = (w @ c @ w.T).trace() - (anchored @ shifted @ anchored.T).trace()
    return {"W": w, "C": c, "C'": shifted, "K": cross, "T": anchored, "c0": constant}


def test_the_deterministic_problem() -> None:
    t = theory()
    assert t["W"].square().sum().item() == pytest.approx(100.4210432226, abs=1e-9)
    assert (t["W"] @ t["C"] @ t["W"].T).trace().item() == pytest.approx(234.8312572913869, abs=1e-9)
    assert Metric(t["C"]).squared_norm(t["W"]) == pytest.approx(234.8312572913869, abs=1e-9)
    assert Metric(t["C'"]).squared_norm(t["W"]) == pytest.approx(292.1030451368, abs=1e-9)
    assert torch.linalg.cond(t["C"]).item() == pytest.approx(590.3395, abs=1e-3)
    assert t["c0"].item() == pytest.approx(6.916584626969, abs=1e-9)


@pytest.mark.parametrize("fmt", [LowRank(rank=4), LowRankLight(rank=4)], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(
    ("target", "moment", "values"),
    [
        ("W", None, (29.050953, 21.392658, 27.403559, 31.658868)),
        ("W", "C", (44.397073, 4.323762, 8.811701, 14.147143)),
        ("W", "C'", (43.331649, 4.428614, 8.650568, 14.525374)),
        ("T", "C'", (53.930208, 7.759665, 13.944673, 9.186794)),
    ],
    ids=["plain", "input-aware", "shifted", "anchored"],
)
def test_rank_four_objectives(fmt: Format, target: str, moment: str | None, values: tuple[float, ...]) -> None:
    t = theory()
    found = fitted(fmt, t[target], None if moment is None else Metric(t[moment]))
    error = t["W"] - found
    anchored = Metric(t["C'"]).squared_norm(t["T"] - found) + float(t["c0"])
    objectives = (
        squared_norm(error, None),
        Metric(t["C"]).squared_norm(error),
        Metric(t["C'"]).squared_norm(error),
        anchored,
    )
    assert objectives == pytest.approx(values, abs=1e-6)


ONES = torch.ones(4, 4, dtype=torch.long)  # the rank of each slice
GRIDS = {
    "monarch": Monarch(blocks=4, rank=1),
    "block tensor-train": BlockTensorTrain(rank=1, out_factors=(4, 3), in_factors=(4, 4)),
}


@pytest.mark.parametrize(("grid", "unweighted"), [("monarch", 85.564844), ("block tensor-train", 30.310175)])
def test_grids_without_a_metric(grid: str, unweighted: float) -> None:
    t = theory()
    assert GRIDS[grid].cost(12, 16).parameters == 112
    error = t["W"] - fitted(GRIDS[grid], t["W"])
    assert Metric(t["C"]).squared_norm(error) == pytest.approx(unweighted, abs=1e-6)
    ignored = t["W"] - fitted(GRIDS[grid], t["W"], Metric(t["C"]), solver="projection")
    assert torch.allclose(ignored, error)


@pytest.mark.parametrize(
    ("grid", "sweeps", "value"),
    [
        ("monarch", 0, 7.361197),
        ("monarch", 1, 6.33824),
        ("monarch", 2, 6.16904),
        ("monarch", 5, 6.04909),
        ("block tensor-train", 0, 7.758334),
    ],
)
def test_grids_by_sweep(grid: str, sweeps: int, value: float) -> None:
    t = theory()
    found = fitted(GRIDS[grid], t["W"], Metric(t["C"]), sweeps=sweeps)
    assert Metric(t["C"]).squared_norm(t["W"] - found) == pytest.approx(value, abs=6e-6)


def test_twenty_sweeps_of_monarch() -> None:
    t = theory()
    blocks = t["W"].view(3, 4, 4, 4).permute(1, 2, 0, 3)  # (row group, column group, 3, 4)
    values: list[float] = []
    fit_slices(blocks, ONES, Metric(t["C"]), sweeps=20, tolerance=0.0, on_step=lambda _, value: values.append(value))
    assert [values[k] for k in (0, 1, 2, 5, 20)] == pytest.approx(
        [7.361197, 6.33824, 6.16904, 6.04909, 6.00285], abs=6e-6
    )


def test_twenty_sweeps_through_the_format() -> None:
    t = theory()
    found = fitted(GRIDS["monarch"], t["W"], Metric(t["C"]), sweeps=20, tolerance=0.0)
    assert Metric(t["C"]).squared_norm(t["W"] - found) == pytest.approx(6.00285, abs=6e-6)


@pytest.mark.parametrize(
    ("grid", "optimum", "worst"), [("monarch", 5.998141, 6.00285), ("block tensor-train", 6.010469, 6.183313)]
)
def test_descent_converges_to_the_optimum(grid: str, optimum: float, worst: float) -> None:
    t = theory()
    if grid == "monarch":
        blocks = t["W"].view(3, 4, 4, 4).permute(1, 2, 0, 3)
    else:
        blocks = t["W"].view(4, 3, 4, 4).transpose(1, 2)
    values: list[float] = []
    fit_slices(blocks, ONES, Metric(t["C"]), sweeps=300, tolerance=0.0, on_step=lambda _, value: values.append(value))
    assert values[-1] == pytest.approx(optimum, abs=1e-6)
    assert values[20] <= worst + 6e-6


# ---- fitting theory, section 10 ------------------------------------------------------------------------------------

FITTED = [
    (LowRank(rank=3), 10, 12),
    (LowRankLight(rank=3), 10, 12),
    (Monarch(blocks=3, rank=1), 10, 12),
    (Monarch(blocks=4), 11, 13),
    (BlockTensorTrain(rank=1), 12, 12),
    (BlockTensorTrain(rank=2, out_factors=(3, 4), in_factors=(2, 7)), 11, 13),
    (Sum((LowRank(rank=1), Monarch(blocks=3, rank=1))), 12, 12),
    (Permuted(Monarch(blocks=3, rank=1)), 12, 12),
]
ITERATIVE = [case for case in FITTED if isinstance(case[0], Monarch | BlockTensorTrain | Sum)]


@over(FITTED)
def test_a_multiple_of_the_metric_changes_nothing(fmt: Format, m: int, n: int) -> None:
    target, metric = gaussian(m, n), ill_conditioned(n, condition=1e3)
    once, scaled = (fitted(fmt, target, Metric(c * metric.moment)) for c in (1.0, 37.5))
    assert torch.allclose(once, scaled, rtol=1e-7, atol=1e-9)


@over(FITTED)
def test_a_multiple_of_the_identity_is_no_metric(fmt: Format, m: int, n: int) -> None:
    target = gaussian(m, n)
    plain, scaled = fitted(fmt, target), fitted(fmt, target, Metric(0.3 * torch.eye(n)))
    assert torch.allclose(plain, scaled, rtol=1e-7, atol=1e-8)


@over(FITTED)
def test_a_metric_from_samples_is_fitting_on_the_samples(fmt: Format, m: int, n: int) -> None:
    target, samples = gaussian(m, n), gaussian(40, n, seed=1) * torch.linspace(0.2, 3, n)
    metric = Metric.from_rows(samples, damping=0.0)
    found = fitted(fmt, target, metric)
    error = target - found
    assert metric.squared_norm(error) == pytest.approx(float((samples @ error.T).square().sum()) / 40, rel=1e-10)
    shuffled = Metric.from_rows(samples[torch.randperm(40, generator=generator())].view(4, 10, n), damping=0.0)
    assert torch.allclose(shuffled.moment, metric.moment, rtol=1e-12, atol=1e-14)
    assert torch.allclose(fitted(fmt, target, shuffled), found, rtol=1e-7, atol=1e-9)


def test_low_rank_on_samples_directly() -> None:
    # No metric anywhere: the outputs are projected on their leading directions (fitting theory 3.1 on samples).
    target, samples = gaussian(10, 12), gaussian(40, 12, seed=1) * torch.linspace(0.2, 3, 12)
    u = torch.linalg.svd((samples @ target.T).T, full_matrices=False).U[:, :3]
    direct = u @ u.T @ target
    for fmt in (LowRank(rank=3), LowRankLight(rank=3)):
        assert torch.allclose(fitted(fmt, target, Metric.from_rows(samples, damping=0.0)), direct, atol=1e-10)


@over(ITERATIVE)
def test_objective_never_rises(fmt: Format, m: int, n: int) -> None:
    for seed in range(3):
        target, metric = gaussian(m, n, seed=seed), ill_conditioned(n, seed=seed)
        values: list[float] = []
        rounds = {"rounds": 12} if isinstance(fmt, Sum) else {"sweeps": 12}
        found = fitted(fmt, target, metric, on_step=lambda _, value, log=values: log.append(value), **rounds)
        assert len(values) >= 2
        assert all(later <= before * (1 + 1e-9) for before, later in itertools.pairwise(values))
        assert metric.squared_norm(target - found) == pytest.approx(values[-1], rel=1e-6)


@over([case for case in ITERATIVE if not isinstance(case[0], Sum)])
def test_descent_beats_its_starts(fmt: Format, m: int, n: int) -> None:
    for seed in range(3):
        target, metric = gaussian(m, n, seed=seed), ill_conditioned(n, seed=seed, condition=1e4)
        start, projected, final = (
            metric.squared_norm(target - fitted(fmt, target, metric, **options))
            for options in ({"sweeps": 0}, {"solver": "projection"}, {})
        )
        assert final < start
        assert final < projected


@over([(Monarch(blocks=3, rank=1), 9, 12), (BlockTensorTrain(rank=1, out_factors=(3, 3), in_factors=(4, 3)), 9, 12)])
def test_slices_respect_the_bound_and_decouple(fmt: Format, m: int, n: int) -> None:
    # Fitting theory 3.7: no grid does better than low rank within each row group; 3.5: a metric that is block-diagonal
    # over the column groups decouples the slices, so the start is the optimum.
    target, metric = gaussian(m, n), ill_conditioned(n, condition=1e3)
    groups = [target[a::3] for a in range(3)] if isinstance(fmt, Monarch) else list(target.split(3))
    columns = 3 if isinstance(fmt, Monarch) else 4
    bound = sum(tail(group @ metric.root, columns) for group in groups)
    assert metric.squared_norm(target - fitted(fmt, target, metric)) >= bound - 1e-9
    side = n // columns
    moment = torch.block_diag(*(ill_conditioned(side, seed=c, condition=1e3).moment for c in range(columns)))
    decoupled = Metric(moment)
    start, swept = (fitted(fmt, target, decoupled, sweeps=sweeps) for sweeps in (0, 6))
    exact = sum(
        tail(group[:, c * side : (c + 1) * side] @ decoupled.root[c * side :, c * side :][:side, :side], 1)
        for group in groups
        for c in range(columns)
    )
    assert decoupled.squared_norm(target - start) == pytest.approx(exact, rel=1e-10)
    assert torch.allclose(start, swept, rtol=1e-7, atol=1e-8)


@over([(LowRank(rank=3), 10, 12), (LowRankLight(rank=3), 10, 12), (Monarch(blocks=3, rank=1), 12, 12)])
def test_scaling_the_inputs_commutes_with_the_fit(fmt: Format, m: int, n: int) -> None:
    # fit(T D⁻¹, D M D) = fit(T, M) D⁻¹: folding a norm's gains into a weight changes nothing.
    target, metric, gains = gaussian(m, n), ill_conditioned(n, condition=1e3), torch.linspace(0.3, 5, n, dtype=F64)
    options = {"sweeps": 0} if isinstance(fmt, Monarch) else {}
    folded = fitted(fmt, target / gains, Metric(gains[:, None] * metric.moment * gains), **options)
    assert torch.allclose(folded * gains, fitted(fmt, target, metric, **options), rtol=1e-8, atol=1e-10)
    rows = gaussian(30, n, seed=3)
    one, other = Metric.from_rows(rows), Metric.from_rows(rows * gains)
    assert one.damping > 0
    assert torch.allclose(other.matrix, gains[:, None] * one.matrix * gains)


@pytest.mark.parametrize("fmt", [LowRank(rank=5), LowRankLight(rank=5)], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)], ids=str)
def test_low_rank_solvers_agree(fmt: Format, shape: tuple[int, int]) -> None:
    m, n = shape
    u, v = torch.linalg.qr(gaussian(m, 30)).Q[:, :30], torch.linalg.qr(gaussian(n, 30, seed=1)).Q[:, :30]
    target = (u * 0.6 ** torch.arange(30, dtype=F64)) @ v.T
    for metric in (None, ill_conditioned(n, condition=1e2)):
        exact = fitted(fmt, target, metric, solver="svd")
        least = tail(target if metric is None else target @ metric.root, 5)
        assert squared_norm(target - exact, metric) == pytest.approx(least, rel=1e-9)
        for solver in ("default", "gram"):
            assert torch.allclose(fitted(fmt, target, metric, solver=solver), exact, atol=1e-9)
        near = squared_norm(target - fitted(fmt, target, metric, solver="randomized"), metric)
        assert least * (1 - 1e-9) <= near <= least * 1.0001


# ---- monarch, section 6 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "blocks", "error"),
    [
        ((256, 256), 4, 0.612075),
        ((256, 256), 8, 0.787012),
        ((256, 256), 16, 0.886365),
        ((64, 64), 8, 0.777841),
        ((48, 32), 4, 0.673964),
        ((48, 32), 8, 0.842047),  # mixed rank
    ],
)
def test_monarch_projection_errors(shape: tuple[int, int], blocks: int, error: float) -> None:
    assert relative_error(Monarch(blocks=blocks), numpy_normal(0, *shape)) == pytest.approx(error, abs=1e-6)


def test_which_matrices_suit_monarch() -> None:
    # Half the parameters: Gaussian about equal, random orthogonal better, power-law spectrum worse than low rank.
    monarch, half = Monarch(blocks=4), LowRank().sized(256, 256, Budget.keep(0.5, 256, 256))
    assert half.rank == 64
    assert relative_error(half, numpy_normal(0, 256, 256)) == pytest.approx(0.6123, abs=2e-3)
    u, v = (torch.linalg.qr(gaussian(256, 256, seed=seed)).Q for seed in (0, 1))
    assert relative_error(monarch, u) == pytest.approx(0.659, abs=3e-3)
    assert relative_error(half, u) == pytest.approx(math.sqrt(0.75), abs=1e-9)
    power = (u / torch.arange(1, 257, dtype=F64)) @ v.T
    assert relative_error(half, power) == pytest.approx(0.084, abs=3e-3)
    assert relative_error(monarch, power) == pytest.approx(0.140, abs=6e-3)


def hadamard(n: int) -> Tensor:
    """Sylvester's Hadamard matrix."""
    h = torch.ones(1, 1, dtype=F64)
    while h.shape[0] < n:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64), h)
    return h


@pytest.mark.parametrize("b", [4, 8])
def test_what_monarch_contains(b: int) -> None:
    n = b * b
    fmt = Monarch(blocks=b, rank=1)
    assert relative_error(fmt, hadamard(n)) < 1e-14
    assert relative_error(fmt, torch.eye(n, dtype=F64)) < 1e-14
    blocks = torch.block_diag(*gaussian(b, b, b))
    assert relative_error(fmt, blocks) < 1e-14
    # The stride permutation alone is as far from the class as can be.
    stride = torch.eye(n, dtype=F64)[torch.arange(n).view(b, b).T.ravel()]
    assert relative_error(fmt, stride) == pytest.approx(math.sqrt(1 - 1 / b), abs=1e-12)
    # Each slice of the DFT composed with it is one complex outer product: its real part has rank two.
    k = torch.arange(n, dtype=F64)
    cosine = torch.cos(2 * math.pi / n * k[:, None] * k)[:, torch.arange(n).view(b, b).T.ravel()]
    assert relative_error(Monarch(blocks=b, rank=2), cosine) < 1e-13
    assert relative_error(fmt, cosine) > 0.1


def test_monarch_parameter_ratios() -> None:
    assert Monarch(blocks=2).cost(768, 768).parameters == 768 * 768
    assert Monarch(blocks=4).cost(768, 768).parameters == 768 * 768 // 2
    for shape in ((3072, 768), (768, 3072)):
        assert Monarch(blocks=4).cost(*shape).parameters / (768 * 3072) == 0.3125
        assert Monarch(blocks=2).cost(*shape).parameters / (768 * 3072) == 0.625
    assert Monarch(blocks=4).slice_ranks(768, 768).tolist() == [[48] * 4] * 4
    assert 0 in Monarch(blocks=4).slice_ranks(7, 10)


@over([(Monarch(blocks=4), 12, 16), (Monarch(blocks=4), 7, 10), (Monarch(blocks=3, rank=2), 13, 11)])
def test_monarch_projection_is_slicewise(fmt: Monarch, m: int, n: int) -> None:
    target = gaussian(m, n)
    b = fmt.blocks
    s, p = -(-m // b), -(-n // b)
    padded = torch.zeros(s * b, p * b, dtype=F64)
    padded[:m, :n] = target
    ranks = fmt.slice_ranks(m, n)
    # The documented count: hidden units t of column group c that fall into row group a.
    hidden = fmt.factors(m, n)["right"].shape[1]
    for a in range(b):
        for c in range(b):
            assert ranks[a, c] == sum((c * hidden + t) % b == a for t in range(hidden))
    discarded = sum(tail(padded[a::b, c * p : (c + 1) * p], int(ranks[a, c])) for a in range(b) for c in range(b))
    found = fitted(fmt, target)
    assert squared_norm(target - found, None) == pytest.approx(discarded, rel=1e-10)
    assert torch.allclose(fitted(fmt, found), found, atol=1e-12)
    assert torch.allclose(fitted(fmt, -3 * target), -3 * found, atol=1e-12)


def test_monarch_projection_commutes_with_orders_that_keep_the_grid() -> None:
    target, b = gaussian(12, 12), 3

    def shuffled(size: int) -> Tensor:
        return torch.randperm(size, generator=generator(size))

    rows = torch.arange(12).view(4, 3)[shuffled(4)][:, shuffled(3)].ravel()  # within and between groups
    columns = torch.arange(12).view(3, 4)[shuffled(3)][:, shuffled(4)].ravel()
    fmt = Monarch(blocks=b, rank=1)
    assert torch.allclose(fitted(fmt, target[rows][:, columns]), fitted(fmt, target)[rows][:, columns], atol=1e-12)


# ---- block tensor-train, sections 2, 3, 5, 8 -----------------------------------------------------------------------


def counted(fmt: Format, m: int, n: int) -> Tensor:
    """The matrix whose factors are filled with 1, 2, 3, … each."""
    factors = {
        name: torch.arange(1, spec.numel + 1, dtype=F64).view(spec.shape) for name, spec in fmt.factors(m, n).items()
    }
    dense = fmt.dense(factors, m, n)
    assert torch.equal(fmt.multiply(factors, torch.eye(n, dtype=F64), m).T, dense)
    return dense


INTEGER_EXAMPLES = [
    (
        BlockTensorTrain(rank=1, out_factors=(2, 2), in_factors=(2, 2)),
        [[1, 3, 15, 21], [2, 6, 20, 28], [10, 20, 42, 56], [12, 24, 48, 64]],
    ),
    (
        BlockTensorTrain(rank=2, out_factors=(2, 3), in_factors=(2, 1)),
        [[9, 95], [12, 106], [15, 117], [103, 309], [110, 324], [117, 339]],
    ),
    (Monarch(blocks=2), [[1, 2, 10, 12], [15, 20, 42, 48], [3, 6, 20, 24], [21, 28, 56, 64]]),
    (
        Monarch(blocks=2),
        [[1, 2, 10, 12], [21, 28, 56, 64], [3, 6, 20, 24], [27, 36, 70, 80], [5, 10, 30, 36], [33, 44, 84, 96]],
    ),
    (
        Monarch(blocks=2),
        [[1, 2, 3, 14, 16, 18], [20, 25, 30, 60, 66, 72], [3, 6, 9, 28, 32, 36], [28, 35, 42, 80, 88, 96]],
    ),
]


@pytest.mark.parametrize(("fmt", "rows"), INTEGER_EXAMPLES)
def test_integer_examples(fmt: Format, rows: list[list[int]]) -> None:
    expected = torch.tensor(rows, dtype=F64)
    assert torch.equal(counted(fmt, *expected.shape), expected)


def test_integer_example_of_a_product() -> None:
    fmt = Monarch(blocks=2)
    factors = {"right": torch.arange(1.0, 9).view(2, 2, 2), "left": torch.arange(1.0, 9).view(2, 2, 2)}
    assert fmt.multiply(factors, torch.tensor([1.0, 2, 3, 4]), 4).tolist() == [83, 373, 171, 501]


@pytest.mark.parametrize(
    ("n", "greedy", "balanced"),
    [
        (64, (8, 8), (8, 8)),
        (768, (16, 48), (24, 32)),
        (1024, (32, 32), (32, 32)),
        (608, (8, 76), (19, 32)),
        (1000, (20, 50), (25, 40)),
        (1536, (32, 48), (32, 48)),
        (3072, (32, 96), (48, 64)),
        (4096, (64, 64), (64, 64)),
        (2304, None, (48, 48)),
        (192, None, (12, 16)),
        (384, None, (16, 24)),
        (1296, None, (36, 36)),
    ],
)
def test_factor_pairs(n: int, greedy: tuple[int, int] | None, balanced: tuple[int, int]) -> None:
    assert greedy is None or greedy_pair(n) == greedy
    assert balanced_pair(n) == balanced


def test_skewed_sizes_are_padded() -> None:
    assert greedy_pair(97) == (1, 97)
    assert balanced_pair(97) == (7, 14)  # 98
    assert balanced_pair(776) == (21, 37)  # 777: 776 has only 8 x 97
    for n in range(1, 300):
        small, large = balanced_pair(n)
        assert small <= large <= 4 * small
        assert small * large >= n
        for skipped in range(n, small * large):
            assert not any(skipped % d == 0 and d <= skipped // d <= 4 * d for d in range(1, skipped + 1))
        assert math.prod(greedy_pair(n)) == n


def deviation(fmt: Format, m: int, n: int) -> list[float]:
    """The documented standard deviation of every component."""
    return [math.sqrt(min(part.fan_in, part.fan_out)) / part.fan_in for part in fmt.components(m, n)]


def multiplier(fmt: Format, m: int, n: int) -> list[float]:
    """Learning rates relative to the dense layer's, d_in / (k · fan_in)."""
    parts = fmt.components(m, n)
    return [n / (len(parts) * part.fan_in) for part in parts]


def greedy(rank: int) -> BlockTensorTrain:
    return BlockTensorTrain(rank=rank, factorization="greedy")


COMPONENTS = [
    (LowRank(rank=8), 64, 64, (0.5, 4), (0.044194, 0.353553)),
    (greedy(1), 64, 64, (4, 4), (0.353553, 0.353553)),
    (greedy(2), 64, 64, (4, 2), (0.353553, 0.176777)),
    (Monarch(blocks=4), 64, 64, (2, 2), (0.25, 0.25)),
    (greedy(1), 256, 64, (4, 4), None),
    (greedy(2), 256, 64, (4, 2), (0.353553, 0.25)),
    (Monarch(blocks=4), 256, 64, (2, 2), None),
    (LowRank(rank=8), 64, 256, (0.5, 16), (0.0110485, 0.353553)),
    (greedy(1), 64, 256, (8, 8), (0.176777, 0.176777)),
    (greedy(2), 64, 256, (8, 4), (0.25, 0.0883883)),
    (Monarch(blocks=4), 64, 256, (2, 8), (0.0625, 0.25)),
    (greedy(1), 3072, 768, (24, 8), (0.25, 0.144338)),
    (BlockTensorTrain(), 3072, 768, (16, 12), None),
]


@pytest.mark.parametrize(("fmt", "m", "n", "rates", "stds"), COMPONENTS, ids=[case_id(case[:3]) for case in COMPONENTS])
def test_component_tables(
    fmt: Format, m: int, n: int, rates: tuple[float, ...], stds: tuple[float, ...] | None
) -> None:
    assert multiplier(fmt, m, n) == pytest.approx(rates)
    if stds is not None:
        assert deviation(fmt, m, n) == pytest.approx(stds, rel=1e-4)
    factors = random_factors(fmt, m, n)
    drawn = [float(factors[part.factor].square().mean().sqrt()) for part in fmt.components(m, n)]
    assert drawn == pytest.approx(deviation(fmt, m, n), rel=0.1)


def test_component_shapes_and_outputs() -> None:
    assert {k: spec.shape for k, spec in greedy(1).factors(3072, 768).items()} == {
        "right": (48, 16, 32),
        "left": (32, 48, 96),
    }
    assert {k: spec.shape for k, spec in Monarch(blocks=4).factors(256, 64).items()} == {
        "right": (4, 16, 16),
        "left": (4, 64, 16),
    }
    assert [part.outputs for part in greedy(2).components(3072, 768)] == [48 * 32 * 2, 3072]
    assert [part.outputs for part in Monarch(blocks=4).components(256, 64)] == [64, 256]
    assert [part.outputs for part in LowRank(rank=8).components(256, 64)] == [8, 256]


def test_block_tensor_train_errors() -> None:
    square = numpy_normal(0, 64, 64)
    errors = (0.787204, 0.611106, 0.457434, 0.319815, 0.208035, 0.110294, 0.038609, 0)
    assert [relative_error(BlockTensorTrain(rank=r), square) for r in range(1, 9)] == pytest.approx(errors, abs=1e-6)
    for rank, error in ((1, 0.784590), (2, 0.610042), (4, 0.331015)):
        budget = Budget(parameters=BlockTensorTrain(rank=rank).cost(64, 64).parameters)
        assert relative_error(LowRank().sized(64, 64, budget), square) == pytest.approx(error, abs=1e-6)
    wide = numpy_normal(1, 96, 48)
    for grid, errors in (
        ((8, 12, 8, 6), (0.789861, 0.604585, 0.439477)),
        ((12, 8, 6, 8), (0.785502, 0.603726, 0.447607)),
    ):
        found = [
            relative_error(BlockTensorTrain(rank=r, out_factors=grid[:2], in_factors=grid[2:]), wide) for r in (1, 2, 3)
        ]
        assert found == pytest.approx(errors, abs=1e-6)


def test_entry_formulas() -> None:
    fmt, m, n = BlockTensorTrain(rank=2, out_factors=(3, 2), in_factors=(2, 4)), 6, 8
    f = random_factors(fmt, m, n)
    right, left = f["right"].view(2, 4, 3, 2), f["left"].view(3, 2, 2, 2)  # (j1, j0, i0, s), (i0, j1, s, i1)
    assert torch.allclose(torch.einsum("cdas,acsb->abcd", right, left).reshape(m, n), fmt.dense(f, m, n))
    monarch = Monarch(blocks=3, rank=2)
    f = random_factors(monarch, 6, 12)  # right (k, q, p), left (l, s, r)
    dense = torch.zeros(6, 12, dtype=F64)
    for a in range(3):
        for sigma in range(2):
            for c in range(3):
                for t in range(6):
                    if (c * 6 + t) % 3 == a:
                        weight = f["left"][a, sigma, (c * 6 + t) // 3]
                        dense[sigma * 3 + a, c * 4 : c * 4 + 4] += weight * f["right"][c, t]
    assert torch.allclose(dense, monarch.dense(f, 6, 12))


def test_monarch_is_block_tensor_train_in_another_output_order() -> None:
    b, rank, m, n = 3, 2, 12, 15
    monarch, btt = Monarch(blocks=b, rank=rank), BlockTensorTrain(rank=rank, out_factors=(b, 4), in_factors=(b, 5))
    assert monarch.cost(m, n) == btt.cost(m, n)
    mine = random_factors(monarch, m, n)
    right = mine["right"].view(b, rank, b, 5)  # (c, u, a, i): hidden unit u b + a
    left = mine["left"].view(b, 4, b, rank)  # (a, sigma, c, u)
    theirs = {
        "right": right.permute(0, 3, 2, 1).reshape(b, 5, b * rank),
        "left": left.permute(0, 2, 3, 1).reshape(b, b * rank, 4),
    }
    order = torch.arange(m).view(4, b).T.ravel()  # output a * 4 + sigma is row sigma * b + a
    assert torch.allclose(btt.dense(theirs, m, n), monarch.dense(mine, m, n)[order])
    # So are their optima, through Permuted as well.
    target = gaussian(m, n)
    assert torch.allclose(fitted(btt, target[order]), fitted(monarch, target)[order], atol=1e-12)
    wrapped = Permuted(btt)
    held = {
        "input_order": torch.arange(n),
        "output_order": order.argsort(),
        **{f"inner_{k}": v for k, v in theirs.items()},
    }
    assert torch.allclose(wrapped.dense(held, m, n), monarch.dense(mine, m, n))


def test_low_rank_is_block_tensor_train_of_one_block() -> None:
    target, rank = gaussian(10, 14), 3
    btt = BlockTensorTrain(rank=rank, out_factors=(1, 10), in_factors=(1, 14))
    assert btt.cost(10, 14).parameters == LowRank(rank=rank).cost(10, 14).parameters
    metric = ill_conditioned(14, condition=1e3)
    for given in (None, metric):
        assert torch.allclose(fitted(btt, target, given), fitted(LowRank(rank=rank), target, given), atol=1e-9)
    assert torch.allclose(fitted(Monarch(blocks=1, rank=rank), target), fitted(LowRank(rank=rank), target), atol=1e-10)


def test_every_matrix_is_block_tensor_train_with_thin_blocks() -> None:
    target = gaussian(12, 10)
    assert relative_error(BlockTensorTrain(rank=1, out_factors=(12, 1), in_factors=(2, 5)), target) < 1e-14
    assert relative_error(BlockTensorTrain(rank=1, out_factors=(3, 4), in_factors=(10, 1)), target) < 1e-14
    assert relative_error(BlockTensorTrain(rank=4, out_factors=(3, 4), in_factors=(2, 5)), target) < 1e-14


def test_kronecker_products_are_block_tensor_train() -> None:
    a, b = gaussian(3, 4), gaussian(5, 2, seed=1)  # (n1, m1), (n0, m0)
    target = torch.kron(a, b).view(3, 5, 8).transpose(0, 1).reshape(15, 8)  # b's row index major
    fmt = BlockTensorTrain(rank=1, out_factors=(5, 3), in_factors=(4, 2))
    assert relative_error(fmt, target) < 1e-14
    assert relative_error(fmt, torch.kron(a, b)) > 0.1
    factors = {"right": b.T.expand(4, 2, 5), "left": a.T.expand(5, 4, 3)}
    assert torch.allclose(fmt.dense(factors, 15, 8), target)


def test_rank_of_block_tensor_train() -> None:
    for pairs, expected in ((((2, 8), (2, 6)), 4), (((8, 2), (6, 2)), 12), (((2, 8), (4, 3)), 8)):
        fmt = BlockTensorTrain(rank=1, out_factors=pairs[0], in_factors=pairs[1])
        dense = fmt.dense(random_factors(fmt, 16, 12), 16, 12)
        assert torch.linalg.matrix_rank(dense) == expected == min(16, 12, pairs[0][0] * pairs[1][0])


# ---- low rank and light --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10)], ids=str)
def test_low_rank_light(shape: tuple[int, int]) -> None:
    m, n = shape
    target = gaussian(m, n)
    for rank in range(1, min(m, n) + 1):
        light, plain = LowRankLight(rank=rank), LowRank(rank=rank)
        assert light.cost(m, n).parameters == rank * (m + n - rank)
        assert m * n - light.cost(m, n).parameters == (m - rank) * (n - rank)
        assert plain.cost(m, n).parameters - light.cost(m, n).parameters == rank**2
        for metric in (None, ill_conditioned(n, condition=1e3)):
            factors = light.fit(target, metric)
            assert torch.allclose(light.dense(factors, m, n), fitted(plain, target, metric), atol=1e-9)
            assert factors["rest"].numel() == 0 or factors["rest"].abs().max() <= 1.05 + 1e-9
            assert torch.equal(light.dense(factors, m, n)[:, factors["order"][:rank]], factors["left"])
    assert relative_error(LowRankLight(rank=min(m, n)), target) < 1e-13


def test_low_rank_light_of_inputs_that_repeat() -> None:
    # Neighbouring inputs almost equal: the first k columns would be a hopeless choice.
    smooth = gaussian(24, 6) @ torch.sin(torch.arange(1, 7)[:, None] * torch.linspace(0, 3, 40, dtype=F64))
    target = smooth + 1e-3 * gaussian(24, 40, seed=1)
    factors = LowRankLight(rank=6).fit(target)
    assert factors["rest"].abs().max() <= 1.05 + 1e-9
    dense = LowRankLight(rank=6).dense(factors, 24, 40)
    assert squared_norm(target - dense, None) == pytest.approx(tail(target, 6), rel=1e-9)


@pytest.mark.parametrize("metric", [None, ill_conditioned(12, condition=1e4)], ids=["plain", "metric"])
def test_low_rank_is_the_truncated_svd(metric: Metric | None) -> None:
    target = gaussian(10, 12)
    weighted = target if metric is None else target @ metric.root
    for rank in range(1, 11):
        factors = LowRank(rank=rank).fit(target, metric)
        error = squared_norm(target - factors["left"] @ factors["right"], metric)
        assert error == pytest.approx(tail(weighted, rank), rel=1e-7, abs=1e-12)
        gram = factors["left"].T @ factors["left"]
        assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-10)
        assert torch.allclose(gram.diagonal(), factors["right"].square().sum(1), rtol=1e-10)


# ---- other orders --------------------------------------------------------------------------------------------------


def test_low_rank_is_the_same_in_any_order() -> None:
    target, metric = gaussian(10, 12), ill_conditioned(12, condition=1e3)
    fmt, inner = Permuted(LowRank(rank=3)), LowRank(rank=3)
    start = random_factors(fmt, 10, 12, seed=5)
    assert start["input_order"].tolist() != sorted(start["input_order"].tolist())
    for given in (None, metric):
        best = fitted(inner, target, given)
        assert torch.allclose(fitted(fmt, target, given), best, atol=1e-9)
        ordered = fmt.fit(target, given, start=start)
        assert torch.equal(ordered["input_order"], start["input_order"])
        assert torch.equal(ordered["output_order"], start["output_order"])
        assert torch.allclose(fmt.dense(ordered, 10, 12), best, atol=1e-9)


def test_trying_orders_keeps_the_best() -> None:
    inner, target, metric = Monarch(blocks=3, rank=1), gaussian(9, 9), ill_conditioned(9, condition=1e2)
    fmt = Permuted(inner)
    for given, seed in itertools.product((None, metric), range(4)):
        errors: list[float] = []
        log = errors.append
        found = fitted(
            fmt, target, given, trials=5, generator=generator(seed), on_step=lambda _, error, log=log: log(error)
        )
        assert len(errors) == 6
        assert errors[0] == pytest.approx(
            squared_norm(target - fitted(Monarch(blocks=3, rank=1), target, given), given)
        )
        assert squared_norm(target - found, given) == pytest.approx(min(errors), rel=1e-9)
