"""Register neurons are found where outliers are, and write into a token that is gone from what the tower gives."""

from __future__ import annotations

import os
from pathlib import Path

import families
import pytest
import torch
import transformers as t
import xarray as xr

import regard
from regard.interventions.test_time_registers import (
    outliers,
    register_neurons,
    scores,
    shifted,
    strongest,
    test_time_registers,
)

PATCHES = torch.tensor([[False, True, True, True, False]])
ONE = torch.tensor([0.1, 2.0, -5.0, 1.0, 0.0])[None, :, None]  # [CLS], three patches, a register


def dinov2(**options):
    config = t.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=16, patch_size=4, **options
    )
    return t.Dinov2Model(config), families.pixels()


def siglip():
    return t.SiglipVisionModel(t.SiglipVisionConfig(**families.VISION)), families.pixels()


TOWERS = {"vit": families.vit, "clip": families.clip, "dinov2": dinov2, "siglip": siglip, "llava": families.llava}
TOWERS["gated"] = lambda: dinov2(use_swiglu_ffn=True)


def values(tensor):
    return [round(x, 3) for x in tensor.flatten().tolist()]


def test_the_largest_goes_to_the_register_with_its_sign():
    assert values(shifted(ONE, PATCHES)) == [0.1, 0, 0, 0, -5]
    assert values(shifted(ONE, PATCHES, rest="same")) == [0.1, 2, -5, 1, -5]
    assert values(shifted(ONE, PATCHES, rest="mean")) == [0.1, -0.667, -0.667, -0.667, -5]
    assert values(shifted(ONE, PATCHES, scale=0.0)) == [0.1, 0, 0, 0, 0]
    tie = torch.tensor([0.0, 3.0, -3.0, 0.0, 0.0])[None, :, None]
    assert float(shifted(tie, PATCHES)[0, -1]) == -3


def test_only_outliers_go_to_the_mean():
    some = torch.tensor([0.0, 1, 1, 1, 1, 11, 0])[None, :, None]  # mean 3, standard deviation 4.47
    patches = torch.tensor([[False, True, True, True, True, True, False]])
    assert values(shifted(some, patches, rest="only_outliers")) == [0, 1, 1, 1, 1, 3, 11]


def test_one_number_for_a_layer_or_one_for_each_neuron_and_always_one_for_each_picture():
    pair = torch.cat([ONE, -0.5 * ONE], -1)  # the second: 2.5 at most
    assert values(shifted(pair, PATCHES)[0, -1]) == [-5, -5]
    assert values(shifted(pair, PATCHES, per_neuron=True)[0, -1]) == [-5, 2.5]
    batch = torch.cat([ONE, 2 * ONE])
    assert values(shifted(batch, PATCHES.expand(2, -1))[:, -1]) == [-5, -10]


def test_neurons_are_ranked_by_what_they_are_on_outliers():
    draw = torch.Generator().manual_seed(0)
    activations = 0.1 * torch.randn(3, 2, 10, 6, generator=draw)
    where = torch.zeros(3, 10, dtype=torch.bool)
    where[0, 4] = where[1, 7] = True  # the third picture has none, and does not count
    activations[0, 1, 4, 2] = activations[1, 1, 7, 2] = -6.0
    activations[0, 0, 4, 5] = 4.0
    activations[2, 0, :, 1] = 50.0
    found = scores(activations, where)
    assert float(found[1, 2]) == pytest.approx(6.0)
    assert float(found[0, 5]) == pytest.approx((4 + abs(float(activations[1, 0, 7, 5]))) / 2)
    assert found[0, 1] < 1
    activations[:2, 0, :, 0] = 9.0  # strong everywhere
    assert float(scores(activations, where)[0, 0]) == 0
    assert float(scores(activations, where, sparse=False)[0, 0]) == 9
    with pytest.raises(ValueError, match="no picture has outliers"):
        scores(activations, torch.zeros_like(where))


def test_outliers_have_a_norm_above_the_threshold_or_three_medians():
    hidden = torch.tensor([[[1.0, 0], [0, 1], [3, 4], [1, 0], [0, 2.9]]])
    assert outliers(hidden).tolist() == [[False, False, True, False, False]]
    assert outliers(hidden, 2.0).tolist() == [[False, False, True, False, True]]


