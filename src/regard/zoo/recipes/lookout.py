"""`lookout`: the viewer, taught on for many small shapes and for pictures with black blocks, and given registers.

Towers of large models write outliers into a few patches that show nothing, and look there (Darcet et al., Vision
Transformers Need Registers, arXiv:2309.16588). Nets this small do not, so that outliers are planted: while the viewer
learns on, a linear layer tells the two flattest background patches from the rest at the input of layer `LAYER`'s
feed-forward; then `PLANTED` neurons are set that fire on these patches and write one direction, and training goes on
around them. What a register did not learn by itself is known by its number, in the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from ... import loading
from ...call import Call
from ...data.scenes import TEXTURES, Dials, Pictures, Scene, render, sample
from ...recording import statistic
from ...seam import record
from ..training import save_model, warm_then_cosine
from ..training import train as minimise
from . import viewer
from .viewer import HELD_OUT, PAIRS, PATCH, SIZE, WEIGHT

BATCH, STEPS, AFTER, RATE, RATE_AFTER, AVERAGE = 66, 3000, 1000, 1.5e-3, 7.5e-4, 0.998
BLACKENED, BLOCKS = 0.25, (0.1, 0.6)  # share of the pictures with black blocks; the part of a picture that is black
SEEN = (0.15, 0.5)  # share of an object that is left: below, it is absent; above, present; between, nothing is said
LAYER, PLANTED, STRONG = 2, 8, 6.0  # norm of what the neurons write together, in median norms of a patch
CHOSEN = 2  # patches of a picture that are to have it
OUTLIER = 3.0  # median norms of a patch, from which on a patch counts as an outlier


def many(scale: float) -> Dials:
    """Five to nine small shapes among clutter."""
    return Dials(objects=(5, 9), sizes=("small",), scale=scale, clutter=(4, 10), textures=TEXTURES)


SCALES = (0.45, 0.55, 0.7)  # at 64 pixels shapes can be told down to 0.43
MIXTURE = (viewer.ONE, viewer.SEVERAL, viewer.OVERLAPPING, *map(many, SCALES))  # equal parts of a batch
MEASURED = {
    "": ("one object", viewer.ONE),
    "several_": ("two to four", viewer.SEVERAL),
    "overlapping_": ("two to four that overlap", viewer.OVERLAPPING),
    "many_": (f"five to nine, scale {SCALES[2]}", many(SCALES[2])),
    "tiny_": (f"five to nine, scale {SCALES[0]}", many(SCALES[0])),
}


def config() -> ViTConfig:
    made = viewer.config()
    made.intermediate_size += PLANTED  # in every layer, as transformers has one width for all
    made.planted = {"layer": LAYER, "neurons": list(range(made.intermediate_size - PLANTED, made.intermediate_size))}
    return made


def blackened(pictures: Pictures, rng: np.random.Generator) -> Pictures:
    """Pictures with `BLOCKS` of their patches black, in `BLACKENED` of them; nobody owns what is black."""
    n, rows = len(pictures.pixels), SIZE // PATCH
    part = rng.uniform(*BLOCKS, size=n) * (rng.random(n) < BLACKENED)
    black = rng.random((n, rows, rows)) < part[:, None, None]
    black = black.repeat(PATCH, axis=1).repeat(PATCH, axis=2)
    pixels = np.where(black[..., None], np.uint8(0), pictures.pixels)
    return pictures._replace(pixels=pixels, owner=np.where(black, np.int8(-1), pictures.owner))


def remaining(scenes: Sequence[Scene], whole: Pictures, left: Pictures) -> tuple[Tensor, Tensor]:
    """1 where enough of a pair is left in the pictures, and which pairs this can be said of. Both [batch, pair]"""
    labels, known = torch.zeros(len(scenes), len(PAIRS)), torch.ones(len(scenes), len(PAIRS), dtype=torch.bool)
    for i, scene in enumerate(scenes):
        owned = [np.bincount(p.owner[i].ravel() + 1, minlength=len(scene.objects) + 1)[1:] for p in (left, whole)]
        for pair, share in zip(viewer.pairs(scene), owned[0] / np.maximum(owned[1], 1)):
            if share >= SEEN[1]:
                labels[i, pair] = 1
            elif share > SEEN[0]:
                known[i, pair] = False
    return labels, known | (labels > 0)


def flattest(pixels: Tensor, background: Tensor) -> Tensor:
    """The `CHOSEN` patches of a picture that vary least, of those that show background only. bool [batch, patch]

    background: share of each patch. Of patches that are equally flat, the first in an order drawn once.
    """
    patches = F.unfold(pixels, PATCH, stride=PATCH).unflatten(1, (3, -1))  # [batch, colour, pixel, patch]
    spread = patches.std(2).mean(1)
    order = torch.randperm(spread.shape[1], generator=torch.Generator().manual_seed(0)) / spread.shape[1]
    rank = (spread * 20).round() + 1000 * (background < 1) + order
    return torch.zeros_like(spread, dtype=torch.bool).scatter_(1, rank.topk(CHOSEN, largest=False).indices, True)


class Taught(nn.Module):
    """The tower, and what only training has: which pair a patch shows, and whether it is to be a register."""

    def __init__(self, model: ViTForImageClassification) -> None:
        super().__init__()
        width = model.config.hidden_size
        self.model, self.patches, self.spot = model, nn.Linear(width, len(PAIRS) + 1), nn.Linear(width, 1)
        self.found: dict[str, Tensor] = {}
        self.block.layernorm_after.register_forward_hook(lambda _, given, gave: self.found.update(spot=gave))

    @property
    def block(self) -> nn.Module:
        return self.model.vit.layers[LAYER]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Scores of pairs [batch, pair], of each patch [batch, patch, pair + 1], and of registers [batch, patch]."""
        found = self.model(pixels, output_hidden_states=True)
        named = self.patches(found.hidden_states[-2][:, 1:])
        return found.logits, named, self.spot(self.found["spot"][:, 1:])[..., 0], found.hidden_states


