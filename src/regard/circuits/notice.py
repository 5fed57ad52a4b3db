"""What of a vision-language model makes up for a meaningful change of the picture or the question.

Golovanevsky, Rudman, Lepori et al., What Do VLMs NOTICE? A Mechanistic Interpretability Pipeline for Noise-free
Text-Image Corruption and Evaluation (arXiv:2406.16320), with the arithmetic of their code at wrudman/NOTICE. Instead of
noise, the corrupted run has another picture that differs in one meaning (semantic image pairs), or another word of as
many tokens in the question (symmetric token replacement). What a head, the attention of a layer or the whole layer
gives in the clean run is put into the corrupted one, and the effect is how much of the difference between right and
wrong answer comes back: (patched - corrupted) / (clean - corrupted), the mean over rows that are answered rightly in
both.

The first version of the paper speaks of BLIP's cross attention alone; the published one adds LLaVA, which attends to
the picture among its words. Here it is one function of any stack: the model's cross attention where it has some, its
language model's heads otherwise. `head_roles` puts into numbers, which are ours, what the paper sees in maps;
`universal` takes a top share of each task's heads. Minimal pairs of generated scenes are ours, in place of SVO-Probes,
MIT-States and faces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ..call import Call, Site
from ..data.scenes import COLOURS, SHAPES, Scene, questions
from ..seam import intervene
from ._gates import Head, frozen, layout
from ._patching import Contrast, Inputs, Place, Score, answering, ranked

__all__ = ["Minimal", "head_roles", "notice", "semantic_pairs", "together", "token_pairs", "universal"]

Part = Literal["head", "attention", "block"]
Task = Literal["colour", "presence"]
OUTLIERS = 0.05  # share of patches, those of the longest keys


def notice(
    model: nn.Module,
    clean: Inputs,
    corrupted: Inputs,
    score: Score,
    *,
    part: Part = "head",
    token: int | Tensor | None = -1,
    by_token: bool = False,
    stack: str | None = None,
    at_once: int = 16,
) -> xr.DataArray:
    """How much of the right answer each head brings back: 0 none, 1 all, below 0 it suppresses it. [layer, head]

    clean, corrupted: inputs of the model, of as many rows and tokens, which differ in the picture or in a word. score:
    of logits [batch, token, vocabulary], for each row [batch], above 0 where the clean answer wins. part: "head", what
    a head gives; "attention", all heads of a layer, [layer]; "block", what the layer gives on, [layer]. token: at which
    it is put, one for all or [batch]; None, at all together. by_token: at each by itself, whatever `token` is, with
    `token` the last axis. stack: the cross attention of the model where it has one, otherwise its language model.
    at_once: places in a pass.

    Rows count in which the clean run's score is above 0 and the corrupted one's below; `usable` is their share.
    ValueError where there is none.

    >>> import torch
    >>> from regard.claims._planted import planted, questions
    >>> task, other = questions(8), questions(8, seed=1)
    >>> def score(logits):
    ...     right, wrong = (logits[:, -1].gather(1, of.answers[:, None])[:, 0] for of in (task, other))
    ...     return right - wrong
    >>> found = notice(planted(), {"input_ids": task.ids}, {"input_ids": other.ids}, score)
    >>> [int(found.argmax(...)[axis]) for axis in ("layer", "head")]  # what makes the first word the answer
    [1, 5]
    """
    if part not in Part.__args__:
        raise ValueError(f"part is one of {', '.join(Part.__args__)}, got {part!r}")
    between = _Between(model, clean, corrupted, score, stack)
    contrast = between.contrast
    tokens = range(contrast.tokens) if by_token else [between.at(token)]
    if part == "block":
        found = [between.blocks(one, at_once) for one in tokens]
    elif part == "attention":
        heads = [[(layer, head) for head in range(site.heads)] for layer, site in contrast.sites.items()]
        found = [between.effects([(of, one) for of in heads], at_once) for one in tokens]
    else:
        found = [between.effects([(head, one) for head in contrast.heads], at_once) for one in tokens]
    if part == "head":
        tables = [contrast._table(one) for one in found]
    else:
        tables = [xr.DataArray(one.numpy(), {"layer": list(contrast.sites)}, ("layer",)) for one in found]
    result = xr.concat(tables, "token").assign_coords(token=list(tokens)) if by_token else tables[0]
    attributes = {"stack": contrast.stack, "long_name": "Effect", "part": part, "usable": between.share}
    return result.transpose("layer", ..., *(["token"] if by_token else [])).assign_attrs(attributes)


def together(
    model: nn.Module,
    clean: Inputs,
    corrupted: Inputs,
    score: Score,
    heads: Sequence[Head],
    *,
    token: int | Tensor | None = -1,
    stack: str | None = None,
) -> float:
    """How much of the right answer these heads bring back at once; see `notice`."""
    if not heads:
        raise ValueError("no heads are named, so nothing comes back")
    between = _Between(model, clean, corrupted, score, stack)
    if absent := [head for head in heads if tuple(head) not in between.contrast.heads]:
        raise ValueError(f"there are no heads {absent} in {between.contrast.stack}")
    return float(between.effects([(list(heads), between.at(token))], 1)[0])


class _Between:
    """A contrast in which the corrupted run is the one that is changed, and what counts of it."""

    def __init__(self, model: nn.Module, clean: Inputs, corrupted: Inputs, score: Score, stack: str | None) -> None:
        self.contrast = contrast = Contrast(model, corrupted, clean, score, stack=stack or answering(model))
        self.usable = (contrast.broken > 0) & (contrast.whole < 0)
        if not self.usable.any():
            raise ValueError(
                "no row has a score above 0 on the clean input and below 0 on the corrupted one: the model answers "
                "none of them rightly in both"
            )
        self.share = float(self.usable.double().mean())

    def at(self, token: int | Tensor | None) -> Tensor | None:
        """The token of each row. [batch]"""
        return None if token is None else self.contrast.at(token).int().argmax(1)

    def restored(self, patched: Tensor) -> Tensor:
        """Of scores [place, batch]: the mean effect. [place]"""
        contrast = self.contrast
        effect = (patched - contrast.whole) / (contrast.broken - contrast.whole)
        return effect[:, self.usable].mean(-1).cpu()

    def effects(self, places: Sequence[Place], at_once: int) -> Tensor:
        parts = [places[i : i + at_once] for i in range(0, len(places), at_once)]
        return torch.cat(
            [self.restored(self.contrast.run([self.contrast.put(some)], times=len(some))) for some in parts]
        )

    def blocks(self, token: Tensor | int | None, at_once: int) -> Tensor:
        """The effect of what each layer gives on. [layer]"""
        contrast = self.contrast
        held: dict[int, Tensor] = {}

        def keep(site: Site, hidden: Tensor) -> Tensor:
            if site.stack == contrast.stack:
                held[site.layer] = hidden
            return hidden

        contrast.run([], contrast.other, times=1, more={"hidden": keep})
        at = torch.ones(contrast.rows, contrast.tokens, dtype=torch.bool)
        if token is not None:
            at = torch.arange(contrast.tokens) == torch.as_tensor(token).expand(contrast.rows)[:, None]
        layers, found = list(contrast.sites), []
        for start in range(0, len(layers), at_once):
            some = layers[start : start + at_once]

            def put(site: Site, hidden: Tensor, some: Sequence[int] = some) -> Tensor:
                if site.stack != contrast.stack or site.layer not in some:
                    return hidden
                hidden = hidden.clone().unflatten(0, (len(some), -1))
                mine = hidden[some.index(site.layer)]
                mine.copy_(torch.where(at[..., None].to(mine.device), held[site.layer], mine))
                return hidden.flatten(0, 1)

            found.append(self.restored(contrast.run([], times=len(some), more={"hidden": put})))
        return torch.cat(found)


def universal(effects: Iterable[xr.DataArray], *, share: float = 0.2) -> xr.DataArray:
    """Which heads are among the top share of every task's. boolean [layer, head]

    effects: of `notice`, one for each task and each kind of corruption.
    """
    effects = list(effects)
    if not effects:
        raise ValueError("no effects are given")
    if not 0 < share <= 1:
        raise ValueError(f"share lies above 0 and is at most 1, got {share}")
    if unlike := [one.sizes for one in effects if one.sizes != effects[0].sizes or set(one.dims) != {"layer", "head"}]:
        raise ValueError(f"effects are [layer, head] of one model, and there are {dict(unlike[0])}")
    n = max(1, round(share * int(effects[0].notnull().sum())))
    marked = xr.ones_like(effects[0], dtype=bool).drop_attrs()
    for one in effects:
        top = one.where(one > 0)
        kept = {head for head in ranked(top)[:n] if float(top.sel(layer=head[0], head=head[1])) > 0}
        for layer in one["layer"].values:
            for head in one["head"].values:
                marked.loc[{"layer": layer, "head": head}] &= (int(layer), int(head)) in kept
    return marked


def head_roles(
    model: nn.Module, inputs: Inputs, masks: Tensor, *, token: int = -1, stack: str | None = None
) -> xr.Dataset:
    """What each head looks at from one token, of the patches of a picture. [layer, head]

    `role`: "outliers", where more than half of its weight on patches is on the 5% of them whose keys are longest;
    "object", where its share on the object is more than twice the object's area; "elsewhere", less than half of that;
    otherwise "". `on_object`, `on_outliers`: these shares, 0 to 1, means over rows; attribute `area`.

    masks: patches of the object, boolean [batch, patch], as many as the model has of a picture. In cross attention the
    patches are the last keys, after those of class tokens.
    """
    if masks.ndim != 2 or masks.dtype != torch.bool or not masks.any(1).all() or masks.all(1).any():
        raise ValueError("masks are boolean [batch, patch], with patches of an object, and of none, in each row")
    patches, found = masks.shape[1], {}

    def look(call: Call) -> Call:
        if call.site.stack == stack:
            n = call.query.shape[2]
            if not -n <= token < n:
                raise ValueError(f"token {token} lies outside the {n} tokens")
            row = call.weights.rows(token % n, token % n + 1)[:, :, 0]
            at = _patches(call, patches)[:, None].expand(-1, row.shape[1], -1)
            row = row.gather(-1, at)
            long = call.key.norm(dim=-1).repeat_interleave(row.shape[1] // call.key.shape[1], 1).gather(-1, at)
            few = long.topk(max(1, round(OUTLIERS * patches)), -1).indices
            share = row / row.sum(-1, keepdim=True)
            on = (share * masks[:, None].to(share)).sum(-1).mean(0)
            found[call.site.layer] = torch.stack([on, share.gather(-1, few).sum(-1).mean(0)]).cpu()
        return call

    with frozen(model), torch.no_grad():
        stack, _, rows = layout(model, lambda model: model(**inputs), stack or answering(model))
        if rows != len(masks):
            raise ValueError(f"masks are of {len(masks)} rows, and the model was run on {rows}")
        with intervene(model, _Look(look)):
            model(**inputs)
    shares = torch.stack([found[layer] for layer in sorted(found)], 1).double().numpy()
    area = float(masks.double().mean())
    on, out = shares
    roles = np.select([out > 0.5, on > 2 * area, on < area / 2], ["outliers", "object", "elsewhere"], "")
    dims = ("layer", "head")
    return xr.Dataset(
        {"role": (dims, roles), "on_object": (dims, on), "on_outliers": (dims, out)},
        {"layer": sorted(found), "head": range(on.shape[1])},
        attrs={"stack": stack, "area": area},
    )


class _Look:
    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs


def _patches(call: Call, patches: int) -> Tensor:
    """The keys that are patches of the picture. [batch, patch]"""
    n_key, tokens = call.key.shape[2], call.tokens
    if tokens is not None and not call.site.cross and len(tokens) == n_key:
        image = tokens.role("image")
        if bool((image.sum(1) == patches).all()):
            return image.nonzero()[:, 1].view(len(image), patches).to(call.key.device)
        raise ValueError(f"{call.site} has {image.sum(1).tolist()} patches in its rows, and masks are of {patches}")
    if call.site.cross and n_key >= patches:
        return torch.arange(n_key - patches, n_key, device=call.key.device).expand(len(call.key), -1)
    raise ValueError(f"{call.site} does not say which of its {n_key} keys are patches of a picture")


class Minimal(NamedTuple):
    """A question on a picture with its answer, and its twin, which differs in the picture or in a word alone.

    `wrong` is what is right of the twin.
    """

    scene: Scene
    text: str
    answer: str
    other_scene: Scene
    other_text: str
    wrong: str


def semantic_pairs(scenes: Iterable[Scene], task: Task = "colour", *, seed: int = 0) -> list[Minimal]:
    """Questions whose pictures differ in one meaning: what is asked about has another colour, or another shape.

    Of each scene that allows one: the colour of a shape that is there once, or whether it is there.

    >>> from regard.data.scenes import Object
    >>> [pair] = semantic_pairs([Scene((Object("star", "red", "small", 0.7, 0.5),))], "presence")
    >>> pair.text, pair.answer, pair.wrong
    ('is there a star?', 'yes', 'no')
    """
    rng, found = np.random.default_rng(seed), []
    for scene in scenes:
        for i in _once(scene, rng)[:1]:
            one = scene.objects[i]
            if task == "colour":
                colour = _any([c for c in COLOURS if c != one.colour], rng)
                other = scene.but(i, colour=colour)
            else:
                other = scene.but(i, shape=_any([s for s in SHAPES if not scene.find(s)], rng))
            asked, twin = (_asked(of, task, one.shape) for of in (scene, other))
            found.append(Minimal(scene, asked.text, asked.answer, other, asked.text, twin.answer))
    return found


def token_pairs(scenes: Iterable[Scene], task: Task = "colour", *, seed: int = 0) -> list[Minimal]:
    """Questions on one picture that differ in a word: the name of another shape, of another colour or not there.

    >>> from regard.data.scenes import Object
    >>> stars = Scene((Object("star", "red", "small", 0.7, 0.5), Object("ring", "blue", "small", 0.2, 0.5)))
    >>> [pair] = token_pairs([stars])
    >>> pair.text, pair.answer, pair.other_text, pair.wrong
    ('what colour is the star?', 'red', 'what colour is the ring?', 'blue')
    """
    rng, found = np.random.default_rng(seed), []
    for scene in scenes:
        shapes = [scene.objects[i].shape for i in _once(scene, rng)]
        if not shapes:
            continue
        colour = {shape: scene.objects[scene.find(shape)[0]].colour for shape in shapes}
        if task == "colour":
            others = [shape for shape in shapes if colour[shape] != colour[shapes[0]]]
        else:
            others = [s for s in SHAPES if not scene.find(s)]
        if others:
            asked, twin = (_asked(scene, task, shape) for shape in (shapes[0], _any(others, rng)))
            found.append(Minimal(scene, asked.text, asked.answer, scene, twin.text, twin.answer))
    return found


def _once(scene: Scene, rng: np.random.Generator) -> list[int]:
    """The objects whose shape is there once, in some order."""
    return [i for i in rng.permutation(len(scene.objects)).tolist() if len(scene.find(scene.objects[i].shape)) == 1]


def _any(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _asked(scene: Scene, task: Task, shape: str) -> Any:
    if task not in Task.__args__:
        raise ValueError(f"task is one of {', '.join(Task.__args__)}, got {task!r}")
    if task == "presence":
        return questions(scene, task)[SHAPES.index(shape)]
    [i] = scene.find(shape)
    return next(q for q in questions(scene, task) if q.about == (i,))
