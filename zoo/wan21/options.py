"""The options of this recipe's jobs: what they are called, what the demo fills in, and all that can be known to be
wrong with them before a process starts.

Each job has a dataclass of options and a function that completes and checks one (`JOBS`). No torch here: `--help` and
every refusal come before anything heavy is imported.
"""

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from common import cli, resume, weights
from common.cli import option
from common.video import VideoError, probe_video, resampled_length

from . import adapters, convert, data, features, images
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
DEMO_WEIGHTS, DEMO_I2V = HERE / "demo" / "weights", HERE / "demo" / "weights-i2v"
DEMO_DATA = HERE.parents[1] / "data" / f"{HERE.name}-demo"
DEMO_CAPTIONS = 80  # as many as the judge scores: every digit in every direction
STYLES = ("", "blinking", "pairs")  # of the demo's data: clips, clips that blink, and the two beside each other
DATA_HELP = (  # the keys of `data.read_rows` and `data.read_pairs`
    f"list of clips, .jsonl .json .csv or a data.txt of lists; a row has {', '.join(data.PATH_KEYS[:-1])} or "
    f"{data.PATH_KEYS[-1]}, and {', '.join(data.CAPTION_KEYS[:-1])} or {data.CAPTION_KEYS[-1]}; of preferences: chosen, "
    "rejected and a caption (default: the demo's)"
)
DEMO_LORA = {"steps": 200, "lr": 2e-3, "save_every": 200}  # a style is learnt sooner than digits
DEMO_BUCKET = tomllib.loads((HERE / "parallel.toml").read_text())["tiny"]["buckets"]
DPO = {"weighting": "none", "caption_dropout": 0.0}  # of dpo_*.sh, as in the paper
DEMO_DPO = {"steps": 150, "lr": 1e-3, "save_every": 150, "sft_weight": 100.0}
RATES = {"lora": 1e-4, "dpo": 1e-5}  # of adapters on a published size, whose layout has the rate of all parameters
DECODER = "decord reads the videos on which it agrees with PyAV, and PyAV the others; it has to be installed"
LORA_RANK = 16  # of lora_*.sh, where nothing else is asked
LORA_TARGETS = "q,k,v,o,ffn.0,ffn.2"  # of every block: self- and cross-attention, MLP
LORA_SETTINGS = ("--lora-rank", "--lora-alpha", "--lora-dropout", "--lora-targets", "--rslora")


