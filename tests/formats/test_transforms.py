"""Known answers of transforms: Fourier matrices as Monarchs, circulants, BlockShuffle, orthonormal starts, products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from isogrid import (
    Blast,
    BlockTensorChain,
    Budget,
    BudgetError,
    Capped,
    Circulant,
    Dense,
    Format,
    IsogridError,
    LowRank,
    Monarch,
    Permuted,
    Product,
    StructuredLinear,
    TensorTrain,
    convert,
)
from isogrid.fitting import squared_norm
from isogrid.formats import as_format, block_shuffle, format_from_dict, new_factors, rank_one_monarch
from isogrid.formats.circulant import _transform_rank
from isogrid.formats.sizes import stride_order
from tests.formats.cases import gaussian, generator, ill_conditioned, random_factors

BOUNDS = [(torch.float64, 1e-12), (torch.float32, 1e-6)]


def fourier(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """``(2n, n)``: real over imaginary parts of the unitary Fourier matrix, by torch.fft."""
    matrix = torch.fft.fft(torch.eye(n, dtype=torch.float64), norm="ortho").mT
    return torch.cat([matrix.real, matrix.imag]).to(dtype)


def dense_layer(matrix: Tensor) -> StructuredLinear:
    """A layer that holds just this matrix."""
    return StructuredLinear.from_factors(Dense(), {"matrix": matrix}, *matrix.shape)


def stride(n: int, blocks: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Rows as they are, inputs dealt out."""
    return [(torch.arange(rows), stride_order(n, blocks))]


# ---- the Fourier transform -----------------------------------------------------------------------------------------


