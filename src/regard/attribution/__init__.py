"""Attribution: input tokens, pixels or sound scored for one prediction.

Each file holds one method, of the same name as the file: `name(model, inputs, target, *, knobs) -> DataArray`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from .. import catalog
from ..call import UnreachableAttention
from ..prediction import Index, Pool, Question, Target, evaluating, speaks
from ..recording import statistic
from ..seam import record
from ..tokens import Tokens
from ._words import joined


def attribute(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: Target | str = None,
    *,
    against: Index | str = None,
    at: Index = None,
    over: str | None = None,
    beside: Mapping[str, Any] | Tensor | None = None,
    pool: Pool | None = None,
    output: str | None = None,
    words: bool = False,
    method: str = "integrated_gradients",
    processor: Any = None,
    **knobs: Any,
) -> xr.DataArray:
    """Score each token or pixel of `inputs` for one prediction. [batch, token] or [batch, row, column]

    inputs: what the processor gives, as the model takes it. target: a class or token id, or one for each sample; the
    name of a class, or, with a processor, a text of one token; None for the model's own prediction; or a whole
    `Question`, of which what else is given here takes the place. against: another, whose logit is taken away: why the
    target and not that.

    What is predicted the model's output says. Logits of classes: a class. Of a model that writes: the next token at the
    last position that is not padding; of an encoder and a decoder without decoder inputs, what it says first. Of one
    that fills gaps: the one token that is masked, with a processor, or the position `at`. Of pairs of texts and
    pictures, how alike they are: `over` says which side is scored. Of embeddings alone, how alike this one is to that
    of `beside`, as a cosine; `pool` ("mean", "cls", "last") makes one of hidden states. Where there are several
    outputs, `output` names one.

    over: which input is scored, such as "decoder_input_ids"; the model's main one otherwise. words: whether sub-words
    are joined, their scores added; needs a processor. method: a file of `regard/attribution`, whose `knobs` follow.
    processor: for the coordinate `text`.

    The attribute `knows_target` is False of a method that gives every target the same scores, also `against` another.

    Beside the scores there are the coordinates `target` and `score`, the logit that is explained, and of patches among
    tokens `image`, `row` and `column` (-1: no patch). Several choices have the axes [batch, choice, token],
    spectrograms [batch, row, column] as the model takes them, films [batch, step, row, column].

    The model is left as it was found. ValueError where the method cannot be had of this model; KeyError for a method
    that is not there.

    >>> import regard
    >>> model, tokenizer = regard.load("namer")
    >>> inputs = tokenizer("the baker sang , feeling merry .", return_tensors="pt")
    >>> found = regard.attribute(model, inputs, "joy", processor=tokenizer)
    >>> str(found.text[0, found[0].argmax("token")].item())
    'merry'
    """
    explain = catalog.method("attribution", method.replace("-", "_"))
    tokenizer = getattr(processor, "tokenizer", processor)
    if words and not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ValueError("words=True: joining sub-words needs the processor")
    asked = target if isinstance(target, Question) else Question()
    chosen = {
        role: named(model, name, processor) if isinstance(name, str) else name
        for role, name in (("target", None if target is asked else target), ("against", against))
    }
    chosen |= {"at": at, "mask": getattr(tokenizer, "mask_token_id", None)}
    chosen |= {"over": over, "beside": beside, "pool": pool, "output": output}
    question = replace(asked, **{k: v for k, v in chosen.items() if v is not None})
    found: xr.DataArray = explain(model, inputs, question, **knobs)
    if "id" in found.coords:
        ids = torch.from_numpy(found["id"].values)
        found = _with_places(model, inputs, found)
        if processor is not None:
            flat = ids.reshape(-1, ids.shape[-1])
            texts = Tokens.plain("text", len(flat), flat.shape[1], flat).texts(processor)
            along = xr.DataArray(texts, dims=("each", "token")).values.reshape(ids.shape)
            found = found.assign_coords(text=(found.dims, along))
    return joined(found, tokenizer) if words else found


def named(model: nn.Module, name: str, processor: Any = None) -> int:
    """The class of this name, or the id of a text that is one token."""
    labels: dict[str, int] = getattr(getattr(model, "config", None), "label2id", None) or {}
    if name in labels:
        return int(labels[name])
    if not speaks(model):
        names = sorted(labels, key=lambda label: labels[label])
        near = difflib.get_close_matches(name, names, n=3)
        guess = f" (did you mean {' or '.join(near)}?)" if near else ""
        listed = f"there are {', '.join(names[:8])}{', ...' * (len(names) > 8)}" if names else "give its number"
        raise ValueError(f"no class {name!r}{guess}; {listed}")
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None:
        raise ValueError(f"target {name!r}: a text needs the processor, or give the token's id")
    ids = tokenizer(name, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"target {name!r} is {len(ids)} tokens {ids}; give a text of one that the tokenizer knows")
    return int(ids[0])


def _with_places(model: nn.Module, inputs: Mapping[str, Any], found: xr.DataArray) -> xr.DataArray:
    """With picture, row and column of each token that is a patch, where the model reads patches among its tokens."""
    if found.attrs["over"] != "input_ids" or not any("pixel" in name for name in inputs) or "input_ids" not in inputs:
        return found
    seen: list[Tokens] = []

    @statistic("batch", title="Tokens")
    def keep(call: Any) -> None:
        tokens = call.tokens
        if seen or call.site.cross or tokens is None or tuple(tokens.roles.shape) != found.shape:
            return
        if bool(tokens.role("image").any()) and bool((tokens.ids >= 0).all()):  # its own tokens are all patches
            seen.append(tokens)

    try:
        with evaluating(model), torch.no_grad(), record(model, keep):
            model(**inputs)
    except UnreachableAttention:
        return found
    if not seen:
        return found
    places = seen[0].places.cpu().numpy()
    return found.assign_coords({n: (found.dims, places[..., i]) for i, n in enumerate(("image", "row", "column"))})
