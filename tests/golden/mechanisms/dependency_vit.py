"""A layer of reversed attention, with messages from the layers before it."""

from regard.mechanisms.dependency_vit import ReversedAttention, received

from .. import Case, Source

SOURCE = Source("reimplementation", "DependencyViT in timm's style by F. Guan, ReversedAttention")
NAMES = {
    "head_selector": "selector",
    "message_controller.fc1": "controller.0",
    "message_controller.fc2": "controller.2",
}


def compare(case: Case):
    leaves, settings, weights = case.leaves("input"), case.settings, case.weights
    for theirs, ours in NAMES.items():
        weights = {name.replace(theirs, ours): weight for name, weight in weights.items()}
    layer = ReversedAttention(
        leaves["input"].shape[-1],
        settings["heads"],
        temperature=settings["temperature"],
        bias=settings["qkv_bias"],
    ).to(leaves["input"].dtype)
    layer.load_state_dict(weights)
    output, message, dependency = layer(leaves["input"], case["message_before"])
    return {
        "output": output,
        "message_after": message,
        "dependency": dependency,
        "prune_score": received(dependency),
        **case.gradients(output, leaves),
    }
