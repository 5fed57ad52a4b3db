"""A manipulation policy that is told what to do by a picture of the outcome, and looks closer at what a box shows.

Li et al., VIRT: Vision Instructed Transformer for Robotic Manipulation (arXiv:2410.07169), with the details of the
authors' code (Lizhuoling/VIRT). Learned queries, one for each action of a chunk and one for the stage of the task, go
through a decoder of DETR's kind (Carion et al., arXiv:2005.12872: norms after, positions added to queries and keys and
not to values, contents from 0) over tokens of pictures, of a crop around a box ("gaze"), or of a picture of the outcome
("imagery"), and of states. Every layer's output is read and supervised: actions by a Laplace likelihood, whose
logarithmic width is told along and clipped.

Deviations: the imagery pre-training is not in the released code; here its picture takes the place of the crop's tokens,
as in the abstract. The crop is read by bilinear sampling at the middles of its pixels. The backbone is any module that
gives tokens of pictures. Actions are absolute, where the code adds the current pose to some.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

LIMIT = 10.0  # of the logarithmic width, either way


def enlarged(boxes: Tensor, factor: float = 4.0) -> Tensor:
    """Boxes as many times as wide and high about their middle, clipped at the picture's edges. [..., 4]

    boxes: left, top, right, bottom in widths and heights; ValueError where one lies outside 0 to 1.

    >>> import torch
    >>> from regard.models.virt import enlarged
    >>> enlarged(torch.tensor([0.4, 0.4, 0.6, 0.6]), 2.0)
    tensor([0.3000, 0.3000, 0.7000, 0.7000])
    """
    if boxes.shape[-1] != 4 or bool(((boxes < 0) | (boxes > 1)).any()) or bool((boxes[..., :2] > boxes[..., 2:]).any()):
        raise ValueError("enlarged: boxes are [..., 4], left, top, right and bottom in widths and heights, 0 to 1")
    middle, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
    return torch.cat([middle - factor * half, middle + factor * half], -1).clamp(0, 1)


def gaze_crop(pictures: Tensor, boxes: Tensor, *, factor: float = 4.0, size: int | None = None) -> Tensor:
    """What is around each box, enlarged to a picture of its own. [batch, channel, row, column]

    pictures: [batch, channel, row, column]; boxes: [batch, 4] in widths and heights; size: rows and columns of what is
    given, those of the pictures unless given. A box of the whole picture with a factor of 1 gives the picture.
    """
    left, top, right, bottom = enlarged(boxes, factor)[..., None].unbind(-2)
    rows, columns = (size, size) if size else pictures.shape[-2:]
    x = left + (right - left) * (torch.arange(columns, device=boxes.device) + 0.5) / columns
    y = top + (bottom - top) * (torch.arange(rows, device=boxes.device) + 0.5) / rows
    grid = torch.stack([x[:, None].expand(-1, rows, -1), y[..., None].expand(-1, -1, columns)], -1)
    return F.grid_sample(pictures, 2 * grid - 1, padding_mode="border", align_corners=False)


class EncoderLayer(nn.Module):
    """Self attention of the tokens, positions in queries and keys; norms after."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, position: Tensor, pad: Tensor | None) -> Tensor:
        placed = tokens + position
        found, _ = self.self_attn(placed, placed, tokens, key_padding_mask=pad, need_weights=False)
        tokens = self.norm1(tokens + self.dropout(found))
        found = self.linear2(self.dropout(self.linear1(tokens).relu()))
        return self.norm2(tokens + self.dropout(found))


