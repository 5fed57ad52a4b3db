"""What a mechanism with weights of its own declares: how it is built, and what it takes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from ._layers import SelfAttention
from ._mechanism import PATTERNS

TAKES = {
    "hidden": "hidden [batch, token, dim]",
    "heads": "query, key and value, each [batch, head, token, dim]",
    "map": "a feature map [batch, channel, row, column]",
}
ALSO = ("causal", "shape")  # what a forward is told beside its input where it names it

Class = TypeVar("Class", bound=type[nn.Module])


@dataclass(frozen=True)
class ModuleSpec:
    """What a module does, what it takes, and how it is built; it gives the shape that it takes (of heads, the output).

    build: makes one from those that it names of dim (or channels), those of its input; heads (or kv_heads); head_dim =
    dim / heads; causal; shape, (token,) or (row, column); and tokens, how many these are. loss: of a module after a
    forward pass; its mean over the layers is added to what a model is trained for. held: (n, dim, heads) -> numbers
    held at decoding after n tokens, where that is neither the state of its `step` nor keys and values of softmax
    attention.
    """

    patterns: tuple[str, ...]
    takes: str
    build: Callable[..., nn.Module]
    loss: Callable[[Any], Tensor] | None = None
    held: Callable[[int, int, int], float] | None = None

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
) -> Callable[[Class], Class]:
    """Declare a module (see `ModuleSpec`); without `build`, the class is called with what it names."""
    if not patterns or set(patterns) - set(PATTERNS) or takes not in TAKES:
        raise ValueError(f"patterns are of {PATTERNS}, takes is one of {tuple(TAKES)}; got {patterns}, {takes!r}")

    def declare(cls: Class) -> Class:
        cls.declared = ModuleSpec(patterns, takes, build or cls, loss, held)  # type: ignore[attr-defined]
        return cls

    return declare


def declared_of(cls: Any) -> ModuleSpec | None:
    """What a class itself declares, not one that it comes from."""
    found = vars(cls).get("declared") if isinstance(cls, type) else None
    return found if isinstance(found, ModuleSpec) else None


def converted(convert: Callable[..., Any], dim: int, heads: int, *, causal: bool, **knobs: Any) -> nn.Module:
    """Softmax self-attention with new weights, as `convert` makes it of a model's."""
    model = nn.Sequential(SelfAttention(dim, heads, causal=causal))
    convert(model, **knobs)
    return model[0]
