import json
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch
from PIL import Image

import regard
from regard.attribution.stable_semantics import _enlarged, harvest, noun_chunks, painted, stable_semantics

CAPTIONS = ["a red circle and a blue star", "an orange fork"]


@pytest.fixture(scope="module")
def pipeline():
    found = regard.load("painter").processor
    found.set_progress_bar_config(disable=True)
    return found


def maps(pipeline, captions=CAPTIONS, **knobs):
    return stable_semantics(pipeline, {"text": captions}, **{"num_inference_steps": 2, "seed": 3, **knobs})


def weights(pipeline, captions, **options):
    """Of the cross attention, dense: [step, layer, batch, head, query, key]."""
    seen = []

    @regard.statistic("batch head query key", title="Weights")
    def keep(call):
        if call.site.cross:
            seen.append(call.weights.dense())

    generators = [torch.Generator().manual_seed(3) for _ in captions]
    with torch.no_grad(), regard.record(pipeline.transformer, keep):
        pipeline(captions, generator=generators, **{"num_inference_steps": 2, **options})
    return torch.stack(seen).unflatten(0, (-1, 5))


@pytest.mark.parametrize(
    ("caption", "chunks"),
    [
        ("a red circle and a blue star", ["red circle", "blue star"]),
        ("Two women in the old town, near her house.", ["Two women", "old town", "house"]),
        ("an orange fork on stripes", ["orange fork", "stripes"]),
        ("nothing", []),
        ("the", []),
        ("a dog's well-worn bone", ["dog's well-worn bone"]),
    ],
)
def test_noun_chunks(caption, chunks):
    found = noun_chunks(caption)
    assert [chunk.text for chunk in found] == chunks
    assert all(caption[chunk.start : chunk.end] == chunk.text for chunk in found)


def test_noun_chunks_of_a_parser():
    text = "The dog runs home"
    tokens = [SimpleNamespace(text=word, idx=text.index(word)) for word in text.split()]
    parsed = SimpleNamespace(noun_chunks=[tokens[:2], tokens[3:]])
    assert noun_chunks(text, lambda given: parsed) == [("dog", 4, 7), ("home", 13, 17)]


def test_a_map_is_the_mean_over_steps_layers_heads_and_tokens_of_the_half_with_words(pipeline):
    found = maps(pipeline)
    dense = weights(pipeline, CAPTIONS)
    assert dense.shape[:3] == (2, 5, 4)  # guided: two without words, two with them
    both = dense[:, :, 2:].mean((0, 1, 3)).double()  # [batch, query, key]
    # <|bos|> a red circle and a blue star; <|bos|> an orange fork
    assert np.allclose(found.values[0, 0].ravel(), both[0, :, [2, 3]].mean(-1), atol=1e-6)
    assert np.allclose(found.values[0, 1].ravel(), both[0, :, [6, 7]].mean(-1), atol=1e-6)
    assert np.allclose(found.values[1, 0].ravel(), both[1, :, [2, 3]].mean(-1), atol=1e-6)
    assert (found.values[1, 1] == 0).all()
    assert found.text.values.tolist() == [["red circle", "blue star"], ["orange fork", ""]]
    assert not np.allclose(found.values[0, 0].ravel(), dense[:, :, 0].mean((0, 1, 2))[:, [2, 3]].mean(-1), atol=1e-3)


def test_without_guidance_there_is_one_half(pipeline):
    found = maps(pipeline, guidance_scale=1.0)
    dense = weights(pipeline, CAPTIONS, guidance_scale=1.0)
    assert dense.shape[2] == 2
    assert np.allclose(found.values[1, 0].ravel(), dense[:, :, 1].mean((0, 1, 2))[:, [2, 3]].mean(-1), atol=1e-6)


def test_layers_steps_and_size(pipeline):
    whole = maps(pipeline).values
    parts = [maps(pipeline, layers=layers, steps=[step]).values for layers in ([0], [1, 2, 3, 4]) for step in (0, 1)]
    assert np.allclose(np.average(parts, 0, [1, 1, 4, 4]), whole, atol=1e-6)
    assert not np.allclose(parts[0], parts[1])
    larger = maps(pipeline, size=(16, 24)).values
    assert larger.shape == (2, 2, 16, 24)
    spike = torch.zeros(1, 1, 4, 4)
    spike[..., 1, 1] = 1
    assert float(_enlarged(spike, (8, 8)).min()) == 0  # bicubic goes below, and is cut
    assert larger[0].mean() == pytest.approx(whole[0].mean(), rel=0.1)
    with pytest.raises(ValueError, match=r"layers \[9\].*there are 2 steps"):
        maps(pipeline, layers=[9])


def test_samples_are_alone_and_the_pipeline_is_left_as_it_was(pipeline):
    whole = maps(pipeline)
    alone = maps(pipeline, CAPTIONS[1:])
    assert np.allclose(whole.values[1, :1], alone.values[0], atol=1e-5)
    again = regard.attribute(pipeline, {"text": CAPTIONS}, method="stable_semantics", num_inference_steps=2, seed=3)
    assert np.array_equal(again.values, whole.values)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipeline.transformer.modules())


