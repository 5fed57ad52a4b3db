"""A memory layer with gradients of text and pictures, and positions in the order of the authors' code."""

from regard.models.comemo import MemoryLayer, thumbnail_positions

from .. import Case, Source

SOURCE = Source("authors", "LALBJ/CoMemo, comemo/model/comemo_chat/mixin_lm.py and helpers.py")


def compare(case: Case):
    settings, leaves = case.settings, case.leaves("x", "media")
    layer = MemoryLayer(
        case["x"].shape[-1],
        heads=settings["heads"],
        head_dim=settings["head_dim"],
        hidden=len(case.weights["ffn_2.w1.weight"]),
        base=settings["rope_base"],
        eps=settings["norm_eps"],
    )
    layer.load_state_dict(case.weights)
    output = layer(leaves["x"], leaves["media"], case["text_position"], case["media_position"], case.get("mask"))
    found = {"output": output, **case.gradients(output.square().sum(), leaves)}
    if "positions" in case:
        columns, rows = settings["ratio"]
        found["positions"] = thumbnail_positions(columns, rows, settings["bias"], order="columns")
    return found
