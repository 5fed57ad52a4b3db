"""Video from slow brain signals: what is seen, how its first frame is laid out, and how it moves, each read apart.

Lu et al., Animate Your Thoughts: Decoupled Reconstruction of Dynamic Natural Vision from Slow Brain Activity
(arXiv:2405.03280), section 3. Of one signal, three decoders read a text condition, the latent of the first frame, and
the frames after it: a generator whose patches attend to earlier frames by a mask that hides most of them at random, so
that the signal has to be used. Rendering is a text-to-image model's; `FirstAndFormer` makes its self attention look at
the first frame and the one before. A permutation test of the order of frames asks whether the motion is of the brain.

As in the authors' code: no norm before attention over frames; the signal enters each block as one key and value for all
tokens, so the weights of that attention are equal, and the block adds one vector. It is computed as that here (queries
and keys of their checkpoints have no effect, and no place). Their code also makes other projections of the signal and
uses none. Deviation: the mask is drawn anew for every step of training, as the paper has it; their code keeps one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..call import Call
from ..objectives._contrast import both_ways

FRAMES_SEEN = 2  # the first frames, which see all before them


def sparse_causal_mask(frames: int, ratio: float = 0.6, *, generator: torch.Generator | None = None) -> Tensor:
    """Which frames each frame sees: none later, the first always, others with a chance of `ratio`. [query, key]

    The first two frames see all that is before them; a later one may not see even itself. Ratio 1 is a causal mask.

    >>> sparse_causal_mask(4, 0.0).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 0, 0, 0],
            [1, 0, 0, 0]], dtype=torch.int32)
    """
    if not 0 <= ratio <= 1 or frames < 1:
        raise ValueError(f"mind_animator: ratio is a share, and there is one frame or more; got {ratio=}, {frames=}")
    shown = torch.rand(frames, frames, generator=generator) < ratio
    shown[:FRAMES_SEEN] = shown[:, 0] = True
    return shown.tril()


@dataclass(frozen=True)
class MindAnimatorConfig:
    """Sizes, as the authors have them."""

    voxels: int = 4500
    frames: int = 8  # of a clip, the first among them
    channels: int = 4
    size: int = 64  # rows and columns of a latent
    patch: int = 4
    width: int = 512
    depth: int = 4
    heads: int = 8
    hidden: int = 2048  # of the generator's MLPs
    ratio: float = 0.6
    embedding: int = 512
    tokens: int = 19  # of the text condition
    token_dim: int = 768
    structure: int = 1024


class FrameAttention(nn.Module):
    """Each patch over the frames. [batch, head, frame, dim]"""

    is_cross_attention = False

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class MotionBlock(nn.Module):
    def __init__(self, config: MindAnimatorConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.qkv, self.proj, self.attention = nn.Linear(width, 3 * width), nn.Linear(width, width), FrameAttention()
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.hidden), nn.GELU(approximate="tanh"), nn.Linear(config.hidden, width)
        )

    def forward(self, x: Tensor, signal: Tensor, mask: Tensor) -> Tensor:
        """x [batch, frame, patch, dim], signal [batch, dim], mask boolean [frame, frame] or [batch, 1, frame, frame]"""
        batch, frames, patches, _ = x.shape
        parts = self.qkv(x.transpose(1, 2).flatten(0, 1)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if mask.ndim == 4:
            mask = mask.repeat_interleave(patches, 0)
        seen = self.attention(*parts, mask).transpose(1, 2).flatten(2)
        x = x + self.proj(seen).unflatten(0, (batch, patches)).transpose(1, 2)
        x = x + self.out(self.value(signal))[:, None, None]
        return x + self.mlp(self.norm(x))


class MotionGenerator(nn.Module):
    """The next frame at each frame, of latents and a signal. [batch, frame, channel, row, column]

    `regard.record` sees a layer of self attention a block, a row for each patch. It starts by giving zeros.

    >>> import torch
    >>> from regard.models.mind_animator import MindAnimatorConfig, MotionGenerator
    >>> sizes = MindAnimatorConfig(voxels=10, frames=4, channels=1, size=8, width=16, depth=1, heads=2, hidden=32)
    >>> MotionGenerator(sizes)(torch.randn(2, 3, 1, 8, 8), torch.randn(2, 10)).shape
    torch.Size([2, 3, 1, 8, 8])
    """

    def __init__(self, config: MindAnimatorConfig) -> None:
        super().__init__()
        self.config = c = config
        if c.size % c.patch or c.width % 4 or c.width % c.heads or c.frames < 2:
            raise ValueError(f"mind_animator: patches divide the size, heads and 4 the width, of 2 frames or more: {c}")
        self.embed = nn.Conv2d(c.channels, c.width, c.patch, c.patch)
        self.signal = nn.Sequential(nn.SiLU(), nn.Linear(c.voxels, c.width))
        self.places: Tensor
        self.times: Tensor
        self.blocks = nn.ModuleList(MotionBlock(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=1e-6, elementwise_affine=False)
        self.pixels = nn.Linear(c.width, c.patch**2 * c.channels)
        nn.init.zeros_(self.pixels.weight)
        nn.init.zeros_(self.pixels.bias)
        side = torch.arange(c.size // c.patch)
        rows, columns = (waves(at.flatten(), c.width // 2) for at in torch.meshgrid(side, side, indexing="ij"))
        self.register_buffer("places", torch.cat([columns, rows], -1), persistent=False)
        self.register_buffer("times", waves(torch.arange(c.frames - 1), c.width), persistent=False)

    def forward(self, latents: Tensor, signal: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """latents: [batch, frame, channel, row, column], up to one frame fewer than a clip has; signal: [batch, voxel];
        mask: which frames each sees, boolean [frame, frame], or [batch, 1, frame, frame], a causal one unless given.
        ValueError for other sizes.
        """
        c, frames = self.config, latents.shape[1] if latents.ndim == 5 else 0
        if latents.shape[2:] != (c.channels, c.size, c.size) or not 0 < frames < c.frames:
            raise ValueError(
                f"mind_animator: latents are [batch, frame, {c.channels}, {c.size}, {c.size}], 1 to {c.frames - 1} "
                f"frames; got {list(latents.shape)}"
            )
        if signal.shape != (len(latents), c.voxels):
            raise ValueError(f"mind_animator: a signal has {c.voxels} voxels, one a clip; got {list(signal.shape)}")
        if mask is None:
            mask = torch.ones(frames, frames, dtype=torch.bool, device=latents.device).tril()
        if mask.dtype != torch.bool or mask.shape not in ((frames, frames), (len(latents), 1, frames, frames)):
            raise ValueError(
                f"mind_animator: a mask is boolean [{frames}, {frames}]; got {mask.dtype} {list(mask.shape)}"
            )
        x = self.embed(latents.flatten(0, 1)).flatten(2).mT.unflatten(0, (-1, frames))
        x, read = x + self.places + self.times[:frames, None], self.signal(signal)
        for block in self.blocks:
            x = block(x, read, mask)
        side, p = c.size // c.patch, c.patch
        made = self.pixels(self.norm(x)).unflatten(-1, (p, p, c.channels)).unflatten(2, (side, side))
        return made.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)  # channel, row of patches, row, ..

    def loss(self, clips: Tensor, signal: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of each next frame, under a mask drawn anew. clips: see `forward`, one frame more."""
        mask = sparse_causal_mask(clips.shape[1] - 1, self.config.ratio, generator=generator).to(clips.device)
        return F.mse_loss(self(clips[:, :-1], signal, mask=mask), clips[:, 1:])

    @torch.no_grad()
    def continue_(self, first: Tensor, signal: Tensor, frames: int | None = None) -> Tensor:
        """A clip of `frames` from its first [batch, channel, row, column], each frame from all before it."""
        clip = first[:, None]
        for _ in range((frames or self.config.frames) - 1):
            clip = torch.cat([clip, self(clip, signal)[:, -1:]], 1)
        return clip


