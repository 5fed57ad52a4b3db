"""Planted chunk starts and anchors are found in a trained model, and credit by them makes a policy learn faster.

On Li et al., Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy
Optimization (arXiv:2510.13554), sections 4 and 5. The language is made up: a topic, then chunks of a start and three
tokens that follow from it, in an alphabet that starts share, so that within a chunk a model has to look near. Which
start comes next depends on the topic and on the start before: where a chunk opens it has to look far, at topics. Truth
is the language, not the model: the row that opens a chunk is the one that predicts its first token. That this row and
the first token itself both look far, so that WAAD changes little from one to the other and falls only after the second,
was found when the claim ran; the area for first tokens is reported, and was not what was expected.

This is the second form of the experiment. In the first, what followed in a chunk hung on no other token, and learning
was shorter; it did not hold either: the areas were 0.73 and 0.75, and coupled credit learned no faster. Language and
length of learning were changed after that, on other seeds; the expectation was not.

Learning is group-relative policy optimisation without clipping, on policy, of a model that knows chunks and draws
starts at random; the reward is the share of starts that are right, given once for the whole response. Beside uniform
credit it is compared with the same factors at random places, since any factor above 1 also makes steps larger.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...catalog import Finding
from ...extras import needs
from ...seam import record
from ...statistics.preplan_anchor import credit, preplan_anchor
from ...statistics.received_ahead import received_ahead

SCALES = "small", "large"
EXPECTED = (
    "in held-out text, the area under the ROC curve is 0.75 or more for rows that open a chunk by the change of WAAD, "
    "and for topics by FAI (chance: 0.5); mean reward while learning is higher with coupled credit than with uniform "
    "credit, and than with the same credit at random places, by two standard errors of the differences over seeds"
)
TOPICS, STARTS, LETTERS, BODY = 2, 4, 4, 3  # kinds of topics, of starts, of what follows these; how many follow
CHUNK = 1 + BODY
FIRST_START = 1 + TOPICS  # 0 begins a text; topics, starts and letters follow
VOCABULARY = FIRST_START + STARTS + LETTERS
BODIES = FIRST_START + STARTS + np.array([[0, 1, 2], [0, 2, 3], [1, 1, 0], [1, 3, 1]])  # what follows each start
ARMS = ("uniform", "random", "coupled")
SEGMENTS, LONG = 3, 8  # topics of a text, and chunks after each
RUNS, STEPS, PROMPTS, GROUP, CHUNKS = 5, 60, 8, 8, 5  # of learning; chunks of a response
NEAR, FAR = 3, 20  # horizon of FAI in responses so short


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Train on the language and look for its chunks and topics; then let policies learn it with and without credit."""
    with needs("this claim", "claims"):
        from sklearn.metrics import roc_auc_score

    language = Language(seed)
    model = model_of(seed)
    train(model, lambda: language.texts(16, SEGMENTS, LONG), 220)
    ids = language.texts(64, SEGMENTS, LONG)
    found = looked_at(model, ids, prompt=1)
    start = (ids >= FIRST_START) & (ids < FIRST_START + STARTS)
    with torch.no_grad():
        right = float((model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:])[start[:, 1:]].float().mean())
    topic = (ids > 0) & (ids < FIRST_START)
    opens = torch.roll(start | topic, -1, 1)
    areas = []
    for truth, name in ((opens, "change"), (topic, "fai"), (start | topic, "change")):
        values = found[name].values
        areas.append(float(roc_auc_score(truth[np.isfinite(values)], values[np.isfinite(values)])))

    base = model_of(seed + 1)
    train(base, lambda: language.texts(32, 1, CHUNKS, right=False), 150)
    curves = np.zeros((len(ARMS), RUNS * (1 if scale == "small" else 6), STEPS))
    for run in range(curves.shape[1]):
        for i, arm in enumerate(ARMS):
            curves[i, run] = learn(copy.deepcopy(base), Language(1000 * seed + run + 1), arm, seed=run)
    mean = curves.mean(-1)  # [arm, run]
    gains = mean[2] - mean[:2]
    error = 2 * gains.std(1, ddof=1) / gains.shape[1] ** 0.5
    faster, slower = gains.mean(1) > error, gains.mean(1) < -error
    holds: bool | None = min(areas[:2]) >= 0.75 and not slower.any()
    if holds and not faster.all():
        holds = None
    measured = (
        f"Model right on {right:.0%} of starts. Area {areas[0]:.2f} for rows that open a chunk, {areas[1]:.2f} for "
        f"topics, {areas[2]:.2f} for first tokens by the change of WAAD. "
        f"Mean reward over {STEPS} steps and {curves.shape[1]} runs: "
        + ", ".join(f"{arm} {value:.3f}" for arm, value in zip(ARMS, mean.mean(1)))
        + "; coupled above "
        + ", above ".join(f"{a} by {g:+.3f} (two s.e. {e:.3f})" for a, g, e in zip(ARMS, gains.mean(1), error))
        + "."
    )

    def draw(figure: Any) -> None:
        axes = figure.subplot_mosaic([["waad", "reward"], ["fai", "reward"]])
        shown = slice(1 + LONG * CHUNK + 1, 1 + 2 * (LONG * CHUNK + 1))  # the second segment
        position = np.arange(ids.shape[1])[shown]
        for name, title in (("waad", "WAAD, tokens"), ("fai", "FAI, share")):
            values = found[name].values[:, shown].mean(0)
            axes[name].plot(position, values)
            axes[name].vlines(position[opens[0, shown]], values.min(), values.max(), color="0.85", zorder=0)
            axes[name].set(title=f"{title}; lines open chunks")
        axes["fai"].set(xlabel="position")
        for arm, curve in zip(ARMS, curves.mean(1)):
            axes["reward"].plot(np.convolve(curve, np.full(5, 0.2), "valid"), label=arm)
        axes["reward"].set(xlabel="step", ylabel="mean reward of 5 steps", title=f"Credit, {curves.shape[1]} runs")
        axes["reward"].legend()

    return Finding(holds, measured, EXPECTED, seed, draw=draw)