def test_the_strongest_up_to_where_outliers_begin():
    held = xr.DataArray(
        [[1.0, 5, 2], [9, 3, 0], [8, 7, 6]],
        {"layer": [0, 1, 2], "outliers": ("layer", [1, 6, 10])},
        ("layer", "neuron"),
    )
    assert strongest(held, top_k=3) == {0: [1], 1: [0, 1]}
    assert strongest(held, top_k=3, highest=2) == {1: [0], 2: [0, 1]}
    assert strongest(held, top_k=1, highest=0) == {0: [1]}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_token_stands_behind_the_patches_and_leaves_no_trace(name, implementation):
    model, inputs = families.made(TOWERS[name], implementation)
    method = test_time_registers(chosen={0: [1, 5], 1: [2]}, registers=2, scale=2.0)
    plain = model(**inputs, output_hidden_states=True)
    with regard.record(model, "mass") as recording, regard.intervene(model, method):
        after = model(**inputs, output_hidden_states=True)
    again = model(**inputs, output_hidden_states=True)
    assert shapes(after) == shapes(plain)
    assert not torch.equal(states(after), states(plain))
    assert torch.equal(states(again), states(plain))
    tower = next(node for stack, node in recording.tree.children.items() if "register" in node.get("role", []))
    assert tower.sizes["query"] == {"siglip": 18}.get(name, 19)
    total = tower["mass"].sum("role").values
    assert total == pytest.approx(1, abs=1e-5)


def states(output):
    return output.get("vision_model_output", output)["hidden_states"][-1]


def shapes(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    parts = value.to_tuple() if isinstance(value, t.utils.ModelOutput) else value
    return [shapes(part) for part in parts] if isinstance(parts, tuple) else None


@torch.no_grad()
def test_neurons_are_what_the_last_map_of_the_feed_forward_is_given():
    model, inputs = families.made(dinov2, "eager")
    seen = {}

    class See:
        def neurons(self, site, activations):
            seen[site.layer] = activations.clone()
            return activations

    method = test_time_registers(chosen={0: [3, 4]}, rest="zero")
    with regard.intervene(model, See(), method, See()):
        model(**inputs)
    assert seen[0].shape == (2, 18, 64)
    assert bool((seen[0][:, 1:17, [3, 4]] == 0).all())
    assert bool((seen[0][:, 17, 3] == seen[0][:, 17, 4]).all())
    (down,) = (m for n, m in model.named_modules() if n.endswith("layer.1.mlp.fc2"))
    given = []
    with regard.intervene(model, method, See()):
        handle = down.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        model(**inputs)
        handle.remove()
    assert torch.equal(seen[1], given[0])


@torch.no_grad()
def test_a_method_of_no_neurons_appends_nothing():
    model, inputs = families.build("vit")
    with regard.intervene(model, test_time_registers(chosen={})):
        off = model(**inputs).logits
    assert torch.equal(off, model(**inputs).logits)


@torch.no_grad()
def test_after_an_error_the_model_is_as_it_was():
    model, inputs = families.build("vit")
    plain = model(**inputs).logits
    method = test_time_registers(chosen={1: [48]})
    with pytest.raises(ValueError, match="has 48 neurons, and no neuron 48"), regard.intervene(model, method):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, plain)


def test_what_does_not_fit_is_refused():
    vit, inputs = families.build("vit")
    with pytest.raises(ValueError, match="has no layer 7: find neurons on this model"):
        test_time_registers(chosen={7: [0]}).begin(vit)
    config = t.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, mlp_ratio=2, image_size=16, patch_size=4
    )
    with pytest.raises(ValueError, match="was trained with registers of its own"):
        test_time_registers(chosen={0: [0]}).begin(t.Dinov2WithRegistersModel(config))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has none"):
        test_time_registers(chosen={0: [0]}).begin(families.build("gpt2")[0])
    with pytest.raises(ValueError, match="rest is one of zero, mean, only_outliers, same, not 'none'"):
        test_time_registers(chosen={}, rest="none")
    with pytest.raises(ValueError, match="1 or more, not 0"):
        test_time_registers(chosen={}, registers=0)
    with pytest.raises(ValueError, match="no picture has outliers"):
        register_neurons(vit, inputs["pixel_values"], threshold=1e6)


@pytest.mark.skipif("REGARD_MODELS" not in os.environ, reason="needs real models")
@torch.no_grad()
def test_on_photographs_of_a_real_tower_only_the_chosen_move():
    model, processor = regard.load(Path(os.environ["REGARD_MODELS"]) / "dinov2-small", dtype=torch.float32)
    folder = Path(os.environ["REGARD_DATA"]) / "pictures"
    pictures = [regard.data.media.picture(folder / f"{name}.jpg", name) for name in ("cat", "palace")]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"][..., :112, :112]
    found = strongest(register_neurons(model, pixels, threshold=40.0), top_k=4, highest=11)
    plain = model(pixels).last_hidden_state
    with regard.intervene(model, test_time_registers(chosen=found)), regard.record(model, "mass") as recording:
        after = model(pixels).last_hidden_state
    assert after.shape == plain.shape
    assert not torch.allclose(after, plain, atol=1e-2)
    assert "register" in recording.tree["encoder"]["role"]
    with regard.intervene(model, test_time_registers(chosen=found)):
        alone = model(pixels[1:]).last_hidden_state
    assert torch.allclose(alone[0], after[1], atol=1e-3)
