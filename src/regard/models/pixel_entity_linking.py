"""Links what a mask covers in a picture to an entity: attention among regions, not among square patches.

Xu et al., Reverse Region-to-Entity Annotation for Pixel-Level Visual Entity Linking (arXiv:2412.13614). The authors'
repository holds the task's data format and no model; of the text the abstract was at hand, and the model is a
reconstruction from it. Features of a vision tower are averaged over semantic regions, a segmenter's masks, the asked
one and what is left; region tokens attend to one another, and the asked one's output is compared with embeddings of
entities. With a language model the tokens stand before an entity's name, which it writes (`name_log_probs`). The
paper's other half, annotation in reverse, from a picture's known entity to its mask, is `annotate`.

Ours: the comparison with embeddings, for small models, beside the paper's writing of names; positions are learned on
the tower's grid, and a region's is their mean; what is asked is taken out of the other masks, so that it counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

Interact = Literal["region", "patch", "alone"]
ASKED, OTHER, BACKGROUND = range(3)  # kinds of regions


def weights_of_regions(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """How much of each region each place of a grid has, summing to 1. [batch, region, row, column] -> [..., place]

    The share of a place that the mask covers, over the sum of shares. A mask of less than half a place is where its
    centre is; an empty one is nowhere, all 0.

    >>> import torch
    >>> from regard.models.pixel_entity_linking import weights_of_regions
    >>> mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1]]).view(1, 1, 2, 4)  # half of the first place, and the second
    >>> weights_of_regions(mask, (1, 2))
    tensor([[[0.3333, 0.6667]]])
    """
    masks = masks.float()
    shares = F.adaptive_avg_pool2d(masks, grid).flatten(2)
    total = shares.sum(-1, keepdim=True)
    area = masks.sum((2, 3))
    y, x = (torch.arange(n, device=masks.device) + 0.5 for n in masks.shape[2:])
    row = (masks.sum(3) @ y / area.clamp_min(1) * grid[0] / masks.shape[2]).long().clamp_max(grid[0] - 1)
    column = (masks.sum(2) @ x / area.clamp_min(1) * grid[1] / masks.shape[3]).long().clamp_max(grid[1] - 1)
    centre = F.one_hot(row * grid[1] + column, grid[0] * grid[1]).to(shares)
    small = (total > 0) & (total < 0.5)
    return torch.where(small, centre, shares / (total + 1e-6))


def tokens_of_regions(features: Tensor, masks: Tensor) -> Tensor:
    """The mean of features over each mask. [batch, channel, row, column], [batch, region, row, column] -> a token each

    Masks are finer than features, or as fine. -> [batch, region, channel]; 0 of empty masks. ValueError for others.
    """
    if features.ndim != 4 or masks.ndim != 4 or len(features) != len(masks):
        raise ValueError(
            f"tokens_of_regions: features [batch, channel, row, column] and masks [batch, region, row, column]; got "
            f"{list(features.shape)} and {list(masks.shape)}"
        )
    if masks.shape[2] < features.shape[2] or masks.shape[3] < features.shape[3]:
        raise ValueError(
            f"tokens_of_regions: masks are as fine as features or finer; got {list(masks.shape)} for "
            f"{list(features.shape)}"
        )
    weights = weights_of_regions(masks, (features.shape[2], features.shape[3]))
    return weights.to(features.dtype) @ features.flatten(2).mT


def regions(masks: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of the asked region, the others without it, and what is left; and which of them are somewhere.

    masks: boolean [batch, region, row, column], filled up with empty ones; asked: [batch, row, column]. -> boolean
    [batch, region + 2, row, column], the asked one first and the background last, and [batch, region + 2]. Together
    they cover the picture. ValueError where masks are of another size, or an asked one is empty.
    """
    if masks.dtype != torch.bool or asked.dtype != torch.bool:
        raise TypeError(f"pixel_entity_linking: masks are boolean, got {masks.dtype} and {asked.dtype}")
    if masks.ndim != 4 or asked.shape != (len(masks), *masks.shape[2:]):
        raise ValueError(
            f"pixel_entity_linking: masks [batch, region, row, column] and asked [batch, row, column] of one size; got "
            f"{list(masks.shape)} and {list(asked.shape)}"
        )
    if not (there := asked.flatten(1).any(1)).all():
        raise ValueError(f"pixel_entity_linking: the asked mask of row {int((~there).nonzero()[0])} covers nothing")
    own = asked[:, None]
    every = torch.cat([own, masks & ~own, ~(own | masks.any(1, keepdim=True))], 1)
    return every, every.flatten(2).any(2)


