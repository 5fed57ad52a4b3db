"""Passes and sequences are told apart in every way in which models run; what is not known is not named."""

from __future__ import annotations

import asyncio
import copy
import io
import pickle
import threading

import numpy as np
import pytest
import torch
import transformers as t
from families import IMAGE, SIZES, build
from torch import nn
from ways import checkpoint, first, is_clean

import regard

SETTINGS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def ids(start: int, n: int = 12, batch: int = 1) -> torch.Tensor:
    return torch.arange(start, start + n).repeat(batch, 1)


def tree(recording, run: int = 0, stack: str = "language_model"):
    return recording[run][stack]


def recorded(model, *names: str, stack: str = "language_model", **inputs):
    with torch.no_grad(), regard.record(model, *(names or ("entropy",)), own_output=True) as recording:
        model(**inputs)
    return recording.tree[stack]


def same(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=1e-4)


def tokens(node, axis="query"):
    return [list(map(str, row)) for row in node[f"{axis}_token"].values]


def roles(node, axis="query"):
    return node[f"{axis}_role"].values


def bloom():
    torch.manual_seed(0)
    config = t.BloomConfig(hidden_size=32, vocab_size=99, n_layer=2, n_head=4)
    return t.BloomForCausalLM(config).eval()


# What interrupts a pass


