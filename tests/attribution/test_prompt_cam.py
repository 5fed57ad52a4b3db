import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from torch.nn import functional as F

import regard
from regard.attribution.prompt_cam import Blur, PromptCAM, head_maps, prompt_cam, rank_heads

LABELS = ["wren", "robin", "finch"]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
}
PLAIN = {
    "vit": lambda: t.ViTModel(t.ViTConfig(**SIZES)),
    "deit": lambda: t.DeiTModel(t.DeiTConfig(**SIZES)),
    "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**{**SIZES, "mlp_ratio": 2})),
    "registers": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)),
    "dinov3": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**SIZES, num_register_tokens=2)),
}
PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
INPUTS = {"pixel_values": PIXELS}


def made(kind="vit", **knobs):
    torch.manual_seed(0)
    model = PromptCAM(PLAIN[kind](), LABELS, **knobs).eval()
    with torch.no_grad():
        model.prompts.mul_(3)  # far from each other
    return model


@pytest.mark.parametrize("kind", PLAIN)
def test_the_prompts_stand_before_every_token_of_every_layer(kind):
    """As a loop over the layers does it, written out."""
    model = made(kind)
    found = model(PIXELS).logits
    seen = []
    hook = model.backbone.get_submodule(model.layers[0]).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    model.backbone(PIXELS)
    hook.remove()
    ((states, *args), kwargs) = seen[0]
    for i, name in enumerate(model.layers):
        given = torch.cat([model.prompts[i].expand(2, -1, -1), states], 1)
        output = model.backbone.get_submodule(name)(given, *args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        states = output[:, 3:]
    norm = next(m for n, m in model.backbone.named_children() if "norm" in n)
    expected = norm(output[:, :3]) @ model.head.weight[0] + model.head.bias
    assert torch.allclose(found, expected, atol=1e-5)
    assert float(found.detach().std()) > 1e-3
    grid = head_maps(model, INPUTS, 1)
    assert grid.shape == (2, 2, 4, 4)
    assert (grid.sum(("row", "column")) < 1).all()  # what the class token and the other prompts get is not theirs


def test_a_head_of_zeros_gives_the_offset_and_one_class_one_logit():
    model = made()
    torch.nn.init.zeros_(model.head.weight)
    assert torch.equal(model(PIXELS).logits, model.head.bias.expand(2, 3))
    assert PromptCAM(PLAIN["vit"](), ["one"])(PIXELS).logits.shape == (2, 1)


def test_the_last_prompts_are_of_the_classes_and_earlier_ones_of_all():
    model = made()
    before, turned = model(PIXELS).logits, [2, 0, 1]
    with torch.no_grad():
        model.prompts[:2] = model.prompts[:2, turned]
        assert torch.allclose(model(PIXELS).logits, before, atol=1e-5)
        model.prompts[2] = model.prompts[2, turned]
        assert torch.allclose(model(PIXELS).logits, before[:, turned], atol=1e-5)


def test_shallow_prompts_are_carried_through():
    model = made(deep=False)
    assert model.prompts.shape == (1, 3, 16)
    before = model(PIXELS).logits
    with torch.no_grad():
        model.prompts[0] = model.prompts[0, [2, 0, 1]]
    assert torch.allclose(model(PIXELS).logits, before[:, [2, 0, 1]], atol=1e-5)
    states = model.backbone.embeddings(PIXELS)
    states = torch.cat([model.prompts[0].expand(2, -1, -1), states], 1)
    for layer in model.backbone.layers:
        states = layer(states)
    assert torch.allclose(model(PIXELS).logits, model.read(model.backbone.layernorm(states)), atol=1e-5)


def test_only_prompts_and_head_are_trained_and_the_backbone_is_the_same_alone():
    model = made(dropout=0.5)
    alone = copy.deepcopy(model.backbone)
    model.train()
    assert not any(m.training for m in model.backbone.modules())
    F.cross_entropy(model(PIXELS).logits, torch.tensor([0, 1])).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"prompts", "head.weight", "head.bias"}
    assert all(bool(p.abs().sum() > 0) for p in model.prompts.grad.flatten(0, 1))
    assert not torch.equal(model(PIXELS).logits, model(PIXELS).logits)  # dropout of prompts
    assert torch.equal(model.backbone(PIXELS).last_hidden_state, alone(PIXELS).last_hidden_state)
    assert all("forward" not in vars(m) for m in model.modules())
    with pytest.raises(ValueError, match="channel"):
        model(PIXELS[:, :2])
    assert all("forward" not in vars(m) for m in model.modules())  # also after an error


def test_maps_are_the_row_of_the_target_and_samples_are_alone():
    model = made()
    with regard.record(model, "rows") as recording:
        model(PIXELS)
    (stack,) = recording.tree.children.values()
    rows = stack["rows"].values[:, -1]  # [batch, head, query, key], of the last layer
    assert np.allclose(head_maps(model, INPUTS, [2, 0]).values[0], rows[0, :, 2, 4:].reshape(2, 4, 4), atol=1e-6)
    assert np.allclose(head_maps(model, INPUTS, [2, 0]).values[1], rows[1, :, 0, 4:].reshape(2, 4, 4), atol=1e-6)
    both = regard.attribute(model, INPUTS, "finch", method="prompt_cam")
    alone = regard.attribute(model, {"pixel_values": PIXELS[1:]}, "finch", method="prompt_cam")
    assert both.shape == (2, 16, 16)
    assert np.allclose(both.values[1], alone.values[0], atol=1e-6)
    assert float(both.score[1]) == pytest.approx(model(PIXELS).logits[1, 2].item(), abs=1e-5)
    each = [prompt_cam(model, INPUTS, 1, head=head).values for head in (0, 1)]
    assert np.allclose(np.mean(each, 0), prompt_cam(model, INPUTS, 1).values, atol=1e-6)
    assert not np.allclose(*each)
    with pytest.raises(ValueError, match=r"head=2.*heads 0 to 1"):
        prompt_cam(model, INPUTS, 1, head=2)


