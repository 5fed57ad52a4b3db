"""What each mechanism gives where it can be worked out by hand, and what its paper says must hold."""

from __future__ import annotations

import math

import pytest
import torch

from regard.kernels.native import Blocks
from regard.mechanisms import (
    _routed,
    _windows,
    aaren,
    efficient_attention,
    flashbias,
    lightning_2,
    memory_efficient,
    moba,
    neighborhood,
    power,
)
from regard.mechanisms._blocks import attend, listed
from regard.mechanisms.flashbias import Factors, LearnedFactors, alibi, low_rank, squared_distance


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[None, None, :, None]


def test_memory_efficient_by_hand():
    """Scores 0 and log 3: weights 1/4 and 3/4, whichever chunk they fall in."""
    found = memory_efficient.memory_efficient(
        column(1.0), column(0.0, math.log(3)), column(4.0, 8.0), scale=1.0, key_chunk=1
    )
    assert found.item() == pytest.approx(7.0)


def test_memory_efficient_survives_large_scores():
    """Scores of 1e4 would overflow without a running maximum; the largest takes all."""
    query, key, value = column(1e4), column(-1.0, 1.0, 0.5), column(1.0, 2.0, 3.0)
    assert memory_efficient.memory_efficient(query, key, value, key_chunk=1).item() == 2.0
    with pytest.raises(ValueError, match="1 position or more"):
        memory_efficient.memory_efficient(query, key, value, key_chunk=0)


def test_efficient_attention_by_hand():
    """Keys normalised over positions: 1/4 and 3/4 on one channel, halves on the other; the query weighs channels."""
    query = torch.tensor([math.log(3), 0.0], dtype=torch.float64)[None, None, None]
    key = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64)[None, None]
    found = efficient_attention.efficient_attention(query, key, column(4.0, 8.0))
    assert found.item() == pytest.approx(3 / 4 * 7 + 1 / 4 * 6)
    scaled = efficient_attention.efficient_attention(query, key, column(4.0, 8.0), normalisation="scaling")
    assert scaled.item() == pytest.approx(math.log(3) ** 2 * 8 / 2)
    with pytest.raises(ValueError, match="normalisation is one of"):
        efficient_attention.efficient_attention(query, key, column(4.0, 8.0), normalisation="none")


def test_efficient_attention_is_a_mean_of_values():
    weights = efficient_attention.efficient_attention.spec.weights(
        torch.randn(1, 4, 9, 8), torch.randn(1, 2, 11, 8), causal=False, mask=None
    )
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 9))


def test_alibi_factors():
    """Two heads: slopes 1/16 and 1/256; the last query stands at the last key."""
    bias = alibi(2, 2, 3).bias()
    assert torch.equal(bias[0, 0], torch.tensor([[-1.0, 0.0, 1.0], [-2.0, -1.0, 0.0]]) / 16)
    assert torch.equal(bias[0, 1], bias[0, 0] / 16)


def test_squared_distance_factors():
    left, right = torch.randn(5, 2, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    factors = squared_distance(left, right, weight=-0.5)
    torch.testing.assert_close(factors.bias()[0, 0], -0.5 * torch.cdist(left, right) ** 2)
    assert factors.query.shape[-1] == 4


def test_low_rank_factors():
    """Exact from the rank of the bias on, and below it no rank-one matrix is nearer."""
    bias = torch.randn(1, 2, 6, 3, dtype=torch.float64) @ torch.randn(1, 2, 3, 9, dtype=torch.float64)
    torch.testing.assert_close(low_rank(bias, 3).bias(), bias)
    left = torch.linalg.svdvals(bias)[..., 1:].square().sum(-1)
    torch.testing.assert_close((low_rank(bias, 1).bias() - bias).square().sum((-2, -1)), left)
    with pytest.raises(ValueError, match="rank 1 to 6"):
        low_rank(bias, 7)


def test_factors_of_every_head_arrangement():
    """Key factors may be shared by all heads, by the heads of a group, or differ; bias gets its gradient."""
    query, key, value = (torch.randn(2, h, 9, 4, dtype=torch.float64) for h in (4, 2, 2))
    for heads in (1, 2, 4):
        factors = Factors(
            torch.randn(1, 4, 9, 3, dtype=torch.float64).requires_grad_(),
            torch.randn(1, heads, 9, 3, dtype=torch.float64).requires_grad_(),
        )
        found = flashbias.flashbias(query, key, value, causal=True, factors=factors)
        weights = flashbias.flashbias.spec.weights(query, key, causal=True, mask=None, scale=None, factors=factors)
        right = weights @ value.repeat_interleave(2, 1)
        torch.testing.assert_close(found, right)
        given = torch.randn_like(right)
        for ours, theirs in zip(torch.autograd.grad(found, factors, given), torch.autograd.grad(right, factors, given)):
            torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="the key factor is"):
        flashbias.flashbias(query, key, value, factors=alibi(4, 9, 8))


