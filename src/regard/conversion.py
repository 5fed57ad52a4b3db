"""Trained models with another mechanism: what is lost, some training, and a folder that can be loaded again."""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import paragraph
from .data.scenes import Dials, Scenes
from .extras import shortened
from .files import MARK, refuse_foreign, written_aside
from .loading import Loaded, load, positions
from .mechanisms import conversions, modules, operators
from .mechanisms._layers import no_class_token
from .mechanisms._mechanism import foreign
from .mechanisms._modules import ModuleSpec, declared_of

WEIGHTS, ABOUT = "converted.safetensors", "converted.json"
RATE, BATCH, LENGTH = 1e-3, 8, 128  # of training: AdamW, texts or pictures a step, tokens


class Lost(NamedTuple):
    """A converted model beside the original, on what was held out.

    loss: nats a token, NaN of pictures; divergence: of the original's predictions to its own, nats; agreement: share of
    tokens, or pictures, for which both hold the same likeliest.
    """

    loss: float
    divergence: float
    agreement: float


class Items(NamedTuple):
    """Inputs of a model to train on and to judge by, each of one item."""

    train: Tensor
    held_out: Tensor
    text: bool


def known(key: str) -> Callable[..., Any]:
    """The conversion to a mechanism. KeyError, with those there are, where it has none."""
    every = {name.replace("_", "-"): function for name, function in conversions().items()}
    if (function := every.get(key.replace("_", "-"))) is None:
        near = difflib.get_close_matches(key.replace("_", "-"), every, n=3, cutoff=0.5)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        name = key.replace("_", "-")
        operator = f"; model.set_attn_implementation('regard:{name}') runs {name} without new weights"
        raise KeyError(
            f"{shortened(key)!r} has no conversion of trained models{hint}; there are those to {', '.join(every)}"
            f"{operator if name.replace('-', '_') in operators() else ''}"
        )
    return function


def convert(model: nn.Module, key: str, *, inputs: Mapping[str, Any] | None = None, **knobs: Any) -> nn.Module:
    """The model with another mechanism, in place. KeyError, with those there are, where one has no conversion;
    ValueError for knobs of another kind, and those that are missing.

    inputs: of the model, for conversions that run it once; see `example`.
    """
    function = known(key)
    if problem := misgiven(function, knobs):
        raise ValueError(f"the conversion to {key}: {problem}")
    takes = inspect.signature(function).parameters
    if "shape" in takes:
        no_class_token(model, key)
    if "inputs" in takes:
        if inputs is None:
            raise ValueError(
                f"the conversion to {key} runs the model once: give inputs=regard.conversion.example(loaded)"
            )
        knobs = {"inputs": inputs, **knobs}
    made = function(model, **knobs)
    return made.eval() if isinstance(made, nn.Module) else model.eval()


