"""DeepEyes: rewards, advantages, boxes and loss by hand; rollouts of a scripted model, and a step of the zoo's."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from regard import zoo
from regard.models import deepeyes as module
from regard.models.deepeyes import (
    OBSERVED,
    Trajectory,
    Turn,
    answer,
    called,
    clipped,
    group_advantages,
    likelihood,
    policy_loss,
    reward,
    rollout,
    selected,
    train_step,
    zoom,
)

PICTURE = Image.new("RGB", (64, 64), (200, 40, 40))
LOOK = '<think>?</think><tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [0, 0, 40, 40]}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>red</answer>", 0.8),
        (f"<think>a</think>{OBSERVED}<answer>Red </answer>", 2.0),
        (f"<think>a</think>{OBSERVED}<answer>blue</answer>", 0.0),
        ("<think>a<answer>red</answer>", 0.6),
        ("<think>a</think><answer>red", 0.6),
        (f"<think>a</think><answer>{'x' * 1000}</answer>", -0.2),
        (f"{LOOK}<answer>red</answer>", 0.8),  # a call that brought nothing
    ],
)
def test_reward_by_hand(text, expected):
    assert reward(text, "red") == pytest.approx(expected)


def test_weights_and_judge():
    text = f"<think>a</think>{OBSERVED}<answer>crimson</answer>"
    assert reward(text, "red", judge=lambda said, truth: 1.0) == pytest.approx(2.0)
    assert reward(text, "red", weights=(1, 0, 5), judge=lambda said, truth: 0.4) == pytest.approx(0.4)


def test_advantages_by_hand():
    group = torch.tensor([0, 1, 0, 0, 0, 2, 2])
    found = group_advantages(torch.tensor([2.0, 0.7, 0.8, 0.0, 0.0, 1.0, 1.0]), group)
    expected = torch.tensor([1.3754, 0.7, 0.1058, -0.7406, -0.7406, 0.0, 0.0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert abs(float(found[group == 0].sum())) < 1e-5


def test_loss_by_hand():
    old, mask = torch.zeros(2, 3), torch.tensor([[True, True, False], [True, False, False]])
    new = torch.tensor([[0.0, 1.0, 9.0], [-1.0, 9.0, 9.0]], requires_grad=True)
    # ratios 1 and e, cut to 1.2; and 1/e, cut to 0.8 where the advantage is below 0
    loss = policy_loss(new, old, torch.tensor([1.0, -1.0]), mask)
    torch.testing.assert_close(loss, torch.tensor(-(1 + 1.2 - 0.8) / 3))
    loss.backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, torch.tensor([[-1 / 3, 0, 0], [0, 0, 0]]))


def test_boxes():
    assert clipped((100, 100, 130, 140), (320, 240)) is None
    assert clipped((100, 100, 131, 140), (320, 240)) == (100, 100, 131, 140)
    assert clipped((50, 50, 40, 80), (320, 240)) is None
    assert clipped((0, 0, 3200, 31), (4000, 100)) is None
    assert clipped((0, 0, 3100, 31), (4000, 100)) == (0, 0, 3100, 31)
    assert zoom(PICTURE, (0, 0, 20, 20)) is None
    crop = zoom(PICTURE, (-5, 0, 40, 50), size=(10, 12))
    assert crop is not None
    assert crop.size == (10, 12)


def test_what_is_called_and_answered():
    assert called(LOOK) == [0, 0, 40, 40]
    assert called('<tool_call>{"bbox_2d": [1, 2, 3, 4]}</tool_call>') == [1, 2, 3, 4]
    for text in ("red", "<tool_call>{}</tool_call>", "<tool_call>[1, 2]</tool_call>", "<tool_call>{</tool_call>"):
        assert called(text) is None
    assert called('<tool_call>{"bbox_2d": [1, 2, 3]}</tool_call>') is None
    assert answer("no tag") == "no tag"


class Scripted(torch.nn.Module):
    """Says one text after the other, and keeps what it was given."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self.texts, self.given = list(texts), []

    def generate(self, input_ids, max_new_tokens, **_):
        self.given.append(input_ids)
        return torch.cat([input_ids, torch.full((1, 1), len(self.given) - 1)], 1)


