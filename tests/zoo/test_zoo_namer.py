"""The namer that ships does what its card says; its training resumes where it stopped."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import regard
from regard import zoo
from regard.cli import app
from regard.data.sentences import FEELINGS, Sentence, sentences
from regard.zoo.recipes import namer


def test_the_card_is_true():
    found = zoo.measured("namer")
    now, card = namer.measure(*zoo.load("namer")), found["abilities"]
    assert now == pytest.approx(card, abs=0.005)
    assert now["accuracy"] > 0.98
    assert now["negated_accuracy"] > 0.95
    assert now["only_reason_accuracy"] > 0.98
    assert 0.2 < now["reason_hidden_accuracy"] < 0.3  # chance is 1 in 4
    assert now["reason_weight"] > 3 * now["reason_share"]


def test_sentences_that_were_never_drawn_here():
    model, tokenizer = regard.load("namer")
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.dtype == torch.float32
    told = sentences(200, seed=987)
    batch = tokenizer([s.text for s in told], padding=True, return_tensors="pt")
    with torch.inference_mode():
        guessed = model(**batch).logits.argmax(-1)
    assert (guessed == torch.tensor([s.label for s in told])).float().mean() > 0.96


def test_a_negation_turns_the_name():
    model, tokenizer = regard.load("namer")
    plain = "the sailor worked , with a light heart , past the mill ."
    for text, feeling in ((plain, "joy"), (plain.replace("with", "not with"), "sorrow")):
        with torch.inference_mode():
            scores = model(**tokenizer(text.replace("past", "far from"), return_tensors="pt")).logits[0]
        assert model.config.id2label[int(scores.argmax())] == feeling
    assert [model.config.id2label[i] for i in range(4)] == list(FEELINGS)


def test_words_and_tokens_are_one_to_one():
    _, tokenizer = regard.load("namer")
    for sentence in sentences(50, seed=3):
        tokens = tokenizer(sentence.text).tokens()
        assert tokens == ["[CLS]", *sentence.words, "[SEP]"]
    assert tokenizer("The Baker, Sang!").tokens() == ["[CLS]", "the", "baker", ",", "sang", "[UNK]", "[SEP]"]
    assert tokenizer.mask_token == "[MASK]"
    assert tokenizer.model_max_length == namer.POSITIONS


def test_the_reason_is_where_the_sentence_says():
    _, tokenizer = regard.load("namer")
    told = Sentence(("not", "feeling", "sad", "."), "joy", (True, False, True, False))
    other = Sentence(("at", "noon"), "calm", (False, True))
    batch = namer.encoded(tokenizer, [told, other])
    assert batch["reason"].int().tolist() == [[0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert batch["word"].int().tolist() == [[0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]
    assert batch["label"].tolist() == [0, 2]


def test_sentences_held_out_are_never_trained_on():
    held = namer.drawn(0, start=0, held=True)
    rest = namer.drawn(0, start=0, held=False)
    ours, theirs = {next(held).text for _ in range(200)}, {next(rest).text for _ in range(3000)}
    assert not ours & theirs


def test_look(tmp_path):
    text = sentences(1, seed=1)[0].text
    done = CliRunner().invoke(app, ["look", "namer", "--text", text, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    encoder = regard.open(tmp_path / "recording.zarr").tree["encoder"]
    assert encoder.sizes["layer"] == 4
    assert encoder.sizes["head"] == 3
    assert list(encoder["key_token"].values[0])[1:4] == text.split()[:3]


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(namer, "STEPS", 4)
    monkeypatch.setattr(namer, "BATCH", 4)
    monkeypatch.setattr("regard.zoo.training.CHECKPOINT", 2)
    namer.train(tmp_path / "whole", seed=0)
    tell = namer.sentences

    def stopping(n, *, seed, start):
        if start >= 3 * 2 * 4:  # the fourth step
            raise KeyboardInterrupt
        return tell(n, seed=seed, start=start)

    monkeypatch.setattr(namer, "sentences", stopping)
    with pytest.raises(KeyboardInterrupt):
        namer.train(tmp_path / "stopped", seed=0)
    monkeypatch.setattr(namer, "sentences", tell)
    namer.train(tmp_path / "stopped", seed=0)
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)
    model, tokenizer = regard.load(tmp_path / "stopped")
    assert model.config.num_labels == len(FEELINGS)
    assert len(tokenizer) == model.config.vocab_size