@torch.no_grad()
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, asyncio.CancelledError, SystemExit])
@pytest.mark.parametrize("make", [lambda: build("llama", "sdpa")[0], bloom], ids=["interface", "own"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_pass_that_is_interrupted_ends(kind, make, inside):
    model = make()
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    broken = [1]

    def stop(*_):
        if broken and broken.pop():
            raise kind

    part = next(m for m in layers[1].modules() if m in regard.sites.find(model)) if inside else layers[1].mlp
    part = next(p for p in part.modules() if not list(p.children()) and list(p.parameters())) if inside else part
    handle = part.register_forward_hook(stop)
    with regard.record(model, "entropy") as recording:
        with pytest.raises(kind):
            model(input_ids=ids(3))
        for start in (20, 40, 60):
            model(input_ids=ids(start))
    handle.remove()
    assert len(recording) == 4
    assert [tree(recording, i).sizes["layer"] for i in (1, 2, 3)] == [2, 2, 2]
    assert tokens(tree(recording, 3)) == [[str(i) for i in range(60, 72)]]
    same(tree(recording, 3)["entropy"], recorded(model, input_ids=ids(60))["entropy"])
    assert is_clean(model)
    assert not torch.overrides._get_current_function_mode_stack()


# What a mask says


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_padding_keeps_its_role_in_a_static_cache(family, implementation):
    model, _ = build(family, implementation)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :9] = 0
    found = {}
    for kind in ({}, {"cache_implementation": "static", "disable_compile": True}):
        with regard.record(model, "received", "mass") as recording:
            model.generate(input_ids=ids(3, batch=2), attention_mask=mask, **SETTINGS, eos_token_id=None, **kind)
        found["static" if kind else "dynamic"] = tree(recording)
    assert (roles(found["static"]) == roles(found["dynamic"])).all()
    assert list(roles(found["static"])[1, :10]) == ["pad"] * 9 + ["text"]
    n = found["dynamic"].sizes["key"]
    same(found["static"]["received"][..., :n], found["dynamic"]["received"])
    assert float(found["static"]["received"][1, ..., :9].sum()) == 0


@torch.no_grad()
def test_a_mask_of_pairs_says_what_is_padding():
    model, _ = build("llama", "eager")
    mask = torch.ones(12, 12, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, :, :4] = False
    with regard.record(model, "entropy") as recording:
        model(input_ids=ids(3, batch=2), attention_mask=mask)
    assert [list(row).count("pad") for row in roles(tree(recording))] == [0, 4]
    strict = torch.ones(12, 12, dtype=torch.bool).tril(-1)[None, None]
    with regard.record(model, "entropy") as recording:
        model(input_ids=ids(3), attention_mask=strict)
    assert "pad" not in roles(tree(recording))


# What generate made


@torch.no_grad()
def test_tokens_after_an_end_that_was_not_asked_for_are_generated():
    model, _ = build("llama")
    with torch.no_grad():
        free = model.generate(input_ids=ids(3), **SETTINGS, eos_token_id=None)
    model.config.eos_token_id = int(free[0, 13])
    with regard.record(model, "received") as recording:
        model.generate(input_ids=ids(3), **SETTINGS, eos_token_id=None)
    assert list(roles(tree(recording))[0, 12:]) == ["generated"] * 5
    same(tree(recording)["received"].sum("key").isel(layer=0, head=0), 17.0)


@torch.no_grad()
def test_rows_that_a_text_ends_are_padding_too():
    model, _ = build("llama")

    class Stop(t.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.tensor([input_ids.shape[1] >= 14, False])

    with regard.record(model, "entropy") as recording:
        model.generate(
            input_ids=torch.cat([ids(3), ids(30)]), max_new_tokens=6, do_sample=False, pad_token_id=7, eos_token_id=98,
            stopping_criteria=t.StoppingCriteriaList([Stop()]),
        )  # fmt: skip
    assert list(roles(tree(recording))[0, 12:]) == ["generated"] * 2 + ["pad"] * 3
    assert list(roles(tree(recording))[1, 12:]) == ["generated"] * 5


@torch.no_grad()
def test_a_turn_of_one_token_is_not_generated():
    model, _ = build("llama")
    with regard.record(model, "entropy") as recording:
        out = model.generate(input_ids=ids(3), **SETTINGS, eos_token_id=None, return_dict_in_generate=True)
        turn = torch.cat([out.sequences, torch.tensor([[50]])], 1)
        again = model.generate(input_ids=turn, past_key_values=out.past_key_values, **SETTINGS, eos_token_id=None)
        model(input_ids=torch.tensor([[51]]), past_key_values=out.past_key_values)
    assert len(recording) == 1
    made = roles(tree(recording))[0]
    assert list(made[12:17]) == ["generated"] * 5
    assert list(made[17:]) == ["generated", "text"] + ["generated"] * 5 + ["text"] or list(made[17:]) == [
        "text",
        "text",
    ] + ["generated"] * 5 + ["text"]
    assert tokens(tree(recording))[0][:24] == [str(i) for i in again[0, :24].tolist()]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_assisted_decoding_is_what_plain_decoding_is(family, implementation):
    model, _ = build(family, implementation)
    assistant, _ = build("llama", "sdpa")
    assistant.lm_head.weight.normal_()  # disagrees, so that decoding steps back
    settings = {**SETTINGS, "max_new_tokens": 9, "min_new_tokens": 9, "eos_token_id": None}
    names = ("entropy", "received", "mass", "distance")
    with regard.record(model, *names) as plain:
        want = model.generate(input_ids=ids(3), **settings)
    with regard.record(model, *names) as recording:
        got = model.generate(input_ids=ids(3), **settings, assistant_model=assistant)
    assert torch.equal(want, got)
    a, b = tree(recording), tree(plain)
    n = b.sizes["query"]
    assert a.sizes["query"] == n
    assert (roles(a) == roles(b)).all()
    assert tokens(a) == tokens(b)
    for name in names:
        same(a[name], b[name])
    assert is_clean(model)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["prompt", "early"])
def test_other_ways_of_assisted_decoding(kind):
    model, _ = build("llama", "sdpa")
    settings = {**SETTINGS, "eos_token_id": None}
    prompt = ids(3, 6).repeat(1, 3)
    with regard.record(model, "entropy", "received") as plain:
        want = model.generate(input_ids=prompt, **settings)
    how = {"prompt_lookup_num_tokens": 3} if kind == "prompt" else {"assistant_early_exit": 1}
    with regard.record(model, "entropy", "received") as recording:
        got = model.generate(input_ids=prompt, **settings, **how)
    assert torch.equal(want, got)
    whole = [run for run in range(len(recording)) if tree(recording, run).sizes["layer"] == 2]
    node = tree(recording, whole[0])
    assert len(whole) == 1
    for name in ("entropy", "received"):
        same(node[name], tree(plain)[name])


# Beam search


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 3, "do_sample": True}])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral", "gpt2"])
def test_beams_are_recorded_for_the_sequences_that_come_out(family, settings):
    model, _ = build(family, "sdpa")
    torch.manual_seed(1)
    batch = torch.cat([ids(3), ids(40)])
    settings = {**SETTINGS, "max_new_tokens": 8, "min_new_tokens": 1, "eos_token_id": 5, **settings}
    for _attempt in range(20):  # one in which some sequence ends before the others
        with regard.record(model, "entropy", "received", "mass") as recording:
            found = model.generate(input_ids=batch, **settings)
        if not settings["do_sample"] or (found[:, 12:-1] == 5).any():
            break
    node = tree(recording)
    n = settings.get("num_return_sequences", 1)
    assert node.sizes["batch"] == 2 * n == len(found)
    assert node.sizes["query"] == found.shape[1] - 1
    for row, sequence in enumerate(found):
        ends = (sequence[12:] == 5).nonzero()
        length = 12 + (int(ends[0]) if len(ends) else found.shape[1] - 13)
        alone = recorded(model, "entropy", "received", "mass", input_ids=sequence[None, :length])
        assert tokens(node)[row][:length] == [str(i) for i in sequence[:length].tolist()]
        assert list(roles(node)[row]) == ["text"] * 12 + ["generated"] * (length - 12) + ["pad"] * (
            node.sizes["query"] - length
        )
        same(node["entropy"][row, ..., :length], alone["entropy"][0])
        same(node["received"][row, ..., :length], alone["received"][0])
        assert not node["received"][row, ..., length:].any()
        assert node["entropy"][row, ..., length:].isnull().all()
    assert is_clean(model)


