import pytest
import torch
from torch import nn

from isogrid import IsogridError, LowRank, collect_moments, compress, select_layers
from isogrid.compress.calibrate import MomentSum
from tests import models


def rows_by_hook(model, layers, batches, masks=None):
    """All input rows of every layer, in float64, those of padding left out where a mask of their number is given."""
    seen = {name: [] for name in layers}
    mask = None

    def watch(name):
        def hook(_, args):
            x = args[0].detach().double()
            rows = x.reshape(-1, x.shape[-1])
            if mask is not None and mask.numel() == rows.shape[0]:
                rows = rows[mask.flatten().bool()]
            seen[name].append(rows)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    for at, batch in enumerate(batches):
        mask = None if masks is None else masks[at]
        models.output(model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items() if rows}


def assert_moment(metric, rows, tolerance=1e-6):
    assert metric.rows == rows.shape[0]
    moment, mean = rows.mT @ rows / rows.shape[0], rows.mean(0)
    assert (metric.moment - moment).norm() <= tolerance * moment.norm()
    assert (metric.mean - mean).norm() <= tolerance * max(float(mean.norm()), float(moment.trace()) ** 0.5)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "vit", "dinov2", "mlp", "blocks"])
def test_moments_are_those_of_the_layers_inputs(name):
    architecture = models.ARCHITECTURES[name]
    model = architecture.build()
    batches = [architecture.batch(seed) for seed in (0, 5)]
    masks = [batch["attention_mask"] for batch in batches] if name == "bert" else None
    layers = select_layers(model)
    rows = rows_by_hook(model, layers, batches, masks)
    moments = collect_moments(model, layers, batches)
    assert moments.metrics.keys() == layers.keys() == rows.keys()
    for layer in layers:
        assert_moment(moments.metrics[layer], rows[layer])
    assert moments.rows == max(value.shape[0] for value in rows.values())


def test_padding_rows_are_left_out_exactly():
    model, batch = models.bert(), models.padded_batch()
    layers = select_layers(model)
    moments = collect_moments(model, layers, [batch])
    assert moments.rows == int(batch["attention_mask"].sum()) < batch["input_ids"].numel()
    # The same texts one by one, without any padding, have the same moments.
    alone = [
        {"input_ids": ids[: int(mask.sum())].unsqueeze(0)}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    for layer, metric in collect_moments(model, layers, alone).metrics.items():
        torch.testing.assert_close(moments.metrics[layer].moment, metric.moment, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.metrics[layer].mean, metric.mean, rtol=1e-5, atol=1e-6)


def test_what_stands_at_padding_does_not_matter():
    model, batch = models.bert(), models.padded_batch()
    other = dict(batch, input_ids=torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7))
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    layers = select_layers(model)
    one, two = collect_moments(model, layers, [batch]), collect_moments(model, layers, [other])
    for layer in layers:
        torch.testing.assert_close(one.metrics[layer].moment, two.metrics[layer].moment, rtol=1e-5, atol=1e-6)


def test_padding_masks_of_encoder_and_decoder():
    model, batch = models.t5(), models.pair_batch()
    moments = collect_moments(model, select_layers(model), [batch])
    encoder, decoder = int(batch["attention_mask"].sum()), int(batch["decoder_attention_mask"].sum())
    assert encoder != decoder
    for layer, metric in moments.metrics.items():
        of_encoder = layer.startswith("encoder.") or layer.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert metric.rows == (encoder if of_encoder else decoder), layer


def test_padding_masks_of_encoder_and_decoder_of_one_length_are_told_apart_or_refused():
    model, batch = models.t5(), models.pair_batch()
    batch["decoder_input_ids"] = models.tokens(4, 12, 9)
    batch["decoder_attention_mask"] = torch.ones(4, 12, dtype=torch.long)
    try:
        moments = collect_moments(model, select_layers(model, "wi"), [batch])
    except IsogridError:
        return
    assert moments.metrics["encoder.block.0.layer.1.DenseReluDense.wi"].rows == int(batch["attention_mask"].sum())
    assert moments.metrics["decoder.block.0.layer.2.DenseReluDense.wi"].rows == 48