def test_learned_factors_come_nearer():
    torch.manual_seed(0)
    at = torch.linspace(-1, 1, 16)[None, :, None]
    bias = -(at - at.mT).abs()[:, None]
    net = LearnedFactors(1, 1, 4, hidden=16)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    first = net.loss(at, at, bias).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = net.loss(at, at, bias)
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 20
    assert net(at, at).query.shape == (1, 1, 16, 4)


def test_lightning_by_hand():
    """With a decay of one half a token: o_1 = q_1 (k_0 v_0 / 2 + k_1 v_1)."""
    half = torch.tensor([math.log(2)])
    query, key, value = column(1.0, 2.0, 3.0), column(1.0, 1.0, 2.0), column(4.0, 3.0, 1.0)
    for block in (1, 2, 64):
        found = lightning_2.lightning_2(query, key, value, decay=half, block=block).flatten()
        torch.testing.assert_close(found, torch.tensor([4.0, 10.0, 3 * (1.0 + 1.5 + 2.0)], dtype=torch.float64))


def test_lightning_slopes():
    assert torch.equal(lightning_2.slopes(8), 2.0 ** -torch.arange(1.0, 9.0))
    # more heads than a power of two: every other slope of twice as many follows
    torch.testing.assert_close(lightning_2.slopes(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))


def test_lightning_without_decay_sums_everything():
    """Rate 0 and all keys alike: the output counts the tokens."""
    one = torch.ones(1, 1, 200, 1, dtype=torch.float64)
    found = lightning_2.lightning_2(one, one, one, decay=torch.zeros(1))
    torch.testing.assert_close(found.flatten(), torch.arange(1.0, 201.0, dtype=torch.float64))
    for wrong in (torch.zeros(2), -torch.ones(1), torch.zeros(1, requires_grad=True)):
        with pytest.raises(ValueError, match="decay is a rate"):
            lightning_2.lightning_2(one, one, one, decay=wrong)


def test_power_sees_powers_of_two():
    """Distances 0, 1, 2, 4, 8 of sixteen blocks, the window and the first block."""
    row = power.pattern(16, window=1, sink=0)[-1]
    assert (15 - row.nonzero().flatten()).tolist() == [8, 4, 2, 1, 0]
    assert power.pattern(16)[-1].nonzero().flatten().tolist() == [0, 7, 11, 12, 13, 14, 15]
    with pytest.raises(ValueError, match="window >= 1"):
        power.pattern(16, window=0)


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_power_reaches_two_to_the_layers(layers):
    """After d layers the 2^d blocks before are all seen; a window of the same cost gets d times its size."""
    seen = power.pattern(64, window=1, sink=0).double()
    reached = torch.linalg.matrix_power(seen, layers)[-1] > 0
    assert reached[-(2**layers) :].all()
    beyond = int(reached.nonzero()[0])  # 64 - 1 - the farthest distance: a sum of `layers` powers of two
    assert 63 - beyond == min(63, sum(2 ** (5 - i) for i in range(layers)))


