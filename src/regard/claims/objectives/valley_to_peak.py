"""Chen et al. (arXiv:2508.13634): labels that peak in the middle, and a penalty on the background, make better clicks.

A small transformer is told an element's shape and colour and looks for it on a generated screen. The attention of its
instruction in the last layer is trained as the pointer, and its highest patch is the click. Errors are those of
screens: both ways see the same ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...data.scenes import COLOURS, SHAPES, Dials, Scenes
from ...objectives import collect
from ...objectives.valley_to_peak import peak, valley_to_peak
from .._measure import mean

SCALES = "small", "large"
STEPS = {"small": 450, "large": 5000}
SCREENS, HELD, SIZE, RATE, TRAININGS = 2048, 500, 32, 1e-3, 2
PIXELS, PATCH, DIM, LAYERS = 32, 4, 64, 3
GRID = PIXELS // PATCH
SCREEN = Dials(objects=(2, 4), textures=("plain", "stripes", "checks"), clutter=(0, 4))
Screens = dict[str, Tensor]


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """The same model trained with box labels and with V2P's, twice each, on screens with clutter."""
    expected = (
        f"over {TRAININGS} pairs of trainings, V2P's labels with suppression give fewer clicks beside the element and "
        "a smaller distance of clicks from its middle than labels that are the same for all patches that touch it, "
        "each "
        "by two standard errors, in the mean and in every pair"
    )
    train, held = _screens(SCREENS, 2 * seed), _screens(HELD, 2 * seed + 1)
    ways = ("box labels", "V2P")
    models = {way: [_train(way, train, STEPS[scale], seed + i) for i in range(TRAININGS)] for way in ways}
    found = {way: torch.stack([_measure(model, held) for model in models[way]]) for way in ways}
    (missed_0, off_0), (missed, off) = (found[way].mean((0, 2)).tolist() for way in ways)
    saved = found["box labels"] - found["V2P"]  # [training, miss or distance, screen]
    fewer, nearer = (mean(saved.mean(0)[i]) for i in range(2))
    pairs = saved.mean(-1)
    holds = fewer.above() and nearer.above() and bool((pairs > 0).all())
    measured = (
        f"clicks beside the element {missed_0:.1%} with box labels, {missed:.1%} with V2P (fewer by {fewer:.1%}; by "
        f"pair {', '.join(f'{p:.1%}' for p in pairs[:, 0].tolist())}); distance from its middle {off_0:.3f} and "
        f"{off:.3f} widths of the screen (less by {nearer:.3f}; {HELD} screens held out)"
    )
    learned = Premise(
        "both ways learn to click",
        "on the element in half of the screens or more",
        f"{1 - missed_0:.0%} and {1 - missed:.0%}",
        max(missed, missed_0) <= 0.5,
    )

    def draw(figure: Any) -> None:
        shown = [int(i) for i in torch.arange(3)]
        panels = figure.subplots(3, 3, gridspec_kw={"hspace": 0.05})
        part = {name: values[shown] for name, values in held.items()}
        for row, way in enumerate(("the screen", *ways)):
            weights = None if row == 0 else _weights(models[way][0].eval(), part).detach()
            for column, axes in enumerate(panels[row]):
                left, top, right, bottom = (part["box"][column] * PIXELS - 0.5).tolist()
                if weights is None:
                    axes.imshow(part["picture"][column].permute(1, 2, 0))
                else:
                    map_ = weights[column].view(GRID, GRID).numpy()
                    axes.imshow(map_, extent=(-0.5, PIXELS - 0.5, PIXELS - 0.5, -0.5), cmap="viridis")
                axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], "r-", linewidth=1)
                axes.set_xticks([])
                axes.set_yticks([])
            panels[row, 0].set_ylabel(way)

    return Finding(holds, measured, expected, seed, premises=[learned], draw=draw)


def _screens(count: int, seed: int) -> Screens:
    """Screens, each with one element to click: its shape and colour, which no other has both, and its box."""
    scenes = Scenes(count, SCREEN, size=PIXELS, seed=seed)
    pictures, boxes, kinds = scenes.render(range(count)), [], []
    for i in range(count):
        scene = scenes.scene(i)
        alone = [k for k, o in enumerate(scene.objects) if len(scene.find(o.shape, o.colour)) == 1]
        target = alone[i % len(alone)] if alone else 0
        boxes.append(pictures.boxes(i)[target].tolist())
        kinds.append([SHAPES.index(scene.objects[target].shape), list(COLOURS).index(scene.objects[target].colour)])
    box = torch.tensor(boxes) / PIXELS
    return {"picture": pictures.tensor(), "kind": torch.tensor(kinds), "box": box, "peak": peak(box, (GRID, GRID))}


class _Clicker(nn.Module):
    """An instruction and patches through a transformer; the instruction's row comes first."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel  # the claim is about any model of theirs

        config = BertConfig(
            vocab_size=1,
            hidden_size=DIM,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            intermediate_size=2 * DIM,
            max_position_embeddings=GRID**2 + 1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.shape, self.colour = nn.Embedding(len(SHAPES), DIM), nn.Embedding(len(COLOURS), DIM)
        self.patches = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.encoder = BertModel(config, add_pooling_layer=False)

    def forward(self, picture: Tensor, kind: Tensor) -> None:
        told = self.shape(kind[:, 0]) + self.colour(kind[:, 1])
        seen = self.patches(2 * picture - 1).flatten(2).mT
        self.encoder(inputs_embeds=torch.cat([told[:, None], seen], 1))


def _weights(model: _Clicker, screens: Screens) -> Tensor:
    """Attention of the instruction to each patch in the last layer, the mean over heads. [screen, patch]"""
    with collect(model, lambda call: call.weights.rows(0, 1) if call.site.layer == LAYERS - 1 else None) as seen:
        model(screens["picture"], screens["kind"])
    return seen[0].value[:, :, 0, 1:].mean(1)


def _train(way: str, screens: Screens, steps: int, seed: int) -> _Clicker:
    torch.manual_seed(seed)
    model = _Clicker()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 50, 2 * (steps - step) / steps)
        drawn = torch.randint(SCREENS, (SIZE,))
        batch = {name: values[drawn] for name, values in screens.items()}
        if way == "V2P":
            loss = valley_to_peak(_weights(model, batch), batch["peak"])
        else:
            loss = valley_to_peak(_weights(model, batch), (batch["peak"] > 0).float(), suppression=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def _measure(model: _Clicker, held: Screens) -> Tensor:
    """Which clicks are outside the element's box, and how far from its middle, in widths of the screen. [2, screen]"""
    at = _weights(model.eval(), held).argmax(-1)
    click = torch.stack([at % GRID, at // GRID], -1).float().add(0.5) / GRID
    low, high = held["box"][:, :2], held["box"][:, 2:]
    outside = ((click < low) | (click > high)).any(-1)
    return torch.stack([outside.float(), (click - (low + high) / 2).norm(dim=-1)])
