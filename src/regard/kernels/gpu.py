"""Reductions on a GPU, in Triton: one flash-style pass for what belongs to queries, one for what keys receive.

Memory is O(n) and results do not depend on the order in which blocks happen to run. Without a GPU the same programs
run, slowly, in Triton's interpreter: set TRITON_INTERPRET=1 before anything imports Triton.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .operands import Operands, Reduction
from .strips import cut

PLANES = ("shift", "inverse", "maximum", "entropy")  # of each row; weights are exp(unit * (score - shift)) * inverse
REDUCTIONS = {"entropy", "maximum", "distance", "mass", "at", "top_weights", "top_keys", "received"}
MOST_DIM = 256
MOST_TOP = 64
FEW = 16  # rows of one program when decoding
SPLIT = 1024  # keys a split has at least


def refusal(call: Operands, wanted: Iterable[Reduction]) -> str | None:
    """Why these programs cannot do it; None where they can."""
    tensors = [t for t in call.tensors if t is not None]
    wanted = list(wanted)
    if not (call.query.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return "not on a GPU"
    if call.query.is_cuda and torch.cuda.get_device_capability(call.query.device) < (8, 0):
        return "a GPU older than Ampere"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if call.query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {call.query.dtype}"
    if not call.query.dtype == call.key.dtype == call.value.dtype:
        return "query, key and value differ in dtype"
    if call.wants_gradient:
        return "gradients are asked for"
    if any(t.device != call.query.device for t in tensors):
        return "tensors on several devices"
    if call.scale <= 0:
        return "a scale that is not positive"
    if max(call.query.shape[-1], call.value.shape[-1]) > MOST_DIM:
        return f"a head dim above {MOST_DIM}"
    if min(t.numel() for t in tensors) == 0:
        return "a tensor is empty"
    if call.edits:
        return "weights are edited"
    if call.dropout:
        return "dropout"
    if unknown := {r.name for r in wanted} - REDUCTIONS:
        return f"no reduction named {', '.join(sorted(unknown))}"
    if max((r.knob for r in wanted if r.name.startswith("top_")), default=0) > MOST_TOP:
        return f"more than {MOST_TOP} largest weights"
    return None


def forward(
    call: Operands, wanted: Iterable[Reduction], *, output: bool = False
) -> tuple[dict[Reduction, Tensor], Tensor | None]:
    """Every reduction in `wanted`, and the attention output where asked for, [batch, head, query, dim].

    Each row is read once for all of them; `received` and `at` then read scores again, knowing each row's sum.
    """
    programs = _programs()
    wanted, query = list(wanted), call.query
    batch, heads, n_query, dim = query.shape
    kv_heads, n_key, value_dim = call.key.shape[1], call.key.shape[2], call.value.shape[3]
    rows, lines = heads // kv_heads * n_query, batch * heads * n_query
    linear = [r for r in wanted if r.name == "mass"] + [r for r in wanted if r.name == "distance"]
    clips = tuple(float("inf") if r.knob is None else float(r.knob) for r in linear if r.name == "distance")
    received = [r for r in wanted if r.name == "received"]
    k = max((r.knob for r in wanted if r.name.startswith("top_")), default=0)
    columns, value_wide, top = _power(len(linear)), _power(value_dim, 16) if output else 1, _power(k)

    scoring = _scoring(call)
    few = rows <= FEW
    absent = [x is None for x in (call.mask, call.bias, call.softcap)]
    kind = f"{query.dtype} {dim} {value_wide} {top} {len(wanted)} {call.causal} {scoring['BOOLEAN']} {absent} {few}"
    splits, span = _splits(call, programs.SPAN)
    found = query.new_empty(len(PLANES) + len(linear), batch, heads, n_query, dtype=torch.float32)
    # laid out as modules want it after attention, so that they need not copy it
    mixed = query.new_empty(batch, n_query, heads, value_dim).transpose(1, 2) if output else None
    kept = parts = None
    if k:
        shape = (batch, heads, n_query, splits * top)
        kept = (found.new_empty(shape), found.new_empty(shape, dtype=torch.int32))
    if splits > 1:
        parts = (found.new_empty(splits, lines, 3 + columns), found.new_empty(splits, lines, value_wide))
    finishing = {
        "found": found,
        "output": _argument(mixed),
        "sinks": _sinks(call),
        "parts": parts,
        "VALUE_DIM": value_dim,
        "VALUE_WIDE": value_wide,
        "COLUMNS": columns,
    }
    results: dict[Reduction, Tensor] = {}
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        programs.by_query[lambda size: (batch * kv_heads * _blocks(rows, size["BLOCK"]), splits)](
            **scoring,
            **finishing,
            value=_argument(call.value.expand(batch, -1, -1, -1)),
            sets=_sets(linear, call, "key"),
            spans=_spans(call, "query"),
            clips=clips,
            kept=kept,
            span=span,
            offset=call.query_start - call.key_start,
            ENTROPY=any(r.name == "entropy" for r in wanted),
            SETS=len(linear) - len(clips),
            CLIPS=len(clips),
            TOP=top,
            FEW=few,
            KIND=kind,
        )
        if splits > 1:
            programs.merge[(_blocks(lines, FEW),)](
                **finishing,
                n_query=n_query,
                heads=heads,
                plane=lines,
                unit=scoring["unit"],
                splits=splits,
                LINEAR=len(linear),
                BLIND=scoring["BOOLEAN"] and call.bias is None,
                BLOCK=FEW,
                enable_fp_fusion=True,
            )
        if received:
            sums = found.new_empty(len(received), batch, heads, n_key)
            programs.by_key[lambda size: (batch * heads * _blocks(n_key, size["BLOCK"]),)](
                **scoring,
                found=found,
                received=sums,
                sets=_sets(received, call, "query"),
                spans=_spans(call, "key"),
                SETS=len(received),
                COLUMNS=_power(len(received)),
                FEW=False,
                KIND=kind,
            )
            results |= zip(received, sums)
        for r in wanted:
            if r.name == "at":
                results[r] = torch.empty_like(found[0])
                keys = r.knob.where.to(query.device)[:, None].expand(batch, heads, n_query)
                programs.at_keys[(batch * heads * _blocks(n_query, FEW),)](
                    **scoring, found=found, at=_argument(keys), weight=results[r], BLOCK=FEW
                )
    if kept is not None:
        scores, places = kept[0].topk(k, dim=-1)
        largest = ((scores - found[0][..., None]) * scoring["unit"]).exp() * found[1][..., None]
        keys = torch.where(largest > 0, kept[1].gather(-1, places).long() + call.key_start, -1)
        results |= {r: largest[..., : r.knob] for r in wanted if r.name == "top_weights"}
        results |= {r: keys[..., : r.knob] for r in wanted if r.name == "top_keys"}
    results |= zip(linear, found[len(PLANES) :])
    return results | {r: found[PLANES.index(r.name)] for r in wanted if r.name in PLANES}, mixed


def _programs() -> Any:
    return import_module(".gpu_programs", __package__)  # Triton decorates while it imports: not before it is needed


def _scoring(call: Operands) -> dict[str, Any]:
    """What every program that takes scores is told."""
    batch, heads, n_query, dim = call.query.shape
    boolean = call.mask is not None and call.mask.dtype == torch.bool
    plain = call.softcap is None and call.bias is None and (call.mask is None or boolean)
    return {
        "query": _argument(call.query),
        "key": _argument(call.key.expand(batch, -1, -1, -1)),
        "mask": _argument(_map(call.mask, call)),
        "bias": _argument(_map(call.bias, call)),
        "scale": call.scale,
        "softcap": call.softcap,
        "unit": call.scale if plain else 1.0,
        "n_query": n_query,
        "n_key": call.key.shape[2],
        "heads": heads,
        "group": heads // call.key.shape[1],
        "plane": batch * heads * n_query,
        "DIM": dim,
        "WIDE": _power(dim, 16),
        "BOOLEAN": boolean,
        "CAUSAL": call.causal,
        "enable_fp_fusion": True,  # said aloud, since what Triton takes for granted changes
    }


def _power(n: int, least: int = 1) -> int:
    """The power of two at or above n: Triton's blocks have no other sizes."""
    return max(least, 1 << (n - 1).bit_length()) if n else least


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


