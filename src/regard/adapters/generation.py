"""transformers' `generate`: where its own tokens begin, which rows are finished, and which rows come out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, StoppingCriteriaList

from ..functions import arguments
from . import pictures

_local = threading.local()
_changes: dict[nn.Module, list[Callable[[dict[str, Any]], dict[str, Any]]]] = {}  # of what models are given


class Follower(Protocol):
    """Who is told of the rows that come out of a beam search."""

    def came_out(self, generation: Generation) -> None: ...


@dataclass(eq=False)
class Generation:
    """One call of `generate`, as far as it has come."""

    model: nn.Module
    runs: dict[Follower, Any] = field(default_factory=dict)  # what each follower saw of it first
    decoded: dict[Follower, tuple[Any, int]] = field(default_factory=dict)  # what decodes, and its orders before
    cache: Any = None
    prompt: Tensor | None = None  # ids [batch, token], once it decodes
    begins: int = 0  # position of the first token that it generates, once it decodes
    assisted: bool = False  # tokens are tried, and taken back
    padding: list[Tensor] = field(default_factory=list)  # of each token generated: the rows that were finished before
    finished: Tensor | None = None  # [batch] boolean
    # Of the sequences that came out of a beam search:
    beams: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # the row of each step; -1 after the end
    made: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # ids that were generated

    @property
    def whole(self) -> Tensor | None:
        """The prompt, where it holds all that comes before the first token generated."""
        return self.prompt if self.prompt is not None and self.prompt.shape[1] == self.begins else None

    def tell(self, done: Tensor) -> None:
        """A token was generated; then these rows were finished."""
        done = done.detach().cpu()
        before = torch.zeros_like(done) if self.finished is None else self.finished
        self.padding.append(before)
        self.finished = before | done


class _Watched(StoppingCriteriaList):
    """Stopping criteria that say aloud what they find."""

    tell: Callable[[Tensor], None]

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        self.tell(done)
        return done


def now() -> Generation | None:
    """The innermost call of `generate` that runs in this thread."""
    running = getattr(_local, "running", None)
    return running[-1] if running else None


def tried() -> bool:
    """Whether tokens that are now fed may be taken back: by assisted decoding, or by what drafts for it."""
    return any(generation.assisted for generation in getattr(_local, "running", ()))


@contextmanager
def changed(model: nn.Module, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Change what `generate` of a model is given, which may read pictures before the model itself runs."""
    _changes.setdefault(model, []).append(change)
    try:
        yield
    finally:
        _changes[model].remove(change)
        if not _changes[model]:
            del _changes[model]


@contextmanager
def own_positions(model: nn.Module, kept: dict[nn.Module, Any]) -> Iterator[None]:
    """Run one of several texts that a model generates in turn: some models keep, on themselves, by how much the newest
    text's positions are off its length. That of this text is in `kept`, empty at first; that of the others comes back.
    """
    others = {m: m.rope_deltas for m in model.modules() if hasattr(m, "rope_deltas")}
    for module, own in kept.items():
        module.rope_deltas = own
    try:
        yield
    finally:
        for module, other in others.items():
            kept[module], module.rope_deltas = module.rope_deltas, other  # type: ignore[assignment]


@contextmanager
def watched() -> Iterator[None]:
    """While this is held, `now` knows."""
    with ExitStack() as undo:
        for name, made in (
            ("generate", _generating),
            ("_sample", _sampling),
            ("_beam_search", _searching),
            ("_assisted_decoding", _assisted),
        ):
            own = getattr(GenerationMixin, name, None)
            if own is not None:
                setattr(GenerationMixin, name, made(own))
                undo.callback(setattr, GenerationMixin, name, own)
        yield


def _generating(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
        if changes := _changes.get(model):
            kwargs, args = _named(model, dict(zip(arguments(own)[1:], args)) | kwargs), ()
            for change in changes:
                kwargs = change(kwargs)
        with _begun(model), pictures.here().following(model, kwargs):  # some show pictures to parts of the model first
            return own(model, *args, **kwargs)

    return generate


def _named(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The same with `inputs` under the name that the model has for them."""
    reader = getattr(model, "encoder", model) if getattr(model.config, "is_encoder_decoder", False) else model
    name = getattr(reader, "main_input_name", model.main_input_name)
    if given.get("inputs") is None or given.get(name) is not None:
        return given
    return {**{old: value for old, value in given.items() if old not in ("inputs", name)}, name: given["inputs"]}


def _sampling(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def sample(model: Any, input_ids: Tensor, *, stopping_criteria: Any, **kwargs: Any) -> Any:
        with _decoding(model, input_ids, kwargs) as generation:
            # Rows that are finished are fed padding with the mask left on, but only where a token ends a row.
            if any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
                stopping_criteria = _Watched(stopping_criteria)
                stopping_criteria.tell = generation.tell
            return own(model, input_ids, stopping_criteria=stopping_criteria, **kwargs)

    return sample


def _assisted(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def assisted(model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        with _decoding(model, input_ids, kwargs) as generation:
            generation.assisted = True
            return own(model, input_ids, **kwargs)

    return assisted


def _searching(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def search(model: Any, input_ids: Tensor, *, generation_config: Any, **kwargs: Any) -> Any:
        kwargs["generation_config"] = generation_config
        asked = generation_config.return_dict_in_generate
        with _decoding(model, input_ids, kwargs) as generation:
            generation_config.return_dict_in_generate = True  # otherwise it does not say which rows came out
            try:
                found = own(model, input_ids, **kwargs)
            finally:
                generation_config.return_dict_in_generate = asked
            generation.beams = found.beam_indices.cpu().long()
            generation.made = found.sequences[:, input_ids.shape[1] :].cpu()
            for follower in generation.decoded:
                follower.came_out(generation)
        return found if asked else found.sequences

    return search


@contextmanager
def _begun(model: nn.Module) -> Iterator[Generation]:
    running = _local.__dict__.setdefault("running", [])
    running.append(Generation(model))
    try:
        yield running[-1]
    finally:
        running.pop()


@contextmanager
def _decoding(model: Any, ids: Tensor, kwargs: dict[str, Any]) -> Iterator[Generation]:
    """The call of `generate` that now starts to decode; one of its own where other code decodes."""
    with ExitStack() as undo:
        generation = now()
        if generation is None or generation.model is not model or generation.prompt is not None:
            generation = undo.enter_context(_begun(model))
        paired = getattr(model.config, "is_encoder_decoder", False)
        mask = kwargs.get("decoder_attention_mask" if paired else "attention_mask")
        embeds = None if paired else kwargs.get("inputs_embeds")
        known = getattr(kwargs.get("generation_config"), "_mask_length", None) if mask is None else mask.shape[1]
        generation.cache, generation.prompt = kwargs.get("past_key_values"), ids.detach().cpu()
        if not known:
            n = ids.shape[1] if embeds is None else embeds.shape[1]
            past = 0 if generation.cache is None else int(generation.cache.get_seq_length())
            known = n if n > past else past + n  # all ids may be given, or only those that the cache lacks
        generation.begins = known
        yield generation
