"""dcal: rollout and the loss by hand, a distractor that is the picture itself, and who asks in the last block."""

from __future__ import annotations

import math

import pytest
import torch
from families import FAMILIES
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import regard
from regard.objectives import collect
from regard.objectives.dcal import Distracted, GlobalLocalAttention, dcal, most, response, weighed


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_labels=5,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config).eval()


PICTURES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 4, 2])


def test_rollout_by_hand():
    uniform, still = torch.full((1, 4, 4), 0.25), torch.eye(4)[None]
    assert torch.allclose(response([uniform, uniform]), torch.full((1, 3), 0.1875))
    assert torch.equal(response([still, still]), torch.zeros(1, 3))
    torch.manual_seed(0)
    maps = [torch.rand(2, 4, 4).softmax(-1) for _ in range(3)]
    whole = torch.eye(4)
    for weights in maps:
        whole = (0.5 * weights + 0.5 * torch.eye(4)) @ whole
    assert torch.allclose(response(maps), whole[:, 0, 1:], atol=1e-6)
    assert not torch.allclose(response(maps[::-1]), whole[:, 0, 1:], atol=1e-3)
    assert torch.allclose(response(maps, others=2), whole[:, 0, 2:], atol=1e-6)


def test_the_patches_that_are_relied_on_most():
    assert most(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 0.5).tolist() == [[1, 3]]
    assert most(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 0.1).tolist() == [[1]]  # one at least


def test_a_loss_is_least_where_its_weight_is_its_logarithm():
    losses = torch.tensor([1.0, 2.0, 3.0])
    assert float(weighed(losses, torch.zeros(3))) == pytest.approx(3.0)
    weights = losses.log().requires_grad_()
    found = weighed(losses, weights)
    assert float(found.detach()) == pytest.approx(0.5 * (3 + math.log(6)))
    found.backward()
    assert torch.allclose(weights.grad, torch.zeros(3), atol=1e-6)


@torch.no_grad()
def test_keys_of_a_distractor_are_seen_beside_the_own():
    model = vit()
    with regard.intervene(model, Distracted()), collect(model, lambda call: call) as seen:
        model(PICTURES)
    call = seen[1].value
    n = call.query.shape[2]
    assert call.key.shape[2] == 2 * n
    keys, values = (torch.cat([some[:, :, :n], some[[3, 0, 1, 2], :, :n]], 2) for some in (call.key, call.value))
    output = (call.scale * call.query @ keys.mT).softmax(-1) @ values
    assert torch.allclose(call.output, output, atol=1e-5)
    even = call.but(query=torch.zeros_like(call.query))
    assert torch.allclose(even.output[:, :, 0], values.mean(2), atol=1e-5)


@torch.no_grad()
def test_a_picture_that_distracts_from_itself_changes_nothing():
    model = vit()
    plain = model(PICTURES).logits
    with regard.intervene(model, Distracted(torch.arange(4))):
        assert torch.allclose(model(PICTURES).logits, plain, atol=1e-5)
    with regard.intervene(model, Distracted()):
        assert not torch.allclose(model(PICTURES).logits, plain, atol=1e-3)
    assert torch.equal(model(PICTURES).logits, plain)


@torch.no_grad()
def test_only_those_that_ask_are_changed():
    torch.manual_seed(0)
    block, hidden = GlobalLocalAttention(8, heads=2, inner=12), torch.randn(2, 5, 8)
    new = block(hidden, torch.tensor([[0, 3], [0, 1]]))
    assert torch.equal(new[0, [1, 2, 4]], hidden[0, [1, 2, 4]])
    assert torch.equal(new[1, 2:], hidden[1, 2:])
    assert not torch.isclose(new[0, [0, 3]], hidden[0, [0, 3]]).all(-1).any()
    normed = block.before(hidden)
    query, key, value = (
        part(normed).unflatten(-1, (2, 4)).transpose(1, 2) for part in (block.query, block.key, block.value)
    )
    mixed = ((query @ key.mT / 2).softmax(-1) @ value).transpose(1, 2).flatten(2)
    some = hidden + block.out(mixed)
    assert torch.allclose(new[0, 3], (some + block.feed_forward(block.after(some)))[0, 3], atol=1e-5)


def test_the_three_branches_and_their_loss():
    model = vit()
    branches = dcal(model, top=0.3).train()
    found = branches(PICTURES, LABELS)
    assert torch.allclose(found.self_attention, model(PICTURES).logits, atol=1e-5)
    losses = [F.cross_entropy(some, LABELS) for some in (found.self_attention, found.global_local, found.pair_wise)]
    assert torch.allclose(found.loss, 0.5 * sum(losses))
    assert found.asking.shape == (4, 4)  # 30% of 16 patches
    with torch.no_grad(), regard.intervene(model, Distracted()):
        cls = model.base_model(PICTURES).last_hidden_state[:, 0]
    assert torch.allclose(found.pair_wise, branches.pair_wise(cls), atol=1e-5)
    with torch.no_grad(), collect(model, lambda call: call.weights.dense().mean(1)) as seen:
        model(PICTURES)
    assert torch.equal(found.asking, most(response([s.value for s in seen]), 0.3))
    found.loss.backward()
    left = {name for name, p in branches.named_parameters() if p.grad is None or not p.grad.any()}
    assert left <= {name for name in left if name.endswith(("key.bias", "k_proj.bias"))}  # which softmax does not feel


@torch.no_grad()
def test_after_training_the_pair_wise_branch_is_left_out():
    branches = dcal(vit()).eval()
    found = branches(PICTURES, LABELS)
    assert found.pair_wise is None
    mean = (found.self_attention.softmax(-1) + found.global_local.softmax(-1)) / 2
    assert torch.allclose(found.logits.exp(), mean, atol=1e-6)
    assert torch.allclose(found.loss, F.nll_loss(mean.log(), LABELS), atol=1e-5)
    assert torch.allclose(branches(PICTURES[:1]).logits, found.logits[:1], atol=1e-5)
    assert branches(PICTURES).loss is None


@torch.no_grad()
def test_who_asks_counts_for_the_class_from_two_blocks_on():
    for blocks in (1, 2):
        few, many = (dcal(vit(), top=top, blocks=blocks).eval() for top in (0.1, 1.0))
        many.load_state_dict(few.state_dict())
        a, b = few(PICTURES).global_local, many(PICTURES).global_local
        assert torch.allclose(a, b, atol=1e-6) == (blocks == 1)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="SwinForImageClassification has none"):
        from transformers import SwinConfig, SwinForImageClassification

        dcal(SwinForImageClassification(SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[2])))
    with pytest.raises(ValueError, match=r"top is a share.*got 0, 1"):
        dcal(vit(), top=0)
    with pytest.raises(ValueError, match="a batch of 1 and no order"):
        dcal(vit()).train()(PICTURES[:1], LABELS[:1])
    with pytest.raises(ValueError, match=r"order of \[2\]"), regard.intervene(model := vit(), Distracted(LABELS[:2])):
        model(PICTURES)
    llama, inputs = FAMILIES["llama"]()
    with pytest.raises(ValueError, match="full attention"), regard.intervene(llama, Distracted()):
        llama(**inputs)
