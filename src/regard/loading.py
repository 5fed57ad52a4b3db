"""Load a model and what prepares its inputs, by name or folder."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from importlib import import_module, resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .extras import shortened

INDEX = "model_index.json"  # of a diffusers pipeline
OWN = {"PainterPipeline": "regard.zoo.pipeline"}  # pipelines that are not diffusers' own, and where they are


class Loaded(NamedTuple):
    """A model in evaluation mode, and its processor, tokenizer or pipeline (None where it has none)."""

    model: nn.Module
    processor: Any


class UnknownModel(ValueError):
    """No model can be loaded by this name."""


def load(name: str | Path = "reader", *, trust_remote_code: bool = False, **options: Any) -> Loaded:
    """Load `name`: a model of Regard's zoo, a local folder, or a hub id. Weights come from safetensors only.

    The configuration decides the class: causal, masked, encoder-decoder, vision or vision-language. `options` go to
    transformers' `from_pretrained` (dtype, device_map, attn_implementation, ...).

    Of a folder that holds a diffusers pipeline, the model is the transformer or U-Net that denoises, and the processor
    the pipeline: `model, pipeline = load("painter")`. Code that comes with a pipeline is never run.
    """
    import transformers

    where = _zoo(str(name)) or str(name)
    try:
        pipeline = (Path(where) / INDEX).is_file()
    except OSError as error:  # no name of a file
        raise UnknownModel(f"{shortened(name)!r} cannot be loaded: {error.strerror}") from error
    if pipeline:
        return _pipeline(Path(where), **options)
    if trust_remote_code:
        warnings.warn(f"running code that comes with {name}: only do this where you trust its authors", stacklevel=2)
    if not Path(where).exists() and (os.sep in where[:1] or where.startswith((".", "~"))):
        raise UnknownModel(f"there is no folder {shortened(name)}")
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        raise UnknownModel(
            f"{name} is a folder without a config.json or {INDEX}, so it holds no transformers model and no pipeline"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        auto = _auto_class(config)
        model = auto.from_pretrained(
            where, config=config, use_safetensors=True, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UnknownModel(
            f"{shortened(name)!r} cannot be loaded: {shortened(str(error).strip().splitlines()[0], 300)} (zoo models: "
            f"{', '.join(zoo())}; otherwise give a local folder, or a hub id, with safetensors weights)"
        ) from error
    return Loaded(model.eval(), _processor(where, trust_remote_code))


def zoo() -> list[str]:
    """Names of the trained models that ship with Regard."""
    folders = resources.files("regard.zoo").iterdir()
    return sorted(p.name for p in folders if any(p.joinpath(f).is_file() for f in ("model.safetensors", INDEX)))


def parameters(module: nn.Module) -> list[str]:
    """Names of what its forward takes."""
    return list(inspect.signature(module.forward).parameters)


def positions(model: nn.Module) -> int | None:
    """How many tokens the model has positions for, as far as its configuration says."""
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(limit := getattr(config, name, None), int):
            # RoBERTa and its kin spend positions up to the padding id on nothing
            base: Any = getattr(model, "base_model", model)
            offset: Any = getattr(getattr(base, "embeddings", None), "position_embeddings", None)
            return limit - (offset.padding_idx + 1 if getattr(offset, "padding_idx", None) else 0)
    return None


def _zoo(name: str) -> str | None:
    return str(resources.files("regard.zoo").joinpath(name)) if name in zoo() else None


def _pipeline(where: Path, **options: Any) -> Loaded:
    """What denoises, and the pipeline that it belongs to."""
    try:
        import diffusers
    except ImportError as error:
        raise UnknownModel(
            f'{where} holds a diffusers pipeline, which needs the package diffusers: pip install "regard[diffusers]"'
        ) from error
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        diffusers.utils.logging.disable_progress_bar()
    try:
        kind = json.loads((where / INDEX).read_text(encoding="utf-8"))["_class_name"]
        home = import_module(OWN[kind]) if kind in OWN else diffusers
        options = {"dtype": torch.float32, "use_safetensors": True, **options}
        pipeline = getattr(home, kind).from_pretrained(where, **options)
        model = next(pipeline.components[part] for part in ("transformer", "unet") if part in pipeline.components)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, StopIteration) as error:
        why = str(error).strip().splitlines() or ["it has neither a transformer nor a unet"]
        raise UnknownModel(f"the pipeline in {where} cannot be loaded: {why[0]}") from error
    return Loaded(model.eval(), pipeline)


def _auto_class(config: Any) -> Any:
    """The first auto class, from the most to the least telling, that knows this kind of model."""
    import transformers

    named = getattr(config, "architectures", None) or []
    if named and (cls := getattr(transformers, named[0], None)) is not None and hasattr(cls, "from_pretrained"):
        return cls  # what the weights were saved from
    for auto in (
        "AutoModelForImageTextToText",
        "AutoModelForCausalLM",
        "AutoModelForSpeechSeq2Seq",
        "AutoModelForSeq2SeqLM",
        "AutoModelForMaskedLM",
        "AutoModelForImageClassification",
        "AutoModel",
    ):
        cls = getattr(transformers, auto)
        if type(config) in cls._model_mapping:
            return cls
    raise ValueError(f"transformers has no model class for {type(config).__name__}")


def _processor(where: str, trust_remote_code: bool) -> Any:
    import transformers

    for auto in ("AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoFeatureExtractor"):
        try:
            return getattr(transformers, auto).from_pretrained(where, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError):
            continue
    return None
