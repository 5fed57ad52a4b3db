"""What papers on hallucination take for granted of a vision-language model, each with its number.

    python -m regard.claims._premises NAME...     measure models of the zoo anew, for their folders and their cards

Each premise is measured on `SCENES` scenes or so, and each paper needs some of them: where one of these is not met, a
claim cannot tell, whatever its numbers say. Bars are ours where a paper gives none.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import zoo
from ..call import Call
from ..catalog import Premise
from ..data.scenes import COLOURS, SHAPES, Object, Scene, questions
from ..evaluation import hallucination
from ..files import written_aside
from ..interventions._method import image_keys, layers
from ..recording import statistic
from ..seam import record
from ..zoo.__main__ import card
from ..zoo.recipes import describer, lookout, viewer
from . import _oracles as oracles
from ._oracles import Muted, as_many, asked_patches, reweighed
from ._shown import JUDGED, Asked, Shown, named, paired

SCENES = 200
FILE = "premises.json"


class Subject:
    """A model of the zoo and what several premises ask of it."""

    def __init__(self, name: str, n: int = SCENES, seed: int = JUDGED) -> None:
        self.name, self.n, self.seed = name, n, seed
        self.model, self.processor = zoo.load(name)
        self.layers = layers(self.model, "a premise")

    @cache  # noqa: B019 - a subject lives as long as a run
    def shown(self, name: str, other: int = 0) -> Shown:
        """Scenes of a set; those of other numbers are other ones, to choose on."""
        return Shown(self.name, name, self.n, self.seed + 500 * other)

    @cache  # noqa: B019
    def colours(self, name: str, other: int = 0) -> tuple[Shown, list[Asked], Tensor]:
        """Scenes, questions on colours, and which of the plain answers are right."""
        shown = self.shown(name, other)
        asked = shown.colours()
        return shown, asked, shown.right(asked)

    @cache  # noqa: B019
    def captions(self) -> list[str]:
        return self.shown("tempted").captions()

    @cache  # noqa: B019
    def looks(self) -> tuple[Tensor, Tensor]:
        """Weights of caption words on each patch [layer, caption, word, head, patch], and which words there are."""
        shown = self.shown("tempted")
        return attended(
            shown, shown.inputs([Asked(i, describer.PROMPTS[0], "") for i in range(self.n)]), self.captions()
        )


def attended(shown: Shown, inputs: Mapping[str, Tensor], said: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Weights on patches of the words of `said` after a prompt, read in one pass; [layer, row, word, head, patch]."""
    ids = [
        [shown.processor.tokenizer.convert_tokens_to_ids(t) for t in shown.processor.tokenizer.tokenize(text)]
        for text in said
    ]
    longest = max(map(len, ids))
    fill = shown.model.config.text_config.pad_token_id
    tail = torch.tensor([row + [fill] * (longest - len(row)) for row in ids])
    there = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in ids])
    given = dict(inputs)
    given["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
    given["attention_mask"] = torch.cat([inputs["attention_mask"], there.to(inputs["attention_mask"])], 1)
    found = [
        _on_patches(shown.model, {k: v[i : i + 25] for k, v in given.items()}, longest) for i in range(0, len(ids), 25)
    ]
    return torch.cat(found, 1), there


def _on_patches(model: nn.Module, given: Mapping[str, Tensor], words: int) -> Tensor:
    """Weights of the last `words` queries on patches. [layer, batch, word, head, patch]"""
    kept: list[Tensor] = []

    @statistic("batch head", title="Nothing")
    def keep(call: Call) -> Tensor | None:
        image = image_keys(call)
        if image is not None:
            n = call.query.shape[2]
            rows = call.weights.rows(n - words, n)  # [batch, head, word, key]
            picked = rows.permute(0, 3, 2, 1)[image].unflatten(0, (len(rows), -1))  # [batch, patch, word, head]
            kept.append(picked.permute(0, 2, 3, 1))
        return call.query.new_zeros(call.query.shape[:2])

    with record(model, keep), torch.inference_mode():
        model(**given, use_cache=False)
    return torch.stack(kept)


# --- the premises ---------------------------------------------------------------------------------------------------


def evidence(s: Subject) -> Premise:
    """A probe of the image tokens, as the language model is given them, is right where the model errs."""
    shown, train = s.shown("tempted"), Shown(s.name, "tempted", 6 * s.n, s.seed + 1_000_000)
    asked = shown.polls()
    said = shown.answers(asked)
    x, y = features(train), presence(train.scenes)
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    probe = nn.Linear(x.shape[1], len(SHAPES))
    optimiser = torch.optim.LBFGS(probe.parameters(), max_iter=200)

    def close() -> Tensor:
        optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(probe((x - mean) / spread), y)
        loss = loss + 1e-3 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(close)
    with torch.inference_mode():
        there = probe((features(shown) - mean) / spread) > 0
    wrong = [(a, text) for a, text in zip(asked, said) if text != a.answer]
    shape = {q.text: i for i, q in enumerate(questions(Scene(), "presence"))}
    found = {
        kind: [bool(there[a.scene, shape[a.text]]) == (a.answer == "yes") for a in some]
        for kind, some in (
            ("false yes", [a for a, _ in wrong if a.answer == "no"]),
            ("errors", [a for a, _ in wrong]),
        )
    }
    share = {kind: float(np.mean(some)) if some else float("nan") for kind, some in found.items()}
    return Premise(
        "evidence is there: a probe of the image tokens is right where the model errs",
        "75% of its false yes, 60% of all errors",
        f"{share['false yes']:.0%} of {len(found['false yes'])}, {share['errors']:.0%} of {len(wrong)}",
        share["false yes"] >= 0.75 and share["errors"] >= 0.6,
    )


@torch.inference_mode()
def features(shown: Shown) -> Tensor:
    """Largest and mean of the image tokens that the language model is given. [scene, 2 dim]"""
    found = []
    for i in range(0, shown.n, 100):
        pixels = shown.processor.image_processor(images=shown.images[i : i + 100], return_tensors="pt")["pixel_values"]
        given = shown.model.model.get_image_features(pixel_values=pixels)
        tokens = torch.stack(list(getattr(given, "pooler_output", given)))
        found.append(torch.cat([tokens.amax(1), tokens.mean(1)], 1))
    return torch.cat(found).clone()


def presence(scenes: Sequence[Scene]) -> Tensor:
    return torch.tensor([[float(bool(scene.find(shape))) for shape in SHAPES] for scene in scenes])


def prior(s: Subject) -> Premise:
    """After a caption that names what seldom comes alone, its absent partner is affirmed, and other shapes are not."""
    shown = s.shown("tempted")
    rng = np.random.default_rng(shown.seed)
    rare = {tied for tied, *_ in describer.BIASES}
    asked: dict[tuple[bool, str], list[Asked]] = {}
    for i, scene in enumerate(shown.scenes):
        there = hallucination.shapes(scene)
        tied, partner = next((a, b) for a, b, _ in describer.BIASES if a in there)
        others = [x for x in SHAPES if x not in {*there, *rare, partner}]
        if partner in there or not others:
            continue
        text = dict(zip(SHAPES, (q.text for q in questions(scene, "presence"))))
        for with_it in (True, False):
            rest = tuple(o for o in scene.objects if with_it or o.shape != tied)
            told = shown.recipe.said(Scene(rest, scene.texture, scale=scene.scale))
            for kind, shape in (("partner", partner), ("other", rng.choice(others).item() if with_it else None)):
                shape = shape or asked[True, "other"][-1].answer
                asked.setdefault((with_it, kind), []).append(Asked(i, after_caption(told, text[shape]), shape))
    yes = {key: torch.tensor([float(text == "yes") for text in shown.answers(some)]) for key, some in asked.items()}
    with_it, without = (paired(yes[key, "partner"], yes[key, "other"]) for key in (True, False))
    things = named(s.captions())
    said = {kind: np.mean([a.answer in things[a.scene] for a in asked[True, kind]]) for kind in ("partner", "other")}
    alone = {kind: shown.answers([a._replace(text=bare(a.text)) for a in asked[True, kind]]) for kind in said}
    affirmed = {kind: np.mean([text == "yes" for text in some]) for kind, some in alone.items()}
    return Premise(
        "a language prior over visible evidence: absent partners affirmed after a caption, less other absent shapes",
        "15 points; 5 or less when the caption does not name the shape that it goes with",
        f"{with_it}, without that name {without}; asked at once {affirmed['partner']:.0%} and {affirmed['other']:.0%} "
        f"yes; named in captions {said['partner']:.0%} and {said['other']:.0%}",
        with_it.value >= 0.15 and with_it.value > 2 * with_it.error and without.value <= 0.05,
    )


def after_caption(told: str, question: str) -> str:
    """A question after a caption that was said."""
    return f"{describer.PROMPTS[0]} assistant: {told} user: {question}"


def bare(text: str) -> str:
    """The question of `after_caption` alone."""
    return text.rpartition("user: ")[2]


def text_dominates(s: Subject) -> Premise:
    looks, there = s.looks()
    mass = looks.sum(-1).mean(3)[:, there].mean(1)  # [layer]
    third = len(mass) // 3
    middle, late = float(mass[third:-third].mean()), float(mass[-third:].mean())
    return Premise(
        "text dominates late layers: attention of caption words on the picture, last third of layers over middle",
        "ratio 0.6 or less, and 0.35 or less late",
        f"{late / middle:.2f}, {late:.2f} late; by layer {' '.join(f'{m:.2f}' for m in mass.tolist())}",
        late / middle <= 0.6 and late <= 0.35,
    )


def growth(s: Subject) -> Premise:
    """Logistic regression of absence on the number of the mention and the log odds of the shape in training."""
    shown = s.shown("tempted")
    known = shown.recipe.usual(600, s.seed)
    rate = {}
    for tied, *_ in describer.BIASES:
        held = [hallucination.shapes(scene) for scene in known if scene.find(tied)]
        rate[tied] = {x: (sum(x in h for h in held) + 0.5) / (len(held) + 1) for x in SHAPES}
    rows, absent = [], []
    for scene, things in zip(shown.scenes, named(s.captions())):
        there = hallucination.shapes(scene)
        tied = next(a for a, *_ in describer.BIASES if a in there)
        for number, shape in enumerate(things, 1):
            odds = rate[tied][shape]
            rows.append([1.0, number, np.log(odds / (1 - odds))])
            absent.append(float(shape not in there))
    x, y = np.array(rows), np.array(absent)
    slope, error = _slope(x, y)
    number = x[:, 1]
    thirds = np.quantile(number, [1 / 3, 2 / 3])
    first, last = y[number <= thirds[0]].mean(), y[number > thirds[1]].mean()
    return Premise(
        "invention grows with the caption: slope of absence over the number of the mention, its prior apart",
        "above 0 by two standard errors, and in the last third of mentions twice the first",
        f"{slope:.2f} (standard error {error:.2f}); {first:.1%} and {last:.1%}; {len(y)} mentions",
        slope > 2 * error and last >= 2 * first,
    )


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Second coefficient of a logistic regression and its standard error; a little ridge keeps it finite."""
    beta = np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ beta))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-3 * np.eye(len(beta))
        beta += np.linalg.solve(hessian, x.T @ (y - p) - 1e-3 * beta)
    return float(beta[1]), float(np.linalg.inv(hessian)[1, 1] ** 0.5)


def falls(s: Subject) -> Premise:
    looks, there = s.looks()
    mass = looks.sum(-1).mean((0, 3))  # [caption, word]
    long = there.sum(1) >= 20
    if long.sum() < 20:
        early = late = float("nan")
    else:
        early, late = float(mass[long, :5].mean()), float(mass[long, 15:20].mean())
    return Premise(
        "attention on the picture falls along the caption: at words 16 to 20 against 1 to 5",
        "lower by a quarter or more",
        f"{early:.2f} to {late:.2f}, in {int(long.sum())} captions that long",
        bool(late <= 0.75 * early),
    )


def tower(s: Subject) -> tuple[Shown, Tensor, Tensor]:
    """Scenes of SEVERAL and MANY kinds, their outlier patches and norms. bool and float [scene, patch]"""
    shown = s.shown("crowded")
    return shown, *seen_by_tower(shown)


@torch.inference_mode()
def seen_by_tower(shown: Shown) -> tuple[Tensor, Tensor]:
    pixels = shown.processor.image_processor(images=shown.images, return_tensors="pt")["pixel_values"]
    hidden = torch.cat(
        [
            shown.model.model.vision_tower(some, output_hidden_states=True).hidden_states[-2][:, 1:]
            for some in pixels.split(100)
        ]
    )
    return lookout.outliers(hidden), hidden.norm(dim=-1)


def outliers(s: Subject) -> Premise:
    shown, out, norms = tower(s)
    pixels = shown.processor.image_processor(images=shown.images, return_tensors="pt")["pixel_values"]
    weights: list[Tensor] = []

    @statistic("batch head", title="Nothing")
    def of_cls(call: Call) -> Tensor:
        weights.append(call.weights.rows(0, 1)[:, :, 0, 1:].mean(1))
        return call.query.new_zeros(call.query.shape[:2])

    with record(shown.model.model.vision_tower, of_cls), torch.inference_mode():
        shown.model.model.vision_tower(pixels)
    late = torch.stack(weights)[3:].mean(0)
    ratio = float((norms.amax(1) / norms.median(1).values).median())
    on_objects = torch.stack([o.any(0) for o in shown.owned])
    pulled = float(late[out].mean() / late.mean()) if out.any() else float("nan")
    on = float(on_objects[out].float().mean()) if out.any() else float("nan")
    return Premise(
        "the tower has outliers on background: largest norm of a patch over the median, weight of the first token",
        "4 or more; 3 times a patch's mean; 10% or less of them on objects",
        f"{ratio:.1f}; {pulled:.1f}; {on:.0%}; {out.sum(1).float().mean():.1f} a picture",
        bool(ratio >= 4 and pulled >= 3 and on <= 0.1),
    )


def decoder_on_outliers(s: Subject) -> Premise:
    shown, asked, plain = s.colours("crowded")
    out = seen_by_tower(shown)[0][[a.scene for a in asked]]
    looks, _ = attended(shown, shown.inputs(asked), [a.answer for a in asked])
    of_picture = looks[2:].mean((0, 2, 3))
    share = float((of_picture * out).sum() / of_picture.sum() / out.float().mean()) if out.any() else 0.0
    chance = torch.rand(out.shape, generator=torch.Generator().manual_seed(s.seed))
    every = torch.stack([shown.owned[a.scene].any(0) for a in asked])
    ranks = chance.masked_fill(~every, 2.0).argsort(1).argsort(1)
    as_objects = (ranks < out.sum(1, keepdim=True)) & every
    hidden = {
        name: paired(shown.right(asked, under=reweighed((~which).float(), s.layers)), plain)
        for name, which in (("outliers", out), ("objects", as_objects))
    }
    return Premise(
        "the decoder looks at the outliers: their share of its attention on the picture over their share of patches",
        "3 or more; hiding them costs 2 points or less, as many patches of objects 10 or more",
        f"{share:.1f}; {hidden['outliers']}, {hidden['objects']}",
        bool(share >= 3 and hidden["outliers"].value >= -0.02 and hidden["objects"].value <= -0.1),
    )


def heads_differ(s: Subject) -> Premise:
    looks, there = s.looks()
    mass = looks.sum(-1)[1:, there].mean(1)  # [layer, head]
    high, low = (float(torch.quantile(mass.flatten(), q)) for q in (0.9, 0.1))
    order = mass.flatten().argsort(descending=True)
    n = len(order) // 4
    shown, asked, plain = s.colours("crowded")
    cost = {}
    for name, some in (("upper", order[:n]), ("lower", order[-n:])):
        heads = [(s.layers[1 + i // mass.shape[1]], i % mass.shape[1]) for i in some.tolist()]
        cost[name] = shown.right(asked, under=lambda model, inputs, at, h=heads: Muted(h))
    gain = paired(cost["lower"], cost["upper"])
    return Premise(
        "heads differ: picture share of a head, 90% quantile over 10%; muting the upper quarter against the lower",
        "4 or more; costs 10 points more",
        f"{high / max(low, 1e-9):.1f} ({high:.2f} and {low:.2f}); {gain}",
        high >= 4 * low and gain.sure(0.1),
    )


def points_at(s: Subject) -> Premise:
    """Best layer and best of the last eight tokens are chosen on other scenes."""
    parts = {}
    for which, other in (("choose", 1), ("judge", 0)):
        shown, asked, plain = s.colours("crowded", other)
        inputs = shown.inputs(asked)
        looks = torch.cat(
            [
                _on_patches(shown.model, {k: v[i : i + 50] for k, v in inputs.items()}, 8)
                for i in range(0, len(asked), 50)
            ],
            1,
        ).mean(3)  # [layer, question, token, patch]
        general = shown.inputs([a._replace(text=describer.PROMPTS[0]) for a in asked])
        base = torch.cat(
            [
                _on_patches(shown.model, {k: v[i : i + 50] for k, v in general.items()}, 1)
                for i in range(0, len(asked), 50)
            ],
            1,
        ).mean(3)
        truth = asked_patches(shown, asked)
        parts[which] = (looks, base, truth, plain)
    looks, base, truth, plain = parts["choose"]
    hit = _hits(looks, truth).mean(1)  # [layer, token]
    layer, token = divmod(int(hit.argmax()), hit.shape[1])
    by_ratio = _hits(looks / base.clamp(min=1e-9), truth).mean(1)
    layer2, token2 = divmod(int(by_ratio.argmax()), hit.shape[1])
    looks, base, truth, plain = parts["judge"]
    raw = _hits(looks, truth)[layer, :, token]
    ratio = _hits(looks / base.clamp(min=1e-9), truth)[layer2, :, token2]
    chance = float(truth.float().mean())
    right, wrong = float(raw[plain > 0].mean()), float(raw[plain == 0].mean())
    return Premise(
        "the question points: the most attended patch is of what is asked about, in right answers, wrong ones, chance",
        "0.6 and 0.35 or more, chance 0.1 or less; by the ratio to a general prompt 1.3 times as often",
        f"{right:.2f}, {wrong:.2f}, {chance:.2f}; {ratio.mean():.2f} by ratio against {raw.mean():.2f}; layer "
        f"{s.layers[layer]}, token {token - 8}",
        bool(right >= 0.6 and wrong >= 0.35 and chance <= 0.1 and ratio.mean() >= 1.3 * raw.mean()),
    )


def _hits(looks: Tensor, truth: Tensor) -> Tensor:
    """Whether the most attended patch is one of those. looks: [layer, question, token, patch]; without the last."""
    best = looks.argmax(-1)
    return truth[torch.arange(len(truth))[None, :, None], best].float()


def unimodal(s: Subject) -> Premise:
    shown, asked, plain = s.colours("crowded")
    looks, _ = attended(shown, shown.inputs(asked), [a.answer for a in asked])
    by_layer = looks.mean((2, 3))  # [layer, question, patch]
    top = by_layer.amax(0)
    inside = (by_layer.argmax(0) > 0) & (by_layer.argmax(0) < len(by_layer) - 1)
    chosen = inside & (top > 0.3 * top.amax(1, keepdim=True))
    middle = s.layers[1:-1]
    cost = [
        shown.right(asked, under=reweighed((~which).float(), middle)) for which in (chosen, as_many(chosen, s.seed))
    ]
    gain = paired(cost[1], cost[0])
    share = float(chosen.float().mean())
    return Premise(
        "few patches are attended most in the middle layers; dropping them there against as many at random",
        "1 to 10% of the patches; costs 10 points more",
        f"{share:.1%}; {gain}",
        bool(0.01 <= share <= 0.1 and gain.sure(0.1)),
    )


def _headroom(what: str, needed: float, s: Subject, family: Callable[..., Any], name: str) -> Premise:
    found = family(*s.colours(name))
    return Premise(
        what,
        f"{100 * needed:.0f} points, more than its control",
        str(found),
        found.oracle.sure(needed) and found.over.sure(),
    )


def crop_headroom(s: Subject) -> Premise:
    return _headroom("cropping would help: true crop of a finer picture, colours", 0.2, s, oracles.crops, "crowded")


def mask_headroom(s: Subject) -> Premise:
    return _headroom("masking would help: all else black, colours", 0.05, s, oracles.masks, "crowded")


def attention_headroom(s: Subject) -> Premise:
    return _headroom("looking would help: true patches times e^3, colours", 0.15, s, oracles.attention, "crowded")


def unstable(s: Subject) -> Premise:
    shown, asked, plain = s.colours("plain")
    rng = torch.Generator().manual_seed(s.seed)
    masks = torch.rand(30, len(asked), oracles.ROWS**2, generator=rng) < 0.3
    images = [shown.images[a.scene] for a in asked]
    pixels = shown.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]

    def masked(which: Tensor) -> Tensor:
        grid = which.view(-1, 1, oracles.ROWS, oracles.ROWS)
        return pixels.masked_fill(F.interpolate(grid.float(), scale_factor=viewer.PATCH) > 0, 0.0)

    @torch.inference_mode()
    def states(given: Tensor) -> Tensor:
        return shown.model.model.vision_tower(given, output_hidden_states=True).hidden_states[-2][:, 1:].clone()

    few = slice(0, 60)
    clean = states(pixels[few])
    mean = torch.stack([states(masked(m)[few]) for m in masks]).mean(0)
    shift = float((mean - clean).norm(dim=-1).mean() / (clean - clean.mean((0, 1))).norm(dim=-1).mean())

    def under(model: nn.Module, inputs: dict[str, Tensor], at: slice) -> None:
        inputs["pixel_values"] = masked(masks[0])[at]

    gain = paired(shown.right(asked, under=under), plain)
    return Premise(
        "features are unstable: mean under 30 masks of 30% less clean, over the spread of clean; answers under one",
        "0.3 or more; falls by 5 points or more",
        f"{shift:.2f}; {gain}",
        bool(shift >= 0.3 and gain.value <= -0.05),
    )


def snowball(s: Subject) -> Premise:
    """A caption that another agent said holds an absent object, or not; the picture is there to see."""
    shown = s.shown("crowded")
    rng = np.random.default_rng(shown.seed)
    asked: dict[bool, list[Asked]] = {True: [], False: []}
    for i, scene in enumerate(shown.scenes):
        absent = [x for x in SHAPES if not scene.find(x) and x not in {tied for tied, *_ in describer.BIASES}]
        if not absent:
            continue
        shape = rng.choice(absent).item()
        extra = Object(shape, rng.choice(list(COLOURS)).item(), "small", 0.5, 0.5)
        text = dict(zip(SHAPES, (q.text for q in questions(scene, "presence"))))[shape]
        for lied in asked:
            asked[lied].append(
                Asked(i, after_caption(shown.recipe.said(scene.plus(extra) if lied else scene), text), "no")
            )
    yes = {lied: torch.tensor([float(t == "yes") for t in shown.answers(some)]) for lied, some in asked.items()}
    gain = paired(yes[True], yes[False])
    return Premise(
        "snowball: false yes where a caption read before invented the object, less where it did not",
        "20 points",
        f"{gain}; {yes[True].mean():.0%} and {yes[False].mean():.0%}",
        gain.sure(0.2),
    )


def redundant(s: Subject) -> Premise:
    shown, asked, plain = s.colours("crowded")
    half = (
        torch.rand(len(asked), oracles.ROWS**2, generator=torch.Generator().manual_seed(s.seed)).argsort(1).argsort(1)
    )
    kept = (half < oracles.ROWS**2 // 2).float()
    gain = paired(shown.right(asked, under=reweighed(kept, s.layers, words=False)), plain)
    return Premise(
        "patches are redundant: half of them dropped at random after the tower",
        "costs 3 to 30 points",
        str(gain),
        -0.3 <= gain.value <= -0.03,
    )


PREMISES: dict[str, Callable[[Subject], Premise]] = {
    "P1": evidence,
    "P2": prior,
    "P3": text_dominates,
    "P4": growth,
    "P5": falls,
    "P6": outliers,
    "P7": decoder_on_outliers,
    "P8": heads_differ,
    "P9": points_at,
    "P10": unimodal,
    "P11": crop_headroom,
    "P12": mask_headroom,
    "P13": attention_headroom,
    "P14": unstable,
    "P15": snowball,
    "P16": redundant,
}


def measure(name: str, *, n: int = SCENES, seed: int = JUDGED) -> dict[str, Premise]:
    """Every premise of a model of the zoo: about three minutes."""
    subject, found = Subject(name, n, seed), {}
    for key, premise in PREMISES.items():
        found[key] = premise(subject)
        print(f"{name} {key} {'met' if found[key].met else 'not met'}: {found[key].measured}", flush=True)
    return found


def keep(name: str, found: Mapping[str, Premise]) -> Path:
    """Keep the numbers beside the model."""
    path = zoo.folder(name) / FILE
    kept = {"model": _digest(path.parent), "premises": {key: asdict(number) for key, number in found.items()}}
    with written_aside(path) as draft:
        draft.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


@cache
def of(name: str) -> dict[str, Premise]:
    """The premises of a model of the zoo, as kept; measured where those kept are of other weights."""
    path = zoo.folder(name) / FILE
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["model"] == _digest(path.parent) and set(kept["premises"]) == set(PREMISES):
            return {key: Premise(**number) for key, number in kept["premises"].items()}
    return measure(name)


def require(name: str, *keys: str) -> str | None:
    """Why a claim that needs these premises cannot tell on a model; None where all are met."""
    return (
        "; ".join(f"{key}, {of(name)[key].what}: {of(name)[key].measured}" for key in keys if not of(name)[key].met)
        or None
    )


def _digest(folder: Path) -> int:
    return zlib.crc32((folder / "model.safetensors").read_bytes())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for model in sys.argv[1:]:
        home = keep(model, measure(model)).parent
        (home / "README.md").write_text(card(model, home, zoo.load(model).model), encoding="utf-8")
