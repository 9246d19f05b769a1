import itertools
import math

import pytest
import torch
from torch import nn

from isogrid.data import load_pretrained, load_text, token_windows
from isogrid.errors import IsogridError
from isogrid.evaluation import perplexity
from tests.data import needs


class Bigram(nn.Module):
    """The next token's logits are a row of a table; dropout betrays the mode."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.drop = nn.Dropout(0.9)
        self.largest = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.largest = max(self.largest, len(ids))
        return self.drop(self.table[ids])


WINDOWS = torch.randint(0, 7, (5, 6), generator=torch.Generator().manual_seed(0))
TABLE = torch.randn(7, 7, generator=torch.Generator().manual_seed(1))


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity():
    result = perplexity(Bigram(torch.zeros(7, 7)), WINDOWS)
    assert result.perplexity == pytest.approx(7)
    assert result.loss == pytest.approx(math.log(7))
    assert result.tokens == 5 * 5
    assert result.seconds >= 0


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_each_token_but_the_first_is_scored_by_the_one_before(batch):
    logs = TABLE.log_softmax(-1)
    expected = -sum(logs[a, b].item() for row in WINDOWS.tolist() for a, b in itertools.pairwise(row)) / 25
    model = Bigram(TABLE)
    assert perplexity(model, WINDOWS, batch=batch).loss == pytest.approx(expected, abs=1e-6)
    assert model.largest == min(batch, 5)


def test_the_mode_and_the_gradients_are_left_alone():
    model = Bigram(TABLE).train()
    model.drop.eval()
    perplexity(model, WINDOWS)
    assert model.training
    assert not model.drop.training
    assert model.table.grad is None
    with pytest.raises(IndexError):
        perplexity(Bigram(TABLE[:, :3]).train(), WINDOWS)
    broken = Bigram(TABLE[:3]).train()
    with pytest.raises(IndexError):
        perplexity(broken, WINDOWS)
    assert broken.training


def test_half_precision_is_summed_in_full():
    exact = perplexity(Bigram(TABLE), WINDOWS).loss
    assert perplexity(Bigram(TABLE).bfloat16(), WINDOWS).loss == pytest.approx(exact, abs=0.01)


def test_a_hopeless_model_is_infinite_and_a_broken_one_nan():
    wrong = torch.full((7, 7), -2000.0)
    wrong[:, 0] = 0
    assert perplexity(Bigram(wrong), torch.ones(1, 4, dtype=torch.int64)).perplexity == math.inf
    assert math.isnan(perplexity(Bigram(torch.full((7, 7), math.nan)), WINDOWS).perplexity)


def test_progress_is_told_after_every_batch():
    told: list[str] = []
    perplexity(Bigram(torch.zeros(7, 7)), WINDOWS, batch=2, progress=told.append)
    assert told == ["loss 1.946"] * 3


def test_bad_windows():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=7)
    model = LlamaForCausalLM(config)
    assert perplexity(model, WINDOWS.int()).tokens == 25
    with pytest.raises(IsogridError, match="ids 0 to 7, and the model knows 0 to 6"):
        perplexity(model, torch.tensor([[0, 7]]))
    with pytest.raises(IsogridError, match="ids -1 to 3"):
        perplexity(model, torch.tensor([[-1, 3]]))
    with pytest.raises(IsogridError, match=r"torch\.float32"):
        perplexity(model, torch.ones(2, 4))
    for shape in ((0, 4), (3, 1), (4,)):
        with pytest.raises(IsogridError, match="shape"):
            perplexity(model, torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(IsogridError, match="batch is 0"):
        perplexity(model, WINDOWS, batch=0)


@pytest.mark.slow
def test_smollm2_on_wikitext():
    needs.pretrained("smollm2-135m")
    needs.dataset("wikitext2")
    model, tokenizer = load_pretrained("smollm2-135m")
    windows = token_windows(tokenizer, load_text("wikitext2:evaluation"), 512)
    assert len(windows) == 303
    result = perplexity(model, windows[:2], batch=1)
    assert result.tokens == 2 * 511
    assert result.perplexity == pytest.approx(28.2328, rel=1e-3)
