"""Does cross attention agree with saliency more where heads and layers are averaged, and less than wholly?

On the bundled listener, which writes the digits that somebody speaks: takes of known speakers that it has not heard.
Its encoder was told while it learned which digit is spoken where, and one of its ten heads puts nearly all of its
weight there, so that this head may agree more than the average, of which the paper says nothing. Two sets of masks by
themselves say how sure the saliency is.

Piloted by others on six strings with 200 masks; here two strings of seeds 100 and 101
with 24 masks said how many masks are needed, and that bands of frequency add nothing to maps over time.
"""

from __future__ import annotations

import os
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ... import zoo
from ...catalog import Finding, Premise
from ...evaluation.cross_attention_saliency import (
    agreement,
    cross_attention_saliency,
    perturbation_saliency,
    pooled,
    written,
)
from ...evaluation.word_error import word_error_rate
from ...seam import record
from ...zoo.recipes import listener
from .._measure import mean

EXPECTED = (
    "correlation with saliency of the input of the mean over all heads is 0.05 above the median of single heads by two "
    "standard errors, and not below the mean of any layer; it lies between 0.25 and 0.85; with saliency of the "
    "encoder's states it is 0.02 higher, by two standard errors; hiding first what saliency calls important loses more "
    "words than hiding first what attention does, by two standard errors; the attention to another string agrees by "
    "less than half"
)
STRINGS, DIGITS, MASKS, GRID = 4, 4, 400, (1, 50)  # masks of each of two sets
STEPS = 10  # shares of the sound that are hidden


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Agreement by head, layer and all, on the input and the encoder's states; what hiding loses."""
    home = os.environ.get("REGARD_DATA")
    if home is None:
        raise ValueError("this claim needs spoken digits: set REGARD_DATA to the folder that holds audio_fsdd")
    model, processor = zoo.load("listener")
    rng = np.random.default_rng((seed, 11))
    strings = listener.Strings(Path(home), speakers="takes")
    drawn = (strings.draw(rng, changed=False) for _ in count())
    found = list(islice((one for one in drawn if len(one.digits) >= DIGITS), STRINGS))
    sound = processor([one.sound for one in found], sampling_rate=listener.RATE, return_tensors="pt").input_features
    given, counted = written(model, {"input_features": sound})
    halves, whole, rho = {}, {}, {}
    for on in ("input", "encoder"):
        sets = [
            perturbation_saliency(model, given, on=on, masks=MASKS, grid=GRID, seed=seed + 10**4 * i)  # type: ignore[arg-type]
            for i in range(2)
        ]
        halves[on] = [pooled(one, listener.POSITIONS) for one in sets]
        whole[on] = ((sets[0] + sets[1]) / 2).assign_attrs(sets[0].attrs)
        rho[on] = cross_attention_saliency(model, given, on=on, saliency=whole[on])  # type: ignore[arg-type]
    # what the prompt of the decoder says is none of the words
    words = counted.clone()
    words[:, : _begun(counted)] = False
    both = {on: _each(of[0], of[1], words) for on, of in halves.items()}
    ceiling = float(np.sqrt(max(np.mean(both["input"]), 0.0)))

    of = rho["input"]
    every = mean(of["rho_all"].values)
    heads = of["rho"].stack(each=("layer", "head"))
    over_heads = mean((of["rho_all"] - heads.median("each")).values)
    layers = of["rho_layer"].mean("batch").values
    mixing = mean((rho["encoder"]["rho_all"] - of["rho_all"]).values)
    maps, attended = pooled(whole["input"], listener.POSITIONS), _attended(model, given)
    other = mean([_other(attended, maps, words, row) for row in range(STRINGS)])
    lost = {
        name: _lost(model, processor, sound, of, words, [one.text for one in found])
        for name, of in (("saliency", maps), ("attention", attended))
    }
    more = mean(np.array(lost["attention"]) - np.array(lost["saliency"]))
    right = 1 - word_error_rate([one.text for one in found], listener.transcribe(model, processor, found))
    holds = (
        over_heads.value >= 0.05
        and over_heads.above()
        and every.value >= layers.max()
        and 0.25 <= every.value <= 0.85
        and mixing.value >= 0.02
        and mixing.above()
        and more.above()
        and other.value < every.value / 2
    )
    best = heads.mean("batch")
    measured = (
        f"with saliency of the input {every:.2f}: more than the median head by {over_heads:.2f} (heads "
        f"{float(best.min()):.2f} to {float(best.max()):.2f}, layers {', '.join(f'{value:.2f}' for value in layers)}); "
        f"with the encoder's states {mean(rho['encoder']['rho_all'].values):.2f}, more by {mixing:.2f}; attention to "
        f"another string {other:.2f}; area of right words, hiding by attention {np.mean(lost['attention']):.2f}, by "
        f"saliency {np.mean(lost['saliency']):.2f}, less by {more:.2f}; two sets of masks agree by "
        f"{np.mean(both['input']):.2f} and {np.mean(both['encoder']):.2f}"
    )
    premises = [
        Premise("the model hears", "90% of the words right", f"{right:.1%}", right >= 0.9),
        Premise(
            "saliency is sure: two sets of masks agree, so that a perfect map could reach",
            "0.8, 0.9",
            f"{np.mean(both['input']):.2f}, {ceiling:.2f}",
            float(np.mean(both["input"])) >= 0.8 and ceiling >= 0.9,
        ),
        Premise(
            "there are words to compare",
            "16",
            str(int(words.sum())),
            int(words.sum()) >= 16,
        ),
    ]

    def draw(figure: Any) -> None:
        above, below = figure.subplots(2, 1)
        for axes, shown, title in ((above, attended[0], "Cross attention, all heads"), (below, maps[0], "Saliency")):
            axes.imshow(shown[words[0].numpy()], aspect="auto", cmap="magma")
            axes.set(title=title, ylabel="word")

    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=draw)


