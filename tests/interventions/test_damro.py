"""damro: which patches the tower's first token attends to, the run that sees them alone, and the contrast."""

from __future__ import annotations

import families
import pytest
import torch
from families import asked

import regard
from regard.interventions.damro import _fed, damro, first_row, only, outliers


def test_the_contrast_by_hand():
    def contrast(alpha, beta, scores=(2.0, 1.0, 0.0)):
        made = object.__new__(damro)
        made.alpha, made.beta = alpha, beta
        made.branch = type("Fixed", (), {"logits": lambda self, ids: torch.tensor([[1.0, 2.0, 0.0]])})()
        return made(None, torch.tensor([scores]))[0].tolist()

    assert contrast(0.5, 0.1) == [2.5, 0.5, 0.0]  # the cutoff is at 2 + log 0.1 < 0
    assert contrast(0.5, 0.5) == [2.5, -torch.inf, -torch.inf]  # and at 1.3, of the logits and not of the contrast
    assert contrast(0.5, 0.0, (2.0, -torch.inf, 0.0)) == [2.5, -torch.inf, 0.0]  # what is ruled out stays out


def test_heads_are_one_or_each_their_own():
    """The one head that looks hard at one patch, against two that look a little at another."""
    query = torch.zeros(1, 3, 3, 2)
    query[:, :, 0, 0] = 1.0
    key = torch.zeros(1, 3, 3, 2)
    key[0, 0, 1, 0] = 9.0
    key[0, 1:, 2, 0] = 4.0
    assert first_row(query, key, 1.0)[0].tolist() == [9.0, 8.0]  # the sum of their scores
    mean = first_row(query, key, 1.0, heads="mean")[0]
    one = torch.tensor([0.0, 9.0, 0.0]).softmax(0)
    two = torch.tensor([0.0, 0.0, 4.0]).softmax(0)
    assert torch.allclose(mean, ((one + 2 * two) / 3)[1:])
    assert mean[1] > mean[0]


@torch.no_grad()
def test_outliers_are_those_of_the_layer_that_is_fed_on():
    model, _, inputs, _ = asked("llava")
    for chosen, layer in ((-1, 1), (-2, 0), (1, 0), (2, 1)):
        model.config.vision_feature_layer = chosen
        seen = {}

        class Watch:
            def inputs(self, call, seen=seen):
                if call.site.stack == "vision_tower":
                    seen[call.site.layer] = call.query, call.key
                return call

        with regard.intervene(model, Watch()):
            model(**inputs)
        query, key = (x.transpose(1, 2).flatten(2) for x in seen[layer])  # the width whole, as one head
        want = (query[:, :1] @ key.mT)[:, 0, 1:].topk(3).indices
        assert torch.equal(outliers(model, inputs, topk=3), want), chosen
    model.config.vision_feature_layer = [1, -1]
    assert _fed(model) == 1


@torch.no_grad()
def test_the_second_run_is_of_a_prompt_of_these_patches_alone():
    """In the order given: as the language model says to the shorter text, position by position."""
    model, _, inputs, _ = asked("llava")
    kept = torch.tensor([[5, 2, 11], [0, 15, 3]])
    states = []

    class Enter:
        def entering(self, site, hidden):
            if site.stack == "language_model" and site.layer == 0:
                states.append(hidden)
            return hidden

    with regard.intervene(model, Enter()):
        model(**inputs)
    branch = only(model, inputs, kept)
    first = branch.logits(inputs["input_ids"])
    more = torch.cat([inputs["input_ids"], torch.tensor([[9], [8]])], 1)
    second = branch.logits(more)
    embed = model.get_input_embeddings()
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        image = (inputs["input_ids"][row] == families.IMAGE)[real]
        own = states[0][row][real]
        short = torch.cat([own[image][kept[row]], own[~image]])[None]
        said = model.model.language_model(inputs_embeds=short).last_hidden_state[:, -1]
        assert torch.allclose(model.lm_head(said)[0], first[row], atol=1e-4)
        longer = torch.cat([short, embed(more[row : row + 1, -1:])], 1)
        said = model.model.language_model(inputs_embeds=longer).last_hidden_state[:, -1]
        assert torch.allclose(model.lm_head(said)[0], second[row], atol=1e-4)


@torch.no_grad()
def test_all_patches_in_reading_order_take_nothing_off():
    model, _, inputs, _ = asked("llava")
    made = damro(model, inputs, topk=16, beta=0.0)
    assert made.kept.sort().values.tolist() == [list(range(16))] * 2
    made.branch = only(model, inputs, made.kept.sort().values)
    scores = model(**inputs).logits[:, -1]
    assert torch.allclose(made(inputs["input_ids"], scores), scores, atol=1e-4)


@torch.no_grad()
def test_how_many_patches_unless_told():
    model, _, inputs, _ = asked("llava")
    assert outliers(model, inputs).shape == (2, 1)  # 10 of 576 are less than one of 16
    with pytest.raises(ValueError, match="damro: topk=17 of 16 patches"):
        outliers(model, inputs, topk=17)


@pytest.mark.parametrize(
    ("name", "words"), [("paligemma", "first token of a vision tower"), ("internvl", "4 tokens of 16 patches")]
)
def test_towers_without_a_first_token_or_with_merged_patches_are_refused(name, words):
    model, _, inputs, _ = asked(name)
    with pytest.raises(ValueError, match=f"damro.*{words}"):
        damro(model, inputs)
