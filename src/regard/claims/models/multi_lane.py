"""De Min et al. (arXiv:2405.15633): a pathway for each task forgets nothing, at a fraction of a pass for each.

Four tasks, which ask after ten shapes in scenes of two to four objects; of each picture only the labels of the task at
hand are given, whatever else is in it. The backbone is the zoo's viewer, frozen, without its head. Judged on scenes
held out, by the mean average precision (mAP) over shapes; forgetting is what the mAP of a task's own classes, among
themselves, lost from right after the task to the end. Controls: one pathway of as many selectors and prompts as all
four together, trained on the tasks in sequence, which has to forget; and pathways of a single selector. One pilot, on
another seed; after it the steps were cut from 120 to 90, for time.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import zoo
from ...catalog import Finding, Premise
from ...data.scenes import SHAPES, Dials, render, sample
from ...models.multi_lane import MultiLane, frozen_operations, multi_lane, operations
from ...zoo.recipes import viewer
from .._measure import mean

SCALES = "small", "large"
STEPS = {"small": 90, "large": 1000}
TRAIN, HELD, BATCH, RATE = 700, 400, 32, 0.03
TASKS, SELECTORS, PROMPTS, PROMPTED = (3, 3, 2, 2), 8, 4, 2
GAIN, FORGOTTEN, SHARE = 0.10, 0.05, 0.6
CLASSES = [slice(end - count, end) for count, end in zip(TASKS, accumulate(TASKS), strict=True)]


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Four pathways, one for all tasks, and four of one selector, on the same pictures."""
    expected = (
        f"after four tasks mAP {GAIN:.0%} or more above one pathway trained in sequence, and by two standard errors "
        f"over shapes; no mAP of a task's own classes lost; the pathways take {SHARE:.0%} or less of the operations of "
        "a pass of the backbone for each task; with one selector the mAP is lower"
    )
    backbone: Any = zoo.load("viewer")[0]
    scenes = [sample(Dials(objects=(2, 4)), seed, i) for i in range(TRAIN + HELD)]
    labels = torch.tensor([[float(bool(scene.find(shape))) for shape in SHAPES] for scene in scenes])
    pictures: Any = render(scenes, viewer.SIZE)
    stream: Any = None
    ways = {
        "pathways": {"tasks": TASKS, "selectors": SELECTORS, "prompts": PROMPTS},
        "one pathway": {
            "tasks": (sum(TASKS),),
            "selectors": SELECTORS * len(TASKS),
            "prompts": PROMPTS * len(TASKS),
        },
        "one selector": {"tasks": TASKS, "selectors": 1, "prompts": PROMPTS},
    }
    end, lost, courses = {}, {}, {}
    for name, sizes in ways.items():
        torch.manual_seed(seed)
        model = multi_lane(backbone, prompted=PROMPTED, **sizes)
        if stream is None:
            stream = torch.cat([model.stream(some) for some in viewer.pixels(pictures).split(100)], 1)
        end[name], lost[name], courses[name] = _course(model, stream, labels, STEPS[scale], seed)
    gain, fewer = mean(end["pathways"] - end["one pathway"]), mean(end["pathways"] - end["one selector"])
    config = backbone.config
    width, hidden, tokens = config.hidden_size, config.intermediate_size, stream.shape[2]
    layers = config.num_hidden_layers
    own = sum(operations(width, tokens, SELECTORS, PROMPTS * (i < PROMPTED), hidden) for i in range(layers))
    share = own / (layers * frozen_operations(width, tokens, hidden))
    forgets, keeps = mean(lost["one pathway"]).value, float(lost["pathways"].abs().max())
    holds = bool(gain.value >= GAIN and gain.above() and keeps <= 1e-6 and share <= SHARE and fewer.value > 0)
    measured = (
        "; ".join(f"{name}: mAP {mean(of):.1%}, forgotten {lost[name].mean():.1%}" for name, of in end.items())
        + f"; pathways above one by {gain:.1%}, above one selector by {fewer:.1%}; their largest loss of a task's own "
        f"mAP is {keeps:.1e}; a pathway takes {share:.0%} of the operations of a pass"
    )
    premises = [
        Premise("one pathway forgets", f"mAP {FORGOTTEN:.0%} or more", f"{forgets:.1%}", forgets >= FORGOTTEN),
        Premise(
            "other tasks' objects are in the pictures",
            "two tasks or more in 80% of them",
            f"{_several(labels):.0%}",
            _several(labels) >= 0.8,
        ),
    ]

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, name in zip(panels, ("pathways", "one pathway"), strict=True):
            for task in range(len(TASKS)):
                after = [course[task] for course in courses[name][task:]]
                axes.plot(range(task + 1, len(TASKS) + 1), after, "o-", label=f"task {task + 1}")
            axes.set(title=name, xlabel="tasks learned", ylim=(0, 1), xticks=range(1, len(TASKS) + 1))
        panels[0].set_ylabel("mAP of the task's own classes")
        panels[0].legend()

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _several(labels: Tensor) -> float:
    """Share of the scenes that show classes of two tasks or more."""
    return float((torch.stack([labels[:, of].any(1) for of in CLASSES]).sum(0) >= 2).float().mean())


def _course(
    model: MultiLane, stream: Tensor, labels: Tensor, steps: int, seed: int
) -> tuple[Tensor, Tensor, list[list[float]]]:
    """Average precision of each shape at the end, what each task lost, and mAP of the tasks so far after each."""
    lots, course = torch.Generator().manual_seed(seed), []
    apart = len(model.config.tasks) > 1
    scores = torch.empty(0)
    for task, of in enumerate(CLASSES):
        if apart or not task:
            model.begin(task)
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        model.train()
        for _ in range(steps):
            some = torch.randint(TRAIN, (BATCH,), generator=lots)
            optimiser.zero_grad()
            if apart:
                loss = model(stream=stream[:, some], labels=labels[some, of]).loss
            else:  # the same loss, of this task's classes only
                logits = model(stream=stream[:, some]).logits[:, of]
                loss = F.binary_cross_entropy_with_logits(logits, labels[some, of], reduction="sum")
                loss = loss / BATCH / sum(TASKS)
            loss.backward()
            optimiser.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            scores = torch.cat([model(stream=some).logits for some in stream[:, TRAIN:].split(100, 1)])
        every = [_precision(scores[:, i], labels[TRAIN:, i]) for i in range(of.stop)]
        course.append([sum(every[c]) / len(every[c]) for c in CLASSES[: task + 1]])
    last = torch.tensor([_precision(scores[:, i], labels[TRAIN:, i]) for i in range(sum(TASKS))])
    lost = torch.tensor([course[task][task] - course[-1][task] for task in range(len(TASKS))])
    return last, lost, course


def _precision(scores: Tensor, labels: Tensor) -> float:
    """Average precision: mean over positives of the share of positives among what scores as high or higher."""
    ranked = labels[scores.argsort(descending=True)]
    return float((ranked.cumsum(0) / torch.arange(1, len(ranked) + 1))[ranked.bool()].mean())
