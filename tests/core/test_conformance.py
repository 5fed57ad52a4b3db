"""A part of the conformance run: one architecture of each kind. The whole is `make conformance`."""

from __future__ import annotations

import pytest
import torch
from conformance import judge as judging
from conformance.build import architectures, build
from conformance.judge import Wrong, judge
from conformance.places import FOLLOWED, SQUARE, places
from conformance.workers import each

EXACT = {
    "interface": ("albert", "bart", "bert", "gemma3_text", "gpt_oss", "llama", "qwen3_moe", "t5", "whisper"),
    "latent keys, layers of several kinds": ("deepseek_v3", "jamba", "qwen3_next"),
    "several towers": ("clip", "idefics3", "llava", "qwen2_vl"),
    "own softmax": ("bloom", "convbert", "deberta", "deberta-v2", "gptj", "mpt", "xlnet", "funnel", "fsmt"),
    "fused call": ("falcon", "sam_vision_model", "data2vec-vision"),
    "windows of a picture": ("swin", "swinv2", "sam2_vision_model", "hiera"),
    "torch's MultiheadAttention": ("siglip",),
    "detection": ("detr", "rt_detr"),
    "sound": ("wav2vec2",),
    "pieces": ("longformer", "led", "longt5", "pegasus_x"),
    "several maps": ("diffllama", "lilt", "prophetnet"),
    "one row of queries for all rows of keys": ("granite_speech",),
    "cycles over one text": ("hrm_text",),
    "values first": ("janus_vqgan",),
    "as a part of a whole": ("sam_mask_decoder", "blip_2_qformer"),
}
OTHERS = {
    "mobilevitv2": ("refused", "MobileViTV2LinearSelfAttention"),
    "mra": ("refused", "MraSelfAttention"),
    "mamba": ("no attention", "MambaMixer"),
    "resnet": ("no attention", "that Regard knows"),
    "layoutlmv2": ("not constructible", "detectron2"),
}


@pytest.mark.filterwarnings("ignore")  # transformers' own, of configurations made from nothing
@pytest.mark.parametrize("name", [name for names in EXACT.values() for name in names])
def test_exact(name):
    verdict = judge(name)
    assert (verdict.state, verdict.detail) == ("exact", "")
    assert verdict.calls > 0
    assert verdict.compared >= verdict.calls
    assert not verdict.unverified


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "whisper", "qwen2_vl"])
def test_exact_with_fused_attention_too(name):
    verdict = judge(name)
    assert verdict.fused == verdict.calls > 0
    assert not verdict.inconsistent


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_not_exact_but_said_so(name):
    state, why = OTHERS[name]
    verdict = judge(name)
    assert verdict.state == state
    assert why in verdict.detail


@pytest.mark.filterwarnings("ignore")
def test_shrunk_models_keep_their_kind():
    model, inputs = build("qwen3_next")
    assert model.config.layer_types == ["linear_attention", "full_attention"]
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (16, 2)
    assert sum(p.numel() for p in model.parameters()) < 20e6
    with torch.no_grad():
        assert model(**inputs).last_hidden_state.shape[:2] == (2, 12)


@pytest.mark.filterwarnings("ignore")
def test_a_part_is_given_what_its_whole_gives_it():
    """It has no way to be run by itself that its name would tell: it is no model, and takes embeddings."""
    part, inputs = build("sam_mask_decoder")
    assert type(part).__name__ == "SamMaskDecoder"
    assert {"image_embeddings", "sparse_prompt_embeddings"} <= set(inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["hiera", "levit", "pvt_v2", "swin", "vit"])
def test_patches_are_where_they_are_said_to_be(name):
    model, inputs = build(name)
    square = name == "levit"  # of its own size only
    assert places(model, inputs) == (SQUARE if square else FOLLOWED)


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_place_is_found(monkeypatch):
    model, inputs = build("vit")
    at = judging.regard.Tokens.at

    def turned(self, places, grids, after=0):
        return at(self, places[..., [0, 2, 1, 3]], [grid[::-1] for grid in grids], after)

    monkeypatch.setattr(judging.regard.Tokens, "at", turned)
    assert places(model, inputs) not in (FOLLOWED, SQUARE)


def test_the_registry_is_walked():
    assert len(architectures()) > 700
    assert len(set(architectures())) == len(architectures())


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_map_is_found(monkeypatch):
    """The judge itself can fail: half of the mass on the wrong keys is not exact."""
    dense = judging.regard.Weights.dense
    monkeypatch.setattr(judging.regard.Weights, "dense", lambda self, **options: dense(self, **options).flip(-1))
    verdict = judge("bert")
    assert verdict.state == "wrong"
    assert "rows is off by" in verdict.detail


def test_what_is_not_the_models_output_is_wrong():
    with pytest.raises(Wrong, match="not the model's own"):
        judging._check_output(torch.nn.Identity(), {"input": torch.ones(2)}, torch.ones(2), torch.zeros(2))


def test_a_dead_worker_costs_one_architecture(monkeypatch):
    names = ["no such architecture", "gpt2"]
    first, second = each(names, limit=60.0)
    assert (first.state, second.state) == ("not constructible", "exact")
