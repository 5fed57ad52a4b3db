"""Small models of different position encodings learn one language; the frames that their attention makes are compared.

On Ruscio, Nanni and Silvestri, What are you sinking? A geometric approach on attention sink (arXiv:2508.02546): the
frame is centralised with rotary positions, and bidirectional with absolute positions in an encoder. The language is
that of Guo et al., Active-Dormant Attention Heads (arXiv:2410.13835), section 2, in which sinks form quickly: each
token draws the next one, except a few after which the one before them comes again. Texts stand between a first and a
last special token. Decoders predict the next token; encoders fill in masked ones, and tell, from the first token,
whether both halves of a text are of one language of two, as BERT is trained to. The control is an encoder of texts
without special tokens. That frames are distributed where rotary positions are scaled for longer texts cannot be told
here: on 48 tokens scaling changes no angle that matters. Two designs were tried, on other seeds.

At scale `real` the encoder is MiniLM on lines of books, with its special tokens and, as a control, without, and with
random weights. It is small, distilled from a larger one, and then trained to embed sentences.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...catalog import Finding, Premise
from ...seam import record
from ...statistics.sink_geometry import reference_frame
from .._data import lines
from .._measure import failed, mean
from .._models import pretrained

SCALES = "small", "real", "large"
EXPECTED = (
    "texts are centralised more often in decoders, with rotary and with absolute positions alike, than in the encoder, "
    "and bidirectional more often in the encoder than in both and than in one of texts without special tokens, each by "
    "two standard errors of the differences over models; most texts of decoders are centralised, of the encoder "
    "bidirectional"
)
REAL = (
    "most lines are bidirectional in MiniLM, more than without special tokens and than with random weights, by two "
    "standard errors"
)
DECODERS = ("decoder, RoPE", "decoder, absolute")
ENCODER, BARE = "encoder", "encoder, no special tokens"
NAMES = (*DECODERS, ENCODER, BARE)
KINDS = ("centralised", "distributed", "bidirectional", "")
FIRST, LAST, MASK, WORDS, TRIGGERS, NEXT = 0, 1, 2, 24, 3, 4  # special tokens; words, of them triggers; successors
SPECIAL, LENGTH = 3, 48
HEADS, HEAD, LAYERS = 4, 16, 2
STEPS, BATCH, TEXTS = 270, 32, 32


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Train each kind of model on the language, and name the frames that it makes of held-out texts."""
    if scale == "real":
        return _real(seed)
    runs = 3 if scale == "small" else 12
    share = {name: {kind: np.zeros(runs) for kind in KINDS} for name in NAMES}
    seen: dict[str, list[Any]] = {name: [] for name in NAMES}
    told = []
    for run in range(runs):
        language = Language(1000 * seed + run)
        for name in NAMES:
            model = model_of(name, 1000 * seed + run)
            right = train(model, language, name)
            if name == ENCODER:
                told.append(right)
            ids, _ = language.texts(TEXTS, special=name != BARE)
            with torch.no_grad(), record(model, "received") as recording:
                model(ids)
            found = reference_frame(next(iter(recording.tree.children.values())).to_dataset())
            seen[name].append(found)
            for kind in KINDS:
                share[name][kind][run] = float((found["frame"] == kind).mean())
    anchored = {name: float(np.mean([found["anchored"].mean() for found in seen[name]])) for name in NAMES}
    more = [mean(share[name]["centralised"] - share[ENCODER]["centralised"]) for name in DECODERS]
    both = [mean(share[ENCODER]["bidirectional"] - share[name]["bidirectional"]) for name in (*DECODERS, BARE)]
    asked = {
        "not every kind of decoder is centralised more often than the encoder": all(one.above() for one in more),
        "the encoder is not bidirectional more often than the others": all(one.above() for one in both),
        "most texts of a kind of decoder are not centralised": all(
            share[name]["centralised"].mean() > 0.5 for name in DECODERS
        ),
        "most texts of the encoder are not bidirectional": share[ENCODER]["bidirectional"].mean() > 0.5,
    }
    measured = "; ".join(
        f"{name}: centralised {mean(share[name]['centralised']):.0%}, bidirectional "
        f"{mean(share[name]['bidirectional']):.0%}, reference points in {anchored[name]:.0%} of heads"
        for name in NAMES
    )
    least = min(anchored[name] for name in NAMES[:3])
    premises = [
        Premise("heads have reference points", "a tenth of them or more, in each kind", f"{least:.0%}", least >= 0.1),
        Premise(
            "the encoder uses its special tokens: it tells languages apart from the first",
            "75% right or more",
            f"{np.mean(told):.0%}",
            float(np.mean(told)) >= 0.75,
        ),
    ]
    measured = f"{measured} ({runs} models each); the encoder's points are {_ends(seen[ENCODER])}{failed(asked)}"
    return Finding(all(asked.values()), measured, EXPECTED, seed, premises=premises, draw=partial(_draw, share, seen))


