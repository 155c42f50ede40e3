"""The frozen models: Wan VAE (diffusers), umT5 text encoder and CLIP image encoder (both transformers).

All are used as released and never trained. The VAE and CLIP run in fp32, the text encoder in the run's precision.
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
    """The encoders of a released folder that a size needs. Each is loaded when it is first used."""

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
        """Encodes pixels uint8 [B, 3, F, H, W] and captions -> (latents fp32 [B, C, f, h, w], text [B, text_len, D],
        condition). For image-to-video, `FrameEncoder.encode` makes the condition of each video's own first frame, or
        first and last frames. For text-to-video it is empty."""
        latents, text, condition = self.codec.encode(pixels), self.text.encode(captions), {}
        if self.frames:
            condition = self.frames.encode(pixels[:, :, [0, -1][: self.config.given_frames]], pixels.shape[2])
        return latents, text, condition


class VideoCodec:
    """Pixels <-> normalised latents, (posterior mean - latents_mean) / latents_std. The posterior is never sampled."""

    def __init__(self, folder: Path, device: torch.device, tiling: bool = False):
        self.vae = AutoencoderKLWan.from_pretrained(folder / "vae", use_safetensors=True).to(device).eval()
        self.vae.requires_grad_(False)
        if tiling:  # blends overlapping tiles of 256x256 pixels: less memory, slightly different values
            self.vae.enable_tiling()
        self.decoder = lambda latents: self.vae.decode(latents).sample  # vae_parallel.py may split it over ranks
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
        """Encodes the first frame, uint8 [B, 3, 1, H, W], or the first and the last, [B, 3, 2, H, W], of videos with
        `frames` frames. Returns the extra channels of image-to-video, fp32 [B, 4 + 16, n+1, H/8, W/8]: for each of the
        four frames of a latent frame 1 if it is given, else 0; then the latents of the video whose other frames are
        grey (0 of [-1, 1])."""
        given = given.to(self.mean.device).float() / 127.5 - 1
        x = given.new_zeros(*given.shape[:2], frames, *given.shape[3:])
        x[:, :, 0], last = given[:, :, 0], given.shape[2] == 2
        if last:
            x[:, :, -1] = given[:, :, 1]
        latents = self._normalised(x)
        mask = torch.zeros_like(latents[:, :4])
        mask[:, :, 0] = 1  # the first latent frame holds only one frame
        if last:
            mask[:, 3, -1] = 1
        return torch.cat((mask, latents), dim=1)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, 16, f, h, w] -> uint8 [B, 3, 4f-3, 8h, 8w] on the CPU."""
        x = self.decoder(latents.float() * self.std + self.mean)
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


class TextEncoder:
    """Maps captions to embeddings, padded to the model's text_len."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, text_len: int):
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.model = UMT5EncoderModel.from_pretrained(folder / "text_encoder", use_safetensors=True, dtype=dtype)
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.text_len = text_len
        self.cut: set[str] = set()  # captions longer than text_len, already reported

    @torch.no_grad()
    def encode(self, captions: list[str]) -> torch.Tensor:
        """Returns embeddings [B, text_len, text_dim]. They are zero after each caption's closing </s>, because Wan also
        attends to the padding. Warns of captions that are cut because they are longer."""
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
        """Warns if a caption is cut: for each of the first 10, then for number 100, 1000, and so on."""
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
    """Maps the given frames of videos to the condition of image-to-video."""

    def __init__(self, folder: Path, codec: VideoCodec):
        self.codec, self.device = codec, codec.mean.device
        self.processor = CLIPImageProcessorPil.from_pretrained(folder / "image_processor")
        self.clip = CLIPVisionModel.from_pretrained(folder / "image_encoder", use_safetensors=True, dtype=torch.float32)
        self.clip = self.clip.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, given: torch.Tensor, frames: int) -> dict[str, torch.Tensor]:
        """Encodes uint8 [B, 3, n, H, W]: the first frame, or the first and the last, of videos with `frames` frames.
        Returns y [B, 20, f, h, w] (see `VideoCodec.encode_given`) and image [B, n * 257, 1280], CLIP's features before
        its last block."""
        pictures = given.permute(0, 2, 3, 4, 1).flatten(0, 1).cpu().numpy()  # [B*n, H, W, 3]
        pixels = self.processor(images=list(pictures), return_tensors="pt").pixel_values.to(self.device)
        image = self.clip(pixels, output_hidden_states=True).hidden_states[-2]  # [B*n, 257, 1280]
        return {
            "y": self.codec.encode_given(given, frames),
            "image": image.unflatten(0, (len(given), -1)).flatten(1, 2),
        }


def clean(caption: str) -> str:
    """Cleans a caption as the release does: repairs mojibake, undoes HTML escapes twice, collapses white space."""
    caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return re.sub(r"\s+", " ", caption).strip()
