"""Models whose layout a conversion cannot take are refused by name, with what it can take, and left as they are."""

from __future__ import annotations

import inspect

import pytest
import torch
from families import ENCODER_DECODER, SIZES, VISION, pixels, text
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
)

from regard import mechanisms
from regard.conversion import convert

CONVERSIONS = mechanisms.conversions()
NEEDED = {
    "deconstructed": {"variant": "running"},
    "diffqkv": {"key_heads": 1},
    "ninformer": {"tokens": 12},
    "position_only": {"tokens": 12},
    "routing": {"clusters": 3},
    "sparsifiner": {"tokens": 12},
    "twins": {"shape": (4, 4)},
    "varied_size_window": {"shape": (4, 4)},
}


def kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_output_projections_elsewhere(name):
    model, knobs = BertModel(BertConfig(**SIZES)), NEEDED.get(name, {})
    before, given = kinds(model), text() if "inputs" in inspect.signature(CONVERSIONS[name]).parameters else None
    with pytest.raises(ValueError, match=r"BertModel (is not a decoder like|has no)"):
        convert(model, name, inputs=given, **knobs)
    assert kinds(model) == before


def test_what_attention_there_is_and_what_is_taken():
    with pytest.raises(
        ValueError, match=r"mega: BertModel has no module .*BertSelfAttention have it elsewhere.*as in Llama"
    ):
        convert(BertModel(BertConfig(**SIZES)), "mega")


@pytest.mark.parametrize("name", ["twins", "varied-size-window"])
def test_a_class_token_has_no_place_in_a_window(name):
    with pytest.raises(ValueError, match=r"ViTForImageClassification has vit.embeddings.cls_token.*as Siglip's"):
        convert(ViTForImageClassification(ViTConfig(**VISION)), name, shape=(4, 4))


def test_cross_attention_is_not_taken_for_self_attention():
    model = BartModel(BartConfig(**ENCODER_DECODER))
    convert(model, "chela", z=8)
    with pytest.raises(ValueError, match=r"in place of BartAttention, key_value_states cannot be taken in"):
        model(**text(), use_cache=False)


@pytest.mark.parametrize("name", ["dynamic_mask", "routing", "sea"])
def test_what_is_added_to_scores_is_not_taken_for_a_mask(name):
    model = SwinModel(SwinConfig(image_size=16, embed_dim=8, depths=[1], num_heads=[2], window_size=2))
    convert(model, name, **NEEDED.get(name, {}))
    with pytest.raises(ValueError, match=r"takes a boolean mask .*SwinAttention hands on torch.float32, to be added"):
        model(**pixels())


def test_layers_of_other_tokens_send_no_messages():
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
    model = SwinModel(SwinConfig(**sizes, window_size=2))
    convert(model, "dependency-vit")
    with pytest.raises(ValueError, match="all layers of a model have to have the same tokens"), torch.no_grad():
        model(**pixels())


def test_an_operator_goes_in_without_a_conversion():
    with pytest.raises(KeyError, match=r"set_attn_implementation\('regard:agent-attention'\)"):
        convert(torch.nn.Linear(3, 3), "agent_attention")
