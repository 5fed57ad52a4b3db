"""Two groups on the same pictures: means, intervals, the test, and the command."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from regard.cli import app
from regard.gaze import GazeData, GazeTrial, Scanpath, draw, score
from regard.gaze._people import interval, p_value
from regard.gaze.multimatch import multimatch
from regard.gaze.nss import nss
from regard.gaze.score import METRICS, _contrast, _evenly, _regrouped, smooth_map
from regard.gaze.string_edit import string_edit

SIZE = (400, 300)
CHEAP = ("string_edit", "nss")


def trial(who: str, picture: str, places, ms=None) -> GazeTrial:
    path = Scanpath(np.asarray(places, float), SIZE, None if ms is None else np.asarray(ms, float))
    return GazeTrial(who, picture, "", path)


def group(seed: int, people: int, pictures: int = 3, *, name: str = "p", at=None, n: int = 5) -> GazeData:
    """People who look around one place of each picture."""
    rng, of = np.random.default_rng(seed), np.random.default_rng(99)
    places = of.uniform((60, 60), (340, 240), (pictures, 2)) if at is None else np.tile(at, (pictures, 1))
    return GazeData(
        tuple(
            trial(
                f"{name}{i}",
                f"pic{k}",
                np.clip(rng.normal(places[k], 40, (n, 2)), 0, (399, 299)),
                rng.uniform(100, 400, n),
            )
            for i in range(people)
            for k in range(pictures)
        )
    )


def test_means_by_hand():
    """Two people of each group, one picture: every pair is compared, and its metric is the function's own."""
    a, b = group(0, 2, 1), group(1, 2, 1, name="q")
    found = score(a, b, metrics=("string_edit", "multimatch_position", "nss"), resamples=0)
    of = {t.subject: t.scanpath for t in (*a, *b)}
    pairs = [(one, two) for one in ("p0", "p1") for two in ("q0", "q1")]
    assert float(found["between"].sel(metric="string_edit")) == pytest.approx(
        np.mean([string_edit(of[one], of[two]) for one, two in pairs])
    )
    assert float(found["within_a"].sel(metric="multimatch_position")) == pytest.approx(
        np.mean([multimatch(of[i], of[j]).position for i, j in (("p0", "p1"), ("p1", "p0"))])
    )
    sigma = 400 / 24
    assert found.attrs["sigma"] == pytest.approx(sigma)
    assert float(found["between"].sel(metric="nss")) == pytest.approx(
        np.mean([nss(smooth_map([of[one]], sigma), of[two]) for one, two in pairs])
    )
    assert np.isnan(found["other"]).all()  # there is one picture
    assert found.attrs["pairs"] == found.attrs["pairs_possible"] == 12


def test_those_who_look_alike_are_told_from_those_who_do_not():
    a, b = group(0, 5, at=(100, 100)), group(1, 5, at=(300, 200), name="q")
    apart = score(a, b, metrics=CHEAP, resamples=200)
    assert (apart["p"] < 0.02).all()
    assert (apart["within_a"] > apart["between"]).all()
    together = score(group(0, 5), group(1, 5, name="q"), metrics=CHEAP, resamples=200)
    assert (together["p"] > 0.05).all()
    assert (together["between"] > together["other"]).all()
    assert (together["between_low"] < together["between"]).all()
    assert (together["between"] < together["between_high"]).all()


