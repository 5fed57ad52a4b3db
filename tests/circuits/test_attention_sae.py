"""Features of heads' outputs: training, what they are made of, and what changing them does."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import regard
from regard.circuits import attention_sae as module
from regard.circuits._outputs import of_layer, side_by_side
from regard.circuits.attention_sae import (
    AttentionSAE,
    Training,
    attention_sae,
    density,
    edit_features,
    exemplars,
    head_outputs,
    loss_recovered,
)
from regard.seam import intervene
from tests.families import gpt2, llama, made, t5


def by_hand(sparsity: float = 0.5) -> AttentionSAE:
    sae = AttentionSAE(2, 1, sparsity=sparsity)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0], [0.0]]))
        sae.W_dec.copy_(torch.tensor([[0.6, 0.8]]))
    return sae


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_by_hand():
    coded = by_hand()(torch.tensor([[2.0, 1.0]]))
    assert coded.features.tolist() == [[2.0]]
    assert coded.reconstruction.tolist() == [pytest.approx([1.2, 1.6])]
    assert (coded.squared.item(), coded.sparsity.item()) == pytest.approx((1.0, 1.0))
    assert coded.loss.item() == pytest.approx(2.0)
    # sums over dimensions, means over tokens
    assert by_hand()(torch.tensor([[2.0, 1.0], [0.0, 0.0]])).loss.item() == pytest.approx(1.0)


def test_a_step_keeps_rows_and_leaves_out_what_lies_along_them():
    sae = AttentionSAE(6, 9, seed=1)
    sae(torch.randn(20, 6)).loss.backward()
    with torch.no_grad():
        sae.W_dec *= 3
    sae.hold_rows()
    assert sae.W_dec.norm(dim=-1).tolist() == pytest.approx([1.0] * 9)
    assert (sae.W_dec.grad * sae.W_dec).sum(-1).abs().max() < 1e-6
    assert sae.W_dec.grad.abs().max() > 0


def planted(n: int, seed: int) -> torch.Tensor:
    """Sums of a few of 12 directions, more than there are dimensions."""
    generator = torch.Generator().manual_seed(7)
    atoms = nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 12, generator=generator) < 0.08) * (0.5 + torch.rand(n, 12, generator=generator)) @ atoms


def test_planted_directions_are_found_and_untrained_ones_are_not():
    generator = torch.Generator().manual_seed(7)
    atoms = nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=-1)
    sae = AttentionSAE(8, 24, sparsity=0.2)

    def near() -> torch.Tensor:
        return (atoms @ sae.W_dec.detach().T).amax(1)

    before = near()
    training = Training(sae, batch=256, mix=4, rate=3e-3, resample=200)
    for part in planted(256 * 600 + 100, seed=1).split(1000):  # comes in other sizes than it is learned in
        training.add(part)
    told = training.finish()
    assert told.sizes["step"] == 600
    assert told.attrs["tokens"] == 256 * 600
    assert len(told.attrs["anew"]) == 3
    assert float(near().mean()) > 0.85 > 0.7 > float(before.mean())
    found = density(sae, planted(2000, seed=2).split(500))
    assert found.attrs["explained"] > 0.9
    assert found.attrs["dead"] == int((found["rate"] == 0).sum())
    assert found.attrs["active"] == pytest.approx(float(found["rate"].sum()))


def test_dead_features_start_anew_where_the_loss_is():
    sae = AttentionSAE(4, 3)
    with torch.no_grad():
        sae.b_enc.copy_(torch.tensor([0.0, -100.0, 0.0]))
    training = Training(sae, batch=8, mix=1, resample=4, resamples=1, rate=0.0)
    far = torch.zeros(8, 4)
    far[0, 2] = -5.0  # all the loss
    for _ in range(4):
        training.add(far)
    assert len(training.anew) == 1
    assert training.anew[0] >= 1
    assert sae.W_dec[1].tolist() == [0, 0, -1, 0]
    assert sae.b_enc[1] == 0
    assert training.optimiser.state[sae.W_dec]["exp_avg_sq"][1].sum() == 0


@pytest.mark.parametrize("family", [gpt2, llama])
def test_source_attribution_adds_up_over_grouped_heads(family):
    model, inputs = made(family)
    call, output = of_layer(model, inputs, 1)
    sae = AttentionSAE(32, 10, seed=3)
    whole = sae.source_attribution(call, 4)
    assert torch.allclose(whole.sum(-1), (side_by_side(output) @ sae.W_enc[:, 4]).detach(), atol=1e-5)
    assert whole.triu(1).abs().max() == 0  # nothing comes from later tokens
    assert torch.allclose(sae.source_attribution(call, 4, queries=range(3, 6)), whole[:, 3:6], atol=1e-6)
    heads = sae.head_attribution(4)
    assert torch.allclose(heads.sum(-1), torch.ones(10))
    assert heads[2, 1].item() == pytest.approx(
        (sae.W_dec[2, 8:16].norm() / sum(sae.W_dec[2, i : i + 8].norm() for i in (0, 8, 16, 24))).item()
    )


def test_with_the_error_kept_a_feature_at_its_value_changes_nothing_and_another_value_does():
    model, inputs = made(llama)
    one = {"input_ids": inputs["input_ids"][:1]}
    sae, own = AttentionSAE(32, 10, seed=3), logits(model, one)
    _, output = of_layer(model, one, 0)
    value = sae.encode(side_by_side(output)).detach()[0, 5, 2].item()
    there = torch.arange(12) == 5
    with intervene(model, edit_features(sae, 0, {2: value}, tokens=there)):
        assert torch.allclose(logits(model, one), own, atol=1e-6)
    with intervene(model, edit_features(sae, 0, {2: value + 1}, tokens=there)):
        changed = (logits(model, one) - own).abs().amax(-1)[0]
    assert changed[:5].max() == 0
    assert changed[5] > 1e-4
    assert torch.equal(logits(model, one), own)


def test_loss_is_recovered_by_an_exact_code_and_not_by_an_empty_one():
    model, inputs = made(gpt2)
    exact = AttentionSAE(32, 64)
    with torch.no_grad():  # x = relu(x) - relu(-x)
        exact.W_enc.copy_(torch.cat([torch.eye(32), -torch.eye(32)], 1))
        exact.W_dec.copy_(exact.W_enc.T)

    def loss(model):
        given = model(**inputs).logits
        return nn.functional.cross_entropy(given.transpose(1, 2), inputs["input_ids"], reduction="none").mean(1)

    found = loss_recovered(model, loss, exact, layer=1)
    assert found.share == pytest.approx(1.0, abs=1e-4)
    with torch.no_grad():
        exact.W_dec.zero_()
    assert loss_recovered(model, loss, exact, layer=1).share == pytest.approx(0.0, abs=1e-4)


def padded(inputs):
    ids = nn.functional.pad(inputs["input_ids"], (3, 0))
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) >= 3).long().expand(2, -1)}


def test_a_sink_and_batches_give_the_same_without_padding():
    model, inputs = made(llama)
    given = padded(inputs)
    [plain], [of_padded] = (list(head_outputs(model, [of], 1)) for of in (inputs, given))
    assert plain.shape == (24, 32)
    assert torch.allclose(plain, of_padded, atol=1e-5)
    one, other = (Training(AttentionSAE(32, 16), batch=8, mix=3) for _ in range(2))
    one.add(of_padded)
    with torch.inference_mode(), regard.record(model, outputs=module.outputs, sink=other.of(layer=1)):
        model(**given)
    assert len(one.finish()["step"]) == len(other.finish()["step"]) == 3
    assert torch.allclose(one.sae.W_enc, other.sae.W_enc, atol=1e-6)


def test_exemplars_are_the_strongest_and_never_padding():
    model, inputs = made(llama)
    sae = attention_sae(model, [inputs] * 2, layer=1, features=12, batch=16, sparsity=0.0)
    values = sae.encode(side_by_side(of_layer(model, inputs, 1)[1])).detach()
    found = exemplars(model, [inputs, padded(inputs)], sae, [3, 7], layer=1, k=2)
    for feature in (3, 7):
        best = float(values[..., feature].max())
        assert found["value"].sel(feature=feature).values == pytest.approx([best, best], abs=1e-5)
        row, token = divmod(int(values[..., feature].argmax()), 12)
        where = {tuple(int(found[name].sel(feature=feature)[r]) for name in ("batch", "row", "token")) for r in (0, 1)}
        assert where == {(0, row, token), (1, row, token + 3)}


def test_the_same_seed_gives_the_same():
    model, inputs = made(gpt2)
    one, again, other = (
        attention_sae(model, [inputs] * 3, layer=0, features=8, batch=16, mix=2, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(one.W_dec, again.W_dec)
    assert not torch.equal(one.W_dec, other.W_dec)


def test_bad_input_is_named():
    model, inputs = made(llama)
    sae = AttentionSAE(32, 10)
    call, _ = of_layer(model, inputs, 1)
    for error, run in (
        ("no layer 9 in language_model", lambda: attention_sae(model, [inputs], layer=9)),
        ("no batches", lambda: attention_sae(model, [], layer=0)),
        ("no batch of 4096 tokens", lambda: attention_sae(model, [inputs], layer=0)),
        ("say stack=", lambda: of_layer(*made(t5), 0)),
        ("is of 32 dimensions, and was given 8", lambda: sae.encode(torch.zeros(2, 8))),
        ("not those of 5 heads", lambda: sae.head_attribution(5)),
        ("no feature 10", lambda: sae.source_attribution(call, 10)),
        ("has 4 heads of 8, not 16", lambda: AttentionSAE(16, 4).source_attribution(call, 1)),
        ("nothing is edited", lambda: edit_features(sae, 0)),
        (r"no features \[10\]", lambda: edit_features(sae, 0, {10: 1.0})),
        ("features are some of 0 to 9", lambda: exemplars(model, [inputs], sae, [10], layer=0)),
        ("no outputs", lambda: density(sae, [])),
        ("sparsity 0 or more", lambda: AttentionSAE(4, 4, sparsity=-1)),
        ("resample 2 or more", lambda: Training(sae, resample=1)),
    ):
        with pytest.raises(ValueError, match=re.compile(error)):
            run()
    with pytest.raises(ValueError, match="no layer 7"), intervene(model, edit_features(sae, 7, {0: 1.0})):
        pass
    marked = edit_features(sae, 0, {0: 1.0}, tokens=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="marks 3 positions"), intervene(model, marked):
        model(**inputs)
