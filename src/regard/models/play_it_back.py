"""A sound is heard once; the moments that mattered are heard again at a finer time scale.

Stergiou and Damen, Play It Back: Iterative Attention for Audio Recognition (arXiv:2210.11328), after the authors'
code. Two slots in time, one for and one against the prediction, are found in the encoder's features by slot attention
whose inputs are channels; the moments that they choose are cut from a spectrogram of a shorter hop and put in place
of the coarse ones, in as many frames. A decoder of latents reads the encodings of all rounds in turn.

Deviations: the encoder is any module (a vision transformer for films in the paper), the decoder has transformer
layers, and its latents are given each round's tokens as they are, without Fourier features. Chosen frames are taken
in runs; the code takes them in pairs, first as start and second as end, so that within a run every other gap alone is
replayed (`pairs=True`). What the rank term scores, features weighted by slots, is named by a linear layer of its own:
through it alone slots are trained, since what is replayed is a hard choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .slot_attention import SlotAttention

Segments = list[list[tuple[int, int]]]  # of each row: start and end of what is replayed, the end not in it
FOR_AND_AGAINST = 2


class TimeSlots(nn.Module):
    """Two slots of a number for each moment. [batch, channel, any time] -> [batch, 2, time]

    channels: of the features; time: frames of the spectrogram; rounds: of slot attention; hidden: width of its MLP.

    >>> import torch
    >>> from regard.models.play_it_back import TimeSlots
    >>> TimeSlots(6, 16)(torch.randn(2, 6, 5)).shape
    torch.Size([2, 2, 16])
    """

    def __init__(
        self, channels: int, time: int, *, rounds: int = 3, hidden: int | None = None, epsilon: float = 1e-8
    ) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(
                f"play_it_back: slots compete for channels, of which there are two or more; got {channels}"
            )
        self.place = nn.Linear(2, channels)
        self.slots = SlotAttention(
            time,
            time,
            slots=FOR_AND_AGAINST,
            rounds=rounds,
            hidden=hidden or max(time, 128),
            epsilon=epsilon,
            bias=True,
        )
        self.mean, self.spread = (nn.Parameter(torch.randn(1, 1, time).abs()) for _ in range(2))
        del self.slots.mean, self.slots.log_deviation  # what they start from is ours
        at = torch.linspace(0, 1, time)
        self.register_buffer("at", torch.stack([at, 1 - at], -1), persistent=False)
        self.at: Tensor

    def forward(self, features: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """noise: what slots start from, over the learned spread [batch, 2, time]; drawn unless given."""
        x = F.interpolate(features, len(self.at), mode="linear") + self.place(self.at).mT
        if noise is None:
            noise = torch.randn(len(x), FOR_AND_AGAINST, len(self.at), device=x.device, dtype=x.dtype)
        return self.slots(x, start=self.mean + self.spread * noise)


def chosen(slots: Tensor, *, sign: int = 1) -> Tensor:
    """Which moments are replayed, boolean [batch, time]: where |second - 1| - first, as 0 to 1, is above its mean.

    slots: [batch, 2, time], shifted to be 0 or more in the batch. A large first slot counts against a moment, as in the
    code; -1 as `sign` turns that round. Where all moments are alike none is chosen.
    """
    first, second = (part + part.min().abs() for part in slots.unbind(1))
    r = sign * ((second - 1).abs() - first)
    low, high = r.amin(1, keepdim=True), r.amax(1, keepdim=True)
    r = (r - low) / (high - low).clamp_min(1e-12)
    return r > r.mean(1, keepdim=True)


def segments(mask: Tensor, *, pairs: bool = False) -> Segments:
    """Runs of chosen moments [batch, time]; or as the code pairs them, a last one without partner ending at the last.

    >>> import torch
    >>> mask = torch.zeros(1, 9, dtype=torch.bool)
    >>> mask[0, [2, 3, 4, 7]] = True
    >>> segments(mask), segments(mask, pairs=True)
    ([[(2, 5), (7, 8)]], [[(2, 3), (4, 7)]])
    """
    found: Segments = []
    for row in mask:
        at = row.nonzero()[:, 0].tolist()
        if pairs:
            at += [len(row) - 1] * (len(at) % 2)
            found.append(list(zip(at[::2], at[1::2], strict=True)))
            continue
        edges = F.pad(row.int(), (1, 1)).diff()
        found.append(
            list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))
        )
    return found


def replay(coarse: Tensor, fine: Tensor, parts: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """A sound in which some moments are told at a finer scale, as long as before. [batch, band, time]

    coarse: [batch, band, time]; fine: the same sound with a hop a whole number of times shorter; parts: see `segments`.
    Frames are joined in time, and of them as many as before are taken, evenly spread (nearest). ValueError where the
    finer one is not a whole multiple as long.
    """
    time, ratio = coarse.shape[-1], fine.shape[-1] // coarse.shape[-1]
    if coarse.shape[:2] != fine.shape[:2] or not ratio or fine.shape[-1] != ratio * time:
        raise ValueError(
            f"play_it_back: the finer spectrogram is a whole multiple as long; got {list(coarse.shape)} and "
            f"{list(fine.shape)}"
        )
    rows = []
    for row, detail, some in zip(coarse, fine, parts, strict=True):
        last, pieces = 0, []
        for start, end in some:
            pieces += [row[:, last:start], detail[:, start * ratio : end * ratio]]
            last = end
        joined = torch.cat([*pieces, row[:, last:]], 1)
        rows.append(F.interpolate(joined[None], time)[0])
    return torch.stack(rows)


@dataclass(frozen=True)
class PlayItBackConfig:
    """Sizes, as the authors have them."""

    time: int = 400  # frames of a spectrogram
    channels: int = 768  # of the encoder's features
    classes: int = 309
    rounds: int = 3  # hearings, the first among them
    latents: int = 256
    width: int = 512
    heads: int = 8
    blocks: int = 3  # of latents, in each round
    slot_rounds: int = 3
    sign: int = 1
    random: bool = False  # replays moments at random, as many of them: the control


class Heard(NamedTuple):
    logits: Tensor  # [batch, class]
    rounds: Tensor  # of each round [batch, round, class]
    weighted: Tensor  # of features weighted by either slot [batch, round, 2, class]
    parts: tuple[Segments, ...]  # what was replayed, of each round but the first


class PlayItBack(nn.Module):
    """Names sounds by hearing parts of them again.

    encoder: from spectrograms [batch, band, time] to features [batch, channel, any time].

    >>> import torch
    >>> from torch import nn
    >>> from regard.models.play_it_back import play_it_back
    >>> sizes = {"time": 20, "channels": 16, "classes": 3, "rounds": 2, "latents": 4, "width": 16, "heads": 2}
    >>> net = play_it_back(nn.Conv1d(8, 16, 4, 4), **sizes)
    >>> net([torch.randn(2, 8, 20), torch.randn(2, 8, 40)]).logits.shape
    torch.Size([2, 3])
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor], config: PlayItBackConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or PlayItBackConfig()
        if c.rounds < 1 or c.sign not in (1, -1):
            raise ValueError(f"play_it_back: one round or more, and sign 1 or -1; got {c.rounds} and {c.sign}")
        self.encoder = encoder
        self.slots = nn.ModuleList(TimeSlots(c.channels, c.time, rounds=c.slot_rounds) for _ in range(c.rounds))
        self.latents = nn.Parameter(0.02 * torch.randn(c.latents, c.width))
        layer = {"d_model": c.width, "nhead": c.heads, "dim_feedforward": 2 * c.width, "batch_first": True}
        self.reads = nn.ModuleList(
            nn.MultiheadAttention(c.width, 1, kdim=c.channels, vdim=c.channels, batch_first=True)
            for _ in range(c.rounds)
        )
        self.blocks = nn.ModuleList(
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(**layer, dropout=0.0, norm_first=True), c.blocks, enable_nested_tensor=False
            )
            for _ in range(c.rounds)
        )
        self.norm, self.fuse = nn.LayerNorm(c.width), nn.Linear(c.rounds, 1, bias=False)
        self.heads = nn.ModuleList(nn.Linear(c.width, c.classes) for _ in range(c.rounds + 1))
        self.weighted = nn.Linear(c.channels, c.classes)

    def forward(self, spectrograms: Sequence[Tensor]) -> Heard:
        """spectrograms: of the same sounds, [batch, band, time], then with hops 1/2, 1/3, ... as long, one a round (any
        whole ratio does). ValueError for another number of them, or another length of the first.
        """
        c = self.config
        if len(spectrograms) != c.rounds or spectrograms[0].shape[-1] != c.time:
            raise ValueError(
                f"play_it_back: {c.rounds} spectrograms, the first of {c.time} frames; got "
                f"{[list(x.shape) for x in spectrograms]}"
            )
        x = spectrograms[0]
        latents, vectors, parts, weighted = self.latents.expand(len(x), -1, -1), [], [], []
        for i, (read, block, find) in enumerate(zip(self.reads, self.blocks, self.slots, strict=True)):
            features = self.encoder(x)
            latents = block(latents + read(latents, features.mT, features.mT, need_weights=False)[0])
            vectors.append(self.norm(latents.mean(1)))
            slots = find(features)
            weighted.append(self.weighted(slots @ F.interpolate(features, c.time, mode="linear").mT / c.time))
            if i + 1 < c.rounds:
                mask = chosen(slots, sign=c.sign)
                if c.random:
                    mask = mask.roll(int(torch.randint(c.time, ())), 1)
                parts.append(segments(mask))
                x = replay(x, spectrograms[i + 1], parts[-1])
        found = torch.stack(vectors, 1)
        fused = self.fuse(found.mT)[..., 0].relu()
        rounds = torch.stack([head(v) for head, v in zip(self.heads, vectors)], 1)
        return Heard(self.heads[-1](fused), rounds, torch.stack(weighted, 1), tuple(parts))


