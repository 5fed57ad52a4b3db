"""Which patch of which picture a token is: followed through models of every kind, at sizes that are not their own."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from conformance import places
from conformance.build import build
from families import IMAGE, VISION, pixels, text, unet, with_image
from families import build as family
from PIL import Image
from torch import nn

import regard
from regard.tokens import ROLES

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of configurations made from nothing


@dataclass
class Kind:
    """What is known of an architecture: pixels in a patch, its own tokens, and what it can be given."""

    patch: int
    own: int = 0  # class, register and detection tokens
    wide: tuple[float, float] = (1, 1.5)  # rows and columns, as multiples of the configuration's
    shown: float = 1.0  # share of the patches that it reads
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)  # pixels of queries and of keys, stage by stage


ONE = {
    "beit": Kind(16, 1),
    "clip_vision_model": Kind(32, 1),
    "data2vec-vision": Kind(16, 1),
    "deit": Kind(16, 2),
    "detr": Kind(32),
    "dinov2": Kind(14, 1),
    "dinov2_with_registers": Kind(14, 5),
    "dinov3_vit": Kind(16, 1),
    "dpt": Kind(16, 1),
    "glpn": Kind(4, parts={"": (4, 32)}),
    "ijepa": Kind(16),
    "pixtral": Kind(16),
    "siglip_vision_model": Kind(16),
    "tipsv2_vision_model": Kind(14, 2),
    "vit": Kind(16, 1),
    "vit_mae": Kind(16, 1, shown=0.25),
    "vit_msn": Kind(16, 1),
    "yolos": Kind(16, 101),
}
STAGED = {
    "cvt": {"encoder": (4, 8), "encoder.2": (8, 16), "encoder.3": (16, 32)},
    "hiera": {
        "encoder": (4, 4),
        "encoder.2": (8, 4),
        "encoder.3": (8, 8),
        "encoder.4": (16, 8),
        "encoder.5": (16, 16),
        "encoder.6": (32, 16),
        "encoder.7": (32, 32),
    },
    "pvt_v2": {"encoder": (4, 32), "encoder.2": (8, 32)},
    "sam_hq_vision_model": {"vision_encoder": (16, 16), "vision_encoder.2": (16, 16)},
    "sam_vision_model": {"vision_encoder": (16, 16), "vision_encoder.2": (16, 16)},
    "sam3_vision_model": {"backbone": (14, 14), "backbone.2": (14, 14)},
    "sam2_vision_model": {
        "backbone": (4, 4),
        "backbone.2": (8, 4),
        "backbone.3": (8, 8),
        "backbone.4": (16, 8),
        "backbone.5": (16, 16),
        "backbone.6": (16, 16),
        "backbone.7": (32, 16),
        "backbone.8": (32, 32),
    },
    "segformer": {"stages": (4, 32), "stages.2": (8, 32)},
    "swin": {f"encoder.{i}" if i > 1 else "encoder": (s, s) for i, s in enumerate((4, 4, 8, 8, 16, 16, 32, 32), 1)},
}


def calls(model: nn.Module, inputs: dict[str, Any]) -> dict[str, regard.Call]:
    """The first call of each stack."""
    seen: dict[str, regard.Call] = {}

    @regard.statistic("batch", title="Calls")
    def keep(call: regard.Call) -> None:
        seen.setdefault(call.site.stack, call)

    with torch.no_grad(), regard.record(model, keep):
        torch.manual_seed(0)
        model(**inputs)
    return seen


def wider(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Pictures that are not square and not of the configuration's size, where the model takes them."""
    for new in places.wider(model, inputs):
        new["pixel_values"] = torch.randn(new["pixel_values"].shape)
        try:
            with torch.no_grad():
                model(**new)
            return new
        except (ValueError, RuntimeError, AssertionError):
            continue
    raise AssertionError("it takes no picture")


def counted(tokens: regard.Tokens) -> dict[str, int]:
    return {name: int(n) for name in ROLES if (n := tokens.role(name).sum())}


