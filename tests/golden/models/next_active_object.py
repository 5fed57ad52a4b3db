"""Features after they looked at boxes, with a gradient."""

from regard.models.next_active_object import GuidedAttention

from .. import Case, Source

SOURCE = Source("authors", "sanketsans/ganov2, stillfast/models/noun_attn.py")
NAMES = {"attn.": "attention.", "mlp.fc1.": "mlp.0.", "mlp.fc2.": "mlp.3.", "bbox_to_feature.": "box."}


def compare(case: Case):
    leaves, state = case.leaves("features"), case.weights
    for theirs, ours in NAMES.items():
        state = {name.replace(theirs, ours): value for name, value in state.items()}
    model = GuidedAttention(case["features"].shape[1], heads=case.settings["heads"]).eval()
    model.load_state_dict(state)
    output = model(leaves["features"], case["boxes"])
    return {"output": output, **case.gradients(output.square().sum(), leaves)}
