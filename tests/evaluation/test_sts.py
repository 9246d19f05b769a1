import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from isogrid.data import SentencePairs, load_pretrained, load_sts
from isogrid.errors import IsogridError
from isogrid.evaluation import embed_sentences, spearman, sts_spearman
from tests.data import needs


class Padded(dict):
    def to(self, device: object) -> "Padded":
        return self


def letters(sentences: list[str], *, max_length: int, **_: object) -> Padded:
    """One token a letter, padded by 0."""
    ids = [[ord(sign) for sign in sentence[:max_length]] for sentence in sentences]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    return Padded(input_ids=padded, attention_mask=(padded > 0).long())


class Encoder(nn.Module):
    """A random vector a letter, and a large one for padding, which must not count."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(128, 6, generator=torch.Generator().manual_seed(0)))
        self.table.data[0] = 1e6
        self.seen = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        self.seen += len(input_ids)
        return SimpleNamespace(last_hidden_state=self.table[input_ids])


@pytest.mark.parametrize("distinct", [2, 5, 1000])
def test_spearman_is_that_of_scipy(distinct):
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(distinct)
    a = torch.randint(0, distinct, (200,), generator=generator).float()
    b = a + torch.randn(200, generator=generator) * distinct
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-12)


def test_spearman_at_its_ends():
    a = torch.tensor([3.0, 1.0, 2.0])
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert math.isnan(spearman(a, torch.ones(3)))
    assert math.isnan(spearman(a, torch.tensor([1.0, math.nan, 2.0])))
    with pytest.raises(IsogridError, match="one length"):
        spearman(a, torch.ones(4))


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_embeddings_are_means_over_real_tokens_in_the_order_asked_for(batch):
    sentences = ["a", "abcdef", "ab", "abcdef", "xyz"]
    encoder = Encoder().train()
    rows = embed_sentences(encoder, letters, sentences, batch=batch, max_length=4)
    for sentence, row in zip(sentences, rows, strict=True):
        mean = encoder.table[[ord(sign) for sign in sentence[:4]]].mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm())
    assert encoder.seen == 4  # the repeated sentence once
    assert encoder.training


def test_scores_follow_likeness():
    pairs = SentencePairs(["abcd", "abcd", "abcd"], ["abcd", "abcx", "wxyz"], torch.tensor([5.0, 4.0, 0.0]))
    assert sts_spearman(Encoder(), letters, pairs) == pytest.approx(1)
    with pytest.raises(IsogridError, match="two pairs"):
        sts_spearman(Encoder(), letters, pairs.every(3))
    with pytest.raises(IsogridError, match="batches of 0"):
        sts_spearman(Encoder(), letters, pairs, batch=0)


@pytest.mark.slow
def test_minilm_on_every_eighth_pair():
    needs.pretrained("minilm")
    needs.dataset("stsb")
    model, tokenizer = load_pretrained("minilm")
    assert sts_spearman(model, tokenizer, load_sts("dev").every(8)) == pytest.approx(0.85597, abs=2e-4)
