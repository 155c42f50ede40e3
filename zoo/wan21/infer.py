"""Samples videos: text (and given frames) -> latents, by flow matching with guidance -> VAE -> mp4 and GIF.

    bash zoo/wan21/infer_t2v.sh --prompt "a handwritten three moves to the left"          # the demo's tiny model
    bash zoo/wan21/infer_t2v.sh --weights Wan2.1-T2V-1.3B-Diffusers --prompt "two cats box on a spotlighted stage"
    bash zoo/wan21/infer_i2v.sh --weights Wan2.1-I2V-14B-480P-Diffusers --image cat.png --prompt "the cat boxes"

Every layout can sample. common/diffusion/sampling.py has the sampling loop and says which rank makes which video.
accelerate.py has methods that are cheaper and lower the quality.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock
from megatron.core import parallel_state as mpu

from common import checkpoint, device, parallel, release
from common import train as loop
from common.diffusion import sampling, videos
from common.diffusion.buckets import Bucket
from common.diffusion.caches import SamplerPosition, quantize
from common.diffusion.requests import Request, read_clip, read_given_frames
from common.diffusion.vae_parallel import split_decoder

from . import accelerate, convert
from .config import WanConfig, cache_gib, latent_grid, model_config
from .encoders import FrameEncoder, TextEncoder, VideoCodec
from .model import WanBlock, build, draw, unpatchify
from .options import InferOptions, parse_buckets, requests_of


@torch.no_grad()
def velocity(
    chunks, o, config: WanConfig, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, condition: dict | None = None
) -> torch.Tensor:
    """Predicts the velocity for x [B, C, F, H, W], t [B], text [B, T, D], whole on every rank, in any layout.
    condition, for image-to-video: y [B, 4 + C, F, H, W] and image [B, I, image_dim] (see `WanDiT.forward`)."""
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
    condition=None, start=None, strength=1.0, position: SamplerPosition | None = None,
    pair: dist.ProcessGroup | None = None,
) -> torch.Tensor:  # fmt: skip
    """Samples latents [B, C, *grid] for text embeddings [B, T, D], with guidance against `empty` [T, D]. `seeds` draw
    the noise.

    condition: for image-to-video (see `velocity`); both branches of the guidance have it. start, strength, pair: see
    `sample_latents`. position: what `accelerate.apply` returned for these chunks.
    """
    texts = [text, empty.expand_as(text)]  # by branch of the guidance

    def predict(x: torch.Tensor, t: torch.Tensor, branch: int) -> torch.Tensor:
        return velocity(chunks, o, config, x, t, texts[branch], condition)

    noise = sampling.draw_noise(seeds, (config.out_dim, *grid))
    plan = sampling.build_scheduler(sampler, shift, steps)
    return sampling.sample_latents(
        predict, noise, plan, cfg=cfg, start=start, strength=strength, position=position, pair=pair
    )


def condition_on(
    frames: FrameEncoder | None, requests: list[Request], bucket: Bucket, fit: str
) -> dict[str, torch.Tensor] | None:
    """Encodes the requests' pictures to the condition of `sample`. None for text-to-video (frames is None)."""
    if frames is None:
        return None
    given = torch.from_numpy(read_given_frames(requests, bucket, fit)).permute(0, 4, 1, 2, 3)  # [B, 3, n, H, W]
    return frames.encode(given, bucket.frames)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that makes a video: the models, and the groups of ranks that make the same video."""

    chunks: list[torch.nn.Module]
    position: SamplerPosition
    codec: VideoCodec
    encoder: TextEncoder
    frames: FrameEncoder | None  # None for text-to-video
    video_group: dist.ProcessGroup
    pair: dist.ProcessGroup | None


def load(o: InferOptions, config: WanConfig) -> Parts:
    """Loads all parts (with --cpu-offload to the CPU) and applies the accelerations that `o` asks for."""
    video_group, pair = sampling.video_groups(o)
    chunks = build(o, config, torch.device("cpu") if o.cpu_offload else None)
    if o.checkpoint:
        checkpoint.load(checkpoint.find(o.checkpoint, str(o.checkpoint)), chunks)
    else:
        convert.fill(chunks, o, config, draw)
    if o.adapter:
        release.merge_into(chunks, *convert.adapter(o.adapter, config))
    if o.quantize == "int8":
        quantize(m for chunk in chunks for m in chunk.modules() if isinstance(m, WanBlock))
    if o.fsdp:
        chunks = parallel.wrap(chunks, o, WanBlock)  # compiles the blocks too
    elif o.compile:
        for block in (m for chunk in chunks for m in chunk.modules() if isinstance(m, WanBlock)):
            block.compile()
    position = accelerate.apply(chunks, o, config, latent_grid(parse_buckets(o.video)[0]))

    codec = VideoCodec(o.weights, device.current())
    dtype = parallel.unwrapped(chunks[0]).config.params_dtype
    encoder = TextEncoder(o.weights, device.current(), dtype, config.text_len)
    frames = FrameEncoder(o.weights, codec) if config.given_frames else None
    for module in (codec.vae, encoder.model, *([frames.clip] if frames else [])) if o.cpu_offload else ():
        module.to("cpu")
    if o.vae_tiling:
        codec.vae.enable_tiling()
    if o.vae_parallel:
        codec.decoder = split_decoder(codec.vae, WanAttentionBlock, video_group)
    return Parts(
        chunks=chunks,
        position=position,
        codec=codec,
        encoder=encoder,
        frames=frames,
        video_group=video_group,
        pair=pair,
    )


def latents_of(
    o: InferOptions, config: WanConfig, parts: Parts, requests: list[Request], seeds: list[int]
) -> torch.Tensor:
    """Samples latents [B, C, F, H, W] of the requests; `seeds` draw the noise. ValueError: latents are not finite."""
    bucket, start = parse_buckets(o.video)[0], None
    with sampling.on_device(o, parts.encoder.model):
        text, empty = parts.encoder.encode([r.prompt for r in requests]), parts.encoder.encode([o.negative])[0]
    with sampling.on_device(o, parts.codec.vae, *([parts.frames.clip] if parts.frames else [])):
        condition = condition_on(parts.frames, requests, bucket, o.fit)
        if o.video_in:
            clip = torch.from_numpy(read_clip(o.video_in, bucket, o.fps, o.fit))  # [F, H, W, 3]
            start = parts.codec.encode(clip.permute(3, 0, 1, 2)[None])
    with sampling.on_device(o, *parts.chunks):
        latents = sample(
            parts.chunks, o, config, text, empty, latent_grid(bucket), seeds,
            sampler=o.sampler, shift=o.sample_shift, steps=o.sample_steps, cfg=o.cfg, condition=condition, start=start,
            strength=o.strength, position=parts.position, pair=parts.pair,
        )  # fmt: skip
    if not latents.isfinite().all():
        raise ValueError(
            "the model's latents are not finite: damaged weights, or too large for this precision; fix: --weights, "
            "--checkpoint or --precision"
        )
    return latents


def pixels_of(o: InferOptions, parts: Parts, latents: torch.Tensor) -> torch.Tensor:
    """Decodes latents to uint8 [B, 3, F, H, W] on the CPU. With --vae-parallel all ranks of the video must call it."""
    with sampling.on_device(o, parts.codec.vae):
        return parts.codec.decode(latents)


def main(o: InferOptions) -> None:
    config, chatty = model_config(o), dist.get_rank() == 0
    if chatty and o.cpu_offload and device.KIND == "cpu":
        print("note: --cpu-offload: this device is the CPU, there is nothing to move", flush=True)
    if chatty and o.cache != "none":
        tokens = config.tokens(latent_grid(parse_buckets(o.video)[0]))
        print(f"cache: up to {cache_gib(o, config, tokens):.3g} GiB on each rank", flush=True)

    requests, todo = requests_of(o, config), [None]
    if chatty:  # rank 0 lists the missing videos, so that all ranks agree
        o.out.mkdir(parents=True, exist_ok=True)
        todo = [videos.list_missing(o, requests)]
    dist.broadcast_object_list(todo, 0)
    todo = todo[0]
    if chatty and len(todo) < len(requests):
        done = len(requests) - len(todo)
        print(f"{done} of {len(requests)} videos are in {o.out} already, made in the same way", flush=True)
    if todo:
        make(o, config, requests, todo)


def make(o: InferOptions, config: WanConfig, requests: list[Request], todo: list[int]) -> None:
    """Samples, decodes and writes the videos of the requests with these numbers."""
    parts, settings = load(o, config), videos.describe(o)
    for (i,), counts in sampling.turns_of_rank(todo, o):
        started = time.perf_counter()
        latents = latents_of(o, config, parts, [requests[i]], [o.seed + i])
        writes = parts.video_group.rank() == 0
        if not counts or not (writes or o.vae_parallel):
            continue
        video = pixels_of(o, parts, latents)[0].permute(1, 2, 3, 0).numpy()
        if writes:
            metadata = videos.describe_request(settings, i, requests[i])
            paths = videos.write_video(video, o.out / f"{i:04d}", o.fps or 16, o.format, metadata)
            seconds = time.perf_counter() - started
            print(f"{' '.join(map(str, paths))}  {seconds:.1f} s  {requests[i].prompt!r}", flush=True)
