"""Liu et al. (arXiv:2506.06279): with a memory beside the context, pictures in its middle are no longer passed over.

Nine pictures, each of a key and a value, then a question that names a key. In training it is the first one's in 45%,
the last one's in 45%, one of the seven between in 10%: gradients fall on both ends, which is the paper's account of the
loss. A language model first learns the task in words under that law; then copies of it go on with pictures (four tokens
each, fixed mixtures of key and value, and a new projector) for equal steps: in the context alone, with two more MLPs so
that weights are as many; in context and memory (CoMemo, the memory ahead of layers 2 and 4, gates from 0); in the
memory alone. Judged on questions spread evenly, where the context's middle is nearest to 50%. Control: a memory whose
image tokens are all their mean, at test. Language and pictures are stand-ins for a model of 2B and its data. No pilot.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...models.comemo import Held, MemoryLayer, Mixed, mix, thumbnail_positions
from .. import _nets
from .._measure import Mean, mean

SCALES = "small", "large"
WORDS, CHECKS = {"small": 400, "large": 4000}, {"small": (50, 100, 160), "large": (500, 1000, 2000)}
PICTURES, KINDS, TOKENS, DIM, LAYERS, BATCH, RATE, HELD = 9, 16, 4, 64, 4, 64, 2e-3, 1800
ENDS, FEATURES, ASKS = 0.9, 32, 2 * KINDS  # share of questions on both ends; of an image token; number of the question
GAIN, LOSS, HIGH, FALL, EQUAL = 0.10, 0.02, 0.85, 0.15, 0.05


class Plain(MemoryLayer):
    """The layer without its memory."""

    def forward(self, text: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return text + self.ff_gate.tanh() * self.ffn_2(self.ffn_norm_2(text))


class Reader(nn.Module):
    """A copy of the language model that reads pictures in its context, in a memory, or in both."""

    def __init__(self, language: Any, *, context: bool, memory: bool) -> None:
        super().__init__()
        self.language, self.context = copy.deepcopy(language), context
        self.project = nn.Linear(FEATURES, DIM)
        self.held: Held = mix(self.language.model, every=2)
        for layer in self.language.model.layers:
            if isinstance(layer, Mixed) and not memory:
                attention = sum(p.numel() for p in layer.memory.cross_attn.parameters())
                wider = self.language.config.intermediate_size + attention // (3 * DIM)
                layer.memory = Plain(DIM, heads=1, head_dim=2, hidden=wider)

    def forward(self, pictures: Tensor, asked: Tensor, *, blurred: bool = False) -> Tensor:
        """pictures [batch, picture token, feature], asked: keys [batch] -> scores of values [batch, value]"""
        seen, count = self.project(pictures), pictures.shape[1]
        question = torch.stack([torch.full_like(asked, ASKS), asked], 1)
        words = self.language.model.embed_tokens(question)
        position = torch.arange(count + 2)[None]
        embeds = torch.cat([seen, words], 1) if self.context else words
        self.held.media = seen.mean(1, keepdim=True).expand_as(seen) if blurred else seen
        self.held.position = position[:, :count]
        at = position if self.context else position[:, count:]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        logits = self.language(
            inputs_embeds=embeds, position_ids=at.expand(len(embeds), -1), attention_mask=mask
        ).logits
        return logits[:, -1, KINDS : 2 * KINDS]


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """One language model, and three copies that learn to read pictures."""
    expected = (
        f"where the context alone is nearest to 50% at the middle pictures, CoMemo is {GAIN:.0%} or more above it "
        f"there, by two standard errors, and at the ends no more than {LOSS:.0%} below; blurred, the memory gives less "
        "than half of it"
    )
    torch.manual_seed(seed)
    fixed = torch.randn(2, TOKENS, KINDS, FEATURES)
    language = _language()
    _learn_words(language, WORDS[scale], seed)
    ways = {"context": (True, False), "CoMemo": (True, True), "memory": (False, True)}
    right: dict[str, list[Tensor]] = {}
    places, blurred, sizes = torch.arange(HELD) % PICTURES, [], {}
    for name, (context, memory) in ways.items():
        torch.manual_seed(seed)
        model, done, right[name] = Reader(language, context=context, memory=memory), 0, []
        sizes[name] = _nets.size(model)
        optimiser = torch.optim.AdamW(model.parameters(), RATE)
        lots = torch.Generator().manual_seed(seed)
        for check in CHECKS[scale]:
            _learn_pictures(model, optimiser, fixed, check - done, lots)
            done = check
            right[name].append(_right(model, fixed, places, seed))
            if name == "CoMemo":
                blurred.append(_right(model, fixed, places, seed, blurred=True))
    ends = (places == 0) | (places == PICTURES - 1)
    middles = [float(of[~ends].mean()) for of in right["context"]]
    at = min(range(len(middles)), key=lambda i: abs(middles[i] - 0.5))
    found = {name: of[at] for name, of in right.items()}

    def above(of: Tensor, where: Tensor) -> Mean:
        return mean((of - found["context"])[where])

    gain, kept, vain = above(found["CoMemo"], ~ends), above(found["CoMemo"], ends), above(blurred[at], ~ends)
    holds = gain.value >= GAIN and gain.above() and kept.value >= -LOSS and vain.value < gain.value / 2
    plain = 4 * 256 + 256
    nearer = float((256.0 - thumbnail_positions(2, 2).float()).mean() / (plain - torch.arange(plain).float()).mean())
    measured = (
        f"after {CHECKS[scale][at]} steps, middle and ends: "
        + "; ".join(f"{name} {mean(of[~ends]):.1%}, {mean(of[ends]):.1%}" for name, of in found.items())
        + f"; CoMemo above the context by {gain:.1%} in the middle, {kept:.1%} at the ends, blurred by {vain:.1%}; "
        f"tokens of 2 x 2 tiles are on average at {nearer:.0%} of the distance that plain positions give them"
    )
    lost = [(float(of[ends].mean()), float(of[~ends].mean())) for of in right["context"]]
    uneven = any(high >= HIGH and high - low >= FALL for high, low in lost)
    spread = max(sizes.values()) / min(sizes.values()) - 1
    premises = [
        Premise(
            "the context loses its middle",
            f"{HIGH:.0%} at the ends and {FALL:.0%} less between, after some steps",
            ", ".join(f"{high:.1%} and {low:.1%}" for high, low in lost),
            uneven,
        ),
        Premise("equal numbers of weights", f"within {EQUAL:.0%}", f"{spread:.1%} apart", spread <= EQUAL),
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, of in found.items():
            axes.plot(
                range(1, PICTURES + 1), [float(of[places == k].mean()) for k in range(PICTURES)], "o-", label=name
            )
        axes.axhline(1 / KINDS, color="grey", linewidth=0.5)
        axes.set(xlabel="picture that is asked after", ylabel="right", ylim=(0, 1.02))
        axes.legend()

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _language() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": DIM,
        "intermediate_size": 2 * DIM,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=ASKS + 1, tie_word_embeddings=False, **sizes))


def _asked(n: int, lots: torch.Generator, places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [question, picture], and the place of the one that is asked after, under training's law."""
    keys = torch.rand(n, KINDS, generator=lots).argsort(-1)[:, :PICTURES]
    values = torch.randint(KINDS, (n, PICTURES), generator=lots)
    if places is None:
        end = (PICTURES - 1) * torch.randint(2, (n,), generator=lots)
        between = 1 + torch.randint(PICTURES - 2, (n,), generator=lots)
        places = torch.where(torch.rand(n, generator=lots) < ENDS, end, between)
    return keys, values, places


