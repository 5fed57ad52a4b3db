"""FreeSwim (arXiv:2511.14712): shifted inside at borders, a window keeps every token's number of keys.

What the paper says of videos, that they repeat less and stay coherent, cannot be told here: no video generator runs at
this scale. Checked is what makes the window what it is: who sees whom, written out token by token, against a window of
the same size that is cut at borders. The verdict is open whatever comes out.
"""

from __future__ import annotations

from typing import Any

import torch

from ...catalog import Finding
from ...mechanisms.freeswim import freeswim

GRIDS = (((2, 6, 8), (3, 5)), ((1, 12, 20), (6, 8)), ((3, 9, 7), (4, 4)))  # frames, rows, columns; trained on


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """How many keys each token of a larger video sees, shifted inside and cut."""
    expected = (
        "every token sees as many keys as in training, those of the rule written out, and at the training size all; "
        "cut at borders, a corner keeps less than half of them; whether a generator repeats less: open"
    )
    same, kept, numbers = True, [], []
    for shape, trained in GRIDS:
        halves = [size // 2 for size in trained]
        inside, cut = (
            [_seen(n, d, shifted) for n, d in zip(shape[1:], halves, strict=True)] for shifted in (True, False)
        )
        wanted = torch.kron(torch.ones(shape[0], shape[0]), torch.kron(*inside)).bool()
        control = torch.kron(torch.ones(shape[0], shape[0]), torch.kron(*cut)).bool()
        n = len(wanted)
        zero = torch.zeros(1, 1, n, 1)
        settings = {"causal": False, "mask": None, "scale": 1.0, "shape": shape, "train_shape": trained}
        seen = freeswim.spec.weights(zero, zero, **settings)[0, 0] > 0  # type: ignore[attr-defined]
        count = shape[0] * (2 * halves[0] + 1) * (2 * halves[1] + 1)
        same = same and torch.equal(seen, wanted) and bool((seen.sum(1) == count).all())
        kept.append(float(control.sum(1).min()) / count)
        numbers.append(count)
    x = torch.randn(1, 1, 35, 8, generator=torch.Generator().manual_seed(seed))
    small = freeswim(x, x, x, shape=(1, 5, 7), train_shape=(5, 7), tokens_ratio=1.0)
    apart = float((small - (x @ x.mT * 8**-0.5).softmax(-1) @ x).abs().max())

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.bar(range(len(GRIDS)), numbers, label="shifted inside")
        axes.bar(range(len(GRIDS)), [k * n for k, n in zip(kept, numbers, strict=True)], label="cut, in a corner")
        axes.set_xticks(range(len(GRIDS)), [" x ".join(map(str, shape)) for shape, _ in GRIDS])
        axes.set(ylabel="keys that a token sees", xlabel="frames x rows x columns")
        axes.legend()

    measured = (
        f"{'all tokens see' if same else 'NOT all tokens see'} {', '.join(map(str, numbers))} keys; cut, a corner "
        f"keeps {min(kept):.2f} to {max(kept):.2f}; at the training size {apart:.1e} from full attention; no generator "
        "was run"
    )
    exact = same and max(kept) < 0.5 and apart < 1e-5
    return Finding(None if exact else False, measured, expected, seed, draw=draw)


def _seen(n: int, half: int, shifted: bool) -> torch.Tensor:
    """Along rows or columns: of each position, `half` to either side, at a border shifted inside or cut."""
    seen = torch.zeros(n, n)
    for i in range(n):
        low = i - half - (max(0, half + i - n + 1) if shifted else 0)
        high = i + half + (max(0, half - i) if shifted else 0)
        seen[i, max(0, low) : min(n, high + 1)] = 1
    return seen
