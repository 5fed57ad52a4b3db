"""Corner and centre points strengthen the features of a detector that thinks in anchor boxes, by attention.

Chi et al., RelationNet++: Bridging Visual Representations for Object Detection via Transformer Decoder
(arXiv:2010.15831), section 3; attention, location embedding and point head as in the authors' code
(microsoft/RelationNet2). A cell of the map is a query, points are keys; what a key is worth also depends on where it
lies as seen from the query. The location term is read from a map that is computed once (`base`), or exactly (None); the
logarithm comes after the reading. Its bias starts at 0.5, so that no key is cut off before anything is learned (ours).

`BridgedDetector` is a small anchor detector of ours to put it in: one level, one anchor a cell. Deviations of it: the
Gaussian of point targets has a fixed width of 0.7 cells, where the authors' follows the box; points come from one
level, so that none are exchanged between levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ._boxes import anchor_losses, centres, normed, point_losses, suppress, truths

Kind = Literal["top-left", "bottom-right", "centre"]
KINDS: tuple[Kind, ...] = ("top-left", "bottom-right", "centre")


class LocationBias(nn.Module):
    """What the place of a key, as seen from a query, adds to their score. [..., 2] -> [..., head]

    dim: of the sines and cosines, a multiple of 4; base: width and height of the map of relative positions that values
    are read from, None to compute each. With `align_corners=False`, as in the authors' code, what is read is the bias
    of positions stretched by (base + 1) / base. log: the logarithm of the value, at least 1e-6.

    >>> import torch
    >>> from regard.models.bridging_representations import LocationBias
    >>> LocationBias(16, 4, base=(20, 20))(torch.randn(3, 5, 2)).shape
    torch.Size([3, 5, 4])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        base: tuple[int, int] | None = (400, 400),
        log: bool = True,
        temperature: float = 1000.0,
    ) -> None:
        super().__init__()
        if dim % 4 or (base is not None and any(n < 2 or n % 2 for n in base)):
            raise ValueError(f"LocationBias: dim is a multiple of 4 and base even or None, got {dim} and {base}")
        self.dim, self.base, self.log, self.temperature = dim, base, log, temperature
        self.read = nn.Linear(dim, heads)
        nn.init.normal_(self.read.weight, std=0.01)
        nn.init.constant_(self.read.bias, 0.5 if log else 0.0)

    def embedding(self, places: Tensor) -> Tensor:
        """Sines, then cosines of x, then of y, each at dim / 4 frequencies. [..., 2] -> [..., dim]"""
        count = self.dim // 4
        rates = self.temperature ** (-4 * torch.arange(count, device=places.device, dtype=places.dtype) / self.dim)
        angles = places[..., None] * rates
        return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)

    def table(self) -> Tensor | None:
        """The map of whole relative positions [head, row, column]; None without `base`."""
        if self.base is None:
            return None
        x, y = (torch.arange(-(n // 2), n // 2 + 1, device=self.read.weight.device) for n in self.base)
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).to(self.read.weight.dtype)
        return self._read(places).movedim(-1, 0)

    def forward(self, places: Tensor, table: Tensor | None = None) -> Tensor:
        """places: key less query, x then y, in cells [..., 2]; table: of `table`, where it is at hand."""
        table = self.table() if table is None else table
        if table is None:
            return self._logarithm(self._read(places))
        half = places.new_tensor(cast(tuple[int, int], self.base)) / 2
        at = (places / half).flatten(0, -2)[None, None]
        read = F.grid_sample(table[None], at, padding_mode="border", align_corners=False)
        return self._logarithm(read[0, :, 0].mT.unflatten(0, places.shape[:-1]))

    def _read(self, places: Tensor) -> Tensor:
        return self.read(self.embedding(places))

    def _logarithm(self, found: Tensor) -> Tensor:
        return found.clamp_min(1e-6).log() if self.log else found


class PointAttention(nn.Module):
    """Queries attend to points of one kind; scores have a location term. All four maps have a bias."""

    is_cross_attention = True

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"PointAttention: {dim} channels do not divide by {heads} heads")
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, queries: Tensor, points: Tensor, bias: Tensor | None) -> Tensor:
        """queries [batch, query, dim], points [batch, key, dim], bias [batch, head, query, key] -> as queries"""
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, x in ((self.query, queries), (self.key, points), (self.value, points))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Bridge(nn.Module):
    """Adds to each cell what points of each kind tell it: relu(query + sum over kinds). The same shapes

    kinds: how many; location: None for scores of features alone. `regard.record` sees a layer for each kind and level.

    >>> import torch
    >>> from regard.models.bridging_representations import Bridge, LocationBias, centres
    >>> bridge = Bridge(16, 4, kinds=1, location=LocationBias(16, 4, base=None))
    >>> points, places = torch.randn(2, 5, 16), 64 * torch.rand(2, 5, 2)
    >>> (found,) = bridge([torch.randn(2, 3, 4, 16)], [centres(3, 4, 8)], [[points]], [[places]])
    >>> found.shape
    torch.Size([2, 3, 4, 16])
    """

    def __init__(self, dim: int, heads: int, *, kinds: int, location: LocationBias | None) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(PointAttention(dim, heads) for _ in range(kinds))
        self.location = location

    def forward(
        self,
        levels: Sequence[Tensor],
        positions: Sequence[Tensor],
        points: Sequence[Sequence[Tensor]],
        point_positions: Sequence[Sequence[Tensor]],
        *,
        scale: float = 8.0,
    ) -> list[Tensor]:
        """levels: maps [batch, row, column, dim]; positions: x and y of their cells in pixels [..., row, column, 2].

        points: of each level and kind [batch, key, dim]; point_positions: in pixels [batch, key, 2]; scale: pixels of
        a step of the location term, for all levels. ValueError where a level is no map, or kinds are not as many.
        """
        table = None if self.location is None else self.location.table()
        found = []
        for level, at, keys, places in zip(levels, positions, points, point_positions, strict=True):
            if level.ndim != 4 or len(keys) != len(self.attentions) or len(places) != len(keys):
                raise ValueError(
                    f"Bridge: takes maps [batch, row, column, dim] and {len(self.attentions)} kinds of points; got "
                    f"{list(level.shape)}, {len(keys)} kinds and {len(places)} of positions"
                )
            queries, at = level.flatten(1, 2), at.flatten(-3, -2).expand(len(level), -1, -1)
            told = torch.zeros_like(queries)
            for attention, key, place in zip(self.attentions, keys, places, strict=True):
                bias = None
                if self.location is not None:
                    bias = self.location((place[:, None] - at[:, :, None]) / scale, table).movedim(-1, 1)
                told = told + attention(queries, key, bias)
            found.append(F.relu(level + told.view_as(level)))
        return found


