"""Blurred pictures, the spot and its gradient, and whole paths with the authors' random numbers."""

import torch
from torch.nn import functional as F

from regard.gaze.nevaclip import blur, caption_loss, explore, foveated, spot

from .. import Case, Source

SOURCE = Source("authors", "dario-zanca/NevaClip, NeVA.py and utils.py")
KNOBS = ("fovea", "amplitude", "forgetting", "blur_window", "blur_sigma", "fixations", "iterations", "rate")


def compare(case: Case):
    settings, picture, target = case.settings, case["picture"], case["target"]

    def encode(seen):
        return torch.tanh(F.conv2d(seen, case["weight.conv"], stride=4)).flatten(1) @ case["weight.linear"].T

    blurred = blur(picture, window=settings["blur_window"], sigma=settings["blur_sigma"])
    place = case["probe_place"].clone().requires_grad_()
    seen = spot(place, picture.shape[-1], fovea=settings["fovea"], amplitude=settings["amplitude"])
    loss = caption_loss(encode, foveated(picture, blurred, seen), target)
    (gradient,) = torch.autograd.grad(loss.mean(), place)
    found = explore(
        encode,
        picture,
        target,
        lambda fixation, iteration: case["uniform"][fixation, iteration],
        random_restarts=settings["random_restarts"],
        **{name: settings[name] for name in KNOBS},
    )
    return {
        "blurred": blurred,
        "probe_fovea": seen,
        "probe_loss": loss,
        "probe_grad": gradient,
        "path": found.places,
        "losses": found.losses,
    }