def waves(at: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of places, at wavelengths from 2 pi to 20,000 pi. [place] -> [place, dim]"""
    angles = at[:, None] / 10_000 ** (torch.arange(dim // 2) / (dim / 2))
    return torch.cat([angles.sin(), angles.cos()], -1)


class _Residual(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.GELU(), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Meaning(NamedTuple):
    embedding: Tensor  # [batch, dim]
    condition: Tensor  # of a text-to-image model [batch, token, dim]


class MeaningDecoder(nn.Module):
    """An embedding to be contrasted with those of picture and text, and the text condition from it."""

    def __init__(self, config: MindAnimatorConfig) -> None:
        super().__init__()
        wide, self.tokens = config.embedding, config.tokens
        self.read = nn.Sequential(nn.Linear(config.voxels, wide), nn.LayerNorm(wide), nn.GELU(), nn.Dropout(0.3))
        self.blocks = nn.Sequential(*(_Residual(wide, 0.3) for _ in range(3)))
        sizes = [wide, 2048, 4096]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.GELU())]
        self.condition = nn.Sequential(*layers, nn.Linear(sizes[-1], config.tokens * config.token_dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, signal: Tensor) -> Meaning:
        embedding = self.blocks(self.read(signal))
        return Meaning(embedding, self.condition(embedding).unflatten(-1, (self.tokens, -1)))

    def contrast(self, embedding: Tensor, other: Tensor) -> Tensor:
        """InfoNCE in both directions, of rows that belong together. [batch, dim] twice -> a scalar"""
        return both_ways(self.log_scale.exp() * F.normalize(embedding, dim=-1) @ F.normalize(other, dim=-1).mT)


class StructureDecoder(nn.Module):
    """The latent of the first frame. [batch, voxel] -> [batch, channel, row, column]"""

    def __init__(self, config: MindAnimatorConfig) -> None:
        super().__init__()
        self.shape, wide = (config.channels, config.size, config.size), config.structure
        self.layers = nn.Sequential(
            nn.Linear(config.voxels, wide), _Residual(wide, 0.2), nn.LayerNorm(wide), nn.ReLU(),
            nn.Linear(wide, math.prod(self.shape)),
        )  # fmt: skip

    def forward(self, signal: Tensor) -> Tensor:
        return self.layers(signal).unflatten(-1, self.shape)


class MindAnimator(nn.Module):
    """The three decoders."""

    def __init__(self, config: MindAnimatorConfig | None = None) -> None:
        super().__init__()
        self.config = config or MindAnimatorConfig()
        self.meaning, self.structure = MeaningDecoder(self.config), StructureDecoder(self.config)
        self.motion = MotionGenerator(self.config)

    @torch.no_grad()
    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        """The text condition [batch, token, dim], and latents of the clip [batch, frame, channel, row, column]."""
        return self.meaning(signal).condition, self.motion.continue_(self.structure(signal), signal)


def first_and_former(x: Tensor, frames: int) -> Tensor:
    """Of each frame, what the clip's first frame and the one before it have, joined; the first has its own twice.

    x: keys or values, of which rows are frames of clips [clip * frame, head, key, dim] -> twice as many keys.
    """
    if frames < 1 or len(x) % frames:
        raise ValueError(f"mind_animator: rows are whole clips of {frames} frames; got {len(x)} rows")
    clips = x.unflatten(0, (-1, frames))
    former = torch.cat([clips[:, :1], clips[:, :-1]], 1)
    return torch.cat([clips[:, :1].expand_as(clips), former], 3).flatten(0, 1)


class FirstAndFormer:
    """An intervention: a picture model's self attention looks at the first frame and the one before, not at its own.

    frames: of a clip; the rows of a batch are frames of clips, in order: `regard.intervene(unet, FirstAndFormer(8))`.
    """

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def inputs(self, call: Call) -> Call:
        if call.site.cross:
            return call
        return call.but(
            key=first_and_former(call.key, self.frames), value=first_and_former(call.value, self.frames), mask=None
        )


def permutation_test(
    true: Tensor,
    made: Tensor,
    statistic: Callable[[Tensor, Tensor], Tensor],
    *,
    orders: int = 100,
    generator: torch.Generator | None = None,
) -> float:
    """Share of random orders of the made frames that are as near to the true clips or nearer: p, 0 to 1.

    true, made: [clip, frame, ...]; statistic: an error of (true, made), a scalar, such as of the motion between frames.
    An order is the same for all clips; frames that are alike tie, and ties count as near. ValueError for other shapes.
    """
    if true.shape[:2] != made.shape[:2] or made.shape[1] < 2:
        raise ValueError(
            f"mind_animator: as many clips and frames in both, two or more; got {list(true.shape)}, {list(made.shape)}"
        )
    own = statistic(true, made)
    near = [statistic(true, made[:, torch.randperm(made.shape[1], generator=generator)]) <= own for _ in range(orders)]
    return sum(map(bool, near)) / orders


def mind_animator(**sizes: object) -> MindAnimator:
    """Untrained, of these sizes, the fields of `MindAnimatorConfig`."""
    return MindAnimator(MindAnimatorConfig(**sizes))  # pyright: ignore[reportArgumentType]
