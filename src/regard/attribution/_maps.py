"""What the layers of a model say of each place of its input, and the way back from their grids to pixels."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .. import sites
from ..prediction import Prediction

PREFIX = 16  # tokens at most that stand before those of patches: class, registers


class Map(NamedTuple):
    """Activations of a layer, and the gradient of the score. Both [batch, channel, row, column] or [.., token]."""

    layer: str
    values: Tensor
    gradient: Tensor


def maps(prediction: Prediction, layers: Sequence[str] | None = None) -> list[Map]:
    """Of the modules of these names; otherwise of the last layer whose places reach the score at all.

    Of a model with attention, that is looked for among its numbered layers (the class token alone leaves the last one),
    of others among all modules that give a picture of channels.
    """
    both = [_last(prediction)] if layers is None else _slopes(prediction, layers, True)
    return [
        Map(
            name,
            placed(prediction, value.detach()),
            placed(prediction, torch.zeros_like(value) if grad is None else grad),
        )
        for name, value, grad in both
    ]


def _last(prediction: Prediction) -> tuple[str, Tensor, Tensor | None]:
    """The last layer of several places that reach the score."""
    why = ""
    for names in _candidates(prediction):
        for name, value, gradient in reversed(_slopes(prediction, names, False)):
            try:
                if gradient is not None and _reached(placed(prediction, gradient)) > 1:
                    return name, value, gradient
            except ValueError as error:
                why = f" ({str(error).partition(';')[0]})"
    kind = type(prediction.model).__name__
    raise ValueError(f"{kind} has no layer of places of {prediction.over} that reach the score{why}; name one: layers=")


def _slopes(prediction: Prediction, names: Sequence[str], named: bool) -> list[tuple[str, Tensor, Tensor | None]]:
    """What these modules give, and the gradient of the score; they are named, or some give no places."""
    outputs, score = run(prediction, prediction.given.clone().requires_grad_(), names)
    found = {name: output for name, output in outputs if named or _spreads(prediction, output)}
    for name in names if named else ():
        if name not in found:
            raise ValueError(f"{name} gives no tensor of places in this run, so there is no map of it")
    gradients = torch.autograd.grad(score.sum(), list(found.values()), allow_unused=True) if found else ()
    return [(name, value, grad) for (name, value), grad in zip(found.items(), gradients)]


def run(prediction: Prediction, given: Tensor, names: Sequence[str]) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """What the modules of these names give, in the order in which they do, and the score."""
    seen: list[tuple[str, Tensor]] = []
    modules = dict(prediction.model.named_modules())

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) and output else output
            if isinstance(output, Tensor) and output.requires_grad:
                seen.append((name, output))

        return hook

    with ExitStack() as undo:
        for name in names:
            if name not in modules:
                near = difflib.get_close_matches(name, modules, n=3)
                raise ValueError(f"no module {name!r}{f'; did you mean {chr(32).join(near)}?' if near else ''}")
            undo.callback(modules[name].register_forward_hook(keep(name)).remove)
        score = prediction.score(given)
    return seen, score


def blocks(model: nn.Module) -> list[str]:
    """Names of the numbered layers around the model's attention, in order."""
    paths = (re.match(r"(.*?\.)?\d+(?=\.)", site.name) for site in sites.find(model).values())
    return list(dict.fromkeys(path[0] for path in paths if path is not None))


def placed(prediction: Prediction, states: Tensor) -> Tensor:
    """[batch, channel, row, column] or [batch, channel, token] of what a layer gives, wherever its channels stand."""
    if states.ndim == 4 and prediction.dims == ("row", "column"):
        return states.movedim(3, 1) if _channels_last(states, prediction.shape) else states
    if states.ndim != 3:
        raise ValueError(f"a layer that gives {list(states.shape)} has no places; name another")
    return grid(prediction, states.mT)


