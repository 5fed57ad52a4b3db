"""Probes of pairs of patches, and what they read taken apart."""

from __future__ import annotations

import re

import pytest
import torch

from regard.circuits.object_binding import (
    SameObject,
    accuracy,
    balanced_accuracy,
    fit,
    inject_binding,
    object_binding,
    shuffle_binding,
    states,
)
from regard.seam import intervene
from tests.families import clip, made, pixels, vit


def by_hand(kind, weight, bias=0.5, **knobs):
    probe = SameObject(2, kind=kind, **knobs)
    probe.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    return probe


STATES = torch.tensor([[1.0, 0.0], [1.0, 1.0]])


@pytest.mark.parametrize(
    ("probe", "logit"),
    [
        (by_hand("quadratic", [[2.0, 0.0], [1.0, 4.0]]), 2.5 / 2**0.5 + 0.5),  # (2 + 1 / 2) / sqrt(2)
        (by_hand("quadratic", [[2.0, 1.0]], rank=1), 2 * 3 / 2**0.5 + 0.5),
        (by_hand("diagonal", [3.0, 5.0]), 3.5),
        (by_hand("linear", [3.0, 5.0]), 3 + 8 + 1.0),  # whose bias counts twice
    ],
)
def test_by_hand(probe, logit):
    logits = probe(STATES)
    assert logits[0, 1].item() == pytest.approx(logit)
    assert torch.allclose(logits, logits.T)


def test_signs_of_a_low_rank_are_half_and_half():
    probe = by_hand("quadratic", [[1.0, 0.0], [0.0, 1.0]], bias=0.0, rank=2)
    assert probe(torch.tensor([[1.0, 1.0], [2.0, 1.0]]))[0, 1].item() == pytest.approx((2 - 1) / 2**0.5)
    assert SameObject(4, rank=2, seed=1).basis() @ SameObject(4, rank=2, seed=1).basis().T == pytest.approx(
        torch.eye(2).numpy(), abs=1e-6
    )


def test_loss_and_accuracies_by_hand():
    logits = torch.tensor([[2.0, -1.0, 1.0], [-1.0, 3.0, -2.0], [1.0, -2.0, -1.0]])
    objects = torch.tensor([0, 0, 1])
    # upper triangle: right (0, 0), (1, 1), (1, 2); wrong (0, 1), (0, 2), (2, 2)
    assert accuracy(logits, objects).item() == 0.5
    apart = torch.ones(3, 3, dtype=torch.bool).triu(1)
    assert balanced_accuracy(logits, objects, apart) == 0.25  # of one object 0 of 1, of two 1 of 2
    probe = by_hand("diagonal", [0.0, 0.0], bias=0.0)
    assert probe.loss(STATES, torch.tensor([0, 1])).item() == pytest.approx(0.6931, abs=1e-4)


def scattered(n):
    """Pictures of two objects, each a random direction in four dimensions of eight, scattered over 16 patches."""
    generator = torch.Generator().manual_seed(n)
    objects = (torch.rand(n, 16, generator=generator) < 0.5).long()
    marks = torch.randn(n, 2, 4, generator=generator)
    own = marks[torch.arange(n)[:, None], objects]
    return torch.cat([own, torch.randn(n, 16, 4, generator=generator)], -1), objects


def test_binding_is_read_by_products_and_not_by_sums():
    given, objects = scattered(400)
    other, judged = scattered(200)
    apart = torch.ones(16, 16, dtype=torch.bool).triu(1).expand(200, -1, -1)
    found = {}
    for kind in ("quadratic", "linear"):
        probe = fit(given, objects, kind=kind, epochs=30, rate=3e-2, batch=100, drawn=12)
        found[kind] = balanced_accuracy(probe(other), judged, apart)
    assert found["quadratic"] > 0.75 > 0.6 > found["linear"]


def test_states_are_those_of_patches_at_each_layer():
    model, inputs = made(vit)
    found = states(model, inputs, 16)
    assert [tuple(of.shape) for of in found.values()] == [(2, 16, 32)] * 2
    with torch.no_grad():
        whole = model(**inputs, output_hidden_states=True).hidden_states
    assert torch.allclose(found[0], whole[1][:, 1:], atol=1e-6)


