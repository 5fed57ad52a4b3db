"""The native kernel beyond what every path must do: ragged shapes, threads, hard values, gradients, blocks."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from derivatives import assert_same, derivatives
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import dense, reductions

from regard import library
from regard.call import Call, Site
from regard.kernels import Chosen, Reduction, native
from regard.kernels.native import Blocks, grid

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no native kernel: {native.why_not()}")
SITE = Site("attention", "language_model", 0)
INSTRUCTIONS = () if native.why_not() else library.INSTRUCTIONS[: library.instructions() + 1]


@pytest.fixture(autouse=True, params=INSTRUCTIONS)
def instructions(request, monkeypatch):
    monkeypatch.setenv("REGARD_INSTRUCTIONS", request.param)


def layout(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values in memory as models hand them over."""
    if kind == "heads_last":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "every_second":
        wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] * 2, dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    return tensor


@st.composite
def calls(draw) -> Call:
    torch.manual_seed(draw(st.integers(0, 10_000)))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 5]))
    n_query = draw(st.sampled_from([1, 2, 3, 7, 12, 13, 31, 48, 49, 97, 140]))
    n_key = draw(st.sampled_from([1, 5, 16, 31, 32, 33, 64, 100, 257, 300]))
    dim, value_dim = draw(st.sampled_from([(1, 1), (5, 9), (16, 16), (64, 64), (72, 40)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    heads = kv_heads * group
    kind = draw(st.sampled_from(["plain", "heads_last", "every_second"]))
    query = layout(torch.randn(batch, heads, n_query, dim).to(dtype), kind)
    key = layout(torch.randn(batch, kv_heads, n_key, dim).to(dtype), kind)
    value = layout(torch.randn(batch, kv_heads, n_key, value_dim).to(dtype), kind)
    near = (torch.arange(n_query)[:, None] - torch.arange(n_key)).abs() < 20
    masks = {
        "none": None,
        "boolean": torch.rand(batch, 1, n_query, n_key) < 0.6,
        "padding": torch.rand(batch, 1, 1, n_key) < 0.7,
        "window": near[None, None],
        "additive": torch.randn(1, heads, n_query, n_key),
        "lowest": torch.zeros(batch, 1, n_query, n_key).masked_fill(
            torch.rand(batch, 1, n_query, n_key) < 0.6, torch.finfo(torch.float32).min
        ),
    }
    biases = {"none": None, "full": torch.randn(1, heads, n_query, n_key), "alibi": torch.randn(1, heads, 1, n_key)}
    return Call(
        SITE,
        query,
        key,
        value,
        scale=dim**-0.5,
        mask=masks[draw(st.sampled_from(sorted(masks)))],
        bias=biases[draw(st.sampled_from(sorted(biases)))],
        causal=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, None, 2.0])),
        sinks=torch.randn(heads) if draw(st.booleans()) else None,
        query_start=draw(st.integers(0, 300)),
        key_start=draw(st.integers(0, 300)),
    )


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls())
def test_any_call_equals_the_oracle(call):
    batch, _, n_query, n_key = *call.query.shape[:3], call.key.shape[2]
    truth = dense(call)
    keys, queries = torch.rand(batch, n_key) < 0.5, torch.rand(1, n_query) < 0.5
    places = torch.randint(-1, n_key, (batch, n_query))
    wanted = reductions(truth, query_start=call.query_start, key_start=call.key_start, keys=keys)
    wanted["squares"] = truth.square().sum(-1)
    wanted["by"] = (truth * queries[:, None, :, None]).sum(-2)
    at = places[:, None, :, None].expand(*truth.shape[:3], 1)
    wanted["at"] = torch.where(at >= 0, truth.gather(-1, at.clamp(min=0)), 0.0)[..., 0]
    asked = {
        "entropy": Reduction("entropy"),
        "received": Reduction("received"),
        "by": Reduction("received", Chosen(queries)),
        "distance": Reduction("distance"),
        "near": Reduction("distance", 2),
        "maximum": Reduction("maximum"),
        "squares": Reduction("squares"),
        "mass": Reduction("mass", Chosen(keys)),
        "at": Reduction("at", Chosen(places)),
        "top_weights": Reduction("top_weights", 3),
        "top_keys": Reduction("top_keys", 3),
    }
    assert native.refusal(call.operands, asked.values()) is None
    found, output = native.forward(call.operands, asked.values(), output=True)
    for name, reduction in asked.items():
        if name == "top_keys":
            continue
        got = found[reduction].double()[..., : n_key if name == "top_weights" else None]
        torch.testing.assert_close(got, wanted[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    named = found[asked["top_keys"]] - call.key_start
    weights = truth.gather(-1, named.clamp(min=0)) * (found[asked["top_weights"]] > 0)
    torch.testing.assert_close(weights, found[asked["top_weights"]].double(), atol=1e-5, rtol=1e-5)
    values = call.value.double().repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(call.query.dtype, 1e-5)
    torch.testing.assert_close(output.double(), truth @ values, atol=tolerance, rtol=tolerance)


ROWWISE = [Reduction("entropy"), Reduction("maximum"), Reduction("distance"), Reduction("squares"), Reduction("lse")]


def made(n_query: int, n_key: int, heads: int = 2, kv_heads: int = 2, dim: int = 32, **options) -> Call:
    torch.manual_seed(0)
    query = torch.randn(1, heads, n_query, dim)
    key, value = torch.randn(1, kv_heads, n_key, dim), torch.randn(1, kv_heads, n_key, dim)
    return Call(SITE, query, key, value, dim**-0.5, **options)


@pytest.mark.parametrize(
    "call",
    [made(700, 700, causal=True), made(1, 5000, 8, 1), made(1, 5000, 2, 2), made(300, 1000, 4, 2)],
    ids=["causal", "decoding, shared keys", "decoding", "cross"],
)
def test_threads_do_not_change_the_result(call):
    """Few heads: queries are shared out among threads, and for one query the keys."""
    asked = [*ROWWISE, Reduction("received"), Reduction("top_keys", 4), Reduction("top_weights", 4)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native.forward(call.operands, asked, output=True))
    finally:
        torch.set_num_threads(before)
    truth = dense(call)
    for found, output in results:
        torch.testing.assert_close(found[Reduction("received")].double(), truth.sum(-2), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output, results[0][1], atol=1e-6, rtol=1e-5)
        for reduction in asked:
            torch.testing.assert_close(found[reduction], results[0][0][reduction], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_the_default_dtype_of_the_process_is_none_of_its_own(default):
    """As while another thread loads a model in this dtype: what is written is as large as before."""
    torch.manual_seed(0)
    call = Call(SITE, *(torch.randn(2, 3, 150, 16) for _ in range(3)), 0.25, causal=True)
    asked = [Reduction(name) for name in ("entropy", "received", "maximum", "lse", "squares")]
    asked += [Reduction("distance"), Reduction("top_weights", 3), Reduction("top_keys", 3)]

    def made():
        leaves = [tensor.detach().requires_grad_() for tensor in (call.query, call.key, call.value)]
        output = native.attention(*leaves, causal=True, window=40)
        grid_output = grid.attention(
            *leaves,
            [grid.Side(torch.arange(150).clamp(max=140), torch.arange(150).clamp(max=140) + 9, 150)],
            scale=0.25,
        )
        grads = torch.autograd.grad(output.sum() + grid_output.square().sum(), leaves)
        found, whole = native.forward(call.operands, asked, output=True)
        return [whole, output.detach(), grid_output.detach(), *grads, *found.values()]

    plain = made()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        under = made()
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(plain, under, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e4, 1e2, 0.0])
def test_scores_of_any_size(size):
    """±1e4 that float32 holds exactly (whole numbers), ties included; all equal; down to one hot."""
    torch.manual_seed(1)
    query = torch.randint(-3, 4, (1, 2, 80, 8)).float() * round(size / 100)
    key = torch.randint(-3, 4, (1, 2, 80, 8)).float()
    call = Call(SITE, query, key, key, 1.0 if size else 0.1, causal=True)
    truth = dense(call)
    asked = [Reduction("entropy"), Reduction("received"), Reduction("maximum")]
    found, output = native.forward(call.operands, asked, output=True)
    wanted = reductions(truth)
    for reduction in asked:
        torch.testing.assert_close(found[reduction].double(), wanted[reduction.name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.double(), truth @ key.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_is_where_dense_has_it_and_nowhere_else(bad, where, masked):
    torch.manual_seed(2)
    call = made(60, 70, mask=torch.rand(1, 1, 60, 70) < 0.8 if masked else None)
    spoiled = getattr(call, where).clone()
    spoiled[0, 1, 37, 5] = bad
    call = call.but(**{where: spoiled})
    group = [Reduction("entropy"), Reduction("maximum"), Reduction("received")]
    found, output = native.forward(call.operands, group, output=True)
    scores = (call.query.double() @ call.key.double().mT) * call.scale
    truth = (scores if call.mask is None else scores.masked_fill(~call.mask, -torch.inf)).softmax(-1)
    assert truth.isnan().any() or bad != bad or where == "key"
    wanted = {name: tensor.isnan() for name, tensor in reductions(truth).items()}
    for reduction in group:
        assert torch.equal(found[reduction].isnan(), wanted[reduction.name]), reduction.name
    assert torch.equal(output.isnan(), (truth @ call.value.double()).isnan())


def test_given_its_log_sum_exp():
    call = made(300, 300, causal=True, sinks=None)
    asked = [Reduction("entropy"), Reduction("received"), Reduction("maximum"), Reduction("distance")]
    lse = native.forward(call.operands, [Reduction("lse")])[0][Reduction("lse")]
    torch.testing.assert_close(
        lse.double(),
        (call.query.double() @ call.key.double().mT * call.scale)
        .masked_fill(torch.ones(300, 300).triu(1).bool(), -torch.inf)
        .logsumexp(-1),
        atol=1e-5,
        rtol=1e-6,
    )
    found, _ = native.forward(call.operands, asked, lse=lse)
    wanted = reductions(dense(call))
    for reduction in asked:
        torch.testing.assert_close(found[reduction].double(), wanted[reduction.name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("limits", [{"window": 20}, {"blocks": "some"}], ids=["window", "blocks"])
def test_statistics_within_windows_and_blocks(limits):
    call = made(250, 190, 4, 2, causal=False)
    limits = {"blocks": some_blocks} if "blocks" in limits else limits
    apart = torch.arange(250)[:, None] - torch.arange(190)
    visible = apart.abs() < limits.get("window", 10**6)
    if "blocks" in limits:
        visible &= listed(some_blocks, 250, 190)
    asked = [Reduction("entropy"), Reduction("received"), Reduction("maximum"), Reduction("distance")]
    found, output = native.forward(call.operands, asked, output=True, **limits)
    truth = dense(call.but(mask=visible[None, None]))
    wanted = reductions(truth)
    for reduction in asked:
        torch.testing.assert_close(found[reduction].double(), wanted[reduction.name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.double(), truth @ call.value.double().repeat_interleave(2, 1), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- the mechanism


def listed(blocks: Blocks, n: int, m: int) -> torch.Tensor:
    """[query, key]"""
    seen = torch.zeros(blocks.counts.shape[2], -(-m // blocks.key_size), dtype=torch.bool)
    for i, row in enumerate(blocks.indices[0, 0]):
        seen[i, row[: blocks.counts[0, 0, i]].long()] = True
    return seen.repeat_interleave(blocks.query_size, 0)[:n].repeat_interleave(blocks.key_size, 1)[:, :m]


def naive(query, key, value, *, causal=False, window=None, blocks=None, mask=None, bias=None, softcap=None, sinks=None):
    """By definition, dense and differentiable."""
    n, m = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT * query.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    apart = torch.arange(n)[:, None] + m - n - torch.arange(m)
    visible = torch.ones(n, m, dtype=torch.bool)
    if causal:
        visible &= apart >= 0
    if window:
        visible &= apart.abs() < window
    if blocks is not None:
        visible &= listed(blocks, n, m)
    visible = visible if mask is None else visible & mask
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        joined = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        weights = joined.softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = weights.masked_fill(~visible.any(-1, keepdim=True).expand(weights.shape), 0.0)
    return weights @ value.repeat_interleave(group, 1)


some_blocks = Blocks(
    torch.tensor([[[3, 0, 6, 2]]], dtype=torch.int32),
    torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in range(4)]).int()[None, None],
    64,
    32,
)
CASES = {
    "causal": ((2, 4, 4, 100, 100, 64, 64), {"causal": True}),
    "cross, shared keys": ((2, 6, 3, 33, 130, 24, 20), {}),
    "few queries, shared keys": ((2, 6, 2, 5, 90, 16, 16), {"causal": True}),
    "window": ((1, 4, 2, 200, 200, 16, 16), {"causal": True, "window": 37}),
    "window to both sides": ((1, 2, 2, 150, 150, 16, 16), {"window": 20}),
    "softcap, sinks, bias": (
        (2, 4, 2, 70, 90, 40, 40),
        {"causal": True, "softcap": 3.0, "sinks": (4,), "bias": (1, 4, 70, 90)},
    ),
    "bias of distance": ((2, 4, 4, 70, 90, 40, 40), {"causal": True, "bias": (1, 4, 1, 90)}),
    "mask": ((2, 4, 4, 70, 90, 40, 40), {"mask": torch.rand(2, 1, 70, 90, generator=torch.Generator()) < 0.3}),
    "blocks": ((1, 4, 2, 250, 190, 40, 40), {"blocks": some_blocks}),
    "causal blocks": ((1, 4, 2, 250, 190, 40, 40), {"blocks": some_blocks, "causal": True}),
    "one query head": ((1, 1, 1, 900, 900, 16, 16), {"causal": True}),  # shared out over its queries
}


@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients(case):
    (batch, heads, kv_heads, n, m, dim, value_dim), options = CASES[case]
    torch.manual_seed(3)
    tensors = {
        "query": torch.randn(batch, heads, n, dim),
        "key": torch.randn(batch, kv_heads, m, dim),
        "value": torch.randn(batch, kv_heads, m, value_dim),
        **{name: torch.randn(shape) for name, shape in options.items() if name in ("sinks", "bias")},
    }
    rest = {name: option for name, option in options.items() if name not in tensors}
    ours = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    theirs = {name: t.double().requires_grad_() for name, t in tensors.items()}
    output, truth = native.attention(**ours, **rest), naive(**theirs, **rest)
    torch.testing.assert_close(output.double(), truth, atol=1e-5, rtol=1e-5)
    weight = torch.randn(output.shape)
    (output * weight).sum().backward()
    (truth * weight.double()).sum().backward()
    for name in tensors:
        torch.testing.assert_close(
            ours[name].grad.double(), theirs[name].grad, atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
def test_every_derivative(case):
    """Second ones, forward mode and torch.func are right, by whichever path."""
    (batch, heads, kv_heads, n, m, dim, value_dim), options = CASES[case]
    torch.manual_seed(3)
    shapes = {
        "query": (batch, heads, n, dim),
        "key": (batch, kv_heads, m, dim),
        "value": (batch, kv_heads, m, value_dim),
        **{name: shape for name, shape in options.items() if name in ("sinks", "bias")},
    }
    rest = {name: option for name, option in options.items() if name not in shapes}
    tensors = [torch.randn(shape) for shape in shapes.values()]
    ours = derivatives(lambda *t: native.attention(**dict(zip(shapes, t)), **rest), tensors)
    theirs = derivatives(lambda *t: naive(**dict(zip(shapes, t)), **rest), [t.double() for t in tensors])
    assert_same(ours, theirs)


def test_the_backward_pass_may_run_again_and_for_some_inputs():
    query, key, value = leaves = [torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3)]
    output = native.attention(query, key, value, causal=True)
    once = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    for ours, first in zip(torch.autograd.grad(output.sum(), leaves), once):
        torch.testing.assert_close(ours, first, rtol=0, atol=0)
    output = native.attention(query, key.detach(), value, causal=True)
    grad = torch.zeros_like(output).requires_grad_()
    to_query, to_value = torch.autograd.grad(output, (query, value), grad, create_graph=True)
    (back,) = torch.autograd.grad((to_query.sum() + to_value.sum()), grad)  # linear in what is given
    assert back.abs().sum() > 0
    assert torch.autograd.grad(to_value.sum(), key, allow_unused=True) == (None,)


@pytest.mark.parametrize("hidden", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("sinks", [False, True])
def test_gradients_behind_finite_masks(hidden, sinks):
    """Also of a row with nothing but what is masked: its log-sum-exp alone would not tell its weights."""
    torch.manual_seed(0)
    seen = torch.rand(1, 1, 40, 50) < 0.5
    seen[..., 3, :] = False
    mask = torch.zeros(seen.shape).masked_fill(~seen, hidden)
    tensors = [torch.randn(1, 2, n, 16) for n in (40, 50, 50)] + ([torch.randn(2)] if sinks else [])

    def plain(query, key, value, sinks=None):
        scores = (query @ key.mT * 0.25).float() + mask  # rounded as scores are
        if sinks is not None:
            scores = torch.cat([scores, sinks.float().view(1, 2, 1, 1).expand(1, 2, 40, 1)], -1)
        return scores.double().softmax(-1)[..., :50] @ value.double()

    def ours(query, key, value, sinks=None):
        return native.attention(query, key, value, mask=mask, sinks=sinks)

    mine, truth = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    given = torch.randn(1, 2, 40, 16)
    (ours(*mine) * given).sum().backward()
    (plain(*truth) * given.double()).sum().backward()
    for a, b in zip(mine, truth):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


def test_a_learned_mask_gets_its_gradient():
    call = made(20, 20)
    mask, bias = torch.randn(1, 1, 20, 20).requires_grad_(), torch.randn(1, 2, 20, 20).requires_grad_()
    call.but(mask=mask, bias=bias).output.square().sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (mask, bias)]
    (dense(call.but(mask=exact[0], bias=exact[1])) @ call.value.double()).square().sum().backward()
    for ours, truth in zip((mask, bias), exact):
        torch.testing.assert_close(ours.grad.double(), truth.grad, atol=1e-5, rtol=1e-5)


def test_a_row_whose_listed_keys_are_all_masked():
    """The mask shows it keys of a block that is not listed: it sees nothing, and gives zeros."""
    query = torch.randn(1, 1, 64, 8).requires_grad_()
    mask = torch.ones(1, 1, 1, 64, dtype=torch.bool)
    mask[..., 32] = False
    own = Blocks(torch.ones(1, 1, 2).int(), torch.tensor([0, 1]).int()[None, None, :, None], 32, 32)
    found = native.attention(query, query, query, blocks=own, causal=True, mask=mask)
    assert not found[0, 0, 32].any()
    (grad,) = torch.autograd.grad(found.sum(), query)
    assert found.isfinite().all()
    assert grad.isfinite().all()


def test_a_tensor_that_is_negated_lazily():
    call = made(20, 20)
    query = torch.complex(torch.zeros(call.query.shape), -call.query).conj().imag
    assert query.is_neg()
    torch.testing.assert_close(call.but(query=query).output, call.output)
    torch.testing.assert_close(call.but(query=query).weights.entropy(), call.weights.entropy())


def test_parts_join_to_the_whole():
    """Keys in two parts: outputs weighed by their log-sum-exp, and gradients that add up."""
    query, key, value = leaves = [torch.randn(1, h, 70, 16, requires_grad=True) for h in (4, 2, 2)]
    whole, given = native.attention(query, key, value), torch.randn(1, 4, 70, 16)
    wanted = torch.autograd.grad(whole, leaves, given)
    query, key, value = (t.detach() for t in leaves)
    halves = [(query, key[:, :, keys], value[:, :, keys]) for keys in (slice(30), slice(30, None))]
    outputs, logs = zip(*(native.part(*half) for half in halves))
    lse = torch.stack(logs).logsumexp(0)
    joined = sum(o * (log - lse).exp()[..., None] for o, log in zip(outputs, logs))
    torch.testing.assert_close(joined, whole.detach(), atol=1e-6, rtol=1e-5)
    first, second = (native.part_gradients(*half, joined, lse, given) for half in halves)
    torch.testing.assert_close(first[0] + second[0], wanted[0], atol=1e-5, rtol=1e-4)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([first[i], second[i]], 2), wanted[i], atol=1e-5, rtol=1e-4)
    blind = native.part(query, key, value, mask=torch.zeros(1, 1, 1, 70, dtype=torch.bool))
    assert not blind[0].any()
    assert (blind[1] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains(dtype):
    tensors = [torch.randn(1, 2, 50, 16, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    ours, theirs = [t.clone().requires_grad_() for t in tensors], [t.double().requires_grad_() for t in tensors]
    native.attention(*ours, causal=True).sum().backward()
    naive(*theirs, causal=True).sum().backward()
    for mine, truth in zip(ours, theirs):
        assert mine.grad.dtype == dtype
        torch.testing.assert_close(mine.grad.double(), truth.grad, atol=0.05, rtol=0.05)


def test_a_call_with_gradients_keeps_them():
    call = made(20, 20, causal=True)
    query = call.query.clone().requires_grad_()
    call.but(query=query).output.square().sum().backward()
    exact = call.query.double().requires_grad_()
    (dense(call.but(query=exact)) @ call.value.double()).square().sum().backward()
    torch.testing.assert_close(query.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(1, 3, 8, 4)}, "key and value belong together"),
        ({"query": torch.zeros(1, 3, 8, 4)}, "3 query heads do not share 2 key heads"),
        ({"query": torch.zeros(8, 4)}, r"takes \[batch, head, position, dim\]; got query \[8, 4\]"),
        ({"query": torch.zeros(1, 2, 8, 4).double()}, "dtypes torch.float64"),
        ({"window": 0}, "window=0: a query sees itself"),
        ({"mask": torch.zeros(8, 8, requires_grad=True)}, "pass what is learned as `bias`"),
        ({"blocks": Blocks(torch.ones(1, 1, 1).int(), torch.zeros(1, 1, 1, 1).int(), 8, 20)}, "multiple of 32"),
        ({"blocks": Blocks(torch.ones(1, 1, 2).int(), torch.zeros(1, 1, 1, 1).int(), 8, 32)}, "query block=1"),
        ({"blocks": Blocks(torch.ones(1, 1, 1).int() * 2, torch.zeros(1, 1, 1, 1).int(), 8, 32)}, "from 0 to 1"),
        ({"blocks": Blocks(torch.ones(1, 1, 1).int(), torch.ones(1, 1, 1, 1).int(), 8, 32)}, "outside the 8 keys"),
    ],
)
def test_bad_input_is_named(change, message):
    tensors = {name: torch.zeros(1, 2, 8, 4) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=message):
        native.attention(**(tensors | change))


def test_without_the_kernel_everything_works_in_plain_torch(monkeypatch):
    call = made(40, 40, causal=True)
    with_it = call.but().weights.entropy()
    monkeypatch.setenv("REGARD_KERNEL", "torch")
    assert native.refusal(call.operands) == "REGARD_KERNEL=torch"
    monkeypatch.setattr(native, "forward", None)
    torch.testing.assert_close(call.but().weights.entropy(), with_it, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="not available: REGARD_KERNEL=torch"):
        native.attention(call.query, call.key, call.value)


def test_what_it_cannot_do_goes_through_torch():
    call = made(4, 4)
    assert "float64" in native.refusal(call.but(query=call.query.double()).operands)
    assert "float64" in native.refusal(call.but(value=call.value.double()).operands)
    assert "edits" in native.refusal(call.but(edits=(lambda weights, rows: weights,)).operands)
    assert "no reduction median" in native.refusal(call.operands, [Reduction("median")])
    exact = call.but(query=call.query.double(), key=call.key.double(), value=call.value.double())
    torch.testing.assert_close(exact.weights.entropy().float(), call.weights.entropy())


def test_info_says_which_path_and_why():
    command = [sys.executable, "-m", "regard", "info"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "native C++" in shown
    environment = {"REGARD_KERNEL": "torch", "PATH": "/usr/bin:/bin"}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert "plain torch (REGARD_KERNEL=torch)" in shown


# ---------------------------------------------------------------------------------------------- boxes on grids


@st.composite
def sides(draw, most: int) -> grid.Side:
    """Any interval of keys for each query, as long as neither end falls: also none at all."""
    n, m = draw(st.integers(1, most)), draw(st.integers(1, most))
    ends = [sorted(draw(st.lists(st.integers(0, m), min_size=n, max_size=n))) for _ in range(2)]
    first, stop = (torch.tensor(e) for e in ends)
    return grid.Side(first, torch.maximum(first, stop), m)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(st.tuples(sides(70)), st.tuples(sides(9), sides(40)), st.tuples(sides(4), sides(6), sides(20))),
    st.sampled_from([(1, 1, 5, 9), (2, 2, 16, 16), (4, 2, 40, 24)]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_boxes_and_their_gradients(axes, sizes, masked, seed):
    torch.manual_seed(seed)
    heads, kv_heads, dim, value_dim = sizes
    n, m = math.prod(len(s.first) for s in axes), math.prod(s.length for s in axes)
    leaves = [
        torch.randn(2, h, length, d, requires_grad=True)
        for h, length, d in ((heads, n, dim), (kv_heads, m, dim), (kv_heads, m, value_dim))
    ]
    there = torch.rand(2, m) < 0.7 if masked else None
    seen = torch.ones(1, 1, dtype=torch.bool)
    for side in axes:
        seen = torch.kron(seen, side.pairs())
    seen = seen[None, None] if there is None else seen & there[:, None, None]
    found = grid.attention(*leaves, axes, scale=0.4, there=there)
    query, key, value = (t.detach().double().requires_grad_() for t in leaves)
    scores = (query @ key.repeat_interleave(heads // kv_heads, 1).mT * 0.4).masked_fill(~seen, -1e30)
    right = scores.softmax(-1).where(seen, 0.0) @ value.repeat_interleave(heads // kv_heads, 1)
    given = torch.randn(right.shape)
    ours = [found, *torch.autograd.grad(found, leaves, given)]
    theirs = [right, *torch.autograd.grad(right, (query, key, value), given.double())]
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-4)


def around(n: int, window: int) -> grid.Side:
    first = (torch.arange(n) - window // 2).clamp(0, n - window)
    return grid.Side(first, first + window, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "heads_last", "every_second"])
def test_boxes_of_any_type_and_layout(dtype, kind):
    """Windows wider than what the kernel takes at once, so that sums are joined; on several threads."""
    torch.manual_seed(0)
    axes = [around(30, 21), around(50, 33)]
    tensors = [layout(torch.randn(1, 2, 1500, 24).to(dtype), kind) for _ in range(3)]
    right = grid._in_torch(*(t.double() for t in tensors), None, axes, 1.0)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = grid.attention(*tensors, axes, scale=1.0)
            limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
            torch.testing.assert_close(found.double(), right, atol=limit, rtol=limit)
    finally:
        torch.set_num_threads(before)


def test_boxes_are_refused_where_they_do_not_fit():
    x, line = torch.randn(1, 2, 6, 4), around(6, 3)
    with pytest.raises(ValueError, match="as many positions as queries and keys"):
        grid.attention(x, x, x, [line, line], scale=1.0)
    with pytest.raises(ValueError, match="above 0"):
        grid.attention(x, x, x, [line], scale=-1.0)
    for first, stop in ((line.first.flip(0), line.stop), (line.first, line.stop + 1), (line.first - 1, line.stop)):
        with pytest.raises(ValueError, match="ascend within"):
            grid.attention(x, x, x, [grid.Side(first, stop, 6)], scale=1.0)


def test_boxes_have_every_derivative():
    axes = [around(5, 3), around(8, 3)]
    tensors = [torch.randn(1, 2, 40, 8) for _ in range(3)]

    def right(query, key, value):
        seen = torch.kron(axes[0].pairs(), axes[1].pairs())
        return (query @ key.mT * 0.4).masked_fill(~seen, -1e30).softmax(-1) @ value

    ours = derivatives(lambda *t: grid.attention(*t, axes, scale=0.4), tensors)
    assert_same(ours, derivatives(right, [t.double() for t in tensors]))
