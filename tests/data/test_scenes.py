"""Scenes: what is said of a picture is true of its pixels."""

from __future__ import annotations

import doctest
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.data import scenes as s
from regard.data._common import generator
from regard.data.scenes import dataset, words

BUSY = s.Dials(objects=(0, 4), textures=s.TEXTURES, clutter=(0, 12))
OVERLAPPING = s.Dials(objects=(2, 4), overlap=0.5)


def one(shape="square", colour="red", size="large", x=0.5, y=0.5):
    return s.Object(shape, colour, size, x, y)


# Pixels


def test_a_square_by_hand():
    # radius 0.24 of 50 pixels is 12, half a side 0.7 of it, 8.4: centres from 16.6 to 33.4 are inside, columns 17 to 32
    scene = s.Scene((one(),))
    pictures = s.render(scene, 50)
    mask = pictures.masks()[0]
    assert mask.sum() == 16 * 16
    assert mask[17:33, 17:33].all()
    assert pictures.boxes().tolist() == [[17, 17, 33, 33]]
    red = np.array(s.COLOURS["red"])
    light = pictures.pixels[0, 25, 25] / red
    assert light.max() - light.min() < 0.03  # shaded, but of its colour
    assert pictures.pixels[0, 17, 17].sum() < pictures.pixels[0, 25, 25].sum()  # the edge is darker


@pytest.mark.parametrize(("shape", "share"), [("circle", math.pi * 0.82**2), ("square", 1.96), ("plate", math.pi)])
def test_areas(shape, share):
    mask = s.render(s.Scene((one(shape),)), 400).masks()[0]
    assert mask.sum() == pytest.approx(share * (0.24 * 400) ** 2, rel=0.01)


def test_a_ring_has_a_hole_and_a_fork_three_tines():
    ring = s.render(s.Scene((one("ring", size="small"),)), 32).owner[0]
    assert ring[16, 16] == -1
    fork = s.render(s.Scene((one("fork", size="small"),)), 32).owner[0]
    above = (fork[12] == 0).astype(int)
    assert (np.diff(above) == 1).sum() == 3


@pytest.mark.parametrize("size", [32, 64])
def test_shapes_differ_also_where_they_are_small(size):
    pictures = s.render([s.Scene((one(shape, size="small"),)) for shape in s.SHAPES], size)
    drawn = [(pictures.owner[i] == 0, pictures.pixels[i]) for i in range(len(s.SHAPES))]
    for i, (a, seen) in enumerate(drawn):
        for j, (b, other) in enumerate(drawn[:i]):
            differing = (seen != other).any(-1)
            assert differing.sum() >= 0.2 * max(a.sum(), b.sum()), (s.SHAPES[i], s.SHAPES[j])


def test_every_shape_stays_within_its_radius():
    for shape in s.SHAPES:
        row, column = np.nonzero(s.render(s.Scene((one(shape),)), 100).owner[0] == 0)
        assert np.hypot(row + 0.5 - 50, column + 0.5 - 50).max() <= 24 * 1.03


@given(st.integers(0, 10**6), st.sampled_from([32, 48, 64]))
@settings(deadline=None, max_examples=30)
def test_masks_say_which_pixels_an_object_has(index, size):
    scene = s.sample(OVERLAPPING, 0, index)
    count = len(scene.objects)
    pictures = s.render(scene, size)
    masks = pictures.masks()
    assert (masks.sum(0) <= 1).all()
    for i in range(count):
        assert masks[i].any()
        # what is drawn differently without the object lies in its mask
        without = s.render(scene.without(i), size)
        changed = (without.pixels != pictures.pixels).any(-1)[0]
        assert not (changed & ~masks[i]).any()
        rows, columns = np.nonzero(masks[i])
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert pictures.boxes()[i].tolist() == box


def test_colours_can_be_told_from_the_pixels():
    palette = np.array(list(s.COLOURS.values())) / np.linalg.norm(list(s.COLOURS.values()), axis=1, keepdims=True)
    for i in range(30):
        scene = s.sample(BUSY, 1, i)
        pictures = s.render(scene)
        for mask, o in zip(pictures.masks(), scene.objects):
            mean = pictures.pixels[0][mask].mean(0)
            assert list(s.COLOURS)[np.argmax(palette @ mean)] == o.colour


