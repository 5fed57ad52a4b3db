"""Mechanisms as attention implementations of transformers: `model.set_attn_implementation("regard:power")`.

transformers is imported where a function needs it: importing it is what registers Regard's own, and these import this.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

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
    a name of their own. What a mechanism cannot honour (softcap, sinks, position bias, dropout) is refused when the
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
    fixed = getattr(mechanism, "keywords", {})  # a knob that was given says more than the model: which axes are causal
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal and attention_mask is not None and attention_mask.shape[-2] > 1:
        # The mask says everything, and may show more than the past: a prefix, or the pictures of a prompt.
        causal = not bool(attention_mask.triu(key.shape[2] - query.shape[2] + 1).any())
    scale = scaling if spec.scaled else None
    output = mechanism(query, key, value, **{"causal": causal, **fixed, "mask": attention_mask, "scale": scale})
    return output.transpose(1, 2).contiguous(), None


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
