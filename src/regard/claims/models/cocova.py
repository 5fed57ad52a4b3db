"""Ma et al. (arXiv:2511.02360): thoughts in vectors find what takes several steps, without writing these down.

Six things, each an image token: its shape, its colour, and the shape that it points at, as one-hot features and
noise. The question names a shape and how many look-ups it takes, one to three: the colour of the named thing, of the
one that it points at, or of the next. So seeing is easy and the search is serial. (Neighbours on a grid, for
pointers, take far longer to learn.) A small network that is told which thought counts stands for the language model,
which in pilots took too long to learn. Arms of equal weights, steps and curriculum: three rounds of one thought; one
round, at once; one round of three thoughts side by side, as many vectors without a chain; and a chain in words, one
round for each, which is taught what to write and reads it next. Until three quarters of the steps all tokens are
kept, as an alignment, then three of six: with fewer from the start, pilots did not learn more than one look-up.
Trained on the answer alone, without contrast and diffusion. Control at test: weights of the selection drawn anew.
Some sixteen short pilots, on one other seed, while the task was made. Stand-ins: all of it is small and generated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...models.cocova import LatentConfig, LatentQFormer, Thoughts
from .. import _nets
from .._measure import Mean, mean

SCALES = "small", "large"
SHAPES, COLOURS, THINGS, HOPS, ROUNDS, KEEP = 8, 6, 6, 3, 3, 3
DIM, FEATURES, NOISE, BATCH, RATE, HELD = 48, 2 * SHAPES + COLOURS, 0.1, 128, 3e-3, 900
STEPS, RUNS = {"small": 800, "large": 3000}, {"small": 1, "large": 5}
ARMS = "at once", "beside", "chain", "thoughts"
ALIGNED, TWO, THREE = 0.75, 0.15, 0.55  # shares of the steps: all tokens are kept until, two and three look-ups from
OVER, UNDER, EASY, HARD, TAUGHT, FOCUS = 0.08, 0.05, 0.85, 0.85, 0.90, 0.5


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Right answers by number of look-ups, of each arm."""
    expected = (
        f"at three look-ups thoughts are {OVER:.0%} or more above at once, by two standard errors over questions, the "
        f"gain of three thoughts side by side is half of that or less, and thoughts are at most {UNDER:.0%} below the "
        "chain, with no word against three; with tokens picked at random they lose half of their gain or more"
    )
    right: dict[str, list[Tensor]] = {name: [] for name in (*ARMS, "at random")}
    focus, sizes = [], {}
    look = torch.arange(HELD) % HOPS
    for run in range(RUNS[scale] * seed, RUNS[scale] * (seed + 1)):
        held = asked(HELD, torch.Generator().manual_seed(run + 10**6), look)
        for arm in ARMS:
            torch.manual_seed(run)
            model = _trained(Reader(arm), STEPS[scale], run)
            sizes[arm] = _nets.size(model)
            said, thoughts = model.answers(held)
            right[arm].append((said == held.colour).double())
            if arm == "thoughts":
                focus.append((thoughts.selected[:, :, 0] == held.path[:, :HOPS])[look == HOPS - 1].double().mean(0))
                nn.init.normal_(model.former.ask.weight)
                nn.init.normal_(model.former.offer.weight)
                right["at random"].append((model.answers(held)[0] == held.colour).double())
    found = {name: torch.stack(of).mean(0) for name, of in right.items()}  # of each question, over runs
    hard = {name: of[look == HOPS - 1] for name, of in found.items()}
    easy = {name: of[look == 0] for name, of in found.items()}

    def above(one: str, other: str) -> Mean:
        return mean(hard[one] - hard[other])

    gain, beside = above("thoughts", "at once"), above("beside", "at once")
    chain, random = above("thoughts", "chain"), above("at random", "at once")
    holds = gain.value >= OVER and gain.above() and beside.value <= gain.value / 2
    holds = holds and chain.value >= -UNDER and random.value <= gain.value / 2
    looked = torch.stack(focus).mean(0)
    table = "; ".join(
        f"{name} " + ", ".join(f"{float(of[look == k].mean()):.0%}" for k in range(HOPS)) for name, of in found.items()
    )
    measured = (
        f"right after one, two, three look-ups: {table}; at three, above at once: thoughts {gain:+.2f}, side by side "
        f"{beside:+.2f}, at random {random:+.2f}; thoughts above the chain {chain:+.2f}; round k's first token is the "
        f"k-th thing on the way in {', '.join(f'{float(x):.0%}' for x in looked)}"
    )
    spread = max(sizes.values()) / min(sizes.values()) - 1
    premises = [
        Premise("one look-up is learned at once", f"{EASY:.0%} or more", f"{easy['at once'].mean():.0%}",
                float(easy["at once"].mean()) >= EASY),
        Premise("three are not", f"{HARD:.0%} or less", f"{hard['at once'].mean():.0%}",
                float(hard["at once"].mean()) <= HARD),
        Premise("the chain can be written", f"{TAUGHT:.0%} or more at three", f"{hard['chain'].mean():.0%}",
                float(hard["chain"].mean()) >= TAUGHT),
        Premise("equal numbers of weights", "within 1%", f"{spread:.1%} apart", spread <= 0.01),
    ]  # fmt: skip

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, of in found.items():
            axes.plot(range(1, HOPS + 1), [float(of[look == k].mean()) for k in range(HOPS)], "o-", label=name)
        axes.set(xlabel="look-ups that the question takes", ylabel="right", ylim=(0, 1.02), xticks=range(1, HOPS + 1))
        axes.legend()

    return Finding(bool(holds), measured, expected, seed, premises=premises, draw=draw)


