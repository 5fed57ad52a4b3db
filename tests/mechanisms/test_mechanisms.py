"""Every mechanism keeps the contract: equal to what it amounts to, with gradients, and only where it is defined."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
from derivatives import assert_same, derivatives
from families import GROUPED, NO_IDS, VISION
from operators import CASES, OPERATORS, SMALL, inputs, small
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from regard import catalog, mechanisms
from regard.adapters.mechanisms import register
from regard.mechanisms.flashbias import alibi

# What a query gets depends on where the others lie, so padding moves it.
ELSEWHERE = {"hyperattention"}
WHOLE = {name for name, operator in OPERATORS.items() if operator.spec.whole}
# On short sequences, by their own knobs; of scores as small as those here, a polynomial is the exponential too.
EXACT = {
    "attendre",
    "diffqkv",
    "dynamic_mask",
    "fast",
    "hyperattention",
    "memory_efficient",
    "part_attention",
    "sea",
    "select_and_pack",
    "sparsifiner",
}


def masks(spec, query, key):
    """None, which keys there are, and pairs where these are supported; the last query always sees something."""
    there = torch.rand(len(key), 1, 1, key.shape[2], generator=torch.Generator().manual_seed(5)) < 0.7
    there[..., -1] = True
    found = [None, there]
    if spec.mask == "pairs":
        seen = torch.rand(
            len(key), query.shape[1], query.shape[2], key.shape[2], generator=torch.Generator().manual_seed(6)
        )
        found.append(seen < 0.6)
        found.append((seen < 0.6)[:1, :1])
    return found


def truth(name, query, key, value, **settings):
    weights = OPERATORS[name].spec.weights(
        query, key, **{"scale": None, "mask": None, **SMALL.get(name, {}), **settings}
    )
    return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("n", [1, 2, 23])
def test_equals_what_it_amounts_to(name, pattern, n):
    """Values and gradients in float64, also where the map is never made."""
    causal = pattern == "causal"
    query, key, value = leaves = inputs(pattern, n, value_dim=6)
    for mask in masks(OPERATORS[name].spec, query, key):
        for scale in (None, 0.3):
            settings = {"causal": causal, "mask": mask, "scale": scale}
            found, right = small(name)(query, key, value, **settings), truth(name, query, key, value, **settings)
            assert found.shape == (2, 4, n, 6)
            torch.testing.assert_close(found, right)
            given = torch.randn_like(right)
            for ours, theirs in zip(
                torch.autograd.grad(found, leaves, given), torch.autograd.grad(right, leaves, given)
            ):
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_derivative(name, pattern, dtype):
    """Second ones, forward mode and torch.func."""
    causal = pattern == "causal"
    n = 20 if name == "combiner" else 40  # by far the slowest
    tensors = [t.detach() for t in inputs(pattern, n, dtype=torch.float64)]
    knobs = {"power": {"block": 32, "window": 1, "sink": 0}, "moba": {"block": 32, "top": 2}}  # the kernel's blocks
    knobs = knobs.get(name, SMALL.get(name, {}))

    def right(query, key, value):
        weights = OPERATORS[name].spec.weights(query, key, causal=causal, scale=None, mask=None, **knobs)
        return weights @ value.repeat_interleave(2, 1)

    ours = partial(derivatives, partial(OPERATORS[name], causal=causal, **knobs), [t.to(dtype) for t in tensors])
    if dtype == torch.float64 and name == "diffqkv":
        with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product"):
            ours()
        return
    assert_same(ours(), derivatives(right, tensors))


@pytest.mark.parametrize("name", [n for n, p in CASES if p == "causal"])
@pytest.mark.parametrize("n", [1, 3, 13])
def test_continues_after_cached_keys(name, n):
    """Fewer queries than keys: they are the last, and get what they get among all queries, or are refused."""
    query, key, value = inputs("causal", 29)
    if name in WHOLE:
        with pytest.raises(ValueError, match="takes all positions at once"):
            small(name)(query[:, :, -n:], key, value, causal=True)
        return
    for mask in (None, masks(OPERATORS[name].spec, query, key)[1]):
        whole = small(name)(query, key, value, causal=True, mask=mask)
        torch.testing.assert_close(small(name)(query[:, :, -n:], key, value, causal=True, mask=mask), whole[:, :, -n:])


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(name, pattern, dtype):
    """Near what float64 makes of the same numbers, in every backend that serves the dtype."""
    tensors = [t.detach().to(dtype) for t in inputs(pattern, 40)]
    causal = pattern == "causal"
    # the kernel's blocks; of two blocks moba takes both, since what it prefers may change with rounding
    knobs = {"power": {"block": 32, "window": 1, "sink": 0}, "moba": {"block": 32, "top": 2}}
    function = partial(OPERATORS[name], **knobs.get(name, SMALL.get(name, {})))
    found = function(*tensors, causal=causal)
    assert found.dtype == dtype
    right = function(*(t.double() for t in tensors), causal=causal)
    limit = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}[dtype]
    torch.testing.assert_close(found.double(), right, atol=limit * float(right.abs().max()), rtol=0)


@pytest.mark.parametrize("name", [n for n, p in CASES if p == "causal"])
def test_the_future_changes_nothing(name):
    query, key, value = (t.detach() for t in inputs("causal"))
    before = small(name)(query, key, value, causal=True)
    value[:, :, 15:] = -100.0
    if not OPERATORS[name].spec.ahead:  # otherwise only later values change nothing
        key[:, :, 15:] = 100.0
    torch.testing.assert_close(
        small(name)(query, key, value, causal=True)[:, :, :15], before[:, :, :15], rtol=0, atol=0
    )


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_padding_changes_nothing(name, pattern):
    """What stands where there is no key is not seen, and the rest is as without it."""
    causal = pattern == "causal"
    query, key, value = (t.detach() for t in inputs(pattern))
    there = torch.ones(2, 1, 1, key.shape[2], dtype=torch.bool)
    there[..., -4:] = False
    results = []
    for junk in (0.0, 1e4):
        key[:, :, -4:], value[:, :, -4:] = junk, junk
        results.append(small(name)(query, key, value, causal=causal, mask=there))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    if name in ELSEWHERE:
        return
    rows = slice(None) if pattern == "cross" else slice(0, key.shape[2] - 4)
    alone = small(name)(query[:, :, rows], key[:, :, :-4], value[:, :, :-4], causal=causal)
    torch.testing.assert_close(results[0][:, :, rows], alone)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_key_at_all_gives_zeros(name, dtype):
    spec = OPERATORS[name].spec
    leaves = inputs("full", dtype=dtype)
    nothing = torch.zeros(2, 1, 1, 23, dtype=torch.bool)
    found = small(name)(*leaves, causal="causal" in spec.patterns, mask=nothing)
    assert not found.any()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(found.sum(), leaves))


@pytest.mark.parametrize("name", OPERATORS)
def test_refusals(name):
    operator = OPERATORS[name]
    query, key, value = inputs("full")
    causal = "causal" in operator.spec.patterns
    if "causal" not in operator.spec.patterns:
        with pytest.raises(ValueError, match="not defined for causal"):
            operator(query, key, value, causal=True)
    if operator.spec.patterns == ("causal",):
        with pytest.raises(ValueError, match="causal only"):
            operator(query, key, value, causal=False)
    if "cross" not in operator.spec.patterns and "full" in operator.spec.patterns:
        with pytest.raises(ValueError, match="as many keys as queries"):
            operator(query[:, :, 1:], key, value, causal=False)
    with pytest.raises(ValueError, match="boolean mask"):
        operator(query, key, value, causal=causal, mask=torch.zeros(1, 1, 1, 23))
    with pytest.raises(ValueError, match="broadcasts to"):
        operator(query, key, value, causal=causal, mask=torch.ones(23, 23, dtype=torch.bool))
    if operator.spec.mask == "keys":
        with pytest.raises(ValueError, match="which keys there are"):
            operator(query, key, value, causal=causal, mask=torch.ones(1, 1, 23, 23, dtype=torch.bool))
    with pytest.raises(ValueError, match="do not share"):
        operator(query[:, :3], key, value, causal=causal)
    with pytest.raises(ValueError, match="belong together"):
        operator(query, key[:, :, 1:], value, causal=causal)
    with pytest.raises(ValueError, match="dtype"):
        operator(query, key, value.float(), causal=causal)
    with pytest.raises(ValueError, match="takes tensors; got list, Tensor, NoneType"):
        operator([], key, None, causal=causal)


@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_is_refused(name):
    """No sequence, head, token or dim."""
    for none in range(4):
        given = [t.detach().float().narrow(none, 0, 0) for t in inputs("full")]
        with pytest.raises(ValueError, match=f"{name}: takes one sequence, head, token and dim or more"):
            OPERATORS[name](*given, causal="causal" in OPERATORS[name].spec.patterns)


@pytest.mark.parametrize(
    ("name", "knobs", "said"),
    [
        ("moba", {"block": 2.5}, "block is int; got 2.5"),
        ("moba", {"scale": float("nan")}, "scale is float | None; got nan"),
        ("neighborhood", {"shape": 23}, "shape is Sequence[int] | None; got 23"),
        ("neighborhood", {"window": (3, "x")}, "window is Axes; got (3, 'x')"),
        ("neighborhood", {"window": True}, "window is Axes; got True"),
        ("landmark", {"landmarks": [1]}, "landmarks is Tensor | None; got [1]"),
        ("routing", {"shared": torch.ones(2)}, "shared is bool; got a tensor [2]"),
        ("combiner", {"form": 1}, "form is str; got 1"),
        ("hierarchical", {"tree": "deep"}, "tree is int | Sequence[int] | Tensor; got 'deep'"),
        ("biformer", {"size": 0}, "size=0"),
        ("adaptive_filter", {"scale": -1.0}, "0 or more; got scale=-1.0"),
    ],
)
def test_knobs_of_another_kind_are_refused(name, knobs, said):
    patterns = OPERATORS[name].spec.patterns
    with pytest.raises(ValueError, match=f"{name}: .*{re.escape(said)}"):
        OPERATORS[name](*inputs("full"), causal=patterns == ("causal",), **knobs)


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_cost(name, pattern):
    """Finite, growing with length as the catalog says, and never over that of dense attention by much."""
    costs = [OPERATORS[name].spec.cost(n, n, 64, causal=pattern == "causal") for n in (16384, 32768, 65536, 131072)]
    assert all(0 < c.operations < float("inf") and c.bytes() == 4 * c.elements > 0 for c in costs)
    growth = [after.operations / before.operations for before, after in pairwise(costs)]
    low, high = {
        "linear": (2, 2.01),
        "n log n": (2, 2.4),
        "n^1.5": (2.7, 2.95),
        "linear from a length on": (2, 2.1),
        "n and n^2 / block": (2, 2.2),
        "square": (3.9, 4.01),
    }[GROWTH[name]]
    assert all(low - 0.01 <= g <= high for g in growth), growth


GROWTH = {
    "deconstructed": "square",
    "adaptive_filter": "square",
    "attendre": "linear",
    "agent_attention": "linear",
    "fast": "linear",
    "dependency_vit": "square",
    "diffqkv": "square",
    "efficient_attention": "linear",
    "flashbias": "square",
    "flow_attention": "linear",
    "combiner": "n^1.5",
    "dynamic_mask": "linear from a length on",
    "hierarchical": "square",
    "hyperattention": "n log n",
    "landmark": "square",
    "lightning_2": "linear",
    "memory_efficient": "square",
    "moba": "n and n^2 / block",
    "neighborhood": "linear",
    "gna": "linear",
    "freeswim": "linear",
    "halonet": "linear",
    "biformer": "square",
    "part_attention": "square",
    "regional_attention": "linear",
    "power": "n log n",
    "routing": "n^1.5",
    "sea": "square",
    "seerattention": "square",
    "select_and_pack": "square",
    "sparsifiner": "square",
    "twins": "linear",
}


@pytest.mark.parametrize("name", [n for n, operator in OPERATORS.items() if operator.spec.step])
def test_decoding_in_constant_memory(name):
    """One token after another gives what all together give, from a state that does not grow."""
    query, key, value = (t.detach() for t in inputs("causal", 40))
    state, outputs, sizes = None, [], set()
    for i in range(40):
        output, state = OPERATORS[name].spec.step(state, *(t[:, :, i : i + 1] for t in (query, key, value)))
        outputs.append(output)
        sizes.add(sum(t.numel() for t in (state if isinstance(state, tuple) else (state,))))
    torch.testing.assert_close(torch.cat(outputs, 2), small(name)(query, key, value, causal=True))
    assert len(sizes) == 1


@pytest.mark.parametrize("name", OPERATORS)
def test_is_written_as_the_room_asks(name):
    operator = OPERATORS[name]
    assert operator.__name__ == name
    assert ">>>" in inspect.getdoc(operator)
    parameters = list(inspect.signature(operator).parameters.values())
    assert [p.name for p in parameters[:6]] == ["query", "key", "value", "causal", "mask", "scale"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[3:])
    row = next(r for r in catalog.rows().values() if r.object == f"regard.mechanisms.{name}:{name}")
    assert row.key == name.replace("_", "-")


def llama(implementation="sdpa", **more):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**GROUPED, **NO_IDS, **more)).eval()
    model.set_attn_implementation(implementation)
    return model


IDS = torch.randint(3, 90, (2, 23), generator=torch.Generator().manual_seed(1))
CAUSAL = [n for n, p in CASES if p == "causal"]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model(name):
    """Runs under the name that transformers' users expect, trains a step, and is undone."""
    model = llama()
    implementation = register(small(name), f"small-{name}".replace("flash", ""))
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        whole = model(IDS).logits
    # padding on the left is not seen
    padded = F.pad(IDS, (3, 0), value=7)
    there = F.pad(torch.ones_like(IDS), (3, 0))
    with torch.no_grad():
        logits = model(padded, attention_mask=there, position_ids=there.cumsum(-1).sub(1).clamp_min(0)).logits
    torch.testing.assert_close(logits[:, 3:], whole, atol=1e-5, rtol=1e-4)
    # through a cache, token by token and in a piece
    more = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    if name in WHOLE:
        with pytest.raises(ValueError, match="use_cache=False"):
            model.generate(IDS, **more)
    else:
        with torch.no_grad():
            part = model(IDS[:, :9], use_cache=True)
            step = model(IDS[:, 9:10], past_key_values=part.past_key_values, use_cache=True)
            rest = model(IDS[:, 10:], past_key_values=step.past_key_values, use_cache=True)
        joined = torch.cat([part.logits, step.logits, rest.logits], 1)
        torch.testing.assert_close(joined, whole, atol=1e-5, rtol=1e-4)
    assert model.generate(IDS, **more, use_cache=name not in WHOLE).shape == (2, 26)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = model(IDS, labels=IDS).loss
    first.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert model(IDS, labels=IDS).loss < first
    model.set_attn_implementation("sdpa")
    fresh = llama()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, fresh(IDS).logits)


