"""Two mechanisms and their switch: values by hand, what sleeps stays asleep, frames, gradients and refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import regard
from regard.models._relations import Mixed, RelationAttention
from regard.models.persistent_transient import PersistentTransient, distance, persistent_transient


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def scene(batch: int = 2, people: int = 2, things: int = 3, steps: int = 5, joints: int = 2, corners: int = 1):
    human = torch.rand(batch, people, steps, joints, 2)
    return human, torch.rand(batch, things, steps, corners, 2)


def both(**knobs) -> PersistentTransient:
    return persistent_transient(**{"dim": 2, "joints": 2, "width": 8, "aware": 2.0, "reach": 0.5, **knobs})


def test_attention_by_hand():
    attention = RelationAttention(1, 1)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
        attention.send.weight.fill_(2.0)
        attention.receive.weight.fill_(1.0)
        senders, receivers = torch.tensor([[[0.5], [math.log(3) / 2]]]), torch.tensor([[[-1.0]]])
        torch.testing.assert_close(attention(receivers, senders).weights.flatten(), torch.tensor([0.5, 0.5]))  # no MLP
        attention.score[0].weight.copy_(torch.tensor([[1.0, 1.0]]))
        attention.score[2].weight.fill_(1.0)
        # sent: 1 and log 3; asked: -1, so that scores are relu(1 - 1) and relu(log 3 - 1)
        odds = 3 / math.e
        want = torch.tensor([1, odds]) / (1 + odds)
        found = attention(receivers, senders)
        torch.testing.assert_close(found.weights.flatten(), want)
        torch.testing.assert_close(found.message.flatten(), (want * torch.tensor([1.0, math.log(3)])).sum()[None])
        attention.score[2].weight.fill_(-1.0)  # the last layer's ReLU leaves nothing of what is below zero
        torch.testing.assert_close(attention(receivers, senders).weights.flatten(), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("heads", [1, 2])
def test_who_is_not_heard_does_not_matter(heads):
    attention, receivers, senders = RelationAttention(6, 4, heads=heads), torch.randn(2, 3, 6), torch.randn(2, 5, 6)
    mask = torch.rand(2, 3, 5) > 0.5
    mask[0, 0] = False
    mask[1, 1] = torch.tensor([True, True, False, False, False])
    found = attention(receivers, senders, mask)
    assert not found.message[0, 0].any()
    torch.testing.assert_close(found.message[1, 1], attention(receivers[1:, 1:2], senders[1:, :2]).message[0, 0])
    torch.testing.assert_close(found.weights.sum(-1), mask.any(-1)[:, None].float().expand(-1, heads, -1))
    order = torch.randperm(5)
    torch.testing.assert_close(attention(receivers, senders[:, order], mask[..., order]).message, found.message)


def test_relations_are_weighed_by_the_mean_over_nodes():
    mixed, first, second = Mixed(4), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for i in range(2):
        scores = torch.stack([mixed.weigh(mixed.project(m[i]).tanh()).mean() for m in (first, second)])
        a, b = scores.softmax(0)
        torch.testing.assert_close(mixed(first, second)[i], a * first[i] + b * second[i])
    torch.testing.assert_close(mixed(first, first), first)


def test_the_switch_by_hand():
    model = both()
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.zero_()
        model.memory[2].bias.fill_(math.log(9))  # 0.9
    score, label = model.switched(torch.tensor([[0.5, 0.7]]), torch.zeros(1, 2, 8))
    torch.testing.assert_close(score, torch.tensor([[0.9 * math.exp(-0.5), 0.9 * math.exp(-0.7)]]))
    assert label.bool().tolist() == [[True, False]]
    label.sum().backward()
    want = -2 * 0.9 * (0.5 * math.exp(-0.5) + 0.7 * math.exp(-0.7))  # beta is 1
    torch.testing.assert_close(model.beta.grad, torch.tensor(want))
    for kind, labels in (("distance", [[True, False]]), ("memory", [[True, True]]), ("rule", [[False, False]])):
        model.config = replace(model.config, switch=kind, reach=0.4)
        assert model.switched(torch.tensor([[0.5, 0.7]]), torch.zeros(1, 2, 8))[1].bool().tolist() == labels


def test_distances_are_to_the_box_around_a_person():
    human = torch.tensor([[[[0.0, 0.0], [2.0, 1.0]]]])
    objects = torch.tensor([[[[1.0, 0.5]], [[5.0, 5.0]], [[-1.0, 0.5]]]])
    assert distance(human, objects).tolist() == [[[0.0, 5.0, 1.0]]]


def test_off_it_is_the_persistent_network_alone():
    model, (human, objects) = both(), scene()
    off = model(human, objects, 3, on=torch.zeros(2, 2, 7, dtype=torch.bool))
    alone = both(mechanism="persistent")
    alone.load_state_dict(model.state_dict(), strict=False)
    want = alone(human, objects, 3)
    torch.testing.assert_close(off.human, want.human)
    torch.testing.assert_close(off.objects, want.objects)
    assert not off.on.any()
    on = model(human, objects, 3, on=torch.ones(2, 2, 7, dtype=torch.bool))
    assert (on.human - want.human).abs().max() > 1e-3
    assert (on.objects - want.objects).abs().max() > 1e-3


def test_what_sleeps_keeps_its_state():
    model, (human, objects) = both(reach=0.1), scene(steps=1)
    zero, things, leaves = torch.zeros(2, 2, 8), torch.zeros(2, 3, 8), torch.rand(2, 2, 3, 8)
    states = (zero, things, torch.rand(2, 2, 8), leaves, zero)
    here = human[:, :, 0], objects[:, :, 0], torch.ones(2, 3, 1), states
    _, (_, _, g_c, g_l, said) = model._step(*here, torch.tensor([[True, False]] * 2))
    assert torch.equal(g_c[:, 1], states[2][:, 1])
    assert torch.equal(g_l[:, 1], leaves[:, 1])
    assert not said[:, 1].any()
    assert (g_c[:, 0] - states[2][:, 0]).abs().min() > 0
    handled = distance(*here[:2])[:, 0] <= 0.1
    assert handled.any()
    assert not handled.all()
    assert torch.equal((g_l[:, 0] != leaves[:, 0]).all(-1), handled)


def test_a_centre_is_moved_and_the_step_stays():
    """Centred coordinates do not change where all is moved, so with the persistent network's word gone nor do steps."""
    model, (human, objects) = both(), scene(people=1)
    with torch.no_grad():
        for parameter in model.transient["from_person"].parameters():
            parameter.zero_()
    always = torch.ones(2, 1, 5, dtype=torch.bool)
    found = model(human, objects, 1, on=always)
    moved = model(human + 3.0, objects + 3.0, 1, on=always)
    torch.testing.assert_close(moved.human - 3.0, found.human, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved.observed_human - 3.0, found.observed_human, atol=1e-4, rtol=1e-4)
    near = (distance(human[:, :, -1], objects[:, :, -1]) <= 0.5)[:, 0]
    torch.testing.assert_close((moved.objects - 3.0)[:, :, 0][near], found.objects[:, :, 0][near], atol=1e-4, rtol=1e-4)