def test_power_decodes_with_a_few_blocks():
    """Keys outside the listed blocks change nothing for the last query; one inside does."""
    query, key, value = (torch.randn(1, 1, 64, 4, dtype=torch.float64) for _ in range(3))
    knobs = {"block": 4, "window": 1, "sink": 0}
    last = power.power(query[:, :, -1:], key, value, **knobs)
    seen = power.pattern(16, window=1, sink=0)[-1].repeat_interleave(4)
    spoiled = value.where(seen[:, None], 99.0)
    torch.testing.assert_close(power.power(query[:, :, -1:], key, spoiled, **knobs), last, rtol=0, atol=0)
    spoiled[:, :, 28] = 99.0
    assert not torch.allclose(power.power(query[:, :, -1:], key, spoiled, **knobs), last)


@pytest.mark.parametrize("heads", [1, 2])
def test_blocks_of_each_head(heads):
    """Lists that differ between heads and rows of the batch; plain torch and the kernel agree with the dense map."""
    generator = torch.Generator().manual_seed(3)
    chosen = torch.rand(2, heads, 3, 4, generator=generator) < 0.5
    query, key, value = (torch.randn(2, 2, n, 8, generator=generator) for n in (80, 100, 100))
    seen = chosen.repeat_interleave(32, 2)[:, :, :80].repeat_interleave(32, 3)[..., :100]
    scores = (query @ key.mT * 0.3).masked_fill(~seen, -1e30).softmax(-1).where(seen, 0.0)
    blocks = Blocks(*listed(chosen), 32, 32)
    settings = {"causal": False, "mask": None, "scale": 0.3}
    torch.testing.assert_close(attend(query, key, value, blocks, **settings), scores @ value, atol=1e-5, rtol=1e-5)
    double = (t.double() for t in (query, key, value))
    torch.testing.assert_close(attend(*double, blocks, **settings).float(), scores @ value, atol=1e-5, rtol=1e-5)


def test_blocks_without_the_kernel(monkeypatch):
    """The same in plain torch, with gradients, where the kernel was not built."""
    leaves = [torch.randn(1, 2, 200, 8, requires_grad=True) for _ in range(3)]
    results = []
    for kernel in ("native", "torch"):
        monkeypatch.setenv("REGARD_KERNEL", kernel)
        found = power.power(*leaves, block=32, window=1)
        results.append([found, *torch.autograd.grad(found.square().sum(), leaves)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_aaren_by_hand():
    """Scores 0, log 3, -inf: prefixes weigh (1), (1/4, 3/4), and the masked one adds nothing."""
    query, key, value = column(1.0), column(0.0, math.log(3), 5.0), column(4.0, 8.0, 100.0)
    there = torch.tensor([True, True, False])[None, None, None]
    for block in (1, 2, 64):
        found = aaren.aaren(query, key, value, mask=there, scale=1.0, block=block)
        torch.testing.assert_close(found.flatten(), torch.tensor([4.0, 7.0, 7.0], dtype=torch.float64))


def test_aaren_keeps_a_prefix_whose_scores_are_far_below_later_ones():
    query, key, value = column(1.0), column(0.0, 1.0, 2000.0, -2000.0), column(4.0, 8.0, 100.0, 7.0)
    expected = torch.tensor([4.0, (4 + 8 * math.e) / (1 + math.e), 100.0, 100.0], dtype=torch.float64)
    for block in (1, 2, 64):
        found = aaren.aaren(query, key, value, scale=1.0, block=block)
        torch.testing.assert_close(found.flatten(), expected)


@pytest.mark.parametrize("n", [1, 7, 64, 100])
@pytest.mark.parametrize("block", [1, 8, 64])
def test_aaren_is_softmax_of_every_prefix(n, block):
    query = torch.randn(1, 4, 1, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 2, n, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    there = torch.rand(2, 1, 1, n) < 0.7
    for mask in (None, there):
        found = aaren.aaren(query, key, value, mask=mask, block=block)
        right = aaren.weights(query, key, mask=mask) @ value.repeat_interleave(2, 1)
        torch.testing.assert_close(found, right)
        given = torch.randn_like(right)
        ours, theirs = (torch.autograd.grad(o, (query, key, value), given) for o in (found, right))
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other)


def test_aaren_step_by_step():
    """The layer and its recurrence agree, from a state that does not grow; scores of 1e3 overflow nothing."""
    torch.manual_seed(0)
    layer = aaren.Aaren(16, heads=2).double()
    layer.query.data *= 1e3
    hidden = torch.randn(3, 33, 16, dtype=torch.float64)
    whole, state = layer(hidden), None
    for i in range(33):
        output, state = layer.step(state, hidden[:, i : i + 1])
        torch.testing.assert_close(output, whole[:, i : i + 1])
        assert [t.numel() for t in state] == [6, 6, 48]
    padded = layer(hidden, mask=torch.arange(33).expand(3, -1) < 20)
    torch.testing.assert_close(padded[:, :20], whole[:, :20])
    whole.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_aaren_refuses():
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 5, 8)
    with pytest.raises(ValueError, match="one query"):
        aaren.aaren(query, key, key)
    with pytest.raises(ValueError, match="belong together"):
        aaren.aaren(query[:, :3, :1], key[:, :2], key[:, :2])
    with pytest.raises(ValueError, match="which keys there are"):
        aaren.aaren(query[:, :, :1], key, key, mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="evenly"):
        aaren.Aaren(10, heads=3)


def test_moba_by_hand():
    """Blocks of two with mean keys 3, 1, -2, and its own: of the others the last query likes the first."""
    key, value = column(2.0, 4.0, 1.0, 1.0, -2.0, -2.0, 0.0, 0.0), column(1.0, 1.0, 5.0, 5.0, 9.0, 9.0, 3.0, 3.0)
    query = column(*[1.0] * 8)
    assert moba.gate(query, key, block=2, top=2)[0, 0, -1].tolist() == [True, False, False, True]
    assert moba.gate(-query, key, block=2, top=2)[0, 0, -1].tolist() == [False, False, True, True]
    assert moba.gate(query, key, block=2, top=1)[0, 0].int().tolist() == torch.eye(4).repeat_interleave(2, 0).tolist()
    weights = torch.tensor([2.0, 4.0, 0.0, 0.0], dtype=torch.float64).softmax(0)
    found = moba.moba(query, key, value, scale=1.0, block=2, top=2)[0, 0, -1]
    torch.testing.assert_close(found, (weights @ torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.float64))[None])
    there = torch.tensor([False, True] + [True] * 6)[None, None, None]  # the mean of what is there
    assert moba.gate(query, key.index_fill(2, torch.tensor([0]), -99.0), mask=there, block=2, top=2)[0, 0, -1, 0]
    with pytest.raises(ValueError, match="top >= 1"):
        moba.moba(query, key, value, top=0)


