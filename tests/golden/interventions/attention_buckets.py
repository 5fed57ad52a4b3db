"""Runs merged by how sure they are, the wave of each base, and its frequencies."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from regard.interventions.attention_buckets import attention_buckets, rebased, wave

from .. import Case, Source

SOURCE = Source("authors", "AlibabaResearch/DAMO-ConvAI, attention-buckets")
TOLERANCE = {"wave": 1e-8}


def compare(case: Case):
    settings, (first, *others) = case.settings, case["logits"]
    method = object.__new__(attention_buckets)
    method.branches = [type("Fixed", (), {"logits": lambda self, ids, said=said: said[None]})() for said in others]
    bases = settings["bases"]
    dim = settings["rotary_dim"]
    config = LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        hidden_size=dim,
        intermediate_size=4,
        vocab_size=8,
        rope_parameters={"rope_type": "default", "rope_theta": float(bases[0])},
    )
    model = LlamaForCausalLM(config)
    frequencies = []
    for base in bases:
        with rebased(model, base / bases[0]):
            frequencies.append(_frequencies(model))
    return {
        "output": method(torch.zeros(1, 1, dtype=torch.long), first[None]),
        "wave": torch.stack([wave(case["distance"], base=base, dim=settings["wave_dim"]) for base in bases]),
        "frequencies": torch.stack(frequencies),
    }


def _frequencies(model: nn.Module) -> torch.Tensor:
    return next(b for name, b in model.named_buffers() if name.endswith("rotary_emb.inv_freq")).clone()
