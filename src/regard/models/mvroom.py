"""Views of a room painted together: each pixel asks other views along its own ray, where the layout says something is.

MVRoom: Controllable 3D Indoor Scene Generation with Multi-View Diffusion Models (arXiv:2512.04248): a coarse layout of
boxes and walls is turned into pictures of conditions, the first few surfaces behind each pixel; a diffusion model
denoises all views at once, with attention along epipolar lines that knows the layout.

No code is at hand, and of the attention only its name and purpose: samples on a ray, their projection, the key for the
pixel itself and the encoding of depth are a reconstruction from epipolar attention in general. Samples lie evenly
through the depth of each box that the ray meets, and once on a wall. The denoiser is a small transformer in place of a
video diffusion model's U-Net, the step scaling and shifting what its layers see; noise schedules are those of
diffusers. `warp` renders views that are there to a new camera, point by point, which is what conditions on a picture,
and what a scene grows by.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ._cameras import project, rays
from ._layouts import Boxes, Layers, conditions, layout_layers, sines, warp

__all__ = [
    "Boxes",
    "EpipolarAttention",
    "Layers",
    "MultiViewDenoiser",
    "SampleAttention",
    "conditions",
    "layout_layers",
    "mvroom",
    "sample",
    "warp",
]

WAYS = "layout", "even", "all", "none"


class SampleAttention(nn.Module):
    """Softmax of a pixel's scores over samples of other views, and itself. [pixel, head, 1, dim] -> the same"""

    is_cross_attention = True

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """key, value: [pixel, head, key, dim]; mask: boolean [pixel, key], False for what is not seen"""
        scores = query @ key.mT * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        return scores.softmax(-1) @ value