@torch.no_grad()
def test_beams_of_an_encoder_decoder():
    model, _ = build("bart", "sdpa")
    batch, mask = torch.cat([ids(3), ids(40)]), torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    with regard.record(model, "entropy", "mass") as recording:
        found = model.generate(input_ids=batch, attention_mask=mask, **SETTINGS, num_beams=3, forced_eos_token_id=None)
    assert set(recording.tree.children) == {"encoder", "decoder", "decoder_cross"}
    with regard.record(model, "entropy", "mass") as whole:
        model(input_ids=batch, attention_mask=mask, decoder_input_ids=found[:, :-1])
    for stack in ("decoder", "decoder_cross"):
        same(recording.tree[stack]["entropy"], whole.tree[stack]["entropy"])
    cross = recording.tree["decoder_cross"]
    assert tokens(cross, "key") == [[str(i) for i in row] for row in batch.tolist()]
    assert list(roles(cross, "key")[1, 7:9]) == ["text", "pad"]


@torch.no_grad()
def test_rows_of_a_cache_in_another_order():
    """By code of one's own: repeated, swapped, selected."""
    model, _ = build("llama", "sdpa")
    batch = torch.cat([ids(3), ids(40)])
    with regard.record(model, "entropy", "received") as recording:
        cache = model(input_ids=batch).past_key_values
        cache.batch_repeat_interleave(2)
        model(input_ids=torch.tensor([[1], [2], [3], [4]]), past_key_values=cache)
        cache.reorder_cache(torch.tensor([3, 1, 1, 0]))
        model(input_ids=torch.tensor([[5], [6], [7], [8]]), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([0, 2]))
    want = torch.cat([batch[[1, 0]], torch.tensor([[4, 5], [2, 7]])], 1)
    whole = recorded(model, "entropy", "received", input_ids=want)
    assert tokens(tree(recording)) == [[str(i) for i in row] for row in want.tolist()]
    for name in ("entropy", "received"):
        same(tree(recording)[name], whole[name])


def test_what_cannot_be_put_in_order_is_refused():
    @regard.statistic("head", title="Mean")
    def mean(call):
        return call.weights.entropy().mean((0, 2))

    model, inputs = build("llama")
    for given in ({"mean": mean}, {"sink": lambda *_: None}):
        with pytest.raises(ValueError, match="num_beams=1"), regard.record(model, "entropy", **given):
            model.generate(**inputs, **SETTINGS, num_beams=2)
        assert is_clean(model)
    model.generate(**inputs, **SETTINGS, num_beams=2)


# Caches


@torch.no_grad()
def test_a_cache_that_is_cropped():
    model, _ = build("llama", "sdpa")
    with regard.record(model, "entropy", "rows") as recording:
        cache = t.DynamicCache(config=model.config)
        model(input_ids=ids(3), past_key_values=cache)
        cache.crop(-6)
        model(input_ids=ids(50, 3), past_key_values=cache)
        for layer in cache.layers:
            layer.crop(-1)
        model(input_ids=ids(60, 2), past_key_values=cache)
    want = torch.cat([ids(3, 6), ids(50, 2), ids(60, 2)], 1)
    assert tokens(tree(recording)) == [[str(i) for i in want[0].tolist()]]
    whole = recorded(model, "entropy", "rows", input_ids=want)
    same(tree(recording)["entropy"], whole["entropy"])
    same(tree(recording)["rows"].fillna(0), whole["rows"])


