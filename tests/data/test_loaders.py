"""Loaders: the published files come out as they are, and damaged ones are refused with the place.

Tests that need the data find it in the folder that REGARD_DATA names, and are skipped without it.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
import wave
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from regard.data import loaders
from regard.data.loaders import DataError, files

DATA = os.environ.get("REGARD_DATA")


@pytest.fixture(scope="module")
def data() -> Path:
    if not DATA:
        pytest.skip("REGARD_DATA names no folder of public data")
    return Path(DATA)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@contextmanager
def refused(*parts: str):
    """The error names these, in this order."""
    with pytest.raises(DataError) as caught:
        yield
    message, at = str(caught.value), 0
    for part in parts:
        assert part in message[at:], f"{part!r} is not in {message[at:]!r}"
        at = message.index(part, at) + len(part)


# Files


def test_files_are_found_plain_or_packed(tmp_path):
    write(tmp_path / "a.csv.gz", "x\n1\n")
    assert files.find(tmp_path, "b.csv", "a.csv").name == "a.csv.gz"
    write(tmp_path / "a.csv", "x\n2\n")
    assert files.find(tmp_path, "a.csv").name == "a.csv"
    assert files.find(tmp_path / "a.csv", "b.csv").name == "a.csv"
    with pytest.raises(FileNotFoundError, match=r"expected b.csv or c.csv .*in this folder"):
        files.find(tmp_path, "b.csv", "c.csv")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        files.find(tmp_path / "none", "b.csv")
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        files.folder(tmp_path / "a.csv")


def test_damaged_packing_and_text(tmp_path):
    packed = gzip.compress(b"x\n" * 1000)
    (tmp_path / "cut.csv.gz").write_bytes(packed[:20])
    (tmp_path / "no.csv.gz").write_bytes(b"x\n1\n")
    (tmp_path / "latin.csv").write_bytes("x\nnaïve\n".encode("latin-1"))
    with refused("cut.csv.gz", "not a whole gzip file"):
        files.Table(tmp_path / "cut.csv.gz")
    with refused("no.csv.gz", "not a whole gzip file"):
        files.Table(tmp_path / "no.csv.gz")
    with refused("latin.csv", "not UTF-8 text, at byte 4"):
        files.Table(tmp_path / "latin.csv")


def test_tables_say_where(tmp_path):
    path = write(tmp_path / "t.csv", 'a,b,c\n1,2.0,"two\nlines"\n\n3,x,yes\n')
    table = files.Table(path, "a", "b")
    assert len(table) == 2
    assert table["c"] == ["two\nlines", "yes"]
    assert table.numbers("a", np.int64).tolist() == [1, 3]
    with refused("t.csv, line 5, column b: expected a number, got 'x'"):
        table.numbers("b")
    with refused("line 3, column c: expected yes, got 'two\\nlines'"):
        table.among("c", {"yes": True})
    with refused("line 3, column a: expected a date and time, got '1'"):
        table.times("a", "s")
    with refused("t.csv: no column d, e; it has a, b, c"):
        files.Table(path, "a", "d", "e")
    with refused("e.csv: no column a; it has none"):
        files.Table(write(tmp_path / "e.csv", ""), "a")
    with refused("r.csv, line 2: 1 cells, expected 2"):
        files.Table(write(tmp_path / "r.csv", "a,b\n1\n"))
    with refused("q.csv, line 2"):
        files.Table(write(tmp_path / "q.csv", 'a,b\n"1,2\n'))
    zones = files.Table(write(tmp_path / "z.csv", "a\n2020-01-02 03:04:05+01:00\n2020-01-02\n"))
    assert zones.times("a", "s").astype(str).tolist() == ["2020-01-02T02:04:05", "2020-01-02T00:00:00"]
    halves = files.Table(write(tmp_path / "h.csv", "a\n1\n1.5\n"))
    with refused("h.csv, line 3, column a: expected a whole number, got '1.5'"):
        halves.numbers("a", np.int64)
    with refused("expected a number, got 'nan'"):
        files.Table(write(tmp_path / "n.csv", "a\nnan\n")).numbers("a")
    assert len(files.Table(write(tmp_path / "0.csv", "a\n"), "a").numbers("a")) == 0


def test_json_says_where(tmp_path):
    lines = write(tmp_path / "l.json", '{"a": 1}\n\n{"a": }\n')
    with refused("l.json, line 3, column 7: not JSON"):
        list(files.json_lines(lines))
    with refused("l.json, line 1: expected dict, got [1]"):
        list(files.json_lines(write(lines, "[1]\n")))
    with refused("l.json, line 3, column 1: not JSON"):
        files.parsed(write(lines, '{\n"a": 1,\n}'))
    with refused("here: no field b; it has a"):
        files.field({"a": 1}, "b", int, "here")
    with refused("here, field a: expected int, got True"):
        files.field({"a": True}, "a", int, "here")
    with refused("here, field a: expected int or float, got '2'"):
        files.numbers({"a": [1, "2"]}, "a", "here")
    with refused("here, field a: expected 4 numbers, got 1"):
        files.numbers({"a": [1]}, "a", "here", 4)


def test_archives(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b/c.txt", "inside")
        archive.writestr("__MACOSX/b/c.txt", "no")
        archive.writestr("large", bytes(files.LARGEST_MEMBER + 1), zipfile.ZIP_DEFLATED)
    held = files.Files(path)
    assert held.names == ["b/c.txt", "large"]
    assert held.read("b/c.txt") == b"inside"
    assert pickle.loads(pickle.dumps(held)).read("b/c.txt") == b"inside"  # for the workers of a DataLoader
    with refused("a.zip: no file none"):
        held.read("none")
    with refused("a.zip, large", "too large"):
        held.read("large")
    with refused("a.zip, b/c.txt: not a whole picture"):
        held.image("b/c.txt")
    with refused("no.zip: not a folder, and not a whole zip"):
        files.Files(write(tmp_path / "no.zip", "text"))
    with pytest.raises(FileNotFoundError, match="no such folder or zip"):
        files.Files(tmp_path / "none")
    write(tmp_path / "folder" / "b" / "c.txt", "outside")
    assert files.Files(tmp_path / "folder").read("b/c.txt") == b"outside"


def test_lazy_reads_when_asked():
    read = []
    lazy = files.Lazy(range(10), lambda k: read.append(k) or k * k)
    assert (len(lazy), read) == (10, [])
    assert lazy[3] == 9
    assert lazy[-1] == 81
    assert list(lazy[2:4]) == [4, 9]
    assert read == [3, 9, 2, 3]
    with pytest.raises(IndexError):
        lazy[10]


def test_pickled_arrays_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.array([{}], dtype=object), b=np.arange(3))
    with refused("a.npz: not a whole npz file of plain arrays"):
        files.arrays(path, "a")
    with refused("a.npz: no array c; it has a, b"):
        files.arrays(path, "c")
    path.write_bytes(path.read_bytes()[:100])
    with refused("a.npz: not a whole npz file"):
        files.arrays(path, "b")
    np.save(tmp_path / "one.npy", np.arange(3))
    with refused("one.npy: not a whole npz file"):
        files.arrays(tmp_path / "one.npy", "b")


# Pictures


def idx_bytes(array: np.ndarray) -> bytes:
    code = {np.dtype(kind): code for code, kind in loaders.pictures.IDX_TYPES.items()}[array.dtype.newbyteorder(">")]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@given(
    st.sampled_from(["u1", "i1", "i2", "i4", "f4", "f8"]), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 999)
)
@settings(deadline=None, max_examples=30)
def test_idx_of_any_shape_and_type(tmp_path_factory, kind, shape, seed):
    array = np.random.default_rng(seed).integers(0, 100, shape).astype(kind)
    path = tmp_path_factory.mktemp("idx") / "array"
    path.write_bytes(idx_bytes(array))
    found = loaders.idx(path)
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


def test_damaged_idx(tmp_path):
    path = tmp_path / "a-idx"
    whole = idx_bytes(np.zeros((2, 3), np.uint8))
    for raw, parts in (
        (b"", ("a-idx: not an IDX file: it begins with nothing",)),
        (b"\1\2\3\4", ("not an IDX file: it begins with 01 02 03 04",)),
        (b"\0\0\7\1", ("not an IDX file",)),
        (whole[:9], ("ends within its header",)),
        (whole[:-1], ("17 bytes, but shape (2, 3) needs 18",)),
        (whole + b"\0", ("19 bytes, but shape (2, 3) needs 18",)),
        (b"\0\0\x08\4" + b"\xff" * 16, ("needs 340,282,366,",)),
    ):
        path.write_bytes(raw)
        with refused(*parts):
            loaders.idx(path)


def test_mnist(data):
    images, labels = loaders.mnist(data / "mnist_t10k")
    assert images.shape == (10_000, 28, 28)
    assert images.dtype == labels.dtype == np.uint8
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        loaders.mnist(data / "mnist_t10k", "train")


def test_mnist_needs_labels_for_its_images(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((2, 28, 28), np.uint8)))
    for labels in (np.zeros(3, np.uint8), np.array([1, 10], np.uint8)):
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
        with refused("(2, 28, 28)", "not digits with their labels"):
            loaders.mnist(tmp_path, "train")


def test_strokes_run_along_the_ink(data):
    strokes = loaders.omniglot_strokes(data / "omniglot_small" / "strokes_background_small1.zip")
    drawings = loaders.omniglot_drawings(data / "omniglot_small" / "images_background_small1.zip")
    assert len(strokes) == len(drawings) == 2720
    assert {d.drawer for d in (strokes[i] for i in range(20))} == set(range(1, 21))
    for i in range(0, 2720, 97):
        drawn, inked = strokes[i], drawings[i]
        assert (drawn.alphabet, drawn.character, drawn.drawer) == (inked.alphabet, inked.character, inked.drawer)
        column, row = np.concatenate(drawn.strokes)[:, :2].round().astype(int).clip(0, 104).T
        assert inked.ink[row, column].mean() > 0.9
        assert inked.ink.mean() < 0.3


def test_strokes_by_hand(tmp_path):
    path = tmp_path / "Latin" / "character01" / "0683_07.txt"
    write(path, "START\n1.5,-2,0\n3,-4,10\nBREAK\n5,-6,50\nBREAK\n")
    (one,) = loaders.omniglot_strokes(tmp_path)
    assert (one.alphabet, one.character, one.drawer) == ("Latin", "character01", 7)
    assert [s.tolist() for s in one.strokes] == [[[1.5, 2, 0], [3, 4, 10]], [[5, 6, 50]]]
    write(path, "START\n1,2\n")
    with refused("0683_07.txt, line 2: expected x,y,time", "'1,2'"):
        loaders.omniglot_strokes(tmp_path)[0]
    write(path, "1,2,3\n")
    with refused("0683_07.txt, line 1: expected START"):
        loaders.omniglot_strokes(tmp_path)[0]
    with refused("no files such as Latin/character01/0683_01.png"):
        loaders.omniglot_drawings(tmp_path)
    Image.new("1", (20, 20)).save(path.with_suffix(".png"))
    with refused("0683_07.png: (20, 20) pixels, expected 105 x 105"):
        loaders.omniglot_drawings(tmp_path)[0]


def test_one_shot_runs(data):
    runs = loaders.omniglot_runs(data / "omniglot_small" / "one_shot_all_runs.zip")
    assert len(runs) == 20
    for run in runs[:3]:
        assert run.training.shape == run.test.shape == (20, 105, 105)
        assert sorted(run.answers) == list(range(20))
    # class numbers count from 1 in the file
    held = files.Files(data / "omniglot_small" / "one_shot_all_runs.zip")
    first = held.read("run01/class_labels.txt").decode().split()
    assert int(first[1][-6:-4]) == runs[0].answers[0] + 1


def test_damaged_runs(tmp_path):
    write(tmp_path / "run01" / "class_labels.txt", "a b c\n")
    with refused("class_labels.txt: expected two names a line, got 'a b c'"):
        loaders.omniglot_runs(tmp_path)[0]
    (tmp_path / "empty").mkdir()
    with refused("empty: no run01/class_labels.txt"):
        loaders.omniglot_runs(tmp_path / "empty")


def cells(folder: Path, boxes: str) -> Path:
    Image.new("RGB", (32, 24)).save(folder / "a.jpg")
    write(folder / "boxes.csv", "image,label,xmin,ymin,xmax,ymax\n" + boxes)
    for split in ("train", "val", "test"):
        write(folder / f"{split}.txt", "a\n" if split == "val" else "")
    return folder


def test_cells(data):
    found = loaders.bccd(data / "cells_bccd")
    assert len(found) == 364
    labels = [label for cell in found for label in cell.labels]
    assert {name: labels.count(name) for name in set(labels)} == {"RBC": 4153, "WBC": 372, "Platelets": 361}
    assert [sum(c.split == s for c in found) for s in ("train", "val", "test")] == [205, 87, 72]
    assert found[0].image().size == (320, 240)
    assert found[0].image().mode == "RGB"


def test_cells_by_hand(tmp_path):
    (one,) = loaders.bccd(cells(tmp_path, "a.jpg,WBC,1,2,3.5,4\na.jpg,RBC,5,5,5,6\n"))
    assert one.boxes.tolist() == [[1, 2, 3.5, 4]]  # the box without area is left out
    assert (one.split, one.labels, one.image().size) == ("val", ("WBC",), (32, 24))
    with refused("boxes.csv, line 2: 'b.jpg' is not in"):
        loaders.bccd(cells(tmp_path, "b.jpg,WBC,1,2,3,4\n"))
    with refused("boxes.csv, line 2: expected RBC, WBC or Platelets, got 'XYZ'"):
        loaders.bccd(cells(tmp_path, "a.jpg,XYZ,1,2,3,4\n"))


def test_cells_as_published(tmp_path):
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (32, 24)).save(tmp_path / "JPEGImages" / "a.jpg")
    for split in ("train", "val", "test"):
        write(tmp_path / "ImageSets" / "Main" / f"{split}.txt", "a\n" if split == "test" else "")
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>5</ymax></bndbox>"
    annotation = write(
        tmp_path / "Annotations" / "a.xml",
        f"<annotation><filename>x</filename><object><name>WBC</name>{box}</object></annotation>",
    )
    (cell,) = loaders.bccd(tmp_path)
    assert (cell.split, cell.labels, cell.boxes.tolist()) == ("test", ("WBC",), [[1, 2, 3, 5]])
    assert cell.image().size == (32, 24)
    write(annotation, "<annotation><object><name>WBC</name></object></annotation>")
    with refused("a.xml: not an annotation with boxes"):
        loaders.bccd(tmp_path)
    write(annotation, "<annotation>")
    with refused("a.xml: not an annotation with boxes"):
        loaders.bccd(tmp_path)


def test_lazy_sets_go_to_other_processes(data):
    for lazy in (
        loaders.omniglot_drawings(data / "omniglot_small" / "images_background_small2.zip"),
        loaders.omniglot_strokes(data / "omniglot_small" / "strokes_background_small1.zip"),
        loaders.omniglot_runs(data / "omniglot_small" / "one_shot_all_runs.zip"),
        loaders.spoken_digits(data / "audio_fsdd" / "recordings.zip"),
    ):
        before, after = lazy[-1], pickle.loads(pickle.dumps(lazy))[-1]
        for name, value in vars(before).items():
            np.testing.assert_equal(getattr(after, name), value)


# Series


def test_spoken_digits(data):
    clips = loaders.spoken_digits(data / "audio_fsdd" / "recordings.zip")
    assert len(clips) == 720
    clip = clips[0]
    assert (clip.digit, clip.speaker, clip.take, clip.rate) == (0, "george", 0, 8000)
    assert clip.wave.dtype == np.float32
    assert 0.05 < np.abs(clip.wave).max() <= 1


def test_sounds_by_hand(tmp_path):
    path = tmp_path / "7_ann_3.wav"
    for channels in (1, 2):
        with wave.open(str(path), "wb") as sound:
            sound.setnchannels(channels)
            sound.setsampwidth(2)
            sound.setframerate(8000)
            sound.writeframes(np.array([0, 16384, -32768, 1], "<i2").tobytes())
        if channels == 1:
            (clip,) = loaders.spoken_digits(tmp_path)
            np.testing.assert_allclose(clip.wave, [0, 0.5, -1, 1 / 32768])
            assert (clip.digit, clip.speaker, clip.take) == (7, "ann", 3)
    with refused("7_ann_3.wav: 2 channels of 16 bits"):
        loaders.spoken_digits(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:20])
    with refused("7_ann_3.wav: not a whole WAV file"):
        loaders.spoken_digits(tmp_path)[0]
    path.unlink()
    with refused("no files such as 7_jackson_0.wav"):
        loaders.spoken_digits(tmp_path)


def record(folder: Path, units: np.ndarray, marks: bytes, header: str | None = None) -> Path:
    """A WFDB record of two leads, written by the format's description."""
    a, b = (units % 4096).astype(np.int64).T
    packed = np.stack([a & 255, a >> 8 | (b >> 8) << 4, b & 255], -1).astype(np.uint8)
    (folder / "100.dat").write_bytes(packed.tobytes())
    leads = [f"100.dat 212 200 11 1024 0 {lead.sum() % 65536} 0 {name}" for lead, name in zip(units.T, ("I", "V5"))]
    lines = [f"100 2 360 {len(units)}", *leads]
    write(folder / "100.hea", header or "\n".join(["# a comment", *lines]) + "\n")
    (folder / "100.atr").write_bytes(marks)
    return folder


