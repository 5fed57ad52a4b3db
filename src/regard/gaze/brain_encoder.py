"""Brain regions that look for what they answer to: one learned query a region, asking the patches of a picture.

Transformer brain encoders explain human high-level visual responses (Adeli, Sun and Kriegeskorte, arXiv:2505.17329),
after the authors' code. A frozen model gives features of patches; a decoder layer of cross attention gathers one token
a region by the region's own query; a linear reading of that token predicts the region's voxels. Beside it, as in the
code: fixed maps (`kind="spatial"`: a learned map over places a region), and `kind="custom"`, attention whose values are
the features themselves.

As in the code, attention of `kind="custom"` takes the place of the token instead of being added to it, its queries are
not normed, and no norm comes last. Deviations: the code keeps two hemispheres, each with a reading of its own; here a
region of a hemisphere is a region, and a voxel's reading its own row anyway. `membership` says which region a voxel is
in; with a region for each voxel or for each hemisphere it is the code's `voxels` or `hemis`. Its custom attention has
16 heads whatever is asked, and no mask; here both are as asked. Encoder layers before the decoder and the convolutional
baseline are left out: `regard.gaze.brain_profile.brain_profile` is the linear one. `explained_variance` divides the
squared correlation by the ceiling, as is usual; the paper's own score was not at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class BrainEncoderConfig:
    """Defaults are the authors'; sizes are the data's."""

    dim: int  # of a patch's features
    regions: int
    voxels: int
    heads: int = 16
    feedforward: int = 1024
    layers: int = 1
    dropout: float = 0.1
    kind: Literal["transformer", "custom", "spatial"] = "transformer"
    places: int = 0  # rows times columns, which only fixed maps need to know


class BrainEncoder(nn.Module):
    """Responses of voxels to a picture, from features of its patches.

    membership: bool [region, voxel], the region that each voxel is in; exactly one. ValueError for a voxel without.
    """

    membership: Tensor

    def __init__(self, config: BrainEncoderConfig, membership: Tensor) -> None:
        super().__init__()
        if config.kind not in ("transformer", "custom", "spatial"):
            raise ValueError(f'kind is "transformer", "custom" or "spatial": got {config.kind!r}')
        if membership.shape != (config.regions, config.voxels):
            raise ValueError(
                f"membership is [region, voxel], {config.regions} by {config.voxels}: got {list(membership.shape)}"
            )
        of = membership.bool().sum(0)
        if (of != 1).any():
            first = int((of != 1).nonzero()[0, 0])
            raise ValueError(f"each voxel is in one region: voxel {first} is in {int(of[first])}")
        self.config = config
        self.register_buffer("membership", membership.bool())
        self.read = nn.Linear(config.dim, config.voxels)
        if config.kind == "spatial":
            if config.places < 1:
                raise ValueError('kind="spatial" learns a map over places: give places=, rows times columns')
            self.maps = nn.Embedding(config.regions, config.places)
            return
        if config.dim % config.heads:
            raise ValueError(f"heads={config.heads} do not divide dim={config.dim}")
        self.queries = nn.Embedding(config.regions, config.dim)
        made = _Transformer if config.kind == "transformer" else _Custom
        self.layers = nn.ModuleList(made(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim) if config.kind == "transformer" else nn.Identity()
        for parameter in self.layers.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, features: Tensor, position: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Predicted responses. [batch, voxel]

        features [batch, dim, row, column]; position: a code of places that is added to keys only, of the same shape or
        without batch, as from `sine_position`; mask bool [batch, row, column], True where a place is none.
        """
        predicted = self.read(self.tokens(features, position, mask))  # [batch, region, voxel]
        return predicted.masked_fill(~self.membership, 0.0).sum(1)

    def tokens(self, features: Tensor, position: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """What each region gathers. [batch, region, dim]"""
        return self._gathered(features, position, mask)[0]

    def routing(self, features: Tensor, position: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Where each region looks, in the last layer: shares of places. [batch, head, region, row, column]

        Of fixed maps there is one head, the same for each picture.
        """
        return self._gathered(features, position, mask)[1].unflatten(-1, features.shape[2:])

    def _gathered(self, features: Tensor, position: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        config = self.config
        if features.ndim != 4 or features.shape[1] != config.dim:
            raise ValueError(f"features are [batch, {config.dim}, row, column]: got {list(features.shape)}")
        value = features.flatten(2).mT  # [batch, place, dim]
        if config.kind == "spatial":
            if value.shape[1] != config.places:
                raise ValueError(f"maps are over {config.places} places: got {value.shape[1]}")
            weights = self.maps.weight.softmax(-1).expand(len(value), 1, -1, -1)
            return weights[:, 0] @ value, weights
        key = value if position is None else value + position.expand_as(features).flatten(2).mT
        hidden = None if mask is None else mask.flatten(1)
        if hidden is not None and bool(hidden.all(1).any()):
            raise ValueError(f"mask hides every place of picture {int(hidden.all(1).nonzero()[0, 0])}")
        query = self.queries.weight.expand(len(value), -1, -1)
        token, weights = torch.zeros_like(query), value.new_empty(0)
        for layer in self.layers:
            token, weights = layer(token, query, key, value, hidden)
        return self.norm(token), weights


class _Layer(nn.Module):
    """What both decoder layers have: a feed-forward part that a norm comes before."""

    def __init__(self, config: BrainEncoderConfig) -> None:
        super().__init__()
        self.norm_token = nn.LayerNorm(config.dim)
        self.up, self.down = nn.Linear(config.dim, config.feedforward), nn.Linear(config.feedforward, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def more(self, token: Tensor) -> Tensor:
        return token + self.dropout(self.down(self.dropout(F.relu(self.up(self.norm_token(token))))))


class _Transformer(_Layer):
    """Its norms come first; regions do not attend to each other."""

    def __init__(self, config: BrainEncoderConfig) -> None:
        super().__init__(config)
        self.norm_query = nn.LayerNorm(config.dim)
        self.attention = nn.MultiheadAttention(config.dim, config.heads, dropout=config.dropout, batch_first=True)

    def forward(
        self, token: Tensor, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        asked = self.norm_query(token) + query
        found, weights = self.attention(asked, key, value, hidden, average_attn_weights=False)
        return self.more(token + self.dropout(found)), weights


class _Custom(_Layer):
    """Its values are the features as they are; what is found takes the place of the token."""

    def __init__(self, config: BrainEncoderConfig) -> None:
        super().__init__(config)
        self.heads = config.heads
        self.query, self.key, self.out = (nn.Linear(config.dim, config.dim) for _ in range(3))

    def forward(
        self, token: Tensor, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.query(token + query), self.key(key), value)
        )
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, None], -math.inf)
        weights = scores.softmax(-1)
        found = (self.dropout(weights) @ v).transpose(1, 2).flatten(2)
        return self.more(self.dropout(self.out(found))), weights


def sine_position(dim: int, rows: int, columns: int) -> Tensor:
    """DETR's code of places, half of it for the row and half for the column. [dim, row, column]

    Carion et al. (arXiv:2005.12872), normalised: the last row and column are at 2 pi. dim is a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine_position has a sine and a cosine of rows and of columns: dim={dim} is no multiple of 4")
    rate = 10000 ** (-torch.arange(0, dim // 2, 2) / (dim // 2))

    def of(n: int) -> Tensor:
        angle = torch.arange(1, n + 1)[:, None] / (n + 1e-6) * 2 * math.pi * rate
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).T  # [dim / 2, place]

    row, column = of(rows)[:, :, None], of(columns)[:, None]
    return torch.cat([row.expand(-1, -1, columns), column.expand(-1, rows, -1)])


def explained_variance(prediction: Tensor, response: Tensor, ceiling: Tensor | None = None) -> Tensor:
    """Squared correlation over pictures, 0 to 1, of each voxel; as a share of its ceiling where one is given. [voxel]

    prediction, response [picture, voxel]; ceiling [voxel], the share of a voxel's variance that a noise-free model
    could explain (`regard.gaze.brain_profile.noise_ceiling`). NaN where a response or a prediction does not vary, and
    where the ceiling is 0. As a correlation, it does not see a wrong mean or scale, nor a wrong sign.
    """
    if prediction.shape != response.shape or prediction.ndim != 2:
        raise ValueError(f"both are [picture, voxel]: got {list(prediction.shape)} and {list(response.shape)}")
    one, other = (x - x.mean(0) for x in (prediction, response))
    found = (one * other).sum(0) ** 2 / (one.square().sum(0) * other.square().sum(0))
    return found if ceiling is None else (found / ceiling).where(ceiling > 0, torch.nan)
