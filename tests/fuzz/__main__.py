"""Draw and judge cases until the time is over; print what was wrong, with what draws it again."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # families.py, oracle.py and what else all tests use

import transformers

from tests.fuzz.judge import drawn, judge

parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
parser.add_argument("--minutes", type=float, default=2.0)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--case", type=int, help="only this one")
options = parser.parse_args()

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
ends, results, wrong = time.monotonic() + 60 * options.minutes, Counter(), 0
number = options.case or 0
while wrong < 20 and (options.case is not None or time.monotonic() < ends):
    case = drawn(number, options.seed)
    try:
        results[judge(case)[:100]] += 1
    except Exception as error:
        wrong += 1
        told = traceback.format_exception(error) if options.case is not None else [f"{type(error).__name__}: {error}"]
        print(f"{case}\n  {''.join(told)[:3000]}", flush=True)
    if options.case is not None:
        break
    number += 1
print(f"seed {options.seed}: {number} cases, {wrong} wrong")
for result, times in results.most_common():
    print(f"  {times:5d} {result}")
sys.exit(bool(wrong))
