"""What looking costs: statistics beside and inside attention, windows, gradients, whole models, decoding, the start.

    make bench                                      # everything, about 25 minutes; writes docs/benchmarks.md
    python bench/attention.py kernel --lengths 1024 4096
    python bench/attention.py decoding --write      # and writes its section of the page anew

Every time is a ratio to a peer measured in the same process, in turn, medians; peak memory is that of a process of its
own for each way. Nothing else should run meanwhile: the machine's load is printed, and it stands in the page.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

import regard
from regard import kernels
from regard.call import Call, Site
from regard.files import with_section
from regard.kernels import Reduction, native, strips

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
SHAPES = {"12 x 64": (12, 12, 64), "32 x 128, 8 kv heads": (32, 8, 128)}
MODELS = {
    "reader (bundled)": [512, 1024],
    "GPT-2-small, random": [1024, 2048],
    "Llama of 16 layers, random": [1024, 2048],
}
DECODED = [  # model, tokens before, rows
    ("GPT-2-small, random", 256, 1),
    ("GPT-2-small, random", 1024, 1),
    ("GPT-2-small, random", 8192, 1),
    ("GPT-2-small, random", 1024, 8),
    ("Llama of 16 layers, 8 kv heads, random", 1024, 1),
    ("Llama of 16 layers, 8 kv heads, random", 1024, 8),
]
EAGER_BYTES = 2e9  # of one map of all heads; eager attention with statistics holds about three
WINDOW = 256

Ways = dict[str, Callable[[], object]]


def turns(ways: Ways, seconds: float = 2.5, least: int = 3) -> dict[str, float]:
    """Median seconds of each way, taken in turn until the first has had `seconds`; slow ways take fewer turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    first = next(iter(ways))
    while len(times[first]) < least or (sum(times[first]) < seconds and len(times[first]) < 40):
        for name, run in ways.items():
            if len(times[name]) >= least and min(times[name]) > 2 * min(times[first]):
                continue
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(t) for name, t in times.items()}


