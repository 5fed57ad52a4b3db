"""Finds the stretch of a video that a sentence tells, from pairs of video and sentence alone.

Ma et al., VLANet: Video-Language Alignment Network for Weakly-Supervised Video Moment Retrieval (arXiv:2008.10238):
windows of several lengths are thinned out to one surrogate a group, the one nearest to the sentence; then surrogates
and words attend to all of both, words to surrogates, surrogates to words, and the sentence to the surrogates that come
of it. Its last weights rank the windows; videos and sentences are aligned by a margin to wrong pairs.

No code of the authors is at hand. Windows, the order of the cascade and the margin of 0.2 follow the paper's
description as far as known. Choices of ours: a group is so many neighbouring windows of one length; nearness counts in
a shared space of two linear maps, and has a margin loss of its own (`Moments.nearness`), without which it is not
learned, since the choice is hard; each step of the cascade adds to what it was given, and is normed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F


def windows(frames: int, lengths: tuple[int, ...]) -> Tensor:
    """First frame, and the frame after the last, of windows that overlap by half, length by length. [window, 2]

    ValueError where a video is shorter than the shortest window. Longer lengths than the video are left out.

    >>> from regard.models.vlanet import windows
    >>> windows(8, (4, 8)).tolist()
    [[0, 4], [2, 6], [4, 8], [0, 8]]
    """
    if frames < min(lengths):
        raise ValueError(f"windows: a video of {frames} frames, and the shortest window has {min(lengths)}")
    found = []
    for length in lengths:
        if length <= frames:
            starts = torch.arange(0, frames - length + 1, max(length // 2, 1))
            found.append(torch.stack([starts, starts + length], -1))
    return torch.cat(found)


def groups(found: Tensor, size: int) -> Tensor:
    """Which group each window is in: `size` neighbours of one length. [window, 2] -> [window]"""
    lengths = found[:, 1] - found[:, 0]
    order, at, last = [], -1, 0
    for i, length in enumerate(lengths.tolist()):
        if i == 0 or length != lengths[i - 1] or i - last >= size:
            at, last = at + 1, i
        order.append(at)
    return torch.tensor(order)


def surrogates(nearness: Tensor, group: Tensor) -> Tensor:
    """Of each group, the index of the window that is nearest. [..., window], [window] -> [..., group]

    >>> import torch
    >>> from regard.models.vlanet import surrogates
    >>> surrogates(torch.tensor([0.2, 0.9, 0.5, 0.1]), torch.tensor([0, 0, 0, 1]))
    tensor([1, 3])
    """
    inside = group == torch.arange(int(group.max()) + 1, device=group.device)[:, None]
    return nearness.unsqueeze(-2).masked_fill(~inside, -torch.inf).argmax(-1)


def contrastive(scores: Tensor, *, margin: float = 0.2, wrong: Tensor | None = None) -> Tensor:
    """How far scores of pairs are from being `margin` above those of both kinds of wrong pairs, 0 or more.

    scores: of each video (row) and sentence (column), true pairs on the diagonal; wrong: boolean, which others are
    wrong for sure, all by default. The mean over wrong pairs.

    >>> import torch
    >>> from regard.models.vlanet import contrastive
    >>> contrastive(torch.tensor([[0.5, 0.4], [0.0, 0.9]]))  # 0.1 of 0.5 over 0.4 in its row, nothing else
    tensor(0.0250)
    """
    true = scores.diagonal()
    off = ~torch.eye(len(scores), dtype=torch.bool, device=scores.device) if wrong is None else wrong
    rows, columns = margin - true[:, None] + scores, margin - true[None] + scores
    return (rows.relu()[off].mean() + columns.relu()[off].mean()) / 2 if off.any() else scores.sum() * 0


class CrossAttention(nn.Module):
    """One block of scaled dot products with maps of all four, added to the queries and normed."""

    is_cross_attention = True

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"CrossAttention: {dim} channels do not divide by {heads} heads")
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [batch, query, dim], keys [batch, key, dim], mask: boolean [batch, key] -> as queries"""
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, x in ((self.query, queries), (self.key, keys), (self.value, keys))
        )
        seen = None if mask is None else mask[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.norm(queries + self.output(mixed.transpose(1, 2).flatten(2)))


class SentenceAttention(nn.Module):
    """One query, whose weights over windows are the answer: [batch, dim], [batch, window, dim] -> mean, weights"""

    is_cross_attention = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, sentence: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.query(sentence)[:, None] @ self.key(found).mT * found.shape[-1] ** -0.5
        weights = scores.softmax(-1)
        return (weights @ found)[:, 0], weights[:, 0]


class CrossModal(nn.Module):
    """The cascade: all to all, words to windows, windows to words, and the sentence to the windows.

    cascade: False for the last step alone, attention of one way.
    """

    def __init__(self, dim: int, heads: int, *, cascade: bool = True) -> None:
        super().__init__()
        self.steps = nn.ModuleList(CrossAttention(dim, heads) for _ in range(3 if cascade else 0))
        self.last = SentenceAttention(dim)

    def forward(self, found: Tensor, words: Tensor, sentence: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """found [batch, window, dim], words [batch, word, dim], sentence [batch, dim], mask: boolean [batch, word] ->
        the video as the sentence sees it [batch, dim], and weights over windows, which sum to 1 [batch, window].
        """
        if len(self.steps):
            count, both = found.shape[1], torch.cat([found, words], 1)
            there = torch.cat([mask.new_ones(len(mask), count), mask], 1)
            both = self.steps[0](both, both, there)
            found, words = both[:, :count], both[:, count:]
            words = self.steps[1](words, found)
            found = self.steps[2](found, words, mask)
        return self.last(sentence, found)


class Moments(NamedTuple):
    """What a sentence finds in a video, of every pair that was asked for."""

    score: Tensor  # cosine of the video as seen and the sentence [pair]
    weights: Tensor  # over all windows, 0 for those that were thinned out, sums to 1 [pair, window]
    kept: Tensor  # indices of the windows that were left [pair, kept]
    windows: Tensor  # first frame, and the one after the last [window, 2]
    nearness: Tensor  # of the nearest window, in the shared space [pair]

    def best(self, count: int = 1) -> Tensor:
        """The windows with the highest weights. [pair, count, 2]"""
        return self.windows[self.weights.topk(count).indices]


class Vlanet(nn.Module, PyTorchModelHubMixin):
    """Videos and sentences to scores of pairs, and weights over windows. Saved and loaded as on the hub.

    frame, word: channels of a frame and of a word; lengths: of windows, in frames; group: windows that one surrogate
    stands for, 1 to keep all; cascade: False for attention of one way. `regard.record` sees each step.

    >>> import torch
    >>> from regard.models.vlanet import vlanet
    >>> model = vlanet(frame=6, word=5, dim=16, heads=2, lengths=(4, 8), group=2)
    >>> found = model(torch.randn(2, 16, 6), torch.randn(2, 3, 5))
    >>> found.score.shape, found.weights.shape, found.best().shape
    (torch.Size([2]), torch.Size([2, 10]), torch.Size([2, 1, 2]))
    """

    def __init__(
        self,
        *,
        frame: int,
        word: int,
        dim: int = 512,
        heads: int = 8,
        lengths: tuple[int, ...] = (8, 16, 32),
        group: int = 4,
        cascade: bool = True,
    ) -> None:
        super().__init__()
        if dim % 2 or group < 1 or min(lengths, default=0) < 1:
            raise ValueError(
                f"Vlanet: dim is even, a group has one window or more, and lengths are of one frame or more; got "
                f"{dim}, {group} and {lengths}"
            )
        self.lengths, self.group = tuple(lengths), group
        self.frames = nn.GRU(frame, dim // 2, batch_first=True, bidirectional=True)
        self.words = nn.GRU(word, dim // 2, batch_first=True, bidirectional=True)
        self.window = nn.Linear(dim, dim)
        self.shared = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.cross = CrossModal(dim, heads, cascade=cascade)

    def forward(self, frames: Tensor, words: Tensor, mask: Tensor | None = None, *, every: bool = False) -> Moments:
        """frames [batch, frame, channel], words [batch, word, channel]; mask: boolean [batch, word], False where a
        sentence is filled up at its end. every: each video with each sentence, [video, sentence] flattened to pairs.
        ValueError for videos shorter than a window, a sentence without a word, and one filled up elsewhere.
        """
        if frames.ndim != 3 or words.ndim != 3 or (len(frames) != len(words) and not every):
            raise ValueError(
                f"Vlanet: takes frames [batch, frame, channel] and as many sentences [batch, word, channel]; got "
                f"{list(frames.shape)} and {list(words.shape)}"
            )
        at = windows(frames.shape[1], self.lengths).to(frames.device)
        mask = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device) if mask is None else mask
        if mask.shape != words.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(f"Vlanet: a mask is boolean {list(words.shape[:2])}; got {mask.dtype} {list(mask.shape)}")
        if not (mask.any(1).all() and (mask[:, 1:] <= mask[:, :-1]).all()):
            raise ValueError("Vlanet: each sentence has a word, and is filled up at its end")
        found = self.window(_means(self.frames(frames)[0], at))
        told = nn.utils.rnn.pack_padded_sequence(words, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        words, _ = nn.utils.rnn.pad_packed_sequence(self.words(told)[0], batch_first=True, total_length=words.shape[1])
        if every:
            found = found.repeat_interleave(len(words), 0)
            words, mask = (x.repeat(len(frames), *(1,) * (x.ndim - 1)) for x in (words, mask))
        sentence = (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        near = F.cosine_similarity(self.shared[0](found), self.shared[1](sentence)[:, None], dim=-1)
        kept = surrogates(near, groups(at.cpu(), self.group).to(at.device))
        few = found.gather(1, kept[..., None].expand(-1, -1, found.shape[-1]))
        seen, weights = self.cross(few, words, sentence, mask)
        every_weight = torch.zeros_like(near).scatter(1, kept, weights)
        nearness = near.gather(1, kept).amax(1)
        return Moments(F.cosine_similarity(seen, sentence, dim=-1), every_weight, kept, at, nearness)


def vlanet(**knobs: Any) -> Vlanet:
    """An untrained `Vlanet` with these knobs."""
    return Vlanet(**knobs)


def recall_at(found: Tensor, truth: Tensor, *, iou: float = 0.5) -> Tensor:
    """Whether one of the windows found shares `iou` or more with the true one. [batch, k, 2], [batch, 2] -> [batch]"""
    shared = torch.minimum(found[..., 1], truth[:, None, 1]) - torch.maximum(found[..., 0], truth[:, None, 0])
    joined = torch.maximum(found[..., 1], truth[:, None, 1]) - torch.minimum(found[..., 0], truth[:, None, 0])
    return (shared / joined >= iou).any(-1)


def _means(frames: Tensor, at: Tensor) -> Tensor:
    """Mean of the frames of each window. [batch, frame, dim], [window, 2] -> [batch, window, dim]"""
    sums = F.pad(frames.cumsum(1), (0, 0, 1, 0))
    return (sums[:, at[:, 1]] - sums[:, at[:, 0]]) / (at[:, 1] - at[:, 0])[:, None]
