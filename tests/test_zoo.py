"""The model that ships is what its card says; its training resumes where it stopped."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

import regard
from regard import zoo
from regard.zoo import measure, train_reader

FOLDER = Path(zoo.__file__).parent / "reader"


def test_the_card_is_true():
    card = json.loads((FOLDER / "measured.json").read_text())
    now = measure.reader()
    assert now["copy_accuracy"] == pytest.approx(card["copy_accuracy"], abs=0.01)
    for score in ("induction", "previous_token", "first_token"):
        assert (now[score]["layer"], now[score]["head"]) == (card[score]["layer"], card[score]["head"])
        assert now[score]["score"] == pytest.approx(card[score]["score"], abs=0.01)
    assert now["induction"]["score"] > 0.5
    assert now["previous_token"]["score"] > 0.5
    assert now["first_token"]["score"] > 0.1  # several times an even share of a paragraph; no strong sink
    text = (FOLDER / "README.md").read_text()
    for figure in (card["copy_accuracy"], card["induction"]["score"], card["first_token"]["score"]):
        assert f"{figure:.0%}" in text


def test_it_is_small_and_safe():
    files = {p.name: p.stat().st_size for p in FOLDER.iterdir()}
    assert files["model.safetensors"] < 4_000_000
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".part"))]
    model, tokenizer = regard.load("reader")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert str(model.dtype) == "torch.float32"
    text = "It was the best of times — naïve, even: 100%.\n\tYes!"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    random.seed(0)
    words = ["".join(random.choices("abcdefghij", k=4)) for _ in range(500)]
    data = tmp_path / "data"
    (data / "text_books").mkdir(parents=True)
    (data / "text_tinyshakespeare").mkdir()
    text = " ".join(random.choices(words, k=20_000))
    (data / "text_books" / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (data / "text_tinyshakespeare" / "input.txt").write_text(text[:5000])
    phase = train_reader.Phase
    monkeypatch.setattr(train_reader, "PHASES", (phase(2, 16, 2, 1.0, 1e-3), phase(2, 32, 2, 0.5, 1e-3)))
    monkeypatch.setattr(train_reader, "STEPS", 4)
    monkeypatch.setattr(train_reader, "CHECKPOINT", 1)
    train_reader.train(data, tmp_path / "whole", seed=0)

    rate = train_reader.learning_rate

    def stop(step):
        if step == 2:
            raise KeyboardInterrupt
        return rate(step)

    monkeypatch.setattr(train_reader, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        train_reader.train(data, tmp_path / "stopped", seed=0)
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    monkeypatch.setattr(train_reader, "learning_rate", rate)
    train_reader.train(data, tmp_path / "stopped", seed=0)
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "stopped")]
    assert weights[0] == weights[1]
