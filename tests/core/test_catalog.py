"""The catalog is whole, finds what it holds, and computes what it says of itself."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
import tomllib
import types
from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, build
from typer.testing import CliRunner

import regard
from regard import catalog
from regard.cli import app
from regard.recording import spec_of

ROOMS = {
    "statistics": 7,
    "interventions": 22,
    "mechanisms": 55,
    "attribution": 11,
    "evaluation": 6,
    "circuits": 11,
    "gaze": 8,
    "objectives": 8,
    "models": 53,
    "studies": 12,
    "surveys": 5,
}


def run(*arguments):
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})


def test_every_row_is_there_and_whole():
    rows = catalog.rows()
    assert Counter(row.room for row in rows.values()) == ROOMS
    for row in rows.values():
        assert row.title, row.key
        assert row.about, row.key
        assert row.works, row.key
        assert row.expects, row.key
        assert set(row.tags) <= set(catalog.tags()), row.key
        assert row.link == "" or row.link.startswith("https://"), row.key
    written = Counter(link for row in rows.values() if (link := row.link))
    assert max(written.values()) == 1


def test_what_needs_no_model_waits_for_none():
    """Neither `import regard` nor the command's help, lists and completion import torch or transformers."""
    for argument in ("--help", "papers", "papers search sink", "papers show moba", "papers tags", "info"):
        code = (
            "import sys, regard.cli\n"
            "try: regard.cli.app(sys.argv[1:])\n"
            "except SystemExit: pass\n"
            "heavy = {'torch', 'transformers', 'numpy', 'xarray', 'PIL'}\n"
            "print('imported', *heavy & set(sys.modules), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code, *argument.split()], capture_output=True, text=True)
        assert done.stderr == "imported\n", (argument, done.stderr)


def test_rooms_are_attributes():
    code = "import regard\nprint(regard.gaze.compare.__name__, hasattr(regard, 'gazes'), 'record' in dir(regard))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "compare False True\n", done.stderr


def test_shells_complete_names():
    typed = "regard papers show mob"
    environment = {**os.environ, "_REGARD_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": "3"}
    command = [sys.executable, "-c", "from regard.cli import app; app(prog_name='regard')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["moba"]


def test_names_that_are_read_are_names_that_are_there():
    for room in ROOMS:
        there = [name for name in catalog.files(room) if hasattr(import_module(f"regard.{room}.{name}"), name)]
        assert catalog.methods(room) == there
    declared = [name for name in catalog.methods("statistics") if hasattr(catalog.method("statistics", name), "spec")]
    assert catalog.statistics() == declared
    assert len(declared) > 20


def test_mechanisms_are_there_when_transformers_is():
    orders = [
        ("regard", "transformers"),
        ("transformers.modeling_utils", "regard"),
        ("regard.adapters.mechanisms",) * 2,
    ]
    for first, then in [*orders, ("regard.mechanisms._layers",) * 2]:
        code = (
            f"import {first}, {then}\nfrom transformers import AttentionInterface\n"
            "print('regard:power' in AttentionInterface().valid_keys())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "True\n", done.stderr


def test_no_key_stands_twice():
    folder = Path(catalog.__file__).parent / "catalog"
    keys = [key for room in ROOMS for key in tomllib.loads((folder / f"{room}.toml").read_text())]
    assert len(keys) == len(set(keys)) == sum(ROOMS.values())


def test_built_rows_import_and_have_a_claim():
    for row in catalog.rows().values():
        assert bool(row.object) == bool(row.claim), row.key
        assert row.status != "broken", row.key
        if row.claim:
            assert row.scales[0] == "small", row.key
            assert set(row.scales) <= set(catalog.SCALES), row.key


def test_status_is_computed(monkeypatch, tmp_path):
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path))
    monkeypatch.setattr(catalog, "SHIPPED", tmp_path / "nothing.json")
    row = catalog.row("lookback-lens")
    assert dataclasses.replace(row, object="regard.nowhere:nothing").status == "broken"
    built = dataclasses.replace(row, object="regard.statistics.entropy:entropy")
    assert built.status == "built"
    kept = {"holds": False, "measured": "m", "expected": "e", "seed": 0, "seconds": 1.0, "premises": [], "when": 0.0}
    (tmp_path / "claims.json").write_text(json.dumps({"lookback-lens": {"small": kept}}))
    assert built.status == "did not hold"
    (tmp_path / "claims.json").write_text('{"lookback-lens": {"holds": false}}')  # as older versions wrote it
    assert built.status == "built"


def test_a_claim_runs_and_is_remembered(monkeypatch, tmp_path):
    """The machinery of `reproduce`, with a claim of our own: the catalog has none built yet."""
    module = types.ModuleType("a_claim")
    module.claim = lambda *, scale, seed: catalog.Finding(seed > 0, f"{scale} {seed}", "a positive seed", seed)
    monkeypatch.setitem(sys.modules, "a_claim", module)
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path))
    row = catalog.Row("mine", "studies", "t", "", "a", "w", "e", (), "regard.statistics.entropy:entropy", "a_claim")
    monkeypatch.setattr(catalog, "rows", lambda: {"mine": row})
    done = run("reproduce", "mine", "--seed", "3")
    assert done.exit_code == 0
    assert "a positive seed" in done.output
    assert "held" in done.output
    assert row.status == "held"
    assert "did not hold" in run("reproduce", "mine", "--seed", "0").output
    assert row.status == "did not hold"

    def draw(figure):
        figure.subplots().plot([1, 2])

    module.claim = lambda *, scale, seed: catalog.Finding(None, "half", "a whole", seed, draw=draw)
    done = run("reproduce", "mine", "--plot", str(tmp_path / "mine.png"))
    assert "cannot tell" in done.output
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")


