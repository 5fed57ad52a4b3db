"""Gaze shifts of a prompt, and the weights of the last query that they change."""

import torch

from regard import Call, Site, Tokens
from regard.interventions.gift import Gaze, gift, shifts, stretched

from .. import Case, Source

SOURCE = Source("authors", "amazon-science/GIFT, inference.py and the modified modeling_llama.py")


def compare(case: Case):
    settings = case.settings
    first, last = settings["query_start_idx"], settings["query_end_idx"] + 1
    found = case["prompt_weights"]
    place = torch.arange(found.shape[-1])[None]
    image = (place >= settings["vision_start_idx"]) & (place <= settings["vision_end_idx"])
    content = torch.zeros(1, last - first, dtype=torch.bool)
    content[:, settings["content_query_tokens"]] = True
    means = [shifts(found[None, i, :, first - 1 : last], content, image)[0] for i in settings["saliency_layers"]]
    saliency = stretched(torch.stack(means).mean(0), image)
    gaze = Gaze(saliency, (place >= first) & (place < last))
    method = gift(gaze=gaze, alpha=settings["alpha"])
    method._layers = {2}  # of no model
    query, key, value = (case[name] for name in ("query", "key", "value"))
    tokens = Tokens.plain("text", 1, key.shape[2]).marked("image", image)
    site = Site("layers.2", "language_model", 2, causal=True, heads=query.shape[1])
    call = Call(site, query, key, value, settings["scale"], causal=settings["causal"], tokens=tokens)
    changed = method.inputs(call)
    factor = (settings["alpha"] * saliency[image]).exp()
    return {"factor": factor, "weights": changed.weights.dense(), "output": changed.output}
