"""What methods share that show a model another picture or another prompt."""

from __future__ import annotations

import families
import numpy as np
import pytest
import torch
from families import SEEING, asked, asking
from PIL import Image

import regard
from regard.interventions import _picture as picture
from regard.interventions._branch import Branch
from regard.interventions._look import lengths, looks, of_picture
from regard.interventions._picture import WHOLE, Box, Redrawn
from regard.interventions._prompt import cut, instruction, narrowed

STEPS = 3


def generate(model, inputs, *processors, **options):
    with torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            pad_token_id=0,
            logits_processor=list(processors),
            **options,
        )


# ------------------------------------------------------------------------------------------------ what a model is given


class Given:
    def __init__(self, change):
        self.change = change

    def given(self, inputs):
        return self.change(inputs)


def darker(inputs):
    return inputs | ({"pixel_values": inputs["pixel_values"] * 0.5} if inputs.get("pixel_values") is not None else {})


@torch.no_grad()
@pytest.mark.parametrize("name", SEEING)
def test_what_a_model_is_given_can_be_changed_once(name):
    """By a call, by generate, and from left to right; the model is then as it was."""
    model, _, inputs, _ = asked(name)
    want, plain = (model(**given).logits for given in (darker(inputs), inputs))
    written = generate(model, darker(inputs))
    with regard.intervene(model, Given(darker)):
        assert torch.equal(model(**inputs).logits, want)
        assert torch.equal(generate(model, inputs), written)
    brighter = Given(lambda given: given | {"pixel_values": given["pixel_values"] + 1.0})
    twice = darker(inputs)["pixel_values"] + 1.0
    with regard.intervene(model, Given(darker), brighter):
        assert torch.equal(model(**inputs).logits, model_alone(name, inputs | {"pixel_values": twice}))
    assert torch.equal(model(**inputs).logits, plain)


def model_alone(name, inputs):
    return asked(name)[0](**inputs).logits


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda inputs: {"input_ids": inputs["input_ids"]}, "given must return"),
        (lambda inputs: inputs | {"pixel_values": inputs["pixel_values"][:1]}, "given, of pixel_values, must return"),
    ],
)
def test_names_and_shapes_must_stay(change, words):
    model, _, inputs, _ = asked("llava")
    with regard.intervene(model, Given(change)), pytest.raises(TypeError, match=words):
        model(**inputs)
    with regard.intervene(model, Given(change)), pytest.raises(TypeError, match=words):
        generate(model, inputs)


# ----------------------------------------------------------------------------------------------------------- the branch


@torch.no_grad()
@pytest.mark.parametrize("name", SEEING)
def test_a_branch_with_another_prompt_says_what_the_model_says_to_it(name):
    """With another picture, a longer text and none of the picture; and the model's own answer is not disturbed."""
    model, processor, inputs, images = asked(name)
    bare = {k: v for k, v in inputs.items() if v.shape == inputs["input_ids"].shape}
    image = picture.one_picture(model, inputs, "test")
    prompts = [
        inputs | {"pixel_values": inputs["pixel_values"].flip(0)},
        asking(processor, ["w9 w8 w7 w6 w5", "w4 w3"], images),
        narrowed(cut(bare, image)),
    ]
    branches = [Branch(model, inputs, prompt=prompt) for prompt in prompts]
    want = generate(model, inputs)
    said = [[] for _ in prompts]

    def watch(ids, scores):
        for branch, heard in zip(branches, said):
            heard.append(branch.logits(ids))
        return scores

    assert torch.equal(generate(model, inputs, watch), want)
    made = want[:, inputs["input_ids"].shape[1] :]
    for prompt, heard in zip(prompts, said):
        for step, logits in enumerate(heard):
            whole = prompt | {
                "input_ids": torch.cat([prompt["input_ids"], made[:, :step]], 1),
                "attention_mask": torch.cat([prompt["attention_mask"], torch.ones_like(made[:, :step])], 1),
            }
            if "mm_token_type_ids" in whole:
                whole["mm_token_type_ids"] = (whole["input_ids"] == families.IMAGE).int()
            if step:  # whose positions a model that reads the whole again counts anew
                anew = Branch(model, whole).logits(whole["input_ids"])
                assert torch.allclose(logits, anew, atol=1e-3), step
    assert not torch.allclose(said[0][-1], said[2][-1], atol=1e-3)