def misgiven(function: Callable[..., Any], knobs: Mapping[str, Any]) -> str | None:
    """What of a conversion's knobs is of another kind, or is not given and has no default, in words."""
    parameters = inspect.signature(function).parameters
    needed = [name for name, p in list(parameters.items())[1:] if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if missing := [name for name in needed if name not in knobs and name != "inputs"]:
        return f"give {' and '.join(missing)}, which has no default"
    return foreign(parameters, knobs)


def example(loaded: Loaded) -> dict[str, Any]:
    """Inputs of a model: a generated scene, or a paragraph."""
    model, processor = loaded
    if getattr(model, "main_input_name", "") == "pixel_values":
        return dict(processor(images=Scenes(1).render([0]).image(0), return_tensors="pt"))
    given = getattr(processor, "tokenizer", processor)(paragraph(), return_tensors="pt", verbose=False)
    return {"input_ids": given["input_ids"][:, : positions(model)]}


def items(loaded: Loaded, text: str | None, *, seed: int = 0) -> Items:
    """Of a text, or for models that look at pictures generated scenes; a tenth is held out, the last one of a text."""
    model, processor = loaded
    if getattr(model, "main_input_name", "") == "pixel_values":
        if text is not None:
            raise ValueError(f"{type(model).__name__} looks at pictures, and is trained on generated scenes: no text")
        scenes = Scenes(320, Dials(), seed=seed)
        pictures = [scenes.render([i]).image(0) for i in range(len(scenes))]
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        return Items(pixels[32:], pixels[:32], False)
    if not hasattr(model, "generate") or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} cannot be judged: it is no causal language model, and takes no pictures alone"
        )
    if text is None:
        raise ValueError(f"{type(model).__name__} is judged by a text: give one")
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    length = min(LENGTH, positions(model) or LENGTH, len(ids) // 20 + len(first))
    if length - len(first) < 8:
        raise ValueError(f"the text has {len(ids):,} tokens; give 160 or more")
    rows = ids[: len(ids) // (length - len(first)) * (length - len(first))].view(-1, length - len(first))
    rows = torch.cat([torch.tensor(first, dtype=ids.dtype).expand(len(rows), -1), rows], 1)
    cut = len(rows) - max(len(rows) // 10, 1)
    return Items(rows[:cut], rows[cut:][:64], True)


@torch.no_grad()
def predicted(model: Any, of: Items) -> Tensor:
    """Log probabilities of what was held out. [item, token or class]"""
    parts = [_logits(model, part, of.text) for part in of.held_out.split(BATCH)]
    return torch.cat(parts).log_softmax(-1).flatten(0, -2)


def lost(model: Any, before: Tensor, of: Items) -> Lost:
    """before: what the original predicted, as `predicted` gives it."""
    now = predicted(model, of)
    loss = math.nan
    if of.text:
        later = now.unflatten(0, (len(of.held_out), -1))[:, :-1]
        loss = float(F.nll_loss(later.flatten(0, 1), of.held_out[:, 1:].flatten()))
    divergence = float(F.kl_div(now, before, reduction="batchmean", log_target=True))
    return Lost(loss, divergence, float((now.argmax(-1) == before.argmax(-1)).float().mean()))


def train(
    model: Any,
    original: Any,
    of: Items,
    steps: int,
    *,
    key: str,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """For the next token, or of pictures for what the original predicts; with what the mechanism adds to the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    adding = _losses(model, key)
    for step in range(steps):
        warm = min(1.0, (step + 1) / 10, 2 * (steps - step) / steps)
        optimizer.param_groups[0]["lr"] = RATE * warm
        batch = of.train[torch.randint(len(of.train), (BATCH,), generator=generator)]
        logits = _logits(model, batch, of.text)
        if of.text:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        else:
            with torch.no_grad():
                aim = _logits(original, batch, False).log_softmax(-1)
            loss = F.kl_div(logits.log_softmax(-1), aim, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        (loss + sum(added() for added in adding) / max(len(adding), 1)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress(step + 1, float(loss.detach()))


def save(model: nn.Module, folder: Path, *, name: str, key: str, knobs: dict[str, Any], about: dict[str, Any]) -> None:
    """Weights as safetensors, and how to load them: see `restored`, which is tried before anything is kept.

    FileExistsError where a folder of this name is none that this wrote.
    """
    from safetensors.torch import save_model

    refuse_other(folder)
    module = f"regard.mechanisms.{key.replace('-', '_')}"
    how = {
        "about": MARK,
        "model": name,
        "mechanism": key,
        "knobs": knobs,
        "load": f"regard.conversion.restored(folder): regard.load(model), then {module}.convert(model, **knobs), then "
        f"these weights",
        **about,
    }
    with written_aside(folder) as draft:
        draft.mkdir()
        save_model(model, str(draft / WEIGHTS))
        (draft / ABOUT).write_text(json.dumps(how, indent=1) + "\n", encoding="utf-8")
        again = restored(draft).model.state_dict()
        if differing := [k for k, v in model.state_dict().items() if k not in again or not torch.equal(v, again[k])]:
            raise ValueError(f"{key}: {differing[0]} would not come back from a file, so nothing was saved")


def restored(folder: str | Path) -> Loaded:
    """A converted model and its processor, from a folder that `save` wrote. The model it came from is loaded first.

    ValueError where the folder holds no such thing.
    """
    from safetensors.torch import load_model

    folder = Path(folder)
    try:
        how = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        name, key, knobs = how["model"], how["mechanism"], how["knobs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no converted model ({type(error).__name__}: {error})") from error
    loaded = load(name)
    model = convert(loaded.model, key, inputs=example(loaded), **knobs)
    try:
        load_model(model, str(folder / WEIGHTS))
    except Exception as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {name} with {key}: {error}") from error
    return Loaded(model, loaded.processor)


def _logits(model: Any, inputs: Tensor, text: bool) -> Tensor:
    if text:
        return model(input_ids=inputs, use_cache=False).logits
    output = model(pixel_values=inputs)
    if getattr(output, "logits", None) is None:
        raise ValueError(f"{type(model).__name__} predicts nothing that could be judged: it has no logits")
    return output.logits


def _losses(model: nn.Module, key: str) -> list[Callable[[], Tensor]]:
    """What the mechanism's modules add to the loss."""
    names = {key.replace("-", "_")}
    declared = {cls: declared_of(cls) for name, cls in modules().items() if name.partition(".")[0] in names}
    found = []
    for part in model.modules():
        spec = declared.get(type(part))
        if isinstance(spec, ModuleSpec) and spec.loss is not None:
            found.append(lambda part=part, loss=spec.loss: loss(part))
    return found


def refuse_other(folder: Path) -> None:
    """Raise FileExistsError where a folder holds what is not of a converted model."""
    if not folder.exists():
        return
    others = [p.name for p in folder.iterdir() if p.name not in (WEIGHTS, ABOUT)] if folder.is_dir() else [folder.name]
    if others:
        raise FileExistsError(f"{folder} holds {others[0]}, which is not of a converted model; choose another name")
    refuse_foreign(folder / ABOUT)
