"""The fused CPU kernel: output and reductions in one pass, and the gradient of the output. docs/kernel.md.

The library is plain C++ that takes pointers, shapes and strides, so it is found by name and loaded with ctypes; where
it was not built, or on a machine that cannot load it, `why_not` says so and nothing else of Regard changes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterable
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import strips
from ..derivatives import again, gradients, transformed
from ..operands import Operands, Reduction
from ..strips import cut, misfit, stack

INSTRUCTIONS = ("baseline", "avx2", "avx512")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
_FLOATS = _TYPES.keys() - {torch.bool}
_ROWWISE = {"entropy", "maximum", "squares", "distance", "mass", "at", "top_weights", "top_keys", "received", "lse"}
_EVERY = 2**40  # keys to either side: no limit


class _Tensor4(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64 * 4), ("type", c_int64)]


class _Attention(Structure):
    _fields_ = [
        *((n, c_int64) for n in ("batch", "heads", "kv_heads", "n_query", "n_key", "dim", "value_dim")),
        *((n, _Tensor4) for n in ("query", "key", "value", "mask", "bias", "sinks")),
        *((n, c_double) for n in ("scale", "softcap", "hidden")),
        *((n, c_int64) for n in ("offset", "left", "right")),
        ("block_counts", c_void_p),
        ("block_indices", c_void_p),
        ("count_stride", c_int64 * 3),
        ("index_stride", c_int64 * 4),
        *((n, c_int64) for n in ("block_query", "block_key", "threads", "instructions")),
    ]


class _Results(Structure):
    _fields_ = [
        ("output", _Tensor4),
        *((n, c_void_p) for n in ("lse", "reference", "above", "entropy", "maximum", "squares")),
        ("n_distance", c_int64),
        ("clips", c_void_p),
        ("start", c_int64),
        ("distance", c_void_p),
        ("n_mass", c_int64),
        ("mass_stride", c_int64),
        ("sets", c_void_p),
        ("mass", c_void_p),
        ("n_received", c_int64),
        ("received_stride", c_int64),
        ("groups", c_void_p),
        ("received", c_void_p),
        ("k", c_int64),
        ("top", c_void_p),
        ("top_at", c_void_p),
        ("n_at", c_int64),
        ("at_stride", c_int64),
        ("at", c_void_p),
        ("at_weight", c_void_p),
        ("given_lse", c_void_p),
    ]


class _Gradients(Structure):
    _fields_ = [
        ("output", _Tensor4),
        ("grad", _Tensor4),
        *((n, c_void_p) for n in ("lse", "reference", "above", "query", "key", "value")),
        ("bias", _Tensor4),
        ("sinks", c_void_p),
    ]


class Blocks(NamedTuple):
    """Which key blocks each query block sees; blocks that are not listed cost nothing.

    counts: [batch|1, head|1, query block] int32; indices: [batch|1, head|1, query block, slot] int32, of which the
    first `counts` are read: as `kv_num_blocks` and `kv_indices` of FlexAttention's BlockMask. key_size: a multiple
    of 32.
    """

    counts: Tensor
    indices: Tensor
    query_size: int = 128
    key_size: int = 128

    def pairs(self, n_query: int, n_key: int) -> Tensor:
        """Which queries see which keys. [batch|1, head|1, query, key] boolean"""
        shape = torch.broadcast_shapes(self.counts.shape, self.indices.shape[:3])
        used = torch.arange(self.indices.shape[3]) < self.counts.expand(shape)[..., None]
        n_block = -(-n_key // self.key_size)
        at = self.indices.expand(*shape, -1).long().where(used, n_block)  # the last: of no keys
        seen = torch.zeros(*shape, n_block + 1, dtype=torch.bool).scatter_(-1, at, True)
        seen = seen.repeat_interleave(self.query_size, 2).repeat_interleave(self.key_size, 3)
        return seen[:, :, :n_query, :n_key]


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    spec = importlib.util.find_spec(f"{__name__}._native")
    path = os.environ.get("REGARD_NATIVE") or (spec and spec.origin)  # another build, for those who work on it
    if path is None:
        return "the kernel was not built: no C++ compiler was found when regard was installed"
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        return f"the kernel cannot be loaded: {error}"
    library.regard_forward.argtypes = [POINTER(_Attention), POINTER(_Results)]
    library.regard_backward.argtypes = [POINTER(_Attention), POINTER(_Gradients)]
    for name in ("forward", "backward", "instructions", "openmp", "sizes"):
        getattr(library, f"regard_{name}").restype = c_int64
    sizes = [library.regard_sizes(c_int64(i)) for i in range(3)]
    if sizes != [ctypes.sizeof(s) for s in (_Attention, _Results, _Gradients)]:
        return f"the kernel at {path} was built from another version of regard"
    return library


def why_not() -> str | None:
    """Why the kernel is not in use at all; None where it is."""
    if os.environ.get("REGARD_KERNEL") == "torch":
        return "REGARD_KERNEL=torch"
    library = _library()
    return library if isinstance(library, str) else None


def describe() -> str:
    """Instruction set and threads in use, for people."""
    library = _library()
    assert not isinstance(library, str)
    pool = "PyTorch's OpenMP threads" if library.regard_openmp() else "threads of its own"
    return f"native C++, {INSTRUCTIONS[instructions()]}, {torch.get_num_threads()} of {pool}"


def instructions() -> int:
    """Index in `INSTRUCTIONS`: the machine's best, or as REGARD_INSTRUCTIONS lowers it."""
    library = _library()
    assert not isinstance(library, str)
    best = int(library.regard_instructions())
    asked = os.environ.get("REGARD_INSTRUCTIONS")
    if asked is None:
        return best
    if asked not in INSTRUCTIONS:
        raise ValueError(f"REGARD_INSTRUCTIONS={asked!r} is none of {', '.join(INSTRUCTIONS)}")
    return min(best, INSTRUCTIONS.index(asked))