def test_a_branch_reads_a_prompt_for_each_row():
    model, _, inputs, _ = asked("llava")
    with pytest.raises(ValueError, match="1 for 2 rows"):
        Branch(model, inputs, prompt={name: value[:1] for name, value in inputs.items()})


# ---------------------------------------------------------------------------------------------------------- the prompts


def test_what_is_cut_leaves_the_rest_in_order():
    ids = torch.tensor([[0, 5, 6, 7, 8], [1, 2, 3, 4, 5]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "kind": ids * 10, "pixel_values": torch.ones(2, 3)}
    gone = torch.tensor([[False, False, True, False, False], [True, False, True, True, False]])
    found = narrowed(cut(inputs, gone))
    assert found["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert found["input_ids"][0].tolist() == [5, 7, 8]
    assert found["input_ids"][1, 1:].tolist() == [2, 5]
    assert found["kind"].tolist() == [[50, 70, 80], [0, 20, 50]]
    assert torch.equal(found["pixel_values"], inputs["pixel_values"])


@pytest.mark.parametrize("name", SEEING)
def test_an_instruction_lies_between_the_picture_and_the_templates_end(name):
    model, processor, inputs, _ = asked(name)
    image = picture.one_picture(model, inputs, "test")
    found = instruction(inputs, image, processor, "test", None)
    words = [row[at].tolist() for row, at in zip(inputs["input_ids"], found)]
    assert words == [[4, 5, 6], [7]]  # without a mark that the picture ends
    told = instruction(inputs, image, None, "test", 2)
    assert [int(row) for row in (told & ~found).sum(1)] == [name == "qwen2_vl"] * 2
    with pytest.raises(ValueError, match="test: where the instruction ends"):
        instruction(inputs, image, None, "test", None)
    with pytest.raises(ValueError, match="test: a row has no instruction"):
        instruction(inputs, image, None, "test", 7)
    with pytest.raises(ValueError, match="test: a prompt does not end as"):
        instruction(inputs | {"input_ids": inputs["input_ids"].flip(0)[:, :-1]}, image[:, :-1], processor, "test", None)


# --------------------------------------------------------------------------------------------------------- the pictures


@pytest.mark.parametrize("name", SEEING)
def test_pictures_come_back_from_pixels_and_go_in_again(name):
    model, processor, inputs, images = asked(name)
    shown = picture.seen(model, inputs, processor, "test")
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(shown, images))
    swapped = picture.given(model, inputs, processor, shown[::-1], "test")
    other = asking(processor, ["w4 w5 w6", "w7"], images[::-1])
    assert torch.allclose(swapped["pixel_values"], other["pixel_values"])
    same = picture.given(model, inputs, processor, [None, shown[0]], "test")
    half = len(inputs["pixel_values"]) // 2
    assert torch.equal(same["pixel_values"][:half], inputs["pixel_values"][:half])
    assert torch.allclose(same["pixel_values"][half:], inputs["pixel_values"][:half])


def test_pictures_of_several_resolutions():
    model, processor, _, _ = asked("qwen2_vl")
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((16, 24), (32, 16))]
    inputs = asking(processor, ["w4", "w5"], images)
    shown = picture.seen(model, inputs, processor, "test")
    assert [one.size for one in shown] == [(24, 16), (16, 32)]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(shown, images))
    with torch.no_grad():
        found = looks(model, inputs, "test", steps=2, among=[1])
    assert [one.shape[2:] for one in found] == [(2, 3), (4, 2)]
    with pytest.raises(ValueError, match="the processor makes pixels"):
        picture.given(model, inputs, processor, shown[::-1], "test")


