"""Scanpaths of models on pictures, and how they are drawn."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel
from typer.testing import CliRunner

import regard
from regard.cli import app
from regard.gaze import Scanpath
from regard.gaze.compare_pictures import on_picture
from regard.gaze.draw_scanpath import draw_scanpath
from regard.gaze.encoder import encoder
from regard.gaze.fixation_map import fixation_map
from regard.gaze.humanoid_search import Episode, by_likeness, humanoid_search
from regard.gaze.nevaclip import explore
from regard.gaze.nss import nss
from regard.gaze.scan import scan
from regard.gaze.scanmatch import scanmatch
from regard.zoo.words import WORDS, tokenizer

DINO = Path(os.environ.get("REGARD_MODELS", "")) / "dinov2-small"
PICTURES = Path(os.environ.get("REGARD_DATA", "")) / "pictures"
needs_both = pytest.mark.skipif(
    "REGARD_MODELS" not in os.environ or "REGARD_DATA" not in os.environ or not DINO.is_dir(),
    reason="set REGARD_MODELS and REGARD_DATA",
)
SMALL = {"fixations": 3, "iterations": 4}


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    one = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = tokenizer(16)
    text = {"vocab_size": len(WORDS), "eos_token_id": words.eos_token_id, "max_position_embeddings": 16}
    config = CLIPConfig(
        text_config={**one, **text}, vision_config={**one, "image_size": 32, "patch_size": 8}, projection_dim=12
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CLIPModel(config).eval(), SimpleNamespace(image_processor=images, tokenizer=words)


def picture(width: int = 60, height: int = 40) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_pixels_are_those_of_the_processor(clip):
    model, processor = clip
    square = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    expected = processor.image_processor(images=square, return_tensors="pt")["pixel_values"]
    see = encoder(model, processor)
    torch.testing.assert_close(see.pixels(square), expected)
    torch.testing.assert_close(see(expected), model.get_image_features(pixel_values=expected).pooler_output)
    inputs = processor.tokenizer("a red star", return_tensors="pt")
    words = model.get_text_features(**{k: inputs[k] for k in ("input_ids", "attention_mask")}).pooler_output[0]
    torch.testing.assert_close(see.words("a red star"), words)
    assert see.target(square).shape == see.target("a red star").shape == (12,)


def test_a_scan_is_nevaclip_in_the_pictures_own_pixels(clip):
    model, processor = clip
    path = scan(model, processor, picture(), "a red star", **SMALL, random_restarts=False)
    assert path.size == (60, 40)
    see = encoder(model, processor)
    found = explore(
        see,
        see.pixels(picture()),
        see.words("a red star"),
        lambda *_: torch.zeros(1, 2) + 0.5,
        **SMALL,
        rate=0.1,
        fovea=0.2,
        blur_window=7,
        blur_sigma=10 * 32 / 224,
        forgetting=0.0,
        random_restarts=False,
    )
    shares = ((found.places[0].flip(-1) + 1) / 2 * 31 + 0.5) / 32
    # Without restarts the only chance is a jitter of a twentieth at most, of which there is none here.
    assert path.places.shape == (3, 2)
    assert np.abs(path.places / (60, 40) - shares.numpy()).max() < 0.3
    again = scan(model, processor, picture(), "a red star", **SMALL, seed=1)
    assert again.places.tolist() == scan(model, processor, picture(), "a red star", **SMALL, seed=1).places.tolist()


def test_a_model_in_training_is_left_so_and_gets_no_gradients(clip):
    model, processor = clip
    try:
        model.train()
        model.vision_model.eval()  # as a part that is frozen
        modes = [module.training for module in model.modules()]
        scan(model, processor, picture(), **SMALL)
        assert [module.training for module in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters())
    finally:
        model.eval()


def command(*arguments):
    return CliRunner().invoke(app, ["gaze", "scan", *map(str, arguments)], env={"COLUMNS": "200"})


@needs_both
def test_dino_on_photographs():
    """What it fixates gives it more of the picture than what it began with, and metrics take its paths."""
    model, processor = regard.load(DINO)
    paths = {}
    for name in ("cat", "coffee"):
        with Image.open(PICTURES / f"{name}.jpg") as photograph:
            photograph.load()
        path = paths[name] = scan(model, processor, photograph, fixations=2, iterations=5)
        assert path.size == photograph.size
        seen = fixation_map([path], (20, 20), sigma=2)
        assert nss(seen, path) > 1
        assert scanmatch(path, path) == 1
    assert paths["cat"].places.tolist() != paths["coffee"].places.tolist()
    see = encoder(model, processor)
    with Image.open(PICTURES / "cat.jpg") as photograph:
        pixels = see.pixels(photograph)
    chance = torch.Generator().manual_seed(0)
    found = explore(
        see,
        pixels,
        see(pixels)[0],
        lambda *_: torch.rand(1, 2, generator=chance),
        fixations=1,
        iterations=8,
        rate=0.1,
        fovea=0.2,
        blur_window=41,
        blur_sigma=10.0,
        forgetting=0.0,
    )
    losses = found.losses[0, :, 0]
    assert losses.min() < losses[0] - 0.005
    with pytest.raises(ValueError, match="Dinov2Model reads no words"):
        scan(model, processor, picture(), "a cat")


@needs_both
def test_the_command_on_a_photograph(tmp_path):
    out, table = tmp_path / "cat.gif", tmp_path / "cat.csv"
    done = command(DINO, PICTURES / "cat.jpg", "-n", 2, "--iterations", 2, "-o", out, "--table", table)
    assert done.exit_code == 0, done.output
    with Image.open(out) as made, Image.open(PICTURES / "cat.jpg") as photograph:
        assert made.n_frames == 3
        assert made.size[0] / made.size[1] == pytest.approx(photograph.width / photograph.height, rel=0.01)
        (trial,) = regard.gaze.read(table, screen=photograph.size)
    assert len(trial.scanpath) == 2


@needs_both
def test_dino_finds_a_photograph_in_a_panorama():
    """A picture hung into a dim panorama; what is looked for is the picture. Then the path is drawn."""
    model, processor = regard.load(DINO)
    see = encoder(model, processor)
    with Image.open(PICTURES / "cat.jpg") as photograph:
        cat = photograph.convert("RGB").resize((64, 64))
    panorama = torch.full((3, 128, 256), 0.4)
    panorama[:, 32:96, 176:240] = torch.from_numpy(np.array(cat)).permute(2, 0, 1).float() / 255  # yaw 68 to 157
    agent = by_likeness(lambda view: see(see.normed(view)), see.target(cat), yaw_step=60.0)
    found = humanoid_search(agent, Episode(panorama, "the cat", (80, 145), (-20, 20)), size=(112, 112), fov=90)
    assert found.success
    assert found.answer == (120, 0)
    assert found.scanpath.size == (256, 128)


def test_a_classifier_is_seen_by_what_it_classifies():
    model, processor = regard.load("viewer")
    see = encoder(model, processor)
    pixels = see.pixels(picture())
    torch.testing.assert_close(see(pixels), model.vit(pixel_values=pixels).last_hidden_state[:, 0])


@pytest.mark.parametrize(
    ("name", "said"),
    [("describer", "among words"), ("reader", "sees no pictures"), ("listener", "sees no pictures")],
)
def test_what_makes_no_vector_of_a_picture_is_refused(name, said):
    with pytest.raises(ValueError, match=said):
        encoder(*regard.load(name))


@pytest.mark.parametrize("end", ["png", "svg", "gif", "html"])
def test_the_command_draws_a_scan_and_writes_a_table(tmp_path, end):
    given, out, table = tmp_path / "given.png", tmp_path / f"a.{end}", tmp_path / "a.csv"
    picture().save(given)
    quick = ("-n", 3, "--iterations", 2, "--seed", 1)
    done = command("viewer", given, *quick, "-o", out, "--table", table)
    assert done.exit_code == 0, done.output
    path = scan(*regard.load("viewer"), picture(), fixations=3, iterations=2, seed=1)
    (trial,) = regard.gaze.read(table, screen=(60, 40))
    assert np.allclose(trial.scanpath.places, path.places)
    assert (trial.subject, trial.stimulus) == ("viewer", "given.png")
    assert "viewer looks at the whole picture" in done.output
    drawn = out.read_bytes()
    assert command("viewer", given, *quick, "-o", out).exit_code == 0  # its own file is replaced
    assert out.read_bytes() == drawn
    assert (
        drawn
        == draw_scanpath(
            path, picture(), tmp_path / f"b.{end}", title="viewer looks at the whole picture: given.png"
        ).read_bytes()
    )


def test_a_table_on_the_screen_of_people_is_scored_beside_theirs(tmp_path):
    """The picture was shown twice as large, in the middle: a model's pixels are not those of the screen."""
    given, tables = tmp_path / "given.png", tmp_path / "scans"
    picture().save(given)
    tables.mkdir()
    quick = ("-n", 3, "--iterations", 2, "-o", tmp_path / "a.svg", "--table", tables / "a.csv")
    done = command("viewer", given, *quick, "--screen", "160x120", "--placed", "20,20,140,100")
    assert done.exit_code == 0, done.output
    plain = scan(*regard.load("viewer"), picture(), fixations=3, iterations=2)
    (trial,) = regard.gaze.read(tables / "a.csv", screen=(160, 120))
    assert np.allclose(trial.scanpath.places, plain.places * 2 + 20)
    assert np.allclose(on_picture(trial.scanpath, (60, 40), (20, 20, 140, 100)).places, plain.places)
    rows = [f"{who},given.png,{x},{y}" for who in "ab" for x, y in plain.places * 2 + 20]
    (tmp_path / "people.csv").write_text("\n".join(["subject,stimulus,x,y", *rows]))
    arguments = ["gaze", "score", tables, tmp_path / "people.csv", "--screen", "160x120", "--metric", "scanmatch"]
    done = CliRunner().invoke(app, list(map(str, [*arguments, "--resamples", 0])), env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "scanmatch" in done.output
    assert "1.00" in done.output  # the same path


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--screen", "160x120"), "give --table too"),
        (("--table", "t.csv", "--placed", "fit"), "give --screen too"),
        (("--table", "t.csv", "--screen", "160x120"), "--placed centre or fit or fill or left,top,right,bottom"),
        (("-o", "a.jpg"), "makes .png, .svg, .gif, .html"),
        (("-o", "given.png"), "Regard wrote"),
        (("--for", "a star"), "reads no words"),
        (("--for", "a star", "--like", "given.png"), "give one of them"),
        (("--like", "none.png"), "--like none.png"),
        (("--table", "given.png"), "exists"),
    ],
)
def test_what_cannot_be_scanned_is_said(tmp_path, monkeypatch, more, said):
    monkeypatch.chdir(tmp_path)
    picture().save("given.png")
    done = command("viewer", "given.png", "-n", 1, "--iterations", 1, *more)
    assert done.exit_code == 2
    assert said in done.output
    with Image.open("given.png") as given:
        assert given.size == (60, 40)


