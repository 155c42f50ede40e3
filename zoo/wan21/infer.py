"""Sample videos: text, and given frames, -> latents by flow matching with guidance -> VAE -> mp4 and GIF.

    bash zoo/wan21/infer_t2v.sh --prompt "a handwritten three moves to the left"          # the demo's tiny model
    bash zoo/wan21/infer_t2v.sh --weights Wan2.1-T2V-1.3B-Diffusers --prompt "two cats box on a spotlighted stage"
    bash zoo/wan21/infer_i2v.sh --weights Wan2.1-I2V-14B-480P-Diffusers --image cat.png --prompt "the cat boxes"

Any layout samples: data-parallel ranks share the prompts out (with --cfg-parallel, pairs of them do, one rank for each
branch of the guidance), context, tensor and pipeline parallel ranks share a prompt's work. Samplers are diffusers'
(UniPC and DPM-Solver++ with flow sigmas, flow-match Euler). What is cheaper at a price in quality is in accelerate.py.
"""

import contextlib
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from megatron.core import parallel_state as mpu
from tqdm import tqdm

from common import checkpoint, device, parallel, release
from common import train as loop

from . import accelerate, convert, data, images, vae, videos
from .accelerate import Moment
from .config import WanConfig, cache_gib, latent_grid, model_config
from .encoders import FrameEncoder, TextEncoder, VideoCodec
from .model import WanBlock, build, draw, unpatchify
from .options import InferOptions, requests


def scheduler(sampler: str, shift: float, steps: int, where: torch.device):
    if sampler == "euler":
        made = FlowMatchEulerDiscreteScheduler(shift=shift)
    elif sampler == "dpm":
        made = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    else:
        made = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    made.set_timesteps(steps, device=where)
    return made


