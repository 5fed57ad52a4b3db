"""`regard explain` writes a page or a picture, and says what it cannot do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as t
import xarray as xr
from families import SIZES, VISION, build
from PIL import Image
from scipy.io import wavfile
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from typer.testing import CliRunner

import regard
from regard.cli import app
from regard.cli import explain as explaining
from regard.cli.explain import AGAINST, FOR, PLAIN, Part, _colour, _page, _quarters, as_given
from regard.data.scenes import Object, Scene, render
from regard.evaluation.cross_attention_saliency import cross_attention_saliency

SCENE = Scene((Object("star", "red", "large", 0.25, 0.5), Object("fork", "blue", "large", 0.75, 0.5)))


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    render(SCENE, 64).image().save(path)
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["explain", *map(str, arguments)], env={"COLUMNS": "100"})


def test_a_page_of_words(tmp_path):
    out = tmp_path / "page.html"
    text = "with a heavy heart , the sailor stood ."
    done = run("namer", "--text", text, "--method", "attention-x-gradient", "--out", out)
    assert done.exit_code == 0, done.output
    assert "namer: sorrow" in done.output
    assert done.output.splitlines()[2].split()[1] in ("'heavy'", "'heart'")  # the first row
    page = out.read_text()
    assert f'<span style="background: rgb{FOR}; color: rgb{PLAIN}"' in page
    assert page.count("<span") == 11
    assert "against it" not in page  # this method has no sign
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_the_next_token(tmp_path):
    done = run("reader", "-t", "to be or not to", "--target", " be", "-m", "gradient_x_input", "-o", tmp_path / "a.png")
    assert done.exit_code == 0, done.output
    assert "reader: ' be'" in done.output
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels == FOR).all(-1).any() or (pixels == AGAINST).all(-1).any()  # the largest score


def test_a_picture_is_coloured_where_it_speaks_for_the_class(tmp_path, scene):
    model, processor = regard.load("viewer")
    with Image.open(scene) as image:
        inputs = processor(image, return_tensors="pt")
    for target in ("red star", "blue fork"):
        out = tmp_path / f"{target}.png"
        done = run("viewer", "--image", scene, "--target", target, "--method", "grad_cam", "--out", out)
        assert done.exit_code == 0, done.output
        assert f"viewer: {target}" in done.output
        with Image.open(out) as image:
            assert image.size == (448 + 24 + 448, 448)
            heat = np.asarray(image.crop((472, 0, 920, 448))).astype(int)
        orange = (heat[..., 0] - heat[..., 2]).clip(min=0)
        found = regard.attribute(model, inputs, target, method="grad_cam").values[0]
        there, shown = (np.unravel_index(map_.argmax(), map_.shape) for map_ in (found, orange))
        assert np.allclose(np.array(there) * 7 + 3, shown, atol=8)
    page = tmp_path / "page.html"
    assert run("viewer", "--image", scene, "--target", "0", "--method", "gradient_x_input", "-o", page).exit_code == 0
    assert page.read_text().count("data:image/png;base64,") == 2


def test_why_this_and_not_that(tmp_path):
    done = run(
        "namer", "-t", "with a heavy heart .", "--against", "joy", "-m", "gradient_x_input", "-o", tmp_path / "a.png"
    )
    assert done.exit_code == 0, done.output
    assert "namer: sorrow rather than joy  (gradient_x_input; logit ahead" in done.output


def test_words_are_joined(tmp_path):
    pieces, words = (
        run("reader", "-t", "unbelievable", "-m", "rollout", "-o", tmp_path / "a.png", *more) for more in ((), ("-w",))
    )
    assert "'unbelievable'" in words.output
    assert "'unbelievable'" not in pieces.output


def test_patches_are_shown_on_the_picture_that_the_model_is_given(tmp_path, scene):
    out = tmp_path / "page.html"
    done = run("describer", "-i", scene, "-m", "gradient_x_input", "-o", out)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[2].split() == ["position", "token", "row", "column", "score", "share"]
    page = out.read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "&lt;image&gt;" not in page  # the picture shows them
    with Image.open(scene) as image:
        model, processor = regard.load("describer")
        wide = image.resize((256, 128))
        inputs = dict(processor(text="<image> what ?", images=wide, return_tensors="pt"))
        shown = as_given(wide, inputs, processor)
    assert shown.size == tuple(inputs["pixel_values"].shape[:1:-1])


def test_a_sound_and_what_was_written(tmp_path):
    rate = 8000
    wave = np.sin(np.arange(rate) * 2 * np.pi * np.linspace(200, 900, rate) / rate)
    wavfile.write(tmp_path / "a.wav", rate, (wave * 2**14).astype(np.int16))
    out = tmp_path / "a.html"
    done = run("listener", "-a", tmp_path / "a.wav", "--written", "one", "-m", "gradient_x_input", "-o", out)
    assert done.exit_code == 0, done.output
    assert "written" in done.output
    assert "'<|startoftranscript|>'" in done.output
    assert "[transformers]" not in done.output
    assert out.read_text().count("<h2>") == 2
    done = run("namer", "-t", "a lamp .", "--written", "one", "-o", out)
    assert "has no decoder beside an encoder" in done.output.replace("\n", " ")


def test_cross_attention_is_laid_beside_what_hiding_shows(monkeypatch):
    monkeypatch.setattr(explaining, "MASKS", 6)
    model, inputs = build("whisper")
    given = {"input_features": inputs["input_features"][:1]}
    [said] = explaining._across(model, given)
    found = cross_attention_saliency(model, given, masks=6)
    assert f"{float(found['rho_all'].mean()):+.2f} of the input" in said
    assert f"{int(found['tokens'].sum())} tokens" in said
    assert f"{float(found['rho'].max()):+.2f}" in said
    [said] = explaining._across(model, {"input_features": torch.zeros(1, 9, 40)})
    assert "was not laid beside hiding" in said


def saved(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_pairs_and_likeness(tmp_path, scene):
    torch.manual_seed(0)
    words = ["[UNK]", "[PAD]", "[EOS]", "a", "red", "star", "blue", "fork"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    fast = t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    size = {"height": 16, "width": 16}
    looks = t.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    sizes = {**SIZES, "vocab_size": 8, "max_position_embeddings": 16, "eos_token_id": 2, "pad_token_id": 1}
    clip = t.CLIPModel(t.CLIPConfig(text_config=sizes, vision_config=VISION, projection_dim=16))
    folder = saved(tmp_path / "clip", clip, t.CLIPProcessor(looks, fast))
    out = tmp_path / "a.html"
    asked = ("-t", "a red star", "-t", "a blue fork", "--target", "a blue fork", "-m", "gradient_x_input")
    done = run(folder, "-i", scene, *asked, "-o", out)
    assert done.exit_code == 0, done.output
    assert "'a blue fork'" in " ".join(done.output.split())
    assert "similarity" in done.output
    assert {"'blue'", "'fork'"} <= set(done.output.split())
    assert "'red'" not in done.output.split()
    page = out.read_text()
    assert page.count("<h2>") == page.count("data:image/png") == 2
    done = run(folder, "-i", scene, "-i", scene, "-t", "a", "-o", out)
    assert "compares one picture" in done.output.replace("\n", " ")
    bert = saved(tmp_path / "bert", t.BertModel(t.BertConfig(**{**SIZES, "vocab_size": 8})), fast)
    done = run(bert, "-t", "a red star", "-t", "a red fork", "-m", "gradient_x_input", "-o", out)
    assert done.exit_code == 0, done.output
    assert "how alike the two texts are" in " ".join(done.output.split())
    assert "cosine" in done.output
    assert [line.strip() for line in done.output.splitlines() if "words" in line] == ["first words", "second words"]
    done = run(bert, "-t", "a red star", "-m", "gradient_x_input", "-o", out)
    assert done.exit_code == 2
    assert "--text or --image twice" in done.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("namer", "-t", "a lamp .", "--target", "joi"), "did you mean joy"),
        (("namer", "-t", "a lamp .", "-m", "grad-kam"), "did you mean grad_cam"),
        (("namer", "-t", "a lamp .", "-o", "a.svg"), "ends in .html or .png"),
        (("namer", "-t", "a lamp .", "-m", "layerwise_relevance"), "reads text"),
        (("viewer", "-t", "a lamp"), "give one with --image"),
        (("reader", "-t", " "), "the text is empty"),
        (("reader", "-t", "to be", "-t", "or not"), "no embedding that could be compared"),
        (("reader", "-t", "a", "-t", "b", "-t", "c"), "two texts, or two pictures, can be compared"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2
    assert said in done.output.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_colours():
    assert _colour(1.0) == FOR
    assert _colour(-1.0) == AGAINST
    assert _colour(0.0) == PLAIN


def test_quarters_add_up():
    values = np.arange(64.0).reshape(8, 8)
    sums, places = _quarters(values)
    assert sums.sum() == values.sum()
    assert (sums[0], places[0]) == (0 + 1 + 8 + 9, ["0-1", "0-1"])
    assert (sums[-1], places[-1]) == (54 + 55 + 62 + 63, ["6-7", "6-7"])


def test_a_page_of_nothing_important():
    found = xr.DataArray(np.zeros(2), {"text": ("token", ["<b>", "\n"])}, ("token",))
    page = _page([Part("words", found)], "title", "about").decode()
    assert page.count(f"background: rgb{PLAIN}") == 2
    assert "↵" in page
    assert "<b>" not in page


def test_a_map_is_judged(tmp_path):
    out = tmp_path / "page.html"
    told = ("--not", "joy", "--judge", "-m", "attention-x-gradient", "-o", out)
    done = run("namer", "-t", "with a heavy heart .", *told)
    assert done.exit_code == 0, done.output
    assert "sorrow rather than joy" in done.output
    rows = [line for line in done.output.splitlines() if line.startswith(" deletion") or line.startswith(" insertion")]
    assert len(rows) == 2
    assert all(int(row.split()[-3]) >= 10 for row in rows)  # of 20
    page = out.read_text()
    assert page.count("<svg") == 2
    assert "once the model forgets all layers" in page


def test_a_map_in_words(tmp_path, scene):
    out = tmp_path / "page.html"
    done = run("namer", "-t", "with a heavy heart .", "--in-words", "-m", "attention-x-gradient", "-o", out)
    assert done.exit_code == 0, done.output
    assert "is most important for the prediction." in done.output
    assert "is most important for the prediction." in out.read_text()
    done = run("viewer", "-i", scene, "--target", "blue fork", "--in-words", "-m", "grad-cam", "-o", out)
    assert "right << is most important" in " ".join(done.output.split())


def test_steps_are_for_methods_that_take_some(tmp_path):
    out = tmp_path / "a.html"
    done = run("namer", "-t", "a heavy heart .", "-m", "visual-precision-search", "--steps", 2, "-o", out)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[2].split()[1] in ("'heavy'", "'heart'")
    done = run("namer", "-t", "a heavy heart .", "-m", "rollout", "--steps", 2, "-o", out)
    assert "--steps 2: rollout takes no steps" in done.output
