"""Activations moved to registers; and neurons ranked by how strong they are on outliers."""

import torch

from regard.interventions.test_time_registers import outliers, scores, shifted

from .. import Case, Source

SOURCE = Source("authors", "nickjiang2378/test-time-registers, shared/algorithms.py and shared/hook_fn.py")


def compare(case: Case):
    shift, find = case.settings["shift"], case.settings["find"]
    given, n, chosen = case["shift.activations"], shift["num_registers"], shift["neurons"]
    patches = torch.ones(given.shape[:2], dtype=torch.bool)
    patches[:, 0] = patches[:, -n:] = False
    output = given.clone()
    output[..., chosen] = shifted(given[..., chosen], patches, n, scale=shift["scale"], rest=shift["normal_values"])

    where = outliers(case["find.layer_outputs"][:, find["layer"]], find["threshold"])
    found = scores(case["find.neuron_activations"], where, sparse=find["sparsity_filter"])
    layers, neurons = case["find.ranked"].T
    return {
        "shift.output": output,
        "find.scores": found.flatten().sort(descending=True).values,
        "of each neuron": (found[layers, neurons], case["find.scores"]),
    }
