"""The zoo's describer, tuned to say in a token where the object asked about is: does similarity to that token show it?

On Qian et al., READ (arXiv:2412.17741), section 3, who look at the token of models tuned to prompt SAM. Here the token
is one that the describer has no use for, behind "what colour is the ...?"; queries and values of its language model are
tuned for some seconds, with a decoder that compares the token's last state, through two layers, with the patches of
the vision tower. The decoder never sees the language model's own states of the picture, with which the similarity is
taken: otherwise the claim would hold by construction. Controls: the token before tuning, and attention of the same
position. Which sign the similarity gets, nothing in such tuning says; so the negative points are reported.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ... import loading
from ...attribution import attribute
from ...attribution.seg_token import similarity_points
from ...call import Call
from ...catalog import Finding, Premise
from ...data.scenes import render
from ...evaluation.localisation import iou_score
from ...recording import statistic
from ...seam import record
from ...zoo import words
from ...zoo.recipes import viewer
from .._measure import Mean, mean
from .vl_sam import drawn

SCALES = "small", "large"
EXPECTED = (
    "in scenes of two or three objects, the first positive point lies on the object asked about at least three times "
    "as often as chance, and at least 5 percentage points more often than the maximum of the attention head that is "
    "best on other scenes; before tuning no more than twice as often as chance; each by two standard errors"
)
STEPS = {"small": 40, "large": 2000}
SCENES, BATCH, RATE, DIM = 60, 16, 8e-3, 64
SIDE = viewer.SIZE // viewer.PATCH


class Asked(NamedTuple):
    """Scenes with a question on one of their objects, and the token behind it."""

    inputs: dict[str, Tensor]
    masks: NDArray[np.bool_]  # of the object [scene, row, column]


class Decoder(nn.Module):
    """Mask logits of patches, by what the tower says of them and the state of the token."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        width = tower.config.hidden_size
        self.patches = nn.Linear(2 * width, DIM)
        self.query = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, DIM))

    def forward(self, patches: Tensor, state: Tensor) -> Tensor:
        """patches [batch, patch, dim], state [batch, dim] -> [batch, patch]"""
        return torch.einsum("bpd,bd->bp", self.patches(patches), self.query(state)) / DIM**0.5


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Where similarity and attention point, before and after tuning."""
    torch.manual_seed(seed)
    model, processor = loading.load("describer")
    held = asked(processor, SCENES, 2 * seed + 1, 0)
    before = hits(model, held)
    decoder = tuned(model, processor, STEPS[scale], seed)
    after, head = hits(model, held), best_head(model, asked(processor, SCENES, 2 * seed, STEPS[scale] * BATCH))
    attended = held.masks[np.arange(SCENES), *pixel(attention(model, held)[head])]
    with torch.no_grad():
        logits = _masked(model, decoder, held.inputs).view(-1, SIDE, SIDE)
    large = F.interpolate(logits[:, None], (viewer.SIZE,) * 2, mode="bilinear")[:, 0]
    overlap = mean([iou_score(one[None], m[None])[0] for one, m in zip(large.numpy(), held.masks)])
    chance = float(held.masks.mean())
    first, untuned, looked = mean(after[0]), mean(before[0]), mean(attended.astype(float))
    ahead = mean(after[0] - attended)
    holds = first.above(3 * chance) and ahead.value >= 0.05 and ahead.above() and not untuned.above(2 * chance)
    measured = (
        f"the first positive point lies on the object in {first:.1%}, the first negative one in {mean(after[1]):.1%}; "
        f"before tuning in {untuned:.1%} and {mean(before[1]):.1%}; the maximum of the best head in {looked:.1%} "
        f"({ahead:.1%} apart); the object is {chance:.1%} of the picture ({SCENES} scenes)"
    )
    premises = [
        Premise(
            "the tuned token prompts a mask: intersection over union", "0.5", f"{overlap:.2f}", overlap.value >= 0.5
        ),
        Premise("an object is a small part of the picture", "30%", f"{chance:.0%}", chance <= 0.3),
    ]
    bars = {
        "positive": first,
        "negative": mean(after[1]),
        "positive, untuned": untuned,
        "negative, untuned": mean(before[1]),
        "best head": looked,
        "chance": Mean(chance, 0.0),
    }
    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=partial(_draw, bars))


def asked(processor: Any, n: int, seed: int, start: int) -> Asked:
    """Scenes of two or three objects, and a question on one of them."""
    scenes = drawn(n, seed * 10**7 + start)
    which = [i % len(scene.objects) for i, scene in enumerate(scenes)]
    texts = [f"user: <image> what colour is the {s.objects[w].shape}? assistant:" for s, w in zip(scenes, which)]
    pictures = render(scenes, viewer.SIZE)
    images = [pictures.image(i) for i in range(n)]
    inputs = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
    token = torch.full((n, 1), words.WORDS.index(words.UNKNOWN))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    return Asked(inputs, np.stack([pictures.owner[i] == w for i, w in enumerate(which)]))


def tuned(model: Any, processor: Any, steps: int, seed: int) -> Decoder:
    """Tune queries and values of the language model, in place, with a decoder."""
    decoder = Decoder(model.model.vision_tower)
    model.requires_grad_(False)
    projections = [p for n, p in model.model.language_model.named_parameters() if "q_proj" in n or "v_proj" in n]
    learned = [*(p.requires_grad_() for p in projections), *decoder.parameters()]
    optimiser = torch.optim.AdamW(learned, RATE)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for step in range(steps):
        batch = asked(processor, BATCH, 2 * seed, step * BATCH)
        share = F.avg_pool2d(torch.from_numpy(batch.masks).float()[:, None], viewer.PATCH).flatten(1)
        logits = _masked(model, decoder, batch.inputs)
        found = logits.sigmoid()
        dice = 1 - (2 * (found * share).sum(1) + 1) / ((found + share).sum(1) + 1)
        loss = 2 * F.binary_cross_entropy_with_logits(logits, share) + 0.5 * dice.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    return decoder.eval()


def _masked(model: Any, decoder: Decoder, inputs: dict[str, Tensor]) -> Tensor:
    """Mask logits of the patches. [batch, patch]"""
    with torch.no_grad():
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    patches = torch.cat([states[layer] for layer in model.config.vision_feature_layer], -1)[:, 1:]
    state = model.model(**inputs, use_cache=False).last_hidden_state[:, -1]
    return decoder(patches, state)


def hits(model: Any, of: Asked) -> NDArray[np.float64]:
    """Whether the first positive and the first negative point lie on the object. [2, scene]"""
    found = attribute(model, of.inputs, method="seg_token")
    maps = torch.from_numpy(found.values[of.inputs["input_ids"].numpy() == model.config.image_token_index])
    points, labels = similarity_points(maps.view(-1, SIDE, SIDE), (viewer.SIZE, viewer.SIZE), down=1)
    scene = np.arange(len(points))
    at = [points[scene, (labels == kind).int().argmax(1)].long().numpy().T for kind in (1, 0)]
    return np.stack([of.masks[scene, y, x] for x, y in at]).astype(float)


def attention(model: Any, of: Asked) -> NDArray[np.float64]:
    """Of the token to the patches, by layer and head. [layer * head, scene, row, column]"""
    seen = []

    @statistic("batch head key", title="Attention to patches")
    def read(call: Call) -> None:
        if call.site.stack == "language_model" and call.tokens is not None:
            weights = call.weights.rows(call.query.shape[2] - 1, call.query.shape[2])[:, :, 0].movedim(1, 0)
            seen.append(weights[:, call.tokens.role("image")].view(len(weights), -1, SIDE, SIDE))

    with torch.no_grad(), record(model, read):
        model(**of.inputs)
    return torch.cat(seen).double().numpy()


def best_head(model: Any, of: Asked) -> int:
    """The head whose maximum lies on the object most often."""
    scene = np.arange(len(of.masks))
    return int(np.argmax([of.masks[scene, *pixel(one)].mean() for one in attention(model, of)]))


def pixel(maps: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column in the middle of the patch that is highest."""
    best = maps.reshape(len(maps), -1).argmax(1)
    rows, columns = (viewer.PATCH * at + viewer.PATCH // 2 for at in (best // SIDE, best % SIDE))
    return rows, columns


def _draw(bars: dict[str, Mean], figure: Any) -> None:
    axis = figure.subplots()
    axis.bar(range(len(bars)), [bar.value for bar in bars.values()], yerr=[2 * bar.error for bar in bars.values()])
    axis.set_xticks(range(len(bars)), [name.replace(", ", ",\n") for name in bars])
    axis.set_ylabel("lies on the object asked about")
