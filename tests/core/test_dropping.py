"""Tokens that leave a model at a layer: as if no other saw them from there on, in smaller caches."""

from __future__ import annotations

import families
import pytest
import torch
import transformers as t
from ways import is_clean

import regard
from regard.adapters.dropping import Shortened

LAYER = 1
STACKS = ("language_model", "decoder", "encoder")  # OPT's layers are called a decoder, though nothing else is there


class Drop:
    """These positions leave at a layer."""

    def __init__(self, gone, layer=LAYER):
        self.gone, self.layer = gone, layer

    def keeps(self, site, hidden, positions):
        if site.stack not in STACKS or site.layer != self.layer or hidden.shape[1] == 1:
            return None
        gone = torch.nn.functional.pad(self.gone, (0, max(0, int(positions.max()) + 1 - self.gone.shape[1])))
        return ~gone.repeat_interleave(len(hidden) // len(gone), 0).gather(1, positions)


class Hide(Drop):
    """Nothing sees these positions from a layer on, but they themselves."""

    def weights(self, call, weights, rows):
        if call.site.stack not in STACKS or call.site.layer < self.layer:
            return weights
        n = call.key.shape[2]
        gone = torch.nn.functional.pad(self.gone, (0, max(0, n - self.gone.shape[1])))[:, :n]
        own = torch.arange(n)[None] == (call.query_start + torch.arange(rows.start, rows.stop))[:, None]
        gone = gone.repeat_interleave(len(weights) // len(gone), 0)
        weights = weights * (~gone[:, None, None] | own)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)

    keeps = property()  # it has none


def gone(inputs, *spans):
    """Positions of each row, as ranges."""
    found = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, span in zip(found, spans):
        row[list(span)] = True
    return found


def deep(name, implementation="sdpa"):
    if name == "opt":
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 48}
        config = t.OPTConfig(**sizes, vocab_size=99, word_embed_proj_dim=32, max_position_embeddings=64)
        config._attn_implementation = implementation
        return t.OPTForCausalLM(config).eval(), {"input_ids": torch.arange(24).reshape(2, 12) + 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.GROUPED, "num_hidden_layers", 4)
        return families.build(name, implementation)


