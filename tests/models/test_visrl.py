"""VisRL: pairs and losses by hand, boxes drawn anew, what each step's gradient touches, and a model of the zoo."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import regard
from regard import zoo
from regard.models._boxes import iou
from regard.models.visrl import (
    BoxPolicy,
    LookThenAnswer,
    Pairs,
    PolicyConfig,
    bad_box,
    crop,
    dpo,
    look,
    preference_pairs,
    spoken,
    step_dpo,
    visrl,
    written_box,
)

NAN = math.nan


class Reader(nn.Module):
    """Two answers, by the mean of a crop."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(3, 2)

    def forward(self, pictures, crops, questions):
        return self.read(crops.mean((2, 3)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def built(**sizes) -> LookThenAnswer:
    return visrl(Reader(), questions=3, size=8, **{"side": 4, "dim": 8, "heads": 2, "layers": 1, **sizes})


def pairs(n: int = 3) -> Pairs:
    chosen, rejected = torch.arange(n), torch.arange(n) + 5
    said = torch.zeros(n, dtype=torch.long)
    return Pairs(torch.rand(n, 3, 32, 32), torch.arange(n) % 3, (chosen, said), (rejected, said + 1))


@pytest.mark.parametrize(
    ("answers", "crops", "expected"),
    [
        ((0.9, 0.1), (0.8, 0.2), (0, 1)),
        ((0.9, 0.1), (0.5, 0.1), None),  # the best answer without the crop for it
        ((0.9, 0.1), (0.9, 0.3), None),  # the worst one with it
        ((0.7, 0.1), (0.9, 0.1), None),
        ((0.9, 0.3), (0.9, 0.1), None),
        ((0.9, 1.0, 0.0, 1.0), (0.9, 0.5, 0.0, 0.9), (3, 2)),  # the first of the highest whose crop is good
        ((0.8, 0.2, 0.2, NAN), (0.9, 0.9, 0.2, 0.9), (0, 2)),
        ((NAN, 0.2), (0.9, 0.1), None),
        ((0.9, 0.1), (NAN, 0.1), None),
        ((NAN, NAN), (0.9, 0.1), None),
    ],
)
def test_pairs_by_hand(answers, crops, expected):
    chosen, rejected, there = preference_pairs(torch.tensor([answers]), torch.tensor([crops]))
    assert bool(there) == (expected is not None)
    if expected:
        assert (int(chosen), int(rejected)) == expected


def test_questions_are_judged_alone_and_there_may_be_none():
    answers, crops = torch.rand(40, 6).round(), torch.rand(40, 6).round()
    whole = preference_pairs(answers, crops)
    assert 0 < whole.there.sum() < 40
    for i in range(40):
        one = preference_pairs(answers[i : i + 1], crops[i : i + 1])
        assert one.there[0] == whole.there[i]
        assert one.chosen[0] == whole.chosen[i]
    assert preference_pairs(torch.rand(0, 6), torch.rand(0, 6)).there.shape == (0,)


def test_thresholds_do_something():
    answers, crops = torch.tensor([[0.7, 0.3]]), torch.tensor([[0.7, 0.3]])
    assert not preference_pairs(answers, crops).there
    assert preference_pairs(answers, crops, high=0.7, low=0.3).there


def test_a_bad_box_stays_apart_and_is_about_as_large():
    draws, good = np.random.default_rng(0), (0.3, 0.4, 0.6, 0.6)
    for _ in range(200):
        left, top, right, bottom = bad_box(good, (0.31, 0.4, 0.6, 0.6), draws)
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        assert right <= 0.3 or left >= 0.6 or bottom <= 0.4 or top >= 0.6
        assert 0.3 * 0.3 <= right - left <= 0.3 * 1.9
        assert 0.2 * 0.3 <= bottom - top <= 0.2 * 1.9
    kept = 0.59, 0.4, 0.9, 0.6  # overlap of 0.017
    assert bad_box(good, kept, draws) == kept
    assert bad_box(good, kept, draws, most=0.0) != kept
    with pytest.raises(ValueError, match="in 100 tries, no box"):
        bad_box((0, 0, 1, 1), (0, 0, 1, 1), draws)
    for wrong in ((0.5, 0.5, 0.5, 0.9), (0.5, 0.5, NAN, 0.9), (0.1, 0.2, 0.3)):
        with pytest.raises(ValueError, match="with an area"):
            bad_box(good, wrong, draws)


def test_loss_by_hand():
    found = dpo(*torch.tensor([[-1.0, -2.0], [-3.0, -2.0], [-2.0, -2.0], [-2.0, -2.0]]))
    torch.testing.assert_close(found, torch.tensor([math.log(1 + math.exp(-0.2)), math.log(2)]))
    # the start counts: what the model always preferred is no gain
    torch.testing.assert_close(dpo(*torch.tensor([[-1.0], [-9.0], [-1.0], [-9.0]])), torch.tensor([math.log(2)]))
    with pytest.raises(ValueError, match="beta is above 0"):
        dpo(*torch.zeros(4, 1), beta=0.0)


def test_at_the_start_the_loss_is_ln_2_and_a_step_lowers_it():
    model, of = built(), pairs()
    start = copy.deepcopy(model)
    assert float(step_dpo(model, start, of).detach()) == pytest.approx(math.log(2))
    optimiser = torch.optim.SGD(model.parameters(), 1.0)
    for _ in range(3):
        optimiser.zero_grad()
        step_dpo(model, start, of, steps=("box",)).backward()
        optimiser.step()
    assert all(p.grad is None for p in start.parameters())
    assert float(step_dpo(model, start, of, steps=("box",)).detach()) < math.log(2) - 1e-3
    gained = [
        now - then
        for now, then in zip(
            model.log_probabilities("box", of.pictures, of.questions, (of.chosen, of.rejected)),
            start.log_probabilities("box", of.pictures, of.questions, (of.chosen, of.rejected)),
            strict=True,
        )
    ]
    assert (gained[0] > gained[1]).all()


def test_steps_touch_what_they_are_of_and_count_alike():
    model, of = built(), pairs()
    start = copy.deepcopy(model)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    losses = {}
    for step, touched, other in (("box", model.policy, model.reader), ("answer", model.reader, model.policy)):
        model.zero_grad()
        losses[step] = step_dpo(model, start, of, steps=(step,))
        losses[step].backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in touched.parameters())
        assert all(p.grad is None for p in other.parameters())
    both = step_dpo(model, start, of)
    torch.testing.assert_close(both, (losses["box"] + losses["answer"]) / 2)
    assert not torch.allclose(losses["box"], losses["answer"])


def test_an_answer_is_scored_with_its_own_crop():
    model, of = built(), pairs()
    chosen, rejected = model.log_probabilities("answer", of.pictures, of.questions, (of.chosen, of.rejected))
    for found, (place, said) in ((chosen, of.chosen), (rejected, of.rejected)):
        logits = model.reader(of.pictures, crop(of.pictures, model.policy.places[place], 8), of.questions)
        torch.testing.assert_close(found, logits.log_softmax(-1)[torch.arange(3), said])
    assert not torch.allclose(chosen.exp() + rejected.exp(), torch.ones(3))  # as they would with one crop


def test_crops_are_the_pixels():
    pictures = torch.rand(2, 3, 32, 32)
    boxes = torch.tensor([[0.0, 0.25, 0.25, 0.5], [0.75, 0.0, 1.0, 0.25]])
    expected = torch.stack([pictures[0, :, 8:16, :8], pictures[1, :, :8, 24:]])
    torch.testing.assert_close(crop(pictures, boxes, 8), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="with an area"):
        crop(pictures, torch.tensor([[0.5, 0.5, 0.5, 1.0]] * 2), 8)


def test_attempts_look_elsewhere_the_second_time():
    model, pictures, questions = built(), torch.rand(50, 3, 32, 32), torch.arange(50) % 3
    with torch.no_grad():
        model.policy.score[1].weight.mul_(200)  # sure of one place, so that both would be the same
    model.train()
    state = torch.get_rng_state()
    place, said = model.attempts(pictures, questions, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert place.shape == said.shape == (50, 6)
    assert int(said.max()) == 1
    assert int(said.min()) == 0
    good, bad = model.policy.places[place.view(50, 3, 2)].unbind(2)
    assert (iou(good[..., None, :], bad[..., None, :]) <= 0.05).all()
    again = model.attempts(pictures, questions, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again[0], place)
    assert torch.equal(again[1], said)
    assert model.attempts(pictures, questions, tries=1)[0].shape == (50, 2)
    cool = model.attempts(pictures, questions, temperature=0.01)[0][:, ::2]
    assert (cool == model(pictures, questions).place[:, None]).all()
    with pytest.raises(ValueError, match="some place lies apart"):
        built(side=2, crop=0.6).attempts(pictures, questions)


def test_rows_do_not_mix_and_questions_matter():
    model, pictures = built().eval(), torch.rand(4, 3, 32, 32)
    questions = torch.tensor([0, 1, 2, 0])
    whole = model.policy(pictures, questions)
    torch.testing.assert_close(whole[1:2], model.policy(pictures[1:2], questions[1:2]))
    assert not torch.allclose(whole, model.policy(pictures, questions.roll(1)), atol=1e-4)
    assert model(pictures[:0], questions[:0]).answers.shape == (0, 2)


def test_record_sees_the_policy_and_it_is_saved(tmp_path):
    policy = BoxPolicy(PolicyConfig(3, side=4, dim=8, heads=2)).eval()
    given = torch.rand(2, 3, 32, 32), torch.tensor([0, 2])
    with regard.record(policy, "entropy") as recording:
        policy(*given)
    (stack,) = recording.tree.children.values()
    assert dict(stack["entropy"].sizes) == {"batch": 2, "layer": 2, "head": 2, "query": 17}
    policy.save_pretrained(tmp_path)
    again = BoxPolicy.from_pretrained(tmp_path).eval()
    assert again.config == policy.config
    assert torch.equal(again(*given), policy(*given))


def test_a_box_in_words():
    assert written_box("the box is [0.25, 0, 1, .5].") == (0.25, 0.0, 1.0, 0.5)
    for text in ("no box", "[0.1, 0.2, 0.3]", "[0.1, 0.2, 0.1, 0.4]", "[0, 0, 20, 40]", "[a, b, c, d]"):
        assert written_box(text) is None


def test_a_chain_of_a_vision_language_model(monkeypatch):
    model, processor = zoo.load("describer")
    picture = Image.new("RGB", (64, 64), (200, 40, 40))
    one = look(model, processor, picture, "what is there?", prompt="", length=3)
    assert len(one.turns) == 1
    assert not one.crops
    (score,) = spoken(model, one.turns)
    assert float(score.detach()) < 0
    monkeypatch.setattr("regard.models.visrl.written_box", lambda text: (0.0, 0.5, 0.5, 1.0))
    two = look(model, processor, picture, "what is there?", prompt="", length=3)
    assert len(two.turns) == 2
    assert [of.size for of in two.crops] == [(32, 32)]
    later = processor.decode(two.turns[1].inputs["input_ids"][0], skip_special_tokens=True)
    assert later.count("what is there?") == 2  # asked again beside the crop


def test_refusals():
    model, of = built(), pairs()
    with pytest.raises(ValueError, match='steps are "box"'):
        step_dpo(model, model, of, steps=("boxes",))
    with pytest.raises(ValueError, match="there is no pair"):
        step_dpo(model, model, pairs(0))
    with pytest.raises(ValueError, match="are the same"):
        step_dpo(model, model, of._replace(rejected=of.chosen))
    with pytest.raises(ValueError, match=r"got \[2, 3\] and \[3, 2\]"):
        preference_pairs(torch.rand(2, 3), torch.rand(3, 2))
    with pytest.raises(ValueError, match=r"pictures are \[batch, 3, row, column\]"):
        model(torch.rand(2, 1, 32, 32), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="heads divide dim"):
        built(dim=9)


def test_scores_of_whole_numbers_and_of_another_scale():
    right, clear = torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 1]])
    assert preference_pairs(right, clear) == preference_pairs(right.float(), clear.float())
    for answers, crops in ((100.0 * right, clear), (right, -clear)):
        with pytest.raises(ValueError, match="scores are 0 to 1"):
            preference_pairs(answers, crops)


def test_questions_that_are_none():
    for wrong in (3, -1):
        with pytest.raises(ValueError, match="questions are 0 to 2"):
            built()(torch.rand(2, 3, 32, 32), torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match="heads divide dim"):
        built(heads=0)
