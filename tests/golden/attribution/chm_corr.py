"""Similarities, attention, scores and votes, with and without an edit."""

import torch

from regard.attribution.chm_corr import attention, cross_correlation, edited, similarities, top_scores, vote

from .. import Case, Source

SOURCE = Source("authors", "anguyen8/chm-corr-interactive, CHMCorr.py and Utils.py")


def compare(case: Case):
    query, near, cells = case["source"], case["target"], case["correspondence"]
    settings = case.settings
    similarity = similarities(query, near, cells)
    there = torch.zeros_like(similarity)
    for of, values, at in zip(there, similarity.flatten(1), cells):
        for (row, column), value in zip(at.tolist(), values):
            of[row, column] = value  # the last patch that corresponds to it
    scores = top_scores(similarity, attention(query, near) >= settings["T"], settings["top"])
    masked = (similarity * edited(case["mask"], similarity)).flatten(1).mean(-1)
    first, second = (vote(of, case["labels"], settings["K"]) for of in (scores, masked))
    return {
        "similarity": similarity,
        "similarity_on_target": there,
        "cross": cross_correlation(query, near),
        "scores": scores,
        "masked_scores": masked,
        "prediction": torch.tensor(first.label),
        "votes": torch.tensor(first.votes),
        "masked_prediction": torch.tensor(second.label),
        "masked_votes": torch.tensor(second.votes),
    }
