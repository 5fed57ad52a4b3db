"""Which object will be touched next: places of a clip's features look at the boxes of what was detected there.

Thakur et al., Guided Attention for Next Active Object @ EGO4D STA Challenge (arXiv:2305.16066), and the method's paper
(arXiv:2305.12953), with the details of the authors' code (sanketsans/ganov2): frame by frame, tokens of the fast
branch's feature map ask, as they are, and linear embeddings of that frame's boxes answer; then an MLP. Both are added,
at each scale ahead of the fusion with the still branch (StillFast, Ragusa et al., arXiv:2304.03959). The catalogue's
"from detections to features" is to be read so.

Deviations: boxes are in widths and heights of the frame, 0 to 1, where the code has pixels: a matter of learning rates,
as the embedding is linear. The branches are small convolutional networks, and boxes of the last frame are given: each
is scored as the next, with its noun, verb and time, where StillFast detects with Faster R-CNN. Absent boxes are boxes
of zeros, as in the code, unless a mask is given.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F


class GuidedAttention(nn.Module):
    """Places of each frame look at the boxes of that frame. [batch, dim, frame, row, column] to the same

    drop: of weights, and in the MLP; drop_path: of either addition, whole rows, in training. `regard.record` sees cross
    attention from places to boxes, a row of its batch for each frame.

    >>> import torch
    >>> from regard.models.next_active_object import GuidedAttention
    >>> features, boxes = torch.randn(2, 16, 4, 3, 3), torch.rand(2, 8, 5, 4)
    >>> GuidedAttention(16)(features, boxes).shape
    torch.Size([2, 16, 4, 3, 3])
    """

    def __init__(self, dim: int, *, heads: int = 8, drop: float = 0.3, drop_path: float = 0.3) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"GuidedAttention: {dim} channels do not divide by {heads} heads")
        self.box = nn.Linear(4, dim)
        self.attention = nn.MultiheadAttention(dim, heads, drop, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(drop), nn.Linear(4 * dim, dim), nn.Dropout(drop)
        )
        self.drop_path = drop_path
        for name, parameter in self.named_parameters():
            if not name.startswith("norm"):  # the code draws biases of the attention anew as well
                zero = name.endswith("bias") and not name.startswith("attention")
                nn.init.zeros_(parameter) if zero else nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, features: Tensor, boxes: Tensor, mask: Tensor | None = None) -> Tensor:
        """boxes: [batch, frame, object, 4], left, top, right and bottom, as many frames or a multiple, of which every
        so manieth is taken; mask: boolean [batch, frame, object], False for what is no box.

        ValueError for features of another shape, where numbers of frames do not divide, and where a mask leaves a frame
        without a box.
        """
        if features.ndim != 5 or features.shape[1] != self.box.out_features:
            raise ValueError(
                f"GuidedAttention: features are [batch, {self.box.out_features}, frame, row, column]; got "
                f"{list(features.shape)}"
            )
        batch, dim, frames, rows, columns = features.shape
        if boxes.ndim != 4 or boxes.shape[-1] != 4 or len(boxes) != batch or boxes.shape[1] % frames:
            raise ValueError(
                f"GuidedAttention: boxes are [{batch}, frame, object, 4], a multiple of {frames} frames; got "
                f"{list(boxes.shape)}"
            )
        every = boxes.shape[1] // frames
        hidden = None
        if mask is not None:
            if mask.shape != boxes.shape[:3] or mask.dtype != torch.bool or not mask.any(-1).all():
                raise ValueError(
                    f"GuidedAttention: a mask is boolean {list(boxes.shape[:3])} with a box in each frame; got "
                    f"{mask.dtype} {list(mask.shape)}"
                )
            hidden = ~mask[:, ::every].flatten(0, 1)
            boxes = boxes.masked_fill(~mask[..., None], 0.0)  # a weight of 0 does not stop a NaN
        given = self.box(boxes[:, ::every].flatten(0, 1))
        tokens = features.movedim(1, -1).reshape(batch * frames, rows * columns, dim)
        found, _ = self.attention(tokens, given, given, key_padding_mask=hidden)
        tokens = tokens + self._kept(found, batch)
        tokens = tokens + self._kept(self.mlp(self.norm(tokens)), batch)
        return tokens.view(batch, frames, rows, columns, dim).movedim(-1, 1)

    def _kept(self, x: Tensor, batch: int) -> Tensor:
        """Nothing, for some rows of the batch in training; the others larger by as much."""
        if not self.training or not self.drop_path:
            return x
        keep = torch.rand(batch, device=x.device) >= self.drop_path
        scale = keep.to(x) / (1 - self.drop_path)
        return x * scale.repeat_interleave(len(x) // batch)[:, None, None]


@dataclass(frozen=True)
class AnticipationConfig:
    """Sizes of a `NextActiveObject`."""

    channels: int = 3  # of a picture
    widths: tuple[int, ...] = (32, 64)  # of the scales, each half as large as the one before
    heads: int = 8
    nouns: int = 128
    verbs: int = 81
    guided: bool = True
    drop: float = 0.3


class Anticipated(NamedTuple):
    """Of each box of the last frame, what is said of it. [batch, object, ...]"""

    scores: Tensor  # that it is touched next; softmax over objects
    nouns: Tensor
    verbs: Tensor
    time: Tensor  # until then, from 0, in whatever unit it was trained with


class NextActiveObject(nn.Module, PyTorchModelHubMixin):
    """Scores of boxes as the one that is touched next, from a clip, its last frame, and the boxes of all frames.

    >>> import torch
    >>> from regard.models.next_active_object import next_active_object
    >>> model = next_active_object(widths=(8, 16), heads=2, nouns=3, verbs=2)
    >>> clip, boxes = torch.rand(1, 3, 4, 32, 32), torch.rand(1, 4, 5, 4)
    >>> model(clip, clip[:, :, -1], boxes).scores.shape
    torch.Size([1, 5])
    """

    def __init__(self, config: AnticipationConfig) -> None:
        super().__init__()
        self.config = c = config
        widths = (c.channels, *c.widths)
        still, fast, guides, fused = nn.ModuleList(), nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, (a, b) in enumerate(zip(widths, c.widths, strict=False)):
            step = 2 if i else 4
            still.append(nn.Sequential(nn.Conv2d(a, b, 5, step, 2), nn.BatchNorm2d(b), nn.ReLU()))
            parts = nn.Conv3d(a, b, (3, 5, 5), (1, step, step), (1, 2, 2)), nn.BatchNorm3d(b), nn.ReLU()
            fast.append(nn.Sequential(*parts))
            guides.append(
                GuidedAttention(b, heads=c.heads, drop=c.drop, drop_path=c.drop) if c.guided else nn.Identity()
            )
            fused.append(nn.Conv2d(b, b, 3, padding=1))
        self.still, self.fast, self.guides, self.fused = still, fast, guides, fused
        wide = sum(c.widths)
        self.read = nn.Sequential(nn.Linear(2 * wide + 4, wide), nn.ReLU())
        self.score, self.time = nn.Linear(wide, 1), nn.Linear(wide, 1)
        self.noun, self.verb = nn.Linear(wide, c.nouns), nn.Linear(wide, c.verbs)

    def forward(self, clip: Tensor, still: Tensor, boxes: Tensor, *, guide: Tensor | None = None) -> Anticipated:
        """clip [batch, channel, frame, row, column]; still, the last frame, [batch, channel, row, column];
        boxes [batch, frame, object, 4] in widths and heights; guide: boxes to attend to, where they are not these.
        """
        guide = boxes if guide is None else guide
        pooled, whole = [], []
        for to_still, to_fast, attend, fuse in zip(self.still, self.fast, self.guides, self.fused, strict=True):
            still, clip = to_still(still), to_fast(clip)
            if self.config.guided:
                clip = cast(GuidedAttention, attend)(clip, guide)
            together = still + fuse(F.interpolate(clip.mean(2), size=still.shape[-2:]))
            still = together
            pooled.append(inside(together, boxes[:, -1]))
            whole.append(together.mean((2, 3)))
        last = boxes[:, -1]
        context = torch.cat(whole, -1)[:, None].expand(-1, last.shape[1], -1)
        x = self.read(torch.cat([*pooled, context, last], -1))
        return Anticipated(self.score(x)[..., 0], self.noun(x), self.verb(x), F.softplus(self.time(x)[..., 0]))


def inside(features: Tensor, boxes: Tensor, *, points: int = 3) -> Tensor:
    """Mean of a map at a grid of points inside each box. [batch, dim, row, column] -> [batch, object, dim]

    boxes: [batch, object, 4] in widths and heights.

    >>> import torch
    >>> from regard.models.next_active_object import inside
    >>> inside(torch.ones(1, 2, 4, 4), torch.tensor([[[0.2, 0.2, 0.6, 0.8]]]))
    tensor([[[1., 1.]]])
    """
    share = (torch.arange(points, device=boxes.device) + 0.5) / points
    left, top, right, bottom = boxes[..., None].unbind(-2)
    x, y = left + (right - left) * share, top + (bottom - top) * share
    grid = torch.stack([x[..., None, :].expand(*x.shape, points), y[..., None].expand(*y.shape, points)], -1)
    found = F.grid_sample(features, 2 * grid.flatten(2, 3) - 1, padding_mode="border", align_corners=False)
    return found.mean(-1).mT


def next_active_object(**sizes: Any) -> NextActiveObject:
    """An untrained `NextActiveObject` of these sizes, the fields of `AnticipationConfig`."""
    return NextActiveObject(AnticipationConfig(**sizes))
