"""Object-level attention transformer: a scanpath as a sequence of objects.

Fang, Yu, Zhang, Van Der Laan and Shi, OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction
(arXiv:2407.13335; ECCV 2024), after the authors' code. An encoder reads the objects of a picture and the target; a
decoder reads the objects looked at so far; what comes next is a softmax over objects, and the end, of the products of
the two, mixed over heads (the end scores 0 in each). The target's token carries its place and a flag of its own, as in
the code: the model imitates a searcher, it does not find the target.

Deviations. The paper learns a position encoding by gradient, on a grid, so that the cosine of two codes falls as a
Gaussian of their distance; here `distance_codes` gives that Gaussian in closed form, at any place. Appearance comes as
features, where the paper has a small convolutional network: bring one, or whatever is known of the objects. The
target's own token cannot be chosen. The readout has no bias, which would move all scores but the end's alike. A path
starts from features of 0 in the middle of the screen; theirs starts from a blank picture in the middle cell of their
grid. They choose the model by how alike paths are to people's; here that is up to whoever trains it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.loaders import Scanpath


@dataclass(frozen=True)
class OATConfig:
    """Defaults are the paper's, but for features, which are the data's."""

    features: int  # numbers that say what an object looks like
    dim: int = 512  # half for appearance, half for the place
    heads: int = 4
    feedforward: int = 512
    encoder_layers: int = 4
    decoder_layers: int = 4
    readout_heads: int = 2
    sigma: float = 2 / 11  # of the Gaussian of distance: two columns of the paper's shelves of eleven
    dropout: float = 0.1
    longest: int = 100  # looks that positions in the sequence are kept for


class OAT(nn.Module):
    """Which object is looked at next, given those looked at so far.

    Places are x and y from the left top corner, as shares of the screen's width and height.
    """

    def __init__(self, config: OATConfig) -> None:
        super().__init__()
        if config.dim % 4:
            raise ValueError(f"dim={config.dim}: appearance and place take half each, with pairs of sine and cosine")
        self.config = config
        half, kinds = config.dim // 2, config.dim // 2 - 4 * (config.dim // 12)
        self.appearance = nn.Linear(config.features, half)
        self.kind = nn.Embedding(2, kinds)  # other, target
        common = {"batch_first": True, "dropout": config.dropout}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(config.dim, config.heads, config.feedforward, **common),
            config.encoder_layers,
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(config.dim, config.heads, config.feedforward, **common), config.decoder_layers
        )
        self.dropout = nn.Dropout(config.dropout)
        self.of_object = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(config.readout_heads))
        self.of_look = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(config.readout_heads))
        self.readout = nn.Linear(config.readout_heads, 1, bias=False)
        self.register_buffer("steps", _sinusoids(config.longest, config.dim), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, features: Tensor, places: Tensor, target: Tensor, path: Tensor, present: Tensor | None = None
    ) -> Tensor:
        """Logits of what is looked at first, and after each look: an object, or, last, the end.
        [batch, step + 1, object + 1]

        features [batch, object, feature]; places [batch, object, 2]; target [batch], index of an object; path [batch,
        step], indices of the objects looked at, anything where a path has ended; present [batch, object], False where a
        picture has fewer objects.
        """
        batch, objects, _ = places.shape
        if not 0 <= path.shape[1] < self.config.longest:
            raise ValueError(f"paths are at most {self.config.longest - 1} looks long: got {path.shape[1]}")
        rows = torch.arange(batch, device=places.device)
        present = places.new_ones(batch, objects, dtype=torch.bool) if present is None else present
        path = path.clamp(0, objects - 1)

        seen = torch.cat([features, features[rows, target][:, None]], 1)
        where = torch.cat([places, places[rows, target][:, None]], 1)
        is_target = torch.arange(objects + 1, device=places.device).expand(batch, -1) == objects
        hidden = F.pad(~present, (0, 1))
        memory = self.encoder(self._tokens(seen, where, is_target), src_key_padding_mask=hidden)

        looked = torch.cat([torch.zeros_like(features[:, :1]), features[rows[:, None], path]], 1)
        middle = places.new_tensor([0.5, 0.5]).expand(batch, 1, 2)
        at = torch.cat([middle, places[rows[:, None], path]], 1)
        tokens = self._tokens(looked, at, F.pad(path == target[:, None], (1, 0)))
        tokens = self.dropout(tokens + self.steps[: tokens.shape[1]])
        later = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], places.device, places.dtype)
        state = self.decoder(tokens, memory, tgt_mask=later, tgt_is_causal=True, memory_key_padding_mask=hidden.clone())

        scores = torch.stack(
            [
                look(state) @ thing(memory[:, :objects]).mT / math.sqrt(self.config.dim)
                for thing, look in zip(self.of_object, self.of_look)
            ],
            -1,
        )
        logits = self.readout(scores)[..., 0].masked_fill(~present[:, None], -torch.inf)
        return F.pad(logits, (0, 1))

    def loss(
        self,
        features: Tensor,
        places: Tensor,
        target: Tensor,
        path: Tensor,
        lengths: Tensor,
        present: Tensor | None = None,
    ) -> Tensor:
        """Mean surprise of each look and of the end, nats.

        lengths [batch]: how many looks each row has; those beyond the steps of `path`, and their end, do not count.
        """
        logits = self(features, places, target, path, present)
        step = torch.arange(logits.shape[1], device=path.device)
        labels = F.pad(path, (0, 1), value=-100).where(step < lengths[:, None], logits.shape[-1] - 1)
        labels = labels.masked_fill(step > lengths[:, None], -100)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(
        self,
        features: Tensor,
        places: Tensor,
        target: Tensor,
        present: Tensor | None = None,
        *,
        longest: int = 30,
        greedy: bool = False,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """A scanpath for each row: indices of objects, of at least one look, drawn step by step.

        greedy: the likeliest at each step instead, which the paper calls a single scanpath.
        """
        path = target.new_zeros(len(target), 0)
        ended = target.new_zeros(len(target), dtype=torch.bool)
        paths: list[list[int]] = [[] for _ in target]
        end = places.shape[1]
        for step in range(longest):
            logits = self(features, places, target, path, present)[:, -1]
            if step == 0:
                logits = logits[:, :end]
            drawn = logits.argmax(-1) if greedy else torch.multinomial(logits.softmax(-1), 1, generator=generator)
            chosen = drawn.flatten()
            ended |= chosen == end
            if bool(ended.all()):
                break
            for row in (~ended).nonzero()[:, 0].tolist():
                paths[row].append(int(chosen[row]))
            path = torch.cat([path, chosen[:, None]], 1)
        return paths

    def _tokens(self, features: Tensor, places: Tensor, is_target: Tensor) -> Tensor:
        codes = distance_codes(places, self.config.dim // 12, self.config.sigma)
        return torch.cat([self.appearance(features), codes.flatten(-2), self.kind(is_target.long())], -1)


def distance_codes(places: Tensor, waves: int, sigma: float) -> Tensor:
    """Unit vectors whose products fall as a Gaussian of the distance along each axis. [..., axis, 2 * waves]

    The product of the codes of x and y is exp(-(x - y)^2 / (2 sigma^2)): a Gaussian is the mean of cosines over
    normally distributed frequencies, taken here at the nodes of Gauss and Hermite. Off by less than 0.01 up to about
    sqrt(waves) sigmas; beyond, a code of few waves comes round again.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(waves)
    frequency = torch.as_tensor(nodes / sigma, dtype=places.dtype, device=places.device)
    share = torch.as_tensor(np.sqrt(weights / weights.sum()), dtype=places.dtype, device=places.device)
    angle = places[..., None] * frequency
    return torch.cat([angle.cos() * share, angle.sin() * share], -1)


def object_sequence(path: Scanpath, boxes: NDArray[np.floating], *, within: float) -> list[int]:
    """Which object each fixation is on: the nearest box, where it is not farther than `within` pixels.

    Other fixations are left out. boxes [object, 4]: left, top, right, bottom. ValueError without any.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
        raise ValueError(f"boxes are [object, 4], left, top, right, bottom: got {list(boxes.shape)}")
    x, y = path.places.T[..., None]
    aside = np.maximum(np.maximum(boxes[:, 0] - x, x - boxes[:, 2]), 0)
    above = np.maximum(np.maximum(boxes[:, 1] - y, y - boxes[:, 3]), 0)
    apart = np.hypot(aside, above)
    return apart.argmin(1)[apart.min(1) <= within].tolist()


def padded(paths: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Paths as one tensor, and their lengths. [batch, step], [batch]"""
    lengths = torch.tensor([len(path) for path in paths])
    rows = [torch.tensor(path, dtype=torch.long) for path in paths]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


def _sinusoids(length: int, dim: int) -> Tensor:
    rate = torch.exp(-torch.arange(0, dim, 2) * math.log(10000) / dim)
    angle = torch.arange(length)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