def mark(code: int, value: int) -> bytes:
    return (code << 10 | value).to_bytes(2, "little")


END = b"\0\0"


def test_a_heart_by_hand(tmp_path):
    units = np.array([[1024, 1224], [824, 1024], [-1, 2047], [-2048, 0], *[[0, 0]] * 3000])
    skip = mark(59, 0) + (0).to_bytes(2, "little") + (2500).to_bytes(2, "little")
    marks = mark(28, 1) + mark(63, 3) + b"(N\0\0" + mark(1, 2) + mark(61, 5) + skip + mark(5, 7) + END
    ecg = loaders.mitbih(record(tmp_path, units, marks))
    np.testing.assert_allclose(ecg.signal[:4], (units[:4] - 1024) / 200, atol=1e-6)
    assert (ecg.rate, ecg.leads) == (360, ("I", "V5"))
    assert ecg.beats.tolist() == [1, 3, 2510]
    assert ecg.symbols == ("+", "N", "V")


def test_damaged_hearts(tmp_path):
    units = np.array([[5, 6], [7, 8]])
    with refused("100.atr: ends without an end mark"):
        loaders.mitbih(record(tmp_path, units, mark(1, 1)))
    with refused("100.hea: marks do not run in order"):
        loaders.mitbih(record(tmp_path, units, mark(1, 2) + END))
    with refused("100.atr, byte 0", "code 15"):
        loaders.mitbih(record(tmp_path, units, mark(15, 1) + END))
    record(tmp_path, units, END)
    assert len(loaders.mitbih(tmp_path).beats) == 0
    (tmp_path / "100.dat").write_bytes(bytes([9, 0, 6, 7, 0, 8]))
    with refused("100.dat: lead I does not have the checksum"):
        loaders.mitbih(tmp_path)
    (tmp_path / "100.dat").write_bytes(b"12345")
    with refused("100.dat: 5 bytes, but 2 samples need 6"):
        loaders.mitbih(tmp_path)
    with refused("100.hea: not a header"):
        loaders.mitbih(record(tmp_path, units, END, "100 1 360\n"))
    other = "100 2 360 2\na.dat 16 200 11 1024 0 0 0 I\na.dat 16 200 11 1024 0 0 0 V\n"
    with refused("expected two leads in one file of format 212"):
        loaders.mitbih(record(tmp_path, units, END, other))


