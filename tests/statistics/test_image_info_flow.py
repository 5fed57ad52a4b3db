"""Knocking out a path cuts it and nothing else; what words read of their objects is read off the map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import build

import regard
from regard.statistics.image_info_flow import (
    KnockOut,
    Word,
    image_info_flow,
    localised_reading,
    query_storage,
)

START, IMAGE = 20, slice(2, 18)  # of the 26 tokens of the tiny LLaVA


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def seeing(request):
    return build("llava", request.param)


def rows(model, inputs, *interventions):
    with torch.no_grad(), regard.intervene(model, *interventions), regard.record(model, "rows") as recording:
        logits = model(**inputs).logits
    return torch.from_numpy(recording.tree["language_model"]["rows"].values), logits


def test_only_this_path_is_cut(seeing):
    """Of layer 1, from question tokens to the image: these weights are 0, layer 0 is untouched."""
    model, inputs = seeing
    with torch.no_grad(), regard.record(model, "rows") as free:
        model(**inputs)
    before = torch.from_numpy(free.tree["language_model"]["rows"].values)
    after, _ = rows(model, inputs, KnockOut("image", ("query",), layers=[1], start=START))
    assert (after[:, 1, :, 18:START, IMAGE] == 0).all()
    assert (before[:, 1, :, 18:START, IMAGE].sum(-1) > 0).all()
    torch.testing.assert_close(after[:, 0], before[:, 0])
    torch.testing.assert_close(after[:, 1, :, START:], before[:, 1, :, START:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after[:, 1, :, IMAGE], before[:, 1, :, IMAGE], atol=1e-5, rtol=1e-4)
    # what is left is scaled up to a whole
    left = before[:, 1, :, 18:START].clone()
    left[..., IMAGE] = 0
    torch.testing.assert_close(after[:, 1, :, 18:START], left / left.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_without_any_path_the_picture_is_not_seen(seeing):
    model, inputs = seeing
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    cut = KnockOut("image", ("query", "generated"), start=START)
    one, two = (rows(model, some, cut)[1][:, 18:] for some in (inputs, other))
    torch.testing.assert_close(one, two)
    one, two = (rows(model, some, KnockOut("image", ("generated",), start=START))[1] for some in (inputs, other))
    assert not torch.allclose(one[:, START:], two[:, START:], atol=1e-4)  # by way of the question
    one, two = (rows(model, some, KnockOut("image", ("query",), start=START))[1] for some in (inputs, other))
    torch.testing.assert_close(one[:, 18:START], two[:, 18:START])
    assert not torch.allclose(one[:, START:], two[:, START:], atol=1e-4)  # directly


def test_generated_tokens_are_known_by_their_role(seeing):
    """While generating, cut by role; the same text at once, cut by position: the same weights."""
    model, inputs = seeing
    n = inputs["input_ids"].shape[1]
    with (
        torch.no_grad(),
        regard.intervene(model, KnockOut("image", ("generated",))),
        regard.record(model, "mass") as stepwise,
    ):
        whole = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    image = stepwise.tree["language_model"]["mass"].sel(role="image")
    assert (image[..., n:] == 0).all()
    assert (image[..., 18:n] > 0).all()
    with (
        torch.no_grad(),
        regard.intervene(model, KnockOut("image", ("generated",), start=n)),
        regard.record(model, "mass") as at_once,
    ):
        model(**{**inputs, "input_ids": whole[:, :-1]})
    np.testing.assert_allclose(image, at_once.tree["language_model"]["mass"].sel(role="image"), atol=1e-5)


def test_the_flow_by_hand():
    """A score that is the model's own image mass in layer 1: blocked there, it is 0; blocked in layer 0, it is not."""
    model, inputs = build("llava", "sdpa")

    def score():
        with torch.no_grad(), regard.record(model, "mass") as recording:
            model(**inputs)
        mass = recording.tree["language_model"]["mass"].sel(role="image", layer=1)
        return float(mass[..., 18:].mean())

    flow = image_info_flow(model, score, start=START, window=1)
    assert flow.dims == ("path", "layer")
    assert float(flow.sel(path="image to both", layer=1)) == 0.0
    assert float(flow.sel(path="image to both", layer=0)) > 0.0
    assert flow.attrs["free"] == pytest.approx(score())
    blocked = dict(zip(flow["path"].values, flow.attrs["blocked"]))
    assert blocked["image to both"] == 0.0
    part = float(flow.sel(path="image to generated", layer=1)) + float(flow.sel(path="image to query", layer=1))
    assert part == pytest.approx(flow.attrs["free"], rel=1e-4)
    apart = image_info_flow(model, score, start=START, window=1, elsewhere=True)
    np.testing.assert_allclose(apart.values[:, ::-1], flow.values, atol=1e-6)  # of two layers, all but one is the other
    assert query_storage(flow) == pytest.approx(blocked["image to generated"] / flow.attrs["free"])


def test_bad_input_is_named():
    model, inputs = build("llava")
    with pytest.raises(ValueError, match="no kind of token picture"):
        KnockOut("picture", ("query",))
    with pytest.raises(ValueError, match="a window of 3 layers does not fit into 2"):
        image_info_flow(model, lambda: 0.0, window=3)
    with pytest.raises(ValueError, match="has no stack 'decoder'"):
        image_info_flow(model, lambda: 0.0, stack="decoder")
    with pytest.raises(ValueError, match="no patch shows the object"):
        localised_reading(model, inputs, [Word(0, 20, torch.zeros(16, dtype=torch.bool))])
    with pytest.raises(ValueError, match="has 16 image tokens, not 9"):
        localised_reading(model, inputs, [Word(0, 20, torch.ones(9, dtype=torch.bool))])


def test_reading_is_read_off_the_map(seeing):
    model, inputs = seeing
    patches = torch.arange(16) % 5 == 0
    words = [Word(1, 22, patches), Word(0, 25, ~patches)]
    found = localised_reading(model, inputs, words)
    with torch.no_grad(), regard.record(model, "rows") as recording:
        model(**inputs)
    weights = recording.tree["language_model"]["rows"].values
    for i, word in enumerate(words):
        read = weights[word.batch, :, :, word.position - 1, IMAGE]
        inside = read[..., word.patches.numpy()].sum(-1) / read.sum(-1)
        np.testing.assert_allclose(found["inside"][i], inside, atol=1e-5)
        assert (found["hit"][i].values == word.patches.numpy()[read.argmax(-1)]).all()
    assert found["chance"].values.tolist() == pytest.approx([4 / 16, 12 / 16])
    everything = localised_reading(model, inputs, [Word(0, 21, torch.ones(16, dtype=torch.bool))])
    np.testing.assert_allclose(everything["inside"], 1.0, atol=1e-6)
    assert (everything["hit"] == 1).all()
