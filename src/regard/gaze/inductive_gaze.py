"""Objects of a frame that tell each other what they are, for annotating what a wearer looks at.

I-MPN: Inductive Message Passing Network for Efficient Human-in-the-Loop Annotation of Mobile Eye Tracking Data (Le et
al., arXiv:2406.06239). A detector gives boxes with features; a network passes messages among the boxes of one frame
(Hamilton, Ying and Leskovec, Inductive Representation Learning on Large Graphs, arXiv:1706.02216, with means), so that
things that look alike are told apart by what is around them; a person corrects some frames, the network is fitted
again, and so on. A fixation gets the label of the smallest box that it is in.

No code of the authors was at hand, nor all of the paper: that all pairs of boxes are neighbours, the order of what a
node holds, two layers, and the smallest box are our reading. The detector is the user's; spreading corrections over
neighbouring frames by a video segmenter is left out. `relative` and `use_neighbours=False`, the baseline with as many
parameters, are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.loaders import Scanpath


@dataclass(frozen=True)
class InductiveConfig:
    """features: numbers that say what a box looks like; scores: probabilities of the detector, 0 where it gives none.

    use_neighbours: False gives each box its own state in place of its neighbours' mean. relative: places are taken
    from the mean of the frame's boxes, so that moving the camera changes nothing.
    """

    features: int
    classes: int
    scores: int = 0
    hidden: int = 64
    layers: int = 2
    use_boxes: bool = True
    use_neighbours: bool = True
    relative: bool = False


class MessagePassing(nn.Module):
    """What each box of a frame shows, given the others."""

    def __init__(self, config: InductiveConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.features + config.scores + 4 * config.use_boxes, *[config.hidden] * config.layers]
        self.layers = nn.ModuleList(nn.Linear(2 * a, b) for a, b in pairwise(widths))
        self.read = nn.Linear(widths[-1], config.classes)

    def forward(
        self, features: Tensor, boxes: Tensor, scores: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits. [batch, object, class]

        features [batch, object, feature]; boxes [batch, object, 4]: left, top, right, bottom, as shares of the frame's
        width and height; scores [batch, object, score]; mask [batch, object], False where a frame has fewer boxes. A
        frame without boxes gives no logits; of one box the neighbours' mean is 0.
        """
        config = self.config
        if features.shape[-1] != config.features or boxes.shape != (*features.shape[:2], 4):
            raise ValueError(
                f"features are [batch, object, {config.features}], boxes [batch, object, 4]: got "
                f"{list(features.shape)} and {list(boxes.shape)}"
            )
        if (0 if scores is None else scores.shape[-1]) != config.scores:
            given = None if scores is None else list(scores.shape)
            raise ValueError(f"scores are [batch, object, {config.scores}]: got {given}")
        mask = torch.ones_like(boxes[..., 0], dtype=torch.bool) if mask is None else mask
        there = mask[..., None].to(features.dtype)
        parts = [features] if scores is None else [features, scores]
        if config.use_boxes:
            if bool((boxes[mask].abs() > 10).any()):
                raise ValueError("boxes are shares of the frame: divide pixels by its width and height")
            at, size = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
            if config.relative:
                at = at - (at * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
            parts[1:1] = [at, size]
        state = torch.cat(parts, -1) * there
        for layer in self.layers:
            around = (state.sum(1, keepdim=True) - state) / (there.sum(1, keepdim=True) - 1).clamp(min=1)
            state = F.relu(layer(torch.cat([state, around if config.use_neighbours else state], -1)))
            state = F.normalize(state, dim=-1) * there
        return self.read(state)


class Frames(NamedTuple):
    """Detected boxes, as `MessagePassing` takes them; frames first."""

    features: Tensor
    boxes: Tensor
    scores: Tensor | None = None
    mask: Tensor | None = None

    def part(self, index: Tensor) -> Frames:
        return Frames(*(None if of is None else of[index] for of in self))  # type: ignore[arg-type]

    @property
    def present(self) -> Tensor:
        return torch.ones_like(self.boxes[..., 0], dtype=torch.bool) if self.mask is None else self.mask


class Round(NamedTuple):
    """frames: corrected so far; corrections: boxes whose label had to be changed so far; accuracy: after learning from
    them, share of boxes of the frames to judge by.
    """

    frames: int
    corrections: int
    accuracy: float


def annotate(
    model: nn.Module,
    stream: Frames,
    oracle: Callable[[Tensor], Tensor],
    judge: Frames,
    truth: Tensor,
    *,
    rounds: Sequence[int] = (5, 5, 10, 20, 40, 80),
    choose: Literal["random", "uncertain"] = "random",
    steps: int = 250,
    rate: float = 3e-3,
    seed: int = 0,
) -> list[Round]:
    """Rounds of prediction, correction and learning; the model learns in place.

    oracle: the person; indices of frames [frame] -> labels [frame, object]. judge, truth: frames, and labels
    [frame, object], that nothing is learned from. rounds: how many frames are corrected in each. choose: new frames at
    random, or those whose least certain box is least certain. Each round learns `steps` times from all corrected so
    far, in batches of at most 32 frames.

    What the person does is counted in boxes whose label is wrong, not in frames. Torch's own random state stays.
    """
    total = len(stream.features)
    if not rounds or min(rounds) < 1 or sum(rounds) > total:
        raise ValueError(f"rounds={list(rounds)} take one frame or more each, of {total}")
    if choose not in ("random", "uncertain"):
        raise ValueError(f'choose is "random" or "uncertain": got {choose!r}')
    chance = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), rate)
    left, done, labels = torch.arange(total), torch.empty(0, dtype=torch.long), None
    corrections, history = 0, []
    for n in rounds:
        if choose == "random":
            order = torch.randperm(len(left), generator=chance)
        else:
            some = stream.part(left)
            sure = _logits(model, some).softmax(-1).amax(-1).masked_fill(~some.present, 1.0).amin(1)
            order = sure.argsort()
        new, left = left[order[:n]], left[order[n:]]
        given, some = oracle(new), stream.part(new)
        corrections += int(((_logits(model, some).argmax(-1) != given) & some.present).sum())
        done, labels = torch.cat([done, new]), given if labels is None else torch.cat([labels, given])
        model.train()
        for _ in range(steps):
            batch = torch.randperm(len(done), generator=chance)[:32]
            some = stream.part(done[batch])
            optimiser.zero_grad()
            F.cross_entropy(model(*some)[some.present], labels[batch][some.present]).backward()
            optimiser.step()
        right = (_logits(model, judge).argmax(-1) == truth)[judge.present]
        history.append(Round(len(done), corrections, float(right.float().mean())))
    return history


def label_fixations(
    path: Scanpath, boxes: NDArray[np.floating], labels: Sequence[Hashable], *, background: Hashable = None
) -> list[Hashable]:
    """What each fixation is on: the label of the smallest box that holds it, or `background`.

    boxes [object, 4]: left, top, right, bottom in pixels of the screen, ends included.

    >>> path = Scanpath(np.array([[5.0, 5.0], [50.0, 5.0], [90.0, 90.0]]), (100, 100))
    >>> label_fixations(path, np.array([[0, 0, 60, 60.0], [0, 0, 10, 10]]), ["table", "cup"])
    ['cup', 'table', None]
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    if len(boxes) != len(labels):
        raise ValueError(f"one label a box: got {len(labels)} for {len(boxes)}")
    x, y = path.places.T[..., None]
    inside = (x >= boxes[:, 0]) & (x <= boxes[:, 2]) & (y >= boxes[:, 1]) & (y <= boxes[:, 3])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    found = np.where(inside, area, np.inf)
    return [labels[int(row.argmin())] if np.isfinite(row).any() else background for row in found]


@torch.no_grad()
def _logits(model: nn.Module, frames: Frames) -> Tensor:
    model.eval()
    return model(*frames)