def _begun(counted: Tensor) -> int:
    """The first token that counts."""
    return int(counted.int().argmax(1).min())


def _each(one: NDArray[np.floating], other: NDArray[np.floating], words: Tensor) -> list[float]:
    """Correlation of two maps, of each string."""
    real = np.ones(one.shape[-1], bool)
    return [agreement(a[kept], b[kept], real) for a, b, kept in zip(one, other, words.numpy())]


def _other(attended: NDArray[np.floating], maps: NDArray[np.floating], words: Tensor, row: int) -> float:
    """Correlation of the attention to the next string with the saliency of this one."""
    mine, theirs = (np.flatnonzero(words[at % len(words)].numpy()) for at in (row, row + 1))
    n = min(len(mine), len(theirs))
    real = np.ones(maps.shape[-1], bool)
    return agreement(attended[(row + 1) % len(words)][theirs[:n]], maps[row][mine[:n]], real)


def _attended(model: Any, given: dict[str, Any]) -> NDArray[np.floating]:
    """The mean weights of all heads. [batch, token, position]"""
    with torch.no_grad(), record(model, "rows") as recording:
        model(**given, use_cache=False)
    rows: xr.DataArray = recording.tree["decoder_cross"]["rows"]
    return rows.mean(("layer", "head")).transpose("batch", "query", "key").values


@torch.no_grad()
def _lost(
    model: Any, processor: Any, sound: Tensor, maps: NDArray[np.floating], words: Tensor, said: list[str]
) -> list[float]:
    """Mean share of right words of each string while more and more is hidden, what matters most first."""
    frames = sound.shape[-1] // maps.shape[-1]
    base = sound.mean((1, 2), keepdim=True)
    scores = []
    for of, kept in zip(maps, words.numpy()):
        each = of[kept]
        scores.append(((each - each.mean(1, keepdims=True)) / each.std(1, keepdims=True)).max(0))
    ranks = np.argsort(np.argsort(-np.stack(scores), 1), 1)
    curve = []
    for step in range(STEPS + 1):
        hidden = torch.from_numpy(ranks < round(step / STEPS * maps.shape[-1])).repeat_interleave(frames, 1)
        ids = model.generate(torch.where(hidden[:, None], base, sound), max_new_tokens=listener.LONGEST + 2)
        heard = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        curve.append([max(0.0, 1 - word_error_rate(a, b)) for a, b in zip(said, heard)])
    return np.mean(curve, 0).tolist()
