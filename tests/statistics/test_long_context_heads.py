"""Distant mass is exact, and foreseen exactly where keys are alike, nearly where they are Gaussian."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from families import build
from oracle import dense

import regard
from regard.call import Call, Site
from regard.statistics.long_context_heads import (
    KeepLocal,
    Moments,
    distant_mass,
    foreseen_mass,
    judge,
    key_moments,
    long_context_heads,
    moments_of,
    restrict,
)
from regard.tokens import ROLES, Tokens

SITE = Site("attention", "language_model", 0, causal=True)


def call_of(query, key, **fields):
    return Call(SITE, query, key, key, 1.0, **{"causal": query.shape[2] > 1, **fields})


def gaussian(n=2000, dim=8, seed=0):
    """One query each of 6 heads over Gaussian keys with a mean; the longer a query, the more it reads from afar."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(1, 2, n, dim, generator=generator) + 0.5
    query = torch.randn(1, 6, 1, dim, generator=generator) * 0.4
    return call_of(query, key, query_start=n - 1)


def test_worked_by_hand():
    """Keys alike: 10 keys, of which sink 1 and the last 3 are local, so 6 of 10 are distant; foreseen exactly."""
    key = torch.full((1, 1, 10, 2), 0.7)
    query = torch.tensor([[[[0.3, -1.0]]]])
    call = call_of(query, key, query_start=9)
    assert float(distant_mass(call, n_sink=1, window=3)) == pytest.approx(0.6)
    assert float(foreseen_mass(call, n_sink=1, window=3)) == pytest.approx(0.6)


def test_two_kinds_of_keys_by_hand():
    """Local scores 0, two distant scores 1 and -1: mean 0, variance 1, so exp(1/2) each instead of cosh(1)."""
    key = torch.tensor([0.0, 1.0, -1.0, 0.0])[None, None, :, None]
    call = call_of(torch.ones(1, 1, 1, 1), key, query_start=3)
    moments = {("language_model", 0): Moments(torch.zeros(1, 1, 1), torch.ones(1, 1, 1, 1))}
    knobs = {"n_sink": 1, "window": 1}
    assert float(distant_mass(call, **knobs)) == pytest.approx(2 * math.cosh(1) / (2 + 2 * math.cosh(1)))
    foreseen = float(foreseen_mass(call, moments=moments, **knobs))
    assert foreseen == pytest.approx(2 * math.exp(0.5) / (2 + 2 * math.exp(0.5)))


@pytest.mark.parametrize("start", [0, 60])
def test_moments_are_those_of_the_keys_that_are_distant_to_each_query(start):
    """By a loop over queries, more of them than are taken at once; two rows, one with padding; grouped heads."""
    generator = torch.Generator().manual_seed(0)
    n, n_sink, window, pads = 150, 3, 20, 5
    key = torch.randn(2, 2, n, 4, generator=generator) + 2.0
    query = torch.randn(2, 4, n - start, 4, generator=generator) / 2
    tokens = Tokens.plain("text", 2, n)
    tokens.roles[1, :pads] = ROLES.index("pad")
    mask = torch.ones(2, 1, 1, n, dtype=torch.bool)
    mask[1, ..., :pads] = False
    past = torch.arange(start, n)[:, None] >= torch.arange(n)
    call = call_of(query, key, mask=mask & past, query_start=start, tokens=tokens, causal=False)
    found = foreseen_mass(call, n_sink=n_sink, window=window)
    expected = torch.zeros_like(found)
    for row, head, i in itertools.product(range(2), range(4), range(0, n - start, 7)):
        q, keys = query[row, head, i], key[row, head // 2]
        real = [j for j in range(start + i + 1) if not (row == 1 and j < pads)]
        distant = [j for j in real if j >= n_sink and start + i - j >= window]
        local = [j for j in real if j not in distant]
        held = (keys[local] @ q).exp().sum()
        if distant:
            scores = keys[distant] @ q
            afar = len(distant) * (scores.mean() + scores.var(correction=0) / 2).exp()
            expected[row, head, i] = afar / (afar + held)
    rows = range(0, n - start, 7)
    found = found.nan_to_num()  # where padding asks, and sees nothing
    assert torch.allclose(found[:, :, rows], expected[:, :, rows], atol=1e-4)
    assert float(found.max()) > 0.5


def test_gaussian_keys_are_foreseen():
    call = gaussian()
    truth, found = distant_mass(call, window=50), foreseen_mass(call, window=50)
    assert float((truth - found).abs().max()) < 0.02
    afar = foreseen_mass(call, window=50, moments={("language_model", 0): moments_of(gaussian(seed=1))})
    assert float((truth - afar).abs().max()) < 0.02
    assert float(truth.max()) > 0.5


def test_the_oracle_is_the_dense_map():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, h, 30, 4, generator=generator) for h in (4, 2))
    call = call_of(query, key, sinks=torch.randn(4, generator=generator))
    p = dense(call)
    i, j = torch.arange(30)[:, None], torch.arange(30)
    distant = (j >= 2) & (i - j >= 5)
    found = distant_mass(call, n_sink=2, window=5)
    torch.testing.assert_close(found.double(), (p * distant).sum(-1), atol=1e-6, rtol=1e-5)


