"""Masks of where an edit belongs, from attention to words, smoothed over the graph of self-attention.

Soni, Soni and Rambhatla, LOCATEdit: Graph Laplacian Optimized Cross Attention for Localized Text-Guided Image Editing
(arXiv:2503.21541), by the authors' code; the paper's text was not at hand. Two texts are painted from the same noise.
From a fifth of the steps on, the cross attention m0 of words, in the mean of heads and layers, is smoothed: with W
the symmetric part of mean self-attention, L its Laplacian and w = sigmoid(alpha (m0 - threshold)), m minimises
sum w^2 (m - m0)^2 + strength m' L m. These maps are added up; stretched to 0 to 1, where they exceed `cut`, in either
picture, is where the second may differ from the first.

The authors' code also swaps attention between the two (prompt-to-prompt), starts from a given picture without inversion
and shifts an image adapter's embedding: left out, so what is edited is a picture that the model paints. They take maps
of 32 x 32 for self-attention and 16 x 16 for words; here the largest of each up to these sizes.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..call import Call
from ._method import Method
from ._painting import attention, prompts

SELF, CROSS = 32 * 32, 16 * 16  # tokens of a map, at most
Map = tuple[Tensor, tuple[int, int]]  # [text, token, ...], and the rows and columns of tokens


class locatedit(Method):
    """Keep a picture as the first text has it, but where the words are in which a text differs from that.

    words: of each text, the first being the one that is kept, the positions of the words in question among its tokens;
    all texts are painted together, from the same noise. alpha, threshold: of the confidence in a place's attention.
    strength: of smoothing, 0 for none. cut: of a map that is stretched to 0 to 1, from where on there is a difference;
    below 0, everywhere. start: share of the steps that come before.

    Goes to `regard.intervene` and, as `callback_on_step_end=method.on_step_end`, to the pipeline. ValueError where the
    model has no cross attention to words beside self-attention, or paints another number of texts.

    >>> import regard, torch
    >>> from regard.interventions.locatedit import locatedit
    >>> transformer, pipeline = regard.load("painter")
    >>> texts = ["a red circle and a blue star", "a red circle and a green star"]
    >>> method = locatedit.fit(transformer, {"prompt": texts}, pipeline)
    >>> method.words
    [[6], [6]]
    >>> noise = [torch.Generator().manual_seed(0) for _ in texts]
    >>> with regard.intervene(transformer, method):
    ...     kept, edited = pipeline(texts, generator=noise, callback_on_step_end=method.on_step_end).images
    >>> method.mask((32, 32)).shape  # text, row, column
    torch.Size([2, 32, 32])
    """

    off: ClassVar[Mapping[str, Any]] = {"cut": -1.0}
    needs = "the words in which texts differ from the first"

    def __init__(
        self,
        *,
        words: Sequence[Sequence[int]],
        alpha: float = 2.61,
        threshold: float = 0.4858,
        strength: float = 0.78,
        cut: float = 0.2204,
        start: float = 0.2,
    ) -> None:
        if len(words) < 2 or not all(words):
            raise ValueError(
                "locatedit: words are positions in two texts or more, at least one in each, the first text being the "
                "one that is kept"
            )
        self.words, self.alpha, self.threshold, self.strength = words, alpha, threshold, strength
        self.cut, self.start = cut, start
        self._forget()

    def _forget(self) -> None:
        self.step, self.sum = 0, None
        self._self: dict[tuple[int, int], list[Tensor]] = {}
        self._cross: dict[tuple[int, int], list[Tensor]] = {}

    @classmethod
    def fit(cls, model: nn.Module, inputs: Mapping[str, Any], processor: Any = None, **knobs: Any) -> Self:
        """With the words in which the texts of `inputs` differ from the first; processor: the pipeline."""
        if "words" not in knobs:
            attention(model, "locatedit")
            knobs["words"] = differing(prompts(inputs, "locatedit"), processor.tokenizer)
        return cls(**knobs)

    def begin(self, model: nn.Module) -> None:
        kinds = {cross for cross, _ in attention(model, "locatedit").values()}
        if kinds != {True, False}:
            raise ValueError(f"locatedit: {type(model).__name__} has no cross attention to words beside self-attention")
        self._forget()

    def output(self, call: Call, output: Tensor) -> Tensor:
        n = call.query.shape[2]
        if n > (CROSS if call.site.cross else SELF):
            return output
        grids = set() if call.query_tokens is None else set(call.query_tokens.grids)
        texts = len(self.words)
        if len(grids) != 1 or len(call.query) not in (texts, 2 * texts):
            raise ValueError(
                f"locatedit: {call.site} runs on {len(call.query)} pictures of {len(grids)} sizes; words are of "
                f"{texts} texts, painted together with or without classifier-free guidance"
            )
        (grid,) = grids
        weights = call.weights.dense()[-texts:].detach()
        if not call.site.cross:
            self._self.setdefault(grid, []).append(weights.mean(1))
        else:
            of_words = [row[..., list(at)].sum(-1).mean(0) for row, at in zip(weights, self.words)]
            self._cross.setdefault(grid, []).append(torch.stack(of_words))
        return output

    def on_step_end(self, pipeline: Any, step: int, time: Any, kept: dict[str, Any]) -> dict[str, Any]:
        """What a pipeline of diffusers calls after each step; makes the latents of each text the first's outside."""
        self.step += 1
        graphs, looks = self._self, self._cross
        self._self, self._cross = {}, {}
        if self.step < int(self.start * len(pipeline.scheduler.timesteps)):
            return kept
        if not graphs or not looks:
            raise ValueError(
                "locatedit: no attention was seen in this step: paint in a block of regard.intervene(model, method); "
                "maps larger than 32 x 32, and 16 x 16 of words, are not read"
            )
        self.add(_largest(looks), _largest(graphs))
        latents = kept["latents"]
        where = self.mask(latents.shape[-2:]).to(latents.device)
        either = (where | where[:1])[:, None]
        return {**kept, "latents": torch.where(either, latents, latents[:1])}

    def add(self, cross: Map, graph: Map) -> Tensor:
        """Smooth the words' attention [text, token] over [text, token, token]; the map of this step and all before.

        [text, row, column].
        """
        found, (rows, columns) = graph
        looked = interpolate(cross[0].unflatten(1, cross[1])[:, None].float(), (rows, columns))[:, 0].flatten(1)
        knobs = {"alpha": self.alpha, "threshold": self.threshold, "strength": self.strength}
        new = smoothed(looked, found, **knobs).unflatten(1, (rows, columns))
        self.sum = new if self.sum is None else self.sum + new
        return self.sum

    def mask(self, size: tuple[int, int], cut: float | None = None) -> Tensor:
        """Where each text's words are, by all steps so far. Boolean, [text, row, column]"""
        if self.sum is None:
            raise ValueError("locatedit: nothing has been painted yet")
        large = interpolate(self.sum[:, None], size)[:, 0]
        low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
        stretched = (large - low) / (high - low).clamp_min(torch.finfo(large.dtype).tiny)
        return stretched > (self.cut if cut is None else cut)


