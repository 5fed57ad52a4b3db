"""Occlusion fields: vector attention by hand and against a plain loop, neighbours, and clouds that have no order."""

from __future__ import annotations

import math

import pytest
import torch

import regard
from regard.call import Unreadable
from regard.models.occlusion_fields import (
    Field,
    OcclusionField,
    PointEncoder,
    VectorAttention,
    farthest,
    nearest,
    occlusion_fields,
    taken,
)

SMALL = {"width": 8, "steps": 1, "scene": 8, "encoder_neighbours": 4, "pooled": 4, "neighbours": 4, "local": 3}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def _clouds(queries=5, keys=9, dim=8, dim2=6):
    return torch.randn(2, queries, dim), torch.randn(2, queries, 3), torch.randn(2, keys, dim2), torch.randn(2, keys, 3)


def test_one_neighbour_is_read_whole():
    attention, (x, at, keys, places) = VectorAttention(8, 6, neighbours=1), _clouds()
    found = attention(x, at, keys, places)
    near = torch.cdist(at, places).argmin(-1, keepdim=True)
    apart = attention.places(at - taken(places, near)[:, :, 0])
    torch.testing.assert_close(found.output, attention.value(taken(keys, near)[:, :, 0]) + apart)
    torch.testing.assert_close(found.weights, torch.ones(2, 5, 1))


def test_channels_have_weights_of_their_own():
    """Scores of log 3 and 0 in the first of four channels, equal ones in the others."""
    attention = VectorAttention(4, 4, neighbours=2).eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
        attention.key.weight.copy_(-torch.eye(4))  # a score is the query less the key
        attention.value.weight.copy_(torch.eye(4))
        attention.scores[0].weight[:4] = torch.eye(4)
        attention.scores[2].weight[:, :4] = torch.eye(4)
    keys = torch.tensor([[[2 * math.log(3), 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]]])
    found = attention(torch.zeros(1, 1, 4), torch.zeros(1, 1, 3), keys, torch.tensor([[[1.0, 0, 0], [2.0, 0, 0]]]))
    torch.testing.assert_close(found.output[0, 0, 0], torch.tensor(0.75 * 2 * math.log(3)))
    torch.testing.assert_close(found.weights[0, 0], torch.tensor([(0.75 + 1.5) / 4, (0.25 + 1.5) / 4]))


def test_vector_attention_is_the_loop_it_stands_for():
    attention, (x, at, keys, places) = VectorAttention(8, 6, neighbours=3), _clouds()
    found = attention(x, at, keys, places).output
    for b in range(2):
        for i in range(5):
            near = (places[b] - at[b, i]).square().sum(-1).argsort()[:3]
            apart = attention.places(at[b, i] - places[b, near])
            scores = attention.scores(attention.query(x[b, i]) - attention.key(keys[b, near]) + apart) / 8**0.5
            expected = (scores.softmax(0) * (attention.value(keys[b, near]) + apart)).sum(0)
            torch.testing.assert_close(found[b, i], expected, atol=1e-5, rtol=1e-4)