class Shown(NamedTuple):
    features: Tensor  # [question, thing, feature]
    shape: Tensor  # that the question names [question]
    hops: Tensor  # 0 for one hop [question]
    path: Tensor  # things from the named one on [question, hop + 1]
    way: Tensor  # their shapes, and
    colours: Tensor  # their colours
    colour: Tensor  # the answer [question]


class Reader(nn.Module):
    """A latent Q-Former, and a small network that reads its thoughts and the number of hops."""

    def __init__(self, arm: str) -> None:
        super().__init__()
        self.arm, self.project = arm, nn.Linear(FEATURES, DIM)
        nn.init.normal_(self.project.weight, std=0.7)  # as large as words are
        self.hop = nn.Embedding(HOPS, DIM)
        rounds, thoughts = {"beside": (1, ROUNDS), "thoughts": (ROUNDS, 1)}.get(arm, (1, 1))
        self.former = LatentQFormer(LatentConfig(DIM, rounds=rounds, thoughts=thoughts, keep=KEEP))
        self.read = nn.Sequential(nn.Linear(2 * DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, COLOURS + SHAPES))

    def forward(self, features: Tensor, shape: Tensor, hops: Tensor) -> tuple[Tensor, Thoughts]:
        """Logits of colours and of shapes."""
        word = self.project(F.one_hot(shape, FEATURES).float())  # words and pictures are aligned, as before this phase
        text = torch.stack([word, self.hop(hops)], 1)
        thoughts = self.former(self.project(features), text)
        states = thoughts.states.flatten(1, 2)
        last = states[torch.arange(len(states)), hops.clamp_max(states.shape[1] - 1)]
        return self.read(torch.cat([last, self.hop(hops)], -1)), thoughts

    def loss(self, shown: Shown) -> Tensor:
        if self.arm != "chain":
            return F.cross_entropy(self(shown.features, shown.shape, shown.hops)[0][:, :COLOURS], shown.colour)
        # one hop is taught, from every place on the way
        at = torch.randint(HOPS, shown.shape.shape)[:, None]
        one = torch.zeros_like(shown.hops)
        logits, _ = self(shown.features, shown.way.gather(1, at)[:, 0], one)
        shape, colour = shown.way.gather(1, at + 1)[:, 0], shown.colours.gather(1, at)[:, 0]
        return F.cross_entropy(logits[:, COLOURS:], shape) + F.cross_entropy(logits[:, :COLOURS], colour)

    @torch.no_grad()
    def answers(self, shown: Shown) -> tuple[Tensor, Thoughts]:
        """Colours; the chain writes a shape at each hop, from which it goes on."""
        if self.arm != "chain":
            logits, thoughts = self(shown.features, shown.shape, shown.hops)
            return logits[:, :COLOURS].argmax(-1), thoughts
        zeros = torch.zeros_like(shown.hops)
        logits, thoughts = self(shown.features, shown.shape, zeros)
        found = [logits[:, :COLOURS].argmax(-1)]
        for _ in range(HOPS - 1):
            logits, thoughts = self(shown.features, logits[:, COLOURS:].argmax(-1), zeros)
            found.append(logits[:, :COLOURS].argmax(-1))
        return torch.stack(found, 1).gather(1, shown.hops[:, None])[:, 0], thoughts


def asked(n: int, draws: torch.Generator, hops: Tensor | None = None) -> Shown:
    """Each thing points at one of the others, all in one round trip."""
    hops = torch.randint(HOPS, (n,), generator=draws) if hops is None else hops
    shapes = torch.rand(n, SHAPES, generator=draws).argsort(-1)[:, :THINGS]
    colours = torch.randint(COLOURS, (n, THINGS), generator=draws)
    trip = torch.rand(n, THINGS, generator=draws).argsort(-1)
    after = torch.empty_like(trip).scatter(1, trip, trip.roll(-1, 1))
    steps = [torch.randint(THINGS, (n, 1), generator=draws)]
    for _ in range(HOPS):
        steps.append(after.gather(1, steps[-1]))
    path = torch.cat(steps, 1)
    way = shapes.gather(1, path)
    parts = F.one_hot(shapes, SHAPES), F.one_hot(shapes.gather(1, after), SHAPES), F.one_hot(colours, COLOURS)
    features = torch.cat(parts, -1).float()
    features = features + NOISE * torch.randn(features.shape, generator=draws)
    on_way = colours.gather(1, path)
    return Shown(features, way[:, 0], hops, path, way, on_way, on_way.gather(1, hops[:, None])[:, 0])


def _trained(model: Reader, steps: int, seed: int) -> Reader:
    """Questions of one look-up come first, in all arms; the Q-Former first keeps all tokens, as an alignment."""
    draws = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    config = model.former.config
    for step in range(steps):
        keep = THINGS if step < ALIGNED * steps else KEEP
        model.former.config = replace(config, keep=keep)
        most = 1 + (step >= TWO * steps) + (step >= THREE * steps)
        loss = model.loss(asked(BATCH, draws, torch.randint(most, (BATCH,), generator=draws)))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()