@pytest.mark.parametrize("name", [n for n, p in CASES if p == "full"])
def test_a_model_of_pictures(name):
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**VISION)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(pixels).logits
    model.set_attn_implementation(f"regard:{name.replace('_', '-').replace('flash', '')}")
    found = model(pixels, labels=torch.tensor([0, 1]))
    found.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if name in EXACT:
        torch.testing.assert_close(found.logits, before, atol=1e-5, rtol=1e-4)
    else:
        assert not torch.allclose(found.logits, before, atol=1e-5)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, before)


def test_a_grid_of_a_model_of_pictures():
    """Knobs by a name of one's own: patches in rows and columns, causal along the rows though the model is not."""
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**VISION)).eval()
    side = VISION["image_size"] // VISION["patch_size"]
    pixels = torch.randn(2, 3, VISION["image_size"], VISION["image_size"])
    other = pixels.clone()
    other[:, :, -VISION["patch_size"] :] = 0.0  # the last row of patches
    for causal in (False, (True, False)):
        near = partial(OPERATORS["neighborhood"], shape=(side, side), window=3, causal=causal)
        model.set_attn_implementation(register(near, f"near-{causal and 'rows'}"))
        with torch.no_grad():
            before, after = (model(p).last_hidden_state[:, :side] for p in (pixels, other))
        assert torch.equal(before, after) == bool(causal)


