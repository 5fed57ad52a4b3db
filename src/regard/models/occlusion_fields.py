"""What is where and when, also behind something: a field that is asked at a place and time, and attends to a cloud.

Van Hoorick et al., Revealing Occlusions with 4D Neural Fields (arXiv:2204.10916), section 3; vector attention, the
field and its code of positions as in the authors' code (basilevh/occlusions-4d), the encoder by its description. A film
with depth is a cloud of points; a point transformer (Zhao et al., arXiv:2012.09164) condenses it to few; each of the
nearest few tells a query something, with weights of their own for each channel. Neighbours are nearest in space: time
enters as a feature alone.

Deviations: `space=2` is for flat films; farthest points start from the first one instead of a random one; no norms.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F


def nearest(queries: Tensor, places: Tensor, count: int) -> Tensor:
    """Indices of the `count` nearest places, the nearest first. [batch, query, axis], [batch, key, axis] -> [.., count]

    ValueError where there are fewer places.
    """
    if places.shape[1] < count:
        raise ValueError(f"nearest: {count} neighbours of {places.shape[1]} points; give more points or ask for fewer")
    return torch.cdist(queries, places, compute_mode="donot_use_mm_for_euclid_dist").topk(count, largest=False).indices


def taken(values: Tensor, indices: Tensor) -> Tensor:
    """Rows of each example: [batch, key, dim], [batch, ...] -> [batch, ..., dim]"""
    flat = indices.flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, flat).unflatten(1, indices.shape[1:])


def farthest(places: Tensor, count: int) -> Tensor:
    """Indices of points, each the farthest from those before it, the first one first. [batch, key, axis] -> [.., count]

    >>> import torch
    >>> from regard.models.occlusion_fields import farthest
    >>> farthest(torch.tensor([[[0.0], [1.0], [5.0], [3.0]]]), 3)
    tensor([[0, 2, 3]])
    """
    chosen = torch.zeros(len(places), count, dtype=torch.long, device=places.device)
    away = torch.full(places.shape[:2], torch.inf, device=places.device, dtype=places.dtype)
    for i in range(1, count):
        last = taken(places, chosen[:, i - 1 : i])
        away = torch.minimum(away, (places - last).square().sum(-1))
        chosen[:, i] = away.argmax(-1)
    return chosen


class Read(NamedTuple):
    """What was read of the neighbours."""

    output: Tensor  # [batch, query, dim]
    neighbours: Tensor  # indices of keys [batch, query, neighbour]
    weights: Tensor  # mean over channels, sum to 1 over neighbours [batch, query, neighbour]


class VectorAttention(nn.Module):
    """Attention to the nearest keys, with a weight for each channel, by differences of queries, keys and places.

    dim: of queries and the output; dim2: of what is read; neighbours: how many; space: axes of a place. Channels have
    softmaxes of their own, so `regard.record` has no row of weights to read: `forward` gives their mean.

    >>> import torch
    >>> from regard.models.occlusion_fields import VectorAttention
    >>> read = VectorAttention(8, 6, neighbours=4)
    >>> found = read(torch.randn(2, 5, 8), torch.randn(2, 5, 3), torch.randn(2, 9, 6), torch.randn(2, 9, 3))
    >>> found.output.shape, found.weights.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 5, 4]))
    """

    def __init__(self, dim: int, dim2: int, *, neighbours: int = 16, space: int = 3) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.query = nn.Linear(dim, dim, bias=False)
        self.key, self.value = (nn.Linear(dim2, dim, bias=False) for _ in range(2))
        self.places = nn.Sequential(nn.Linear(space, 32), nn.ReLU(), nn.Linear(32, dim))
        self.scores = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, queries: Tensor, at: Tensor, keys: Tensor, places: Tensor) -> Read:
        """queries [batch, query, dim] at places `at` [batch, query, axis]; keys [batch, key, dim2] at `places`."""
        near = nearest(at, places, self.neighbours)
        apart = self.places(at[:, :, None] - taken(places, near))
        difference = self.query(queries)[:, :, None] - taken(self.key(keys), near) + apart
        weights = (self.scores(difference) * apart.shape[-1] ** -0.5).softmax(2)
        return Read((weights * (taken(self.value(keys), near) + apart)).sum(2), near, weights.mean(-1))


class VectorBlock(nn.Module):
    """A linear map, `VectorAttention` and another linear map, added to the input."""

    def __init__(self, dim: int, dim2: int, *, neighbours: int = 16, space: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attention = VectorAttention(dim, dim2, neighbours=neighbours, space=space)

    def forward(self, x: Tensor, at: Tensor, keys: Tensor | None = None, places: Tensor | None = None) -> Read:
        """As `VectorAttention`; without keys, x attends to itself as it comes out of the first map."""
        queries = self.first(x)
        read = self.attention(queries, at, queries if keys is None else keys, at if places is None else places)
        return read._replace(output=x + self.last(read.output))


class Condensed(NamedTuple):
    """A cloud of few points."""

    features: Tensor  # [batch, point, dim]
    places: Tensor  # [batch, point, axis]
    indices: Tensor  # which point of the cloud each was [batch, point]
    scene: Tensor  # of all together [batch, dim]


class PointEncoder(nn.Module):
    """Condenses a cloud by three at each step, and doubles the width. Its features come after space and time."""

    def __init__(
        self,
        channels: int,
        *,
        space: int = 3,
        width: int = 36,
        steps: int = 3,
        neighbours: int = 16,
        pooled: int = 12,
        scene: int = 128,
    ) -> None:
        super().__init__()
        self.space, self.pooled = space, pooled
        self.start = nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, width))
        widths = [width << i for i in range(steps + 1)]
        self.blocks = nn.ModuleList(VectorBlock(w, w, neighbours=neighbours, space=space) for w in widths)
        self.down = nn.ModuleList(nn.Sequential(nn.Linear(w, 2 * w), nn.ReLU()) for w in widths[:-1])
        self.scene = nn.Sequential(nn.Linear(widths[-1], scene), nn.ReLU(), nn.Linear(scene, scene))
        self.width = widths[-1]

    def forward(self, cloud: Tensor) -> Condensed:
        """cloud [batch, point, channel], whose first channels are space."""
        places, x = cloud[..., : self.space], self.start(cloud)
        indices = torch.arange(cloud.shape[1], device=cloud.device).expand(len(cloud), -1)
        for i, block in enumerate(self.blocks):
            x = block(x, places).output
            if i < len(self.down):
                kept = farthest(places, places.shape[1] // 3)
                few = taken(places, kept)
                x = taken(self.down[i](x), nearest(few, places, self.pooled)).amax(2)
                places, indices = few, indices.gather(1, kept)
        return Condensed(x, places, indices, self.scene(x.mean(1)))


class Field(nn.Module):
    """What a query reads of a condensed cloud, as numbers. [batch, query, space and time] -> [batch, query, output]

    width: of the cloud's features; scene: of the scene vector; layers: how many of the blocks attend, 0 for the
    weighted mean of the `local` nearest features alone; neighbours: to how many points they attend.
    """

    def __init__(
        self,
        width: int,
        *,
        outputs: int,
        scene: int = 128,
        space: int = 3,
        blocks: int = 6,
        layers: int = 2,
        neighbours: int = 14,
        local: int = 8,
        frequencies: int = 10,
        base_frequency: float = 0.1,
    ) -> None:
        super().__init__()
        self.space, self.local = space, local
        self.frequencies, self.base_frequency = frequencies, base_frequency
        dim = scene + width
        self.start = nn.Linear((space + 1) * (1 + 2 * frequencies), dim)
        self.told = nn.ModuleList(nn.Linear(dim, dim) for _ in range(blocks))
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(dim, dim) for _ in range(2)) for _ in range(blocks))
        self.attend_after = [(i + 1) * blocks // (layers + 1) for i in range(layers)]
        self.attention = nn.ModuleList(
            VectorBlock(dim, width, neighbours=neighbours, space=space) for _ in range(layers)
        )
        self.output = nn.Linear(dim, outputs)

    def code(self, points: Tensor) -> Tensor:
        """Coordinates, and the sine and cosine of each at rising frequencies, coordinates of one kind together."""
        found = [points]
        for i in range(self.frequencies):
            angle = 2 * math.pi * self.base_frequency * 2**i * points
            found += [angle.sin(), angle.cos()]
        return torch.cat(found, -1)

    def around(self, at: Tensor, features: Tensor, places: Tensor) -> Tensor:
        """Mean of the nearest features, each by one over its distance. [batch, query, width]"""
        near = nearest(at, places, self.local)
        weights = 1 / ((at[:, :, None] - taken(places, near)).norm(dim=-1) + 1e-4)
        return (taken(features, near) * (weights / weights.sum(-1, keepdim=True))[..., None]).sum(2)

    def forward(self, points: Tensor, features: Tensor, places: Tensor, scene: Tensor) -> tuple[Tensor, list[Read]]:
        """points: space, then time [batch, query, axis]; features and places of the cloud; scene [batch, dim] ->
        outputs, and what each attending block read.
        """
        at, reads = points[..., : self.space], []
        told = torch.cat([scene[:, None].expand(-1, points.shape[1], -1), self.around(at, features, places)], -1)
        h = self.start(self.code(points))
        for i, (add, block) in enumerate(zip(self.told, self.blocks, strict=True)):
            assert isinstance(block, nn.ModuleList)
            h = h + add(told)
            h = h + block[1](block[0](h.relu()).relu())
            for _ in range(self.attend_after.count(i)):
                reads.append(self.attention[len(reads)](h, at, features, places))
                h = reads[-1].output
        return self.output(h.relu()), reads


class Answers(NamedTuple):
    """What a field says of places and times."""

    occupied: Tensor  # logit [batch, query]
    colour: Tensor  # 0 to 1 [batch, query, 3]
    tracked: Tensor  # logit [batch, query]
    classes: Tensor  # logits [batch, query, class], of width 0 without classes
    cloud: Condensed
    reads: list[Read]  # of the attending blocks

    def loss(self, occupied: Tensor, colour: Tensor, tracked: Tensor | None = None, classes: Tensor | None = None):
        """Errors of occupancy, of colour where something is, of the tracked object, and 0.6 times that of classes.

        occupied, tracked: boolean [batch, query]; colour [batch, query, 3]; classes [batch, query]
        """
        loss = F.binary_cross_entropy_with_logits(self.occupied, occupied.to(self.occupied))
        loss = loss + ((self.colour - colour).abs().mean(-1) * occupied).sum() / occupied.sum().clamp_min(1)
        if tracked is not None:
            loss = loss + F.binary_cross_entropy_with_logits(self.tracked, tracked.to(self.tracked))
        if classes is not None:
            loss = loss + 0.6 * F.cross_entropy(self.classes.flatten(0, 1), classes.flatten())
        return loss


class OcclusionField(nn.Module, PyTorchModelHubMixin):
    """A cloud of coloured points to answers about any place and time. Saved and loaded as on the hub.

    space: axes of a place, 3, or 2 for flat films; a point is its place, time and colour. classes: kinds of things, 0
    for none; width, steps, pooled: of `PointEncoder`; other knobs of `Field`. Places and times should be of the order
    of 1 to 10, as the lowest frequency of the code is 0.1.

    >>> import torch
    >>> from regard.models.occlusion_fields import occlusion_fields
    >>> model = occlusion_fields(space=2, width=8, steps=1, scene=8, encoder_neighbours=4, neighbours=4)
    >>> found = model(torch.rand(2, 60, 6), torch.rand(2, 10, 3))
    >>> found.occupied.shape, found.colour.shape
    (torch.Size([2, 10]), torch.Size([2, 10, 3]))
    """

    def __init__(
        self,
        *,
        space: int = 3,
        classes: int = 0,
        width: int = 36,
        steps: int = 3,
        scene: int = 128,
        encoder_neighbours: int = 16,
        pooled: int = 12,
        blocks: int = 6,
        layers: int = 2,
        neighbours: int = 14,
        local: int = 8,
        frequencies: int = 10,
    ) -> None:
        super().__init__()
        if space not in (2, 3):
            raise ValueError(f"OcclusionField: space has 2 or 3 axes, got {space}")
        self.space = space
        self.encoder = PointEncoder(
            space + 4,
            space=space,
            width=width,
            steps=steps,
            neighbours=encoder_neighbours,
            pooled=pooled,
            scene=scene,
        )
        self.field = Field(
            self.encoder.width,
            outputs=5 + classes,
            scene=scene,
            space=space,
            blocks=blocks,
            layers=layers,
            neighbours=neighbours,
            local=local,
            frequencies=frequencies,
        )

    def forward(self, cloud: Tensor, queries: Tensor) -> Answers:
        """cloud: space, time and colour [batch, point, channel]; queries: space and time [batch, query, axis].

        ValueError for other shapes, and where fewer points are left than there are neighbours.
        """
        if cloud.ndim != 3 or cloud.shape[-1] != self.space + 4 or queries.shape[-1] != self.space + 1:
            raise ValueError(
                f"OcclusionField: takes points of {self.space} axes, time and 3 colours, and queries of space and "
                f"time; got {list(cloud.shape)} and {list(queries.shape)}"
            )
        found = self.encoder(cloud)
        output, reads = self.field(queries, found.features, found.places, found.scene)
        occupied, tracked = output[..., 0], output[..., 4]
        return Answers(occupied, output[..., 1:4].sigmoid(), tracked, output[..., 5:], found, reads)


def occlusion_fields(**knobs: Any) -> OcclusionField:
    """An untrained `OcclusionField` with these knobs."""
    return OcclusionField(**knobs)
