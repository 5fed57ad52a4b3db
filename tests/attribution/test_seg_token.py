import numpy as np
import pytest
import torch

import regard
from regard.attribution.seg_token import seg_token, similarity, similarity_map, similarity_points, soft_points
from regard.zoo.recipes.describer import pictures, plain

STATES = torch.tensor([[[1.0, 0], [0, 1], [2, 0], [-1, 0]]])
QUERY = torch.tensor([[1.0, 0.5]])


@pytest.fixture(scope="module")
def describer():
    model, processor = regard.load("describer")
    texts = ["user: <image> what colour is the star? assistant:", "user: <image> describe assistant:"]
    inputs = dict(processor(text=texts, images=pictures(plain(2)), padding=True, return_tensors="pt"))
    return model, processor, inputs


def test_similarity_and_its_map_by_hand():
    found = similarity(STATES, QUERY)
    assert found.tolist() == [[1, 0.5, 2, -1]]
    scaled = similarity_map(found.view(1, 2, 2), (2, 2))
    assert torch.allclose(scaled, torch.tensor([[[2 / 3, 0.5], [1, 0]]]))
    assert torch.equal(similarity_map(torch.full((1, 2, 2), 3.0), (4, 4)), torch.zeros(1, 4, 4))


def test_a_crop_is_padded_to_the_picture():
    even = torch.tensor([[[0.0, 1], [1, 1]]])
    found = similarity_map(even, (40, 80), crop=40)[0]  # 20 columns were cut off on both sides
    assert (found[:, :19] == 0).all()
    assert (found[:, 61:] == 0).all()
    assert (found[25:, 21:59] > 0.5).all()
    assert torch.allclose(similarity_map(even.mT, (80, 40), crop=40)[0], found.T, atol=1e-6)
    points, labels = similarity_points(even, (40, 80), down=1, crop=40)  # in cells one column on both sides
    assert points[0, :4].tolist() == [[50, 10], [30, 30], [50, 30], [30, 10]]
    assert labels[0].tolist() == [1, 1, 1, 0, *[-10] * 4]  # none in the margins
    with pytest.raises(ValueError, match="crop is a square"):
        similarity_map(torch.rand(1, 2, 3), (4, 6), crop=4)


def test_points_by_hand():
    values = torch.tensor([[[0.0, 0.1, 0.5], [0.9, 1.0, 0.85], [0.3, 0.15, 0.4]]]) * 7 - 3  # scaled back from 0 to 1
    points, labels = similarity_points(values, (30, 60), down=1, points=20)
    # x before y; 20 x 10 pixels a cell; positive from high, negative from low, neutral in order
    expected = [[30, 15], [10, 15], [50, 15], [10, 5], [30, 5], [30, 25], [50, 5], [10, 25], [50, 25]]
    assert points[0].tolist() == expected
    assert labels[0].tolist() == [1, 1, 1, 0, 0, 0, -1, -1, -1]
    few, kinds = similarity_points(values, (30, 60), down=1, points=4)
    assert (few[0].tolist(), kinds[0].tolist()) == (expected[:4], [1, 1, 1, 0])
    assert torch.equal(similarity_points(values + 5, (30, 60), down=1, points=20)[0], points)
    whole = similarity_points(values, (30, 60), down=1, points=20, positive=0.95, negative=0.05)[1]
    assert whole[0].tolist() == [1, 0, *[-1] * 7]
    assert similarity_points(values, (4, 4), down=1)[0].max() <= 3  # within the picture


def test_a_coarser_grid_and_rows_with_fewer_points():
    fine = torch.zeros(2, 4, 4)
    fine[0, :2, 2:] = 1
    fine[1] = torch.rand(4, 4)
    points, labels = similarity_points(fine, (8, 8))
    assert points.shape == (2, 4, 2)
    assert points[0, 0].tolist() == [6, 2]
    assert labels[0].tolist() == [1, 0, 0, 0]
    none = similarity_points(torch.ones(1, 4, 4), (8, 8))[1]
    assert (none == 0).all()  # even similarity has no positive point
    tall = torch.rand(1, 2, 2)
    assert (similarity_points(tall, (80, 40), down=1, crop=40)[1] == -10).sum() == 4  # two rows of margins
    with pytest.raises(ValueError, match="no cell is left"):
        similarity_points(tall, (8, 8), down=3)
    with pytest.raises(ValueError, match="above negative"):
        similarity_points(tall, (8, 8), positive=0.1)


def test_soft_points():
    peaked = torch.full((1, 6, 8), -1e4)
    peaked[0, 4, 7] = 0
    near = torch.tensor([[[6.0, 4.0]]])
    assert torch.allclose(soft_points(peaked, near), torch.tensor([[[7.0, 4.0]]]))
    torch.manual_seed(0)
    found = torch.rand(2, 6, 8, dtype=torch.double, requires_grad=True)
    points = torch.tensor([[[2.0, 3.0], [5, 1]], [[0, 0], [7, 5]]], dtype=torch.double)
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    soft = soft_points(found, points)
    for i in range(2):
        for j in range(2):
            away = (x - points[i, j, 0]) ** 2 + (y - points[i, j, 1]) ** 2
            weights = torch.exp(-away) * found[i].flatten().softmax(0).view(6, 8)
            weights = weights / weights.sum()
            assert torch.allclose(soft[i, j], torch.stack([(weights * x).sum(), (weights * y).sum()]))
    assert torch.autograd.gradcheck(lambda f: soft_points(f, points), found)


def test_states_are_behind_the_last_norm_and_the_query_is_the_last_token(describer):
    model, processor, inputs = describer
    both = regard.attribute(model, inputs, method="seg_token", processor=processor)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states[-1]
        logits = model(**inputs).logits
    assert torch.allclose(model.lm_head(states), logits, atol=1e-4)
    image = inputs["input_ids"] == model.config.image_token_index
    expected = (states * states[:, -1:]).sum(-1)
    assert np.allclose(both.values[image], expected[image], rtol=1e-4, atol=1e-4)
    assert (both.values[~image] == 0).all()
    other = regard.attribute(model, inputs, at=[70, 72], method="seg_token")
    expected = (states * states[torch.arange(2), torch.tensor([70, 72])][:, None]).sum(-1)
    assert np.allclose(other.values[image], expected[image], rtol=1e-4, atol=1e-4)
    level = seg_token(model, inputs, centred=True).values[image].reshape(2, 64)
    assert np.allclose(level.mean(1), 0, atol=1e-5)
    assert np.allclose(np.diff(level), np.diff(both.values[image].reshape(2, 64)), atol=1e-4)
    alone = {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    one = seg_token(model, {**alone, "pixel_values": inputs["pixel_values"][:1]})
    assert np.allclose(one.values[0], both.values[0], atol=1e-3)


def test_what_has_no_patches_among_its_words_is_refused(describer):
    model, processor, _ = describer
    with pytest.raises(ValueError, match="given no picture"):
        seg_token(model, dict(processor.tokenizer("describe the star", return_tensors="pt")))
    with pytest.raises(ValueError, match="ViTForImageClassification writes none"):
        seg_token(regard.load("viewer").model, {"pixel_values": torch.zeros(1, 3, 64, 64)})
