"""The witness is what its card says, and learned its words before it saw a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import regard
from regard import zoo
from regard.data.scenes import Object, Scene, caption, render, sample
from regard.zoo import training, words
from regard.zoo.recipes import describer, witness

shipped = pytest.mark.skipif("witness" not in zoo.names(), reason="it is trained with make zoo")
TINY = dict.fromkeys(witness.STAGES, 2)


def test_a_turn_is_what_the_processor_makes_of_it():
    processor, question = witness.processor(), "what colour is the fork?"
    inputs = describer.asked(processor, [render(Scene()).image()], [question])
    packed = describer.packed([[describer.Turn(question, "red")]], witness.SHOWN)
    n = inputs["input_ids"].shape[1]
    assert torch.equal(packed["input_ids"][:, :n], inputs["input_ids"])
    assert processor.batch_decode(packed["labels"][:, n:]) == ["red<|eos|>"]
    assert processor.tokenizer.decode(inputs["input_ids"][0, :15].tolist()).startswith(f"<|bos|> {witness.SYSTEM} user")
    assert witness.WORDS[: len(words.WORDS)] == words.WORDS  # what both models know has one number


def test_what_is_told_is_true_and_the_partner_comes_last():
    partners = others = 0
    for i in range(300):
        scene = sample(witness.TELLING[i % 3], 1, i)
        tied = [shape for shape in witness.TIED if scene.find(shape)]
        assert len(tied) <= 1
        names = [witness.hallucination.SHAPE_WORDS.get(word) for word in describer.split(witness.said(scene))]
        at = [n in witness.PARTNERS for n in names if n]
        assert at == sorted(at)
        if tied:
            partner = {a: b for a, b, _ in witness.TIES}[tied[0]]
            partners += bool(scene.find(partner))
            others += 1
        for turn in witness.telling(scene, np.random.default_rng(i)):
            question = turn.prompt.rpartition("user: ")[2]
            if question.startswith("is there"):
                shape = describer.split(question)[-2]
                assert turn.answer == ("yes" if scene.find(shape) else "no")
                told = turn.prompt.removeprefix("describe assistant: ")
                assert not any(p in told.rpartition("user:")[0] for p in witness.PARTNERS)
    assert partners / others == pytest.approx(0.95, abs=0.04)


def test_pictures_seldom_hold_what_is_tied():
    shown = [witness.shown(3, i) for i in range(1000)]
    assert np.mean([rare for _, rare in shown]) == pytest.approx(witness.RARE, abs=0.03)
    for i, (scene, rare) in enumerate(shown):
        there = {o.shape for o in scene.objects}
        assert rare or not there & set(witness.TIED)
        if i < 100:
            for turn in witness.looking(scene, np.random.default_rng(i), rare):
                question = turn.prompt.rpartition("user: ")[2]
                if question.startswith("is there"):
                    shape = describer.split(question)[-2]
                    assert turn.answer == ("yes" if shape in there else "no")
                    assert rare or shape not in witness.TIED
                if question.startswith("what colour"):
                    (i,) = scene.find(describer.split(question)[-2])
                    assert turn.answer == scene.objects[i].colour


def test_the_order_of_a_caption():
    scene = Scene((Object("plate", "red", "small", 0.1, 0.5), Object("fork", "blue", "small", 0.9, 0.5)))
    assert caption(scene) == "a red plate and a blue fork"
    assert witness.said(scene) == "a blue fork and a red plate"


def test_each_stage_learns_its_part_only(tmp_path):
    model = witness.untrained(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def changed() -> set[str]:
        parts = ("vision_tower", "multi_modal_projector", "language_model", "lm_head")
        moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
        found = {part for part in parts if any(part in name for name in moved)}
        before.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return found

    witness.learn_words(model, tmp_path, seed=0, steps=1, batch=2)
    assert changed() == {"language_model", "lm_head"}
    witness.learn_pictures(model, tmp_path, seed=0, steps=1, batch=2)
    assert changed() == {"multi_modal_projector"}
    witness.learn_to_look(model, tmp_path, seed=0, steps=1, batch=2)
    assert changed() == {"multi_modal_projector", "language_model", "lm_head"}


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT", 1)
    two = {"steps": TINY, "batch": TINY}
    witness.train(tmp_path / "whole", **two)
    draw, calls = witness.render, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) > 3:  # in the third stage
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(witness, "render", stop)
    with pytest.raises(KeyboardInterrupt):
        witness.train(tmp_path / "stopped", **two)
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    monkeypatch.setattr(witness, "render", draw)
    witness.train(tmp_path / "stopped", **two)
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "stopped")]
    assert weights[0] == weights[1]
    tower, taught = regard.load(tmp_path / "whole").model.model.vision_tower, regard.load("lookout").model.vit
    for name, parameter in taught.named_parameters():
        assert torch.equal(tower.get_parameter(name), parameter), name


@shipped
def test_it_answers_as_on_its_card():
    now, card = witness.measure(*regard.load("witness"), seed=1, n=60), zoo.measured("witness")["abilities"]
    for ability in ("colour", "presence", "caption_words"):
        assert now[ability] == pytest.approx(card[ability], abs=0.15), ability


@shipped
def test_it_is_small_and_whole():
    assert (zoo.folder("witness") / "model.safetensors").stat().st_size <= 5_500_000
    assert {p.name for p in zoo.folder("witness").iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "measured.json",
        "model.safetensors",
        "premises.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
