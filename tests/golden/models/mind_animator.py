"""The generator of motion under a mask, with the gradient of its latents; and how much their masks show."""

import torch

from regard.models.mind_animator import FRAMES_SEEN, MindAnimatorConfig, MotionGenerator

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "ReedOnePeck/MindAnimator, models/CMG_model_with_more_patchsize.py")
NAMES = {
    "frame_embedder.proj.": "embed.",
    "fMRI_to_spatial.1.": "signal.1.",
    "temporal_attention.": "",
    "spatial_attention.linears.2.": "value.",
    "spatial_attention.linears1.": "out.",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.2.",
    "final_layer.linear.": "pixels.",
}
UNUSED = "spatial_attention.linears.0.", "spatial_attention.linears.1."  # all keys are alike


def compare(case: Case):
    settings, weights, leaves = case.settings, case.weights, case.leaves("latents")
    if settings.get("norm_eps", 1e-6) != 1e-6:
        raise Unmapped(f"an epsilon of {settings['norm_eps']}")
    _, frames, channels, size, _ = leaves["latents"].shape
    config = MindAnimatorConfig(
        voxels=case["signal"].shape[1],
        frames=frames + 1,
        channels=channels,
        size=size,
        patch=settings["patch"],
        width=weights["pos_embed"].shape[-1],
        depth=settings["depth"],
        heads=settings["heads"],
        hidden=weights["blocks.0.mlp.fc1.weight"].shape[0],
        ratio=settings["mask_ratio"],
    )
    model, state = MotionGenerator(config), {}
    for name, value in weights.items():
        if any(part in name for part in UNUSED) or name.endswith("_embed"):
            continue
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = value
    model.load_state_dict(state)
    waves = {"places": (model.places, weights["pos_embed"][0]), "times": (model.times, weights["time_embed"][0])}
    model.places, model.times = weights["pos_embed"][0], weights["time_embed"][0]
    mask = case["mask"].bool()
    output = model(leaves["latents"], case["signal"], mask=mask[0] if len(mask) == 1 else mask[:, None])
    found = {"output": output, **waves, **case.gradients(output.square().sum(), leaves)}
    masks = case["masks"].bool()
    rule = torch.ones_like(masks[0]).tril()
    assert (masks <= rule).all()
    assert (masks[:, :FRAMES_SEEN] == rule[:FRAMES_SEEN]).all()
    assert masks[..., 0].all()
    return found
