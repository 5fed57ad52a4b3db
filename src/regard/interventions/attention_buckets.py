"""Attention Buckets: runs with several rotary bases, so that what one overlooks another sees.

Chen et al., Fortify the Shortest Stave in Attention: Enhancing Context Awareness of Large Language Models for Effective
Tool Use (arXiv:2312.04455), by the authors' code; we had the code and the abstract, not the whole text.

The authors' bases are 10000, which is that of their models, and five more; `times` are these as multiples of the
model's own. They run them in one batch; here they run one after another, which any model can. Of a model that scales
its rotary frequencies in other ways (linear, YaRN, Llama 3), the scaled ones are changed as the base would change them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ._branch import Branch
from ._method import Method

_RECOMPUTED = {"dynamic", "longrope"}  # by the rotary embedding itself, from the length that it sees


class attention_buckets(Method):
    """Logits of the model and of runs with other rotary bases, merged by how sure each is.

    A logits processor: the mean of the logits over runs, weighted by a softmax over the runs' largest logits. Without
    further bases the logits stay as they are.

    times: the further bases, as multiples of the model's own.

    >>> import regard
    >>> from regard.interventions.attention_buckets import attention_buckets
    >>> model, tokenizer = regard.load("reader")
    >>> inputs = tokenizer("The king spoke to the queen, and the", return_tensors="pt")
    >>> method = attention_buckets(model, inputs, times=(1.75, 2.5))
    >>> ids = model.generate(**inputs, logits_processor=[method], max_new_tokens=4, do_sample=False, eos_token_id=1)
    """

    off: ClassVar[Mapping[str, Any]] = {"times": ()}
    needs = "a prompt to follow in runs of its own"

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Any], *, times: Sequence[float] = (1.75, 1.8, 1.9, 2.0, 2.5)
    ) -> None:
        _frequencies(model)
        self.branches = [Branch(model, inputs, partial(rebased, model, factor)) for factor in times]

    @classmethod
    def fit(cls, model: nn.Module, inputs: Mapping[str, Any], processor: Any = None, **knobs: Any) -> Self:
        return cls(model, inputs, **knobs)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        runs = torch.stack([scores, *(branch.logits(input_ids).to(scores) for branch in self.branches)])
        sure = runs.amax(-1, keepdim=True).softmax(0)  # [run, batch, 1]
        return (sure * runs).sum(0).masked_fill(scores.isneginf(), -torch.inf)  # ruled out by another processor


@contextmanager
def rebased(model: nn.Module, times: float) -> Iterator[None]:
    """The language model with a rotary base so many times its own, inside the block.

    Raises ValueError where it has no rotary positions, or recomputes their frequencies while it runs.
    """
    found = _frequencies(model)
    try:
        for module, name, own in found:
            steps = torch.arange(len(own), device=own.device, dtype=torch.float64) / len(own)
            setattr(module, name, (own.double() * times**-steps).to(own.dtype))
        yield
    finally:
        for module, name, own in found:
            setattr(module, name, own)


def wave(distance: Tensor, *, base: float = 10000.0, dim: int = 128) -> Tensor:
    """Score that rotary positions give a key at each distance where query and key are ones: it rises and falls.

    The sum over the `dim` / 2 frequencies of 2 cos(distance * base ** (-2 i / dim)), over the root of `dim`: the
    largest that queries and keys of this length can have.
    """
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return 2 * (distance.double()[..., None] * frequency).cos().sum(-1) / dim**0.5


def _frequencies(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """The rotary embeddings of the language model: module, name of the buffer, and the frequencies."""
    decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    found = [
        (module, name, buffer)
        for module in decoder.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name
    ]
    if not found:
        raise ValueError(f"attention-buckets changes a rotary base, and {type(model).__name__} has no rotary positions")
    for module, _, _ in found:
        kinds = getattr(module, "rope_type", "default")
        if again := _RECOMPUTED & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
            raise ValueError(
                f"attention-buckets sets rotary frequencies, and {type(model).__name__} recomputes them while it runs "
                f"({again.pop()})"
            )
    return found
