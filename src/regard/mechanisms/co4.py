"""Queries, keys and values that modulate each other before a small attention, around one latent token.

Adeel, Beyond Attention: Toward Machines with Intrinsic Higher Mental States (arXiv:2505.06257), the form for pictures,
as in ARIA-Funded-TREND/HMS; the forms for reinforcement learning and language differ and are not covered. With the
first token the latent one, l, and the others patches, each channel by itself:

    query_i = q_l k_i + q_i     key_i = k_l q_i + k_i     value_i = v_i^2 + 2 v_i + q_l k_l (1 + |v_l|)

The largest `top` of each, of each channel separately, go with the latent's own into softmax attention, whose rows are
thus no tokens; what it gives is added where the values came from. The latent becomes the first row. There is no output
projection. Mixing is linear in the number of patches; projections are what attention has, too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ._layers import exchanged
from ._mechanism import Cost


class TriadicModulation(nn.Module):
    """The layer: [batch, token, dim] to the same, the first token the latent one.

    top: how many of the patches' queries, keys and values enter attention, of each channel.

    >>> TriadicModulation(32)(torch.randn(2, 50, 32)).shape
    torch.Size([2, 50, 32])
    """

    def __init__(self, dim: int, *, top: int = 12, qkv_bias: bool = True) -> None:
        super().__init__()
        if top < 1:
            raise ValueError(f"co4: 1 patch or more enters attention; got {top=}")
        self.top, self.qkv = top, nn.Linear(dim, 3 * dim, bias=qkv_bias)

    def modulated(self, hidden: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """Query, key and value of the latent token [batch, 1, dim], and the modulated ones [batch, patch, dim]."""
        query, key, value = self.qkv(hidden).chunk(3, -1)
        (of_query, query), (of_key, key), (of_value, value) = ((t[:, :1], t[:, 1:]) for t in (query, key, value))
        context = of_query * of_key * (1 + of_value.abs())
        modulated = of_query * key + query, of_key * query + key, value.square() + 2 * value + context
        return (of_query, of_key, of_value), modulated

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.ndim != 3 or hidden.shape[1] <= self.top:
            raise ValueError(
                f"co4: takes [batch, token, dim], a latent token and {self.top} patches or more; got "
                f"{list(hidden.shape)}: lower top"
            )
        latent, modulated = self.modulated(hidden)
        chosen = [t.topk(self.top, dim=1) for t in modulated]
        query, key, value = (torch.cat([own, of.values], 1) for own, of in zip(latent, chosen))
        given = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value
        patches = modulated[2].scatter_add(1, chosen[2].indices, given[:, 1:])
        return torch.cat([given[:, :1], patches], 1)


def co4(model: nn.Module, *, top: int = 12, projection: str | None = None) -> Callable[[], None]:
    """Put `TriadicModulation` with new weights in place of every attention of a model; gives what undoes it.

    The model's first token, such as a class token, is the latent one. It has to be trained. projection: name of the
    output projection, where it is none of the usual ones. Raises ValueError where no attention module is found, or one
    is causal.

        undo = co4(model)
    """

    def made(attention: nn.Module, dim: int) -> nn.Module:
        if getattr(attention, "is_causal", False):
            raise ValueError(f"co4: {type(attention).__name__} is causal, and the largest over all tokens are not")
        return TriadicModulation(dim, top=top)

    return exchanged(model, made, projection, "co4")


def cost(n: int, dim: int, *, top: int = 12) -> Cost:
    """Of one layer over `n` tokens: projections, and attention of the few."""
    return Cost(6 * n * dim * dim + 4 * (1 + top) ** 2 * dim, 8 * n * dim)
