"""Search by an eccentric eye."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from regard.gaze.search_asymmetry import (
    EccentricConfig,
    EccentricNet,
    asymmetry_index,
    eccentric_pool,
    priority,
    search,
)


def net(seed: int = 0, **knobs) -> EccentricNet:
    torch.manual_seed(seed)
    return EccentricNet(EccentricConfig(classes=3, channels=(4, 4, 8), **knobs)).eval()


def test_without_a_slope_it_is_plain_pooling():
    x = torch.randn(2, 3, 12, 20)
    assert torch.allclose(eccentric_pool(x, slope=0.0, fovea=2, ring=1), F.avg_pool2d(x, 2), atol=1e-6)


def test_windows_by_hand():
    """Fovea of 4 pixels, rings of 4, slope 0.5: windows of 2 within 4, of 4 to 8, of 6 to 12, of 8 to 16."""
    x = torch.zeros(1, 1, 32, 32)
    x[0, 0, 16, 16] = 1  # output 8, 8, 1.4 pixels from the middle
    x[0, 0, 16, 28] = 1  # output 8, 14, at 13.04: its window of 8 spans rows 13 to 20, columns 25 to 32, one outside
    found = eccentric_pool(x, slope=0.5, fovea=4, ring=4)[0, 0]
    assert found[8, 8] == pytest.approx(1 / 4)
    assert found[8, 14] == pytest.approx(1 / (8 * 7))
    assert found[8, 11] == 0  # at 7.07, window of 4: columns 21 to 24
    assert found[8, 12] == 0  # at 9.06, window of 6: columns 22 to 27
    assert found[8, 13] == pytest.approx(1 / 36)  # at 11.05: columns 24 to 29


def test_a_border_belongs_to_the_ring_outside_it_and_the_last_ring_reaches_the_corners():
    """The same rings: the fovea ends 2 places from the middle, which is place 8, and the last ring has windows of 8."""
    x = torch.zeros(1, 1, 32, 32)
    x[0, 0, 16, 19] = 1  # in the window of 4 of place 10, columns 19 to 22, not in that of 2
    assert eccentric_pool(x, slope=0.5, fovea=4, ring=4)[0, 0, 8, 10] == pytest.approx(1 / 16)
    x = torch.zeros(1, 1, 32, 32)
    x[0, 0, 4, 4] = 1  # one of 25 pixels in the window of 8 of the corner, cut at the picture's edge
    found = eccentric_pool(x, slope=0.5, fovea=4, ring=4)[0, 0]
    assert found[0, 0] == pytest.approx(1 / 25)
    assert torch.equal(eccentric_pool(x, slope=0.5, fovea=40, ring=4), F.avg_pool2d(x, 2))  # a fovea beyond the picture


def test_windows_grow_from_the_fovea_as_it_was_given_and_borders_are_whole_places():
    x = torch.rand(1, 1, 24, 24)
    wide = eccentric_pool(x, slope=0.5, fovea=5, ring=3)  # places: round(2.5) = 2, round(1.5) = 2; 2 + round(1.5) = 4
    assert torch.allclose(wide[0, 0, 6, 8], x[0, 0, 11:15, 15:19].mean())
    assert torch.allclose(wide[0, 0, 6, 7], x[0, 0, 12:14, 14:16].mean())


def test_an_even_picture_stays_even():
    x = torch.full((1, 2, 40, 24), 3.0)
    assert torch.allclose(eccentric_pool(x, slope=0.4, fovea=3, ring=2), torch.tensor(3.0))
    with pytest.raises(ValueError, match="even"):
        eccentric_pool(x[:, :, 1:], slope=0.0, fovea=1, ring=1)


def test_detail_off_the_centre_is_lost():
    """Stripes of two pixels are as they are in the middle, and grey in the corner of the eye."""
    stripes = (torch.arange(96) // 2 % 2).float().expand(1, 1, 96, 96) * 2 - 1
    seen = eccentric_pool(stripes, slope=0.3, fovea=8, ring=4)[0, 0].abs()
    assert (seen[23:25, 23:25] == 1).all()
    assert seen[:4].mean() < 0.4


def test_priority_is_within_0_and_1_and_finds_the_copy():
    """Among empty places the target's own picture is best; the cue of another display does not matter."""
    model = net()
    cue = torch.zeros(1, 1, 16, 16)
    cue[0, 0, 3:13, 7:9] = 1
    view = torch.zeros(1, 1, 64, 64)
    view[0, 0, 40:56, 8:24] = cue[0, 0]
    found = priority(model, view, cue)[0]
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    row, column = divmod(int(found.argmax()), 64)
    assert 40 <= row < 56
    assert 8 <= column < 24
    other = torch.randn(1, 1, 16, 16)
    both = priority(model, view.repeat(2, 1, 1, 1), torch.cat([cue, other]))
    assert torch.allclose(both[0], found, atol=1e-5)


