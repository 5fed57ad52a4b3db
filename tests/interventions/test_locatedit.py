"""Maps of words are smoothed over self-attention, and what is painted outside of them is the first text's."""

from __future__ import annotations

import families
import pytest
import torch

import regard
from regard.interventions.locatedit import differing, locatedit, smoothed

diffusers = pytest.importorskip("diffusers", exc_type=ImportError)

EVEN = torch.full((1, 2, 2), 0.5)
TEXTS = ["a red circle and a blue star", "a red circle and a green star"]


def test_two_places_by_hand():
    found = smoothed(torch.tensor([[1.0, 0.0]]), EVEN, alpha=0.0, strength=0.5)
    assert found.flatten().tolist() == pytest.approx([2 / 3, 1 / 3])
    # unsure of the second: w is 1/2 of the first and sigmoid(-2) = .1192 of the second, squared .25 and .0142
    found = smoothed(torch.tensor([[1.0, 0.0]]), EVEN, alpha=2.0, threshold=1.0, strength=0.5)
    a, b = 0.25, 0.11920292**2
    system = torch.tensor([[a + 0.25, -0.25], [-0.25, b + 0.25]])
    assert torch.allclose(found[0], torch.linalg.solve(system, torch.tensor([a, 0.0])), atol=1e-6)


def drawn(n=9):
    draw = torch.Generator().manual_seed(0)
    return torch.rand(2, n, generator=draw), torch.randn(2, n, n, generator=draw).softmax(-1)


def test_limits_of_smoothing():
    cross, graph = drawn()
    assert torch.allclose(smoothed(cross, graph, strength=0.0), cross, atol=1e-6)
    sure = torch.sigmoid(2.61 * (cross - 0.4858)).square()
    everywhere = (sure * cross).sum(1, keepdim=True) / sure.sum(1, keepdim=True)
    assert torch.allclose(smoothed(cross, graph, strength=1e3), everywhere.expand_as(cross), atol=1e-3)
    same = torch.full_like(cross, 0.3)
    assert torch.allclose(smoothed(same, graph), same, atol=1e-5)


def test_what_smoothing_keeps():
    cross, graph = drawn()
    sure = torch.sigmoid(2.61 * (cross - 0.4858)).square()
    found = smoothed(cross, graph)
    assert torch.allclose((sure * (found - cross)).sum(1), torch.zeros(2), atol=1e-5)
    apart = torch.block_diag(torch.full((4, 4), 0.25), torch.full((5, 5), 0.2)).expand(2, -1, -1)
    other = cross.clone()
    other[:, 4:] = 0
    assert torch.allclose(smoothed(cross, apart)[:, :4], smoothed(other, apart)[:, :4], atol=1e-6)


def test_the_words_in_which_texts_differ():
    _, pipeline = regard.load("painter")
    words = [*TEXTS, "a red circle and a green ring"]
    assert differing(words, pipeline.tokenizer) == [[6, 7], [6], [6, 7]]
    with pytest.raises(ValueError, match="has no words that 'a red circle' lacks"):
        differing(["a red circle", "a red circle"], pipeline.tokenizer)
    with pytest.raises(ValueError, match="has no words that another text lacks"):
        differing(["a red circle", "a red circle and a star"], pipeline.tokenizer)
    with pytest.raises(ValueError, match="give two texts or more, not 1"):
        differing(["a red circle"], pipeline.tokenizer)


def test_masks_are_of_all_steps_stretched_and_of_each_text():
    method = locatedit(words=[[1], [2]], strength=0.0, cut=0.5)
    graph = torch.eye(4).expand(2, -1, -1), (2, 2)
    method.add((torch.tensor([[0.0, 1, 2, 4], [5, 5, 5, 9]]), (2, 2)), graph)
    assert method.mask((2, 2)).int().tolist() == [[[0, 0], [0, 1]], [[0, 0], [0, 1]]]
    method.add((torch.tensor([[0.0, 3, 2, 0], [0, 9, 0, 0]]), (2, 2)), graph)
    assert method.mask((2, 2)).int().tolist() == [[[0, 1], [1, 1]], [[0, 1], [0, 0]]]
    assert method.mask((4, 4), 0.99)[0].int().tolist() == [[0, 0, 1, 1]] * 2 + [[1, 1, 1, 1]] * 2
    coarse = locatedit(words=[[1], [2]], strength=0.0)
    wide = torch.eye(16).expand(2, -1, -1), (4, 4)
    found = coarse.add((torch.tensor([[0.0, 1, 2, 3]] * 2), (2, 2)), wide)
    assert found[0].tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2


