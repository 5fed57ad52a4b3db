"""A scanpath, and for each fixation what a sentence about it is made from.

Chen, Jiang and Zhao, GazeXplain: Learning to Predict Natural Language Explanations of Visual Scanpaths
(arXiv:2408.02788; ECCV 2024), after the authors' code. An encoder and a decoder predict for several fixations at once a
distribution over cells of the picture, or the end, and a log-normal duration; a text decoder writes a sentence for each
from the feature of its cell and the task; losses make fixations, sentences and features agree in what is like what.

As in the code: the decoder reads the picture without the task, which enters only where the map over cells is made, so
lengths and durations do not depend on it; the decoder's self-attention has positions in its values too; the map is the
weights of one more attention, averaged over heads. Deviations: durations are drawn with the deviation that the
likelihood has (the code takes the variance for it), and given in milliseconds; one rate of dropout; training by reward
is left out, and so is the text decoder: `explain` takes any of transformers with cross-attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.loaders import Scanpath
from ._align import cells as cells_of


@dataclass(frozen=True)
class GazeXplainConfig:
    """Defaults are the authors'."""

    features: int = 2048  # numbers of a cell
    task: int = 768  # numbers of the task; also the width of the text decoder
    dim: int = 512
    rows: int = 24
    columns: int = 32
    fixations: int = 16  # at most
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.1


class Gazed(NamedTuple):
    """What `GazeXplain` says of each fixation.

    log_actions [batch, fixation, cell + 1]: the end first, then the cells by rows; log_mean, log_variance [batch,
    fixation]: of the logarithm of the duration in seconds; memory [batch, cell + 1, dim]: of the end, then the cells.
    """

    log_actions: Tensor
    log_mean: Tensor
    log_variance: Tensor
    memory: Tensor


class Alike(NamedTuple):
    """Cosines of each two fixations of a path. [batch, fixation, fixation]

    reference: of the features given; visual: of what the encoder makes of them; language: of the sentences; cross: of
    the encoder's and the sentences'.
    """

    reference: Tensor
    visual: Tensor
    language: Tensor
    cross: Tensor


class Targets(NamedTuple):
    """Paths as numbers [batch, fixation]: cells, 0 the end and after it; durations in seconds; which actions count,
    the end among them; which are fixations.
    """

    cells: Tensor
    durations: Tensor
    actions: Tensor
    fixations: Tensor


