"""A vision-language model that learns, by reward alone, to crop its own picture, look at the crop, and answer.

Zheng et al., DeepEyes: Incentivizing "Thinking with Images" via Reinforcement Learning (arXiv:2505.14362); reward,
advantages and the tool's checks as in the authors' code (Visual-Agent/DeepEyes). A trajectory is thoughts, then an
answer or a call of the tool; the crop comes back as the next turn, five turns at most. Only where the answer is right
does having looked pay. Group-relative policy optimisation: no value network, no examples.

It runs on any vision-language model of transformers that has a chat template, which `regard.load` gives by name or
folder, and on the zoo's, which has not learned to call tools and answers at once. Cut: the authors train on verl, over
many machines; here one step is a plain function. A right answer is told by equality, for which they ask a language
model. Tokens of the crops are no part of the loss: each turn is scored after what the model was shown by then. Their
selection of questions, those answered now and then and helped by a crop of the true place, is `selected`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from ..loading import load

SEEN, END = "<|vision_start|><|image_pad|>", "<|image_pad|><|vision_end|>"
OBSERVED = "<|vision_start|><|image_pad|><|vision_end|>"
LONGEST = 1000  # characters of an answer
PROMPT = (
    "Think first, between <think> and </think>. To look closer, call "
    '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [left, top, right, bottom], "label": what}}'
    "</tool_call>; else answer, between <answer> and </answer>."
)
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


def answer(text: str) -> str:
    """What a trajectory says in the end, the whole of it where nothing is marked as its answer.

    >>> from regard.models.deepeyes import answer
    >>> answer("<think>a star</think><answer> red </answer>")
    'red'
    """
    return text.rsplit("<answer>", 1)[-1].split("</answer>")[0].strip()


def exact(said: str, truth: str) -> float:
    """1 where both are the same but for case and outer spaces, else 0."""
    return float(said.strip().lower() == truth.strip().lower())


def reward(
    text: str,
    truth: str,
    *,
    weights: Sequence[float] = (0.8, 0.2, 1.2),
    judge: Callable[[str, str], float] = exact,
) -> float:
    """What a trajectory is worth: its answer, its form, and having looked, which counts where the answer is right.

    text: all that the model said, each crop as `OBSERVED`; weights: of the three; judge: answer and truth -> 0 to 1.
    The form is 0, or -1 where thoughts, crops or, after the last thought, answers are opened and not closed, or the
    answer has 1,000 characters or more, which is wrong as well.

    >>> from regard.models.deepeyes import OBSERVED, reward
    >>> looked = f"<think>far</think>{OBSERVED}<answer>red</answer>"
    >>> reward(looked, "red"), reward(looked, "blue"), reward("<answer>red</answer>", "red")
    (2.0, 0.0, 0.8)
    """
    said, last = answer(text), text.rsplit("</think>", 1)[-1]
    odd = text.count("<think>") != text.count("</think>") or text.count(SEEN) != text.count(END)
    odd = odd or last.count("<answer>") != last.count("</answer>") or len(said) >= LONGEST
    right = 0.0 if len(said) >= LONGEST else judge(said, truth)
    looked = SEEN in text and right > 0.5
    return weights[0] * right - weights[1] * odd + weights[2] * looked


def group_advantages(rewards: Tensor, group: Tensor) -> Tensor:
    """How far each reward lies above the mean of its group, in deviations of the group. [trajectory]

    group: which question each trajectory answers. One alone keeps its reward.

    >>> import torch
    >>> from regard.models.deepeyes import group_advantages
    >>> group_advantages(torch.tensor([2.0, 0.8, 0.0, 0.0]), torch.zeros(4, dtype=torch.long))
    tensor([ 1.3754,  0.1058, -0.7406, -0.7406])
    """
    if rewards.shape != group.shape or rewards.ndim != 1:
        raise ValueError(
            f"group_advantages: takes rewards and groups [trajectory]; got {list(rewards.shape)} and "
            f"{list(group.shape)}"
        )
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    found = torch.empty_like(rewards)
    for one in group.unique():
        own = rewards[group == one]
        middle, spread = (own.mean(), own.std()) if len(own) > 1 else (own.new_zeros(()), own.new_ones(()))
        found[group == one] = (own - middle) / (spread + 1e-6)
    return found


def policy_loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2) -> Tensor:
    """The clipped objective of PPO, to be made small: the mean over tokens that are the model's own.

    new, old: log-probabilities of the tokens [trajectory, token]; advantages: [trajectory]; mask: boolean.
    """
    ratio, by = (new - old).exp(), advantages[:, None]
    return -(torch.minimum(ratio * by, ratio.clamp(1 - clip, 1 + clip) * by) * mask).sum() / mask.sum().clamp_min(1)


def clipped(box: Sequence[float], size: tuple[int, int], *, least: int = 31) -> Box | None:
    """A box inside a picture of this width and height, or None where the tool refuses it.

    It does where a number is not finite, where nothing is left, where a side is shorter than `least`, or a hundred
    times longer than the other.

    >>> from regard.models.deepeyes import clipped
    >>> clipped((-20, 5, 60, 300), (320, 240)), clipped((100, 100, 130, 140), (320, 240))
    ((0, 5, 60, 240), None)
    """
    if not all(math.isfinite(x) for x in box):
        return None
    left, top, right, bottom = (int(x) for x in box)
    left, top, right, bottom = max(0, left), max(0, top), min(size[0], right), min(size[1], bottom)
    wide, high = right - left, bottom - top
    if min(wide, high) < max(1, least) or max(wide, high) > 100 * min(wide, high):
        return None
    return left, top, right, bottom


def zoom(
    picture: Image.Image, box: Sequence[float], *, least: int = 31, size: tuple[int, int] | None = None
) -> Image.Image | None:
    """What the tool gives back: the crop, at `size` where it is given, or None."""
    inside = clipped(box, picture.size, least=least)
    if inside is None:
        return None
    crop = picture.crop(inside)
    return crop if size is None else crop.resize(size)


def called(text: str) -> list[float] | None:
    """The box that a turn asks for, or None where it calls no tool, or not in the way it was told.

    >>> from regard.models.deepeyes import called
    >>> called('<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 50, 60]}}</tool_call>')
    [1.0, 2.0, 50.0, 60.0]
    """
    calls = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)
    try:
        asked = json.loads(calls[-1])
        box = [float(x) for x in asked.get("arguments", asked)["bbox_2d"]]
    except (IndexError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return box if len(box) == 4 else None


@dataclass
class Turn:
    """One answer of the model: what it was given, and the ids that it gave."""

    inputs: dict[str, Tensor]
    ids: Tensor  # [token]
    text: str


@dataclass
class Trajectory:
    """The turns that answer one question."""

    turns: list[Turn] = field(default_factory=list)
    crops: list[Image.Image] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All that was said, each crop as `OBSERVED`."""
        crops = len(self.crops)
        return "".join(turn.text + (OBSERVED if i < crops else "") for i, turn in enumerate(self.turns))


