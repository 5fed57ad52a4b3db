"""One head after another by k-means, in training, without dropout."""

import torch
from torch.nn import functional as F

from regard.mechanisms.routing import Routing, commitment, nearest_means, routing

from .. import Case, Source

SOURCE = Source("reimplementation", "lucidrains/routing-transformer, KmeansAttention")


def compare(case: Case):
    settings = case.settings
    shared = settings["shared_query_key"]
    leaves = case.leaves("query", "value") | ({} if shared else case.leaves("key"))
    query, value, key = leaves["query"], leaves["value"], leaves.get("key", case["key"])
    memory = (case["mem_key"], case["mem_value"]) if settings["memory_keys"] else None
    mask, means = case.get("mask"), case["means_before"]
    mask = None if mask is None else mask.bool().reshape(len(query), 1, 1, -1)
    knobs = {"means": means, "window": settings["window"], "shared": shared, "memory": memory, "masked_last": False}
    output = routing(query, key, value, causal=settings["causal"], mask=mask, **knobs)
    if mask is not None:  # there a masked query gives each key of its clusters as much
        alike = routing(query, key, value, scale=0.0, **knobs)
        output = output.where(mask.mT, alike)
    vectors = F.normalize(query if shared else torch.cat([query, key], 2), dim=-1)
    module = Routing(query.shape[-1], query.shape[1], settings["clusters"], shared=shared, decay=settings["decay"])
    module.to(means.dtype).means.copy_(means)
    module.begun.fill_(True)
    module.train()(query, key, value, causal=settings["causal"])
    module.update()
    return {
        "output": output,
        "auxiliary_loss": settings["commitment"] * commitment(vectors, means)[None],
        "means_of_batch": nearest_means(vectors, means),
        "means_after": module.means,
        **case.gradients(output, leaves),
    }
