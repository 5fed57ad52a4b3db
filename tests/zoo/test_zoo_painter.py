"""The painter is what its card says; pipelines load, are recorded with their words, and can be trained again."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import regard
from regard import zoo
from regard.cli import app
from regard.data.scenes import SHAPES, Object, Scene, caption, render
from regard.zoo import training

pytest.importorskip("diffusers", exc_type=ImportError)

from regard.zoo.recipes import painter, viewer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The painter's pipeline, untrained."""
    torch.manual_seed(0)
    pipeline = painter.build()
    torch.nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.05)  # zero, it would paint the same of any words
    folder = tmp_path_factory.mktemp("zoo") / "painter"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(home):
    model, pipeline = regard.load(home)
    pipeline.set_progress_bar_config(disable=True)
    return model, pipeline


def test_it_paints_what_fresh_captions_say():
    _, pipeline = zoo.load("painter")
    scenes = [painter.draw(2 * viewer.HELD_OUT, i) for i in range(48)]
    pictures = painter.paint(pipeline, [caption(scene) for scene in scenes], seed=1)
    right = painter.judged(pictures, scenes)
    assert right["attribute_accuracy"] > 0.8
    assert right["class_accuracy"] > 0.6
    assert right["pair_accuracy"] > 0.5
    others = painter.judged(pictures, scenes[1:] + scenes[:1])  # the judge can say no
    assert others["pair_accuracy"] < 0.15


def test_it_is_small_and_safe():
    files = [p for p in zoo.folder("painter").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".md", ".safetensors"}
    assert sum(p.stat().st_size for p in files if p.suffix == ".safetensors") <= 5_800_000


def test_a_folder_in_half_precision_is_run_in_float32(home, tmp_path):
    _, pipeline = regard.load(home)
    for part in (pipeline.transformer, pipeline.text_encoder):
        part.half()
    pipeline.save_pretrained(tmp_path)
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors")) <= 5_800_000
    model, pipeline = regard.load(tmp_path)
    assert {p.dtype for part in (model, pipeline.text_encoder) for p in part.parameters()} == {torch.float32}


def test_what_the_judge_says_of_the_scenes_themselves():
    scenes = [painter.draw(2 * viewer.HELD_OUT, i) for i in range(48)]
    assert painter.judged(render(scenes, painter.SIZE).pixels, scenes)["pair_accuracy"] > 0.9
    assert painter.judged(render(scenes, painter.SIZE).pixels, scenes[1:] + scenes[:1])["pair_accuracy"] < 0.15


def test_scenes_lie_on_the_grid():
    for i in range(40):
        scene = painter.draw(0, i)
        centres = np.array([(o.x, o.y) for o in scene.objects]) * painter.SIZE / painter.PATCH
        assert (centres == centres.round()).all()
        owned = render(scene, painter.SIZE).masks().sum((1, 2))
        alone = [render(Scene((o,)), painter.SIZE).masks().sum() for o in scene.objects]
        assert list(owned) == alone  # no object hides another


def test_objects_are_found_by_their_colours():
    scene = Scene((Object("square", "red", "large", 0.25, 0.25), Object("plate", "cyan", "large", 0.75, 0.75)))
    picture = render(scene, painter.SIZE)
    for (colour, mask), true in zip(painter.shown(picture.pixels[0], ["red", "cyan"]).items(), picture.masks()):
        assert (mask == true).all(), colour