class GazeXplain(nn.Module):
    """Scanpaths over a grid of cells, with what is to be said at each fixation."""

    places: Tensor

    def __init__(self, config: GazeXplainConfig) -> None:
        super().__init__()
        if config.dim % 4 or config.dim % config.heads:
            raise ValueError(f"dim={config.dim} is a multiple of 4, for its places, and of heads={config.heads}")
        self.config = config
        dim, heads, drop = config.dim, config.heads, config.dropout
        self.input = nn.Linear(config.features, dim)
        self.encoder = nn.ModuleList(_Encoding(dim, heads, drop) for _ in range(config.encoder_layers))
        self.encoded = nn.LayerNorm(dim)
        self.of_picture, self.of_task = nn.Linear(dim, dim), nn.Linear(config.task, dim)
        self.joint = nn.Linear(2 * dim, dim)
        self.steps = nn.Embedding(config.fixations, dim)
        self.decoder = nn.ModuleList(_Decoding(dim, heads, drop) for _ in range(config.decoder_layers))
        self.decoded = nn.LayerNorm(dim)
        self.among, self.map = (nn.MultiheadAttention(dim, heads, drop, batch_first=True) for _ in range(2))
        self.among_norm = nn.LayerNorm(dim)
        self.end, self.mean, self.log_variance = (nn.Linear(dim, 1) for _ in range(3))
        self.dropout = nn.Dropout(drop)
        self.termination = nn.Parameter(torch.zeros(dim))
        self.fixation_kind, self.task_kind = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(config.task))
        self.to_words = nn.Linear(dim, config.task)
        self.visual, self.language = nn.Linear(dim, dim), nn.Linear(config.task, dim)
        self.register_buffer("places", grid_places(dim, config.rows, config.columns), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim > 1 and parameter is not self.steps.weight:
                nn.init.xavier_uniform_(parameter)

    def forward(self, features: Tensor, task: Tensor) -> Gazed:
        """features [batch, cell, feature], cells by rows; task [batch, task]."""
        config = self.config
        cells = config.rows * config.columns
        if features.shape[1:] != (cells, config.features) or task.shape[1:] != (config.task,):
            raise ValueError(
                f"features are [batch, {cells}, {config.features}] and the task is [batch, {config.task}]: got "
                f"{list(features.shape)} and {list(task.shape)}"
            )
        state = self.input(features)
        for layer in self.encoder:
            state = layer(state, self.places)
        memory = self.of_picture(self.encoded(state))
        asked = self.of_task(task)[:, None].expand_as(memory)
        joint = self.dropout(F.relu(self.joint(torch.cat([memory, asked], -1))))

        steps = self.steps.weight.expand(len(features), -1, -1)
        token = torch.zeros_like(steps)
        for layer in self.decoder:
            token = layer(token, steps, memory, self.places)
        token = self.dropout(self.decoded(token))
        placed = token + steps
        looking = self.among_norm(token + self.dropout(self.among(placed, placed, placed, need_weights=False)[0]))
        where = self.map(looking + steps, joint + self.places, joint)[1]  # the mean over heads

        end = self.end(token).sigmoid()
        log_actions = (torch.cat([end, (1 - end) * where], -1) + 1e-16).log()
        whole = torch.cat([self.termination.expand(len(memory), 1, -1), memory], 1)
        return Gazed(log_actions, self.mean(token)[..., 0], self.log_variance(token)[..., 0], whole)

    def for_words(self, gazed: Gazed, task: Tensor, cells: Tensor) -> Tensor:
        """What a text decoder's cross-attention is given for each fixation. [batch, fixation, 2, task]

        cells [batch, fixation], 0 the end. The first of two is of the cell, the second of the task.
        """
        of_cell = self.to_words(_picked(gazed.memory, cells) + self.fixation_kind)
        return torch.stack([of_cell, (task + self.task_kind)[:, None].expand_as(of_cell)], 2)

    def alike(self, features: Tensor, gazed: Gazed, cells: Tensor, said: Tensor) -> Alike:
        """How like fixations, and what is said of them, are; for `alignment_loss`.

        said [batch, fixation, task]: the text decoder's last state at the first token of each sentence.
        """
        seen = _picked(F.pad(features, (0, 0, 1, 0)), cells)  # nothing is seen at the end
        visual = F.relu(self.visual(_picked(gazed.memory, cells)))
        language = F.relu(self.language(said))
        seen, visual, language = (x / (x.norm(dim=-1, keepdim=True) + 1e-16) for x in (seen, visual, language))
        return Alike(seen @ seen.mT, visual @ visual.mT, language @ language.mT, visual @ language.mT)

    @torch.no_grad()
    def sample(
        self, features: Tensor, task: Tensor, size: tuple[int, int], *, shortest: int = 1, seed: int = 0
    ) -> list[Scanpath]:
        """A scanpath over each picture, in the middles of cells, with durations in ms.

        size: of the screen in pixels. The end is not drawn before `shortest` fixations. The network is to be in
        evaluation mode; torch's own random state stays as it is.
        """
        config = self.config
        if not 1 <= shortest <= config.fixations:
            raise ValueError(f"shortest={shortest} is from 1 to {config.fixations} fixations")
        gazed = self(features, task)
        generator = torch.Generator().manual_seed(seed)
        chance = gazed.log_actions.softmax(-1).cpu()
        chance[:, :shortest, 0] = 0
        drawn = torch.multinomial(chance.flatten(0, 1), 1, generator=generator).view(chance.shape[:2])
        noise = torch.randn(drawn.shape, generator=generator)
        seconds = (gazed.log_mean.cpu() + (gazed.log_variance.cpu() / 2).exp() * noise).exp()
        paths = []
        for cells, lasting in zip(drawn, seconds):
            ended = (cells == 0).nonzero()
            n = int(ended[0]) if len(ended) else len(cells)
            column, row = (cells[:n] - 1) % config.columns, (cells[:n] - 1).div(config.columns, rounding_mode="floor")
            at = torch.stack([column, row], -1).double() + 0.5
            places = at / torch.tensor([config.columns, config.rows])
            paths.append(Scanpath(places.numpy() * size, size, 1000 * lasting[:n].double().numpy()))
        return paths

    @torch.no_grad()
    def explain(
        self,
        features: Tensor,
        task: Tensor,
        paths: Sequence[Scanpath],
        decoder: Any,
        tokenizer: Any,
        *,
        start: str = "there",
        longest: int = 20,
        beams: int = 3,
    ) -> list[list[str]]:
        """A sentence for each fixation of each path.

        decoder: a language model of transformers with cross-attention, as wide as the task (`BertLMHeadModel`,
        `BlipTextLMHeadModel`), trained beside this one. start: the words that every sentence begins with; theirs is
        the default.
        """
        lengths = [len(path) for path in paths]
        cells = targets(paths, self.config).cells.to(features.device)
        memory = self.for_words(self(features, task), task, cells)
        given = torch.cat([of_path[:n] for of_path, n in zip(memory, lengths)])
        first, last = (
            next(token for token in some if token is not None)
            for some in (
                (tokenizer.bos_token_id, tokenizer.cls_token_id),
                (tokenizer.eos_token_id, tokenizer.sep_token_id),
            )
        )
        ids = tokenizer(start, add_special_tokens=False, return_tensors="pt")["input_ids"].to(features.device)
        ids = F.pad(ids, (1, 0), value=first).expand(len(given), -1)
        said = decoder.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=given,
            encoder_attention_mask=torch.ones(given.shape[:2], device=given.device),
            max_length=longest,
            num_beams=beams,
            do_sample=False,
            use_cache=False,  # that of BERT's decoder does not hold cross-attention's
            eos_token_id=last,
            pad_token_id=tokenizer.pad_token_id,
        )
        sentences = iter(tokenizer.decode(row, skip_special_tokens=True) for row in said)
        return [[next(sentences) for _ in range(n)] for n in lengths]