@pytest.mark.parametrize("name", [n for n in CAUSAL if OPERATORS[n].spec.patterns == ("causal",)])
def test_causal_ones_refuse_pictures(name):
    model = ViTForImageClassification(ViTConfig(**VISION))
    model.set_attn_implementation(f"regard:{name.replace('_', '-')}")
    with pytest.raises(ValueError, match="causal only"):
        model(torch.randn(1, 3, 16, 16))


def test_exact_attention_is_the_models_own():
    """Exact ones change nothing, with padding, a sliding window and packed sequences, in one pass and decoding."""
    own = llama()
    there = torch.ones_like(IDS)
    there[0, :5] = there[1, -6:] = 0
    packed = torch.cat([torch.arange(10), torch.arange(13)])[None].expand(2, -1)
    torch.manual_seed(0)
    sliding = MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=4, **NO_IDS)).eval()
    for model, more in (
        (own, {"attention_mask": there}),
        (own, {"position_ids": packed, "use_cache": False}),
        (sliding, {}),
    ):
        with torch.no_grad():
            model.set_attn_implementation("sdpa")
            right = model(IDS, **more).logits
            model.set_attn_implementation("regard:memory-efficient")
            found = model(IDS, **more).logits
        rows = more.get("attention_mask", there.new_ones(there.shape)).bool()
        torch.testing.assert_close(found[rows], right[rows], atol=1e-5, rtol=1e-4)


