"""A captioner that attends: values by hand, limits, the hard way's gradient, and what `record` sees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import regard
from regard.models.show_attend_tell import Captioner, doubly_stochastic, show_attend_tell


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(**knobs) -> Captioner:
    return show_attend_tell(**{"words": 7, "dim": 5, "hidden": 6, "embedding": 4, "dropout": 0.0, **knobs})


def test_weights_by_hand():
    model = small(dim=1, width=1)
    with torch.no_grad():
        for layer in (model.place, model.state, model.score):
            layer.weight.zero_()
            layer.bias.zero_()
        grid = torch.tensor([[[1.0], [2.0]]])
        torch.testing.assert_close(model(grid, torch.zeros(1, 1).long()).weights, torch.full((1, 1, 2), 0.5))
        # scores 0 and log 3
        model.place.weight.fill_(1.0)
        model.place.bias.fill_(-1.0)
        model.score.weight.fill_(math.log(3) / math.tanh(1))
        found = model(grid, torch.zeros(1, 2).long())
    torch.testing.assert_close(found.weights[0, 0], torch.tensor([0.25, 0.75]))


def test_a_step_is_the_paper_s():
    model = small().double().eval()
    grid, word = torch.randn(1, 3, 5).double(), torch.tensor([[4]])
    h, c = model.first_hidden(grid.mean(1)).tanh(), model.first_cell(grid.mean(1)).tanh()
    scores = [model.score(torch.tanh(model.place(a) + model.state(h[0]))) for a in grid[0]]
    seen = (torch.stack(scores).softmax(0) * grid[0]).sum(0) * torch.sigmoid(model.gate(h[0]))
    y = model.embed.weight[4]
    h, c = model.lstm(torch.cat([y, seen])[None], (h, c))
    expected = model.word(torch.tanh(y + model.told(h[0]) + model.seen(seen)))
    torch.testing.assert_close(model(grid, word).logits[0, 0], expected)


def test_penalty_is_of_the_caption_s_words_only():
    weights = torch.tensor([[[0.25, 0.75]] * 4])
    assert float(doubly_stochastic(weights)) == pytest.approx(4)
    filled = torch.cat([weights, torch.rand(1, 3, 2)], 1)
    assert float(doubly_stochastic(filled, torch.arange(7)[None] < 4)) == pytest.approx(4)


@pytest.mark.parametrize("attention", ["soft", "hard"])
def test_filling_up_and_other_captions_change_nothing(attention):
    model = small(attention=attention).eval()
    grid, words = torch.randn(2, 9, 5), torch.tensor([[3, 2, 0], [5, 1, 6]])
    alone = model.loss(grid[:1], words[:1]) + model.loss(grid[1:], words[1:])
    if attention == "soft":
        torch.testing.assert_close(2 * model.loss(grid, words), alone)
        mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
        torch.testing.assert_close(model.loss(grid, F.pad(words, (0, 2), value=4), mask=mask), model.loss(grid, words))
    found = model(grid, model.given(words))
    torch.testing.assert_close(model(grid[1:], model.given(words[1:])).logits[0], found.logits[1])


def test_at_run_time_hard_looks_at_the_place_of_the_highest_weight():
    model = small(attention="hard").eval()
    grid, given = torch.randn(3, 9, 5), torch.randint(7, (3, 4))
    found = model(grid, given)
    assert torch.equal(found.looks.argmax(-1), found.weights.argmax(-1))
    assert torch.equal(found.looks.sum(-1), torch.ones(3, 4))
    # soft with a very high temperature is the same
    soft = small(temperature=1e6).eval()
    soft.load_state_dict(model.state_dict())
    torch.testing.assert_close(soft(grid, given).logits, found.logits, rtol=1e-4, atol=1e-5)


def test_reinforce_is_unbiased():
    """Mean over many draws of one word, against the gradient of the expected cost over both places."""
    model = small(attention="hard", mixing=0.0, entropy=0.0, reinforce=1.0).double().train()
    with torch.no_grad():
        model.baseline.fill_(1.5)
    count, words = 20_000, torch.tensor([[3]])
    grid = torch.randn(1, 2, 5).double()
    found = model(grid, model.given(words))
    costs = []
    for at in range(2):
        state = model._start(grid)
        logits, _ = model._step(
            grid, model.embed(model.given(words))[:, 0], F.one_hot(torch.tensor([at]), 2).double(), state
        )
        costs.append(F.cross_entropy(logits, words[0]).detach())
    expected = torch.autograd.grad((found.weights[0, 0] * torch.stack(costs)).sum(), model.score.weight)[0]
    many = model.loss(grid.expand(count, -1, -1), words.expand(count, -1))
    got = torch.autograd.grad(many, model.score.weight)[0] / count  # the words' own cost does not reach the scores
    torch.testing.assert_close(got, expected, rtol=0.1, atol=1e-3)
    assert float(expected.abs().max()) > 0.01
    mean = float((found.weights[0, 0].detach() * torch.stack(costs)).sum())
    assert float(model.baseline) == pytest.approx(0.9 * 1.5 + 0.1 * mean, abs=1e-3)


def test_entropy_is_raised_by_descent():
    model = small(attention="hard", mixing=1.0, entropy=1.0, reinforce=0.0)
    grid, words = torch.randn(4, 9, 5), torch.randint(7, (4, 3))

    def entropy():
        weights = model(grid, model.given(words)).weights
        return float(-(weights * weights.log()).sum(-1).mean().detach())

    before = entropy()
    descent = torch.optim.SGD([model.score.weight], 0.2)
    model.loss(grid, words).backward()
    descent.step()
    assert entropy() > before


def test_a_whole_batch_looks_softly_or_none():
    model = small(attention="hard").train()
    grid, given = torch.randn(16, 9, 5), torch.zeros(16, 2).long()
    kinds = set()
    for seed in range(20):
        found = model(grid, given, generator=torch.Generator().manual_seed(seed))
        single = (found.looks == 1).any(-1)
        assert single.all() or not single.any()
        kinds.add(bool(single.all()))
        again = model(grid, given, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(found.looks, again.looks)
    assert kinds == {True, False}


def test_gradients():
    model = small(words=3).double().eval()
    grid = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model.loss(x, torch.tensor([[1, 2], [2, 0]])), grid)


def test_generates_what_it_scores_highest_and_ends():
    model = small().eval()
    with torch.no_grad():
        model.word.bias[0] += 0.1
    grid = torch.randn(3, 9, 5)
    words, weights = model.generate(grid, 12)
    found = model(grid, model.given(words))
    for row, said in zip(words, found.logits.argmax(-1), strict=True):
        end = (row == 0).nonzero()[:1, 0].tolist() or [len(row) - 1]
        assert torch.equal(row[: end[0] + 1], said[: end[0] + 1])
        assert not row[end[0] + 1 :].any()
    torch.testing.assert_close(weights[:, 0], found.weights[:, 0])


def test_record_sees_words_look_at_places():
    model = small().eval()
    grid, given = torch.randn(2, 9, 5), torch.randint(7, (2, 4))
    with torch.no_grad(), regard.record(model, "rows", "entropy") as recording:
        found = model(grid, given)
    (stack,) = (node for node in recording.tree.subtree if "rows" in node)
    assert dict(stack["entropy"].sizes) == {"batch": 2, "layer": 1, "head": 1, "query": 4}
    np.testing.assert_allclose(np.asarray(stack["rows"]).reshape(2, 4, 9), found.weights, rtol=1e-5, atol=1e-6)


def test_saved_and_loaded(tmp_path):
    model = small(attention="hard").eval()
    model.save_pretrained(tmp_path)
    again = Captioner.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    grid, given = torch.randn(1, 4, 5), torch.tensor([[0, 3]])
    assert torch.equal(again(grid, given).logits, model(grid, given).logits)


def test_refusals():
    model = small(attention="hard").train()
    with pytest.raises(ValueError, match=r"takes \[batch, place, 5\].*got \[2, 9, 6\]"):
        model(torch.randn(2, 9, 6), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match="words are numbers"):
        model(torch.randn(2, 9, 5), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="a mask is boolean"):
        model.loss(torch.randn(2, 9, 5), torch.zeros(2, 3).long(), mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="attention='both'"):
        small(attention="both")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="give generator="):
            model(torch.randn(2, 9, 5), torch.zeros(2, 3).long())
    finally:
        torch.use_deterministic_algorithms(False)


def test_refusals_of_ways_and_of_nothing():
    for knob in ("activation", "initial"):
        with pytest.raises(ValueError, match=f"{knob}='gelu'"):
            small(**{knob: "gelu"})
    with pytest.raises(ValueError, match="one or more"):
        small()(torch.randn(2, 9, 5), torch.zeros(2, 0).long())
    with pytest.raises(ValueError, match="length=0"):
        small().generate(torch.randn(2, 9, 5), 0)
