"""Wan2.1 text-to-video: the architecture, its published sizes, and the options of this recipe's jobs.

Sources: Wan-Video/Wan2.1 @ 9737cba9 `wan/configs/*.py`, diffusers `scripts/convert_wan_to_diffusers.py`.
No torch here: options are checked before anything heavy is imported.
"""

import dataclasses
import json
import math
import os
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import cli, weights
from common.cli import option

from . import convert, data

HERE = Path(__file__).parent
DEMO_WEIGHTS = HERE / "demo" / "weights"
DEMO_DATA = HERE.parents[1] / "data" / f"{HERE.name}-demo"
DEMO_BUCKET = tomllib.loads((HERE / "parallel.toml").read_text())["tiny"]["buckets"]


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
        per_token = (
            self.num_layers * (4 * D * D + 2 * D * D + 2 * D * self.ffn_dim) + (self.in_dim + self.out_dim) * patch * D
        )
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
        _refuse_other(
            values, {"model_type": "t2v", "qk_norm": True, "cross_attn_norm": True, "window_size": [-1, -1]}, path
        )
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
            raise ValueError(
                f"{path}: {key} = {found!r}; this recipe is Wan2.1 text-to-video, {key} = {only!r}; fix: --weights"
            )


def _refuse_unknown(values: dict, path: Path) -> None:
    if values:
        raise ValueError(f"{path} has keys this recipe does not know: {', '.join(values)}; fix: --weights")


_COMMON = dict(in_dim=16, out_dim=16, patch_size=(1, 2, 2), text_dim=4096, text_len=512, freq_dim=256, eps=1e-6)
SIZES = {
    "tiny": WanConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=4, **(_COMMON | {"text_dim": 64, "text_len": 16})),
    "1.3B": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, **_COMMON),
    "14B": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, **_COMMON),
}


# ----------------------------------------------------------------------------------------------------------- options


@dataclass(frozen=True, kw_only=True)
class TrainOptions(cli.TrainOptions):
    job: str = option("which launcher this is: pretrain or finetune", "pretrain", group="job")
    from_scratch: bool = option("draw the transformer's weights instead of loading them", False, group="model")
    buckets: str = option("video shapes FRAMESxHEIGHTxWIDTH, comma-separated", None, group="data", layout=True)
    fps: float = option(
        "frame rate videos are resampled to (0: their own)", 16.0, group="data", layout=True, within="[0, inf)"
    )
    cache: Path | None = option("folder that keeps latents and text embeddings once computed", group="data")
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
    sample_prompts: Path | None = option("text file of prompts sampled at the end", group="samples")
    sample_steps: int = option("sampling steps", 50, group="samples", layout=True, within="[1, inf)")
    cfg: float = option("guidance scale of the samples", 5.0, group="samples", layout=True, within="[0, inf)")


@dataclass(frozen=True, kw_only=True)
class InferOptions(cli.LayoutOptions):
    checkpoint: Path | None = option(
        "sharded checkpoint whose transformer replaces the one of --weights", group="model"
    )
    prompt: str = option("what to show", group="job")
    prompts: Path | None = option("text file, a prompt per line", group="job")
    negative: str = option("what not to show", "", group="job")
    out: Path = option("folder for the videos (default runs/<recipe>-infer-<time>)", group="job")
    video: str = option("shape FRAMESxHEIGHTxWIDTH", None, group="job", layout=True)
    fps: float = option("frame rate of the written file", 16.0, group="job", layout=True, within="[0, inf)")
    sample_steps: int = option("sampling steps", 50, group="job", layout=True, within="[1, inf)")
    cfg: float = option("guidance scale (1: no guidance)", 5.0, group="job", layout=True, within="[0, inf)")
    sampler: Literal["unipc", "euler"] = option("UniPC, or flow-match Euler", "unipc", group="job")
    shift: float = option("flow-matching timestep shift", 5.0, group="job", layout=True, within="(0, inf)")
    seed: int = option("seed of the noise; prompt i uses seed + i", 0, group="job")
    format: Literal["mp4", "gif", "both"] = option("kind of file written", "both", group="job")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(cli.LayoutOptions):
    to: Literal["diffusers", "released", "original", "sharded"] = option(
        "what to write (released: diffusers); the kind of --weights is recognised", group="job"
    )
    out: Path = option("folder to write", group="job")
    ema: bool = option("write a sharded checkpoint's averaged weights", False, group="job")


@dataclass(frozen=True, kw_only=True)
class PerfOptions(TrainOptions):
    only: Literal["all", "step", "run", "load"] = option("which benchmark", "all", group="job")
    repeats: int = option("timed training steps", 60, group="job", within="[1, inf)")
    compiled_peer: bool = option("let the peer also run under torch.compile", True, group="job")
    record: bool = option("add the rows to perf.jsonl", False, group="job")


