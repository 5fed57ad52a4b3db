"""Gaze shifts by hand, what they raise, and in which models."""

from __future__ import annotations

import pytest
import torch
from pictured import KINDS, alone, as_alone, call, deep, logits

import regard
from regard.interventions.act import act
from regard.interventions.gift import Gaze, asked, enhanced, gaze_shifts, gift, shifts, spoken, stretched, words

IMAGE = [True, True, True, False, False, False]
QUESTION = [False, False, False, True, True, False]
ROW = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.2, 0.3])


def of_call(method, weights):
    method._layers = {2}
    return method.inputs(call(weights, IMAGE)).weights.dense()[0]


def test_the_picture_is_raised_by_its_saliency_and_the_question_by_as_much():
    gaze = Gaze(torch.tensor([[0.0, 1 / 3, 1.0, 0, 0, 0]]), torch.tensor([QUESTION]))
    other = torch.tensor([0.0, 0, 0, 0, 0, 1])  # a head that looks at neither
    weights = torch.stack([ROW, other])[:, None].expand(2, 3, 6)
    found = of_call(gift(gaze=gaze), weights)
    assert torch.allclose(found[0, 2], torch.tensor([0.00275, 0.01455, 0.40775, 0.28336, 0.28336, 0.00824]), atol=1e-5)
    assert torch.allclose(found[1, 2], other)
    assert torch.allclose(found[:, :2], weights[:, :2])  # only the last query
    half = of_call(gift(gaze=gaze, beta=0.5), weights)[0, 2]
    assert torch.allclose(half[3] / half[5], 0.5 * found[0, 2, 3] / found[0, 2, 5], rtol=1e-4)
    assert torch.allclose(half[2] / half[5], found[0, 2, 2] / found[0, 2, 5], rtol=1e-4)


def test_shifts_are_gains_of_content_words_in_the_better_half_of_the_heads():
    """The first key is a sink: it always has 0.5. The second gains at the first word, the third at the next."""
    rows = torch.tensor([[0.5, 0.1, 0.1, 0.3], [0.5, 0.4, 0.0, 0.1], [0.5, 0.0, 0.3, 0.2]])
    weights = torch.stack([rows, rows[:1].expand(3, 4)])[None]  # the second head never moves
    image = torch.tensor([[True, True, True, False]])
    mean, total = shifts(weights, torch.tensor([[True, True]]), image)
    assert torch.allclose(mean, torch.tensor([[0.0, 0.15, 0.15, 0.0]]))
    assert torch.allclose(total, torch.tensor([0.6]))
    mean, _ = shifts(weights, torch.tensor([[True, False]]), image)
    assert torch.allclose(mean, torch.tensor([[0.0, 0.3, 0.0, 0.0]]))
    mean, _ = shifts(weights, torch.tensor([[True, False]]), image, static=True)
    assert torch.allclose(mean, torch.tensor([[0.5, 0.4, 0.0, 0.0]]))


def test_saliency_is_cut_and_stretched():
    image = torch.tensor([[True, True, True, False]])
    assert torch.allclose(stretched(torch.tensor([[0.0, 1, 3, 9]]), image), torch.tensor([[0, 1 / 3, 1, 0]]))
    assert torch.equal(stretched(torch.ones(1, 4), image), torch.zeros(1, 4))
    far = torch.zeros(1, 101)
    far[0, -1], far[0, 0] = 1.0, 0.2
    found = stretched(far, torch.ones(1, 101, dtype=torch.bool))
    spread = far.mean() + 3 * far.std()
    assert torch.allclose(found[0, 0], 0.2 / spread)


def test_the_papers_layers():
    assert enhanced(range(32)) == list(range(12, 23))
    assert enhanced(range(2)) == [1]


def test_the_question_is_what_stands_between_picture_and_answer():
    model, processor = regard.load("describer")
    from regard.zoo.recipes.describer import asked as prompts
    from regard.zoo.recipes.describer import pictures, tempting

    inputs = prompts(processor, pictures(tempting(2)), ["what colour is the plate?", "describe"])
    question = asked(model, inputs, processor)
    content = spoken(inputs, processor, question)
    said = [processor.decode(ids[some]) for ids, some in zip(inputs["input_ids"], question)]
    assert said == ["what colour is the plate?", "describe"]
    said = [processor.decode(ids[some]).strip(" ?") for ids, some in zip(inputs["input_ids"], content)]
    assert said == ["colour plate", "describe"]
    assert words([" a", " pl", "ate"]) == [[0], [1, 2]]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_as_alone(kind):
    as_alone(kind, gift.fit)


def test_it_composes_and_refuses():
    model, inputs = deep("llava")
    thing, sinks = gift.fit(model, inputs), act(heads=[(2, 1), (3, 0)], threshold=0.02, beta=0.2)
    ways = [logits(model, inputs, *things) for things in ((thing,), (sinks,), (thing, sinks))]
    assert not torch.allclose(ways[0], ways[2], atol=1e-4)
    assert not torch.allclose(ways[1], ways[2], atol=1e-4)
    with pytest.raises(ValueError, match="padded on the right"):
        gaze_shifts(model, inputs | {"attention_mask": inputs["attention_mask"].flip(1)})
    none = inputs["input_ids"].clone()
    none[1, none[1] == 98] = 7
    with pytest.raises(ValueError, match="row 1 of the inputs has no picture"):
        gaze_shifts(model, inputs | {"input_ids": none})
    with pytest.raises(ValueError, match="no question after its picture"):
        gaze_shifts(model, {n: v[:, :19] if v.ndim == 2 else v for n, v in inputs.items()})
    three = {n: torch.cat([v, v[:1]]) for n, v in inputs.items()}
    with pytest.raises(ValueError, match="a batch of 2, and the model reads 3 rows"):
        logits(model, three, thing)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration has no layer 9"):
        gift(gaze=thing.gaze, among=[9]).begin(model)
    with pytest.raises(ValueError, match="alpha is 0 or more"):
        gift(gaze=thing.gaze, alpha=-1)
    assert alone(inputs, 0)["input_ids"].shape[1] == inputs["input_ids"].shape[1] - 1