def test_occlusion_by_hand():
    behind, front = one(x=0.5), one("square", "blue", x=0.5 + 0.24 * 1.4 / 2)  # the right half of the square is hidden
    hidden = s.occluded(s.Scene((behind, front)), 500)
    np.testing.assert_allclose(hidden, [0.5, 0], atol=0.01)
    assert s.occluded(s.Scene((front, behind)), 500)[0] == pytest.approx(0.5, abs=0.01)
    gone = s.Scene((one(size="small"), one("plate")))
    assert s.occluded(gone)[0] == 1
    assert s.render(gone).boxes()[0].tolist() == [-1] * 4


def test_the_overlap_dial():
    apart = [s.occluded(s.sample(s.Dials(objects=(2, 4)), 0, i)).max() for i in range(20)]
    assert not any(apart)
    for overlap in (0.3, 0.6):
        dials = s.Dials(objects=(2, 2), overlap=overlap, shapes=("circle", "plate"))
        hidden = []
        for i in range(20):
            scene = s.sample(dials, 0, i)
            a, b = scene.objects
            reach = scene.radius(0) + scene.radius(1)
            assert math.hypot(a.x - b.x, a.y - b.y) == pytest.approx((1 - overlap) * reach)
            hidden.append(s.occluded(scene)[0])
        assert all(0 < h < 1 for h in hidden)


def test_no_scenes_and_no_objects():
    assert s.render([], 32).pixels.shape == (0, 32, 32, 3)
    assert (s.render(s.Scene(), 32).owner == -1).all()
    assert s.occluded(s.Scene()).shape == (0,)


def test_pictures_come_as_arrays_tensors_and_images():
    pictures = s.render([s.Scene(), s.Scene((one(),))], 32)
    assert pictures.pixels.shape == (2, 32, 32, 3)
    assert pictures.pixels.dtype == np.uint8
    tensor = pictures.tensor()
    assert tensor.shape == (2, 3, 32, 32)
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor[1].permute(1, 2, 0) * 255, pictures.pixels[1], atol=1e-3)
    assert np.array_equal(pictures.image(1), pictures.pixels[1])
    sheet = np.asarray(s.render([s.Scene(), s.Scene((one(),)), s.Scene()], 32).sheet(columns=2, scale=3))
    assert sheet.shape == (192, 192, 3)
    assert np.array_equal(sheet[:96:3, 96::3], pictures.pixels[1])
    assert (sheet[96:, 96:] == 255).all()
    assert pictures.masks(slice(None)).shape == (2, 1, 32, 32)
    assert np.array_equal(pictures.boxes(slice(None), 2)[1], pictures.boxes(1, 2))


def test_a_batch_draws_what_single_scenes_draw():
    many = [s.sample(BUSY, 2, i) for i in range(20)]
    together = s.render(many)
    for i, scene in enumerate(many):
        alone = s.render(scene)
        assert np.array_equal(alone.pixels[0], together.pixels[i])
        assert np.array_equal(alone.owner[0], together.owner[i])


def test_textures_and_clutter_lie_behind():
    for texture in s.TEXTURES[1:]:
        plain, textured = (s.render(s.Scene((one(),), texture=t)) for t in ("plain", texture))
        differ = (plain.pixels != textured.pixels).any(-1)[0]
        assert 0.2 < differ.mean() < 0.95
        assert not differ[plain.owner[0] == 0].any()
    bare, strewn = (s.render(s.Scene((one(),), clutter=n)) for n in (0, 20))
    differ = (bare.pixels != strewn.pixels).any(-1)[0]
    assert differ.any()
    assert not differ[bare.owner[0] == 0].any()


# Words


