"""Tokens that stand behind a tower's own while its layers run, and are gone from what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..call import UnreachableAttention
from ..functions import arguments
from ..hooks import attach
from . import pictures

Made = Callable[[Tensor], list[Tensor]]  # tokens to append to [batch, query, dim], each [batch, register, dim]


class Longer:
    """One stack whose first layer is given more tokens, which what comes after its last layer does not see.

    name: of the stack, for errors. blocks: its layers, in order; towers: the models whose attention is all in it.
    """

    def __init__(self, name: str, blocks: Sequence[nn.Module], towers: Sequence[nn.Module], made: Made) -> None:
        self.name, self.blocks, self.towers, self.made = name, blocks, towers, made
        self.length = self.more = 0  # of this pass

    def attach(self, undo: ExitStack) -> None:
        attach(undo, self.blocks[0].register_forward_pre_hook, self._lengthen, with_kwargs=True)
        # What was appended last, in an inner block, goes first.
        attach(undo, self.blocks[-1].register_forward_hook, self._shorten, prepend=True)
        for tower in self.towers:  # their captured states are those of the layers
            attach(undo, tower.register_forward_hook, self._shorten, prepend=True)

    def _lengthen(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        more, self.more = self.made(hidden), 0
        if not (n := sum(tokens.shape[1] for tokens in more)):
            return args, kwargs
        given = (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})
        named = arguments(type(block).forward)  # towers hand on to their layers what was meant for others
        if hidden.ndim != 3 or _sizes((args[1:], {k: v for k, v in given[1].items() if k in named})):
            raise UnreachableAttention(
                f"no tokens can be appended to {self.name}: its layers lay out what they are given, states of shape "
                f"{list(hidden.shape)}, over the picture"
            )
        others = next(pictures.tensors(given), None)
        if others is not None:
            raise UnreachableAttention(
                f"no tokens can be appended to {self.name}: its layers are also given a mask or positions, of shape "
                f"{list(others.shape)}, made for as many tokens as there were"
            )
        self.length, self.more = hidden.shape[1], n
        for tokens in more:
            pictures.here().add_registers(tokens)
        longer = torch.cat([hidden, *more], dim=1)
        return ((longer, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": longer})

    def _shorten(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._cut(output) if self.more else output

    def _cut(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            long = value.ndim == 3 and value.shape[1] == self.length + self.more
            return value[:, : self.length] if long else value
        if isinstance(value, Mapping):
            for name, part in value.items():
                if (cut := self._cut(part)) is not part:
                    value[name] = cut  # type: ignore[index]
            return value
        if type(value) in (tuple, list):
            return type(value)(self._cut(part) for part in value)
        return value


def _sizes(value: Any) -> bool:
    """Whether there are whole numbers among what is given, such as those of a grid."""
    if isinstance(value, (Mapping, list, tuple)):
        return any(map(_sizes, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, int) and not isinstance(value, bool)
