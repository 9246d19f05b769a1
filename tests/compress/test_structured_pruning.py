import copy
import itertools

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import isogrid
from isogrid import BudgetError, IsogridError, IsogridWarning, TokenDistillation, prune, prune_family
from isogrid.checkpoint import describe_pruned
from isogrid.compress import How, Pruner, collect_moments
from isogrid.compress.structured_pruning import SavedTimes
from isogrid.compress.structured_pruning import pruner as pruner_module
from isogrid.compress.structured_pruning import times as times_module
from isogrid.compress.structured_pruning.orders import damped, order_modules
from isogrid.compress.structured_pruning.pruner import levels_of
from isogrid.compress.structured_pruning.search import Found
from isogrid.compress.structured_pruning.times import block_of, falling, measure_times
from isogrid.evaluation import Timing
from isogrid.fitting import removal_cost
from isogrid.linear import find_coupled, linear_matrix
from tests import models
from tests.linear.test_shrink import qwen3

BATCHES = {"llama": models.token_batch, "llama_tied": models.token_batch, "bert": models.padded_batch,
           "gpt2": models.token_batch, "vit": models.image_batch}  # fmt: skip
NAMES = tuple(BATCHES)
BRIEF = TokenDistillation(steps=6, rows=24, look_every=3, rate=0.01)


def data(name, count=6):
    return [BATCHES[name](seed) for seed in range(count)]


def made_up(model, base=12.0):
    """Times by width: a table that no machine has measured, so that nothing here depends on one."""
    saved = {}
    for name, module in find_coupled(model).items():
        whole = 2.0 if module.kind == "attention" else 3.0
        saved[name] = {units: whole * (1 - units / module.units) for units in levels_of(module)}
    return SavedTimes(base, saved)


def pruner(model, name="llama", **options):
    return Pruner(model, data(name), times=made_up(model), **options)


def orders(model, batches, how):
    modules = find_coupled(model)
    writers = {module.writer: model.get_submodule(module.writer) for module in modules.values()}
    return order_modules(model, modules, collect_moments(model, writers, batches), how)


@pytest.mark.parametrize("name", NAMES)
def test_one_shot(name, tmp_path):
    model = models.TRANSFORMERS[name].build()
    dense = copy.deepcopy(model)
    batch = BATCHES[name](99)
    report = prune(model, data(name), speedup=1.5, times=made_up(model), trials=4, repeats=1)
    assert report.predicted >= 1.5 - 1e-6
    assert report.predicted_milliseconds == pytest.approx(12 - sum(one.saved for one in report.modules))
    assert {one.name: (one.kept, one.of) for one in report.modules if one.kept < one.of} == {
        key: (entry.units, entry.of) for key, entry in describe_pruned(model).items()
    }
    assert report.parameters == sum(value.numel() for value in {id(v): v for v in model.parameters()}.values())
    assert report.parameters < report.dense_parameters
    assert report.loss <= report.first_loss
    assert set(report.milliseconds) == {"dense", "pruned"}
    assert all(0 <= one.error <= 1 + 1e-9 for one in report.modules)
    assert find_coupled(dense).keys() >= find_coupled(model).keys()
    isogrid.save(model, tmp_path / "m")
    assert torch.equal(models.exact_output(isogrid.load(tmp_path / "m"), batch), models.exact_output(model, batch))
    assert "speedup 1.5 asked for, predicted 1." in str(report)
    assert report.to_dict()["modules"][0]["unit"] in ("head", "group", "channel")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_model_is_the_masked_dense_one(name, bias):
    model = models.TRANSFORMERS[name].build()
    masked = copy.deepcopy(model)
    found = pruner(model, name, how=How(bias=bias))
    chosen = found.choose(1.6, allocate="errors")
    for key, order in found.orders.items():
        weight, shift = order.numbers(chosen.units[key])
        layer = masked.get_submodule(order.module.writer)
        full = torch.zeros_like(linear_matrix(layer))
        full[:, order.module.columns(order.kept(chosen.units[key]))] = weight
        layer.weight = nn.Parameter(full if isinstance(layer, nn.Linear) else full.mT)
        if shift is not None:
            layer.bias = nn.Parameter(shift)
    judged = found.loss(chosen.units)
    found.apply(chosen, 1.6)
    batch = BATCHES[name](7)
    torch.testing.assert_close(models.output(model, batch), models.output(masked, batch), rtol=1e-5, atol=1e-5)
    assert judged > 0


