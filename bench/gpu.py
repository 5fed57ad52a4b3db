"""The cost of looking on a GPU: output and statistics together, beside PyTorch's own attention for the output alone.

    python bench/gpu.py [--lengths 2048 8192 32768 131072] [--dims 64 128]

bfloat16, 16 heads. Each line: milliseconds of `scaled_dot_product_attention` with its fastest backend, then ratios to
it of our output alone, of output and row statistics, and of these and `received`. Medians, after tuning.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from regard.call import Call, Site
from regard.kernels import Reduction, gpu

HEADS = 16
ROWS = [Reduction("entropy"), Reduction("maximum"), Reduction("distance")]
WAYS = {"output": [], "with rows": ROWS, "with received": [*ROWS, Reduction("received")]}


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median on the GPU's own clock."""
    run()
    times = []
    for _ in range(repeats):
        begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        run()
        done.record()
        done.synchronize()
        times.append(begun.elapsed_time(done))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: these programs are timed on one, and the interpreter's times mean nothing")
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load not known"
    print(f"{platform.node()}, {torch.cuda.get_device_name()}, torch {torch.__version__}, {load}")
    print(f"{'dim':>4} {'causal':>6} {'n':>7} {'sdpa ms':>9}", *(f"{way:>14}" for way in WAYS))
    for dim in options.dims:
        for causal in (True, False):
            for n in options.lengths:
                q, k, v = (torch.randn(1, HEADS, n, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
                call = Call(Site("attention", "language_model", 0), q, k, v, dim**-0.5, causal=causal)
                reason = gpu.refusal(call.operands, WAYS["with received"])
                if reason is not None:
                    sys.exit(f"the kernel cannot run here: {reason}")

                def plain(q=q, k=k, v=v, causal=causal) -> torch.Tensor:
                    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
                        return scaled_dot_product_attention(q, k, v, is_causal=causal)

                alone = milliseconds(plain, options.repeats)
                ratios = [
                    milliseconds(lambda c=call, w=wanted: gpu.forward(c.operands, w, output=True), options.repeats)
                    / alone
                    for wanted in WAYS.values()
                ]
                print(f"{dim:>4} {causal!s:>6} {n:>7} {alone:>9.3f}", *(f"{ratio:>14.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
