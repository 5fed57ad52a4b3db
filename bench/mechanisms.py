"""How fast each mechanism is beside PyTorch's own attention, in tokens a second, and how much memory it takes.

    python bench/mechanisms.py                     # 1k, 8k and 64k tokens; a few minutes on an idle core
    python bench/mechanisms.py --lengths 1024      # seconds
    python bench/mechanisms.py --write             # and writes its section of docs/mechanisms.md

At each length every mechanism is timed in turn with `scaled_dot_product_attention`, causal where the mechanism is, and
stands as a ratio to it; medians. A length that was measured is kept in --state and not measured again, so that a run
which was stopped goes on; --fresh forgets. Nothing else should run meanwhile: the machine's load is printed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard import kernels, mechanisms
from regard.files import with_section
from regard.mechanisms.aaren import aaren
from regard.mechanisms.aaren import cost as aaren_cost

PAGE = Path(__file__).parent.parent / "docs" / "mechanisms.md"
LENGTHS = [1024, 8192, 65536]
HEADS, DIM = 4, 64
LONG = 16384  # above, there is one head, and mechanisms of quadratic cost are not timed: their ratio stays as it is
TRAINED = 8192  # both passes are not timed above
SQUARE = 3.5  # growth of operations with twice the length, above which a cost counts as quadratic

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(causal: bool) -> Way:
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def ways() -> dict[str, tuple[Way, bool, Callable[[int], float]]]:
    """Each mechanism by name: how it runs, whether causal, and its operations for one head."""
    found: dict[str, tuple[Way, bool, Callable[[int], float]]] = {}
    for name, operator in mechanisms.operators().items():
        causal = "causal" in operator.spec.patterns
        found[name] = (
            lambda q, k, v, operator=operator, causal=causal: operator(q, k, v, causal=causal),
            causal,
            lambda n, spec=operator.spec, causal=causal: spec.cost(n, n, DIM, causal=causal).operations,
        )
    found["aaren"] = lambda q, k, v: aaren(q[:1, :, :1], k, v), True, lambda n: aaren_cost(n, DIM).operations
    del found["neighborhood"]
    neighborhood = mechanisms.operators()["neighborhood"]
    grids = {"line of 511": (1, 511), "picture, 7 x 7": (2, 7), "video, 5 x 5 x 5": (3, 5)}
    for name, (axes, window) in grids.items():
        found[f"neighborhood, {name}"] = (
            lambda q, k, v, a=axes, w=window: neighborhood(q, k, v, shape=grid(q.shape[2], a), window=w),
            False,
            lambda n, a=axes, w=window: neighborhood.spec.cost(n, n, DIM, shape=grid(n, a), window=w).operations,
        )
    return found


def grid(n: int, axes: int) -> tuple[int, ...]:
    """Sides whose product is n, as near to each other as powers of two can be."""
    power = n.bit_length() - 1
    assert n == 2**power, f"lengths are powers of two, so that they can be pictures; got {n}"
    return tuple(2 ** ((power + i) // axes) for i in range(axes))


def seconds(run: dict[str, Callable[[], Any]], enough: float) -> dict[str, float]:
    """Median seconds of each, taken in turn until that takes `enough` seconds. All have run once before."""
    times: dict[str, list[float]] = {name: [] for name in run}
    began = time.perf_counter()
    for _ in range(20):
        for name, function in run.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() - began > enough:
            break
    return {name: statistics.median(t) for name, t in times.items()}


def peak(run: Callable[[], Any]) -> float | None:
    """Megabytes that the process holds at most while this runs, beyond what it held before; None where not on Linux."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        run()
        return None

    def held(what: str) -> int:
        return int(status.read_text().split(f"{what}:")[1].split()[0])

    ctypes.CDLL(None).malloc_trim(0)  # what was freed may be reused unseen
    clear.write_text("5")
    before = held("VmRSS")
    run()
    return (held("VmHWM") - before) / 1024


