"""Attention outside transformers' AttentionInterface, brought to the seam.

Most modules need nothing of their own: while one runs, `products` follows torch's softmax to the product with the
values, or sees the call of `scaled_dot_product_attention`. What only one library does has a file here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from .. import hooks
from . import diffusers, longformer, longt5, multihead, pegasus_x, products, prophetnet, yoso
from .joined import Family, joined
from .products import Refuse, Route

Reader = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], tuple[Tensor, Tensor]]

_NAME = re.compile(r"attention|attn", re.IGNORECASE)
_COMPUTES = re.compile(
    r"softmax|scaled_dot_product_attention|multi_head_attention_forward|eager_attention_forward", re.IGNORECASE
)
# Softmax over a few sampled points, not over keys:
_OTHER = re.compile(r"deformable", re.IGNORECASE)
# Modules of transformers that attend in pieces, by their class:
_FAMILIES: dict[str, Family] = {
    "LongformerSelfAttention": longformer,
    "LEDEncoderSelfAttention": longformer,
    "LongT5LocalAttention": longt5,
    "LongT5TransientGlobalAttention": longt5,
    "PegasusXGlobalLocalAttention": pegasus_x,
    "ProphetNetNgramSelfAttention": prophetnet,
    "YosoSelfAttention": yoso,
}
_registered: dict[type[nn.Module], Reader | None] = {}


def register(kind: type[nn.Module], reader: Reader | None = None) -> None:
    """Make every module of class `kind` a site.

    Modules whose class is called attention and that call torch's softmax or `scaled_dot_product_attention` are found
    without this. Without a `reader`, the module's softmax is followed to its product with the values, and
    interventions can change values, weights and output.

    reader: `(module, args, kwargs, output) -> weights, value`, given what its forward took and gave; weights
    [batch, head, query, key], value [batch, head, key, dim]. For modules that compute weights in another way; their
    attention can be recorded, not changed.

        regard.adapters.register(MyMixer)
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"register takes a class of modules, not {kind!r}")
    _registered[kind] = reader


def attends(module: nn.Module) -> bool:
    """Whether an adapter can bring this module's attention to the seam."""
    if any(isinstance(module, kind) for kind in _registered) or isinstance(module, nn.MultiheadAttention):
        return True
    kind = type(module)
    if kind.__name__ in _FAMILIES:
        return True
    if not _NAME.search(kind.__name__) or _OTHER.search(kind.__name__):
        return False
    return _computes(kind) or diffusers.attends(module)


@contextmanager
def watch(module: nn.Module, route: Route, refuse: Refuse) -> Iterator[None]:
    """Send what this module attends to `route`, as transformers' interface would, until the block ends; and why it
    cannot be read to `refuse`.
    """
    reader = next((r for kind, r in _registered.items() if isinstance(module, kind) and r is not None), None)
    with ExitStack() as undo:
        if isinstance(module, nn.MultiheadAttention):
            undo.enter_context(multihead.no_fast_path())
        if reader is not None:
            run = products.reading(route, reader)
        elif (family := _FAMILIES.get(type(module).__name__)) is not None:
            run = joined(family, route, refuse)
        else:
            run = products.followed(route, refuse)
        hooks.wrap(undo, module, run)
        yield


@cache
def _computes(kind: type[nn.Module]) -> bool:
    """Whether a method of this class, or of one it inherits from, names a softmax, or a function around one."""
    own = [c for c in kind.__mro__ if issubclass(c, nn.Module) and c is not nn.Module]
    methods = [m for c in own for m in vars(c).values() if isinstance(m, FunctionType)]
    return any(_names_softmax(inspect.unwrap(m).__code__) for m in methods)


def _names_softmax(code: CodeType) -> bool:
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return any(_COMPUTES.search(n) for n in code.co_names) or any(_names_softmax(c) for c in inner)
