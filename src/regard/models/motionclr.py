"""Motion from text by diffusion, with one attention over frames and one over words, and edits of motions by both.

Chen et al., MotionCLR: Motion Generation and Training-free Editing via Understanding Attention Mechanisms
(arXiv:2410.18977); block, attention and edits as in the authors' code (IDEA-Research/MotionCLR). A U-Net over time
foretells the clean motion; each of its blocks has self attention over frames, then cross attention to the words. The
edits are interventions of `regard.intervene`, and of `generate`. Of two motions made from one noise, row 0 is the
source and row 1 is edited.

Words are features of any text encoder, [batch, key, dim]; the authors' is CLIP's, frozen, with a begin-of-text token
first. Noise schedules are those of diffusers. Deviations: the authors' emphasis touches the token after the word too,
and their erasure counts keys without begin-of-text; here the keys named are the ones changed. Counting of actions and
generation grounded in places of the text are not here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ..extras import needs
from ..seam import intervene
from ._motion_edits import Edit, Emphasise, Erase, Example, Replace, Shift, Style

__all__ = [
    "Edit",
    "Emphasise",
    "Erase",
    "Example",
    "MotionAttention",
    "MotionCLR",
    "Replace",
    "Shift",
    "Style",
    "denoising_loss",
    "generate",
    "motionclr",
]


class MotionAttention(nn.Module):
    """Softmax attention of frames to frames, or to words; heads are joined without a further map.

    dim: of frames; words: of what the keys are made, dim unless given.
    """

    def __init__(self, dim: int, heads: int, *, words: int | None = None) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"MotionAttention: {dim} channels do not divide by {heads} heads")
        own = dim if words is None else words
        self.heads, self.is_causal, self.is_cross_attention = heads, False, words is not None
        self.norm, self.norm_words = nn.LayerNorm(dim), nn.Identity() if words is None else nn.LayerNorm(own)
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(own, dim), nn.Linear(own, dim)

    def forward(self, frames: Tensor, words: Tensor | None = None) -> Tensor:
        """frames: [batch, query, dim]; words: [batch, key, dim]. -> [batch, query, dim]"""
        frames = self.norm(frames)
        other = frames if words is None else self.norm_words(words)
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, x in ((self.query, frames), (self.key, other), (self.value, other))
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class MotionBlock(nn.Module):
    """Convolutions told the time, then self attention, cross attention and an MLP; all with residuals."""

    def __init__(self, channels: int, dim: int, time_dim: int, words: int, heads: int, groups: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(a, dim, 5, padding=2) for a in (channels, dim))
        self.norms = nn.ModuleList(nn.GroupNorm(groups, dim) for _ in range(2))
        self.time = nn.Sequential(nn.Mish(), nn.Linear(time_dim, 2 * dim))
        self.residual = nn.Identity() if channels == dim else nn.Conv1d(channels, dim, 1)
        self.self_attention, self.cross_attention = (
            MotionAttention(dim, heads),
            MotionAttention(dim, heads, words=words),
        )
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        for layer in (self.convolutions[1], self.mlp[2]):
            for weight in layer.parameters():
                nn.init.zeros_(weight)

    def forward(self, x: Tensor, time: Tensor, words: Tensor, told: Tensor) -> Tensor:
        """x [batch, channel, frame], time [batch, dim], words [batch, key, dim], told: boolean [batch]"""
        scale, shift = self.time(time)[..., None].chunk(2, 1)
        found = F.mish(self._normed(0, self.convolutions[0](x)) * (1 + scale) + shift)
        found = F.mish(self._normed(1, self.convolutions[1](found)))
        x = (found + self.residual(x)).mT
        if bool(told.any()):
            x = x + self.self_attention(x)
            x = x + self.cross_attention(x, words) * told[:, None, None]
        return (x + self.mlp(x)).mT

    def _normed(self, i: int, x: Tensor) -> Tensor:
        """Over the channels of each frame, in groups."""
        return self.norms[i](x.mT.flatten(0, 1)).unflatten(0, (x.shape[0], -1)).mT


class MotionCLR(nn.Module, PyTorchModelHubMixin):
    """The clean motion, foretold from a noisy one and words. [batch, frame, channel] to the same

    channels: of a motion; words: of a word's features; dim, multipliers: channels of each level of the U-Net are dim
    times these; time_dim; heads; text_dim, text_layers: of the transformer that reads the words; groups: of the norms.
    Frames are filled up to a multiple of two to the number of levels. `regard.record` sees self and cross attention
    of every block, from the finest level down and up again, and that of the words.

    >>> import torch
    >>> from regard.models.motionclr import MotionCLR
    >>> model = MotionCLR(4, 12, dim=8, multipliers=(1, 2), heads=2, text_dim=8)
    >>> model(torch.randn(2, 10, 4), torch.tensor([5, 900]), torch.randn(2, 6, 12)).shape
    torch.Size([2, 10, 4])
    """

    def __init__(
        self,
        channels: int,
        words: int,
        *,
        dim: int = 512,
        multipliers: Sequence[int] = (2, 2, 2, 2),
        time_dim: int = 512,
        heads: int = 8,
        text_dim: int = 256,
        text_layers: int = 4,
        groups: int = 8,
    ) -> None:
        super().__init__()
        self.channels, self.time_dim, self.levels = channels, time_dim, len(multipliers)
        widths = [dim * m for m in multipliers]
        of: dict[str, Any] = {"time_dim": time_dim, "words": text_dim, "heads": heads, "groups": groups}
        layer = nn.TransformerEncoderLayer(text_dim, 4, 4 * text_dim, 0.1, "gelu", batch_first=True)
        self.read = nn.Linear(words, text_dim)
        self.text = nn.TransformerEncoder(layer, text_layers, enable_nested_tensor=False) if text_layers else None
        self.text_norm = nn.LayerNorm(text_dim)
        self.time = nn.Sequential(nn.Linear(time_dim, 4 * time_dim), nn.Mish(), nn.Linear(4 * time_dim, time_dim))

        def pair(first: int, then: int) -> nn.ModuleList:
            return nn.ModuleList([MotionBlock(first, then, **of), MotionBlock(then, then, **of)])

        self.down = nn.ModuleList(pair(a, b) for a, b in zip([channels, *widths[:-1]], widths, strict=True))
        self.shorter = nn.ModuleList(nn.Conv1d(w, w, 3, 2, 1) for w in widths)
        self.middle = pair(widths[-1], widths[-1])
        below = [*widths[1:], widths[-1]]
        self.wider = nn.ModuleList(nn.ConvTranspose1d(b, w, 4, 2, 1) for b, w in zip(below, widths, strict=True))
        self.up = nn.ModuleList(pair(2 * w, w) for w in widths)
        self.out = nn.Conv1d(widths[0], channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, motion: Tensor, step: Tensor, words: Tensor, told: Tensor | None = None) -> Tensor:
        """motion: noisy [batch, frame, channel]; step: of diffusion [batch]; words: [batch, key, dim].

        told: boolean [batch], False where a motion is made without its text, all True unless given.
        """
        told = torch.ones(len(motion), dtype=torch.bool, device=motion.device) if told is None else told
        if motion.ndim != 3 or motion.shape[-1] != self.channels or words.ndim != 3 or len(words) != len(motion):
            raise ValueError(
                f"MotionCLR: takes motions [batch, frame, {self.channels}] and words [batch, key, dim]; got "
                f"{list(motion.shape)} and {list(words.shape)}"
            )
        words = self.read(words)
        words = self.text_norm(words if self.text is None else self.text(words))
        time = self.time(_waves(step, self.time_dim).to(motion.dtype))
        frames = motion.shape[1]
        x = F.pad(motion.mT, (0, -frames % 2**self.levels))
        kept = []
        for blocks, halve in zip(self.down, self.shorter, strict=True):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, time, words, told)
            kept.append(x)
            x = halve(x)
        for block in self.middle:
            x = block(x, time, words, told)
        for level in reversed(range(self.levels)):
            x = torch.cat([self.wider[level](x), kept[level]], 1)
            for block in self.up[level]:  # type: ignore[attr-defined]
                x = block(x, time, words, told)
        return self.out(x).mT[:, :frames]


def _waves(step: Tensor, dim: int) -> Tensor:
    rates = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=step.device) / (dim // 2 - 1))
    angles = step[:, None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def schedule(kind: str = "training") -> Any:
    """diffusers' schedule of noise: of training, or for sampling in few steps. Both foretell the clean motion."""
    with needs("motionclr", "diffusers"):
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    how: dict[str, Any] = {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "sample"}
    if kind == "training":
        return DDPMScheduler(**how)
    return DPMSolverMultistepScheduler(**how, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)


