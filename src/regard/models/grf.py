"""A radiance field from posed pictures, the views of a point merged by attention.

Trevithick and Yang, GRF: Learning a General Radiance Field for 3D Representation and Rendering (arXiv:2010.04595).
A point is projected into every picture; the features found there, one for each view, are merged by AttSets (Yang et
al., arXiv:1808.00758): softmax over views, for each channel apart, so that a view whose sight is blocked can weigh
little. A network as NeRF's makes density and colour of it, and a ray adds them up (Mildenhall et al.,
arXiv:2003.08934). Details are those of the authors' code: one layer of colours after the bottleneck, where the
supplement has four; leaky slopes of 0.3, Keras' default.

Deviations: the position of the view to be rendered is not among the inputs of the pixel features; coarse and fine
fields have weights of their own and share features and merge; density starts above 0; `merge="slots"` is this library's
slot attention. `merge="mean"` and `"max"` are ablations, in which the layer of scores is one more layer before the
merge, so that all have as many weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _cameras
from ._cameras import rigid
from .slot_attention import SlotAttention

MERGES = "attention", "slots", "mean", "max"
SLOPE = 0.3


def encoded(x: Tensor, frequencies: int) -> Tensor:
    """Itself, and sines and cosines of 1, 2, 4, .. times it. [..., dim] -> [..., dim * (1 + 2 * frequencies)]"""
    angles = x[..., None, :] * 2.0 ** torch.arange(frequencies, device=x.device, dtype=x.dtype)[:, None]
    return torch.cat([x, angles.sin().flatten(-2), angles.cos().flatten(-2)], -1)


def project(points: Tensor, poses: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Where points are seen: column and row in pixels [point, view, 2], and depth before each camera [point, view].

    points: [point, 3]; poses: from camera to world [view, 4, 4], the camera looking along its third axis, its second
    one pointing down; intrinsics: [view, 3, 3]. ValueError where a pose is not a rotation and a shift.

    >>> import torch
    >>> pose, lens = torch.eye(4)[None], torch.tensor([[[20.0, 0, 12], [0, 20, 8], [0, 0, 1]]])
    >>> project(torch.tensor([[0.0, 0.0, 3.0]]), pose, lens)[0]
    tensor([[[12.,  8.]]])
    """
    rigid(poses, "grf")
    return _cameras.project(points, poses, intrinsics)


def sampled(features: Tensor, places: Tensor, depth: Tensor) -> Tensor:
    """Features between pixels, linear in both directions; zeros outside a picture and behind a camera.

    features: [view, channel, row, column]; places, depth: as of `project` -> [point, view, channel]
    """
    size = features.new_tensor([features.shape[-1], features.shape[-2]])
    where = (2 * places + 1) / size - 1
    found = F.grid_sample(features, where.transpose(0, 1)[:, None], align_corners=False)
    return found[:, :, 0].permute(2, 0, 1).where((depth > 0)[..., None], 0.0)


class AttentionOverViews(nn.Module):
    """Softmax over views, each channel by itself. scores, values: [..., view, channel] -> [..., channel]"""

    is_cross_attention = True

    def forward(self, scores: Tensor, values: Tensor) -> Tensor:
        weights = scores.mT.unsqueeze(-2).softmax(-1)
        return (weights @ values.mT.unsqueeze(-1))[..., 0, 0]


