"""Faithful maps: parts and masks by hand, what is hidden cannot be seen, and the losses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SwinConfig, SwinModel, ViTConfig, ViTModel

import regard
from regard.models.faithful_maps import (
    FaithfulMaps,
    MaskedViT,
    PartFinder,
    background,
    chosen,
    entropy,
    faithful_maps,
    moved,
    orthogonality,
    presence,
    total_variation,
    turns,
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}


def vit(**knobs) -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, intermediate_size=32, initializer_range=0.3, **knobs)
    return ViTModel(config, add_pooling_layer=False).eval()


def dino() -> Dinov2WithRegistersModel:
    torch.manual_seed(0)
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=2)).eval()


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> FaithfulMaps:
    return faithful_maps(vit(), classes=3, parts=2).eval()


class Told(nn.Module):
    """A backbone whose patches are given."""

    def __init__(self, patches: torch.Tensor) -> None:
        super().__init__()
        self.embeddings, self.patches = nn.Module(), patches
        self.embeddings.cls_token = nn.Parameter(torch.zeros(1, 1, patches.shape[-1]))
        self.config = ViTConfig(hidden_size=patches.shape[-1], patch_size=1)

    def forward(self, pictures):
        hidden = torch.cat([torch.full_like(self.patches[:, :1], 100.0), self.patches], 1)
        return type("Output", (), {"last_hidden_state": hidden})()


def test_parts_by_hand():
    finder = PartFinder(Told(torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])), classes=1, parts=2).eval()
    finder.prototypes.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    found = finder(torch.zeros(1, 3, 1, 2))
    assert found.logits[0, :, 0, 0].tolist() == [0, -2, -1]
    assert found.maps[0, :, 0, 0].tolist() == pytest.approx([0.6652, 0.0900, 0.2447], abs=1e-4)
    plain = torch.stack([found.maps[0, :, 0, 0], torch.zeros(3)]) / 2  # a mean over both patches
    assert torch.allclose(
        found.features[0], (plain - plain.mean()) / (plain.var(correction=0) + 1e-5).sqrt(), atol=1e-5
    )
    assert torch.allclose(found.scores[0, 0], finder.read.weight[0] @ found.features[0, :, :2])
    mask, shares, whole = chosen(found.logits)
    assert mask.flatten().tolist() == [True, False]
    assert shares[0, :, 0, 0].tolist() == pytest.approx([0.6652, 0.2447], abs=1e-4)
    assert float(whole[0, 0, 0].detach()) == pytest.approx(0.7552, abs=1e-4)


def test_a_tie_is_seen_and_noise_decides():
    logits = torch.zeros(1, 2, 1, 1)
    assert bool(chosen(logits).mask)
    assert not bool(chosen(logits, noise=torch.tensor([0.0, 0.1]).view(1, 2, 1, 1)).mask)
    assert chosen(logits + torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), tau=0.5).shares[0, 0] == pytest.approx(
        0.8808, abs=1e-4
    )


def test_a_dropped_part_counts_for_nothing():
    torch.manual_seed(0)
    found = chosen(torch.tensor([1.0, 1.0, 0.0]).view(1, 3, 1, 1).repeat(2000, 1, 2, 1), drop=0.5)
    assert torch.equal(found.mask[:, 0], found.mask[:, 1])  # whole parts of a picture
    assert float(found.mask.float().mean()) == pytest.approx(0.75, abs=0.05)
    kept = found.shares[found.mask[:, 0, 0], 0]
    assert torch.allclose(kept, torch.tensor(math.e / (2 * math.e + 1)))  # a kept part keeps its value


@pytest.mark.parametrize("make", [vit, dino])
def test_what_is_hidden_changes_no_bit(make, pictures):
    second = MaskedViT(make(), classes=2).eval()
    mask = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    shown = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    with torch.no_grad():
        one = second(pictures, mask)
        assert torch.equal(one, second(torch.where(shown, pictures, torch.rand_like(pictures) * 9), mask))
        assert not torch.equal(one, second(torch.where(shown, torch.rand_like(pictures), pictures), mask))
        assert torch.allclose(one, second(pictures, mask.float()), atol=1e-6)  # the form that trains: the same values


@pytest.mark.parametrize("make", [vit, dino])
def test_all_and_nothing_seen(make, pictures):
    plain = make()
    second = MaskedViT(copy.deepcopy(plain), classes=2).eval()
    seen = torch.ones(3, 4, 4, dtype=torch.bool)
    with torch.no_grad():
        state = plain(pictures).last_hidden_state[:, 0]
        assert torch.allclose(second(pictures, seen), second.read(second.norm(state)), atol=1e-6)
        nothing = second(pictures, ~seen)
    assert nothing.isfinite().all()
    assert torch.equal(nothing[0], nothing[1])


def test_in_every_layer_no_query_looks_at_hidden_patches(model, pictures):
    with torch.no_grad(), regard.record(model.second.vit, "rows") as recording:
        mask = torch.zeros(3, 4, 4, dtype=torch.bool)
        mask[:, 1:3, 2] = True
        model.second(pictures, mask)
    (node,) = (node for node in recording.tree.subtree if "rows" in node)
    rows = node["rows"].transpose("layer", "batch", "head", "query", "key").values
    assert rows.shape[0] == 2
    hidden = (~torch.cat([torch.ones(1, dtype=torch.bool), mask[0].flatten()])).numpy()
    assert (rows[..., hidden] == 0).all()
    assert (rows[..., ~hidden] > 0).all()


def test_weights_of_a_soft_mask_by_a_dense_oracle():
    second = MaskedViT(vit(), classes=2).eval()
    second.vit.layers = second.vit.layers[:1]
    share, pictures = torch.rand(1, 4, 4), torch.rand(1, 3, 16, 16)
    layer = second.vit.layers[0]
    hidden = second.vit.embeddings(pictures)
    query, key, value = (
        part(layer.layernorm_before(hidden)).unflatten(-1, (2, 8)).transpose(1, 2)
        for part in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj)
    )
    scores = query @ key.mT * 8**-0.5 + torch.cat([torch.ones(1), share.flatten()]).log()
    hidden = hidden + layer.attention.o_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    hidden = hidden + layer.mlp(layer.layernorm_after(hidden))
    expected = second.read(second.norm(second.vit.layernorm(hidden)[:, 0]))
    assert torch.allclose(second(pictures, share), expected, atol=1e-6)


def test_the_first_stage_learns_through_the_mask(model, pictures):
    model.train()
    torch.manual_seed(0)
    found = model(pictures)
    found.logits.sum().backward()
    assert model.first.prototypes.grad.abs().max() > 0  # hidden patches have a gradient too
    assert all(p.grad is None for p in model.first.vit.parameters())  # frozen
    assert model.first.read.weight.grad is None


def test_at_run_time_nothing_is_drawn(model, pictures):
    before = torch.get_rng_state()
    one, other = model(pictures), model(pictures)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.logits, other.logits)
    alone = model(pictures[1:2])
    assert torch.allclose(one.logits[1:2], alone.logits, atol=1e-6)
    assert torch.equal(one.mask[1:2], alone.mask)


def test_parts_can_be_taken_away(model, pictures):
    model.first.prototypes.data[-1] += 100.0  # nothing is background
    whole = model(pictures)
    assert whole.mask.all()
    part = whole.maps[:, :-1].argmax(1)
    assert part.float().std() > 0
    assert torch.equal(model(pictures, without=[0]).mask, part == 1)
    assert not model(pictures, without=[0, 1]).mask.any()
    best = model.first(pictures).logits[:, :-1].amax(1)
    middle = float(best.median().detach())
    assert torch.equal(model(pictures, least=middle).mask, best >= middle)


def test_losses_by_hand():
    maps = torch.zeros(1, 3, 3, 3)
    maps[0, 0], maps[0, 1, 0, 0], maps[0, 0, 0, 0] = 1, 1, 0  # one patch of nine is the second part
    assert float(presence(maps)) == pytest.approx(1 - (8 / 9 + 1 / 9) / 2)
    assert float(total_variation(maps)) == pytest.approx(4 / 9)
    assert float(entropy(maps)) == 0
    assert float(entropy(torch.full((1, 4, 2, 2), 0.25))) == pytest.approx(math.log(4))
    middle = torch.zeros(1, 2, 5, 5)
    middle[0, 1, 1:4, 1:4] = 1
    assert float(background(torch.ones(1, 2, 5, 5))) == 0  # at a corner
    assert float(background(middle)) == pytest.approx(-math.log(4 / 9))  # 4 of 9 patches around a corner's place
    features = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    assert float(orthogonality(features)) == pytest.approx(0.5 / 2)  # cosine squared 1/2, twice, of four


def test_the_sum_of_the_losses_and_turned_maps(model, pictures):
    torch.manual_seed(0)
    model.train()
    terms = model.losses(pictures, torch.tensor([0, 1, 2]))
    total = terms.pop("total")
    assert len(terms) == 8
    assert torch.allclose(total, sum(t * (2 if n == "background" else 1) for n, t in terms.items()))
    maps = torch.zeros(1, 1, 9, 9)
    maps[0, 0, 2, 6] = 1
    quarter = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])
    assert moved(maps, quarter)[0, 0].nonzero().tolist() == [[2, 2]]
    model.eval()
    still = turns(3, most=0.0)
    known = model.first.patches(pictures)
    with torch.no_grad():
        terms = model.losses(pictures, torch.zeros(3).long(), patches=known, again=(known, still))
    assert float(terms["equivariance"]) == pytest.approx(0, abs=1e-5)
    assert torch.equal(model(pictures, patches=known).logits, model(pictures).logits)


def test_kept_and_read_again(pictures, tmp_path):
    model = faithful_maps(vit(), classes=3, parts=2, tau=0.7, drop=0.1).eval()
    model.save_pretrained(tmp_path)
    other = FaithfulMaps.from_pretrained(tmp_path, first=vit(), second=vit()).eval()
    assert (other.tau, other.drop, other.first.dropout.p) == (0.7, 0.1, 0.1)
    assert torch.equal(other(pictures).logits, model(pictures).logits)


def test_refusals(model, pictures):
    swin = SwinModel(SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[1], window_size=2))
    with pytest.raises(TypeError, match="with a class token"):
        faithful_maps(swin, classes=2)
    with pytest.raises(ValueError, match="1 or more"):
        faithful_maps(vit(), classes=2, parts=0)
    with pytest.raises(ValueError, match="tau is above 0"):
        faithful_maps(vit(), classes=2, tau=0.0)
    with pytest.raises(ValueError, match="parts are 0 to 1"):
        model(pictures, without=[2])
    with pytest.raises(ValueError, match="whole patches of 4"):
        model(pictures[..., :-1])
    with pytest.raises(ValueError, match="a mask of these pictures"):
        model.second(pictures, torch.ones(3, 4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="a mask of these pictures"):
        model.second(pictures, torch.ones(3, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="PartFinder: patches of 3 pictures"):
        model(pictures, patches=torch.zeros(2, 4, 4, 16))
    with pytest.raises(ValueError, match="one size"):
        FaithfulMaps(vit(), ViTModel(ViTConfig(**{**SIZES, "patch_size": 8})), classes=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, pictures, dtype):
    whole = model(pictures)
    half = copy.deepcopy(model).to(dtype)
    assert torch.allclose(half(pictures.to(dtype)).logits.float(), whole.logits, atol=0.1)
    assert half.losses(pictures.to(dtype), torch.tensor([0, 1, 2]))["total"].isfinite()


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_soft_mask_is_no_less_than_0(model, pictures, value):
    with pytest.raises(ValueError, match="floats from 0 to 1"):
        model.second(pictures, torch.full((3, 4, 4), value))
