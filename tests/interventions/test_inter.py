"""inter: the interaction, where it is used, and the three prompts that it is measured on."""

from __future__ import annotations

import families
import pytest
import torch
from families import SEEING, asked

from regard.interventions._branch import Branch
from regard.interventions.inter import inter, interaction, usual, variance, variances

BOTH, PICTURE, TEXT, NONE = (torch.tensor([some]) for some in ([2.0, 1.8], [0.5, 0.2], [1.5, 2.0], [0.2, 0.3]))


def bare(*parts, **knobs):
    """A method whose three runs say this."""
    made = object.__new__(inter)
    made.__dict__.update({"strength": 1.0, "threshold": 0.0, "beta": 0.0, **knobs})
    for name, said in zip(("picture", "text", "none"), parts):
        setattr(made, name, type("Fixed", (), {"logits": lambda self, ids, said=said: said})())
    return made


def test_the_interaction_by_hand():
    found = interaction(BOTH, PICTURE, TEXT, NONE)
    assert torch.allclose(found, torch.tensor([[0.2, -0.1]]))
    assert torch.allclose(variance(found, torch.ones(1, 2, dtype=torch.bool)), torch.tensor([0.0225]))
    assert torch.allclose(bare(PICTURE, TEXT, NONE)(None, BOTH), torch.tensor([[2.2, 1.7]]))
    assert torch.allclose(bare(PICTURE, TEXT, NONE, strength=2.0)(None, BOTH), torch.tensor([[2.4, 1.6]]))


def test_what_adds_up_has_no_interaction():
    none, picture, text = torch.rand(3, 1, 5)
    both = picture + text - none
    assert torch.allclose(bare(picture, text, none, strength=9.0)(None, both), both, atol=1e-5)


def test_only_keywords_are_changed():
    assert torch.equal(bare(PICTURE, TEXT, NONE, threshold=0.03)(None, BOTH), BOTH)  # it varies by 0.0225
    assert not torch.equal(bare(PICTURE, TEXT, NONE, threshold=0.02)(None, BOTH), BOTH)
    one = bare(PICTURE, TEXT, NONE, beta=0.9)  # 1.8 is 0.82 times as likely as 2
    assert torch.equal(one(None, BOTH), BOTH)
    rows = bare(*(x.repeat(2, 1) for x in (PICTURE, TEXT, NONE)), threshold=torch.tensor([0.0, 1.0]))
    found = rows(None, BOTH.repeat(2, 1))
    assert torch.equal(found[1:], BOTH)
    assert torch.allclose(found[0], torch.tensor([2.2, 1.7]))


def test_candidates_alone_are_changed():
    scores = torch.tensor([[2.0, 1.8, -1.0, -torch.inf]])
    parts = [torch.nn.functional.pad(x, (0, 2), value=7.0) for x in (PICTURE, TEXT, NONE)]
    found = bare(*parts, beta=0.1)(None, scores)[0]
    assert torch.allclose(found[:2], torch.tensor([2.2, 1.7]))
    assert found[2:].tolist() == [-1.0, -torch.inf]


@torch.no_grad()
@pytest.mark.parametrize("name", SEEING)
def test_the_three_runs_read_what_is_left(name):
    model, processor, inputs, _ = asked(name)
    made = inter.fit(model, inputs, processor, threshold=0.0)

    def words(branch, row):
        prompt = branch.prompt
        return prompt["input_ids"][row][prompt["attention_mask"][row].bool()].tolist()

    own = inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist()
    said = [i for i in own if i not in (4, 5, 6)]
    bare = [i for i in own if i != families.IMAGE]
    assert words(made.picture, 0) == said
    assert words(made.text, 0) == bare
    assert words(made.none, 0) == [i for i in said if i != families.IMAGE]
    assert "pixel_values" in made.picture.prompt
    assert "pixel_values" not in made.text.prompt
    scores = model(**inputs).logits[:, -1]
    alone = {"input_ids": torch.tensor([bare]), "attention_mask": torch.ones(1, len(bare), dtype=torch.long)}
    want = Branch(model, alone).logits(alone["input_ids"])[0]
    if name != "paligemma":  # of text alone, transformers masks padded rows otherwise than rows without padding
        assert torch.allclose(made.text.logits(inputs["input_ids"])[0], want, atol=1e-3)
    made.beta = 0.0
    others = [b.logits(inputs["input_ids"]) for b in (made.picture, made.text, made.none)]
    want = scores + interaction(scores, *others)
    assert torch.allclose(made(inputs["input_ids"], scores), want, atol=1e-3)


@torch.no_grad()
def test_the_usual_variance_is_of_each_rows_answer():
    model, processor, inputs, _ = asked("llava")
    made = inter.fit(model, inputs, processor, threshold=0.0, beta=0.0)
    found = variances(model, inputs, made, steps=5)
    assert [len(row) for row, _ in found] == [5, 5]
    assert torch.allclose(usual(model, inputs, made, steps=5), torch.stack([row.median() for row, _ in found]))
    words = found[0][1].tolist()
    model.generation_config.eos_token_id, n = words[2], words.index(words[2]) + 1
    ended = variances(model, inputs, made, steps=5)
    assert len(ended[0][0]) == n
    assert torch.allclose(ended[0][0], found[0][0][:n])
