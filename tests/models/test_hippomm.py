"""HippoMM: segments and key frames by hand, recall through time, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from regard.models.hippomm import Memory, hippomm, key_frames, levels, nearest, segment


def test_key_frames_by_hand():
    angles = np.radians([0, 20, 60, 61])
    features = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert key_frames(features).tolist() == [0, 2]  # cos 20 and cos 1 are above 0.9, cos 40 is not
    assert key_frames(features, alike=0.95).tolist() == [0, 1, 2]
    assert key_frames(np.repeat(features, 3, 0)).tolist() == [0, 6]
    assert key_frames(features[:2] * 0 + 1).tolist() == [0, 1]  # of two, all
    assert key_frames(np.empty((0, 2))).tolist() == []


def test_levels_by_hand():
    assert levels([1.0, -1.0, 0.1, 0.1, 0.0, 0.0], 4).tolist() == pytest.approx([0, -20, -100])


def test_nothing_happens():
    assert segment(np.ones(101)).tolist() == [[0, 30], [30, 60], [60, 90], [90, 100]]
    assert segment(None, np.ones(4 * 50), rate=4).tolist() == [[0, 30], [30, 50]]


def test_the_latest_change_and_the_latest_pause():
    similar = np.ones(41)
    similar[[12, 18]] = 0.5
    assert segment(similar).tolist() == [[0, 18], [18, 40]]
    similar[18] = 1
    similar[4] = 0.5
    assert segment(similar).tolist() == [[0, 12], [12, 40]]
    similar[12] = 1  # a change after four seconds: too soon
    assert segment(similar).tolist()[0] == [0, 10]
    wave = np.ones(4 * 40)
    wave[4 * 20 : 4 * 21] = 0  # two windows of half a second, the later one begins at 20.5
    similar[25] = 0.5
    assert segment(similar, wave, rate=4).tolist()[0] == [0, 20.5]  # sound has the last word
    assert segment(similar, np.ones(160), rate=4).tolist()[0] == [0, 25]


@pytest.mark.parametrize("seed", range(5))
def test_segments_touch_and_last_long_enough(seed):
    draws = np.random.default_rng(seed)
    cuts = segment(draws.uniform(0.9, 1.0, 200), draws.normal(0, draws.choice([0.001, 1.0], 1600)), rate=8)
    assert (cuts[1:, 0] == cuts[:-1, 1]).all()
    assert (cuts[0, 0], cuts[-1, 1]) == (0, 199)
    lengths = np.diff(cuts, axis=1)[:, 0]
    assert (lengths[:-1] >= 10).all()
    assert (lengths <= 30).all()


def test_nearest_by_hand():
    order, cosines = nearest([1.0, 0.0], [[0.0, 2.0], [3.0, 0.0], [1.0, 1.0]], top=2)
    assert order.tolist() == [1, 2]
    assert cosines.tolist() == pytest.approx([1, 0.5**0.5])


def told(memory: Memory):
    """Answers by what stands in the sounds that were found."""

    def answer(question, found):
        if not isinstance(found[0], tuple):
            return found, float(question == "gist")
        return [memory.events[m.event].features["sound"][at].argmax(1).tolist() for m, at in found], 0.0

    return answer


def watched(**knobs) -> Memory:
    memory = Memory(embed={"picture": np.stack, "sound": np.stack}, answer=lambda *_: (None, 0.0), **knobs)
    memory.answer = told(memory)
    seen, said = np.eye(4)[[0, 0, 1, 2, 2, 3]], np.eye(6)
    memory.watch(
        [[0, 3], [3, 6]],
        pictures=list(seen),
        picture_times=np.arange(6),
        sounds=list(said),
        sound_times=np.arange(6) + 0.25,
    )
    return memory


def test_what_was_said_while_it_was_shown():
    memory = watched(top=1)
    assert [event.keys.tolist() for event in memory.events] == [[0, 2], [0, 2]]
    found = memory.recall("said", about="picture", to="sound", cue=np.eye(4)[3])
    (moment,) = found.moments
    assert (moment.time, moment.event, moment.place, found.operations) == (5, 1, 2, 4)
    assert found.answer == [[4, 5]]  # within a second of the moment, in its segment
    back = memory.recall("said", about="sound", to="sound", cue=np.eye(6)[1])
    assert (back.moments[0].time, back.answer) == (1.25, [[0, 1, 2]])
    assert watched(top=1, thinned=False).recall("said", about="picture", cue=np.eye(4)[3]).operations == 6


def test_gists_come_first_where_they_are_sure():
    memory = watched()
    memory.gist = lambda event: f"{event.start:.0f} to {event.end:.0f}"
    memory.watch([[6, 9]], pictures=[np.eye(4)[0]], picture_times=[6], sounds=[np.eye(6)[0]], sound_times=[6])
    found = memory.recall("gist")
    assert found.used_gist
    assert found.answer[-1] == "6 to 9"
    assert not memory.recall("said", about="picture", cue=np.eye(4)[3]).used_gist  # not sure


def test_refusals():
    with pytest.raises(ValueError, match="got neither"):
        segment()
    with pytest.raises(ValueError, match="above 0; got shortest=40"):
        segment(np.ones(50), shortest=40)
    memory = hippomm(embed={"picture": np.stack}, answer=lambda *_: (None, 0.0))
    with pytest.raises(ValueError, match="each picture has a time, and times rise"):
        memory.watch([[0, 9]], pictures=[np.ones(2)] * 2, picture_times=[3, 3])
    with pytest.raises(ValueError, match="nothing embeds sound; `embed` has picture"):
        memory.watch([[0, 9]], sounds=[np.ones(2)], sound_times=[3])
    with pytest.raises(ValueError, match="nothing embeds sound"):
        memory.recall("what?", about="sound")
    with pytest.raises(ValueError, match="about gist, picture or sound"):
        memory.recall("what?", about="smell")
    for knob in ("rate", "window"):
        with pytest.raises(ValueError, match="rate and window are above 0"):
            segment(None, np.zeros(50), **{knob: 0})
