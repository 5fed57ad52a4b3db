"""The radiance field: merges and projections by hand, views that have no order, a scene that is learned."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import regard
from regard.data import flatland
from regard.models.grf import (
    MERGES,
    AttentionOverViews,
    GeneralRadianceField,
    GRFConfig,
    ViewAttention,
    composed,
    encoded,
    grf,
    project,
    sampled,
)

TINY = GRFConfig(widths=(8, 8), features=8, dim=8, hidden=8, width=16, depth=3, skip=1, positions=2, coarse=8, fine=4)
LENS = torch.tensor([[20.0, 0, 7.5], [0, 20, 7.5], [0, 0, 1]])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_merge_by_hand():
    scores = math.log(3) / 2 * torch.tensor([[[1.0], [3.0]]])
    torch.testing.assert_close(AttentionOverViews()(scores, torch.tensor([[[1.0], [3.0]]])), torch.tensor([[2.5]]))


def test_a_ray_by_hand():
    # half of the light stops at the first sample, the rest at the last, which nothing comes behind
    density, colour = torch.tensor([[math.log(2), 0.0, 5.0]]), torch.eye(3)[None]
    found, weights = composed(density, colour, torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.0, 0.5]]))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.0, 0.5]]))
    empty, _ = composed(torch.zeros(1, 3), colour, torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(empty, torch.ones(1, 3))  # white


def test_encoded_by_hand():
    found = encoded(torch.tensor([[math.pi / 2, 0.0]]), 2)
    torch.testing.assert_close(found, torch.tensor([[math.pi / 2, 0, 1, 0, 0, 0, 0, 1, -1, 1]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("merge", ["attention", "mean", "max"])
def test_views_have_no_order_and_equal_ones_count_once(merge):
    model, features, places = ViewAttention(8, 3, 6, hidden=8, merge=merge), torch.randn(5, 4, 8), torch.randn(5, 1, 3)
    found = model(features, places)
    torch.testing.assert_close(model(features[:, [2, 0, 3, 1]], places), found)
    torch.testing.assert_close(model(features.repeat(1, 2, 1), places), found)


def test_one_view_is_taken_whole():
    model, features, places = ViewAttention(8, 3, 6, hidden=8), torch.randn(5, 1, 8), torch.randn(5, 1, 3)
    found = model(features, places)
    nn.init.normal_(model.scores.weight)
    torch.testing.assert_close(model(features, places), found)


def test_all_merges_by_weights_are_as_large():
    sizes = {merge: sum(p.numel() for p in ViewAttention(8, 3, 6, merge=merge).parameters()) for merge in MERGES[::2]}
    assert len({sizes["attention"], sum(p.numel() for p in ViewAttention(8, 3, 6, merge="mean").parameters())}) == 1


def test_where_points_are_seen():
    turned = torch.eye(4)
    turned[:3, :3] = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # looks along x
    poses = torch.stack([torch.eye(4), turned])
    places, depth = project(torch.tensor([[0.0, 0, 2], [3.0, 0, 0]]), poses, LENS.expand(2, 3, 3))
    torch.testing.assert_close(depth, torch.tensor([[2.0, 0], [0, 3]]))
    torch.testing.assert_close(places[0, 0], torch.tensor([7.5, 7.5]))  # the middle of the picture
    torch.testing.assert_close(places[1, 1], torch.tensor([7.5, 7.5]))
    torch.testing.assert_close(
        project(torch.tensor([[1.0, 2, 4]]), poses[:1], LENS[None])[0][0, 0], torch.tensor([12.5, 17.5])
    )


def test_between_pixels_and_outside():
    features = torch.arange(8.0).view(1, 1, 2, 4)
    places = torch.tensor([[[1.0, 0.0]], [[1.5, 0.5]], [[9.0, 0.0]], [[1.0, 0.0]]])
    found = sampled(features, places, torch.tensor([[1.0], [1.0], [1.0], [-1.0]]))
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([1.0, 3.5, 0.0, 0.0]))


def test_pixels_of_flatland_are_where_they_are_projected():
    from regard.claims.models.grf import PIXELS, worlds

    data = worlds(3, (0.3, 0.3), 5)
    world = flatland.discs(3, seed=5, index=1)
    origin, rays = flatland.camera(0.4, pixels=PIXELS)
    line = flatland.trace(world, origin, rays)
    seen = line.disc >= 0
    assert seen.any()
    np.testing.assert_allclose(np.linalg.norm(line.points[seen] - world.centres[line.disc[seen]], axis=1), 0.3)
    assert flatland.visible(world, line.points[seen], origin).all()
    # what a view sees of a point that it can see is the point's colour
    pictures, places, depth = (data[name][1] for name in ("pictures", "places", "depth"))
    column = places[..., 0].round().long().clamp(0, PIXELS - 1)
    same = (pictures[torch.arange(4), :, 0][torch.arange(4), :, column] - data["colours"][1][:, None]).abs().amax(
        -1
    ) < 1e-6
    there = data["there"][1]
    assert (
        same[there].sum(1) >= data["views"][1][there] - 1
    ).all()  # a point at a disc's rim may round to its neighbour
    assert (depth > 0).all()


def test_slots_merge_too():
    field, lens = grf(**{**vars(TINY), "merge": "slots"}), LENS.expand(2, 3, 3)
    rays = torch.zeros(5, 3), torch.tensor([[0.0, 0, 1]]).expand(5, 3)
    made = field(torch.rand(2, 3, 16, 16), torch.eye(4).expand(2, 4, 4), lens, *rays, near=1, far=3)
    assert made.colour.shape == (5, 3)
    assert made.colour.isfinite().all()


def test_a_scene_is_learned():
    field, picture = GeneralRadianceField(TINY), torch.zeros(1, 3, 16, 16)
    picture[:, 0, :, 8:] = 1.0  # black at the left, red at the right
    where = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="xy"), -1).flatten(0, 1)
    rays = torch.cat([(where - 7.5) / 20, torch.ones(256, 1)], -1)
    truth = picture[0].flatten(1).T
    optimiser, losses = torch.optim.Adam(field.parameters(), 3e-3), []
    for _ in range(60):
        some = torch.randint(256, (64,))
        made = field(picture, torch.eye(4)[None], LENS[None], torch.zeros(64, 3), rays[some], near=1.0, far=3.0)
        losses.append((made.colour - truth[some]).square().mean() + (made.coarse - truth[some]).square().mean())
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert all(p.grad is not None for p in field.views.parameters())


def test_in_evaluation_nothing_is_drawn():
    field = GeneralRadianceField(TINY).eval()
    inputs = torch.rand(2, 3, 16, 16), torch.eye(4).expand(2, 4, 4), LENS.expand(2, 3, 3)
    rays = torch.zeros(5, 3), torch.tensor([[0.0, 0, 1]]).expand(5, 3)
    first, again = (field(*inputs, *rays, near=1.0, far=3.0) for _ in range(2))
    assert torch.equal(first.colour, again.colour)


def test_it_is_recorded():
    model = ViewAttention(8, 3, 6, hidden=8)
    with regard.record(model, "entropy") as recording:
        model(torch.randn(5, 4, 8), torch.randn(5, 1, 3))
    (found,) = recording.tree.children.values()
    assert dict(found["entropy"].sizes)["head"] == 6  # one for each channel
    assert float(found["entropy"].max()) <= math.log(4) + 1e-6


def test_refusals():
    with pytest.raises(ValueError, match="merge is one of attention, slots, mean, max; got 'sum'"):
        ViewAttention(8, 3, 6, merge="sum")
    with pytest.raises(ValueError, match=r"of one view or more; got \[5, 0, 8\]"):
        ViewAttention(8, 3, 6)(torch.randn(5, 0, 8), torch.randn(5, 1, 3))
    field, rays = GeneralRadianceField(TINY), (torch.zeros(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="pose 1 is no rotation and shift"):
        poses = torch.stack([torch.eye(4), 2 * torch.eye(4)])
        field(torch.rand(2, 3, 16, 16), poses, LENS.expand(2, 3, 3), *rays, near=1.0, far=3.0)
    with pytest.raises(ValueError, match="have a pose and intrinsics each"):
        field(torch.rand(0, 3, 16, 16), torch.eye(4)[None][:0], LENS[None][:0], *rays, near=1.0, far=3.0)
    with pytest.raises(ValueError, match="from near to far"):
        field(torch.rand(1, 3, 16, 16), torch.eye(4)[None], LENS[None], *rays, near=3.0, far=1.0)
    with pytest.raises(ValueError, match="2 coarse samples or more"):
        grf(coarse=1)
    with pytest.raises(ValueError, match="3 where it has fine ones"):
        grf(coarse=2, fine=2)
    with pytest.raises(ValueError, match="hardly fit into the unit disc"):
        flatland.discs(30)