def test_errors_are_relative_output_errors():
    """The curve of a module, from its inputs: 0 for all structures, 1 for none, and what a refit leaves in between."""
    model, batches = models.bert(), data("bert")
    how = How(damping=0.0, swaps=8)
    for order in orders(model, batches, how).values():
        inputs: list[torch.Tensor] = []
        handle = order.layer.register_forward_pre_hook(lambda _, args, into=inputs: into.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        handle.remove()
        real = [x[batch["attention_mask"].bool()] for x, batch in zip(inputs, batches, strict=True)]
        x = torch.cat(real).double()
        weight, bias = order.layer.weight.detach().double(), order.layer.bias.detach().double()
        outputs = x @ weight.mT + bias
        scale = (outputs - outputs.mean(0)).square().sum()
        curve = [order.error(units) for units in levels_of(order.module)]
        assert curve[0] == 0
        assert curve[-1] == pytest.approx(1, abs=1e-9)
        assert curve == sorted(curve)
        for units in levels_of(order.module)[1:-1:3]:
            found, shift = order.numbers(units)
            now = x[:, order.module.columns(order.kept(units))] @ found.double().mT + shift.double()
            assert float((now - outputs).square().sum() / scale) == pytest.approx(
                order.error(units), rel=1e-3, abs=1e-6
            )
            # The bias takes up the mean exactly.
            torch.testing.assert_close(now.mean(0), outputs.mean(0), rtol=1e-4, atol=1e-4)


def test_a_bias_makes_errors_smaller():
    model, batches = models.llama(), data("llama")
    with_bias, without = (orders(model, batches, How(bias=bias)) for bias in (True, False))
    for name, order in with_bias.items():
        units = order.module.units // 2
        assert order.error(units) * order.total < without[name].error(units) * without[name].total


def test_magnitude_keeps_the_largest_columns_as_they_are():
    model = models.llama()
    for order in orders(model, data("llama"), How(criterion="magnitude")).values():
        units = order.module.units // 2
        weight, bias = order.numbers(units)
        assert bias is None
        assert torch.equal(weight, linear_matrix(order.layer)[:, order.module.columns(order.kept(units))])
        sizes = linear_matrix(order.layer).view(32, order.module.units, -1).square().sum((0, 2))
        assert set(order.kept(units).tolist()) == set(sizes.topk(units).indices.tolist())


def test_the_surgeon_loses_less_than_magnitudes():
    model = models.llama()
    chosen = {name: module.units // 2 for name, module in find_coupled(model).items()}
    losses = [pruner(model, how=How(criterion=one)).loss(chosen) for one in ("obs", "magnitude")]
    assert losses[0] < losses[1]


def test_channel_swaps_never_lose():
    model, batches = models.llama(), data("llama")
    plain, polished = (orders(model, batches, How(channel_swaps=count)) for count in (0, 20))
    for name, order in polished.items():
        units = order.module.units // 3
        order.polish(units)
        hessian, weight = damped(order.metric, order.how), linear_matrix(order.layer)
        costs = [removal_cost(weight, hessian, one.kept(units), width=one.module.width) for one in (order, plain[name])]
        assert costs[0] <= costs[1] * (1 + 1e-12)


def measured_errors(dense, pruned, found, batches):
    """Of each writer, on the dense model's inputs: squared error of outputs over their size, both about the mean."""
    errors = {}
    for name, module in found.modules.items():
        before, after = dense.get_submodule(module.writer), pruned.get_submodule(module.writer)
        inputs: list[torch.Tensor] = []
        handle = before.register_forward_pre_hook(lambda _, args, into=inputs: into.append(args[0].flatten(0, 1)))
        for batch in batches:
            models.output(dense, batch)
        handle.remove()
        x, order = torch.cat(inputs).double(), found.orders[name]
        kept = x[:, module.columns(order.kept(linear_matrix(after).shape[1] // module.width))]
        wanted = x @ linear_matrix(before).double().mT
        lost = wanted - kept @ linear_matrix(after).double().mT
        if found.how.bias and found.how.criterion == "obs":
            wanted, lost = wanted - wanted.mean(0), lost - lost.mean(0)
        errors[name] = float(lost.square().sum() / wanted.square().sum())
    return errors


@pytest.mark.parametrize(
    "how",
    [How(), How(bias=False), How(criterion="magnitude"), How(channel_swaps=50, bias=False)],
)
def test_the_report_says_what_the_pruned_model_does(how):
    model, batches = models.llama(), data("llama")
    dense = copy.deepcopy(model)
    found = pruner(model, how=how)
    units = found.choose(1.5, allocate="errors").units
    chosen = Found(units, found.loss(units))
    kept = {name: order.kept(units[name]) for name, order in found.orders.items()}
    small = copy.deepcopy(model)
    report = found.apply(chosen, 1.5, small)
    swaps = [name for name, order in found.orders.items() if not torch.equal(kept[name], order.kept(units[name]))]
    assert bool(swaps) is (how.channel_swaps > 0)
    fresh = pruner_module.Judge(model, found.orders, found.batches, pruner_module.JUDGED_TOKENS)
    with torch.no_grad():
        assert report.loss == pytest.approx(fresh(units), rel=1e-6)
    assert (report.loss == chosen.loss) is not bool(swaps)
    measured = measured_errors(dense, small, found, batches)
    assert {one.name: one.error for one in report.modules} == pytest.approx(measured, rel=1e-3, abs=1e-6)


def test_another_way_to_prune_measures_nothing_anew(monkeypatch):
    model, how = models.llama(), How(criterion="magnitude")
    first, fresh = pruner(model), pruner(model, how=how)
    before = first.choose(1.5, trials=2)
    monkeypatch.setattr(pruner_module, "collect_moments", None)
    other = first.otherwise(how)
    for allocate in ("errors", "search"):
        assert other.choose(1.5, allocate=allocate, trials=2) == fresh.choose(1.5, allocate=allocate, trials=2)
    assert first.choose(1.5, trials=2) == before != other.choose(1.5, trials=2)
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    other.apply(other.choose(1.5, allocate="errors"), 1.5, one)
    fresh.apply(fresh.choose(1.5, allocate="errors"), 1.5, two)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_channels_that_never_fire_go_first():
    model = models.gpt2()
    layer = model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        layer.weight[:, 10:30] = 0
        layer.bias[10:30] = 0  # gelu(0) = 0
    order = orders(model, data("gpt2"), How())["transformer.h.0.mlp"]
    assert set(order.removal.order[:20].tolist()) == set(range(10, 30))
    assert order.error(76) == 0
    weight, _ = order.numbers(76)
    torch.testing.assert_close(weight, linear_matrix(order.layer)[:, order.module.columns(order.kept(76))])


def test_uniform_takes_the_same_share_of_all():
    model = models.llama()
    found = pruner(model)
    chosen = found.choose(1.5, allocate="uniform")
    shares = {chosen.units[name] / module.units for name, module in found.modules.items() if module.kind != "attention"}
    assert len(shares) == 1
    assert found.times.base / found.times.predicted(chosen.units) >= 1.5


@pytest.mark.parametrize("allocate", ["search", "errors", "uniform"])
@pytest.mark.parametrize("truth", [0.7, 1.2])
def test_sizes_are_chosen_by_what_cut_models_take(monkeypatch, truth, allocate):
    """The table says that modules save so much; in truth they save 0.7 or 1.2 of it."""
    model = models.llama()
    table = made_up(model)
    true = SavedTimes(12.0, {name: {u: truth * ms for u, ms in of.items()} for name, of in table.saved.items()})
    asked = []

    def share_of_time(_, modules, units, inputs, repeats):
        asked.append(units)
        return true.predicted(units) / true.base

    monkeypatch.setattr(pruner_module, "share_of_time", share_of_time)
    found = Pruner(model, data("llama"), times=table, checks=3)
    chosen = found.choose(1.3, allocate=allocate, trials=2)
    assert true.base / true.predicted(chosen.units) >= 1.3 - 1e-6
    assert found.times.predicted(chosen.units) == pytest.approx(true.predicted(chosen.units))
    assert 1 <= len(asked) <= 5
    # Without checks the table is taken at its word.
    blind = Pruner(model, data("llama"), times=table)
    units = blind.choose(1.3, allocate=allocate, trials=2).units
    assert table.base / table.predicted(units) >= 1.3 - 1e-6
    assert (true.base / true.predicted(units) >= 1.3) is (truth > 1)


def test_pruned_models_are_timed_against_themselves(monkeypatch):
    """A model at half its time is half of the table's base, whatever it takes now."""
    model = models.llama()
    table = made_up(model)
    half = {name: next(iter(sorted(of)[len(of) // 2 :])) for name, of in table.saved.items()}
    first = Pruner(model, data("llama"), times=table)
    first.apply(Found(half), 1.5)
    asked = []

    def share_of_time(_, modules, units, inputs, repeats):
        asked.append(units)
        return 0.8

    monkeypatch.setattr(pruner_module, "share_of_time", share_of_time)
    again = Pruner(model, data("llama"), times=table, checks=1)
    again.choose(1.1 * table.base / table.predicted(half), allocate="errors")
    assert again.times.base == table.base
    assert again.times.predicted(asked[0]) == pytest.approx(0.8 * table.predicted(half))


def test_selected_modules_only():
    model = models.llama()
    found = Pruner(model, data("llama"), times=None, select="feed_forward", repeats=1, cached=False)
    assert set(found.modules) == {"model.layers.0.mlp", "model.layers.1.mlp"} == set(found.times.saved)
    with pytest.raises(IsogridError, match="no module matches 'ffn'"):
        Pruner(model, data("llama"), select="ffn")


def test_modules_that_cannot_be_cut_are_left_out():
    model = models.llama()
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))
    for select in (None, "attention", "*.0.*"):
        with pytest.raises(IsogridError, match=r"layers.0.self_attn' has a parameter 'sinks'.*select them by name"):
            Pruner(model, data("llama"), select=select)
    whole = model.model.layers[0].self_attn.o_proj.weight
    table = made_up(models.llama())
    with pytest.raises(IsogridError, match=r"module 'model.layers.0.self_attn' is in the given times: .* 'sinks'"):
        Pruner(model, data("llama"), times=table, select="feed_forward")
    times = SavedTimes(table.base, {name: of for name, of in table.saved.items() if name != "model.layers.0.self_attn"})
    report = prune(
        model, data("llama"), speedup=1.5, times=times, trials=0, repeats=1, select=["feed_forward", "*.1.self_attn"]
    )
    assert {one.name for one in report.modules} == times.saved.keys()
    assert model.model.layers[0].self_attn.o_proj.weight is whole


def test_a_family_from_one_run(tmp_path):
    model = models.llama()
    before = models.snapshot(model)
    sizes = []
    for small, report in prune_family(
        model, data("llama"), speedups=[1.8, 1.2, 1.5], times=made_up(model), trials=2, repeats=1
    ):
        folder = isogrid.save(small, tmp_path / f"{report.speedup:g}")
        again = isogrid.load(folder)
        batch = models.token_batch(5)
        assert torch.equal(models.exact_output(again, batch), models.exact_output(small, batch))
        sizes.append(report.parameters)
        assert report.predicted >= report.speedup - 1e-6
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    models.assert_untouched(model, before)
    assert not describe_pruned(model)


def test_gradual():
    model = models.bert()
    before = models.snapshot(model)
    times = made_up(model)
    kept, trained = [], []
    for small, report in prune_family(
        model, data("bert", 8), speedups=[1.2, 1.5, 2.0], gradual=True, train=BRIEF, times=times, trials=2, repeats=1
    ):
        kept.append({one.name: one.kept for one in report.modules})
        trained.append(report.distilled)
        assert {one.name: one.of for one in report.modules} == {
            name: module.units for name, module in find_coupled(model).items() if name in kept[-1]
        }
        assert report.predicted >= report.speedup - 1e-6
        entries = describe_pruned(small)
        assert report.predicted_milliseconds == pytest.approx(
            times.predicted({name: entry.units for name, entry in entries.items()})
        )
    for first, then in itertools.pairwise(kept):
        assert all(then[name] <= first[name] for name in then)
    assert all(one is not None and one.after <= one.before for one in trained)
    models.assert_untouched(model, before)


def test_gradual_reads_its_data_once():
    model = models.bert()
    batches = (batch for batch in data("bert", 8))
    family = prune_family(
        model, batches, speedups=[1.2, 1.5], gradual=True, train=BRIEF, times=made_up(model), trials=1, repeats=1
    )
    assert [report.speedup for _, report in family] == [1.2, 1.5]


def test_training_after_one_shot_comes_nearer_to_the_dense_model():
    model = models.llama()
    dense = copy.deepcopy(model)
    settings = TokenDistillation(steps=60, rows=24, look_every=20, rate=0.01)
    report = prune(model, data("llama", 64), speedup=1.5, times=made_up(model), trials=0, repeats=1, train=settings)
    # On batches that it was not trained on.
    assert report.distilled.after < report.distilled.before
    # The teacher stays what it was, though both began with the same numbers.
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight[:1], dense.model.layers[0].mlp.up_proj.weight[:1])


def test_a_pruned_model_can_be_pruned_again():
    model = models.llama()
    prune(model, data("llama"), speedup=1.3, times=made_up(model), trials=0, repeats=1)
    first = describe_pruned(model)
    prune(model, data("llama"), speedup=1.3, times=made_up(model), trials=0, repeats=1)
    second = describe_pruned(model)
    assert all(second[name].units <= entry.units and second[name].of == entry.of for name, entry in first.items())
    assert second != first


def test_a_pruned_model_can_be_pruned_again_without_its_head(tmp_path):
    model = models.llama()
    prune(model, data("llama"), speedup=1.3, times=made_up(model), trials=0, repeats=1)
    base = transformers.AutoModel.from_pretrained(isogrid.save(model, tmp_path / "m"))
    first = describe_pruned(model)
    prune(base, data("llama"), speedup=1.3, times=made_up(base), trials=0, repeats=1)
    second = describe_pruned(base)
    assert {f"model.{name}": entry.of for name, entry in second.items()} == {n: entry.of for n, entry in first.items()}
    assert all(entry.units <= first[f"model.{name}"].units for name, entry in second.items())
    again = isogrid.load(isogrid.save(base, tmp_path / "again"))
    assert torch.equal(
        models.exact_output(again, models.token_batch()), models.exact_output(base, models.token_batch())
    )


# What goes wrong.


def test_a_speedup_out_of_reach_names_the_largest():
    model = models.llama()
    before = models.snapshot(model)
    with pytest.raises(BudgetError, match=r"a speedup of 20 can't be reached.* of 12 ms, a speedup of 6;"):
        prune(model, data("llama"), speedup=20, times=made_up(model))
    models.assert_untouched(model, before)


def test_all_speedups_are_known_to_be_in_reach_before_the_first_is_worked_on():
    model = models.llama()
    with pytest.raises(BudgetError, match="a speedup of 20 can't be reached"):
        next(prune_family(model, data("llama"), speedups=[1.2, 20], times=made_up(model)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(value):
    model = models.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(IsogridError, match=r"layers.1.mlp.down_proj': its weight has NaN or infinite"):
        prune(model, data("llama"), speedup=1.5, times=made_up(model))
    model = models.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = value
    with pytest.raises(IsogridError, match=r"layers.0.mlp.down_proj': its calibration inputs are NaN, infinite"):
        prune(model, data("llama"), speedup=1.5, times=made_up(model))


def test_too_few_rows_are_said_and_still_pruned():
    model = models.llama()
    with pytest.warns(IsogridWarning, match=r"10 calibration rows for the 48 inputs of 'model.layers.0.mlp.down_proj'"):
        report = prune(model, [models.token_batch(0, 1, 10)], speedup=1.5, times=made_up(model), trials=0, repeats=1)
    assert report.warnings
    assert torch.isfinite(models.output(model, models.token_batch(1))).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"repeats": 0}, "timed once at least .* got repeats=0"),
        ({"checks": -1}, "checked 0 times or more, .* checks=-1"),
        ({"trials": -1}, "0 trials or more, got trials=-1"),
        ({"allocate": "foo"}, "allocate is one of search, errors, uniform, got 'foo'"),
        ({"speedup": 1.0}, "a speedup is above 1, got 1.0"),
        ({"speedup": float("nan")}, "a speedup is above 1, got nan"),
        ({"speedup": "2"}, "a speedup is above 1, got '2'"),
    ],
)
def test_bad_arguments_are_found_before_anything_is_measured(monkeypatch, wrong, message):
    def never(*_, **__):
        raise AssertionError("measured")

    for name in ("measure_times", "collect_moments", "as_batches"):
        monkeypatch.setattr(pruner_module, name, never)
    model = models.llama()
    before = models.snapshot(model)
    with pytest.raises(IsogridError, match=message):
        prune(model, data("llama"), **({"speedup": 1.3} | wrong))
    models.assert_untouched(model, before)
    if "speedup" in wrong:
        with pytest.raises(IsogridError, match=message):
            next(prune_family(model, data("llama"), speedups=[1.3, wrong["speedup"]]))


def test_bad_calls():
    model = models.llama()
    times = made_up(model)
    cases = [
        (lambda: prune(models.mlp(), models.feature_batch(), speedup=2), "no transformers model"),
        (lambda: prune(models.t5(), [models.pair_batch()], speedup=2), "no attention or feed-forward modules"),
        (lambda: prune(model, [], speedup=2, times=times), "calibration has no rows"),
        (lambda: prune(model, data("llama"), speedup=2, times=times, allocate="best"), "allocate is one of search"),
        (lambda: How(criterion="wanda"), "criterion is one of obs, magnitude"),
        (lambda: How(damping=-1), "damping and swaps are 0 or more"),
        (lambda: TokenDistillation(predictions=0, tokens=0), "not both 0"),
        (lambda: next(prune_family(model, data("llama"), speedups=[])), "prune takes a speedup"),
        (
            lambda: next(prune_family(model, data("llama"), speedups=[1.2, 2], in_place=True)),
            r"can't have the speedups \[1.2, 2\] at once",
        ),
        (
            lambda: next(prune_family(model, data("llama"), speedups=[2], gradual=True)),
            "gradual pruning trains between its steps",
        ),
        (lambda: block_of(models.blocks(), "head"), "'head' is not in a repeated block"),
    ]
    for call, message in cases:
        with pytest.raises(IsogridError, match=message):
            call()


# Times.


def test_times_are_measured_for_every_size_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("ISOGRID_CACHE", str(tmp_path))
    model = models.gpt2()
    before = models.snapshot(model)
    modules = find_coupled(model)
    levels = {name: (module.units, module.units // 2, 0) for name, module in modules.items()}
    inputs = models.token_batch(0, 2, 8)
    found = measure_times(model, modules, levels, inputs, repeats=1)
    assert found.base > 0
    assert {name: set(of) for name, of in found.saved.items()} == {name: set(of) for name, of in levels.items()}
    assert all(of[modules[name].units] == 0 for name, of in found.saved.items())
    assert found.saved["transformer.h.0.mlp"] == found.saved["transformer.h.1.mlp"]
    models.assert_untouched(model, before)
    assert measure_times(model, modules, levels, inputs, repeats=1) == found  # read, not measured again
    (place,) = (tmp_path / "modules").iterdir()
    other = measure_times(model, modules, levels, models.token_batch(0, 2, 9), repeats=1)
    assert other != found
    assert len(list((tmp_path / "modules").iterdir())) == 2
    place.write_text("{")
    again = measure_times(model, modules, levels, inputs, repeats=1)  # half a file is none, and is replaced
    assert measure_times(model, modules, levels, inputs, repeats=1) == again
    fresh = measure_times(model, modules, levels, inputs, repeats=1, cached=False)
    assert measure_times(model, modules, levels, inputs, repeats=1) == fresh != again


def test_half_of_every_module_saves_what_the_whole_model_saves(monkeypatch):
    """However fast blocks are alone: here cut ones take as long as before, and the model at a half 6 of 10."""
    model = models.llama()
    before = models.snapshot(model)
    modules = find_coupled(model)
    levels = {name: (module.units, module.units // 2, 0) for name, module in modules.items()}

    def in_turns(calls, repeats):
        return {
            key: Timing(10.0 if key in ("", "whole") else 6.0 if key == "cut" else 4.0, 0.0, 0.0, repeats)
            for key in calls
        }

    monkeypatch.setattr(times_module, "_in_turns", in_turns)
    found = measure_times(model, modules, levels, models.token_batch(0, 1, 8), repeats=1, cached=False)
    assert found.predicted({name: module.units // 2 for name, module in modules.items()}) == pytest.approx(6.0)
    assert found.base == 10
    models.assert_untouched(model, before)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_steady_times_fall_and_no_others_that_do_are_nearer(values):
    found = falling(values)
    assert all(then <= first + 1e-12 for first, then in itertools.pairwise(found))
    if values == sorted(values, reverse=True):
        assert found == values
    # At the optimum of a convex problem: no step towards any other falling values comes nearer.
    gap = torch.tensor(values, dtype=torch.float64) - torch.tensor(found, dtype=torch.float64)
    for seed in range(4):
        other = torch.randn(len(values), generator=models.generator(seed), dtype=torch.float64).sort(descending=True)
        assert float(gap @ (other.values - torch.tensor(found, dtype=torch.float64))) <= 1e-9


def test_images_are_judged_by_many():
    """Not by as many as their rows of pixels make up the tokens."""
    model = models.vit()
    pictures = [torch.randn(1, 3, 224, 224).expand(8, -1, -1, -1)] * 40
    judge = pruner_module.Judge(model, {}, pictures, pruner_module.JUDGED_TOKENS)
    assert 64 <= sum(len(batch) for batch in judge._batches) < 320


# Distillation.


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch, output_hidden_states=True)


@pytest.mark.parametrize("build", [models.llama, models.bert])
def test_the_teacher_itself_has_no_loss(build):
    model, batch = build(), models.padded_batch(0)
    found = outputs(model, batch)
    assert float(TokenDistillation().loss(found, found, batch)) == 0


@pytest.mark.parametrize("build", [models.llama, models.bert])
def test_padding_does_not_count(build):
    student, teacher, batch = build(seed=0), build(seed=1), models.padded_batch(0)
    other = dict(batch)
    other["input_ids"] = torch.where(batch["attention_mask"] == 0, 5, batch["input_ids"])
    losses = [float(TokenDistillation().loss(outputs(student, b), outputs(teacher, b), b)) for b in (batch, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] > 0


def test_the_loss_of_a_batch_is_that_of_its_parts():
    student, teacher, whole = models.bert(0), models.bert(1), models.token_batch(0)  # rows of one length
    settings = TokenDistillation()
    parts = [{"input_ids": whole["input_ids"][i : i + 2]} for i in (0, 2)]
    found = [float(settings.loss(outputs(student, b), outputs(teacher, b), b)) for b in (whole, *parts)]
    assert found[0] == pytest.approx((found[1] + found[2]) / 2, rel=1e-5)


def test_gone_modules_keep_their_place_in_the_hidden_states():
    model, teacher = models.bert(), models.bert()
    prune(model, data("bert"), speedup=5.9, times=made_up(model), trials=0, repeats=1)
    batch = models.padded_batch(0)
    found = outputs(model, batch)
    assert len(found.hidden_states) == len(outputs(teacher, batch).hidden_states)
    assert torch.isfinite(TokenDistillation().loss(found, outputs(teacher, batch), batch))


def test_modules_that_are_not_selected_stay_whole_in_the_table():
    model = models.llama()
    table = made_up(model)
    found = Pruner(model, data("llama"), times=table, select="feed_forward")
    chosen = found.choose(1.3, allocate="errors")
    report = found.apply(chosen, 1.3)
    assert {one.name for one in report.modules} == {"model.layers.0.mlp", "model.layers.1.mlp"}
    saved = sum(table.saved[one.name][one.kept] for one in report.modules)
    assert report.predicted_milliseconds == pytest.approx(table.base - saved)
    assert report.predicted >= 1.3 - 1e-6
    narrow = SavedTimes(table.base, {name: of for name, of in table.saved.items() if name.endswith("mlp")})
    with pytest.raises(IsogridError, match=r"module 'model\.layers\.0\.self_attn' is not in the given times"):
        Pruner(models.llama(), data("llama"), times=narrow)


def test_a_module_that_is_gone_leaves_the_optimizer_of_a_gradual_run():
    model = models.llama()
    asked = [1.5, 2.5, 4.5]
    family = prune_family(
        model, data("llama"), speedups=asked, gradual=True, train=BRIEF, in_place=True, times=made_up(model),
        allocate="errors", repeats=1,
    )  # fmt: skip
    reports = [report for _, report in family]
    assert [report.speedup for report in reports] == asked
    assert any(one.kept == 0 for one in reports[-1].modules)


def test_norms_of_an_attention_that_is_gone_leave_the_optimizer_too():
    model = qwen3()
    table = made_up(model)
    # Whole attentions are what the last step has to take.
    saved = {name: dict(of) for name, of in table.saved.items()}
    for name, of in saved.items():
        if name.endswith("mlp"):
            saved[name] = dict.fromkeys(of, 0.0)
    attention = sum(max(of.values()) for of in saved.values())
    asked = [1.2, 0.999 * 12 / (12 - attention)]
    family = prune_family(
        model, data("llama"), speedups=asked, gradual=True, train=BRIEF, in_place=True, times=SavedTimes(12.0, saved),
        allocate="errors", repeats=1,
    )  # fmt: skip
    kept = [{one.name: one.kept for one in report.modules} for _, report in family]
    gone = {name for name in kept[0] if name.endswith("self_attn") and kept[0][name] > kept[-1].get(name, 0) == 0}
    assert gone


def test_answers_of_a_judge_that_are_not_finite_keep_the_budget(monkeypatch):
    model = models.llama()
    found = pruner(model)
    monkeypatch.setattr(pruner_module.Judge, "__call__", lambda self, units: float("inf"))
    for speedup in (1.2, 1.8):
        chosen = found.choose(speedup, trials=2)
        assert found.times.base / found.times.predicted(chosen.units) >= speedup - 1e-6


def test_a_model_that_cannot_be_trained_afterwards_is_not_cut():
    model = models.llama()
    before = models.snapshot(model)
    with pytest.raises(IsogridError, match="the calibration has 1; give more"):
        prune(model, data("llama", 1), speedup=1.3, times=made_up(model), train=BRIEF)
    models.assert_untouched(model, before)


def test_tables_of_another_vocabulary_are_others(tmp_path, monkeypatch):
    monkeypatch.setenv("ISOGRID_CACHE", str(tmp_path))
    for vocabulary in (64, 128):
        model = models.llama()
        model.resize_token_embeddings(vocabulary)
        modules = find_coupled(model)
        levels = {name: (module.units, 0) for name, module in modules.items()}
        measure_times(model, modules, levels, models.token_batch(0, 1, 8), repeats=1)
    assert len(list((tmp_path / "modules").iterdir())) == 2


def test_blocks_that_are_the_feed_forward_themselves():
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    modules = find_coupled(model)
    levels = {name: (module.units, module.units // 2, 0) for name, module in modules.items()}
    found = measure_times(model, modules, levels, models.token_batch(0, 1, 8), repeats=1, cached=False)
    assert set(found.saved) == set(modules)
    report = prune(model, data("llama"), speedup=1.2, times=made_up(model), allocate="errors", repeats=1)
    assert report.parameters < report.dense_parameters