def _learn_words(language: Any, steps: int, seed: int) -> None:
    lots = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(language.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in range(steps):
        keys, values, places = _asked(BATCH, lots)
        pairs = torch.stack([keys, values + KINDS], -1).flatten(1)
        asked = keys.gather(1, places[:, None])
        ids = torch.cat([pairs, torch.full_like(asked, ASKS), asked], 1)
        logits = language(ids, attention_mask=torch.ones_like(ids)).logits[:, -1, KINDS : 2 * KINDS]
        optimiser.zero_grad()
        F.cross_entropy(logits, values.gather(1, places[:, None])[:, 0]).backward()
        nn.utils.clip_grad_norm_(language.parameters(), 1.0)
        optimiser.step()
        schedule.step()


def _pictures(fixed: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Tokens of the pictures, each of key and value mixed. [question, picture token, feature]"""
    found = fixed[0][:, keys] + fixed[1][:, values]  # [token, question, picture, feature]
    return found.permute(1, 2, 0, 3).flatten(1, 2) / 2**0.5


def _learn_pictures(model: Reader, optimiser: Any, fixed: Tensor, steps: int, lots: torch.Generator) -> None:
    for _ in range(steps):
        keys, values, places = _asked(BATCH, lots)
        asked, wanted = (of.gather(1, places[:, None])[:, 0] for of in (keys, values))
        optimiser.zero_grad()
        F.cross_entropy(model(_pictures(fixed, keys, values), asked), wanted).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()


@torch.no_grad()
def _right(model: Reader, fixed: Tensor, places: Tensor, seed: int, *, blurred: bool = False) -> Tensor:
    """Which questions are answered rightly. [question]"""
    keys, values, places = _asked(len(places), torch.Generator().manual_seed(seed + 10**6), places)
    asked, wanted = (of.gather(1, places[:, None])[:, 0] for of in (keys, values))
    found = [
        model(_pictures(fixed, keys[some], values[some]), asked[some], blurred=blurred).argmax(-1)
        for some in torch.arange(len(places)).split(300)
    ]
    return (torch.cat(found) == wanted).float()