JOBS = {
    "train": (TrainOptions, "Train Wan2.1 text-to-video."),
    "infer": (InferOptions, "Sample videos from Wan2.1 text-to-video."),
    "convert": (ConvertOptions, "Convert Wan2.1 weights between the original, diffusers and sharded layouts."),
    "perf": (PerfOptions, "Measure this recipe on this machine."),
}


def parse(script: str, argv: list[str]):
    """argv of a job -> its checked options. See common/cli.py for the contract.

    Raises:
        ValueError: anything about the options, the weights folder or the data list that can be known to be wrong.
    """
    cls, description = JOBS[script]
    o = cli.parse_options(cls, argv, description, HERE / "parallel.toml", _default_size)
    o = _with_demo(o, getattr(o, "job", script), asked={word.split("=")[0] for word in argv})
    if script in ("infer", "convert"):  # these have no batch
        o = dataclasses.replace(o, micro_batch=1, global_batch=None)
    config = model_config(o)
    shapes = {"train": "buckets", "perf": "buckets", "infer": "video"}.get(script)
    for bucket in data.parse_buckets(getattr(o, shapes)) if shapes else [None]:
        tokens = config.tokens(latent_grid(bucket)) if bucket else None
        o = cli.check_layout(o, heads=config.num_heads, layers=config.num_layers, tokens=tokens)
    _check_folder(o, config, script)
    if script == "train" and o.data != demo_list("train"):
        rows, report = data.read_rows(o.data)
        report.check(len(rows) + sum(report.counts.values()), o.max_drop)
    if script == "train":
        cli.check_run(o)
        if o.sample_prompts:
            read_prompts(o.sample_prompts, "--sample-prompts")
    if script == "infer":
        prompts(o)
        if o.checkpoint is not None and not o.checkpoint.is_dir():
            raise ValueError(f"--checkpoint {o.checkpoint} does not exist; expected a sharded one; fix: --checkpoint")
    if script == "convert":
        if o.to is None:
            raise ValueError("nothing to convert to; fix: --to diffusers, original or sharded")
        weights.refuse_existing(o.out, "--out")
    if getattr(o, "export", None):
        weights.refuse_existing(o.export, "--export")
    return o


def latent_grid(bucket: data.Bucket) -> tuple[int, int, int]:
    """Frames, rows, columns of the latents; the VAE's strides are 4, 8, 8 and the first frame stands alone."""
    return (bucket.frames - 1) // 4 + 1, bucket.height // 8, bucket.width // 8


def _default_size(weights: Path | None) -> str:
    """The size whose architecture the weights folder has; without one, tiny on a CPU, else the smallest published."""
    if weights is None or weights == DEMO_WEIGHTS:
        return "tiny" if weights or os.environ.get("ZOO_DEVICE", "cpu") == "cpu" else "1.3B"
    if is_sharded(weights):
        found = WanConfig(**_tuples(json.loads((weights / "state.json").read_text())["model"]))
    else:
        found = WanConfig.from_folder(weights)
    differs = {name: _differs(found, dataclasses.replace(c, text_len=found.text_len)) for name, c in SIZES.items()}
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