def test_a_real_heart(data, tmp_path):
    packed = data / "ecg_mitdb100" / "mitdb_100.npz"
    ecg = loaders.mitbih(packed)
    assert ecg.signal.shape == (650_000, 2)
    assert {s: ecg.symbols.count(s) for s in set(ecg.symbols)} == {"N": 2239, "A": 33, "V": 1, "+": 1}
    beats = ecg.beats[np.array(ecg.symbols) == "N"]
    near = ecg.signal[beats[1:-1], 0]  # the R wave stands out
    assert near.mean() > np.percentile(ecg.signal[:, 0], 97)
    # the same from the raw file, by the record's own header with its checksums
    with np.load(packed) as held:
        units, at, symbols = held["signal_adu"].astype(np.int64), held["beat_sample"], held["beat_symbol"]
    codes = {v: k for k, v in loaders.series._CODES.items()}
    marks = b"".join(mark(codes[s], step) for s, step in zip(symbols.tolist(), np.diff(at, prepend=0).tolist()))
    header = (data / "ecg_mitdb100" / "100.hea").read_text()
    raw = loaders.mitbih(record(tmp_path, units, marks + END, header))
    assert np.array_equal(raw.signal, ecg.signal)
    assert np.array_equal(raw.beats, ecg.beats)
    assert (raw.symbols, raw.leads, raw.rate) == (ecg.symbols, ecg.leads, ecg.rate)


