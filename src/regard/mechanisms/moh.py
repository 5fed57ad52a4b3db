"""Heads as experts: some always count, and a router picks others for each token.

Jin et al., MoH: Multi-Head Attention as Mixture-of-Head Attention (arXiv:2410.11842), section 3, and the part on how
LLaMA3 is trained on. The output is the sum of the heads' outputs, each through its part of the output projection,
weighted by gates; those of routed heads that were not picked are 0. Scales are those of the authors' code, where gates
are 1 on average: with W the routers, S shared heads, E routed ones and k of these picked for each token,

    stage = 2 softmax(W_h hidden), two numbers
    gate of a shared head = stage_1 S softmax(W_s hidden)
    gate of a picked head = stage_2 k softmax(W_r hidden), made to sum to k over the picked ones

That is router="learned". A trained model would lose what it knows, so the authors convert one with router="norms",
which has no weights: routed heads are scored by the norm of their query over its deviation between heads, shared and
picked heads count 1, and gradients reach the scores as if gates were scores (straight through). The first heads of each
layer are the shared ones.

Deviations: all heads are computed, and those not picked are then left out, as in the authors' code, so that no time is
saved. Of the conversion only the code for inference was published; that gradients also reach the scores of heads that
were not picked is our reading.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._layers import attentions, channels, replace
from ._mechanism import Cost, pairs
from ._modules import converted, module

ROUTERS = ("norms", "learned")
_QUERIES = ("q_proj", "query", "q_lin")


@module(
    "causal",
    "full",
    build=lambda dim, heads, causal: converted(moh, dim, heads, causal=causal, router="learned"),
    loss=lambda layer: 0.01 * balance(layer),  # the paper's weight
)
class MixtureOfHeads(nn.Module):
    """An attention module whose heads are weighted for each token; takes and gives what that module does.

    projection, query: names of the output and query projections inside `attention`; the latter where norms route.
    dim: channels of the layer's input; heads, shared, routed: how many there are, always count, and are picked.
    """

    def __init__(
        self, attention: nn.Module, projection: str, query: str | None, dim: int, heads: int, shared: int, routed: int
    ) -> None:
        super().__init__()
        weight = next(attention.parameters())
        self.attention, self.projection, self.query = attention, projection, query
        self.heads, self.shared, self.routed = heads, shared, routed
        self.load: Tensor | None = None  # of the last forward pass: share of tokens that each routed head was picked by
        self.score: Tensor | None = None  # and its mean score, with gradient
        if query is None:
            self.route = _router(dim, heads - shared, weight)
            if shared:
                self.share, self.stage = _router(dim, shared, weight), _router(dim, 2, weight)

    def gates(self, hidden: Tensor, query: Tensor | None) -> Tensor:
        """The weight of each head. [batch, token, head]"""
        if query is None:
            scores = self.route(hidden).softmax(-1)
        else:
            norms = query.unflatten(-1, (self.heads, -1))[..., self.shared :, :].norm(dim=-1)
            deviation = (norms.var(-1, keepdim=True) + torch.finfo(norms.dtype).eps ** 2).sqrt()  # 0 has no gradient
            scores = (norms / deviation).softmax(-1)
        picked = torch.zeros_like(scores).scatter(-1, scores.topk(self.routed, dim=-1).indices, 1.0)
        self.load, self.score = picked.flatten(0, -2).mean(0), scores.flatten(0, -2).mean(0)
        if query is not None:
            ones = picked.new_ones(*picked.shape[:-1], self.shared)
            return torch.cat([ones, picked + (scores - scores.detach())], -1)
        gates = scores * picked
        gates = self.routed * gates / gates.sum(-1, keepdim=True)
        if not self.shared:
            return gates
        first, second = (2 * self.stage(hidden).softmax(-1)).split(1, dim=-1)
        return torch.cat([first * self.shared * self.share(hidden).softmax(-1), second * gates], -1)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen: list[Tensor] = []

        def weigh(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            gates = self.gates(hidden_states, seen[0] if seen else None)
            return ((given[0].unflatten(-1, (self.heads, -1)) * gates[..., None]).flatten(-2), *given[1:])

        def see(_: nn.Module, __: Any, output: Tensor) -> None:
            seen.append(output)

        handles = [self.attention.get_submodule(self.projection).register_forward_pre_hook(weigh)]
        if self.query is not None:
            query = self.attention.get_submodule(self.query)
            handles.append(query.register_forward_hook(see))
        try:
            return self.attention(hidden_states, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


def _router(dim: int, size: int, like: Tensor) -> nn.Linear:
    router = nn.Linear(dim, size, bias=False, device=like.device, dtype=like.dtype)
    nn.init.normal_(router.weight, std=0.02)  # as the authors' vision models: gates of about 1
    return router


def moh(
    model: nn.Module,
    *,
    active: float = 0.75,
    shared: float = 0.5,
    router: str = "norms",
    projection: str | None = None,
) -> Callable[[], None]:
    """Make every attention of a model a mixture of its heads, to be trained on; gives the function that undoes it.

    active: share of the heads that count for a token; shared: share that counts for every one, the first heads.
    router: "norms" for a trained model, or "learned", new weights. projection: name of the output projection, where it
    is none of the usual ones. Add a hundredth of `balance(model)` to the loss, the paper's weight. Raises ValueError
    where no attention module is found, or its heads cannot be shared out so.

        undo = moh(model)
        loss = model(**inputs, labels=labels).loss + 0.01 * balance(model)
        undo()
    """
    if router not in ROUTERS:
        raise ValueError(f"moh: router is one of {ROUTERS}; got {router!r}")
    if already := [name for name, module in model.named_modules() if isinstance(module, MixtureOfHeads)]:
        raise ValueError(f"moh: {already[0]} is a mixture already; undo that first")
    mixtures = {}
    for name, (attention, output) in attentions(model, projection, "moh").items():
        dim, mixed = channels(attention.get_submodule(output))
        width = getattr(attention, "head_dim", None)
        if width is None:
            raise ValueError(f"moh: {name} does not say its head_dim")
        query = next((q for q in _QUERIES if isinstance(getattr(attention, q, None), nn.Module)), None)
        if router == "norms" and query is None:
            raise ValueError(f"moh: {name} has no projection called {' or '.join(_QUERIES)}; use router='learned'")
        heads = mixed // width
        always, counted = round(shared * heads), round(active * heads)
        if not 0 <= always < counted <= heads or heads - always < 2:
            raise ValueError(
                f"moh: of {heads} heads {always} are shared and {counted} count; there have to be fewer shared ones, "
                f"and 2 or more others to pick from; got {active=}, {shared=}"
            )
        of_router = query if router == "norms" else None
        mixtures[name] = MixtureOfHeads(attention, output, of_router, dim, heads, always, counted - always)
    return replace(model, mixtures)


convert = moh


def balance(model: nn.Module) -> Tensor:
    """Load-balance loss of the last forward pass, mean over layers: least, k, where all are picked alike. []

    Of each layer, E times the sum over routed heads of the share of tokens that picked it and its mean score, all
    tokens counting, padding among them.
    """
    mixtures = [m for m in model.modules() if isinstance(m, MixtureOfHeads)]
    found = [len(m.load) * (m.load * m.score).sum() for m in mixtures if m.load is not None and m.score is not None]
    if not found or len(found) < len(mixtures):
        raise ValueError("moh.balance: the model has no mixtures of heads that have run; call moh(model) and the model")
    return torch.stack(found).mean()


def cost(n_query: int, n_key: int, dim: int, *, heads: int, active: float = 0.75, causal: bool = False) -> Cost:
    """Of one layer, attention of the heads that count. What runs here computes all: this is the paper's bound."""
    counted = round(active * heads)
    return Cost(4 * dim * counted * pairs(n_query, n_key, causal), 2 * dim * (counted * n_query + heads * n_key))
