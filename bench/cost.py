"""The cost of looking, beside the plain forward pass and beside eager attention's maps, in one run.

    python bench/cost.py [--lengths 512 1024 2048] [--repeats 3]

A random GPT-2-small. Each line: seconds of the plain forward pass (sdpa), then ratios to it, and the peak memory that
each way took beyond the model. Statistics: entropy, received, distance. Medians; each way runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

PROGRAM = """
import json, resource, statistics, sys, time
import torch, transformers, regard
way, n, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
config = transformers.GPT2Config(n_positions=max(1024, n), attn_implementation="eager" if way == "eager" else "sdpa")
model = transformers.GPT2Model(config).eval()
ids = torch.randint(0, 50000, (1, n))
apart = (torch.arange(n)[:, None] - torch.arange(n)).abs().float()

def plain():
    model(ids)

def record():
    with regard.record(model, "entropy", "received", "distance"):
        model(ids)

def eager():
    for p in model(ids, output_attentions=True).attentions:
        torch.special.entr(p).sum(-1), p.sum(-2), (p * apart).sum(-1)

run = {"plain": plain, "record": record, "eager": eager}[way]
with torch.inference_mode():
    model(ids[:, :32])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": statistics.median(times), "megabytes": (after - before) / 1024}))
"""


def measure(way: str, n: int, repeats: int) -> dict[str, float]:
    command = [sys.executable, "-c", PROGRAM, way, str(n), str(repeats)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.2f}, {os.cpu_count()} cores")
    print(f"{'tokens':>7} {'plain':>9} {'record':>8} {'eager':>8}   peak MB: plain, record, eager")
    for n in args.lengths:
        plain, record, eager = (measure(way, n, args.repeats) for way in ("plain", "record", "eager"))
        ratios = [way["seconds"] / plain["seconds"] for way in (record, eager)]
        memory = ", ".join(f"{way['megabytes']:,.0f}" for way in (plain, record, eager))
        print(f"{n:>7} {plain['seconds']:>7.2f} s {ratios[0]:>7.2f}x {ratios[1]:>7.2f}x   {memory}")


if __name__ == "__main__":
    main()
