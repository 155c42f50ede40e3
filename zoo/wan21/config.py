"""Wan2.1 text- and image-to-video: the architecture, its published sizes, and what follows from them.

Sources: Wan-Video/Wan2.1 @ 9737cba9 `wan/configs/*.py`, diffusers `scripts/convert_wan_to_diffusers.py`.
No torch here: options are checked before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from common import release, weights
from common.diffusion.buckets import Bucket
from common.release import is_sharded


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Field names are those of the original `config.json`. The last three are for the images that condition a video."""

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
    image_dim: int | None  # width of the CLIP features; None for text-to-video, which has no image branch
    image_tokens: int  # number of CLIP features of one image
    first_last: bool  # two images, the first and the last frame; a positional embedding distinguishes them

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def task(self) -> str:
        """`model_type` of the original config.json: t2v, i2v or flf2v."""
        return "t2v" if self.image_dim is None else "flf2v" if self.first_last else "i2v"

    @property
    def given_frames(self) -> int:
        """Number of frames that a video is conditioned on: none, the first, or the first and the last."""
        return {"t2v": 0, "i2v": 1, "flf2v": 2}[self.task]

    @property
    def image_rows(self) -> int:
        """Number of CLIP features that a video is conditioned on: 0, 257 for one image, or 514 for two."""
        return self.image_tokens * self.given_frames

    @property
    def context_rows(self) -> int:
        """Rows that pipeline stages send behind the tokens: 6 of modulation, 1 of time, those of text and of images."""
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
        """Returns the number of tokens of a latent grid (frames, rows, columns)."""
        return math.prod(n // p for n, p in zip(latent, self.patch_size, strict=True))

    def flops(self, latent: tuple[int, int, int], frozen: bool = False) -> int:
        """Counts the model FLOPs of one sample's forward; a multiply-add counts as two. A training step takes three
        times that; recomputation is not counted. 2 L (linear weights) + 4 L^2 D self-attention + 4 L T D
        cross-attention to T rows of text, and the same to the I rows of an image. With frozen, the result is a third of
        a step that computes no weight gradients; adapters' FLOPs are not counted."""
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
    def from_folder(cls, folder: Path) -> WanConfig:
        """Reads the architecture of a released folder: diffusers (`transformer/config.json`) or original
        (`config.json`).

        Raises:
            ValueError: the folder holds another model, or a key or value that this recipe does not know.
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
        if tokenizer.is_file():  # the demo pads captions to fewer tokens than the released 512
            longest = weights.read_json(tokenizer).get("model_max_length", config.text_len)
            config = dataclasses.replace(config, text_len=min(config.text_len, longest))
        clip = folder / "image_encoder" / "config.json"
        if config.image_dim is not None and clip.is_file():  # features: a class token and the patches
            values = weights.read_json(clip)
            config = dataclasses.replace(config, image_tokens=1 + (values["image_size"] // values["patch_size"]) ** 2)
        return config

    @classmethod
    def _from_diffusers(cls, values: dict, path: Path) -> WanConfig:
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
    def _from_original(cls, values: dict, path: Path) -> WanConfig:
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
        # The released file has these keys only if they differ from the defaults of the original class.
        defaults = {"patch_size": (1, 2, 2), "text_dim": 4096, "image_dim": self.image_dim and CLIP_DIM}
        return values | {k: getattr(self, k) for k, default in defaults.items() if getattr(self, k) != default}


def _refuse_other(values: dict, fixed: dict, path: Path) -> None:
    for key, only in fixed.items():
        value = values.pop(key, only)
        if value != only:
            raise ValueError(f"{path}: {key} = {value!r}; this recipe is Wan2.1, {key} = {only!r}; fix: --weights")


def _refuse_unknown(values: dict, path: Path) -> None:
    if values:
        raise ValueError(f"{path} has keys this recipe does not know: {', '.join(values)}; fix: --weights")


_TINY = dict(dim=128, ffn_dim=512, num_heads=4, num_layers=4, text_dim=64, text_len=16)
_1_3B = dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, text_dim=4096, text_len=512)
_14B = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, text_dim=4096, text_len=512)
_COMMON = dict(out_dim=16, patch_size=(1, 2, 2), freq_dim=256, eps=1e-6)
_TEXT = dict(in_dim=16, image_dim=None, image_tokens=0, first_last=False, **_COMMON)
# in_dim: 16 channels of noised latents, 4 of mask, 16 of the given frames' latents. CLIP is ViT-H/14 at 224x224.
CLIP_DIM, CLIP_TOKENS = 1280, 257
_IMAGE = dict(in_dim=36, image_dim=CLIP_DIM, image_tokens=CLIP_TOKENS, first_last=False, **_COMMON)
SIZES = {
    "tiny": WanConfig(**_TINY, **_TEXT),
    "1.3B": WanConfig(**_1_3B, **_TEXT),
    "14B": WanConfig(**_14B, **_TEXT),
    "tiny-i2v": WanConfig(**_TINY, **(_IMAGE | {"image_dim": 64, "image_tokens": 17})),
    "tiny-flf2v": WanConfig(**_TINY, **(_IMAGE | {"image_dim": 64, "image_tokens": 17, "first_last": True})),
    "1.3B-i2v": WanConfig(**_1_3B, **_IMAGE),  # in the published table of speeds; weights of it are not published
    "14B-i2v": WanConfig(**_14B, **_IMAGE),  # 480P and 720P
    "14B-flf2v": WanConfig(**_14B, **(_IMAGE | {"first_last": True})),
}
TASKS = {"t2v": "text-to-video", "i2v": "image-to-video", "flf2v": "video from a first and a last frame"}


def shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Returns the full shape of every parameter, by its name in the original checkpoint."""
    D, Fd, T = config.dim, config.ffn_dim, config.text_dim

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    out = {"patch_embedding.weight": (D, config.in_dim, *config.patch_size), "patch_embedding.bias": (D,)}
    out |= linear("text_embedding.0", T, D) | linear("text_embedding.2", D, D)
    out |= linear("time_embedding.0", config.freq_dim, D) | linear("time_embedding.2", D, D)
    out |= linear("time_projection.1", D, 6 * D)
    if config.image_dim is not None:
        Im = config.image_dim
        out |= {f"img_emb.proj.0.{leaf}": (Im,) for leaf in ("weight", "bias")}
        out |= linear("img_emb.proj.1", Im, Im) | linear("img_emb.proj.3", Im, D)
        out |= {f"img_emb.proj.4.{leaf}": (D,) for leaf in ("weight", "bias")}
    if config.first_last:
        out["img_emb.emb_pos"] = (1, config.image_rows, Im)
    for i in range(config.num_layers):
        block = f"blocks.{i}"
        out[f"{block}.modulation"] = (1, 6, D)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                out |= linear(f"{block}.{attention}.{part}", D, D)
            out |= {f"{block}.{attention}.norm_{part}.weight": (D,) for part in "qk"}
        if config.image_dim is not None:
            out |= linear(f"{block}.cross_attn.k_img", D, D) | linear(f"{block}.cross_attn.v_img", D, D)
            out[f"{block}.cross_attn.norm_k_img.weight"] = (D,)
        out |= {f"{block}.norm3.weight": (D,), f"{block}.norm3.bias": (D,)}
        out |= linear(f"{block}.ffn.0", D, Fd) | linear(f"{block}.ffn.2", Fd, D)
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    return out | {"head.modulation": (1, 2, D)} | linear("head.head", D, config.out_dim * patch)


def latent_grid(bucket: Bucket) -> tuple[int, int, int]:
    """Returns the latents' frames, rows, columns. The VAE's strides are 4, 8, 8; frame 0 is a latent frame by
    itself."""
    return (bucket.frames - 1) // 4 + 1, bucket.height // 8, bucket.width // 8


# ------------------------------------------------------------------------------------------------------------ a folder


def _sharded_config(folder: Path) -> WanConfig:
    refuse_adapters_alone(folder, "--weights with that and --adapter with the run's adapter/")
    values = json.loads((folder / "state.json").read_text())["model"]
    return WanConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def refuse_adapters_alone(folder: Path, fix: str) -> None:
    """Raises ValueError if a sharded checkpoint holds only adapters. fix: what to do instead, in words."""
    start = json.loads((folder / "state.json").read_text()).get("start", {})
    if "r" in start:
        raise ValueError(f"{folder} holds adapters of {start['weights']} and no whole model; fix: {fix}")


def size_of(folder: Path) -> str:
    """Returns the published size that has the architecture of a weights folder. ValueError: no size has it; the message
    names the nearest."""
    stored = _sharded_config(folder) if is_sharded(folder) else WanConfig.from_folder(folder)
    ignored = {"text_len": stored.text_len, "image_tokens": stored.image_tokens}  # set by the encoders, not by the size
    sizes = {name: dataclasses.replace(config, **ignored) for name, config in SIZES.items()}
    return release.name_size(folder, {name: release.differences(stored, config) for name, config in sizes.items()})


def model_config(o) -> WanConfig:
    """Returns the architecture of `o.weights`. With --from-scratch it is that of `o.size`, with the dimensions of the
    folder's text and image encoders.

    Raises:
        ValueError: the folder has the architecture of another size, or of none.
    """
    if o.size not in SIZES:
        raise ValueError(f"unknown size {o.size!r}; expected {', '.join(SIZES)}; fix: --size, or add it to config.py")
    stored = _sharded_config(o.weights) if is_sharded(o.weights) else WanConfig.from_folder(o.weights)
    if o.features and not is_sharded(o.weights):  # the folder may lack a tokenizer, so the features decide
        saved = weights.read_json(o.features / "settings.json")
        stored = dataclasses.replace(stored, text_len=saved["text_len"], image_tokens=saved["image_tokens"])
    expected = dataclasses.replace(SIZES[o.size], text_dim=stored.text_dim, text_len=stored.text_len)
    if None not in (expected.image_dim, stored.image_dim):
        expected = dataclasses.replace(expected, image_dim=stored.image_dim, image_tokens=stored.image_tokens)
    if not o.from_scratch and (differences := release.differences(stored, expected)):
        raise ValueError(f"{o.weights} is not of size {o.size}: {', '.join(differences)}; fix: --size or --weights")
    return expected


# ------------------------------------------------------------------------------------------------------------- memory


def memory_estimate(o, config: WanConfig, tokens: int, trained: int) -> float:
    """Estimates the bytes per rank of weights, gradients, optimizer and saved activations; memory.py measures them.
    Kernels' workspace and the frozen encoders are not counted. trained: number of parameters that train.

    Weights and gradients count in their dtypes. The fp32 master weights and the two moments are sharded over dp*cp.
    Activations are what the backward reads of each block, for as many micro-batches as 1F1B holds (stage s: pp - s; the
    fullest stage counts). At the peak, all activations of the last block exist, beside the gradients of its MLP's
    hidden rows.
    """
    dtype, stages, layers = 4 if o.precision == "fp32" else 2, o.stage_layers(config.num_layers), config.num_layers
    share = config.parameters / o.tp * max(stages) / sum(stages)
    trained = share * trained / config.parameters
    shards = o.dp * o.cp
    weight_bytes = share * dtype / (shards if o.fsdp else 1)
    weight_bytes *= 2 if o.full else 1  # dpo --full keeps a frozen copy
    gradients = trained * (dtype if o.fsdp else 4) / (shards if o.fsdp else 1)
    master = trained * o.optimizer_bytes / shards

    tokens, rows = tokens / o.cp * o.micro_batch * dtype, config.context_rows * o.micro_batch * dtype  # in bytes
    D, Fd, tp, sp = config.dim, config.ffn_dim, o.tp, o.tp if o.sp else 1
    outputs = 4 if config.image_dim else 2  # of attention: self, text; with an image also image, text + image
    streams = 5 if dtype == 4 else 6
    # Saved for tokens: the residual stream five times, in bf16 once as fp32; the normed inputs of three linears
    # (gathered under sp); in self-attention queries and keys twice, and values; in cross-attention queries twice; the
    # attention's outputs; the MLP's hidden rows twice. Saved for the context's rows: keys twice and values.
    everything = tokens * (streams * D / sp + 3 * D + (7 + outputs) * D / tp + 2 * Fd / tp) + rows * 3 * D / tp
    saved = {
        "none": everything,
        # Recomputed: one row of the residual stream, normed inputs, normed queries and keys, the second hidden rows.
        "selective": tokens * (4 * D / sp + (4 + outputs) * D / tp + Fd / tp) + rows * 2 * D / tp,
        "full": tokens * D / sp,
    }[o.recompute]
    hidden = 2 * tokens * Fd / tp
    recomputed = {"none": 0.0, "selective": everything - saved, "full": everything}[o.recompute]
    if o.offload_activations:
        copies, recomputed = 0, max(recomputed, hidden)
    else:
        copies = max(n * min(o.pp - stage, o.micro_batches) for stage, n in enumerate(stages))
    gathered = 3 * config.parameters / layers * dtype if o.fsdp else 0  # weights of two blocks, gradients of one
    return weight_bytes + gradients + master + saved * copies + max(recomputed, 0) + hidden + gathered


def cache_gib(o, config: WanConfig, tokens: int) -> float:
    """Returns the most GiB that `--cache` holds on a rank: one tensor of this rank's tokens per guidance branch that it
    computes and, for `attention`, per block that it holds."""
    tensor_bytes = tokens // o.cp // (o.tp if o.sp else 1) * config.dim * (4 if o.precision == "fp32" else 2)
    tensors = {"none": 0, "attention": max(o.stage_layers(config.num_layers)), "blocks": o.vpp}[o.cache]
    return tensor_bytes * tensors * (1 if o.cfg_parallel or o.cfg == 1 else 2) / 2**30
