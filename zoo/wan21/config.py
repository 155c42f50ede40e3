"""Wan2.1 text- and image-to-video: the architecture, its published sizes, and the options of this recipe's jobs.

Sources: Wan-Video/Wan2.1 @ 9737cba9 `wan/configs/*.py`, diffusers `scripts/convert_wan_to_diffusers.py`.
No torch here: options are checked before anything heavy is imported.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import cli, weights
from common.cli import option
from common.data import VideoError, probe_video

from . import adapters, convert, data, features, images

HERE = Path(__file__).parent
DEMO_WEIGHTS, DEMO_I2V = HERE / "demo" / "weights", HERE / "demo" / "weights-i2v"
DEMO_DATA = HERE.parents[1] / "data" / f"{HERE.name}-demo"
DEMO_CAPTIONS = 80  # as many as the judge scores: every digit in every direction
STYLES = ("", "blinking", "pairs")  # of the demo's data: clips, clips that blink, and the two beside each other
DEMO_LORA = {"steps": 200, "lr": 2e-3, "save_every": 200}  # a style is learnt sooner than digits
DEMO_BUCKET = tomllib.loads((HERE / "parallel.toml").read_text())["tiny"]["buckets"]


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Field names are those of the original `config.json`, and three for the image that conditions a video."""

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
    image_dim: int | None  # width of the CLIP features; None: text-to-video, no image branch
    image_tokens: int  # CLIP features of one image
    first_last: bool  # two images, the first and the last frame, told apart by a positional embedding

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def task(self) -> str:
        """`model_type` of the original config.json: t2v, i2v or flf2v."""
        return "t2v" if self.image_dim is None else "flf2v" if self.first_last else "i2v"

    @property
    def given_frames(self) -> int:
        """Frames a video is conditioned on: none, its first, or its first and last."""
        return {"t2v": 0, "i2v": 1, "flf2v": 2}[self.task]

    @property
    def image_rows(self) -> int:
        """Rows of image features a video is conditioned on: 0, 257, or 514 of two images."""
        return self.image_tokens * self.given_frames

    @property
    def context_rows(self) -> int:
        """Rows that travel with the tokens through a pipeline: 6 of modulation, 1 of time, text, image."""
        return 7 + self.text_len + self.image_rows

    @property
    def parameters(self) -> int:
        """Exact number of parameters."""
        D, Fd, patch = self.dim, self.ffn_dim, math.prod(self.patch_size)
        attention = 4 * (D * D + D) + 2 * D  # q k v o with biases, norm_q, norm_k
        block = 2 * attention + (D * Fd + Fd) + (Fd * D + D) + 2 * D + 6 * D  # ffn, norm3, modulation
        text = (self.text_dim * D + D) + (D * D + D)
        time = (self.freq_dim * D + D) + (D * D + D) + (D * 6 * D + 6 * D)
        head = D * self.out_dim * patch + self.out_dim * patch + 2 * D
        image = 0
        if self.image_dim is not None:
            block += 2 * (D * D + D) + D  # k_img, v_img, norm_k_img
            image = 2 * self.image_dim + (self.image_dim + 1) * self.image_dim + (self.image_dim + 1) * D + 2 * D
            image += self.image_rows * self.image_dim if self.first_last else 0
        return self.num_layers * block + text + image + time + head + (self.in_dim * patch * D + D)

    def tokens(self, latent: tuple[int, int, int]) -> int:
        """Sequence length of a latent grid (frames, rows, columns)."""
        return math.prod(n // p for n, p in zip(latent, self.patch_size, strict=True))

    def flops(self, latent: tuple[int, int, int], frozen: bool = False) -> int:
        """Model FLOPs of one forward pass of one sample (multiply and add counted apart); a training step is three
        times that, recompute not counted: 2 L (linear weights) + 4 L^2 D self-attention + 4 L T D cross-attention to
        T rows of text, and the same to the I rows of an image. frozen: a third of what training with frozen weights,
        whose gradients nobody makes, takes; the adapters' own work not counted."""
        D, L, T, patch = self.dim, self.tokens(latent), self.text_len, math.prod(self.patch_size)
        Im, rows = self.image_dim or 0, self.image_rows
        per_token = (
            self.num_layers * (4 * D * D + 2 * D * D + 2 * D * self.ffn_dim) + (self.in_dim + self.out_dim) * patch * D
        )
        per_text = self.num_layers * 2 * D * D + self.text_dim * D + D * D
        per_image = self.num_layers * 2 * D * D + Im * Im + Im * D
        per_sample = self.freq_dim * D + D * D + 6 * D * D
        attention = self.num_layers * (4 * L * L * D + 4 * L * (T + rows) * D)
        linear = 2 * (L * per_token + T * per_text + rows * per_image + per_sample)
        return (linear * 2 // 3 if frozen else linear) + attention

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
        values = weights.read_json(path)
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
            longest = weights.read_json(tokenizer).get("model_max_length", config.text_len)
            config = dataclasses.replace(config, text_len=min(config.text_len, longest))
        clip = folder / "image_encoder" / "config.json"
        if config.image_dim is not None and clip.is_file():  # a class token and the patches
            values = weights.read_json(clip)
            config = dataclasses.replace(config, image_tokens=1 + (values["image_size"] // values["patch_size"]) ** 2)
        return config

    @classmethod
    def _from_diffusers(cls, values: dict, path: Path) -> "WanConfig":
        try:
            heads, head_dim = values.pop("num_attention_heads"), values.pop("attention_head_dim")
            image_dim, positions = values.pop("image_dim", None), values.pop("pos_embed_seq_len", None)
            fixed = {
                "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
                "added_kv_proj_dim": None if image_dim is None else heads * head_dim,
            }  # fmt: skip
            _refuse_other(values, fixed, path)
            config = cls(
                dim=heads * head_dim, ffn_dim=values.pop("ffn_dim"), num_heads=heads,
                num_layers=values.pop("num_layers"), in_dim=values.pop("in_channels"),
                out_dim=values.pop("out_channels"), patch_size=tuple(values.pop("patch_size")),
                text_dim=values.pop("text_dim"), text_len=512, freq_dim=values.pop("freq_dim"), eps=values.pop("eps"),
                image_dim=image_dim, first_last=positions is not None,
                image_tokens=0 if image_dim is None else positions // 2 if positions else CLIP_TOKENS,
            )  # fmt: skip
        except KeyError as missing:
            raise ValueError(f"{path} lacks {missing}; expected a released Wan2.1 config; fix: --weights") from None
        _refuse_unknown(values, path)
        return config

    @classmethod
    def _from_original(cls, values: dict, path: Path) -> "WanConfig":
        _refuse_other(values, {"qk_norm": True, "cross_attn_norm": True, "window_size": [-1, -1]}, path)
        kind = values.pop("model_type", "t2v")
        if kind not in ("t2v", "i2v", "flf2v"):
            raise ValueError(f"{path}: model_type = {kind!r}; expected t2v, i2v or flf2v; fix: --weights")
        image_dim = values.pop("image_dim", CLIP_DIM)
        try:
            config = cls(
                dim=values.pop("dim"), ffn_dim=values.pop("ffn_dim"), num_heads=values.pop("num_heads"),
                num_layers=values.pop("num_layers"), in_dim=values.pop("in_dim"), out_dim=values.pop("out_dim"),
                patch_size=tuple(values.pop("patch_size", (1, 2, 2))), text_dim=values.pop("text_dim", 4096),
                text_len=values.pop("text_len"), freq_dim=values.pop("freq_dim"), eps=values.pop("eps"),
                image_dim=None if kind == "t2v" else image_dim, first_last=kind == "flf2v",
                image_tokens=0 if kind == "t2v" else CLIP_TOKENS,
            )  # fmt: skip
        except KeyError as missing:
            raise ValueError(f"{path} lacks {missing}; expected a released Wan2.1 config; fix: --weights") from None
        _refuse_unknown(values, path)
        return config

    def to_diffusers(self) -> dict:
        return {
            "_class_name": "WanTransformer3DModel",
            "added_kv_proj_dim": None if self.image_dim is None else self.dim, "attention_head_dim": self.head_dim,
            "cross_attn_norm": True, "eps": self.eps, "ffn_dim": self.ffn_dim, "freq_dim": self.freq_dim,
            "image_dim": self.image_dim, "in_channels": self.in_dim, "num_attention_heads": self.num_heads,
            "num_layers": self.num_layers, "out_channels": self.out_dim, "patch_size": list(self.patch_size),
            "pos_embed_seq_len": self.image_rows if self.first_last else None, "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024, "text_dim": self.text_dim,
        }  # fmt: skip

    def to_original(self) -> dict:
        values = {
            "_class_name": "WanModel", "model_type": self.task, "dim": self.dim, "eps": self.eps,
            "ffn_dim": self.ffn_dim, "freq_dim": self.freq_dim, "in_dim": self.in_dim, "num_heads": self.num_heads,
            "num_layers": self.num_layers, "out_dim": self.out_dim, "text_len": self.text_len,
        }  # fmt: skip
        # The released file leaves these out because they are the class's defaults.
        usual = {"patch_size": (1, 2, 2), "text_dim": 4096, "image_dim": self.image_dim and CLIP_DIM}
        return values | {k: getattr(self, k) for k, default in usual.items() if getattr(self, k) != default}


def _refuse_other(values: dict, fixed: dict, path: Path) -> None:
    for key, only in fixed.items():
        found = values.pop(key, only)
        if found != only:
            raise ValueError(f"{path}: {key} = {found!r}; this recipe is Wan2.1, {key} = {only!r}; fix: --weights")


def _refuse_unknown(values: dict, path: Path) -> None:
    if values:
        raise ValueError(f"{path} has keys this recipe does not know: {', '.join(values)}; fix: --weights")


_TINY = dict(dim=128, ffn_dim=512, num_heads=4, num_layers=4, text_dim=64, text_len=16)
_1_3B = dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, text_dim=4096, text_len=512)
_14B = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, text_dim=4096, text_len=512)
_COMMON = dict(out_dim=16, patch_size=(1, 2, 2), freq_dim=256, eps=1e-6)
_TEXT = dict(in_dim=16, image_dim=None, image_tokens=0, first_last=False, **_COMMON)
# The noised latents' 16 channels, 4 of mask and 16 of the given frames' latents; CLIP ViT-H/14 at 224x224.
CLIP_DIM, CLIP_TOKENS = 1280, 257
_IMAGE = dict(in_dim=36, image_dim=CLIP_DIM, image_tokens=CLIP_TOKENS, first_last=False, **_COMMON)
SIZES = {
    "tiny": WanConfig(**_TINY, **_TEXT),
    "1.3B": WanConfig(**_1_3B, **_TEXT),
    "14B": WanConfig(**_14B, **_TEXT),
    "tiny-i2v": WanConfig(**_TINY, **(_IMAGE | {"image_dim": 64, "image_tokens": 17})),
    "1.3B-i2v": WanConfig(**_1_3B, **_IMAGE),  # in the published table of speeds; its weights never were
    "14B-i2v": WanConfig(**_14B, **_IMAGE),  # 480P and 720P
    "14B-flf2v": WanConfig(**_14B, **(_IMAGE | {"first_last": True})),
}


# ----------------------------------------------------------------------------------------------------------- options


DPO = {"weighting": "none", "caption_dropout": 0.0}  # of dpo_*.sh, as in the paper
DEMO_DPO = {"steps": 150, "lr": 1e-3, "save_every": 150, "sft_weight": 100.0}
LORA_RANK = 16  # of lora_*.sh, where nothing else is asked
LORA_TARGETS = "q,k,v,o,ffn.0,ffn.2"  # of every block: self- and cross-attention, MLP
LORA_SETTINGS = ("--lora-rank", "--lora-alpha", "--lora-dropout", "--lora-targets", "--rslora")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(cli.TrainOptions):
    job: str = option("which launcher this is: pretrain, finetune, lora or dpo", "pretrain", group="job")
    task: Literal["t2v", "i2v"] = option("what the launcher is for (default: what the size is)", None, group="job")
    from_scratch: bool = option("draw the transformer's weights instead of loading them", False, group="model")
    buckets: str = option(
        "video shapes FRAMESxHEIGHTxWIDTH, comma-separated, or auto:FRAMESxHEIGHTxWIDTH, the largest of them", None,
        group="data", layout=True,
    )  # fmt: skip
    fps: float = option(
        "frame rate videos are resampled to (0: their own)", 16.0, group="data", layout=True, within="[0, inf)"
    )
    cache: Path | None = option("folder that keeps latents and text embeddings once computed", group="data")
    features: Path | None = option("folder that extract_features.sh made, instead of --data", group="data")
    vae_tiling: bool = option("the VAE sees large pictures in tiles: less memory", False, group="data", layout=True)
    shift: float = option("flow-matching timestep shift", 5.0, group="objective", layout=True, within="(0, inf)")
    timesteps: Literal["per-sample", "per-batch"] = option(
        "draws of the timestep (per-batch: as the reference)", "per-sample", group="objective", layout=True
    )
    weighting: Literal["bell", "none"] = option("loss weight over timesteps", "bell", group="objective", layout=True)
    caption_dropout: float = option(
        "share of captions emptied, for guidance", 0.1, group="objective", layout=True, within="[0, 1]"
    )
    ema: float = option(
        "decay of averaged weights, exported and sampled (0: off)", 0.0, group="objective", layout=True, within="[0, 1)"
    )
    lora_rank: int | None = option(
        f"rank of the adapters ({LORA_RANK} if not given)", group="adapters", within="[1, inf)"
    )
    lora_alpha: float = option("their output is scaled by alpha / rank", 16.0, group="adapters", within="(0, inf)")
    lora_dropout: float = option("dropout of their input", 0.0, group="adapters", within="[0, 1)")
    lora_targets: str = option("linears to adapt, by the ends of their names", LORA_TARGETS, group="adapters")
    rslora: bool = option("scale by alpha / sqrt(rank)", False, group="adapters")
    adapter: Path | None = option("adapter folder to start from; its settings decide", group="adapters")
    merge: Path | None = option("write released weights with the adapters added here at the end", group="adapters")
    full: bool = option("train every parameter against a frozen copy, not adapters", False, group="preference")
    beta: float = option("weight of a pair's margin of errors", 2000.0, group="preference", within="(0, inf)")
    sft_weight: float = option("weight of the chosen videos' own error", 0.0, group="preference", within="[0, inf)")
    validation: Path | None = option("held-out pairs, compared at the end", group="preference")
    sample_prompts: Path | None = option(
        "text file of prompts sampled at the end (image-to-video: picture<TAB>prompt)", group="samples"
    )
    sample_steps: int = option("sampling steps", 50, group="samples", layout=True, within="[1, inf)")
    sample_shift: float = option("timestep shift of sampling", 5.0, group="samples", layout=True, within="(0, inf)")
    cfg: float = option("guidance scale of the samples", 5.0, group="samples", layout=True, within="[0, inf)")

    @property
    def adapts(self) -> bool:
        """Whether adapters train, and nothing else."""
        return self.job == "lora" or (self.job == "dpo" and not self.full)


@dataclass(frozen=True, kw_only=True)
class AccelerateOptions(cli.LayoutOptions):
    """What makes sampling faster or smaller; see README, "Generation, accelerated"."""

    cfg_parallel: bool = option(
        "the two branches of the guidance on two data-parallel ranks", False, group="acceleration"
    )
    vae_parallel: bool = option("all ranks of a video decode a strip of it each", False, group="acceleration")
    vae_tiling: bool = option("decode in overlapping tiles: less memory, not exact", False, group="acceleration")
    cache: Literal["none", "attention", "blocks"] = option(
        "reuse between steps: self-attention outputs, or what a run of blocks adds", "none", group="acceleration"
    )
    cache_start: int = option(
        "first step (from 0) whose values are kept (default: 40 % of the steps)",
        group="acceleration", within="[0, inf)",
    )  # fmt: skip
    cache_interval: int = option(
        "steps from one computed value to the next (default: 2)", group="acceleration", within="[1, inf)"
    )
    cache_end: int = option(
        "last step that may reuse (default: 94 % of the steps)", group="acceleration", within="[0, inf)"
    )
    cache_blocks: str = option(
        "blocks FIRST-LAST (from 0) whose run --cache blocks reuses (default: all)", "", group="acceleration"
    )
    sparse: float = option(
        "share of key blocks that a query block leaves out (0: dense)", 0.0, group="acceleration", within="[0, 1)"
    )
    sparse_start: int = option(
        "first step (from 0) with sparse attention (default: 30 % of the steps)",
        group="acceleration", within="[0, inf)",
    )  # fmt: skip
    quantize: Literal["none", "int8"] = option(
        "weights of the blocks' linears in int8: less memory", "none", group="acceleration"
    )
    compile: bool = option("torch.compile each block", False, group="acceleration")
    cpu_offload: bool = option(
        "transformer, text encoder and VAE on the accelerator only while used", False, group="acceleration"
    )

    @property
    def lanes(self) -> int:
        """Videos made at the same time."""
        return self.dp // (2 if self.cfg_parallel else 1)

    def cached_blocks(self, layers: int) -> range:
        """The run of `--cache-blocks`, by block index."""
        first, last = map(int, self.cache_blocks.split("-")) if self.cache_blocks else (0, layers - 1)
        return range(first, last + 1)


@dataclass(frozen=True, kw_only=True)
class InferOptions(AccelerateOptions):
    checkpoint: Path | None = option(
        "sharded checkpoint whose transformer replaces the one of --weights", group="model"
    )
    task: Literal["t2v", "i2v"] = option("what the launcher is for (default: what the size is)", None, group="job")
    adapter: Path | None = option("adapter folder, as lora_*.sh write it, added to the weights", group="model")
    prompt: str = option("what to show", group="job")
    prompts: Path | None = option(
        "text file, a prompt per line (image-to-video: picture<TAB>prompt, or a .jsonl of image, prompt)", group="job"
    )
    negative: str = option("what not to show", "", group="job")
    image: Path | None = option("image-to-video: the first frame", group="job")
    last_image: Path | None = option("sizes with a last frame: that one", group="job")
    fit: Literal["exact", "crop", "pad"] = option("pictures of another aspect: refused, cut, or put on black", "exact")
    video_in: Path | None = option(
        "video-to-video: what to start from, with noise (image-to-video: its first frame is given unless --image is)",
        group="job",
    )
    strength: float = option("of --video-in: share of the steps to take, so of noise to add", 0.8, within="(0, 1]")
    out: Path = option("folder for the videos (default runs/<recipe>-infer-<time>)", group="job")
    video: str = option("shape FRAMESxHEIGHTxWIDTH", None, group="job", layout=True)
    fps: float = option("frame rate of the written file", 16.0, group="job", layout=True, within="[0, inf)")
    sample_steps: int = option("sampling steps", 50, group="job", layout=True, within="[1, inf)")
    cfg: float = option("guidance scale (1: no guidance)", 5.0, group="job", layout=True, within="[0, inf)")
    sampler: Literal["unipc", "dpm", "euler"] = option("UniPC, DPM-Solver++ or flow-match Euler", "unipc", group="job")
    sample_shift: float = option("flow-matching timestep shift", 5.0, group="job", layout=True, within="(0, inf)")
    seed: int = option("seed of the noise; prompt i uses seed + i", 0, group="job")
    format: Literal["mp4", "gif", "both"] = option("kind of file written", "both", group="job")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(InferOptions):
    format: Literal["mp4"] = option("kind of file written, which the scores are read from", "mp4", group="job")
    data: Path | None = option("list of real clips, whose captions are sampled (default: the demo's)", group="scores")
    videos: Path | None = option(
        "folder of videos sampled already: mp4s that in order of their names show the captions of --data",
        group="scores",
    )
    limit: int | None = option(
        "rows of --data, or prompts, from the first on (default: all; of the demo's 80)",
        group="scores",
        within="[1, inf)",
    )
    max_drop: float = option(
        "share of clips that may be unreadable or of another shape", 0.05, group="scores", within="[0, 1]"
    )
    feature_model: Path | None = option(
        "transformers folder of a vision model (CLIP, DINOv2, VideoMAE…): a Fréchet distance", group="scores"
    )
    clip: Path | None = option("transformers folder of a CLIP model: the CLIP score", group="scores")
    vbench: str = option("dimensions of VBench, comma-separated", "", group="scores")
    vbench_python: Path = option("interpreter that has the package vbench", Path(sys.executable), group="scores")


@dataclass(frozen=True, kw_only=True)
class SearchOptions(InferOptions):
    psnr: float = option("quality to keep: dB to the uncached videos", 32.0, group="job", within="(0, inf)")


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(cli.LayoutOptions):
    data: Path | None = option("your data; formats in the recipe's README (default: the demo data)", group="data")
    max_drop: float = option(
        "share of rows that may be dropped before it is an error", 0.05, group="data", within="[0, 1]"
    )
    buckets: str = option(
        "video shapes FRAMESxHEIGHTxWIDTH, comma-separated, or auto:FRAMESxHEIGHTxWIDTH, the largest of them", None,
        group="data", layout=True,
    )  # fmt: skip
    fps: float = option(
        "frame rate videos are resampled to (0: their own)", 16.0, group="data", layout=True, within="[0, inf)"
    )
    workers: int = option("decoding processes per rank", 2, group="data", layout=True, within="[0, inf)")
    vae_tiling: bool = option("the VAE sees large pictures in tiles: less memory", False, group="data", layout=True)
    rows_of_shard: int = option("videos of a file", 64, group="job", within="[1, inf)")
    out: Path = option("features folder; the same again goes on where it stopped", group="run")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(cli.LayoutOptions):
    to: Literal["diffusers", "released", "original", "sharded"] = option(
        "what to write (released: diffusers); the kind of --weights is recognised", group="job"
    )
    out: Path = option("folder to write", group="job")
    ema: bool = option("write a sharded checkpoint's averaged weights", False, group="job")
    adapter: Path | None = option("adapter folder of a LoRA, merged into what is written", group="job")


@dataclass(frozen=True, kw_only=True)
class PerfOptions(TrainOptions):
    only: Literal["all", "step", "generation", "run", "load"] = option("which benchmark", "all", group="job")
    repeats: int = option("timed training steps", 60, group="job", within="[1, inf)")
    compiled_peer: bool = option("let the peer also run under torch.compile", True, group="job")
    record: bool = option("add the rows to perf.jsonl", False, group="job")


JOBS = {
    "train": (TrainOptions, "Train Wan2.1 text-to-video or image-to-video."),
    "extract": (ExtractOptions, "Compute what the frozen encoders make of videos and captions, once."),
    "infer": (InferOptions, "Sample videos from Wan2.1 text-to-video or image-to-video."),
    "evaluate": (EvaluateOptions, "Score videos sampled from Wan2.1 text-to-video or image-to-video."),
    "search": (SearchOptions, "Find the cache settings that keep a stated quality."),
    "convert": (ConvertOptions, "Convert Wan2.1 weights between the original, diffusers and sharded layouts."),
    "perf": (PerfOptions, "Measure this recipe on this machine."),
}


def parse(script: str, argv: list[str]):
    """argv of a job -> its checked options. See common/cli.py for the contract.

    Raises:
        ValueError: anything about the options, the weights folder or the data list that can be known to be wrong.
    """
    cls, description = JOBS[script]
    task, asked = _task(argv), {word.split("=")[0] for word in argv}
    o = cli.parse_options(cls, argv, description, HERE / "parallel.toml", lambda weights: _default_size(weights, task))
    if script == "train":
        o = _check_job(o, asked)
        o = features.applied(o, asked)
    if script == "extract":
        o = _whole_encoders(o, asked)
    o = _with_demo(o, getattr(o, "job", script), asked)
    if script in ("infer", "search", "convert", "extract"):  # these have no batch
        o = dataclasses.replace(o, micro_batch=1, global_batch=None)
    if script == "evaluate":
        o = dataclasses.replace(_check_scores(o), global_batch=None)
    config = model_config(o)
    if task is not None and (task == "t2v") != (config.task == "t2v"):
        raise ValueError(
            f"{o.weights} of size {o.size} is {TASKS[config.task]}; expected {TASKS[task]}; fix: --weights or --size, or "
            f"the launcher named _{'t2v' if task == 'i2v' else 'i2v'}.sh"
        )
    if getattr(o, "buckets", "").startswith("auto:"):
        auto = data.auto_buckets(o.buckets, o.cp * (o.tp if o.sp else 1))
        shown = [bucket for bucket in auto if bucket.frames > 1 or config.image_dim is None]  # a still has given it all
        o = dataclasses.replace(o, buckets=",".join(map(str, shown)))
    shapes = {
        "train": "buckets", "extract": "buckets", "perf": "buckets", "infer": "video", "search": "video",
        "evaluate": "video",
    }  # fmt: skip
    shapes = None if getattr(o, "videos", None) else shapes.get(script)  # which may have shapes no model here makes
    for bucket in data.parse_buckets(getattr(o, shapes)) if shapes else [None]:
        tokens = config.tokens(latent_grid(bucket)) if bucket else None
        o = cli.check_layout(o, heads=config.num_heads, layers=config.num_layers, tokens=tokens)
        if bucket and bucket.frames == 1 and config.image_dim is not None:
            raise ValueError(
                f"{shapes} {bucket} of {TASKS[config.task]}; expected at least 5 frames, the first is given; fix: --{shapes}"
            )
    _check_folder(o, config, script)
    if getattr(o, "adapter", None):
        adapters.check_folder(o.adapter, config)
    if script == "extract":
        features.check_begun(o, config)
    if getattr(o, "features", None):
        features.check(o, config)
    read, videos = (data.read_pairs, 2) if getattr(o, "job", "") == "dpo" else (data.read_rows, 1)
    lists = {"train": ("data", "validation"), "extract": ("data",)}.get(script, ())
    for path in (getattr(o, name) for name in lists):
        if path is not None and not is_demo(path):
            rows, report = read(path)
            report.check(len(rows) // videos + len(report.drops), o.max_drop)
    if script == "train":
        cli.check_run(o)
        if o.sample_prompts:
            if not features.has_encoders(o.weights, config):
                raise ValueError(f"--sample-prompts: {o.weights} lacks VAE or encoders; fix: --weights with them")
            sampled = images.read_requests(o.sample_prompts, "--sample-prompts", config.given_frames)
            images.check(sampled, data.parse_buckets(o.buckets)[0], "crop")
        if o.adapts:
            adapters.check_targets(o, config)
            if o.merge and o.from_scratch:
                raise ValueError("--merge adds adapters to released weights, and these are drawn; fix: no --merge")
            if o.merge:
                weights.refuse_existing(o.merge, "--merge")
        adapters.check_start(o)
    if script == "search":
        _check_search(o)
    if isinstance(o, AccelerateOptions) and shapes:
        o = check_acceleration(o, config, latent_grid(data.parse_buckets(o.video)[0]))
    if script in ("infer", "search") or (script == "evaluate" and o.data is None):
        bucket = data.parse_buckets(o.video)[0]
        images.check(requests(o, config), bucket, o.fit)
    if script == "infer" and o.video_in is not None:
        images.check_clip(o.video_in, bucket, o.fps, o.fit)
        if int(o.sample_steps * o.strength) < 1:
            raise ValueError(
                f"strength={o.strength} of {o.sample_steps} steps is none; expected one at least; fix: --strength"
            )
    if getattr(o, "checkpoint", None) is not None and not o.checkpoint.is_dir():
        raise ValueError(f"--checkpoint {o.checkpoint} does not exist; expected a sharded one; fix: --checkpoint")
    if getattr(o, "checkpoint", None) is not None and (o.checkpoint / "state.json").is_file():
        _refuse_adapters_alone(o.checkpoint, "--adapter with the run's adapter/ instead of --checkpoint")
    if script == "convert":
        if o.to is None:
            raise ValueError("nothing to convert to; fix: --to diffusers, original or sharded")
        weights.refuse_existing(o.out, "--out")
    if getattr(o, "export", None):
        weights.refuse_existing(o.export, "--export")
    return o


def check_acceleration(o: InferOptions, config: WanConfig, grid: tuple[int, int, int]) -> InferOptions:
    """Everything about the accelerations that can be wrong before weights are read; fills their defaults.

    Raises:
        ValueError: what does not go with what, or with the steps, the layout or the shape of the video.
    """
    steps, ranks = o.sample_steps, o.world // max(o.lanes, 1)
    if o.cfg_parallel and o.cfg == 1:
        raise ValueError("cfg_parallel with cfg=1, which has no second branch; fix: --cfg or --no-cfg-parallel")
    if o.cfg_parallel and o.dp % 2:
        raise ValueError(
            f"cfg_parallel with {o.dp} data-parallel ranks ({o.world} processes over tp*pp*cp = {o.tp}*{o.pp}*{o.cp}); "
            "expected an even number; fix: NPROC, or --no-cfg-parallel"
        )
    if o.vae_parallel and ranks == 1:
        raise ValueError(
            f"vae_parallel with one rank to each of {o.lanes} videos at a time; expected several ranks to a video; "
            "fix: --cfg-parallel, --cp, --tp or --pp, or --no-vae-parallel"
        )
    if o.vae_parallel and ranks > grid[1]:
        raise ValueError(
            f"vae_parallel over {ranks} ranks of {grid[1]} latent rows; expected a row each; fix: --no-vae-parallel"
        )
    if o.vae_parallel and o.vae_tiling:
        raise ValueError("vae_parallel with vae_tiling; expected one of them; fix: --no-vae-tiling")
    asked = [n for n in ("cache_start", "cache_interval", "cache_end") if getattr(o, n) is not None]
    if o.cache == "none" and asked:
        raise ValueError(f"{' and '.join(asked)} without a cache; fix: --cache attention or blocks")
    if o.cache != "none":
        start = round(0.4 * steps) if o.cache_start is None else o.cache_start
        end = min(int(0.94 * steps), steps - 2) if o.cache_end is None else o.cache_end
        if not start < end < steps:
            raise ValueError(
                f"cache_start={start}, cache_end={end} of {steps} sampling steps; expected start < end < {steps}; "
                "fix: --cache-start or --cache-end"
            )
        o = dataclasses.replace(o, cache_start=start, cache_interval=o.cache_interval or 2, cache_end=end)
    if o.cache_blocks:
        last = config.num_layers - 1
        if o.cache != "blocks":
            raise ValueError(f"cache_blocks={o.cache_blocks!r} with --cache {o.cache}; fix: --cache blocks")
        found = re.fullmatch(r"(\d+)-(\d+)", o.cache_blocks)
        if not found or not int(found[1]) <= int(found[2]) <= last:
            raise ValueError(
                f"cache_blocks={o.cache_blocks!r}; expected FIRST-LAST within 0-{last}; fix: --cache-blocks"
            )
    if not o.sparse and o.sparse_start is not None:
        raise ValueError(f"sparse_start={o.sparse_start} with dense attention; fix: --sparse")
    if o.sparse:
        start = round(0.3 * steps) if o.sparse_start is None else o.sparse_start
        frames, rows, columns = (n // p for n, p in zip(grid, config.patch_size, strict=True))
        if start >= steps:
            raise ValueError(f"sparse_start={start} of {steps} sampling steps; expected fewer; fix: --sparse-start")
        if frames == 1 or min(rows, columns) < 8:
            raise ValueError(
                f"sparse attention over {frames}x{rows}x{columns} tokens ({o.video}); expected two latent frames and "
                "windows of 8x8 tokens, so a --video of at least 5x128x128; fix: --video or --sparse 0"
            )
        if o.ring > 1:
            raise ValueError(
                f"sparse attention with a ring of {o.ring}, where no rank sees all keys; fix: --ulysses {o.cp}, or --cp"
            )
        o = dataclasses.replace(o, sparse_start=start)
    if o.quantize != "none" and o.fsdp:
        raise ValueError(f"quantize={o.quantize} with fsdp, which shards one dtype; fix: --no-fsdp or --quantize none")
    if o.cpu_offload and o.fsdp:
        raise ValueError("cpu_offload with fsdp, which keeps its own shards; fix: --no-fsdp or --no-cpu-offload")
    if o.compile:
        cli.check_compile(o)
    return o


def _check_search(o: SearchOptions) -> None:
    given = [n for n in ("cache_start", "cache_interval", "cache_end") if getattr(o, n) is not None]
    if given:
        raise ValueError(f"{' and '.join(given)}: search finds them; fix: leave them out")
    if o.lanes > 1:
        raise ValueError(
            f"search with {o.lanes} videos at a time; expected all ranks to make the same one; fix: NPROC, --cfg-parallel, "
            "--cp or --tp"
        )


def cache_gib(o: AccelerateOptions, config: WanConfig, tokens: int) -> float:
    """GiB that `--cache` holds on a rank at most: a tensor of this rank's tokens for each branch it computes, and for
    `attention` of each of its blocks."""
    each = tokens // o.cp // (o.tp if o.sp else 1) * config.dim * (4 if o.precision == "fp32" else 2)
    tensors = {"none": 0, "attention": max(o.stage_layers(config.num_layers)), "blocks": o.vpp}[o.cache]
    return each * tensors * (1 if o.cfg_parallel or o.cfg == 1 else 2) / 2**30


SPEED = ("cfg_parallel", "vae_parallel", "compile", "cpu_offload")  # what changes the pixels by no more than rounding
_FREE = {*SPEED, "out", "format", "prompts", "task", "prompt", "image", "last_image"}  # files, and a request's own


def settings(o: InferOptions) -> dict:
    """What the pixels of a run's videos follow from: every option but those of layout, speed and files, and what the
    weights hold, which their path alone does not say."""
    groups = {f.name: f.metadata["group"] for f in dataclasses.fields(o)}
    kept = [n for n, group in groups.items() if group not in ("layout", "run") and n not in _FREE]
    values = {n: getattr(o, n) for n in [*kept, "precision"]}
    folder = o.checkpoint or o.weights
    written = next((folder / n for n in ("manifest.json", "latest") if (folder / n).is_file()), None)  # sharded
    part = folder / "transformer" if (folder / "transformer").is_dir() else folder
    values["content"] = str(written.stat().st_mtime_ns) if written else weights.fingerprint(part)
    if o.adapter:
        values["adapter_content"] = weights.fingerprint(o.adapter)
    return values


def how_made(values: dict, i: int, request: images.Request) -> dict:
    """The `settings` of request number i, with its own, as JSON can hold them."""
    values = values | dataclasses.asdict(request) | {"seed": values["seed"] + i}
    return {n: str(v) if isinstance(v, Path) else v for n, v in values.items() if v is not None}


def unfinished(o: InferOptions, asked: list[images.Request]) -> list[int]:
    """Indices of the requests whose videos are not in --out yet. ValueError: one is, made in another way."""
    from . import videos

    stems, same = [o.out / f"{i:04d}" for i in range(len(asked))], settings(o)
    return [i for i, r in enumerate(asked) if not videos.finished(stems[i], o.format, how_made(same, i, r))]


def latent_grid(bucket: data.Bucket) -> tuple[int, int, int]:
    """Frames, rows, columns of the latents; the VAE's strides are 4, 8, 8 and the first frame stands alone."""
    return (bucket.frames - 1) // 4 + 1, bucket.height // 8, bucket.width // 8


TASKS = {"t2v": "text-to-video", "i2v": "image-to-video", "flf2v": "video from a first and a last frame"}


def _task(argv: list[str]) -> str | None:
    """--task, which decides the default size and so has to be known before the other options are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", nargs="?")
    return parser.parse_known_args(argv)[0].task


def _default_size(weights: Path | None, task: str | None) -> str:
    """The size whose architecture the weights folder has; without one, tiny on a CPU, else the smallest published."""
    if weights is None:
        return ("tiny" if os.environ.get("ZOO_DEVICE", "cpu") == "cpu" else "1.3B") + ("-i2v" if task == "i2v" else "")
    found = _sharded_config(weights) if is_sharded(weights) else WanConfig.from_folder(weights)
    frozen = {"text_len": found.text_len, "image_tokens": found.image_tokens}  # of the encoders, which may not be there
    differs = {name: _differs(found, dataclasses.replace(c, **frozen)) for name, c in SIZES.items()}
    nearest = min(differs, key=lambda name: len(differs[name]))
    if differs[nearest]:
        raise ValueError(
            f"{weights} has an architecture that is none of {', '.join(SIZES)} (nearest {nearest}: "
            f"{', '.join(differs[nearest])}); fix: --weights, or add the size to config.py"
        )
    return nearest


def _differs(found: WanConfig, wanted: WanConfig) -> list[str]:
    pairs = {f.name: (getattr(found, f.name), getattr(wanted, f.name)) for f in dataclasses.fields(WanConfig)}
    return [f"{name} {ours} != {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]


def is_sharded(folder: Path) -> bool:
    """Whether a folder is one of our sharded checkpoints."""
    return (folder / "manifest.json").is_file()


def _sharded_config(folder: Path) -> WanConfig:
    _refuse_adapters_alone(folder, "--weights with that and --adapter with the run's adapter/")
    return WanConfig(**_tuples(json.loads((folder / "state.json").read_text())["model"]))


def _refuse_adapters_alone(folder: Path, fix: str) -> None:
    start = json.loads((folder / "state.json").read_text()).get("start", {})
    if "r" in start:
        raise ValueError(f"{folder} holds adapters of {start['weights']} and no whole model; fix: {fix}")


def _tuples(values: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _with_demo(o, job: str, asked: set[str]):
    """Fill in the embedded demo where the user named no data or no weights; what was asked for stays."""
    changes = {}
    demo = isinstance(o, (TrainOptions, ExtractOptions)) and o.data is None and not getattr(o, "features", None)
    if getattr(o, "adapts", False) and o.lora_rank is None and o.adapter is None:
        changes["lora_rank"] = LORA_RANK
    if job == "dpo":
        unlike = DPO | DEMO_DPO if demo and o.size.startswith("tiny") else DPO
        changes |= {k: v for k, v in unlike.items() if f"--{k.replace('_', '-')}" not in asked}
        changes |= {"validation": o.validation or demo_list("test", "pairs")} if demo else {}
    if job == "lora" and demo and o.size.startswith("tiny"):
        changes |= {k: v for k, v in DEMO_LORA.items() if f"--{k.replace('_', '-')}" not in asked}
    if isinstance(o, EvaluateOptions) and o.videos is not None:  # no model is used
        changes = {"weights": DEMO_WEIGHTS, "size": "tiny"} | ({} if "--video" in asked else {"video": None})
        if o.data is None or {"--weights", "--checkpoint", "--size"} & asked:
            raise ValueError("--videos come with --data, whose captions they show, and without a model; fix: --videos")
    if isinstance(o, EvaluateOptions) and o.data is None and o.prompts is None and not o.prompt:
        changes |= {"data": demo_list("test"), "limit": o.limit or DEMO_CAPTIONS}
        changes |= {} if "--video" in asked else {"video": DEMO_BUCKET}
    if demo:
        changes |= {
            "data": demo_list("train", style={"lora": "blinking", "dpo": "pairs"}.get(job, "")),
            "buckets": o.buckets if "--buckets" in asked or isinstance(o, PerfOptions) else DEMO_BUCKET,
        }
    if demo and hasattr(o, "cache"):
        changes["cache"] = o.cache or DEMO_DATA.with_name(DEMO_DATA.name + "-latents")
    if hasattr(o, "video") and o.weights is None and "--video" not in asked and "weights" not in changes:
        changes["video"] = DEMO_BUCKET
    if o.weights is None and "weights" not in changes:
        tiny, image = o.size.startswith("tiny"), o.size in SIZES and SIZES[o.size].image_dim is not None
        trains_on_demo = isinstance(o, TrainOptions) and o.data is None
        if not tiny and not trains_on_demo:  # drawn weights are for trying a layout out
            raise ValueError(f"--size {o.size}, except to train on the demo data, needs --weights; fix: --weights DIR")
        changes["weights"] = DEMO_I2V if image else DEMO_WEIGHTS
        if not tiny:
            print(
                f"note: no --weights: size {o.size} starts from drawn weights, with the demo's tiny encoders",
                file=sys.stderr,
            )
            changes["from_scratch"] = True
        elif job in ("pretrain", "perf"):
            changes["from_scratch"] = True
    if getattr(o, "out", "") is None:
        changes["out"] = cli.default_out(HERE.name, job)
    return dataclasses.replace(o, **changes)


def demo_list(split: str, style: str = "") -> Path:
    folder = DEMO_DATA.with_name(f"{DEMO_DATA.name}-{style}") if style else DEMO_DATA
    return folder / f"{split}.jsonl"


def is_demo(path: Path | None) -> bool:
    return path in [demo_list(split, style) for split in ("train", "test") for style in STYLES]


def model_config(o) -> WanConfig:
    """The architecture: the weights folder's own; drawn weights have the size's, with the folder's text encoder."""
    if is_sharded(o.weights):
        return _sharded_config(o.weights)
    found = WanConfig.from_folder(o.weights)
    if o.size not in SIZES:
        raise ValueError(f"unknown size {o.size!r}; expected {', '.join(SIZES)}; fix: --size, or add it to config.py")
    if getattr(o, "features", None):  # they decide, as the tokenizer may not be there
        saved = weights.read_json(o.features / "settings.json")
        found = dataclasses.replace(found, text_len=saved["text_len"], image_tokens=saved["image_tokens"])
    wanted = dataclasses.replace(SIZES[o.size], text_dim=found.text_dim, text_len=found.text_len)
    if None not in (wanted.image_dim, found.image_dim):
        wanted = dataclasses.replace(wanted, image_dim=found.image_dim, image_tokens=found.image_tokens)
    if not getattr(o, "from_scratch", False) and (differs := _differs(found, wanted)):
        raise ValueError(f"{o.weights} is not of size {o.size}: {', '.join(differs)}; fix: --size or --weights")
    return wanted


def _check_folder(o, config: WanConfig, script: str) -> None:
    """The parts a job needs are there, and the transformer's tensors are exactly the model's."""
    if script != "convert" and not getattr(o, "features", None):
        for part in features.parts(config):
            if not (o.weights / part).is_dir():
                raise ValueError(f"{o.weights} has no {part}/; expected a released diffusers folder; fix: --weights")
    if not is_sharded(o.weights) and not getattr(o, "from_scratch", False):
        convert.released_entries(o.weights, config)


def _check_job(o: TrainOptions, asked: set[str]) -> TrainOptions:
    """Options of another job are not ignored; the batch of dpo is one of pairs."""
    for f in dataclasses.fields(o):
        flag = "--" + f.name.replace("_", "-")
        changed = flag in asked and getattr(o, f.name) != f.default  # a printed config names every option
        if changed and f.metadata["group"] == "adapters" and not o.adapts:
            raise ValueError(f"{flag} is of lora_t2v.sh and lora_i2v.sh, and this is {o.job}; fix: leave {flag} out")
        if changed and f.metadata["group"] == "preference" and o.job != "dpo":
            raise ValueError(f"{flag} is of dpo_t2v.sh and dpo_i2v.sh, and this is {o.job}; fix: leave {flag} out")
        if changed and flag in LORA_SETTINGS and o.adapter:
            raise ValueError(
                f"{flag} is of new adapters, --adapter {o.adapter} brings its own settings; fix: leave {flag} out"
            )
    if o.job != "dpo":
        return o
    if o.features:
        raise ValueError("--features hold videos, not pairs; fix: --data PAIRS, with --cache to encode them once")
    if o.adapter:
        raise ValueError(
            "--adapter: the reference is the model without adapters; fix: --weights with it merged, and no --adapter"
        )
    if "--micro-batch" not in asked:
        o = dataclasses.replace(o, micro_batch=max(2, o.micro_batch // 2 * 2))
    for name in ("micro_batch", "global_batch"):
        if (getattr(o, name) or 0) % 2:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{name}={getattr(o, name)}; expected an even number, a pair is two videos; fix: {flag}")
    return o


def _whole_encoders(o: ExtractOptions, asked: set[str]) -> ExtractOptions:
    """There is no transformer to split: every process has videos of its own, whatever the named layout says."""
    alone = {"tp": 1, "sp": False, "pp": 1, "vpp": 1, "stages": "", "cp": 1, "ulysses": None, "fsdp": False}
    for name in alone:
        if {f"--{name}", f"--no-{name}"} & asked:
            raise ValueError(f"--{name}: extraction splits no model, its processes share the videos; fix: NPROC alone")
    return dataclasses.replace(o, **alone, recompute="none")


# What VBench 0.1.5 says of videos that were not sampled from its own prompts and named by them.
VBENCH = ("subject_consistency", "background_consistency", "aesthetic_quality", "imaging_quality", "temporal_style",
          "overall_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree")  # fmt: skip


def _check_scores(o: EvaluateOptions) -> EvaluateOptions:
    """Checks what evaluate.py is given, and fills in the shape of --videos."""
    if o.data is not None and (o.prompt or o.prompts):
        raise ValueError("--data has captions of its own; fix: either --data, or --prompt and --prompts")
    if o.video_in is not None:
        raise ValueError("--video-in is of infer_t2v.sh and infer_i2v.sh: samples are scored; fix: leave it out")
    for folder, flag in ((o.feature_model, "--feature-model"), (o.clip, "--clip")):
        for file in ("config.json", "preprocessor_config.json") if folder else ():
            if not (folder / file).is_file():
                raise ValueError(f"{folder} has no {file}; expected a folder of a transformers model; fix: {flag}")
        if folder and not list(folder.glob("*.safetensors")):
            raise ValueError(f"{folder} has no .safetensors; expected weights in that format; fix: {flag}")
    if o.clip and (kind := weights.read_json(o.clip / "config.json").get("model_type")) != "clip":
        raise ValueError(f"{o.clip} is a {kind}; expected a clip model, text and vision; fix: --clip")
    if unknown := [name for name in o.vbench.split(",") if o.vbench and name not in VBENCH]:
        raise ValueError(f"vbench={','.join(unknown)}; expected some of {', '.join(VBENCH)}; fix: --vbench")
    find = [str(o.vbench_python), "-c", "import importlib.util as i; exit(i.find_spec('vbench') is None)"]
    if o.vbench and (not shutil.which(find[0]) or subprocess.run(find).returncode):
        raise ValueError(
            f"{o.vbench_python} has no package vbench, which wants other versions of numpy and transformers than this "
            "recipe; fix: python -m venv vb && vb/bin/pip install vbench, then --vbench-python vb/bin/python"
        )
    demo = o.data == demo_list("test")
    if demo and o.video not in (DEMO_BUCKET, None):
        raise ValueError(f"video={o.video}; expected {DEMO_BUCKET}, the demo judge's; fix: --video, or --data")
    if o.data is None or (demo and not o.data.is_file()):  # `prepare` will make it
        return o
    rows, report = data.read_rows(o.data)
    report.check(len(rows) + len(report.drops), o.max_drop)
    if o.videos is None:
        return o
    files, rows = videos_of(o.videos), rows[: o.limit]
    if not files or len(files) != len(rows):
        raise ValueError(
            f"{o.videos} holds {len(files)} mp4s for {len(rows)} rows of {o.data}; expected one a row, in order; "
            "fix: --videos, --data or --limit"
        )
    try:
        first = probe_video(files[0])
    except VideoError as error:
        raise ValueError(f"{error}; expected a video; fix: --videos") from None
    frames = data.resampled_length(first.frames, data.frame_step(first.fps, o.fps or None))
    return o if o.video else dataclasses.replace(o, video=f"{frames}x{first.height}x{first.width}")


def videos_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.mp4") if not file.name.startswith("."))


def requests(o: InferOptions, config: WanConfig) -> list[images.Request]:
    """What to sample; without any prompt, a few the demo model knows.

    Raises:
        ValueError: nothing to sample, or not the pictures that the size takes.
    """
    image = o.video_in if o.image is None and config.task == "i2v" and o.prompts is None else o.image
    given = [flag for flag, value in (("--image", image), ("--last-image", o.last_image)) if value is not None]
    takes = ["--image", "--last-image"][: config.given_frames]
    if o.prompts is not None and given:
        raise ValueError(f"--prompts and {given[0]}; expected the pictures in the file's rows; fix: no {given[0]}")
    if o.prompts is not None:
        return images.read_requests(o.prompts, "--prompts", config.given_frames)
    if not o.prompt and not given and o.weights == DEMO_WEIGHTS:
        known = ["a handwritten three moves to the left", "a handwritten seven moves up and to the right"]
        return [images.Request(prompt) for prompt in known]
    if not o.prompt and not given and o.weights == DEMO_I2V:
        return images.read_requests(HERE / "demo" / "images" / "prompts.tsv", "--prompts", 1)
    if not o.prompt:
        raise ValueError("nothing to sample; fix: --prompt TEXT or --prompts FILE")
    if given != takes:
        change = [f"give {flag}" for flag in takes if flag not in given]
        change += [f"leave out {flag}" for flag in given if flag not in takes]
        raise ValueError(
            f"{TASKS[config.task]} with {' and '.join(given) or 'no picture'}; expected "
            f"{' and '.join(takes) or 'no picture'}; fix: {', '.join(change)}, or another --size"
        )
    return [images.Request(o.prompt, image, o.last_image)]


def prepare(o) -> None:
    """Before any process starts: make the demo data if this job uses it."""
    if is_demo(getattr(o, "data", None)):
        from .demo import make_data

        few = {"train": 320, "test": 80, "blinking": True}
        plain, blinking, pairs = (demo_list("", style).parent for style in STYLES)
        if o.data.parent != blinking:
            make_data.make(plain)
        if o.data.parent != plain:
            make_data.make(blinking, **few)
        if o.data.parent == pairs:
            make_data.make_pairs(pairs, chosen=blinking, rejected=plain)
    if type(o) is InferOptions:
        unfinished(o, requests(o, model_config(o)))


def dry_run(o) -> str:
    """What a run would be, from the options alone."""
    config = model_config(o)
    if isinstance(o, ExtractOptions):
        return f"{cli.to_toml(o)}\nfor a model of parameters: {config.parameters:,}; world {o.world}"
    text = [
        cli.to_toml(o),
        f"parameters: {config.parameters:,}"
        + (f", in training {trained_parameters(o, config):,}" if getattr(o, "adapts", False) else ""),
        f"world {o.world}: tp {o.tp} cp {o.cp} dp {o.dp} pp {o.pp}",
    ]
    text.append(cli.rank_map(o))
    for bucket in data.parse_buckets(getattr(o, "buckets", None) or getattr(o, "video", None) or "1x16x16"):
        grid = latent_grid(bucket)
        flops, tokens = config.flops(grid), config.tokens(grid)
        step = 3 * config.flops(grid, getattr(o, "adapts", False)) * (o.global_batch or 1)
        text.append(
            f"{bucket}: {tokens} tokens, {flops / 1e12:.3f} TFLOP per sample forward, "
            f"{step / 1e12:.3f} TFLOP per training step"
        )
        text.append(f"memory per rank, estimated: {memory_estimate(o, config, tokens) / 2**30:.2f} GiB")
        if getattr(o, "cache", None) in ("attention", "blocks"):
            text.append(f"cache on each rank: up to {cache_gib(o, config, tokens):.3g} GiB")
    return "\n".join(text)


def trained_parameters(o, config: WanConfig) -> int:
    """All, or those of the adapters."""
    if not getattr(o, "adapts", False):
        return config.parameters
    if o.adapter:
        return sum(math.prod(entry.shape) for entry in weights.index(o.adapter, weights.PEFT_FILES).values())
    ends = tuple(f".{target}.weight" for target in o.lora_targets.split(","))
    return sum(
        o.lora_rank * sum(s) for n, s in convert.shapes(config).items() if len(s) == 2 and f".{n}".endswith(ends)
    )


def memory_estimate(o, config: WanConfig, tokens: int) -> float:
    """Bytes per rank of weights, gradients, optimizer and saved activations; kernels' workspace and the frozen encoders
    not counted. memory.py measures it.

    Weights and gradients in their dtypes, fp32 master weights and two moments sharded over dp*cp; of the activations
    what the backward reads of each block, for as many micro-batches as 1F1B holds (stage s: pp - s; the fullest counts).
    At the peak the last block's are whole, and the gradients of its MLP's hidden rows are beside them.
    """
    dtype, stages, layers = 4 if o.precision == "fp32" else 2, o.stage_layers(config.num_layers), config.num_layers
    share = config.parameters / o.tp * max(stages) / sum(stages)
    trained = share * trained_parameters(o, config) / config.parameters
    shards = o.dp * o.cp
    kept_weights = share * dtype / (shards if o.fsdp else 1)
    gradients = trained * (dtype if o.fsdp else 4) / (shards if o.fsdp else 1)
    moments = 4 if getattr(o, "moments", "fp32") == "bf16" else 8
    master = trained * (moments if dtype == 4 else 4 + moments) / shards  # fp32 weights are their own master

    tokens, rows = tokens / o.cp * o.micro_batch * dtype, config.context_rows * o.micro_batch * dtype  # as bytes
    D, Fd, tp, sp = config.dim, config.ffn_dim, o.tp, o.tp if o.sp else 1
    attentions = 3 if config.image_dim else 2  # self, text, image
    # Of tokens: the residual stream five times, the normed inputs of three linears (gathered by sp), of self-attention
    # queries and keys twice, values, output and its copy, of cross-attention queries twice and output; the MLP's hidden
    # rows twice. Of the context's rows: keys twice and values.
    everything = tokens * (5 * D / sp + 3 * D + (8 + attentions) * D / tp + 2 * Fd / tp) + rows * 3 * D / tp
    products = tokens * (3 * D + 4 * D / tp + Fd / tp) + rows * 2 * D / tp  # what linears put out
    adapts = getattr(o, "adapts", False)  # adapters put as much out again
    kept = {
        "none": everything,
        "selective": tokens * (D / sp + attentions * D / tp) + products * (2 if adapts else 1),
        "full": tokens * D / sp,
    }[o.recompute]
    hidden = 2 * tokens * Fd / tp
    again = {"none": 0.0, "selective": everything - kept, "full": everything}[o.recompute]
    if getattr(o, "offload_activations", False):
        held, again = 0, max(again, hidden)
    else:
        held = max(n * min(o.pp - stage, o.micro_batches) for stage, n in enumerate(stages))
    gathered = 3 * config.parameters / layers * dtype if o.fsdp else 0  # two blocks' weights, one's gradients
    return kept_weights + gradients + master + kept * held + max(again, 0) + hidden + gathered
