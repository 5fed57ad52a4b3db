"""Lookback ratios are what their formula says; the lens learns from them, is kept, and guides decoding."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from families import build
from oracle import dense

import regard
from regard.call import Call, Site
from regard.statistics.lookback_lens import LookbackLens, Span, guided_decoding, span_features
from regard.statistics.lookback_ratio import lookback_ratio
from regard.tokens import ROLES, Tokens

SITE = Site("attention", "language_model", 0)


def call_of(weights, roles, **fields):
    """A call of one head whose single query has these weights."""
    weights = torch.tensor(weights)
    key = weights.log()[None, None, :, None]
    tokens = Tokens.plain("text", 1, len(weights))
    for at, role in roles.items():
        tokens.roles[0, at] = ROLES.index(role)
    one = torch.ones(1, 1, 1, 1)
    return Call(SITE, one, key, key, 1.0, query_start=len(weights) - 1, tokens=tokens, **fields)


def test_worked_by_hand():
    """Context 0.3 + 0.1 over two keys, new 0.6 over one: 0.2 / (0.2 + 0.6)."""
    call = call_of([0.3, 0.1, 0.6], {2: "generated"})
    assert float(lookback_ratio(call)) == pytest.approx(0.25)
    assert float(lookback_ratio(call, start=1)) == pytest.approx(0.3 / (0.3 + 0.35))


def test_padding_counts_as_neither():
    call = call_of([1e-20, 0.3, 0.1, 0.6], {0: "pad", 3: "generated"})
    assert float(lookback_ratio(call)) == pytest.approx(0.25)


def test_limits():
    assert float(lookback_ratio(call_of([0.3, 0.7], {}))) == 1.0
    assert float(lookback_ratio(call_of([0.5, 0.5], {1: "generated"}))) == pytest.approx(0.5)
    assert float(lookback_ratio(call_of([1.0, 1e-30], {0: "generated"}))) == pytest.approx(0.0)
    cross = call_of([0.5, 0.5], {})
    assert float(lookback_ratio(cross.but(site=Site("a", "cross", 0, cross=True)), start=1)) == 1.0
    masked = call_of([0.5, 0.5], {1: "generated"}, mask=torch.zeros(1, 1, 1, 2, dtype=torch.bool))
    assert lookback_ratio(masked).isnan().all()


@pytest.mark.parametrize("kind", ["causal", "boolean", "additive"])
def test_only_keys_in_sight_count(kind):
    """Against the dense map in float64, for a whole sequence at once: the later a query, the more it sees."""
    generator = torch.Generator().manual_seed(0)
    n, start = 7, 3
    query, key = (torch.randn(2, 4, n, 8, generator=generator) for _ in range(2))
    lower = torch.ones(n, n, dtype=torch.bool).tril()
    seen = lower if kind == "causal" else lower.triu(-3)
    mask = {
        "causal": None,
        "boolean": seen[None, None],
        "additive": torch.zeros(n, n).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None],
    }[kind]
    call = Call(SITE, query, key[:, ::2], key[:, ::2], 0.3, mask=mask, causal=kind == "causal")
    p = dense(call)
    for i in range(n):
        context = p[:, :, i, :start][..., seen[i, :start]]
        new = p[:, :, i, start:][..., seen[i, start:]]
        context = context.mean(-1) if context.shape[-1] else torch.zeros(2, 4)
        new = new.mean(-1) if new.shape[-1] else torch.zeros(2, 4)
        found = lookback_ratio(call, start=start)[:, :, i]
        torch.testing.assert_close(found.double(), (context / (context + new)).double(), atol=1e-6, rtol=1e-5)


def test_generation_is_the_same_as_the_whole_sequence_at_once():
    model, inputs = build("llama", "sdpa")
    ids, n = inputs["input_ids"], inputs["input_ids"].shape[1]
    with torch.no_grad(), regard.record(model, "lookback_ratio") as stepwise:
        whole = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    with torch.no_grad(), regard.record(model, at_once=partial(lookback_ratio, start=n)) as at_once:
        model(whole[:, :-1])
    first, second = stepwise.tree["language_model"]["lookback_ratio"], at_once.tree["language_model"]["at_once"]
    torch.testing.assert_close(torch.from_numpy(first.values), torch.from_numpy(second.values), atol=1e-5, rtol=1e-4)
    assert (first.values[..., :n] == 1).all()
    assert (first.values[..., n:] < 1).all()


def planted(n=200, seed=0):
    """Spans of 2 layers of 3 heads, in which one head of layer 1 tells."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(n, 2, 3, generator=generator).double()
    grounded = torch.rand(n, generator=generator) < 0.5
    features[:, 1, 2] = 0.3 * features[:, 1, 2] + torch.where(grounded, 0.6, 0.1)
    return features, grounded


