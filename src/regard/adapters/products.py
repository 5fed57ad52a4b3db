"""Attention by torch's own functions: softmax(scores) @ value, or scaled_dot_product_attention.

While a module runs, a `TorchFunctionMode` sees each function of torch that it calls. It follows what softmax gave,
through dropout, masks and changes of shape, to the product with the values. What then multiplies the values is the
weights, whatever was done to scores before and to weights after.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..call import UnreachableAttention, Unreadable
from .multihead import multi_head_attention_forward, open_forward

Route = Callable[..., tuple[Tensor, Tensor | None]]
Refuse = Callable[[nn.Module, Unreadable], None]
Run = Callable[..., Any]  # of a module, its forward, and what that is given

SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_DROPOUT = {F.dropout, torch.dropout}
# Modules of transformers that give one output for each of their maps:
_SEVERAL = {"LiltSelfAttention", "GroundingDinoBiMultiHeadAttention", "MMGroundingDinoBiMultiHeadAttention"}
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_local = threading.local()


def _running() -> list[_Mode]:
    """The modules that run in this thread, innermost last."""
    return _local.__dict__.setdefault("running", [])


@dataclass
class _Followed:
    """Weights on their way to the values."""

    used: Tensor  # as the module goes on with them
    clean: Tensor  # the same, but for dropout
    dropout: float = 0.0


class _Mode(TorchFunctionMode):
    """Sees the functions of torch that one module calls in one run."""

    def __init__(self, module: nn.Module, route: Route) -> None:
        super().__init__()
        self.module, self.route = module, route
        self.followed: list[_Followed] = []
        self.products = 0
        self.failed: TypeError | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.failed is not None:
            return func(*args, **kwargs)
        try:
            return self._see(func, args, kwargs)
        except TypeError as error:
            if not isinstance(error, Unreadable) and getattr(func, "__name__", "") not in ("__matmul__", "matmul"):
                raise
            self.failed = error  # raised after the run: of an operator, Python would take it for "not implemented"
            return func(*args, **kwargs)

    def _see(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if _running()[-1] is not self:  # a module inside this one runs, which has a mode of its own
            return func(*args, **kwargs)
        if func is multi_head_attention_forward:
            with self:
                return open_forward(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func in _PRODUCTS and (known := self._known(args[:1])):
            letters = "".join(chr(ord("A") + i) for i in range(args[0].ndim - 2))
            return self._product(func, known, args[1], (f"{letters}qk", f"{letters}kd", f"{letters}qd"))
        # Values first, as of pictures [dim, key]; not the kernel of a convolution, which is one column:
        if func in _PRODUCTS and (known := self._known(args[1:2])) and args[1].shape[-1] > 1:
            letters = "".join(chr(ord("A") + i) for i in range(args[1].ndim - 2))
            swapped = (f"{letters}kq", f"{letters}dk", f"{letters}dq")
            return self._product(lambda weights, value: func(value, weights), known, args[0], swapped)
        if func is torch.einsum and (known := self._known(_operands(args)[:1])):
            equation = args[0].replace(" ", "")
            parts = equation.replace("->", ",").split(",")
            if len(parts) == 3:
                return self._product(lambda *o: func(equation, *o), known, _operands(args)[1], parts)
        result = func(*args, **kwargs)
        if func in SOFTMAX:
            self.followed.append(_Followed(result, result))
        elif isinstance(result, Tensor) and (known := self._known(args)) and _goes_on(func, known.used, result):
            self._follow(func, known, result, args, kwargs)
        return result

    def _known(self, args: Any) -> _Followed | None:
        return next((f for f in reversed(self.followed) if any(a is f.used for a in args)), None)

    def _follow(self, func: Any, known: _Followed, result: Tensor, args: Any, kwargs: Any) -> None:
        if func in _DROPOUT:
            p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            on = kwargs.get("training", args[2] if len(args) > 2 else True)
            self.followed.append(_Followed(result, known.clean, p if on else 0.0))
        elif known.clean is known.used or result is known.used:
            self.followed.append(_Followed(result, result, known.dropout))
        else:
            clean = func(*(known.clean if a is known.used else a for a in args), **kwargs)
            self.followed.append(_Followed(result, clean, known.dropout))

    def _product(self, func: Any, known: _Followed, value: Tensor, letters: Any) -> Tensor:
        """weights @ value, by whichever function and in whichever order of axes."""
        of_weights, of_value, of_result = letters
        key = "".join((set(of_weights) & set(of_value)) - set(of_result))
        query = "".join((set(of_weights) & set(of_result)) - set(of_value))
        dim = "".join((set(of_value) & set(of_result)) - set(of_weights))
        one_each = len(key) == len(query) == len(dim) == 1
        if not one_each or "." in of_weights or known.used.ndim < 3 or value.ndim != known.used.ndim:
            raise Unreadable(
                f"{type(self.module).__name__} multiplies its weights with its values in a way that Regard does not "
                f"know: {of_weights},{of_value}->{of_result}"
            )
        both = "".join(x for x in of_weights if x not in (key, query))
        if len(both) == 3 and self._heads_before_windows(known.clean, value, of_weights.index(both[1])):
            both = both[0] + both[2] + both[1]
        weights = self._heads_apart(_ordered(known.clean, of_weights, both + query + key))
        values = self._heads_apart(_ordered(value, of_value, both + key + dim))
        again = self._once()
        if self._known((value,)):
            raise Unreadable(f"{type(self.module).__name__} multiplies one softmax with another")
        if float(weights.detach().sum(-1).amax()) > 1.01:
            raise Unreadable(
                f"{type(self.module).__name__} multiplies its values with what does not sum to 1 over keys"
            )
        back: dict[str, Any] = {}

        def own(module: nn.Module, q: Tensor, k: Tensor, new: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
            mine = value if new is values else _ordered(new.reshape(back["values"]), both + key + dim, of_value)
            result = _ordered(func(known.used, mine), of_result, both + query + dim)
            back["shape"] = result.shape
            return self._heads_apart(result).transpose(1, 2), None

        back["values"] = _ordered(value, of_value, both + key + dim).shape
        back["shape"] = (
            *_ordered(known.used, of_weights, both + query + key).shape[:-1],
            value.shape[of_value.index(dim)],
        )
        unknown = torch.full_like(weights[..., :1], float("nan"))  # query and key: the scores are all that is left
        result, _ = self.route(
            "own",
            own,
            self.module,
            unknown,
            unknown.new_full((*values.shape[:-1], 1), float("nan")),
            values,
            weights=weights,
            dropout=known.dropout,
            again=again,
        )
        return _ordered(result.transpose(1, 2).reshape(back["shape"]), both + query + dim, of_result)

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        self._once()
        mask = attn_mask if attn_mask is None or attn_mask.ndim < 3 else self._heads_apart(attn_mask)
        shape = (*query.shape[:-1], value.shape[-1])
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}

        def own(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, m: Tensor | None, **_: Any) -> tuple[Tensor, None]:
            return F.scaled_dot_product_attention(q, k, v, m, **options).transpose(1, 2), None

        result, _ = self.route(
            "sdpa",
            own,
            self.module,
            self._heads_apart(query),
            self._heads_apart(key),
            self._heads_apart(value),
            mask,
            scaling=scale,
            is_causal=is_causal,
            dropout=dropout_p,
        )
        return result.transpose(1, 2).reshape(shape)

    def _heads(self) -> int:
        config = getattr(self.module, "config", None)
        counts = (getattr(part, name, None) for part in (self.module, config) for name in _HEADS)
        return next((n for n in counts if isinstance(n, int) and n > 0), 1)

    def _heads_before_windows(self, weights: Tensor, value: Tensor, at: int) -> bool:
        """Whether axis `at` of the two is heads, and the next one windows. Where there are as many of both, heads are
        what lies next to the numbers of a head in memory, as they are of one projection."""
        heads, first, second = self._heads(), weights.shape[at], weights.shape[at + 1]
        return first == heads and (second != heads or value.stride(at) == value.shape[-1] != value.stride(at + 1))

    def _heads_apart(self, tensor: Tensor) -> Tensor:
        """[batch, head, ...] of [batch * head, ...], [batch, ...] or [batch, window, head, ...]"""
        heads, leading = self._heads(), tensor.shape[:-2]
        if len(leading) == 2:
            return tensor
        if len(leading) == 1:
            return tensor.unflatten(0, (-1, heads if leading[0] % heads == 0 else 1))
        if leading[-1] != heads:
            raise Unreadable(
                f"{type(self.module).__name__} attends in an order of axes that Regard does not know: "
                f"{list(tensor.shape)}"
            )
        return tensor.flatten(0, -4)

    def _once(self) -> bool:
        """Whether it is a further map of the module; raises where its output is put together from several."""
        self.products += 1
        if self.products > 1 and type(self.module).__name__ not in _SEVERAL:
            raise Unreadable(
                f"{type(self.module).__name__} puts its output together from several softmaxes, so no one of them is "
                f"its weights"
            )
        return self.products > 1


def followed(route: Route, refuse: Refuse) -> Run:
    """How to run a module whose softmax is followed to the values; what cannot be followed is told to `refuse`."""

    def run(module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mode, running = _Mode(module, route), _running()
        running.append(mode)
        try:
            with mode:
                output = own(*args, **kwargs)
        finally:
            running.pop()
        failed = mode.failed
        if failed is None and mode.followed and not mode.products:
            failed = Unreadable(
                f"{type(module).__name__} takes a softmax, but what becomes of it Regard cannot follow to the values"
            )
        if isinstance(failed, Unreadable):
            refuse(module, failed)
        elif failed is not None:
            raise failed
        return output

    return run


def reading(route: Route, reader: Callable[..., tuple[Tensor, Tensor]]) -> Run:
    """The same with a reader, which says afterwards what the weights were."""

    def run(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        weights, value = reader(module, args, kwargs, output)
        unknown = torch.full_like(weights[..., :1], float("nan"))
        want = weights @ value

        def own(module: nn.Module, *_: Any, **__: Any) -> tuple[Tensor, None]:
            return want.transpose(1, 2), None

        got, _ = route(
            "own", own, module, unknown, torch.full_like(value[..., :1], float("nan")), value, weights=weights
        )
        if not torch.equal(got, want.transpose(1, 2)):
            raise UnreachableAttention(f"{type(module).__name__} is read after it has run, so it cannot be changed")
        return output

    return run


def _ordered(tensor: Tensor, letters: str, wanted: str) -> Tensor:
    return tensor if letters == wanted else tensor.permute([letters.index(x) for x in wanted])


def _operands(args: Any) -> Any:
    return args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]


def _goes_on(func: Any, weights: Tensor, result: Tensor) -> bool:
    """Whether the result is still the weights: masked, dropped, cast, in another shape or without a sink's column."""
    name = getattr(func, "__name__", "")
    if not result.is_floating_point() or name.endswith("_like") or name.startswith("new_"):
        return False
    sliced = (
        name in ("__getitem__", "narrow") and result.ndim == weights.ndim and result.shape[:-1] == weights.shape[:-1]
    )
    return result.numel() == weights.numel() or sliced