def test_ett(data):
    series = loaders.ett(data / "ett")
    assert series.values.shape == (17_420, 7)
    assert series.names[-1] == "OT"
    assert set(np.diff(series.time).astype(int)) == {3600}
    assert series.values[0, 0] == pytest.approx(5.827)


def test_series_by_hand(tmp_path):
    rows = ["date,OT", "2016-07-01 00:00:00,1", "2016-07-01 01:00:00,2", "2016-07-01 03:00:00,3"]
    path = write(tmp_path / "ETTh1.csv", "\n".join(rows))
    with refused("ETTh1.csv, line 4, column date: expected even steps forward", "03:00"):
        loaders.ett(path)
    write(path, "\n".join([rows[0], rows[2], rows[1]]))
    with refused("line 3, column date: expected even steps forward"):
        loaders.ett(path)
    write(path, rows[0] + "\nyesterday,1\n")
    with refused("line 2, column date: expected a date and time", "'yesterday'"):
        loaders.ett(path)
    write(path, rows[0] + "\n2016-07-01,-\n")
    with refused("line 2, column OT: expected a number, got '-'"):
        loaders.ett(path)


# Language


def test_pope(data):
    for negatives in ("random", "popular", "adversarial"):
        asked = loaders.pope(data / "pope_coco", negatives)
        assert len(asked) == 3000
        assert sum(q.answer for q in asked) == 1500
        assert len({q.image for q in asked}) == 500