def test_the_permutation_test_keeps_its_level():
    """Two groups of one population: p is below 0.1 about once in ten times, and spread evenly."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        shown = rng.normal(size=(9, 4))  # what each person is like
        alike = -np.linalg.norm(shown[:, None] - shown, axis=-1)[None]
        alike[:, range(9), range(9)] = np.nan
        start, person = np.repeat([0, 1], [4, 5]), np.arange(9)
        chance = np.stack([_contrast(alike, _regrouped(start, person, rng)) for _ in range(99)])
        found.append(float(p_value(_contrast(alike, start), chance)[0]))
    assert 0.05 < np.mean(np.array(found) <= 0.1) < 0.16
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_people_in_both_swap_and_the_others_are_dealt_out():
    group_of, person = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 2, 0, 3, 4])
    rng = np.random.default_rng(0)
    seen = np.array([_regrouped(group_of, person, rng) for _ in range(200)])
    assert (seen[:, 0] + seen[:, 3] == 1).all()  # one person is once in each
    assert (seen[:, [1, 2, 4, 5]].sum(1) == 2).all()
    assert set(map(tuple, seen[:, [1, 2]])) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_intervals_are_those_of_scipy():
    values = np.random.default_rng(0).normal(size=30)
    low, high = interval(lambda w: np.array([w @ values / w.sum()]), 30, 4000, np.random.default_rng(1))
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2))
    assert [low[0], high[0]] == pytest.approx(list(theirs.confidence_interval), abs=0.03)
    assert p_value(np.array([2.0]), np.array([[1.0], [2.0], [3.0]])) == pytest.approx([3 / 4])


def test_pairs_are_drawn_evenly():
    assert _evenly({"a": 10, "b": 2, "c": 10}, 12) == {"b": 2, "a": 5, "c": 5}
    found = score(group(0, 5), group(1, 5, name="q"), metrics=["string_edit"], pairs=12, resamples=0)
    assert found.attrs["pairs"] == 24
    assert found.attrs["pairs_possible"] == 270


def test_one_person_in_both():
    a, b = group(0, 3), group(1, 3)
    with pytest.raises(ValueError, match=r"'p0', 'p1', 'p2' stand in both: say whether"):
        score(a, b)
    same = score(a, a, same_people=True, metrics=["string_edit"], resamples=20)
    assert float(same["between"][0]) < 1  # nobody is compared with himself
    assert float(same["between"][0]) == pytest.approx(float(same["within_a"][0]))
    other = score(a, a, same_people=False, metrics=["string_edit"], resamples=20)
    assert float(other["between"][0]) > float(same["between"][0])


def test_what_is_refused():
    a = group(0, 2)
    with pytest.raises(ValueError, match="no picture is in both: one has 'pic0'"):
        score(a, GazeData((trial("q", "other", [(1, 1)]),)))
    with pytest.raises(ValueError, match="no metric 'edit'"):
        score(a, group(1, 2, name="q"), metrics=["edit"])
    small = GazeData((GazeTrial("q", "pic0", "", Scanpath(np.ones((1, 2)), (10, 10))),))
    with pytest.raises(ValueError, match="'pic0' was shown on screens of"):
        score(a, small)


def test_all_metrics_and_the_picture(tmp_path):
    found = score(group(0, 1, name="model"), group(1, 3), resamples=20)
    assert list(found["metric"].values) == list(METRICS)
    assert np.isfinite(found["between"]).all()
    assert np.isnan(found["within_a"]).all()  # one model has nobody beside it
    draw(found, tmp_path / "score.png")
    assert (tmp_path / "score.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(tmp_path):
    group(0, 3).write(tmp_path / "a.csv")
    group(1, 3, name="q").write(tmp_path / "b.csv")

    def run(*more: str, a: str = "a.csv", b: str = "b.csv"):
        given = ["gaze", "score", str(tmp_path / a), str(tmp_path / b), "--resamples", "20", "--metric", "string_edit"]
        return CliRunner().invoke(app, [*given, *more], env={"COLUMNS": "200"})

    done = run("--screen", "400x300", "--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.svg"))
    assert done.exit_code == 0, done.output
    assert "string_edit" in done.output
    assert "3 pictures are in both" in done.output
    told = json.loads((tmp_path / "s.json").read_text())
    assert told["between"]["axes"] == ["metric"]
    assert 0 < told["between"]["values"][0] < 1
    assert "<svg" in (tmp_path / "s.svg").read_text()[:500]
    same = run("--screen", "400x300", b="a.csv")
    assert same.exit_code == 2
    assert "--same-people or --different-people" in same.output
    assert run("--screen", "400x300", "--same-people", b="a.csv").exit_code == 0
    assert "expected WIDTHxHEIGHT" in run("--screen", "400").output
    assert "--screen" not in run("--screen", "400x300", "--read", "unit=share").output
    assert "there are units" in run("--screen", "400x300", "--read", "unit=share").output


def test_the_command_that_reads(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("who,stimulus,x,y\np,cat,1,2\np,cat,left,3\n")
    given = ["gaze", "read", str(path), "--screen", "40x30", "-c", "subject=who"]
    done = CliRunner().invoke(app, given, env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "line 3, column x: expected a number, got 'left'" in done.output
    out = tmp_path / "b.csv"
    done = CliRunner().invoke(app, [*given, "--keep-going", "--out", str(out)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "subject = 'who'" in done.output
    assert "rows were left out" in done.output
    assert out.read_text().splitlines()[1] == "p,cat,,1.0,2.0"
    again = CliRunner().invoke(app, [*given, "--keep-going", "--out", str(out)], env={"COLUMNS": "200"})
    assert "exists; choose another name" in again.output


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("subject,stimulus,x,y\np,cat,1,2\n", (), "--screen WIDTHxHEIGHT in pixels is needed"),
        ("subject,stimulus,x,y\np,cat,1,\n", ("--screen", "40x30"), "--keep-going leaves such rows out"),
        ("Vp,stimulus,x,y\np,cat,1,2\n", ("--screen", "40x30"), "--column subject=NAME, or --read subject=p1 where"),
        ("subject,Bild,x,y\np,cat,1,2\n", ("--screen", "40x30"), "--column stimulus=NAME, or --read stimulus=cat.jpg"),
        ("subject,stimulus,a,b\np,cat,1,2\n", ("--screen", "40x30"), "say --column x=NAME --column y=NAME"),
        ("p,cat,1,2\np,cat,3,4\n", ("--screen", "40x30"), "The first line has numbers: put names of columns above"),
        ("subject,stimulus,x,y\np,cat,1,2\n", ("--screen", "4x3", "--stimuli", "none"), "--stimuli: none is no folder"),
        (
            "subject,stimulus,x,y\np,cat,1,2\n",
            ("-r", "units=degrees"),
            "--read units=degrees need --screen WIDTHxHEIGHT",
        ),
        (
            "subject,stimulus,x,y\np,cat,91,82\n",
            ("--screen", "4x3"),
            "check --screen, --read units= and --read origin=",
        ),
        ("subject,stimulus,x,y\np,cat,1,2\n", ("--screen", "4x3", "--only", "z=1"), "--only z=...: no such column"),
    ],
)
def test_what_is_wrong_is_told_by_options_of_the_command(tmp_path, text, more, said):
    """At the command line nobody knows the names of Python's arguments."""
    path = tmp_path / "a.csv"
    path.write_text(text)
    done = CliRunner().invoke(app, ["gaze", "read", str(path), *more], env={"COLUMNS": "300"})
    assert done.exit_code == 2
    assert said in done.output
    assert not re.search(r"columns=|keep_going|screen=\(|stimulus_folder", done.output)


def test_two_people_make_one_pair_without_an_interval(tmp_path):
    """Draws of two people are all the same pair: an interval of no width would be no knowledge."""
    one, other = group(0, 2, name="a"), group(1, 3, name="b")
    found = score(one, other, metrics=["scanmatch"], resamples=20)
    assert np.isfinite(found["within_a"]).all()
    assert np.isnan(found["within_a_low"]).all()
    assert np.isnan(found["within_a_high"]).all()
    assert (found["within_b_high"] > found["within_b_low"]).all()