def refusal(call: Operands, wanted: Iterable[Reduction] = ()) -> str | None:
    """Why this kernel cannot do this call; None where it can."""
    if (why := why_not()) is not None:
        return why
    if call.query.device.type != "cpu":
        return f"tensors on {call.query.device}"
    if odd := {t.dtype for t in (call.query, call.key, call.value)} - _FLOATS:
        return f"dtype {', '.join(map(str, odd))}"
    if call.edits:
        return "an intervention edits weights"
    if unknown := {r.name for r in wanted} - _ROWWISE:
        return f"no reduction {', '.join(sorted(unknown))}"
    return None


def forward(
    call: Operands,
    wanted: Iterable[Reduction] = (),
    *,
    output: bool = False,
    lse: Tensor | None = None,
    window: int | None = None,
    blocks: Blocks | None = None,
) -> tuple[dict[Reduction, Tensor], Tensor | None]:
    """Every reduction in `wanted`, and the output [batch, head, query, dim] if asked for, in one pass. No gradient.

    lse: log-sum-exp of each row [batch, head, query], nats, where it is known already: saves keeping the weights.
    window, blocks: limits beside those of the call, as in `attention`.
    """
    limited = window is not None or blocks is not None  # what is not fits already: `refusal` was asked
    if limited and (problem := _shapes(call.query, call.key, call.value, window, blocks)):
        raise ValueError(problem)
    wanted, job = list(wanted), _Job.of_call(call, window, blocks)
    batch, heads, n_query = call.query.shape[:3]
    n_key = call.key.shape[2]
    results = _Results(start=call.query_start - call.key_start)
    rows = (batch, heads, n_query)
    made: dict[str, Tensor] = {}

    def empty(field: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        made[field] = torch.empty(shape, dtype=dtype)
        setattr(results, field, made[field].data_ptr())
        return made[field]

    def given(field: str, tensor: Tensor) -> None:
        made[field] = tensor = tensor.contiguous()
        setattr(results, field, tensor.data_ptr())

    by_name: dict[str, list[Reduction]] = {}
    for r in wanted:
        by_name.setdefault("top" if r.name.startswith("top_") else r.name, []).append(r)
    for name in ("lse", "entropy", "maximum", "squares"):
        if name in by_name:
            empty(name, *rows)
    if distances := by_name.get("distance"):
        results.n_distance = len(distances)
        given("clips", torch.tensor([-1.0 if r.knob is None else float(r.knob) for r in distances]))
        empty("distance", len(distances), *rows)
    if masses := by_name.get("mass"):
        sets = stack([r.knob.where for r in masses])
        results.n_mass, results.mass_stride = len(masses), (len(masses) * n_key if len(sets) > 1 else 0)
        given("sets", sets.float())
        empty("mass", len(masses), *rows)
    if received := by_name.get("received"):
        results.n_received = len(received)
        if any(r.knob is not None for r in received):
            everyone = torch.ones(1, n_query, dtype=torch.bool)
            groups = stack([everyone if r.knob is None else r.knob.where for r in received])
            results.received_stride = len(received) * n_query if len(groups) > 1 else 0
            given("groups", groups.float())
        empty("received", len(received), batch, heads, n_key)
    if tops := by_name.get("top"):
        results.k = max(r.knob for r in tops)
        empty("top", *rows, results.k)
        empty("top_at", *rows, results.k, dtype=torch.int64)
    if ats := by_name.get("at"):
        places = stack([r.knob.where for r in ats])
        results.n_at, results.at_stride = len(ats), (len(ats) * n_query if len(places) > 1 else 0)
        given("at", places.long())
        empty("at_weight", len(ats), *rows)
    if lse is not None:
        given("given_lse", lse.float())
    out = None
    if output:
        # Laid out as models go on with it: heads side by side.
        out = call.query.new_empty(batch, n_query, heads, call.value.shape[-1]).transpose(1, 2)
        results.output = _tensor4(out)
    job.run("forward", results)

    found: dict[Reduction, Tensor] = {}
    for name, asked in by_name.items():
        for i, r in enumerate(asked):
            if name == "top":
                if r.name == "top_weights":
                    found[r] = made["top"][..., : r.knob]
                else:
                    at = made["top_at"][..., : r.knob]
                    found[r] = torch.where(at >= 0, at + call.key_start, at) if call.key_start else at
            else:
                tensor = made["at_weight" if name == "at" else name]
                found[r] = tensor[i] if name in ("distance", "mass", "received", "at") else tensor
    return found, out


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    blocks: Blocks | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention with gradients for query, key, value, bias and sinks, on the CPU. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]. causal: key j is visible to query i where
    j <= i + key - query, so that the last query sees all. window: and only the `window` newest of those; without
    causal, keys at most window - 1 away. mask, bias: broadcast to [batch, head, query, key]. Rows that see nothing give
    zeros.
    """
    if (why := why_not()) is not None:
        raise RuntimeError(f"native attention is not available: {why}")
    if mask is not None and mask.requires_grad:
        raise ValueError("a mask gets no gradient here; pass what is learned as `bias`")
    problem = _shapes(query, key, value, window, blocks)
    if problem:
        raise ValueError(problem)
    settings = _settings(query, key, scale=scale, causal=causal, window=window, blocks=blocks, softcap=softcap)
    return _attend(query, key, value, bias, sinks, mask, settings)


def part(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, **settings: Any
) -> tuple[Tensor, ...]:
    """Output, float32, and log-sum-exp [batch, head, query] of attention to some of the keys. No gradient.

    Takes the settings of `attention` but bias and sinks. Parts of the same rows are joined by their log-sum-exp, and
    `part_gradients` of each, given what is known of whole rows, add up. Of rows that see nothing it is -inf.
    """
    if problem := _shapes(query, key, value, settings.get("window"), settings.get("blocks")):
        raise ValueError(problem)
    out, lse = torch.empty(*query.shape[:3], value.shape[-1]), torch.empty(query.shape[:3])
    results = _Results(output=_tensor4(out), lse=lse.data_ptr())
    _Job(query, key, value, None, None, mask, **_settings(query, key, **settings)).run("forward", results)
    return out, lse


def part_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad: Tensor,
    *,
    mask: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a part gives to the gradients of query, key and value, float32.

    output [batch, head, query, dim], lse [batch, head, query] and the gradient `grad` of the output are those of whole
    rows, all parts joined.
    """
    gradients, lse = _Gradients(), lse.contiguous()
    gradients.lse = lse.data_ptr()
    settings = _settings(query, key, **settings)
    return _differentiate(query, key, value, None, None, mask, settings, output, gradients, grad)[:3]


