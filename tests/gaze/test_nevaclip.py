"""Scanpaths towards a caption."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from regard.gaze.nevaclip import blur, explore, foveated, nevaclip, spot

KNOBS = {"fovea": 0.2, "blur_window": 9, "blur_sigma": 3.0, "forgetting": 0.0, "rate": 0.1}


def encoder(seed: int = 0, size: int = 24):
    generator = torch.Generator().manual_seed(seed)
    conv = torch.randn(6, 3, 4, 4, generator=generator)
    line = torch.randn(8, 6 * (size // 4) ** 2, generator=generator)
    return lambda seen: torch.tanh(F.conv2d(seen, conv, stride=4)).flatten(1) @ line.T


def pictures(batch: int = 2, size: int = 24, seed: int = 1):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


TARGET = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))


def test_a_spot_by_hand():
    seen = spot(torch.zeros(1, 2), 3, fovea=1.0)[0]
    assert seen[1, 1] == 1
    assert seen[0, 0] == pytest.approx(math.exp(-2))
    assert seen[0, 1] == pytest.approx(math.exp(-1))
    below = spot(torch.tensor([[1.0, -1.0]]), 3, fovea=1.0, amplitude=0.5)[0]  # row 2, column 0
    assert below[2, 0] == 0.5 == below.max()


def test_a_blur_by_hand():
    """Taps 1 and exp(-1/2) twice; beyond the border the picture is mirrored about its last pixel."""
    line = torch.zeros(1, 1, 5, 5)
    line[..., 1] = 1.0
    tap = math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
    found = blur(line, window=3, sigma=1.0)[0, 0, 2]
    torch.testing.assert_close(found, torch.tensor([2 * tap, 1 / (1 + 2 * math.exp(-0.5)), tap, 0, 0]))
    same = torch.full((1, 2, 16, 16), 0.3)
    torch.testing.assert_close(blur(same, window=9, sigma=3.0), same)
    direct = blur(pictures(), window=9, sigma=3.0)
    at = torch.arange(9) - 4
    window = torch.exp(-(at[:, None] ** 2 + at**2) / 18)
    kernel = (window / window.sum()).expand(3, 1, 9, 9)
    padded = F.pad(pictures(), (4, 4, 4, 4), mode="reflect")
    torch.testing.assert_close(direct, F.conv2d(padded, kernel, groups=3))


def test_a_picture_is_sharp_under_a_wide_spot_and_blurred_without():
    sharp, soft = pictures(), blur(pictures(), window=9, sigma=3.0)
    place = torch.tensor([[0.3, -0.8], [0.0, 0.0]])
    torch.testing.assert_close(foveated(sharp, soft, spot(place, 24, fovea=1e9)), sharp)
    torch.testing.assert_close(foveated(sharp, soft, spot(place, 24, amplitude=0.0)), soft)
    torch.testing.assert_close(foveated(sharp, soft, 3 * torch.ones(2, 24, 24)), sharp)


def test_nothing_moves_on_an_even_picture():
    same = torch.zeros(2, 3, 24, 24)  # of another value a blur is off by rounding, and the sign of that is a step
    knobs = {**KNOBS, "fixations": 2, "iterations": 4}
    found = explore(
        lambda seen: encoder()(seen + 0.3),
        same,
        TARGET,
        lambda *_: torch.full((2, 2), 0.75),
        **knobs,
        random_restarts=False,
    )
    assert torch.allclose(found.losses, found.losses[:1, :1])
    assert (found.places == 0).all()


def oracle(encode, picture, target, uniform, *, fixations, iterations, rate, fovea, forgetting):
    """One picture, in plain numbers: losses by the definition, gradients by differences."""
    soft = blur(picture, window=9, sigma=3.0)
    size, memory, path = picture.shape[-1], 0.0, []
    at = torch.linspace(-1, 1, size, dtype=picture.dtype)

    def seen_at(place):
        return torch.exp(-((at[:, None] - place[0]) ** 2 + (at - place[1]) ** 2) / fovea)

    def loss(place):
        seen = picture + (soft - picture) * (1 - memory - seen_at(place)).clamp(0, 1)
        found = encode(seen)[0]
        return 1 - float(found @ target / found.norm() / target.norm())

    for fixation in range(fixations):
        place, least, kept = [0.0, 0.0], math.inf, None
        for iteration in range(iterations):
            now, step = loss(place), 1e-5
            slopes = [loss([place[0] + step, place[1]]) - now, loss([place[0], place[1] + step]) - now]
            stepped = [p - rate * math.copysign(1, s) for p, s in zip(place, slopes)]
            if now < least:
                least, kept, place = now, stepped, stepped
            else:
                place = (2 * uniform(fixation, iteration)[0] - 1).tolist()
        path.append(kept)
        memory = forgetting * memory + seen_at(kept)
    return path


@pytest.mark.parametrize("forgetting", [0.0, 0.6])
def test_paths_are_those_of_the_definition(forgetting):
    some = pictures(1).double()
    conv = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def encode(seen):
        return torch.tanh(F.conv2d(seen, conv, stride=4)).flatten(1)[:, :8]

    chance = torch.rand(3, 6, 1, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    knobs = {"fixations": 3, "iterations": 6, "rate": 0.1, "fovea": 0.2, "forgetting": forgetting}
    target = TARGET[0].double()
    found = explore(encode, some, target, lambda f, i: chance[f, i], **knobs, blur_window=9, blur_sigma=3.0)
    expected = oracle(encode, some, target, lambda f, i: chance[f, i], **knobs)
    assert torch.allclose(found.places[0], torch.tensor(expected, dtype=torch.float64), atol=1e-9)


def test_rows_and_columns_become_y_and_x():
    """What counts is the lower left pixel, so the spot goes down and to the left."""
    picture = torch.rand(1, 1, 25, 25, generator=torch.Generator().manual_seed(0))
    picture[..., 24, 0] = 9.0

    def encode(seen):
        return torch.stack([seen[:, 0, 24, 0], torch.ones(len(seen))], 1)

    (path,) = nevaclip(
        encode,
        picture,
        torch.tensor([1.0, 0.0]),
        fixations=1,
        iterations=12,
        blur_window=9,
        blur_sigma=3.0,
        best="before",
        random_restarts=False,
    )
    x, y = path.places[0]
    assert (x, y) == (pytest.approx(0.5, abs=1e-4), pytest.approx(24.5, abs=1e-4))
    assert path.size == (25, 25)
    assert path.durations is None


def test_a_batch_is_its_pictures():
    knobs = {**KNOBS, "fixations": 3, "iterations": 5, "random_restarts": False}
    chance = torch.rand(3, 5, 2, 2, generator=torch.Generator().manual_seed(3))
    both = explore(encoder(), pictures(), TARGET, lambda f, i: chance[f, i], **knobs)
    alone = explore(encoder(), pictures()[1:], TARGET[1:], lambda f, i: chance[f, i, 1:], **knobs)
    torch.testing.assert_close(both.places[1:], alone.places)
    torch.testing.assert_close(both.losses[..., 1:], alone.losses)


def test_a_seed_decides_and_torchs_own_state_is_left_alone():
    knobs = {"fixations": 2, "iterations": 6, "blur_window": 9, "blur_sigma": 3.0, "start": "random"}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    one = nevaclip(encoder(), pictures(), TARGET, **knobs, seed=1)
    assert torch.equal(torch.rand(3), expected)
    again, other = (nevaclip(encoder(), pictures(), TARGET, **knobs, seed=seed) for seed in (1, 2))
    assert [p.places.tolist() for p in one] == [p.places.tolist() for p in again]
    assert [p.places.tolist() for p in one] != [p.places.tolist() for p in other]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pictures": torch.rand(1, 3, 24, 20)}, "square"),
        ({"blur_window": 8}, "odd"),
        ({"blur_window": 49}, "take a smaller one"),
        ({"encode": lambda seen: encoder()(seen).detach()}, "no gradient"),
        ({"target": torch.ones(1, 5)}, r"\[2, 8\], the target is \[2, 5\]"),
        ({"forgetting": 1.5}, "forgetting=1.5"),
        ({"fixations": 0}, "fixations=0"),
        ({"best": "first"}, '"after" or "before"'),
    ],
)
def test_refusals(change, message):
    given = {"encode": encoder(), "pictures": pictures(), "target": TARGET, "blur_window": 9, "fixations": 1, **change}
    with pytest.raises(ValueError, match=message):
        nevaclip(given.pop("encode"), given.pop("pictures"), given.pop("target"), **given, iterations=2)
