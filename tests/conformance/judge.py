"""One architecture: what Regard records against what the model itself reports."""

from __future__ import annotations

import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

import regard
from regard.adapters.multihead import open_forward

from .build import NotConstructible, build
from .places import places

TOLERANCE = 1e-5
FUSED_TOLERANCE = 1e-3  # rounding differs between implementations, and grows from layer to layer
STATISTICS = ("entropy", "received", "distance", "mass", "top_keys", "top_weights")


@dataclass
class Verdict:
    """How one architecture fared."""

    architecture: str
    state: str = ""  # exact, refused, no attention, not constructible; wrong or crashed
    detail: str = ""
    model: str = ""
    calls: int = 0  # recorded
    compared: int = 0  # with maps that transformers' own eager functions return, or that the model reports
    inconsistent: bool = False  # without Regard, the model gives another output with sdpa than with eager attention
    fused: int = 0  # calls that were also compared with sdpa in place of eager attention
    unverified: list[str] = field(default_factory=list)  # recorded, but nothing independent to compare with
    unseen: list[str] = field(default_factory=list)  # classes with a softmax like a map, which no call recorded
    unreached: list[str] = field(default_factory=list)
    not_softmax: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # outputs of the model called attentions that are no whole maps
    refused: list[str] = field(default_factory=list)  # stacks that were left out, and why
    places: str = ""  # of patches, in a picture that is not square: see `places`
    seconds: float = 0.0


class Wrong(AssertionError):
    """What was recorded is not what the model did."""


def judge(name: str) -> Verdict:
    verdict = Verdict(name)
    try:
        model, inputs = build(name)
    except NotConstructible as error:
        verdict.state, verdict.detail = "not constructible", str(error)
        return verdict
    verdict.model = type(model).__name__
    try:
        _compare(model, inputs, verdict)
        verdict.state, verdict.places = "exact", places(model, inputs)
    except regard.UnreachableAttention as error:
        none = "holds no attention module" in str(error)
        verdict.state, verdict.detail = "no attention" if none else "refused", str(error)
    except Wrong as error:
        verdict.state, verdict.detail = "wrong", str(error)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        verdict.state = "crashed"
        verdict.detail = f"{type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})"
    return verdict


@torch.no_grad()
def _compare(model: nn.Module, inputs: dict[str, Any], verdict: Verdict) -> None:
    reports = _reports(model, inputs)
    inputs = {**inputs, "output_attentions": True} if reports else inputs
    with _own_maps(model) as own, _Softmaxes() as softmaxes:
        want = _run(model, inputs)
    calls, seen = _watch()
    with regard.record(model, *STATISTICS, seen, own_output=True) as recording:
        got = _run(model, inputs)
    left_out = {why.partition(": ")[0] for why in recording.attributes.get("refused", ())}
    calls = [call for call in calls if call[0].stack not in left_out]  # seen before that was found out
    verdict.calls = len(calls)
    verdict.unreached = list(recording.attributes["unreached"])
    verdict.not_softmax = list(recording.attributes["not_softmax"])
    verdict.refused = list(recording.attributes.get("refused", ()))
    _check_output(model, inputs, want, got)
    _check_maps(calls, own, verdict)
    sampled = any("deformable" in type(m).__name__.lower() for m in model.modules())
    _check_reported(calls, want, sampled, verdict)
    _check_rest(calls, own, softmaxes.maps, verdict)
    verdict.unseen = _unseen(calls, softmaxes)
    _check_tree(recording, calls)
    _check_fused(model, inputs, calls, verdict)


def _watch() -> tuple[list[tuple[regard.Site, dict[str, Tensor]]], Any]:
    """A list that fills with each call's site and reductions, and the statistic that fills it."""
    calls: list[tuple[regard.Site, dict[str, Tensor]]] = []

    @regard.statistic("batch head query", title="Calls")
    def seen(call: regard.Call) -> Tensor:
        weights, group = call.weights, call.query.shape[1] // call.key.shape[1]
        scores = call.query @ call.key.repeat_interleave(group, 1).mT
        found = {
            "rows": weights.dense(),
            "entropy": weights.entropy(),
            "received": weights.received(),
            "maximum": weights.maximum(),
            "score": scores.abs().amax() * abs(call.scale),
        }
        calls.append((call.site, found))
        return found["entropy"]

    return calls, seen