class DecoderLayer(nn.Module):
    """Queries among themselves, then to the tokens; positions in queries and keys, not in values; norms after."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, queries: Tensor, tokens: Tensor, position: Tensor, pad: Tensor | None) -> Tensor:
        placed = x + queries
        found, _ = self.self_attn(placed, placed, x, need_weights=False)
        x = self.norm1(x + self.dropout(found))
        found, _ = self.multihead_attn(x + queries, tokens + position, tokens, key_padding_mask=pad, need_weights=False)
        x = self.norm2(x + self.dropout(found))
        found = self.linear2(self.dropout(self.linear1(x).relu()))
        return self.norm3(x + self.dropout(found))


class Decoder(nn.Module):
    """Answers of learned queries, of every layer, all after one last norm. [layer, batch, query, dim]

    `regard.record` sees the cross attention from queries to tokens, the queries' own, and that of an encoder.
    """

    def __init__(
        self, dim: int, heads: int, *, layers: int = 3, encoder: int = 0, hidden: int = 3200, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"Decoder: {dim} channels do not divide by {heads} heads")
        self.encoder = nn.ModuleList(EncoderLayer(dim, heads, hidden, dropout) for _ in range(encoder))
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, position: Tensor, queries: Tensor, *, pad: Tensor | None = None) -> Tensor:
        """tokens and position [batch, token, dim]; queries [query, dim], their positions; pad: boolean [batch, token],
        True for what is no token.
        """
        if pad is not None:  # a weight of 0 does not stop a NaN
            tokens, position = (x.masked_fill(pad[..., None], 0.0) for x in (tokens, position))
        for layer in self.encoder:
            tokens = layer(tokens, position, pad)
        queries = queries.expand(len(tokens), -1, -1)
        x, found = torch.zeros_like(queries), []
        for layer in self.layers:
            x = layer(x, queries, tokens, position, pad)
            found.append(self.norm(x))
        return torch.stack(found)


@dataclass(frozen=True)
class VirtConfig:
    """Sizes of a `Virt`."""

    visual: int = 384  # channels of the backbone's tokens
    patches: int = 256  # of a picture
    cameras: int = 1
    dim: int = 512
    heads: int = 8
    layers: int = 3
    encoder: int = 0
    hidden: int = 3200
    dropout: float = 0.1
    actions: int = 9  # numbers of an action
    chunk: int = 10  # actions at once
    states: tuple[int, ...] = (9, 13, 9)  # numbers of each kind of state: actions of the past, end effector, joints
    past: int = 5  # samples of each
    stages: int = 0  # of the task, to be told; 0 for none
    words: int = 0  # of a text instruction's vocabulary; 0 for none
    goal: bool = False  # told by a picture
    gaze: bool = False  # sees crops
    factor: float = 4.0


class Acts(NamedTuple):
    """What to do. Of the last layer; `every` is of all of them, with the layer ahead."""

    actions: Tensor  # [batch, step, number]
    uncertainty: Tensor  # logarithm of the width [batch, step]
    stage: Tensor | None  # logits [batch, stage]
    every: tuple[Tensor, Tensor, Tensor | None]

    def loss(self, target: Tensor, *, mask: Tensor | None = None, stage: Tensor | None = None) -> Tensor:
        """Laplace terms of all layers, and 10 times the cross entropy of the stage. target: [batch, step, number]

        mask: boolean [batch, step], False for actions after an episode's end; stage: its number [batch].
        """
        actions, widths, stages = self.every
        total = torch.stack([laplace_loss(a, u, target, mask=mask) for a, u in zip(actions, widths, strict=True)]).sum()
        if stages is not None and stage is not None:
            total = total + 10 * torch.stack([F.cross_entropy(logits, stage) for logits in stages]).sum()
        return total


def laplace_loss(actions: Tensor, uncertainty: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean of sqrt(2) times the summed error over the width, and the width's logarithm, over steps.

    actions, target: [batch, step, number]; uncertainty: [batch, step]; mask: boolean, False where no action is asked.

    >>> import torch
    >>> from regard.models.virt import laplace_loss
    >>> laplace_loss(torch.ones(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1, 1))
    tensor(1.4142)
    """
    error = (actions - target).abs().sum(-1)
    each = 2**0.5 * error * (-uncertainty).exp() + uncertainty
    return each.mean() if mask is None else (each * mask).sum() / mask.sum().clamp_min(1)


