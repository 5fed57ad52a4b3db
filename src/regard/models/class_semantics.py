"""Finds actions in time, its features gated by which classes are likely in the video, and when.

Sridhar et al., Class Semantics-based Attention for Action Detection (arXiv:2109.02613). Neither code nor the paper's
text beyond the abstract was at hand: gates and localiser are by a reader's account. Where squeeze-and-excitation (Hu et
al., arXiv:1709.01507) asks the features themselves, the gate asks the class scores of each snippet, which a classifier
gives anyway: their mean over time weighs channels, and their course weighs times. The classifier is not trained by it.
The localiser is a boundary-matching network (Lin et al., BMN, arXiv:1907.09702), without its extension of a stretch at
both ends; for short tests `pairs=False` scores how much is inside in place of its map of pairs.

Ours: gates start nearly open, with a last bias of 2, since two halves would shrink features to a quarter; the
convolution over time repeats the outermost hidden values, so that constant scores give a constant gate. Gates are no
attention over keys, and no site of `regard.record`: they are given with the output.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ._stretches import overlap, soft_suppressed

Over = Literal["channel", "time", "both"]
Gates = Literal["se", "class", "both"]
OPEN = 2.0  # bias of a gate, whose sigmoid is 0.88


class ClassSemanticsAttention(nn.Module):
    """Weighs channels and times of features by class scores. [batch, channel, time] -> the same

    over: which of both; reduction: how much narrower the hidden layers are than the classes, one at the least;
    residual: whether the features are added.

    >>> import torch
    >>> from regard.models.class_semantics import ClassSemanticsAttention
    >>> gate = ClassSemanticsAttention(8, 5)
    >>> found, channel, time = gate(torch.randn(2, 8, 20), torch.randn(2, 5, 20).softmax(1))
    >>> found.shape, channel.shape, time.shape
    (torch.Size([2, 8, 20]), torch.Size([2, 8, 1]), torch.Size([2, 1, 20]))
    """

    def __init__(
        self, channels: int, classes: int, *, over: Over = "both", reduction: int = 2, residual: bool = False
    ) -> None:
        super().__init__()
        if over not in get_args(Over):
            raise ValueError(f"ClassSemanticsAttention: over is one of {', '.join(get_args(Over))}, got {over!r}")
        if min(channels, classes, reduction) < 1:
            raise ValueError(
                f"ClassSemanticsAttention: channels, classes and reduction are 1 or more; got {channels}, {classes} "
                f"and {reduction}"
            )
        self.channels, self.classes, self.residual = channels, classes, residual
        hidden = max(classes // reduction, 1)
        self.channel = self.time = None
        if over != "time":
            self.channel = _gate(nn.Linear(classes, hidden), nn.Linear(hidden, channels))
        if over != "channel":
            self.time = _gate(nn.Conv1d(classes, hidden, 1), nn.Conv1d(hidden, 1, 3))

    def forward(
        self, features: Tensor, scores: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """features [batch, channel, time]; scores, probabilities of classes [batch, class, time]; mask: boolean
        [batch, time], False where a row is filled up at its end. -> features weighed, and both gates, 0 to 1
        [batch, channel, 1] and [batch, 1, time], None where there is none. ValueError for other shapes.
        """
        if features.ndim != 3 or features.shape[1] != self.channels:
            raise ValueError(
                f"class_semantics: features are [batch, {self.channels}, time]; got {list(features.shape)}"
            )
        wanted = (len(features), self.classes, features.shape[2])
        if scores.shape != wanted:
            raise ValueError(
                f"class_semantics: scores are [batch, class, time] of the features' length, here {list(wanted)}; got "
                f"{list(scores.shape)}"
            )
        lengths, scores = _lengths(features, mask), scores.detach()
        found, channel, time = features, None, None
        if self.channel is not None:
            channel = self.channel(_mean(scores, mask)).sigmoid()[:, :, None]
            found = found * channel
        if self.time is not None:
            at = torch.arange(-1, features.shape[2] + 1, device=features.device).clamp_min(0)
            at = at.minimum(lengths[:, None] - 1)  # the outermost values again, beside the first and the last
            hidden = self.time[:2](scores)
            hidden = hidden.gather(2, at[:, None].expand(-1, hidden.shape[1], -1))
            time = self.time[2](hidden).sigmoid()
            found = found * time
        return (features + found if self.residual else found), channel, time


class SqueezeExcitation(nn.Module):
    """Weighs channels by their own means over time: what the gate above is compared with. [batch, channel, time]"""

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.layers = _gate(nn.Linear(channels, hidden), nn.Linear(hidden, channels))

    def weights(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """0 to 1. [batch, channel, 1]"""
        return self.layers(_mean(features, mask)).sigmoid()[:, :, None]

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return features * self.weights(features, mask)


class Localised(NamedTuple):
    """What starts and ends when, as logits."""

    start: Tensor  # [batch, time]
    end: Tensor  # [batch, time]
    inside: Tensor | None  # [batch, time]; without a map of pairs
    pairs: Tensor | None  # overlap, and whether it is above 0.9, of each start and duration [batch, 2, time, duration]
    channel: Tensor | None  # the gate of channels, 0 to 1 [batch, channel, 1]
    time: Tensor | None  # the gate of times, 0 to 1 [batch, 1, time]


class Localiser(nn.Module, PyTorchModelHubMixin):
    """Starts and ends of actions from features, class agnostic. `save_pretrained`, `from_pretrained` as on the hub.

    features, classes: channels of both inputs; attention: None, "se", "class" or "both", which multiplies both gates;
    width: channels within; longest: durations that a pair may have, in steps of time; samples: points between start
    and end that a pair is judged by; pairs: False for a head of what is inside; knobs: of `ClassSemanticsAttention`.

    >>> import torch
    >>> from regard.models.class_semantics import class_semantics
    >>> model = class_semantics(features=12, classes=5, width=16, longest=6)
    >>> found = model(torch.randn(2, 12, 20), torch.randn(2, 5, 20).softmax(1))
    >>> found.start.shape, found.pairs.shape
    (torch.Size([2, 20]), torch.Size([2, 2, 20, 6]))
    """

    def __init__(
        self,
        *,
        features: int,
        classes: int,
        attention: Gates | None = "class",
        width: int = 128,
        longest: int = 64,
        samples: int = 16,
        pairs: bool = True,
        **knobs: Any,
    ) -> None:
        super().__init__()
        if attention not in (None, *get_args(Gates)):
            raise ValueError(f'Localiser: attention is None, "se", "class" or "both", got {attention!r}')
        if longest < 1 or samples < 2:
            raise ValueError(f"Localiser: longest is 1 or more and samples 2 or more; got {longest} and {samples}")
        self.features, self.longest, self.samples = features, longest, samples
        self.first, self.second = nn.Conv1d(features, width, 3, padding=1), nn.Conv1d(width, width, 3, padding=1)
        self.excite = SqueezeExcitation(width) if attention in ("se", "both") else None
        by_class = attention in ("class", "both")
        if knobs and not by_class:
            raise ValueError(f"Localiser: {', '.join(knobs)} of the gate by classes, which {attention=} has not")
        self.gate = ClassSemanticsAttention(width, classes, **knobs) if by_class else None
        self.bounds = nn.Conv1d(width, 2 if pairs else 3, 3, padding=1)
        self.points = nn.Linear(samples * width, width) if pairs else None
        self.judge = nn.Conv2d(width, 2, 3, padding=1) if pairs else None

    def forward(self, features: Tensor, scores: Tensor | None = None, mask: Tensor | None = None) -> Localised:
        """features [batch, channel, time]; scores [batch, class, time] and mask as in `ClassSemanticsAttention`.

        What is filled up is as if it were not there. `pairs` are of all starts and durations, also of those that end
        beyond the video: `proposals` leaves them out.
        """
        if features.ndim != 3 or features.shape[1] != self.features or not features.shape[2]:
            raise ValueError(f"Localiser: features are [batch, {self.features}, time]; got {list(features.shape)}")
        if self.gate is not None and scores is None:
            raise ValueError("Localiser: the gate asks class scores [batch, class, time]: give them, or attention=None")
        _lengths(features, mask)
        there = 1.0 if mask is None else mask[:, None].to(features.dtype)
        x = self.first(features if mask is None else features.where(mask[:, None], 0.0)).relu() * there
        x = self.second(x).relu() * there
        plain, channel, time = x, None, None
        if self.gate is not None and scores is not None:
            x, channel, time = self.gate(x, scores, mask)
        if self.excite is not None:
            x = x * self.excite.weights(plain, mask)
        x = x * there
        bounds = self.bounds(x)
        inside, pairs = (bounds[:, 2] if self.points is None else None), None
        if self.points is not None and self.judge is not None:
            points = self.points(self._sampled(x)).relu().permute(0, 3, 1, 2)
            pairs = self.judge(points if mask is None else points * mask[:, None, :, None])
        return Localised(bounds[:, 0], bounds[:, 1], inside, pairs, channel, time)

    def _sampled(self, x: Tensor) -> Tensor:
        """Features at evenly spaced points of each pair, 0 beyond. -> [batch, time, duration, point * channel]"""
        steps = torch.arange(x.shape[2], device=x.device)
        lengths = torch.arange(1, self.longest + 1, device=x.device)
        at = steps[:, None, None] + lengths[:, None] * torch.linspace(0, 1, self.samples, device=x.device)
        low = at.long().clamp_max(x.shape[2])
        part, padded = (at - at.floor()).to(x.dtype), F.pad(x, (0, 2))  # zeros after the end
        high = (low + 1).clamp_max(x.shape[2] + 1)
        found = padded[:, :, low] * (1 - part) + padded[:, :, high] * part
        return found.permute(0, 2, 3, 4, 1).flatten(3)


def class_semantics(**knobs: Any) -> Localiser:
    """An untrained `Localiser` with these knobs."""
    return Localiser(**knobs)


def localiser_loss(found: Localised, actions: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """Cross entropies of starts, ends and what is inside, and of pairs the squared error of overlap and the cross
    entropy of an overlap above 0.9. A scalar

    actions: start and end of each, in steps, the end beyond [action, 2]; a start or end is true within one step.
    Frames with and without count half each, whatever their numbers, as in BMN. 0 of no videos.
    """
    steps = torch.arange(found.start.shape[1], device=found.start.device)
    real = torch.ones_like(found.start, dtype=torch.bool) if mask is None else mask
    if len(actions) != len(found.start) or any(own.ndim != 2 or own.shape[1] != 2 for own in actions):
        raise ValueError(
            f"localiser_loss: actions are [action, 2] of each of {len(found.start)} videos; got "
            f"{[list(own.shape) for own in actions]}"
        )
    if not actions:
        return found.start.sum()
    # filled up with NaN, which is near nothing and overlaps with nothing
    every = nn.utils.rnn.pad_sequence([own.to(found.start) for own in actions], True, torch.nan)
    start, end = every[..., None].unbind(2)  # [batch, action, 1]
    near = [((steps - at).abs() <= 1).any(1) for at in (start, end - 1)]
    targets = [*near, ((steps >= start) & (steps < end)).any(1)]
    heads = [found.start, found.end] + ([] if found.inside is None else [found.inside])
    loss = sum((_balanced(x, truth, real) for x, truth in zip(heads, targets)), found.start.new_zeros(()))
    if found.pairs is not None:
        longest = found.pairs.shape[3]
        ends = steps[:, None] + torch.arange(1, longest + 1, device=steps.device)
        fits = ends <= _lengths(found.start[:, None], mask)[:, None, None]
        pairs = torch.stack([steps[:, None].expand_as(ends), ends], -1).flatten(0, 1).to(found.start.dtype)
        shared = overlap(pairs, every.flatten(0, 1)).nan_to_num().unflatten(1, every.shape[:2])
        aim = F.pad(shared, (0, 1)).amax(2).mT.unflatten(1, ends.shape)
        loss = loss + (found.pairs[:, 0].sigmoid() - aim).square()[fits].mean()
        loss = loss + _balanced(found.pairs[:, 1], aim > 0.9, fits)
    return loss


@torch.no_grad()
def proposals(
    found: Localised,
    *,
    longest: int = 64,
    above: float = 0.5,
    sigma: float = 0.4,
    most: int = 100,
    mask: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Stretches of each video with their scores, 0 to 1, best first. [proposal, 2], [proposal]

    Starts and ends are steps whose probability is `above` times the video's maximum or more, at most `longest` apart,
    and no further than the pairs that were judged. The score is the product of both and of the pair's two, or of
    the mean probability inside. The `most` best of a video are kept; then soft suppression (Bodla et al.,
    arXiv:1704.04503): scores of what overlaps a better one fall by exp(-overlap squared / sigma).
    """
    if longest < 1 or most < 0 or not sigma > 0:
        raise ValueError(
            f"proposals: longest is 1 or more, most 0 or more, sigma above 0; got {longest=}, {most=}, {sigma=}"
        )
    longest = longest if found.pairs is None else min(longest, found.pairs.shape[3])
    every = []
    for i, length in enumerate(_lengths(found.start[:, None], mask).tolist()):
        start, end = found.start[i, :length].sigmoid(), found.end[i, :length].sigmoid()
        a, b = ((p >= above * p.max()).nonzero()[:, 0] for p in (start, end))
        a, b = (x.flatten() for x in torch.meshgrid(a, b, indexing="ij"))
        fits = (b >= a) & (b - a < longest)
        a, b = a[fits], b[fits]
        score = start[a] * end[b]
        if found.inside is not None:
            sums = F.pad(found.inside[i, :length].sigmoid().cumsum(0), (1, 0))
            score = score * (sums[b + 1] - sums[a]) / (b + 1 - a)
        elif found.pairs is not None:
            score = score * found.pairs[i, :, a, b - a].sigmoid().prod(0)
        score, best = score.topk(min(most, len(score)))
        a, b = a[best], b[best]
        every.append(soft_suppressed(torch.stack([a, b + 1], 1).to(score.dtype), score, sigma=sigma))
    return every


