"""Concepts as a dictionary of activations, and their importance as an attribution over codes.

Fel et al., A Holistic Approach to Unifying Automatic Concept Extraction and Concept Importance Estimation
(arXiv:2306.07304), sections 3 and 4: activations are factored, A ~ U V, and what the model makes of a layer is seen as
a function of the codes U, of which any attribution says which concepts matter. K-means is ACE's way, principal
components and non-negative factors are others; total Sobol indices are CRAFT's importance, with the design of its code
(deel-ai/ Craft): unscrambled Halton sequences and Jansen's estimator. The paper has no code of its own; factorisations
are scikit-learn's, with its defaults.

What a dictionary leaves out of the activations is left out of what the model reads, too. Principal components are of
activations as they are, without their mean, since A ~ U V has none. Sparse autoencoders and the map of clusters of
strategies are left out; of the attributions, RISE and HSIC.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from ..extras import needs
from ..prediction import Prediction, Target, predict

Factors = Literal["nmf", "kmeans", "pca"]
Importance = Literal["gradient", "gradient_x_input", "integrated_gradients", "occlusion", "sobol"]
Score = Callable[[Tensor], Tensor]  # codes [item, ..., concept] -> [item]


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Concepts of activations: codes [..., concept] times atoms [concept, dim] are near them."""

    codes: NDArray[Any]
    atoms: NDArray[Any]
    method: Factors

    def transform(self, activations: Any) -> NDArray[Any]:
        """Codes of other activations. [..., dim] to [..., concept]"""
        rows, shape = _rows(activations, self.method)
        if rows.shape[1] != self.atoms.shape[1]:
            raise ValueError(f"activations have {rows.shape[1]} dimensions, and the concepts {self.atoms.shape[1]}")
        if self.method == "nmf":
            with needs("concepts", "claims"):
                from sklearn.decomposition import non_negative_factorization
            n: Any = len(self.atoms)
            codes = non_negative_factorization(rows, H=self.atoms, n_components=n, update_H=False)[0]
        elif self.method == "pca":
            codes = rows @ self.atoms.T
        else:
            away = ((rows[:, None] - self.atoms) ** 2).sum(-1)
            codes = np.eye(len(self.atoms), dtype=rows.dtype)[away.argmin(1)]
        return codes.reshape(*shape, -1)


def concepts(
    activations: Any, *, n: int = 20, method: Factors = "nmf", iterations: int = 200, seed: int = 0
) -> Dictionary:
    """`n` concepts of activations [..., dim], by non-negative factors, the means of clusters, or principal components.

    iterations: of the factors, at most. ValueError where there are more concepts than items or dimensions, and for
    non-negative factors of what is negative.

    >>> made = concepts(np.array([[2.0, 0.0], [0.0, 3.0], [4.0, 0.0]]), n=2)
    >>> (made.atoms > 1e-6).sum(1).tolist(), np.allclose(made.codes @ made.atoms, [[2, 0], [0, 3], [4, 0]], atol=1e-2)
    ([1, 1], True)
    """
    if method not in get_args(Factors):
        raise ValueError(f"method={method!r}: one of {', '.join(get_args(Factors))}")
    rows, shape = _rows(activations, method)
    if not 1 <= n <= min(rows.shape):
        most = min(rows.shape)
        raise ValueError(f"n={n}: {rows.shape[0]} items of {rows.shape[1]} dimensions have 1 to {most} concepts")
    with needs("concepts", "claims"):
        from sklearn.cluster import KMeans
        from sklearn.decomposition import NMF
    if method == "nmf":
        model = NMF(n_components=n, max_iter=iterations, random_state=seed)  # type: ignore[arg-type]
        codes, atoms = model.fit_transform(rows), model.components_
    elif method == "pca":
        sides = np.linalg.svd(rows, full_matrices=False)
        codes, atoms = sides[0][:, :n] * sides[1][:n], sides[2][:n]
    else:
        model = KMeans(n_clusters=n, n_init=3, random_state=seed).fit(rows)  # type: ignore[arg-type]
        codes, atoms = np.eye(n, dtype=rows.dtype)[model.labels_], model.cluster_centers_
    return Dictionary(codes.reshape(*shape, n), atoms.astype(rows.dtype), method)


def importance(codes: Tensor, score: Score, *, method: Importance = "gradient_x_input", steps: int = 32) -> Tensor:
    """How much each concept matters for a score of the codes. [item, ..., concept]; of "sobol" [item, concept]

    "gradient", "gradient_x_input" and "integrated_gradients" (`steps` from codes of 0) are of each code; "occlusion"
    is the score less that without the code; "sobol" is the total share of the score's variance, 0 to 1 or about, where
    concepts are scaled by `steps` designs of masks, one for all places.

    >>> codes = torch.tensor([[3.0, 1.0]])
    >>> importance(codes, lambda u: 2 * u[:, 0] - u[:, 1]).tolist()
    [[6.0, -1.0]]
    """
    if method not in get_args(Importance):
        raise ValueError(f"method={method!r}: one of {', '.join(get_args(Importance))}")
    if steps < 2:
        raise ValueError(f"steps={steps}: two at least")
    codes = codes.detach()
    if method == "sobol":
        return _sobol(codes, score, steps)
    if method == "occlusion":
        return _occluded(codes, score)
    slope = torch.zeros_like(codes)
    at = (torch.arange(steps) + 0.5) / steps if method == "integrated_gradients" else torch.ones(1)
    for share in at.tolist():
        given = (share * codes).requires_grad_()
        with torch.enable_grad():
            total = score(given).sum()
        if not total.requires_grad:
            raise ValueError("the score does not depend on the codes")
        slope += torch.autograd.grad(total, given)[0] / len(at)
    return slope if method == "gradient" else slope * codes


