"""Benchmark of sampling: each setup against a named baseline, seconds beside scores.

    bash zoo/wan21/perf.sh --only generation               what one process can do
    NPROC=2 bash zoo/wan21/perf.sh --only generation       what several can: each layout against one process

A setup is a line of options of infer_t2v.sh. It and its baseline make the same videos (same prompts, same noise), by
turns; seconds are of sampling and decoding one video, or of sampling alone where decoding has no part, after
a warm-up. PSNR and SSIM are of its videos against the baseline's, the worst of them. Models: `tiny`, the shipped
weights, whose quality means something at the shape they know (at a larger one their videos are only good for comparing
with each other); `mid`, drawn weights (512 wide, 8 blocks), for the time alone: no quality is given. With --weights
the model is that, and every setup is of it.
"""

import dataclasses
import math
import os
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from common import device, parallel, perf
from common.diffusion import scores
from common.diffusion.requests import Request

from . import infer
from .config import WanConfig, model_config
from .options import DEMO_WEIGHTS, InferOptions, PerfOptions, parse

ROUNDS = 3  # of a setup and its baseline
PROMPTS = ("a handwritten three moves to the left", "a handwritten seven moves up and to the right")
LARGE = "--video 17x320x320 --sample-steps 2"  # beyond a tile of 256 pixels
LONG = "--video 33x384x384 --sample-steps 4"  # 5184 tokens: 41 blocks
WIDE = "--video 33x384x384 --sample-steps 2 --cfg 1"  # the same of the mid size, in less time
LINE = "{:<5} {:<58} {:>8} {:>8} {:>8} {:>7}  {}"


@dataclass(frozen=True)
class Setup:
    """What is measured, as options of infer_t2v.sh, and against what."""

    name: str
    options: str
    baseline: str  # options
    baseline_name: str
    model: str = "demo"  # demo or mid
    decoded: bool = True  # whether decoding is in the seconds too
    videos: int = 2  # in a round
    processes: int = 1  # data-parallel ranks are none of its business: it makes one video at a time


STEPS = "--sample-steps 50"
SETUPS = [
    *(
        Setup(name, f"{STEPS} {options}", STEPS, "50 steps of UniPC, fp32, dense", videos=30)
        for name, options in (
            ("attention cache, steps 20-47, every 2nd", "--cache attention"),
            ("block cache, steps 20-47, every 2nd", "--cache blocks"),
            ("block cache, steps 10-47, every 3rd", "--cache blocks --cache-start 10 --cache-interval 3"),
            (
                "block cache as search.sh proposes it, steps 0-47, every 6th",
                "--cache blocks --cache-start 0 --cache-interval 6",
            ),
            ("25 steps of UniPC", "--sample-steps 25"),
            ("25 steps of DPM-Solver++", "--sampler dpm --sample-steps 25"),
            ("bf16", "--precision bf16"),
            ("int8 weights", "--quantize int8"),
            ("compiled blocks", "--compile"),
        )
    ),
    *(
        Setup(f"sparse attention {share} at 5184 tokens", f"{LONG} --sparse {share}", LONG, "dense", decoded=False)
        for share in (0.6, 0.8)
    ),
    Setup(
        "sparse attention 0.8 at 5184 tokens",
        f"{WIDE} --sparse 0.8 --sparse-start 0",
        WIDE,
        "dense",
        "mid",
        decoded=False,
    ),
    Setup("tiled decoding", f"{LARGE} --vae-tiling", LARGE, "decoding at once"),
    *(
        Setup(name, f"{STEPS} {options}", STEPS, "50 steps, nothing cached", model="mid")
        for name, options in (
            ("attention cache, steps 20-47, every 2nd", "--cache attention"),
            ("block cache, steps 20-47, every 2nd", "--cache blocks"),
        )
    ),
    Setup(
        "Ulysses over 2 processes, 5184 tokens", f"{WIDE} --cp 2", WIDE, "one process, all cores", "mid", processes=2
    ),
    *(
        Setup(
            name,
            f"--sample-steps 10 {options}",
            "--sample-steps 10",
            "one process, all cores",
            model,
            videos=10 if model == "demo" else 2,
            processes=processes,
        )
        for name, options, processes in (
            ("the two branches of guidance on 2 processes", "--cfg-parallel", 2),
            ("Ulysses over 2 processes", "--cp 2", 2),
            ("TP and SP over 2 processes", "--tp 2 --sp", 2),
            ("guidance and strips of the VAE on 2 processes", "--cfg-parallel --vae-parallel", 2),
            ("guidance x Ulysses on 4 processes", "--cfg-parallel --cp 2", 4),
            ("Ulysses over 4 processes", "--cp 4", 4),
        )
        for model in ("demo", "mid")
    ),
]


@dataclass(frozen=True, kw_only=True)
class Drawn(InferOptions):
    from_scratch = True


def mid(config: WanConfig) -> WanConfig:
    """A model large enough that arithmetic, not Python, takes the time of a step on a CPU."""
    return dataclasses.replace(config, dim=512, ffn_dim=2048, num_heads=8, num_layers=8)


