"""POPE and CHAIR, worked by hand, and the questions that POPE asks."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from regard.data.scenes import Dials, Object, Scene, sample
from regard.evaluation.hallucination import chair, polls, pope, shapes


def scene(*names: str) -> Scene:
    return Scene(tuple(Object(name, "red", "small", 0.2 + 0.2 * i, 0.5) for i, name in enumerate(names)))


def test_pope_by_hand():
    answers = ["yes", "Yes, there is a fork.", "no", "There is not.", "yes", "No."]
    truth = ["yes", "no", "no", "yes", "yes", "no"]
    found = pope(answers, truth)  # 2 hits, 1 false alarm, 1 miss, 2 rightly denied
    assert found == pytest.approx(
        {"accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_rate": 0.5}
    )


def test_pope_of_one_who_always_agrees():
    found = pope(["yes"] * 4, ["yes", "no", "yes", "no"])
    assert found == pytest.approx({"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes_rate": 1})
    denies = pope(["no", "no"], ["yes", "no"])
    assert math.isnan(denies["precision"])
    assert denies["recall"] == denies["f1"] == 0


def test_a_word_that_begins_with_no_is_no_denial():
    assert pope(["nothing else", "known"], ["yes", "yes"])["accuracy"] == 1


def test_chair_by_hand():
    captions = ["A red fork, two plates and a blue plate", "two crosses on stripes", "nothing", "a star and a heart"]
    truth = [{"fork"}, {"cross", "ring"}, {"circle"}, {"star", "heart"}]
    found = chair(captions, truth)
    # fork, plate, plate; cross; none; star, heart: two of six absent, in one of four captions
    assert found == pytest.approx({"chair_i": 2 / 6, "chair_s": 1 / 4, "recall": 4 / 6})
    assert math.isnan(chair(["nothing"], [set()])["chair_i"])


def test_chair_with_other_words():
    words = {"bike": "bicycle", "bicycle": "bicycle", "cat": "cat"}
    assert chair(["a bike and a dog"], [{"bicycle"}], words=words) == {"chair_i": 0, "chair_s": 0, "recall": 1}


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="got 1 and 2"):
        pope(["yes"], ["yes", "no"])
    with pytest.raises(ValueError, match="'maybe'"):
        pope(["yes"], ["maybe"])
    with pytest.raises(ValueError, match="got 0 and 1"):
        chair([], [{"fork"}])
    with pytest.raises(ValueError, match="'dog'"):
        chair(["a dog"], [{"dog"}])
    with pytest.raises(ValueError, match="'common'"):
        polls([scene("fork")], "common")


@pytest.mark.parametrize("negatives", ["random", "popular", "adversarial"])
def test_polls_are_true_balanced_and_not_repeated(negatives):
    scenes = [sample(Dials(objects=(0, 5)), 3, i) for i in range(60)]
    found = polls(scenes, negatives, seed=1)
    assert found == polls(scenes, negatives, seed=1)
    assert len({(poll.scene, poll.shape) for poll in found}) == len(found)
    for number, there in enumerate(map(shapes, scenes)):
        mine = [poll for poll in found if poll.scene == number]
        assert Counter(poll.answer for poll in mine) == (
            {"yes": min(3, len(there)), "no": min(3, len(there))} if there else {}
        )
        for poll in mine:
            assert (poll.answer == "yes") == (poll.shape in there)
            assert poll.shape in poll.text


def test_negatives_come_from_what_is_known():
    # stars are the most frequent; forks come with plates
    known = [scene("star"), scene("star"), scene("star"), scene("fork", "plate"), scene("fork", "plate")]

    def absent(negatives):
        return {p.shape for p in polls([scene("fork")] * 40, negatives, known=known) if p.answer == "no"}

    assert absent("popular") == {"star"}
    assert absent("adversarial") == {"plate"}
    assert len(absent("random")) > 5
