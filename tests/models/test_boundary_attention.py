"""Boundary attention: a junction by hand, what patches see together, and the windows of the local attention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from regard.models.boundary_attention import (
    BoundaryAttention,
    LocalAttention,
    TiedConvolution,
    assemble,
    boundary_attention,
    boundary_loss,
    fold,
    gather,
    junction,
    masks,
    render,
)

SMALL = {"size": 5, "sides": (3, 3, 5), "width": 8, "state": 4, "window": 3, "heads": 2, "blocks": 1, "iterations": 2}
THIRD = 2 * math.pi / 3


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def _one(angle=0.0, openings=(THIRD, THIRD, THIRD), vertex=(0.0, 0.0)):
    return torch.tensor([math.cos(angle), math.sin(angle), *openings, *vertex]).view(1, 1, 1, 7)


def test_a_junction_by_hand():
    found = render(_one(), size=17)
    at = (0, slice(None), 8, 12, 0, 0)  # u = 0.5, v = 0, on the first boundary
    torch.testing.assert_close(found.wedges[at], torch.tensor([0.5, 0.0, 0.5]), atol=1e-3, rtol=0)
    assert found.boundary[at] == pytest.approx(1)
    assert found.distance[at] == pytest.approx(0, abs=1e-4)
    behind = (0, slice(None), 8, 4, 0, 0)  # u = -0.5: boundaries are at 120 degrees to either side
    assert found.distance[behind].item() == pytest.approx(0.5 * math.sin(math.pi / 3) * 8.5, abs=1e-3)
    torch.testing.assert_close(found.wedges[behind], torch.tensor([0.0, 1.0, 0.0]), atol=1e-3, rtol=0)
    below = (0, slice(None), 12, 8, 0, 0)  # v = 0.5 lies below, at 90 degrees, within the first wedge
    torch.testing.assert_close(found.wedges[below], torch.tensor([1.0, 0.0, 0.0]), atol=1e-3, rtol=0)


def test_turning_by_a_wedge_changes_their_order_alone():
    vertex = (0.13, -0.21)
    found, turned = render(_one(0.3, vertex=vertex)), render(_one(0.3 + THIRD, vertex=vertex))
    torch.testing.assert_close(turned.wedges, found.wedges.roll(-1, 1), atol=2e-3, rtol=0)
    torch.testing.assert_close(turned.distance, found.distance, atol=1e-3, rtol=0)


def test_any_seven_numbers_are_a_junction():
    found = junction(3 * torch.randn(2, 4, 5, 7))
    torch.testing.assert_close(found[..., :2].norm(dim=-1), torch.ones(2, 4, 5))
    torch.testing.assert_close(found[..., 2:5].sum(-1), torch.full((2, 4, 5), 2 * math.pi))
    rendered = render(found, size=7)
    torch.testing.assert_close(rendered.wedges.sum(1), torch.ones(2, 7, 7, 4, 5))


def test_patches_of_a_picture_fold_to_it():
    picture = torch.randn(2, 3, 9, 8)
    patches = gather(picture, 3)
    torch.testing.assert_close(patches[1, :, 2, 0, 4, 5], picture[1, :, 6, 5])
    torch.testing.assert_close(fold(patches) / fold(torch.ones_like(patches)), picture)


def test_a_flat_picture_stays_flat_whatever_the_junctions():
    shares = torch.randn(2, 5, 4, 3).softmax(-1)
    rendered = render(junction(torch.randn(2, 5, 4, 7)), size=5)
    found = assemble(rendered, torch.full((2, 1, 9, 8), 0.7), masks(shares, 5, (3, 3, 5)))
    torch.testing.assert_close(found.picture, torch.full((2, 1, 9, 8), 0.7), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.patches, torch.full((2, 1, 5, 5, 5, 4), 0.7), atol=1e-3, rtol=0)


def test_masks_by_hand():
    found = masks(torch.tensor([0.5, 0.3, 0.2]).view(1, 1, 1, 3), 5, (1, 3, 5))[0, 0, :, :, 0, 0]
    expected = torch.full((5, 5), 0.2 / 3)
    expected[1:4, 1:4] = 0.5 / 3
    expected[2, 2] = 1 / 3
    torch.testing.assert_close(found, expected)


def test_local_attention_reads_its_window():
    model, hidden, proposals = LocalAttention(8, 6, window=3, heads=2, layers=1, hidden=8), *_states()
    found, (weights,) = model(hidden, proposals)
    layer, batch, row, column = model.layers[0], 1, 0, 3  # at the upper side, so that three keys lie outside
    keys, inside = [], []
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            r, c = row + dy, column + dx
            inside.append(0 <= r < 4 and 0 <= c < 5)
            keys.append((proposals[batch, r, c] if inside[-1] else torch.zeros(6)) + model.places[dy + 1, dx + 1])
    read, query = torch.stack(keys), layer.query(hidden[batch, row, column])
    mixed = []
    for head, part in enumerate((slice(0, 4), slice(4, 8))):
        scores = layer.key(read)[:, part] @ query[part] / 2
        scores[~torch.tensor(inside)] = -torch.inf
        torch.testing.assert_close(weights[batch, head, row, column], scores.softmax(0))
        mixed.append(scores.softmax(0) @ layer.value(read)[:, part])
    state = layer.norms[0](hidden[batch, row, column] + layer.output(torch.cat(mixed)))
    torch.testing.assert_close(found[batch, row, column], layer.norms[1](state + layer.mlp(state)))


def _states():
    return torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 6)


def test_channels_of_a_tied_convolution_share_their_kernel():
    tied, x = TiedConvolution(3), torch.randn(2, 6, 5, 4)
    weight = tied.convolution.weight.expand(-1, 4, -1, -1)
    expected = torch.nn.functional.conv2d(x.movedim(-1, 1), weight, tied.convolution.bias, padding=1)
    torch.testing.assert_close(tied(x), expected.movedim(1, -1))


def test_pictures_do_not_meet_saved_is_loaded_and_it_trains(tmp_path):
    model = boundary_attention(channels=1, **SMALL)
    pictures, distance = torch.rand(2, 1, 9, 11), 3 * torch.rand(2, 1, 9, 11)
    found = model(pictures)
    torch.testing.assert_close(model(pictures[1:])[-1].picture, found[-1].picture[1:], atol=1e-4, rtol=1e-3)
    model.save_pretrained(tmp_path)
    again = BoundaryAttention.from_pretrained(tmp_path)(pictures)
    torch.testing.assert_close(again[-1].distance, found[-1].distance)
    boundary_loss(found, pictures, distance).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


def test_gradient_of_a_vertex_on_a_pixel_is_finite():
    at = _one().requires_grad_()
    render(at, size=5).distance.sum().backward()
    assert at.grad.isfinite().all()


def test_loss_weighs_the_last_output_most_and_falls_in_a_few_steps():
    model = boundary_attention(channels=1, **SMALL)
    picture = torch.zeros(1, 1, 12, 12)
    picture[..., 6:] = 1
    distance = (torch.arange(12.0) - 5.5).abs().expand(1, 1, 12, 12)
    optimiser, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(40):
        optimiser.zero_grad()
        loss = boundary_loss(model(picture), picture, distance)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert min(losses[-10:]) < 0.8 * losses[0]
    outputs = model(picture)
    both, last = boundary_loss(outputs, picture, distance), boundary_loss(outputs[-1:], picture, distance)
    before = boundary_loss(outputs[-2:-1], picture, distance)
    torch.testing.assert_close(both, (0.3 * before + last) / 1.3)


def test_loss_is_the_sum_of_its_six_errors():
    model = boundary_attention(channels=1, **SMALL)
    noisy, clean, distance = torch.rand(1, 1, 9, 8), torch.rand(1, 1, 9, 8), 4 * torch.rand(1, 1, 9, 8)
    found = model(noisy)[-1]

    def near(row, column):
        return math.exp(-0.1 * (distance[0, 0, row, column].item() + 1))

    whole = np.zeros(2)
    for row, column in np.ndindex(9, 8):
        at = (0, 0, row, column)
        errors = [found.distance[at] - distance[at], found.picture[at] - clean[at]]
        whole += [near(row, column) * error.item() ** 2 for error in errors]
    patches = np.zeros(4)
    for i, j, row, column in np.ndindex(5, 5, 5, 4):
        at, own = (0, 0, row + i, column + j), (0, 0, i, j, row, column)
        errors = [
            found.rendered.distance[own] - distance[at],
            found.patches[own] - clean[at],
            found.rendered.boundary[own] - found.boundary[at],
            found.patches[own] - found.picture[at],
        ]
        weight = near(row + i, column + j) * found.mask[own].item()
        patches += [weight * error.item() ** 2 for error in errors]
    expected = whole @ (1e-3, 1.0) / 72 + patches @ (1e-3, 1.0, 1e-2, 20.0) / 500
    assert boundary_loss([found], clean, distance).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: boundary_attention(size=8, sides=(3, 5, 7)), "odd side"),
        (lambda: boundary_attention(size=7, sides=(3, 5, 9)), "9 or more"),
        (lambda: LocalAttention(8, 6, window=4), "its side is odd"),
        (lambda: LocalAttention(9, 6, window=3, heads=2), "9 channels do not divide by 2"),
        (lambda: boundary_attention(**SMALL)(torch.rand(1, 3, 4, 9)), "5 pixels a side or more"),
        (lambda: boundary_attention(**SMALL)(torch.rand(1, 4, 9, 9)), r"\[batch, 3, row, column\]"),
        (lambda: render(torch.rand(1, 7)), r"junctions \[batch, row, column, 7\]"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()
