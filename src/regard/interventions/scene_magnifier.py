"""Fine tokens of the regions that the layer before looked at, beside the coarse ones of the whole scene.

Zhi et al., LSceneLLM: Enhancing Large 3D Scene Understanding Using Adaptive Visual Preferences (arXiv:2412.01292, CVPR
2025), and the authors' code. A scene is some coarse tokens of a prompt, and several fine tokens for each of them that
never enter the sequence. From the layer `start` on, each text row chooses coarse tokens: its weights on them, summed
over heads and brought to 0 to 1 between the row's least and largest, are above `threshold`. In the next layer the row
attends to the fine tokens of those too. Weights that choose are the plain ones, without fine tokens; other rows are as
they were. Fine tokens have keys and values of their own in each layer, and the place of their coarse token.

In the paper these are linear maps of the fine tokens as they are embedded, trained with the whole model: `Projections`,
whose layers `start` + 1 and later are used. During its warm-up, the output is `share` of the new one.

Ours, without training: `magnified` takes the keys and values that the model itself has of the four quarters of a
picture, each shown to it alone at its full resolution, so that four fine tokens stand for a coarse one. They see what
their quarter shows and what of the prompt comes before, but not one another's quarters. Also ours: fewer key heads
than heads, sinks, softcap and bias, which fine tokens share with their coarse one. The paper's `start` is 8 of 32
layers; here a quarter of those there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..call import Call
from ..kernels import Factor
from ..loading import parameters
from ..seam import intervene
from ..tokens import Tokens
from ._method import STACK, Method, image_keys, layers
from ._picture import Box, cropped, finer, given, one_picture, seen

NAME = "scene-magnifier"
QUARTERS = tuple((row, column) for row in range(2) for column in range(2))


class Fine(NamedTuple):
    """Keys and values of fine tokens, those of the first coarse token first, as many of each.

    places: of the coarse tokens in the prompt, counted from its first position, padding included. first: the first row
    that chooses, mostly of the first word after the scene. last: the last whose output changes; None for all to come.
    """

    keys: Mapping[int, Tensor]  # by layer, [batch, kv_head, fine, dim], rotated to the places of their coarse tokens
    values: Mapping[int, Tensor]
    places: Tensor  # [batch, coarse]
    first: Tensor  # [batch]
    last: Tensor | None = None


@dataclass(kw_only=True)
class scene_magnifier(Method):
    """Let words attend to fine tokens of the regions that they looked at in the layer before.

    fine: as `magnified` finds them for a prompt and its pictures, or as `Projections` makes them, then with gradient.
    start: the first layer whose weights choose; None for that after the first quarter. threshold: from 0 to 1, of the
    row's range; with 1 nothing is chosen and nothing changes. share: of the output with fine tokens, in 0 to 1.

    Inside the block, `selected` holds which fine tokens the newest layer chose, [batch, query, fine]. `record` sees the
    plain weights, without fine tokens.

    `fit(model, inputs, processor, images=...)` makes it with `magnified`, for `generate`. ValueError where there is no
    layer after `start`, `fine` has not its keys or is of another batch, a layer does not see the whole scene, or
    weights were edited by a method before.

    >>> import regard
    >>> from regard.interventions.scene_magnifier import scene_magnifier
    >>> from regard.zoo.recipes.describer import asked, pictures, tempting
    >>> model, processor = regard.load("describer")
    >>> inputs = asked(processor, pictures(tempting(1)), ["is there a fork?"])
    >>> with regard.intervene(model, scene_magnifier.fit(model, inputs, processor)):
    ...     ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    """

    off: ClassVar[Mapping[str, Any]] = {"threshold": 1.0}
    needs = "fine tokens of the pictures, of their quarters"

    fine: Fine
    start: int | None = None
    threshold: float = 96 / 255
    share: float = 1.0
    selected: Tensor | None = field(default=None, init=False, repr=False)
    _layers: list[int] = field(default_factory=list, init=False, repr=False)  # those that choose or take, in order

    def __post_init__(self) -> None:
        for name in ("threshold", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{NAME}: {name} is from 0 to 1, not {getattr(self, name)}")
        coarse = self.fine.places.shape[1]
        for layer, key in self.fine.keys.items():
            if not coarse or key.shape[2] % coarse or not key.shape[2]:
                raise ValueError(
                    f"{NAME}: {key.shape[2]} fine tokens of layer {layer} do not divide among {coarse} coarse ones: "
                    f"give as many of each"
                )

    @classmethod
    def fit(cls, model: nn.Module, inputs: Mapping[str, Any], processor: Any = None, **knobs: Any) -> Self:
        """With fine tokens of the pictures that the model is given, or of `images`, those before the processor."""
        images = knobs.pop("images", None)
        fine = knobs.pop("fine", None)
        return cls(fine=magnified(model, inputs, processor, images=images) if fine is None else fine, **knobs)

    def begin(self, model: nn.Module) -> None:
        known = layers(model, NAME)
        start = first_layer(known) if self.start is None else self.start
        self.selected, self._layers = None, known[known.index(start) :] if start in known else []
        if len(self._layers) < 2:
            raise ValueError(
                f"{NAME}: {type(model).__name__} has no layer after start={start} that could take fine tokens; its "
                f"layers are {known[0]} to {known[-1]}"
            )
        if missing := set(self._layers[1:]) - (self.fine.keys.keys() & self.fine.values.keys()):
            raise ValueError(f"{NAME}: `fine` has no keys and values for layer {min(missing)}, after start={start}")

    def output(self, call: Call, output: Tensor) -> Tensor:
        if call.site.stack != STACK or call.site.layer not in self._layers:
            return output
        rows, first = self._text(call)
        if first == rows.shape[1]:
            self.selected = None
            return output
        chosen = self.selected
        if call.site.layer != self._layers[0] and chosen is not None and bool(chosen.any()):
            output = self._magnified(call, output, chosen, rows, first)
        if call.site.layer != self._layers[-1]:
            self.selected = self._choose(call, first)
        return output

    def _text(self, call: Call) -> tuple[Tensor, int]:
        """Which queries of each row choose, [batch, query], and the first of any."""
        begins = self.fine.first
        if len(begins) != len(call.query):
            raise ValueError(
                f"{NAME} was fitted to a batch of {len(begins)}, and the model reads {len(call.query)} rows"
            )
        at = torch.arange(call.query.shape[2], device=call.query.device) + call.query_start
        rows = at >= begins.to(at)[:, None]
        some = rows.any(0).nonzero()
        return rows, int(some[0]) if len(some) else rows.shape[1]

    def _coarse(self, call: Call) -> Tensor:
        """Which keys the coarse tokens are. [batch, coarse]"""
        at = self.fine.places.to(call.key.device) - call.key_start
        if call.positions is not None or bool((at < 0).any()) or bool((at >= call.key.shape[2]).any()):
            raise ValueError(f"{NAME}: {call.site} does not see the whole scene, of which it has to choose regions")
        return at

    def _choose(self, call: Call, first: int) -> Tensor:
        coarse, rows = self._coarse(call), self._text(call)[0]
        n, found = rows.shape[1], []
        for a in range(first, n, 64):  # a block at a time: the map of a long text is never whole
            weights = call.weights.rows(a, min(a + 64, n)).detach().float().sum(1)  # [batch, query, key]
            found.append(chosen(weights.gather(2, coarse[:, None].expand(-1, weights.shape[1], -1)), self.threshold))
        which = F.pad(torch.cat(found, 1), (0, 0, first, 0)) & rows[..., None]
        return which.repeat_interleave(self._each, -1)

    @property
    def _each(self) -> int:
        """How many fine tokens a coarse one has."""
        return next(iter(self.fine.keys.values())).shape[2] // self.fine.places.shape[1]

    def _magnified(self, call: Call, output: Tensor, chosen: Tensor, rows: Tensor, first: int) -> Tensor:
        if call.edits:
            raise ValueError(
                f"{NAME} needs scores, and of {call.site} there are weights only: the module computes them by itself, "
                f"or a method that edits them comes before; put {NAME} first, in a block around"
            )
        layer = call.site.layer
        of = self._coarse(call).repeat_interleave(self._each, 1)
        key, value = (some[layer].to(call.key) for some in (self.fine.keys, self.fine.values))
        new = joined(call, key, value, chosen[:, first:], of, first).output.to(output)
        last = self.fine.last
        at = torch.arange(rows.shape[1], device=rows.device) + call.query_start
        taking = chosen.any(-1) & (rows if last is None else rows & (at <= last.to(at)[:, None]))
        whole = torch.cat([output[:, :, :first], torch.lerp(output[:, :, first:], new, self.share)], 2)
        return torch.where(taking[:, None, :, None], whole, output)


def first_layer(known: Sequence[int]) -> int:
    """The first layer after a quarter of these."""
    return known[len(known) // 4]


def chosen(weights: Tensor, threshold: float = 96 / 255) -> Tensor:
    """Which coarse tokens each row chooses. weights: on them, [..., coarse]. Boolean; none where all are the same.

    >>> import torch
    >>> chosen(torch.tensor([0.0, 0.1, 0.2, 0.5])).tolist()
    [False, False, True, True]
    """
    low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
    return (weights - low) / (high - low) > threshold  # 0 / 0 is above nothing


def joined(call: Call, key: Tensor, value: Tensor, chosen: Tensor, of: Tensor, first: int) -> Call:
    """The call of queries from `first` on, to whose keys fine ones come, each seen by the rows that chose it.

    key, value: [batch, kv_head, fine, dim]. chosen: [batch, query, fine] boolean. of: the number of the key of which
    each is a part, [batch, fine]; what is added to scores of that is added to its own.
    """
    batch, n, n_key = len(call.key), call.query.shape[2], call.key.shape[2]

    def longer(keys: Tensor) -> Tensor:
        """Numbers of keys, and of the fine ones the same as of their coarse ones. [batch, head|1, query|1, key]"""
        keys = keys[(None,) * (4 - keys.ndim)]
        keys = (keys[:, :, first:] if keys.shape[2] > 1 else keys).expand(batch, -1, -1, n_key)
        own = of[:, None, None].expand(-1, *keys.shape[1:3], -1)
        return torch.cat([keys, keys.gather(3, own)], 3)

    own = torch.ones(n - first, n_key, dtype=torch.bool, device=call.key.device)
    own = own.tril(first) if call.causal else own
    seen = torch.cat([own.expand(batch, -1, -1), chosen], 2)[:, None]
    mask = seen
    if call.mask is not None:
        cut = call.mask[(None,) * (4 - call.mask.ndim)][..., :n_key]
        mask = longer(cut)
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
    factors = tuple(Factor(rows[:, :, first:], longer(keys[:, :, None])[:, :, 0]) for rows, keys in call.factors)
    sinks = call.sinks if call.sinks is None or call.sinks.ndim < 4 else call.sinks[:, :, first:]
    return call.but(
        query=call.query[:, :, first:],
        key=torch.cat([call.key, key], 2),
        value=torch.cat([call.value, value], 2),
        mask=mask,
        causal=False,
        bias=None if call.bias is None else longer(call.bias[..., :n_key]),
        factors=factors,
        sinks=sinks,
        tokens=None,
        query_tokens=None,
    )


class Projections(nn.Module):
    """Trained keys and values of fine tokens, for some layers: the paper's. Given the model's own maps, it begins with
    those.

    >>> import torch
    >>> made = Projections(8, kv_heads=1, head_dim=4, layers=[1, 2])
    >>> angles = torch.ones(1, 3, 4), torch.zeros(1, 3, 4)  # of positions that turn nothing
    >>> fine = made(torch.randn(1, 3, 2, 8), angles, places=torch.tensor([[0, 1, 2]]), first=torch.tensor([3]))
    >>> fine.keys[2].shape
    torch.Size([1, 1, 6, 4])
    """

    def __init__(self, dim: int, *, kv_heads: int, head_dim: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.keys, self.values = (
            nn.ModuleDict({str(layer): nn.Linear(dim, kv_heads * head_dim, bias=False) for layer in layers})
            for _ in range(2)
        )

    def forward(
        self,
        dense: Tensor,
        angles: tuple[Tensor, Tensor],
        *,
        places: Tensor,
        first: Tensor,
        last: Tensor | None = None,
    ) -> Fine:
        """dense: fine tokens as embedded, [batch, coarse, fine of it, width]. angles: cosines and sines of the coarse
        tokens' positions, [batch|1, coarse, dim], as the model's rotary embedding makes them. The rest as in `Fine`.
        """
        each = dense.shape[2]
        flat = dense.flatten(1, 2)
        cos, sin = (a.repeat_interleave(each, 1)[:, None] for a in angles)

        def heads(made: Tensor) -> Tensor:
            return made.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)

        keys, values = {}, {}
        for layer, project in self.keys.items():
            key = heads(project(flat))
            one, other = key.chunk(2, -1)
            keys[int(layer)] = key * cos + torch.cat([-other, one], -1) * sin
            values[int(layer)] = heads(self.values[layer](flat))
        return Fine(keys, values, places, first, last)


@torch.no_grad()
def magnified(
    model: nn.Module, inputs: Mapping[str, Any], processor: Any, *, images: Sequence[Image.Image] | None = None
) -> Fine:
    """Keys and values that the model has of the quarters of each row's picture, four runs of the model.

    inputs: as for `generate`, which counts positions from the first word that is no padding. images: the pictures
    before the processor, one a row, where they are finer than the model sees them: only then do quarters bring detail.
    ValueError where the model reads no image tokens, a row has not one picture, its tokens are no grid of an even
    number of rows and columns, or positions are not numbers of the words, as in Qwen2-VL.
    """
    image = one_picture(model, inputs, NAME)
    kind = type(model).__name__
    if inputs.get("image_grid_thw") is not None or "position_ids" not in parameters(model):
        raise ValueError(f"{NAME} gives fine tokens the positions of coarse ones, and {kind} takes no such positions")
    pictures = finer(seen(model, inputs, processor, NAME), images, NAME)
    sizes = [picture.size for picture in seen(model, inputs, processor, NAME)]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given_tokens = _tokens(model, {**inputs, "attention_mask": mask, "position_ids": positions})
    grid = _grid(given_tokens, image.to(given_tokens.roles.device), kind)  # [batch, row, column]
    batch, high, wide = grid.shape
    grid = grid.to(positions.device)
    row, column = (torch.arange(n, device=grid.device) for n in (high, wide))
    reader: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for down, right in QUARTERS:
        box = Box(right / 2, down / 2, (right + 1) / 2, (down + 1) / 2)
        parts = [cropped(picture, box, size) for picture, size in zip(pictures, sizes)]
        coarse = grid[:, (down * high + row) // 2][:, :, (right * wide + column) // 2].flatten(1)
        placed = positions.scatter(1, grid.flatten(1), positions.gather(1, coarse))
        quarter = given(model, inputs, processor, parts, NAME)
        looking = _Reader(grid.flatten(1))
        with intervene(model, looking):
            model(**{**quarter, "attention_mask": mask, "position_ids": placed}, use_cache=False)
        for layer, both in looking.found.items():
            reader.setdefault(layer, []).append(both)
    keys, values = ({n: _by_coarse([b[i] for b in some], high, wide) for n, some in reader.items()} for i in range(2))
    end = grid.flatten(1).amax(1) + 1
    return Fine(keys, values, grid.flatten(1), end)


def _by_coarse(quarters: Sequence[Tensor], high: int, wide: int) -> Tensor:
    """Of four quarters [batch, kv_head, row and column, dim], in the order of coarse tokens, four of each."""
    whole = torch.stack([q.unflatten(2, (high, wide)) for q in quarters], 2).unflatten(2, (2, 2))
    whole = whole.permute(0, 1, 2, 4, 3, 5, 6).flatten(2, 3).flatten(3, 4)  # [batch, kv_head, 2 high, 2 wide, dim]
    cells = whole.unflatten(2, (high, 2)).unflatten(4, (wide, 2))
    return cells.transpose(3, 4).flatten(2, 5)


def _grid(tokens: Tokens, image: Tensor, kind: str) -> Tensor:
    """Where in the prompt the token of each part of the picture stands. [batch, row, column]"""
    places = [tokens.places[i, its, 1:3] for i, its in enumerate(image)]
    sizes = {tuple(int(n) for n in (p.amax(0) + 1)) if len(p) else (0, 0) for p in places}
    high, wide = next(iter(sizes))
    if len(sizes) > 1 or any(bool((p < 0).any()) or len(p) != high * wide for p in places):
        raise ValueError(
            f"{NAME}: image tokens of {kind} are no grid of one size in all rows, so they have no quarters"
        )
    if high % 2 or wide % 2:
        raise ValueError(f"{NAME}: image tokens of {kind} are {high} x {wide}, which do not divide into quarters")
    grid = torch.empty(len(image), high, wide, dtype=torch.long)
    for i, (its, place) in enumerate(zip(image, places)):
        grid[i, place[:, 0], place[:, 1]] = its.nonzero()[:, 0].to(grid.device)
    return grid


def _tokens(model: nn.Module, inputs: Mapping[str, Any]) -> Tokens:
    looking = _Reader(None)
    with intervene(model, looking):
        model(**inputs, use_cache=False)
    if looking.tokens is None:
        raise ValueError(f"{NAME}: no layer of {type(model).__name__} sees image tokens")
    return looking.tokens


class _Reader:
    """Gathers keys and values of some positions [batch, key] in each layer, and what the tokens are."""

    def __init__(self, at: Tensor | None) -> None:
        self.at, self.tokens = at, None
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def inputs(self, call: Call) -> Call:
        if image_keys(call) is None:
            return call
        self.tokens: Tokens | None = call.tokens
        if self.at is not None:
            at = self.at.to(call.key.device)[:, None, :, None]
            both = (some.gather(2, at.expand(-1, some.shape[1], -1, some.shape[3])) for some in (call.key, call.value))
            self.found[call.site.layer] = tuple(both)  # type: ignore[assignment]
        return call