@torch.no_grad()
def test_a_crop_inside_a_sum_is_followed_or_refused():
    model, _ = build("llama", "sdpa")
    with regard.record(model, "received") as recording:
        cache = model(input_ids=ids(3)).past_key_values
        model(input_ids=ids(50, 4), past_key_values=cache)
        cache.crop(-3)
    whole = recorded(model, "received", input_ids=torch.cat([ids(3), ids(50, 1)], 1))
    same(tree(recording)["received"], whole["received"])
    with pytest.raises(ValueError, match="says nothing of single queries"), regard.record(model, "received"):
        model(input_ids=ids(3)).past_key_values.crop(-3)


@torch.no_grad()
def test_sequences_in_turns_are_runs_of_their_own():
    model, _ = build("llama", "sdpa")
    with regard.record(model, "entropy") as recording:
        a, b = (model(input_ids=ids(start)).past_key_values for start in (3, 40))
        for i in (60, 70):
            model(input_ids=ids(i, 2), past_key_values=a)
            model(input_ids=ids(i + 5, 1), past_key_values=b)
    assert len(recording) == 2
    for run, want in enumerate(([ids(3), ids(60, 2), ids(70, 2)], [ids(40), ids(65, 1), ids(75, 1)])):
        want = torch.cat(want, 1)
        assert tokens(tree(recording, run)) == [[str(i) for i in want[0].tolist()]]
        same(tree(recording, run)["entropy"], recorded(model, input_ids=want)["entropy"])


@torch.no_grad()
def test_caches_that_were_filled_outside():
    model, _ = build("llama", "sdpa")
    mask = torch.ones(1, 13, dtype=torch.long)
    mask[:, :2] = 0
    a = model(input_ids=ids(3), attention_mask=mask[:, :12]).past_key_values
    b = model(input_ids=ids(40)).past_key_values
    with regard.record(model, "entropy") as recording:
        model(input_ids=ids(60, 1), past_key_values=a, attention_mask=mask)
        model(input_ids=ids(61, 1), past_key_values=b)
        model(input_ids=ids(62, 1), past_key_values=a)
    assert len(recording) == 2
    one, other = tree(recording), tree(recording, 1)
    assert list(one["query"].values) == [12, 13]
    assert tokens(one) == [["60", "62"]]
    assert tokens(other) == [["61"]]
    assert list(roles(one, "key")[0]) == ["pad"] * 2 + ["other"] * 10 + ["text"] * 2
    assert tokens(other, "key") == [[""] * 12 + ["61"]]


@torch.no_grad()
def test_generate_says_what_a_cache_holds_that_was_filled_outside():
    model, _ = build("llama", "sdpa")
    prefix = model(input_ids=ids(3)).past_key_values
    with regard.record(model, "entropy") as recording:
        for start in (40, 50):
            whole = torch.cat([ids(3), ids(start, 2)], 1)
            found = model.generate(
                input_ids=whole, past_key_values=copy.deepcopy(prefix), **SETTINGS, eos_token_id=None
            )
    assert len(recording) == 2
    assert tokens(tree(recording, 1), "key") == [[str(i) for i in found[0, :-1].tolist()]]
    assert list(roles(tree(recording, 1), "key")[0]) == ["text"] * 14 + ["generated"] * 5


@torch.no_grad()
def test_a_cache_of_another_batch_is_not_known():
    model, _ = build("llama", "sdpa")
    with regard.record(model, "entropy") as recording:
        cache = model(input_ids=torch.cat([ids(3), ids(40)])).past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[1:], layer.values[1:]
        model(input_ids=ids(60, 1), past_key_values=cache)
    assert len(recording) == 2
    assert tokens(tree(recording, 1), "key") == [[""] * 12 + ["60"]]


@torch.no_grad()
def test_the_unconditional_half_of_guidance_is_a_run_of_its_own():
    model, _ = build("llama", "sdpa")
    negative = ids(40, 5)
    with regard.record(model, "entropy") as recording:
        found = model.generate(
            input_ids=ids(3), **SETTINGS, eos_token_id=None, guidance_scale=1.5, negative_prompt_ids=negative
        )
    assert len(recording) == 2
    assert tokens(tree(recording)) == [[str(i) for i in found[0, :-1].tolist()]]
    want = torch.cat([negative, found[:, 12:-1]], 1)
    assert tokens(tree(recording, 1)) == [[str(i) for i in want[0].tolist()]]
    for run, sequence in ((0, found[:, :-1]), (1, want)):
        same(tree(recording, run)["entropy"], recorded(model, input_ids=sequence)["entropy"])


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_copies_that_left_a_sliding_cache_are_copies(family):
    model, _ = build(family, "sdpa")
    sequence = torch.tensor([[5, 6, 7, 8, 9, 10, 5, 6, 11, 12, 13, 14, 15, 8, 5, 5]])
    names = ("induction", "duplicate_token")
    want = recorded(model, *names, input_ids=sequence)
    with regard.record(model, *names) as recording:
        cache = model(input_ids=sequence[:, :8]).past_key_values
        for i in range(8, 16):
            model(input_ids=sequence[:, i : i + 1], past_key_values=cache)
    for name in names:
        same(tree(recording)[name], want[name])


