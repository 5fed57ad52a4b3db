"""The three fits, from the same start. Where a logit passes the limit ours holds it, and the code does not."""

import numpy as np
import torch

from regard.circuits._gates import Gates
from regard.circuits.causal_head_gating import causal_head_gating
from regard.seam import intervene

from .. import Case, Source, Unmapped
from ._text import decoder

SOURCE = Source("authors", "jonhanke/nam_causal-head-gating, CHG.get_logp and CHGTrainer.fit")
TOLERANCE = dict.fromkeys(("unregularized", "necessary", "sufficient"), 1e-4)  # after as many steps of Adam


def compare(case: Case):
    settings, model = case.settings, decoder(case)
    if settings["num_updates"] != settings["num_reg_updates"]:
        raise Unmapped("ours takes as many steps for each fit")
    ids, counted = case["input_ids"], case["loss_masks"][:, 1:]

    def loss(model):
        logs = model(ids).logits[:, :-1].log_softmax(-1)
        own = logs.gather(2, ids[:, 1:, None])[..., 0]
        return -(own * counted).sum(1) / counted.sum(1)

    found = causal_head_gating(
        model,
        loss,
        steps=settings["num_updates"],
        pressure=settings["l1_weight"],
        limit=settings["l1_clamp"],
        rate=settings["lr"],
        seed=settings["seed"],
    )
    fits = {"unregularized": found["free"], "necessary": found["open"], "sufficient": found["shut"]}
    ends = np.stack([fit.values for fit in fits.values()])
    if np.abs(np.log(ends / (1 - ends))).max() > 0.99 * settings["l1_clamp"]:
        raise Unmapped("a logit reaches the limit, at which ours holds it")

    start = case["start"].clone().requires_grad_()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with intervene(model, Gates(found.attrs["stack"], dict(enumerate(start.sigmoid())))):
        lost = loss(model)
    (slope,) = torch.autograd.grad(lost.mean(), start)
    return {
        "row_logp": -lost,
        "grad_start": slope,
        "row_logp_whole": (found.attrs["whole"], -case["row_logp_whole"].mean()),
        **{name: fit.values.astype(np.float32) for name, fit in fits.items()},
        **{f"loss_{name}": np.float32(found.attrs[of]) for name, of in _ENDS.items()},
    }


_ENDS = {"unregularized": "free", "necessary": "open", "sufficient": "shut"}
