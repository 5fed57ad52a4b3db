"""A stream with a bounded memory: bands, waiting, and what each policy keeps."""

from __future__ import annotations

import pytest
import torch

from regard.mechanisms.attendre import POLICIES, Attendre, attendre
from regard.mechanisms.memory_efficient import memory_efficient


def seen(n, **knobs):
    x = torch.zeros(1, 1, n, 2)
    return attendre.spec.weights(x, x, mask=None, scale=None, **{"causal": False, **knobs})[0, 0] > 0


def test_by_hand():
    """A token at a time, memory 3, waiting 1: query 2 sees keys 1 to 3; the last one waits for nothing more."""
    right = [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    found = seen(5, chunk=1, memory=3, wait=1)
    assert [row.nonzero().flatten().tolist() for row in found] == right


@pytest.mark.parametrize(("chunk", "memory", "wait"), [(4, 12, 8), (4, 4, 0), (3, 12, 3), (1, 5, 2)])
def test_first_in_first_out_is_a_band(chunk, memory, wait):
    n = 24
    last = ((torch.arange(n) // chunk + wait // chunk + 1) * chunk).clamp_max(n)[:, None]  # keys before this have come
    right = (torch.arange(n) < last) & (torch.arange(n) >= last - memory)
    assert torch.equal(seen(n, chunk=chunk, memory=memory, wait=wait), right)


@pytest.mark.parametrize("policy", POLICIES)
def test_with_room_for_all_it_is_full_attention(policy):
    query, key, value = (torch.randn(2, 4, 20, 6, dtype=torch.float64) for _ in range(3))
    for causal in (False, True):
        found = attendre(query, key, value, chunk=4, memory=20, wait=20, policy=policy, causal=causal)
        torch.testing.assert_close(found, memory_efficient(query, key, value, causal=causal))


def policies(asks, noise=8, size=9.0):
    """What is left of a fact that came first, after a stream in which every `asks`-th token asks for it."""
    found = {}
    for policy in POLICIES:
        stream = Attendre(chunk=1, memory=4, policy=policy)
        generator = torch.Generator().manual_seed(0)
        for i in range(noise):
            key = torch.zeros(1, 1, 1, 3)
            key[..., 0 if i == 0 else 1] = 1.0
            query = torch.zeros(1, 1, 1, 3)
            query[..., 0 if asks(i) else 1] = size
            stream.step(query, key, torch.randn(1, 1, 1, 1, generator=generator))
        found[policy] = 0 in stream.held.position.tolist()[0][0]
    return found


def test_what_is_asked_for_stays():
    assert policies(lambda i: i % 2 == 0) == {"fifo": False, "lra": True, "lfa": True}


def test_what_was_asked_for_long_ago():
    """Least recently used goes, though it was used most."""
    assert policies(lambda i: i < 4) == {"fifo": False, "lra": False, "lfa": True}


def test_what_is_not_there_takes_no_place():
    query, key, value = (torch.randn(1, 2, 12, 4, dtype=torch.float64) for _ in range(3))
    there = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    there[..., 4:8] = False
    weights = attendre.spec.weights(query, key, causal=False, mask=there, scale=None, chunk=2, memory=4, wait=2)
    assert (weights[0, 0, -1].nonzero().flatten() == torch.tensor([8, 9, 10, 11])).all()
    assert (weights[0, 0, 6].nonzero().flatten() == torch.tensor([2, 3, 8, 9])).all()


def test_a_stream_is_bounded():
    """Each query comes out once, in order, and memory does not grow."""
    stream, positions, sizes = Attendre(chunk=4, memory=8, wait=8, policy="lra"), [], []
    for part in torch.randn(1, 2, 50, 4).split(4, 2):
        positions.append(stream.step(part, part, part)[1])
        sizes.append(stream.bytes())
    assert len(set(sizes[2:-1])) == 1
    positions.append(stream.flush()[1])
    assert torch.cat(positions).tolist() == list(range(50))
    with pytest.raises(ValueError, match="no query waits"):
        stream.flush()


def test_refuses():
    x = torch.randn(1, 1, 8, 2)
    for knobs in ({"memory": 6}, {"wait": 2}, {"policy": "random"}, {"chunk": 0}):
        with pytest.raises(ValueError, match="whole chunks"):
            attendre(x, x, x, **{"chunk": 4, "memory": 8, "wait": 4, **knobs})
    with pytest.raises(ValueError, match="nothing to wait for"):
        Attendre(chunk=4, memory=8, wait=4, causal=True)
    with pytest.raises(ValueError, match="takes chunks of 4"):
        Attendre(chunk=4, memory=8).step(x, x, x)