# Encoders and decoders


@torch.no_grad()
def test_states_from_outside_have_no_names():
    model, _ = build("bart", "sdpa")
    decoder, mask = ids(60), torch.ones(1, 12, dtype=torch.long)
    mask[:, 9:] = 0
    outside = model.get_encoder()(input_ids=ids(40))
    with regard.record(model, "mass", "received") as recording:
        model(encoder_outputs=outside, decoder_input_ids=decoder)
        model(input_ids=ids(3), attention_mask=mask, decoder_input_ids=decoder[:, :5])
        model(encoder_outputs=outside, decoder_input_ids=decoder[:, :5], attention_mask=mask)
        model.get_encoder()(input_ids=ids(20))
        model(encoder_outputs=outside, decoder_input_ids=decoder[:, :5])
    assert [set(run.children) for run in recording] == [
        {"decoder", "decoder_cross"},
        {"encoder", "decoder", "decoder_cross"},
        {"decoder", "decoder_cross"},
        {"encoder"},
        {"decoder", "decoder_cross"},
    ]
    keys = [tree(recording, run, "decoder_cross") for run in (0, 1, 2, 4)]
    assert [tokens(node, "key")[0] for node in keys] == [
        [""] * 12, [str(i) for i in range(3, 15)], [""] * 12, [""] * 12,
    ]  # fmt: skip
    assert [list(roles(node, "key")[0]) for node in keys] == [
        ["other"] * 12, ["text"] * 9 + ["pad"] * 3, ["other"] * 9 + ["pad"] * 3, ["other"] * 12,
    ]  # fmt: skip


@torch.no_grad()
def test_states_from_inside_keep_their_names():
    """Also where the decoder gets copies of them, in another order, in turns."""
    model, _ = build("bart", "sdpa")
    with regard.record(model, "entropy") as recording:
        a, b = (model.get_encoder()(input_ids=ids(start)) for start in (3, 20))
        both = torch.cat([b[0], a[0]])
        cache = model(encoder_outputs=(a[0],), decoder_input_ids=ids(60, 4)).past_key_values
        model(encoder_outputs=(b[0],), decoder_input_ids=ids(60, 4))
        model(encoder_outputs=(a[0],), decoder_input_ids=ids(70, 1), past_key_values=cache)
        model(encoder_outputs=(b[0].clone(),), decoder_input_ids=ids(60, 4))
        model(encoder_outputs=(both,), decoder_input_ids=ids(60, 4, batch=2))
    one, other = ([str(i) for i in range(start, start + 12)] for start in (3, 20))
    assert [set(run.children) for run in recording][:2] == [{"encoder", "decoder", "decoder_cross"}] * 2
    assert tokens(tree(recording, 0, "decoder_cross"), "key") == [one]
    assert tokens(tree(recording, 0, "decoder")) == [["60", "61", "62", "63", "70"]]
    assert tokens(tree(recording, 1, "decoder_cross"), "key") == [other]
    assert tokens(tree(recording, 2, "decoder_cross"), "key") == [other]


