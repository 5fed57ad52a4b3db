"""Roles and texts of tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import words
from families import build

import regard
from regard import Tokens, chat_roles


def test_chat_roles_follow_the_template():
    tokenizer = words(chat=True)
    messages = [
        {"role": "system", "content": "it was the age of wisdom"},
        {"role": "user", "content": "what is in this picture ?"},
    ]
    roles = chat_roles(tokenizer, messages)
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    spelled = list(zip(tokenizer.convert_ids_to_tokens(ids), roles))
    assert [w for w, r in spelled if r == "system"] == ["it", "was", "the", "age", "of", "wisdom"]
    assert [w for w, r in spelled if r == "user"] == ["what", "is", "in", "this", "picture", "?"]
    assert [w for w, r in spelled if r == "special"] == ["<unk>", ":", "user", ":", "assistant", ":"]


def test_a_template_that_changes_the_text_is_refused():
    tokenizer = words()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="changes the text of a user message"):
        chat_roles(tokenizer, [{"role": "user", "content": "it was"}])


@torch.no_grad()
def test_given_roles_reach_the_recording_and_statistics():
    model, inputs = build("llama")
    roles = ["bos"] + ["system"] * 3 + ["user"] * 8
    with regard.record(model, "mass", roles=roles) as recording:
        model(**inputs)
    stack = recording.tree["language_model"]
    assert list(stack["query_role"].values[1]) == roles
    assert list(stack["role"].values) == ["bos", "system", "user"]
    torch.testing.assert_close(torch.from_numpy(stack["mass"].sum("role").values), torch.ones(2, 2, 4, 12))
    with pytest.raises(ValueError, match="2 given for 12 tokens"), regard.record(model, "mass", roles=["user"] * 2):
        model(**inputs)


def test_texts_keep_their_spaces():
    model, tokenizer = regard.load("reader")
    ids = tokenizer("The cat,\n the dog", return_tensors="pt")["input_ids"]
    texts = Tokens.plain("text", 1, ids.shape[1], ids).texts(tokenizer)[0]
    assert "".join(texts[1:]) == "The cat,\n the dog"
    assert Tokens.plain("image", 1, 2).texts(tokenizer) == [["", ""]]
    assert Tokens.plain("text", 1, 2, torch.tensor([[5, 6]])).texts(None) == [["5", "6"]]


def test_sound_is_labelled_with_its_time():
    start = Tokens.plain("other", 2, 0)
    frames = start.then(replace(Tokens.plain("frame", 2, 3), seconds=0.04))
    assert frames.texts(None) == [["0.00 s", "0.04 s", "0.08 s"]] * 2
    assert Tokens.plain("frame", 1, 2).texts(None) == [["", ""]]
