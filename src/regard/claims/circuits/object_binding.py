"""Do states of patches say which of them are of one object, beyond where they are and what they show?

Scenes hold two objects of one shape and colour, one partly in front of the other, so that class says nothing of which
is which. For each pair of patches of one object that is used, one of both objects with the same offset is used too, so
that nearness says nothing: what is left of position is measured by a probe that is given positions alone. At `small`
the model is the bundled viewer, which was trained by labels, and for comparison the same untrained; at `real`
DINOv2-small, which has no loss of its own here, so that shuffling is left out.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import zoo
from ...catalog import Finding, Premise
from ...circuits.object_binding import Kind, SameObject, shuffle_binding, states
from ...data.scenes import Dials, Scenes, render
from ...seam import intervene
from .._measure import mean
from .._models import pretrained

SCALES = "small", "real"
EXPECTED = (
    "on pairs matched for their offset, of twins: at the layer that is best on other pictures a quadratic probe tells "
    "10 points more rightly than one of positions alone, and more than one of the model untrained and a linear probe, "
    "by two standard errors of the differences between pictures; where the model has a loss, shuffling what a "
    "probe of rank 16 reads there raises it at least 3 times as much as shuffling any of five random subspaces"
)
PICTURES, RANK, SUBSPACES = {"small": (300, 150, 150), "real": (160, 60, 80)}, 16, 5  # to learn, to choose, to judge
STEPS, BATCH, RATE = 250, 1024, 3e-3
INSIDE = 0.6  # of a patch's pixels that are an object's, for it to count


class _Pairs(NamedTuple):
    """Pairs of patches: pictures, both patches, whether of one object. [pair]"""

    picture: Tensor
    first: Tensor
    second: Tensor
    same: Tensor

    def of(self, given: Tensor) -> Tensor:
        """[pair, 2, dim]"""
        return torch.stack([given[self.picture, self.first], given[self.picture, self.second]], 1)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Probes at every layer on matched pairs of twins, and what shuffling their part costs."""
    counts = PICTURES[scale]
    scenes = _twins(sum(counts), seed)
    model: Any
    if scale == "real":
        model, processor = pretrained("dinov2-small")
        size, patch = 112, model.config.patch_size
        pictures = render(scenes, size)
        pixels = torch.from_numpy(np.ascontiguousarray(pictures.pixels)).permute(0, 3, 1, 2).float() / 255
        centre, spread = (torch.tensor(of)[:, None, None] for of in (processor.image_mean, processor.image_std))
        inputs = (pixels - centre) / spread
    else:
        model, processor = zoo.load("viewer")
        size, patch = 64, model.config.patch_size
        pictures = render(scenes, size)
        inputs = processor(images=[pictures.image(i) for i in range(len(scenes))], return_tensors="pt")["pixel_values"]
    owner = _owners(torch.from_numpy(pictures.owner.astype(np.int64)), patch)
    side = size // patch
    rng = torch.Generator().manual_seed(seed)
    starts = np.cumsum([0, *counts])
    learn, choose, judge = (_matched(owner, range(a, b), side, rng) for a, b in pairwise(starts))

    torch.manual_seed(seed)
    blank = type(model)(model.config).eval()
    found = {name: _states(one, inputs, side * side) for name, one in (("trained", model), ("untrained", blank))}
    places = torch.eye(side * side).expand(len(scenes), -1, -1)
    position = _rows(_probe(places, learn, seed), places, judge)
    chosen, best = {}, {}
    for name, layers in found.items():
        scores = {
            layer: float(_rows(_probe(given, learn, seed), given, choose)[1].mean()) for layer, given in layers.items()
        }
        best[name] = max(scores, key=scores.__getitem__)
        chosen[name] = scores
    layer = best["trained"]
    given = found["trained"][layer]
    told = {kind: _rows(_probe(given, learn, seed, kind), given, judge) for kind in Kind.__args__}
    other = found["untrained"][best["untrained"]]
    untrained = _rows(_probe(other, learn, seed), other, judge)
    accuracy = {name: mean(of[1]) for name, of in {**told, "untrained": untrained, "position": position}.items()}
    over = {
        name: mean(told["quadratic"][1] - of[1])
        for name, of in (("position", position), ("untrained", untrained), ("linear", told["linear"]))
    }

    last = int(starts[2])
    costs = None
    if scale == "small":
        costs = _costs(model, inputs[last:], scenes[last:], given, learn, layer, side * side, seed)
    more = over["position"].value >= 0.1 and all(one.above() for one in over.values())
    holds = more and (costs is None or (costs[0] >= 3 * max(max(costs[1]), 0.0) and costs[0] > 0))
    shuffled = (
        f"shuffling it raises the model's loss by {costs[0]:.4f} nats, random subspaces by {min(costs[1]):.4f} to "
        f"{max(costs[1]):.4f}"
        if costs
        else "shuffling was not tried"
    )
    measured = (
        f"layer {layer}: quadratic {accuracy['quadratic']:.3f}, diagonal {accuracy['diagonal']:.3f}, linear "
        f"{accuracy['linear']:.3f}; positions alone {accuracy['position']:.3f}, untrained {accuracy['untrained']:.3f}; "
        f"more than positions by {over['position']:.3f}, than untrained by {over['untrained']:.3f}; layers "
        f"{', '.join(f'{value:.2f}' for value in chosen['trained'].values())}; {shuffled}"
    )
    off = abs(accuracy["position"].value - 0.5)
    enough = int(judge.same.numel())
    premises = [
        Premise("position does not tell", "0.45 to 0.55", f"{accuracy['position'].value:.3f}", off <= 0.05),
        Premise("there are matched pairs", "1,000 or more", f"{enough:,}", enough >= 1000),
    ]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for name, scores in chosen.items():
            left.plot(list(scores), list(scores.values()), "o-", label=name)
        left.axhline(accuracy["position"].value, color="grey", linestyle="--", label="positions alone")
        left.set(xlabel="layer", ylabel="pairs told rightly", title="Matched pairs of twins")
        left.legend(fontsize=8)
        right.imshow(pictures.image(0))
        right.set(xticks=[], yticks=[], title="Twins")

    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=draw)


