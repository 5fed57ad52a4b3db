"""A language model that asks, while it writes, where what it names is, and reads the regions that come back.

Li et al., CoVLM: Composing Visual Entities and Relationships in Large Language Models Via Communicative Decoding
(arXiv:2311.03354), section 3; tokens, region features, and what is asked of which token, as in the authors' code
(UMass-Embodied-AGI/CoVLM). At `visual` ("where is what I just said") and `previsual` ("where is what comes next") the
state of that token goes to a detector over the picture's patches; the mean of the patches in a region it finds takes
the place of the embedding of `box` or `prebox`.

Deviations: regions are always those of the row's own picture (the code loses count after a row without boxes). The
detector is a small head of ours where theirs is YOLOX's, with a loss of its own: objectness, and overlap at cells near
the middle of a true box. `generate` reads everything again for each token, without a cache, and sees to it that each
named entity is asked for: nothing is asked of tokens that call, so that they are not learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._boxes import iou, suppress

IGNORED = -100


@dataclass(frozen=True)
class Tokens:
    """Ids of the tokens by which language model and detector talk."""

    image: int  # one for each patch
    object: int  # before an entity
    endofobject: int  # after it, and after its regions
    visual: int
    box: int
    previsual: int
    prebox: int
    pad: int = IGNORED

    @property
    def calls(self) -> tuple[int, int]:
        return self.visual, self.previsual

    @property
    def regions(self) -> tuple[int, int]:
        return self.box, self.prebox


def regions(features: Tensor, boxes: Tensor) -> Tensor:
    """Mean of the patches that boxes cover. [place, dim], [n, 4] -> [n, dim]

    features: of a square picture, row by row; boxes: left, top, right, bottom from 0 to 1. Sides are cut to whole
    cells, both ends included, so that a box covers one cell at least. ValueError where patches make no square.

    >>> import torch
    >>> from regard.models.covlm import regions
    >>> regions(torch.arange(16.0)[:, None], torch.tensor([[0.3, 0.1, 0.6, 0.4]]))  # columns 1 and 2, rows 0 and 1
    tensor([[3.5000]])
    """
    side = _side(features)
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        raise ValueError(f"regions: boxes are [n, 4], got {list(boxes.shape)}")
    cells = (boxes * side).long().clamp(0, side - 1)
    low, high = cells[:, :2], torch.maximum(cells[:, 2:], cells[:, :2])
    at = torch.arange(side, device=features.device)
    columns, rows = ((at >= low[:, i, None]) & (at <= high[:, i, None]) for i in (0, 1))
    inside = (rows[:, :, None] & columns[:, None]).flatten(1).to(features)
    return inside @ features / inside.sum(-1, keepdim=True)


def region_places(input_ids: Tensor, tokens: Tokens) -> Tensor:
    """Where regions go, row by row and in order: row of the batch and place. [batch, token] -> [n, 2]"""
    return torch.isin(input_ids, torch.tensor(tokens.regions, device=input_ids.device)).nonzero()


def asked(input_ids: Tensor, tokens: Tokens) -> Tensor:
    """Labels: the ids, and -100 for the first token, those that call or hold regions or patches, padding, and what
    follows a region. [batch, token]
    """
    silent = (*tokens.calls, *tokens.regions, tokens.image, tokens.pad)
    ignored = torch.isin(input_ids, torch.tensor(silent, device=input_ids.device))
    ignored[:, 0] = True
    ignored[:, 1:] |= input_ids[:, :-1] == tokens.box
    return input_ids.masked_fill(ignored, IGNORED)


class RegionHead(nn.Module):
    """Boxes for a call, of its state beside every patch. [call, dim], [call, place, dim] -> boxes, logits

    Boxes are left, top, right, bottom from 0 to 1 [call, place, 4], one from each patch; logits say how sure it is.
    """

    def __init__(self, dim: int, *, width: int = 64) -> None:
        super().__init__()
        self.join = nn.Conv2d(2 * dim, width, 1)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, out, 1))
            for out in (1, 4)
        )

    def forward(self, states: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        side = _side(features)
        both = torch.cat([features, states[:, None].expand(-1, features.shape[1], -1)], -1)
        x = self.join(both.mT.unflatten(-1, (side, side)))
        sure, sides = (tower(x).flatten(2).mT for tower in self.towers)
        middle, size = sides[..., :2] / side + _centres(side).to(x), sides[..., 2:].clamp(-4, 4).exp() / side
        return torch.cat([middle - size / 2, middle + size / 2], -1), sure[..., 0]

    def loss(self, boxes: Tensor, logits: Tensor, truth: Tensor) -> Tensor:
        """Objectness and five times the lack of overlap, the mean over calls; truth: one true box a call [call, 4].

        Cells whose middle lies in the box, and within 1.5 cells of the box's own, stand for it; the nearest always.
        """
        at = _centres(_side(logits[..., None])).to(boxes)
        middle = (truth[:, :2] + truth[:, 2:]) / 2
        away = (at - middle[:, None]).abs() * at.shape[0] ** 0.5
        inside = ((at >= truth[:, None, :2]) & (at <= truth[:, None, 2:])).all(-1) & (away <= 1.5).all(-1)
        inside = inside.scatter(1, away.square().sum(-1).argmin(1, keepdim=True), True)
        shared = iou(boxes, truth[:, None])[..., 0]
        objectness = F.binary_cross_entropy_with_logits(logits, inside.to(logits), reduction="none").sum(1)
        lack = ((1 - shared.square()) * inside).sum(1) / inside.sum(1)
        near = (boxes - truth[:, None]).abs().mean(-1)  # where boxes do not meet, overlap has no gradient
        return (objectness + 5 * lack + 5 * (near * inside).sum(1) / inside.sum(1)).mean()


class Communicated(NamedTuple):
    """What a `Communicative` makes of texts with pictures."""

    logits: Tensor  # [batch, token, vocabulary]
    loss: Tensor | None
    calls: Tensor  # row and place of each token that calls [call, 2]
    boxes: Tensor  # found by each call [call, place, 4]
    sure: Tensor  # logits [call, place]


class Written(NamedTuple):
    """A text that was written, and the regions that came back."""

    ids: Tensor  # [token]
    regions: list[tuple[int, Tensor]]  # place of the token that called, and boxes [n, 4]


class Communicative(nn.Module):
    """A causal language model of transformers, a map of a picture's patches to its width, and a detector.

    channels: of a patch's features, of any encoder. Attention is the language model's own: `regard.record` sees it.

    >>> import torch
    >>> from transformers import LlamaConfig
    >>> from regard.models.covlm import Tokens, covlm
    >>> tokens = Tokens(image=0, object=1, endofobject=2, visual=3, box=4, previsual=5, prebox=6)
    >>> config = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2)
    >>> model = covlm(config, tokens, channels=8)
    >>> ids = torch.tensor([[0, 0, 0, 0, 1, 9, 2, 3, 4, 2, 7]])
    >>> found = model(ids, torch.randn(1, 4, 8), torch.tensor([[0.1, 0.2, 0.6, 0.7]]))
    >>> found.logits.shape, found.boxes.shape  # one call, a box from each of four patches
    (torch.Size([1, 11, 20]), torch.Size([1, 4, 4]))
    """

    def __init__(
        self, language_model: nn.Module, tokens: Tokens, *, channels: int, detector: RegionHead | None = None
    ) -> None:
        super().__init__()
        self.language_model, self.tokens = language_model, tokens
        dim = self._embed.weight.shape[1]
        self.project = nn.Linear(channels, dim)
        self.detector = detector or RegionHead(dim)

    @property
    def _embed(self) -> nn.Embedding:
        model: Any = self.language_model
        return model.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor,
        boxes: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        truth: Tensor | None = None,
        silent: bool = False,
        weight: float = 0.025,
    ) -> Communicated:
        """input_ids [batch, token], with an `image` token for each patch of features [batch, place, channel].

        boxes: of the regions at `region_places`, in their order [n, 4]; labels: as `asked` gives them; truth: the true
        box of each call, in order [call, 4]; silent: regions are zeros; weight: of the detector's loss. ValueError
        where boxes or patches are not as many as their tokens.
        """
        _side(features)
        patches, places = self.project(features), region_places(input_ids, self.tokens)
        images = input_ids == self.tokens.image
        if images.any(1).any() and not (images.sum(1) == features.shape[1]).all():
            raise ValueError(
                f"Communicative: {features.shape[1]} patches for {images.sum(1).tolist()} image tokens of each row"
            )
        if len(places) != (0 if boxes is None else len(boxes)):
            raise ValueError(
                f"Communicative: {0 if boxes is None else len(boxes)} boxes for {len(places)} tokens that hold a region"
            )
        hidden = self._embed(input_ids.clamp_min(0))
        if images.any():
            hidden = hidden.masked_scatter(images[..., None], patches.to(hidden))
        if boxes is not None and len(places):
            found = [regions(patches[i], boxes[places[:, 0] == i].to(patches)) for i in places[:, 0].unique().tolist()]
            hidden = hidden.index_put(tuple(places.T), torch.cat(found).to(hidden) * (not silent))
        output: Any = self.language_model(
            inputs_embeds=hidden, attention_mask=attention_mask, output_hidden_states=True, use_cache=False
        )
        calls = torch.isin(input_ids, torch.tensor(self.tokens.calls, device=input_ids.device)).nonzero()
        states = output.hidden_states[-1][calls[:, 0], calls[:, 1]]
        said, sure = self.detector(states, patches[calls[:, 0]])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
            if truth is not None and len(calls):
                loss = loss + weight * self.detector.loss(said, sure, truth)
        return Communicated(output.logits, loss, calls, said, sure)

    def detected(
        self, boxes: Tensor, sure: Tensor, *, most: int = 1, overlap: float = 0.45, least: float = 0.01
    ) -> Tensor:
        """The surest boxes of one call that overlap by no more than `overlap`, `most` of them. [place, 4] -> [n, 4]

        One at least, however unsure.
        """
        kept = suppress(boxes, sure, overlap)
        sure_enough = kept[sure[kept].sigmoid() > least]
        return boxes[sure_enough[:most] if len(sure_enough) else kept[:1]].clamp(0, 1)

    @torch.no_grad()
    def generate(
        self, features: Tensor, prompt: Sequence[int], *, most: int = 40, stop: int | None = None, boxes: int = 1
    ) -> Written:
        """Write on, the likeliest token each time, and ask for what is named. features [place, channel]

        prompt: ids, with their image tokens; those in it that call are answered. most: tokens to write, regions not
        counted; stop: the id that ends it; boxes: regions of a call at most.
        """
        t, ids, found, held = self.tokens, [], [], torch.zeros(0, 4, device=features.device)
        waiting, written = list(prompt), 0
        while waiting or written < most:
            if not waiting:
                logits = self(torch.tensor([ids], device=features.device), features[None], held).logits[0, -1].clone()
                logits[[t.image, *t.regions, t.visual]] = -torch.inf  # not its to write
                waiting, written = [int(logits.argmax())], written + 1
                if waiting[0] == stop:
                    break
            ids.append(waiting.pop(0))
            called = ids[-1] in t.calls
            named = ids[-1] == t.endofobject and t.object in ids and ids[-2] not in t.regions
            if named and not called and (not waiting or waiting[0] != t.visual):
                waiting.insert(0, t.visual)
            if called:
                said = self(torch.tensor([ids], device=features.device), features[None], held)
                kept = self.detected(said.boxes[-1], said.sure[-1], most=boxes)
                found.append((len(ids) - 1, kept))
                hold = t.box if ids[-1] == t.visual else t.prebox
                while waiting and waiting[0] == hold:
                    waiting.pop(0)
                ids, held = ids + [hold] * len(kept), torch.cat([held, kept])
        return Written(torch.tensor(ids), found)


def covlm(config: Any, tokens: Tokens, *, channels: int) -> Communicative:
    """An untrained `Communicative` around a causal language model of this configuration of transformers."""
    from transformers import AutoModelForCausalLM

    return Communicative(AutoModelForCausalLM.from_config(config), tokens, channels=channels)


def _side(features: Tensor) -> int:
    side = round(features.shape[-2] ** 0.5)
    if side**2 != features.shape[-2]:
        raise ValueError(f"covlm: {features.shape[-2]} patches are no square picture: give a square grid of them")
    return side


def _centres(side: int) -> Tensor:
    """x and y of the middles of cells, from 0 to 1, row by row. [place, 2]"""
    at = (torch.arange(side) + 0.5) / side
    return torch.stack([at.repeat(side), at.repeat_interleave(side)], -1)