class Pair(nn.Module):
    """One encoder, for two texts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = t.BertModel(t.BertConfig(**SIZES)).eval()

    def forward(self, input_ids, b, mask_a=None, embedded=False):
        if embedded:
            embed = self.encoder.get_input_embeddings()
            one = self.encoder(inputs_embeds=embed(input_ids), attention_mask=mask_a)[0]
            return one.mean() + self.encoder(inputs_embeds=embed(b))[0].mean()
        one = self.encoder(input_ids=input_ids, attention_mask=mask_a)[0]
        return one.mean() + self.encoder(input_ids=b)[0].mean()


@torch.no_grad()
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("n", [12, 9])
def test_an_encoder_that_runs_twice_in_one_pass_reads_two_texts(n, embedded):
    model, mask = Pair(), torch.ones(1, 12, dtype=torch.long)
    mask[:, 8:] = 0
    with regard.record(model, "received") as recording:
        model(ids(3), ids(40, n), mask, embedded=embedded)
    assert len(recording) == 2
    stack = next(iter(recording[0].children))
    for run, (start, length) in enumerate(((3, 12), (40, n))):
        node = tree(recording, run, stack)
        assert list(node["layer"].values) == [0, 1]
        known = not embedded or run == 0
        assert tokens(node) == [[str(i) if known else "" for i in range(start, start + length)]]
        assert list(roles(node)[0]).count("pad") == (0 if run else 4)
        same(node["received"].sum("key").isel(layer=1, head=0), length if run else 8)


@torch.no_grad()
def test_padding_in_float64_is_nan_in_eager_attention_itself():
    model, inputs = build("llama", "eager")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    model.double()
    assert model(**inputs, attention_mask=mask).logits[0].isnan().all(), "transformers has mended it: leave it out"
    with pytest.raises(regard.UnreachableAttention, match=r"own output of attention is NaN .*run the model in float32"):
        recorded(model, "entropy", **inputs, attention_mask=mask)
    model.set_attn_implementation("sdpa")
    assert not recorded(model, "entropy", **inputs, attention_mask=mask)["entropy"][1].isnull().any()
    assert is_clean(model)


class Twice(nn.Module):
    """Layers that are no model of transformers run twice in one pass: on another text, or on what they gave."""

    def __init__(self, layers, looped):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.looped = nn.Embedding(99, 16), looped
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.eval()

    def forward(self, input_ids, b):
        one = self.encoder(self.embed(input_ids))
        return one.mean() + self.encoder(one if self.looped else self.embed(b)).mean()


@torch.no_grad()
@pytest.mark.parametrize("n", [12, 9])
@pytest.mark.parametrize("layers", [1, 2])
def test_plain_layers_that_run_twice_on_two_texts(layers, n):
    model = Twice(layers, looped=False)
    with regard.record(model, "entropy") as recording:
        model(ids(3), ids(40, n))
        model(ids(3), ids(40, n))
    assert len(recording) == 4
    (stack,) = recording[0].children
    for run, length in enumerate([12, n] * 2):
        node = tree(recording, run, stack)
        assert list(node["layer"].values) == list(range(layers))
        assert node.sizes["query"] == length
        own = [str(i) for i in range(3, 15)] if run % 2 == 0 else [""] * n  # of the second nothing tells
        assert tokens(node) == [own]
    alone = Twice(layers, looped=False)
    with regard.record(alone, "entropy") as recording:
        alone(ids(40, n), ids(3))
    same(tree(recording, 0, stack)["entropy"], node["entropy"])


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
def test_plain_layers_that_run_again_on_what_they_gave(layers):
    model = Twice(layers, looped=True)
    with regard.record(model, "entropy") as recording:
        model(ids(3), ids(40))
    node = recording.tree[next(iter(recording.tree.children))]
    assert list(node["layer"].values) == list(range(2 * layers))
    assert tokens(node) == [[str(i) for i in range(3, 15)]]


@torch.no_grad()
@pytest.mark.parametrize("order", [[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 1], [0, 1, 1], [0, 1, 0, 1], [1, 0, 0]])
@pytest.mark.parametrize("part", ["layer", "attention"])
def test_shared_layers_are_numbered_as_they_run(order, part):
    model, _ = build("llama", "eager")
    model.config.num_hidden_layers = len(order)
    own = list(model.model.layers)
    apart = [copy.deepcopy(own[i]) for i in order]
    for layer, block in enumerate(apart):
        block.self_attn.layer_idx = layer
    model.model.layers = nn.ModuleList(apart)
    want = model(input_ids=ids(3), use_cache=False, output_attentions=True).attentions
    if part == "layer":
        model.model.layers = nn.ModuleList([own[i] for i in order])
    else:
        for block, i in zip(apart, order):
            block.self_attn = own[i].self_attn

    class Layers:
        def __init__(self):
            self.seen = []

        def mlp(self, site, output):
            self.seen.append(site.layer)
            return output

    layers = Layers()
    with regard.record(model, "rows") as recording, regard.intervene(model, layers):
        model(input_ids=ids(3), use_cache=False)
    rows = tree(recording)["rows"]
    assert list(rows["layer"].values) == list(range(len(order)))
    if part == "layer":
        assert layers.seen == list(range(len(order)))
    for layer, weights in enumerate(want):
        same(rows.sel(layer=layer), weights)


@torch.no_grad()
def test_groups_of_shared_layers():
    config = t.AlbertConfig(**{**SIZES, "num_hidden_layers": 6}, embedding_size=16, num_hidden_groups=2)
    torch.manual_seed(0)
    model = t.AlbertModel(config).eval()
    model.set_attn_implementation("eager")
    want = model(input_ids=ids(3), output_attentions=True).attentions
    node = recorded(model, "rows", input_ids=ids(3), stack="encoder")
    for layer, weights in enumerate(want):
        same(node["rows"].sel(layer=layer), weights)


# Pictures


@torch.no_grad()
@pytest.mark.parametrize("generate", [False, True])
def test_two_pictures_with_no_text_between(generate):
    model, _ = build("llava", "sdpa")
    sequence = torch.cat([ids(3, 2), torch.full((1, 32), IMAGE), ids(40, 3)], 1)
    pictures = torch.randn(2, 3, 16, 16)
    with regard.record(model, "entropy") as recording:
        if generate:
            model.generate(input_ids=sequence, pixel_values=pictures, **SETTINGS, eos_token_id=None)
        else:
            model(input_ids=sequence, pixel_values=pictures)
    node = recording.tree["language_model"]
    assert node.attrs["grids"] == "[[4, 4], [4, 4]]"
    assert list(node["query_image"].values[0, 2:34]) == [0] * 16 + [1] * 16
    assert list(node["query_column"].values[0, 18:34]) == [0, 1, 2, 3] * 4
    assert list(node["query_row"].values[0, 17:19]) == [3, 0]


# A checkpoint's gradient


class Triple:
    def mlp(self, site, output):
        return output * 3 if site.layer == 1 else output


class OfTokens:
    def output(self, call, output):
        late = call.tokens is not None and call.query_start == 0 and call.tokens.ids[0, -1] == 14
        return output * 3 if late and call.site.layer == 1 else output


class Gained(nn.Module):
    def weights(self, call, weights, rows):
        return weights * (1.0 + call.site.layer)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("thing", [Triple(), OfTokens(), Gained()], ids=["mlp", "tokens", "weights"])
@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1, 0]])
def test_a_checkpoint_runs_again_as_it_ran(thing, record, reentrant, order):
    found = []
    for checkpointed in (False, True):
        model, _ = build("llama", "sdpa")
        model.model.layers = nn.ModuleList([model.model.layers[i] for i in order])
        model.config.num_hidden_layers = len(order)
        model.train()
        if checkpointed:
            checkpoint(model, use_reentrant=reentrant)
        session = regard.record(model, "entropy") if record else regard.intervene(model, Triple())
        with session, regard.intervene(model, thing):
            loss = model(input_ids=ids(3), use_cache=False).logits.square().sum()
            loss = loss + model(input_ids=ids(40), use_cache=False).logits.square().sum()
            loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5 * float(found[0].abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_gradient_outside_the_block_is_refused(reentrant):
    model, _ = build("llama", "sdpa")
    model.train()
    checkpoint(model, use_reentrant=reentrant)
    with regard.intervene(model, Triple()):
        loss = model(input_ids=ids(3), use_cache=False).logits.sum()
    with pytest.raises(RuntimeError, match="backward inside the block"):
        loss.backward()
    loss = model(input_ids=ids(3), use_cache=False).logits.sum()
    with pytest.raises(RuntimeError, match="one block"), regard.intervene(model, Triple()):
        loss.backward()
    with regard.record(model, "entropy") as recording:
        loss = model(input_ids=ids(3), use_cache=False).logits.sum()
    loss.backward()
    assert len(recording) == 1


# Threads, tasks, copies


def failing(run) -> list[BaseException]:
    raised = []

    def inner():
        try:
            run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=inner)
    thread.start()
    thread.join()
    return raised


def test_a_session_is_one_threads():
    model, _ = build("llama", "sdpa")
    other, _ = build("llama", "sdpa")
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        (error,) = failing(lambda: model(input_ids=ids(3)))
        assert isinstance(error, RuntimeError)
        assert "another thread" in str(error)

        def opens():
            with regard.record(model, "entropy"):
                pass

        (error,) = failing(opens)
        assert isinstance(error, RuntimeError)
        assert "a model of its own" in str(error)
        assert not failing(lambda: recorded(other, input_ids=ids(3)))
        model(input_ids=ids(20))
    assert tokens(recording.tree["language_model"]) == [[str(i) for i in range(20, 32)]]
    assert is_clean(model)
    assert not failing(lambda: recorded(model, input_ids=ids(3)))


def test_sessions_that_close_in_any_order_leave_nothing_behind():
    models = [build("llama", "sdpa")[0], nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()]
    models = [*models, build("llama", "sdpa")[0]]
    compiled = []

    def backend(graph, inputs):
        compiled.append(1)
        return graph.forward

    async def one(model, opens, closes):
        await asyncio.sleep(opens)
        with regard.record(model, "entropy"):
            await asyncio.sleep(closes)

    async def all_():
        await asyncio.gather(*(one(m, 0.01 * i, 0.05) for i, m in enumerate([*models, models[1], models[0]])))

    generate, getstate = t.GenerationMixin.generate, nn.Module.__getstate__
    asyncio.run(all_())
    assert all(is_clean(model) for model in models)
    assert all("forward" not in vars(m) for model in models for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    assert t.GenerationMixin.generate is generate
    assert nn.Module.__getstate__ is getstate
    torch.compile(lambda x: x * 2 + 1, backend=backend)(torch.ones(3))
    assert compiled == [1]


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: build("llama", "sdpa")[0], bloom], ids=["interface", "own"])
def test_a_session_that_outlasts_the_one_around_it_goes_on(make):
    model = make()
    outer, inner = regard.record(model, "entropy"), regard.record(model, "entropy")
    outer.__enter__()
    recording = inner.__enter__()
    outer.__exit__(None, None, None)
    model(input_ids=ids(3))
    inner.__exit__(None, None, None)
    assert tokens(recording.tree["language_model"]) == [[str(i) for i in range(3, 15)]]
    assert is_clean(model)


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: build("llama", "sdpa")[0], bloom], ids=["interface", "own"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_copy_from_inside_the_block_is_a_plain_model(make, way):
    model = make()
    seen = []
    handle = model.register_forward_hook(Remember(seen)) if way == "deepcopy" else None

    def copied():
        if way == "deepcopy":
            return copy.deepcopy(model)
        if way == "pickle":
            return pickle.loads(pickle.dumps(model))
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        return torch.load(file, weights_only=False)

    with regard.record(model, "entropy") as recording, regard.intervene(model, Triple()):
        other = copied()
        other(input_ids=ids(3))
        model(input_ids=ids(3))
    assert len(recording) == 1
    own = 1 if handle is not None else 0
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in other.modules()) == own
    assert not any("forward" in vars(m) for m in other.modules())
    torch.testing.assert_close(first(other(input_ids=ids(3))), first(model(input_ids=ids(3))), rtol=0, atol=0)
    assert recorded(other, input_ids=ids(3))["entropy"].shape == (1, 2, 4, 12)


class Remember:
    """A hook of the user's own, which a copy keeps."""

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, module, args, output):
        self.seen.append(1)


