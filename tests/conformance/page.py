"""The page of supported architectures, from the table of a run."""

from __future__ import annotations

import platform
import re
import textwrap
from collections import Counter

import torch
import transformers

from .judge import Verdict

_HEAD = """# Architectures

<!-- Written by `make conformance`; do not edit. -->

What Regard records of each architecture in transformers' registry: a run of `python -m tests.conformance` with
transformers {transformers}, torch {torch} and Python {python}.

| state | architectures | |
|---|---|---|
| exact | {exact} | statistics agree with the model's own attention maps |
| refused | {refused} | `record` raises an error that says why |
| no attention | {none} | there are no weights over keys to see: convolutions, state-space models |
| not constructible | {impossible} | no tiny model could be made and run here, for the reason given |

Each name is a `model_type` of a configuration; parts of a model that have a configuration of their own count too.
For each one, the run shrinks the configuration (two layers or one of each kind, narrow, few experts and words; the
ratios of heads to key heads stay), makes a random model with eager attention, and runs it without Regard and under
`record`. It then compares, within 1e-5: the output; every map that transformers' own eager functions return or the
model reports, with the weights, entropy, received mass and largest weight of the call; and the labelled recording with
the calls. Attention outside transformers' interface is compared with what softmax gave in the run without Regard.
Models that can run with `sdpa` do so once more: the weights must be the same, but for rounding on the way there.

What a tiny random model in one pass does not show: caches and padding (`tests/core/test_exact.py`
does, on sixteen families), and paths that only some inputs take.
"""


_NO_PATH = re.compile(r"'/\S*")  # nor where the packages of one machine lie


def page(verdicts: list[Verdict]) -> str:
    counts = Counter(v.state for v in verdicts)
    parts = [
        _HEAD.format(
            transformers=transformers.__version__,
            torch=torch.__version__.partition("+")[0],
            python=".".join(platform.python_version_tuple()[:2]),
            exact=counts["exact"],
            refused=counts["refused"],
            none=counts["no attention"],
            impossible=counts["not constructible"],
        )
    ]
    exact = [v for v in verdicts if v.state == "exact"]
    parts.append("## Exact\n\n" + _names(exact))
    named = [v for v in exact if v.not_softmax]
    parts.append(
        "### Exact but for layers without weights\n\n"
        "Linear attention, state-space layers, short convolutions and attention to sampled points have no weights\n"
        "over keys. The recording names them in `attrs['not_softmax']`.\n\n"
        + _table(("architecture", "for example"), [(v.architecture, v.not_softmax[0]) for v in named])
    )
    if partly := [v for v in exact if v.refused]:
        parts.append(
            "### Exact but for stacks that are refused\n\n"
            "The recording lacks them; `attrs['refused']` says why, and so does a warning.\n\n"
            + _table(("architecture", "stack"), [(v.architecture, v.refused[0]) for v in partly])
        )
    pictures = [v for v in exact if v.places]
    parts.append(
        "### Places of patches\n\n"
        "Given pictures that are neither square nor of the configuration's size, these say which row and column each\n"
        "patch is in. One patch is painted; of the tokens of the first layer, the one with its place changes most.\n\n"
        + _names([v for v in pictures if v.places == "rows and columns"])
        + "\nThese do not:\n\n"
        + _table(
            ("architecture", "because"),
            [(v.architecture, v.places) for v in pictures if v.places != "rows and columns"],
        )
    )
    remarks = [(v.architecture, remark) for v in exact if (remark := _remark(v))]
    parts.append("### Remarks\n\n" + _table(("architecture", "remark"), remarks))
    for state, title in (("refused", "Refused"), ("not constructible", "Not constructible")):
        rows = [(v.architecture, _NO_PATH.sub("'...", v.detail)) for v in verdicts if v.state == state]
        parts.append(f"## {title}\n\n" + _table(("architecture", "reason"), rows))
    parts.append("## No attention\n\n" + _names([v for v in verdicts if v.state == "no attention"]))
    return "\n".join(parts)


def _remark(verdict: Verdict) -> str:
    if verdict.inconsistent:
        return "not compared with sdpa: without Regard too, the model then gives another output"
    if verdict.unverified:
        return f"no map of the model's own to compare with in {verdict.unverified[0]}: checked by its output only"
    if verdict.others:
        return f"what it gives as {' and '.join(verdict.others)} is not all whole maps; the recording has those"
    return ""


def _names(verdicts: list[Verdict]) -> str:
    return textwrap.fill(", ".join(f"`{v.architecture}`" for v in verdicts), 120, break_on_hyphens=False) + "\n"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| `{name}` | `` {_short(text)} `` |" for name, text in rows]) + "\n"


def _short(text: str) -> str:
    text = text.replace("|", "/").replace("`", "'")
    return text if len(text) <= 150 else f"{text[:147]}..."
