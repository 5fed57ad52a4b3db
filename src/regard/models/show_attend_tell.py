"""A captioner that looks at the places of a picture before each word, at all of them softly or at one by draw.

Xu et al., Show, Attend and Tell: Neural Image Caption Generation with Visual Attention (arXiv:1502.03044), sections 3.1
and 4, with the details of the authors' code (arctic-captions, capgen.py): scores of an MLP of place and last state; a
gate of one number on what was seen; an LSTM of the last word and that; a deep output of state, word and place; the
doubly stochastic penalty of the soft way; for the hard way REINFORCE with a moving baseline, an entropy term, and whole
batches that look softly half of the time. As in the code, the sum of REINFORCE is over a batch where the cost of words
is its mean, and its weight is 1/10. The attention of a word is made before the word ahead of it is read.

Deviations: word 0 ends a caption, and is also what is given ahead of the first word, as a vector of zeros that is not
learned. Weights start as PyTorch's layers do. Captions are decoded greedily, where the paper searches with a beam, and
in the hard way from the place with the highest weight, as the code does.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters import register

END = 0  # the word that ends a caption


@dataclass(frozen=True)
class CaptionerConfig:
    """Sizes of a `Captioner`, and which of its ways it goes; the defaults are the authors'."""

    words: int  # in the vocabulary, the end among them
    dim: int = 512  # channels of a place
    hidden: int = 1000
    embedding: int = 512
    width: int | None = None  # of the scores' hidden layer; `dim` unless given
    attention: Literal["soft", "hard"] = "soft"
    activation: Literal["tanh", "relu"] = "tanh"  # of the scores
    gate: Literal["scalar", "vector"] = "scalar"
    deep_output: bool = True  # otherwise words are told from the state alone
    initial: Literal["tanh", "linear"] = "tanh"  # how the first state is made of the mean place
    dropout: float = 0.5
    temperature: float = 1.0  # scores are multiplied by it
    penalty: float = 1.0  # soft: of places that all words together looked at more or less than once
    reinforce: float = 0.1  # hard: weight of the draws' gradient
    entropy: float = 0.002  # hard
    mixing: float = 0.5  # hard: how often a batch looks softly in training


class Caption(NamedTuple):
    """What is said at each word, and from where."""

    logits: Tensor  # [batch, word, vocabulary]
    weights: Tensor  # over places, sums to 1 [batch, word, place]
    looks: Tensor  # what the places were weighted by: the weights, or 1 at one place [batch, word, place]


