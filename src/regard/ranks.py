"""Recordings of several processes, joined along the batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
import xarray as xr

from .tokens import ROLES

_Held = TypeVar("_Held")
_NOTHING = {"f": np.nan, "i": -1, "u": 0, "b": False, "O": ""}  # where a row has no such position


def several() -> bool:
    """Whether this process is one of several of torch.distributed."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def brought(held: _Held) -> list[_Held] | None:
    """What each process holds, on process 0; None on the others. All of them call this."""
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(held, parts)
    return parts


def joined(parts: Sequence[Sequence[xr.DataTree]]) -> list[xr.DataTree]:
    """Run by run, the rows of all processes, in the order of these.

    A row that is shorter than others gets positions of the role "pad" at its end, without values.
    """
    counts = sorted({len(part) for part in parts})
    if len(counts) > 1:
        raise ValueError(
            f"processes recorded {counts[0]} to {counts[-1]} runs each, and the first run of one is joined with the "
            f"first of the others: run the model equally often in all"
        )
    return [_run(trees) for trees in zip(*parts)]


def _run(trees: Sequence[xr.DataTree]) -> xr.DataTree:
    first = trees[0]
    stacks = [sorted(map(str, tree.children)) for tree in trees]
    if any(other != stacks[0] for other in stacks):
        raise ValueError(f"processes recorded other stacks: {' and '.join(sorted({', '.join(s) for s in stacks}))}")
    nodes = {
        name: _stack(name, [tree.children[name].to_dataset(inherit=False) for tree in trees]) for name in first.children
    }
    tree = xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in nodes.items()})
    tree.attrs = {**first.attrs, "partial": any(bool(t.attrs.get("partial")) for t in trees)}
    return tree


def _stack(name: str, parts: Sequence[xr.Dataset]) -> xr.Dataset:
    first = parts[0]
    for part in parts:
        same = all(np.array_equal(part[axis], first[axis]) for axis in ("layer", "head"))
        if not same or set(part.data_vars) != set(first.data_vars):
            raise ValueError(f"processes recorded other layers, heads or statistics of {name!r}")
    if lost := [v for v in first.data_vars if "batch" not in first[v].dims]:
        raise ValueError(
            f"statistic {lost[0]!r} has no batch axis, so what processes recorded of it cannot be joined; index what "
            f"each has, or declare it with 'batch'"
        )
    grids = [json.loads(part.attrs.get("grids", "[]")) for part in parts]
    whole = [_filled(part, parts, sum(map(len, grids[:i]))) for i, part in enumerate(parts)]
    return xr.concat(whole, "batch", join="exact", combine_attrs="override", coords="minimal").assign_attrs(
        {**first.attrs, "grids": json.dumps([grid for some in grids for grid in some])}
    )


def _filled(part: xr.Dataset, parts: Sequence[xr.Dataset], pictures: int) -> xr.Dataset:
    """With all positions and roles that any has; its pictures are numbered from `pictures` on."""
    for side in ("query", "key"):
        if f"{side}_image" in part.coords:
            numbers = part[f"{side}_image"]
            part = part.assign_coords({f"{side}_image": numbers.where(numbers < 0, numbers + pictures)})
    for axis in dict.fromkeys(str(axis) for one in parts for axis in one.sizes if axis != "batch"):
        lengths = {one.sizes.get(axis, 0) for one in parts}
        if axis == "role":
            present = [role for role in ROLES if any(role in one["role"] for one in parts)]
            part = _with_roles(part, present)
        elif axis in part.coords:
            labels = np.unique(np.concatenate([one[axis].values for one in parts]))
            if not np.array_equal(labels, part[axis]):
                part = part.reindex({axis: labels}, fill_value=_fill(part, axis))
        elif len(lengths) > 1:
            part = part.pad({axis: (0, max(lengths) - part.sizes[axis])}, constant_values=_fill(part, axis))
    return part


def _with_roles(part: xr.Dataset, present: list[str]) -> xr.Dataset:
    """Where no key has a role, none of the weight is on it: 0, and NaN where a row has no weights."""
    missing = [role for role in present if role not in part["role"]]
    if missing:
        none = xr.concat([part[[v for v in part if "role" in part[v].dims]].isel(role=[0]) * 0] * len(missing), "role")
        more = part.reindex(role=[*part["role"].values, *missing], fill_value=_fill(part, "role"))
        none = none.assign_coords(role=missing)
        for v in none.data_vars:
            kept = part[v].astype(more[v].dtype)
            more[v] = xr.concat([kept, none[v].astype(kept.dtype)], "role").transpose(*part[v].dims)
        part = more
    return part.sel(role=present)


def _fill(part: xr.Dataset, axis: str) -> dict[str, Any]:
    there = (str(v) for v in part.variables if v != axis and axis in part[v].dims)
    return {v: "pad" if v.endswith("_role") else _NOTHING[part[v].dtype.kind] for v in there}
