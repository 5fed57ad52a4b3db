"""Scanpaths, and the metrics that compare them with each other and with maps."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regard import catalog
from regard.data import loaders
from regard.gaze import Scanpath
from regard.gaze._align import best, cells
from regard.gaze.auc_judd import auc_judd
from regard.gaze.cc import cc
from regard.gaze.fixation_map import fixation_map
from regard.gaze.information_gain import information_gain
from regard.gaze.kl import kl
from regard.gaze.multimatch import multimatch
from regard.gaze.nss import nss
from regard.gaze.scanmatch import scanmatch
from regard.gaze.sequence_score import clusters, sequence_score
from regard.gaze.string_edit import string_edit

SIZE = (1200, 800)
METRICS = (
    "auc_judd",
    "cc",
    "fixation_map",
    "information_gain",
    "kl",
    "multimatch",
    "nss",
    "scanmatch",
    "sequence_score",
    "string_edit",
)


def path(*places: tuple[float, float], size=SIZE, ms=None) -> Scanpath:
    return Scanpath(np.array(places, float).reshape(-1, 2), size, None if ms is None else np.array(ms, float))


def random_path(rng: np.random.Generator, n: int) -> Scanpath:
    return Scanpath(rng.uniform((0, 0), SIZE, (n, 2)), SIZE, rng.uniform(50, 500, n))


def test_the_catalog_finds_them():
    assert set(METRICS) <= set(catalog.methods("gaze"))


# The type


def test_a_scanpath_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"finite numbers \[fixation, 2\]"):
        Scanpath(np.zeros(3), SIZE)
    with pytest.raises(ValueError, match="finite"):
        path((math.nan, 0))
    with pytest.raises(ValueError, match=r"0 or more a fixation: got \(1,\) for 2"):
        path((0, 0), (1, 1), ms=[3])
    with pytest.raises(ValueError, match="one pixel wide"):
        path((0, 0), size=(0, 5))


@pytest.mark.skipif("REGARD_DATA" not in os.environ, reason="REGARD_DATA names no folder of public data")
def test_loaders_give_scanpaths():
    trial = loaders.visual_search(f"{os.environ['REGARD_DATA']}/gaze_search_interiors")[0]
    assert isinstance(trial.scanpath, Scanpath)
    assert trial.scanpath.size == (1024, 768)
    assert trial.scanpath.durations is trial.durations
    reading = loaders.webqamgaze(f"{os.environ['REGARD_DATA']}/gaze_reading_webqamgaze")[0]
    assert len(reading.scanpath) == len(reading.fixations)
    assert reading.scanpath.durations.sum() == reading.fixations[:, 3].sum()


# Sequences


def test_alignment_against_every_alignment():
    rng = np.random.default_rng(0)

    def slow(score, gap):
        n, m = score.shape
        if not n or not m:
            return gap * (n + m)
        return max(score[0, 0] + slow(score[1:, 1:], gap), gap + slow(score[1:], gap), gap + slow(score[:, 1:], gap))

    for gap in (0.0, -0.7, -2.0):
        score = rng.normal(size=(4, 5))
        assert best(score, gap) == pytest.approx(slow(score, gap))


def test_cells_of_a_grid():
    found = cells(path((0, 0), (1199, 799), (1200, 800), (-50, 400), (600, 399)), 12, 8)
    assert found.tolist() == [[0, 0], [11, 7], [11, 7], [0, 4], [6, 3]]


def test_string_edit_by_hand():
    assert string_edit("abc", "abc") == 1
    assert string_edit("abc", "xyz") == 0
    assert string_edit("abc", "abcd") == pytest.approx(0.75)
    # cells 0 and 4 of the first row, against 0, 4 of the last row, and 4 of the first: one is added
    assert string_edit(path((10, 10), (1190, 10)), path((10, 10), (1190, 790), (1190, 10))) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="got one of each"):
        string_edit("abc", path((1, 1)))
    with pytest.raises(ValueError, match="empty"):
        string_edit("", "a")


def test_sequence_score_by_hand():
    assert sequence_score([3, 3, 7], [3, 7, 7]) == pytest.approx(2 / 3)
    assert sequence_score("ab", "ba") == 0.5
    centres = np.array([[0.0, 0.0], [1000.0, 0.0]])
    assert sequence_score(path((10, 10), (990, 5)), path((80, 0), (20, 0), (900, 0)), centres=centres) == pytest.approx(
        2 / 3
    )
    with pytest.raises(ValueError, match="centres"):
        sequence_score(path((1, 1)), path((1, 1)))


def test_clusters_find_two_heaps():
    rng = np.random.default_rng(0)
    heaps = rng.normal(0, 5, (40, 2)) + np.repeat([[100, 100], [900, 500]], 20, axis=0)
    found = clusters([Scanpath(heaps, SIZE)], bandwidth=100)
    assert sorted(found.round(-2).tolist()) == [[100, 100], [900, 500]]


def test_scanmatch_by_hand():
    """Cells of 100 pixels. One apart scores 3.5 - 1; four apart -0.5, so that leaving both out is better."""
    a = path((50, 50), (450, 50))
    assert scanmatch(a, path((50, 50), (550, 50))) == pytest.approx((3.5 + 2.5) / 7)
    assert scanmatch(a, path((50, 50), (850, 50))) == pytest.approx(3.5 / 7)
    assert scanmatch(a, path((50, 50), (850, 50)), gap=-1.0) == pytest.approx((3.5 - 0.5) / 7)
    diagonal = path((150, 150), (450, 50))
    assert scanmatch(a, diagonal) == pytest.approx((3.5 - math.sqrt(2) + 3.5) / 7)


def test_scanmatch_with_durations():
    """Bins of 50 ms: AAAB against AB; AB is in both, of 4."""
    a, b = path((50, 50), (1150, 750), ms=[150, 60]), path((50, 50), (1150, 750), ms=[49, 50])
    assert scanmatch(a, b, bin=50) == pytest.approx(2 / 4)
    assert scanmatch(a, b) == 1
    with pytest.raises(ValueError, match="lacks"):
        scanmatch(a, path((50, 50)), bin=50)
    with pytest.raises(ValueError, match="half a bin"):
        scanmatch(a, path((50, 50), ms=[10]), bin=50)
    with pytest.raises(ValueError, match="one screen"):
        scanmatch(a, path((50, 50), size=(10, 10)))


def test_multimatch_by_hand():
    """The same right angle, moved by (30, 40) on a screen with a diagonal of 500, and turned by a quarter."""
    a = path((0, 0), (100, 0), (100, 100), size=(300, 400), ms=[100, 200, 50])
    b = path((30, 40), (130, 40), (130, 140), size=(300, 400), ms=[200, 200, 900])
    assert multimatch(a, b) == pytest.approx((1, 1, 1, 1 - 50 / 500, 1 - 0.25))  # durations: median of 1/2 and 0
    right, down = path((0, 0), (10, 0), (20, 0), size=(300, 400)), path((0, 0), (0, 10), (0, 20), size=(300, 400))
    found = multimatch(right, down)
    assert found.direction == pytest.approx(0.5)
    assert found.shape == pytest.approx(1 - math.hypot(10, 10) / 1000)
    assert found.length == 1
    assert math.isnan(found.duration)
    assert all(map(math.isnan, multimatch(a, path((0, 0), (1, 1), size=(300, 400)))))


def test_multimatch_equals_the_package():
    """Values of multimatch-gaze 0.1.3 on these paths."""
    rng = np.random.default_rng(0)

    def drawn(n):
        x, y, seconds = rng.uniform(0, 1280, n), rng.uniform(0, 1024, n), rng.uniform(0.1, 0.5, n)
        return Scanpath(np.stack([x, y], 1), (1280, 1024), 1000 * seconds)

    expected = (0.8649478332392517, 0.8108725112067806, 0.8584867252248595, 0.8183218008030761, 0.5531866251559291)
    assert multimatch(drawn(10), drawn(8)) == pytest.approx(expected, rel=1e-9)


def test_multimatch_against_the_package():
    package = pytest.importorskip("multimatch_gaze")
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = random_path(rng, int(rng.integers(3, 12))), random_path(rng, int(rng.integers(3, 12)))
        theirs = [np.rec.fromarrays([*p.places.T, p.durations], names="start_x,start_y,duration") for p in (a, b)]
        assert multimatch(a, b) == pytest.approx(package.docomparison(*theirs, SIZE), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 12), st.integers(3, 12))
def test_what_every_scanpath_metric_keeps(seed, n, m):
    """Symmetric, 1 for a path and itself, and within 0 and 1."""
    rng = np.random.default_rng(seed)
    a, b = random_path(rng, n), random_path(rng, m)
    for metric in (string_edit, scanmatch, lambda p, q: multimatch(p, q).position, lambda p, q: multimatch(p, q).shape):
        assert metric(a, a) == pytest.approx(1)
        assert metric(a, b) == pytest.approx(metric(b, a))
        assert -1e-12 <= metric(a, b) <= 1 + 1e-12


# Maps


def test_nss_by_hand():
    """Values 0, 0, 0, 4: mean 1, standard deviation sqrt(3)."""
    a_map = np.array([[0.0, 0.0], [0.0, 4.0]])
    seen = path((700, 500), (100, 100), (5000, 0))  # the last is outside
    assert nss(a_map, seen) == pytest.approx((3 - 1) / math.sqrt(3) / 2)
    assert nss(a_map, path(*[(x, y) for x in (1, 601) for y in (1, 401)])) == pytest.approx(0)
    with pytest.raises(ValueError, match="same everywhere"):
        nss(np.ones((2, 2)), seen)
    with pytest.raises(ValueError, match="none of 1 fixations"):
        nss(a_map, path((-1, 0)))
    with pytest.raises(ValueError, match=r"\[row, column\]"):
        nss(np.ones(3), seen)


def test_auc_judd_by_hand():
    """Pixels 0 to 3. Fixated is 1: two of three others lie above, so (0, 0), (2/3, 1), (1, 1)."""
    a_map = np.arange(4.0)[None]
    assert auc_judd(a_map, path((400, 5))) == pytest.approx(1 / 3 + 1 / 3)
    # 3 and 1: (0, 1/2), then (1/2, 1)
    assert auc_judd(a_map, path((1000, 5), (400, 5), (400, 5))) == pytest.approx(0.375 + 0.5)
    assert auc_judd(np.ones((3, 3)), path((0, 0), (600, 400))) == 0.5
    with pytest.raises(ValueError, match="every pixel"):
        auc_judd(np.ones((1, 1)), path((0, 0)))


def test_auc_judd_is_at_chance_on_noise():
    rng = np.random.default_rng(0)
    assert auc_judd(rng.normal(size=(40, 60)), random_path(rng, 1000)) == pytest.approx(0.5, abs=0.03)


def test_information_gain_by_hand():
    even = np.ones((1, 2))
    assert information_gain(even, path((1, 1), (601, 1)), baseline=even) == 0
    gain = information_gain(np.array([[1.0, 3.0]]), path((1, 1), (601, 1)), baseline=even)
    assert gain == pytest.approx((math.log2(0.5) + math.log2(1.5)) / 2)
    assert information_gain(np.array([[0, 1]]), path((1, 1)), baseline=even) == -math.inf
    with pytest.raises(ValueError, match="baseline is 0"):
        information_gain(even, path((1, 1)), baseline=np.array([[0, 1]]))
    with pytest.raises(ValueError, match="one shape"):
        information_gain(even, path((1, 1)), baseline=np.ones((2, 2)))


def test_information_gain_is_greatest_for_the_truth():
    rng = np.random.default_rng(0)
    truth = fixation_map([random_path(rng, 30)], (8, 12), sigma=1.0) + 1e-4
    at = rng.choice(truth.size, 4000, p=truth.ravel() / truth.sum())
    drawn = Scanpath(np.stack([at % 12 * 100 + 50, at // 12 * 100 + 50], 1).astype(float), SIZE)
    gain = information_gain(truth, drawn, baseline=np.ones(truth.shape))
    assert gain > max(information_gain(truth**p, drawn, baseline=np.ones(truth.shape)) for p in (0.5, 2.0))


def test_cc_and_kl_by_hand():
    one, two = np.array([[1.0, 2.0, 3.0]]), np.array([[3.0, 2.0, 1.0]])
    assert cc(one, two) == pytest.approx(-1)
    assert cc(one, 5 * one + 2) == pytest.approx(1)
    assert cc(one, np.array([[1.0, 0.0, 1.0]])) == pytest.approx(0)
    assert kl(one, 7 * one) == pytest.approx(0)
    assert kl(two, one) == pytest.approx((1 * math.log(1 / 3) + 3 * math.log(3)) / 6)
    assert kl(np.array([[1.0, 0.0, 0.0]]), one) == math.inf
    with pytest.raises(ValueError, match="correlates with nothing"):
        cc(one, np.ones((1, 3)))
    with pytest.raises(ValueError, match="no value below 0"):
        kl(-one, one)


def test_a_map_of_fixations():
    seen = [path((50, 50), (60, 60), (2000, 0)), path((1150, 750))]
    counts = fixation_map(seen, (8, 12), sigma=0)
    assert counts[0, 0] == pytest.approx(2 / 3)
    assert counts[7, 11] == pytest.approx(1 / 3)
    smooth = fixation_map(seen, (8, 12), sigma=1.0)
    assert smooth.sum() == pytest.approx(1)
    assert 0 < smooth[0, 1] < smooth[0, 0] < counts[0, 0]
