"""Weights contrasted and fused; and the picture masked and cut by theirs, fused. Sizes are of width and height."""

import numpy as np
from PIL import Image

from regard.interventions._picture import spread
from regard.interventions.carve import contrast, refine, summed

from .. import Case, Source

SOURCE = Source("authors", "YuyaoGe/CARVE, AttentionProcessor and the masking of carve/masking.py")
STEPS = {"all": "all", "first": "first"}


def compare(case: Case):
    settings = case.settings
    among = settings["layers"]
    ratio = contrast(case["task"][:, among], case["general"][:, among], lam=settings["lam"])
    patches = summed(ratio, STEPS.get(settings["step_mode"], "equal")).unflatten(0, settings["grid"])
    fused = spread(patches.numpy(), tuple(settings["image_size"]))
    refined = refine(
        Image.fromarray(case["image"].numpy()),
        case["fused"].numpy(),
        top=settings["top_percent"],
        regions=settings["min_keep_regions"],
        strategy=settings["strategy"],
    )
    return {
        "fused": fused,
        "mask": refined.mask.astype(np.uint8),
        "masked_image": np.array(refined.masked),
        "box": np.array(refined.box),
        "crop": np.array(refined.crop),
    }