def test_pope_by_hand(tmp_path):
    good = {"question_id": 1, "image": "a.jpg", "text": "Is there an egg cup in the image?", "label": "yes"}
    path = write(tmp_path / "p.json", json.dumps(good))
    assert loaders.pope(path) == [loaders.PopeQuestion(1, "a.jpg", good["text"], "egg cup", True)]
    for change, message in (
        ({"label": "maybe"}, "field label: expected yes or no, got 'maybe'"),
        ({"text": "Any egg?"}, "field text: expected 'Is there a ... in the image?', got 'Any egg?'"),
        ({"image": 3}, "field image: expected str, got 3"),
    ):
        write(path, json.dumps(good) + "\n" + json.dumps(good | change))
        with refused("p.json, line 2", message):
            loaders.pope(path)


def test_vsr(data):
    for name, count in (("random_dev", 1097), ("random_test", 2195), ("zeroshot_dev", 340), ("zeroshot_test", 1222)):
        said = loaders.vsr(data / "vsr" / f"{name}.jsonl")
        assert len(said) == count
        assert all((s.subject is None) == name.startswith("random") for s in said)
        assert 0.4 < np.mean([s.true for s in said]) < 0.6


def test_vsr_by_hand(tmp_path):
    path = write(tmp_path / "v.jsonl", json.dumps({"image": "a", "caption": "b", "relation": "on", "label": 2}))
    with refused("v.jsonl, line 1, field label: expected 0 or 1, got 2"):
        loaders.vsr(path)


def test_xquad(data):
    asked = loaders.xquad(data / "xquad_en")
    assert len(asked) == 1190
    assert len({q.context for q in asked}) == 240
    assert all(q.context[q.start : q.start + len(q.answer)] == q.answer for q in asked)


def test_xquad_by_hand(tmp_path):
    question = {"id": "1", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 4}]}
    for answers, message in (
        ([{"text": "Ann", "answer_start": 0}], "question 0: 'Ann' does not stand at character 0"),
        ([], "question 0: no answer"),
    ):
        paragraph = {"context": "and Ann", "qas": [question | {"answers": answers}]}
        path = write(tmp_path / "x.json", json.dumps({"data": [{"title": "t", "paragraphs": [paragraph]}]}))
        with refused("x.json, data 0, paragraph 0", message):
            loaders.xquad(path)


