"""Attributions of one prediction by models of growing depth: do they order the words alike, and who finds the reason?

On Neely et al., A Song of (Dis)agreement (arXiv:2205.04559), who find that attention agrees with no attribution, and
attributions not with each other, in DistilBERT. Sentences with a known reason stand in for their data sets, and the
zoo's namer, a BERT of four layers, for their transformer; a classifier of the mean of the embeddings is what is not
complex. Scores at random agree with nothing, so a method is compared only if it works: its top word is of the reason in
most sentences. One bar for that was tried.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ... import zoo
from ...attribution import attribute
from ...catalog import Finding, Premise
from ...data.sentences import FEELINGS, Sentence, sentences
from ...evaluation.disagreement import disagreement
from .._measure import Mean, mean

SCALES = "small", "large"
EXPECTED = (
    "among attention (rollout) and attributions whose top word is of the reason in 60% of sentences or more, each two "
    "have a Kendall correlation below 0.5 in the namer, and all pairs a mean below 0.4 by two standard errors; in a "
    "classifier of mean "
    "embeddings, "
    "the control, that of gradient x input and integrated gradients is above 0.9"
)
SENTENCES = {"small": 60, "large": 500}
METHODS = ("rollout", "attention_x_gradient", "gradient_x_input", "integrated_gradients", "normgrad", "grad_cam")
KNOBS = {"integrated_gradients": {"steps": 400}}  # as many as it needs to add up
SIMPLE = ("gradient_x_input", "integrated_gradients")
HELD = 10**6  # number of the first sentence that is explained
STEPS, BATCH, WIDTH, RATE = 200, 64, 32, 0.02


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Agreement of each two methods, in a simple model and in the namer; and how often the top word is the reason."""
    model, tokenizer = zoo.load("namer")
    told = sentences(SENTENCES[scale], seed=seed, start=HELD)
    inputs = dict(tokenizer([s.text for s in told], padding=True, return_tensors="pt"))
    words = _words(told, inputs["input_ids"].shape[1])
    found = {method: abs(attribute(model, inputs, method=method, **KNOBS.get(method, {}))) for method in METHODS}
    each = disagreement(found, features=words)
    agree = each.mean("batch")
    reasons = _words(told, inputs["input_ids"].shape[1], reason=True)
    hits = {method: _hit(scores, words, reasons) for method, scores in found.items()}
    chance = float(np.mean(reasons.sum(1) / words.sum(1)))
    working = [method for method in METHODS if hits[method] >= 0.6]
    tau = {
        (one, other): mean(each["kendall"].sel(one=one, other=other).dropna("batch").values)
        for one, other in itertools.combinations(working, 2)
    }

    simple = _simple(model, tokenizer, seed)
    plain = {method: abs(attribute(simple, inputs, method=method)) for method in SIMPLE}
    simply = disagreement(plain, features=words).mean("batch").sel(one=SIMPLE[0], other=SIMPLE[1])

    pairs = [each["kendall"].sel(one=one, other=other).values for one, other in tau]
    overall = mean(np.nanmean(pairs, axis=0)) if pairs else Mean(np.nan, np.nan)
    holds = all(pair.value < 0.5 for pair in tau.values()) and overall.below(0.4) and float(simply["kendall"]) > 0.9
    off = agree.where(agree["one"] != agree["other"])
    measured = (
        f"Kendall's correlation in the namer {overall:.2f} over pairs of {len(working)} methods that work: "
        + ", ".join(f"{one} and {other} {pair:.2f}" for (one, other), pair in tau.items())
        + f"; {float(off['overlap'].mean()):.0%} of the top 3 are shared, {float(off['chance'].mean()):.0%} by chance. "
        f"Simple classifier: {float(simply['kendall']):.2f}. The top word is of the reason in "
        f"{', '.join(f'{hit:.0%} ({name})' for name, hit in hits.items())}, by chance in {chance:.0%}"
    )
    enough = Premise(
        "attention and two attributions or more find the reason",
        "their top word in 60% of sentences",
        ", ".join(working) or "none",
        "rollout" in working and len(working) >= 3,
    )
    draw = partial(_draw, agree, hits, chance)
    return Finding(holds, measured, EXPECTED, seed, premises=[enough], draw=draw)


class _Mean(nn.Module):
    """Classifies the mean of the embeddings of the words."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embeddings, self.out = nn.Embedding(config.vocab_size, WIDTH), nn.Linear(WIDTH, len(FEELINGS))

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        from types import SimpleNamespace

        mask = attention_mask[..., None].float()
        return SimpleNamespace(logits=self.out((self.embeddings(input_ids) * mask).sum(1) / mask.sum(1)))


def _simple(namer: Any, tokenizer: Any, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = _Mean(namer.config)
    optimiser = torch.optim.Adam(model.parameters(), RATE)
    for step in range(STEPS):
        told = sentences(BATCH, seed=seed, start=step * BATCH)
        batch = tokenizer([s.text for s in told], padding=True, return_tensors="pt")
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        loss = nn.functional.cross_entropy(logits, torch.tensor([s.label for s in told]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.zero_grad()
    return model.eval()


def _words(told: list[Sentence], n: int, *, reason: bool = False) -> np.ndarray:
    """Which tokens are words, or words of the reason. [batch, token]"""
    found = np.zeros((len(told), n), bool)
    for row, sentence in zip(found, told):  # a word is a token, after the class token
        row[1 : 1 + len(sentence.words)] = sentence.rationale if reason else True
    return found


def _hit(scores: xr.DataArray, words: np.ndarray, reasons: np.ndarray) -> float:
    top = np.where(words, scores.values, -1).argmax(1)
    return float(reasons[np.arange(len(top)), top].mean())


def _draw(agree: xr.Dataset, hits: dict[str, float], chance: float, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    names = [str(name).replace("_", " ") for name in agree["one"].values]
    tau = agree["kendall"].values
    shown = left.imshow(tau, vmin=-1, vmax=1, cmap="PuOr_r")
    for i, j in np.ndindex(tau.shape):
        left.text(j, i, f"{tau[i, j]:.2f}", ha="center", va="center", fontsize=8, color="w" if tau[i, j] > 0.7 else "k")
    left.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.set_title("Kendall's correlation in the namer")
    figure.colorbar(shown, ax=left, shrink=0.7)
    right.barh(range(len(hits)), list(hits.values()), color="tab:purple")
    right.set_yticks(range(len(hits)), names, fontsize=8)
    right.invert_yaxis()
    right.axvline(chance, color="0.4", linestyle=":", label="chance")
    right.set(xlim=(0, 1), xlabel="share of sentences", title="The top word is of the reason")
    right.legend(frameon=False)