def test_a_shift_of_all_changes_nothing_and_the_cloud_has_no_order():
    attention, (x, at, keys, places) = VectorAttention(8, 6, neighbours=3), _clouds()
    found, order = attention(x, at, keys, places).output, torch.randperm(9)
    torch.testing.assert_close(attention(x, at + 2, keys, places + 2).output, found, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(attention(x, at, keys[:, order], places[:, order]).output, found)


def test_means_of_what_is_around_by_hand():
    field = Field(2, outputs=1, scene=2, local=2, neighbours=2)
    places = torch.tensor([[[1.0, 0, 0], [0, 3.0, 0], [9.0, 0, 0]]])
    found = field.around(torch.zeros(1, 1, 3), torch.tensor([[[4.0, 0.0], [0.0, 8.0], [5.0, 5.0]]]), places)
    torch.testing.assert_close(found, torch.tensor([[[3.0, 2.0]]]), atol=1e-3, rtol=0)


def test_code_by_hand():
    field = Field(2, outputs=1, scene=2, frequencies=2)
    point = torch.tensor([0.5, -1.0, 2.0, 0.0])
    low, high = 0.2 * math.pi * point, 0.4 * math.pi * point
    torch.testing.assert_close(field.code(point), torch.cat([point, low.sin(), low.cos(), high.sin(), high.cos()]))


@pytest.mark.parametrize(("blocks", "layers", "after"), [(6, 2, [2, 4]), (6, 1, [3]), (3, 1, [1]), (6, 0, [])])
def test_which_blocks_attend(blocks, layers, after):
    field, features, places = Field(4, outputs=2, scene=4, blocks=blocks, layers=layers), torch.randn(1, 20, 4), None
    places = torch.randn(1, 20, 3)
    assert field.attend_after == after
    _, reads = field(torch.randn(1, 5, 4), features, places, torch.randn(1, 4))
    assert len(reads) == layers


def test_nearest_and_farthest():
    places = torch.tensor([[[0.0], [1.0], [5.0], [3.0]]])
    assert nearest(torch.tensor([[[2.4]]]), places, 3).tolist() == [[[3, 1, 0]]]
    assert farthest(places, 4).tolist() == [[0, 2, 3, 1]]


def test_encoder_keeps_points_of_the_cloud_and_pools_their_neighbours():
    encoder, cloud = PointEncoder(6, space=2, width=8, steps=2, neighbours=4, pooled=4, scene=5), torch.randn(2, 40, 6)
    found = encoder(cloud)
    assert found.features.shape == (2, 4, 32)
    torch.testing.assert_close(found.places, taken(cloud[..., :2], found.indices))
    assert all(len(set(row)) == 4 for row in found.indices.tolist())
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(39)])  # the first point stays
    torch.testing.assert_close(encoder(cloud[:, order]).scene, found.scene, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("space", [2, 3])
def test_clouds_do_not_meet_nor_do_queries_saved_is_loaded_and_it_trains(space, tmp_path):
    model = occlusion_fields(space=space, classes=3, **SMALL)
    cloud, queries = torch.rand(2, 30, space + 4), torch.rand(2, 7, space + 1)
    found = model(cloud, queries)
    torch.testing.assert_close(model(cloud[1:], queries[1:, 2:3]).occupied, found.occupied[1:, 2:3])
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(OcclusionField.from_pretrained(tmp_path)(cloud, queries).colour, found.colour)
    there, kinds = torch.rand(2, 7) > 0.5, torch.randint(3, (2, 7))
    found.loss(there, torch.rand(2, 7, 3), there, kinds).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_colour_counts_where_something_is():
    model = occlusion_fields(**SMALL)
    found, none = model(torch.rand(1, 30, 7), torch.rand(1, 7, 4)), torch.zeros(1, 7, dtype=torch.bool)
    a, b = (found.loss(none, torch.full((1, 7, 3), value)) for value in (0.0, 1.0))
    torch.testing.assert_close(a, b)
    off = found.loss(~none, found.colour + 0.25) - found.loss(~none, found.colour)
    torch.testing.assert_close(off, torch.tensor(0.25))


def test_record_says_that_it_cannot_read_it():
    model = occlusion_fields(**SMALL)
    with (
        pytest.raises(Unreadable, match="VectorAttention"),
        pytest.warns(UserWarning, match="not recorded"),
        torch.no_grad(),
        regard.record(model, "entropy"),
    ):
        model(torch.rand(1, 30, 7), torch.rand(1, 7, 4))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: occlusion_fields(space=4), "2 or 3 axes"),
        (lambda: occlusion_fields(**SMALL)(torch.rand(1, 30, 6), torch.rand(1, 7, 4)), "points of 3 axes"),
        (lambda: occlusion_fields(**SMALL)(torch.rand(1, 30, 7), torch.rand(1, 7, 3)), "points of 3 axes"),
        (lambda: occlusion_fields(**SMALL)(torch.rand(1, 9, 7), torch.rand(1, 7, 4)), "neighbours of 3 points"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()
