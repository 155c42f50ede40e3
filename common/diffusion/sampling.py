"""Samples latents with a flow-matching model: schedulers, the loop with guidance, and which rank makes which video.

The prompts are shared out over the data-parallel ranks. With --cfg-parallel, they are shared out over pairs of these
ranks, and each rank of a pair computes one branch of the guidance. Context, tensor and pipeline parallel ranks share
the work of a prompt. The schedulers are diffusers' (UniPC and DPM-Solver++ with flow sigmas, flow-match Euler).
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from megatron.core import parallel_state as mpu
from tqdm import tqdm

from common import device

from .caches import SamplerPosition

# ---- the loop ----


def build_scheduler(sampler: str, shift: float, steps: int):
    """Returns the scheduler of the sampler (unipc, dpm or euler), with its timesteps set."""
    if sampler == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    elif sampler == "dpm":
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    else:
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps, device=device.current())
    return scheduler


def draw_noise(seeds: list[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Draws noise [B, *shape]. Each row is drawn on the CPU by its own seed, whatever the batch and device."""
    noise = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(device.current())


def sample_latents(
    velocity: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor], noise: torch.Tensor, scheduler, *, cfg: float,
    start: torch.Tensor | None = None, strength: float = 1.0, position: SamplerPosition | None = None,
    pair: dist.ProcessGroup | None = None,
) -> torch.Tensor:  # fmt: skip
    """Samples latents [B, C, F, H, W] from `noise` of that shape.

    Args:
        velocity: the model's prediction for x [B, C, F, H, W], t [B] and the branch of the guidance: 0 with the prompt,
            1 without. The samples follow v1 + cfg (v0 - v1); with cfg = 1 there is no second branch.
        start: latents [B, C, F, H, W] of a video to start from (SDEdit, arXiv:2108.01073). They get the noise level of
            the step from which the share `strength` of the steps is left to take.
        position: the sampler's position, which the caches read.
        pair: the two ranks that compute a branch each.
    """
    x, position = noise, position or SamplerPosition()
    branches = range(1 if cfg == 1 else 2)
    mine = branches if pair is None else [pair.rank()]
    times, first = scheduler.timesteps, 0
    if start is not None:
        first = len(times) - int(len(times) * strength)
        times = times[first:]
        level = times[:1].expand(len(x))
        euler = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        x = scheduler.scale_noise(start, level, x) if euler else scheduler.add_noise(start, x, level)
    progress = tqdm(times, disable=dist.get_rank() > 0 or not sys.stderr.isatty(), leave=False, desc="sampling")
    position.video += 1
    for position.step, t in enumerate(progress, first):
        parts = []
        for position.branch in mine:
            parts.append(velocity(x, t.expand(len(x)).float(), position.branch))
        if pair is not None:
            own, parts = parts[0].contiguous(), [torch.empty_like(x) for _ in branches]
            dist.all_gather(parts, own, group=pair)
        v = parts[0] if cfg == 1 else parts[1] + cfg * (parts[0] - parts[1])
        x = scheduler.step(v, t, x, return_dict=False)[0]
    return x


# ---- who makes which video ----


def video_groups(o) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None]:
    """Returns (the ranks that make the same video as this one, the pair that exchanges the guidance branches or None).

    The first group holds the ranks of one data-parallel rank, or of two with --cfg-parallel. In a pair, the rank of the
    conditional branch comes first.
    """
    ranks = mpu.RankGenerator(tp=o.tp, ep=1, dp=o.dp, pp=o.pp, cp=o.cp, order="tp-cp-ep-dp-pp")
    samples = ranks.get_ranks("tp-cp-pp")  # of each data-parallel rank
    dp_per_video, video, pair = o.dp // o.videos_at_once, None, None
    for first in range(0, o.dp, dp_per_video):
        together = samples[first : first + dp_per_video]
        for members in [sum(together, []), *(zip(*together, strict=True) if o.cfg_parallel else ())]:
            group = dist.new_group(list(members))
            if dist.get_rank() in members and video is None:
                video = group
            elif dist.get_rank() in members:
                pair = group
    return video, pair


def video_slot(o) -> int:
    """Returns which of the `o.videos_at_once` videos made at the same time is this rank's."""
    return mpu.get_data_parallel_rank() // (o.dp // o.videos_at_once)


def turns_of_rank(places: list[int], o, batch: int = 1) -> Iterator[tuple[list[int], bool]]:
    """Yields this rank's turns: up to `batch` of the `places`, and whether they count.

    Every rank takes every turn, because FSDP gathers parameters in each. A rank with no place left repeats the last
    place, and this turn does not count.
    """
    mine = places[video_slot(o) :: o.videos_at_once]
    for start in range(0, -(-len(places) // o.videos_at_once), batch):
        yield mine[start : start + batch] or places[-1:], start < len(mine)


def share_samples(requests: list, dp: int) -> list[tuple[int, object]]:
    """Returns (number, request) of this data-parallel rank's share. All shares have the same size, because FSDP gathers
    parameters on all ranks. Numbers beyond the last request repeat it."""
    share = -(-len(requests) // dp)
    numbers = range(mpu.get_data_parallel_rank() * share, (mpu.get_data_parallel_rank() + 1) * share)
    return [(number, requests[min(number, len(requests) - 1)]) for number in numbers]


def gather_samples(videos: torch.Tensor, o, count: int) -> list[np.ndarray]:
    """Gathers all data-parallel ranks' shares, uint8 [share, 3, F, H, W] -> `count` videos [F, H, W, 3] everywhere."""
    videos = videos.to(device.current())
    parts = [torch.empty_like(videos) for _ in range(o.dp)]
    dist.all_gather(parts, videos, group=mpu.get_data_parallel_group())
    return [video.permute(1, 2, 3, 0).cpu().numpy() for video in torch.cat(parts)[:count]]


@contextlib.contextmanager
def on_device(o, *modules: torch.nn.Module):
    """With --cpu-offload, keeps the modules on the accelerator only inside this block; else they are always there."""
    for module in modules if o.cpu_offload else ():
        module.to(device.current())
    try:
        yield
    finally:
        for module in modules if o.cpu_offload else ():
            module.to("cpu")
