"""One mask decoder for any prompt: points, boxes, scribbles, masks, words, and the mask of the round before.

Zou et al., Segment Everything Everywhere All at Once (arXiv:2304.06718), section 3. Who sees whom, in self attention
and in the picture, is that of the authors' code (UX-Decoder/Segment-Everything-Everywhere-All-At-Once, the first
version). Queries for prompts are copies of the object queries; a prompt's tokens inform its own queries and no others,
so objects are found as they are without prompts. Layers are Mask2Former's: cross attention, self attention and an MLP,
each with its norm after; the backbone and the features of pixels are the caller's.

Deviations: a round has one prompt of places and one of words; with both, the queries of both compete by the sum of
their two scores; a token that is filled up sees itself, which nobody reads, so that no row is empty. Points are drawn
from masks of pixels, which is what boxes and scribbles are (`box_mask`, `disc_mask`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

# What each kind of token sees in self attention.
SEES: dict[str, tuple[str, ...]] = {
    "object": ("object",),
    "grounding": ("grounding", "text"),
    "spatial": ("spatial", "points", "memory"),
    "text": ("grounding", "text"),
    "points": ("points",),
    "memory": ("memory",),
}
LOOK = "object", "grounding", "spatial", "memory"  # those that attend to the picture


def visibility(kinds: Mapping[str, int], padding: Mapping[str, Tensor] | None = None) -> Tensor:
    """Who sees whom in self attention. [batch, query, key] boolean, batch 1 without padding

    kinds: how many tokens of each kind of `SEES`, in order; padding: of some of them, boolean [batch, token], True
    where a token is filled up: it sees nothing, and nothing sees it. ValueError for other kinds.

    >>> from regard.models.seem import visibility
    >>> visibility({"spatial": 1, "points": 2, "memory": 1})[0].int()
    tensor([[1, 1, 1, 1],
            [0, 1, 1, 0],
            [0, 1, 1, 0],
            [0, 0, 0, 1]], dtype=torch.int32)
    """
    if wrong := (kinds.keys() | (padding or {}).keys()) - SEES.keys():
        raise ValueError(f"visibility: kinds are {', '.join(SEES)}, got {', '.join(sorted(wrong))}")
    names = [name for name, count in kinds.items() for _ in range(count)]
    sees = torch.tensor([[key in SEES[query] for key in names] for query in names]).view(1, len(names), len(names))
    if not padding:
        return sees
    one = next(iter(padding.values()))
    none = torch.zeros(len(one), 0, dtype=torch.bool, device=one.device)
    real = ~torch.cat(
        [padding.get(name, none.new_zeros(len(one), count)) for name, count in kinds.items() if count] or [none], 1
    )
    return sees.to(one.device) & real[:, :, None] & real[:, None]


def looks(predicted: Tensor, kinds: Mapping[str, int], previous: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Which places of a map each token attends to. [batch, query, place] boolean

    predicted: where each token's own mask is, for the kinds of `LOOK` in order; previous: logits of the mask of the
    round before [batch, 1, row, column], where the memory looks; size: rows and columns of the map. A token that would
    see no place sees all.
    """
    found, start = predicted.clone(), 0
    for name, count in kinds.items():
        if name == "memory" and count and previous is not None:
            there = resized(previous, size).flatten(1).sigmoid() >= 0.5
            found[:, start : start + count] = there[:, None]
        start += count
    return found | ~found.any(-1, keepdim=True)


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def disc_mask(centres: Tensor, size: tuple[int, int], radius: float) -> Tensor:
    """Pixels within `radius` of a point, x and y in pixels. [batch, 2] -> boolean [batch, row, column]"""
    y, x = (torch.arange(n, device=centres.device) + 0.5 for n in size)
    away = (x - centres[:, None, None, 0]).square() + (y[:, None] - centres[:, None, None, 1]).square()
    return away <= radius**2