def displays(n: int, items: int = 6, seed: int = 0):
    """A bright target among dim distractors, on a grid of 4 by 4."""
    generator = torch.Generator().manual_seed(seed)
    pictures, boxes, target = torch.zeros(n, 1, 64, 64), torch.zeros(n, items, 4, dtype=torch.long), []
    for one in range(n):
        for item, cell in enumerate(torch.randperm(16, generator=generator)[:items].tolist()):
            top, left = 16 * (cell // 4), 16 * (cell % 4)
            pictures[one, 0, top + 4 : top + 12, left + 6 : left + 10] = 1.0 if item == 0 else 0.3
            boxes[one, item] = torch.tensor([left, top, left + 16, top + 16])
        target.append(0)
    cue = torch.zeros(n, 1, 16, 16)
    cue[:, :, 4:12, 6:10] = 1.0
    return pictures, cue, boxes, torch.tensor(target)


def test_search_ends_at_the_target_and_never_goes_back():
    pictures, cue, boxes, target = displays(8)
    before = pictures.clone()
    paths = search(net(), pictures, cue, boxes, target)
    assert torch.equal(pictures, before)
    for path, of_one in zip(paths, boxes):
        places = [tuple(place) for place in path.places.tolist()]
        middles = [tuple(m) for m in ((of_one[:, :2] + of_one[:, 2:]) // 2).double().tolist()]
        assert places[0] == (32, 32)
        assert places[-1] == middles[0]
        assert len(set(places[1:])) == len(places) - 1 <= 6
        assert set(places[1:]) <= set(middles)
    assert sum(len(path) - 1 for path in paths) < 2 * 8  # a bright one among dim ones is found nearly at once


def test_search_does_not_depend_on_the_batch():
    pictures, cue, boxes, target = displays(4)
    together = search(net(), pictures, cue, boxes, target)
    alone = search(net(), pictures[2:3], cue[2:3], boxes[2:3], target[2:3])
    assert alone[0].places.tolist() == together[2].places.tolist()
    with pytest.raises(ValueError, match="eval"):
        search(net().train(), pictures, cue, boxes, target)


def test_the_index():
    assert asymmetry_index(1.0, 3.0) == 0.5
    assert asymmetry_index(3.0, 1.0) == -0.5
    assert asymmetry_index(-1.0, 2.0) == 1.0
    assert asymmetry_index(-1.0, 0.0) == 0.0


def test_levels_count_by_their_maxima():
    """Two levels as fine as the display, cued by one pixel: what they give is theirs times the cue's."""
    one, other = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    one[0, 0, 1, 1], other[0, 0, 2, 3] = 3.0, 1.0

    class Levels:
        def features(self, picture, *, eccentric):
            return [one, other] if eccentric else [torch.ones(1, 1, 1, 1)] * 2

    found = priority(Levels(), torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 1, 1))[0]
    assert found[1, 1] == pytest.approx(0.75)
    assert found[2, 3] == pytest.approx(0.25)
    assert found.count_nonzero() == 2