def _argument(tensor: Tensor | None) -> tuple[Tensor, tuple[int, ...]] | None:
    if tensor is None:
        return None
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, tensor.stride()


def _sinks(call: Operands) -> tuple[Tensor, tuple[int, ...]] | None:
    """As [batch, head, query], not copied."""
    if call.sinks is None:
        return None
    batch, heads, n_query, _ = call.query.shape
    sinks = call.sinks.reshape(1, heads, 1) if call.sinks.numel() == heads else call.sinks[..., 0]
    return _argument(sinks.expand(batch, heads, n_query))


def _map(tensor: Tensor | None, call: Operands) -> Tensor | None:
    """A mask or bias as [batch, head, query, key], not copied."""
    if tensor is None:
        return None
    batch, heads, n_query, _ = call.query.shape
    n_key = call.key.shape[2]
    return cut(tensor, 0, n_query, n_key).expand(batch, heads, n_query, n_key)


def _spans(call: Operands, axis: str) -> tuple[Any, Any] | None:
    """Where what a boolean mask shows to each row begins and ends, [batch, head, query or key]; the rest is skipped."""
    programs = _programs()
    mask = _map(call.mask, call)
    if mask is None or mask.dtype != torch.bool or call.bias is not None or mask.shape[2] <= FEW:
        return None
    mask = mask if axis == "query" else mask.mT
    if mask.stride(3) == 0:
        return None
    batch, heads, n_row, n_column = (1 if s == 0 else n for n, s in zip(mask.shape, mask.stride()))
    spans = torch.empty(2, batch, heads, n_row, dtype=torch.int32, device=mask.device)
    programs.find_spans[(batch * heads * _blocks(n_row, 32),)](
        _argument(mask), *spans, heads, n_row, n_column, BLOCK=32, STEP=128
    )
    return tuple(_argument(edge.expand(mask.shape[:3])) for edge in spans)  # type: ignore[return-value]


