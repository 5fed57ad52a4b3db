"""`regard compare`: tables that say what the file says, a plot, a page's section, going on, and plain errors."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regard.cli import app
from regard.compare import Progress
from regard.files import with_section


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture
def quickly(monkeypatch):
    def run(way, task, seed, scale):
        took = 0.5 if way.key == "moba" else 2.0  # apart from the others on the plot
        measured = {"per_second": 1e3, "time": took, "peak_mb": 1.5, "parameters": 100, "state": None, "exact": False}
        return {"quality": 0.25 + 0.5 * seed, **measured}

    monkeypatch.setattr(importlib.import_module("regard.compare.run"), "run", run)


def test_tables_file_plot_and_page(quickly, tmp_path):
    out, plot, page = (tmp_path / name for name in ("out.json", "plot.svg", "page.md"))
    page.write_text("# Mechanisms\n\nBy hand.\n")
    given = ("--with", "moba", "-t", "passkey", "--scale", "tiny", "--out", out, "--plot", plot, "--page", page)
    done = run(*given)
    assert done.exit_code == 0, done.output
    rows = {row["mechanism"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"softmax", "none", "moba"}
    cell = f"{rows['moba']['quality']['value']:.3f} ± {rows['moba']['quality']['error']:.3f}"
    assert cell == "0.500 ± 0.250"
    assert cell in done.output
    text = page.read_text()
    assert text.startswith("# Mechanisms\n\nBy hand.\n")
    assert f"| `moba` | {cell} |" in text
    assert "](plot.svg)" in text
    assert "moba<" in plot.read_text()
    again = run(*given)
    assert "going on after 6 of 6 runs" in again.output
    assert page.read_text() == text


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc, as Linux has it")
def test_one_that_is_killed_leaves_no_process_behind(tmp_path):
    arguments = ["--task", "passkey", "--scale", "tiny", "--jobs", "2", "--out", str(tmp_path / "out.json")]
    parent = subprocess.Popen([sys.executable, "-m", "regard", "compare", *arguments], stdout=subprocess.DEVNULL)
    try:
        journal = tmp_path / "out.json.state" / "journal.0"
        assert until(lambda: journal.exists() and journal.stat().st_size > 0)  # one run was made, others are being made
        children = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if of(pid)[1] == parent.pid]
        assert len(children) >= 2
    finally:
        parent.kill()
        parent.wait()
    assert until(lambda: all(of(pid)[0] in "ZX" for pid in children), 20.0)


def of(pid: int) -> tuple[str, int]:
    """State of a process, X where it is gone, and its parent."""
    try:
        state, above = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "X", 0
    return state, int(above)


def until(true, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    return true()


def test_a_stopped_one_goes_on(quickly, tmp_path, monkeypatch):
    module = importlib.import_module("regard.cli.compare")
    make = module.make

    def stopping(*args, progress, **kwargs):
        def tick(told: Progress) -> None:
            progress(told)
            if told.done == 2:
                raise KeyboardInterrupt

        return make(*args, progress=tick, **kwargs)

    given = ("-w", "power", "-t", "recall", "--scale", "tiny", "--out", tmp_path / "out.json")
    with monkeypatch.context() as patched:
        patched.setattr(module, "make", stopping)
        stopped = run(*given)
    assert stopped.exit_code == 130
    assert "out.json.state" in stopped.output
    assert "going on after 2 of 6 runs" in run(*given).output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--with", "mobba"), "did you mean moba"),
        (("--task", "recal"), "did you mean recall"),
        (("--scale", "big"), "there are tiny, small, large"),
        (("--plot", "plot.pdf"), "a plot is drawn into a file that ends in"),
        (("--page", "nowhere.md"), "nowhere.md"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2
    assert said in done.output
    assert not list(tmp_path.glob("*.json"))


def test_sections_of_a_page_leave_each_other_alone():
    page = with_section(with_section("# Page\n", "a", "one"), "b", "two")
    changed = with_section(page, "a", "three")
    assert changed == page.replace("one", "three")
    assert with_section(changed, "a", "one") == page
    with pytest.raises(ValueError, match="put that right"):
        with_section(page.replace("<!-- end of section a -->", ""), "a", "x")