def box_mask(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels in a box, left, top, right, bottom in pixels. [batch, 4] -> boolean [batch, row, column]"""
    y, x = (torch.arange(n, device=boxes.device) + 0.5 for n in size)
    left, top, right, bottom = (side[:, None, None] for side in boxes.unbind(-1))
    return (x >= left) & (x <= right) & (y[:, None] >= top) & (y[:, None] <= bottom)


def sample_points(masks: Tensor, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Up to `count` pixels of each mask at random: x and y from 0 to 1 [batch, point, 2], and which are filled up.

    masks: boolean [batch, row, column]. 0 is the first row or column, 1 the last.
    """
    lots = torch.rand(masks.shape, generator=generator, device=masks.device).masked_fill(~masks, 2.0).flatten(1)
    drawn, at = lots.topk(min(count, lots.shape[1]), largest=False)
    rows, columns = masks.shape[1:]
    places = torch.stack([at % columns / max(columns - 1, 1), at // columns / max(rows - 1, 1)], -1)
    return places, drawn > 1


class Prompts(NamedTuple):
    """What to segment: pixels that belong to it, pixels that do not, words, and the round before."""

    positive: Tensor | None = None  # boolean [batch, row, column], of points, a box, a scribble or a mask
    negative: Tensor | None = None  # likewise
    text: Tensor | None = None  # of words [batch, word, dim]
    text_padding: Tensor | None = None  # boolean [batch, word], True where filled up
    memory: Tensor | None = None  # logits of the mask chosen before [batch, row, column]


class Segmented(NamedTuple):
    """Masks of every query, and the one chosen for the prompts."""

    masks: dict[str, Tensor]  # logits of the queries of each kind [batch, query, row, column]
    classes: dict[str, Tensor]  # embeddings to be compared with words [batch, query, dim]
    chosen: Tensor | None  # logits [batch, row, column]; the next round's memory
    scores: Tensor | None  # of the queries for prompts, the highest is chosen [batch, query]
    candidates: Tensor | None  # their masks [batch, query, row, column]
    earlier: tuple[Segmented, ...] = ()  # in training: what was found after each layer but the last


class PromptLayer(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.cross = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cross.is_cross_attention = True  # type: ignore[assignment]  # as other modules say it, to `record`
        self.own = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.heads = heads


class PromptDecoder(nn.Module, PyTorchModelHubMixin):
    """Masks for objects and for prompts, from features of pixels. Saved and loaded as on the hub.

    dim: of tokens and features; queries: of objects, and as many of each kind of prompt; memories: of the round before;
    points: drawn from a prompt at most; levels: maps of features, taken in turn. `regard.record` sees cross and self
    attention.

    >>> import torch
    >>> from regard.models.seem import Prompts, seem
    >>> model = seem(dim=16, heads=2, layers=2, hidden=32, queries=4, memories=2, levels=1)
    >>> prompts = Prompts(positive=torch.rand(1, 16, 16) > 0.8, text=torch.randn(1, 3, 16))
    >>> found = model([torch.randn(1, 16, 8, 8)], torch.randn(1, 16, 16, 16), prompts)
    >>> found.masks["object"].shape, found.chosen.shape
    (torch.Size([1, 4, 16, 16]), torch.Size([1, 16, 16]))
    """

    def __init__(
        self,
        *,
        dim: int = 512,
        heads: int = 8,
        layers: int = 9,
        hidden: int = 2048,
        queries: int = 101,
        memories: int = 32,
        points: int = 512,
        levels: int = 3,
    ) -> None:
        super().__init__()
        if dim % 4 or dim % heads:
            raise ValueError(f"PromptDecoder: dim is a multiple of 4 and of heads={heads}, got {dim}")
        self.points = points
        self.queries, self.query_places = (nn.Parameter(torch.randn(queries, dim) * 0.5) for _ in range(2))
        self.memories, self.memory_places = (nn.Parameter(torch.randn(memories, dim) * 0.5) for _ in range(2))
        self.level = nn.Parameter(torch.zeros(levels, dim))
        self.point_maps = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(levels))
        self.signs = nn.Parameter(0.02 * torch.randn(2, dim))  # of positive and negative points
        self.layers = nn.ModuleList(PromptLayer(dim, heads, hidden) for _ in range(layers))
        self.norm, self.classes = nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False)
        self.mask = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(
        self,
        levels: Sequence[Tensor],
        mask_features: Tensor,
        prompts: Prompts | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Segmented:
        """levels: features [batch, dim, row, column] of so many maps; mask_features: what masks are read from, of any
        size. generator: of the points that are drawn. ValueError for other levels, and a memory without a prompt of
        places.
        """
        p = prompts or Prompts()
        if len(levels) != len(self.point_maps) or any(
            x.ndim != 4 or x.shape[1] != self.queries.shape[1] for x in levels
        ):
            raise ValueError(
                f"PromptDecoder: {len(self.point_maps)} levels [batch, {self.queries.shape[1]}, row, column]; got "
                f"{[list(x.shape) for x in levels]}"
            )
        places = p.positive is not None
        if (p.memory is not None or p.negative is not None) and not places:
            raise ValueError(
                "PromptDecoder: a memory or negative points go with a prompt of places: give positive ones"
            )
        batch, drawn = len(mask_features), self._drawn(p, generator) if places else None
        tokens, at, kinds, padding = self._start(batch, p, drawn)
        maps = [x.flatten(2).mT + own for x, own in zip(levels, self.level, strict=True)]
        where = [_sines(x).to(x).expand(batch, -1, -1) for x in levels]
        outputs, earlier = self._read(tokens, mask_features, kinds), []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, PromptLayer)
            k = i % len(levels)
            if drawn is not None:  # points are taken anew from the layer's level
                told = self.point_maps[k](_at(levels[k], drawn[0])) + self.signs[drawn[1]]
                tokens, at = tokens | {"points": told}, at | {"points": told.detach()}
            looking = {name: n for name, n in kinds.items() if name in LOOK}
            masks = torch.cat([outputs[0][name] for name in looking], 1)
            size = (levels[k].shape[2], levels[k].shape[3])
            own = (resized(masks, size).flatten(2).sigmoid() >= 0.5).detach()
            sees = looks(own, looking, None if p.memory is None else p.memory[:, None], size)
            x = torch.cat([tokens[name] for name in looking], 1)
            q = x + torch.cat([at[name] for name in looking], 1)
            blocked = ~sees.repeat_interleave(layer.heads, 0)
            x = layer.norms[0](
                x + layer.cross(q, maps[k] + where[k], maps[k], attn_mask=blocked, need_weights=False)[0]
            )
            tokens = tokens | dict(zip(looking, x.split(list(looking.values()), 1), strict=True))
            x, q = (torch.cat([of[name] for name in kinds], 1) for of in (tokens, at))
            sees = visibility(kinds, padding).to(x.device)
            sees = sees.expand(batch, -1, -1) | torch.eye(sees.shape[-1], dtype=torch.bool, device=x.device)
            blocked = ~sees.repeat_interleave(layer.heads, 0)
            x = layer.norms[1](x + layer.own(x + q, x + q, x, attn_mask=blocked, need_weights=False)[0])
            x = layer.norms[2](x + layer.mlp(x))
            tokens = dict(zip(kinds, x.split(list(kinds.values()), 1), strict=True))
            outputs = self._read(tokens, mask_features, kinds)
            if self.training and i < len(self.layers) - 1:
                earlier.append(self._chosen(outputs, tokens, p, drawn, mask_features))
        return self._chosen(outputs, tokens, p, drawn, mask_features)._replace(earlier=tuple(earlier))

    def _drawn(self, p: Prompts, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Points [batch, point, 2], whether each is negative (1) and whether it is filled up [batch, point]."""
        found = [sample_points(m, self.points, generator) for m in (p.positive, p.negative) if m is not None]
        signs = torch.cat([torch.full_like(filled, i, dtype=torch.long) for i, (_, filled) in enumerate(found)], 1)
        return torch.cat([of[0] for of in found], 1), signs, torch.cat([of[1] for of in found], 1)

    def _start(self, batch: int, p: Prompts, drawn: Any) -> tuple[Any, ...]:
        """Tokens, what is added to them as their places, how many of each kind, and which are filled up."""
        tokens, at, padding = {"object": self.queries}, {"object": self.query_places}, {}
        if p.text is not None:
            tokens["grounding"], at["grounding"] = self.queries, self.query_places
        if drawn is not None:
            tokens["spatial"], at["spatial"] = self.queries, self.query_places
            tokens["memory"], at["memory"] = self.memories, self.memory_places
        tokens, at = ({n: x.expand(batch, -1, -1) for n, x in of.items()} for of in (tokens, at))
        kinds = {name: x.shape[1] for name, x in tokens.items()}
        if p.text is not None:
            padding["text"] = p.text.new_zeros(p.text.shape[:2]).bool() if p.text_padding is None else p.text_padding
            text = p.text.masked_fill(padding["text"][..., None], 0.0)  # a weight of 0 does not stop a NaN
            tokens["text"], at["text"], kinds["text"] = text, text.detach(), text.shape[1]
        if drawn is not None:
            kinds["points"], padding["points"] = drawn[0].shape[1], drawn[2]
        return tokens, at, kinds, padding

    def _read(self, tokens: Mapping[str, Tensor], features: Tensor, kinds: Mapping[str, int]) -> tuple[Any, ...]:
        """Logits of masks, embeddings of classes and of masks, of each kind that looks at the picture."""
        normed = {name: self.norm(tokens[name]) for name in kinds if name in LOOK}
        embedded = {name: self.mask(x) for name, x in normed.items()}
        masks = {name: torch.einsum("bqd,bdhw->bqhw", x, features) for name, x in embedded.items()}
        return masks, {name: self.classes(x) for name, x in normed.items()}, embedded

    def _chosen(self, outputs: Any, tokens: Any, p: Prompts, drawn: Any, features: Tensor) -> Segmented:
        masks, classes, embedded = outputs
        names = [name for name in ("spatial", "grounding") if name in masks]
        if not names:
            return Segmented(masks, classes, None, None, None)
        scores: list[Tensor] = []
        if drawn is not None:  # like the features at positive points
            counts = ((drawn[1] == 0) & ~drawn[2]).to(features)[..., None]
            mean = (_at(features, drawn[0]) * counts).sum(1) / counts.sum(1).clamp_min(1)
            scores.append(torch.cat([embedded[n] for n in names], 1) @ mean[..., None])
        if p.text is not None:  # like the words
            real = (
                torch.ones_like(p.text[..., :1]) if p.text_padding is None else (~p.text_padding[..., None]).to(p.text)
            )
            words = self.classes(self.norm((tokens["text"] * real).sum(1) / real.sum(1).clamp_min(1)))
            scores.append(torch.cat([classes[n] for n in names], 1) @ words[..., None] * words.shape[-1] ** -0.5)
        score = torch.stack(scores).log_softmax(2).sum(0)[..., 0]
        candidates = torch.cat([masks[n] for n in names], 1)
        best = score.argmax(-1)
        return Segmented(masks, classes, candidates[torch.arange(len(best)), best], score, candidates)


def mask_errors(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross entropy and dice error of masks. [..., row, column], boolean of a shape that fits -> [...]"""
    truth = truth.to(logits).expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((-2, -1))
    likely = logits.sigmoid()
    both = (likely * truth).sum((-2, -1))
    return entropy, 1 - (2 * both + 1) / (likely.sum((-2, -1)) + truth.sum((-2, -1)) + 1)


def prompt_loss(found: Segmented, truth: Tensor) -> Tensor:
    """Mask and dice error of the best query for the prompts, and 0.4 times the cross entropy of choosing it.

    truth: what was meant, boolean [batch, row, column]. Layers add up.
    """
    if found.candidates is None or found.scores is None:
        raise ValueError("prompt_loss: nothing was prompted")
    entropy, dice = mask_errors(found.candidates, truth[:, None])
    best = (entropy + dice - 0.1 * found.scores).detach().argmin(-1)
    rows = torch.arange(len(best))
    loss = (entropy + dice)[rows, best].mean() + 0.4 * F.cross_entropy(found.scores, best)
    return loss + sum(prompt_loss(layer, truth) for layer in found.earlier)


def seem(**knobs: int) -> PromptDecoder:
    """An untrained `PromptDecoder` with these knobs."""
    return PromptDecoder(**knobs)


def _at(maps: Tensor, places: Tensor) -> Tensor:
    """Features at places from 0 to 1, between cells where need be. [batch, dim, row, column] -> [batch, point, dim]"""
    return F.grid_sample(maps, 2 * places[:, None].to(maps) - 1, align_corners=True)[:, :, 0].mT


def _sines(x: Tensor) -> Tensor:
    """Sines and cosines of where cells lie. [1, place, dim]"""
    rate = 2 * torch.pi * 2 ** torch.linspace(-2, 3, x.shape[1] // 4)
    angles = [((torch.arange(n) + 0.5) / n)[:, None] * rate for n in x.shape[2:]]
    rows, columns = (torch.cat([angle.sin(), angle.cos()], -1) for angle in angles)
    grid = [rows[:, None].expand(-1, len(columns), -1), columns[None].expand(len(rows), -1, -1)]
    return torch.cat(grid, -1).flatten(0, 1)[None]
