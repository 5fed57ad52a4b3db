"""The search for regions: by hand, its limits, and on classifiers, texts and detectors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as t
from families import VISION
from torch import nn

import regard
from regard.attribution import visual_precision_search
from regard.attribution.visual_precision_search import best_box, overlap, ranks, search
from regard.prediction import predict

PARTS = np.array([0.3, 0.5, 0.1])


def additive(shown):
    return shown @ PARTS


class Sum(nn.Module):
    """The logit is a sum of quarters of a picture, each with its weight."""

    config = SimpleNamespace(problem_type="multi_label_classification")

    def __init__(self, weights=(1.0, 4.0, -3.0, 2.0)):
        super().__init__()
        quarters = torch.tensor(weights).reshape(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
        self.weights = nn.Parameter(quarters[None, None] / 4)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=(pixel_values * self.weights).sum((1, 2, 3))[:, None])


ONES = {"pixel_values": torch.ones(2, 1, 4, 4)}


def search_of(model, inputs, target=None, **knobs):
    return regard.attribute(model, inputs, target, method="visual_precision_search", **knobs)


def test_three_regions_by_hand():
    found = search(additive, 3)
    assert found.order.tolist() == [1, 0, 2]
    assert found.value == pytest.approx([1.1, 1.7, 1.9])  # what is shown, and one minus what is not
    assert found.insertion == pytest.approx([0.5, 0.8, 0.9])
    assert found.deletion == pytest.approx([0.4, 0.1, 0])
    assert found.start == pytest.approx(0.1)
    assert ranks(found) == pytest.approx([0.25, 1, 0])  # it fell by 1.0, then 0.6, then 0.2


def test_limits():
    one = search(lambda shown: shown @ np.array([0.4]), 1)
    assert ranks(one).tolist() == [1]
    alike = search(lambda shown: np.full(len(shown), 0.5), 4)
    assert alike.order.tolist() == [0, 1, 2, 3]  # the first of several
    generator = np.random.default_rng(0)
    table = generator.random(64)

    def any_score(shown):
        return table[shown @ (2 ** np.arange(6))]

    found = search(any_score, 6, consistency=2.0, collaboration=0.5)
    assert found.insertion[-1] == table[-1]
    assert found.deletion[-1] == table[0]
    assert found.value[-1] == pytest.approx(2 * table[-1] + 0.5 * (1 - table[0]))
    first = max(range(6), key=lambda r: 2 * table[2**r] + 0.5 * (1 - table[63 - 2**r]))
    assert found.order[0] == first


def test_a_search_that_stops_early_begins_as_the_whole_does():
    parts = np.random.default_rng(1).random(8)
    whole, part = (search(lambda shown: shown @ parts, 8, steps=steps) for steps in (None, 3))
    assert part.order.tolist() == whole.order.tolist()  # of an additive score, what each would add is its order
    assert np.allclose(part.value, whole.value[:3])
    along = ranks(part)[part.order]
    assert (np.diff(along) < 0).all()
    assert (along[0], along[-1]) == (1, 0)


def test_a_part_without_weight_is_seen_of_what_was_chosen_alone():
    asked = []

    def counted(shown):
        asked.append(len(shown))
        return additive(shown)

    for weights in ({"consistency": 0}, {"collaboration": 0}):
        asked.clear()
        found = search(counted, 3, **weights)
        assert found.insertion == pytest.approx([0.5, 0.8, 0.9])
        assert found.deletion == pytest.approx([0.4, 0.1, 0])
        assert sum(asked) == 2 + 6 + 3
    with pytest.raises(ValueError, match="weights from 0"):
        search(additive, 3, consistency=0, collaboration=0)


def test_overlap_of_boxes():
    box = torch.tensor([0.0, 0, 2, 2])
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [2, 2, 4, 4], [1, 1, 0, 0]])
    assert overlap(boxes, box).tolist() == pytest.approx([1, 1 / 7, 0, 0])  # the last is turned inside out
    likely = torch.tensor([[[0.2, 0.1], [0.9, 0.5], [1, 1], [1, 1]]])
    score, near, of = best_box(boxes[None], likely, box, [0])
    assert (float(score), float(near), float(of)) == pytest.approx((0.2, 1, 0.2))
    assert best_box(boxes[None], likely, box, [0], "cls")[0].item() == pytest.approx(0.2)
    assert best_box(boxes[None, 1:], likely[:, 1:], box, [0, 1], "cls")[0].item() == 0
    assert best_box(boxes[None, 1:], likely[:, 1:], box, [1, 0])[0].item() == pytest.approx(0.9 / 7)
    with pytest.raises(ValueError, match="object or cls"):
        best_box(boxes[None], likely, box, [0], "box")


def test_regions_of_a_picture():
    found = search_of(Sum(), ONES, 0, regions=4)
    assert found.attrs["region"] == [[1, 3, 0, 2]] * 2
    assert found.attrs["area"][0] == pytest.approx([0.25, 0.5, 0.75, 1])
    chance = lambda logit: 1 / (1 + np.exp(-logit))  # noqa: E731
    assert found.attrs["insertion"][0] == pytest.approx([chance(x) for x in (4, 6, 7, 4)])
    assert found.attrs["deletion"][0] == pytest.approx([chance(x) for x in (0, -2, -3, 0)])
    assert found.values[0, 0, 2] == 1
    assert found.values[0, 2, 0] == 0
    turned = torch.tensor([0, 1, 2, 3]).reshape(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1).flip(0, 1)
    own = search_of(Sum(), ONES, 0, regions=turned)
    assert own.attrs["region"][0] == [2, 0, 3, 1]
    assert np.allclose(own, found)


def test_words_and_padding():
    model, tokenizer = regard.load("namer")
    told = ["the baker sang , feeling merry .", "with a heavy heart , the sailor stood , at noon ."]
    both = tokenizer(told, padding=True, return_tensors="pt")
    found = search_of(model, both, steps=2, processor=tokenizer)
    assert found.text.values[0, found.values[0].argmax()] == "merry"
    alone = tokenizer(told[:1], return_tensors="pt")
    n = alone["input_ids"].shape[1]
    assert (found.values[0, n:] == 0).all()
    assert np.allclose(found[0, :n], search_of(model, alone, steps=2)[0], atol=1e-3)


def test_progress_is_told():
    told = []
    search_of(
        Sum(), {"pixel_values": torch.ones(1, 1, 4, 4)}, 0, regions=4, steps=3, progress=lambda *n: told.append(n)
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_refusals(monkeypatch):
    for knobs, said in (
        ({"regions": 0}, "from 1 to the 16 pixels"),
        ({"regions": torch.full((4, 4), 2)}, "none left out"),
        ({"regions": torch.zeros(2, 2).long()}, "each of 4 x 4 pixels"),
        ({"regions": 4, "steps": 0}, "one region at least"),
    ):
        with pytest.raises(ValueError, match=said):
            search_of(Sum(), ONES, 0, **knobs)
    monkeypatch.setattr(visual_precision_search, "PASSES", 100)
    with pytest.raises(ValueError, match="16 regions take 272 passes"):
        search_of(Sum(), ONES, 0, regions=16)
    assert len(search_of(Sum(), ONES, 0, regions=16, steps=2).attrs["region"][0]) == 2


# Detectors


def tiny(config, kind):
    torch.manual_seed(0)
    return kind(config).eval()


def yolos():
    sizes = {**VISION, "image_size": [32, 32], "num_detection_tokens": 5, "num_labels": 3}
    return tiny(t.YolosConfig(**sizes), t.YolosForObjectDetection), {}, True


def conditional_detr():
    backbone = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"])
    layers = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
    }
    config = t.ConditionalDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=16,
        num_queries=5,
        num_labels=3,
        **layers,
    )
    return tiny(config, t.ConditionalDetrForObjectDetection), {}, False


def owlvit():
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = t.OwlViTConfig(text_config=text, vision_config=vision, projection_dim=16)
    ids = torch.tensor([[1, 5, 49], [1, 7, 49], [1, 9, 49]])
    return tiny(config, t.OwlViTForObjectDetection), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [yolos, conditional_detr, owlvit])
def test_detectors_are_explained_at_their_likeliest_box(make):
    model, words, nothing = make()
    inputs = {**words, "pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    over = {"over": "pixel_values"}
    with torch.no_grad():
        output = model(**inputs)
    likely = output.logits.softmax(-1)[..., :-1] if nothing else output.logits.sigmoid()
    box, label = divmod(int(likely.flatten().argmax()), likely.shape[-1])
    plain = regard.attribute(model, inputs, method="gradient_x_input", **over)
    assert plain.attrs["predicts"] == "object"
    assert (int(plain["at"][0]), int(plain.target[0])) == (box, label)
    assert float(plain.score[0]) == pytest.approx(float(output.logits[0, box, label]), abs=1e-4)
    assert abs(plain.values).max() > 0
    other = 1 - min(label, 1)
    asked = regard.attribute(model, inputs, other, method="gradient_x_input", **over)
    assert int(asked["at"][0]) == int(likely[0, :, other].argmax())
    found = search_of(model, inputs, regions=4, **over)
    centre, size = output.pred_boxes.split(2, -1)
    boxes = torch.cat([centre - size / 2, centre + size / 2], -1)
    whole = best_box(boxes, likely, boxes[0, box], [label])[0]
    assert found.attrs["insertion"][0][-1] == pytest.approx(float(whole), abs=1e-4)
    assert found.shape == (1, 32, 32)
    with predict(model, inputs, regard.prediction.Question(over="pixel_values")) as prediction, torch.no_grad():
        assert torch.allclose(prediction.probability(), likely[:, box, label], atol=1e-5)


def test_a_model_without_boxes_has_none():
    with predict(Sum(), ONES, 0) as prediction, pytest.raises(ValueError, match="no boxes"):
        prediction.boxes()
