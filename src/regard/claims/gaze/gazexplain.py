"""Do sentences name what their fixation is on, and do like things get like sentences more for the alignment?

Scenes of coloured shapes, seen by the bundled viewer. The people are planted: asked for a colour, they look at each
shape of that colour, from left to right, then at the others, and say "there is a red star left of the middle" of each.
Two models begin alike, one of them without the loss of alignment (at `large` on three seeds). Sentences are judged at
fixations that the model itself draws, where these are on a shape; the control gives each that of the next fixation.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertLMHeadModel

from ... import zoo
from ...catalog import Finding, Premise
from ...data.loaders import Scanpath
from ...data.scenes import COLOURS, Dials, Scene, render, sample
from ...gaze.gazexplain import (
    GazeXplain,
    GazeXplainConfig,
    action_loss,
    alignment_loss,
    duration_loss,
    targets,
)
from ...gaze.scanmatch import scanmatch
from ...zoo.recipes import viewer
from ...zoo.words import WORDS, tokenizer
from .._measure import Mean, mean

SCALES = "small", "large"
TRAIN, TEST = {"small": 700, "large": 6000}, 150
STEPS, BATCH, RATE = {"small": 170, "large": 2000}, 24, 3e-3
SEEDS = {"small": 1, "large": 3}
DRAWS = 300  # of scenes, for the error of a correlation
LAYER, SIDE = 4, viewer.SIZE // viewer.PATCH
WIDTH, MOST = 64, 4  # of both models; fixations of a path
JITTER = 3.0  # pixels of a fixation about the middle of its shape
SCENES = Dials(objects=(3, 4), clutter=(0, 4))
SAY = (*WORDS, "middle")
CONFIG = GazeXplainConfig(
    features=128,
    task=WIDTH,
    dim=WIDTH,
    rows=SIDE,
    columns=SIDE,
    fixations=MOST + 1,
    heads=4,
    encoder_layers=2,
    decoder_layers=2,
    dropout=0.0,
)

EXPECTED = (
    "at the fixations that it draws, 70% or more of sentences name the colour and shape that is there, and 40 points "
    "more than sentences of other fixations of the path, by two standard errors over scenes; with the alignment, "
    "likeness of sentences follows that of features more closely than without, by 0.05 of a correlation and by two "
    "standard errors over scenes drawn anew"
)


class Shown(NamedTuple):
    """features [scene, cell, feature]; task [scene, task]; owner [scene, cell], which object is there, -1 none"""

    scenes: list[Scene]
    features: Tensor
    task: Tensor
    owner: Tensor
    paths: list[Scanpath]
    sentences: list[list[str]]


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """What is said at drawn fixations, beside shuffled ones, and with and without the alignment."""
    n = TRAIN[scale]
    every = _shown(n + TEST, seed)
    learned, judged = _part(every, slice(0, n)), _part(every, slice(n, None))
    named, shuffled, agree, alike = [], [], {True: [], False: []}, []
    for number in range(SEEDS[scale]):
        for aligned in (True, False):
            model, decoder = _trained(learned, STEPS[scale], aligned, SEEDS[scale] * seed + number)
            paths = model.sample(judged.features, judged.task, (viewer.SIZE, viewer.SIZE), seed=seed)
            said = model.explain(judged.features, judged.task, paths, decoder, _words(), longest=14, beams=1)
            agree[aligned].append(_agreement(judged, paths, said))
            if aligned:
                own, other = _naming(judged, paths, said)
                named.append(own)
                shuffled.append(other)
                match = [scanmatch(a, b, columns=SIDE, rows=SIDE) for a, b in zip(paths, judged.paths)]
                alike.append(float(np.mean(match)))
                shown = paths, said
    # Scenes are the same for each seed, so their errors are over scenes, of means over seeds.
    right, wrong = (np.nanmean(of, 0) for of in (named, shuffled))
    both = ~np.isnan(right) & ~np.isnan(wrong)
    share, over = mean(right[~np.isnan(right)]), mean((right - wrong)[both])
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(0, TEST, TEST) for _ in range(DRAWS)]
    whole = np.arange(TEST)
    agreed = {arm: float(np.mean([_correlation(of, whole) for of in runs])) for arm, runs in agree.items()}
    anew = [np.mean([_correlation(a, d) - _correlation(b, d) for a, b in zip(*agree.values())]) for d in drawn]
    more = Mean(agreed[True] - agreed[False], float(np.std(anew)))
    names = share.value >= 0.7 and over.value >= 0.4 and over.above()
    aligns = more.value >= 0.05 and more.above()
    holds = None if names and not aligns and more.error > 0.05 else names and aligns
    measured = (
        f"named rightly {share:.2f}, above sentences of other fixations by {over:.2f}; correlation of likeness of "
        f"sentences with that of features: with the alignment {agreed[True]:.2f}, without "
        f"{agreed[False]:.2f}, more by {more:+.3f}"
    )
    known = _known(every, n)
    premises = [
        Premise(
            "a linear layer on the cell's features names the pair there", "85% or more", f"{known:.0%}", known >= 0.85
        ),
        Premise(
            "drawn paths are as planted (ScanMatch)", "0.5 or more", f"{np.mean(alike):.2f}", np.mean(alike) >= 0.5
        ),
    ]

    def draw(figure: Any) -> None:
        paths, said = shown
        pictures = render(judged.scenes[:2], viewer.SIZE)
        for i, axes in enumerate(figure.subplots(1, 2)):
            axes.imshow(pictures.image(i))
            axes.plot(*paths[i].places.T, "o-", color="white", markeredgecolor="black")
            axes.set(xticks=[], yticks=[])
            axes.set_title("\n".join(f"{k + 1}: {text}" for k, text in enumerate(said[i])), fontsize=7)

    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=draw)


@cache
def _words() -> Any:
    return tokenizer(32, words=SAY)


@torch.no_grad()
def _shown(n: int, seed: int) -> Shown:
    model, _ = zoo.load("viewer")
    rng = np.random.default_rng(seed)
    scenes = [sample(SCENES, viewer.HELD_OUT + seed, i) for i in range(n)]
    states, owners = [], []
    for first in range(0, n, 100):
        pictures = render(scenes[first : first + 100], viewer.SIZE)
        states.append(model(viewer.pixels(pictures), output_hidden_states=True).hidden_states[LAYER][:, 1:])
        middle = viewer.PATCH // 2
        owners.append(torch.from_numpy(pictures.owner[:, middle :: viewer.PATCH, middle :: viewer.PATCH]).flatten(1))
    features = torch.cat(states)
    features = (features - features.mean((0, 1))) / features.std((0, 1))
    codes = torch.randn(len(COLOURS), WIDTH, generator=torch.Generator().manual_seed(0))  # of tasks
    tasks, paths, sentences = [], [], []
    for scene in scenes:
        colour = str(rng.choice([one.colour for one in scene.objects]))
        order = sorted(scene.objects, key=lambda one: (one.colour != colour, one.x))
        middles = viewer.SIZE * np.array([[one.x, one.y] for one in order])
        places = np.clip(middles + JITTER * rng.normal(size=middles.shape), 0, viewer.SIZE - 1)
        lasting = 1000 * np.exp(-1.3 + 0.3 * rng.normal(size=len(order)))
        paths.append(Scanpath(places, (viewer.SIZE, viewer.SIZE), lasting))
        sides = ["left" if one.x < 0.5 else "right" for one in order]
        sentences.append(
            [f"there is a {one.colour} {one.shape} {side} of the middle" for one, side in zip(order, sides)]
        )
        tasks.append(codes[list(COLOURS).index(colour)])
    return Shown(scenes, features, torch.stack(tasks), torch.cat(owners).long(), paths, sentences)


def _part(shown: Shown, part: slice) -> Shown:
    return Shown(*(of[part] for of in shown))


def _trained(shown: Shown, steps: int, aligned: bool, seed: int) -> tuple[GazeXplain, Any]:
    torch.manual_seed(seed)
    model = GazeXplain(CONFIG)
    words = _words()
    decoder = BertLMHeadModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=32,
            is_decoder=True,
            add_cross_attention=True,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=words.pad_token_id,
        )
    )
    wanted = targets(shown.paths, CONFIG)
    texts = [[*of, *[""] * (CONFIG.fixations - len(of))] for of in shown.sentences]
    ids = words([text + " " + words.eos_token for of in texts for text in of], padding=True, return_tensors="pt")
    ids = ids["input_ids"].view(len(texts), CONFIG.fixations, -1)
    parameters = [*model.parameters(), *decoder.parameters()]
    optimiser = torch.optim.AdamW(parameters, RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    chance = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(len(texts), (BATCH,), generator=chance)
        features, task, cells = shown.features[some], shown.task[some], wanted.cells[some]
        gazed = model(features, task)
        there = wanted.fixations[some]
        given, said = model.for_words(gazed, task, cells)[there], ids[some][there]
        out = decoder(
            input_ids=said,
            attention_mask=(said != words.pad_token_id).long(),
            encoder_hidden_states=given,
            output_hidden_states=True,
        )
        labels = said[:, 1:].masked_fill(said[:, 1:] == words.pad_token_id, -100)
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels.flatten())
        loss = loss + action_loss(gazed.log_actions, cells, wanted.actions[some])
        loss = loss + duration_loss(gazed.log_mean, gazed.log_variance, wanted.durations[some], there)
        if aligned:
            first = torch.zeros(*there.shape, WIDTH).masked_scatter(there[..., None], out.hidden_states[-1][:, 0])
            pairs = there[:, None] & there[:, :, None]
            loss = loss + alignment_loss(model.alike(features, gazed, cells, first), pairs).sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
    return model.eval(), decoder.eval()


def _cells(path: Scanpath) -> np.ndarray:
    return targets([path], CONFIG).cells[0, : len(path)].numpy() - 1


def _naming(shown: Shown, paths: list[Scanpath], said: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Of each scene the share of sentences that name what is there, and that of the next fixation's; NaN of none."""
    own, other = np.full((2, len(paths)), np.nan)
    for row, (path, texts) in enumerate(zip(paths, said)):
        there = shown.owner[row, _cells(path)].tolist()
        pairs = [f"{(o := shown.scenes[row].objects[i]).colour} {o.shape}" if i >= 0 else "" for i in there]
        if any(pairs):
            own[row] = np.mean([pair in text for pair, text in zip(pairs, texts) if pair])
            if len(texts) > 1:
                turned = texts[1:] + texts[:1]
                other[row] = np.mean([pair in text for pair, text in zip(pairs, turned) if pair])
    return own, other