def test_a_blurred_head_looks_evenly_in_the_row_of_the_class_alone():
    model, target = made(), torch.tensor([1, 0])
    heads = torch.tensor([[True, False], [False, True]])
    with regard.record(model, "rows") as plain:
        model(PIXELS)
    with regard.intervene(model, Blur(target, heads)), regard.record(model, "rows") as blurred:
        logits = model(PIXELS).logits
    before, after = (next(iter(r.tree.children.values()))["rows"].values for r in (plain, blurred))
    assert np.allclose(before[:, :-1], after[:, :-1])  # earlier layers
    for sample, (row, head) in enumerate([(1, 0), (0, 1)]):
        assert np.allclose(after[sample, -1, head, row], 1 / 20)  # 3 prompts, a class token, 16 patches
        changed = ~np.isclose(before[sample, -1], after[sample, -1], atol=1e-6).all(-1)
        assert changed.tolist() == [[h == head and r == row for r in range(20)] for h in range(2)]
    others = torch.ones(2, 3, dtype=torch.bool).scatter(1, target[:, None], False)
    own = model(PIXELS).logits
    assert torch.allclose(logits[others], own[others], atol=1e-6)
    assert not torch.allclose(logits[~others], own[~others])
    with pytest.raises(ValueError, match="heads"), regard.intervene(model, Blur(target, heads[:1])):
        model(PIXELS)


def test_heads_are_ranked_by_what_is_left_without_them():
    model = made()
    found = rank_heads(model, INPUTS, [1, 0])
    for sample, target in enumerate((1, 0)):
        left = []
        for heads in ([True, False], [False, True], [True, True]):
            with regard.intervene(model, Blur(torch.tensor([target] * 2), torch.tensor([heads] * 2))):
                left.append(model(PIXELS).logits.softmax(-1)[sample, target].item())
        last = int(np.argmax(left[:2]))  # blurred first: it is needed least
        assert found.values[sample].tolist() == [1 - last, last]
        assert found.probability.values[sample] == pytest.approx([left[2], left[last]], abs=1e-6)


def test_what_was_learned_is_saved_without_the_backbone(tmp_path):
    model = made(deep=False, dropout=0.1)
    model.save(tmp_path / "birds.safetensors")
    again = PromptCAM.load(tmp_path / "birds.safetensors", copy.deepcopy(model.backbone))
    assert torch.equal(again(PIXELS).logits, model(PIXELS).logits)
    assert (again.config.label2id, again.deep, again.dropout.p) == ({"wren": 0, "robin": 1, "finch": 2}, False, 0.1)
    assert (tmp_path / "birds.safetensors").stat().st_size < 2000
    wider = t.ViTModel(t.ViTConfig(**{**SIZES, "hidden_size": 32}))
    with pytest.raises(ValueError, match="does not fit ViTModel"):
        PromptCAM.load(tmp_path / "birds.safetensors", wider)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"prompts": torch.zeros(1, 3, 16)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no prompts"):
        PromptCAM.load(tmp_path / "other.safetensors", PLAIN["vit"]())


WINDOWED = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
PYTORCH = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        (
            lambda: t.SwinModel(
                t.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
            ),
            "one sequence of tokens",
        ),
        (lambda: t.BeitModel(t.BeitConfig(**SIZES, use_relative_position_bias=True)), "relative to its own tokens"),
        (lambda: t.ResNetModel(t.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])), "no stack of layers"),
        (lambda: t.ViTForImageClassification(t.ViTConfig(**SIZES)), "give the base_model"),
        (
            lambda: torch.nn.TransformerEncoder(PYTORCH, 2),
            "hidden_size",
        ),
    ],
)
def test_other_backbones_are_refused(backbone, words):
    with pytest.raises(ValueError, match=words):
        PromptCAM(backbone(), LABELS)(PIXELS)


def test_other_models_and_labels_are_refused():
    with pytest.raises(ValueError, match="ViTForImageClassification has none"):
        regard.attribute(t.ViTForImageClassification(t.ViTConfig(**SIZES)), INPUTS, method="prompt_cam")
    for labels in ([], "wren", ["wren", "wren"]):
        with pytest.raises(ValueError, match="each once"):
            PromptCAM(PLAIN["vit"](), labels)


def test_prompts_before_a_pretrained_model():
    """DINOv2, of which a picture may be smaller than those it was trained on."""
    root = Path(os.environ.get("REGARD_MODELS") or "/nowhere") / "dinov2-small"
    pictures = Path(os.environ.get("REGARD_DATA") or "/nowhere") / "pictures"
    if not root.is_dir() or not pictures.is_dir():
        pytest.skip("REGARD_MODELS or REGARD_DATA is not set")
    from PIL import Image

    backbone, processor = regard.load(root)
    pixels = processor(Image.open(pictures / "cat.jpg"), return_tensors="pt")["pixel_values"][..., 84:140, 84:140]
    model = PromptCAM(backbone, LABELS).eval()
    found = head_maps(model, {"pixel_values": pixels}, 0)
    assert found.shape == (1, 6, 4, 4)
    assert (found > 0).all()
    assert (found.sum(("row", "column")) < 1).all()
    assert regard.attribute(model, {"pixel_values": pixels}, 0, method="prompt_cam").shape == (1, 56, 56)
