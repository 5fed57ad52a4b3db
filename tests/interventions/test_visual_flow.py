"""Attention given back by hand, curves of tokens over layers, and in which models."""

from __future__ import annotations

import pytest
import torch
from pictured import KINDS, as_alone, call, deep, logits

from regard.interventions.visual_flow import (
    Flow,
    Relay,
    flowing,
    inactive,
    snowballing,
    spread_evenly,
    unimodal,
    visual_flow,
)
from regard.kernels import Factor

ROW = torch.tensor([0.2, 0.1, 0.1, 0.2, 0.4])  # system, active twice, inactive, instruction
IMAGE = [False, True, True, True, False]
FLOW = Flow(*(torch.tensor([[i in some for i in range(5)]]) for some in ((1, 2), (3,), (4,))))


def moved(deep, row=ROW, **knobs):
    method = visual_flow(**{"flow": FLOW, "tau": 1.0, **knobs})
    method._layers = {2: deep}
    of = call(row[None, None], IMAGE)
    changed = method.inputs(of)
    if method.where(of):
        return method.weights(changed, changed.weights.dense(), range(1))[0, 0, 0]
    return changed.weights.dense()[0, 0, 0]


def test_middle_layers_give_to_active_tokens_and_deep_ones_to_the_instruction():
    assert torch.allclose(moved(False), torch.tensor([0.2, 0.13, 0.13, 0.18, 0.36]), atol=1e-6)
    assert torch.allclose(moved(True), torch.tensor([0.2, 0.07, 0.07, 0.14, 0.52]), atol=1e-6)
    even = moved(False, spread="even")  # the system's key takes its part too
    assert torch.allclose(even, torch.tensor([0.22, 0.12, 0.12, 0.18, 0.36]), atol=1e-6)


def test_scores_are_divided_by_tau_before_softmax():
    sharp = ROW ** (1 / 0.5)
    assert torch.allclose(moved(False, tau=0.5, alpha_middle=0.0), sharp / sharp.sum(), atol=1e-6)
    assert torch.allclose(moved(True, tau=0.5, alpha_deep=0.0), ROW, atol=1e-6)  # in middle layers only
    twice = Factor(torch.full((1, 1, 1), 2.0).log(), torch.tensor([[[0.0, 1, 0, 0, 0]]]))  # what others made of scores
    method = visual_flow(flow=FLOW, tau=0.5, alpha_middle=0.0)
    method._layers = {2: False}
    of = call(ROW[None, None], IMAGE).scaled(twice)
    sharp = (ROW * torch.tensor([1.0, 2, 1, 1, 1])) ** 2
    assert torch.allclose(method.inputs(of).weights.dense()[0, 0, 0], sharp / sharp.sum(), atol=1e-6)


def test_without_active_tokens_nothing_is_moved():
    nobody = Flow(torch.zeros_like(FLOW.active), FLOW.active | FLOW.inactive, FLOW.instruction)
    assert torch.allclose(moved(False, flow=nobody), ROW)
    assert torch.allclose(moved(False, torch.tensor([0.2, 0.0, 0.0, 0.4, 0.4])), torch.tensor([0.2, 0, 0, 0.4, 0.4]))
    none = torch.zeros(1, 5, dtype=torch.bool)
    assert torch.equal(spread_evenly(ROW[None], FLOW.inactive, none, 0.5), ROW[None])


def test_curves_over_layers():
    curves = torch.tensor([[0.0, 0.9, 0.1, 0.1], [0.2, 0.5, 0.1, 0.2], [0.9, 0.3, 0.1, 0.1], [0.3, 0.2, 0.1, 0.2]])
    assert unimodal(curves).tolist() == [True, False, False, False]
    assert not unimodal(torch.tensor([[0.0, 1.0], [0.2, 0.9], [0.25, 0.8], [0.1, 0.7]]))[0]  # below 0.3 of the largest
    assert not unimodal(torch.tensor([[0.5], [0.2], [0.9], [0.3]]))[0]  # two peaks
    low = torch.tensor([[0.1, 0.5, 0.5, 0.5, 0.5], [0.1, 0.5, 0.4, 0.5, 0.5]])
    assert inactive(low).tolist() == [True, False, False, False, False]
    assert not inactive(torch.tensor([[0.1, 0.5, 0.5, 0.5, 0.5], [0.01, 0.5, 0.4, 0.5, 0.5]]))[0]  # it moves too much


def test_relay_tokens_see_the_instruction():
    torch.manual_seed(0)
    block = Relay(8, heads=2).eval()
    relay, words = torch.randn(1, 2, 8), torch.randn(1, 3, 8)
    assert block(relay, words).shape == (1, 2, 8)
    assert not torch.allclose(block(relay, words), block(relay, -words))
    block(relay, words).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    with pytest.raises(ValueError, match="cannot have 3 heads"):
        Relay(8, heads=3)


def test_scores_of_a_chain():
    assert snowballing([2], turns=4) == 50
    assert snowballing([0, 4], turns=4) == pytest.approx(50)
    assert snowballing([4], turns=4) == pytest.approx(88.0797)
    assert snowballing([], turns=4) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_as_alone(kind):
    as_alone(kind, visual_flow.fit)


def test_it_refuses():
    model, inputs = deep("llava")
    fitted = visual_flow.fit(model, inputs)
    n = fitted.flow.active.sum() + fitted.flow.inactive.sum()
    assert int(n) == 32
    assert not (fitted.flow.active & fitted.flow.inactive).any()
    with pytest.raises(ValueError, match="padded on the right"):
        flowing(model, inputs | {"attention_mask": inputs["attention_mask"].flip(1)})
    with pytest.raises(ValueError, match="row 1 of the inputs has no picture"):
        flowing(model, inputs | {"input_ids": torch.cat([inputs["input_ids"][:1], torch.full((1, 27), 5)])})
    with pytest.raises(ValueError, match="alpha_deep is a share"):
        visual_flow(flow=fitted.flow, alpha_deep=2)
    with pytest.raises(ValueError, match="a temperature"):
        visual_flow(flow=fitted.flow, tau=0)
    with pytest.raises(ValueError, match="'share' or 'even'"):
        visual_flow(flow=fitted.flow, spread="all")

    class Edits:
        def weights(self, call, weights, rows):
            return weights

    with pytest.raises(ValueError, match="known by weights only"):
        logits(model, inputs, Edits(), fitted)
