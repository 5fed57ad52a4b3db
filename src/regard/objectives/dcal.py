"""Two more cross attentions beside a vision transformer's self-attention, while it trains.

Zhu et al., Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification
(arXiv:2205.02151, CVPR 2022). No code of the authors is public, and the paper's text was not at hand: formulas are by a
reader's account. Global-local: after the last layer, a block with weights of its own in which only the class token and
the patches that it relies on most, by rollout, ask, and all answer; it has a class head of its own. Pair-wise: the same
layers run again with keys and values of another picture of the batch appended, a distractor, and a third head has to
name the first picture's class; it is dropped after training. The losses are weighed by learned uncertainty.

With one block, as in the paper, the patches that ask change nothing about the class token, which asks by itself: which
they are counts from two `blocks` on, or where their states are read.

Ours: the distractor of a picture is the one before it in the batch, and its keys are those of its own pair-wise run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..call import Call, Site
from ..seam import intervene

NAME = "dcal"


class Judged(NamedTuple):
    """What the branches say, [batch, class] each. loss comes first, as a trainer of transformers wants it."""

    loss: Tensor | None
    logits: Tensor  # logarithms of the mean probability of the next two
    self_attention: Tensor
    global_local: Tensor
    pair_wise: Tensor | None  # in training only
    asking: Tensor  # numbers of the patches that asked, [batch, patch]


class dcal(nn.Module):
    """A classifier of pictures with its two cross-attention branches; a module to train in the classifier's place.

    model: a transformers classifier whose base model has a class token first, such as ViT's; it is trained in place,
    and goes on alone where nothing more is wanted. top: share of patches that ask in the global-local branch, 0.1 for
    fine-grained classes, 0.3 for re-identification. blocks: of that branch.

    `forward(pixel_values, labels)` gives `Judged`. In training mode the loss is `weighed` cross entropies of the three
    branches, else that of `logits`, which leave the pair-wise branch out. With `order`, the distractor of each picture,
    [batch]; by default the one before. ValueError where a model has no class token, or in training a batch has one
    picture, which leaves no distractor. A step of training costs up to five times a plain one; afterwards the model has
    one block more.

        branches = dcal(ViTForImageClassification(config))
        Trainer(branches, ...).train()
    """

    def __init__(self, model: nn.Module, *, top: float = 0.1, blocks: int = 1) -> None:
        super().__init__()
        config: Any = getattr(model, "config", None)
        if not any(name.endswith("cls_token") for name, _ in model.named_parameters()) or config is None:
            raise ValueError(
                f"{NAME} is for classifiers with a class token, such as ViT's; {type(model).__name__} has none"
            )
        if not 0 < top <= 1 or blocks < 1:
            raise ValueError(
                f"{NAME}: top is a share, above 0 up to 1, and there is a block or more; got {top}, {blocks}"
            )
        self.model, self.top = model, top
        dim, classes = config.hidden_size, config.num_labels
        sizes = {"heads": config.num_attention_heads, "inner": config.intermediate_size}
        self.blocks = nn.ModuleList(GlobalLocalAttention(dim, **sizes) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        self.global_local, self.pair_wise = nn.Linear(dim, classes), nn.Linear(dim, classes)
        self.weights = nn.Parameter(torch.zeros(3))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, order: Tensor | None = None) -> Judged:
        watch = _Watch()
        with intervene(self.model, watch):
            own = self.model(pixel_values).logits
        asking = most(response(watch.maps, watch.others), self.top)
        hidden = watch.states
        for block in self.blocks:
            hidden = block(hidden, F.pad(asking + watch.others, (1, 0)))
        local = self.global_local(self.norm(hidden[:, 0]))
        both = torch.stack([own, local]).log_softmax(-1).logsumexp(0) - torch.tensor(2.0).log()
        if not self.training:
            loss = None if labels is None else F.nll_loss(both, labels)
            return Judged(loss, both, own, local, None, asking)
        base: Any = self.model.base_model
        with intervene(self.model, Distracted(order)):
            pair = self.pair_wise(base(pixel_values).last_hidden_state[:, 0])
        loss = None
        if labels is not None:
            loss = weighed(torch.stack([F.cross_entropy(some, labels) for some in (own, local, pair)]), self.weights)
        return Judged(loss, both, own, local, pair, asking)


def weighed(losses: Tensor, weights: Tensor) -> Tensor:
    """Half the sum of losses / e^w + w: least, for a loss, where w is its logarithm. Both [branch]. A scalar.

    >>> import torch
    >>> float(weighed(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)))
    3.0
    """
    return 0.5 * (losses * (-weights).exp() + weights).sum()


def response(maps: Sequence[Tensor], others: int = 1) -> Tensor:
    """How much the class token relies on each patch, by rollout: the product of (map + identity) / 2. [batch, patch]

    maps: of the layers, the first first, means over heads [batch, token, token]. others: tokens before the patches, the
    class token first of them.

    >>> import torch
    >>> response([torch.full((1, 4, 4), 0.25)] * 2).tolist()
    [[0.1875, 0.1875, 0.1875]]
    """
    row = F.one_hot(torch.zeros((), dtype=torch.long), maps[0].shape[-1]).to(maps[0]).expand(len(maps[0]), 1, -1)
    for weights in reversed(maps):
        row = 0.5 * (row @ weights + row)
    return row[:, 0, others:]


def most(response: Tensor, top: float) -> Tensor:
    """Numbers of this share of the patches, at least one, with the largest response. [batch, chosen]"""
    return response.topk(max(1, int(top * response.shape[1])), dim=1).indices


class GlobalLocalAttention(nn.Module):
    """A block in which some tokens ask and all answer; those that do not ask pass as they are."""

    def __init__(self, dim: int, *, heads: int, inner: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.feed_forward = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))
        self.heads = heads

    def forward(self, hidden: Tensor, asking: Tensor) -> Tensor:
        """hidden: [batch, token, dim]; asking: numbers of tokens, [batch, query]. As hidden."""
        at = asking[..., None].expand(-1, -1, hidden.shape[2])
        normed, some = self.before(hidden), hidden.gather(1, at)
        given = (self.query(normed.gather(1, at)), self.key(normed), self.value(normed))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in given)
        some = some + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return hidden.scatter(1, at, some + self.feed_forward(self.after(some)))


class Distracted:
    """An intervention, pair-wise cross attention: keys and values of another picture of the batch come to each one's.

    order: whose, for each picture, [batch]; by default the one before. ValueError for a batch of one without `order`,
    or where a mask or causality says who sees what.
    """

    def __init__(self, order: Tensor | None = None) -> None:
        self.order = order

    def inputs(self, call: Call) -> Call:
        n = len(call.key)
        if call.mask is not None or call.causal or call.bias is not None:
            raise ValueError(
                f"{NAME}: {call.site} has a mask or a bias, and pictures beside each other need full attention"
            )
        if (n < 2 and self.order is None) or (self.order is not None and self.order.shape != (n,)):
            given = "no order" if self.order is None else f"an order of {list(self.order.shape)}"
            raise ValueError(
                f"{NAME}: a batch of {n} and {given}: each picture needs another of its batch as distractor"
            )
        order = torch.arange(n).roll(1) if self.order is None else self.order.cpu()
        key, value = (torch.cat([some, some[order.to(some.device)]], 2) for some in (call.key, call.value))
        tokens = None if call.tokens is None else call.tokens.then(call.tokens.of_rows(order))
        return call.but(key=key, value=value, tokens=tokens)


class _Watch:
    """Keeps the maps of each layer, and what the last gives on."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []  # [batch, token, token]
        self.states: Tensor = torch.empty(0)  # [batch, token, dim]
        self.others = 1  # tokens before the patches

    def output(self, call: Call, output: Tensor) -> Tensor:
        with torch.no_grad():
            self.maps.append(call.weights.dense().mean(1))
        if call.tokens is not None:
            self.others = int((~call.tokens.role("image")[0]).sum())
        return output

    def hidden(self, site: Site, hidden: Tensor) -> Tensor:
        self.states = hidden
        return hidden
