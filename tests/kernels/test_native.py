"""The native products against the portable ones: any sizes, rows, orders and dtypes, gradients and fallbacks."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isogrid import IsogridError, IsogridWarning, StructuredLinear
from isogrid.kernels import coupled_stages, derived, derived_bytes, native, one_stage, two_stage
from isogrid.kernels.native import build

pytestmark = pytest.mark.skipif(not native.loaded(), reason="no native products on this machine")
# Against the portable product in float64 from the same rounded numbers.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
FORMATS = ("monarch(blocks=4)", "monarch(blocks=3, rank=2)", "block_tensor_train(rank=2)", "blast(blocks=3, rank=5)",
           "block_diagonal(blocks=3)", "block_diagonal(blocks=4, shuffle=true)")  # fmt: skip
side = st.integers(1, 40)
blocks = st.integers(1, 6)
rows_ = st.sampled_from([0, 1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 130])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def absolute(value: Tensor) -> Tensor:
    return value.double().abs()


def assert_near(found: Tensor, wanted: Tensor, size: Tensor | None = None, times: float = 1.0) -> None:
    """Nearer than the bound times the size of what was added up, where sums may cancel, or of the result."""
    assert found.shape == wanted.shape
    if wanted.numel():
        found, wanted = found.detach(), wanted.detach()
        scale = (wanted if size is None else size).detach().double().norm().clamp_min(1e-12)
        assert float((found.double() - wanted.double()).norm() / scale) < times * BOUNDS[found.dtype]


@settings(deadline=None)
@given(k=blocks, q=side, p=side, rows=rows_, turns=st.tuples(st.booleans(), st.booleans()), dtype=dtypes,
       fewer=st.tuples(st.integers(0, 3), st.integers(0, 3)))  # fmt: skip
def test_one_stage(k, q, p, rows, turns, dtype, fewer):
    x, w = gaussian(rows, max(k * p - fewer[0], 1), dtype=dtype), gaussian(k, q, p, seed=1, dtype=dtype)
    features = max(k * q - fewer[1], 1)
    assert native.takes(x, w)
    found = one_stage(x, w, in_turn=turns[0], out_turn=turns[1], features=features)
    wanted, size = (
        one_stage(change(x), change(w), in_turn=turns[0], out_turn=turns[1], features=features)
        for change in (Tensor.double, absolute)
    )
    assert_near(found, wanted, size)


@settings(deadline=None)
@given(k=blocks, l=blocks, each=st.integers(1, 7), p=side, s=side, rows=rows_, interleave=st.booleans(), dtype=dtypes)
def test_two_stages(k, l, each, p, s, rows, interleave, dtype):  # noqa: E741
    first, second = gaussian(k, l * each, p, dtype=dtype), gaussian(l, s, k * each, seed=1, dtype=dtype)
    x = gaussian(rows, k * p, seed=2, dtype=dtype)
    found = two_stage(x, first, second, interleave=interleave)
    assert found.is_contiguous()
    wanted, size = (
        two_stage(change(x), change(first), change(second), interleave=interleave)
        for change in (Tensor.double, absolute)
    )
    assert_near(found, wanted, size)


@settings(deadline=None)
@given(b=blocks, r=side, p=side, s=side, rows=rows_, dtype=dtypes)
def test_coupled_stages(b, r, p, s, rows, dtype):
    factors = [gaussian(b, r, p, dtype=dtype), gaussian(b, b, r, seed=1, dtype=dtype), gaussian(b, s, r, dtype=dtype)]
    x = gaussian(rows, b * p, seed=2, dtype=dtype)
    wanted, size = (coupled_stages(change(x), *map(change, factors)) for change in (Tensor.double, absolute))
    assert_near(coupled_stages(x, *factors), wanted, size)


@settings(deadline=None)
@given(k=blocks, l=blocks, run=st.integers(1, 9), p=side, s=side, rows=rows_, dtype=dtypes, turned=st.booleans(),
       shared=st.booleans(), fewer=st.integers(0, 3))  # fmt: skip
def test_two_stages_with_runs_on_factors_as_they_lie(k, l, run, p, s, rows, dtype, turned, shared, fewer):  # noqa: E741
    first = gaussian(1 if shared else k, l * run, p, dtype=dtype)
    second = gaussian(1 if shared else l, s, k * run, seed=1, dtype=dtype)
    if turned:
        first, second = (value.mT.contiguous().mT for value in (first, second))
    x, bias = gaussian(rows, max(k * p - fewer, 1), seed=2, dtype=dtype), gaussian(l * s, seed=3, dtype=dtype)
    found = two_stage(x, first, second, interleave=False, blocks=(k, l), in_runs=True, bias=bias)
    wanted, size = (
        two_stage(*map(change, (x, first, second)), interleave=False, blocks=(k, l), in_runs=True, bias=change(bias))
        for change in (Tensor.double, absolute)
    )
    assert_near(found, wanted, size)


def products(case: str, k: int, q: int, p: int, s: int) -> tuple[list[tuple[int, ...]], Callable[..., Tensor]]:
    """Shapes of the factors, and the product of rows with them and a bias."""
    kron = {"blocks": (k, 3), "interleave": True}
    return {
        "one": ([(k, q, p)], lambda x, w, bias: one_stage(x, w, bias=bias)),
        "one in turn": ([(k, q, p)], lambda x, w, bias: one_stage(x, w, in_turn=True, out_turn=True, bias=bias)),
        "two": ([(k, 3 * q, p), (3, s, k * q)], lambda x, a, b, bias: two_stage(x, a, b, interleave=True, bias=bias)),
        "uneven": ([(k, 3, p), (k, s, 3)], lambda x, a, b, bias: two_stage(x, a, b, interleave=False, bias=bias)),
        "turned": (
            [(k, p, 3 * q), (3, k * q, s)],
            lambda x, a, b, bias: two_stage(x, a.mT, b.mT, interleave=False, in_runs=True, bias=bias),
        ),
        "shared": ([(1, 3 * q, p), (1, s, k * q)], lambda x, a, b, bias: two_stage(x, a, b, bias=bias, **kron)),
        "coupled": ([(k, q, p), (k, k, q), (k, s, q)], lambda x, a, c, b, bias: coupled_stages(x, a, c, b, bias=bias)),
    }[case]


CASES = ("one", "one in turn", "two", "uneven", "turned", "shared", "coupled")


@settings(deadline=None, max_examples=25)
@given(k=blocks, q=st.integers(1, 20), p=side, s=side, dtype=dtypes, slope=st.booleans(),
       rows=st.sampled_from([0, 1, 5, 16, 33, 64, 65, 130, 300]))  # fmt: skip
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_every_product(case, k, q, p, s, dtype, slope, rows):
    shapes, product = products(case, k, q, p, s)
    leaves = [gaussian(rows, k * p, dtype=dtype)]
    leaves += [gaussian(*shape, seed=i + 1, dtype=dtype) for i, shape in enumerate(shapes)]
    with torch.no_grad():
        features = product(*leaves, None).shape[1]
    leaves.append(gaussian(features, seed=9, dtype=dtype))
    gradient = (
        gaussian(features, rows, seed=8, dtype=dtype).mT if slope else gaussian(rows, features, seed=8, dtype=dtype)
    )
    results = []
    for change in (Tensor.clone, Tensor.double, absolute):
        some = [change(value).requires_grad_() for value in leaves]
        y = product(*some)
        y.backward(change(gradient))
        results.append([y, *(value.grad for value in some)])
    for found, wanted, size in zip(*results, strict=True):
        assert found.dtype == dtype
        assert_near(found, wanted, size, times=2)


@pytest.mark.parametrize("case", CASES)
def test_gradients_one_by_one_are_those_of_all(case):
    shapes, product = products(case, 3, 4, 5, 6)
    leaves = [gaussian(70, 15), *(gaussian(*shape, seed=i + 1) for i, shape in enumerate(shapes))]
    with torch.no_grad():
        leaves.append(gaussian(product(*leaves, None).shape[1], seed=9))
    together = [value.clone().requires_grad_() for value in leaves]
    product(*together).sin().sum().backward()
    for asked in range(len(leaves)):
        alone = [value.clone().requires_grad_(place == asked) for place, value in enumerate(leaves)]
        product(*alone).sin().sum().backward()
        torch.testing.assert_close(alone[asked].grad, together[asked].grad)
        assert all(value.grad is None for place, value in enumerate(alone) if place != asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients_depend_on_no_number_of_threads(case, dtype):
    shapes, product = products(case, 3, 20, 18, 40)
    leaves = [gaussian(200, 54, dtype=dtype)]
    leaves += [gaussian(*shape, seed=i + 1, dtype=dtype) for i, shape in enumerate(shapes)]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            some = [value.clone().requires_grad_() for value in leaves]
            product(*some, None).float().sin().sum().backward()
            results.append([value.grad for value in some])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        for found, wanted in zip(others, results[0], strict=True):
            assert_near(found, wanted)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_gradients(case):
    shapes, product = products(case, 2, 3, 4, 5)
    leaves = [gaussian(9, 8), *(gaussian(*shape, seed=i + 1) for i, shape in enumerate(shapes))]
    seconds = []
    for change in (Tensor.clone, Tensor.double):
        some = [change(value).requires_grad_() for value in leaves]
        grads = torch.autograd.grad(product(*some, None).square().sum(), some, create_graph=True)
        seconds.append(torch.autograd.grad(sum(one.square().sum() for one in grads), some))
    for found, wanted in zip(*seconds, strict=True):
        assert_near(found, wanted, times=5)


@pytest.mark.parametrize("fmt", ["kronecker(terms=2)", "block_dense(rank=3, blocks=4)", "low_rank(rank=5)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7, 70])
def test_formats_that_share_the_two_stages(fmt, dtype, rows):
    layer = StructuredLinear(24, 36, fmt, dtype=dtype)
    exact = StructuredLinear(24, 36, fmt, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    torch.nn.init.normal_(layer.bias)
    exact.bias.data = layer.bias.data.double()
    x = gaussian(rows, 24, dtype=dtype)
    y, wanted = layer(x), exact(x.double())
    assert_near(y, wanted, times=2)
    y.sum().backward()
    wanted.sum().backward()
    for value, other in zip(layer.parameters(), exact.parameters(), strict=True):
        if rows:
            assert_near(value.grad, other.grad, times=3)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("fmt", FORMATS)
def test_gradients_are_those_of_the_portable_product(fmt, rows):
    torch.manual_seed(0)
    layer = StructuredLinear(26, 33, fmt)
    exact = StructuredLinear(26, 33, fmt, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    results = []
    for one in (layer, exact):
        x = gaussian(2, rows, 26).to(one.floating_factor().dtype).requires_grad_()
        y = one(x)
        (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        results.append([y.detach(), x.grad, *(value.grad for value in one.parameters())])
    for found, wanted in zip(*results, strict=True):
        assert_near(found, wanted, times=2)


def test_only_the_gradients_that_are_asked_for():
    first, second = gaussian(2, 4, 3), gaussian(4, 5, 2)
    for asked in range(3):
        leaves = [
            value.clone().requires_grad_(place == asked) for place, value in enumerate((gaussian(9, 6), first, second))
        ]
        two_stage(*leaves, interleave=True).sum().backward()
        assert [value.grad is not None for value in leaves] == [place == asked for place in range(3)]


def test_second_derivatives():
    leaves = [value.requires_grad_() for value in (gaussian(8, 6), gaussian(2, 4, 3), gaussian(4, 5, 2))]
    exact = [value.detach().double().requires_grad_() for value in leaves]
    seconds = []
    for some in (leaves, exact):
        grads = torch.autograd.grad(two_stage(*some, interleave=False).square().sum(), some, create_graph=True)
        seconds.append(torch.autograd.grad(sum(one.square().sum() for one in grads), some))
    for found, wanted in zip(*seconds, strict=True):
        assert_near(found, wanted, times=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inputs_that_are_not_contiguous(dtype):
    first, second = gaussian(3, 4, 6, dtype=dtype), gaussian(2, 7, 6, dtype=dtype)
    for x in (
        gaussian(2, 18, 20, dtype=dtype).mT,
        gaussian(20, 36, dtype=dtype)[:, ::2],
        gaussian(20, 30, dtype=dtype)[:, 5:23],
    ):
        straight = two_stage(x.contiguous(), first, second, interleave=True)
        assert torch.equal(two_stage(x, first, second, interleave=True), straight)
    turned = first.mT.contiguous().mT
    assert torch.equal(two_stage(x, turned, second, interleave=True), straight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_results_depend_on_no_other_row_and_on_no_number_of_threads(fmt, dtype):
    layer = StructuredLinear(48, 60, fmt, dtype=dtype).requires_grad_(False)
    x = gaussian(150, 48, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = layer(x)
        torch.set_num_threads(2)
        both = layer(x)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(alone, both)
    torch.testing.assert_close(layer(x[:70]), alone[:70])


def test_too_many_features_are_refused():
    with pytest.raises((RuntimeError, IsogridError), match="input has 7 features, at most 6 are expected"):
        two_stage(gaussian(2, 7), gaussian(2, 4, 3), gaussian(4, 5, 2), interleave=True)


def test_a_factor_that_changes_in_place_changes_the_result():
    layer = StructuredLinear(30, 24, "block_tensor_train(rank=2)").requires_grad_(False).eval()
    x = gaussian(20, 30)
    before = layer(x)
    assert derived_bytes(layer.right) == layer.right.nbytes  # kept in the product's order
    layer.right.mul_(2)
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))
    layer.right.data = layer.right.data / 2
    torch.testing.assert_close(layer(x), before)


def test_what_is_kept_goes_with_its_factor():
    source = gaussian(4, 4)
    calls = []

    def make(value: Tensor) -> Tensor:
        calls.append(1)
        return value.mT

    first = derived(source, "turned", make)
    assert derived(source, "turned", make) is first
    assert len(calls) == 1
    source.requires_grad_()
    assert derived(source, "turned", make) is not first  # something may differentiate through it
    with torch.no_grad():
        assert derived(source, "turned", make) is first
    assert derived_bytes(source) == 64
    del source
    other = gaussian(4, 4)
    assert derived_bytes(other) == 0


def test_compiled_and_transformed():
    layer = StructuredLinear(36, 40, "monarch(blocks=4)")
    x = gaussian(20, 36)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    gradient, layer.right.grad = layer.right.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(gradient, layer.right.grad)
    batched = torch.func.vmap(lambda row: layer(row))(x)
    torch.testing.assert_close(batched, layer(x))
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def test_autocast_multiplies_in_bfloat16():
    layer = StructuredLinear(36, 40, "monarch(blocks=4)", bias=False)
    x = gaussian(20, 36)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_near(y, layer(x), times=2)
    y.float().sum().backward()
    assert layer.right.grad.dtype == torch.float32


def test_ten_thousand_calls_leave_nothing_behind():
    first, second = gaussian(4, 8, 6), gaussian(4, 8, 8)
    for rows in range(1, 131):  # all shapes have been seen
        two_stage(gaussian(rows, 24), first, second, interleave=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        for call in range(10_000):
            two_stage(torch.ones(call % 130 + 1, 24), first, second, interleave=True)
    for call in range(1_000):
        leaves = [torch.ones(call % 130 + 1, 24), first, second]
        two_stage(*(value.requires_grad_() for value in leaves), interleave=True).sum().backward()
        first.grad = second.grad = None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def in_another_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


PRINT = "import torch\nfrom isogrid.kernels import native\nprint(sorted(map(str, native.loaded())))\n"


def test_processors_without_the_instructions_take_the_portable_path():
    assert in_another_process(PRINT, ISOGRID_NATIVE="0").strip().endswith("[]")
    assert in_another_process(PRINT, ATEN_CPU_CAPABILITY="avx2").strip().endswith("[]")
    # oneDNN held back to older instructions: what its products can't do is found out by a trial.
    for capped in ("AVX2", "AVX512_CORE"):
        product = (
            "from isogrid.kernels import two_stage\n"
            "x, a, b = torch.randn(20, 24), torch.randn(4, 8, 6), torch.randn(4, 9, 8)\n"
            "for dtype in (torch.float32, torch.bfloat16):\n"
            "    y = two_stage(x.to(dtype), a.to(dtype), b.to(dtype), interleave=True).double()\n"
            "    w = two_stage(x.double(), a.double(), b.double(), interleave=True)\n"
            "    assert float((y - w).norm() / w.norm()) < 0.02, dtype\n"
        )
        in_another_process(PRINT + product, ONEDNN_MAX_CPU_ISA=capped)


def test_without_a_compiler_one_warning_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("ISOGRID_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monkeypatch.setattr(native, "_found", None)
        assert native.loaded() == native.loaded() == frozenset()
    assert [one.category for one in caught] == [IsogridWarning]
    assert "no C++ compiler" in str(caught[0].message)


def test_a_compiler_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ISOGRID_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: "/bin/false")
    with pytest.raises(OSError, match="/bin/false failed"):
        build.shared_object(say=False)
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 96, 192), (1, 300, 400), (3, 130, 260)], ids=str)
def test_threads_share_a_single_tile(shape, dtype):
    k, q, p = shape
    first, second = gaussian(k, q, p, dtype=dtype), gaussian(q, 260, k, seed=1, dtype=dtype)
    turned = gaussian(k, 700, q, seed=1, dtype=dtype)
    x = gaussian(16, k * p, dtype=dtype)
    coupling = gaussian(k, k, q, dtype=dtype)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                [
                    one_stage(x, first, in_turn=True),
                    two_stage(x, first, second, interleave=True),
                    coupled_stages(x, first, coupling, turned),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        for found, wanted in zip(others, results[0], strict=True):
            torch.testing.assert_close(found, wanted)
    assert_near(results[0][1], two_stage(x.double(), first.double(), second.double(), interleave=True))
