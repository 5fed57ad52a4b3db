"""The authors' layer: convolutions of width 1 around the operator, and its input added."""

from torch.nn.functional import conv2d

from regard.mechanisms.efficient_attention import efficient_attention

from .. import Case, Source

SOURCE = Source("authors", "cmsflash/efficient-attention, EfficientAttention")


def compare(case: Case):
    leaves, weights, heads = case.leaves("input"), case.weights, case.settings["heads"]
    given = leaves["input"]

    def through(name, tensor):
        return conv2d(tensor, weights[f"{name}.weight"], weights[f"{name}.bias"])

    parts = (through(name, given).flatten(2).unflatten(1, (heads, -1)).mT for name in ("queries", "keys", "values"))
    mixed = efficient_attention(*parts).mT.flatten(1, 2).unflatten(2, given.shape[2:])
    output = through("reprojection", mixed) + given
    return {"output": output, **case.gradients(output, leaves)}
