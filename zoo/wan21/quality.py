"""How near two videos are: PSNR, and SSIM (Wang et al. 2004, "Image quality assessment: from error visibility to
structural similarity"), as a faster way of sampling is judged against the plain one."""

import math

import torch
import torch.nn.functional as F

PEAK = 255.0  # of uint8 pixels


def psnr(got: torch.Tensor, want: torch.Tensor) -> float:
    """10 log10(255^2 / mean squared error) in dB over all pixels of two uint8 tensors of one shape; inf if equal.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(got, want)
    error = (got.double() - want.double()).square().mean().item()
    return 10 * math.log10(PEAK**2 / error) if error else math.inf


def ssim(got: torch.Tensor, want: torch.Tensor) -> float:
    """Mean SSIM of two uint8 tensors [..., H, W], every channel and frame by itself: means, variances and covariance
    under an 11x11 Gaussian window of sigma 1.5, where it fits inside the frame; K1 = 0.01, K2 = 0.03. 1 if equal.

    Raises:
        ValueError: the shapes differ, or a frame is smaller than the window.
    """
    _same_shape(got, want)
    if min(got.shape[-2:]) < 11:
        raise ValueError(f"frames of {tuple(got.shape[-2:])} pixels; expected at least 11x11, the window of SSIM")
    x, y = (t.double().reshape(-1, 1, *t.shape[-2:]) for t in (got, want))  # [N, 1, H, W]
    offsets = torch.arange(11, dtype=torch.float64, device=x.device) - 5
    bell = torch.exp(-offsets.square() / (2 * 1.5**2))
    bell = bell / bell.sum()

    def blur(image: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(image, bell.view(1, 1, 11, 1)), bell.view(1, 1, 1, 11))  # [N, 1, H-10, W-10]

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    ratio = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (ratio / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()


def _same_shape(got: torch.Tensor, want: torch.Tensor) -> None:
    if got.shape != want.shape:
        raise ValueError(f"videos of shapes {tuple(got.shape)} and {tuple(want.shape)}; expected one shape")