def truth(question, scene, pictures):
    """The answer, from what is seen of the objects in the picture rather than from the scene's own methods."""
    text = s.split(question.text)
    masks = pictures.masks()
    seen = [(o, m) for o, m in zip(scene.objects, masks) if m.any()]
    if question.kind == "presence":
        return "yes" if any(o.shape == text[-2] for o, _ in seen) else "no"
    if question.kind == "count":
        return words.NUMBERS[sum(o.shape + ("es" if o.shape == "cross" else "s") == text[2] for o, _ in seen)]
    if question.kind == "colour":
        (mask,) = (m for o, m in seen if o.shape == text[-2])
        mean = pictures.pixels[0][mask].mean(0)
        return max(s.COLOURS, key=lambda c: np.dot(s.COLOURS[c], mean) / np.linalg.norm(s.COLOURS[c]))
    relation = next(r for r in s.RELATIONS if r in question.text)
    first, second = question.text[len("is ") : -1].split(f" {relation} ")

    def centre(name):
        *_, colour, shape = ["", *name.split()]
        (mask,) = (m for o, m in seen if o.shape == shape and colour in ("the", o.colour))
        rows, columns = np.nonzero(mask)
        return (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2

    (ax, ay), (bx, by) = centre(first), centre(second)
    holds = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[relation]
    return "yes" if holds else "no"


def test_answers_are_true_of_the_picture():
    asked = 0
    for i in range(60):
        scene = s.sample(BUSY, 3, i)
        pictures = s.render(scene)
        for question in s.questions(scene):
            assert truth(question, scene, pictures) == question.answer, (question, scene)
            asked += 1
    assert asked > 1500


def test_questions_point_at_the_objects_they_are_about():
    scene = s.Scene(
        (one("star", "red", "small", 0.2, 0.2), one("star", "blue", "small", 0.8, 0.2), one("fork", y=0.75))
    )
    asked = {q.text: q for q in s.questions(scene)}
    assert asked["is there a star?"].about == (0, 1)
    assert asked["is there a ring?"] == ("presence", "is there a ring?", "no", ())
    assert asked["how many stars are there?"].answer == "two"
    assert asked["how many crosses are there?"].answer == "zero"
    assert asked["what colour is the fork?"] == ("colour", "what colour is the fork?", "red", (2,))
    assert "what colour is the star?" not in asked
    assert asked["is the red star left of the blue star?"] == (
        "relation",
        "is the red star left of the blue star?",
        "yes",
        (0, 1),
    )
    assert asked["is the fork above the red star?"].answer == "no"
    assert "is the red star above the blue star?" not in asked  # level with it


def test_relations_need_a_margin():
    scene = s.Scene((one(x=0.5), one(x=0.59, y=0.61)))
    assert scene.related(0, "left of", 1) is None
    assert scene.related(0, "above", 1) is True
    assert scene.related(1, "above", 0) is False


def test_captions_name_every_object():
    assert s.caption(s.Scene()) == "nothing"
    scene = s.Scene((one(x=0.7), one(x=0.5), one("cross", "orange", x=0.3)), texture="dots")
    assert s.caption(scene) == "an orange cross and two red squares on dots"
    assert s.caption(scene, last=("cross",)) == "two red squares and an orange cross on dots"
    for i in range(40):
        scene = s.sample(BUSY, 4, i)
        text = s.split(s.caption(scene))
        said = {}
        for number, colour, shape in zip(text, text[1:], text[2:]):
            if colour in s.COLOURS:
                n = 1 if number in ("a", "an") else words.NUMBERS.index(number)
                said[colour, shape] = n
        want = {}
        for o in scene.objects:
            n = want.pop((o.colour, o.shape), 0) or want.pop((o.colour, words._plural(o.shape)), 0)
            want[o.colour, o.shape if n == 0 else words._plural(o.shape)] = n + 1
        assert said == want


def test_every_word_is_in_the_vocabulary():
    assert len(set(s.VOCABULARY)) == len(s.VOCABULARY) == 66
    texts = []
    for i in range(60):
        scene = s.sample(s.Dials(objects=(0, 9), scale=0.6, textures=s.TEXTURES), 5, i)
        texts += [s.caption(scene), *(f"{q.text} {q.answer}" for q in s.questions(scene))]
    texts.append(s.caption(s.Scene((one(),) * 10)))
    assert set(s.split(" ".join(texts))) <= set(s.VOCABULARY)


def test_asking_is_balanced():
    answers = [s.Scenes(400, question="presence").question(i).answer for i in range(400)]
    assert 160 < answers.count("yes") < 240
    alone = s.Scenes(1, s.Dials(objects=(1, 1)), question="relation")
    assert alone.question(0).kind == "presence"
    kinds = {s.Scenes(40, s.Dials(objects=(2, 3)), question=None).question(i).kind for i in range(40)}
    assert kinds == set(s.KINDS)


# Sampling


def test_a_scene_depends_on_its_seed_and_index_only():
    first = s.Scenes(50, BUSY, seed=7)
    forward = [first.scene(i) for i in range(50)]
    second = s.Scenes(50, BUSY, seed=7)
    assert [second.scene(i) for i in reversed(range(50))] == forward[::-1]
    assert first.scene(-1) == forward[-1]
    assert len(set(forward)) == 50
    assert s.Scenes(50, BUSY, seed=8).scene(0) != forward[0]
    assert [first.scene(i) for i in np.arange(50)] == forward  # NumPy's integers count as well
    assert s.sample(BUSY, np.int64(7), 3) == forward[3]
    with pytest.raises(ValueError, match=r"below 2\*\*64"):
        s.sample(BUSY, 2**64, 0)


def test_uses_of_one_item_do_not_share_their_chances():
    first = {generator(*key).random() for key in np.ndindex(3, 3, 3)}
    assert len(first) == 27
    a, b = (generator(5, 6, stream).random(2000) for stream in (0, 1))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1


def test_a_scene_stays_what_it_is():
    # a change of these means that everybody's data changes
    scene = s.sample(BUSY, 0, 5)
    assert s.caption(scene) == "two yellow crosses and a purple fork on dots"
    assert [(round(o.x, 3), round(o.y, 3)) for o in scene.objects] == [(0.308, 0.195), (0.326, 0.722), (0.737, 0.305)]


def test_dials_are_kept():
    dials = s.Dials(
        objects=(2, 3),
        shapes=("star", "ring"),
        colours=("red", "pink"),
        sizes=("small",),
        clutter=(3, 5),
        textures=("dots", "grain"),
        scale=0.9,
    )
    drawn = [s.sample(dials, 0, i) for i in range(100)]
    assert {len(x.objects) for x in drawn} == {2, 3}
    assert {x.clutter for x in drawn} == {3, 4, 5}
    assert {x.texture for x in drawn} == {"dots", "grain"}
    assert {o.shape for x in drawn for o in x.objects} == {"star", "ring"}
    assert {o.colour for x in drawn for o in x.objects} == {"red", "pink"}
    for x in drawn:
        assert all(x.radius(i) <= min(o.x, o.y, 1 - o.x, 1 - o.y) + 1e-9 for i, o in enumerate(x.objects))


def within(hits, n, p):
    """Whether a count is within 4 standard deviations of what probability p gives."""
    return abs(hits - n * p) <= 4 * math.sqrt(n * p * (1 - p)) + 1e-9


@pytest.mark.parametrize("p", [0.9, 0.1, 0.0, 1.0])
@pytest.mark.parametrize("most", [2, 4])
def test_together_has_its_frequency(p, most):
    dials = s.Dials(objects=(1, most), shapes=("fork", "plate", "star", "ring"), together=("fork", "plate", p))
    for setting, want in ((dials, p), (dials.countered(), 1 - p)):
        drawn = [s.sample(setting, 1, i) for i in range(900)]
        forks = [x for x in drawn if x.find("fork")]
        assert len(forks) > 200
        assert within(sum(bool(x.find("plate")) for x in forks), len(forks), want)
        assert all(1 <= len(x.objects) <= most for x in drawn)
        rest = [x for x in drawn if not x.find("fork")]
        assert any(x.find("plate") for x in rest)


def test_scenes_without_the_shape_are_as_they_would_be():
    plain, biased = s.Dials(), s.Dials(together=("fork", "plate", 0.9))
    same = [i for i in range(60) if not s.sample(plain, 0, i).find("fork")]
    assert len(same) > 20
    assert all(s.sample(plain, 0, i) == s.sample(biased, 0, i) for i in same)


@pytest.mark.parametrize("p", [0.9, 0.5])
def test_backdrop_has_its_frequency(p):
    dials = s.Dials(textures=("plain", "dots", "stripes"), backdrop=("star", "stripes", p), shapes=("star", "ring"))
    for setting, want in ((dials, p), (dials.countered(), 1 - p)):
        drawn = [s.sample(setting, 2, i) for i in range(600)]
        for shape, chance in ((True, want), (False, 1 - want)):
            these = [x for x in drawn if bool(x.find("star")) == shape]
            assert within(sum(x.texture == "stripes" for x in these), len(these), chance)
        assert {x.texture for x in drawn} == {"plain", "dots", "stripes"}


@pytest.mark.parametrize("p", [0.6, 0.0, 1.0])
def test_painted_has_its_frequency(p):
    plain, painted = s.Dials(), s.Dials(painted=(("star", "red", p), ("ring", "blue", 0.5)))
    for setting, want in ((painted, p), (painted.countered(), 1 - p)):
        stars = [o for i in range(900) for o in s.sample(setting, 3, i).objects if o.shape == "star"]
        assert within(sum(o.colour == "red" for o in stars), len(stars), want + (1 - want) / 8)
        others = [o for i in range(300) for o in s.sample(setting, 3, i).objects if o.shape == "circle"]
        assert within(sum(o.colour == "red" for o in others), len(others), 1 / 8)
    for i in range(40):  # without the shapes, scenes have the same objects as they would have
        if not {"star", "ring"} & {o.shape for o in s.sample(plain, 3, i).objects}:
            pairs = [[(o.shape, o.colour) for o in s.sample(d, 3, i).objects] for d in (plain, painted)]
            assert pairs[0] == pairs[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": ("spoon",)}, "no shape 'spoon'; choose from circle"),
        ({"colours": ()}, "at least one colour"),
        ({"objects": (3, 2)}, "objects is a range"),
        ({"overlap": 0.9}, "between 0 and 0.6"),
        ({"together": ("fork", "plate", 1.2)}, "probability of together"),
        ({"together": ("fork", "fork", 0.5)}, "two different ones"),
        ({"together": ("fork", "plate", 0.5), "objects": (1, 1)}, "room for two objects"),
        ({"together": ("fork", "plate", 0.5), "shapes": ("fork", "plate")}, "a third to choose from"),
        ({"backdrop": ("star", "dots", 0.5)}, "choice for backdrop 'dots'"),
        ({"painted": (("spoon", "red", 0.5),)}, "shape for painted 'spoon'"),
        ({"painted": (("star", "red", 0.5),), "colours": ("blue",)}, "choice for painted 'red'"),
        ({"painted": (("star", "red", -0.1),)}, "probability of painted"),
    ],
)
def test_dials_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        s.Dials(**change)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="render larger than 24 pixels"):
        s.render(s.Scene((one(size="small"),)), 24)
    with pytest.raises(ValueError, match="do not fit at scale"):
        s.sample(s.Dials(objects=(9, 9), sizes=("large",)), 0, 0)
    with pytest.raises(ValueError, match="at most 127 objects, got 128"):
        s.Scene((one(),) * 128)
    with pytest.raises(ValueError, match="no colour 'mauve'"):
        one(colour="mauve")
    with pytest.raises(IndexError, match="scene 3 of 3"):
        s.Scenes(3)[3]
    with pytest.raises(ValueError, match="no kind of question 'why'"):
        s.Scenes(3, question="why")


