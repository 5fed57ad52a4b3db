"""Places that look at boxes: values by hand, what does not matter, and the network around it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import regard
from regard.models.next_active_object import GuidedAttention, NextActiveObject, inside, next_active_object


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def guided(dim: int = 8, **knobs) -> GuidedAttention:
    model = GuidedAttention(dim, **{"heads": 2, **knobs}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def test_by_hand():
    model = GuidedAttention(1, heads=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.attention.in_proj_weight.fill_(1.0)
        model.attention.out_proj.weight.fill_(1.0)
        model.box.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    boxes = torch.tensor([[[[0.0, 9.0, 9.0, 9.0], [math.log(3), 9.0, 9.0, 9.0]]]])
    # embeddings 0 and log 3, so weights 1/4 and 3/4 for a feature of 1
    found = model(torch.ones(1, 1, 1, 1, 1), boxes)
    torch.testing.assert_close(found.flatten(), torch.tensor([1 + 0.75 * math.log(3)]))


def test_one_box_tells_all_places_the_same():
    model, features = guided(), torch.randn(2, 8, 3, 2, 2)
    nn.init.zeros_(model.mlp[3].weight)
    nn.init.zeros_(model.mlp[3].bias)
    added = model(features, torch.rand(2, 3, 1, 4)) - features
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added))


def test_boxes_have_no_order_and_count_by_shares():
    model, features, boxes = guided(), torch.randn(2, 8, 3, 2, 2), torch.rand(2, 3, 5, 4)
    found = model(features, boxes)
    torch.testing.assert_close(model(features, boxes[:, :, torch.randperm(5)]), found)
    torch.testing.assert_close(model(features, boxes.repeat(1, 1, 2, 1)), found)


def test_a_frame_sees_its_own_boxes():
    model, features, boxes = guided(), torch.randn(1, 8, 2, 2, 2), torch.rand(1, 6, 5, 4)
    found = model(features, boxes)
    changed = boxes.clone()
    changed[:, [1, 2, 4, 5]] = 0.5  # of six, frames 0 and 3 are taken
    torch.testing.assert_close(model(features, changed), found)
    changed[:, 3] = 0.5
    after = model(features, changed)
    torch.testing.assert_close(after[:, :, 0], found[:, :, 0])
    assert not torch.allclose(after[:, :, 1], found[:, :, 1])


def test_masked_boxes_are_not_there_and_others_of_zeros_are():
    model, features, boxes = guided(), torch.randn(2, 8, 3, 2, 2), torch.rand(2, 3, 4, 4)
    found = model(features, boxes)
    more = torch.cat([boxes, torch.zeros(2, 3, 2, 4)], 2)
    torch.testing.assert_close(model(features, more, torch.arange(6).expand(2, 3, -1) < 4), found)
    assert not torch.allclose(model(features, more), found)


def test_whole_rows_are_dropped_in_training():
    model, features, boxes = (
        guided(drop=0.0, drop_path=0.5).train(),
        torch.randn(64, 8, 2, 2, 2),
        torch.rand(64, 2, 3, 4),
    )
    same = (model(features, boxes) == features).flatten(1)
    assert 4 < int(same.all(1).sum()) < 32  # a quarter drops both additions
    assert (same.any(1) == same.all(1)).all()


def test_gradients():
    model = guided(4).double()
    features, boxes = torch.randn(1, 4, 2, 1, 2).double(), torch.rand(1, 2, 3, 4).double()
    assert torch.autograd.gradcheck(model, (features.requires_grad_(), boxes.requires_grad_()))


def test_pooling_reads_the_box():
    features = torch.zeros(1, 1, 8, 8)
    features[0, 0, :4, 4:] = 1.0
    boxes = torch.tensor([[[0.6, 0.1, 0.9, 0.4], [0.1, 0.6, 0.4, 0.9]]])
    torch.testing.assert_close(inside(features, boxes), torch.tensor([[[1.0], [0.0]]]))


def test_the_network_trains_and_rows_do_not_touch():
    model = next_active_object(widths=(8, 16), heads=2, nouns=3, verbs=2, drop=0.0).eval()
    clip, boxes = torch.rand(2, 3, 4, 16, 16), torch.rand(2, 4, 5, 4)
    found = model(clip, clip[:, :, -1], boxes)
    assert [tuple(part.shape) for part in found] == [(2, 5), (2, 5, 3), (2, 5, 2), (2, 5)]
    assert (found.time >= 0).all()
    torch.testing.assert_close(
        model(clip[1:], clip[1:, :, -1], boxes[1:]).scores, found.scores[1:], rtol=1e-4, atol=1e-6
    )
    sum(part.square().sum() for part in found).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "bias" not in n)
    other = model(clip, clip[:, :, -1], boxes, guide=torch.rand(2, 4, 5, 4))
    assert not torch.allclose(other.scores, found.scores)


def test_record_sees_places_look_at_boxes():
    model = guided()
    with torch.no_grad(), regard.record(model, "rows") as recording:
        model(torch.randn(2, 8, 3, 2, 2), torch.rand(2, 3, 5, 4))
    (rows,) = (node["rows"] for node in recording.tree.subtree if "rows" in node)
    assert dict(rows.sizes) == {"batch": 6, "layer": 1, "head": 2, "query": 4, "key": 5}
    np.testing.assert_allclose(rows.sum("key"), 1, rtol=1e-5)


def test_saved_and_loaded(tmp_path):
    model = next_active_object(widths=(8, 16), heads=2, nouns=3, verbs=2).eval()
    model.save_pretrained(tmp_path)
    given = torch.rand(1, 3, 4, 16, 16), torch.rand(1, 3, 16, 16), torch.rand(1, 4, 5, 4)
    assert torch.equal(NextActiveObject.from_pretrained(tmp_path).eval()(*given).scores, model(*given).scores)


def test_refusals():
    model = guided()
    with pytest.raises(ValueError, match=r"a multiple of 3 frames; got \[2, 4, 5, 4\]"):
        model(torch.randn(2, 8, 3, 2, 2), torch.rand(2, 4, 5, 4))
    with pytest.raises(ValueError, match="with a box in each frame"):
        model(torch.randn(2, 8, 3, 2, 2), torch.rand(2, 3, 5, 4), torch.zeros(2, 3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="6 channels do not divide by 4 heads"):
        GuidedAttention(6, heads=4)


def test_what_is_no_box_does_not_count_whatever_stands_there():
    model, features, boxes = guided(), torch.randn(2, 8, 3, 2, 2), torch.rand(2, 3, 5, 4)
    mask = (torch.arange(5) < 4).expand(2, 3, 5)
    found = model(features, boxes, mask)
    boxes[:, :, 4] = math.nan
    torch.testing.assert_close(model(features, boxes, mask), found)
    with pytest.raises(ValueError, match=r"features are \[batch, 8, frame, row, column\]"):
        model(features[:, :4], boxes)
