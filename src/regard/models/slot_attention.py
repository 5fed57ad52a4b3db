"""Slots that compete for the parts of an input: object discovery without labels.

Locatello et al., Object-Centric Learning with Slot Attention (arXiv:2006.15055), algorithm 1 and section 2.2, with the
defaults of the authors' code: 3 rounds, softmax over slots, then a weighted mean over inputs (offset 1e-8), a GRU and a
residual MLP; an autoencoder of a CNN, positions on a grid, and a spatial broadcast decoder.

Deviations: the authors' convolutions have 64 channels and four layers of width 5, and their decoder starts from 8 x 8
and doubles; here channels, layers, width, stride and the decoder's start are knobs of `SlotConfig`. Initial values, the
epsilon of norms (1e-5; Keras has 1e-3) and the side on which transposed convolutions are cut (2 and 1 pixels; Keras
cuts 1 and 2) are PyTorch's, which matters where the authors' weights are to be loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SlotAttention(nn.Module):
    """Slots from a set of inputs: exchangeable, and in number whatever is asked for.

    inputs: channels of an input; dim: channels of a slot; slots: how many, unless the call says otherwise; rounds: how
    often they look; hidden: width of the MLP; bias: of the maps of queries, keys and values. `regard.record` sees each
    round as a layer, whose queries are slots and whose weights, over inputs, sum to 1.

    >>> import torch
    >>> from regard.models.slot_attention import SlotAttention
    >>> slots = SlotAttention(8, 16, slots=3)
    >>> slots(torch.randn(2, 10, 8)).shape, slots(torch.randn(2, 10, 8), slots=5).shape
    (torch.Size([2, 3, 16]), torch.Size([2, 5, 16]))
    """

    def __init__(
        self,
        inputs: int,
        dim: int,
        *,
        slots: int = 7,
        rounds: int = 3,
        hidden: int = 128,
        epsilon: float = 1e-8,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.slots, self.rounds = slots, rounds
        self.norm_inputs, self.norm_slots, self.norm_mlp = nn.LayerNorm(inputs), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mean, self.log_deviation = nn.Parameter(torch.empty(1, 1, dim)), nn.Parameter(torch.empty(1, 1, dim))
        nn.init.xavier_uniform_(self.mean)
        nn.init.xavier_uniform_(self.log_deviation)
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key, self.value = nn.Linear(inputs, dim, bias=bias), nn.Linear(inputs, dim, bias=bias)
        self.attention = CompetitiveAttention(epsilon)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, inputs: Tensor, *, slots: int | None = None, start: Tensor | None = None) -> Tensor:
        """inputs [batch, token, channel] -> slots [batch, slot, dim].

        start: what the slots start from [batch, slot, dim], instead of a draw from the learned normal distribution.
        """
        inputs = self.norm_inputs(inputs)
        key, value = self.key(inputs), self.value(inputs)
        if start is None:
            noise = torch.randn(
                inputs.shape[0], slots or self.slots, self.mean.shape[-1], device=inputs.device, dtype=inputs.dtype
            )
            start = self.mean + self.log_deviation.exp() * noise
        found = start
        for _ in range(self.rounds):
            update = self.attention(self.query(self.norm_slots(found)), key, value)
            found = self.gru(update.flatten(0, 1), found.flatten(0, 1)).view_as(found)
            found = found + self.mlp(self.norm_mlp(found))
        return found


class CompetitiveAttention(nn.Module):
    """Softmax over queries, so that they compete for each key; then each takes the weighted mean of the values."""

    is_cross_attention = True

    def __init__(self, epsilon: float = 1e-8, guard: float = 0.0) -> None:
        super().__init__()
        self.epsilon, self.guard = epsilon, guard  # added to a share, and to their sum over keys

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [batch, query, dim], key and value [batch, key, dim] -> [batch, query, dim]"""
        return self.shared(query, key, value)[0]

    def shared(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the share of each key that each query won [batch, query, key]."""
        shares = F.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=1) + self.epsilon
        return shares / (shares.sum(-1, keepdim=True) + self.guard) @ value, shares


@dataclass(frozen=True)
class SlotConfig:
    """Sizes of `SlotAutoencoder`, as in the authors' code unless said otherwise."""

    size: int = 64  # rows and columns of a picture
    channels: int = 3
    slots: int = 7
    rounds: int = 3
    dim: int = 64
    mlp: int = 128
    layers: int = 4  # convolutions of the encoder
    width: int = 5  # of every convolution but the last
    stride: int = 1  # of the encoder's second convolution; the authors' encoder for objects keeps every pixel
    start: int = 8  # rows and columns that a slot is broadcast to; the decoder doubles them until `size`
    finish: int = 1  # convolutions of the decoder at full size, before the last


class Parts(NamedTuple):
    """A picture put together from slots."""

    picture: Tensor  # [batch, channel, row, column]
    pictures: Tensor  # of each slot [batch, slot, channel, row, column]
    masks: Tensor  # share of each slot in each pixel, sums to 1 over slots [batch, slot, row, column]
    slots: Tensor  # [batch, slot, dim]


class SlotAutoencoder(nn.Module):
    """Takes a picture apart into slots, and draws it again: trained on the error of the picture alone.

    Raises ValueError where `size` is not `start` doubled some times, or does not divide by `stride`.

    >>> import torch
    >>> from regard.models.slot_attention import SlotAutoencoder, SlotConfig
    >>> model = SlotAutoencoder(SlotConfig(size=16, dim=8, slots=4))
    >>> model(torch.rand(2, 3, 16, 16)).masks.shape
    torch.Size([2, 4, 16, 16])
    """

    def __init__(self, config: SlotConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or SlotConfig()
        doublings = (c.size // c.start).bit_length() - 1
        if c.start << doublings != c.size or c.size % c.stride:
            raise ValueError(
                f"size {c.size} must be start={c.start} times a power of two, and divide by stride={c.stride}"
            )
        convolutions: list[nn.Module] = []
        for i in range(c.layers):
            step = c.stride if i == 1 else 1
            convolutions += [nn.Conv2d(c.dim if i else c.channels, c.dim, c.width, step, c.width // 2), nn.ReLU()]
        self.encoder = nn.Sequential(*convolutions)
        self.encoder_places = Places(c.dim, c.size // c.stride)
        self.features = nn.Sequential(nn.LayerNorm(c.dim), nn.Linear(c.dim, c.dim), nn.ReLU(), nn.Linear(c.dim, c.dim))
        self.slot_attention = SlotAttention(c.dim, c.dim, slots=c.slots, rounds=c.rounds, hidden=c.mlp)
        self.decoder_places = Places(c.dim, c.start)
        up: list[nn.Module] = []
        for _ in range(doublings):
            up += [nn.ConvTranspose2d(c.dim, c.dim, c.width, 2, c.width // 2, output_padding=1), nn.ReLU()]
        for _ in range(c.finish):
            up += [nn.Conv2d(c.dim, c.dim, c.width, 1, c.width // 2), nn.ReLU()]
        self.decoder = nn.Sequential(*up, nn.Conv2d(c.dim, c.channels + 1, 3, 1, 1))

    def forward(self, pictures: Tensor, *, slots: int | None = None) -> Parts:
        """pictures [batch, channel, row, column]; slots: how many, where it is not the configuration's number."""
        seen = self.encoder_places(self.encoder(pictures)).flatten(2).mT
        found = self.slot_attention(self.features(seen), slots=slots)
        wide = found.flatten(0, 1)[:, :, None, None].expand(-1, -1, self.config.start, self.config.start)
        drawn = self.decoder(self.decoder_places(wide)).unflatten(0, found.shape[:2])
        parts, masks = drawn[:, :, :-1], drawn[:, :, -1].softmax(1)
        return Parts((parts * masks[:, :, None]).sum(1), parts, masks, found)


class Places(nn.Module):
    """Adds a learned reading of where each cell of a grid lies: its distance to each of the four sides, 0 to 1."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        at = torch.linspace(0, 1, size)
        rows, columns = torch.meshgrid(at, at, indexing="ij")
        sides = torch.stack([rows, columns, 1 - rows, 1 - columns], -1)
        self.register_buffer("sides", sides, persistent=False)
        self.read = nn.Linear(4, dim)

    def forward(self, grid: Tensor) -> Tensor:
        """grid [batch, dim, row, column]"""
        return grid + self.read(self.sides).permute(2, 0, 1)


def slot_attention(**sizes: int) -> SlotAutoencoder:
    """An untrained `SlotAutoencoder` of these sizes, the fields of `SlotConfig`."""
    return SlotAutoencoder(SlotConfig(**sizes))
