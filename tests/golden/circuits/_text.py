"""The language models of the files, with their weights."""

import transformers as t
from torch import nn

from .. import Case
from .._models import loaded


def decoder(case: Case) -> nn.Module:
    settings = case.settings
    if settings["model"] == "llama":
        config = t.LlamaConfig(
            num_hidden_layers=settings["layers"],
            num_attention_heads=settings["heads"],
            num_key_value_heads=case.weights["model.layers.0.self_attn.k_proj.weight"].shape[0]
            * settings["heads"]
            // case.weights["model.layers.0.self_attn.q_proj.weight"].shape[0],
            hidden_size=settings["dim"],
            intermediate_size=settings["intermediate"],
            vocab_size=settings["vocab"],
            max_position_embeddings=settings["positions"],
            tie_word_embeddings="lm_head.weight" not in case.weights,
            attn_implementation="eager",
        )
        return loaded(t.LlamaForCausalLM(config), case.weights)
    config = t.GPT2Config(
        n_layer=settings["layers"],
        n_head=settings["heads"],
        n_embd=settings["dim"],
        n_inner=settings["intermediate"],
        vocab_size=settings["vocab"],
        n_positions=settings["positions"],
        attn_implementation="eager",
    )
    return loaded(t.GPT2LMHeadModel(config), case.weights)
