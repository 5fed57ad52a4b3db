"""Blocks on feature maps, with the state of a file whose names are others."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from .. import Case


def loaded(
    module: nn.Module, weights: Mapping[str, Tensor], names: Mapping[str, str], *, training=False, eps=1e-5
) -> nn.Module:
    """The module with these weights. names: beginnings of their names, as patterns, and what ours begin with. eps: of
    batch norms.
    """
    dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
    module, state = module.to(dtype).train(training), module.state_dict()
    found = {}
    for name, value in weights.items():
        for theirs, ours in names.items():
            if match := re.match(rf"(?:{theirs})(?=\.|$)", name):
                name = match.expand(ours) + name[match.end() :]
                break
        found[name] = value.reshape(state[name].shape) if name in state else value
    module.load_state_dict(found)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = eps
    return module


def run(case: Case, module: nn.Module, *names: str) -> dict[str, Tensor]:
    """Output, and those gradients of these inputs that the case has."""
    leaves = case.leaves(*(names or ("input",)))
    output = module(*leaves.values())
    return {"output": output, **case.gradients(output, leaves)}
