"""Qin et al. (arXiv:2405.17381): as good as softmax at the same size, and as fast a token at any length.

A character-level model of Shakespeare's plays, the last tenth held out, beside transformers' Llama of as many weights,
on the same batches. Ablation: no decay, which must be worse. Speed is that of
the attention alone, with projections, against causal `scaled_dot_product_attention` with its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ...catalog import Finding, Premise
from ...models.lightning_tnl import TnlAttention, lightning_tnl
from .. import _nets
from .._data import folder
from .._measure import lines, mean, seconds

SCALES = "small", "large"
DIM, HEADS, LAYERS, CONTEXT = {"small": 64, "large": 192}, 4, {"small": 2, "large": 4}, {"small": 128, "large": 512}
STEPS, RUNS, BATCH, RATE, HELD = {"small": 300, "large": 5000}, 2, 12, 4e-3, 64
WAYS = "transformer", "TNL", "no decay"
TRIVIAL = 2.45  # nats a character of what a bigram model knows here, about
LENGTHS = 512, 4096


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Held-out loss beside a transformer's, with and without decay, and the time of a token at two lengths."""
    expected = (
        "held-out loss of TransNormerLLM is at most 0.05 nats above that of a transformer with rotary positions, as "
        f"many weights and batches, in each of {RUNS} trainings, and lower than without decay by 0.02 or more; a token "
        f"of its attention takes at most 1.3 times as long at {LENGTHS[1]:,} as at {LENGTHS[0]} tokens, one of softmax "
        "attention 3 times or more"
    )
    text, kinds = _text()
    cut = len(text) - len(text) // 10
    losses: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for run in range(RUNS * seed, RUNS * (seed + 1)):
        for way in WAYS:
            torch.manual_seed(run)
            model = _model(way, kinds, scale)
            sizes[way] = _nets.size(model)
            losses.setdefault(way, []).append(_trained(model, text[:cut], text[cut:], scale, run))
    apart = [own - other for own, other in zip(losses["TNL"], losses["transformer"], strict=True)]
    lost = mean(torch.tensor(losses["no decay"]) - torch.tensor(losses["TNL"]))
    times = _times(DIM["large"])
    slowed = {way: of[1] / of[0] for way, of in times.items()}
    holds = max(apart) <= 0.05 and lost.value >= 0.02 and slowed["TNL"] <= 1.3 and slowed["softmax"] >= 3
    said = ", ".join(f"{way} {mean(of).value:.3f}" for way, of in losses.items())
    measured = (
        f"loss in nats a character: {said} ({sizes['TNL']:,} and {sizes['transformer']:,} weights); TNL above the "
        f"transformer by {min(apart):+.3f} to {max(apart):+.3f}, without decay worse by {lost:.3f}; a token at "
        f"{LENGTHS[1]:,} over one at {LENGTHS[0]}: {slowed['TNL']:.2f}, softmax {slowed['softmax']:.2f}"
    )
    worst = max(max(losses["TNL"]), max(losses["transformer"]))
    alike = abs(sizes["TNL"] / sizes["transformer"] - 1)
    premises = [
        Premise("both know more than pairs of characters", "loss below 2.3", f"{worst:.3f}", worst < 2.3),
        Premise("both are as large", "within 2%", f"{alike:.1%}", alike <= 0.02),
    ]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for i, of in enumerate(losses.values()):
            left.plot([i] * len(of), of, "o", color="C0")
        left.axhline(TRIVIAL, color="grey", linestyle=":", label="pairs of characters, about")
        left.set_xticks(range(len(losses)), list(losses))
        left.set(ylabel="nats a character, held out")
        left.legend()
        series = {way: (LENGTHS, [t * 1e6 for t in of]) for way, of in times.items()}
        lines(right, series, xlabel="tokens", ylabel="microseconds a token", title="One layer's attention")

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _text() -> tuple[Tensor, int]:
    raw = (folder("text_tinyshakespeare") / "input.txt").read_bytes()
    codes, ids = np.unique(np.frombuffer(raw, np.uint8), return_inverse=True)
    return torch.from_numpy(ids.astype(np.int64)), len(codes)


def _model(way: str, kinds: int, scale: str) -> nn.Module:
    dim, layers = DIM[scale], LAYERS[scale]
    tnl = lightning_tnl(
        vocab_size=kinds,
        dim=dim,
        layers=layers,
        heads=HEADS,
        decay=way != "no decay",
    )
    if way != "transformer":
        return tnl
    config: dict[str, Any] = {
        "vocab_size": kinds,
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": CONTEXT[scale],
    }
    base = _nets.size(LlamaForCausalLM(LlamaConfig(**config, intermediate_size=8)))
    wide = 8 + round((_nets.size(tnl) - base) / (3 * dim * layers))
    return LlamaForCausalLM(LlamaConfig(**config, intermediate_size=wide))


def _drawn(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    at = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[at + torch.arange(length)]


def _trained(model: nn.Module, known: Tensor, unknown: Tensor, scale: str, seed: int) -> float:
    """Loss of what was held out, after training; models of one seed see the same text."""
    generator, length = torch.Generator().manual_seed(seed), CONTEXT[scale]
    optimiser = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS[scale])
    for _ in range(STEPS[scale]):
        optimiser.zero_grad()
        _loss(model, _drawn(known, BATCH, length, generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return float(_loss(model.eval(), _drawn(unknown, HELD, length, torch.Generator().manual_seed(0))))


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def _times(dim: int) -> dict[str, list[float]]:
    """Processor seconds a token of one layer's attention at each length."""
    own = TnlAttention(dim, HEADS, layer=0, layers=2)

    def softmax(x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (own.query, own.key, own.value)
        )
        return own.output(F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2))

    found: dict[str, list[float]] = {"TNL": [], "softmax": []}
    for length in LENGTHS:
        x = torch.randn(1, length, dim)
        for way, took in zip(found, seconds(lambda x=x: own(x), lambda x=x: softmax(x), least=5), strict=True):
            found[way].append(took / length)
    return found
