"""Logits, attention, maps and their gradients; logits with heads blurred, and the ranking of heads."""

import torch
import transformers as t
from torch.nn import functional as F

import regard
from regard.attribution.prompt_cam import Blur, PromptCAM, head_maps, rank_heads

from .. import Case, Source
from .._models import loaded

SOURCE = Source("authors", "Imageomics/Prompt_CAM: vision_transformer, vpt, attention")
NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm1": "layernorm_before",
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "norm": "layernorm",
}


def compare(case: Case):
    settings = case.settings
    config = t.ViTConfig(
        hidden_size=settings["dim"],
        num_hidden_layers=settings["depth"],
        num_attention_heads=settings["heads"],
        intermediate_size=settings["dim"] * settings["mlp_ratio"],
        image_size=settings["image"],
        patch_size=settings["patch"],
        layer_norm_eps=settings["norm_eps"],
        hidden_act=settings["act"],
        qkv_bias=settings["qkv_bias"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    backbone = loaded(t.ViTModel(config, add_pooling_layer=False), dict(_renamed(case.weights)))
    model = PromptCAM(backbone, [str(i) for i in range(settings["classes"])]).eval()
    with torch.no_grad():
        model.prompts.copy_(case.weights["vpt.prompt_embeddings"])
    model.head.load_state_dict({k: case.weights[f"head.{k}"] for k in ("weight", "bias")})

    inputs, target = {"pixel_values": case["pixel_values"]}, settings["target"]
    of_each = torch.full((len(case["pixel_values"]),), target)
    with regard.record(model, "rows") as recording:
        logits = model(**inputs).logits
    loss = F.cross_entropy(logits, of_each)
    loss.backward()
    blurred = torch.zeros(len(of_each), settings["heads"], dtype=torch.bool)
    blurred[:, settings["blurred"]] = True
    with torch.no_grad(), regard.intervene(model, Blur(of_each, blurred)):
        logits_blurred = model(**inputs).logits
    ranked = rank_heads(model, {"pixel_values": case["pixel_values"][:1]}, target)[0]
    (stack,) = recording.tree.children.values()
    return {
        "logits": logits,
        "loss": loss,
        "attention": stack["rows"].values[:, -1],
        "maps": (head_maps(model, inputs, target).values.reshape(*case["maps"].shape), case["maps"]),
        "grad.prompts": model.prompts.grad,
        "grad.head.weight": model.head.weight.grad,
        "logits_blurred": logits_blurred,
        "ranking": ranked.values,
        "ranking_probabilities": ranked.probability.values,
    }


def _renamed(weights):
    for name, value in weights.items():
        if name.startswith(("vpt.", "head.")):
            continue
        parts = name.removeprefix("blocks.")
        start = f"layers.{parts.split('.')[0]}." if name.startswith("blocks.") else ""
        parts = parts.partition(".")[2] if start else parts
        body, dot, kind = parts.rpartition(".") if parts.endswith(("weight", "bias")) else (parts, "", "")
        if body == "attn.qkv":
            for letter, part in zip("qkv", value.chunk(3)):
                yield f"{start}attention.{letter}_proj.{kind}", part
        else:
            yield f"{start}{NAMES.get(body, body)}{dot}{kind}", value
