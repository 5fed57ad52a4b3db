"""Claim of Cartella et al., Trends, Applications, and Challenges in Human Attention Modelling (arXiv:2402.18673).

The survey orders work on human gaze by headings, and says that where people look depends on the centre of a picture and
on the task. Here, first, every paper of the room `gaze` carries a tag of these headings, and every tag has a paper.
Second, people who search (Ruarte et al., 2025; real data, looks begin in the middle): the first three looks after that,
by NSS, of half of the people who saw a picture, scored by a map of the other half, which had the same target; by a
Gaussian around the centre, fitted to other pictures; and, as the control, by a map of people on another picture. At the
third look, by the target's place and, as its control, by the place of each other thing in the picture. Maps are
smoothed by about one degree; means and errors are over pictures. Third, why metrics are reported together: AUC is the
same for a map and for its square, NSS is not. Maps of bottom-up saliency need pictures, which the data come without:
what the survey says of these is not tested.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import catalog
from ...catalog import Finding, Premise
from ...data import loaders
from ...data.loaders import Scanpath
from ...gaze.auc_judd import auc_judd
from ...gaze.fixation_map import fixation_map
from ...gaze.nss import nss
from .._data import folder
from .._measure import mean

SURVEY = "human-attention-survey"
CELL, DEGREE = 16, 2  # pixels of a cell of the map; cells of a degree, roughly
LOOKS = 3  # after the first, which is where the trial begins
TRIALS, VIEWERS, PICTURES = 200, 20, 30
NOT_GAZE = "brain-encoder"  # of the room, but on responses of the brain
Map = NDArray[np.float64]
EXPECTED = (
    "every paper on gaze here has a tag of the survey's and every tag a paper; maps of other people on the same "
    "picture are above the centre, and those on another picture are not; by the third look the target's place is above "
    "the centre and above that of another thing: by two standard errors over pictures each; AUC is the same for a map "
    "and its square, NSS is not"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Papers on gaze are placed, and people look where picture and target say, beyond the centre."""
    headings = catalog.taxonomy(SURVEY)
    known = {tag: of for tagging in headings.values() for tag, of in tagging.items()}
    papers = [row for row in catalog.rows().values() if row.room == "gaze" and row.key != NOT_GAZE]
    without = [row.key for row in papers if not set(row.tags) & set(known)]
    empty = [heading for heading, tagging in headings.items() if not tagging]

    where, rng = folder("gaze_search_hybrid"), np.random.default_rng(seed)
    boxes = {scene.image: scene.boxes for scene in loaders.search_scenes(where)}
    trials: dict[str, list[loaders.SearchTrial]] = defaultdict(list)
    for trial in loaders.visual_search(where):
        if len(trial.fixations) > LOOKS:
            trials[trial.image].append(trial)
    images = rng.permutation(sorted(image for image, of in trials.items() if len(of) >= VIEWERS)).tolist()
    halves = {image: np.array_split(rng.permutation(len(trials[image])), 2) for image in images}
    size = trials[images[0]][0].size
    shape = size[1] // CELL, size[0] // CELL

    def looks(image: str, half: int, first: int = 1) -> Scanpath:
        """Of half of the people, as if of one."""
        return Scanpath(
            np.concatenate([trials[image][i].fixations[first : LOOKS + 1] for i in halves[image][half]]), size
        )

    maps = {image: [fixation_map([looks(image, half)], shape, sigma=DEGREE) for half in (0, 1)] for image in images}
    parts = images[::2], images[1::2]
    centres = [_centre([looks(image, half) for image in part for half in (0, 1)], shape) for part in parts]
    scores: dict[str, list[float]] = defaultdict(list)
    same_auc, same_nss = [], []
    for n, image in enumerate(images):
        centre, elsewhere = centres[1 - n % 2], images[(n + 1) % len(images)]
        target = trials[image][0].target_box
        others = [_place(box, size, shape) for box in boxes[image] if np.abs(box - target).sum() > 1]
        for half in (0, 1):
            path, third = looks(image, half), looks(image, half, LOOKS)
            scores["same picture"].append(nss(maps[image][1 - half], path))
            scores["centre"].append(nss(centre, path))
            scores["another picture"].append(nss(maps[elsewhere][1 - half], path))
            scores["target, third look"].append(nss(_place(target, size, shape), third))
            scores["another thing, third look"].append(float(np.mean([nss(other, third) for other in others])))
            scores["centre, third look"].append(nss(centre, third))
            same_auc.append(np.isclose(auc_judd(centre, path), auc_judd(centre**2, path), atol=1e-9))
            same_nss.append(np.isclose(nss(centre, path), nss(centre**2, path), atol=1e-9))
    found = {name: np.reshape(of, (-1, 2)).mean(1) for name, of in scores.items()}  # [picture]
    beyond = mean(found["same picture"] - found["centre"])
    control = mean(found["another picture"] - found["centre"])
    aim = mean(found["target, third look"] - found["centre, third look"])
    aimed = mean(found["target, third look"] - found["another thing, third look"])
    metrics = all(same_auc) and not any(same_nss)
    holds = (
        not without
        and all(known.values())
        and beyond.above()
        and not control.above()
        and aim.above()
        and aimed.above()
        and metrics
    )
    measured = (
        f"of {len(papers)} papers on gaze {len(papers) - len(without)} have a tag; headings without a paper: "
        f"{', '.join(empty)}. NSS: " + ", ".join(f"{name} {mean(of):.2f}" for name, of in found.items()) + ". "
        f"Above the centre: same picture {beyond:.2f}, another picture {control:.2f}, target at the third look "
        f"{aim:.2f}, and above another thing {aimed:.2f} ({len(images)} pictures). "
        f"For the square of a map AUC is the same in {np.mean(same_auc):.0%}, "
        f"NSS in {np.mean(same_nss):.0%}"
    )
    n = sum(len(trials[image]) for image in images)
    premises = [
        Premise(f"trials of {LOOKS} looks or more after the first", f"{TRIALS} or more", f"{n}", n >= TRIALS),
        Premise(f"pictures of {VIEWERS} such trials", f"{PICTURES} or more", f"{len(images)}", len(images) >= PICTURES),
    ]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
        left.imshow(maps[images[0]][0], cmap="Blues", extent=(0, size[0], size[1], 0))
        left.plot(*looks(images[0], 1).places.T, ".", color="tab:orange", ms=4)
        left.set(title="Half of the people (map)\nand the others (points)", xticks=[], yticks=[])
        every = [mean(of) for of in found.values()]
        right.barh(list(found), [m.value for m in every], xerr=[2 * m.error for m in every])
        right.invert_yaxis()
        right.set(xlabel="NSS, and two standard errors over pictures")

    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=draw)


def _centre(paths: Sequence[Scanpath], shape: tuple[int, int]) -> Map:
    """The Gaussian of all of these looks."""
    every = np.concatenate([path.places for path in paths]) / CELL
    row, column = np.indices(shape) + 0.5
    away = np.stack([column, row], -1) - every.mean(0)
    return np.exp(-np.einsum("rci,ij,rcj->rc", away, np.linalg.inv(np.cov(every.T)), away) / 2)


def _place(box: NDArray[np.floating], size: tuple[int, int], shape: tuple[int, int]) -> Map:
    """The middle of a box, smoothed."""
    return fixation_map([Scanpath((box[None, :2] + box[None, 2:]) / 2, size)], shape, sigma=DEGREE)
