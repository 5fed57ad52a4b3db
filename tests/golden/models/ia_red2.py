"""Scores, what is kept and the tokens after each group, in the masked form."""

import torch
from transformers import ViTConfig, ViTForImageClassification

from regard.models.ia_red2 import IaRed2, chosen

from .. import Case, Source

SOURCE = Source("authors", "IA-RED^2's model file, from a copy of it")
NAMES = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def compare(case: Case):
    settings, tokens, weights = case.settings, case["tokens"], case.weights
    groups, dim = settings["groups"], tokens.shape[-1]
    config = ViTConfig(
        hidden_size=dim,
        num_hidden_layers=sum(groups),
        num_attention_heads=settings["heads"],
        intermediate_size=weights["group0.block_list.0.mlp.0.bias"].numel(),
        layer_norm_eps=1e-6,
        image_size=4,
        patch_size=2,
    )
    model = IaRed2(ViTForImageClassification(config).eval(), groups, heads=settings["interpreter_heads"])
    at = 0
    for g, size in enumerate(groups):
        for name in ("weight", "bias"):
            value = weights[f"group{g}.agent.qk.{name}"]
            getattr(model.interpreters[g].query_key, name).data = value[: 2 * dim]
        for i in range(size):
            start = f"group{g}.block_list.{i}."
            state = {}
            for name in ("weight", "bias"):
                for part, value in zip("qkv", weights[f"{start}attn.qkv.{name}"].chunk(3), strict=True):
                    state[f"attention.{part}_proj.{name}"] = value
                for theirs, ours in NAMES.items():
                    state[f"{ours}.{name}"] = weights[f"{start}{theirs}.{name}"]
            model.vit.vit.layers[at].load_state_dict(state)
            at += 1
    found: dict[str, torch.Tensor] = {}
    stages = model.stages(tokens, lambda _, scores, alive: chosen(scores, alive), form="masked")
    for g, stage in enumerate(stages):
        found |= {
            f"group{g}.scores": stage.scores,
            f"group{g}.policy": stage.kept.float(),
            f"group{g}.output": stage.tokens,
        }
    return found
