"""Where in its pictures each entry of a tensor comes from, followed from the pixels on.

While a model runs on pictures, a `TorchFunctionMode` sees each function of torch that it calls, and keeps labels beside
tensors. What moves entries moves their labels; what computes entries one by one, or along their channels, keeps them; a
convolution or a pooling lays a new grid over the picture, and so does what merges the patches of rectangles. Whatever
else forgets them. So labels say what the model did with its pixels, not what its configuration promises.

Labels are of as many axes as their tensor, with size 1 where all along an axis are alike. They are on the CPU.
"""

from __future__ import annotations

import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .. import hooks
from ..functions import bound
from .grids import (
    NONE,
    OWN,
    REGISTER,
    STATE,
    WORD,
    Grids,
    alike,
    alike_or_wide,
    both,
    known,
    narrow,
    over_heads,
    reshaped,
)

_IMAGES = ("sample", "hidden_states", "x", "inputs", "input", "images", "image")  # of models that are not transformers'
_MOST_PRODUCTS = 4
_local = threading.local()


@contextmanager
def unfollowed() -> Iterator[None]:
    """What runs in here is not the model's."""
    before, _local.off = getattr(_local, "off", False), True
    try:
        yield
    finally:
        _local.off = before


def takes(module: nn.Module) -> bool:
    """Whether a model may be given pictures."""
    names = list(inspect.signature(module.forward).parameters)
    telling = any("pixel_values" in n or n.endswith("grid_thw") or n == "flattened_patches" for n in names)
    main = getattr(module, "main_input_name", None)
    return telling or main == "inputs" or (main is None and any(n in _IMAGES for n in names))


@contextmanager
def watch(module: nn.Module) -> Iterator[None]:
    """Follow the pictures that this model is given, until the block ends."""
    with ExitStack() as undo:
        hooks.wrap(undo, module, _run)
        yield