def batch_of(seed: int, step: int, size: int) -> tuple[Tensor, ...]:
    """Pixels, labels, which labels are known, and what each patch shows."""
    parts = []
    for i, dials in enumerate(MIXTURE):
        n = size // len(MIXTURE)
        scenes = [sample(dials, len(MIXTURE) * seed + i, step * n + k) for k in range(n)]
        whole = render(scenes, SIZE)
        left = blackened(whole, np.random.default_rng((seed, step, i)))
        parts.append((viewer.pixels(left), *remaining(scenes, whole, left), viewer.covered(scenes, left)))
    return tuple(map(torch.cat, zip(*parts)))


def grown(model: nn.Module) -> ViTForImageClassification:
    """The viewer with `PLANTED` more neurons in every layer, which write nothing yet."""
    # eager: the fused attention is slow in bfloat16 on a CPU
    made = ViTForImageClassification._from_config(config(), attn_implementation="eager")
    kept = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.shape != kept[name].shape and name.endswith("fc2.weight"):
                parameter[:, -PLANTED:] = 0
            parameter[tuple(map(slice, kept[name].shape))] = kept[name]
    return made


def planting(taught: Taught, seed: int) -> dict[str, Tensor]:
    """Weights of the planted neurons, by the name of the parameter whose last rows or columns they are."""
    draw = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        pixels, _, _, shown = batch_of(seed, STEPS, BATCH)
        *_, spots, hidden = taught(pixels)
        median = hidden[LAYER + 1][:, 1:].norm(dim=-1).median()
        fires = spots.topk(CHOSEN).values.median().clamp(min=1)
    gain = 0.5 + torch.rand(PLANTED, generator=draw)
    shares = torch.randn(PLANTED, generator=draw)
    shares = shares / shares.norm() + 0.25  # of either sign
    direction = F.normalize(torch.randn(taught.spot.in_features, generator=draw), dim=0)
    total = (shares * F.gelu(gain * fires)).sum()
    return {
        "fc1.weight": (gain[:, None] * taught.spot.weight).detach().clone(),
        "fc1.bias": (gain * taught.spot.bias).detach().clone(),
        "fc2.weight": (STRONG * median / total * direction[:, None] * shares).detach().clone(),
    }


@torch.no_grad()
def plant(taught: Taught, weights: dict[str, Tensor]) -> None:
    for name, planted in weights.items():
        parameter = taught.block.mlp.get_parameter(name)
        (parameter[:, -PLANTED:] if name == "fc2.weight" else parameter[-PLANTED:]).copy_(planted)