class RegionEncoder(nn.Module):
    """Transformer layers over tokens, of which some are filled up. [batch, token, dim] -> the same

    alone: tokens see only themselves, at the same parameters.
    """

    def __init__(self, dim: int, layers: int, heads: int, *, alone: bool = False) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"RegionEncoder: dim divides by heads; got {dim} and {heads}")
        self.alone, self.heads = alone, heads
        one = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(one, layers, nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, tokens: Tensor, there: Tensor | None = None) -> Tensor:
        """there: boolean [batch, token], one or more of each row."""
        if not len(tokens):  # which attention with a mask does not take
            return tokens
        length = tokens.shape[1]
        apart = ~torch.eye(length, dtype=torch.bool, device=tokens.device)
        hidden = apart.expand(len(tokens), -1, -1) if self.alone else None
        if there is not None:  # what is filled up sees itself, so that no row is empty, and nothing else sees it
            unseen = ~there[:, None] & apart
            hidden = unseen if hidden is None else hidden | unseen
        mask = None if hidden is None else hidden.repeat_interleave(self.heads, 0)
        return self.layers(tokens, mask)


class Linked(NamedTuple):
    """What is made of an asked mask."""

    vector: Tensor  # of the asked region, in the entities' space [batch, width]
    tokens: Tensor  # of all regions, or of all patches, the asked region first [batch, token, width]
    there: Tensor  # which tokens are not filled up [batch, token]


class EntityLinker(nn.Module, PyTorchModelHubMixin):
    """Pictures and masks to entities. Saved and loaded as on the hub; what is loaded needs its tower again.

    channels, grid: of the tower's features, channels and (rows, columns); width: of the entities' embeddings; interact:
    "region" for the paper's attention among regions, "patch" for the same layers over all patches and the asked mask in
    a mean of their outputs, "alone" for regions that do not see one another. tower: a transformers vision model, whose
    `last_hidden_state` has the patches last; without it, features are given. `regard.record` sees the layers' self
    attention over regions, in the order of `regions`, or over patches.

    >>> import torch
    >>> from regard.models.pixel_entity_linking import pixel_entity_linking
    >>> model = pixel_entity_linking(channels=12, grid=(4, 4), width=8, dim=16, heads=2)
    >>> masks = torch.zeros(2, 3, 32, 32, dtype=torch.bool)
    >>> masks[:, 0, :16], masks[:, 1, 16:, :9] = True, True
    >>> model(torch.randn(2, 12, 4, 4), masks, masks[:, 1], torch.randn(20, 8)).shape
    torch.Size([2, 20])
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple[int, int],
        width: int,
        dim: int = 256,
        layers: int = 2,
        heads: int = 4,
        interact: Interact = "region",
        temperature: float = 0.07,
        tower: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if interact not in get_args(Interact):
            raise ValueError(f'EntityLinker: interact is "region", "patch" or "alone", got {interact!r}')
        if not temperature > 0:
            raise ValueError(f"EntityLinker: temperature is above 0, got {temperature}")
        self.channels, self.grid, self.interact, self.tower = channels, (grid[0], grid[1]), interact, tower
        self.embed, self.kind = nn.Linear(channels, dim), nn.Embedding(3, dim)
        self.places = nn.Parameter(0.02 * torch.randn(dim, *self.grid))
        self.encoder = RegionEncoder(dim, layers, heads, alone=interact == "alone")
        self.read = nn.Linear(dim, width)
        self.scale = nn.Parameter(-torch.tensor(temperature).log())

    def forward(self, pictures: Tensor, masks: Tensor, asked: Tensor, entities: Tensor) -> Tensor:
        """Logits: cosines over the learned temperature. [batch, entity]

        pictures: [batch, channel, row, column], or without a tower its features; masks, asked: as in `regions`;
        entities: embeddings of their texts [entity, width].
        """
        if entities.ndim != 2 or entities.shape[1] != self.read.out_features:
            raise ValueError(
                f"EntityLinker: entities are [entity, {self.read.out_features}]; got {list(entities.shape)}"
            )
        vector = self.link(pictures, masks, asked).vector
        return F.normalize(vector, dim=-1) @ F.normalize(entities, dim=-1).mT * self.scale.exp()

    def link(self, pictures: Tensor, masks: Tensor, asked: Tensor) -> Linked:
        """The asked region's vector and all tokens; see `forward`."""
        if self.tower is not None and masks.shape[-2:] != pictures.shape[-2:]:
            raise ValueError(
                f"EntityLinker: masks are of the pictures' size {list(pictures.shape[-2:])}; got {list(masks.shape)}"
            )
        features = pictures if self.tower is None else self._seen(pictures)
        if features.ndim != 4 or features.shape[1:] != (self.channels, *self.grid):
            raise ValueError(
                f"EntityLinker: features are [batch, {self.channels}, {self.grid[0]}, {self.grid[1]}]; got "
                f"{list(features.shape)}"
            )
        every, there = regions(masks, asked)
        if len(every) != len(features):
            raise ValueError(f"EntityLinker: {len(features)} pictures and masks of {len(every)}")
        maps = self.embed(features.movedim(1, -1)).movedim(-1, 1) + self.places
        if self.interact == "patch":
            found = self.encoder(maps.flatten(2).mT)
            own = tokens_of_regions(found.mT.unflatten(2, self.grid), every[:, :1])
            tokens = self.read(torch.cat([own, found], 1))
            return Linked(tokens[:, 0], tokens, there.new_ones(tokens.shape[:2]))
        kinds = torch.full((every.shape[1],), OTHER, device=every.device)
        kinds[0], kinds[-1] = ASKED, BACKGROUND
        tokens = self.read(self.encoder(tokens_of_regions(maps, every) + self.kind(kinds), there))
        return Linked(tokens[:, 0], tokens, there)

    def _seen(self, pictures: Tensor) -> Tensor:
        assert self.tower is not None
        states = self.tower(pictures).last_hidden_state
        places = self.grid[0] * self.grid[1]
        if states.ndim != 3 or states.shape[1] < places:
            raise ValueError(f"EntityLinker: the tower gives {list(states.shape)}, and the grid has {places} places")
        return states[:, -places:].mT.unflatten(2, self.grid)


