"""How large a room is, from speech in it: a transformer of overlapping patches of a spectrogram and of its phase.

Attention Is All You Need For Blind Room Volume Estimation (arXiv:2309.13504): regression of the logarithm of the volume
by an audio spectrogram transformer (AST) that starts from one trained on pictures. The transformer is transformers'
`ASTModel`; its "convolution" is the linear map of patches.

No code of the authors is at hand, and features follow notes on this paper and on the convolutional network before it
(arXiv:2303.07449), not checked against the text: 20 gammatone bands from 50 Hz to 2 kHz, phases of five of those below
500 Hz, and five differences to the phase of the next band. Which five is ours, evenly spread, as are the log energy and
the filters' form in the domain of frequency. Four seconds at 16 kHz are 1999 columns. Cut: SpecAugment, which the full
method has in training.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ASTConfig, ASTModel


def centres(bands: int = 20, low: float = 50.0, high: float = 2000.0) -> Tensor:
    """Frequencies of the bands in Hz, evenly spread on the scale of equivalent rectangular bandwidths. [band]"""
    if bands < 1 or not 0 < low <= high:
        raise ValueError(f"gammatone: one band or more between frequencies that rise; got {bands}, {low}, {high}")
    first, last = (21.4 * math.log10(1 + 0.00437 * f) for f in (low, high))
    return (10 ** (torch.linspace(first, last, bands, dtype=torch.float64) / 21.4) - 1) / 0.00437


def filtered(waves: Tensor, rate: int, frequencies: Tensor) -> Tensor:
    """Waves through gammatone filters of order 4, as analytic signals. [batch, sample] -> complex [batch, band, sample]

    A filter passes its own frequency as it is; its bandwidth is 1.019 of the equivalent rectangular one. The real part
    is what the filter gives. ValueError for frequencies beyond half of the rate, and waves that are not finite.
    """
    if waves.ndim != 2 or not waves.numel() or not waves.is_floating_point() or not waves.isfinite().all():
        raise ValueError(
            f"gammatone: waves are finite numbers [batch, sample], one or more; got {waves.dtype} {list(waves.shape)}"
        )
    if float(frequencies.max()) >= rate / 2:
        raise ValueError(
            f"gammatone: bands up to {float(frequencies.max()):g} Hz need more than {rate} samples a second"
        )
    size = waves.shape[1] + rate // 10  # room for the filters' ringing
    at = torch.arange(size // 2 + 1, dtype=torch.float64) * rate / size
    width = 1.019 * 24.7 * (4.37 * frequencies / 1000 + 1)
    passed = (2 * (1 + 1j * (at - frequencies[:, None]) / width[:, None]) ** -4).to(waves.device, torch.complex64)
    spectrum = torch.fft.rfft(waves.float(), size)[:, None] * passed
    return torch.fft.ifft(F.pad(spectrum, (0, size - spectrum.shape[-1])))[..., : waves.shape[1]]


def features(
    waves: Tensor,
    rate: int = 16_000,
    *,
    bands: int = 20,
    low: float = 50.0,
    high: float = 2000.0,
    window: int = 64,
    hop: int = 32,
    phases: int = 5,
    below: float = 500.0,
) -> Tensor:
    """Log energies of gammatone bands, phases of some and their differences. [batch, sample] -> [batch, row, column]

    rate: samples a second; window, hop: in samples, of the mean of the energy; phases: of how many bands `below` a
    frequency in Hz, at the middle of the window, in radians, and as many differences to the next band, -pi to pi.
    Rows: bands, from low to high, then `phases` and `phases` more. In float32. ValueError for no clip, less than a
    window, and where fewer bands lie below.

    >>> import torch
    >>> features(torch.randn(2, 64_000)).shape
    torch.Size([2, 30, 1999])
    """
    if waves.ndim != 2 or waves.shape[1] < window or hop < 1 or window < 1:
        raise ValueError(f"features: waves are [batch, sample], {window} samples or more; got {list(waves.shape)}")
    frequencies = centres(bands, low, high)
    passed = filtered(waves, rate, frequencies)
    power = passed.abs().square().unfold(-1, window, hop).mean(-1) / 2
    rows = [(power + 1e-10).log()]
    under = min(int((frequencies < below).sum()), bands - 1)
    if not 0 <= phases <= under:
        raise ValueError(
            f"features: {under} bands below {below:g} Hz have a next one, for {phases} phases; ask for fewer"
        )
    if phases:
        at = torch.linspace(0, under - 1, phases).round().long()
        middle = passed[..., window // 2 :: hop][..., : power.shape[-1]]
        rows += [middle[:, at].angle(), (middle[:, at + 1] * middle[:, at].conj()).angle()]
    return torch.cat(rows, 1)


class RoomVolume(nn.Module, PyTorchModelHubMixin):
    """Log10 of a room's volume in cubic metres, from features. [batch, row, column] -> [batch]

    rows, columns: of the features; patch, stride: of the patches, in both directions; dim, layers, heads: of the
    transformer. The class token is read. Saved and loaded as on the hub; `regard.record` sees the layers' self
    attention, whose first two tokens are the class and distillation tokens.

    ValueError for features smaller than a patch.

    >>> import torch
    >>> from regard.models.room_volume import room_volume
    >>> model = room_volume(rows=24, columns=60, patch=8, stride=6, dim=16, layers=1, heads=2)
    >>> model(torch.randn(3, 24, 60)).shape, model.grid
    (torch.Size([3]), (3, 9))
    """

    middle: Tensor
    spread: Tensor

    def __init__(
        self,
        *,
        rows: int = 30,
        columns: int = 1999,
        patch: int = 16,
        stride: int = 10,
        dim: int = 768,
        layers: int = 12,
        heads: int = 12,
    ) -> None:
        super().__init__()
        if not 1 <= patch <= min(rows, columns) or stride < 1 or heads < 1 or dim < 1 or dim % heads:
            raise ValueError(
                f"RoomVolume: features of {rows} rows and {columns} columns hold no patch of {patch}, the stride of "
                f"{stride} is below 1, or {dim} channels do not divide by {heads} heads"
            )
        self.size, self.grid = (rows, columns), ((rows - patch) // stride + 1, (columns - patch) // stride + 1)
        self.transformer = ASTModel(
            ASTConfig(
                hidden_size=dim,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * dim,
                patch_size=patch,
                frequency_stride=stride,
                time_stride=stride,
                num_mel_bins=rows,
                max_length=columns,
            )
        )
        self.read = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 1))
        self.register_buffer("middle", torch.zeros(rows, 1))
        self.register_buffer("spread", torch.ones(rows, 1))

    def standardise(self, features: Tensor, volumes: Tensor | None = None) -> None:
        """Take each row's mean and deviation from features of training, and what to say at first from their volumes.

        ValueError for features of another size, and for those that are not finite.
        """
        self._fits(features)
        if not features.isfinite().all():
            raise ValueError("RoomVolume: features to standardise by hold values that are not finite")
        self.middle.copy_(features.mean((0, 2))[:, None])
        self.spread.copy_(features.std((0, 2))[:, None].clamp_min(1e-6))
        if volumes is not None:
            nn.init.constant_(self.read[1].bias, float(_logs(volumes).mean()))  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        self._fits(features)
        tokens = self.transformer(((features - self.middle) / self.spread).mT).last_hidden_state
        return self.read(tokens[:, 0])[:, 0]

    def _fits(self, features: Tensor) -> None:
        if features.ndim != 3 or features.shape[1:] != self.size or not len(features):
            raise ValueError(
                f"RoomVolume: features are [batch, {self.size[0]}, {self.size[1]}], one clip or more; "
                f"got {list(features.shape)}"
            )

    def loss(self, features: Tensor, volumes: Tensor) -> Tensor:
        """Mean squared error of log10 of volumes in cubic metres [batch].

        ValueError where one is not above 0, and where there is not one of each clip.
        """
        if volumes.shape != features.shape[:1]:
            raise ValueError(f"RoomVolume: volumes are [{len(features)}], one a clip; got {list(volumes.shape)}")
        return F.mse_loss(self(features), _logs(volumes))

    @torch.no_grad()
    def start_from(self, pictures: nn.Module) -> None:
        """Take the weights of a picture transformer, transformers' `ViTModel` of the same width, depth and patch.

        Its maps of red, green and blue are added, its positions cut where there are fewer here (the middle ones stay)
        and interpolated where there are more; the distillation token starts as the class token. ValueError where a
        weight does not fit, and for pictures that are not square.
        """
        theirs, own = pictures.state_dict(), self.transformer.state_dict()
        key = "embeddings.position_embeddings"
        count = theirs[key].shape[1] - 1 if key in theirs else -1
        across = math.isqrt(max(count, 0))
        if count < 1 or across**2 != count:
            raise ValueError(
                f"RoomVolume: starts from a ViTModel of square pictures, with one token before the patches; got "
                f"{type(pictures).__name__} with {list(theirs[key].shape) if key in theirs else 'no'} positions"
            )
        whole = theirs[key][:, :1]
        places = theirs[key][:, 1:].unflatten(1, (across, across)).permute(0, 3, 1, 2)
        for axis, wanted in zip((2, 3), self.grid, strict=True):
            if wanted <= across:
                places = places.narrow(axis, (across - wanted) // 2, wanted)
            else:
                size = (wanted, places.shape[3]) if axis == 2 else (places.shape[2], wanted)
                places = F.interpolate(places, size, mode="bilinear")
        new = {
            **{name: value for name, value in theirs.items() if name in own},
            key: torch.cat([whole, whole, places.flatten(2).mT], 1),
            "embeddings.distillation_token": theirs["embeddings.cls_token"],
            "embeddings.patch_embeddings.projection.weight": theirs[
                "embeddings.patch_embeddings.projection.weight"
            ].sum(1, keepdim=True),
        }
        for name, value in own.items():
            if name not in new or new[name].shape != value.shape:
                found = list(new[name].shape) if name in new else "none"
                raise ValueError(f"RoomVolume: {name} is {list(value.shape)} here, and {found} there")
        self.transformer.load_state_dict(new)


def mean_mult(predicted: Tensor, true: Tensor) -> Tensor:
    """By which factor volumes are off, 1 or more: exp of the mean of |ln(predicted / true)|. Both [room], above 0

    ValueError for other shapes, none at all, and volumes that are not above 0.

    >>> import torch
    >>> round(float(mean_mult(torch.tensor([200.0]), torch.tensor([100.0]))), 4)
    2.0
    """
    if predicted.shape != true.shape or not true.numel():
        raise ValueError(
            f"mean_mult: predicted and true are both [room], one or more; got {list(predicted.shape)} and "
            f"{list(true.shape)}"
        )
    return (_logs(predicted) - _logs(true)).abs().mul(math.log(10)).mean().exp()


def _logs(volumes: Tensor) -> Tensor:
    if not (volumes > 0).all() or not volumes.isfinite().all():
        raise ValueError("volumes are above 0, in cubic metres; give no logarithms")
    return volumes.log10()


def room_volume(**sizes: Any) -> RoomVolume:
    """An untrained `RoomVolume` of these sizes."""
    return RoomVolume(**sizes)
