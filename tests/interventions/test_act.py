"""Sinks beyond the first token are found head by head, and give what they lose to the rest."""

from __future__ import annotations

import families
import pytest
import torch

import regard
from regard import Call, Site, Tokens
from regard.interventions.act import act, helpful_heads, likelihood, sinks

SITE = Site("layers.1.self_attn", "language_model", 1, causal=True, heads=1)
#  the first token and the second are sinks: over those that see it, the second gets (0.4 + 0.4 + 0.3) / 3
WEIGHTS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0], [0.5, 0.4, 0.1, 0.0], [0.6, 0.3, 0.02, 0.08]])


def call(weights=WEIGHTS):
    """A call with exactly these weights: keys stand apart, and queries are the logarithms."""
    n = len(weights)
    key = torch.eye(n)[None, None]
    return Call(SITE, weights.clamp(min=1e-30).log()[None, None], key, key, 1.0, causal=True)


def test_sinks_are_by_the_mean_over_those_that_see_them():
    assert sinks(call(), threshold=0.1)[0, 0].tolist() == [False, True, False, False]
    assert sinks(call(), threshold=0.07)[0, 0].tolist() == [False, True, False, True]  # 0.06 and 0.08
    assert sinks(call(), threshold=0.37)[0, 0].tolist() == [False] * 4  # 1.1 / 3


def test_padding_does_not_count_among_the_queries():
    """Two tokens of padding, which see themselves and each other, before three: the second of these is a sink."""
    weights = torch.zeros(1, 1, 5, 5)
    weights[0, 0, :2, 0] = 1.0
    weights[0, 0, 2:, 2:] = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.2, 0.0], [0.9, 0.08, 0.02]])
    key = torch.eye(5)[None, None]
    tokens = Tokens.plain("text", 1, 5).marked("pad", torch.arange(5)[None] < 2)
    padded = Call(SITE, weights.clamp(min=1e-30).log(), key, key, 1.0, causal=True, tokens=tokens, query_tokens=tokens)
    found = sinks(padded, threshold=0.1)[0, 0].tolist()
    assert found == [False, False, False, True, False]  # (0.2 + 0.08) / 2; nothing of the padding is one


def test_a_sink_keeps_beta_and_the_rest_takes_it_in_proportion():
    method = act(heads=[(1, 0)])
    given = method.inputs(call()).weights.dense()[0, 0]
    gain = 1 + 0.6 * 0.3 / 0.7
    assert torch.allclose(given[3], torch.tensor([0.6 * gain, 0.12, 0.02 * gain, 0.08 * gain]))
    assert torch.allclose(given[0], WEIGHTS[0])
    assert torch.allclose(given.sum(-1), torch.ones(4))


def test_a_row_with_nothing_but_a_sink_is_left():
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    method = act(heads=[(1, 0)])
    assert torch.allclose(method.inputs(call(weights)).weights.dense()[0, 0], weights)


def test_other_heads_and_layers_are_left():
    of = call()
    assert act(heads=[(2, 0)]).inputs(of) is of
    assert act(heads=[(1, 0)], beta=1.0).inputs(of) is of
    assert act(heads=[(1, 0)], threshold=0.4).inputs(of) is of
    with pytest.raises(ValueError, match="has 1 heads, and no head 7"):
        act(heads=[(1, 7)]).inputs(call())


@torch.no_grad()
def test_only_chosen_heads_change_and_while_decoding_too():
    model, inputs = families.build("llama")
    method = act(heads=[(1, 2)], threshold=0.05, beta=0.0)
    ids = inputs["input_ids"]
    with regard.record(model, "rows") as plain:
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        model(ids[:, -1:], past_key_values=cache)
    with regard.intervene(model, method), regard.record(model, "rows") as calibrated:
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        model(ids[:, -1:], past_key_values=cache)
    before, after = (torch.tensor(r.tree["language_model"]["rows"].values)[:, 1] for r in (plain, calibrated))
    changed = ~torch.isclose(before, after, atol=1e-5, equal_nan=True)
    assert changed[:, 2, :-1].any()
    assert changed[:, 2, -1].any()
    assert not changed[:, [0, 1, 3]].any()
    last = before[:, 2, -1]
    sink = (last > 0.05) & (torch.arange(len(last[0])) > 0)
    assert float(after[:, 2, -1][sink].max()) == 0  # of one row, a sink is what has more than the threshold there


def test_heads_are_helpful_where_the_score_rises():
    model, inputs = families.build("llama")
    knobs = {"threshold": 0.05, "beta": 0.0}

    def score():
        return likelihood(model, inputs)

    plain = score()
    pairs = [(layer, head) for layer in range(2) for head in range(4)]
    helpful = helpful_heads(model, score, among=pairs, **knobs)
    assert 0 < len(helpful) < len(pairs)
    for pair in pairs:
        with regard.intervene(model, act(heads=[pair], **knobs)):
            assert (score() > plain) == (pair in helpful)
    assert helpful_heads(model, score) == []  # of two layers, none lies between the first two and the last


@torch.no_grad()
def test_likelihood_leaves_padding_and_pictures_out():
    model, inputs = families.build("llama")
    ids = inputs["input_ids"]
    logs = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    assert likelihood(model, inputs) == pytest.approx(float(logs.mean()), abs=1e-5)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand(2, -1)
    given = {"input_ids": padded, "attention_mask": mask}
    assert likelihood(model, given) == pytest.approx(likelihood(model, inputs), abs=1e-3)


def test_heads_that_the_model_has_not_are_refused():
    model, _ = families.build("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layer 9"):
        act(heads=[(9, 0)]).begin(model)