@torch.no_grad()
def rollout(
    model: nn.Module,
    processor: Any,
    picture: Image.Image,
    question: str,
    *,
    turns: int = 5,
    length: int = 256,
    prompt: str = PROMPT,
    again: str | None = None,
    asked: Callable[[str], Sequence[float] | None] | None = None,
    least: int = 31,
    size: tuple[int, int] | None = None,
    **options: Any,
) -> Trajectory:
    """One trajectory of a model for a question on a picture.

    turns, length: answers at most, and tokens of each; again: what is said with a crop, the prompt unless given; asked:
    the box that a turn asks for, in pixels, or None, `called` unless given; least, size: pixels of a crop's sides, at
    least, and as it is shown; `options` go to `generate`, such as `do_sample=True`. ValueError for a model without
    pictures or without a chat template.
    """
    if not hasattr(processor, "image_processor") or not getattr(processor, "chat_template", None):
        raise ValueError(
            f"deepeyes: takes a vision-language model with a chat template; {type(model).__name__} comes with "
            f"{type(processor).__name__}"
        )
    said: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{question} {prompt}".strip()}]}
    ]
    pictures, found, again = [picture], Trajectory(), prompt if again is None else again
    for turn in range(turns):
        text = processor.apply_chat_template(said, add_generation_prompt=True)
        inputs = dict(processor(text=[text], images=pictures, return_tensors="pt"))
        ids = cast(Any, model).generate(**inputs, max_new_tokens=length, **options)[0, inputs["input_ids"].shape[1] :]
        reply = processor.decode(ids, skip_special_tokens=True)
        found.turns.append(Turn(inputs, ids, reply))
        box = (asked or called)(reply)
        crop = None if box is None or turn == turns - 1 else zoom(picture, box, least=least, size=size)
        if crop is None:
            break
        found.crops.append(crop)
        pictures = [*pictures, crop]
        said += [
            {"role": "assistant", "content": [{"type": "text", "text": reply}]},
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": again}],
            },
        ]
    return found


def likelihood(model: nn.Module, turn: Turn) -> Tensor:
    """Log-probability of each token of a turn, after what the model was given. [token]"""
    inputs = dict(turn.inputs)
    before = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], turn.ids[None]], 1)
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            more = torch.full_like(turn.ids, int(name == "attention_mask"))[None]
            inputs[name] = torch.cat([inputs[name], more], 1)
    logits = model(**inputs).logits[0, before - 1 : -1]
    return logits.log_softmax(-1).gather(-1, turn.ids[:, None])[:, 0]


def train_step(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    trajectories: Sequence[Trajectory],
    rewards: Tensor,
    group: Tensor,
    *,
    clip: float = 0.2,
    old: Sequence[Tensor] | None = None,
) -> float:
    """One step on trajectories of the model as it was; the loss. rewards, group: [trajectory]

    old: log-probabilities of the tokens when they were drawn, one tensor a trajectory, where the model has learned
    since.
    """
    advantages = group_advantages(rewards, group)
    new = [torch.cat([likelihood(model, turn) for turn in of.turns]) for of in trajectories]
    pad = nn.utils.rnn.pad_sequence(new, batch_first=True)
    mask = torch.arange(pad.shape[1]) < torch.tensor([len(x) for x in new])[:, None]
    drawn = pad.detach() if old is None else nn.utils.rnn.pad_sequence(list(old), batch_first=True)
    loss = policy_loss(pad, drawn, advantages.to(pad), mask.to(pad.device), clip=clip)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return float(loss.detach())


def selected(rights: Tensor, helped: Tensor) -> Tensor:
    """Which questions to train on: right now and then, and helped by a crop of the true place. Boolean [question]

    rights: of several tries each [question, try]; helped: boolean [question].
    """
    share = rights.double().mean(1)
    return (share > 0) & (share < 1) & helped


def deepeyes(
    picture: Image.Image,
    question: str,
    *,
    model: str = "describer",
    load_options: Mapping[str, Any] | None = None,
    **knobs: Any,
) -> Trajectory:
    """How a model answers a question on a picture with the tool at hand: `rollout` by name, folder or hub id.

    >>> from PIL import Image
    >>> from regard.models.deepeyes import answer, deepeyes
    >>> found = deepeyes(Image.new("RGB", (64, 64)), "is there a star?", prompt="", length=2)
    >>> len(found.turns), found.crops
    (1, [])
    """
    network, processor = load(model, **(load_options or {}))
    return rollout(network, processor, picture, question, **knobs)