def in_a_process(function: Callable[..., dict], *arguments: object) -> dict:
    """What a function of this file measures, in a fresh process."""
    command = [sys.executable, __file__, "_", function.__name__, json.dumps(arguments)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def extra_memory(run: Callable[[], object]) -> float:
    """MB by which the process's peak grows (Linux counts it in KB)."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


# ------------------------------------------------------------------------------------------------- one attention call


def kernel_ways(shape: str, n: int, causal: bool) -> Ways:
    heads, kv_heads, dim = SHAPES[shape]
    torch.manual_seed(0)
    query = torch.randn(1, heads, n, dim)
    key, value = torch.randn(1, kv_heads, n, dim), torch.randn(1, kv_heads, n, dim)
    call = Call(Site("bench", "bench", 0), query, key, value, dim**-0.5, causal=causal)
    asked = [Reduction("entropy"), Reduction("received"), Reduction("maximum")]

    def sdpa() -> object:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=heads != kv_heads)

    def eager() -> object:
        scores = query @ key.repeat_interleave(heads // kv_heads, 1).mT * dim**-0.5
        if causal:
            scores.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        weights = scores.softmax(-1)
        output = weights @ value.repeat_interleave(heads // kv_heads, 1)
        return output, torch.special.entr(weights).sum(-1), weights.sum(-2), weights.amax(-1)

    ways: Ways = {"sdpa": sdpa}
    if native.why_not() is None:
        lse = native.forward(call.operands, [Reduction("lse")])[0][Reduction("lse")]
        ways["native"] = lambda: native.forward(call.operands, asked, output=True)
        ways["statistics alone"] = lambda: native.forward(call.operands, asked)
        ways["statistics given lse"] = lambda: native.forward(call.operands, asked, lse=lse)
    ways["torch"] = lambda: (sdpa(), strips.reduce(call.operands, asked))
    if heads * n * n * 4 < EAGER_BYTES:
        ways["eager"] = eager
    return ways


@torch.inference_mode()
def kernel_times(shape: str, n: int, causal: bool) -> dict[str, float]:
    return turns(kernel_ways(shape, n, causal))


@torch.inference_mode()
def kernel_memory(shape: str, n: int, causal: bool, way: str) -> dict[str, float]:
    kernel_ways(shape, 64, causal)[way]()  # what libraries load late
    run = kernel_ways(shape, n, causal).get(way)
    return {way: extra_memory(run)} if run else {}


def kernel(lengths: list[int]) -> list[dict]:
    rows = []
    for shape, (heads, _, dim) in SHAPES.items():
        for causal in (True, False):
            for n in lengths:
                if n * n * heads * dim * (1 if causal else 2) > 2**38:  # minutes a turn
                    continue
                seconds = in_a_process(kernel_times, shape, n, causal)
                row = {"shape": shape, "causal": causal, "n": n, "seconds": seconds, "megabytes": {}}
                for way in ("sdpa", "native", "torch", "eager"):
                    row["megabytes"] |= in_a_process(kernel_memory, shape, n, causal, way)
                rows.append(row)
                said = f"{shape}, {'causal' if causal else 'full'}, {n}: sdpa {seconds['sdpa'] * 1e3:.0f} ms"
                print(said, *ratios(seconds, "sdpa"), sep="; ", flush=True)
    return rows


@torch.inference_mode()
def window_times(n: int) -> dict[str, float]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 12, n, 64) for _ in range(3))
    return turns(
        {
            "sdpa": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True),
            "window": lambda: native.attention(query, key, value, causal=True, window=WINDOW),
        }
    )


def backward_times(n: int) -> dict[str, float]:
    torch.manual_seed(0)
    leaves = [torch.randn(1, 12, n, 64, requires_grad=True) for _ in range(3)]
    grad = torch.randn(1, 12, n, 64)
    outputs = {
        "sdpa": F.scaled_dot_product_attention(*leaves, is_causal=True),
        "native": native.attention(*leaves, causal=True),
        "window": native.attention(*leaves, causal=True, window=WINDOW),
    }

    def back(output: torch.Tensor) -> object:
        return torch.autograd.grad(output, leaves, grad, retain_graph=True)

    return turns({name: lambda o=output: back(o) for name, output in outputs.items()})


def extras(lengths: list[int]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {"window": [], "backward": []}
    for n in lengths:
        seconds = in_a_process(window_times, n)
        pairs, near = n * (n + 1) / 2, WINDOW * (WINDOW + 1) / 2 + (n - WINDOW) * WINDOW
        row = {"n": n, "faster": seconds["sdpa"] / seconds["window"], "limit": pairs / near}
        print(f"window {WINDOW}, {n}: {row['faster']:.1f} x faster, operations allow {row['limit']:.1f}", flush=True)
        found["window"].append(row)
        seconds = in_a_process(backward_times, n)
        print(f"backward, {n}", *ratios(seconds, "sdpa"), sep="; ", flush=True)
        found["backward"].append({"n": n, "seconds": seconds})
    return found


# ------------------------------------------------------------------------------------------------------- whole models


def build(name: str, n: int) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    if name.startswith("reader"):
        return regard.load("reader")[0].eval()
    if name.startswith("GPT-2"):
        return transformers.GPT2Model(transformers.GPT2Config(n_positions=max(1024, n))).eval()
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8 if "8 kv" in name else 4,
        max_position_embeddings=n,
    )
    return transformers.LlamaModel(config).eval()


def model_ways(name: str, n: int) -> Ways:
    model = build(name, n)
    ids = torch.randint(0, model.config.vocab_size, (1, n))
    apart = (torch.arange(n)[:, None] - torch.arange(n)).abs().float()

    def plain() -> object:
        model.set_attn_implementation("sdpa")
        return model(ids)

    def record(**options: bool) -> None:
        model.set_attn_implementation("sdpa")
        with regard.record(model, "entropy", "received", "distance", **options):
            model(ids)

    def maps() -> None:
        model.set_attn_implementation("eager")
        for p in model(ids, output_attentions=True).attentions:
            torch.special.entr(p).sum(-1), p.sum(-2), (p * apart).sum(-1)

    return {"plain": plain, "record": record, "own output": lambda: record(own_output=True), "eager maps": maps}


@torch.inference_mode()
def model_times(name: str, n: int) -> dict[str, float]:
    return turns(model_ways(name, n), seconds=5)


@torch.inference_mode()
def model_memory(name: str, n: int, way: str) -> dict[str, float]:
    return {way: extra_memory(model_ways(name, n)[way])}


def models() -> list[dict]:
    rows = []
    for name, lengths in MODELS.items():
        for n in lengths:
            row = {"model": name, "n": n, "seconds": in_a_process(model_times, name, n), "megabytes": {}}
            for way in ("plain", "record", "eager maps"):
                row["megabytes"] |= in_a_process(model_memory, name, n, way)
            rows.append(row)
            print(f"{name}, {n}: plain {row['seconds']['plain']:.2f} s", *ratios(row["seconds"], "plain"), sep="; ")
    return rows


@torch.inference_mode()
def decoding_times(name: str, context: int, batch: int) -> dict[str, float]:
    """Seconds of a step after a context, of processor time: one of a row has no use for the second core."""
    torch.set_num_threads(1)
    model = build(name, 2 * context)
    ids = torch.randint(0, 30000, (batch, context))
    full = model(ids, use_cache=True).past_key_values
    times: dict[str, list[float]] = {"plain": [], "record": []}

    def steps(into: list[float], count: int = 20) -> None:
        cache = copy.deepcopy(full)
        for _ in range(count):
            began = time.process_time()
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            into.append(time.process_time() - began)

    for _ in range(5):
        steps(times["plain"])
        with regard.record(model, "entropy", "received"):
            steps(times["record"])
    return {way: statistics.median(t) for way, t in times.items()}


def decoding() -> list[dict]:
    rows = []
    for name, context, batch in DECODED:
        row = {
            "model": name,
            "n": context,
            "batch": batch,
            "seconds": in_a_process(decoding_times, name, context, batch),
        }
        rows.append(row)
        print(f"{name}, a step of {batch} after {context}", *ratios(row["seconds"], "plain"), sep="; ", flush=True)
    return rows


def start() -> list[dict]:
    """Processor seconds of fresh processes, medians of five in turn."""
    ways = {"torch, transformers": [sys.executable, "-c", "import torch, transformers"]}
    ways |= {"import regard": [sys.executable, "-c", "import torch, transformers, regard"]}
    ways |= {f"regard {what}": [sys.executable, "-m", "regard", *what.split()] for what in ("--help", "papers", "info")}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(6):
        for way, command in ways.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if turn:  # the first reads files from the disk
                times[way].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    base, *rest = ((way, statistics.median(t)) for way, t in times.items())
    rows = [{"what": way, "seconds": {"base": base[1], "way": seconds}} for way, seconds in rest]
    for row in rows:
        print(row["what"], *ratios(row["seconds"], "base"), sep="; ", flush=True)
    return rows


# -------------------------------------------------------------------------------------------------------- the page


def ratio(seconds: dict[str, float], way: str, base: str) -> str:
    return f"{seconds[way] / seconds[base]:.2f}" if way in seconds else "-"


def ratios(seconds: dict[str, float], base: str) -> list[str]:
    return [f"{way} {ratio(seconds, way, base)}" for way in seconds if way != base]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def kernel_page(rows: list[dict]) -> str:
    ways = ["native", "torch", "eager", "statistics alone", "statistics given lse"]
    calls = [
        [
            row["shape"],
            "causal" if row["causal"] else "full",
            f"{row['n']:,}",
            f"{row['seconds']['sdpa'] * 1e3:,.0f} ms",
            *(ratio(row["seconds"], way, "sdpa") for way in ways),
            ", ".join(f"{row['megabytes'][w]:,.0f}" if w in row["megabytes"] else "-" for w in ("sdpa", *ways[:3])),
        ]
        for row in rows
    ]
    return f"""## One attention call

PyTorch's `scaled_dot_product_attention` (*sdpa*) gives the output alone. The other columns give entropy, attention
received and the maximum too: *native* together with the output in one pass; *torch*, plain torch beside sdpa; *eager*
makes the map. The two columns of *statistics* are native without the output, from nothing or given each row's
log-sum-exp. A dash: not run, the map would be over {EAGER_BYTES / 1e9:.0f} GB.

![Time and memory against length](assets/benchmarks.svg)

{table(["heads x dim", "", "tokens", "sdpa", *ways, "MB: sdpa, native, torch, eager"], calls)}"""


def extras_page(rows: dict[str, list[dict]]) -> str:
    cells = [
        [
            f"{window['n']:,}",
            f"{window['faster']:.1f}",
            f"{window['limit']:.1f}",
            f"{window['limit'] / window['faster']:.2f}",
            ratio(backward["seconds"], "native", "sdpa"),
            ratio(backward["seconds"], "window", "sdpa"),
        ]
        for window, backward in zip(rows["window"], rows["backward"])
    ]
    return f"""## Windows and gradients

12 heads of 64, causal. How much faster a window of {WINDOW} is than causal sdpa, beside what the number of its pairs
allows; and backward passes, as ratios to that of causal sdpa.

{table(["tokens", "window: faster", "operations allow", "off by", "backward", "backward, window"], cells)}"""


def models_page(rows: list[dict]) -> str:
    cells = [
        [
            row["model"],
            f"{row['n']:,}",
            f"{row['seconds']['plain']:.2f} s",
            *(ratio(row["seconds"], way, "plain") for way in ("record", "own output", "eager maps")),
            ", ".join(f"{m:,.0f}" for m in row["megabytes"].values()),
        ]
        for row in rows
    ]
    return f"""## Whole models

Entropy, attention received and distance of every layer and head, over the plain forward pass with sdpa. *own output*:
the model's own attention runs too, and its output stays the same to the bit. *eager maps*: the same statistics from
`output_attentions=True`.

{table(["model", "tokens", "plain", "record", "own output", "eager maps", "MB: plain, record, eager"], cells)}"""


def decoding_page(rows: list[dict]) -> str:
    cells = [
        [
            row["model"],
            f"{row['n']:,}",
            str(row["batch"]),
            f"{row['seconds']['plain'] * 1e3:.0f} ms",
            ratio(row["seconds"], "record", "plain"),
        ]
        for row in rows
    ]
    return f"""## Decoding

A step of one token a row, with entropy and attention received of every layer and head, over one without; processor
time, one thread.

{table(["model", "tokens before", "rows", "plain", "record"], cells)}"""


def start_page(rows: list[dict]) -> str:
    cells = [[f"`{row['what']}`", ratio(row["seconds"], "way", "base")] for row in rows]
    return f"""## The start

Processor time of a fresh process, over one that imports torch and transformers ({rows[0]["seconds"]["base"]:.1f} s).

{table(["", "over importing both"], cells)}"""


PARTS = {
    "kernel": (kernel, kernel_page),
    "extras": (extras, extras_page),
    "models": (models, models_page),
    "decoding": (decoding, decoding_page),
    "start": (start, start_page),
}


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "regard"
    from matplotlib import pyplot

    rows = [r for r in rows if r["shape"] == "12 x 64" and r["causal"]]
    lines = {
        "sdpa": ("#757575", "PyTorch, output alone"),
        "native": ("#00897b", "native, with statistics"),
        "torch": ("#f9a825", "plain torch, with statistics"),
        "eager": ("#c62828", "eager, with statistics"),
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, what, scale in zip(axes, ("seconds", "megabytes"), (1e3, 1)):
        for way, (colour, label) in lines.items():
            points = [(r["n"], r[what][way] * scale) for r in rows if r[what].get(way, 0) > 0]
            if points:
                axis.loglog(*zip(*points), "o-", color=colour, label=label)
        axis.set_xlabel("tokens")
        axis.set_xticks([r["n"] for r in rows], [f"{r['n'] // 1024}k" for r in rows])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("milliseconds")
    axes[1].set_ylabel("peak MB beyond the inputs")
    axes[0].legend(frameon=False)
    figure.suptitle("Causal attention, 12 heads of 64, float32")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    if sys.argv[1:2] == ["_"]:
        print(json.dumps(globals()[sys.argv[2]](*json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", *PARTS], default="all")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md, or the part's section of it")
    args = parser.parse_args()
    cores = f"{platform.machine()}, {os.cpu_count()} cores"
    machine = f"{cores}, {kernels.describe()}, torch {torch.__version__}"
    for part in PARTS if args.what == "all" else [args.what]:
        measure, shown = PARTS[part]
        said = f"`python bench/attention.py {part} --write`: {machine}, load {os.getloadavg()[0]:.2f} before"
        print(said, flush=True)
        found = measure(args.lengths) if part in ("kernel", "extras") else measure()
        if args.write:  # each as soon as it is there
            title, text = shown(found).split("\n\n", 1)
            page = with_section(PAGE.read_text(encoding="utf-8"), part, f"{title}\n\n{said}.\n\n{text}")
            PAGE.write_text(page, encoding="utf-8")
            if part == "kernel":
                plot(found, PAGE.parent / "assets" / "benchmarks.svg")


if __name__ == "__main__":
    main()
