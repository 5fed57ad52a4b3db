"""SEEM: who sees whom by hand, points of prompts, and prompts that leave each other and the objects alone."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.models.seem import (
    PromptDecoder,
    Prompts,
    box_mask,
    disc_mask,
    looks,
    mask_errors,
    prompt_loss,
    sample_points,
    seem,
    visibility,
)

SMALL = {"dim": 16, "heads": 2, "layers": 3, "hidden": 32, "queries": 4, "memories": 2, "points": 6, "levels": 2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def _given(batch=2):
    levels = [torch.randn(batch, 16, 8, 8), torch.randn(batch, 16, 4, 6)]
    features = torch.randn(batch, 16, 16, 12)
    positive = torch.zeros(batch, 16, 12, dtype=torch.bool)
    positive[:, 3:5, 2:4] = True  # four pixels, fewer than are drawn
    return levels, features, positive


def test_who_sees_whom_by_hand():
    kinds = {"object": 2, "memory": 1, "text": 2, "spatial": 1, "points": 1, "grounding": 1}
    names = ["object0", "object1", "memory", "text0", "text1", "spatial", "point", "grounding"]
    sees = visibility(kinds, {"text": torch.tensor([[False, True]])})[0]
    seen = {name: {names[i] for i in row.nonzero()[:, 0]} for name, row in zip(names, sees, strict=True)}
    assert seen == {
        "object0": {"object0", "object1"},
        "object1": {"object0", "object1"},
        "memory": {"memory"},
        "text0": {"text0", "grounding"},
        "text1": set(),
        "spatial": {"spatial", "point", "memory"},
        "point": {"point"},
        "grounding": {"grounding", "text0"},
    }


def test_where_each_looks_by_hand():
    own = torch.tensor([[[True, False, False, False], [False] * 4, [True, True, False, False]]])
    previous = torch.tensor([[[[-1.0, 5.0], [-1.0, -1.0]]]])
    found = looks(own, {"object": 2, "memory": 1}, previous, (2, 2))
    assert found[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]
    assert looks(own, {"object": 2, "memory": 1}, None, (2, 2))[0, 2].tolist() == own[0, 2].tolist()
    assert looks(own, {"object": 2, "memory": 1}, -previous.abs(), (2, 2))[0, 2].all()  # nothing there: everywhere


def test_a_logit_is_resized_before_it_is_a_probability():
    previous = torch.tensor([[[[9.0, -1.0], [9.0, -1.0]]]])
    own = torch.zeros(1, 1, 1, dtype=torch.bool)
    assert looks(own, {"memory": 1}, previous, (1, 1)).all()
    half = torch.tensor([[[[1.0, -9.0], [1.0, -9.0]]]])
    found = looks(torch.zeros(1, 1, 2, dtype=torch.bool), {"memory": 1}, half, (1, 2))
    assert found.tolist() == [[[True, False]]]


def test_masks_of_prompts_and_points_from_them():
    assert box_mask(torch.tensor([[1.0, 0.0, 3.0, 2.0]]), (4, 5))[0].nonzero().tolist() == [
        [0, 1],
        [0, 2],
        [1, 1],
        [1, 2],
    ]
    disc = disc_mask(torch.tensor([[2.5, 1.5]]), (4, 5), 1.0)[0]
    assert disc.nonzero().tolist() == [[0, 2], [1, 1], [1, 2], [1, 3], [2, 2]]
    places, filled = sample_points(disc[None], 8)
    assert filled.sum() == 3
    drawn = {(round(y * 3), round(x * 4)) for x, y in places[0, ~filled[0]].tolist()}
    assert drawn == {tuple(at) for at in disc.nonzero().tolist()}


def test_prompts_leave_objects_and_each_other_alone():
    model, (levels, features, positive) = seem(**SMALL).eval(), _given()
    text = torch.randn(2, 3, 16)
    alone = model(levels, features)
    drawn = {"generator": torch.Generator().manual_seed(0)}
    pointed = model(levels, features, Prompts(positive), **drawn)
    drawn = {"generator": torch.Generator().manual_seed(0)}
    both = model(levels, features, Prompts(positive, text=text), **drawn)
    torch.testing.assert_close(pointed.masks["object"], alone.masks["object"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both.masks["object"], alone.masks["object"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both.masks["spatial"], pointed.masks["spatial"], atol=1e-4, rtol=1e-4)
    assert (pointed.masks["spatial"] - pointed.masks["object"]).abs().max() > 1e-3
    assert alone.chosen is None


def test_what_is_filled_up_changes_nothing():
    model, (levels, features, _) = seem(**SMALL).eval(), _given()
    text = torch.randn(2, 3, 16)
    found = model(levels, features, Prompts(text=text))
    filled = torch.cat([text, torch.full((2, 2, 16), 50.0)], 1)
    padding = torch.arange(5).expand(2, -1) >= 3
    longer = model(levels, features, Prompts(text=filled, text_padding=padding))
    torch.testing.assert_close(longer.chosen, found.chosen, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(longer.scores, found.scores, atol=1e-4, rtol=1e-4)


def test_memory_and_negative_points_are_heard():
    model, (levels, features, positive) = seem(**SMALL).eval(), _given()

    def masks(**more):
        generator = torch.Generator().manual_seed(0)
        return model(levels, features, Prompts(positive, **more), generator=generator).masks

    plain, memory = masks(), masks(memory=torch.randn(2, 16, 12).mul(9))
    assert (memory["spatial"] - plain["spatial"]).abs().max() > 1e-3
    torch.testing.assert_close(memory["object"], plain["object"], atol=1e-4, rtol=1e-4)
    assert (masks(negative=~positive)["spatial"] - plain["spatial"]).abs().max() > 1e-3


def test_points_that_do_not_belong_are_told_from_those_that_do():
    model, (levels, features, positive) = seem(**{**SMALL, "points": 4}).eval(), _given()
    other = positive.roll(6, 1)  # four pixels each, all of which are drawn
    told = model(levels, features, Prompts(positive, other)).masks["spatial"]
    same = model(levels, features, Prompts(positive, other)).masks["spatial"]
    torch.testing.assert_close(same, told, atol=1e-4, rtol=1e-4)
    turned = model(levels, features, Prompts(other, positive)).masks["spatial"]
    assert (turned - told).abs().max() > 1e-3


def test_pictures_do_not_meet_saved_is_loaded_and_it_trains(tmp_path):
    model, (levels, features, positive) = seem(**SMALL), _given()
    prompts = Prompts(positive, ~positive, torch.randn(2, 3, 16), memory=torch.randn(2, 16, 12))
    found = model(levels, features, prompts, generator=torch.Generator().manual_seed(0))
    assert found.candidates.shape == (2, 8, 16, 12)
    model.save_pretrained(tmp_path)
    again = PromptDecoder.from_pretrained(tmp_path)
    same = again(levels, features, prompts, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(same.chosen, found.chosen)
    whole = Prompts(text=prompts.text)
    one = model([x[1:] for x in levels], features[1:], Prompts(text=prompts.text[1:]))
    torch.testing.assert_close(one.chosen, model(levels, features, whole).chosen[1:], atol=1e-4, rtol=1e-4)
    (prompt_loss(found, positive) + found.masks["object"].mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_best_mask_is_asked_for():
    chosen = torch.tensor([[[-9.0, 9.0]], [[9.0, -9.0]]])[None]  # two queries, a row of two pixels
    truth = torch.tensor([[[True, False]]])
    entropy, dice = mask_errors(chosen, truth[:, None])
    torch.testing.assert_close(entropy, torch.tensor([[9.0, 0.0]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(dice, torch.tensor([[1 - 1 / 3, 0.0]]), atol=1e-3, rtol=0)
    from regard.models.seem import Segmented

    for scores, loss in (([-5.0, 5.0], 0.0), ([5.0, -5.0], 4.0)):
        found = Segmented({}, {}, None, torch.tensor([scores]), chosen)
        torch.testing.assert_close(prompt_loss(found, truth), torch.tensor(loss), atol=1e-2, rtol=0)


def test_record_sees_both_kinds_of_attention():
    model, (levels, features, positive) = seem(**SMALL).eval(), _given()
    with torch.no_grad(), regard.record(model, "received") as recording:
        model(levels, features, Prompts(positive))
    sizes = [dict(node["received"].sizes) for node in recording.tree.subtree if "received" in node]
    assert sum(size["layer"] for size in sizes) == 6


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: visibility({"voice": 1}), "got voice"),
        (lambda: seem(**{**SMALL, "dim": 18}), "multiple of 4"),
        (lambda: seem(**SMALL)([torch.randn(1, 16, 8, 8)], torch.randn(1, 16, 8, 8)), "2 levels"),
        (
            lambda: seem(**SMALL)(*_given()[:2], Prompts(text=torch.randn(2, 3, 16), memory=torch.randn(2, 16, 12))),
            "go with a prompt of places",
        ),
        (lambda: prompt_loss(seem(**SMALL)(*_given()[:2]), torch.ones(2, 16, 12).bool()), "nothing was prompted"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_words_that_fill_up_do_not_count_whatever_stands_there():
    model, (levels, features, _) = seem(**SMALL).eval(), _given()
    text, padding = torch.randn(2, 3, 16), torch.tensor([[False, False, True]] * 2)
    found = model(levels, features, Prompts(text=text, text_padding=padding))
    text[:, 2] = torch.nan
    again = model(levels, features, Prompts(text=text, text_padding=padding))
    torch.testing.assert_close(again.chosen, found.chosen)


def test_points_in_double_precision():
    levels, features, positive = _given()
    model = seem(**SMALL).double().eval()
    found = model([x.double() for x in levels], features.double(), Prompts(positive=positive))
    assert found.chosen is not None
    assert found.chosen.dtype == torch.float64
