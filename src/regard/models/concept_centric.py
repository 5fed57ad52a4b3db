"""A classifier that decides through concepts: slots that compete for a picture, to which its embedding then attends.

Hong et al., Concept-Centric Transformers: Enhancing Model Interpretability through Object-Centric Concept Learning
within a Shared Global Workspace (arXiv:2305.15775); concept slots, read-out and losses as in the authors' code
(jyhong0304/concept_centric_transformers). The encoder is transformers' ViT. Learned vectors as concepts,
`kind="plain"`, are the Concept Transformer (Rigotti et al., 2022), to which the paper compares.

In the authors' model for ViT the slots see the class token alone (`see="class"`): of one input every slot takes all,
so that slots differ by their noise and by the learned positions that are added to them, which order them.
`see="patches"` shows them the patches. Slots of kind "sa" start from noise, in evaluation too: give `noise` where an
answer has to be the same twice.

Deviations: dropout falls on the weights of the read-out as in the code, but its output has none. Patches attend to
learned concepts of their own, without slots, as in the code; `spatial_concepts=0` leaves them out.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from .slot_attention import CompetitiveAttention

Kind = Literal["sa", "isa", "qsa", "plain"]
EPSILON = 1e-8


class CompetingAttention(CompetitiveAttention):
    """Slot attention's, with the shares beside the output."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """query [batch, query, dim], key and value [batch, key, dim] -> output, and shares [batch, query, key]"""
        return self.shared(query, key, value)


