"""Titans: values by hand, the memory in pieces as whole, its limits, and the three joins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import regard
from regard.models.titans import NeuralMemory, TitansConfig, TitansForCausalLM, titans

JOINS = ["gate", "context", "layer", None]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def constant(memory: NeuralMemory, **gates: float) -> NeuralMemory:
    """With gates that say the same of every token."""
    for name, value in gates.items():
        layer = getattr(memory, name)
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, torch.tensor(value).logit().item())
    return memory


def small(join: str | None, **sizes) -> TitansForCausalLM:
    model = titans(vocab_size=20, dim=16, layers=2, heads=2, join=join, window=5, **sizes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def test_by_hand():
    memory = constant(NeuralMemory(1, depth=1, residual=False, batch=1), step=0.5, momentum=0.0, decay=0.5)
    with torch.no_grad():
        for part in (memory.query, memory.key, memory.value):
            part.weight.fill_(1.0)
        memory.first["0"].zero_()
    # gradient 2 (0 - 1) = -2, so the weight is 1; then no error, and half of it is forgotten
    found, state = memory(torch.ones(1, 2, 1))
    torch.testing.assert_close(found[0, :, 0], torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(state.weights["0"], torch.full((1, 1, 1, 1), 0.5))
    torch.testing.assert_close(state.momentum["0"], torch.zeros(1, 1, 1, 1))


def test_nothing_learned_and_nothing_forgotten_is_a_fixed_network():
    memory = constant(NeuralMemory(6, heads=2, max_step=0.0, chunk=2), decay=0.0)
    x = torch.randn(2, 7, 6)
    torch.testing.assert_close(memory(x)[0], memory.recalled(x))


def test_all_forgotten_leaves_the_last_update():
    memory = constant(NeuralMemory(4, batch=1), momentum=0.0, decay=1.0)
    _, state = memory(torch.randn(1, 5, 4))
    for name, weight in state.weights.items():
        torch.testing.assert_close(weight, state.momentum[name])


@pytest.mark.parametrize(("chunk", "batch"), [(1, 1), (1, None), (2, 4), (3, None)])
def test_in_pieces_as_whole(chunk, batch):
    memory = NeuralMemory(6, heads=2, head_dim=4, depth=2, chunk=chunk, batch=batch, normed=chunk > 1)
    x = torch.randn(2, 13, 6)
    whole, end = memory(x)
    found, state = [], memory(x[:, :0])[1]
    for part in x.split([4, 1, 0, 5, 3], 1):
        mixed, state = memory(part, state)
        found.append(mixed)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)
    for name, weight in end.weights.items():
        torch.testing.assert_close(state.weights[name], weight, rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_takes_gradients_at_the_last_weights():
    # the plain recurrence of the text, of a linear memory, written out
    memory = NeuralMemory(3, depth=1, residual=False, batch=1)
    x = torch.randn(1, 4, 3)
    normed = memory.store_norm(x)[0]
    weight, momentum = memory.first["0"][0], torch.zeros(3, 3)
    for token in normed:
        key, value = memory.key(token), memory.value(token)
        surprise = 2 / 3 * torch.outer(key, key @ weight - value) * memory.step(token).sigmoid()
        momentum = memory.momentum(token).sigmoid() * momentum - surprise
        weight = (1 - memory.decay(token).sigmoid()) * weight + momentum
    torch.testing.assert_close(memory(x)[1].weights["0"][0, 0], weight, rtol=1e-4, atol=1e-6)
    other = NeuralMemory(3, depth=1, residual=False)
    other.load_state_dict(memory.state_dict())
    assert not torch.allclose(other(x)[1].weights["0"][0, 0], weight, atol=1e-4)


@pytest.mark.parametrize("join", JOINS)
def test_later_tokens_and_other_rows_change_nothing(join):
    model, ids = small(join), torch.randint(20, (2, 13))
    with torch.no_grad():
        whole = model(ids).logits
        torch.testing.assert_close(model(ids[1:, :9]).logits, whole[1:, :9], rtol=1e-4, atol=1e-5)
        other = ids.clone()
        other[:, 8] = (other[:, 8] + 1) % 20
        changed = (model(other).logits - whole).abs().amax((0, 2))
    assert changed[:8].max() < 1e-5 < changed[8]


@pytest.mark.parametrize("join", JOINS)
def test_only_a_memory_reaches_beyond_the_windows(join):
    model, ids = small(join, memory={"chunk": 1, "batch": 1}), torch.randint(20, (1, 20))
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 20
    with torch.no_grad():
        assert torch.equal(model(other).logits[:, -1], model(ids).logits[:, -1]) == (join is None)


def test_what_it_learns_at_has_gradients():
    memory = NeuralMemory(3, heads=2, head_dim=2, depth=2, expansion=1.0, chunk=2, batch=2).double()
    x = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: memory(x)[0], x)
    memory(x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in memory.parameters())


@pytest.mark.parametrize("join", JOINS)
def test_saves_loads_generates(join, tmp_path):
    model, ids = small(join), torch.randint(20, (1, 6))
    model.save_pretrained(tmp_path)
    assert [path.suffix for path in tmp_path.glob("model*")] == [".safetensors"]
    again = TitansForCausalLM.from_pretrained(tmp_path).eval()
    expected = ids
    with torch.no_grad():
        for _ in range(3):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert (
        again.generate(  # type: ignore[attr-defined]
            ids, max_new_tokens=3, do_sample=False
        ).tolist()
        == expected.tolist()
    )


def test_record_sees_attention_to_learned_keys_recalled_and_tokens():
    with torch.no_grad(), regard.record(model := small("context", persistent=3), "rows") as recording:
        model(torch.randint(20, (1, 5)))
    (stack,) = (node for node in recording.tree.subtree if "rows" in node)
    rows = torch.tensor(stack["rows"].values).reshape(2, 2, 5, 13)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 2, 5))
    assert rows[..., 0, 4:8].abs().sum() == rows[..., 0, 9:].abs().sum() == 0
    assert (rows[..., 0, [0, 1, 2, 3, 8]] > 0).all()


def test_loss_is_of_the_next_token():
    ids, model = torch.randint(20, (2, 5)), small("gate")
    found = model(ids, labels=ids)
    expected = -found.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(found.loss, expected)


def test_refusals():
    with pytest.raises(ValueError, match=r"batch a multiple of chunk; .*chunk=4, batch=6"):
        NeuralMemory(8, chunk=4, batch=6)
    with pytest.raises(ValueError, match=r"takes \[batch, query, 8\]; got \[2, 3, 4\]"):
        NeuralMemory(8)(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="join is 'gate', 'context', 'layer' or None"):
        TitansConfig(join="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="10 channels do not divide by 4 heads"):
        TitansConfig(dim=10)
    with pytest.raises(ValueError, match="at their end"):
        small("gate")(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0, 1, 1]]))
