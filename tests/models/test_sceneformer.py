"""SceneFormer: the nucleus by hand, what each property is told, and rooms from start to stop."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import regard
from regard.models.sceneformer import STEPS, Layout, PlanEncoder, Property, SceneFormer, nucleus, sceneformer

SMALL = {
    "categories": 4,
    "bins": 16,
    "angles": 4,
    "sizes": 8,
    "axes": 2,
    "most": 5,
    "dim": 16,
    "heads": 2,
    "layers": 1,
    "halvings": 3,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def _room(n):
    return Layout(torch.randint(4, (n,)), torch.randint(4, (n,)), torch.randint(16, (n, 2)), torch.randint(8, (n, 2)))


@pytest.mark.parametrize(("p", "kept"), [(0.6, [1, 1, 0]), (0.4, [1, 0, 0]), (0.9, [1, 1, 1]), (0.0, [1, 0, 0])])
def test_nucleus_by_hand(p, kept):
    order = torch.tensor([1, 2, 0])
    logits = torch.tensor([0.5, 0.3, 0.2]).log()[order]
    assert nucleus(logits, p).int().tolist() == [kept[i] for i in order]


def _sequences(length=7):
    return {"category": torch.randint(5, (2, length)), "place": torch.randint(9, (2, length))}


def test_kinds_take_turns_and_the_start_is_of_the_last():
    model = Property({"category": 5, "place": 9}, tokens=9, dim=16, heads=2, layers=1, per_object=3).eval()
    seen = []
    model.kinds.register_forward_hook(lambda module, args, output: seen.append(args[0].tolist()))
    model(_sequences(), torch.randn(2, 3, 16))
    assert seen == [[2, 0, 1, 2, 0, 1, 2]]


@pytest.mark.parametrize("conditioned", [True, False])
def test_what_comes_later_changes_nothing_and_pads_are_not_there(conditioned):
    model = Property({"category": 5, "place": 9}, tokens=9, dim=16, heads=2, layers=2, conditioned=conditioned).eval()
    sequences, memory = _sequences(), torch.randn(2, 3, 16) if conditioned else None
    found = model(sequences, memory)
    assert found.shape == (2, 7, 11)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 7))
    changed = {name: torch.cat([of[:, :4], of[:, 4:].flip(1)], 1) for name, of in sequences.items()}
    torch.testing.assert_close(model(changed, memory)[:, :4], found[:, :4])
    assert (model(changed, memory)[:, 4:] - found[:, 4:]).abs().max() > 1e-3
    short = {name: of[:, :4] for name, of in sequences.items()}
    torch.testing.assert_close(model(short, memory), found[:, :4])


def test_a_pad_is_not_seen_wherever_it_is():
    model = Property({"category": 5, "place": 9}, tokens=9, dim=16, heads=2, layers=1).eval()
    sequences, memory = _sequences(), torch.randn(2, 3, 16)
    sequences["category"][:, 2] = 5  # the pad
    found = model(sequences, memory)
    sequences["place"] = sequences["place"].clone()
    sequences["place"][:, 2] = (sequences["place"][:, 2] + 1) % 9
    torch.testing.assert_close(model(sequences, memory)[:, 3:], found[:, 3:])


def test_a_memory_of_one_vector_is_one_vector_however_often():
    model = Property({"category": 5}, tokens=5, dim=16, heads=2, layers=1).eval()
    sequences, memory = {"category": torch.randint(5, (2, 4))}, torch.randn(2, 1, 16)
    torch.testing.assert_close(model(sequences, memory.expand(-1, 6, -1)), model(sequences, memory))


def test_each_property_is_told_what_was_said_before_it():
    """Of a room, what a property is given and what it is asked, as tokens."""
    model, told = sceneformer(**SMALL, condition=None).eval(), {}
    for name, of in model.properties.items():
        of.register_forward_hook(lambda module, args, output, name=name: told.update({name: args[0]}))
    room = Layout(
        torch.tensor([2, 0]), torch.tensor([1, 3]), torch.tensor([[5, 6], [7, 8]]), torch.tensor([[1, 2], [3, 4]])
    )
    objects = model._objects([room])
    wanted = {name: model._scored(name, objects, None)[1][0].tolist() for name in STEPS}
    start, stop, pad = 6, 5, 4
    assert wanted["category"] == [2, 0, stop, pad, pad, pad]
    assert told["category"]["place0"][0].tolist() == [18, 5, 7, 17, 16, 16]
    assert wanted["orientation"] == [1, 3, pad, pad, pad, pad]
    assert told["orientation"]["category"][0].tolist() == [start, 2, 0, stop, pad, pad]
    assert told["orientation"]["current"][0].tolist() == [2, 0, stop, pad, pad, pad]
    assert wanted["place"] == [5, 6, 7, 8, *[16] * 8]
    assert told["place"]["place"][0, :5].tolist() == [18, 5, 6, 7, 8]
    assert told["place"]["category"][0, :5].tolist() == [start, 2, 2, 0, 0]
    assert told["place"]["current"][0, :5].tolist() == [2, 2, 0, 0, stop]
    assert told["place"]["orientation"][0, :4].tolist() == [1, 1, 3, 3]
    assert wanted["size"][:4] == [1, 2, 3, 4]
    assert told["size"]["place1"][0, :4].tolist() == [6, 6, 8, 8]


def test_loss_is_that_of_every_token_and_of_no_pad():
    model = sceneformer(**SMALL, condition=None).eval()
    rooms = [_room(3), _room(5)]
    found = model(rooms)
    each = [model([room]) for room in rooms]
    for name, tokens in {"category": (4, 6), "orientation": (3, 5), "place": (6, 10), "size": (6, 10)}.items():
        mean = sum(n * of[name] for n, of in zip(tokens, each, strict=True)) / sum(tokens)
        torch.testing.assert_close(found[name], mean)


def test_it_learns_a_room_by_its_plan_and_is_saved(tmp_path):
    model, rooms = sceneformer(**{**SMALL, "dim": 32}, dropout=0.0), [_room(2), _room(4)]
    plans = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        sum(model(rooms, plans).values()).backward()
        optimiser.step()
    made = model.eval().generate(plans, p=0.5)
    for room, found in zip(rooms, made, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(room, found, strict=True))
    model.save_pretrained(tmp_path)
    again = SceneFormer.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(rooms, plans)["place"], model(rooms, plans)["place"])


def test_rooms_of_a_batch_do_not_meet():
    model, plans = sceneformer(**SMALL).eval(), torch.rand(3, 1, 32, 32)
    together = model.generate(plans, p=0.0)
    alone = model.generate(plans[1:2], p=0.0)[0]
    assert all(torch.equal(a, b) for a, b in zip(together[1], alone, strict=True))


def test_plan_encoder_tells_places_of_a_flat_plan_apart():
    found = PlanEncoder(1, 16, halvings=3)(torch.zeros(1, 1, 32, 16))
    assert found.shape == (1, 8, 16)
    assert torch.cdist(found[0], found[0]).add(torch.eye(8)).min() > 0.1


def test_text_is_a_condition_and_record_sees_both_kinds():
    model = sceneformer(**SMALL, condition="text", channels=50).eval()
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        model([_room(3)], text=torch.randn(1, 4, 50))
    keys = {node.path for node in recording.tree.subtree if "entropy" in node}
    assert any("multihead_attn" in name for name in keys)
    assert any("self_attn" in name for name in keys)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: nucleus(torch.zeros(3), 1.5), "probability"),
        (lambda: Property({"place": 4}, tokens=4), "category is one"),
        (lambda: sceneformer(**SMALL, condition="sound"), '"plan", "text" or None'),
        (
            lambda: sceneformer(**SMALL)([_room(6)], torch.rand(1, 1, 32, 32)),
            "6 objects, and the model was made for 5",
        ),
        (lambda: sceneformer(**SMALL).generate(torch.rand(1, 1, 32, 32), torch.rand(1, 4, 50)), "not for both"),
        (lambda: sceneformer(**SMALL).generate(rooms=2), "condition is plan, and it is given None"),
        (lambda: sceneformer(**SMALL, condition=None).generate(), "how many rooms"),
        (lambda: Property({"category": 4}, tokens=4)({"place": torch.zeros(1, 3).long()}), "takes category, got place"),
        (
            lambda: Property({"category": 4}, tokens=4, longest=2)({"category": torch.zeros(1, 3).long()}),
            "3 tokens, and the model has places for 2",
        ),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_gradients_reach_every_weight():
    model = sceneformer(**SMALL)
    sum(model([_room(3), _room(2)], torch.rand(2, 1, 32, 32)).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert F.softmax(model.properties["category"].output.bias, 0).shape == (6,)


def test_no_room_has_no_likelihood():
    with pytest.raises(ValueError, match="one room or more"):
        sceneformer(**SMALL)([], torch.rand(0, 1, 32, 32))