def generation(o: PerfOptions) -> list[dict]:
    """The record's rows, on rank 0, of every setup for this number of processes."""
    if model_config(o).given_frames:
        print("generation: measured for text-to-video only")
        return []
    own = [] if o.weights == DEMO_WEIGHTS else ["--weights", str(o.weights)]
    setups = [s for s in SETUPS if s.processes == o.world and (s.model == "demo" or not own)]
    if not setups and dist.get_rank() == 0:
        counts = sorted({s.processes for s in SETUPS})
        print(f"generation: no setup is for {o.world} processes; there are some for {', '.join(map(str, counts))}")
    if setups and dist.get_rank() == 0:
        print(LINE.format("model", "setup", "s", "speed-up", "PSNR dB", "SSIM", "baseline"), flush=True)
    leave_groups()  # each setup has its own layout
    rows = [row for s in setups for row in compare(o, s, own)]
    parallel.initialize(o)
    return rows


def compare(o: PerfOptions, s: Setup, own: list[str]) -> list[dict]:
    seconds: dict[str, list] = {"baseline": [], "setup": []}
    made: dict[str, list] = {"baseline": [], "setup": []}
    turns = [("baseline", s.baseline), ("setup", s.options)]
    # One process holds both, which take turns by the video; several have other groups for each, so turns are longer.
    for turn in [turns] if s.processes == 1 else [[one] for _ in range(ROUNDS) for one in turns]:
        makers = {which: load(options, s, own) for which, options in turn}
        threads = torch.get_num_threads()
        for i in range(-1, s.videos):  # the first warms up
            for which, maker in makers.items():
                alone = s.processes > 1 and which == "baseline"  # by rank 0, with all cores
                torch.set_num_threads(os.cpu_count() if alone else threads)
                if alone and dist.get_rank():
                    continue
                taken, video = timed(*maker, s, i)
                if i >= 0:
                    seconds[which].append(taken)
                    made[which].append(video)
        torch.set_num_threads(threads)
        dist.barrier()
        leave_groups(*(group for *_, parts in makers.values() for group in (parts.video_group, parts.pair)))
    if dist.get_rank():
        return []
    speed = statistics.median(seconds["baseline"]) / statistics.median(seconds["setup"])
    raw = {"s": spread(seconds["setup"]), "speed-up": float(f"{speed:.3g}"), "baseline": s.baseline_name}
    raw |= {"baseline s": spread(seconds["baseline"]), "options": s.options, "baseline options": s.baseline}
    if s.model == "demo":
        pairs = list(zip(made["setup"], made["baseline"], strict=True))
        decibel, alike = min(scores.psnr(*p) for p in pairs), min(scores.ssim(*p) for p in pairs)
        raw |= {"PSNR dB": "equal" if math.isinf(decibel) else round(decibel, 2), "SSIM": round(alike, 4)}
    row = {
        "task": "generation",
        "size": o.size if own else s.model if s.model == "mid" else "tiny",
        "layout": s.name,
        "shape": None,
        "precision": "bf16" if "bf16" in s.options else o.precision,
        "value": float(f"{statistics.median(seconds['setup']):.4g}"),
        "unit": "s per video" if s.decoded else "s of sampling",
        "raw": raw,
    }
    cells = row["size"], s.name, row["value"], raw["speed-up"], raw.get("PSNR dB", "-"), raw.get("SSIM", "-")
    print(LINE.format(*cells, s.baseline_name), flush=True)
    return [row]


def spread(seconds: list[float]) -> dict:
    return {k: float(f"{v:.4g}") for k, v in perf.spread(seconds).items()}


def load(options: str, s: Setup, own: list[str]) -> tuple[InferOptions, WanConfig, infer.Parts]:
    o: InferOptions = parse("infer", [*options.split(), *own, *(["--prompt", PROMPTS[0]] if own else [])])
    if not mpu.model_parallel_is_initialized():
        parallel.initialize(o)
    config = model_config(o)
    if s.model == "mid":
        o, config = Drawn(**{f.name: getattr(o, f.name) for f in dataclasses.fields(o)}), mid(config)
    return o, config, infer.load(o, config)  # by every rank: groups are made by all together


def timed(o: InferOptions, config: WanConfig, parts: infer.Parts, s: Setup, i: int) -> tuple[float, torch.Tensor]:
    """Seconds of video number i, and the video, uint8 [1, 3, F, H, W]."""
    started = time.perf_counter()
    latents = infer.latents_of(o, config, parts, [Request(PROMPTS[i % len(PROMPTS)])], [i % s.videos])
    device.synchronize()
    sampled = time.perf_counter()
    video = infer.pixels_of(o, parts, latents)
    return (time.perf_counter() if s.decoded else sampled) - started, video


def leave_groups(*others: dist.ProcessGroup | None) -> None:
    """Destroy the groups of a layout. megatron-core only forgets them, and their threads stay: thousands after some
    setups, which take the processors from what is measured."""
    for group in (*mpu._global_process_group_list[1:], parallel.sample_group(), *others):
        if group is not None:
            dist.destroy_process_group(group)
    mpu.destroy_model_parallel()