@torch.no_grad()
def paint(model, pipeline, texts, method=None, **options):
    noise = [torch.Generator().manual_seed(3) for _ in texts]
    options = {"output_type": "pt", "generator": noise, "num_inference_steps": 3, **options}
    if method is None:
        return pipeline(texts, **options).images
    with regard.intervene(model, method):
        return pipeline(texts, callback_on_step_end=method.on_step_end, **options).images


@pytest.fixture(scope="module")
def painter():
    model, pipeline = regard.load("painter")
    pipeline.set_progress_bar_config(disable=True)
    return model, pipeline


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_picture_is_the_firsts_but_where_the_words_are(painter, guidance):
    model, pipeline = painter
    plain = paint(model, pipeline, TEXTS, guidance_scale=guidance)
    method = locatedit.fit(model, {"prompt": TEXTS}, pipeline, start=0.0)
    kept, edited = paint(model, pipeline, TEXTS, method, guidance_scale=guidance)
    assert torch.equal(kept, plain[0])
    masks = method.mask((32, 32))
    outside = ~(masks[0] | masks[1])
    assert outside.any()
    assert torch.equal(edited[:, outside], kept[:, outside])
    assert not torch.equal(edited, kept)
    again = paint(model, pipeline, TEXTS, method, guidance_scale=guidance)  # nothing is left of the first time
    assert torch.equal(again[1], edited)
    assert torch.equal(paint(model, pipeline, TEXTS, guidance_scale=guidance), plain)
    off = locatedit.fit(model, {"prompt": TEXTS}, pipeline, **locatedit.off)
    assert torch.equal(paint(model, pipeline, TEXTS, off, guidance_scale=guidance), plain)


def test_each_text_is_edited_as_if_it_were_alone(painter):
    model, pipeline = painter
    three = [*TEXTS, "a red circle and a green star"]
    two, more = (locatedit(words=[[6]] * len(texts)) for texts in (TEXTS, three))
    edited = paint(model, pipeline, TEXTS, two)
    both = paint(model, pipeline, three, more)
    assert torch.allclose(both[1], edited[1], atol=1e-3)
    assert torch.allclose(both[2], edited[1], atol=1e-3)


@torch.no_grad()
def test_it_reads_the_largest_maps_of_a_u_net():
    torch.manual_seed(0)
    model = families.unet(True, True, sample_size=16)
    seen = []

    class See:
        def output(self, call, output):
            if call.query.shape[2] == 256:
                weights = call.weights.dense()
                seen.append((call.site.cross, weights[..., 1] if call.site.cross else weights))
            return output

    class Pipeline:
        scheduler = diffusers.DDIMScheduler()

    Pipeline.scheduler.set_timesteps(4)
    method = locatedit(words=[[1], [1]], start=0.0)
    latents = torch.randn(2, 4, 16, 16)
    with regard.intervene(model, method, See()):
        model(latents, 3, encoder_hidden_states=torch.randn(2, 5, 16))
    method.on_step_end(Pipeline, 0, 3, {"latents": latents})
    cross, graph = (torch.stack([w.mean(1) for of, w in seen if of == kind]).mean(0) for kind in (True, False))
    assert torch.allclose(method.sum.flatten(1), smoothed(cross, graph), atol=1e-5)
    with pytest.raises(ValueError, match="no attention was seen in this step"):
        method.on_step_end(Pipeline, 1, 2, {"latents": latents})


def test_what_does_not_fit_is_refused(painter):
    model, pipeline = painter
    with pytest.raises(ValueError, match="positions in two texts or more"):
        locatedit(words=[[1]])
    with pytest.raises(ValueError, match="nothing has been painted yet"):
        locatedit(words=[[1], [2]]).mask((2, 2))
    with pytest.raises(ValueError, match="words are of 2 texts"):
        paint(model, pipeline, [*TEXTS, "a ring"], locatedit(words=[[1], [2]]))
    with pytest.raises(ValueError, match="BertForMaskedLM has no attention of theirs"):
        locatedit(words=[[1], [2]]).begin(families.build("bert")[0])
    joint = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
    )
    with pytest.raises(ValueError, match="SD3Transformer2DModel has no cross attention to words"):
        locatedit(words=[[1], [2]]).begin(joint)
