"""Options that video and image diffusion jobs share, and the checks of them that are possible before a process starts.

A recipe's option classes extend these, and restate an option to change its default. This module does not import torch.
"""

import dataclasses
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from common import cli, resume, weights
from common.cli import option
from common.jobs import LORA_SETTINGS, flag_of
from common.video import VideoError, probe_video, resampled_length

from .lists import CAPTION_KEYS, PATH_KEYS, check_list, read_rows

DATA_HELP = (  # the keys of `read_rows` and `read_pairs`
    f"list of clips, .jsonl .json .csv or a data.txt of lists; a row has {', '.join(PATH_KEYS[:-1])} or "
    f"{PATH_KEYS[-1]}, and {', '.join(CAPTION_KEYS[:-1])} or {CAPTION_KEYS[-1]}; of preferences: chosen, "
    "rejected and a caption (default: the demo's)"
)
DECODER = "decord reads the videos on which it agrees with PyAV, and PyAV the others; it has to be installed"
# The dimensions of VBench 0.1.5 for videos that are not sampled from, and named by, its own prompts.
VBENCH = ("subject_consistency", "background_consistency", "aesthetic_quality", "imaging_quality", "temporal_style",
          "overall_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class JobOptions(cli.LayoutOptions):
    """Values for jobs without these options. They are class attributes, not options."""

    task = features = buckets = video = None
    decoder, workers, cache, full = "pyav", 0, "none", False


@dataclass(frozen=True, kw_only=True)
class ClipOptions(JobOptions):
    """Options of how videos are read."""

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


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions(JobOptions):
    full: bool = option("train every parameter against a frozen copy, not adapters", False, group="preference")
    beta: float = option("weight of a pair's margin of errors", 2000.0, group="preference", within="(0, inf)")
    sft_weight: float = option("weight of the chosen videos' own error", 0.0, group="preference", within="[0, inf)")
    validation: Path | None = option("held-out pairs, compared at the end", group="preference")


@dataclass(frozen=True, kw_only=True)
class AccelerateOptions(JobOptions):
    """Options that make sampling faster or save memory; see the recipe's README."""

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
    def videos_at_once(self) -> int:
        """The number of videos made at the same time."""
        return self.dp // (2 if self.cfg_parallel else 1)

    def cached_blocks(self, layers: int) -> range:
        """Returns the block indices of `--cache-blocks`."""
        first, last = map(int, self.cache_blocks.split("-")) if self.cache_blocks else (0, layers - 1)
        return range(first, last + 1)


@dataclass(frozen=True, kw_only=True)
class InferOptions(AccelerateOptions):
    """The recipe sets the defaults of the sampler, its steps, its shift and the guidance."""

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
    sample_steps: int = option("sampling steps", None, group="job", layout=True, within="[1, inf)")
    cfg: float = option("guidance scale (1: no guidance)", None, group="job", layout=True, within="[0, inf)")
    sampler: Literal["unipc", "dpm", "euler"] = option("UniPC, DPM-Solver++ or flow-match Euler", None, group="job")
    sample_shift: float = option("flow-matching timestep shift", None, group="job", layout=True, within="(0, inf)")
    seed: int = option("seed of the noise; prompt i uses seed + i", 0, group="job")
    format: Literal["mp4", "gif", "both"] = option("kind of file written", "both", group="job")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(JobOptions):
    """Options for use with `InferOptions`: what samples are scored against, and by which models."""

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
class ExtractOptions(ClipOptions):
    data: Path | None = option(DATA_HELP, group="data")
    max_drop: float = option(
        "share of rows that may be dropped before it is an error", 0.05, group="data", within="[0, 1]"
    )
    workers: int = option("decoding processes per rank", 2, group="data", layout=True, within="[0, inf)")
    rows_of_shard: int = option("videos of a file", 64, group="job", within="[1, inf)")
    out: Path = option("features folder; the same again goes on where it stopped", group="run")


# ---- checks; each raises ValueError ----


def check_decoder(o) -> None:
    if o.decoder == "decord" and find_spec("decord") is None:
        raise ValueError("--decoder decord: it is not installed; fix: pip install decord, or --decoder pyav")
    if o.decoder == "decord" and o.workers:
        raise ValueError(f"--decoder decord with workers={o.workers}: it hangs in forked processes; fix: --workers 0")


def check_job(o, flags: set[str], launchers: dict[str, str]) -> None:
    """Refuses options of another job, and batch sizes of dpo that do not hold whole pairs. flags: those given on the
    command line. launchers: the launchers of the option groups adapters and preference, in words."""
    for f in dataclasses.fields(o):
        flag, group = flag_of(f.name), f.metadata["group"]
        if flag not in flags or getattr(o, f.name) == f.default:  # a printed config gives every option
            continue
        if (group == "adapters" and not o.adapts) or (group == "preference" and o.job != "dpo"):
            raise ValueError(f"{flag} is of {launchers[group]}, and this is {o.job}; fix: leave {flag} out")
        if flag in LORA_SETTINGS and o.adapter:
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
        odd = (getattr(o, name) or 0) % 2 and (name == "global_batch" or flag_of(name) in flags)
        if odd:
            raise ValueError(
                f"{name}={getattr(o, name)}; expected an even number, a pair is two videos; fix: {flag_of(name)}"
            )


def check_targets(targets: str, linears: list[str]) -> None:
    """Checks that every target is the end of a linear's name. linears: names; those in blocks are WORD.INDEX.REST."""
    unknown = [t for t in targets.split(",") if not any(f".{name}".endswith(f".{t}") for name in linears)]
    if unknown:
        kinds = dict.fromkeys(re.sub(r"^\w+\.\d+\.", "", name) for name in linears)
        raise ValueError(
            f"lora_targets: no linear is called {', '.join(map(repr, unknown))}; expected the ends of some of "
            f"{', '.join(kinds)}; fix: --lora-targets"
        )


def without_layout(o, flags: set[str]):
    """Returns the options of a job that splits no model, whatever the named layout says. Raises ValueError if the
    command line asks for a split."""
    one_device = {"tp": 1, "sp": False, "pp": 1, "vpp": 1, "stages": "", "cp": 1, "ulysses": None, "fsdp": False}
    for name in one_device:
        if {f"--{name}", f"--no-{name}"} & flags:
            raise ValueError(f"--{name}: extraction splits no model, its processes share the videos; fix: NPROC alone")
    return dataclasses.replace(o, **one_device, recompute="none", micro_batch=1, global_batch=None)


def check_parts(folder: Path, parts: list[str]) -> None:
    """Checks that a weights folder has these parts, and that none is quantised."""
    for part in parts:
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no {part}/; expected a released diffusers folder; fix: --weights")
        for file in sorted((folder / part).glob("*.safetensors")):
            if file.stem.split("-")[0].isidentifier():  # skips variants such as model.fp8, which are not loaded
                weights.refuse_quantised(weights.index_file(file), file)


def check_acceleration(o, layers: int, latents: tuple[int, int, int], tokens: tuple[int, int, int]):
    """Checks the accelerations as far as possible without reading weights, and fills in their defaults.

    layers: blocks of the model. latents, tokens: frames, rows and columns of the video's latents and of its tokens.
    """
    steps, ranks = o.sample_steps, o.world // max(o.videos_at_once, 1)
    if o.cfg_parallel and o.cfg == 1:
        raise ValueError("cfg_parallel with cfg=1, which has no second branch; fix: --cfg or --no-cfg-parallel")
    if o.cfg_parallel and o.dp % 2:
        raise ValueError(
            f"cfg_parallel with {o.dp} data-parallel ranks ({o.world} processes over tp*pp*cp = {o.tp}*{o.pp}*{o.cp}); "
            "expected an even number; fix: NPROC, or --no-cfg-parallel"
        )
    if o.vae_parallel and ranks == 1:
        raise ValueError(
            f"vae_parallel with one rank to each of {o.videos_at_once} videos at a time; expected several ranks to a video; "
            "fix: --cfg-parallel, --cp, --tp or --pp, or --no-vae-parallel"
        )
    if o.vae_parallel and ranks > latents[1]:
        raise ValueError(
            f"vae_parallel over {ranks} ranks of {latents[1]} latent rows; expected a row each; fix: --no-vae-parallel"
        )
    if o.vae_parallel and o.vae_tiling:
        raise ValueError("vae_parallel with vae_tiling; expected one of them; fix: --no-vae-tiling")
    given = [n for n in ("cache_start", "cache_interval", "cache_end") if getattr(o, n) is not None]
    if o.cache == "none" and given:
        raise ValueError(f"{' and '.join(given)} without a cache; fix: --cache attention or blocks")
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
        if o.cache != "blocks":
            raise ValueError(f"cache_blocks={o.cache_blocks!r} with --cache {o.cache}; fix: --cache blocks")
        match = re.fullmatch(r"(\d+)-(\d+)", o.cache_blocks)
        if not match or not int(match[1]) <= int(match[2]) < layers:
            raise ValueError(
                f"cache_blocks={o.cache_blocks!r}; expected FIRST-LAST within 0-{layers - 1}; fix: --cache-blocks"
            )
    if not o.sparse and o.sparse_start is not None:
        raise ValueError(f"sparse_start={o.sparse_start} with dense attention; fix: --sparse")
    if o.sparse:
        start = round(0.3 * steps) if o.sparse_start is None else o.sparse_start
        frames, rows, columns = tokens
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


def check_scores(o) -> None:
    """Checks the data and the models that an evaluation is given to score with."""
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


def check_videos(o):
    """Checks that --data can be read and, with --videos, has a row for each video. Fills in the videos' shape."""
    check_list(o.data, o.max_drop)
    if o.videos is None:
        return o
    files, rows = videos_of(o.videos), read_rows(o.data)[0][: o.limit]
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


# ---- the start of a run and of a checkpoint ----


def run_facts(o, start: dict, frozen: dict[str, str]) -> dict:
    """Returns the facts that a run cannot change: what it starts from (`start`), and what decides its videos and their
    order. frozen: the content of the encoders."""
    facts = {"job": o.job, "seed": o.seed, "global_batch": o.global_batch, "buckets": o.buckets, "fps": o.fps}
    listed = o.features / "index.jsonl" if o.features else o.data
    content = resume.content_hash([listed]) if listed.is_file() else None  # the demo's list may not be made yet
    facts |= {"data": {"path": str(o.features or o.data), "content": content}, "decoder": o.decoder}
    tokenizer = sorted(p for p in (o.weights / "tokenizer").glob("*") if p.is_file())
    facts |= {"tokenizer": {"path": str(o.weights / "tokenizer"), "content": resume.content_hash(tokenizer)}}
    return start | facts | frozen


def find_checkpoint(o) -> tuple[Path, dict]:
    """Returns the newest checkpoint of --checkpoint, and its state.json."""
    newest = resume.newest_state(o.checkpoint)
    if newest is None:
        raise ValueError(f"--checkpoint {o.checkpoint} holds no checkpoint; expected a sharded one; fix: --checkpoint")
    return newest


def encoders_of(folder: Path, state: dict) -> Path:
    """Returns the weights folder whose VAE and encoders a checkpoint's run was trained with."""
    trained_with = state.get("start", {}).get("weights")
    if trained_with is None or not Path(trained_with).is_dir():
        raise ValueError(
            f"{folder} holds the transformer alone, and {trained_with or 'the weights of its run'} with its VAE and "
            "encoders is not there; fix: --weights"
        )
    return Path(trained_with)


def check_encoders(o, frozen: dict[str, str]) -> None:
    """Checks that a checkpoint is sampled with the VAE and the encoders that it was trained with. frozen: the content
    of those of --weights."""
    folder, state = find_checkpoint(o)
    start = state.get("start", {})
    if different := [name for name, content in frozen.items() if start.get(name, content) != content]:
        raise ValueError(
            f"{folder} was trained with another {' and '.join(different)} than {o.weights} has; fix: --weights "
            f"{start['weights']}, or one with the same"
        )
