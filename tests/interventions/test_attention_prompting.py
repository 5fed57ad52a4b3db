"""attention_prompting: maps softened and merged, pictures dimmed, and the two maps of CLIP."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as t
from families import SEEING, VISION, asked, asking
from PIL import Image

import regard
from regard.interventions._look import looks
from regard.interventions.attention_prompting import attention_prompting, blended, by_clip, heat, overlay, soften


def test_softening_by_hand():
    values = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    stretched = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    want = (5 * (stretched - 0.5) / stretched.std()).sigmoid()  # of the sample
    assert torch.allclose(soften(values, kernel=1), want)
    assert soften(values, kernel=1)[1, 0] == 0.5
    corner = (4 * want[0, 0] + 2 * want[0, 1] + 2 * want[1, 0] + want[1, 1]) / 9  # edges repeated
    assert torch.allclose(soften(values)[0, 0], corner)
    assert torch.allclose(soften(7 * values - 1), soften(values), atol=1e-6)


def test_merging_by_hand():
    """Either is enough; patches that are like the text are those that go."""
    given, like = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[1.0, 1.0], [3.0, 2.0]])
    one, two = soften(given, kernel=1), torch.tensor([[1.0, 1.0], [0.0, 0.5]])
    both = one + two - one * two
    want = (both - both.min()) / (both.max() - both.min())
    assert torch.allclose(heat(given, like, kernel=1), want)
    assert both[1, 1] == 0.75


def test_a_map_without_a_difference_is_refused():
    with pytest.raises(ValueError, match="attention-prompting: the map is the same everywhere"):
        soften(torch.ones(2, 2))
    with pytest.raises(ValueError, match="kernel=2 has no middle"):
        soften(torch.rand(2, 2), kernel=2)


def test_dimming_by_hand():
    image = Image.fromarray(np.full((1, 3, 3), 200, np.uint8))
    mask = np.array([[64, 255, 0]], np.uint8)
    assert np.asarray(blended(image, mask))[0, :, 0].tolist() == [50, 200, 0]  # 50.2, cut
    assert np.asarray(blended(image, mask, gray=100))[0, :, 0].tolist() == [125, 200, 100]


def test_a_mask_of_patches_is_laid_over_the_picture():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(overlay(image, torch.ones(2, 3))), np.asarray(image))
    assert (np.asarray(overlay(image, torch.zeros(2, 3), gray=9)) == 9).all()
    half = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    found = np.asarray(overlay(image, half))
    assert (found[:, -1] == 0).all()
    assert (found[:, 0] >= 0.9 * np.asarray(image)[:, 0] - 1).all()


@torch.no_grad()
@pytest.mark.parametrize("name", SEEING)
def test_the_dimmed_picture_is_the_one_that_is_read(name):
    model, processor, inputs, images = asked(name)
    made = attention_prompting.fit(model, inputs, processor, steps=2, layer=1)
    own = looks(model, inputs, "test", steps=2, among=[1], within=True)
    new = [overlay(image, soften(one[:, 0].mean(0))) for image, one in zip(images, own)]
    assert all(torch.allclose(kept, soften(one[:, 0].mean(0))) for kept, one in zip(made.kept, own))
    want = model(**asking(processor, ["w4 w5 w6", "w7"], new)).logits
    with regard.intervene(model, made):
        assert torch.allclose(model(**inputs).logits, want, atol=1e-4)
    by_hand = attention_prompting.fit(model, inputs, processor, source=lambda image, text: torch.full((2, 2), 0.5))
    half = [blended(image, np.full(image.size[::-1], 127, np.uint8)) for image in images]
    want = model(**asking(processor, ["w4 w5 w6", "w7"], half)).logits
    with regard.intervene(model, by_hand):
        assert torch.allclose(model(**inputs).logits, want, atol=1e-4)


def test_strength_is_a_share():
    model, processor, inputs, _ = asked("llava")
    with pytest.raises(ValueError, match="strength is a share"):
        attention_prompting.fit(model, inputs, processor, strength=2.0)


@torch.no_grad()
def test_clips_parts_add_up_to_its_likeness():
    """What patches and biases give the class token, and all else that it is the sum of, is the embedding."""
    torch.manual_seed(0)
    texts = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    words = {"vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    config = t.CLIPConfig(vision_config=VISION, text_config=texts | words, projection_dim=8)
    model = t.CLIPModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(4.0)
    maker = t.CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))

    def processor(text, images, **options):
        return {"input_ids": torch.tensor([[3, 4, 1]]), **maker(images=images, return_tensors="pt")}

    found = by_clip(model, processor, image, "w3", layer=-1)
    assert found.shape == (4, 4)
    assert found.min() == 0
    assert found.max() == 1
    out = model(**processor("w3", [image]), output_hidden_states=True)
    norm, vision = model.vision_model.post_layernorm, out.vision_model_output
    states = vision.hidden_states[-1]
    word = out.text_embeds / out.text_embeds.norm()
    length = model.visual_projection(norm(states[:, 0])).norm()
    mean, std = states[0, 0].mean(), (states[0, 0].var(correction=0) + norm.eps).sqrt()
    like = (states[0, 1:] - mean / 3) * norm.weight / std + norm.bias / 3  # three terms: 2 * 2 - 1
    like = like @ model.visual_projection.weight.T @ word[0] / length
    layer = model.vision_model.encoder.layers[-1]
    before = layer.layer_norm1(vision.hidden_states[-2])
    query, key, value = (
        getattr(layer.self_attn, f"{n}_proj")(before).unflatten(-1, (4, 8)).transpose(1, 2) for n in "qkv"
    )
    weights = (query[:, :, :1] @ key.mT / 8**0.5).softmax(-1)
    each = (weights.transpose(2, 3) * value).transpose(1, 2).flatten(2) @ layer.self_attn.out_proj.weight.T
    each = each + layer.self_attn.out_proj.bias / 17
    each = (each[0, 1:] - mean / 51) * norm.weight / std + norm.bias / 51
    given = each @ model.visual_projection.weight.T @ word[0] / length
    assert torch.allclose(found, heat(given.view(4, 4), like.view(4, 4)), atol=1e-4)


def test_only_clip_has_clips_maps():
    model, processor, _, images = asked("llava")
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration is no CLIP"):
        by_clip(model, processor, images[0], "w3")
