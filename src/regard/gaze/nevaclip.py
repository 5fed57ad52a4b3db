"""Scanpaths from a caption: a sharp spot is moved until what is seen fits the words.

Zanca, Zugarini, Dietz, Altstidl, Turban Ndjeuha, Schwinn and Eskofier, Contrastive Language-Image Pretrained Models are
Zero-Shot Human Scanpath Predictors (arXiv:2305.12380), after the authors' code. The picture is blurred but for Gaussian
spots; each fixation is found by descent along the sign of the gradient of one less the cosine between what an encoder
makes of the picture so seen and the embedding of a caption.

As in the code: `fovea` divides the squared distance itself, where half a picture is 1; each fixation begins anew from
the middle; where a step has not made the loss the lowest so far, the place is drawn anew; what is kept with the lowest
loss is the place *after* the step (`best="before"` keeps that which had the loss, ours); `forgetting=0`, what their
figures are made with, remembers the last spot only, 1 remembers all. Places may leave the picture. The blend with a
second target is left out. `start="random"` is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.loaders import Scanpath

Encode = Callable[[Tensor], Tensor]
Uniform = Callable[[int, int], Tensor]  # fixation, iteration -> [batch, 2], 0 to 1


class Explored(NamedTuple):
    """places [batch, fixation, 2], row then column, -1 to 1; losses [fixation, iteration, batch]"""

    places: Tensor
    losses: Tensor


def nevaclip(
    encode: Encode,
    pictures: Tensor,
    target: Tensor,
    *,
    fixations: int = 10,
    iterations: int = 20,
    rate: float = 0.1,
    fovea: float = 0.2,
    blur_window: int = 41,
    blur_sigma: float = 10.0,
    forgetting: float = 0.0,
    amplitude: float = 1.0,
    random_restarts: bool = True,
    best: Literal["after", "before"] = "after",
    start: Literal["middle", "random"] = "middle",
    seed: int = 0,
) -> list[Scanpath]:
    """A scanpath over each picture, towards what makes its embedding most like the target's. In its pixels.

    encode: pictures [batch, channel, row, column] -> embeddings [batch, dim], differentiable and in evaluation mode;
    `regard.gaze.encoder.encoder` makes one of a CLIP or a vision model. target: [batch, dim] or [dim], the caption's
    embedding, or a class's row of a classifier. fovea: as a share of half a picture, squared. blur_window, blur_sigma:
    pixels. forgetting: what is left of the earlier spots at each fixation, 0 to 1.

    Durations are not known. ValueError for pictures that are not square, an even window, targets that do not fit, or
    an encoder without gradient.

    >>> _ = torch.manual_seed(0)
    >>> pictures = torch.rand(1, 3, 24, 24)
    >>> way = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 4, 4), torch.nn.Flatten())
    >>> (path,) = nevaclip(way, pictures, torch.ones(144), fixations=3, iterations=4, blur_window=9, blur_sigma=3.0)
    >>> len(path), path.size
    (3, (24, 24))
    """
    if best not in ("after", "before") or start not in ("middle", "random"):
        raise ValueError(f'best is "after" or "before", start "middle" or "random": got {best!r}, {start!r}')
    generator = torch.Generator().manual_seed(seed)
    batch = len(pictures)

    def uniform(fixation: int, iteration: int) -> Tensor:
        return torch.rand(batch, 2, generator=generator).to(pictures)

    found = explore(
        encode,
        pictures,
        target,
        uniform,
        fixations=fixations,
        iterations=iterations,
        rate=rate,
        fovea=fovea,
        blur_window=blur_window,
        blur_sigma=blur_sigma,
        forgetting=forgetting,
        amplitude=amplitude,
        random_restarts=random_restarts,
        best=best,
        start=start,
    )
    size = pictures.shape[-1]
    pixels = (found.places.flip(-1) + 1) / 2 * (size - 1) + 0.5  # of a pixel's middle
    return [Scanpath(path.double().cpu().numpy(), (size, size)) for path in pixels]


def explore(
    encode: Encode,
    pictures: Tensor,
    target: Tensor,
    uniform: Uniform,
    *,
    fixations: int,
    iterations: int,
    rate: float,
    fovea: float,
    blur_window: int,
    blur_sigma: float,
    forgetting: float,
    amplitude: float = 1.0,
    random_restarts: bool = True,
    best: str = "after",
    start: str = "middle",
) -> Explored:
    """What `nevaclip` does, with the random numbers given, and with the loss at each step.

    uniform(fixation, iteration) [batch, 2] is asked once an iteration, and used for pictures that did not improve; with
    `start="random"` also before a fixation's first, as iteration -1.
    """
    _checked(pictures, fixations, iterations, forgetting)
    batch = len(pictures)
    target = target.detach().expand(batch, -1)
    blurred = blur(pictures, window=blur_window, sigma=blur_sigma)
    memory = pictures.new_zeros(batch, *pictures.shape[2:])
    chosen, losses = [], []
    for fixation in range(fixations):
        place = 2 * uniform(fixation, -1) - 1 if start == "random" else pictures.new_zeros(batch, 2)
        least, where = pictures.new_full((batch,), math.inf), place
        for iteration in range(iterations):
            place = place.detach().requires_grad_()
            with torch.enable_grad():
                spots = memory + spot(place, pictures.shape[-1], fovea=fovea, amplitude=amplitude)
                loss = caption_loss(encode, foveated(pictures, blurred, spots), target)
                if not loss.requires_grad:
                    raise ValueError("the encoder gives no gradient: leave out torch.no_grad and detach in `encode`")
                (gradient,) = torch.autograd.grad(loss.sum(), place)  # its sign is that of the mean's
            loss, before = loss.detach(), place.detach()
            stepped = before - rate * gradient.sign()
            better = (loss < least)[:, None]
            least = torch.where(better[:, 0], loss, least)
            where = torch.where(better, stepped if best == "after" else before, where)
            chance = uniform(fixation, iteration)
            elsewhere = 2 * chance - 1 if random_restarts else stepped + rate * (chance - 0.5)
            place = torch.where(better, stepped, elsewhere)
            losses.append(loss)
        chosen.append(where)
        memory = forgetting * memory + spot(where, pictures.shape[-1], fovea=fovea, amplitude=amplitude)
    return Explored(torch.stack(chosen, 1), torch.stack(losses).unflatten(0, (fixations, iterations)))


def blur(pictures: Tensor, *, window: int = 41, sigma: float = 10.0) -> Tensor:
    """By a Gaussian of deviation `sigma` pixels, cut to an odd window; the picture is mirrored at its borders.
    [batch, channel, row, column]
    """
    if window % 2 == 0 or window < 1 or sigma <= 0:
        raise ValueError(f"blur({window=}, {sigma=}): a window is odd, so that it has a middle, and sigma above 0")
    half = window // 2
    if half >= min(pictures.shape[2:]):
        size = list(pictures.shape[2:])
        raise ValueError(f"blur_window={window} mirrors {half} pixels, of pictures of {size}: take a smaller one")
    taps = torch.exp(-((torch.arange(window, device=pictures.device) - half) ** 2) / (2 * sigma**2)).to(pictures)
    taps = (taps / taps.sum()).expand(pictures.shape[1], 1, 1, -1)
    padded = F.pad(pictures, (half,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, taps, groups=len(taps)), taps.mT, groups=len(taps))


def spot(places: Tensor, size: int, *, fovea: float = 0.2, amplitude: float = 1.0) -> Tensor:
    """How sharp each pixel of a square picture is seen. places [batch, 2], row and column, -1 to 1.
    [batch, row, column]
    """
    at = torch.linspace(-1, 1, size, device=places.device, dtype=places.dtype)
    row, column = ((at - p[:, None]) ** 2 for p in places.unbind(-1))
    return amplitude * torch.exp(-(row[:, :, None] + column[:, None]) / fovea)


def foveated(pictures: Tensor, blurred: Tensor, spots: Tensor) -> Tensor:
    """Pictures, blurred where there is no spot [batch, row, column]; beyond 1 they add nothing."""
    return pictures + (blurred - pictures) * (1 - spots).clamp(0, 1)[:, None]


def caption_loss(encode: Encode, seen: Tensor, target: Tensor) -> Tensor:
    """One less the cosine between what is seen and the target, 0 to 2. [batch]"""
    found = encode(seen)
    if found.ndim != 2 or found.shape != target.shape:
        raise ValueError(
            f"the encoder gives {list(found.shape)}, the target is {list(target.shape)}: one row a picture"
        )
    return 1 - F.cosine_similarity(found, target, dim=-1)


def _checked(pictures: Tensor, fixations: int, iterations: int, forgetting: float) -> None:
    if pictures.ndim != 4 or pictures.shape[2] != pictures.shape[3] or not pictures.is_floating_point():
        raise ValueError(
            f"pictures are square, floating point [batch, channel, row, column]: got {pictures.dtype} "
            f"{list(pictures.shape)}"
        )
    if fixations < 1 or iterations < 1 or not 0 <= forgetting <= 1:
        raise ValueError(f"{fixations=} and {iterations=} are 1 or more, {forgetting=} is within 0 and 1")
