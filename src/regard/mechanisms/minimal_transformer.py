"""Attention with fewer matrices, and layers without an MLP.

Bermeitinger et al., Reducing the Transformer Architecture to a Minimum (arXiv:2410.13732), sections 3 to 5. Of one
head, scores x W_Q W_K^T x^T need one matrix only ("one"), and a value and output projection can be left out: every
output is then a mean of inputs. With W_K = W_Q ("symmetric") scores are symmetric before the softmax and no token's own
is below 0; "cholesky" has them from a lower triangle, x T T^T x^T, half the weights, of one head. The paper tries each
alone and together, of 1 or 4 heads, with and without the MLP.

Biases are kept, as in the models whose sizes the paper prints: `parameters` gives its 287,686 and 101,470 exactly. The
paper's product of value and output matrices across layers is theory, and is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ._layers import attentions, projections, replace
from ._mechanism import Cost, pairs, softmax, visible
from ._modules import module

QUERY_KEY = ("separate", "one", "symmetric", "cholesky")


@module("causal", "full", build=lambda dim, heads: MinimalAttention(dim, heads, query_key="symmetric"), mask="pairs")
class MinimalAttention(nn.Module):
    """Self-attention: [batch, token, dim] to the same.

    query_key: which of W_Q and W_K there are, see above; value_output: whether there are W_V and W_O. Scores are
    divided by the square root of a head's channels. Raises ValueError where several heads make no sense: for "one" and
    "cholesky", which would have more weights then, and without value_output.

    >>> MinimalAttention(16, query_key="one", value_output=False)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    def __init__(
        self, dim: int, heads: int = 1, *, query_key: str = "separate", value_output: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        _check(dim, heads, query_key, value_output)
        self.heads, self.query_key = heads, query_key
        self.q_proj = None if query_key == "cholesky" else nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias) if query_key == "separate" else None
        self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) if value_output else None for _ in range(2))
        self.triangle = nn.Parameter(torch.randn(dim * (dim + 1) // 2) * dim**-0.5) if query_key == "cholesky" else None

    def _apart(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def query_and_key(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, head, token, dim] each."""
        if self.triangle is not None:
            dim = hidden.shape[-1]
            rows, columns = torch.tril_indices(dim, dim, device=hidden.device)
            query = hidden @ hidden.new_zeros(dim, dim).index_put((rows, columns), self.triangle)
            return self._apart(query), self._apart(query)
        assert self.q_proj is not None
        query = self._apart(self.q_proj(hidden))
        key = query if self.query_key == "symmetric" else hidden if self.k_proj is None else self.k_proj(hidden)
        return query, key if self.query_key == "symmetric" else self._apart(key)

    def forward(self, hidden: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        """mask: boolean, broadcasts to [batch, head, query, key]; True: visible."""
        query, key = self.query_and_key(hidden)
        value = self._apart(hidden if self.v_proj is None else self.v_proj(hidden))
        seen = visible(query, key, causal=causal, mask=mask)
        weights = softmax(query @ key.mT * query.shape[-1] ** -0.5, seen)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        return mixed if self.o_proj is None else self.o_proj(mixed)


def parameters(
    dim: int,
    *,
    heads: int = 1,
    query_key: str = "separate",
    value_output: bool = True,
    hidden: int | None = None,
    layers: int = 1,
    norms: int = 2,
    bias: bool = True,
) -> int:
    """How many weights the layers have: attention, an MLP of this width (None: none), and that many LayerNorms each."""
    _check(dim, heads, query_key, value_output)
    matrices = {"separate": 2, "one": 1, "symmetric": 1, "cholesky": 0}[query_key] + 2 * value_output
    attention = matrices * (dim * dim + bias * dim) + (query_key == "cholesky") * dim * (dim + 1) // 2
    mlp = 0 if hidden is None else 2 * dim * hidden + bias * (dim + hidden)
    return layers * (attention + mlp + norms * 2 * dim)


def cost(n: int, dim: int, *, query_key: str = "separate", value_output: bool = True, causal: bool = False) -> Cost:
    """Of one layer's attention, all heads, with its projections."""
    matrices = {"separate": 2, "one": 1, "symmetric": 1, "cholesky": 1}[query_key] + 2 * value_output
    return Cost(2 * n * dim**2 * matrices + 4 * dim * pairs(n, n, causal), 2 * n * dim + matrices * dim**2)


class Nothing(nn.Module):
    """In the place of an MLP: adds nothing to the residual stream."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


def minimal_transformer(model: nn.Module, *, mlp: bool = False, symmetric: bool = True) -> Callable[[], None]:
    """Leave the MLPs of a model out, and let keys be made by the query projection; gives the function that undoes it.

    mlp: whether they stay. symmetric: whether W_K becomes W_Q, one matrix that is trained for both. The paper trains
    such models from the start; a trained one has to be trained on. Raises ValueError where a model has no modules of
    the name mlp (they have to add to the residual stream), no attention with separate projections, or fewer key heads.

        undo = minimal_transformer(model)
        undo()
    """
    if mlp and not symmetric:
        raise ValueError("minimal_transformer: nothing is left out with mlp=True and symmetric=False")
    made: dict[str, nn.Module] = {}
    if not mlp:
        found = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == "mlp"}
        made |= {name: Nothing() for name, module in found.items() if not isinstance(module, Nothing)}
        if not made:
            raise ValueError(f"minimal_transformer: {type(model).__name__} has no MLPs, modules of the name mlp")
    if symmetric:
        for name, (attention, _) in attentions(model, None, "minimal_transformer").items():
            if isinstance(attention, nn.MultiheadAttention):
                continue  # models pool with it
            query, key, _, _ = projections(attention, "minimal_transformer")
            if query is key:
                raise ValueError(f"minimal_transformer: {name} is symmetric already; undo that first")
            if query.weight.shape != key.weight.shape or (query.bias is None) != (key.bias is None):
                raise ValueError(
                    f"minimal_transformer: {name} has {key.out_features} channels of keys and {query.out_features} of "
                    f"queries, which one matrix cannot make; use symmetric=False"
                )
            at = next(of for of, module in attention.named_children() if module is key)
            made[f"{name}.{at}"] = query
    return replace(model, made)


convert = minimal_transformer


def _check(dim: int, heads: int, query_key: str, value_output: bool) -> None:
    if query_key not in QUERY_KEY:
        raise ValueError(f"minimal_transformer: query_key is one of {QUERY_KEY}; got {query_key!r}")
    if heads < 1 or dim % heads:
        raise ValueError(f"minimal_transformer: {heads} heads do not share {dim} channels evenly")
    if heads > 1 and (query_key in ("one", "cholesky") or not value_output):
        raise ValueError(
            f"minimal_transformer: {query_key=} and {value_output=} are for one head; of {heads} heads, use 'separate' "
            f"or 'symmetric' with value_output=True"
        )
