"""Which patches a tower's class token marks, and the scores of the last query that they raise."""

import torch

from regard import Call, Site, Tokens
from regard.interventions.visual_emphasis import Emphasis, outliers, salient, visual_emphasis

from .. import Case, Source

SOURCE = Source("authors", "hasanar1f/llava-hallunication-fix, modPAI/attention.py and clip_encoder.py")


def compare(case: Case):
    settings = case.settings
    heads, start, n = settings["heads"], settings["image_start"], settings["patches"]
    early, late = (case[f"tower_weights_cls_{which}"][:, 1:].sum(0)[None] for which in ("first", "late"))
    bottom = outliers(late)[0]
    top = salient(early, settings["ratio"])[0] & ~bottom
    hidden = case["hidden"]
    place = torch.arange(hidden.shape[1])
    image = (place >= start) & (place < start + n)
    marked = [torch.zeros_like(image).masked_scatter(image, some)[None] for some in (top, bottom)]
    method = visual_emphasis(tokens=Emphasis(*marked), alpha=settings["alpha"], beta=settings["beta"])
    method._layers = {2}  # of no model
    query, key, value = (
        (hidden @ case.weights[f"{name}_proj"].T).unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv"
    )
    tokens = Tokens.plain("text", 1, len(place)).marked("image", image[None])
    site = Site("layers.2", "language_model", 2, causal=True, heads=heads)
    call = Call(site, query, key, value, query.shape[-1] ** -0.5, causal=True, tokens=tokens)
    changed = method.inputs(call)
    return {
        "top_tokens": (top.nonzero()[:, 0], case["top_tokens"].sort().values),
        "bottom_tokens": (bottom.nonzero()[:, 0], case["bottom_tokens"].sort().values),
        "weights": changed.weights.dense(),
        "output": changed.output.transpose(1, 2).flatten(2) @ case.weights["o_proj"].T,
    }