class Virt(nn.Module, PyTorchModelHubMixin):
    """Chunks of actions from pictures, states, and what the configuration has: words, a goal's picture, a gaze crop.

    backbone: pictures [batch, channel, row, column] -> tokens [batch, patch, visual]; it is not saved with the sizes.
    `regard.record` sees the queries' cross attention to all tokens: of cameras, then of crops, goal, words and states.

    >>> import torch
    >>> from torch import nn
    >>> from regard.models.virt import virt
    >>> model = virt(nn.Flatten(2), visual=64, patches=3, dim=16, heads=2, hidden=32, actions=2, states=(2,), goal=True)
    >>> seen, state = torch.rand(1, 1, 3, 8, 8), [torch.rand(1, 5, 2)]
    >>> model(seen, state, goal=torch.rand(1, 3, 8, 8)).actions.shape
    torch.Size([1, 10, 2])
    """

    def __init__(self, config: VirtConfig, *, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.config = c = config
        self.backbone = backbone or nn.Identity()
        self.visual, self.box = nn.Linear(c.visual, c.dim), nn.Linear(4, c.dim)
        self.patch = nn.Parameter(0.02 * torch.randn(c.patches, c.dim))
        self.crop = nn.Parameter(0.02 * torch.randn(c.cameras, c.patches, c.dim))
        self.outcome = nn.Parameter(0.02 * torch.randn(c.patches, c.dim))
        self.states = nn.ModuleList(nn.Linear(size, c.dim) for size in c.states)
        self.time = nn.Parameter(0.02 * torch.randn(c.past, c.dim))
        self.kind = nn.Parameter(0.02 * torch.randn(len(c.states), c.dim))
        self.words = nn.Embedding(c.words, c.dim) if c.words else None
        self.queries = nn.Parameter(torch.randn(c.chunk + bool(c.stages), c.dim))
        self.decoder = Decoder(c.dim, c.heads, layers=c.layers, encoder=c.encoder, hidden=c.hidden, dropout=c.dropout)
        self.act, self.width = nn.Linear(c.dim, c.actions), nn.Linear(c.dim, 1)
        self.stage = nn.Linear(c.dim, c.stages) if c.stages else None

    def forward(
        self,
        pictures: Tensor,
        state: list[Tensor],
        *,
        goal: Tensor | None = None,
        boxes: Tensor | None = None,
        words: Tensor | None = None,
    ) -> Acts:
        """pictures: [batch, camera, channel, row, column]; state: of each kind, [batch, sample, number];
        goal: the outcome's picture [batch, channel, row, column]; boxes: of what is to be handled [batch, camera, 4] in
        widths and heights; words: their numbers [batch, word]. ValueError where one is missing that it was made for.
        """
        c = self.config
        if pictures.ndim != 5 or pictures.shape[1] != c.cameras:
            raise ValueError(
                f"Virt: pictures are [batch, {c.cameras}, channel, row, column]; got {list(pictures.shape)}"
            )
        flat, near = pictures.flatten(0, 1), None
        if boxes is not None and c.gaze:
            crops = gaze_crop(flat, boxes.flatten(0, 1), factor=c.factor)
            near = self.backbone(crops).unflatten(0, (-1, c.cameras))
        seen = self.backbone(flat).unflatten(0, (-1, c.cameras))
        outcome = self.backbone(goal) if goal is not None and c.goal else goal
        return self.decide(seen, state, outcome=outcome, near=near, boxes=boxes, words=words)

    def decide(
        self,
        seen: Tensor,
        state: list[Tensor],
        *,
        outcome: Tensor | None = None,
        near: Tensor | None = None,
        boxes: Tensor | None = None,
        words: Tensor | None = None,
    ) -> Acts:
        """The same from the backbone's tokens of pictures and crops [batch, camera, patch, visual] and of the outcome
        [batch, patch, visual], where those are kept.
        """
        c = self.config
        for name, given, wanted in (("goal", outcome, c.goal), ("boxes", boxes, c.gaze), ("words", words, c.words)):
            if (given is not None) != bool(wanted):
                made, then = ("with", "give") if wanted else ("without", "leave out")
                raise ValueError(f"Virt: it was made {made} {name}; {then} {name}")
        batch = len(seen)
        tokens, position = [self.visual(seen).flatten(1, 2)], [self.patch.repeat(c.cameras, 1)]
        if c.gaze:
            close = self.visual(cast(Tensor, near)) + self.box(boxes)[:, :, None]
            tokens.append(close.flatten(1, 2))
            position.append(self.crop.flatten(0, 1))
        if c.goal:
            tokens.append(self.visual(cast(Tensor, outcome)))
            position.append(self.outcome)
        if self.words is not None:
            tokens.append(self.words(cast(Tensor, words)))
            position.append(torch.zeros_like(tokens[-1][0]))
        for of, given, kind in zip(self.states, state, self.kind, strict=True):
            tokens.append(of(given))
            position.append(self.time + kind)
        placed = torch.cat(position)[None].expand(batch, -1, -1)
        found = self.decoder(torch.cat(tokens, 1), placed, self.queries)
        acting = found[:, :, : c.chunk]
        actions, widths = self.act(acting), self.width(acting)[..., 0].clamp(-LIMIT, LIMIT)
        stages = None if self.stage is None else self.stage(found[:, :, c.chunk])
        return Acts(actions[-1], widths[-1], None if stages is None else stages[-1], (actions, widths, stages))


def virt(backbone: nn.Module, **sizes: Any) -> Virt:
    """An untrained `Virt` on this backbone, of these sizes, the fields of `VirtConfig`."""
    return Virt(VirtConfig(**sizes), backbone=backbone)
