"""Probes of three kinds on random states."""

import torch

from regard.circuits.object_binding import SameObject, accuracy

from .. import Case, Source

SOURCE = Source("authors", "liyihao0302/vit-object-binding, src/utils/models.py and score.py")
NAMES = {"linear": ("linear", "linear"), "diag_quadratic": ("diagonal", "diag"), "quadratic": ("quadratic", "W")}


def compare(case: Case):
    states, objects, found = case["tokens"], case["objects"], {}
    for theirs, (kind, module) in NAMES.items():
        weight, bias = (case[f"weight.{theirs}.{module}.{name}"] for name in ("weight", "bias"))
        probe = SameObject(states.shape[-1], kind=kind)
        probe.load_state_dict({"weight": weight if kind == "quadratic" else weight[0], "bias": bias[0]})
        logits, loss = probe(states), probe.loss(states, objects)
        loss.backward()
        found |= {f"{theirs}.scores": logits, f"{theirs}.loss": loss, f"{theirs}.accuracy": accuracy(logits, objects)}
        # of their vector of biases one is used
        first = torch.zeros_like(bias)
        first[0] = probe.bias.grad
        found[f"grad.{theirs}.{module}.weight"] = probe.weight.grad.view_as(weight)
        found[f"grad.{theirs}.{module}.bias"] = first
    return found
