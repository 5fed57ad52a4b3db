"""Ma et al. (arXiv:2511.02360): thoughts in vectors find what takes several steps, without writing these down.

Six things, each an image token: its shape, its colour, and the shape that it points at, as one-hot features and noise.
The question names a shape and a number of hops, one to three; the answer is the colour of the thing where the pointers
lead. So seeing is easy and the search is serial. (Neighbours on a grid, for pointers, take far longer to learn.) Arms,
of equal numbers of weights and steps: the language model of two layers with a latent Q-Former of three rounds; and one
of three wider layers that answers at once, that writes the three shapes on the way before it answers, or that has three
learned constants for thoughts. Trained on the answer alone, without contrast and diffusion. Control at test: the
Q-Former picks image tokens at random. Stand-ins: all of it is small and generated.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...models import cocova as module
from ...models.cocova import CoCoVa, LatentConfig
from .. import _nets
from .._measure import Mean, mean

SCALES = "small", "large"
SHAPES, COLOURS, THINGS, HOPS, ROUNDS, KEEP = 8, 6, 6, 3, 3, 3
DIM, FEATURES, NOISE, BATCH, RATE, HELD = 48, 2 * SHAPES + COLOURS, 0.1, 128, 3e-3, 900
WORDS = SHAPES + COLOURS + HOPS
STEPS, RUNS = {"small": 500, "large": 5000}, {"small": 1, "large": 4}
ARMS = "at once", "chain", "constants", "thoughts"
OVER, UNDER, STEPS_SHARE, EASY, HARD, TAUGHT = 0.08, 0.05, 0.6, 0.85, 0.85, 0.90


class Shown(NamedTuple):
    features: Tensor  # [question, thing, feature]
    words: Tensor  # shape and number of hops [question, 2]
    path: Tensor  # things from the named one on [question, hop + 1]
    told: Tensor  # shapes on the way, then the colour [question, hop + 1]


class Reader(nn.Module):
    """A language model that is shown things, and what comes between the question and its answer."""

    def __init__(self, arm: str) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        thinks = arm == "thoughts"
        layers, wide = (2, 2.0) if thinks else (3, 3.8)
        config = LlamaConfig(
            vocab_size=WORDS,
            hidden_size=DIM,
            intermediate_size=int(wide * DIM),
            num_hidden_layers=layers,
            num_attention_heads=4,
            tie_word_embeddings=False,
        )
        self.arm, self.project = arm, nn.Linear(FEATURES, DIM)
        rounds = ROUNDS if thinks else 0
        self.model = CoCoVa(LlamaForCausalLM(config), LatentConfig(DIM, rounds=rounds, keep=KEEP))
        if not thinks:
            del self.model.former.among, self.model.former.on_image, self.model.former.on_text  # none is called
            del self.model.former.gate, self.model.former.mlp
        self.constants = nn.Parameter(0.02 * torch.randn(ROUNDS if arm == "constants" else 0, DIM))

    def forward(self, shown: Shown, told: Tensor | None = None) -> tuple[Tensor, module.Thoughts]:
        """Logits of what is told, and of one word more."""
        image, words = self.project(shown.features), self.model.language.get_input_embeddings()(shown.words)
        embeds = torch.cat([image, words, self.constants.expand(len(image), -1, -1)], 1)
        place = torch.arange(embeds.shape[1]) < image.shape[1]
        found = self.model(embeds, place.expand(len(image), -1), told)
        return found.logits, found.thoughts

    def loss(self, shown: Shown) -> Tensor:
        truth = shown.told if self.arm == "chain" else shown.told[:, -1:]
        logits, _ = self(shown, truth[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), truth.flatten())

    @torch.no_grad()
    def answers(self, shown: Shown) -> tuple[Tensor, module.Thoughts]:
        """Colours, after what it writes itself."""
        told = shown.told[:, :0]
        for _ in range(HOPS if self.arm == "chain" else 0):
            told = torch.cat([told, self(shown, told)[0][:, -1:].argmax(-1)], 1)
        logits, thoughts = self(shown, told)
        return logits[:, -1].argmax(-1), thoughts


def asked(n: int, draws: torch.Generator, hops: Tensor | None = None) -> Shown:
    """Each thing points at one of the others, all in one round trip."""
    hops = torch.randint(1, HOPS + 1, (n,), generator=draws) if hops is None else hops
    shapes = torch.rand(n, SHAPES, generator=draws).argsort(-1)[:, :THINGS]
    colours = torch.randint(COLOURS, (n, THINGS), generator=draws)
    trip = torch.rand(n, THINGS, generator=draws).argsort(-1)
    after = torch.empty_like(trip).scatter(1, trip, trip.roll(-1, 1))
    path = [torch.randint(THINGS, (n, 1), generator=draws)]
    for _ in range(HOPS):
        path.append(after.gather(1, path[-1]))
    way = torch.cat(path, 1)
    parts = F.one_hot(shapes, SHAPES), F.one_hot(shapes.gather(1, after), SHAPES), F.one_hot(colours, COLOURS)
    features = torch.cat(parts, -1).float()
    features = features + NOISE * torch.randn(features.shape, generator=draws)
    end = way.gather(1, hops[:, None])
    words = torch.cat([shapes.gather(1, way[:, :1]), SHAPES + COLOURS + hops[:, None] - 1], 1)
    told = torch.cat([shapes.gather(1, way[:, 1:]), SHAPES + colours.gather(1, end)], 1)
    return Shown(features, words, way, told)
