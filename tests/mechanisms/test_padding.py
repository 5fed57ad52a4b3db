"""What a mask hides may be anything, and a padded row gets what the text alone gets: of everything in the room."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from families import GROUPED, NO_IDS, SIZES
from operators import CASES, OPERATORS, SMALL, inputs, small
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from regard import mechanisms
from regard.adapters.mechanisms import register
from regard.conversion import convert
from regard.mechanisms.chela import Chela

JUNK = float("nan"), float("inf"), -1e30
MODULES = mechanisms.modules()
MASKED = {name: cls for name, cls in MODULES.items() if "mask" in inspect.signature(cls.forward).parameters} | {
    "chela": Chela
}
# Averages run on over what is not there, so that it has to stand at the end.
RIGHT = {"mega", "chela"}


def made(name: str, causal: bool, n: int, dim: int = 32) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "chela":
        return Chela(dim, z=8, length=n, causal=causal)
    return MODULES[name].declared.made(dim=dim, heads=4, causal=causal, shape=(n,)).eval()


def given(name: str, n: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    if name == "chela" or MODULES[name].declared.takes == "hidden":
        return [torch.randn(2, n, 32)]
    return [torch.randn(2, 4, n, 8) for _ in range(3)]


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("gone", [slice(0, 4), slice(9, 12), slice(-4, None)])
def test_what_a_mask_hides_from_an_operator_does_not_spread(name, pattern, gone):
    """Nor into gradients. Also where queries stand there: only what they give themselves is lost."""
    for dtype in (torch.float32, torch.float64):
        query, key, value = leaves = [t.detach() for t in inputs(pattern, dtype=dtype)]
        there = torch.ones(2, 1, 1, key.shape[2], dtype=torch.bool)
        there[..., gone] = False
        run = partial(small(name), causal=pattern == "causal", mask=there)
        rows = there[0, 0, 0] if pattern != "cross" else slice(None)
        right = run(*leaves)[:, :, rows]
        for junk in JUNK:
            key, value = (t.clone().index_fill_(2, (~there[0, 0, 0]).nonzero().flatten(), junk) for t in leaves[1:])
            key, value = key.requires_grad_(), value.requires_grad_()
            found = run(query, key, value)[:, :, rows]
            assert torch.equal(found, right), junk
            assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), (key, value)))
            if pattern != "cross" and name != "hyperattention":  # which sorts queries that are not there among others
                asked = query.clone().index_fill_(2, (~there[0, 0, 0]).nonzero().flatten(), junk)
                torch.testing.assert_close(run(asked, key.detach(), value.detach())[:, :, rows], right)


def test_what_no_pair_shows_does_not_spread():
    """Masks of pairs: a key that no query sees, beside one that some do."""
    for name, pattern in CASES:
        if OPERATORS[name].spec.mask != "pairs":
            continue
        query, key, value = (t.detach() for t in inputs(pattern))
        seen = torch.rand(2, 4, query.shape[2], key.shape[2], generator=torch.Generator().manual_seed(0)) < 0.7
        seen[..., 3] = False
        run = partial(small(name), causal=pattern == "causal", mask=seen)
        right = run(query, key, value)
        key[:, :, 3] = value[:, :, 3] = float("nan")
        assert torch.equal(run(query, key, value), right), name


@pytest.mark.parametrize(("name", "causal"), [(n, c) for n in MASKED for c in (False, True)])
def test_what_a_mask_hides_from_a_module_does_not_spread(name, causal):
    declared = ("causal", "full") if name == "chela" else MODULES[name].declared.patterns
    if ("causal" if causal else "full") not in declared:
        pytest.skip("not of this pattern")
    n = 32
    layer, tensors = made(name, causal, n), given(name, n)
    told = {"causal": causal} if "causal" in inspect.signature(layer.forward).parameters else {}
    for gone in (slice(-5, None), slice(0, 5)):
        there = torch.ones(2, n, dtype=torch.bool)
        there[0, gone] = False
        if name in RIGHT and gone.start == 0:
            with pytest.raises(ValueError, match=r"stand at the end.*pad on the right"):
                layer(*tensors, mask=there, **told)
            continue
        right = first(layer(*tensors, mask=there, **told))
        assert causal or not torch.equal(first(layer(*tensors, **told))[0, ..., 5:-5, :], right[0, ..., 5:-5, :])
        assert torch.equal(first(layer(*tensors, mask=there[:, None, None], **told)), right)  # the other form
        for junk in JUNK[:2]:
            spoilt = [t.clone() for t in tensors]
            for t in spoilt if len(spoilt) == 1 else spoilt[1:]:
                t[0, ..., gone, :] = junk
            assert torch.equal(first(layer(*spoilt, mask=there, **told)).mT[..., there[0]], right.mT[..., there[0]])


@pytest.mark.parametrize("name", MASKED)
def test_masks_of_another_kind_are_refused(name):
    layer, tensors = made(name, True, 32), given(name, 32)
    for mask, said in (
        (torch.ones(2, 32), r"got torch.float32 \[2, 32\]; mask.bool\(\)"),
        (torch.ones(2, 31, dtype=torch.bool), r"\[batch, token\] = \[2, 32\].*got torch.bool \[2, 31\]"),
        (torch.ones(3, 1, 1, 32, dtype=torch.bool), r"got torch.bool \[3, 1, 1, 32\]"),
        (torch.ones(32, dtype=torch.bool), r"got torch.bool \[32\]"),
        ([True] * 32, "got list"),
    ):
        with pytest.raises(ValueError, match=f"a mask is boolean and says which tokens there are.*{said}"):
            layer(*tensors, mask=mask)


@pytest.mark.parametrize("name", [n for n, cls in MODULES.items() if cls.declared.takes != "map"])
def test_inputs_of_another_shape_are_refused(name):
    """By name, with what is expected and a way out, before anything has run."""
    cls, n = MODULES[name], 32
    layer = made(name, cls.declared.patterns[0] == "causal", n)
    if cls.declared.takes == "heads":
        for tensors, said in (
            ([torch.randn(2, 4, n, 7)] * 3, "dim=8.*got .*make it with"),
            ([torch.randn(2, n, 8)] * 3, r"takes \[batch, head, position, dim\]"),
            ([None] * 3, "takes query, key and value.*got NoneType"),
        ):
            with pytest.raises(ValueError, match=f"{cls.__name__}: .*{said}"):
                layer(*tensors)
        return
    for hidden, said in (
        (torch.randn(2, n, 31), r"dim=32\]; got \[2, 32, 31\]: make it with 31 channels, or project to 32"),
        (torch.randn(2, 32, 4, 8), r"dim=32\]; got \[2, 32, 4, 8\]: .*map.flatten\(2\).mT"),
        (torch.ones(2, n, 32, dtype=torch.long), "floating-point dtype; got torch.int64"),
        ([1.0], "got list"),
    ):
        with pytest.raises(ValueError, match=rf"{cls.__name__}: takes hidden \[batch, token, .*{said}"):
            layer(hidden)
    with pytest.raises(ValueError, match=r"takes hidden \[batch, token, dim.*got \[32, 32\]"):
        layer(torch.randn(n, 32))


@pytest.mark.parametrize("name", [n for n, cls in MODULES.items() if cls.declared.takes == "map"])
def test_maps_of_another_shape_are_refused(name):
    cls = MODULES[name]
    torch.manual_seed(0)
    layer = cls.declared.made(dim=32, heads=4, causal=False, shape=(16, 16))
    wrong = [torch.randn(2, 256, 32), torch.ones(2, 32, 16, 16, dtype=torch.long), torch.randn(2, 32, 0, 16), [1.0]]
    if name != "triplet":  # which takes any number of channels
        wrong.append(torch.randn(2, 31, 16, 16))
    for x in wrong:
        with pytest.raises(ValueError, match=r"feature map|rows and columns"):
            layer(x)


# ------------------------------------------------------------------------------------------------------ through models

LENGTHS = 14, 9
IDS = [torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**GROUPED, "num_hidden_layers": 1}, **NO_IDS)).eval()


def encoder() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**{**SIZES, "num_hidden_layers": 1})).eval()


def padded(left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of both lengths in longer ones, and where their tokens are."""
    ids, there = torch.full((2, 17), 7), torch.zeros(2, 17, dtype=torch.long)
    for row, mask, text in zip(ids, there, IDS):
        where = slice(17 - len(text), None) if left else slice(0, len(text))
        row[where], mask[where] = text, 1
    return ids, there


