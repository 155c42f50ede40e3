"""The options of this recipe's jobs, the values that the demo fills in, and every check that is possible before a
process starts.

Each job has a dataclass of options and a function that completes and checks them (`JOBS`). What all video jobs share is
in common/diffusion/options.py. No torch here: `--help` and every error come before anything heavy is imported.
"""

import argparse
import dataclasses
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import cli, jobs, resume, weights
from common.cli import option
from common.diffusion import buckets, features
from common.diffusion import options as shared
from common.diffusion.buckets import Bucket
from common.diffusion.lists import check_list
from common.diffusion.requests import Request, check_clip, check_requests, choose_requests, read_requests

from . import convert
from .config import (
    SIZES,
    TASKS,
    WanConfig,
    cache_gib,
    is_sharded,
    latent_grid,
    memory_estimate,
    model_config,
    refuse_adapters_alone,
    shapes,
    size_of,
)

HERE = Path(__file__).parent
STRIDES = buckets.Strides(frames=4, side=16)  # 4n+1 frames for the causal VAE; side: stride 8 of the VAE x patch 2
DEMO_WEIGHTS, DEMO_I2V = HERE / "demo" / "weights", HERE / "demo" / "weights-i2v"
DEMO_DATA = HERE.parents[1] / "data" / f"{HERE.name}-demo"
DEMO_CAPTIONS = 80  # the captions that the judge scores: every digit in every direction
DEMO_PROMPTS = ("a handwritten three moves to the left", "a handwritten seven moves up and to the right")
STYLES = ("", "blinking", "pairs")  # of the demo's data: clips, clips that blink, pairs of both
DEMO_LORA = {"steps": 200, "lr": 2e-3, "save_every": 200}  # a style takes fewer steps than digits
DEMO_BUCKET = tomllib.loads((HERE / "parallel.toml").read_text())["tiny"]["buckets"]
DPO = {"weighting": "none", "caption_dropout": 0.0}  # defaults of dpo_*.sh, as in the paper
DEMO_DPO = {"steps": 150, "lr": 1e-3, "save_every": 150, "sft_weight": 100.0}
RATES = {"lora": 1e-4, "dpo": 1e-5}  # learning rates of adapters; layouts of published sizes have other ones
LORA_TARGETS = "q,k,v,o,ffn.0,ffn.2"  # of every block: self- and cross-attention, MLP
LAUNCHERS = {"adapters": "lora_t2v.sh and lora_i2v.sh", "preference": "dpo_t2v.sh and dpo_i2v.sh"}


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions(shared.TrainOptions):
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


@dataclass(frozen=True, kw_only=True)
class TrainOptions(shared.PreferenceOptions, jobs.AdapterOptions, ObjectiveOptions):
    lora_alpha: float = option("their output is scaled by alpha / rank", 16.0, group="adapters", within="(0, inf)")
    lora_targets: str = option("linears to adapt, by the ends of their names", LORA_TARGETS, group="adapters")
    sample_prompts: Path | None = option(
        "file of prompts sampled at the end, in the forms of infer's --prompts", group="samples"
    )
    sample_steps: int = option("sampling steps", 50, group="samples", layout=True, within="[1, inf)")
    sample_shift: float = option("timestep shift of sampling", 5.0, group="samples", layout=True, within="(0, inf)")
    cfg: float = option("guidance scale of the samples", 5.0, group="samples", layout=True, within="[0, inf)")

    @property
    def adapts(self) -> bool:
        """Whether adapters train, and nothing else."""
        return self.job == "lora" or (self.job == "dpo" and not self.full)


@dataclass(frozen=True, kw_only=True)
class InferOptions(shared.InferOptions):
    sample_steps: int = option("sampling steps", 50, group="job", layout=True, within="[1, inf)")
    cfg: float = option("guidance scale (1: no guidance)", 5.0, group="job", layout=True, within="[0, inf)")
    sampler: Literal["unipc", "dpm", "euler"] = option("UniPC, DPM-Solver++ or flow-match Euler", "unipc", group="job")
    sample_shift: float = option("flow-matching timestep shift", 5.0, group="job", layout=True, within="(0, inf)")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(shared.ScoreOptions, InferOptions):
    format: Literal["mp4"] = option("kind of file written, which the scores are read from", "mp4", group="job")