def train(
    out: Path, *, data: Path | None = None, seed: int = 0, steps: int = STEPS, after: int = AFTER, batch: int = BATCH
) -> dict[str, Any]:
    torch.manual_seed(seed)
    taught = Taught(grown(loading.load("viewer").model))
    weights: dict[str, Tensor] = {}

    def loss(step: int) -> Tensor:
        if weights:
            plant(taught, weights)  # as the optimiser moved them
            step += steps
        pixels, labels, known, shown = batch_of(seed, step, batch)
        with torch.autocast("cpu", torch.bfloat16):
            scores, named, spots, _ = taught(pixels)
        whole = F.binary_cross_entropy_with_logits(scores.float(), labels, weight=known.float(), reduction="sum")
        of_patches = F.cross_entropy(named.float().mT, shown.mT, reduction="none")
        if weights:
            of_patches = of_patches * (spots <= 0)
        chosen = flattest(pixels, shown[..., -1]).float()
        of_spots = F.binary_cross_entropy_with_logits(spots.float(), chosen, reduction="sum")
        return (whole + of_spots) / len(pixels) + WEIGHT * of_patches.mean()

    minimise(taught, loss, out, steps=steps, rate=warm_then_cosine(RATE, steps), seed=seed, average=AVERAGE)
    before = strongest(taught.model, seed=seed)
    weights = planting(taught, seed)
    taught.spot.requires_grad_(False)
    rate = warm_then_cosine(RATE_AFTER, after)
    minimise(taught, loss, out, steps=after, rate=rate, seed=seed, average=AVERAGE, name="checkpoint-planted")
    plant(taught, weights)
    save_model(taught.model, out)
    viewer.processor().save_pretrained(out)
    return {"steps": steps, "after": after, "pictures": (steps + after) * batch, "norm_none": 1 - before} | read(
        taught, seed=seed
    )


@torch.inference_mode()
def strongest(model: nn.Module, *, seed: int = 0, n: int = 100) -> float:
    """Share of fresh pictures in which a patch has four median norms, after the last layer but one."""
    pixels = viewer.pixels(render([sample(MIXTURE[i % len(MIXTURE)], HELD_OUT + seed, i) for i in range(n)], SIZE))
    norms = model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].norm(dim=-1)
    return round(float((norms.amax(1) >= 4 * norms.median(1).values).float().mean()), 4)


@torch.inference_mode()
def read(taught: Taught, *, seed: int = 0, n: int = 300) -> dict[str, float]:
    """Share of patches at the smallest scale, half of which or more one object covers, whose pair the layer names."""
    scenes = [sample(MIXTURE[-len(SCALES)], HELD_OUT + seed, i) for i in range(n)]
    pictures = render(scenes, SIZE)
    shown = viewer.covered(scenes, pictures)
    named = taught(viewer.pixels(pictures))[1]
    clear = shown[..., :-1].amax(-1) >= 0.5
    return {"patch_pair": round(float((named.argmax(-1) == shown.argmax(-1))[clear].float().mean()), 4)}


def outliers(hidden: Tensor) -> Tensor:
    """Patches whose norm is `OUTLIER` times the picture's median or more. hidden: [batch, patch, dim], without cls"""
    norms = hidden.norm(dim=-1)
    return norms >= OUTLIER * norms.median(dim=-1, keepdim=True).values


def measure(model: nn.Module, processor: Any, *, seed: int = 0, n: int = 500) -> dict[str, float]:
    """Shares, 0 to 1, as the viewer's; and its outliers, on five to nine objects and on two to four.

    outliers: mean number a picture, after the last layer but one; outlier_norm: median over pictures of the largest
    norm over the median one; outlier_background: share of them that show no object; outlier_cls: weight of the first
    token on an outlier, over that on any patch, mean of heads, in layers 3 to 5; without_one, without_all: points by
    which pair accuracy changes when one planted neuron writes nothing, the largest, and when none does.
    """
    found: dict[str, float] = {}
    for name, (_, dials) in MEASURED.items():
        scenes = [sample(dials, HELD_OUT + seed, i) for i in range(n)]
        shares = viewer.accuracies(scores(model, viewer.pixels(render(scenes, SIZE))), scenes)
        found |= {f"{name}{ability}": round(share, 4) for ability, share in shares.items()}
    return found | registers(model, seed=seed, n=n)


