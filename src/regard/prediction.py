"""One prediction of a model, as a function of the pixels or token embeddings that it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import xarray as xr
from torch import Tensor, nn

from .loading import parameters

Target = int | Sequence[int] | Tensor | None


@dataclass(frozen=True, eq=False)
class Prediction:
    """The score of a class, or of a next token, and what it rests on. See `predict`.

    `given` is pixels [batch, channel, row, column], or embeddings [batch, token, dim] of what the model reads.
    """

    model: nn.Module
    inputs: dict[str, Any]
    given: Tensor
    target: Tensor  # [batch] class, or token id
    places: tuple[nn.Module, ...]  # of which the first to run gives, or is given, the embeddings; none for pixels
    real: Tensor | None  # which tokens are not padding [batch, token]; None for pixels

    @property
    def sees(self) -> bool:
        """Whether it is a prediction from pixels alone."""
        return not self.places

    def score(self, given: Tensor | None = None) -> Tensor:
        """The target's logit where this is given instead. [n * batch], for `given` of n batches one after the other"""
        logits = self.logits(given)
        return logits.gather(1, self.target.repeat(len(logits) // len(self.target))[:, None])[:, 0]

    def probability(self, given: Tensor | None = None) -> Tensor:
        """The target's probability: a sigmoid's where labels do not exclude each other. [n * batch]"""
        logits = self.logits(given)
        several = getattr(self.model.config, "problem_type", None) == "multi_label_classification"
        chances = logits.sigmoid() if several or logits.shape[1] == 1 else logits.softmax(-1)
        return chances.gather(1, self.target.repeat(len(logits) // len(self.target))[:, None])[:, 0]

    def logits(self, given: Tensor | None = None) -> Tensor:
        """[n * batch, class], or those of the next token at the last position."""
        given = self.given if given is None else given
        n = len(given) // len(self.given)
        repeated = {k: _repeat(v, n, len(self.given)) for k, v in self.inputs.items()}
        with ExitStack() as undo:
            if self.sees:
                repeated["pixel_values"] = given
            else:
                undo.enter_context(_put(self.places, given))
            return _last(self.model, self.model(**repeated), repeated)

    def gradient(self) -> Tensor:
        """Of the score, with respect to `given`; of its shape."""
        given = self.given.clone().requires_grad_()
        return torch.autograd.grad(self.score(given).sum(), given)[0]

    def without(self, kept: Tensor, baseline: Tensor | float) -> Tensor:
        """`given` where `kept` (of the features, [batch, token] or [batch, row, column]), otherwise the baseline."""
        chosen = kept[:, None] if self.sees else kept[..., None]
        return torch.where(chosen.to(self.given.device), self.given, torch.as_tensor(baseline).to(self.given))

    def sample(self, i: int) -> Prediction:
        """Of sample `i` alone."""
        if len(self.given) == 1:
            return self
        inputs = {
            k: _each(v, len(self.given))[i : i + 1] if isinstance(v, Tensor) and v.ndim else v
            for k, v in self.inputs.items()
        }
        real = None if self.real is None else self.real[i : i + 1]
        return replace(self, inputs=inputs, given=self.given[i : i + 1], target=self.target[i : i + 1], real=real)

    def labelled(self, found: Tensor, method: str, **coordinates: Tensor) -> xr.DataArray:
        """Scores of tokens [batch, token] or of pixels [batch, row, column], with what they explain.

        Padding scores 0.
        """
        found = found.detach().cpu()
        if self.real is not None:
            found = found.masked_fill(~self.real.cpu(), 0)
        dims = ("batch", "token") if self.real is not None else ("batch", "row", "column")
        with torch.no_grad():
            score = self.score()
        along: dict[str, Any] = {dim: range(n) for dim, n in zip(dims[1:], found.shape[1:])}
        along["target"] = ("batch", self.target.cpu().numpy())
        for name, value in {"score": score, **coordinates}.items():
            along[name] = ("batch", value.detach().cpu().double().numpy())
        return xr.DataArray(found.double().numpy(), along, dims, method, {"long_name": method})


@contextmanager
def predict(model: nn.Module, inputs: Mapping[str, Any], target: Target = None) -> Iterator[Prediction]:
    """What `model` predicts of `inputs`, in evaluation mode, with gradients; it is left as it was found.

    inputs: as the model takes them: `pixel_values`, `input_ids` (and their mask), or both; then what is explained is
    what the language model reads, patches among its tokens. target: a class or token id, one for each sample or one
    for all; None takes the one with the highest logit. Of models that write, it is the next token at the last position
    that is not padding.

    Raises ValueError where the model gives no logits of one class or token, or takes something else.
    """
    if not isinstance(inputs, Mapping):
        raise ValueError(f"inputs are what a processor gives, a mapping with pixel_values or input_ids, not {inputs!r}")
    inputs = {k: v for k, v in inputs.items() if k != "labels"}
    if "use_cache" in parameters(model):
        inputs["use_cache"] = False
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        inputs = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in inputs.items()}
        yield _prediction(model, inputs, target)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards each module is in the mode that it was in."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, was in training.items():
            module.training = was


def _prediction(model: nn.Module, inputs: dict[str, Any], target: Target) -> Prediction:
    pixels, ids = inputs.get("pixel_values"), inputs.get("input_ids")
    real = None
    if isinstance(ids, Tensor):
        places = _places(model, isinstance(pixels, Tensor))
        mask = inputs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    elif isinstance(pixels, Tensor) and pixels.ndim == 4:
        places = ()
    else:
        raise ValueError(
            f"inputs hold {', '.join(inputs)}; give pixel_values [batch, channel, row, column] or input_ids"
        )
    with torch.no_grad(), ExitStack() as undo:
        seen = undo.enter_context(_seen(places)) if places else [cast(Tensor, pixels)]
        logits = _last(model, model(**inputs), inputs)
    if not seen:
        raise ValueError(f"{type(model).__name__}: what its language model reads was not found")
    return Prediction(model, inputs, seen[0].detach(), _chosen(target, logits), places, real)


def _chosen(target: Target, logits: Tensor) -> Tensor:
    batch, classes = logits.shape
    if target is None:
        return logits.argmax(-1)
    chosen = torch.as_tensor(target, device=logits.device)
    if chosen.dtype.is_floating_point or chosen.dtype == torch.bool or chosen.shape not in ((), (batch,)):
        raise ValueError(f"target is one index, or one for each of the {batch} samples; got {target!r}")
    if bool((chosen < 0).any()) or bool((chosen >= classes).any()):
        raise ValueError(f"target {target!r}: this model scores {classes} classes or tokens, from 0 to {classes - 1}")
    return chosen.long().expand(batch)


def _last(model: nn.Module, output: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Logits of one prediction a sample. [batch, class]"""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        raise ValueError(f"{type(model).__name__} gives no logits of classes or tokens, so there is nothing to explain")
    if logits.ndim == 2:
        return logits
    if not getattr(model, "can_generate", lambda: False)():
        raise ValueError(
            f"{type(model).__name__} gives logits for every position, and is none that writes: there is no one "
            f"prediction to explain"
        )
    decodes = inputs.get("decoder_input_ids") is not None
    mask = inputs.get("decoder_attention_mask" if decodes else "attention_mask")
    if mask is None or mask.shape[1] != logits.shape[1]:
        return logits[:, -1]
    at = (mask.bool() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1)
    return logits[torch.arange(len(logits), device=logits.device), at]


def _repeat(value: Any, n: int, batch: int) -> Any:
    if n == 1 or not isinstance(value, Tensor) or not value.ndim:
        return value
    return _each(value, batch).repeat(n, *[1] * (value.ndim - 1))


def _each(value: Tensor, batch: int) -> Tensor:
    if len(value) != batch:
        raise ValueError(
            f"an input {list(value.shape)} does not hold one for each of {batch} samples, so they cannot be taken apart"
        )
    return value


def _places(model: Any, patches: bool) -> tuple[nn.Module, ...]:
    """The decoder, which is given tokens and patches as embeddings; without patches, modules that embed tokens."""
    if patches:
        return (model.get_decoder(),)
    table = model.get_input_embeddings()
    shared = getattr(table, "weight", None)
    return tuple(m for m in model.modules() if m is table or (isinstance(m, nn.Embedding) and m.weight is shared))


@contextmanager
def _seen(places: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The embeddings that pass first, as they pass."""
    seen: list[Tensor] = []
    with _at(places, seen.append):
        yield seen


@contextmanager
def _put(places: Sequence[nn.Module], new: Tensor) -> Iterator[None]:
    """The embeddings that pass first are these."""
    with _at(places, lambda _: new):
        yield


@contextmanager
def _at(places: Sequence[nn.Module], change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    done = False  # a decoder may use the same embeddings after the encoder

    def gave(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        nonlocal done
        if done:
            return None
        done = True
        return change(output)

    def taken(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal done
        if done or kwargs.get("inputs_embeds") is None:
            return None
        done = True
        new = change(kwargs["inputs_embeds"])
        return None if new is None else (args, {**kwargs, "inputs_embeds": new})

    with ExitStack() as undo:
        for place in places:
            if "inputs_embeds" in parameters(place):
                undo.callback(place.register_forward_pre_hook(taken, with_kwargs=True).remove)
            else:
                undo.callback(place.register_forward_hook(gave).remove)
        yield
