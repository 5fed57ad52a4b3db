"""A recording in a notebook whose page and Python know of each other: what is chosen there is read here, and set.

The page is the report in a frame, as `recording.show` gives it. All that passes between the two is the page's address.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from typing import Any
from urllib.parse import quote, unquote

import xarray as xr

from . import report
from .extras import listed, needs, shortened

with needs("a widget", "notebook"):
    import anywidget
    import traitlets

SCOPES = ("head", "layer", "all", "rollout")
ADDRESS = re.compile(
    r"#(?P<stack>[^/]+)/(?P<layer>\d+)/(?P<head>\d+)/(?P<token>-|k?-?\d+)"
    rf"(?:/(?P<scope>{'|'.join(SCOPES)}))?(?:/(?P<batch>\d+))?",
    re.ASCII,
)


class Widget(anywidget.AnyWidget):
    """The page of one run of a recording, and what is chosen on it.

    selected: `stack`, `layer` and `head` by their numbers; `batch`, the sample, from 0; `query` and `key`, the position
    of the chosen token, None without one, or where there is no such query or key; `scope`, whose weights are shown:
    "head", "layer", "all" or "rollout". Empty until the page is shown, or `select` called. `observe` tells of changes.
    """

    _esm = (resources.files("regard") / "view" / "widget.js").read_text("utf-8")
    page = traitlets.Unicode().tag(sync=True)
    height = traitlets.Int().tag(sync=True)
    address = traitlets.Unicode().tag(sync=True)
    selected = traitlets.Dict(read_only=True)

    def __init__(self, tree: xr.DataTree, page: bytes, words: str, height: int) -> None:
        self.tree = tree
        self._shown = report.Shown(page, words, height)
        super().__init__(page=page.decode(), height=height)

    @traitlets.observe("address")
    def _moved(self, change: Any) -> None:
        self.set_trait("selected", _selected(self.tree, change["new"]))

    def select(
        self,
        *,
        stack: str | None = None,
        layer: int | None = None,
        head: int | None = None,
        token: int | str | None = None,
        batch: int | None = None,
        scope: str = "head",
    ) -> None:
        """Choose on the page; what is not named stays, but for token and scope, and is the first of another stack.

        layer, head: by their numbers. token: a position, in a cross stack a query's, or "k3" for a key's; None for
        none. batch: the sample, from 0. scope: see `selected`. ValueError, with what there is, for what was not
        recorded.
        """
        now = dict(self.selected)
        stacks = [name for name, node in self.tree.children.items() if {"layer", "head"} <= set(node.sizes)]
        name = str(_among("stack", now.get("stack", stacks[0]) if stack is None else stack, stacks))
        node, stays = self.tree.children[name].to_dataset(), name == now.get("stack")
        for dim, value in (("layer", layer), ("head", head)):
            there = [int(x) for x in node[dim].values]
            now[dim] = _among(dim, (now[dim] if stays else there[0]) if value is None else value, there)
        kept = now["batch"] if stays else 0
        batch = _among("batch", kept if batch is None else batch, range(node.sizes.get("batch", 1)))
        if token is not None:
            sides = _sides(node, str(token))
            there = dict.fromkeys(int(x) for side in sides for x in node.coords.get(side, ()))
            _among("token", str(token).removeprefix("k"), [*map(str, there)])
        where = [quote(name, safe=""), now["layer"], now["head"], "-" if token is None else token]
        self.address = "#" + "/".join(map(str, [*where, _among("scope", scope, SCOPES), batch]))

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The widget; where none runs, the page in a frame, and where that is not shown either, the summary."""
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        return {**data, "text/plain": repr(self), "text/html": self._shown._repr_html_()}, metadata

    def __repr__(self) -> str:
        return repr(self._shown)


def _among(what: str, value: Any, there: Sequence[Any]) -> Any:
    if value not in there:
        raise ValueError(
            f"select: {what}={shortened(repr(value))} was not recorded; there is {listed(map(str, there))}"
        )
    return there[there.index(value)]


def _sides(node: xr.Dataset, token: str) -> tuple[str, ...]:
    """What a token of an address is: of cross attention a query, or with a k before it a key; otherwise both."""
    if node.attrs.get("kind") == "cross":
        return ("key",) if token.startswith("k") else ("query",)
    return ("query", "key")


def _selected(tree: xr.DataTree, address: str) -> dict[str, Any]:
    """What an address of the page chooses; empty where it is none."""
    found = ADDRESS.fullmatch(address)
    if found is None or unquote(found["stack"]) not in tree.children:
        return {}
    stack, token = unquote(found["stack"]), found["token"]
    chosen: dict[str, Any] = {"stack": stack, "layer": int(found["layer"]), "head": int(found["head"])}
    chosen |= {"batch": int(found["batch"] or 0), "query": None, "key": None, "scope": found["scope"] or "head"}
    node = tree.children[stack].to_dataset()
    for side in _sides(node, token) if token != "-" else ():
        position = int(token.removeprefix("k"))
        if side in node.coords and position in node[side].values:
            chosen[side] = position
    return chosen
