"""scene-magnifier: regions chosen by hand, fine keys beside a dense oracle, and fine tokens of a picture's quarters."""

from __future__ import annotations

import pytest
import torch
from families import asked
from pictured import call
from transformers import LlamaConfig, LlamaModel

import regard
from regard.interventions import _picture as picture
from regard.interventions import scene_magnifier as module
from regard.interventions._picture import Box
from regard.interventions.scene_magnifier import Projections, chosen, joined, magnified, scene_magnifier
from regard.kernels import Factor
from regard.objectives import collect

COARSE = [1, 2]  # keys of the scene, of five; three fine tokens of each


def test_regions_are_chosen_by_their_share_of_the_rows_range():
    weights = torch.tensor([[0.0, 0.1, 0.2, 0.5], [0.4, 0.5, 0.6, 0.9], [0.25, 0.25, 0.25, 0.25]])
    assert chosen(weights).tolist() == [[False, False, True, True]] * 2 + [[False] * 4]
    assert chosen(torch.tensor([0.0, 0.5, 1.0]), 0.5).tolist() == [False, False, True]  # above, not at


@pytest.mark.parametrize("options", [(), ("softcap",), ("sinks",), ("bias",), ("factors",), ("causal",), ("additive",)])
def test_fine_keys_count_beside_the_own_ones(options):
    torch.manual_seed(0)
    batch, heads, kv_heads, n, dim, first = 2, 4, 2, 5, 8, 3
    query = torch.randn(batch, heads, n, dim)
    (key, value), (fine, carried) = (torch.randn(2, batch, kv_heads, m, dim) for m in (n, 6))
    which = torch.rand(batch, n - first, 6) < 0.5
    of = torch.tensor(COARSE).repeat_interleave(3).expand(batch, -1)
    visible = torch.ones(n, n, dtype=torch.bool).tril()[None, None].repeat(batch, 1, 1, 1)
    visible[0, ..., 0] = False  # padding
    own = regard.Call(call(torch.rand(1, 1, 1), [False]).site, query, key, value, 0.3, mask=visible)
    scores = 0.3 * query @ torch.cat([key, fine], 2).repeat_interleave(2, 1).mT
    bias = torch.randn(1, heads, n, n)
    rows, keys = torch.randn(1, heads, n), torch.randn(batch, 1, n)
    if "softcap" in options:
        own, scores = own.but(softcap=0.5), 0.5 * (scores / 0.5).tanh()
    if "bias" in options:
        own, scores = own.but(bias=bias), scores + torch.cat([bias, bias[..., of[0]]], -1)
    if "factors" in options:
        own = own.but(factors=(Factor(rows, keys),))
        scores = scores + rows[..., None] * torch.cat([keys, keys.gather(2, of[:, None])], 2)[:, :, None]
    if "causal" in options:
        own = own.but(mask=visible[:, :, -1:], causal=True)
    if "additive" in options:
        own = own.but(mask=torch.zeros_like(visible, dtype=torch.float).masked_fill(~visible, float("-inf")))
    seen = torch.cat([visible[:, :, first:], which[:, None]], 3)
    scores = scores[:, :, first:].masked_fill(~seen, float("-inf"))
    if "sinks" in options:
        own = own.but(sinks=torch.tensor([0.5, 1.0, -1.0, 2.0]))
        sink = own.sinks[None, :, None, None].expand(batch, -1, n - first, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    oracle = weights @ torch.cat([value, carried], 2).repeat_interleave(2, 1)
    with torch.enable_grad():
        leaves = [fine.requires_grad_(), carried.requires_grad_()]
        ours = joined(own, *leaves, which, of, first)
        assert torch.allclose(ours.weights.dense(), weights, atol=1e-6)
        assert torch.allclose(ours.output, oracle, atol=1e-5)
        got = torch.autograd.grad(ours.output.square().sum(), leaves)
        again = 0.3 * query @ torch.cat([key, fine], 2).repeat_interleave(2, 1).mT
        if not options:
            dense = again[:, :, first:].masked_fill(~seen, float("-inf")).softmax(-1)
            dense = dense @ torch.cat([value, carried], 2).repeat_interleave(2, 1)
            want = torch.autograd.grad(dense.square().sum(), leaves)
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want))