class ViewAttention(nn.Module):
    """Merges what the views of a point saw, in any order and number.

    inputs: channels of a view's features; places: of an encoded position; dim: of the merged features, and of the
    weights; hidden: of the three layers before. `regard.record` sees a layer of cross attention, a head for each
    channel and a key for each view.

    >>> import torch
    >>> from regard.models.grf import ViewAttention
    >>> ViewAttention(8, 3, 16, hidden=32)(torch.randn(5, 4, 8), torch.randn(5, 1, 3)).shape
    torch.Size([5, 16])
    """

    def __init__(self, inputs: int, places: int, dim: int, *, hidden: int = 256, merge: str = "attention") -> None:
        super().__init__()
        if merge not in MERGES:
            raise ValueError(f"grf: merge is one of {', '.join(MERGES)}; got {merge!r}")
        self.merge, wide = merge, inputs + places
        if merge == "slots":
            self.slots, self.out = SlotAttention(wide, dim, slots=2), nn.Linear(2 * dim, dim)
            return
        self.layers = nn.ModuleList(nn.Linear(wide if i == 0 else hidden, hidden) for i in range(3))
        self.joint, self.scores, self.out = nn.Linear(hidden + wide, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attention = AttentionOverViews()

    def forward(self, features: Tensor, places: Tensor) -> Tensor:
        """features [point, view, channel], places [point, view or 1, channel] -> [point, dim]

        ValueError where there is no view.
        """
        if features.ndim != 3 or not features.shape[1]:
            raise ValueError(
                f"grf: features are [point, view, channel], of one view or more; got {list(features.shape)}"
            )
        seen = torch.cat([features, places.expand(-1, features.shape[1], -1)], -1)
        if self.merge == "slots":
            return self.out(self.slots(seen).flatten(1))
        z = seen
        for layer in self.layers:
            z = layer(z).relu()
        z = F.leaky_relu(self.joint(torch.cat([z, seen], -1)), SLOPE)
        if self.merge == "attention":
            return self.out(self.attention(self.scores(z), z))
        z = F.leaky_relu(self.scores(z), SLOPE)
        return self.out(z.mean(1) if self.merge == "mean" else z.amax(1))


@dataclass(frozen=True)
class GRFConfig:
    """Sizes of `GeneralRadianceField`, as the authors have them for cars and chairs."""

    widths: tuple[int, ...] = (64, 128, 256, 512)  # of the convolutions of stride 2, and back
    features: int = 128  # channels of a pixel
    dim: int = 128  # of the merged features
    hidden: int = 256  # of the layers before the merge
    width: int = 256  # of the field's layers
    depth: int = 8
    skip: int = 5  # the layer that is given the inputs again
    positions: int = 10  # frequencies
    directions: int = 4
    coarse: int = 32  # samples of a ray
    fine: int = 32  # more of them, where the coarse ones found something
    merge: str = "attention"


class PixelFeatures(nn.Module):
    """A U-Net over colours and the camera's place, with a vector of the whole picture at its deepest.

    colours [view, channel, row, column], places [view, 3] -> [view, channel, row, column]
    """

    def __init__(self, config: GRFConfig) -> None:
        super().__init__()
        self.frequencies = config.positions
        inputs = 6 * (1 + 2 * config.positions)
        widths = [inputs, *config.widths]
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 3 if i else 7, 2, 1 if i else 3) for i, (a, b) in enumerate(pairwise(widths))
        )
        self.whole = nn.Linear(widths[-1], widths[-1])
        outs = [config.features, *config.widths[:-1]]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b + (b if i < len(outs) - 1 else widths[-1]), a, 4, 2, 1)
            for i, (a, b) in enumerate(zip(outs, config.widths, strict=True))
        )
        self.channels = config.features + inputs // 2

    def forward(self, colours: Tensor, places: Tensor) -> Tensor:
        seen = encoded(colours.movedim(1, -1), self.frequencies).movedim(-1, 1)
        where = encoded(places, self.frequencies)[..., None, None].expand(-1, -1, *colours.shape[-2:])
        found = [torch.cat([seen, where], 1)]
        for layer in self.down:
            found.append(layer(found[-1]).relu())
        last = found.pop()
        whole = self.whole(last.mean((2, 3))).relu()[..., None, None].expand_as(last)
        x = torch.cat([last, whole], 1)
        for i in reversed(range(len(self.up))):
            x = self.up[i](x)[..., : found[i].shape[-2], : found[i].shape[-1]]
            if i:
                x = torch.cat([x.relu(), found[i]], 1)
        return torch.cat([x, seen], 1)


