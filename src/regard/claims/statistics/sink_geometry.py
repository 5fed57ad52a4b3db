"""Small models of different position encodings learn one language; the frames that their attention makes are compared.

On Ruscio, Nanni and Silvestri, What are you sinking? A geometric approach on attention sink (arXiv:2508.02546): the
frame is centralised with rotary positions, distributed where these are scaled for longer texts (NTK-aware), and
bidirectional with absolute positions in an encoder. The language is that of Guo et al., Active-Dormant Attention Heads
(arXiv:2410.13835), section 2, in which sinks form quickly: each token draws the next one, except a few after which the
one before them comes again. Texts stand between a first and a last special token. The encoder fills in masked tokens,
the others predict the next one. An encoder differs from a decoder in more than its positions; a decoder with absolute
positions is trained beside them, to tell these apart, and is no part of what is expected.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...catalog import Finding
from ...seam import record
from ...statistics.sink_geometry import sink_geometry

SCALES = "small", "large"
EXPECTED = (
    "in most texts the frame is centralised with RoPE, distributed with NTK-scaled RoPE, and bidirectional in an "
    "encoder with learned absolute positions; it cannot be told where one of these has reference points in less than a "
    "tenth of its heads"
)
FRAMES = {"RoPE": "centralised", "NTK RoPE": "distributed", "encoder, absolute": "bidirectional"}
CONTROL = "decoder, absolute"
FIRST, LAST, MASK, WORDS, TRIGGERS, NEXT = 0, 1, 2, 24, 3, 4  # special tokens; words, of them triggers; successors
SPECIAL, LENGTH = 3, 48
HEADS, HEAD, LAYERS = 4, 16, 2
STEPS, BATCH, TEXTS = 300, 32, 32


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Train each kind of model on the language, and name the frames that it makes of held-out texts."""
    runs = 2 if scale == "small" else 8
    names = (*FRAMES, CONTROL)
    frames: dict[str, list[str]] = {name: [] for name in names}
    seen: dict[str, list[Any]] = {name: [] for name in names}
    losses = dict.fromkeys(names, 0.0)
    for run in range(runs):
        language = Language(1000 * seed + run)
        for name in names:
            model = model_of(name, 1000 * seed + run)
            losses[name] += train(model, language, name.startswith("encoder")) / runs
            with torch.no_grad(), record(model, "rows") as recording:
                model(language.texts(TEXTS))
            found = sink_geometry(next(iter(recording.tree.children.values())).to_dataset())
            frames[name] += found["frame"].values.tolist()
            seen[name].append(found)
    anchored = {name: np.mean([found["anchored"].mean() for found in seen[name]]) for name in names}
    mostly = {name: Counter(frames[name]).most_common(1)[0] for name in names}
    holds: bool | None = all(mostly[name][0] == frame for name, frame in FRAMES.items())
    if min(anchored[name] for name in FRAMES) < 0.1:
        holds = None

    def told(name: str) -> str:
        frame, count = mostly[name]
        star = np.mean([found["star_likeness"].mean() for found in seen[name]])
        joined = np.mean([found["algebraic_connectivity"].mean() for found in seen[name]])
        return (
            f"{name}: {frame or 'none'} in {count / len(frames[name]):.0%} of texts, reference points in "
            f"{anchored[name]:.0%} of heads, star-likeness {star:.2f}, connectivity {joined:.3f}, "
            f"loss {losses[name]:.2f}"
        )

    measured = "; ".join(told(name) for name in names) + f". {runs} models each."

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        kinds = ("centralised", "distributed", "bidirectional", "")
        bottom = np.zeros(len(names))
        for kind in kinds:
            share = np.array([np.mean([f == kind for f in frames[name]]) for name in names])
            right.bar(range(len(names)), share, bottom=bottom, label=kind or "none")
            bottom += share
        right.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names])
        right.set(ylabel="share of texts", title="Frames found")
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=4)
        for name, style in zip(names, ("-", "--", "-", "-")):
            left.plot(np.mean([found["reference"].mean("batch") for found in seen[name]], axis=0), style, label=name)
        left.set(xlabel="position", ylabel="share of heads", title="Where reference points are")
        left.legend()

    return Finding(holds, measured, EXPECTED, seed, draw=draw)


class Language:
    """Words that each draw their follower from a few, and triggers after which the word before comes again."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        odds = torch.rand(WORDS, WORDS, generator=self.generator)
        kept = odds.topk(NEXT, dim=1)
        self.odds = torch.zeros_like(odds).scatter(1, kept.indices, torch.rand(WORDS, NEXT, generator=self.generator))

    def texts(self, n: int) -> Tensor:
        words = [torch.randint(WORDS, (n,), generator=self.generator) for _ in range(2)]
        while len(words) < LENGTH - 2:
            drawn = torch.multinomial(self.odds[words[-1]], 1, generator=self.generator)[:, 0]
            words.append(torch.where(words[-1] < TRIGGERS, words[-2], drawn))
        first, last = torch.full((n,), FIRST), torch.full((n,), LAST)
        return torch.stack([first, *(word + SPECIAL for word in words), last], dim=1)


def model_of(name: str, seed: int) -> nn.Module:
    import transformers as t

    torch.manual_seed(seed)
    vocabulary, width, positions = SPECIAL + WORDS, HEADS * HEAD, LENGTH
    if name == CONTROL:
        return t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=vocabulary,
                n_embd=width,
                n_layer=LAYERS,
                n_head=HEADS,
                n_positions=positions,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=FIRST,
                eos_token_id=LAST,
            )
        )
    shared = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * width,
        "max_position_embeddings": positions,
    }
    if name.startswith("encoder"):
        without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": None}
        return t.BertForMaskedLM(t.BertConfig(**shared, **without))
    theta = 10000.0 * (8 ** (HEAD / (HEAD - 2)) if name.startswith("NTK") else 1)  # scaled for texts 8 times as long
    rope = {"rope_type": "default", "rope_theta": theta}
    ids = {"bos_token_id": FIRST, "eos_token_id": LAST}
    return t.LlamaForCausalLM(t.LlamaConfig(**shared, **ids, rope_parameters=rope))


def train(model: nn.Module, language: Language, masked: bool) -> float:
    """Train, and give the mean loss of the last tenth of the steps, nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    last = []
    model.train()
    for _ in range(STEPS):
        ids = language.texts(BATCH)
        if masked:
            chosen = (torch.rand(ids.shape, generator=language.generator) < 0.2) & (ids >= SPECIAL)
            loss = cross_entropy(model(ids.masked_fill(chosen, MASK)).logits[chosen], ids[chosen])
        else:
            loss = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        last = [*last, float(loss.detach())][-STEPS // 10 :]
    model.eval()
    return sum(last) / len(last)
