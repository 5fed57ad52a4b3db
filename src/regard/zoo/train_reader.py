"""Train `reader`, the small causal language model that ships with Regard.

    python -m regard.zoo.train_reader DATA [--out FOLDER] [--seed S]

DATA is a folder that holds `text_books/*.txt.gz` and `text_tinyshakespeare/input.txt`. A run that was stopped goes on
from its last checkpoint; batches are drawn from (seed, step), so a resumed run sees what an unbroken one would have.

Llama architecture with attention biases, byte-level BPE. Two layers get a head start: before training, one head of
layer 0 looks at the previous token and two of layer 1 look at what followed an earlier copy (`head_start`). A model of
this size did not find induction by itself in half an hour of training on two cores. Training then moves
all weights, on prose and on sequences that repeat random tokens.
"""

from __future__ import annotations

import argparse
import gzip
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import measure

BOS, PAD = "<|bos|>", "<|pad|>"
VOCAB = 2048
LONG = 1024  # positions


class Phase(NamedTuple):
    """A stretch of training."""

    steps: int
    length: int  # tokens in a sequence
    sequences: int  # in a batch
    repeated: float  # share of the sequences that repeat a segment of random tokens
    rate: float  # learning rate, before the last decay


PHASES = (
    Phase(250, 64, 64, 0.7, 2e-3),
    Phase(150, 256, 24, 0.25, 2e-3),
    Phase(1450, 256, 24, 0.25, 3e-3),
    Phase(80, LONG, 8, 0.25, 3e-3),
)
STEPS = sum(phase.steps for phase in PHASES)
WEIGHT_DECAY, WARMUP, DECAY = 0.1, 50, 800  # steps of warm-up, and of linear decay to zero at the end
CHECKPOINT = 100  # steps
WIDTH, HEAD = 160, 32


def texts(data: Path) -> list[str]:
    """The books and plays, one string a file."""
    books = [gzip.decompress(path.read_bytes()).decode() for path in sorted((data / "text_books").glob("*.txt.gz"))]
    return [*books, (data / "text_tinyshakespeare" / "input.txt").read_text()]


def train_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for text in corpus for line in text.splitlines(keepends=True)), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, pad_token=PAD, model_max_length=LONG, padding_side="left"
    )


def config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        head_dim=HEAD,
        intermediate_size=300,
        attention_bias=True,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LONG,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=None,
    )


@torch.no_grad()
def head_start(model: LlamaForCausalLM) -> None:
    """Set one head of layer 0 to look at the previous token, and two of layer 1 to look past an earlier copy.

    Layer 0 writes the previous token, seen through `what`, into the subspace `told`; layer 1 compares it with the
    current token seen through `what`. Both use the slow half of the rotary pairs, which hardly turn within a sequence;
    the fast ones tell neighbours apart.
    """
    half, fast = HEAD // 2, 5
    angles = 10000.0 ** (-torch.arange(half) / half)
    slow = [i for i in range(HEAD) if i % half >= 7]
    basis = torch.linalg.qr(torch.randn(WIDTH, 4 * HEAD))[0].T
    what, told = basis[: len(slow)], basis[len(slow) : 2 * len(slow)]

    model.model.embed_tokens.weight *= 2.0
    for layer in model.model.layers:  # what layers write starts small, so that tokens stay legible
        layer.self_attn.o_proj.weight *= 0.2
        layer.mlp.down_proj.weight *= 0.2
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    ahead = torch.zeros(HEAD)
    ahead[:fast] = 5.8
    back = torch.zeros(HEAD)  # `ahead`, turned back by one position
    back[:fast], back[half : half + fast] = 5.8 * angles[:fast].cos(), -5.8 * angles[:fast].sin()
    first.q_proj.weight[:HEAD], first.q_proj.bias[:HEAD] = 0.0, back
    first.k_proj.weight[:HEAD], first.k_proj.bias[:HEAD] = 0.0, ahead
    first.v_proj.weight[:HEAD][: len(slow)] = what
    first.o_proj.weight[:, : len(slow)] = 0.3 * told.T

    for group in range(2):  # key heads 0 and 1, query heads 0 and 2
        keys = slice(group * HEAD, (group + 1) * HEAD)
        queries = slice(2 * group * HEAD, (2 * group + 1) * HEAD)
        copied = torch.linalg.qr(torch.randn(WIDTH, HEAD))[0].T
        second.q_proj.weight[queries] = second.k_proj.weight[keys] = 0.0
        second.q_proj.weight[queries][slow] = 1.75 * what
        second.k_proj.weight[keys][slow] = 1.75 * told
        second.v_proj.weight[keys] = copied
        second.o_proj.weight[:, queries] = 0.3 * copied.T