def test_stride_order_deals_out() -> None:
    assert stride_order(6, 2).tolist() == [0, 2, 4, 1, 3, 5]
    assert stride_order(6, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.equal(stride_order(12, 4)[stride_order(12, 3)], torch.arange(12))
    for blocks in (0, 4):
        with pytest.raises(IsogridError, match="6 things"):
            stride_order(6, blocks)


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize(("n", "blocks"), [(16, 4), (16, 8), (36, 6), (64, 8), (24, 4), (24, 6), (30, 5)])
def test_fourier_transform_is_a_permuted_monarch(n: int, blocks: int, dtype: torch.dtype, bound: float) -> None:
    layer = dense_layer(fourier(n, dtype))
    found, error = convert(layer, Permuted(Monarch(blocks)), orders=stride(n, blocks, 2 * n))
    assert error <= bound
    assert found.format == Permuted(Monarch(blocks, rank=_transform_rank(n, blocks)))
    x = gaussian(5, n, dtype=dtype)
    y = torch.fft.fft(x.double(), norm="ortho")
    wish = torch.cat([y.real, y.imag], dim=-1)
    assert (found(x).double() - wish).norm() <= bound * wish.norm()
    assert (found.weight.double() - fourier(n)).norm() <= bound * math.sqrt(n)


def test_square_sizes_take_rank_two_and_the_saving_is_that_of_a_monarch() -> None:
    found, _ = convert(dense_layer(fourier(64)), Permuted(Monarch(8)), orders=stride(64, 8, 128))
    assert found.format == Permuted(Monarch(8, rank=2))
    assert found.cost().parameters == 2 * 8 * 8 * (16 + 8)


@pytest.mark.parametrize("blocks", [4, 8])
def test_without_the_permutation_the_transform_is_far_from_monarch(blocks: int) -> None:
    # The best complex error is sqrt(1 - 1/b) exactly; two real directions stand for one complex.
    n = blocks * blocks
    matrix = torch.fft.fft(torch.eye(n, dtype=torch.complex128), norm="ortho")
    slices = matrix.view(blocks, blocks, blocks, blocks).permute(1, 2, 0, 3)
    tail = torch.linalg.svdvals(slices)[..., 1:].square().sum().sqrt() / matrix.norm()
    assert float(tail) == pytest.approx({4: 0.866025, 8: 0.935414}[blocks], abs=1e-6)
    fmt = Permuted(Monarch(blocks, rank=2))
    assert convert(dense_layer(fourier(n)), fmt)[1] > 0.5
    assert convert(dense_layer(fourier(n)), fmt, orders=stride(n, blocks, 2 * n))[1] <= 1e-12


def test_orders_are_tried_besides_the_natural_one_and_checked() -> None:
    fmt = Permuted(Monarch(4, rank=1))
    matrix = fmt.dense(random_factors(fmt, 16, 16), 16, 16)
    natural = fmt.fit(matrix)
    assert torch.equal(natural["input_order"], torch.arange(16, dtype=torch.int32))
    mine = random_factors(fmt, 16, 16)
    tried = fmt.fit(matrix, orders=[(mine["output_order"], mine["input_order"])])
    assert (fmt.dense(tried, 16, 16) - matrix).norm() <= 1e-12 * matrix.norm()
    # From a start: its order and the given ones.
    again = fmt.fit(matrix, start=natural, orders=[(mine["output_order"], mine["input_order"])])
    assert torch.equal(again["input_order"], mine["input_order"])
    with pytest.raises(IsogridError, match="each of 0 … 15 once"):
        fmt.fit(matrix, orders=[(torch.zeros(16, dtype=torch.long), torch.arange(16))])


# ---- circulants ----------------------------------------------------------------------------------------------------


def test_circulant_by_hand() -> None:
    kernel = {"kernel": torch.tensor([1.0, 2, 3, 4])}
    fmt = Circulant()
    assert fmt.dense(kernel, 4, 4).tolist() == [[1, 4, 3, 2], [2, 1, 4, 3], [3, 2, 1, 4], [4, 3, 2, 1]]
    assert fmt.dense(kernel, 4, 2).tolist() == [[1, 4], [2, 1], [3, 2], [4, 3]]
    assert fmt.dense(kernel, 2, 4).tolist() == [[1, 4, 3, 2], [2, 1, 4, 3]]


def test_circulant_is_what_the_transform_diagonalises() -> None:
    factors = random_factors(Circulant(), 15, 15)
    matrix = Circulant().dense(factors, 15, 15).to(torch.complex128)
    transform = torch.fft.fft(torch.eye(15, dtype=torch.complex128), norm="ortho")
    spectrum = transform @ matrix @ transform.conj().T
    assert (spectrum - torch.diag(torch.fft.fft(factors["kernel"]))).norm() <= 1e-13 * spectrum.norm()


def test_circulant_costs_its_transforms() -> None:
    # Two transforms of 1024: 2 · 5/2 · 1024 · 10 operations; 513 complex products of 4 multiply-adds.
    assert Circulant().cost(1024, 1024).multiply_adds == 25600 + 4 * 513
    assert Circulant().cost(1024, 700).parameters == 1024
    assert Circulant().cost(1, 1).multiply_adds >= 1


@pytest.mark.parametrize("shape", [(8, 8), (9, 5), (5, 9)], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "metric"])
def test_circulant_fit_is_the_least_squares_solution(shape: tuple[int, int], weighted: bool) -> None:
    m, n = shape
    target = gaussian(m, n)
    metric = ill_conditioned(n, condition=1e4) if weighted else None
    root = metric.root if metric is not None else torch.eye(n, dtype=torch.float64)
    size = max(m, n)
    bases = [Circulant().dense({"kernel": unit}, m, n) for unit in torch.eye(size, dtype=torch.float64)]
    design = torch.stack([(base @ root).flatten() for base in bases], dim=1)
    wish = torch.linalg.lstsq(design, (target @ root).flatten().unsqueeze(1), driver="gelsd").solution.squeeze(1)
    found = Circulant().fit(target, metric)["kernel"]
    assert (found - wish).norm() <= 1e-9 * wish.norm()
    projected = Circulant().fit(target, metric, solver="projection")["kernel"]
    assert torch.equal(projected, Circulant().fit(target)["kernel"])


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("n", [1, 2, 4, 7, 12, 16, 30, 64, 100])
def test_a_circulant_is_a_product_of_two_permuted_monarchs(n: int, dtype: torch.dtype, bound: float) -> None:
    layer = StructuredLinear(n, n, "circulant", dtype=dtype)
    torch.nn.init.normal_(layer.bias)
    found, error = convert(layer, "product(parts=[permuted, permuted])")
    assert error <= bound
    assert isinstance(found.format, Product)
    assert found.format.widths == (2 * n,)
    x = gaussian(5, n, dtype=dtype)
    assert (found(x) - layer(x)).norm() <= bound * layer(x).norm()
    if math.isqrt(n) ** 2 == n and n > 4:
        assert found.format.parts == (Permuted(Monarch(math.isqrt(n), rank=2)),) * 2


