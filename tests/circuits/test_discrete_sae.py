"""Codes of heads' outputs, and what they say of a circuit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard.call import UnreachableAttention
from regard.circuits.discrete_sae import DiscreteSAE, area, codes, discrete_sae, pairs_apart, train, unique, written
from regard.claims._planted import TELLING, planted, questions
from tests.families import gemma2, gpt2, llama, made

POSITIVE, NEGATIVE = torch.tensor([[1, 2], [1, 3]]), torch.tensor([[1, 4], [5, 4]])


def test_codes_that_are_there_on_one_side_alone():
    assert unique(POSITIVE, NEGATIVE).tolist() == [0, 2]  # {1} and {1, 5}; {2, 3} and {4}
    assert unique(NEGATIVE, POSITIVE).tolist() == [1, 1]
    assert unique(POSITIVE, NEGATIVE, normalise=True).tolist() == pytest.approx([0, 2 / 3])


def test_pairs_that_are_there_on_one_side_alone():
    assert pairs_apart(POSITIVE, NEGATIVE).tolist() == [[0, 2], [2, 0]]  # (1, 2), (1, 3); (1, 4), (5, 4)
    assert pairs_apart(POSITIVE, NEGATIVE, normalise=True)[0, 1] == 0.5
    # codes that are on both sides, but never together
    assert pairs_apart(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 4], [3, 2]])).tolist() == [[0, 2], [2, 0]]


def test_the_same_on_both_sides_says_nothing():
    assert unique(POSITIVE, POSITIVE).tolist() == [0, 0]
    assert not pairs_apart(POSITIVE, POSITIVE).any()


def test_other_names_of_features_change_no_count():
    given = torch.randn(12, 4, 5, generator=torch.Generator().manual_seed(1))
    sae, order = DiscreteSAE(5, 9, seed=2), torch.randperm(9, generator=torch.Generator().manual_seed(3))
    other = DiscreteSAE(5, 9)
    with torch.no_grad():
        other.encoder.copy_(sae.encoder[order])
        other.offset.copy_(sae.offset[order])
    one, again = codes(sae, given), codes(other, given)
    assert not torch.equal(one, again)
    assert torch.equal(unique(*one.chunk(2)), unique(*again.chunk(2)))


def test_by_hand():
    sae = DiscreteSAE(2, 2, sparsity=0.5)
    with torch.no_grad():
        sae.bias.copy_(torch.tensor([1.0, 0.0]))
        sae.encoder.copy_(torch.eye(2))
        sae.offset.copy_(torch.tensor([0.0, 1.0]))
        sae.decoder.copy_(torch.eye(2))
    features, reconstruction, loss = sae(torch.tensor([[[3.0, -2.0]]]))
    assert features.tolist() == [[[2.0, 0.0]]]
    assert reconstruction.tolist() == [[[3.0, 0.0]]]
    assert loss.item() == pytest.approx(4 / 2 + 0.5 * 2)
    assert codes(sae, torch.tensor([[[3.0, -2.0], [0.0, 4.0]]])).tolist() == [[0, 1]]


def test_training_lowers_the_loss_and_holds_the_rows():
    given = torch.randn(10, 4, 6, generator=torch.Generator().manual_seed(1))
    sae = DiscreteSAE(6, 20)
    losses = train(sae, given, steps=60, rate=1e-2)
    assert losses[-1] < 0.7 * losses[0]
    for matrix in (sae.encoder, sae.decoder):
        assert matrix.norm(dim=-1).tolist() == pytest.approx([1.0] * len(matrix), abs=1e-6)
    assert sae.decoder.shape == (6, 20)  # whose rows are over features


def test_area_counts_a_tie_as_one_half():
    assert area([3, 1, 2], [True, False, True]) == 1
    assert area([1, 1, 0], [True, False, False]) == 0.75
    with pytest.raises(ValueError, match="0 of 2 heads"):
        area([1, 2], [False, False])


@pytest.mark.parametrize("family", [gpt2, llama])
def test_what_heads_write_adds_up_to_what_attention_gives(family):
    model, inputs = made(family)
    given = []
    attention = next(m for n, m in model.named_modules() if n.endswith((".0.attn", ".0.self_attn")))
    hook = attention.register_forward_hook(lambda module, args, output: given.append(output[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    bias = getattr(getattr(attention, "c_proj", None), "bias", torch.zeros(32))
    for token, expected in (("mean", given[0].mean(1)), ("last", given[0][:, -1])):
        first = next(iter(written(model, inputs, token=token).values()))
        assert torch.allclose(first.sum(1), expected - bias, atol=1e-5)


def test_padding_is_left_out():
    model, inputs = made(llama)
    ids = nn.functional.pad(inputs["input_ids"], (3, 0))
    padded = {"input_ids": ids, "attention_mask": (torch.arange(15) >= 3).long().expand(2, -1)}
    for token in ("mean", "last"):
        whole, other = (written(model, given, token=token) for given in (inputs, padded))
        for one, again in zip(whole.values(), other.values()):
            assert torch.allclose(one, again, atol=1e-5)


def test_planted_heads_stand_out():
    ids, _ = questions(100)
    asked = {"input_ids": ids}
    other = {"input_ids": torch.cat([ids[:, :-1], ids[:, 3:4]], 1)}  # a word, where the question mark was
    found = discrete_sae(planted(), asked, other, steps=100, token="last", pairs=True)
    truth = [(layer, head) in TELLING for layer in range(3) for head in range(6)]
    assert area(found["unique"].values.ravel(), truth) > 0.9
    same = discrete_sae(planted(), asked, asked, steps=5)
    assert not same["unique"].any()
    at = {"layer": 1, "head": 5, "to_layer": 2, "to_head": 4}
    assert found["unique_pairs"].sel(at) >= found["unique"].sel(layer=1, head=5)
    assert found["unique_pairs"].sel(layer=1, head=5, to_layer=1, to_head=5) == 0


def test_bad_input_is_named():
    model, inputs = made(llama)
    half = {"input_ids": inputs["input_ids"][:1]}
    with pytest.raises(ValueError, match="2 positive and 1 negative rows"):
        discrete_sae(model, inputs, half)
    with pytest.raises(ValueError, match="drawn from 4 rows, and 10"):
        discrete_sae(model, inputs, inputs)
    with pytest.raises(ValueError, match="'mean' or 'last'"):
        written(model, inputs, token="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no heads of stack 'vision'"):
        written(model, inputs, stack="vision")
    with pytest.raises(UnreachableAttention, match="cannot be taken apart"):
        written(*made(gemma2))
    with pytest.raises(ValueError, match="features are 2 or more"):
        DiscreteSAE(4, 1)
