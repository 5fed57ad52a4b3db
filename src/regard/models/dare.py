"""Click prediction from a long history, with separate embeddings for attention and for representation.

Feng et al., Long-Sequence Recommendation Models Need Decoupled Embeddings (arXiv:2410.02604), with scores, search and
features as in the authors' code (thuml/DARE). The target scores every behaviour by the attention tables; softmax over
the best `top` weighs what the representation tables hold of them. One table for both is TWIN; here it is the coupling
`"shared"`, and `"projected"` and `"four"` are the paper's other ways to part the two.

Deviations: a history with fewer behaviours than `top` is softmax over those that are there, where the code refuses;
one without any gathers nothing. Two classes are one logit each, as in the code; a probability is their softmax plus
1e-8. The authors' plain `"projected"` shares one pair of maps between item and category, as here.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

Coupling = Literal["decoupled", "shared", "projected", "four"]
KINDS = "item", "category", "time"


class Ids(NamedTuple):
    """Of targets [batch] or of histories [batch, key]."""

    item: Tensor
    category: Tensor
    time: Tensor  # bin of its age


class Clicks(NamedTuple):
    """What is foretold of each target, and on what it rests."""

    logits: Tensor  # not clicked, clicked [batch, 2]
    auxiliary: Tensor  # the same, of attention to the whole history [batch, 2]
    weights: Tensor  # over behaviours, 0 for those not chosen [batch, key]
    scores: Tensor  # of all behaviours [batch, key]
    features: Tensor  # what the network reads [batch, feature]

    def probability(self) -> Tensor:
        """[batch, 2]"""
        return self.logits.softmax(-1) + 1e-8

    def loss(self, clicked: Tensor) -> Tensor:
        """Of what is foretold, and with weight 1 of attention to the whole history. clicked: boolean [batch]"""
        return sum((F.nll_loss((x.softmax(-1) + 1e-8).log(), clicked.long()) for x in self[:2]), torch.zeros(()))


class TargetAttention(nn.Module):
    """Softmax over the behaviours that score highest; then the weighted mean of their representations."""

    is_cross_attention = True

    def forward(self, scores: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """scores and seen [batch, key], value [batch, key, dim] -> [batch, dim], weights [batch, key]"""
        empty = ~seen.any(-1, keepdim=True)
        weights = scores.masked_fill(~seen & ~empty, -torch.inf).unsqueeze(1).softmax(-1)
        mixed = (weights @ value.masked_fill(empty[..., None], 0.0)).squeeze(1)
        return mixed, weights.squeeze(1).masked_fill(empty, 0.0)


class Dare(nn.Module, PyTorchModelHubMixin):
    """Foretells clicks. `regard.record` sees one layer of cross attention, the target as its only query.

    items, categories, times: how many ids there are; dim, attention_dim, time_dim: channels of a representation, of
    what attention compares (dim unless given), and of a time in each; top: behaviours that are read; coupling: which
    tables the two have in common; average: the mean of the history is a feature; hidden: widths of the network.
    `save_pretrained` and `from_pretrained` keep it with its sizes. ValueError for sizes that cannot be.

    >>> import torch
    >>> from regard.models.dare import Dare, Ids
    >>> model = Dare(50, 8, 20, dim=4, top=3).eval()
    >>> target, history = Ids(*torch.ones(3, 2, dtype=torch.long)), Ids(*torch.ones(3, 2, 6, dtype=torch.long))
    >>> found = model(target, history)
    >>> found.logits.shape, (found.weights > 0).sum(-1)
    (torch.Size([2, 2]), tensor([3, 3]))
    """

    def __init__(
        self,
        items: int,
        categories: int,
        times: int,
        *,
        dim: int = 16,
        attention_dim: int | None = None,
        time_dim: int = 16,
        top: int = 20,
        coupling: Coupling = "decoupled",
        average: bool = False,
        hidden: tuple[int, int] = (200, 80),
    ) -> None:
        super().__init__()
        own = dim if attention_dim is None else attention_dim
        if coupling not in ("decoupled", "shared", "projected", "four") or top < 1:
            raise ValueError(
                f"Dare: coupling is 'decoupled', 'shared', 'projected' or 'four', and top 1 or more; got "
                f"{coupling!r}, {top}"
            )
        if coupling == "shared" and own != dim:
            raise ValueError(f"Dare: a shared table has one width; got dim={dim} and attention_dim={own}")
        self.top, self.coupling, self.average = top, coupling, average

        def tables(width: int) -> nn.ModuleDict:
            sizes = zip(KINDS, (items, categories, times), (width, width, time_dim), strict=True)
            return nn.ModuleDict({kind: nn.Embedding(n, w) for kind, n, w in sizes})

        self.representation = tables(dim)
        self.attention_table = tables(own) if coupling in ("decoupled", "four") else None
        self.of_history = nn.ModuleList([tables(own), tables(dim)]) if coupling == "four" else None
        self.maps = None
        if coupling == "projected":
            self.maps = nn.ModuleList([nn.Linear(dim, own, bias=False), nn.Linear(dim, dim, bias=False)])
        self.attention = TargetAttention()
        whole = 2 * dim + time_dim
        features = whole * (5 if average else 3)
        first, second = hidden
        self.main = nn.Sequential(
            nn.BatchNorm1d(features),
            nn.Linear(features, first),
            nn.PReLU(init=0.1),
            nn.Linear(first, second),
            nn.PReLU(init=0.1),
            nn.Linear(second, 2),
        )
        self.second = nn.Sequential(
            nn.BatchNorm1d(3 * whole), nn.Linear(3 * whole, first), nn.PReLU(init=0.1), nn.Linear(first, 2)
        )

    def forward(self, target: Ids, history: Ids, mask: Tensor | None = None, *, recent: Tensor | None = None) -> Clicks:
        """target: ids [batch]; history: ids [batch, key]; mask: boolean [batch, key], False where it is filled up.

        recent: boolean [batch, key], behaviours to read in place of those that score highest.
        """
        shape = history.item.shape
        mask = torch.ones(shape, dtype=torch.bool, device=history.item.device) if mask is None else mask
        if len(shape) != 2 or mask.shape != shape or mask.dtype != torch.bool or len(target.item) != shape[0]:
            raise ValueError(
                f"Dare: takes targets [batch], histories [batch, key] and a boolean mask like these; got "
                f"{list(target.item.shape)}, {list(shape)} and {mask.dtype} {list(mask.shape)}"
            )
        scores = self.scores(target, history)
        scores = scores.masked_fill(~mask, max(float(1 - 2**32), torch.finfo(scores.dtype).min))
        read, keys = (
            self._held(target, attention=False, history=False),
            self._held(history, attention=False, history=True),
        )
        read, keys = torch.cat(read, -1), torch.cat(keys, -1)
        best = torch.zeros_like(mask).scatter(1, scores.topk(min(self.top, shape[1]), 1).indices, True)
        mixed, weights = self.attention(scores, keys, (best if recent is None else recent) & mask)
        features = [read, mixed]
        if self.average:
            mean = (keys * mask[..., None]).sum(1) / (mask.sum(1, keepdim=True) + 1)
            features += [mean, read * mixed, read * mean]
        else:
            features.append(read * mixed)
        everything = torch.softmax(scores, -1)[:, None].matmul(keys)[:, 0]
        joined = torch.cat(features, -1)
        auxiliary = self.second(torch.cat([read, everything, read * everything], -1))
        return Clicks(self.main(joined), auxiliary, weights, scores, joined)

    def scores(self, target: Ids, history: Ids) -> Tensor:
        """Scaled products of what attention holds: of item and category together, and of time. [batch, key]"""
        asked, keys = (
            self._held(target, attention=True, history=False),
            self._held(history, attention=True, history=True),
        )

        def product(query: Tensor, key: Tensor) -> Tensor:
            return (query[:, None] * key).sum(-1) * query.shape[-1] ** -0.5

        return product(torch.cat(asked[:2], -1), torch.cat(keys[:2], -1)) + product(asked[2], keys[2])

    def _held(self, ids: Ids, *, attention: bool, history: bool) -> list[Tensor]:
        """What the tables say of item, category and time."""
        tables = self.representation
        if self.of_history is not None and history:
            tables = self.of_history[0 if attention else 1]
        elif attention and self.attention_table is not None:
            tables = self.attention_table
        found = [tables[kind](of) for kind, of in zip(KINDS, ids, strict=True)]  # type: ignore[index]
        if self.maps is not None:
            found[:2] = [self.maps[0 if attention else 1](x) for x in found[:2]]
        return found


def dare(items: int, categories: int, times: int, **sizes: Any) -> Dare:
    """An untrained `Dare` of these sizes."""
    return Dare(items, categories, times, **sizes)
