"""Codes of random head outputs, before and after training, and what they say of heads and pairs of these."""

import torch

from regard.circuits.discrete_sae import DiscreteSAE, area, codes, pairs_apart, train, unique

from .. import Case, Source

SOURCE = Source("authors", "charlieoneill11/sae-circuits, src")
NAMES = {"tied_bias": "bias", "encoder.1.weight": "encoder", "encoder.1.bias": "offset", "decoder.0.weight": "decoder"}
TOLERANCE = dict.fromkeys((f"trained.{name}" for name in NAMES), 1e-3)  # after many steps of Adam


def compare(case: Case):
    settings, outputs = case.settings, case["head_outputs"]
    sae = DiscreteSAE(outputs.shape[-1], settings["features"], sparsity=settings["sparsity"])
    sae.load_state_dict({NAMES[name]: value for name, value in case.weights.items()})
    some = outputs[: settings["trained_on"]]
    features, reconstruction, loss = sae(some)
    found = {"features": features, "reconstruction": reconstruction, "loss": loss}
    loss.backward()
    sae.hold_gradients()
    parameters = dict(sae.named_parameters())
    found |= {f"grad.{theirs}": parameters[ours].grad.clone() for theirs, ours in NAMES.items()}

    train(sae, some, steps=settings["epochs"], rate=settings["lr"])
    found |= {f"trained.{theirs}": parameters[ours].detach() for theirs, ours in NAMES.items()}
    given = case["codes"]
    found["codes"] = codes(sae, outputs)
    positive, negative = given.split([settings["positive"], len(given) - settings["positive"]])
    shape = (settings["layers"], settings["heads"])
    by = {"normalise": settings["normalise"]}
    score = unique(positive, negative, **by)
    found["unique_to_positive"] = score.view(shape)
    found["unique_to_negative"] = unique(negative, positive, **by).view(shape)
    found["node_scores"] = score.softmax(0).view(shape)
    found["unique_pairs"] = pairs_apart(positive, negative, **by)
    found["auc"] = torch.tensor(area(score.tolist(), case["truth"].flatten().bool().tolist())).double()
    return found
