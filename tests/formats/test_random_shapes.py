"""The properties that sizes break most easily, over random sizes and members."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isogrid import Budget, BudgetError, Format, StructuredLinear
from isogrid.formats import registered
from tests.formats.cases import gaussian, prototypes, random_factors, suits

bounded = settings(max_examples=25, deadline=None, derandomize=True)
NAMES = list(registered())


@st.composite
def member_of(draw: st.DrawFn, names: list[str], most: int = 19) -> tuple[Format, int, int]:
    """A format and sizes it suits."""
    m, n = draw(st.integers(1, most)), draw(st.integers(1, most))
    prototype = draw(st.sampled_from([fmt for name in names for fmt in prototypes(name)]))
    percent = draw(st.sampled_from([30, 60, 100, 10_000]))
    if suits(prototype, m, n) and draw(st.booleans()):
        return prototype, m, n
    try:
        member = prototype.sized(m, n, Budget(parameters=percent * m * n // 100))
    except ValueError:
        member = registered()["dense"]()
    return member, m, n


@bounded
@given(case=member_of(NAMES), rows=st.integers(0, 4), seed=st.integers(0, 99))
def test_product_is_the_dense_product(case: tuple[Format, int, int], rows: int, seed: int) -> None:
    fmt, m, n = case
    factors = random_factors(fmt, m, n, seed=seed)
    x = gaussian(rows, n, seed=seed + 1)
    dense = fmt.dense(factors, m, n)
    assert dense.shape == (m, n)
    assert torch.allclose(fmt.multiply(factors, x, m), x @ dense.mT, rtol=1e-10, atol=1e-11)


@bounded
@given(
    prototype=st.sampled_from([fmt for name in NAMES for fmt in prototypes(name)]),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    amount=st.integers(0, 2000),
    in_bytes=st.booleans(),
)
def test_sized_stays_within_the_budget(prototype: Format, m: int, n: int, amount: int, in_bytes: bool) -> None:
    budget = Budget(bytes=4 * amount) if in_bytes else Budget(parameters=amount)
    try:
        member = prototype.sized(m, n, budget)
    except BudgetError:
        return
    except ValueError:
        assert not suits(prototype, m, n), "sizes the format suits may only fail by their budget"
        return
    assert budget.allows(member.cost(m, n))
    layer = StructuredLinear(n, m, member, bias=False)
    held = [*layer.parameters()] if not in_bytes else [*layer.parameters(), *layer.buffers()]
    counted = sum(value.nbytes if in_bytes else value.numel() for value in held)
    assert counted <= (4 * amount if in_bytes else amount)


@bounded
@given(
    case=member_of([name for name, cls in registered().items() if cls.traits.exact_on_members]),
    seed=st.integers(0, 99),
)
def test_fitting_again_changes_nothing(case: tuple[Format, int, int], seed: int) -> None:
    fmt, m, n = case
    target = gaussian(m, n, seed=seed)
    once = fmt.dense(fmt.fit(target), m, n)
    again = fmt.dense(fmt.fit(once), m, n)
    assert (again - once).norm() <= 1e-8 * target.norm()
    assert (target - once).norm() <= target.norm() * (1 + 1e-12)
