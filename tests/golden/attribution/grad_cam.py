"""Maps of one layer, enlarged to pixels."""

import torch
from torch.nn.functional import interpolate

from regard.attribution.grad_cam import grad_cam

from .. import Case, Source
from ._vision import classifier

SOURCE = Source("reimplementation", "TorchRay, and jacobgil/pytorch-grad-cam for vision transformers")


def compare(case: Case):
    model, pixels = classifier(case), case["pixel_values"]
    with torch.no_grad():
        logits = model(pixels).logits
    given = grad_cam(model, {"pixel_values": pixels}, case.settings["target"], layer=case.settings["layer"])
    theirs = case.get("map_enlarged")
    if theirs is None:
        theirs = interpolate(case["map"][:, None], pixels.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return {"logits": logits, "map": (given.values, theirs)}