def test_words_are_the_keys_of_cross_attention(loaded):
    model, pipeline = loaded

    def picture():
        texts = ["a red circle", "a blue star and a pink fork"]
        return pipeline(texts, num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images

    plain = picture()
    with regard.record(model, "rows", "mass", processor=pipeline, own_output=True) as recording:
        assert torch.equal(picture(), plain)
    assert len(recording) == 2  # a run a step
    words, patches = recording[1]["transformer_blocks_cross"], recording[1]["transformer_blocks"]
    bos, pad = pipeline.tokenizer.bos_token, pipeline.tokenizer.pad_token
    said = ["a", "red", "circle", *[pad] * 4], ["a", "blue", "star", "and", "a", "pink", "fork"]
    texts = [[str(word).strip() for word in row] for row in words["key_token"].values]
    assert texts == [[bos, *[pad] * 7]] * 2 + [[bos, *row] for row in said]
    assert list(words["key_role"].values[2]) == ["bos", *["text"] * 3, *["pad"] * 4]
    assert float(words["mass"].sel(role="pad").max()) == 0
    for stack in (words, patches):
        assert (stack["query_role"] == "image").all()
        assert list(stack["query_row"].values[0][[0, 7, 8]]) == [0, 0, 1]
        assert json.loads(stack.attrs["grids"]) == [[8, 8]] * 4
        np.testing.assert_allclose(stack["rows"].sum("key"), 1, atol=1e-5)


def test_states_of_unknown_words_have_no_text(loaded):
    model, pipeline = loaded
    with torch.no_grad(), regard.record(model, "entropy", "received", processor=pipeline) as recording:
        states, mask = pipeline.encode_prompt(["a red circle"])
        for given in (states + 1e-3, states, states + 1e-3):
            model(torch.zeros(1, 3, 32, 32), given, torch.tensor([500]), encoder_attention_mask=mask)
    known = [bool((run["transformer_blocks_cross"]["key_token"] != "").any()) for run in recording]
    assert known == [False, True, False]


def test_look(home, tmp_path):
    arguments = ["look", str(home), "--text", "a red circle and a blue star", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["picture.png", "recording.zarr", "report.html"]
    tree = regard.open(tmp_path / "recording.zarr").tree
    assert set(tree.children) == {"transformer_blocks", "transformer_blocks_cross"}
    words = tree["transformer_blocks_cross"]
    assert words.sizes["batch"] == 4
    assert "steps 1, 5, 8, 12" in tree.attrs["note"]
    assert [str(word).strip() for word in words["key_token"].values[3]][1:4] == ["a", "red", "circle"]
    assert {"rows", "entropy"} <= set(words.data_vars)
    assert int(words["query_image"].max()) == 0
    assert '"grids":[[8,8]]' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "paints a text: give one"), (["--text", "a red circle", "--generate", "3"], "--generate: PainterPipeline")],
)
def test_look_refuses(home, tmp_path, arguments, message):
    done = CliRunner().invoke(app, ["look", str(home), *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_diffusers(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(regard.UnknownModel, match=r'pip install "regard\[diffusers\]"'):
        regard.load(home)


@pytest.mark.parametrize("harm", ["pickled", "unknown", "own code"])
def test_only_known_classes_and_safetensors(home, tmp_path, monkeypatch, harm):
    home = shutil.copytree(home, tmp_path / "pipeline")
    index = json.loads((home / "model_index.json").read_text())
    if harm == "pickled":
        (home / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        torch.save({}, home / "transformer" / "diffusion_pytorch_model.bin")
    elif harm == "unknown":
        index["_class_name"] = "EvilPipeline"
    else:
        index["transformer"] = ["harmful", "Model"]
        for path in (home / "harmful.py", home / "transformer" / "harmful.py"):
            path.write_text("raise SystemExit('this code ran')")
        monkeypatch.syspath_prepend(home)
    (home / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(regard.UnknownModel, match="cannot be loaded"):
        regard.load(home)


def test_marks_by_hand():
    scene = Scene((Object("square", "red", "large", 0.25, 0.5),))
    owner = np.full((1, 32, 32), -1, np.int8)
    owner[0, 0:4, 4:6] = 0  # half of the second patch, whose centre is at (6, 2) pixels of 32
    found = torch.full((1, 64, 13), -30.0)
    found[0, 1, :3] = torch.tensor([0.0, (8 - 6) / 7.68, (16 - 2) / 7.68])
    found[0, 1, 3 + SHAPES.index("square")] = 30.0
    assert float(painter.marks_loss(found, [scene], owner)) == pytest.approx(np.log(2) / 64, abs=1e-6)
    found[0, 1, 1] += 2.0  # off by two radii
    assert float(painter.marks_loss(found, [scene], owner)) == pytest.approx(np.log(2) / 64 + 4, abs=1e-5)
    found[0, 1, 3:] = 0.0
    assert float(painter.marks_loss(found, [scene], owner)) == pytest.approx(
        np.log(2) / 64 + 4 + np.log(10) / 2, abs=1e-5
    )


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    for name, value in {"WIDTH": 32, "LAYERS": 2, "TEXT": 32, "STEPS": 4, "BATCH": 2, "WARMUP": 1, "DECAY": 2}.items():
        monkeypatch.setattr(painter, name, value)
    monkeypatch.setattr(training, "CHECKPOINT", 1)
    painter.train(tmp_path / "whole")

    told, steps = painter.marks_loss, []

    def stop(*given):
        steps.append(given)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return told(*given)

    monkeypatch.setattr(painter, "marks_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        painter.train(tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "model_index.json").exists()
    monkeypatch.setattr(painter, "marks_loss", told)
    painter.train(tmp_path / "stopped")
    for part in ("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (tmp_path / "whole" / part).read_bytes() == (tmp_path / "stopped" / part).read_bytes()
    model, pipeline = regard.load(tmp_path / "whole")
    assert pipeline("a red circle", num_inference_steps=2).images[0].size == (32, 32)