@torch.no_grad()
@pytest.mark.parametrize("what", ["attention", "layer", "layers"])
def test_attention_that_is_replaced_inside_the_block_is_noticed(what):
    model, _ = build("llama", "sdpa")
    own = model.model.layers[1]
    with pytest.raises(regard.UnreachableAttention, match="was replaced inside the block"):  # noqa: SIM117
        with regard.record(model, "entropy"):
            model(input_ids=ids(3))
            if what == "attention":
                own.self_attn = copy.deepcopy(own.self_attn)
            elif what == "layer":
                model.model.layers[1] = copy.deepcopy(own)
            else:
                model.model.layers = model.model.layers[:1]
            model(input_ids=ids(3))
    assert is_clean(model)


# Ways in which nothing can be seen


def _vmap(model):
    torch.vmap(lambda x: model(input_ids=x[None], use_cache=False).logits)(ids(3, batch=2))


def _embedded(model):
    x = model.get_input_embeddings()(ids(3)).detach()
    return lambda x: model(inputs_embeds=x, use_cache=False).logits.sum(), x


def _grad(model):
    run, x = _embedded(model)
    torch.func.grad(run)(x)


def _jvp(model):
    run, x = _embedded(model)
    torch.func.jvp(run, (x,), (x,))


def _export(model):
    torch.export.export(model, (), {"input_ids": ids(3), "use_cache": False}, strict=False)


def _fake(model):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(input_ids=mode.from_tensor(ids(3)))


def _trace(model):
    torch.jit.trace(model, example_kwarg_inputs={"input_ids": ids(3)}, strict=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("run", [_vmap, _grad, _jvp, _export, _fake, _trace])
@pytest.mark.parametrize("session", [lambda m: regard.record(m, "entropy"), lambda m: regard.intervene(m, Triple())])
def test_what_has_no_values_is_refused(run, session):
    model, _ = build("llama", "eager")
    want = first(model(input_ids=ids(3)))
    with pytest.raises(regard.UnreachableAttention, match=r"the model runs under .*leave the block"), session(model):
        run(model)
    assert is_clean(model)
    assert torch.equal(first(model(input_ids=ids(3))), want)