def targets(paths: Sequence[Scanpath], config: GazeXplainConfig) -> Targets:
    """What the losses compare with. Fixations outside the screen count for the nearest cell.

    Durations of paths that have none are 0, and are not to be learned. ValueError for a path that is too long or empty.
    """
    most = config.fixations
    cells, seconds = torch.zeros(len(paths), most, dtype=torch.long), torch.zeros(len(paths), most)
    lengths = torch.tensor([len(path) for path in paths])
    if bool(((lengths > most) | (lengths < 1)).any()):
        raise ValueError(f"paths are of 1 to {most} fixations: got {lengths.tolist()}; cut them, or allow more")
    for row, path in enumerate(paths):
        at = cells_of(path, config.columns, config.rows)
        cells[row, : len(path)] = torch.from_numpy(at[:, 1] * config.columns + at[:, 0] + 1)
        if path.durations is not None:
            seconds[row, : len(path)] = torch.from_numpy(path.durations / 1000)
    step = torch.arange(most)
    return Targets(cells, seconds, step <= lengths[:, None], step < lengths[:, None])


def action_loss(log_actions: Tensor, cells: Tensor, mask: Tensor) -> Tensor:
    """Mean surprise of where each fixation is, and of the end, nats. mask [batch, fixation]: what counts."""
    chance = log_actions.softmax(-1).gather(-1, cells[..., None])[..., 0]
    return -((chance + 1e-7).log() * mask).sum() / mask.sum()


def duration_loss(log_mean: Tensor, log_variance: Tensor, durations: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log density of durations in seconds under log-normals. mask [batch, fixation]: what counts."""
    log = (durations + 1e-7).log()
    of = log + (math.log(2 * math.pi) + log_variance + (log - log_mean) ** 2 / log_variance.exp()) / 2
    return of[mask.bool()].sum() / mask.sum()


def alignment_loss(alike: Alike, mask: Tensor) -> Tensor:
    """Mean squared difference of each kind of likeness from that of the features. [3]: visual, language, cross

    mask [batch, fixation, fixation]: pairs that count, those of two fixations.
    """
    kinds = torch.stack([alike.visual, alike.language, alike.cross])
    return ((alike.reference - kinds) ** 2 * mask).sum((1, 2, 3)) / mask.sum()


def grid_places(dim: int, rows: int, columns: int) -> Tensor:
    """Sines and cosines of the row, then of the column, the last at 2 pi. [cell, dim]"""
    rate = torch.exp(torch.arange(0, dim // 2, 2) * (-math.log(10000) / (dim // 2)))

    def of(n: int) -> Tensor:
        angle = torch.arange(n)[:, None] / (n - 1 + 1e-6) * 2 * math.pi * rate
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

    row, column = of(rows)[:, None].expand(-1, columns, -1), of(columns).expand(rows, -1, -1)
    return torch.cat([row, column], -1).flatten(0, 1)


class _Encoding(nn.TransformerEncoderLayer):
    """Places are in queries and keys only."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__(dim, heads, dim, dropout, batch_first=True)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        placed = x + places
        x = self.norm1(x + self.dropout1(self.self_attn(placed, placed, x, need_weights=False)[0]))
        return self.norm2(x + self.dropout2(_wide(self, x)))


class _Decoding(nn.TransformerDecoderLayer):
    """Steps are in the values of the self-attention too; places are in keys only."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__(dim, heads, dim, dropout, batch_first=True)

    def forward(self, x: Tensor, steps: Tensor, memory: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        placed = x + steps
        x = self.norm1(x + self.dropout1(self.self_attn(placed, placed, placed, need_weights=False)[0]))
        seen = self.multihead_attn(x + steps, memory + places, memory, need_weights=False)[0]
        x = self.norm2(x + self.dropout2(seen))
        return self.norm3(x + self.dropout3(_wide(self, x)))


def _wide(layer: Any, x: Tensor) -> Tensor:
    return layer.linear2(layer.dropout(F.relu(layer.linear1(x))))


def _picked(rows: Tensor, cells: Tensor) -> Tensor:
    """rows [batch, cell + 1, dim] of cells [batch, fixation]. [batch, fixation, dim]"""
    return rows.gather(1, cells[..., None].expand(-1, -1, rows.shape[-1]))
