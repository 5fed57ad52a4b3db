"""What an agent sees, squeezed through a few learned codes that its goal helps to choose.

Eftekhar et al., Selective Visual Representations Improve Convergence and Generalization for Embodied AI
(arXiv:2311.04193), section 3, with the sizes and details of the authors' code (allenai/procthor-rl): scores of codes
from the relu of one vector of view, goal and last action; softmax, and dropout on the probabilities; their mixture of
codes, brought back to the vector's size, takes its place. All that the policy learns of the world passes there: nothing
is added to it. The most probable `top` alone, hard draws, and codes that are not learned, are the paper's variants.

Deviations: no simulator and no CLIP; the agent takes any map of features, and is trained by what trains it otherwise.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters import register

Index = Literal["softmax", "top", "gumbel"]
Kind = Literal["learned", "random", "binary"]


class Codebook(nn.Module):
    """Replaces vectors by mixtures of codes. [..., size] to the same, and the codes' weights [..., code]

    size: of a vector; codes, dim: how many codes, and their numbers; index: softmax over all, its `top` highest, kept
    as they are, or hard draws by the Gumbel trick; kind: codes that are learned, stay as drawn, or are +1 and -1;
    dropout: of weights, in training. `regard.record` sees steps look at codes, one head; it is read, not changed.

    >>> import torch
    >>> from regard.models.selective_codebook import Codebook
    >>> output, weights = Codebook(20, codes=16, dim=5)(torch.randn(2, 7, 20))
    >>> output.shape, weights.shape
    (torch.Size([2, 7, 20]), torch.Size([2, 7, 16]))
    """

    def __init__(
        self,
        size: int,
        *,
        codes: int = 256,
        dim: int = 10,
        index: Index = "softmax",
        kind: Kind = "learned",
        top: int = 16,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if index not in ("softmax", "top", "gumbel") or kind not in ("learned", "random", "binary"):
            raise ValueError(
                f"Codebook: index is softmax, top or gumbel, kind learned, random or binary; got {index!r}, {kind!r}"
            )
        if index == "top" and not 0 < top <= codes:
            raise ValueError(f"Codebook: keeps 1 to {codes} codes; got top={top}")
        self.index, self.kind, self.top, self.dropout = index, kind, top, dropout
        self.score = nn.Linear(size, codes)
        self.codes = nn.Parameter(torch.randn(codes, dim), requires_grad=kind == "learned")
        self.up = nn.Linear(dim, size)

    def forward(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """embeds: [..., size]"""
        if embeds.shape[-1] != self.score.in_features:
            raise ValueError(f"Codebook: takes [..., {self.score.in_features}]; got {list(embeds.shape)}")
        scores = self.score(embeds.relu())
        weights = F.gumbel_softmax(scores, hard=True) if self.index == "gumbel" else scores.softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        if self.index == "top":
            kept = weights.topk(self.top)
            weights = torch.zeros_like(weights).scatter(-1, kept.indices, kept.values)
        return self.up(weights @ self.book), weights

    @property
    def book(self) -> Tensor:
        """The codes as they are mixed. [code, dim]"""
        return self.codes.sign() if self.kind == "binary" else self.codes


def _read(module: nn.Module, args: Any, kwargs: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    weights = output[1].reshape(-1, 1, *output[1].shape[-2:])
    return weights, cast(Codebook, module).book.expand(len(weights), 1, -1, -1)


register(Codebook, _read)


@dataclass(frozen=True)
class AgentConfig:
    """Sizes of a `GoalAgent`. codes: 0 for an agent without a codebook."""

    channels: int = 2048  # of a map of features
    places: int = 49
    goals: int = 16
    actions: int = 6
    codes: int = 256
    dim: int = 10
    index: Index = "softmax"
    kind: Kind = "learned"
    top: int = 16
    dropout: float = 0.1
    hidden: int = 512  # of the recurrent policy
    wide: int = 128
    narrow: int = 32  # channels of a place, of view, goal and both
    action_dim: int = 6


class Acted(NamedTuple):
    """What an agent would do, and what it was told to see."""

    logits: Tensor  # [batch, step, action]
    values: Tensor  # [batch, step]
    weights: Tensor | None  # of codes [batch, step, code]
    state: Tensor  # to go on from [batch, hidden]


class GoalAgent(nn.Module, PyTorchModelHubMixin):
    """A recurrent policy of view and goal, with a codebook in between or none.

    >>> import torch
    >>> from regard.models.selective_codebook import selective_codebook
    >>> agent = selective_codebook(channels=8, places=4, hidden=16, codes=12)
    >>> view, goal, last = torch.randn(2, 3, 8, 4), torch.tensor([5, 0]), torch.zeros(2, 3).long()
    >>> found = agent(view, goal, last)
    >>> found.logits.shape, found.weights.shape
    (torch.Size([2, 3, 6]), torch.Size([2, 3, 12]))
    """

    def __init__(self, config: AgentConfig) -> None:
        super().__init__()
        self.config = c = config
        self.view = nn.Sequential(nn.Linear(c.channels, c.wide), nn.ReLU(), nn.Linear(c.wide, c.narrow), nn.ReLU())
        self.goal = nn.Embedding(c.goals, c.narrow)
        self.both = nn.Sequential(nn.Linear(2 * c.narrow, c.wide), nn.ReLU(), nn.Linear(c.wide, c.narrow))
        self.last = nn.Embedding(c.actions + 1, c.action_dim)
        size = c.narrow * c.places + c.action_dim
        knobs = {"codes": c.codes, "dim": c.dim, "index": c.index, "kind": c.kind, "top": c.top, "dropout": c.dropout}
        self.codebook = Codebook(size, **knobs) if c.codes else None
        self.gru = nn.GRUCell(size, c.hidden)
        self.policy, self.value = nn.Linear(c.hidden, c.actions), nn.Linear(c.hidden, 1)

    def forward(
        self,
        view: Tensor,
        goal: Tensor,
        last: Tensor,
        state: Tensor | None = None,
        *,
        starts: Tensor | None = None,
    ) -> Acted:
        """view: [batch, step, channel, place]; goal: its number [batch] or [batch, step]; last: the action before, 0
        for none, actions from 1 [batch, step]; starts: boolean [batch, step], where the state is
        forgotten ahead of a step.
        """
        c = self.config
        if view.ndim != 4 or view.shape[2:] != (c.channels, c.places) or not view.shape[1]:
            raise ValueError(
                f"GoalAgent: views are [batch, step, {c.channels}, {c.places}], of one step or more; got "
                f"{list(view.shape)}"
            )
        embeds, weights = self.embed(view, goal, last), None
        if self.codebook is not None:
            embeds, weights = self.codebook(embeds)
        state = view.new_zeros(len(view), c.hidden) if state is None else state
        states = []
        for step in range(view.shape[1]):
            if starts is not None:
                state = state * ~starts[:, step, None]
            state = cast(Tensor, self.gru(embeds[:, step], state))
            states.append(state)
        every = torch.stack(states, 1)
        return Acted(self.policy(every), self.value(every)[..., 0], weights, cast(Tensor, state))

    def embed(self, view: Tensor, goal: Tensor, last: Tensor) -> Tensor:
        """The vector of view, goal and last action, as the codebook is given it. [batch, step, size]"""
        seen = self.view(view.mT)  # [batch, step, place, channel]
        goal = goal[:, None].expand(view.shape[:2]) if goal.ndim == 1 else goal
        both = self.both(torch.cat([seen, self.goal(goal)[:, :, None].expand_as(seen)], -1))
        return torch.cat([both.mT.flatten(2), self.last(last)], -1)


def selective_codebook(**sizes: Any) -> GoalAgent:
    """An untrained `GoalAgent` of these sizes, the fields of `AgentConfig`."""
    return GoalAgent(AgentConfig(**sizes))
