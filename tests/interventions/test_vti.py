"""Directions from pairs of states, and states of the same lengths turned towards them."""

from __future__ import annotations

import families
import pytest
import torch

import regard
from regard.interventions.vti import (
    _last,
    _masked,
    demonstrations,
    direction,
    of_pictures,
    textual_direction,
    turned,
    visual_direction,
    vti,
)
from regard.zoo.recipes.describer import asked, pictures, tempting


def test_states_are_turned_and_keep_their_length():
    x, d = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 3.0])
    assert turned(x, d, 0.9).tolist() == pytest.approx([3.9839, 0.3586], abs=1e-4)
    assert float(turned(x, d, 0.9).norm()) == pytest.approx(4)
    assert turned(x, 5 * x, 0.9).tolist() == pytest.approx([4, 0])
    assert turned(x, 0 * d, 0.9).tolist() == pytest.approx([4, 0])
    assert turned(x, d, 1e5).tolist() == pytest.approx([0, 4], abs=1e-2)


def test_a_direction_is_the_mean_and_the_first_component():
    given = torch.tensor([[3.0, 1.0], [1.0, 1.0], [-1.0, 1.0], [1.5, 1.0]])  # mean (1.125, 1), spread along the first
    assert direction(given).tolist() == pytest.approx([0.125, 1.0])  # the third is furthest, and has it with a plus
    assert direction(-given).tolist() == pytest.approx([-0.125, -1.0])
    with pytest.raises(ValueError, match="two demonstrations or more, not 1"):
        direction(given[:1])


def test_the_visual_direction_is_of_tokens_or_of_runs_of_numbers():
    draw = torch.Generator().manual_seed(0)
    masked, clean = torch.randn(2, 5, 3, 4, 6, generator=draw)
    apart = masked - clean
    by_token = of_pictures(masked, clean, group="token")
    assert torch.allclose(by_token[:, 2], direction(apart[:, :, 2].flatten(1)).view(3, 6))
    flat = of_pictures(masked, clean)
    assert torch.allclose(flat.flatten()[18:36], direction(apart.flatten(1)[:, 18:36]))
    assert not torch.allclose(flat, by_token)
    with pytest.raises(ValueError, match="group is flat or token, not 'all'"):
        of_pictures(masked, clean, group="all")


def test_masked_patches_are_the_mean_colour():
    picture = torch.arange(48.0).view(3, 4, 4)
    chance = torch.Generator().manual_seed(0)
    found = _masked(picture, 2, 0.75, chance)
    same = (found == picture).all(0)
    assert int(same.sum()) == 4  # one of four patches is left
    assert found[:, ~same][:, 0].tolist() == picture.mean((1, 2)).tolist()
    assert torch.equal(_masked(picture, 2, 0.0, chance), picture)


@torch.no_grad()
def test_each_part_is_turned_after_its_feed_forward_and_by_its_own_layer():
    model, inputs = families.build("llava")
    draw = torch.Generator().manual_seed(0)
    visual, textual = torch.randn(3, 17, 32, generator=draw), torch.randn(3, 32, generator=draw)
    seen = {}

    class See:
        def __init__(self, when):
            self.when = when

        def mlp(self, site, output):
            seen[self.when, site.stack, site.layer] = output
            return output

    method = vti(visual=visual, textual=textual, alpha_image=2.0, alpha_text=0.5)
    with regard.intervene(model, See("before"), method, See("after")):
        model(**inputs)
    for layer in range(2):
        for stack, along, alpha in (("vision_tower", visual, 2.0), ("language_model", textual, 0.5)):
            before, after = (seen[when, stack, layer] for when in ("before", "after"))
            assert torch.allclose(after, turned(before, along[layer + 1], alpha), atol=1e-5)
    alone = vti(textual=textual)
    with regard.intervene(model, See("before"), alone, See("after")):
        model(**inputs)
    assert torch.equal(seen["before", "vision_tower", 1], seen["after", "vision_tower", 1])


@pytest.fixture(scope="module")
def describer():
    model, processor = regard.load("describer")
    return model, processor, asked(processor, pictures(tempting(2)), ["describe", "is there a ring ?"])


@torch.no_grad()
def test_fit_finds_both_on_scenes_of_its_own(describer):
    model, processor, inputs = describer
    pixels, right, wrong = demonstrations(inputs, processor, n=2, seed=3)
    method = vti.fit(model, inputs, processor, n=2, seed=3, alpha_text=0.5)
    assert torch.allclose(method.textual, textual_direction(model, right, wrong), atol=1e-5)
    assert torch.allclose(method.visual, visual_direction(model, pixels, seed=3), atol=1e-5)
    assert method.alpha_text == 0.5
    assert right["input_ids"].shape == wrong["input_ids"].shape
    differ = right["input_ids"] != wrong["input_ids"]
    assert differ.sum(1).tolist() == [1] * 2  # one shape each
    assert not differ[:, -1].any()
    prompt = inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist()
    for ids, mask in zip(right["input_ids"], right["attention_mask"]):
        assert ids[mask.bool()].tolist()[: len(prompt)] == prompt


@torch.no_grad()
def test_the_last_word_is_no_padding(describer):
    model, _, inputs = describer
    ids, mask = inputs["input_ids"][:1], torch.ones_like(inputs["input_ids"][:1])
    mask[:, : int((inputs["attention_mask"][0] == 0).sum())] = 0
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"][:1]}
    right = {**given, "input_ids": torch.nn.functional.pad(ids, (0, 2)), "attention_mask": None}
    right["attention_mask"] = torch.nn.functional.pad(mask, (0, 2))
    assert torch.allclose(_last(model, given), _last(model, right), atol=1e-4)


def test_what_does_not_fit_is_refused(describer):
    model, processor, inputs = describer
    with pytest.raises(ValueError, match="give a visual direction, a textual one, or both"):
        vti()
    with pytest.raises(ValueError, match=r"the textual direction is \[layer, dim\] of 6 layers"):
        vti(textual=torch.ones(6, 128)).begin(model)
    wrong = vti(visual=torch.ones(7, 4, 128))
    other = pytest.raises(ValueError, match="find it on this model, and on pictures of this size")
    with other, regard.intervene(model, wrong):
        model(**inputs)
    with pytest.raises(ValueError, match="need the model's processor"):
        vti.fit(model, inputs)
    with pytest.raises(ValueError, match="this one has input_ids: give directions"):
        vti.fit(model, {"input_ids": inputs["input_ids"]}, processor)
    with pytest.raises(ValueError, match="LlamaForCausalLM has none"):
        vti(visual=torch.ones(3, 4, 32)).begin(families.build("llama")[0])
    with pytest.raises(ValueError, match="BertForMaskedLM has encoder"):
        vti(textual=torch.ones(3, 32)).begin(families.build("bert")[0])
