import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isogrid import IsogridError
from isogrid.fitting import kept_weights, removal_cost, removal_order, swapped
from isogrid.fitting.structure_removal import _swap_changes

DOUBLE = torch.float64
# The worked example of the ZipLM document, section 2.
HESSIAN = torch.tensor([[2.0, 1, 0], [1, 2, 1], [0, 1, 2]], dtype=DOUBLE)
WEIGHT = torch.tensor([[1.0, 2, 3], [0, 1, -1]], dtype=DOUBLE)


def problem(seed, columns=8, out=4, rows=40):
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=draw, dtype=DOUBLE)
    x = torch.randn(rows, columns, generator=draw, dtype=DOUBLE) @ mixing
    return torch.randn(out, columns, generator=draw, dtype=DOUBLE), x.mT @ x / rows


def columns_of(structures, width):
    return (torch.as_tensor(structures, dtype=torch.int64)[:, None] * width + torch.arange(width)).flatten()


def least_squares(weight, hessian, kept, width):
    """The constrained optimum by the normal equations, and its error: what everything here is judged by."""
    columns = columns_of(kept, width)
    found = torch.zeros_like(weight)
    if len(columns):
        found[:, columns] = torch.linalg.solve(hessian[columns][:, columns], (weight @ hessian)[:, columns].mT).mT
    error = found - weight
    return found, float(((error @ hessian) * error).sum())


def test_a_matrix_without_columns_has_nothing_to_remove():
    for width in (1, 3):
        found = removal_order(torch.zeros(4, 0), torch.zeros(0, 0), width=width)
        assert found.order.tolist() == []
        assert found.costs.tolist() == [0]
        assert found.kept(0).tolist() == []
        assert found.cost(0) == 0
    nothing = torch.zeros(0, dtype=torch.int64)
    assert kept_weights(torch.zeros(4, 0), torch.zeros(0, 0), nothing).shape == (4, 0)
    assert swapped(torch.zeros(4, 0), torch.zeros(0, 0), nothing).tolist() == []
    assert removal_cost(torch.zeros(4, 0), torch.zeros(0, 0), nothing) == 0


def test_the_worked_example():
    found = removal_order(WEIGHT, HESSIAN)
    assert found.order.tolist() == [0, 1, 2]
    torch.testing.assert_close(found.costs, torch.tensor([0, 4 / 3, 13.5, 46], dtype=DOUBLE))
    torch.testing.assert_close(
        kept_weights(WEIGHT, HESSIAN, torch.tensor([1, 2])), torch.tensor([[8 / 3, 8 / 3], [1, -1]], dtype=DOUBLE)
    )
    torch.testing.assert_close(
        kept_weights(WEIGHT, HESSIAN, torch.tensor([2])), torch.tensor([[4.0], [-0.5]], dtype=DOUBLE)
    )
    assert removal_cost(WEIGHT, HESSIAN, torch.tensor([2])) == pytest.approx(13.5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), width=st.integers(1, 4), count=st.integers(1, 6), out=st.integers(1, 6), data=st.data()
)
def test_orders_are_greedy_and_costs_exact(seed, width, count, out, data):
    weight, hessian = problem(seed, columns=width * count, out=out)
    panel = data.draw(st.integers(1, 2 * width * count))
    found = removal_order(weight, hessian, width=width, panel=panel)
    scale = float(found.costs[-1])
    alive = list(range(count))
    for step, gone in enumerate(found.order.tolist()):
        # Each step removes the structure whose removal costs the least, all others refitted.
        costs = {one: least_squares(weight, hessian, [a for a in alive if a != one], width)[1] for one in alive}
        assert costs[gone] <= min(costs.values()) + 1e-10 * scale
        alive.remove(gone)
        assert float(found.costs[step + 1]) == pytest.approx(costs[gone], rel=1e-10, abs=1e-10 * scale)
        wanted, error = least_squares(weight, hessian, alive, width)
        kept = torch.tensor(sorted(alive), dtype=torch.int64)
        assert torch.equal(kept, found.kept(len(alive)))
        assert removal_cost(weight, hessian, kept, width=width) == pytest.approx(error, rel=1e-10, abs=1e-10 * scale)
        torch.testing.assert_close(
            kept_weights(weight, hessian, kept, width=width), wanted[:, columns_of(kept, width)], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize(("count", "width"), [(12, 1), (5, 3)])
def test_panels_give_the_same(count, width):
    weight, hessian = problem(3, columns=count * width)
    wanted = removal_order(weight, hessian, width=width, panel=1)
    for panel in (2, 7, 64):
        found = removal_order(weight, hessian, width=width, panel=panel)
        assert torch.equal(found.order, wanted.order)
        torch.testing.assert_close(found.costs, wanted.costs, rtol=1e-11, atol=0)


def test_uncorrelated_inputs_are_scored_by_themselves():
    weight, hessian = problem(0)
    hessian = torch.diag(hessian.diagonal())
    found = removal_order(weight, hessian)
    scores = hessian.diagonal() * weight.square().sum(0)
    assert torch.equal(found.order, scores.argsort())
    torch.testing.assert_close(found.costs[1:], scores.sort().values.cumsum(0))
    kept = found.kept(5)
    torch.testing.assert_close(kept_weights(weight, hessian, kept), weight[:, kept])


def test_scale_of_inputs_and_rotation_of_outputs_change_nothing():
    weight, hessian = problem(1)
    wanted = removal_order(weight, hessian)
    scale = torch.linspace(0.1, 10, 8, dtype=DOUBLE)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=DOUBLE)).Q
    found = removal_order(rotation @ weight / scale, hessian * torch.outer(scale, scale))
    assert torch.equal(found.order, wanted.order)
    torch.testing.assert_close(found.costs, wanted.costs, rtol=1e-9, atol=0)
    # Blocks of one column are columns.
    twice = removal_order(weight, 2 * hessian)
    torch.testing.assert_close(twice.costs, 2 * wanted.costs)


