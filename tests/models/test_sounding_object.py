"""Sounding objects: a mask for weights by hand, the condition against a dense oracle, loss and generation, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regard
from regard.models.sounding_object import (
    MaskAttention,
    ObjectCondition,
    SoundingObject,
    mask_attention,
    match,
    patch_mask,
    sounding_object,
)

SIZES = {"text_dim": 6, "patch_dim": 12, "dim": 8, "patches": 9}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Told(nn.Module):
    """A U-Net's place: its noise is a linear map of what it is told, and half of the sample."""

    def __init__(self, dim: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.map, self.shape = nn.Linear(dim, int(np.prod(shape)), bias=False), shape

    def forward(self, sample, timestep, encoder_hidden_states):
        told = self.map(encoder_hidden_states[:, 0]).unflatten(1, self.shape)
        return SimpleNamespace(sample=0.5 * sample + told)


@pytest.fixture
def model() -> SoundingObject:
    shape = (1, 4, 2)
    return sounding_object(Told(8, shape), ObjectCondition(**SIZES), shape=shape)


def test_a_mask_for_weights_by_hand():
    weights, mask = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    found = match(mask, weights)
    torch.testing.assert_close(found, torch.tensor([0.1, 0.7, 0.1, 0.1]))
    half = match(torch.tensor([0.0, 0.5, 0.5, 0.0]), weights)
    low, high = 0.25 - weights.std(correction=0), 0.25 + weights.std(correction=0)
    torch.testing.assert_close(half, torch.stack([low, high, high, low]))
    assert half.min() < 0  # it may be
    summed = match(torch.tensor([0.0, 0.5, 0.25, 0.0]), weights, fit="sum")
    torch.testing.assert_close(summed, torch.tensor([0.0, 2 / 3, 1 / 3, 0.0]))


def test_moments_and_limits():
    weights, mask = torch.randn(3, 2, 9).softmax(-1), torch.rand(3, 1, 9)
    found = match(mask, weights)
    torch.testing.assert_close(found.mean(-1), torch.full((3, 2), 1 / 9))
    torch.testing.assert_close(found.std(-1), weights.std(-1))
    torch.testing.assert_close(match(weights * 0.5, weights), weights)  # of the same proportions: as before
    even = torch.full((3, 2, 9), 1 / 9)
    torch.testing.assert_close(match(torch.ones(9), weights), even)
    torch.testing.assert_close(match(mask, even), even)
    assert match(torch.rand(9) > 0.5, weights.bfloat16()).dtype == torch.bfloat16


def test_condition_against_a_dense_oracle():
    condition, text, patches = ObjectCondition(**SIZES), torch.randn(3, 6), torch.randn(3, 9, 12)
    found = condition(text, patches)
    placed = patches + condition.places
    q, k, v = text @ condition.query.weight.T, placed @ condition.key.weight.T, placed @ condition.value.weight.T
    weights = torch.stack([(k[i] @ q[i] / 8**0.5).softmax(0) for i in range(3)])
    torch.testing.assert_close(found.weights[:, 0], weights)
    torch.testing.assert_close(found.condition[:, 0], torch.stack([weights[i] @ v[i] for i in range(3)]))
    mask = torch.zeros(3, 9)
    mask[:, 2:4] = 1
    clicked = condition(text, patches, mask)
    torch.testing.assert_close(clicked.weights[:, 0], match(mask, weights))
    torch.testing.assert_close(clicked.condition[:, 0], torch.einsum("bk,bkd->bd", match(mask, weights), v))
    summed = condition(text, patches, mask, fit="sum")
    torch.testing.assert_close(summed.condition[:, 0], v[:, 2:4].mean(1))
    torch.testing.assert_close(condition(text, patches, weights.detach() / 2).condition, found.condition)
    torch.testing.assert_close(condition(text[1:2], patches[1:2], mask[1:2]).condition, clicked.condition[1:2])
    assert (found.condition - condition(text, patches.roll(1, 1)).condition).abs().max() > 1e-4  # places count


def test_more_heads_each_take_the_mask_at_their_own_moments():
    condition = ObjectCondition(**SIZES, heads=2)
    text, patches, mask = 5 * torch.randn(2, 6), torch.randn(2, 9, 12), torch.eye(9)[:2]
    plain, clicked = condition(text, patches).weights, condition(text, patches, mask).weights
    assert (plain[:, 0] - plain[:, 1]).abs().max() > 0.01
    torch.testing.assert_close(clicked, match(mask[:, None], plain))


def test_the_intervention_does_the_same():
    condition, text, patches = ObjectCondition(**SIZES), torch.randn(2, 6), torch.randn(2, 9, 12)
    mask = torch.rand(2, 9)
    for fit in ("moments", "sum"):
        with torch.no_grad(), regard.intervene(condition, mask_attention(mask, fit=fit)):
            found = condition(text, patches).condition
        torch.testing.assert_close(found, condition(text, patches, mask, fit=fit).condition)
    with torch.no_grad(), regard.intervene(condition, MaskAttention(mask, layers={3})):
        found = condition(text, patches).condition
    torch.testing.assert_close(found, condition(text, patches).condition)
    twice = MaskAttention(mask.repeat(2, 1))
    with regard.intervene(condition, twice), pytest.raises(ValueError, match="4 masks for 2 rows"):
        condition(text, patches)
    own = nn.MultiheadAttention(12, 2, batch_first=True)
    with torch.no_grad(), regard.intervene(own, MaskAttention(mask)):  # self attention is left alone
        found = own(patches, patches, patches)[0]
    torch.testing.assert_close(found, own(patches, patches, patches)[0])


def test_record_sees_the_attention():
    condition, text, patches = ObjectCondition(**SIZES), torch.randn(2, 6), torch.randn(2, 9, 12)
    with torch.no_grad(), regard.record(condition, "rows") as recording:
        found = condition(text, patches)
    (stack,) = (node for node in recording.tree.subtree if "rows" in node)
    np.testing.assert_allclose(np.asarray(stack["rows"]).reshape(2, 1, 9), found.weights.detach(), rtol=1e-5)


def test_patches_of_a_mask():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :2, :1] = True
    assert patch_mask(mask, (2, 2)).tolist() == [[0.5, 0, 0, 0]]


