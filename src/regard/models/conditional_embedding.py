"""One network, a space of its own for every attribute: the asked attribute is the query of the last block.

Song et al., Conditional Cross Attention Network for Multi-Space Embedding without Entanglement in Only a SINGLE Network
(arXiv:2307.13254). No code of the authors is public, and of the text only the abstract and the introduction were at
hand; what goes beyond them is by a reader's account. The last block of a vision transformer takes its keys and values
from the picture's tokens and its query from the condition, so that colour, shape and length are embedded apart by the
same weights. A condition is a learned row ("label"), or the class token under a learned mask ("mask", as in conditional
similarity networks, Veit et al., arXiv:1603.07810, whose initial masks are taken).

Ours: one query a condition, where the paper may repeat it for all tokens and read one; queries and tokens share the
block's first norm, as they do in the block that it replaces; the triplet loss is the mean over all triplets of a batch.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

Condition = Literal["label", "mask"]


class ConditionalAttention(nn.Module):
    """A block in which each condition asks the picture's tokens by itself. [batch, key, dim] -> [batch, query, dim]

    conditions: how many; condition: "label" for a learned row each, "mask" for the class token times a learned mask;
    hidden: width of the MLP, `4 * dim` by default. Conditions do not see one another. `regard.record` sees one layer of
    cross attention. ValueError where dim does not divide by heads, and for another kind of condition.

    >>> import torch
    >>> from regard.models.conditional_embedding import ConditionalAttention
    >>> block = ConditionalAttention(16, 2, 3)
    >>> block(torch.randn(2, 5, 16), torch.tensor([[0], [2]])).shape
    torch.Size([2, 1, 16])
    """

    def __init__(
        self, dim: int, heads: int, conditions: int, *, condition: Condition = "label", hidden: int | None = None
    ) -> None:
        super().__init__()
        if condition not in get_args(Condition):
            raise ValueError(f'ConditionalAttention: condition is "label" or "mask", got {condition!r}')
        if heads < 1 or dim % heads or conditions < 1:
            raise ValueError(
                f"ConditionalAttention: dim divides by heads, and there is one condition or more; got {dim}, {heads} "
                f"and {conditions}"
            )
        self.dim, self.conditions, self.kind = dim, conditions, condition
        if condition == "label":
            self.rows = nn.Linear(conditions, dim)  # of a one-hot vector
        else:
            self.masks = nn.Parameter(0.9 + 0.7 * torch.randn(conditions, dim))
        self.norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.cross = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cross.is_cross_attention = True  # type: ignore[assignment]  # as other modules say it, to `record`
        hidden = 4 * dim if hidden is None else hidden
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def queries(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """condition: long [batch, query] -> [batch, query, dim]"""
        if self.kind == "mask":
            return tokens[:, :1] * self.masks[condition].relu()
        return self.rows(F.one_hot(condition, self.conditions).to(tokens.dtype))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """tokens: [batch, key, dim], the class token first; condition: long [batch, query]. ValueError for others."""
        if tokens.ndim != 3 or tokens.shape[-1] != self.dim or not tokens.shape[1]:
            raise ValueError(
                f"ConditionalAttention: takes tokens [batch, key, {self.dim}], one or more; got {list(tokens.shape)}"
            )
        whole = not (condition.is_floating_point() or condition.dtype == torch.bool)
        if condition.ndim != 2 or len(condition) != len(tokens) or not whole:
            raise ValueError(
                f"ConditionalAttention: conditions are whole numbers [batch, query], of {len(tokens)} rows; got "
                f"{condition.dtype} {list(condition.shape)}"
            )
        if ((condition < 0) | (condition >= self.conditions)).any():
            raise ValueError(
                f"ConditionalAttention: conditions are 0 to {self.conditions - 1}, got {int(condition.min())} to "
                f"{int(condition.max())}"
            )
        query, keys = self.queries(tokens, condition), self.norm(tokens)
        found = query + self.cross(self.norm(query), keys, keys, need_weights=False)[0]
        return found + self.mlp(self.mlp_norm(found))


class ConditionalHead(nn.Module):
    """Embeddings of length 1 from a picture's tokens, one space a condition. [batch, key, dim] -> [batch, width]

    All conditions share every weight but their own row. knobs: those of `ConditionalAttention`.
    """

    def __init__(self, dim: int, heads: int, conditions: int, *, width: int = 128, **knobs: Any) -> None:
        super().__init__()
        self.block = ConditionalAttention(dim, heads, conditions, **knobs)
        self.norm, self.embed = nn.LayerNorm(dim), nn.Linear(dim, width)

    def forward(self, tokens: Tensor, condition: Tensor | int | None = None) -> Tensor:
        """condition: [batch], or one for all rows; without it, every one: [batch, condition, width].

        Embeddings of different conditions are not to be compared with one another.
        """
        every = torch.arange(self.block.conditions, device=tokens.device)
        if condition is None:
            asked = every.expand(len(tokens), -1)
        else:
            one = torch.as_tensor(condition, device=tokens.device)
            asked = (one.expand(len(tokens)) if one.ndim == 0 else one).unsqueeze(-1)
        found = F.normalize(self.embed(self.norm(self.block(tokens, asked))), dim=-1)
        return found if condition is None else found[:, 0]


class ConditionalEmbedding(nn.Module, PyTorchModelHubMixin):
    """Pictures and what is asked of them to embeddings of length 1. `save_pretrained`, `from_pretrained` as on the hub.

    vision: fields of transformers' `ViTConfig`; the block is the last of its `num_hidden_layers`. backbone: in place of
    it a module whose output has `last_hidden_state` [batch, key, dim], the class token first, and whose config has
    `hidden_size` and `num_attention_heads`; what is loaded needs it again. width: channels of an embedding; condition:
    as in `ConditionalAttention`. A pretrained ViT without its last block is
    `ViTModel.from_pretrained(name, num_hidden_layers=11)`. ValueError without, or with both, backbone and vision.

    >>> import torch
    >>> from regard.models.conditional_embedding import conditional_embedding
    >>> vision = dict(image_size=16, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    >>> model = conditional_embedding(conditions=3, vision=vision, width=8)
    >>> pictures = torch.randn(2, 3, 16, 16)
    >>> model(pictures, torch.tensor([0, 2])).shape, model(pictures).shape
    (torch.Size([2, 8]), torch.Size([2, 3, 8]))
    """

    def __init__(
        self,
        *,
        conditions: int,
        vision: dict[str, Any] | None = None,
        backbone: nn.Module | None = None,
        width: int = 128,
        condition: Condition = "label",
    ) -> None:
        super().__init__()
        if (vision is None) == (backbone is None):
            raise ValueError("ConditionalEmbedding: give vision, fields of a ViTConfig, or a backbone, and not both")
        if backbone is None:
            fields = ViTConfig(**(vision or {}))
            fields.num_hidden_layers -= 1
            if fields.num_hidden_layers < 0:
                raise ValueError(
                    "ConditionalEmbedding: num_hidden_layers is 1 or more, as the block is the last of them"
                )
            backbone = ViTModel(fields, add_pooling_layer=False)
            backbone.layernorm = nn.Identity()  # type: ignore[assignment]  # the last block norms what it takes
        self.backbone = backbone
        config: Any = getattr(backbone, "config", None)
        if not hasattr(config, "hidden_size") or not hasattr(config, "num_attention_heads"):
            raise ValueError(
                f"ConditionalEmbedding: the backbone is a transformer of patches, with hidden_size and "
                f"num_attention_heads in its config; {type(backbone).__name__} has none: give a ViTModel, for example"
            )
        self.head = ConditionalHead(
            config.hidden_size, config.num_attention_heads, conditions, width=width, condition=condition
        )

    def forward(self, pictures: Tensor, condition: Tensor | int | None = None) -> Tensor:
        """pictures: [batch, channel, row, column]; condition: as in `ConditionalHead`.

        One pass of the backbone, and one query a condition. ValueError where the backbone gives no tokens.
        """
        tokens = getattr(self.backbone(pictures), "last_hidden_state", None)
        if tokens is None or tokens.ndim != 3:
            raise ValueError(
                f"ConditionalEmbedding: {type(self.backbone).__name__} gives no tokens [batch, key, dim] as "
                "last_hidden_state; take a transformer of patches"
            )
        return self.head(tokens, condition)


def conditional_embedding(**knobs: Any) -> ConditionalEmbedding:
    """An untrained `ConditionalEmbedding` with these knobs."""
    return ConditionalEmbedding(**knobs)


def conditional_triplet(embeddings: Tensor, labels: Tensor, condition: Tensor, *, margin: float = 0.2) -> Tensor:
    """How far triplets are from keeping others `margin` farther than their like, by cosine distance; 0 or more.

    embeddings: of length 1 [batch, width]; labels, condition: [batch]. Anchor, positive and negative are of one
    condition; the positive has the anchor's label. The mean over all triplets, 0 where there is none.

    >>> import torch
    >>> from regard.models.conditional_embedding import conditional_triplet
    >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.9, 0.19**0.5]])
    >>> f"{conditional_triplet(embeddings, torch.tensor([7, 7, 8]), torch.zeros(3)):.3f}"
    '0.341'
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or condition.shape != embeddings.shape[:1]:
        raise ValueError(
            f"conditional_triplet: embeddings [batch, width], labels and condition [batch]; got "
            f"{list(embeddings.shape)}, {list(labels.shape)} and {list(condition.shape)}"
        )
    same, like = condition[:, None] == condition, labels[:, None] == labels
    positive = same & like & ~torch.eye(len(labels), dtype=torch.bool, device=embeddings.device)
    anchor, mate, other = (positive[:, :, None] & (same & ~like)[:, None]).nonzero(as_tuple=True)
    near = embeddings @ embeddings.mT
    apart = (near[anchor, other] - near[anchor, mate] + margin).relu()
    return apart.mean() if len(apart) else embeddings.sum() * 0