def labelled_batch(length=8):
    """Labels as collators make them: -100 where the others are longer."""
    batch = models.padded_batch()
    labels = models.tokens(4, length, 5)
    return batch | {"labels": labels.masked_fill(models.padding_mask(4, length).flip(0) == 0, -100)}


def test_labels_tell_the_padding_of_the_decoder():
    model, batch = models.t5(), labelled_batch()
    moments = collect_moments(model, select_layers(model), [batch])
    encoder, decoder = int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())
    for layer, metric in moments.metrics.items():
        of_encoder = layer.startswith("encoder.") or layer.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert metric.rows == (encoder if of_encoder else decoder), layer


def test_labels_of_the_encoders_length_are_told_apart_or_refused():
    model, batch = models.t5(), labelled_batch(12)
    with pytest.raises(IsogridError, match="encoder and decoder inputs of one length, 12"):
        collect_moments(model, select_layers(model), [batch])
    batch["labels"] = models.tokens(4, 12, 5).masked_fill(batch["attention_mask"] == 0, -100)
    moments = collect_moments(model, select_layers(model), [batch])
    assert {metric.rows for metric in moments.metrics.values()} == {int(batch["attention_mask"].sum())}


def test_labels_of_a_language_model_are_no_mask():
    model, ids = models.llama(), models.tokens(4, 12, 0)
    labels = ids.masked_fill(torch.arange(12) < 5, -100)  # a prompt
    moments = collect_moments(model, select_layers(model), [{"input_ids": ids, "labels": labels}])
    assert moments.rows == ids.numel()


def test_layers_of_one_input_share_one_metric():
    model = models.llama()
    metrics = collect_moments(model, select_layers(model), [models.token_batch()]).metrics
    for block in (0, 1):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        assert metrics[f"{attention}.q_proj"] is metrics[f"{attention}.k_proj"] is metrics[f"{attention}.v_proj"]
        assert metrics[f"{mlp}.gate_proj"] is metrics[f"{mlp}.up_proj"]
    assert len({id(metric) for metric in metrics.values()}) == 8


def test_an_input_changed_in_place_is_another_input():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x.clone()
            return self.first(x) + self.second(x.mul_(2))

    model, x = InPlace(), models.feature_batch(rows=64, features=8)
    metrics = collect_moments(model, select_layers(model), [x]).metrics
    assert_moment(metrics["first"], x.double())
    assert_moment(metrics["second"], 2 * x.double())


@pytest.mark.parametrize("pieces", [1, 2, 7, 40])
def test_batching_does_not_matter(pieces):
    model, x = models.blocks(), models.feature_batch(rows=200)
    layers = select_layers(model)
    whole = collect_moments(model, layers, x)
    chunked = collect_moments(model, layers, list(x.tensor_split(pieces)))
    for layer in layers:
        difference = (whole.metrics[layer].moment - chunked.metrics[layer].moment).norm()
        assert difference < 1e-6 * whole.metrics[layer].moment.norm()
        assert chunked.metrics[layer].rows == 200


def test_moments_of_a_16_bit_model_are_sums_in_more_bits():
    model = models.mlp().bfloat16()
    x = models.feature_batch(rows=4096).bfloat16()
    moments = collect_moments(model, select_layers(model), x)
    assert_moment(moments.metrics["0"], x.double())


def test_tuples_are_positional_arguments():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, scale):
            return self.linear(x * scale)

    model, x = Pair(), models.feature_batch(rows=32, features=8)
    metrics = collect_moments(model, select_layers(model), [(x, 3.0)]).metrics
    assert_moment(metrics["linear"], 3 * x.double())


def test_batches_of_padding_alone_are_an_error():
    model, batch = models.bert(), models.padded_batch()
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with pytest.raises(IsogridError, match="no rows"):
        collect_moments(model, select_layers(model), [batch])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_input_that_is_not_finite_names_the_layer(value):
    model, x = models.mlp(), models.feature_batch()
    x[3, 5] = value
    with pytest.raises(IsogridError, match=r"layer '0'.*NaN, infinite or overflow"):
        collect_moments(model, select_layers(model), x)


def test_not_finite_inside_the_model_names_the_first_layer_that_sees_it():
    model = models.blocks()
    model.blocks[0].up.bias.data[3] = float("nan")
    with pytest.raises(IsogridError, match=r"layer 'blocks\.0\.down'"):
        collect_moments(model, select_layers(model), models.feature_batch())