def test_a_premise_that_is_not_met_decides(monkeypatch, tmp_path):
    """Whatever the claim says of itself: printed, remembered, and what papers are chosen by."""
    met = catalog.Premise("sinks", "two or more", "3", True)
    unmet = catalog.Premise("the task is learned", "90% right", "12% right", False)
    assert catalog.Finding(True, "m", "e", 0, premises=[met]).holds is True
    assert catalog.Finding(False, "m", "e", 0, premises=[met]).holds is False
    for holds in (True, False, None):
        assert catalog.Finding(holds, "m", "e", 0, premises=[met, unmet]).holds is None

    module = types.ModuleType("a_claim")
    module.SCALES = "small", "real"
    module.claim = lambda *, scale, seed: catalog.Finding(
        True, "m", "e", seed, premises=[met, unmet] if scale == "small" else [met]
    )
    monkeypatch.setitem(sys.modules, "a_claim", module)
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path))
    row = catalog.Row("mine", "studies", "t", "", "a", "w", "e", (), "regard.statistics.entropy:entropy", "a_claim")
    monkeypatch.setattr(catalog, "rows", lambda: {"mine": row})
    done = run("reproduce", "mine")
    assert "cannot tell" in done.output
    assert "12% right (90% right, not met)" in done.output
    assert row.status == "cannot tell"
    assert catalog.remembered("mine", scale="small", seed=0).premises == (met, unmet)
    for words, n in (
        (("--premise", "unmet"), 1),
        (("--premise", "met"), 0),
        (("--verdict", "cannot tell"), 1),
        (("--verdict", "held"), 0),
        (("--parity", "equal"), 0),
    ):
        assert f"{n} papers" in run("papers", *words).output, words
    assert "is none of held" in run("papers", "--verdict", "maybe").output

    assert "held" in run("reproduce", "mine", "--scale", "real").output
    assert row.status == "held"  # the last one
    shown = run("papers", "show", "mine").output
    assert "small" in shown
    assert "real" in shown
    assert shown.count("premise: sinks: 3 (two or more)") == 2
    assert "premise: the task is learned: 12% right (90% right, not met)" in shown
    refused = run("reproduce", "mine", "--scale", "large")
    assert refused.exit_code == 2
    assert "the claim of mine has no scale 'large'; it has small, real" in refused.output


