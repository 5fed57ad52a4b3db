"""One drawn case: played without Regard in float64, played under record, compared call by call."""

from __future__ import annotations

import random
import traceback
import warnings
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import EAGER_ONLY, FAMILIES, made
from oracle import dense, eager_maps, reductions
from torch import Tensor, nn
from ways import is_clean

import regard

from .models import MIXED, MORE
from .plans import PLANS, TEXT, Plan, Played

ALL = {**FAMILIES, **MORE}
STATISTICS = ("rows", "entropy", "received", "distance")
FLOAT32 = {"gpt_oss", "qwen3_next", *MIXED}  # their experts multiply in nothing longer
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}


@dataclass(frozen=True)
class Case:
    number: int
    family: str
    implementation: str
    plan: Plan
    dtype: torch.dtype
    own_output: bool
    nested: bool
    seed: int

    def __str__(self) -> str:
        own = "own_output " if self.own_output else ""
        kind = f"{self.family} {self.implementation} {self.plan.name} {str(self.dtype).removeprefix('torch.')}"
        return f"case {self.number}: {kind} {own}{'nested ' if self.nested else ''}seed {self.seed}"


def drawn(number: int, seed: int) -> Case:
    rng = random.Random(f"{seed} {number}")
    family = rng.choice(sorted(ALL))
    implementation = "eager" if family in {*EAGER_ONLY, "t5gemma"} else rng.choice(["eager", "sdpa"])
    plan = rng.choice([plan for plan in PLANS if plan.fits(family)])
    dtypes = [torch.float32] * 4 + [torch.float64, torch.bfloat16]
    dtype = torch.float32 if plan.name == "trained" or family in FLOAT32 else rng.choice(dtypes)
    return Case(
        number, family, implementation, plan, dtype, rng.random() < 0.3, rng.random() < 0.3, rng.randrange(2**16)
    )


@dataclass
class Seen:
    """One call as a session saw it."""

    at_pass: int
    call: regard.Call
    own: Tensor  # weights of what the call was given, as it was then: static caches are written over
    found: dict[str, Tensor] = field(default_factory=dict)


Calls = dict[tuple[str, int], list[Seen]]


def judge(case: Case) -> str:
    """`right`, or `refused: ...`; AssertionError where something is wrong."""
    truth, _, fed = _truth(case)
    model, inputs = made(ALL[case.family], case.implementation)
    model, inputs = model.to(case.dtype), _cast(inputs, case.dtype)
    before = _bits(model, inputs)
    played, seen, passes = Played(), defaultdict(list), _Counter(model)
    recording = None

    def sink(name: str, call: regard.Call, tensor: Tensor) -> None:
        calls = seen[call.site.stack, call.site.layer]
        if not calls or name in calls[-1].found:
            calls.append(Seen(passes.count, call, dense(call)))
        calls[-1].found[name] = tensor.detach().clone()

    try:
        with warnings.catch_warnings(record=True) as warned, ExitStack() as sessions, torch.no_grad():
            warnings.simplefilter("always")
            if case.nested:
                recording = sessions.enter_context(regard.record(model, *STATISTICS, own_output=case.own_output))
            sessions.enter_context(regard.record(model, *STATISTICS, own_output=case.own_output, sink=sink))
            case.plan.play(model, inputs, random.Random(case.seed), played)
    except (regard.UnreachableAttention, ValueError) as error:
        if "regard" not in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts:
            raise
        assert is_clean(model), "after a refusal something is left on the model"
        return f"refused: {error}"
    finally:
        passes.handle.remove()
    assert is_clean(model), "something is left on the model"
    assert all(torch.equal(a, b) for a, b in zip(before, _bits(model, inputs))), "the model is not as it was"
    if refused := [str(w.message) for w in warned if "is not recorded" in str(w.message)]:
        return f"refused: {refused[0]}"  # a stack alone, and the others follow from what it gave
    _compare(case, truth, seen)
    if case.family in TEXT:
        _compare_positions(case, fed, played, seen)
        if recording is not None:
            _compare_recording(recording, played, seen)
    return "right"


def _truth(case: Case) -> tuple[dict[str, dict[int, list[Tensor]]], Played, list[dict[str, Any]]]:
    model, inputs = made(ALL[case.family])
    # Rows of padding that see nothing are NaN in transformers' eager attention in float64, and so all that follows.
    exact = torch.float32 if case.family in FLOAT32 or case.plan.name in ("padded", "generated") else torch.float64
    model, inputs = model.to(exact), _cast(inputs, exact)
    played, fed = Played(), []
    handle = model.register_forward_pre_hook(lambda m, a, k: fed.append(k), with_kwargs=True)
    with eager_maps(model) as maps, torch.no_grad():
        case.plan.play(model, inputs, random.Random(case.seed), played)
    handle.remove()
    return maps, played, fed