def pixel_entity_linking(**knobs: Any) -> EntityLinker:
    """An untrained `EntityLinker` with these knobs."""
    return EntityLinker(**knobs)


def name_log_probs(language_model: Any, linked: Linked, names: Tensor, there: Tensor | None = None) -> Tensor:
    """Log-probability, in nats, with which a language model writes a name after the tokens of regions. [batch]

    language_model: of transformers, causal, of the width of `linked.tokens`; names: token ids [batch, name token];
    there: boolean, False where a name is filled up at its end. Differentiable; to choose or to train. The tokens stand
    first, those that are filled up before all others, out of sight, so that they change nothing.
    """
    order = linked.there.int().sort(stable=True, dim=1).indices
    tokens = linked.tokens.gather(1, order[..., None].expand_as(linked.tokens))
    there = torch.ones_like(names, dtype=torch.bool) if there is None else there
    words = language_model.get_input_embeddings()(names)
    seen = torch.cat([linked.there.gather(1, order), there], 1)
    states = language_model(
        inputs_embeds=torch.cat([tokens.to(words.dtype), words], 1),
        attention_mask=seen.long(),
        position_ids=(seen.cumsum(1) - 1).clamp_min(0),
    )
    logs = states.logits[:, tokens.shape[1] - 1 : -1].log_softmax(-1).gather(2, names[..., None])[..., 0]
    return logs.where(there, 0.0).sum(1)


class Annotation(NamedTuple):
    """A region of a picture and the entity that it shows."""

    entity: str
    mask: Tensor  # boolean [row, column]
    score: float


def annotate(
    picture: Any,
    entity: str,
    kind: str,
    propose: Callable[[Any, str], Sequence[Tensor]],
    score: Callable[[Any, Tensor, str], float],
    *,
    least: float = 0.5,
    apart: float = 0.5,
) -> list[Annotation]:
    """Masks of the entity that a picture is known to show, best first: annotation in reverse, from label to region.

    propose: masks [row, column] for a text, "a KIND named ENTITY", such as a grounded detector's boxes segmented;
    score: how far a mask agrees with that text, 0 to 1, such as a judge's of its crop. Left out are empty masks, those
    that score below `least`, and those that share `apart` or more of a better one (intersection over union).

    >>> import torch
    >>> from regard.models.pixel_entity_linking import annotate
    >>> masks = torch.eye(4).bool().view(4, 2, 2)
    >>> found = annotate(None, "Rex", "dog", lambda _, text: list(masks), lambda _, mask, text: float(mask[0, 0]))
    >>> [(one.entity, one.mask.tolist()) for one in found]
    [('Rex', [[True, False], [False, False]])]
    """
    text = f"a {kind} named {entity}"
    found = [Annotation(entity, m.bool(), float(score(picture, m, text))) for m in propose(picture, text) if m.any()]
    kept: list[Annotation] = []
    for one in sorted((a for a in found if a.score >= least), key=lambda a: -a.score):
        if all(float((one.mask & k.mask).sum() / (one.mask | k.mask).sum()) < apart for k in kept):
            kept.append(one)
    return kept