def _sets(reductions: list[Reduction], call: Operands, axis: str) -> tuple[Tensor, tuple[int, ...]] | None:
    """The sets of positions that reductions are over, as [batch, set, key or query]; without a knob, all positions."""
    batch, n = call.query.shape[0], (call.query if axis == "query" else call.key).shape[2]
    everywhere = torch.ones(1, n, dtype=torch.bool, device=call.query.device)
    chosen = [r.knob for r in reductions if r.name != "distance"]
    sets = [everywhere if knob is None else knob.where.to(everywhere.device) for knob in chosen]
    return _argument(torch.stack([s.expand(batch, n) for s in sets], dim=1)) if sets else None


def _splits(call: Operands, step: int) -> tuple[int, int]:
    """In how many splits of how many keys a row is read: more than one where its rows alone leave the GPU idle."""
    batch, heads, n_query, _ = call.query.shape
    kv_heads, n_key = call.key.shape[1], call.key.shape[2]
    programs = batch * kv_heads * _blocks(heads // kv_heads * n_query, FEW if n_query <= FEW else 64)
    units = torch.cuda.get_device_properties(call.query.device).multi_processor_count if call.query.is_cuda else 64
    splits = max(1, min(2 * units // programs, n_key // SPLIT))
    span = _blocks(_blocks(n_key, splits), step) * step
    return _blocks(n_key, span), span