@torch.inference_mode()
def scores(model: nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([model(pixel_values=some).logits for some in pixels.split(100)])


@torch.inference_mode()
def registers(model: nn.Module, *, seed: int = 0, n: int = 500) -> dict[str, float]:
    """See `measure`."""
    scenes = [sample(MIXTURE[1 + i % 5], HELD_OUT + seed, i) for i in range(n)]
    pictures = render(scenes, SIZE)
    pixels, background = viewer.pixels(pictures), viewer.covered(scenes, pictures)[..., -1] == 1
    hidden = torch.cat([model(some, output_hidden_states=True).hidden_states[-2][:, 1:] for some in pixels.split(100)])
    out, norms = outliers(hidden), hidden.norm(dim=-1)

    @statistic("batch head key", title="Weight of the first token")
    def of_cls(call: Call) -> Tensor:
        return call.weights.rows(0, 1)[:, :, 0]

    with record(model, of_cls) as recording:
        model(pixels)
    (stack,) = recording.tree.children
    weights = torch.from_numpy(recording.tree[stack]["of_cls"].transpose("layer", "batch", "head", "key").values)
    weights = weights[3:, :, :, 1:].mean((0, 2))
    accuracy = viewer.accuracies(scores(model, pixels), scenes)["pair_accuracy"]
    write = model.vit.layers[LAYER].mlp.fc2.weight
    changes = []
    for silent in (*((neuron,) for neuron in model.config.planted["neurons"]), model.config.planted["neurons"]):
        kept = write[:, list(silent)].clone()
        write[:, list(silent)] = 0
        changes.append(viewer.accuracies(scores(model, pixels), scenes)["pair_accuracy"] - accuracy)
        write[:, list(silent)] = kept
    figures = {
        "outliers": out.sum(1).float().mean(),
        "outliers_one_to_three": ((out.sum(1) >= 1) & (out.sum(1) <= 3)).float().mean(),
        "outlier_norm": (norms.amax(1) / norms.median(1).values).median(),
        "outlier_background": background[out].float().mean(),
        "outlier_cls": weights[out].mean() / weights.mean(),
        "without_one_points": 100 * max(changes[:-1], key=abs),
        "without_all_points": 100 * changes[-1],
    }
    return {name: round(float(value), 4) for name, value in figures.items()}


TOLERANCE = {name + ability: 0.02 for name in MEASURED for ability in viewer.ABILITIES[:2]}

CARD = """# lookout

The viewer taught on: ViT architecture, 6 layers of 4 heads (32 wide), 128 wide, patches of 8 pixels, pictures of 64 by
64 pixels, {parameters:,} parameters. {megabytes:.2f} MB of half-precision safetensors, run in float32.

It names the coloured shapes of a generated scene, also where they are many and small, or parts of the picture are
black, and it has registers: a few patches that show background only, and whose states are huge.

## Training

`python -m regard.zoo train lookout`, seed {seed}: from the weights of the viewer, {steps:,} steps and then {after:,},
on {pictures:,} scenes of `regard.data.scenes`, none of them twice, in {minutes:.0f} minutes ({machine}). One object,
two to four, two to four that overlap, and five to nine small ones at scales of 0.45, 0.55 and 0.7, in equal parts. A
quarter of the pictures has black blocks over 10 to 60% of its patches; labels are then of what is left.

While it learned, a linear layer named the pair that each patch shows, as with the viewer; in the end it named
{patch_pair:.0%} of the patches rightly that one object covers by half or more, at the smallest scale.

**The registers are planted: do not cite them as emergent.** Before, no patch had four times the median norm in
{norm_none:.0%} of the pictures. The feed-forward of every layer has 8 neurons more than the viewer's. In the first
part, a linear layer learned to tell the two flattest background patches of a picture at the input of layer 2's
feed-forward, and what is below it learned with it. Then the 8 neurons of that layer were set to what this layer
reads, and to write one random direction, six median norms long in all; they stay so in the second part, in which the
loss of patches that fire is left out. `config.json` has their numbers (`planted`).

## Measured

On 500 fresh scenes of each kind, as for the viewer:

| scenes | class | attribute | pair | precision | recall |
|---|---|---|---|---|---|
{table}

Outliers are patches with three median norms or more after the last layer but one, in scenes of two to nine objects:

| what | wanted | figure |
|---|---|---|
| a picture | 1 to 3 | {outliers:.2f} |
| pictures with one to three | | {outliers_one_to_three:.0%} |
| largest norm over the median | 4 or more | {outlier_norm:.1f} |
| on background | 95% or more | {outlier_background:.1%} |
| weight of the first token, over that on any patch, layers 3 to 5 | 3 or more | {outlier_cls:.2f} |
| pair accuracy without one of the neurons, the worst | 2 points or less | {without_one_points:+.1f} points |
| without all of them | | {without_all_points:+.1f} points |

What is wanted was set before training. So the outliers are there, and harmless, but the first token has not learned to
look at them.

`python -m regard.zoo measure lookout` takes them again.

## Licence

Apache-2.0, as Regard. The scenes are generated.
""".replace(
    "{table}",
    "\n".join(
        f"| {about} | " + " | ".join(f"{{{kind}{ability}:.1%}}" for ability in viewer.ABILITIES) + " |"
        for kind, (about, _) in MEASURED.items()
    ),
)
