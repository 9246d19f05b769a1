"""What every format promises by being one: the same properties over all of them, all shapes, all dtypes.

A format registered anywhere is tested here; `tests/formats/cases.py` says over which members. `tests/toy_format.py` is
a format that only has what a format must have.
"""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from isogrid import (
    Armor,
    Budget,
    BudgetError,
    Capped,
    DenseSparse,
    Format,
    IsogridError,
    LowRank,
    LowRankLight,
    Metric,
    Monarch,
    Permuted,
    Stored,
    Sum,
)
from isogrid.fitting import squared_norm
from isogrid.formats import as_format, check_factors, format_from_dict, new_factors, registered
from tests.formats.cases import (
    DTYPES,
    KEEPS,
    SHAPES,
    TOLERANCE,
    Case,
    every_member,
    fit_cases,
    gaussian,
    generator,
    ill_conditioned,
    metrics,
    middle_member,
    over,
    prototypes,
    random_factors,
    sized,
    suits,
    trainable,
    uncounted,
    with_trait,
)

LEADING = ((), (3,), (2, 1, 3), (0,))
NAMES = list(registered())


def test_the_made_up_format_is_among_them() -> None:
    assert "toy_shuffled_groups" in NAMES


# ---- the product ---------------------------------------------------------------------------------------------------


