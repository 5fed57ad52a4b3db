"""Conditional embedding: weights and losses by hand, spaces that do not see each other, save and load, refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regard
from regard.models.conditional_embedding import (
    ConditionalAttention,
    ConditionalEmbedding,
    ConditionalHead,
    average_precision,
    conditional_embedding,
    conditional_triplet,
)

VISION = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = ["label", "mask"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_attention_by_hand():
    # query (ln 3, 0) times root 2 against keys (1, 0) and (0, 1): weights 3/4 and 1/4
    block = ConditionalAttention(2, 1, 1, hidden=1)
    block.norm = block.mlp_norm = nn.Identity()
    for part in (block.cross, block.mlp, block.rows):
        for parameter in part.parameters():
            nn.init.zeros_(parameter)
    with torch.no_grad():
        block.rows.weight.copy_(torch.tensor([[math.sqrt(2) * math.log(3)], [0.0]]))
        block.cross.in_proj_weight.copy_(torch.cat([torch.eye(2), torch.eye(2), torch.tensor([[1.0, 0], [0, 0]])]))
        block.cross.out_proj.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        found = block(torch.eye(2)[None], torch.zeros(1, 1, dtype=torch.long))[0, 0]
    torch.testing.assert_close(found, torch.tensor([math.sqrt(2) * math.log(3), 0.75]))


@pytest.mark.parametrize("kind", KINDS)
def test_dense_oracle(kind):
    head, tokens, asked = ConditionalHead(24, 3, 4, width=5, condition=kind), torch.randn(3, 7, 24), [2, 0, 3]
    block, expected = head.block, []
    wq, wk, wv = block.cross.in_proj_weight.chunk(3)
    for x, c in zip(tokens, asked, strict=True):
        row = x[0] * block.masks[c].clamp_min(0) if kind == "mask" else block.rows.weight[:, c] + block.rows.bias
        q, keys, mixed = block.norm(row) @ wq.T, block.norm(x), []
        for h in range(3):
            part = slice(8 * h, 8 * h + 8)
            weights = ((keys @ wk.T)[:, part] @ q[part] / math.sqrt(8)).softmax(0)
            mixed.append(weights @ (keys @ wv.T)[:, part])
        y = row + block.cross.out_proj(torch.cat(mixed))
        y = head.embed(head.norm(y + block.mlp(block.mlp_norm(y))))
        expected.append(y / y.norm())
    torch.testing.assert_close(head(tokens, torch.tensor(asked)), torch.stack(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_spaces_are_apart_and_all_at_once_equal_one_by_one(kind):
    head, tokens = ConditionalHead(16, 2, 3, width=4, condition=kind), torch.randn(5, 6, 16)
    every = head(tokens)
    torch.testing.assert_close(every.norm(dim=-1), torch.ones(5, 3))
    for c in range(3):
        torch.testing.assert_close(head(tokens, c), every[:, c])
        torch.testing.assert_close(head(tokens[:1], torch.tensor([c])), every[:1, c])
    assert (every[:, 0] - every[:, 1]).abs().amax(1).min() > 0.05
    order = torch.tensor([0, 3, 5, 1, 2, 4])  # patches have no order
    torch.testing.assert_close(head(tokens[:, order]), every)
    with torch.no_grad():  # of one row, one space
        own = head.block.masks if kind == "mask" else head.block.rows.weight.mT
        own[1] = own[0]
    found = head(tokens)
    assert torch.equal(found[:, 0], found[:, 1])
    assert not torch.equal(found[:, 0], found[:, 2])
    assert head(tokens[:0]).shape == (0, 3, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_triplet_moves_no_row_but_its_own(kind):
    head = ConditionalHead(16, 2, 3, width=4, condition=kind)
    asked = torch.full((4,), 1)
    loss = conditional_triplet(head(torch.randn(4, 6, 16), asked), torch.tensor([0, 0, 1, 1]), asked, margin=2.0)
    loss.backward()
    gradient = head.block.masks.grad if kind == "mask" else head.block.rows.weight.grad.mT
    assert (gradient[[0, 2]] == 0).all()
    assert gradient[1].abs().sum() > 0


def test_triplets_by_hand():
    angle = torch.tensor([0.0, math.acos(0.8), math.acos(0.9), 0.0])
    embeddings = torch.stack([angle.cos(), angle.sin()], 1).double()
    labels, asked = torch.tensor([7, 7, 8, 8]), torch.tensor([0, 0, 0, 1])
    to_other = float(embeddings[1] @ embeddings[2])
    expected = (0.9 - 0.8 + 0.2 + to_other - 0.8 + 0.2) / 2  # the fourth is asked for something else
    assert float(conditional_triplet(embeddings, labels, asked)) == pytest.approx(expected, abs=1e-6)
    assert float(conditional_triplet(embeddings, labels, asked, margin=0.0)) < expected - 0.1
    away = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert float(conditional_triplet(away, torch.tensor([0, 0, 1]), torch.zeros(3))) == 0
    none = embeddings.requires_grad_()
    conditional_triplet(none, torch.arange(4), asked).backward()
    assert (none.grad == 0).all()
    assert torch.autograd.gradcheck(lambda x: conditional_triplet(x, labels, asked), none)


def test_average_precision_by_hand():
    at = torch.tensor([0.0, 0.1, 0.3, 0.7], dtype=torch.float64)
    found = average_precision(torch.stack([at.cos(), at.sin()], 1), torch.tensor([0, 1, 0, 0]))
    # of the first: the others in order 1, 2, 3; of the last: 2, 1, 0
    torch.testing.assert_close(found[[0, 3]], torch.tensor([(1 / 2 + 2 / 3) / 2, (1 + 2 / 3) / 2]).double())
    assert found[1].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_and_batches(tmp_path, kind):
    model = conditional_embedding(conditions=3, vision=VISION, width=8, condition=kind).eval()
    assert model.backbone.config.num_hidden_layers == 1
    model.save_pretrained(tmp_path)
    again, pictures = ConditionalEmbedding.from_pretrained(tmp_path).eval(), torch.randn(3, 3, 16, 16)
    asked = torch.tensor([2, 0, 1])
    found = model(pictures, asked)
    torch.testing.assert_close(again(pictures, asked), found)
    torch.testing.assert_close(model(pictures[1:2], asked[1:2]), found[1:2])
    half = model.bfloat16()(pictures.bfloat16(), asked)
    assert half.dtype == torch.bfloat16
    assert (half.float() - found).abs().max() < 0.1


def test_a_backbone_of_the_callers(tmp_path):
    backbone = conditional_embedding(conditions=1, vision=VISION).backbone
    model = conditional_embedding(conditions=2, backbone=backbone, width=4).eval()
    model.save_pretrained(tmp_path)
    again = ConditionalEmbedding.from_pretrained(tmp_path, backbone=backbone).eval()
    pictures = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(pictures), model(pictures))


def test_record_sees_one_query_over_all_tokens():
    head, tokens = ConditionalHead(16, 2, 3, width=4).eval(), torch.randn(2, 6, 16)
    with torch.no_grad(), regard.record(head, "rows") as recording:
        head(tokens, torch.tensor([0, 2]))
    (stack,) = (node for node in recording.tree.subtree if "rows" in node)
    rows = np.asarray(stack["rows"]).reshape(2, 2, 6)
    block = head.block
    q = block.norm(block.queries(tokens, torch.tensor([[0], [2]]))) @ block.cross.in_proj_weight[:16].T
    k = block.norm(tokens) @ block.cross.in_proj_weight[16:32].T
    q, k = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (q, k))
    expected = (q @ k.mT / math.sqrt(8)).softmax(-1)[:, :, 0]
    np.testing.assert_allclose(rows, expected.detach(), rtol=1e-4, atol=1e-6)


def test_refusals():
    head, tokens = ConditionalHead(16, 2, 3), torch.randn(2, 6, 16)
    for wrong in (torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="conditions are 0 to 2"):
            head(tokens, wrong)
    with pytest.raises(ValueError, match="of 2 rows; got"):
        head(tokens, torch.tensor([0]))
    with pytest.raises(ValueError, match="whole numbers"):
        head(tokens, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"tokens \[batch, key, 16\]"):
        head(torch.randn(2, 6, 8), 0)
    with pytest.raises(ValueError, match='"label" or "mask"'):
        ConditionalAttention(16, 2, 3, condition="word")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="divides by heads"):
        ConditionalAttention(16, 3, 3)
    with pytest.raises(ValueError, match="not both"):
        conditional_embedding(conditions=2)
    with pytest.raises(ValueError, match="Conv2d has none"):
        conditional_embedding(conditions=2, backbone=nn.Conv2d(3, 4, 1))
    flat = nn.Flatten()
    flat.config = SimpleNamespace(hidden_size=16, num_attention_heads=2)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Flatten gives no tokens"):
        conditional_embedding(conditions=2, backbone=flat)(torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match="conditional_triplet: embeddings"):
        conditional_triplet(F.normalize(torch.randn(3, 2)), torch.zeros(3), torch.zeros(2))


def test_precision_in_half_precision_and_of_what_is_none():
    at = torch.rand(300)
    embeddings, labels = torch.stack([at.cos(), at.sin()], 1).bfloat16(), torch.arange(300) % 2
    # one label: all are right at every rank, where ranks beyond 256 are no numbers of bfloat16
    assert torch.equal(average_precision(embeddings, torch.zeros(300)), torch.ones(300))
    with pytest.raises(ValueError, match="to be finite"):
        average_precision(embeddings * math.nan, labels)
    with pytest.raises(ValueError, match=r"got \[300, 2\] and \[299\]"):
        average_precision(embeddings, labels[:-1])


def test_the_block_is_one_of_the_layers():
    with pytest.raises(ValueError, match="num_hidden_layers is 1 or more"):
        conditional_embedding(conditions=2, vision={**VISION, "num_hidden_layers": 0})