def test_the_lens_finds_the_head_that_tells_and_survives_saving(tmp_path):
    features, grounded = planted()
    lens = LookbackLens.fit(features, grounded)
    at = int(lens.weight.abs().argmax())
    assert divmod(at, 3) == (1, 2)
    assert float(lens.weight[1, 2]) > 0
    others, truth = planted(seed=1)
    score = lens.score(others)
    assert float(((score > 0.5) == truth).double().mean()) > 0.9
    assert float(score.min()) > 0
    assert float(score.max()) < 1
    lens.save(tmp_path / "lens.safetensors")
    assert torch.equal(LookbackLens.load(tmp_path / "lens.safetensors").score(others), score)


def test_it_scores_as_the_regression_that_it_was_fitted_by():
    from sklearn.linear_model import LogisticRegression

    features, grounded = planted()
    theirs = LogisticRegression(max_iter=1000).fit(features.flatten(1), grounded).predict_proba(features.flatten(1))
    ours = LookbackLens.fit(features, grounded).score(features)
    torch.testing.assert_close(ours, torch.from_numpy(theirs[:, 1]), atol=1e-9, rtol=1e-9)


def test_bad_input_is_named():
    features, grounded = planted()
    with pytest.raises(ValueError, match="all of these are of one"):
        LookbackLens.fit(features, torch.ones(len(features), dtype=torch.bool))
    with pytest.raises(ValueError, match="one label a span"):
        LookbackLens.fit(features, grounded[:-1])
    with pytest.raises(ValueError, match="hold NaN"):
        LookbackLens.fit(features / 0, grounded)
    with pytest.raises(ValueError, match=r"reads layers and heads \[2, 3\]"):
        LookbackLens.fit(features, grounded).score(features[:, :1])
    model, inputs = build("llama")
    lens = LookbackLens(torch.zeros(2, 4).double(), 0.0)
    with pytest.raises(ValueError, match="one prompt at a time"):
        guided_decoding(model, inputs, lens)
    with pytest.raises(ValueError, match="no stack 'decoder'"):
        guided_decoding(model, {"input_ids": inputs["input_ids"][:1]}, lens, stack="decoder")


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_almost_no_temperature_is_greedy_decoding(family):
    """Then all candidates are alike. Mistral's layers keep a sliding window in their cache."""
    model, inputs = build(family, "sdpa")
    ids = inputs["input_ids"][:1]
    lens = LookbackLens(torch.ones(2, 4).double(), 0.0)
    with torch.no_grad():
        greedy = model.generate(input_ids=ids, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :]
    found = guided_decoding(model, {"input_ids": ids}, lens, chunk=3, candidates=2, max_new_tokens=7, temperature=1e-4)
    assert found.ids.tolist() == greedy.tolist()
    assert len(found.scores) == 3


def test_the_scores_are_those_of_the_text_that_was_kept():
    model, inputs = build("llama", "sdpa")
    ids, n = inputs["input_ids"][:1], inputs["input_ids"].shape[1]
    weight = torch.randn(2, 4, generator=torch.Generator().manual_seed(3)).double() * 4
    kept = {}
    for sign in (1, -1):
        lens = LookbackLens(sign * weight, 0.0)
        found = guided_decoding(model, {"input_ids": ids}, lens, chunk=4, candidates=6, max_new_tokens=8, start=n - 2)
        whole = torch.cat([ids, found.ids[None]], dim=1)
        with torch.no_grad(), regard.record(model, ratio=partial(lookback_ratio, start=n - 2)) as recording:
            model(whole)
        features = span_features(recording.tree["language_model"]["ratio"], [Span(0, n, n + 4), Span(0, n + 4, n + 8)])
        torch.testing.assert_close(lens.score(features), torch.tensor(found.scores).double(), atol=1e-5, rtol=1e-4)
        kept[sign] = (features * weight).sum((1, 2)).mean()
    assert kept[1] > kept[-1]


def test_it_stops_at_the_end_token():
    model, inputs = build("llama", "sdpa")
    ids = inputs["input_ids"][:1]
    lens = LookbackLens(torch.ones(2, 4).double(), 0.0)
    whole = guided_decoding(model, {"input_ids": ids}, lens, max_new_tokens=9, temperature=1e-4)
    model.generation_config.eos_token_id = int(whole.ids[5])
    first = whole.ids.tolist().index(int(whole.ids[5]))
    found = guided_decoding(model, {"input_ids": ids}, lens, max_new_tokens=9, temperature=1e-4)
    assert found.ids.tolist() == whole.ids[: first + 1].tolist()


def test_spans_outside_are_refused():
    model, inputs = build("llama", "sdpa")
    with torch.no_grad(), regard.record(model, "lookback_ratio") as recording:
        model(**inputs)
    ratio = recording.tree["language_model"]["lookback_ratio"]
    assert span_features(ratio, [Span(1, 1, 13)]).shape == (1, 2, 4)
    for span in (Span(0, 0, 3), Span(0, 4, 4), Span(0, 5, 14)):
        with pytest.raises(ValueError, match="lies outside"):
            span_features(ratio, [span])