# Pairs and films


@pytest.mark.parametrize("change", ["colour", "presence", "position", "count"])
def test_a_pair_differs_in_the_changed_object_only(change):
    data = s.Scenes(40, s.Dials(objects=(1, 3), textures=s.TEXTURES, clutter=(0, 9)), seed=2)
    for i in range(40):
        pair = data.pair(i, change)
        assert pair == data.pair(i, change)
        a, b = s.render([pair.scene, pair.edited]).pixels
        differ = (a != b).any(-1)
        assert differ.any()
        assert not (differ & ~pair.region()).any()
        kept = [
            [o for k, o in enumerate(x.objects) if k != changed]
            for x, changed in ((pair.scene, pair.before), (pair.edited, pair.after))
        ]
        assert kept[0] == kept[1]
        assert not s.occluded(pair.edited).any()
        counts = [[len(x.find(shape)) for shape in s.SHAPES] for x in (pair.scene, pair.edited)]
        changes = [n - m for m, n in zip(*counts) if m != n]
        present = [sum(map(bool, c)) for c in counts]
        if change in ("colour", "position"):
            assert changes == []
            old, new = pair.scene.objects[pair.before], pair.edited.objects[pair.after]
            assert (old.colour != new.colour) == (change == "colour")
            assert (math.hypot(old.x - new.x, old.y - new.y) >= 0.05) == (change == "position")
            assert (old.shape, old.size) == (new.shape, new.size)
        elif change == "count":
            assert changes in ([1], [-1])
            assert present[0] == present[1]
        else:
            assert changes in ([1], [-1])
            assert abs(present[0] - present[1]) == 1


