"""Do codes of an autoencoder find the heads of a circuit, and is it its training that finds them?

Two tasks of the planted model, whose circuits are known; on the negatives the last word has nothing to go by: its
earlier copy is another word, or the question mark is a word. The control is the same autoencoder untrained, whose codes
are the largest of random projections, and labels that are shuffled. Ten seeds of autoencoder and prompts. On the
reader, where the truth is what ablation costs, the areas are reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import zoo
from ...catalog import Finding, Premise
from ...circuits.discrete_sae import DiscreteSAE, area, codes, train, unique, written
from ...circuits.sixteen_heads import Masked, sixteen_heads
from ...data.prompts import batch, docstring, greater_than, induction, ioi
from ...seam import intervene
from .._asked import ask
from .._measure import mean, seconds
from .._planted import FIRST, HEADS, INDUCTIVE, LAYERS, QUESTION, TELLING, WORDS, planted, questions

SCALES = "small", "large"
EXPECTED = (
    "on both tasks of the planted model, mean over ten seeds, the area under the ROC curve of unique codes is 0.9 or "
    "more, and of the heads with half of the largest count or more, precision and recall are 0.75 or more; with "
    "shuffled labels the area is below 0.75; the trained autoencoder's area is above the untrained one's by two "
    "standard errors of the paired differences and by more than 0.03; it takes less time than ablating each head once "
    "on as many rows, and its area is not below that of gradient importance on the ten rows it is trained on by more "
    "than 0.05"
)
ROWS, EXAMPLES, SEEDS = 100, 10, 10
PROMPTS = {"small": 16, "large": 200}
EVERY = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Areas of trained and untrained codes on planted circuits, and on the reader's."""
    areas: dict[str, list[float]] = {name: [] for name in ("trained", "untrained", "shuffled", "gradient")}
    precise, complete, works = [], [], []
    for turn in range(SEEDS):
        model = planted(seed=seed + turn)
        for task, circuit in ((_repeats, INDUCTIVE), (_questions, TELLING)):
            positive, negative, answers = task(seed + turn)
            works.append(float((model(positive).logits[:, -1].argmax(-1) == answers).float().mean()))
            truth = [at in circuit for at in EVERY]
            every = _outputs(model, positive, negative)
            score = _score(every, steps=500, seed=seed + turn)
            areas["trained"].append(area(score, truth))
            areas["untrained"].append(area(_score(every, steps=0, seed=seed + turn), truth))
            mixed = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed + turn))]
            areas["shuffled"].append(area(_score(mixed, steps=500, seed=seed + turn), truth))
            found = score >= score.max() / 2
            precise.append(float(np.mean(np.array(truth)[found])))
            complete.append(float(np.mean(found[truth])))
            areas["gradient"].append(area(_gradient(model, positive[:EXAMPLES], answers[:EXAMPLES]), truth))
    of = {name: mean(values) for name, values in areas.items()}
    gain = mean(np.subtract(areas["trained"], areas["untrained"]))

    model, (positive, negative, answers) = planted(seed=seed), _repeats(seed)

    def ablate() -> None:
        for head in EVERY:
            with torch.no_grad(), intervene(model, Masked([head])):
                model(torch.cat([positive, negative]))

    ours, theirs = seconds(lambda: _score(_outputs(model, positive, negative), steps=500, seed=seed), ablate, least=1)
    reader = {name: _reader(task, PROMPTS[scale], seed) for name, task in READ.items()}

    accurate = of["trained"].value >= 0.9 and mean(precise).value >= 0.75 and mean(complete).value >= 0.75
    trained = gain.above() and gain.value > 0.03
    beside = of["shuffled"].value < 0.75 and of["trained"].value >= of["gradient"].value - 0.05 and ours < theirs
    told = "; ".join(
        f"{name} {one:.2f} and {other:.2f} ({heads} of 48 heads matter)" for name, (one, other, heads) in reader.items()
    )
    measured = (
        f"area {of['trained']:.3f} with training, {of['untrained']:.3f} without, a gain of {gain:.3f}; with shuffled "
        f"labels {of['shuffled']:.3f}; of gradient importance on ten rows {of['gradient']:.3f}; precision "
        f"{mean(precise):.2f}, recall {mean(complete):.2f}; {ours:.2f} seconds, of ablating each head once "
        f"{theirs:.2f}; on the reader, area with and without training: {told}"
    )
    solved = Premise("the planted model solves its tasks", "95% right", f"{min(works):.0%} or more", min(works) >= 0.95)

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        names = list(areas)
        left.boxplot([areas[name] for name in names], tick_labels=["trained", "not trained", "shuffled", "gradient"])
        left.set(ylabel="area under the ROC curve", title="Planted circuits, ten seeds")
        right.plot(areas["untrained"], areas["trained"], "o", alpha=0.5)
        right.plot([0.5, 1], [0.5, 1], color="lightgrey")
        right.set(xlabel="area, untrained", ylabel="area, trained", title="Each seed and task")

    return Finding(accurate and trained and beside, measured, EXPECTED, seed, premises=[solved], draw=draw)


