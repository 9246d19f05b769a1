"""The layer that holds one matrix in one format, and everything PyTorch does to layers."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isogrid import (
    BlockTensorTrain,
    Dense,
    Format,
    IsogridError,
    LowRank,
    LowRankLight,
    Metric,
    Monarch,
    Permuted,
    StructuredLinear,
    Sum,
)
from isogrid.formats import Factor, registered
from isogrid.linear import is_linear, linear_matrix
from tests.formats.cases import gaussian, generator, ill_conditioned, middle_member

M, N = 12, 10
NAMES = list(registered())
FORMATS = {
    "dense": Dense(),
    "low rank": LowRank(rank=3),
    "light": LowRankLight(rank=3),
    "monarch": Monarch(blocks=3),
    "block tensor-train": BlockTensorTrain(rank=2),
    "sum": Sum((LowRank(rank=2), LowRankLight(rank=1), Monarch(blocks=2))),
    "permuted": Permuted(Monarch(blocks=3, rank=1)),
}
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())


def make(fmt: Format, *, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> StructuredLinear:
    """A 10 -> 12 layer with a bias that is not zero."""
    layer = StructuredLinear(N, M, fmt, bias=bias, dtype=dtype, generator=generator(seed))
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(gaussian(M, seed=9))
    return layer


def inputs(*lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return gaussian(*lead, N, seed=1, dtype=dtype)


class Counter:
    """Counts the times a format's matrix is multiplied out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cls: type[Format]) -> None:
        self.calls = 0
        original = cls.dense

        def counting(fmt: Format, *args: object) -> Tensor:
            self.calls += 1
            return original(fmt, *args)

        monkeypatch.setattr(cls, "dense", counting)


# ---- what a layer is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_forward_of_every_format(name: str) -> None:
    layer = make(middle_member(name, M, N))
    for lead in ((), (4,), (2, 1, 3), (0,)):
        x = inputs(*lead)
        expected = nn.functional.linear(x, layer.dense(), layer.bias)
        assert layer(x).shape == (*lead, M)
        assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
    specs = layer.format.factors(M, N)
    assert set(dict(layer.named_parameters())) == {k for k, spec in specs.items() if spec.trainable} | {"bias"}
    assert set(dict(layer.named_buffers())) == {k for k, spec in specs.items() if not spec.trainable}
    counted = sum(p.numel() for k, p in layer.named_parameters() if k != "bias")
    assert layer.cost().parameters == counted
    assert layer.memory() == {"factors": layer.cost().bytes, "bias": 4 * M, "dense view": 0, "derived": 0}
    assert layer.format.label() in repr(layer)


@pytest.mark.parametrize(
    "spelling", ["monarch(blocks=3)", {"name": "monarch", "blocks": 3}, Monarch(blocks=3)], ids=str
)
def test_any_spelling_of_a_format(spelling: str | dict[str, object] | Format) -> None:
    layer = StructuredLinear(N, M, spelling)
    assert layer.format == Monarch(blocks=3)
    assert (layer.in_features, layer.out_features) == (N, M)