def test_a_learned_sink_counts_as_local():
    key = torch.zeros(1, 1, 4, 1)
    call = call_of(torch.ones(1, 1, 1, 1), key, query_start=3, sinks=torch.tensor([math.log(4.0)]))
    for mass in (distant_mass, foreseen_mass):
        assert float(mass(call, n_sink=1, window=1)) == pytest.approx(2 / 8)


def test_nothing_distant_needs_nothing():
    call = gaussian(n=40)
    for mass in (distant_mass, foreseen_mass):
        assert (mass(call, n_sink=4, window=36) == 0).all()
    assert distant_mass(call.but(site=Site("a", "decoder_cross", 0, cross=True))) is None
    assert foreseen_mass(call.but(site=Site("a", "encoder", 0))) is None


def test_padding_is_neither_counted_nor_averaged():
    """Padded on the left or not at all: the same, for rows of the same batch."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 20, 4, generator=generator)
    query = torch.randn(1, 1, 1, 4, generator=generator)
    alone = foreseen_mass(call_of(query, key, query_start=19), n_sink=0, window=3)
    noise = torch.full((1, 1, 5, 4), 9.0)
    tokens = Tokens.plain("text", 1, 25)
    tokens.roles[:, :5] = ROLES.index("pad")
    mask = (torch.arange(25) >= 5)[None, None, None]
    padded = call_of(query, torch.cat([noise, key], dim=2), query_start=24, tokens=tokens, mask=mask)
    torch.testing.assert_close(foreseen_mass(padded, n_sink=0, window=3), alone)


def test_what_is_not_gaussian_is_refused():
    call = gaussian(n=40)
    bias = torch.linspace(-1, 0, 40)[None, None, None]
    for other in (call.but(softcap=5.0), call.but(bias=bias), call.but(mask=bias)):
        with pytest.raises(ValueError, match="cannot be foreseen"):
            foreseen_mass(other)
        assert distant_mass(other) is not None
    with pytest.raises(ValueError, match="moments hold nothing for language_model layer 0"):
        foreseen_mass(call, moments={})


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_models_are_read_stepwise_as_at_once(family):
    model, inputs = build(family, "sdpa")
    moments = key_moments(model, inputs, n_sink=1)
    found = long_context_heads(model, inputs, n_sink=1, window=2, moments=moments)
    assert found["distant"].dims == ("batch", "layer", "head", "query")
    judged = judge(found, dim=8)
    assert 0 <= judged.called <= 1
    with (
        torch.no_grad(),
        regard.record(model, seen=partial(foreseen_mass, n_sink=1, window=2, moments=moments)) as steps,
    ):
        whole = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    at_once = long_context_heads(model, {"input_ids": whole[:, :-1]}, n_sink=1, window=2, moments=moments)
    stepwise = steps.tree["language_model"]["seen"].values
    np.testing.assert_allclose(stepwise, at_once["foreseen"].values, atol=1e-5)


def test_judged_by_hand():
    """Of 4 queries the last 2 have distant keys: 1 and 2 of them. One is needy and called, one called only."""
    dims = ("batch", "layer", "head", "query")
    distant = xr.DataArray(np.array([0.0, 0.0, 0.9, 0.1]).reshape(1, 1, 1, 4), dims=dims, coords={"query": range(4)})
    foreseen = xr.DataArray(np.array([0.0, 0.0, 0.7, 0.5]).reshape(1, 1, 1, 4), dims=dims, coords={"query": range(4)})
    found = xr.Dataset({"distant": distant, "foreseen": foreseen}, attrs={"n_sink": 1, "window": 1})
    judged = judge(found, dim=0)
    assert judged == (0.5, 1.0, 1.0, 0.5, 0.0)
    strict = judge(found, dim=0, threshold=0.4)  # long-context above 0.6
    assert strict[:4] == (0.5, 0.5, 1.0, 1.0)
    assert strict.saved == pytest.approx(2 / 10)  # the last query spares 2 of the 1 + 2 + 3 + 4 visits
    assert judge(found, dim=1, threshold=0.4).saved == pytest.approx(0.0)
    with pytest.raises(ValueError, match="no query has distant keys"):
        judge(found.assign_attrs(window=9))


def test_heads_that_are_kept_local_see_no_further():
    model, inputs = build("llama", "sdpa")
    knobs = {"n_sink": 1, "window": 3}
    with torch.no_grad():
        free = model(**inputs).logits
        with (
            regard.intervene(model, KeepLocal(**knobs, threshold=0.0)),
            regard.record(model, distant=partial(distant_mass, **knobs)) as recording,
        ):
            model(**inputs)
        with regard.intervene(model, KeepLocal(**knobs, threshold=1.0)):
            same = model(**inputs).logits
    assert (recording.tree["language_model"]["distant"] == 0).all()
    torch.testing.assert_close(same, free, atol=1e-5, rtol=1e-5)


def test_restricting_spares_the_heads_that_are_needed():
    call = gaussian(n=40)
    whole = torch.tensor([True, False] * 3)[None, :, None]
    mass = distant_mass(restrict(call, whole, n_sink=2, window=8), n_sink=2, window=8)
    assert (mass[:, ::2] > 0).all()
    assert (mass[:, 1::2] == 0).all()
