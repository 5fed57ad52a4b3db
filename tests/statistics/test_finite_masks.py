"""Finite masks hide by the weight that they leave: every statistic is what it is behind a boolean mask."""

from __future__ import annotations

import math

import pytest
import torch
from families import EAGER_ONLY, build

import regard
from regard import catalog
from regard.call import Call, Site
from regard.kernels import native

HIDDEN = [-1e4, -1e9, "lowest"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SITE = Site("attention", "language_model", 0)
# Of a row that sees nothing a finite mask makes equal weights, and these say so.
OF_KEYS = {"received", "received_ahead", "flow", "rollout"}


@pytest.fixture(autouse=True, params=["torch", "native"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setenv("REGARD_KERNEL", "torch")
    elif native.why_not():
        pytest.skip("no native kernel")


def lowest(hidden, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min if hidden == "lowest" else max(hidden, torch.finfo(dtype).min)


def pair(hidden, dtype: torch.dtype, bias: bool) -> tuple[Call, Call, torch.Tensor]:
    """A call behind a boolean mask, the same behind a finite one, and which rows see anything."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, 9, 8).to(dtype) * 3 for h in (4, 2, 2))
    seen = (torch.rand(2, 1, 9, 9) < 0.6).tril()
    seen[0, :, :3] = False  # padding in front
    low = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, lowest(hidden, dtype))
    extra = torch.randn(1, 4, 9, 9).to(dtype) if bias else None
    truth = Call(
        SITE, query, key, value, 0.35, seen if not bias else torch.zeros(()).where(seen, -math.inf), bias=extra
    )
    return truth, Call(SITE, query, key, value, 0.35, low, bias=extra), seen.any(-1).expand(-1, 4, -1)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_every_statistic(hidden, dtype, bias):
    truth, finite, rows = pair(hidden, dtype, bias)
    compared = set()
    for name in catalog.statistics():
        statistic = catalog.statistic(name)
        if isinstance(statistic, type) or name in OF_KEYS or statistic.spec.dims[:3] != ("batch", "head", "query"):
            continue
        right, found = statistic(truth), statistic(finite)
        if right is None:
            continue
        torch.testing.assert_close(
            found[rows], right[rows], atol=2e-5, rtol=2e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
        compared.add(name)
    assert {
        "entropy",
        "normalised_entropy",
        "gini",
        "hoyer",
        "effective_keys",
        "effective_span",
        "sink_mass",
    } <= compared
    assert torch.equal(finite.weights.visible(), truth.weights.visible())
    assert torch.equal(finite.weights.seen(2, 7), truth.weights.seen(2, 7))


def test_by_what_is_left_not_by_the_number():
    zero = torch.zeros(1, 1, 3, 2)
    penalty = torch.tensor([[0.0, -50.0, -86.0], [0.0, -88.0, -math.inf], [40.0, -40.0, -50.0]])
    weights = Call(SITE, zero, zero, zero, 1.0, mask=penalty[None, None]).weights
    assert weights.visible()[0, 0].tolist() == [3, 1, 2]
    slopes = -20.0 * (torch.arange(3)[:, None] - torch.arange(3)).clamp(min=0)  # a bias of distance hides what is far
    weights = Call(SITE, zero, zero, zero, 1.0, bias=slopes[None, None] * 3, causal=True).weights
    assert weights.visible()[0, 0].tolist() == [1, 2, 2]
    assert weights.dense()[0, 0, 2].tolist() == pytest.approx([0, 0, 1], abs=1e-20)
    all_low = torch.full((1, 1, 3, 3), -1e4)
    assert Call(SITE, zero, zero, zero, 1.0, mask=all_low).weights.visible()[0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_models(family, implementation, hidden, dtype):
    if implementation == "sdpa" and family in EAGER_ONLY:
        pytest.skip("transformers has no sdpa for it")
    model, inputs = build(family, implementation)
    model.to(dtype)
    n = inputs["input_ids"].shape[1]
    window = getattr(model.config, "sliding_window", None) or n
    apart = torch.arange(n)[:, None] - torch.arange(n)
    seen = (apart >= 0) & (apart < (window if family == "mistral" else n))
    mask = torch.zeros(2, 1, n, n, dtype=dtype).masked_fill(~seen, lowest(hidden, dtype))
    names = ("normalised_entropy", "gini", "hoyer", "effective_keys", "received")
    if family in ("gemma2", "gpt_oss"):  # some of their layers slide: a mask of one's own is for all of them
        mask = {"full_attention": mask, "sliding_attention": mask}
        plain = {k: torch.zeros_like(m).masked_fill(~seen, -math.inf) for k, m in mask.items()}
    else:
        plain = None
    found = []
    for given in (mask, plain):
        with torch.no_grad(), regard.record(model, *names) as recording:
            model(**inputs, attention_mask=given)
        found.append(recording.tree["language_model"])
    for name in names:
        ours, right = (torch.from_numpy(node[name].values).float() for node in found)
        torch.testing.assert_close(ours, right, atol=2e-3, rtol=2e-3, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
