from types import SimpleNamespace

import numpy as np
import pytest
import torch

import regard
from regard.attribution.refam import MAGNETS, global_sinks, grounding, refam
from regard.data.scenes import Object, Scene, render
from regard.evaluation.localisation import pointing_game_score

SCENES = [
    Scene((Object("star", "red", "large", 0.25, 0.5), Object("ring", "blue", "large", 0.75, 0.5))),
    Scene((Object("fork", "orange", "large", 0.25, 0.25),)),
]
INPUTS = {"pixel_values": 2 * render(SCENES, 32).tensor() - 1, "text": ["a blue ring", "an orange fork"]}


@pytest.fixture(scope="module")
def pipeline():
    found = regard.load("painter").processor
    found.set_progress_bar_config(disable=True)
    return found


# Two patches, and the words "a red cup"; one layer
WEIGHTS = torch.tensor([[[[0.6, 0.3, 0.1], [0.6, 0.1, 0.3]]]])
ALL = torch.ones(1, 3, dtype=torch.bool)


def test_maps_by_hand():
    plain = {"sinks": False}
    assert torch.allclose(grounding(WEIGHTS, ALL, ALL, **plain), torch.full((1, 2), 1 / 3))
    assert torch.allclose(
        grounding(WEIGHTS, torch.tensor([[False, True, True]]), ALL, **plain), torch.full((1, 2), 0.2)
    )
    red = torch.tensor([[False, True, False]])
    assert torch.allclose(grounding(WEIGHTS, red, ALL, **plain), torch.tensor([[0.3, 0.1]]))


def test_sinks_by_hand():
    # "a" draws 1.8 times its share, from all patches alike; the others vary by half their mean
    assert global_sinks(WEIGHTS, ALL, ratio=1.7).tolist() == [[[True, False, False]]]
    assert not global_sinks(WEIGHTS, ALL, ratio=1.9).any()
    assert global_sinks(WEIGHTS, ALL, ratio=0.1, spread=0.51).all()
    assert global_sinks(WEIGHTS, ALL, ratio=0.1, spread=0.49).sum() == 1
    padded = torch.tensor([[True, True, False]])  # of two words, "a" draws 1.2 times its share
    assert not global_sinks(WEIGHTS, padded, ratio=1.3).any()
    assert global_sinks(WEIGHTS, padded, ratio=0.1, spread=9).tolist() == [[[True, True, False]]]


def test_a_sink_is_left_out_in_its_layer_alone():
    layers = torch.cat([WEIGHTS, torch.tensor([[[[0.2, 0.5, 0.3], [0.1, 0.4, 0.5]]]])], 1)
    found = grounding(layers, ALL, ALL, ratio=1.7)
    # the first layer: the mean of "red" and "cup"; the second: of all three
    assert torch.allclose(found, torch.tensor([[(0.2 + 1 / 3) / 2, (0.2 + 1 / 3) / 2]]))
    assert torch.equal(grounding(layers, ALL, ALL, ratio=9), grounding(layers, ALL, ALL, sinks=False))
    only = torch.tensor([[True, False, False]])
    assert torch.allclose(grounding(layers, only, ALL, ratio=1.7), torch.tensor([[0.2, 0.1]]))  # the second layer's
    assert grounding(WEIGHTS, only, ALL, ratio=1.7).isnan().all()


def run(pipeline, prompts, sigma, noise):
    """Cross attention of the picture, noised by hand: mean over heads. [batch, layer, query, key]"""
    states, mask = pipeline.encode_prompt(prompts)
    noised = torch.lerp(INPUTS["pixel_values"], noise.expand(2, -1, -1, -1), sigma)
    seen = []

    @regard.statistic("batch head query key", title="Weights")
    def keep(call):
        if call.site.cross:
            seen.append(call.weights.dense().mean(1))

    with torch.no_grad(), regard.record(pipeline.transformer, keep):
        time = torch.full((2,), 1000 * float(sigma))
        pipeline.transformer(noised, encoder_hidden_states=states, timestep=time, encoder_attention_mask=mask)
    return torch.stack(seen, 1)


