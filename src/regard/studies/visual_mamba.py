"""A selective state space as a matrix that mixes tokens, its ranks beside attention's, and a score for maps.

RNN as Linear Transformer: A Closer Investigation into Representational Potentials of Visual Mamba Models
(arXiv:2511.18380). Softmax attention, linear attention and Mamba are each a product of a matrix [query, key] with the
tokens. Off its diagonal, a block of linear attention's with N features has a rank of at most N, and so has a block of
Mamba's with a state of N, for each head of Mamba-2 and each channel of Mamba-1; softmax has no such bound. At the same
N what Mamba adds is a learned decay along the order in which it scans.

The authors' code trains models and has neither the ranks nor the score of maps; its binary segmentation score could not
be looked up. `map_score` is ours. The matrix of an attention call is `call.weights.dense()`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

_ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh}
_RATE = 0.03  # of Adam, to 0 along a cosine


class Mixing(NamedTuple):
    """What a mixer does to a sequence."""

    matrix: Tensor  # [batch, head, query, key]; of Mamba-1 a head is a channel
    output: Tensor  # [batch, token, dim], the mixer's own, made with that matrix


def visual_mamba(mixer: nn.Module, hidden: Tensor) -> Mixing:
    """The matrix with which a mixer of transformers' Mamba or Mamba-2 mixes the tokens of hidden [batch, token, dim].

    matrix[i, j] = C_i . (B_j dt_j exp(A (dt_(j+1) + .. + dt_i))) for j <= i, and D more on the diagonal. It acts on
    what the causal convolution before it gives, not on `hidden`; a gate, a norm and a projection come after.
    Differentiable; takes memory for all of its entries. TypeError for other mixers, whose norms or gates differ.

    >>> import torch, transformers
    >>> model = transformers.MambaModel(transformers.MambaConfig(hidden_size=4, num_hidden_layers=1, vocab_size=9))
    >>> visual_mamba(model.layers[0].mixer, torch.randn(2, 5, 4)).matrix.shape  # 8 channels
    torch.Size([2, 8, 5, 5])
    """
    made = _MIXERS.get(type(mixer).__name__)
    if made is None:
        raise TypeError(f"a mixer is one of {', '.join(_MIXERS)} of transformers, got {type(mixer).__name__}")
    if hidden.ndim != 3:
        raise ValueError(f"hidden is [batch, token, dim], got {list(hidden.shape)}")
    return made(mixer, hidden)


def _mamba(mixer: Any, hidden: Tensor) -> Mixing:
    value, gate = mixer.in_proj(hidden).chunk(2, -1)
    value = _convolved(mixer, value)
    state = mixer.A_log.shape[1]
    step, b, c = mixer.x_proj(value).split([mixer.dt_proj.in_features, state, state], -1)
    step = F.softplus(mixer.dt_proj(step)).mT  # [batch, channel, token]
    log_decay = -mixer.A_log.exp()
    matrix = torch.diag_embed(mixer.D[:, None].expand(-1, hidden.shape[1]))
    for n in range(state):  # all states at once would take as many times the memory
        reach = _decays(log_decay[:, n, None] * step)
        matrix = matrix + c[:, None, :, n, None] * (b[..., n][:, None] * step)[:, :, None] * reach
    mixed = torch.einsum("bcij,bjc->bic", matrix, value)
    return Mixing(matrix, mixer.out_proj(mixed * F.silu(gate)))


def _mamba2(mixer: Any, hidden: Tensor) -> Mixing:
    heads, groups, state = len(mixer.A_log), mixer.n_groups, mixer.ssm_state_size
    inner = mixer.out_proj.in_features
    gate, value, step = mixer.in_proj(hidden).split([inner, inner + 2 * groups * state, heads], -1)
    value, *parts = _convolved(mixer, value).split([inner, groups * state, groups * state], -1)
    b, c = (part.unflatten(-1, (groups, state)).repeat_interleave(heads // groups, 2) for part in parts)
    step = F.softplus(step + mixer.dt_bias).clamp(*mixer.time_step_limit).mT  # [batch, head, token]
    reach = _decays(-mixer.A_log.exp()[:, None] * step)
    matrix = torch.einsum("bihn,bjhn->bhij", c, b) * step[:, :, None] * reach
    matrix = matrix + torch.diag_embed(mixer.D[:, None].expand(-1, hidden.shape[1]))
    mixed = torch.einsum("bhij,bjhd->bihd", matrix, value.unflatten(-1, (heads, -1))).flatten(2)
    return Mixing(matrix, mixer.out_proj(mixer.norm(mixed, gate)))


_MIXERS = {"MambaMixer": _mamba, "Mamba2Mixer": _mamba2}


def _convolved(mixer: Any, value: Tensor) -> Tensor:
    """Along tokens, each with those before it; [batch, token, channel]"""
    if mixer.activation not in _ACTIVATIONS:
        raise ValueError(f"the mixer's activation is one of {', '.join(_ACTIVATIONS)}, got {mixer.activation!r}")
    return _ACTIVATIONS[mixer.activation](mixer.conv1d(value.mT)[..., : value.shape[1]]).mT


def _decays(log_decay: Tensor) -> Tensor:
    """exp of the sum from j + 1 to i, 0 above the diagonal; [..., token] to [..., query, key]."""
    total = log_decay.cumsum(-1)
    after = torch.ones(2 * total.shape[-1:], dtype=torch.bool, device=total.device).triu(1)
    return (total[..., None] - total[..., None, :]).masked_fill(after, -torch.inf).exp()


def block_ranks(matrix: Tensor, block: int, *, tolerance: float = 1e-4) -> Tensor:
    """Rank of each block of `block` queries and keys. [..., block of queries, block of keys]

    matrix [..., query, key], both a multiple of `block`. Singular values count from `tolerance` of the block's largest.

    >>> import torch
    >>> block_ranks(torch.ones(4, 4).tril(), 2)
    tensor([[2, 0],
            [1, 2]])
    """
    if block < 1 or any(n % block for n in matrix.shape[-2:]):
        raise ValueError(f"a matrix of {list(matrix.shape[-2:])} is not made of blocks of {block}")
    blocks = matrix.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).transpose(-2, -3)
    return torch.linalg.matrix_rank(blocks.double(), rtol=tolerance)


def approximation_error(
    matrix: Tensor,
    *,
    state: int,
    decay: bool,
    both_ways: bool = False,
    steps: int = 1500,
    restarts: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Share of the squares of a matrix that the best recurrence leaves, 0 to 1; lower is nearer. [restart, ...]

    matrix [..., token, token]. The recurrence is C_i . B_j for j <= i, with `state` features: causal linear attention;
    with `decay` times a learned factor between 0 and 1 for each token from j + 1 to i: Mamba-2. both_ways adds another
    that scans from the last token, as vision models do; without it matrix has to be causal. C, B and decays are found
    by gradient descent (Adam) from several starts; how near these end says whether they found the best.
    """
    tokens = matrix.shape[-1]
    if matrix.shape[-2] != tokens or state < 1:
        raise ValueError(f"a square matrix and a state of 1 or more, got {list(matrix.shape[-2:])} and {state}")
    if not both_ways and matrix.triu(1).any():
        raise ValueError("a matrix with weights above its diagonal is not causal: both_ways=True scans from both ends")
    flat = matrix.detach().float().reshape(-1, tokens, tokens)
    size = flat.square().sum((1, 2))
    shape = (restarts, len(flat), 1 + both_ways, tokens)
    scale = (flat.square().mean((1, 2)).sqrt() / state**0.5).sqrt()[:, None, None, None]
    # In shares of what entries are like, so that one rate suits all matrices.
    c, b = (torch.randn(*shape, state, generator=generator).to(flat.device).requires_grad_() for _ in range(2))
    raw = torch.full(shape, 3.0, device=flat.device).requires_grad_()
    optimizer = torch.optim.Adam([c, b, raw] if decay else [c, b], _RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def errors() -> Tensor:
        reach = _decays(F.logsigmoid(raw) if decay else torch.zeros_like(raw))
        made = (scale * c) @ (scale * b).mT * reach
        made = made[:, :, 0] + made[:, :, 1].flip(-1, -2) if both_ways else made[:, :, 0]
        return (made - flat).square().sum((-2, -1)) / size

    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            errors().sum().backward()
            optimizer.step()
            schedule.step()
    return errors().detach().reshape(restarts, *matrix.shape[:-2])


class MapScore(NamedTuple):
    """How well maps tell objects from what is around them. [batch]"""

    auc: NDArray[np.float64]  # probability that a pixel of the object scores more than one beside it; 0.5 is chance
    iou: NDArray[np.float64]  # best intersection over union of 100 thresholds, 0 to 1


def map_score(maps: ArrayLike, mask: ArrayLike) -> MapScore:
    """Score maps [batch, row, column] by masks [batch, row, column], to whose size they are enlarged (bilinear).

    Ours: see the module. Ties count half. ValueError where a mask is empty or full.

    >>> score = map_score([[[0.0, 1.0], [0.2, 0.1]]], [[[False, True], [False, False]]])
    >>> score.auc.tolist(), score.iou.tolist()
    ([1.0], [1.0])
    """
    masks = np.asarray(mask, bool)
    given = torch.as_tensor(np.asarray(maps, float))
    if given.ndim != 3 or masks.ndim != 3 or len(given) != len(masks):
        raise ValueError(f"maps and masks are [batch, row, column], got {list(given.shape)} and {list(masks.shape)}")
    if (masks.all((1, 2)) | ~masks.any((1, 2))).any():
        raise ValueError("a mask is empty or full, so there is nothing to tell apart")
    large = F.interpolate(given[:, None], masks.shape[1:], mode="bilinear", align_corners=False)[:, 0].numpy()
    auc, iou = [], []
    for scores, inside in zip(large, masks):
        beside = np.sort(scores[~inside])
        below = np.searchsorted(beside, scores[inside], "left") + np.searchsorted(beside, scores[inside], "right")
        auc.append(below.mean() / (2 * len(beside)))
        chosen = scores >= np.linspace(scores.min(), scores.max(), 100)[:, None, None]
        iou.append(((chosen & inside).sum((1, 2)) / (chosen | inside).sum((1, 2))).max())
    return MapScore(np.array(auc), np.array(iou))