def _compare(case: Case, truth: dict[str, dict[int, list[Tensor]]], seen: Calls) -> None:
    assert set(seen) == {(s, layer) for s, layers in truth.items() for layer in layers}, "other layers than ran"
    for (stack, layer), calls in seen.items():
        maps = truth[stack][layer]
        if case.plan.name == "trained":
            maps = maps[:1]  # checkpointing runs a layer again
        assert len(calls) == len(maps), f"{stack} layer {layer}: {len(calls)} calls of {len(maps)}"
        for number, (one, weights) in enumerate(zip(calls, maps)):
            tolerance = TOLERANCE.get(case.dtype)
            where = f"{stack} layer {layer} call {number}"
            if tolerance is None:
                weights, tolerance = one.own, 1e-3
            elif not one.call.edits:
                weights = _cut(weights.double(), one.own.shape[-1], where)
            real = _rows_that_see(one.call, weights)
            told = reductions(weights, query_start=one.call.query_start, key_start=one.call.key_start)
            for name, tensor in one.found.items():
                if name == "distance" and one.call.site.cross:
                    assert tensor.isnan().all(), f"{where}: a distance between places of two sequences"
                elif name == "rows":
                    _close(tensor.double()[real], weights[real], tolerance, f"{where}: rows")
                elif name == "received":
                    whole = torch.where(real[..., None], weights, 0.0).sum(-2)
                    _close(tensor.double(), whole, tolerance * weights.shape[-2], f"{where}: received")
                else:
                    scale = max(1.0, weights.shape[-1] / 10)
                    _close(tensor.double()[real], told[name][real], tolerance * 5 * scale, f"{where}: {name}")


def _rows_that_see(call: regard.Call, weights: Tensor) -> Tensor:
    """Rows of real queries; what padding does is the model's own affair. [batch, head, query]"""
    real = torch.ones(weights.shape[0], weights.shape[2], dtype=torch.bool)
    if call.query_tokens is not None:
        real = ~call.query_tokens.role("pad")
    return real[:, None].expand(weights.shape[:3])


def _cut(weights: Tensor, n_key: int, where: str) -> Tensor:
    """A prefill into a static cache: the seam leaves out keys that are not there yet."""
    assert weights.shape[-1] == n_key or not weights[..., n_key:].any(), f"{where}: {n_key} of {weights.shape[-1]} keys"
    return weights[..., :n_key]


def _compare_positions(case: Case, fed: list[dict[str, Any]], played: Played, seen: Calls) -> None:
    done: dict[int, list[Tensor]] = defaultdict(list)
    masks: dict[int, Tensor] = {}
    for number, given in enumerate(fed):
        ids, sequence = given["input_ids"], played.runs[number]
        start = sum(x.shape[1] for x in done[sequence])
        done[sequence].append(ids)
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            masks[sequence] = mask
        whole = torch.cat(done[sequence], 1)
        for (stack, layer), calls in seen.items():
            for one in (c for c in calls if c.at_pass == number):
                where = f"{stack} layer {layer} pass {number}"
                assert one.call.query_start == start, f"{where}: starts at {one.call.query_start}, not {start}"
                tokens, keys = one.call.query_tokens, one.call.tokens
                assert tokens is not None, f"{where}: nothing known of its tokens"
                assert torch.equal(tokens.ids, ids), f"{where}: ids of queries"
                assert keys is not None
                known = keys.ids >= 0
                span = slice(one.call.key_start, min(whole.shape[1], one.call.key_positions.stop))
                n = span.stop - span.start
                assert torch.equal(keys.ids[:, :n][known[:, :n]], whole[:, span][known[:, :n]]), f"{where}: ids of keys"
                if sequence in masks:
                    hidden = masks[sequence][:, : span.stop][:, span] == 0
                    assert torch.equal(keys.role("pad")[:, :n], hidden), f"{where}: padding among its keys"


def _compare_recording(recording: regard.Recording, played: Played, seen: Calls) -> None:
    sequences = list(dict.fromkeys(s for s in played.runs))
    assert len(recording) == len(sequences), f"{len(recording)} runs recorded of {len(sequences)}"
    for run, sequence in enumerate(sequences):
        of = {number for number, s in enumerate(played.runs) if s == sequence}
        for (stack, layer), calls in seen.items():
            mine = [c for c in calls if c.at_pass in of]
            if not mine:
                continue
            rows = torch.from_numpy(recording[run][stack]["rows"].sel(layer=layer).values)
            query0 = int(recording[run][stack]["query"][0])
            key0 = int(recording[run][stack]["key"][0])
            for one in mine:
                q, k = one.call.query_positions, one.call.key_positions
                part = rows[:, :, q.start - query0 : q.stop - query0, k.start - key0 : k.stop - key0]
                told = one.found["rows"][..., : part.shape[-1]]
                assert torch.allclose(part.double(), told.double(), equal_nan=True, atol=1e-6), (
                    f"recording {run}: {stack} layer {layer}, queries {q.start} to {q.stop}"
                )


class _Counter:
    """Counts the outermost passes of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.count = -1
        self.handle = _Removable(model, self)


class _Removable:
    def __init__(self, model: nn.Module, counter: _Counter) -> None:
        own, self.model = model.forward, model

        def forward(*args: Any, **kwargs: Any) -> Any:
            counter.count += 1
            return own(*args, **kwargs)

        forward.__signature__ = __import__("inspect").signature(own)
        model.forward = forward

    def remove(self) -> None:
        self.model.__dict__.pop("forward", None)


def _bits(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        output = model(**inputs)
    return [v.clone() for v in output.values() if isinstance(v, Tensor)]


def _cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def _close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    off = (got - want).abs().max() if got.numel() else torch.tensor(0.0)
    assert got.shape == want.shape, f"{what}: {list(got.shape)} for {list(want.shape)}"
    assert not torch.isnan(off), f"{what}: NaN"
    assert float(off) <= tolerance, f"{what}: off by {float(off):.2g}"
