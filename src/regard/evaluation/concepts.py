"""How good concepts are, and their importance.

Fel et al., A Holistic Approach to Unifying Automatic Concept Extraction and Concept Importance Estimation
(arXiv:2306.07304), section 3: what a dictionary loses, whether it comes out alike of other data, and whether the score
falls with the concepts that are called important.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..extras import needs


def reconstruction_error(activations: Any, codes: Any, atoms: Any) -> float:
    """Norm of what codes [..., concept] times atoms [concept, dim] leave out, as a share of the whole; 0 is nothing.

    >>> reconstruction_error([[3.0, 4.0]], [[3.0]], [[1.0, 0.0]])
    0.8
    """
    values, made = np.asarray(activations, float), np.asarray(codes, float) @ np.asarray(atoms, float)
    if values.shape != made.shape:
        raise ValueError(f"activations are {list(values.shape)}, and codes times atoms {list(made.shape)}")
    return float(np.linalg.norm(values - made) / np.linalg.norm(values))


def stability_score(one: Any, other: Any) -> float:
    """Mean cosine of the atoms of two dictionaries [concept, dim], each with its best partner; 1 is the same.

    >>> round(stability_score([[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [3.0, 0.0]]), 6)
    1.0
    """
    with needs("the stability of concepts", "claims"):
        from scipy.optimize import linear_sum_assignment

    rows = [np.asarray(atoms, float) for atoms in (one, other)]
    if rows[0].shape != rows[1].shape:
        raise ValueError(f"dictionaries of {list(rows[0].shape)} and {list(rows[1].shape)} have no pairs of concepts")
    units = [row / np.maximum(np.linalg.norm(row, axis=1, keepdims=True), 1e-30) for row in rows]
    cosines = units[0] @ units[1].T
    return float(cosines[linear_sum_assignment(-cosines)].mean())


@torch.no_grad()
def concept_deletion_error(codes: Tensor, importance: Tensor, score: Callable[[Tensor], Tensor]) -> NDArray[np.float64]:
    """Mean score while concepts are taken away everywhere, the most important first; lower is better. [item]

    codes: [item, ..., concept]. importance: [item, concept]. score: codes to [item]. The area under the curve over the
    share of concepts, in units of the score.

    >>> concept_deletion_error(torch.ones(1, 2), torch.tensor([[1.0, 0.0]]), lambda u: u[:, 0]).tolist()
    [0.25]
    """
    n = codes.shape[-1]
    if importance.shape != (len(codes), n):
        raise ValueError(f"importance {list(importance.shape)} is not one a concept of {list(codes.shape)}")
    rank = importance.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    between = [1] * (codes.ndim - 2)
    curve = torch.stack([score(codes * (rank >= k).reshape(len(codes), *between, n)) for k in range(n + 1)])
    return ((curve[1:] + curve[:-1]).mean(0) / 2).double().cpu().numpy()
