"""A recurrence over frames: what frames see of each other, cells by hand, and the gradient in a stream."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regard
from regard.models.recurrence_complete import (
    FrameActionModel,
    FrameConfig,
    FrameHead,
    recurrence_complete,
    streamed_backward,
)

SIZES = {"rows": 4, "columns": 8, "dim": 8, "heads": 2, "layers": 2, "actions": 3, "vocabulary": 9, "downsample": 1}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def cells(batch: int = 2, frames: int = 5) -> torch.Tensor:
    found = torch.randint(9, (batch, frames, 4, 8, 3))
    found[..., 1:] = torch.randint(0x1000000, found[..., 1:].shape)
    return found


def test_cells_by_hand():
    head = FrameHead(FrameConfig(**SIZES))
    with torch.no_grad():
        head.positions.zero_()
    black = torch.zeros(1, 4, 8, 3).long()
    black[..., 0] = 9  # beyond the vocabulary
    assert not head.embed(black).any()
    white, reddish = black.clone(), black.clone()
    white[..., 1] = 0xFFFFFF
    torch.testing.assert_close(head.embed(white)[0, 0, 0], head.ink.sum(0))
    reddish[..., 2] = 0x330000
    reddish[..., 0] = 4
    torch.testing.assert_close(head.embed(reddish)[0, 2, 3], head.characters[4] + 0.2 * head.ground[0])


def test_frames_are_encoded_apart_and_read_in_order():
    model, one = recurrence_complete(**SIZES), cells()
    other = one.clone()
    other[:, 2] = cells()[:, 2]
    frames, changed = model.head(one), model.head(other)
    keep = [0, 1, 3, 4]
    torch.testing.assert_close(changed[:, keep], frames[:, keep])
    assert not torch.allclose(changed[:, 2], frames[:, 2])
    before, after = model(one), model(other)
    torch.testing.assert_close(after[:, :2], before[:, :2])
    assert (after[:, 2:] != before[:, 2:]).any(-1).all()


def test_a_block_is_pre_norm_and_cells_see_all_cells():
    head, x = FrameHead(FrameConfig(**SIZES)), torch.randn(2, 6, 8)
    block = head.blocks[0]
    query, key, value = (t.view(2, 6, 2, 4).transpose(1, 2) for t in block.attention.maps(block.norm(x)).chunk(3, -1))
    mixed = ((query @ key.mT / 2).softmax(-1) @ value).transpose(1, 2).flatten(2)
    y = x + block.attention.out(mixed)
    torch.testing.assert_close(block(x), y + block.mlp(block.norm_mlp(y)))


def test_the_last_cell_or_the_mean():
    for reduction in ("last_pos", "mean"):
        head, frame = FrameHead(FrameConfig(**SIZES, reduction=reduction)), cells(1, 1)[0]
        x = head.blocks(head.halved(head.embed(frame)).flatten(1, 2))
        torch.testing.assert_close(head(frame), x[:, -1] if reduction == "last_pos" else x.mean(1))


@pytest.mark.parametrize("conv", ["dilated", "geglu"])
def test_streamed_gradients_are_the_plain_ones(conv):
    model, frames, target = recurrence_complete(**SIZES, conv=conv).double(), cells(), torch.randint(3, (2, 5))

    def loss(logits):
        return F.cross_entropy(logits.mT, target)

    plain = loss(model(frames))
    plain.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    torch.testing.assert_close(streamed_backward(model, frames, loss), plain.detach())
    assert all(p.grad is not None for p in model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_sequence_in_two_halves():
    model, given = recurrence_complete(**SIZES), cells(frames=6)
    first, state = model.read(model.head(given[:, :2]))
    torch.testing.assert_close(torch.cat([first, model(given[:, 2:], state)], 1), model(given))


def test_a_head_of_one_s_own():
    model = FrameActionModel(FrameConfig(**SIZES), head=nn.Embedding(4, 8))
    assert model(torch.randint(4, (2, 7))).shape == (2, 7, 3)


def test_record_sees_cells_of_each_frame():
    model = recurrence_complete(**SIZES)
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        model(cells(2, 3))
    (entropy,) = (node["entropy"] for node in recording.tree.subtree if "entropy" in node)
    assert dict(entropy.sizes) == {"batch": 6, "layer": 2, "head": 2, "query": 8}


def test_saved_and_loaded(tmp_path):
    model, given = recurrence_complete(**SIZES), cells()
    model.save_pretrained(tmp_path)
    assert torch.equal(FrameActionModel.from_pretrained(tmp_path)(given), model(given))


def test_refusals():
    with pytest.raises(ValueError, match="6 rows and 8 columns do not divide by 4"):
        recurrence_complete(rows=6, columns=8)
    with pytest.raises(ValueError, match=r"cells are numbers \[..., 4, 8, 3\]; got torch.int64 \[10, 8, 4, 3\]"):
        recurrence_complete(**SIZES)(cells().transpose(2, 3))
    with pytest.raises(ValueError, match="reduction last_pos or mean; got dilated, first"):
        FrameConfig(reduction="first")
    with pytest.raises(ValueError, match="of a frame or more"):
        recurrence_complete(**SIZES)(cells()[0, 0])
    with pytest.raises(ValueError, match="one or more; got"):
        recurrence_complete(**SIZES)(cells()[:, :0])
