"""Reductions against the dense float64 oracle: any shape, mask and dtype; hand-worked values; memory."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import dense, reductions

from regard import library
from regard.call import Call, Site
from regard.kernels import Factor, native, strips
from regard.tokens import Tokens

SITE = Site("attention", "language_model", 0)
INF = float("inf")


@pytest.fixture(autouse=True, params=["torch", *library.INSTRUCTIONS])
def path(request, monkeypatch):
    """Every test holds on every path that this machine has."""
    if request.param == "torch":
        monkeypatch.setenv("REGARD_KERNEL", "torch")
        return
    if native.why_not() or library.INSTRUCTIONS.index(request.param) > library.instructions():
        pytest.skip(f"no {request.param} kernel here")
    monkeypatch.setenv("REGARD_INSTRUCTIONS", request.param)


@st.composite
def calls(draw) -> Call:
    torch.manual_seed(draw(st.integers(0, 10_000)))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n_query, n_key, dim = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.sampled_from([1, 3, 8]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    sharp = draw(st.sampled_from([0.1, 1.0, 30.0]))
    heads = kv_heads * group
    query = torch.randn(batch, n_query, heads, dim).to(dtype).transpose(1, 2) * sharp  # strided, as models give it
    key, value = (torch.randn(batch, kv_heads, n_key, dim).to(dtype) for _ in range(2))
    masks = {
        "none": None,
        "boolean": torch.rand(batch, 1, n_query, n_key) < 0.6,
        "additive": torch.randn(1, heads, n_query, n_key),
        "padding": (torch.rand(batch, 1, 1, n_key) < 0.6),
    }
    return Call(
        SITE,
        query,
        key,
        value,
        scale=dim**-0.5,
        mask=masks[draw(st.sampled_from(sorted(masks)))],
        causal=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 2.0])),
        sinks=torch.randn(heads) if draw(st.booleans()) else None,
        query_start=draw(st.integers(0, 5)),
        key_start=draw(st.integers(0, 5)),
    )


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls(), st.integers(1, 40))
def test_any_call_equals_the_oracle(call, strip):
    keys = torch.rand(call.query.shape[0], call.key.shape[2]) < 0.5
    truth = dense(call)
    wanted = reductions(truth, query_start=call.query_start, key_start=call.key_start, keys=keys)
    held, strips.STRIP = strips.STRIP, strip
    try:
        weights = call.weights
        got = {
            "entropy": weights.entropy(),
            "received": weights.received(),
            "distance": weights.distance(),
            "near": weights.distance(clip=2),
            "maximum": weights.maximum(),
            "squares": weights.squares(),
            "mass": weights.mass(keys),
            "top_weights": weights.top(3)[0][..., : truth.shape[-1]],
        }
        in_strips = torch.cat([rows for _, rows in weights.strips()], dim=2)
        output = weights.output()
    finally:
        strips.STRIP = held
    # scores of hundreds have a float32 grain of their own
    grain = 1e-5 if call.query.dtype == torch.float64 else 1e-5 + 3e-6 * float(call.query.abs().max()) * 3
    for name, tensor in got.items():
        torch.testing.assert_close(
            tensor.double(), wanted[name], atol=grain, rtol=grain, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(weights.dense().double(), truth, atol=grain, rtol=grain)
    torch.testing.assert_close(in_strips.double(), truth, atol=grain, rtol=grain)
    values = call.value.double().repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    tolerance = max(grain, {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(call.query.dtype, 0.0)) * 4
    torch.testing.assert_close(output.double(), truth @ values, atol=tolerance, rtol=tolerance)


def simple(n: int = 4, **options) -> Call:
    """All scores equal, so each row spreads evenly over what it sees."""
    zero = torch.zeros(1, 1, n, 2)
    return Call(SITE, zero, zero, zero, 1.0, causal=True, **options)


def test_values_worked_by_hand():
    weights = simple().weights
    assert weights.entropy()[0, 0].tolist() == pytest.approx([0, math.log(2), math.log(3), math.log(4)])
    # key 0 gets 1 + 1/2 + 1/3 + 1/4
    assert weights.received()[0, 0].tolist() == pytest.approx([25 / 12, 13 / 12, 7 / 12, 1 / 4])
    assert weights.distance()[0, 0].tolist() == pytest.approx([0, 0.5, 1, 1.5])
    assert weights.distance(clip=1)[0, 0].tolist() == pytest.approx([0, 0.5, 2 / 3, 3 / 4])
    assert weights.maximum()[0, 0].tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    first = torch.tensor([[True, False, False, False]])
    assert weights.mass(first)[0, 0].tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert weights.received(by=first)[0, 0].tolist() == pytest.approx([1, 0, 0, 0])
    assert weights.at(torch.tensor([[-1, 0, 1, 3]]))[0, 0].tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])


def test_a_sink_takes_weight_and_gives_none():
    weights = simple(sinks=torch.zeros(1)).weights  # a logit of 0 beside scores of 0: one more key
    assert weights.dense().sum(-1)[0, 0].tolist() == pytest.approx([1 / 2, 2 / 3, 3 / 4, 4 / 5])


def test_roles_select_keys_and_queries():
    tokens = Tokens.plain("text", 1, 4).marked("bos", torch.tensor([[True, False, False, False]]))
    call = simple(tokens=tokens, query_tokens=tokens)
    assert call.weights.mass("bos")[0, 0].tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert call.weights.received(by="bos")[0, 0].tolist() == pytest.approx([1, 0, 0, 0])
    assert call.weights.mass("image").abs().max() == 0
    with pytest.raises(ValueError, match="no role 'picture'; roles are text, bos"):
        call.weights.mass("picture")
    with pytest.raises(ValueError, match="not known"):
        simple().weights.mass("bos")
    with pytest.raises(ValueError, match=r"boolean tensor \[batch, key=4\]; got torch.bool \[1, 3\]"):
        simple().weights.mass(torch.ones(1, 3, dtype=torch.bool))


def test_top_names_positions_and_none():
    values, keys = simple(key_start=10, query_start=10).weights.top(6)
    assert keys[0, 0, 0].tolist() == [10, -1, -1, -1, -1, -1]
    assert sorted(keys[0, 0, 3].tolist()) == [-1, -1, 10, 11, 12, 13]
    assert values[0, 0, 1].tolist() == pytest.approx([0.5, 0.5, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="k counts keys"):
        simple().weights.top(0)


def test_sharp_scores_keep_their_digits():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 64, 16) * 100, torch.randn(1, 2, 64, 16) * 100
    scores = query.double() @ key.double().mT  # about 1e5
    bias = (scores - scores.float().double()).float()  # so that float32 and float64 start from the same scores
    call = Call(SITE, query, key, key, 1.0, bias=bias)
    exact = Call(SITE, query.double(), key.double(), key.double(), 1.0, bias=bias.double())
    assert float(scores.abs().max()) > 1e4
    torch.testing.assert_close(
        call.weights.entropy().sum(-1), exact.weights.entropy().float().sum(-1), atol=0.5, rtol=0.2
    )
    equal = Call(SITE, query * 0, key, key, 1.0)
    torch.testing.assert_close(equal.weights.entropy(), torch.full((1, 2, 64), math.log(64)), atol=1e-5, rtol=0)


def test_nan_stays_where_dense_has_it():
    call = simple()
    query = call.query.clone()
    query[0, 0, 2] = float("nan")
    weights = call.but(query=query).weights
    assert weights.entropy()[0, 0].isnan().tolist() == [False, False, True, False]


def test_visible_keys_are_counted():
    hidden = torch.tensor([[[[False] * 4, [True] * 4, [True, False, True, True], [True] * 4]]])
    zero = torch.zeros(1, 2, 4, 2)
    for mask in (hidden, torch.where(hidden, 0.0, -INF), torch.where(hidden, 0.0, torch.finfo(torch.float32).min)):
        weights = Call(SITE, zero, zero, zero, 1.0, mask=mask).weights
        assert weights.visible().tolist() == [[[0, 4, 3, 4]] * 2]
        assert weights.visible(torch.tensor([[False, True, True, False]])).tolist() == [[[0, 2, 1, 2]] * 2]
        both = Call(SITE, zero, zero, zero, 1.0, bias=mask.float() if mask.dtype == torch.bool else mask, causal=True)
        assert both.weights.visible()[0, 0].tolist() == ([1, 2, 3, 4] if mask.dtype == torch.bool else [0, 2, 2, 4])
    assert simple().weights.visible()[0, 0].tolist() == [1, 2, 3, 4]
    few = Call(SITE, torch.zeros(1, 1, 3, 2), zero[:, :1, :2], zero[:, :1, :2], 1.0, causal=True)  # more queries
    assert few.weights.visible()[0, 0].tolist() == [1, 2, 2]


def test_rows_with_every_key_masked():
    hidden = torch.tensor([[[[False] * 4, [True] * 4, [True] * 4, [True] * 4]]])
    boolean = simple(mask=hidden).weights
    assert boolean.dense()[0, 0, 0].tolist() == [0, 0, 0, 0]
    assert boolean.entropy()[0, 0, 0] == 0
    lowest = torch.where(hidden, 0.0, torch.finfo(torch.float32).min)
    zero = torch.zeros(1, 1, 4, 2)
    additive = Call(SITE, zero, zero, zero, 1.0, mask=lowest).weights
    assert additive.dense()[0, 0, 0].tolist() == [0.25] * 4  # what eager attention does with a finite mask


def test_gradients_of_reductions():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 5, 4, dtype=torch.double), torch.randn(1, 1, 5, 4, dtype=torch.double)

    def reduce(query, key):
        weights = Call(SITE, query, key, key, 0.5, causal=True, softcap=3.0).weights
        return weights.entropy(), weights.received(), weights.distance(), weights.output()

    held, strips.STRIP = strips.STRIP, 20  # several strips
    try:
        assert torch.autograd.gradcheck(reduce, (query.requires_grad_(), key.requires_grad_()))
    finally:
        strips.STRIP = held


def test_dense_refuses_above_its_budget_and_says_what_fits():
    with pytest.raises(ValueError, match=r"take 0 MB, over the budget of 0 MB; rows\(a, b\) of at most 2 queries fit"):
        simple().weights.dense(budget=32)
    assert simple().weights.rows(1, 3).shape == (1, 1, 2, 4)


def test_memory_does_not_grow_with_the_map():
    """16,384 tokens, 8 heads: the map would be 8.6 GB."""
    program = """