def test_numbers_of_fixations_at_one_place_stand_together(tmp_path):
    there = Scanpath(np.array([[10.0, 10], [40, 30], [10.2, 10], [10, 10.1]]), (60, 40))
    svg = draw_scanpath(there, picture(), tmp_path / "a.svg").read_text()
    assert re.findall(r"<text [^>]*>([^<]*)<", svg) == ["1", "2", "1 3", "1 3 4"]
    sizes = [float(size) for size in re.findall(r'<text [^>]*font-size="([\d.]+)"', svg)]
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3]


PATH = Scanpath(np.array([[10.0, 10], [50, 20], [30, 35], [80, -5]]), (60, 40), np.array([100.0, 400, 200, 300]))


def test_a_still_picture(tmp_path):
    out = draw_scanpath(PATH, picture(), tmp_path / "path.png")
    with Image.open(out) as made:
        assert made.size == (1024, 683)
        plain = np.array(picture().resize(made.size, Image.Resampling.LANCZOS)).astype(int)
        changed = (np.abs(np.array(made) - plain) > 40).any(-1)
    assert changed[int(20 / 40 * 683), int(50 / 60 * 1024)]  # a fixation
    assert changed[int(15 / 40 * 683), int(30 / 60 * 1024)]  # half way from the first to the second
    assert not changed[-40:, :40].any()  # a corner without any
    assert 0.01 < changed.mean() < 0.2


