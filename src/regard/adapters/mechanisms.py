"""Mechanisms as attention implementations of transformers: `model.set_attn_implementation("regard:power")`.

transformers is imported where a function needs it: importing it is what registers Regard's own, and these import this.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import shortened
from ..functions import innermost

_PREFIX = "regard:"
# What models hand on that changes no weight: bookkeeping, and windows that the mask holds already.
_HARMLESS = {
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "sliding_window",
    "use_cache",
}


def register(mechanism: Callable[..., Tensor], name: str | None = None) -> str:
    """Make a mechanism an attention implementation, and give the name that `set_attn_implementation` takes.

    Regard's own are registered under their names when it is imported: "regard:lightning-2", also written
    "regard:lightning_2". `flashbias` is "regard:bias", also written "regard:flashbias"; it adds ALiBi's bias to the
    scores, also of a model whose queries and keys are rotated, which then has both. Other knobs than the defaults need
    a name of their own. A padded row gets what its text gets alone; with a `shape`, or tensors, among the knobs, tokens
    stay where they are. What a mechanism cannot honour (softcap, sinks, position bias, dropout) is refused when the
    model runs, as are static caches.

        model.set_attn_implementation(register(partial(power, block=64), "power-64"))
    """
    function = innermost(mechanism)
    spec = getattr(function, "spec", None)
    if not hasattr(spec, "patterns"):
        raise TypeError(f"{mechanism!r} is not a mechanism: declare it with @regard.mechanisms.mechanism(...)")
    return _enter(f"{_PREFIX}{name or function.__name__}", partial(_forward, mechanism, spec))


def held(operator: Callable[..., Tensor]) -> str:
    """The implementation by which each attention module runs what it holds as `mechanism`, which does what
    `operator`, a declared one, is declared to do.
    """
    spec = innermost(operator).spec  # type: ignore[attr-defined]

    def run(name: str, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        own = getattr(module, "mechanism", None)
        if own is None:
            raise ValueError(f"{name}: {type(module).__name__} holds no mechanism; convert the model that it is in")
        return _forward(own, spec, name, module, *args, **kwargs)

    return _enter(f"{_PREFIX}{operator.__name__}-of-each-layer", run)


def _enter(name: str, run: Callable[..., tuple[Tensor, None]]) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface

    name = _registered(name)
    AttentionInterface.register(name, partial(run, name))
    AttentionMaskInterface.register(name, partial(_mask, name))
    return name


def _registered(name: str) -> str:
    """How a name is written here; transformers takes every one with "flash" in it for a kernel of that library."""
    return name.replace("_", "-").replace("flash", "")


def _known(name: Any) -> Any:
    """The registered name that is meant by one of Regard's; any other is left as it is. ValueError names near ones."""
    if not isinstance(name, str) or not name.startswith(_PREFIX):
        return name
    from transformers import AttentionInterface

    there = [n.removeprefix(_PREFIX) for n in AttentionInterface().valid_keys() if n.startswith(_PREFIX)]
    meant = _registered(name).removeprefix(_PREFIX)
    if meant not in there:
        near = difflib.get_close_matches(meant, there, n=3, cutoff=0.5)
        hint = f" (did you mean {' or '.join(_PREFIX + n for n in near)}?)" if near else ""
        raise ValueError(f"no mechanism {shortened(name)!r}{hint}; there are {', '.join(_PREFIX + n for n in there)}")
    return _PREFIX + meant


