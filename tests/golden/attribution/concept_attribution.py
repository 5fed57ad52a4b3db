"""Non-negative factors, codes of the same activations anew, masks, and total Sobol indices of a small head."""

import numpy as np

from regard.attribution.concept_attribution import Dictionary, concepts, design, importance

from .. import Case, Source

SOURCE = Source("reimplementation", "the formulas of CRAFT's code, deel-ai/Craft, with scikit-learn's factors")
TOLERANCE = {"codes_fit": 1e-3, "dictionary": 1e-3, "codes": 1e-3, "importance": 1e-4}


def compare(case: Case):
    settings, weights = case.settings, case.weights
    given = case["activations"].movedim(1, -1).numpy()
    fitted = concepts(given, n=settings["concepts"])
    atoms = case["dictionary"]

    def score(codes):
        hidden = (codes @ atoms).mean((1, 2)) @ weights["head.weight"].T + weights["head.bias"]
        return (hidden if settings["linear_head"] else hidden.tanh() @ weights["second"].T)[:, settings["target"]]

    found = importance(case["codes"], score, method="sobol", steps=settings["designs"])
    return {
        "codes_fit": fitted.codes.reshape(-1, settings["concepts"]),
        "dictionary": fitted.atoms,
        "codes": Dictionary(np.empty(0), atoms.numpy(), "nmf").transform(given),
        "masks": design(settings["concepts"], settings["designs"]),
        "importance": found.mean(0),
    }
