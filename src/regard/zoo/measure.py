"""What a zoo model can do, measured: the figures of its card, which anyone can take again.

python -m regard.zoo.measure reader
"""

from __future__ import annotations

import json
import sys
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
            layer, head = divmod(int(mean.argmax()), mean.sizes["head"])
            found[str(score.name)] = {"layer": layer, "head": head, "score": round(float(mean.max()), 4)}
    return found


if __name__ == "__main__":
    print(json.dumps(reader(*sys.argv[1:]), indent=1))
