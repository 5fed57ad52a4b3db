"""Metric learning in subspaces that split off while training, behind a spatial gate that shows what counts.

Gopal V et al. (adigasu), Attention-based Dynamic Subspace Learners for Medical Image Analysis (arXiv:2206.09068); gate,
split, pairs and loss as in the authors' code (adigasu/Dynamic_subspace_learners). A sigmoid gate weighs the places of a
feature map before it is pooled. The embedding's dimensions belong to learners, each trained on a cluster of its own;
when training stalls, the last learner keeps the dimensions that mattered and the rest starts anew as another.

Deviations: the authors watch the evaluation set for stalls, `train` whatever `judge` is given; their backbone is a
ResNet-50, here any module with a feature map. In the loss a triplet counts where either term is positive, as the code
does in any recent PyTorch. New clusters are matched to old ones by the overlap of their members.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..extras import needs
from ..prediction import evaluating


class SpatialAttention(nn.Module):
    """How much each place counts, 0 to 1, of a map [batch, channel, row, column]. [batch, 1, row, column]"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 32:
            raise ValueError(f"SpatialAttention: takes 32 channels or more, which it narrows by 32; got {channels}")
        widths = channels, channels // 8, channels // 32, 1
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))

    def forward(self, maps: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            maps = layer(maps.relu() if i else maps)
        return maps.sigmoid()


class Embedded(NamedTuple):
    """What a batch of pictures became."""

    embedding: Tensor  # each learner's slice has length 1 [batch, dim]
    gate: Tensor  # [batch, 1, row, column]
    pooled: Tensor  # before the linear layer [batch, channel]


class SubspaceLearners(nn.Module):
    """A backbone's gated, pooled features, and an embedding whose dimensions belong to learners.

    backbone: pictures to maps [batch, channel, row, column]; channels: its; width: of the embedding; gated: False
    counts all places alike. `learners` names the dimensions of each. `train` trains it:
    each learner's slice on a cluster of its own, by `margin_loss`, and `split` where that stalls.

    >>> import torch
    >>> from regard.models.dynamic_subspace import SubspaceLearners
    >>> model = SubspaceLearners(torch.nn.Conv2d(3, 32, 3), channels=32, width=12)
    >>> found = model(torch.randn(2, 3, 8, 8))
    >>> found.embedding.shape, found.gate.shape, [len(own) for own in model.learners]
    (torch.Size([2, 12]), torch.Size([2, 1, 6, 6]), [12])
    """

    def __init__(
        self, backbone: nn.Module, *, channels: int, width: int = 128, dropout: float = 0.01, gated: bool = True
    ) -> None:
        super().__init__()
        self.backbone, self.attention = backbone, SpatialAttention(channels) if gated else None
        self.dropout, self.linear = nn.Dropout(dropout), nn.Linear(channels, width)
        nn.init.xavier_normal_(self.linear.weight)
        self.register_buffer("owner", torch.zeros(width, dtype=torch.long))  # the learner of each dimension

    @property
    def learners(self) -> list[Tensor]:
        """The dimensions of each learner; together all, each once."""
        owner = self.owner
        assert isinstance(owner, Tensor)
        return [(owner == k).nonzero()[:, 0] for k in range(int(owner.max()) + 1)]

    def forward(self, pictures: Tensor) -> Embedded:
        """pictures: whatever the backbone takes."""
        return self.embed(self.backbone(pictures))

    def embed(self, maps: Tensor) -> Embedded:
        """maps: [batch, channel, row, column]."""
        channels = self.linear.in_features
        if maps.ndim != 4 or maps.shape[1] != channels:
            raise ValueError(f"SubspaceLearners: takes maps [batch, {channels}, row, column]; got {list(maps.shape)}")
        gate = torch.ones_like(maps[:, :1]) if self.attention is None else self.attention(maps)
        pooled = (maps * gate).mean((2, 3))
        raw = self.linear(self.dropout(pooled))
        found = torch.zeros_like(raw)
        for own in self.learners:
            found = found.index_copy(1, own, F.normalize(raw[:, own], dim=1))
        return Embedded(found, gate, pooled)

    @torch.no_grad()
    def split(self, scores: Tensor, *, threshold: float = 0.5, least: int = 5, smallest: int = 10) -> bool:
        """The last learner keeps the dimensions that score above `threshold`, and the rest is a new one. Whether it did

        scores: [dim], of `importance`. Not where fewer than `least` would be kept, none left, or the learner has
        `smallest` dimensions or fewer. Weights of the new learner are drawn anew.
        """
        last = len(self.learners) - 1
        own, kept = self.learners[-1], kept_dimensions(scores, self.learners[-1], threshold=threshold)
        if len(own) <= smallest or not least <= len(kept) < len(own):
            return False
        rest = own[~torch.isin(own, kept)]
        weight = self.linear.weight.new_empty(len(rest), self.linear.in_features)
        self.linear.weight[rest] = nn.init.xavier_normal_(weight)
        self.linear.bias[rest] = 0.0
        owner = self.owner
        assert isinstance(owner, Tensor)
        owner[rest] = last + 1
        return True


def importance(activations: Tensor, gradients: Tensor, learner: Tensor) -> Tensor:
    """How much the loss moved with each dimension of a learner, 0 to 1, and 0 of the others. [dim]

    activations, gradients: of the embedding over an epoch [..., dim]; learner: its dimensions.

    >>> import torch
    >>> from regard.models.dynamic_subspace import importance
    >>> importance(torch.tensor([[0.2, -0.9, 0.4]]), torch.ones(1, 3), torch.arange(3))
    tensor([0.0000, 1.0000, 0.2857])
    """
    product = (activations * gradients).flatten(0, -2).mean(0)[learner].abs()
    product = product / product.norm().clamp_min(torch.finfo(product.dtype).tiny)
    spread = (product.max() - product.min()).clamp_min(torch.finfo(product.dtype).tiny)
    scores = torch.zeros(activations.shape[-1], dtype=product.dtype, device=product.device)
    return scores.index_copy(0, learner, (product - product.min()) / spread)


def kept_dimensions(scores: Tensor, learner: Tensor, *, threshold: float = 0.5) -> Tensor:
    """The dimensions of a learner that score above the threshold, best first."""
    order = scores[learner].argsort(descending=True, stable=True)
    return learner[order][scores[learner][order] > threshold]


def pairs(embedding: Tensor, labels: Tensor, *, cutoff: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors, positives and negatives, indices of rows.

    Each anchor meets as many rows of its class as all have on average, rounded down but at least one, and as many of
    the nearest of other classes that are no nearer than `cutoff`. ValueError where no class has two rows.
    """
    alike = labels[:, None] == labels
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same = alike & ~own
    if not same.any():
        raise ValueError("margin_loss: a batch needs two rows or more of a class; got one of each")
    count = max(1, int(same.sum()) // len(labels))
    distance = torch.cdist(embedding.detach(), embedding.detach())
    far = distance + 1e6 * (same | own | (distance < cutoff))
    nearest = far.topk(min(count, len(labels)), largest=False).indices
    found = [
        torch.stack([torch.full_like(ps, i), ps, ns])
        for i in range(len(labels))
        for ps, ns in [(same[i].nonzero()[:count, 0], nearest[i].sort().values[: int(same[i].sum())])]
    ]
    anchors, positives, negatives = torch.cat(found, 1)
    return anchors, positives, negatives


def margin_loss(
    embedding: Tensor, labels: Tensor, beta: Tensor | float = 1.2, *, margin: float = 0.2, cutoff: float = 0.5
) -> Tensor:
    """How far positives lie beyond beta - margin and negatives before beta + margin, over the triplets where any does.

    embedding: rows of length 1 [batch, dim]; labels: [batch]; beta: learned, or fixed.

    >>> import torch
    >>> from regard.models.dynamic_subspace import margin_loss
    >>> margin_loss(torch.eye(4), torch.tensor([0, 0, 1, 1]))  # all are root 2 apart
    tensor(0.4142)
    """
    anchors, positives, negatives = pairs(embedding, labels, cutoff=cutoff)
    apart = [((embedding[of] - embedding[anchors]).square().sum(1) + 1e-8).sqrt() for of in (positives, negatives)]
    near, far = F.relu(apart[0] - beta + margin), F.relu(beta - apart[1] + margin)
    return (near + far).sum() / ((near > 0) | (far > 0)).sum().clamp_min(1)


def clusters(features: Tensor, count: int, *, before: Tensor | None = None, seed: int = 0) -> Tensor:
    """k-means of features, each of length 1, numbered so as to share most members with the clusters before. [row]

    Needs scikit-learn and SciPy.
    """
    if count == 1:
        return torch.zeros(len(features), dtype=torch.long)
    with needs("clusters", "claims"):
        from scipy.optimize import linear_sum_assignment
        from sklearn.cluster import KMeans
    unit = F.normalize(features.detach().float(), dim=1).cpu().numpy()
    found = torch.from_numpy(KMeans(count, n_init=3, random_state=seed).fit_predict(unit))  # type: ignore[arg-type].long()
    if before is None:
        return found
    shared = torch.zeros(count, count)
    for new, old in zip(found.tolist(), before.clamp_max(count - 1).tolist()):
        shared[new, old] += 1
    return torch.from_numpy(linear_sum_assignment(shared.numpy(), maximize=True)[1])[found]


def train(
    model: SubspaceLearners,
    pictures: Tensor,
    labels: Tensor,
    judge: Callable[[SubspaceLearners], float],
    *,
    epochs: int = 300,
    batches: int | None = None,
    batch: int = 32,
    classes: int = 8,
    rate: float = 1e-5,
    patience: int = 10,
    every: int = 2,
    fine: float = 5 / 6,
    splits: bool = True,
    least: int = 5,
    seed: int = 0,
) -> list[int]:
    """Train in place, splitting when `judge`, of data held out, has not risen for `patience` epochs.

    batches: of an epoch, as many as the pictures fill unless given; classes: of a batch, balanced; every: epochs
    between new clusters; fine: share of the epochs after which the whole embedding is trained on everything; splits:
    False keeps the learners as they are; least: dimensions that a split keeps. Gives the number of learners after each
    epoch.
    """
    generator, betas = torch.Generator().manual_seed(seed), nn.ParameterList([nn.Parameter(torch.tensor(1.2))])

    def optimiser() -> torch.optim.Optimizer:
        while len(betas) < len(model.learners):
            betas.append(nn.Parameter(torch.tensor(1.2)))
        return torch.optim.Adam([*model.parameters(), *betas], rate, weight_decay=1e-4)

    best, since, tried, member, counts, steps = (
        -float("inf"),
        0,
        False,
        torch.zeros(len(labels)).long(),
        [],
        optimiser(),
    )
    for epoch in range(epochs):
        joined = epoch >= fine * epochs
        if joined or epoch % every == 0 or int(member.max()) + 1 != len(model.learners):
            pooled = pooled_of(model, pictures) if len(model.learners) > 1 and not joined else pictures
            member = clusters(pooled, 1 if joined else len(model.learners), before=member, seed=seed)
        moved: list[tuple[Tensor, Tensor]] = []
        model.train()
        for _ in range(batches or max(1, len(labels) // batch)):
            learner = int(torch.randint(int(member.max()) + 1, (1,), generator=generator))
            rows = balanced(labels, member == learner, batch, classes, generator)
            found = model(pictures[rows]).embedding
            found.retain_grad()
            own = found if joined else found[:, model.learners[learner]]
            loss = margin_loss(F.normalize(own, dim=1), labels[rows], betas[0 if joined else learner])
            steps.zero_grad()
            loss.backward()
            steps.step()
            if learner == len(model.learners) - 1 and found.grad is not None:
                moved.append((found.detach(), found.grad))
        value = judge(model.eval())
        best, since, tried = (value, 0, False) if value > best else (best, since + 1, tried)
        if splits and not tried and not joined and epoch and since >= patience and moved:
            activations, gradients = (torch.cat(of) for of in zip(*moved, strict=True))
            tried = True
            if model.split(importance(activations, gradients, model.learners[-1]), least=least):
                steps = optimiser()
        counts.append(len(model.learners))
    return counts


def balanced(labels: Tensor, among: Tensor, batch: int, classes: int, generator: torch.Generator) -> Tensor:
    """Rows of up to so many classes, as many of each, drawn with replacement. [batch]"""
    kinds = labels[among].unique()
    kinds = kinds[torch.randperm(len(kinds), generator=generator)[:classes]]
    each = -(-batch // len(kinds))
    rows = []
    for kind in kinds:
        own = (among & (labels == kind)).nonzero()[:, 0]
        rows.append(own[torch.randint(len(own), (each,), generator=generator)])
    return torch.cat(rows)[:batch]


@torch.no_grad()
def pooled_of(model: SubspaceLearners, pictures: Tensor) -> Tensor:
    """Pooled features of all pictures, in evaluation mode. [picture, channel]"""
    with evaluating(model):
        return torch.cat([model(some).pooled for some in pictures.split(256)])


def dynamic_subspace(backbone: nn.Module, *, channels: int, width: int = 128) -> SubspaceLearners:
    """A `SubspaceLearners` of this backbone, with one learner of all dimensions."""
    return SubspaceLearners(backbone, channels=channels, width=width)
