"""Values that others made: the authors' code, or a reimplementation, run on inputs that are kept with what it gave.

A folder holds one `KEY.npz` a paper, with any number of cases. `<room>/<key>.py` beside this file says how the settings
and names of such a file become a call of ours: `compare(case)` gives what ours makes, by the name of the value that it
has to equal, or as a pair of both. It reads shapes and knobs from the case, so that other cases run as well.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("REGARD_GOLDEN") or HERE.parents[2] / "shared" / "golden")
# Of an array's largest value; the dtype is the coarser of ours and theirs.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
FLOOR = 1e-3  # an array smaller than this counts as this large: nothing is known of 0 in shares of it


class Source(NamedTuple):
    """Whose code made the values: that of the paper's authors, or another's."""

    kind: Literal["authors", "reimplementation"]
    name: str


class Unmapped(Exception):
    """A case that ours does not offer, and why."""


@dataclass(frozen=True)
class Case:
    """One case of a file: settings, and arrays by name. Names that start with `weight.` are a state."""

    key: str
    name: str
    settings: Mapping[str, Any]
    arrays: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def get(self, name: str) -> Tensor | None:
        return self.arrays.get(name)

    @property
    def weights(self) -> dict[str, Tensor]:
        start = "weight."
        return {name.removeprefix(start): value for name, value in self.arrays.items() if name.startswith(start)}

    def leaves(self, *names: str) -> dict[str, Tensor]:
        """Inputs that gradients are asked of."""
        return {name: self[name].clone().requires_grad_() for name in names}

    def gradients(self, output: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`grad_NAME` or `grad.NAME` of each leaf of which the file holds one: with `grad_output` or
        `output_gradient`, or of a scalar.
        """
        wanted = {
            f"grad{dot}{name}": leaf for name, leaf in leaves.items() for dot in "_." if f"grad{dot}{name}" in self
        }
        given = self.arrays.get("grad_output", self.get("output_gradient")) if output.ndim else None
        return dict(zip(wanted, torch.autograd.grad(output, list(wanted.values()), given))) if wanted else {}


class Difference(NamedTuple):
    """By how much ours is off, in shares of the largest value, and by how much it may be."""

    off: float
    allowed: float


def read(path: Path) -> list[Case]:
    """The cases of a file, in order."""
    with np.load(path, allow_pickle=False) as file:
        held = {name: file[name] for name in file.files}
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in held.items():
        case, dot, of = name.partition(".")
        if dot:
            found.setdefault(case, {})[of] = array
    names = sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    shared = held.get("settings")
    texts = [str(text) for text in np.atleast_1d(shared)] if shared is not None else []
    settings = json.loads(texts[0]) if len(texts) == 1 else [json.loads(text) for text in texts]
    settings = [settings] * len(names) if isinstance(settings, dict) else settings
    cases = []
    for i, name in enumerate(names):
        own = found[name].pop("settings", None)
        of = json.loads(str(own)) if own is not None else settings[i] if i < len(settings) else {}
        arrays = {name: torch.from_numpy(a.copy()) for name, a in found[name].items() if a.dtype.kind in "biuf"}
        texts_of = {name: a.tolist() for name, a in found[name].items() if a.dtype.kind == "U"}
        cases.append(Case(path.stem, name, {**texts_of, **of}, arrays))
    return cases


def mappings() -> dict[str, ModuleType]:
    """What says how each paper's values are met, by its key."""
    paths = sorted(path for path in HERE.glob("*/*.py") if not path.stem.startswith("_"))
    return {path.stem.replace("_", "-"): import_module(f"{__name__}.{path.parent.name}.{path.stem}") for path in paths}


def cases(key: str) -> list[Case]:
    """Of this paper; none where the folder has no file of it."""
    path = FOLDER / f"{key}.npz"
    return read(path) if path.exists() else []


def differences(mapping: ModuleType, case: Case) -> dict[str, Difference]:
    """Of everything that the mapping compares, by name. Raises `Unmapped`."""
    torch.manual_seed(0)
    with _dtype_of(case.weights.values()):
        found: dict[str, Any] = mapping.compare(case)
    if not found:
        raise ValueError(f"{case.key}, {case.name}: nothing is compared")
    left = {name for name in case.arrays if re.match(r"grad_(?!output)|output$", name)} - found.keys()
    if left := left - set(getattr(mapping, "APART", ())):
        raise ValueError(f"{case.key}, {case.name}: {', '.join(sorted(left))} is left out")
    return {
        name: difference(*(value if isinstance(value, tuple) else (value, case[name])), _allowed(mapping, name))
        for name, value in found.items()
    }


@contextmanager
def _dtype_of(weights: Iterable[Tensor]) -> Iterator[None]:
    """What is built inside is of double precision where all of these weights are."""
    found, usual = {weight.dtype for weight in weights if weight.is_floating_point()}, torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if found == {torch.float64} else usual)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def difference(ours: Any, theirs: Any, allowed: float | None = None) -> Difference:
    """Of two arrays. Infinite where shapes, or places without a number, are not the same."""
    one, other = (_tensor(value) for value in (ours, theirs))
    exact = not (one.is_floating_point() and other.is_floating_point())
    if allowed is None:
        allowed = 0.0 if exact else max(TOLERANCE[t.dtype] for t in (one, other))
    if one.shape != other.shape:
        return Difference(np.inf, allowed)
    one, other = one.double(), other.double()
    real = one.isfinite()
    if not torch.equal(real, other.isfinite()) or not torch.equal(one[~real].nan_to_num(), other[~real].nan_to_num()):
        return Difference(np.inf, allowed)
    one, other = one[real], other[real]
    if not one.numel():
        return Difference(0.0, allowed)
    size = 1.0 if exact else max(float(other.abs().max()), FLOOR)
    return Difference(float((one - other).abs().max()) / size, allowed)


def _allowed(mapping: ModuleType, name: str) -> float | None:
    of = getattr(mapping, "TOLERANCE", {})
    return of.get(name, of.get(name.partition(".")[0]))


def _tensor(value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
