"""A codebook between view and policy: values by hand, the rank of what passes, variants, and the agent around it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import regard
from regard.models.selective_codebook import Codebook, GoalAgent, selective_codebook

SIZES = {"channels": 6, "places": 4, "goals": 3, "hidden": 10, "codes": 12, "dim": 3, "wide": 8, "narrow": 5}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_by_hand():
    book = Codebook(2, codes=2, dim=1, dropout=0.0)
    with torch.no_grad():
        book.score.weight.copy_(torch.eye(2))
        book.score.bias.zero_()
        book.codes.copy_(torch.tensor([[0.0], [4.0]]))
        book.up.weight.copy_(torch.tensor([[1.0], [2.0]]))
        book.up.bias.copy_(torch.tensor([0.0, 1.0]))
    # the relu takes -5 to 0; weights 1/4 and 3/4, so the code is 3
    output, weights = book(torch.tensor([[-5.0, math.log(3)]]))
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(output, torch.tensor([[3.0, 7.0]]))


def test_scores_of_zero_give_the_mean_code():
    book = Codebook(8, codes=5, dim=3).eval()
    nn.init.zeros_(book.score.weight)
    nn.init.zeros_(book.score.bias)
    expected = book.up(book.codes.mean(0)).expand(4, -1)
    torch.testing.assert_close(book(torch.randn(4, 8))[0], expected)


def test_top():
    every, kept = Codebook(8, codes=6, dim=3).eval(), Codebook(8, codes=6, dim=3, index="top", top=6).eval()
    kept.load_state_dict(every.state_dict())
    x = torch.randn(3, 8)
    torch.testing.assert_close(kept(x)[0], every(x)[0])
    kept.top = 2
    weights = kept(x)[1]
    assert ((weights > 0).sum(-1) == 2).all()
    torch.testing.assert_close(weights.sum(-1), every(x)[1].topk(2).values.sum(-1))  # as they were, below 1


def test_outputs_span_no_more_than_the_codes():
    book = Codebook(20, codes=16, dim=3).double().eval()
    outputs = book(5 * torch.randn(50, 20).double())[0] - book.up.bias
    assert int(torch.linalg.matrix_rank(outputs)) == 3


@pytest.mark.parametrize(("kind", "learns"), [("learned", True), ("random", False), ("binary", False)])
def test_codes_are_learned_or_stay(kind, learns):
    book = Codebook(8, codes=6, dim=3, kind=kind)
    book(torch.randn(3, 8))[0].square().sum().backward()
    assert (book.codes.grad is not None) == learns
    assert book.score.weight.grad.any()
    assert (set(book.book.unique().tolist()) == {-1.0, 1.0}) == (kind == "binary")


def test_dropout_is_of_weights():
    book = Codebook(8, codes=400, dim=3, dropout=0.25).train()
    x = torch.randn(1, 8)
    dropped, whole = book(x)[1], book.eval()(x)[1]
    gone = dropped == 0
    assert 0.15 < float(gone.float().mean()) < 0.35
    torch.testing.assert_close(dropped[~gone], whole[~gone] / 0.75)


def test_hard_draws_take_one_code_and_train():
    book = Codebook(8, codes=6, dim=3, index="gumbel", dropout=0.0)
    output, weights = book(torch.randn(5, 8))
    torch.testing.assert_close(weights.sort(-1).values, torch.tensor([0.0] * 5 + [1.0]).expand(5, -1))
    output.square().sum().backward()
    assert book.score.weight.grad.any()


def test_gradients():
    book = Codebook(4, codes=5, dim=2).double().eval()
    x = torch.rand(2, 4, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(lambda x: book(x)[0], x.requires_grad_())


def test_the_agent_remembers_until_it_starts_anew():
    agent = selective_codebook(**SIZES).eval()
    view, goal, last = torch.randn(2, 5, 6, 4), torch.tensor([0, 2]), torch.randint(7, (2, 5))
    whole = agent(view, goal, last)
    first = agent(view[:, :3], goal, last[:, :3])
    rest = agent(view[:, 3:], goal, last[:, 3:], first.state)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole.logits)
    starts = torch.zeros(2, 5, dtype=torch.bool)
    starts[:, 3] = True
    anew = agent(view, goal, last, starts=starts)
    torch.testing.assert_close(anew.logits[:, 3:], agent(view[:, 3:], goal, last[:, 3:]).logits)
    torch.testing.assert_close(agent(view[1:], goal[1:], last[1:]).values[0], whole.values[1])


def test_all_that_the_policy_sees_passes_the_codebook():
    agent = selective_codebook(**SIZES).eval()
    nn.init.zeros_(agent.codebook.up.weight)
    goal, last = torch.tensor([0]), torch.zeros(1, 3).long()
    torch.testing.assert_close(*(agent(torch.randn(1, 3, 6, 4), goal, last).logits for _ in range(2)))
    plain = selective_codebook(**{**SIZES, "codes": 0})
    assert plain.codebook is None
    assert plain(torch.randn(1, 3, 6, 4), goal, last).weights is None


def test_record_sees_steps_look_at_codes():
    agent = selective_codebook(**SIZES).eval()
    view, goal, last = torch.randn(2, 5, 6, 4), torch.tensor([0, 2]), torch.zeros(2, 5).long()
    with torch.no_grad(), regard.record(agent, "rows") as recording:
        found = agent(view, goal, last)
    (rows,) = (node["rows"] for node in recording.tree.subtree if "rows" in node)
    np.testing.assert_allclose(np.asarray(rows).reshape(2, 5, 12), found.weights, rtol=1e-5, atol=1e-7)


def test_saved_and_loaded(tmp_path):
    agent = selective_codebook(**SIZES).eval()
    agent.save_pretrained(tmp_path)
    given = torch.randn(1, 2, 6, 4), torch.tensor([1]), torch.zeros(1, 2).long()
    assert torch.equal(GoalAgent.from_pretrained(tmp_path).eval()(*given).logits, agent(*given).logits)


def test_refusals():
    with pytest.raises(ValueError, match="keeps 1 to 8 codes; got top=16"):
        Codebook(4, codes=8, index="top")
    with pytest.raises(ValueError, match="kind learned, random or binary; got 'softmax', 'fixed'"):
        Codebook(4, kind="fixed")
    with pytest.raises(ValueError, match=r"takes \[..., 4\]; got \[2, 5\]"):
        Codebook(4)(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"views are \[batch, step, 6, 4\], of one step or more; got \[2, 6, 4\]"):
        selective_codebook(**SIZES)(torch.randn(2, 6, 4), torch.zeros(2).long(), torch.zeros(2, 1).long())
    with pytest.raises(ValueError, match="of one step or more"):
        selective_codebook(**SIZES)(torch.randn(2, 0, 6, 4), torch.zeros(2).long(), torch.zeros(2, 0).long())