def _reports(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether it runs where it is asked for its maps."""
    try:
        _run(model, {**inputs, "output_attentions": True})
    except (TypeError, ValueError, IndexError):  # takes no such argument, or fails to collect what it names
        return False
    return True


def _run(model: nn.Module, inputs: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return model(**inputs)


@contextmanager
def _own_maps(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """The weights that transformers' own eager functions return: name of the module -> one map a call."""
    names = {module: name for name, module in model.named_modules()}
    maps: dict[str, list[Tensor]] = defaultdict(list)
    get_interface = AttentionInterface.get_interface

    def look_up(self: Any, implementation: Any, default: Any) -> Any:
        function = get_interface(self, implementation, default)

        def collecting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output, weights = function(module, *args, **kwargs)
            if weights is not None and module in names:
                maps[names[module]].append(weights.detach())
            return output, weights

        return collecting

    AttentionInterface.get_interface = look_up
    try:
        yield maps
    finally:
        AttentionInterface.get_interface = get_interface


def _check_output(model: nn.Module, inputs: dict[str, Any], want: Any, got: Any) -> None:
    pairs = list(zip(_tensors(want), _tensors(got), strict=True))
    if all(_equal(a, b) for a, b in pairs):
        return
    again = _tensors(_run(model, inputs))
    if not all(_equal(a, b) for (a, _), b in zip(pairs, again)):
        return  # the model is not deterministic: nothing to compare with
    off = max(
        float((a.double() - b.double()).abs().nan_to_num().max()) for a, b in pairs if a.shape == b.shape and a.numel()
    )
    raise Wrong(f"the output under record is not the model's own (off by {off:.2g})")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [] if value.is_sparse or value.is_complex() else [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []


def _check_maps(calls: list[Any], own: dict[str, list[Tensor]], verdict: Verdict) -> None:
    recorded = defaultdict(list)
    for site, found in calls:
        recorded[site.name].append((site, found))
    for name, maps in own.items():
        if len(recorded[name]) != len(maps):
            raise Wrong(f"{name} attended {len(maps)} times, {len(recorded[name])} were recorded")
        for (site, found), weights in zip(recorded[name], maps):
            _check_call(site, found, weights)
            verdict.compared += 1


def _check_call(site: regard.Site, found: dict[str, Tensor], weights: Tensor) -> None:
    p = weights.double()
    rows = found["rows"].double()
    least = _tolerance(found)
    if rows.shape != p.shape:
        raise Wrong(f"{site}: weights are {list(rows.shape)}, the model's own {list(p.shape)}")
    if (rows.sum(-1) < p.sum(-1) - TOLERANCE).any():  # transformers gives the weights before its sinks take their part
        if not torch.allclose(rows / rows.sum(-1, keepdim=True), p, rtol=0, atol=TOLERANCE):
            raise Wrong(f"{site}: rows are not the model's own, even without sinks")
        return
    truth = {
        "rows": p,
        "entropy": torch.special.entr(p).sum(-1),
        "received": p.sum(-2),
        "maximum": p.amax(-1),
    }
    for name, want in truth.items():
        got = found[name].double()
        bound = least * (1 + want.abs().nan_to_num().amax())
        if not torch.allclose(got, want, rtol=0, atol=float(bound), equal_nan=True):
            off = float((got - want).abs().nan_to_num(nan=float("inf")).max())
            raise Wrong(f"{site}: {name} is off by {off:.2g}")


def _tolerance(found: dict[str, Tensor]) -> float:
    """1e-5; float32's own rounding of the scores, which softmax passes on, where they are in the thousands."""
    return max(TOLERANCE, 2 * torch.finfo(torch.float32).eps * float(found["score"].nan_to_num()))


def _check_reported(calls: list[Any], output: Any, sampled: bool, verdict: Verdict) -> None:
    """Every map in the model's output was recorded, or is part of one that was.

    sampled: its cross attention is to sampled points, of which it reports the weights: no map over keys.
    """
    fields = output.items() if hasattr(output, "items") else ()
    fields = [(key, value) for key, value in fields if not (sampled and key.startswith("cross"))]
    reported = [(key, t) for key, value in fields if "attention" in key for t in _tensors(value) if t.ndim in (3, 4)]
    for key, weights in reported:
        sums = weights.double().sum(-1)
        if not torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-3):  # scores, masks, hidden states
            if key.endswith("attentions") and key not in verdict.others and weights.ndim == 4:
                verdict.others.append(key)
            continue
        if _is_recorded(weights.double(), calls):
            verdict.compared += 1
        elif not verdict.refused:  # otherwise it may be of a stack that was left out
            raise Wrong(f"the model reports a map {list(weights.shape)} which was not recorded")


def _check_rest(calls: list[Any], own: dict[str, list[Tensor]], maps: list[Tensor], verdict: Verdict) -> None:
    """Attention outside the interface against what the softmaxes of the plain run gave."""
    for site, found in calls:
        rows = found["rows"]
        if site.name in own:
            continue
        several = [part for softmax in maps if softmax.ndim == 5 for part in softmax.unbind(1)]
        if any(_same_numbers(rows, softmax) or _in_pieces(rows, softmax) for softmax in [*maps, *several]):
            verdict.compared += 1
        else:
            verdict.unverified.append(site.name)


def _unseen(calls: list[Any], softmaxes: _Softmaxes) -> list[str]:
    """Classes of modules whose softmaxes look like maps [batch, head, query, key], but that no call recorded."""
    rows = [found["rows"] for _, found in calls]
    rows += [r / r.sum(-1, keepdim=True) for r in rows]  # before sinks take their part

    def recorded(weights: Tensor) -> bool:
        return any(_same_numbers(r, w) for r in rows for w in (weights, weights[..., :-1]))  # a sink's column

    wide = [(m, name) for m, name in zip(softmaxes.maps, softmaxes.makers) if m.ndim == 4 and min(m.shape[-2:]) > 1]
    return sorted({name for m, name in wide if not recorded(m)})


def _same_numbers(rows: Tensor, softmax: Tensor) -> bool:
    if rows.numel() != softmax.numel():
        return False
    orders = [softmax, softmax.transpose(1, 2)] if softmax.ndim == 5 else [softmax]  # heads before windows
    wanted = [order.double().reshape(rows.shape) for order in orders]
    return any(torch.allclose(rows.double(), one, rtol=0, atol=10 * TOLERANCE, equal_nan=True) for one in wanted)


class _Softmaxes(TorchFunctionMode):
    """All that softmax gave in a run, and the maps behind calls of scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []
        self.makers: list[str] = []  # the class of the module that ran then
        self.running: list[str] = []
        self.depth = 0  # torch's own function is run inside this mode, entered again

    def __enter__(self) -> Self:
        if not self.depth:
            self.hooks = (
                register_module_forward_pre_hook(lambda module, _: self.running.append(type(module).__name__)),
                register_module_forward_hook(lambda *_: self.running.pop() and None, always_call=True),
            )
        self.depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.depth -= 1
        if not self.depth:
            for hook in self.hooks:
                hook.remove()

    def _keep(self, weights: Tensor) -> None:
        self.maps.append(weights.detach().clone())
        self.makers.append(next((name for name in reversed(self.running) if name != "Softmax"), ""))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.multi_head_attention_forward:
            with self:
                return open_forward(*args, **kwargs or {})
        result = func(*args, **kwargs or {})
        if "softmax" in getattr(func, "__name__", "") and result.ndim > 2:
            self._keep(result)
        elif func is F.scaled_dot_product_attention:
            self._keep(_dense(*args, **kwargs or {}))
        return result


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The map by the formula in torch's documentation, in float64."""
    if key.shape[:-2] != query.shape[:-2]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query.double() @ key.double().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    if attn_mask is not None:
        hidden = attn_mask.logical_not() if attn_mask.dtype == torch.bool else None
        scores = scores + attn_mask if hidden is None else scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1)