def test_many_claims(monkeypatch, tmp_path):
    """One that breaks does not keep the others from running, and does not go unnoticed."""

    def broken(*, scale, seed):
        raise RuntimeError("no luck")

    rows = {}
    for name, claim in (
        (
            "good",
            lambda *, scale, seed: catalog.Finding(True, "two", "two", seed, draw=lambda figure: figure.subplots()),
        ),
        ("bad", broken),
    ):
        module = types.ModuleType(name)
        module.claim = claim
        monkeypatch.setitem(sys.modules, name, module)
        link = "https://arxiv.org/abs/0"
        rows[name] = catalog.Row(name, "studies", "Title", link, "a", "w", "e", (), "regard.statistics.mass:mass", name)
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path))
    monkeypatch.setattr(catalog, "rows", lambda: rows)
    plots = tmp_path / "plots"
    done = run("reproduce", "--all", "--plot", str(plots))
    assert done.exit_code == 1
    assert "no luck" in done.output
    assert "1 held, 0 did not hold, 0 cannot tell; broke: bad" in done.output
    first = (plots / "good.svg").read_bytes()
    assert run("reproduce", "good", "--plot", str(plots)).exit_code == 0
    assert (plots / "good.svg").read_bytes() == first  # the same picture, the same file
    monkeypatch.setattr(sys.modules["good"], "claim", broken)
    resumed = run("reproduce", "--all", "--resume")
    assert resumed.exit_code == 1
    assert "1 held" in resumed.output  # the good one is remembered
    assert "broke: good, bad" in run("reproduce", "--all").output
    assert run("reproduce", "good", "--all").exit_code == 2
    assert run("reproduce").exit_code == 2
    nothing = run("reproduce", "--all", "--scale", "real")  # no claim has this scale
    assert "0 held" in nothing.output


def test_a_plot_of_many_points_is_pixels(tmp_path):
    def draw(figure):
        left, right = figure.subplots(1, 2)
        left.scatter(range(5000), range(5000))
        right.plot(range(5000), "o")

    catalog.drawn(draw, tmp_path / "many.svg")
    assert (tmp_path / "many.svg").stat().st_size < 60_000


def test_what_ran_here_comes_before_what_was_shipped(monkeypatch, tmp_path):
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "SHIPPED", tmp_path / "found.json")
    made = {scale: catalog.Run(catalog.Finding(True, scale, "e", 0), scale, 1.0) for scale in ("small", "real")}
    (tmp_path / "found.json").write_text(catalog.written({"moba": made}))
    assert catalog.row("moba").status == "held"
    assert catalog.remembered("moba", scale="small", seed=0) is None  # it did not run here
    (tmp_path / "cache").mkdir()
    own = {"small": catalog.Run(catalog.Finding(False, "own", "e", 0), "small", 2.0)}
    (tmp_path / "cache" / "claims.json").write_text(catalog.written({"moba": own}))
    assert [run.finding.measured for run in catalog.row("moba").found] == ["own", "real"]
    assert catalog.row("moba").status == "did not hold"


def test_search():
    assert catalog.search("attention sinks")[0].key in ("sink-survey", "sink-geometry", "secondary-sinks", "act")
    assert catalog.search("Grad-CAM")[0].key == "grad-cam"
    assert "lookback-lens" in [row.key for row in catalog.search("halluc context")]
    assert catalog.search('quo"te AND (') == []
    assert len(catalog.search("")) == 198


