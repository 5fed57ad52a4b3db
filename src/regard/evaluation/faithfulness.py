"""Whether what an attribution calls important is what the prediction rests on.

Deletion and insertion: Petsiuk et al., RISE (arXiv:1806.07421), section 4.1. Comprehensiveness and sufficiency: DeYoung
et al., ERASER (arXiv:1911.03429), section 4.2, with the shares of features of its area over the curve. Infidelity: Yeh
et al., On the (In)fidelity and Sensitivity of Explanations (arXiv:1901.09392), definitions 2.1 and 2.2; infidelity by
Captum.

What is taken away is replaced by a baseline: zero pixels or a zero embedding, unless told otherwise. RISE inserts into
a blurred picture, and ERASER leaves words out; a model may take neither the one nor the other for nothing, so the
measures judge attributions of one model, and not models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from ..extras import needs
from ..prediction import Prediction, Question, Target, predict

Array = NDArray[np.float64]
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)  # of the features, ERASER's
BATCH = 32  # inputs that run together at most


def deletion_error(
    model: nn.Module,
    inputs: Mapping[str, Any],
    attribution: xr.DataArray,
    *,
    steps: int = 20,
    baseline: Tensor | float = 0.0,
) -> Array:
    """Mean probability while features are taken away, the most important first, 0 to 1; lower is better. [batch]

    The area under the curve over shares of the features, in equal steps, of the class that `attribution` explains.
    Padding is not a feature. ValueError where attribution and inputs do not fit.

    >>> import regard
    >>> model, tokenizer = regard.load("namer")
    >>> inputs = tokenizer("the baker sang , feeling merry .", return_tensors="pt")
    >>> found = regard.attribute(model, inputs, method="attention_x_gradient")
    >>> bool(deletion_error(model, inputs, found)[0] < insertion_score(model, inputs, found)[0])
    True
    """
    return _area(_curve(model, inputs, attribution, _even(steps), baseline, keep=False))


def insertion_score(
    model: nn.Module,
    inputs: Mapping[str, Any],
    attribution: xr.DataArray,
    *,
    steps: int = 20,
    baseline: Tensor | float = 0.0,
) -> Array:
    """Mean probability while features are put in, the most important first, 0 to 1; higher is better. [batch]

    As `deletion_error`, from the baseline to the input.
    """
    return _area(_curve(model, inputs, attribution, _even(steps), baseline, keep=True))


def comprehensiveness_score(
    model: nn.Module,
    inputs: Mapping[str, Any],
    attribution: xr.DataArray,
    *,
    shares: Sequence[float] = SHARES,
    baseline: Tensor | float = 0.0,
) -> Array:
    """By how much the probability falls without the most important features, -1 to 1; higher is better. [batch]

    Mean over `shares` of the features, each at least one feature.
    """
    curve = _curve(model, inputs, attribution, (0.0, *_valid(shares)), baseline, keep=False)
    return (curve[0] - curve[1:]).mean(0)


def sufficiency_error(
    model: nn.Module,
    inputs: Mapping[str, Any],
    attribution: xr.DataArray,
    *,
    shares: Sequence[float] = SHARES,
    baseline: Tensor | float = 0.0,
) -> Array:
    """By how much the probability falls with the most important features alone, -1 to 1; lower is better. [batch]

    Mean over `shares` of the features, each at least one feature.
    """
    curve = _curve(model, inputs, attribution, (*_valid(shares), 1.0), baseline, keep=True)
    return (curve[-1] - curve[:-1]).mean(0)


def infidelity_error(
    model: nn.Module,
    inputs: Mapping[str, Any],
    attribution: xr.DataArray,
    *,
    share: float = 0.2,
    samples: int = 50,
    baseline: Tensor | float = 0.0,
    seed: int = 0,
) -> Array:
    """Mean squared error of the fall of the logit that scores foretell, from 0 up; lower is better. [batch]

    A perturbation takes each feature away with probability `share`, for its baseline; scores foretell the sum of what
    was taken. So it is about features, all channels of a pixel together. Units of the logit, squared. Scores in other
    units are judged as they are.
    """
    metrics = _captum()

    def taken(there: Tensor) -> tuple[Tensor, Tensor]:
        away = (torch.rand_like(there) < share).to(there)
        return away, there - away

    with (
        predict(model, inputs, Question.of(attribution)) as prediction,
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        scores = _scores(prediction, attribution)
        found = []
        for i in range(len(scores)):
            one, real = prediction.sample(i), torch.ones_like(scores[i], dtype=torch.bool)
            real = real if one.real is None else one.real[0].cpu()
            flat = scores[i][real][None].to(one.given.dtype)
            torch.manual_seed(seed)  # so that a sample is perturbed as it would be alone

            def logit(there: Tensor, one: Prediction = one, real: Tensor = real) -> Tensor:
                kept = torch.ones(len(there), *real.shape, dtype=torch.bool)
                kept[:, real] = there > 0.5
                return one.score(one.without(kept, baseline))

            every, at_once = torch.ones_like(flat), min(64, samples)
            found.append(
                metrics.infidelity(logit, taken, every, flat, n_perturb_samples=samples, max_examples_per_batch=at_once)
            )
    return torch.cat(found).double().numpy()


def sensitivity_error(
    model: nn.Module,
    inputs: Mapping[str, Any],
    explain: Callable[..., xr.DataArray],
    target: Target = None,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
) -> Array:
    """By how much an attribution changes at most within a small distance of the input, from 0 up; lower is better.

    Of each sample [batch]: the largest norm of the change among `samples` inputs whose pixels, or whose tokens'
    embeddings, are off by `radius` at most in each number, as a share of the norm of the attribution. explain: (model,
    inputs, target) -> scores, such as a partial of `regard.attribute`; target is a `Question`. A method that gives
    always the same has 0.
    """
    if not radius > 0 or samples < 1:
        raise ValueError(f"radius={radius}, samples={samples}: give a distance above 0, and one sample at least")
    with predict(model, inputs, target) as prediction, torch.random.fork_rng(devices=[]):
        given = prediction.given
        before = explain(model, prediction.inputs, prediction.question).values
        torch.manual_seed(seed)
        off = torch.empty(samples, *given.shape[1:]).uniform_(-radius, radius).to(given)  # for each sample as if alone
        worst = np.zeros(len(before))
        for one in off:
            with prediction.shifted(one) as nearby:
                after = explain(model, nearby, prediction.question).values
            worst = np.maximum(worst, _norm(after - before))
    whole = _norm(before)
    return worst / np.where(whole > 0, whole, 1)


def _norm(scores: Array) -> Array:
    return np.sqrt((scores**2).reshape(len(scores), -1).sum(1))


def _captum() -> Any:
    with needs("this metric", "explain"):
        from captum import metrics
    return metrics


def _even(steps: int) -> tuple[float, ...]:
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one is needed")
    return tuple(i / steps for i in range(steps + 1))


def _valid(shares: Sequence[float]) -> Sequence[float]:
    if not len(shares) or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares={shares}: give shares of the features, above 0 and up to 1")
    return shares


def _area(curve: Array) -> Array:
    return (curve[1:] + curve[:-1]).mean(0) / 2


def _scores(prediction: Prediction, attribution: xr.DataArray) -> Tensor:
    if attribution.shape != prediction.shape:
        raise ValueError(
            f"the attribution is {list(attribution.shape)}, and the inputs have features {list(prediction.shape)}"
        )
    return torch.from_numpy(np.ascontiguousarray(attribution.values)).double()


def _curve(
    model: nn.Module,
    inputs: Mapping[str, Any],
    attribution: xr.DataArray,
    shares: Sequence[float],
    baseline: Tensor | float,
    *,
    keep: bool,
) -> Array:
    """Probability with only (or without) these shares of the features, the highest scores first. [share, batch]"""
    with predict(model, inputs, Question.of(attribution)) as prediction, torch.no_grad():
        return curve(prediction, _scores(prediction, attribution), shares, baseline, keep=keep)


def curve(
    prediction: Prediction, scores: Tensor, shares: Sequence[float], baseline: Tensor | float, *, keep: bool
) -> Array:
    """Probability with only (or without) these shares of the features, the highest scores first. [share, batch]

    scores: of the features' shape; padding does not count.
    """
    shape, scores = scores.shape, scores.flatten(1)
    real = torch.ones_like(scores, dtype=torch.bool)
    real = real if prediction.real is None else prediction.real.cpu().flatten(1)
    scores = scores.masked_fill(~real, -math.inf)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    counts = real.sum(1, keepdim=True)
    at_once, found = max(1, BATCH // len(scores)) if prediction.repeats else 1, []
    for part in torch.tensor(shares, dtype=torch.double)[:, None, None].split(at_once):
        high = rank < torch.where(part > 0, (part * counts).round().clamp(min=1), 0)
        kept = ((high if keep else ~high) | ~real).reshape(-1, *shape)
        found.append(prediction.probability(prediction.without(kept, baseline).flatten(0, 1)).reshape(-1, len(scores)))
    return torch.cat(found).double().cpu().numpy()
