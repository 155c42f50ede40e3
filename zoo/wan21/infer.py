"""Sample videos: text, and given frames, -> latents by flow matching with guidance -> VAE -> mp4 and GIF.

    bash zoo/wan21/infer_t2v.sh --prompt "a handwritten three moves to the left"          # the demo's tiny model
    bash zoo/wan21/infer_t2v.sh --weights Wan2.1-T2V-1.3B-Diffusers --prompt "two cats box on a spotlighted stage"
    bash zoo/wan21/infer_i2v.sh --weights Wan2.1-I2V-14B-480P-Diffusers --image cat.png --prompt "the cat boxes"

Any layout samples: data-parallel ranks share the prompts out, context, tensor and pipeline parallel ranks share a
prompt's work. Samplers are diffusers' (UniPC with flow sigmas, or flow-match Euler).
"""

import sys
from pathlib import Path

from common import device  # isort: skip  (before megatron)
import av
import numpy as np
import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from PIL import Image
from tqdm import tqdm

from common import checkpoint, cli, parallel

from . import convert, data, images
from .config import InferOptions, WanConfig, latent_grid, model_config, parse, requests
from .encoders import FrameEncoder, TextEncoder, VideoCodec
from .model import WanBlock, build, unpatchify


def scheduler(sampler: str, shift: float, steps: int, where: torch.device):
    if sampler == "euler":
        made = FlowMatchEulerDiscreteScheduler(shift=shift)
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
    outputs = get_forward_backward_func()(
        forward_step_func=lambda _, model: (model(x, t, text, **condition), lambda output, non_loss_data: output),
        data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=1,
        seq_length=(config.tokens(x.shape[2:]) // split + config.context_rows) * split,
        micro_batch_size=len(x),
        forward_only=True,
        collect_non_loss_data=True,
    )
    mc = parallel.unwrapped(chunks[0]).config
    if outputs:
        tokens = parallel.gather_tokens(outputs[0].float(), mc)
    else:  # not the last pipeline stage
        tokens = x.new_empty(config.tokens(x.shape[2:]), len(x), x[0].numel() // config.tokens(x.shape[2:]))
    if o.pp > 1:
        dist.broadcast(
            tokens, mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group()
        )
    return unpatchify(tokens, x.shape[2:], config.patch_size)


def sample(
    chunks, o, config: WanConfig, text, empty, grid, seeds: list[int],
    *, sampler, shift, steps, cfg, condition=None, start=None, strength=1.0,
) -> torch.Tensor:  # fmt: skip
    """Latents [B, C, *grid] for text embeddings [B, T, D] with guidance against `empty` [T, D], noise by `seeds`;
    image-to-video under a `condition` (see `velocity`), which guidance keeps on both sides; video-to-video from the
    latents `start` [B, C, *grid] (SDEdit, arXiv:2108.01073): noised as the step is that leaves `strength` of them."""
    where = device.current()
    noise = [torch.randn(config.out_dim, *grid, generator=torch.Generator().manual_seed(s)) for s in seeds]
    x = torch.stack(noise).to(where)
    unconditional = empty.expand_as(text)
    plan = scheduler(sampler, shift, steps, where)
    times = plan.timesteps
    if start is not None:
        times = times[steps - int(steps * strength) :]
        level = times[:1].expand(len(x))
        x = plan.scale_noise(start, level, x) if sampler == "euler" else plan.add_noise(start, x, level)
    for t in tqdm(times, disable=dist.get_rank() > 0 or not sys.stderr.isatty(), leave=False, desc="sampling"):
        now = t.expand(len(x)).float()
        v = velocity(chunks, o, config, x, now, text, condition)
        if cfg != 1:
            base = velocity(chunks, o, config, x, now, unconditional, condition)
            v = base + cfg * (v - base)
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


def write_video(frames: np.ndarray, stem: Path, fps: float, kind: str, prompt: str) -> list[Path]:
    """uint8 [F, H, W, 3] -> stem.mp4 (H.264) and stem.gif; the prompt goes into the mp4's metadata."""
    written = []
    if kind in ("mp4", "both"):
        written.append(stem.with_suffix(".mp4"))
        with av.open(str(written[-1]), "w") as file:
            file.metadata["comment"] = prompt
            stream = file.add_stream("libx264", rate=max(1, round(fps)), options={"crf": "12"})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode())
    if kind in ("gif", "both"):
        written.append(stem.with_suffix(".gif"))
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(written[-1], save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return written


def load_model(o: InferOptions, config: WanConfig) -> list[torch.nn.Module]:
    """This rank's model chunks: the transformer of --checkpoint, else of --weights."""
    chunks = build(o, config)
    if o.checkpoint:
        checkpoint.load(checkpoint.find(o.checkpoint, str(o.checkpoint)), chunks)
    else:
        convert.fill(chunks, o, config)
    if o.adapter:
        convert.merge_into(chunks, o.adapter, config)
    return parallel.wrap(chunks, o, WanBlock) if o.fsdp else chunks


def main() -> None:
    o: InferOptions = parse("infer", sys.argv[1:])
    parallel.initialize(o)
    config, folder = model_config(o), o.weights
    chunks = load_model(o, config)
    lines, dp, me = requests(o, config), o.dp, mpu.get_data_parallel_rank()
    mine = list(range(me, len(lines), dp)) or [0]
    bucket = data.parse_buckets(o.video)[0]
    codec = VideoCodec(folder, device.current())
    encoder = TextEncoder(folder, device.current(), chunks[0].config.params_dtype, config.text_len)
    frames = FrameEncoder(folder, codec) if config.given_frames else None
    start = None
    if o.video_in:
        clip = torch.from_numpy(images.clip(o.video_in, bucket, o.fps, o.fit))  # [F, H, W, 3]
        start = codec.encode(clip.permute(3, 0, 1, 2)[None])
    empty = encoder.encode([o.negative])[0]
    o.out.mkdir(parents=True, exist_ok=True)
    for turn in range(-(-len(lines) // dp)):  # every rank does every turn: FSDP gathers in all of them
        i = mine[turn] if turn < len(mine) else mine[-1]
        latents = sample(
            chunks, o, config, encoder.encode([lines[i].prompt]), empty, latent_grid(bucket), [o.seed + i],
            sampler=o.sampler, shift=o.sample_shift, steps=o.sample_steps, cfg=o.cfg,
            condition=condition_on(frames, [lines[i]], bucket, o.fit), start=start, strength=o.strength,
        )  # fmt: skip
        if parallel.sample_group().rank() == 0 and turn < len(mine) and i % dp == me:
            video = codec.decode(latents)[0].permute(1, 2, 3, 0).numpy()
            for path in write_video(video, o.out / f"{i:04d}", o.fps or 16, o.format, lines[i].prompt):
                print(f"{path}  {lines[i].prompt!r}", flush=True)
    parallel.shutdown()


if __name__ == "__main__":
    cli.exit_on_bad_input(main)
