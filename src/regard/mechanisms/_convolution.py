"""Convolutions as long as the sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def convolved(hidden: Tensor, kernel: Tensor) -> Tensor:
    """Each channel with its kernel, over the past: output_t = sum of kernel_s hidden_(t - s). [batch, token, dim]

    kernel: [dim, lag], of at most as many lags as there are tokens.
    """
    n, exact = hidden.shape[1], torch.promote_types(hidden.dtype, torch.float32)
    length = n + kernel.shape[1]  # so that the end does not come back at the beginning
    spectrum = torch.fft.rfft(hidden.to(exact), length, dim=1) * torch.fft.rfft(kernel.to(exact).mT, length, dim=0)
    return torch.fft.irfft(spectrum, length, dim=1)[:, :n].to(hidden.dtype)
