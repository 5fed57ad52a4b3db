"""Mind-Animator: masks by hand, causality, the inflated attention in a real UNet, the permutation test."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import regard
from regard.models.mind_animator import (
    FirstAndFormer,
    MeaningDecoder,
    MindAnimatorConfig,
    MotionGenerator,
    first_and_former,
    mind_animator,
    permutation_test,
    sparse_causal_mask,
)
from tests import families

TINY = MindAnimatorConfig(
    voxels=10, frames=5, channels=2, size=8, width=16, depth=2, heads=2, hidden=32, embedding=8, tokens=3, token_dim=4,
    structure=8,
)  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def generator() -> MotionGenerator:
    model = MotionGenerator(TINY)
    nn.init.normal_(model.pixels.weight)
    return model


def test_masks():
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(sparse_causal_mask(6, 1.0), causal)
    assert torch.equal(sparse_causal_mask(6, 0.0).sum(1), torch.tensor([1, 2, 1, 1, 1, 1]))
    many = torch.stack([sparse_causal_mask(8, 0.6) for _ in range(400)])
    free = causal.new_ones(8, 8).tril()
    free[:2] = free[:, 0] = False  # what may be hidden, a frame itself among it
    assert many[:, free].float().mean() == pytest.approx(0.6, abs=0.02)
    assert not many[:, ~torch.ones(8, 8, dtype=torch.bool).tril()].any()


def test_nothing_later_is_seen_and_it_starts_from_nothing():
    latents, signal = torch.randn(2, 4, 2, 8, 8), torch.randn(2, 10)
    assert not MotionGenerator(TINY)(latents, signal).any()
    model = generator()
    found = model(latents, signal)
    changed = latents.clone()
    changed[:, 2] += 1
    again = model(changed, signal)
    torch.testing.assert_close(again[:, :2], found[:, :2])
    assert (again[:, 2] - found[:, 2]).abs().max() > 1e-3
    assert (model(latents, signal + 1) - found).abs().max() > 1e-3


def test_a_mask_hides_what_it_hides():
    latents, signal, model = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 10), generator()
    mask = sparse_causal_mask(4, 0.0)
    changed = latents.clone()
    changed[:, 1] += 1
    # the embedding of frame 2 is its own, so only what it takes from frame 1 can change
    difference = model(changed, signal, mask=mask)[:, 2:] - model(latents, signal, mask=mask)[:, 2:]
    assert difference.abs().max() < 1e-6
    assert (model(changed, signal)[:, 2:] - model(latents, signal)[:, 2:]).abs().max() > 1e-3


def test_it_goes_on_frame_by_frame():
    first, signal, model = torch.randn(2, 2, 8, 8), torch.randn(2, 10), generator()
    clip = model.continue_(first, signal)
    assert clip.shape == (2, 5, 2, 8, 8)
    torch.testing.assert_close(clip[:, 1:], model(clip[:, :-1], signal))


def test_it_learns_where_the_signal_goes():
    signal = torch.randn(16, 10)
    clips = torch.zeros(16, 5, 2, 8, 8)
    for t in range(1, 5):
        clips[:, t] = t * signal[:, :1, None, None]
    model = MotionGenerator(TINY)
    optimiser, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(150):
        losses.append(model.loss(clips, signal))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


def test_the_first_frame_and_the_one_before_by_hand():
    keys = torch.arange(6.0).view(6, 1, 1, 1)  # two clips of three frames
    expected = [[0, 0], [0, 0], [0, 1], [3, 3], [3, 3], [3, 4]]
    assert first_and_former(keys, 3)[:, 0, :, 0].tolist() == expected
    with pytest.raises(ValueError, match="whole clips of 4 frames; got 6 rows"):
        first_and_former(keys, 4)


@torch.no_grad()
def test_a_picture_model_is_inflated():
    unet = families.unet(False, True)
    sizes = unet.config
    frame = torch.randn(1, sizes.in_channels, sizes.sample_size, sizes.sample_size)
    text = torch.randn(1, 5, sizes.cross_attention_dim)
    alone = unet(frame, 3, text).sample
    clip = frame.expand(3, -1, -1, -1).clone()
    with regard.intervene(unet, FirstAndFormer(3)):
        same = unet(clip, 3, text.expand(3, -1, -1)).sample
        clip[2] += 1
        other = unet(clip, 3, text.expand(3, -1, -1)).sample
        clip[0] += 1
        first = unet(clip, 3, text.expand(3, -1, -1)).sample
    torch.testing.assert_close(same, alone.expand_as(same), atol=1e-5, rtol=1e-4)  # equal frames: twice is once
    torch.testing.assert_close(other[:2], same[:2], atol=1e-5, rtol=1e-4)
    assert (first[1] - other[1]).abs().max() > 1e-4
    torch.testing.assert_close(unet(frame, 3, text).sample, alone)


def test_orders_of_frames():
    true = torch.arange(6.0).square().expand(4, -1)[..., None]

    def error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.diff(dim=1) - b.diff(dim=1)).abs().mean()

    assert permutation_test(true, true, error, orders=50) == 0
    assert permutation_test(true, torch.ones_like(true), error, orders=50) == 1  # still frames tie
    assert 0.2 < permutation_test(true, torch.randn_like(true), error, orders=200) <= 1
    with pytest.raises(ValueError, match="as many clips and frames in both"):
        permutation_test(true, true[:, 1:], error)


def test_meaning_is_contrasted():
    model = MeaningDecoder(TINY).eval()
    found = model(torch.randn(4, 10))
    assert found.condition.shape == (4, 3, 4)
    own = model.contrast(found.embedding, found.embedding)
    assert own < model.contrast(found.embedding, found.embedding.roll(1, 0))


def test_all_of_it_and_what_is_recorded(tmp_path):
    model = mind_animator(**vars(TINY)).eval()
    signal = torch.randn(2, 10)
    condition, clip = model(signal)
    assert (condition.shape, clip.shape) == ((2, 3, 4), (2, 5, 2, 8, 8))
    with regard.record(model.motion, "entropy") as recording:
        model.motion(torch.randn(2, 4, 2, 8, 8), signal)
    (node,) = recording.tree.children.values()
    assert {"layer": 2, "head": 2}.items() <= dict(node["entropy"].sizes).items()
    assert float(node["entropy"].isel(query=0).max()) == 0  # the first frame sees itself alone


def test_refusals():
    model = MotionGenerator(TINY)
    with pytest.raises(
        ValueError, match=r"latents are \[batch, frame, 2, 8, 8\], 1 to 4 frames; got \[1, 5, 2, 8, 8\]"
    ):
        model(torch.randn(1, 5, 2, 8, 8), torch.randn(1, 10))
    with pytest.raises(ValueError, match=r"a signal has 10 voxels, one a clip; got \[2, 10\]"):
        model(torch.randn(1, 4, 2, 8, 8), torch.randn(2, 10))
    with pytest.raises(ValueError, match="ratio is a share"):
        sparse_causal_mask(4, 1.5)
    with pytest.raises(ValueError, match="patches divide the size"):
        MotionGenerator(replace(TINY, patch=3))
    with pytest.raises(ValueError, match=r"a mask is boolean \[4, 4\]; got torch.float32"):
        generator()(torch.randn(1, 4, 2, 8, 8), torch.randn(1, 10), mask=torch.ones(4, 4))


def test_a_mask_may_be_of_each_clip():
    latents, signal, model = torch.randn(2, 4, 2, 8, 8), torch.randn(2, 10), generator()
    masks = torch.stack([sparse_causal_mask(4, 0.0), sparse_causal_mask(4, 1.0)])
    found = model(latents, signal, mask=masks[:, None])
    for row in (0, 1):
        alone = model(latents[row : row + 1], signal[row : row + 1], mask=masks[row])
        torch.testing.assert_close(found[row : row + 1], alone)
