"""The engine of linear mechanisms: a recurrence over strips of tokens that fit the cache, and its backward pass.

A step takes the state before a strip and the strip of each tensor, and gives the strip's output and the state after it.
Only states between strips are kept; the backward pass runs each step again, last strip first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.derivatives import again, gradients, transformed

State = tuple[Tensor, ...]
Step = Callable[..., tuple[Tensor | None, State]]  # (state, *strips)

STRIP = 2**17  # numbers of one tensor in a strip: with those that a step makes, they stay in the cache


def scan(step: Step, state: State, tensors: Sequence[Tensor], *, strip: int) -> tuple[Tensor | None, State]:
    """Outputs of all strips, joined, in the dtype that `step` gives them, and the last state.

    tensors: each [batch, head, token, ...]; strip: tokens taken at once. Every strip has an output, or none has.
    What the step closes over gets no gradient.
    """
    if transformed(*state, *tensors):
        return _plain(step, strip, state, tensors)
    output, *after = _Scan.apply(step, strip, len(state), *state, *tensors)  # type: ignore[misc]
    return output, tuple(after)


def tokens(like: Tensor, multiple: int = 1) -> int:
    """How many tokens of all heads of [batch, head, token, dim] make a strip: a multiple of so many."""
    batch, heads, _, dim = like.shape
    return max(1, STRIP // (batch * heads * dim) // multiple) * multiple


def _spans(n: int, strip: int) -> list[slice]:
    return [slice(a, min(a + strip, n)) for a in range(0, n, strip)]


def _take(tensors: Sequence[Tensor], where: slice) -> list[Tensor]:
    return [t[:, :, where] for t in tensors]


def _plain(step: Step, strip: int, state: State, tensors: Sequence[Tensor]) -> tuple[Tensor | None, State]:
    parts = []
    for where in _spans(tensors[0].shape[2], strip):
        part, state = step(state, *_take(tensors, where))
        parts.append(part)
    return None if parts[0] is None else torch.cat(parts, 2), state


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Step, strip: int, n_state: int, *given: Tensor) -> tuple[Tensor | None, ...]:
        state, tensors = given[:n_state], given[n_state:]
        held: list[Tensor] = []
        output, n = None, tensors[0].shape[2]
        for where in _spans(n, strip):
            held += state if any(ctx.needs_input_grad) else ()
            part, state = step(state, *_take(tensors, where))
            if part is not None:
                output = part.new_empty(*part.shape[:2], n, *part.shape[3:]) if output is None else output
                output[:, :, where] = part
        ctx.step, ctx.strip, ctx.n_state = step, strip, n_state
        ctx.save_for_backward(*given, *held)
        # A step may hand its state on as it is: an input, and no output of this function.
        return output, *(s.clone() if any(s is g for g in given) else s for s in state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *grads: Tensor):  # type: ignore[override]
        given, held = _parted(ctx.saved_tensors, len(ctx.needs_input_grad) - 3)
        state, tensors = _parted(given, ctx.n_state)
        if again(grads[0] if grad is None else grad):

            def weighed(*inputs: Tensor) -> Tensor:
                output, after = _plain(ctx.step, ctx.strip, inputs[: ctx.n_state], inputs[ctx.n_state :])
                paired = zip((output, *after), (grad, *grads), strict=True)
                return torch.stack([(o * g).sum().double() for o, g in paired if o is not None]).sum()

            return None, None, None, *gradients(weighed, torch.ones((), dtype=torch.float64), *given)
        needed = ctx.needs_input_grad[3 + ctx.n_state :]
        found = [torch.empty_like(t) if need else None for t, need in zip(tensors, needed, strict=True)]
        d_state: Sequence[Tensor] = grads
        for i, where in reversed(list(enumerate(_spans(tensors[0].shape[2], ctx.strip)))):
            before = [t.detach().requires_grad_() for t in held[i * ctx.n_state : (i + 1) * ctx.n_state]]
            strips = [t.detach().requires_grad_(n) for t, n in zip(_take(tensors, where), needed, strict=True)]
            with torch.enable_grad():
                part, after = ctx.step(tuple(before), *strips)
            ends, weights = list(after), list(d_state)
            if part is not None and grad is not None:
                ends, weights = [part, *ends], [grad[:, :, where], *weights]
            pairs = [(e, w) for e, w in zip(ends, weights, strict=True) if e.requires_grad]
            leaves = [*before, *(s for s in strips if s.requires_grad)]
            own = torch.autograd.grad([e for e, _ in pairs], leaves, [w for _, w in pairs], allow_unused=True)
            d_state = [torch.zeros_like(s) if d is None else d for s, d in zip(before, own)]
            rest = iter(own[ctx.n_state :])
            for into, need in zip(found, needed, strict=True):
                if need and into is not None:
                    part = next(rest)
                    into[:, :, where] = 0.0 if part is None else part
        return None, None, None, *d_state, *found


def _parted(tensors: Sequence[Tensor], n: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return tensors[:n], tensors[n:]


class Product:
    """Steps of causal linear attention: output_i = sum over j <= i of kept^(i - j) (query_i . key_j) value_j.

    A strip is taken in blocks: products inside each, and what the blocks before have left. rates: -log of what a head
    keeps from a token to the next, [head]; None: all. The state is one tensor, [batch, head, dim, dim].
    """

    def __init__(self, rates: Tensor | None, block: int) -> None:
        self.rates, self.block = rates, block
        self.factors: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def __call__(self, state: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        n = query.shape[2]
        whole = n // self.block * self.block
        if not 0 < whole < n:
            return self._blocks(state, query, key, value, min(n, self.block))
        first, state = self._blocks(state, *_take((query, key, value), slice(whole)), self.block)
        rest, state = self._blocks(state, *_take((query, key, value), slice(whole, n)), n - whole)
        return torch.cat([first, rest], 2), state

    def _blocks(self, state: Tensor, query: Tensor, key: Tensor, value: Tensor, size: int) -> tuple[Tensor, Tensor]:
        count = query.shape[2] // size
        query, key, value = (t.unflatten(2, (count, size)) for t in (query, key, value))
        scores = query @ key.mT
        if self.rates is None:
            scores = scores.tril()
        else:
            inside, into, out, _ = self._decays(size, count)
            scores, query, key = scores * inside, query * into, key * out
        joined = torch.cat([state[:, :, None], key.mT @ value], 2)
        states = self._carried(joined, size)
        return (scores @ value + query @ states[:, :, :-1]).flatten(2, 3), states[:, :, -1]

    def _carried(self, joined: Tensor, size: int) -> Tensor:
        """The state before each block, and after the last, of what each adds. [batch, head, block, dim, dim]"""
        if self.rates is None:
            return joined.cumsum(2)
        carry = self._decays(size, joined.shape[2] - 1)[3]
        return (carry @ joined.flatten(3)).unflatten(3, joined.shape[3:])

    def _decays(self, size: int, count: int) -> tuple[Tensor, ...]:
        """From key to query in a block, from before it to a query, from a key to its end, and from block to block."""
        if (size, count) not in self.factors:
            assert self.rates is not None
            by, at = -self.rates[:, None, None], torch.arange(size, device=self.rates.device)
            blocks = torch.arange(count + 1, device=at.device)
            self.factors[size, count] = (
                torch.exp(by * (at[:, None] - at).clamp_min(0)).tril()[:, None],
                torch.exp(by * (at[:, None] + 1))[:, None],
                torch.exp(by * (size - 1 - at[:, None]))[:, None],
                torch.exp(by * size * (blocks[:, None] - blocks).clamp_min(0)).tril(),
            )
        return self.factors[size, count]