def test_truth_statements(data):
    for path in sorted((data / "truth_statements").glob("*.csv")):
        said = loaders.truth_statements(path)
        assert len(said) > 300
        assert 0.3 < np.mean([s.true for s in said]) < 0.7
    larger = loaders.truth_statements(data / "truth_statements", "larger_than")
    assert all(s.true == (int(s.more["n1"]) > int(s.more["n2"])) for s in larger)
    cities = loaders.truth_statements(data / "truth_statements")
    assert all(s.more["city"] in s.text for s in cities)


def test_statements_by_hand(tmp_path):
    path = write(tmp_path / "s.csv", "statement,label\nSnow is white.,true\n")
    with refused("s.csv, line 2, column label: expected 0 or 1", "'true'"):
        loaders.truth_statements(path)
    with refused("no column statement; it has text, label"):
        loaders.truth_statements(write(path, "text,label\n"))


def test_published_prompts(data):
    years = loaders.greater_than_prompts(data / "circuit_prompts")
    assert len(years) == 1000
    assert all(p.corrupted[p.positions["YY"]] == "01" and len(p.changed) == 1 for p in years)
    for corruption in ("S2", "swap"):
        names = loaders.ioi_prompts(data / "circuit_prompts", corruption)
        assert len(names) == 499
        for p in names:
            assert p.changed == [p.positions["S2"]]
            assert p.words[p.positions["S1"]] == p.words[p.positions["S2"]] == p.distractors[0]
            assert p.words[p.positions["IO"]] == p.answer
            assert p.words.count(p.answer) == 1
        assert all((p.corrupted[p.positions["S2"]] == p.answer) == (corruption == "swap") for p in names)


def test_damaged_prompts(tmp_path):
    years = "clean,corrupted,label\n{},The war lasted from the year 1701 to the year 17,{}\n"
    for clean, label, parts in (
        ("The war lasted from 1732", "32", ("line 2, column clean", "XX32")),
        ("The war lasted from the year 1732 to the year 17", "33", ("column clean: expected", "XX33")),
        ("The tour lasted from the year 1732 to the year 17", "32", ("column corrupted", "The tour", "'The war")),
    ):
        path = write(tmp_path / "g.csv", years.format(clean, label))
        with refused("g.csv", *parts):
            loaders.greater_than_prompts(path)
    names = "clean,corrupted,corrupted_hard\n{},So Ann met Bob. Cy gave it to,{}\n"
    for clean, hard, parts in (
        ("Ann met Bob. Bob gave it to", "Eve met Bob. Ann gave it to", ("column corrupted_hard", "one name")),
        ("Ann met Bob. Dan gave it to", "Ann met Bob. Ann gave it to", ("column clean", "Dan and Ann before word 4")),
    ):
        path = write(tmp_path / "i.csv", names.format(clean, hard))
        with refused("i.csv, line 2", *parts):
            loaders.ioi_prompts(path)
    write(path, names.format("So Ann met Bob. Bob gave it to", "So Ann met Bob. Ann gave it to"))
    (p,) = loaders.ioi_prompts(path)
    assert (p.answer, p.distractors) == (" Ann", (" Bob",))


# Gaze


@pytest.fixture(scope="module")
def readings(data):
    return loaders.webqamgaze(data / "gaze_reading_webqamgaze")


def test_reading(readings):
    assert len(readings) == 1700
    assert len({r.participant for r in readings}) == 170
    assert sum(r.task == "search" for r in readings) == 850
    for r in readings[::50]:
        assert r.boxes.shape == (len(r.words), 4)
        assert (np.diff(r.fixations[:, 2]) >= 0).all()
        for word in range(len(r.words)):
            mine = r.fixations[r.word_of_fixation == word]
            assert mine[:, 3].sum() <= r.reading_time[word] + 0.5  # one fixation may count for two words
        hit = r.word_of_fixation >= 0
        box, at = r.boxes[r.word_of_fixation[hit]], r.fixations[hit]
        beside = np.maximum(box[:, :2] - at[:, :2], at[:, :2] - box[:, 2:]).max(-1)
        assert np.nanmedian(beside) < 25
    without = [r for r in readings if np.isnan(r.boxes).any()]
    assert {r.text_id for r in without} == {"a_Rhine_3"}
    answered = [r for r in readings if r.task == "search" and r.answer.any()]
    assert len(answered) > 600
    # whoever knows the question looks at its answer for longer
    ratio = [r.reading_time[r.answer].mean() / r.reading_time.mean() for r in answered if r.reading_time.any()]
    assert np.mean(ratio) > 1.2


GAZE = {
    "words": "participant,set,text_id,word_pos,word_id,trt_ms,fix_order,spans\n"
    "p1,A,t,0,to_0,30,0 2,q\np1,A,t,1,be_or_0,9,2,\np1,A,t,2,to_1,0,,q\n",
    "fixations": "participant,text_id,x,y,t_ms,dur_ms\np1,t,1,2,0,10\np1,t,50,2,20,7\np1,t,1,3,40,20\n",
    "word_boxes": "set,text,word,counter,x,y,width,height\nB,t,to,0,0,1,9,4\nB,t,be_or,0,10,1,9,4\n",
    "texts": "stimulus,trial_name,correct_answer\nto be_or to,t,\nWhat?,q,to\n",
    "trials": "participant,set,text_id,condition,question_id,correct,webcam_hz\np1,A,t,is,q,1.0,30\n",
}


