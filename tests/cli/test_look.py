"""`regard look`, as users run it: another process, real files."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers
import warm
from PIL import Image
from rich.console import Console

import regard
from regard.cli import look as look_command
from regard.cli.inputs import seen
from regard.cli.printed import tables

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
TEXT = "it was the best of times , it was the worst of times , it was the age of wisdom"


def command(*arguments):
    return [sys.executable, "-m", "regard", "look", *map(str, arguments)]


def look(*arguments, **options):
    return warm.regard("look", *arguments, **options)


@pytest.mark.parametrize(
    ("kind", "arguments", "stacks"),
    [
        ("gpt2", ["--text", TEXT, "--generate", "4"], {"language_model"}),
        ("bert", ["--text", TEXT], {"encoder"}),
        ("t5", ["--text", TEXT], {"encoder", "decoder", "decoder_cross"}),
        ("vit", ["--image", "PICTURE"], {"encoder"}),
        (
            "llava",
            ["--image", "PICTURE", "--text", "what is in this picture ?", "--generate", "2"],
            {"vision_tower", "language_model"},
        ),
    ],
)
def test_every_kind_of_model(folders, picture, tmp_path, kind, arguments, stacks):
    arguments = [str(picture) if a == "PICTURE" else a for a in arguments]
    done = look(folders[kind], *arguments, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    tree = regard.open(tmp_path / "out" / "recording.zarr").tree
    assert set(tree.children) == stacks
    for stack in stacks:
        assert set(tree[stack].data_vars) == {
            "entropy",
            "received",
            "mass",
            "distance",
            "rows",
        }  # rows hold the largest
    assert not tree.attrs["partial"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["recording.zarr", "report.html"]
    if kind == "llava":
        roles = list(tree["language_model"]["query_role"].values[0])
        assert roles.count("image") == 16
        assert {"user", "generated", "special"} <= set(roles)
        assert int(tree["language_model"]["key_row"].max()) == 3
    if kind == "gpt2":
        words = list(tree["language_model"]["query_token"].values[0])
        assert words[:4] == ["it", "was", "the", "best"]


def test_what_was_generated_is_printed_and_is_the_page_s_row(folders, tmp_path):
    done = look(folders["gpt2"], "--text", TEXT, "--generate", "5", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    said = re.search(r"^said +(.*)$", done.stdout, re.M)[1]
    tree = regard.open(tmp_path / "recording.zarr").tree
    node = tree["language_model"].to_dataset()
    assert tree.attrs["said"].strip() == said
    words = node["query_token"].values[0][node["query_role"].values[0] == "generated"].tolist()
    assert len(words) == 4
    assert "".join([*words, *node.attrs["unread"]]).replace(" ", "").startswith(said.replace(" ", ""))


def test_keys_are_asked_for_only_where_a_page_can_show_them(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(look_command, "ROWS_BUDGET", 0)
    for shown, there in ((4e6, True), (10, False)):
        monkeypatch.setattr(look_command, "SHOWN", shown)
        seen = look_command.look(str(folders["gpt2"]), text=TEXT, out=tmp_path / str(there))
        found = set(regard.open(seen.recording).tree["language_model"].data_vars)
        assert ({"top_keys", "top_weights"} <= found) == there
        assert "rows" not in found


@pytest.mark.parametrize("width", [80, 120])
def test_tables_keep_every_cell_whole_in_the_width(width):
    cells = {f"a statistic {i}": [f"{i}.123 (h{j} 0.1 .. h5 0.2)" for j in range(3)] for i in range(7)}
    made = tables("title", "layer", ["0", "1", "2"], cells, width)
    console = Console(width=width, record=True, file=io.StringIO())
    for table in made:
        console.print(table)
    drawn = console.export_text()
    assert all(len(line) <= width for line in drawn.splitlines())
    assert all(cell in drawn for column in cells.values() for cell in column)
    assert drawn.count("title") == 1


@pytest.mark.parametrize(
    "arguments", [["look", "GIVEN"], ["look", "reader", "--file", "GIVEN"], ["steer", "reader", "--with", "GIVEN"]]
)
def test_errors_quote_little(arguments):
    given = "a word or two " * 200
    arguments = [given if one == "GIVEN" else one for one in arguments]
    done = warm.regard(*arguments)
    assert done.returncode == 2
    assert "(2,800 characters)" in done.stderr
    assert len(done.stderr) < 400


@pytest.mark.parametrize(
    ("command_name", "names"), [("steer", "attention_buckets"), ("explain", "normgrad"), ("profile", "gini")]
)
def test_help_names_the_methods(command_name, names):
    done = subprocess.run(
        [sys.executable, "-m", "regard", command_name, "--help"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"COLUMNS": "80"},
        timeout=300,
        check=False,
    )
    assert names in done.stdout


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("gpt2", ["--text", " "], "the text is empty"),
        ("gpt2", ["--text", "it " * 80], "80 tokens.*64 positions.*--truncate"),
        ("gpt2", ["--text", "it " * 60, "--generate", "9"], "60 tokens and 9 are to be generated.*64 positions"),
        ("gpt2", ["--image", "PICTURE"], "reads text only"),
        ("gpt2", ["--text", "a", "--file", "b"], "give one of them"),
        ("gpt2", ["--file", "/nowhere/at/all"], "No such file"),
        ("llava", ["--image", __file__], "not a picture"),
        ("vit", [], "looks at pictures: give one with --image"),
        ("vit", ["--image", "PICTURE", "--generate", "3"], "does not generate"),
        ("rwkv", ["--text", "it was"], "holds no attention module"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(folders, picture, tmp_path, kind, arguments, message):
    arguments = [str(picture) if a == "PICTURE" else a for a in arguments]
    done = look(folders[kind], *arguments, "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error:")
    assert "Traceback" not in done.stderr
    assert re.search(message, done.stderr.replace("\n", " ")), done.stderr
    assert not list(tmp_path.iterdir())


def test_an_unknown_model(tmp_path):
    done = look("no-such-model", "--text", "a", "--out", tmp_path)
    assert done.returncode == 2
    assert "'no-such-model' cannot be loaded" in done.stderr
    done = look(tmp_path / "nothing", "--text", "a", "--out", tmp_path)
    assert "there is no folder" in done.stderr
    done = look(tmp_path, "--text", "a", "--out", tmp_path)
    assert "without a config.json" in done.stderr


def test_weights_that_are_not_safetensors_are_refused(folders, tmp_path):
    shutil.copytree(folders["gpt2"], tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    done = look(tmp_path / "pickled", "--text", "a", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "safetensors" in done.stderr


def test_a_text_can_be_truncated(folders, tmp_path):
    done = look(folders["gpt2"], "--text", "it " * 80, "--truncate", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert regard.open(tmp_path / "recording.zarr").tree["language_model"].sizes["query"] == 64


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that even root cannot write to")
def test_an_unwritable_folder(folders):
    done = look(folders["gpt2"], "--text", "it", "--out", "/proc/regard")
    assert done.returncode == 2
    assert "cannot be written to" in done.stderr


def test_a_full_disk_leaves_nothing_half_written(folders, tmp_path):
    first = look(folders["gpt2"], "--text", TEXT, "--out", tmp_path)
    assert first.returncode == 0, first.stderr
    before = regard.open(tmp_path / "recording.zarr").tree
    report = (tmp_path / "report.html").read_bytes()
    done = look(folders["gpt2"], "--text", "it was", "--out", tmp_path, file_bytes=1500)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "could not be written" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recording.zarr", "report.html"]
    assert regard.open(tmp_path / "recording.zarr").tree.equals(before)
    assert (tmp_path / "report.html").read_bytes() == report


def test_ctrl_c_saves_what_was_recorded(folders, tmp_path):
    arguments = command(folders["t5"], "--text", TEXT, "--generate", "20000", "--out", tmp_path)
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert "attention modules" in process.stdout.readline()
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        _out, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "partial" in errors
    recording = regard.open(tmp_path / "recording.zarr")
    assert recording.partial
    assert 1 < recording.tree["decoder"].sizes["query"] < 20000
    assert "Partial" in (tmp_path / "report.html").read_text()


def test_the_picture_is_shown_as_the_model_is_given_it():
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    wide = Image.fromarray(pixels).resize((600, 400))
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 16, "width": 16}}
    processor = transformers.CLIPImageProcessor(**sizes)
    (shown,) = seen(processor, processor(wide, return_tensors="pt"), wide)
    assert shown.size == (16, 16)
    middle = np.asarray(wide.resize((48, 32), Image.Resampling.BICUBIC), float)[8:24, 16:32]
    assert np.abs(np.asarray(shown, float) - middle).mean() < 3
    whole = processor(wide, return_tensors="pt", do_center_crop=False)
    assert seen(processor, whole, wide)[0] is wide  # in its own shape, and sharper
    assert seen(processor, {"pixel_values": torch.zeros(4, 12)}, wide) == [wide]  # packed
