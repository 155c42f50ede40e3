"""Benchmarks sampling: compares each setup with a named baseline, in seconds and in quality.

    bash zoo/wan21/perf.sh --only generation               setups of one process
    NPROC=2 bash zoo/wan21/perf.sh --only generation       setups of two processes, each against one process

A setup is a string of options of infer_t2v.sh. The setup and its baseline take turns and make the same videos (same
prompts, same noise). Seconds are those of one video after a warm-up: of sampling and decoding, or only of sampling if
the setup says so (`decoded`). PSNR and SSIM compare its videos with the baseline's; the worst video counts.

The model `tiny` is the demo's weights. Their quality is meaningful at the shape they were trained on; at a larger shape
their videos can only be compared with each other. The model `mid` has initial weights (512 wide, 8 blocks) and measures
only time, not quality. With --weights, those weights are the only model.
"""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from common import bench, device, parallel, perf
from common.bench import rounded
from common.diffusion import scores
from common.diffusion.requests import Request

from . import infer
from .config import WanConfig, model_config
from .options import DEMO_WEIGHTS, InferOptions, PerfOptions, parse

ROUNDS = 3  # turns of a setup and its baseline on several processes
PROMPTS = ("a handwritten three moves to the left", "a handwritten seven moves up and to the right")
LARGE = "--video 17x320x320 --sample-steps 2"  # larger than one tile of 256 pixels
LONG = "--video 33x384x384 --sample-steps 4"  # 5184 tokens: 41 blocks of sparse attention
WIDE = "--video 33x384x384 --sample-steps 2 --cfg 1"  # the same shape for the mid model, in less time
LINE = "{:<5} {:<58} {:>8} {:>8} {:>8} {:>7}  {}"


@dataclass(frozen=True)
class Setup:
    """What is measured and with what it is compared, as options of infer_t2v.sh."""

    name: str
    options: str
    baseline: str  # options
    baseline_name: str
    model: str = "demo"  # demo or mid
    decoded: bool = True  # whether the seconds include decoding
    videos: int = 2  # per round
    processes: int = 1  # they make one video at a time, together; data-parallel sampling is not measured


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
    """Returns a model so large that on a CPU arithmetic takes most of a step's time, not Python."""
    return dataclasses.replace(config, dim=512, ffn_dim=2048, num_heads=8, num_layers=8)


def generation(o: PerfOptions) -> Iterator[dict]:
    """Measures every setup for this number of processes. Yields the record's rows on rank 0."""
    if model_config(o).given_frames:
        print("generation: measured for text-to-video only")
        return
    weights = [] if o.weights == DEMO_WEIGHTS else ["--weights", str(o.weights)]
    setups = [s for s in SETUPS if s.processes == o.world and (s.model == "demo" or not weights)]
    if not setups and dist.get_rank() == 0:
        counts = sorted({s.processes for s in SETUPS})
        print(f"generation: no setup is for {o.world} processes; there are some for {', '.join(map(str, counts))}")
    if setups and dist.get_rank() == 0:
        print(LINE.format("model", "setup", "s", "speed-up", "PSNR dB", "SSIM", "baseline"), flush=True)
    leave_groups()  # each setup has its own layout
    for s in setups:
        yield from compare(o, s, weights, bench.SECONDS / len(setups))
    parallel.initialize(o)


def compare(o: PerfOptions, s: Setup, own: list[str], budget: float) -> list[dict]:
    """Measures a setup and its baseline. On one accelerator, videos after the third are made while their seconds are
    within the budget. On a CPU all are made, because the recorded quality is that of the worst one."""
    seconds: dict[str, list] = {"baseline": [], "setup": []}
    videos: dict[str, list] = {"baseline": [], "setup": []}
    turns = [("baseline", s.baseline), ("setup", s.options)]
    # One process holds both models and alternates by video. Several need other groups for each, so a turn is a round.
    for turn in [turns] if s.processes == 1 else [[side_options] for _ in range(ROUNDS) for side_options in turns]:
        makers = {side: load(options, s, own) for side, options in turn}
        threads = torch.get_num_threads()
        for i in range(-1, s.videos):  # video -1 warms up
            spent = sum(map(sum, seconds.values()))
            if device.KIND != "cpu" and s.processes == 1 and i >= bench.FEWEST and spent > budget:
                break
            for side, maker in makers.items():
                on_one_process = s.processes > 1 and side == "baseline"  # only rank 0 makes it, with all cores
                torch.set_num_threads(os.cpu_count() if on_one_process else threads)
                if on_one_process and dist.get_rank():
                    continue
                duration, video = timed(*maker, s, i)
                if i >= 0:
                    seconds[side].append(duration)
                    videos[side].append(video)
        torch.set_num_threads(threads)
        dist.barrier()
        leave_groups(*(group for *_, parts in makers.values() for group in (parts.video_group, parts.pair)))
    if dist.get_rank():
        return []
    speed = statistics.median(seconds["baseline"]) / statistics.median(seconds["setup"])
    raw = {"s": rounded(perf.spread(seconds["setup"])), "speed-up": float(f"{speed:.3g}"), "baseline": s.baseline_name}
    raw |= {
        "baseline s": rounded(perf.spread(seconds["baseline"])),
        "options": s.options,
        "baseline options": s.baseline,
    }
    if s.model == "demo":
        pairs = list(zip(videos["setup"], videos["baseline"], strict=True))
        decibel, similarity = min(scores.psnr(*p) for p in pairs), min(scores.ssim(*p) for p in pairs)
        raw |= {"PSNR dB": "equal" if math.isinf(decibel) else round(decibel, 2), "SSIM": round(similarity, 4)}
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


def load(options: str, s: Setup, own: list[str]) -> tuple[InferOptions, WanConfig, infer.Parts]:
    o: InferOptions = parse("infer", [*options.split(), *own, *(["--prompt", PROMPTS[0]] if own else [])])
    if not mpu.model_parallel_is_initialized():
        parallel.initialize(o)
    config = model_config(o)
    if s.model == "mid":
        o, config = Drawn(**{f.name: getattr(o, f.name) for f in dataclasses.fields(o)}), mid(config)
    return o, config, infer.load(o, config)  # called on every rank, because creating groups is collective


def timed(o: InferOptions, config: WanConfig, parts: infer.Parts, s: Setup, i: int) -> tuple[float, torch.Tensor]:
    """Makes video number i. Returns its seconds and the video, uint8 [1, 3, F, H, W]."""
    started = time.perf_counter()
    latents = infer.latents_of(o, config, parts, [Request(PROMPTS[i % len(PROMPTS)])], [i % s.videos])
    device.synchronize()
    sampled = time.perf_counter()
    video = infer.pixels_of(o, parts, latents)
    return (time.perf_counter() if s.decoded else sampled) - started, video


def leave_groups(*others: dist.ProcessGroup | None) -> None:
    """Destroys the groups of a layout. megatron-core only drops its references, so the groups' threads would go on:
    thousands after some setups, which slow down what is measured."""
    for group in (*mpu._global_process_group_list[1:], parallel.sample_group(), *others):
        if group is not None:
            dist.destroy_process_group(group)
    mpu.destroy_model_parallel()
