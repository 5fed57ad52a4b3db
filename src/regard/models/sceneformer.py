"""Rooms furnished object by object: four transformers predict category, orientation, place and size of the next.

Wang et al., SceneFormer: Indoor Scene Generation with Transformers (arXiv:2012.09793), section 3; tokens, embeddings
and the network of the category and the location model as in the authors' code (cy94/sceneformer): PyTorch's decoder,
norm after, as wide as the model, over the room's plan or the words of a description. Of every vocabulary the three
highest ids are pad, stop and start.

Deviations: the model of sizes and that of orientations are built like the one of locations, whose code alone was read;
places and sizes know the orientation of the object that they are for, sizes its place too. The plan's residual
network is a small one of ours. Augmentation and the order of objects are the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

PAD, STOP, START = 0, 1, 2  # above the last token of a vocabulary
STEPS = "category", "orientation", "place", "size"


class Layout(NamedTuple):
    """The objects of a room, in order."""

    category: Tensor  # [object]
    orientation: Tensor  # [object]
    place: Tensor  # [object, axis]
    size: Tensor  # [object, axis]


def nucleus(logits: Tensor, p: float) -> Tensor:
    """The fewest tokens whose probabilities sum to more than `p`, the likeliest first. [..., token] boolean

    >>> import torch
    >>> from regard.models.sceneformer import nucleus
    >>> nucleus(torch.tensor([0.5, 0.3, 0.2]).log(), 0.6)
    tensor([ True,  True, False])
    """
    if not 0 <= p <= 1:
        raise ValueError(f"nucleus: p is a probability, got {p}")
    likely, order = logits.softmax(-1).sort(-1, descending=True)
    kept = likely.cumsum(-1) - likely <= p
    return torch.zeros_like(kept).scatter(-1, order, kept)


class PlanEncoder(nn.Module):
    """A plan as a map of vectors that know where they lie. [batch, channel, row, column] -> [batch, key, dim]"""

    def __init__(self, channels: int, dim: int, *, halvings: int = 5, most: int = 64) -> None:
        super().__init__()
        self.halvings = halvings
        widths = [channels, *(max(dim >> i, 8) for i in reversed(range(halvings)))]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(widths))
        self.residuals = nn.ModuleList(nn.Conv2d(b, b, 3, 1, 1) for b in widths[1:])
        self.read = nn.Linear(widths[-1], dim)
        self.columns, self.rows = nn.Embedding(most, dim), nn.Embedding(most, dim)

    def forward(self, plans: Tensor) -> Tensor:
        for down, residual in zip(self.convolutions, self.residuals, strict=True):
            plans = down(plans).relu()
            plans = plans + residual(plans).relu()
        rows, columns = (torch.arange(n, device=plans.device) for n in plans.shape[2:])
        found = self.read(plans.movedim(1, -1)) + self.rows(rows)[:, None] + self.columns(columns)
        return found.flatten(1, 2)


class Property(nn.Module):
    """What the next token of one property is, of the sums of embeddings of what is known at each place.

    fields: how many tokens each known sequence has, its pad, stop and start not counted; `category` is one of them, and
    `current` stands for the category of the object that the next token is for. tokens: of the property itself;
    per_object: how many an object has, of kinds in turn. conditioned: whether there is something to attend to, without
    which PyTorch's encoder takes the decoder's place. `regard.record` sees self and cross attention.

    >>> import torch
    >>> from regard.models.sceneformer import Property
    >>> model = Property({"category": 5}, tokens=5, dim=16, heads=2, layers=1).eval()
    >>> model({"category": torch.tensor([[7, 0, 3]])}, torch.randn(1, 4, 16)).shape  # 7 is the start
    torch.Size([1, 3, 7])
    """

    def __init__(
        self,
        fields: Mapping[str, int],
        *,
        tokens: int,
        dim: int = 256,
        heads: int = 8,
        layers: int = 8,
        per_object: int = 1,
        longest: int = 40,
        dropout: float = 0.3,
        conditioned: bool = True,
    ) -> None:
        super().__init__()
        if "category" not in fields:
            raise ValueError("Property: category is one of the fields: it says where a sequence is filled up")
        self.per_object, self.longest, self.pad = per_object, longest, fields["category"] + PAD
        self.embeddings = nn.ModuleDict({k: nn.Embedding(n + 3, dim, padding_idx=n + PAD) for k, n in fields.items()})
        self.places = nn.Embedding(longest, dim)
        self.kinds = nn.Embedding(per_object, dim) if per_object > 1 else None
        layer = nn.TransformerDecoderLayer if conditioned else nn.TransformerEncoderLayer
        made: Any = layer(dim, heads, dim_feedforward=dim, dropout=dropout, batch_first=True)
        self.generator: nn.Module = (
            nn.TransformerDecoder(made, layers)
            if conditioned
            else nn.TransformerEncoder(made, layers, enable_nested_tensor=False)
        )
        self.output = nn.Linear(dim, tokens + START)  # a start is never next

    def forward(self, sequences: Mapping[str, Tensor], memory: Tensor | None = None) -> Tensor:
        """sequences: of each field [batch, token]; memory [batch, key, dim] -> log-probabilities of the token after
        each place [batch, token, class]. ValueError where fields differ from the model's, or are too long for it.
        """
        if sequences.keys() != self.embeddings.keys():
            raise ValueError(f"Property: takes {', '.join(self.embeddings)}, got {', '.join(sequences)}")
        category = sequences["category"]
        length = category.shape[1]
        if length > self.longest:
            raise ValueError(f"Property: {length} tokens, and the model has places for {self.longest}")
        at = torch.arange(length, device=category.device)
        x = self.places(at)
        if self.kinds is not None:
            x = x + self.kinds((at - 1) % self.per_object)
        for name, sequence in sequences.items():
            x = x + self.embeddings[name](sequence)
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        filled = category == self.pad
        if isinstance(self.generator, nn.TransformerDecoder):
            x = self.generator(x, memory, tgt_mask=later, tgt_key_padding_mask=filled)
        else:
            x = self.generator(x, mask=later, src_key_padding_mask=filled)
        return self.output(x).log_softmax(-1)


class SceneFormer(nn.Module, PyTorchModelHubMixin):
    """Four `Property`s that furnish rooms together, one object after the other. Saved and loaded as on the hub.

    categories, angles, bins, sizes: how many tokens category, orientation, a coordinate and a side of an object have;
    axes: 3, or 2 for rooms seen from above; most: objects of a room; condition: what a room is made for, a plan of so
    many channels, whose sides are halved so often before it is attended to, or a text of vectors; None for any room.

    >>> import torch
    >>> from regard.models.sceneformer import sceneformer
    >>> model = sceneformer(categories=4, bins=16, angles=4, sizes=8, axes=2, dim=16, heads=2, layers=1, most=5).eval()
    >>> rooms = model.generate(torch.rand(2, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    >>> len(rooms), rooms[0].place.shape[1]
    (2, 2)
    """

    def __init__(
        self,
        *,
        categories: int,
        bins: int = 200,
        angles: int = 360,
        sizes: int = 80,
        axes: int = 3,
        most: int = 12,
        dim: int = 256,
        heads: int = 8,
        layers: int = 8,
        dropout: float = 0.3,
        condition: Literal["plan", "text"] | None = "plan",
        channels: int = 1,
        halvings: int = 5,
    ) -> None:
        super().__init__()
        if condition not in ("plan", "text", None):
            raise ValueError(f'SceneFormer: condition is "plan", "text" or None, got {condition!r}')
        self.tokens = {"category": categories, "orientation": angles, "place": bins, "size": sizes}
        self.axes, self.most, self.condition = axes, most, condition
        places = {f"place{i}": bins for i in range(axes)}
        known: dict[str, dict[str, int]] = {
            "category": {"orientation": angles, **places},
            "orientation": {"orientation": angles, **places, "current": categories},
            "place": {"place": bins, "orientation": angles, "current": categories},
            "size": {"size": sizes, "orientation": angles, **places, "current": categories},
        }
        self.properties = nn.ModuleDict()
        for name in STEPS:
            each = axes if name in ("place", "size") else 1
            self.properties[name] = Property(
                {"category": categories, **known[name]},
                tokens=self.tokens[name],
                dim=dim,
                heads=heads,
                layers=layers,
                per_object=each,
                longest=each * (most + 1) + 1,
                dropout=dropout,
                conditioned=condition is not None,
            )
        self.encoders = nn.ModuleDict()
        for name in STEPS if condition else ():
            self.encoders[name] = (
                PlanEncoder(channels, dim, halvings=halvings) if condition == "plan" else nn.Linear(channels, dim)
            )

    def forward(
        self, rooms: Sequence[Layout], plan: Tensor | None = None, text: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Negative log-likelihood of a token of each property, of true rooms. By name, a scalar each.

        plan [batch, channel, row, column], text [batch, word, channel]. ValueError for rooms of more than `most`
        objects, for both plan and text, and for one that is not the model's condition.
        """
        if not rooms:
            raise ValueError("SceneFormer: the likelihood is of one room or more, got none")
        memory = self._memory(plan, text)
        objects = self._objects(rooms)
        found = {}
        for name in STEPS:
            scores, wanted = self._scored(name, objects, memory.get(name))
            found[name] = F.nll_loss(scores.flatten(0, 1), wanted.flatten(), ignore_index=self.tokens[name] + PAD)
        return found

    @torch.no_grad()
    def generate(
        self,
        plan: Tensor | None = None,
        text: Tensor | None = None,
        *,
        rooms: int | None = None,
        p: float = 0.9,
        generator: torch.Generator | None = None,
    ) -> list[Layout]:
        """Furnish a room for each plan or text, or so many `rooms` without either.

        Categories are drawn from the `nucleus` of `p`, all else is the likeliest token.
        """
        memory = self._memory(plan, text)
        given = plan if text is None else text
        if (given is None) == (rooms is None):
            raise ValueError("SceneFormer: give plans or texts, or for a model without a condition how many rooms")
        count, device = (
            len(given) if given is not None else rooms or 0,
            next(self.parameters()).device,
        )
        objects = self._objects([], count, device)
        done = torch.zeros(count, dtype=torch.bool, device=device)
        for at in range(1, self.most + 1):
            seen = {name: of[:, : at + 1] for name, of in objects.items()}  # views: what is written is written to both
            logits = self._scored("category", seen, memory.get("category"))[0][:, at - 1]
            logits[:, self.tokens["category"] + PAD] = -torch.inf
            drawn = logits.masked_fill(~nucleus(logits, p), -torch.inf).softmax(-1)
            chosen = torch.multinomial(drawn, 1, generator=generator)[:, 0]
            done |= chosen == self.tokens["category"] + STOP
            objects["category"][~done, at] = chosen[~done]
            if done.all():
                break
            for name in STEPS[1:]:
                each = cast(Property, self.properties[name]).per_object
                for axis in range(each):
                    scores = self._scored(name, seen, memory.get(name))[0][:, each * (at - 1) + axis]
                    field = name if each == 1 else f"{name}{axis}"
                    objects[field][~done, at] = scores[:, : self.tokens[name]].argmax(-1)[~done]
        return [self._layout({name: of[i] for name, of in objects.items()}) for i in range(count)]

    def _memory(self, plan: Tensor | None, text: Tensor | None) -> dict[str, Tensor]:
        if plan is not None and text is not None:
            raise ValueError("SceneFormer: a room is made for a plan or for a text, not for both")
        given = "plan" if plan is not None else "text" if text is not None else None
        if given != self.condition:
            raise ValueError(f"SceneFormer: the model's condition is {self.condition}, and it is given {given}")
        return {name: encoder(plan if text is None else text) for name, encoder in self.encoders.items()}

    def _objects(self, rooms: Sequence[Layout], count: int = 0, device: Any = None) -> dict[str, Tensor]:
        """Start, objects, stop, and pads, of each property and axis [batch, object]."""
        if rooms and (longest := max(len(room.category) for room in rooms)) > self.most:
            raise ValueError(f"SceneFormer: a room has {longest} objects, and the model was made for {self.most}")
        fields = {"category": "category", "orientation": "orientation"}
        fields |= {f"{name}{i}": name for name in ("place", "size") for i in range(self.axes)}
        found = {}
        for field, name in fields.items():
            of = torch.full((len(rooms) or count, self.most + 2), self.tokens[name] + PAD, device=device)
            of[:, 0] = self.tokens[name] + START
            for row, room in zip(of, rooms):
                values = getattr(room, name)
                n = len(values)
                row[1 : n + 1] = values if values.ndim == 1 else values[:, int(field[-1])]
                row[n + 1] = self.tokens[name] + STOP
            found[field] = of
        return found

    def _scored(self, name: str, objects: dict[str, Tensor], memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities of each next token of a property, and which it is; a pad where nothing is asked."""
        model = cast(Property, self.properties[name])
        each, axes = model.per_object, range(self.axes)
        sequences, ahead = {}, name in ("place", "size")

        def spread(of: Tensor) -> Tensor:  # one token of an object to as many as this property has; the start is one
            return torch.cat([of[:, :1], of[:, 1:].repeat_interleave(each, 1)], 1)

        for field in model.embeddings:
            source = "category" if field == "current" else field
            if field in ("place", "size"):
                parts = torch.stack([objects[f"{field}{i}"][:, 1:] for i in axes], -1).flatten(1)
                sequences[field] = torch.cat([objects[f"{field}0"][:, :1], parts], 1)
            else:
                sequences[field] = spread(objects[source])
        wanted = sequences[name][:, 1:]
        if name != "category":  # nothing is asked of a stop
            real = sequences["category"][:, 1:] < self.tokens["category"]
            wanted = wanted.where(real, self.tokens[name] + PAD)
        shifted = {"current", *(("orientation", *(f"place{i}" for i in axes)) if ahead else ())}
        inputs = {f: of[:, 1:] if f in shifted else of[:, :-1] for f, of in sequences.items()}
        return model(inputs, memory), wanted

    def _layout(self, objects: dict[str, Tensor]) -> Layout:
        count = int((objects["category"] < self.tokens["category"]).sum())
        at = slice(1, count + 1)
        place, size = (torch.stack([objects[f"{n}{i}"][at] for i in range(self.axes)], -1) for n in ("place", "size"))
        return Layout(objects["category"][at], objects["orientation"][at], place, size)


def sceneformer(**knobs: Any) -> SceneFormer:
    """An untrained `SceneFormer` with these knobs."""
    return SceneFormer(**knobs)
