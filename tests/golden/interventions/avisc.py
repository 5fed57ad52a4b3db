"""Which image tokens are blind, and the contrast with what they say. -1e30 stands for minus infinity."""

import torch

from regard.interventions.avisc import _Looking, avisc

from .. import Case, Source

SOURCE = Source("authors", "sangminwoo/AvisC, avisc_sample.sample")


def compare(case: Case):
    settings, attention = case.settings, case["attention"]  # [layer, batch, head, 1, key]
    start, count = settings["image_start"], settings["image_tokens"]
    looking = _Looking()
    place = torch.arange(attention.shape[-1])
    looking.image = ((place >= start) & (place < start + count)).expand(attention.shape[1], -1)
    looking.rows = list(attention[:, :, :, 0].mean(2))
    blind = looking.blind(settings["layer_gamma"], settings["lamb"])
    method = object.__new__(avisc)
    method.alpha, method.beta = settings["alpha"], settings["beta"]
    method.branch = type("Fixed", (), {"logits": lambda self, ids: case["blind_logits"]})()
    output = method(torch.zeros(1, 1, dtype=torch.long), case["logits"])
    theirs = case["output"].masked_fill(case["output"] <= -1e29, -torch.inf)
    return {"blind": blind[0, start : start + count], "output": (output, theirs)}