def _check_fused(model: nn.Module, inputs: dict[str, Any], calls: list[Any], verdict: Verdict) -> None:
    """The same weights with PyTorch's fused attention, where the model has that, up to rounding on the way."""
    outputs = []
    try:
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            torch.manual_seed(0)
            outputs.append(_tensors(model(**inputs)))
    except Exception:
        return
    if model.config._attn_implementation != "sdpa":
        return
    pairs = [(a, b) for a, b in zip(*outputs) if a.shape == b.shape and a.is_floating_point()]
    if not all(torch.allclose(a, b, rtol=1e-2, atol=1e-2, equal_nan=True) for a, b in pairs):
        verdict.inconsistent = True
        return
    again, seen = _watch()
    with regard.record(model, seen):
        torch.manual_seed(0)
        model(**inputs)
    if [site.name for site, _ in again] != [site.name for site, _ in calls]:
        raise Wrong(f"{len(calls)} calls were recorded with eager attention, {len(again)} with sdpa")
    widest = max([1.0, *(float(found["score"].nan_to_num()) for _, found in calls)])
    for (site, mine), (_, want) in zip(again, calls):
        rows, truth = mine["rows"], want["rows"]
        used = rows.sum(-1) > 0  # a query that may look nowhere has other weights in each
        off = float((rows - truth).abs()[used].nan_to_num().amax()) if used.any() else 0.0
        if off > FUSED_TOLERANCE * widest:
            raise Wrong(f"{site}: rows with sdpa are off by {off:.2g} from those with eager attention")
    verdict.fused = len(again)