def _real(seed: int) -> Finding:
    model, tokenizer = pretrained("minilm")
    torch.manual_seed(seed)
    blank = type(model)(model.config).eval()
    told = lines(64, seed=seed)
    seen, frames, ends = {}, {}, {}
    for name, of, special in (
        ("MiniLM", model, True),
        ("no special tokens", model, False),
        ("random weights", blank, True),
    ):
        found: list[Any] = []
        for text in told:
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=64, add_special_tokens=special)
            with torch.no_grad(), record(of, "received") as recording:
                of(**inputs)
            found.append(reference_frame(recording.tree["encoder"].to_dataset()))
        frames[name] = np.array([str(one["frame"].item()) for one in found])
        seen[name] = float(np.mean([one["anchored"].item() for one in found]))
        if special:
            ends[name] = _ends(found)
    both = {name: (of == "bidirectional").astype(float) for name, of in frames.items()}
    more = [mean(both["MiniLM"] - both[name]) for name in list(both)[1:]]
    asked = {
        "most lines are not bidirectional": both["MiniLM"].mean() > 0.5,
        "no more are than without special tokens and with random weights": all(one.above() for one in more),
    }
    measured = "; ".join(
        f"{name}: bidirectional {mean(both[name]):.0%}, centralised {np.mean(frames[name] == 'centralised'):.0%}, "
        f"reference points in {seen[name]:.0%} of heads"
        for name in frames
    )
    measured = f"{measured}; MiniLM's points are {ends['MiniLM']}{failed(asked)}"
    anchors = Premise("heads have reference points", "a tenth or more", f"{seen['MiniLM']:.0%}", seen["MiniLM"] >= 0.1)
    return Finding(all(asked.values()), measured, REAL, seed, premises=[anchors])


def _ends(found: list[Any]) -> str:
    """Where the reference points of texts are."""
    first, last, every = (
        sum(float(one["reference"].values[..., part].sum()) for one in found)
        for part in (slice(1), slice(-1, None), slice(None))
    )
    return f"the first token in {first / max(every, 1e-30):.0%} and the last in {last / max(every, 1e-30):.0%}"


def _draw(share: dict[str, dict[str, np.ndarray]], seen: dict[str, list[Any]], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    bottom = np.zeros(len(NAMES))
    for kind in KINDS:
        heights = np.array([share[name][kind].mean() for name in NAMES])
        right.bar(range(len(NAMES)), heights, bottom=bottom, label=kind or "none")
        bottom += heights
    right.set_xticks(range(len(NAMES)), [name.replace(", ", "\n") for name in NAMES], fontsize=7)
    right.set(ylabel="share of texts", title="Frames found")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=4)
    for name in NAMES:
        left.plot(np.mean([found["reference"].mean("batch") for found in seen[name]], axis=0), label=name)
    left.set(xlabel="position", ylabel="share of heads", title="Where reference points are")
    left.legend(fontsize=7)


class Language:
    """Words that each draw their follower from a few, and triggers after which the word before comes again.

    There are two such languages; the second half of a text is of the same as the first, or of the other.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        odds = torch.rand(2, WORDS, WORDS, generator=self.generator)
        kept = odds.topk(NEXT, dim=-1)
        drawn = torch.rand(2, WORDS, NEXT, generator=self.generator)
        self.odds = torch.zeros_like(odds).scatter(-1, kept.indices, drawn)

    def texts(self, n: int, *, special: bool = True, mixed: bool = False) -> tuple[Tensor, Tensor]:
        """Ids [text, token], and of which a half is of the other language [text]."""
        first = torch.randint(2, (n,), generator=self.generator)
        changes = torch.randint(2, (n,), generator=self.generator) * mixed
        length = LENGTH - 2 * special
        words = [torch.randint(WORDS, (n,), generator=self.generator) for _ in range(2)]
        while len(words) < length:
            language = first ^ (changes * (len(words) >= length // 2))
            drawn = torch.multinomial(self.odds[language, words[-1]], 1, generator=self.generator)[:, 0]
            words.append(torch.where(words[-1] < TRIGGERS, words[-2], drawn))
        ids = torch.stack(words, dim=1) + SPECIAL
        if special:
            ids = torch.cat([torch.full((n, 1), FIRST), ids, torch.full((n, 1), LAST)], dim=1)
        return ids, changes


def model_of(name: str, seed: int) -> nn.Module:
    import transformers as t

    torch.manual_seed(seed)
    vocabulary, width, positions = SPECIAL + WORDS, HEADS * HEAD, LENGTH
    if name == DECODERS[1]:
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
    ids = {"bos_token_id": FIRST, "eos_token_id": LAST}
    return t.LlamaForCausalLM(t.LlamaConfig(**shared, **ids))


def train(model: nn.Module, language: Language, name: str) -> float:
    """Train; how often an encoder told, in the last tenth of the steps, whether both halves are of one language."""
    encoder, special = name.startswith("encoder"), name != BARE
    torch.manual_seed(0)
    told = nn.Linear(SPECIAL + WORDS, 2)
    parameters = [*model.parameters(), *(told.parameters() if name == ENCODER else ())]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    right = []
    model.train()
    for _ in range(STEPS):
        ids, changes = language.texts(BATCH, special=special, mixed=name == ENCODER)
        if encoder:
            chosen = (torch.rand(ids.shape, generator=language.generator) < 0.2) & (ids >= SPECIAL)
            logits = model(ids.masked_fill(chosen, MASK)).logits
            loss = cross_entropy(logits[chosen], ids[chosen])
            if name == ENCODER:
                said = told(logits[:, 0])
                loss = loss + cross_entropy(said, changes)
                right = [*right, float((said.argmax(-1) == changes).float().mean())][-STEPS // 10 :]
        else:
            loss = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    return float(np.mean(right)) if right else float("nan")
