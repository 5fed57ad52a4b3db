"""`regard steer`: which interventions fit a model; sounds; what its page says, in numbers."""

from __future__ import annotations

import wave
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import regard
from regard import catalog
from regard.cli import app, beside, fits
from regard.cli import steer as work
from regard.cli.inputs import InputError, hear, placed, written
from regard.cli.look import look
from regard.cli.sound import read
from regard.evaluation.word_error import word_error_rate
from regard.interventions import Method
from regard.loading import load
from regard.recording import spec_of


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(work, "ROUNDS", (2, 2))


def steer(*arguments):
    return CliRunner().invoke(app, ["steer", *map(str, arguments)], env={"COLUMNS": "200"})


def words(done) -> str:
    return " ".join(done.output.split())


class Louder(Method):
    """Sharper attention of the decoder to the sound."""

    def inputs(self, call):
        return call.but(query=call.query * 3.0) if call.site.cross else call


class Nothing(Method):
    """Changes nothing."""

    def inputs(self, call):
        return call


class Broken(Method):
    """Cannot even be made."""

    @classmethod
    def fit(cls, model, inputs, processor=None, **knobs):
        raise ZeroDivisionError("by nothing")


@pytest.fixture
def ours(monkeypatch):
    """Methods of this file among those of the catalog."""
    methods, method = catalog.methods, catalog.method
    own = {"louder": Louder, "nothing": Nothing, "broken": Broken}
    monkeypatch.setattr(catalog, "methods", lambda room: [*methods(room), *own])
    monkeypatch.setattr(catalog, "method", lambda room, name: own.get(name) or method(room, name))


