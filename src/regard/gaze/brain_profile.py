"""Which layers and heads of a model say how a brain responds to the same pictures or words.

Linear encoding models, as in Naselaris et al., Encoding and decoding in fMRI (NeuroImage 56, 2011): ridge regression
from what a layer, or one head, makes of each picture to each voxel's responses, judged on pictures held out. The
penalty is chosen for each voxel on the training pictures, each left out in turn, which a ridge gives in closed form.
`noise_ceiling` is that of Allen et al., A massive 7T fMRI dataset (Nature Neuroscience 25, 2022).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ..call import Call
from ..recording import statistic
from ..seam import record

Floats = NDArray[np.float64]
PENALTIES = tuple(10.0**power for power in range(-4, 5))


def brain_profile(
    features: Mapping[str, xr.DataArray],
    responses: ArrayLike,
    *,
    ceiling: ArrayLike | None = None,
    folds: int = 5,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
) -> xr.Dataset:
    """Share of each voxel's variance that features say on pictures held out; 1 is all, 0 is what their mean says.

    features: by name [..., batch, dim], as `brain_features` gives them: `layers` [layer, batch, dim], `heads` [layer,
    head, batch, dim]. responses [batch, voxel], of the same pictures in the same order. The result holds a variable of
    each name, without batch and dim and with voxel: 1 - squared errors over those of the training pictures' mean, below
    0 where predictions are worse than that mean. NAME_error is its standard error over folds, which is approximate:
    they share training pictures.

    ceiling [voxel], from `noise_ceiling`: scores become shares of it, NaN where it is 0. folds: of pictures, drawn by
    `seed`. penalties: tried, in mean squares of the features' singular values. NaN where a voxel does not vary.

    Compare layers on voxels, and a head with its layer, by the differences of voxels or of folds: chance differs from 0
    only for the best of many, which is to be chosen on other voxels or pictures. ValueError where sizes do not fit.

    >>> rng = np.random.default_rng(0)
    >>> some = xr.DataArray(rng.normal(size=(2, 60, 3)), dims=("layer", "batch", "dim"))
    >>> found = brain_profile({"layers": some}, some[1, :, :1] * 2 + 5)
    >>> found.layers.dims, bool(found.layers[1, 0] > 0.99), bool(found.layers[0, 0] < 0.2)
    (('layer', 'voxel'), True, True)
    """
    given = np.asarray(responses, np.float64)
    if given.ndim != 2 or not np.isfinite(given).all():
        raise ValueError(f"responses are finite numbers [batch, voxel]: got {list(given.shape)}")
    n = len(given)
    if not 2 <= folds <= n // 2:
        raise ValueError(f"folds={folds} of {n} pictures: 2 at least, and two pictures in each")
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"penalties are numbers above 0: got {list(penalties)}")
    if not features:
        raise ValueError("there are no features to tell responses from")
    parts = np.array_split(np.random.default_rng(seed).permutation(n), folds)
    bound = None if ceiling is None else np.asarray(ceiling, np.float64)
    if bound is not None and bound.shape != given.shape[1:]:
        raise ValueError(f"ceiling is one number a voxel, {given.shape[1]}: got {list(bound.shape)}")
    found: dict[str, xr.DataArray] = {}
    for name, array in features.items():
        if array.dims[-2:] != ("batch", "dim") or array.sizes["batch"] != n:
            raise ValueError(f"features {name!r} are [..., batch, dim] of {n} pictures: got {dict(array.sizes)}")
        lead = array.dims[:-2]
        if name in (*lead, "voxel"):
            raise ValueError(f"features are named otherwise than an axis, which {name!r} is")
        flat = array.values.reshape(-1, *array.shape[-2:]).astype(np.float64)
        if not np.isfinite(flat).all():
            raise ValueError(f"features {name!r} hold what is no number")
        scores, errors = (np.stack(rows) for rows in zip(*(_scored(x, given, parts, penalties) for x in flat)))
        if bound is not None:
            scores, errors = (
                np.divide(s, bound, where=bound > 0, out=np.full_like(s, np.nan)) for s in (scores, errors)
            )
        shape = (*array.shape[:-2], given.shape[1])
        coords = {dim: array.coords[dim] for dim in lead if dim in array.coords}
        for suffix, values in (("", scores), ("_error", errors)):
            found[name + suffix] = xr.DataArray(values.reshape(shape), dims=(*lead, "voxel"), coords=coords)
    return xr.Dataset(found, attrs={"pictures": n, "folds": folds, "seed": seed, "share_of_ceiling": bound is not None})


@torch.inference_mode()
def brain_features(
    model: nn.Module, inputs: Iterable[Mapping[str, Tensor]], *, pool: Literal["mean", "first"] = "mean"
) -> dict[str, xr.DataArray]:
    """What a model's layers and heads make of each picture or text, for `brain_profile` and `rsa`.

    `inputs` [batch, dim], what the first layer is given; `layers` [layer, batch, dim], each layer's output; `heads`
    [layer, head, batch, dim], what each head adds up before the heads are mixed. inputs: batches, as a processor gives
    them, without padding. pool: the mean over tokens, or the first token. Any model of transformers with one stack of
    layers that returns hidden states; of one with several give a part, such as `model.vision_model`.

    ValueError for padded inputs, and for what is no such model.
    """
    if pool not in ("mean", "first"):
        raise ValueError(f'pool is "mean" or "first": got {pool!r}')
    kept: dict[str, list[Floats]] = {"inputs": [], "layers": [], "heads": []}
    device = next(model.parameters()).device
    for number, batch in enumerate(inputs):
        if (mask := batch.get("attention_mask")) is not None and not bool(mask.all()):
            raise ValueError(f"batch {number} is padded, and padding would count: give texts of one length together")
        with record(model, _first if pool == "first" else _mean) as recording:
            given: Any = model(**{name: value.to(device) for name, value in batch.items()}, output_hidden_states=True)
        if len(recording.tree.children) != 1:
            parts = ", ".join(recording.tree.children)
            raise ValueError(f"{type(model).__name__} has {parts}: give a part with one stack of layers")
        states = getattr(given, "hidden_states", None)
        if states is None:
            raise ValueError(f"{type(model).__name__} returns no hidden states")
        pooled = np.stack([_pooled(state, pool).double().cpu().numpy() for state in states])
        (stack,) = recording.tree.children.values()
        (heads,) = stack.data_vars.values()
        kept["inputs"].append(pooled[0])
        kept["layers"].append(pooled[1:])
        kept["heads"].append(heads.transpose("layer", "head", "batch", "rank").values.astype(np.float64))
    if not kept["inputs"]:
        raise ValueError("there are no inputs")
    dims = {"inputs": ("batch", "dim"), "layers": ("layer", "batch", "dim"), "heads": ("layer", "head", "batch", "dim")}
    return {name: xr.DataArray(np.concatenate(rows, -2), dims=dims[name]) for name, rows in kept.items()}


def noise_ceiling(repeats: ArrayLike) -> Floats:
    """Share of the variance of mean responses that is not noise: what the best model could explain, 0 to 1. [voxel]

    repeats [repeat, batch, voxel], each picture shown as often. Noise is what differs between repeats of a picture; it
    is taken off the variance of the means over pictures, and nothing is left where that is less than nothing.
    """
    given = np.asarray(repeats, np.float64)
    if given.ndim != 3 or len(given) < 2 or given.shape[1] < 2 or not np.isfinite(given).all():
        raise ValueError(f"repeats are finite [repeat, batch, voxel], two of each at least: got {list(given.shape)}")
    noise = given.var(0, ddof=1).mean(0) / len(given)
    whole = given.mean(0).var(0, ddof=1)
    return np.divide(np.maximum(whole - noise, 0), whole, where=whole > 0, out=np.zeros_like(whole))


def ridge(x: Floats, y: Floats, new: Floats, penalties: Sequence[float] = PENALTIES) -> Floats:
    """What ridge regression from x [batch, dim] to y [batch, voxel] says of new [batch, dim]. [batch, voxel]

    Of each voxel with the penalty under which the pictures, each left out in turn, are told best.
    """
    mean_x, mean_y = x.mean(0), y.mean(0)
    u, s, v = np.linalg.svd(x - mean_x, full_matrices=False)
    on_u = u.T @ (y - mean_y)
    squares = s**2
    if not squares.any():
        return np.broadcast_to(mean_y, (len(new), y.shape[1])).copy()
    scales = np.asarray(penalties) * squares.mean()
    losses = []
    for scale in scales:
        kept = squares / (squares + scale)
        own = 1 / len(x) + (u**2) @ kept  # how much each picture tells of itself
        left = (y - mean_y - u @ (kept[:, None] * on_u)) / np.maximum(1 - own, 1e-12)[:, None]
        losses.append((left**2).sum(0))
    best = scales[np.argmin(losses, 0)]  # [voxel]
    return mean_y + (new - mean_x) @ v.T @ (s[:, None] / (squares[:, None] + best) * on_u)


def _scored(
    x: Floats, y: Floats, parts: Sequence[NDArray[np.int64]], penalties: Sequence[float]
) -> tuple[Floats, Floats]:
    wrong, whole = [], []
    for part in parts:
        train = np.ones(len(y), bool)
        train[part] = False
        wrong.append(((y[part] - ridge(x[train], y[train], x[part], penalties)) ** 2).sum(0))
        whole.append(((y[part] - y[train].mean(0)) ** 2).sum(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        of_fold = 1 - np.array(wrong) / np.array(whole)
        varies = y.std(0) > 1e-12 * np.abs(y).max(0, initial=0)
        score = np.where(varies, 1 - np.sum(wrong, 0) / np.sum(whole, 0), np.nan)
        error = np.where(varies, of_fold.std(0, ddof=1) / len(parts) ** 0.5, np.nan)
    return score, error


def _pooled(state: Tensor, pool: str) -> Tensor:
    """[batch, token, dim], or a map [batch, dim, row, column], to [batch, dim]"""
    if state.ndim == 4:
        state = state.flatten(2).mT
    return state[:, 0] if pool == "first" else state.mean(1)


@statistic("batch head rank", title="Mean output of a head")
def _mean(call: Call) -> Tensor:
    return call.output.mean(2)


@statistic("batch head rank", title="Output of a head at the first token")
def _first(call: Call) -> Tensor:
    return call.output[:, :, 0]
