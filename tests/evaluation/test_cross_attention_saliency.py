"""Cross attention beside what hiding parts of the input, or of the encoder's states, shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from regard.evaluation.cross_attention_saliency import (
    agreement,
    cross_attention_saliency,
    perturbation_saliency,
    pooled,
    written,
)
from regard.seam import record
from tests.families import bart, llama, made, t5, whisper

EVERY = np.ones(3, bool)


def test_agreement_by_hand():
    one, other = np.array([[0.7, 0.2, 0.1]]), np.array([[4.0, 1.0, 1.0]])
    assert agreement(one, other, EVERY) == pytest.approx(np.corrcoef(one[0], other[0])[0, 1])
    assert agreement(one, other, EVERY) == pytest.approx(0.9878, abs=1e-4)
    both = agreement(np.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]), np.array([[4.0, 1.0, 1.0], [4.0, 1.0, 1.0]]), EVERY)
    assert both == pytest.approx((0.9878 - 0.6286) / 2, abs=1e-3)  # each token counts alike


def test_agreement_is_one_of_the_same_and_does_not_know_scale_nor_padding():
    rng = np.random.default_rng(0)
    one, other = rng.random((4, 6)), rng.random((4, 6))
    real = np.ones(6, bool)
    assert agreement(one, one, real) == pytest.approx(1)
    scales = rng.random((4, 1)) + 0.5
    assert agreement(one, scales * other + 3 * scales, real) == pytest.approx(agreement(one, other, real))
    wide = [np.concatenate([of, np.full((4, 3), v)], 1) for of, v in ((one, 0.0), (other, 9.0))]
    assert agreement(*wide, np.arange(9) < 6) == pytest.approx(agreement(one, other, real))
    other[1:] = 2.0
    assert agreement(one, other, real) == pytest.approx(np.corrcoef(one[0], other[0])[0, 1])
    assert np.isnan(agreement(one, np.ones((4, 6)), real))


def test_a_saliency_is_pooled_over_what_belongs_to_a_position():
    values = np.arange(24.0).reshape(1, 1, 3, 8)
    sound = xr.DataArray(values, dims=("batch", "token", "row", "column"), attrs={"time": "column"})
    assert pooled(sound, 4)[0, 0].tolist() == [17, 19, 21, 23]
    assert pooled(sound, 4, "mean")[0, 0].tolist() == [8.5, 10.5, 12.5, 14.5]
    turned = xr.DataArray(values.swapaxes(2, 3), dims=sound.dims, attrs={"time": "row"})
    assert pooled(turned, 4)[0, 0].tolist() == [17, 19, 21, 23]
    with pytest.raises(ValueError, match="of 8 places cannot be of an encoder of 9"):
        pooled(sound, 9)


@pytest.mark.parametrize("family", [t5, bart, whisper])
@pytest.mark.parametrize("on", ["input", "encoder"])
def test_saliency_is_the_mean_divergence_of_runs_that_hide_a_part(family, on):
    model, inputs = made(family)
    found = perturbation_saliency(model, inputs, on=on, masks=6, grid=(2, 5), seed=3)
    again = perturbation_saliency(model, inputs, on=on, masks=6, grid=(2, 5), seed=3, batch=3)
    assert found.values == pytest.approx(again.values, abs=1e-6)
    text = "input_ids" in inputs
    with torch.no_grad():
        if on == "encoder":
            states = model.get_encoder()(inputs.get("input_ids", inputs.get("input_features"))).last_hidden_state
        else:
            states = model.get_input_embeddings()(inputs["input_ids"]) if text else inputs["input_features"]

        def said(states):
            key = "encoder_outputs" if on == "encoder" else "inputs_embeds" if text else "input_features"
            given = {key: (states,) if on == "encoder" else states, "decoder_input_ids": inputs["decoder_input_ids"]}
            return model(**given).logits.log_softmax(-1)

        sound = not text and on == "input"
        bands, times = (2, 5) if sound else (1, states.shape[1] if text else 5)
        chosen = torch.rand(6, bands, times, generator=torch.Generator().manual_seed(3)) < 0.5
        whole, base = said(states), states.mean((1, 2), keepdim=True) if sound else torch.zeros(1)
        apart = []
        for mask in chosen:
            if sound:
                spread = mask.repeat_interleave(4, 0).repeat_interleave(8, 1)  # 8 bands, 40 frames
            else:
                spread = mask[0].repeat_interleave(states.shape[1] // times)[:, None]
            other = said(torch.where(spread, base, states))
            apart.append((whole.exp() * (whole - other)).sum(-1))
        expected = sum(a[..., None, None] * m for a, m in zip(apart, chosen)) / chosen.sum(0)
    cells = found.values if found.ndim == 4 else found.values[:, :, None]
    step = [cells.shape[2] // bands, cells.shape[3] // times]
    assert cells[:, :, :: step[0], :: step[1]] == pytest.approx(expected.numpy(), abs=1e-5)
    assert found.values.min() >= 0


@pytest.mark.parametrize("family", [t5, whisper])
def test_correlations_are_those_of_the_maps(family):
    model, inputs = made(family)
    saliency = perturbation_saliency(model, inputs, on="encoder", masks=20)
    found = cross_attention_saliency(model, inputs, on="encoder", masks=20)
    with torch.no_grad(), record(model, "rows") as recording:
        model(**inputs, use_cache=False)
    rows = recording.tree["decoder_cross"]["rows"].transpose("batch", "layer", "head", "query", "key").values

    def rho(of, row):
        return np.mean([np.corrcoef(of[token], saliency.values[row, token])[0, 1] for token in range(5)])

    for row in range(2):
        assert found["rho"].values[row, 1, 2] == pytest.approx(rho(rows[row, 1, 2], row), abs=1e-5)
        assert found["rho_layer"].values[row, 0] == pytest.approx(rho(rows[row, 0].mean(0), row), abs=1e-5)
        assert found["rho_head"].values[row, 3] == pytest.approx(rho(rows[row, :, 3].mean(0), row), abs=1e-5)
        assert found["rho_all"].values[row] == pytest.approx(rho(rows[row].mean((0, 1)), row), abs=1e-5)
    assert found["tokens"].values.tolist() == [5, 5]


def test_the_saliency_that_is_the_attention_agrees_wholly_and_an_even_one_is_counted():
    model, inputs = made(bart)
    with torch.no_grad(), record(model, "rows") as recording:
        model(**inputs, use_cache=False)
    rows = recording.tree["decoder_cross"]["rows"].mean(("layer", "head")).transpose("batch", "query", "key")
    own = rows.rename(query="token", key="column").copy()
    own[0, 1] = 0.5
    found = cross_attention_saliency(model, inputs, saliency=own)
    assert found["rho_all"].values == pytest.approx(1)
    assert (found["tokens"].values.tolist(), found["constant"].values.tolist()) == ([4, 5], [1, 0])


def test_padding_is_left_out():
    model, inputs = made(bart)
    ids = torch.nn.functional.pad(inputs["input_ids"], (0, 3), value=1)
    mask = (torch.arange(15) < 12).long().expand(2, -1)
    long = {**inputs, "input_ids": ids, "attention_mask": mask}
    whole = perturbation_saliency(model, inputs, masks=20)
    wide = xr.DataArray(np.concatenate([whole.values, np.full((2, 5, 3), 7.0)], -1), dims=whole.dims)
    found = cross_attention_saliency(model, long, saliency=wide)
    assert found["rho"].values == pytest.approx(
        cross_attention_saliency(model, inputs, saliency=whole)["rho"].values, abs=1e-4
    )


def test_what_a_model_writes_counts_until_its_end_and_without_its_prompt():
    model, inputs = made(whisper)
    model.generation_config.max_length = 8
    model.generation_config.forced_decoder_ids = None
    own = {"input_features": inputs["input_features"]}
    ids = model.generate(**own, do_sample=False, num_beams=1)
    begun = torch.full((2, 1), model.config.decoder_start_token_id)
    ids = ids if torch.equal(ids[:, :1], begun) else torch.cat([begun, ids], 1)  # Whisper's leaves it out
    given, counted = written(model, own)
    assert torch.equal(given["decoder_input_ids"], ids[:, :-1])
    with torch.no_grad():
        said = model(**given).logits.argmax(-1)
    assert (said == ids[:, 1:])[counted].all()  # what follows is what was written
    for row in range(2):
        said = ids[row].tolist()
        end = said.index(2, 1) if 2 in said[1:] else len(said) - 1
        assert counted[row].tolist() == [at < end for at in range(len(said) - 1)]
    assert written(model, inputs)[1].all()


def test_bad_input_is_named():
    model, inputs = made(whisper)
    for error, run in (
        ("no decoder that attends to an encoder", lambda: cross_attention_saliency(*made(llama))),
        ("pool is one of max, mean", lambda: cross_attention_saliency(model, inputs, pool="sum")),  # type: ignore[arg-type]
        ("on is one of input, encoder", lambda: perturbation_saliency(model, inputs, on="x")),  # type: ignore[arg-type]
        ("masks are 2 or more", lambda: perturbation_saliency(model, inputs, masks=1)),
        (
            "none of its axes has the model's 8 bands",
            lambda: perturbation_saliency(model, {**inputs, "input_features": torch.zeros(2, 9, 40)}),
        ),
        (
            "is given decoder_input_ids",
            lambda: perturbation_saliency(model, {"decoder_input_ids": inputs["decoder_input_ids"]}),
        ),
        (
            "rows and tokens",
            lambda: cross_attention_saliency(
                model, inputs, saliency=xr.DataArray(np.zeros((2, 4, 20)), dims=("batch", "token", "column"))
            ),
        ),
    ):
        with pytest.raises(ValueError, match=error):
            run()
    assert not model.training
