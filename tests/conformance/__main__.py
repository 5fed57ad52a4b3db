"""The command: judge architectures, each apart from the others' crashes, and print the table."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from .build import architectures
from .judge import Verdict
from .page import page
from .workers import each

FINE = ("exact", "refused", "no attention", "not constructible")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures")
    parser.add_argument("--shard", metavar="i/n", help="every n-th architecture, from the i-th (0 to n-1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the page of architectures here")
    parser.add_argument("--table", type=Path, metavar="FILE", help="judge nothing: take a table that --json wrote")
    parser.add_argument("--time-limit", type=float, default=20.0, metavar="SECONDS", help="of processor time for each")
    parser.add_argument("--quiet", action="store_true", help="print only what is not exact")
    options = parser.parse_args()

    names = options.only or architectures()
    if options.shard:
        i, n = (int(part) for part in options.shard.split("/"))
        names = names[i::n]
    began = time.perf_counter()
    verdicts = []
    judged = each(names, options.time_limit)
    if options.table:
        judged = (Verdict(**row) for row in json.loads(options.table.read_text()))
    for verdict in judged:
        verdicts.append(verdict)
        if not (options.quiet and verdict.state == "exact"):
            print(f"{verdict.architecture:34} {verdict.state:18} {line(verdict)}", flush=True)
    counts = Counter(v.state for v in verdicts)
    print(", ".join(f"{n} {state}" for state, n in counts.most_common()), f"in {time.perf_counter() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([asdict(v) for v in verdicts], indent=1) + "\n")
    if options.docs:
        options.docs.write_text(page(verdicts))
    return int(any(v.state not in FINE for v in verdicts))


def line(verdict: Verdict) -> str:
    if verdict.state == "exact":
        rest = [
            f"{n} {len(names)}: {names[0]} ..."
            for n, names in (
                ("unreached", verdict.unreached),
                ("not softmax", verdict.not_softmax),
                ("unverified", verdict.unverified),
                ("refused stacks", verdict.refused),
            )
            if names
        ]
        rest += ["the model itself differs with sdpa"] if verdict.inconsistent else []
        rest += [f"patches: {verdict.places}"] if verdict.places not in ("", "rows and columns") else []
        rest += [f"unseen in {', '.join(verdict.unseen)}"] if verdict.unseen else []
        return ", ".join([f"{verdict.calls} calls, {verdict.compared} maps compared, {verdict.fused} with sdpa", *rest])
    return verdict.detail


if __name__ == "__main__":
    sys.exit(main())
