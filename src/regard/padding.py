"""Padding in a recorded stack: which positions are none, and what the others would say alone."""

from __future__ import annotations

import numpy as np
import xarray as xr


def real(stack: xr.Dataset, axis: str) -> xr.DataArray:
    """Which positions of the axis, query or key, are no padding; all where roles are not known. [batch, axis]"""
    if f"{axis}_role" not in stack.coords:
        sizes = {"batch": stack.sizes.get("batch", 1), axis: stack.sizes.get(axis, 0)}
        return xr.DataArray(np.ones(tuple(sizes.values()), bool), dims=tuple(sizes))
    there = (stack[f"{axis}_role"] != "pad").reset_coords(drop=True)
    return there.transpose("batch", axis) if "batch" in there.dims else there.expand_dims(batch=1)


def unpadded(stack: xr.Dataset) -> xr.Dataset:
    """The stack with NaN for what stands on padding, so that means of a row are those of its text alone.

    The role "pad" is left out; integers, such as positions of keys, are left as they are.
    """
    if "role" in stack.dims and "role" in stack.coords:
        stack = stack.sel(role=stack["role"] != "pad")
    padded = {axis: there for axis in ("query", "key") if axis in stack.dims and not (there := real(stack, axis)).all()}
    for name, variable in stack.data_vars.items():
        if variable.dtype.kind == "f" and (axes := padded.keys() & set(variable.dims)):
            kept = variable
            for axis in axes:
                there = padded[axis] if "batch" in variable.dims else padded[axis].isel(batch=0)
                kept = kept.where(there)
            stack = stack.assign({name: kept.transpose(*variable.dims).assign_attrs(variable.attrs)})
    return stack


def visible(stack: xr.Dataset) -> xr.DataArray:
    """How many keys, padding not counted, each query can see by its place. [batch, query]"""
    keys, _ = _both(stack)
    seen = np.full(stack.sizes["query"], stack.sizes["key"])
    if stack.attrs.get("causal"):
        seen = np.searchsorted(stack["key"].values, stack["query"].values, side="right")
    counts = np.concatenate([np.zeros((len(keys), 1), int), np.cumsum(keys, axis=1)], axis=1)
    return xr.DataArray(counts[:, seen], dims=("batch", "query"))


def evenly(stack: xr.Dataset) -> xr.DataArray:
    """What each key would receive if every query gave all that it can see the same weight. [batch, key]

    In the units of "received": queries. NaN for padding, whose queries do not count either.
    """
    keys, queries = _both(stack)
    given = np.where(queries, 1 / np.maximum(visible(stack).values, 1), 0.0)
    from_ = np.zeros(stack.sizes["key"], int)
    if stack.attrs.get("causal"):  # a key hears of the queries from its own place on
        from_ = np.searchsorted(stack["query"].values, stack["key"].values, side="left")
    later = np.cumsum(given[:, ::-1], axis=1)[:, ::-1]
    later = np.concatenate([later, np.zeros((len(later), 1))], axis=1)
    return xr.DataArray(np.where(keys, later[:, from_], np.nan), dims=("batch", "key"))


def _both(stack: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Which keys and which queries are no padding, each [batch, ...] of the same batch."""
    keys, queries = real(stack, "key").values, real(stack, "query").values
    n = max(len(keys), len(queries))
    return np.broadcast_to(keys, (n, keys.shape[1])), np.broadcast_to(queries, (n, queries.shape[1]))
