"""Pixel entity linking: tokens by hand, regions that cover the picture, padding that is not there, and annotation."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

import regard
from regard.models.pixel_entity_linking import (
    EntityLinker,
    Linked,
    RegionEncoder,
    annotate,
    name_log_probs,
    pixel_entity_linking,
    regions,
    tokens_of_regions,
    weights_of_regions,
)

SIZES = {"channels": 6, "grid": (4, 4), "width": 5, "dim": 16, "heads": 2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def _given(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    masks = torch.zeros(batch, 3, 16, 16, dtype=torch.bool)
    masks[:, 0, :7, :6] = True
    masks[:, 1, 9:, 3:12] = True
    masks[:, 2, 2:5, 10:] = True
    return torch.randn(batch, 6, 4, 4), masks, masks[:, 1], torch.randn(7, 5)


def test_tokens_by_hand():
    features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    right = torch.tensor([[[[0, 1], [0, 1]]]])
    torch.testing.assert_close(tokens_of_regions(features, right), torch.tensor([[[3.0]]]), rtol=1e-5, atol=0)
    # at pixels twice as fine: half of the first place, all of the second
    fine = torch.zeros(1, 1, 4, 4)
    fine[0, 0, :2, 1:] = 1
    expected = torch.tensor([[[(0.5 * 1 + 1 * 2) / 1.5]]])
    torch.testing.assert_close(tokens_of_regions(features, fine), expected, rtol=1e-5, atol=0)
    # less than half a place lies where its centre is, though it touches two
    fine = torch.zeros(1, 2, 8, 8)
    fine[0, 0, 5, 1:5] = 1
    torch.testing.assert_close(tokens_of_regions(features, fine), torch.tensor([[[3.0], [0.0]]]))


def test_regions_cover_the_picture_once():
    _, masks, asked, _ = _given()
    every, there = regions(masks, asked)
    assert (every.sum(1) == 1).all()
    assert torch.equal(every[:, 0], asked)
    assert there.tolist() == [[True, True, False, True, True]] * 2  # the asked one counts once
    assert regions(torch.ones(1, 1, 4, 4).bool(), torch.ones(1, 4, 4).bool())[1].tolist() == [[True, False, False]]
    torch.testing.assert_close(weights_of_regions(every, (4, 4)).sum(-1), there.float(), rtol=1e-5, atol=1e-5)


def test_single_patches_as_regions_are_the_patches():
    maps, encoder = torch.randn(2, 16, 3, 3), RegionEncoder(16, 2, 2).eval()
    masks = F.interpolate(torch.eye(9).view(1, 9, 3, 3), scale_factor=4.0).expand(2, -1, -1, -1)
    found = tokens_of_regions(maps, masks)
    torch.testing.assert_close(found, maps.flatten(2).mT, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder(found), encoder(maps.flatten(2).mT), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interact", ["region", "patch", "alone"])
def test_order_padding_and_batch_change_nothing(interact):
    model = pixel_entity_linking(interact=interact, **SIZES).eval()
    features, masks, asked, entities = _given()
    found = model(features, masks, asked, entities)
    torch.testing.assert_close(model(features, masks[:, [2, 0, 1]], asked, entities), found)
    more = torch.cat([masks, torch.zeros(2, 4, 16, 16).bool()], 1)
    torch.testing.assert_close(model(features, more, asked, entities), found)
    torch.testing.assert_close(model(features[:1], masks[:1], asked[:1], entities), found[:1])
    other = features.clone()
    other[:, :, 0, 3] += 5.0  # far from what is asked
    same = torch.allclose(model(other, masks, asked, entities), found)
    assert same == (interact == "alone")
    if interact != "patch":
        kind = model.kind.weight.detach().clone()
        with torch.no_grad():
            model.kind.weight[0, :8] += 1.0
        assert not torch.allclose(model(features, masks, asked, entities), found)
        with torch.no_grad():
            model.kind.weight.copy_(kind)


def test_scores_are_cosines_over_the_temperature():
    model = pixel_entity_linking(temperature=0.5, **SIZES).eval()
    features, masks, asked, entities = _given()
    vector = model.link(features, masks, asked).vector
    expected = F.cosine_similarity(vector[:, None], entities[None], dim=-1) / 0.5
    torch.testing.assert_close(model(features, masks, asked, entities), expected)


def test_a_tower_gives_the_features(tmp_path):
    vision = {"image_size": 16, "patch_size": 4, "hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = ViTModel(ViTConfig(**vision, intermediate_size=8), add_pooling_layer=False)
    model = pixel_entity_linking(tower=tower, **SIZES).eval()
    _, masks, asked, entities = _given()
    pictures = torch.randn(2, 3, 16, 16)
    features = tower(pictures).last_hidden_state[:, 1:].mT.unflatten(2, (4, 4))
    found = model(pictures, masks, asked, entities)
    plain = pixel_entity_linking(**SIZES).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(plain(features, masks, asked, entities), found)
    model.save_pretrained(tmp_path)
    again = EntityLinker.from_pretrained(tmp_path, tower=tower).eval()
    torch.testing.assert_close(again(pictures, masks, asked, entities), found)
    with pytest.raises(ValueError, match="of the pictures' size"):
        model(torch.randn(2, 3, 8, 8), masks, asked, entities)
    with pytest.raises(ValueError, match="the grid has 16 places"):
        short = pixel_entity_linking(tower=_Short(), **SIZES)
        short(pictures, masks, asked, entities)


class _Short(nn.Module):
    def forward(self, pictures: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=torch.randn(len(pictures), 9, 6))


def test_gradients_and_half_precision():
    model = pixel_entity_linking(**SIZES)
    features, masks, asked, entities = _given()
    model(features, masks, asked, entities).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    half = model.bfloat16()(features.bfloat16(), masks, asked, entities.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


def test_record_sees_attention_among_regions():
    model = pixel_entity_linking(layers=1, **SIZES).eval()
    features, masks, asked, entities = _given()
    with torch.no_grad(), regard.record(model, "rows") as recording:
        model(features, masks, asked, entities)
    (stack,) = (node for node in recording.tree.subtree if "rows" in node)
    rows = np.asarray(stack["rows"]).reshape(2, 2, 5, 5)
    np.testing.assert_allclose(rows.sum(-1), 1.0, rtol=1e-5)
    assert (rows[:, :, [0, 1, 3, 4], 2] == 0).all()  # the asked one among the others is not there
    assert (rows[:, :, 0, [0, 1, 3, 4]] > 0).all()


def test_names_are_written_after_the_tokens():
    language = GPT2LMHeadModel(
        GPT2Config(vocab_size=11, n_embd=5, n_layer=1, n_head=1, n_positions=20, bos_token_id=0, eos_token_id=0)
    ).eval()
    tokens, names = torch.randn(1, 3, 5), torch.tensor([[4, 7]])
    linked = Linked(tokens[:, 0], tokens, torch.tensor([[True, True, True]]))
    found = name_log_probs(language, linked, names)
    given = torch.cat([tokens, language.transformer.wte(names)], 1)
    logs = language(inputs_embeds=given).logits.log_softmax(-1)
    torch.testing.assert_close(found, logs[:, 2, 4] + logs[:, 3, 7])
    # filled up regions and names change nothing
    more = torch.cat([tokens[:, :1], torch.full((1, 2, 5), 9.0), tokens[:, 1:]], 1)
    padded = Linked(tokens[:, 0], more, torch.tensor([[True, False, False, True, True]]))
    longer, there = torch.tensor([[4, 7, 0]]), torch.tensor([[True, True, False]])
    torch.testing.assert_close(name_log_probs(language, padded, longer, there), found, rtol=1e-4, atol=1e-5)


def test_annotation_in_reverse_keeps_what_agrees():
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[0, :2], masks[1, :2, :3], masks[2, 3] = True, True, True  # the second is three quarters of the first
    asked = []

    def propose(picture, text):
        asked.append((picture, text))
        return list(masks)

    scores = {8: 0.6, 6: 0.9, 4: 0.55}
    found = annotate("picture", "Rex", "dog", propose, lambda p, m, t: scores[int(m.sum())])
    assert asked == [("picture", "a dog named Rex")]
    assert [(int(one.mask.sum()), one.score) for one in found] == [(6, 0.9), (4, 0.55)]
    few = annotate("picture", "Rex", "dog", propose, lambda p, m, t: scores[int(m.sum())], least=0.58, apart=0.9)
    assert [int(one.mask.sum()) for one in few] == [6, 8]
    assert annotate("picture", "Rex", "dog", lambda *_: [], lambda *_: 1.0) == []


def test_refusals():
    model = pixel_entity_linking(**SIZES)
    features, masks, asked, entities = _given()
    with pytest.raises(ValueError, match="asked mask of row 1 covers nothing"):
        model(features, masks, torch.stack([asked[0], torch.zeros(16, 16).bool()]), entities)
    with pytest.raises(ValueError, match="of one size"):
        model(features, masks, asked[:, :8], entities)
    with pytest.raises(TypeError, match="masks are boolean"):
        model(features, masks.float(), asked, entities)
    with pytest.raises(ValueError, match=r"features are \[batch, 6, 4, 4\]"):
        model(torch.randn(2, 6, 5, 5), masks, asked, entities)
    with pytest.raises(ValueError, match="2 pictures and masks of 1"):
        model(features, masks[:1], asked[:1], entities)
    with pytest.raises(ValueError, match='"region", "patch" or "alone"'):
        pixel_entity_linking(**SIZES | {"interact": "pixel"})
    with pytest.raises(ValueError, match="tokens_of_regions: features"):
        tokens_of_regions(features, masks[0])


@pytest.mark.parametrize("interact", ["region", "patch", "alone"])
def test_no_pictures(interact):
    features, masks, asked, entities = (x[:0] if i < 3 else x for i, x in enumerate(_given()))
    found = pixel_entity_linking(**SIZES | {"interact": interact})(features, masks, asked, entities)
    assert found.shape == (0, len(entities))


def test_sizes_that_do_not_fit():
    features, masks, asked, entities = _given()
    with pytest.raises(ValueError, match="as fine as features or finer"):
        tokens_of_regions(features, masks[:, :, ::8, ::8])
    with pytest.raises(ValueError, match=r"entities are \[entity, 5\]"):
        pixel_entity_linking(**SIZES)(features, masks, asked, entities[:, :4])
    for knob, said in (({"heads": 3}, "divides by heads"), ({"temperature": 0.0}, "temperature is above 0")):
        with pytest.raises(ValueError, match=said):
            pixel_entity_linking(**SIZES | knob)