def test_bidirectional_padding():
    torch.manual_seed(0)
    sizes = {k: v for k, v in GROUPED.items() if k != "num_key_value_heads"}
    model = BertModel(BertConfig(**sizes)).eval()
    there = torch.ones_like(IDS)
    there[:, -5:] = 0
    with torch.no_grad():
        right = model(IDS, attention_mask=there).last_hidden_state[:, :-5]
        model.set_attn_implementation("regard:memory-efficient")
        found = model(IDS, attention_mask=there).last_hidden_state[:, :-5]
        model.set_attn_implementation("regard:efficient-attention")
        linear = [model(IDS.where(there.bool(), i), attention_mask=there).last_hidden_state[:, :-5] for i in (3, 4)]
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*linear)
    model.train()
    with pytest.raises(ValueError, match="dropout"):
        model(IDS)


def test_what_a_model_adds_is_refused_not_ignored():
    config = GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4, **NO_IDS)
    model = GptOssForCausalLM(config)
    model.set_attn_implementation("regard:memory-efficient")
    with pytest.raises(ValueError, match="cannot honour s_aux"):
        model(IDS)
    packed = llama("regard:lightning-2")
    positions = torch.cat([torch.arange(10), torch.arange(13)])[None].expand(2, -1)
    with pytest.raises(ValueError, match="which keys there are"):
        packed(IDS, position_ids=positions, use_cache=False)
    with pytest.raises(ValueError, match="static cache"):
        packed.generate(IDS, max_new_tokens=2, cache_implementation="static", pad_token_id=0)
    with pytest.raises(TypeError, match="not a mechanism"):
        register(torch.softmax)


