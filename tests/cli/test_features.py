"""`regard features`: an autoencoder trained as a text streams by, beside one that is untrained, and its page."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from regard import zoo
from regard.circuits.attention_sae import AttentionSAE, Recovered, density, head_outputs
from regard.cli import app, features
from regard.data import paragraph, prompts

QUICK = ("--layer", 1, "--features", 48, "--steps", 24, "--length", 24, "--shown", 5)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sentences of which no two rows are alike."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join([paragraph(), *(prompt.text for prompt in prompts.ioi(300, seed=1))]))
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["features", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def made(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("features")
    result = run("reader", text, *QUICK, "--out", out)
    assert result.exit_code == 0, result.output
    return out, json.loads((out / "features.json").read_text()), result.output


def test_trained_beside_untrained_on_a_text_held_out(made, text):
    out, told, said = made
    trained, blank = told["trained"], told["untrained"]
    assert trained["explained"] > blank["explained"] + 0.3
    assert trained["recovered"] > blank["recovered"]
    assert trained["loss"]["whole"] == blank["loss"]["whole"] < trained["loss"]["coded"]
    assert trained["loss"]["without"] == blank["loss"]["without"]  # the layer's outputs are nothing then
    share = (trained["loss"]["without"] - trained["loss"]["coded"]) / (
        trained["loss"]["without"] - trained["loss"]["whole"]
    )
    assert trained["recovered"] == pytest.approx(share)
    assert trained["dead"] == sum(rate == 0 for rate in told["rate"])
    assert sum(told["rate"]) == pytest.approx(trained["active"], abs=1e-3)
    assert (told["steps"], told["tokens"]["learned"]) == (24, 24 * 256)
    for number in (f"{trained['recovered']:.1%}", f"{blank['explained']:.1%}", f"{trained['dead']} of 48"):
        assert number in said


def test_the_same_seed_gives_the_same(made, text, tmp_path):
    _, told, _ = made
    assert run("reader", text, *QUICK, "--out", tmp_path).exit_code == 0
    assert json.loads((tmp_path / "features.json").read_text()) == told


def test_what_is_saved_is_what_was_measured(made, text):
    """The folder's autoencoder has the same numbers on the same rows."""
    out, told, _ = made
    sae = AttentionSAE.load(out / "sae")
    model, tokenizer = zoo.load("reader")
    rows = features._rows(iter(text.read_text().splitlines()), tokenizer, 24, 24 * 256 // 24 + features.HELD, "")
    held = [{"input_ids": torch.stack(rows.held)}]
    found = density(sae, head_outputs(model, held, 1))
    assert found.attrs["explained"] == pytest.approx(told["trained"]["explained"], abs=1e-4)
    assert found.attrs["dead"] == told["trained"]["dead"]
    assert torch.allclose(sae.head_attribution(8), torch.tensor(told["heads"]), atol=1e-3)


def test_exemplars_are_strongest_first_and_where_the_feature_fires(made):
    out, told, _ = made
    assert 2 <= len(told["exemplars"]) <= 5
    page = (out / "features.html").read_text()
    for feature, places in told["exemplars"].items():
        best = [place["values"][place["at"]] for place in places]
        assert best == sorted(best, reverse=True)
        assert min(best) > 0
        assert all(value == max(place["values"]) for value, place in zip(best, places))
        assert f"feature {feature}<" in page
    assert len(re.findall("<b ", page)) == sum(map(len, told["exemplars"].values()))
    assert not re.search(r'(?:src|href)="', page)


def test_rows_held_out_are_not_learned_from(text):
    _, tokenizer = zoo.load("reader")
    rows = features._rows(iter(text.read_text().splitlines()), tokenizer, 24, 160, "")
    assert len(rows.held) == 20
    assert len(rows.learned) == 140
    assert not {tuple(row.tolist()) for row in rows.held} & {tuple(row.tolist()) for row in rows.learned}
    assert all(len(row) == 24 and row[0] == tokenizer.bos_token_id for row in (*rows.held, *rows.learned))
    assert all((row[1:] != tokenizer.bos_token_id).all() for row in rows.learned)


def test_a_model_that_does_not_write_has_no_loss(text, tmp_path):
    result = run("namer", text, "--layer", 0, "--features", 16, "--steps", 4, "--length", 24, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "writes no text" in result.output
    assert "loss" not in json.loads((tmp_path / "features.json").read_text())["trained"]


def test_nothing_is_recovered_of_a_layer_that_brings_nothing():
    """A share of next to nothing is any number."""

    def of(without: float) -> features.Measured:
        return features.Measured(np.ones(3), 3.0, 0, 0.5, Recovered(3.0, 3.5, without))

    assert of(4.0).share == pytest.approx(0.5)
    for without in (3.01, 2.0):
        assert of(without).share is None
        both = {"trained": of(without), "untrained": of(without)}
        assert ("loss recovered", "-", "-") in features._cells(both)
        assert "brings nothing" in features._notes(both, 100)[1]
        assert features._plain(of(without))["recovered"] is None


@pytest.mark.parametrize(
    ("model", "more", "said"),
    [
        ("reader", ("--layer", 99), "there are 0, 1, 2, 3, 4, 5"),
        ("reader", ("--length", 4000), "rows of"),
        ("viewer", (), "reads no text"),
        ("listener", (), "reads no text"),
    ],
)
def test_refusals(text, tmp_path, model, more, said):
    result = run(model, text, *QUICK, *more, "--out", tmp_path)
    assert result.exit_code == 2
    assert said in result.output
    assert not [*tmp_path.iterdir()]


def test_short_texts_and_missing_files(tmp_path):
    (tmp_path / "short.txt").write_text("a word\n")
    result = run("reader", tmp_path / "short.txt", *QUICK, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "8 are needed: give more text" in result.output
    assert "no such file" in run("reader", tmp_path / "none.txt", *QUICK, "--out", tmp_path / "out").output
