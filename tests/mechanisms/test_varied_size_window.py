"""Windows of learned size and place: plain ones at the start, moves and sizes by hand, borders, conversion and back."""

from __future__ import annotations

import pytest
import torch
from families import VISION, build, pixels
from torch import nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

import regard
from regard.mechanisms.varied_size_window import VariedSizeWindow, coordinates, cost, sample_window, varied_size_window


def picture(rows=6, columns=9, dim=8):
    return torch.randn(2, dim, rows, columns, dtype=torch.float64)


def test_starts_as_plain_windows():
    """Swin's attention, place by place; tokens beyond the border are zeros that are seen."""
    layer = VariedSizeWindow(8, 2, window=4).double()
    x = picture(7, 9)
    query, key, value = F.pad(layer.qkv(x), (0, 3, 0, 1)).unflatten(1, (3, 2, 4)).unbind(1)
    right = torch.zeros(2, 8, 8, 12, dtype=torch.float64)
    for r in range(0, 8, 4):
        for c in range(0, 12, 4):
            q, k, v = (t[..., r : r + 4, c : c + 4].flatten(3).mT for t in (query, key, value))
            bias = torch.zeros(2, 16, 16, dtype=torch.float64)
            for i in range(16):
                for j in range(16):
                    apart = (i // 4 - j // 4 + 3) * 7 + i % 4 - j % 4 + 3
                    bias[:, i, j] = layer.bias[apart].detach()
            mixed = (q @ k.mT / 2 + bias).softmax(-1) @ v
            right[..., r : r + 4, c : c + 4] = mixed.mT.flatten(1, 2).unflatten(-1, (4, 4))
    torch.testing.assert_close(layer(x), layer.proj(right[..., :7, :9]))


def test_a_window_to_the_right():
    """A move of 2 w / (columns - 1), times the number of windows, reads the next window."""
    at = torch.zeros(1, 1, 2, 3, 2, dtype=torch.float64)
    still = coordinates(at, at, shape=(8, 12), window=4)
    move = at.clone()
    move[..., 0] = 3 * 2 * 4 / 11
    moved = coordinates(move, at, shape=(8, 12), window=4)
    torch.testing.assert_close(moved[:, :, :, :8], still[:, :, :, 4:])
    torch.testing.assert_close(still[0, 0, :, 0, 1], torch.linspace(-1, 1, 8, dtype=torch.float64))


def test_rectangles_in_pixels():
    """A scale of 1 reads every second pixel around the middle: from -1.5 to 4.5 in place of 0 to 3."""
    layer = VariedSizeWindow(4, 1, window=4).double()
    x = picture(8, 8, 4)
    assert layer.rectangles(x)[0, 0, 1, 0].tolist() == pytest.approx([4, 7, 0, 3])
    layer.scales.bias.data[:] = torch.tensor([1.0, 0.0])  # columns, rows
    assert layer.rectangles(x)[0, 0, 1, 0].tolist() == pytest.approx([4, 7, -1.5, 4.5])


def test_outside_is_zero_but_seen():
    """Moved out of the picture, keys and values are zeros: scores are the bias alone, and the output is zero."""
    parts = [torch.randn(1, 1, 2, 2, 3, dtype=torch.float64) for _ in range(3)]
    far = torch.full((1, 1, 1, 1, 2), 10.0, dtype=torch.float64)
    assert not sample_window(*parts, far, 0 * far, shape=(2, 2), window=2).any()


def test_between_pixels():
    """Half a pixel to the right: the mean of two, whose key and value count as one token."""
    value = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64)[None, None, None, :, None]
    zero = torch.zeros(1, 1, 1, 4, 2, dtype=torch.float64)
    move = zero.clone()
    move[..., 0] = 4 * 0.5 * 2 / 3
    found = sample_window(0 * value, 0 * value, value, move, zero, shape=(1, 4), window=1)
    assert found.flatten().tolist() == pytest.approx([2, 4, 6, 3.5])


def test_gradients_reach_what_predicts():
    layer = VariedSizeWindow(4, 2, window=3, out_dim=6).double()
    for module in (layer.offsets, layer.scales):
        nn.init.normal_(module.weight, std=0.3)
    x = picture(5, 7, 4).requires_grad_()
    output = layer(x)
    assert output.shape == (2, 6, 5, 7)
    output.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    step = 1e-6
    with torch.no_grad():
        for parameter in (layer.offsets.weight, layer.scales.bias):
            at, grad = (t.flatten()[1:2] for t in (parameter, parameter.grad))
            at += step
            above = layer(x).square().sum()
            at -= 2 * step
            below = layer(x).square().sum()
            at += step
            assert float((above - below) / (2 * step)) == pytest.approx(float(grad), rel=1e-4)


def test_a_converted_model():
    """One window as large as the picture, no bias: the model itself; with smaller ones it trains, and is recorded."""
    torch.manual_seed(0)
    model, inputs = SiglipVisionModel(SiglipVisionConfig(**VISION)).eval(), pixels()
    output = model(**inputs).last_hidden_state.detach()
    undo = varied_size_window(model, shape=(4, 4), window=4, bias=False)
    torch.testing.assert_close(model(**inputs).last_hidden_state, output, atol=1e-4, rtol=1e-4)
    undo()
    undo = varied_size_window(model, shape=(4, 4), window=2)
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        found = model(**inputs).last_hidden_state
    assert not torch.allclose(found, output)
    node = recording.tree["encoder"]["entropy"]
    assert (node.sizes["layer"], node.sizes["batch"], node.sizes["query"]) == (2, 8, 4)
    model(**inputs).last_hidden_state.square().mean().backward()
    undo()
    assert torch.equal(model(**inputs).last_hidden_state, output)


def test_cost():
    assert cost(100, 8, window=4).operations == 100 * 8 * (4 * 16 + 16)


def test_refusals():
    with pytest.raises(ValueError, match="do not share"):
        VariedSizeWindow(7, 2)
    with pytest.raises(ValueError, match="VariedSizeWindow: was made for 4 channels"):
        VariedSizeWindow(4, 2)(torch.randn(1, 6, 8, 8))
    with pytest.raises(ValueError, match="as many rows and columns as a window"):
        VariedSizeWindow(4, 2, window=7)(torch.randn(1, 4, 5, 8))
    model, inputs = build("vit")
    varied_size_window(model, shape=(4, 4), window=2)
    with pytest.raises(ValueError, match="class token"):
        model(**inputs)