def _twins(n: int, seed: int) -> list[Any]:
    """Scenes of two objects alike, the second partly in front of the first."""
    dials = Dials(objects=(2, 2), overlap=0.5, sizes=("large",), textures=("plain",), clutter=(0, 0))
    drawn = Scenes(n, dials, seed=seed)
    found = []
    for i in range(n):
        scene = drawn.scene(i)
        first = scene.objects[0]
        found.append(scene.but(1, shape=first.shape, colour=first.colour))
    return found


def _owners(owner: Tensor, patch: int) -> Tensor:
    """Which object each patch shows, -1 where none has enough of it. [picture, patch]"""
    cells = owner.unfold(1, patch, patch).unfold(2, patch, patch).flatten(3).flatten(1, 2)
    shares = torch.stack([(cells == i).float().mean(-1) for i in (0, 1)])
    share, which = shares.max(0)
    return torch.where(share >= INSIDE, which, -1)


def _matched(owner: Tensor, pictures: range, side: int, rng: torch.Generator) -> _Pairs:
    """As many pairs of one object as of both at every offset."""
    by: dict[tuple[int, int], tuple[list[Any], list[Any]]] = {}
    for picture in pictures:
        there = (owner[picture] >= 0).nonzero()[:, 0].tolist()
        for a, i in enumerate(there):
            for j in there[a + 1 :]:
                offset = (j // side - i // side, j % side - i % side)
                alike = bool(owner[picture, i] == owner[picture, j])
                by.setdefault(offset, ([], []))[alike].append((picture, i, j))
    kept, marks = [], []
    for groups in by.values():
        n = min(map(len, groups))
        for alike, group in enumerate(groups):
            kept += [group[at] for at in torch.randperm(len(group), generator=rng)[:n].tolist()]
            marks += [float(alike)] * n
    pairs = torch.tensor(kept, dtype=torch.long).reshape(-1, 3)
    # which of the two is the first says nothing
    flip = torch.rand(len(pairs), 1, generator=rng) < 0.5
    pairs = torch.where(flip, pairs[:, [0, 2, 1]], pairs)
    return _Pairs(pairs[:, 0], pairs[:, 1], pairs[:, 2], torch.tensor(marks))


@torch.no_grad()
def _states(model: nn.Module, inputs: Tensor, patches: int) -> dict[int, Tensor]:
    """Of each layer, each dimension with mean 0 and deviation 1. [picture, patch, dim]"""
    parts = [states(model, {"pixel_values": some}, patches) for some in inputs.split(50)]
    whole = {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}
    return {layer: (x - x.mean((0, 1))) / x.std((0, 1)).clamp(min=1e-6) for layer, x in whole.items()}


def _probe(given: Tensor, pairs: _Pairs, seed: int, kind: Kind = "quadratic", rank: int = 0) -> SameObject:
    generator = torch.Generator().manual_seed(seed)
    probe = SameObject(given.shape[-1], kind=kind, rank=rank, seed=seed)
    optimiser = torch.optim.AdamW(probe.parameters(), lr=RATE, weight_decay=0.1)
    for _ in range(STEPS):
        some = torch.randint(len(pairs.same), (min(BATCH, len(pairs.same)),), generator=generator)
        batch = _Pairs(pairs.picture[some], pairs.first[some], pairs.second[some], pairs.same[some])
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(probe(batch.of(given))[:, 0, 1], batch.same).backward()
        optimiser.step()
    return probe


@torch.no_grad()
def _rows(probe: SameObject, given: Tensor, pairs: _Pairs) -> tuple[Tensor, Tensor]:
    """Of each picture that has pairs: its number, and the share told rightly."""
    right = ((probe(pairs.of(given))[:, 0, 1] > 0) == pairs.same.bool()).double()
    numbers, at, n = pairs.picture.unique(return_inverse=True, return_counts=True)
    return numbers, torch.zeros(len(numbers), dtype=torch.double).index_add(0, at, right) / n


def _costs(
    model: Any, inputs: Tensor, scenes: list[Any], given: Tensor, pairs: _Pairs, layer: int, patches: int, seed: int
) -> tuple[float, list[float]]:
    """What the model's loss of labels rises by with the part of a probe shuffled, and with random subspaces."""
    names = {label: i for i, label in model.config.id2label.items()}
    labels = torch.zeros(len(scenes), len(names))
    for row, scene in enumerate(scenes):
        for one in scene.objects:
            labels[row, names[f"{one.colour} {one.shape}"]] = 1

    @torch.no_grad()
    def loss(*edits: Any) -> float:
        with intervene(model, *edits):
            return float(F.binary_cross_entropy_with_logits(model(pixel_values=inputs).logits, labels))

    whole = loss()
    basis = _probe(given, pairs, seed, rank=RANK).basis()
    generator = torch.Generator().manual_seed(seed)
    randoms = [torch.linalg.qr(torch.randn(len(basis.T), RANK, generator=generator))[0].T for _ in range(SUBSPACES)]
    ours, *others = (loss(shuffle_binding(one, layer, patches, seed=seed)) - whole for one in (basis, *randoms))
    return ours, others