@dataclass(frozen=True, kw_only=True)
class ClipOptions(cli.LayoutOptions):
    """What videos are read as."""

    buckets: str = option(
        "video shapes FRAMESxHEIGHTxWIDTH, comma-separated, or auto:FRAMESxHEIGHTxWIDTH, the largest of them", None,
        group="data", layout=True,
    )  # fmt: skip
    fps: float = option(
        "frame rate videos are resampled to (0: their own)", 16.0, group="data", layout=True, within="[0, inf)"
    )
    vae_tiling: bool = option("the VAE sees large pictures in tiles: less memory", False, group="data", layout=True)
    decoder: Literal["pyav", "decord"] = option(DECODER, "pyav", group="data")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ClipOptions, cli.TrainOptions):
    job: str = option("which launcher this is: pretrain, finetune, lora or dpo", "pretrain", group="job")
    data: Path | None = option(DATA_HELP, group="data")
    task: Literal["t2v", "i2v"] = option("what the launcher is for (default: what the size is)", None, group="job")
    from_scratch: bool = option("draw the transformer's weights instead of loading them", False, group="model")
    cache: Path | None = option("folder that keeps latents and text embeddings once computed", group="data")
    features: Path | None = option("folder that extract_features.sh made, instead of --data", group="data")
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
    adapter: Path | None = option("adapter folder or file to start from; its settings decide", group="adapters")
    merge: Path | None = option("write released weights with the adapters added here at the end", group="adapters")
    full: bool = option("train every parameter against a frozen copy, not adapters", False, group="preference")
    beta: float = option("weight of a pair's margin of errors", 2000.0, group="preference", within="(0, inf)")
    sft_weight: float = option("weight of the chosen videos' own error", 0.0, group="preference", within="[0, inf)")
    validation: Path | None = option("held-out pairs, compared at the end", group="preference")
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
    adapter: Path | None = option("adapter added to the weights: folder or file, formats in the README", group="model")
    prompt: str = option("what to show", group="job")
    prompts: Path | None = option(
        "text file, a prompt per line (image-to-video: picture<TAB>prompt), or .jsonl of prompt, image, last_image",
        group="job",
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
    decoder: Literal["pyav", "decord"] = option(DECODER, "pyav", group="scores")
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
class ExtractOptions(ClipOptions):
    data: Path | None = option(DATA_HELP, group="data")
    max_drop: float = option(
        "share of rows that may be dropped before it is an error", 0.05, group="data", within="[0, 1]"
    )
    workers: int = option("decoding processes per rank", 2, group="data", layout=True, within="[0, inf)")
    rows_of_shard: int = option("videos of a file", 64, group="job", within="[1, inf)")
    out: Path = option("features folder; the same again goes on where it stopped", group="run")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(cli.LayoutOptions):
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


# ---------------------------------------------------------------------------------------------------------------- jobs


def parse(script: str, argv: list[str]):
    """argv of a job -> its completed and checked options. See common/cli.py for the contract.

    Raises:
        ValueError: anything about the options, the weights folder or the data list that can be known to be wrong.
    """
    cls, description, completed = JOBS[script]
    o = cli.parse_options(cls, argv, description, HERE / "parallel.toml", lambda folder: _default_size(folder, argv))
    if getattr(o, "decoder", "pyav") == "decord" and find_spec("decord") is None:
        raise ValueError("--decoder decord: it is not installed; fix: pip install decord, or --decoder pyav")
    if getattr(o, "decoder", "pyav") == "decord" and getattr(o, "workers", 0):
        raise ValueError(f"--decoder decord with workers={o.workers}: it hangs in forked processes; fix: --workers 0")
    if getattr(o, "out", "") is None:
        o = dataclasses.replace(o, out=cli.default_out(HERE.name, getattr(o, "job", script)))
    return completed(o, {word.split("=")[0] for word in argv})


def _train(o: TrainOptions, asked: set[str]) -> TrainOptions:
    _check_job(o, asked)
    o = features.applied(o, asked)
    on_demo = o.data is None  # features may come without a transformer too
    o = _with_weights(_with_training_defaults(o, asked), pretrains=o.job == "pretrain", drawn=on_demo)
    config = _model(o)
    o = _with_buckets(o, config)
    _check_folder(o, config, encoders=not o.features)
    if o.adapter:
        adapters.check_trained(o, config)
    if o.features:
        features.check(o, config)
    for path in (o.data, o.validation):
        _check_list(path, o.max_drop, pairs=o.job == "dpo")
    cli.check_run(o)
    if o.sample_prompts:
        if not features.has_encoders(o.weights, config):
            raise ValueError(f"--sample-prompts: {o.weights} lacks VAE or encoders; fix: --weights with them")
        sampled = images.read_requests(o.sample_prompts, "--sample-prompts", config.given_frames)
        images.check(sampled, data.parse_buckets(o.buckets)[0], "crop")
    if o.adapts:
        adapters.check_targets(o, config)
    if o.adapts and o.merge:
        if o.from_scratch:
            raise ValueError("--merge adds adapters to released weights, and these are drawn; fix: no --merge")
        weights.refuse_existing(o.merge, "--merge")
    resume.check(o, run_facts(o, config))
    if o.export:
        weights.refuse_existing(o.export, "--export")
    return o


def _extract(o: ExtractOptions, asked: set[str]) -> ExtractOptions:
    alone = {"tp": 1, "sp": False, "pp": 1, "vpp": 1, "stages": "", "cp": 1, "ulysses": None, "fsdp": False}
    for name in alone:  # no transformer to split: every process has videos of its own, whatever the named layout says
        if {f"--{name}", f"--no-{name}"} & asked:
            raise ValueError(f"--{name}: extraction splits no model, its processes share the videos; fix: NPROC alone")
    o = dataclasses.replace(o, **alone, recompute="none", micro_batch=1, global_batch=None)
    if o.data is None:
        buckets = o.buckets if "--buckets" in asked else DEMO_BUCKET
        o = dataclasses.replace(o, data=demo_list("train"), buckets=buckets)
    o = _with_weights(o)
    config = _model(o)
    o = _with_buckets(o, config)
    _check_folder(o, config)
    features.check_begun(o, config)
    _check_list(o.data, o.max_drop)
    return o


def _infer(o: InferOptions, asked: set[str]) -> InferOptions:
    o, config = _sampling(dataclasses.replace(o, micro_batch=1), asked)
    bucket = data.parse_buckets(o.video)[0]
    images.check(requests(o, config), bucket, o.fit)
    if o.video_in is not None:
        images.check_clip(o.video_in, bucket, o.fps, o.fit)
        if int(o.sample_steps * o.strength) < 1:
            raise ValueError(
                f"strength={o.strength} of {o.sample_steps} steps is none; expected one at least; fix: --strength"
            )
    return o


def _search(o: SearchOptions, asked: set[str]) -> SearchOptions:
    given = [n for n in ("cache_start", "cache_interval", "cache_end") if getattr(o, n) is not None]
    if given:
        raise ValueError(f"{' and '.join(given)}: search finds them; fix: leave them out")
    o, config = _sampling(dataclasses.replace(o, micro_batch=1), asked)
    if o.lanes > 1:
        raise ValueError(
            f"search with {o.lanes} videos at a time; expected all ranks to make the same one; fix: NPROC, --cfg-parallel, "
            "--cp or --tp"
        )
    images.check(requests(o, config), data.parse_buckets(o.video)[0], o.fit)
    return o


def _evaluate(o: EvaluateOptions, asked: set[str]) -> EvaluateOptions:
    if o.videos is not None:
        if o.data is None or {"--weights", "--checkpoint", "--size"} & asked:
            raise ValueError("--videos come with --data, whose captions they show, and without a model; fix: --videos")
        o = dataclasses.replace(o, video=o.video if "--video" in asked else None)
        o = _check_scores(dataclasses.replace(o, weights=DEMO_WEIGHTS, size="tiny"))  # of which nothing is used
        config = _model(o)
        return cli.check_layout(o, heads=config.num_heads, layers=config.num_layers, tokens=None)
    if o.data is None and o.prompts is None and o.prompt is None:
        video = o.video if "--video" in asked else DEMO_BUCKET
        o = dataclasses.replace(o, data=demo_list("test"), limit=o.limit or DEMO_CAPTIONS, video=video)
    o, config = _sampling(_check_scores(o), asked)
    if o.data is None:
        images.check(requests(o, config), data.parse_buckets(o.video)[0], o.fit)
    return o


def _convert(o: ConvertOptions, asked: set[str]) -> ConvertOptions:
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


def _perf(o: PerfOptions, asked: set[str]) -> PerfOptions:
    o = _with_weights(o, pretrains=True, drawn=True)
    config = _model(o)
    o = _with_buckets(o, config)
    _check_folder(o, config)
    return o


JOBS = {  # a launcher's script -> its options, what --help says of it, what completes and checks them
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


# ---------------------------------------------------------------------------------------------------- model and shapes


def _default_size(folder: Path | None, argv: list[str]) -> str:
    """The size whose architecture the weights folder has; without one, tiny."""
    if folder is not None:
        return size_of(folder)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", nargs="?")  # which have to be known before the other options are
    parser.add_argument("--checkpoint", nargs="?", type=Path)
    known = parser.parse_known_args(argv)[0]
    if known.checkpoint and (found := resume.newest_state(known.checkpoint)):
        return size_of(found[0])
    image = known.task == "i2v"
    return "tiny-i2v" if image else "tiny"


def _with_weights(o, *, pretrains: bool = False, drawn: bool = False):
    """Without --weights: the demo's folder, of which pretraining draws the transformer anew. drawn: of a released size,
    weights may be drawn, to try a layout out."""
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
    """The architecture of the weights, which is of the launcher's kind."""
    config, task = model_config(o), getattr(o, "task", None)
    if task is not None and (task == "t2v") != (config.task == "t2v"):
        raise ValueError(
            f"{o.weights} of size {o.size} is {TASKS[config.task]}; expected {TASKS[task]}; fix: --weights or --size, or "
            f"the launcher named _{'t2v' if task == 'i2v' else 'i2v'}.sh"
        )
    return config


def _check_folder(o, config: WanConfig, encoders: bool = True) -> None:
    """The parts a job needs are there, and the transformer's tensors are exactly the model's."""
    for part in features.parts(config) if encoders else ():
        if not (o.weights / part).is_dir():
            raise ValueError(f"{o.weights} has no {part}/; expected a released diffusers folder; fix: --weights")
        for file in sorted((o.weights / part).glob("*.safetensors")):
            if file.stem.split("-")[0].isidentifier():  # not a variant, like model.fp8, which nobody loads
                weights.refuse_quantised(weights.index_file(file), file)
    if not is_sharded(o.weights) and not getattr(o, "from_scratch", False):
        folder, table = convert.located(o.weights, config)
        table.entries(folder)


def _laid_out(o, config: WanConfig, bucket: data.Bucket, flag: str):
    """The layout, completed and checked for videos of this shape."""
    o = cli.check_layout(o, heads=config.num_heads, layers=config.num_layers, tokens=config.tokens(latent_grid(bucket)))
    if bucket.frames == 1 and config.image_dim is not None:
        raise ValueError(
            f"{flag} {bucket} of {TASKS[config.task]}; expected at least 5 frames, the first is given; fix: --{flag}"
        )
    return o


def _with_buckets(o: ClipOptions, config: WanConfig):
    """`--buckets auto:` written out, and the layout checked for each of the buckets."""
    if o.buckets.startswith("auto:"):
        auto = data.auto_buckets(o.buckets, o.cp * (o.tp if o.sp else 1))
        shown = [bucket for bucket in auto if bucket.frames > 1 or config.image_dim is None]  # a still has given it all
        o = dataclasses.replace(o, buckets=",".join(map(str, shown)))
    for bucket in data.parse_buckets(o.buckets):
        o = _laid_out(o, config, bucket, "buckets")
    return o


# ------------------------------------------------------------------------------------------------------------ training


def _check_job(o: TrainOptions, asked: set[str]) -> None:
    """Options of another job are not ignored; the batch of dpo is one of pairs."""
    for f in dataclasses.fields(o):
        flag = _flag(f.name)
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
        return
    if o.features:
        raise ValueError("--features hold videos, not pairs; fix: --data PAIRS, with --cache to encode them once")
    if o.adapter:
        raise ValueError(
            "--adapter: the reference is the model without adapters; fix: --weights with it merged, and no --adapter"
        )
    for name in ("micro_batch", "global_batch"):
        odd = (getattr(o, name) or 0) % 2 and (name == "global_batch" or _flag(name) in asked)
        if odd:
            raise ValueError(
                f"{name}={getattr(o, name)}; expected an even number, a pair is two videos; fix: {_flag(name)}"
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _with_training_defaults(o: TrainOptions, asked: set[str]) -> TrainOptions:
    """What the job, and the demo where no data are named, have unlike the layout; what was asked for stays."""
    demo, usual, changes = o.data is None and o.features is None, {}, {}
    if o.adapts and o.adapter is None:
        usual |= {"lora_rank": LORA_RANK}
    if o.job == "dpo":
        usual |= DPO | {"micro_batch": max(2, o.micro_batch // 2 * 2)}
    if demo:
        usual |= {"buckets": DEMO_BUCKET, "cache": DEMO_DATA.with_name(DEMO_DATA.name + "-latents")}
        usual |= {"validation": demo_list("test", "pairs")} if o.job == "dpo" else {}
        usual |= {"lora": DEMO_LORA, "dpo": DEMO_DPO}.get(o.job, {}) if o.size.startswith("tiny") else {}
        changes |= {"data": demo_list("train", {"lora": "blinking", "dpo": "pairs"}.get(o.job, ""))}
    if o.adapts and not o.size.startswith("tiny") and o.job not in o.layout.split("-"):
        usual |= {"lr": RATES[o.job]}
    changes |= {name: value for name, value in usual.items() if _flag(name) not in asked}
    return cli.shorten_warmup(dataclasses.replace(o, **changes), asked)


def starts_from(o: TrainOptions) -> str:
    """What the transformer of a new run is, in words."""
    if o.from_scratch:
        return f"drawn weights, seed {o.seed}, beside the VAE and encoders of {o.weights}"
    whose = "the demo's" if o.weights.resolve() in (DEMO_WEIGHTS.resolve(), DEMO_I2V.resolve()) else "released"
    return f"{whose} weights {o.weights}" + (f" and adapter {o.adapter}" if o.adapter else "")


def run_facts(o: TrainOptions, config: WanConfig) -> dict:
    """What a run cannot change any more: what it starts from, and what decides its videos and their order."""
    facts = {"job": o.job, "seed": o.seed, "global_batch": o.global_batch, "buckets": o.buckets, "fps": o.fps}
    listed = (
        o.features / "index.jsonl" if o.features else o.data
    )  # the demo's list is made after this was first asked for
    made = resume.content([listed]) if listed.is_file() else None
    facts |= {"data": {"path": str(o.features or o.data), "content": made}, "decoder": o.decoder}
    tokenizer = sorted(p for p in (o.weights / "tokenizer").glob("*") if p.is_file())
    facts |= {"tokenizer": {"path": str(o.weights / "tokenizer"), "content": resume.content(tokenizer)}}
    return adapters.starting_point(o) | facts | features.frozen_parts(o.weights, config)


def _check_list(path: Path | None, max_drop: float, pairs: bool = False) -> None:
    """A list of the user's has rows enough that can be read."""
    if path is not None and not is_demo(path):
        rows, report = (data.read_pairs if pairs else data.read_rows)(path)
        report.check(len(rows) // (2 if pairs else 1) + len(report.drops), max_drop)


def demo_list(split: str, style: str = "") -> Path:
    folder = DEMO_DATA.with_name(f"{DEMO_DATA.name}-{style}") if style else DEMO_DATA
    return folder / f"{split}.jsonl"


def is_demo(path: Path | None) -> bool:
    return path in [demo_list(split, style) for split in ("train", "test") for style in STYLES]


# ------------------------------------------------------------------------------------------------------------ sampling


def _sampling(o: InferOptions, asked: set[str]) -> tuple[InferOptions, WanConfig]:
    """What every job that samples is completed with and checked for, and the architecture."""
    if o.checkpoint is None and o.weights is None and "--video" not in asked:
        o = dataclasses.replace(o, video=DEMO_BUCKET)
    o = _with_weights(_with_encoders_of_checkpoint(dataclasses.replace(o, global_batch=None)))
    config, (bucket, *more) = _model(o), data.parse_buckets(o.video, flag="--video")
    if more:
        raise ValueError(f"--video {o.video} names {1 + len(more)} shapes; expected one; fix: --video")
    o = _laid_out(o, config, bucket, "video")
    _check_folder(o, config)
    if o.adapter:
        convert.adapter(o.adapter, config)
    o = check_acceleration(o, config, latent_grid(bucket))
    if o.checkpoint is not None:
        _check_encoders_of_checkpoint(o, config)
    return o, config


def _with_encoders_of_checkpoint(o: InferOptions) -> InferOptions:
    """Without --weights a checkpoint is sampled beside the VAE and the encoders that its run was trained with.

    Raises:
        ValueError: there is no checkpoint, one of adapters alone, or its run's weights folder is gone.
    """
    if o.checkpoint is None:
        return o
    found = resume.newest_state(o.checkpoint)
    if found is None:
        raise ValueError(f"--checkpoint {o.checkpoint} holds no checkpoint; expected a sharded one; fix: --checkpoint")
    refuse_adapters_alone(found[0], "--adapter with the run's adapter/ instead of --checkpoint")
    if o.weights is not None:
        return o
    trained_with = found[1].get("start", {}).get("weights")
    if trained_with is None or not Path(trained_with).is_dir():
        raise ValueError(
            f"{found[0]} holds the transformer alone, and {trained_with or 'the weights of its run'} with its VAE and "
            "encoders is not there; fix: --weights"
        )
    return dataclasses.replace(o, weights=Path(trained_with))


def _check_encoders_of_checkpoint(o: InferOptions, config: WanConfig) -> None:
    """A checkpoint is sampled with the VAE and the encoders that it was trained with, told by their content."""
    folder, state = resume.newest_state(o.checkpoint)
    start, now = state.get("start", {}), features.frozen_parts(o.weights, config)
    if other := [name for name, there in now.items() if start.get(name, there) != there]:
        raise ValueError(
            f"{folder} was trained with another {' and '.join(other)} than {o.weights} has; fix: --weights "
            f"{start['weights']}, or one with the same"
        )


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


# What VBench 0.1.5 says of videos that were not sampled from its own prompts and named by them.
VBENCH = ("subject_consistency", "background_consistency", "aesthetic_quality", "imaging_quality", "temporal_style",
          "overall_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree")  # fmt: skip


def _check_scores(o: EvaluateOptions) -> EvaluateOptions:
    """Checks what evaluate.py is given, and fills in the shape of --videos."""
    if o.data is not None and (o.prompt is not None or o.prompts):
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
    frames = resampled_length(first, o.fps or None)
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
    if o.prompt is not None and not o.prompt.strip():
        raise ValueError("--prompt is empty; expected what to show; fix: --prompt TEXT")
    if o.prompts is not None and o.prompt is not None:
        raise ValueError(f"--prompt and --prompts {o.prompts}; expected one of them; fix: leave out --prompt")
    if o.prompts is not None and given:
        raise ValueError(f"--prompts and {given[0]}; expected the pictures in the file's rows; fix: no {given[0]}")
    if o.prompts is not None:
        return images.read_requests(o.prompts, "--prompts", config.given_frames)
    if o.prompt is None and not given and o.weights == DEMO_WEIGHTS:
        known = ["a handwritten three moves to the left", "a handwritten seven moves up and to the right"]
        return [images.Request(prompt) for prompt in known]
    if o.prompt is None and not given and o.weights == DEMO_I2V:
        return images.read_requests(HERE / "demo" / "images" / "prompts.tsv", "--prompts", 1)
    if o.prompt is None:
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
        cli.say(f"looking for the demo clips of {o.data}, or making them")
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
        from . import videos

        videos.unfinished(o, requests(o, model_config(o)))


def trained_parameters(o, config: WanConfig) -> int:
    """All, or those of the adapters."""
    if not getattr(o, "adapts", False):
        return config.parameters
    if o.adapter:
        return sum(pair.parameters for pair in convert.adapter(o.adapter, config)[0].values())
    ends = tuple(f".{target}.weight" for target in o.lora_targets.split(","))
    return sum(o.lora_rank * sum(s) for n, s in shapes(config).items() if len(s) == 2 and f".{n}".endswith(ends))


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
        step = 3 * config.flops(grid, getattr(o, "adapts", False))
        step += flops if getattr(o, "job", "") == "dpo" else 0  # the reference's forward
        text.append(
            f"{bucket}: {tokens} tokens, {flops / 1e12:.3f} TFLOP per sample forward, "
            f"{step * (o.global_batch or 1) / 1e12:.3f} TFLOP per training step"
        )
        text.append(
            f"memory per rank, estimated: {memory_estimate(o, config, tokens, trained_parameters(o, config)) / 2**30:.2f} GiB"
        )
        if getattr(o, "cache", None) in ("attention", "blocks"):
            text.append(f"cache on each rank: up to {cache_gib(o, config, tokens):.3g} GiB")
    return "\n".join(text)