@dataclass(frozen=True, kw_only=True)
class SearchOptions(InferOptions):
    psnr: float = option("quality to keep: dB to the uncached videos", 32.0, group="job", within="(0, inf)")


ExtractOptions = shared.ExtractOptions


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(shared.JobOptions):
    to: Literal["diffusers", "released", "original", "sharded"] = option(
        "what to write (released: diffusers); the kind of --weights is recognised", group="job"
    )
    out: Path = option("folder to write", group="job")
    ema: bool = option("write a sharded checkpoint's averaged weights", False, group="job")
    adapter: Path | None = option("adapter merged into what is written: folder or file", group="job")


@dataclass(frozen=True, kw_only=True)
class PerfOptions(TrainOptions):
    only: Literal["all", "step", "generation", "run", "load", "decode"] = option("which benchmark", "all", group="job")
    repeats: int = option("timed training steps", 60, group="job", within="[1, inf)")
    compiled_peer: bool = option("let both also run under torch.compile", True, group="job")
    record: bool = option("add the rows to perf.jsonl", False, group="job")


# ---- jobs ----


def parse(script: str, argv: list[str]):
    """Parses a job's argv to its completed and checked options. See common/cli.py for the contract.

    Raises:
        ValueError: any fault of the options, the weights folder or the data list that shows before a process starts.
    """
    cls, description, completed = JOBS[script]
    o = cli.parse_options(cls, argv, description, HERE / "parallel.toml", lambda folder: _default_size(folder, argv))
    shared.check_decoder(o)
    if o.out is None:
        o = dataclasses.replace(o, out=cli.default_out(HERE.name, o.job or script))
    return completed(o, {word.split("=")[0] for word in argv})


def _train(o: TrainOptions, flags: set[str]) -> TrainOptions:
    shared.check_job(o, flags, LAUNCHERS)
    o = features.apply_features(o, flags)
    on_demo = o.data is None  # also true with --features, which need no --weights
    o = _with_weights(_with_training_defaults(o, flags), pretrains=o.job == "pretrain", drawn=on_demo)
    config = _model(o)
    o = _with_buckets(o, config)
    _check_folder(o, config, encoders=not o.features)
    if o.adapter and (differences := convert.adapter(o.adapter, config)[1]):
        raise ValueError(
            f"{o.adapter} also changes {len(differences)} whole parameters, first {next(iter(differences))}, which no "
            "adapter holds; expected factors alone to train; fix: convert.sh --adapter with it, then --weights with that"
        )
    if o.features:
        shape = {"task": config.task, "text_dim": config.text_dim}
        features.check_features(o.features, encoder_facts(o, config) | shape)
    for path in (o.data, o.validation):
        if path is not None and not is_demo(path):
            check_list(path, o.max_drop, pairs=o.job == "dpo")
    cli.check_run(o)
    if o.sample_prompts:
        if not has_encoders(o.weights, config):
            raise ValueError(f"--sample-prompts: {o.weights} lacks VAE or encoders; fix: --weights with them")
        requests = read_requests(o.sample_prompts, "--sample-prompts", config.given_frames)
        check_requests(requests, parse_buckets(o.buckets)[0], "crop")
    if o.adapts:
        linears = [name.removesuffix(".weight") for name, shape in shapes(config).items() if len(shape) == 2]
        shared.check_targets(o.lora_targets, linears)
    resume.check(o, run_facts(o, config))
    jobs.check_written(o)
    return o


def _extract(o: ExtractOptions, flags: set[str]) -> ExtractOptions:
    o = shared.without_layout(o, flags)
    if o.data is None:
        shape = o.buckets if "--buckets" in flags else DEMO_BUCKET
        o = dataclasses.replace(o, data=demo_list("train"), buckets=shape)
    o = _with_weights(o)
    config = _model(o)
    o = _with_buckets(o, config)
    _check_folder(o, config)
    features.check_begun(o.out, feature_settings(o, config))
    if not is_demo(o.data):
        check_list(o.data, o.max_drop)
    return o


