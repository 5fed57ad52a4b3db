"""A picture named by corresponding patches, whose correspondences and attention are edited by hand (chm-corr).

The pictures are those of the claim on chm-corr: known ones with biased names, and others that are asked, or one of the
user's own.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any

import torch
from PIL import Image
from pydantic import BaseModel, Field
from torch import Tensor
from torch.nn.functional import normalize

from .. import report, zoo
from ..attribution.chm_corr import SMALLEST, CorrespondenceClassifier
from ..claims.attribution import chm_corr as pictures
from ..data.scenes import render
from .jobs import Job
from .steps import Upload

if TYPE_CHECKING:
    from .work import Desk

SHOWN = 12  # neighbours
TIMES = 4  # as large as the pictures are
Patch = Annotated[int, Field(strict=True, ge=0, lt=pictures.GRID**2)]


class Edited(BaseModel):
    """A picture that is asked, the patches that count (none: those of the attention), and correspondences by hand.

    The picture is one of the claim's, or one that was uploaded.
    """

    item: Annotated[int, Field(strict=True, ge=0, lt=pictures.ASKED)] = 0
    upload: Upload | None = None
    mask: Annotated[list[Patch], Field(max_length=pictures.GRID**2)] = []
    moved: Annotated[
        list[tuple[Annotated[int, Field(strict=True, ge=0, lt=SHOWN)], Patch, Patch]], Field(max_length=768)
    ] = []


@functools.cache
def _known() -> tuple[CorrespondenceClassifier, list[Any], list[Any], list[int]]:
    known, labels = pictures.biased_scenes(pictures.KNOWN, 0, pictures.BIAS)
    asked, names = pictures.biased_scenes(pictures.ASKED, pictures.HELD, 1 - pictures.BIAS)
    return CorrespondenceClassifier(pictures.patch_features(known), labels), known, asked, names


def edit(desk: Desk, job: Job, asked: Edited) -> None:
    """Tell the answer without the edits and with them, and the neighbours with what their patches correspond to."""
    job.tell("progress", what="comparing patches")
    classifier, _, others, names = _known()
    if asked.upload is None:
        query = pictures.patch_features([others[asked.item]])[0]
        shown_as, truth = _picture("asked", asked.item), pictures.NAMES[names[asked.item]]
    else:
        given = desk.picture(asked.upload)
        _, processor = zoo.load("viewer")
        query, truth = pictures.held(processor(given, return_tensors="pt")["pixel_values"])[0], None
        size = (pictures.viewer.SIZE,) * 2
        shown_as = _drawn(given.resize(size, Image.Resampling.BILINEAR))  # as the model is given it
    before = classifier.explain(query)
    found = classifier.features[torch.from_numpy(before.item.values)]
    own = corresponding(query, found)
    for neighbour, patch, place in asked.moved:
        own[neighbour, patch] = place
    mask = torch.zeros(pictures.GRID**2, dtype=torch.bool)
    mask[asked.mask] = True
    used = mask.view(pictures.GRID, -1) if asked.mask else None
    after = classifier.explain(query, used, torch.stack([own // pictures.GRID, own % pictures.GRID], -1))
    order = after.attrs["order"]
    similar = after.similarity.values
    votes = [torch.bincount(torch.from_numpy(of.label.values[of.attrs["order"]]), minlength=len(pictures.NAMES))
             for of in (before, after)]  # fmt: skip
    shown = []
    for neighbour in range(SHOWN):
        counted = (similar[neighbour] * after.mask.values[neighbour]).ravel()
        best = counted.argsort()[::-1][: classifier.top if used is None else int(mask.sum())]
        shown.append(
            {
                "picture": _picture("known", int(after.item.values[neighbour])),
                "label": pictures.NAMES[int(after.label.values[neighbour])],
                "score": float(after.score.values[neighbour]),
                "votes": neighbour in order,
                "own": own[neighbour].tolist(),
                "best": [int(i) for i in best if counted[i] > 0],
                "similarity": similar[neighbour].ravel().round(4).tolist(),
            }
        )
    job.tell(
        "edited",
        grid=pictures.GRID,
        picture=shown_as,
        truth=truth,
        names=list(pictures.NAMES),
        votes=[of.tolist() for of in votes],
        answers=[pictures.NAMES[of.attrs["prediction"]] for of in (before, after)],
        voters=classifier.votes,
        neighbours=shown,
    )


def corresponding(query: Tensor, near: Tensor) -> Tensor:
    """The patch of each neighbour that is most alike. [neighbour, patch]"""
    own, theirs = (normalize(of.flatten(-2), dim=-2, eps=SMALLEST) for of in (query, near))
    return (theirs.mT @ own).argmax(1)


@functools.lru_cache(256)
def _picture(kind: str, item: int) -> str:
    _, known, asked, _ = _known()
    image = Image.fromarray(render([(known if kind == "known" else asked)[item]], pictures.viewer.SIZE).pixels[0])
    return _drawn(image)


def _drawn(image: Image.Image) -> str:
    side = TIMES * image.width
    return report.picture(image.resize((side, side), Image.Resampling.NEAREST))["source"]