@over(every_member())
def test_product_is_the_dense_product(fmt: Format, m: int, n: int) -> None:
    for dtype in DTYPES:
        factors = random_factors(fmt, m, n, dtype=dtype)
        exact = fmt.dense({k: v.double() if v.is_floating_point() else v for k, v in factors.items()}, m, n)
        dense = fmt.dense(factors, m, n)
        assert dense.shape == (m, n)
        assert dense.dtype == dtype
        assert (dense.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()
        for lead in LEADING:
            x = gaussian(*lead, n, seed=1, dtype=dtype)
            y = fmt.multiply(factors, x, m)
            assert y.shape == (*lead, m)
            assert y.dtype == dtype
            error = (y.double() - x.double() @ exact.mT).norm()
            assert error <= TOLERANCE[dtype] * (exact.norm() * x.double().norm() + 1e-300)


@over([case for case in every_member() if case[0].formulations()])
def test_every_formulation_is_the_product(fmt: Format, m: int, n: int) -> None:
    factors = random_factors(fmt, m, n)
    for leading in LEADING:
        x = gaussian(*leading, n, seed=1)
        wanted = fmt.multiply(factors, x, m)
        for formulation in fmt.formulations().values():
            torch.testing.assert_close(formulation(factors, x, m), wanted, rtol=1e-12, atol=1e-12)


@over(every_member())
def test_product_of_a_view_that_is_not_contiguous(fmt: Format, m: int, n: int) -> None:
    factors = random_factors(fmt, m, n)
    x = gaussian(n, 3, 2, seed=1).permute(2, 1, 0)
    assert torch.allclose(fmt.multiply(factors, x, m), fmt.multiply(factors, x.contiguous(), m), rtol=1e-12, atol=1e-14)


@over(fit_cases(((4, 5), (7, 3), (1, 4))))
def test_gradcheck(fmt: Format, m: int, n: int) -> None:
    factors = random_factors(fmt, m, n)
    names = trainable(fmt, m, n)

    def product(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return fmt.multiply(factors | dict(zip(names, values, strict=True)), x, m)

    x = gaussian(2, n, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(product, (x, *(factors[k].requires_grad_() for k in names)))


@over(every_member())
def test_gradient_is_that_of_the_dense_path(fmt: Format, m: int, n: int) -> None:
    factors = random_factors(fmt, m, n)
    names = trainable(fmt, m, n)
    leaves = [gaussian(4, n, seed=1).requires_grad_(), *(factors[k].requires_grad_() for k in names)]
    weights = gaussian(4, m, seed=2)
    structured = torch.autograd.grad((fmt.multiply(factors, leaves[0], m) * weights).sum(), leaves, allow_unused=True)
    dense = torch.autograd.grad((leaves[0] @ fmt.dense(factors, m, n).mT * weights).sum(), leaves, allow_unused=True)
    for name, mine, reference in zip(["x", *names], structured, dense, strict=True):
        assert mine is not None, f"{name} gets no gradient"
        assert reference is not None, f"{name} gets no gradient through the dense matrix"
        assert torch.allclose(mine, reference, rtol=1e-10, atol=1e-12), name


# ---- cost and budget -----------------------------------------------------------------------------------------------


@over(every_member())
def test_cost_is_what_is_counted(fmt: Format, m: int, n: int) -> None:
    specs = fmt.factors(m, n)
    for dtype in DTYPES:
        factors = new_factors(fmt, m, n, dtype=dtype)
        cost = fmt.cost(m, n, dtype)
        assert cost.parameters == sum(factors[k].numel() for k, spec in specs.items() if spec.trainable)
        assert cost.bits == 8 * sum(value.nbytes for value in factors.values())
        assert cost.bytes == sum(value.nbytes for value in factors.values())
        assert all(factors[k].is_floating_point() for k, spec in specs.items() if spec.trainable)


@over(every_member())
def test_multiply_adds_are_what_is_executed(fmt: Format, m: int, n: int) -> None:
    factors = random_factors(fmt, m, n)
    with FlopCounterMode(display=False) as counter:
        fmt.multiply(factors, gaussian(4, n), m)
    assert counter.get_total_flops() == 2 * 4 * (fmt.cost(m, n).multiply_adds - uncounted(fmt, m, n))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("unit", ["parameters", "bytes", "bytes of bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_sized_is_the_largest_within_the_budget(name: str, unit: str, shape: tuple[int, int]) -> None:
    m, n = shape
    dtype = torch.bfloat16 if unit == "bytes of bfloat16" else torch.float32
    fitted = 0
    for prototype in prototypes(name):
        for percent in (*range(5, 251, 7), 10_000):
            amount = percent * m * n // 100
            if unit == "parameters":
                budget = Budget(parameters=amount)
            else:
                budget = Budget(bytes=amount * dtype.itemsize, dtype=dtype)
            try:
                member = prototype.sized(m, n, budget)
            except BudgetError as error:
                assert f"{m} x {n}" in str(error), "the message names the sizes"  # noqa: PT017
                assert re.search(rf"\d+ {unit.split()[0]}\b", str(error)), error  # noqa: PT017
                continue
            fitted += 1
            assert type(member) is type(prototype)
            member.factors(m, n)
            cost = member.cost(m, n, dtype)
            assert budget.allows(cost)
            assert (cost.parameters if unit == "parameters" else cost.bytes) <= budget.amount(cost)
            if member.size_field is None:
                continue
            size = getattr(member, member.size_field)
            if size < member.size_limit(m, n):
                assert not budget.allows(member.with_size(size + 1).cost(m, n, dtype))
    assert fitted, "no budget suited"


@pytest.mark.parametrize("name", NAMES)
def test_sized_keeps_the_other_hyper_parameters(name: str) -> None:
    for prototype in prototypes(name):
        if prototype.size_field is None:
            continue
        member = prototype.sized(12, 12, Budget(parameters=10**6))
        given, kept = prototype.to_dict(), member.to_dict()
        assert given.keys() == kept.keys()
        assert {k for k in given if given[k] != kept[k]} <= {prototype.size_field}
        assert getattr(member, prototype.size_field) == prototype.size_limit(12, 12)


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_nothing_is_refused(name: str) -> None:
    for budget in (Budget(parameters=0), Budget(bytes=0)):
        with pytest.raises(BudgetError, match="20 x 30"):
            prototypes(name)[0].sized(20, 30, budget)
        assert list(prototypes(name)[0].candidates(20, 30, budget)) == []


@pytest.mark.parametrize("name", NAMES)
def test_candidates_stay_within_the_budget(name: str) -> None:
    for prototype in prototypes(name):
        for budget in (Budget(parameters=400), Budget(bytes=1400), Budget(bytes=900, dtype=torch.bfloat16)):
            for candidate in prototype.candidates(24, 25, budget):
                assert budget.allows(candidate.cost(24, 25, budget.dtype))


@pytest.mark.parametrize("shape", [(24, 20), (13, 17)], ids=str)
def test_a_sized_sum_has_no_term_that_could_grow(shape: tuple[int, int]) -> None:
    # "a last pass spends the rest": no term could take one step more and stay within the budget.
    m, n = shape
    for prototype in prototypes("sum"):
        assert isinstance(prototype, Sum)
        for percent in range(30, 100, 3):
            budget = Budget(parameters=percent * m * n // 100)
            try:
                terms = prototype.sized(m, n, budget).terms
            except BudgetError:
                continue
            for i, term in enumerate(terms):
                if term.size_field is None or getattr(term, term.size_field) >= term.size_limit(m, n):
                    continue
                grown = Sum((*terms[:i], term.with_size(getattr(term, term.size_field) + 1), *terms[i + 1 :]))
                assert not budget.allows(grown.cost(m, n)), f"{Sum(terms).label()}: {term.label()} could grow"


# ---- spelling ------------------------------------------------------------------------------------------------------


@over(every_member())
def test_json_identity(fmt: Format, m: int, n: int) -> None:
    again = format_from_dict(json.loads(json.dumps(fmt.to_dict())))
    assert again == fmt
    assert hash(again) == hash(fmt)
    assert again.factors(m, n) == fmt.factors(m, n)
    assert as_format(fmt) is fmt
    assert as_format(fmt.to_dict()) == fmt


@pytest.mark.parametrize("name", NAMES)
def test_label_is_read_back(name: str) -> None:
    for fmt in dict.fromkeys(fmt for fmt, _, _ in every_member() if fmt.name == name):
        assert as_format(fmt.label()) == fmt


def test_labels_nest_and_show_every_number() -> None:
    assert Monarch().label().startswith("monarch(blocks=")
    nested = as_format("permuted(inner=sum(terms=[low_rank(rank=3), monarch(blocks=2)]))")
    assert nested == Permuted(Sum((LowRank(rank=3), Monarch(blocks=2))))
    assert as_format("capped(inner=low_rank)") == Capped(LowRank())


def test_unknown_names_and_hyper_parameters_are_refused() -> None:
    with pytest.raises(IsogridError, match="did you mean 'monarch'"):
        as_format("monach")
    with pytest.raises(IsogridError, match=r"known: .*dense"):
        as_format("zzzzzzzzz")
    with pytest.raises(IsogridError, match=r"'monarch' has no 'block'; it has: blocks, rank"):
        as_format("monarch(block=3)")
    with pytest.raises(IsogridError, match="check its brackets"):
        as_format("monarch(blocks=3")
    with pytest.raises(IsogridError, match=r"__import__\('os'\)\W+is not key=value"):
        as_format("monarch(__import__('os'))")
    with pytest.raises(IsogridError, match="is not a value"):
        as_format("monarch(blocks=1+x)")
    with pytest.raises(IsogridError, match="of the form name"):
        as_format("(monarch)")
    with pytest.raises(IsogridError, match="not key=value"):
        as_format("monarch(3)")
    with pytest.raises(IsogridError, match="got int"):
        as_format(3)  # type: ignore[arg-type]
    with pytest.raises(IsogridError, match="object with a name"):
        format_from_dict({"blocks": 3})
    with pytest.raises(IsogridError, match="exists"):
        type("Impostor", (LowRank,), {"name": "monarch"})


@pytest.mark.parametrize(
    "text",
    [
        "monarch(blocks=0)",
        "monarch(blocks=2.5)",
        "monarch(rank=0)",
        "block_tensor_train(rank=0)",
        "block_tensor_train(rank=null)",
        "block_tensor_train(factorization=odd)",
        "low_rank(rank=0)",
        "low_rank(rank=1.5)",
        "low_rank_light(rank=-1)",
        "low_rank(rank=two)",
    ],
)
def test_bad_hyper_parameters_are_refused(text: str) -> None:
    with pytest.raises(IsogridError, match=text.partition("(")[0]):
        as_format(text).factors(12, 12)


@over(every_member())
def test_foreign_factors_are_refused(fmt: Format, m: int, n: int) -> None:
    factors = new_factors(fmt, m, n)
    check_factors(fmt, factors, m, n)
    first = next(iter(factors))
    with pytest.raises(IsogridError, match=re.escape(fmt.name)):
        check_factors(fmt, {k: v for k, v in factors.items() if k != first}, m, n)
    with pytest.raises(IsogridError, match=first):
        check_factors(fmt, factors | {first: torch.zeros(3, 1, 4, 1, 5)}, m, n)


# ---- the start -----------------------------------------------------------------------------------------------------


@over(every_member())
def test_start_is_drawn_from_the_generator_alone(fmt: Format, m: int, n: int) -> None:
    def start(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        factors = new_factors(fmt, m, n, dtype=dtype)
        for value in factors.values():
            value.fill_(77)
        fmt.initialize(factors, m, n, generator(seed))
        return factors

    before = torch.get_rng_state()
    one, same, other = start(0), start(0), start(1)
    assert torch.equal(torch.get_rng_state(), before), "torch's global generator was used"
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)
    assert all(torch.isfinite(v.double()).all() for v in one.values())
    assert all((v.double() != 77).any() for v in one.values() if v.numel())
    coarse = start(0, torch.bfloat16)  # at most two roundings of 2⁻⁸: drawn, then scaled
    assert all(torch.allclose(coarse[k].float(), one[k].float(), rtol=2**-7) for k in one), "same numbers in any dtype"


def assert_same_fit(fmt: Format, one: Tensor, other: Tensor, target: Tensor) -> None:
    """The same matrix; where rounding decides between restarts that end in different minima, the same error."""
    if fmt.traits.exact_on_members:
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-10)
    else:
        errors = [float((target - matrix).norm()) for matrix in (one, other)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


def expected_gain(fmt: Format, m: int, n: int) -> float:
    """RMS of the outputs for white inputs of RMS one."""
    if isinstance(fmt, LowRankLight):
        return 1.0  # its own start: the inputs that pass through have this RMS already
    if isinstance(fmt, Stored):
        return expected_gain(fmt.inner, m, n)  # codes lose little of the numbers' size
    if isinstance(fmt, Sum):
        return math.sqrt(sum(expected_gain(term, m, n) ** 2 for term in fmt.terms) / len(fmt.terms))
    if isinstance(fmt, DenseSparse):  # the codes are no dense stage, but start as one
        (atoms,) = fmt.components(m, n)
        return min(1.0, math.sqrt(atoms.fan_out / atoms.fan_in)) * min(1.0, math.sqrt(m / atoms.outputs))
    if isinstance(fmt, Armor) or not fmt.components(m, n):  # its blocks are square, and a core is no dense stage
        return min(1.0, math.sqrt(m / n))  # no dense stage of its own: as a dense matrix starts
    return math.prod(min(1.0, math.sqrt(part.fan_out / part.fan_in)) for part in fmt.components(m, n))


@pytest.mark.parametrize("shape", [(256, 256), (256, 64), (64, 256)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_start_has_the_variance_its_components_promise(name: str, shape: tuple[int, int]) -> None:
    # Qiu et al. 2024, section 3.2: RMS(y) / RMS(x) = prod min(1, sqrt(fan_out / fan_in)).
    m, n = shape
    fmt = middle_member(name, m, n, keep=0.4)
    square = 0.0
    for seed in range(6):
        factors = new_factors(fmt, m, n, dtype=torch.float64)
        fmt.initialize(factors, m, n, generator(seed))
        square += float(fmt.dense(factors, m, n).square().sum()) / m / 6
    assert math.sqrt(square) == pytest.approx(expected_gain(fmt, m, n), rel=0.06)


@over(every_member())
def test_components_describe_factors(fmt: Format, m: int, n: int) -> None:
    specs = fmt.factors(m, n)
    for part in fmt.components(m, n):
        spec = specs[part.factor]
        assert spec.trainable
        blocks = part.outputs // part.fan_out
        assert part.outputs % part.fan_out == 0
        # A weight that serves several blocks (Kronecker products, tensor trains) counts once for each.
        assert blocks * part.fan_in * part.fan_out % spec.numel == 0
        if fmt.cost(m, n).multiply_adds == fmt.cost(m, n).parameters:
            assert blocks * part.fan_in * part.fan_out == spec.numel


# ---- the fit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over(fit_cases())
def test_fit_keeps_dtype_device_and_target(fmt: Format, m: int, n: int, dtype: torch.dtype) -> None:
    target = gaussian(m, n, dtype=dtype).requires_grad_()
    untouched = target.detach().clone()
    factors = fmt.fit(target)
    check_factors(fmt, factors, m, n)
    for name, spec in fmt.factors(m, n).items():
        value = factors[name]
        assert value.dtype == (spec.dtype or dtype)
        assert value.device == target.device
        assert value.is_contiguous()
        assert not value.requires_grad
        assert value.untyped_storage().data_ptr() != target.untyped_storage().data_ptr(), "factors alias the target"
    assert torch.equal(target, untouched)
    error = (target.double() - fmt.dense(factors, m, n).double()).norm()
    assert error < target.double().norm()


@over(fit_cases())
def test_fit_is_deterministic(fmt: Format, m: int, n: int) -> None:
    target = gaussian(m, n)
    for metric in (None, ill_conditioned(n, condition=1e2)):
        before = torch.get_rng_state()
        one = fmt.fit(target, metric)
        assert torch.equal(torch.get_rng_state(), before), "torch's global generator was used"
        torch.rand(3)
        again = fmt.fit(target.clone(), metric)
        assert all(torch.equal(one[k], again[k]) for k in one)
    seeded = [fmt.fit(target, generator=generator(3)) for _ in range(2)]
    assert all(torch.equal(seeded[0][k], seeded[1][k]) for k in seeded[0])


@over([case for case in fit_cases() if type(case[0]).solve is not Format.solve])  # descent ends where rounding sends it
def test_fit_of_a_transposed_view(fmt: Format, m: int, n: int) -> None:
    target = gaussian(n, m).mT
    one, other = (fmt.dense(fmt.fit(t), m, n) for t in (target, target.contiguous()))
    assert_same_fit(fmt, one, other, target)


@over(fit_cases())
def test_bad_targets_are_refused(fmt: Format, m: int, n: int) -> None:
    target = gaussian(m, n)
    broken = target.clone()
    broken[0, 0], broken[-1, -1] = math.nan, math.inf
    with pytest.raises(IsogridError, match="2 NaN or infinite"):
        fmt.fit(broken)
    with pytest.raises(IsogridError, match=re.escape(str((2, m, n)))):
        fmt.fit(target.expand(2, m, n))
    with pytest.raises(IsogridError, match=r"floating matrix.*\(5,\)"):
        fmt.fit(target.new_zeros(5))
    with pytest.raises(IsogridError, match="int64"):
        fmt.fit(target.long())
    with pytest.raises(IsogridError, match=f"{n + 1} inputs, the target has {n}"):
        fmt.fit(target, Metric(torch.eye(n + 1)))
    with pytest.raises(IsogridError, match=r"no solver 'magic'; it has: default|unknown solver 'magic'"):
        fmt.fit(target, solver="magic")
    with pytest.raises(IsogridError, match=f"{fmt.name}: its fit has no option 'colour'"):
        fmt.fit(target, colour=3)


@over(fit_cases(((10, 12), (13, 7), (1, 9), (9, 1))))
def test_fit_of_zero_is_zero(fmt: Format, m: int, n: int) -> None:
    for metric in metrics(n):
        factors = fmt.fit(torch.zeros(m, n, dtype=torch.float64), metric)
        assert all(torch.isfinite(v.double()).all() for v in factors.values())
        assert fmt.dense(factors, m, n).abs().max() <= 1e-12


@over(fit_cases())
def test_fit_of_a_rank_deficient_matrix(fmt: Format, m: int, n: int) -> None:
    target = gaussian(m, 1) @ gaussian(1, n, seed=1)
    target[2] = 0
    for metric in metrics(n):
        factors = fmt.fit(target, metric)
        assert all(torch.isfinite(v.double()).all() for v in factors.values())
        assert squared_norm(target - fmt.dense(factors, m, n), metric) <= squared_norm(target, metric)


@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=str)
@over([case for case in fit_cases(((10, 12),)) if type(case[0]).solve is not Format.solve])
def test_fit_does_not_depend_on_the_scale(fmt: Format, m: int, n: int, scale: float) -> None:
    target = gaussian(m, n)
    one, scaled = (fmt.dense(fmt.fit(t), m, n) for t in (target, scale * target))
    assert_same_fit(fmt, one, scaled / scale, target)


@over(fit_cases())
def test_a_fitted_factor_is_no_larger_than_needed(fmt: Format, m: int, n: int) -> None:
    # Factors that cancel would overflow in half precision: the reason for balanced splits.
    target = gaussian(m, n)
    for metric in metrics(n):
        factors = fmt.fit(1e4 * target, metric)
        largest = max(float(v.abs().max()) for v in factors.values() if v.is_floating_point() and v.numel())
        assert largest <= 10 * float((1e4 * target).norm())


@over(fit_cases())
def test_deployed_form_computes_the_same(fmt: Format, m: int, n: int) -> None:
    factors = random_factors(fmt, m, n)
    deployed, held = fmt.deploy(factors, m, n)
    check_factors(deployed, held, m, n)
    assert torch.allclose(deployed.dense(held, m, n), fmt.dense(factors, m, n), rtol=1e-10, atol=1e-12)


# ---- the traits ----------------------------------------------------------------------------------------------------

DEMANDED = {
    "dense": {"exact_on_members", "optimal", "optimal_under_metric", "monotone_in_budget", "linear_in_factors"},
    "low_rank": {"exact_on_members", "optimal", "optimal_under_metric", "monotone_in_budget"},
    "low_rank_light": {"exact_on_members", "optimal", "optimal_under_metric", "monotone_in_budget"},
    "monarch": {"exact_on_members", "optimal"},
    "block_tensor_train": {"exact_on_members", "optimal"},
}


@pytest.mark.parametrize("name", DEMANDED)
def test_demanded_traits_are_declared(name: str) -> None:
    traits = registered()[name].traits
    assert {trait for trait in DEMANDED[name] if not getattr(traits, trait)} == set()


@over(with_trait("exact_on_members", ((12, 12), (10, 24), (13, 7), (24, 10), (1, 9), (9, 1))))
def test_exact_on_members(fmt: Format, m: int, n: int) -> None:
    target = fmt.dense(random_factors(fmt, m, n), m, n)
    for metric in metrics(n):
        error = target - fmt.dense(fmt.fit(target, metric), m, n)
        assert error.norm() <= 1e-8 * target.norm()


def best_of_descents(fmt: Format, target: torch.Tensor, metric: Metric | None, starts: int = 2) -> float:
    """The least error that quasi-Newton descent on the factors finds from random starts."""
    factors = Format.solve(
        fmt,
        target,
        metric,
        solver="default",
        start=None,
        generator=generator(4),
        on_step=None,
        restarts=starts,
        steps=300,
    )
    return squared_norm(target - fmt.dense(factors, *target.shape), metric)


def members_with_freedom(trait: str, shapes: tuple[tuple[int, int], ...]) -> list[Case]:
    """Members too small to hold every matrix: others have no optimum to miss."""
    return [(fmt, m, n) for fmt, m, n in with_trait(trait, shapes) if fmt.cost(m, n).parameters < m * n]


@over(members_with_freedom("optimal", ((8, 9), (7, 5))))
def test_optimal(fmt: Format, m: int, n: int) -> None:
    target = gaussian(m, n, seed=11)
    error = squared_norm(target - fmt.dense(fmt.fit(target), m, n), None)
    assert error <= best_of_descents(fmt, target, None) * (1 + 1e-6)


@over(members_with_freedom("optimal_under_metric", ((8, 9), (7, 5))))
def test_optimal_under_metric(fmt: Format, m: int, n: int) -> None:
    target = gaussian(m, n, seed=11)
    for condition, starts in ((1e2, 2), (1e6, 1)):
        metric = ill_conditioned(n, seed=12, condition=condition)
        error = squared_norm(target - fmt.dense(fmt.fit(target, metric), m, n), metric)
        assert error <= best_of_descents(fmt, target, metric, starts) * (1 + 1e-6)


@pytest.mark.parametrize("name", [name for name, cls in registered().items() if cls.traits.optimal])
def test_optimal_formats_reach_zero_at_full_size(name: str) -> None:
    for m, n in ((12, 12), (7, 5)):
        fmt = sized(prototypes(name)[0], m, n, 1000.0)
        assert fmt is not None
        if fmt.cost(m, n).parameters < m * n:  # no member of the class holds every matrix: circulants
            assert fmt.size_field is None
            continue
        target = gaussian(m, n)
        for metric in metrics(n):
            assert (target - fmt.dense(fmt.fit(target, metric), m, n)).norm() <= 1e-8 * target.norm()
        limit = fmt.size_limit(m, n)
        if fmt.size_field is not None and limit > 1:  # the largest *useful* size: one less holds fewer matrices
            smaller = fmt.with_size(limit - 1)
            assert (target - smaller.dense(smaller.fit(target), m, n)).norm() > 1e-3 * target.norm()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", [name for name, cls in registered().items() if cls.traits.monotone_in_budget])
def test_monotone_in_budget(name: str, seed: int) -> None:
    m, n = 24, 20
    target = gaussian(m, n, seed=seed)
    for metric in (None, ill_conditioned(n, seed=seed)):
        whole = squared_norm(target, metric)
        for prototype in prototypes(name):
            before = whole
            for keep in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5):
                fmt = sized(prototype, m, n, keep)
                if fmt is None:
                    continue
                error = squared_norm(target - fmt.dense(fmt.fit(target, metric), m, n), metric)
                assert error <= before + 1e-12 * whole, f"{fmt.label()} at keep {keep}"
                before = error


@over(with_trait("linear_in_factors", ((10, 12), (13, 7))))
def test_linear_in_factors(fmt: Format, m: int, n: int) -> None:
    one, other = random_factors(fmt, m, n), random_factors(fmt, m, n, seed=1)
    for name, spec in fmt.factors(m, n).items():
        if spec.role != "weight" or not spec.numel:
            continue
        mixed = fmt.dense(one | {name: 2 * one[name] - 3 * other[name]}, m, n)
        apart = 2 * fmt.dense(one, m, n) - 3 * fmt.dense(one | {name: other[name]}, m, n)
        assert torch.allclose(mixed, apart, rtol=1e-10, atol=1e-12), f"not linear in {name}"


def test_members_are_found_for_every_format_and_shape() -> None:
    found = {(fmt.name, m, n) for fmt, m, n in every_member()}
    assert found == {(name, m, n) for name in NAMES for m, n in SHAPES.values()}
    assert all(suits(fmt, m, n) for fmt, m, n in every_member())
    assert len(KEEPS) >= 3
