"""The authors' module, with the coordinates at which heads read; theirs are float32's."""

from regard.mechanisms.varied_size_window import VariedSizeWindow, coordinates

from .. import Case, Source

SOURCE = Source("authors", "ViTAE-Transformer/ViTAE-VSA, VSAWindowAttention")
TOLERANCE = dict.fromkeys(("output", "grad_input", "sample_coordinates"), 1e-5)
NAMES = {"sampling_offsets.2": "offsets", "sampling_scales.2": "scales", "relative_position_bias_table": "bias"}


def compare(case: Case):
    leaves, settings = case.leaves("input"), case.settings
    weights = {name: weight for name, weight in case.weights.items() if name != "relative_position_index"}
    for theirs, ours in NAMES.items():
        weights = {name.replace(theirs, ours): weight for name, weight in weights.items()}
    module = VariedSizeWindow(
        settings["dim"],
        settings["num_heads"],
        window=settings["window_size"],
        out_dim=settings["out_dim"],
        bias="bias" in weights,
    ).to(case["input"].dtype)
    if "qkv.bias" not in weights:
        weights["qkv.bias"] = weights["qkv.weight"].new_zeros(len(weights["qkv.weight"]))
    module.load_state_dict(weights)
    picture = leaves["input"]
    output = module(picture)
    at = coordinates(*module.predicted(picture), shape=picture.shape[2:], window=module.window)
    return {"sample_coordinates": at.flatten(0, 1), "output": output, **case.gradients(output, leaves)}