def _infer(o: InferOptions, flags: set[str]) -> InferOptions:
    o, config = _sampling(dataclasses.replace(o, micro_batch=1), flags)
    bucket = parse_buckets(o.video)[0]
    check_requests(requests_of(o, config), bucket, o.fit)
    if o.video_in is not None:
        check_clip(o.video_in, bucket, o.fps, o.fit)
        if int(o.sample_steps * o.strength) < 1:
            raise ValueError(
                f"strength={o.strength} of {o.sample_steps} steps is none; expected one at least; fix: --strength"
            )
    return o


def _search(o: SearchOptions, flags: set[str]) -> SearchOptions:
    preset = [n for n in ("cache_start", "cache_interval", "cache_end") if getattr(o, n) is not None]
    if preset:
        raise ValueError(f"{' and '.join(preset)}: search finds them; fix: leave them out")
    o, config = _sampling(dataclasses.replace(o, micro_batch=1), flags)
    if o.videos_at_once > 1:
        raise ValueError(
            f"search with {o.videos_at_once} videos at a time; expected all ranks to make the same one; fix: NPROC, --cfg-parallel, "
            "--cp or --tp"
        )
    check_requests(requests_of(o, config), parse_buckets(o.video)[0], o.fit)
    return o


def _evaluate(o: EvaluateOptions, flags: set[str]) -> EvaluateOptions:
    if o.videos is not None:
        if o.data is None or {"--weights", "--checkpoint", "--size"} & flags:
            raise ValueError("--videos come with --data, whose captions they show, and without a model; fix: --videos")
        o = dataclasses.replace(o, video=o.video if "--video" in flags else None)
        o = _check_scores(dataclasses.replace(o, weights=DEMO_WEIGHTS, size="tiny"))  # required, not used
        config = _model(o)
        return cli.check_layout(o, heads=config.num_heads, layers=config.num_layers, tokens=None)
    if o.data is None and o.prompts is None and o.prompt is None:
        video = o.video if "--video" in flags else DEMO_BUCKET
        o = dataclasses.replace(o, data=demo_list("test"), limit=o.limit or DEMO_CAPTIONS, video=video)
    o, config = _sampling(_check_scores(o), flags)
    if o.data is None:
        check_requests(requests_of(o, config), parse_buckets(o.video)[0], o.fit)
    return o


def _convert(o: ConvertOptions, flags: set[str]) -> ConvertOptions:
    o = _with_weights(dataclasses.replace(o, micro_batch=1, global_batch=None))
    config = _model(o)
    o = cli.check_layout(o, heads=config.num_heads, layers=config.num_layers, tokens=None)
    _check_folder(o, config, encoders=False)
    if o.adapter:
        convert.adapter(o.adapter, config)
    if o.to is None:
        raise ValueError("nothing to convert to; fix: --to diffusers, original or sharded")
    weights.refuse_existing(o.out, "--out")
    return o


def _perf(o: PerfOptions, flags: set[str]) -> PerfOptions:
    o = _with_weights(o, pretrains=True, drawn=True)
    config = _model(o)
    o = _with_buckets(o, config)
    _check_folder(o, config)
    return o


JOBS = {  # a launcher's script -> its options, its description in --help, the function that completes and checks them
    "train": (TrainOptions, "Train Wan2.1 text-to-video or image-to-video.", _train),
    "extract": (ExtractOptions, "Compute what the frozen encoders make of videos and captions, once.", _extract),
    "infer": (InferOptions, "Sample videos from Wan2.1 text-to-video or image-to-video.", _infer),
    "evaluate": (EvaluateOptions, "Score videos sampled from Wan2.1 text-to-video or image-to-video.", _evaluate),
    "search": (SearchOptions, "Find the cache settings that keep a stated quality.", _search),
    "convert": (
        ConvertOptions,
        "Convert Wan2.1 weights between the original, diffusers and sharded layouts.",
        _convert,
    ),
    "perf": (PerfOptions, "Measure this recipe on this machine.", _perf),
}


# ---- model and shapes ----


def _default_size(folder: Path | None, argv: list[str]) -> str:
    """Returns the size whose architecture the weights folder, or else --checkpoint, has; without both, a tiny size."""
    if folder is not None:
        return size_of(folder)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", nargs="?")  # these two are needed before the others are parsed
    parser.add_argument("--checkpoint", nargs="?", type=Path)
    args = parser.parse_known_args(argv)[0]
    if args.checkpoint and (newest := resume.newest_state(args.checkpoint)):
        return size_of(newest[0])
    return "tiny-i2v" if args.task == "i2v" else "tiny"


