import contextlib
import threading

import pytest
import torch
from torch import nn

from isogrid.compress import select_layers
from isogrid.compress.calibrate import forward_calls
from isogrid.compress.lockstep import lockstep
from isogrid.errors import IsogridError
from tests import models


def run(model, batches, visit, select=None):
    layers = select_layers(model, select)
    with torch.no_grad():
        return lockstep(model, forward_calls(model, batches), layers, visit)


def keep_layer(model):
    return lambda name, halts: model.get_submodule(name)


def assert_nothing_left(model):
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("isogrid-calibration")]
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5", "vit", "blocks"])
def test_layers_are_visited_once_in_the_order_of_execution_by_all_batches(name):
    architecture = models.ARCHITECTURES[name]
    model = architecture.build()
    batches = [architecture.batch(seed) for seed in range(3)]
    executed, visited = [], []
    handles = [
        layer.register_forward_pre_hook(lambda *_, layer_name=layer_name: executed.append(layer_name))
        for layer_name, layer in select_layers(model).items()
    ]
    models.output(model, batches[0])
    for handle in handles:
        handle.remove()

    def visit(layer_name, halts):
        visited.append(layer_name)
        assert [halt.index for halt in halts] == [0, 1, 2]
        return model.get_submodule(layer_name)

    assert run(model, batches, visit) == set(executed)
    assert visited == executed
    assert_nothing_left(model)


def test_order_is_that_of_execution_and_not_of_definition():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.middle, self.first = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.last(self.middle(self.first(x)))

    model, visited = Backwards(), []

    def visit(name, halts):
        visited.append(name)
        return model.get_submodule(name)

    run(model, [torch.randn(4, 8)], visit)
    assert visited == ["first", "middle", "last"]


def test_inputs_are_those_of_the_model_with_the_layers_replaced_so_far():
    model = models.blocks()
    batches = [models.feature_batch(seed, rows=5) for seed in range(3)]
    reference = models.blocks()

    def visit(name, halts):
        expected = []
        handle = reference.get_submodule(name).register_forward_pre_hook(lambda _, args: expected.append(args[0]))
        for batch in batches:
            reference(batch)
        handle.remove()
        for x, y in zip(halts, expected, strict=True):
            assert torch.equal(x.input, y)
        old = model.get_submodule(name)
        new = nn.Linear(old.in_features, old.out_features, bias=False)
        nn.init.constant_(new.weight, 0.01 * len(name))
        reference.set_submodule(name, new)
        return new

    visited = run(model, batches, visit)
    assert len(visited) == 4
    assert all(model.get_submodule(name) is reference.get_submodule(name) for name in visited)
    assert torch.equal(models.output(model, batches[0]), models.output(reference, batches[0]))


def test_a_layer_may_stay():
    model = models.blocks()
    before = models.snapshot(model)
    run(model, [models.feature_batch()], keep_layer(model))
    models.assert_untouched(model, before)


def test_same_inputs_every_time():
    def inputs_of_one_run():
        model, seen = models.bert(), []

        def visit(name, halts):
            seen.extend((name, halt.input.clone()) for halt in halts)
            return model.get_submodule(name)

        run(model, [models.padded_batch(seed) for seed in range(6)], visit)
        return seen

    one, two = inputs_of_one_run(), inputs_of_one_run()
    assert [name for name, _ in one] == [name for name, _ in two]
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(one, two, strict=True))


def test_only_one_thread_runs_at_a_time():
    inside, most = 0, 0
    lock = threading.Lock()

    class Busy(nn.Module):
        def forward(self, x):
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
            for _ in range(20):
                x = x @ torch.eye(x.shape[-1])
            with lock:
                inside -= 1
            return x

    model = nn.Sequential(Busy(), nn.Linear(16, 16), Busy(), nn.Linear(16, 16), Busy(), nn.Linear(16, 16))
    run(model, [torch.randn(64, 16) for _ in range(8)], keep_layer(model))
    assert most == 1


