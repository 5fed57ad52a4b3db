"""A language model beside reading times: alignment, correlations, and the command."""

from __future__ import annotations

import csv
import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import WORDS
from typer.testing import CliRunner

import regard
from regard.cli import app
from regard.data.loaders import Reading
from regard.gaze import compare
from regard.gaze.compare import (
    _chance,
    _grams,
    _partial,
    _rotations,
    mean_reading_time,
    measures,
    shares,
    word_counts,
)


def reading(words, time, who="p1") -> Reading:
    n = len(words)
    return Reading(
        participant=who,
        text_id="t",
        task="reading",
        words=tuple(words),
        boxes=np.full((n, 4), np.nan, np.float32),
        reading_time=np.asarray(time, np.float32),
        answer=np.zeros(n, bool),
        fixations=np.zeros((0, 4), np.float32),
        word_of_fixation=np.zeros(0, np.int64),
        question="?",
        expected="",
        correct=True,
        webcam_hz=30.0,
    )


def drawn(seed: int, n: int = 20) -> list[str]:
    return np.random.default_rng(seed).choice(WORDS[4:15], n).tolist()


def sharp(folder: Path):
    """A tiny model whose attention depends on the words: what it draws at first is even."""
    model, tokenizer = regard.load(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and any(part in name for part in ("attn", "attention", "SelfAttention")):
                weight.mul_(30)
    return model, tokenizer


def test_tokens_belong_to_words_by_their_offsets():
    """a, bc: one token that spans the blank and half of bc, a special one, and the rest of bc."""
    found = shares(["a", "bc"], [(0, 0), (0, 3), (3, 4), (1, 2)])
    assert found.tolist() == [[0, 0.5, 0, 0], [0, 0.5, 1, 0]]


def test_reading_time_is_the_mean_over_readers():
    (text,) = mean_reading_time(
        [reading("ab", [100, 0]), reading("ab", [300, 50], "p2"), reading("ab", [200, 0], "p3")]
    )
    assert text.time.tolist() == pytest.approx([200, 50 / 3])
    assert text.halves.tolist() == [[150, 0], [300, 50]]


def test_words_are_counted_without_their_punctuation():
    assert word_counts("The cat, the (cat) sat.") == {"the": 2, "cat": 2, "sat": 1}


def test_measures_of_words(folders):
    """What a word receives is what its tokens do; surprisals of words add up to the model's loss."""
    model, tokenizer = regard.load(folders["gpt2"])
    words = ("it", "was", "the", "best", "of", "times")
    found = measures(model, tokenizer, words)
    ids = tokenizer(" ".join(words), return_tensors="pt")["input_ids"]
    with torch.no_grad(), regard.record(model, "rows") as recording:
        loss = model(ids, labels=ids).loss
    rows = recording.tree["language_model"]["rows"].isel(batch=0).values
    assert np.nansum(found["surprisal"]) == pytest.approx(float(loss) * (ids.shape[1] - 1), rel=1e-5)
    assert np.isnan(found["surprisal"][0])
    assert found["last"] == pytest.approx(rows[:, :, -1], abs=1e-6)
    assert found["received"][1, 2, 1] == pytest.approx(rows[1, 2, 1:, 1].mean(), abs=1e-6)
    assert found["received"][..., -1] == pytest.approx(rows[:, :, -1, -1], abs=1e-6)
    assert found["rollout"][0, -1] == pytest.approx(0.5 + 0.5 * rows[0, :, -1, -1].mean(), abs=1e-6)


def test_partial_correlations_are_those_of_residuals():
    rng = np.random.default_rng(0)
    of_word = np.repeat([0, 1, 2], [10, 20, 5])
    y, x, z = rng.normal(size=35), rng.normal(size=(35, 4)), rng.normal(size=(35, 2))
    x[:, 0] += 3 * z[:, 0]
    y += 2 * z[:, 0]
    x[:, 3] = z @ [1, 2]

    def residual(v, z):
        return v - z @ np.linalg.lstsq(z, v, rcond=None)[0]

    def plain(y, x):
        return (y @ x) / np.linalg.norm(y) / np.linalg.norm(x)

    grams = _grams(y, x, z, of_word)
    found = _partial(grams, np.array([[1.0, 1, 1], [0, 2, 1]]))
    assert found[0, :3] == pytest.approx([plain(residual(y, z), residual(x[:, m], z)) for m in range(3)])
    twice = np.r_[10:30, 10:30, 30:35]  # the second draw, word by word
    assert found[1, :3] == pytest.approx(
        [plain(residual(y[twice], z[twice]), residual(x[twice, m], z[twice])) for m in range(3)]
    )
    assert np.isnan(found[:, 3]).all()  # nothing is left of it
    bare = _partial(_grams(y, x, z[:, :0], of_word), np.ones((1, 3)))
    assert bare[0] == pytest.approx([plain(y, x[:, m]) for m in range(4)])


def test_rotations_stay_in_their_text():
    of_word = np.repeat([0, 1], [3, 5])
    for turned in _rotations(of_word, 20, np.random.default_rng(0)):
        assert sorted(turned) == list(range(8))
        assert (of_word[turned] == of_word).all()
        assert set(np.diff(turned[:3]) % 3) == {1}


def test_chance_is_what_noise_reaches():
    """Of 200 measures that have nothing to do with the times, the strongest reaches chance about once in 20 times."""
    over = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        of_word = np.repeat(np.arange(5), 40)
        y, x, z = rng.normal(size=200), rng.normal(size=(200, 50)), np.zeros((200, 0))
        level = _chance(y, x, z, _rotations(of_word, 200, rng))
        over += np.abs(_partial(_grams(y, x, z, of_word), np.ones((1, 5)))[0]).max() > level
    assert over <= 7


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_a_head_that_people_follow_is_found(kind, folders):
    """People look at words as long as one head's received weight says: its correlation is 1, and no other's."""
    model, tokenizer = sharp(folders[kind])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    encoder = model.get_encoder() if kind == "t5" else model
    texts = [drawn(seed) for seed in range(4)]
    readings = [reading(words, 1e6 * measures(encoder, tokenizer, tuple(words))["received"][1, 2]) for words in texts]
    found = compare(model, tokenizer, readings, resamples=50)
    r = found["plain"]["received"]
    assert float(r.sel(layer=1, head=2)) == pytest.approx(1)
    assert float(found["plain"]["received_low"].sel(layer=1, head=2)) == pytest.approx(1)
    assert float(found["controlled"]["received"].sel(layer=1, head=2)) == pytest.approx(1)
    others = r.values.copy()
    others[1, 2] = 0
    assert np.nanmax(np.abs(others)) < 0.99
    assert ("surprisal" in found["plain"]) == (kind == "gpt2")
    assert found.attrs["texts"] == 4
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_length_is_taken_out(folders):
    """Times that are the words' lengths correlate with length alone, and after the controls with nothing."""
    model, tokenizer = sharp(folders["gpt2"])
    rng = np.random.default_rng(0)
    readings = []
    for seed in range(4):
        words = drawn(seed, 40)
        readings += [reading(words, [100 * len(w) + 0.1 * rng.random() for w in words], who) for who in ("p1", "p2")]
    found = compare(model, tokenizer, readings, resamples=20)
    assert float(found["plain"]["length"]) > 0.9
    assert float(np.abs(found["controlled"]["received"]).mean()) < float(np.abs(found["plain"]["received"]).mean())
    assert found.attrs["reliability"] > 0.9
    assert "length" not in found["controlled"]


def test_long_texts_are_cut_and_counted(folders):
    model, tokenizer = regard.load(folders["gpt2"])  # 64 positions
    found = compare(model, tokenizer, [reading(drawn(s, 70), np.arange(70.0)) for s in range(2)], resamples=5)
    assert found.attrs["cut"] == 12


def test_what_is_refused(folders):
    model, tokenizer = regard.load(folders["gpt2"])
    with pytest.raises(ValueError, match="two are needed at least: got 1"):
        compare(model, tokenizer, [reading(["it", "was"], [1, 2])])
    with pytest.raises(ValueError, match="fast tokenizer"):
        compare(model, object(), [])


def write(folder: Path, name: str, *rows: dict) -> None:
    with gzip.open(folder / f"{name}_en.csv.gz", "wt", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def data(folder: Path) -> Path:
    """Two texts of WebQAmGaze's form."""
    words, trials, texts, boxes = [], [], [], []
    for t in range(2):
        of = {"participant": "p001", "set": "s", "text_id": f"t{t}"}
        for i, word in enumerate(drawn(t, 12)):
            words.append(of | {"word_id": f"{word}_{i}", "trt_ms": 7 * i % 5, "fix_order": "", "spans": ""})
            boxes.append(
                {"set": "s", "text": f"t{t}", "word": word, "counter": i, "x": 1, "y": 1, "width": 1, "height": 1}
            )
        trials.append(of | {"condition": "nr", "question_id": "q", "correct": 1, "webcam_hz": 30})
    texts.append({"stimulus": "?", "trial_name": "q", "correct_answer": "a"})
    looks = [{"participant": "p001", "text_id": "t0", "x": 1, "y": 1, "t_ms": 0, "dur_ms": 9}]
    looks.append(looks[0] | {"text_id": "t1"})
    for name, rows in (
        ("words", words),
        ("trials", trials),
        ("texts", texts),
        ("word_boxes", boxes),
        ("fixations", looks),
    ):
        write(folder, name, *rows)
    return folder


def test_the_command(tmp_path):
    def run(*options):
        arguments = ["gaze", "compare", "reader", str(data(tmp_path)), "--resamples", "9", *options]
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})

    done = run("--out", str(tmp_path / "found.zarr"))
    assert done.exit_code == 0, done.output
    assert "received (layer" in done.output
    assert "surprisal" in done.output
    assert "24 words of 2 texts, 1 readers" in done.output
    kept = xr.open_datatree(tmp_path / "found.zarr", engine="zarr", consolidated=False)
    assert kept["controlled"]["received"].dims == ("layer", "head")
    assert run("--out", str(tmp_path / "found.zarr")).exit_code == 0  # its own is replaced
    (tmp_path / "found.zarr" / "notes.txt").write_text("mine")
    again = run("--out", str(tmp_path / "found.zarr"))
    assert again.exit_code == 2
    assert "notes.txt" in again.output
    assert "there are reading and search" in run("--task", "sleeping").output


@pytest.mark.skipif("REGARD_DATA" not in os.environ, reason="REGARD_DATA names no folder of public data")
def test_people_look_longer_at_long_and_rare_words(folders):
    """What is known of reading, in the real data, with five texts and a model that knows nothing."""
    from regard.data import loaders

    readings = loaders.webqamgaze(f"{os.environ['REGARD_DATA']}/gaze_reading_webqamgaze")
    some = [r for r in readings if r.task == "reading"]
    names = sorted({r.text_id for r in some})[:5]
    model, tokenizer = regard.load("reader")
    found = compare(model, tokenizer, [r for r in some if r.text_id in names], resamples=100)
    assert float(found["plain"]["length_low"]) > 0.2
    assert float(found["plain"]["frequency_high"]) < -0.1
    assert 0.3 < found.attrs["reliability"] < 1
