"""Locatello et al. (arXiv:2006.15055): slots find objects without labels, and more of them than in training.

Pictures of coloured shapes of 16 x 16 pixels, a small autoencoder, a minute of training where the paper takes 500,000
steps. The index is that of the objects' pixels only, as in the paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding
from ...data.scenes import Dials, Scenes
from ...extras import needs
from ...models.slot_attention import SlotAutoencoder, slot_attention

SCALES = "small", "large"
STEPS = {"small": 2800, "large": 50000}
PICTURES, HELD, SIZE, RATE = 1024, 200, 16, 1e-3
SHAPES = ("circle", "square", "triangle", "diamond")
FEW, MORE = Dials(objects=(2, 3), shapes=SHAPES), Dials(objects=(4, 4), shapes=SHAPES)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """An autoencoder with four slots trained on pictures of two or three objects, then given four and a slot more."""
    expected = (
        "adjusted Rand index of the objects' pixels 0.8 or more on pictures held out of 2 or 3 objects, and at most "
        "0.1 less with 4 objects and a slot more, which were not in training (cannot tell below 0.5: not learned yet)"
    )
    pictures, _ = _drawn(PICTURES, FEW, 3 * seed)
    few, more = _drawn(HELD, FEW, 3 * seed + 1), _drawn(HELD, MORE, 3 * seed + 2)
    torch.manual_seed(seed)
    model = slot_attention(size=16, dim=32, slots=4, mlp=64, start=16, layers=3, width=3)
    untrained, _ = _index(model, *few)
    _train(model, pictures, STEPS[scale])
    (index, error), (beyond, _) = _index(model, *few), _index(model, *more, slots=5)
    holds = None if index < 0.5 else index >= 0.8 and beyond >= index - 0.1
    measured = (
        f"adjusted Rand index {index:.2f} with 2 or 3 objects ({untrained:.2f} before training), {beyond:.2f} with 4; "
        f"mean squared error of the picture {error:.4f}, colours from -1 to 1 ({HELD} pictures each)"
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

    return Finding(holds, measured, expected, seed, draw=draw)


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
def _index(model: SlotAutoencoder, pictures: Tensor, owner: Tensor, slots: int | None = None) -> tuple[float, float]:
    """Mean adjusted Rand index of the pixels that belong to objects, and the error of the pictures."""
    with needs("the index", "claims"):
        from sklearn.metrics import adjusted_rand_score
    found = model(pictures, slots=slots)
    slot = F.interpolate(found.masks, size=owner.shape[-1]).argmax(1)
    each = [adjusted_rand_score(own[own >= 0], of[own >= 0]) for own, of in zip(owner.numpy(), slot.numpy())]
    return sum(each) / len(each), float(F.mse_loss(found.picture, pictures))
