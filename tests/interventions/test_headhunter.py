"""Heads of models that paint are dulled in a run aside, and hunted for a score."""

from __future__ import annotations

import families
import numpy as np
import pytest
import torch

import regard
from regard import Call, Site, Tokens
from regard.interventions.headhunter import Dulled, alone, chroma, headhunter, hunt, self_attention

diffusers = pytest.importorskip("diffusers", exc_type=ImportError)


def call(query, key, value, words=0):
    n = query.shape[2]
    tokens = Tokens.plain("text", len(query), n).marked("image", (torch.arange(n) < n - words).expand(len(query), -1))
    return Call(Site("attn", "blocks", 0), query, key, value, 1.0, tokens=tokens, query_tokens=tokens)


def of_weights(weights, value, words=0):
    keys = torch.eye(weights.shape[-1]).expand_as(weights)
    return call(weights.log(), keys, value, words)


def test_a_map_is_moved_towards_the_identity():
    given = of_weights(torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]]), torch.tensor([[[[0.0], [1.0]]]]))
    assert Dulled([("attn", 0)], 0.4).output(given, given.output).flatten().tolist() == pytest.approx([0.3, 0.85])
    assert Dulled([("attn", 0)], 0.0).output(given, given.output).flatten().tolist() == pytest.approx([0.5, 0.75])
    assert Dulled([("attn", 0)]).output(given, given.output).flatten().tolist() == [0, 1]
    assert Dulled([("other", 0)]).output(given, given.output) is given.output


def test_where_words_are_among_the_tokens_a_picture_token_sees_itself_and_words():
    weights = torch.tensor([[[[0.2, 0.5, 0.3], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]]]])
    value = torch.tensor([[[[1.0], [10.0], [100.0]]]])
    found = alone(of_weights(weights, value, words=1), [0]).flatten()
    assert found.tolist() == pytest.approx([(0.2 + 30) / 0.5, (6 + 30) / 0.9, 0.3 + 3 + 40], rel=1e-4)


def test_only_its_heads_and_their_own_keys():
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 5, 4, generator=draw) for n in (4, 2, 2))
    given = call(query, key, value)
    new = Dulled([("attn", 3), ("attn", 1)]).output(given, given.output)
    assert torch.equal(new[:, [0, 2]], given.output[:, [0, 2]])
    assert torch.allclose(new[:, 1], value[:, 0])
    assert torch.allclose(new[:, 3], value[:, 1])


def test_what_is_led_away():
    method = headhunter(heads=[], w=3.0, halved=False)
    assert float(method.guided(torch.ones(1, 1), torch.full((1, 1), 0.6))) == pytest.approx(2.2)
    halves = headhunter(heads=[], w=3.0).guided(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.5]]))
    assert halves.flatten().tolist() == [2.5, 3.5]  # what the half with words differs by, on both
    with pytest.raises(ValueError, match="a batch of 3 is not one without and one with words"):
        headhunter(heads=[]).guided(torch.ones(3, 1), torch.ones(3, 1))


def test_hunting():
    worth = {("attn", i): v for i, v in enumerate([3.0, 5.0, 1.0, 4.0])}
    made = []

    def make(heads):
        made.append(tuple(heads))
        return [sum(worth[head] for head in heads)]

    assert [i for _, i in hunt(make, list, list(worth), k=2)] == [1, 3]
    assert len(made) == 4
    assert {i for _, i in hunt(make, list, list(worth), k=2, rounds=2)} == {0, 1, 2, 3}
    assert made[-1][:2] == (("attn", 1), ("attn", 3))
    with pytest.raises(ValueError, match="3 rounds of 2 heads, and there are 4"):
        hunt(make, list, list(worth), k=2, rounds=3)


def test_chroma_is_of_pixels():
    assert chroma(np.array([[[[1.0, 0.5, 0.2], [0.3, 0.3, 0.3]]]])).tolist() == pytest.approx([0.4])


