"""States of pictures and words are turned towards where features are stable and captions are true.

Liu, Ye, Xing and Zou, Reducing Hallucinations in Vision-Language Models via Latent Space Steering (arXiv:2410.15778),
by the authors' code; the paper's text was not at hand. Visual: how far the mean of a tower's states over copies of a
picture, in which nearly all patches are its mean colour, is from its states of the clean picture, by layer and token.
Textual: how far the states at the last word are under a right caption from those under one that names what is absent.
A direction is the mean of such differences plus their first principal component, of length 1. What a feed-forward
network gives, x, becomes |x| times the unit vector along x / |x| + alpha / 10 times the unit direction.

Their code takes the component of the visual part over runs of layer x width numbers of [layer, token, width], which are
no tokens; so does `group="flat"`, and `group="token"` takes it for each token, which must have been meant. Captions of
`fit` are of generated scenes: in a wrong one, one shape is another that the scene lacks. The paper takes 50 captioned
photographs, each with a caption into which a language model has put objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, islice
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..call import Site
from ..data.scenes import SHAPES, Dials, caption, render, sample
from ..seam import intervene
from ._method import STACK, Method, image_ids, layers, picture_tower

STEP = 0.1
Group = Literal["flat", "token"]
SCENES = Dials(objects=(2, 4))


class vti(Method):
    """Turn what feed-forward networks give, in the tower by `visual`, in the language model by `textual`.

    visual: [layer, token, dim], textual: [layer, dim], the first layer being the embedding, as `visual_direction` and
    `textual_direction` give them; None leaves that part alone. alpha_image, alpha_text: how far, 0 not at all; lengths
    stay as they are.

    ValueError where both are None, or they are not of the model's layers, tokens and widths.

    >>> import regard, torch
    >>> from regard.interventions.vti import turned
    >>> print(turned(torch.tensor([4.0, 0.0]), torch.tensor([0.0, 3.0]), 0.9))
    tensor([3.9839, 0.3586])
    """

    off: ClassVar[Mapping[str, Any]] = {"alpha_image": 0.0, "alpha_text": 0.0}
    needs = "directions, from generated scenes and captions"

    def __init__(
        self,
        *,
        visual: Tensor | None = None,
        textual: Tensor | None = None,
        alpha_image: float = 0.9,
        alpha_text: float = 0.9,
    ) -> None:
        if visual is None and textual is None:
            raise ValueError("vti: give a visual direction, a textual one, or both; or let `fit` find them")
        self.visual, self.textual = visual, textual
        self.alpha_image, self.alpha_text = alpha_image, alpha_text
        self._tower = ""

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        inputs: Mapping[str, Any],
        processor: Any = None,
        *,
        n: int = 50,
        seed: int = 0,
        **knobs: Any,
    ) -> Self:
        """Without directions, those of `n` generated scenes, described after the prompt of the first row of `inputs`.

        processor: of the model, for pictures and captions.
        """
        if "visual" not in knobs and "textual" not in knobs:
            layers(model, "vti")
            image_ids(model, "vti")
            pixels, right, wrong = demonstrations(inputs, processor, n=n, seed=seed)
            knobs["visual"] = visual_direction(model, pixels, seed=seed)
            knobs["textual"] = textual_direction(model, right, wrong)
        return cls(**knobs)

    def begin(self, model: nn.Module) -> None:
        known = layers(model, "vti")
        self._tower = ""
        if self.visual is not None:
            _, self._tower, of_pictures = picture_tower(model, "vti")
            _check("visual", self.visual, 3, of_pictures, model)
        if self.textual is not None:
            _check("textual", self.textual, 2, known, model)

    def mlp(self, site: Site, output: Tensor) -> Tensor:
        if self.visual is not None and site.stack == self._tower:
            direction, alpha = self.visual[site.layer + 1], self.alpha_image
        elif self.textual is not None and site.stack == STACK:
            direction, alpha = self.textual[site.layer + 1], self.alpha_text
        else:
            return output
        if direction.shape != output.shape[-direction.ndim :]:
            raise ValueError(
                f"vti: the direction of {site} is of shape {list(direction.shape)}, and it gives "
                f"{list(output.shape[-direction.ndim :])}: find it on this model, and on pictures of this size"
            )
        return turned(output, direction.to(output), alpha) if alpha else output


def turned(states: Tensor, direction: Tensor, alpha: float) -> Tensor:
    """States of the same lengths, turned towards a direction. [..., dim]"""
    length = states.norm(dim=-1, keepdim=True)
    moved = F.normalize(states, dim=-1) + STEP * alpha * F.normalize(direction, dim=-1)
    return length * F.normalize(moved, dim=-1)


def direction(differences: Tensor) -> Tensor:
    """Mean of differences, plus their first principal component, of length 1. [number] of [demonstration, number]

    Of the component's two signs, the one with which the demonstration that has most of it has it with a plus.
    ValueError for fewer than two demonstrations, which have no component.
    """
    if len(differences) < 2:
        raise ValueError(f"vti: a direction is found on two demonstrations or more, not {len(differences)}")
    mean = differences.mean(0)
    left, _, right = torch.linalg.svd(differences - mean, full_matrices=False)
    most = left[left[:, 0].abs().argmax(), 0]
    return mean + torch.where(most < 0, -1.0, 1.0) * right[0]


def of_pictures(corrupted: Tensor, clean: Tensor, *, group: Group = "flat") -> Tensor:
    """The visual direction [layer, token, dim], of mean states of masked copies and states of clean pictures, both
    [demonstration, layer, token, dim]. group: see the module.
    """
    if group not in ("flat", "token"):
        raise ValueError(f"vti: group is flat or token, not {group!r}")
    apart = corrupted - clean
    n, depth, tokens, width = apart.shape
    if group == "token":
        found = torch.stack([direction(apart[:, :, i].flatten(1)) for i in range(tokens)])
        return found.unflatten(1, (depth, width)).transpose(0, 1)
    runs = apart.reshape(n, tokens, depth * width)
    return torch.stack([direction(runs[:, i]) for i in range(tokens)]).reshape(depth, tokens, width)


@torch.no_grad()
def visual_direction(
    model: nn.Module, pictures: Tensor, *, trials: int = 50, ratio: float = 0.99, group: Group = "flat", seed: int = 0
) -> Tensor:
    """How a tower's states move when most of a picture is its mean colour. [layer, token, dim]

    pictures: as the model is given them, `pixel_values` [batch, channel, row, column], two or more. trials: masked
    copies of each. ratio: share of patches, of the tower's size, that are masked.
    """
    tower, stack, _ = picture_tower(model, "vti")
    if pictures.ndim != 4:
        raise ValueError(
            f"vti: pictures are [batch, channel, row, column], all of one size; {type(model).__name__} is given "
            f"{list(pictures.shape)}"
        )
    config: Any = tower.config
    chance = torch.Generator().manual_seed(seed)

    def states(pixels: Tensor) -> Tensor:
        reader = _States(stack)
        with intervene(model, reader):
            tower(pixel_values=pixels)
        return torch.stack(reader.found, 1).float()

    def mean(picture: Tensor) -> Tensor:
        masked = torch.stack([_masked(picture, config.patch_size, ratio, chance) for _ in range(trials)])
        return states(masked).mean(0)

    return of_pictures(torch.stack([mean(picture) for picture in pictures]), states(pictures), group=group)


@torch.no_grad()
def textual_direction(model: nn.Module, right: Mapping[str, Any], wrong: Mapping[str, Any]) -> Tensor:
    """From states at the last word of wrong captions to those of right ones. [layer, dim]

    right, wrong: inputs of the model, row by row the same picture and prompt with either caption.
    """
    return direction_of_texts(*(_last(model, inputs) for inputs in (right, wrong)))


def direction_of_texts(right: Tensor, wrong: Tensor) -> Tensor:
    """The same, of states [demonstration, layer, dim]."""
    return direction((right - wrong).flatten(1)).unflatten(0, right.shape[1:])


def demonstrations(
    inputs: Mapping[str, Any], processor: Any, *, n: int = 50, seed: int = 0
) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """Pictures of `n` scenes, and inputs with right and with wrong captions of them, after the prompt of `inputs`."""
    makes = getattr(processor, "image_processor", None)
    if makes is None:
        raise ValueError("vti: pictures to find directions on need the model's processor; or give directions")
    if "pixel_values" not in inputs or inputs.keys() - {"input_ids", "attention_mask", "pixel_values"}:
        told = ", ".join(sorted(inputs.keys())) or "nothing"
        raise ValueError(
            f"vti: directions are found on a prompt of one picture, given as ids and pixels; this one has {told}: give "
            f"directions that were found otherwise"
        )
    drawn = (sample(SCENES, seed, i) for i in count())
    scenes = list(islice((scene for scene in drawn if len(_shapes(caption(scene))) > 1), n))
    size = inputs["pixel_values"].shape[-1]
    shown = render(scenes, size)
    pixels = makes(images=[shown.image(i) for i in range(n)], return_tensors="pt")["pixel_values"]
    prompt = inputs["input_ids"][0]
    mask = inputs.get("attention_mask")
    prompt = prompt if mask is None else prompt[mask[0].bool()]
    texts = [_captions(i, scene, seed) for i, scene in enumerate(scenes)]
    right, wrong = (_asked(prompt, some, pixels, processor.tokenizer) for some in zip(*texts))
    return pixels, right, wrong


def _captions(i: int, scene: Any, seed: int) -> tuple[str, str]:
    """A right caption, and one whose first shape is another, which the scene lacks."""
    text = caption(scene)
    words = text.replace(",", " ,").split()
    at = _shapes(text)[0]
    absent = [shape for shape in SHAPES if shape not in text]
    words[at] = absent[np.random.default_rng((seed, i)).integers(len(absent))]
    return text, " ".join(words).replace(" ,", ",")


def _shapes(text: str) -> list[int]:
    """The places of words that name one shape."""
    return [k for k, word in enumerate(text.replace(",", " ,").split()) if word in SHAPES]


def _asked(prompt: Tensor, texts: Sequence[str], pixels: Tensor, tokenizer: Any) -> dict[str, Any]:
    """The prompt with each text, padded on the left."""
    rows = [torch.cat([prompt.cpu(), torch.tensor(tokenizer(t, add_special_tokens=False)["input_ids"])]) for t in texts]
    longest = max(map(len, rows))
    fill = tokenizer.pad_token_id or 0
    ids = torch.stack([F.pad(row, (longest - len(row), 0), value=fill) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def _last(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """States of all layers at the last token that is no padding. [batch, layer, dim]"""
    hidden = torch.stack(model(**inputs, output_hidden_states=True, use_cache=False).hidden_states, 1)
    mask = inputs.get("attention_mask")
    if mask is None:
        return hidden[:, :, -1].float()
    last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
    return hidden[torch.arange(len(hidden)), :, last].float()


def _masked(picture: Tensor, size: int, ratio: float, chance: torch.Generator) -> Tensor:
    """The picture with this share of its patches set to its mean colour. [channel, row, column]"""
    rows, columns = (n // size for n in picture.shape[-2:])
    hidden = torch.zeros(rows * columns, dtype=torch.bool)
    hidden[torch.randperm(rows * columns, generator=chance)[: int(ratio * rows * columns)]] = True
    where = hidden.view(rows, columns).repeat_interleave(size, 0).repeat_interleave(size, 1)
    where = F.pad(where, (0, picture.shape[-1] - where.shape[1], 0, picture.shape[-2] - where.shape[0]))
    return torch.where(where.to(picture.device), picture.mean((1, 2), keepdim=True), picture)


def _check(name: str, given: Tensor, axes: int, known: Sequence[int], model: nn.Module) -> None:
    if given.ndim != axes or len(given) != len(known) + 1:
        wanted = "[layer, token, dim]" if axes == 3 else "[layer, dim]"
        raise ValueError(
            f"vti: the {name} direction is {wanted} of {len(known)} layers and the embedding for "
            f"{type(model).__name__}; got {list(given.shape)}"
        )


class _States:
    """Keeps what the first layer of a stack is given, and what each layer gives."""

    def __init__(self, stack: str) -> None:
        self.stack, self.found = stack, list[Tensor]()

    def entering(self, site: Site, hidden: Tensor) -> Tensor:
        if site.stack == self.stack and not self.found:
            self.found.append(hidden)
        return hidden

    def hidden(self, site: Site, hidden: Tensor) -> Tensor:
        if site.stack == self.stack:
            self.found.append(hidden)
        return hidden