def test_blocks_of_the_product_may_be_given() -> None:
    layer = StructuredLinear(48, 48, "circulant", dtype=torch.float64)
    found, error = convert(layer, Product((Permuted(Monarch(8)), Permuted(Monarch(12))), widths=(96,)))
    assert error <= 1e-12
    assert found.format == Product((Permuted(Monarch(8, rank=3)), Permuted(Monarch(12, rank=2))), widths=(96,))


def test_ranks_of_the_transform_are_the_smallest() -> None:
    for n in range(1, 41):
        for blocks in (d for d in range(1, n + 1) if n % d == 0):
            matrix = fourier(n)[:, stride_order(n, blocks)]
            slices = matrix.view(2 * n // blocks, blocks, blocks, n // blocks).permute(1, 2, 0, 3)
            assert int(torch.linalg.matrix_rank(slices, tol=1e-9).max()) == _transform_rank(n, blocks), (n, blocks)


# ---- BlockShuffle, rank-one Monarch, the orthonormal start ---------------------------------------------------------

SHUFFLES = [
    ((4, 4), (2, 2, 2), (2, 2, 2), [[1, 2, 10, 12], [15, 20, 42, 48], [3, 6, 20, 24], [21, 28, 56, 64]]),
    (
        (6, 4),
        (2, 2, 2),
        (2, 3, 2),
        [[1, 2, 10, 12], [21, 28, 56, 64], [3, 6, 20, 24], [27, 36, 70, 80], [5, 10, 30, 36], [33, 44, 84, 96]],
    ),
    (
        (4, 6),
        (2, 2, 3),
        (2, 2, 2),
        [[1, 2, 3, 14, 16, 18], [20, 25, 30, 60, 66, 72], [3, 6, 9, 28, 32, 36], [28, 35, 42, 80, 88, 96]],
    ),
]


@pytest.mark.parametrize(("shape", "right", "left", "matrix"), SHUFFLES, ids=[str(case[0]) for case in SHUFFLES])
def test_block_shuffle_by_hand(
    shape: tuple[int, int], right: tuple[int, ...], left: tuple[int, ...], matrix: list[list[int]]
) -> None:
    def counted(sizes: tuple[int, ...]) -> Tensor:
        return torch.arange(1.0, math.prod(sizes) + 1).view(sizes)

    fmt = as_format("block_shuffle(blocks=2)")
    assert fmt == block_shuffle(2) == Monarch(2) == format_from_dict({"name": "block_shuffle", "blocks": 2})
    assert {name: spec.shape for name, spec in fmt.factors(*shape).items()} == {"right": right, "left": left}
    assert fmt.dense({"right": counted(right), "left": counted(left)}, *shape).tolist() == matrix


def test_aliases_nest_and_refuse() -> None:
    assert as_format("capped(inner=block_shuffle)") == Capped(Monarch())
    assert as_format("rank_one_monarch(blocks=4, out_features=12, in_features=8)") == rank_one_monarch(4, 12, 8)
    with pytest.raises(IsogridError, match="did you mean 'block_shuffle'"):
        as_format("block_shufle")
    with pytest.raises(IsogridError, match=r"block_shuffle.*'rank'"):
        as_format("block_shuffle(rank=3)")
    with pytest.raises(IsogridError, match="missing"):
        as_format("rank_one_monarch(blocks=3)")
    with pytest.raises(IsogridError, match="common divisor"):
        rank_one_monarch(3, 12, 8)


def test_rank_one_monarch_has_strided_slices_of_rank_one() -> None:
    # The thesis' layout: row a · (out / b) + j is place a of slice j.
    m, n, b = 12, 8, 4
    fmt = Permuted(rank_one_monarch(b, m, n))
    target = gaussian(m, n)
    slices = target.view(b, m // b, b, n // b).permute(1, 2, 0, 3)
    tail = torch.linalg.svdvals(slices)[..., 1:].square().sum()
    orders = [(stride_order(m, b), torch.arange(n))]
    strided = fmt.fit(target, start=fmt.fit(target) | {"output_order": orders[0][0].int()})
    assert squared_norm(target - fmt.dense(strided, m, n), None) == pytest.approx(float(tail))
    best = squared_norm(target - fmt.dense(fmt.fit(target, orders=orders), m, n), None)
    natural = squared_norm(target - fmt.dense(fmt.fit(target), m, n), None)
    assert best == pytest.approx(min(natural, float(tail)))


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (30, 30)], ids=str)
@pytest.mark.parametrize("label", ["block_shuffle(blocks=4)", "block_dense(rank=8, blocks=2)", "low_rank(rank=5)"])
def test_orthonormal_start_has_singular_values_of_one(label: str, shape: tuple[int, int]) -> None:
    layer = StructuredLinear(shape[1], shape[0], label, init="orthonormal", generator=generator())
    for block in layer.factors.values():
        assert (torch.linalg.svdvals(block.detach().double()) - 1).abs().max() <= 1e-6
    assert not layer.bias.any()