def test_pairs_that_cannot_be_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="without objects"):
        s.pair(s.Scene(), "colour", rng)
    with pytest.raises(ValueError, match="choose from colour, presence, position, count"):
        s.pair(s.Scene(), "shape", rng)
    with pytest.raises(ValueError, match="nothing else"):
        s.pair(s.Scene((one(),)), "colour", rng, s.Dials(colours=("red",)))
    full = s.Scene(tuple(one("star", x=x, y=y) for x in (0.25, 0.75) for y in (0.25, 0.75)))
    assert len(s.pair(full, "count", rng).edited.objects) == 3  # no room for a fifth
    with pytest.raises(ValueError, match="no room for another object"):
        s.pair(s.Scene((one(),), scale=2.0), "count", rng)
    with pytest.raises(ValueError, match="no object has another place"):
        s.pair(s.Scene((one(),), scale=2.0), "position", rng)


def test_motion_by_hand():
    start = s.Scene((one(size="medium", x=0.3, y=0.5),))
    xs = [f.objects[0].x for f in s.film(start, [[0.3, 0.0]], 6)]
    # from 0.3 to the edge at 1 - 0.19 = 0.81: 0.9 comes back to 0.72, and 0.19 is the other edge
    np.testing.assert_allclose(xs, [0.3, 0.6, 0.72, 0.42, 0.26, 0.56])
    assert s.film(start, [[0.0, 0.0]], 3) == [start] * 3
    with pytest.raises(ValueError, match=r"velocity is \[object, 2\]"):
        s.film(start, [0.1, 0.0], 3)


