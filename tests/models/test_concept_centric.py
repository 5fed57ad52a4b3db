"""Concept-centric transformers: rounds and losses by hand, what the order of concepts means, and what `record` sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import regard
from regard.models.concept_centric import (
    CompetingAttention,
    ConceptAttention,
    ConceptCentric,
    ConceptHead,
    ConceptSlots,
    concept_centric,
    explanation_loss,
    sparsity_loss,
)

VISION = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_one_input_goes_whole_to_every_slot():
    query, key, value = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[3.0]]]).log(), torch.tensor([[[5.0]]])
    found, shares = CompetingAttention()(query, key, value)
    torch.testing.assert_close(shares, torch.tensor([[[0.75], [0.25]]]))
    torch.testing.assert_close(found, torch.tensor([[[5.0], [5.0]]]))


def test_losses_by_hand():
    weights, target = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[2.0, 0.0], [torch.nan, 1.0]])
    torch.testing.assert_close(explanation_loss(weights, target), torch.tensor(0.5))
    assert explanation_loss(weights[1:], target[1:]) == 0
    assert sparsity_loss(torch.tensor([[1.0, 0.0]])) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(sparsity_loss(weights[:1]), torch.tensor(0.5).log() * -0.5)
    with pytest.raises(ValueError, match="differ"):
        explanation_loss(weights, target[:1])


def test_concepts_that_change_places_change_weights_and_nothing_else():
    head, order = ConceptHead(12, 3, 5, heads=3).eval(), torch.randperm(5)
    torch.nn.init.normal_(head.places)
    summary, patches, noise = torch.randn(2, 1, 12), torch.randn(2, 4, 12), torch.randn(2, 5, 12)
    before = head(summary, patches, noise=noise)
    head.places.data = head.places[order]
    after = head(summary, patches, noise=noise[:, order])
    torch.testing.assert_close(after.concepts, before.concepts[:, order])
    torch.testing.assert_close(after.logits, before.logits)


def test_read_out_is_a_sum_of_votes():
    read = ConceptAttention(8, 2, 3).eval()
    features, concepts = torch.randn(2, 1, 8), torch.randn(2, 5, 8)
    logits, mean = read(features, concepts)
    key, value = read.key_value(concepts).chunk(2, -1)
    query, found = read.query(features), []
    weights = []
    for part in (slice(0, 4), slice(4, 8)):
        weights.append((query[..., part] @ key[..., part].mT / 2).softmax(-1))
        found.append(weights[-1] @ value[..., part])
    torch.testing.assert_close(logits, read.output(torch.cat(found, -1)))
    torch.testing.assert_close(mean, sum(weights) / 2)


@pytest.mark.parametrize(("kind", "reaches"), [("isa", False), ("qsa", True)])
def test_what_the_start_learns_from(kind, reaches):
    start = torch.randn(2, 3, 8, requires_grad=True)
    slots, _ = ConceptSlots(8, 3, kind=kind, rounds=3)(torch.randn(2, 6, 8), start=start)
    slots.sum().backward()
    assert (start.grad is not None) == reaches


def test_only_the_last_round_of_qsa_has_gradients():
    """Rounds before it could as well be constants: the gradient of the map of values is that of one round alone."""
    module, inputs, start = ConceptSlots(8, 3, kind="qsa", rounds=2).double(), torch.randn(1, 6, 8).double(), None
    start = torch.randn(1, 3, 8).double()
    module(inputs, start=start)[0].sum().backward()
    found = module.value.weight.grad.clone()
    with torch.no_grad():
        key, value = module.key(module.norm_inputs(inputs)), module.value(module.norm_inputs(inputs))
        middle, _ = module._round(start, key, value)
    module.zero_grad()
    module.rounds = 1
    module(inputs, start=middle)[0].sum().backward()
    torch.testing.assert_close(module.value.weight.grad, found)


@pytest.mark.parametrize("kind", ["sa", "isa", "qsa", "plain"])
@pytest.mark.parametrize("see", ["class", "patches"])
def test_pictures_of_a_batch_do_not_meet_and_losses_train(kind, see):
    model = concept_centric(VISION, 3, 5, spatial_concepts=4, heads=3, kind=kind, see=see).eval()
    pictures, noise = torch.randn(3, 3, 16, 16), torch.randn(3, 5, 12) if kind == "sa" else None
    found = model(pictures, noise=noise)
    alone = model(pictures[1:2], noise=None if noise is None else noise[1:2])
    torch.testing.assert_close(found.logits[1:2], alone.logits)
    torch.testing.assert_close(found.concepts.sum(-1), torch.ones(3))
    assert found.spatial.shape == (3, 4, 4)
    loss = explanation_loss(found.concepts, torch.eye(5)[:3]) + sparsity_loss(found.spatial) + found.logits.sum()
    loss.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused <= {"head.start", "head.slots.norm_slots.weight", "head.slots.norm_slots.bias"}


def test_saved_and_loaded(tmp_path):
    model = concept_centric(VISION, 3, 5, heads=3, kind="qsa", see="patches").eval()
    model.save_pretrained(tmp_path)
    again, pictures = ConceptCentric.from_pretrained(tmp_path).eval(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(pictures).logits, model(pictures).logits)


def test_record_sees_slots_and_read_out():
    model = concept_centric(VISION, 3, 5, heads=3, see="patches").eval()
    with torch.no_grad(), regard.record(model, "rows") as recording:
        found = model(torch.randn(2, 3, 16, 16))
    rows = {tuple(node["rows"].shape): node["rows"] for node in recording.tree.subtree if "rows" in node}
    read = next(value for shape, value in rows.items() if shape[-1] == 5 and shape[-2] == 1)
    np.testing.assert_allclose(np.asarray(read).reshape(2, 3, 5).mean(1), found.concepts, rtol=1e-5)
    assert any(shape[-2:] == (5, 4) for shape in rows)  # slots by patches


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ConceptSlots(8, 3, kind="plain"), '"sa", "isa" or "qsa"'),
        (lambda: ConceptSlots(8, 3, rounds=0), "one round"),
        (lambda: ConceptSlots(8, 3, kind="qsa")(torch.randn(1, 4, 8)), "a start; this is qsa"),
        (lambda: ConceptSlots(8, 3)(torch.randn(1, 4, 8), start=torch.randn(1, 3, 8)), "this is sa"),
        (lambda: ConceptHead(12, 3, 5, kind="other"), "kind is one of"),
        (lambda: ConceptHead(12, 3, 5, heads=5), "12 channels do not divide by 5"),
        (lambda: ConceptHead(12, 3, 5)(torch.randn(2, 12), torch.randn(2, 4, 12)), r"class token \[batch, 1, dim\]"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()
