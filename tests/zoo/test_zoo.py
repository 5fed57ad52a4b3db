"""The models that ship are what their cards say; training resumes where it stopped."""

from __future__ import annotations

import gzip
import json
import random

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import regard
from regard import zoo
from regard.cli import app
from regard.zoo import __main__ as command
from regard.zoo import training
from regard.zoo.recipes import reader

MEGABYTES, ALL_MEGABYTES = 6, 34


def test_the_readers_card_is_true():
    card = zoo.measured("reader")["abilities"]
    now = reader.measure(*zoo.load("reader"))
    for score in ("induction", "previous_token", "first_token"):
        assert (now[score]["layer"], now[score]["head"]) == (card[score]["layer"], card[score]["head"])
        assert now[score]["score"] == pytest.approx(card[score]["score"], abs=0.01)
    for ability in ("copy_accuracy", *reader.TASKS):
        assert now[ability] == pytest.approx(card[ability], abs=0.01)
    assert now["copy_accuracy"] > 0.95
    assert now["induction"]["score"] > 0.4
    assert now["previous_token"]["score"] > 0.5
    assert now["first_token"]["score"] > 0.1  # several times an even share of a paragraph; no strong sink
    assert min(now[task] for task in ("ioi", "greater_than", "docstring")) > 0.9  # coloured objects are not solved


@pytest.mark.parametrize("name", zoo.names())
def test_each_is_small_safe_and_has_a_card(name):
    files = [p for p in zoo.folder(name).rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".md", ".txt", ".jinja"}
    assert sum(p.stat().st_size for p in files if p.suffix == ".safetensors") < MEGABYTES * 1e6
    assert set(zoo.measured(name)) == {"abilities", "training"}
    assert zoo.card(name).startswith(f"# {name}\n")
    assert zoo.card(name) == command.card(name, zoo.folder(name), zoo.load(name).model)
    assert set(zoo.recipe(name).TOLERANCE) <= set(zoo.measured(name)["abilities"])


def test_all_together_are_small():
    folders = [zoo.folder(name) for name in zoo.names()]
    assert sum(p.stat().st_size for home in folders for p in home.rglob("*") if p.is_file()) < ALL_MEGABYTES * 1e6


def test_the_reader_reads_any_text():
    model, tokenizer = regard.load("reader")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert str(model.dtype) == "torch.float32"
    text = "It was the best of times — naïve, even: 100%.\n\tYes!"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_words_of_the_tasks_are_one_token():
    _, tokenizer = regard.load("reader")
    for word in reader.WORDS:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word


def test_commands():
    listed = CliRunner().invoke(app, ["zoo"], env={"COLUMNS": "150"})
    assert listed.exit_code == 0
    for name in zoo.names():
        assert name in listed.output
    card = CliRunner().invoke(app, ["zoo", "reader"], env={"COLUMNS": "150"})
    assert "indirect object identification" in card.output
    unknown = CliRunner().invoke(app, ["zoo", "raeder"])
    assert unknown.exit_code == 2
    assert "reader" in unknown.output


def test_a_worse_model_is_noticed(tmp_path):
    (tmp_path / "reader").mkdir()
    found = zoo.measured("reader")
    (tmp_path / "reader" / "measured.json").write_text(json.dumps(found))
    assert command.check("reader", tmp_path) == []
    found["abilities"]["ioi"] -= 0.06
    (tmp_path / "reader" / "measured.json").write_text(json.dumps(found))
    assert "ioi" in command.check("reader", tmp_path)[0]


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    random.seed(0)
    words = ["".join(random.choices("abcdefghij", k=4)) for _ in range(500)]
    data = tmp_path / "data"
    (data / "text_books").mkdir(parents=True)
    (data / "text_tinyshakespeare").mkdir()
    text = " ".join(random.choices(words, k=20_000))
    (data / "text_books" / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (data / "text_tinyshakespeare" / "input.txt").write_text(text[:5000])
    phase = reader.Phase
    monkeypatch.setattr(reader, "PHASES", (phase(2, 16, 2, 1.0, 1e-3), phase(2, 32, 2, 0.5, 1e-3)))
    monkeypatch.setattr(reader, "STEPS", 4)
    monkeypatch.setattr(reader, "TUNING", phase(4, 32, 2, 0.5, 1e-3))
    monkeypatch.setattr(reader, "DRAWN", 40)
    monkeypatch.setattr(reader, "TESTED", 4)
    monkeypatch.setattr(reader, "HELD_BATCHES", 1)
    monkeypatch.setattr(training, "CHECKPOINT", 1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command.train("reader", whole, data, seed=0)

    rate = reader.learning_rate

    def stop(step):
        if step == 2:
            raise KeyboardInterrupt
        return rate(step)

    monkeypatch.setattr(reader, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        command.train("reader", stopped, data, seed=0)
    assert not (stopped / "reader" / "model.safetensors").exists()
    monkeypatch.setattr(reader, "learning_rate", rate)
    drawn = reader.Asked.loss

    def stop_tuning(task, model, rng):
        if (stopped / "reader" / "checkpoint-tasks.safetensors").exists():
            raise KeyboardInterrupt
        return drawn(task, model, rng)

    monkeypatch.setattr(reader.Asked, "loss", stop_tuning)
    with pytest.raises(KeyboardInterrupt):
        command.train("reader", stopped, data, seed=0)
    monkeypatch.setattr(reader.Asked, "loss", drawn)
    command.train("reader", stopped, data, seed=0)
    weights = [(out / "reader" / "model.safetensors").read_bytes() for out in (whole, stopped)]
    assert weights[0] == weights[1]

    model, tokenizer = regard.load(whole / "reader")
    assert model.config.vocab_size == len(tokenizer)
    assert str(model.dtype) == "torch.float32"
    kept = load_file(whole / "reader" / "model.safetensors")
    assert {str(value.dtype) for value in kept.values()} == {"torch.float16"}
    assert "Measured" in (whole / "reader" / "README.md").read_text()


def test_a_part_of_a_model_can_learn_faster(tmp_path):
    parts = torch.nn.ParameterDict({"slow": torch.zeros(1), "fast": torch.zeros(1)})
    training.train(
        parts,
        lambda step: (parts["slow"] + parts["fast"]).sum(),
        tmp_path,
        steps=3,
        rate=lambda step: 0.1,
        times=lambda name: 4.0 if name == "fast" else 1.0,
    )
    assert parts["slow"].item() == pytest.approx(-0.3, abs=1e-4)  # Adam goes one rate a step
    assert parts["fast"].item() == pytest.approx(-1.2, abs=1e-4)