def understood() -> None:
    """Have transformers take the names of Regard's implementations as people write them."""
    from transformers import PreTrainedModel

    # Every way to choose an implementation goes through this method, which answers with the name that is kept.
    adjust = PreTrainedModel._check_and_adjust_attn_implementation

    @functools.wraps(adjust)
    def adjusted(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        return adjust(self, _known(attn_implementation), *args, **kwargs)

    PreTrainedModel._check_and_adjust_attn_implementation = adjusted  # type: ignore[method-assign]


def _forward(
    mechanism: Callable[..., Tensor],
    spec: Any,
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    given = sorted(k for k, v in others.items() if k not in _HARMLESS and v is not None and v is not False)
    if given or dropout:
        raise ValueError(
            f"{name} cannot honour {', '.join([*given, *['dropout'] * bool(dropout)])}, which "
            f"{type(module).__name__} asks for; set the model's attention dropout to 0, or run this model with "
            f'set_attn_implementation("eager")'
        )
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(
            f"{name} takes a boolean mask (True: visible); {type(module).__name__} hands on {attention_mask.dtype}, to "
            f'be added to scores, as position biases are; run this model with set_attn_implementation("sdpa")'
        )
    fixed = getattr(mechanism, "keywords", {})  # a knob that was given says more than the model: which axes are causal
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal and attention_mask is not None and attention_mask.shape[-2] > 1:
        # The mask says everything, and may show more than the past: a prefix, or the pictures of a prompt.
        causal = not bool(attention_mask.triu(key.shape[2] - query.shape[2] + 1).any())
    run = partial(mechanism, **{"causal": causal, **fixed, "scale": scaling if spec.scaled else None})
    itself = causal or (query.shape[2] == key.shape[2] and not _crosses(module))
    if _placed(mechanism):
        output = run(query, key, value, mask=attention_mask)
    else:
        ahead = spec.ahead or spec.whole  # what runs on all queries at once may be made for as many as there are
        output = alone(run, [query], [key, value], attention_mask, itself=itself, ahead=ahead)
    return output.transpose(1, 2).contiguous(), None


def _placed(mechanism: Callable[..., Tensor]) -> bool:
    """Whether it was given what says where each token lies, or keeps something of each, so that all have to stay."""
    knobs = getattr(mechanism, "keywords", {})
    return isinstance(mechanism, nn.Module) or any(k == "shape" or _holds_tensors(v) for k, v in knobs.items())


def _holds_tensors(knob: Any) -> bool:
    return isinstance(knob, Tensor) or (isinstance(knob, tuple | list) and any(map(_holds_tensors, knob)))


def _crosses(module: nn.Module) -> bool:
    """Whether a module that is not causal looks at another sequence, of as many tokens by chance."""
    kind = type(module).__name__
    return bool(getattr(module, "is_cross_attention", "Cross" in kind) or getattr(module, "is_decoder", False))


def alone(
    run: Callable[..., Tensor],
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    mask: Tensor | None,
    *,
    itself: bool,
    ahead: bool,
) -> Tensor:
    """run(*queries, *keys, mask=) on rows of the batch without the padding before them, and with `ahead` after them.

    Blocks and the like are counted from the first key, and what is chosen among all keys depends on how many there are:
    so each row gets what it would get alone. Rows of as much padding go together. itself: the queries are the last of
    the keys; those that stand in padding get zeros.
    """
    if mask is None:
        return run(*queries, *keys, mask=None)
    n_query, n_key = queries[0].shape[2], keys[0].shape[2]
    spans = _spans(mask, n_key, ahead).expand(len(keys[0]), -1)
    if (spans == spans.new_tensor([0, n_key])).all():
        return run(*queries, *keys, mask=mask)
    mask = mask.expand(len(spans), -1, -1, n_key)
    output = keys[-1].new_zeros(*queries[0].shape[:3], keys[-1].shape[-1])
    found, of = spans.unique(dim=0, return_inverse=True)
    for i, (first, end) in enumerate(found.tolist()):
        rows, there, asked = (of == i).nonzero().flatten(), slice(first, end), slice(0, n_query)
        if itself:
            asked = slice(*(max(at - n_key + n_query, 0) for at in (first, end)))
        if asked.start < asked.stop:
            inside = mask[rows, :, asked if mask.shape[2] > 1 else slice(None), there]
            few = [*(t[rows, :, asked] for t in queries), *(t[rows, :, there] for t in keys)]
            output[rows, :, asked] = run(*few, mask=None if inside.all() else inside)
    return output


def _spans(mask: Tensor, n_key: int, ahead: bool) -> Tensor:
    """Of each row, where the keys that a query sees begin, and with `ahead` end. [batch|1, 2]"""
    there = mask.flatten(1, 2).any(1).expand(-1, n_key).int()
    first, end = there.argmax(1), n_key - there.flip(1).argmax(1)
    return torch.stack([first, end if ahead else torch.full_like(end, n_key)], 1)


def _mask(
    name: str,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """None where every key is there, otherwise boolean: which keys there are [batch, 1, 1, key] where that and
    causality say all, else which pairs are visible [batch, 1, query, key].
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    mask_function = mask_function or causal_mask_function
    if mask_function is not bidirectional_mask_function and q_offset + q_length != kv_offset + kv_length:
        raise ValueError(
            f"{name} takes the newest key to be that of the last query, so it cannot use a static cache, which is "
            f"longer than what it holds; generate with the default cache"
        )
    whole = mask_function in (causal_mask_function, bidirectional_mask_function)
    others |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": whole}
    if whole:
        q_length, mask_function = 1, bidirectional_mask_function
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **others)
