"""A policy told by pictures: crops and losses by hand, what the decoder does with positions, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regard
from regard.models.virt import Decoder, Virt, enlarged, gaze_crop, laplace_loss, virt

SIZES = {"visual": 64, "patches": 3, "dim": 16, "heads": 2, "hidden": 24, "actions": 2, "states": (2, 4), "chunk": 4}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(**sizes) -> Virt:
    return virt(nn.Flatten(2), **{**SIZES, **sizes}).eval()


def given(batch: int = 2):
    return torch.rand(batch, 1, 3, 8, 8), [torch.rand(batch, 5, 2), torch.rand(batch, 5, 4)]


def test_boxes_by_hand():
    box = torch.tensor([[0.4, 0.4, 0.6, 0.6], [0.0, 0.5, 0.2, 0.7]])
    torch.testing.assert_close(enlarged(box, 2.0), torch.tensor([[0.3, 0.3, 0.7, 0.7], [0.0, 0.4, 0.3, 0.8]]))
    torch.testing.assert_close(enlarged(box)[0], torch.tensor([0.1, 0.1, 0.9, 0.9]))


def test_a_crop_of_the_whole_is_the_picture_and_of_a_quarter_its_pixels():
    picture = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(gaze_crop(picture, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), factor=1.0), picture)
    quarter = gaze_crop(picture, torch.tensor([[0.625, 0.125, 0.875, 0.375]]), factor=2.0, size=4)
    torch.testing.assert_close(quarter, picture[..., :4, 4:])


def test_laplace_by_hand():
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    assert float(laplace_loss(one, zero, 0 * one)) == pytest.approx(math.sqrt(2))
    best = math.log(math.sqrt(2) * 3)
    losses = [float(laplace_loss(3 * one, zero + best + d, 0 * one)) for d in (-0.1, 0.0, 0.1)]
    assert losses[1] == min(losses) == pytest.approx(1 + best)
    # two numbers of one action are summed; a masked step counts for nothing
    pair = torch.tensor([[[1.0, 1.0], [50.0, 50.0]]])
    mask = torch.tensor([[True, False]])
    assert float(laplace_loss(pair, torch.zeros(1, 2), 0 * pair, mask=mask)) == pytest.approx(2 * math.sqrt(2))


def test_a_layer_is_detr_s():
    decoder = Decoder(8, 2, layers=1, hidden=12).double().eval()
    tokens, position, queries = torch.randn(1, 5, 8).double(), torch.randn(1, 5, 8).double(), torch.randn(3, 8).double()
    layer, q = decoder.layers[0], queries[None]
    # contents are 0, so the self attention's values are those of zeros
    x = layer.norm1(layer.self_attn(q, q, 0 * q, need_weights=False)[0])
    x = layer.norm2(x + layer.multihead_attn(x + q, tokens + position, tokens, need_weights=False)[0])
    x = layer.norm3(x + layer.linear2(layer.linear1(x).relu()))
    torch.testing.assert_close(decoder(tokens, position, queries)[0], decoder.norm(x))


@pytest.mark.parametrize("encoder", [0, 1])
def test_padding_is_not_there(encoder):
    decoder = Decoder(8, 2, layers=2, encoder=encoder, hidden=12).eval()
    tokens, position, queries = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(3, 8)
    found = decoder(tokens, position, queries)
    more = torch.cat([tokens, torch.full((2, 2, 8), 9.0)], 1), torch.cat([position, torch.randn(2, 2, 8)], 1)
    pad = torch.arange(7).expand(2, -1) >= 5
    torch.testing.assert_close(decoder(*more, queries, pad=pad), found)
    torch.testing.assert_close(decoder(tokens[1:], position[1:], queries), found[:, 1:])


def test_tokens_have_no_order_beyond_their_positions():
    decoder, order = Decoder(8, 2, hidden=12).eval(), torch.randperm(5)
    tokens, position, queries = torch.randn(1, 5, 8), torch.randn(1, 5, 8), torch.randn(3, 8)
    found = decoder(tokens, position, queries)
    torch.testing.assert_close(decoder(tokens[:, order], position[:, order], queries), found)
    assert not torch.allclose(decoder(tokens, position[:, order], queries), found)


def test_all_layers_are_supervised():
    model = small(stages=3)
    found = model(*given())
    assert [tuple(part.shape) for part in found.every] == [(3, 2, 4, 2), (3, 2, 4), (3, 2, 3)]
    target, stage = torch.rand(2, 4, 2), torch.tensor([0, 2])
    expected = sum(laplace_loss(a, u, target) for a, u in zip(*found.every[:2], strict=True))
    expected += 10 * sum(F.cross_entropy(logits, stage) for logits in found.every[2])
    torch.testing.assert_close(found.loss(target, stage=stage), expected)
    assert torch.equal(found.actions, found.every[0][-1])


def test_uncertainty_is_clipped():
    model = small()
    nn.init.constant_(model.width.bias, 1e3)
    assert torch.equal(model(*given()).uncertainty, torch.full((2, 4), 10.0))


def test_each_instruction_matters_and_its_box():
    pictures, state = given()
    boxes = torch.tensor([[[0.2, 0.2, 0.4, 0.5]], [[0.5, 0.1, 0.9, 0.4]]])
    inputs = {"goal": torch.rand(2, 3, 8, 8), "boxes": boxes, "words": torch.tensor([[0, 1], [2, 3]])}
    model = small(goal=True, gaze=True, words=4)
    found = model(pictures, state, **inputs).actions
    others = {"goal": torch.rand(2, 3, 8, 8), "boxes": boxes.flip(0), "words": inputs["words"].flip(0)}
    for name, other in others.items():
        assert not torch.allclose(model(pictures, state, **{**inputs, name: other}).actions, found), name
    alone = {name: value[1:] for name, value in inputs.items()}
    torch.testing.assert_close(model(pictures[1:], [s[1:] for s in state], **alone).actions[0], found[1])


def test_record_sees_queries_look_at_tokens():
    model, (pictures, state) = small(goal=True), given()
    with torch.no_grad(), regard.record(model, "rows") as recording:
        model(pictures, state, goal=torch.rand(2, 3, 8, 8))
    found = [node["rows"] for node in recording.tree.subtree if "rows" in node]
    (cross,) = (rows for rows in found if rows.sizes["key"] == 3 + 3 + 5 + 5)
    assert (cross.sizes["layer"], cross.sizes["query"]) == (3, 4)
    np.testing.assert_allclose(cross.sum("key"), 1, rtol=1e-5)


def test_saved_and_loaded(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    again = Virt.from_pretrained(tmp_path, backbone=nn.Flatten(2)).eval()
    inputs = given()
    assert torch.equal(again(*inputs).actions, model(*inputs).actions)


def test_refusals():
    pictures, state = given()
    with pytest.raises(ValueError, match="made with goal; give goal"):
        small(goal=True)(pictures, state)
    with pytest.raises(ValueError, match="made without boxes; leave out boxes"):
        small()(pictures, state, boxes=torch.rand(2, 1, 4))
    with pytest.raises(ValueError, match="in widths and heights, 0 to 1"):
        enlarged(torch.tensor([0.2, 0.2, 1.4, 0.5]))
    with pytest.raises(ValueError, match=r"pictures are \[batch, 1, channel, row, column\]; got \[2, 3, 8, 8\]"):
        small()(pictures[:, 0], state)
    with pytest.raises(ValueError, match="10 channels do not divide by 4 heads"):
        Decoder(10, 4)


@pytest.mark.parametrize("encoder", [0, 1])
def test_what_is_no_token_does_not_count_whatever_stands_there(encoder):
    decoder = Decoder(16, 2, layers=1, encoder=encoder, hidden=8).eval()
    tokens, position, queries = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.randn(3, 16)
    pad = torch.tensor([[False] * 4 + [True], [False] * 5])
    found = decoder(tokens, position, queries, pad=pad)
    torch.testing.assert_close(found[:, :1], decoder(tokens[:1, :4], position[:1, :4], queries))
    tokens[0, 4] = position[0, 4] = math.nan
    torch.testing.assert_close(decoder(tokens, position, queries, pad=pad), found)