def _settings(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    blocks: Blocks | None = None,
    softcap: float | None = None,
) -> dict[str, Any]:
    return {
        "scale": query.shape[-1] ** -0.5 if scale is None else float(scale),
        "softcap": softcap,
        "offset": key.shape[2] - query.shape[2],
        "blocks": blocks,
        **_limits(causal, window),
    }


def differentiable(call: Operands) -> Tensor:
    """The output of a call, with gradients. [batch, head, query, dim]"""
    settings = {"scale": call.scale, "softcap": call.softcap, **_limits(call.causal, None)}
    bias, mask = call.bias, call.mask
    if mask is not None and mask.requires_grad:  # it is learned, as a bias is
        bias, mask = (mask if bias is None else bias + mask), None
    bias = None if bias is None else cut(bias, 0, call.query.shape[2], call.key.shape[2])
    return _attend(call.query, call.key, call.value, bias, call.sinks, mask, settings)


def _limits(causal: bool, window: int | None) -> dict[str, int]:
    """How many keys a query sees to its left and to its right."""
    side = _EVERY if window is None else window - 1
    return {"left": side, "right": 0 if causal else side}


def _shapes(query: Tensor, key: Tensor, value: Tensor, window: int | None, blocks: Blocks | None) -> str | None:
    if problem := misfit(query, key, value):
        return problem
    if {query.dtype, key.dtype, value.dtype} - _FLOATS or query.dtype != key.dtype:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}: one of float32, bfloat16, float16 for all is needed"
    if {t.device.type for t in (query, key, value)} != {"cpu"}:
        return "native attention runs on the CPU"
    if window is not None and window < 1:
        return f"window={window}: a query sees itself at least"
    if blocks is not None:
        n_blocks = -(-query.shape[2] // blocks.query_size)
        if blocks.key_size % 32 or blocks.query_size < 1:
            return f"blocks of {blocks.query_size} queries and {blocks.key_size} keys: the latter is a multiple of 32"
        for tensor, name, ndim in ((blocks.counts, "counts", 3), (blocks.indices, "indices", 4)):
            if tensor.ndim != ndim or tensor.dtype != torch.int32 or tensor.shape[2] != n_blocks:
                return f"blocks.{name} is int32 [batch|1, head|1, query block={n_blocks}...]; got {list(tensor.shape)}"
        if blocks.counts.max() > blocks.indices.shape[3] or blocks.counts.min() < 0:
            return f"blocks.counts run from 0 to {blocks.indices.shape[3]}, the slots of blocks.indices"
        used = torch.arange(blocks.indices.shape[3]) < blocks.counts[..., None]
        listed = blocks.indices.expand(used.shape)[used]
        if listed.numel() and (listed.min() < 0 or listed.max() * blocks.key_size >= key.shape[2]):
            return f"blocks.indices name blocks outside the {key.shape[2]} keys"
    return None


def _attend(*arguments: Any) -> Tensor:
    return _in_torch(*arguments) if transformed(*arguments[:-1]) else _Attend.apply(*arguments)  # type: ignore[return-value]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Any, sinks: Any, mask: Any, settings: Any):
        # Laid out as models go on with it: heads side by side.
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]).transpose(1, 2)
        sums = torch.empty(2, *query.shape[:3])  # of each row, in two parts: a rounded log-sum-exp would lose digits
        results = _Results(output=_tensor4(out), reference=sums[0].data_ptr(), above=sums[1].data_ptr())
        _Job(query, key, value, bias, sinks, mask, **settings).run("forward", results)
        ctx.settings = settings
        ctx.save_for_backward(query, key, value, bias, sinks, mask, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        *inputs, out, sums = ctx.saved_tensors
        if again(grad):
            return *gradients(partial(_in_torch, settings=ctx.settings), grad, *inputs), None
        found = _Gradients(reference=sums[0].data_ptr(), above=sums[1].data_ptr())
        learned = {"bias": ctx.needs_input_grad[3], "sinks": ctx.needs_input_grad[4]}
        d_inputs = _differentiate(*inputs, ctx.settings, out, found, grad, **learned)
        d_query, d_key, d_value = (d.to(t.dtype) for d, t in zip(d_inputs[:3], inputs[:3], strict=True))
        return d_query, d_key, d_value, *d_inputs[3:], None, None


def _in_torch(
    query: Tensor, key: Tensor, value: Tensor, bias: Any, sinks: Any, mask: Any, settings: dict[str, Any]
) -> Tensor:
    """The same in plain torch, at the cost of all pairs."""
    mask, bias = (None if t is None else cut(t, 0, query.shape[2], key.shape[2]) for t in (mask, bias))
    met, rows = _met(query, key, settings), None
    if met is not None:
        rows = met.any(-1, keepdim=True)
        met = met | ~rows  # softmax over nothing has no derivative; what it gives is left out below
        boolean = mask is not None and mask.dtype == torch.bool
        if boolean and bias is not None:
            mask = mask | ~met  # beside a bias a mask only lowers scores; limits come after it
        if bias is None and (boolean or mask is None):
            mask = met if mask is None else mask & met
        else:
            limits = torch.zeros(met.shape).masked_fill(~met, float("-inf"))
            bias = limits if bias is None else bias + limits
    scale, softcap = settings["scale"], settings["softcap"]
    output = strips.output(Operands(query, key, value, scale, mask, False, bias, softcap, sinks))
    return output if rows is None else output.where(rows, 0.0)


def _met(query: Tensor, key: Tensor, settings: dict[str, Any]) -> Tensor | None:
    """Which pairs its limits leave to a call, [batch|1, head|1, query, key]; None: all."""
    n_query, n_key = query.shape[2], key.shape[2]
    apart = torch.arange(n_key) - torch.arange(n_query)[:, None] - settings.get("offset", 0)
    met = ((apart >= -settings["left"]) & (apart <= settings["right"]))[None, None]
    blocks: Blocks | None = settings.get("blocks")
    if blocks is not None:
        met = met & blocks.pairs(n_query, n_key)
    return None if met.all() else met


def _differentiate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_given: Tensor | None,
    sinks_given: Tensor | None,
    mask: Tensor | None,
    settings: Any,
    out: Tensor,
    gradients: _Gradients,
    grad: Tensor,
    *,
    bias: bool = False,
    sinks: bool = False,
) -> tuple[Any, ...]:
    """Gradients of query, key and value, in float32, and of bias and sinks where asked for.

    gradients: what is known of the sum of each row.
    """
    batch, heads, n_query, dim = query.shape
    group = heads // key.shape[1]
    gradients.output, gradients.grad = _tensor4(out), _tensor4(grad)
    d_query = torch.empty(batch, heads, n_query, dim)
    d_key = torch.empty(batch, heads, key.shape[2], dim)
    d_value = torch.empty(batch, heads, key.shape[2], value.shape[-1])
    d_sinks = torch.empty(batch, heads, n_query) if sinks_given is not None and sinks else None
    gradients.query, gradients.key, gradients.value = d_query.data_ptr(), d_key.data_ptr(), d_value.data_ptr()
    gradients.sinks = None if d_sinks is None else d_sinks.data_ptr()
    d_bias = None
    if bias_given is not None and bias:
        # Whole over what it is broadcast to, so that no two threads write one place.
        d_bias = torch.zeros(batch, heads, n_query, key.shape[2])
        gradients.bias = _tensor4(d_bias)
    _Job(query, key, value, bias_given, sinks_given, mask, **settings).run("backward", gradients)
    if group > 1:
        d_key, d_value = (t.unflatten(1, (-1, group)).sum(2) for t in (d_key, d_value))
    if bias_given is not None and d_bias is not None:
        d_bias = d_bias.sum_to_size(bias_given.shape).to(bias_given.dtype)
    if sinks_given is not None and d_sinks is not None:
        whole = (
            d_sinks.sum((0, 2)) if sinks_given.numel() == heads else d_sinks[..., None].sum_to_size(sinks_given.shape)
        )
        d_sinks = whole.reshape(sinks_given.shape).to(sinks_given.dtype)
    return d_query, d_key, d_value, d_bias, d_sinks