def unet():
    return families.unet(True, False), {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": 3,
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
    ), {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([3, 3]),
    }


@pytest.fixture(params=[unet, sd3])
def built(request):
    torch.manual_seed(0)
    model, inputs = request.param()
    with torch.no_grad():
        for parameter in model.parameters():  # or there is nothing that attention says
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval(), inputs


@torch.no_grad()
def test_with_all_heads_of_a_layer_it_is_what_the_processors_for_it_do(built):
    model, inputs = built
    name = next(name for name, _ in self_attention(model))
    heads = [head for head in self_attention(model) if head[0] == name]
    plain = model(**inputs).sample
    module = model.get_submodule(name)
    own, joint = module.processor, "Joint" in type(module.processor).__name__
    kinds = diffusers.models.attention_processor
    if joint:
        module.set_processor(kinds.PAGJointAttnProcessor2_0())
        twice = {k: torch.cat([v, v]) for k, v in inputs.items()}  # its first half is not changed
    else:
        module.set_processor(kinds.PAGIdentitySelfAttnProcessor2_0())
        twice = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    other = model(**twice).sample.chunk(2)[1]
    module.set_processor(own)
    with regard.intervene(model, Dulled(heads)):
        assert torch.allclose(model(**inputs).sample, other, atol=1e-4)
    with regard.intervene(model, headhunter(heads=heads, w=2.0, halved=False)):
        assert torch.allclose(model(**inputs).sample, plain + 2 * (plain - other), atol=1e-3)
        (tuple_,) = model(**inputs, return_dict=False)
        assert torch.allclose(tuple_, plain + 2 * (plain - other), atol=1e-3)
    assert torch.equal(model(**inputs).sample, plain)


@torch.no_grad()
def test_a_recording_sees_the_run_that_counts(built):
    model, inputs = built
    with regard.record(model, "entropy") as plain:
        model(**inputs)
    guide = regard.intervene(model, headhunter(heads=self_attention(model)))
    with regard.record(model, "entropy") as outer, guide, regard.record(model, "entropy") as inner:
        model(**inputs)
    for recording in (outer, inner):
        assert len(recording) == 1
        assert recording.tree.equals(plain.tree)  # not the time in its attributes


@torch.no_grad()
def test_after_an_error_the_model_is_as_it_was(built):
    model, inputs = built
    plain = model(**inputs).sample
    method = headhunter(heads=self_attention(model)[:1])
    odd = {k: v[:1] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in inputs.items()}
    with regard.intervene(model, method):
        with pytest.raises(ValueError, match="a batch of 1"):
            model(**odd)
        model(**inputs)
    assert torch.equal(model(**inputs).sample, plain)


def test_heads_that_are_not_there_are_refused():
    model, _ = unet()
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    with pytest.raises(ValueError, match="cross attention, not self-attention"):
        headhunter(heads=[(name, 0)]).begin(model)
    with pytest.raises(ValueError, match=r"heads \[8\]: not among its heads \(8\)"):
        headhunter(heads=[(name.replace("attn2", "attn1"), 8)]).begin(model)
    with pytest.raises(ValueError, match="BertForMaskedLM has no attention of theirs"):
        headhunter(heads=[]).begin(families.build("bert")[0])
    with pytest.raises(ValueError, match="u is a share, 0 to 1, not 2"):
        headhunter(heads=[], u=2)


def test_fit_hunts_among_the_heads_of_a_pipeline():
    model, pipeline = regard.load("painter")
    seen = []

    def score(pictures):
        seen.append(pictures.shape)
        return chroma(pictures)

    inputs = {"prompt": "a red circle", "num_inference_steps": 1}
    method = headhunter.fit(model, inputs, pipeline, score=score, k=2, w=1.0)
    assert seen == [(1, 32, 32, 3)] * 25
    assert sum(map(len, method.aside.heads.values())) == 2
    assert method.w == 1
    with pytest.raises(ValueError, match="have no prompt"):
        headhunter.fit(model, {}, pipeline)