def test_a_moving_picture_shows_one_more_each_time(tmp_path):
    with Image.open(draw_scanpath(PATH, picture(), tmp_path / "path.gif", speed=2.0)) as made:
        assert made.n_frames == 5
        frames, durations = [], []
        for i in range(5):
            made.seek(i)
            frames.append(np.array(made.convert("RGB")).astype(int))
            durations.append(made.info["duration"])
    assert durations[:4] == [50, 200, 100, 150]  # half of what they lasted
    seen = [(np.abs(a - b) > 60).any(-1).mean() for a, b in pairwise(frames)]
    assert all(0.002 < share < 0.1 for share in seen[:3])


def test_drawings_hold_all_that_they_need(tmp_path):
    said = 'a <cat> & "dog"'
    svg = draw_scanpath(PATH, picture(), tmp_path / "path.svg", title=said).read_text()
    tree = ET.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    circles = tree.findall(f".//{space}circle")
    assert [text.text for text in tree.findall(f".//{space}text")] == ["1", "2", "3", "4"]
    assert [(float(c.get("cx")), float(c.get("cy"))) for c in circles[:2]] == [
        (pytest.approx(10 / 60 * 1024, abs=0.1), pytest.approx(10 / 40 * 683, abs=0.1)),
        (pytest.approx(50 / 60 * 1024, abs=0.1), pytest.approx(20 / 40 * 683, abs=0.1)),
    ]
    assert (circles[3].get("cx"), circles[3].get("cy"), circles[3].get("fill")) == ("1024.0", "0.0", "none")
    radii = [float(c.get("r")) for c in circles]
    assert radii[1] / radii[2] == pytest.approx(2**0.5, rel=0.02)  # twice as long
    assert tree.find(f"{space}title").text == said
    assert len(tree.findall(f".//{space}line")) == 2 * 3
    assert "animation" not in svg
    page = draw_scanpath(PATH, picture(), tmp_path / "path.html", title=said).read_text()
    assert "a &lt;cat&gt; &amp; &quot;dog&quot;" in page
    assert re.findall(r'(?:href|src)="(?!data:)[^"]*"', page) == []
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in page
    assert len(re.findall(r"@keyframes", page)) == 4
    assert "prefers-reduced-motion" in page


