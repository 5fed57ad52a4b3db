"""Room volumes (arXiv:2309.13504): a transformer of patches is nearer to the truth than a convolutional network.

Rooms of 10 to 10,000 cubic metres, whose reverberation time says nothing of their volume; spoken digits of one second
at 8 kHz, by speakers and in rooms that were not trained on; noise 10 to 30 dB below. The networks are of one size,
see the same batches and take as many steps. The paper's transformer starts from one trained on pictures; here it starts
from nothing, and is far smaller. Controls: volumes shuffled in training, and phases of other clips; beside them a ridge
on what the clip's loudness tells of its decay. Three pilots on other seeds, for batches and the rates of training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...data.loaders.series import spoken_digits
from ...data.rooms import heard, impulse_response
from ...models.room_volume import features, mean_mult, room_volume
from .._data import folder
from .._measure import mean
from .._nets import fit, size

SCALES = "small", "large"
STEPS, TRAIN, TRAININGS = {"small": 360, "large": 3000}, {"small": 1200, "large": 8000}, {"small": 1, "large": 3}
HELD, BATCH, SAMPLES = 400, 16, 8000
RATES = {"transformer": 7e-4, "convolutions": 2e-3}
FORM: dict[str, Any] = {"bands": 16, "window": 128, "hop": 64, "phases": 4}
SIZES: dict[str, Any] = {"rows": 24, "columns": 124, "patch": 8, "stride": 6, "dim": 64, "layers": 2, "heads": 4}
CHANNELS = 16, 24, 40, 56, 64, 80


class Convolutional(nn.Module):
    """Six convolutions, four of them followed by pooling, and a linear reading of the mean over places."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip((1, *CHANNELS), CHANNELS, strict=False)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i < 4 else []
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1))
        self.read = nn.Linear(CHANNELS[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.layers(x[:, None]))[:, 0]


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Squared error of log10 of the volume, on new rooms and speakers."""
    expected = (
        f"on {HELD} clips of new rooms and speakers: the transformer's squared error is at most 0.9 of the "
        "convolutional network's, two standard errors of the paired differences over clips below it; with volumes "
        "shuffled in training its correlation with the truth is within 0.1 of 0"
    )
    errors: dict[str, list[Tensor]] = {}
    said: dict[str, Tensor] = {}
    rho, factor, count, truth = 0.0, 1.0, TRAIN[scale], torch.zeros(0)
    for run in range(TRAININGS[scale] * seed, TRAININGS[scale] * (seed + 1)):
        x, volumes = clips(count, HELD, run)
        y, held, truth = volumes[:count].log10(), x[count:], volumes[count:].log10()
        shuffled = y[torch.randperm(count, generator=torch.Generator().manual_seed(run))]
        other = held.clone()
        other[:, FORM["bands"] :] = held[:, FORM["bands"] :].roll(1, 0)
        says = {
            "transformer": _trained("transformer", x[:count], y, STEPS[scale], run),
            "convolutions": _trained("convolutions", x[:count], y, STEPS[scale], run),
            "shuffled": _trained("transformer", x[:count], shuffled, STEPS[scale], run),
        }
        said = {name: model(held) for name, model in says.items()}
        said["other phases"] = says["transformer"](other)
        said["ridge"] = _ridge(x, y)
        said["mean"] = y.mean().expand(HELD)
        for name, of in said.items():
            errors.setdefault(name, []).append((of - truth).square())
        rho = float(torch.corrcoef(torch.stack([said["shuffled"], truth]))[0, 1])
        factor = float(mean_mult(10 ** said["transformer"], 10**truth))
    of = {name: torch.stack(values).mean(0) for name, values in errors.items()}  # [clip]
    level = {name: mean(values) for name, values in of.items()}
    apart = mean(of["transformer"] - 0.9 * of["convolutions"])
    holds = apart.below() and abs(rho) <= 0.1
    measured = (
        "squared error "
        + ", ".join(f"{name} {value:.3f}" for name, value in level.items())
        + f"; the transformer's less 0.9 of the convolutions' {apart:+.3f}; it is off by a factor of {factor:.2f}; "
        f"correlation with volumes shuffled {rho:+.2f}"
    )
    bar = 0.8 * level["mean"].value
    both = [level[name].value for name in ("transformer", "convolutions")]
    sizes = size(_transformer(torch.zeros(2, 24, 124), torch.ones(2))), size(Convolutional())
    ridge, same = level["ridge"].value, abs(sizes[0] / sizes[1] - 1) < 0.1
    premises = [
        Premise("both learn", f"below 0.8 of the variance, {bar:.2f}", f"{max(both):.2f}", max(both) < bar),
        Premise(
            "both tell more than the decay of loudness",
            f"below the ridge, {ridge:.2f}",
            f"{max(both):.2f}",
            max(both) < ridge,
        ),
        Premise("of one size", "weights within 10%", f"{sizes[0]:,} and {sizes[1]:,}", same),
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        for part, name in zip(axes, ("transformer", "convolutions"), strict=True):
            part.loglog(10**truth, 10 ** said[name], ".", markersize=3)
            part.plot([10, 10_000], [10, 10_000], color="grey", linewidth=0.8)
            part.set(title=name, xlabel="true volume in m³")
        axes[0].set_ylabel("said")

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def clips(n: int, held: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of clips, the last `held` of other speakers, and the volumes of their rooms in cubic metres."""
    by: dict[str, list[Any]] = {}
    for digit in spoken_digits(folder("audio_fsdd") / "recordings.zip"):
        by.setdefault(digit.speaker, []).append(digit.wave)
    speakers, draws = sorted(by), np.random.default_rng(seed)
    order = draws.permutation(len(speakers))
    known, others = order[:-2], order[-2:]
    waves, volumes = [], []
    for index in range(n + held):
        spoken = by[speakers[draws.choice(known if index < n else others)]]
        words = [spoken[draws.integers(len(spoken))]]
        while sum(map(len, words)) < SAMPLES:
            words.append(spoken[draws.integers(len(spoken))])
        volumes.append(10 ** draws.uniform(1, 4))
        response = impulse_response(volumes[-1], draws.uniform(0.3, 1), draws.uniform(0.5, 3), seed=seed, index=index)
        waves.append(heard(np.concatenate(words)[:SAMPLES], response, draws.uniform(10, 30), seed=seed, index=index))
    every = torch.tensor(np.stack(waves))
    return torch.cat([features(some, 8000, **FORM) for some in every.split(100)]), torch.tensor(volumes).float()


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """By the decay of the loudness, how far its peaks are above the rest, and how far the floor is below."""
    loud = x[:, : FORM["bands"]].exp().sum(1).log()
    falls = (loud[:, 4:] - loud[:, :-4]).clamp_max(0).mean(1)
    high, middle, low = (loud.quantile(share, 1) for share in (0.95, 0.5, 0.05))
    told = torch.stack([falls, high - middle, middle - low], 1)
    told = (told - told[: len(y)].mean(0)) / told[: len(y)].std(0)
    told = torch.cat([told, told.square(), torch.ones_like(told[:, :1])], 1).double()
    known = told[: len(y)]
    weights = torch.linalg.solve(known.T @ known + torch.eye(7).double(), known.T @ y.double())
    return (told[len(y) :] @ weights).float()


def _transformer(x: Tensor, volumes: Tensor) -> nn.Module:
    model = room_volume(**SIZES)
    model.standardise(x, volumes)
    return model


def _convolutional(x: Tensor, volumes: Tensor) -> nn.Module:
    model = Convolutional()
    nn.init.constant_(model.read.bias, float(volumes.log10().mean()))
    return model


def _trained(name: str, x: Tensor, y: Tensor, steps: int, seed: int) -> Callable[[Tensor], Tensor]:
    """What a network says, trained to say `y` of features; all see the same standardised rows."""
    torch.manual_seed(seed)
    middle, spread = x.mean((0, 2))[:, None], x.std((0, 2))[:, None]
    given = (x - middle) / spread
    model = (_transformer if name == "transformer" else _convolutional)(given, 10**y).train()

    def loss(some: Tensor) -> Tensor:
        return F.mse_loss(model(given[some]), y[some])

    fit(model.parameters(), loss, len(x), steps, seed, batch=BATCH, rate=RATES[name])
    model.eval()

    @torch.no_grad()
    def says(features: Tensor) -> Tensor:
        return torch.cat([model((some - middle) / spread) for some in features.split(100)])

    return says
