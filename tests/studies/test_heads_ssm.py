"""Operators of state spaces and of heads: by hand, beside the scan, and the theorems' limits."""

from __future__ import annotations

import itertools

import pytest
import torch

from regard.studies.heads_ssm import (
    attention,
    gradient_norms,
    heads_ssm,
    interaction,
    interaction_rank,
    lag_operators,
    softmax_coefficients,
    state_space,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diagonal(*values):
    return torch.tensor(values, dtype=torch.float64).diag()


def test_two_eigenvalues_over_two_tokens_by_hand():
    eye = torch.eye(2, dtype=torch.float64)
    operators = lag_operators(diagonal(0.5, 0.25), eye, eye, 2)
    assert operators.tolist() == [[[1, 0], [0, 1]], [[0.5, 0], [0, 0.25]]]
    assert interaction_rank(operators) == 2
    # Gram [[2, 0.75], [0.75, 0.3125]] has eigenvalues 2.2852 and 0.0274
    found = heads_ssm(operators, 1)
    assert found.error == pytest.approx(0.02736 / 2.3125, rel=1e-3)
    assert float((found.operators() - operators).square().sum() / operators.square().sum()) == pytest.approx(
        found.error
    )


def test_rank_counts_distinct_eigenvalues_that_are_reached_and_seen():
    b, c = draw(8, 6), draw(6, 8, seed=1)
    for values in ([0.9] * 8, [0.9, 0.5] * 4, [0.9, 0.5, 0.7, 0.2] * 2):
        assert interaction_rank(lag_operators(diagonal(*values), b, c, 24)) == len(set(values))
    unreached, unseen = b.clone(), c.clone()
    unreached[0], unseen[:, 1] = 0, 0
    values = (0.9, 0.5, *[0.7] * 6)
    assert interaction_rank(lag_operators(diagonal(*values), unreached, c, 24)) == 2
    assert interaction_rank(lag_operators(diagonal(*values), unreached, unseen, 24)) == 1


def test_rank_is_bounded_by_tokens_entries_and_nilpotency():
    b, c = draw(8, 6), draw(6, 8, seed=1)
    full = diagonal(*torch.linspace(0.2, 0.9, 8).tolist())
    assert interaction_rank(lag_operators(full, b, c, 3)) == 3
    assert interaction_rank(lag_operators(full, b[:, :1], c[:1], 24)) == 1
    nilpotent = torch.diag(torch.ones(7, dtype=torch.float64), 1)
    operators = lag_operators(nilpotent, b, c, 12)
    assert interaction_rank(operators) == 8
    assert (operators[8:] == 0).all()


def test_a_jordan_block_counts_as_many_times_as_its_size():
    jordan = 0.5 * torch.eye(3, dtype=torch.float64) + torch.diag(torch.ones(2, dtype=torch.float64), 1)
    assert interaction_rank(lag_operators(jordan, draw(3, 6), draw(6, 3, seed=1), 24)) == 3


def test_operators_of_the_scan_are_those_of_its_lags():
    a, b, c, x = 0.3 * draw(4, 4), draw(4, 3, seed=1), draw(2, 4, seed=2), draw(7, 3, seed=3)
    operators, lags = interaction(lambda x: state_space(x, a, b, c), x), lag_operators(a, b, c, 7)
    for i, j in itertools.product(range(7), repeat=2):
        torch.testing.assert_close(operators[i, j], lags[i - j] if i >= j else torch.zeros_like(lags[0]))
    torch.testing.assert_close(torch.einsum("ijod,jd->io", operators, x), state_space(x, a, b, c))


def test_heads_reproduce_a_state_space_from_its_rank_on_and_not_before():
    operators = lag_operators(diagonal(*[0.9, 0.5, 0.7, 0.2] * 2), draw(8, 6), draw(6, 8, seed=1), 24)
    errors = [heads_ssm(operators, heads).error for heads in range(1, 6)]
    assert errors[2] > 1e-7
    assert max(errors[3:]) < 1e-20
    assert errors == sorted(errors, reverse=True)
    torch.testing.assert_close(heads_ssm(operators, 4).operators(), operators)


def test_operators_of_attention_span_as_many_dimensions_as_heads():
    maps = [draw(2, 3, 5, seed=seed) for seed in (0, 1)]
    value, x = draw(2, 4, 5, seed=2), draw(9, 5, seed=3)
    fixed = interaction(lambda y: attention(y, *maps, value, weights_of=x), x)
    assert interaction_rank(fixed) == 2
    torch.testing.assert_close(torch.einsum("ijod,jd->io", fixed, x), attention(x, *maps, value))
    whole = interaction(lambda y: attention(y, *maps, value), x)
    assert interaction_rank(whole) > 2  # the derivative of the weights counts too
    assert (whole.permute(2, 3, 0, 1).triu(1) == 0).all()


def test_attention_by_a_loop():
    query, key, value, x = draw(1, 3, 5), draw(1, 3, 5, seed=1), draw(1, 4, 5, seed=2), draw(6, 5, seed=3)
    for i in range(6):
        scores = torch.stack([(query[0] @ x[i]) @ (key[0] @ x[j]) / 3**0.5 for j in range(i + 1)])
        expected = sum(w * value[0] @ x[j] for j, w in enumerate(scores.softmax(0)))
        torch.testing.assert_close(attention(x, query, key, value)[i], expected)


def test_norms_of_gradients_by_distance():
    a, b, c, x = diagonal(0.5, 0.5), draw(2, 3), draw(4, 2, seed=1), draw(8, 3, seed=2)
    norms = gradient_norms(lambda x: state_space(x, a, b, c), x, 5)
    torch.testing.assert_close(norms, torch.linalg.matrix_norm(c @ b, 2) * 0.5 ** torch.arange(6.0).double())
    last = gradient_norms(lambda x: state_space(x, a, b, c), x, -1)
    assert last.shape == (8,)


def test_softmax_weights_by_lag_with_and_without_a_sink():
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    plain, sunk = (softmax_coefficients(scores, sink=sink)[0] for sink in (False, True))
    torch.testing.assert_close(plain[2], torch.tensor([2.0, 1.0, 0.0]).softmax(0))
    torch.testing.assert_close(
        sunk[1],
        torch.tensor([0.0, 1.0, 0.0])
        .softmax(0)[1:]
        .new_tensor([*torch.tensor([0.0, 1.0, 0.0]).softmax(0)[1:].tolist(), 0.0]),
    )
    assert plain.sum(-1).tolist() == pytest.approx([1, 1, 1])
    assert (sunk.sum(-1) < 1).all()


def test_what_is_too_large_or_no_operators_is_refused():
    with pytest.raises(ValueError, match="3000 tokens have 576000000 numbers"):
        interaction(lambda x: x, torch.zeros(3000, 8))
    with pytest.raises(ValueError, match=r"\[lag, out, dim\].*got \[2, 2\] and 1"):
        heads_ssm(torch.eye(2), 1)
    with pytest.raises(ValueError, match="heads 1 or more"):
        heads_ssm(torch.ones(2, 2, 2), 0)
