"""The term, its gradient, and the channel mean that it shapes."""

from regard.objectives.au_guided import au_guided, channel_mean

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "sbelharbi/interpretable-fer-aus, dlib/losses/align_to_heatmap.py")
LOSSES = {"cosine": False, "std_cosine": True}


def compare(case: Case):
    settings = case.settings
    if settings["loss"] not in LOSSES or settings["normalise"] != "norm_none":
        raise Unmapped(f"loss {settings['loss']} with {settings['normalise']}: the paper's is the cosine, without")
    if settings["scale_to"] != "scale_to_attention":
        raise Unmapped("attention is not enlarged to the map")
    leaves = case.leaves("features")
    features = leaves["features"]
    loss = au_guided(features, case["heatmap"][:, 0], standardised=LOSSES[settings["loss"]])
    return {"attention": channel_mean(features)[:, None], "loss": loss, **case.gradients(loss, leaves)}
