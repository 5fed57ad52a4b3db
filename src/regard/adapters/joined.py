"""Attention that a module computes in pieces (a band, global tokens), joined to one row of weights for each query.

Each family has a file of its own, which says where in the whole its pieces belong. What softmax gave while the module
runs, and what some of its parts took and gave, is kept for it. The joined weights must give the module's own output.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import hooks
from ..call import Unreadable
from ..functions import bound
from .interface import TOLERANCE
from .products import SOFTMAX, Refuse, Route, Run


@dataclass
class Kept:
    """What happened in one run of a module."""

    softmaxes: list[Tensor] = field(default_factory=list)
    took: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))  # by the name of a part
    gave: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class Joined:
    """One run as a whole."""

    weights: Tensor  # [batch, head, query, key]
    value: Tensor  # [batch, head, key, dim]
    result: Tensor  # [batch, query, head, dim], as the module computed it
    put: Callable[..., Any]  # what the module gives with another result, and with others of `then`
    appended: int = 0  # the last keys are so many tokens of the model's own
    compared: tuple[Tensor, Tensor] | None = None  # what follows from the weights, and what the module computed
    then: tuple[Joined, ...] = ()  # further maps of the module, over the same positions


class Family(Protocol):
    """How the modules of a family are joined."""

    @property
    def parts(self) -> tuple[str, ...]: ...

    def join(self, module: Any, kept: Kept, given: dict[str, Any], output: Any) -> Joined: ...


def joined(family: Family, route: Route, refuse: Refuse) -> Run:
    """How to run a module of this family."""

    def run(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if why := getattr(family, "refused", lambda _: "")(module):
            refuse(module, Unreadable(why))
            return forward(*args, **kwargs)
        with _keeping(module, family.parts) as kept:
            output = forward(*args, **kwargs)
        try:
            whole = family.join(module, kept, bound(module, args, kwargs), output)
            _compare(module, whole)
        except Unreadable as error:
            refuse(module, error)
            return output
        wholes = (whole, *whole.then)
        results = [_routed(route, module, one, again=bool(i)) for i, one in enumerate(wholes)]
        same = all(result is one.result for result, one in zip(results, wholes))
        return output if same else whole.put(*results)

    return run


def _routed(route: Route, module: nn.Module, whole: Joined, again: bool) -> Tensor:
    """What the sessions make of its result."""
    value, weights = whole.value, whole.weights

    def own(module: nn.Module, q: Tensor, k: Tensor, new: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return (whole.result if new is value else (weights @ new).transpose(1, 2)), None

    unknown = torch.full_like(weights[..., :1], float("nan"))
    keys = torch.full_like(value[..., :1], float("nan"))
    dropout = getattr(module, "attention_dropout", getattr(module, "dropout", 0.0))
    given = {
        "weights": weights,
        "dropout": float(dropout) if module.training and not callable(dropout) else 0.0,
        "appended": whole.appended,
        "again": again,
        "checked": bool(whole.compared),
    }
    return route("own", own, module, unknown, keys, value, **given)[0]


def _compare(module: nn.Module, whole: Joined) -> None:
    """Raise where the module's output does not follow from the weights, if that is for the adapter to say."""
    if whole.compared is None or module.training:
        return
    ours, theirs = whole.compared
    limit = TOLERANCE[theirs.dtype] * float(theirs.detach().abs().amax()) + 1e-30
    if not torch.allclose(ours, theirs, rtol=0.0, atol=limit, equal_nan=True):
        raise Unreadable(f"{type(module).__name__} computes something else than follows from its weights as read")


def laid(rows: Tensor, first: Tensor, n: int) -> Tensor:
    """Pieces of rows [..., query, piece] in rows of `n` keys, each from its key `first` [..., query] on."""
    index = first[..., None] + torch.arange(rows.shape[-1], device=rows.device)
    return rows.new_zeros(*rows.shape[:-1], n).scatter(-1, index.expand(rows.shape), rows)


class _Softmaxes(TorchFunctionMode):
    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in SOFTMAX:
            self.kept.append(result)
        return result


@contextmanager
def _keeping(module: nn.Module, parts: tuple[str, ...]) -> Iterator[Kept]:
    kept = Kept()

    def keep(name: str, part: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        kept.took[name].append(args[0])
        kept.gave[name].append(output)

    with ExitStack() as undo, _Softmaxes(kept.softmaxes):
        for name in parts:
            hooks.attach(undo, module.get_submodule(name).register_forward_hook, partial(keep, name))
        yield kept
