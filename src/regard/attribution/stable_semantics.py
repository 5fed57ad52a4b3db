"""StableSemantics: pictures painted from captions, with a map of cross attention for each of the captions' noun chunks.

Zawar et al., StableSemantics: A Synthetic Language-Vision Dataset of Semantic Representations in Naturalistic Images
(arXiv:2406.13735); the abstract was at hand, and no code. Maps as in DAAM (Tang et al., arXiv:2210.04885): for each
word, weights of the patches on it, summed over denoising steps, layers and heads after each layer's map has been
enlarged to one size, bicubically, and cut at 0. Here the sums are means; of a chunk of several tokens the mean over
them, and of a guided batch the half with words. Theirs come from 224 thousand captions of people, rewritten by a
language model, 10 pictures each.

Noun chunks are those of spaCy, where it is given (`nlp`); otherwise runs of words between function words, which knows
captions such as "a red circle and a blue star on stripes", and no verbs. The data set is a folder of pictures that
`datasets` reads as an `imagefolder`: each row a picture with its caption, chunks, and their maps in 8 bits.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..call import Call
from ..files import MARK
from ..prediction import Target
from ..recording import statistic
from ..seam import record
from ._painted import Word, denoiser, grid_of, on_words, positions, texts

# fmt: off
LEADING = frozenset((
    "a", "an", "the", "this", "that", "these", "those", "some", "any", "each", "every", "its", "his", "her", "their",
    "my", "our", "your",
))
BETWEEN = frozenset((
    "about", "above", "across", "after", "against", "along", "among", "and", "are", "around", "as", "at", "before",
    "behind", "below", "beneath", "beside", "between", "by", "down", "for", "from", "has", "have", "in", "inside",
    "into", "is", "like", "near", "next", "nothing", "of", "off", "on", "onto", "or", "out", "over", "than", "that",
    "there", "through", "to", "toward", "towards", "under", "up", "upon", "was", "were", "which", "while", "who",
    "with", "within", "without",
))
# fmt: on
METADATA, ABOUT = "metadata.jsonl", "about.json"


def noun_chunks(caption: str, nlp: Any = None) -> list[Word]:
    """Noun phrases of a caption without what leads them in, and where they stand.

    nlp: a spaCy pipeline, whose `noun_chunks` are taken; None for runs of words between function words.

    >>> [chunk.text for chunk in noun_chunks("a red circle and two blue stars on stripes")]
    ['red circle', 'two blue stars', 'stripes']
    """
    if nlp is not None:
        found = [[(t.text, t.idx) for t in chunk] for chunk in nlp(caption).noun_chunks]
    else:
        found = [[]]
        for word in re.finditer(r"[\w'-]+|[^\w\s]", caption):
            if word[0].lower() in BETWEEN or not word[0][0].isalnum():
                found.append([])
            else:
                found[-1].append((word[0], word.start()))
    chunks = []
    for words in found:
        while words and words[0][0].lower() in LEADING:
            words = words[1:]
        if words:
            start, end = words[0][1], words[-1][1] + len(words[-1][0])
            chunks.append(Word(caption[start:end], start, end))
    return chunks


def stable_semantics(
    pipeline: Any,
    inputs: Mapping[str, Any],
    target: Target = None,
    *,
    layers: Collection[int] | None = None,
    steps: Collection[int] | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    nlp: Any = None,
    **options: Any,
) -> xr.DataArray:
    """Paint texts, and say how much each place looked at each noun chunk, 0 to 1. [batch, chunk, row, column]

    pipeline: of diffusers, with cross attention to words. inputs: with `text`, one or several. layers, steps: which of
    the cross-attention layers and of the denoising steps are read, counted from 0; None for all. size: rows and columns
    of the maps; None for those of the finest layer. seed: of the noise. nlp: see `noun_chunks`. `options` go to the
    pipeline, such as `num_inference_steps` and `guidance_scale`. target is not used: the words are the target.

    The coordinate `text` names the chunks; texts with fewer have maps of 0 for "". Keeps sums, and no step's weights.
    ValueError where a text has no noun chunk or is cut off, where the model has no cross attention, or where no layer
    or step is left.

    >>> import regard
    >>> transformer, pipeline = regard.load("painter")
    >>> maps = stable_semantics(pipeline, {"text": "a red circle and a blue star"}, num_inference_steps=4)
    >>> maps.dims, maps.text.values[0].tolist()
    (('batch', 'chunk', 'row', 'column'), ['red circle', 'blue star'])
    """
    denoiser(pipeline, "stable_semantics")  # refused before its texts are
    given = texts(inputs, "stable_semantics")
    generators = [torch.Generator().manual_seed(seed) for _ in given]
    return painted(pipeline, given, generators, layers=layers, steps=steps, size=size, nlp=nlp, **options)[1]


def painted(
    pipeline: Any,
    captions: Sequence[str],
    generators: Sequence[torch.Generator],
    *,
    layers: Collection[int] | None = None,
    steps: Collection[int] | None = None,
    size: tuple[int, int] | None = None,
    nlp: Any = None,
    **options: Any,
) -> tuple[list[Image.Image], xr.DataArray]:
    """A picture of each caption, and the maps of its chunks: see `stable_semantics`. generators: of their noise."""
    model, n = denoiser(pipeline, "stable_semantics"), len(captions)
    chunks = [noun_chunks(caption, nlp) for caption in captions]
    if bare := [caption for caption, found in zip(captions, chunks) if not found]:
        raise ValueError(f"stable_semantics: {bare[0]!r} has no noun chunk")
    places, most = positions(pipeline, captions, chunks), max(map(len, chunks))
    sums: dict[tuple[int, int], Tensor] = {}  # [batch, chunk, row, column], by the layer's rows and columns
    counts: dict[tuple[int, int], int] = {}
    ran: dict[str, int] = {}

    @statistic("batch query", title="Weights on noun chunks")
    def add(call: Call) -> None:
        if not call.site.cross:
            return
        step = ran[call.site.name] = ran.get(call.site.name, -1) + 1
        if (layers is not None and call.site.layer not in layers) or (steps is not None and step not in steps):
            return
        weights, grid = on_words(call, n), grid_of(call)
        found = weights.new_zeros(n, most, weights.shape[1])
        for row, some in enumerate(places):
            for column, tokens in enumerate(some):
                found[row, column] = weights[row, :, tokens].mean(-1)
        sums[grid] = sums.get(grid, 0) + found.unflatten(-1, grid)
        counts[grid] = counts.get(grid, 0) + 1

    with torch.no_grad(), record(model, add):
        pictures = pipeline(list(captions), generator=list(generators), **options).images
    if not sums:
        raise ValueError(
            f"stable_semantics: nothing was read in layers {layers} and steps {steps}; there are "
            f"{max(ran.values(), default=-1) + 1} steps"
        )
    size = max(sums, key=lambda grid: grid[0] * grid[1]) if size is None else size
    whole = [total if grid == size else _enlarged(total, size) for grid, total in sums.items()]
    maps = torch.stack(whole).sum(0) / sum(counts.values())
    names = [[chunk.text for chunk in found] + [""] * (most - len(found)) for found in chunks]
    found = xr.DataArray(
        maps.double().cpu().numpy(),
        {"text": (("batch", "chunk"), np.array(names))},
        ("batch", "chunk", "row", "column"),
        "stable_semantics",
        {"long_name": "weight on a noun chunk", "predicts": "words"},
    )
    return pictures, found


def _enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(maps, size, mode="bicubic", align_corners=False).clamp(min=0)


def harvest(
    pipeline: Any,
    captions: Sequence[str],
    out: str | Path,
    *,
    per_caption: int = 10,
    seed: int = 0,
    nlp: Any = None,
    **options: Any,
) -> Path:
    """Write a data set of pictures of each caption with maps of its noun chunks; go on with one that is not whole.

    out: a folder, which `datasets.load_dataset("imagefolder", data_dir=out)` opens. A row has `image`, `caption`,
    `seed` (of its noise), `chunks`, `starts` and `ends` (letters of the caption), `maps` (8 bits, each from its `lows`
    to its `highs`, by which maps can be compared). The noise depends on `seed`, the caption and the picture's number
    alone. `options` go to the pipeline, and to `stable_semantics`.

    Captions may be added in a later call. FileExistsError where the folder holds something else, or a data set of other
    settings or captions.

        harvest(pipeline, ["a red circle", "a blue star and a green ring"], "stable", per_caption=3)
    """
    out = Path(out)
    settings = {"per_caption": per_caption, "seed": seed, "nlp": nlp is not None, "options": options}
    done = _resumed(out, captions, json.loads(json.dumps(settings)))
    for index, caption in enumerate(captions):
        if index in done:
            continue
        seeds = [_seed(seed, caption, i) for i in range(per_caption)]
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        pictures, maps = painted(pipeline, [caption] * per_caption, generators, nlp=nlp, **options)
        chunks, lines = noun_chunks(caption, nlp), []
        for i, (picture, each) in enumerate(zip(pictures, maps.values)):
            name = f"{index:06}-{i:02}"
            lows, highs = each.min((1, 2)), each.max((1, 2))
            picture.save(out / "images" / f"{name}.png")
            for k, (one, low, high) in enumerate(zip(each, lows, highs)):
                levels = (255 * (one - low) / (high - low if high > low else 1)).round().astype(np.uint8)
                Image.fromarray(levels).save(out / "maps" / f"{name}-{k:02}.png")
            row = {
                "file_name": f"images/{name}.png",
                "caption": caption,
                "caption_index": index,
                "seed": seeds[i],
                "chunks": [chunk.text for chunk in chunks],
                "starts": [chunk.start for chunk in chunks],
                "ends": [chunk.end for chunk in chunks],
                "lows": lows.tolist(),
                "highs": highs.tolist(),
                "maps_file_names": [f"maps/{name}-{k:02}.png" for k in range(len(chunks))],
            }
            lines.append(json.dumps(row))
        with (out / METADATA).open("a", encoding="utf-8") as file:  # after its pictures: what is listed is there
            file.write("\n".join(lines) + "\n")
    return out


def _seed(seed: int, caption: str, i: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {i} {caption}".encode(), digest_size=6).digest())


def _resumed(out: Path, captions: Sequence[str], settings: Mapping[str, Any]) -> set[int]:
    """Which captions are there already, all their pictures; makes the folder where there is none."""
    about = out / ABOUT
    if not about.is_file():
        if out.exists() and any(out.iterdir()):
            raise FileExistsError(f"{out} holds what is no data set of harvest; choose another folder")
        for part in ("images", "maps"):
            (out / part).mkdir(parents=True, exist_ok=True)
        about.write_text(json.dumps({"about": MARK, **settings}, indent=1) + "\n", encoding="utf-8")
    known = json.loads(about.read_text(encoding="utf-8"))
    if different := [name for name, value in settings.items() if known.get(name) != value]:
        raise FileExistsError(
            f"{out} was harvested with {different[0]}={known.get(different[0])!r}; choose another folder"
        )
    path, per_caption = out / METADATA, settings["per_caption"]
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # the last may be cut off
    lines = lines[: len(lines) // per_caption * per_caption]
    rows = [json.loads(line) for line in lines]
    for row in rows:
        index = row["caption_index"]
        if index >= len(captions) or captions[index] != row["caption"]:
            raise FileExistsError(
                f"{out} has {row['caption']!r} as caption {index}; give the same captions, and more behind them"
            )
    if path.exists():
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return {row["caption_index"] for row in rows}
