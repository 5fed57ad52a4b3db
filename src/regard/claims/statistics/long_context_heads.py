"""The reader copies from afar: are the heads that reach back foreseen, and can the others do without?

Half of the texts repeat a segment of 96 random tokens, which the reader copies; the others are plain sentences. Keys
more than 32 back are distant. Moments of keys come from other texts of this kind. What the criterion costs is seen in
the copying: with all heads free; with heads kept to local keys where the criterion says so; where the oracle does; at
all queries of the heads that look afar least on the other texts, as many as the criterion spares (static); at random.

Planted heads: Gaussian keys that turn with their position, 8192 of them, 1024 local; queries look near, or at what keys
hold wherever they are, or both, more or less.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ... import zoo
from ...call import Call, Site
from ...catalog import Finding
from ...data.prompts.copying import FILLER
from ...seam import intervene
from ...statistics.long_context_heads import (
    THRESHOLD,
    Judged,
    KeepLocal,
    distant_mass,
    foreseen_mass,
    judge,
    key_moments,
    long_context_heads,
    moments_of,
    restrict,
)

SCALES = "small", "large"
SEGMENT, COPIES, N_SINK, WINDOW = 96, 6, 16, 32
KNOBS = {"n_sink": N_SINK, "window": WINDOW}
TEXTS = {"small": 8, "large": 32}
SITE = Site("planted", "language_model", 0, causal=True)

PLANTED, DISTINCT = (8192, 1024), 16  # keys, and how many are local; dimensions for place, and as many for content

EXPECTED = (
    "the criterion calls at least 80% of the needy heads (recall over head and query), and at least 60% of all local; "
    "copying with these kept local is at most 0.05 below copying with all heads free, and better than with as many "
    "heads chosen once for all; of planted heads 90% of the needy ones are called, and half of the visits are spared"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Needy heads are foreseen from local keys; the others can do without distant ones."""
    model, tokenizer = zoo.load("reader")
    texts, others = (_texts(tokenizer, TEXTS[scale], (seed, part)) for part in (0, 1))
    moments = key_moments(model, {"input_ids": others}, n_sink=N_SINK)
    found = long_context_heads(model, {"input_ids": texts}, moments=moments, **KNOBS)
    judged = judge(found, dim=model.config.head_dim)
    before = long_context_heads(model, {"input_ids": others}, moments=moments, **KNOBS)["distant"]
    far = before.isel(query=slice(N_SINK + WINDOW, None)).mean(["batch", "query"])
    kept = far.values >= np.quantile(far.values, 1 - judged.called)  # [layer, head]
    generator = torch.Generator().manual_seed(seed)

    def oracle(call: Call) -> Tensor | None:
        mass = distant_mass(call, **KNOBS)
        return None if mass is None else mass > 1 - THRESHOLD

    def static(call: Call) -> Tensor:
        whole = torch.from_numpy(kept[call.site.layer])
        return whole[None, :, None].expand(call.query.shape[:3])

    def chance(call: Call) -> Tensor:
        return torch.rand(call.query.shape[:3], generator=generator) < judged.called

    planted, sure = _planted(seed)
    repeated = texts[: len(texts) // 2]
    rules = {
        "all heads free": nullcontext(),
        "oracle": intervene(model, _Restricted(oracle)),
        "foreseen": intervene(model, KeepLocal(**KNOBS, moments=moments)),
        "static": intervene(model, _Restricted(static)),
        "at random": intervene(model, _Restricted(chance)),
    }
    copied = {}
    for name, rule in rules.items():
        with torch.inference_mode(), rule:
            guesses = model(repeated).logits[:, SEGMENT + 1 : -1].argmax(-1)
        copied[name] = float((guesses == repeated[:, SEGMENT + 2 :]).double().mean())

    if copied["all heads free"] < 0.5:
        holds = None
    else:
        holds = (
            judged.recall >= 0.8
            and judged.called <= 0.4
            and copied["foreseen"] >= copied["all heads free"] - 0.05
            and copied["foreseen"] > copied["static"]
            and sure.recall >= 0.9
            and sure.saved >= 0.5
        )
    shares = ", ".join(f"{share:.2f} {name}" for name, share in copied.items())
    measured = (
        f"recall {judged.recall:.2f}, precision {judged.precision:.2f}; {judged.needy:.0%} of heads and queries are "
        f"needy, {judged.called:.0%} were called so; {judged.saved:.0%} of the visits to keys spared. "
        f"Share copied rightly: {shares}. Planted heads: {sure.needy:.0%} needy, recall {sure.recall:.2f}, precision "
        f"{sure.precision:.2f}, {sure.saved:.0%} of the visits spared."
    )
    return Finding(holds, measured, EXPECTED, seed, draw=partial(_draw, found, planted, copied))


class _Restricted:
    """An intervention: local keys only, but where `rule` says otherwise."""

    def __init__(self, rule: Callable[[Call], Tensor | None]) -> None:
        self.rule = rule

    def inputs(self, call: Call) -> Call:
        whole = self.rule(call)
        return call if whole is None else restrict(call, whole, **KNOBS)


def _planted(seed: int) -> tuple[xr.Dataset, Judged]:
    """Heads whose keys are Gaussian in what they hold and turn with their place, one query each at the end."""
    n, window = PLANTED
    generator = torch.Generator().manual_seed(seed)
    rate = 10000.0 ** -torch.linspace(0, 1, DISTINCT // 2)
    angle = torch.arange(n)[:, None] * rate
    place = torch.cat([angle.cos(), angle.sin()], dim=1)
    calls = []
    for _ in range(2):  # moments come from the second
        content = torch.randn(1, 32, n, DISTINCT, generator=generator)
        near, far = (most * torch.rand(32, 1, generator=generator) for most in (6.0, 3.0))
        direction = torch.nn.functional.normalize(torch.randn(32, DISTINCT, generator=generator), dim=-1)
        query = torch.cat([near * place[-1], far * direction], dim=-1)[None, :, None]
        key = torch.cat([place.expand(1, 32, -1, -1), content], dim=-1)
        calls.append(Call(SITE, query, key, key, 1.0, query_start=n - 1))
    moments = {(SITE.stack, SITE.layer): moments_of(calls[1], n_sink=N_SINK)}
    knobs = {"n_sink": N_SINK, "window": window}
    dims = ("batch", "head", "query")
    found = xr.Dataset(
        {
            "distant": (dims, distant_mass(calls[0], **knobs).numpy()),
            "foreseen": (dims, foreseen_mass(calls[0], moments=moments, **knobs).numpy()),
        },
        coords={"query": [n - 1]},
        attrs=knobs,
    )
    return found, judge(found, dim=2 * DISTINCT)


def _texts(tokenizer: Any, n: int, seed: tuple[int, int]) -> Tensor:
    """A segment over and over, and plain sentences, half of each. [text, token]"""
    rng = np.random.default_rng(seed)
    length = SEGMENT * COPIES
    repeated = [np.tile(rng.integers(2, len(tokenizer), SEGMENT), COPIES).tolist() for _ in range(n // 2)]
    sentences = ("".join(rng.choice(FILLER, length // 8)) for _ in range(n - n // 2))
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in sentences]
    return torch.tensor([[tokenizer.bos_token_id, *body] for body in repeated + plain])


def _draw(found: xr.Dataset, planted: xr.Dataset, copied: dict[str, float], figure: Any) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.2, 1, 0.9])
    late = found.isel(query=slice(N_SINK + WINDOW, None))
    truth, seen = late["distant"].values.ravel(), late["foreseen"].values.ravel()
    counted = left.hexbin(truth, seen, gridsize=40, bins="log", cmap="viridis", extent=(0, 1, 0, 1))
    middle.plot(planted["distant"].values.ravel(), planted["foreseen"].values.ravel(), "o", markersize=4)
    for axes in (left, middle):
        for draw in (axes.axvline, axes.axhline):
            draw(1 - THRESHOLD, color="red", linewidth=0.8)
    middle.set(xlabel="mass on distant keys", title="Planted heads", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    left.set(xlabel="mass on distant keys", ylabel="foreseen from local keys", title="The reader (needy: right of red)")
    figure.colorbar(counted, ax=left, label="number")
    right.barh(list(copied)[::-1], list(copied.values())[::-1], color="grey")
    right.set(xlabel="copied rightly", xlim=(0, 1), title=f"Copying from {SEGMENT} tokens back")
