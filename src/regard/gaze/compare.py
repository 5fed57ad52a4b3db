"""A language model's attention beside the time that people spend on words.

After Eberle et al., Do Transformer Models Show Similar Attention Patterns to Task-Specific Human Gaze? (ACL 2022), and
Bensemann et al., Eye Gaze and Self-attention: How Humans and Transformers Attend Words in Sentences (CMCL 2022), which
correlate the ranks of both within a text. Controls, intervals and the level of chance are ours.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from ..call import Call
from ..data.loaders import Reading
from ..extras import needs
from ..loading import positions
from ..recording import statistic
from ..seam import record
from ..statistics.rollout import rollout

Floats = NDArray[np.float64]
CONTROLS = ("length", "frequency", "place", "edge")


class Text(NamedTuple):
    words: tuple[str, ...]
    time: Floats  # [word], mean over readers, ms
    halves: Floats | None  # [2, word], means over every other reader; None where there is one reader


def compare(
    model: nn.Module,
    tokenizer: Any,
    readings: Sequence[Reading],
    *,
    counts: Mapping[str, int] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> xr.DataTree:
    """Rank correlation, -1 to 1, of what a model does with words and how long people look at them.

    The nodes `plain` and `controlled` of the result hold the same variables; in `controlled` word length, frequency,
    place in the text and distance from its middle are taken out of both sides (partial correlation). Each is a
    correlation with the mean reading time of a word, with `_low` and `_high`, the 95% interval over texts drawn anew:

    - received [layer, head]: mean weight on the word of the tokens that can see it
    - last [layer, head]: weight of the last token on the word
    - rollout [layer]: as received, of attention rollout up to the layer
    - surprisal: -log probability of the word given those before, where the model is causal
    - length, frequency, place, edge: of the controls themselves, only in `plain`

    `attrs["chance"]` of a variable is the largest absolute correlation over all its layers and heads that 95% of random
    rotations of each text's reading times stay below: a single head below it is not news. Attributes of the tree:
    texts, words, readers, `cut` (words beyond the model's positions, left out), `reliability` (what two halves of the
    readers agree on, with Spearman and Brown's correction: the most that any model can be expected to reach).

    readings: as from `regard.data.loaders.webqamgaze`, of one task. Ranks are within a text; words of a text are joined
    by blanks, and tokens belong to words by their offsets, in shares where a token spans two. Of an encoder-decoder
    model the encoder is taken. counts: how often each word, in lower case and without punctuation, occurs in a corpus
    (see `word_counts`); those of the texts themselves otherwise. progress: called with texts done, and all.

    ValueError for a tokenizer without offsets, fewer than two texts, or where scipy is missing.

        readings = [r for r in loaders.webqamgaze(folder) if r.task == "reading"]
        found = regard.gaze.compare(model, tokenizer, readings)
        found["controlled"]["received"].sel(layer=3, head=5)
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where tokens lie in the text: load a fast tokenizer "
            f"(transformers.AutoTokenizer, use_fast=True)"
        )
    texts = mean_reading_time(readings)
    if len(texts) < 2:
        raise ValueError(f"intervals are over texts, so two are needed at least: got {len(texts)}")
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()  # type: ignore[operator]
    counts = counts if counts is not None else word_counts(" ".join(word for text in texts for word in text.words))
    measured: list[dict[str, Floats]] = []
    cut = 0
    for done, text in enumerate(texts):
        if progress is not None:
            progress(done, len(texts))
        of_text = measures(model, tokenizer, text.words)
        cut += int(of_text.pop("cut"))
        plain = [_bare(word) for word in text.words]
        of_text["length"] = np.array([len(word) for word in text.words], float)
        of_text["frequency"] = np.log1p([counts.get(word, 0) for word in plain])
        of_text["place"] = np.arange(len(text.words), dtype=float)
        of_text["edge"] = np.abs(of_text["place"] - of_text["place"].mean())
        measured.append(of_text)

    ranked = [_ranks(text, of_text) for text, of_text in zip(texts, measured)]
    ranked = [one for one in ranked if one is not None]
    if len(ranked) < 2:
        raise ValueError("fewer than two texts have three words or more that the model can read")
    of_word = np.repeat(np.arange(len(ranked)), [len(one["time"]) for one in ranked])
    whole = {name: np.concatenate([one[name] for one in ranked]) for name in ranked[0]}
    time, controls = whole.pop("time"), np.stack([whole[name] for name in CONTROLS], -1)
    others = {name: values for name, values in whole.items() if name not in CONTROLS}
    nodes = {
        name: _correlated(time, columns, taken_out, of_word, resamples, np.random.default_rng(seed))
        for name, columns, taken_out in (("/plain", whole, controls[:, :0]), ("/controlled", others, controls))
    }
    tree = xr.DataTree.from_dict(nodes)
    tree.attrs |= {
        "texts": len(ranked),
        "words": len(time),
        "readers": len({reading.participant for reading in readings}),
        "cut": cut,
        "reliability": _reliability(texts),
    }
    return tree


