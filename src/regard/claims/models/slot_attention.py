"""Locatello et al. (arXiv:2006.15055): slots find objects without labels, and more of them than in training.

Pictures of coloured shapes of 16 x 16 pixels, a small autoencoder, a minute of training where the paper takes 500,000
steps. The index is that of the objects' pixels only, as in the paper. The control is the same model whose slots do not
compete: its softmax is over inputs, as in ordinary cross attention. Two lengths of training were tried, on other seeds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...data.scenes import Dials, Scenes
from ...extras import needs
from ...models.slot_attention import SlotAutoencoder, slot_attention
from .._measure import mean

SCALES = "small", "large"
STEPS = {"small": 1600, "large": 50000}
PICTURES, HELD, SIZE, RATE = 1024, 200, 16, 1e-3
SHAPES = ("circle", "square", "triangle", "diamond")
FEW, MORE = Dials(objects=(2, 3), shapes=SHAPES), Dials(objects=(4, 4), shapes=SHAPES)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """An autoencoder with four slots trained on pictures of two or three objects, then given four and a slot more."""
    expected = (
        "adjusted Rand index of the objects' pixels, on pictures held out of 2 or 3 objects, 0.6 or more, higher than "
        "without competition by 0.1 and by two standard errors, and at most 0.1 less with 4 objects and a slot more, "
        "which were not in training"
    )
    pictures, _ = _drawn(PICTURES, FEW, 3 * seed)
    few, more = _drawn(HELD, FEW, 3 * seed + 1), _drawn(HELD, MORE, 3 * seed + 2)
    models = []
    for competes in (True, False):
        torch.manual_seed(seed)
        models.append(slot_attention(size=16, dim=32, slots=4, mlp=64, start=16, layers=3, width=3))
        if not competes:
            models[-1].slot_attention.attention = _Ordinary()
        _train(models[-1], pictures, STEPS[scale])
    model, control = models
    found, without, farther = _index(model, *few), _index(control, *few), _index(model, *more, slots=5)
    index, beyond, gain = mean(found), mean(farther), mean(found - without)
    holds = index.value >= 0.6 and gain.value >= 0.1 and gain.above() and beyond.value >= index.value - 0.1
    error, plain = _error(model, few[0]), float(few[0].var(0).mean())
    measured = (
        f"adjusted Rand index {index:.2f} with 2 or 3 objects, {gain:.2f} above that without competition, {beyond:.2f} "
        f"with 4 ({HELD} pictures each)"
    )
    drawn = Premise(
        "the autoencoder draws its pictures",
        "a mean squared error at most half of the pictures' variance",
        f"{error:.4f} of {plain:.4f}",
        error <= plain / 2,
    )

    def draw(figure: Any) -> None:
        with torch.no_grad():
            seen = [(few[0][:5], model(few[0][:5])), (more[0][:3], model(more[0][:3], slots=5))]
        panels = figure.subplots(3, 8)
        column = 0
        for given, found in seen:
            for i in range(len(given)):
                slot = found.masks[i].argmax(0)
                for axes, shown in zip(panels[:, column], (given[i], found.picture[i], slot)):
                    if shown.ndim == 3:
                        axes.imshow((shown.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1))
                    else:
                        axes.imshow(shown, cmap="tab10", vmin=0, vmax=9)
                    axes.set_xticks([])
                    axes.set_yticks([])
                column += 1
        for axes, name in zip(panels[:, 0], ("picture", "drawn again", "slots")):
            axes.set_ylabel(name)
        panels[0, 2].set_title("2 or 3 objects")
        panels[0, 6].set_title("4 objects, a slot more")

    return Finding(holds, measured, expected, seed, premises=[drawn], draw=draw)


class _Ordinary(nn.Module):
    """Each slot looks at the inputs by itself."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1) @ value


def _drawn(count: int, dials: Dials, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures [picture, 3, 16, 16], -1 to 1, and whose each of the 32 x 32 pixels is that they were made from."""
    found = Scenes(count, dials, size=32, seed=seed).render(range(count))
    return F.avg_pool2d(found.tensor(), 2) * 2 - 1, torch.from_numpy(found.owner)


def _train(model: SlotAutoencoder, pictures: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 200) * (1 - step / steps)
        batch = pictures[torch.randint(len(pictures), (SIZE,))]
        loss = F.mse_loss(model(batch).picture, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()


@torch.no_grad()
def _index(model: SlotAutoencoder, pictures: Tensor, owner: Tensor, slots: int | None = None) -> np.ndarray:
    """Adjusted Rand index of the pixels that belong to objects. [picture]"""
    with needs("the index", "claims"):
        from sklearn.metrics import adjusted_rand_score
    slot = F.interpolate(model(pictures, slots=slots).masks, size=owner.shape[-1]).argmax(1)
    return np.array([adjusted_rand_score(o[o >= 0], of[o >= 0]) for o, of in zip(owner.numpy(), slot.numpy())])


@torch.no_grad()
def _error(model: SlotAutoencoder, pictures: Tensor) -> float:
    return float(F.mse_loss(model(pictures).picture, pictures))