def measure(n: int, backward: bool, enough: float) -> dict[str, dict[str, float | None]]:
    """Seconds and peak megabytes of each."""
    heads = HEADS if n <= LONG else 1
    leaves = [torch.randn(1, heads, n, DIM).requires_grad_(backward) for _ in range(3)]
    given = torch.randn(1, heads, n, DIM)

    def once(way: Way) -> Callable[[], Any]:
        if not backward:
            return lambda: way(*leaves)
        return lambda: torch.autograd.grad(way(*leaves), leaves, given)

    run = {"sdpa causal": once(dense(True)), "sdpa full": once(dense(False))}
    for name, (way, _, operations) in ways().items():
        if n <= LONG or operations(2 * n) / operations(n) < SQUARE:
            run[name] = once(way)
    peaks = {name: peak(function) for name, function in run.items()}
    times = seconds(run, enough)
    return {name: {"seconds": times[name], "peak": peaks[name]} for name in run}


def table(found: dict[str, Any], lengths: list[int], passes: str) -> str:
    """Ratios of tokens a second; the loss from the shortest to the longest; distance to the bound, and memory."""
    runs = {n: found[f"{passes} {n}"] for n in lengths if f"{passes} {n}" in found}
    judged = max(n for n in runs if n <= TRAINED)
    head = ["mechanism", "", *(f"{n // 1024}k" for n in runs), "slowed", f"off the bound, {judged // 1024}k"]
    lines = [head := [*head, f"MB, {judged // 1024}k"], ["---"] * len(head)]
    exact = mechanisms.operators()["memory_efficient"].spec.cost
    for name, (_, causal, operations) in sorted(ways().items()):
        peer, key = "sdpa causal" if causal else "sdpa full", name.replace("_", "-")
        ratios = [f"{r[peer]['seconds'] / r[name]['seconds']:.2f}" if name in r else "-" for r in runs.values()]
        own = {n: n * (HEADS if n <= LONG else 1) / r[name]["seconds"] for n, r in runs.items() if name in r}
        slowed = f"{own[min(own)] / own[max(own)]:.2f} at {max(own) // 1024}k"
        at = runs[judged]
        bound = at[peer]["seconds"] * operations(judged) / exact(judged, judged, DIM, causal=causal).operations
        off = f"{at[name]['seconds'] / bound:.2f}"
        lines.append([f"`{key}`", "causal" if causal else "full", *ratios, slowed, off, megabytes(at[name])])
    for name in ("sdpa causal", "sdpa full"):
        dashes = ["-"] * (len(runs) + 2)
        lines.append([f"`{name.split()[0]}`", name.split()[1], *dashes, megabytes(runs[judged][name])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def megabytes(of: dict[str, float | None]) -> str:
    return "-" if of["peak"] is None else f"{of['peak']:.0f}"


def page(found: dict[str, Any], lengths: list[int]) -> str:
    return f"""## How fast they are

`python bench/mechanisms.py --write`: {found["machine"]}.

Tokens a second over those of PyTorch's `scaled_dot_product_attention` in the same run, {HEADS} heads of {DIM}, float32,
one head above {LONG // 1024}k; above 1 is faster. *Slowed*: tokens a second of a head at the shortest length over those
at the longest one measured. *Off the bound*: time over what the number of operations allows at the speed of PyTorch's
attention; below 1 is better than that. *MB*: the most that the process held beyond its inputs, outputs among it. A
dash: not run, the cost is quadratic.

### Forward

{table(found, lengths, "forward")}

### Forward and backward

{table(found, [n for n in lengths if n <= TRAINED], "both")}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=15, help="for all mechanisms together at one length")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "regard-bench-mechanisms-2.json")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--write", action="store_true", help="write the section of docs/mechanisms.md")
    args = parser.parse_args()
    kept = json.loads(args.state.read_text()) if args.state.exists() and not args.fresh else {}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {kernels.describe()}"
    machine += f", torch {torch.__version__}, load {os.getloadavg()[0]:.2f} before"
    found = {"machine": machine, **kept}
    for n in args.lengths:
        for passes in ("forward", "both")[: 1 + (n <= TRAINED)]:
            if f"{passes} {n}" not in found:
                print(f"{passes} {n} ...", flush=True)
                found[f"{passes} {n}"] = measure(n, passes == "both", args.seconds)
                args.state.write_text(json.dumps(found, indent=1))
    text = page(found, args.lengths)
    print(text)
    if args.write:
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), "speed", text), encoding="utf-8")


if __name__ == "__main__":
    main()
