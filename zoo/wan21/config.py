"""Wan2.1 text-to-video: the architecture, its published sizes, and the options of this recipe's jobs.

Sources: Wan-Video/Wan2.1 @ 9737cba9 `wan/configs/*.py`, diffusers `scripts/convert_wan_to_diffusers.py`.
No torch here: options are checked before anything heavy is imported.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import cli
from common.cli import option

HERE = Path(__file__).parent
DEMO_WEIGHTS = HERE / "demo" / "weights"


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Field names are those of the original `config.json`."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int
    patch_size: tuple[int, int, int]
    text_dim: int
    text_len: int
    freq_dim: int
    eps: float

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def parameters(self) -> int:
        """Exact number of parameters."""
        D, Fd, patch = self.dim, self.ffn_dim, math.prod(self.patch_size)
        attention = 4 * (D * D + D) + 2 * D  # q k v o with biases, norm_q, norm_k
        block = 2 * attention + (D * Fd + Fd) + (Fd * D + D) + 2 * D + 6 * D  # ffn, norm3, modulation
        text = (self.text_dim * D + D) + (D * D + D)
        time = (self.freq_dim * D + D) + (D * D + D) + (D * 6 * D + 6 * D)
        head = D * self.out_dim * patch + self.out_dim * patch + 2 * D
        return self.num_layers * block + text + time + head + (self.in_dim * patch * D + D)

    def tokens(self, latent: tuple[int, int, int]) -> int:
        """Sequence length of a latent grid (frames, rows, columns)."""
        return math.prod(n // p for n, p in zip(latent, self.patch_size, strict=True))

    def flops(self, latent: tuple[int, int, int]) -> int:
        """Model FLOPs of one forward pass of one sample (multiply and add counted apart); a training step is three
        times that, recompute not counted: 2 L (linear weights) + 4 L^2 D self-attention + 4 L T D cross-attention."""
        D, L, T, patch = self.dim, self.tokens(latent), self.text_len, math.prod(self.patch_size)
        per_token = self.num_layers * (4 * D * D + 2 * D * D + 2 * D * self.ffn_dim) + (self.in_dim + self.out_dim) * patch * D
        per_text = self.num_layers * 2 * D * D + self.text_dim * D + D * D
        per_sample = self.freq_dim * D + D * D + 6 * D * D
        attention = self.num_layers * (4 * L * L * D + 4 * L * T * D)
        return 2 * (L * per_token + T * per_text + per_sample) + attention

    @classmethod
    def from_folder(cls, folder: Path) -> "WanConfig":
        """The architecture of a released folder: diffusers (`transformer/config.json`) or original (`config.json`).

        Raises:
            ValueError: the folder is of another model, or holds a key or value this recipe does not know.
        """
        path = folder / "transformer" / "config.json"
        path = path if path.is_file() else folder / "config.json"
        if not path.is_file():
            raise ValueError(
                f"{folder} holds neither transformer/config.json nor config.json; expected a Wan2.1 folder in the "
                "diffusers or original layout; fix: --weights"
            )
        values = json.loads(path.read_text())
        kind = values.pop("_class_name", None)
        values = {k: v for k, v in values.items() if not k.startswith("_")}
        if kind == "WanTransformer3DModel":
            config = cls._from_diffusers(values, path)
        elif kind == "WanModel":
            config = cls._from_original(values, path)
        else:
            raise ValueError(f"{path} is a {kind}; expected WanTransformer3DModel or WanModel; fix: --weights")
        tokenizer = folder / "tokenizer" / "tokenizer_config.json"
        if tokenizer.is_file():  # the tiny demo pads its captions to fewer tokens than the released 512
            longest = json.loads(tokenizer.read_text()).get("model_max_length", config.text_len)
            config = dataclasses.replace(config, text_len=min(config.text_len, longest))
        return config

    @classmethod
    def _from_diffusers(cls, values: dict, path: Path) -> "WanConfig":
        fixed = {
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
            "image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None,
        }  # fmt: skip
        _refuse_other(values, fixed, path)
        try:
            heads, head_dim = values.pop("num_attention_heads"), values.pop("attention_head_dim")
            config = cls(
                dim=heads * head_dim, ffn_dim=values.pop("ffn_dim"), num_heads=heads,
                num_layers=values.pop("num_layers"), in_dim=values.pop("in_channels"),
                out_dim=values.pop("out_channels"), patch_size=tuple(values.pop("patch_size")),
                text_dim=values.pop("text_dim"), text_len=512, freq_dim=values.pop("freq_dim"), eps=values.pop("eps"),
            )  # fmt: skip
        except KeyError as missing:
            raise ValueError(f"{path} lacks {missing}; expected a released Wan2.1 config; fix: --weights") from None
        _refuse_unknown(values, path)
        return config

    @classmethod
    def _from_original(cls, values: dict, path: Path) -> "WanConfig":
        _refuse_other(values, {"model_type": "t2v", "qk_norm": True, "cross_attn_norm": True, "window_size": [-1, -1]}, path)
        try:
            config = cls(
                dim=values.pop("dim"), ffn_dim=values.pop("ffn_dim"), num_heads=values.pop("num_heads"),
                num_layers=values.pop("num_layers"), in_dim=values.pop("in_dim"), out_dim=values.pop("out_dim"),
                patch_size=tuple(values.pop("patch_size", (1, 2, 2))), text_dim=values.pop("text_dim", 4096),
                text_len=values.pop("text_len"), freq_dim=values.pop("freq_dim"), eps=values.pop("eps"),
            )  # fmt: skip
        except KeyError as missing:
            raise ValueError(f"{path} lacks {missing}; expected a released Wan2.1 config; fix: --weights") from None
        _refuse_unknown(values, path)
        return config

    def to_diffusers(self) -> dict:
        return {
            "_class_name": "WanTransformer3DModel", "added_kv_proj_dim": None, "attention_head_dim": self.head_dim,
            "cross_attn_norm": True, "eps": self.eps, "ffn_dim": self.ffn_dim, "freq_dim": self.freq_dim,
            "image_dim": None, "in_channels": self.in_dim, "num_attention_heads": self.num_heads,
            "num_layers": self.num_layers, "out_channels": self.out_dim, "patch_size": list(self.patch_size),
            "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
            "text_dim": self.text_dim,
        }  # fmt: skip

    def to_original(self) -> dict:
        values = {
            "_class_name": "WanModel", "model_type": "t2v", "dim": self.dim, "eps": self.eps,
            "ffn_dim": self.ffn_dim, "freq_dim": self.freq_dim, "in_dim": self.in_dim, "num_heads": self.num_heads,
            "num_layers": self.num_layers, "out_dim": self.out_dim, "text_len": self.text_len,
        }  # fmt: skip
        # The released file leaves these out because they are the class's defaults.
        usual = {"patch_size": (1, 2, 2), "text_dim": 4096}
        return values | {k: getattr(self, k) for k, default in usual.items() if getattr(self, k) != default}


def _refuse_other(values: dict, fixed: dict, path: Path) -> None:
    for key, only in fixed.items():
        found = values.pop(key, only)
        if found != only:
            raise ValueError(f"{path}: {key} = {found!r}; this recipe is Wan2.1 text-to-video, {key} = {only!r}; fix: --weights")


def _refuse_unknown(values: dict, path: Path) -> None:
    if values:
        raise ValueError(f"{path} has keys this recipe does not know: {', '.join(values)}; fix: --weights")


_COMMON = dict(in_dim=16, out_dim=16, patch_size=(1, 2, 2), text_dim=4096, text_len=512, freq_dim=256, eps=1e-6)
SIZES = {
    "1.3B": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, **_COMMON),
    "14B": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, **_COMMON),
}
