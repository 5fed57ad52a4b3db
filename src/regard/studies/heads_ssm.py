"""How many factorised heads a linear state space needs, and how gradients travel in both.

Ghodsi, How Many Heads Make an SSM? A Unified Framework for Attention and State Space Models (arXiv:2512.15115). A
sequence map is y_i = sum over j of W_ij(x) x_j, with an operator W_ij [out, dim] for each pair. H heads give
W_ij = sum over h of f_h(i, j; x) V_h: operators in a span of H. A linear state space gives C A^(i-j) B, whose span has
as many dimensions as distinct eigenvalues that B reaches and C sees (the degree of that part of A's minimal
polynomial), and no more than tokens, states or entries. So many heads it needs, and with fewer the best is a truncated
singular value decomposition. Gradients of a stable state space fade with distance; there are inputs at which
attention's do not.

Coefficients f_h are any numbers. Softmax weights are none of the kind: they are nonnegative, and as rows sum to 1 so do
all operators of a row to the sum of V_h, which a state space does not obey. A key of value 0 takes up what is left.
The paper's text was not at hand: the statements are those of its abstract and of published summaries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ENTRIES = 2**27  # of all operators of a sequence, 1 GB in double precision


class Heads(NamedTuple):
    """Heads that come nearest to a map whose operators depend on the lag alone."""

    coefficients: Tensor  # [lag, head]
    maps: Tensor  # [head, out, dim], value and output projection in one
    error: float  # share of the operators' squares that is left, 0 to 1

    def operators(self) -> Tensor:
        """[lag, out, dim]"""
        return torch.einsum("lh,hod->lod", self.coefficients, self.maps)


def heads_ssm(operators: Tensor, heads: int) -> Heads:
    """The best `heads` heads for operators [lag, out, dim], by their singular values; exact from their rank on.

    >>> import torch
    >>> ssm = lag_operators(torch.diag(torch.tensor([0.5, 0.25])), torch.eye(2), torch.eye(2), 2)
    >>> [round(abs(heads_ssm(ssm, heads).error), 4) for heads in (1, 2)]
    [0.0118, 0.0]
    """
    if operators.ndim != 3 or heads < 1:
        raise ValueError(f"operators are [lag, out, dim], heads 1 or more; got {list(operators.shape)} and {heads}")
    left, values, right = torch.linalg.svd(operators.double().flatten(1), full_matrices=False)
    squares = values.square()
    coefficients = left[:, :heads] * values[:heads]
    maps = right[:heads].unflatten(1, operators.shape[1:])
    return Heads(coefficients, maps, float(squares[heads:].sum() / squares.sum()))


def lag_operators(a: Tensor, b: Tensor, c: Tensor, tokens: int) -> Tensor:
    """C A^lag B, of h_i = A h_(i-1) + B x_i and y_i = C h_i. [lag, out, dim]

    a [state, state], b [state, dim], c [out, state].
    """
    held, found = b, []
    for _ in range(tokens):
        found.append(c @ held)
        held = a @ held
    return torch.stack(found)


def interaction_rank(operators: Tensor, *, tolerance: float = 1e-9) -> int:
    """Dimensions that operators [..., out, dim] span: their singular values from `tolerance` of the largest on."""
    return int(torch.linalg.matrix_rank(operators.double().reshape(-1, operators.shape[-2:].numel()), rtol=tolerance))


def interaction(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Operators of a sequence map at x [token, dim]: derivatives of each output by each input. [query, key, out, dim]

    function: [token, dim] to [token, out]. For a map that mixes with given weights, such as a state space, or
    `attention` with `weights_of`, the output is their sum over keys of operator times input; else the derivative of the
    weights counts too. ValueError where there are more than 2^27 entries.
    """
    out = function(x).shape[-1]
    if (entries := x.shape[0] ** 2 * out * x.shape[1]) > ENTRIES:
        raise ValueError(f"operators of {len(x)} tokens have {entries} numbers, {ENTRIES} at most: take fewer tokens")
    return torch.func.jacrev(function)(x).permute(0, 2, 1, 3)


def gradient_norms(function: Callable[[Tensor], Tensor], x: Tensor, query: int) -> Tensor:
    """Spectral norms of the derivative of one output by each input, up to it, by distance. [distance]

    function: [token, dim] to [token, out]; x [token, dim]. The first is by the query's own input.
    """
    found = torch.func.jacrev(lambda x: function(x)[query])(x)  # [out, token, dim]
    return torch.linalg.matrix_norm(found.transpose(0, 1), 2)[: query % len(x) + 1].flip(0)


def state_space(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The scan of x [token, dim] by A [state, state], B [state, dim] and C [out, state]. [token, out]"""
    held, found = x.new_zeros(a.shape[0]), []
    for token in x:
        held = a @ held + b @ token
        found.append(c @ held)
    return torch.stack(found)


def attention(x: Tensor, query: Tensor, key: Tensor, value: Tensor, *, weights_of: Tensor | None = None) -> Tensor:
    """Causal softmax heads of x [token, dim]. [token, out]

    query and key are maps [head, inner, dim], value is one [head, out, dim]. Scores are products over the root of
    inner. weights_of: what the weights are made of, where these are to be held fixed while x changes.
    """
    of = x if weights_of is None else weights_of
    scores = torch.einsum("hkd,id,hke,je->hij", query, of, key, of) / query.shape[1] ** 0.5
    later = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
    return torch.einsum("hij,hod,jd->io", scores.masked_fill(later, -torch.inf).softmax(-1), value, x)


def softmax_coefficients(scores: Tensor, *, sink: bool) -> Tensor:
    """Causal softmax weights of heads whose scores [head, lag] are by lag. [head, query, key]

    Rows sum to 1, or with a sink, a key of score 0 and value 0 besides, to less.
    """
    place = torch.arange(scores.shape[1], device=scores.device)
    lag = place[:, None] - place
    every = scores[:, lag.clamp(min=0)].masked_fill(lag < 0, -torch.inf)
    if sink:
        return F.pad(every, (1, 0)).softmax(-1)[..., 1:]
    return every.softmax(-1)
