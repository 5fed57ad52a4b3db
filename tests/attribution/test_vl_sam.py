import numpy as np
import pytest
import torch
import transformers as t

import regard
from regard.attribution.vl_sam import Points, alike, flow, point_prompts, regions, sam, segment, vl_sam
from regard.data.scenes import Object, Scene, render
from regard.zoo.recipes.describer import pictures, plain

ALL = torch.ones(1, 3, dtype=torch.bool)
TEXTS = ["user: <image> describe assistant: a red", "user: <image> describe the picture assistant: a"]


@pytest.fixture(scope="module")
def describer():
    model, processor = regard.load("describer")
    inputs = dict(processor(text=TEXTS, images=pictures(plain(2)), padding=True, return_tensors="pt"))
    return model, processor, inputs


def at(row):
    return torch.tensor([row])


def test_flow_by_hand():
    one = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])[None, None]
    assert torch.allclose(flow(one, at(2), ALL, regularised=False), torch.tensor([[0.2, 0.3, 1.5]]))
    assert torch.allclose(flow(one, at(2), ALL), torch.tensor([[0.2 / 3, 0.2, 1.5]]))  # columns by 1/3, 2/3, 1


@pytest.mark.parametrize("regularised", [True, False])
def test_a_row_is_that_of_the_whole_recursion(regularised):
    torch.manual_seed(0)
    layers = torch.rand(2, 4, 6, 6).tril().double()
    real = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    layers[1, :, :, :2] = 0
    factors = torch.tensor([[1, 2, 3, 4, 5, 6], [0, 0, 1.5, 3, 4.5, 6]]) / 6  # of four tokens 1/4, 2/4, 3/4, 1
    for sample in range(2):
        whole, eye = None, torch.eye(6).double()
        for one in layers[sample] * (factors[sample] if regularised else 1):
            whole = eye + one if whole is None else (eye + one) @ (eye + whole)
        assert torch.equal(whole, whole.tril())
        for row in (3, 5):
            found = flow(layers, torch.tensor([row, row]), real, regularised=regularised)[sample]
            assert torch.allclose(found, whole[row])


def test_without_regularisation_the_first_position_gathers_all():
    even = torch.ones(1, 12, 8, 8).tril()
    even = even / even.sum(-1, keepdim=True)
    real = torch.ones(1, 8, dtype=torch.bool)
    collapsed, held = (flow(even, at(7), real, regularised=r)[0] for r in (False, True))
    assert collapsed[:7].argmax() == 0
    assert collapsed[0] > 20 * collapsed[6]
    assert held[0] < 2 * held[6]


def test_heads_are_weighted_by_the_mean_of_their_largest_weights(describer):
    model, _, inputs = describer
    with regard.record(model, "rows") as recording:
        model(**inputs, use_cache=False)
    weights = torch.from_numpy(
        recording.tree["language_model"]["rows"].values
    ).nan_to_num()  # [batch, layer, head, ...]
    real = inputs["attention_mask"].bool()
    image = inputs["input_ids"] == model.config.image_token_index
    for knobs in ({}, {"head_weights": False}, {"regularised": False}):
        found = vl_sam(model, inputs, **knobs)
        for sample in range(2):
            here = weights[sample][:, :, real[sample]][..., real[sample]].double()
            heads = here.amax(-1).mean(-1) if knobs.get("head_weights", True) else torch.ones(here.shape[:2]).double()
            layers = (here * heads[..., None, None]).mean(1)
            n = here.shape[-1]
            expected = flow(
                layers[None],
                at(n - 1),
                torch.ones(1, n, dtype=torch.bool),
                **{k: v for k, v in knobs.items() if k == "regularised"},
            )[0]
            of_image = image[sample][real[sample]]
            assert np.allclose(found.values[sample][image[sample]], expected[of_image], atol=1e-5)
        assert (found.values[~image] == 0).all()


def test_the_row_at_the_word_is_read_with_the_word_behind(describer):
    model, processor, inputs = describer
    word = processor.tokenizer("star", add_special_tokens=False)["input_ids"][0]
    before = vl_sam(model, inputs, word)
    behind = vl_sam(model, inputs, word, position="at")
    assert before.shape == behind.shape == tuple(inputs["input_ids"].shape)
    assert not np.allclose(before.values, behind.values, atol=1e-3)
    n = inputs["input_ids"].shape[1]
    ones = torch.ones(2, 1, dtype=torch.long)
    longer = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], word * ones], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], ones], 1),
    }
    same = regard.attribute(model, longer, word, at=n - 1, method="vl_sam", position="at")
    assert np.allclose(same.values[:, :n], behind.values, atol=1e-6)
    with pytest.raises(ValueError, match="goes on after the word otherwise"):
        regard.attribute(model, longer, word + 1, at=n - 1, method="vl_sam", position="at")


