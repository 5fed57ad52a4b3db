"""IA-RED^2: scores by hand, what stays, both forms alike, and what the policy gradient learns from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from regard.models.ia_red2 import IaRed2, Interpreter, chosen, cost, ia_red2, policy_gradient, scores_of


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def vit() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=12,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=12,
        patch_size=4,
        id2label=dict(enumerate("abc")),
    )
    found = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for weight in found.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return found


@pytest.fixture
def model() -> IaRed2:
    made = ia_red2(vit(), [1, 2, 1], heads=2)
    for interpreter in made.interpreters:
        nn.init.normal_(interpreter.query_key.weight, std=0.5)  # type: ignore[arg-type]
    return made.eval()


PIXELS = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def test_by_hand():
    one = Interpreter(2, heads=1)
    one.norm = nn.Identity()  # type: ignore[assignment]
    one.query_key.weight = nn.Parameter(torch.cat([torch.eye(2), torch.eye(2)]))
    one.query_key.bias = nn.Parameter(torch.zeros(4))
    scaled = math.sqrt(2) * math.log(3)
    tokens = torch.tensor([[[1.0, 0.0], [scaled, 0.0], [0.0, 1.0], [-scaled, 0.0]]])
    scores = one(tokens)
    torch.testing.assert_close(scores[0, 1:], torch.tensor([0.75, 0.5, 0.25]))
    assert chosen(scores, torch.ones(1, 4, dtype=torch.bool)).tolist() == [[True, True, False, False]]
    gone = torch.tensor([[True, False, True, True]])
    assert one(tokens, gone)[0, 1] == 0


def test_cost_by_hand():
    kept = torch.arange(8) < torch.tensor([8, 4, 2])[:, None]
    torch.testing.assert_close(cost(kept[None], [4, 4, 4]), torch.tensor([1 - 0.5 / 3 - 0.75 / 3]))


def test_a_share_keeps_the_highest():
    scores, alive = torch.tensor([[0.0, 0.3, 0.1, 0.2, 0.4]]), torch.tensor([[True, True, True, True, False]])
    assert chosen(scores, alive, 0.5).tolist() == [[True, True, False, True, False]]
    assert chosen(scores, alive, 1.0).tolist() == [[True, True, True, True, False]]


def test_nothing_dropped_is_the_model(model):
    with torch.no_grad():
        found = model(PIXELS, only=())
        torch.testing.assert_close(found.logits, model.vit(PIXELS).logits)
        torch.testing.assert_close(model(PIXELS, share=1.0).logits, found.logits)
    assert found.kept.all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masked_as_gathered(model, implementation):
    model.vit.set_attn_implementation(implementation)
    with torch.no_grad():
        gathered, masked = model(PIXELS), model(PIXELS, form="masked")
        alone = model(PIXELS[1:2])
    assert gathered.kept.equal(masked.kept)
    assert 0 < gathered.kept.float().mean() < 1
    torch.testing.assert_close(gathered.logits, masked.logits)
    torch.testing.assert_close(gathered.scores, masked.scores)
    torch.testing.assert_close(alone.logits, gathered.logits[1:2])


def test_what_is_gone_stays_away(model):
    with torch.no_grad():
        found = model(PIXELS)
    assert (found.kept[:, 1:] <= found.kept[:, :-1]).all()
    assert (found.scores[:, 1:][~found.kept[:, :-1]] == 0).all()
    assert (found.kept == (found.scores > 0.5)).all()


def test_scores_of_one_half_drop_all_but_the_class_token(model):
    for interpreter in model.interpreters:
        nn.init.zeros_(interpreter.query_key.weight)
        nn.init.zeros_(interpreter.query_key.bias)
    with torch.no_grad():
        found = model(PIXELS)
        alone = model.vit.vit.embeddings(PIXELS)[:, :1]
        for block in model.vit.vit.layers:
            alone = block(alone)
        torch.testing.assert_close(found.logits, model.read(alone))
    assert not found.kept.any()


@pytest.mark.parametrize("first", [0, 1])
def test_the_gradient_is_of_one_interpreter_and_of_patches_alive(model, first):
    labels = torch.tensor([0, 1, 2])
    with torch.no_grad():
        tokens = model.vit.vit.embeddings(PIXELS)
        if first:
            tokens = next(model.stages(tokens, lambda _, scores, alive: alive)).tokens
    loss = policy_gradient(
        model, tokens, labels, group=1, first=first, right=lambda logits, _: logits[:, 0] > logits[:, 1]
    )
    loss.backward()
    grads = [i.query_key.weight.grad for i in model.interpreters]
    assert grads[0] is None
    assert grads[2] is None
    assert grads[1].abs().sum() > 0
    assert all(p.grad is None for p in model.vit.parameters())


def test_policy_gradient_by_hand(model, monkeypatch):
    # what is drawn keeps everything, so its reward is 0, or -tau where wrong
    monkeypatch.setattr(torch, "bernoulli", torch.ones_like)
    with torch.no_grad():
        tokens = model.vit.vit.embeddings(PIXELS)
        scores = model.interpreters[0](tokens)
        kept = (scores[:, 1:] > 0.5).float().mean(1)
    told = torch.tensor([True, True, True])
    loss = policy_gradient(model, tokens, torch.zeros(3), group=0, right=lambda *_: told)
    expected = -((0 - (1 - kept**2)) * scores[:, 1:].log().sum(1)).mean()
    torch.testing.assert_close(loss, expected)
    loss = policy_gradient(model, tokens, torch.zeros(3), group=0, right=lambda *_: ~told)
    torch.testing.assert_close(loss, torch.zeros(()))  # as wrong as the baseline


def test_attribution_has_axes(model):
    with torch.no_grad():
        found = scores_of(model(PIXELS))
    assert found.dims == ("batch", "group", "row", "column")
    assert found.shape == (3, 3, 3, 3)


def test_saves_and_loads(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = IaRed2.from_pretrained(tmp_path, vit=vit()).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(PIXELS).logits, model(PIXELS).logits)


def test_refusals():
    with pytest.raises(ValueError, match=r"groups of \[1, 2\] blocks do not sum to the 4"):
        ia_red2(vit(), [1, 2], heads=2)
    with pytest.raises(TypeError, match="got ViTModel"):
        ia_red2(ViTModel(vit().config), [2, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="12 channels do not divide by 5 heads"):
        ia_red2(vit(), [2, 2], heads=5)