def loss(found: Heard, label: Tensor) -> Tensor:
    """Cross entropy, with a tenth of that of each round, and a tenth of how far apart rounds are in the true class."""
    total = F.cross_entropy(found.logits, label)
    for scores in found.rounds.unbind(1):
        total = total + 0.1 * F.cross_entropy(scores, label)
    true = found.weighted.softmax(-1)[torch.arange(len(label)), ..., label]  # [batch, round, 2]
    return total + 0.1 * (ranked(true[..., 0]) + ranked(true[..., 1])).mean()


def ranked(scores: Tensor, *, margin: float = 0.05) -> Tensor:
    """Mean over pairs of rounds of (difference + margin) / rounds between: it draws them together. [batch, round]"""
    count = scores.shape[1]
    pairs = [(i, j) for i in range(count) for j in range(i)]
    if not pairs:
        return scores.new_zeros(len(scores))
    return torch.stack([((scores[:, i] - scores[:, j]).abs() + margin) / (i - j) for i, j in pairs]).mean(0)


def play_it_back(encoder: Callable[[Tensor], Tensor], **sizes: object) -> PlayItBack:
    """An untrained `PlayItBack` of these sizes, the fields of `PlayItBackConfig`."""
    return PlayItBack(encoder, PlayItBackConfig(**sizes))  # pyright: ignore[reportArgumentType]
