"""Rende and Viteritti (arXiv:2405.18874): wave functions need no queries and keys to find the energy of spins.

A ring of 10 spins with couplings J1 = 1 to neighbours and J2 = 0.4 to next neighbours. Energies are sums over all 252
states of zero magnetisation, no sampling, and compared with the lowest eigenvalue. Attention of the rival: softmax of
queries and keys with a learned number for each shift. Premise and control: without mixing, energies are far off.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...mechanisms.position_only import PositionOnly, WaveFunction, shifts
from .._measure import seconds

SCALES = "small", "large"
SITES, SECOND, PATCH = 10, 0.4, 2
DIM, HEADS, LAYERS = 16, 4, 2
STEPS = {"small": 250, "large": 2000}
RUNS = {"small": 2, "large": 5}


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Error of the energy and time of a step with weights of positions alone, with queries and keys, and unmixed."""
    expected = (
        "the best error of the energy with positions alone at most 1.25 times that with queries and keys, and 0.05 "
        "points, with at least 10% fewer parameters and less time a step; without mixing at least three times the error"
    )
    spins, rows, columns, couplings, diagonal = _system()
    hamiltonian = torch.zeros(len(spins), len(spins), dtype=torch.float64)
    hamiltonian.index_put_((rows, columns), couplings, accumulate=True)
    lowest = float(torch.linalg.eigvalsh(hamiltonian + diagonal.diag())[0])

    def energy(model: nn.Module) -> Tensor:
        psi = model(spins)
        psi = torch.exp(psi - psi.real.max().detach())
        applied = torch.zeros_like(psi).index_add(0, rows, couplings.to(psi.dtype) * psi[columns])
        return (psi.conj() * (applied + diagonal.to(psi.dtype) * psi)).sum().real / psi.abs().square().sum()

    ways: dict[str, Callable[[], nn.Module]] = {
        "positions alone": lambda: PositionOnly(DIM, heads=HEADS, tokens=SITES // PATCH, grid=(SITES // PATCH,)),
        "queries and keys": _WithQueries,
        "no mixing": _Unmixed,
    }
    errors: dict[str, list[float]] = {way: [] for way in ways}
    numbers, times = {}, {}
    for way, made in ways.items():
        for run in range(RUNS[scale] if way != "no mixing" else 1):
            torch.manual_seed(RUNS[scale] * seed + run)
            model = WaveFunction((SITES,), (PATCH,), dim=DIM, heads=HEADS, layers=LAYERS, mixing=made).double()
            numbers[way] = sum(p.numel() for p in model.parameters())
            optimizer = torch.optim.Adam(model.parameters(), 5e-3)
            for step in range(STEPS[scale]):
                optimizer.param_groups[0]["lr"] = 5e-3 * (1 + math.cos(math.pi * step / STEPS[scale])) / 2
                optimizer.zero_grad()
                energy(model).backward()
                optimizer.step()
            with torch.no_grad():
                errors[way].append(float(energy(model)) / lowest)
            times[way] = seconds(lambda model=model: energy(model).backward(), least=5)[0]
    off = {way: min(1 - share for share in of) for way, of in errors.items()}
    own, theirs, unmixed = off.values()
    premises = [
        Premise("mixing matters", "3 times the error without it", f"{unmixed / own:.1f} times", unmixed >= 3 * own),
        Premise("both find the ground state", "2% or less", f"{max(own, theirs):.2%}", max(own, theirs) <= 0.02),
    ]
    few = 1 - numbers["positions alone"] / numbers["queries and keys"]
    fast = 1 - times["positions alone"] / times["queries and keys"]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, of in enumerate(errors.values()):
            axes.semilogy([i] * len(of), [1 - share for share in of], "o")
        axes.set_xticks(range(len(errors)), list(errors))
        axes.set(ylabel="relative error of the energy")

    measured = (
        f"ground state {lowest / SITES:.4f} a site; relative errors "
        f"{', '.join(f'{way} {error:.2%}' for way, error in off.items())}; {few:.0%} fewer parameters and {fast:.0%} "
        "less time a step"
    )
    holds = own <= 1.25 * theirs + 5e-4 and few >= 0.1 and fast > 0
    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _system() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """States [state, site], and the Hamiltonian: where it leads from and to, how strongly, and its diagonal."""
    states = [s for s in itertools.product((1, -1), repeat=SITES) if sum(s) == 0]
    at = {state: i for i, state in enumerate(states)}
    bonds = [(i, (i + apart) % SITES, j) for apart, j in ((1, 1.0), (2, SECOND)) for i in range(SITES)]
    rows, columns, couplings, diagonal = [], [], [], []
    for i, state in enumerate(states):
        diagonal.append(sum(j * state[a] * state[b] / 4 for a, b, j in bonds))
        for a, b, j in bonds:
            if state[a] != state[b]:
                other = list(state)
                other[a], other[b] = other[b], other[a]
                rows.append(i)
                columns.append(at[tuple(other)])
                couplings.append(j / 2)
    spins = torch.tensor(states, dtype=torch.float64)
    return (
        spins,
        *(torch.tensor(t) for t in (rows, columns)),
        torch.tensor(couplings).double(),
        torch.tensor(diagonal).double(),
    )


class _WithQueries(nn.Module):
    """Softmax attention with a number for each shift."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.output = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.bias = nn.Parameter(torch.zeros(HEADS, SITES // PATCH))
        self.shifts = shifts((SITES // PATCH,))

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.parts(hidden).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT * (DIM // HEADS) ** -0.5 + self.bias[:, self.shifts]).softmax(-1)
        return self.output((weights @ value).transpose(1, 2).flatten(2))


class _Unmixed(nn.Module):
    """A layer in which tokens see nothing of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.output = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.output(self.value(hidden))
