"""What every method of the room keeps, whatever it does; and `regard steer`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Literal

import families
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import regard
from regard import catalog
from regard.cli import app
from regard.cli.beside import Said
from regard.cli.steer import ROUNDS, marked, measured, moved, parsed, shown, told
from regard.data.scenes import Dials, render, sample
from regard.interventions import Method, painted
from regard.interventions._picture import Box

METHODS = catalog.methods("interventions")
STRONG = {  # knobs that change a tiny random model, and what would be found anew for each batch
    "agla": {"steps": 2},
    "attention_prompting": {"steps": 2},
    "carve": {"steps": 2},
    "dyfo": {"budget": 1, "expert": lambda image, text: [Box(0.25, 0.25, 0.5, 0.5)]},
    "act": {"heads": [(1, 0), (1, 3)], "threshold": 0.02, "beta": 0.0},
    "focus_directions": {"directions": {(1, 0): torch.ones(8), (1, 3): -torch.ones(8)}, "strength": 2.0},
    "headhunter": {"heads": [("transformer_blocks.1.attn1", 2), ("transformer_blocks.3.attn1", 0)]},
    "hicd": {"heads": [(0, 1), (1, 2)]},
    "locatedit": {"words": [[1, 2], [1]]},
    "test_time_registers": {"chosen": {0: [3, 17], 1: [5]}},
    "vti": {"textual": torch.linspace(-1, 1, 192).view(6, 32).sin()},
    "inter": {"tail": 2, "threshold": 0.0, "beta": 0.0},
    "var": {"p": 1.0, "tau": 2.3, "rho": 0.0, "least": 0.0},
}
STEPS, PADDED = 4, 3


@cache
def models():
    """family -> model, inputs of two rows of which the first is left-padded, and inputs of each row alone."""
    found = {}
    for name in (*families.GENERATE, "vit"):
        with pytest.MonkeyPatch.context() as patch:
            if name != "gemma3":  # its layers are listed
                patch.setitem(families.GROUPED, "num_hidden_layers", 5)
            model, inputs = families.build(name)
        if "decoder_input_ids" not in inputs:
            found[name] = model, padded(inputs), [row(inputs, i) for i in range(2)]
    if find_spec("diffusers"):
        model, _ = painter()
        found["painter"] = model, {"prompt": ["a red ring and a star", "a blue fork"], "num_inference_steps": 2}, []
    return found


@cache
def painter():
    """A model that paints, and its pipeline; a row of texts is not alone where one is edited to fit another."""
    return regard.load("painter")


def padded(inputs):
    """The same rows, the second three tokens longer, so that the first is padded."""
    if "input_ids" not in inputs:
        return inputs
    ids = inputs["input_ids"]
    new = {"attention_mask": torch.ones_like(ids)}
    for name, value in {**inputs, **new}.items():
        if value.shape == ids.shape:
            more = torch.zeros(2, PADDED, dtype=value.dtype)
            if name in ("input_ids", "attention_mask"):
                more[1] = torch.tensor([4, 5, 6]) if name == "input_ids" else 1
            new[name] = torch.cat([more, value], dim=1)
    return inputs | new


def row(inputs, i):
    alone = {name: value.chunk(2)[i] for name, value in inputs.items()}
    if "input_ids" not in inputs:
        return alone
    if i == 1:
        whole = padded(inputs)
        n = inputs["input_ids"].shape
        alone |= {name: whole[name][1:] for name, value in inputs.items() if value.shape == n}
    return alone | {"attention_mask": torch.ones_like(alone["input_ids"])}


def fits(name):
    """The families that a method takes, as (family, model, inputs, rows); the others it refuses by name."""
    method, found = catalog.method("interventions", name), []
    for family, (model, inputs, rows) in models().items():
        if "input_ids" not in inputs and any("__call__" in vars(kind) for kind in method.__mro__):
            continue  # of logits; such a model has no next token
        said = refusal(method, model, inputs, **STRONG.get(name, {}))
        if said is None:
            found.append((family, model, inputs, rows))
        else:
            assert name.replace("_", "-") in said, said
            assert type(model).__name__ in said, said
    return found


def refusal(method, model, inputs, **knobs):
    try:
        with around(model, made(method, model, inputs, **knobs)):
            return None
    except ValueError as error:
        return str(error)


def made(method, model, inputs, **knobs):
    return method.fit(model, inputs, painter().processor if "prompt" in inputs else families.processor(model), **knobs)


def around(model, thing):
    return nullcontext() if callable(thing) else regard.intervene(model, thing)


@torch.no_grad()
def said(model, inputs, thing=None):
    """Ids that are generated, and the scores of each step; of a classifier, its class and scores."""
    with nullcontext() if thing is None else around(model, thing):
        if "prompt" in inputs:
            steps = {"callback_on_step_end": thing.on_step_end} if hasattr(thing, "on_step_end") else {}
            pictures = torch.from_numpy(painted(painter().processor, inputs, **steps))
            return pictures.round(), pictures
        if "input_ids" not in inputs:
            scores = model(**inputs).logits
            return scores.argmax(-1), scores
        found = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
            logits_processor=[thing] if callable(thing) else None,
        )
    return found.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(found.scores, dim=1)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_fits_some_family_and_refuses_others_by_name(name):
    fitting = {family for family, *_ in fits(name)}
    assert fitting
    for family in {"bert", "vit", "t5"} - fitting:
        model, inputs = families.build(family)
        said = refusal(catalog.method("interventions", name), model, inputs)
        assert said is not None, family
        assert name.replace("_", "-") in said
        assert type(model).__name__ in said


@pytest.mark.parametrize("name", METHODS)
def test_off_it_changes_nothing_on_it_does_and_the_model_is_left_as_it_was(name):
    method, changed = catalog.method("interventions", name), []
    strong = STRONG.get(name, {})
    assert method.off
    for family, model, inputs, _ in fits(name):
        ids, scores = said(model, inputs)
        off_ids, off = said(model, inputs, made(method, model, inputs, **{**strong, **method.off}))
        assert torch.equal(off_ids, ids), family
        assert torch.allclose(off, scores, atol=1e-5), family
        _, on = said(model, inputs, made(method, model, inputs, **strong))
        changed.append(not torch.allclose(on, scores, atol=1e-4))
        again_ids, again = said(model, inputs)
        assert torch.equal(again_ids, ids), family
        assert torch.equal(again, scores), family
    assert any(changed)


@pytest.mark.parametrize("name", METHODS)
def test_a_row_of_a_batch_is_as_it_is_alone(name):
    method = catalog.method("interventions", name)
    for family, model, inputs, rows in fits(name):
        knobs = STRONG.get(name, {})
        ids, scores = said(model, inputs, made(method, model, inputs, **knobs))
        for i, alone in enumerate(rows):
            own_ids, own = said(model, alone, made(method, model, alone, **knobs))
            assert torch.equal(own_ids[0], ids[i]), (family, i)
            assert torch.allclose(own[0], scores[i], atol=1e-3), (family, i)


@pytest.mark.parametrize("name", METHODS)
def test_a_knob_that_it_has_not_is_an_error(name):
    family, model, inputs, _ = fits(name)[0]
    with pytest.raises(TypeError, match="unexpected keyword"):
        made(catalog.method("interventions", name), model, inputs, **STRONG.get(name, {}), strength_of_will=1.0)


def test_marked_are_the_words_that_one_text_has():
    left, right = marked("a red ring and a fork", "a red plate and fork")
    assert left.plain == "a red [ring] and [a] fork"
    assert right.plain == "a red [plate] and fork"
    assert {span.style for span in right.spans} == {"bold green"}
    same = marked("as it was", "as it was")
    assert [text.plain for text in same] == ["as it was", "as it was"]


def steer(*arguments):
    return CliRunner().invoke(app, ["steer", *map(str, arguments)], env={"COLUMNS": "160"})


def test_steer_shows_before_and_after(folders, picture):
    arguments = ("--text", "what is in this picture ?", "--image", picture, "--generate", 8)
    done = steer(folders["llava"], "--with", "var", *arguments)
    assert done.exit_code == 0, done.output
    assert "before" in done.output
    assert "after" in done.output
    assert "nothing changed" in done.output  # two layers: the first two and the last are left alone
    said = " ".join(done.output.split())
    assert "ms of processor time a token before" in said
    assert (" times, over " in said) != ("cannot be told" in said)


def test_steer_writes_the_pictures_of_a_model_that_paints(tmp_path):
    text = tmp_path / "texts.txt"
    text.write_text("a red circle and a blue star\na red circle and a green star\n")
    out = tmp_path / "pictures"
    done = steer("painter", "--with", "locatedit", "--file", text, "--out", out)
    assert done.exit_code == 0, done.output
    assert "fitting took" in done.output or "s of processor time before" in done.output
    files = {f"{i}-{when}.png": out / f"{i}-{when}.png" for i in (1, 2) for when in ("before", "after")}
    assert {path.name for path in out.iterdir()} == set(files)
    pixels = {name: np.asarray(Image.open(path)) for name, path in files.items()}
    assert np.array_equal(pixels["1-before.png"], pixels["1-after.png"])
    assert not np.array_equal(pixels["2-before.png"], pixels["2-after.png"])
    off = steer("painter", "--with", "locatedit", "--knob", "cut=-1", "--file", text, "--out", out)
    assert "nothing changed" in off.output


class Clock:
    """Moves on by what is done, a little unevenly, and slows down while it does."""

    def __init__(self, noise):
        self.now, self.rng, self.noise, self.order = 0.0, np.random.default_rng(0), noise, ""

    def __call__(self):
        return self.now

    def does(self, name, seconds):
        def work():
            self.order += name
            self.now += seconds * (1 + self.now / 10) * np.exp(self.noise * self.rng.normal())

        return work


def test_times_are_taken_in_turns_and_told_where_they_can_be():
    clock = Clock(0.05)
    costs = measured(clock.does("b", 0.1), clock.does("a", 0.15), clock)
    assert clock.order[:8] == "baabbaab"  # neither is always first, so a change of pace counts for both
    ratio, unsure = told(costs)
    assert abs(ratio - 1.5) < 2 * unsure
    assert unsure < 0.1 * ratio
    noisy = Clock(1.5)
    costs = measured(noisy.does("b", 0.1), noisy.does("a", 0.1), noisy)
    assert len(costs) == ROUNDS[1]
    assert told(costs) is None
    assert told(np.zeros((5, 2))) is None
    lines = [
        str(shown("one", "two", costs, 0.0).renderables[2]),
        str(shown("one", "two", np.ones((9, 2)), 0.0).renderables[2]),
    ]
    assert "cannot be told" in lines[0]
    assert "times" not in lines[0].replace("how many times that is cannot", "")
    assert "1.00 ± 0.00 times, over 9 rounds" in lines[1]


def test_knobs_go_to_the_methods_that_have_them():
    class One(Method):
        def __init__(self, *, alpha: float | None = None, n: int = 2, times: Sequence[float] = ()): ...

    class Other(Method):
        def __init__(self, model, *, alpha: float = 1.0): ...

        @classmethod
        def fit(cls, model, inputs, processor=None, *, text: str = "", way: Literal["up", "down"] = "up", **knobs): ...

    methods = {"one": One, "other": Other}
    assert parsed(methods, ["alpha=0.5", "one.n=3", "times=1,2.5", "other.alpha=2", "text=a b", "way=down"]) == {
        "one": {"alpha": 0.5, "n": 3, "times": (1.0, 2.5)},
        "other": {"alpha": 2.0, "text": "a b", "way": "down"},
    }
    with pytest.raises(ValueError, match="give a whole number"):
        parsed(methods, ["n=2.5"])
    with pytest.raises(ValueError, match="give up or down"):
        parsed(methods, ["way=left"])


@pytest.mark.parametrize("name", ["carve", "attention-prompting"])
def test_steer_hands_over_the_picture_as_it_is(folders, tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    large = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
    large.save(tmp_path / "large.png")
    arguments = ["--image", tmp_path / "large.png", "--text", "it was", "--knob", "steps=1", "--generate", 2]
    done = steer(folders["llava"], "--with", name, *arguments)
    assert done.exit_code == 0, done.output
    assert "after" in done.output
    large.crop((0, 0, 64, 32)).save(tmp_path / "large.png")  # the model is given the middle
    done = steer(folders["llava"], "--with", name, *arguments)
    assert done.exit_code == 2
    assert f"{name}: image 0, 64 x 32, is another than the model is given, or cut" in " ".join(done.output.split())


def test_steer_shows_the_classes_of_a_model_that_says_nothing(tmp_path):
    """Against the model's own softmax, with and without; and what the page holds is what the table does."""
    scene = tmp_path / "scene.png"
    render(sample(Dials(), 3, 0)).image(0).save(scene)
    page = tmp_path / "page.html"
    done = steer("lookout", "--with", "test-time-registers", "--image", scene, "--out", page)
    assert done.exit_code == 0, done.output
    loaded = regard.load("lookout")
    inputs = loaded.processor(images=Image.open(scene), return_tensors="pt")
    method = catalog.method("interventions", "test_time_registers")
    with torch.inference_mode():
        before = loaded.model(**inputs).logits[0].sigmoid()  # its labels do not exclude each other
        with regard.intervene(loaded.model, method.fit(loaded.model, dict(inputs))):
            after = loaded.model(**inputs).logits[0].sigmoid()
    assert (before - after).abs().max() > 0
    first = int(before.argmax())
    best = loaded.model.config.id2label[first]
    line = next(line for line in done.output.splitlines() if line.startswith(best))
    assert line[len(best) :].split() == [f"{chances[first]:.1%}" for chances in (before, after)]
    assert f"probabilities moved by up to {(before - after).abs().max():.1%}; " in " ".join(done.output.split())
    header = re.search(r'id="header">(.*?)</script>', page.read_text())
    assert header
    rows = json.loads(header[1])["classes"]
    assert rows[0]["label"] == best
    shown = np.array([[row["before"], row["after"]] for row in rows])
    ids = [loaded.model.config.label2id[row["label"]] for row in rows]
    np.testing.assert_allclose(shown, torch.stack([before, after], 1)[ids], atol=1e-6)
    assert json.loads(header[1])["stacks"]


