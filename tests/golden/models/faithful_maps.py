"""Maps, masks and losses of the first stage, and what the second makes of a picture under a mask."""

import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTConfig, ViTModel

from regard.models.faithful_maps import (
    FaithfulMaps,
    background,
    chosen,
    entropy,
    orthogonality,
    presence,
    total_variation,
)

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "ananthu-aniraj/ifam, both stages, masking layers and losses")
VIT = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
DINO = {"attn.proj": "attention.o_proj"}
HEADS = {
    "fc_landmarks.weight": "prototypes",
    "modulation": "norm",
    "fc_class_landmarks": "read",
    "fc_norm": "norm",
    "head": "read",
}


def _vit(case: Case, weights: dict[str, torch.Tensor]):
    settings, registers = case.settings, case.settings["registers"]
    dim, pixels = weights["norm.weight"].numel(), case["x"].shape[-1]
    sizes = {
        "hidden_size": dim,
        "num_hidden_layers": settings["depth"],
        "num_attention_heads": settings["heads"],
        "layer_norm_eps": settings["ln_eps"],
        "image_size": pixels,
        "patch_size": settings["patch"],
    }
    inner = weights["blocks.0.mlp.fc1.bias"].numel()
    if registers:
        model = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(
                **sizes, mlp_ratio=inner // dim, num_register_tokens=registers, layerscale_value=1.0
            )
        )
    else:
        model = ViTModel(ViTConfig(**sizes, intermediate_size=inner), add_pooling_layer=False)
    start, parts = ("encoder.layer", DINO) if registers else ("layers", VIT)
    positions = weights["pos_embed"]
    if registers:  # theirs has none for the class token
        positions = torch.cat([torch.zeros(1, 1, dim), positions], 1)
    state = {
        "embeddings.cls_token": weights["cls_token"],
        "embeddings.position_embeddings": positions,
        "layernorm.weight": weights["norm.weight"],
        "layernorm.bias": weights["norm.bias"],
    }
    if registers:
        state["embeddings.register_tokens"] = weights["reg_token"]
    for name in ("weight", "bias"):
        state[f"embeddings.patch_embeddings.projection.{name}"] = weights[f"patch_embed.proj.{name}"]
        for i in range(settings["depth"]):
            theirs, ours = f"blocks.{i}.", f"{start}.{i}."
            for part, value in zip("qkv", weights[f"{theirs}attn.qkv.{name}"].chunk(3), strict=True):
                state[f"{ours}attention.{part}_proj.{name}"] = value
            for of in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2"):
                state[f"{ours}{parts.get(of, of)}.{name}"] = weights[f"{theirs}{of}.{name}"]
    own = dict(model.state_dict())
    missing = own.keys() - state.keys()
    if any("lambda1" not in name and "mask_token" not in name for name in missing):
        raise ValueError(f"not all is given: {sorted(missing)}")
    model.load_state_dict({**own, **state})
    return model


def compare(case: Case):
    settings = case.settings
    if settings["mode"] != "eval":
        raise Unmapped("noise of training is drawn inside")
    stages = {
        stage: {n.removeprefix(f"{stage}."): w for n, w in case.weights.items() if n.startswith(f"{stage}.")}
        for stage in ("first", "second")
    }
    classes = len(stages["second"]["head.weight"])
    vits = [_vit(case, weights) for weights in stages.values()]
    model = FaithfulMaps(*vits, classes=classes, parts=settings["parts"], tau=settings["temperature"]).eval()
    for stage, weights in stages.items():
        for name, value in weights.items():
            part, _, kind = name.rpartition(".")
            if ours := HEADS.get(name) or (part in HEADS and f"{HEADS[part]}.{kind}"):
                model.get_parameter(f"{stage}.{ours}").data = value.flatten(2)[..., 0] if value.ndim == 4 else value
    x, grid = case["x"], case["hard"].shape[-2:]
    found = model.first(x)
    choice = chosen(found.logits, noise=case["noise"], tau=settings["temperature"])
    both = torch.stack([choice.mask, ~choice.mask], 1).float()
    mask, soft = case["mask"].unflatten(-1, grid), case["soft_mask"].unflatten(-1, grid)
    seen = model.second(x, mask > 0.5)
    changed = model.second(case["changed_x"], mask > 0.5)
    assert torch.equal(seen, changed)
    return {
        "maps": found.maps,
        "features": found.features,
        "scores": found.scores,
        "hard": both,
        "soft": choice.shares,
        "output": seen,
        "weighed_output": (model.second(x, mask), case["output"]),
        "changed_output": changed,
        "soft_output": model.second(x, soft),
        "loss.entropy": entropy(case["maps"]),
        "loss.orthogonality": orthogonality(found.features),
        "loss.presence": presence(case["maps"]),
        "loss.total_variation": total_variation(case["maps"]),
        "loss.background": background(case["maps"]),
    }