def smoothed(
    cross: Tensor, graph: Tensor, *, alpha: float = 2.61, threshold: float = 0.4858, strength: float = 0.78
) -> Tensor:
    """Attention to words, made alike where places look at each other. [batch, token], in float32

    cross: of each place, [batch, token]; graph: weights among places, [batch, token, token]. strength: 0 leaves `cross`
    as it is.

    >>> import torch
    >>> from regard.interventions.locatedit import smoothed
    >>> print(smoothed(torch.tensor([[1.0, 0.0]]), torch.full((1, 2, 2), 0.5), alpha=0.0, strength=0.5))
    tensor([[0.6667, 0.3333]])
    """
    cross, graph = cross.float(), graph.float()
    sure = torch.sigmoid(alpha * (cross - threshold)).square()
    symmetric = (graph + graph.mT) / 2
    system = torch.diag_embed(sure + strength * symmetric.sum(-1)) - strength * symmetric
    return torch.cholesky_solve((sure * cross)[..., None], torch.linalg.cholesky(system))[..., 0]


def differing(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Of each text, the positions of the tokens in which it differs from the first; of that, those that any lacks.

    ValueError where there are fewer than two texts, or one has no words of its own.
    """
    if len(texts) < 2:
        raise ValueError(
            f"locatedit: the picture of the first text is edited to fit the others; give two texts or more, not "
            f"{len(texts)}"
        )
    first, *others = [tokenizer(text)["input_ids"] for text in texts]
    found, lacked = [], set()
    for text, ids in zip(texts[1:], others):
        codes = difflib.SequenceMatcher(None, first, ids, autojunk=False).get_opcodes()
        own = [k for kind, _, _, i, j in codes if kind != "equal" for k in range(i, j)]
        lacked |= {k for kind, i, j, _, _ in codes if kind != "equal" for k in range(i, j)}
        if not own:
            raise ValueError(f"locatedit: {text!r} has no words that {texts[0]!r} lacks; give `words`")
        found.append(own)
    if not lacked:
        raise ValueError(f"locatedit: {texts[0]!r} has no words that another text lacks; give `words`")
    return [sorted(lacked), *found]


def _largest(maps: Mapping[tuple[int, int], Sequence[Tensor]]) -> Map:
    """The mean of the maps of the largest size."""
    grid = max(maps, key=lambda size: size[0] * size[1])
    return torch.stack(list(maps[grid])).mean(0), grid
