"""What Regard writes takes the place of what Regard wrote, and of nothing else."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from conftest import SENTENCE
from PIL import Image
from typer.testing import CliRunner

from regard import catalog
from regard.catalog import Finding
from regard.cli import app
from regard.files import MARK, refuse_foreign, replaced, written_aside


def run(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_a_draft_takes_its_place_or_goes(tmp_path):
    path = tmp_path / "a.txt"
    with written_aside(path) as draft:
        draft.write_text("one")
    with pytest.raises(KeyboardInterrupt), written_aside(path) as draft:
        draft.write_text("two")
        raise KeyboardInterrupt
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_only_files_with_the_mark_are_replaced(tmp_path):
    path = tmp_path / "a.txt"
    for text in (f"one {MARK}", "two" * 9000 + MARK):
        with replaced(path) as draft:
            draft.write_text(text)
        assert path.read_text() == text
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"a\.txt exists and is not a recording, page or picture that Regard"):
        replaced(path).__enter__()
    for name, make in {
        "folder": os.mkdir,
        "empty": lambda p: open(p, "w").close(),
        "link": lambda p: os.symlink(tmp_path / "nowhere", p),
        "fifo": os.mkfifo,
    }.items():
        make(tmp_path / name)
        with pytest.raises(FileExistsError, match=name):
            refuse_foreign(tmp_path / name)
    assert path.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "empty", "fifo", "folder", "link"]


@pytest.fixture
def commands(folders, picture, tmp_path, monkeypatch):
    """What each command that writes is given, and the files and folders that it writes."""
    text = tmp_path / "text.txt"
    text.write_text(SENTENCE)
    finding = Finding(True, "measured", "expected", 0, draw=lambda figure: figure.subplots())
    find = catalog.import_module

    def module(name):
        return SimpleNamespace(claim=lambda **_: finding) if name.startswith("regard.claims") else find(name)

    monkeypatch.setattr(catalog, "import_module", module)
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "cache"))
    out, key = tmp_path / "out", catalog.claimed()[0]
    out.mkdir()
    gpt2, vit = folders["gpt2"], folders["vit"]
    return out, {
        "look": (["look", gpt2, "-t", "it was", "-o", out], ["report.html", "recording.zarr"]),
        "profile": (["profile", gpt2, text, "-s", "entropy", "-o", out / "p.zarr"], ["p.zarr"]),
        "explain": (["explain", vit, "-i", picture, "-m", "rollout", "-o", out / "e.html"], ["e.html"]),
        "drawn": (["explain", vit, "-i", picture, "-m", "rollout", "-o", out / "e.png"], ["e.png"]),
        "plot": (["reproduce", key, "--plot", out / "p.svg"], ["p.svg"]),
        "painted": (["reproduce", key, "--plot", out / "p.png"], ["p.png"]),
        "plots": (["reproduce", *catalog.claimed()[:2], "--plot", out / "plots"], [f"plots/{key}.svg"]),
    }


def held(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["look", "profile", "explain", "drawn", "plot", "painted", "plots"])
def test_a_command_replaces_its_own_and_nothing_else(commands, name):
    out, given = commands
    command, written = given[name]
    for _ in range(2):
        done = run(*command)
        assert done.exit_code == 0, done.stderr
    tops = {w.partition("/")[0] for w in written}
    assert set(os.listdir(out)) == tops
    for one in written:
        path = out / one
        if path.is_dir():
            (path / "notes.txt").write_text("mine")
        else:
            path.write_text("mine")
        before = held(out)
        done = run(*command)
        assert done.exit_code == 2
        assert "that Regard" in done.stderr.replace("\n", " ")
        assert held(out) == before
        if path.is_dir():
            (path / "notes.txt").unlink()
        else:
            path.unlink()
        assert run(*command).exit_code == 0


def test_a_folder_is_not_made_for_what_fails(tmp_path):
    for command in (
        ["look", tmp_path / "none", "-t", "a", "-o", tmp_path / "new" / "deep"],
        ["explain", tmp_path / "none", "-t", "a", "-o", tmp_path / "new" / "a.html"],
    ):
        assert run(*command).exit_code == 2
    assert os.listdir(tmp_path) == []


def test_the_mark_of_a_picture_survives_its_size(tmp_path):
    from regard.cli.inputs import png

    noise = Image.effect_noise((300, 300), 90)
    (tmp_path / "a.png").write_bytes(png(noise))
    refuse_foreign(tmp_path / "a.png")
    noise.save(tmp_path / "b.png")
    with pytest.raises(FileExistsError):
        refuse_foreign(tmp_path / "b.png")
