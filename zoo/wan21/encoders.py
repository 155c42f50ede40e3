"""The frozen parts around the transformer: Wan VAE (diffusers) and umT5 text encoder (transformers).

Both are used as released, in fp32 (VAE) and the run's precision (text); neither is trained.
"""

import html
import re
from pathlib import Path

import ftfy
import torch
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, UMT5EncoderModel


class VideoCodec:
    """Pixels <-> normalised latents: (posterior mean - latents_mean) / latents_std, never a sample."""

    def __init__(self, folder: Path, device: torch.device):
        self.vae = AutoencoderKLWan.from_pretrained(folder / "vae", use_safetensors=True).to(device).eval()
        self.vae.requires_grad_(False)
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(self.vae.config.latents_mean, device=device).view(shape)
        self.std = torch.tensor(self.vae.config.latents_std, device=device).view(shape)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, F, H, W] with F = 4n+1 -> fp32 [B, 16, n+1, H/8, W/8]."""
        x = pixels.to(self.mean.device).float() / 127.5 - 1
        return (self.vae.encode(x).latent_dist.mode() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, 16, f, h, w] -> uint8 [B, 3, 4f-3, 8h, 8w] on the CPU."""
        x = self.vae.decode(latents.float() * self.std + self.mean).sample
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


class TextEncoder:
    """Captions -> embeddings of the model's text_len."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, text_len: int):
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.model = UMT5EncoderModel.from_pretrained(folder / "text_encoder", use_safetensors=True, dtype=dtype)
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.text_len = text_len

    @torch.no_grad()
    def encode(self, captions: list[str]) -> torch.Tensor:
        """-> [B, text_len, text_dim], zeros behind each caption's closing </s>: Wan attends to the padding too."""
        tokens = self.tokenizer(
            [clean(c) for c in captions],
            padding="max_length",
            max_length=self.text_len,
            truncation=True,
            return_tensors="pt",
        ).to(self.model.device)
        states = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state  # [B, T, text_dim]
        return states.masked_fill(tokens.attention_mask.unsqueeze(-1) == 0, 0)


def clean(caption: str) -> str:
    """The released caption cleaning: repair mojibake, undo HTML escapes twice, collapse white space."""
    caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return re.sub(r"\s+", " ", caption).strip()
