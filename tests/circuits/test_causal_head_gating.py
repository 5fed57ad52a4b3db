"""Gates under two pressures tell planted roles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regard.circuits import causal_head_gating as module
from regard.circuits.causal_head_gating import causal_head_gating
from regard.claims import _planted
from regard.claims._planted import INDUCTIVE, TELLING, WRONG


def roles(found):
    """role -> set of (layer, head)"""
    return {role: {(int(a), int(b)) for a, b in np.argwhere(found["role"].values == role)} for role in module.ROLES}


@pytest.fixture(scope="module")
def model():
    return _planted.planted()


def test_planted_roles_are_told(model):
    found = causal_head_gating(model, _planted.repeats(16).losses, steps=80)
    told = roles(found)
    assert told["facilitating"] == {*INDUCTIVE}
    assert told["interfering"] == {WRONG}
    assert found.attrs["open"] < found.attrs["whole"]  # without the head that interferes


def test_contrast_isolates_the_other_tasks_heads(model):
    task, other = _planted.repeats(16), _planted.questions(16)
    told = roles(causal_head_gating(model, task.losses, forget=other.losses, steps=80))
    assert told["facilitating"] - {WRONG} == {*INDUCTIVE}  # a wrong answer helps to unlearn
    assert {*TELLING} >= told["interfering"] - {WRONG} != set()  # one of the two shut is enough


def test_gates_that_no_loss_holds_follow_the_pressure(model):
    ids = _planted.repeats(2).ids

    def indifferent(model):
        model(ids)
        return torch.zeros(2)

    found = causal_head_gating(model, indifferent, steps=40)
    most = float(torch.sigmoid(torch.tensor(4.0)))
    assert found["open"].values == pytest.approx(most, abs=1e-6)
    assert found["shut"].values == pytest.approx(1 - most, abs=1e-6)
    assert found["irrelevant"].values == pytest.approx(most**2, abs=1e-6)
    assert (found["role"] == "irrelevant").all()


def test_unlearning_costs_what_is_left_of_the_probability():
    probability = torch.tensor([0.2, 0.9], dtype=torch.float64)
    assert module._unlearned(-probability.log()).tolist() == pytest.approx((-(1 - probability).log()).tolist())
    assert torch.isfinite(module._unlearned(torch.zeros(1))).all()


def test_the_same_seed_gives_the_same(model):
    task = _planted.repeats(4)
    first, again = (causal_head_gating(model, task.losses, steps=5, seed=3) for _ in range(2))
    assert first.identical(again)
    assert not first.equals(causal_head_gating(model, task.losses, steps=5, seed=4))


def test_bad_losses_are_named_and_the_model_is_left_as_it_was(model):
    task = _planted.repeats(4)
    model.train()
    model.lm_head.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    try:
        with pytest.raises(ValueError, match="the loss is nan"):
            causal_head_gating(model, lambda model: task.losses(model) * torch.nan, steps=2)
        with pytest.raises(ValueError, match="reduction='none'"):
            causal_head_gating(model, lambda model: task.losses(model).sum(), steps=2)
        with pytest.raises(ValueError, match="steps"):
            causal_head_gating(model, task.losses, steps=0)
        causal_head_gating(model, task.losses, steps=1)
        assert all(module.training for module in model.modules())
        assert flags == [p.requires_grad for p in model.parameters()]
        assert all(p.grad is None for p in model.parameters())
    finally:
        model.eval()
        model.requires_grad_(True)
