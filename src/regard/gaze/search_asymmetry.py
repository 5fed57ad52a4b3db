"""Visual search by an eye that blurs what is off its centre, cued by its target.

Gupta, Zhang, Wu, Wolfe and Kreiman, Visual Search Asymmetry: Deep Nets and Humans Share Similar Inherent Biases
(arXiv:2106.02953; NeurIPS 2021), sections 3.1 to 3.4 and the authors' code (eccNET). A convolutional network, whose
pooling windows grow with the distance from the fixation, sees the display; it sees the target too, and its features
there, taken as a kernel over those of the display, make a map of where to look at each level. Maps are brought to 0 to
1, weighted by their maxima and added; the eye goes to the maximum, and back to no item. Whether an item is the target
is told to it, as in the paper.

Deviations. The network is small, and trained by whoever uses it (the paper takes VGG16 trained on ImageNet), with
batch normalisation, which VGG16 lacks. Its levels pool with the slopes of the paper's last three. Both sides of each
product are taken after pooling (the paper takes the display's before it), at the resolution of their level. The
centre-surround sharpening of the final map is left out. The eye lands on the middle of the item that it chose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.loaders import Scanpath


@dataclass(frozen=True)
class EccentricConfig:
    """Degrees of visual angle and slopes are the paper's; the rest is of the size of small displays."""

    classes: int
    channels: tuple[int, ...] = (8, 16, 32)  # of each level, each half as fine as the one before
    slopes: tuple[float, ...] = (0.07, 0.16, 0.32)  # pixels by which windows grow for each pixel of eccentricity
    fovea: float = 4.0  # degrees around the fixation within which they do not
    ring: float = 1.0  # degrees over which they stay the same
    degree: float = 8.0  # pixels of the display


class EccentricNet(nn.Module):
    """Classifies pictures [batch, 1, row, column], and gives what each level sees."""

    def __init__(self, config: EccentricConfig) -> None:
        super().__init__()
        if len(config.channels) != len(config.slopes):
            raise ValueError(f"one slope a level: got {len(config.slopes)} for {len(config.channels)} levels")
        self.config = config
        widths = (1, *config.channels)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(widths)
        )
        self.classify = nn.Linear(config.channels[-1], config.classes)

    def forward(self, picture: Tensor) -> Tensor:
        """Logits [batch, class]; pooling is the same everywhere."""
        return self.classify(self.features(picture, eccentric=False)[-1].mean((2, 3)))

    def features(self, picture: Tensor, *, eccentric: bool) -> list[Tensor]:
        """What each level gives after pooling, [batch, channel, row, column]; the eye looks at the middle."""
        config, seen = self.config, []
        for level, (layer, slope) in enumerate(zip(self.levels, config.slopes)):
            degree = config.degree / 2**level
            picture = eccentric_pool(
                layer(picture),
                slope=slope if eccentric else 0.0,
                fovea=config.fovea * degree,
                ring=config.ring * degree,
            )
            seen.append(picture)
        return seen


