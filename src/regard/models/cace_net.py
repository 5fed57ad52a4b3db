"""Names what is seen and heard at once, and when: sound and sight guide each other, and background is told from events.

He et al., CACE-Net: Co-guidance Attention and Contrastive Enhancement for Effective Audio-Visual Event Localization
(arXiv:2408.01952), after the authors' code; the paper's text was not at hand. Sound weights the places and channels
of each second's picture; the picture then weights the sound back, by how much knob `psi` allows (0: guidance one way,
which is how the code builds that baseline). A contrast within each video draws its event seconds together, and away
from background.

As in the code: scores are not scaled; both passes of attention over places share one layer norm; what is weighted are
raw features, not those after attention; the loss of both streams' gates is a cross entropy of a product of sigmoids
taken for a logit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UnscaledAttention(nn.Module):
    """softmax(query key^T) value, not scaled. [..., query, dim], [..., key, dim], [..., key, channel]"""

    def __init__(self, *, cross: bool = False) -> None:
        super().__init__()
        self.is_cross_attention = cross

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT).softmax(-1) @ value


class CoGuidance(nn.Module):
    """Sound guides sight, then sight sound.

    visual, audio: channels; hidden: of what both are compared in; psi, beta: the most by which sight raises sound, and
    the whole picture a place; latent: channels of queries and keys over places. `regard.record` sees places over places
    (two layers), segments of sound over one another, and sight over sounds.

    >>> import torch
    >>> from regard.models.cace_net import CoGuidance
    >>> sight, sound = CoGuidance(16, 8)(torch.randn(2, 5, 3, 3, 16), torch.randn(2, 5, 8))[:2]
    >>> sight.shape, sound.shape
    (torch.Size([2, 5, 16]), torch.Size([2, 5, 8]))
    """

    def __init__(
        self,
        visual: int,
        audio: int,
        *,
        hidden: int = 256,
        psi: float = 0.3,
        beta: float = 0.4,
        latent: int | None = None,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        latent = latent or visual // 4
        self.psi, self.beta, self.dropout = psi, beta, nn.Dropout(dropout)
        self.sizes = visual, audio
        self.sights = nn.ModuleList(_Looked(visual, latent) for _ in range(2))
        self.sight_norm, self.sound_norm = nn.LayerNorm(visual), nn.LayerNorm(audio)
        self.sounds = _Looked(audio, audio)
        self.sound_channels, self.sight_channels = nn.Linear(audio, visual), nn.Linear(visual, visual)
        self.narrow, self.wide = nn.Linear(visual, hidden), nn.Linear(hidden, visual)
        self.sound_places, self.sight_places = nn.Linear(audio, hidden), nn.Linear(visual, hidden)
        self.place = nn.Linear(hidden, 1)
        self.whole, self.part, self.own_place = (
            nn.Linear(visual, hidden),
            nn.Linear(visual, hidden),
            nn.Linear(hidden, 1),
        )
        self.guide = _Looked(audio, audio, visual, cross=True)

    def forward(self, video: Tensor, sound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """video [batch, segment, row, column, channel], sound [batch, segment, channel] -> both guided
        [batch, segment, channel], and the weights of places [batch, segment, row, column]. ValueError for other shapes.
        """
        visual, audio = self.sizes
        if video.ndim != 5 or video.shape[-1] != visual or sound.shape != (*video.shape[:2], audio):
            raise ValueError(
                f"cace_net: video is [batch, segment, row, column, {visual}] and sound [batch, segment, {audio}], of "
                f"as many segments; got {list(video.shape)} and {list(sound.shape)}"
            )
        raw = video.flatten(2, 3)
        apart = raw.flatten(0, 1)  # a segment sees its own places
        for_sight, for_sound = (
            self.sight_norm(raw + self.dropout(look(apart, apart)).view_as(raw)) for look in self.sights
        )
        mean = self.whole(for_sight.mean(2, keepdim=True)).relu()
        own = (self.own_place(self.part(for_sight).relu() * mean).tanh().mT.softmax(-1) @ for_sight)[..., 0, :]

        agreed = (self.sound_channels(sound).relu()[:, :, None] * self.sight_channels(for_sight).relu()).mean(2)
        sight = raw * (1 + self.wide(self.narrow(agreed).relu()).sigmoid()[:, :, None])
        both = self.sight_places(sight).relu() * self.sound_places(sound).relu()[:, :, None]
        weights = self.place(both).tanh().mT.softmax(-1)
        seen = (weights @ sight)[..., 0, :]
        seen = seen + self.beta * own.sigmoid() * seen

        heard = self.sound_norm(sound + self.dropout(self.sounds(sound, sound)))
        guide = self.guide(for_sound.mean(2), heard)
        return seen, sound + self.psi * guide.sigmoid() * sound, weights.squeeze(2).unflatten(-1, video.shape[2:4])


class _Looked(nn.Module):
    """Attention with maps of queries, keys and values."""

    def __init__(self, dim: int, latent: int, asked: int | None = None, *, cross: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(asked or dim, latent), nn.Linear(dim, latent), nn.Linear(dim, dim)
        self.attention = UnscaledAttention(cross=cross)

    def forward(self, asking: Tensor, x: Tensor) -> Tensor:
        return self.attention(self.query(asking), self.key(x), self.value(x))


def contrast(vectors: Tensor, other: Tensor, event: Tensor, *, temperature: float = 0.01) -> Tensor:
    """How little a video's event segments are alike beside background; its mean over both views. A scalar

    vectors, other: of two views of each segment, of length 1 [batch, segment, dim]; event: boolean [batch, segment].
    To an event segment all others of the video belong, in both views; to a background segment its own other view alone.
    Each vector's term is -log(sum of exp over those that belong / over all others) + log(how many belong).
    """
    if vectors.shape != other.shape or event.shape != vectors.shape[:2]:
        raise ValueError(
            f"cace_net: two views [batch, segment, dim] and events [batch, segment]; got {list(vectors.shape)}, "
            f"{list(other.shape)}, {list(event.shape)}"
        )
    both, events = torch.cat([vectors, other], 1), torch.cat([event, event], 1)
    segments, scores = vectors.shape[1], both @ both.mT / temperature
    alone = torch.eye(2 * segments, dtype=torch.bool, device=both.device)
    belong = (events[:, :, None] & events[:, None, :]) | alone.roll(segments, 0)
    belong = belong & ~alone
    total = scores.masked_fill(alone, -torch.inf).logsumexp(-1)
    chosen = scores.masked_fill(~belong, -torch.inf).logsumexp(-1)
    return (total - chosen + belong.sum(-1).log()).mean()


@dataclass(frozen=True)
class CaceConfig:
    """Sizes, as the authors have them."""

    visual: int = 512
    audio: int = 128
    hidden: int = 256
    classes: int = 28
    heads: int = 4
    psi: float = 0.3
    beta: float = 0.4
    alpha: float = 0.1  # by which each stream's gate raises the other
    gamma: float = 0.3  # weight of the streams' own class scores
    enhanced: float = 0.6  # weight of the contrasted features in the event's score
    best: int = 4  # segments whose class scores count
    noise: float = 0.1  # of the other view
    dropout: float = 0.2


class Located(NamedTuple):
    """What a video shows, and when."""

    event: Tensor  # logit of each segment [batch, segment]
    classes: Tensor  # logits [batch, class]
    streams: Tensor  # class logits of both streams' gated features [batch, class]
    gate: Tensor  # product of both gates [batch, segment]
    places: Tensor  # [batch, segment, row, column]
    views: tuple[Tensor, Tensor]  # of contrasted features, of length 1 [batch, segment, dim]


class CaceNet(nn.Module):
    """Where and when an audio-visual event is, and which.

    >>> import torch
    >>> from regard.models.cace_net import cace_net
    >>> net = cace_net(visual=16, audio=8, hidden=16, classes=3)
    >>> net(torch.randn(2, 5, 3, 3, 16), torch.randn(2, 5, 8)).event.shape
    torch.Size([2, 5])
    """

    def __init__(self, config: CaceConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or CaceConfig()
        wide = c.hidden
        self.guidance = CoGuidance(
            c.visual, c.audio, hidden=c.hidden, psi=c.psi, beta=c.beta, latent=max(c.visual // 4, 1), dropout=c.dropout
        )
        self.lstms = nn.ModuleList(
            nn.LSTM(n, wide // 2, bidirectional=True, batch_first=True) for n in (c.audio, c.visual)
        )
        layer = {
            "d_model": wide,
            "nhead": c.heads,
            "dim_feedforward": 2 * wide,
            "dropout": c.dropout,
            "batch_first": True,
        }
        self.encoders = nn.ModuleList(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 2, enable_nested_tensor=False) for _ in range(2)
        )
        self.crosses = nn.ModuleList(nn.MultiheadAttention(wide, c.heads, batch_first=True) for _ in range(2))
        self.cross_norms = nn.ModuleList(nn.LayerNorm(wide) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(wide, 1) for _ in range(2))
        self.stream_classes = nn.ModuleList(nn.Linear(wide, c.classes) for _ in range(2))
        self.joint, self.joint_norm = nn.MultiheadAttention(wide, c.heads, batch_first=True), nn.LayerNorm(wide)
        self.event, self.classes = nn.Linear(wide, 1), nn.Linear(wide, c.classes)
        self.contrasted = nn.Linear(wide, wide)

    def forward(self, video: Tensor, sound: Tensor) -> Located:
        """video [batch, segment, row, column, channel], sound [batch, segment, channel]"""
        c = self.config
        seen, heard, places = self.guidance(video, sound)
        streams = [encode(lstm(x)[0]) for x, lstm, encode in zip((heard, seen), self.lstms, self.encoders, strict=True)]
        crossed = []
        for x, other, attend, norm in zip(streams, streams[::-1], self.crosses, self.cross_norms, strict=True):
            memory = torch.cat([other, x], 1)
            crossed.append(norm(x + attend(x, memory, memory, need_weights=False)[0]))
        gates = [gate(x).sigmoid() for x, gate in zip(crossed, self.gates, strict=True)]
        streams = [x + c.alpha * gate * x for x, gate in zip(crossed, gates[::-1], strict=True)]
        best = min(c.best, sound.shape[1])
        scores = [head(x).topk(best, 1).values.mean(1) for x, head in zip(streams, self.stream_classes, strict=True)]
        own = (scores[0] + scores[1]) / 2
        query, memory = streams[0] * streams[1], torch.cat(streams, 1)
        first = self.joint_norm(query + self.joint(query, memory, memory, need_weights=False)[0])
        second = self.joint_norm(first + self.joint(first, memory, memory, need_weights=False)[0])
        fused = (first + second) / 2
        shown = self.contrasted(fused).relu()
        shaken = self.contrasted(fused + c.noise * torch.randn_like(fused)).relu()
        event = self.event(fused + c.enhanced * shown)[..., 0]
        views = F.normalize(shown, dim=-1), F.normalize(shaken, dim=-1)
        classes = self.classes(fused.amax(1)) + c.gamma * own
        return Located(event, classes, own, (gates[0] * gates[1])[..., 0], places, views)

    def loss(self, found: Located, event: Tensor, label: Tensor, *, weight: float = 1.0) -> Tensor:
        """event: boolean [batch, segment]; label: the class of each video [batch]; weight: of the contrast."""
        truth = event.to(found.event.dtype)
        total = F.binary_cross_entropy_with_logits(found.event, truth) + F.cross_entropy(found.classes, label)
        total = total + F.binary_cross_entropy_with_logits(found.gate, truth) + F.cross_entropy(found.streams, label)
        return total + weight * contrast(*found.views, event) if weight else total


def cace_net(**sizes: object) -> CaceNet:
    """An untrained `CaceNet` of these sizes, the fields of `CaceConfig`."""
    return CaceNet(CaceConfig(**sizes))  # pyright: ignore[reportArgumentType]