def gaze(folder: Path, **changes: tuple[str, str]) -> Path:
    for name, content in GAZE.items():
        write(folder / f"{name}_en.csv.gz", content.replace(*changes.get(name, ("", ""))))
    return folder


def test_reading_by_hand(tmp_path):
    (r,) = loaders.webqamgaze(gaze(tmp_path))
    assert r.words == ("to", "be_or", "to")
    assert r.boxes[:2].tolist() == [[0, 1, 9, 5], [10, 1, 19, 5]]
    assert np.isnan(r.boxes[2]).all()
    assert r.word_of_fixation.tolist() == [0, -1, 0]
    assert r.reading_time.tolist() == [30, 9, 0]
    assert r.answer.tolist() == [True, False, True]
    assert (r.task, r.question, r.expected, r.correct, r.webcam_hz) == ("search", "What?", "to", True, 30)
    # a page of the set's own is preferred, though another has more of the words
    own = gaze(tmp_path, word_boxes=("B,t,to,0,0", "A,t,to,0,5,1,9,4\nB,t,to,0,0"))
    (r,) = loaders.webqamgaze(own)
    assert r.boxes[0].tolist() == [5, 1, 14, 5]
    assert np.isnan(r.boxes[1]).all()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"words": ("0 2", "0 3")}, ("words_en.csv.gz, line 2, column fix_order: expected numbers below 3", "'0 3'")),
        ({"trials": (",q,", ",x,")}, ("trials_en.csv.gz, line 2, column question_id", "'x'")),
        ({"trials": (",is,", ",us,")}, ("column condition: expected nr or is, got 'us'",)),
        ({"fixations": ("dur_ms", "ms")}, ("fixations_en.csv.gz: no column dur_ms",)),
    ],
)
def test_damaged_reading(tmp_path, change, parts):
    with refused(*parts):
        loaders.webqamgaze(gaze(tmp_path, **change))


def test_searching(data):
    interiors = loaders.visual_search(data / "gaze_search_interiors")
    assert len(interiors) == 7313
    assert sum(t.durations is None for t in interiors) == 1599
    assert {t.allowed for t in interiors} == {3, 5, 9, 13}
    hybrid = loaders.visual_search(data / "gaze_search_hybrid")
    assert all(t.target in t.memory and t.durations is None for t in hybrid)
    assert {len(t.memory) for t in hybrid} == {1, 2, 4}
    for folder, trials in (("gaze_search_interiors", interiors), ("gaze_search_hybrid", hybrid)):
        scenes = {s.image: s for s in loaders.search_scenes(data / folder)}
        for t in trials[::37]:
            scene = scenes[t.image]
            assert t.size == scene.size
            assert t.target_box.tolist() in scene.boxes.tolist()
            assert (t.fixations >= 0).all()
            assert (t.fixations <= t.size).all()
            if folder.endswith("hybrid"):
                assert len(scene.things) == 16
                assert scene.things[scene.boxes.tolist().index(t.target_box.tolist())] == t.target
        ends = [(t.found, np.abs(t.fixations[-1] - (t.target_box[:2] + t.target_box[2:]) / 2).max()) for t in trials]
        near = {found: np.median([far for f, far in ends if f == found]) for found in (True, False)}
        assert near[True] < 60 < 150 < near[False]


TRIAL = {
    "X": [1, 2.5],
    "Y": [3, 4],
    "T": [100, 200],
    "target_bbox": [10, 20, 30, 50],
    "target_found": True,
    "target_object": "TBD",
    "image_width": 100,
    "image_height": 80,
    "max_fixations": 5,
}


def test_search_by_hand(tmp_path):
    path = write(tmp_path / "scanpaths.json.gz", json.dumps({"s1": {"a.jpg": TRIAL}}))
    (t,) = loaders.visual_search(tmp_path)
    assert (t.subject, t.image, t.size, t.target, t.found, t.allowed) == ("s1", "a.jpg", (100, 80), None, True, 5)
    assert t.fixations.tolist() == [[1, 3], [2.5, 4]]
    assert t.durations.tolist() == [100, 200]
    assert t.target_box.tolist() == [20, 10, 50, 30]  # the file has rows first
    for change, message in (
        ({"Y": [1]}, "scanpaths.json.gz, s1, a.jpg: 2 numbers in X, but 1 in Y"),
        ({"target_bbox": [1, 2, 3]}, "field target_bbox: expected 4 numbers, got 3"),
        ({"target_bbox": [30, 20, 10, 50]}, "a box without area: rows 30 to 10"),
        ({"target_found": 1}, "field target_found: expected bool, got 1"),
    ):
        write(path, json.dumps({"s1": {"a.jpg": TRIAL | change}}))
        with refused(message):
            loaders.visual_search(tmp_path)
    write(tmp_path / "set" / "human_scanpaths" / "subj07_scanpaths.json", json.dumps({"a.jpg": TRIAL}))
    (t,) = loaders.visual_search(tmp_path / "set")
    assert t.subject == "subj07_scanpaths"
    write(tmp_path / "trials_properties.json", json.dumps([{"image": "a.jpg"}]))
    with refused("trials_properties.json, scene 0: no field target_object"):
        loaders.search_scenes(tmp_path)


