"""The frozen parts around the transformer: Wan VAE (diffusers), umT5 text encoder and CLIP image encoder (transformers).

All are used as released, in fp32 (VAE, CLIP) and the run's precision (text); none is trained.
"""

import functools
import html
import re
import sys
from pathlib import Path

import ftfy
import torch
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel, UMT5EncoderModel

from common import device

from .config import WanConfig


class Encoders:
    """All that a size needs of a released folder, each loaded when it is first used."""

    def __init__(self, folder: Path, config: WanConfig, precision: str, tiling: bool):
        self.folder, self.config, self.device, self.tiling = folder, config, device.current(), tiling
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]

    @functools.cached_property
    def codec(self) -> "VideoCodec":
        return VideoCodec(self.folder, self.device, self.tiling)

    @functools.cached_property
    def text(self) -> "TextEncoder":
        return TextEncoder(self.folder, self.device, self.dtype, self.config.text_len)

    @functools.cached_property
    def frames(self) -> "FrameEncoder | None":
        return FrameEncoder(self.folder, self.codec) if self.config.given_frames else None

    def encode(self, pixels: torch.Tensor, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """uint8 [B, 3, F, H, W] -> (latents [B, C, f, h, w] fp32, text [B, text_len, D], of image-to-video the
        condition of `FrameEncoder.encode`, of each video's own first, or first and last, frame)."""
        latents, text, condition = self.codec.encode(pixels), self.text.encode(captions), {}
        if self.frames:
            condition = self.frames.encode(pixels[:, :, [0, -1][: self.config.given_frames]], pixels.shape[2])
        return latents, text, condition


class VideoCodec:
    """Pixels <-> normalised latents: (posterior mean - latents_mean) / latents_std, never a sample."""

    def __init__(self, folder: Path, device: torch.device, tiling: bool = False):
        self.vae = AutoencoderKLWan.from_pretrained(folder / "vae", use_safetensors=True).to(device).eval()
        self.vae.requires_grad_(False)
        if tiling:  # pictures in overlapping tiles of 256x256 pixels, blended: less memory, not quite the same values
            self.vae.enable_tiling()
        self.decoder = lambda latents: self.vae.decode(latents).sample  # or over several ranks: see vae_parallel.py
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(self.vae.config.latents_mean, device=device).view(shape)
        self.std = torch.tensor(self.vae.config.latents_std, device=device).view(shape)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, F, H, W] with F = 4n+1 -> fp32 [B, 16, n+1, H/8, W/8]."""
        return self._normalised(pixels.to(self.mean.device).float() / 127.5 - 1)

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, F, H, W] in [-1, 1] -> [B, 16, n+1, H/8, W/8]."""
        return (self.vae.encode(x).latent_dist.mode() - self.mean) / self.std

    @torch.no_grad()
    def encode_given(self, given: torch.Tensor, frames: int) -> torch.Tensor:
        """The first frame, uint8 [B, 3, 1, H, W], or with the last one [B, 3, 2, H, W], of a video of `frames` -> what
        image-to-video sees of it, fp32 [B, 4 + 16, n+1, H/8, W/8]: which frames of each latent frame's four are given
        (1) or not, and the latents of the video whose other frames are grey (0 of [-1, 1])."""
        given = given.to(self.mean.device).float() / 127.5 - 1
        x = given.new_zeros(*given.shape[:2], frames, *given.shape[3:])
        x[:, :, 0], last = given[:, :, 0], given.shape[2] == 2
        if last:
            x[:, :, -1] = given[:, :, 1]
        latents = self._normalised(x)
        mask = torch.zeros_like(latents[:, :4])
        mask[:, :, 0] = 1  # the first latent frame is one frame alone
        if last:
            mask[:, 3, -1] = 1
        return torch.cat((mask, latents), dim=1)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, 16, f, h, w] -> uint8 [B, 3, 4f-3, 8h, 8w] on the CPU."""
        x = self.decoder(latents.float() * self.std + self.mean)
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


class TextEncoder:
    """Captions -> embeddings of the model's text_len."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, text_len: int):
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.model = UMT5EncoderModel.from_pretrained(folder / "text_encoder", use_safetensors=True, dtype=dtype)
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.text_len = text_len
        self.cut: set[str] = set()  # captions of which the end was left out

    @torch.no_grad()
    def encode(self, captions: list[str]) -> torch.Tensor:
        """-> [B, text_len, text_dim], zeros behind each caption's closing </s>: Wan attends to the padding too. Says which
        captions are longer than that, and cut."""
        captions = [clean(c) for c in captions]
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=self.text_len, truncation=True, return_tensors="pt"
        )
        for caption, length in zip(captions, tokens.attention_mask.sum(1).tolist(), strict=True):
            if length == self.text_len and caption not in self.cut:
                self._say_if_cut(caption)
        tokens = tokens.to(self.model.device)
        states = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state  # [B, T, text_dim]
        return states.masked_fill(tokens.attention_mask.unsqueeze(-1) == 0, 0)

    def _say_if_cut(self, caption: str) -> None:
        """Every one of the first 10, then every tenfold."""
        length = len(self.tokenizer(caption).input_ids)
        if length <= self.text_len:
            return
        self.cut.add(caption)
        count = len(self.cut)
        if count <= 10 or str(count).strip("0") == "1":
            print(
                f"warning: {count}. caption longer than the text encoder's {self.text_len} tokens: the last "
                f"{length - self.text_len} of {length} are left out of {caption[:60]!r}…",
                file=sys.stderr, flush=True,
            )  # fmt: skip


class FrameEncoder:
    """The given frames of videos -> what image-to-video is conditioned on."""

    def __init__(self, folder: Path, codec: VideoCodec):
        self.codec, self.device = codec, codec.mean.device
        self.processor = CLIPImageProcessorPil.from_pretrained(folder / "image_processor")
        self.clip = CLIPVisionModel.from_pretrained(folder / "image_encoder", use_safetensors=True, dtype=torch.float32)
        self.clip = self.clip.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, given: torch.Tensor, frames: int) -> dict[str, torch.Tensor]:
        """uint8 [B, 3, n, H, W], the first frame or the first and the last, of videos of `frames` -> y [B, 20, f, h, w]
        (see `VideoCodec.encode_given`) and image [B, n * 257, 1280], CLIP's features before its last block."""
        pictures = given.permute(0, 2, 3, 4, 1).flatten(0, 1).cpu().numpy()  # [B*n, H, W, 3]
        pixels = self.processor(images=list(pictures), return_tensors="pt").pixel_values.to(self.device)
        image = self.clip(pixels, output_hidden_states=True).hidden_states[-2]  # [B*n, 257, 1280]
        return {
            "y": self.codec.encode_given(given, frames),
            "image": image.unflatten(0, (len(given), -1)).flatten(1, 2),
        }


def clean(caption: str) -> str:
    """The released caption cleaning: repair mojibake, undo HTML escapes twice, collapse white space."""
    caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return re.sub(r"\s+", " ", caption).strip()