class Processor:
    image_processor, chat_template = object(), "x"

    def __init__(self, model: Scripted) -> None:
        self.model, self.pictures, self.messages = model, [], []

    def apply_chat_template(self, messages, add_generation_prompt):
        self.messages = list(messages)
        return "text"

    def __call__(self, text, images, return_tensors):
        self.pictures = [image.size for image in images]
        return {"input_ids": torch.zeros(1, 3 + len(images), dtype=torch.long)}

    def decode(self, ids, skip_special_tokens):
        return self.model.texts[int(ids[0])]


def test_a_crop_comes_back_and_the_answer_follows():
    model = Scripted(LOOK, "<think>b</think><answer>red</answer>")
    processor = Processor(model)
    found = rollout(model, processor, PICTURE, "which?")
    assert [crop.size for crop in found.crops] == [(40, 40)]
    assert processor.pictures == [(64, 64), (40, 40)]
    assert [message["role"] for message in processor.messages] == ["user", "assistant", "user"]
    assert found.text == LOOK + OBSERVED + "<think>b</think><answer>red</answer>"
    assert reward(found.text, "red") == pytest.approx(2.0)


def test_turns_end():
    endless = Scripted(*[LOOK] * 9)
    assert len(rollout(endless, Processor(endless), PICTURE, "which?", turns=3).crops) == 2
    refused = Scripted(LOOK.replace("40, 40", "9, 9"), "red")
    found = rollout(refused, Processor(refused), PICTURE, "which?")
    assert (len(found.turns), found.crops) == (1, [])


def test_a_step_makes_the_better_answer_likelier():
    torch.manual_seed(0)
    model, processor = zoo.load("describer")
    draws = [rollout(model, processor, PICTURE, "what is there?", prompt="", length=3) for _ in range(2)]
    assert not draws[0].crops
    other = Turn(draws[0].turns[0].inputs, (draws[0].turns[0].ids + 1) % 50, "")
    trajectories, group = [draws[0], Trajectory([other])], torch.zeros(2, dtype=torch.long)
    before = [float(likelihood(model, of.turns[0]).sum().detach()) for of in trajectories]
    optimiser = torch.optim.SGD(model.parameters(), 1e-3)
    train_step(model, optimiser, trajectories, torch.tensor([0.0, 1.0]), group)
    after = [float(likelihood(model, of.turns[0]).sum().detach()) for of in trajectories]
    assert after[1] > before[1]
    assert after[0] < before[0]


def test_likelihood_is_of_what_was_drawn():
    model, processor = zoo.load("describer")
    (turn,) = rollout(model, processor, PICTURE, "what is there?", prompt="", length=4).turns
    logits = model.generate(  # type: ignore[operator]
        **turn.inputs, max_new_tokens=4, return_dict_in_generate=True, output_logits=True
    ).logits
    expected = torch.stack([x[0].log_softmax(-1)[i] for x, i in zip(logits, turn.ids)])
    torch.testing.assert_close(likelihood(model, turn).detach(), expected, rtol=1e-3, atol=1e-4)


def test_selection():
    rights = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0]])
    assert selected(rights, torch.tensor([True, True, True, False])).tolist() == [True, False, False, False]


def test_refusals():
    model, tokenizer = zoo.load("reader")
    with pytest.raises(ValueError, match=r"a vision-language model with a chat template; .* comes with"):
        rollout(model, tokenizer, PICTURE, "what?")
    with pytest.raises(ValueError, match=r"got \[2\] and \[3\]"):
        group_advantages(torch.zeros(2), torch.zeros(3))
    assert module.deepeyes(PICTURE, "what is there?", prompt="", length=1).crops == []


def test_a_box_that_is_not_finite_is_refused_by_the_tool():
    for box in ("[NaN, 0, 40, 40]", "[0, 0, Infinity, 40]", "[0, 0, 1e999, 40]"):
        asked = called(f'<tool_call>{{"bbox_2d": {box}}}</tool_call>')
        assert asked is not None
        assert zoom(PICTURE, asked) is None
    assert called(f'<tool_call>{{"bbox_2d": [0, 0, 1{"0" * 400}, 40]}}</tool_call>') is None


def test_rewards_may_be_whole_numbers():
    found = group_advantages(torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 0, 0]))
    torch.testing.assert_close(found, group_advantages(torch.tensor([1.0, 0, 1, 0]), torch.zeros(4).long()))
