"""Fixations of people's own files: what is guessed, what is refused, and that nothing goes missing."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from regard.data.loaders import DataError
from regard.gaze import GazeData, GazeTrial, Scanpath, read

SCREEN = (800, 600)
HEADER = ["subject", "stimulus", "x", "y", "duration"]
ROWS = [["p1", "cat", 10, 20, 200], ["p1", "cat", 30, 40, 250], ["p2", "cat", 50, 60, 300]]


def table(folder: Path, rows=ROWS, header=HEADER, *, separator=",", name="a.csv", encoding="utf-8") -> Path:
    lines = [separator.join(map(str, row)) for row in [header, *rows]]
    (folder / name).write_text("\n".join(lines) + "\n", encoding=encoding)
    return folder / name


def alike(one: GazeData, two: GazeData) -> bool:
    def plain(data: GazeData) -> list:
        return sorted(
            (
                *(t.subject, t.stimulus, t.trial, t.scanpath.places.tolist(), t.scanpath.size),
                None if t.scanpath.durations is None else tuple(t.scanpath.durations),
            )
            for t in data
        )

    return plain(one) == plain(two)


names = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=6).map(
    lambda name: "s" + name
)
number = st.floats(0, 599, allow_nan=False).map(float)


@st.composite
def data(draw) -> GazeData:
    keys = draw(st.lists(st.tuples(names, names), min_size=1, max_size=4, unique=True))
    trials = []
    for i, (subject, stimulus) in enumerate(keys):
        places = draw(st.lists(st.tuples(number, number), min_size=1, max_size=5))
        durations = draw(st.lists(st.floats(50, 400), min_size=len(places), max_size=len(places)))
        starts = np.cumsum([0.0, *durations[:-1]]) + 10 * np.arange(len(places))
        path = Scanpath(np.array([(5.0, 500.0), *places[1:]]), SCREEN, np.array(durations))
        trials.append(GazeTrial(subject, stimulus, str(i), path, starts))
    return GazeData(tuple(trials))


quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(data())
def test_what_is_written_is_read(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("gaze") / "a.csv"
    made.write(path)
    assert alike(read(path, screen=SCREEN, units="pixels", time="ms"), made)


@quick
@given(data(), st.randoms(use_true_random=False), st.sampled_from("\t;|"), st.booleans(), st.booleans())
def test_order_of_columns_and_rows_separator_and_comma_do_not_matter(tmp_path_factory, made, random, sign, comma, mark):
    folder = tmp_path_factory.mktemp("gaze")
    made.write(folder / "a.csv")
    with (folder / "a.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    order = random.sample(range(len(header)), len(header))
    random.shuffle(rows)
    if comma:
        rows = [
            [cell.replace(".", ",") if header[i] in [*HEADER[2:], "start"] else cell for i, cell in enumerate(row)]
            for row in rows
        ]
    mixed = [[row[i] for i in order] for row in rows]
    path = table(
        folder,
        mixed,
        [header[i] for i in order],
        separator=sign,
        name="b.csv",
        encoding="utf-8-sig" if mark else "utf-8",
    )
    found = read(path, screen=SCREEN, time="ms", decimal="," if comma else ".")
    assert alike(found, made)


@quick
@given(
    st.integers(0, 19),
    st.sampled_from(
        [
            ("x", ""),
            ("x", "left"),
            ("y", "NA"),
            ("y", "inf"),
            ("duration", "-5"),
            ("duration", "1_0"),
            ("subject", ""),
            ("stimulus", "nan"),
        ]
    ),
)
def test_a_broken_row_is_named_and_the_others_are_read(tmp_path_factory, at, broken):
    column, cell = broken
    rows = [[f"p{i % 2}", "cat", 10 + i, 20 + 3 * i, 200] for i in range(20)]
    rows.sort()
    rows[at][HEADER.index(column)] = cell
    path = table(tmp_path_factory.mktemp("gaze"), rows)
    with pytest.raises(DataError, match=rf"a\.csv, line {at + 2}, column {column}: .*keep_going=True"):
        read(path, screen=SCREEN)
    found = read(path, screen=SCREEN, keep_going=True)
    assert [(one.line, one.column) for one in found.left_out] == [(at + 2, column)]
    assert sum(len(t.scanpath) for t in found) == 19
    assert "1 rows were left out" in str(found)


def test_guesses_are_told(tmp_path):
    header = [
        "RECORDING_SESSION_LABEL",
        "TRIAL_INDEX",
        "image",
        "CURRENT_FIX_X",
        "CURRENT_FIX_Y",
        "CURRENT_FIX_DURATION",
    ]
    rows = [["s1", 1, "cat.jpg", "10,5", "20", "0,2"], ["s1", 1, "cat.jpg", "30", "900", "0,3"]]
    found = read(table(tmp_path, rows, header, separator="\t", encoding="utf-16"), screen=SCREEN)
    said = str(found)
    for part in (
        "separated by tabs",
        "x = 'CURRENT_FIX_X'",
        "decimal comma",
        "times are taken for s",
        "utf-16",
        "1 fixations (50.0%) lie outside",
    ):
        assert part in said
    (trial,) = found
    assert trial.scanpath.places.tolist() == [[10.5, 20], [30, 900]]
    assert trial.scanpath.durations.tolist() == [200, 300]
    assert trial.trial == "1"


def test_columns_can_be_said(tmp_path):
    path = table(tmp_path, header=["Vp", "Bild", "links", "oben", "dauer"])
    with pytest.raises(DataError, match="no column for x and y was recognised among Vp, Bild"):
        read(path, screen=SCREEN)
    said = {"subject": "Vp", "stimulus": "Bild", "x": "links", "y": "oben", "duration": "dauer"}
    assert alike(read(path, columns=said, screen=SCREEN), read(table(tmp_path, name="b.csv"), screen=SCREEN))
    with pytest.raises(DataError, match=r"no column 'lnks' for x; .*did you mean 'links'"):
        read(path, columns=said | {"x": "lnks"}, screen=SCREEN)
    with pytest.raises(ValueError, match=r"no role 'durations'.*did you mean duration"):
        read(path, columns={"durations": "dauer"}, screen=SCREEN)
    none = read(table(tmp_path, name="b.csv"), columns={"duration": None}, screen=SCREEN)
    assert none.trials[0].scanpath.durations is None


def test_units(tmp_path):
    # by hand: 57.29 cm away, 1 degree is 1.0000 cm, and 80 cm are 800 pixels: 10 pixels
    cm = {"distance": 1 / math.tan(math.radians(1)), "screen_cm": (80, 60)}
    path = table(tmp_path, [["p", "cat", 0, 0, 200], ["p", "cat", 1, -1, 200]])
    found = read(path, units="degrees", screen=SCREEN, **cm)
    assert found.trials[0].scanpath.places == pytest.approx(np.array([[400, 300], [410, 290]]))
    assert found.degree == pytest.approx(10)
    up = read(path, units="degrees", screen=SCREEN, up=True, **cm)
    assert up.trials[0].scanpath.places[1] == pytest.approx([410, 310])
    share = read(table(tmp_path, [["p", "cat", 0.5, 0.25, 200]]), units="share", screen=SCREEN)
    assert share.trials[0].scanpath.places.tolist() == [[400, 150]]
    centred = read(table(tmp_path, [["p", "cat", -100, 50, 200]]), origin="centre", up=True, screen=SCREEN)
    assert centred.trials[0].scanpath.places.tolist() == [[300, 250]]
    with pytest.raises(ValueError, match="units='degrees' need screen"):
        read(path, units="degrees", screen=SCREEN)
    path = table(tmp_path, [["p", "cat", 0, 0, 200], ["p", "cat", 1, -1, 200]])
    with pytest.raises(DataError, match=r"columns x and y: all 2 lie within 1 pixels; say units="):
        read(path, screen=SCREEN)
    far = table(tmp_path, [["p", "cat", -100, -50, 200], ["p", "cat", -30, 80, 200]])
    with pytest.raises(DataError, match=r"columns x and y: 100% of the fixations lie outside the screen of 800 x 600"):
        read(far, screen=SCREEN)


def test_the_screen_is_that_of_the_picture_where_none_is_said(tmp_path):
    Image.new("RGB", (70, 90)).save(tmp_path / "Cat.png")
    found = read(table(tmp_path), stimulus_folder=tmp_path)
    assert found.trials[0].scanpath.size == (70, 90)
    assert found.picture("cat").size == (70, 90)
    with pytest.raises(ValueError, match=r"screen=\(width, height\) in pixels is needed"):
        read(table(tmp_path))


def test_times(tmp_path):
    header = [*HEADER[:4], "start", "end"]
    rows = [["p", "cat", 1, 2, 300, 500], ["p", "cat", 30, 40, 0, 250]]
    found = read(table(tmp_path, rows, header), screen=SCREEN)
    assert found.trials[0].scanpath.durations.tolist() == [250, 200]
    assert found.trials[0].starts.tolist() == [0, 300]
    assert "put in order of start" in str(found)
    rows[0][4] = 200
    with pytest.raises(DataError, match="line 2, column start: begins at 200 ms, before the fixation of line 3 ends"):
        read(table(tmp_path, rows, header), screen=SCREEN)
    rows[0][4:] = [600, 500]
    with pytest.raises(DataError, match="line 2, column end: a duration of -100 ms is below 0"):
        read(table(tmp_path, rows, header), screen=SCREEN)
    samples = [["p", "cat", 100 + i % 50, 40, 4 * i] for i in range(200)]
    with pytest.raises(DataError, match="column t: a row every 4 ms is a raw sample"):
        read(table(tmp_path, samples, [*HEADER[:4], "t"]), screen=SCREEN)


def test_cells_names_and_places(tmp_path):
    with pytest.raises(DataError, match=r"line 4: 3 cells, expected 5"):
        read(table(tmp_path, [*ROWS[:2], ["p2", "cat", 5]]), screen=SCREEN)
    with pytest.raises(DataError, match="no column says who looked"):
        read(table(tmp_path, [r[1:] for r in ROWS], HEADER[1:]), screen=SCREEN)
    assert read(table(tmp_path, [r[1:] for r in ROWS], HEADER[1:]), screen=SCREEN, subject="me").subjects == ("me",)
    with pytest.raises(DataError, match=r"'p1' looking at 'cat' stand in two places \(lines 3 and 5\)"):
        read(table(tmp_path, [*ROWS, ["p1", "cat", 9, 9, 100]]), screen=SCREEN)
    (tmp_path / "latin.csv").write_bytes("subject,stimulus,x,y\np,Käfer,1,2\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"latin\.csv, line 2: not utf-8 text; say which"):
        read(tmp_path / "latin.csv", screen=SCREEN)
    assert read(tmp_path / "latin.csv", screen=SCREEN, encoding="cp1252").stimuli == ("Käfer",)
    both = table(tmp_path, [[*r, kind] for r, kind in zip(ROWS, ("fix", "fix", "blink"))], [*HEADER, "event"])
    only = read(both, screen=SCREEN, only={"event": "fix"})
    assert only.subjects == ("p1",)
    assert "1 rows were set aside" in str(only)
    with pytest.raises(DataError, match="column event: never 'saccade'; it has fix, blink"):
        read(both, screen=SCREEN, only={"event": "saccade"})


def test_a_folder_of_files_of_one_person_each(tmp_path):
    for name in ("anna", "ben"):
        table(tmp_path, [row[1:] for row in ROWS[:2]], HEADER[1:], name=f"{name}.csv")
    found = read(tmp_path, screen=SCREEN)
    assert found.subjects == ("anna", "ben")
    assert "named by their files" in str(found)
    assert found.only(subjects=["ben"]).subjects == ("ben",)
    with pytest.raises(KeyError, match="no subject 'bem'; did you mean ben"):
        found.only(subjects=["bem"])
    assert [len(t.scanpath) for t in found.later(1)] == [1, 1]
    assert len(found.later(2)) == 0


ASC = """** CONVERTED FROM p7.edf
MSG\t90 DISPLAY_COORDS 0 0 1279 719
EFIX L 95 99 5 640.0 360.0 900
MSG\t100 TRIALID 1
MSG\t101 !V IMGLOAD CENTER images/cat.jpg
START\t101 LEFT EVENTS
EFIX L   110 309 200   640.5   360.2   900
ESACC L  310 330 21 640.5 360.2 100 50 9.1 300
EFIX L   331 580 250   100.0    50.0   900
MSG\t700 TRIAL_RESULT 0
MSG\t800 TRIALID 2
EFIX L   810 909 100   300.0   200.0   900
MSG\t950 !V TRIAL_VAR image dog.jpg
"""


def test_eyelink(tmp_path):
    path = tmp_path / "p7.asc"
    path.write_text(ASC)
    found = read(path)
    assert [(t.subject, t.stimulus, t.trial) for t in found] == [("p7", "cat.jpg", "1"), ("p7", "dog.jpg", "2")]
    first = found.trials[0]
    assert first.scanpath.size == (1280, 720)
    assert first.scanpath.places.tolist() == [[640.5, 360.2], [100, 50]]
    assert first.scanpath.durations.tolist() == [200, 250]
    assert first.starts.tolist() == [10, 231]
    assert "1 fixations before the first trial were set aside" in str(found)
    path.write_text(ASC.replace("100.0    50.0", ".    ."))
    with pytest.raises(DataError, match=r"p7\.asc, line 9, column x: missing, got '\.'"):
        read(path)
    path.write_text(ASC.replace("EFIX L   810", "EFIX R   810"))
    with pytest.raises(DataError, match="both eyes were recorded"):
        read(path)
    assert read(path, eye="right").stimuli == ("dog.jpg",)
    path.write_text(ASC.replace("IMGLOAD", "SHOW"))
    with pytest.raises(DataError, match="line 7: no message says what trial '1' showed; say stimulus_message="):
        read(path)
    assert read(path, stimulus_message=r"(\w+\.jpg)").stimuli == ("cat.jpg", "dog.jpg")
    path.write_text("MSG\t1 TRIALID 1\n" + "".join(f"{i}\t640.1\t360.0\t900\n" for i in range(50)))
    with pytest.raises(DataError, match=r"50 raw samples and no fixations.*pymovements"):
        read(path)


def test_a_known_set_takes_no_columns(tmp_path):
    (tmp_path / "scanpaths.json").write_text("{}")
    with pytest.raises(ValueError, match="leave out columns, screen"):
        read(tmp_path, columns={"x": "a"}, screen=SCREEN)