def test_one_of_two_equal_inputs_goes_first_and_the_other_takes_its_weight():
    weight, _ = problem(2, columns=6)
    x = torch.randn(300, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    x[:, 5] = x[:, 2]
    weight = weight + 10 * torch.nn.functional.one_hot(torch.tensor(2), 6)  # large: its norm would keep it
    hessian = x.mT @ x / 300 + 1e-6 * torch.eye(6, dtype=DOUBLE)
    found = removal_order(weight, hessian)
    first = int(found.order[0])
    assert first in (2, 5)
    assert float(found.costs[1]) < 1e-3
    kept = found.kept(5)
    other = kept.tolist().index(7 - first)
    torch.testing.assert_close(
        kept_weights(weight, hessian, kept)[:, other], weight[:, 2] + weight[:, 5], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("width", [1, 2])
def test_dead_inputs_go_first_and_cost_nothing(width):
    weight, hessian = problem(4)
    dead = columns_of([1, 3], width)
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = removal_order(weight, hessian, width=width)
    assert set(found.order[:2].tolist()) == {1, 3}
    assert float(found.costs[2]) == 0
    kept = found.kept(8 // width - 2)
    torch.testing.assert_close(kept_weights(weight, hessian, kept, width=width), weight[:, columns_of(kept, width)])


def test_nothing_but_dead_inputs():
    found = removal_order(WEIGHT, torch.zeros(3, 3))
    assert found.costs.tolist() == [0, 0, 0, 0]


def test_a_singular_moment():
    weight, hessian = problem(5, columns=10, rows=4)  # rank 4: six inputs are combinations of the others
    found = removal_order(weight, hessian)
    total = float((weight @ hessian * weight).sum())
    assert float(found.costs[6]) < 1e-4 * total
    assert float(found.costs[-1]) == pytest.approx(total, rel=1e-6)
    assert (found.costs.diff() >= -1e-9 * total).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 3), count=st.integers(2, 6), data=st.data())
def test_changes_by_swaps_are_exact(seed, width, count, data):
    weight, hessian = problem(seed, columns=width * count)
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count - 1))))
    removed = torch.tensor([one for one in range(count) if one not in kept])
    changes = _swap_changes(weight, hessian, kept, removed, width)
    _, before = least_squares(weight, hessian, kept, width)
    scale = float((weight @ hessian * weight).sum())
    for i, j in itertools.product(range(len(kept)), range(len(removed))):
        tried = kept.clone()
        tried[i] = removed[j]
        _, after = least_squares(weight, hessian, tried.sort().values, width)
        assert float(changes[i, j]) == pytest.approx(after - before, rel=1e-7, abs=1e-9 * scale)


def test_swaps_come_nearer_to_the_best_set():
    greedy_best = swapped_best = 0
    excess = torch.zeros(2)  # of greedy sets and of swapped ones
    for seed in range(60):
        weight, hessian = problem(seed)
        kept = removal_order(weight, hessian).kept(4)
        better = swapped(weight, hessian, kept)
        costs = [removal_cost(weight, hessian, one) for one in (kept, better)]
        best = min(least_squares(weight, hessian, some, 1)[1] for some in itertools.combinations(range(8), 4))
        assert best * (1 - 1e-9) <= costs[1] <= costs[0]
        greedy_best += costs[0] <= best * (1 + 1e-9)
        swapped_best += costs[1] <= best * (1 + 1e-9)
        excess += torch.tensor(costs) / best - 1
    assert swapped_best > greedy_best
    # The document's measurement: 10.8 % above the best on average, 1.8 % with swaps.
    assert excess[1] < excess[0] / 2


def test_swaps_of_nothing_or_all():
    weight, hessian = problem(0)
    for kept in (torch.tensor([], dtype=torch.int64), torch.arange(8)):
        assert torch.equal(swapped(weight, hessian, kept), kept)
    assert removal_cost(weight, hessian, torch.arange(8)) == 0


@pytest.mark.parametrize(
    ("weight", "hessian", "width", "message"),
    [
        (torch.ones(2, 4), torch.eye(3), 1, "takes a second moment of its inputs"),
        (torch.ones(2, 4), torch.eye(4), 3, "don't divide a matrix of 4"),
        (torch.full((2, 4), torch.nan), torch.eye(4), 1, "NaN or infinite"),
        (torch.ones(2, 4), torch.eye(4) * torch.inf, 1, "NaN or infinite"),
    ],
)
def test_bad_input(weight, hessian, width, message):
    with pytest.raises(IsogridError, match=message):
        removal_order(weight, hessian, width=width)