def test_gradients_are_off_in_the_threads():
    model = models.mlp()

    def visit(name, halts):
        assert not any(halt.input.requires_grad for halt in halts)
        return model.get_submodule(name)

    lockstep(model, forward_calls(model, [models.feature_batch()]), select_layers(model), visit)


# ---- the end ------------------------------------------------------------------------------------------------------


def test_what_comes_after_the_last_layer_does_not_run():
    model = models.blocks()
    model.head.register_forward_pre_hook(lambda *_: model.calls.add_(1) and None)
    models.output(model, models.feature_batch())
    assert int(model.calls) == 1
    run(model, [models.feature_batch(seed) for seed in range(4)], keep_layer(model))
    assert int(model.calls) == 1
    assert_nothing_left(model)


def test_even_a_model_that_catches_exceptions_is_stopped():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.after = nn.Linear(8, 8), 0

        def forward(self, x):
            try:
                x = self.linear(x)
            except Exception:
                self.after += 1
            self.after += 1
            return x

    model = Stubborn()
    run(model, [torch.randn(2, 8)] * 2, keep_layer(model))
    assert model.after == 0
    assert_nothing_left(model)


# ---- failures -----------------------------------------------------------------------------------------------------


class BreakdownError(RuntimeError):
    pass


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("error", [BreakdownError, KeyboardInterrupt])
def test_an_exception_in_visit_propagates_and_leaves_nothing(at, error):
    model, visited = models.blocks(), []

    def visit(name, halts):
        if len(visited) == at:
            raise error("here")
        visited.append(name)
        return model.get_submodule(name)

    with pytest.raises(error, match="here"):
        run(model, [models.feature_batch(seed) for seed in range(3)], visit)
    assert_nothing_left(model)


class Fragile(nn.Module):
    """Breaks between its layers on a batch whose first number is negative."""

    def __init__(self, error):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.error = error

    def forward(self, x):
        bad = x[0, 0] < 0
        x = self.second(self.first(x))
        if bad:
            raise self.error("inside the model")
        return self.third(x)


@pytest.mark.parametrize("error", [BreakdownError, SystemExit])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_exception_in_the_model_propagates_and_leaves_nothing(bad, error):
    model = Fragile(error)
    batches = [torch.rand(4, 8) * (-1 if at == bad else 1) for at in range(3)]
    with pytest.raises(error, match="inside the model"):
        run(model, batches, keep_layer(model))
    assert_nothing_left(model)


def test_an_exception_before_the_first_layer():
    model = models.mlp()
    with pytest.raises(IsogridError, match="shapes cannot be multiplied"):
        run(model, [torch.randn(2, 24), torch.randn(2, 5)], keep_layer(model), select=["2", "4"])
    assert_nothing_left(model)


def test_a_replacement_that_fails_stops_everything():
    model = models.mlp()
    with pytest.raises(IsogridError, match="shapes cannot be multiplied"):
        run(model, [models.feature_batch()] * 2, lambda *_: nn.Linear(7, 7))
    assert_nothing_left(model)


# ---- models in which batches take different ways ------------------------------------------------------------------


