"""A recording as matplotlib axes, for papers: what the report shows, drawn to be printed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import xarray as xr
from PIL import Image

from .extras import needs
from .padding import real, unpadded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["atlas", "rows", "profile", "map"]
NAMED = 40  # tokens that an axis has room to name
STRUCTURE = {"rows", "top_keys", "top_weights"}


def plot(
    tree: xr.DataTree,
    kind: Kind = "atlas",
    statistic: str | None = None,
    *,
    stack: str | None = None,
    layer: int | None = None,
    head: int | None = None,
    sample: int = 0,
    role: str | None = None,
    token: int | None = None,
    picture: Image.Image | None = None,
    image: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw one view of a recorded run; returns the axes. See `Recording.plot`."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r}: there are {', '.join(get_args(Kind))}")
    name, data = _stack(tree, stack)
    if not 0 <= sample < data.sizes["batch"]:
        raise ValueError(f"sample={sample}: {name} has {data.sizes['batch']}, from 0")
    data = data.isel(batch=sample)
    for dim, chosen in (("layer", layer), ("head", head)):
        if chosen is not None and chosen not in data[dim].values:
            raise ValueError(f"{dim}={chosen}: {name} has {dim}s {data[dim].values.tolist()}")
    with needs("recording.plot", "claims"):
        from matplotlib import pyplot
    axes = pyplot.subplots(layout="constrained")[1] if ax is None else ax
    title = _title(name, tree, layer, head)
    if kind == "atlas":
        _atlas(axes, _variable(data, name, statistic, role), title)
    elif kind == "profile":
        _profile(axes, data, _variable(data, name, statistic, role, along=True), layer, head, title)
    else:
        rows = _rows(data, name, layer, head)
        if kind == "rows":
            _square(axes, data, rows, title)
        else:
            _over(axes, data, rows, name, token, picture, image, title)
    return axes


def _stack(tree: xr.DataTree, stack: str | None) -> tuple[str, xr.Dataset]:
    nodes = {n: node for n, node in tree.children.items() if {"layer", "head"} <= set(node.sizes)}
    name = next(iter(nodes), None) if stack is None else stack
    if name not in nodes:
        raise ValueError(f"stack={stack!r}: the recording has {', '.join(nodes) or 'none'}")
    data = nodes[str(name)].to_dataset()
    return str(name), unpadded(data if "batch" in data.dims else data.expand_dims("batch"))


def _variable(data: xr.Dataset, stack: str, name: str | None, role: str | None, along: bool = False) -> xr.DataArray:
    """A statistic, the first where none is named. along: one that has a value at each token."""
    found = [
        str(one)
        for one, values in data.data_vars.items()
        if one not in STRUCTURE
        and {"layer", "head"} <= set(values.dims)
        and "rank" not in values.dims
        and (not along or {"query", "key"} & set(values.dims))
    ]
    if name is None and found:
        name = found[0]
    if name not in found:
        raise ValueError(f"statistic={name!r}: {stack} has {', '.join(found) or 'none'}")
    values = data[name]
    if "role" not in values.dims:
        if role is not None:
            raise ValueError(f"role={role!r}: {name} is not by role")
        return values
    roles = values["role"].values.tolist()
    if role is None:
        role = roles[0]
    if role not in roles:
        raise ValueError(f"role={role!r}: {name} has {', '.join(map(str, roles))}")
    label = f"{values.attrs.get('long_name', name)}: {role}"
    return values.sel(role=role).assign_attrs(values.attrs, long_name=label)


def _rows(data: xr.Dataset, stack: str, layer: int | None, head: int | None) -> xr.DataArray:
    """Weights [query, key] of a head; the mean of heads, or of layers, that are not named."""
    if "rows" not in data:
        raise ValueError(f"{stack} holds no rows: record the statistic 'rows'")
    chosen = {dim: at for dim, at in (("layer", layer), ("head", head)) if at is not None}
    rows = data["rows"].sel(chosen)
    return rows.mean([dim for dim in ("layer", "head") if dim in rows.dims], keep_attrs=True).transpose("query", "key")


def _title(stack: str, tree: xr.DataTree, layer: int | None, head: int | None) -> str:
    parts = [str(tree.attrs.get("model", ""))]
    parts += [stack.replace("_", " ")] if len(tree.children) > 1 else []
    parts += [f"{dim} {at}" for dim, at in (("layer", layer), ("head", head)) if at is not None]
    return ", ".join(part for part in parts if part)


def _label(values: xr.DataArray) -> str:
    units = str(values.attrs.get("units", ""))
    return f"{values.attrs.get('long_name', values.name)}{f' ({units})' if units not in ('', '1') else ''}"


def _atlas(axes: Axes, values: xr.DataArray, title: str) -> None:
    mean = values.mean(set(values.dims) - {"layer", "head"}).transpose("layer", "head")
    low, high = float(mean.min()), float(mean.max())
    signed = low < 0 < high
    end = max(-low, high)
    colours: dict[str, Any] = {"cmap": "RdBu", "vmin": -end, "vmax": end} if signed else {"cmap": "viridis"}
    drawn = axes.imshow(mean.values, **colours)
    for axis, dim in ((axes.xaxis, "head"), (axes.yaxis, "layer")):
        names = mean[dim].values
        every = -(-len(names) // 16)
        axis.set_ticks(range(0, len(names), every), names[::every])
        axis.set_label_text(dim)
    axes.figure.colorbar(drawn, ax=axes, label=_label(values))
    axes.set_title(title)


def _profile(
    axes: Axes, data: xr.Dataset, values: xr.DataArray, layer: int | None, head: int | None, title: str
) -> None:
    along = "query" if "query" in values.dims else "key"
    chosen = values.sel({dim: at for dim, at in (("layer", layer), ("head", head)) if at is not None})
    line = chosen.mean(set(chosen.dims) - {along})
    at, heights = np.arange(line.sizes[along] + 1) - 0.5, np.append(line.values, line.values[-1:])
    axes.step(at, heights, where="post", linewidth=1.2)
    axes.fill_between(at, 0, heights, step="post", alpha=0.15)
    _name(axes.xaxis, data, along)
    axes.set_xlabel(along)
    axes.set_ylabel(_label(values))
    axes.set_xlim(at[0], at[-1])
    axes.set_title(title)


def _square(axes: Axes, data: xr.Dataset, rows: xr.DataArray, title: str) -> None:
    drawn = axes.imshow(np.sqrt(rows.values), cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    bar = axes.figure.colorbar(drawn, ax=axes, label="weight")
    shares = np.array([0, 0.05, 0.2, 0.5, 1])
    bar.set_ticks(np.sqrt(shares).tolist(), labels=[f"{share:g}" for share in shares])
    _name(axes.xaxis, data, "key")
    _name(axes.yaxis, data, "query")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(title)


def _name(axis: Any, data: xr.Dataset, side: str) -> None:
    """Tokens as names, where there is room; otherwise positions."""
    n = data.sizes[side]
    if n <= NAMED and f"{side}_token" in data.coords:
        names = [str(token).strip() or repr(str(token)) for token in data[f"{side}_token"].values]
        names = [name.replace("$", r"\$") for name in names]
        axis.set_ticks(range(n), names, rotation=90 if axis.axis_name == "x" else 0, fontsize=7)


def _over(
    axes: Axes,
    data: xr.Dataset,
    rows: xr.DataArray,
    stack: str,
    token: int | None,
    picture: Image.Image | None,
    image: int,
    title: str,
) -> None:
    grids = data.attrs.get("grids", [])
    grids = json.loads(grids) if isinstance(grids, str) else list(grids)
    if "key_image" not in data.coords or image >= len(grids):
        raise ValueError(f"image={image}: {stack} has the patches of {len(grids)} pictures")
    if token is None:
        row = rows.where(real(data.expand_dims("batch"), "query").isel(batch=0)).mean("query")
    elif token in rows["query"].values:
        row = rows.sel(query=token)
    else:
        raise ValueError(f"token={token}: {stack} has rows of queries {rows['query'].values.tolist()[:20]}")
    shape = tuple(int(side) for side in grids[image])
    heat = np.full(shape, np.nan)
    here = data["key_image"].values == image
    heat[data["key_row"].values[here], data["key_column"].values[here]] = row.values[here]
    wide, high = (shape[1], shape[0]) if picture is None else picture.size
    extent = (0, wide, high, 0)
    if picture is not None:
        axes.imshow(picture.convert("L"), cmap="gray", extent=extent, aspect="equal")
    drawn = axes.imshow(
        heat, cmap="inferno", vmin=0, alpha=1 if picture is None else 0.6, extent=extent, interpolation="nearest"
    )
    axes.figure.colorbar(drawn, ax=axes, label="mean weight" if token is None else "weight")
    axes.set_xlim(0, wide)
    axes.set_ylim(high, 0)
    axes.set_axis_off()
    axes.set_title(title + ("" if token is None else f", query {token}"))