def test_layers_of_several_sizes_count_alike(pipeline):
    """A U-Net, whose layers look from 8 x 8 and from 4 x 4 places; guided, without words first."""
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    sizes = {"in_channels": 2, "out_channels": 2, "block_out_channels": (8, 16), "cross_attention_dim": 128}
    unet = families.unet(True, True, **sizes, norm_num_groups=4, attention_head_dim=4)

    class Small(SimpleNamespace):
        def __call__(self, prompts, generator):
            states, _ = pipeline.encode_prompt([""] * len(prompts) + prompts)
            noise = torch.stack([torch.randn(2, 8, 8, generator=one) for one in generator])
            self.unet(torch.cat([noise, noise]), torch.tensor(7), encoder_hidden_states=states)
            return SimpleNamespace(images=[])

    small = Small(unet=unet, tokenizer=pipeline.tokenizer, scheduler=DDIMScheduler())
    seen = []

    @regard.statistic("batch head query key", title="Weights")
    def keep(call):
        if call.site.cross:
            seen.append(call.weights.dense()[1, :, :, 2:4].mean((0, 2)))

    generators = [torch.Generator().manual_seed(0)]
    with torch.no_grad(), regard.record(unet, keep):
        small(CAPTIONS[1:], generators)
    assert {len(one) for one in seen} == {64, 16}
    fine = [one.view(8, 8) for one in seen if len(one) == 64]
    coarse = [one.view(1, 1, 4, 4) for one in seen if len(one) == 16]
    grown = [torch.nn.functional.interpolate(one, (8, 8), mode="bicubic")[0, 0] for one in coarse]
    found = stable_semantics(small, {"text": CAPTIONS[1:]}, seed=0)
    assert np.allclose(found.values[0, 0], torch.stack([*fine, *grown]).mean(0), atol=1e-5)


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        (["nothing"], "no noun chunk"),
        ([" "], "not empty"),
        ([], "not empty"),
        (["a red circle and " * 10 + "a blue star"], "behind the"),
    ],
)
def test_texts_are_refused(pipeline, captions, words):
    with pytest.raises(ValueError, match=words):
        maps(pipeline, captions)


def test_other_models_are_refused():
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    with pytest.raises(ValueError, match="ViTForImageClassification is none"):
        maps(regard.load("viewer").model)
    sizes = {"sample_size": 4, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "in_channels": 2}
    joint = SD3Transformer2DModel(
        **sizes, joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=2
    )
    other = SimpleNamespace(transformer=joint, scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="SD3Transformer2DModel has no cross attention"):
        maps(other)


def written(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def test_a_data_set_that_datasets_opens(pipeline, tmp_path):
    datasets = pytest.importorskip("datasets")
    options = {"per_caption": 2, "num_inference_steps": 2, "seed": 1}
    out = harvest(pipeline, CAPTIONS, tmp_path / "set", **options)
    rows = datasets.load_dataset("imagefolder", data_dir=str(out), cache_dir=str(tmp_path / "cache"))["train"]
    assert rows["caption"] == [CAPTIONS[0]] * 2 + [CAPTIONS[1]] * 2
    row = rows[1]
    assert row["chunks"] == ["red circle", "blue star"]
    assert [CAPTIONS[0][a:b] for a, b in zip(row["starts"], row["ends"])] == row["chunks"]
    pictures, found = painted(
        pipeline, [CAPTIONS[0]] * 2, [torch.Generator().manual_seed(s) for s in rows["seed"][:2]], num_inference_steps=2
    )
    assert np.array_equal(np.array(row["image"]), np.array(pictures[1]))
    assert not np.array_equal(np.array(rows[0]["image"]), np.array(row["image"]))
    for one, low, high, expected in zip(row["maps"], row["lows"], row["highs"], found.values[1]):
        levels = np.array(one)
        assert (levels.min(), levels.max()) == (0, 255)
        assert np.allclose(low + (high - low) * levels / 255, expected, atol=(high - low) / 500)


def test_a_harvest_goes_on_where_it_stopped(pipeline, tmp_path):
    options = {"per_caption": 2, "num_inference_steps": 2}
    whole = written(harvest(pipeline, CAPTIONS, tmp_path / "whole", **options))
    part = harvest(pipeline, CAPTIONS[:1], tmp_path / "part", **options)
    with (part / "metadata.jsonl").open("a") as file:  # stopped within the second caption
        file.write(json.dumps({"caption": CAPTIONS[1], "caption_index": 1}) + '\n{"caption": "an or')
    ran = []
    before = type(pipeline).__call__
    pipeline_of = SimpleNamespace(**{k: getattr(pipeline, k) for k in ("transformer", "tokenizer", "scheduler")})

    class Counting(SimpleNamespace):
        def __call__(self, texts, **given):
            ran.append(texts)
            return before(pipeline, texts, **given)

    harvest(Counting(**vars(pipeline_of)), CAPTIONS, part, **options)
    assert ran == [[CAPTIONS[1]] * 2]
    assert written(part) == whole


def test_even_weights_make_a_map_of_zeros(pipeline, tmp_path):
    class Even:
        def inputs(self, call):
            return call.but(query=torch.zeros_like(call.query))

    with regard.intervene(pipeline.transformer, Even()):
        out = harvest(pipeline, CAPTIONS[1:], tmp_path / "even", per_caption=1, num_inference_steps=1)
    assert (np.array(Image.open(out / "maps" / "000000-00-00.png")) == 0).all()
    row = json.loads((out / "metadata.jsonl").read_text())
    assert row["lows"][0] == pytest.approx(1 / 4)  # of four tokens


def test_other_folders_are_left_alone(pipeline, tmp_path):
    options = {"per_caption": 1, "num_inference_steps": 1}
    out = harvest(pipeline, CAPTIONS[1:], tmp_path / "set", **options)
    before = written(out)
    for captions, knobs, words in (
        (CAPTIONS[1:], {"seed": 5}, "seed=0"),
        (CAPTIONS[1:], {"num_inference_steps": 2}, "options="),
        (CAPTIONS, {}, "an orange fork"),
    ):
        with pytest.raises(FileExistsError, match=words):
            harvest(pipeline, captions, out, **{**options, **knobs})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no data set"):
        harvest(pipeline, CAPTIONS, tmp_path / "other", **options)
    assert written(out) == before
