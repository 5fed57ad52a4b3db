"""The fused CPU kernel: output and reductions in one pass, and the gradient of the output. docs/kernel.md.

The library is plain C++ that takes pointers, shapes and strides, so it is found by name and loaded with ctypes; where
it was not built, or on a machine that cannot load it, `why_not` says so and nothing else of Regard changes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from ctypes import c_char_p, c_int64
from functools import cache, partial
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import library
from .. import strips
from ..derivatives import again, gradients, transformed
from ..operands import Chosen, Operands, Reduction
from ..strips import cut, misfit, stack

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
_FLOATS = _TYPES.keys() - {torch.bool}
_ROWWISE = {"entropy", "maximum", "squares", "distance", "mass", "at", "top_weights", "top_keys", "received", "lse"}
_EVERY = 2**40  # keys to either side: no limit
# What the library writes to. Said each time, since torch's defaults are those of the process: another thread that
# loads a model in half precision changes them meanwhile.
FLOAT: Any = {"dtype": torch.float32, "device": "cpu"}
empty = partial(torch.empty, **FLOAT)


# The structures of attention.h, whose every field takes 8 bytes: packed anew for each call, which for one token has to
# be quick. A tensor is six words: where it lies, four strides and a type.
_ABSENT = (0,) * 6
_ATTENTION = Struct("@7q36q3d3q2q3q4q3q")
_OF_RESULTS = dict.fromkeys(
    [
        *("lse", "reference", "above", "entropy", "maximum", "squares"),
        *("n_distance", "clips", "start", "distance"),
        *("n_mass", "mass_stride", "sets", "mass"),
        *("n_received", "received_stride", "groups", "received"),
        *("k", "top", "top_at"),
        *("n_at", "at_stride", "at", "at_weight"),
        "given_lse",
    ],
    0,
)
_RESULTS = Struct(f"@6q{len(_OF_RESULTS)}q")
_OF_GRADIENTS = dict.fromkeys(["lse", "reference", "above", "query", "key", "value"], 0)
_GRADIENTS = Struct(f"@12q{len(_OF_GRADIENTS)}q6qq")
_GRID, _GRID_ROWS = Struct("@11q18q4q2qdq"), Struct("@12q6q")


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
    """The library, or why there is none that fits these structures."""
    found = library.load()
    if isinstance(found, str):
        return found
    for name in library.PASSES:
        getattr(found, f"regard_{name}").argtypes = [c_char_p, c_char_p]
    structures = _ATTENTION, _RESULTS, _GRADIENTS, _GRID, _GRID_ROWS
    if [found.regard_sizes(c_int64(i)) for i in range(len(structures))] != [s.size for s in structures]:
        return f"the kernel at {found._name} was built from another version of regard"
    return found


def why_not() -> str | None:
    """Why the kernel is not in use at all; None where it is."""
    if (why := library.why_not()) is not None:
        return why
    found = _library()
    return found if isinstance(found, str) else None


def describe() -> str:
    """Instruction set and threads in use, for people."""
    found = _library()
    assert not isinstance(found, str)
    pool = "PyTorch's OpenMP threads" if found.regard_openmp() else "threads of its own"
    return f"{library.describe()}, {torch.get_num_threads()} of {pool}"


def refusal(call: Operands, wanted: Iterable[Reduction] = ()) -> str | None:
    """Why this kernel cannot do this call; None where it can."""
    if "native" not in call.notes:
        call.notes["native"] = _unfit(call)
    if (why := call.notes["native"]) is not None:
        return why
    for r in wanted:
        if r.name not in _ROWWISE:
            return f"no reduction {r.name}"
    return None


def _unfit(call: Operands) -> str | None:
    if (why := why_not()) is not None:
        return why
    if not call.query.is_cpu:
        return f"tensors on {call.query.device}"
    for tensor in (call.query, call.key, call.value):
        if tensor.dtype not in _FLOATS:
            return f"dtype {tensor.dtype}"
    return "an intervention edits weights" if call.edits else None


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
    wanted = list(wanted)
    batch, heads, n_query = rows = tuple(call.query.shape[:3])
    n_key = call.key.shape[2]
    numbers = {"start": call.query_start - call.key_start}  # and strides
    made: dict[str, Tensor] = {}  # and given, by the names of their fields
    by_name: dict[str, list[Reduction]] = {}
    for r in wanted:
        by_name.setdefault("top" if r.name.startswith("top_") else r.name, []).append(r)

    def sets(asked: list[Reduction], name: str, n: int, dtype: torch.dtype = torch.float32) -> None:
        """Sets of positions, one for all of the batch or each its own."""
        made[name] = stack([r.knob.where for r in asked]).to(dtype).contiguous()
        stride = "received_stride" if name == "groups" else "mass_stride" if name == "sets" else "at_stride"
        numbers[stride] = len(asked) * n if len(made[name]) > 1 else 0

    for name, asked in by_name.items():
        match name:
            case "lse" | "entropy" | "maximum" | "squares":
                made[name] = empty(rows)
            case "distance":
                made["clips"] = torch.tensor([-1.0 if r.knob is None else float(r.knob) for r in asked], **FLOAT)
                made[name] = empty(len(asked), *rows)
            case "mass":
                sets(asked, "sets", n_key)
                made[name] = empty(len(asked), *rows)
            case "received":
                if any(r.knob is not None for r in asked):
                    everyone = Chosen(torch.ones(1, n_query, dtype=torch.bool))
                    sets([r if r.knob else Reduction(name, everyone) for r in asked], "groups", n_query)
                made[name] = empty(len(asked), batch, heads, n_key)
            case "top":
                numbers["k"] = max(r.knob for r in asked)
                made[name] = empty(*rows, numbers["k"])
                made["top_at"] = torch.empty(*rows, numbers["k"], dtype=torch.int64, device="cpu")
            case "at":
                sets(asked, "at", n_query, torch.int64)
                made["at_weight"] = empty(len(asked), *rows)
        if (count := f"n_{name}") in _OF_RESULTS:
            numbers[count] = len(asked)
    if lse is not None:
        made["given_lse"] = lse.float().contiguous()
    # Laid out as models go on with it: heads side by side.
    out = call.query.new_empty(batch, n_query, heads, call.value.shape[-1]).transpose(1, 2) if output else None
    settings = {"scale": call.scale, "softcap": call.softcap, "blocks": blocks, **_limits(call.causal, window)}
    inputs = call.query, call.key, call.value, call.bias, call.sinks, call.mask
    _run("forward", _results(out, made, **numbers), *inputs, **settings)

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
    zeros; with a bias, all keys alike, as transformers does.
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
    out, lse = empty(*query.shape[:3], value.shape[-1]), empty(query.shape[:3])
    results = _results(out, {"lse": lse})
    _run("forward", results, query, key, value, None, None, mask, **_settings(query, key, **settings))
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
    settings, sums = _settings(query, key, **settings), {"lse": lse.contiguous()}
    return _differentiate(query, key, value, None, None, mask, settings, output, sums, grad)[:3]


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
    if not len(query):
        return f"attention takes a batch of one sequence or more; got query {list(query.shape)}"
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
        # The sum of each row in two parts: a rounded log-sum-exp would lose digits.
        reference, above = empty(query.shape[:3]), empty(query.shape[:3])
        results = _results(out, {"reference": reference, "above": above})
        _run("forward", results, query, key, value, bias, sinks, mask, **settings)
        ctx.settings = settings
        ctx.save_for_backward(query, key, value, bias, sinks, mask, out, reference, above)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        *inputs, out, reference, above = ctx.saved_tensors
        if again(grad):
            return *gradients(partial(_in_torch, settings=ctx.settings), grad, *inputs), None
        sums = {"reference": reference, "above": above}
        learned = {"bias": ctx.needs_input_grad[3], "sinks": ctx.needs_input_grad[4]}
        query, key, value, bias, sinks, mask = inputs
        d_inputs = _differentiate(query, key, value, bias, sinks, mask, ctx.settings, out, sums, grad, **learned)
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
        if mask is not None and boolean and bias is not None:
            mask = mask | ~met  # beside a bias a mask only lowers scores; limits come after it
        if bias is None and (boolean or mask is None):
            mask = met if mask is None else mask & met
        else:
            limits = torch.zeros(met.shape, **FLOAT).masked_fill(~met, float("-inf"))
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
    sums: dict[str, Tensor],
    grad: Tensor,
    *,
    bias: bool = False,
    sinks: bool = False,
) -> tuple[Any, ...]:
    """Gradients of query, key and value, in float32, and of bias and sinks where asked for.

    sums: of each row, its log-sum-exp (lse), or that in two parts (reference, above).
    """
    batch, heads, n_query, dim = query.shape
    group = heads // key.shape[1]
    found = {
        "query": empty(batch, heads, n_query, dim),
        "key": empty(batch, heads, key.shape[2], dim),
        "value": empty(batch, heads, key.shape[2], value.shape[-1]),
    }
    d_sinks = empty(batch, heads, n_query) if sinks_given is not None and sinks else None
    # Whole over what it is broadcast to, so that no two threads write one place.
    d_bias = torch.zeros(batch, heads, n_query, key.shape[2], **FLOAT) if bias_given is not None and bias else None
    words = _OF_GRADIENTS | {name: tensor.data_ptr() for name, tensor in (sums | found).items()}
    last = 0 if d_sinks is None else d_sinks.data_ptr()
    results = _GRADIENTS.pack(*_tensor(out), *_tensor(grad), *words.values(), *_tensor(d_bias), last)
    _run("backward", results, query, key, value, bias_given, sinks_given, mask, **settings)
    d_query, d_key, d_value = found.values()
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


def _run(
    what: str,
    results: bytes,
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
    if len(key) != batch:
        key, value = key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
    # With a bias, transformers folds both into one additive mask, whose lowest value is finite.
    hidden = -math.inf if bias is None else torch.finfo(key.dtype).min
    mask, bias = _broadcast(mask, pairs), _broadcast(bias, pairs)
    if sinks is not None:
        sinks = sinks.reshape(1, heads, 1, 1) if sinks.numel() == heads else sinks
        sinks = _broadcast(sinks.float(), (batch, heads, n_query, 1))
    listed: tuple[int, ...] = (0,) * 11
    if blocks is not None:
        counts, indices = blocks.counts.expand(batch, heads, -1), blocks.indices.expand(batch, heads, -1, -1)
        listed = (counts.data_ptr(), indices.data_ptr(), *counts.stride(), *indices.stride())
        listed += (blocks.query_size, blocks.key_size)
    arguments = _ATTENTION.pack(
        *(batch, heads, kv_heads, n_query, n_key, dim, value.shape[-1]),
        *(word for tensor in (query, key, value, mask, bias, sinks) for word in _tensor(tensor)),
        *(scale, softcap or 0.0, hidden),
        *(offset, left, right),
        *listed,
        torch.get_num_threads(),
    )
    _call(what, arguments, results)


def _call(what: str, arguments: bytes, results: bytes) -> None:
    code = getattr(_library(), f"regard_{what}")(arguments, results)
    if code == 1:
        raise MemoryError("not enough memory for the attention kernel")
    if code == 3:
        library.instructions()  # says what is wrong with what was asked
    if code:
        raise RuntimeError(f"the attention kernel failed with code {code}")


def _results(output: Tensor | None, tensors: dict[str, Tensor], **numbers: int) -> bytes:
    """What the forward pass writes, and is given for it; the caller keeps the tensors alive."""
    words = _OF_RESULTS | {name: tensor.data_ptr() for name, tensor in tensors.items()} | numbers
    return _RESULTS.pack(*_tensor(output), *words.values())


def _broadcast(tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A mask or bias, cut to the pairs of this call and broadcast to them."""
    if tensor is None:
        return None
    tensor = cut(tensor, 0, shape[2], shape[3]).expand(shape)
    return tensor if tensor.dtype in _TYPES else tensor.float()


def _tensor(tensor: Tensor | None) -> tuple[int, ...]:
    return _ABSENT if tensor is None else (tensor.data_ptr(), *tensor.stride(), _TYPES[tensor.dtype])