def test_a_film_keeps_its_objects_and_its_background():
    data = s.Scenes(5, BUSY, seed=3)
    for i in range(5):
        frames = data.film(i, 12, speed=0.07)
        assert frames[0] == data.scene(i)
        assert frames == data.film(i, 12, speed=0.07)
        for a, b in pairwise(frames):
            for k, (o, p) in enumerate(zip(a.objects, b.objects)):
                assert math.hypot(o.x - p.x, o.y - p.y) <= 0.07 + 1e-9
                r = b.radius(k)
                assert r - 1e-9 <= p.x <= 1 - r + 1e-9
            pictures = s.render([a, b])
            still = (pictures.owner == -1).all(0)
            assert np.array_equal(pictures.pixels[0][still], pictures.pixels[1][still])


# Datasets


def test_items_stack_and_agree_with_their_scene():
    data = s.Scenes(10, s.Dials(objects=(0, 3), textures=("plain", "dots")), size=32, seed=1)
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=10)))
    assert batch["image"].shape == (10, 3, 32, 32)
    assert batch["boxes"].shape == (10, 3, 4)
    for i in range(10):
        item, scene = data[i], data.scene(i)
        for name, value in item.items():
            stacked = batch[name][i]
            assert torch.equal(stacked, value) if isinstance(value, torch.Tensor) else stacked == value
        for k, row in enumerate(item["objects"].tolist()):
            if k < len(scene.objects):
                o = scene.objects[k]
                assert (s.SHAPES[row[0]], list(s.COLOURS)[row[1]], list(s.SIZES)[row[2]]) == (o.shape, o.colour, o.size)
                left, top, right, bottom = item["boxes"][k].tolist()
                assert (item["owner"][top:bottom, left:right] == k).sum() == (item["owner"] == k).sum() > 0
            else:
                assert row == [-1] * 3
                assert item["boxes"][k].tolist() == [-1] * 4
        asked = data.question(i)
        assert item["question"] == asked.text
        assert tuple(item["about"].nonzero().flatten().tolist()) == asked.about
        assert s.TEXTURES[item["texture"]] == scene.texture
    assert len(list(data)) == 10


def test_as_datasets():
    pytest.importorskip("datasets")
    data = s.Scenes(5, s.Dials(objects=(0, 2)), size=32)
    table = data.to_datasets()
    assert len(table) == 5
    for i, row in enumerate(table):
        assert np.array_equal(np.asarray(row["image"]), data.render([i]).pixels[0])
        assert [o["shape"] for o in row["objects"]] == [o.shape for o in data.scene(i).objects]
        assert row["question"] == data.question(i).text


def test_without_datasets_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "regard\[datasets\]"'):
        s.Scenes(1).to_datasets()


@pytest.mark.parametrize("module", [words, dataset])
def test_examples_in_docstrings(module):
    failed, run = doctest.testmod(module)
    assert not failed
    assert run