@pytest.mark.parametrize(("shape", "gain"), [((256, 64), 0.501), ((64, 256), 0.997)], ids=str)
def test_orthonormal_block_shuffle_has_the_documented_gain(shape: tuple[int, int], gain: float) -> None:
    # RMS(y) / RMS(x) of white inputs, measured on the reference (Wei et al. 2024).
    layer = StructuredLinear(shape[1], shape[0], "block_shuffle(blocks=4)", init="orthonormal", generator=generator())
    matrix = layer.dense().detach()
    assert float(matrix.square().sum() / shape[0]) ** 0.5 == pytest.approx(gain, rel=0.01)
    assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(1, abs=1e-5)


def test_orthonormal_start_survives_the_meta_device() -> None:
    layer = StructuredLinear(12, 12, "monarch(blocks=2)", init="orthonormal", device="meta")
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters(generator())
    assert torch.allclose(torch.linalg.svdvals(layer.factors["right"].detach()), torch.ones(2, 6), atol=1e-6)


@pytest.mark.parametrize("fmt", [Circulant(), Permuted(Circulant()), Product((Circulant(), Circulant()))], ids=str)
def test_orthonormal_circulants_are_orthogonal(fmt: Format) -> None:
    layer = StructuredLinear(12, 12, fmt, init="orthonormal", dtype=torch.float64)
    matrix = layer.dense().detach()
    assert (matrix @ matrix.mT - torch.eye(12)).norm() <= 1e-13


@pytest.mark.parametrize("rank", [3, 4], ids=str)  # at 4 the axes of the coupling are all alike
def test_orthonormal_blast_couples_by_orthogonal_matrices(rank: int) -> None:
    layer = StructuredLinear(16, 16, Blast(rank, blocks=4), init="orthonormal", generator=generator())
    factors = {name: value.detach().double() for name, value in layer.factors.items()}
    for stack in (factors["right"], factors["left"], factors["coupling"].permute(2, 0, 1)):
        assert (torch.linalg.svdvals(stack) - 1).abs().max() <= 1e-6


def test_what_has_no_orthonormal_start_says_so() -> None:
    with pytest.raises(IsogridError, match=r"core0.*no orthonormal start"):
        StructuredLinear(25, 5, BlockTensorChain(rank=1, cores=2), init="orthonormal")
    with pytest.raises(IsogridError, match=r"core0.*no orthonormal start"):
        StructuredLinear(24, 24, TensorTrain(rank=3, cores=3), init="orthonormal")
    with pytest.raises(IsogridError, match="init is 'default' or 'orthonormal', got 'odd'"):
        StructuredLinear(24, 24, "monarch", init="odd")
    capped = StructuredLinear(24, 24, "capped(inner=monarch)", init="orthonormal")
    assert bool((capped.factors["gain_left"] == 1).all())


