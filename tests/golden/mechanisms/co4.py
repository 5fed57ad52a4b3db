"""The authors' layer for pictures."""

from regard.mechanisms.co4 import TriadicModulation

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "ARIA-Funded-TREND/HMS, Vision/object_recognition/attention.py")


def compare(case: Case):
    settings = case.settings
    if settings["latents"] != 1 or settings["heads"] != 1:
        raise Unmapped("ours has one latent token and one head")
    layer = TriadicModulation(settings["dim"], top=settings["top"], qkv_bias=settings["qkv_bias"]).to(
        case["input"].dtype
    )
    layer.load_state_dict(case.weights)
    leaves = case.leaves("input")
    output = layer(leaves["input"])
    return {"output": output, **case.gradients(output, leaves)}
