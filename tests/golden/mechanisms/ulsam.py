"""The groups' modules side by side."""

import torch

from regard.mechanisms.ulsam import ULSAM

from .. import Case, Source
from ._maps import loaded, run

SOURCE = Source("authors", "Nandan91/ULSAM, ULSAM in evaluation mode")
NAMES = {"conv_dws": "depthwise", "bn_dws": "depthwise_norm", "conv_point": "pointwise", "bn_point": "pointwise_norm"}


def compare(case: Case):
    groups, weights = case.settings["num_splits"], case.weights
    each = [{n.split(".", 2)[2]: w for n, w in weights.items() if n.split(".")[1] == str(g)} for g in range(groups)]
    whole = {
        name: torch.cat([of[name] for of in each])[: None if w.numel() > 1 or "batches" not in name else 1]
        for name, w in each[0].items()
    }
    return run(case, loaded(ULSAM(case["input"].shape[1], groups=groups), whole, NAMES))
