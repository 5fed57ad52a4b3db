"""How far cross attention says what an encoder-decoder rests on: its agreement with saliency, by head, layer, and all.

Papi et al., Cross-Attention is Half Explanation in Speech-to-Text Models (arXiv:2509.18010). Weights of cross
attention, while the decoder reads what was written, are compared for every token with saliency found by hiding: of the
input ("input"), or of what the encoder gives ("encoder"); what lies between the two is the mixing of the encoder.
Saliency is that of SPES (arXiv:2411.01710): parts are hidden at random, and a part's relevance for a token is the mean
divergence of what the model says there, over the runs that hide it. Maps are made alike in mean and deviation for each
token, and compared by Pearson's correlation. We had public summaries and reviews, no code of the comparison.

Ours: parts are cells of a regular grid of time and frequency, where SPES takes clusters of several sizes; the deviation
of a token's map is taken over positions; what is hidden of a sound becomes its mean. Text is read as well: its parts
are tokens, hidden as zero embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from ..loading import parameters
from ..prediction import evaluating, predict
from ..seam import record
from ..sites import find

On = Literal["input", "encoder"]
Pool = Literal["max", "mean"]
Inputs = Mapping[str, Any]
DIMS = ("batch", "token", "row", "column")


def cross_attention_saliency(
    model: nn.Module,
    inputs: Inputs,
    *,
    on: On = "input",
    saliency: xr.DataArray | None = None,
    pool: Pool = "max",
    **knobs: Any,
) -> xr.Dataset:
    """Correlation of cross attention with saliency, -1 to 1: of each head, of means over heads, over layers, over all.

    inputs: of a model of encoder and decoder, with sound (`input_features`) or text (`input_ids`). With
    `decoder_input_ids`, what follows each of them is explained; without, what the model writes, the prompt of its
    decoder left out, and its end included where `generate` gives it (Whisper's does not). on: what is hidden.
    saliency: as `perturbation_saliency` gives it, found by that otherwise, with its `knobs`. pool: of a saliency of the
    input, over all that belongs to a position of the encoder.

    `rho` [batch, layer, head], `rho_layer` [batch, layer] of the mean over heads, `rho_head` [batch, head] of the mean
    over layers, `rho_all` [batch]; `tokens` [batch] that count, and `constant`, those left out because the saliency is
    the same everywhere. NaN where no token counts. Padding is left out: silence that fills a sound up is padding only
    where `attention_mask` says so, and otherwise makes all maps alike.

    >>> import numpy as np, regard
    >>> model, processor = regard.load("listener")
    >>> sound = np.random.default_rng(0).normal(size=64000).astype(np.float32)
    >>> inputs = dict(processor(sound, sampling_rate=16000, return_tensors="pt"))
    >>> inputs["decoder_input_ids"] = processor.tokenizer(" one two", return_tensors="pt").input_ids[:, :-1]
    >>> found = cross_attention_saliency(model, inputs, on="encoder", masks=4)
    >>> dict(found["rho"].sizes)
    {'batch': 1, 'layer': 2, 'head': 5}
    """
    if pool not in Pool.__args__:
        raise ValueError(f"pool is one of {', '.join(Pool.__args__)}, got {pool!r}")
    given, counted = written(model, inputs)
    stack = _cross(model)
    with evaluating(model), torch.no_grad(), record(model, "rows") as recording:
        model(**given, use_cache=False)
    rows = recording.tree[stack]["rows"].transpose("batch", "layer", "head", "query", "key")
    if saliency is None:
        saliency = perturbation_saliency(model, given, on=on, **knobs)
    n_key = rows.sizes["key"]
    maps = pooled(saliency, n_key, pool)
    real = _real(given, n_key)
    if maps.shape[:2] != (rows.sizes["batch"], rows.sizes["query"]):
        raise ValueError(f"saliency is of {list(maps.shape[:2])} rows and tokens, and attention of {list(rows.shape)}")
    views = {
        "rho": rows,
        "rho_layer": rows.mean("head"),
        "rho_head": rows.mean("layer"),
        "rho_all": rows.mean(("layer", "head")),
    }
    found = {}
    for name, of in views.items():
        values = of.transpose("batch", ..., "query", "key")
        shape = values.shape[1:-2]
        each = np.full((len(values), *shape), np.nan)
        for row in range(len(values)):
            kept = counted[row].numpy()
            for at in np.ndindex(*shape):
                each[(row, *at)] = agreement(values.values[row][at][kept], maps[row][kept], real[row].numpy())
        places = {d: of[d].values for d in of.dims if d in ("layer", "head")}
        found[name] = xr.DataArray(each, places, ("batch", *places))
    flat = np.array([[np.ptp(one[real[row].numpy()]) == 0 for one in maps[row]] for row in range(len(maps))])
    counts = counted.numpy()
    found["tokens"] = ("batch", (counts & ~flat).sum(1))
    found["constant"] = ("batch", (counts & flat).sum(1))
    return xr.Dataset(found, attrs={"stack": stack, "on": on, "pool": pool})


def agreement(weights: NDArray[np.floating], saliency: NDArray[np.floating], real: NDArray[np.bool_]) -> float:
    """Pearson's correlation of two maps [token, position], each token's made alike in mean and deviation; -1 to 1.

    real: which positions count. Tokens of which either map is the same everywhere are left out; NaN without any other.

    >>> round(agreement(np.array([[0.7, 0.2, 0.1]]), np.array([[4.0, 1.0, 1.0]]), np.ones(3, bool)), 3)
    0.988
    """
    one, other = (np.asarray(of, float)[:, real] for of in (weights, saliency))
    kept = (np.ptp(one, axis=1) > 0) & (np.ptp(other, axis=1) > 0)
    if not kept.any():
        return float("nan")
    one, other = ((of - of.mean(1, keepdims=True)) / of.std(1, keepdims=True) for of in (one[kept], other[kept]))
    return float((one * other).mean())


@torch.no_grad()
def perturbation_saliency(
    model: nn.Module,
    inputs: Inputs,
    *,
    on: On = "input",
    masks: int = 500,
    share: float = 0.5,
    grid: tuple[int, int] = (8, 50),
    baseline: float | None = None,
    batch: int = 32,
    seed: int = 0,
) -> xr.DataArray:
    """How much what is said after each token changes where a part is hidden: mean divergence, nats, 0 and up.

    Of sound [batch, token, row, column], as the model takes it; of text, and of what the encoder gives, [batch, token,
    column]. inputs: as for `cross_attention_saliency`. masks: runs in which each part is hidden with probability
    `share`. grid: parts of frequency and of time, as many at most; of text every token is one. baseline: what stands
    where a part is hidden; the mean of a sound unless given, 0 otherwise. batch: rows that run together at most.
    """
    if on not in On.__args__:
        raise ValueError(f"on is one of {', '.join(On.__args__)}, got {on!r}")
    if masks < 2 or not 0 < share < 1 or min(grid) < 1 or batch < 1:
        raise ValueError(
            f"masks are 2 or more, a share lies between 0 and 1, a grid and a batch are 1 or more; got masks={masks}, "
            f"share={share}, grid={grid}, batch={batch}"
        )
    given, _ = written(model, inputs)
    with evaluating(model):
        whole, put, cells, time = _hidden(model, given, on, grid)
        said = model(**put(whole), use_cache=False).logits.float().log_softmax(-1)
        base = torch.tensor(baseline or 0.0).to(whole)
        if baseline is None and time:
            base = whole.mean((1, 2), keepdim=True)
        generator = torch.Generator().manual_seed(seed)
        n = len(whole)
        some = max(1, batch // n)
        sums = torch.zeros(n, said.shape[1], cells[0] * cells[1], dtype=torch.double)
        times = torch.zeros(cells[0] * cells[1], dtype=torch.double)
        for start in range(0, masks, some):
            hidden = torch.rand(min(some, masks - start), *cells, generator=generator) < share
            spread = _spread(hidden, whole.shape[1:], time).to(whole.device)  # [mask, ...]
            masked = torch.where(spread[:, None], base, whole).flatten(0, 1)
            other = model(**put(masked), use_cache=False).logits.float().log_softmax(-1)
            other = other.unflatten(0, (len(hidden), n))
            apart = (said.exp() * (said - other)).sum(-1).clamp(min=0).double().cpu()  # [mask, batch, token]
            flat = hidden.flatten(1).double()
            sums += torch.einsum("mbt,mc->btc", apart, flat)
            times += flat.sum(0)
    found = (sums / times.clamp(min=1)).unflatten(-1, cells)
    if not time:  # of text, or of the encoder: positions
        at = torch.arange(whole.shape[1]) * cells[1] // whole.shape[1]
        return xr.DataArray(found[:, :, 0, at].numpy(), dims=(*DIMS[:2], "column"), attrs={"on": on})
    rows, columns = (torch.arange(size) * n // size for size, n in zip(whole.shape[1:], _order(cells, time)))
    found = found if time == 2 else found.mT
    attributes = {"on": on, "time": "column" if time == 2 else "row"}
    return xr.DataArray(found[:, :, rows[:, None], columns].numpy(), dims=DIMS, attrs=attributes)


def pooled(saliency: xr.DataArray, positions: int, pool: Pool = "max") -> NDArray[np.floating]:
    """A saliency of an input as one number for each position of the encoder. [batch, token, position]"""
    values = saliency.values
    if values.ndim == 4:
        values = values if saliency.attrs.get("time", "column") == "column" else values.swapaxes(-1, -2)
        values = values.max(-2) if pool == "max" else values.mean(-2)
    n = values.shape[-1]
    if n < positions:
        raise ValueError(f"a saliency of {n} places cannot be of an encoder of {positions} positions")
    bounds = np.linspace(0, n, positions + 1).round().astype(int)
    how = np.max if pool == "max" else np.mean
    return np.stack([how(values[..., a:b], axis=-1) for a, b in pairwise(bounds)], -1)


def written(model: nn.Module, inputs: Inputs) -> tuple[dict[str, Any], Tensor]:
    """Inputs with what the decoder reads, and after which of it a token counts. boolean [batch, token]

    Without `decoder_input_ids`, these are what the model writes, each token the likeliest, without its last.
    """
    _cross(model)
    if "decoder_input_ids" in inputs:
        ids = inputs["decoder_input_ids"]
        mask = inputs.get("decoder_attention_mask", torch.ones_like(ids))
        return dict(inputs), mask.bool().cpu()
    with predict(model, inputs) as prediction:  # it begins as `generate` does
        begun = prediction.inputs["decoder_input_ids"]
    writer: Any = model
    with torch.no_grad(), evaluating(model):
        ids = writer.generate(**inputs, do_sample=False, num_beams=1)
    n = begun.shape[1]
    if ids.shape[1] < n or not torch.equal(ids[:, :n], begun.to(ids)):  # some leave out how it begins
        ids = torch.cat([begun.to(ids), ids], 1)
    ends = writer.generation_config.eos_token_id
    end = torch.isin(ids, torch.as_tensor(ends, device=ids.device)) if ends is not None else torch.zeros_like(ids)
    over = end.bool()
    over[:, :n] = False
    # what follows a token counts until the first end has been said
    counted = (over.int().cumsum(1) == 0)[:, :-1]
    counted[:, : n - 1] = False
    if not counted.any(1).all():
        raise ValueError("the model writes nothing of some inputs, so that there is no token to explain")
    return {**inputs, "decoder_input_ids": ids[:, :-1]}, counted.cpu()


def _hidden(model: Any, given: dict[str, Any], on: On, grid: tuple[int, int]) -> Any:
    """What is hidden [batch, ...], a function that makes inputs of it, cells of it, and its axis of time, 0 of none."""
    text = "input_ids" in given
    name = "input_ids" if text else "input_features"
    if name not in given or name not in parameters(model):
        raise ValueError(
            f"{type(model).__name__} is given {', '.join(given)}: it needs sound, input_features, or text, input_ids"
        )
    rest = {k: v for k, v in given.items() if k != name}

    def repeated(states: Tensor) -> dict[str, Any]:
        times = len(states) // len(given[name])
        return {
            k: v.repeat(times, *[1] * (v.ndim - 1)) if isinstance(v, Tensor) and v.ndim else v for k, v in rest.items()
        }

    if on == "encoder":
        encoder = model.get_encoder()
        known = {k: v for k, v in given.items() if k in (name, "attention_mask") and k in parameters(encoder)}
        states = encoder(**known).last_hidden_state
        cells = (1, states.shape[1] if text else min(grid[1], states.shape[1]))
        return states, lambda new: {**repeated(new), "encoder_outputs": (new,)}, cells, 0
    if text:
        embedded = model.get_input_embeddings()(given[name])
        return embedded, lambda new: {**repeated(new), "inputs_embeds": new}, (1, embedded.shape[1]), 0
    features = given[name]
    bands = getattr(model.config, "num_mel_bins", None) or getattr(model.config, "input_feat_per_channel", None)
    if features.ndim != 3 or bands not in features.shape[1:]:
        raise ValueError(
            f"input_features are {list(features.shape)}, and none of its axes has the model's {bands} bands"
        )
    time = 2 if features.shape[1] == bands else 1
    cells = (min(grid[0], features.shape[3 - time]), min(grid[1], features.shape[time]))
    return features, lambda new: {**repeated(new), name: new}, cells, time


def _order(cells: tuple[int, int], time: int) -> tuple[int, int]:
    return cells if time == 2 else (cells[1], cells[0])


def _spread(hidden: Tensor, shape: torch.Size, time: int) -> Tensor:
    """Cells [mask, band, time] as what is hidden of the states, [mask, ...]."""
    if not time:
        at = torch.arange(shape[0]) * hidden.shape[2] // shape[0]
        return hidden[:, 0, at][..., None]
    hidden = hidden if time == 2 else hidden.mT
    rows, columns = (torch.arange(size) * n // size for size, n in zip(shape, hidden.shape[1:]))
    return hidden[:, rows[:, None], columns]


def attends_across(model: nn.Module) -> bool:
    """Whether it is an encoder and a decoder that attends to it, which is all that is needed here."""
    return len({site.stack for site in find(model).values() if site.cross}) == 1 and (
        "decoder_input_ids" in parameters(model)
    )


def _cross(model: nn.Module) -> str:
    """The stack of cross attention from a decoder to an encoder."""
    if not attends_across(model):
        raise ValueError(
            f"{type(model).__name__} has no decoder that attends to an encoder: such are Whisper, Speech2Text, BART, T5"
        )
    return next(site.stack for site in find(model).values() if site.cross)


def _real(given: Mapping[str, Any], n_key: int) -> Tensor:
    """Which positions of the encoder are not padding. [batch, key]"""
    mask = given.get("attention_mask")
    rows = len(given["decoder_input_ids"])
    if mask is None:
        return torch.ones(rows, n_key, dtype=torch.bool)
    bounds = torch.linspace(0, mask.shape[1], n_key + 1).round().long()
    return torch.stack([mask[:, a:b].bool().any(1) for a, b in pairwise(bounds)], 1).cpu()
