"""Hallucination-inducing contrastive decoding: heads that the answer hangs on look everywhere, and that is taken off.

Jiang et al., HICD: Hallucination-Inducing via Attention Dispersion for Contrastive Decoding to Mitigate Hallucinations
in Large Language Models (arXiv:2503.12908), by the authors' code; we had the code and the abstract, not the whole text.

Heads look evenly at every key that they may look at, in every step; the authors' code, which mostly scores given
answers, does so only where a call has more than one query; to generate, it contrasts two texts step by step, here both
runs read the same one. They take the top 30 (or 70) of the 1024 heads of a 7B
model; `share` is that part of the heads. A position bias that a model adds to its scores is dropped with them, but one
that it hides in its mask stays (ALiBi).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..call import Call
from ..seam import intervene
from ._branch import Branch
from ._method import STACK, Method, known, layers, require

Heads = Sequence[tuple[int, int]]  # layer and head


class hicd(Method):
    """Logits contrasted with those of a run in which `heads` look evenly at all that they may look at.

    A logits processor: to the model's logits it adds alpha times what their log-probabilities are above those of the
    second run. `alpha` 0 leaves them as they are. The authors choose alpha for each task, from 0.38 to 2.

    heads: layer and head of the language model, as `inducing_heads` finds them; ValueError where it lacks one.

    >>> import regard
    >>> from regard.interventions.hicd import hicd
    >>> from regard.zoo.recipes.describer import asked, pictures, tempting
    >>> model, processor = regard.load("describer")
    >>> inputs = asked(processor, pictures(tempting(2)), ["describe", "describe"])
    >>> method = hicd(model, inputs, heads=[(2, 1)])
    >>> ids = model.generate(**inputs, logits_processor=[method], max_new_tokens=8, do_sample=False)
    """

    off: ClassVar[Mapping[str, Any]] = {"alpha": 0.0}
    needs = "heads, by the model's first choice against its second"

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], *, heads: Heads, alpha: float = 1.0) -> None:
        self.alpha = alpha
        self.branch = Branch(model, inputs, partial(intervene, model, Dispersed(heads)))

    @classmethod
    def fit(cls, model: nn.Module, inputs: Mapping[str, Any], processor: Any = None, **knobs: Any) -> Self:
        """Without `heads`, those found with the model's first choice as right answer and its second as wrong."""
        if "heads" not in knobs:
            layers(model, "hicd")
            counts = _n_tokens(inputs), len(inputs["input_ids"])  # one answer a row, told by its last token
            told = (_importance(model, inputs, partial(_surprise, place=p), *counts) for p in (0, 1))
            knobs["heads"] = _chosen(_rank_score(*told))
        return cls(model, inputs, **knobs)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        own, other = (s.log_softmax(-1) for s in (scores, self.branch.logits(input_ids).to(scores)))
        contrast = torch.where(scores.isneginf(), 0, own - other)  # what another processor ruled out stays out
        return scores + self.alpha * contrast


class Dispersed:
    """Makes some heads of the language model look evenly at all that they may look at."""

    def __init__(self, heads: Heads) -> None:
        self.heads: dict[int, list[int]] = {}
        for layer, head in heads:
            self.heads.setdefault(layer, []).append(head)

    def begin(self, model: nn.Module) -> None:
        require(model, "hicd", self.heads, "find heads on this model")

    def inputs(self, call: Call) -> Call:
        heads = self.heads.get(call.site.layer) if call.site.stack == STACK else None
        if heads is None:
            return call
        known(call, heads, "hicd")
        query = call.query.clone()
        query[:, heads] = 0  # all scores of a row are equal
        if call.bias is None:
            return call.but(query=query)
        bias = call.bias.expand(-1, query.shape[1], -1, -1).clone()
        bias[:, heads] = 0
        return call.but(query=query, bias=bias)


def inducing_heads(
    model: nn.Module,
    right: Mapping[str, Any],
    wrong: Mapping[str, Any],
    *,
    scale: float = 20.0,
    share: float = 30 / 1024,
) -> list[tuple[int, int]]:
    """Layer and head of those that matter for right answers and not for wrong ones, the first in rank first.

    right, wrong: inputs with `labels`, -100 but for the answer. A head matters as far as the loss would change with
    what it gives: the size of output times gradient, summed over tokens, per token that is read; in the last layer, as
    in the authors' code, per token of the answers. Both are stretched to 0 to 1 over the heads; rank is by that of
    right answers plus `scale` times what it exceeds that of wrong ones. share: of the heads, that are taken; at least
    one is.

    Raises ValueError where there are no labels.
    """
    return _chosen(_rank_score(*(_of_answers(model, inputs) for inputs in (right, wrong)), scale=scale), share=share)


def _chosen(score: Tensor, *, share: float = 30 / 1024) -> list[tuple[int, int]]:
    top = score.flatten().topk(max(1, round(share * score.numel()))).indices
    return [divmod(i, score.shape[1]) for i in top.tolist()]


def _rank_score(right: Tensor, wrong: Tensor, *, scale: float = 20.0) -> Tensor:
    good, bad = ((x - x.min()) / (x.max() - x.min()) for x in (right, wrong))
    return good + scale * (good - bad)


def _of_answers(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Importance for answers that `labels` mark. [layer, head]"""
    if "labels" not in inputs:
        raise ValueError("inputs need labels, -100 for what is not the answer; make them with the answer appended")
    given = {name: value for name, value in inputs.items() if name != "labels"}
    labels = inputs["labels"][:, 1:]
    answer = labels != -100
    if not bool(answer.any(1).all()):
        raise ValueError("labels of a row are all -100: each row needs an answer, after its first token")

    def loss(out: Any) -> Tensor:
        """The mean over each answer, summed over rows, as if each stood alone."""
        each = cross_entropy(out.logits[:, :-1].float().mT, labels, reduction="none")
        return ((each * answer).sum(1) / answer.sum(1)).sum()

    return _importance(model, given, loss, _n_tokens(inputs) - len(labels), int(answer.sum()))


def _n_tokens(inputs: Mapping[str, Any]) -> int:
    """All but padding."""
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].numel() if mask is None else int(mask.sum())


@torch.enable_grad()
def _importance(
    model: nn.Module, inputs: Mapping[str, Any], loss: Callable[[Any], Tensor], read: int, answers: int
) -> Tensor:
    """|output . gradient| of each head, summed over rows and tokens, by layer per token. [layer, head]

    read, answers: how many tokens the loss reads, and how many it is of.
    """
    layers(model, "hicd")
    kept = _Outputs()
    with intervene(model, kept):
        lost = loss(model(**inputs))
    outputs = [kept.outputs[layer] for layer in sorted(kept.outputs)]
    slopes = torch.autograd.grad(lost, outputs)
    found = torch.stack([(a.detach() * b).sum(-1).abs().sum((0, 2)).float() for a, b in zip(outputs, slopes)])
    return torch.cat([found[:-1] / read, found[-1:] / answers])


def _surprise(out: Any, place: int) -> Tensor:
    """Loss of the token that comes at this place among those that the model would say next, summed over rows."""
    said = out.logits[:, -1].float().log_softmax(-1)
    return -said.topk(place + 1).values[:, place].sum()


class _Outputs:
    """Keeps what the heads of each layer of the language model give."""

    def __init__(self) -> None:
        self.outputs: dict[int, Tensor] = {}

    def output(self, call: Call, output: Tensor) -> Tensor:
        if call.site.stack != STACK:
            return output
        output = output.clone() if output.requires_grad else output.clone().requires_grad_()
        self.outputs[call.site.layer] = output
        return output
