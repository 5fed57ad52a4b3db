"""The maps of CLIP and of LLaVA, softened and laid over a picture, and the parts of CLIP that the first is made of."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from regard.interventions._look import of_picture
from regard.interventions.attention_prompting import blended, heat, projected, soften, to_class

from .. import Case, Source

SOURCE = Source("authors", "yu-rp/apiprompting, API_CLIP/main.py and hook.py, API_LLaVA/hook.py")


def compare(case: Case):
    settings = case.settings
    how = {"coe": settings["enhance"], "kernel": settings["kernel_size"]}
    found = {}
    if "mask" in case:
        found["mask"] = heat(case["cls_map"], case["patch_map"], **how)
    if "attention_mask" in case:
        found["attention_mask"] = soften(case["attention"], **how)
    if "merged" in case:
        image = Image.fromarray(case["image"].numpy())
        found["merged"] = np.array(blended(image, case["mask8"].numpy(), gray=settings["grayscale"]))
    if "clip.residual" in case:
        norm = SimpleNamespace(weight=case["clip.ln_weight"], bias=case["clip.ln_bias"])
        stats = {name: case[f"clip.{name}"] for name in ("mean", "std")}
        length = case["clip.representation"].norm(dim=-1)
        given = to_class(case["clip.class_token_terms"], case["clip.out_bias"])
        terms = 2 * settings["current_layer_at_end"] - 1
        for name, states, n in (
            ("attention", given, terms * given.shape[1]),
            ("patch", case["clip.residual"][:, 1:], terms),
        ):
            part = projected(states, **stats, norm=norm, projection=case["clip.proj"], length=length, terms=n)
            found[f"clip.{name}_part"] = part[:, None]
    if "llava.scores" in case:
        scores = case["llava.scores"]
        first, last = settings["llava_image_keys"]
        image = torch.zeros(len(scores), scores.shape[-1], dtype=torch.bool)
        image[:, first:last] = True
        found["llava.map"] = of_picture(scores.softmax(-1), image).mean((0, 1))[first:last]
    return found
