"""Ways to run a model: each feeds the same values however often it is played, and says which calls are one sequence."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as t
from families import GENERATE
from torch import Tensor, nn
from ways import checkpoint

from regard import seam

from .models import HYBRID, MIXED, PAIRED

TEXT = {"gpt2", "llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", *MIXED}  # decoders of text alone
WINDOWED = {"mistral", "gemma2", "gemma3", "gpt_oss"}
PAIRS = {"t5", "bart", *PAIRED}  # that read text
READERS = {"bert", "roberta"}
PAD = 0


@dataclass
class Played:
    """What a plan did: the number of each forward pass's sequence, and which passes were cut short."""

    runs: list[int] = field(default_factory=list)  # of each outermost pass, in order
    broken: set[int] = field(default_factory=set)

    def passed(self, sequence: int, *, broken: bool = False) -> None:
        if broken:
            self.broken.add(len(self.runs))
        self.runs.append(sequence)


class Mine(Exception):
    """What a plan breaks a pass with."""


@dataclass(frozen=True)
class Plan:
    name: str
    fits: Callable[[str], bool]
    play: Callable[[nn.Module, dict[str, Any], random.Random, Played], None]


def once(model: nn.Module, inputs: dict[str, Any], rng: random.Random, played: Played) -> None:
    model(**inputs)
    played.passed(0)


def twice(model: nn.Module, inputs: dict[str, Any], rng: random.Random, played: Played) -> None:
    for i in range(2):
        model(**inputs)
        played.passed(i)


def padded(model: nn.Module, inputs: dict[str, Any], rng: random.Random, played: Played) -> None:
    model(**inputs, attention_mask=_padding(inputs["input_ids"], rng))
    played.passed(0)


def generated(model: nn.Module, inputs: dict[str, Any], rng: random.Random, played: Played) -> None:
    """With tokens that are forced, so that rounding cannot choose others."""
    steps = rng.randint(1, 6)
    given = {k: v for k, v in inputs.items() if k not in ("decoder_input_ids",)}
    if "input_ids" in given and rng.random() < 0.5 and "pixel_values" not in given:
        given["attention_mask"] = _padding(given["input_ids"], rng, side="left")
    cache = rng.choice([None, "static"]) if "input_ids" in given and "pixel_values" not in given else None
    batch = len(next(iter(given.values())))
    forced = _Forced([[rng.randrange(3, 90) for _ in range(batch)] for _ in range(steps)])
    settings = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": PAD}
    if cache is not None:
        settings["cache_implementation"] = cache
    model.generate(**given, **settings, logits_processor=t.LogitsProcessorList([forced]))
    for _ in range(steps):
        played.passed(0)


def chunked(model: nn.Module, inputs: dict[str, Any], rng: random.Random, played: Played) -> None:
    """A prompt in several pieces, then steps, through a cache of the caller's."""
    cache, ids = t.DynamicCache(config=model.config), inputs["input_ids"]
    for piece in _pieces(ids, rng):
        model(input_ids=piece, past_key_values=cache)
        played.passed(0)


def interleaved(model: nn.Module, inputs: dict[str, Any], rng: random.Random, played: Played) -> None:
    """Two sequences in turns, each with a cache of its own."""
    caches = [t.DynamicCache(config=model.config) for _ in range(2)]
    queues = [_pieces(ids, rng) for ids in (inputs["input_ids"], inputs["input_ids"].flip(1))]
    while any(queues):
        which = rng.choice([i for i, queue in enumerate(queues) if queue])
        model(input_ids=queues[which].pop(0), past_key_values=caches[which])
        played.passed(which)


def broken(model: nn.Module, inputs: dict[str, Any], rng: random.Random, played: Played) -> None:
    """A pass that ends in its middle, by an error or by Ctrl-C, and one after it."""
    error = rng.choice([Mine, KeyboardInterrupt, GeneratorExit])
    parts = [m for name, m in model.named_modules() if name.rpartition(".")[2] in ("mlp", "feed_forward", "fc1", "fc2")]
    part = rng.choice(parts or list(model.modules())[1:])

    def fail(*_: Any) -> None:
        raise error

    handle = part.register_forward_pre_hook(fail)
    try:
        model(**inputs)
    except error:
        played.passed(0, broken=True)
    else:
        played.passed(0)
    finally:
        handle.remove()
    model(**inputs)
    played.passed(1)


def trained(model: nn.Module, inputs: dict[str, Any], rng: random.Random, played: Played) -> None:
    """Forward and backward, perhaps with checkpointing."""
    labels = {"labels": inputs["input_ids"]} if "decoder_input_ids" not in inputs else {}
    recomputed = rng.random() < 0.5 and getattr(model, "supports_gradient_checkpointing", False)
    with torch.enable_grad(), _training(model, recomputed):
        output = model(**inputs, use_cache=False, **labels)
        (output.loss if labels else output.logits.square().mean()).backward()
    played.passed(0)
    model.zero_grad()


def threads(model: nn.Module, inputs: dict[str, Any], rng: random.Random, played: Played) -> None:
    """Another thread runs the model between two passes: under a session it is refused."""
    model(**inputs)
    played.passed(0)
    if seam._sessions:
        with ThreadPoolExecutor(1) as other:
            error = other.submit(model, **inputs).exception()
        assert isinstance(error, RuntimeError), f"another thread was let in: {error!r}"
        assert "runs in another thread than the one that opened the block" in str(error), error
    model(**inputs)
    played.passed(1)


PLANS = (
    Plan("once", lambda family: True, once),
    Plan("twice", lambda family: family != "albert", twice),
    Plan("padded", lambda family: family in TEXT | HYBRID | PAIRS | READERS, padded),
    Plan("generated", lambda family: family in {*GENERATE, *MIXED, *HYBRID, *PAIRED}, generated),
    Plan("chunked", lambda family: family in TEXT, chunked),
    Plan("interleaved", lambda family: family in TEXT, interleaved),
    Plan("threads", lambda family: family != "albert", threads),
    Plan("broken", lambda family: family != "albert", broken),
    Plan("trained", lambda family: family in TEXT | PAIRS | READERS, trained),
)


class _Forced(t.LogitsProcessor):
    def __init__(self, tokens: list[list[int]]) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = torch.full_like(scores, -1e4)
        scores[torch.arange(len(scores)), torch.tensor(self.tokens[self.step])] = 0.0
        self.step += 1
        return scores


def _padding(ids: Tensor, rng: random.Random, side: str | None = None) -> Tensor:
    side, mask = side or rng.choice(["left", "right"]), torch.ones_like(ids)
    for row in mask:
        n = rng.randrange(ids.shape[1] // 2)
        row[slice(0, n) if side == "left" else slice(ids.shape[1] - n, None)] = 0
    return mask


def _pieces(ids: Tensor, rng: random.Random) -> list[Tensor]:
    cuts = sorted(rng.sample(range(1, ids.shape[1]), rng.randint(0, 3)))
    pieces = list(ids.tensor_split(cuts, dim=1))
    return pieces + [ids[:, i : i + 1] for i in range(rng.randint(0, 3))]


@contextmanager
def _training(model: nn.Module, recomputed: bool) -> Iterator[None]:
    model.train()
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    try:
        if recomputed:
            checkpoint(model)
        yield
    finally:
        if recomputed:
            model.gradient_checkpointing_disable()
        model.eval()