def eccentric_pool(x: Tensor, *, slope: float, fovea: float, ring: float, least: int = 2) -> Tensor:
    """Means over windows that grow with the distance from the middle, at every other row and column.
    [batch, channel, row, column], rows and columns even.

    Within `fovea` pixels of the middle a window has `least` pixels a side; beyond, in rings `ring` pixels wide, slope
    times the distance of the ring's outer border from the fovea more, rounded. The last ring is the one that reaches
    the nearest end of the longer side, and goes on to the corners. What lies outside does not count.

    As in the authors' code, borders are whole places of what comes out, which are two pixels each, a place on a border
    is outside it, and the middle is the place with as many before it as after it, or one more.
    """
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"eccentric_pool halves rows and columns, so they are even: got {list(x.shape[2:])}")
    inner, step, half = round(fovea / 2), max(1, round(ring / 2)), max(x.shape[2:]) / 4  # in places
    rings = max(1, math.ceil((half - inner) / step)) if inner <= half else 0
    rows, columns = (torch.arange(n // 2, device=x.device) - n // 4 for n in x.shape[2:])
    away = torch.hypot(rows[:, None].double(), columns.double())
    at = ((away - inner).div(step, rounding_mode="floor") + 1).clamp(0, rings)
    found = x.new_zeros(*x.shape[:2], *away.shape)
    inside = torch.ones_like(x[:1, :1])
    for number in range(rings + 1):
        window = least + (round(slope * (2 * (inner + number * step) - fovea)) if number else 0)
        before, after = (window - 2) // 2, window - 2 - (window - 2) // 2
        pads = (before, after, before, after)
        total, share = (F.avg_pool2d(F.pad(part, pads), window, stride=2) for part in (x, inside))
        found = torch.where(at == number, total / share, found)
    return found


@torch.no_grad()
def priority(net: EccentricNet, seen: Tensor, target: Tensor) -> Tensor:
    """Where a display looks like the target to an eye at its middle. [batch, row, column], 0 to 1

    seen, target: pictures [batch, 1, row, column], one target each.
    """
    maps, weights = [], []
    for display, cue in zip(net.features(seen, eccentric=True), net.features(target, eccentric=False)):
        batch, channels, rows, columns = cue.shape
        before = ((columns - 1) // 2, columns // 2, (rows - 1) // 2, rows // 2)
        grouped = F.pad(display, before).reshape(1, -1, display.shape[2] + rows - 1, display.shape[3] + columns - 1)
        likeness = F.conv2d(grouped, cue, groups=batch)[0]
        low, high = likeness.amin((1, 2), keepdim=True), likeness.amax((1, 2), keepdim=True)
        maps.append((likeness - low) / (high - low).clamp(min=1e-12))
        weights.append(high)
    # A kernel of even size has no middle pixel; the shift is half a pixel of its level, the same for all items.
    fine = [F.interpolate(m[:, None], seen.shape[2:], mode="bilinear", align_corners=False)[:, 0] for m in maps]
    share = torch.stack(weights) / torch.stack(weights).sum(0).clamp(min=1e-12)
    return (torch.stack(fine) * share).sum(0)


@torch.no_grad()
def search(
    net: EccentricNet, displays: Tensor, cues: Tensor, boxes: Tensor, target: Tensor, *, background: float = 0.0
) -> list[Scanpath]:
    """Fixations until the target's, the first in the middle of the display; one less is how many looks it took.

    displays [batch, 1, row, column]; cues [batch, 1, row, column], the target by itself; boxes int64 [batch, item, 4],
    left, top, right, bottom in pixels; target [batch], which item it is. An item that was looked at is painted over
    with `background`, which is also what lies around the display. The network is to be in evaluation mode.
    """
    if net.training:
        raise ValueError("a network in training sees each display in the light of the others: call net.eval() first")
    batch, _, height, width = displays.shape
    displays, left = displays.clone(), torch.ones(boxes.shape[:2], dtype=torch.bool, device=displays.device)
    middles = (boxes[..., :2] + boxes[..., 2:]) // 2
    at = torch.tensor([width // 2, height // 2], device=displays.device).repeat(batch, 1)
    paths = [[tuple(place)] for place in at.tolist()]
    searching = list(range(batch))
    while searching:
        view = displays.new_full((len(searching), 1, 2 * height, 2 * width), background)
        for row, one in enumerate(searching):
            x, y = at[one].tolist()
            view[row, :, height - y : 2 * height - y, width - x : 2 * width - x] = displays[one]
        maps = priority(net, view, cues[searching])
        going_on = []
        for row, one in enumerate(searching):
            x, y = at[one].tolist()
            seen = maps[row, height - y : 2 * height - y, width - x : 2 * width - x]
            worth = [
                float(seen[t:b, a:c].max()) if free else -1.0
                for (a, t, c, b), free in zip(boxes[one].tolist(), left[one].tolist())
            ]
            item = max(range(len(worth)), key=worth.__getitem__)
            at[one] = middles[one, item]
            paths[one].append(tuple(at[one].tolist()))
            a, t, c, b = boxes[one, item].tolist()
            displays[one, :, t:b, a:c] = background
            left[one, item] = False
            if item != int(target[one]):
                going_on.append(one)
        searching = going_on
    return [Scanpath(torch.tensor(path).double().numpy(), (width, height)) for path in paths]


def asymmetry_index(one: float, other: float) -> float:
    """(other - one) / (other + one) of what two searches cost, -1 to 1: above 0 where `one` is the easier.

    The paper takes slopes of reaction time over the number of items, with what is below 0 as 0; 0 where both are.
    """
    one, other = max(one, 0.0), max(other, 0.0)
    return (other - one) / (other + one) if one + other else 0.0