import resource, torch
from regard.call import Call, Site
from regard.kernels import Reduction
n, heads = 16384, 8
q, k, v = (torch.randn(1, heads, n, 32) for _ in range(3))
call = Call(Site("a", "s", 0), q, k, v, 0.2, causal=True)
call.but(query=q[:, :, :64], key=k[:, :, :64], value=v[:, :, :64]).weights.top(8)  # load what torch loads late
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
row_by_row = {Reduction(name) for name in ("entropy", "received", "distance", "maximum")}
call.weights.expected = row_by_row | {Reduction("top_keys", 8), Reduction("top_weights", 8)}
assert abs(float(call.weights.received().sum()) / (n * heads) - 1) < 1e-3
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    extra = float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    print(f"{extra:.0f} MB beyond the inputs")
    assert extra < 300


def factored(kv_heads, heads_own, dtype=torch.float32, **more):
    """A call with two factors, and what its weights are to be."""
    rng = torch.Generator().manual_seed(kv_heads)
    draw = partial(torch.randn, generator=rng)
    query, key, value = (draw(2, n, 7, 8).to(dtype) for n in (4, kv_heads, kv_heads))
    call = Call(SITE, query, key, value, 0.4, causal=True, **more)
    factors = Factor(draw(2, 4, 7), draw(2, 4 if heads_own else 1, 7)), Factor(draw(1, 1, 7), draw(2, 1, 7))
    before = call.but(edits=()).weights.dense().double()
    bias = sum(factor.bias(0, 7, 7) for factor in factors)
    after = before * bias.double().exp()
    return call.scaled(*factors), after / (after.sum(-1, keepdim=True) + 1 - before.sum(-1, keepdim=True))


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("heads_own", [True, False])
@pytest.mark.parametrize(
    "more",
    [{}, {"softcap": 2.0}, {"sinks": torch.tensor([0.0, 1.0, -1.0, 2.0])}, {"edits": (lambda weights, rows: weights,)}],
    ids=["plain", "softcap", "sinks", "edited"],
)
def test_factors_scale_weights_that_sum_to_one_again(kv_heads, heads_own, more):
    call, expected = factored(kv_heads, heads_own, **more)
    assert torch.allclose(call.weights.dense().double(), expected, atol=1e-5)
    output = expected @ call.value.double().repeat_interleave(4 // kv_heads, 1)
    assert torch.allclose(call.output.double(), output, atol=1e-5)
    assert torch.allclose(call.weights.received().double(), expected.sum(2), atol=1e-5)
    values = torch.randn(2, 4, 7, 3)
    assert torch.allclose(call.weights.applied(values).double(), expected @ values.double(), atol=1e-5)
    assert torch.allclose(call.weights.applied(values[:, 1:2]).double(), expected @ values[:, 1:2].double(), atol=1e-5)
    cut = call.of_queries(3)
    assert torch.allclose(cut.weights.dense()[..., :3].double(), expected[:, :, :3, :3], atol=1e-5)


def test_factors_keep_the_fused_path_and_its_dtype():
    call, expected = factored(2, True, torch.bfloat16)
    assert not call.operands.absorbed.factors
    assert call.output.dtype == torch.bfloat16
    output = expected @ call.value.double().repeat_interleave(2, 1)
    assert torch.allclose(call.output.double(), output, atol=2e-2)


def test_factors_have_gradients():
    call, _ = factored(2, True)
    learned = [tensor.double().requires_grad_() for tensor in (call.query, call.key, *call.factors[0])]
    wide = call.but(value=call.value.double())

    def run(query, key, rows, keys):
        return wide.but(query=query, key=key, factors=(Factor(rows, keys), *call.factors[1:])).output

    assert torch.autograd.gradcheck(run, learned, fast_mode=True)
