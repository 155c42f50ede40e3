"""Finds cache settings that keep a stated quality: `--cache`, its start, interval and end.

    bash zoo/wan21/search.sh                              at least 32 dB PSNR to the uncached videos of a few prompts
    bash zoo/wan21/search.sh --weights Wan2.1-T2V-1.3B-Diffusers --prompts my.txt --psnr 30 --cache attention

common/diffusion/cache_search.py has the method. All other options apply as given, also to the uncached reference: with
`--sparse 0.6`, both use sparse attention.
"""

import dataclasses
import statistics
import time

import torch

from common import device, parallel
from common.diffusion.cache_search import search
from common.diffusion.caches import Schedule

from . import accelerate, infer
from .config import model_config
from .options import SearchOptions, requests_of


def main(o: SearchOptions) -> None:
    config = model_config(o)
    requests, parts = requests_of(o, config), infer.load(dataclasses.replace(o, cache="none"), config)

    # Both kinds of cache are around one model. A cache with interval 1 changes nothing, bit for bit.
    schedules = {kind: Schedule(0, 1, 0) for kind in ("attention", "blocks")}
    for chunk in map(parallel.unwrapped, parts.chunks):
        accelerate.cache_attention(chunk, schedules["attention"], parts.position)
        accelerate.cache_blocks(chunk, o.cached_blocks(config.num_layers), schedules["blocks"], parts.position)

    def make() -> tuple[list[torch.Tensor], float]:
        """Makes a video uint8 [1, 3, F, H, W] of every request. Returns them and the median seconds of sampling one."""
        videos, seconds = [], []
        for i, request in enumerate(requests):
            started = time.perf_counter()
            latents = infer.latents_of(o, config, parts, [request], [o.seed + i])
            device.synchronize()
            seconds.append(time.perf_counter() - started)
            videos.append(infer.pixels_of(o, parts, latents))
        return videos, statistics.median(seconds)

    kinds = schedules if o.cache == "none" else {o.cache: schedules[o.cache]}
    search(make, kinds, o.sample_steps, o.psnr)
