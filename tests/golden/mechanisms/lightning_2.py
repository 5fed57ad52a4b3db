"""Linear attention with decay, and the slopes of heads."""

from regard.mechanisms.lightning_2 import lightning_2, slopes

from .. import Case, Source

SOURCE = Source("authors", "OpenNLPLab/lightning-attention, linear_attn and _build_slope_tensor")


def compare(case: Case):
    leaves = case.leaves("query", "key", "value")
    output = lightning_2(**leaves, decay=case["decay"])
    return {"decay": slopes(case.settings["heads"]), "output": output, **case.gradients(output, leaves)}