def test_a_model_is_probed_at_each_layer():
    model, _ = made(vit)
    objects = (torch.arange(16) // 8).expand(6, 16).clone()
    inputs = {"pixel_values": pixels(6)["pixel_values"]}
    found = object_binding(model, inputs, objects, epochs=2, held_out=0.5)
    assert found["layer"].values.tolist() == [0, 1]
    assert found.attrs["prior"] == pytest.approx((2 * 36) / 136)  # pairs of 8 with themselves, of 136
    again = object_binding(model, inputs, objects, epochs=2, layers=[1])
    assert again["accuracy"].values == pytest.approx(found["accuracy"].values[1:])


class TestChanged:
    model, inputs = made(vit)
    objects = torch.tensor([[0] * 8 + [1] * 8, [0, 1] * 8])
    basis = torch.linalg.qr(torch.randn(32, 3, generator=torch.Generator().manual_seed(1)))[0].T

    def after(self, edit):
        with intervene(self.model, edit):
            return states(self.model, self.inputs, 16)[0]

    def test_what_is_read_moves_and_the_rest_stays(self):
        own = states(self.model, self.inputs, 16)[0]
        moved = self.after(shuffle_binding(self.basis, 0, 16, share=0.5))
        rest = torch.eye(32) - self.basis.T @ self.basis
        assert torch.allclose(moved @ rest, own @ rest, atol=1e-5)
        one, other = own @ self.basis.T, moved @ self.basis.T
        assert ((one - other).abs().amax(-1) > 1e-5).sum(-1).tolist() == [8, 8]
        assert torch.allclose(one.sum(1), other.sum(1), atol=1e-4)  # the same parts, elsewhere
        assert torch.equal(states(self.model, self.inputs, 16)[0], own)

    def test_what_is_read_becomes_the_mean_of_the_object(self):
        own = states(self.model, self.inputs, 16)[0]
        for alpha in (0.0, 0.5):
            read = self.after(inject_binding(self.basis, 0, self.objects, alpha=alpha)) @ self.basis.T
            for row in range(2):
                for which in (0, 1):
                    mine = self.objects[row] == which
                    before = own[row, mine] @ self.basis.T
                    expected = alpha * before + (1 - alpha) * before.mean(0)
                    assert torch.allclose(read[row, mine], expected, atol=1e-5)


def test_bad_input_is_named():
    model, inputs = made(vit)
    objects = torch.zeros(2, 16, dtype=torch.long)
    basis = torch.eye(32)[:2]
    for error, run in (
        ("kind is one of", lambda: SameObject(4, kind="cubic")),  # type: ignore[arg-type]
        ("a linear probe has no rank", lambda: SameObject(4, kind="linear", rank=2)),
        ("rank is 1 to 4", lambda: SameObject(4, rank=5)),
        ("say rank=", lambda: SameObject(4).basis()),
        ("not [batch, 20 patches or more, dim]", lambda: states(model, inputs, 20)),
        ("say stack=", lambda: states(made(clip)[0], inputs, 16)),
        ("no stack 'text'", lambda: states(model, inputs, 16, stack="text")),
        ("objects are integers", lambda: object_binding(model, inputs, objects.float())),
        ("have some on both sides", lambda: object_binding(model, inputs, objects, held_out=0.0)),
        ("no layers [7]", lambda: object_binding(model, inputs, objects, layers=[7])),
        ("run on 2 pictures, objects are of 3", lambda: object_binding(model, inputs, objects[[0, 1, 1]])),
        ("share is above 0", lambda: shuffle_binding(basis, 0, 16, share=0.05)),
        ("alpha is 0 to below 1", lambda: inject_binding(basis, 0, objects, alpha=1.0)),
    ):
        with pytest.raises(ValueError, match=re.escape(error)):
            run()
    with pytest.raises(ValueError, match="no layer 5"), intervene(model, shuffle_binding(basis, 5, 16)):
        pass
    wrong = inject_binding(basis, 0, objects[:1])
    with pytest.raises(ValueError, match="objects are of 1 pictures"), intervene(model, wrong):
        model(**inputs)
