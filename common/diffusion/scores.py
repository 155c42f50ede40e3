"""Scores of videos: by frozen models that are given as folders, and of two videos against each other.

- A Fréchet distance of features and the CLIP score, by transformers' models; VBench.
- PSNR and SSIM (Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity"), which
  compare a faster way of sampling with the plain one.

The Fréchet distance has the formula of published ones, but is comparable only to others by the same model. Published
FVD (arXiv:1812.01717) has the features of an I3D network, trained on Kinetics and released as a TorchScript file, of 16
frames of 224x224. Here the features are those of the given model.

Shapes: N clips, F frames, H height, W width, D features.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

PEAK = 255.0  # the largest uint8 pixel

# ---- frozen models ----


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Returns |mean a - mean b|^2 + Tr(A + B - 2 (A B)^(1/2)), computed in float64. A and B are the covariances of a
    [N, D] and b [M, D], with N and M at least 2. It is the squared 2-Wasserstein distance of two Gaussians
    (arXiv:1706.08500, equation 6).

    Let a and b be centred and scaled, so that A = a^T a and B = b^T b. Then the trace of (A B)^(1/2) is the sum of the
    singular values of a b^T. This needs no square root of a matrix, which is singular with fewer clips than features.
    """
    means = a.astype(np.float64).mean(0), b.astype(np.float64).mean(0)
    a, b = ((x - mean) / (len(x) - 1) ** 0.5 for x, mean in zip((a, b), means, strict=True))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((means[0] - means[1]) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)


class Features:
    """Computes a clip's features with a vision model of transformers.

    Features of an image model (CLIP, SigLIP, DINOv2, ViT, …) are its pooled output, averaged over the frames. Those of
    a video model (VideoMAE, ViViT, TimeSformer) are its pooled output for as many frames as it reads, evenly spaced. If
    there is no pooled output, the mean of the tokens replaces it. Frames are scaled, cropped and normalised as the
    folder's preprocessor_config.json says.
    """

    def __init__(self, folder: Path, device: torch.device):
        model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        self.model = getattr(model, "vision_model", model).to(device).eval()  # CLIP and SigLIP have a text model too
        self.kind, self.frames = self.model.config.model_type, getattr(self.model.config, "num_frames", None)
        self.processor = AutoImageProcessor.from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, video: np.ndarray) -> np.ndarray:
        """uint8 [F, H, W, 3] -> fp32 [D]."""
        if self.frames:
            video = video[np.linspace(0, len(video) - 1, self.frames).round().astype(int)]
        pixels = self.processor(list(video), return_tensors="pt")["pixel_values"].to(self.model.device)
        output = self.model(pixel_values=pixels)  # pixels [F, 3, h, w], of a video model [1, F, 3, h, w]
        pooled = getattr(output, "pooler_output", None)
        pooled = output.last_hidden_state.mean(1) if pooled is None else pooled  # [F, D], or [1, D]
        return pooled.mean(0).cpu().numpy()


class ClipScore:
    """Computes 100 cos(frame, caption) with a CLIP model, averaged over a clip's frames (arXiv:2104.08718 without its
    factor of 2.5 and its cut at 0). A caption is cut after CLIP's 77 tokens."""

    def __init__(self, folder: Path, device: torch.device):
        self.model = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).to(device).eval()
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, video: np.ndarray, caption: str) -> float:
        """uint8 [F, H, W, 3] -> a number in -100..100."""
        longest = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer([caption], truncation=True, max_length=longest, return_tensors="pt").to(self.model.device)
        pixels = self.processor(list(video), return_tensors="pt")["pixel_values"].to(self.model.device)
        frames = self.model.get_image_features(pixel_values=pixels).pooler_output  # [F, D]
        words = self.model.get_text_features(**text).pooler_output  # [1, D]
        return 100 * torch.cosine_similarity(frames, words).mean().item()


# ---- VBench ----

VBENCH = """
import json, sys, torch
from vbench import VBench
facts = json.load(sys.stdin)  # thousands of captions are too long for an argument
judge = VBench(torch.device(facts["device"]), "", facts["out"])
judge.evaluate(videos_path=facts["videos"], name="vbench", prompt_list=facts["captions"],
               dimension_list=facts["dimensions"], mode="custom_input")
"""


def vbench(python: Path, dimensions: list[str], captions: dict[str, str], videos: Path, out: Path, device: str) -> dict:
    """Returns VBench's scores (arXiv:2311.17982) of a folder's files, by dimension. captions: file name -> caption.

    VBench runs in an interpreter of its own: vbench 0.1.5 needs numpy < 2 and transformers 4.33, we need newer ones.

    Raises:
        ValueError: that interpreter has no vbench, or vbench fails; its own messages are printed before.
    """
    facts = {"device": device, "out": str(out), "videos": str(videos), "captions": captions, "dimensions": dimensions}
    unset = ("PYTHONPATH", "PYTHONSAFEPATH", "HF_HUB_OFFLINE", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run([python, "-c", VBENCH], input=json.dumps(facts), text=True, env=env, stdout=sys.stderr)
    if done.returncode:
        raise ValueError(
            f"vbench failed under {python}, see above; fix: install the package vbench there, or --vbench-python"
        )
    results = json.loads((out / "vbench_eval_results.json").read_text())
    return {dimension: float(results[dimension][0]) for dimension in dimensions}


# ---- two videos ----


def psnr(got: torch.Tensor, want: torch.Tensor) -> float:
    """Returns 10 log10(255^2 / mean squared error), in dB, over all pixels of two uint8 tensors; inf if equal.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(got, want)
    error = (got.double() - want.double()).square().mean().item()
    return 10 * math.log10(PEAK**2 / error) if error else math.inf


def ssim(got: torch.Tensor, want: torch.Tensor) -> float:
    """Returns the mean SSIM of two uint8 tensors [..., H, W], computed for every channel and frame by itself; 1 if
    equal. Means, variances and covariance are under an 11x11 Gaussian window of sigma 1.5, where it fits inside the
    frame; K1 = 0.01, K2 = 0.03.

    Raises:
        ValueError: the shapes differ, or a frame is smaller than the window.
    """
    _check_shapes(got, want)
    if min(got.shape[-2:]) < 11:
        raise ValueError(f"frames of {tuple(got.shape[-2:])} pixels; expected at least 11x11, the window of SSIM")
    x, y = (t.double().reshape(-1, 1, *t.shape[-2:]) for t in (got, want))  # [N, 1, H, W]
    offsets = torch.arange(11, dtype=torch.float64, device=x.device) - 5
    gaussian = torch.exp(-offsets.square() / (2 * 1.5**2))
    gaussian = gaussian / gaussian.sum()

    def blur(image: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(image, gaussian.view(1, 1, 11, 1)), gaussian.view(1, 1, 1, 11))  # [N, 1, H-10, W-10]

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    ratio = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (ratio / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()


def _check_shapes(got: torch.Tensor, want: torch.Tensor) -> None:
    if got.shape != want.shape:
        raise ValueError(f"videos of shapes {tuple(got.shape)} and {tuple(want.shape)}; expected one shape")
