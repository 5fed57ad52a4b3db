"""Every word of scenes is a token, and what was encoded is what is decoded."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from regard.data.scenes import VOCABULARY, Dials, caption, questions, sample, split
from regard.zoo import words


def test_captions_and_questions_come_back(tmp_path):
    words.tokenizer(64, eos=True).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for i in range(20):
        scene = sample(Dials(objects=(0, 5), textures=("plain", "dots")), 1, i)
        for text in (caption(scene), *(question.text for question in questions(scene))):
            ids = tokenizer(text)["input_ids"]
            assert ids == [1, *map(words.WORDS.index, split(text)), 2]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_capitals_and_spaces_do_not_count():
    tokenizer = words.tokenizer(64)
    plain = tokenizer("user: <image> is there a red fork? assistant:")["input_ids"]
    assert tokenizer(" USER : <image>Is  there a RED fork ?\nassistant : ")["input_ids"] == plain
    assert words.WORDS.index(words.UNKNOWN) not in plain
    assert plain[3] == tokenizer.image_token_id == words.WORDS.index("<image>")


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (False, False)])
def test_begin_and_end(bos, eos):
    tokenizer = words.tokenizer(8, bos=bos, eos=eos)
    assert tokenizer("a fence").tokens() == ["<|bos|>"] * bos + ["▁a", "<|unknown|>"] + ["<|eos|>"] * eos
    assert set(VOCABULARY) < set(words.WORDS)
    assert len(set(words.WORDS)) == len(words.WORDS) == len(tokenizer)
