"""Handwritten digits as patches, and how claims train what reads them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.loaders import mnist
from .._data import folder

RATE, BATCH = 3e-3, 50


class Digits(NamedTuple):
    patches: Tensor  # [digit, token, pixel], of mean 0 and deviation 1
    labels: Tensor  # [digit]


def digits(patch: int, trained: int, tested: int, *, seed: int) -> tuple[Digits, Digits]:
    """To train on and to be judged by, drawn at random; rows and columns in patches of this side."""
    given = mnist(folder("mnist_t10k"))
    order = torch.randperm(len(given.labels), generator=torch.Generator().manual_seed(seed))
    pixels = torch.from_numpy(given.images.copy()).float() / 255
    pixels = (pixels - pixels.mean()) / pixels.std()
    cut = pixels.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).transpose(2, 3).flatten(3).flatten(1, 2)
    every = Digits(cut[order], torch.from_numpy(given.labels.copy()).long()[order])
    return Digits(*(t[:trained] for t in every)), Digits(*(t[trained : trained + tested] for t in every))


def fit(model: nn.Module, trained: Digits, epochs: int, *, seed: int) -> None:
    optimizer: Any = torch.optim.Adam(model.parameters(), RATE)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for at in torch.randperm(len(trained.labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(trained.patches[at]), trained.labels[at]).backward()
            optimizer.step()


@torch.no_grad()
def judged(model: nn.Module, tested: Digits) -> tuple[Tensor, Tensor]:
    """Which digits are right, 0 or 1, and the loss of each in nats. [digit]"""
    logits = model.eval()(tested.patches)
    return (logits.argmax(-1) == tested.labels).double(), F.cross_entropy(logits, tested.labels, reduction="none")