def padded(inputs, by):
    """The first row with padding before it, by leaving out its own first tokens' sight."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :by] = 0
    return inputs | {"attention_mask": mask}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "llama", "gpt2", "qwen3", "opt"])
@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_the_others_are_as_if_they_did_not_see_those_that_left(family, implementation, layer):
    model, inputs = deep(family, implementation)
    layer = 0 if layer == 0 else 1
    which = gone(inputs, [4, 5, 7], [4, 6, 7])
    with regard.intervene(model, Hide(which, layer)):
        expected = model(**inputs, use_cache=False).logits
    plain = model(**inputs).logits
    with regard.intervene(model, Drop(which, layer)):
        found = model(**inputs)
    assert found.logits.shape == expected.shape
    assert torch.allclose(found.logits[~which], expected[~which], atol=1e-4)
    assert not torch.allclose(found.logits[~which], plain[~which], atol=1e-3)
    cache = found.past_key_values
    n = inputs["input_ids"].shape[1]
    assert [layer.keys.shape[2] for layer in cache.layers] == [n] * layer + [n - 3] * (len(cache.layers) - layer)
    assert cache.get_seq_length() == n
    assert is_clean(model)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gpt2", "opt"])
@pytest.mark.parametrize("uneven", [False, True])
@torch.no_grad()
def test_it_generates_as_each_row_alone_without_a_cache(family, uneven):
    model, inputs = deep(family)
    inputs = padded(inputs, 1) if family != "qwen2_vl" else inputs
    which = gone(inputs, [3, 4], [4, 5, 6] if uneven else [5, 6])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    with regard.intervene(model, Drop(which)):
        found = model.generate(**inputs, **options)
        beams = model.generate(**inputs, **(options | {"num_beams": 2}))
    assert all(isinstance(layer, Shortened) for layer in found.past_key_values.layers[LAYER:])
    with regard.intervene(model, Hide(which)):
        expected = model.generate(**inputs, **options)
        more = model.generate(**inputs, **(options | {"num_beams": 2}))
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(beams.sequences, more.sequences)
    assert torch.allclose(torch.stack(found.scores), torch.stack(expected.scores), atol=1e-4)


@torch.no_grad()
def test_tokens_leave_at_several_layers_and_others_see_what_is_left():
    model, inputs = deep("llava")
    first, second = gone(inputs, [4, 5], [5]), gone(inputs, [8], [2, 9, 10])
    seen = {}

    class Look:
        def inputs(self, call):
            if call.site.stack == "language_model":
                seen[call.site.layer] = call.tokens.role("image").sum(1).tolist(), call.positions, call.key.shape[2]
            return call

    with regard.intervene(model, Drop(first, 1), Drop(second, 2), Look()), regard.record(model, "entropy") as recording:
        found = model(**inputs).logits
    with regard.intervene(model, Hide(first, 1), Hide(second, 2)):
        expected = model(**inputs).logits
    left = ~(first | second)
    assert torch.allclose(found[left], expected[left], atol=1e-4)
    n = inputs["input_ids"].shape[1]
    assert [seen[layer][0] for layer in range(4)] == [[16, 16], [14, 15], [13, 12], [13, 12]]
    assert [seen[layer][2] for layer in range(4)] == [n, n - 1, n - 3, n - 3]
    assert seen[0][1] is None
    assert seen[1][1][0].tolist() == [i for i in range(n) if i != 5]  # the second token that left fills the row up
    layers = recording.tree["language_model"]["entropy"]
    assert layers.layer.values.tolist() == [0]  # what layers do that not all came to is left out


@torch.no_grad()
def test_a_cache_is_cropped_and_read_on():
    model, inputs = deep("llama")
    which = gone(inputs, [4, 5], [4, 6])
    with regard.intervene(model, Drop(which)):
        cache = model(**inputs).past_key_values
        token = torch.tensor([[7], [8]])
        once = model(token, past_key_values=cache).logits
        cache.crop(-1)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        assert torch.allclose(model(token, past_key_values=cache).logits, once, atol=1e-5)
        with pytest.raises(ValueError, match="cannot be cropped to 6 positions"):
            cache.crop(-(cache.get_seq_length() - 6))


def test_what_cannot_be_done_is_refused_and_the_model_left():
    model, inputs = deep("llama")
    last = inputs["input_ids"].shape[1] - 1
    bad = Drop(gone(inputs, [last], [3]))
    with pytest.raises(ValueError, match="drops the last token of a row at language_model layer 1"):
        run(model, inputs, bad)
    bad = Drop(gone(inputs, [3], [3]))
    bad.keeps = lambda site, hidden, positions: torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"must return a boolean tensor \[2, 12\]"):
        run(model, inputs, bad)
    model, inputs = families.build("mistral")
    with pytest.raises(regard.UnreachableAttention, match="DynamicSlidingWindowLayer"):
        run(model, inputs, Drop(gone(inputs, [3], [3])))
    assert is_clean(model)


def run(model, inputs, thing):
    with torch.no_grad(), regard.intervene(model, thing):
        return model(**inputs)


def test_tokens_that_could_not_leave_are_refused():
    model, _ = deep("llama")
    drop = Drop(torch.zeros(2, 12, dtype=torch.bool))
    for inner in (Drop(drop.gone), type("More", (), {"appended": lambda *_: None})()):
        match = "give both to one block"
        with regard.intervene(model, drop), pytest.raises(RuntimeError, match=match), regard.intervene(model, inner):
            pass
    assert is_clean(model)
    shared, inputs = families.build("albert")
    for layer in (0, 1):
        drop, match = Drop(gone(inputs, [4], [4]), layer), "one module, run several times"
        with regard.intervene(shared, drop), pytest.raises(regard.UnreachableAttention, match=match), torch.no_grad():
            shared(**inputs)
    assert is_clean(shared)