def test_an_analysis_is_no_statistic(monkeypatch, tmp_path):
    """Of a folder's files, those whose namesake is declared can be recorded; the others are plain functions."""
    folder = tmp_path / "statistics"
    folder.mkdir()
    (folder / "some_analysis.py").write_text("@cache\ndef some_analysis(tree):\n    return tree\n")
    declared = '@statistic("batch head", title="Some")\ndef some_statistic(call):\n    return None\n'
    (folder / "some_statistic.py").write_text(declared)
    (folder / "other.py").write_text(declared)
    monkeypatch.setattr(catalog, "_HERE", tmp_path)
    catalog.statistics.cache_clear()
    try:
        assert catalog.statistics() == ["some_statistic"]
        assert catalog.methods("statistics") == ["some_analysis", "some_statistic"]
        with pytest.raises(KeyError, match="no statistic 'some_analysis'"):
            catalog.statistic("some_analysis")
    finally:
        catalog.statistics.cache_clear()


def test_commands():
    everything = run("papers")
    assert everything.exit_code == 0
    assert "198 papers" in everything.output
    assert "lookback-lens" in run("papers", "search", "lookback").output
    nothing = run("papers", "search", "zebrafish")
    assert nothing.exit_code == 1
    unknown = run("papers", "show", "perciever")
    assert unknown.exit_code == 2
    assert "did you mean perceiver" in unknown.output
    assert "statistics" in run("info").output


def test_a_row_that_waits_to_be_built(monkeypatch):
    waiting = dataclasses.replace(catalog.row("moba"), key="waiting", object="", claim="")
    known = catalog.rows() | {"waiting": waiting}
    monkeypatch.setattr(catalog, "rows", lambda: known)
    assert waiting.status == "not built"
    shown = run("papers", "show", "waiting")
    assert waiting.link in shown.output
    assert "not built" in shown.output
    claim = run("reproduce", "waiting")
    assert claim.exit_code == 2
    assert "has no claim yet" in claim.output


def test_every_paper_is_built_and_has_a_claim():
    assert [row.key for row in catalog.rows().values() if not (row.object and row.claim)] == []


@pytest.mark.parametrize("name", catalog.statistics())
def test_every_statistic_keeps_the_contract(name):
    """Documented, labelled as it says, the same again, independent of the rest of the batch, and finite.

    NaN only where its docstring says that there may be some, and not everywhere.
    """
    function = catalog.statistic(name)
    spec = spec_of(function)
    assert function.__name__ == name
    assert inspect.getdoc(function)
    parameters = list(inspect.signature(function).parameters.values())
    knobs = parameters if isinstance(function, type) else parameters[1:]  # a class takes the call later
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in knobs)
    defined = 0
    for family in FAMILIES:
        if family == "qwen2_vl":
            continue  # pictures of a batch are packed into one sequence
        model, inputs = build(family)
        with torch.no_grad(), regard.record(model, name) as recording:
            model(**inputs)
            model(**inputs)
            model(**{key: value[:1] for key, value in inputs.items()})
        first, again, alone = recording
        assert first.equals(again), family
        for stack, node in first.children.items():
            found = node[name]
            assert set(found.dims) == {*spec.dims, "layer"}, family
            low, high = spec.limits
            assert found.notnull().all() or "NaN" in function.__doc__, (family, stack)
            defined += int(found.notnull().sum())
            assert not np.isinf(found).any()
            assert not (found < (-np.inf if low is None else low - 1e-6)).any()
            assert not (found > (np.inf if high is None else high + 1e-6)).any()
            other, one = alone[stack][name], found.isel(batch=[0])
            if "role" in found.dims:
                other, one = (d.drop_vars([c for c in d.coords if c != "role"]) for d in (other, one))
            if name == "top_keys":  # ties may fall either way
                continue
            torch.testing.assert_close(
                torch.from_numpy(other.values), torch.from_numpy(one.values), atol=2e-5, rtol=1e-4, equal_nan=True
            )
    assert defined