class Points(NamedTuple):
    """The likeliest points of one kind."""

    features: Tensor  # [batch, point, dim]
    positions: Tensor  # x and y in pixels [batch, point, 2]
    scores: Tensor  # 0 to 1, 0 where there was no other peak [batch, point]


def sample_points(scores: Tensor, offsets: Tensor, features: Tensor, *, stride: float, count: int) -> Points:
    """The best `count` cells that are the best of the 3 x 3 around them, moved by their offsets.

    scores: logits [batch, row, column]; offsets: x and y in strides [batch, 2, row, column]; features: what to gather
    [batch, dim, row, column]. Features and offsets keep their gradients. ValueError where there are fewer cells.
    """
    rows, columns = scores.shape[-2:]
    if count > rows * columns:
        raise ValueError(f"sample_points: {count} points of {rows} x {columns} cells")
    likely = scores.detach().sigmoid()
    peaks = likely * (F.max_pool2d(likely, 3, 1, 1) == likely)
    best, at = peaks.flatten(1).topk(count)

    def gathered(x: Tensor) -> Tensor:
        return x.flatten(2).mT.gather(1, at[..., None].expand(-1, -1, x.shape[1]))

    cells = centres(rows, columns, stride).to(offsets).flatten(0, 1)[at]
    return Points(gathered(features), cells + stride * gathered(offsets), best)


class Detected(NamedTuple):
    """What a `BridgedDetector` made of pictures."""

    logits: Tensor  # [batch, row, column, class]
    boxes: Tensor  # left, top, right, bottom in pixels [batch, row, column, 4]
    point_logits: Tensor  # of top-left, bottom-right and centre [batch, 3, row, column]
    point_offsets: Tensor  # x and y, in strides [batch, 3, 2, row, column]