class ConceptSlots(nn.Module):
    """Concept vectors made from a set of inputs. [batch, token, dim] -> [batch, concept, dim]

    kind: "sa" starts from a learned normal distribution, "isa" and "qsa" from a given start; the last round of "isa"
    alone has gradients, and of "qsa" also the start. rounds: how often slots look; in "isa" one more. There is neither
    an MLP nor a residual, unlike in slot attention. `regard.record` sees each round as a layer whose queries are slots.

    >>> import torch
    >>> from regard.models.concept_centric import ConceptSlots
    >>> slots, shares = ConceptSlots(8, 3)(torch.randn(2, 10, 8))
    >>> slots.shape, shares.shape
    (torch.Size([2, 3, 8]), torch.Size([2, 3, 10]))
    """

    def __init__(self, dim: int, concepts: int, *, kind: Kind = "sa", rounds: int = 1) -> None:
        super().__init__()
        if kind not in ("sa", "isa", "qsa"):
            raise ValueError(f'ConceptSlots: kind is "sa", "isa" or "qsa", got {kind!r}')
        if rounds < 1 or concepts < 1:
            raise ValueError(f"ConceptSlots: one round and one concept or more, got {rounds} and {concepts}")
        self.concepts, self.kind, self.rounds = concepts, kind, rounds
        if kind == "sa":
            self.mean, self.log_deviation = (nn.Parameter(torch.empty(1, 1, dim)) for _ in range(2))
            nn.init.xavier_uniform_(self.mean)
            nn.init.xavier_uniform_(self.log_deviation)
        self.norm_inputs, self.norm_slots = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.attention = CompetingAttention(EPSILON, guard=EPSILON if kind == "isa" else 0.0)
        self.gru = nn.GRUCell(dim, dim)

    def forward(
        self, inputs: Tensor, *, start: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """inputs [batch, token, dim] -> slots [batch, concept, dim], and each one's share of each input in the last
        round, which sum to 1 over slots [batch, concept, token].

        start: what slots start from [batch, concept, dim], for "isa" and "qsa"; noise: of the same shape, for "sa", in
        place of a draw. ValueError where it is missing or not of this kind.
        """
        if (start is None) != (self.kind == "sa") or (noise is not None and self.kind != "sa"):
            raise ValueError(f'ConceptSlots: "sa" takes noise or nothing, "isa" and "qsa" a start; this is {self.kind}')
        inputs = self.norm_inputs(inputs)
        key, value = self.key(inputs), self.value(inputs)
        if start is None:
            if noise is None:
                shape = len(inputs), self.concepts, inputs.shape[-1]
                noise = torch.randn(shape, device=inputs.device, dtype=inputs.dtype)
            start = self.mean + self.log_deviation.exp() * noise
        slots, shares = start, None
        if self.kind == "isa":
            with torch.no_grad():
                for _ in range(self.rounds):
                    slots, shares = self._round(slots, key, value)
            return self._round(slots.detach(), key, value)
        for i in range(self.rounds):
            if self.kind == "qsa" and i == self.rounds - 1:
                slots = slots.detach() + start - start.detach()
            slots, shares = self._round(slots, key, value)
        assert shares is not None
        return slots, shares

    def _round(self, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        asked = slots if self.kind == "isa" else self.norm_slots(slots)
        update, shares = self.attention(self.query(asked), key, value)
        return self.gru(update.flatten(0, 1), slots.flatten(0, 1)).view_as(slots), shares


class ConceptAttention(nn.Module):
    """Reads classes off concepts: the classes of a query are sums of its weights times what concepts vote for."""

    is_cross_attention = True

    def __init__(self, dim: int, heads: int, classes: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"ConceptAttention: {dim} channels do not divide by {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.output = nn.Linear(dim, classes)

    def forward(self, features: Tensor, concepts: Tensor) -> tuple[Tensor, Tensor]:
        """features [batch, query, dim], concepts [batch, concept, dim] -> logits [batch, query, class], and the mean
        over heads of the weights [batch, query, concept]
        """
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(features), *self.key_value(concepts).chunk(2, -1))
        )
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        mixed = F.dropout(weights, self.dropout, self.training) @ value
        return self.output(mixed.transpose(1, 2).flatten(2)), weights.mean(1)


class Explained(NamedTuple):
    """Classes, and the concepts that they were read off."""

    logits: Tensor  # [batch, class]
    concepts: Tensor  # weights of the picture on concepts, sum to 1 [batch, concept]
    spatial: Tensor | None  # of each patch on its own kind of concepts [batch, patch, concept]


class ConceptHead(nn.Module):
    """Classes from a ViT's class token and patches, by concepts alone.

    kind: of the concepts; see: whether slots see the class token or the patches.

    Logits depend on the picture only by weights on concepts, and by the concepts themselves.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        concepts: int,
        *,
        spatial_concepts: int = 0,
        heads: int = 12,
        kind: Kind = "sa",
        see: Literal["class", "patches"] = "class",
        rounds: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind) or see not in ("class", "patches"):
            raise ValueError(
                f'ConceptHead: kind is one of {", ".join(get_args(Kind))}, and slots see "class" or "patches"; got '
                f"{kind!r} and {see!r}"
            )
        self.kind, self.see = kind, see
        self.slots = None if kind == "plain" else ConceptSlots(dim, concepts, kind=kind, rounds=rounds)
        self.start = None if kind == "sa" else nn.Parameter(_drawn(concepts, dim))
        self.places = nn.Parameter(torch.zeros(concepts, dim)) if kind == "sa" else None
        self.read = ConceptAttention(dim, heads, classes, dropout=dropout)
        self.spatial_concepts = nn.Parameter(_drawn(spatial_concepts, dim)) if spatial_concepts else None
        self.spatial_read = ConceptAttention(dim, heads, classes, dropout=dropout) if spatial_concepts else None

    def forward(self, summary: Tensor, patches: Tensor, *, noise: Tensor | None = None) -> Explained:
        """summary: the class token [batch, 1, dim]; patches [batch, patch, dim]; noise: [batch, concept, dim], from
        which slots of kind "sa" start.
        """
        if summary.ndim != 3 or summary.shape[1] != 1 or patches.ndim != 3 or len(patches) != len(summary):
            raise ValueError(
                "ConceptHead: takes a class token [batch, 1, dim] and patches [batch, patch, dim], got "
                f"{list(summary.shape)} and {list(patches.shape)}"
            )
        start = None if self.start is None else self.start.expand(len(summary), -1, -1)
        concepts = start
        if self.slots is not None:
            concepts, _ = self.slots(summary if self.see == "class" else patches, start=start, noise=noise)
        assert concepts is not None
        if self.places is not None:
            concepts = concepts + self.places
        logits, weights = self.read(summary, concepts)
        logits, spatial = logits[:, 0], None
        if self.spatial_read is not None and self.spatial_concepts is not None:
            each, spatial = self.spatial_read(patches, self.spatial_concepts.expand(len(patches), -1, -1))
            logits = logits + each.mean(1)
        return Explained(logits, weights[:, 0], spatial)


class ConceptCentric(nn.Module, PyTorchModelHubMixin):
    """A ViT with a `ConceptHead`, to be trained together. `save_pretrained` and `from_pretrained` as on the hub.

    vision: fields of transformers' `ViTConfig`; further knobs are those of `ConceptHead`. `regard.record` sees the
    ViT, the slots and the read-outs, as stacks of their own.

    >>> import torch
    >>> from regard.models.concept_centric import concept_centric
    >>> vision = dict(image_size=16, patch_size=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    >>> model = concept_centric(vision, classes=3, concepts=5, spatial_concepts=4)
    >>> found = model(torch.randn(2, 3, 16, 16))
    >>> found.logits.shape, found.concepts.shape, found.spatial.shape
    (torch.Size([2, 3]), torch.Size([2, 5]), torch.Size([2, 4, 4]))
    """

    def __init__(self, *, vision: dict[str, Any], classes: int, concepts: int, **head: Any) -> None:
        super().__init__()
        self.vision = ViTModel(ViTConfig(**vision), add_pooling_layer=False)
        self.head = ConceptHead(self.vision.config.hidden_size, classes, concepts, **head)

    def forward(self, pixel_values: Tensor, *, noise: Tensor | None = None) -> Explained:
        """pixel_values [batch, channel, row, column]; noise: as in `ConceptHead`."""
        states: Tensor = self.vision(pixel_values).last_hidden_state
        return self.head(states[:, :1], states[:, 1:], noise=noise)


def explanation_loss(found: Tensor, target: Tensor) -> Tensor:
    """How far weights on concepts are from the true ones: concepts times their mean squared difference, 0 or more.

    found: weights that sum to 1 [..., concept]; target: the same shape, 0 or more, made to sum to 1. Of rows
    with a NaN in the target nothing is asked; 0 where there is no other row.

    >>> import torch
    >>> from regard.models.concept_centric import explanation_loss
    >>> explanation_loss(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
    tensor(0.5000)
    """
    if found.shape != target.shape:
        raise ValueError(f"explanation_loss: found {list(found.shape)} and target {list(target.shape)} differ")
    known = ~target.isnan().any(-1)
    if not known.any():
        return found.sum() * 0
    wanted = target[known]
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp_min(torch.finfo(wanted.dtype).tiny)
    return found.shape[-1] * F.mse_loss(found[known], wanted)


def sparsity_loss(weights: Tensor) -> Tensor:
    """Mean of -a log a over all weights a, 0 or more; 0 where each row is on one concept. [..., concept] -> scalar"""
    return -(weights * (weights + EPSILON).log()).mean()


def concept_centric(vision: dict[str, Any], classes: int, concepts: int, **head: Any) -> ConceptCentric:
    """An untrained `ConceptCentric`: a ViT of these fields, classes, concepts, and the knobs of `ConceptHead`."""
    return ConceptCentric(vision=vision, classes=classes, concepts=concepts, **head)


def _drawn(count: int, dim: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(count, dim), std=dim**-0.5)
