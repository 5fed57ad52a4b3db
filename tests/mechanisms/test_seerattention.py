"""Learned gates: pools and maps by hand, chosen blocks beside the map, a model converted, distilled and undone."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch.nn import functional as F

from regard.mechanisms.seerattention import (
    Gate,
    SeerAttention,
    choose,
    convert,
    distil,
    gate_loss,
    pooled,
    seerattention,
    truth,
)


def test_pools_by_hand():
    """The last block is shorter, and padding counts nowhere."""
    tensor = torch.tensor([1.0, 3.0, -5.0, 4.0, 7.0])[None, None, :, None]
    there = torch.tensor([True, True, False, True, False])[None, None, None]
    assert [pooled(tensor, 2, how).flatten().tolist() for how in ("max", "min", "mean")] == [
        [3.0, 4.0, 7.0],
        [1.0, -5.0, 7.0],
        [2.0, -0.5, 7.0],
    ]
    assert pooled(tensor, 2, "mean", there).flatten().tolist() == [2.0, 4.0, 0.0]
    assert pooled(tensor, 2, "min", there).flatten().tolist() == [1.0, 4.0, 0.0]


def test_a_gate_of_nothing_prefers_nothing():
    gate = Gate(8, 4, 2, block=4, width=8)
    assert gate.query is None
    assert gate.key.shape == (4, 24, 8)
    gate.key.data.zero_()
    found = gate(torch.randn(1, 4, 14, 8), torch.randn(1, 2, 14, 8))
    torch.testing.assert_close(found[0, 0], torch.ones(4, 4).tril() / torch.arange(1.0, 5.0)[:, None])
    assert Gate(8, 4, 2, width=16).key.shape == (2, 24, 16)


def test_truth_by_hand():
    """Of single tokens it is the map itself; of blocks the largest weight in each, over its row's sum."""
    query, key = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8)
    weights = seerattention.spec.weights(query, key, causal=True, mask=None, scale=None)
    torch.testing.assert_close(truth(query, key, block=1), weights)
    largest = F.max_pool2d(weights, 3)
    torch.testing.assert_close(truth(query, key, block=3), largest / largest.sum(-1, keepdim=True))
    short = truth(query, key, block=5)
    assert short.shape == (2, 4, 3, 3)
    torch.testing.assert_close(short.sum(-1), torch.ones(2, 4, 3))
    logits = torch.randn(2, 4, 4, 4)
    right = truth(query, key, block=3)
    kept = (right * (right.log() - logits.log_softmax(-1)))[:, :, 1:].nan_to_num()
    torch.testing.assert_close(gate_loss(logits, right), 10 * kept.mean())


def test_choices_by_hand():
    scores = torch.tensor([[1.0, 0, 0, 0], [0.8, 0.2, 0, 0], [0.1, 0.6, 0.3, 0], [0.3, 0.3, 0.2, 0.2]])[None, None]
    found = choose(scores, threshold=0.25, last_dense=False)[0, 0].long().tolist()
    assert found == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0]]
    assert choose(scores, threshold=0.25)[0, 0, 2:].long().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert choose(scores, ratio=1.0, last_dense=False)[0, 0].sum() == 10
    assert choose(scores, ratio=0.0, last_dense=False)[0, 0, 2].long().tolist() == [0, 1, 0, 0]
    for wrong in ({}, {"threshold": 0.1, "ratio": 0.1}):
        with pytest.raises(ValueError, match="either a threshold or a ratio"):
            choose(scores, **wrong)
    with pytest.raises(ValueError, match="0 to 1"):
        choose(scores, ratio=1.5)


@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, 32), (torch.float32, 5), (torch.float64, 5)])
def test_equals_the_masked_map(dtype, block):
    """Values and gradients, in the kernel and in torch; a block always takes itself."""
    n = 3 * block + 2
    leaves = [torch.randn(2, h, n, 8, dtype=dtype).requires_grad_() for h in (4, 2, 2)]
    blocks = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.3
    there = torch.rand(2, 1, 1, n, generator=torch.Generator().manual_seed(1)) < 0.8
    for mask in (None, there):
        how = {"causal": True, "mask": mask, "scale": None, "blocks": blocks, "block": block}
        found = seerattention(*leaves, **how)
        right = seerattention.spec.weights(*leaves[:2], **how) @ leaves[2].repeat_interleave(2, 1)
        near = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {}
        torch.testing.assert_close(found, right, **near)
        given = torch.randn_like(right)
        for ours, theirs in zip(torch.autograd.grad(found, leaves, given), torch.autograd.grad(right, leaves, given)):
            torch.testing.assert_close(ours, theirs, **near)


def test_a_converted_model_learns_its_own_map():
    torch.manual_seed(0)
    model, inputs = build("llama")
    model.eval()
    with torch.no_grad():
        before = model(**inputs).logits
    names = [name for name, _ in model.named_modules()]
    undo = convert(model, ratio=0.5, block=3, width=8)
    learned = dict(model.named_parameters())
    state = {name: p.clone() for name, p in learned.items()}
    losses = distil(model, [inputs] * 30, rate=1e-2)
    assert losses[-1] < 0.7 * losses[0]
    moved = {name for name, p in learned.items() if not torch.equal(p, state[name])}
    assert moved == {name for name in learned if "mechanism.gate" in name}
    assert all(p.requires_grad for p in learned.values())
    with torch.no_grad():
        sparse = model(**inputs).logits
        assert not torch.allclose(sparse, before, atol=1e-4)
        modules = [m for m in model.modules() if isinstance(m, SeerAttention)]
        assert all(m.blocks.shape == (2, 4, 4, 4) for m in modules)
        for module in modules:
            module.ratio = 1.0
        torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=1e-4)
    model.generate(inputs["input_ids"], max_new_tokens=2, pad_token_id=0)
    undo()
    assert [name for name, _ in model.named_modules()] == names
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_refusals():
    x = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="1 token or more"):
        seerattention(x, x, x, block=0)
    with pytest.raises(ValueError, match=r"boolean \[batch, head, 2, 2\]"):
        seerattention(x, x, x, block=2, blocks=torch.ones(1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="as many queries as keys"):
        seerattention(x[:, :, 2:], x, x, block=2, blocks=torch.ones(1, 1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="takes causal models"):
        convert(build("vit")[0])
    with pytest.raises(ValueError, match="pooled by some of"):
        Gate(2, 1, 1, queries=("median",))
    with pytest.raises(ValueError, match="no q_proj"):
        convert(build("gpt2")[0])
    with pytest.raises(ValueError, match="no gates"):
        distil(torch.nn.Linear(1, 1), [])
