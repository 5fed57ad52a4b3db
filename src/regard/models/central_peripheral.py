"""Spatial questions about a scene, with a token for what is asked about and a map of the whole in words.

Chen et al., CVP: Central-Peripheral Vision-Inspired Multimodal Model for Spatial Reasoning (arXiv:2512.08135). A
language model reads tokens of a scene's views, each with its place in the world. Central vision: a learned token after
the question, whose last state is pulled by contrast to the objects that the question is about; what is said after it
sees it. Peripheral vision: a table of the scene's floor in words, in world axes, put before the question.

No code was found, and of the text only the abstract and summaries were at hand. Form and temperature of the contrast
are those of the model that it builds on (LaVi-Lab/Video-3D-LLM); that the token comes after the question, that no
object at all is a learned one of its own, and the weight of the contrast, 1, are our reading. Views, their encoder and
the detector that names objects and gives their boxes are left to who calls.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM


def scene_positions(places: Tensor, frequencies: int) -> Tensor:
    """Sine and cosine of each axis, of periods 2, 1, 1/2 ... of the unit. [..., axis] to [..., 2 * axis * frequency]

    In float32 at least.

    >>> import torch
    >>> from regard.models.central_peripheral import scene_positions
    >>> scene_positions(torch.tensor([0.5, 0.0, 1.0]), 1).round().abs()
    tensor([1., 0., 0., 0., 1., 1.])
    """
    exact = torch.promote_types(places.dtype, torch.float32)  # half precision has no sine of a large angle
    waves = math.pi * 2.0 ** torch.arange(frequencies, device=places.device, dtype=exact)
    angles = places.to(exact)[..., None, :] * waves[:, None]
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


def inside(places: Tensor, boxes: Tensor) -> Tensor:
    """Which tokens lie in which object's box, edges with it. boolean [batch, object, token]

    places: [batch, token, axis]; boxes: [batch, object, 2 * axis], the lowest corner and the highest. ValueError for
    other shapes.
    """
    if places.ndim != 3 or boxes.ndim != 3 or len(places) != len(boxes) or boxes.shape[-1] != 2 * places.shape[-1]:
        raise ValueError(
            f"inside: places are [batch, token, axis] and boxes [batch, object, 2 * axis]; got {list(places.shape)}, "
            f"{list(boxes.shape)}"
        )
    low, high = boxes[:, :, None].chunk(2, -1)
    return ((places[:, None] >= low) & (places[:, None] <= high)).all(-1)


def allocentric_grid(
    names: Sequence[str],
    places: Tensor,
    *,
    cells: int = 8,
    bounds: tuple[Sequence[float], Sequence[float]] | None = None,
) -> str:
    """The objects of each cell of the floor that has any, a line a cell: `cell (2, 5): chair, lamp`.

    names: of objects; places: in the world [object, axis], of which the first two are the floor's; a cell is numbered
    along the first, then the second, from 0. bounds: the lowest and the highest corner of the floor; without, of the
    objects. What lies outside counts for the nearest cell. ValueError without names, with more or fewer places, and for
    bounds that are not two corners.

    >>> import torch
    >>> from regard.models.central_peripheral import allocentric_grid
    >>> print(allocentric_grid(["lamp", "chair", "bed"], torch.tensor([[0.3, 0.6], [0.3, 0.6], [0.9, 0.1]]), cells=4,
    ...                        bounds=((0, 0), (1, 1))))
    cell (1, 2): chair, lamp
    cell (3, 0): bed
    """
    if not names or cells < 1 or places.ndim != 2 or places.shape[1] < 2 or len(names) != len(places):
        raise ValueError(
            f"allocentric_grid: one name or more, with a place [object, axis] each, and 1 cell or more; got "
            f"{len(names)} names, {list(places.shape)}, {cells}"
        )
    if not places.isfinite().all():
        raise ValueError("allocentric_grid: places hold values that are not finite")
    floor = places[:, :2].double()
    corners = (floor.amin(0), floor.amax(0)) if bounds is None else bounds
    low, high = (torch.as_tensor(corner).double() for corner in corners)
    if (
        low.shape != (2,)
        or high.shape != (2,)
        or not bool((low <= high).all())
        or not bool((high - low).isfinite().all())
    ):
        raise ValueError(
            f"allocentric_grid: bounds are the floor's lowest and highest corner, 2 values each; got {bounds}"
        )
    at = ((floor - low) / (high - low).clamp_min(1e-9) * cells).floor().clamp(0, cells - 1).long()
    found: dict[tuple[int, ...], list[str]] = {}
    for cell, name in zip(at.tolist(), names, strict=True):
        found.setdefault(tuple(cell), []).append(name)
    return "\n".join(f"cell ({x}, {y}): {', '.join(sorted(found[x, y]))}" for x, y in sorted(found))


class AffinityHead(nn.Module):
    """How much a state is about each object: cosines over a temperature, the last one of there being no such object.

    dim: of states and objects alike. [batch, dim], [batch, object, dim] to [batch, object + 1]
    """

    def __init__(self, dim: int, *, temperature: float = 0.07) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"AffinityHead: temperature is above 0; got {temperature}")
        self.state, self.object = (
            nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.LayerNorm(dim), nn.Linear(dim, dim)) for _ in range(2)
        )
        self.none = nn.Parameter(0.02 * torch.randn(dim))
        self.temperature = temperature

    def forward(self, state: Tensor, objects: Tensor, there: Tensor | None = None) -> Tensor:
        """there: boolean [batch, object], False for what fills up, which scores minus infinity."""
        every = torch.cat([objects, self.none.to(objects).expand(len(objects), 1, -1)], 1)
        scores = F.cosine_similarity(self.state(state)[:, None], self.object(every), dim=-1) / self.temperature
        return scores if there is None else scores.masked_fill(~F.pad(there, (0, 1), value=True), -torch.inf)


def contrast(scores: Tensor, targets: Tensor) -> Tensor:
    """Minus the logarithm of the share of those that are asked about, in nats; a mean over the batch.

    scores: [batch, object + 1], the last of there being none; targets: boolean [batch, object]. A row without a target
    is about none.

    >>> import torch
    >>> from regard.models.central_peripheral import contrast
    >>> contrast(torch.tensor([[1.0, 0.0, -torch.inf]]), torch.tensor([[True, False]]))
    tensor(0.3133)
    """
    if targets.dtype != torch.bool or targets.shape != (len(scores), scores.shape[1] - 1):
        raise ValueError(
            f"contrast: targets are boolean {[len(scores), scores.shape[1] - 1]}; got {targets.dtype} "
            f"{list(targets.shape)}"
        )
    wanted = torch.cat([targets, ~targets.any(1, keepdim=True)], 1)
    if (scores.masked_fill(~wanted, -torch.inf).amax(1) == -torch.inf).any():
        raise ValueError("contrast: a target is an object that is not there")
    return (scores.logsumexp(1) - scores.masked_fill(~wanted, -torch.inf).logsumexp(1)).mean()


@dataclass(frozen=True)
class SceneConfig:
    """What a `CentralPeripheral` reads beside words."""

    features: int  # of a visual token
    axes: int = 3
    frequencies: int = 8  # of a place
    token: bool = True  # whether there is a token for what is asked about
    temperature: float = 0.07
    weight: float = 1.0  # of the contrast


class Reasoned(NamedTuple):
    """What is said, and what it is about."""

    logits: Tensor  # position i is to say word i of the answer [batch, answer + 1, vocabulary]
    scores: Tensor | None  # of objects, the last of none; None without the token or objects [batch, object + 1]


class CentralPeripheral(nn.Module, PyTorchModelHubMixin):
    """Answers about a scene, from tokens with places, words, and a token of what the words are about.

    language: a causal model of transformers, such as LlamaForCausalLM. `regard.record` sees its attention; the token is
    the last before the answer. `from_pretrained(folder, language=...)` reads what `save_pretrained` wrote.

    >>> import torch
    >>> from regard.models.central_peripheral import central_peripheral
    >>> model = central_peripheral(features=4, vocab_size=10, hidden_size=16, num_hidden_layers=2)
    >>> objects = torch.tensor([[[True, False, False], [False, True, True]]])
    >>> found = model(torch.rand(1, 3, 4), torch.rand(1, 3, 3), torch.tensor([[1, 2]]), objects=objects)
    >>> found.logits.shape, found.scores.shape
    (torch.Size([1, 1, 10]), torch.Size([1, 3]))
    """

    def __init__(self, language: Any, config: SceneConfig) -> None:
        super().__init__()
        if not hasattr(language, "lm_head") or not hasattr(language, "model"):
            raise TypeError(
                f"CentralPeripheral: takes a causal language model with `model` and `lm_head`, such as "
                f"LlamaForCausalLM; got {type(language).__name__}"
            )
        dim = language.config.get_text_config().hidden_size
        self.language, self.config = language, config
        self.see, self.place = nn.Linear(config.features, dim), nn.Linear(2 * config.axes * config.frequencies, dim)
        if config.token:
            self.token = nn.Parameter(0.02 * torch.randn(dim))
            self.head = AffinityHead(dim, temperature=config.temperature)

    def forward(
        self,
        tokens: Tensor,
        places: Tensor,
        words: Tensor,
        answers: Tensor | None = None,
        *,
        objects: Tensor | None = None,
        mask: Tensor | None = None,
        words_mask: Tensor | None = None,
    ) -> Reasoned:
        """tokens: [batch, token, feature]; places: in the world [batch, token, axis]; words: ids of the grid's text, if
        any, and then the question [batch, word]; answers: ids [batch, answer].

        objects: boolean [batch, object, token], which tokens are of which object (see `inside`); of rows that are
        filled up, objects without a token come last. mask, words_mask: boolean [batch, token] and [batch, word], False
        for what fills up and is not read, whatever it holds. ValueError where an object without a token is not last,
        and for shapes that do not fit.
        """
        for name, given in (("words", words), ("answers", answers)):
            if given is not None and (given.ndim != 2 or len(given) != len(tokens)):
                raise ValueError(f"CentralPeripheral: {name} are [{len(tokens)}, word]; got {list(given.shape)}")
        for name, given, of in (("mask", mask, tokens), ("words_mask", words_mask, words)):
            if given is not None and (given.dtype != torch.bool or given.shape != of.shape[:2]):
                raise ValueError(
                    f"CentralPeripheral: {name} is boolean {list(of.shape[:2])}; got {given.dtype} {list(given.shape)}"
                )
        if words_mask is not None and not self.config.token and not words_mask[:, -1].all():
            raise ValueError("CentralPeripheral: without a token of its own, the last word of each row is what answers")
        seen = self._seen(tokens, places, mask)
        ids = words if answers is None else torch.cat([words, answers], 1)
        said = self.language.get_input_embeddings()(ids)
        asked = words.shape[1]
        marks = [self.token.to(said).expand(len(said), 1, -1)] if self.config.token else []
        every = torch.cat([seen, said[:, :asked], *marks, said[:, asked:]], 1)
        after = every.shape[1] - seen.shape[1] - asked
        real = torch.cat(
            [
                every.new_ones(seen.shape[:2], dtype=torch.bool) if mask is None else mask,
                every.new_ones(words.shape, dtype=torch.bool) if words_mask is None else words_mask,
                every.new_ones(len(every), after, dtype=torch.bool),
            ],
            1,
        )
        positions = (real.cumsum(1) - 1).clamp_min(0)
        states = self.language.model(
            inputs_embeds=every, attention_mask=real.long(), position_ids=positions
        ).last_hidden_state
        told = states.shape[1] - (0 if answers is None else answers.shape[1]) - 1  # the last before the answer
        logits = self.language.lm_head(states[:, told:])
        if objects is None or not self.config.token:
            return Reasoned(logits, None)
        return Reasoned(logits, self.head(states[:, told], *self._objects(seen, objects, real[:, : seen.shape[1]])))

    def loss(self, found: Reasoned, answers: Tensor, targets: Tensor | None = None) -> Tensor:
        """Cross entropy of the answer's words, and `weight` times the contrast where targets are given; in nats.

        answers: [batch, answer], as `forward` had them; targets: boolean [batch, object].
        """
        if not 1 <= answers.shape[1] <= found.logits.shape[1]:
            raise ValueError(
                f"loss: answers have 1 to {found.logits.shape[1]} words, as the logits are; got {answers.shape[1]}"
            )
        said = F.cross_entropy(found.logits[:, : answers.shape[1]].flatten(0, 1), answers.flatten())
        if targets is None:
            return said
        if found.scores is None:
            raise ValueError("loss: targets need a model with the token, and objects that it was given")
        return said + self.config.weight * contrast(found.scores, targets)

    def _seen(self, tokens: Tensor, places: Tensor, mask: Tensor | None = None) -> Tensor:
        c = self.config
        if (
            not len(tokens)
            or tokens.ndim != 3
            or tokens.shape[-1] != c.features
            or places.shape != (*tokens.shape[:2], c.axes)
        ):
            raise ValueError(
                f"CentralPeripheral: tokens are [batch, token, {c.features}] and places [batch, token, {c.axes}], one "
                f"row or more; got {list(tokens.shape)} and {list(places.shape)}"
            )
        if mask is not None:  # what is not read is not multiplied by 0 either, which leaves NaN as it is
            tokens, places = (x.masked_fill(~mask[..., None], 0) for x in (tokens, places))
        return self.see(tokens) + self.place(scene_positions(places, c.frequencies).to(tokens))

    def _objects(self, seen: Tensor, objects: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of each object's tokens [batch, object, dim], and which objects are there [batch, object]."""
        if objects.dtype != torch.bool or objects.ndim != 3 or objects.shape[::2] != seen.shape[:2]:
            raise ValueError(
                f"CentralPeripheral: objects are boolean [{len(seen)}, object, {seen.shape[1]}]; got {objects.dtype} "
                f"{list(objects.shape)}"
            )
        own = (objects & mask[:, None]).to(seen)
        count = own.sum(-1)
        there = count > 0
        if (there[:, 1:] & ~there[:, :-1]).any() or not there.any(1).all():
            raise ValueError(
                "CentralPeripheral: an object has no token; leave it out, or put it last as a filled row's"
            )
        return own @ seen / count.clamp_min(1)[..., None], there


def central_peripheral(
    features: int,
    *,
    axes: int = 3,
    token: bool = True,
    frequencies: int = 8,
    temperature: float = 0.07,
    weight: float = 1.0,
    **sizes: Any,
) -> CentralPeripheral:
    """One around an untrained Llama, with knobs as of `SceneConfig`; sizes: those of `LlamaConfig`, 4 heads and
    feed-forward layers 4 times as wide unless given.
    """
    wide = sizes.get("hidden_size", 64)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    known = {"hidden_size": wide, "num_attention_heads": 4, "intermediate_size": 4 * wide, "num_hidden_layers": 4}
    language = LlamaForCausalLM(LlamaConfig(**{**ids, **known, **sizes}))
    config = SceneConfig(features, axes, frequencies, token, temperature, weight)
    return CentralPeripheral(language, config)