def test_the_start_follows_the_generator() -> None:
    one, same, other = (StructuredLinear(N, M, "monarch", generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.right, same.right)
    assert not torch.equal(one.right, other.right)
    assert torch.equal(one.bias, torch.zeros(M))
    torch.manual_seed(3)
    loose = StructuredLinear(N, M, "monarch")
    torch.manual_seed(3)
    assert torch.equal(loose.right, StructuredLinear(N, M, "monarch").right)


@every_format
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_from_linear(fmt: Format, bias: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(N, M, bias=bias, dtype=dtype).eval()
    before = copy.deepcopy(linear.state_dict())
    layer = StructuredLinear.from_linear(linear, fmt)
    assert (layer.bias is not None) == bias
    assert not layer.training
    assert all(value.dtype == dtype for value in layer.factors.values() if value.is_floating_point())
    fitted = fmt.dense(fmt.fit(linear.weight), M, N)
    assert torch.equal(layer.dense(), fitted)
    if bias:
        assert torch.equal(layer.bias, linear.bias)
    with torch.no_grad():
        for value in layer.parameters():
            value.add_(1)
    assert all(torch.equal(linear.state_dict()[k], before[k]) for k in before), "training it changed the trained layer"


def test_from_linear_with_a_metric_and_options() -> None:
    linear, metric = nn.Linear(N, M), ill_conditioned(N, condition=1e3)
    layer = StructuredLinear.from_linear(linear, "monarch(blocks=3)", metric=metric, sweeps=2, generator=generator())
    fmt = Monarch(blocks=3)
    expected = fmt.fit(linear.weight, metric, sweeps=2)
    assert all(torch.equal(layer.factors[k], expected[k]) for k in expected)
    with pytest.raises(IsogridError, match="the metric is over 4 inputs"):
        StructuredLinear.from_linear(linear, fmt, metric=Metric(torch.eye(4)))


def test_from_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(M, N)  # (outputs, inputs), weight (in, out)
    nn.init.normal_(conv.bias)
    assert is_linear(conv)
    assert linear_matrix(conv).shape == (M, N)
    for fmt in (Dense(), LowRank(rank=N)):
        layer = StructuredLinear.from_linear(conv, fmt)
        x = inputs(2, 3)
        assert torch.allclose(layer(x), conv(x), rtol=1e-4, atol=1e-5)
        assert all(value.is_contiguous() for value in layer.state_dict().values())


def test_what_is_no_linear_layer_is_refused() -> None:
    assert is_linear(nn.Linear(2, 3))
    assert not is_linear(nn.Conv1d(2, 3, 1))
    with pytest.raises(IsogridError, match=r"nn\.Linear or transformers' Conv1D, got Conv1d"):
        StructuredLinear.from_linear(nn.Conv1d(2, 3, 1), "monarch")


def test_from_factors_takes_them_as_they_are() -> None:
    fmt = LowRank(rank=2)
    factors = {"right": torch.randn(2, N), "left": torch.randn(M, 2)}
    layer = StructuredLinear.from_factors(fmt, factors, M, N)
    assert layer.right.data_ptr() == factors["right"].data_ptr()
    assert layer.bias is None
    with pytest.raises(IsogridError, match="factor 'left' of a 12 x 10 matrix"):
        StructuredLinear.from_factors(fmt, factors | {"left": torch.randn(M, 3)}, M, N)
    with pytest.raises(IsogridError, match="factors are"):
        StructuredLinear.from_factors(fmt, {"right": factors["right"]}, M, N)


def test_bad_inputs_are_refused() -> None:
    layer = make(Monarch(blocks=3))
    with pytest.raises(IsogridError, match=r"takes \(\.\.\., 10\), got \(4, 9\)"):
        layer(torch.zeros(4, 9))
    with pytest.raises(IsogridError, match=r"takes \(\.\.\., 10\), got \(\)"):
        layer(torch.tensor(1.0))
    for dtype in (torch.int64, torch.bool):
        with pytest.raises(IsogridError, match=f"multiplies floating input, got {dtype}"):
            layer(torch.zeros(4, N, dtype=dtype))


@pytest.mark.parametrize("taken", ["weight", "bias", "forward", "training", "in_features"])
def test_factor_names_the_layer_uses_are_refused(taken: str) -> None:
    @dataclass(frozen=True)
    class Rude(Format):
        def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
            return {taken: Factor((out_features, in_features))}

        def multiply(self, factors: dict[str, Tensor], x: Tensor, out_features: int) -> Tensor:
            return x @ factors[taken].mT

    Rude.name = "rude"  # set late, so that it is not registered
    with pytest.raises(IsogridError, match=f"rude: a factor can't be called '{taken}'"):
        StructuredLinear(N, M, Rude())
    assert "rude" not in registered()


# ---- the dense view ------------------------------------------------------------------------------------------------


@every_format
def test_view_has_the_numbers_of_the_dense_matrix(fmt: Format) -> None:
    layer = make(fmt)
    dense = layer.dense()
    assert isinstance(layer.weight, Tensor)
    assert torch.equal(layer.weight + 0, dense)
    assert torch.equal(nn.functional.linear(inputs(3), layer.weight), nn.functional.linear(inputs(3), dense))
    assert torch.equal(layer.weight.T @ torch.ones(M), dense.T @ torch.ones(M))
    assert torch.equal(layer.weight[2:4, 1], dense[2:4, 1])
    assert torch.equal(torch.stack([layer.weight, layer.weight]), torch.stack([dense, dense]))
    assert torch.equal(layer.weight.detach().to(torch.float64), dense.detach().double())
    assert torch.allclose(torch.tensor(layer.weight.tolist()), dense.detach())
    assert "tensor(" in repr(layer.weight)


def test_metadata_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter(monkeypatch, Monarch)
    layer = make(Monarch(blocks=3), dtype=torch.bfloat16).eval()
    view = layer.weight
    assert view.dtype == torch.bfloat16
    assert view.device == torch.device("cpu")
    assert view.shape == (M, N)
    assert view.size() == (M, N)
    assert view.size(1) == N
    assert view.ndim == view.dim() == 2
    assert view.numel() == M * N
    assert view.element_size() == 2
    assert view.layout == torch.strided
    assert view.is_floating_point()
    assert not view.is_cuda
    assert not view.is_meta
    assert counter.calls == 0
    assert layer.memory()["dense view"] == 0
    view.sum()
    assert counter.calls == 1


def test_view_is_kept_in_eval_mode_until_a_factor_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter(monkeypatch, Monarch)
    layer = make(Monarch(blocks=3)).eval()
    with torch.no_grad():
        for _ in range(3):
            layer.weight.sum()
        assert counter.calls == 1
        assert layer.memory()["dense view"] == 4 * M * N
        layer.right.add_(1)
        changed = layer.weight + 0
        assert counter.calls == 2
        assert torch.equal(changed, layer.dense())
        layer.right[0, 0, 0] = 5
        assert torch.equal(layer.weight + 0, Monarch(blocks=3).dense(layer.factors, M, N))
        assert counter.calls == 4, "the line above counts one itself"
        layer.bias.add_(1)
        layer.weight.sum()
        assert counter.calls == 4, "the bias is no factor"
        layer.train()
        assert layer.memory()["dense view"] == 0
        layer.weight.sum()
        layer.weight.sum()
        assert counter.calls == 6, "nothing is kept in training"
        assert layer.memory()["dense view"] == 0


def stale(layer: StructuredLinear) -> bool:
    """Whether the view differs from the factors, without gradients."""
    with torch.no_grad():
        return not torch.equal(layer.weight + 0, layer.format.dense(layer.factors, M, N))


CHANGES: dict[str, Callable[[StructuredLinear], object]] = {
    "state dict": lambda layer: layer.load_state_dict(make(layer.format, seed=5).state_dict()),
    "state dict, assigned": lambda layer: layer.load_state_dict(make(layer.format, seed=5).state_dict(), assign=True),
    "reset": lambda layer: layer.reset_parameters(generator(7)),
    "new parameter": lambda layer: setattr(layer, "right", nn.Parameter(torch.ones_like(layer.right))),
    "new data": lambda layer: setattr(layer.right, "data", torch.ones_like(layer.right)),
    "optimizer": lambda layer: step(layer),
    "to and back": lambda layer: layer.to(torch.bfloat16).to(torch.float32),
}


def step(layer: StructuredLinear) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(inputs(4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_view_follows_every_way_to_change_a_factor(change: Callable[[StructuredLinear], object]) -> None:
    layer = make(Monarch(blocks=3)).eval()
    assert not stale(layer)
    before = layer.dense().detach().clone()
    change(layer)
    assert not stale(layer)
    assert not torch.equal(layer.dense(), before), "the test's change changed nothing"


def test_view_does_not_trust_an_address_used_twice() -> None:
    # A factor that took the place of another in memory, with the same count of changes, is another factor.
    layer = make(Monarch(blocks=3)).eval()
    shape = layer.right.shape
    for seed in range(20):
        layer.right = None  # the old factor's memory is free for the new one
        layer.right = nn.Parameter(torch.full(shape, float(seed)))
        assert not stale(layer), f"stale after {seed} replacements"


@pytest.fixture
def one_rank_mesh(tmp_path: Path) -> Iterator[torch.distributed.DeviceMesh]:
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_view_follows_sharded_factors(one_rank_mesh: torch.distributed.DeviceMesh) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    layer = make(Monarch(blocks=3)).eval()
    for name in ("right", "left"):
        setattr(layer, name, nn.Parameter(distribute_tensor(getattr(layer, name).detach(), one_rank_mesh, [Shard(0)])))
    for _ in range(5):
        with torch.no_grad():
            seen = layer.weight + 0
            whole = {name: value.full_tensor() for name, value in layer.factors.items()}
            assert torch.equal(seen, layer.format.dense(whole, M, N))
            layer.right.mul_(2)


def test_view_kept_from_inference_mode_serves_autograd() -> None:
    layer = make(Monarch(blocks=3)).eval().requires_grad_(False)
    with torch.inference_mode():
        layer.weight.sum()
    x = inputs(2).requires_grad_()
    nn.functional.linear(x, layer.weight).sum().backward()
    assert torch.allclose(x.grad, layer.dense().sum(0).expand(2, N))


def test_a_cast_lets_the_kept_view_go() -> None:
    layer = make(Monarch(blocks=3)).eval()
    with torch.no_grad():
        layer.weight.sum()
    assert layer.memory()["dense view"] > 0
    layer.to(torch.bfloat16)
    assert layer.memory() == {"factors": layer.cost().bytes, "bias": 2 * M, "dense view": 0, "derived": 0}


def test_the_kept_view_carries_no_gradient_but_the_live_one_does() -> None:
    layer = make(Monarch(blocks=3)).eval()
    with torch.no_grad():
        layer.weight.sum()
        assert layer.memory()["dense view"]
    (layer.weight * gaussian(M, N, dtype=torch.float32)).sum().backward()
    assert layer.right.grad is not None
    assert layer.right.grad.abs().sum() > 0


@every_format
@pytest.mark.parametrize("training", [True, False])
def test_gradient_flows_through_the_view(fmt: Format, training: bool) -> None:
    x = inputs(5, dtype=torch.float64)
    layer, through = (make(fmt, dtype=torch.float64).train(training) for _ in range(2))
    layer(x).square().sum().backward()
    nn.functional.linear(x, through.weight, through.bias).square().sum().backward()
    for (name, mine), (_, theirs) in zip(layer.named_parameters(), through.named_parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-9, atol=1e-10), name


WRITES: dict[str, Callable[[Tensor], object]] = {
    "zero_": lambda view: view.zero_(),
    "setitem": lambda view: view.__setitem__(0, 0.0),
    "init": lambda view: nn.init.ones_(view),
    "copy_": lambda view: view.copy_(torch.ones(M, N)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fmt", [Dense(), Monarch(blocks=3)], ids=lambda fmt: fmt.name)
def test_writing_into_the_view_changes_nothing(fmt: Format, training: bool, write: Callable[[Tensor], object]) -> None:
    layer = make(fmt).train(training)
    before = {k: v.detach().clone() for k, v in layer.factors.items()}
    with torch.no_grad():
        layer.weight.sum()
        with contextlib.suppress(RuntimeError, IsogridError):  # to refuse is fine too
            write(layer.weight)
    assert all(torch.equal(layer.factors[k], before[k]) for k in before)
    assert not stale(layer)


# ---- merging -------------------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("bias", [True, False])
def test_merge(fmt: Format, bias: bool) -> None:
    layer = make(fmt, bias=bias, dtype=torch.float64).eval()
    merged = layer.merge()
    assert type(merged) is nn.Linear
    assert not merged.training
    assert merged.weight.dtype == torch.float64
    assert merged.weight.is_contiguous(), "safetensors refuses other layouts"
    assert all(value.requires_grad and value.is_leaf for value in merged.parameters())
    x = inputs(4, dtype=torch.float64)
    assert torch.allclose(merged(x), layer(x), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        for value in merged.parameters():
            value.zero_()
    assert layer.dense().abs().sum() > 0
    assert not stale(layer)


# ---- what PyTorch does to layers -----------------------------------------------------------------------------------


@every_format
def test_autocast(fmt: Format) -> None:
    layer = make(fmt)
    x = inputs(8)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 2e-2 * exact.norm()
    assert all(value.grad is not None and value.grad.dtype == torch.float32 for value in layer.parameters())


@every_format
def test_deepcopy_and_pickle(fmt: Format) -> None:
    layer = make(fmt).eval()
    with torch.no_grad():
        layer.weight.sum()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    for twin in copies:
        assert twin.format == layer.format
        assert torch.equal(twin(inputs(3)), layer(inputs(3)))
        assert twin.memory()["dense view"] == 0, "caches are never saved"
        with torch.no_grad():
            for value in twin.parameters():
                value.zero_()
        assert not twin.dense().any()
        assert layer.dense().any()
    assert layer.memory()["dense view"] > 0, "copying doesn't drop the original's cache"


@every_format
def test_dtype_casts_leave_indices_alone(fmt: Format) -> None:
    layer = make(fmt)
    kinds = {k: v.dtype for k, v in layer.named_buffers()}
    orders = {k: v.clone() for k, v in layer.named_buffers()}
    for cast, dtype in (
        (lambda: layer.to(torch.bfloat16), torch.bfloat16),
        (lambda: layer.double(), torch.float64),
        (lambda: layer.half(), torch.float16),
        (lambda: layer.float(), torch.float32),
    ):
        cast()
        assert all(value.dtype == dtype for value in layer.parameters())
        assert {k: v.dtype for k, v in layer.named_buffers()} == kinds
        assert all(torch.equal(orders[k], v) for k, v in layer.named_buffers())
        assert layer.weight.dtype == dtype
        assert layer(inputs(2, dtype=dtype)).dtype == dtype


@every_format
def test_state_dict_round_trip(fmt: Format, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    layer, other = make(fmt), make(fmt, seed=1)
    assert set(layer.state_dict()) == {*fmt.factors(M, N), "bias"}
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(layer(inputs(3)), other(inputs(3)))
    merged = layer.merge()
    save_file(merged.state_dict(), tmp_path / "merged.safetensors")


def nested(seed: int) -> nn.Sequential:
    return nn.Sequential(nn.Sequential(make(LowRankLight(rank=2), seed=seed), nn.Linear(M, 3)), nn.ReLU())


@pytest.mark.parametrize("assign", [False, True])
def test_the_empty_weight_mark_is_accepted(assign: bool) -> None:
    layer, loaded = nested(0), nested(1)
    state = layer.state_dict()
    marked = state | {"0.0.weight": torch.empty(0)}
    names = set(marked)
    result = loaded.load_state_dict(marked, assign=assign)
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    assert set(marked) == names, "the caller's dictionary is not changed"
    assert torch.equal(loaded(inputs(4)), layer(inputs(4)))
    alone = make(LowRankLight(rank=2), seed=4)
    alone.load_state_dict(layer[0][0].state_dict() | {"weight": torch.empty(0)})
    assert torch.equal(alone.left, layer[0][0].left)


def test_other_keys_beside_the_mark_are_still_errors() -> None:
    loaded = nested(1)
    marked = nested(0).state_dict() | {
        "0.0.weight": torch.empty(0),
        "0.0.extra": torch.zeros(1),
        "0.0.weight2": torch.zeros(0),
    }
    result = loaded.load_state_dict(marked, strict=False)
    assert sorted(result.unexpected_keys) == ["0.0.extra", "0.0.weight2"]
    del marked["0.0.left"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*0\.0\.left.*Unexpected key.*0\.0\.extra"):
        loaded.load_state_dict(marked)


def test_a_dense_weight_is_an_unexpected_key() -> None:
    state = nested(0).state_dict() | {"0.0.weight": torch.zeros(M, N)}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0\.0\.weight"'):
        nested(1).load_state_dict(state)
    assert nested(1).load_state_dict(state, strict=False).unexpected_keys == ["0.0.weight"]


@every_format
def test_a_factor_of_another_shape_is_an_error(fmt: Format) -> None:
    state = make(fmt).state_dict()
    first = next(iter(state))
    with pytest.raises(RuntimeError, match=f"size mismatch for {first}"):
        make(fmt).load_state_dict(state | {first: torch.zeros(2, 2, 2, 2)})


@every_format
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(fmt: Format, reentrant: bool) -> None:
    layer = make(fmt, dtype=torch.float64)
    x = inputs(4, dtype=torch.float64).requires_grad_()
    layer(x).square().sum().backward()
    plain = [x.grad.clone(), *(value.grad.clone() for value in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    again = [x.grad, *(value.grad for value in layer.parameters())]
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@every_format
def test_functional_call_under_vmap(fmt: Format) -> None:
    layer = make(fmt, dtype=torch.float64)
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    x = inputs(6, 3, dtype=torch.float64)

    def call(given: dict[str, Tensor], rows: Tensor) -> Tensor:
        return torch.func.functional_call(layer, (given, buffers), (rows,))

    assert torch.allclose(torch.vmap(call, in_dims=(None, 0))(parameters, x), layer(x), atol=1e-12)
    # Per-sample gradients, and an ensemble of layers.
    per_sample = torch.vmap(torch.func.grad(lambda p, rows: call(p, rows).square().sum()), in_dims=(None, 0))(
        parameters, x
    )
    for i in range(6):
        grads = torch.autograd.grad(layer(x[i]).square().sum(), parameters.values())
        for name, grad in zip(parameters, grads, strict=True):
            assert torch.allclose(per_sample[name][i], grad, atol=1e-10), name
    twins = [make(fmt, dtype=torch.float64, seed=seed) for seed in (3, 4)]
    stacked = {name: torch.stack([dict(twin.named_parameters())[name] for twin in twins]) for name in parameters}
    ensemble = torch.vmap(call, in_dims=(0, None))(stacked, x[0])
    assert torch.allclose(ensemble, torch.stack([twin(x[0]) for twin in twins]), atol=1e-12)


@every_format
def test_on_the_meta_device(fmt: Format) -> None:
    for layer in (StructuredLinear(N, M, fmt, device="meta"), _under_meta(fmt)):
        assert all(value.is_meta for value in layer.state_dict().values())
        assert layer.weight.is_meta
        assert layer.weight.shape == (M, N)
        assert layer(torch.empty(3, N, device="meta")).shape == (3, M)
        layer.load_state_dict(make(fmt).state_dict(), assign=True)
        assert torch.equal(layer(inputs(2)), make(fmt)(inputs(2)))
    empty = StructuredLinear(N, M, fmt, device="meta").to_empty(device="cpu")
    empty.reset_parameters(generator())
    assert torch.equal(empty.dense(), StructuredLinear(N, M, fmt, generator=generator()).dense())


def _under_meta(fmt: Format) -> StructuredLinear:
    with torch.device("meta"):
        return StructuredLinear(N, M, fmt)


def test_a_layer_of_huge_sizes_on_the_meta_device() -> None:
    layer = StructuredLinear(2**20, 2**21, Monarch(blocks=1024, rank=1), device="meta")
    assert layer.weight.numel() == 2**41
    assert layer.cost().parameters == 1024 * 1024 * (2**10 + 2**11)


@pytest.mark.slow
@every_format
def test_compiles_in_one_graph(fmt: Format) -> None:
    torch.compiler.reset()
    layer = make(fmt, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = inputs(4, dtype=torch.float64).requires_grad_()
    y = compiled(x)
    assert torch.allclose(y, layer(x), atol=1e-12)
    grads = torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))
    plain = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
    assert all(torch.allclose(one, other, atol=1e-10) for one, other in zip(grads, plain, strict=True))


@pytest.mark.slow
def test_the_view_compiles() -> None:
    torch.compiler.reset()
    layer = make(Monarch(blocks=3)).eval()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def through(x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)

    assert torch.allclose(through(inputs(3)), layer(inputs(3)), atol=1e-5)


def _rank_main(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = nn.Sequential(*(make(fmt, dtype=torch.float64, seed=rank) for fmt in (FORMATS["light"],)))
    with torch.no_grad():
        model[0].order.copy_(torch.randperm(N, generator=generator(rank)))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(inputs(8, dtype=torch.float64)[4 * rank : 4 * rank + 4]).square().mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    # Taken down in order, gloo now and then waits for a thread of its own that waits for Python.
    os._exit(0)


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank_main, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first), "ranks differ"
    # One process on the whole batch, from rank 0's start.
    alone = make(FORMATS["light"], dtype=torch.float64, seed=0)
    with torch.no_grad():
        alone.order.copy_(torch.randperm(N, generator=generator(0)))
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        alone(inputs(8, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    for name, value in alone.state_dict().items():
        assert torch.allclose(value, first[f"0.{name}"], atol=1e-12), name