@pytest.fixture
def sound(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    with wave.open(str(tmp_path / "noise.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((3000 * rng.normal(size=16000)).astype("<i2").tobytes())
    return tmp_path / "noise.wav"


@pytest.mark.parametrize(
    ("model", "fitting", "others"),
    [
        (
            "describer",
            ["var", "gift", "avisc"],
            {"headhunter": "no attention of theirs", "test-time-registers": "no token's norm is above the threshold"},
        ),
        ("reader", ["hicd", "attention-buckets"], {"var": "LlamaForCausalLM has none", "vti": "LlamaForCausalLM"}),
        (
            "painter",
            ["locatedit"],
            {"act": "act is for language models", "attention-buckets": "has no rotary positions", "vti": "vti is for"},
        ),
        ("listener", [], {"var": "WhisperForConditionalGeneration has none", "act": "has decoder, decoder_cross"}),
        (
            "lookout",  # which is given a picture, and reads no words
            ["test-time-registers"],
            dict.fromkeys(("agla", "inter", "damro", "carve", "dyfo"), "ViTForImageClassification has none"),
        ),
    ],
)
def test_what_fits_a_model_is_listed_and_why_others_do_not(model, fitting, others):
    done = steer(model, "--list", *[part for name in (*fitting, *others) for part in ("--with", name)])
    assert done.exit_code == 0, done.output
    lines = {line.split()[0]: line for line in done.output.splitlines() if line.strip()}
    for name in fitting:
        method = catalog.method("interventions", name.replace("-", "_"))
        assert lines[name].rstrip().endswith("changes what comes")
        assert (method.needs or " - ") in lines[name]
    for name, why in others.items():
        assert why in lines[name]
    assert ("No intervention fits" in done.output) == (not fitting)
    assert "it broke off" not in done.output


def test_a_method_that_breaks_off_or_does_nothing_is_told_and_the_others_go_on(ours):
    found = {one.method: one for one in fits.asked(*_probed("reader"), ["broken", "nothing", "hicd"])}
    assert "it broke off, which it should not: ZeroDivisionError: by nothing" in found["broken"].why
    assert not found["nothing"].why
    assert not found["nothing"].changed
    assert found["hicd"].changed


def _probed(name):
    loaded = load(name)
    return loaded, fits.probe(loaded, name)


def test_all_interventions_are_listed_without_a_model():
    done = steer("--list")
    assert done.exit_code == 0, done.output
    for name in catalog.methods("interventions"):
        assert f"\n{name.replace('_', '-')} " in done.output
    assert "no method 'vor'" in words(steer("--list", "--with", "vor"))


def test_a_method_says_what_it_finds_on_a_model():
    for name in catalog.methods("interventions"):
        method = catalog.method("interventions", name)
        finds = method.fit.__func__ is not Method.fit.__func__
        assert bool(method.needs) == finds, name


def test_long_quotes_in_a_refusal_are_cut():
    assert fits._brief(f"prompts '{'a' * 200}' begin alike") == f"prompts '{'a' * 40} ... {'a' * 15}' begin alike"
    assert fits._brief("it isn't there") == "it isn't there"


def test_a_file_is_read_seen_or_heard_by_its_name():
    nothing = {"file": None, "image": None, "audio": None}
    for name, option in {"a.wav": "audio", "b.PNG": "image", "c.jpg": "image", "d.txt": "file", "e": "file"}.items():
        assert placed(Path(name), nothing) == {**nothing, option: Path(name)}
    assert placed(None, nothing) == nothing
    with pytest.raises(InputError, match=r"a\.wav and --audio b\.wav: give one"):
        placed(Path("a.wav"), {**nothing, "audio": Path("b.wav")})


def test_what_a_listener_writes_is_whole_and_counted_against_the_truth(ours, sound, tmp_path):
    model, processor = loaded = load("listener")
    inputs = hear(loaded, "listener", read(sound), False)
    plain = processor.decode(model.generate(**inputs, max_new_tokens=8)[0], skip_special_tokens=True)
    assert len(plain.split()) > 1
    wrote = written(loaded, inputs, 8)
    ends = [*model.generate(**inputs, max_new_tokens=8)[0].tolist(), model.generation_config.eos_token_id]
    assert wrote.ids[wrote.start :].tolist() == ends
    seen = look("listener", audio=sound, generate=8, out=tmp_path / "look")
    assert seen.said == plain
    with regard.intervene(model, Louder()):
        louder = processor.decode(model.generate(**inputs, max_new_tokens=8)[0], skip_special_tokens=True)
    arguments = ["listener", sound, "--with", "louder", "--truth", plain, "--generate", 8]
    done = steer(*arguments, "--out", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    rate = word_error_rate(plain, louder)
    assert f"words that are wrong: 0% before, {rate:.0%} after" in words(done)
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "What it says" in page
    assert f"words that are wrong: 0% before, {rate:.0%} after" in page
    refused = steer("listener", sound, "--with", "var")
    assert refused.exit_code == 2
    assert "WhisperForConditionalGeneration has none" in words(refused)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reader"], "name an intervention with --with; --list says which fit"),
        ([], "name a model, such as describer; or --list"),
        (["reader", "--with", "act", "--text", "it", "--truth", "it"], "--truth is what is said in a sound"),
        (["reader", "--with", "act", "--text", "it", "--out", "folder"], "--out is a page, such as page.html"),
        (["reader", "SOUND", "--with", "act"], "LlamaForCausalLM takes input_ids, and no sound"),
        (["painter", "SOUND", "--with", "locatedit", "--out", "a.html"], "--audio: PixArtTransformer2DModel paints"),
        (["reader", "SOUND", "--audio", "a.wav", "--with", "act"], "give one of them"),
        (["reader", "--with", "act", "--text", "it", "--out", "page.html"], "page.html exists and is not"),
    ],
)
def test_what_steer_is_given_wrongly_it_says(sound, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.html").write_text("mine")
    done = steer(*[sound if one == "SOUND" else one for one in arguments])
    assert done.exit_code == 2, done.output
    assert message in words(done)
    assert (tmp_path / "page.html").read_text() == "mine"


def said(ids, *rows) -> beside.Said:
    return beside.Said("", torch.tensor(ids), torch.tensor(rows).log())


def test_a_step_is_the_first_that_differs_or_else_the_one_that_moves_most():
    processor = load("reader").processor
    before = said([3, 4, 5], [0.0, 0.0, 0.0, 1.0, 0.0, 0.0], [0.1, 0.0, 0.0, 0.2, 0.7, 0.0], [0.0] * 5 + [1.0])
    after = said([3, 0, 1], [0.0, 0.0, 0.0, 1.0, 0.0, 0.0], [0.8, 0.0, 0.0, 0.2, 0.0, 0.0], [0.0, 1.0] + [0.0] * 4)
    found = beside.step(before, after, processor)
    assert (found.at, found.changed) == (1, True)
    assert found.before == processor.decode([3], skip_special_tokens=True)
    assert [row[1:] for row in found.rows] == [pytest.approx(x) for x in ((0.7, 0.0), (0.2, 0.2), (0.1, 0.8))]
    same = beside.step(before, said([3, 4], [0.0, 0.0, 0.0, 0.6, 0.4, 0.0], [0.1, 0.0, 0.0, 0.3, 0.6, 0.0]), processor)
    assert (same.at, same.changed) == (0, False)


def test_heads_are_compared_on_the_tokens_that_are_said_without():
    loaded = load("reader")
    inputs = dict(loaded.processor("The king spoke to the queen", return_tensors="pt"))
    plain = work._said(loaded, inputs, 6, lambda: regard.intervene(loaded.model))

    class Flat:
        def inputs(self, call):
            return call.but(query=call.query * 0.0)

    def again(*changes):
        around = lambda: regard.intervene(loaded.model, *changes)  # noqa: E731
        return work._said(loaded, inputs, 6, around, **work._forced(plain))

    assert torch.equal(again(Flat()).ids, plain.ids)
    both = [beside.heads(loaded, partial(again, *some))["language_model"] for some in ((), (Flat(),))]
    whole = torch.cat([inputs["input_ids"], plain.ids[None, :-1]], 1)
    with torch.no_grad(), regard.record(loaded.model, "entropy") as recording:
        loaded.model(whole)
    oracle = recording.tree["language_model"]["entropy"].mean(["batch", "query"])
    np.testing.assert_allclose(both[0]["entropy"].values, oracle.values, atol=1e-4)
    even = np.log(np.arange(1, whole.shape[1] + 1)).mean()  # each query over all that it sees
    np.testing.assert_allclose(both[1]["entropy"].values, np.full_like(oracle, even), atol=1e-4)
    changed = {one["name"]: one for one in beside._variables(*both)}
    np.testing.assert_allclose(changed["entropy"]["after"], even, rtol=1e-3)
    np.testing.assert_allclose(changed["entropy"]["before"], oracle.values, rtol=1e-3, atol=1e-3)
    assert not beside._variables(both[0], both[0])
    assert "top_keys" not in both[0]
    assert all("rank" not in spec_of(catalog.statistic(name)).dims for name in both[0].data_vars)