def test_samples_are_alone(describer):
    model, processor, inputs = describer
    both = regard.attribute(model, inputs, method="vl_sam", processor=processor)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]  # some are transformers' own
    alone = dict(processor(text=TEXTS[1:], images=pictures(plain(2))[1:], return_tensors="pt"))
    one = regard.attribute(model, alone, method="vl_sam", processor=processor)
    assert np.allclose(both.values[1][both.image.values[1] >= 0], one.values[0][one.image.values[0] >= 0], atol=1e-5)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_what_has_no_patches_among_its_words_is_refused(describer):
    model, processor, _ = describer
    with pytest.raises(ValueError, match="given no picture"):
        vl_sam(model, dict(processor.tokenizer("describe the star", return_tensors="pt")))
    with pytest.raises(ValueError, match="ViTForImageClassification says none"):
        vl_sam(regard.load("viewer").model, {"pixel_values": torch.zeros(1, 3, 64, 64)})
    with pytest.raises(ValueError, match="'before' the word or 'at' it"):
        vl_sam(model, {}, position="after")


def test_regions():
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1]]).bool()  # corners do not touch
    found = regions(mask)
    assert sorted({*found[mask].tolist()}) == [1, 2, 3]
    assert (found[~mask] == 0).all()
    assert found[0, 0] == found[0, 1] == found[1, 1] != found[2, 2] == found[2, 3] != found[0, 3]
    assert (regions(torch.ones(2, 2).bool()) == 1).all()
    assert (regions(torch.zeros(2, 2).bool()) == 0).all()


def test_points_by_hand():
    one = torch.tensor([[0.0, 5, 0, 0], [4, 4, 0, 9], [1, 1, 1, 0.5]])  # the maximum stands alone
    points, labels = point_prompts(one[None], (6, 16), deviations=0.5)
    assert labels.tolist() == [[1, 0]]
    assert points[0].tolist() == [[6.0, 1.0], [2.0, 1.0]]  # of 4 x 2 pixels; x first
    even = point_prompts(torch.ones(1, 2, 2), (2, 2))
    assert even.points.tolist() == [[[0.5, 0.5], [0.5, 0.5]]]


def test_a_mask_moves_the_points():
    """The map is highest off the object; its mask leaves the rest."""
    picture = render(
        Scene((Object("square", "red", "large", 0.3, 0.5), Object("circle", "blue", "large", 0.75, 0.5))), 64
    )
    asked: list[Points] = []

    def left(pixels, points, labels):
        asked.append(Points(points, labels))
        return torch.arange(64)[None, None].expand(1, 64, 64) < 32

    maps = torch.zeros(1, 8, 8)
    maps[0, 4, 6], maps[0, 5, 6], maps[0, 4, 2] = 3, 2, 2
    segment(maps, picture.tensor(), left, rounds=2)
    assert [one.points[0, 0].tolist() for one in asked] == [[52.0, 36.0], [20.0, 36.0]]
    nothing = segment(maps, picture.tensor(), lambda pixels, *_: torch.zeros(1, 64, 64, dtype=torch.bool))
    assert not nothing.any()
    found = segment(maps, picture.tensor(), alike)
    circle = picture.owner[0] == 1
    assert (found[0].numpy() & circle).sum() > 0.9 * circle.sum()
    assert found.sum() < 1.1 * circle.sum()


def test_what_looks_alike():
    pixels = torch.zeros(1, 1, 2, 4)
    pixels[..., 1:] = 0.5
    pixels[..., 0, 3] = 0.7
    points = torch.tensor([[[2.5, 1.5], [0.5, 0.5]]])
    found = alike(pixels, points, torch.tensor([[1, 0]]), tolerance=0.1)
    assert found[0].tolist() == [[False, True, True, False], [False, True, True, True]]
    assert alike(pixels, points, torch.tensor([[1, 0]]))[0].sum() == 6


def test_masks_of_a_segment_anything_model():
    """Its own mask is given back once."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_channels": 8}
    vision |= {"image_size": 32, "patch_size": 8, "window_size": 2, "num_pos_feats": 4, "mlp_dim": 16}
    prompts = {"hidden_size": 8, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    masks = {"hidden_size": 8, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 8}
    config = t.SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks)
    model = t.SamModel(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    pixels = torch.randn(2, 3, 32, 32)
    points, labels = point_prompts(torch.rand(2, 4, 4), (32, 32))
    found = sam(model)(pixels, points, labels)
    assert found.shape == (2, 32, 32)
    given = {"input_points": points[:, None], "input_labels": labels[:, None], "multimask_output": False}
    with torch.no_grad():
        first = model(pixel_values=pixels, **given).pred_masks[:, 0]
        again = model(pixel_values=pixels, **given, input_masks=first).pred_masks[:, 0]
    assert not torch.allclose(first, again, atol=1e-6)
    assert torch.equal(found, torch.nn.functional.interpolate(again, (32, 32), mode="bilinear")[:, 0] > 0)