def concept_importance(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: Target = None,
    *,
    dictionary: Dictionary,
    layer: str,
    method: Importance = "gradient_x_input",
    steps: int = 32,
) -> xr.DataArray:
    """How much each concept of a layer matters for a prediction. [batch, row, column, concept], [batch, token, concept]

    The layer's output is replaced by what the dictionary makes of it; `score` is the logit then, and `whole` the
    model's own. layer: a module's name; dictionary: of its `activations`. method, steps: see `importance`; "sobol"
    gives [batch, concept].
    """
    with predict(model, inputs, target) as prediction:
        own = _activations(prediction, layer)
        codes = torch.from_numpy(dictionary.transform(own.cpu().numpy())).to(own)
        atoms = torch.from_numpy(dictionary.atoms).to(own)

        def score(given: Tensor) -> Tensor:
            return _with(prediction, layer, given @ atoms)

        found = importance(codes, score, method=method, steps=steps)
        with torch.no_grad():
            scores, whole = score(codes), prediction.score()
        dims = {4: ("row", "column"), 3: ("token",), 2: ()}[found.ndim]
        along = {"target": prediction.target, "score": scores, "whole": whole}
        return xr.DataArray(
            found.detach().cpu().double().numpy(),
            {name: ("batch", value.detach().cpu().numpy()) for name, value in along.items()},
            ("batch", *dims, "concept"),
            method,
            {"long_name": f"importance of concepts by {method}", "layer": layer},
        )


def activations(model: nn.Module, inputs: Mapping[str, Any], layer: str) -> Tensor:
    """What a module gives, channels last. [batch, row, column, dim], [batch, token, dim] or [batch, dim]"""
    with predict(model, inputs) as prediction:
        return _activations(prediction, layer)


def _rows(activations: Any, method: str) -> tuple[NDArray[Any], tuple[int, ...]]:
    values = np.asarray(activations)
    if values.ndim < 2 or not np.isfinite(values).all():
        raise ValueError(f"activations are finite numbers [..., dim], got {list(values.shape)}")
    if method == "nmf" and values.min() < 0:
        raise ValueError("non-negative factors are of activations from 0 up; take those after a ReLU, or pca or kmeans")
    return values.reshape(-1, values.shape[-1]), values.shape[:-1]


def _activations(prediction: Prediction, layer: str) -> Tensor:
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor) or first.ndim not in (2, 3, 4):
            raise ValueError(f"{layer} gives no tensor of places or tokens")
        seen.append(first.detach())

    with _hooked(prediction, layer, keep), torch.no_grad():
        prediction.score()
    if len(seen) != 1:
        raise ValueError(f"{layer} runs {len(seen)} times for a prediction, and has to run once")
    return seen[0].movedim(1, -1) if seen[0].ndim == 4 else seen[0]


def _with(prediction: Prediction, layer: str, states: Tensor) -> Tensor:
    """The score where the layer gives these states, of several batches one after the other. [n * batch]"""
    placed = states.movedim(-1, 1) if states.ndim == 4 else states

    def put(module: nn.Module, args: Any, output: Any) -> Any:
        return (placed, *output[1:]) if isinstance(output, tuple) else placed

    n = len(states) // len(prediction.given)
    with _hooked(prediction, layer, put):
        return prediction.score(prediction.given.repeat(n, *[1] * (prediction.given.ndim - 1)))


def _hooked(prediction: Prediction, layer: str, hook: Callable[..., Any]) -> ExitStack:
    modules = dict(prediction.model.named_modules())
    if layer not in modules:
        raise ValueError(f"{type(prediction.model).__name__} has no module {layer!r}")
    undo = ExitStack()
    undo.callback(modules[layer].register_forward_hook(hook).remove)
    return undo


@torch.no_grad()
def _occluded(codes: Tensor, score: Score) -> Tensor:
    whole, found = score(codes), torch.empty_like(codes)
    flat = codes.flatten(1)
    for i in range(flat.shape[1]):
        without = flat.clone()
        without[:, i] = 0
        found.view(len(codes), -1)[:, i] = whole - score(without.reshape(codes.shape))
    return found


def design(concepts: int, steps: int) -> NDArray[np.float32]:
    """Masks of two designs, and of the first with each concept from the second. [steps (concept + 2), concept]"""
    with needs("Sobol indices", "claims"):
        from scipy.stats.qmc import Halton

    drawn = Halton(2 * concepts, scramble=False).random(steps).astype(np.float32)
    one, other = drawn[:, :concepts], drawn[:, concepts:]
    mixed = np.repeat(one[None], concepts, 0)
    for i in range(concepts):
        mixed[i, :, i] = other[:, i]
    return np.concatenate([one, other, *mixed])


@torch.no_grad()
def _sobol(codes: Tensor, score: Score, steps: int) -> Tensor:
    """Jansen's estimator of total indices. [item, concept]"""
    n = codes.shape[-1]
    masks = torch.from_numpy(design(n, steps)).to(codes).reshape(n + 2, steps, n)
    masks = torch.cat([masks[:1], masks[2:]])  # the second design itself is not needed

    def scores(of: Tensor) -> Tensor:
        return torch.stack([score(codes * mask) for mask in of], 1)  # [item, step]

    first, *others = (scores(of) for of in masks)
    spread = 2 * steps * first.var(1).clamp(min=1e-30)
    return torch.stack([(first - other).square().sum(1) / spread for other in others], -1)
