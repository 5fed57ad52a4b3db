"""What several claims measure: means with their standard errors, processor time and the peak of memory."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Mean(NamedTuple):
    """A mean and its standard error; `f"{mean:.2f}"` gives `0.31 ± 0.02`. For paired data, that of the differences."""

    value: float
    error: float

    def above(self, bar: float = 0.0) -> bool:
        """By two standard errors or more."""
        return self.value - bar >= 2 * self.error and self.value > bar

    def below(self, bar: float = 0.0) -> bool:
        return bar - self.value >= 2 * self.error and self.value < bar

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} ± {self.error:{spec.replace('+', '')}}"


def mean(values: Any) -> Mean:
    """Of numbers in any sequence, array or tensor; the error is that of independent draws, NaN of a single one."""
    every = torch.as_tensor(values, dtype=torch.float64).flatten()
    return Mean(float(every.mean()), float(every.std() / len(every) ** 0.5) if len(every) > 1 else math.nan)


def failed(asked: Mapping[str, bool]) -> str:
    """The end of a sentence that says what of what was asked did not come out; empty where all did.

    asked: what there is to say where it did not, and whether it did.
    """
    lacking = [what for what, met in asked.items() if not met]
    return f"; what fails: {', and '.join(lacking)}" if lacking else ""


def seconds(*ways: Callable[[], Any], least: int = 3) -> list[float]:
    """Processor seconds of each way: the least of several runs, taken in turn, after one that does not count."""
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(least + 1):
        for run, kept in zip(ways, times, strict=True):
            began = time.process_time()
            run()
            if turn:
                kept.append(time.process_time() - began)
    return [min(t) for t in times]


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes of tensors made while this runs that were alive at once, its result among them."""
    with _Alive() as alive:
        run()
    return alive.peak


def exponent(lengths: Sequence[float], costs: Sequence[float]) -> float:
    """The power of length that the costs follow: slope of the line through their logarithms."""
    x, y = ([math.log(v) for v in values] for values in (lengths, costs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def grown(
    ways: Mapping[str, Callable[..., Any]], lengths: Sequence[int]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Processor seconds of each operator, of one head of 64 over each length, and the power of length they follow."""
    inputs = [torch.randn(1, 1, n, 64) for n in lengths]
    times = {
        name: [seconds(lambda x=x, way=way: way(x, x, x), least=2)[0] for x in inputs] for name, way in ways.items()
    }
    return times, {name: exponent(lengths, each) for name, each in times.items()}


def beside(
    figure: Any, shares: Mapping[str, Mean], lengths: Sequence[int], times: Mapping[str, list[float]], **of: str
):
    """Draw bars of shares, labelled by `of`, beside what `grown` measured."""
    left, other = figure.subplots(1, 2)
    left.bar([name.replace(" ", "\n") for name in shares], [share.value for share in shares.values()])
    left.set(ylim=(0, 1), **of)
    series = {name: (lengths, [t * 1e3 for t in each]) for name, each in times.items()}
    lines(other, series, xlabel="tokens", ylabel="milliseconds", title="Forward pass, one head of 64")


def lines(axes: Any, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], **labels: str) -> None:
    """Draw each series, what was measured over length, on logarithmic axes whose marks are the lengths."""
    for name, (lengths, measured) in series.items():
        axes.loglog(lengths, measured, "o-", label=name)
    marks = sorted({n for lengths, _ in series.values() for n in lengths})
    axes.set_xticks(marks, [f"{n / 1024:g}k" for n in marks])
    axes.minorticks_off()
    axes.grid(alpha=0.2)
    axes.set(**labels)
    axes.legend()


class _Alive(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