@pytest.mark.parametrize("layers", [None, [1, 3]])
def test_the_picture_is_noised_and_read_once(pipeline, layers):
    found = refam(pipeline, INPUTS, magnets=("and", "pink"), sinks=False, layers=layers, time=0.4, seed=5)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(1000)
    sigma = scheduler.sigmas[(scheduler.timesteps - 400).abs().argmin()]
    assert float(sigma) == pytest.approx(0.4, abs=2e-3)
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    weights = run(pipeline, [f"{text} and pink" for text in INPUTS["text"]], sigma, noise)
    weights = weights if layers is None else weights[:, layers]
    patches = weights[..., 2:4].mean((1, 3)).view(2, 1, 8, 8)  # of <|bos|> a blue ring and pink
    pixels = torch.nn.functional.interpolate(patches, (32, 32), mode="bilinear")[:, 0]
    low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    assert np.allclose(found.values, (pixels - low) / (high - low), atol=2e-3)
    assert found.values.reshape(2, -1).min(1).tolist() == [0, 0]
    assert found.values.reshape(2, -1).max(1).tolist() == [1, 1]


def test_it_finds_what_is_described(pipeline):
    found = refam(pipeline, INPUTS)
    masks = render(SCENES, 32).owner == np.array([1, 0])[:, None, None]
    assert pointing_game_score(found, masks, tolerance=2).all()  # a ring is empty, a fork is thin
    other = refam(pipeline, {**INPUTS, "text": ["a red star", "an orange fork"]})
    assert found.values[0, :, :16].mean() < 0.2 < other.values[0, :, :16].mean()


def test_all_tokens_are_read_where_nothing_is_left_out(pipeline):
    """The weights of all tokens sum to 1, so that their mean says nothing."""
    every = refam(pipeline, INPUTS, stop_words=(), magnets=(), sinks=False, layers=[2])
    some = refam(pipeline, INPUTS, stop_words=(), magnets=(), layers=[2])
    assert not np.allclose(every.values, some.values, atol=0.1)
    words = refam(pipeline, INPUTS, stop_words=("blue", "orange"), magnets=())
    assert not np.allclose(words.values, refam(pipeline, INPUTS, magnets=()).values, atol=0.05)


def test_samples_are_alone_and_the_pipeline_is_left_as_it_was(pipeline):
    before = pipeline.scheduler
    whole = regard.attribute(pipeline, INPUTS, method="refam")
    one = {"pixel_values": INPUTS["pixel_values"][1:], "text": "an orange fork"}
    assert np.allclose(whole.values[1], refam(pipeline, one).values[0], atol=1e-4)
    assert whole.dims == ("batch", "row", "column")
    assert whole.shape == (2, 32, 32)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipeline.transformer.modules())
    with pytest.raises(ValueError, match="paints"):
        refam(pipeline, {"pixel_values": torch.zeros(1, 3, 16, 16), "text": "a fork"})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipeline.transformer.modules())
    assert pipeline.scheduler is before


def test_magnets(pipeline):
    default = refam(pipeline, INPUTS)  # of the usual ones the tokenizer knows one, and the colour
    assert "and" in MAGNETS
    assert np.array_equal(default.values, refam(pipeline, INPUTS, magnets=("and", "pink")).values)
    assert not np.allclose(default.values, refam(pipeline, INPUTS, magnets=()).values, atol=1e-3)
    pink = {"pixel_values": INPUTS["pixel_values"][:1], "text": "a pink ring"}  # has the first colour itself
    assert np.array_equal(refam(pipeline, pink).values, refam(pipeline, pink, magnets=("and", "purple")).values)
    with pytest.raises(ValueError, match="magnet 'giraffe'"):
        refam(pipeline, INPUTS, magnets=("giraffe",))


@pytest.mark.parametrize(
    ("changes", "knobs", "words"),
    [
        ({"text": ["the and of", "a fork"]}, {}, "stop words alone"),
        ({"text": ["a fork"]}, {}, "pixel_values"),
        ({"text": None}, {}, "hold `text`"),
        ({"pixel_values": None}, {}, "pixel_values"),
        ({}, {"time": 1.5}, "share of noise"),
        ({}, {"ratio": 0.0, "spread": 99.0}, "global sink; give sinks=False"),
        ({}, {"layers": [9]}, "layers="),
    ],
)
def test_what_cannot_be_read_is_refused(pipeline, changes, knobs, words):
    with pytest.raises(ValueError, match=words):
        refam(pipeline, {**INPUTS, **changes}, **knobs)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="ViTForImageClassification is none"):
        refam(regard.load("viewer").model, INPUTS)
    with pytest.raises(ValueError, match="is none"):
        refam(SimpleNamespace(), INPUTS)
