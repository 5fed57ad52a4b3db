"""Inputs that a model can run on, from the names of what its forward takes and from what it then complains about."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .recipes import INPUTS

N = 12  # tokens
BATCH = 2
GRID = (4, 4)  # patches of a picture where their number is ours to choose

_IMAGE_TOKENS = (
    "image_token_id",
    "image_token_index",
    "video_token_index",
    "audio_token_id",
    "audio_token_index",
    "speech_token_index",
)


_ALWAYS = {
    "bbox", "image_grid_thw", "mm_token_type_ids", "spatial_shapes", "pixel_attention_mask",
    "input_features_mask", "feature_attention_mask", "visual_feats", "visual_pos", "aspect_ratio_ids",
    "aspect_ratio_mask", "qformer_input_ids",
}  # fmt: skip

_MEL = (
    "num_mel_bins",
    "n_mels",
    "feature_size",
    "mel_dim",
    "feature_projection_input_dim",
    "input_dim",
    "input_feat_per_channel",
    "input_channels",
    "model_in_dim",
    "input_size",
)

_NEEDS = {
    "input_features_mask": "input_features",
    "feature_attention_mask": "input_features",
    "pixel_attention_mask": "pixel_values",
    "image_sizes": "pixel_values",
    "mm_token_type_ids": "input_ids",
}


@dataclass(frozen=True)
class Hints:
    """What a model's errors said about the inputs that it wants."""

    placeholders: int = 0  # image (or sound) tokens in each text
    extra: tuple[str, ...] = ()  # inputs by name
    deeper: tuple[tuple[str, int], ...] = ()  # inputs with one more axis after the batch, and its size
    swapped: tuple[str, ...] = ()  # with the last two axes the other way round


def draw(model: nn.Module, hints: Hints) -> dict[str, Any]:
    """Random inputs of batch 2."""
    config, takes = model.config, inspect.signature(model.forward).parameters
    maker = Maker(config, torch.Generator().manual_seed(1), takes, hints)
    main = getattr(model, "main_input_name", "input_ids")
    main = main if isinstance(main, str) else main[0]
    special = INPUTS.get(getattr(config, "model_type", ""), {})
    required = {n for n, p in takes.items() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD}
    wanted = required | {main} | set(hints.extra)
    if main == "input_ids" and _part(config, "vision_config", "vision_encoder_config") is not None:
        wanted.add("pixel_values")
    if main == "input_ids" and _part(config, "audio_config", "audio_encoder_config", "encoder_config") is not None:
        wanted |= {"input_features", "input_features_mask", "feature_attention_mask"} & set(takes)
    if main == "pixel_values" and _part(config, "text_config") is not None:
        wanted.add("input_ids")
    if getattr(config, "is_encoder_decoder", False) or main in ("input_features", "input_values", "flattened_patches"):
        wanted.add("decoder_input_ids")
    wanted |= (_ALWAYS | set(special)) & set(takes)
    if "past_time_features" in takes:
        wanted |= {"future_values", "future_time_features", "past_observed_mask"} & set(takes)
    inputs: dict[str, Any] = {}
    for name in takes:  # in order: some depend on those before
        needs = _NEEDS.get(name)
        if name in special:
            if (value := special[name](maker, inputs)) is not None:
                inputs[name] = value
        elif name in wanted and hasattr(maker, name) and (needs is None or needs in inputs):
            inputs[name] = getattr(maker, name)(inputs)
            if name in hints.swapped:
                inputs[name] = inputs[name].mT.contiguous()
            for _, size in (d for d in hints.deeper if d[0] == name):
                inputs[name] = torch.stack([inputs[name]] * size, dim=1)
    return inputs


