"""What attention turns to while the question is read is looked at more in the answer, and so is the question.

Qi et al., Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation
(arXiv:2510.22067), by the authors' code. A gaze shift is what attention on an image token gains from one token of the
question to the next, where it gains. Of a layer's heads the half with the largest shifts counts, of the question its
content words; the mean over both, cut at three standard deviations and stretched to 0 to 1, is the picture's saliency.
While answering, in the middle layers, the last query gives image tokens exp(`alpha` times their saliency) times their
weight, in the half of the heads that looks most at the picture. By how much these look more at the picture, `beta`
times that factor the half of the heads that looks most at the question gives to the question.

The paper's layers are 12 to 22 of 32 and 5 to 18 of 28, here 0.36 to 0.70 of the depth; it reads shifts from a layer
that it names for each model, here from the one with most shifts, prompt by prompt.

Deviations: content words are those that are not among `FUNCTION_WORDS`; the code asks a tagger. Without one the code
divides by nothing; here all of the question counts then, as where no processor tells words. A picture without shifts is
left alone. Rows of a batch are apart; the code has batches of one. We had the code, not the paper's text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..call import Call
from ..seam import intervene
from ..tokens import Tokens
from ._method import STACK, Method, at_last, at_prompt, image_ids, image_keys, image_tokens, layers, padded_left

FROM, TO = 0.36, 0.70  # of the depth
CUT = 3.0  # standard deviations
_FUNCTION = (
    "a an the this that these those some any each every no not of in on at by to from with for as and or but if than "
    "is are was were be been am do does did has have had can could will would shall should may might must there here "
    "it its he she they them his her their we us our you your i me my what which who whom whose how when where why "
    "please so then also just"
)
FUNCTION_WORDS = frozenset(_FUNCTION.split())


class Gaze(NamedTuple):
    """Of each token of a prompt, how salient it is in the picture, 0 to 1, and whether the question has it."""

    saliency: Tensor  # [batch, token]
    question: Tensor  # [batch, token] boolean


@dataclass(kw_only=True)
class gift(Method):
    """Raise the attention of the token that speaks to salient parts of the picture, and to the question as much.

    gaze: as `gaze_shifts` finds it for a prompt. alpha: how much the most salient token is raised, nats; 0 changes
    nothing. beta: share of the picture's factor that the question gets. among: layers; None for the paper's.

    The last query of each call is changed: of a prompt that is read in pieces, each piece's.

    ValueError where the model reads no image tokens, has not these layers, or the prompt is of another batch.

    >>> import regard
    >>> from regard.interventions.gift import gaze_shifts, gift
    >>> from regard.zoo.recipes.describer import asked, pictures, tempting
    >>> model, processor = regard.load("describer")
    >>> inputs = asked(processor, pictures(tempting(1)), ["what colour is the plate?"])
    >>> gaze = gaze_shifts(model, inputs, processor)
    >>> float(gaze.saliency.max())
    1.0
    >>> with regard.intervene(model, gift(gaze=gaze)):
    ...     ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    """

    off: ClassVar[Mapping[str, Any]] = {"alpha": 0.0}
    needs = "what the question makes the model look at"

    gaze: Gaze
    alpha: float = 5.0
    beta: float = 1.0
    among: Collection[int] | None = None
    _layers: set[int] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta <= 0:
            raise ValueError(f"gift: alpha is 0 or more and beta more than 0, not {self.alpha} and {self.beta}")

    @classmethod
    def fit(cls, model: nn.Module, inputs: Mapping[str, Any], processor: Any = None, **knobs: Any) -> Self:
        """With what the question in `inputs` makes the model look at."""
        gaze = knobs.pop("gaze", None)
        return cls(gaze=gaze_shifts(model, inputs, processor) if gaze is None else gaze, **knobs)

    def begin(self, model: nn.Module) -> None:
        image_ids(model, "gift")
        known = layers(model, "gift")
        self._layers = set(enhanced(known) if self.among is None else self.among)
        if missing := self._layers - set(known):
            raise ValueError(f"gift: {type(model).__name__} has no layer {min(missing)}")

    def inputs(self, call: Call) -> Call:
        if call.site.stack != STACK or call.site.layer not in self._layers or not self.alpha:
            return call
        if (image := image_keys(call)) is None:
            return call
        saliency, question = (at_prompt(call, value, "gift") for value in self.gaze)
        last = call.query.shape[2] - 1
        weights = call.weights.rows(last, last + 1)[:, :, 0]  # [batch, head, key]
        on_image, on_question = ((weights * keys[:, None]).sum(-1) for keys in (image, question))
        lifted = self.alpha * (saliency * image)[:, None]
        looking, reading = upper_half(on_image), upper_half(on_question)
        raised = (weights * image[:, None] * lifted.exp()).sum(-1)
        before, after = ((mass * looking).sum(1) for mass in (on_image, raised))
        ratio = torch.where(before > 0, self.beta * after / before, 1.0)  # [batch]
        keys = lifted * looking[..., None]
        return at_last(call, keys + ratio.log()[:, None, None] * (reading[..., None] & question[:, None]))


def gaze_shifts(
    model: nn.Module,
    inputs: Mapping[str, Any],
    processor: Any = None,
    *,
    question: Tensor | None = None,
    content: Tensor | None = None,
    among: Collection[int] | None = None,
    static: bool = False,
) -> Gaze:
    """What the question of each prompt makes the model look at, in one plain run.

    question: which tokens it is, boolean [batch, token]; None for all after the last image token but special ones and
    what the chat template of `processor` ends with. content: which of these count; None for those of content words.
    among: the layers whose shifts are averaged; None for the one of each row with most. static: what the question looks
    at, in place of what it turns to, which the paper compares with.

    ValueError where the model reads no image tokens, or a row has no picture, no question after it, or padding on the
    right.
    """
    image_ids(model, "gift")
    padded_left(inputs, "gift")
    question = asked(model, inputs, processor) if question is None else question
    content = spoken(inputs, processor, question) if content is None else content & question
    if (none := ~content.any(1)).any():
        content = torch.where(none[:, None], question, content)
    reader = _Reader(question, content, None if among is None else set(among), static)
    with torch.no_grad(), intervene(model, reader):
        model(**inputs, use_cache=False)
    return Gaze(stretched(reader.mean(), reader.image), question)


def asked(model: nn.Module, inputs: Mapping[str, Any], processor: Any = None) -> Tensor:
    """Which tokens are the question: those after the last picture, see `gaze_shifts`. [batch, token] boolean"""
    ids = inputs["input_ids"]
    image = image_tokens(model, ids, "gift")
    place = torch.arange(ids.shape[1], device=ids.device)
    found = place > (place * image).amax(1, keepdim=True)
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is not None:
        found &= ~torch.isin(ids, ids.new_tensor(tokenizer.all_special_ids))
        ending = ids.new_tensor(_ending(processor, tokenizer))
        if len(ending) and (ids[:, -len(ending) :] == ending).all():
            found[:, -len(ending) :] = False
    if (without := ~image.any(1)).any() or (without := ~found.any(1)).any():
        what = "picture" if not image.any(1).all() else "question after its picture"
        raise ValueError(f"gift: row {int(without.nonzero()[0])} of the inputs has no {what}")
    return found


def _ending(processor: Any, tokenizer: Any) -> list[int]:
    """What a chat ends with for the model to go on."""
    if getattr(processor, "chat_template", None) is None:
        return []
    chat = [{"role": "user", "content": "?"}]
    before, after = (
        processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=more) for more in (False, True)
    )
    return tokenizer(after.removeprefix(before), add_special_tokens=False)["input_ids"]


def spoken(inputs: Mapping[str, Any], processor: Any, question: Tensor) -> Tensor:
    """Which tokens of the question are of content words; all where no processor tells. [batch, token] boolean"""
    if processor is None:
        return question.clone()
    ids = inputs["input_ids"]
    texts = Tokens.plain("text", len(ids), ids.shape[1], ids).texts(processor)
    found = torch.zeros_like(question)
    for row, its in enumerate(question):
        at = its.nonzero()[:, 0].tolist()
        for word in words([texts[row][i] for i in at]):
            text = "".join(texts[row][at[i]] for i in word).strip(" ?.,:;!'\"").lower()
            if any(letter.isalnum() for letter in text) and text not in FUNCTION_WORDS:
                found[row, [at[i] for i in word]] = True
    return found


def words(pieces: Sequence[str]) -> list[list[int]]:
    """Numbers of the pieces of each word: a piece begins one after a space, and everywhere where none has any.

    >>> words([" the", " pl", "ate", "?"])
    [[0], [1, 2, 3]]
    >>> words(["the", "plate"])
    [[0], [1]]
    """
    spaced = any(piece[:1].isspace() for piece in pieces)
    found: list[list[int]] = []
    for i, piece in enumerate(pieces):
        if not found or not spaced or piece[:1].isspace():
            found.append([])
        found[-1].append(i)
    return found


def enhanced(known: Sequence[int]) -> list[int]:
    """The middle layers, by the paper's share of the depth."""
    n = len(known)
    return [known[i] for i in range(n) if FROM * n <= i <= TO * n] or [known[n // 2]]


def upper_half(mass: Tensor) -> Tensor:
    """The half of the heads with most. [batch, head] boolean"""
    chosen = mass.topk(mass.shape[1] // 2, dim=1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(1, chosen, True)


def shifts(weights: Tensor, content: Tensor, image: Tensor, static: bool = False) -> tuple[Tensor, Tensor]:
    """Mean gaze shift of each key in the better half of the heads, [batch, key], and the sum in all heads [batch].

    weights: of the token before the question and of its own, [batch, head, 1 + query, key]. content: which of these
    count, [batch, query]. image: which keys are of the picture, [batch, key].
    """
    risen = weights[:, :, 1:] if static else weights.diff(dim=2).clamp(min=0)
    risen = risen * (content[:, None, :, None] & image[:, None, None])
    risen = risen.sum(2)  # [batch, head, key]
    of_head = risen.sum(-1)
    chosen = upper_half(of_head).to(risen)
    return torch.einsum("bhk,bh->bk", risen, chosen) / (chosen.sum(1) * content.sum(1))[:, None], of_head.sum(1)


def stretched(mean: Tensor, image: Tensor) -> Tensor:
    """Saliency: numbers of image keys, cut at three standard deviations and stretched to 0 to 1. [batch, key]"""
    found = torch.zeros_like(mean)
    for row, its in enumerate(image):
        some = mean[row, its]
        around, spread = some.mean(), CUT * some.std() if len(some) > 1 else 0.0
        some = some.clamp(around - spread, around + spread)
        if some.numel() and (width := some.max() - some.min()) > 0:
            found[row, its] = (some - some.min()) / width
    return found


class _Reader:
    """Gathers the gaze shifts of each layer of the language model; changes nothing."""

    def __init__(self, question: Tensor, content: Tensor, among: Collection[int] | None, static: bool) -> None:
        self.question, self.content, self.among, self.static = question, content, among, static
        self.means: list[Tensor] = []
        self.totals: list[Tensor] = []
        self.image: Tensor

    def inputs(self, call: Call) -> Call:
        wanted = self.among is None or call.site.layer in self.among
        if not wanted or (image := image_keys(call)) is None:
            return call
        at = self.question.any(0).nonzero()[:, 0]
        first, last = int(at[0]), int(at[-1]) + 1
        weights = call.weights.rows(first - 1, last)
        mean, total = shifts(weights, self.content[:, first:last].to(weights.device), image, self.static)
        self.means.append(mean)
        self.totals.append(total)
        self.image = image
        return call

    def mean(self) -> Tensor:
        means, totals = torch.stack(self.means, 1), torch.stack(self.totals, 1)  # [batch, layer, key], [batch, layer]
        if self.among is not None:
            return means.mean(1)
        return means[torch.arange(len(means)), totals.argmax(1)]
