"""dyfo: the search on planted worlds, and the part that the model is given."""

from __future__ import annotations

from math import log, sqrt

import numpy as np
import pytest
import torch
from families import SEEING, asked, asking

import regard
from regard.interventions import _picture as picture
from regard.interventions._picture import WHOLE, Box
from regard.interventions.dyfo import Focus, bound, dyfo, search

TARGET = Box(0.6, 0.6, 0.7, 0.7)


def inside(box, of=TARGET):
    return box.left <= of.left and box.top <= of.top and box.right >= of.right and box.bottom >= of.bottom


def test_the_bound_by_hand():
    assert bound(0.5, 3, 8) == pytest.approx(0.5 + sqrt(log(8) / 3))
    assert bound(0.5, 3, 8) == pytest.approx(1.333, abs=1e-3)
    assert bound(0.5, 3, 8, weight=0.0) == 0.5


def test_a_focus_keeps_the_mean_of_what_it_was_worth():
    focus = Focus(WHOLE)
    for worth in (1.0, 0.0, 1.0):
        focus.visited(worth)
    assert focus.mean == pytest.approx(2 / 3)
    assert focus.visits == 3


def test_without_budget_or_expert_the_answer_is_plain():
    for options in ({"budget": 0}, {"budget": 5}):
        found = search(lambda box: "plain", lambda box: None, lambda box: True, **options)
        assert found.answer == "plain"
        assert found.focus.box == WHOLE
        assert len(found.foci) == 1


def test_a_planted_target_is_found_at_its_scale():
    """It can be told where it fills a third of the part's side, and the expert halves the part each time."""

    def ground(box):
        if not inside(box):
            return None
        side = (box.right - box.left) / 2
        left = min(max(0.65 - side / 2, 0), 1 - side)
        return Box(left, left, left + side, left + side)

    def answer(box):
        told = inside(box) and 0.1 / (box.right - box.left) > 0.35
        return "red" if told else f"a guess at {box.area}"

    found = search(answer, ground, inside, budget=4)
    assert found.answer == "red"
    assert inside(found.focus.box)
    assert search(answer, ground, inside, budget=1).answer != "red"  # of a half it cannot be told yet
    assert search(answer, ground, lambda box: False, budget=4).answer == answer(WHOLE)  # none is worth a vote


def test_parts_vote_by_their_worth():
    small, large = Box(0.0, 0.0, 0.2, 0.2), Box(0.0, 0.0, 0.5, 0.5)
    steps = {WHOLE: large, large: small}
    said = {WHOLE: "a", large: "a", small: "b"}
    found = search(lambda box: said.get(box, "a"), steps.get, lambda box: box in said, budget=2)
    assert found.answer == "b"  # 0.96 against 0.75, and nothing for the whole
    assert found.focus.box == small
    said[small] = "a"
    assert search(lambda box: said.get(box, "a"), steps.get, lambda box: box in said, budget=2).focus.box == small


def test_worth_that_is_alike_spreads_the_visits():
    boxes = iter([Box(0.0, 0.0, x, x) for x in np.linspace(0.1, 0.9, 50)])
    found = search(lambda box: "a", lambda box: next(boxes), lambda box: False, budget=12, depth=9)
    first = found.foci[0].below
    assert all(focus.worth == 0 for focus in found.foci)
    assert len(first) == 1  # the whole cannot grow
    below = [one.visits for one in first[0].below]
    assert len(below) == 2
    assert max(below) - min(below) <= 3


@torch.no_grad()
@pytest.mark.parametrize("name", SEEING)
def test_the_part_that_was_found_is_the_one_that_is_read(name):
    model, processor, inputs, images = asked(name)
    box = Box(0.25, 0.25, 0.5, 0.5)
    texts = []

    def expert(image, text):
        texts.append(text)
        return [box] if image.size == images[0].size else []

    made = dyfo.fit(model, inputs, processor, expert=expert, budget=1)
    assert {"w4 w5 w6" in text for text in texts} == {True, False}
    assert all(torch.equal(a, b) for a, b in zip(made.after, made.before))  # the expert lost it in the part
    assert all(kept.all() for kept in made.kept)
    found = dyfo.fit(model, inputs, processor, expert=lambda image, text: [box], budget=1)
    part = box.grown(1.5, 0.2)
    left, top, right, bottom = part.pixels(images[0].size)
    assert all(kept.sum() == kept[top:bottom, left:right].numel() for kept in found.kept)
    want = model(**asking(processor, ["w4 w5 w6", "w7"], [picture.cropped(i, part, i.size) for i in images])).logits
    with regard.intervene(model, found):
        assert torch.allclose(model(**inputs).logits, want, atol=1e-4)


@torch.no_grad()
def test_the_model_must_agree_where_it_is_asked():
    model, processor, inputs, _ = asked("llava")
    box = Box(0.25, 0.25, 0.5, 0.5)
    found = dyfo.fit(model, inputs, processor, expert=lambda *_: [box], confirm=lambda text: "w9", budget=1)
    assert all(torch.equal(a, b) for a, b in zip(found.after, found.before))  # it has no word for yes
    own = dyfo.fit(model, inputs, processor, budget=1)
    assert len(own.after) == 2