def covered(tokens: regard.Tokens) -> bool:
    """Whether every patch of every picture is there once."""
    at = tokens.places[tokens.places[..., 0] >= 0][:, :3].tolist()
    whole = [[i, r, c] for i, (rows, columns) in enumerate(tokens.grids) for r in range(rows) for c in range(columns)]
    return sorted(at) == whole


@pytest.mark.parametrize("name", ONE)
def test_patches_are_on_the_grid_of_the_pictures_size(name):
    model, inputs = build(name)
    kind, inputs = ONE[name], wider(model, inputs)
    rows, columns = (n // kind.patch for n in inputs["pixel_values"].shape[-2:])
    call = next(iter(calls(model, inputs).values()))
    tokens, n = call.query_tokens, int(2 * rows * columns * kind.shown)
    assert tokens.grids == ((rows, columns), (rows, columns))
    assert counted(tokens) == {"image": n} | ({"special": 2 * kind.own} if kind.own else {})
    assert bool((tokens.role("image") == (tokens.places[..., 0] >= 0)).all())
    assert kind.shown < 1 or covered(tokens)
    assert name in ("detr", "sam3_vision_model") or rows != columns


@pytest.mark.parametrize("name", STAGED)
def test_each_stage_has_a_grid(name):
    model, inputs = build(name)
    inputs = wider(model, inputs)
    height, width = inputs["pixel_values"].shape[-2:]
    seen = calls(model, inputs)
    assert list(seen) == list(STAGED[name])
    for stack, sizes in STAGED[name].items():
        for tokens, size in zip((seen[stack].query_tokens, seen[stack].tokens), sizes):
            assert tokens.grids == ((height // size, width // size),) * 2
            assert covered(tokens)
            rest = counted(tokens).keys() - {"image"}
            assert rest <= ({"special"} if name == "cvt" else {"other"})  # windows reach beyond the picture


def changed(name: str, row: int, column: int, size: int) -> list[list[int]]:
    """Places of the tokens whose values in the first layer change as one patch turns white."""
    model, inputs = build(name)
    inputs = wider(model, inputs)
    black = torch.zeros_like(inputs["pixel_values"])
    white, painted = black.clone(), 1 if name in ("segformer", "hiera") else size  # whose patches overlap
    white[1, :, row * size : row * size + painted, column * size : column * size + painted] = 1
    values = []
    for given in (black, white):
        call = next(iter(calls(model, {**inputs, "pixel_values": given}).values()))
        values.append(call.value.movedim(1, 2).flatten(2))
    return call.tokens.places[(values[1] != values[0]).any(-1)].tolist()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("dinov2", 14),
        ("hiera", 4),
        ("pixtral", 16),
        ("sam_vision_model", 16),
        ("swin", 4),
        ("vit_mae", 16),
        ("yolos", 16),
    ],
)
def test_a_painted_patch_changes_the_token_with_its_label(name, size):
    hits = [changed(name, row, column, size) for row, column in ((0, 1), (2, 3), (3, 2))]
    want = [[[1, 0, 1, -1]], [[1, 2, 3, -1]], [[1, 3, 2, -1]]]
    if name == "vit_mae":  # most are dropped: what is there is right
        assert all(not hit or hit == one for hit, one in zip(hits, want))
    else:
        assert hits == want


def test_what_is_dropped_and_restored_keeps_its_place():
    """The encoder of MAE reads some patches; its decoder has mask tokens in the places of the others."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = t.ViTMAEConfig(
        **sizes, image_size=32, patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=8,
    )  # fmt: skip
    model = t.ViTMAEForPreTraining(config).eval()
    noise = torch.rand(2, 16)
    seen = calls(model, {"pixel_values": torch.randn(2, 3, 32, 32), "noise": noise})
    encoder, decoder = (call.query_tokens for call in seen.values())
    for b in range(2):
        kept = noise[b].argsort()[:4]
        assert (4 * encoder.places[b, 1:, 1] + encoder.places[b, 1:, 2]).tolist() == kept.tolist()
        assert (4 * decoder.places[b, 1:, 1] + decoder.places[b, 1:, 2]).tolist() == list(range(16))
        assert (decoder.role("image")[b, 1:].nonzero().flatten()).tolist() == sorted(kept.tolist())
    assert counted(decoder) == {"image": 8, "special": 26}


def test_shifted_windows_by_hand():
    model, inputs = build("swin")
    inputs["pixel_values"] = torch.randn(2, 3, 112, 56)  # 28 rows and 14 columns: windows of 7 fit
    seen = calls(model, inputs)
    plain, shifted = seen["encoder"].query_tokens, seen["encoder.2"].query_tokens
    window = 8 + 2 * 1 + 1  # of the second picture, in the second row of windows the second
    assert plain.places[window, 9].tolist() == [1, 7 + 1, 7 + 2, -1]
    assert shifted.places[window, 9].tolist() == [1, (7 + 1 + 3) % 28, (7 + 2 + 3) % 14, -1]
    assert counted(plain) == counted(shifted) == {"image": 2 * 28 * 14}


@pytest.mark.parametrize(
    "made",
    [
        lambda: t.BeitModel(t.BeitConfig(**VISION, use_mask_token=True)),  # mixes patches and mask tokens
        lambda: t.Dinov2Model(t.Dinov2Config(**VISION)),  # chooses one or the other
    ],
)
def test_masked_patches_are_the_models_own_tokens(made):
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[1, 6] = True
    seen = calls(made().eval(), {**pixels(), "bool_masked_pos": mask})
    tokens = next(iter(seen.values())).query_tokens
    assert tokens.role("special").nonzero().tolist() == [[0, 0], [1, 0], [1, 7]]
    assert tokens.places[1, 7].tolist() == [1, 1, 2, -1]


def test_words_and_patches_side_by_side():
    model, inputs = build("vilt")
    tokens = next(iter(calls(model, inputs).values())).query_tokens
    assert tokens.ids[:, :12].equal(inputs["input_ids"])
    assert bool((tokens.ids[:, 12:] == -1).all())
    assert counted(tokens) == {"text": 24, "image": 32, "special": 2}


@pytest.mark.parametrize("generate", [False, True])
def test_pictures_of_their_own_sizes_in_a_text(generate):
    """Qwen2-VL: patches are packed in the order in which they are merged, two by two."""
    model, inputs = family("qwen2_vl", "sdpa")
    inputs["image_grid_thw"] = torch.tensor([[1, 2, 8], [1, 4, 4]])
    inputs["pixel_values"] = inputs["pixel_values"][:32]
    tokens = with_image(4)
    tokens[:, 1], tokens[:, 6] = 96, 95
    inputs |= {"input_ids": tokens, "mm_token_type_ids": (tokens == IMAGE).int()}
    with regard.record(model, "entropy") as recording, torch.no_grad():
        if generate:
            model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
        else:
            model(**inputs)
    tower, words = recording.tree["visual"], recording.tree["language_model"]
    assert json.loads(tower.attrs["grids"]) == [[2, 8], [4, 4]]
    places = np.stack([tower[f"query_{part}"].values[0] for part in ("image", "row", "column")], -1)
    assert places[:6].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 2], [0, 0, 3]]
    assert places[16:22].tolist() == [[1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1], [1, 0, 2], [1, 0, 3]]
    assert json.loads(words.attrs["grids"]) == [[1, 4], [2, 2]]
    places = np.stack([words[f"query_{part}"].values for part in ("image", "row", "column", "frame")], -1)
    assert places[0, 2:6].tolist() == [[0, 0, 0, -1], [0, 0, 1, -1], [0, 0, 2, -1], [0, 0, 3, -1]]
    assert places[1, 2:6].tolist() == [[1, 0, 0, -1], [1, 0, 1, -1], [1, 1, 0, -1], [1, 1, 1, -1]]
    assert (places[:, 6:] == -1).all()


def test_a_video_has_frames():
    model, inputs = family("qwen2_vl", "sdpa")
    patches = inputs.pop("pixel_values")
    tokens = with_image(12)[:1]
    tokens[tokens == IMAGE] = 97
    tokens[:, 1], tokens[:, 14] = 96, 95
    given = {
        "input_ids": tokens,
        "pixel_values_videos": torch.cat([patches, patches])[:48],
        "video_grid_thw": torch.tensor([[2, 4, 6]]),
        "mm_token_type_ids": 2 * (tokens == 97).int(),
    }
    with regard.record(model, "entropy") as recording, torch.no_grad():
        model(**given)
    words, tower = recording.tree["language_model"], recording.tree["visual"]
    places = np.stack([words[f"query_{part}"].values[0] for part in ("image", "frame", "row", "column")], -1)
    assert places[2:14].tolist() == [[f, f, r, c] for f in range(2) for r in range(2) for c in range(3)]
    assert json.loads(words.attrs["grids"]) == [[2, 3], [2, 3]]
    assert np.unique(tower["key_frame"]).tolist() == [0, 1]
    assert (tower["key_frame"].values[0] == [0] * 24 + [1] * 24).all()


def test_a_picture_of_a_later_turn_is_another():
    model, _ = family("llava", "sdpa")
    first = torch.cat([text(1, 2)["input_ids"], torch.full((1, 16), IMAGE), text(1, 3)["input_ids"]], 1)
    with regard.record(model, "entropy") as recording, torch.no_grad():
        cache = model(input_ids=first, pixel_values=torch.randn(1, 3, 16, 16), use_cache=True).past_key_values
        model(input_ids=first, pixel_values=torch.randn(1, 3, 16, 16), past_key_values=cache)
    tree = next(tree for tree in recording if "language_model" in tree.children)
    node = tree["language_model"]
    assert list(node["query_image"].values[0]) == [-1] * 2 + [0] * 16 + [-1] * 5 + [1] * 16 + [-1] * 3
    assert json.loads(node.attrs["grids"]) == [[4, 4], [4, 4]]


def test_joint_attention_of_words_and_patches():
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4, "patch_size": 2}
    words = {"encoder_hidden_states": torch.randn(2, 5, 16), "pooled_projections": torch.randn(2, 12)}
    model = diffusers.SD3Transformer2DModel(
        **sizes, sample_size=8, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12,
        out_channels=4, pos_embed_max_size=12,
    )  # fmt: skip
    given = {"hidden_states": torch.randn(2, 4, 8, 12), "timestep": torch.tensor([1, 1]), **words}
    tokens = calls(model.eval(), given)["transformer_blocks"].query_tokens
    assert tokens.grids == ((4, 6), (4, 6))
    assert [ROLES[i] for i in tokens.roles[1]] == ["image"] * 24 + ["text"] * 5
    assert tokens.places[1, 13].tolist() == [1, 2, 1, -1]

    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    model = diffusers.FluxTransformer2DModel(
        **sizes, patch_size=1, in_channels=4, joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8)
    )
    at = torch.tensor([[0.0, i // 4, i % 4] for i in range(12)])
    given = {"hidden_states": torch.randn(2, 12, 4), "timestep": torch.ones(2), "img_ids": at, **words}
    for call in calls(model.eval(), {**given, "txt_ids": torch.zeros(5, 3)}).values():
        assert [ROLES[i] for i in call.tokens.roles[0]] == ["text"] * 5 + ["image"] * 12
        assert call.tokens.places[1, 5 + 6].tolist() == [1, 1, 2, -1]


def test_a_unet_has_a_grid_at_each_depth():
    pytest.importorskip("diffusers")
    model = unet(True, False, sample_size=16, block_out_channels=(8, 16), attention_head_dim=4, norm_num_groups=4)
    given = {"sample": torch.randn(2, 4, 16, 24), "encoder_hidden_states": torch.randn(2, 5, 16), "timestep": 1}
    for stack, call in calls(model.eval(), given).items():
        assert call.query_tokens.grids == ((((8, 12) if "mid" in stack else (16, 24)),) * 2)
        assert covered(call.query_tokens)


class Pooled(nn.Module):
    """What is made of all patches, beside them: no patch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Conv2d(3, 8, 4, 4), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.embed(images).flatten(2).mT
        if self.training:
            patches = patches.sort(1).values
        tokens = torch.cat([patches.mean(1, keepdim=True), patches], 1)
        return self.attention(tokens, tokens, tokens)[0]


def test_what_is_not_known_is_left_open():
    model, given = Pooled().eval(), {"images": torch.randn(2, 3, 8, 12)}
    tokens = next(iter(calls(model, given).values())).query_tokens
    assert counted(tokens) == {"image": 12, "other": 2}
    assert tokens.places[0, 0].tolist() == [-1] * 4
    tokens = next(iter(calls(model.train(), given).values())).query_tokens
    assert counted(tokens) == {"other": 14}  # sorted channel by channel: no token is of one patch
    assert tokens.grids == ()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_behind(fails):
    model, inputs = family("vit")
    before, given = model.forward, inputs["pixel_values"]
    with pytest.raises(ZeroDivisionError) if fails else regard.record(model, "entropy") as recording:
        if fails:
            with regard.record(model, "entropy"), regard.record(model, "received"):
                model.register_forward_hook(lambda *_: 1 / 0)
                model(given)
        model(given)
    assert fails or json.loads(recording.tree["encoder"].attrs["grids"]) == [[4, 4], [4, 4]]
    assert model.forward == before
    assert torch.overrides._get_current_function_mode() is None
    assert not vars(given)


def test_a_timm_model():
    """Not one of transformers': its argument is called x, and its attention calls torch's function."""
    timm = pytest.importorskip("timm", exc_type=ImportError)  # timm itself needs torchvision
    torch.manual_seed(0)
    sizes = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    model = timm.models.vision_transformer.VisionTransformer(**sizes).eval()
    given = {"x": torch.randn(2, 3, 32, 48)}
    with regard.record(model, "entropy", "received") as recording, torch.no_grad():
        model(**given)
    node = recording.tree["encoder"]
    assert repr(recording).startswith("Recording of VisionTransformer")
    assert json.loads(node.attrs["grids"]) == [[4, 6], [4, 6]]
    assert list(node["key_role"].values[1]) == ["special"] + ["image"] * 24
    assert list(node["key_column"].values[1]) == [-1, *list(range(6)) * 4]
    for method in ("gradient_x_input", "grad_cam"):
        found = regard.attribute(model, given, target=1, method=method)
        assert dict(found.sizes) == {"batch": 2, "row": 32, "column": 48}
        assert float(np.abs(found).max()) > 0


@pytest.mark.skipif(
    not os.environ.get("REGARD_MODELS") or not os.environ.get("REGARD_DATA"), reason="needs REGARD_MODELS"
)
def test_photographs_of_their_own_shapes():
    """A real DINOv2, with whole photographs rather than the square that its processor cuts out."""
    model, processor = regard.load(Path(os.environ["REGARD_MODELS"]) / "dinov2-small", dtype=torch.float32)
    for file in sorted((Path(os.environ["REGARD_DATA"]) / "pictures").glob("*.jpg")):
        picture = Image.open(file)
        size = {"height": picture.height // 56 * 14, "width": picture.width // 56 * 14}
        given = processor(picture, do_center_crop=False, size=size, return_tensors="pt")
        with regard.record(model, "entropy") as recording, torch.no_grad():
            model(**given)
        node = recording.tree["encoder"]
        rows, columns = picture.height // 56, picture.width // 56
        assert json.loads(node.attrs["grids"]) == [[rows, columns]]
        assert list(node["key_role"].values[0]) == ["special"] + ["image"] * (rows * columns)
        assert node["key_row"].values[0, 1:].tolist() == [r for r in range(rows) for _ in range(columns)]
