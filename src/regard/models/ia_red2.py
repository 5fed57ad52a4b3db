"""Drops patches of a vision transformer between its blocks, by what small modules learn to score them.

Pan et al., IA-RED^2: Interpretability-Aware Redundancy Reduction for Vision Transformers (arXiv:2106.12620), section 3:
before each group of blocks an interpreter scores every patch by the class token's query; those at one half or below
are gone for all blocks after it. Interpreters learn one after another by policy gradient: 1 - (share kept)^2 where the
model stays right, -tau where it errs, above the reward of what the threshold keeps.

The blocks are those of a transformers `ViTForImageClassification`, as they are. Deviations: dropped tokens are taken
out (`form="gathered"`), which the class token cannot tell from the authors' masked form (`form="masked"`); the map of
an interpreter has no part for values, which theirs do not use. The authors' training code was not at hand: reward and
order of learning are the text's. Their last step, tuning the blocks with what is dropped held fixed, is left to any
trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTForImageClassification

Form = Literal["gathered", "masked"]


class Interpreter(nn.Module):
    """Scores of tokens by the class token's query: the mean over heads of a sigmoid. [batch, token], 0 to 1

    >>> import torch
    >>> from regard.models.ia_red2 import Interpreter
    >>> Interpreter(12, heads=2)(torch.randn(3, 10, 12)).shape
    torch.Size([3, 10])
    """

    def __init__(self, dim: int, *, heads: int = 6) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"Interpreter: {dim} channels do not divide by {heads} heads")
        self.heads, self.norm = heads, nn.LayerNorm(dim, elementwise_affine=False)
        self.query_key = nn.Linear(dim, 2 * dim)

    def forward(self, tokens: Tensor, alive: Tensor | None = None) -> Tensor:
        """tokens: [batch, token, dim], the class token first; alive: boolean [batch, token], the others score 0."""
        if alive is not None:
            tokens = tokens * alive[..., None]
        parts = self.query_key(self.norm(tokens)).unflatten(-1, (2, self.heads, -1))
        query, key = parts[:, :1, 0], parts[:, :, 1]  # [batch, token, head, dim]
        scores = ((query * key).sum(-1) * query.shape[-1] ** -0.5).sigmoid().mean(-1)
        return scores if alive is None else scores * alive


class Stage(NamedTuple):
    """What came of one group of blocks."""

    tokens: Tensor  # after it [batch, token, dim], those kept, or all where masked
    scores: Tensor  # before it, of all tokens; 0 where gone [batch, token]
    kept: Tensor  # boolean [batch, token]
    places: Tensor  # which token of the picture each of `tokens` is [batch, token]
    alive: Tensor  # which of `tokens` are kept, and do not fill a row up [batch, token]


class Pruned(NamedTuple):
    """A prediction, and what it was made of."""

    logits: Tensor  # [batch, class]
    scores: Tensor  # of patches, before each group; 0 where gone [batch, group, patch]
    kept: Tensor  # boolean [batch, group, patch]


class IaRed2(nn.Module, PyTorchModelHubMixin):
    """A vision transformer that drops patches as it goes.

    groups: how many blocks each group has, in order; heads: of each interpreter. `from_pretrained(folder, vit=...)`
    reads what `save_pretrained` wrote. Raises TypeError for a model that is no `ViTForImageClassification`, ValueError
    where groups do not sum to its blocks.

    >>> from regard import zoo
    >>> from regard.models.ia_red2 import IaRed2
    >>> model = IaRed2(zoo.load("viewer")[0], [2, 2, 2], heads=4)
    >>> model(torch.zeros(1, 3, 64, 64)).kept.shape
    torch.Size([1, 3, 64])
    """

    def __init__(self, vit: ViTForImageClassification, groups: Sequence[int], *, heads: int = 6) -> None:
        super().__init__()
        if not isinstance(vit, ViTForImageClassification):
            raise TypeError(
                "IaRed2: takes a transformers ViTForImageClassification, whose class token asks; got "
                f"{type(vit).__name__}"
            )
        if sum(groups) != len(vit.vit.layers) or min(groups, default=0) < 1:
            raise ValueError(
                f"IaRed2: groups of {list(groups)} blocks do not sum to the {len(vit.vit.layers)} of the model"
            )
        self.vit, self.groups = vit, list(groups)
        self.interpreters = nn.ModuleList(Interpreter(vit.config.hidden_size, heads=heads) for _ in groups)

    def forward(
        self,
        pixel_values: Tensor,
        *,
        only: Collection[int] | None = None,
        share: float | None = None,
        form: Form = "gathered",
    ) -> Pruned:
        """pixel_values: [batch, channel, row, column].

        only: the groups whose interpreters drop anything, all unless given; share: of the patches of the picture that
        each of these keeps, by score, in place of the threshold of one half.
        """

        def keep(group: int, scores: Tensor, alive: Tensor) -> Tensor:
            return alive if only is not None and group not in only else chosen(scores, alive, share)

        stages = list(self.stages(self.vit.vit.embeddings(pixel_values), keep, form=form))
        scores, kept = (torch.stack([getattr(s, name)[:, 1:] for s in stages], 1) for name in ("scores", "kept"))
        return Pruned(self.read(stages[-1].tokens), scores, kept)

    def stages(
        self,
        tokens: Tensor,
        keep: Callable[[int, Tensor, Tensor], Tensor],
        *,
        form: Form = "gathered",
        first: int = 0,
    ) -> Iterator[Stage]:
        """Group by group, from `first` on, whose input are tokens [batch, token, dim], all of them.

        keep: group, scores and who is alive, both [batch, token] -> who stays; the class token always does.
        """
        batch, count = tokens.shape[:2]
        places = torch.arange(count, device=tokens.device).expand(batch, -1)
        alive = kept = torch.ones_like(places, dtype=torch.bool)
        bounds = np.cumsum([0, *self.groups])
        for group in range(first, len(self.groups)):
            here = self.interpreters[group](tokens, alive)
            scores = torch.zeros(batch, count, dtype=here.dtype, device=here.device).scatter_add(1, places, here)
            kept = (keep(group, scores, kept) & kept) | (torch.arange(count, device=kept.device) == 0)
            alive = kept.gather(1, places) & alive
            if form == "gathered":
                order = torch.argsort(alive.int(), dim=1, descending=True, stable=True)[:, : int(alive.sum(1).max())]
                tokens = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[-1]))
                places, alive = places.gather(1, order), alive.gather(1, order)
            tokens = tokens * alive[..., None]
            mask = (
                None if bool(alive.all()) else alive[:, None, None] & (alive[:, None, :, None] | (form == "gathered"))
            )
            if mask is not None and self.vit.config._attn_implementation == "eager":  # which adds its mask
                mask = torch.zeros_like(mask, dtype=tokens.dtype).masked_fill(~mask, torch.finfo(tokens.dtype).min)
            for block in self.vit.vit.layers[bounds[group] : bounds[group + 1]]:
                tokens = block(tokens, mask)
            yield Stage(tokens, scores, kept, places, alive)

    def read(self, tokens: Tensor) -> Tensor:
        """The scores of classes, of tokens after the last block. [batch, class]"""
        return self.vit.classifier(self.vit.vit.layernorm(tokens)[:, 0])


def chosen(scores: Tensor, alive: Tensor, share: float | None = None) -> Tensor:
    """Which tokens stay: those above one half, or the highest `share` of all but the first. Boolean [batch, token]

    >>> import torch
    >>> from regard.models.ia_red2 import chosen
    >>> chosen(torch.tensor([[0.1, 0.75, 0.5, 0.25]]), torch.ones(1, 4, dtype=torch.bool))
    tensor([[ True,  True, False, False]])
    """
    if share is None:
        kept = scores > 0.5
    else:
        rank = scores[:, 1:].masked_fill(~alive[:, 1:], -torch.inf).argsort(1, descending=True).argsort(1)
        kept = F.pad(rank < round(share * rank.shape[1]), (1, 0), value=True)
    kept = kept & alive
    kept[:, 0] = True
    return kept


def cost(kept: Tensor, groups: Sequence[int]) -> Tensor:
    """What is left of the blocks' operations, as the paper counts: each patch the same. 0 to 1, [batch]

    kept: [batch, group, patch].

    >>> import torch
    >>> from regard.models.ia_red2 import cost
    >>> cost(torch.arange(8) < torch.tensor([[[8], [4], [2]]]), [4, 4, 4])
    tensor([0.5833])
    """
    sizes = torch.tensor(groups, dtype=torch.float32, device=kept.device)
    return (kept.float().mean(-1) * sizes / sizes.sum()).sum(-1)


def policy_gradient(
    model: IaRed2,
    tokens: Tensor,
    labels: Tensor,
    *,
    group: int,
    tau: float = 2.0,
    first: int = 0,
    right: Callable[[Tensor, Tensor], Tensor] = lambda logits, labels: logits.argmax(-1) == labels,
) -> Tensor:
    """The loss whose gradient teaches the interpreter of one group; those before it drop, those after it do not yet.

    tokens: what enters group `first` [batch, token, dim], the embeddings unless told otherwise; right: logits and
    labels -> boolean [batch]. Patches are drawn by their scores; the reward of those that the threshold keeps is the
    baseline. Only the log-likelihood has a gradient.
    """
    sampled: list[Tensor] = []

    def keep(draw: bool) -> Callable[[int, Tensor, Tensor], Tensor]:
        def of(at: int, scores: Tensor, alive: Tensor) -> Tensor:
            if at > group:
                return alive
            if at < group or not draw:
                return chosen(scores, alive)
            sampled.extend([torch.bernoulli(scores).bool() & alive, alive])
            return sampled[0]

        return of

    with torch.no_grad():
        rewards = []
        for draw in (True, False):
            *_, last = model.stages(tokens, keep(draw), first=first)
            share = last.kept[:, 1:].float().mean(1)
            rewards.append(torch.where(right(model.read(last.tokens), labels), 1 - share.square(), -tau))
        stages = model.stages(tokens, keep(False), first=first)
        before = next((s for i, s in enumerate(stages) if i + first == group - 1), None)
    drawn, alive = sampled
    if before is None:
        scores = model.interpreters[group](tokens)
    else:
        here = model.interpreters[group](before.tokens, before.alive)
        scores = torch.zeros_like(drawn, dtype=here.dtype).scatter_add(1, before.places, here)
    likely = torch.where(drawn, scores, 1 - scores).clamp_min(1e-6).log()
    return -((rewards[0] - rewards[1]) * (likely * alive)[:, 1:].sum(1)).mean()


def scores_of(found: Pruned) -> xr.DataArray:
    """The scores of a square picture's patches before each group, as an attribution. [batch, group, row, column]"""
    side = round(found.scores.shape[-1] ** 0.5)
    return xr.DataArray(
        found.scores.detach().unflatten(-1, (side, side)).cpu().numpy(),
        dims=("batch", "group", "row", "column"),
        name="ia_red2",
    )


def ia_red2(vit: ViTForImageClassification, groups: Sequence[int], *, heads: int = 6) -> IaRed2:
    """An `IaRed2` around this model, its interpreters untrained."""
    return IaRed2(vit, groups, heads=heads)
