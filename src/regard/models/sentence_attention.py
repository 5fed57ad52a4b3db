"""Outlines the evidence for an answer: a question weighs the channels of a backbone's maps, a decoder joins them.

Khoshsirat and Kambhamettu, Sentence Attention Blocks for Answer Grounding (arXiv:2309.11593), with the block and the
decoder of the authors' code (khoshsirat/embedding-attention-blocks): a squeeze-and-excitation block whose squeeze is
the sentence, not the picture, with a softmax over channels, an expansion by 4, and no residual.

The backbone and the sentence encoder are not here: any module's maps from fine to coarse will do, such as those of a
transformers or timm backbone, and any encoder's pooled output. Deviations: the authors' norm of the picture belongs
before the backbone; they train on region mutual information, for which `torch.nn.functional.cross_entropy` stands.
Weights are those of channels, not of places, and no site of `regard.record`: they are given with the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F


class SentenceAttention(nn.Module):
    """Weighs the channels of a map by a sentence. [batch, channel, row, column] -> the same

    sentence_dim: channels of the sentence; expand: how much wider the hidden layer is. Weights are positive and sum to
    1 over channels, so that what comes out is small: about 1 / channels of the map.

    >>> import torch
    >>> from regard.models.sentence_attention import SentenceAttention
    >>> block = SentenceAttention(10, 6)
    >>> found, weights = block(torch.randn(2, 6, 4, 4), torch.randn(2, 10))
    >>> found.shape, weights.shape
    (torch.Size([2, 6, 4, 4]), torch.Size([2, 6]))
    """

    def __init__(self, sentence_dim: int, channels: int, *, expand: int = 4) -> None:
        super().__init__()
        hidden = expand * sentence_dim
        self.channels = channels
        self.score = nn.Sequential(
            nn.Linear(sentence_dim, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )

    def forward(self, maps: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        """maps: [batch, channel, row, column]; sentence: [batch, dim]. -> maps weighed, weights [batch, channel]"""
        weights = self.score(sentence).softmax(-1)
        return maps * weights[:, :, None, None], weights


class Grounding(NamedTuple):
    """What a question points at in a picture."""

    logits: Tensor  # [batch, class, row, column], as large as asked
    weights: tuple[Tensor, ...]  # of each map's channels, fine to coarse, sum to 1 [batch, channel]


class SentenceGrounding(nn.Module, PyTorchModelHubMixin):
    """A mask of the evidence, from maps and a sentence.

    sentence_dim: channels of the sentence; channels: of the maps, fine to coarse; classes: of the mask; expand: of each
    block; dropout: before the last layer, in training. `save_pretrained` and `from_pretrained` keep it with its sizes.

    >>> import torch
    >>> from regard.models.sentence_attention import SentenceGrounding
    >>> model = SentenceGrounding(10, [6, 8])
    >>> maps = [torch.randn(2, 6, 8, 8), torch.randn(2, 8, 4, 4)]
    >>> model(maps, torch.randn(2, 10), size=(32, 32)).logits.shape
    torch.Size([2, 2, 32, 32])
    """

    def __init__(
        self, sentence_dim: int, channels: Sequence[int], *, classes: int = 2, expand: int = 4, dropout: float = 0.5
    ) -> None:
        super().__init__()
        if not channels:
            raise ValueError("SentenceGrounding: channels names those of one map or more, fine to coarse; got none")
        self.sentence_dim, self.channels = sentence_dim, list(channels)
        self.blocks = nn.ModuleList(SentenceAttention(sentence_dim, c, expand=expand) for c in channels)
        self.merges = nn.ModuleList(
            nn.Sequential(nn.Conv2d(low, fine, 1, bias=False), nn.BatchNorm2d(fine))
            for fine, low in zip(self.channels, self.channels[1:])
        )
        self.dropout, self.classify = nn.Dropout(dropout), nn.Conv2d(self.channels[0], classes, 1)

    def forward(self, maps: Sequence[Tensor], sentence: Tensor, *, size: tuple[int, int] | None = None) -> Grounding:
        """maps: [batch, channel, row, column] each, fine to coarse; sentence: [batch, dim].

        size: rows and columns of the mask, those of the finest map unless given. ValueError for maps that are not the
        ones asked for, or not in this order.
        """
        self._fits(maps, sentence)
        found, weights = zip(*(block(x, sentence) for block, x in zip(self.blocks, maps, strict=True)), strict=True)
        low = found[-1]
        for merge, finer in zip(reversed(self.merges), reversed(found[:-1]), strict=True):
            low = F.relu(_resized(merge(low), finer.shape[2:]) + finer)
        logits = self.classify(self.dropout(low))
        return Grounding(logits if size is None else _resized(logits, size), weights)

    def _fits(self, maps: Sequence[Tensor], sentence: Tensor) -> None:
        shapes = [list(x.shape) for x in maps]
        if [x.shape[1] if x.ndim == 4 else 0 for x in maps] != self.channels:
            raise ValueError(
                f"SentenceGrounding: takes maps [batch, channel, row, column] of {self.channels} channels; got {shapes}"
            )
        places = [x.shape[2] * x.shape[3] for x in maps]
        if places != sorted(places, reverse=True):
            raise ValueError(f"SentenceGrounding: give the maps from fine to coarse; got {shapes}")
        if sentence.shape != (len(maps[0]), self.sentence_dim):
            raise ValueError(
                f"SentenceGrounding: takes a sentence [batch, dim], here [{len(maps[0])}, {self.sentence_dim}]; got "
                f"{list(sentence.shape)}"
            )


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def sentence_attention(sentence_dim: int, channels: Sequence[int], **sizes: Any) -> SentenceGrounding:
    """An untrained `SentenceGrounding` of these sizes."""
    return SentenceGrounding(sentence_dim, channels, **sizes)
