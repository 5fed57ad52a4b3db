"""One block: the frozen stream, the pathways, and the gradient, which does not reach the frozen stream."""

import torch
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer

from regard.models.multi_lane import SummarisedAttention

from .. import Case, Source

SOURCE = Source("authors", "tdemin16/multi-lane, multi_lane/blocks.py")
NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def compare(case: Case):
    settings, weights, leaves = case.settings, case.weights, case.leaves("x", "tokens")
    sizes = ViTConfig(
        hidden_size=case["x"].shape[-1],
        num_attention_heads=settings["heads"],
        intermediate_size=len(weights["mlp.fc1.bias"]),
        layer_norm_eps=settings["ln_eps"],
        attn_implementation="eager",
    )
    layer = ViTLayer(sizes).to(case["x"].dtype).eval()
    state = {
        f"{NAMES[module]}.{kind}": value
        for name, value in weights.items()
        for module, _, kind in [name.rpartition(".")]
        if module in NAMES
    }
    for kind in ("weight", "bias"):
        for name, part in zip("qkv", weights[f"attn.qkv.{kind}"].chunk(3), strict=True):
            state[f"attention.{name}_proj.{kind}"] = part
    layer.load_state_dict(state)
    replace = settings["drop_and_replace"]
    block = SummarisedAttention(summary=replace or not settings["block"], replace=replace)
    begun = slice(settings["task"] if settings["training"] else 0, settings["task"] + 1)
    lanes = block(layer, leaves["x"], leaves["tokens"], weights["attn.prompts"][:, begun])
    found = torch.autograd.grad(lanes.square().sum(), list(leaves.values()), materialize_grads=True)
    grads = {f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}
    return {"output_x": layer(case["x"]), "output_tokens": lanes, **grads}
