"""attention_vat: the divergence by hand, the direction from linear algebra, and a dense oracle."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from torch import nn
from torch.nn import functional as F
from trained import IDS, MASK, Sentence, bert, equal, gradients

import regard
from regard.objectives import collect
from regard.objectives.attention_vat import attention_vat, divergence, perturbation


def seeded():
    return torch.Generator().manual_seed(3)


@pytest.fixture
def sentence():
    torch.manual_seed(0)
    model, x = Sentence().double(), torch.randn(3, 5, 4, dtype=torch.float64)
    return model, x, lambda: model(x)


def test_the_divergence_by_hand():
    p, q = (torch.tensor([row]).log() for row in ([0.7, 0.2, 0.1], [0.6, 0.3, 0.1]))
    assert divergence(p, q).item() == pytest.approx(0.7 * 0.1541507 - 0.2 * 0.4054651, abs=1e-6)
    assert divergence(q, p).item() != pytest.approx(divergence(p, q).item(), abs=1e-4)
    one, other = torch.tensor([[0.3], [2.0]]), torch.tensor([[-1.0], [2.5]])
    pairs = [torch.cat([z, torch.zeros(2, 1)], 1) for z in (one, other)]
    torch.testing.assert_close(divergence(one, other), divergence(*pairs))  # one logit: of a class against none
    torch.testing.assert_close(divergence(one[:, 0], other[:, 0]), divergence(*pairs))
    with pytest.raises(ValueError, match=r"not \[2, 3, 4\]"):
        divergence(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))


def test_with_two_classes_it_goes_where_their_logits_part_fastest(sentence):
    model, x, logits = sentence
    scores = model.scores(x).detach().requires_grad_()
    both = model.from_scores(scores, x)
    (slope,) = torch.autograd.grad((both[:, 0] - both[:, 1]).sum(), scores)
    for seed in range(3):
        chance = torch.Generator().manual_seed(seed)
        found = perturbation(model, logits, epsilon=0.7, xi=1e-4, generator=chance)
        (step,) = found.scores.values()
        ways = F.cosine_similarity(step[:, 0, 0], slope[:, 0], dim=-1)
        torch.testing.assert_close(ways.abs(), torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0)
        torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.full((3,), 0.7, dtype=torch.float64))


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("interpretable", [False, True])
def test_value_and_gradient_are_those_of_a_dense_oracle(sentence, interpretable, iterations):
    model, x, logits = sentence
    ours = attention_vat(
        model, logits, epsilon=0.9, xi=0.3, iterations=iterations, interpretable=interpretable, generator=seeded()
    )
    scores = model.scores(x).detach()
    plain = model.from_scores(scores, x).detach()
    drawn = torch.randn(3, 1, 1, 5, generator=seeded(), dtype=torch.float64)[:, 0]
    apart = scores[..., None, :] - scores[..., None]  # [batch, 1, key, key]
    apart = apart / apart.flatten(2).norm(dim=2)[..., None, None]
    if interpretable:
        drawn = drawn * apart.norm(dim=-1)
    step = 0.3 * drawn / drawn.flatten(1).norm(dim=1).view(-1, 1, 1)
    for i in range(iterations):
        step.requires_grad_()
        found = model.from_scores(scores + step, x).log_softmax(-1)
        kl = (plain.softmax(-1) * (plain.log_softmax(-1) - found)).sum()
        (g,) = torch.autograd.grad(kl, step)
        length = 0.9 if i == iterations - 1 else 0.3
        if interpretable:
            weight = g[..., None] * apart
            step = ((length * weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)) * apart).sum(-1)
        else:
            step = length * g / g.flatten(1).norm(dim=1).view(-1, 1, 1)
    moved = model.from_scores(model.scores(x) + step, x).log_softmax(-1)
    oracle = (plain.softmax(-1) * (plain.log_softmax(-1) - moved)).sum(-1).mean()
    torch.testing.assert_close(ours, oracle)
    equal(gradients(model, ours), gradients(model, oracle))


def test_no_change_no_divergence_also_with_dropout():
    torch.manual_seed(0)
    model = bert()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    model.train()
    loss = attention_vat(model, lambda: model(IDS, attention_mask=MASK).logits, epsilon=0.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert max(g.abs().max() for g in gradients(model, loss).values()) < 1e-10
    assert attention_vat(model, lambda: model(IDS, attention_mask=MASK).logits, epsilon=3.0).item() > 1e-9


def test_it_changes_predictions_more_than_directions_at_random():
    model = bert()

    def logits():
        return model(IDS, attention_mask=MASK).logits

    found = perturbation(model, logits, epsilon=0.5, xi=1e-2, iterations=3, generator=seeded())
    assert not any(s[1, :, :, 5:].any() for s in found.scores.values())  # what is masked is not moved
    with torch.no_grad():
        plain = logits()
        with regard.intervene(model, found), collect(model, lambda call: call.weights.dense()) as seen:
            most = divergence(plain, logits())
        assert not seen[0].value[1, :, :, 5:].any()
        for seed in range(5):
            torch.manual_seed(seed)
            drawn = {key: torch.where(s != 0, torch.randn_like(s), 0.0) for key, s in found.scores.items()}
            length = sum(s.square().flatten(1).sum(1) for s in drawn.values()).sqrt().view(-1, 1, 1, 1)
            with regard.intervene(model, type(found)({k: 0.5 * s / length for k, s in drawn.items()}, slice(None))):
                assert bool((divergence(plain, logits()) < most).all())


def test_where_there_is_nothing_to_move_nothing_changes(sentence):
    model, x, _ = sentence
    alone = attention_vat(model, lambda: model(x[:, :1]), epsilon=1.0)  # rows of one key
    assert alone.item() == pytest.approx(0, abs=1e-12)
    same = x[:, :1].expand(-1, 5, -1) + 0.0
    even = perturbation(model, lambda: model(same), epsilon=1.0, interpretable=True)
    assert not any(s.any() for s in even.scores.values())


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "t5"])
def test_of_any_model_its_predictions_change(family):
    model, inputs = FAMILIES[family]()
    model.eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss = attention_vat(model, lambda: model(**inputs).logits[:, -1], epsilon=1.0, generator=seeded())
    assert loss.item() > 1e-6
    loss.backward()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_it_refuses(sentence):
    model, x, logits = sentence
    for knobs in ({"epsilon": -1.0}, {"epsilon": 1.0, "xi": 0.0}, {"epsilon": 1.0, "iterations": 0}):
        with pytest.raises(ValueError, match="epsilon and xi are lengths"):
            attention_vat(model, logits, **knobs)
    with pytest.raises(ValueError, match="`logits` ran no attention"):
        attention_vat(model, logits, epsilon=1.0, where=lambda site: False)
    with pytest.raises(ValueError, match="more than once"):
        attention_vat(model, lambda: model(x) + model(x), epsilon=1.0)