def _run(module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return here().run(module, own, *args, **kwargs)


def here() -> Pictures:
    """What this thread's sessions share."""
    last = getattr(_local, "last", None)
    if last is None or (found := last()) is None:
        found = Pictures()
        _local.last = weakref.ref(found)
    return found


class Pictures(TorchFunctionMode):
    """Labels of tensors, from the pictures that a model is given to its attention. One thread's."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: Any = WeakTensorKeyDictionary()
        self.given: Any = WeakTensorKeyDictionary()  # of them, those of inputs of this pass
        self.grids = Grids()
        self.texts: dict[int, list[tuple[Tensor, Any]]] = {WORD: [], STATE: []}  # and its texts, with their masks
        self.around = False  # this mode is on
        self.on = False  # for a model that runs on pictures
        self.attended: Tensor | None = None  # labels of the newest attention's queries
        # The newest products of two labelled tensors: shape, and the labels of rows and of columns.
        self.products: list[tuple[torch.Size, Tensor, Tensor]] = []

    # Models that run

    def run(self, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a model, following its pictures where it has any."""
        inputs = bound(module, args, kwargs)
        if self.on:
            self._found(module, inputs)
            return own(*args, **kwargs)
        with ExitStack() as undo:
            self.on = undo.enter_context(self.following(module, inputs))
            undo.callback(setattr, self, "on", False)
            if self.around and not self.on:  # a step of decoding
                undo.enter_context(unfollowed())
            return own(*args, **kwargs)

    @contextmanager
    def following(self, module: nn.Module, inputs: Mapping[str, Any]) -> Iterator[bool]:
        """Follow what the model does with these inputs, if there are pictures among them; whether there are."""
        if not self.around:
            self.grids.count, self.texts = 0, {WORD: [], STATE: []}
            for tensor in list(self.given.keys()):  # what earlier passes were given; what they made is known
                self._set(tensor, None)
            self.given = WeakTensorKeyDictionary()
        there = self._found(module, inputs)
        if self.around or not there:
            yield there
            return
        self.around = True
        try:
            with self:
                yield True
        finally:
            self.around = False

    def _found(self, module: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Label the pictures and texts among the inputs; whether there are pictures, or what was made of some."""
        there = any(tensor in self.labels for tensor in tensors(inputs))
        for name, value in inputs.items():
            parts = value if isinstance(value, (list, tuple)) else [value]
            if "mask" in name or not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
                continue
            for part in parts:
                if part not in self.labels and (labels := self._source(module, name, part, inputs)) is not None:
                    self.labels[part], self.given[part], there = labels, True, True
        foreign = not hasattr(module, "main_input_name")
        for name, kind in (("input_ids", WORD), *[("encoder_hidden_states", STATE)] * foreign):
            given = inputs.get(name)
            if there and isinstance(given, Tensor) and given.ndim > 1 and given not in self.labels:
                start, shape = kind + sum(math.prod(text.shape[:2]) for text, _ in self.texts[kind]), given.shape[:2]
                labels = torch.arange(start, start + math.prod(shape), device="cpu").reshape(shape)
                self.labels[given] = labels if given.ndim == 2 else labels[..., None]
                self.given[given] = True
                self.texts[kind].append((given, inputs.get("attention_mask")))
        return there

    def _source(self, module: nn.Module, name: str, given: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        """Labels of a picture's pixels, or of patches whose places other arguments tell."""
        try:
            return self._labelled(module, name, given, inputs)
        except (RuntimeError, ValueError, IndexError, TypeError):  # arguments that are not what they are called
            return None

    def _labelled(self, module: nn.Module, name: str, given: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        foreign = not hasattr(module, "main_input_name") and name in _IMAGES
        if given.ndim <= 3:
            return self._patches(module, name, given, inputs)
        if not ("pixel_values" in name or foreign or (name == getattr(module, "main_input_name", "") == "inputs")):
            return None
        *leading, channels, rows, columns = given.shape
        if columns <= 4 < channels:  # channels come last
            return None
        video = "video" in name or (len(leading) == 2 and hasattr(getattr(module, "config", None), "num_frames"))
        if len(leading) == 2 and foreign:  # diffusers: [batch, channel, frame, row, column]
            leading, channels, video = [leading[0], channels], 1, True
            grid = self.grids.new(leading[0], leading[1], rows, columns, True)
            return self.grids.cells(grid).reshape(leading[0], 1, leading[1], rows, columns)
        frames = leading[-1] if video and len(leading) == 2 else 1
        grid = self.grids.new(math.prod(leading) // frames, frames, rows, columns, frames > 1)
        return self.grids.cells(grid).reshape(*leading, 1, rows, columns)

    def _patches(self, module: nn.Module, name: str, given: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        if name == "flattened_patches" and given.ndim == 3:  # their first numbers are row and column, from 1 on
            at = given[..., :2].detach().cpu().long() - 1
            rows, columns = (int(n) + 1 for n in at.flatten(0, 1).amax(0))
            grid = self.grids.new(len(given), 1, rows, columns, False)
            found = (
                self.grids.cells(grid)
                .reshape(len(given), -1)
                .gather(1, (at[..., 0] * columns + at[..., 1]).clamp_min(0))
            )
            return found.where((at >= 0).all(-1), NONE)[..., None]
        video = "video" in name
        names = ("video_grid_thw",) if video else ("image_grid_thw", "grid_thw", "image_grid_hw", "spatial_shapes")
        if "pixel_values" in name or name == "hidden_states":
            sizes = next((s for n in names if isinstance(s := inputs.get(n), Tensor) and s.ndim == 2), None)
            if sizes is not None:
                return self._packed(module, given, sizes.tolist(), video)
        ids = inputs.get("img_ids")  # of diffusers' Flux and its kin: frame, row and column of each token
        if name == "hidden_states" and isinstance(ids, Tensor) and ids.shape[-1] >= 3 and given.ndim == 3:
            at = (ids[0] if ids.ndim == 3 else ids).detach().cpu().long()[:, -2:]
            rows, columns = (int(n) + 1 for n in at.amax(0)) if len(at) == given.shape[1] else (0, 0)
            if rows * columns == len(at) and len(at.unique(dim=0)) == len(at):
                grid = self.grids.new(len(given), 1, rows, columns, False)
                return self.grids.cells(grid).reshape(len(given), -1)[:, at[:, 0] * columns + at[:, 1], None]
        return None

    def _packed(self, module: nn.Module, given: Tensor, sizes: list[list[int]], video: bool) -> Tensor | None:
        """Of patches laid end to end, picture by picture, those of each square that is merged later together."""
        sides: list[Any] = [getattr(m, "spatial_merge_size", None) for m in module.modules()]
        side = next((int(n) for n in sides if n), 1)
        found = []
        for size in sizes:
            frames, rows, columns = size if len(size) == 3 else (1, *size)
            if rows % side or columns % side:
                side = 1
            grid = self.grids.new(1, frames, rows, columns, video)
            blocks = self.grids.cells(grid).reshape(frames, rows // side, side, columns // side, side)
            found.append(blocks.transpose(2, 3).reshape(-1))
        if given.ndim == 3 and len(given) == len(sizes):  # each picture's in a row of its own, and padding
            wide = given.shape[1]
            rows_ = [torch.cat([f[:wide], f.new_full((max(0, wide - len(f)),), NONE)]) for f in found]
            return torch.stack(rows_)[..., None]
        labels = torch.cat(found)
        if len(given) == len(labels):
            return labels.reshape(-1, *[1] * (given.ndim - 1))
        return labels[None, :, None] if given.ndim == 3 and given.shape[:2] == (1, len(labels)) else None

    def add_registers(self, tokens: Tensor) -> None:
        """These are about to be appended to what a layer is given."""
        if self.on:
            self._set(tokens, torch.full((1,) * tokens.ndim, REGISTER, device="cpu"))

    # What attention asks

    def of(self, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Labels [batch, query] and [batch, key] of [batch, head, ..., dim]; None where none is known."""
        return self._positions(query), self._positions(key)

    def of_product(self, batch: int, heads: int, n: int, n_key: int) -> tuple[Tensor | None, Tensor | None]:
        """The same of the newest scores of this shape."""
        for shape, rows, columns in reversed(self.products):
            if shape[-2:] == (n, n_key) and math.prod(shape) == batch * heads * n * n_key:
                one, two = (over_heads(f, shape[:-2], batch, heads) for f in (rows, columns))
                return None if one is None else known(one), None if two is None else known(two)
        return None, None

    def gave(self, output: Tensor | None) -> None:
        """The newest attention's output [batch, query, head, dim] is of its queries."""
        queries, self.attended = self.attended, None
        if self.on and queries is not None and output is not None and queries.shape == output.shape[:2]:
            self._set(output, queries[..., None, None])

    def _positions(self, tensor: Tensor) -> Tensor | None:
        labels = self.labels.get(tensor)
        if labels is None or labels.ndim != 4:
            return None
        labels = alike(alike(labels, 1), 3)
        return known(labels[:, 0, :, 0].expand(tensor.shape[0], tensor.shape[2]))

    # Functions that run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if getattr(_local, "off", False):
            return result
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of a property
            name = getattr(func.__self__, "__name__", "")
        elif name.endswith("_") and not name.endswith("__"):
            name = name[:-1]
        if (rule := _RULES.get(name)) is not None:
            try:
                rule(self, func, result, args, kwargs)
            except (RuntimeError, ValueError, IndexError, TypeError):  # called in a way that is not known here
                for one in result if isinstance(result, (tuple, list)) else [result]:
                    self._set(one, None)
        elif isinstance(result, Tensor) and args and result is args[0] and result in self.labels:
            del self.labels[result]  # changed in place, and not known how
        return result

    def _set(self, tensor: Any, labels: Tensor | None) -> None:
        if not isinstance(tensor, Tensor):
            return
        if labels is not None and labels.ndim == tensor.ndim and known(labels) is not None:
            self.labels[tensor] = labels
        elif tensor in self.labels:
            del self.labels[tensor]

    def _get(self, tensor: Any) -> Tensor | None:
        """Labels of a tensor; a parameter is the model's own."""
        if not isinstance(tensor, Tensor):
            return None
        labels = self.labels.get(tensor)
        if labels is None and isinstance(tensor, nn.Parameter) and tensor.ndim:
            return torch.full((1,) * tensor.ndim, OWN, device="cpu")
        return labels

    def _entrywise(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if not isinstance(result, Tensor) or not any(t in self.labels for t in tensors):
            return
        labelled = [(t, self._get(t)) for t in tensors if t.ndim]
        labels = None
        for _, own in labelled:
            if own is not None:
                own = own.reshape((1,) * (result.ndim - own.ndim) + own.shape)
                labels = own if labels is None or labels is own else both(labels, own)
        unknown = any(own is None and t.ndim > 1 for t, own in labelled)
        if labels is not None and unknown:  # what else went into it may be anything
            labels = labels.masked_fill(labels == OWN, NONE) if bool((labels == OWN).all()) else labels
        self._set(result, labels)

    def _same(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        """Of the first argument, entry by entry."""
        given = args[0] if args else kwargs.get("input")
        if isinstance(result, Tensor) and isinstance(given, Tensor) and result.shape == given.shape:
            self._set(result, self._get(given))

    def _linear(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        """Along the last axis, everything with everything."""
        labels = self._get(args[0] if args else kwargs["input"])
        self._set(result, None if labels is None else self.grids.hull(labels, -1))

    def _normed(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        """Along the last axes."""
        labels = self._get(args[0] if args else kwargs["input"])
        shape = args[1] if len(args) > 1 else kwargs.get("normalized_shape", (0,))
        if labels is not None:
            for i in range(len(shape)):
                labels = self.grids.hull(labels, -1 - i)
            self._set(result, labels)
        else:
            self._set(result, None)

    def _product(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        a, b = args[-2:] if len(args) > 1 else (args[0], kwargs.get("other", kwargs.get("mat2")))
        if not isinstance(result, Tensor) or not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return
        if b not in self.labels and (isinstance(b, nn.Parameter) or b.ndim == 2):  # a linear map
            if a in self.labels:
                self._set(result, self.grids.hull(self.labels[a], -1))
            return
        rows, columns = self.labels.get(a), self.labels.get(b)
        if rows is None or columns is None or a.ndim != b.ndim or a.ndim < 3:
            return
        rows, columns = alike(rows, -1)[..., 0], alike(columns, -2)[..., 0, :]
        self._scores(result.shape, rows, columns)

    def _einsum(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        parts = args[0].replace(" ", "").replace("->", ",").split(",") if isinstance(args[0], str) else []
        labels = [self.labels.get(o) for o in operands]
        if len(parts) != 3 or "." in args[0] or any(own is None for own in labels):
            return
        (first, second, out), n = parts, []
        for letters, own in zip((first, second), labels):
            for letter in [letter for letter in letters if letter not in out]:
                own = alike(own, letters.index(letter))
            kept = [letter for letter in letters if letter in out]
            own = own.reshape([s for letter, s in zip(letters, own.shape) if letter in out])
            order = [kept.index(letter) for letter in out if letter in kept]
            shape = iter(own.permute(order).shape)
            n.append(own.permute(order).reshape([next(shape) if letter in kept else 1 for letter in out]))
        if out[-2] in first and out[-2] not in second and out[-1] in second and out[-1] not in first:
            self._scores(result.shape, n[0][..., 0], n[1][..., 0, :])

    def _scores(self, shape: torch.Size, rows: Tensor, columns: Tensor) -> None:
        self.products = [*self.products[1 - _MOST_PRODUCTS :], (shape, rows, columns)]

    def _reduced(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        given, dims = args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs.get("dim")
        labels = self.labels.get(given)
        values = result if isinstance(result, Tensor) else result[0]
        if labels is None or dims is None or isinstance(dims, Tensor):
            return
        dims = sorted({d % given.ndim for d in (dims if isinstance(dims, (tuple, list)) else [dims])}, reverse=True)
        for dim in dims:
            labels = self.grids.hull(labels, dim)
            if values.ndim < given.ndim:
                labels = labels.squeeze(dim)
        self._set(values, labels)

    def _moved(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        """By the function itself, on labels of the same axes."""
        labels = self._get(args[0])
        if labels is not None:
            self._set(result, func(labels, *args[1:], **kwargs))

    def _reshaped(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        given = args[0]
        labels = self._get(given) if isinstance(given, Tensor) and isinstance(result, Tensor) else None
        if labels is None or not result.numel():
            return
        self._set(result, reshaped(labels, given.shape, result.shape))

    def _expanded(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        labels = self._get(args[0])
        if labels is not None:
            self._set(result, labels.reshape((1,) * (result.ndim - labels.ndim) + labels.shape))

    def _repeated(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        given, labels = args[0], self._get(args[0])
        if labels is None:
            return
        more = (1,) * (result.ndim - given.ndim)
        times = [n // old for n, old in zip(result.shape, more + given.shape)]
        labels = labels.reshape(more + labels.shape)
        self._set(result, labels.repeat([1 if n == 1 else t for t, n in zip(times, labels.shape)]))

    def _joined(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        tensors = args[0] if args else kwargs.get("tensors", ())
        name = func.__name__
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        tensors = [t for t in tensors if t.ndim and t.numel()]
        if not any(self._get(t) is not None for t in tensors):
            return
        every = [self._get(t) for t in tensors]
        every = [torch.full((1,) * t.ndim, NONE) if own is None else own for t, own in zip(tensors, every)]
        if name == "stack":
            dim %= result.ndim
            every, sizes = [own.unsqueeze(dim) for own in every], [1] * len(tensors)
        else:
            dim %= result.ndim
            sizes = [t.shape[dim] for t in tensors]
        if all(own.shape[dim] == 1 and torch.equal(own, every[0]) for own in every):
            self._set(result, every[0])
            return
        shape = list(torch.broadcast_shapes(*(o.shape[:dim] + o.shape[dim + 1 :] for o in every)))
        wide = [o.expand(*shape[:dim], n, *shape[dim:]) for o, n in zip(every, sizes)]
        self._set(result, torch.cat(wide, dim))

    def _parted(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        labels = self._get(args[0])
        if labels is None:
            return
        if func is F.unfold:
            self._set(result, self._windows(labels, args[0], *args[1:], **kwargs))
            return
        options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        rest = [_on_cpu(a) for a in args[1:]]
        parts = func(labels.expand(args[0].shape), *rest, **options)
        if isinstance(result, Tensor):
            self._set(result, narrow(parts))
            return
        for one, own in zip(result, parts):
            self._set(one, narrow(own))

    def _windows(self, labels: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Labels of squares of [batch, channel, row, column], each one column of what is given on."""
        if given.ndim != 4:
            return torch.full((1, 1), NONE)
        cells = self.grids.hull(labels, 1).expand(len(given), 1, *given.shape[2:])
        columns = F.unfold((cells + 1).double(), *args, **kwargs).long() - 1  # what is padded is 0
        return self.grids.hull(columns, 1)

    def _padded(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        given, pad = args[0], args[1] if len(args) > 1 else kwargs["pad"]
        mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
        if (labels := self._get(given)) is None or mode != "constant":
            return
        for i in range(0, len(pad), 2):
            axis = given.ndim - 1 - i // 2
            if pad[i] or pad[i + 1]:
                labels = labels.expand(*labels.shape[:axis], given.shape[axis], *labels.shape[axis + 1 :])
        pad = [0 if labels.shape[labels.ndim - 1 - i // 2] == 1 else p for i, p in enumerate(pad)]
        self._set(result, F.pad(labels, pad, value=NONE))

    def _chosen(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        """By a condition, from one or the other."""
        if len(args) < 3:
            return
        condition, a, b = args[:3] if func.__name__ == "where" and args[0].dtype == torch.bool else (
            args[1], args[0], args[2]
        )  # fmt: skip
        either = [self._get(t) for t in (a, b)]
        if not any(isinstance(t, Tensor) and t in self.labels for t in (a, b)):
            return
        one, two = (
            torch.full((1,) * result.ndim, NONE)
            if own is None
            else own.reshape((1,) * (result.ndim - own.ndim) + own.shape)
            for own in either
        )
        where = condition.detach().cpu()
        where = alike_or_wide(where.reshape((1,) * (result.ndim - where.ndim) + where.shape))
        found = torch.where(where, one, two)
        other = torch.where(where, two, one)
        cell = (other >= 0) & (other < WORD) & ((found == OWN) | (found == NONE))
        self._set(result, torch.where(cell, other, found))  # a mask token stands where the patch stood

    def _scattered(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        given, mask, source = (*args, *kwargs.values())[:3]
        into, what = self._get(given), self._get(source)
        if into is None and what is None:
            return
        into = torch.full((1,) * given.ndim, NONE) if into is None else into
        what = torch.full((1,) * source.ndim, NONE) if what is None else what
        mask = mask.detach().cpu().expand(given.shape)
        rows = bool((mask == mask[..., :1]).all()) and source.shape[-1] == given.shape[-1]
        if rows and into.shape[-1] == what.shape[-1] == 1:
            into = into.expand(*given.shape[:-1], 1).clone()
            self._set(result, into.masked_scatter_(mask[..., :1], what.expand(*source.shape[:-1], 1).contiguous()))
            return
        into = into.expand(given.shape).clone()
        self._set(result, narrow(into.masked_scatter_(mask, what.expand(source.shape).contiguous())))

    def _written(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        given, index, value = args[:3]
        into, what = self._get(given), self._get(value)
        if into is None and what is None:
            return
        into = torch.full((1,) * given.ndim, NONE) if into is None else into
        into = into.expand(given.shape).clone()
        into[_on_cpu(index)] = NONE if what is None else what.expand(value.shape)
        self._set(given, narrow(into))

    def _embedded(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        ids = args[0] if args else kwargs["input"]
        if (labels := self.labels.get(ids)) is not None:
            self._set(result, labels[..., None])

    def _convolved(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        """Also pooled, and resized: another grid over the same picture."""
        given = args[0] if args else kwargs["input"]
        values = result if isinstance(result, Tensor) else result[0]
        labels = self._get(given)
        if labels is None:
            return
        axes = next((int(n) for n in "123" if f"{n}d" in func.__name__), given.ndim - 2)
        if given.ndim == axes + 1:  # without a batch
            labels, shape, out = labels[None], given.shape, values.shape
        else:
            labels, shape, out = labels, given.shape[1:], values.shape[1:]
        labels = narrow(self.grids.hull(labels, 1), views=False)
        if all(n == 1 for n in out[1:]):
            merged = self.grids.hull(labels.expand(*labels.shape[:2], *shape[1:]).flatten(2), -1)
            labels = merged.reshape(*labels.shape[:2], *[1] * axes)
        elif out[1:] != shape[1:] and any(n > 1 for n in labels.shape[2:]):
            labels, size = labels.expand(*labels.shape[:2], *shape[1:]), tuple(out[1:])
            # What was padded is no part of the picture: squares of it keep no place.
            ways = [self.grids.laid, self.grids.squares][:: 1 if bool((labels != NONE).all()) else -1]
            labels = next((found for way in ways if (found := way(labels, size)) is not None), None)
        if labels is not None and given.ndim == axes + 1:
            labels = labels[0]
        self._set(values, labels)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(part)


def _on_cpu(index: Any) -> Any:
    if isinstance(index, Tensor):
        return index.detach().cpu()
    return type(index)(_on_cpu(i) for i in index) if type(index) in (tuple, list) else index


# fmt: off
_BINARY = "add sub subtract mul multiply div divide true_divide pow maximum minimum floor_divide fmod remainder"
_NAMES: dict[Callable[..., None], str] = {
    Pictures._entrywise: f"""{_BINARY} lerp addcmul addcdiv rsub __add__ __sub__ __mul__ __truediv__ __div__ __pow__
        __radd__ __rsub__ __rmul__ __rtruediv__ __rdiv__ __rpow__ __iadd__ __isub__ __imul__ __itruediv__ __idiv__""",
    Pictures._same: """neg __neg__ __pos__ abs exp log sqrt rsqrt square sin cos tanh sigmoid erf round real copysign
        gelu relu relu6 silu elu selu celu mish leaky_relu rrelu hardswish hardsigmoid hardtanh softplus logsigmoid
        clamp clip clamp_min clamp_max nan_to_num masked_fill batch_norm group_norm instance_norm
        dropout alpha_dropout feature_dropout dropout1d dropout2d dropout3d to type type_as float double half bfloat16
        cpu cuda contiguous clone detach alias requires_grad data""",
    Pictures._linear: "linear",
    Pictures._normed: "layer_norm rms_norm",
    Pictures._product: "matmul __matmul__ mm bmm baddbmm addmm",
    Pictures._einsum: "einsum",
    Pictures._reduced: """mean sum prod amax amin max min norm var std logsumexp median vector_norm
        linalg_vector_norm""",
    Pictures._moved: """permute transpose swapaxes swapdims movedim moveaxis mT T t adjoint flip fliplr flipud roll
        rot90""",
    Pictures._reshaped: "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel",
    Pictures._expanded: "expand expand_as broadcast_to",
    Pictures._repeated: "repeat tile",
    Pictures._joined: "cat concat concatenate stack",
    Pictures._parted: """__getitem__ split split_with_sizes chunk tensor_split unbind unsafe_chunk unsafe_split narrow
        select index_select gather take_along_dim masked_select unfold repeat_interleave pixel_shuffle
        pixel_unshuffle""",
    Pictures._padded: "pad",
    Pictures._chosen: "where",
    Pictures._scattered: "masked_scatter",
    Pictures._written: "__setitem__",
    Pictures._embedded: "embedding",
    Pictures._convolved: """conv1d conv2d conv3d conv_transpose2d conv_transpose3d avg_pool1d avg_pool2d avg_pool3d
        max_pool2d max_pool3d _max_pool2d _max_pool3d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d
        interpolate upsample""",
}
# fmt: on
_RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