class Field(nn.Module):
    """Density [point] and colour [point, 3], 0 to 1, from merged features, encoded places and directions."""

    def __init__(self, config: GRFConfig, places: int, directions: int) -> None:
        super().__init__()
        inputs, self.skip = config.dim + places, config.skip
        self.layers = nn.ModuleList(
            nn.Linear((inputs if i == 0 else config.width) + (inputs if i == config.skip else 0), config.width)
            for i in range(config.depth)
        )
        self.density, self.neck = nn.Linear(config.width, 1), nn.Linear(config.width, config.width)
        nn.init.constant_(self.density.bias, 0.5)  # a field that is empty everywhere has no gradient
        self.view, self.colour = nn.Linear(config.width + directions, 128), nn.Linear(128, 3)

    def forward(self, merged: Tensor, places: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        x = inputs = torch.cat([merged, places], -1)
        for i, layer in enumerate(self.layers):
            x = layer(torch.cat([x, inputs], -1) if i == self.skip else x).relu()
        shown = self.view(torch.cat([self.neck(x), directions], -1)).relu()
        return self.density(x)[..., 0].relu(), self.colour(shown).sigmoid()


class Rendered(NamedTuple):
    colour: Tensor  # [ray, 3]
    depth: Tensor  # mean distance of what is seen, in the length of the ray's direction [ray]
    coarse: Tensor  # colour by the coarse samples alone [ray, 3]


def composed(density: Tensor, colour: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """Colour of rays before white, and what each sample adds to it. [ray, 3], [ray, sample]

    density [ray, sample], colour [ray, sample, 3], distance of each sample [ray, sample], rising.
    """
    step = F.pad(distance.diff(dim=-1), (0, 1), value=1e10)
    opaque = 1 - (-density * step).exp()
    through = F.pad((1 - opaque).cumprod(-1)[..., :-1], (1, 0), value=1.0)
    weights = through * opaque
    return (weights[..., None] * colour).sum(-2) + 1 - weights.sum(-1, keepdim=True), weights


class GeneralRadianceField(nn.Module):
    """Renders rays through a scene that a few posed pictures show. Train it on squared errors of both colours.

    >>> import torch
    >>> from regard.models.grf import GRFConfig, GeneralRadianceField
    >>> field = GeneralRadianceField(GRFConfig(widths=(8, 8), features=8, dim=8, hidden=8, width=16, coarse=4, fine=4))
    >>> lens = torch.tensor([[20.0, 0, 8], [0, 20, 8], [0, 0, 1]]).expand(2, 3, 3)
    >>> rays = torch.zeros(5, 3), torch.tensor([0.0, 0, 1]).expand(5, 3)
    >>> field(torch.rand(2, 3, 16, 16), torch.eye(4).expand(2, 4, 4), lens, *rays, near=1.0, far=3.0).colour.shape
    torch.Size([5, 3])
    """

    def __init__(self, config: GRFConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or GRFConfig()
        if c.coarse < 2 + bool(c.fine) or c.fine < 0:  # fine ones are drawn between the middles of coarse ones
            raise ValueError(f"grf: a ray has 2 coarse samples or more, 3 where it has fine ones; got {c}")
        places, directions = 3 * (1 + 2 * c.positions), 3 * (1 + 2 * c.directions)
        self.pixels = PixelFeatures(c)
        self.views = ViewAttention(self.pixels.channels, places, c.dim, hidden=c.hidden, merge=c.merge)
        self.fields = nn.ModuleList(Field(c, places, directions) for _ in range(2 if c.fine else 1))

    def forward(
        self,
        pictures: Tensor,
        poses: Tensor,
        intrinsics: Tensor,
        origins: Tensor,
        directions: Tensor,
        *,
        near: float,
        far: float,
        generator: torch.Generator | None = None,
    ) -> Rendered:
        """pictures: [view, 3, row, column], 0 to 1; poses [view, 4, 4] and intrinsics [view, 3, 3]: see `project`;
        origins, directions: of rays [ray, 3]; near, far: where samples lie, in lengths of the direction. generator: of
        the places of samples in their strata, in training; in evaluation each lies in the middle.

        ValueError for no picture, poses that are not rigid, or a near end behind the far one.
        """
        if pictures.ndim != 4 or not len(pictures) or len(pictures) != len(poses) or len(poses) != len(intrinsics):
            given = [list(x.shape) for x in (pictures, poses, intrinsics)]
            raise ValueError(f"grf: pictures [view, 3, row, column] have a pose and intrinsics each; got {given}")
        if not 0 <= near < far:
            raise ValueError(f"grf: rays are sampled from near to far, 0 or more and rising; got {near=}, {far=}")
        c, features = self.config, self.pixels(pictures, poses[:, :3, 3])
        turned = encoded(directions / directions.norm(dim=-1, keepdim=True), c.directions)

        def seen(field: nn.Module, distance: Tensor) -> tuple[Tensor, Tensor]:
            at = (origins[:, None] + directions[:, None] * distance[..., None]).flatten(0, 1)
            places = encoded(at, c.positions)
            merged = self.views(sampled(features, *project(at, poses, intrinsics)), places[:, None])
            density, colour = field(merged, places, turned.repeat_interleave(distance.shape[1], 0))
            return composed(density.view_as(distance), colour.view(*distance.shape, 3), distance)

        strata = torch.arange(c.coarse, device=origins.device).expand(len(origins), -1)
        inside = torch.rand(strata.shape, generator=generator).to(origins) if self.training else 0.5
        distance = near + (far - near) * (strata + inside) / c.coarse
        coarse, weights = seen(self.fields[0], distance)
        if not c.fine:
            return Rendered(coarse, (weights * distance).sum(-1), coarse)
        more = _drawn(distance, weights.detach(), c.fine, generator if self.training else None, self.training)
        distance = torch.cat([distance, more], -1).sort(-1).values
        colour, weights = seen(self.fields[1], distance)
        return Rendered(colour, (weights * distance).sum(-1), coarse)


def _drawn(distance: Tensor, weights: Tensor, n: int, generator: torch.Generator | None, random: bool) -> Tensor:
    """Distances by the density that weights give between the middles of samples; evenly spread unless random."""
    middles = (distance[:, 1:] + distance[:, :-1]) / 2
    share = weights[:, 1:-1] + 1e-5
    rising = F.pad((share / share.sum(-1, keepdim=True)).cumsum(-1), (1, 0))
    at = (
        torch.rand(len(distance), n, generator=generator)
        if random
        else (torch.arange(n) + 0.5).div(n).expand(len(distance), n)
    )
    at = at.to(distance).contiguous()
    above = torch.searchsorted(rising.contiguous(), at, right=True).clamp(1, rising.shape[1] - 1)
    low, high = rising.gather(1, above - 1), rising.gather(1, above)
    part = (at - low) / (high - low).clamp_min(1e-5)
    return middles.gather(1, above - 1) + part * (middles.gather(1, above) - middles.gather(1, above - 1))


def grf(**sizes: object) -> GeneralRadianceField:
    """An untrained `GeneralRadianceField` of these sizes, the fields of `GRFConfig`."""
    return GeneralRadianceField(GRFConfig(**sizes))  # pyright: ignore[reportArgumentType]
