"""Trit planes: packed codes come back, native products are the portable ones, gradients those of the dense matrix."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isogrid import StructuredLinear, TritPlanes
from isogrid.kernels import PACKINGS, native, pack_trits, row_bytes, trit_matrix, trit_product, unpack_trits
from tests.formats.cases import LargestTensor, gaussian
from tests.kernels.test_native import BOUNDS

needs_native = pytest.mark.skipif(not native.loaded(), reason="no native products on this machine")
sizes = {
    "rows": st.integers(1, 9),
    "columns": st.integers(1, 300),
    "planes": st.integers(1, 3),
    "packing": st.sampled_from(PACKINGS),
}
groups = st.sampled_from([1, 3, 8, 16, 32, 50, 128, 400])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
few = settings(deadline=None, max_examples=60)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_trits(rows: int, columns: int, planes: int) -> Tensor:
    return torch.randint(-1, 2, (rows, columns, planes), generator=source(), dtype=torch.int8)


def test_every_word_of_five_trits():
    words = torch.tensor(list(itertools.product((-1, 0, 1), repeat=5)), dtype=torch.int8).unsqueeze(-1)
    codes = pack_trits(words, "base_three")
    assert codes.shape == (243, 1)
    assert len(codes.unique()) == 243
    assert torch.equal(unpack_trits(codes, 5, 1, "base_three"), words)


def test_known_bytes():
    assert pack_trits(torch.tensor([1, -1, 0, 0, 1]).view(1, 5, 1), "base_three").tolist() == [[186]]
    assert pack_trits(torch.tensor([1, -1, 0, 1]).view(1, 4, 1), "two_bit").tolist() == [[0b10_01_00_10]]
    # Two planes: the first in the lower two bits of each half.
    two = torch.tensor([[1, -1], [0, 1]]).view(1, 2, 2)
    assert pack_trits(two, "two_bit").tolist() == [[0b10_01_00_10]]


@few
@given(**sizes)
def test_packing_comes_back(rows, columns, planes, packing):
    trits = random_trits(rows, columns, planes)
    codes = pack_trits(trits, packing)
    assert codes.dtype == torch.uint8
    assert codes.shape == (rows, row_bytes(columns, planes, packing))
    assert torch.equal(unpack_trits(codes, columns, planes, packing), trits)


def test_bytes_of_a_row():
    assert [row_bytes(1024, planes, "two_bit") * 8 / 1024 for planes in (1, 2, 3)] == [2, 4, 6]
    assert [row_bytes(1280, planes, "base_three") * 8 / 1280 for planes in (1, 2, 3)] == [1.6, 3.2, 4.8]
    assert row_bytes(3, 2, "two_bit") == 2
    assert row_bytes(6, 2, "base_three") == 4


@needs_native
@few
@given(**sizes, group=groups, lead=st.sampled_from([0, 1, 2, 3, 4, 5, 17, 64, 65, 130]), dtype=dtypes)
def test_native_products_are_the_portable_ones(rows, columns, planes, packing, group, lead, dtype):
    codes = pack_trits(random_trits(rows, columns, planes), packing)
    scales = torch.randn(rows, -(-columns // group), planes, generator=source(1)).to(dtype)
    x = torch.randn(lead, columns, generator=source(2)).to(dtype)
    assert native.takes(x, scales)
    exact = trit_matrix(codes, scales.double(), columns, group, packing)  # portable: float64 has no native product
    whole = trit_matrix(
        pack_trits(torch.ones(rows, columns, planes), packing), scales.double().abs(), columns, group, packing
    )
    matrix = trit_matrix(codes, scales, columns, group, packing)
    assert matrix.dtype == dtype
    assert (matrix.double() - exact).norm() <= BOUNDS[dtype] * whole.norm()
    found = trit_product(x, codes, scales, group, packing)
    assert found.dtype == dtype
    assert (found.double() - x.double() @ exact.mT).norm() <= BOUNDS[dtype] * (x.double().abs() @ whole.mT).norm()


@needs_native
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("columns", [1500, 2049])
def test_blocks_of_columns_and_many_rows(columns, packing):
    codes = pack_trits(random_trits(70, columns, 2), packing)
    scales = torch.randn(70, -(-columns // 128), 2, generator=source(1))
    x = torch.randn(600, columns, generator=source(2))
    exact = trit_matrix(codes, scales.double(), columns, 128, packing)
    for dtype in BOUNDS:
        held = trit_matrix(codes, scales.to(dtype).double(), columns, 128, packing)
        wanted = x.to(dtype).double() @ held.mT
        found = trit_product(x.to(dtype), codes, scales.to(dtype), 128, packing)
        assert (found.double() - wanted).norm() <= BOUNDS[dtype] * wanted.norm()
    one = [trit_product(row, codes, scales, 128, packing) for row in x[:3]]
    torch.testing.assert_close(torch.stack(one), (x[:3].double() @ exact.mT).float(), rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("fmt", [TritPlanes(group=16), TritPlanes(planes=3, group=50, packing="base_three")], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_gradients_are_those_of_the_portable_product(fmt, rows):
    torch.manual_seed(0)
    layer = StructuredLinear(70, 33, fmt)
    exact = StructuredLinear(70, 33, fmt, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    results = []
    for one in (layer, exact):
        x = torch.randn(2, rows, 70, generator=source(), dtype=torch.float64).to(one.scales.dtype).requires_grad_()
        first = torch.autograd.grad(one(x).square().sum(), (x, one.scales), create_graph=True)
        second = torch.autograd.grad(sum(value.square().sum() for value in first), (x, one.scales))
        results.append([*first, *second])
    for found, wanted in zip(*results, strict=True):
        assert (found.double() - wanted).norm() <= 1e-5 * wanted.norm()


@needs_native
def test_compiled_transformed_and_autocast():
    layer = StructuredLinear(70, 33, TritPlanes(group=16), bias=False)
    x = torch.randn(5, 70, generator=source())
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    torch.testing.assert_close(torch.func.vmap(lambda row: layer(row))(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y - layer(x)).norm() <= 2e-2 * y.norm()
    y.float().sum().backward()
    assert layer.scales.grad.dtype == torch.float32


@needs_native
def test_threads_and_other_rows_change_nothing():
    layer = StructuredLinear(300, 260, TritPlanes(), bias=False).requires_grad_(False)
    x = torch.randn(150, 300, generator=source())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [layer(x), layer(x[:2])]
        torch.set_num_threads(2)
        both = [layer(x), layer(x[:2])]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(alone, both, strict=True))
    torch.testing.assert_close(layer(x[:70]), alone[0][:70])
    torch.testing.assert_close(layer(x.mT.contiguous().mT), alone[0])


def test_large_matrices_are_written_out_in_pieces(monkeypatch):
    from isogrid.kernels import trits as module

    layer = StructuredLinear(40, 33, TritPlanes(group=16), bias=False, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(2, 3, 40, generator=source(), dtype=torch.float64)
    whole = layer(x)
    monkeypatch.setattr(module, "WRITTEN_AT_ONCE", 200)
    torch.testing.assert_close(layer(x), whole)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_group_larger_than_a_row_takes_no_room(packing, monkeypatch):
    monkeypatch.setattr(native, "takes", lambda *_: False)
    target, large = gaussian(8, 64), TritPlanes(group=2**16, packing=packing)
    whole = TritPlanes(group=64, packing=packing)
    factors = large.fit(target)
    with LargestTensor() as largest:
        found = large.dense(factors, 8, 64)
        product = large.multiply(factors, target, 8)
    assert torch.equal(found, whole.dense(whole.fit(target), 8, 64))
    torch.testing.assert_close(product, target @ found.mT)
    assert largest.numbers <= 4 * target.numel()
