import re

import pytest
import torch

from isogrid.data import load_stories260k
from isogrid.errors import IsogridError
from tests.data import needs

STORY = (
    "Once upon a time, there was a boy named Ben. Ben had a big box of toys. One day, Ben went to the garden with his "
    "dad. They saw a little bird in a tree. The bird was sad because it could not find its mom. "
    '"Can we help the bird?" asked Ben. "Yes, we can," said his dad. '
    "They looked and looked. Then they saw a big bird. It was the mom! The "
    "little bird was very happy. Ben was happy too. He played with his toys all day."
)


@pytest.fixture(scope="module")
def stories():
    needs.dataset("stories260k")
    return load_stories260k()


def loss_of(model, ids: list[int]) -> float:
    batch = torch.tensor([ids])
    with torch.no_grad():
        return model(batch, labels=batch).loss.item()


def test_it_knows_stories(stories):
    model, tokenizer = stories
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
    ids = tokenizer.encode(STORY)
    loss = loss_of(model, ids)
    assert loss < 1.6
    # The same words in another order are no story, so the loss is owed to the weights being in their places.
    words = STORY.split(" ")
    shuffled = [words[index] for index in torch.randperm(len(words), generator=torch.Generator().manual_seed(0))]
    assert loss_of(model, tokenizer.encode(" ".join(shuffled))) > loss + 1


def test_it_tells_a_story(stories):
    model, tokenizer = stories
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=40, do_sample=False, pad_token_id=0)[0]
    assert tokenizer.decode(ids).startswith("Once upon a time, there was a little girl named Lily.")


def test_tokens_give_the_text_back(stories):
    _, tokenizer = stories
    for text in (STORY, "", " ", "  two  spaces ", "line\nfeeds\n\n", "Zürich, 木, 🙂 <0x41> <s>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer("a cat")["input_ids"] == [1, *tokenizer("a cat", add_special_tokens=False)["input_ids"]]
    assert max(tokenizer.encode("木")) < len(tokenizer) == 512


def test_word_by_word_is_the_whole_greedy_merge(stories):
    _, tokenizer = stories
    assert not [token for token in tokenizer.tokens[259:] if re.search(rb"[^ ] ", token)]
    text = STORY[:160]
    assert tokenizer.encode(text, add_special_tokens=False) == tokenizer._merge(" " + text)
    # And merging was at work.
    assert len(tokenizer.encode(text)) < len(text) / 2


def test_a_file_cut_short_is_an_error(tmp_path):
    source = needs.dataset("stories260k")
    folder = tmp_path / "stories260k"
    folder.mkdir()
    (folder / "tok512.bin").write_bytes((source / "tok512.bin").read_bytes())
    for size in (20, 100_000):
        (folder / "stories260K.bin").write_bytes((source / "stories260K.bin").read_bytes()[:size])
        with pytest.raises(IsogridError, match=f"cut short at {size} bytes"):
            load_stories260k(tmp_path)
