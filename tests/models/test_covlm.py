"""CoVLM: regions by hand, what is asked of which token, and a loop that stops to look."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

import regard
from regard.models.covlm import IGNORED, Communicative, RegionHead, Tokens, asked, covlm, region_places, regions

T = Tokens(image=0, object=1, endofobject=2, visual=3, box=4, previsual=5, prebox=6, pad=7)
RED, STAR, LEFT, HEART = 10, 11, 12, 13
IMAGE = [0] * 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def _model():
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation="sdpa",
    )
    return covlm(config, T, channels=8).eval()


SAID = [*IMAGE, 1, RED, STAR, 2, 3, 4, 2, LEFT, 1, 5, 6, 1, HEART, 2]


def _given():
    ids = torch.tensor([SAID, [*IMAGE, 1, RED, STAR, 2, 3, 4, 4, 2, LEFT, HEART, 8, 8, 8, 8]])
    return ids, torch.randn(2, 4, 8), torch.rand(4, 2).repeat(1, 2) + torch.tensor([0.0, 0, 0.3, 0.3])


@pytest.mark.parametrize(
    ("box", "cells"),
    [
        ((0.30, 0.10, 0.60, 0.40), [1, 2, 5, 6]),
        ((0.5, 0.5, 0.5, 0.5), [10]),
        ((0.0, 0.0, 1.0, 1.0), list(range(16))),
        ((0.6, 0.1, 0.3, 0.1), [2]),  # the right end left of the left one
        ((-0.2, 0.9, 0.1, 1.4), [12]),
    ],
)
def test_regions_by_hand(box, cells):
    features = torch.randn(16, 3)
    torch.testing.assert_close(regions(features, torch.tensor([box]))[0], features[cells].mean(0))


def test_boxes_that_cut_the_same_cells_are_the_same_region():
    features = torch.randn(16, 3)
    found = regions(features, torch.tensor([[0.26, 0.01, 0.74, 0.49], [0.49, 0.24, 0.51, 0.26]]))
    torch.testing.assert_close(found[0], found[1])


def test_nothing_is_asked_of_calls_regions_and_patches():
    labels = asked(torch.tensor([[*SAID, 7]]), T)[0].tolist()
    kept = [IGNORED] * 4 + [1, RED, STAR, 2, *[IGNORED] * 3, LEFT, 1, IGNORED, IGNORED, 1, HEART, 2, IGNORED]
    assert labels == kept
    assert asked(torch.tensor([[1, RED]]), T).tolist() == [[IGNORED, RED]]


def test_regions_take_the_place_of_their_tokens_row_by_row():
    model, (ids, features, boxes) = _model(), _given()
    seen = []
    model.language_model.register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
    model(ids, features, boxes)
    patches = model.project(features)
    places = region_places(ids, T)
    assert places.tolist() == [[0, 9], [0, 14], [1, 9], [1, 10]]
    expected = [regions(patches[row], box[None])[0] for (row, _), box in zip(places.tolist(), boxes, strict=True)]
    torch.testing.assert_close(seen[0][tuple(places.T)], torch.stack(expected))
    torch.testing.assert_close(seen[0][:, :4], patches)
    torch.testing.assert_close(seen[0][0, 5], model._embed.weight[RED])
    model(ids, features, boxes, silent=True)
    assert not seen[1][tuple(places.T)].any()


def test_a_text_without_calls_is_the_plain_language_model():
    model, ids = _model(), torch.tensor([[1, RED, STAR, 2, LEFT]])
    found = model(ids, torch.randn(1, 4, 8))
    torch.testing.assert_close(found.logits, model.language_model(ids).logits)
    assert found.boxes.shape == (0, 4, 4)


def test_a_call_before_an_entity_does_not_see_it_and_one_after_does():
    model, (ids, features, boxes) = _model(), _given()
    found = model(ids, features, boxes)
    assert found.calls.tolist() == [[0, 8], [0, 13], [1, 8]]
    other = ids.clone()
    other[0, 16] = RED  # what comes after `previsual`
    torch.testing.assert_close(model(other, features, boxes).boxes, found.boxes)
    other = ids.clone()
    other[0, 6] = HEART  # what comes before `visual`
    changed = (model(other, features, boxes).boxes - found.boxes).abs().amax((1, 2))
    assert (changed > 1e-5).tolist() == [True, True, False]


def test_rows_do_not_meet_and_padding_is_not_there():
    model, (ids, features, boxes) = _model(), _given()
    found = model(ids, features, boxes)
    alone = model(ids[1:], features[1:], boxes[2:])
    torch.testing.assert_close(alone.logits[0], found.logits[1], atol=1e-5, rtol=1e-4)
    padded = torch.cat([ids, torch.full((2, 3), T.pad)], 1)
    mask = torch.arange(21).expand(2, -1) < 18
    longer = model(padded, features, boxes, attention_mask=mask.long())
    torch.testing.assert_close(longer.logits[:, :18], found.logits, atol=1e-5, rtol=1e-4)


def test_detector_learns_where_something_is():
    head, features, states = RegionHead(6, width=16), torch.randn(4, 16, 6), torch.zeros(4, 6)
    truth = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.5, 0.2, 0.9, 0.5], [0.3, 0.6, 0.6, 0.9], [0.6, 0.6, 0.95, 0.95]])
    optimiser = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(80):
        optimiser.zero_grad()
        head.loss(*head(states, features), truth).backward()
        optimiser.step()
    boxes, sure = head(states, features)
    best = boxes[torch.arange(4), sure.argmax(1)]
    torch.testing.assert_close(best, truth, atol=0.08, rtol=0)


def test_boxes_of_a_call_are_the_surest_that_differ():
    model = _model()
    boxes = torch.tensor([[0.0, 0, 0.5, 0.5], [0.0, 0, 0.5, 0.45], [0.5, 0.5, 1.2, 1.0], [0.6, 0.0, 0.9, 0.3]])
    sure = torch.tensor([2.0, 3.0, 1.0, -9.0])
    torch.testing.assert_close(model.detected(boxes, sure, most=4), boxes[[1, 2]].clamp(0, 1))
    assert len(model.detected(boxes, sure - 20, most=4)) == 1


def test_generation_stops_to_look():
    model, features = _model(), torch.randn(4, 8)
    prompt = [*IMAGE, 1, RED, STAR, 2]
    found = model.generate(features, prompt, most=3)
    assert found.ids[:10].tolist() == [*prompt, T.visual, T.box]
    (place, boxes), *_ = found.regions
    assert place == 8
    said = model(found.ids[None, :9], features[None])
    torch.testing.assert_close(boxes, model.detected(said.boxes[-1], said.sure[-1]))
    assert len(found.ids) >= 13
    again = model.generate(features, [*prompt, T.visual, T.box, 2, LEFT, 1, T.previsual, T.prebox], most=0)
    assert again.ids.tolist() == [*prompt, T.visual, T.box, 2, LEFT, 1, T.previsual, T.prebox]
    assert [at for at, _ in again.regions] == [8, 13]


def test_it_trains_all_its_parts_and_state_is_loaded():
    model, (ids, features, boxes) = _model(), _given()
    found = model(ids, features, boxes, labels=asked(ids, T), truth=boxes[:3])
    plain = model(ids, features, boxes, labels=asked(ids, T)).loss
    torch.testing.assert_close(found.loss - plain, 0.025 * model.detector.loss(found.boxes, found.sure, boxes[:3]))
    found.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    again = _model()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(ids, features, boxes).logits, found.logits)


def test_record_sees_the_language_model():
    model, (ids, features, boxes) = _model(), _given()
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        model(ids, features, boxes)
    (stack,) = (node for node in recording.tree.subtree if "entropy" in node)
    assert dict(stack["entropy"].sizes) == {"batch": 2, "layer": 2, "head": 2, "query": 18}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: regions(torch.randn(15, 3), torch.rand(1, 4)), "no square"),
        (lambda: regions(torch.randn(16, 3), torch.rand(4)), r"boxes are \[n, 4\]"),
        (lambda: _model()(_given()[0], torch.randn(2, 5, 8)), "no square"),
        (lambda: _model()(_given()[0], torch.randn(2, 9, 8), torch.rand(4, 4)), "9 patches for"),
        (lambda: _model()(_given()[0], torch.randn(2, 4, 8), torch.rand(3, 4)), "3 boxes for 4 tokens"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_the_class_takes_any_language_model():
    assert isinstance(_model(), Communicative)
