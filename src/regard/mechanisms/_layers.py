"""Attention modules of a model, and others in their place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import bool as bool_
from torch.nn import functional as F

from ..adapters.mechanisms import held

OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")


def attentions(model: nn.Module, projection: str | None, asked_by: str) -> dict[str, tuple[nn.Module, str]]:
    """Attention modules by name, each with the name of its output projection, the usual ones unless given."""
    outputs, found = (projection,) if projection else OUTPUTS, {}
    for name, module in model.named_modules():
        output = next((p for p in outputs if isinstance(getattr(module, p, None), nn.Module)), None)
        if re.search(r"Attention$", type(module).__name__) and output:
            found[name] = (module, output)
    if not found:
        kinds = sorted({n for m in model.modules() if (n := type(m).__name__).endswith("Attention")})
        others = f", and {', '.join(kinds)} have it elsewhere or by another name" if kinds else ""
        raise ValueError(
            f"{asked_by}: {type(model).__name__} has no module called ...Attention that holds its output projection, "
            f"called {' or '.join(outputs)}{others}; it takes attention that does, as in Llama, CLIP, Siglip and ViT "
            f"(name it with projection=..., where that is taken)"
        )
    return found


def no_class_token(model: nn.Module, asked_by: str) -> None:
    """Raise ValueError where a model puts tokens of its own beside those of the picture."""
    if beside := [n for n, _ in model.named_parameters() if re.search(r"(cls|class|dist\w*|register)_(token|emb)", n)]:
        raise ValueError(
            f"{asked_by}: {type(model).__name__} has {', '.join(beside)}, which has no place in windows of a picture; "
            f"it takes encoders whose tokens are those of the picture alone, as Siglip's"
        )


def channels(projection: nn.Module) -> tuple[int, int]:
    """Of the layer's input, and of all heads' outputs together, by the output projection."""
    weight = cast(Tensor, projection.weight)
    # transformers' Conv1D holds the transpose of what a linear layer does
    dim, mixed = weight.shape if isinstance(projection, nn.Linear) else weight.shape[::-1]
    return dim, mixed


def heads_of(attention: nn.Module, name: str, output: str, asked_by: str) -> tuple[int, int, int]:
    """Channels of a head, heads, and key heads of an attention module."""
    dim = getattr(attention, "head_dim", None)
    if dim is None:
        raise ValueError(f"{asked_by}: {name} does not say its head_dim")
    heads = channels(attention.get_submodule(output))[1] // dim
    keys = getattr(attention, "k_proj", None)
    return dim, heads, channels(keys)[0] // dim if isinstance(keys, nn.Linear) else heads


def own(
    model: nn.Module, operator: Callable[..., Any], made: Callable[[int, int, int], nn.Module]
) -> Callable[[], None]:
    """Give every attention of a model an operator of its own; gives the function that takes it away.

    made(dim, heads, kv_heads), of a head's channels and their numbers, is kept as the child `mechanism` of the
    attention module, with its dtype and device, and called with query, key, value, causal, mask and scale. operator:
    what is declared, which says what is supported. The model is one of transformers'.
    """
    name = operator.__name__
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(f"{name}: {type(model).__name__} is no model of transformers; call the module yourself")
    found = attentions(model, None, name)
    if already := [n for n, (attention, _) in found.items() if hasattr(attention, "mechanism")]:
        raise ValueError(f"{name}: {already[0]} has a mechanism of its own already; undo that first")
    modules = {n: made(*heads_of(attention, n, output, name)) for n, (attention, output) in found.items()}
    for n, (attention, _) in found.items():
        attention.mechanism = modules[n].to(next(attention.parameters()))
    before = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation(held(operator))  # type: ignore[operator]

    def undo() -> None:
        model.set_attn_implementation(before)  # type: ignore[operator]
        for attention, _ in found.values():
            del attention.mechanism

    return undo


def replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Put modules where others are, by name; gives the function that puts the old ones back."""
    before = {name: model.get_submodule(name) for name in modules}
    _put(model, modules)
    return lambda: _put(model, before)


class Replacing(nn.Module):
    """A layer in the place of an attention module: takes what that takes, and gives what it gives, without weights."""

    def __init__(self, layer: nn.Module, attention: nn.Module, asked_by: str) -> None:
        super().__init__()
        self.layer, self.asked_by = layer, asked_by
        self.kind = type(attention).__name__

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        others = ("past_key_values", "encoder_hidden_states", "key_value_states")
        caches = [name for name in others if kwargs.get(name) is not None]
        if caches or args:
            raise ValueError(
                f"{self.asked_by}: in place of {self.kind}, {' and '.join(caches) or 'more than hidden states'} cannot "
                f"be taken in: it is self-attention over all tokens at once, so run the model with use_cache=False"
            )
        if attention_mask is None or _hides_nothing(attention_mask, getattr(self.layer, "causal", False)):
            return self.layer(hidden_states), None
        raise ValueError(
            f"{self.asked_by}: in place of {self.kind}, a mask cannot be honoured; give sequences of one length"
        )