@pytest.mark.parametrize(("name", "pattern"), [(n, p) for n, p in CASES if p != "cross"])
def test_a_padded_row_gets_what_the_text_alone_gets(name, pattern):
    """Wherever the padding stands, also where blocks are counted or keys chosen; and so in decoding."""
    model = decoder() if pattern == "causal" else encoder()
    knobs = {k: v for k, v in SMALL.get(name, {}).items() if not isinstance(v, torch.Tensor)}
    model.set_attn_implementation(register(partial(OPERATORS[name], **knobs), f"{name}, {pattern}"))

    def run(ids, there):
        at = there.cumsum(-1).sub(1).clamp_min(0)
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=there, position_ids=at)[0]

    right = [run(ids[None], torch.ones_like(ids)[None])[0] for ids in IDS]
    for left in (True, False):
        ids, there = padded(left)
        found = run(ids, there)
        for of, mask, alone in zip(found, there.bool(), right):
            torch.testing.assert_close(of[mask], alone, atol=2e-5, rtol=1e-4)
    if pattern == "causal":
        more = {
            "max_new_tokens": 3,
            "do_sample": False,
            "pad_token_id": 0,
            "use_cache": not OPERATORS[name].spec.whole,
        }
        ids, there = padded(True)
        together = model.generate(ids, attention_mask=there, **more)[:, -3:]
        for text, tokens in zip(IDS, together):
            assert torch.equal(model.generate(text[None], **more)[0, -3:], tokens)