class _Job:
    """The arguments of one run, and what must stay alive meanwhile."""

    @classmethod
    def of_call(cls, call: Operands, window: int | None, blocks: Blocks | None) -> _Job:
        tensors = (call.query, call.key, call.value, call.bias, call.sinks, call.mask)
        return cls(*tensors, scale=call.scale, softcap=call.softcap, blocks=blocks, **_limits(call.causal, window))

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        mask: Tensor | None,
        *,
        scale: float,
        softcap: float | None = None,
        offset: int = 0,
        left: int = _EVERY,
        right: int = _EVERY,
        blocks: Blocks | None = None,
    ) -> None:
        batch, heads, n_query, dim = query.shape
        kv_heads, n_key = key.shape[1], key.shape[2]
        pairs = (batch, heads, n_query, n_key)
        self.held: list[Any] = [query, key, value, bias, sinks, mask, blocks]
        a = self.arguments = _Attention(
            batch, heads, kv_heads, n_query, n_key, dim, value.shape[-1], threads=torch.get_num_threads()
        )
        a.instructions = instructions()
        a.query = _tensor4(query)
        a.key, a.value = _tensor4(key.expand(batch, -1, -1, -1)), _tensor4(value.expand(batch, -1, -1, -1))
        if mask is not None:
            a.mask = self._pairs(mask, pairs)
        if bias is not None:
            a.bias = self._pairs(bias, pairs)
        if sinks is not None:
            sinks = sinks.reshape(1, heads, 1, 1) if sinks.numel() == heads else sinks
            a.sinks = self._pairs(sinks, (batch, heads, n_query, 1), torch.float32)
        a.scale, a.softcap = scale, softcap or 0.0
        # With a bias, transformers folds both into one additive mask, whose lowest value is finite.
        a.hidden = float("-inf") if bias is None else torch.finfo(key.dtype).min
        a.offset, a.left, a.right = offset, left, right
        if blocks is not None:
            counts = blocks.counts.expand(batch, heads, -1)
            indices = blocks.indices.expand(batch, heads, -1, -1)
            a.block_counts, a.block_indices = counts.data_ptr(), indices.data_ptr()
            a.count_stride, a.index_stride = (c_int64 * 3)(*counts.stride()), (c_int64 * 4)(*indices.stride())
            a.block_query, a.block_key = blocks.query_size, blocks.key_size

    def _pairs(self, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> _Tensor4:
        """A mask or bias, cut to the pairs of this call and broadcast to them."""
        tensor = cut(tensor, 0, shape[2], shape[3]).expand(shape)
        if dtype is not None or tensor.dtype not in _TYPES:
            tensor = tensor.to(dtype or torch.float32)
        self.held.append(tensor)
        return _tensor4(tensor)

    def run(self, what: str, results: _Results | _Gradients) -> None:
        code = getattr(_library(), f"regard_{what}")(byref(self.arguments), byref(results))
        if code == 1:
            raise MemoryError("not enough memory for the attention kernel")
        if code:
            raise RuntimeError(f"the attention kernel failed with code {code}")


def _tensor4(tensor: Tensor) -> _Tensor4:
    return _Tensor4(tensor.data_ptr(), (c_int64 * 4)(*tensor.stride()), _TYPES[tensor.dtype])