def test_what_is_told_is_what_is_given_next():
    model, (human, objects) = both(), scene()
    found = model(human, objects, 3)
    longer = torch.cat([human, found.human[:, :, :1]], 2), torch.cat([objects, found.objects[:, :, :1]], 2)
    torch.testing.assert_close(model(*longer, 2).human, found.human[:, :, 1:])
    assert found.observed_human.shape == (2, 2, 4, 2, 2)
    assert found.score.shape == (2, 2, 7)


def test_samples_and_orders_are_independent():
    model, (human, objects) = both(kinds=2), scene()
    kinds = torch.eye(2)[torch.tensor([[0, 1, 1], [1, 0, 1]])]
    found = model(human, objects, 3, kinds=kinds)
    torch.testing.assert_close(model(human[1:], objects[1:], 3, kinds=kinds[1:]).objects, found.objects[1:])
    order = torch.tensor([2, 0, 1])
    again = model(human, objects[:, order], 3, kinds=kinds[:, order])
    torch.testing.assert_close(again.human, found.human)
    torch.testing.assert_close(again.objects, found.objects[:, order])
    torch.testing.assert_close(model(human.flip(1), objects, 3, kinds=kinds).human, found.human.flip(1))


def test_training_reaches_every_part():
    model, (human, objects) = both(), scene(steps=8)
    forecast = model(human[:, :, :5], objects[:, :, :5], 3)
    model.loss(forecast, human, objects, on=torch.rand(2, 2, 7) > 0.5).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.beta.grad != 0
    told = torch.cat([forecast.observed_human, forecast.human], 2)
    things = torch.cat([forecast.observed_objects, forecast.objects], 2)
    want = (told - human[:, :, 1:]).norm(dim=-1).mean() + (things - objects[:, :, 1:]).norm(dim=-1).mean()
    torch.testing.assert_close(model.loss(forecast, human, objects), want)


