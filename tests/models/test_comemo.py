"""A memory beside the context: a fresh model is its base, positions by hand, and what the memory sees of the text."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import regard
from regard.models.comemo import MemoryLayer, comemo, mix, thumbnail_positions
from tests import families

IMAGE = families.IMAGE


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def built(*, opened: bool = False, **knobs):
    """A tiny LLaVA of 16 tokens a picture with a memory ahead of each layer, and what to ask it."""
    torch.manual_seed(0)
    llava, inputs = families.llava()
    llava.eval()
    model = comemo(llava, **{"every": 1, **knobs}).eval()
    if opened:
        for layer in model.modules():
            if isinstance(layer, MemoryLayer):
                nn.init.constant_(layer.attn_gate, 0.5)
                nn.init.constant_(layer.ff_gate, -0.4)
    return model, inputs


def test_positions_by_hand():
    found = thumbnail_positions(2, 1)
    assert found[:16].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert found[256:272].tolist() == [7, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15]
    assert found[512:528].tolist() == list(range(16))
    assert torch.equal(thumbnail_positions(1, 1, 7), torch.arange(7, 263))


@pytest.mark.parametrize(("columns", "rows"), [(2, 3), (3, 1), (1, 4)])
def test_a_picture_has_a_thumbnail_s_positions_and_tiles_keep_their_place(columns, rows):
    found = thumbnail_positions(columns, rows, 5)
    assert len(found) == (columns * rows + 1) * 256
    assert set(found.tolist()) == set(range(5, 261))
    tiles = (found[:-256] - 5).view(rows, columns, 16, 16)
    assert (tiles[0] // 16 < -(-16 // rows)).all()
    assert (tiles[:, 0] % 16 < -(-16 // columns)).all()
    columnwise = (thumbnail_positions(columns, rows, order="columns")[:-256]).view(columns, rows, 16, 16)
    assert torch.equal(columnwise.transpose(0, 1), tiles)


def test_a_fresh_model_is_its_base_to_the_bit():
    torch.manual_seed(0)
    llava, inputs = families.llava()
    llava.eval()
    mask = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        expected = llava(**inputs, attention_mask=mask).logits
        model = comemo(llava, every=1)
        assert torch.equal(model(**inputs).logits, expected)


def test_a_layer_by_hand():
    layer = MemoryLayer(2, heads=1, head_dim=2, hidden=2, base=1e6)
    with torch.no_grad():
        layer.attn_gate.fill_(math.atanh(0.5))
        layer.cross_attn.to_q.weight.zero_()
        layer.cross_attn.to_kv.weight.copy_(torch.eye(2).repeat(2, 1))
        layer.cross_attn.to_out.weight.copy_(torch.eye(2))
    text, media = torch.zeros(1, 1, 2), torch.tensor([[[3.0, 3.0], [1.0, -1.0]]])
    # scores of 0: the mean of the normed pictures (1, 1) and (1, -1), half of which is added
    found = layer(text, media, torch.zeros(1, 1), torch.tensor([[4, 9]]))
    torch.testing.assert_close(found, torch.tensor([[[0.5, 0.0]]]), rtol=1e-4, atol=1e-5)


def opened_layer(dim: int = 8) -> MemoryLayer:
    layer = MemoryLayer(dim, heads=2, head_dim=4, hidden=12)
    nn.init.constant_(layer.attn_gate, 0.7)
    nn.init.constant_(layer.ff_gate, -0.5)
    return layer


def test_the_memory_has_no_order_and_hears_only_distances():
    layer, order = opened_layer(), torch.randperm(7)
    text, media, at, of = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.arange(5)[None], torch.randint(9, (2, 7))
    found = layer(text, media, at, of)
    torch.testing.assert_close(layer(text, media[:, order], at, of[:, order]), found)
    torch.testing.assert_close(layer(text, media, at + 11, of + 11), found, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layer(text, media, at, of + 3), found, atol=1e-4)


def test_what_is_masked_is_not_there():
    layer = opened_layer()
    text, media, at, of = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.arange(5)[None], torch.arange(7)[None]
    mask = (torch.arange(7) < 4)[None, None, None]
    torch.testing.assert_close(layer(text, media, at, of, mask), layer(text, media[:, :4], at, of[:, :4]))


def test_gradients():
    layer = opened_layer().double()
    text, media = torch.randn(1, 2, 8).double().requires_grad_(), torch.randn(1, 3, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t, m: layer(t, m, torch.arange(2)[None], torch.arange(3)[None]), (text, media)
    )
    fresh = MemoryLayer(8, heads=2, head_dim=4, hidden=12)
    fresh(
        torch.randn(1, 2, 8), torch.randn(1, 3, 8), torch.arange(2)[None], torch.arange(3)[None]
    ).square().sum().backward()
    assert fresh.attn_gate.grad.any()
    assert fresh.ff_gate.grad.any()


def test_words_ahead_of_a_picture_see_it_in_the_memory_alone():
    model, inputs = built(opened=True)
    ids = inputs["input_ids"]
    first = int((ids[0] == IMAGE).nonzero()[0])
    assert first > 0 or (ids[0] != IMAGE).any()
    ids = torch.cat([torch.full((len(ids), 2), 3), ids], 1)  # words ahead of the pictures
    other = inputs["pixel_values"].flip(0)
    with torch.no_grad():
        assert not torch.allclose(model(ids, other).logits[:, :2], model(ids, inputs["pixel_values"]).logits[:, :2])
        plain, _ = built()
        assert torch.equal(plain(ids, other).logits[:, :2], plain(ids, inputs["pixel_values"]).logits[:, :2])


def test_rows_do_not_touch():
    model, inputs = built(opened=True)
    with torch.no_grad():
        both = model(**inputs).logits
        alone = model(inputs["input_ids"][1:], inputs["pixel_values"][1:]).logits
    torch.testing.assert_close(alone[0], both[1], rtol=1e-4, atol=1e-5)
    assert model.held.media is None


def test_tiles_share_the_thumbnail_s_positions():
    model, inputs = built(opened=True)
    words = torch.tensor([[3, 4]])
    ids = torch.cat([words, torch.full((1, 48), IMAGE), words], 1)
    found = model.positions(ids, [[(2, 1)]])
    assert found[0, :2].tolist() == [0, 1]
    assert found[0, -2:].tolist() == [18, 19]
    assert torch.equal(found[0, 2:50], thumbnail_positions(2, 1, 2, side=4))
    pixels = inputs["pixel_values"][[0, 1, 0]]
    with torch.no_grad():
        assert model(ids, pixels, tiles=[[(2, 1)]]).logits.shape[:2] == (1, 52)
    off, _ = built(dhr=False)
    assert off.positions(ids, [[(2, 1)]])[0].tolist() == list(range(52))


def test_continues_as_it_would_read_the_whole():
    model, inputs = built(opened=True)
    ids, pixels = inputs["input_ids"][:1], inputs["pixel_values"][:1]
    said = model.continued(ids, pixels, 3)
    assert torch.equal(said[:, : ids.shape[1]], ids)
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, model(ids, pixels).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(said, ids)
    assert model.held.media is None


def test_record_sees_the_memory():
    model, inputs = built(opened=True)
    with torch.no_grad(), regard.record(model, "rows") as recording:
        model(**inputs)
    tokens, pictures = inputs["input_ids"].shape[1], 16
    found = [node["rows"] for node in recording.tree.subtree if "rows" in node]
    assert [rows for rows in found if (rows.sizes["query"], rows.sizes["key"]) == (tokens, pictures)]


def test_refusals():
    llava, inputs = families.llava()
    with pytest.raises(ValueError, match="rotary positions, such as LlamaModel; got GPT2Model"):
        mix(families.gpt2()[0].transformer)
    with pytest.raises(ValueError, match="every=9, and there are"):
        comemo(llava, every=9)
    with pytest.raises(TypeError, match="takes a LlavaForConditionalGeneration"):
        comemo(nn.Linear(2, 2))
    model = comemo(llava, every=1)
    with pytest.raises(ValueError, match="not those of tiles"):
        model.positions(inputs["input_ids"], [[(2, 2)]] * 2)
    with pytest.raises(ValueError, match="order rows or columns"):
        thumbnail_positions(2, 0)
    with pytest.raises(ValueError, match="head_dim is even"):
        MemoryLayer(6, heads=2, head_dim=3, hidden=4)
