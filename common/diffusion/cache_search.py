"""Finds cache settings that keep a given quality: the kind of cache, its start, interval and end.

For every kind, interval and end (always before the last step, whose own value matters most), bisection finds a start as
early as the quality of the worst video allows. Quality does not rise evenly with the start, because the start also
decides which of the last steps are computed: an earlier start may be good enough where a later one is not. The table
shows everything that was tried. The fastest setting that keeps the quality is proposed.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from . import scores
from .caches import Schedule

INTERVALS = (2, 3, 4, 6)


@dataclass(frozen=True)
class Measurement:
    """A setting and its results: seconds of a video (median), PSNR and SSIM of the worst video."""

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


def search(
    make: Callable[[], tuple[list[torch.Tensor], float]], schedules: dict[str, Schedule], steps: int, psnr: float
) -> None:
    """Tries cache settings; prints each of them and the one proposed. Collective.

    Args:
        make: makes the videos of all prompts under the schedules. It returns them, uint8 [1, 3, F, H, W] each, and the
            median seconds of sampling one.
        schedules: one for each kind to try. They have interval 1, at which a cache does nothing, bit for bit.
        steps: sampling steps. psnr: the PSNR to the uncached videos that must be kept, in dB.
    """
    main_rank, tried = dist.get_rank() == 0, {}
    make()  # warm-up
    uncached, plain_seconds = make()

    def with_cache(kind: str, start: int, interval: int, end: int) -> tuple[list[torch.Tensor], float]:
        plan = schedules[kind]
        plan.start, plan.interval, plan.end = start, interval, end
        result = make()
        plan.interval = 1
        return result

    def measure(*key) -> Measurement:
        """Measures a (kind, start, interval, end) once."""
        if key not in tried:
            videos, seconds = with_cache(*key)
            pairs = list(zip(videos, uncached, strict=True))
            worst = min(scores.psnr(*pair) for pair in pairs), min(scores.ssim(*pair) for pair in pairs)
            shared = [(seconds, *worst)]
            dist.broadcast_object_list(shared, 0)  # so that every rank takes the same decisions
            tried[key] = Measurement(*key, *shared[0])
            if main_rank:
                print(_line(tried[key], plain_seconds, psnr), flush=True)
        return tried[key]

    if main_rank:
        print(f"uncached: {plain_seconds:.3f} s a video, {len(uncached)} prompts, {steps} steps; wanted: {psnr} dB")
        print("cache      start interval  end   seconds  speed-up   PSNR    SSIM   (worst video)")
    for kind in schedules:
        for interval in INTERVALS:
            for end in sorted({steps - 2, min(int(0.94 * steps), steps - 2)}):
                low, high = 0, end  # bisects the first start that keeps the quality
                while low < high:
                    middle = (low + high) // 2
                    keeps = measure(kind, middle, interval, end).psnr >= psnr
                    low, high = (low, middle) if keeps else (middle + 1, high)
    best = min((t for t in tried.values() if t.psnr >= psnr), key=lambda t: t.seconds, default=None)
    gain = 0.0
    if best is not None:  # times both again, in turns: the machine's speed may have changed since the first timing
        turns = [(make()[1], with_cache(best.kind, best.start, best.interval, best.end)[1]) for _ in range(3)]
        plain, cached = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
        gain = plain / cached
    if main_rank and gain > 1:
        print(f"use: {best.flags}\n{gain:.2f} x uncached sampling, timed again in turns; PSNR {best.psnr:.2f} dB")
    elif main_rank:
        print(f"no setting keeps {psnr} dB and saves time; fix: a lower --psnr, or more --sample-steps")


def _line(t: Measurement, plain: float, bound: float) -> str:
    keeps = "keeps" if t.psnr >= bound else "loses"
    psnr = "  equal" if math.isinf(t.psnr) else f"{t.psnr:7.2f}"
    return (
        f"{t.kind:<10} {t.start:>5} {t.interval:>8} {t.end:>4} {t.seconds:>9.3f} {plain / t.seconds:>7.2f} x {psnr} "
        f"{t.ssim:>7.4f}   {keeps} {bound} dB"
    )
