"""Tokens and predictions; the authors' hemispheres are the first and the second half of our regions."""

import torch

from regard.gaze.brain_encoder import BrainEncoder, BrainEncoderConfig

from .. import Case, Source

SOURCE = Source("authors", "Hosseinadeli/transformer_brain_encoder, models/brain_encoder.py")
KINDS = {"transformer": "transformer", "custom_transformer": "custom", "custom": "custom", "spatial_feature": "spatial"}
NAMES = {
    "transformer.decoder.norm.": "norm.",
    "query_embed.": "queries.",
    "spatial_embed.": "maps.",
    "multihead_attn.": "attention.",
    "cross_attn.q_proj.": "query.",
    "cross_attn.k_proj.": "key.",
    "cross_attn.c_proj.": "out.",
    "linear1.": "up.",
    "linear2.": "down.",
    "norm1.": "norm_query.",
    "norm3.": "norm_token.",
    "transformer.decoder.": "",
}


def _name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def compare(case: Case):
    settings, weights = case.settings, case.weights
    kind = KINDS[settings["arch"]]
    readings = [weights.pop(f"{side}_embed.0.weight") for side in ("lh", "rh")]
    biases = [weights.pop(f"{side}_embed.0.bias") for side in ("lh", "rh")]
    left, right = map(len, readings)
    leaves = case.leaves("features")
    features = leaves["features"]
    regions = len(weights["spatial_embed.weight" if kind == "spatial" else "query_embed.weight"])
    by_voxel, by_hemisphere = settings["readout"] == "voxels", settings["readout"] == "hemis"
    hemisphere = torch.arange(left + right) >= left
    first = left if by_voxel else regions // 2  # regions of the left hemisphere
    own = torch.where(hemisphere, first, 0) if not by_voxel else torch.arange(left + right)
    up = weights.get("transformer.decoder.layers.0.linear1.weight", torch.zeros(1, 1))
    model = BrainEncoder(
        BrainEncoderConfig(
            dim=features.shape[1],
            regions=regions,
            voxels=left + right,
            heads=16 if kind == "custom" else settings["heads"],
            feedforward=len(up),
            layers=settings.get("layers", 1),
            kind=kind,
            places=features[0, 0].numel(),
        ),
        torch.arange(regions)[:, None] == own,
    ).eval()
    state = {_name(name): value for name, value in weights.items()}
    state = {name: value for name, value in state.items() if name in model.state_dict()}  # theirs has unused ones
    state |= {"read.weight": torch.cat(readings), "read.bias": torch.cat(biases), "membership": model.membership}
    model.load_state_dict(state)
    position = case.get("position")
    mask = None if kind == "custom" else case.get("mask")  # theirs does not look at it
    tokens = model.tokens(features, position, mask)
    if by_voxel or by_hemisphere:
        predicted = model(features, position, mask)
        found = {"left": predicted[:, :left], "right": predicted[:, left:]}
    else:
        every = model.read(tokens).mT  # [batch, voxel, region]
        found = {"left": every[:, :left, :first], "right": every[:, left:, first:]}
    loss = sum(one.square().sum() for one in found.values())
    return {"tokens": tokens, **found, **case.gradients(loss, leaves)}