# ---- products ------------------------------------------------------------------------------------------------------


def test_product_acts_from_the_right() -> None:
    fmt = Product((LowRank(rank=2), Dense()), widths=(3,))
    factors = new_factors(fmt, 5, 4, dtype=torch.float64)
    fmt.initialize(factors, 5, 4, generator())
    assert {name: tuple(value.shape) for name, value in factors.items()} == {
        "part0_right": (2, 4),
        "part0_left": (3, 2),
        "part1_matrix": (5, 3),
    }
    wish = factors["part1_matrix"] @ factors["part0_left"] @ factors["part0_right"]
    assert torch.allclose(fmt.dense(factors, 5, 4), wish)
    assert fmt.cost(5, 4).parameters == 2 * 4 + 3 * 2 + 5 * 3
    assert Product((Dense(), Dense())).shapes(5, 4) == [(4, 4), (5, 4)]


def test_product_knows_whether_it_is_linear_in_its_factors() -> None:
    assert Product((Monarch(), Permuted(Monarch()))).traits.linear_in_factors is False  # Permuted declares nothing
    assert Product((Monarch(), Circulant())).traits.linear_in_factors
    assert not Product.traits.linear_in_factors


def test_product_fits_a_member_and_knows_the_bound_of_its_width() -> None:
    fmt = Product((Dense(), Dense()), widths=(3,))
    target = gaussian(10, 8)
    factors, report = fmt.fit_and_report(target)
    best = torch.linalg.svdvals(target)[3:].square().sum()
    assert report.objective == pytest.approx(float(best), rel=1e-6)
    assert report.lower_bound == pytest.approx(float(best), rel=1e-12)
    member = fmt.dense(factors, 10, 8)
    assert squared_norm(member - fmt.dense(fmt.fit(member), 10, 8), None) <= 1e-12 * squared_norm(member, None)
    assert Product((Dense(), Dense())).lower_bound(target, None) is None


def test_product_shares_by_size_and_leaves_nothing_a_part_could_use() -> None:
    fmt = Product((LowRank(), LowRank()), widths=(64,))
    for percent in range(10, 130, 7):
        budget = Budget(parameters=percent * 64 * 64 // 100)
        member = fmt.sized(64, 64, budget)
        ranks = [part.rank for part in member.parts if isinstance(part, LowRank)]
        assert abs(ranks[0] - ranks[1]) <= 1
        for i, part in enumerate(member.parts):
            assert isinstance(part, LowRank)
            assert part.rank is not None
            grown = [*member.parts]
            grown[i] = LowRank(part.rank + 1)
            assert not budget.allows(Product(tuple(grown), (64,)).cost(64, 64))
    # A part that takes more than its share still fits, as long as the others can be small.
    uneven = Product((Dense(), LowRank()), widths=(10,)).sized(100, 40, Budget(parameters=520))
    assert uneven.parts == (Dense(), LowRank(rank=1))
    with pytest.raises(BudgetError, match="smallest 100 x 40 member takes 510"):
        Product((Dense(), LowRank()), widths=(10,)).sized(100, 40, Budget(parameters=509))


def test_bad_products_are_refused() -> None:
    for parts in ((), ("monarch",), 3):
        with pytest.raises(IsogridError, match="product: parts"):
            Product(parts)  # type: ignore[arg-type]
    for widths in ((0,), (2.5,), (True,), 4):
        with pytest.raises(IsogridError, match="product: widths are positive"):
            Product((Dense(), Dense()), widths)  # type: ignore[arg-type]
    with pytest.raises(IsogridError, match="2 parts have 1 widths"):
        Product((Dense(), Dense()), (3, 4))
    with pytest.raises(IsogridError, match="product"):
        as_format("product(parts=dense)")