def _with_weights(o, *, pretrains: bool = False, drawn: bool = False):
    """Fills in --weights with the demo's folder. pretrains: the transformer then starts from scratch. drawn: a released
    size may start from scratch, to try a layout out."""
    if o.weights is not None:
        return o
    tiny, image = o.size.startswith("tiny"), o.size in SIZES and SIZES[o.size].image_dim is not None
    if not tiny and not drawn:
        raise ValueError(f"--size {o.size}, except to train on the demo data, needs --weights; fix: --weights DIR")
    if not tiny:
        print(
            f"note: no --weights: size {o.size} starts from drawn weights, with the demo's tiny encoders",
            file=sys.stderr,
        )
    scratch = {"from_scratch": True} if not tiny or pretrains else {}
    return dataclasses.replace(o, weights=DEMO_I2V if image else DEMO_WEIGHTS, **scratch)


def _model(o) -> WanConfig:
    """Returns the architecture of the weights. Checks that the launcher is for its task."""
    config = model_config(o)
    if o.task is not None and (o.task == "t2v") != (config.task == "t2v"):
        raise ValueError(
            f"{o.weights} of size {o.size} is {TASKS[config.task]}; expected {TASKS[o.task]}; fix: --weights or --size, or "
            f"the launcher named _{'t2v' if o.task == 'i2v' else 'i2v'}.sh"
        )
    return config


def _check_folder(o, config: WanConfig, encoders: bool = True) -> None:
    """Checks that --weights has the parts that the job needs, and exactly the model's tensors in its transformer."""
    shared.check_parts(o.weights, parts(config) if encoders else [])
    if not is_sharded(o.weights) and not o.from_scratch:
        folder, table = convert.find_transformer(o.weights, config)
        table.entries(folder)


def parse_buckets(text: str, flag: str = "--buckets") -> list[Bucket]:
    """Parses `81x480x832,49x480x832` to shapes that this model can have. ValueError: see `buckets.parse_buckets`."""
    return buckets.parse_buckets(text, STRIDES, flag)


