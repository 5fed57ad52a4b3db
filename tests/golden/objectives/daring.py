"""The term by picture and head, its mean, and the gradient by scores."""

from regard.objectives.daring import by_head, daring

from .. import Case, Source

SOURCE = Source("authors", "cosmicman-cvpr2024/CosmicMan, loss.py")


def compare(case: Case):
    settings, leaves = case.settings, case.leaves("scores")
    rows, columns = settings["height"], settings["width"]
    small = case["mask_small"]
    masks = small.repeat_interleave(rows // small.shape[2], 2).repeat_interleave(columns // small.shape[3], 3)
    groups = [[None if span == -1 else tuple(span) for span in spans] for spans in settings["groups"]]
    grid = rows // settings["map_factor"], columns // settings["map_factor"]
    weights = leaves["scores"].softmax(-1)
    loss = daring(weights, masks, groups, grid=grid)
    heads = by_head(weights, masks, groups)
    return {"per_head": heads, "loss": loss, **case.gradients(loss, leaves)}
