"""Frames encoded side by side, each on its own, and a recurrence over them that cannot be skipped.

Keiblinger, Recurrence-Complete Frame-based Action Models (arXiv:2510.06828); sizes and order of the parts as in the
author's code (mikex86/fbamtrain, toyimpl). A frame of a text terminal, cells of a character and two colours, goes
through convolutions that halve it and a small transformer over its cells; an LSTM reads the frames in turn and names
the next action. A model is recurrence-complete where its state is h[t] = f(h[t-1], x[t]) with an f that no parallel
scan can evaluate; transformers, linear attention and state-space models are not, and what they can follow has a bounded
depth.

Deviations: the backward pass in a stream (`streamed_backward`) is a function beside the model. Frames of other kinds go
through a `head` of one's own. The paper's own experiments, on coding sessions, are not part of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FrameConfig:
    """Sizes of a `FrameHead` and a `FrameActionModel`."""

    vocabulary: int = 128  # characters with a vector of their own; beyond them it is 0
    rows: int = 24
    columns: int = 80
    dim: int = 512
    layers: int = 3
    heads: int = 8
    downsample: int = 2  # how often rows and columns are halved
    conv: Literal["dilated", "geglu"] = "dilated"
    dilation: int = 2
    reduction: Literal["last_pos", "mean"] = "last_pos"  # a frame is its last cell, or the mean
    actions: int = 128

    def __post_init__(self) -> None:
        step = 2**self.downsample
        if self.rows % step or self.columns % step:
            raise ValueError(f"FrameConfig: {self.rows} rows and {self.columns} columns do not divide by {step}")
        if self.dim % self.heads:
            raise ValueError(f"FrameConfig: {self.dim} channels do not divide by {self.heads} heads")
        if self.conv not in ("dilated", "geglu") or self.reduction not in ("last_pos", "mean"):
            raise ValueError(
                f"FrameConfig: conv is dilated or geglu, reduction last_pos or mean; got {self.conv}, {self.reduction}"
            )


class Halved(nn.Module):
    """A convolution without residual, and means of 2 x 2. [frame, row, column, dim] -> half the rows and columns"""

    def __init__(self, dim: int, conv: str, dilation: int) -> None:
        super().__init__()
        self.gated = conv == "geglu"
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        step = 1 if self.gated else dilation
        self.conv = nn.Conv2d(dim, dim * (1 + self.gated), 3, padding=step, dilation=step, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.norm(x).movedim(-1, 1))
        if self.gated:
            value, gate = x.chunk(2, 1)
            x = value * F.gelu(gate)
        else:
            x = F.gelu(x)
        return F.avg_pool2d(x, 2).movedim(1, -1)


class CellAttention(nn.Module):
    """Cells of one frame to each other, all of them. [frame, cell, dim]"""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.maps, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.maps(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm layer of the frame's transformer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.RMSNorm(dim, eps=1e-5), CellAttention(dim, heads)
        self.norm_mlp = nn.RMSNorm(dim, eps=1e-5)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm_mlp(x))


class FrameHead(nn.Module):
    """Vectors of frames, each from its own cells. [..., row, column, 3] -> [..., dim]

    A cell: the character's number, and the colours of its ink and its ground as 0xRRGGBB. `regard.record` sees the
    attention among cells, a row of its batch for each frame.

    >>> import torch
    >>> from regard.models.recurrence_complete import FrameConfig, FrameHead
    >>> head = FrameHead(FrameConfig(rows=4, columns=8, dim=16, heads=2, layers=1))
    >>> head(torch.zeros(2, 5, 4, 8, 3, dtype=torch.long)).shape  # batch, frame, dim
    torch.Size([2, 5, 16])
    """

    def __init__(self, config: FrameConfig) -> None:
        super().__init__()
        self.config = c = config
        self.characters = nn.Parameter(torch.randn(c.vocabulary, c.dim))
        self.positions = nn.Parameter(torch.randn(c.rows * c.columns, c.dim))
        self.ink, self.ground = nn.Parameter(torch.randn(3, c.dim)), nn.Parameter(torch.randn(3, c.dim))
        self.halved = nn.Sequential(*(Halved(c.dim, c.conv, c.dilation) for _ in range(c.downsample)))
        self.blocks = nn.Sequential(*(Block(c.dim, c.heads) for _ in range(c.layers)))

    def embed(self, cells: Tensor) -> Tensor:
        """Vectors of the cells. [frame, row, column, 3] -> [frame, row, column, dim]"""
        c = self.config
        if cells.shape[-3:] != (c.rows, c.columns, 3) or cells.is_floating_point():
            raise ValueError(
                f"FrameHead: cells are numbers [..., {c.rows}, {c.columns}, 3]; got {cells.dtype} {list(cells.shape)}"
            )
        character, *colours = cells.long().unbind(-1)
        known = ((character >= 0) & (character < c.vocabulary))[..., None]
        found = self.characters[character.clamp(0, c.vocabulary - 1)] * known
        found = found + self.positions.view(c.rows, c.columns, -1)
        for packed, vectors in zip(colours, (self.ink, self.ground), strict=True):
            parts = torch.stack([packed >> 16 & 255, packed >> 8 & 255, packed & 255], -1)
            found = found + parts.to(vectors) / 255 @ vectors
        return found

    def forward(self, cells: Tensor) -> Tensor:
        if cells.ndim < 4:
            raise ValueError(f"FrameHead: cells are [..., row, column, 3], of a frame or more; got {list(cells.shape)}")
        frames = cells.flatten(0, -4)
        x = self.blocks(self.halved(self.embed(frames)).flatten(1, 2))
        x = x[:, -1] if self.config.reduction == "last_pos" else x.mean(1)
        return x.unflatten(0, cells.shape[:-3])


class FrameActionModel(nn.Module, PyTorchModelHubMixin):
    """Scores of the action at each frame, from the frames so far. [batch, frame, action]

    head: what makes vectors [batch, frame, dim] of frames, instead of a `FrameHead`; it is not saved with the sizes, so
    give it to `from_pretrained` again.

    >>> import torch
    >>> from regard.models.recurrence_complete import recurrence_complete
    >>> model = recurrence_complete(rows=4, columns=8, dim=16, heads=2, layers=1, actions=5)
    >>> model(torch.zeros(2, 3, 4, 8, 3, dtype=torch.long)).shape
    torch.Size([2, 3, 5])
    """

    def __init__(self, config: FrameConfig, *, head: nn.Module | None = None) -> None:
        super().__init__()
        self.config = c = config
        self.head = FrameHead(c) if head is None else head
        self.hidden, self.cell = nn.Parameter(torch.zeros(c.dim)), nn.Parameter(torch.zeros(c.dim))
        self.lstm = nn.LSTM(c.dim, c.dim, batch_first=True)
        self.action = nn.Linear(c.dim, c.actions, bias=False)

    def forward(self, cells: Tensor, state: State | None = None) -> Tensor:
        """cells: [batch, frame, row, column, 3], or what the head takes; state: as `read` gives it, of frames before"""
        return self.read(self.head(cells), state)[0]

    def read(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Vectors of frames [batch, frame, dim] -> scores [batch, frame, action], and the state to go on from.

        ValueError where there is no frame.
        """
        if frames.ndim != 3 or not frames.shape[1]:
            raise ValueError(f"FrameActionModel: frames are [batch, frame, dim], one or more; got {list(frames.shape)}")
        if state is None:
            hidden, cell = (part.expand(1, len(frames), -1).contiguous() for part in (self.hidden, self.cell))
            state = hidden, cell
        read, after = self.lstm(frames, state)
        return self.action(read), after


