"""What calibration data may look like."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from isogrid import IsogridError, collect_moments, select_layers
from isogrid.compress import as_batches
from isogrid.compress.batches import ROWS_PER_BATCH
from tests import models


class Letters:
    """A tokenizer of letters: as much of transformers' interface as calibration by text needs."""

    def __init__(self):
        self.calls = []

    def __call__(self, text, *, padding=False, truncation=False, max_length=None, return_tensors=None, **_):
        if isinstance(text, str):
            return {"input_ids": [3 + ord(sign) % 40 for sign in text]}
        self.calls.append(list(text))
        ids = [self(one)["input_ids"][: max_length if truncation else None] for one in text]
        width = max(map(len, ids))
        return {
            "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
        }


def test_one_text_becomes_windows():
    text = "".join(chr(97 + at % 26) for at in range(107))
    batches = as_batches(text, Letters(), 16)
    ids = torch.cat(batches)
    assert ids.shape == (6, 16)
    assert ids.flatten().tolist() == Letters()(text)["input_ids"][:96]


def test_text_shorter_than_a_window_is_one_short_window():
    assert torch.cat(as_batches("hello", Letters(), 16)).shape == (1, 5)


def test_list_of_texts_is_padded_and_every_text_comes_once():
    texts = ["a" * (1 + at * 7 % 30) + str(at) for at in range(150)]
    tokenizer = Letters()
    batches = as_batches(texts, tokenizer, 512)
    assert sorted(text for call in tokenizer.calls for text in call) == sorted(texts)
    assert len(batches) == len(tokenizer.calls) > 1
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == sum(map(len, texts))


def test_texts_are_cut_at_the_length():
    batches = as_batches(["a" * 40, "b" * 5], Letters(), 8)
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == 8 + 5


def test_texts_calibrate_a_model():
    model = models.bert()
    texts = ["abc", "a longer text", "x"]
    moments = collect_moments(model, select_layers(model), texts, tokenizer=Letters(), length=16)
    assert moments.rows == sum(map(len, texts))
    assert collect_moments(model, select_layers(model), "x" * 57, tokenizer=Letters(), length=10).rows == 50


def test_texts_are_padded_without_a_token_for_it():
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    assert tokenizer.pad_token_id is None
    model = models.gpt2()
    texts = ["w7 w9", "", "w4 w5 w6 w8", " \n", "w11", *["w3 w5"] * 70]
    found = collect_moments(model, select_layers(model), texts, tokenizer=tokenizer, length=16)
    alone = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts if text.strip()]
    assert found.rows == sum(ids.numel() for ids in alone)
    for layer, metric in collect_moments(model, select_layers(model), alone).metrics.items():
        assert (found.metrics[layer].moment - metric.moment).norm() <= 1e-5 * metric.moment.norm()


def test_the_decoder_reads_the_encoders_texts():
    model, texts = models.t5(), ["abc", "a longer text", "x"]
    moments = collect_moments(model, select_layers(model), texts, tokenizer=Letters(), length=16)
    assert {metric.rows for metric in moments.metrics.values()} == {sum(map(len, texts))}
    windows = models.tokens(4, 12, 0)
    moments = collect_moments(model, select_layers(model), windows)
    expected = collect_moments(model, select_layers(model), [{"input_ids": windows, "labels": windows}])
    for layer, metric in expected.metrics.items():
        torch.testing.assert_close(moments.metrics[layer].moment, metric.moment)


@pytest.mark.parametrize("text", ["some text", ["some", "texts"]])
def test_text_without_a_tokenizer_is_an_error(text):
    with pytest.raises(IsogridError, match="tokenizer"):
        collect_moments(models.llama(), select_layers(models.llama()), text)


def test_token_tensor_is_cut_into_batches_of_a_fixed_number_of_rows():
    windows = models.tokens(70, 64, 0)
    batches = as_batches(windows)
    assert [batch.shape[0] for batch in batches] == [32, 32, 6]
    assert all(batch.numel() <= ROWS_PER_BATCH for batch in batches)
    assert torch.equal(torch.cat(batches), windows)
    assert [batch.shape[0] for batch in as_batches(models.tokens(2, ROWS_PER_BATCH + 1, 0))] == [1, 1]


def test_feature_tensor_is_cut_by_rows():
    x = models.feature_batch(rows=ROWS_PER_BATCH + 5)
    assert [batch.shape[0] for batch in as_batches(x)] == [ROWS_PER_BATCH, 5]


def test_pictures_count_their_patches():
    pictures = torch.zeros(40, 3, 128, 128)
    assert [batch.shape[0] for batch in as_batches(pictures)] == [32, 8]
    assert [batch.shape[0] for batch in as_batches(pictures[:20], training=True)] == [3] * 6 + [2]
    assert as_batches(torch.zeros(3, 1, 8, 8))[0].shape[0] == 3


def test_one_mapping_is_one_batch_and_iterators_are_read_once():
    batch = models.padded_batch()
    assert as_batches(batch)[0] is batch
    assert len(as_batches(models.padded_batch(seed) for seed in range(3))) == 3


@pytest.mark.parametrize("empty", [[], (), "", ["", " "], torch.zeros(0, 24), iter(())])
def test_no_calibration_rows_is_an_error(empty):
    with pytest.raises(IsogridError, match="no rows"):
        collect_moments(models.mlp(), select_layers(models.mlp()), empty, tokenizer=Letters())


@pytest.mark.parametrize("strange", [5, 1.5, object()])
def test_something_else_is_an_error(strange):
    with pytest.raises(IsogridError, match="calibration is text, a tensor or an iterable"):
        collect_moments(models.mlp(), select_layers(models.mlp()), strange)