class Experts(nn.Module):
    """The sign of a batch's first number chooses one of two experts; one more is never chosen."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        expert = self.experts[int(x[0, 0] < 0)]
        return self.head(expert(self.stem(x)))


def signed(sign, seed):
    return sign * (0.1 + torch.rand(6, 8, generator=models.generator(seed)))


def test_different_ways_all_layers_see_exactly_their_batches():
    model, seen = models.shake(Experts(), 0), {}
    signs = [1, -1, -1, 1, -1]

    def visit(name, halts):
        seen[name] = [halt.index for halt in halts]
        return model.get_submodule(name)

    visited = run(model, [signed(sign, seed) for seed, sign in enumerate(signs)], visit, select="*")
    assert seen == {"stem": [0, 1, 2, 3, 4], "experts.0": [0, 3], "experts.1": [1, 2, 4], "head": [0, 1, 2, 3, 4]}
    assert visited == set(seen)
    assert_nothing_left(model)


def test_a_layer_nobody_reaches_is_not_visited_and_every_pass_ends():
    model = models.shake(Experts(), 0)
    before = models.snapshot(model)
    assert run(model, [signed(1, 0), signed(1, 1)], keep_layer(model), select="*") == {"stem", "experts.0", "head"}
    models.assert_untouched(model, before)
    assert_nothing_left(model)


def test_no_layer_reached_at_all():
    model = models.shake(Experts(), 0)
    assert run(model, [signed(1, 0)], keep_layer(model), select="experts.2") == set()
    assert_nothing_left(model)


def test_a_batch_that_comes_late_goes_through_the_replaced_layer():
    class Detour(nn.Module):
        """Long batches pass an extra layer before the common one, and the common one twice."""

        def __init__(self):
            super().__init__()
            self.common, self.extra = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.results = []

        def forward(self, x):
            y = self.common(self.common(x) if len(x) > 4 else x)
            self.results.append(y)
            return self.extra(y) if len(x) > 4 else y

    model = models.shake(Detour(), 0)
    calls = []

    def visit(name, halts):
        calls.append((name, [halt.index for halt in halts]))
        new = nn.Linear(8, 8, bias=False)
        nn.init.eye_(new.weight)
        return new

    x, long = torch.rand(4, 8), torch.rand(6, 8)
    run(model, [x, long], visit)
    assert calls == [("common", [0, 1]), ("extra", [1])]
    # Identity everywhere, also at the second pass through the layer.
    assert torch.equal(model.results[0], x)
    assert torch.equal(model.results[1], long)


def test_two_batches_in_opposite_order():
    class Swap(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.a(self.b(x)) if x[0, 0] < 0 else self.b(self.a(x))

    model, visited = models.shake(Swap(), 0), []

    def visit(name, halts):
        visited.append((name, [halt.index for halt in halts]))
        return model.get_submodule(name)

    run(model, [signed(1, 0), signed(-1, 1), signed(1, 2)], visit)
    assert [name for name, _ in visited] == ["a", "b"]
    assert visited[0][1] == [0, 2]
    assert_nothing_left(model)


def test_a_layer_called_with_its_input_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(input=x)

    model = Named()
    assert run(model, [torch.randn(4, 8)], keep_layer(model)) == {"linear"}


def test_a_forward_that_others_put_on_a_layer_comes_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plain = model[0].forward
    model[0].forward = lambda x: plain(x)  # as accelerate's hooks do
    theirs = model[0].forward

    def visit(*_):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        lockstep(model, [lambda: model(torch.ones(1, 4))], {"0": model[0]}, visit)
    assert model[0].forward is theirs


def test_a_model_that_swallows_everything_leaves_no_thread():
    class Swallowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            with contextlib.suppress(BaseException):
                x = self.first(x)
            return self.second(x)

    def visit(*_):
        raise ValueError("no")

    model, before = Swallowing(), threading.active_count()
    layers = {"first": model.first, "second": model.second}
    with pytest.raises(ValueError, match="no"):
        lockstep(model, [lambda: model(torch.ones(1, 4))] * 2, layers, visit)
    assert threading.active_count() == before


def test_originals_run_to_their_end_where_asked_for():
    model = models.mlp()
    batches = [torch.randn(4, 24, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    expected = [model(batch) for batch in batches]
    found = {}

    def keeping(index, call):
        def run_and_keep():
            found[index] = call()

        return run_and_keep

    originals = [keeping(index, call) for index, call in enumerate(forward_calls(model, batches))]

    def zeroed(name, halts):
        layer = model.get_submodule(name)
        new = nn.Linear(layer.in_features, layer.out_features)
        nn.init.zeros_(new.weight)
        return new

    lockstep(model, forward_calls(model, batches), select_layers(model), zeroed, originals, finish_originals=True)
    assert all(torch.equal(found[index], wanted) for index, wanted in enumerate(expected))
    assert_nothing_left(model)
