"""What interventions change beside attention: each acts where it is asked to, or is refused."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from families import build
from ways import is_clean

import regard

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


class Append:
    def __init__(self, n, value=1.0):
        self.n, self.value = n, value

    def appended(self, site, hidden):
        return hidden.new_full((len(hidden), self.n, hidden.shape[-1]), self.value)


class Given:
    def given(self, inputs):
        return inputs | ({"input_ids": inputs["input_ids"] + 1} if "input_ids" in inputs else {})


class Quieter:
    def __init__(self, by):
        self.by = by

    def output(self, call, output):
        return output * self.by


class Guide:
    def __init__(self, by=0.0):
        self.aside = Quieter(by)

    def guided(self, output, other):
        return output + 0.5 * (output - other)


class Neurons:
    def neurons(self, site, activations):
        return activations


@torch.no_grad()
def test_tokens_that_nested_blocks_append_are_gone_before_the_tower_pools():
    torch.manual_seed(0)
    model = t.SiglipVisionModel(t.SiglipVisionConfig(**SIZES, image_size=16, patch_size=4)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with regard.intervene(model, Append(1), Append(2, -0.5)):
        expected = model(pixels)
    with regard.intervene(model, Append(1)), regard.intervene(model, Append(2, -0.5)):
        found = model(pixels)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    assert not torch.allclose(found.pooler_output, model(pixels).pooler_output, atol=1e-3)
    assert is_clean(model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["swin", "sam"])
def test_nothing_is_appended_to_what_lies_over_a_picture(name):
    if name == "swin":
        sizes = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
        model = t.SwinModel(t.SwinConfig(image_size=32, patch_size=4, **sizes)).eval()
    else:
        sizes = {"window_size": 2, "global_attn_indexes": [1], "output_channels": 16, "mlp_dim": 48}
        model = t.SamVisionModel(t.SamVisionConfig(**SIZES, image_size=32, patch_size=8, **sizes)).eval()
    pixels = torch.randn(1, 3, 32, 32)
    plain = model(pixels).last_hidden_state
    with regard.intervene(model, Append(2)), pytest.raises(regard.UnreachableAttention, match="over the picture"):
        model(pixels)
    assert torch.equal(model(pixels).last_hidden_state, plain)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_what_generate_is_given_by_position_is_changed(family):
    model, inputs = build(family)
    ids = inputs["input_ids"]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(ids), "output_scores": True, "return_dict_in_generate": True}
    expected, plain = (model.generate(given, **options).scores[0] for given in (ids + 1, ids))
    assert not torch.equal(expected, plain)
    with regard.intervene(model, Given()):
        assert torch.equal(model.generate(ids, **options).scores[0], expected)
        assert torch.equal(model.generate(inputs=ids, **options).scores[0], expected)
        assert torch.equal(model.generate(input_ids=ids, **options).scores[0], expected)
        with pytest.raises(ValueError, match="inputs"):
            model.generate(ids, input_ids=ids, **options)


@torch.no_grad()
def test_a_guided_model_shares_no_cache_with_its_other_run():
    model, inputs = build("llama")
    ids, options = inputs["input_ids"], {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with regard.intervene(model, Guide()):
        with pytest.raises(ValueError, match="given a cache, in which both runs"):
            model.generate(ids, **options)
        steps = model.generate(ids, use_cache=False, **options)
        assert torch.equal(model(steps[:, :-1]).logits[:, -1].argmax(-1), steps[:, -1])
    assert is_clean(model)


@torch.no_grad()
def test_two_guides_each_have_their_own_other_run():
    model, inputs = build("llama")
    expected = model(**inputs).logits
    for by in (0.2, 0.7):
        with regard.intervene(model, Quieter(by)):
            expected = Guide().guided(expected, model(**inputs).logits)
    with regard.intervene(model, Guide(0.2), Guide(0.7)):
        torch.testing.assert_close(model(**inputs).logits, expected)
    outer, inner = regard.intervene(model, Guide(0.2)), regard.intervene(model, Guide(0.7))
    with outer, regard.record(model, "entropy") as recording, inner:
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    assert len(recording) == 1


@torch.no_grad()
def test_a_tower_in_a_model_can_be_appended_to():
    """Its layers are handed numbers that are meant for others."""
    vision = t.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)
    text = t.LlamaConfig(**SIZES, vocab_size=99)
    config = t.LlavaConfig(text_config=text, vision_config=vision, image_token_id=98)
    model = t.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 98, 98, 98, 98, 5, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 16, 16)}
    plain = model(**inputs).logits
    append = Append(2)
    append.appended = lambda site, hidden: (
        Append.appended(append, site, hidden) if site.stack == "vision_tower" else None
    )
    with regard.intervene(model, append), regard.record(model, "entropy") as recording:
        assert not torch.allclose(model(**inputs).logits, plain)
    assert recording.tree["vision_tower"].sizes["key"] == 7


def test_neurons_of_chunks_of_a_sequence_are_refused():
    model = t.BertModel(t.BertConfig(**SIZES, vocab_size=99, chunk_size_feed_forward=5)).eval()
    match = "chunk_size_feed_forward=0"
    with pytest.raises(regard.UnreachableAttention, match=match), regard.intervene(model, Neurons()):
        pass
