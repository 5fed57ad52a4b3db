"""Boxes that tell each other what they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regard.gaze import Scanpath
from regard.gaze.inductive_gaze import Frames, InductiveConfig, MessagePassing, annotate, label_fixations


def model(seed: int = 0, **knobs) -> MessagePassing:
    torch.manual_seed(seed)
    return MessagePassing(InductiveConfig(**{"features": 3, "classes": 4, "hidden": 8, **knobs})).eval()


def frames(batch: int = 2, objects: int = 5, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, objects, 3, generator=generator), torch.rand(batch, objects, 4, generator=generator)


def test_a_layer_by_hand():
    """Boxes of 1, 2 and 6, each with the mean of the others: 1 + 4, 2 + 3.5, 6 + 1.5, before the norm."""
    net = MessagePassing(InductiveConfig(features=1, classes=1, hidden=1, layers=1, use_boxes=False))
    kept = []
    with torch.no_grad():
        net.layers[0].weight.fill_(1.0)
        net.layers[0].bias.zero_()
        net.layers[0].register_forward_hook(lambda module, given, output: kept.append(output))
        net(torch.tensor([1.0, 2, 6])[None, :, None], torch.zeros(1, 3, 4))
    assert kept[0].flatten().tolist() == [5, 5.5, 7.5]


def test_it_is_the_definition():
    net, (features, boxes) = model(scores=2), frames()
    scores = torch.rand(2, 5, 2)
    state = torch.cat([features, boxes[..., :2], boxes[..., 2:] - boxes[..., :2], scores], -1)
    for layer in net.layers:
        rows = []
        for i in range(5):
            others = state[:, [j for j in range(5) if j != i]].mean(1)
            rows.append(torch.relu(torch.cat([state[:, i], others], -1) @ layer.weight.T + layer.bias))
        state = torch.stack(rows, 1)
        state = state / state.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(net(features, boxes, scores), net.read(state))


def test_order_does_not_matter():
    net, (features, boxes) = model(), frames()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(net(features[:, order], boxes[:, order]), net(features, boxes)[:, order])


def test_masked_boxes_change_nothing():
    for relative in (False, True):
        net, (features, boxes) = model(relative=relative), frames()
        mask = torch.arange(7).expand(2, 7) < 5
        more = torch.cat([features, 9 * torch.ones(2, 2, 3)], 1), torch.cat([boxes, 900 * torch.ones(2, 2, 4)], 1)
        torch.testing.assert_close(net(*more, mask=mask)[:, :5], net(features, boxes))


def test_of_one_box_the_mean_is_nothing():
    net, (features, boxes) = model(layers=1), frames(objects=1)
    state = torch.cat([features, boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], -1)
    layer = net.layers[0]
    own = torch.relu(state @ layer.weight[:, :7].T + layer.bias)
    torch.testing.assert_close(net(features, boxes), net.read(own / own.norm(dim=-1, keepdim=True)))
    assert net(features[:, :0], boxes[:, :0]).shape == (2, 0, 4)


def test_moving_the_camera():
    features, boxes = frames()
    still = model(relative=True)
    torch.testing.assert_close(still(features, boxes + 0.7), still(features, boxes))
    moved = model()
    assert not torch.allclose(moved(features, boxes + 0.7), moved(features, boxes), atol=1e-3)
    blind = model(use_boxes=False)
    assert torch.equal(blind(features, boxes + 0.7), blind(features, boxes))


def test_alone_a_box_does_not_see_the_others():
    features, boxes = frames()
    other = features.clone()
    other[:, 1:] += 1
    alone, together = model(use_neighbours=False), model()
    torch.testing.assert_close(alone(other, boxes)[:, 0], alone(features, boxes)[:, 0])
    assert not torch.allclose(together(other, boxes)[:, 0], together(features, boxes)[:, 0], atol=1e-3)
    assert sum(p.numel() for p in alone.parameters()) == sum(p.numel() for p in together.parameters())


def test_what_it_learns_and_what_is_counted():
    """The label is the sign of a feature: a few frames, and nothing is left to correct."""
    features, boxes = frames(200, 3)
    labels = (features[..., 0] > 0).long()
    mask = torch.ones(200, 3, dtype=torch.bool)
    mask[:, 2] = False
    asked = []

    def oracle(index):
        asked.extend(index.tolist())
        return labels[index].masked_fill(~mask[index], 3)

    net = model(classes=2)
    before = torch.get_rng_state()
    stream = Frames(features[:150], boxes[:150], None, mask[:150])
    judge = Frames(features[150:], boxes[150:], None, mask[150:])
    untrained = net(*stream).argmax(-1)
    history = annotate(net, stream, oracle, judge, labels[150:], rounds=(20, 40, 60), steps=100)
    assert torch.equal(torch.get_rng_state(), before)
    assert [r.frames for r in history] == [20, 60, 120]
    assert len(set(asked)) == 120
    first = asked[:20]
    assert history[0].corrections == int((untrained[first] != labels[first])[:, :2].sum())
    assert history[-1].corrections - history[1].corrections < 0.2 * 120  # of 60 frames, two boxes each
    assert history[-1].accuracy > 0.85 > history[0].accuracy


def test_the_uncertain_come_first():
    features, boxes = frames(30, 2)
    net, asked = model(classes=2), []

    def oracle(index):
        asked.extend(index.tolist())
        return torch.zeros(len(index), 2, dtype=torch.long)

    sure = net(features, boxes).softmax(-1).amax(-1).amin(1)
    stream = Frames(features, boxes)
    annotate(net, stream, oracle, stream, torch.zeros(30, 2), rounds=(5,), choose="uncertain", steps=1)
    assert set(asked) == set(sure.argsort()[:5].tolist())


def test_fixations_get_the_smallest_box():
    path = Scanpath(np.array([[5.0, 5], [50, 5], [90, 90], [10, 10]]), (100, 100))
    boxes = np.array([[0, 0, 60, 60.0], [0, 0, 10, 10]])
    assert label_fixations(path, boxes, ["table", "cup"], background="wall") == ["cup", "table", "wall", "cup"]
    assert label_fixations(path, np.zeros((0, 4)), []) == [None] * 4
    with pytest.raises(ValueError, match="got 1 for 2"):
        label_fixations(path, boxes, ["table"])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda f, b: model()(f[..., :2], b), r"object, 3\].*\[2, 5, 2\]"),
        (lambda f, b: model()(f, 300 * b), "shares of the frame"),
        (lambda f, b: model(scores=2)(f, b), r"object, 2\]: got None"),
        (lambda f, b: annotate(model(), Frames(f, b), None, None, None, rounds=(3,)), r"rounds=\[3\].*of 2"),
        (lambda f, b: annotate(model(), Frames(f, b), None, None, None, rounds=(1,), choose="all"), "'all'"),
    ],
)
def test_refusals(run, message):
    with pytest.raises(ValueError, match=message):
        run(*frames())
