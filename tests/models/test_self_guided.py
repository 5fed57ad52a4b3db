"""Guided attention in segmentation: values by hand, what starts as the identity and still trains, and the losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import regard
from regard.models.self_guided import (
    ChannelAttention,
    GuidedLevel,
    PositionAttention,
    SelfGuided,
    Semantic,
    self_guided,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(**sizes) -> SelfGuided:
    return self_guided(classes=3, **{"inputs": 1, "channels": 8, **sizes}).eval()


def test_channels_by_hand():
    attention = ChannelAttention()
    x = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])
    assert torch.equal(attention(x), x)
    attention.gamma.data.fill_(1.0)
    # products [[1, 0], [0, 4]]; their rows' largest less each [[0, 1], [4, 0]]
    expected = torch.tensor([[[[1.2689, 1.4621]], [[0.9820, 2.0360]]]])
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-4)


def test_positions_are_a_softmax_without_scale():
    attention = PositionAttention(16).double()
    attention.gamma.data.fill_(0.7)
    x = torch.randn(2, 16, 3, 4).double()
    flat = x.flatten(2)
    query, key, value = (part(x).flatten(2) for part in (attention.query, attention.key, attention.value))
    weights = (query.mT @ key).softmax(-1)
    torch.testing.assert_close(attention(x).flatten(2), 0.7 * value @ weights.mT + flat)


def test_positions_have_no_order():
    attention = PositionAttention(8)
    attention.gamma.data.fill_(1.0)
    x, order = torch.randn(1, 8, 1, 10), torch.randperm(10)
    torch.testing.assert_close(attention(x[..., order]), attention(x)[..., order])


@pytest.mark.parametrize("attention", [PositionAttention(8), ChannelAttention()], ids=["position", "channel"])
def test_starts_as_the_identity_and_trains(attention):
    x = torch.randn(2, 8, 3, 3)
    found = attention(x)
    assert torch.equal(found, x)
    found.square().sum().backward()
    assert float(attention.gamma.grad.abs()) > 0


def test_gradients():
    for attention in (PositionAttention(8).double(), ChannelAttention().double()):
        attention.gamma.data.fill_(0.5)
        assert torch.autograd.gradcheck(attention, torch.randn(1, 8, 2, 2, dtype=torch.float64, requires_grad=True))


def test_a_level_is_weighed_by_the_reconstruction():
    level = GuidedLevel(8).eval()
    x, made = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4)
    expected = level.out((level.position(x) + level.channel(x)) * level.guide(made))
    torch.testing.assert_close(level(x, made), expected)


def test_reconstructions_are_of_what_the_levels_are_given():
    model, pictures = small(), torch.randn(2, 1, 32, 32)
    found = model(pictures)
    assert [len(part) for part in found[1:]] == [8, 4, 8, 8]
    assert {tuple(x.shape) for x in found.inputs + found.reconstructions} == {(2, 16, 8, 8)}
    assert found.codes[0][0].shape == (2, 64 * 2 * 2)
    torch.testing.assert_close(found.logits, torch.stack(found.every[4:]).mean(0))
    torch.testing.assert_close(model.semantic[1](found.inputs[6])[1], found.reconstructions[6])
    torch.testing.assert_close(model.semantic[0](found.inputs[2])[0], found.codes[2][0])


def test_the_loss_is_the_paper_s():
    found, target = small()(torch.randn(2, 1, 32, 32)), torch.randint(3, (2, 32, 32))
    expected = sum(F.cross_entropy(logits, target) for logits in found.every)
    expected += 0.25 * sum(F.mse_loss(a, b) for a, b in found.codes)
    expected += 0.1 * sum(F.mse_loss(a, b) for a, b in zip(found.inputs, found.reconstructions, strict=True))
    torch.testing.assert_close(found.loss(target), expected)


def test_every_weight_trains():
    model = small().train()
    for _ in range(2):  # gammas are 0 at first, and what they multiply has no gradient then
        model.zero_grad()
        model(torch.randn(2, 1, 32, 32)).loss(torch.randint(3, (2, 32, 32))).backward()
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                assert float(parameter.grad.abs()) > 0, name
                parameter.data.fill_(0.1)
    # a bias of keys adds the same to all of a row's scores, and one ahead of a batch norm is taken off again
    still = [n for n, p in model.named_parameters() if not p.grad.any() and "bias" not in n]
    assert not still


@pytest.mark.parametrize(("sizes", "count"), [({"guided": False}, 8), ({"attend": False}, 5)])
def test_without_its_parts(sizes, count):
    found = small(**sizes)(torch.randn(2, 1, 32, 32))
    assert (len(found.every), found.codes, found.inputs) == (count, (), ())


def test_pictures_do_not_touch():
    model, pictures = small(), torch.randn(3, 1, 32, 32)
    torch.testing.assert_close(model(pictures[1:2]).logits, model(pictures).logits[1:2], rtol=1e-4, atol=1e-5)


def test_record_sees_positions_and_channels():
    x = torch.randn(2, 8, 3, 3)
    for attention, keys in ((PositionAttention(8), 9), (ChannelAttention(), 8)):
        with torch.no_grad(), regard.record(attention, "rows") as recording:
            attention(x)
        (rows,) = (node["rows"] for node in recording.tree.subtree if "rows" in node)
        assert (rows.sizes["query"], rows.sizes["key"]) == (keys, keys)
        np.testing.assert_allclose(rows.sum("key"), 1, rtol=1e-5)
    constant = torch.ones(1, 8, 3, 3)
    with torch.no_grad(), regard.record(attention := PositionAttention(8), "rows") as recording:
        attention(constant)
    (rows,) = (node["rows"] for node in recording.tree.subtree if "rows" in node)
    np.testing.assert_allclose(rows, 1 / 9, rtol=1e-5)


def test_saved_and_loaded(tmp_path):
    model, pictures = small(), torch.randn(1, 1, 32, 32)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(SelfGuided.from_pretrained(tmp_path).eval()(pictures).logits, model(pictures).logits)


def test_refusals():
    with pytest.raises(ValueError, match="needs 8 channels or more"):
        PositionAttention(4)
    with pytest.raises(ValueError, match=r"divide by 4; got \[6, 8\]"):
        Semantic(2)(torch.randn(1, 2, 6, 8))
    with pytest.raises(ValueError, match=r"takes \[batch, 1, row, column\]; got \[2, 3, 32, 32\]"):
        small()(torch.randn(2, 3, 32, 32))
