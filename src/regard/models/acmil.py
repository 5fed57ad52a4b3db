"""Classifies a bag of instances by several attention branches, and hides the most attended instances now and then.

Zhang et al., Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification (arXiv:2311.07125):
gated attention (Ilse et al., arXiv:1802.04712, equation 9) with one row for each branch; stochastic masking of the top
instances (STKIM) in training; multiple branch attention (MBA) with a classifier for each branch, and their attention
pushed apart by its cosine similarity; the bag is classified by the mean of the branches' attention. Sizes and defaults
are those of the paper and of the authors' code: 5 branches, 6 of the 10 highest scores hidden.

One branch with nothing hidden is attention MIL as of Ilse et al. Deviations: bags come in batches, with a mask; of a
bag with fewer than 10 instances the same share is hidden. How many top instances there are is a flag of the authors'
code; the command of its readme has 10, as here. They train a bag at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BranchAttention(nn.Module):
    """Gated attention over the instances of a bag, one row for each branch."""

    def __init__(self, dim: int, hidden: int, branches: int, top: int, share: float) -> None:
        super().__init__()
        self.content, self.gate = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, branches)
        self.top, self.share = top, share

    def forward(self, instances: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """instances [batch, instance, dim], mask [batch, instance] -> branches [batch, branch, dim], weights"""
        scores = self.score(self.content(instances).tanh() * self.gate(instances).sigmoid()).mT
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
        if self.training and self.top:
            scores = scores.masked_fill(hidden(scores, self.top, self.share), float("-inf"))
        weights = scores.softmax(-1)
        return weights @ instances, weights


def hidden(scores: Tensor, top: int, share: float) -> Tensor:
    """Which instances to hide: of each row's `top` highest, a random `share`, rounded down. [..., instance] boolean

    Instances with a score of -inf do not count.
    """
    count = scores.isfinite().sum(-1, keepdim=True).clamp_max(top)
    rank = scores.argsort(-1, descending=True).argsort(-1)
    lots = torch.rand_like(scores).masked_fill(rank >= count, 2.0)  # beyond any that is drawn
    return lots.argsort(-1).argsort(-1) < (count * share).floor()


@dataclass(frozen=True)
class AcmilConfig:
    """Sizes of an `Acmil`."""

    inputs: int  # channels of an instance
    classes: int = 2
    dim: int = 128
    hidden: int = 128  # channels of the gated scores
    branches: int = 5
    top: int = 10  # highest scores of each branch among which instances are hidden in training; 0: none
    share: float = 0.6  # of them


class Bags(NamedTuple):
    """What was made of a batch of bags."""

    logits: Tensor  # [batch, class]
    branch_logits: Tensor  # [batch, branch, class]
    weights: Tensor  # of each branch, sums to 1 over instances [batch, branch, instance]

    def loss(self, labels: Tensor, *, diversity: float = 1.0) -> Tensor:
        """Cross entropy of the bags, of each branch, and `diversity` times the cosine similarity between branches.

        The similarity is that of their attention, the mean over pairs. It is least where each branch looks at an
        instance of its own, so on small bags it can collapse attention before there is anything to see: lower it there.
        """
        loss = F.cross_entropy(self.logits, labels)
        branches = self.weights.shape[1]
        if branches == 1:  # the branch is the bag
            return loss
        each = F.cross_entropy(self.branch_logits.flatten(0, 1), labels.repeat_interleave(branches))
        unit = F.normalize(self.weights, dim=-1)
        alike = (unit @ unit.mT).triu(1).sum((1, 2)) / (branches * (branches - 1) / 2)
        return loss + each + diversity * alike.mean()


class Acmil(nn.Module):
    """Bags of instances to classes. `regard.record` sees the attention, with branches as queries.

    >>> import torch
    >>> from regard.models.acmil import Acmil, AcmilConfig
    >>> model = Acmil(AcmilConfig(inputs=16))
    >>> found = model(torch.randn(3, 40, 16))
    >>> found.logits.shape, found.weights.shape
    (torch.Size([3, 2]), torch.Size([3, 5, 40]))
    """

    def __init__(self, config: AcmilConfig) -> None:
        super().__init__()
        self.config = c = config
        self.reduce = nn.Sequential(nn.Linear(c.inputs, c.dim, bias=False), nn.ReLU())
        self.attention = BranchAttention(c.dim, c.hidden, c.branches, c.top, c.share)
        self.branches = nn.ModuleList(nn.Linear(c.dim, c.classes) for _ in range(c.branches))
        self.bag = nn.Linear(c.dim, c.classes)

    def forward(self, bags: Tensor, mask: Tensor | None = None) -> Bags:
        """bags [batch, instance, channel]; mask: boolean [batch, instance], False where a bag is filled up."""
        mask = torch.ones(bags.shape[:2], dtype=torch.bool, device=bags.device) if mask is None else mask
        found, weights = self.attention(self.reduce(bags), mask)
        branch_logits = torch.stack([head(found[:, i]) for i, head in enumerate(self.branches)], 1)
        return Bags(self.bag(found.mean(1)), branch_logits, weights)


def acmil(inputs: int, **sizes: Any) -> Acmil:
    """An untrained `Acmil` of these sizes, the fields of `AcmilConfig`."""
    return Acmil(AcmilConfig(inputs, **sizes))