def test_moba_takes_the_mean_of_the_keys_that_are_there():
    """Of the first block one key of 4 is there, of the second two of 3: over both places the first would have 2."""
    key = column(99.0, 4.0, 3.0, 3.0, 0.0, 0.0)
    there = torch.tensor([False, True, True, True, True, True])[None, None, None]
    assert moba.gate(column(*[1.0] * 6), key, mask=there, block=2, top=2)[0, 0, -1].tolist() == [True, False, True]


def test_moba_with_enough_blocks_is_full_attention():
    query, key, value = (torch.randn(1, 2, 50, 8, dtype=torch.float64) for _ in range(3))
    full = memory_efficient.memory_efficient(query, key, value, causal=True)
    torch.testing.assert_close(moba.moba(query, key, value, block=8, top=7), full)
    assert not torch.allclose(moba.moba(query, key, value, block=8, top=3), full)


@pytest.mark.parametrize(("n_query", "n_key"), [(300, 300), (75, 300), (1, 300), (64, 64), (20, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_routed_queries(n_query, n_key, dtype, monkeypatch):
    """Queries brought together by the block they chose: values and gradients, grouped heads, padding, a cache.

    In the kernel, and in plain torch a few tiles at a time.
    """
    monkeypatch.setattr(_routed, "SPACE", 2 * 8 * 3 * _routed.TILE * 32)
    generator = torch.Generator().manual_seed(n_query)
    leaves = [
        torch.randn(2, h, n, 16, generator=generator, dtype=dtype) for h, n in ((4, n_query), (2, n_key), (2, n_key))
    ]
    leaves = [t.requires_grad_() for t in leaves]
    there = (torch.arange(n_key) >= torch.tensor([[0], [min(40, n_key // 2)]]))[:, None, None]
    for mask, top in ((None, 3), (there, 3), (None, 1)):
        weights = moba.moba.spec.weights(*leaves[:2], causal=True, mask=mask, scale=None, block=32, top=top)
        right = weights @ leaves[2].repeat_interleave(2, 1)
        found = moba.moba(*leaves, mask=mask, block=32, top=top)
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)
        given = torch.randn(found.shape, generator=generator, dtype=dtype)
        ours, theirs = (torch.autograd.grad(o, leaves, given) for o in (found, right))
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def seen_by(n, causal=False, mask=None, **knobs):
    """Keys that each query of a line or grid sees, from the dense weights."""
    zero = torch.zeros(1, 1, n, 1)
    weights = neighborhood.neighborhood.spec.weights(zero, zero, causal=causal, mask=mask, scale=1.0, **knobs)[0, 0]
    return [row.nonzero().flatten().tolist() for row in weights]


def test_neighborhood_by_hand():
    """At a border the window is shifted inside; behind a causal one it is cut."""
    assert seen_by(6, window=3) == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [3, 4, 5]]
    assert seen_by(6, window=4)[2:5] == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]
    assert seen_by(4, window=3, causal=True) == [[0], [0, 1], [0, 1, 2], [1, 2, 3]]
    odd = seen_by(7, window=2, dilation=3)  # remainders 0: 0 3 6; 1: 1 4; 2: 2 5
    assert odd == [[0, 3], [1, 4], [2, 5], [0, 3], [1, 4], [2, 5], [3, 6]]
    assert seen_by(9, shape=(3, 3), window=(1, 3), causal=(False, True))[5] == [3, 4, 5]
    assert seen_by(9, shape=(3, 3), window=2)[8] == [4, 5, 7, 8]
    assert seen_by(2, window=7) == [[0, 1], [0, 1]]


@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("window", [1, 3, 4, 7])
@pytest.mark.parametrize("n", [7, 23])
def test_neighborhood_windows(n, window, dilation):
    """As many neighbours for every query, all of its remainder, and as near as there are that many."""
    for i, seen in enumerate(seen_by(n, window=window, dilation=dilation)):
        same = [j for j in range(n) if (j - i) % dilation == 0]
        assert len(seen) == min(window, len(same))
        assert seen == same[same.index(seen[0]) :][: len(seen)]
        at, left = same.index(i), same.index(seen[0])
        # itself in the middle, or as near to that as the border lets it
        assert left == min(max(at - window // 2, 0), len(same) - len(seen))


GRIDS = [
    ((150,), {"window": 9}),
    ((150,), {"window": 64}),
    ((40,), {"window": 64}),
    ((150,), {"window": 50, "causal": True}),
    ((101,), {"window": 5, "dilation": 3, "causal": True}),
    ((11, 13), {"window": (3, 5)}),
    ((11, 13), {"window": (3, 4), "dilation": (1, 3), "causal": (True, False)}),
    ((7, 20), {"window": 9, "causal": (True, True)}),
    ((5, 6, 7), {"window": (3, 2, 3), "dilation": (1, 1, 2), "causal": (True, False, False)}),
]


@pytest.mark.parametrize(("shape", "knobs"), GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighborhood_equals_the_masked_map(shape, knobs, dtype, monkeypatch):
    """Values and gradients, in the kernel and in torch, whole and in several turns; grouped heads."""
    n, generator = math.prod(shape), torch.Generator().manual_seed(1)
    leaves = [torch.randn(2, h, n, 8, dtype=dtype, generator=generator).requires_grad_() for h in (4, 2, 2)]
    knobs = {"shape": shape, "causal": False, **knobs}
    right = neighborhood.neighborhood.spec.weights(*leaves[:2], mask=None, scale=None, **knobs)
    right = right @ leaves[2].repeat_interleave(2, 1)
    given = torch.randn(right.shape, dtype=dtype, generator=generator)
    wanted = torch.autograd.grad(right, leaves, given)
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {}
    for space in (_windows.SPACE, 2**12):
        monkeypatch.setattr(_windows, "SPACE", space)
        found = neighborhood.neighborhood(*leaves, **knobs)
        torch.testing.assert_close(found, right, **close)
        for one, other in zip(torch.autograd.grad(found, leaves, given), wanted):
            torch.testing.assert_close(one, other, **close)


def test_neighborhood_of_a_padded_picture():
    """A picture of 6 x 5 in a batch with one of 8 x 9: its borders are its own."""
    generator = torch.Generator().manual_seed(2)
    big, small = torch.randn(3, 2, 2, 8, 9, 4, generator=generator), torch.zeros(2, 8, 9, dtype=torch.bool)
    small[0], small[1, :6, :5] = True, True
    mask = small.flatten(1)[:, None, None]
    for causal in (False, (True, False)):
        knobs = {"window": (3, 5), "dilation": (2, 1), "causal": causal}
        found = neighborhood.neighborhood(*big.flatten(3, 4), mask=mask, shape=(8, 9), **knobs).unflatten(2, (8, 9))
        cut = big[:, 1:, :, :6, :5].flatten(3, 4)
        right = neighborhood.neighborhood(*cut, shape=(6, 5), **knobs).unflatten(2, (6, 5))
        torch.testing.assert_close(found[1:, :, :6, :5], right)
        whole = neighborhood.neighborhood(*big[:, :1].flatten(3, 4), shape=(8, 9), **knobs).unflatten(2, (8, 9))
        torch.testing.assert_close(found[:1], whole)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 4, 9, 80])
def test_neighborhood_of_a_padded_line(window, causal):
    """Padding on both sides, other in each row of the batch; a hole is not seen. In the kernel as in torch."""
    tensors = torch.randn(3, 2, 2, 70, 8)
    there = torch.ones(2, 1, 1, 70, dtype=torch.bool)
    there[0, ..., 50:], there[1, ..., :7], there[1, ..., 20] = False, False, False
    knobs = {"window": window, "causal": causal}
    found = neighborhood.neighborhood(*tensors, mask=there, **knobs)
    right = neighborhood.neighborhood(*tensors.double(), mask=there, **knobs)
    torch.testing.assert_close(found.double(), right, atol=1e-5, rtol=1e-4)
    alone = neighborhood.neighborhood(*tensors[:, :1, :, :50], **knobs)
    torch.testing.assert_close(found[:1, :, :50], alone, atol=1e-5, rtol=1e-4)
    if causal:  # the last queries of a cache
        query, key, value = tensors
        last = neighborhood.neighborhood(query[:, :, 60:], key, value, mask=there, **knobs)
        torch.testing.assert_close(last, found[:, :, 60:], atol=1e-5, rtol=1e-4)


def test_neighborhood_goes_on_frame_by_frame():
    video = [torch.randn(1, 2, 6 * 12, 8) for _ in range(3)]
    knobs = {"shape": (6, 3, 4), "window": 3, "causal": (True, False, False)}
    whole = neighborhood.neighborhood(*video, **knobs)
    last = neighborhood.neighborhood(video[0][:, :, -24:], *video[1:], **knobs)
    torch.testing.assert_close(last, whole[:, :, -24:])
    # causal along the frames only: the next frame changes nothing, the next pixel does
    later = [t.clone() for t in video]
    later[1][:, :, 60:], later[2][:, :, 60:] = 9.0, 9.0
    assert torch.equal(neighborhood.neighborhood(*later, **knobs)[:, :, :60], whole[:, :, :60])


def test_neighborhood_refuses():
    x = torch.randn(1, 2, 12, 4)
    with pytest.raises(ValueError, match="has 16 positions"):
        neighborhood.neighborhood(x, x, x, shape=(4, 4))
    with pytest.raises(ValueError, match="one value or as many"):
        neighborhood.neighborhood(x, x, x, shape=(3, 4), window=(3, 3, 3))
    with pytest.raises(ValueError, match="1 or more"):
        neighborhood.neighborhood(x, x, x, window=0)
    with pytest.raises(ValueError, match="in whole steps of 4"):
        neighborhood.neighborhood(x[:, :, :3], x, x, shape=(3, 4), causal=True)
    with pytest.raises(ValueError, match="in whole steps of 4"):
        neighborhood.neighborhood(x[:, :, :4], x, x, shape=(3, 4), causal=(False, True))