def more(error: Exception, hints: Hints, inputs: dict[str, Any], hidden: int | None) -> Hints | None:
    """What an error says about the inputs that are wanted; None where it says nothing new."""
    text = str(error)
    if found := re.search(r"tokens:? (\d+),.*?features:? (?:torch.Size\(\[)?(\d+)", text):
        features, had = int(found[2]), int(found[1])
        each = features // BATCH
        if had == features:  # it counts numbers, not tokens
            each //= max(1, hidden or 1)
        if features % BATCH == 0 and each and each != hints.placeholders:
            return replace(hints, placeholders=each)
        return None
    if found := re.search(r"not enough values to unpack \(expected (\d), got (\d)\)", text):
        name = _main(inputs, int(found[2]))
        if name:
            return replace(hints, deeper=(*hints.deeper, (name, 1)))
    if re.search(r"5D (video )?inputs?|must be a 5D", text) and (name := _main(inputs, 4)):
        return replace(hints, deeper=(*hints.deeper, (name, 2)))
    if re.search(r"split_with_sizes expects|input.dim\(\) = 4", text) and (name := _main(inputs, 4)):
        return replace(hints, deeper=(*hints.deeper, (name, 2)))
    if "Dimension out of range" in text and (name := _main(inputs, 3)):
        return replace(hints, deeper=(*hints.deeper, (name, 1)))
    if found := re.search(r"expected input\[(.*?)\] to have (\d+) channels, but got (\d+)", text):
        name = _main(inputs, 2 if found[2] == "1" else 3)
        if found[2] == "1" and name:
            return replace(hints, deeper=(*hints.deeper, (name, 1)))
        if name and name not in hints.swapped and int(found[2]) in inputs[name].shape:
            return replace(hints, swapped=(*hints.swapped, name))
    if re.search(r"mat1 and mat2|normalized_shape|non-singleton dimension", text):
        name = "input_features"
        if name in inputs and name not in hints.swapped and inputs[name].ndim == 3:
            return replace(hints, swapped=(*hints.swapped, name))
    named = re.search(r"specify (?:either |at least )?(?:a |an |exactly one of )?`?(\w+)`?", text)
    if named and named[1] not in (*hints.extra, *inputs) and hasattr(Maker, named[1]):
        return replace(hints, extra=(*hints.extra, named[1]))
    if "NoneType" in text and "image_sizes" not in hints.extra:
        return replace(hints, extra=(*hints.extra, "image_sizes"))
    return None


def _main(inputs: dict[str, Any], ndim: int) -> str | None:
    names = ("pixel_values", "pixel_values_videos", "input_values", "input_features")
    return next((n for n in names if n in inputs and inputs[n].ndim == ndim), None)


def _part(config: Any, *names: str) -> Any:
    return next((part for name in names if (part := getattr(config, name, None)) is not None), None)


def _seek(config: Any, *names: str) -> Any:
    """A value of the configuration, or of the first part of it that has one."""
    for name in names:
        if (value := getattr(config, name, None)) is not None:
            return value
    for key in getattr(config, "sub_configs", {}) or {}:
        part = getattr(config, key, None)
        if part is not None and (value := _seek(part, *names)) is not None:
            return value
    return None


def hidden_size(config: Any) -> int | None:
    """Width of the text model."""
    return _seek(getattr(config, "text_config", None) or config, "hidden_size", "d_model")


