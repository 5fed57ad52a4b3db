"""Interaction guidance: where picture and question say something only together, words are chosen by that.

Dong et al., INTER: Mitigating Hallucination in Large Vision-Language Models by Interaction Guidance Sampling
(arXiv:2507.05056). Only the abstract was at hand; what follows is how the method is described elsewhere, not checked
against the paper, and no code of the authors was found. Picture and instruction are two players, and the value of a
coalition for a candidate word is its logit where the model sees these alone, and the words that it has generated. Their
interaction (Harsanyi's dividend) is what both give together beyond what each gives. Where it varies much over the
candidates, the step is one of a keyword, and the interaction is added to the logits.

Ours, for want of the paper's: a player that is absent is taken out of the prompt; candidates are words at least `beta`
times as likely as the likeliest; a step is a keyword's where the variance of the interaction over candidates is at
least the median over its row's plain answer, of words that had a rival, or `threshold`; `strength` 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ._branch import Branch, plausible
from ._look import lengths
from ._method import Method
from ._picture import one_picture
from ._prompt import cut, instruction, narrowed

STEPS = 32  # of a plain answer, at most, that tells which variances are large


class inter(Method):
    """Logits with what picture and instruction say only together, at the steps of keywords.

    A logits processor: at steps at which the interaction varies by `threshold` or more over the candidates, `strength`
    times it is added to their logits; other words and other steps are left alone. It runs the model three times
    beside, twice without the picture. `strength` 0 leaves all as it is. Where sampling follows, it draws from what is
    left, as from the model's own.

    inputs: as they go to `generate`; left padding is fine. instruction: which tokens of the prompts say what is asked,
    boolean [batch, token]; `fit` finds them after the picture. threshold: variance in squared logits, one for all or
    one a row [batch]; `fit` takes the median over the words of each row's plain answer that had a rival. beta: how
    likely candidates are at least, as a share of the likeliest.

    ValueError where the model reads no image tokens, a row has not one picture, or no instruction.

    >>> import regard
    >>> from regard.interventions.inter import inter
    >>> from regard.zoo.recipes.describer import asked, pictures, tempting
    >>> model, processor = regard.load("describer")
    >>> inputs = asked(processor, pictures(tempting(1)), ["describe"])
    >>> method = inter.fit(model, inputs, processor)
    >>> ids = model.generate(**inputs, logits_processor=[method], max_new_tokens=8, do_sample=False)
    """

    off: ClassVar[Mapping[str, Any]] = {"strength": 0.0}
    needs = "where the instruction stands in the prompt, and how far it usually moves logits"

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        instruction: Tensor,
        strength: float = 1.0,
        threshold: float | Tensor = 0.0,
        beta: float = 0.1,
    ) -> None:
        self.strength, self.threshold, self.beta = strength, threshold, beta
        image = one_picture(model, inputs, "inter")
        text = {name: v for name, v in inputs.items() if isinstance(v, Tensor) and v.shape == image.shape}
        prompts = cut(inputs, instruction), narrowed(cut(text, image)), narrowed(cut(text, image | instruction))
        self.picture, self.text, self.none = (Branch(model, inputs, prompt=prompt) for prompt in prompts)

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        inputs: Mapping[str, Any],
        processor: Any = None,
        *,
        threshold: float | None = None,
        tail: int | None = None,
        **knobs: Any,
    ) -> Self:
        """tail: how many tokens of a prompt follow on its instruction; None asks the processor's chat template."""
        asked = instruction(inputs, one_picture(model, inputs, "inter"), processor, "inter", tail)
        made = cls(model, inputs, instruction=asked, **knobs)
        made.threshold = usual(model, inputs, made) if threshold is None else threshold
        return made

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        together, among = self.interactions(input_ids, scores)
        varies = variance(together, among)
        keyword = (varies >= torch.as_tensor(self.threshold).to(varies)) & (varies > 0)
        return scores + self.strength * together.masked_fill(~(among & keyword[:, None]), 0)

    def interactions(self, input_ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The interaction for each word, and which words are candidates. [batch, vocabulary] twice"""
        parts = [branch.logits(input_ids).to(scores) for branch in (self.picture, self.text, self.none)]
        among = plausible(scores, self.beta) & ~scores.isneginf()  # what another processor ruled out stays out
        return interaction(scores.masked_fill(~among, 0), *parts), among


def interaction(both: Tensor, picture: Tensor, text: Tensor, none: Tensor) -> Tensor:
    """What picture and text give a word together beyond what each gives, in logits."""
    return both - picture - text + none


def variance(values: Tensor, among: Tensor) -> Tensor:
    """Of each row's values [batch, vocabulary] over some of them; 0 of one alone. [batch]"""
    n = among.sum(-1).clamp(min=1)
    mean = values.masked_fill(~among, 0).sum(-1) / n
    return (values - mean[:, None]).masked_fill(~among, 0).square().sum(-1) / n


def usual(model: nn.Module, inputs: Mapping[str, Any], method: inter, *, steps: int = STEPS) -> Tensor:
    """The median variance of the interaction over the words of each row's greedy answer that had a rival. [batch]

    0 where none had.
    """
    each = [found[found > 0] for found, _ in variances(model, inputs, method, steps=steps)]
    return torch.stack([found.quantile(0.5) if len(found) else found.sum() for found in each])


@torch.no_grad()
def variances(
    model: nn.Module, inputs: Mapping[str, Any], method: inter, *, steps: int = STEPS
) -> list[tuple[Tensor, Tensor]]:
    """The variance of the interaction at each word of each row's greedy answer, and the word's id. Both [step]"""
    seen: list[Tensor] = []

    def watch(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(variance(*method.interactions(ids, scores)))
        return scores

    made = model.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=steps, do_sample=False, num_beams=1, logits_processor=[watch]
    )
    ids, found = made[:, inputs["input_ids"].shape[1] :], torch.stack(seen, 1).float()
    return [(row[:n], words[:n]) for row, words, n in zip(found, ids, lengths(model, ids))]
