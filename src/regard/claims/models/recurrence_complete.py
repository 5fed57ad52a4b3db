"""Keiblinger (arXiv:2510.06828): a recurrence follows a state over any length; models parallel over time lose it.

A sequence of steps, each with a jump of 1 to 4. A pointer starts at the first step; a step is executed only where the
pointer stands, and sends it on by its jump. Was this step executed? Each answer needs the one before. The recurrence of
the paper's model, over vectors of single steps, against causal transformers of 1, 2 and 4 layers as wide, equal numbers
of training steps. A model's critical time is the first step at which it is right in less than 90% of the sequences.
Control: a question on the same sequences that needs no depth, asked along: was there a jump of 4 by now? What is shown
is that transformers do not learn it in so many steps, not that they could not represent it. No pilot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...models.recurrence_complete import FrameActionModel, FrameConfig

SCALES = "small", "large"
STEPS = {"small": 350, "large": 5000}
LENGTH, SHORT, FARTHER, DIM, BATCH, RATE, HELD, JUMPS = 64, 4, 128, 64, 32, 3e-3, 2000, 4
LAYERS = (1, 2, 4)
RIGHT, EARLY, CONTROL = 0.9, 32, 0.98


class Parallel(nn.Module):
    """A causal transformer with learned positions, as deep as its layers at whatever length."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(JUMPS, DIM), nn.Parameter(0.02 * torch.randn(LENGTH, DIM))
        layer = nn.TransformerEncoderLayer(DIM, 4, 2 * DIM, 0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.read = nn.Linear(DIM, 2)

    def forward(self, jumps: Tensor) -> Tensor:
        length = jumps.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.read(self.body(self.embed(jumps) + self.positions[:length], mask=mask, is_causal=True))


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Accuracy at each step of a recurrence and of three transformers, on fresh sequences."""
    expected = (
        f"right in {RIGHT:.0%} or more at each of {LENGTH} steps with the recurrence, and at each of {FARTHER}; every "
        f"transformer falls below before step {EARLY}, the one of {LAYERS[-1]} layers later than that of {LAYERS[0]}; "
        f"what needs no depth all of them tell in {CONTROL:.0%} or more at every step"
    )
    models: dict[str, nn.Module] = {}
    early: dict[str, float] = {}
    for layers in (0, *LAYERS):
        name = f"{layers} layer{'s' * (layers > 1)}" if layers else "recurrence"
        for length in (SHORT, LENGTH) if layers else (LENGTH,):
            torch.manual_seed(seed)
            model = Parallel(layers) if layers else _recurrence()
            _train(model, length, STEPS[scale], seed)
            if length == SHORT:
                early[name] = float(_right(model, SHORT, seed)[:, 0].min())
            else:
                models[name] = model
    right = {name: _right(model, LENGTH, seed) for name, model in models.items()}
    critical = {name: _critical(of[:, 0]) for name, of in right.items()}
    beyond = _right(models["recurrence"], FARTHER, seed)[:, 0]
    parallel = [name for name in models if name != "recurrence"]
    easy = {name: float(right[name][:, 1].min()) for name in parallel}
    holds = critical["recurrence"] is None and _critical(beyond) is None
    holds = holds and all((critical[name] or LENGTH) < EARLY for name in parallel)
    holds = holds and (critical[parallel[-1]] or LENGTH) > (critical[parallel[0]] or LENGTH)
    holds = holds and min(easy.values()) >= CONTROL
    error = 0.5 / HELD**0.5
    measured = (
        f"recurrence right in {float(right['recurrence'][:, 0].min()):.1%} or more at each of {LENGTH} steps, "
        f"{float(beyond.min()):.1%} of {FARTHER}; below {RIGHT:.0%} from step "
        + ", ".join(f"{critical[name]} ({name})" for name in parallel)
        + f"; at the last step {', '.join(f'{float(right[name][-1, 0]):.1%}' for name in parallel)}, a guess "
        f"{_guess(seed):.1%}; without depth {', '.join(f'{of:.1%}' for of in easy.values())}; errors {error:.1%}"
    )
    learned = Premise(
        "the transformers learn the task where their depth is enough",
        f"{RIGHT:.0%} right at each of {SHORT} steps, trained on such",
        ", ".join(f"{of:.1%}" for of in early.values()),
        min(early.values()) >= RIGHT,
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(range(FARTHER), beyond, color="black", label="recurrence")
        for name in parallel:
            axes.plot(range(LENGTH), right[name][:, 0], label=name)
        axes.axvline(LENGTH - 1, color="grey", linestyle=":", label="trained length")
        axes.axhline(_guess(seed), color="grey", linewidth=0.5)
        axes.set(xlabel="step", ylabel="right: was it executed?", ylim=(0.5, 1.01))
        axes.legend()

    return Finding(holds, measured, expected, seed, premises=[learned], draw=draw)


def _recurrence() -> FrameActionModel:
    return FrameActionModel(FrameConfig(dim=DIM, actions=2), head=nn.Embedding(JUMPS, DIM))


def _sequences(n: int, length: int, lots: torch.Generator) -> tuple[Tensor, Tensor]:
    """Jumps less 1 [sequence, step]; whether the step is executed, and whether a jump of 4 was seen [.., step, 2]."""
    jumps = torch.randint(JUMPS, (n, length), generator=lots)
    executed = torch.zeros(n, length)
    left = torch.zeros(n, dtype=torch.long)  # steps until the pointer
    for step in range(length):
        here = left == 0
        executed[:, step] = here.float()
        left = torch.where(here, jumps[:, step], left - 1)
    return jumps, torch.stack([executed, (jumps == JUMPS - 1).cummax(1).values.float()], -1)


def _train(model: nn.Module, length: int, steps: int, seed: int) -> None:
    lots = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    model.train()
    for _ in range(steps):
        jumps, wanted = _sequences(BATCH, length, lots)
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(model(jumps), wanted).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def _right(model: nn.Module, length: int, seed: int) -> Tensor:
    """Share of fresh sequences in which both answers are right at each step. [step, 2]"""
    jumps, wanted = _sequences(HELD, length, torch.Generator().manual_seed(seed + 10**6))
    found = torch.cat([model(some) for some in jumps.split(500)])
    return ((found > 0) == wanted.bool()).float().mean(0)


def _critical(right: Tensor) -> int | None:
    below = (right < RIGHT).nonzero()
    return int(below[0]) if len(below) else None


def _guess(seed: int) -> float:
    """How often the more frequent answer is right at the last step."""
    share = float(_sequences(HELD, LENGTH, torch.Generator().manual_seed(seed + 10**6))[1][:, -1, 0].mean())
    return max(share, 1 - share)
