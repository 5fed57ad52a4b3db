"""MVRoom (arXiv:2512.04248): views that ask each other where the layout says something is agree on invented colours.

A flat world of three discs, whose bounding boxes are told and whose colours are not: each disc has two of its own, the
second in a stripe, so that places matter. Three cameras see it, each picture a line of 14 pixels. A small diffusion
model paints all three: without attention between views, with samples spread evenly along rays, and with as many where
the layout's boxes are; as many weights in the last two, and as many steps in all. Judged is how far colours of views
are apart where both see one point of a surface, which is known. Control: samples at another world's depths. Attention
is a reconstruction, and the paper's pictures are of rooms; what full attention over all views does is not run.
One pilot on another seed, with four views and a network told of its step less well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...data import flatland
from ...extras import needs
from ...models.mvroom import Boxes, Layers, MultiViewDenoiser, conditions, layout_layers, mvroom, sample
from .._measure import mean
from .._nets import fit
from .grf import pose

SCALES = "small", "large"
STEPS, TRAIN = {"small": 420, "large": 8000}, {"small": 600, "large": 4000}
HELD, BATCH, RATE, VIEWS, PIXELS, NOISE, DRAWN, LAYERS = 60, 12, 6e-3, 3, 14, 50, 20, 2
SIZES: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 2, "samples": 2, "near": 1.0, "far": 3.0}
ARC, STRIPE, NEAR = 45, 0.7, 0.08  # degrees to either side; half a stripe in radians; how near points are one
WAYS = "none", "even", "layout"


class Worlds(NamedTuple):
    pictures: Tensor  # -1 to 1 [world, view, 3, 1, pixel]
    told: Tensor  # conditions [world, view, channel, 1, pixel]
    poses: Tensor
    lenses: Tensor
    layers: Layers
    disc: Tensor  # which is seen, -1 for none [world, view, pixel]
    points: Tensor  # where [world, view, pixel, 2]

    def at(self, some: Any) -> Worlds:
        return self._replace(
            **{n: v[some] for n, v in self._asdict().items() if n != "layers"}, layers=_at(self.layers, some)
        )


def _at(layers: Layers, some: Any) -> Layers:
    return Layers(*(of[some] for of in layers))


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """How far colours of two views are apart, at pixels that see the same point."""
    expected = (
        f"on {HELD} new worlds: with samples by the layout views are at most 0.8 as far apart as with even ones, and "
        "half as far as without attention between views, by two standard errors over worlds; the loss is at most 5% "
        "above that of even ones; with another world's depths they are as far apart as with even ones or farther"
    )
    data, held = worlds(TRAIN[scale], 2 * seed), worlds(HELD, 2 * seed + 1)
    models = {way: _trained(way, data, STEPS[scale], seed) for way in WAYS}
    painted = {way: _painted(model, held, seed) for way, model in models.items()}
    wrong = held._replace(layers=_at(held.layers, torch.arange(HELD).roll(1)))
    painted["other depths"] = _painted(models["layout"], wrong, seed)
    pairs = same_points(held)
    apart = {way: disagreement(of, pairs) for way, of in painted.items()}
    apart["true"] = disagreement(held.pictures, pairs)
    apart["independent"] = disagreement(_mixed(held.pictures), pairs)
    with torch.no_grad():
        lots = {way: torch.Generator().manual_seed(seed) for way in WAYS}
        losses = {way: float(_loss(model, held, lots[way], clean_error=True)) for way, model in models.items()}
    even, none = (mean(apart["layout"] - share * apart[way]) for share, way in ((0.8, "even"), (0.5, "none")))
    control = mean(apart["other depths"] - apart["even"])
    holds = even.below() and none.below() and losses["layout"] <= 1.05 * losses["even"] and not control.below()
    level = {way: mean(of) for way, of in apart.items()}
    measured = (
        "apart by "
        + ", ".join(f"{way} {value:.3f}" for way, value in level.items())
        + f"; layout less 0.8 of even {even:+.3f}, less half of none {none:+.3f}, other depths less even "
        f"{control:+.3f}; loss " + ", ".join(f"{way} {value:.4f}" for way, value in losses.items())
    )
    there = held.disc[:, :, None, None] >= 0
    flat = data.pictures.movedim(2, -1)[(data.disc >= 0)[:, :, None]].mean(0)[:, None, None]
    constant = float(F.mse_loss(torch.where(there, flat, torch.ones(())), held.pictures))
    share, worst = level["none"].value / level["independent"].value, max(losses.values()) / constant
    premises = [
        Premise(
            "agreement needs exchange", "without, 0.8 of independent colours or more", f"{share:.2f}", share >= 0.8
        ),
        Premise("all learn", "loss 30% below one colour for all discs", f"{1 - worst:.0%} below", worst <= 0.7),
    ]

    def draw(figure: Any) -> None:
        rows = {"true": held.pictures, **painted}
        for axes, (name, of) in zip(figure.subplots(len(rows), 4), rows.items(), strict=True):
            for world, part in enumerate(axes):
                part.imshow(of[world, :, :, 0].movedim(1, -1).clamp(-1, 1).numpy() / 2 + 0.5, aspect="auto")
                part.set(xticks=[], yticks=[])
            axes[0].set_ylabel(name, fontsize=7, rotation=0, ha="right")

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def worlds(n: int, seed: int) -> Worlds:
    """Pictures, cameras and layouts of `n` worlds, and what each pixel sees."""
    lens = torch.tensor([[PIXELS, 0, (PIXELS - 1) / 2], [0, PIXELS, 0], [0, 0, 1.0]]).expand(VIEWS, 3, 3)
    found: list[tuple[Any, ...]] = []
    for index in range(n):
        world, draws = (
            flatland.discs(3, radius=(0.22, 0.34), seed=seed, index=index),
            np.random.default_rng((seed, index)),
        )
        spread = np.radians(np.linspace(-ARC, ARC, VIEWS) + draws.uniform(-5, 5, VIEWS))
        angles = draws.uniform(0, 2 * np.pi) + spread
        second, stripes = draws.uniform(0, 1, (3, 3)), angles.mean() + draws.uniform(-1, 1, 3)
        lines = [flatland.trace(world, *flatland.camera(angle, pixels=PIXELS)) for angle in angles]
        disc, points = np.stack([line.disc for line in lines]), np.stack([line.points for line in lines])
        points = np.nan_to_num(points)
        away = points - world.centres[disc]
        turned = np.angle(np.exp(1j * (np.arctan2(away[..., 1], away[..., 0]) - stripes[disc])))
        colours = np.where((np.abs(turned) < STRIPE)[..., None], second[disc], world.colours[disc])
        colours = np.where((disc >= 0)[..., None], colours, 1.0)
        poses = torch.stack([pose(angle) for angle in angles])
        centres = F.pad(torch.tensor(world.centres).float(), (0, 1))
        sizes = torch.tensor(world.radii).float()[:, None].expand(3, 3) * 2
        boxes = Boxes(centres, sizes, torch.eye(3).expand(3, 3, 3), torch.arange(3), torch.zeros(3, dtype=torch.bool))
        layers = layout_layers(boxes, poses, lens, (1, PIXELS), layers=LAYERS)
        picture = torch.tensor(2 * colours - 1).float().movedim(-1, 1)[:, :, None]
        found.append((picture, poses, lens, torch.tensor(disc), torch.tensor(points).float(), layers))
    pictures, poses, lenses, disc, points = (torch.stack([of[i] for of in found]) for i in range(5))
    layers = Layers(*(torch.stack(of) for of in zip(*(of[5] for of in found), strict=True)))
    return Worlds(pictures, conditions(layers, 3, frequencies=2), poses, lenses, layers, disc, points)


def same_points(held: Worlds) -> list[Tensor]:
    """Pairs of pixels of two views that see one point, of each world: two indices into view * pixel. [pair, 2]"""
    pairs = []
    for disc, points in zip(held.disc.flatten(1), held.points.flatten(1, 2), strict=True):
        view = torch.arange(VIEWS).repeat_interleave(PIXELS)
        near = (torch.cdist(points, points) < NEAR) & (view[:, None] < view) & (disc[:, None] == disc) & (disc >= 0)
        pairs.append(near.nonzero())
    return pairs


def disagreement(pictures: Tensor, pairs: list[Tensor]) -> Tensor:
    """Mean absolute difference of colours, 0 to 2, of each world that has such pairs. [world]"""
    flat = pictures[:, :, :, 0].movedim(2, -1).flatten(1, 2)  # [world, view * pixel, 3]
    apart = [(of[pair[:, 0]] - of[pair[:, 1]]).abs().mean() for of, pair in zip(flat, pairs, strict=True) if len(pair)]
    return torch.stack(apart)


def _mixed(pictures: Tensor) -> Tensor:
    """A colour for all of each view, even over what there is: views that have agreed on nothing."""
    draws = torch.Generator().manual_seed(0)
    lots = 2 * torch.rand(*pictures.shape[:3], 1, 1, generator=draws) - 1
    return lots.expand_as(pictures)


def _schedule() -> Any:
    with needs("mvroom", "diffusers"):
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    return DDPMScheduler(
        NOISE, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample_range=1.0
    )


def _loss(model: MultiViewDenoiser, data: Worlds, draws: torch.Generator, *, clean_error: bool = False) -> Tensor:
    """Squared error of velocities, or of the clean pictures that they stand for."""
    scheduler, clean = _schedule(), data.pictures
    noise, steps = torch.randn(clean.shape, generator=draws), torch.randint(NOISE, (len(clean),), generator=draws)
    noisy: Any = scheduler.add_noise(clean, noise, steps)  # type: ignore[arg-type]
    off = model(noisy, steps / NOISE, data.told, data.poses, data.lenses, data.layers)
    off = (off - scheduler.get_velocity(clean, noise, steps)).square()  # type: ignore[arg-type]
    share = 1 - scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1, 1) if clean_error else torch.ones(())
    return (share * off).mean()


def _trained(way: str, data: Worlds, steps: int, seed: int) -> MultiViewDenoiser:
    torch.manual_seed(seed)
    model, draws = mvroom(data.told.shape[2], by=way, **SIZES), torch.Generator().manual_seed(seed)
    fit(
        model.parameters(),
        lambda some: _loss(model, data.at(some), draws),
        len(data.pictures),
        steps,
        seed,
        batch=BATCH,
        rate=RATE,
    )
    return model.eval()


def _painted(model: MultiViewDenoiser, held: Worlds, seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return sample(model, _schedule(), held.told, held.poses, held.lenses, held.layers, steps=DRAWN, generator=draws)
