"""`regard convert`: what is lost, before and after training; what is saved can be loaded; what cannot be is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import regard
from regard import conversion, mechanisms
from regard.cli import app
from regard.mechanisms.moh import MixtureOfHeads


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("\n".join(f"the king of house {i} spoke to the queen, and she to him." for i in range(60)))
    return path


def test_what_is_lost_and_what_training_brings_back(text, tmp_path):
    out = tmp_path / "moh"
    done = run("reader", "--to", "moh", "--steps", "6", "--data", text, "--out", out, "--knob", "active=0.625")
    assert done.exit_code == 0, done.output
    said = json.loads((out / conversion.ABOUT).read_text())
    measured = said["measured"]
    assert measured["original"]["divergence"] == 0.0
    assert measured["original"]["agreement"] == 1.0
    assert measured["converted"]["divergence"] > measured["original"]["divergence"]
    assert measured["after 6 steps"]["loss"] < measured["converted"]["loss"]
    for lost in measured.values():
        assert f"{lost['loss']:.3f}" in done.output
        assert f"{lost['agreement']:.1%}" in done.output
    assert said["knobs"] == {"active": 0.625}
    assert "regard.mechanisms.moh.convert" in said["load"]

    loaded = conversion.restored(out)
    assert any(isinstance(m, MixtureOfHeads) for m in loaded.model.modules())
    text_again = loaded.processor("the king spoke", return_tensors="pt")["input_ids"]
    plain = regard.load("reader").model
    conversion.convert(plain, "moh", active=0.625)
    assert not torch.equal(loaded.model(text_again).logits, plain(text_again).logits)  # it was trained
    again = run("reader", "--to", "moh", "--out", out)
    assert again.exit_code == 0, again.output  # ours, so it is replaced
    assert json.loads((out / conversion.ABOUT).read_text())["steps"] == 0


def test_numbers_of_what_is_lost_by_hand(text):
    loaded = regard.load("reader")
    of = conversion.items(loaded, text.read_text())
    before = conversion.predicted(loaded.model, of)
    with torch.no_grad():
        loss = float(loaded.model(of.held_out, labels=of.held_out).loss)
    found = conversion.lost(loaded.model, before, of)
    assert found.loss == pytest.approx(loss, rel=1e-4)
    other = before.roll(1, 0)
    expected = float((other.exp() * (other - before)).sum(-1).mean())
    shifted = conversion.lost(loaded.model, other, of)
    assert shifted.divergence == pytest.approx(expected, rel=1e-4)
    assert shifted.agreement == pytest.approx(float((other.argmax(-1) == before.argmax(-1)).float().mean()))
    rows = torch.cat([of.train, of.held_out])
    assert len(of.held_out) == pytest.approx(len(rows) / 10, abs=1)


def test_a_model_of_pictures_is_judged_on_scenes(folders, tmp_path):
    done = run(folders["vit"], "--to", "gated-attention", "--steps", "2", "--out", tmp_path / "gated")
    assert done.exit_code == 0, done.output
    assert "generated scenes" in done.output
    assert "nats a token" not in done.output
    said = json.loads((tmp_path / "gated" / conversion.ABOUT).read_text())
    assert set(said["measured"]) == {"original", "converted", "after 2 steps"}


def test_what_a_mechanism_adds_to_the_loss_is_trained(text, monkeypatch):
    loaded = regard.load("reader")
    model = conversion.convert(copy.deepcopy(loaded.model), "moh")
    of = conversion.items(loaded, text.read_text())
    asked = []
    spec = MixtureOfHeads.declared
    changed = type(spec)(spec.patterns, spec.takes, spec.build, lambda layer: asked.append(layer) or spec.loss(layer))
    monkeypatch.setattr(MixtureOfHeads, "declared", changed)
    conversion.train(model, loaded.model, of, 1, key="moh")
    assert asked == [m for m in model.modules() if isinstance(m, MixtureOfHeads)]


def test_a_conversion_that_runs_the_model_is_given_inputs(monkeypatch, folders, tmp_path):
    seen = []

    def convert(model, inputs, *, gain=1.0):
        seen.append(model(**inputs).logits.shape)
        return lambda: None

    monkeypatch.setattr(conversion, "conversions", lambda: {"ran": convert})
    for name in ("reader", folders["vit"]):
        done = run(name, "--to", "ran", "--knob", "gain=2", "--out", tmp_path / Path(name).name)
        assert done.exit_code == 0, done.output
    assert len(seen) == 4  # each once, and once more as what was saved is loaded
    with pytest.raises(ValueError, match=r"give inputs=regard\.conversion\.example"):
        conversion.convert(regard.load("reader").model, "ran")


def test_weights_that_would_not_come_back_are_not_saved(monkeypatch, tmp_path):
    def convert(model):
        model.lm_head.extra = nn.Parameter(torch.zeros(3))  # in the model here, and not when it is converted again

    made = iter([convert, lambda model: None])
    monkeypatch.setattr(conversion, "conversions", lambda: {"odd": lambda model: next(made)(model)})
    model = conversion.convert(regard.load("reader").model, "odd")
    with pytest.raises(ValueError, match="does not fit reader with odd"):
        conversion.save(model, tmp_path / "odd", name="reader", key="odd", knobs={}, about={})
    assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("reader", "--to", "moba"), "did you mean moh or mega?); there are those to"),
        (("reader", "--to", "mohh"), "did you mean moh"),
        (("reader", "--to", "moh", "--steps", "3"), "give a text with --data"),
        (("reader", "--to", "moh", "--knob", "activ=1"), "did you mean active"),
        (("reader", "--to", "moh", "--knob", "active=0.1"), "there have to be fewer shared ones"),
        (("reader", "--to", "moh", "--knob", "active=half"), "active is float; got 'half'"),
        (("reader", "--to", "moh", "--data", "nowhere.txt"), "--data nowhere.txt: No such file"),
        (("reader", "--to", "routing"), "--knob: give clusters, which has no default"),
        (("reader", "--to", "deconstructed", "--knob", "variant=odd"), "variant is one of"),
        (("viewer", "--to", "moh", "--data", "TEXT"), "looks at pictures"),
        (("painter", "--to", "moh"), "cannot be judged: it is no causal language model"),
        (("reader", "--to", "moh", "--out", "FOLDER"), "holds kept.txt"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(arguments, said, text, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    given = [{"TEXT": text, "FOLDER": tmp_path}.get(argument, argument) for argument in arguments]
    done = run(*given)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_looking_ahead_is_said():
    said = "depends on later tokens too"
    assert said in run("reader", "--to", "routing", "--knob", "clusters=2", "--knob", "window=4").output
    assert said not in run("reader", "--to", "moh").output


def test_conversions_are_those_that_files_declare():
    assert {"moh", "gated_attention"} <= set(mechanisms.conversions())
    assert all(callable(convert) for convert in mechanisms.conversions().values())


def test_a_folder_of_something_else_is_no_converted_model(tmp_path):
    with pytest.raises(ValueError, match="holds no converted model"):
        conversion.restored(tmp_path)
