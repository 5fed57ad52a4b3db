"""Models that are fuzzed beside those of tests/families.py: more of the kinds in which attention differs."""

from __future__ import annotations

from collections.abc import Callable

import transformers as t
from families import ENCODER_DECODER, GROUPED, NO_IDS, SIZES, VISION, VOCAB, Built, pixels, text

THREE = {**GROUPED, "num_hidden_layers": 3}
EXPERTS = {**GROUPED, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8}


def mixtral() -> Built:
    return t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=3, **NO_IDS)), text()


def qwen3_moe() -> Built:
    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**EXPERTS, num_experts=4, **NO_IDS)), text()


def olmoe() -> Built:
    return t.OlmoeForCausalLM(t.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2, **NO_IDS)), text()


def lfm2() -> Built:
    """Short convolutions between attention."""
    config = t.Lfm2Config(**THREE, layer_types=["conv", "full_attention", "full_attention"], block_ff_dim=32, **NO_IDS)
    return t.Lfm2ForCausalLM(config), text()


def qwen3_next() -> Built:
    """Linear attention between attention, and experts."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    linear |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention", "full_attention"]}
    config = t.Qwen3NextConfig(
        **{**EXPERTS, **THREE}, **linear, num_experts=4, shared_expert_intermediate_size=16, **NO_IDS
    )
    return t.Qwen3NextForCausalLM(config), text()


def mbart() -> Built:
    config = t.MBartConfig(**ENCODER_DECODER, max_position_embeddings=64)
    return t.MBartForConditionalGeneration(config), {**text(), "decoder_input_ids": text(n=5)["input_ids"]}


def pegasus() -> Built:
    config = t.PegasusConfig(**ENCODER_DECODER, max_position_embeddings=64)
    return t.PegasusForConditionalGeneration(config), {**text(), "decoder_input_ids": text(n=5)["input_ids"]}


def marian() -> Built:
    config = t.MarianConfig(**ENCODER_DECODER, max_position_embeddings=64, pad_token_id=0, decoder_start_token_id=0)
    return t.MarianMTModel(config), {**text(), "decoder_input_ids": text(n=5)["input_ids"]}


def t5gemma() -> Built:
    part = {**GROUPED, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    config = t.T5GemmaConfig(
        encoder=t.T5GemmaModuleConfig(**part, attn_logit_softcapping=None),
        decoder=t.T5GemmaModuleConfig(**part, attn_logit_softcapping=None, cross_attention_hidden_size=32),
        vocab_size=VOCAB,
    )
    return t.T5GemmaForConditionalGeneration(config), {**text(), "decoder_input_ids": text(n=5)["input_ids"]}


def dinov2() -> Built:
    sizes = {name: n for name, n in VISION.items() if name != "intermediate_size"}
    return t.Dinov2ForImageClassification(t.Dinov2Config(**sizes)), pixels()


def deit() -> Built:
    return t.DeiTForImageClassification(t.DeiTConfig(**VISION)), pixels()


def roberta() -> Built:
    return t.RobertaForMaskedLM(t.RobertaConfig(**SIZES, pad_token_id=0, max_position_embeddings=64)), text()


MORE: dict[str, Callable[[], Built]] = {
    f.__name__: f
    for f in (
        mixtral,
        qwen3_moe,
        olmoe,
        lfm2,
        qwen3_next,
        mbart,
        pegasus,
        marian,
        t5gemma,
        dinov2,
        deit,
        roberta,
    )
}
MIXED = {"mixtral", "qwen3_moe", "olmoe"}  # experts, and attention in all layers
HYBRID = {"lfm2", "qwen3_next"}  # attention in some
PAIRED = {"mbart", "pegasus", "marian", "t5gemma"}