def average_precision(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Of each picture as a query among the others, the mean precision at those of its label, 0 to 1. [picture]

    embeddings: of one condition, of length 1 [picture, width]. NaN where no other has its label.
    ValueError for other shapes, and embeddings that are not finite.

    >>> import torch
    >>> from regard.models.conditional_embedding import average_precision
    >>> at = torch.tensor([0.0, 0.1, 0.3])
    >>> average_precision(torch.stack([at.cos(), at.sin()], 1), torch.tensor([0, 1, 0]))
    tensor([0.5000,    nan, 0.5000])
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"average_precision: embeddings [picture, width] and labels [picture]; got {list(embeddings.shape)} and "
            f"{list(labels.shape)}"
        )
    if not embeddings.isfinite().all():
        raise ValueError("average_precision: embeddings are to be finite, as what is not a number has no order")
    near = (embeddings @ embeddings.mT).fill_diagonal_(-torch.inf)
    order = near.argsort(1, descending=True)[:, :-1]  # the query itself comes last
    hit = (labels[order] == labels[:, None]).to(torch.promote_types(near.dtype, torch.float32))  # whose ranks are exact
    precision = hit.cumsum(1) / torch.arange(1, hit.shape[1] + 1, device=embeddings.device)
    return (precision * hit).sum(1) / hit.sum(1)
