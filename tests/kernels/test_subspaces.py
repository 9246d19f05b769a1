"""Steps in subspaces: what is native against the same in float64, for any sizes, sides and layouts."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isogrid.kernels import native
from isogrid.kernels.subspaces import channel_scales_, channel_squares, coordinates, lift_, moments_, takes
from isogrid.optim import PRESETS, ProjectedAdamW

needs_native = pytest.mark.skipif(not native.loaded(), reason="no native products on this machine")
# Sums of float32, relative to the size of what is summed.
BOUND = 2e-6
# Around the widths of registers and tiles: 4 directions, 6 rows, 16 lanes, panels of 64.
sizes = st.one_of(st.integers(1, 20), st.sampled_from([31, 63, 64, 65, 100, 129]))
ranks = st.sampled_from([1, 2, 3, 4, 5, 8, 15, 16, 17, 33])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(found: Tensor, wanted: Tensor, size: Tensor) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == torch.float32
    assert bool(((found.double() - wanted).abs() <= BOUND * size + 1e-30).all())


@settings(deadline=None, derandomize=True)
@given(m=sizes, n=sizes, of_rows=st.booleans(), seed=st.integers(0, 9))
def test_squares_of_channels(m: int, n: int, of_rows: bool, seed: int) -> None:
    g = gaussian(m, n, seed=seed)
    wanted = g.double().square().sum(1 if of_rows else 0, keepdim=True)
    for given_ in (g, gaussian(n, m, seed=seed).mT):
        wanted = given_.double().square().sum(1 if of_rows else 0, keepdim=True)
        squares, total = channel_squares(given_, of_rows)
        assert_near(squares, wanted, wanted)
        assert float(total) == pytest.approx(float(wanted.sum()), rel=1e-5)


@settings(deadline=None, derandomize=True)
@given(count=st.sampled_from([1, 15, 16, 17, 100]), by_row=st.booleans(), step=st.sampled_from([1, 7, 5000]))
def test_scales_of_channels(count: int, by_row: bool, step: int) -> None:
    shape = (count, 1) if by_row else (1, count)
    squares, held = gaussian(*shape).square(), gaussian(*shape, seed=1).square()
    mean = 0.99 * held.double() + 0.01 / 30 * squares.double()
    wanted = 1 / ((mean / (1 - 0.99**step)).sqrt() + 1e-3)
    version = held._version
    scales, outer = channel_scales_(squares, held, beta2=0.99, count=30, step=step, eps=1e-3)
    assert held._version > version
    assert_near(held, mean, mean)
    assert_near(scales, wanted, wanted)
    assert float(outer) == pytest.approx(float((wanted.square() * squares).sum()), rel=1e-5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(m=sizes, n=sizes, r=ranks, left=st.booleans(), scaled=st.booleans(), seed=st.integers(0, 9))
def test_coordinates(m: int, n: int, r: int, left: bool, scaled: bool, seed: int) -> None:
    g, basis = gaussian(m, n, seed=seed), gaussian(m if left else n, r, seed=seed + 1)
    scales = gaussian(m if left else n, seed=seed + 2).view((m, 1) if left else (1, n)) if scaled else None
    wide = g.double() if scales is None else g.double() * scales
    found, squared = coordinates(g, basis, left, scales)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return b.mT @ a if left else a @ b

    assert_near(found, product(wide, basis.double()), product(wide.abs(), basis.double().abs()))
    assert float(squared) == pytest.approx(float(found.double().square().sum()), rel=1e-5)


@settings(deadline=None, derandomize=True)
@given(count=st.sampled_from([1, 15, 16, 17, 100, 4096, 4097, 9000]), eps=st.sampled_from([1e-8, 1e-3]))
def test_moments(count: int, eps: float) -> None:
    r, m, v = gaussian(count), gaussian(count, seed=1), gaussian(count, seed=2).square()
    b1, b2 = 0.9, 0.999
    mean = b1 * m.double() + (1 - b1) * r.double()
    square = b2 * v.double() + (1 - b2) * r.double().square()
    root = square.sqrt() + eps
    direction, slow, fast = moments_(r, m, v, (b1, b2), eps)
    assert_near(m, mean, gaussian(count, seed=1).double().abs() + r.double().abs())
    assert_near(v, square, square)
    assert_near(direction, mean / root, (gaussian(count, seed=1).double().abs() + r.double().abs()) / root)
    assert float(slow) == pytest.approx(float((mean / root).square().sum()), rel=1e-5)
    assert float(fast) == pytest.approx(float((r.double() / root).square().sum()), rel=1e-5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    m=sizes,
    n=sizes,
    r=ranks,
    turned=st.booleans(),
    factor=st.sampled_from(["none", "rows", "columns", "one"]),
    before=st.sampled_from([1.0, 0.9]),
    after=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 9),
)
def test_lift(m: int, n: int, r: int, turned: bool, factor: str, before: float, after: float, seed: int) -> None:
    w, a, g = gaussian(m, n, seed=seed), gaussian(m, r, seed=seed + 1), gaussian(m, n, seed=seed + 2)
    b = gaussian(n, r, seed=seed + 3).mT if turned else gaussian(r, n, seed=seed + 3)
    f = {"none": None, "rows": gaussian(m, 1), "columns": gaussian(1, n), "one": torch.tensor(0.3)}[factor]
    added = torch.zeros(m, n).double() if f is None else f.double() * g.double()
    wanted = after * (before * w.double() - 0.1 * (a.double() @ b.double() + added))
    size = w.double().abs() + 0.1 * (a.double().abs() @ b.double().abs() + added.abs())
    version = w._version
    found = lift_(w, a, b, size=0.1, gradient=None if f is None else g, factor=f, before=before, after=after)
    assert found is w
    assert w._version > version
    assert_near(w, wanted, size)


@needs_native
def test_any_number_of_threads_gives_the_same_bits() -> None:
    g, left, right = gaussian(300, 500), gaussian(300, 20, seed=1), gaussian(500, 20, seed=2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            w, m, v = gaussian(300, 500, seed=3), gaussian(20, 500, seed=4), gaussian(20, 500, seed=5).square()
            found = [channel_squares(g, of_rows)[0] for of_rows in (True, False)]
            found += [coordinates(g, left, True)[0], coordinates(g, right, False)[0]]
            found += [moments_(found[2], m, v, (0.9, 0.99), 1e-8)[0], m, v]
            results.append([*found, lift_(w, left, found[4], size=0.1, gradient=g, factor=found[0])])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@needs_native
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(left: bool, bad: float) -> None:
    for place in ((0, 0), (12, 8), (5, 16)):
        g = gaussian(13, 17)
        g[place] = bad
        assert takes(g)
        _, squared = coordinates(g, torch.eye(13 if left else 17, 3), left)  # zeros against most entries
        assert not torch.isfinite(torch.tensor(squared))
        assert not torch.isfinite(torch.tensor(channel_squares(g, left)[1]))


@needs_native
def test_wrong_sizes_are_refused() -> None:
    g, basis = gaussian(4, 6), gaussian(4, 2)
    with pytest.raises(RuntimeError, match="a basis of 6 rows, not 4"):
        torch.ops.isogrid.coordinates(g, basis, False, None)
    with pytest.raises(RuntimeError, match="4 scales"):
        torch.ops.isogrid.coordinates(g, basis, True, torch.ones(6))
    with pytest.raises(RuntimeError, match="contiguous, of float32"):
        torch.ops.isogrid.coordinates(g.mT, basis, False, None)
    with pytest.raises(RuntimeError, match="one shape"):
        torch.ops.isogrid.moments_(g, gaussian(4, 6), gaussian(6, 4), 0.9, 0.9, 0.0)
    for factor in (torch.ones(4), torch.ones(1, 4), torch.ones(6, 1)):
        with pytest.raises(RuntimeError, match="each row, each column, or all"):
            torch.ops.isogrid.lift_(gaussian(4, 6), basis, gaussian(2, 6), False, g, factor, 1.0, 1.0, 1.0)
    with pytest.raises(RuntimeError, match="sizes of factors"):
        torch.ops.isogrid.lift_(gaussian(4, 6), basis, gaussian(6, 2), False, None, None, 1.0, 1.0, 1.0)


def trained(name: str, shape: tuple[int, ...], steps: range, state: dict | None = None, weight: Tensor | None = None):
    weight = torch.nn.Parameter(gaussian(*shape, seed=1) if weight is None else weight.clone())
    options = {} if name in ("apollo_mini", "rsvd_adam", "top_r") else {"rank": 5}
    options |= {} if name in ("ldadam", "top_r") else {"refresh": 3}
    optimizer = PRESETS[name]([weight], 0.01, weight_decay=0.1, **options)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in steps:
        weight.grad = gaussian(*shape, seed=100 + step)
        optimizer.step()
    return weight.detach(), optimizer


def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "takes", lambda *_: False)


@needs_native
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (7, 3, 2, 2)])
def test_native_and_portable_steps_agree_and_take_over_from_each_other(
    monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, ...]
) -> None:
    whole, _ = trained(name, shape, range(8))
    half, optimizer = trained(name, shape, range(4))
    state = copy.deepcopy(optimizer.state_dict())
    portable(monkeypatch)
    other, other_optimizer = trained(name, shape, range(4))
    there = other_optimizer.state_dict()["state"][0]
    assert there.keys() == state["state"][0].keys()
    for key, value in there.items():
        assert type(value) is type(state["state"][0][key])
        if isinstance(value, Tensor):
            assert value.shape == state["state"][0][key].shape
            assert value.stride() == state["state"][0][key].stride()
    resumed, _ = trained(name, shape, range(4, 8), state, half)
    moved = (whole - gaussian(*shape, seed=1)).abs().max()
    assert (other - half).abs().max() < 1e-3 * moved
    assert (resumed - whole).abs().max() < 1e-3 * moved


@needs_native
@pytest.mark.parametrize("name", PRESETS)
def test_every_step_that_can_be_native_is(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = []

    def spying(*tensors: Tensor) -> bool:
        asked.append(takes(*tensors))
        return asked[-1]

    monkeypatch.setattr("isogrid.kernels.subspaces.takes", spying)
    for shape in ((20, 33), (33, 20)):
        trained(name, shape, range(4))
    assert all(asked)


@pytest.mark.parametrize("residual", ["none", "normalized", "fira", "error_feedback"])
def test_gradients_and_weights_in_any_layout(residual: str) -> None:
    steps = {}
    for layout in ("as it is", "gradient turned", "weight turned", "channels last"):
        start = gaussian(12, 10, 3, 2, seed=1)
        flat = layout in ("gradient turned", "weight turned")
        start = start.view(12, 60) if flat else start
        if layout == "channels last":
            start = start.to(memory_format=torch.channels_last)
        weight = torch.nn.Parameter(start.mT.contiguous().mT if layout == "weight turned" else start)
        optimizer = ProjectedAdamW([weight], 0.01, 4, residual=residual, refresh=2)
        for step in range(4):
            gradient = gaussian(12, 10, 3, 2, seed=50 + step)
            gradient = gradient.view(12, 60) if flat else gradient
            weight.grad = gradient.mT.contiguous().mT if layout == "gradient turned" else gradient
            optimizer.step()
        steps[layout] = weight.detach().reshape(12, 60)
    for found in steps.values():
        assert torch.allclose(found, steps["as it is"], atol=1e-5)