class Language:
    """Which start follows, given the topic and the start before (the last column: none)."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.next = self.random.integers(STARTS, size=(TOPICS, STARTS + 1))

    def segment(self, chunks: int, right: bool = True) -> list[int]:
        """A topic and its chunks; where `right` is False, starts are drawn at random."""
        topic, start = int(self.random.integers(TOPICS)), STARTS
        tokens = [1 + topic]
        for _ in range(chunks):
            start = int(self.next[topic, start] if right else self.random.integers(STARTS))
            tokens += [FIRST_START + start, *BODIES[start].tolist()]
        return tokens

    def texts(self, n: int, segments: int, chunks: int, right: bool = True) -> Tensor:
        return torch.tensor(
            [[0, *(token for _ in range(segments) for token in self.segment(chunks, right))] for _ in range(n)]
        )

    def reward(self, ids: Tensor) -> Tensor:
        """Share of right starts in a response of chunks to [0, topic]. [batch]"""
        topic, starts = ids[:, 1] - 1, ids[:, 2::CHUNK] - FIRST_START
        before = torch.cat([torch.full_like(starts[:, :1], STARTS), starts[:, :-1]], dim=1).clamp(0, STARTS)
        return (starts == torch.from_numpy(self.next)[topic[:, None], before]).float().mean(1)


def model_of(seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(model: nn.Module, texts: Any, steps: int, rate: float = 3e-3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        ids = texts()
        cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def learn(model: nn.Module, language: Language, arm: str, seed: int) -> list[float]:
    """Mean reward of each step of policy optimisation."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.0)
    torch.manual_seed(seed)
    rewards = []
    for _ in range(STEPS):
        topics = 1 + torch.randint(TOPICS, (PROMPTS, 1)).repeat_interleave(GROUP, 0)
        prompt = torch.cat([torch.zeros_like(topics), topics], dim=1)
        ids = model.generate(prompt, max_new_tokens=CHUNKS * CHUNK, do_sample=True, top_k=0)
        reward = language.reward(ids)
        groups = reward.view(PROMPTS, GROUP)
        advantage = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        factor = torch.ones(1)
        if arm != "uniform":
            factor = torch.from_numpy(credit(looked_at(model, ids, prompt=2, near=NEAR, far=FAR)).values).float()[:, 2:]
            if arm == "random":
                factor = factor.gather(1, torch.rand(factor.shape).argsort(1))
        weight = advantage * torch.where(advantage > 0, factor, 1.0)
        chosen = model(ids).logits[:, 1:-1].log_softmax(-1).gather(-1, ids[:, 2:, None])[..., 0]
        (-(weight * chosen).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(float(reward.mean()))
    return rewards


@torch.no_grad()
def looked_at(model: nn.Module, ids: Tensor, prompt: int, near: int = 10, far: int = 50) -> xr.Dataset:
    """Preplan and anchor tokens of all but the first `prompt` tokens."""
    roles = ["text"] * prompt + ["generated"] * (ids.shape[1] - prompt)
    ahead = partial(received_ahead, near=near, far=far)
    with record(model, "distance", "windowed_distance", received_ahead=ahead, roles=roles) as recording:
        model(ids)
    return preplan_anchor(recording.tree["language_model"].to_dataset(), near=near, far=far)
