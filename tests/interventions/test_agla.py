"""agla: which pixels stay, the sum of logits, and the run on the masked picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import SEEING, asked
from PIL import Image

from regard.interventions._branch import Branch
from regard.interventions.agla import agla, kept, masked

RISING = np.arange(16.0).reshape(4, 4)


def test_the_sum_by_hand():
    made = object.__new__(agla)
    made.alpha, made.beta = 2.0, 0.5
    made.branch = type("Fixed", (), {"logits": lambda self, ids: torch.tensor([[2.0, 0.0, 9.0]])})()
    # the cutoff is at 1.2 + log 0.5 = 0.507, of the whole picture's logits
    found = made(None, torch.tensor([[1.0, 1.2, 0.5]]))[0]
    assert torch.allclose(found, torch.tensor([5.0, 1.2, -torch.inf]))


@pytest.mark.parametrize(("similarity", "share"), [(0.0, 1.0), (0.4, 0.8), (1.0, 0.5)])
def test_the_better_they_match_the_less_stays(similarity, share):
    stays = kept(RISING, similarity, (40, 40))
    assert stays.mean() == pytest.approx(share, abs=0.002)
    assert stays[-1].mean() > 0.8  # the most relevant patches
    assert stays[0, 0] == (share == 1)


def test_what_does_not_stay_is_black():
    image = Image.fromarray(np.full((40, 20, 3), 77, np.uint8))
    relevance = np.zeros((4, 2))
    relevance[3, 1] = 1.0
    found = np.asarray(masked(image, relevance, 1.0))
    assert set(np.unique(found)) == {0, 77}
    assert (found[35:, 15:] == 77).all()
    assert np.array_equal(found[..., 0] == 77, kept(relevance, 1.0, (20, 40)))
    assert np.array_equal(kept(relevance, 1.0, (20, 40)), kept(10 * relevance + 3, 1.0, (20, 40)))


def test_a_map_that_is_the_same_everywhere_is_refused():
    with pytest.raises(ValueError, match="agla: all patches are as relevant"):
        kept(np.ones((4, 4)), 0.4, (16, 16))


@torch.no_grad()
@pytest.mark.parametrize("name", SEEING)
def test_the_second_run_is_on_the_matchers_picture(name):
    model, processor, inputs, images = asked(name)
    given = []

    def match(image, text):
        given.append((image, text))
        return np.random.default_rng(len(given)).random((4, 6)), 0.8

    made = agla.fit(model, inputs, processor, match=match)
    assert [np.array_equal(np.asarray(a), np.asarray(b)) for (a, _), b in zip(given, images)] == [True, True]
    assert "w4 w5 w6" in given[0][1]
    black = [masked(image, np.random.default_rng(i).random((4, 6)), 0.8) for i, image in enumerate(images, 1)]
    pixels = processor.image_processor(images=black, return_tensors="pt")["pixel_values"]
    scores = model(**inputs).logits[:, -1]
    other = Branch(model, inputs | {"pixel_values": pixels}).logits(inputs["input_ids"])
    made.beta = 0.0
    assert torch.allclose(made(inputs["input_ids"], scores), scores + 2 * other, atol=1e-4)


@torch.no_grad()
def test_the_same_picture_twice_changes_no_choice():
    model, _, inputs, _ = asked("llava")
    made = agla(model, inputs, masked=inputs, beta=0.0)
    scores = model(**inputs).logits[:, -1]
    assert torch.allclose(made(inputs["input_ids"], scores), 3 * scores, atol=1e-3)