def streamed_backward(model: FrameActionModel, cells: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Adds the gradients of a loss to the weights' own, holding what one frame needs at a time; gives the loss.

    loss: of the model's scores [batch, frame, action]. Frames are read twice: once without a gradient, for the
    recurrence, and then one by one, each with the gradient that the recurrence had for it. The gradients are those of
    `loss(model(cells)).backward()`, but for rounding.

    >>> import torch
    >>> from regard.models.recurrence_complete import recurrence_complete, streamed_backward
    >>> model = recurrence_complete(rows=4, columns=4, dim=8, heads=2, layers=1, actions=3)
    >>> cells = torch.ones(1, 6, 4, 4, 3, dtype=torch.long)
    >>> found = streamed_backward(model, cells, lambda logits: logits.square().mean())
    >>> model.head.characters.grad.abs().sum() > 0
    tensor(True)
    """
    count = cells.shape[1]
    with torch.no_grad():
        frames = torch.stack([model.head(cells[:, t]) for t in range(count)], 1)
    frames.requires_grad_()
    found = loss(model.read(frames)[0])
    found.backward()
    for t in range(count):
        torch.autograd.backward(model.head(cells[:, t]), frames.grad[:, t])  # type: ignore[index]
    return found.detach()


def recurrence_complete(**sizes: Any) -> FrameActionModel:
    """An untrained `FrameActionModel` of these sizes, the fields of `FrameConfig`."""
    return FrameActionModel(FrameConfig(**sizes))
