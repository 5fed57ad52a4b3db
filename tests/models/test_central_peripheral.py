"""A token for what is asked about and a map in words: values by hand, order, turns, what is filled up, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import BertModel, LlamaForCausalLM

import regard
from regard.models.central_peripheral import (
    AffinityHead,
    CentralPeripheral,
    SceneConfig,
    allocentric_grid,
    central_peripheral,
    contrast,
    inside,
    scene_positions,
)

SIZES = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "frequencies": 3}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def scene(batch: int = 2, tokens: int = 6, words: int = 4):
    objects = torch.zeros(batch, 3, tokens, dtype=torch.bool)
    objects[:, 0, :2] = objects[:, 1, 2:3] = objects[:, 2, 3:6] = True
    given = torch.randn(batch, tokens, 5), torch.rand(batch, tokens, 3), torch.randint(12, (batch, words))
    return *given, {"objects": objects}


def test_the_contrast_by_hand():
    scores = torch.tensor([[1.0, 0.0, -torch.inf]])
    assert float(contrast(scores, torch.tensor([[True, False]]))) == pytest.approx(math.log(1 + math.e) - 1)
    both = torch.tensor([[2.0, 1.0, 0.5, 3.0]])
    odds = both[0].exp()
    two = contrast(both, torch.tensor([[True, True, False]]))  # the sum inside the logarithm
    assert float(two) == pytest.approx(-math.log((odds[0] + odds[1]) / odds.sum()))
    all_three = contrast(both, torch.tensor([[True, True, True]]))
    assert float(all_three) == pytest.approx(-math.log(odds[:3].sum() / odds.sum()))
    none = contrast(both, torch.zeros(1, 3, dtype=torch.bool))
    assert float(none) == pytest.approx(-math.log(odds[3] / odds.sum()))
    rows = contrast(both.repeat(2, 1), torch.tensor([[True, True, False], [False, False, False]]))
    assert float(rows) == pytest.approx(float(two + none) / 2)


def test_scores_are_cosines_over_the_temperature():
    head, state, objects = AffinityHead(4, temperature=0.5), torch.randn(2, 4), torch.randn(2, 3, 4)
    for parameter in (head.none, *head.parameters()):
        torch.nn.init.normal_(parameter)
    found = head(state, objects)
    a, b = head.state(state), head.object(torch.cat([objects, head.none.expand(2, 1, 4)], 1))
    want = torch.stack([torch.cosine_similarity(a, b[:, i], dim=-1) / 0.5 for i in range(4)], 1)
    torch.testing.assert_close(found, want)
    assert found.abs().max() <= 2
    there = torch.tensor([[True, True, False]] * 2)
    masked = head(state, objects, there)
    assert (masked[:, 2] == -torch.inf).all()
    torch.testing.assert_close(masked[:, [0, 1, 3]], found[:, [0, 1, 3]])


def test_places_have_a_sine_and_a_cosine_of_each_axis():
    places = torch.tensor([0.25, 0.5, 0.0])
    found = scene_positions(places, 2)
    angles = np.array([[0.25, 0.5, 0.0], [0.5, 1.0, 0.0]]) * math.pi
    want = np.concatenate([np.sin(angles), np.cos(angles)], 1).ravel()
    np.testing.assert_allclose(found, want, atol=1e-6)
    half = torch.rand(50, 3).half()
    torch.testing.assert_close(scene_positions(half, 8), scene_positions(half.float(), 8))  # up to 400 radians


def test_what_lies_in_a_box():
    places = torch.tensor([[[0.5, 0.5], [1.0, 1.0], [1.1, 0.5]]])
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [1.05, 0.0, 2.0, 1.0]]])
    assert inside(places, boxes).tolist() == [[[True, True, False], [False, False, True]]]


def test_the_grid_is_the_worlds():
    names, floor = ["bed", "lamp", "chair", "lamp"], ((0.0, 0.0), (1.0, 1.0))
    places = torch.tensor([[0.1, 0.1, 0.4], [0.9, 0.4, 1.0], [0.1, 0.15, 0.0], [1.5, 1.0, 0.2]])
    text = allocentric_grid(names, places, cells=4, bounds=floor)
    assert text == "cell (0, 0): bed, chair\ncell (3, 1): lamp\ncell (3, 3): lamp"
    order = [2, 0, 3, 1]
    assert allocentric_grid([names[i] for i in order], places[order], cells=4, bounds=floor) == text
    turned = torch.stack([1 - places[:, 1], places[:, 0], places[:, 2]], 1).clamp(0, 1)  # by 90 degrees
    assert allocentric_grid(names, turned, cells=4, bounds=floor) == (
        "cell (0, 3): lamp\ncell (2, 3): lamp\ncell (3, 0): bed, chair"
    )
    assert allocentric_grid(names, places, cells=4, bounds=torch.tensor(floor)) == text
    assert allocentric_grid(["bed"], places[:1]) == "cell (0, 0): bed"
    own = allocentric_grid(names, places, cells=2)
    assert own == "cell (0, 0): bed, chair\ncell (1, 0): lamp\ncell (1, 1): lamp"


def test_the_token_has_read_the_question_and_the_answer_sees_it():
    model = central_peripheral(5, **SIZES).eval()
    tokens, places, words, more = scene()
    answers = torch.randint(12, (2, 2))
    found = model(tokens, places, words, answers, **more)
    assert found.logits.shape == (2, 3, 12)
    other = words.clone()
    other[:, -1] = (other[:, -1] + 1) % 12
    assert (model(tokens, places, other, answers, **more).scores - found.scores).abs().max() > 1e-4
    told = model(tokens, places, words, (answers + 1) % 12, **more)
    torch.testing.assert_close(told.scores, found.scores)  # what is said later does not reach it
    torch.testing.assert_close(told.logits[:, 0], found.logits[:, 0])
    with torch.no_grad():
        model.token.add_(1.0)
    assert (model(tokens, places, words, answers, **more).logits - found.logits).abs().max() > 1e-4


def test_without_the_token_it_is_the_language_model_alone():
    model = central_peripheral(5, token=False, **SIZES).eval()
    tokens, places, words, more = scene()
    found = model(tokens, places, words, **more)
    assert found.scores is None
    seen = model.see(tokens) + model.place(scene_positions(places, 3))
    given = torch.cat([seen, model.language.get_input_embeddings()(words)], 1)
    want = model.language(inputs_embeds=given).logits[:, -1:]
    torch.testing.assert_close(found.logits, want)


def test_objects_are_means_of_their_tokens_and_have_no_order():
    model = central_peripheral(5, **SIZES).eval()
    tokens, places, words, more = scene()
    scores = model(tokens, places, words, **more).scores
    flipped = model(tokens, places, words, objects=more["objects"].flip(1)).scores
    torch.testing.assert_close(flipped[:, :3], scores[:, :3].flip(1))
    torch.testing.assert_close(flipped[:, 3], scores[:, 3])
    seen = model._seen(tokens, places)
    means, there = model._objects(seen, more["objects"], torch.ones(2, 6, dtype=torch.bool))
    torch.testing.assert_close(means[:, 2], seen[:, 3:6].mean(1))
    assert there.all()


def test_what_fills_up_does_not_matter():
    model = central_peripheral(5, **SIZES).eval()
    tokens, places, words, more = scene()
    found = model(tokens[:1, :3], places[:1, :3], words[:1, 1:], objects=more["objects"][:1, :2, :3])
    mask, words_mask = torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    mask[0, 3:] = words_mask[0, 0] = False
    batch = model(tokens, places, words, objects=more["objects"], mask=mask, words_mask=words_mask)
    torch.testing.assert_close(batch.logits[:1], found.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.scores[:1, [0, 1, 3]], found.scores, atol=1e-5, rtol=1e-5)
    assert batch.scores[0, 2] == -torch.inf
    alone = model(tokens[1:], places[1:], words[1:], objects=more["objects"][1:])
    torch.testing.assert_close(batch.scores[1:], alone.scores, atol=1e-5, rtol=1e-5)
    for filled in (tokens, places):
        filled[0, 3:] = math.nan
    model.zero_grad()
    again = model(tokens, places, words, objects=more["objects"], mask=mask, words_mask=words_mask)
    torch.testing.assert_close(again.logits, batch.logits)
    torch.testing.assert_close(again.scores, batch.scores)
    again.logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_half_precision_keeps_places_whole():
    model, (tokens, places, words, more) = central_peripheral(5, **SIZES).eval(), scene()
    want = model(tokens, places, words, **more)
    found = model.bfloat16()(tokens.bfloat16(), places, words, **more)
    assert found.scores.dtype == torch.bfloat16
    torch.testing.assert_close(found.logits.float(), want.logits, atol=0.05, rtol=0)


def test_it_learns_what_is_asked_about():
    model, (tokens, places, words, more) = central_peripheral(5, **SIZES), scene(8)
    answers, targets = torch.randint(12, (8, 1)), torch.eye(3, dtype=torch.bool)[torch.arange(8) % 3]
    targets[7] = False
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(40):
        found = model(tokens, places, words, answers, **more)
        loss = model.loss(found, answers, targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    found = model(tokens, places, words, answers, **more)
    assert (found.scores.argmax(1) == torch.cat([targets, ~targets.any(1, keepdim=True)], 1).int().argmax(1)).all()
    assert (found.logits[:, 0].argmax(-1) == answers[:, 0]).all()
    said = torch.nn.functional.cross_entropy(found.logits[:, 0], answers[:, 0])
    torch.testing.assert_close(model.loss(found, answers), said)
    torch.testing.assert_close(model.loss(found, answers, targets), said + contrast(found.scores, targets))


def test_saved_and_loaded(tmp_path):
    knobs = {"axes": 2, "temperature": 0.5, "weight": 0.25}
    model, (tokens, places, words, more) = central_peripheral(5, **knobs, **SIZES).eval(), scene()
    places = places[..., :2]
    assert model.config == SceneConfig(5, axes=2, frequencies=3, temperature=0.5, weight=0.25)
    found, targets = model(tokens, places, words, words[:, :1], **more), torch.eye(3, dtype=torch.bool)[:2]
    said = torch.nn.functional.cross_entropy(found.logits[:, 0], words[:, 0])
    torch.testing.assert_close(model.loss(found, words[:, :1], targets), said + contrast(found.scores, targets) / 4)
    model.save_pretrained(tmp_path)
    fresh = LlamaForCausalLM(model.language.config)
    loaded = CentralPeripheral.from_pretrained(tmp_path, language=fresh).eval()
    assert loaded.config == model.config
    torch.testing.assert_close(
        loaded(tokens, places, words, **more).scores, model(tokens, places, words, **more).scores
    )


def test_record_sees_where_the_token_looks():
    model, (tokens, places, words, more) = central_peripheral(5, **SIZES).eval(), scene(1)
    with torch.no_grad(), regard.record(model, "rows") as recording:
        model(tokens, places, words, **more)
    (rows,) = [node["rows"] for node in recording.tree.subtree if "rows" in node]
    assert rows.sizes["query"] == rows.sizes["key"] == 6 + 4 + 1
    assert rows.sizes["layer"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.randn(2, 6, 4)}, r"tokens are \[batch, token, 5\]"),
        ({"places": torch.rand(2, 6, 2)}, r"places \[batch, token, 3\]"),
        ({"tokens": torch.randn(0, 6, 5), "places": torch.rand(0, 6, 3), "words": torch.ones(0, 4).long()}, "one row"),
        ({"words": torch.ones(1, 4, dtype=torch.long)}, r"words are \[2, word\]"),
        ({"answers": torch.ones(3, 1, dtype=torch.long)}, r"answers are \[2, word\]"),
        ({"mask": torch.ones(2, 6)}, r"mask is boolean \[2, 6\]; got torch.float32"),
        ({"mask": torch.ones(2, 1, dtype=torch.bool)}, r"mask is boolean \[2, 6\]"),
        ({"words_mask": torch.ones(2, 3, dtype=torch.bool)}, r"words_mask is boolean \[2, 4\]"),
        ({"objects": torch.zeros(2, 3, 6, dtype=torch.bool)}, "an object has no token"),
        ({"objects": torch.ones(2, 3, 6)}, "objects are boolean"),
        ({"objects": torch.ones(2, 3, 5, dtype=torch.bool)}, r"objects are boolean \[2, object, 6\]"),
    ],
)
def test_what_cannot_be_read_is_refused(change, message):
    tokens, places, words, more = scene()
    given = {"tokens": tokens, "places": places, "words": words, **more, **change}
    with pytest.raises(ValueError, match=message):
        central_peripheral(5, **SIZES)(**given)


def test_other_refusals():
    tokens, places, words, more = scene()
    with pytest.raises(ValueError, match="1 cell or more"):
        allocentric_grid([], torch.zeros(0, 2))
    with pytest.raises(ValueError, match="2 names"):
        allocentric_grid(["a", "b"], torch.zeros(1, 2))
    with pytest.raises(ValueError, match="not finite"):
        allocentric_grid(["a"], torch.tensor([[torch.nan, 0.0]]))
    for bounds in (((1, 1), (0, 0)), ((0, 0), (math.nan, 1)), ((-math.inf, 0), (1, 1)), ((0, 0, 0), (1, 1, 1))):
        with pytest.raises(ValueError, match="lowest and highest corner"):
            allocentric_grid(["a"], torch.zeros(1, 2), bounds=bounds)
    for boxes in (torch.zeros(1, 2, 4), torch.zeros(2, 2, 6)):
        with pytest.raises(ValueError, match=r"boxes \[batch, object, 2 \* axis\]"):
            inside(torch.zeros(1, 6, 3), boxes)
    for temperature in (0.0, math.nan):
        with pytest.raises(ValueError, match="temperature is above 0"):
            AffinityHead(4, temperature=temperature)
    with pytest.raises(TypeError, match="takes a causal language model"):
        CentralPeripheral(BertModel, SceneConfig(4))
    with pytest.raises(ValueError, match=r"targets are boolean \[1, 1\]"):
        contrast(torch.zeros(1, 2), torch.ones(1, 1))
    with pytest.raises(ValueError, match="an object that is not there"):
        contrast(torch.tensor([[-torch.inf, 0.0]]), torch.tensor([[True]]))
    plain = central_peripheral(5, token=False, **SIZES)
    found = plain(tokens, places, words)
    with pytest.raises(ValueError, match="targets need a model with the token"):
        plain.loss(found, words[:, :1], torch.ones(2, 3, dtype=torch.bool))
    for answers in (words[:, :0], words[:, :2]):
        with pytest.raises(ValueError, match="answers have 1 to 1 words"):
            plain.loss(found, answers)
    last = torch.ones(2, 4, dtype=torch.bool)
    last[0, -1] = False
    with pytest.raises(ValueError, match="the last word of each row"):
        plain(tokens, places, words, words_mask=last)
