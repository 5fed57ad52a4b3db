"""The hallucination bench: any method, the same questions, kept as it goes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import regard
from regard.interventions._picture import Redrawn
from regard.zoo.recipes import describer


@pytest.fixture(scope="module")
def loaded():
    return regard.load("describer")


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[2] / "bench" / "hallucination.py"
    spec = importlib.util.spec_from_file_location("hallucination_bench", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def only(word):
    """A logits processor that leaves one word, bound as methods are."""

    def fit(model, inputs):
        def leave(ids, scores):
            assert torch.equal(ids[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
            kept = torch.full_like(scores, -torch.inf)
            kept[:, describer.WORD[word]] = 0
            return kept

        return leave

    return fit


class Mute:
    """An intervention: no layer adds anything."""

    def hidden(self, site, hidden):
        return hidden * 0


def test_what_is_measured_is_what_was_said_under_the_method(loaded):
    yes, no = (describer.invents(*loaded, "countered_veiled", n=4, method=only(word)) for word in ("yes", "no"))
    for kind in describer.NEGATIVES:
        assert (yes["pope"][kind]["accuracy"], yes["pope"][kind]["yes_rate"]) == (0.5, 1)
        assert (no["pope"][kind]["accuracy"], no["pope"][kind]["yes_rate"]) == (0.5, 0)
    assert yes["tempted"]["partner_yes"] == 1
    assert no["tempted"]["partner_yes"] == 0
    named = describer.invents(*loaded, "countered", n=4, method=only("fork"))["chair"]
    forks = sum(bool(scene.find("fork")) for scene in describer.tempting(4, countered=True))
    assert named["chair_s"] == 1 - forks / 4
    with pytest.raises(ValueError, match="biased_veiled"):
        describer.invents(*loaded, "foggy")


def test_an_intervention_is_open_while_it_answers_and_no_longer(loaded):
    model, processor = loaded
    images = describer.pictures(describer.tempting(2))
    plain = describer.reply(model, processor, images, ["describe"] * 2, length=6)
    muted = describer.reply(model, processor, images, ["describe"] * 2, length=6, method=lambda model, inputs: Mute())
    assert muted[0] == muted[1] != plain[0]
    assert describer.reply(model, processor, images, ["describe"] * 2, length=6) == plain


def test_pace_is_of_the_method_and_of_greedy(loaded):
    found = describer.pace(*loaded, only("fork"), n=1, words=2, turns=1)
    assert set(found) == {"method", "greedy", "fit"}
    assert min(found["method"], found["greedy"]) > 0


def test_a_model_that_says_one_word_is_right_where_that_is_the_answer(bench):
    found = {word: bench.answered("describer", "polls", 4, 1, only(word)) for word in ("yes", "no")}
    for word, figures in found.items():
        assert sum(figures["right"]) == len(figures["right"]) / 2
        assert set(figures["yes"]) == {float(word == "yes")}
    assert [a + b for a, b in zip(*(figures["right"] for figures in found.values()))] == [1.0] * len(figures["right"])
    red = bench.answered("describer", "crowded", 4, 1, only("red"))["right"]
    assert red == [float(a.answer == "red") for a in bench.shown("describer", "crowded", 4, 1).colours()]


def test_sampling_is_seeded_and_is_not_greedy(bench):
    once, again = (bench.answered("describer", "sampled", 12, 1, None) for _ in range(2))
    assert once == again
    assert once != bench.answered("describer", "captions", 12, 1, None)


def test_the_bench_goes_on_where_it_stopped_and_writes_one_page(bench, tmp_path, monkeypatch, capsys):
    def run():
        arguments = ["--scenes", "2", "--seed", "1", "--state", str(tmp_path), "--only", "avisc"]
        monkeypatch.setattr("sys.argv", ["hallucination.py", *arguments, "--models", "describer"])
        bench.main()
        return capsys.readouterr().out

    monkeypatch.setattr(bench.oracles, "FAMILIES", {"attention": bench.oracles.attention})
    assert run().count("describer, avisc: ") == 9
    kept = tmp_path / "describer-avisc-2-1.json"
    figures = json.loads(kept.read_text())
    measured = figures.pop("polls")
    figures["crowded"]["right"] = [1.0, 0.0]
    kept.write_text(json.dumps(figures))
    (tmp_path / "describer-var-2-1.json").write_text(json.dumps({"unfit": "var does not fit"}))
    text = run()
    assert text.count("avisc: ") == 1
    assert json.loads(kept.read_text())["polls"] == measured
    assert "| `avisc` | contrasts | 50.0% (" in text
    assert "| attention | " in text
    hit, chance = torch.tensor(figures["aim"]["tiny"]).T
    assert f"| {hit.mean():.1%} ({100 * (hit - chance).mean():+.1f} ± " in text
    assert "- `var`: var does not fit" in text
    monkeypatch.setattr("sys.argv", ["hallucination.py", "--only", "aviscc"])
    with pytest.raises(SystemExit):
        bench.main()


class Pointed(Redrawn):
    def __init__(self, kept):
        self.kept = [kept]


def test_a_method_that_points_at_the_object_hits_it(bench):
    scenes = bench.shown("describer", "crowded", 4, 1)
    asked = iter(scenes.colours())
    right = bench.aim(scenes, "own", lambda model, inputs: Pointed(scenes.patches(next(asked)).view(8, 8).float()))
    assert [hit for hit, _ in right] == [1.0] * len(right)
    even = bench.aim(scenes, "own", lambda model, inputs: Pointed(torch.ones(64, 64)))
    assert [hit for hit, _ in even] == pytest.approx([chance for _, chance in even])
    assert bench.aim(scenes, "own", lambda model, inputs: Mute()) is None
