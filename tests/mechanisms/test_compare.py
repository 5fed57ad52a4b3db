"""Comparisons: who fits, equal models, numbers that are those of the file, resuming, frontiers, what is declared."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from regard import mechanisms
from regard.compare import SCALES, TASKS, Result, candidates, compare, frontier
from regard.compare.candidates import Candidate, candidate, chosen
from regard.compare.result import HEAD
from regard.compare.training import LeftOut, data_of, held, in_turn, model, step_of, train
from regard.mechanisms import Cost, mechanism, module
from regard.mechanisms.moba import moba

TINY = SCALES["tiny"]
GENERATED = [name for name, task in TASKS.items() if task.folder is None]


@pytest.fixture
def quickly(monkeypatch):
    """Runs that are made up: quality depends on mechanism and seed. The list of those that were made."""
    made = []

    def run(way, task, seed, scale):
        made.append((task.name, way.key, seed))
        quality = {"softmax": 0.5, "none": 0.1}.get(way.key, 0.4) + 0.1 * seed
        return {
            "quality": quality,
            "per_second": 1000.0 + seed,
            "time": {"softmax": 1.0, "none": 0.5}.get(way.key, 0.8),
            "peak_mb": 1.5,
            "parameters": 100,
            "state": 7,
            "exact": False,
            "seconds": 0.1,
        }

    monkeypatch.setattr(importlib.import_module("regard.compare.run"), "run", run)
    return made


# ------------------------------------------------------------------------------------------------------------- who fits


def test_every_declared_mechanism_is_a_candidate():
    every = candidates()
    assert list(every)[:2] == ["softmax", "none"]
    declared = {**mechanisms.operators(), **mechanisms.modules()}
    assert {name.replace("_", "-") for name in declared} == set(every) - {"softmax", "none"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("key", candidates())
def test_layers_give_what_they_take_and_see_no_later_token(key, task):
    """Of each mechanism that fits a task, at its lengths, with as many parameters as softmax attention."""
    way, task = candidates()[key], TASKS[task]
    if way.unfit(task) or task.folder is not None:
        return
    data = data_of(task, 0)
    torch.manual_seed(0)
    net, peer = (model(some, task, data, TINY) for some in (way, candidates()["softmax"]))
    sizes = [sum(p.numel() for p in some.parameters()) for some in (net, peer)]
    held, whole = (sum(p.numel() for p in part.parameters()) for part in (net.get_submodule("1.mixing"), peer[1]))
    if held < whole - 4 * TINY.dim:  # otherwise it has more than all of a layer: said in the table
        assert abs(sizes[0] - sizes[1]) <= TINY.layers * (TINY.dim + 1)  # half a channel of each feed-forward layer
    if key == "none":
        return
    mixing = net.get_submodule("1.mixing")
    hidden = torch.randn(2, math.prod(data.shape), TINY.dim)
    mixing.eval()
    with torch.no_grad():
        before = mixing(hidden)
        assert before.shape == hidden.shape
        if task.pattern == "causal":
            hidden[:, 40:] += 1.0
            torch.testing.assert_close(mixing(hidden)[:, :40], before[:, :40], atol=1e-5, rtol=1e-5)


def test_why_one_does_not_fit():
    every = candidates()
    assert every["moba"].unfit(TASKS["recall"]) is None
    assert every["moba"].unfit(TASKS["classify"]) == "is causal only"
    assert "is not causal" in every["efficient-attention"].unfit(TASKS["recall"])
    conv = Candidate("conv", ("full",), "map", nn.Identity)
    assert conv.unfit(TASKS["classify"]) is None
    flat = Candidate("flat", ("causal",), "map", nn.Identity)
    assert "feature map" in flat.unfit(TASKS["recall"])
    part = candidate("part", _declared("full")(_parted))
    assert part.needs == ("parts",)
    assert "needs parts" in part.unfit(TASKS["classify"])


def _parted(query, key, value, *, parts, causal=False, mask=None, scale=None):
    return value


def _declared(*patterns, **more):
    return mechanism(*patterns, mask="keys", weights=lambda *a, **k: None, cost=lambda *a, **k: Cost(0, 0), **more)


# ----------------------------------------------------------------------------------------------------- what is declared


def test_one_that_looks_ahead_predicts_nothing():
    assert "by later tokens" in candidates()["routing"].unfit(TASKS["passkey"])
    assert candidates()["routing"].unfit(TASKS["classify"]) is None


def test_a_module_is_built_from_what_it_names():
    @module("full", takes="map")
    class Conv(nn.Module):
        def __init__(self, channels, *, shape, tokens):
            super().__init__()
            self.conv, self.shape = nn.Conv2d(channels, channels, 3, padding=1), shape
            assert tokens == 12

        def forward(self, x):
            assert x.shape[2:] == self.shape
            return self.conv(x)

    @module("causal", "full", takes="heads", held=lambda n, dim, heads: n * heads)
    class Mix(nn.Module):
        def __init__(self, *, head_dim):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(head_dim))

        def forward(self, query, key, value, *, causal, **_):
            assert causal is False
            return self.scale * value, "something beside"

    torch.manual_seed(0)
    x = torch.randn(2, 12, 8)
    settings = {"causal": False, "shape": (3, 4)}
    conv = candidate("conv", Conv).layer(8, 2, **settings)
    assert conv.inner.shape == (3, 4)
    right = conv.inner.conv(x.mT.reshape(2, 8, 3, 4)).reshape(2, 8, 12).mT
    torch.testing.assert_close(conv(x), right)
    mix = candidate("mix", Mix).layer(8, 2, **settings)
    assert mix.inner.scale.shape == (4,)
    torch.testing.assert_close(mix(x), mix.output(mix.parts(x)[..., 16:]))  # values: the last third
    with pytest.raises(ValueError, match="takes is one of"):
        module("full", takes="pixels")
    with pytest.raises(TypeError, match="is neither an operator declared"):
        candidate("plain", nn.Linear)


def test_knobs_that_were_given_stand_and_short_inputs_get_their_own():
    assert candidate("moba", moba).layer(8, 2, causal=True, shape=(64,)).told == {"causal": True, "block": 8}
    given = candidate("moba", partial(moba, block=16)).layer(8, 2, causal=True, shape=(64,))
    assert given.told == {"causal": True}
    plain, usual = (candidates()[k].layer(8, 2, causal=True, shape=(64,)) for k in ("moba", "softmax"))
    x = [torch.randn(1, 2, 64, 4) for _ in range(3)]
    dense = usual.inner(*x, causal=True)
    assert torch.allclose(moba(*x, causal=True), dense, atol=1e-5)  # the paper's blocks hold all of it
    assert not torch.allclose(plain.inner(*x, **plain.told), dense, atol=1e-2)


def test_state_held_at_decoding():
    task, found = TASKS["passkey"], {}
    data = data_of(task, 0)
    for key in ("softmax", "none", "lightning-2", "aaren", "moh"):
        way = candidates()[key]
        found[key] = held(way, model(way, task, data, TINY), task, data, TINY)
    n, dim, heads = 64, TINY.dim, TINY.heads
    assert found["softmax"] == found["moh"] == 2 * n * dim  # keys and values
    assert found["none"] == 0
    assert found["lightning-2"] == dim * dim / heads  # a matrix a head
    assert found["aaren"] == heads * (2 + dim / heads)
    way = candidates()["softmax"]
    assert (
        held(way, model(way, TASKS["classify"], data_of(TASKS["classify"], 0), TINY), TASKS["classify"], data, TINY)
        is None
    )


def test_a_loss_of_its_own_is_trained():
    """Its mean over layers is added: of a sum of squares, the gradient is twice the weights over the layers."""

    @module("causal", loss=lambda layer: layer.weight.square().sum())
    class Pushed(nn.Linear):
        def __init__(self, dim):
            super().__init__(dim, dim)

    way, task = candidate("pushed", Pushed), TASKS["passkey"]
    net, found = model(way, task, data_of(task, 0), TINY), []
    weight = net.get_submodule("1.mixing.inner").weight
    for some in (way, replace(way, loss=None)):
        net.zero_grad()
        step_of(net, some, data_of(task, 0))(0)
        found.append(weight.grad.clone())
    torch.testing.assert_close(found[0] - found[1], 2 * weight.detach() / TINY.layers)


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_real_run_of_each_kind():
    found = compare(["lightning-2", "moh"], tasks=["passkey", "localise"], scale="tiny", seeds=1)
    rows = {row.mechanism: row for row in found.rows("passkey")}
    assert set(rows) == {"softmax", "none", "lightning-2", "moh"}
    assert {row.mechanism for row in found.rows("localise")} == {"softmax", "none", "moh"}
    assert found.left_out("localise") == {"lightning-2": "is causal only"}
    assert rows["softmax"].exact
    assert not rows["lightning-2"].exact
    assert all(0 <= row.quality.value <= 1 and row.speed.value > 0 and row.peak_mb > 0 for row in rows.values())
    again = compare(["moh"], tasks=["passkey"], scale="tiny", seeds=1)
    assert {r["mechanism"]: r["quality"] for r in again.runs}["moh"] == rows["moh"].quality.value  # seeded


def test_softmax_learns_what_no_attention_cannot():
    """Where the floor is: a model without attention does no better than chance."""
    task, scale = TASKS["passkey"], SCALES["small"]
    data, found = data_of(task, 1), {}
    for key in ("softmax", "none"):
        torch.manual_seed(0)
        net = model(candidates()[key], task, data, scale)
        train(net, candidates()[key], data, 120, 60.0)
        with torch.no_grad():
            found[key] = float(data.quality(net(data.held_out[0]), data.held_out[1]))
    assert found["none"] < 0.2
    assert found["softmax"] > found["none"] + 0.2


def test_what_breaks_or_takes_too_long_is_left_out_and_says_why():
    @_declared("causal")
    def broken(query, key, value, *, causal=True, mask=None, scale=None):
        raise RuntimeError("no such luck")

    found = compare([], tasks=["passkey"], also={"broken": broken}, scale="tiny", seeds=1)
    assert "broke: RuntimeError: no such luck" in found.left_out("passkey")["broken"]
    way, task = candidates()["softmax"], TASKS["passkey"]
    data = data_of(task, 0)
    with pytest.raises(LeftOut, match="more than 0"):
        train(model(way, task, data, TINY), way, data, 5, 1e-9)


def test_more_parameters_than_a_layer_has_are_said():
    @module("causal", build=lambda dim: Large(dim, 1000))
    class Large(nn.Linear):
        pass

    task, ways = TASKS["passkey"], (candidate("large", Large), candidates()["softmax"])
    nets = [model(way, task, data_of(task, 0), TINY) for way in ways]
    large, usual = (sum(p.numel() for p in net.parameters()) for net in nets)
    assert large > 2 * 33_000 > usual
    runs = [run_of("softmax", 0, 0.5) | {"parameters": usual}, run_of("large", 0, 0.5) | {"parameters": large}]
    cells = {row.mechanism: row.cells()[6] for row in Result("tiny", runs).rows("recall")}
    assert cells == {"softmax": f"{usual:,}", "large": f"{large:,} ({large / usual - 1:+.0%})"}


def test_training_that_diverges_has_no_quality():
    @_declared("causal")
    def wild(query, key, value, *, causal=True, mask=None, scale=None):
        return value / 0.0

    found = compare([], tasks=["passkey"], also={"wild": wild}, scale="tiny", seeds=2)
    row = next(row for row in found.rows("passkey") if row.mechanism == "wild")
    assert (row.diverged, row.seeds) == (2, 2)
    assert math.isnan(row.quality.value)
    assert row.cells()[1] == "-, diverged 2 of 2"
    assert found.rows("passkey")[-1] == row  # after all that have a quality


def test_turns_are_taken_and_the_first_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(importlib.import_module("regard.compare.training").time, "process_time", lambda: now[0])
    took = {"own": iter([100.0, 2.0, 3.0, 4.0]), "peer": iter([100.0, 1.0, 1.0, 7.0])}
    order = []

    def runs(name):
        def run():
            order.append(name)
            now[0] += next(took[name])

        return run

    assert in_turn(runs("own"), runs("peer"), 3) == (3.0, 1.0)
    assert order == ["peer", "own", "own", "peer", "peer", "own", "own", "peer"]


# ------------------------------------------------------------------------------------------------------------- resuming


def test_resuming_runs_only_what_is_missing(quickly, tmp_path):
    out = tmp_path / "out.json"
    settings = {"tasks": ["passkey"], "scale": "tiny", "seeds": 2, "out": out}

    def stop(progress):
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(["power"], progress=stop, **settings)
    assert not out.exists()
    assert len(quickly) == 3
    told = []
    compare(["power"], progress=lambda p: told.append((p.done, p.resumed, p.total)), **settings)
    assert told[0] == (3, 3, 6)
    assert len(quickly) == len(set(quickly)) == 6
    assert not (tmp_path / "out.json.state").exists()
    whole = out.read_text()
    compare(["power"], **settings)
    assert len(quickly) == 6  # all of it is in the file
    assert json.loads(out.read_text())["runs"] == json.loads(whole)["runs"]
    more = compare(["moba"], **settings)
    assert len(quickly) == 8  # softmax attention and none are known
    assert {row.mechanism for row in more.rows("passkey")} == {"softmax", "none", "power", "moba"}
    with pytest.raises(ValueError, match="choose another name"):
        compare(["moba"], **{**settings, "scale": "small"})


def test_what_was_stopped_is_kept_while_another_task_is_finished(quickly, tmp_path):
    out = tmp_path / "out.json"
    settings = {"scale": "tiny", "seeds": 1, "out": out}

    def stop(progress):
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(["power"], tasks=["recall"], progress=stop, **settings)
    other = compare(["power"], tasks=["passkey"], **settings)
    assert other.tasks() == ["passkey"]
    told = []
    compare(["power"], tasks=["recall"], progress=lambda p: told.append(p.resumed), **settings)
    assert told[0] == 2
    assert len(quickly) == len(set(quickly)) == 6
    assert not (tmp_path / "out.json.state").exists()
    assert Result.load(out).tasks() == ["recall", "passkey"]


def test_a_torn_journal_costs_one_run(quickly, tmp_path):
    out = tmp_path / "out.json"

    def stop(progress):
        if progress.done == 2:
            raise KeyboardInterrupt

    settings = {"tasks": ["passkey"], "scale": "tiny", "seeds": 1, "out": out}
    with pytest.raises(KeyboardInterrupt):
        compare(["power"], progress=stop, **settings)
    journal = tmp_path / "out.json.state" / "journal.0"
    journal.write_bytes(journal.read_bytes()[:-5])
    told = []
    compare(["power"], progress=lambda p: told.append((p.done, p.cut)), **settings)
    assert told[0][0] == 1
    assert told[0][1] > 0
    assert len(quickly) == 4


def test_other_code_is_run_again(quickly, tmp_path, monkeypatch):
    settings = {"tasks": ["passkey"], "scale": "tiny", "seeds": 1, "out": tmp_path / "out.json"}
    compare(["power"], **settings)
    monkeypatch.setattr(importlib.import_module("regard.compare.candidates"), "_code", lambda thing: "other")
    compare(["power"], **settings)
    assert quickly[3:] == [("passkey", "softmax", 0), ("passkey", "power", 0)]  # no attention has no code


def test_a_file_of_someone_else_is_left_alone(quickly, tmp_path):
    out = tmp_path / "out.json"
    out.write_text("{}")
    with pytest.raises(FileExistsError, match="choose another name"):
        compare(["power"], tasks=["passkey"], scale="tiny", seeds=1, out=out)
    assert out.read_text() == "{}"
    assert not quickly


# -------------------------------------------------------------------------------------------------------------- results


def run_of(key, seed, quality, time=1.0):
    measured = {"per_second": 100.0, "time": time, "peak_mb": 2.0, "parameters": 5, "state": None, "exact": False}
    return {"task": "recall", "mechanism": key, "seed": seed, "code": "", "quality": quality, **measured}


def test_standard_errors_of_a_hand_made_result():
    """0.2, 0.4, 0.9: mean 0.5, deviation sqrt(0.13), error sqrt(0.13 / 3). Differences -0.1, -0.1, +0.2 are paired."""
    runs = [run_of("softmax", s, q) for s, q in enumerate((0.3, 0.5, 0.7))]
    runs += [run_of("power", s, q, 2.0) for s, q in enumerate((0.2, 0.4, 0.9))]
    rows = {row.mechanism: row for row in Result("tiny", runs).rows("recall")}
    power = rows["power"]
    assert power.quality.value == pytest.approx(0.5)
    assert power.quality.error == pytest.approx(math.sqrt(0.13 / 3))
    assert power.over.value == pytest.approx(0.0)
    assert power.over.error == pytest.approx(math.sqrt(0.03 / 3))
    assert power.speed == (0.5, 0.0)
    assert power.cells() == ["power", "0.500 ± 0.208", "+0.000 ± 0.100", "100", "0.50 ± 0.00", "2.0", "5", "-"]
    assert Result("tiny", runs[:1]).rows("recall")[0].cells()[1] == "0.300"  # one seed has no error


def test_a_row_says_which_seeds_were_not_measured():
    slow = {"task": "recall", "mechanism": "power", "seed": 2, "why": "450 steps would take 64 s, more than 60"}
    runs = [run_of(key, s, 0.5) for key in ("softmax", "power") for s in range(2)]
    found = Result("tiny", [*runs, run_of("softmax", 2, 0.5), slow])
    cells = {row.mechanism: row.cells()[1] for row in found.rows("recall")}
    assert cells == {"softmax": "0.500 ± 0.000", "power": "0.500 ± 0.000, 2 of 3 seeds"}
    assert found.left_out("recall") == {"power": slow["why"]}


def test_differences_are_of_the_same_seeds():
    runs = [run_of("softmax", 0, 0.3), run_of("softmax", 1, None), run_of("power", 0, 0.2), run_of("power", 1, 0.9)]
    power = next(r for r in Result("tiny", runs).rows("recall") if r.mechanism == "power")
    assert power.over.value == pytest.approx(-0.1)
    assert power.quality.value == pytest.approx(0.55)


def test_numbers_in_the_table_are_those_of_the_file(quickly, tmp_path):
    out = tmp_path / "out.json"
    found = compare(["power", "moba"], tasks=["passkey", "recall"], scale="tiny", seeds=3, out=out)
    said = json.loads(out.read_text())
    rows = [row for task in ("recall", "passkey") for row in said["rows"] if row["task"] == task]
    table = [line for line in found.markdown("plot.svg").splitlines() if line.startswith("| `")]
    assert len(table) == len(rows) == 8
    for line, row in zip(table, rows):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == len(HEAD)
        assert cells[0] == f"`{row['mechanism']}`"
        assert cells[1] == f"{row['quality']['value']:.3f} ± {row['quality']['error']:.3f}"
        if row["mechanism"] != "softmax":
            assert cells[2] == f"{row['over']['value']:+.3f} ± {row['over']['error']:.3f}"
        assert cells[3] == f"{row['per_second']['value']:,.0f}"
        assert cells[4] == f"{row['speed']['value']:.2f} ± {row['speed']['error']:.2f}"
        assert cells[5:] == [f"{row['peak_mb']:.1f}", f"{row['parameters']:,}", f"{row['state']:,}"]
    assert Result.load(out).rows("recall") == found.rows("recall")


def test_frontier_of_hand_made_points():
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (3.0, 0.8), (4.0, 0.9), (0.5, 0.1)]
    assert frontier(points, higher=True) == [5, 1, 0]
    assert frontier(points, higher=False) == [5]
    assert frontier([(1.0, 1.0), (1.0, 1.0)], higher=True) == [0, 1]
    assert frontier([], higher=True) == []


def test_the_plot_draws_every_point_and_the_frontier(quickly, tmp_path):
    from regard import catalog

    found = compare(["power"], tasks=["passkey", "recall", "localise"], scale="tiny", seeds=2)
    catalog.drawn(found.draw, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert text.count("softmax<") == 3
    assert text.count("power<") == 2  # it is not for pictures


def test_names_do_not_lie_on_each_other():
    from matplotlib.figure import Figure

    alike = [run_of(key, 0, 0.5 if key == "softmax" else 0.4) for key in ("softmax", "moba", "power", "aaren")]
    figure = Figure(figsize=(5, 4))
    Result("tiny", [*alike, run_of("gna", 0, 0.1, 0.5)]).draw(figure)
    (axes,) = figure.axes
    assert len(axes.containers) == 5  # every point is drawn
    said = {text.get_text() for text in axes.texts}
    assert {"softmax", "gna"} <= said  # the frontier's
    assert len(said) == 3
    assert all(label.get_text() == f"{float(label.get_text()):g}" for label in axes.get_xticklabels())


def test_wrong_names_are_answered_with_near_ones():
    with pytest.raises(KeyError, match="did you mean power"):
        chosen(["powr"])
    with pytest.raises(KeyError, match="did you mean passkey"):
        compare(tasks=["paskey"])
    with pytest.raises(KeyError, match="there are tiny, small, large"):
        compare(scale="huge")
    with pytest.raises(ValueError, match="seeds"):
        compare(seeds=0)


def test_without_public_data_the_others_are_compared(quickly, monkeypatch, tmp_path):
    monkeypatch.setenv("REGARD_DATA", str(tmp_path))
    found = compare(["power"], scale="tiny", seeds=1)
    assert found.tasks() == GENERATED
    assert "text_books" in found.made["without"]["language"]
    with pytest.raises(ValueError, match="language: public data are needed"):
        compare(["power"], tasks=["language"], scale="tiny")
