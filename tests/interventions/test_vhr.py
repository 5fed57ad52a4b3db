"""Heads that the picture changes are found, and speak louder."""

from __future__ import annotations

import families
import pytest
import torch

import regard
from regard import statistic
from regard.interventions.vhr import aware, aware_heads, divergence, reinforced, vhr, with_and_without


def deep(name, layers=3):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.GROUPED, "num_hidden_layers", layers)
        return families.build(name)


def test_the_upper_half_of_a_layer_is_aware():
    far, none = torch.tensor([[1.0, 4.0, 2.0, 3.0]]), torch.ones(1, 4)
    assert aware(far, none).tolist() == [[False, True, False, True]]


def test_a_head_that_surges_without_the_picture_is_not():
    far = torch.tensor([[1.0, 9.0, 2.0, 3.0]])  # mean 3.75, standard deviation 3.6
    surge = torch.tensor([[1.0, 3.0, 1.0, 1.0]])  # squared: 1, 9, 1, 1
    assert aware(far, surge).tolist() == [[False, False, True, True]]
    assert aware(far, torch.ones(1, 4)).tolist() == [[False, True, False, True]]  # far, but as loud with a picture


def test_surges_are_of_squares():
    far = torch.tensor([[1.0, 2.0, 3.0, 9.0]])  # 9 stands out: mean 3.75, standard deviation 3.6
    surge = torch.tensor([[0.0, 2.0, 2.0, 3.0]])  # 3 is within 1.75 + 1.26; of the squares 9 is not within 4.25 + 3.69
    assert aware(far, surge).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize(
    ("depth", "expected"), [(32, [1, *range(18, 32)]), (6, [1, 3, 4, 5]), (2, [1]), (1, [0]), (4, [1, 2, 3])]
)
def test_layers_are_the_second_and_the_last_14_of_32(depth, expected):
    assert reinforced(list(range(depth))) == expected


@torch.no_grad()
def heads_at_the_end(model, inputs):
    """Output of each head at the last token, as the model runs by itself. [batch, layer, head, dim]"""
    found = {}

    @statistic("batch head query", title="Output")
    def keep(call):
        if call.site.stack == "language_model":
            found[call.site.layer] = call.output[:, :, -1]

    with regard.record(model, keep):
        model(**inputs)
    return torch.stack([found[i] for i in sorted(found)], dim=1)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_divergence_is_the_distance_between_two_runs(family):
    model, inputs = deep(family)
    bare = {"input_ids": inputs["input_ids"][:, inputs["input_ids"][0] != families.IMAGE]}
    if family == "qwen2_vl":
        bare["mm_token_type_ids"] = torch.zeros_like(bare["input_ids"])
    whole, without = heads_at_the_end(model, inputs), heads_at_the_end(model, bare)
    found = divergence(model, inputs, among=range(3))
    assert torch.allclose(torch.tensor(found["divergence"].values), (whole - without).norm(dim=-1), atol=1e-3)
    assert torch.allclose(torch.tensor(found["without"].values), without.norm(dim=-1), atol=1e-3)


def test_inputs_without_the_picture_keep_the_words_in_order():
    model, inputs = deep("llava")
    both = with_and_without(model, inputs)
    ids, mask = both["input_ids"][2:], both["attention_mask"][2:]
    for i in range(2):
        words = inputs["input_ids"][i]
        assert ids[i][mask[i].bool()].tolist() == words[words != families.IMAGE].tolist()
        assert mask[i].tolist() == sorted(mask[i].tolist())  # padded on the left
    assert torch.equal(both["pixel_values"], inputs["pixel_values"])


@torch.no_grad()
def test_heads_are_found_layer_by_layer_with_earlier_ones_raised():
    model, inputs = deep("llava")
    apart, raised = divergence(model, inputs, alpha=1.0), divergence(model, inputs, alpha=3.0)
    first, last = ({"layer": i} for i in (1, 2))
    assert apart["divergence"].sel(first).equals(raised["divergence"].sel(first))
    assert not apart["divergence"].sel(last).equals(raised["divergence"].sel(last))


@torch.no_grad()
def test_only_aware_heads_are_scaled_and_by_alpha():
    model, inputs = deep("llava")
    heads = aware_heads(model, inputs, among=[1])
    heads[:] = False
    heads.values[0, 0, 2] = True
    seen = {}

    class Last:
        def output(self, call, output):
            seen.setdefault((call.site.stack, call.site.layer), []).append(output)
            return output

    last = Last()
    with regard.intervene(model, last, vhr(heads=heads, alpha=3.0), last):
        model(**inputs)
    for place, (before, after) in seen.items():
        factor = torch.ones(*before.shape[:2], 1, 1)
        if place == ("language_model", 1):
            factor[0, 2] = 3.0
        assert torch.allclose(after, before * factor)


@torch.no_grad()
def test_heads_of_another_batch_or_model_are_refused():
    model, inputs = deep("llava")
    heads = aware_heads(model, inputs)
    one = {name: value[:1] for name, value in inputs.items()}
    with pytest.raises(ValueError, match="found for a batch of 2"), regard.intervene(model, vhr(heads=heads)):
        model(**one)
    with regard.intervene(model, vhr(heads=heads[:1])):  # one prompt's, for beams or for all rows
        model(**inputs)
    with pytest.raises(ValueError, match="heads are of layer 9, which LlavaForConditionalGeneration has not"):
        vhr(heads=heads.assign_coords(layer=[1, 9])).begin(model)


def test_prompts_that_do_not_fit_are_refused():
    model, inputs = deep("llava")
    ids = torch.full((1, 4), 5)
    with pytest.raises(ValueError, match="no row of the inputs holds a picture"):
        aware_heads(model, {"input_ids": ids})
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="pad them on the left"):
        aware_heads(model, {**inputs, "attention_mask": mask})
    with pytest.raises(TypeError, match="heads"):
        vhr()