# Tables


def test_bandit(data):
    for policy, campaign, clicks in (("random", "men", 46), ("bts", "women", 46), ("bts", "men", 69)):
        log = loaders.open_bandit(data / "reco_openbandit", policy, campaign)
        items = {"men": 34, "women": 46}[campaign]
        assert log.affinity.shape == (10_000, items)
        assert log.click.sum() == clicks
        assert set(log.item) == set(range(items))
        assert (np.diff(log.time) >= np.timedelta64(0)).all()
        assert log.user.shape == (10_000, 4)
        assert log.item_features.shape == (items, 3)
        if policy == "random":
            np.testing.assert_allclose(log.propensity, 1 / items)


def bandit(folder: Path, row: str) -> Path:
    hashed = ",".join(f"user_feature_{i}" for i in range(4))
    head = f"timestamp,item_id,position,click,propensity_score,{hashed},user-item_affinity_0,user-item_affinity_1\n"
    write(folder / "random" / "all" / "all.csv", head + row)
    items = "item_id,item_feature_0,item_feature_1,item_feature_2,item_feature_3\n0,0.5,a,b,c\n1,-1,d,e,f\n"
    write(folder / "random" / "all" / "item_context.csv", items)
    return folder


def test_bandit_by_hand(tmp_path):
    good = "2019-11-24 00:00:20.123456+00:00,1,3,1,0.25,u,v,w,x,0,2\n"
    log = loaders.open_bandit(bandit(tmp_path, good), "random", "all")
    assert (log.item[0], log.position[0], log.click[0], log.propensity[0]) == (1, 3, True, 0.25)
    assert log.time[0] == np.datetime64("2019-11-24T00:00:20.123456")
    assert log.user.tolist() == [["u", "v", "w", "x"]]
    assert log.affinity.tolist() == [[0, 2]]
    assert log.item_value.tolist() == [0.5, -1]
    assert log.item_features[1].tolist() == ["d", "e", "f"]
    for old, new, parts in (
        (",1,3,", ",2,3,", ("all.csv, line 2, column item_id: expected 0 to 1, got '2'",)),
        (",1,3,", ",1,0,", ("column position: expected 1 to 3, got '0'",)),
        (",0.25,", ",0,", ("column propensity_score: expected a probability above 0",)),
        (",3,1,", ",3,7,", ("column click: expected 0 or 1, got '7'",)),
    ):
        with refused(*parts):
            loaders.open_bandit(bandit(tmp_path, good.replace(old, new)), "random", "all")


def test_brains(data):
    rdms = loaders.brain_rdms(data / "brain_92objects")
    assert rdms.monkey.shape == rdms.human.shape == (92, 92)
    assert rdms.human_sessions.shape == (4, 2, 92, 92)
    assert rdms.judged.shape == (16, 92, 92)
    upper = np.triu_indices(92, 1)
    assert np.corrcoef(rdms.monkey[upper], rdms.human[upper])[0, 1] == pytest.approx(0.49, abs=0.05)
    np.testing.assert_allclose(rdms.human_sessions.mean((0, 1))[upper], rdms.human[upper], atol=0.3)
    animate = rdms.groups["animate"]
    within, across = rdms.human[np.ix_(animate, animate)], rdms.human[np.ix_(animate, ~animate)]
    assert within.sum() / (48 * 47) < across.mean() - 0.05
    assert {c for c, face in zip(rdms.category, rdms.groups["face"]) if face} == {"human face", "nonhuman face"}


def test_brains_by_hand(tmp_path):
    held = {
        "monkey_IT_rdm": np.array([1.0, 2, 3]),
        "human_IT_rdm": np.array([1.0, 2, 3]),
        "human_IT_rdm_subject_session": np.zeros((4, 2, 3, 3)),
        "behaviour_rdm_subject": np.zeros((16, 3, 3)),
        "category": np.array(["a", "b", "c"]),
        "category_vectors": np.eye(3, dtype=np.uint8),
        "category_labels": np.array(["x", "y", "z"]),
    }
    path = tmp_path / "brain_92objects.npz"
    np.savez(path, **held)
    assert loaders.brain_rdms(path).monkey.tolist() == [[0, 1, 2], [1, 0, 3], [2, 3, 0]]
    for name, value, message in (
        ("human_IT_rdm", np.zeros(4), "human_IT_rdm: shape (4,) does not fit 3 objects"),
        ("behaviour_rdm_subject", np.triu(np.ones((3, 3)), 1), "behaviour_rdm_subject: not symmetric"),
        ("monkey_IT_rdm", np.eye(3), "monkey_IT_rdm: not symmetric with 0 on the diagonal"),
        ("monkey_IT_rdm", np.full(3, np.nan), "monkey_IT_rdm: not symmetric"),
    ):
        np.savez(path, **held | {name: value})
        with refused(message):
            loaders.brain_rdms(path)
