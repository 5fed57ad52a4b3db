"""DARE: scores and weights by hand, what the couplings have in common, padding, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import regard
from regard.models.dare import Dare, Ids, dare

COUPLINGS = ["decoupled", "shared", "projected", "four"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def drawn(batch: int = 3, keys: int = 9) -> tuple[Ids, Ids]:
    sizes = 20, 6, 5
    return (
        Ids(*(torch.randint(n, (batch,)) for n in sizes)),
        Ids(*(torch.randint(n, (batch, keys)) for n in sizes)),
    )


def small(**sizes) -> Dare:
    return dare(20, 6, 5, **{"dim": 4, "time_dim": 3, "top": 4, "hidden": (7, 5), **sizes}).eval()


def test_by_hand():
    model = dare(2, 2, 1, dim=1, time_dim=1, top=1).eval()
    tables = model.attention_table
    assert tables is not None
    # the target is (1, 1); behaviours are (2, 0) and (0, 0); times say nothing
    for kind, values in (("item", [[1.0], [2.0]]), ("category", [[1.0], [0.0]]), ("time", [[0.0]])):
        tables[kind].weight = nn.Parameter(torch.tensor(values))
    zero = torch.zeros(1, dtype=torch.long)
    history = Ids(torch.tensor([[1]]), torch.tensor([[1]]), zero[None])
    torch.testing.assert_close(model.scores(Ids(zero, zero, zero), history), torch.tensor([[math.sqrt(2)]]))
    scores = torch.tensor([[math.sqrt(2), 0.0]])
    value, seen = torch.tensor([[[1.0], [5.0]]]), torch.tensor([[True, False]])
    assert model.attention(scores, value, seen)[1].tolist() == [[1.0, 0.0]]
    weights = model.attention(scores, value, seen | True)[1]
    torch.testing.assert_close(weights, torch.tensor([[0.8044, 0.1956]]), rtol=1e-4, atol=1e-4)


def test_two_scales():
    model, (target, history) = small(attention_dim=2), drawn()
    tables = model.attention_table

    def of(kind: str) -> torch.Tensor:
        one, many = tables[kind](getattr(target, kind)), tables[kind](getattr(history, kind))
        return (one[:, None] * many).sum(-1)

    expected = (of("item") + of("category")) / 2 + of("time") / math.sqrt(3)
    torch.testing.assert_close(model.scores(target, history), expected)


def test_the_best_few_are_read():
    model, (target, history) = small(), drawn()
    found = model(target, history)
    assert (found.weights > 0).sum(-1).tolist() == [4, 4, 4]
    lowest = found.scores.masked_fill(found.weights == 0, math.inf).amin(-1)
    assert (found.scores.masked_fill(found.weights > 0, -math.inf).amax(-1) <= lowest).all()
    recent = (torch.arange(9) < 2).expand(3, -1)
    assert (model(target, history, recent=recent).weights > 0).equal(recent)


def test_a_long_search_reads_all():
    model, (target, history) = small(top=50), drawn()
    found = model(target, history)
    torch.testing.assert_close(found.weights, found.scores.softmax(-1))


def test_equal_tables_are_the_shared_one():
    shared, own = small(coupling="shared"), small()
    state = shared.state_dict()
    state |= {f"attention_table.{n.removeprefix('representation.')}": v for n, v in state.items() if n[:3] == "rep"}
    own.load_state_dict(state)
    given = drawn()
    torch.testing.assert_close(own(*given).logits, shared(*given).logits)


def test_representation_alone_reaches_its_own_table():
    model, given = small(), drawn()
    found = model(*given)
    value = torch.cat(model._held(given[1], attention=False, history=True), -1)
    mixed = (found.weights.detach()[..., None] * value).sum(1)
    mixed.sum().backward()
    assert model.representation["item"].weight.grad.abs().sum() > 0
    assert model.attention_table["item"].weight.grad is None
    model(*given).loss(torch.tensor([True, False, True])).backward()
    assert model.attention_table["item"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_padding_and_other_rows_change_nothing(coupling, average):
    model, (target, history) = small(coupling=coupling, average=average), drawn()
    found = model(target, history)
    filled = Ids(*(torch.cat([of, torch.randint(5, (3, 4))], 1) for of in history))
    mask = (torch.arange(13) < 9).expand(3, -1)
    torch.testing.assert_close(model(target, filled, mask).logits, found.logits)
    torch.testing.assert_close(model(target, filled, mask).auxiliary, found.auxiliary)
    alone = model(Ids(*(of[1:2] for of in target)), Ids(*(of[1:2] for of in history)))
    torch.testing.assert_close(alone.logits, found.logits[1:2])


def test_short_and_empty_histories():
    model, (target, history) = small(), drawn()
    mask = torch.arange(9) < torch.tensor([[2], [0], [9]])
    found = model(target, history, mask)
    assert (found.weights > 0).sum(-1).tolist() == [2, 0, 4]
    assert found.logits.isfinite().all()
    assert (found.features[1, 11:] == 0).all()  # nothing but the target


def test_record_sees_the_weights():
    model, given = small(), drawn()
    with torch.no_grad(), regard.record(model, "rows") as recording:
        found = model(*given)
    (stack,) = (node for node in recording.tree.subtree if "rows" in node)
    np.testing.assert_allclose(np.asarray(stack["rows"]).reshape(3, 9), found.weights, atol=1e-6)


def test_loss_by_hand():
    model, given = small(), drawn(2)
    found, clicked = model(*given), torch.tensor([True, False])
    both = [x.softmax(-1)[torch.arange(2), clicked.long()].log().mean() for x in (found.logits, found.auxiliary)]
    torch.testing.assert_close(found.loss(clicked), -sum(both), rtol=1e-5, atol=1e-6)


def test_saves_and_loads(tmp_path):
    model, given = small(coupling="four", average=True), drawn()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(Dare.from_pretrained(tmp_path).eval()(*given).logits, model(*given).logits)


def test_refusals():
    with pytest.raises(ValueError, match=r"coupling is 'decoupled'.* got 'both', 4"):
        small(coupling="both")
    with pytest.raises(ValueError, match="one width; got dim=4 and attention_dim=2"):
        small(coupling="shared", attention_dim=2)
    with pytest.raises(ValueError, match=r"a boolean mask like these; got \[3\], \[3, 9\] and torch.int64 \[3, 9\]"):
        small()(*drawn(), torch.ones(3, 9, dtype=torch.long))


def test_half_precision_has_no_score_as_low_as_a_masked_one():
    target, history = drawn()[:2]
    mask = torch.arange(9).expand(3, 9) < torch.tensor([[4], [0], [9]])
    found, expected = small().half()(target, history, mask), small()(target, history, mask)
    assert found.logits.isfinite().all()
    assert found.logits.shape == expected.logits.shape