def test_saved_and_loaded(tmp_path):
    model, (human, objects) = both(switch="distance", heads=2), scene()
    model.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    loaded = PersistentTransient.from_pretrained(tmp_path)
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(human, objects, 2).objects, model(human, objects, 2).objects)


def test_record_sees_every_relation():
    model, (human, objects) = both(), scene(steps=2)
    with torch.no_grad(), regard.record(model, "rows") as recording:
        model(human, objects, 1)
    rows = [node["rows"] for tree in recording for node in tree.subtree if "rows" in node]
    assert rows
    assert any(row.sizes["key"] == 3 for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"human": torch.rand(2, 2, 5, 1, 2)}, r"human is \[batch, person, step, 2, 2\]"),
        ({"human": torch.rand(2, 9, 5, 2, 2)}, "at most 8 people"),
        ({"human": torch.full((2, 2, 5, 2, 2), torch.nan)}, "human holds values that are not finite"),
        ({"objects": torch.rand(2, 0, 5, 1, 2)}, "one or more"),
        ({"objects": torch.rand(2, 3, 4, 1, 2)}, "of other samples or steps"),
        ({"steps": 0}, "1 step or more"),
        ({"kinds": torch.ones(2, 2, 1)}, r"kinds are \[2, 3, 1\]"),
        ({"on": torch.ones(2, 2, 5, dtype=torch.bool)}, r"on is boolean \[2, 2, 6\]"),
    ],
)
def test_what_cannot_be_told_is_refused(change, message):
    human, objects = scene()
    given = {"human": human, "objects": objects, "steps": 2, **change}
    with pytest.raises(ValueError, match=message):
        both()(**given)


def test_knobs_that_are_none_are_refused():
    human, objects = scene()
    with pytest.raises(ValueError, match="mechanism is both"):
        both(mechanism="none")
    with pytest.raises(ValueError, match="switch is learned"):
        both(switch="none")
    with pytest.raises(ValueError, match="does not divide by 3 heads"):
        both(heads=3)
    with pytest.raises(ValueError, match="say which they are"):
        both(kinds=2)(human, objects, 1)
    alone = both(mechanism="persistent")
    with pytest.raises(ValueError, match="of a model with both mechanisms"):
        alone(human, objects, 1, on=torch.ones(2, 2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="this model has none"):
        alone.loss(alone(human[:, :, :3], objects[:, :, :3], 2), human, objects, on=torch.ones(2, 2, 4).bool())
    with pytest.raises(ValueError, match=r"4, 2, 2\] steps after the first were, \[2, 2, 3, 2, 2\] were told"):
        alone.loss(alone(human[:, :, :3], objects[:, :, :3], 1), human, objects)


def test_always_on_is_a_mechanism_of_its_own():
    model, (human, objects) = both(mechanism="transient"), scene()
    assert model(human, objects, 2).on.all()


def test_gradients_are_those_of_differences():
    model = both(width=4).double()
    human, objects = (some.double() for some in scene(batch=1, people=1, things=2, steps=2))
    on = torch.ones(1, 1, 2, dtype=torch.bool)
    given = human.requires_grad_(), objects.requires_grad_()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    assert torch.autograd.gradcheck(lambda a, b: tuple(model(a, b, 1, on=on)[:2]), given, atol=1e-4)


def test_what_the_switch_is_told_is_of_its_steps():
    human, objects = scene()
    model = both()
    forecast = model(human[:, :, :3], objects[:, :, :3], 2)
    for on in (torch.ones(2, 2, 5, dtype=torch.bool), torch.ones(2, 2, 4)):
        with pytest.raises(ValueError, match=r"on is boolean \[2, 2, 4\]"):
            model.loss(forecast, human, objects, on=on)
    with pytest.raises(ValueError, match="does not divide by 0 heads"):
        both(heads=0)
