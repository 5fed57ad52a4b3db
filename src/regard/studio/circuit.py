"""Which heads carry what a clean and a corrupted prompt differ by, where, and along which paths to the answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import xarray as xr
from pydantic import BaseModel, Field
from torch import Tensor

from ..circuits._patching import Contrast, answering, ranked
from ..cli import circuits
from ..cli.inputs import InputError
from ..data import prompts
from ..loading import Loaded
from ..tokens import Tokens
from .jobs import Job
from .steps import Name

LONGEST = 96  # tokens that are patched one by one, the last ones
Text = Annotated[str, Field(min_length=1, max_length=20_000)]


class Contrasted(BaseModel):
    """Two prompts of as many tokens, the answer to the clean one, and a wrong one."""

    model: Name
    clean: Text
    corrupted: Text
    answer: Name
    wrong: Name
    heads: Annotated[int, Field(strict=True, ge=1, le=24)] = 8


class Example(BaseModel):
    """A prompt of a task that is known."""

    model: Name
    task: Literal["ioi", "greater_than", "docstring", "induction"]
    seed: Annotated[int, Field(strict=True, ge=0, le=2**31)] = 0


class _Watched(Contrast):
    """Every run of the model asks whether it is wanted still, and tells how far it is."""

    def __init__(self, job: Job, *args: Any, **options: Any) -> None:
        self.job, self.what, self.done, self.of = job, "running both prompts", 0, 0
        super().__init__(*args, **options)

    def now(self, what: str, of: int = 0) -> None:
        self.what, self.done, self.of = what, 0, of

    def run(self, *args: Any, **options: Any) -> Tensor:
        self.job.check()
        self.job.tell("progress", what=self.what, done=self.done, of=self.of)
        self.done += 1
        return super().run(*args, **options)


def example(job: Job, loaded: Loaded, asked: Example) -> None:
    """Tell a prompt of a task whose words fit the tokenizer."""
    tokenizer = circuits.reads(loaded, asked.model)
    for prompt in getattr(prompts, asked.task)(circuits.DRAWS, seed=asked.seed):
        try:
            prompts.encode(prompt, tokenizer)
        except ValueError:
            continue
        job.tell(
            "example",
            clean=prompt.text,
            corrupted=prompt.corrupted_text,
            answer=prompt.answer,
            wrong=prompt.distractors[0],
        )
        return
    raise InputError(f"of {circuits.DRAWS} prompts of {asked.task} none fits the tokenizer of {asked.model}")


def circuit(job: Job, loaded: Loaded, asked: Contrasted) -> None:
    """Tell the effect of each head, of the strongest at each token, how faithful they are, and the paths between."""
    model, tokenizer = loaded.model, circuits.reads(loaded, asked.model)
    line = {name: getattr(asked, name) for name in circuits.KEYS}
    put = prompts.stacked([circuits.encoded(line, tokenizer)], tokenizer)
    contrast = _Watched(job, model, put.inputs, put.corrupted, put.difference, stack=answering(model))
    words = [
        Tokens.plain("text", 1, ids.shape[1], ids).texts(tokenizer)[0]
        for ids in (put.inputs["input_ids"], put.corrupted["input_ids"])
    ]
    job.tell(
        "contrast",
        words=words,
        clean=float(contrast.whole.mean()),
        corrupted=float(contrast.broken.mean()),
        right=put.right(model) > 0.5,
    )
    contrast.now("patching heads", -(-len(contrast.heads) // 16))
    table = contrast.by_head()
    layers, heads = table["layer"].values.tolist(), table["head"].values.tolist()
    job.tell("heads", layers=layers, heads=heads, effect=_numbers(table.transpose("layer", "head")))
    order = [head for head in ranked(table) if head in set(contrast.heads)]
    found = order[: min(asked.heads, len(order))]
    tokens = list(range(max(0, contrast.tokens - LONGEST), contrast.tokens))
    contrast.now("patching heads at each token", -(-len(found) * len(tokens) // 16))
    effect = contrast.patched([(head, token) for head in found for token in tokens]).view(len(found), len(tokens))
    rows = [f"{layer}.{head}" for layer, head in found]
    job.tell("patching", rows=rows, tokens=tokens, effect=effect.tolist())
    contrast.now("measuring faithfulness")
    sizes, ours, random = circuits.faithful(contrast, order, 0)
    job.tell("faithfulness", sizes=sizes, ours=ours, low=random.min(1).tolist(), high=random.max(1).tolist())
    contrast.now("following paths")
    edges = [edge._asdict() for edge in circuits.edges_of(contrast, found)]
    job.tell("paths", nodes=[list(head) for head in found], answer=circuits.ANSWER, edges=edges)


def _numbers(table: xr.DataArray) -> list[list[float | None]]:
    return [[None if x != x else float(x) for x in row] for row in table.values.tolist()]