def test_that_words_are_the_same_is_not_that_nothing_changed():
    def said(*scores, ids=(0, 0)):
        return Said("", torch.tensor(ids), torch.tensor(scores).log())

    one, two = said([0.6, 0.4], [0.9, 0.1]), said([0.6, 0.4], [0.7, 0.3])
    assert moved(one, two) == pytest.approx(0.2)
    assert moved(one, one) == 0
    parted = said([0.4, 0.6], [0.1, 0.9], ids=(1, 1))
    assert moved(one, parted) == pytest.approx(0.2)  # after the first token that differs, the texts are others
    costs = np.ones((9, 2))
    told = [str(shown("a", "a", costs, 0.0, much).renderables[2]) for much in (0.0, 1e-5, 0.2)]
    assert told[0].startswith("nothing changed; ")
    assert told[1].startswith("the same words, but probabilities moved by less than 0.1%; ")
    assert told[2].startswith("the same words, but probabilities moved by up to 20.0%; ")


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("gpt2", ["--with", "vor"], "no method 'vor' in interventions (did you mean"),
        ("gpt2", ["--with", "var", "--text", "it was"], "GPT2LMHeadModel has none"),
        ("llava", ["--with", "var", "--knob", "q=1"], "no such knob"),
        ("llava", ["--with", "var", "--knob", "rhoo=1"], "did you mean rho?"),
        ("llava", ["--with", "var", "--knob", "p"], "write a name and a value, such as p=0.5"),
        ("llava", ["--with", "var", "--knob", "p=much"], "give a number"),
        ("llava", ["--with", "var", "--knob", "var.p=2"], "p is a share, 0 to 1, not 2.0"),
        ("llava", ["--with", "vhr", "--knob", "heads=2"], "it can be given from Python only"),
        ("gpt2", ["--with", "attention-buckets", "--knob", "times=1,x"], "give a number, or several with commas"),
        ("vit", ["--with", "var", "--image", "PICTURE"], "ViTForImageClassification has none"),
        ("vit", ["--with", "inter", "--image", "PICTURE"], "ViTForImageClassification has none"),
        ("bert", ["--with", "act", "--text", "it was"], "BertForMaskedLM gives logits [1, "),
        ("gpt2", ["--with", "var", "--text", "it", "--out", "here"], "GPT2LMHeadModel does not"),
        ("painter", ["--with", "locatedit", "--text", "a ring"], "name a folder or a page for them with --out"),
        ("painter", ["--with", "locatedit", "--out", "here"], "what --text or --file says, one picture a line"),
        ("painter", ["--with", "locatedit", "--text", "a ring", "--out", "here"], "give two texts or more, not 1"),
        ("painter", ["--with", "var", "--text", "a ring", "--out", "here"], "PixArtTransformer2DModel has none"),
        ("gpt2", ["--with", "var", "--text", " "], "the text is empty"),
        ("gpt2", ["--with", "var", "--text", "it", "--image", "PICTURE"], "reads text only"),
    ],
)
def test_what_steer_cannot_do_it_says(folders, picture, kind, arguments, message):
    done = steer(folders.get(kind, kind), *[picture if a == "PICTURE" else a for a in arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
