"""What a mechanism with weights of its own declares: how it is built, and what it takes."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..kernels import misfit
from ._layers import SelfAttention
from ._mechanism import PATTERNS, anywhere, kept

TAKES = {
    "hidden": "hidden [batch, token, dim]",
    "heads": "query, key and value, each [batch, head, token, dim]",
    "map": "a feature map [batch, channel, row, column]",
}
ALSO = ("causal", "shape")  # what a forward is told beside its input where it names it
MASKS = ("tokens", "keys", "pairs")

Class = TypeVar("Class", bound=type[nn.Module])


@dataclass(frozen=True)
class ModuleSpec:
    """What a module does, what it takes, and how it is built; it gives the shape that it takes (of heads, the output).

    build: makes one from those that it names of dim (or channels), those of its input; heads (or kv_heads); head_dim =
    dim / heads; causal; shape, (token,) or (row, column); and tokens, how many these are. loss: of a module after a
    forward pass; its mean over the layers is added to what a model is trained for. held: (n, dim, heads) -> numbers
    held at decoding after n tokens, where that is neither the state of its `step` nor keys and values of softmax
    attention. mask: in which form its forward is handed masks: of "tokens", [batch, token], of "keys", [batch, 1, 1,
    key], or of "pairs", [batch, 1 or head, query, key]; it may be called with any that says no more than that. What no
    query sees may be anything, also NaN.
    """

    patterns: tuple[str, ...]
    takes: str
    build: Callable[..., nn.Module]
    loss: Callable[[Any], Tensor] | None = None
    held: Callable[[int, int, int], float] | None = None
    mask: str = "tokens"

    def made(self, *, dim: int, heads: int, causal: bool, shape: tuple[int, ...]) -> nn.Module:
        """A new one."""
        given: dict[str, Any] = {"dim": dim, "channels": dim, "heads": heads, "kv_heads": heads, "causal": causal}
        given |= {"head_dim": dim // heads, "shape": shape, "tokens": math.prod(shape)}
        return self.build(**{name: given[name] for name in inspect.signature(self.build).parameters if name in given})


def module(
    *patterns: str,
    takes: str = "hidden",
    build: Callable[..., nn.Module] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    held: Callable[[int, int, int], float] | None = None,
    mask: str | None = None,
) -> Callable[[Class], Class]:
    """Declare a module (see `ModuleSpec`); without `build`, the class is called with what it names.

    Its inputs are then checked before it runs.
    """
    if not patterns or set(patterns) - set(PATTERNS) or takes not in TAKES:
        raise ValueError(f"patterns are of {PATTERNS}, takes is one of {tuple(TAKES)}; got {patterns}, {takes!r}")
    form = mask or ("keys" if takes == "heads" else "tokens")

    def declare(cls: Class) -> Class:
        cls.declared = ModuleSpec(patterns, takes, build or cls, loss, held, form)  # type: ignore[attr-defined]
        # Blocks on maps check theirs, of which they know more.
        return cls if takes == "map" else taking(takes, form)(cls)

    return declare


def taking(takes: str, form: str = "tokens") -> Callable[[Class], Class]:
    """Have a class check what its forward is given, by the `dim` it was made with, and hand masks on in one form."""
    if form not in MASKS:
        raise ValueError(f"a mask is of one of {MASKS}; got {form!r}")

    def check(cls: Class) -> Class:
        made, forward = cls.__init__, cls.forward
        of_init, of_forward = inspect.signature(made), inspect.signature(forward)
        names = list(of_forward.parameters)[1 : 4 if takes == "heads" else 2]
        # What stands around a model's own attention takes what that takes: masks of its kind, also without a batch.
        around = any(p.kind is p.VAR_POSITIONAL for p in of_forward.parameters.values())

        @functools.wraps(made)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            held = of_init.bind(self, *args, **kwargs).arguments
            self._takes_dim = held.get("dim", held.get("head_dim"))

        @functools.wraps(forward)
        def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
            call = of_forward.bind(self, *args, **kwargs)
            given = [call.arguments[name] for name in names]
            if problem := _problem(takes, given, getattr(self, "_takes_dim", None), around):
                raise ValueError(f"{cls.__name__}: {problem}")
            if not around and call.arguments.get("mask") is not None:
                batch, n, heads = len(given[-1]), given[-1].shape[-2], getattr(self, "heads", None)
                mask = _mask(cls.__name__, call.arguments["mask"], form, batch, n, heads)
                there = mask[..., None] if form == "tokens" else anywhere(mask).mT[:, 0]
                keys, there = (names[1:], there[:, None]) if takes == "heads" else (names, there)
                call.arguments |= {name: kept(call.arguments[name], there) for name in keys} | {"mask": mask}
            return forward(*call.args, **call.kwargs)

        cls.__init__, cls.forward = init, checked  # type: ignore[method-assign]
        return cls

    return check


def _problem(takes: str, given: list[Any], dim: int | None, around: bool) -> str | None:
    says = TAKES[takes].replace("dim]", f"dim={dim}]") if dim else TAKES[takes]
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in given):
        got = ", ".join(str(t.dtype) if isinstance(t, Tensor) else type(t).__name__ for t in given)
        return f"takes {says}, of a floating-point dtype; got {got}"
    if takes == "heads" and (problem := misfit(*given)):
        return problem
    shape, width = list(given[0].shape), given[0].shape[-1] if given[0].ndim else 0
    if takes == "hidden" and len(shape) != 3 and not (around and len(shape) == 2):
        more = {2: ": a batch of one is hidden[None]", 4: ": tokens of a feature map are map.flatten(2).mT"}
        return f"takes {says}; got {shape}{more.get(len(shape), '')}"
    if dim and width != dim and not (takes == "heads" and shape[1] * width == dim):  # of a head, or of all
        return f"takes {says}; got {shape}: make it with {width} channels, or project to {dim} before it"
    if 0 in shape and not around:
        return f"takes {says}, one or more of each; got {shape}"
    return None


def _mask(name: str, mask: Any, form: str, batch: int, n: int, heads: int | None) -> Tensor:
    """In the form that is asked for."""
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim in (2, 4):
        wide = mask if mask.ndim == 4 else mask[:, None, None]
        rows, among, queries, keys = wide.shape
        if form == "pairs" and mask.ndim == 4:
            fits = keys in (1, n) and queries in (1, n) and (heads is None or among in (1, heads))
        else:
            fits = keys == n and queries == among == 1
        if fits and rows in (1, batch):
            return wide if form != "tokens" else wide[:, 0, 0].expand(batch, n)
    pairs = f", or which pairs are visible, [batch, 1, query, key] = [{batch}, 1, {n}, {n}]" if form == "pairs" else ""
    got, way = type(mask).__name__, ""
    if isinstance(mask, Tensor):
        got = f"{mask.dtype} {list(mask.shape)}"
        way = "" if mask.dtype == torch.bool else "; mask.bool() makes one of ones and zeros"
    raise ValueError(
        f"{name}: a mask is boolean and says which tokens there are, [batch, token] = [{batch}, {n}] or [batch, 1, 1, "
        f"key]{pairs}; got {got}{way}"
    )


def declared_of(cls: Any) -> ModuleSpec | None:
    """What a class itself declares, not one that it comes from."""
    found = vars(cls).get("declared") if isinstance(cls, type) else None
    return found if isinstance(found, ModuleSpec) else None


def converted(convert: Callable[..., Any], dim: int, heads: int, *, causal: bool, **knobs: Any) -> nn.Module:
    """Softmax self-attention with new weights, as `convert` makes it of a model's."""
    model = nn.Sequential(SelfAttention(dim, heads, causal=causal))
    convert(model, **knobs)
    return model[0]
