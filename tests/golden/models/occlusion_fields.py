"""The field's outputs and code of positions, and one block of vector attention across two clouds."""

from regard.models.occlusion_fields import Field, VectorBlock

from .. import Case, Source

SOURCE = Source("authors", "basilevh/occlusions-4d, model/implicit.py and point_transformer_layer.py")
TOLERANCE = dict.fromkeys(("output", "before_last", "block_output"), 1e-4)
FIELD = {"lin_in": "start", "lin_z": "told", "lin_out": "output", "pt_blocks": "attention", "blocks": "blocks"}
BLOCK = {
    "layer1": "first",
    "layer3": "last",
    "layer2.to_q": "attention.query",
    "layer2.to_k": "attention.key",
    "layer2.to_v": "attention.value",
    "layer2.pos_mlp": "attention.places",
    "layer2.attn_mlp": "attention.scores",
}


def _block(name: str) -> str:
    for theirs, ours in BLOCK.items():
        name = name.replace(theirs, ours)
    return name.replace("fc_0", "0").replace("fc_1", "1")


def compare(case: Case):
    settings, weights, features = case.settings, case.weights, case["cloud_features"]
    state = {}
    for name, value in weights.items():
        if name.startswith("field."):
            part, _, rest = name.removeprefix("field.").partition(".")
            state[f"{FIELD[part]}.{_block(rest)}"] = value
    field = Field(
        features.shape[-1],
        outputs=len(state["output.bias"]),
        scene=case["scene"].shape[-1],
        blocks=settings["blocks"],
        layers=settings["layers"],
        neighbours=settings["neighbours"],
        local=settings["local"],
        frequencies=settings["frequencies"],
        base_frequency=settings["base_frequency"],
    )
    field.load_state_dict(state)
    seen = []
    field.output.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    output, _ = field(case["points"], features, case["cloud"], case["scene"])
    block = VectorBlock(case["block_input"].shape[-1], features.shape[-1], neighbours=settings["neighbours"])
    block.load_state_dict({_block(n.removeprefix("block.")): v for n, v in weights.items() if n.startswith("block.")})
    at = case["points"][..., :3]
    return {
        "output": output,
        "encoded": field.code(case["points"]),
        "before_last": (seen[0], case["before_last"].relu()),  # what the last map is given
        "block_output": block(case["block_input"], at, features, case["cloud"]).output,
    }
