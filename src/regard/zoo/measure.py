"""What a zoo model can do, measured: the figures of its card, which anyone can take again.

python -m regard.zoo.measure reader
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..data import paragraph
from ..loading import load
from ..recording import statistic
from ..seam import record

SEQUENCES, SEGMENT, COPIES = 64, 24, 3


def reader(name: str = "reader", seed: int = 0) -> dict[str, Any]:
    """Copying and head scores of a causal language model, on random segments that repeat and on the given paragraph.

    copy_accuracy: share of tokens predicted rightly in the later copies of a segment. Each head score is the best
    head's mean weight, 0 to 1, over the positions that it is about: `induction` on the key after the earlier copy of
    the token, `previous_token` on the key before, both on the repeated segments; `first_token` on prose.
    """
    model, tokenizer = load(name)
    generator = torch.Generator().manual_seed(seed)
    segment = torch.randint(2, model.config.vocab_size, (SEQUENCES, SEGMENT), generator=generator)
    bos = torch.full((SEQUENCES, 1), tokenizer.bos_token_id)
    ids = torch.cat([bos, *[segment] * COPIES], dim=1)
    positions = torch.arange(ids.shape[1])
    second = SEGMENT + 1  # where the first copy's first token stands again

    @statistic("batch head", title="Weight on the key after the earlier copy of the token")
    def induction(call: Call) -> Tensor:
        return call.weights.at((positions - SEGMENT + 1)[None])[..., second:].mean(-1)

    @statistic("batch head", title="Weight on the key before")
    def previous_token(call: Call) -> Tensor:
        return call.weights.at((positions - 1)[None])[..., 2:].mean(-1)

    @statistic("batch head", title="Weight on the first token")
    def first_token(call: Call) -> Tensor:
        return call.weights.at(torch.zeros(1, call.query.shape[2], dtype=torch.long))[..., 4:].mean(-1)

    with torch.inference_mode():
        with record(model, induction, previous_token) as repeated:
            guesses = model(ids).logits[:, :-1].argmax(-1)
        with record(model, first_token) as prose:
            model(**tokenizer(paragraph(), return_tensors="pt"))
    right = (guesses == ids[:, 1:])[:, second:]  # the first token of a copy cannot be known, and is left out
    found: dict[str, Any] = {"copy_accuracy": round(float(right.float().mean()), 4)}
    for recording in (repeated, prose):
        for score in recording.tree["language_model"].data_vars.values():
            mean = score.mean("batch")
            layer, head = divmod(int(mean.values.argmax()), mean.sizes["head"])
            found[str(score.name)] = {"layer": layer, "head": head, "score": round(float(mean.max()), 4)}
    return found


def write_card(folder: Path, trained: dict[str, Any]) -> None:
    """Measure the reader in `folder`, and write `measured.json` and the model card beside it."""
    found = trained | reader(str(folder))
    (folder / "measured.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "README.md").write_text(CARD.format(**found, size=(folder / "model.safetensors").stat().st_size / 1e6))


CARD = """# reader

A small causal language model: Llama architecture with attention biases, 6 layers of 8 heads (4 key heads, 32 wide),
160 wide, byte-level BPE of 2,048 tokens, 1,024 positions. {size:.2f} MB of half-precision safetensors, run in float32.

It exists so that attention has something true to show without a download. It writes poor English.

## Training

`python -m regard.zoo.train_reader DATA`, seed {seed}, {steps} steps on two CPU cores, on public-domain children's books
and novels (Austen, Doyle, Stevenson and others) and on Tiny Shakespeare; the last fiftieth of each file is held out. A
part of the sequences repeats random tokens. Every sequence starts with `<|bos|>`.

Not all of it was found by training: before it, one head of layer 0 is set to look at the previous token and two of
layer 1 at what followed an earlier copy. Training then moved all weights. Do not cite these heads as emergent.

## Measured

Taken again by `python -m regard.zoo.measure reader`, and by the tests. Head scores are mean weights.

| what | figure |
|---|---|
| held-out loss on prose | {held_out_loss:.2f} nats a token |
| next token in the later copies of 24 random tokens | {copy_accuracy:.0%} right |
| induction, layer {induction[layer]} head {induction[head]}, same segments | {induction[score]:.0%} |
| previous token, layer {previous_token[layer]} head {previous_token[head]} | {previous_token[score]:.0%} |
| first token, layer {first_token[layer]} head {first_token[head]}, in prose | {first_token[score]:.0%} |

## Licence

Apache-2.0, as Regard. The texts are in the public domain; Tiny Shakespeare's repository is under the MIT licence.
"""


if __name__ == "__main__":
    print(json.dumps(reader(*sys.argv[1:]), indent=1))
