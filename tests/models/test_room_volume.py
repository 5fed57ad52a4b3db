"""Room volumes: filters on tones, tokens and factors by hand, rooms whose reflections are counted, a start from ViT."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

import regard
from regard.data.rooms import SPEED, heard, impulse_response, reflections
from regard.interventions import scale_heads
from regard.models.room_volume import RoomVolume, centres, features, filtered, mean_mult, room_volume

SMALL = {"rows": 24, "columns": 60, "patch": 8, "stride": 6, "dim": 16, "layers": 2, "heads": 2}
PICTURES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tone(frequency, rate=8000, seconds=0.5):
    return (2 * math.pi * frequency * torch.arange(int(rate * seconds)) / rate).cos()[None]


def test_the_factor_by_hand():
    assert float(mean_mult(torch.tensor([200.0, 50.0]), torch.tensor([100.0, 100.0]))) == pytest.approx(2)
    model, given = room_volume(**SMALL), torch.randn(2, 24, 60)
    model.standardise(given, torch.tensor([100.0, 100.0]))
    model.read[1].weight.data.zero_()
    assert model.loss(given, torch.tensor([200.0, 200.0])).item() == pytest.approx(math.log10(2) ** 2, abs=1e-6)


def test_bands_are_evenly_spread_in_bandwidths():
    found = centres(20, 50, 2000)
    assert float(found[0]) == pytest.approx(50)
    assert float(found[-1]) == pytest.approx(2000)
    steps = (21.4 * (1 + 0.00437 * found).log10()).diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps))


def test_a_band_passes_its_own_tone_and_halves_by_the_form_of_its_filter():
    frequencies = centres(16, 50, 2000)
    width = 1.019 * 24.7 * (4.37 * float(frequencies[8]) / 1000 + 1)
    own = filtered(tone(float(frequencies[8])), 8000, frequencies)[0, 8, 1000:3000]
    torch.testing.assert_close(own.abs(), torch.ones(2000), atol=1e-3, rtol=0)
    torch.testing.assert_close(own.real, tone(float(frequencies[8]))[0, 1000:3000], atol=2e-3, rtol=0)
    off = filtered(tone(float(frequencies[8]) + width), 8000, frequencies)[0, 8, 1000:3000]
    torch.testing.assert_close(off.abs(), torch.full((2000,), 0.25), atol=1e-3, rtol=0)  # (1 + 1)^(-4 / 2)


def test_the_filter_is_the_gammatone():
    rate, f = 8000, torch.tensor([700.0], dtype=torch.float64)
    width = 1.019 * 24.7 * (4.37 * 0.7 + 1)
    t = np.arange(800) / rate
    # amplitude 1 at its own frequency: integral of t^3 exp(-2 pi b t) is 3! / (2 pi b)^4
    kernel = (
        t**3 * np.exp(-2 * np.pi * width * t) * np.cos(2 * np.pi * 700 * t) * 2 * (2 * np.pi * width) ** 4 / 6 / rate
    )
    click = torch.zeros(1, 800)
    click[0, 0] = 1
    torch.testing.assert_close(
        filtered(click, rate, f)[0, 0].real.numpy(), kernel.astype(np.float32), atol=2e-4, rtol=0
    )


def test_what_comes_last_does_not_ring_at_the_start():
    click = torch.zeros(1, 2000)
    click[0, -1] = 1
    assert filtered(click, 8000, centres(8, 50, 2000))[..., :1000].abs().max() < 1e-4
    start = filtered(click.flip(1), 8000, centres(8, 50, 2000))  # of the same click where it is heard
    assert start.abs().amax(-1).min() > 1e-2


def test_rows_are_energy_then_phase():
    frequencies = centres(16, 50, 2000)
    wave = tone(float(frequencies[8])) * 0.5
    found = features(wave, 8000, bands=16, window=128, hop=64, phases=4)[0]
    assert found.shape == (24, (4000 - 128) // 64 + 1)
    assert int(found[:16, 20].argmax()) == 8
    assert float(found[8, 20]) == pytest.approx(math.log(0.25 / 2), abs=0.02)
    low = features(tone(float(frequencies[0]), seconds=1.0), 8000, bands=16, window=128, hop=64, phases=4)[0]
    expected = 2 * math.pi * float(frequencies[0]) * (64 + 64 * 50) / 8000
    assert float((low[16, 50] - expected).sin()) == pytest.approx(0, abs=0.02)
    bands = filtered(tone(float(frequencies[0]), seconds=1.0), 8000, frequencies)[0, :, 64 + 64 * 50]
    assert float((low[20, 50] - (bands[1].angle() - bands[0].angle())).sin()) == pytest.approx(0, abs=1e-4)
    loud = features(10 * wave, 8000, bands=16, window=128, hop=64, phases=4)[0]
    torch.testing.assert_close(loud[16:], found[16:], atol=2e-2, rtol=0)  # loudness has no part in phase
    torch.testing.assert_close(loud[8] - found[8], torch.full_like(loud[8], math.log(100)), atol=1e-3, rtol=0)
    assert features(wave, 8000, phases=0).shape[1] == 20
    under = int((frequencies < 500).sum())  # the phases are of bands evenly spread up to the last of these
    every = filtered(wave, 8000, frequencies)[0, :, 64 + 64 * 20].angle()
    chosen = torch.linspace(0, under - 1, 4).round().long()
    assert chosen.tolist() != [0, 1, 2, 3]
    found = features(wave, 8000, bands=16, window=128, hop=64, phases=4)[0, 16:20, 20]
    torch.testing.assert_close((found - every[chosen]).sin(), torch.zeros(4), atol=1e-3, rtol=0)


def test_tokens_of_four_seconds():
    with torch.device("meta"):
        model = room_volume()
    assert model.grid == (2, 199)
    assert model.transformer.embeddings.position_embeddings.shape[1] == 398 + 2


def test_each_clip_is_its_own_and_rows_are_standardised():
    model, given = room_volume(**SMALL).eval(), torch.randn(3, 24, 60)
    torch.testing.assert_close(model(given[:1]), model(given)[:1], atol=1e-5, rtol=1e-4)
    for parameter in (model.transformer.embeddings.cls_token, model.transformer.layernorm.weight):
        torch.nn.init.normal_(parameter)
    tokens = torch.nn.functional.layer_norm(model.transformer(given.mT).last_hidden_state, (16,))
    torch.testing.assert_close(model(given), model.read[1](tokens[:, 0])[:, 0])  # the class token's
    other = room_volume(**SMALL).eval()
    other.load_state_dict(model.state_dict())
    shifted = given * torch.linspace(1, 5, 24)[:, None] + torch.linspace(-7, 7, 24)[:, None]
    for one, seen in ((model, given), (other, shifted)):
        one.standardise(seen, torch.tensor([10.0, 1000.0]))
        assert one.read[1].bias.item() == pytest.approx(2)
    torch.testing.assert_close(other(shifted), model(given), atol=1e-4, rtol=1e-4)
    other.standardise(torch.ones(2, 24, 60))  # where nothing varies
    assert other(shifted).isfinite().all()


def test_record_sees_its_layers():
    model = room_volume(**SMALL).eval()
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        model(torch.randn(2, 24, 60))
    (stack,) = recording.tree.children.values()
    assert dict(stack["entropy"].sizes) == {"batch": 2, "layer": 2, "head": 2, "query": 3 * 9 + 2}
    given = torch.randn(2, 24, 60)
    with torch.no_grad():
        plain = model(given)
        with regard.intervene(model, scale_heads({(1, 0): 0.0, (1, 1): 0.0}, stack="encoder")):
            assert (model(given) - plain).abs().max() > 1e-4
        assert torch.equal(model(given), plain)


def test_it_learns_and_is_saved(tmp_path):
    model = room_volume(**SMALL)
    given = torch.randn(16, 24, 60)
    volumes = 10 ** (2 + given[:, 3].mean(1) * 4)
    model.standardise(given, volumes)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    first = model.loss(given, volumes).item()
    for _ in range(40):
        optimiser.zero_grad()
        loss = model.loss(given, volumes)
        loss.backward()
        optimiser.step()
    assert loss.item() < first / 4
    assert all(p.grad is not None for n, p in model.named_parameters() if "distillation" not in n)
    model.eval().save_pretrained(tmp_path)
    torch.testing.assert_close(RoomVolume.from_pretrained(tmp_path).eval()(given), model(given))


def test_it_starts_from_a_picture_transformer():
    pictures = ViTModel(ViTConfig(**PICTURES, image_size=40, patch_size=8))  # 5 x 5 places
    for parameter in (pictures.embeddings.position_embeddings, pictures.embeddings.cls_token):
        torch.nn.init.normal_(parameter)
    model = room_volume(**SMALL)
    model.start_from(pictures)
    own, theirs = model.transformer.embeddings, pictures.embeddings
    red_green_blue = theirs.patch_embeddings.projection.weight
    torch.testing.assert_close(own.patch_embeddings.projection.weight[:, 0], red_green_blue.sum(1))
    torch.testing.assert_close(own.position_embeddings[:, 1], theirs.position_embeddings[:, 0])
    for token in (own.cls_token, own.distillation_token):
        torch.testing.assert_close(token, theirs.cls_token)
    places = theirs.position_embeddings[0, 1:].view(5, 5, 16)[1:4]  # the middle three of five rows
    wide = torch.nn.functional.interpolate(places.permute(2, 0, 1)[None], (3, 9), mode="bilinear")
    torch.testing.assert_close(own.position_embeddings[0, 2:], wide.flatten(2)[0].T)
    torch.testing.assert_close(
        model.transformer.layers[1].attention.q_proj.weight, pictures.layers[1].attention.q_proj.weight
    )
    with pytest.raises(ValueError, match="none there"):
        room_volume(**{**SMALL, "layers": 3}).start_from(pictures)


def test_reflections_come_as_often_as_they_should():
    assert float(reflections(200, 0.02)) == pytest.approx(4 / 3 * math.pi * (343 * 0.02) ** 3 / 200)
    counts = []
    for index in range(200):
        found = impulse_response(2000, 0.5, 8.0, rate=400_000, seed=1, index=index)
        assert not found[: round(8 / SPEED * 400_000)].any()  # nothing comes before the direct sound
        counts.append(np.count_nonzero(found[: int(0.03 * 400_000)]) - 1)
    expected = float(reflections(2000, 0.03) - reflections(2000, 8 / SPEED))
    assert np.mean(counts) == pytest.approx(expected, abs=4 * math.sqrt(expected / 200))


def test_a_response_falls_by_its_time_and_its_reverberation_is_one_over_volume():
    responses = {v: [impulse_response(v, 0.6, 1.0, seed=3, index=i) for i in range(40)] for v in (50, 500)}
    for found in responses.values():
        assert found[0][round(8000 / SPEED)] == pytest.approx(math.exp(-3 * math.log(10) / SPEED / 0.6), rel=1e-6)
    assert not impulse_response(1, 0.6, 5.0, seed=3)[: round(5 * 8000 / SPEED)].any()  # dense before it is heard at all
    farther = impulse_response(500, 0.6, 2.0, seed=3)[round(2 * 8000 / SPEED)]
    assert farther == pytest.approx(math.exp(-6 * math.log(10) / SPEED / 0.6) / 2, rel=1e-6)
    power = {v: np.square(found).mean(0) for v, found in responses.items()}
    late = slice(1600, 3600)
    level = np.log10(power[50][late])
    slope = np.polyfit(np.arange(len(level)) / 8000, level, 1)[0]
    assert slope == pytest.approx(-6 / 0.6, rel=0.1)
    assert power[50][late].sum() / power[500][late].sum() == pytest.approx(10, rel=0.3)


def test_loudness_tells_nothing():
    speech = np.sin(np.arange(4000))
    found = heard(speech, impulse_response(100, 0.4, 1.0), 20, seed=2)
    assert np.square(found).mean() == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(heard(9 * speech, impulse_response(100, 0.4, 1.0), 20, seed=2), found, atol=1e-5)
    quiet = heard(np.eye(1, 4000)[0], np.eye(1, 100)[0], 10, seed=2)  # a click: noise is ten decibels below its power
    assert np.square(quiet[1:]).sum() / np.square(quiet[0]) == pytest.approx(0.1, rel=0.2)


def test_refusals():
    model, wave = room_volume(**SMALL), torch.randn(1, 4000)
    for ask, said in [
        (lambda: room_volume(rows=12), "no patch of 16"),
        (lambda: model(torch.zeros(1, 24, 59)), r"\[batch, 24, 60\]"),
        (lambda: model(torch.zeros(0, 24, 60)), "one clip"),
        (lambda: model.loss(torch.zeros(1, 24, 60), torch.tensor([0.0])), "above 0"),
        (lambda: mean_mult(torch.tensor([-1.0]), torch.tensor([1.0])), "above 0"),
        (lambda: features(wave[:, :50]), "64 samples or more"),
        (lambda: features(wave, 8000, bands=8, phases=5), "ask for fewer"),
        (lambda: features(wave, 3000), "samples a second"),
        (lambda: features(wave * math.nan), "finite"),
        (lambda: features(wave[:0]), "one or more"),
        (lambda: features(wave, phases=-1), "ask for fewer"),
        (lambda: room_volume(**{**SMALL, "heads": 0}), "0 heads"),
        (lambda: room_volume(**{**SMALL, "heads": 3}), "do not divide by 3"),
        (lambda: model.loss(torch.zeros(3, 24, 60), torch.ones(1)), r"volumes are \[3\]"),
        (lambda: model.loss(torch.zeros(3, 24, 60), torch.ones(3, 1)), r"volumes are \[3\]"),
        (lambda: model.standardise(torch.zeros(2, 1, 60)), r"\[batch, 24, 60\]"),
        (lambda: model.standardise(torch.full((2, 24, 60), math.nan)), "not finite"),
        (lambda: mean_mult(torch.ones(3), torch.ones(3, 1)), "both"),
        (lambda: mean_mult(torch.ones(0), torch.ones(0)), "one or more"),
        (lambda: model.start_from(torch.nn.Linear(2, 2)), "Linear with no positions"),
        (lambda: model.start_from(ViTModel(ViTConfig(**PICTURES, image_size=(40, 24), patch_size=8))), "square"),
        (lambda: centres(3, 0, 10), "rise"),
        (lambda: impulse_response(0, 0.5, 1), "above 0"),
        (lambda: impulse_response(10, 0.001, 1), "near"),
        (lambda: heard(np.zeros(100), [1.0], 10), "silent"),
    ]:
        with pytest.raises(ValueError, match=said):
            ask()