# ---- what calibration leaves behind -------------------------------------------------------------------------------


def test_layers_of_weights_that_are_computed():
    """What a parametrization computes is fitted, and it goes with its layer."""
    data, found = models.feature_batch(), {}
    for computed in (False, True):
        model = models.mlp().train()
        if computed:
            nn.utils.parametrizations.weight_norm(model[0])
        report = compress(model, LowRank(), keep=0.5, calibration=[data], allocate="global")
        assert {layer.name for layer in report.layers} == {"0", "2", "4"}
        assert all(module.training for module in model.modules())
        assert all(value.requires_grad for value in model.parameters())
        found[computed] = models.output(model, data)
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(fails):
    model = models.bert()
    model.train()
    model.encoder.layer[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = models.snapshot(model)
    batches = [models.padded_batch()] + ([{"input_ids": "nonsense"}] if fails else [])
    if fails:
        with pytest.raises(Exception):  # noqa: B017 - whatever the model raises
            collect_moments(model, select_layers(model), batches)
    else:
        collect_moments(model, select_layers(model), batches)
    assert {name: module.training for name, module in model.named_modules()} == modes
    models.assert_untouched(model, before)


def test_dropout_is_off():
    model = models.bert()
    model.train()
    layers = select_layers(model)
    one, two = (collect_moments(model, layers, [models.padded_batch()]) for _ in range(2))
    assert all(torch.equal(one.metrics[name].moment, two.metrics[name].moment) for name in layers)


def test_the_rest_of_the_model_does_not_run():
    model = models.blocks()
    model.head.register_forward_pre_hook(lambda *_: model.calls.add_(1) and None)
    x = models.feature_batch()
    collect_moments(model, select_layers(model), [x, x, x])
    # The first batch finds out which layer is the last.
    assert int(model.calls) <= 1


class Ways(nn.Module):
    """Batches whose number of rows is odd also go through a second layer."""

    def __init__(self):
        super().__init__()
        self.first, self.odd, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.first(x)
        if x.shape[0] % 2:
            h = h + self.odd(x)
        return self.last(h)


@pytest.mark.parametrize("order", [(20, 21), (21, 20), (21, 20, 22, 23)])
def test_batches_that_take_different_ways(order):
    model = models.shake(Ways(), 0)
    layers = select_layers(model)
    batches = [models.feature_batch(rows, rows, 8) for rows in order]
    rows = rows_by_hook(model, layers, batches)
    metrics = collect_moments(model, layers, batches).metrics
    assert metrics.keys() == layers.keys()
    for name in layers:
        assert_moment(metrics[name], rows[name])


def test_layers_that_no_batch_reaches_have_no_metric():
    model = models.shake(Ways(), 0)
    metrics = collect_moments(model, select_layers(model), [models.feature_batch(0, 20, 8)]).metrics
    assert metrics.keys() == {"first", "last"}


def test_reaching_no_selected_layer_is_an_error():
    model = models.shake(Ways(), 0)
    with pytest.raises(IsogridError, match="reaches none of the 1 selected layers"):
        collect_moments(model, select_layers(model, "odd"), [models.feature_batch(0, 20, 8)])


def test_a_layer_called_with_its_input_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(input=x)

    model, x = Named(), models.feature_batch(rows=32, features=8)
    assert_moment(collect_moments(model, select_layers(model), [x]).metrics["linear"], x.double())


def test_progress_is_told():
    told = []
    model = models.mlp()
    batches = list(models.feature_batch().split(40))
    collect_moments(model, select_layers(model), batches, on_batch=lambda done, of: told.append((done, of)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_large_mean_does_not_bury_the_variance():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1024, 16, generator=generator)
    rows[:, ::8] += 3000  # as the massive activations of language models
    whole, other = MomentSum(), MomentSum()
    for part in rows[:512].split(128):
        whole.add(part)
    for part in rows[512:].split(128):
        other.add(part)
    whole.merge(other)
    exact = torch.cov(rows.double().T, correction=0)
    metric = whole.metric("layer")
    torch.testing.assert_close(metric.centred.moment, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metric.moment, rows.double().T @ rows.double() / 1024, rtol=1e-6, atol=1e-3)