def _hides_nothing(mask: Tensor, causal: bool) -> bool:
    """Whether a mask of pairs, boolean or added to scores, hides no more than causality."""
    seen = mask if mask.dtype is bool_ else mask > -1
    return bool(seen[..., -1, :].all()) and (causal or bool(seen.all()))


def exchanged(
    model: nn.Module, made: Callable[[nn.Module, int], nn.Module], projection: str | None, asked_by: str
) -> Callable[[], None]:
    """Put what is made of each attention and the channels of its input in its place; gives what undoes it.

    torch's own MultiheadAttention, with which models pool, stays as it is.
    """
    if already := [name for name, m in model.named_modules() if isinstance(m, Replacing) and m.asked_by == asked_by]:
        raise ValueError(f"{asked_by}: {already[0]} is one already; undo that first")
    layers: dict[str, nn.Module] = {}
    for name, (attention, output) in attentions(model, projection, asked_by).items():
        if isinstance(attention, nn.MultiheadAttention):
            continue
        weight = next(attention.parameters())
        layer = made(attention, channels(attention.get_submodule(output))[0]).to(weight.device, weight.dtype)
        layers[name] = Replacing(layer, attention, asked_by).train(attention.training)
    return replace(model, layers)


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


class SelfAttention(nn.Module):
    """Softmax self-attention, of the names that transformers' models have. [batch, token, dim] to the same"""

    def __init__(self, dim: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not share {dim} channels evenly")
        self.heads, self.head_dim, self.causal = heads, dim // heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.ndim != 3:
            raise ValueError(f"SelfAttention: takes hidden [batch, token, dim]; got {list(hidden.shape)}")
        parts = [
            p(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        ]
        output = F.scaled_dot_product_attention(*parts, is_causal=self.causal)
        return self.o_proj(output.transpose(1, 2).flatten(2))


def projections(attention: nn.Module, asked_by: str) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """Linear layers of query, key, value and output, by their usual names."""
    names = [("q_proj", "query", "q_lin"), ("k_proj", "key", "k_lin"), ("v_proj", "value", "v_lin"), OUTPUTS]
    found = [next((m for n in of if isinstance(m := getattr(attention, n, None), nn.Linear)), None) for of in names]
    missing = [of[0] for of, module in zip(names, found, strict=True) if module is None]
    if missing:
        raise ValueError(
            f"{asked_by}: {type(attention).__name__} has no linear layer called {', '.join(missing)}; it takes "
            f"attention whose query, key, value and output each have one"
        )
    return cast(tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear], tuple(found))


def not_causal(attention: nn.Module, asked_by: str) -> None:
    if getattr(attention, "is_causal", False):
        raise ValueError(
            f"{asked_by}: {type(attention).__name__} is causal; this sees all tokens, and takes models that do"
        )


def square(
    attention: nn.Module, dim: int, asked_by: str
) -> tuple[int, tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]]:
    """How many heads, and the projections, of attention with as many key as query heads, `dim` channels together."""
    parts, width = projections(attention, asked_by), getattr(attention, "head_dim", None)
    if width is None or any(part.weight.shape != (dim, dim) for part in parts):
        raise ValueError(
            f"{asked_by}: takes attention that says its head_dim and has as many key heads as query heads, of {dim} "
            f"channels together; {type(attention).__name__} is another"
        )
    return dim // width, parts


@torch.no_grad()
def fill(layer: nn.Linear | nn.Conv2d, *parts: nn.Linear) -> None:
    """Give a layer, or a convolution of one pixel, the weights of these one after the other."""
    weight = torch.cat([part.weight for part in parts])
    layer.weight.copy_(weight.view_as(layer.weight))
    if layer.bias is not None:
        missing = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
        layer.bias.copy_(torch.cat(missing))


def distilled(
    model: nn.Module,
    modules: Sequence[Any],
    learned: Iterable[nn.Parameter],
    batches: Iterable[Mapping[str, Tensor]],
    rate: float,
    loss: Callable[[Any], Tensor] = lambda module: module.loss,
) -> list[float]:
    """Train what modules of a model learn from its own attention, and nothing else; the loss of each step, their mean.

    modules: keep what they lose as `loss` while they are `learning`.
    """
    parts = dict.fromkeys(learned)
    optimizer, losses = torch.optim.Adam(parts, rate), []
    needed = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in needed:
            p.requires_grad_(p in parts)
        for m in modules:
            m.learning = True
        for inputs in batches:
            model(**inputs)
            lost = torch.stack([loss(m) for m in modules if m.loss is not None]).mean()
            optimizer.zero_grad()
            lost.backward()
            optimizer.step()
            losses.append(float(lost.detach()))
    finally:
        for p, need in needed.items():
            p.requires_grad_(need)
        for m in modules:
            m.learning, m.loss = False, None
    return losses