def test_a_scene_whose_fine_tokens_are_its_coarse_ones_counts_twice():
    weights = torch.tensor([[0.2, 0.1, 0.3, 0.1, 0.3]])[None].repeat(1, 2, 1)  # both queries
    of = call(weights, [False, True, True, False, False])
    copies = of.key[:, :, COARSE]
    both = torch.ones(1, 2, 2, dtype=torch.bool)
    output = joined(of, copies, of.value[:, :, COARSE], both, torch.tensor([COARSE]), 0).output
    twice = torch.tensor([0.2, 0.2, 0.6, 0.1, 0.3])
    assert torch.allclose(output[0, 0, 0], twice / twice.sum(), atol=1e-6)


@pytest.fixture
def scene():
    """A small Llama of four layers, a prompt of nine states with a scene in the middle, and its projections."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    model = LlamaModel(config).eval()
    states, places = torch.randn(2, 9, 16), torch.tensor([[2, 3, 4]]).expand(2, -1)
    own = Projections(16, kv_heads=2, head_dim=4, layers=[2, 3])
    angles = model.rotary_emb(states, torch.arange(2, 5)[None])

    def fine(**knobs):
        return own(
            torch.linspace(-2, 2, 192).view(2, 3, 2, 16), angles, places=places, first=torch.tensor([6, 6]), **knobs
        )

    return model, states, own, fine


def run(model, states, method, layers=(3,)):
    with torch.no_grad(), regard.intervene(model, method), collect(model, lambda call: call.output) as seen:
        hidden = model(inputs_embeds=states).last_hidden_state
    return hidden, [seen[layer].value for layer in layers]


@torch.no_grad()
def test_words_alone_take_fine_tokens_and_only_after_the_layer_that_chooses(scene):
    model, states, _, fine = scene
    plain = model(inputs_embeds=states).last_hidden_state
    method = scene_magnifier(fine=fine(), start=1)
    new, _ = run(model, states, method)
    assert torch.equal(new[:, :6], plain[:, :6])
    assert not torch.isclose(new[:, 6:], plain[:, 6:], atol=1e-4).all(-1).any()
    assert method.selected.shape == (2, 9, 6)
    assert not method.selected[:, :6].any()
    assert method.selected[:, 6:].any(-1).all()
    pairs = method.selected.unflatten(-1, (3, 2))
    assert torch.equal(pairs[..., 0], pairs[..., 1])  # all fine tokens of a region, or none
    last, _ = run(model, states, scene_magnifier(fine=fine(last=torch.tensor([7, 7])), start=2))
    assert torch.equal(last[:, 8], plain[:, 8])
    assert not torch.allclose(last[:, 7], plain[:, 7], atol=1e-4)
    assert torch.equal(run(model, states, scene_magnifier(fine=fine(), start=1, threshold=1.0))[0], plain)


@torch.no_grad()
def test_a_share_of_the_new_output_is_between_both(scene):
    model, states, _, fine = scene
    outputs = {}
    for share in (0.0, 0.5, 1.0):
        method = scene_magnifier(fine=fine(), start=2, share=share)
        given = []

        class Looker:
            def output(self, call, output, given=given):
                given.append(output)
                return output

        with regard.intervene(model, method, Looker()):
            model(inputs_embeds=states)
        outputs[share] = given[3]
    assert torch.allclose(outputs[0.5], (outputs[0.0] + outputs[1.0]) / 2, atol=1e-6)
    assert not torch.allclose(outputs[0.0], outputs[1.0], atol=1e-3)


@torch.no_grad()
def test_a_token_at_a_time_is_as_all_at_once(scene):
    model, states, _, fine = scene
    whole, _ = run(model, states, scene_magnifier(fine=fine(), start=1))
    with regard.intervene(model, scene_magnifier(fine=fine(), start=1)):
        cached = model(inputs_embeds=states[:, :7], use_cache=True)
        parts = [cached.last_hidden_state]
        for i in (7, 8):
            found = model(inputs_embeds=states[:, i : i + 1], past_key_values=cached.past_key_values)
            parts.append(found.last_hidden_state)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_projections_are_trained_through_it(scene):
    model, states, own, fine = scene
    with regard.intervene(model, scene_magnifier(fine=fine(), start=1)):
        model(inputs_embeds=states).last_hidden_state[..., 0].sum().backward()
    assert all(parameter.grad.abs().max() > 1e-4 for parameter in own.parameters())


def test_what_it_refuses(scene):
    model, states, _, fine = scene
    made = fine()
    with pytest.raises(ValueError, match="threshold is from 0 to 1, not 96"):
        scene_magnifier(fine=made, threshold=96)
    with pytest.raises(ValueError, match="do not divide among 5 coarse"):
        scene_magnifier(fine=made._replace(places=torch.zeros(2, 5, dtype=torch.long)))
    for start in (3, 7):
        with pytest.raises(ValueError, match=f"LlamaModel has no layer after start={start}.*0 to 3"):
            run(model, states, scene_magnifier(fine=made, start=start))
    with pytest.raises(ValueError, match="no keys and values for layer 1"):
        run(model, states, scene_magnifier(fine=made, start=0))
    with pytest.raises(ValueError, match=r"batch of 2.*reads 1 rows"):
        run(model, states[:1], scene_magnifier(fine=made, start=1))
    with pytest.raises(ValueError, match="does not see the whole scene"):
        run(model, states, scene_magnifier(fine=made._replace(places=made.places + 7), start=1))

    class Halved:
        def weights(self, call, weights, rows):
            return weights / 2

    with pytest.raises(ValueError, match="put scene-magnifier first"), regard.intervene(model, Halved()):
        run(model, states, scene_magnifier(fine=made, start=1))


def test_four_fine_tokens_of_each_coarse_one():
    fine = torch.arange(16.0).view(4, 4)  # rows and columns of a picture of double resolution
    quarters = [fine[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(1, 1, 4, 1) for r, c in module.QUARTERS]
    got = module._by_coarse(quarters, 2, 2)[0, 0, :, 0]
    assert got.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


@torch.no_grad()
def test_fine_tokens_are_the_models_own_of_quarters_at_the_places_of_coarse_ones():
    model, processor, inputs, images = asked("llava")
    fine = magnified(model, inputs, processor)
    coarse = fine.places.shape[1]
    side = int(coarse**0.5)
    assert fine.keys[0].shape[2] == 4 * coarse
    assert torch.equal(fine.first, fine.places.amax(1) + 1)
    down, right = module.QUARTERS[3]
    box = Box(right / 2, down / 2, (right + 1) / 2, (down + 1) / 2)
    parts = [picture.cropped(image, box, image.size) for image in images]
    quarter = picture.given(model, inputs, processor, parts, "test")
    positions = inputs["attention_mask"].cumsum(1) - 1
    calls = []
    with collect(model.model.language_model, calls.append):
        model(**quarter, position_ids=positions.clamp(min=0), use_cache=False)
    at = fine.places[0]
    patch = side + 1  # of the quarter, row 1, column 1: of the whole picture, side + 1 in both
    of = ((side + 1) // 2) * side + (side + 1) // 2
    number = 4 * of + 2 * ((side + 1) % 2) + (side + 1) % 2
    own = calls[0]
    assert torch.allclose(fine.values[0][0, :, number], own.value[0, :, at[patch]], atol=1e-6)
    rotary = model.model.language_model.rotary_emb

    def turned(key, by):
        cos, sin = (a[0] for a in rotary(key, positions[:1, at[by]][:, None]))
        one, other = key.chunk(2, -1)
        return key * cos + torch.cat([-other, one], -1) * sin

    def back(key, by):
        cos, sin = (a[0] for a in rotary(key, positions[:1, at[by]][:, None]))
        one, other = key.chunk(2, -1)
        return key * cos - torch.cat([-other, one], -1) * sin

    want = turned(back(own.key[0, :, at[patch]], patch), of)
    assert of != patch
    assert torch.allclose(fine.keys[0][0, :, number], want, atol=1e-5)


@torch.no_grad()
def test_which_models_have_quarters():
    for kind in ("llava", "internvl", "paligemma"):
        model, processor, inputs, _ = asked(kind)
        assert isinstance(scene_magnifier.fit(model, inputs, processor), scene_magnifier)
    model, processor, inputs, _ = asked("qwen2_vl")
    with pytest.raises(ValueError, match="Qwen2VLForConditionalGeneration takes no such positions"):
        magnified(model, inputs, processor)


def test_a_picture_that_does_not_halve_is_refused():
    tokens = regard.Tokens.plain("text", 1, 9).on_grid(0, 0, (3, 3))
    with pytest.raises(ValueError, match="3 x 3"):
        module._grid(tokens, torch.ones(1, 9, dtype=torch.bool), "Kind")
