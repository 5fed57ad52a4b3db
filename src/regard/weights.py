"""The attention weights of one call, without the map: exact reductions, and rows when asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from . import kernels
from .kernels import Chosen, Operands, Reduction
from .tokens import Tokens

DENSE_BUDGET = 2**30  # bytes that `dense` may take unless told otherwise
_SIDES = {"mass": "key", "received": "query"}  # which positions a reduction's set is of


class Weights:
    """Lazy attention weights [batch, head, query, key] of a call.

    Every method is exact: equal to the same reduction of the dense softmax map to float32 rounding. Rows with every
    key masked hold what the model itself used: zeros behind a boolean mask, equal weights behind a finite additive one.

    A query *sees* a key where mask, bias and causal order leave the key weight. What is added to scores hides a key by
    what it leaves, whatever number it is: were all scores of a row alike, the weight of a hidden key would lie below
    the smallest normal float32 (e^-87 of the row's largest). A row whose every score is lowered by so much is padding,
    and sees nothing.
    """

    def __init__(
        self,
        operands: Operands,
        tokens: Tokens | None = None,
        query_tokens: Tokens | None = None,
        where: object = "a call",  # as it is called in errors
    ) -> None:
        self._operands, self._where = operands, where
        self._tokens = {"key": tokens, "query": query_tokens}
        self._done: dict[Reduction, Tensor] = {}
        self.expected: set[Reduction] = set()  # computed along with the first reduction that is asked for
        self.asked: set[Reduction] = set()

    def _reduce(self, name: str, knob: str | int | Chosen | None = None) -> Tensor:
        wanted = Reduction(name, knob)
        self.asked.add(wanted)
        if wanted not in self._done:
            asked = {r: self._resolved(r) for r in {wanted} | (self.expected - self._done.keys())}
            self._keep(asked, kernels.reduce(self._operands, asked.values()))
        return self._done[wanted].clone()  # one statistic may change it in place, and others ask for it too

    def _keep(self, asked: dict[Reduction, Reduction], found: dict[Reduction, Tensor]) -> None:
        self._done |= {r: found[resolved] for r, resolved in asked.items() if resolved in found}

    def _resolved(self, wanted: Reduction) -> Reduction:
        """The same with a set of positions in place of the role that names it."""
        if not isinstance(wanted.knob, str):
            return wanted
        axis = _SIDES[wanted.name]
        return Reduction(wanted.name, Chosen(self._positions(wanted.knob, axis)))

    def _positions(self, role: str, axis: str) -> Tensor:
        """Which have this role. [batch, key or query] boolean"""
        tokens = self._tokens[axis]
        if tokens is None:
            raise ValueError(
                f"role {role!r} asked of {self._where}, but what its tokens are is not known; "
                f"pass a boolean tensor [batch, {axis}] instead"
            )
        return tokens.role(role)

    def entropy(self) -> Tensor:
        """-sum p log p over keys, nats; 0 where a row looks at one key only. [batch, head, query]"""
        return self._reduce("entropy")

    def received(self, by: str | Tensor | None = None) -> Tensor:
        """Sum of the weights on each key over queries, or over the queries of one role. [batch, head, key]

        by: a role of `call.query_tokens`, "real" for all but padding, or a boolean tensor [batch, query].
        """
        return self._reduce("received", self._knob(by, "query"))

    def mass(self, keys: str | Tensor) -> Tensor:
        """Summed weight on a set of keys, 0 to 1. [batch, head, query]

        keys: a role of `call.tokens`, or a boolean tensor [batch, key].
        """
        return self._reduce("mass", self._knob(keys, "key"))

    def applied(self, values: Tensor) -> Tensor:
        """weights @ values: what is linear in a row, of any heads' own values, in one pass. [batch, head, query, n]

        values: [batch|1, head|1, key, n]. In float32, or wider where the call is.
        """
        return kernels.applied(self._operands, values)

    def distance(self, clip: int | None = None) -> Tensor:
        """Expected |query position - key position|, tokens; above `clip` it counts as `clip`. [batch, head, query]"""
        return self._reduce("distance", clip)

    def maximum(self) -> Tensor:
        """Largest weight of each row, 0 to 1. [batch, head, query]"""
        return self._reduce("maximum")

    def squares(self) -> Tensor:
        """Sum of the squared weights of each row, 0 to 1; 1 / n for n keys alike. [batch, head, query]"""
        return self._reduce("squares")

    def visible(self, keys: str | Tensor | None = None) -> Tensor:
        """How many keys, or keys of a set as in `mass`, each query sees (see `Weights`). [batch, head, query]

        0 for padding that sees nothing, also where a finite mask left it equal weights. A module that an adapter reads
        does not say what it masked: there a key is hidden where its weight is 0, and in float16, whose weights may
        round to 0, none is.
        """
        chosen = self._knob(keys, "key")
        if isinstance(chosen, str):
            chosen = Chosen(self._positions(chosen, "key"))
        return kernels.visible(self._operands, chosen).expand(self._operands.query.shape[:3])

    def seen(self, a: int, b: int) -> Tensor:
        """Which keys the queries a to b see, as `visible` counts them. [batch|1, head|1, b-a, key]"""
        return kernels.seen(self._operands, a, b)

    def at(self, keys: Tensor) -> Tensor:
        """Weight on one key a row; `keys` [batch|1, query] counts this call's keys, -1 gives 0. [batch, head, query]"""
        return self._reduce("at", Chosen(keys))

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest weights of each row, descending, and their positions (-1: none). [batch, head, query, k]"""
        if k < 1:
            raise ValueError(f"top(k={k}): k counts keys, so it is 1 or more")
        return self._reduce("top_weights", k), self._reduce("top_keys", k)

    def rows(self, a: int, b: int) -> Tensor:
        """Dense weights of queries a to b. [batch, head, b-a, key]"""
        return kernels.rows(self._operands, a, b)

    def strips(self) -> Iterator[tuple[range, Tensor]]:
        """All rows, a few at a time: which queries, and their dense weights. [batch, head, rows, key]

        One more pass than the reductions; memory does not grow with the map.
        """
        for rows in self.spans():
            yield rows, self.rows(rows.start, rows.stop)

    def spans(self) -> Iterator[range]:
        """The queries of each strip, so many that what is made for one strip stays small beside the map."""
        return (range(a, b) for a, b in kernels.spans(self._operands))

    def dense(self, budget: int = DENSE_BUDGET) -> Tensor:
        """All weights. [batch, head, query, key]; refuses above `budget` bytes."""
        batch, head, query, _ = self._operands.query.shape
        row = batch * head * self._operands.key.shape[2] * 4
        if row * query > budget:
            raise ValueError(
                f"dense weights of {self._where} take {row * query / 1e6:,.0f} MB, over the budget of "
                f"{budget / 1e6:,.0f} MB; rows(a, b) of at most {budget // row} queries fit, or raise `budget`"
            )
        return self.rows(0, query)

    def output(self) -> Tensor:
        """weights @ value, [batch, head, query, dim]; expected reductions are computed along with it where they can."""
        asked = {r: self._resolved(r) for r in self.expected - self._done.keys()}
        output, found = kernels.with_output(self._operands, asked.values())
        self._keep(asked, found)
        return output

    def _knob(self, chosen: str | Tensor | None, axis: str) -> str | Chosen | None:
        if chosen is None or isinstance(chosen, str):
            return chosen
        n = self._operands.query.shape[2] if axis == "query" else self._operands.key.shape[2]
        if chosen.dtype != torch.bool or chosen.shape[-1] != n or chosen.ndim > 2:
            raise ValueError(
                f"a set of {axis} positions is a role or a boolean tensor [batch, {axis}={n}]; "
                f"got {chosen.dtype} {list(chosen.shape)}"
            )
        return Chosen(chosen.reshape(-1, n))


def union(sets: Iterable[set[Reduction]]) -> set[Reduction]:
    """What may be asked again of another call: boolean tensors belong to the call that they were made for."""
    return {r for s in sets for r in s if not isinstance(r.knob, Chosen)}
