"""Sinks beyond the first token give part of their attention to the other tokens, in heads where that helps.

Yu et al., Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
Attention Calibration (arXiv:2406.15765), by the authors' code. In a head, a token is a sink where it gets more than
`threshold` (0.1) of the attention on average over the queries that see it in this call: all that come after it in the
prompt, or the one that is being generated from. Sinks but the first token keep `beta` (0.4) of what they get; what they
lose goes to the tokens that are no sinks and to the first, in proportion to what each has.

Heads are chosen once for a model: those with which alone the score of a task is higher than without (`helpful_heads`),
of all layers but the first two and the last. The paper's tasks are public classification and multiple-choice sets.

Deviations: the code spares the first sink, which is the first token where that is one; here the first token is spared
in any case. `fit`, which `regard steer` uses, has no task: its score is the likelihood of the text that is about to be
read. We had the code, not the paper's text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..call import Call
from ..kernels import Factor
from ..names import vocabulary
from ..seam import intervene
from ._method import STACK, Method, known, layers, log_factor, require

BETA, THRESHOLD = 0.4, 0.1


@dataclass(kw_only=True)
class act(Method):
    """Calibrate the attention of chosen heads: less for sinks beyond the first token, more for the rest.

    heads: pairs of layer and head, as from `helpful_heads`. beta: share of its attention that a sink keeps, 0 to 1; 1
    changes nothing. threshold: mean weight from which on a token is a sink, 0 to 1.

    ValueError where the model has no language model that reads from left to right, or not these layers.

    >>> import torch, regard
    >>> from regard.interventions.act import act, helpful_heads, likelihood
    >>> model, tokenizer = regard.load("reader")
    >>> inputs = tokenizer("the king spoke to the queen , and the queen spoke to the king", return_tensors="pt")
    >>> heads = helpful_heads(model, lambda: likelihood(model, inputs), among=[(2, head) for head in range(8)])
    >>> with torch.no_grad(), regard.intervene(model, act(heads=heads)):
    ...     logits = model(**inputs).logits
    """

    needs = "heads with which the text that is read is likelier"

    off: ClassVar = {"beta": 1.0}

    heads: Collection[tuple[int, int]]
    beta: float = BETA
    threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        for name in ("beta", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"act: {name} is a share, 0 to 1, not {getattr(self, name)}")

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        inputs: Mapping[str, Any],
        processor: Any = None,
        *,
        beta: float = BETA,
        threshold: float = THRESHOLD,
        **knobs: Any,
    ) -> Self:
        """With the heads with which what is about to be read is likelier."""
        if "heads" not in knobs:
            knobs["heads"] = helpful_heads(model, lambda: likelihood(model, inputs), beta=beta, threshold=threshold)
        return cls(beta=beta, threshold=threshold, **knobs)

    def begin(self, model: nn.Module) -> None:
        require(model, "act", (layer for layer, _ in self.heads), "find heads on this model")

    def inputs(self, call: Call) -> Call:
        chosen = [head for at, head in self.heads if at == call.site.layer]
        if call.site.stack != STACK or not chosen or self.beta == 1:
            return call
        known(call, chosen, "act")
        sink = sinks(call, threshold=self.threshold)
        calibrated = torch.zeros(sink.shape[1], dtype=torch.bool, device=sink.device)
        calibrated[chosen] = True
        sink &= calibrated[None, :, None]
        if not sink.any():
            return call
        held, rest = call.weights.applied(torch.stack([sink, ~sink], dim=-1)).unbind(-1)
        moves = (held > 0) & (rest > torch.finfo(rest.dtype).eps * held)
        kept = log_factor(torch.where(moves, self.beta, 1.0))
        gain = log_factor(torch.where(moves, 1 + (1 - self.beta) * held / rest, 1.0))
        every = torch.ones_like(kept[:1, :1, :1]).expand(1, 1, sink.shape[2])
        return call.scaled(Factor(gain, every), Factor(kept - gain, sink))


def sinks(call: Call, *, threshold: float = THRESHOLD) -> Tensor:
    """Which keys of each head are sinks, the first token apart. [batch, head, key] boolean"""
    real = None if call.query_tokens is None else ~call.query_tokens.role("pad")
    seen_by = sum(_seen(call, span, real) for span in call.weights.spans())
    received = call.weights.received(by=real)
    found = received > threshold * torch.as_tensor(seen_by).clamp(min=1)
    if call.key_start == 0:
        pad = torch.zeros_like(found[:, 0]) if call.tokens is None else call.tokens.role("pad")
        first = pad.long().argmin(1)  # [batch]
        found = found.scatter(2, first[:, None, None].expand(-1, found.shape[1], 1), False)
    return found


def _seen(call: Call, span: range, real: Tensor | None) -> Tensor:
    """How many of some queries see each key. [batch|1, head|1, key]"""
    seen = call.weights.seen(span.start, span.stop)
    return (seen if real is None else seen & real[:, None, span.start : span.stop, None]).sum(-2)


def helpful_heads(
    model: nn.Module,
    score: Callable[[], float],
    *,
    beta: float = BETA,
    threshold: float = THRESHOLD,
    among: Collection[tuple[int, int]] | None = None,
) -> list[tuple[int, int]]:
    """Pairs of layer and head that raise `score` where their sinks alone are calibrated.

    score: runs the model on a task and returns a number, the higher the better, such as the share of right answers. It
    is called once for each head, and once without. among: pairs to try; None for all heads of all layers but the first
    two and the last.
    """
    if among is None:
        middle = layers(model, "act")[2:-1]
        text: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
        among = [(i, head) for i in middle for head in range(text.num_attention_heads)]
    plain, helpful = score(), []
    for pair in among:
        with intervene(model, act(heads=[pair], beta=beta, threshold=threshold)):
            if score() > plain:
                helpful.append(pair)
    return helpful


@torch.no_grad()
def likelihood(model: nn.Module, inputs: Mapping[str, Any]) -> float:
    """Mean log-probability of the words of `inputs`, the first of each row apart; nats, 0 and down."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    words = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    counted = words[:, 1:] & words[:, :-1]
    counted &= ~torch.isin(ids[:, 1:], ids.new_tensor(sorted(vocabulary(model, None)["image"])))
    logits = model(**inputs).logits[:, :-1].float()
    return float(logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0][counted].mean())