def test_rows_need_one_picture_and_its_processor():
    model, processor, inputs, images = asked("llava")
    with pytest.raises(ValueError, match="test takes one picture a row"):
        picture.one_picture(model, inputs | {"pixel_values": inputs["pixel_values"][:1]}, "test")
    with pytest.raises(ValueError, match="test looks at a picture, and LlavaForConditionalGeneration is given none"):
        picture.one_picture(model, {"input_ids": inputs["input_ids"]}, "test")
    with pytest.raises(ValueError, match="test: rows are padded on the right"):
        picture.one_picture(model, inputs | {"attention_mask": inputs["attention_mask"].flip(1)}, "test")
    with pytest.raises(ValueError, match="needs the processor of LlavaForConditionalGeneration"):
        picture.seen(model, inputs, None, "test")
    with pytest.raises(ValueError, match="1 images for 2 rows"):
        picture.finer(images, images[:1], "test")
    with pytest.raises(ValueError, match="image 0, 16 x 16, is another"):
        picture.finer(images, images[::-1], "test")


def test_finer_pictures_are_those_that_show_the_same():
    small = [Image.fromarray(np.full((4, 4, 3), 100, np.uint8))]
    large = [Image.fromarray(np.full((12, 12, 3), 102, np.uint8))]
    assert picture.finer(small, large, "test")[0].size == (12, 12)
    assert picture.finer(small, None, "test") == small


def test_boxes_by_hand():
    box = Box(0.25, 0.5, 0.5, 0.75)
    assert box.area == 0.0625
    assert box.pixels((8, 8)) == (2, 4, 4, 6)
    assert Box(0.3, 0.3, 0.3, 0.3).pixels((10, 10)) == (3, 3, 4, 4)
    assert box.grown(2.0) == Box(0.125, 0.375, 0.625, 0.875)
    assert Box(0.0, 0.5, 0.25, 0.75).grown(2.0) == Box(0.0, 0.375, 0.5, 0.875)  # moved to lie inside
    assert Box(0.0, 0.25, 0.5, 0.5).grown() == Box(0.0, 0.125, 0.5, 0.625)  # as wide as its longer side
    assert box.grown(9.0) == WHOLE


@torch.no_grad()
@pytest.mark.parametrize("name", SEEING)
def test_the_redrawn_picture_is_what_the_model_is_given(name):
    model, _, inputs, _ = asked(name)
    after = inputs | {"pixel_values": inputs["pixel_values"].flip(0).contiguous()}
    made = Redrawn(inputs, after, [])
    want = generate(model, after)
    with regard.intervene(model, made):
        assert torch.equal(generate(model, inputs), want)
        assert torch.equal(model(**inputs).logits, model_alone(name, after))
        with pytest.raises(ValueError, match="Redrawn was made for other pictures"):
            model(**after)
    beams = generate(model, after, num_beams=2)
    with regard.intervene(model, made):
        assert torch.equal(generate(model, inputs, num_beams=2), beams)


# ------------------------------------------------------------------------------------------------------------- looking


@torch.no_grad()
@pytest.mark.parametrize("name", SEEING)
def test_looks_are_the_rows_of_the_newest_token(name):
    model, _, inputs, _ = asked(name)
    found = looks(model, inputs, "test", steps=1, among=[0, 1])
    with regard.record(model, "rows") as recording:
        model(**inputs)
    rows = recording.tree["language_model"]["rows"]
    image = (inputs["input_ids"] == families.IMAGE).numpy()
    for i, one in enumerate(found):
        want = rows.isel(batch=i, query=-1).mean("head").values[:, image[i]]
        assert one.shape[:2] == (1, 2)
        assert np.allclose(one[0].flatten(1).numpy(), want, atol=1e-5)
    alone = looks(model, inputs, "test", steps=1, among=[1], within=True)
    assert all(torch.allclose(one.sum((2, 3)), torch.ones(1, 1)) for one in alone)


def test_a_step_that_ends_the_answer_counts():
    model, _, _, _ = asked("llava")
    model.generation_config.eos_token_id = 7
    assert lengths(model, torch.tensor([[1, 7, 0], [7, 7, 7], [1, 2, 3]])) == [2, 1, 3]


def test_weights_on_the_picture_alone():
    weights, image = torch.tensor([[[0.5, 0.1, 0.3, 0.1]]]), torch.tensor([[False, True, True, False]])
    assert torch.allclose(of_picture(weights, image), torch.tensor([[[0.0, 0.25, 0.75, 0.0]]]))
