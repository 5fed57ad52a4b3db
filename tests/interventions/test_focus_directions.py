"""Directions that move queries to what is relevant are learned, and added to the heads that read the context."""

from __future__ import annotations

import families
import pytest
import torch

import regard
from regard import Call, Site
from regard.claims._passages import retold
from regard.interventions.focus_directions import (
    Example,
    contextual_heads,
    focus_directions,
    hidden_keys,
    learn_directions,
)

SITE = Site("layers.1.self_attn", "language_model", 1, causal=True)


def examples(inputs):
    """What the last three tokens are to look at are the third and the fourth."""
    place = torch.arange(inputs["input_ids"].shape[1]).expand(2, -1)
    return [Example(inputs, (place == 2) | (place == 3), place >= place.shape[1] - 3)]


@torch.no_grad()
def on_relevant(model, some, *things):
    """Weight of the answer's queries on what is relevant. [layer, head]"""
    example = some[0]
    with regard.intervene(model, *things), regard.record(model, "rows") as recording:
        model(**example.inputs)
    rows = torch.tensor(recording.tree["language_model"]["rows"].values).nan_to_num()  # batch layer head query key
    mass = (rows * example.relevant[:, None, None, None]).sum(-1)
    return (mass * example.answer[:, None, None]).sum((0, -1)) / example.answer.sum()


def test_the_offset_is_added_to_the_queries_of_its_head():
    call = Call(SITE, torch.ones(2, 2, 3, 4), torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4), 1.0)
    method = focus_directions(directions={(1, 1): torch.tensor([1.0, 2.0, 0.0, -1.0])}, strength=0.5)
    model, _ = families.build("llama")
    method.begin(model)
    moved = method.inputs(call)
    assert torch.equal(moved.query[:, 0], call.query[:, 0])
    assert torch.equal(moved.query[:, 1], torch.tensor([1.5, 2.0, 1.0, 0.5]).expand(2, 3, 4))
    assert moved.key is call.key
    other = Call(Site("layers.0.self_attn", "language_model", 0), *(call.query,) * 3, 1.0)
    assert method.inputs(other) is other


def test_an_offset_of_the_keys_would_change_nothing():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4)
    call = Call(SITE, query, key, value, 0.5, causal=True)
    assert torch.allclose(call.but(key=key + torch.randn(4)).weights.dense(), call.weights.dense(), atol=1e-6)


def test_contextual_heads_are_those_that_look_there_most():
    model, inputs = families.build("llama")
    some = examples(inputs)
    mass = on_relevant(model, some)
    expected = [divmod(i, 4) for i in mass.flatten().argsort(descending=True).tolist()]
    assert contextual_heads(model, some, n=3) == expected[:3]
    assert len(contextual_heads(model, some)) == 8


def test_learned_directions_draw_their_heads_and_no_others():
    model, inputs = families.build("llama")
    some, heads = examples(inputs), [(0, 1), (1, 2)]
    before = [parameter.clone() for parameter in model.parameters()]
    learned = learn_directions(model, some, heads, epochs=30, rate=0.1)
    assert sorted(learned) == heads
    assert not any(direction.requires_grad for direction in learned.values())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters()))
    plain = on_relevant(model, some)
    for layer, head in heads:
        alone = focus_directions(directions={(layer, head): learned[layer, head]}, strength=1.0)
        steered = on_relevant(model, some, alone)
        assert steered[layer, head] > plain[layer, head] + 0.1
        assert torch.allclose(
            steered[layer, [h for h in range(4) if h != head]], plain[layer, [h for h in range(4) if h != head]]
        )
        away = on_relevant(model, some, focus_directions(directions=alone.directions, strength=-1.0))
        assert away[layer, head] < plain[layer, head]


def test_learning_goes_ten_times_through_the_examples_from_where_it_is_told():
    model, inputs = families.build("llama")
    some, steps = examples(inputs), []
    start = {(1, 0): torch.full((8,), 0.5)}

    class Count:
        def inputs(self, call):
            steps.append(call.site.layer)
            return call

    with regard.intervene(model, Count()):
        still = learn_directions(model, some, [(1, 0)], start=start, rate=0.0)
    assert torch.equal(still[1, 0], start[1, 0])
    assert start[1, 0].requires_grad is False
    assert steps.count(1) == 10


def test_learning_is_the_same_by_seed():
    model, inputs = families.build("llama")
    some = examples(inputs) * 2
    first, again, other = (learn_directions(model, some, [(1, 0)], seed=seed)[1, 0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_passage_that_is_told_again_is_the_relevant_one():
    model, tokenizer = regard.load("reader")
    ids, relevant, answer = retold(model, tokenizer.bos_token_id, batch=4, seed=0)
    assert relevant.sum(1).tolist() == [20] * 4
    for row in range(4):
        passage, told = ids[row][relevant[row]].tolist(), ids[row, -12:].tolist()
        assert any(passage[i : i + 12] == told for i in range(9))
        assert torch.equal(ids[row].roll(-1)[answer[row]], ids[row, -8:])


def test_hidden_keys_are_relevant_and_the_answer():
    _, tokenizer = regard.load("reader")
    found = hidden_keys(tokenizer, 2)
    for example in found:
        ids = example.inputs["input_ids"]
        told = ids[example.relevant]
        assert told.tolist() == [int(ids[0, -1])] * 2
        assert example.answer.nonzero()[:, 1].tolist() == [ids.shape[1] - 2, ids.shape[1] - 1]
    with pytest.raises(ValueError, match="need the model's tokenizer"):
        hidden_keys(None)


def test_directions_of_another_model_are_refused():
    model, inputs = families.build("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layer 5"):
        focus_directions(directions={(5, 0): torch.ones(8)}).begin(model)
    for directions, said in (({(1, 0): torch.ones(4)}, r"direction \[4\]"), ({(1, 9): torch.ones(8)}, "no head 9")):
        with pytest.raises(ValueError, match=said), regard.intervene(model, focus_directions(directions=directions)):
            model(**inputs)
