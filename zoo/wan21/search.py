"""Find cache settings that keep a stated quality: `--cache`, its start, interval and end.

    bash zoo/wan21/search.sh                              at least 32 dB PSNR to the uncached videos of a few prompts
    bash zoo/wan21/search.sh --weights Wan2.1-T2V-1.3B-Diffusers --prompts my.txt --psnr 30 --cache attention

For every kind of cache, interval and end (always before the last step, whose own value counts most) a start as early
as the quality allows is found by bisection, on the worst video. Quality does not rise evenly with the start: which of
the last steps are computed moves it too, so an earlier start may be good enough where a later one was not. Everything
tried is in the table; of what keeps the quality the fastest is proposed.
All other options stay as given, the reference included: `--sparse 0.6` searches on top of sparse attention.
"""

import dataclasses
import math
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from common import device, parallel

from . import accelerate, infer, quality
from .config import model_config
from .options import SearchOptions, requests

INTERVALS = (2, 3, 4, 6)


@dataclass(frozen=True)
class Tried:
    """A setting and what came of it: seconds of a video (median), PSNR and SSIM of the worst one."""

    kind: str
    start: int
    interval: int
    end: int
    seconds: float
    psnr: float
    ssim: float

    @property
    def flags(self) -> str:
        return f"--cache {self.kind} --cache-start {self.start} --cache-interval {self.interval} --cache-end {self.end}"


def main(o: SearchOptions) -> None:
    config = model_config(o)
    asked, parts = requests(o, config), infer.load(dataclasses.replace(o, cache="none"), config)

    # Both kinds of cache around one model; with interval 1 a cache does nothing, bit for bit.
    schedules = {kind: accelerate.Schedule(0, 1, 0) for kind in ("attention", "blocks")}
    for chunk in map(parallel.unwrapped, parts.chunks):
        accelerate.cache_attention(chunk, schedules["attention"], parts.moment)
        accelerate.cache_blocks(chunk, o.cached_blocks(config.num_layers), schedules["blocks"], parts.moment)

    def make() -> tuple[list[torch.Tensor], float]:
        """A uint8 video [1, 3, F, H, W] of every request, and the seconds their sampling took (median)."""
        made, seconds = [], []
        for i, request in enumerate(asked):
            started = time.perf_counter()
            latents = infer.latents_of(o, config, parts, [request], [o.seed + i])
            device.synchronize()
            seconds.append(time.perf_counter() - started)
            made.append(infer.pixels_of(o, parts, latents))
        return made, statistics.median(seconds)

    def with_cache(kind: str, start: int, interval: int, end: int) -> tuple[list[torch.Tensor], float]:
        plan = schedules[kind]
        plan.start, plan.interval, plan.end = start, interval, end
        made = make()
        plan.interval = 1
        return made

    make()  # warm-up
    wanted, plain_seconds = make()
    tried: dict[tuple, Tried] = {}

    def measure(*key) -> Tried:
        """Of a kind, start, interval and end."""
        if key not in tried:
            got, seconds = with_cache(*key)
            pairs = list(zip(got, wanted, strict=True))
            worst = min(quality.psnr(*pair) for pair in pairs), min(quality.ssim(*pair) for pair in pairs)
            shared = [(seconds, *worst)]
            dist.broadcast_object_list(shared, 0)  # every rank takes the same decisions
            tried[key] = Tried(*key, *shared[0])
            if dist.get_rank() == 0:
                print(line(tried[key], plain_seconds, o.psnr), flush=True)
        return tried[key]

    if dist.get_rank() == 0:
        print(
            f"uncached: {plain_seconds:.3f} s a video, {len(asked)} prompts, {o.sample_steps} steps; wanted: {o.psnr} dB"
        )
        print("cache      start interval  end   seconds  speed-up   PSNR    SSIM   (worst video)")
    for kind in schedules if o.cache == "none" else (o.cache,):
        for interval in INTERVALS:
            for end in sorted({o.sample_steps - 2, min(int(0.94 * o.sample_steps), o.sample_steps - 2)}):
                low, high = 0, end  # bisects the first start that keeps the quality
                while low < high:
                    middle = (low + high) // 2
                    keeps = measure(kind, middle, interval, end).psnr >= o.psnr
                    low, high = (low, middle) if keeps else (middle + 1, high)
    best = min((t for t in tried.values() if t.psnr >= o.psnr), key=lambda t: t.seconds, default=None)
    gain = 0.0
    if best is not None:  # again and in turns: a machine's speed may have wandered since the uncached ones were timed
        turns = [(make()[1], with_cache(best.kind, best.start, best.interval, best.end)[1]) for _ in range(3)]
        plain, cached = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
        gain = plain / cached
    if dist.get_rank() == 0 and gain > 1:
        print(f"use: {best.flags}\n{gain:.2f} x uncached sampling, timed again in turns; PSNR {best.psnr:.2f} dB")
    elif dist.get_rank() == 0:
        print(f"no setting keeps {o.psnr} dB and saves time; fix: a lower --psnr, or more --sample-steps")


def line(t: Tried, plain: float, bound: float) -> str:
    keeps = "keeps" if t.psnr >= bound else "loses"
    psnr = "  equal" if math.isinf(t.psnr) else f"{t.psnr:7.2f}"
    return (
        f"{t.kind:<10} {t.start:>5} {t.interval:>8} {t.end:>4} {t.seconds:>9.3f} {plain / t.seconds:>7.2f} x {psnr} "
        f"{t.ssim:>7.4f}   {keeps} {bound} dB"
    )
