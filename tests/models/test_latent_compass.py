"""The compass: boundaries by hand and by scikit-learn, what a step changes, a person who is a rule, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import nn

from regard.models.latent_compass import Compass, latent_compass, separate

CODES, LABELS = torch.tensor([[1.0, 0], [2, 0], [-1, 0], [-2, 0]]), [1, 1, 0, 0]


class Generator(nn.Module):
    """A class moves its pictures."""

    def __init__(self):
        super().__init__()
        self.deep, self.last, self.unused = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(1, 1)

    def forward(self, codes, kind=0.0):
        return self.last(self.deep(codes).tanh() + kind).view(-1, 1, 2, 4)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("model", ["logistic", "svm"])
def test_a_direction_by_hand(model):
    compass = Compass(nn.Identity(), model=model)
    found = compass.fit(CODES, LABELS)
    torch.testing.assert_close(found.step, torch.tensor([1.0, 0]).double())
    assert found.offset == pytest.approx(0, abs=1e-9)
    assert found.spread == pytest.approx(math.sqrt(10 / 3))
    torch.testing.assert_close(compass.mirror(found, torch.tensor([[2.0, 1]])), torch.tensor([[-2.0, 1]]))
    moved = compass.steer(found, torch.tensor([[2.0, 1]]), -0.5)
    torch.testing.assert_close(moved, torch.tensor([[2 - math.sqrt(10 / 3) / 2, 1]]))


@pytest.mark.parametrize("dim", [3, 40])
@pytest.mark.parametrize("strength", [0.2, 1.0])
def test_the_linear_models_are_scikit_learns(dim, strength):
    x, y = torch.randn(20, dim).double(), (torch.arange(20) % 3 == 0).long()
    w, b = separate(x, y, strength=strength)
    theirs = LogisticRegression(C=1 / strength, tol=1e-10, max_iter=10000).fit(x, y)
    torch.testing.assert_close(w, torch.tensor(theirs.coef_[0]), atol=1e-5, rtol=1e-4)
    assert b == pytest.approx(theirs.intercept_[0], abs=1e-5)
    w, b = separate(x, y, model="svm", strength=strength)
    with torch.no_grad():  # theirs holds the offset down too, so that ours is compared by its optimum

        def loss(w, b):
            return float((1 - (2 * y - 1) * (x @ w + b)).clamp_min(0).square().sum() + strength * w @ w / 2)

        theirs = LinearSVC(C=1 / strength, tol=1e-8, max_iter=100000, intercept_scaling=100).fit(x, y)
        assert loss(w, b) <= loss(torch.tensor(theirs.coef_[0]), float(theirs.intercept_[0])) + 1e-9
        assert all(loss(w + 1e-3 * torch.randn(dim).double(), b + 1e-3) > loss(w, b) for _ in range(20))


@pytest.mark.parametrize("layer", [None, "deep", "last"])
def test_labels_swapped_turn_it_round_and_a_step_of_0_changes_no_bit(layer):
    compass, codes = Compass(Generator(), layer), torch.randn(12, 3)
    labels = (codes[:, 0] > 0).long()
    one, other = compass.fit(codes, labels), compass.fit(codes, 1 - labels)
    torch.testing.assert_close(one.step, -other.step)
    assert float(one.step.norm()) == pytest.approx(1)
    assert one.step.shape == {None: (3,), "deep": (6,), "last": (8,)}[layer]
    plain = compass.generator(codes)
    assert torch.equal(compass.steer(one, codes, 0.0), plain)
    amounts = torch.zeros(12)
    amounts[3] = 2.0
    found = compass.steer(one, codes, amounts)
    assert torch.equal(found[4:], plain[4:])
    assert not torch.allclose(found[3], plain[3])
    torch.testing.assert_close(found[3:4], compass.steer(one, codes[3:4], 2.0))
    scores = one.scores(compass.features(codes))
    assert ((scores > 0) == labels.bool()).float().mean() > 0.8
    assert not compass.generator.deep._forward_hooks


def test_the_layer_moves_by_its_step_and_its_mirror_is_over_the_boundary():
    compass, codes = Compass(Generator(), "deep"), torch.randn(12, 3)
    found = compass.fit(codes, (codes[:, 0] > 0).long(), name="up")
    model, deep = compass.generator, compass.features(codes)
    there = deep + 1.5 * found.spread * found.step.float()
    torch.testing.assert_close(compass.steer("up", codes, 1.5), model.last(there.tanh()).view(-1, 1, 2, 4))
    behind = deep - 2 * (found.scores(deep) / (found.normal * found.step).sum())[:, None] * found.step
    torch.testing.assert_close(found.scores(behind), -found.scores(deep))
    torch.testing.assert_close(compass.mirror("up", codes), model.last(behind.float().tanh()).view(-1, 1, 2, 4))
    assert not torch.allclose(compass.steer("up", codes, 1.0, 0.7), compass.steer("up", codes, 1.0))  # another class


def test_units_of_a_layers_features_are_their_deviations():
    class Wide(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False)
            self.layer.weight.data = torch.diag(torch.tensor([scale, 1.0, 0.0]))

        def forward(self, codes):
            return self.layer(codes)

    codes = torch.randn(10, 3)
    labels = (codes[:, :2].sum(1) > 0).long()
    one, hundred = (Compass(Wide(scale), "layer").fit(codes, labels) for scale in (1.0, 100.0))
    a, b = one.step * one.spread, hundred.step * hundred.spread
    assert float(b[0] / b[1]) == pytest.approx(100 * float(a[0] / a[1]), rel=1e-4)
    assert float(b[2]) == 0  # what does not differ is left alone
    seen = codes[:, :2].double()
    w, offset = separate((seen - seen.mean(0)) / seen.std(0), labels)
    expected = ((seen - seen.mean(0)) / seen.std(0)) @ w + offset
    torch.testing.assert_close(one.scores(torch.cat([codes[:, :2], torch.zeros(10, 1)], 1)), expected)


def test_directions_are_kept_added_and_saved():
    compass, codes = latent_compass(nn.Identity()), torch.randn(40, 3)
    for i, name in enumerate(("first", "second")):
        compass.fit(codes, (codes[:, i] > 0).long(), name=name)
    parts = [compass.steer(name, codes, 1.0) - codes for name in compass.directions]
    torch.testing.assert_close(
        compass.steer({"first": 1.0, "second": -0.5}, codes, 2.0) - codes, 2 * parts[0] - parts[1], atol=1e-5, rtol=1e-4
    )
    again = latent_compass(nn.Identity())
    again.load_state_dict(compass.state_dict())
    torch.testing.assert_close(again.steer("second", codes, 1.0), compass.steer("second", codes, 1.0))


def test_a_person_is_asked_in_rounds_along_what_was_found():
    hidden, shown = torch.tensor([1.0, -1.0, 0, 0]), []

    def person(pictures):
        shown.append(pictures)
        return (pictures @ hidden > 0.3).long()

    def draw(n):
        return (torch.randn(n, 4, generator=generator),)

    generator = torch.Generator().manual_seed(1)
    found = Compass(nn.Identity()).ask(person, draw, rounds=3, size=12, name="seen")
    assert len(shown) == 3
    assert float(found.step.float() @ hidden) / math.sqrt(2) > 0.85
    first = Compass(nn.Identity()).fit(shown[0], (shown[0] @ hidden > 0.3).long())
    along = (shown[1].double() @ first.step).numpy()
    assert along[-3:].mean() - along[:3].mean() > 2 * first.spread
    everything = torch.cat(shown)
    torch.testing.assert_close(
        Compass(nn.Identity()).fit(everything, (everything @ hidden > 0.3).long()).step, found.step
    )


def test_half_precision_stays():
    compass = Compass(nn.Identity())
    found = compass.fit(CODES.bfloat16(), LABELS)
    assert compass.steer(found, CODES.bfloat16(), 1.0).dtype == torch.bfloat16
    codes = CODES.clone().requires_grad_()
    compass.steer(found, codes, 1.0).sum().backward()
    assert torch.equal(codes.grad, torch.ones(4, 2))


def test_refusals():
    compass = Compass(nn.Identity())
    for labels, codes, said in [
        ([1, 1, 1, 1], CODES, "some of each"),
        ([0, 1, 2, 1], CODES, "some of each"),
        ([0, 1, 1], CODES[:3], "four pictures"),
        ([0, 1], CODES, "each with a label"),
        (LABELS, CODES * math.nan, "finite"),
        (LABELS, torch.ones(4, 2), "do not differ"),
    ]:
        with pytest.raises(ValueError, match=said):
            compass.fit(codes, labels)
    found = compass.fit(CODES, LABELS, name="x")
    for ask, said in [
        (lambda: compass.steer("y", CODES, 1.0), "kept are x"),
        (lambda: compass.steer(found, CODES, 3.5), "raise `limit`"),
        (lambda: compass.steer(found, CODES, math.nan), "raise `limit`"),
        (lambda: compass.steer({}, CODES, 1.0), "got none"),
        (lambda: compass.steer(found, torch.zeros(4, 3), 1.0), "what it is to move"),
        (lambda: compass.steer(found, CODES, torch.ones(3)), "one a code"),
        (lambda: Compass(nn.Identity(), "there"), "no module 'there'"),
        (lambda: Compass(nn.Identity(), model="tree"), "logistic, svm"),
        (lambda: Compass(Generator(), "unused").features(torch.zeros(4, 3)), "did not run"),
        (lambda: compass.ask(lambda p: [1] * len(p), lambda n: (torch.randn(n, 2),)), "some of each"),
    ]:
        with pytest.raises(ValueError, match=said):
            ask()
    assert compass.steer(found, CODES[:0], 1.0).shape == (0, 2)


@pytest.mark.parametrize("model", ["logistic", "svm"])
def test_heaps_that_are_alike_give_no_direction(model):
    compass, codes = Compass(nn.Identity(), model=model), torch.tensor([[1.0], [-1], [1], [-1]])
    with pytest.raises(ValueError, match="both heaps are alike"):
        compass.fit(codes, [1, 1, 0, 0], name="none")
    assert compass.directions == {}


def test_separate_refuses_what_it_cannot_do():
    for labels, knobs, said in [
        (LABELS, {"model": "tree"}, "logistic, svm"),
        (LABELS, {"strength": 0.0}, "strength above 0"),
        ([0, 1, 2, 1], {}, "labels 0 or 1"),
        ([0, 1, 1], {}, "labels 0 or 1"),
    ]:
        with pytest.raises(ValueError, match=said):
            separate(CODES, torch.tensor(labels), **knobs)
