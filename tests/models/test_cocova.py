"""CoCoVa: gate and selection by hand, a round against plain matrices, no rounds as the base model, padding, losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import regard
from regard.models.cocova import (
    CoCoVa,
    LatentConfig,
    LatentQFormer,
    ThoughtDiffusion,
    cocova,
    gated,
    prompt,
    select,
    thought_contrast,
)
from tests import families


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def former(**sizes) -> LatentQFormer:
    return LatentQFormer(LatentConfig(**{"dim": 8, "rounds": 3, "keep": 3, "heads": 2, **sizes})).eval()


def built(**sizes) -> tuple[CoCoVa, dict]:
    torch.manual_seed(0)
    llava, inputs = families.llava()
    model = cocova(llava.eval(), **{"rounds": 2, "keep": 4, **sizes}).eval()
    embeds, image = prompt(llava, **inputs)
    return model, {"embeds": embeds.detach(), "image": image}


def test_gate_by_hand():
    once = gated(torch.tensor(2.0), torch.tensor(0.0), torch.tensor(0.75))
    assert (float(once), float(gated(once, torch.tensor(0.0), torch.tensor(0.75)))) == (1.5, 1.125)


def test_selection_by_hand():
    scores = torch.tensor([[[0.0, math.log(3), -1.0, 5.0], [2.0, 1.0, -1.0, 5.0]]])
    indices, factors = select(scores, 2, torch.tensor([[True, True, True, False]]))
    assert indices.tolist() == [[0, 1]]
    torch.testing.assert_close(factors, torch.tensor([[2.0, math.log(3)]]).sigmoid())
    with pytest.raises(ValueError, match="number of image tokens, 3; got 4"):
        select(scores, 4, torch.tensor([[True, True, True, False]]))
    with pytest.raises(ValueError, match="got 0"):
        select(scores, 0)


def test_a_shut_gate_keeps_the_first_thought_and_the_picture_out():
    model, image, text = former(), torch.randn(2, 6, 8), torch.randn(2, 4, 8)
    model.gate.bias.data.fill_(1e4)
    found = model(image, text).states
    first = model.queries + model.start(text.mean(1))[:, None]
    torch.testing.assert_close(found, first[:, None].expand_as(found))
    torch.testing.assert_close(model(torch.randn(2, 6, 8), text).states, found)


def test_rounds_by_the_formulas():
    model = former(heads=1, keep=2, thoughts=2).double()
    image, text = torch.randn(1, 5, 8).double(), torch.randn(1, 3, 8).double()

    def attended(layer, query, key, value):
        to_q, to_k, to_v = layer.in_proj_weight.chunk(3)
        bias_q, bias_k, bias_v = layer.in_proj_bias.chunk(3)
        query, key, value = query @ to_q.T + bias_q, key @ to_k.T + bias_k, value @ to_v.T + bias_v
        return layer.out_proj((query @ key.mT / 8**0.5).softmax(-1) @ value)

    thought = model.queries + model.start(text.mean(1))[:, None]
    found = model(image, text)
    for k in range(3):
        scores = (model.ask(thought) @ model.offer(image).mT / 8**0.5).amax(1)[0]  # of the thought before
        best = scores.argsort(descending=True)[:2]
        assert found.selected[0, k].tolist() == best.tolist()
        asked = F.layer_norm(thought + attended(model.among, thought, thought, thought), (8,))
        kept = image[:, best]
        seen = attended(model.on_image, asked, kept, kept * scores[best].sigmoid()[None, :, None])
        read = attended(model.on_text, asked, text, text)
        gate = model.gate(torch.cat([thought, seen, read], -1)).sigmoid()
        thought = gate * thought + (1 - gate) * model.mlp(F.layer_norm(seen + read, (8,)))
        torch.testing.assert_close(found.states[:, k], thought)


def test_image_tokens_have_no_order_and_selection_moves():
    model, image, text = former(keep=2), torch.randn(4, 9, 8), torch.randn(4, 3, 8)
    model.ask.weight.data.mul_(20)
    found, order = model(image, text), torch.randperm(9)
    moved = model(image[:, order], text)
    torch.testing.assert_close(moved.states, found.states)
    assert torch.equal(order[moved.selected], found.selected)
    assert (found.selected[:, 0] != found.selected[:, 2]).any()  # it follows the thought


def test_gradients_reach_the_selection():
    model = former()
    model(torch.randn(2, 6, 8), torch.randn(2, 3, 8)).states.square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_padding_and_rows_do_not_mix():
    model, image, text = former(), torch.randn(3, 7, 8), torch.randn(3, 5, 8)
    image_mask, text_mask = torch.arange(7).expand(3, -1) < 5, torch.arange(5).expand(3, -1) < 4
    expected = model(image[:, :5], text[:, :4])
    image[:, 5:], text[:, 4:] = math.nan, math.nan
    found = model(image, text, image_mask=image_mask, text_mask=text_mask)
    torch.testing.assert_close(found.states, expected.states)
    assert torch.equal(found.selected, expected.selected)
    torch.testing.assert_close(model(image[1:2, :5], text[1:2, :4]).states, expected.states[1:2])
    assert model(image[:0], text[:0]).states.shape == (0, 3, 1, 8)


def test_no_rounds_are_the_base_model():
    model, given = built(rounds=0)
    answers = torch.randint(50, (2, 3))
    embeds = torch.cat([given["embeds"], model.language.get_input_embeddings()(answers)], 1)
    expected = model.language(inputs_embeds=embeds).logits[:, -4:]
    torch.testing.assert_close(model(**given, answers=answers).logits, expected, atol=1e-5, rtol=1e-5)
    assert model(**given).logits.shape[1] == 1


def test_thoughts_stand_between_prompt_and_answer():
    model, given = built(thoughts=2)
    answers = torch.randint(50, (2, 3))
    found = model(**given, answers=answers)
    thoughts = model.read(found.thoughts.states).flatten(1, 2)
    assert thoughts.shape[1] == 4
    embeds = torch.cat([given["embeds"], thoughts, model.language.get_input_embeddings()(answers)], 1)
    expected = model.language(inputs_embeds=embeds).logits[:, -4:]
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-5)
    other = model(**given, answers=answers.roll(1, 1)).logits
    torch.testing.assert_close(other[:, 0], found.logits[:, 0])  # no word sees those after it


def test_padding_on_the_left_and_answers_one_by_one():
    model, given = built()
    said = model.answer(**given, words=3)
    again = model(**given, answers=said[:, :2]).logits.argmax(-1)
    assert torch.equal(again, said)
    padded = {
        "embeds": F.pad(given["embeds"], (0, 0, 2, 0), value=3.0),
        "image": F.pad(given["image"], (2, 0)),
        "mask": F.pad(torch.ones_like(given["image"]), (2, 0)),
    }
    torch.testing.assert_close(model(**padded).logits, model(**given).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.answer(**padded, words=3), said)
    assert model.answer(**given, words=0).shape == (2, 0)


def test_record_sees_the_sites_by_round():
    model = former()
    with regard.record(model, "entropy") as recording:
        model(torch.randn(2, 6, 8), torch.randn(2, 4, 8))
    found = {name: dict(stack["entropy"].sizes) for name, stack in recording.tree.children.items()}
    sizes = {"batch": 2, "layer": 3, "head": 2, "query": 1}
    assert found == {"among": sizes, "on_image_cross": sizes, "on_text_cross": sizes}


def test_contrast_by_hand():
    thoughts = torch.eye(2)[:, None, None] * torch.tensor([1.0, 3.0])[None, :, None, None]  # two rounds, one direction
    own = math.log(1 + math.exp(-1))
    found = thought_contrast(thoughts, torch.eye(2), torch.eye(2), temperature=1.0)
    torch.testing.assert_close(found, torch.tensor(own))
    wrong = thought_contrast(thoughts, torch.eye(2), torch.eye(2).flip(0), temperature=1.0)
    torch.testing.assert_close(wrong, torch.tensor((own + own + 1) / 2))
    with pytest.raises(ValueError, match="two rows or more"):
        thought_contrast(thoughts[:1], torch.eye(2)[:1], torch.eye(2)[:1])


def test_the_denoiser_learns_from_the_last_thought():
    module, latents = ThoughtDiffusion(2, 2, hidden=32), torch.randn(256, 2)
    thoughts = torch.stack([torch.zeros(256, 2), latents], 1)[:, :, None]
    optimiser = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        module(thoughts, latents).backward()
        optimiser.step()
    losses = [
        float(module(x, latents, generator=torch.Generator().manual_seed(0)).detach())
        for x in (thoughts, thoughts.roll(1, 0))
    ]
    assert losses[0] < 0.5 * losses[1]
    with pytest.raises(ValueError, match="there is no thought"):
        module(thoughts[:, :0], latents)


def test_saved_and_loaded(tmp_path):
    model = former(thoughts=2)
    model.save_pretrained(tmp_path)
    again = LatentQFormer.from_pretrained(tmp_path).eval()
    given = torch.randn(2, 6, 8), torch.randn(2, 3, 8)
    assert again.config == model.config
    assert torch.equal(again(*given).states, model(*given).states)


def test_refusals():
    model, given = built()
    with pytest.raises(TypeError, match="takes a LlavaForConditionalGeneration"):
        cocova(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ends in padding"):
        model(**given, mask=given["image"])
    with pytest.raises(ValueError, match="image and mask are boolean"):
        model(given["embeds"], given["image"].long())
    with pytest.raises(ValueError, match="as wide as the language model, 32; got 8"):
        CoCoVa(model.language, LatentConfig(8))
    with pytest.raises(ValueError, match="number of image tokens, 16; got 17"):
        built(keep=17)[0](**given)
    with pytest.raises(ValueError, match="heads divide dim"):
        former(heads=3)
    with pytest.raises(ValueError, match=r"text is \[batch, token, 8\]"):
        former()(torch.randn(2, 6, 8), torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="a word of text or more"):
        former()(torch.randn(2, 6, 8), torch.randn(2, 0, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_denoiser_in_half_precision(dtype):
    denoiser = ThoughtDiffusion(8, 5).to(dtype)
    found = denoiser(torch.randn(3, 2, 1, 8, dtype=dtype), torch.randn(3, 5, dtype=dtype))
    assert found.dtype == dtype
    assert found.isfinite()


def test_without_thoughts_there_is_no_contrast():
    with pytest.raises(ValueError, match="of a round or more"):
        thought_contrast(torch.randn(3, 0, 1, 8), torch.randn(3, 8), torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"got \[3, 2, 1, 8\], \[2, 8\]"):
        thought_contrast(torch.randn(3, 2, 1, 8), torch.randn(2, 8), torch.randn(3, 8))
    with pytest.raises(ValueError, match="steps are 1 or more"):
        ThoughtDiffusion(8, 5, steps=0)


def test_without_a_cache_it_says_so():
    model, given = built()
    model.language.enable_input_require_grads()
    model.language.activation_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="switch activation checkpointing off"):
        model(**given)