@torch.no_grad()
def velocity(
    chunks, o, config: WanConfig, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, condition: dict | None = None
) -> torch.Tensor:
    """The model's prediction for x [B, C, F, H, W], t [B], text [B, T, D], whole on every rank, in any layout.
    condition: of image-to-video, y [B, 4 + C, F, H, W] and image [B, I, image_dim] (see `WanDiT.forward`)."""
    split, condition = o.cp * (o.tp if o.sp else 1), condition or {}

    def forward_step(_, model: torch.nn.Module):
        return model(x, t, text, **condition), lambda output: (output.sum(), {"tokens": output})

    length = (config.tokens(x.shape[2:]) // split + config.context_rows) * split
    outputs = loop.forward(chunks, forward_step, [None], micro_batch=len(x), sequence_length=length, backward=False)
    mc = parallel.unwrapped(chunks[0]).config
    if outputs:
        tokens = parallel.gather_tokens(outputs[0]["tokens"].float(), mc)
    else:  # not the last pipeline stage
        tokens = x.new_empty(config.tokens(x.shape[2:]), len(x), x[0].numel() // config.tokens(x.shape[2:]))
    if o.pp > 1:
        dist.broadcast(
            tokens, mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group()
        )
    return unpatchify(tokens, x.shape[2:], config.patch_size)


def sample(
    chunks, o, config: WanConfig, text, empty, grid, seeds: list[int], *, sampler, shift, steps, cfg,
    condition=None, start=None, strength=1.0, moment: Moment | None = None, pair: dist.ProcessGroup | None = None,
) -> torch.Tensor:  # fmt: skip
    """Latents [B, C, *grid] for text embeddings [B, T, D] with guidance against `empty` [T, D], noise by `seeds`;
    image-to-video under a `condition` (see `velocity`), which guidance keeps on both sides; video-to-video from the
    latents `start` [B, C, *grid] (SDEdit, arXiv:2108.01073): noised as the step is that leaves `strength` of them.

    moment: what `accelerate.apply` returned for these chunks; pair: the two ranks that compute a branch each.
    """
    where, moment = device.current(), moment or Moment()
    noise = [torch.randn(config.out_dim, *grid, generator=torch.Generator().manual_seed(s)) for s in seeds]
    x = torch.stack(noise).to(where)
    texts = [text, empty.expand_as(text)][: 1 if cfg == 1 else 2]  # of each branch of the guidance
    mine = range(len(texts)) if pair is None else [pair.rank()]
    plan = scheduler(sampler, shift, steps, where)
    times, first = plan.timesteps, 0
    if start is not None:
        first = steps - int(steps * strength)
        times = times[first:]
        level = times[:1].expand(len(x))
        x = plan.scale_noise(start, level, x) if sampler == "euler" else plan.add_noise(start, x, level)
    progress = tqdm(times, disable=dist.get_rank() > 0 or not sys.stderr.isatty(), leave=False, desc="sampling")
    moment.video += 1
    for moment.step, t in enumerate(progress, first):
        parts = []
        for moment.branch in mine:
            parts.append(velocity(chunks, o, config, x, t.expand(len(x)).float(), texts[moment.branch], condition))
        if pair is not None:
            own, parts = parts[0].contiguous(), [torch.empty_like(x) for _ in texts]
            dist.all_gather(parts, own, group=pair)
        v = parts[0] if cfg == 1 else parts[1] + cfg * (parts[0] - parts[1])
        x = plan.step(v, t, x, return_dict=False)[0]
    return x


def condition_on(
    frames: FrameEncoder | None, asked: list[images.Request], bucket: data.Bucket, fit: str
) -> dict[str, torch.Tensor] | None:
    """What `sample` wants to know of the requests' pictures; None for text-to-video, which has no `FrameEncoder`."""
    if frames is None:
        return None
    given = torch.from_numpy(images.given_frames(asked, bucket, fit)).permute(0, 4, 1, 2, 3)  # [B, 3, n, H, W]
    return frames.encode(given, bucket.frames)


def video_groups(o: InferOptions) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None]:
    """The ranks that make the same video as this one: those of a sample, twice with --cfg-parallel; and then the pair
    that exchanges the two branches of the guidance, the conditional one first."""
    ranks = mpu.RankGenerator(tp=o.tp, ep=1, dp=o.dp, pp=o.pp, cp=o.cp, order="tp-cp-ep-dp-pp")
    samples = ranks.get_ranks("tp-cp-pp")  # of each data-parallel rank
    each, video, pair = o.dp // o.lanes, None, None
    for first in range(0, o.dp, each):
        together = samples[first : first + each]
        for members in [sum(together, []), *(zip(*together, strict=True) if o.cfg_parallel else ())]:
            group = dist.new_group(list(members))
            if dist.get_rank() in members and video is None:
                video = group
            elif dist.get_rank() in members:
                pair = group
    return video, pair


def lane_of(o: InferOptions) -> int:
    """Which of the `o.lanes` videos made at the same time is this rank's."""
    return mpu.get_data_parallel_rank() // (o.dp // o.lanes)


@contextlib.contextmanager
def on_device(o: InferOptions, *modules: torch.nn.Module):
    """With --cpu-offload the modules are on the accelerator inside this block only; else they always are."""
    for module in modules if o.cpu_offload else ():
        module.to(device.current())
    try:
        yield
    finally:
        for module in modules if o.cpu_offload else ():
            module.to("cpu")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All that makes a video: the transformer, and what is around it; the ranks that make the same one."""

    chunks: list[torch.nn.Module]
    moment: Moment
    codec: VideoCodec
    encoder: TextEncoder
    frames: FrameEncoder | None  # image-to-video
    video_group: dist.ProcessGroup
    pair: dist.ProcessGroup | None


def load(o: InferOptions, config: WanConfig) -> Parts:
    """Read the weights, each part to where it waits for its use, and put what `o` asks for around the transformer."""
    video_group, pair = video_groups(o)
    chunks = build(o, config, torch.device("cpu") if o.cpu_offload else None)
    if o.checkpoint:
        checkpoint.load(checkpoint.find(o.checkpoint, str(o.checkpoint)), chunks)
    else:
        convert.fill(chunks, o, config, draw)
    if o.adapter:
        release.merge_into(chunks, *convert.adapter(o.adapter, config))
    if o.quantize == "int8":
        accelerate.quantize(chunks)
    if o.fsdp:
        chunks = parallel.wrap(chunks, o, WanBlock)  # compiles too
    elif o.compile:
        for block in (m for chunk in chunks for m in chunk.modules() if isinstance(m, WanBlock)):
            block.compile()
    moment = accelerate.apply(chunks, o, config, latent_grid(data.parse_buckets(o.video)[0]))

    codec = VideoCodec(o.weights, device.current())
    dtype = parallel.unwrapped(chunks[0]).config.params_dtype
    encoder = TextEncoder(o.weights, device.current(), dtype, config.text_len)
    frames = FrameEncoder(o.weights, codec) if config.given_frames else None
    for module in (codec.vae, encoder.model, *([frames.clip] if frames else [])) if o.cpu_offload else ():
        module.to("cpu")
    if o.vae_tiling:
        codec.vae.enable_tiling()
    if o.vae_parallel:
        codec.decoder = vae.split_decoder(codec.vae, video_group)
    return Parts(
        chunks=chunks, moment=moment, codec=codec, encoder=encoder, frames=frames, video_group=video_group, pair=pair
    )


def latents_of(
    o: InferOptions, config: WanConfig, parts: Parts, asked: list[images.Request], seeds: list[int]
) -> torch.Tensor:
    """Latents [B, C, F, H, W] of what is asked, noise by `seeds`. ValueError: they are not finite."""
    bucket, start = data.parse_buckets(o.video)[0], None
    with on_device(o, parts.encoder.model):
        text, empty = parts.encoder.encode([r.prompt for r in asked]), parts.encoder.encode([o.negative])[0]
    with on_device(o, parts.codec.vae, *([parts.frames.clip] if parts.frames else [])):
        condition = condition_on(parts.frames, asked, bucket, o.fit)
        if o.video_in:
            clip = torch.from_numpy(images.clip(o.video_in, bucket, o.fps, o.fit))  # [F, H, W, 3]
            start = parts.codec.encode(clip.permute(3, 0, 1, 2)[None])
    with on_device(o, *parts.chunks):
        latents = sample(
            parts.chunks, o, config, text, empty, latent_grid(bucket), seeds,
            sampler=o.sampler, shift=o.sample_shift, steps=o.sample_steps, cfg=o.cfg, condition=condition, start=start,
            strength=o.strength, moment=parts.moment, pair=parts.pair,
        )  # fmt: skip
    if not latents.isfinite().all():
        raise ValueError(
            "the model's latents are not finite: damaged weights, or too large for this precision; fix: --weights, "
            "--checkpoint or --precision"
        )
    return latents


def pixels_of(o: InferOptions, parts: Parts, latents: torch.Tensor) -> torch.Tensor:
    """Latents -> uint8 [B, 3, F, H, W] on the CPU; with --vae-parallel all ranks of the video call it."""
    with on_device(o, parts.codec.vae):
        return parts.codec.decode(latents)


def main(o: InferOptions) -> None:
    config, chatty = model_config(o), dist.get_rank() == 0
    if chatty and o.cpu_offload and device.KIND == "cpu":
        print("note: --cpu-offload: this device is the CPU, there is nothing to move", flush=True)
    if chatty and o.cache != "none":
        tokens = config.tokens(latent_grid(data.parse_buckets(o.video)[0]))
        print(f"cache: up to {cache_gib(o, config, tokens):.3g} GiB on each rank", flush=True)

    asked, todo = requests(o, config), [None]
    if chatty:  # one rank looks which videos are missing, so that all do the same
        o.out.mkdir(parents=True, exist_ok=True)
        todo = [videos.unfinished(o, asked)]
    dist.broadcast_object_list(todo, 0)
    todo = todo[0]
    if chatty and len(todo) < len(asked):
        done = len(asked) - len(todo)
        print(f"{done} of {len(asked)} videos are in {o.out} already, made in the same way", flush=True)
    if todo:
        make(o, config, asked, todo)


def make(o: InferOptions, config: WanConfig, asked: list[images.Request], todo: list[int]) -> None:
    """Sample, decode and write the videos `todo` of what is asked for."""
    parts, lane, same = load(o, config), lane_of(o), videos.settings(o)
    for turn in range(-(-len(todo) // o.lanes)):  # every lane does every turn: FSDP gathers in all of them
        place, started = turn * o.lanes + lane, time.perf_counter()
        i = todo[min(place, len(todo) - 1)]
        latents = latents_of(o, config, parts, [asked[i]], [o.seed + i])
        writes = parts.video_group.rank() == 0
        if place >= len(todo) or not (writes or o.vae_parallel):
            continue
        video = pixels_of(o, parts, latents)[0].permute(1, 2, 3, 0).numpy()
        if writes:
            paths = videos.write(video, o.out / f"{i:04d}", o.fps or 16, o.format, videos.how_made(same, i, asked[i]))
            seconds = time.perf_counter() - started
            print(f"{' '.join(map(str, paths))}  {seconds:.1f} s  {asked[i].prompt!r}", flush=True)
