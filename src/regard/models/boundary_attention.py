"""Boundaries of a noisy picture: each pixel owns a small patch with a junction in it, and patches agree by attention.

Polansky et al., Boundary Attention: Learning Curves, Corners, Junctions and Grouping (arXiv:2401.00935), sections 3 to
5; junctions, rendering, mixer, local attention and loss as in the authors' code (google-research/scenic,
projects/boundary_attention). A junction is three wedges around a vertex. What its wedges are coloured with is their
mean over the picture; patches overlap, and the maps are their mean over all that cover a pixel.

Kept from the code: the first channel of the smoothed picture is among the proposals twice; folding divides by the sum
of masks. Deviations: before the first iteration the maps come from patches decoded from the start, with whole masks;
errors of patches count by their masks; 1e-12 under the root of distances, so that it has a gradient at the vertex.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F


class Rendered(NamedTuple):
    """Patches that junctions draw. Rows and columns of the patch come before those of the map of patches."""

    wedges: Tensor  # share of each wedge, sums to 1 over them [batch, wedge, row, column, row, column]
    distance: Tensor  # to the nearest boundary, in pixels [batch, 1, row, column, row, column]
    boundary: Tensor  # 1 on a boundary, 0 far from it [batch, 1, row, column, row, column]


class Maps(NamedTuple):
    """A picture as its patches see it together."""

    picture: Tensor  # smoothed between boundaries [batch, channel, row, column]
    distance: Tensor  # to the nearest boundary, in pixels [batch, 1, row, column]
    boundary: Tensor  # 0 to 1 [batch, 1, row, column]
    density: Tensor  # sum of the masks that cover a pixel [batch, 1, row, column]
    colours: Tensor  # of each wedge [batch, channel, wedge, row, column]
    mask: Tensor  # of each patch [batch or 1, 1, row, column, row, column]
    patches: Tensor  # pictures of patches, without mask [batch, channel, row, column, row, column]
    rendered: Rendered


def junction(raw: Tensor) -> Tensor:
    """Seven numbers of any size to a junction: cosine and sine of its angle, three openings that sum to 2 pi, and x and
    y of its vertex. [..., 7] -> [..., 7]
    """
    turn = F.normalize(raw[..., :2].tanh(), dim=-1)
    opening = raw[..., 2:5].sigmoid()
    return torch.cat([turn, 2 * math.pi * opening / opening.sum(-1, keepdim=True), raw[..., 5:]], -1)


def render(junctions: Tensor, *, size: int = 17, eta: float = 1e-4, delta: float = 1e-3) -> Rendered:
    """Patches of `size` pixels a side, of which the vertex sees -1 to 1. junctions [batch, row, column, 7]

    eta: how soft wedges are, delta: how wide boundaries, both in halves of a patch.

    >>> import math, torch
    >>> from regard.models.boundary_attention import render
    >>> third = 2 * math.pi / 3
    >>> found = render(torch.tensor([1.0, 0.0, third, third, third, 0.0, 0.0]).view(1, 1, 1, 7), size=5)
    >>> found.wedges[0, :, 2, 3, 0, 0].round(decimals=2)  # half a patch to the right: on the first boundary
    tensor([0.5000, 0.0000, 0.5000])
    """
    if junctions.ndim != 4 or junctions.shape[-1] != 7:
        raise ValueError(f"render: takes junctions [batch, row, column, 7], got {list(junctions.shape)}")
    at = torch.linspace(-1, 1, size, device=junctions.device, dtype=junctions.dtype)
    angle = torch.atan2(junctions[..., 1], junctions[..., 0])
    opening = junctions[..., 2:5]
    start = (angle[..., None] + opening.cumsum(-1) - opening).movedim(-1, 1)[:, :, None, None]
    half = opening.movedim(-1, 1)[:, :, None, None] / 2
    dx = at[None, None, None, :, None, None] - junctions[:, None, None, None, ..., 5]
    dy = at[None, None, :, None, None, None] - junctions[:, None, None, None, ..., 6]
    far = (dx.square() + dy.square() + 1e-12).sqrt()
    inside = dx * (start + half).cos() + dy * (start + half).sin() - half.cos() * far
    wedges = 0.5 * (1 + 2 / math.pi * (inside / eta).atan())
    along, across = dx * start.cos() + dy * start.sin(), dy * start.cos() - dx * start.sin()
    distance = torch.where(along > 0, across.abs(), far).amin(1, keepdim=True) * (size / 2)
    off = (along - far) * far / delta
    boundary = (1 / (1 + off.square())).amax(1, keepdim=True)
    return Rendered(wedges / wedges.sum(1, keepdim=True), distance, boundary)


def gather(picture: Tensor, size: int) -> Tensor:
    """Its patches of `size` pixels a side. [batch, channel, row, column] -> [..., row, column, row, column]"""
    return picture.unfold(2, size, 1).unfold(3, size, 1).movedim((4, 5), (2, 3))


def fold(patches: Tensor) -> Tensor:
    """Sum over the patches that cover a pixel: the adjoint of `gather`."""
    batch, channels, size, _, rows, columns = patches.shape
    flat = patches.reshape(batch, channels * size * size, rows * columns)
    return F.fold(flat, (rows + size - 1, columns + size - 1), size)


def masks(shares: Tensor, size: int, sides: Sequence[int]) -> Tensor:
    """Squares around the centre, as far as each counts. [batch, row, column, square] -> as patches of one channel"""
    away = (torch.arange(size, device=shares.device) - (size - 1) / 2).abs()
    squares = torch.stack([(away[:, None] < side / 2) & (away < side / 2) for side in sides]).to(shares)
    return torch.einsum("bhws,sij->bijhw", shares, squares)[:, None] / len(sides)


def assemble(rendered: Rendered, picture: Tensor, mask: Tensor | None = None) -> Maps:
    """What patches see together of a picture [batch, channel, row, column]; mask: of `masks`, None for all of each."""
    size, seen = rendered.wedges.shape[2], gather(picture, rendered.wedges.shape[2])
    mask = torch.ones_like(rendered.distance[:1, :, :, :, :, :]) if mask is None else mask
    shares = rendered.wedges * mask
    colours = torch.einsum("bkijhw,bcijhw->bckhw", shares, seen) / (shares.sum((2, 3))[:, None] + 1e-10)
    patches = torch.einsum("bkijhw,bckhw->bcijhw", rendered.wedges, colours)
    density = fold(mask.expand(-1, 1, size, size, *seen.shape[4:]))
    joined = fold(torch.cat([patches, rendered.distance, rendered.boundary], 1) * mask) / (density + 1e-5)
    return Maps(joined[:, :-2], joined[:, -2:-1], joined[:, -1:], density, colours, mask, patches, rendered)


class Neighbours(nn.Module):
    """Attention of each place to the window around it, with learned positions; then an MLP; norms come after.

    width: of queries, which do not change it; of: of what is read; hidden: of the MLP. A window's weights are no row
    over all keys, so `regard.record` does not see them: `forward` gives them where asked.
    """

    def __init__(self, width: int, of: int, *, heads: int, hidden: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"Neighbours: {width} channels do not divide by {heads} heads")
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(of, width), nn.Linear(of, width)
        self.output = nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, hidden: Tensor, proposals: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [batch, row, column, width], proposals [batch, row, column, channel], places: learned, of the window
        [row, column, channel] -> as hidden, and weights [batch, head, row, column, key]; 0 outside of the picture.
        """
        batch, rows, columns, width = hidden.shape
        window = places.shape[0]

        def windows(x: Tensor) -> Tensor:
            found = F.unfold(x.movedim(-1, 1), window, padding=window // 2)
            return found.view(batch, -1, window * window, rows * columns)

        def read(part: nn.Linear) -> Tensor:  # projected once, then gathered: positions are added after
            found = windows(F.linear(proposals, part.weight)) + part(places.flatten(0, 1)).T[None, :, :, None]
            return found.unflatten(1, (self.heads, -1))

        query = self.query(hidden).flatten(1, 2).mT.unflatten(1, (self.heads, -1))
        scores = torch.einsum("bhdq,bhdkq->bhqk", query, read(self.key)) * query.shape[2] ** -0.5
        inside = windows(proposals.new_ones(1, rows, columns, 1).expand(batch, -1, -1, -1))[:, 0].mT > 0
        weights = scores.masked_fill(~inside[:, None], -torch.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bhdkq->bqhd", weights, read(self.value)).reshape(batch, rows, columns, width)
        hidden = self.norms[0](hidden + self.output(mixed))
        return self.norms[1](hidden + self.mlp(hidden)), weights.unflatten(2, (rows, columns))


class LocalAttention(nn.Module):
    """Layers of `Neighbours` that read the same proposals, with one map of positions."""

    def __init__(self, width: int, of: int, *, window: int = 11, heads: int = 4, layers: int = 2, hidden: int = 128):
        super().__init__()
        if window % 2 == 0:
            raise ValueError(f"LocalAttention: a window has a middle, so its side is odd; got {window}")
        self.places = nn.Parameter(0.02 * torch.randn(window, window, of))
        self.layers = nn.ModuleList(Neighbours(width, of, heads=heads, hidden=hidden) for _ in range(layers))

    def forward(self, hidden: Tensor, proposals: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As `Neighbours`, with the weights of each layer."""
        weights = []
        for layer in self.layers:
            hidden, found = layer(hidden, proposals, self.places)
            weights.append(found)
        return hidden, weights


class TiedConvolution(nn.Module):
    """A convolution all of whose input channels have the same kernel: of their sum, that is."""

    def __init__(self, out: int, side: int = 3) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, out, side, padding=side // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, row, column, channel] -> [batch, row, column, out]"""
        return self.convolution(x.sum(-1)[:, None]).movedim(1, -1)


class MixerBlock(nn.Module):
    def __init__(self, width: int, filters: int, hidden: int, side: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.places = nn.Sequential(
            TiedConvolution(filters, side), nn.GELU(approximate="tanh"), TiedConvolution(width, side)
        )
        self.channels = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(self.norms[0](x))
        return x + self.channels(self.norms[1](x))


class Mixer(nn.Module):
    """First hidden states of pixels. [batch, row, column, channel] -> [batch, row, column, width]"""

    def __init__(self, channels: int, width: int, *, blocks: int = 2, filters: int, hidden: int, side: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(channels, width)
        self.blocks = nn.Sequential(*(MixerBlock(width, filters, hidden, side) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.stem(x)))


class _Block(nn.Module):
    """What iterations of one block share."""

    def __init__(self, width: int, attention: LocalAttention) -> None:
        super().__init__()
        self.start, self.norm, self.attention = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6), attention


class BoundaryAttention(nn.Module, PyTorchModelHubMixin):
    """Pictures to maps of their boundaries, one after each iteration. Saved and loaded as on the hub.

    channels: of a picture; size: side of a patch; sides: of the squares that a patch's mask is made of; width, state:
    of the hidden state and of the state of the mask; window: side of what a place attends to; blocks, iterations: each
    block has weights of its own and so many iterations. Pictures have any size of `size` pixels a side or more.

    >>> import torch
    >>> from regard.models.boundary_attention import boundary_attention
    >>> model = boundary_attention(size=5, sides=(3, 3, 5), width=8, state=4, window=3, blocks=1, iterations=2)
    >>> found = model(torch.rand(1, 3, 12, 10))
    >>> len(found), found[-1].picture.shape, found[-1].distance.shape  # the start, and two iterations
    (3, torch.Size([1, 3, 12, 10]), torch.Size([1, 1, 12, 10]))
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        size: int = 17,
        sides: Sequence[int] = (3, 9, 17),
        width: int = 64,
        state: int = 8,
        window: int = 11,
        heads: int = 4,
        layers: int = 2,
        blocks: int = 2,
        iterations: int = 4,
        eta: float = 1e-4,
        delta: float = 1e-3,
    ) -> None:
        super().__init__()
        if size % 2 == 0 or size < max(3, *sides):
            raise ValueError(f"BoundaryAttention: a patch has an odd side, {max(3, *sides)} or more; got {size}")
        self.size, self.sides, self.iterations, self.eta, self.delta = size, tuple(sides), iterations, eta, delta
        self.mixer = Mixer(channels, width, filters=width * 3 // 2, hidden=width)
        of = width + 2 * channels + 1
        self.blocks = nn.ModuleList(
            _Block(width, LocalAttention(width + state, of, window=window, heads=heads, layers=layers))
            for _ in range(blocks)
        )
        self.token = nn.Parameter(0.02 * torch.randn(state))
        self.junction, self.shares = nn.Linear(width, 7), nn.Linear(state, len(sides))
        nn.init.ones_(self.shares.weight)

    def forward(self, pictures: Tensor) -> list[Maps]:
        """pictures [batch, channel, row, column], each brought to 0 to 1 -> maps of the start and of each iteration.

        ValueError where a picture is smaller than a patch, or has other channels.
        """
        channels = self.mixer.stem.in_features
        if pictures.ndim != 4 or pictures.shape[1] != channels or min(pictures.shape[2:]) < self.size:
            raise ValueError(
                f"BoundaryAttention: takes pictures [batch, {channels}, row, column] of {self.size} pixels a side or "
                f"more, got {list(pictures.shape)}"
            )
        low, high = pictures.amin((1, 2, 3), keepdim=True), pictures.amax((1, 2, 3), keepdim=True)
        pictures = (pictures - low) / (high - low).clamp_min(1e-8)
        hidden = self._middle(self.mixer(pictures.movedim(1, -1)))
        found = [self._drawn(hidden, pictures, None)]
        for block in self.blocks:
            assert isinstance(block, _Block)
            start = block.start(hidden)
            for _ in range(self.iterations):
                hidden = block.norm(hidden + start)
                smooth = found[-1].picture.movedim(1, -1)
                told = torch.cat([smooth, smooth[..., :1], pictures.movedim(1, -1)], -1)
                asked = torch.cat([hidden, self.token.expand(*hidden.shape[:3], -1)], -1)
                proposals = torch.cat([hidden, self._middle(told)], -1)
                hidden, token = block.attention(asked, proposals)[0].split([hidden.shape[-1], len(self.token)], -1)
                found.append(self._drawn(hidden, pictures, self.shares(token).softmax(-1)))
        return found

    def _middle(self, x: Tensor) -> Tensor:
        edge = self.size // 2
        return x[:, edge:-edge, edge:-edge]

    def _drawn(self, hidden: Tensor, pictures: Tensor, shares: Tensor | None) -> Maps:
        rendered = render(junction(self.junction(hidden)), size=self.size, eta=self.eta, delta=self.delta)
        return assemble(rendered, pictures, None if shares is None else masks(shares, self.size, self.sides))


def boundary_loss(outputs: Sequence[Maps], picture: Tensor, distance: Tensor) -> Tensor:
    """How far the last two outputs are from the clean picture and the true distances, and patches from each other.

    picture [batch, channel, row, column], of the scale of what the model was given brought to 0 to 1; distance: to the
    nearest true boundary in pixels [batch, 1, row, column]. Squared errors, the more the nearer to a boundary.
    """
    near = (-0.1 * (distance + 1)).exp()
    powers = [0.3**k for k in reversed(range(len(outputs[-2:])))]  # the last counts most
    loss = picture.sum() * 0
    for power, found in zip(powers, outputs[-2:], strict=True):
        size = found.patches.shape[2]
        weight = gather(near, size) * found.mask
        own = [(found.rendered.distance, distance, 1e-3), (found.patches, picture, 1.0)]
        own += [(found.rendered.boundary, found.boundary.detach(), 1e-2), (found.patches, found.picture.detach(), 20.0)]
        each = (
            1e-3 * (near * (found.distance - distance).square()).mean()
            + (near * (found.picture - picture).square()).mean()
        )
        for patches, whole, factor in own:
            each = each + factor * (weight * (patches - gather(whole, size)).square()).mean()
        loss = loss + power / sum(powers) * each
    return loss


def boundary_attention(**knobs: object) -> BoundaryAttention:
    """An untrained `BoundaryAttention` with these knobs."""
    return BoundaryAttention(**knobs)  # type: ignore[arg-type]
