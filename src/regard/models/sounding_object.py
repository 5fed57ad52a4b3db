"""Sound of the object that was clicked: attention of a text to a picture, replaced by a mask when sound is made.

Li et al., Sounding that Object: Interactive Object-Aware Image to Audio Generation (arXiv:2506.04214). No code was
found, and the paper was not at hand: formulas and settings are by a public reading note. A text's vector attends to the
patches of a picture, by scaled dot products of one head on purpose, and what it takes of them is the condition of a
latent diffusion model of sound. In training nobody says which object sounds; at the test the weights are replaced by a
segmentation mask, brought to their mean and variance.

Encoders, diffusion model, autoencoder and vocoder are the caller's: vectors of CLAP and patches of CLIP in the paper,
and AudioLDM's U-Net; here any U-Net of diffusers with cross attention, `UNet2DConditionModel`, and its schedulers.
Ours: where all of a mask or of the weights is equal, their mean is kept; more heads, as an ablation, each take the mask
at their own mean and variance; `MaskAttention` does the same in cross attention of other models.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ..call import Call
from ..extras import needs
from ..prediction import evaluating

Fit = Literal["moments", "sum"]
Predicts = Literal["epsilon", "sample", "v_prediction"]
BETAS: dict[str, Any] = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "linear"}  # of 1,000 steps


def match(mask: Tensor, weights: Tensor, *, fit: Fit = "moments") -> Tensor:
    """A mask in place of attention weights, over the last axis. [..., key]

    mask: how much of each patch the object covers, 0 to 1, broadcast to weights; several objects are the union of
    masks. fit: "moments" for the mean and deviation of the weights that it replaces, of one picture, where values may
    be below 0; "sum" for a mask that sums to 1. It is never a softmax. ValueError where a mask covers nothing.

    >>> import torch
    >>> from regard.models.sounding_object import match
    >>> match(torch.tensor([0.0, 1, 0, 0]), torch.tensor([0.7, 0.1, 0.1, 0.1]))
    tensor([0.1000, 0.7000, 0.1000, 0.1000])
    """
    if fit not in ("moments", "sum"):
        raise ValueError(f'match: fit is "moments" or "sum", got {fit!r}')
    if mask.shape[-1] != weights.shape[-1]:
        raise ValueError(f"match: the mask has a share of each of {weights.shape[-1]} patches; got {list(mask.shape)}")
    if not ((mask >= 0) & (mask <= 1)).all() or not (mask > 0).any(-1).all():
        raise ValueError("match: a mask is 0 to 1, and covers a part of a patch or more in each row")
    given, wide = weights.dtype, torch.promote_types(weights.dtype, torch.float32)  # squares leave half precision
    mask, weights = mask.to(wide), weights.to(wide)
    if fit == "sum":
        return (mask / mask.sum(-1, keepdim=True)).expand_as(weights).to(given)
    mean, apart = weights.mean(-1, keepdim=True), mask - mask.mean(-1, keepdim=True)
    spread = apart.square().mean(-1, keepdim=True).sqrt()
    own = (weights - mean).square().mean(-1, keepdim=True).sqrt()
    varies = mask.amax(-1, keepdim=True) > mask.amin(-1, keepdim=True)  # its spread is not 0 by rounding
    return (mean + own * torch.where(varies, apart / spread.where(varies, 1.0), 0.0)).to(given)


def patch_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """How much of each patch a mask of pixels covers, 0 to 1. [batch, row, column] -> [batch, key]"""
    return F.adaptive_avg_pool2d(mask.float()[:, None], grid).flatten(1)


class MaskAttention:
    """Under `regard.intervene`: cross attention whose weights are `match`ed to a mask. mask: [batch|1, key]

    layers: of the stack that are changed, all by default. What is no cross attention is left alone.

        with regard.intervene(model, MaskAttention(patch_mask(clicked, (14, 14)))): model(...)
    """

    def __init__(self, mask: Tensor, *, fit: Fit = "moments", layers: set[int] | None = None) -> None:
        if mask.ndim != 2:
            raise ValueError(f"MaskAttention: a mask is [batch, key], got {list(mask.shape)}")
        self.mask, self.layers = mask, layers
        self.fit: Fit = fit

    def weights(self, call: Call, weights: Tensor, rows: range) -> Tensor:
        """[batch, head, query, key]"""
        if not call.site.cross or (self.layers is not None and call.site.layer not in self.layers):
            return weights
        if len(self.mask) not in (1, len(weights)):
            raise ValueError(
                f"MaskAttention: {len(self.mask)} masks for {len(weights)} rows; give one, or one a row (guidance may "
                "double rows)"
            )
        return match(self.mask.to(weights.device)[:, None, None], weights, fit=self.fit)


def mask_attention(mask: Tensor, **knobs: Any) -> MaskAttention:
    """`MaskAttention` of this mask."""
    return MaskAttention(mask, **knobs)


class PatchAttention(nn.Module):
    """softmax(query key^T / sqrt(dim)) value, or its weights matched to a mask; and the weights that were used."""

    is_cross_attention = True

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, fit: Fit = "moments"
    ) -> tuple[Tensor, Tensor]:
        """[batch, head, query, dim], twice [batch, head, key, dim], mask [batch, key] -> output and weights"""
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        if mask is not None:
            weights = match(mask[:, None, None], weights, fit=fit)
        return weights @ value, weights


class Conditioned(NamedTuple):
    """What a diffusion model is told of a picture."""

    condition: Tensor  # [batch, 1, dim]
    weights: Tensor  # of patches, as used [batch, head, key]


class ObjectCondition(nn.Module, PyTorchModelHubMixin):
    """A text's view of a picture's patches, or a mask's. `save_pretrained` and `from_pretrained` as on the hub.

    text_dim, patch_dim: channels of both; dim: of the condition; patches: how many there are, each with a learned
    position; heads: more than the paper's one is an ablation. `regard.record` sees one layer of cross attention with
    one query, where no mask replaces it.

    >>> import torch
    >>> from regard.models.sounding_object import ObjectCondition
    >>> condition = ObjectCondition(text_dim=6, patch_dim=12, dim=8, patches=16)
    >>> found = condition(torch.randn(2, 6), torch.randn(2, 16, 12))
    >>> found.condition.shape, found.weights.shape
    (torch.Size([2, 1, 8]), torch.Size([2, 1, 16]))
    """

    def __init__(self, *, text_dim: int, patch_dim: int, dim: int, patches: int, heads: int = 1) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"ObjectCondition: {dim} channels do not divide by {heads} heads")
        self.text_dim, self.heads = text_dim, heads
        self.places = nn.Parameter(0.02 * torch.randn(patches, patch_dim))
        self.query, self.key, self.value = (nn.Linear(n, dim, bias=False) for n in (text_dim, patch_dim, patch_dim))
        self.attention = PatchAttention()

    def forward(
        self, text: Tensor, patches: Tensor, mask: Tensor | None = None, *, fit: Fit = "moments"
    ) -> Conditioned:
        """text [batch, dim], patches [batch, key, dim]; mask: share of each patch [batch, key], in place of the text's
        attention. ValueError for other shapes, and a mask without a covered patch.
        """
        if text.ndim != 2 or text.shape[1] != self.text_dim or patches.shape != (len(text), *self.places.shape):
            raise ValueError(
                f"ObjectCondition: text [batch, {self.text_dim}] and patches [batch, {self.places.shape[0]}, "
                f"{self.places.shape[1]}]; got {list(text.shape)} and {list(patches.shape)}"
            )
        if mask is not None and mask.shape != patches.shape[:2]:
            raise ValueError(f"ObjectCondition: a mask is {list(patches.shape[:2])}; got {list(mask.shape)}")
        placed = patches + self.places
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, x in ((self.query, text[:, None]), (self.key, placed), (self.value, placed))
        )
        found, weights = self.attention(query, key, value, mask, fit)
        return Conditioned(found.transpose(1, 2).flatten(2), weights[:, :, 0])


class SoundingObject(nn.Module):
    """A U-Net of diffusers with the condition that it is told. Train it with `loss`, make sound with `generate`.

    unet: `UNet2DConditionModel`, or any that takes (sample, timestep, encoder_hidden_states); condition: of the width
    of its cross attention; drop: share of rows trained without a condition, for guidance; shape: of one latent
    [channel, row, column], such as of a mel spectrogram; predicts: "epsilon" for the noise, as in the paper, "sample"
    for the clean latents, or "v_prediction", as diffusers' schedulers call them.
    """

    def __init__(
        self,
        unet: nn.Module,
        condition: ObjectCondition,
        *,
        shape: tuple[int, int, int],
        drop: float = 0.1,
        predicts: Predicts = "epsilon",
    ) -> None:
        super().__init__()
        if not 0 <= drop < 1:
            raise ValueError(f"SoundingObject: drop is a share, 0 up to 1, got {drop}")
        if predicts not in get_args(Predicts):
            raise ValueError(f"SoundingObject: predicts is one of {', '.join(get_args(Predicts))}, got {predicts!r}")
        with needs("sounding_object", "diffusers"):
            from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        self.unet, self.condition, self.shape, self.drop = unet, condition, shape, drop
        self.schedule: Any = DDIMScheduler(1000, clip_sample=False, prediction_type=predicts, **BETAS)

    def loss(
        self, latents: Tensor, text: Tensor, patches: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean squared error of what is predicted. latents: [batch, channel, row, column]

        generator: of noise, steps and dropped conditions, on the CPU.
        """
        if latents.shape != (len(text), *self.shape):
            raise ValueError(f"SoundingObject: latents are {[len(text), *self.shape]}; got {list(latents.shape)}")
        told = self.condition(text, patches).condition
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        steps = torch.randint(1000, (len(latents),), generator=generator).to(latents.device)
        kept = (torch.rand(len(latents), generator=generator) >= self.drop).to(told)
        noisy = self.schedule.add_noise(latents, noise, steps)
        found = self.unet(noisy, steps, encoder_hidden_states=told * kept[:, None, None]).sample
        kind = self.schedule.config.prediction_type
        if kind == "v_prediction":
            return (found - self.schedule.get_velocity(latents, noise, steps)).square().mean()
        return (found - (latents if kind == "sample" else noise)).square().mean()

    @torch.no_grad()
    def generate(
        self,
        text: Tensor,
        patches: Tensor,
        mask: Tensor | None = None,
        *,
        steps: int = 200,
        guidance: float = 2.0,
        fit: Fit = "moments",
        seed: int | Sequence[int] = 0,
    ) -> Tensor:
        """Latents by DDIM, of the text's objects or, with a mask, of what it covers. [batch, channel, row, column]

        mask: share of each patch [batch, key]; guidance: how far away from what is made without a condition, 1 for
        none; seed: of the noise, one for all rows, which then differ by what they are told, or one a row.
        """
        if steps < 1:
            raise ValueError(f"SoundingObject: steps are 1 or more, got {steps}")
        with evaluating(self):
            told = self.condition(text, patches, mask, fit=fit).condition
            seeds = [int(seed)] * len(told) if isinstance(seed, int | Integral) else list(seed)
            if len(seeds) != len(told):
                raise ValueError(f"SoundingObject: {len(told)} rows and {len(seeds)} seeds; give one, or one a row")
            noise = [torch.randn(self.shape, generator=torch.Generator().manual_seed(n)) for n in seeds]
            latents = torch.stack(noise).to(told) if noise else told.new_zeros(0, *self.shape)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy, at how diffusers makes arrays
                self.schedule.set_timesteps(steps)
            for step in self.schedule.timesteps:
                at = step.to(told.device)
                found = self.unet(latents, at, encoder_hidden_states=told).sample
                if guidance != 1:
                    without = self.unet(latents, at, encoder_hidden_states=torch.zeros_like(told)).sample
                    found = without + guidance * (found - without)
                latents = self.schedule.step(found, step, latents).prev_sample
            return latents


def sounding_object(
    unet: nn.Module, condition: ObjectCondition, *, shape: tuple[int, int, int], **knobs: Any
) -> SoundingObject:
    """A `SoundingObject` of these parts, with its knobs."""
    return SoundingObject(unet, condition, shape=shape, **knobs)