def _is_recorded(weights: Tensor, calls: list[Any]) -> bool:
    n, n_key = weights.shape[-2:]
    for _, found in calls:
        rows = found["rows"].double()
        if _in_pieces(rows, weights):
            return True
        if rows.shape[-2] < n or rows.shape[-1] < n_key:
            continue
        mean = rows.mean(1, keepdim=True).expand_as(rows)  # some report the mean over heads, once for each head
        whole = rows / rows.sum(-1, keepdim=True)  # as given before sinks take their part
        for part in (rows, whole, mean, mean[:, :1], rows[..., -n:, -n_key:], rows[..., :n_key]):
            if part.numel() == weights.numel() and torch.allclose(
                part.reshape(weights.shape), weights, rtol=0, atol=_tolerance(found), equal_nan=True
            ):
                return True
    return False


def _in_pieces(rows: Tensor, pieces: Tensor) -> bool:
    """Whether rows hold the numbers of a band, or of blocks, in this order or another, and nothing else.

    pieces: [batch, head, query, piece], or with blocks of queries before or after the heads, or heads after queries.
    """
    orders = [pieces, pieces.transpose(1, 2)]
    if pieces.ndim == 5:
        orders = [order.flatten(2, 3) for order in orders]
    for own in (order.double() for order in orders if order.ndim == 4 and order.shape[:2] == rows.shape[:2]):
        n, width = min(own.shape[2], rows.shape[2]), max(own.shape[3], rows.shape[3])
        mine = own[:, :, :n].nan_to_num()
        mine = F.pad(mine, (0, width - mine.shape[-1])).sort(-1).values
        for part in (rows[:, :, :n], rows[:, :, -n:]):
            theirs = F.pad(part.double(), (0, width - part.shape[-1])).sort(-1).values
            used = theirs.sum(-1) > 0.5  # a query that is padding may look nowhere
            if used.any() and torch.allclose(mine[used], theirs[used], rtol=0, atol=10 * TOLERANCE):
                return True
    return False


def _check_tree(recording: regard.Recording, calls: list[Any]) -> None:
    """The labelled result holds every call, and nothing else."""
    want: dict[tuple[str, int], float] = defaultdict(float)
    for site, found in calls:
        want[site.stack, site.layer] += float(found["entropy"].double().nansum())
    got: dict[tuple[str, int], float] = defaultdict(float)
    for tree in recording:
        for stack, node in tree.children.items():
            for layer in node["layer"].values:
                values = node["entropy"].sel(layer=layer).values.astype(np.float64)
                got[stack, int(layer)] += float(np.nansum(values))
    if set(got) != set(want):
        raise Wrong(f"the recording holds {sorted(got)}, the calls were {sorted(want)}")
    for where, total in want.items():
        if abs(got[where] - total) > 1e-4 * (1 + abs(total)):
            raise Wrong(
                f"the recording's entropies at {where} sum to {got[where]:.6g}, those of its calls to {total:.6g}"
            )
