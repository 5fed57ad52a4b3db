"""What the methods of this room have in common."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import sites
from ..call import Call
from ..kernels import Factor
from ..loading import parameters
from ..names import vocabulary

STACK = "language_model"
NOTHING = -150.0  # of e^ this times a weight, float32 keeps nothing


class Method:
    """One method of this room, made by its knobs; `fit` also takes what it is to be used on."""

    off: ClassVar[Mapping[str, Any]] = {}  # knobs with which it changes nothing
    needs: ClassVar[str] = ""  # what `fit` finds on the model; nothing where knobs say all

    @classmethod
    def fit(cls, model: nn.Module, inputs: Mapping[str, Any], processor: Any = None, **knobs: Any) -> Self:
        """The method for `model` that is about to read `inputs`; here, knobs alone say all.

        processor: of the model, for a method that calibrates on texts or pictures of its own.
        """
        return cls(**knobs)


def layers(model: nn.Module, method: str) -> list[int]:
    """The layers of the language model; ValueError, which names the method, where there is none."""
    found = sorted({site.layer for site in sites.find(model).values() if site.stack == STACK})
    if not found:
        stacks = sorted({site.stack for site in sites.find(model).values()})
        raise ValueError(
            f"{method} is for language models that read from left to right; {type(model).__name__} has "
            f"{', '.join(stacks) or 'no attention'}"
        )
    return found


def picture_tower(model: nn.Module, method: str) -> tuple[nn.Module, str, list[int]]:
    """The part of a model that is given pictures alone, its stack and the stack's layers; ValueError without one."""
    towers: dict[str, tuple[nn.Module, list[int]]] = {}
    for site in sites.find(model).values():
        holders = [holder for holder, _, _ in sites.links(model, site.name)]
        taken = ((holder, parameters(holder)) for holder in reversed(holders))
        reads = next(((h, names) for h, names in taken if {"pixel_values", "input_ids"} & set(names)), None)
        if reads is not None and "input_ids" not in reads[1] and re.search(r"\.\d+\.", site.name):
            towers.setdefault(site.stack, (reads[0], []))[1].append(site.layer)
    if len(towers) != 1:
        raise ValueError(
            f"{method} is for a model with a tower of layers that sees pictures, such as ViT, DINOv2 or CLIP; "
            f"{type(model).__name__} has {', '.join(towers) or 'none'}"
        )
    ((stack, (tower, layers)),) = towers.items()
    return tower, stack, layers


def require(model: nn.Module, method: str, wanted: Iterable[int], otherwise: str) -> None:
    """ValueError, which names the method and what to do otherwise, where the language model lacks a layer."""
    if missing := set(wanted) - set(layers(model, method)):
        raise ValueError(f"{method}: {type(model).__name__} has no layer {min(missing)}: {otherwise}")


def log_factor(factor: Tensor) -> Tensor:
    """The logarithm of what weights are to be times: what is to be none is so little that nothing is left of it."""
    return factor.float().log().clamp(min=NOTHING)


def known(call: Call, heads: Collection[int], method: str) -> None:
    """ValueError, which names the method, where a call has not all these heads."""
    n = call.query.shape[1]
    if missing := [head for head in heads if not 0 <= head < n]:
        raise ValueError(f"{method}: {call.site} has {n} heads, and no head {missing[0]}")


def padded_left(inputs: Mapping[str, Any], method: str) -> None:
    """ValueError, which names the method, where a row of a batch does not end with its last word."""
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError(f"{method}: rows are padded on the right; pad them on the left, as for generate")


def at_prompt(call: Call, values: Tensor, method: str) -> Tensor:
    """What is known of the tokens of a prompt, [batch, token], of the keys of a call; 0 of others. [batch, key]"""
    if len(values) not in (1, len(call.key)):
        raise ValueError(f"{method} was fitted to a batch of {len(values)}, and the model reads {len(call.key)} rows")
    n_key = call.key.shape[2]
    if call.positions is not None:
        values = functional.pad(
            values.to(call.key.device), (0, max(0, int(call.positions.max()) + 1 - values.shape[1]))
        )
        return values.expand(len(call.key), -1).gather(1, call.positions)
    values = values[:, call.key_start : call.key_start + n_key].to(call.key.device)
    return functional.pad(values, (0, n_key - values.shape[1]))


def at_last(call: Call, keys: Tensor) -> Call:
    """The call with the weights of its last query times exp(keys), [batch|1, head|1, key]; they sum to one again."""
    last = functional.one_hot(torch.tensor(call.query.shape[2] - 1), call.query.shape[2])
    return call.scaled(Factor(last.to(keys)[None, None], keys))


def scores(call: Call, query: int, method: str) -> Tensor:
    """Scores of one query before softmax, masks apart. [batch, head, key]; ValueError where there are none."""
    if call.edits:
        raise ValueError(
            f"{method} reads scores, and of {call.site} there are weights only: the module computes them by itself, or "
            f"a method that edits them comes before; put {method} first"
        )
    n_key, groups = call.key.shape[2], call.query.shape[1] // call.key.shape[1]
    key = call.key.float().repeat_interleave(groups, dim=1)
    found = call.scale * (key @ call.query[:, :, query, :, None].float())[..., 0]
    if call.softcap is not None:
        found = call.softcap * (found / call.softcap).tanh()
    bias = [factor.bias(query, query + 1, n_key) for factor in call.factors]
    if call.bias is not None:
        bias.append(call.bias[..., query : query + 1, :] if call.bias.shape[-2] > 1 else call.bias)
    return found + sum(some[..., 0, :].float() for some in bias)


def image_ids(model: nn.Module, method: str) -> set[int]:
    """Ids that stand for patches of a picture among the words; ValueError, which names the method, where none do."""
    found = vocabulary(model, None)["image"]
    if not found:
        raise ValueError(
            f"{method} is for models that read image tokens among words, such as LLaVA; {type(model).__name__} has none"
        )
    return found


def image_tokens(model: nn.Module, ids: Tensor, method: str) -> Tensor:
    """Which of these ids stand for patches of a picture. [batch, token] boolean; ValueError as `image_ids`"""
    return torch.isin(ids, ids.new_tensor(sorted(image_ids(model, method))))


def image_keys(call: Call) -> Tensor | None:
    """Which keys of a call of the language model are image tokens; None where there are none. [batch, key] boolean"""
    if call.site.stack != STACK or call.tokens is None:
        return None
    image = call.tokens.role("image")
    return image if image.any() else None