def _gate(first: nn.Module, last: Any) -> nn.Sequential:
    nn.init.constant_(last.bias, OPEN)
    return nn.Sequential(first, nn.ReLU(), last)


def _balanced(logits: Tensor, truth: Tensor, real: Tensor) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype), reduction="none")
    parts = [loss[real & kind] for kind in (truth, ~truth)]
    return sum((part.mean() for part in parts if len(part)), logits.new_zeros(())) / 2


def _lengths(features: Tensor, mask: Tensor | None) -> Tensor:
    """Steps that are not filled up. [batch]"""
    batch, time = features.shape[0], features.shape[2]
    if mask is None:
        return torch.full((batch,), time, device=features.device)
    if mask.shape != (batch, time) or mask.dtype != torch.bool:
        raise ValueError(f"class_semantics: a mask is boolean {[batch, time]}; got {mask.dtype} {list(mask.shape)}")
    if not (mask[:, :1].all() and (mask[:, 1:] <= mask[:, :-1]).all()):
        raise ValueError("class_semantics: each video has a step, and is filled up at its end")
    return mask.sum(1)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """[batch, channel, time] -> [batch, channel]"""
    if mask is None:
        return x.mean(2)
    return x.where(mask[:, None], 0.0).sum(2) / mask.sum(1, keepdim=True)
