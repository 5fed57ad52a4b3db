"""Sentence attention: values by hand, what it must not depend on, order of the maps, files."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from regard.models.sentence_attention import SentenceAttention, SentenceGrounding, sentence_attention


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def model() -> SentenceGrounding:
    return sentence_attention(5, [4, 6, 8]).eval()


def some(batch: int = 2) -> tuple[list[torch.Tensor], torch.Tensor]:
    return [torch.randn(batch, c, n, n) for c, n in ((4, 8), (6, 4), (8, 2))], torch.randn(batch, 5)


def test_by_hand():
    block = SentenceAttention(3, 2)
    nn.init.zeros_(block.score[3].weight)
    block.score[3].bias = nn.Parameter(torch.tensor([0.0, math.log(3)]))
    found, weights = block(torch.ones(1, 2, 2, 2), torch.randn(1, 3))
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(found[0, :, 0, 1], torch.tensor([0.25, 0.75]))
    block.score[3].bias = nn.Parameter(torch.zeros(2))
    maps = torch.randn(1, 2, 3, 3)
    torch.testing.assert_close(block(maps, torch.randn(1, 3))[0], maps / 2)


def test_one_channel_passes():
    maps = torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(SentenceAttention(4, 1)(maps, torch.randn(2, 4))[0], maps)


def test_weights_are_of_the_sentence_alone_and_sum_to_one():
    block, sentence = SentenceAttention(4, 6), torch.randn(1, 4)
    maps, other = torch.randn(2, 1, 6, 3, 3)
    found, weights = block(maps, sentence)
    torch.testing.assert_close(block(other, sentence)[1], weights)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1))
    assert not torch.allclose(block(maps, sentence + 1)[1], weights)
    torch.testing.assert_close(block(maps.flip(2, 3), sentence)[0], found.flip(2, 3))


def test_coarse_maps_are_merged_into_finer_ones(model):
    maps, sentence = some()
    with torch.no_grad():
        weighed = [block(x, sentence)[0] for block, x in zip(model.blocks, maps)]
        low = weighed[2]
        for i in (1, 0):
            up = nn.functional.interpolate(model.merges[i](low), scale_factor=2, mode="bilinear")
            low = (up + weighed[i]).relu()
        expected = nn.functional.interpolate(model.classify(low), size=(16, 16), mode="bilinear")
        torch.testing.assert_close(model(maps, sentence, size=(16, 16)).logits, expected)
        assert model(maps, sentence).logits.shape == (2, 2, 8, 8)


def test_rows_of_a_batch_are_apart(model):
    maps, sentence = some()
    with torch.no_grad():
        alone = model([x[1:] for x in maps], sentence[1:])
        torch.testing.assert_close(alone.logits, model(maps, sentence).logits[1:])


def test_gradients():
    block = SentenceAttention(3, 4).double()
    given = [torch.randn(2, 4, 2, 2).double().requires_grad_(), torch.randn(2, 3).double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: block(*x)[0], given)
    model, (maps, sentence) = sentence_attention(5, [4, 6, 8]), some()
    model(maps, sentence).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_saves_and_loads(model, tmp_path):
    maps, sentence = some()
    model.save_pretrained(tmp_path)
    again = SentenceGrounding.from_pretrained(tmp_path).eval()
    assert (tmp_path / "model.safetensors").exists()
    with torch.no_grad():
        torch.testing.assert_close(again(maps, sentence).logits, model(maps, sentence).logits)


def test_refusals(model):
    maps, sentence = some()
    with pytest.raises(ValueError, match=r"of \[4, 6, 8\] channels; got \[\[2, 8, 2, 2\]"):
        model(maps[::-1], sentence)
    with pytest.raises(ValueError, match="from fine to coarse"):
        model([maps[0][:, :, :1, :1], *maps[1:]], sentence)
    with pytest.raises(ValueError, match=r"here \[2, 5\]; got \[2, 7, 5\]"):
        model(maps, torch.randn(2, 7, 5))
    with pytest.raises(ValueError, match="one map or more"):
        sentence_attention(5, [])
