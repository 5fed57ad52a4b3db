"""Mixers of transformers as matrices: by hand, beside their own forward pass, and the limits that theory names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from regard.studies.visual_mamba import approximation_error, block_ranks, map_score, visual_mamba

LOW, HIGH = 0.02, 0.1  # a limit of time steps that bites


def mixer(kind, dim=16, state=4, **more):
    torch.manual_seed(0)
    if kind == "mamba":
        made = MambaMixer(MambaConfig(hidden_size=dim, state_size=state, **more), 0)
    else:
        made = Mamba2Mixer(
            Mamba2Config(hidden_size=dim, state_size=state, num_heads=4, head_dim=2 * dim // 4, **more), 0
        )
        nn.init.normal_(made.norm.weight)
    for name, parameter in made.named_parameters():
        if name in ("D", "A_log", "dt_bias"):
            nn.init.normal_(parameter)
    return made.eval()


EVERY = [
    ("mamba", {}),
    ("mamba", {"use_bias": True, "use_conv_bias": False, "time_step_rank": 3, "conv_kernel": 2}),
    ("mamba2", {"n_groups": 1}),
    ("mamba2", {"n_groups": 2, "use_bias": True, "use_conv_bias": False, "time_step_limit": (LOW, HIGH)}),
]


@pytest.mark.parametrize(("kind", "more"), EVERY)
def test_the_output_and_its_gradients_are_the_mixers_own(kind, more):
    of = mixer(kind, **more)
    hidden = torch.randn(2, 11, 16, requires_grad=True)
    ours, theirs = visual_mamba(of, hidden).output, of(hidden)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    parameters = [hidden, *of.parameters()]
    ours, theirs = (torch.autograd.grad(out.square().sum(), parameters) for out in (ours, theirs))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def by_hand(kind, decay):
    """A mixer whose C, B and dt are 1 for every token: one state, with this factor a token."""
    if kind == "mamba":
        of = MambaMixer(MambaConfig(hidden_size=1, state_size=1, conv_kernel=1), 0)
    else:
        of = Mamba2Mixer(
            Mamba2Config(hidden_size=1, state_size=1, num_heads=2, head_dim=1, n_groups=1, conv_kernel=1), 0
        )
    one = float(np.log(np.e - 1))  # softplus of it is 1
    silu = 1.2784645  # silu of it is 1
    for parameter in of.parameters():
        parameter.zero_()
    of.A_log.fill_(float(np.log(-np.log(decay))))
    of.conv1d.bias.fill_(silu)
    if kind == "mamba":
        of.dt_proj.bias.fill_(one)
        of.x_proj.weight[-2:].fill_(0.5)  # of two channels that are 1
    else:
        of.dt_bias.fill_(one)
    return of


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_half_life_of_one_token_by_hand(kind):
    matrix = visual_mamba(by_hand(kind, 0.5), torch.ones(1, 3, 1)).matrix
    right = torch.tensor([[1.0, 0, 0], [0.5, 1, 0], [0.25, 0.5, 1]])
    torch.testing.assert_close(matrix, right.expand(1, 2, 3, 3), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_without_decay_it_is_causal_linear_attention():
    of = mixer("mamba2", n_groups=1)
    of.A_log.fill_(-60.0)
    of.D.zero_()
    of.in_proj.weight[-4:] = 0  # every token has the same time step
    matrix = visual_mamba(of, torch.randn(1, 9, 16)).matrix[0]
    step = torch.nn.functional.softplus(of.dt_bias)[:, None, None]
    torch.testing.assert_close(matrix[0] / step[0], matrix[3] / step[3])  # C and B are shared
    assert torch.equal(matrix, matrix.tril())


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_off_diagonal_blocks_have_the_rank_of_the_state(kind):
    of = mixer(kind, **({} if kind == "mamba" else {"n_groups": 1}))
    ranks = block_ranks(visual_mamba(of, torch.randn(1, 16, 16)).matrix.detach(), 8)
    assert int(ranks[..., 1, 0].max()) == 4  # of 8
    assert (ranks[..., 0, 1] == 0).all()
    assert (ranks.diagonal(dim1=-2, dim2=-1) == 8).all()


def test_the_best_recurrence_of_what_is_one_leaves_nothing():
    with torch.no_grad():
        matrix = visual_mamba(mixer("mamba2", state=2, n_groups=1), torch.randn(1, 16, 16)).matrix[0, 0]
        matrix = matrix - torch.diag(matrix.diagonal())  # of which D is no part
    errors = approximation_error(matrix.tril(), state=3, decay=True, generator=torch.Generator().manual_seed(0))
    assert errors.shape == (2,)
    assert errors.min() < 0.02


def test_a_decay_pays_for_what_is_local_and_both_ways_for_what_is_not_causal():
    place = torch.arange(24.0)
    matrix = torch.exp(-0.7 * (place[:, None] - place).abs())
    errors = {
        (decay, both): float(
            approximation_error(
                matrix if both else matrix.tril(),
                state=1,
                decay=decay,
                both_ways=both,
                steps=600,
                generator=torch.Generator().manual_seed(0),
            ).min()
        )
        for decay in (False, True)
        for both in (False, True)
    }
    assert max(errors[True, both] for both in (False, True)) < 0.1  # it is one state with a decay, and its mirror
    assert min(errors[False, both] for both in (False, True)) > 0.2


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="not causal"):
        approximation_error(torch.ones(4, 4), state=1, decay=False)
    with pytest.raises(ValueError, match=r"square matrix.*\[4, 3\]"):
        approximation_error(torch.ones(4, 3), state=1, decay=False)
    with pytest.raises(ValueError, match=r"\[4, 4\] is not made of blocks of 3"):
        block_ranks(torch.ones(4, 4), 3)


def test_other_mixers_are_refused():
    with pytest.raises(TypeError, match="MambaMixer, Mamba2Mixer of transformers, got Linear"):
        visual_mamba(nn.Linear(2, 2), torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match=r"\[batch, token, dim\], got \[2, 16\]"):
        visual_mamba(mixer("mamba"), torch.ones(2, 16))
    with pytest.raises(ValueError, match=r"silu.*got 'mish'"):
        visual_mamba(mixer("mamba", hidden_act="mish"), torch.ones(1, 2, 16))


def test_a_map_that_is_the_mask_and_one_that_is_flat():
    mask = np.zeros((2, 8, 8), bool)
    mask[:, 2:5, 3:7] = True
    perfect, flat = map_score(mask, mask), map_score(np.ones((2, 2, 2)), mask)
    assert perfect.auc.tolist() == perfect.iou.tolist() == [1.0, 1.0]
    assert flat.auc.tolist() == [0.5, 0.5]
    assert flat.iou == pytest.approx(12 / 64)
    assert map_score(~mask, mask).auc.tolist() == [0.0, 0.0]


def test_the_area_is_that_of_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    maps, mask = rng.integers(0, 4, (3, 8, 8)), rng.random((3, 8, 8)) < 0.3
    right = [roc_auc_score(m.ravel(), s.ravel()) for m, s in zip(mask, maps)]
    assert map_score(maps, mask).auc == pytest.approx(right)


def test_a_mask_without_an_object_is_refused():
    with pytest.raises(ValueError, match="empty or full"):
        map_score(np.ones((1, 2, 2)), np.zeros((1, 4, 4)))
    with pytest.raises(ValueError, match=r"\[batch, row, column\], got \[2, 2\]"):
        map_score(np.ones((2, 2)), np.zeros((1, 4, 4)))
