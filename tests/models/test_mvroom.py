"""Views of a room: surfaces behind pixels by hand, samples that are seen and those that are not, a dense oracle."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import regard
from regard.interventions import scale_heads
from regard.models._cameras import project, rays
from regard.models.mvroom import (
    Boxes,
    EpipolarAttention,
    MultiViewDenoiser,
    conditions,
    layout_layers,
    mvroom,
    sample,
    warp,
)

EYE = torch.eye(3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def boxes(*centres, sizes=1.0, walls=()):
    n = len(centres)
    wide = torch.full((n, 3), sizes) if isinstance(sizes, float) else torch.tensor(sizes)
    wall = torch.tensor([i in walls for i in range(n)])
    return Boxes(torch.tensor(centres).float(), wide, EYE.expand(n, 3, 3), torch.arange(n), wall)


def shifted(*x):
    poses = torch.eye(4).repeat(len(x), 1, 1)
    poses[:, 0, 3] = torch.tensor(x)
    return poses


def lens(views, width=8, focal=4.0):
    one = torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, 0.5], [0, 0, 1]])
    return one.expand(views, 3, 3)


def test_a_point_by_hand():
    starts, ways = rays((1, 1), torch.eye(4)[None], torch.tensor([[[1.0, 0, -0.5], [0, 1, 0], [0, 0, 1]]]))
    point = starts[0, 0] + 2 * ways[0, 0]  # pixel 0 is 0.5 to the right of the axis
    torch.testing.assert_close(point, torch.tensor([1.0, 0, 2]))
    places, depth = project(point[None], shifted(1.0), EYE[None])
    assert places[0, 0, 0] == 0
    assert depth[0, 0] == 2


def test_surfaces_in_order_until_a_wall():
    found = layout_layers(
        boxes((0, 0, 6), (0, 0, 2), (0, 0, 4), (0, 0, 9), walls=(2,)), shifted(0.0), EYE[None], (1, 1), layers=4
    )
    assert found.depths.flatten().tolist() == [1.5, 3.5, 0, 0]  # nothing behind the wall
    assert found.labels.flatten().tolist() == [1, 2, -1, -1]
    assert found.extents.flatten().tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(found.world[0, :2, 0, 0], torch.tensor([[0.0, 0, 1.5], [0, 0, 3.5]]))
    torch.testing.assert_close(found.own[0, 0, 0, 0], torch.tensor([0.0, 0, -1]))
    inside = layout_layers(boxes((0, 0, 0), (0, 0, 9), sizes=6.0, walls=(0,)), shifted(0.0), EYE[None], (1, 1))
    assert inside.depths.flatten().tolist() == [3, 0, 0]  # the room's wall, from within


def test_depth_is_along_the_axis_and_boxes_are_turned():
    found = layout_layers(boxes((0, 0, 3)), shifted(0.0), lens(1, focal=20.0), (2, 8))
    torch.testing.assert_close(found.depths[0, 0, 0], torch.full((8,), 2.5))  # a face straight ahead, at all pixels
    way = torch.tensor([(0 - 3.5) / 20, (0 - 0.5) / 20, 1])
    torch.testing.assert_close(found.world[0, 0, 0, 0], 2.5 * way)
    turn = torch.tensor([[math.sqrt(0.5), 0, math.sqrt(0.5)], [0, 1, 0], [-math.sqrt(0.5), 0, math.sqrt(0.5)]])
    turned = boxes((0, 0, 3))._replace(turns=turn[None])
    found = layout_layers(turned, shifted(0.0), EYE[None], (1, 1), layers=1)
    assert found.depths.item() == pytest.approx(3 - math.sqrt(0.5))
    assert found.extents.item() == pytest.approx(2 * math.sqrt(0.5))


def test_a_layout_in_any_precision_and_of_nothing():
    given = boxes((0, 0, 3)), shifted(0.0), lens(1)
    want = layout_layers(*given, (2, 8))
    half = Boxes(*(x.half() if x.is_floating_point() else x for x in given[0]))
    found = layout_layers(half, given[1].half(), given[2].half(), (2, 8))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    empty = layout_layers(Boxes(*(x[:0] for x in given[0])), *given[1:], (2, 8))
    assert empty.depths.shape == (1, 3, 2, 8)
    assert not empty.depths.any()
    assert (empty.labels == -1).all()
    inside = layout_layers(boxes((0, 0, 0), sizes=6.0), *given[1:], (2, 8), layers=1)  # of a box that is no wall
    assert not inside.extents.any()
    assert (inside.depths == 3).all()


def test_conditions_say_nothing_where_nothing_is():
    found = layout_layers(boxes((0, 0, 3), (9, 0, 3)), shifted(0.0, 20.0), lens(2), (2, 8), layers=2)
    told = conditions(found, 2, frequencies=1)
    assert told.shape == (2, 2 * (2 + 7 * 2), 2, 8)
    assert not told[1].any()
    assert told[0, 0].any()
    assert not told[0, 16:].any()  # no second layer
    at = found.own[0, 0, 1, 3], found.world[0, 0, 1, 3] / 8, found.depths[0, 0, 1, 3, None] / 8
    angles = math.pi * torch.cat(at)
    want = torch.stack([angles.sin(), angles.cos()], 1).flatten()
    assert angles[:3].abs().max() > 0.1
    torch.testing.assert_close(conditions(found, 2, frequencies=1, far=8.0)[0, 2:16, 1, 3], want)


def layer(by="layout", dim=8, **knobs):
    made = EpipolarAttention(dim, heads=2, by=by, **knobs)
    nn.init.normal_(made.out.weight)
    return made


def scene(views=(0.0, 0.3, -0.4), batch=2):
    poses, lenses = shifted(*views), lens(len(views))
    found = layout_layers(boxes((0, 0, 3), (0.3, 0, 6), sizes=[[1.0] * 3, [3.0] * 3]), poses, lenses, (2, 8), layers=3)
    assert (found.depths[:, 1] > 0).any()  # behind some pixels there are two
    features = torch.randn(batch, len(views), 2, 8, 8)
    return features, *(x.expand(batch, *x.shape) for x in (poses, lenses, found.depths, found.extents))


@pytest.mark.parametrize("by", ["layout", "even"])
def test_attention_is_that_of_samples_one_by_one(by):
    made, (features, poses, lenses, depths, extents) = layer(by), scene()
    found = made(features, poses, lenses, depths, extents)
    at, there = made.points(depths, extents)
    maps = {name: getattr(made, name)(features[0]) for name in ("query", "key", "value")}

    def between(picture, x, y):  # [row, column, dim], linear in both directions, the border going on
        x, y = min(max(x, 0), 7), min(max(y, 0), 1)
        a, b = min(int(x), 6), min(int(y), 0)
        u, v = x - a, y - b
        upper = (1 - u) * picture[b, a] + u * picture[b, a + 1]
        return (1 - v) * upper + v * ((1 - u) * picture[b + 1, a] + u * picture[b + 1, a + 1])

    for view, row, column in [(0, 0, 3), (0, 1, 4), (1, 1, 4), (1, 0, 7), (2, 0, 0), (2, 1, 7)]:
        starts, ways = rays((2, 8), poses[0], lenses[0])
        keys, values = [maps["key"][view, row, column]], [maps["value"][view, row, column]]
        for d, real in zip(at[0, view, row * 8 + column], there[0, view, row * 8 + column], strict=True):
            point = starts[view, 0] + d * ways[view, row * 8 + column]
            for other in range(3):
                local = point - poses[0, other, :3, 3]
                x, y = float(4 * local[0] / local[2] + 3.5), float(4 * local[1] / local[2] + 0.5)
                if other == view or not real or not (-0.5 <= x <= 7.5 and -0.5 <= y <= 1.5):
                    continue
                angles = d / made.far * math.pi * 2.0 ** torch.arange(4)
                keys.append(between(maps["key"][other], x, y) + made.depth(torch.cat([angles.sin(), angles.cos()])))
                values.append(between(maps["value"][other], x, y))
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = torch.stack([maps["query"][view, row, column][head] @ key[head] for key in keys]) / 2
            heads.append(scores.softmax(0) @ torch.stack(values)[:, head])
        torch.testing.assert_close(found[0, view, row, column], made.out(torch.cat(heads)), atol=1e-4, rtol=1e-3)


def test_samples_lie_in_boxes_and_once_on_walls():
    made = layer(samples=2)
    depths, extents = torch.tensor([2.0, 5.0, 0.0]).view(1, 1, 3, 1, 1), torch.tensor([1.0, 0, 0]).view(1, 1, 3, 1, 1)
    at, there = made.points(depths, extents)
    assert at[0, 0, 0, :3].tolist() == [2.25, 2.75, 5]
    assert there[0, 0, 0].tolist() == [True, True, True, False, False, False]
    at, there = layer("even", samples=2, near=1.0, far=3.0).points(depths, extents)
    torch.testing.assert_close(at[0, 0, 0], torch.linspace(1, 3, 6))
    assert there.all()


def test_cameras_at_one_place_see_the_same_pixel_at_any_depth():
    made, (features, poses, lenses, depths, extents) = layer(), scene((0.0, 0.0))
    made.depth.weight.data.zero_()
    same = features[:, :1].expand(-1, 2, -1, -1, -1)
    found = made(same, poses, lenses, depths, extents)
    torch.testing.assert_close(found, made.out(made.value(same)), atol=1e-4, rtol=1e-3)


def test_what_no_view_sees_is_left_to_the_pixel_itself():
    made, (features, poses, lenses, depths, extents) = layer(), scene()
    own = made.out(made.value(features))
    torch.testing.assert_close(made(features, poses, lenses, 0 * depths, extents), own)  # an empty layout
    away = poses.clone()
    away[:, 1:, 0, 3] += 100
    torch.testing.assert_close(made(features, away, lenses, depths, extents)[:, 0], own[:, 0])
    behind = poses.clone()
    behind[:, 1:, 2, 3] += 50
    torch.testing.assert_close(made(features, behind, lenses, depths, extents)[:, 0], own[:, 0])
    straight, middle = torch.eye(4).repeat(2, 3, 1, 1), lenses.clone()
    straight[:, 1:, 2, 3], middle[..., :2, 2] = 50, 0  # straight behind, where its first pixel would be
    torch.testing.assert_close(
        made(features, straight, middle, torch.ones_like(depths), extents)[:, 0, 0, 0], own[:, 0, 0, 0]
    )


@pytest.mark.parametrize("by", ["layout", "even", "all"])
def test_views_have_no_order_and_scenes_are_their_own(by):
    made, given = layer(by), scene()
    found = made(*given)
    order = [2, 0, 1]
    torch.testing.assert_close(made(*(x[:, order] for x in given)), found[:, order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(made(*(x[:1] for x in given)), found[:1], atol=1e-5, rtol=1e-4)
    assert not EpipolarAttention(8, heads=2, by=by)(*given).any()  # nothing is added at first


def test_record_sees_pixels_look_at_samples():
    made, given = layer(), scene(batch=1)
    with torch.no_grad(), regard.record(made, "entropy") as recording:
        made(*given)
    (stack,) = recording.tree.children.values()
    assert dict(stack["entropy"].sizes) == {"batch": 3 * 16, "layer": 1, "head": 2, "query": 1}
    assert np.isfinite(stack["entropy"]).all()
    model, told, cameras, layers = denoiser()
    for block in model.blocks:
        nn.init.normal_(block.views.out.weight)
    noisy, step = torch.randn(2, 2, 3, 2, 8), torch.tensor([0.1, 0.9])
    with torch.no_grad():
        found = model.eval()(noisy, step, told, *cameras, layers)
        for stack in ("encoder", "encoder_cross"):  # within views, and between them
            with regard.intervene(model, scale_heads({(1, 0): 0.0}, stack=stack)):
                assert (model(noisy, step, told, *cameras, layers) - found).abs().max() > 1e-4


def test_what_is_not_seen_may_hold_anything():
    made, (features, poses, lenses, depths, extents) = layer(), scene()
    away = poses.clone()
    away[:, 1:, 0, 3] += 100
    found = made(features, away, lenses, depths, extents)
    features[:, 1:] = math.nan
    again = made(features, away, lenses, depths, extents)
    torch.testing.assert_close(again[:, 0], found[:, 0])
    again[:, 0].sum().backward()
    assert made.out.bias.grad.isfinite().all()


@pytest.mark.parametrize("by", ["layout", "even", "all"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_cameras_whole(by, dtype):
    made, given = layer(by), scene()
    want = made(*given)
    found = made.to(dtype)(given[0].to(dtype), *given[1:])
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), want, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("by", ["layout", "even", "all"])
def test_no_scenes_and_a_single_view(by):
    made, given = layer(by), scene()
    assert made(*(x[:0] for x in given)).shape == (0, 3, 2, 8, 8)
    if by != "all":
        one = [x[:, :1] for x in given]
        torch.testing.assert_close(made(*one), made.out(made.value(one[0])))  # there is nobody to ask


def denoiser(by="layout"):
    found = layout_layers(boxes((0, 0, 3)), shifted(0.0, 0.3), lens(2), (2, 8), layers=2)
    layers = type(found)(*(x[None].expand(2, *x.shape) for x in found))
    told = conditions(layers, 1, frequencies=1)
    cameras = shifted(0.0, 0.3).expand(2, 2, 4, 4), lens(2).expand(2, 2, 3, 3)
    return mvroom(told.shape[2], dim=16, layers=2, heads=2, by=by), told, cameras, layers


@pytest.mark.parametrize("by", ["layout", "even", "all", "none"])
def test_views_learn_of_one_another_only_by_asking(by, tmp_path):
    model, told, cameras, layers = denoiser(by)
    noisy, step = torch.randn(2, 2, 3, 2, 8), torch.tensor([0.1, 0.9])
    for block in model.blocks if by != "none" else []:
        nn.init.normal_(block.views.out.weight)
    found = model(noisy, step, told, *cameras, layers)
    assert found.shape == noisy.shape
    other = noisy.clone()
    other[:, 1] += 1
    changed = (model(other, step, told, *cameras, layers)[:, 0] - found[:, 0]).abs().amax()
    assert bool(changed > 1e-4) == (by != "none")
    found.square().mean().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert not {name for name in unused if not (by == "all" and "views.depth" in name)}
    model.eval().save_pretrained(tmp_path)
    again = MultiViewDenoiser.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(noisy, step, told, *cameras, layers), found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("by", ["layout", "none"])
def test_a_block_by_its_parts(by):
    model, told, cameras, layers = denoiser(by)
    noisy, step = torch.randn(2, 2, 3, 2, 8), torch.tensor([0.1, 0.9])
    found = model(noisy, step, told, *cameras, layers)
    for given in (
        (noisy + 1, step, told),
        (noisy, step / 2, told),
        (noisy, step, told * torch.linspace(1, 2, 8)),
        (noisy.flip(-1), step, told.flip(-1)),  # places in the picture count
    ):
        changed = model(*given, *cameras, layers)
        assert (changed - (found.flip(-1) if given[0] is not noisy and by == "none" else found)).abs().max() > 1e-3
    block, x, time = model.blocks[0], torch.randn(2, 2, 2, 8, 16), torch.randn(2, 1, 1, 1, 16)
    given = *cameras, layers.depths, layers.extents
    scale, shift, second, moved = block.time(time).chunk(4, -1)
    flat = (block.norms[0](x) * (1 + scale) + shift).view(4, 16, 16)
    want = x + block.own(flat, flat, flat)[0].view_as(x)
    if by != "none":
        nn.init.normal_(block.views.out.weight)
        want = want + block.views(block.norms[2](want), *given)
    want = want + block.mlp(block.norms[1](want) * (1 + second) + moved)
    torch.testing.assert_close(block(x, time, *given), want)


def test_every_setting_is_kept(tmp_path):
    knobs = {"channels": 2, "dim": 16, "layers": 1, "heads": 2, "by": "even", "samples": 5, "near": 0.5, "far": 9.0}
    mvroom(7, **knobs).save_pretrained(tmp_path)
    loaded = MultiViewDenoiser.from_pretrained(tmp_path)
    assert (loaded.enter.in_features, loaded.leave.out_features, len(loaded.blocks)) == (7 + 2 + 12, 2, 1)
    views = loaded.blocks[0].views
    assert (views.heads, views.by, views.samples, views.near, views.far) == (2, "even", 5, 0.5, 9.0)
    assert loaded.blocks[0].own.num_heads == 2


def test_samples_by_a_schedule_that_scales_its_noise():
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    _, told, cameras, layers = denoiser()
    seen = []

    class Clean(nn.Module):
        def forward(self, noisy, step, *given):
            seen.append(float(noisy.std()))
            return torch.full_like(noisy, 0.25)

    scheduler = EulerDiscreteScheduler(50, prediction_type="sample")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the scheduler's own, on numpy's arrays
        found = sample(Clean(), scheduler, told, *cameras, layers, steps=10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, torch.full((2, 2, 3, 2, 8), 0.25), atol=0.02, rtol=0)
    noise = torch.randn(2, 2, 3, 2, 8, generator=torch.Generator().manual_seed(0)).std()
    sigma = scheduler.sigmas[:-1]
    torch.testing.assert_close(torch.tensor(seen), noise * sigma / (sigma**2 + 1).sqrt(), atol=0, rtol=1e-3)


def test_samples_by_the_schedule_are_what_it_was_told():
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    _, told, cameras, layers = denoiser()
    shares = []

    class Grey(nn.Module):
        def forward(self, noisy, step, *given):
            assert step.shape == (2,)
            shares.append(round(float(step[0]), 6))
            return torch.full_like(noisy, 0.25)

    scheduler = DDPMScheduler(50, prediction_type="sample")
    state = torch.get_rng_state()
    found = sample(Grey(), scheduler, told, *cameras, layers, steps=10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)  # all is drawn from the generator
    assert shares == [45 / 50, 40 / 50, 35 / 50, 30 / 50, 25 / 50, 20 / 50, 15 / 50, 10 / 50, 5 / 50, 0]
    torch.testing.assert_close(found, torch.full((2, 2, 3, 2, 8), 0.25), atol=0.02, rtol=0)


def test_a_picture_is_seen_by_another_camera():
    pictures, depths = torch.rand(1, 3, 2, 8), torch.full((1, 2, 8), 4.0)
    same, mask = warp(pictures, depths, shifted(0.0), lens(1), torch.eye(4), lens(1)[0])
    assert torch.equal(same, pictures[0])
    assert mask.all()
    moved, mask = warp(pictures, depths, shifted(0.0), lens(1), shifted(2.0)[0], lens(1)[0])  # by two pixels
    assert torch.equal(moved[..., :6], pictures[0, ..., 2:])
    assert mask[:, :6].all()
    assert not mask[:, 6:].any()
    near = depths.clone()
    near[..., 4] = 2.0  # moves by four, and hides what moves by two
    moved, _ = warp(pictures, near, shifted(0.0), lens(1), shifted(2.0)[0], lens(1)[0])
    assert torch.equal(moved[..., 0], pictures[0, ..., 4])
    views = torch.stack([pictures[0], 1 - pictures[0]])  # of two views, the nearer point is seen
    both = torch.cat([depths, depths - 1])
    found, _ = warp(views, both, shifted(0.0, 0.0), lens(2), torch.eye(4), lens(1)[0])
    assert torch.equal(found, views[1])
    swapped, _ = warp(views.flip(0), both.flip(0), shifted(0.0, 0.0), lens(2), torch.eye(4), lens(1)[0])
    assert torch.equal(swapped, views[1])  # whichever comes first
    ahead, behind, corner = torch.eye(4), torch.eye(4), torch.diag(torch.tensor([4.0, 4, 1]))
    ahead[2, 3], behind[2, 3] = 5, -5
    assert not warp(pictures, depths, shifted(0.0), corner[None], ahead, corner)[1].any()  # all is behind the camera
    assert warp(pictures, depths, shifted(0.0), corner[None], behind, corner)[1].any()
    assert not warp(pictures, 0 * depths, shifted(0.0), corner[None], behind, corner)[1].any()  # nor is a camera seen
    assert not warp(pictures, 0 * depths, shifted(0.0), lens(1), torch.eye(4), lens(1)[0])[1].any()


def test_refusals():
    given, eye = scene(), (shifted(0.0), EYE[None])
    (model, told, cameras, layers), noisy = denoiser(), torch.randn(2, 2, 3, 2, 8)
    for ask, said in [
        (lambda: layout_layers(boxes((0, 0, 3)), shifted(0.0, 1.0), EYE[None], (1, 1)), "intrinsics"),
        (lambda: layout_layers(boxes((0, 0, 3)), 2 * shifted(0.0), EYE[None], (1, 1)), "no rotation"),
        (lambda: layout_layers(boxes((0, 0, 3), sizes=0.0), shifted(0.0), EYE[None], (1, 1)), "above 0"),
        (lambda: layout_layers(boxes((0, 0, math.nan)), shifted(0.0), EYE[None], (1, 1)), "finite"),
        (lambda: layout_layers(boxes((0, 0, 3))._replace(turns=2 * EYE[None]), *eye, (1, 1)), "right angles"),
        (lambda: layout_layers(boxes((0, 0, 3))._replace(labels=torch.tensor([-1])), *eye, (1, 1)), "0 or more"),
        (lambda: layout_layers(boxes((0, 0, 3))._replace(walls=torch.tensor([1])), *eye, (1, 1)), "boolean"),
        (lambda: EpipolarAttention(8, heads=0), "divide"),
        (lambda: EpipolarAttention(8, heads=2, near=4.0), "near < far"),
        (lambda: layer()(given[0], given[1][:, :2], *given[2:]), "poses are"),
        (lambda: layer("all")(given[0], given[1], given[2][:1], *given[3:]), "intrinsics"),
        (lambda: model(noisy, torch.ones(1), told, *cameras, layers), r"step \[batch\]"),
        (lambda: model(noisy[..., :4], torch.ones(2), told, *cameras, layers), "noisy pictures and conditions"),
        (lambda: EpipolarAttention(8, heads=2, by="none"), "layout, even, all"),
        (lambda: EpipolarAttention(8, heads=3), "divide"),
        (lambda: mvroom(4, by="some"), "layout, even, all, none"),
        (lambda: layer()(*given[:3], given[3][:, :, :, :1], given[4]), "depths and extents"),
    ]:
        with pytest.raises(ValueError, match=said):
            ask()
