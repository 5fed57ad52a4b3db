"""World models one skill at a time, on answerers that are known."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from regard.data.scenes import film
from regard.evaluation.wm_abench import (
    DIMENSIONS,
    FRAMES,
    NUISANCES,
    PREDICTION,
    Item,
    chosen_option,
    entanglement,
    items,
    wilson,
    wm_abench,
)

TASKS = [task for some in DIMENSIONS.values() for task in some]


def oracle(asked):
    return [item.answer for item in asked]


def looked_up(item):
    """The right option, from the frames alone."""
    first, last = item.frames[0], item.frames[-1]
    named = {o.shape for scene in item.frames for o in scene.objects}
    asked = item.attributes.get("shape")

    def yes(truth):
        return "yes" if truth else "no"

    def path(shape):
        at = [scene.objects[scene.find(shape)[0]] for scene in item.frames]
        return np.array([(o.x, o.y) for o in at])

    others = [shape for shape in named if shape != asked]
    if item.task == "colour":
        return first.objects[first.find(asked)[0]].colour
    if item.task == "shape":
        return next(o.shape for o in first.objects if o.colour == item.attributes["colour"])
    if item.task == "relation":
        words = item.question.split()
        return yes(first.related(0, " ".join(words[3 : words.index("the", 2)]), 1))
    if item.task == "vacancy":
        taken = {(o.x > 0.5, o.y > 0.5) for o in first.objects}
        [(x, y)] = {(a, b) for a in (False, True) for b in (False, True)} - taken
        return f"{('upper', 'lower')[y]} {('left', 'right')[x]}"
    if item.task == "count":
        return ("zero", "one", "two", "three", "four")[len(first.find(asked))]
    if item.task == "more":
        return yes(2 * len(first.find(asked)) > len(first.objects))
    if item.task == "larger":
        return yes(first.radius(0) > first.radius(1))
    if item.task in ("before", "longer"):
        there = {shape: [t for t, scene in enumerate(item.frames) if scene.find(shape)] for shape in named}
        mine, other = there[asked], there[others[0]]
        return yes(mine[0] < other[0] if item.task == "before" else len(mine) > len(other))
    if item.task == "moves":
        return yes(np.ptp(path(asked), axis=0).any())
    if item.task == "faster":
        step = {shape: np.linalg.norm(np.diff(path(shape), axis=0), axis=1).max() for shape in named}
        return yes(step[asked] > step[others[0]])
    if item.task == "direction":
        x, y = path(asked)[-1] - path(asked)[0]
        return ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")
    if item.task == "path":
        begin, middle, end = path(asked)[[0, 2, 4]]
        turn = np.dot(middle - begin, end - middle) / np.linalg.norm(middle - begin) ** 2
        return {1: "straight on", 0: "round a corner", -1: "back again"}[round(turn)]
    # what comes next follows from the first two frames
    ahead = {"bounce": 2, "bounces": 8, "both": 2}[item.task]
    velocity = [(b.x - a.x, b.y - a.y) for a, b in zip(first.objects, item.frames[1].objects)]
    end = film(first, velocity, FRAMES + ahead)[-1]
    off = [sum(abs(a.x - b.x) + abs(a.y - b.y) for a, b in zip(p.objects, end.objects)) for p in item.pictures]
    assert last != end
    return int(np.argmin(off)) if min(off) < 1e-6 else None


@pytest.mark.parametrize("task", TASKS)
def test_the_right_option_is_what_the_frames_show_and_no_other_is(task):
    asked = items(task, 48, seed=2)
    assert [chosen_option(item, looked_up(item)) for item in asked] == [item.answer for item in asked]
    assert all(len(set(item.pictures or item.options)) == len(item.options) for item in asked)
    assert items(task, 48, seed=2) == asked != items(task, 48, seed=3)


@pytest.mark.parametrize("task", TASKS)
def test_no_place_and_no_word_is_right_more_often_than_another(task):
    asked = items(task, 240)
    places = Counter(item.answer for item in asked)
    assert set(places.values()) == {240 // len(asked[0].options)}
    if not asked[0].pictures:
        assert len({*Counter(item.options[item.answer] for item in asked).values()}) == 1
    for name in NUISANCES:
        if name in asked[0].attributes:
            assert len({item.attributes[name] for item in asked}) >= 3


def test_known_answerers_score_what_they_know():
    right = wm_abench(oracle, n=24)
    assert right.sizes["task"] == 16
    assert (right["accuracy"] == 1).all()
    assert (right["effect"].fillna(0) == 0).all()
    first = wm_abench(lambda asked: [0] * len(asked), n=48)
    assert first["accuracy"].values == pytest.approx(first["chance"].values)
    assert ((first["interval"][:, 0] < first["chance"]) & (first["chance"] < first["interval"][:, 1])).all()

    def perceives(asked):
        return [item.answer if item.frames and not item.pictures else 0 for item in asked]

    found = wm_abench(perceives, n=24).groupby("stage").mean()["accuracy"]
    assert (found.sel(stage="perception"), found.sel(stage="prediction")) == (1, 0.25)
    assert {*found["stage"].values} == {"perception", "prediction"}
    assert set(PREDICTION) < set(DIMENSIONS)


def test_what_a_model_is_not_for_is_no_zero():
    found = wm_abench(lambda asked: [None if len(item.frames) > 1 else "dunno" for item in asked], n=12)
    films = found.sel(task=["before", "bounce"])
    assert films["accuracy"].isnull().all()
    assert films["z"].isnull().all()
    assert found["accuracy"].sel(task="count").item() == 0
    assert found["unread"].sel(task="count").item() == 1


def item(answer=0, options=("yes", "no"), **attributes):
    return Item("faster", (), "?", options, answer, (), attributes)


def test_entanglement_by_hand():
    asked = [item(i % 2, colour=colour) for colour in ("blue", "green") for i in range(4)]
    blue_is_fast = [0 if one.attributes["colour"] == "blue" else 1 for one in asked]
    assert entanglement(asked, blue_is_fast, "colour").effect == 1
    assert entanglement(asked, blue_is_fast, "colour").z > 1
    # of 4 blue ones, 2 are fast and 3 are called so: 1 of 4 too many
    little = [0, 1, 0, 0, 0, 1, 0, 1]
    assert entanglement(asked, little, "colour").effect == 0.25
    assert entanglement(asked, oracle(asked), "colour") == (0, 0)
    assert np.isnan(entanglement(asked, little, "shape").effect)
    assert np.isnan(entanglement(asked[:4], little[:4], "colour").z)


def test_entanglement_does_not_depend_on_order_and_is_small_without_cause():
    asked = items("faster", 200, seed=5)
    rng = np.random.default_rng(0)
    guessed = rng.integers(0, 2, 200).tolist()
    turned = [replace(one, options=one.options[::-1], answer=1 - one.answer) for one in asked]
    for nuisance in NUISANCES:
        found = entanglement(asked, guessed, nuisance)
        assert abs(found.z) < 3
        assert entanglement(turned, [1 - at for at in guessed], nuisance) == found


def test_wilson_by_hand():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5)[0] == 0
    assert wilson(5, 5)[1] == pytest.approx(1)


def test_texts_are_read_by_whole_words():
    asked = item(0, ("one", "two"))
    assert [chosen_option(asked, said) for said in ("There is One.", "none", "one or two", "two!", 1, None)] == [
        0,
        None,
        None,
        1,
        1,
        None,
    ]


def test_recolouring_changes_the_colour_alone_and_sheets_show_all():
    asked = items("before", 6, seed=1)[0]
    red = asked.recoloured("red")
    assert red.attributes == {**asked.attributes, "colour": "red"}
    for one, other in zip(asked.frames, red.frames):
        for a, b in zip(one.objects, other.objects):
            assert b == (replace(a, colour="red") if a.shape == asked.attributes["shape"] else a)
    assert (red.answer, red.question) == (asked.answer, asked.question)
    assert items("bounce", 1)[0].sheet().size == (320, 128)
    assert [image.size for image in asked.images()] == [(64, 64)] * FRAMES


def test_bad_input_is_named():
    for error, run in (
        ("no task 'smell'", lambda: items("smell", 3)),
        ("12 items of 'count' were asked, and 1", lambda: wm_abench(lambda asked: [0], tasks=["count"], n=12)),
        ("option 7 of 'count'", lambda: wm_abench(lambda asked: [7] * len(asked), tasks=["count"], n=3)),
        ("1 items and 0 answers", lambda: entanglement([item()], [], "colour")),
        ("asks about colour", lambda: items("colour", 1)[0].recoloured("red")),
        ("names things by it", lambda: items("shape", 1)[0].recoloured("red")),
        ("no share", lambda: wilson(3, 2)),
        ("n is 1 or more", lambda: wm_abench(oracle, n=0)),
    ):
        with pytest.raises(ValueError, match=error):
            run()