def grid(prediction: Prediction, along: Tensor) -> Tensor:
    """What stands along tokens [..., token], in rows and columns where the tokens are patches, without class tokens."""
    n, shape = along.shape[-1], prediction.shape
    if prediction.dims[-1] == "token":
        if prediction.channel is None:  # a wave, of which a layer holds stretches
            return along
        if n != shape[-1]:
            raise ValueError(f"a layer of {n} positions says nothing of {shape[-1]} tokens; name another")
        return along
    if not prediction.sees:
        raise ValueError(
            f"a layer of {n} positions has no places in {prediction.over} {list(shape)}; use gradient_x_input or "
            f"integrated_gradients"
        )
    height, width = shape[-2:]
    for rows, columns in (*((height // a, width // b) for a, b in _patches(prediction.model)), _shaped(n, shape)):
        if 0 < rows * columns <= n <= rows * columns + PREFIX:
            return along[..., n - rows * columns :].unflatten(-1, (rows, columns))
    raise ValueError(f"{n} tokens are no grid over a picture of {height} x {width} pixels; name another layer")


def _channels_last(states: Tensor, shape: Sequence[int]) -> bool:
    """Whether the first two axes have the shape of the picture, rather than the last two."""
    first, second, third = states.shape[1:]
    wanted = math.log(shape[-2] / shape[-1])
    return abs(math.log(first / second) - wanted) < abs(math.log(second / third) - wanted)


def _patches(model: nn.Module) -> list[tuple[int, int]]:
    """Rows and columns of pixels in a patch, as the parts of the model say."""
    said = [getattr(of, "patch_size", None) for m in model.modules() for of in (getattr(m, "config", None), m)]
    both = [(size, size) if isinstance(size, int) else size for size in said]
    pairs = [(s[-2], s[-1]) for s in both if isinstance(s, (tuple, list)) and len(s) > 1]
    return [(a, b) for a, b in dict.fromkeys(pairs) if isinstance(a, int) and isinstance(b, int) and a and b]


def _shaped(n: int, shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of n places in the shape of the picture; 0 where there are none."""
    height, width = shape[-2:]
    rows = round((n * height / width) ** 0.5)
    columns = n // max(1, rows)
    return (rows, columns) if rows * columns == n and rows * width == columns * height else (0, 0)


def enlarged(prediction: Prediction, found: Tensor, mode: str = "bilinear") -> Tensor:
    """[batch, row, column] of the layer to those of pixels, stretches of a wave to samples; tokens stay as they are."""
    size = prediction.shape[1:]
    if prediction.dims != ("row", "column") and prediction.channel is not None:
        return found
    smooth: dict[str, Any] = {"mode": "bilinear" if len(size) == 2 else "linear", "align_corners": False}
    chosen: dict[str, Any] = smooth if mode == "bilinear" else {"mode": mode}
    return interpolate(found[:, None], size, **chosen)[:, 0]


def read(prediction: Prediction, stack: str) -> Tensor:
    """Share of each token of the last layer in what the score reads: even, among those it reads. [batch, token]"""
    names = [site.name for site in sites.find(prediction.model).values() if site.stack == stack]
    last = [block for block in blocks(prediction.model) if any(name.startswith(f"{block}.") for name in names)][-1:]
    seen, score = run(prediction, prediction.given.clone().requires_grad_(), last)
    if not seen:
        raise ValueError(f"what the layers of {stack} give was not found in {type(prediction.model).__name__}")
    (gradient,) = torch.autograd.grad(score.sum(), [seen[-1][1]], allow_unused=True)
    if gradient is None:
        raise ValueError(f"the score does not depend on {stack}")
    reads = (gradient != 0).any(-1)
    return reads / reads.sum(-1, keepdim=True).clamp(min=1)


def _candidates(prediction: Prediction) -> list[list[str]]:
    """The layers around attention in the part that reads what is scored; or else all modules of it."""
    model, within = prediction.model, set(prediction.within.modules())
    every = [name for name, _ in model.named_modules()]
    return [[name for name in names if model.get_submodule(name) in within] for names in (blocks(model), every)]


def _spreads(prediction: Prediction, output: Tensor) -> bool:
    if output.ndim == 4:
        return output.shape[-2] * output.shape[-1] > 1
    return output.ndim == 3 and bool(blocks(prediction.model))


def _reached(gradient: Tensor) -> int:
    return int((gradient != 0).any(1).flatten(1).sum(-1).max())