class Captioner(nn.Module, PyTorchModelHubMixin):
    """Writes about a grid of features, word by word.

    `regard.record` sees one site of cross attention: queries are words, keys are places, and there is one head. It is
    read, not changed. In the hard way the weights are those that places are drawn by.

    >>> import torch
    >>> from regard.models.show_attend_tell import show_attend_tell
    >>> model = show_attend_tell(words=10, dim=8, hidden=16, embedding=8)
    >>> words = torch.tensor([[3, 5, 0]])
    >>> found = model(torch.randn(1, 64, 8), model.given(words))
    >>> found.logits.shape, found.weights.shape
    (torch.Size([1, 3, 10]), torch.Size([1, 3, 64]))
    """

    baseline: Tensor

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.config = c = config
        if c.words < 2 or c.attention not in ("soft", "hard") or c.gate not in ("scalar", "vector"):
            raise ValueError(
                f"CaptionerConfig: words={c.words} is 2 or more, attention={c.attention!r} is soft or hard, "
                f"gate={c.gate!r} is scalar or vector"
            )
        if c.activation not in ("tanh", "relu") or c.initial not in ("tanh", "linear"):
            raise ValueError(
                f"CaptionerConfig: activation={c.activation!r} is tanh or relu, initial={c.initial!r} is tanh or linear"
            )
        width = c.width or c.dim
        self.place, self.state, self.score = nn.Linear(c.dim, width), nn.Linear(c.hidden, width), nn.Linear(width, 1)
        self.embed = nn.Embedding(c.words, c.embedding, padding_idx=END)
        self.lstm = nn.LSTMCell(c.embedding + c.dim, c.hidden)
        self.first_hidden, self.first_cell = nn.Linear(c.dim, c.hidden), nn.Linear(c.dim, c.hidden)
        self.gate = nn.Linear(c.hidden, 1 if c.gate == "scalar" else c.dim)
        if c.deep_output:
            self.told, self.seen = nn.Linear(c.hidden, c.embedding), nn.Linear(c.dim, c.embedding)
        self.word = nn.Linear(c.embedding if c.deep_output else c.hidden, c.words)
        self.register_buffer("baseline", torch.zeros(()))

    @staticmethod
    def given(words: Tensor) -> Tensor:
        """The word ahead of each, 0 ahead of the first. [batch, word]"""
        return F.pad(words[:, :-1], (1, 0), value=END)

    def forward(self, grid: Tensor, given: Tensor, *, generator: torch.Generator | None = None) -> Caption:
        """grid: [batch, place, dim] or a map [batch, dim, row, column]; given: the word ahead of each [batch, word].

        generator: of the hard way's draws in training, else torch's own; what is drawn from otherwise is not drawn
        again under `torch.use_deterministic_algorithms`, and RuntimeError says so.
        """
        grid = self._grid(grid)
        if given.ndim != 2 or len(given) != len(grid) or given.is_floating_point() or not given.shape[1]:
            raise ValueError(
                f"Captioner: words are numbers [batch, word], one or more of {len(grid)} rows; got {given.dtype} "
                f"{list(given.shape)}"
            )
        c, hard = self.config, self.config.attention == "hard"
        if hard and self.training and generator is None and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("Captioner: hard attention draws places; give generator= where runs have to repeat")
        # One coin for the whole batch.
        soft = not hard or (self.training and bool(torch.rand((), generator=generator, device=grid.device) < c.mixing))
        places, state, steps = self.place(grid), self._start(grid), []
        for embedded in self.embed(given).unbind(1):
            weights = self._weights(places, state[0])
            look = weights
            if not soft:
                at = torch.multinomial(weights, 1, generator=generator) if self.training else weights.argmax(-1, True)
                look = torch.zeros_like(weights).scatter(-1, at, 1.0)
            logits, state = self._step(grid, embedded, look.detach() if hard else look, state)
            steps.append((logits, weights, look))
        return Caption(*(torch.stack(part, 1) for part in zip(*steps, strict=True)))

    def loss(
        self,
        grid: Tensor,
        words: Tensor,
        *,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What training lessens: nats of a caption's words, mean over captions, and the terms of its way of looking.

        words: [batch, word], as they are to be said; mask: boolean, the same shape, False after a caption's end. The
        hard way's terms have the gradient of the paper's; their value means nothing. Its baseline moves in training.
        """
        mask = torch.ones_like(words, dtype=torch.bool) if mask is None else mask
        if mask.shape != words.shape or mask.dtype != torch.bool:
            raise ValueError(f"Captioner: a mask is boolean {list(words.shape)}; got {mask.dtype} {list(mask.shape)}")
        found = self(grid, self.given(words), generator=generator)
        cost = F.cross_entropy(found.logits.mT, words, reduction="none") * mask
        total, c = cost.sum(1).mean(), self.config
        if c.attention == "soft":
            return total + c.penalty * doubly_stochastic(found.weights, mask)
        of_caption = cost.detach().mean(1)  # over all steps, those after the end count as 0
        logs = found.weights.clamp_min(1e-30).log()
        draws = ((self.baseline - of_caption)[:, None] * -(found.looks.detach() * logs).sum(-1) * mask).sum()
        spread = ((found.weights * logs).sum(-1) * mask).sum()
        if self.training:
            self.baseline.mul_(0.9).add_(0.1 * of_caption.mean())
        return total + c.reinforce * draws + c.entropy * spread

    @torch.no_grad()
    def generate(self, grid: Tensor, length: int = 20) -> tuple[Tensor, Tensor]:
        """The likeliest words one by one [batch, word], 0 from the end on; weights over places [batch, word, place]."""
        if length < 1:
            raise ValueError(f"Captioner: a caption has one word or more; got length={length}")
        grid = self._grid(grid)
        places, state, steps = self.place(grid), self._start(grid), []
        word = torch.full((len(grid),), END, device=grid.device)
        ended = torch.zeros_like(word, dtype=torch.bool)
        for _ in range(length):
            weights = self._weights(places, state[0])
            hard = self.config.attention == "hard"
            look = F.one_hot(weights.argmax(-1), grid.shape[1]).to(grid) if hard else weights
            logits, state = self._step(grid, self.embed(word), look, state)
            word = logits.argmax(-1).masked_fill(ended, END)
            steps.append((word, weights))
            ended = ended | (word == END)
            if ended.all():
                break
        words, weights = zip(*steps, strict=True)
        return torch.stack(words, 1), torch.stack(weights, 1)

    def _grid(self, grid: Tensor) -> Tensor:
        grid = grid.flatten(2).mT if grid.ndim == 4 else grid
        if grid.ndim != 3 or grid.shape[-1] != self.config.dim:
            raise ValueError(
                f"Captioner: takes [batch, place, {self.config.dim}] or [batch, {self.config.dim}, row, column]; got "
                f"{list(grid.shape)}"
            )
        return grid

    def _start(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        mean = grid.mean(1)
        hidden, cell = self.first_hidden(mean), self.first_cell(mean)
        return (hidden.tanh(), cell.tanh()) if self.config.initial == "tanh" else (hidden, cell)

    def _weights(self, places: Tensor, hidden: Tensor) -> Tensor:
        mixed = places + self.state(hidden)[:, None]
        mixed = mixed.tanh() if self.config.activation == "tanh" else mixed.relu()
        return (self.config.temperature * self.score(mixed)[..., 0]).softmax(-1)

    def _step(
        self, grid: Tensor, embedded: Tensor, look: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Scores of the word, and the new state. look: [batch, place]"""
        seen = self.gate(state[0]).sigmoid() * (look[:, None] @ grid)[:, 0]
        state = cast(tuple[Tensor, Tensor], self.lstm(torch.cat([embedded, seen], -1), state))
        said = F.dropout(state[0], self.config.dropout, self.training)
        if self.config.deep_output:
            said = (embedded + self.told(said) + self.seen(seen)).tanh()
            said = F.dropout(said, self.config.dropout, self.training)
        return self.word(said), state


def _read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Caption) -> tuple[Tensor, Tensor]:
    grid = cast(Captioner, module)._grid(args[0] if args else kwargs["grid"])
    return output.weights[:, None], grid[:, None]


register(Captioner, _read)


def doubly_stochastic(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """How far places are from being looked at once by all words together: squares summed, mean over captions. From 0

    weights: [batch, word, place]; mask: boolean [batch, word], False after the end.

    >>> import torch
    >>> from regard.models.show_attend_tell import doubly_stochastic
    >>> doubly_stochastic(torch.tensor([[[0.25, 0.75]] * 4]))  # (1 - 1) ** 2 + (1 - 3) ** 2
    tensor(4.)
    """
    if mask is not None:
        weights = weights * mask[..., None]
    return (1 - weights.sum(1)).square().sum(-1).mean()


def show_attend_tell(words: int, **sizes: Any) -> Captioner:
    """An untrained `Captioner` of so many words, and of these sizes, the fields of `CaptionerConfig`."""
    return Captioner(CaptionerConfig(words, **sizes))
