"""Every attribution: shapes, the same twice, alone as in a batch, complete where it says so, the model as it was."""

from __future__ import annotations

import copy
import doctest
import importlib
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as t
from families import build
from torch import nn

import regard
from regard import catalog
from regard.attribution import salient_relevance
from regard.attribution._maps import Map, maps
from regard.attribution.normgrad import saliency
from regard.attribution.salient_relevance import PATCH, STEP, context_aware
from regard.data.scenes import Object, Scene, render
from regard.prediction import predict

METHODS = catalog.methods("attribution")
SENTENCES = ["with a heavy heart , the sailor stood .", "the baker sang , feeling merry ."]
SCENES = [
    Scene((Object("star", "red", "large", 0.3, 0.5), Object("fork", "blue", "large", 0.7, 0.5))),
    Scene((Object("plate", "green", "large", 0.5, 0.4),)),
]


def resnet():
    torch.manual_seed(0)
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    model = t.ResNetForImageClassification(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.bias.normal_(0, 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def models():
    """name -> (model, inputs of batch 2, and of the second sample alone)"""
    found = {}
    for name in ("namer", "reader"):
        model, tokenizer = regard.load(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        both, one = (tokenizer(s, return_tensors="pt", padding=True) for s in (SENTENCES, SENTENCES[1:]))
        found[name] = model, dict(both), dict(one)
    pixels = 2 * render(SCENES, 64).tensor() - 1
    for name, model in (("viewer", regard.load("viewer").model), ("resnet", resnet())):
        found[name] = model, {"pixel_values": pixels}, {"pixel_values": pixels[1:]}
    return found


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize(("method", "name"), list(product(METHODS, ("namer", "reader", "viewer", "resnet"))))
def test_contract(models, method, name):
    model, both, one = models[name]
    model = copy.deepcopy(model)
    kind = type(model).__name__
    model.train()
    next(model.children()).eval()
    list(model.parameters())[1].requires_grad_(False)
    before = {
        "training": [m.training for m in model.modules()],
        "gradients": [p.requires_grad for p in model.parameters()],
        "weights": copy.deepcopy(model.state_dict()),
    }
    knobs = {"integrated_gradients": {"steps": {"viewer": 20}.get(name, 100)}, "salient_relevance": {"longest": 64}}
    knobs["visual_precision_search"] = {"steps": 1}
    knobs = knobs.get(method, {})
    refusal = ""
    try:
        found = regard.attribute(model, both, 1, method=method, **knobs)
    except ValueError as error:
        refusal = str(error)
    finally:
        assert [m.training for m in model.modules()] == before["training"]
        assert [p.requires_grad for p in model.parameters()] == before["gradients"]
        assert all(torch.equal(v, before["weights"][k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert hooks(model) == 0
    if refusal:
        assert kind in refusal
        assert (method, name) not in MUST
        return
    shape = tuple(both["input_ids"].shape) if "input_ids" in both else (2, 64, 64)
    assert found.shape == shape
    assert found.dims == ("batch", "token") if len(shape) == 2 else ("batch", "row", "column")
    assert found.name == found.attrs["long_name"] == method
    assert np.isfinite(found.values).all()
    assert found.values[0].std() > 0
    assert list(found.target.values) == [1, 1]
    with torch.inference_mode():
        again = regard.attribute(model, both, [1, 1], method=method, **knobs)
        alone = regard.attribute(model, one, 1, method=method, **knobs)
        model.eval()
        logits = model(**one).logits
    assert np.array_equal(found.values, again.values)
    real = both["attention_mask"][1].bool().numpy() if "attention_mask" in both else np.full((64, 64), True)
    scale = abs(found.values[1]).max()
    assert np.allclose(found.values[1][real], alone.values[0].ravel(), atol=2e-4 * scale + 1e-12, rtol=1e-3)
    assert (found.values[1][~real] == 0).all()
    score = logits[0, 1] if logits.ndim == 2 else logits[0, -1, 1]
    assert float(alone.score[0]) == pytest.approx(float(score), abs=1e-4)
    assert float(found.score[1]) == pytest.approx(float(score), abs=1e-3)
    if "total" in found.coords:  # it says that it is complete
        assert np.allclose(found.sum(found.dims[1:]), found.total, atol=0.05 * abs(found.total).max() + 1e-3)


MUST = {
    *product(
        ("gradient_x_input", "integrated_gradients", "grad_cam", "normgrad", "meta_saliency"), ("namer", "viewer")
    ),
    *product(("rollout", "attention_x_gradient"), ("namer", "reader", "viewer")),
    *product(("grad_cam", "guided_grad_cam", "layerwise_relevance", "salient_relevance"), ("resnet",)),
}


@pytest.mark.parametrize("name", ["", *(f".{m}" for m in METHODS)])
def test_examples_in_docstrings(name):
    failed, _ = doctest.testmod(importlib.import_module(f"regard.attribution{name}"))
    assert not failed


# Values by hand


class Toy(nn.Module):
    """One pixel channel, copied and turned round; ReLU; the mean of each; two classes."""

    config = SimpleNamespace(problem_type=None)

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(1, 2, 1, bias=False), nn.ReLU()
        self.out = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -1.0])[:, None, None, None])
            self.out.weight.copy_(torch.tensor([[2.0, 5.0], [-1.0, 1.0]]))

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.out(self.act(self.conv(pixel_values)).mean((2, 3))))


PIXELS = {"pixel_values": torch.tensor([[[[1.0, 2.0], [3.0, -4.0]]]])}


def values(method, target=0, **knobs):
    return regard.attribute(Toy(), PIXELS, target, method=method).values[0]


def test_a_small_network_by_hand():
    # score of class 0: (2 * (1 + 2 + 3) + 5 * 4) / 4 = 8
    found = regard.attribute(Toy(), PIXELS, method="gradient_x_input")
    assert found.target.values == [0]
    assert found.score.values == [8]
    assert np.allclose(found.values[0], [[0.5, 1.0], [1.5, 5.0]])
    assert np.allclose(values("integrated_gradients", steps=4), [[0.5, 1.0], [1.5, 5.0]], atol=1e-6)
    assert np.allclose(values("grad_cam"), [[0.5, 1.0], [1.5, 5.0]])  # slopes 1/2 and 5/4, activations x and -x
    assert np.allclose(values("grad_cam", 1), [[0, 0], [0, 1.0]])  # slopes -1/4 and 1/4: below 0 is cut
    norm = (0.5**2 + 1.25**2) ** 0.5
    assert np.allclose(values("normgrad"), norm * np.array([[1, 2], [3, 4]]))
    assert np.allclose(values("layerwise_relevance"), [[0.5, 1.0], [1.5, 5.0]])
    # class 1 has a positive weight from the second mean only, so its whole score (-1/2) goes to the pixel below 0
    assert np.allclose(values("layerwise_relevance", 1), [[0, 0], [0, -0.5]], atol=1e-6)


def test_relevance_is_conserved_without_offsets():
    model = resnet()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.zero_()
                module.bias.zero_()
        model.classifier[1].bias.zero_()
    inputs = {"pixel_values": 2 * render(SCENES, 64).tensor() - 1}
    for target in (0, 3):
        found = regard.attribute(model, inputs, target, method="layerwise_relevance")
        assert np.allclose(found.sum(("row", "column")), found.score, rtol=1e-3)


def test_a_sum_of_two_paths_shares_relevance_by_what_each_gave():
    class Sum(Toy):
        def forward(self, pixel_values):
            hidden = self.act(self.conv(pixel_values))
            return SimpleNamespace(logits=self.out((hidden + 3 * hidden).mean((2, 3))))

    found = regard.attribute(Sum(), PIXELS, 0, method="layerwise_relevance")
    assert np.allclose(found.values[0], 4 * np.array([[0.5, 1.0], [1.5, 5.0]]))


def test_grad_cam_is_captums(models):
    from captum.attr import LayerAttribution, LayerGradCam

    model, both, _ = models["resnet"]
    theirs = LayerGradCam(lambda x: model(x).logits, model.resnet.encoder.stages[0]).attribute(
        both["pixel_values"], 2, relu_attributions=True
    )
    theirs = LayerAttribution.interpolate(theirs, (64, 64), "bilinear")
    ours = regard.attribute(model, both, 2, method="grad_cam", layer="resnet.encoder.stages.0")
    assert np.allclose(ours.values, theirs[:, 0].detach().numpy(), atol=1e-6)


def test_the_layer_that_is_taken(models):
    for name, layer, size in (("resnet", "resnet.encoder.stages.1", 8), ("viewer", "vit.layers.4", 8)):
        with predict(*models[name][:2]) as prediction:
            (found,) = maps(prediction)
        assert found.layer == layer
        assert found.values.shape[2:] == (size, size)
    with predict(*models["reader"][:2]) as prediction:
        assert maps(prediction)[0].layer == maps(prediction, [maps(prediction)[0].layer])[0].layer


@pytest.mark.parametrize(
    ("contribution", "aggregation"),
    list(product(("conv1x1", "conv3x3", "scaling", "bias"), ("norm", "filter_norm", "sum", "max"))),
)
def test_the_family_of_normgrad_against_outer_products(contribution, aggregation):
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    expected = torch.zeros(2, 4, 5, dtype=torch.float64)
    for b, i, j in np.ndindex(2, 4, 5):
        around = padded[b, :, i : i + 3, j : j + 3].flatten()
        here, slope = x[b, :, i, j], g[b, :, i, j]
        terms = {"conv1x1": torch.outer(here, slope), "conv3x3": torch.outer(around, slope)}
        term = (terms | {"scaling": here * slope, "bias": slope})[contribution]
        sizes = {"norm": term.norm(), "filter_norm": term.clamp(min=0).norm(), "sum": term.sum(), "max": term.max()}
        expected[b, i, j] = sizes[aggregation]
    assert torch.allclose(saliency(Map("", x, g), contribution, aggregation), expected)


def test_layers_are_joined_by_their_product():
    x = torch.tensor([[[[1.0, 2.0], [4.0, 3.0]]]])
    one, two = (regard.attribute(Toy(), {"pixel_values": x}, 0, method="normgrad", layers=[n]) for n in ("conv", "act"))
    both = regard.attribute(Toy(), {"pixel_values": x}, 0, method="normgrad", layers=["conv", "act"])
    stretched = [(m - m.min()) / (m.max() - m.min()) for m in (one, two)]
    assert np.allclose(both, (stretched[0] * stretched[1]) ** 0.5)


def test_meta_saliency_is_that_of_a_model_after_one_step(models):
    model, _, one = models["resnet"]
    plain = regard.attribute(model, one, 2, method="grad_cam")
    still = regard.attribute(model, one, 2, method="meta_saliency", rate=0.0)
    assert np.allclose(still.values, regard.attribute(model, one, 2, method="normgrad").values)
    stepped = copy.deepcopy(model)
    nn.functional.cross_entropy(stepped(**one).logits, torch.tensor([2])).backward()
    torch.optim.SGD(stepped.parameters(), 0.05).step()
    with predict(model, one, 2) as prediction:
        assert prediction.score().item() == pytest.approx(float(plain.score[0]))
    found = regard.attribute(model, one, 2, method="meta_saliency", of="grad_cam", rate=0.05)
    assert np.allclose(found.values, regard.attribute(stepped, one, 2, method="grad_cam").values, atol=1e-6)
    assert not np.allclose(found.values, plain.values, atol=1e-6)
    assert float(found.score[0]) == pytest.approx(float(plain.score[0]))


def test_attention_x_gradient_against_maps_that_the_model_gives():
    model, inputs = build("bert")
    model = t.BertForSequenceClassification(model.config).eval()
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True)
    slopes = torch.autograd.grad(output.logits[:, 1].sum(), output.attentions)
    whole = torch.eye(12)
    for weights, slope in zip(output.attentions, slopes):
        whole = whole + (weights * slope).clamp(min=0).mean(1) @ whole
    expected = (whole - torch.eye(12))[:, 0]  # the pooler reads the first token
    found = regard.attribute(model, inputs, 1, method="attention_x_gradient")
    assert np.allclose(found.values, expected.detach().numpy(), atol=1e-6)
    model.set_attn_implementation("sdpa")
    assert np.allclose(regard.attribute(model, inputs, 1, method="attention_x_gradient").values, found, atol=1e-6)


def test_rollout_reads_what_the_score_reads(models):
    for name, at in (("namer", 0), ("reader", -1)):
        model, _, one = models[name]
        with torch.no_grad(), regard.record(model, "rows") as recording:
            model(**one)
        (stack,) = recording.tree.children.values()
        rolled = catalog.method("statistics", "rollout")(stack).values[:, -1, at]
        found = regard.attribute(model, one, method="rollout")
        assert np.allclose(found.values, rolled, atol=1e-5)
        assert found.sum() == pytest.approx(1, abs=1e-5)


def test_a_patch_stands_at_each_of_its_pixels(models):
    model, both, _ = models["viewer"]
    found = regard.attribute(model, both, method="rollout").values.reshape(2, 8, 8, 8, 8)
    assert (found == found[:, :, :1, :, :1]).all()


def test_context_aware_saliency_against_a_loop():
    picture = torch.rand(2, 14, 20, generator=torch.Generator().manual_seed(1))
    picture[:, :, 7:] *= 0.1  # so that most of it is no focus
    corners = [(r, c) for r in range(0, 14 - PATCH + 1, STEP) for c in range(0, 20 - PATCH + 1, STEP)]
    # 14 rows leave one scale to compare: at 0.8 there are 11, at 0.5 there are 7
    levels = {1.0: picture}
    for scale in (0.8, 0.5):
        levels[scale] = nn.functional.interpolate(
            picture[None], (round(14 * scale), round(20 * scale)), mode="bilinear", antialias=True
        )[0]

    def patches(scale):
        level = levels[scale]
        rows, columns = level.shape[1:]
        for r in range(0, rows - PATCH + 1, STEP):
            for c in range(0, columns - PATCH + 1, STEP):
                where = np.array([r + PATCH / 2, c + PATCH / 2]) / columns
                yield level[:, r : r + PATCH, c : c + PATCH].numpy(), where

    found = []
    for scale, against in ((1.0, (1.0, 0.5)), (0.8, (0.8,)), (0.5, (0.5,))):
        own = list(patches(scale))
        others = [p for s in against for p in patches(s)]
        unlike = []
        for i, (values, where) in enumerate(own):
            apart = sorted(
                np.sqrt(((values - v) ** 2).mean()) / (1 + 3 * np.hypot(*(where - w)))
                for j, (v, w) in enumerate(others)
                if j != i
            )
            unlike.append(1 - np.exp(-np.mean(apart[:5])))
        rows = (levels[scale].shape[1] - PATCH) // STEP + 1
        level = torch.tensor(unlike).reshape(1, 1, rows, -1)
        found.append(nn.functional.interpolate(level, (14, 20), mode="bilinear")[0, 0].numpy())
    whole = np.mean(found, axis=0)
    whole = whole / whole.max()
    foci = np.argwhere(whole >= 0.8)
    expected = [[whole[r, c] * (1 - np.hypot(*(foci - [r, c]).T).min() / 20) for c in range(20)] for r in range(14)]
    assert len(corners) == 15
    assert 0 < len(foci) < 14 * 20 / 2
    assert np.allclose(context_aware(picture, neighbours=5, longest=20).numpy(), expected, atol=1e-5)


def test_pictures_are_compared_at_one_size(monkeypatch):
    sizes, cut = [], salient_relevance._patches
    monkeypatch.setattr(
        salient_relevance, "_patches", lambda level: (sizes.append(tuple(level.shape[1:])), cut(level))[1]
    )
    assert context_aware(torch.rand(1, 24, 48), longest=96).shape == (24, 48)
    assert sizes[0] == (48, 96)
    assert context_aware(torch.rand(1, 60, 120), longest=96).shape == (60, 120)
    assert sizes.count((48, 96)) == 2
    with pytest.raises(ValueError, match=r"8 x 64 pixels with longest=48 are \[6, 48\], less than a patch of 7"):
        context_aware(torch.rand(1, 8, 64), longest=48)


def test_context_aware_saliency_of_nothing_and_of_a_dot():
    assert (context_aware(torch.full((3, 32, 32), 0.4), longest=64) == 0).all()
    picture = torch.zeros(1, 48, 48)
    picture[:, 30:36, 12:18] = 1
    found = context_aware(picture, longest=48)
    row, column = divmod(int(found.argmax()), 48)
    assert 26 <= row <= 39
    assert 8 <= column <= 21
    assert found[33, 15] > 5 * found[5, 40]


# Inputs and targets


def test_targets_by_name_and_their_errors(models):
    model, both, _ = models["namer"]
    assert list(regard.attribute(model, both, "joy", method="grad_cam").target.values) == [0, 0]
    assert list(regard.attribute(model, both, [3, 0], method="grad_cam").target.values) == [3, 0]
    with pytest.raises(ValueError, match="there are joy, sorrow, calm, anger"):
        regard.attribute(model, both, "envy")
    for target in (4, -1, [0], [0, 1, 2], 0.5, True):
        with pytest.raises(ValueError, match="target"):
            regard.attribute(model, both, target, method="grad_cam")
    reader, tokenizer = regard.load("reader")
    inputs = tokenizer("to be or not to", return_tensors="pt")
    found = regard.attribute(reader, inputs, " be", method="gradient_x_input", processor=tokenizer)
    assert tokenizer.decode(found.target.values) == " be"
    assert [str(x) for x in found.text.values[0][-2:]] == [" not", " to"]
    with pytest.raises(ValueError, match="needs the processor"):
        regard.attribute(reader, inputs, " be")
    with pytest.raises(ValueError, match="tokens"):
        regard.attribute(reader, inputs, "be or not to be", processor=tokenizer)


def test_padding_before_a_text_changes_nothing():
    model, tokenizer = regard.load("reader")
    ids = tokenizer("to be or not", return_tensors="pt")["input_ids"]
    plain = regard.attribute(model, {"input_ids": ids}, method="gradient_x_input")
    mask = torch.tensor([[0] * 3 + [1] * ids.shape[1]])
    left = {"input_ids": nn.functional.pad(ids, (3, 0)), "attention_mask": mask, "position_ids": mask.cumsum(1) - 1}
    left["position_ids"].clamp_(min=0)
    found = regard.attribute(model, left, method="gradient_x_input")
    assert (found.values[0, :3] == 0).all()
    assert np.allclose(found.values[0, 3:], plain.values[0], atol=1e-5)


def test_an_encoder_decoder_is_explained_by_its_source():
    model, inputs = build("t5")
    found = regard.attribute(model, inputs, method="gradient_x_input")
    assert found.shape == inputs["input_ids"].shape
    with pytest.warns(UserWarning, match="off the total"):  # at zero, its norms divide by nothing
        regard.attribute(model, inputs, method="integrated_gradients", steps=20)
    with pytest.raises(ValueError, match="cross attention"):
        regard.attribute(model, inputs, method="rollout")
    with predict(model, inputs) as prediction:
        assert maps(prediction)[0].layer == "encoder.block.1"
        with pytest.raises(ValueError, match="5 positions says nothing of 12 tokens"):
            maps(prediction, ["decoder.block.1"])


def test_what_a_vision_language_model_reads_is_explained_with_its_patches():
    model, inputs = build("llava")
    found = regard.attribute(model, inputs, method="gradient_x_input")
    assert found.dims == ("batch", "token")
    patches = (inputs["input_ids"][0] == 98).numpy()
    assert abs(found.values[0][patches]).min() > 0
    moved = {**inputs, "pixel_values": inputs["pixel_values"] + 0.5}
    assert not np.allclose(regard.attribute(model, moved, method="gradient_x_input").values, found.values)
    assert regard.attribute(model, inputs, method="rollout").sum() == pytest.approx(2, abs=1e-4)


def test_pictures_that_are_not_one_a_sample_are_not_taken_apart():
    model, inputs = build("qwen2_vl")
    assert regard.attribute(model, inputs, method="gradient_x_input").shape == inputs["input_ids"].shape
    for method in ("integrated_gradients", "meta_saliency"):
        with pytest.raises(ValueError, match="taken apart"):
            regard.attribute(model, inputs, method=method)


def test_what_has_no_one_prediction_is_refused():
    for name, match in (("bert", "every position"), ("albert", "no logits.*but embeddings")):
        with pytest.raises(ValueError, match=match):
            regard.attribute(*build(name), method="gradient_x_input")
    model, inputs = build("vit")
    with pytest.raises(ValueError, match="pixel_values"):
        regard.attribute(model, {"bool_masked_pos": None}, method="gradient_x_input")
    with pytest.raises(ValueError, match="a mapping"):
        regard.attribute(model, inputs["pixel_values"], method="gradient_x_input")
    with pytest.raises(KeyError, match="did you mean grad_cam"):
        regard.attribute(model, inputs, method="grad_cams")
    with pytest.raises(ValueError, match="did you mean"):
        regard.attribute(model, inputs, method="grad-cam", layer="vit.layers.9")
    with pytest.raises(ValueError, match="gives no tensor of places"):
        regard.attribute(resnet(), {"pixel_values": torch.zeros(1, 3, 64, 64)}, method="grad_cam", layer="resnet")


@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("normgrad", {"contribution": "conv5x5"}),
        ("normgrad", {"aggregation": "mean"}),
        ("normgrad", {"layers": "act"}),
        ("normgrad", {"layers": []}),
        ("integrated_gradients", {"steps": 0}),
        ("meta_saliency", {"of": "meta_saliency"}),
    ],
)
def test_knobs_that_mean_nothing_are_refused(method, knobs):
    explain = catalog.method("attribution", method)
    with pytest.raises(ValueError, match=next(iter(knobs))):
        explain(Toy(), PIXELS, 0, **knobs)


def test_the_model_is_left_as_it_was_found_after_an_error(models):
    model, both, _ = models["viewer"]
    model = copy.deepcopy(model).train()
    with pytest.raises(ValueError, match="no rule"):
        regard.attribute(model, both, method="layerwise_relevance")
    with pytest.raises(ValueError, match="no rule"):
        regard.attribute(model, both, method="meta_saliency", of="layerwise_relevance")
    assert all(module.training for module in model.modules())
    assert hooks(model) == 0