_training_schedule = cache(schedule)


def denoising_loss(model: MotionCLR, motion: Tensor, words: Tensor, mask: Tensor | None = None, *, drop: float = 0.1):
    """Squared error of the clean motion at random steps, over real frames; texts are dropped now and then.

    motion: [batch, frame, channel]; words: [batch, key, dim]; mask: boolean [batch, frame], False where filled up.
    """
    step = torch.randint(1000, (len(motion),), device=motion.device)
    noisy = _training_schedule().add_noise(motion, torch.randn_like(motion), step)
    off = (model(noisy, step, words, torch.rand(len(motion), device=motion.device) >= drop) - motion).square()
    return off.mean() if mask is None else off[mask].mean()


@torch.no_grad()
def generate(
    model: MotionCLR,
    words: Tensor,
    frames: int,
    *,
    edits: Sequence[Edit] = (),
    steps: int = 10,
    guidance: float = 2.5,
    seed: int = 0,
) -> Tensor:
    """Motions from words [batch, key, dim], under edits. [batch, frame, channel]

    All rows start from the same noise, so that what an edited row changes is the edit's. guidance: how far away from
    what is made without words; the rows without words stand behind those with them, and edits do not touch them.
    """
    noise = torch.Generator().manual_seed(seed)
    sampler, batch = schedule("sampling"), len(words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy, at how diffusers makes arrays
        sampler.set_timesteps(steps)
    x = torch.randn(1, frames, model.channels, generator=noise).to(words).expand(batch, -1, -1)
    told = torch.arange(2 * batch, device=words.device) < batch
    for i, at in enumerate(sampler.timesteps):
        for edit in edits:
            edit.step = i
        with intervene(model, *edits):
            both = model(torch.cat([x, x]), at.to(x.device).expand(2 * batch), torch.cat([words, words]), told)
        with_words, without = both.chunk(2)
        fresh = torch.randn(1, frames, model.channels, generator=noise).to(words).expand(batch, -1, -1)
        guess = without + guidance * (with_words - without)
        x = sampler.step(guess, at, x, variance_noise=fresh).prev_sample
    return x


def motionclr(channels: int, words: int, **sizes: Any) -> MotionCLR:
    """An untrained `MotionCLR` of these sizes."""
    return MotionCLR(channels, words, **sizes)
