"""Questions on scenes, oracles that know the answer's place, and premises: by hand and on the describer."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import regard
from regard.catalog import Premise
from regard.claims import _judged, _oracles, _premises, _shown
from regard.claims._shown import Gain, paired
from regard.data.scenes import Object, Scene


@pytest.fixture(scope="module")
def crowd():
    return _shown.Shown("describer", "crowded", 24, 7)


def test_a_paired_gain_by_hand():
    after, before = torch.tensor([1.0, 1, 1, 0]), torch.tensor([0.0, 1, 0, 0])
    gain = paired(after, before)  # differences 1 0 1 0
    assert gain.value == 0.5
    assert gain.error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert not gain.sure()
    assert paired(torch.ones(50), torch.zeros(50) + (torch.arange(50) % 10 == 0)).sure(0.5)
    assert not paired(torch.ones(50), torch.zeros(50) + (torch.arange(50) % 10 == 0)).sure(0.95)
    assert str(Gain(0.123, 0.04)) == f"{Gain(0.123, 0.04)}" == "+12.3 ± 4.0 points"


def test_cases_of_one_scene_count_as_one():
    after, before = torch.tensor([1.0, 0, 1, 0, 1]), torch.zeros(5)
    twice = [t.repeat_interleave(2) for t in (after, before)]
    grouped = paired(*twice, groups=torch.arange(5).repeat_interleave(2).tolist())
    assert grouped == pytest.approx(paired(after, before))
    assert paired(*twice).error < grouped.error


def test_what_captions_invent():
    scene = Scene((Object("star", "red", "small", 0.3, 0.5), Object("ring", "blue", "small", 0.7, 0.5)))
    said = ["a red star, a blue ring and a pink heart on dots", "two red stars", "nothing"]
    counts = _shown.invented(said, [scene] * 3)
    assert counts.tolist() == [[3, 1, 2, 2], [1, 0, 1, 2], [0, 0, 0, 2]]
    assert _shown.share(counts) == 0.25
    better = counts.clone()
    better[0, 1] = 0
    assert _shown.fewer(counts, better).value == 0.25
    assert _shown.fewer(counts, counts) == (0, 0)


def test_questions_rest_on_what_is_there(crowd):
    asked = crowd.colours()
    for a in asked:
        (i,) = a.about
        thing = crowd.scenes[a.scene].objects[i]
        assert a.text == f"what colour is the {thing.shape}?"
        assert a.answer == thing.colour
        column, row = int(thing.x * 8), int(thing.y * 8)
        assert crowd.patches(a).view(8, 8)[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].any()
        assert crowd.patches(a).sum() <= 9
    polls = crowd.polls()
    assert sum(a.answer == "yes" for a in polls) == len(polls) / 2
    assert all(bool(a.about) == (a.answer == "yes") for a in polls)
    with pytest.raises(ValueError, match="crowded"):
        _shown.Shown("describer", "crowd", 1)


def test_tempted_scenes_are_countered():
    scenes = _shown.Shown("describer", "tempted", 200).scenes
    with_partner = 0
    for scene in scenes:
        (tie,) = [tie for tie in _shown.describer.BIASES if scene.find(tie[0])]
        with_partner += bool(scene.find(tie[1]))
        assert 5 <= len(scene.objects) <= 7
    assert with_partner / 200 == pytest.approx(0.1, abs=0.06)


def test_reweighed_weights_by_hand(crowd):
    asked = crowd.colours()[:2]
    inputs = crowd.inputs(asked)
    factors = torch.ones(2, 64)
    factors[:, 5] = 0
    seen = []

    @regard.statistic("batch head", title="Nothing")
    def read(call):
        if call.site.stack == "language_model" and call.site.layer in (0, 3):
            image = call.tokens.role("image")
            seen.append((call.site.layer, call.weights.dense(), image))
        return call.query.new_zeros(call.query.shape[:2])

    for words in (True, False):
        seen.clear()
        changed = _oracles.Reweighed(factors, [3], words)
        with torch.inference_mode(), regard.intervene(crowd.model, changed), regard.record(crowd.model, read):
            crowd.model(**inputs)
        (_, first, image), (_, weights, _) = seen
        sixth = image.nonzero()[image.nonzero()[:, 0] == 0][5, 1]
        last = int(image[0].nonzero()[-1, 0])
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
        assert (weights[0, :, last + 1 :, sixth] == 0).all()
        assert (first[0, :, last + 1 :, sixth] > 0).any()
        assert (weights[0, :, last, sixth] == 0).all() == (not words)


def test_as_many_others():
    chosen = torch.zeros(3, 64, dtype=torch.bool)
    chosen[0, :4] = chosen[1, 10:11] = True
    others = _oracles.as_many(chosen, 0)
    assert others.sum(1).tolist() == [4, 1, 0]
    assert not (others & chosen).any()


def test_pictures_of_what_is_asked():
    image = Image.fromarray(np.full((64, 64, 3), 200, np.uint8))
    patches = torch.zeros(64, dtype=torch.bool)
    patches[9] = True
    kept = np.asarray(_oracles.kept(image, patches))
    assert (kept[8:16, 8:16] == 200).all()
    assert (kept == 200).all(-1).sum() == 64
    assert _oracles.shifted(patches, 0).sum() == 1
    assert not (_oracles.shifted(patches, 0) & patches).any()
    large = np.zeros((256, 256, 3), np.uint8)
    large[100:110, 30:40] = 255
    crop = np.asarray(_oracles.cropped(Image.fromarray(large), 35 / 256, 105 / 256))
    assert crop.shape[:2] == (102, 102)
    assert crop.any((0, 1)).all()
    assert np.asarray(_oracles.cropped(Image.fromarray(large), 0.9, 0.9)).max() == 0


def test_oracles_beat_their_controls(crowd):
    asked = crowd.colours()
    plain = crowd.right(asked)
    for family in (_oracles.attention, _oracles.masks, _oracles.contrasts):
        found = family(crowd, asked, plain)
        assert found.oracle.value > 0.15, family
        assert found.oracle.value > found.control.value + 0.15, family
        assert found.over.value == pytest.approx(found.oracle.value - found.control.value)
    assert _oracles.registers(crowd, asked, plain) is None  # the describer has none planted
    assert torch.equal(crowd.right(asked), plain)  # and is as it was


def test_headroom_needs_both():
    large, none, unsure = Gain(0.2, 0.02), Gain(0.0, 0.02), Gain(0.2, 0.15)
    assert _oracles.Family(large, none, large).headroom
    assert not _oracles.Family(large, large, none).headroom
    assert not _oracles.Family(unsure, none, unsure).headroom
    assert not _oracles.Family(Gain(0.04, 0.01), none, Gain(0.04, 0.01)).headroom


def test_a_slope_by_hand():
    rng = np.random.default_rng(0)
    x = np.stack([np.ones(4000), rng.integers(1, 8, 4000)], 1)
    chance = 1 / (1 + np.exp(-(-2 + 0.5 * x[:, 1])))
    slope, error = _premises._slope(x, (rng.random(4000) < chance).astype(float))
    assert slope == pytest.approx(0.5, abs=3 * error)
    assert 0.01 < error < 0.05


def number(met: bool) -> Premise:
    return Premise("something", "a lot", "some", met)


def test_numbers_are_kept_with_the_model_and_are_of_its_weights(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(_premises.zoo, "folder", lambda name: tmp_path)
    monkeypatch.setattr(_premises, "measure", lambda name: {key: number(False) for key in _premises.PREMISES})
    found = {key: number(key != "P3") for key in _premises.PREMISES}
    _premises.keep("toy", found)
    _premises.of.cache_clear()
    assert _premises.of("toy") == found
    assert _premises.require("toy", "P1", "P2") is None
    assert _premises.require("toy", "P2", "P3") == "P3, something: some"
    (tmp_path / "model.safetensors").write_bytes(b"others")
    _premises.of.cache_clear()
    assert not any(premise.met for premise in _premises.of("toy").values())
    _premises.of.cache_clear()


@pytest.mark.parametrize("name", _shown.MODELS)
def test_every_model_has_its_numbers(name):
    path = regard.zoo.folder(name) / _premises.FILE
    kept = json.loads(path.read_text())
    assert kept["model"] == _premises._digest(path.parent), "measure again: python -m regard.claims._premises"
    assert list(kept["premises"]) == list(_premises.PREMISES)
    assert regard.zoo.card(name).count("| P") == len(_premises.PREMISES)


def test_a_claim_is_judged_where_its_premises_are_met():
    def tried(model, met, holds):
        return _judged.Tried(model, [number(met)], holds, "so much")

    both = _judged.judged([tried("a", True, True), tried("b", False, False)], "", 0)
    assert both.holds is True
    assert [p.what for p in both.premises] == ["a: something"]
    assert both.measured == "A: so much B: so much"
    assert _judged.judged([tried("a", True, True), tried("b", True, False)], "", 0).holds is False
    neither = _judged.judged([tried("a", False, True), tried("b", False, True)], "", 0)
    assert neither.holds is None
    assert len(neither.premises) == 2
