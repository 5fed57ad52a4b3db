"""A classifier by corresponding patches, whose attention can be edited.

Nguyen, Taesiri and Nguyen, Visual correspondence-based explanations improve AI robustness and human-AI team accuracy
(arXiv:2208.00780), section 3, and Nguyen, Brown and Taesiri, Allowing humans to interactively guide machines where to
look does not always improve a human-AI team's classification accuracy (arXiv:2404.05238), section 3, with the
arithmetic of the authors' code: the mean of five patches without an edit, and of all with one.

Correspondences are given, or the patch of the neighbour that is most alike; theirs are a trained network's (CHM), which
is not at hand. Their code crosses rows with columns where it reads a correspondence; here both count alike. Where a
mask chooses no patch, their page goes back to the default attention, and ours refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

SMALLEST = 1e-6  # length of a vector, below which it is like nothing


class Vote(NamedTuple):
    """The label of most votes, the smallest of several; how many it has; and who voted, the best first."""

    label: int
    votes: int
    order: Tensor


@dataclass(frozen=True, eq=False)
class CorrespondenceClassifier:
    """Names a picture by the votes of those whose patches are like its own.

    features: of the pictures that are known [item, channel, row, column]; labels: from 0 [item]. Of the `neighbours`
    that are nearest by the cosine of their mean features, the `votes` whose patches are most alike vote. Without a mask
    the `top` most similar patches of the attention count, that of `attention` from `threshold` on.

    >>> features = torch.eye(4)[:, :, None, None].expand(-1, -1, 2, 2)
    >>> known = CorrespondenceClassifier(features, [0, 1, 1, 0], neighbours=4, votes=1)
    >>> known.explain(features[2], torch.ones(2, 2)).attrs["prediction"]
    1
    """

    features: Tensor
    labels: Sequence[int] | Tensor
    neighbours: int = 50
    votes: int = 20
    threshold: float = 0.55
    top: int = 5

    def __post_init__(self) -> None:
        items = len(self.features)
        if self.features.ndim != 4 or len(self.labels) != items:
            raise ValueError(
                f"features are [item, channel, row, column], with a label each; got {list(self.features.shape)} and "
                f"{len(self.labels)} labels"
            )
        if min(map(int, self.labels), default=-1) < 0:
            raise ValueError("labels are numbers from 0, and at least one")
        if not 1 <= self.votes <= self.neighbours <= items:
            raise ValueError(
                f"votes={self.votes}, neighbours={self.neighbours}: give 1 <= votes <= neighbours <= {items} items"
            )

    @torch.no_grad()
    def explain(self, query: Tensor, mask: Tensor | None = None, correspondence: Tensor | None = None) -> xr.Dataset:
        """The prediction of a picture, and each neighbour's part in it.

        query: [channel, row, column]. mask: which of its patches count, [row, column] boolean or weights; None: those
        of the attention. correspondence: the row and column of each neighbour that a patch corresponds to, [neighbour,
        row * column, 2]; None: the most similar.

        The variables are similarity and mask [neighbour, row, column], score, item and label [neighbour], and map
        [row, column], the mean of similarity times mask among the voters of the winner; attrs hold prediction and
        votes.
        """
        if query.shape != self.features.shape[1:]:
            raise ValueError(
                f"the picture has features {list(query.shape)}, those known {list(self.features.shape[1:])}"
            )
        means = self.features.flatten(2).mean(-1)
        near = cosine_similarity(means, query.flatten(1).mean(-1)[None], eps=SMALLEST)
        item = near.argsort(descending=True, stable=True)[: self.neighbours]
        found = self.features[item]
        similarity = similarities(query, found, correspondence)
        if mask is None:
            used = (attention(query, found) >= self.threshold).to(similarity)
            score = top_scores(similarity, used, self.top)
        else:
            used = edited(mask, similarity)
            score = (similarity * used).flatten(1).mean(-1)
        labels = torch.as_tensor(self.labels)[item.cpu()]
        label, votes, order = vote(score, labels, self.votes)
        won = order[labels[order.cpu()] == label]
        dims = ("neighbour", "row", "column")
        return xr.Dataset(
            {
                "similarity": (dims, similarity.cpu().numpy()),
                "mask": (dims, used.expand_as(similarity).cpu().numpy()),
                "score": ("neighbour", score.cpu().numpy()),
                "item": ("neighbour", item.cpu().numpy()),
                "label": ("neighbour", labels.numpy()),
                "map": (("row", "column"), (similarity * used)[won].mean(0).cpu().numpy()),
            },
            attrs={"prediction": label, "votes": votes, "order": order.tolist()},
        )


def similarities(query: Tensor, near: Tensor, correspondence: Tensor | None = None) -> Tensor:
    """Cosine of each patch with the one it corresponds to, -1 to 1. [neighbour, row, column]

    query: [channel, row, column]. near: [neighbour, channel, row, column]. correspondence: as `explain` takes it.
    """
    own, theirs = query.flatten(1), near.flatten(2)
    if correspondence is None:
        both = normalize(theirs, dim=1, eps=SMALLEST).mT @ normalize(own, dim=0, eps=SMALLEST)
        return both.amax(1).unflatten(-1, query.shape[1:])  # [neighbour, their patch, patch]
    if correspondence.shape != (len(near), own.shape[1], 2):
        raise ValueError(f"correspondence {list(correspondence.shape)} is not [{len(near)}, {own.shape[1]}, 2]")
    cell = correspondence[..., 0] * near.shape[3] + correspondence[..., 1]
    matched = theirs.gather(2, cell[:, None].expand(-1, near.shape[1], -1))
    return cosine_similarity(own[None], matched, dim=1, eps=SMALLEST).unflatten(-1, query.shape[1:])


def cross_correlation(query: Tensor, near: Tensor) -> Tensor:
    """How much each patch is like the whole of a neighbour, by inner products of features. [neighbour, row, column]"""
    own, theirs = (of.flatten(-2) / of.shape[-2:].numel() for of in (query, near))
    own = own / own.sum(-1).norm(dim=-1).clamp(min=SMALLEST)
    theirs = theirs / theirs.sum(-1).norm(dim=-1)[:, None, None].clamp(min=SMALLEST)
    return torch.einsum("cp,nc->np", own, theirs.sum(-1)).unflatten(-1, query.shape[1:])


def attention(query: Tensor, near: Tensor) -> Tensor:
    """`cross_correlation`, stretched from 0 to 1 over the patches of each neighbour. [neighbour, row, column]"""
    found = cross_correlation(query, near)
    found = found - found.amin((1, 2), keepdim=True)
    return found / found.amax((1, 2), keepdim=True).clamp(min=1e-30)


def top_scores(similarity: Tensor, mask: Tensor, top: int = 5) -> Tensor:
    """Mean of the highest similarities within the mask, outside of which they count 0. [neighbour]"""
    within = (similarity * mask).flatten(1)
    if not 1 <= top <= within.shape[1]:
        raise ValueError(f"top={top}: of {within.shape[1]} patches")
    return within.topk(top).values.mean(-1)


def edited(mask: Tensor, similarity: Tensor) -> Tensor:
    """A mask by hand, [row, column] or one a neighbour; refused where it chooses nothing, or is of another size."""
    mask = torch.as_tensor(mask).to(similarity)
    if mask.shape not in (similarity.shape, similarity.shape[1:]):
        raise ValueError(f"a mask of {list(mask.shape)} patches does not fit {list(similarity.shape[1:])}")
    if not bool(mask.any()):
        raise ValueError("the mask chooses no patch, so all neighbours are alike; choose some, or give None")
    return mask


def vote(scores: Tensor, labels: Tensor, votes: int) -> Vote:
    """The label of most among the highest scores; of equal scores the later neighbour goes first."""
    order = scores.argsort(stable=True).flip(0)[:votes]
    counts = torch.bincount(labels[order.cpu()])
    label = int(counts.argmax())
    return Vote(label, int(counts[label]), order)