def mean_reading_time(readings: Sequence[Reading]) -> list[Text]:
    """Reading time of each word of each text, averaged over its readers, who count 0 for words that they skipped."""
    times: dict[tuple[str, ...], list[NDArray]] = defaultdict(list)
    for reading in readings:
        times[reading.words].append(reading.reading_time)
    return [
        Text(
            words,
            np.mean(of_readers, axis=0, dtype=float),
            np.stack([np.mean(of_readers[i::2], axis=0, dtype=float) for i in (0, 1)]) if len(of_readers) > 1 else None,
        )
        for words, of_readers in times.items()
    ]


def word_counts(corpus: str) -> Counter[str]:
    """How often each word occurs, in lower case and without the punctuation around it."""
    return Counter(map(_bare, corpus.split()))


def shares(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> Floats:
    """Share of each token that lies in each word of " ".join(words), by characters; blanks count for none.

    Columns sum to 1, or to 0 for tokens outside all words, such as special ones. [word, token]
    """
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    starts = ends - [len(word) for word in words]
    begin, end = np.array(offsets).reshape(-1, 2).T
    inside = np.maximum(0, np.minimum(ends[:, None], end) - np.maximum(starts[:, None], begin)).astype(float)
    return inside / np.maximum(inside.sum(0), 1e-300)


def _bare(word: str) -> str:
    return word.lower().strip(".,;:!?\"'()[]{}“”‘’«»–—-…")


@statistic("batch head key", title="Mean weight received")
def _received(call: Call) -> Tensor:
    queries = call.query.shape[2]
    seen = call.weights.seen(0, queries).expand(-1, -1, queries, -1).sum(2)
    return call.weights.received() / seen.clamp(min=1)


@statistic("batch head query", title="Weight of the last token")
def _last(call: Call) -> Tensor:
    """The key stands where a statistic has its query: both count the tokens of one text."""
    return call.weights.rows(call.query.shape[2] - 1, call.query.shape[2])[:, :, 0]


@statistic("batch query key", title="Weights, averaged over heads")
def _mean_rows(call: Call) -> Tensor:
    return call.weights.dense().mean(1)


@torch.inference_mode()
def measures(model: nn.Module, tokenizer: Any, words: tuple[str, ...]) -> dict[str, Floats]:
    """What the model does with each word, [..., word]; NaN where it has none. `cut`: words beyond its positions."""
    encoded = tokenizer(" ".join(words), return_tensors="pt", return_offsets_mapping=True, verbose=False)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    limit = positions(model) or len(offsets)
    share = shares(words, offsets)
    whole = (share[:, :limit].sum(1) > 0) & (share[:, limit:].sum(1) == 0)
    share = share[:, :limit]
    device = next(model.parameters()).device
    inputs = {name: t[:, :limit].to(device) for name, t in encoded.items() if name != "token_type_ids"}
    with record(model, received=_received, last=_last, rows=_mean_rows) as recording:
        output = model(**inputs)
    nodes = [n for n in recording.tree.children.values() if n.attrs["kind"] == "self"]
    if len(nodes) != 1:
        raise ValueError(f"a language model has one stack of self attention: got {', '.join(recording.tree.children)}")
    (node,) = nodes
    nowhere = np.where(whole, 0.0, np.nan)
    mean = node.to_dataset().drop_dims("head").assign(rows=node["rows"].expand_dims("head"))  # as if of one head
    rolled = rollout(mean).isel(batch=0).to_numpy()  # [layer, query, key]
    spread = rolled.sum(1) / np.maximum((rolled > 0).sum(1), 1)
    found = {
        **{name: node[name].isel(batch=0).to_numpy() @ share.T + nowhere for name in ("received", "last")},
        "rollout": spread @ share.T + nowhere,
        "cut": np.array((~whole).sum()),
    }
    logits = getattr(output, "logits", None)
    if node.attrs["causal"] and logits is not None:
        ids = inputs["input_ids"][0]
        token = -logits[0, :-1].float().log_softmax(-1).gather(1, ids[1:, None])[:, 0].double().cpu().numpy()
        first = np.where(share[:, 0] > 0, np.nan, 0.0)  # nothing is said of the first token
        found["surprisal"] = np.concatenate([[0.0], token]) @ share.T + nowhere + first
    return found


def _ranks(text: Text, of_text: Mapping[str, Floats]) -> dict[str, Floats] | None:
    """Ranks of the words that have every measure, within the text, -0.5 to 0.5. [word, ...]"""
    with needs("rank correlations", "claims"):
        from scipy.stats import rankdata
    columns = {"time": text.time, **of_text}
    there = ~np.isnan(columns.get("surprisal", columns["rollout"][0]))
    n = int(there.sum())
    if n < 3:
        return None
    return {
        name: (np.moveaxis(rankdata(values[..., there], axis=-1), -1, 0) - (n + 1) / 2) / n
        for name, values in columns.items()
    }


def _correlated(
    time: Floats, columns: Mapping[str, Floats], controls: Floats, of_word: NDArray, resamples: int, rng: Any
) -> xr.Dataset:
    texts = of_word[-1] + 1
    ones = np.ones((1, texts))
    drawn = rng.multinomial(texts, [1 / texts] * texts, size=resamples).astype(float)
    dims = {"received": ("layer", "head"), "last": ("layer", "head"), "rollout": ("layer",)}
    turned = _rotations(of_word, resamples, rng)
    found = {}
    for name, values in columns.items():
        flat = values.reshape(len(values), -1)
        grams = _grams(time, flat, controls, of_word)
        low, high = np.quantile(_partial(grams, drawn), [0.025, 0.975], axis=0) if resamples else [np.nan] * 2
        shape = values.shape[1:]
        for suffix, r in (("", _partial(grams, ones)[0]), ("_low", low), ("_high", high)):
            found[name + suffix] = (dims.get(name, ()), np.broadcast_to(r, flat.shape[1]).reshape(shape))
        chance = _chance(time, flat, controls, turned)
        found[name] = (*found[name], {"chance": chance, "range": [-1, 1]})
    coords = {"layer": np.arange(len(columns["received"][0])), "head": np.arange(columns["received"].shape[2])}
    return xr.Dataset(found, coords)


def _grams(y: Floats, x: Floats, z: Floats, of_word: NDArray) -> dict[str, Floats]:
    """Sums of products over the words of each text. [text, ...]"""
    starts = np.flatnonzero(np.diff(of_word, prepend=-1))

    def summed(a: Floats, b: Floats) -> Floats:
        return np.add.reduceat(a * b, starts)

    return {
        "zz": summed(z[:, :, None], z[:, None]),
        "zy": summed(z, y[:, None]),
        "zx": summed(z[:, :, None], x[:, None]),
        "yy": summed(y, y),
        "yx": summed(y[:, None], x),
        "xx": summed(x, x),
    }


def _partial(grams: Mapping[str, Floats], weights: Floats) -> Floats:
    """Correlation of y and each x, less what is linear in z, with so much weight on each text. [draw, measure]

    All are centred within texts, so there is no intercept.
    """
    g = {name: np.tensordot(weights, values, 1) for name, values in grams.items()}
    inverse = np.linalg.pinv(g["zz"], hermitian=True)  # controls may say the same, or nothing
    on_y = (inverse @ g["zy"][..., None])[..., 0]
    on_x = inverse @ g["zx"]
    yx = g["yx"] - (on_y[..., None] * g["zx"]).sum(1)
    yy = g["yy"] - (on_y * g["zy"]).sum(1)
    xx = g["xx"] - (on_x * g["zx"]).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        left = (xx > 1e-9 * g["xx"]) & (yy > 1e-9 * g["yy"])[:, None]
        return np.where(left, yx / np.sqrt(yy[:, None] * xx), np.nan)


def _rotations(of_word: NDArray, times: int, rng: Any) -> NDArray[np.int64]:
    """For each time, which word gives its reading time to each, when every text is rotated by chance. [time, word]"""
    starts = np.flatnonzero(np.diff(of_word, prepend=-1))
    lengths = np.diff(np.append(starts, len(of_word)))
    by = rng.integers(0, lengths, size=(times, len(lengths)))[:, of_word]
    return starts[of_word] + (np.arange(len(of_word)) - starts[of_word] + by) % lengths[of_word]


def _chance(y: Floats, x: Floats, z: Floats, turned: NDArray[np.int64]) -> float:
    if not len(turned):
        return float("nan")
    y, x = (v - z @ np.linalg.lstsq(z, v, rcond=None)[0] for v in (y, x))
    with np.errstate(invalid="ignore", divide="ignore"):
        x = np.nan_to_num(x / np.linalg.norm(x, axis=0))
    y = y / np.linalg.norm(y)
    most = [np.abs(y[some] @ x).max(1) for some in np.array_split(turned, max(1, turned.size // 2**22))]
    return float(np.quantile(np.concatenate(most), 0.95))


def _reliability(texts: Sequence[Text]) -> float:
    from scipy.stats import rankdata

    halves = [rankdata(text.halves, axis=1) / len(text.words) for text in texts if text.halves is not None]
    if not halves:
        return float("nan")
    r = float(np.corrcoef(np.concatenate([h - h.mean(1, keepdims=True) for h in halves], axis=1))[0, 1])
    return 2 * r / (1 + r)
