"""Features of regions, and where they go."""

import torch

from regard.models.covlm import Tokens, region_places, regions

from .. import Case, Source

SOURCE = Source("authors", "UMass-Embodied-AGI/CoVLM, open_flamingo/src/flamingo_lm.py")
TOLERANCE = {"regions": 1e-6}


def compare(case: Case):
    settings = case.settings
    tokens = Tokens(
        image=settings["image"],
        box=settings["box"],
        prebox=settings["prebox"],
        object=-1,
        endofobject=-1,
        visual=-1,
        previsual=-1,
    )
    places = region_places(case["input_ids"], tokens)
    found = [regions(case["picture"][int(row)], box[None]) for (row, _), box in zip(places, case["boxes"], strict=True)]
    return {
        "positions": places,
        "regions": torch.cat([case["picture"].new_zeros(0, case["picture"].shape[-1]), *found]),
    }
