"""The penalty, by its two ways to count heads, and who sees whom."""

import torch

from regard.objectives.deceptive_attention import KeepApart, deceptive_attention

from .. import Case, Source

SOURCE = Source("authors", "danishpruthi/deceptive-attention, under classification_tasks")


def compare(case: Case):
    forbidden, real, rate = case["forbidden"].bool(), case["real"].bool(), case.settings["hammer_coeff"]
    scores = case["scores"][-1][:, :, 0].clone().requires_grad_()  # the last layer's row of the first token
    weights = (scores - 10000.0 * ~real[:, None]).softmax(-1)
    mass = (weights * forbidden[:, None]).sum(-1)[..., None]  # [batch, head, 1]
    mean = rate * deceptive_attention(mass, heads="mean")
    # with "max" the code takes the largest head of the whole batch: all as heads of one row
    largest = rate * deceptive_attention(mass.transpose(0, 1).reshape(1, -1, 1), heads="max")
    slopes = [torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in (mean, largest)]
    pairs = real[:, :, None] & real[:, None]
    apart = ~KeepApart(forbidden).apart[:, 0]
    return {
        "loss_mean": mean,
        "loss_max": largest,
        "grad_scores_mean": slopes[0],
        "grad_scores_max": slopes[1],
        "forbidden_mass": mass.mean(),
        "largest_mass": mass.max(),
        "row_loss_head0": torch.stack([rate * deceptive_attention(row[None]) for row in mass[:, :1]]),
        "inter_mask": (apart[pairs], case["inter_mask"].bool()[pairs]),
    }
