"""RefAM: a diffusion model, given a picture and an expression, looks from the described object to its words.

Kukleva et al., RefAM: Attention Magnets for Zero-Shot Referral Segmentation (arXiv:2509.22650); the abstract and
summaries were at hand, and no code. The picture is noised to a moderate time and read once with the expression as the
prompt; the map of a word is the weight of each patch on it in cross attention, mean over heads and layers, and that of
the expression the mean over its words, without stop words. Further words, the magnets, are appended before the text is
encoded: they take part in the softmax, draw weight of the background, and are left out. Global sinks, tokens that draw
far more than their share from all patches alike, are left out in the layer in which they are. Moving their weight to
the magnets instead would leave the map the same, since these are not read.

The list of stop words, which magnets, when a token is a sink, the time and the layers are ours. Theirs are models with
joint attention, FLUX and Mochi; ours has separate cross attention, as PixArt and U-Nets do, and refuses others. The
noise is the same for every picture.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .. import hooks
from ..call import Call
from ..functions import bound
from ..loading import parameters
from ..prediction import Target
from ..recording import statistic
from ..seam import record
from ._painted import Word, denoiser, grid_of, on_words, positions, texts

# fmt: off
STOP_WORDS = frozenset((
    "a", "an", "the", "this", "that", "these", "those", "of", "on", "in", "at", "to", "by", "for", "from", "with",
    "and", "or", "is", "are", "was", "were", "be", "it", "its", "there", "which", "who", "as",
))
# fmt: on
MAGNETS = (".", "with", "to", "and")
COLOURS = ("pink", "purple", "orange", "grey")  # a magnet is the first that is not in the expression


def refam(
    pipeline: Any,
    inputs: Mapping[str, Any],
    target: Target = None,
    *,
    stop_words: Collection[str] = STOP_WORDS,
    magnets: Sequence[str] | None = None,
    sinks: bool = True,
    ratio: float = 2.0,
    spread: float = 0.5,
    layers: Collection[int] | None = None,
    time: float = 0.3,
    seed: int = 0,
) -> xr.DataArray:
    """How much each place looks at what is described, stretched from 0 to 1. [batch, row, column], in pixels

    pipeline: of diffusers, with cross attention to words. inputs: `pixel_values` [batch, channel, row, column], -1 to
    1, in the pipeline's size, and `text`, an expression for each, which is the target: `target` is not used.

    stop_words: those that are left out, with signs and the tokenizer's own tokens; none leaves out nothing. magnets:
    words to append; None for `MAGNETS`, as far as the tokenizer knows them, and a colour that is not in the expression;
    () for none. sinks: whether global ones are left out; ratio, spread: see `global_sinks`. layers: which
    cross-attention layers are read; None for all. time: share of the noise, 0 to 1. seed: of the noise.

    ValueError where an expression has stop words alone, or none that is no sink; where a magnet is unknown; where the
    model has no cross attention.

    >>> import regard
    >>> from regard.data.scenes import Object, Scene, render
    >>> objects = Object("star", "red", "large", 0.25, 0.5), Object("ring", "blue", "large", 0.75, 0.5)
    >>> picture = render(Scene(objects), 32)
    >>> transformer, pipeline = regard.load("painter")
    >>> found = refam(pipeline, {"pixel_values": 2 * picture.tensor() - 1, "text": "a blue ring"})
    >>> found.dims, bool(found[0].argmax(("row", "column"))["column"] > 16)
    (('batch', 'row', 'column'), True)
    """
    model, expressions = denoiser(pipeline, "refam"), texts(inputs, "refam")
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or len(pixels) != len(expressions):
        raise ValueError(
            f"refam: give pixel_values [batch, channel, row, column] for {len(expressions)} texts, not "
            f"{list(pixels.shape) if isinstance(pixels, Tensor) else pixels!r}"
        )
    if not 0 <= time <= 1:
        raise ValueError(f"refam(time={time}): it is the share of noise, from 0 to 1")
    prompts = [" ".join((one, *_magnets(pipeline.tokenizer, one, magnets))) for one in expressions]
    words = [[Word(m[0], *m.span()) for m in re.finditer(r"[\w'-]+|[^\w\s]", one)] for one in expressions]
    if stop_words:
        words = [[w for w in some if w.text[0].isalnum() and w.text.lower() not in stop_words] for some in words]
    if bare := [one for one, some in zip(expressions, words) if not some]:
        raise ValueError(f"refam: {bare[0]!r} has stop words alone; say what to find, or give other stop_words")
    places = positions(pipeline, prompts, words)
    grid, weights = _weights(pipeline, model, pixels, prompts, time, seed, layers)
    real, kept = (torch.zeros(len(prompts), weights.shape[-1], dtype=torch.bool) for _ in range(2))
    for i, (prompt, some) in enumerate(zip(prompts, places)):
        real[i, : len(pipeline.tokenizer(prompt)["input_ids"])] = True
        kept[i, [at for tokens in some for at in tokens]] = True
        kept[i] |= real[i] if not stop_words else False
    found = grounding(weights, kept, real, sinks=sinks, ratio=ratio, spread=spread)
    if unread := [i for i in range(len(found)) if found[i].isnan().any()]:
        raise ValueError(f"refam: every word of {expressions[unread[0]]!r} is a global sink; give sinks=False")
    maps = interpolate(found.unflatten(1, grid)[:, None], pixels.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return xr.DataArray(
        ((maps - low) / (high - low).clamp(min=1e-12)).double().numpy(),
        {"text": ("batch", expressions)},
        ("batch", "row", "column"),
        "refam",
        {"long_name": "weight on the expression", "predicts": "words"},
    )


def grounding(
    weights: Tensor, kept: Tensor, real: Tensor, *, sinks: bool = True, ratio: float = 2.0, spread: float = 0.5
) -> Tensor:
    """Mean weight on the words that are kept, over them and layers; sinks are left out by layer. [batch, query]

    weights: [batch, layer, query, token]; kept: which tokens are read, real: which are no padding. [batch, token]
    NaN where no token is left in any layer.
    """
    read = kept[:, None].expand(weights.shape[:2] + kept.shape[1:])
    if sinks:
        read = read & ~global_sinks(weights, real, ratio=ratio, spread=spread)
    among = read.sum(-1)  # [batch, layer]
    each = (weights * read[:, :, None]).sum(-1) / among.clamp(min=1)[..., None]
    return each.sum(1) / (among > 0).sum(1, keepdim=True)


def global_sinks(weights: Tensor, real: Tensor, *, ratio: float = 2.0, spread: float = 0.5) -> Tensor:
    """Which tokens draw much weight from all patches alike. [batch, layer, token] boolean

    weights: [batch, layer, query, token]; real: which tokens are no padding. [batch, token] A sink's mean over queries
    is above `ratio` times the even share, 1 / number of tokens, and varies over them by less than `spread` of it.

    >>> weights = torch.tensor([[[[0.8, 0.1, 0.1], [0.8, 0.0, 0.2]]]])
    >>> global_sinks(weights, torch.ones(1, 3, dtype=torch.bool)).tolist()
    [[[True, False, False]]]
    """
    mean, deviation = weights.mean(2), weights.std(2, correction=0)
    share = 1 / real.sum(-1)[:, None, None]
    return (mean > ratio * share) & (deviation < spread * mean) & real[:, None]


def _magnets(tokenizer: Any, expression: str, given: Sequence[str] | None) -> list[str]:
    words = set(re.findall(r"\w+", expression.lower()))
    colour = [one for one in COLOURS if one not in words][:1]
    wanted = [*MAGNETS, *colour] if given is None else list(given)
    known = [
        one for one in wanted if tokenizer.unk_token_id not in tokenizer(one, add_special_tokens=False)["input_ids"]
    ]
    if given is not None and (unknown := [one for one in wanted if one not in known]):
        raise ValueError(f"refam: {type(tokenizer).__name__} does not know the magnet {unknown[0]!r}")
    return known


def _weights(
    pipeline: Any,
    model: nn.Module,
    pixels: Tensor,
    prompts: Sequence[str],
    time: float,
    seed: int,
    layers: Collection[int] | None,
) -> tuple[tuple[int, int], Tensor]:
    """Rows and columns of the patches, and weights on words, mean over heads. [batch, layer, query, token]"""
    latents = pixels.to(next(model.parameters()))
    if (coder := getattr(pipeline, "vae", None)) is not None:
        latents = coder.encode(latents).latent_dist.mode() * coder.config.scaling_factor
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)  # the pipeline's own keeps its state
    scheduler.set_timesteps(1000)
    total = scheduler.config.num_train_timesteps
    at = scheduler.timesteps[(scheduler.timesteps / total - time).abs().argmin()]
    noise = torch.randn(latents[:1].shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    noised = scheduler.add_noise(latents, noise.expand_as(latents), at.expand(len(latents)))
    seen: dict[int, Tensor] = {}
    grids: set[tuple[int, int]] = set()

    def given(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        named = bound(module, args, kwargs)
        name, times = parameters(module)[0], named["timestep"]
        if named[name].shape[1:] != noised.shape[1:]:
            raise ValueError(
                f"refam: pixel_values become {list(noised.shape)}, and the model paints {list(named[name].shape)}"
            )
        return (), {**named, name: noised, "timestep": torch.zeros_like(torch.as_tensor(times)) + at.to(noised.device)}

    @statistic("batch query token", title="Weights on words")
    def read(call: Call) -> None:
        if call.site.cross and (layers is None or call.site.layer in layers):
            grids.add(grid_of(call))
            seen[call.site.layer] = on_words(call, len(prompts)).cpu()

    with ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        hooks.attach(undo, model.register_forward_pre_hook, given, with_kwargs=True)
        undo.enter_context(record(model, read))
        pipeline(list(prompts), num_inference_steps=1, guidance_scale=1.0, output_type="pt")
    if len(grids) != 1:
        sizes = ", ".join(f"{a} x {b}" for a, b in sorted(grids)) or "none"
        raise ValueError(f"refam: the layers to read have patches of {sizes}; name some of one size: layers=")
    return grids.pop(), torch.stack([seen[layer] for layer in sorted(seen)], 1)
