"""Bridging representations: the location term and the bridge by hand, sampled points, and the detector around them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import regard
from regard.models._boxes import iou, suppress
from regard.models.bridging_representations import (
    Bridge,
    BridgedDetector,
    LocationBias,
    bridging_representations,
    centres,
    sample_points,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def _given(dim=16, keys=5, kinds=2):
    points = [torch.randn(2, keys, dim) for _ in range(kinds)]
    return torch.randn(2, 3, 4, dim), centres(3, 4, 8), points, [40 * torch.rand(2, keys, 2) for _ in range(kinds)]


def test_embedding_by_hand():
    found = LocationBias(4, 1, base=None).embedding(torch.tensor([0.3, -2.0]))
    torch.testing.assert_close(found, torch.tensor([math.sin(0.3), math.cos(0.3), math.sin(-2), math.cos(-2)]))
    two = LocationBias(8, 1, base=None, temperature=100.0).embedding(torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(two[:2], torch.tensor([1.0, 0.1]).sin())


@pytest.mark.parametrize("log", [False, True])
def test_what_is_read_from_the_map_is_that_of_stretched_places(log):
    exact, read = LocationBias(8, 3, base=None, log=log), LocationBias(8, 3, base=(20, 30), log=log)
    read.load_state_dict(exact.state_dict())
    whole = torch.stack([torch.randint(-9, 10, (40,)), torch.randint(-14, 15, (40,))], -1).float()
    stretch = torch.tensor([21 / 20, 31 / 30])
    torch.testing.assert_close(read(whole / stretch), exact(whole), atol=1e-5, rtol=1e-4)
    edge = torch.tensor([[10.0, 15.0]])
    torch.testing.assert_close(read(50 * edge), exact(edge))  # beyond the map lies its border


def test_one_point_counts_whole_wherever_it_is():
    level, at, points, places = _given(keys=1)
    bridge = Bridge(16, 4, kinds=2, location=LocationBias(16, 4, base=None))
    (found,) = bridge([level], [at], [points], [places])
    told = sum(a.output(a.value(p)) for a, p in zip(bridge.attentions, points, strict=True))
    torch.testing.assert_close(found, (level + told[:, None]).relu())


def test_only_where_points_lie_from_the_cell_counts():
    level, at, points, places = _given()
    bridge = Bridge(16, 4, kinds=2, location=LocationBias(16, 4, base=None, log=False))
    torch.nn.init.normal_(bridge.location.read.weight)
    (found,) = bridge([level], [at], [points], [places])
    (moved,) = bridge([level], [at + 7], [points], [[p + 7 for p in places]])
    torch.testing.assert_close(moved, found, atol=1e-5, rtol=1e-4)
    (other,) = bridge([level], [at], [points], [[p + 7 for p in places]])
    assert (other - found).abs().max() > 1e-2


def test_bridge_is_softmax_with_a_location_term():
    level, at, points, places = _given(kinds=1)
    bridge = Bridge(16, 2, kinds=1, location=LocationBias(16, 2, base=None))
    torch.nn.init.normal_(bridge.location.read.weight)
    (a,) = bridge.attentions
    expected = torch.empty(2, 3, 4, 16)
    for b, row, column in np.ndindex(2, 3, 4):
        bias = bridge.location((places[0][b] - at[row, column]) / 8)  # [key, head]
        parts = []
        for head, part in enumerate((slice(0, 8), slice(8, 16))):
            scores = a.key(points[0][b])[:, part] @ a.query(level[b, row, column])[part] / 8**0.5 + bias[:, head]
            parts.append(scores.softmax(0) @ a.value(points[0][b])[:, part])
        expected[b, row, column] = (level[b, row, column] + a.output(torch.cat(parts))).relu()
    torch.testing.assert_close(bridge([level], [at], [points], [places])[0], expected, atol=1e-5, rtol=1e-4)


def test_points_are_peaks_moved_by_their_offsets():
    scores = torch.full((1, 4, 5), -9.0)
    scores[0, 1, 2], scores[0, 1, 3], scores[0, 3, 0] = 5.0, 4.0, 3.0  # the second lies beside the first
    offsets, features = torch.zeros(1, 2, 4, 5, requires_grad=True), torch.randn(1, 6, 4, 5, requires_grad=True)
    with torch.no_grad():
        offsets[0, :, 1, 2] = torch.tensor([0.25, -0.5])
    found = sample_points(scores, offsets, features, stride=8, count=2)
    torch.testing.assert_close(found.positions[0], torch.tensor([[22.0, 8.0], [4.0, 28.0]]))
    torch.testing.assert_close(found.features[0, 1], features[0, :, 3, 0])
    (found.positions.sum() + found.features.sum()).backward()
    assert offsets.grad[0, 0, 1, 2] == 8
    assert features.grad[0, 0, 1, 2] == 1
    assert features.grad.sum() == 12


def test_boxes():
    a, b = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2], [0, 0, 2, 2], [5, 5, 6, 6]])
    torch.testing.assert_close(iou(a, b), torch.tensor([[1 / 3, 1.0, 0.0]]))
    assert suppress(torch.cat([a, b]), torch.tensor([0.5, 0.8, 0.9, 0.1]), 0.3).tolist() == [2, 3]


def test_detector_learns_one_picture():
    model = bridging_representations(2, width=16)
    picture = torch.zeros(1, 3, 32, 32)
    picture[:, :, 4:28, 6:26] = 1.0
    box, kind = [torch.tensor([[6.0, 4, 26, 28]])], [torch.tensor([1])]
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        model.loss(model(picture), box, kind).backward()
        optimiser.step()
    boxes, scores, classes = model.eval().detect(picture)[0]
    assert iou(boxes[:1], box[0]) > 0.8
    assert classes[0] == 1
    assert scores[0] > 0.5
    found = model(picture)
    near = sample_points(found.point_logits[:, 2], found.point_offsets[:, 2], picture[..., ::8, ::8], stride=8, count=1)
    torch.testing.assert_close(near.positions[0, 0], torch.tensor([16.0, 16.0]), atol=1.5, rtol=0)


def test_loss_asks_nothing_of_pictures_without_objects_but_that_they_are_empty():
    model, none = BridgedDetector(classes=2, width=16), [torch.zeros(0, 4)]
    found = model(torch.rand(1, 3, 32, 32))
    loss = model.loss(found, none, [torch.zeros(0, dtype=torch.long)])
    loss.backward()
    assert loss.isfinite()
    assert model.logits.weight.grad.abs().sum() > 0
    assert model.deltas.weight.grad is None or not model.deltas.weight.grad.any()


def test_pictures_do_not_meet_and_saved_is_loaded(tmp_path):
    model = BridgedDetector(classes=2, width=16, classify=("centre", "top-left")).eval()
    pictures = torch.rand(3, 3, 32, 40)
    found = model(pictures)
    torch.testing.assert_close(model(pictures[1:2]).logits, found.logits[1:2])
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(BridgedDetector.from_pretrained(tmp_path).eval()(pictures).boxes, found.boxes)


def test_record_counts_the_location_term():
    level, at, points, places = _given(kinds=1)
    bridge = Bridge(16, 2, kinds=1, location=LocationBias(16, 2, base=None))
    torch.nn.init.normal_(bridge.location.read.weight)
    with torch.no_grad(), regard.record(bridge, "rows") as recording:
        bridge([level], [at], [points], [places])
    (stack,) = (node for node in recording.tree.subtree if "rows" in node)
    (a,) = bridge.attentions
    bias = bridge.location((places[0][:, None] - at.flatten(0, 1)[:, None]) / 8).movedim(-1, 1)
    query, key = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (a.query(level.flatten(1, 2)), a.key(points[0])))
    expected = (query @ key.mT / 8**0.5 + bias).softmax(-1)
    np.testing.assert_allclose(np.asarray(stack["rows"])[:, 0], expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: LocationBias(6, 2), "multiple of 4"),
        (lambda: LocationBias(8, 2, base=(5, 4)), "base even"),
        (lambda: Bridge(10, 4, kinds=1, location=None), "10 channels do not divide by 4"),
        (
            lambda: Bridge(8, 2, kinds=1, location=None)([torch.randn(2, 8, 8)], [centres(2, 4, 8)], [[]], [[]]),
            r"maps \[batch, row, column, dim\]",
        ),
        (
            lambda: sample_points(
                torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 2, 2), stride=8, count=5
            ),
            "5 points of 2 x 2 cells",
        ),
        (lambda: BridgedDetector(classes=2, classify=("middle",)), "got middle"),
        (lambda: BridgedDetector(classes=2, width=16)(torch.rand(1, 3, 30, 32)), "divide by 8"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()
