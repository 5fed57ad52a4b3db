"""Segments pictures at four scales: positions and channels attend to each other, guided by reconstructions.

Sinha and Dolz, Multi-scale self-guided attention for medical image segmentation (arXiv:1906.02849), section III; where
paper and code (sinAshish/Multi-Scale-Attention) differ, as the code. Position and channel attention are those of DANet
(Fu et al., arXiv:1809.02983), without scale; each is added to its input by a learned share that starts at 0. At each
scale they look at its features and at the fusion of all, twice, the second time at a fusion that the first has weighed.
What they find is multiplied by what an encoder and decoder make of the same input ("guided"), one for all scales of a
pass; its losses are the error of that reconstruction, and the distance between both passes' codes.

Deviations: the backbone is a small convolutional network, where the paper has a ResNeXt-101. Codes keep their batch,
which the code flattens away; the loss, a mean over elements, is the same.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

SCALES = 4


class PositionAttention(nn.Module):
    """Each position adds what those like it hold: softmax of unscaled products. [batch, channel, row, column], the same

    Starts as the identity. `regard.record` sees positions, row by row, as queries and keys of one head.

    >>> import torch
    >>> from regard.models.self_guided import PositionAttention
    >>> x = torch.randn(2, 8, 5, 5)
    >>> torch.equal(PositionAttention(8)(x), x)
    True
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 8:
            raise ValueError(f"PositionAttention: needs 8 channels or more, an eighth are compared; got {channels}")
        self.query, self.key = nn.Conv2d(channels, channels // 8, 1), nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part(x).flatten(2).mT[:, None] for part in (self.query, self.key, self.value))
        found = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return self.gamma * found[:, 0].mT.view_as(x) + x


class ChannelAttention(nn.Module):
    """Each channel adds those least like it, by products of their maps. [batch, channel, row, column], the same

    Nothing is learned but the share that is added, from 0. `regard.record` sees channels as queries and keys.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)[:, None]  # one head
        alike = flat @ flat.mT
        weights = (alike.amax(-1, keepdim=True) - alike).softmax(-1)
        return self.gamma * (weights @ flat)[:, 0].view_as(x) + x


class AttentionLayer(nn.Sequential):
    """An attention between two convolutions, from `inputs` channels to `channels`."""

    def __init__(self, inputs: int, channels: int, attention: nn.Module) -> None:
        super().__init__(*_convolved(inputs, channels), attention, *_convolved(channels, channels))


class Semantic(nn.Module):
    """An encoder to a quarter of the size and a decoder back: the code, and the reconstruction.

    Rows and columns of what it is given divide by 4, else ValueError.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        c = channels
        self.down = nn.ModuleList(
            nn.Sequential(*_twice(a, b), nn.MaxPool2d(2)) for a, b in ((c, 2 * c), (2 * c, 4 * c))
        )
        self.up = nn.ModuleList(
            nn.Sequential(*_twice(a, b), nn.ConvTranspose2d(b, b, 2, 2)) for a, b in ((4 * c, 2 * c), (2 * c, c))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, channel, row, column] -> code [batch, 4 * channel * row * column / 16], and as it was given"""
        if x.shape[-1] % 4 or x.shape[-2] % 4:
            raise ValueError(f"Semantic: rows and columns at the first scale divide by 4; got {list(x.shape[-2:])}")
        half = self.down[0](x)
        code = self.down[1](half)
        back = F.interpolate(self.up[0](code), size=half.shape[-2:], mode="bilinear")
        return code.flatten(1), self.up[1](back)


class GuidedLevel(nn.Module):
    """Position and channel attention of one scale and pass, weighed by the reconstruction where there is one."""

    def __init__(self, channels: int, *, guided: bool = True) -> None:
        super().__init__()
        self.position = AttentionLayer(2 * channels, channels, PositionAttention(channels))
        self.channel = AttentionLayer(2 * channels, channels, ChannelAttention())
        self.guide = nn.Conv2d(2 * channels, channels, 3, padding=1) if guided else None
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, reconstruction: Tensor | None = None) -> Tensor:
        """x and reconstruction [batch, 2 * channel, row, column] -> [batch, channel, row, column]"""
        found = self.position(x) + self.channel(x)
        if self.guide is not None:
            found = found * self.guide(reconstruction)
        return self.out(found)


@dataclass(frozen=True)
class SelfGuidedConfig:
    """Sizes of a `SelfGuided`."""

    classes: int
    inputs: int = 3  # channels of a picture
    channels: int = 64
    stem: int = 1  # convolutions of stride 2 ahead of the first scale
    attend: bool = True  # without it: the scales and their fusion alone
    guided: bool = True  # without it: no reconstructions


class Segments(NamedTuple):
    """What is where, and what the losses are made of."""

    logits: Tensor  # [batch, class, row, column]
    every: tuple[Tensor, ...]  # logits of the scales, and then of the refined ones
    codes: tuple[tuple[Tensor, Tensor], ...] = ()  # of each scale, of both passes
    inputs: tuple[Tensor, ...] = ()  # of each scale, of the first pass and then of the second
    reconstructions: tuple[Tensor, ...] = ()

    def loss(self, target: Tensor, *, code: float = 0.25, reconstruction: float = 0.1) -> Tensor:
        """Cross entropies of all predictions, and the errors of codes and reconstructions. target: [batch, row, column]

        The defaults weigh as the paper does.
        """
        total = torch.stack([F.cross_entropy(logits, target) for logits in self.every]).sum()
        for first, second in self.codes:
            total = total + code * F.mse_loss(first, second)
        for given, made in zip(self.inputs, self.reconstructions, strict=True):
            total = total + reconstruction * F.mse_loss(given, made)
        return total


class SelfGuided(nn.Module, PyTorchModelHubMixin):
    """Labels each pixel; trained by the `loss` of what it gives.

    Adam with betas 0.9 and 0.99 in the paper. Rows and columns divide by 2 ** (stem + 3) where it is guided.

    >>> import torch
    >>> from regard.models.self_guided import self_guided
    >>> model = self_guided(classes=3, inputs=1, channels=8)
    >>> found = model(torch.randn(2, 1, 32, 32))
    >>> found.logits.shape, len(found.every)
    (torch.Size([2, 3, 32, 32]), 8)
    """

    def __init__(self, config: SelfGuidedConfig) -> None:
        super().__init__()
        self.config = c = config
        widths = (c.inputs, *[c.channels] * (c.stem + SCALES))
        steps = [nn.Sequential(*_convolved(a, b, stride=2)) for a, b in pairwise(widths)]
        self.stem, self.scales = nn.Sequential(*steps[: c.stem]), nn.ModuleList(steps[c.stem :])
        self.down = nn.ModuleList(nn.Sequential(*_convolved(c.channels, c.channels, 1)) for _ in range(SCALES))
        self.fuse = nn.Sequential(
            *_convolved(SCALES * c.channels, c.channels),
            *_convolved(c.channels, c.channels),
            *_convolved(c.channels, c.channels, 1),
        )
        passes = 2 * c.attend
        self.semantic = nn.ModuleList(Semantic(2 * c.channels) for _ in range(passes * c.guided))
        self.levels = nn.ModuleList(
            nn.ModuleList(GuidedLevel(c.channels, guided=c.guided) for _ in range(SCALES)) for _ in range(passes)
        )
        refined = SCALES if c.attend else 1
        self.read = nn.ModuleList(nn.Conv2d(c.channels, c.classes, 1) for _ in range(SCALES + refined))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.xavier_normal_(part.weight)
            elif isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.weight, 1.0, 0.02)

    def forward(self, pictures: Tensor) -> Segments:
        """pictures: [batch, channel, row, column]"""
        if pictures.ndim != 4 or pictures.shape[1] != self.config.inputs:
            raise ValueError(
                f"SelfGuided: takes [batch, {self.config.inputs}, row, column]; got {list(pictures.shape)}"
            )
        x, found = self.stem(pictures), []
        for scale, down in zip(self.scales, self.down, strict=True):
            x = scale(x)
            found.append(down(x))
        size = found[0].shape[-2:]
        found = [F.interpolate(x, size=size, mode="bilinear") for x in found]
        fused = self.fuse(torch.cat(found[::-1], 1))
        refined, codes, inputs, made = [fused], [[] for _ in found], [], []
        for turn, levels in enumerate(self.levels):
            weighed = [fused] * SCALES if not turn else [attended * fused for attended in refined]
            refined = []
            for at, level in enumerate(cast(nn.ModuleList, levels)):
                given, reconstruction = torch.cat([found[at], weighed[at]], 1), None
                if self.config.guided:
                    code, reconstruction = self.semantic[turn](given)
                    codes[at].append(code)
                    inputs.append(given)
                    made.append(reconstruction)
                refined.append(level(given, reconstruction))
        every = tuple(
            F.interpolate(read(x), size=pictures.shape[-2:], mode="bilinear")
            for read, x in zip(self.read, found + refined, strict=True)
        )
        pairs = tuple((a, b) for a, b in codes) if inputs else ()
        return Segments(torch.stack(every[SCALES:]).mean(0), every, pairs, tuple(inputs), tuple(made))


def _convolved(inputs: int, channels: int, width: int = 3, *, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, channels, width, stride, width // 2), nn.BatchNorm2d(channels), nn.PReLU()]


def _twice(inputs: int, channels: int) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for a in (inputs, channels):
        parts += [nn.Conv2d(a, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    return parts


def self_guided(classes: int, **sizes: Any) -> SelfGuided:
    """An untrained `SelfGuided` of so many classes, and of these sizes, the fields of `SelfGuidedConfig`."""
    return SelfGuided(SelfGuidedConfig(classes, **sizes))