def split(corpus: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """Token ids for training and for validation: the last fiftieth of every file is held out."""
    ids = [np.array(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int64) for text in corpus]
    cut = [len(i) - len(i) // 50 for i in ids]
    return np.concatenate([i[:c] for i, c in zip(ids, cut)]), np.concatenate([i[c:] for i, c in zip(ids, cut)])


def phase_at(step: int) -> Phase:
    ends = np.cumsum([phase.steps for phase in PHASES])
    return PHASES[int(np.searchsorted(ends, step, side="right"))]


def batch(ids: np.ndarray, phase: Phase, seed: int, step: int, bos: int) -> Tensor:
    """Sequences that start with bos: prose, or a few random tokens over and over. [batch, token]"""
    rng = np.random.default_rng((seed, step))
    rows = []
    for _ in range(phase.sequences):
        if rng.random() < phase.repeated:
            n = int(np.exp(rng.uniform(np.log(3), np.log(phase.length / 3))))
            body = np.resize(rng.integers(2, VOCAB, n), phase.length - 1)
        else:
            start = int(rng.integers(len(ids) - phase.length))
            body = ids[start : start + phase.length - 1]
        rows.append(np.concatenate([[bos], body]))
    return torch.from_numpy(np.stack(rows))


def learning_rate(step: int) -> float:
    return phase_at(step).rate * min(1.0, (step + 1) / WARMUP, (STEPS - step) / DECAY)


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    aside = path.with_suffix(".part")
    save_file(tensors, aside, metadata=metadata)
    os.replace(aside, path)


def train(data: Path, out: Path, seed: int) -> None:
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    corpus = texts(data)
    if (out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    else:
        tokenizer = train_tokenizer(corpus)
        tokenizer.save_pretrained(out)
    train_ids, valid_ids = split(corpus, tokenizer)
    print(f"{len(train_ids):,} training tokens, {len(valid_ids):,} held out", flush=True)

    model = LlamaForCausalLM(config(tokenizer))
    head_start(model)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PHASES[0].rate, betas=(0.9, 0.95), fused=True)
    checkpoint, first = out / "checkpoint.safetensors", 0
    parameters = dict(model.named_parameters())
    if checkpoint.exists():
        state = load_file(checkpoint)
        first = int(state["step"])
        for name, p in parameters.items():
            p.data.copy_(state[name])
            moments = {key: state[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(float(first)), **moments}
        print(f"going on from step {first}", flush=True)

    began, running, tokens = time.time(), None, 0
    for step in range(first, STEPS):
        ids = batch(train_ids, phase_at(step), seed, step, tokenizer.bos_token_id)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += ids.numel()
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if (step + 1) % 20 == 0:
            speed = tokens / (time.time() - began)
            print(f"step {step + 1}/{STEPS}  loss {running:.3f}  {speed:,.0f} tokens/s", flush=True)
        if (step + 1) % CHECKPOINT == 0 or step + 1 == STEPS:
            state = {name: p.data for name, p in parameters.items()}
            for name, p in parameters.items():
                state |= {f"{key}/{name}": optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")}
            save_atomically(state | {"step": torch.tensor(step + 1)}, checkpoint)

    model.eval()
    with torch.no_grad():
        held = [
            model(b, labels=b).loss.item()
            for b in (batch(valid_ids, Phase(1, 256, 32, 0.0, 0.0), 1, i, tokenizer.bos_token_id) for i in range(20))
        ]
    print(f"held-out loss {np.mean(held):.3f} nats a token", flush=True)
    # Half precision halves the file; the config says float32, so that it is loaded as it was trained.
    half = {name: p.data.half() for name, p in parameters.items() if name != "lm_head.weight"}
    save_atomically(half, out / "model.safetensors", {"format": "pt"})
    model.config.architectures, model.config.dtype = ["LlamaForCausalLM"], torch.float32
    model.config.save_pretrained(out)
    measure.write_card(out, {"held_out_loss": round(float(np.mean(held)), 4), "steps": STEPS, "seed": seed})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "reader")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.data, args.out, args.seed)


if __name__ == "__main__":
    main()