@torch.no_grad()
@pytest.mark.parametrize(("name", "pattern"), [(n, p) for n, p in CASES if p != "cross"])
def test_so_it_gets_by_the_name_alone(name, pattern):
    """Also where blocks are as large as the length says."""
    model = decoder() if pattern == "causal" else encoder()
    model.set_attn_implementation(f"regard:{name}")
    ids, there = padded(left=False)
    found = model(input_ids=ids, attention_mask=there)[0]
    for of, mask, text in zip(found, there.bool(), IDS):
        torch.testing.assert_close(of[mask], model(input_ids=text[None])[0][0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "knobs"), [("seerattention", {"block": 4, "width": 8, "ratio": 0.4}), ("routing", {"clusters": 3})]
)
def test_so_it_is_with_modules_that_a_model_holds(name, knobs):
    """Of which one chooses by how many blocks there are, and the other has windows of a share of the keys."""
    model = decoder()
    convert(model, name, **knobs)

    def run(ids, there):
        at = there.cumsum(-1).sub(1).clamp_min(0)
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=there, position_ids=at, use_cache=False)[0]

    for left in (True, False):
        ids, there = padded(left)
        for of, mask, text in zip(run(ids, there), there.bool(), IDS):
            alone = run(text[None], torch.ones_like(text)[None])[0]
            torch.testing.assert_close(of[mask], alone, atol=2e-5, rtol=1e-4)


def test_a_grid_stays_where_it_is():
    """Tokens whose place is given are not moved to where the first one is."""
    torch.manual_seed(0)
    model = encoder()
    near = partial(OPERATORS["neighborhood"], shape=(4, 3), window=3)
    model.set_attn_implementation(register(near, "near-4x3"))
    ids, there = torch.randint(3, 90, (1, 12)), torch.ones(1, 12, dtype=torch.long)
    there[0, 0] = 0
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=there).last_hidden_state
        other = model(input_ids=ids.index_fill(1, torch.tensor([11]), 5), attention_mask=there).last_hidden_state
    assert torch.equal(found[0, 1:6], other[0, 1:6])  # the last row is not near the first two
    assert not torch.equal(found[0, 6], other[0, 6])


def test_cross_attention_to_a_padded_text_keeps_all_queries():
    """Also of as many queries as keys."""
    from families import ENCODER_DECODER
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(**ENCODER_DECODER, **NO_IDS, decoder_start_token_id=1)).eval()
    ids, there = padded(True)
    with torch.no_grad():
        right = model(input_ids=ids, attention_mask=there, decoder_input_ids=ids).logits
        model.set_attn_implementation("regard:memory-efficient")
        found = model(input_ids=ids, attention_mask=there, decoder_input_ids=ids).logits
    torch.testing.assert_close(found, right, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("right", [0, 1, 3])
def test_windows_of_a_causal_stride_end_with_the_text(right):
    x = torch.randn(1, 2, 10 + right, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    there = torch.ones(1, 1, 1, 10 + right, dtype=torch.bool)
    there[..., 10:] = False
    run = partial(OPERATORS["gna"], causal=True, window=5, stride=4)
    torch.testing.assert_close(run(x, x, x, mask=there)[:, :, :10], run(*[x[:, :, :10]] * 3))


@pytest.mark.parametrize(
    ("name", "knob"),
    [
        ("moba", "block"),
        ("power", "block"),
        ("seerattention", "block"),
        ("combiner", "segment"),
        ("select_and_pack", "length"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_longer_than_the_text_takes_no_more_room(name, knob, dtype):
    x = torch.randn(2, 2, 40, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    run = partial(OPERATORS[name], x, x, x, causal="causal" in OPERATORS[name].spec.patterns)
    torch.testing.assert_close(run(**{knob: 10**12}), run(**{knob: 80}))
