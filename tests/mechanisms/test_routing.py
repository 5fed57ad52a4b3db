"""Routing: clusters by hand, the module's means, and what every query of a cluster sees."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch.nn import functional as F

from regard.mechanisms.routing import Routing, commitment, convert, nearest_means, routing

TWO = torch.eye(2)[None]  # one head, two means


def test_each_meets_itself():
    x = torch.eye(2)[None, None]
    torch.testing.assert_close(routing(x, x, 3 * x, means=TWO, window=1), 3 * x / 1.00001)


def test_one_cluster_of_all_is_full_attention():
    x = torch.randn(1, 2, 9, 4)
    right = F.scaled_dot_product_attention(x, x, x)
    for count in (1, 3):  # the same members as often as there are means, averaged
        means = F.normalize(torch.ones(2, count, 4), dim=-1)
        torch.testing.assert_close(routing(x, x, x, means=means, window=9), right * count / (count + 1e-5))


def test_a_token_may_be_in_two_clusters_and_another_in_none():
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])[None, None]
    found = routing(x, x, torch.ones(1, 1, 4, 1), means=TWO, window=2)
    torch.testing.assert_close(found.flatten(), torch.tensor([2 / 2.00001, 1 / 1.00001, 1 / 1.00001, 0.0]))


def test_shared_queries_see_themselves_last():
    x = torch.tensor([[2.0, 0.0], [3.0, 0.0]])[None, None]
    value = torch.tensor([[1.0], [5.0]])[None, None]
    found = routing(x, x, value, causal=True, means=TWO[:, :1], window=2, shared=True)
    torch.testing.assert_close(found.flatten(), torch.tensor([1.0, 1.0]) / 1.00001)


def test_memory_is_seen_by_all():
    """With keys of zero it halves what one key gives."""
    zero, value = torch.zeros(1, 1, 2, 2), torch.tensor([[4.0], [8.0]])[None, None]
    memory = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 1)
    found = routing(zero, zero, value, causal=True, means=TWO[:, :1], window=2, memory=memory)
    torch.testing.assert_close(found.flatten(), torch.tensor([2.0, 4.0]) / 1.00001)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_masked_keys_beside_the_map(shared, last):
    leaves = [torch.randn(2, h, 20, 4, dtype=torch.float64).requires_grad_() for h in (4, 2, 2)]
    there = torch.rand(2, 1, 1, 20) < 0.6
    means = F.normalize(torch.randn(4, 3, 4, dtype=torch.float64), dim=-1)
    how = {"mask": there, "scale": None, "means": means, "window": 7, "shared": shared, "masked_last": last}
    for causal in (False, True):
        found = routing(*leaves, causal=causal, **how)
        right = routing.spec.weights(*leaves[:2], causal=causal, **how) @ leaves[2].repeat_interleave(2, 1)
        torch.testing.assert_close(found, right)


def test_means_follow_the_nearest():
    """Two vectors at a right angle to the first mean's sides, none at the second's: that one stays."""
    vectors = F.normalize(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), dim=-1)[None, None]
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])[None]
    torch.testing.assert_close(nearest_means(vectors, means), means)
    turned = nearest_means(vectors, F.normalize(torch.tensor([[[2.0, 1.0], [-1.0, 0.0]]]), dim=-1))
    torch.testing.assert_close(turned, means)
    half = 0.5**0.5
    assert commitment(vectors, means).item() == pytest.approx(((1 - half) ** 2 + half**2) / 2)


def test_the_module_moves_its_means():
    torch.manual_seed(0)
    module, x = Routing(4, 2, 3, decay=0.9), torch.randn(2, 2, 12, 4)
    before = module.means.clone()
    module.eval()(x, x, x)
    module.update()
    assert torch.equal(module.means, before)
    module.train()(x, x, x)
    first = module.means.clone()
    assert module.begun
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(2, 3))
    module.update()
    near = nearest_means(F.normalize(torch.cat([x, x], 2), dim=-1), first)
    torch.testing.assert_close(module.means, 0.9 * first + 0.1 * near)
    assert module.loss > 0


def test_a_converted_model_of_pictures():
    model, inputs = build("vit")
    undo = convert(model, clusters=2)
    model.train()
    model(**inputs).logits.sum().backward()
    modules = [m for m in model.modules() if isinstance(m, Routing)]
    assert len(modules) == 2
    assert all(m.begun and m.loss.isfinite() for m in modules)
    undo()
    assert not [m for m in model.modules() if isinstance(m, Routing)]


def test_refusals():
    x = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="means are"):
        routing(x, x, x, means=torch.randn(2, 2))
    with pytest.raises(ValueError, match="1 token or more"):
        routing(x, x, x, window=0)
    with pytest.raises(ValueError, match="as many"):
        routing(x[:, :, :3], x, x, shared=True)
    with pytest.raises(ValueError, match="memory is keys and values"):
        routing(x, x, x, means=TWO, memory=(torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2)))