def test_fixations_appear_when_those_before_have_lasted(tmp_path):
    page = draw_scanpath(PATH, picture(), tmp_path / "path.html").read_text()
    starts = [float(value) for value in re.findall(r"\{opacity:0\}([\d.]+)%\{opacity:1\}", page)]
    total = 100 + 400 + 200 + 300 + 1500
    assert starts == [pytest.approx(100 * before / total, abs=0.01) for before in (100, 500, 700)]
    assert f"{total / 1000:.2f}s" in page


def test_refusals(tmp_path, clip):
    with pytest.raises(ValueError, match=r"\.png, \.svg, \.gif, \.html: got 'path\.jpg'"):
        draw_scanpath(PATH, picture(), tmp_path / "path.jpg")
    with pytest.raises(ValueError, match="without fixations"):
        draw_scanpath(Scanpath(np.zeros((0, 2)), (60, 40)), picture(), tmp_path / "path.png")
    with pytest.raises(ValueError, match="speed=0"):
        draw_scanpath(PATH, picture(), tmp_path / "path.png", speed=0)
    with pytest.raises(ValueError, match="does not say how pictures are prepared"):
        encoder(clip[0], None)
    with pytest.raises(ValueError, match="without its tokenizer"):
        encoder(clip[0], clip[1].image_processor).words("a cat")
