"""The authors' code sums over positions; channels stand last there, and of two biases of the switch one is enough."""

from torch import nn

from regard.mechanisms.guided_context_gating import GuidedContextGating

from .. import Case, Source, Unmapped
from ._maps import loaded, run

SOURCE = Source("authors", "TejaCherukuri/Guided-Context-Gating, gcg/components/model.py")
TOLERANCE = dict.fromkeys(("output", "context_features", "grad.input"), 2e-05)
NAMES = {
    r"context\.conv_context": "score",
    r"context\.conv_transform_bottleneck": "squeeze",
    r"context\.conv_transform_output": "widen",
    r"gate\.conv_xl": "local",
    r"gate\.conv_g": "guide",
    r"gate\.psi": "switch",
    r"gate\.layer_norm": "norm",
    r"gate\.bxg": "offset",
}


ACTIVATIONS = {"linear": nn.Identity, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


class ChannelsLast(GuidedContextGating):
    def forward(self, x):
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


def compare(case: Case):
    settings = case.settings
    if "sum" not in settings["context"] or settings["layer_norm_eps"] != 1e-3:
        raise Unmapped("the code sums, and its norm has an epsilon of 1e-3")
    kinds = {"kernel": "weight", "gamma": "weight", "beta": "bias"}
    weights = {}
    for name, value in case.weights.items():
        module, _, kind = name.rpartition(".")
        weights[f"{module}.{kinds.get(kind, kind)}"] = value[0, 0].mT if kind == "kernel" else value
    weights["gate.psi.bias"] = weights["gate.psi.bias"] + weights.pop("gate.bpsi")
    activation = ACTIVATIONS[settings["transform_activation"]]()
    module = ChannelsLast(settings["channels"], reduction=settings["reduction"], pool="sum", activation=activation)
    loaded(module, weights, NAMES)
    context = module.context(case["input"].movedim(-1, 1)).movedim(1, -1)
    return {"context_features": context, **run(case, module)}
