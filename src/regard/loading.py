"""Load a model and what prepares its inputs, by name or folder."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import warnings
from collections.abc import Iterable
from importlib import import_module, resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .extras import shortened

INDEX = "model_index.json"  # of a diffusers pipeline
OWN = {"PainterPipeline": "regard.zoo.pipeline"}  # pipelines that are not diffusers' own, and where they are


_JSON = {"config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"}
_JSON |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack"}
_PROCESSORS = {  # in this order; and the files that it cannot do without reading
    "AutoProcessor": (),
    "AutoTokenizer": ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    "AutoImageProcessor": (),
    "AutoFeatureExtractor": ("preprocessor_config.json",),
}


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
    if Path(where).is_dir():
        _refuse_damaged(Path(where))
    elif near := _mistyped(where):
        raise UnknownModel(
            f"there is no model {shortened(name)!r}; did you mean {' or '.join(near)}? (zoo models: "
            f"{', '.join(zoo())}; otherwise give a local folder, or a hub id such as owner/name)"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        auto = _auto_class(config)
        model = auto.from_pretrained(
            where, config=config, use_safetensors=True, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:  # what a configuration says wrongly fails anywhere in transformers
        at = f"; see {Path(where) / 'config.json'}" if Path(where).is_dir() else ""
        raise UnknownModel(
            f"{shortened(name)!r} cannot be loaded: {_said(error)}{at} (zoo models: {', '.join(zoo())}; otherwise give "
            f"a local folder, or a hub id, with safetensors weights)"
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


def _mistyped(name: str) -> list[str]:
    """Zoo models that were meant, where `name` is near one: to ask the hub takes half a minute without a network.

    A hub id has an owner, apart from a few old ones such as gpt2, of which none is near; what the hub's cache holds
    is no mistake.
    """
    near = [] if "/" in name else difflib.get_close_matches(name.lower(), zoo(), n=2, cutoff=0.7)
    if not near:
        return []
    from huggingface_hub import try_to_load_from_cache

    try:
        return [] if isinstance(try_to_load_from_cache(name, "config.json"), str) else near
    except ValueError:  # no hub id at all
        return near


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
    _refuse_damaged_weights(where.rglob("*.safetensors"))
    try:
        kind = json.loads((where / INDEX).read_text(encoding="utf-8"))["_class_name"]
        home = import_module(OWN[kind]) if kind in OWN else diffusers
        options = {"dtype": torch.float32, "use_safetensors": True, **options}
        pipeline = getattr(home, kind).from_pretrained(where, **options)
        model = next(pipeline.components[part] for part in ("transformer", "unet") if part in pipeline.components)
    except Exception as error:  # as above
        why = "it has neither a transformer nor a unet" if isinstance(error, StopIteration) else _said(error)
        raise UnknownModel(f"the pipeline in {where} cannot be loaded: {why}; see its {INDEX}") from error
    return Loaded(model.eval(), pipeline)


def _auto_class(config: Any) -> Any:
    """The first auto class, from the most to the least telling, that knows this kind of model."""
    import transformers

    named = getattr(config, "architectures", None) or []
    if named and (cls := getattr(transformers, named[0], None)) is not None:
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            raise ValueError(f"architectures names {named[0]}, which is no model")
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
    """None where there is none; UnknownModel where its files are there, but cannot be read."""
    import transformers

    for auto, files in _PROCESSORS.items():
        try:
            found = getattr(transformers, auto).from_pretrained(where, trust_remote_code=trust_remote_code)
            if Path(where).is_dir() and _made_up(found, Path(where)):
                raise ValueError("there is no vocabulary beside it")
            return found
        except Exception as error:  # tokenizers raises plain ones
            if there := [name for name in files if (Path(where) / name).is_file()]:
                raise UnknownModel(
                    f"{', '.join(there)} in {where} cannot be read: {_said(error)}; save the tokenizer or processor "
                    f"into the folder again, or remove them to load the model alone"
                ) from error
    return None


def _made_up(processor: Any, folder: Path) -> bool:
    """Whether a tokenizer was made without the vocabulary that its kind needs: transformers makes empty ones."""
    needed = set(getattr(getattr(processor, "tokenizer", processor), "vocab_files_names", {}).values())
    there = {p.name for p in folder.iterdir()}
    return bool(needed) and not (
        there & (needed | {"tokenizer.json", "tekken.json"})
        or any(name.startswith("vocab") or name.endswith((".model", ".tiktoken")) for name in there)
    )


def _refuse_damaged(folder: Path) -> None:
    """Raise where files of a model are no JSON, or hold no whole weights, with the name of the first."""
    for file in sorted(folder.glob("*.json")):
        if file.name not in _JSON and not file.name.endswith(".index.json"):
            continue
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UnknownModel(f"{file} is damaged ({_said(error)}); get it again") from error
        if not isinstance(held, dict):
            raise UnknownModel(f"{file} holds {shortened(held)!r} where an object is due; get it again")
        named = held.get("architectures") or []
        if file.name == "config.json" and not (isinstance(named, list) and all(isinstance(n, str) for n in named)):
            raise UnknownModel(f"{file}: architectures is {shortened(named)!r}; it must list names of model classes")
        wrong = [n for n, v in held.items() if n.endswith(("heads", "n_head")) and isinstance(v, int) and v < 0]
        if file.name == "config.json" and wrong:
            raise UnknownModel(f"{file}: {wrong[0]} is {held[wrong[0]]}; it must be more than 0")
        shards = held.get("weight_map", {}) if file.name.endswith(".safetensors.index.json") else {}
        if not isinstance(shards, dict):
            raise UnknownModel(f"{file}: weight_map is {shortened(shards)!r}; it must say where each tensor is")
        if missing := sorted({str(name) for name in shards.values() if not (folder / str(name)).is_file()}):
            raise UnknownModel(f"{file} names {', '.join(missing)}, which {folder} lacks; get them")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        why = f"only {', '.join(pickles)}, which may run code as they are read" if pickles else "no weights"
        raise UnknownModel(
            f"{folder} holds {why}; Regard loads safetensors: get those, or write them with save_pretrained where you "
            f"trust the file"
        )
    _refuse_damaged_weights(weights)


def _refuse_damaged_weights(files: Iterable[Path]) -> None:
    from safetensors import safe_open

    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:
            raise UnknownModel(f"{file} is damaged ({_said(error)}); get it again") from error


def _said(error: BaseException) -> str:
    """The first line of an error; of what is no error of files or values, with its kind."""
    line = shortened((str(error).strip().splitlines() or ["no more is known"])[0], 300)
    return line if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {line}"