def _tuples(values: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _with_demo(o, job: str, asked: set[str]):
    """Fill in the embedded demo where the user named no data or no weights; what was asked for stays."""
    changes = {}
    if hasattr(o, "data") and o.data is None:
        changes |= {
            "data": demo_list("train"),
            "buckets": o.buckets if "--buckets" in asked or isinstance(o, PerfOptions) else DEMO_BUCKET,
            "cache": o.cache or DEMO_DATA.with_name(DEMO_DATA.name + "-latents"),
        }
    if hasattr(o, "video") and o.weights is None and "--video" not in asked:
        changes["video"] = DEMO_BUCKET
    if o.weights is None:
        if o.size != "tiny" and getattr(o, "data", o) is not None:  # drawn weights are for trying a layout out
            raise ValueError(f"--size {o.size}, except to train on the demo data, needs --weights; fix: --weights DIR")
        changes["weights"] = DEMO_WEIGHTS
        if o.size != "tiny":
            print(
                f"note: no --weights: size {o.size} starts from drawn weights, with the demo's tiny VAE and text encoder",
                file=sys.stderr,
            )
            changes["from_scratch"] = True
        elif job in ("pretrain", "perf"):
            changes["from_scratch"] = True
    if getattr(o, "out", "") is None:
        changes["out"] = cli.default_out(HERE.name, job)
    return dataclasses.replace(o, **changes)


def demo_list(split: str) -> Path:
    return DEMO_DATA / f"{split}.jsonl"


def model_config(o) -> WanConfig:
    """The architecture: the weights folder's own; drawn weights have the size's, with the folder's text encoder."""
    if is_sharded(o.weights):
        return WanConfig(**_tuples(json.loads((o.weights / "state.json").read_text())["model"]))
    found = WanConfig.from_folder(o.weights)
    if o.size not in SIZES:
        raise ValueError(f"unknown size {o.size!r}; expected {', '.join(SIZES)}; fix: --size, or add it to config.py")
    wanted = dataclasses.replace(SIZES[o.size], text_dim=found.text_dim, text_len=found.text_len)
    if not getattr(o, "from_scratch", False) and (differs := _differs(found, wanted)):
        raise ValueError(f"{o.weights} is not of size {o.size}: {', '.join(differs)}; fix: --size or --weights")
    return wanted


def _check_folder(o, config: WanConfig, script: str) -> None:
    """The parts a job needs are there, and the transformer's tensors are exactly the model's."""
    if script != "convert":
        for part in ("vae", "text_encoder", "tokenizer"):
            if not (o.weights / part).is_dir():
                raise ValueError(f"{o.weights} has no {part}/; expected a released diffusers folder; fix: --weights")
    if not is_sharded(o.weights) and not getattr(o, "from_scratch", False):
        convert.released_entries(o.weights, config)


def prompts(o: InferOptions) -> list[str]:
    """The prompts to sample; without any, a few the demo model knows."""
    if o.prompts is not None:
        return read_prompts(o.prompts, "--prompts")
    if o.prompt:
        return [o.prompt]
    if o.weights == DEMO_WEIGHTS:
        return ["a handwritten three moves to the left", "a handwritten seven moves up and to the right"]
    raise ValueError("nothing to sample; fix: --prompt TEXT or --prompts FILE")


def read_prompts(path: Path, flag: str) -> list[str]:
    """The lines of a text file that are not empty. ValueError: there is none."""
    if not path.is_file():
        raise ValueError(f"{flag} {path} does not exist; expected a text file, a prompt per line; fix: {flag}")
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{flag} {path} holds no prompt; expected a prompt per line; fix: {flag}")
    return lines


def prepare(o) -> None:
    """Before any process starts: make the demo data if this job uses it."""
    if getattr(o, "data", None) == demo_list("train"):
        from .demo import make_data

        make_data.make(DEMO_DATA)


def dry_run(o) -> str:
    """What a run would be, from the options alone."""
    config = model_config(o)
    text = [
        cli.to_toml(o),
        f"parameters: {config.parameters:,}",
        f"world {o.world}: tp {o.tp} cp {o.cp} dp {o.dp} pp {o.pp}",
    ]
    text.append(cli.rank_map(o))
    for bucket in data.parse_buckets(getattr(o, "buckets", None) or getattr(o, "video", None) or "1x16x16"):
        grid = latent_grid(bucket)
        flops, tokens = config.flops(grid), config.tokens(grid)
        text.append(
            f"{bucket}: {tokens} tokens, {flops / 1e12:.3f} TFLOP per sample forward, "
            f"{3 * flops * (o.global_batch or 1) / 1e12:.3f} TFLOP per training step"
        )
        text.append(f"memory per rank, estimated: {memory_estimate(o, config, tokens) / 2**30:.2f} GiB")
    return "\n".join(text)


def memory_estimate(o, config: WanConfig, tokens: int) -> float:
    """Bytes per rank of weights, gradients, optimizer and saved activations; workspace and encoders not counted.

    Weights and gradients in their dtypes, fp32 master weights and two moments sharded over dp*cp; of the activations
    what the backward reads of each block (recompute none: all of it; full: the block's input alone).
    """
    dtype = 4 if o.precision == "fp32" else 2
    stages = o.stage_layers(config.num_layers)
    share = config.parameters / o.tp * max(stages) / sum(stages)
    shards = o.dp * o.cp
    weights = share * dtype / (shards if o.fsdp else 1)
    gradients = share * (dtype if o.fsdp else 4) / (shards if o.fsdp else 1)
    moments = 4 if getattr(o, "moments", "fp32") == "bf16" else 8
    master = share * (moments if dtype == 4 else 4 + moments) / shards  # fp32 weights are their own master
    local = tokens / o.cp * o.micro_batch
    D, Fd, tp, sp = config.dim, config.ffn_dim, o.tp, o.tp if o.sp else 1
    everything = local * (dtype * (10 * D / tp + 2 * Fd / tp + 5 * D / sp) + 4 * 5 * D / sp)
    kept = {"none": everything, "selective": local * dtype * (9 * D / tp + Fd / tp), "full": local * D * dtype / sp}[
        o.recompute
    ]
    offload = getattr(o, "offload_activations", False)
    blocks = 0 if offload else max(stages)
    return weights + gradients + master + kept * blocks + (everything if offload or o.recompute == "full" else 0)
