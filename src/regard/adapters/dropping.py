"""Tokens that leave a model at one of its layers: the layers after it run on fewer, and their caches hold fewer.

A layer of transformers is given hidden states, masks and positions for all tokens of a pass. Where some have left, each
layer's are cut to those that are left, by hooks; positions stay those of the whole sequence. A cache's layer that holds
fewer keys still says how long the whole sequence is, since masks and positions of the next pass are made by it. Behind
the last layer the states are put back among those of the tokens that left, as they were when they did.

Rows of a batch that lose different numbers of tokens are brought to one length by tokens that should have left: they
stay in the product and no other token sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ..call import UnreachableAttention
from ..functions import arguments
from . import caches

_CUT = {"attention_mask", "position_ids", "position_embeddings", "past_key_values", "cache_position"}


class Shortened(DynamicLayer):
    """What a cache holds of a layer that some tokens did not come to."""

    keys: Any
    values: Any
    positions: Tensor  # [batch, key] in the whole sequence
    blind: Tensor  # [batch, key] boolean: which of them nothing sees
    length: int  # of the whole sequence

    def get_seq_length(self) -> int:
        return self.length if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        gone = self.length - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        end = self.length - gone
        held = (self.positions < end).sum(1)
        if gone <= 0:
            return
        if bool((held != held[0]).any()):
            raise ValueError(f"a cache from which tokens were dropped cannot be cropped to {end} positions, amid them")
        n = int(held[0])
        self.keys, self.values = self.keys[..., :n, :], self.values[..., :n, :]
        self.positions, self.blind, self.length = self.positions[:, :n], self.blind[:, :n], end

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._rows(lambda tensor: tensor[beam_idx.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Any) -> None:
        super().batch_select_indices(indices)
        self._rows(lambda tensor: tensor[indices])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.positions, self.blind = change(self.positions), change(self.blind)


@dataclass(eq=False)
class Left:
    """What is left of the tokens of one pass at a layer, and what its cache holds of those before."""

    start: int  # positions before this pass
    n: int  # of this pass, before any left
    at: Tensor  # [batch, token] of this pass, from 0 on
    blind: Tensor  # [batch, token] boolean: which only fill a row up
    whole: Tensor | None = None  # [batch, n, dim]: states of all, of those that left as they were then
    held: tuple[Tensor, Tensor] | None = None  # positions and which are blind, of the layer's cache before this pass

    @property
    def cut(self) -> bool:
        return self.whole is not None or self.held is not None

    @property
    def keys(self) -> tuple[Tensor, Tensor]:
        """Positions in the whole sequence of all keys of the layer, and which of them are blind. [batch, key]"""
        at, blind = self.start + self.at, self.blind
        if self.held is None:
            before = torch.arange(self.start, device=at.device).expand(len(at), -1)
            held = before, torch.zeros_like(before, dtype=torch.bool)
        else:
            held = self.held
        return torch.cat([held[0], at], dim=1), torch.cat([held[1], blind], dim=1)

    def drop(self, keep: Tensor, hidden: Tensor) -> Tensor:
        """The states of those that are kept, and of as many more as rows of one length take."""
        if self.whole is None:
            self.whole = hidden
        self.whole = self._put_back(hidden)
        n = keep.shape[1]
        most = int(keep.sum(1).max())
        place = torch.arange(n, device=keep.device)
        chosen = (keep * n + (n - place)).topk(most, dim=1).indices.sort(dim=1).values
        self.blind = (self.blind | ~keep).gather(1, chosen)
        self.at = self.at.gather(1, chosen)
        return hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[2]))

    def _put_back(self, hidden: Tensor) -> Tensor:
        assert self.whole is not None
        at = self.at[..., None].expand_as(hidden)
        new = torch.where(self.blind[..., None], self.whole.gather(1, at), hidden)
        return self.whole.scatter(1, at, new)


@dataclass(eq=False)
class Dropping:
    """Follows the tokens of one stack through its layers."""

    editors: list[Any]
    blocks: dict[nn.Module, tuple[nn.Module, int]]  # to the attention module of each, and its layer
    left: Left | None = None  # of the pass that runs
    cache: Any = None
    layers: dict[int, Left] = field(default_factory=dict)  # of each layer, as it ran last

    def before(
        self, site: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A layer is about to run: what it is to be given."""
        if site.layer not in (layer for _, layer in self.blocks.values()):
            raise UnreachableAttention(f"{site}: tokens cannot leave layers that are one module, run several times")
        names = arguments(type(module).forward)[1:]
        given = dict(zip(names, args)) | kwargs
        name = next(iter(given)) if args else "hidden_states"
        hidden = given[name]
        self.cache = cache = next((found for value in given.values() if (found := caches.of(value)) is not None), None)
        if site.layer == min(layer for _, layer in self.blocks.values()):
            self.layers.clear()
            at = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
            start = 0 if cache is None else int(cache.get_seq_length())
            self.left = Left(start, hidden.shape[1], at, torch.zeros_like(at, dtype=torch.bool))
        left = self.left
        assert left is not None
        for thing in self.editors:
            keep = thing.keeps(site, hidden, left.start + left.at)
            if keep is not None and not bool((_checked(thing, keep, hidden, site) | left.blind).all()):
                hidden = left.drop(keep & ~left.blind, hidden)
        held = _layer(cache, self._index(module))
        left.held = (held.positions, held.blind) if isinstance(held, Shortened) else None
        self.layers[site.layer] = here = Left(left.start, left.n, left.at, left.blind, left.whole, left.held)
        if not here.cut:
            return args, kwargs
        _refuse(held, site)
        given = {**given, **_cut(here, [n for n in names if n != name], given, site), name: hidden}
        return tuple(given[n] for n in list(given)[: len(args)]), {n: given[n] for n in list(given)[len(args) :]}

    def after(self, site: Any, module: nn.Module, output: Any) -> Any:
        """A layer has run: its cache holds what came to it, and the last one gives all tokens on."""
        here = self.layers[site.layer]
        if not here.cut:
            return output
        if (layer := _layer(self.cache, self._index(module))) is not None:
            _refuse(layer, site)
            layer.__class__ = Shortened
            (layer.positions, layer.blind), layer.length = here.keys, here.start + here.n
        if here.whole is None or site.layer != max(layer for _, layer in self.blocks.values()):
            return output
        states = output[0] if isinstance(output, tuple) else output
        states = here._put_back(states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _index(self, module: nn.Module) -> int:
        """The number of a layer in caches."""
        attention, layer = self.blocks[module]
        return int(getattr(attention, "layer_idx", layer))


def _layer(cache: Any, index: int) -> Any:
    layers = getattr(cache, "layers", ())
    return layers[index] if index < len(layers) else None


def _refuse(layer: Any, site: Any) -> None:
    """UnreachableAttention where a layer of a cache counts on all tokens."""
    if layer is not None and type(layer) not in (DynamicLayer, Shortened):
        raise UnreachableAttention(
            f"{site}: tokens cannot leave a {type(layer).__name__}, only a cache that grows with the sequence, a "
            f"DynamicCache without sliding windows; or run with use_cache=False"
        )


def _checked(thing: Any, keep: Tensor, hidden: Tensor, site: Any) -> Tensor:
    if keep.dtype != torch.bool or keep.shape != hidden.shape[:2]:
        raise TypeError(
            f"{thing!r}.keeps must return a boolean tensor {list(hidden.shape[:2])}, not {keep.dtype} "
            f"{list(keep.shape)}"
        )
    if not bool(keep[:, -1].all()):
        raise ValueError(f"{thing!r} drops the last token of a row at {site}, from which the next one is told")
    return keep


def _cut(left: Left, names: Sequence[str], given: Mapping[str, Any], site: Any) -> dict[str, Any]:
    """What belongs to the tokens of a pass, of those that are left."""
    for name in names if left.at.shape[1] != left.n else ():
        value = given.get(name)
        tensors = value if isinstance(value, (tuple, list)) else [value]
        if name not in _CUT and any(isinstance(t, Tensor) and left.n in t.shape[:3] for t in tensors):
            raise UnreachableAttention(f"{site} is given {name!r} for every token, which cannot be cut: keep them all")
    mask = _mask(left, given.get("attention_mask"), site)
    found: dict[str, Any] = {"attention_mask": mask} if mask is not None or "attention_mask" in given else {}
    for name, dim in (("position_ids", -1), ("position_embeddings", -2)):
        if given.get(name) is not None:
            found[name] = _taken(given[name], left, dim)
    return found


def _taken(value: Any, left: Left, dim: int) -> Any:
    """Of numbers for every token of a pass along `dim`, or several of these, those of the tokens that are left."""
    if isinstance(value, (tuple, list)):
        return type(value)(_taken(part, left, dim) for part in value)
    at = left.at if dim == -1 else left.at[..., None]
    shape = (*value.shape[: value.ndim + dim - 1], len(at), left.n, *value.shape[value.ndim + dim + 1 :])
    value = value.expand(shape)
    return value.gather(dim, at.expand(*shape[: value.ndim + dim], left.at.shape[1], *shape[value.ndim + dim + 1 :]))


def _mask(left: Left, mask: Any, site: Any) -> Any:
    """Rows of the tokens that are left, columns of the keys that the layer holds, and nothing sees the blind."""
    keys, blind = left.keys
    if mask is None:
        if not bool(blind.any()):
            return None
        query = left.start + left.at
        seen = keys[:, None] <= query[:, :, None]
        return (seen & (~blind[:, None] | (keys[:, None] == query[:, :, None])))[:, None]
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise UnreachableAttention(
            f"{site} is given a mask of another form than [batch, 1, query, key]: keep all tokens"
        )
    mask = mask.expand(len(keys), -1, -1, -1)
    if mask.shape[2] > 1 or left.n == 1:
        rows = left.at[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        mask = mask.gather(2, rows)
    mask = mask.gather(3, keys[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
    if not bool(blind.any()):
        return mask
    query = (left.start + left.at)[:, None, :, None]
    hidden_keys = blind[:, None, None] & (keys[:, None, None] != query)
    return (
        mask & ~hidden_keys if mask.dtype == torch.bool else mask.masked_fill(hidden_keys, torch.finfo(mask.dtype).min)
    )
