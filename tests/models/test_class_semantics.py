"""Class semantics: gates, pairs, loss and suppression by hand, the gates' limits, and padding that is not there."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from regard.models._stretches import overlap
from regard.models.class_semantics import (
    ClassSemanticsAttention,
    Localised,
    Localiser,
    SqueezeExcitation,
    class_semantics,
    localiser_loss,
    proposals,
)

SIZES = {"features": 6, "classes": 4, "width": 8, "longest": 5}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def test_gate_of_channels_by_hand():
    gate = ClassSemanticsAttention(2, 1, over="channel")
    _zero(gate)
    with torch.no_grad():
        gate.channel[0].weight.fill_(1.0)
        gate.channel[2].weight[0] = math.log(3)
    found, channel, time = gate(torch.full((1, 2, 3), 4.0), torch.ones(1, 1, 3))
    assert time is None
    torch.testing.assert_close(channel, torch.tensor([[[0.75], [0.5]]]))
    torch.testing.assert_close(found, torch.tensor([[[3.0] * 3, [2.0] * 3]]))


def test_gate_of_times_by_hand():
    # hidden is the score; the kernel (1, 0, 2) takes once the step before and twice the step after
    gate = ClassSemanticsAttention(1, 1, over="time")
    _zero(gate)
    with torch.no_grad():
        gate.time[0].weight.fill_(1.0)
        gate.time[2].weight.copy_(torch.tensor([[[1.0, 0.0, 2.0]]]))
    found, channel, time = gate(torch.ones(1, 1, 3), torch.tensor([[[0.1, 0.5, 0.3]]]))
    assert channel is None
    expected = torch.tensor([0.1 + 2 * 0.5, 0.1 + 2 * 0.3, 0.5 + 2 * 0.3]).sigmoid()
    torch.testing.assert_close(time[0, 0], expected)
    torch.testing.assert_close(found[0, 0], expected)


def test_limits():
    features, scores = torch.randn(2, 8, 7), torch.randn(2, 4, 7).softmax(1)
    gate = ClassSemanticsAttention(8, 4)
    start = gate(features, scores)[0] / features
    assert start.min() > 0.6  # nearly open
    constant = gate(features, scores[:, :, :1].expand(-1, -1, 7))[2]
    torch.testing.assert_close(constant, constant[:, :, :1].expand_as(constant))
    assert gate(features, scores)[2].std() > 0
    by_channel = ClassSemanticsAttention(8, 4, over="channel")
    torch.testing.assert_close(by_channel(features, scores.roll(3, 2))[0], by_channel(features, scores)[0])
    both = ClassSemanticsAttention(8, 4, residual=True)
    both.load_state_dict(gate.state_dict())
    torch.testing.assert_close(both(features, scores)[0], features + gate(features, scores)[0])
    _zero(gate)
    torch.testing.assert_close(gate(features, scores)[0], features / 4)
    assert ClassSemanticsAttention(8, 4, reduction=1).channel[0].out_features == 4
    assert ClassSemanticsAttention(8, 4, reduction=9).channel[0].out_features == 1


def test_the_classifier_is_not_trained_through_the_gate():
    features, scores = torch.randn(2, 8, 7, requires_grad=True), torch.rand(2, 4, 7, requires_grad=True)
    gate = ClassSemanticsAttention(8, 4)
    gate(features, scores)[0].sum().backward()
    assert scores.grad is None
    assert features.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gate.parameters())


def test_squeeze_and_excitation_by_hand():
    excite = SqueezeExcitation(2)
    _zero(excite)
    with torch.no_grad():
        excite.layers[0].weight.copy_(torch.tensor([[1.0, 0.0]]))
        excite.layers[2].weight[1] = math.log(3)
    found = excite(torch.tensor([[[0.0, 2.0], [4.0, 8.0]]]))
    torch.testing.assert_close(found, torch.tensor([[[0.0, 1.0], [3.0, 6.0]]]))


def test_both_is_the_product_of_both_gates():
    models = {of: class_semantics(attention=of, pairs=False, **SIZES) for of in (None, "se", "class", "both")}
    for model in models.values():
        model.load_state_dict(models["both"].state_dict(), strict=False)
    features, scores = torch.randn(2, 6, 9), torch.rand(2, 4, 9)
    seen = {}
    for of, model in models.items():
        model.bounds.register_forward_pre_hook(lambda _, x, of=of: seen.update({of: x[0]}))
        model(features, scores)
    torch.testing.assert_close(seen["both"] * seen[None], seen["se"] * seen["class"])
    assert len({round(float(x.detach().sum()), 4) for x in seen.values()}) == 4


@pytest.mark.parametrize("of", ["se", "both"])
@pytest.mark.parametrize("pairs", [True, False])
def test_padding_is_not_there_and_rows_are_apart(pairs, of):
    model = class_semantics(pairs=pairs, attention=of, **SIZES)
    features, scores = torch.randn(1, 6, 9), torch.rand(1, 4, 9)
    found = model(features, scores)
    for filling in (1e3, torch.nan):
        more = torch.cat([features, torch.full((1, 6, 4), filling)], 2)
        said = torch.cat([scores, torch.full((1, 4, 4), filling)], 2)
        both = [torch.cat([x, torch.randn_like(x)]) for x in (more, said)]
        mask = torch.arange(13) < torch.tensor([[9], [13]])
        padded = model(*both, mask)
        for name, one in found._asdict().items():
            if one is not None:
                other = getattr(padded, name)[:1]
                cut = other[:, :, :9] if name in ("pairs", "time") else other if name == "channel" else other[:, :9]
                torch.testing.assert_close(cut, one, msg=name)


def test_points_of_a_pair_by_hand():
    model = class_semantics(features=1, classes=1, width=1, longest=2, samples=3)
    points = model._sampled(torch.tensor([[[1.0, 2.0, 4.0]]]))
    assert points[0, 0].tolist() == [[1, 1.5, 2], [1, 2, 4]]
    assert points[0, 2].tolist() == [[4, 2, 0], [4, 0, 0]]  # nothing beyond the end


def test_loss_by_hand_and_training():
    zero = torch.zeros(1, 4)
    found = Localised(zero, zero, zero, None, None, None)
    loss = localiser_loss(found, [torch.tensor([[0, 2]])])
    torch.testing.assert_close(loss, torch.tensor(3 * math.log(2)))
    sure = torch.tensor([[9.0, 9, -9, -9]])
    inside = localiser_loss(Localised(zero, zero, sure, None, None, None), [torch.tensor([[0, 2]])])
    torch.testing.assert_close(inside, torch.tensor(2 * math.log(2) + math.log1p(math.exp(-9))))
    pairs = torch.zeros(1, 2, 4, 3)
    more = localiser_loss(found._replace(inside=None, pairs=pairs), [torch.tensor([[0, 2]])])
    # durations 1, 2, 3 of start 0 overlap by 1/2, 1, 2/3; of start 1 by 1/2, 1/3 and 1/4; 2 and 3 by none
    aim = torch.tensor([1 / 2, 1, 2 / 3, 1 / 2, 1 / 3, 1 / 4, 0, 0, 0])
    torch.testing.assert_close(more, 3 * torch.tensor(math.log(2)) + (0.5 - aim).square().mean())
    assert localiser_loss(found, [torch.empty(0, 2)]).isfinite()

    model = class_semantics(pairs=True, **SIZES)
    features, scores, actions = torch.randn(4, 6, 12), torch.rand(4, 4, 12), [torch.tensor([[2, 6], [7, 10]])] * 4
    optimiser, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(30):
        optimiser.zero_grad()
        losses.append(localiser_loss(model(features, scores), actions))
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.6 * losses[0]


def test_proposals_by_hand():
    start, end = torch.full((2, 1, 6), -9.0)
    start[0, 1], end[0, 3], end[0, 5] = 0.0, 0.0, math.log(3)
    inside = torch.tensor([[-99.0, 99, 99, 99, -99, -99]])
    ((stretches, scores),) = proposals(Localised(start, end, inside, None, None, None), longest=5, above=0.6)
    assert stretches.tolist() == [[1, 4], [1, 6]]
    first, second = 0.5 * 0.5, 0.5 * 0.75 * 3 / 5
    torch.testing.assert_close(scores, torch.tensor([first, second * math.exp(-(0.6**2) / 0.4)]))
    ((few, _),) = proposals(Localised(start, end, inside, None, None, None), longest=3, above=0.6)
    assert few.tolist() == [[1, 4]]
    cut = proposals(
        Localised(start, end, inside, None, None, None), longest=5, above=0.6, mask=torch.arange(6)[None] < 5
    )
    assert cut[0][0].tolist() == [[1, 4]]
    pairs = torch.zeros(1, 2, 6, 5)
    pairs[0, 1, 1, 2] = math.log(3)
    ((_, scores),) = proposals(Localised(start, end, None, pairs, None, None), longest=3, above=0.6)
    torch.testing.assert_close(scores, torch.tensor([0.25 * 0.5 * 0.75]))


def test_overlap_by_hand():
    found = overlap(torch.tensor([[0.0, 4.0]]), torch.tensor([[2.0, 6.0], [4.0, 5.0], [0.0, 4.0]]))
    torch.testing.assert_close(found, torch.tensor([[1 / 3, 0.0, 1.0]]))


def test_save_and_load(tmp_path):
    model = class_semantics(over="time", residual=True, samples=4, **SIZES)
    model.save_pretrained(tmp_path)
    features, scores = torch.randn(2, 6, 9), torch.rand(2, 4, 9)
    found, again = (m(features, scores) for m in (model, Localiser.from_pretrained(tmp_path)))
    torch.testing.assert_close(again.pairs, found.pairs)
    assert model.bfloat16()(features.bfloat16(), scores.bfloat16()).pairs.isfinite().all()


def test_refusals():
    gate = ClassSemanticsAttention(8, 4)
    with pytest.raises(ValueError, match=r"of the features' length, here \[2, 4, 7\]; got \[2, 4, 6\]"):
        gate(torch.randn(2, 8, 7), torch.rand(2, 4, 6))
    with pytest.raises(ValueError, match=r"features are \[batch, 8, time\]"):
        gate(torch.randn(2, 6, 7), torch.rand(2, 4, 7))
    with pytest.raises(ValueError, match="over is one of"):
        ClassSemanticsAttention(8, 4, over="class")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="filled up at its end"):
        gate(torch.randn(1, 8, 2), torch.rand(1, 4, 2), torch.tensor([[False, True]]))
    with pytest.raises(ValueError, match="a mask is boolean"):
        gate(torch.randn(1, 8, 2), torch.rand(1, 4, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="give them, or attention=None"):
        class_semantics(**SIZES)(torch.randn(1, 6, 9))
    with pytest.raises(ValueError, match='attention is None, "se"'):
        class_semantics(**SIZES | {"attention": "sse"})
    with pytest.raises(ValueError, match="longest is 1 or more"):
        class_semantics(**SIZES | {"longest": 0})


def test_proposals_are_no_longer_than_what_was_judged():
    found = class_semantics(**SIZES)(torch.randn(2, 6, 20), torch.randn(2, 4, 20).softmax(1))
    for (stretches, scores), (own, same) in zip(proposals(found, above=0.0), proposals(found, above=0.0, longest=5)):
        assert torch.equal(stretches, own)
        assert torch.equal(scores, same)
        assert float((stretches[:, 1] - stretches[:, 0]).max()) == 5
        assert not scores.requires_grad


def test_no_videos_and_what_is_not_of_them():
    model, scores = class_semantics(**SIZES), torch.randn(2, 4, 9).softmax(1)
    found = model(torch.randn(2, 6, 9), scores)
    assert localiser_loss(Localised(*(None if x is None else x[:0] for x in found)), []) == 0
    for actions in ([torch.zeros(1, 2)], [torch.zeros(2)] * 2, [torch.zeros(1, 3)] * 2):
        with pytest.raises(ValueError, match="of each of 2 videos"):
            localiser_loss(found, actions)
    with pytest.raises(ValueError, match="sigma above 0"):
        proposals(found, sigma=0.0)
    with pytest.raises(ValueError, match="reduction are 1 or more"):
        ClassSemanticsAttention(8, 4, reduction=0)
    with pytest.raises(ValueError, match="reduction of the gate by classes, which attention='se' has not"):
        class_semantics(**SIZES, attention="se", reduction=4)