def _complete_layout(o, config: WanConfig, bucket: Bucket, flag: str):
    """Completes and checks the layout for videos of this shape."""
    o = cli.check_layout(o, heads=config.num_heads, layers=config.num_layers, tokens=config.tokens(latent_grid(bucket)))
    if bucket.frames == 1 and config.image_dim is not None:
        raise ValueError(
            f"{flag} {bucket} of {TASKS[config.task]}; expected at least 5 frames, the first is given; fix: --{flag}"
        )
    if o.fused_comm:
        cli.check_fused_comm(o, [config.dim, config.dim // o.tp, config.ffn_dim // o.tp])
    return o


def _with_buckets(o: shared.ClipOptions, config: WanConfig):
    """Replaces `--buckets auto:` by a list of buckets, then completes and checks the layout for each."""
    if o.buckets.startswith("auto:"):
        all_buckets = buckets.make_buckets(o.buckets, STRIDES, o.cp * (o.tp if o.sp else 1))
        # The first frame of image-to-video is given, so a still leaves nothing to generate.
        usable = [bucket for bucket in all_buckets if bucket.frames > 1 or config.image_dim is None]
        o = dataclasses.replace(o, buckets=",".join(map(str, usable)))
    for bucket in parse_buckets(o.buckets):
        o = _complete_layout(o, config, bucket, "buckets")
    return o


# ---- the frozen encoders ----


def parts(config: WanConfig) -> list[str]:
    """Lists the folders of --weights that make latents, text embeddings and the condition of image-to-video."""
    return ["vae", "text_encoder", "tokenizer"] + (["image_encoder", "image_processor"] if config.given_frames else [])


def has_encoders(folder: Path, config: WanConfig) -> bool:
    """Whether a weights folder has all parts that sampling needs besides the transformer."""
    return all((folder / part).is_dir() for part in parts(config))


def frozen_parts(folder: Path, config: WanConfig) -> dict[str, str]:
    """Returns fingerprints of the VAE and the encoders, of those that a weights folder has."""
    names = ["vae", "text_encoder"] + (["image_encoder"] if config.given_frames else [])
    return {name: weights.fingerprint(folder / name) for name in names if (folder / name).is_dir()}


def encoder_facts(o, config: WanConfig) -> dict[str, str]:
    """Returns what latents, embeddings and conditions depend on, besides pixels and captions."""
    return features.encoder_facts(o, frozen_parts(o.weights, config), config.task if config.given_frames else None)


def feature_settings(o: ExtractOptions, config: WanConfig) -> dict:
    """Returns everything that the content of a features folder depends on."""
    shape = {"task": config.task, "text_len": config.text_len, "text_dim": config.text_dim}
    return features.describe(o, encoder_facts(o, config) | shape | {"image_tokens": config.image_tokens})


# ---- training ----


def _with_training_defaults(o: TrainOptions, flags: set[str]) -> TrainOptions:
    """Replaces defaults of the layout by the job's, and by the demo's if --data is not given. Given options stay."""
    defaults, demo = {}, {}
    if o.adapts and o.adapter is None:
        defaults |= {"lora_rank": jobs.LORA_RANK}
    if o.job == "dpo":
        defaults |= DPO | {"micro_batch": max(2, o.micro_batch // 2 * 2)}
    if o.data is None and o.features is None:
        defaults |= {"buckets": DEMO_BUCKET, "cache": DEMO_DATA.with_name(DEMO_DATA.name + "-latents")}
        defaults |= {"validation": demo_list("test", "pairs")} if o.job == "dpo" else {}
        defaults |= {"lora": DEMO_LORA, "dpo": DEMO_DPO}.get(o.job, {}) if o.size.startswith("tiny") else {}
        demo = {"data": demo_list("train", {"lora": "blinking", "dpo": "pairs"}.get(o.job, ""))}
    if o.adapts and not o.size.startswith("tiny") and o.job not in o.layout.split("-"):
        defaults |= {"lr": RATES[o.job]}
    return jobs.fill_defaults(o, flags, defaults, demo)


def starts_from(o: TrainOptions) -> str:
    """Says in words which transformer a new run starts from."""
    if o.from_scratch:
        return f"drawn weights, seed {o.seed}, beside the VAE and encoders of {o.weights}"
    origin = "the demo's" if o.weights.resolve() in (DEMO_WEIGHTS.resolve(), DEMO_I2V.resolve()) else "released"
    return f"{origin} weights {o.weights}" + (f" and adapter {o.adapter}" if o.adapter else "")


def starting_point(o: TrainOptions) -> dict:
    """Identifies by content what a run starts from: weights and adapters."""
    pairs = convert.adapter(o.adapter, model_config(o))[0] if o.adapter else {}
    return jobs.starting_point(o, convert.find_transformer(o.weights, model_config(o))[0], pairs, o.lora_targets)


def run_facts(o: TrainOptions, config: WanConfig) -> dict:
    """Returns what a resumed run must keep."""
    return shared.run_facts(o, starting_point(o), frozen_parts(o.weights, config))


def demo_list(split: str, style: str = "") -> Path:
    folder = DEMO_DATA.with_name(f"{DEMO_DATA.name}-{style}") if style else DEMO_DATA
    return folder / f"{split}.jsonl"


def is_demo(path: Path | None) -> bool:
    return path in [demo_list(split, style) for split in ("train", "test") for style in STYLES]


# ---- sampling ----


def _sampling(o: InferOptions, flags: set[str]) -> tuple[InferOptions, WanConfig]:
    """Completes and checks the options of any job that samples. Returns them and the architecture."""
    if o.checkpoint is None and o.weights is None and "--video" not in flags:
        o = dataclasses.replace(o, video=DEMO_BUCKET)
    o = dataclasses.replace(o, global_batch=None)
    if o.checkpoint is not None:
        folder, state = shared.find_checkpoint(o)
        refuse_adapters_alone(folder, "--adapter with the run's adapter/ instead of --checkpoint")
        o = dataclasses.replace(o, weights=o.weights or shared.encoders_of(folder, state))
    o = _with_weights(o)
    config, (bucket, *others) = _model(o), parse_buckets(o.video, "--video")
    if others:
        raise ValueError(f"--video {o.video} names {1 + len(others)} shapes; expected one; fix: --video")
    o = _complete_layout(o, config, bucket, "video")
    _check_folder(o, config)
    if o.adapter:
        convert.adapter(o.adapter, config)
    o = check_acceleration(o, config, latent_grid(bucket))
    if o.checkpoint is not None:
        shared.check_encoders(o, frozen_parts(o.weights, config))
    return o, config


def check_acceleration(o: InferOptions, config: WanConfig, grid: tuple[int, int, int]) -> InferOptions:
    """Calls `shared.check_acceleration` for latents of this grid."""
    tokens = tuple(n // p for n, p in zip(grid, config.patch_size, strict=True))
    return shared.check_acceleration(o, config.num_layers, grid, tokens)


def _check_scores(o: EvaluateOptions) -> EvaluateOptions:
    """Checks the options of evaluate.py and fills in the shape of --videos."""
    shared.check_scores(o)
    demo = o.data == demo_list("test")
    if demo and o.video not in (DEMO_BUCKET, None):
        raise ValueError(f"video={o.video}; expected {DEMO_BUCKET}, the demo judge's; fix: --video, or --data")
    if o.data is None or (demo and not o.data.is_file()):  # `prepare` makes the demo's list later
        return o
    return shared.check_videos(o)


def requests_of(o: InferOptions, config: WanConfig) -> list[Request]:
    """Returns what to sample; without any prompt, a few that the demo's model knows. ValueError: `choose_requests`."""
    default = [Request(prompt) for prompt in DEMO_PROMPTS] if o.weights == DEMO_WEIGHTS else []
    if o.weights == DEMO_I2V:
        default = read_requests(HERE / "demo" / "images" / "prompts.tsv", "--prompts", 1)
    return choose_requests(o, config.given_frames, TASKS[config.task], default)


# ---- before any process starts ----


def prepare(o) -> None:
    """Makes the demo data if this job uses it. Refuses to mix the videos of two runs in one folder."""
    if is_demo(o.data):
        cli.say(f"looking for the demo clips of {o.data}, or making them")
        from .demo import make_data

        make_data.make_lists(o.data.parent, *(demo_list("", style).parent for style in STYLES))
    if type(o) is InferOptions:
        from common.diffusion import videos

        videos.list_missing(o, requests_of(o, model_config(o)))


def trained_parameters(o, config: WanConfig) -> int:
    """Counts the parameters that train: all, or the adapters'."""
    if not o.adapts:
        return config.parameters
    if o.adapter:
        return sum(pair.parameters for pair in convert.adapter(o.adapter, config)[0].values())
    ends = tuple(f".{target}.weight" for target in o.lora_targets.split(","))
    return sum(o.lora_rank * sum(s) for n, s in shapes(config).items() if len(s) == 2 and f".{n}".endswith(ends))


def dry_run(o) -> str:
    """Describes a run from its options alone."""
    config = model_config(o)
    if isinstance(o, ExtractOptions):
        return f"{cli.to_toml(o)}\nfor a model of parameters: {config.parameters:,}; world {o.world}"
    text = [
        cli.to_toml(o),
        f"parameters: {config.parameters:,}" + (f", in training {trained_parameters(o, config):,}" if o.adapts else ""),
        f"world {o.world}: tp {o.tp} cp {o.cp} dp {o.dp} pp {o.pp}",
    ]
    text.append(cli.rank_map(o))
    for bucket in parse_buckets(o.buckets or o.video or "1x16x16"):
        grid = latent_grid(bucket)
        flops, tokens = config.flops(grid), config.tokens(grid)
        step = 3 * config.flops(grid, o.adapts)
        step += flops if o.job == "dpo" else 0  # the reference's forward
        text.append(
            f"{bucket}: {tokens} tokens, {flops / 1e12:.3f} TFLOP per sample forward, "
            f"{step * (o.global_batch or 1) / 1e12:.3f} TFLOP per training step"
        )
        text.append(
            f"memory per rank, estimated: {memory_estimate(o, config, tokens, trained_parameters(o, config)) / 2**30:.2f} GiB"
        )
        if o.cache in ("attention", "blocks"):
            text.append(f"cache on each rank: up to {cache_gib(o, config, tokens):.3g} GiB")
    return "\n".join(text)
