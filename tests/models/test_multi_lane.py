"""Pathways beside a frozen transformer: a value by hand, what later tasks cannot touch, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

import regard
from regard.models.multi_lane import (
    MultiLane,
    SummarisedAttention,
    SummaryAttention,
    frozen_operations,
    multi_lane,
    operations,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def backbone() -> ViTModel:
    return ViTModel(
        ViTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            initializer_range=0.3,
        )
    ).eval()


def begun(*tasks: int, **sizes) -> MultiLane:
    model = multi_lane(backbone(), **{"tasks": (2, 3), "selectors": 4, "prompts": 2, "prompted": 2, **sizes}).eval()
    for task in tasks:
        model.begin(task)
    return model


def test_a_summary_by_hand():
    # scores 0 and log 3, so weights 1/4 and 3/4
    found = SummaryAttention()(torch.ones(1, 1, 1), torch.tensor([[[0.0], [math.log(3)]]]))
    torch.testing.assert_close(found, torch.tensor([[[0.75 * math.log(3)]]]))
    tokens = torch.randn(2, 7, 4)
    torch.testing.assert_close(SummaryAttention()(torch.zeros(2, 1, 4), tokens), tokens.mean(1, keepdim=True))


@pytest.mark.parametrize("replace", [True, False])
def test_a_layer_is_the_paper_s(replace):
    layer, block = backbone().layers[0].double(), SummarisedAttention(replace=replace)
    tokens, lanes = torch.randn(1, 5, 16).double(), torch.randn(1, 1, 4, 16).double()
    prompts = torch.randn(2, 1, 3, 2, 8).double()
    x, z = layer.layernorm_before(tokens[0]), layer.layernorm_before(lanes[0, 0])
    summary = (z[1:] @ x.T / 4).softmax(-1) @ x
    y = torch.cat([z[:1], summary])
    a, heads = layer.attention, []
    for h in range(2):
        part = slice(8 * h, 8 * h + 8)
        keys, values = (torch.cat([prompts[i, 0, :, h], m(y)[:, part]]) for i, m in enumerate((a.k_proj, a.v_proj)))
        heads.append((a.q_proj(y)[:, part] @ keys.T / 8**0.5).softmax(-1) @ values)
    output = a.o_proj(torch.cat(heads, 1))
    z = lanes[0, 0] + (torch.cat([output[:1], z[1:]]) if replace else output)
    torch.testing.assert_close(block(layer, tokens, lanes, prompts)[0, 0], z + layer.mlp(layer.layernorm_after(z)))


def test_what_later_tasks_learn_touches_no_pathway_before():
    model, pixels = begun(0), torch.rand(3, 3, 16, 16)
    before = model(pixels).logits
    model.begin(1)
    assert torch.equal(model.selectors[1], model.selectors[0])
    assert torch.equal(model.prompts[:, :, 1], model.prompts[:, :, 0])
    optimiser = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 0.03)
    model.train()
    for _ in range(3):
        optimiser.zero_grad()
        found = model(pixels, torch.ones(3, 3))
        found.loss.backward()
        optimiser.step()
    assert found.logits.shape == (3, 3)
    assert not torch.equal(model.selectors[1], model.selectors[0])
    after = model.eval()(pixels).logits
    assert after.shape == (3, 5)
    # a product of two tasks at once may round in another way than of one
    torch.testing.assert_close(after[:, :2], before, rtol=1e-5, atol=1e-6)
    assert not model.head.weight.grad[:2].any()


def test_the_loss_is_of_all_classes_with_others_at_zero():
    model = begun(0).train()
    pixels, labels = torch.rand(4, 3, 16, 16), torch.randint(2, (4, 2)).float()
    found = model(pixels, labels)
    logits, targets = torch.zeros(4, 5), torch.zeros(4, 5)
    logits[:, :2], targets[:, :2] = found.logits, labels
    torch.testing.assert_close(found.loss, nn.functional.binary_cross_entropy_with_logits(logits, targets))
    single = begun(0, single=True).train()
    found = single(pixels, torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(found.loss, nn.functional.cross_entropy(found.logits, torch.tensor([0, 1, 1, 0])))


def test_the_stream_is_the_backbone_s_and_is_not_trained():
    vit, pixels = backbone(), torch.rand(2, 3, 16, 16)
    model = multi_lane(vit, tasks=(2,), selectors=4).train()
    model.begin(0)
    expected = vit(pixels, output_hidden_states=True).hidden_states
    for state, wanted in zip(model.stream(pixels), expected, strict=False):
        torch.testing.assert_close(state, wanted)
    model(pixels, torch.ones(2, 2)).loss.backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {
        "selectors",
        "prompts",
        "head",
    }
    torch.testing.assert_close(model(stream=model.stream(pixels)).logits, model(pixels).logits)


def test_patches_have_no_order_beyond_their_positions():
    model, stream = begun(0, 1), torch.randn(3, 2, 17, 16)
    order = torch.cat([torch.zeros(1).long(), 1 + torch.randperm(16)])
    torch.testing.assert_close(model(stream=stream[:, :, order]).logits, model(stream=stream).logits)


def test_pictures_do_not_touch():
    model, pixels = begun(0, 1), torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(model(pixels[1:2]).logits, model(pixels).logits[1:2])


def test_cost_of_a_pathway_grows_with_its_tokens_only():
    assert operations(128, 65, 8) < 0.25 * frozen_operations(128, 65)
    more = operations(64, 201, 8) - operations(64, 101, 8)
    assert more == 100 * 4 * 8 * 64


def test_record_sees_summaries():
    model = begun(0, 1)
    with torch.no_grad(), regard.record(model, "rows") as recording:
        model(torch.rand(2, 3, 16, 16))
    stacks = [node["rows"] for node in recording.tree.subtree if "rows" in node]
    found = [r for r in stacks if r.sizes["query"] == 4 and r.sizes["key"] == 17]
    assert len(found) == 1
    assert (found[0].sizes["batch"], found[0].sizes["layer"]) == (4, 3)
    np.testing.assert_allclose(found[0].sum("key"), 1, rtol=1e-5)


def test_saved_and_loaded(tmp_path):
    model, pixels = begun(0, 1), torch.rand(1, 3, 16, 16)
    model.save_pretrained(tmp_path)
    again = MultiLane.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(pixels).logits, model(pixels).logits)
    assert again.config.tasks == (2, 3)


def test_refusals():
    model = begun()
    with pytest.raises(ValueError, match="no task was begun"):
        model(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="tasks begin in order, 2 of them from 0; the newest is -1, asked for 1"):
        model.begin(1)
    model.begin(0)
    with pytest.raises(ValueError, match="one of both"):
        model()
    with pytest.raises(ValueError, match=r"labels of the newest task are \[1, 2\]; got \[1, 5\]"):
        model(torch.rand(1, 3, 16, 16), torch.ones(1, 5))
    with pytest.raises(TypeError, match="takes a ViTModel"):
        multi_lane(nn.Linear(2, 2), tasks=(2,))
    with pytest.raises(ValueError, match="each task has a class or more"):
        multi_lane(backbone(), tasks=())
