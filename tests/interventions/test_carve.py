"""carve: contrast, sums, what is kept of a picture, and the picture that the model is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import SEEING, asked, asking
from PIL import Image

import regard
from regard.interventions import _picture as picture
from regard.interventions.carve import carve, contrast, depth, refine, relevance, summed


def grid(*rows):
    return np.array(rows, float)


def drawn(size=(8, 8)):
    values = np.random.default_rng(0).integers(1, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_the_contrast_by_hand():
    task, general = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.4, 0.2])
    assert torch.allclose(contrast(task[None], general[None])[0], torch.tensor([4.0, 1.0, 0.5, 0.5]))
    found = contrast(task[None], general[None].repeat(3, 1), lam=0.1)  # the shorter answer ends it
    assert torch.allclose(found, torch.tensor([[2.0, 0.75, 0.4, 1 / 3]]))


def test_later_steps_count_more():
    some = torch.tensor([[[1.0], [2.0]], [[10.0], [20.0]]])  # [step, layer, patch]
    assert summed(some).tolist() == [3.0 + 2 * 30.0]
    assert summed(some, "first").tolist() == [3.0]
    assert summed(some, "equal").tolist() == [33.0]


def test_layers_at_the_papers_depth():
    assert depth(range(28)) == list(range(20, 26))
    assert depth(range(6)) == [4, 5]
    assert depth(range(1)) == [0]


def test_one_region_is_cut_out_and_enlarged():
    fused = np.zeros((8, 8))
    fused[2:4, 4:8] = 1.0
    found = refine(drawn(), fused, top=8 / 64)
    assert found.box == (4, 2, 8, 4)
    assert np.array_equal(found.mask, fused > 0)
    assert (np.asarray(found.masked)[~found.mask] == 0).all()
    assert np.array_equal(np.asarray(found.masked)[found.mask], np.asarray(drawn())[found.mask])
    assert found.crop.size == (16, 8)  # by 4, until it is as high as the picture
    again = refine(drawn(), 3 * fused, top=8 / 64)
    assert again.box == found.box


def test_regions_touch_by_edges_and_the_weightiest_stay():
    fused = grid([9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 0, 5], [0, 0, 5, 5])
    kept = {regions: refine(drawn((4, 4)), fused, top=5 / 16, regions=regions).mask.sum() for regions in (1, 2, 3)}
    assert kept == {1: 3, 2: 4, 3: 5}  # 15 in three pixels, then 9 and 9, which touch by a corner
    one = refine(drawn((4, 4)), grid([20, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 5], [0, 0, 5, 5]), top=4 / 16, regions=1)
    assert one.mask.sum() == 1  # the sum counts
    size = refine(
        drawn((4, 4)), grid([20, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 5], [0, 0, 5, 5]), top=4 / 16, regions=1,
        strategy="size",
    )  # fmt: skip
    assert size.mask.sum() == 3


def test_small_regions_are_dropped_by_their_size():
    fused = np.zeros((64, 64))
    fused[:, :40] = 2.0
    fused[0, 60] = fused[10, 50:54] = 2.0
    found = refine(drawn((64, 64)), fused, top=(64 * 40 + 5) / 64**2, strategy="remove_small")
    assert found.mask[10, 50]  # 4 of 2565, which is more than one in a thousand
    assert not found.mask[0, 60]


def test_where_all_is_kept_the_picture_stays():
    found = refine(drawn(), np.ones((8, 8)))
    assert found.mask.all()
    assert found.box == (0, 0, 8, 8)
    assert np.array_equal(np.asarray(found.crop), np.asarray(drawn()))


@torch.no_grad()
@pytest.mark.parametrize("name", SEEING)
def test_the_refined_picture_is_the_one_that_is_read(name):
    model, processor, inputs, images = asked(name)
    how = {"steps": 2, "general": "w9"}
    made = carve.fit(model, inputs, processor, top=0.3, **how)
    maps = relevance(model, inputs, processor, **how)
    new = []
    for image, values, kept in zip(images, maps, made.kept):
        refined = refine(image, picture.spread(values, image.size).astype(float), top=0.3)
        assert np.array_equal(kept.numpy(), refined.mask)
        box = picture.Box(*(edge / side for edge, side in zip(refined.box, image.size * 2))).grown()
        new.append(picture.cropped(refined.masked, box, image.size))
    other = asking(processor, ["w4 w5 w6", "w7"], new)
    want = model(**other).logits
    with regard.intervene(model, made):
        assert torch.allclose(model(**inputs).logits, want, atol=1e-4)
    assert not torch.allclose(model(**inputs).logits, want, atol=1e-2)


@torch.no_grad()
def test_finer_pictures_bring_detail():
    model, processor, _, images = asked("llava")
    large = [image.resize((4, 4)).resize((64, 64), Image.Resampling.BICUBIC) for image in images]
    small = [image.resize((16, 16), Image.Resampling.BICUBIC) for image in large]
    inputs = asking(processor, ["w4 w5 w6", "w7"], small)
    how = {"steps": 1, "general": "w9", "top": 0.1, "regions": 1}
    fine, coarse = (carve.fit(model, inputs, processor, **how, images=some) for some in (large, None))
    off = (torch.cat(fine.after) - torch.cat(coarse.after)).abs().mean()
    assert 0 < off < 0.5  # the same part of the same picture, drawn anew


def test_a_question_that_looks_as_the_general_one_is_refused():
    model, processor, inputs, _ = asked("llava", ("w9 w8", "w9 w8"))
    with pytest.raises(ValueError, match="carve: the question of row 0 looks where 'w9 w8' does"):
        carve.fit(model, inputs, processor, general="w9 w8", steps=2)