class BridgedDetector(nn.Module, PyTorchModelHubMixin):
    """A small anchor detector with a `Bridge` in both branches. `save_pretrained` and `from_pretrained` as on the hub.

    keys: points of each kind; anchor: side of the box that each cell starts from, in pixels; classify, regress: kinds
    of points that the branches listen to, none for a detector without; location: whether where they lie counts.

    >>> import torch
    >>> from regard.models.bridging_representations import bridging_representations
    >>> model = bridging_representations(classes=3, width=16)
    >>> found = model(torch.rand(2, 3, 64, 64))
    >>> found.logits.shape, found.boxes.shape
    (torch.Size([2, 8, 8, 3]), torch.Size([2, 8, 8, 4]))
    """

    STRIDE = 8

    def __init__(
        self,
        *,
        classes: int,
        width: int = 64,
        heads: int = 4,
        keys: int = 10,
        anchor: float = 24.0,
        classify: Sequence[Kind] = ("centre",),
        regress: Sequence[Kind] = ("top-left", "bottom-right"),
        location: bool = True,
    ) -> None:
        super().__init__()
        if wrong := {*classify, *regress} - set(KINDS):
            raise ValueError(f"BridgedDetector: kinds of points are {', '.join(KINDS)}, got {', '.join(sorted(wrong))}")
        self.keys, self.anchor = keys, anchor
        self.kinds = [[KINDS.index(kind) for kind in kinds] for kinds in (classify, regress)]
        half = width // 2
        self.backbone = nn.Sequential(
            *normed(3, half, 2), *normed(half, half, 1), *normed(half, width, 2), *normed(width, width, 2)
        )
        self.point_head = nn.Sequential(*normed(width, width), *normed(width, width), nn.Conv2d(width, 9, 1))
        self.towers = nn.ModuleList(nn.Sequential(*normed(width, width), *normed(width, width)) for _ in range(2))
        self.bridges = nn.ModuleList(
            Bridge(
                width,
                heads,
                kinds=len(kinds),
                location=LocationBias(width, heads, base=None) if location and kinds else None,
            )
            for kinds in self.kinds
        )
        self.logits, self.deltas = nn.Linear(width, classes), nn.Linear(width, 4)
        rare = cast(Tensor, cast(nn.Conv2d, self.point_head[-1]).bias)[:3]
        for bias in (self.logits.bias, rare):  # what is asked for is seldom there
            nn.init.constant_(bias, -3.0)

    def forward(self, pictures: Tensor) -> Detected:
        """pictures [batch, 3, row, column], sides multiples of 8."""
        if pictures.ndim != 4 or pictures.shape[1] != 3 or any(n % self.STRIDE for n in pictures.shape[2:]):
            raise ValueError(
                f"BridgedDetector: takes pictures [batch, 3, row, column] whose sides divide by {self.STRIDE}, got "
                f"{list(pictures.shape)}"
            )
        features = self.backbone(pictures)
        about = self.point_head(features)
        scores, offsets = about[:, :3], about[:, 3:].unflatten(1, (3, 2))
        at = centres(features.shape[2], features.shape[3], self.STRIDE).to(features)
        heard = []
        for tower, bridge, kinds in zip(self.towers, self.bridges, self.kinds, strict=True):
            told = tower(features)
            found = [
                sample_points(scores[:, i], offsets[:, i], told, stride=self.STRIDE, count=self.keys) for i in kinds
            ]
            points, places = [p.features for p in found], [p.positions for p in found]
            heard += bridge([told.movedim(1, -1)], [at], [points], [places], scale=self.STRIDE)
        delta = self.deltas(heard[1])
        middle = at + self.anchor * delta[..., :2]
        half = self.anchor / 2 * delta[..., 2:].clamp(-3, 3).exp()
        return Detected(self.logits(heard[0]), torch.cat([middle - half, middle + half], -1), scores, offsets)

    def loss(self, found: Detected, boxes: Sequence[Tensor], classes: Sequence[Tensor], *, points: float = 1.0):
        """Focal loss of classes, L1 of boxes, and `points` times that of the point head.

        boxes: of each picture [object, 4] in pixels; classes [object]. Anchors that share half or more of a true box,
        and the best of each, stand for it; those that share 0.4 to 0.5 are asked nothing.
        """
        rows, columns = found.logits.shape[1:3]
        at = centres(rows, columns, self.STRIDE).to(found.boxes)
        truth = truths(boxes, classes, at.device)
        anchors = torch.cat([at - self.anchor / 2, at + self.anchor / 2], -1).flatten(0, 1)
        focal, apart = anchor_losses(found.logits.flatten(1, 2), found.boxes.flatten(1, 2), anchors, truth)
        loss = focal + 4 * apart / self.anchor
        if not points:
            return loss
        corners = [truth.boxes[..., :2], truth.boxes[..., 2:], truth.boxes.unflatten(-1, (2, 2)).mean(-2)]
        near, moved = point_losses(
            found.point_logits, found.point_offsets, torch.stack(corners, 1) / self.STRIDE, truth.there
        )
        return loss + points * (0.25 * near + moved)

    @torch.no_grad()
    def detect(self, pictures: Tensor, *, overlap: float = 0.5, least: float = 0.05) -> list[tuple[Tensor, ...]]:
        """Boxes [object, 4], scores and classes [object] of each picture, best first; one of two that share more than
        `overlap` and are of a class is dropped, as are scores below `least`.
        """
        found = self(pictures)
        results = []
        for logits, boxes in zip(found.logits.flatten(1, 2), found.boxes.flatten(1, 2), strict=True):
            scores, kinds = logits.sigmoid().max(-1)
            apart = boxes + 1e4 * kinds[:, None]  # classes do not meet
            kept = [i for i in suppress(apart, scores, overlap).tolist() if scores[i] >= least]
            results.append((boxes[kept], scores[kept], kinds[kept]))
        return results


def bridging_representations(classes: int, **knobs: object) -> BridgedDetector:
    """An untrained `BridgedDetector` of so many classes, with its knobs."""
    return BridgedDetector(classes=classes, **knobs)  # type: ignore[arg-type]