def test_the_declaration_is_checked():
    with pytest.raises(ValueError, match="patterns"):
        mechanisms.mechanism("sideways", mask="keys", weights=None, cost=None)
    with pytest.raises(TypeError, match="not a mechanism"):
        mechanisms.spec_of(torch.softmax)
    assert mechanisms.spec_of(small("power")) is OPERATORS["power"].spec


@pytest.mark.parametrize("name", [*OPERATORS, "aaren"])
def test_examples_in_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(f"regard.mechanisms.{name}"))
    assert tried
    assert not failed


@pytest.mark.parametrize("name", [n for n, p in CASES if p == "causal"])
def test_a_mechanism_answers_to_the_name_of_its_file(name):
    hyphens, file = llama(), llama(f"regard:{name}")
    hyphens.set_attn_implementation(f"regard:{name.replace('_', '-').replace('flash', '')}")
    assert file.config._attn_implementation == hyphens.config._attn_implementation
    with torch.no_grad():
        assert torch.equal(file(IDS).logits, hyphens(IDS).logits)


@pytest.mark.parametrize(
    ("given", "near"), [("lightening", "lightning-2"), ("memory", "memory-efficient"), ("pwer", "power")]
)
def test_a_wrong_name_is_answered_with_the_near_ones(given, near):
    model = llama()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"no mechanism 'regard:{given}' .did you mean regard:{near}"):
        model.set_attn_implementation(f"regard:{given}")
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match="not supported"):  # transformers' own answer
        model.set_attn_implementation("nothing")


def test_bias_is_added_to_the_scores_of_rotated_queries():
    """ALiBi beside the rotary positions of a Llama: what its own attention gives under that bias, and no warning."""
    own, seen = llama(), llama("regard:flashbias")
    n, heads = IDS.shape[1], own.config.num_attention_heads
    bias = alibi(heads, n).bias()
    mask = bias.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), torch.finfo(torch.float32).min)
    own.set_attn_implementation("eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        right = own(IDS, attention_mask=mask).logits
        torch.testing.assert_close(seen(IDS).logits, right, atol=1e-5, rtol=1e-4)