def _agreement(shown: Shown, paths: list[Scanpath], said: list[list[str]]) -> list[np.ndarray]:
    """Of each scene, for each two fixations of its path, the cosines of bags of words and of features. [pair, 2]"""
    found = []
    for row, (path, texts) in enumerate(zip(paths, said)):
        features = F.normalize(shown.features[row, _cells(path)], dim=-1)
        bags = [Counter(text.split()) for text in texts]
        lengths = [sum(count**2 for count in bag.values()) ** 0.5 for bag in bags]
        rows = [
            (sum(bags[i][word] * bags[j][word] for word in bags[i]) / max(lengths[i] * lengths[j], 1e-9), seen)
            for i in range(len(bags))
            for j, seen in enumerate((features[i] @ features[:i].T).tolist())
        ]
        found.append(np.array(rows).reshape(-1, 2))
    return found


def _correlation(pairs: list[np.ndarray], scenes: np.ndarray) -> float:
    return float(np.corrcoef(np.concatenate([pairs[scene] for scene in scenes]).T)[0, 1])


def _known(shown: Shown, n: int) -> float:
    """How often a linear layer on a cell's features names the pair of the shape there, in scenes not fitted on."""
    labels = torch.full_like(shown.owner, -1)
    for row, scene in enumerate(shown.scenes):
        pairs = torch.tensor([*viewer.pairs(scene), -1])
        labels[row] = pairs[shown.owner[row]]
    fit, judge = (labels[part] >= 0 for part in (slice(0, n), slice(n, None)))
    x, y = shown.features[:n][fit], labels[:n][fit]
    layer = torch.nn.Linear(x.shape[1], len(viewer.PAIRS))
    torch.nn.init.zeros_(layer.weight)
    optimiser = torch.optim.Adam(layer.parameters(), 1e-2)
    for first, last in pairwise(range(0, 200 * 256, 256)):
        some = torch.arange(first, last) % len(x)
        optimiser.zero_grad()
        F.cross_entropy(layer(x[some]), y[some]).backward()
        optimiser.step()
    with torch.no_grad():
        return float((layer(shown.features[n:][judge]).argmax(-1) == labels[n:][judge]).float().mean())
