"""Vectors of frames, scores of actions, the loss, and gradients of characters and positions."""

import torch
from torch.nn import functional as F

from regard.models.recurrence_complete import recurrence_complete

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "mikex86/fbamtrain, toyimpl/src/model.py")
NAMES = {
    "head.codepoint_embed": "head.characters",
    "head.position_embed": "head.positions",
    "head.downsample_blocks.": "head.halved.",
    "start.h0": "hidden",
    "start.c0": "cell",
    "attn.c_attn": "attention.maps",
    "attn.c_proj": "attention.out",
    "mlp.c_fc": "mlp.0",
    "mlp.c_proj": "mlp.2",
    "ln_2": "norm_mlp",
    "ln_1": "norm",
}


def compare(case: Case):
    settings, state, cells = case.settings, {}, case["cells"]
    if settings.get("rms_norm_eps", 1e-5) != 1e-5:
        raise Unmapped(f"an epsilon of {settings['rms_norm_eps']}")
    for name, value in case.weights.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = value
    for ours, theirs in (("ink", "fg"), ("ground", "bg")):
        state[f"head.{ours}"] = torch.stack([state.pop(f"head.{theirs}_{c}_embed") for c in "rgb"])
    model = recurrence_complete(
        vocabulary=settings["vocabulary"],
        rows=cells.shape[2],
        columns=cells.shape[3],
        dim=case["frames"].shape[-1],
        layers=settings["layers"],
        heads=settings["heads"],
        downsample=settings["downsample_blocks"],
        conv=settings["conv"],
        dilation=settings["dilation"],
        reduction=settings["reduction"],
        actions=case["logits"].shape[-1],
    )
    model.load_state_dict(state)
    frames = model.head(cells)
    logits = model(cells)
    loss = F.cross_entropy(logits.flatten(0, 1), case["target"].flatten())
    leaves = {"codepoint_embed": model.head.characters, "position_embed": model.head.positions}
    return {"frames": frames, "logits": logits, "loss": loss, **case.gradients(loss, leaves)}