class Maker:
    """One method for each input, by its name in `forward`; each is given those made before it."""

    def __init__(self, config: Any, generator: torch.Generator, takes: Any, hints: Hints) -> None:
        self.config, self.generator, self.takes, self.hints = config, generator, takes, hints
        self.vision = (
            _part(config, "vision_config", "image_config", "backbone_config", "vision_encoder_config") or config
        )
        self.size = getattr(config, "hidden_size", None)
        self.packed = bool({"image_grid_thw", "grid_thw"} & set(takes))

    def ids(self, n: int) -> Tensor:
        vocab = min(_seek(self.config, "vocab_size") or 100, 150)
        return torch.randint(min(10, vocab // 2), vocab, (BATCH, n), generator=self.generator)

    def books(self, n: int, books: int) -> Tensor:
        """Ids [batch, n, book]"""
        return torch.stack([self.ids(n) for _ in range(books)], dim=-1)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def input_ids(self, _: Any) -> Tensor:
        return self.placed(self.hints.placeholders)

    def placed(self, n: int) -> Tensor:
        """A text with so many places for what another part gives."""
        ids = self.ids(N)
        tokens = (getattr(self.config, name, None) for name in _IMAGE_TOKENS)
        token = next((t for t in tokens if isinstance(t, int)), None)
        if n and token is not None:
            ids = torch.cat([ids[:, :2], torch.full((BATCH, n), token), ids[:, 2:]], dim=1)
        return ids

    def decoder_input_ids(self, _: Any) -> Tensor:
        return self.ids(5)

    def bbox(self, inputs: Any) -> Tensor:
        corners = torch.randint(0, 50, (BATCH, N, 4), generator=self.generator)
        corners[..., 2:] += corners[..., :2]
        return corners / 100 if self.config.model_type == "udop" else corners

    def pixel_values(self, _: Any) -> Tensor:
        channels = _seek(self.vision, "num_channels", "in_channels", "in_chans", "input_channels")
        channels = channels if isinstance(channels, int) else 3
        if self.packed or "spatial_shapes" in self.takes:
            patch = _seek(self.vision, "patch_size", "spatial_patch_size") or 4
            patch = patch if isinstance(patch, int) else patch[-1]
            deep = (
                1
                if "spatial_shapes" in self.takes
                else _seek(self.vision, "temporal_patch_size", "patch_temporal") or 1
            )
            n = GRID[0] * GRID[1]
            shape = (BATCH, n) if "spatial_shapes" in self.takes else (BATCH * n,)
            return self.noise(*shape, channels * deep * patch * patch)
        frames = [f] if isinstance(f := getattr(self.config, "num_frames", None), int) else []
        return self.noise(BATCH, *frames, channels, *self.side())

    pixel_values_videos = pixel_values

    def side(self) -> tuple[int, int]:
        size = _seek(self.vision, "image_size", "img_size", "input_size") or _seek(self.config, "image_size") or 64
        height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
        return (height, width) if isinstance(height, int) else (64, 64)

    def image_grid_thw(self, _: Any) -> Tensor:
        return torch.tensor([[1, *GRID]] * BATCH)

    grid_thw = image_grid_thw

    def merge_sizes(self, _: Any) -> Tensor:
        return torch.tensor([1] * BATCH)

    def spatial_shapes(self, _: Any) -> Tensor:
        return torch.tensor([GRID] * BATCH)

    def pixel_attention_mask(self, inputs: Any) -> Tensor:
        if "spatial_shapes" in self.takes:
            return torch.ones(BATCH, GRID[0] * GRID[1], dtype=torch.long)
        pixels = inputs["pixel_values"]
        return torch.ones(pixels.shape[:-3] + pixels.shape[-2:], dtype=torch.long)

    def pixel_mask(self, _: Any) -> Tensor:
        return torch.ones(BATCH, *self.side(), dtype=torch.long)

    def mm_token_type_ids(self, inputs: Any) -> Tensor:
        token = _seek(self.config, *_IMAGE_TOKENS)
        ids = inputs["input_ids"]
        return torch.zeros_like(ids) if token is None else (ids == token).int()

    def input_features(self, _: Any) -> Tensor:
        mel = _seek(self.config, *_MEL)
        return self.noise(
            BATCH, mel if isinstance(mel, int) else 80, 2 * (_seek(self.config, "max_source_positions") or 48)
        )

    def input_features_mask(self, inputs: Any) -> Tensor:
        return torch.ones(BATCH, inputs["input_features"].shape[-1], dtype=torch.long)

    feature_attention_mask = input_features_mask

    def input_values(self, _: Any) -> Tensor:
        if isinstance(mel := getattr(self.config, "num_mel_bins", None), int) and hasattr(self.config, "max_length"):
            return self.noise(BATCH, self.config.max_length, mel)
        return self.noise(BATCH, 4000)

    def hidden_states(self, _: Any) -> Tensor:
        if self.packed:
            return self.pixel_values(_)
        return self.noise(BATCH, N, _seek(self.config, "hidden_size", "d_model"))

    def inputs_embeds(self, _: Any) -> Tensor:
        return self.noise(BATCH, N, _seek(self.config, "hidden_size", "d_model"))

    def attention_mask(self, _: Any) -> Tensor:
        return torch.ones(BATCH, N, dtype=torch.long)

    def encoder_hidden_states(self, _: Any) -> Tensor:
        return self.noise(BATCH, 7, _seek(self.config, "encoder_hidden_size", "hidden_size", "d_model"))

    def query_embeds(self, _: Any) -> Tensor:
        return self.noise(BATCH, 6, _seek(self.config, "hidden_size"))

    def flattened_patches(self, _: Any) -> Tensor:
        return self.noise(BATCH, 16, _seek(self.config, "patch_embed_hidden_size") + 2).abs()

    def image_sizes(self, inputs: Any) -> Tensor:
        return torch.tensor([inputs["pixel_values"].shape[-2:]] * BATCH)

    def qformer_input_ids(self, _: Any) -> Tensor:
        return self.ids(N)

    def context(self, _: Any) -> Tensor:
        return self.noise(BATCH, 9, _seek(self.config, "hidden_size"))

    def inputs(self, _: Any) -> Tensor:
        return self.noise(BATCH, N, _seek(self.config, "d_model"))

    def visual_feats(self, _: Any) -> Tensor:
        return self.noise(BATCH, 7, _seek(self.config, "visual_feat_dim"))

    def visual_pos(self, _: Any) -> Tensor:
        return self.noise(BATCH, 7, _seek(self.config, "visual_pos_dim")).sigmoid()

    def past_values(self, _: Any) -> Tensor:
        lags = max(getattr(self.config, "lags_sequence", None) or [0])
        channels = getattr(self.config, "num_input_channels", None)
        n = (_seek(self.config, "context_length") or 64) + lags
        return self.noise(BATCH, n, *([channels] if channels else []))

    def past_observed_mask(self, inputs: Any) -> Tensor:
        return torch.ones_like(inputs["past_values"])

    def past_time_features(self, inputs: Any) -> Tensor:
        return self.noise(*inputs["past_values"].shape[:2], _seek(self.config, "num_time_features"))

    def future_values(self, _: Any) -> Tensor:
        return self.noise(BATCH, _seek(self.config, "prediction_length"))

    def future_time_features(self, _: Any) -> Tensor:
        return self.noise(BATCH, _seek(self.config, "prediction_length"), _seek(self.config, "num_time_features"))