def test_loss_is_of_the_noise(model):
    latents, text, patches = torch.randn(400, 1, 4, 2), torch.randn(400, 6), torch.randn(400, 9, 12)
    nn.init.zeros_(model.unet.map.weight)
    model.unet.forward = lambda sample, timestep, encoder_hidden_states: SimpleNamespace(sample=0 * sample)
    state = torch.random.get_rng_state()
    one = model.loss(latents, text, patches, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert float(one) == pytest.approx(1.0, abs=0.1)  # the variance of noise
    given = []
    model.unet.forward = lambda sample, timestep, encoder_hidden_states: (
        given.append(encoder_hidden_states) or SimpleNamespace(sample=0 * sample)
    )
    model.drop = 0.25
    model.loss(latents, text, patches, generator=torch.Generator().manual_seed(0))
    dropped = (given[0] == 0).all(2).float().mean()
    assert float(dropped) == pytest.approx(0.25, abs=0.07)


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
def test_what_is_predicted(predicts):
    """A model that knows the clean latents makes them, whichever it predicts, and has no loss."""
    shape, truth = (1, 4, 2), torch.randn(1, 1, 4, 2)
    model = sounding_object(nn.Identity(), ObjectCondition(**SIZES), shape=shape, predicts=predicts)

    def knows(sample, timestep, encoder_hidden_states):
        kept = model.schedule.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        noise = (sample - kept.sqrt() * truth) / (1 - kept).sqrt()
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * truth
        return SimpleNamespace(sample={"epsilon": noise, "sample": truth, "v_prediction": velocity}[predicts])

    model.unet.forward = knows
    text, patches = torch.randn(3, 6), torch.randn(3, 9, 12)
    assert float(model.loss(truth.expand(3, -1, -1, -1), text, patches)) < 1e-6
    made = model.generate(text, patches, steps=50)
    torch.testing.assert_close(made, truth.expand_as(made), rtol=0.02, atol=0.05)


def test_it_trains(model):
    text, patches = torch.randn(8, 6), torch.randn(8, 9, 12)
    draws = torch.Generator().manual_seed(0)
    model.loss(torch.randn(8, 1, 4, 2), text, patches, generator=draws).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_generation(model):
    text, patches, mask = torch.randn(2, 6), torch.randn(2, 9, 12), torch.eye(9)[:2]
    model.train()
    state = torch.random.get_rng_state()
    found = model.generate(text, patches, mask, steps=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert found.shape == (2, 1, 4, 2)
    assert torch.equal(model.generate(text, patches, mask, steps=4), found)  # the same mask and seed, the same sound
    other = model.generate(text, patches, mask.roll(1, 1), steps=4)
    assert (other - found).abs().max() > 1e-4
    assert not torch.equal(model.generate(text, patches, mask, steps=4, seed=1), found)
    torch.testing.assert_close(model.generate(text[1:], patches[1:], mask[1:], steps=4), found[1:])
    apart = model.generate(text, patches, mask, steps=4, seed=[0, 5])
    torch.testing.assert_close(apart[0], found[0])
    assert not torch.equal(apart[1], found[1])
    # without a condition's part, guidance changes nothing; with it, twice the part is as twice the map
    strong = model.generate(text, patches, mask, steps=4, guidance=2.0)
    with torch.no_grad():
        model.unet.map.weight *= 2
    torch.testing.assert_close(model.generate(text, patches, mask, steps=4, guidance=1.0), strong)
    assert model.generate(text[:0], patches[:0], steps=2).shape == (0, 1, 4, 2)


def test_save_and_load(tmp_path):
    condition = ObjectCondition(**SIZES, heads=2)
    condition.save_pretrained(tmp_path)
    given = torch.randn(2, 6), torch.randn(2, 9, 12)
    torch.testing.assert_close(ObjectCondition.from_pretrained(tmp_path)(*given).condition, condition(*given).condition)


def test_diffusers_takes_the_condition():
    unet2d = pytest.importorskip("diffusers.models.unets.unet_2d_condition").UNet2DConditionModel
    unet = unet2d(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
        cross_attention_dim=8, norm_num_groups=4, attention_head_dim=4, mid_block_type=None,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    model = sounding_object(unet, ObjectCondition(**SIZES), shape=(1, 8, 4))
    text, patches, mask = torch.randn(2, 6), torch.randn(2, 9, 12), torch.eye(9)[:2]
    model.loss(torch.randn(2, 1, 8, 4), text, patches).backward()
    assert model.condition.query.weight.grad.abs().sum() > 0
    one, other = (model.generate(text, patches, m, steps=2) for m in (mask, mask.roll(2, 1)))
    assert (one - other).abs().max() > 0


def test_refusals(model):
    text, patches = torch.randn(2, 6), torch.randn(2, 9, 12)
    with pytest.raises(ValueError, match="covers a part of a patch or more in each row"):
        model.condition(text, patches, F.one_hot(torch.tensor([0, 1]), 9) * torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match="0 to 1"):
        match(torch.tensor([2.0, 0.0]), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="each of 2 patches"):
        match(torch.ones(3), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match='"moments" or "sum"'):
        match(torch.ones(2), torch.tensor([0.5, 0.5]), fit="softmax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a mask is \[2, 9\]"):
        model.condition(text, patches, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"text \[batch, 6\] and patches \[batch, 9, 12\]"):
        model.condition(text, patches[:, :4])
    with pytest.raises(ValueError, match="do not divide by 3 heads"):
        ObjectCondition(**SIZES, heads=3)
    with pytest.raises(ValueError, match="2 rows and 3 seeds"):
        model.generate(text, patches, steps=2, seed=[1, 2, 3])
    with pytest.raises(ValueError, match="drop is a share"):
        SoundingObject(nn.Identity(), model.condition, shape=(1, 4, 2), drop=1.0)
    with pytest.raises(ValueError, match="predicts is one of epsilon, sample, v_prediction"):
        SoundingObject(nn.Identity(), model.condition, shape=(1, 4, 2), predicts="noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a mask is \[batch, key\]"):
        MaskAttention(torch.ones(9))


@pytest.mark.parametrize("patches", [7, 49, 197])
def test_a_mask_that_is_the_same_everywhere_keeps_the_mean(patches):
    weights = torch.randn(patches).softmax(0)
    for share in (0.1, 0.2, 0.3, 0.7, 1.0):  # means of which are not exact
        torch.testing.assert_close(match(torch.full((patches,), share), weights), weights.mean().expand(patches))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mask_moves_even_weights_in_half_precision(dtype):
    weights, mask = (0.03 * torch.randn(196)).softmax(0), (torch.arange(196) < 20).float()
    found = match(mask, weights.to(dtype))
    assert found.dtype == dtype
    whole = match(mask, weights.to(dtype).float())
    torch.testing.assert_close(found.float(), whole, atol=2e-5, rtol=0)
    assert float(found.float().std()) > 0.9 * float(weights.to(dtype).float().std()) > 0


def test_making_sound_leaves_every_module_in_its_mode(model):
    model.train()
    model.unet.eval()  # as one that is not trained
    model.generate(torch.randn(2, 6), torch.randn(2, 9, 12), steps=2, seed=np.int64(3))
    assert model.training
    assert not model.unet.training


def test_shapes_of_what_is_learned_and_made(model):
    text, patches = torch.randn(2, 6), torch.randn(2, 9, 12)
    with pytest.raises(ValueError, match=r"latents are \[2, 1, 4, 2\]"):
        model.loss(torch.randn(3, 1, 4, 2), text, patches)
    with pytest.raises(ValueError, match="steps are 1 or more"):
        model.generate(text, patches, steps=0)
