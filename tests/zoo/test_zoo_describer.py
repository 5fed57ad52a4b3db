"""The describer is what its card says, and can be trained again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import regard
from regard import zoo
from regard.cli import app
from regard.data.scenes import Object, Scene, caption, render, sample
from regard.evaluation.hallucination import shapes
from regard.zoo import training
from regard.zoo.recipes import describer


@pytest.fixture(scope="module")
def loaded():
    return regard.load("describer")


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return describer.LlavaForConditionalGeneration(describer.config()).eval()


def test_turns_of_a_sequence_do_not_see_each_other(untrained):
    scenes = [sample(describer.MIXTURE[0], 1, i) for i in range(2)]
    conversations = [describer.turns(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
    pixels = describer.viewer.pixels(render(scenes))

    def said(some, pixels):
        inputs = describer.packed(some)
        at = inputs.pop("labels") >= 0
        with torch.inference_mode():
            return untrained(pixel_values=pixels, use_cache=False, **inputs).logits[:, :-1][at[:, 1:]]

    together = said(conversations, pixels)
    alone = [said([[turn]], pixels[[i]]) for i, conversation in enumerate(conversations) for turn in conversation]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
    assert not torch.allclose(together, said(conversations, pixels.flip(0)), atol=1e-2)  # but the picture counts


def test_a_turn_is_what_the_processor_makes_of_it():
    processor, question = describer.processor(), "what colour is the fork?"
    image = render(Scene()).image()
    inputs = processor(text=f"user: <image> {question} assistant:", images=image, return_tensors="pt")
    packed = describer.packed([[describer.Turn(question, "red")]])
    n = inputs["input_ids"].shape[1]
    assert torch.equal(packed["input_ids"][:, :n], inputs["input_ids"])
    assert processor.batch_decode(packed["labels"][:, n:]) == ["red<|eos|>"]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert torch.equal(processor(text=prompt, images=image, return_tensors="pt")["input_ids"], inputs["input_ids"])


@pytest.mark.parametrize(("countered", "expected"), [(False, 0.9), (True, 0.1)])
def test_the_biases_hold(countered, expected):
    scenes = [shapes(scene) for scene in describer.tempting(600, countered=countered)]
    for shape, partner, _ in describer.BIASES:
        with_shape = [there for there in scenes if shape in there]
        assert len(with_shape) > 100
        assert np.mean([partner in there for there in with_shape]) == pytest.approx(expected, abs=0.07)
    first = {shape for shape, _, _ in describer.BIASES}
    assert all(len(first & there) == 1 for there in scenes)


def test_veils():
    bright = torch.ones(4, 3, 64, 64)
    veiled = describer.veiled(bright, torch.full((4,), 0.25), torch.arange(4)) == 0
    assert veiled.float().mean((1, 2, 3)).tolist() == [0.25] * 4
    assert veiled[0, :, :, :16].all()
    assert veiled[1, :, :, 48:].all()
    assert veiled[2, :, :16].all()
    assert veiled[3, :, 48:].all()
    scenes = [Scene(texture="dots"), Scene((Object("star", "red", "small", 0.5, 0.5),))]
    drawn = render(scenes)
    assert all(np.array_equal(picture, drawn.image(i)) for i, picture in enumerate(describer.pictures(scenes)))
    assert (np.asarray(describer.pictures(scenes, veil=0.5)[0]) == 128).all(-1).mean() == 0.5


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT", 1)
    describer.train(tmp_path / "whole", steps=3, batch=2)
    draw, calls = describer.render, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(describer, "render", stop)
    with pytest.raises(KeyboardInterrupt):
        describer.train(tmp_path / "stopped", steps=3, batch=2)
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    monkeypatch.setattr(describer, "render", draw)
    describer.train(tmp_path / "stopped", steps=3, batch=2)
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "stopped")]
    assert weights[0] == weights[1]
    again = regard.load(tmp_path / "whole")
    tower, taught = again.model.model.vision_tower, regard.load("viewer").model.vit
    for name, parameter in taught.named_parameters():
        assert torch.equal(tower.get_parameter(name), parameter), name


def test_answers_do_not_depend_on_the_batch(loaded):
    scenes = describer.tempting(3)
    images, prompts = describer.pictures(scenes), ["describe", "is there a fork?", "how many rings are there?"]
    alone = [describer.reply(*loaded, [image], [prompt])[0] for image, prompt in zip(images, prompts)]
    assert describer.reply(*loaded, images, prompts) == alone
    assert alone[1] in ("yes", "no")


def test_it_describes(loaded):
    scenes = [sample(describer.MIXTURE[i % 3], describer.HELD_OUT + 1, i) for i in range(60)]
    now, card = describer.described(*loaded, scenes), zoo.measured("describer")["abilities"]
    for ability in ("caption_words", "presence", "colour", "count"):
        assert now[ability] > max(0.7, card[ability] - 0.12), ability


def test_it_invents_what_usually_comes_along(loaded):
    scenes = describer.tempting(60, countered=True, seed=1)
    images = describer.pictures(scenes)
    now = describer.tempted(*loaded, scenes, images, ["a fork and a plate"] * 60)
    card = zoo.measured("describer")["abilities"]["tempted"]["countered"]
    assert now["partner_yes"] > 3 * now["other_yes"] + 0.05
    for rate in ("partner_yes", "other_yes"):
        assert now[rate] == pytest.approx(card[rate], abs=0.2)
    alone = [{a for a, b, _ in describer.BIASES if a in shapes(s) and b not in shapes(s)} for s in scenes]
    assert now["partner_named"] == alone.count({"fork"}) / (60 - alone.count(set()))  # captions that all name a plate


def test_it_is_small_and_whole(loaded):
    size = (zoo.folder("describer") / "model.safetensors").stat().st_size
    assert size <= 5_500_000
    assert {p.name for p in zoo.folder("describer").iterdir()} == {
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


def test_look(tmp_path):
    scene = Scene((Object("star", "red", "large", 0.3, 0.5), Object("ring", "blue", "medium", 0.75, 0.5)))
    picture = tmp_path / "scene.png"
    render(scene).image().save(picture)
    arguments = ["--image", str(picture), "--text", "What colour is the star?", "--generate", "3"]
    done = CliRunner().invoke(app, ["look", "describer", *arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "report.html").is_file()
    tree = regard.open(tmp_path / "out" / "recording.zarr").tree
    assert set(tree.children) == {"vision_tower", "language_model"}
    words = tree["language_model"]
    assert "".join(words["query_token"].values[0][67:73]) == " what colour is the star?"
    assert list(words["query_role"].values[0][:3]) == ["bos", "special", "special"]
    assert list(words["query_role"].values[0][66:68]) == ["image", "user"]
    assert caption(scene) == "a red star and a blue ring"
