"""Paths from head to head, circuits of these, and what two circuits share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from regard.circuits._patching import Contrast, Receiver
from regard.circuits.circuit_reuse import circuit_reuse, head_patching, look_at, overlap, path_patching
from regard.claims._planted import ASKED, INDUCTION, INDUCTIVE, PREVIOUS, TELLER, planted, questions, repeats
from regard.data.prompts import batch, induction
from regard.seam import intervene, record
from tests.families import gpt2, llama, made, t5


def contrast(family):
    """A model, a clean and a corrupted prompt of two rows, and a score."""
    model, inputs = made(family)
    other = {"input_ids": inputs["input_ids"].flip(0).roll(1, 1)}
    return model, inputs, other, lambda logits: logits[:, -1, 5] - logits[:, -1, 9]


class TestPlanted:
    """Which heads make the first word the answer at a question mark, or repeat, is known."""

    model = planted()

    def asked(self):
        task = questions(12)
        first = torch.arange(12)
        corrupted = task.ids.clone()
        corrupted[:, 1] = (task.ids[:, 1] - 2 + 5) % 13 + 2

        def score(logits):
            return logits[first, -1, task.answers] - logits[:, -1].mean(-1)

        return {"input_ids": task.ids}, {"input_ids": corrupted}, score

    def test_the_head_that_answers_acts_directly_and_the_other_through_its_values(self):
        direct = path_patching(self.model, *self.asked())
        through = path_patching(self.model, *self.asked(), receivers=[TELLER], component="value")
        queries = path_patching(self.model, *self.asked(), receivers=[TELLER], component="query")
        for found, head in ((direct, TELLER), (through, ASKED)):
            assert found.sel(layer=head[0], head=head[1]) > 0.5
            others = found.values.copy()
            others[head] = 0
            assert np.abs(others).max() < 0.2
        assert abs(queries.sel(layer=ASKED[0], head=ASKED[1])) < 1e-2  # it looks at its own place, whatever is there

    def test_the_circuit_is_both(self):
        found = circuit_reuse(self.model, *self.asked(), threshold=0.2)
        assert {tuple(at) for at in np.argwhere(found["round"].notnull().values)} == {ASKED, TELLER}
        assert found["round"].values[TELLER] == 0
        assert found["round"].values[ASKED] == 2
        assert abs(found["effect"].values[ASKED]) > 0.5

    def test_all_heads_alone_are_faithful_and_none_are_not(self):
        between = Contrast(self.model, *self.asked())
        assert between.faithfulness(between.heads) == pytest.approx(1)
        assert between.faithfulness([]) == pytest.approx(0)
        assert between.faithfulness([ASKED, TELLER]) > 0.9
        assert between.faithfulness([ASKED]) < 0.2

    def test_a_head_acts_at_the_token_where_it_writes(self):
        found = head_patching(self.model, *self.asked(), by_token=True)
        assert found.sel(layer=1, head=5).values.argmax() == 10  # the question mark
        rest = found.sel(layer=1, head=5).values.copy()
        rest[10] = 0
        assert np.abs(rest).max() < 0.05
        assert head_patching(self.model, *self.asked()).sel(layer=1, head=5) == pytest.approx(
            float(found.sel(layer=1, head=5, token=10)), abs=0.05
        )


def test_by_hand():
    """Logit difference 2 a + b: clean heads give 1 and 1, corrupted ones 0 and -1: both effects are one half."""
    model, inputs, other, _ = contrast(gpt2)
    between = Contrast(model, inputs, other, lambda logits: logits[:, -1, 5])
    between.whole, between.gap = torch.tensor([3.0]), -4.0
    assert between.effect(torch.tensor([[1.0], [1.0], [3.0], [-1.0]])).tolist() == [0.5, 0.5, 0.0, 1.0]


@pytest.mark.parametrize("family", [gpt2, llama])
def test_through_all_it_reaches_a_sender_has_its_whole_effect_at_the_token(family):
    """Logits see what the last layer gives on, so that where no head follows the direct effect is the effect."""
    given = contrast(family)
    direct = path_patching(*given)
    last = Contrast(*given).patched([((1, head), torch.tensor([11, 11])) for head in range(4)])
    assert direct.sel(layer=1).values == pytest.approx(last.numpy(), abs=1e-5)


@pytest.mark.parametrize("family", [gpt2, llama])
@pytest.mark.parametrize("component", ["query", "key", "value", "output"])
def test_a_receiver_is_given_what_the_sender_changes(family, component):
    """With every sender of layer 0 at once, and modules after it free, heads of layer 1 have their corrupted query."""
    model, clean, corrupted, score = contrast(family)
    found = path_patching(model, clean, corrupted, score, receivers=[(1, 2)], component=component)
    assert (found.sel(layer=1) == 0).all()
    assert (abs(found.sel(layer=0)) > 1e-9).any()
    one = path_patching(model, clean, corrupted, score, receivers=[(1, 2)], component=component, at_once=1)
    assert one.values == pytest.approx(found.values, abs=1e-6)


def test_frozen_feed_forward_modules_carry_nothing():
    given = contrast(llama)
    free, frozen = (path_patching(*given, freeze_mlps=freeze) for freeze in (False, True))
    assert abs(free - frozen).max() > 1e-4
    # what is left is added to the stream, and the score is linear but for the last norm
    assert frozen.sel(layer=1).values != pytest.approx(frozen.sel(layer=0).values)


def padded(inputs):
    ids = nn.functional.pad(inputs["input_ids"], (3, 0))
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) >= 3).long().expand(len(ids), -1)}


def test_padding_and_another_batch_change_nothing():
    model, clean, corrupted, score = contrast(llama)
    whole = path_patching(model, clean, corrupted, score)
    left = path_patching(model, padded(clean), padded(corrupted), score)
    assert left.values == pytest.approx(whole.values, abs=1e-5 * abs(whole.values).max())
    twice = [{"input_ids": of["input_ids"].repeat(2, 1)} for of in (clean, corrupted)]
    assert path_patching(model, *twice, score).values == pytest.approx(whole.values, abs=1e-5)
    with pytest.raises(ValueError, match="token 1 is padding"):
        path_patching(model, padded(clean), padded(corrupted), score, token=1)


def circuit(heads):
    rounds = xr.DataArray(np.full((3, 4), np.nan), {"layer": range(3), "head": range(4)}, ("layer", "head"))
    for layer, head in heads:
        rounds.loc[{"layer": layer, "head": head}] = 0
    return xr.Dataset({"round": rounds})


def test_overlap_by_hand():
    found = overlap(circuit([(0, 1), (1, 2), (2, 3)]), circuit([(1, 2), (2, 3), (2, 0), (0, 0)]))
    assert found.shared == [(1, 2), (2, 3)]
    assert (found.jaccard, found.of_smaller) == (2 / 5, 2 / 3)
    assert np.isnan(overlap(circuit([]), circuit([(0, 1)])).jaccard)


def test_a_head_is_made_to_look_at_chosen_tokens():
    model, inputs = made(llama)
    tokens = torch.tensor([[2, 5], [1, 7]])
    with torch.no_grad(), intervene(model, look_at([(1, 2)], tokens)), record(model, "rows") as recording:
        model(**inputs)
    rows = recording.tree["language_model"]["rows"].sel(layer=1, head=2)
    for row, places in enumerate(tokens.tolist()):
        last = rows.isel(batch=row, query=-1).values
        assert last[places].tolist() == [0.5, 0.5]
        assert np.delete(last, places).max() == 0
        assert rows.isel(batch=row, query=-2).values[places].tolist() != [0.5, 0.5]
    uneven = look_at([(1, 2)], tokens, shares=torch.tensor([0.25, 0.75]), query=torch.tensor([6, 9]))
    with torch.no_grad(), intervene(model, uneven), record(model, "rows") as recording:
        model(**inputs)
    rows = recording.tree["language_model"]["rows"].sel(layer=1, head=2)
    assert rows.isel(batch=0, query=6).values[[2, 5]].tolist() == [0.25, 0.75]
    assert rows.isel(batch=1, query=9).values[[1, 7]].tolist() == [0.25, 0.75]


def test_bad_input_is_named_and_the_model_left_as_it_was():
    model, clean, corrupted, score = contrast(llama)
    model.train()
    own = (model, clean, corrupted)
    for error, run in (
        ("the score is .* in both runs", lambda: path_patching(model, clean, clean, score)),
        ("differ in rows and tokens", lambda: path_patching(model, clean, padded(clean), score)),
        ("one number a row", lambda: path_patching(*own, lambda logits: logits.mean())),
        ("component is one of", lambda: path_patching(*own, score, component="z")),  # type: ignore[arg-type]
        ("no receivers are named", lambda: path_patching(*own, score, receivers=[])),
        ("no receiver", lambda: path_patching(*own, score, receivers=[(1, 9)], component="query")),
        ("has no residual", lambda: path_patching(*own, score, receivers=[(1, 2)])),
        ("lies outside", lambda: path_patching(*own, score, token=12)),
        ("1 to 3 rounds", lambda: circuit_reuse(*own, score, rounds=4)),
        ("say stack=", lambda: path_patching(*(made(t5)), clean, score)),
        ("no heads are named", lambda: look_at([], torch.zeros(2, 1, dtype=torch.long))),
        (r"tokens are indices \[batch, k\]", lambda: look_at([(0, 0)], torch.zeros(2))),
        ("numbers of 0 or more that make 1", lambda: look_at([(0, 0)], clean["input_ids"], shares=torch.ones(12))),
    ):
        with pytest.raises(ValueError, match=error):
            run()
    for error, edit in (
        ("no heads in layers", look_at([(7, 0)], torch.zeros(2, 1, dtype=torch.long))),
        ("and no 6", look_at([(1, 6)], torch.zeros(2, 1, dtype=torch.long))),
        ("does not see all of its tokens", look_at([(1, 1)], torch.full((2, 1), 9), query=4)),
        ("has keys 0 to 11", look_at([(1, 1)], torch.full((2, 1), 12))),
        ("given for 3 rows", look_at([(1, 1)], torch.zeros(3, 1, dtype=torch.long))),
    ):
        with pytest.raises(ValueError, match=error), intervene(model, edit):
            model(**clean)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_repeating_has_its_circuit():
    drawn = batch(induction(12, words=range(2, 15), length=6, at=3), int)
    first = torch.zeros(12, 1, dtype=torch.long)

    def score(logits):
        return logits[torch.arange(12), -1, drawn.answers[:, 0]] - logits[:, -1].mean(-1)

    clean, corrupted = ({"input_ids": torch.cat([first, ids], 1)} for ids in (drawn.ids, drawn.corrupted))
    between = Contrast(planted(), clean, corrupted, score)
    # one tells the other where to look, from a token before the last: only with all tokens patched is it seen
    for token, seen in ((None, True), (-1, False)):
        through = between.paths([Receiver(*INDUCTION)], "key", token)
        assert (through.sel(layer=PREVIOUS[0], head=PREVIOUS[1]).item() > 0.5) == seen
    assert between.faithfulness(INDUCTIVE) > 0.9
    assert between.faithfulness([(1, 5), (2, 4), (0, 0)]) < 0.2
    assert repeats(2).ids.shape[1] == 11