class EpipolarAttention(nn.Module):
    """Each pixel asks other views where points on its own ray are seen. [batch, view, row, column, dim] to the same

    heads; samples: of each layer of the layout; by: "layout", or "even", as many samples for the same layers, from near
    to far; "all" asks all pixels of all views, whatever their cameras. far: depth that is encoded as 1 as well;
    frequencies: of that encoding. Cameras and layouts count in float32 at least, whatever the features are in. What no
    view sees may hold anything. The result is what is to be added: 0 at first. `regard.record` sees a
    layer of cross attention, each pixel a row of the batch, whose last key is the pixel itself (with "all", each scene
    a row, and pixels as queries and keys). Its cost is pixels * views * layers * samples keys.

    >>> import torch
    >>> from regard.models.mvroom import EpipolarAttention
    >>> layer, lens = EpipolarAttention(8, heads=2, by="even"), torch.eye(3).expand(2, 3, 3, 3)
    >>> depths = torch.ones(2, 3, 2, 1, 5)
    >>> layer(torch.randn(2, 3, 1, 5, 8), torch.eye(4).expand(2, 3, 4, 4), lens, depths, depths).shape
    torch.Size([2, 3, 1, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        samples: int = 3,
        by: str = "layout",
        near: float = 1.0,
        far: float = 4.0,
        frequencies: int = 4,
    ) -> None:
        super().__init__()
        if by not in WAYS[:3] or heads < 1 or dim % heads or samples < 1 or not 0 < near < far:
            raise ValueError(
                f"EpipolarAttention: by is one of {', '.join(WAYS[:3])}, heads divide channels, one sample or more, "
                f"0 < near < far; got {by!r}, {heads}, {dim}, {samples}, {near}, {far}"
            )
        self.heads, self.samples, self.by, self.near, self.far = heads, samples, by, near, far
        self.frequencies = frequencies
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.depth = nn.Linear(2 * frequencies, dim, bias=False)
        self.attention = SampleAttention()
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def points(self, depths: Tensor, extents: Tensor) -> tuple[Tensor, Tensor]:
        """Depths of samples on each ray, and which are there. Both [batch, view, pixel, sample]"""
        count = self.samples
        if self.by == "even":
            at = torch.linspace(self.near, self.far, depths.shape[2] * count, device=depths.device, dtype=depths.dtype)
            found = at.expand(*depths.shape[:2], depths.shape[3] * depths.shape[4], -1)
            return found, torch.ones_like(found, dtype=torch.bool)
        share = (torch.arange(count, device=depths.device, dtype=depths.dtype) + 0.5) / count
        at = depths[..., None] + extents[..., None] * share  # [batch, view, layer, row, column, sample]
        there = (depths > 0)[..., None] & ((extents > 0)[..., None] | (torch.arange(count, device=at.device) == 0))
        return tuple(x.flatten(3, 4).permute(0, 1, 3, 2, 4).flatten(3) for x in (at, there))  # type: ignore[return-value]

    def forward(self, features: Tensor, poses: Tensor, intrinsics: Tensor, depths: Tensor, extents: Tensor) -> Tensor:
        """features: [batch, view, row, column, dim]; poses [batch, view, 4, 4], intrinsics [batch, view, 3, 3], in
        pixels of the features; depths, extents: of `Layers`, [batch, view, layer, row, column]."""
        batch, views, rows, columns, dim = features.shape
        if depths.shape[:2] != (batch, views) or depths.shape[3:] != (rows, columns) or extents.shape != depths.shape:
            raise ValueError(
                f"EpipolarAttention: depths and extents are [{batch}, {views}, layer, {rows}, {columns}]; got "
                f"{list(depths.shape)}, {list(extents.shape)}"
            )
        if poses.shape != (batch, views, 4, 4) or intrinsics.shape != (batch, views, 3, 3):
            raise ValueError(
                f"EpipolarAttention: poses are [{batch}, {views}, 4, 4] and intrinsics [{batch}, {views}, 3, 3]; got "
                f"{list(poses.shape)}, {list(intrinsics.shape)}"
            )
        query, key, value = (
            part(features).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value)
        )
        if self.by == "all":
            flat = (x.flatten(1, 3).transpose(1, 2) for x in (query, key, value))
            found = self.attention(*flat, None).transpose(1, 2).flatten(2)
            return self.out(found.view_as(features))
        exact = torch.promote_types(features.dtype, torch.float32)  # half precision has no place of a pixel
        poses, intrinsics, depths, extents = (x.to(exact) for x in (poses, intrinsics, depths, extents))
        at, there = self.points(depths, extents)  # [batch, view, pixel, sample]
        starts, ways = rays((rows, columns), poses, intrinsics)
        points = (starts[..., None, :] + at[..., None] * ways[..., None, :]).flatten(1, 3)
        places, depth = project(points, poses, intrinsics)  # [batch, point, seeing view, 2]
        size = places.new_tensor([columns, rows])
        seen = (depth > 1e-6) & (places >= -0.5).all(-1) & (places <= size - 0.5).all(-1)
        grid = ((2 * places + 1) / size - 1).transpose(1, 2).flatten(0, 1)[:, :, None]
        both = (
            torch.cat([key, value], -1).flatten(-2).movedim(-1, 2).flatten(0, 1)
        )  # [batch * view, channel, row, column]
        got = F.grid_sample(both.to(exact), grid, padding_mode="border", align_corners=False)[..., 0]
        got = got.masked_fill(~seen.mT.flatten(0, 1)[:, None], 0).to(features)  # [batch * view, channel, point]
        got = got.view(batch, views, self.heads, 2, dim // self.heads, views, rows * columns, at.shape[-1])
        keys, values = got.permute(3, 0, 5, 6, 2, 1, 7, 4)  # [batch, view, pixel, head, seeing view, sample, dim]
        told = sines(at[..., None] / self.far, self.frequencies).to(features)
        told = self.depth(told).unflatten(-1, (self.heads, -1))
        keys = keys + told.transpose(3, 4)[:, :, :, :, None]
        others = ~torch.eye(views, dtype=torch.bool, device=seen.device)
        mask = seen.view(batch, views, rows * columns, at.shape[-1], views).transpose(3, 4) & there[..., None, :]
        mask = (mask & others[:, None, :, None]).flatten(0, 2).flatten(1)
        itself = (x.flatten(0, 3)[:, :, None] for x in (query, key, value))
        q, own_key, own_value = itself
        keys, values = (x.flatten(0, 2).flatten(2, 3) for x in (keys, values))
        mask = F.pad(mask, (0, 1), value=True)
        found = self.attention(q, torch.cat([keys, own_key], 2), torch.cat([values, own_value], 2), mask)
        return self.out(found.reshape(features.shape))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, by: str, **knobs: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 if by == "none" else 3))
        self.time = nn.Linear(dim, 4 * dim)
        self.own = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.views = EpipolarAttention(dim, heads=heads, by=by, **knobs) if by != "none" else None
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, time: Tensor, *cameras: Tensor) -> Tensor:
        """time: [batch, 1, 1, 1, dim]; cameras: what else `EpipolarAttention` takes"""
        scale, shift, second, moved = self.time(time).chunk(4, -1)
        flat = (self.norms[0](x) * (1 + scale) + shift).flatten(2, 3).flatten(0, 1)
        x = x + self.own(flat, flat, flat, need_weights=False)[0].view_as(x)
        if self.views is not None:
            x = x + self.views(self.norms[2](x), *cameras)
        return x + self.mlp(self.norms[1](x) * (1 + second) + moved)


class MultiViewDenoiser(nn.Module, PyTorchModelHubMixin):
    """Tells noisy pictures of several views of one scene apart from their noise, with pictures of conditions.

    It says what the scheduler it is trained with asks for: noise, clean pictures or velocity.

    channels: of pictures; conditions: of the conditions, layout and what else is known; dim, layers, heads; by: how
    views ask one another, of `EpipolarAttention`, or "none"; samples, near, far: of `EpipolarAttention`. Saved and
    loaded as on the hub; `regard.record` sees attention within views and between them.
    """

    def __init__(
        self,
        conditions: int,
        *,
        channels: int = 3,
        dim: int = 64,
        layers: int = 4,
        heads: int = 4,
        by: str = "layout",
        samples: int = 3,
        near: float = 1.0,
        far: float = 4.0,
    ) -> None:
        super().__init__()
        if by not in WAYS or heads < 1 or dim % heads:
            raise ValueError(
                f"MultiViewDenoiser: by is one of {', '.join(WAYS)}, heads divide channels; got {by!r}, {heads}, {dim}"
            )
        knobs: dict[str, Any] = {} if by == "none" else {"samples": samples, "near": near, "far": far}
        self.enter = nn.Linear(channels + conditions + 12, dim)
        self.time = nn.Sequential(nn.Linear(16, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, by, **knobs) for _ in range(layers))
        self.norm, self.last, self.leave = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, channels)

    def forward(
        self, noisy: Tensor, step: Tensor, conditions: Tensor, poses: Tensor, intrinsics: Tensor, layers: Layers
    ) -> Tensor:
        """noisy, conditions: [batch, view, channel, row, column]; step: share of noise steps, 0 to 1 [batch]; poses and
        intrinsics [batch, view, ...]; layers: with the batch in front. -> as noisy"""
        fits = noisy.ndim == 5 and noisy.shape[:2] == conditions.shape[:2] and noisy.shape[3:] == conditions.shape[3:]
        if not fits or step.shape != noisy.shape[:1]:
            raise ValueError(
                f"MultiViewDenoiser: noisy pictures and conditions are [batch, view, channel, row, column], and step "
                f"[batch]; got {list(noisy.shape)}, {list(conditions.shape)}, {list(step.shape)}"
            )
        rows, columns = noisy.shape[-2:]
        y, x = ((torch.arange(n, device=noisy.device) + 0.5) / n for n in (rows, columns))
        where = torch.stack([y[:, None].expand(-1, columns), x.expand(rows, -1)], -1)
        where = sines(where, 3).to(noisy).expand(*noisy.shape[:2], -1, -1, -1)
        hidden = self.enter(torch.cat([torch.cat([noisy, conditions], 2).movedim(2, -1), where], -1))
        time = self.time(sines(step[:, None] / 2, 8).to(noisy))[:, None, None, None]
        for block in self.blocks:
            hidden = block(hidden, time, poses, intrinsics, layers.depths, layers.extents)
        scale, shift = self.last(time).chunk(2, -1)
        return self.leave(self.norm(hidden) * (1 + scale) + shift).movedim(-1, 2)


@torch.no_grad()
def sample(
    model: MultiViewDenoiser,
    scheduler: Any,
    conditions: Tensor,
    poses: Tensor,
    intrinsics: Tensor,
    layers: Layers,
    *,
    steps: int = 50,
    channels: int = 3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Pictures of all views, from noise. [batch, view, channel, row, column]

    scheduler: one of diffusers, as in training; steps: as many as it takes at most; generator: of the noise.
    Others as of the model's forward.
    """
    scheduler.set_timesteps(steps)
    shape = (*conditions.shape[:2], channels, *conditions.shape[-2:])
    noisy = torch.randn(shape, generator=generator, device=conditions.device, dtype=conditions.dtype)
    noisy = noisy * scheduler.init_noise_sigma
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        share = torch.full((len(noisy),), float(t) / scheduler.config.num_train_timesteps, device=noisy.device)
        found = model(scheduler.scale_model_input(noisy, t), share, conditions, poses, intrinsics, layers)
        noisy = scheduler.step(found, t, noisy, **draws).prev_sample
    return noisy


def mvroom(conditions: int, **knobs: Any) -> MultiViewDenoiser:
    """An untrained `MultiViewDenoiser` with these knobs.

    >>> from regard.models.mvroom import mvroom
    >>> sum(p.numel() for p in mvroom(30, dim=16, layers=1).parameters()) > 1000
    True
    """
    return MultiViewDenoiser(conditions, **knobs)
