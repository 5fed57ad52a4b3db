"""MotionCLR: edits by hand and where they change nothing, texts that are dropped, sampling, files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import regard
from regard.models.motionclr import (
    Emphasise,
    Erase,
    Example,
    MotionAttention,
    MotionCLR,
    Replace,
    Shift,
    Style,
    denoising_loss,
    generate,
    motionclr,
)

pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def model() -> MotionCLR:
    made = motionclr(3, 5, dim=8, multipliers=(1, 2), time_dim=8, heads=2, text_dim=8, text_layers=1).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return made


@pytest.fixture
def words() -> torch.Tensor:
    return torch.randn(2, 6, 5)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = MotionAttention(8, 2), MotionAttention(8, 2, words=5)

    def forward(self, kind: str, *given: torch.Tensor) -> torch.Tensor:
        return getattr(self, f"{kind}_attention")(*given)


@torch.no_grad()
def under(modules: nn.Module, kind: str, *given: torch.Tensor, edits=()) -> torch.Tensor:
    with regard.intervene(modules, *edits):
        return modules(kind, *given)


def test_emphasis_by_hand():
    # two keys of equal weight, values 1 and 3: 0.5 + 0.7 * 3 = 2.6, not renormalised
    module = MotionAttention(1, 1, words=1)
    module.norm_words = nn.Identity()
    for part in (module.query, module.key):
        nn.init.zeros_(part.weight)
    module.value = nn.Linear(1, 1)
    nn.init.ones_(module.value.weight)
    nn.init.zeros_(module.value.bias)
    holder = Both()
    holder.cross_attention = module
    given = torch.randn(1, 2, 1), torch.tensor([[[1.0], [3.0]]])
    torch.testing.assert_close(under(holder, "cross", *given), torch.full((1, 2, 1), 2.0))
    found = under(holder, "cross", *given, edits=[Emphasise([1], 0.2)])
    torch.testing.assert_close(found, torch.full((1, 2, 1), 2.6))


def test_edits_that_change_nothing():
    modules, x, words = Both(), torch.randn(2, 8, 8), torch.randn(1, 6, 5).expand(2, -1, -1)
    plain = under(modules, "cross", x, words)
    for edit in (Emphasise([1], 0.0), Erase([1], factor=1.0), Emphasise([1], 9.0, first=1), Style()):
        torch.testing.assert_close(under(modules, "cross", x, words, edits=[edit]), plain)
    same = x[:1].expand(2, -1, -1)
    torch.testing.assert_close(under(modules, "self", same, edits=[Replace([2])]), under(modules, "self", same))
    torch.testing.assert_close(under(modules, "self", same, edits=[Style()]), under(modules, "self", same))


def test_a_shift_there_and_back():
    modules, x = Both(), torch.randn(1, 8, 8).expand(2, -1, -1)
    plain = under(modules, "self", x)
    found = under(modules, "self", x, edits=[Shift(0.25)])
    torch.testing.assert_close(found[0], plain[0])
    torch.testing.assert_close(found[1], plain[0].roll(-2, 0))
    twice = under(modules, "self", torch.stack([x[0].roll(-2, 0)] * 2), edits=[Shift(0.75)])
    torch.testing.assert_close(twice[1], plain[0])


def test_erasing_is_of_one_row_and_of_its_frames():
    modules, x, words = Both(), torch.randn(2, 8, 8), torch.randn(2, 6, 5)
    changed = (under(modules, "cross", x, words, edits=[Erase([2])]) - under(modules, "cross", x, words)).abs().amax(-1)
    assert changed[0].max() < 1e-6
    assert (changed[1, :4] < 1e-6).all()
    assert (changed[1, 4:] > 1e-4).all()


def test_replacement_takes_all_but_the_word():
    modules, x, words = Both(), torch.randn(2, 8, 8), torch.randn(2, 6, 5)

    def weights(edits) -> torch.Tensor:
        with torch.no_grad(), regard.intervene(modules, *edits), regard.record(modules, "rows") as recording:
            modules("cross", x, words)
        (stack,) = (node for node in recording.tree.subtree if "rows" in node)
        return torch.tensor(stack["rows"].values).reshape(2, 2, 8, 6)

    plain, found = weights([]), weights([Replace([2])])
    torch.testing.assert_close(found[0], plain[0])
    torch.testing.assert_close(found[1, ..., 2], plain[1, ..., 2])
    torch.testing.assert_close(found[1, ..., [0, 1, 3, 4, 5]], plain[0, ..., [0, 1, 3, 4, 5]])


def test_examples_are_row_0_in_another_order(model, words):
    modules, x = Both(), torch.randn(1, 8, 8).expand(3, -1, -1)
    edit = Example(chunk=2, rows=3, at=0)
    plain, found = under(modules, "self", x), under(modules, "self", x, edits=[edit])
    torch.testing.assert_close(found[0], plain[0])
    for row in (1, 2):
        assert sorted(found[row, :, 0].tolist()) == pytest.approx(sorted(plain[0, :, 0].tolist()), abs=1e-5)
    assert not torch.allclose(found[1], found[2])


def test_without_a_text_no_word_is_read(model, words):
    model, words = model.double(), words.double()
    motion, step = torch.randn(2, 10, 3).double(), torch.tensor([5, 700])
    with torch.no_grad():
        whole = model(motion, step, words)
        mixed = model(motion, step, words, torch.tensor([True, False]))
        other = model(motion, step, torch.randn_like(words), torch.tensor([True, False]))
        none = model(motion, step, words, torch.zeros(2, dtype=torch.bool))
    torch.testing.assert_close(mixed[0], whole[0])
    torch.testing.assert_close(other[1], mixed[1])
    assert not torch.allclose(none[1], mixed[1])  # where no row has a text, frames do not look at each other either
    torch.testing.assert_close(model(motion[1:], step[1:], words[1:]), whole[1:])


def test_starts_from_nothing_and_learns():
    model = motionclr(3, 5, dim=8, multipliers=(1,), time_dim=8, heads=2, text_dim=8, text_layers=0)
    motion, words = torch.randn(4, 6, 3), torch.randn(4, 3, 5)
    assert (model(motion, torch.tensor([1, 2, 3, 4]), words) == 0).all()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = denoising_loss(model, motion, words)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:, 0] = True
    motion[:, 1:] = 1e4
    assert denoising_loss(model, motion.clamp(max=3), words, mask) < 1e3


def test_generation_shares_its_noise_and_edits_act_in_their_steps(model, words):
    same = words[:1].expand(2, -1, -1)
    plain = generate(model, same, 8, steps=3)
    assert plain.shape == (2, 8, 3)
    near: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-2}  # sampling makes rounding larger
    torch.testing.assert_close(plain[0], plain[1], **near)
    edited = generate(model, same, 8, steps=3, edits=[Emphasise([1], 0.5, row=1)])
    torch.testing.assert_close(edited[0], plain[0], **near)
    assert (edited[1] - plain[1]).abs().max() > 0.1
    late = generate(model, same, 8, steps=3, edits=[Emphasise([1], 0.5, row=1, first=3)])
    torch.testing.assert_close(late, plain, **near)
    assert not torch.allclose(generate(model, same, 8, steps=3, seed=1), plain)


def test_saves_and_loads(model, words, tmp_path):
    model.save_pretrained(tmp_path)
    given = torch.randn(2, 7, 3), torch.tensor([5, 700]), words
    with torch.no_grad():
        torch.testing.assert_close(MotionCLR.from_pretrained(tmp_path).eval()(*given), model(*given))


def test_refusals(model, words):
    with pytest.raises(ValueError, match=r"motions \[batch, frame, 3\].*got \[2, 8, 4\] and \[2, 6, 5\]"):
        model(torch.randn(2, 8, 4), torch.tensor([1, 2]), words)
    with pytest.raises(ValueError, match="8 channels do not divide by 3 heads"):
        MotionAttention(8, 3)
    for edit, kind in ((Shift(), "self"), (Style(), "self"), (Replace([1]), "cross"), (Erase([1]), "cross")):
        given = (torch.randn(1, 8, 8), torch.randn(1, 6, 5))[: 1 + (kind == "cross")]
        with pytest.raises(ValueError, match="row 1 is edited; got a batch of one"):
            under(Both(), kind, *given, edits=[edit])
    with pytest.raises(ValueError, match=r"9 frames do not divide at a share of 0.5"):
        under(Both(), "self", torch.randn(2, 9, 8), edits=[Shift()])


def test_motions_are_made_in_double_precision(model, words):
    made = generate(model.double(), words.double(), 8, steps=2)
    assert made.dtype == torch.float64
    assert made.isfinite().all()


def test_emphasis_of_a_row_that_is_not_there():
    modules, x, words = Both(), torch.randn(2, 8, 8), torch.randn(2, 6, 5)
    with pytest.raises(ValueError, match="no row 2 in a batch of 2"):
        under(modules, "cross", x, words, edits=[Emphasise([1], 0.2, row=2)])