def _repeats(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that repeat, the same with the last word's earlier copy replaced, and the answers."""
    drawn = batch(induction(ROWS, seed=seed, words=range(FIRST, WORDS), length=6, at=3), int)
    first = torch.zeros(ROWS, 1, dtype=torch.long)
    return torch.cat([first, drawn.ids], 1), torch.cat([first, drawn.corrupted], 1), drawn.answers[:, 0]


def _questions(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that end in a question mark, the same with a word in its place that the row has not, and the answers."""
    ids, answers = questions(ROWS, seed=seed)
    absent = torch.ones(ROWS, WORDS).scatter_(1, ids, 0.0)
    absent[:, : QUESTION + 1] = 0
    negative = ids.clone()
    negative[:, -1] = torch.multinomial(absent, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    return ids, negative, answers


def _outputs(model: Any, positive: Tensor, negative: Tensor) -> Tensor:
    """What heads write, the positive rows first. [row, head, dim]"""
    sides = [torch.cat(list(written(model, {"input_ids": ids}).values()), 1) for ids in (positive, negative)]
    return torch.cat(sides)


def _score(every: Tensor, *, steps: int, seed: int) -> np.ndarray:
    """Unique codes of each head."""
    sae = DiscreteSAE(every.shape[-1], seed=seed)
    drawn = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:EXAMPLES]
    train(sae, every[drawn], steps=steps)
    return unique(*codes(sae, every).chunk(2)).numpy()


def _gradient(model: Any, ids: Tensor, answers: Tensor) -> np.ndarray:
    def loss(model: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(model(ids).logits[:, -1], answers, reduction="none")

    return sixteen_heads(model, loss, normalise=False).values.ravel()


READ: dict[str, Callable[..., Any]] = {"ioi": ioi, "greater_than": greater_than, "docstring": docstring}


@torch.no_grad()
def _reader(task: Callable[..., Any], n: int, seed: int) -> tuple[float, float, int]:
    """Areas with training and without, and how many heads matter: those whose ablation costs a tenth of the score."""
    model, tokenizer = zoo.load("reader")
    asked = ask(task(n, seed=seed), tokenizer)
    score = asked.difference(model(**asked.inputs).logits).mean()
    costs = []
    for head in np.ndindex(6, 8):
        with intervene(model, Masked([head])):
            costs.append(float(score - asked.difference(model(**asked.inputs).logits).mean()))
    truth = np.array(costs) >= 0.1 * float(score)
    if not 1 < truth.sum() <= 24:
        return np.nan, np.nan, int(truth.sum())
    sides = [torch.cat(list(written(model, inputs).values()), 1) for inputs in (asked.inputs, asked.corrupted)]
    found = [area(_score(torch.cat(sides), steps=steps, seed=seed), truth) for steps in (500, 0)]
    return found[0], found[1], int(truth.sum())
