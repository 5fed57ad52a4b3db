"""The merge of views, with the gradient of their features."""

from regard.models.grf import SLOPE, ViewAttention

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "alextrevithick/GRF, attsets.py")
NAMES = {f"dense{i + 1}": f"layers.{i}" for i in range(3)} | {"dense4": "joint", "dense5": "scores", "dense6": "out"}


def compare(case: Case):
    if case.settings.get("leaky_slope", SLOPE) != SLOPE:
        raise Unmapped(f"a leaky slope of {case.settings['leaky_slope']}")
    weights, leaves, places = case.weights, case.leaves("features"), case["points"]
    model = ViewAttention(
        leaves["features"].shape[-1],
        places.shape[-1],
        weights["dense5.kernel"].shape[0],
        hidden=weights["dense1.kernel"].shape[1],
    )
    model.load_state_dict(
        {f"{ours}.weight": weights[f"{theirs}.kernel"].T for theirs, ours in NAMES.items()}
        | {f"{ours}.bias": weights[f"{theirs}.bias"] for theirs, ours in NAMES.items()}
    )
    output = model(leaves["features"], places)
    return {"output": output, **case.gradients(output.square().sum(), leaves)}
