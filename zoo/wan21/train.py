"""Train Wan2.1 text-to-video and image-to-video: data, model, objective, loop.

    bash zoo/wan21/pretrain_t2v.sh                                                    # laptop: tiny model, demo clips
    bash zoo/wan21/pretrain_i2v.sh                                                    # the same, from a first frame
    NPROC=8 bash zoo/wan21/pretrain_t2v.sh --size 1.3B --weights Wan2.1-T2V-1.3B-Diffusers --data my.jsonl

Seeds from (seed, step, place in the global batch) draw noise, timesteps and caption dropout. So these do not depend on
the layout, and resuming needs no generator state.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import checkpoint, cli, lora, parallel, release, runlog
from common import train as loop
from common.data import Step
from common.diffusion import sampling
from common.diffusion.dataset import Index
from common.diffusion.preference import describe, held_out, with_reference
from common.diffusion.requests import Request, read_requests
from common.diffusion.videos import write_video
from common.margins import Margins

from . import convert, preference
from .config import WanConfig, latent_grid, model_config
from .data import Batches, build_index
from .demo.report import demo_rows, report_demo
from .infer import condition_on, sample
from .model import WanBlock, build, draw, velocity_tokens
from .options import HERE, TrainOptions, has_encoders, is_demo, run_facts, starts_from

SAMPLE_BATCH = 16
HELD_OUT = ("held-out.jsonl", "held-out-drops.jsonl")  # files of the index of --validation and of the rows left out

# ---- objective ----


def sigma(index: torch.Tensor, shift: float) -> torch.Tensor:
    """Noise level s of timestep index 0..999 (0: pure noise): s = shift u / (1 + (shift - 1) u), u = 1 - index/1000."""
    u = 1 - index.double() / 1000
    return (shift * u / (1 + (shift - 1) * u)).float()


def bell_weights(shift: float) -> torch.Tensor:
    """Returns the loss weights by timestep index [1000]: exp(-2 ((t - 500)/1000)^2) of the shifted t = 1000 s, minus
    the minimum, scaled to mean 1 (the convention of MindSpeed-MM and DiffSynth; the authors published none)."""
    t = 1000 * sigma(torch.arange(1000), shift).double()
    weight = torch.exp(-2 * ((t - 500) / 1000) ** 2)
    weight = weight - weight.min()
    return (weight * 1000 / weight.sum()).float()


class FlowMatching:
    """Rectified flow: x_s = (1 - s) x0 + s n. The model predicts n - x0."""

    def __init__(self, o: TrainOptions):
        self.o = o
        self.weights = bell_weights(o.shift) if o.weighting == "bell" else torch.ones(1000)

    def noised(
        self, latents: torch.Tensor, text: torch.Tensor, empty: torch.Tensor, step: int, slots: Sequence[int]
    ) -> dict:
        """Makes a training batch of latents fp32 [B, C, F, H, W] and text [B, T, D] at the places `slots` of the step's
        global batch: x and target [B, C, F, H, W], t and weight [B], and text, dropped captions being `empty`
        [T, D]."""
        noise, draws = torch.empty_like(latents), []
        for i, slot in enumerate(slots):
            generator = torch.Generator(latents.device).manual_seed(checkpoint.stable_seed(self.o.seed, step, slot))
            noise[i].normal_(generator=generator)
            # Drawn on the host, because reading numbers from the device would stall it. The hash is uniform below 2^63.
            draws.append(checkpoint.stable_seed(self.o.seed, step, slot, "host"))
        index = torch.tensor([draw % 1000 for draw in draws])
        dropped = torch.tensor([draw // 1000 < self.o.caption_dropout * 2**63 / 1000 for draw in draws]).to(text.device)
        if self.o.timesteps == "per-batch":  # as the reference does: one draw for the micro-batch
            index = index[:1].expand(len(index))
        s = sigma(index, self.o.shift).to(latents.device).view(-1, 1, 1, 1, 1)
        return {
            "x": (1 - s) * latents + s * noise,
            "target": noise - latents,
            "t": 1000 * s.flatten(),
            "weight": self.weights[index].to(latents.device),
            "text": torch.where(dropped.view(-1, 1, 1), empty, text),
        }


def forward_step(iterator: Iterator[dict], model: torch.nn.Module):
    """Runs one micro-batch through one model chunk. megatron-core's schedules require (output, loss function)."""
    batch = next(iterator)
    output = model(batch["x"], batch["t"], batch["text"], batch.get("y"), batch.get("image"))
    return output, lambda output: loss(output, batch, model)


def loss(output: torch.Tensor, batch: dict, model: torch.nn.Module) -> tuple[torch.Tensor, dict]:
    """Returns the weighted squared errors of this rank's tokens in fp32, summed and divided by the number of all
    tokens: the sum over the context (and, under sp, tensor) parallel ranks is the micro-batch's loss."""
    config = parallel.unwrapped(model)
    target = velocity_tokens(batch["target"], config.wan.patch_size)  # [L, B, C*patch]
    error = (output.float() - parallel.local_tokens(target, config.config)).square().mean(-1)  # [L(/tp), B]
    value = (error * batch["weight"]).sum() / (target.shape[0] * target.shape[1])
    return value, {"loss": value.detach().clone()}  # a copy, because the schedule scales `value` in place


# ---- adapters ----


def adapt(chunks: list[torch.nn.Module], o: TrainOptions, config: WanConfig) -> None:
    """Adds low-rank adapters to the model and freezes all other parameters."""
    if o.adapter:
        lora.load_adapter(convert.adapter(o.adapter, config)[0], chunks)
    else:
        kind = {"rank": o.lora_rank, "alpha": o.lora_alpha, "dropout": o.lora_dropout, "rslora": o.rslora}
        lora.add(chunks, o.lora_targets.split(","), **kind, seed=o.seed)


def write_adapter(o: TrainOptions, config: WanConfig, wrapped: list[torch.nn.Module]) -> None:
    """Writes the adapters as a folder for peft and diffusers and, with --merge, released weights with them added."""
    folder = o.export or o.out / "adapter"
    if dist.get_rank() == 0 and not o.export:
        shutil.rmtree(folder, ignore_errors=True)  # left by this run with fewer --steps
    lora.save_adapter(folder, wrapped, convert.to_diffusers, base=str(o.weights))
    if dist.get_rank() > 0:
        return
    convert.write_pipeline_file(folder)
    print(f"adapter     {folder}", flush=True)
    if o.merge:
        base = release.open_source(*convert.find_transformer(o.weights, config))
        merged = release.merge_adapter(base, *convert.adapter(folder, config))
        convert.write_released(o.merge, "diffusers", config, merged, o.weights)
        print(f"merged      {o.merge}", flush=True)


# ---- samples ----


def to_sample(o: TrainOptions, config: WanConfig, index: Index) -> list[Request]:
    """Returns what to sample at the end: --sample-prompts, or else captions of videos with, for image-to-video, their
    first (and last) frames."""
    if o.sample_prompts:
        return read_requests(o.sample_prompts, "--sample-prompts", config.given_frames)
    rows = demo_rows(o) if is_demo(o.data) else index.rows[:: 2 if o.job == "dpo" else 1][:4]
    return [Request(row.caption, *[Path(row.path)] * config.given_frames) for row in rows]


def sample_videos(
    o: TrainOptions, config: WanConfig, chunks, batches: Batches, requests: list[Request]
) -> list[np.ndarray]:
    """Samples a video uint8 [F, H, W, 3] for each request. Every rank gets all of them."""
    bucket, encoders, pieces = batches.index.buckets[0], batches.encoders, []
    for chunk in chunks:
        chunk.eval()  # switches off the adapters' dropout
    share = sampling.share_samples(requests, o.dp)
    for start in range(0, len(share), SAMPLE_BATCH):
        numbers, part = zip(*share[start : start + SAMPLE_BATCH], strict=True)
        seeds = [checkpoint.stable_seed(o.seed, number) for number in numbers]
        latents = sample(
            chunks, o, config, encoders.text.encode([r.prompt for r in part]), batches.empty, latent_grid(bucket), seeds,
            sampler="unipc", shift=o.sample_shift, steps=o.sample_steps, cfg=o.cfg,
            condition=condition_on(encoders.frames, part, bucket, "crop"),
        )  # fmt: skip
        pieces.append(encoders.codec.decode(latents))
    for chunk in chunks:
        chunk.train()
    return sampling.gather_samples(torch.cat(pieces), o, len(requests))


def finish(o: TrainOptions, config: WanConfig, chunks, batches: Batches, result: dict, before: list) -> None:
    """Samples the trained model. On the demo data, the judge scores the samples. before: samples without adapters, if
    adapters are trained on the demo data."""
    requests = to_sample(o, config, batches.index)
    if dist.get_rank() == 0:
        cli.say(f"sampling {len(requests)} videos")
    videos = sample_videos(o, config, chunks, batches, requests)
    if dist.get_rank() > 0:
        return
    folder, captions = o.out / "samples", [request.prompt for request in requests]
    folder.mkdir(exist_ok=True)
    for i, (video, caption) in enumerate(zip(videos[:8], captions, strict=False)):
        write_video(video, folder / f"{i:04d}", o.fps or 16, "gif", {"prompt": caption})
    if is_demo(o.data) and not o.sample_prompts:
        report_demo(o, videos, captions, result["steps"], before)
    else:
        print(f"run folder  {o.out}\nloss curve  {o.out / 'loss.png'}\nsamples     {folder}", flush=True)


def command_that_samples(o: TrainOptions, config: WanConfig, checkpoint: Path) -> str:
    """Returns the shell command that samples with the weights or adapters of this run."""
    launcher = f"bash zoo/{HERE.name}/infer_{'i2v' if config.given_frames else 't2v'}.sh"
    args = f"--weights {o.export}" if o.export else f"--checkpoint {checkpoint}"
    if o.adapts:
        args = f"--weights {o.merge}" if o.merge else f"--weights {o.weights} --adapter {o.export or o.out / 'adapter'}"
    pictures = "".join([" --image PICTURE", " --last-image PICTURE"][: config.given_frames])
    return f"{launcher} {args} --video {o.buckets.split(',')[0]}{pictures} --prompt TEXT"


# ---- main ----


def main(o: TrainOptions) -> None:
    config = model_config(o)
    index = build_index(o, o.data)
    o = loop.count_epochs(o, len(index.rows))
    chunks = build(o, config)
    convert.fill(chunks, o, config, draw)
    if o.adapts:
        adapt(chunks, o, config)
    wrapped = parallel.wrap(chunks, o, WanBlock)

    def flops(grid: tuple[int, int, int]) -> int:  # dpo adds the reference's forward, a third of a step
        return config.flops(grid, frozen=o.adapts) + (config.flops(grid) // 3 if o.job == "dpo" else 0)

    def samples(batch: list[dict]) -> tuple[int, int]:
        grid = tuple(batch[0]["x"].shape[2:])
        return config.tokens(grid), flops(grid)

    def sequence_length(batch: list[dict]) -> int:
        """Returns the rows of the pipeline tensor, times cp (and tp), by which megatron-core divides."""
        split = o.cp * (o.tp if o.sp else 1)
        return (samples(batch)[0] // split + config.context_rows) * split

    grid = latent_grid(index.buckets[0])
    header = runlog.run_header(o, HERE.name, o.job, config.parameters, flops(grid), starts_from(o))
    flow = FlowMatching(o)
    batches = Batches(o, config, index, flow)
    # The demo's adapters learn to blink: samples of the base model show that it does not.
    blinking = o.adapts and is_demo(o.data) and not o.sample_prompts
    before = sample_videos(o, config, wrapped, batches, to_sample(o, config, index)) if blinking else []
    step, prepare, margins = forward_step, batches.prepare, None
    if o.job == "dpo":
        reference, margins = preference.reference_model(o, config, wrapped), Margins()
        measure = functools.partial(preference.measure, o, sequence_length)
        step = functools.partial(preference.forward_step, o, margins)

        def prepare(loaded: Step) -> list[dict]:
            return with_reference(reference, measure, batches.prepare(loaded))

    if dist.get_rank() == 0:
        cli.say("first step: loads the encoders and encodes its videos, which takes longer than the steps after it")
    result = loop.train(
        o,
        wrapped,
        step,
        batches,
        prepare,
        sequence_length=sequence_length,
        samples=samples,
        header=header,
        state={"model": dataclasses.asdict(config), "start": run_facts(o, config)},
        ema_decay=o.ema,
        measure=margins,
    )
    finished = result["reason"] == "finished"
    if finished and result["ema"]:  # samples and adapters use the averaged weights
        with torch.no_grad():
            for name, parameter in checkpoint.trained(wrapped):
                parameter.copy_(result["ema"][name])
    if finished and has_encoders(o.weights, config):
        finish(o, config, wrapped, batches, result, before)
    elif finished and dist.get_rank() == 0:
        print(f"note: no samples: {o.weights} has no VAE and text encoder; see infer_t2v.sh", flush=True)
    if finished and o.job == "dpo" and o.validation:
        pairs = Batches(o, config, build_index(o, o.validation, *HELD_OUT), flow, HELD_OUT[1])
        comparison = held_out(o, pairs, wrapped, reference, measure)
        if dist.get_rank() == 0:
            (o.out / "held-out.json").write_text(json.dumps(comparison, indent=2))
            print(describe(comparison), flush=True)
    if finished and o.adapts:
        write_adapter(o, config, wrapped)
    elif finished and o.export and (saved := loop.last_checkpoint(o, result)) and dist.get_rank() == 0:
        source = release.open_source(saved, convert.table(config, True), ema=bool(o.ema))
        convert.write_released(o.export, "diffusers", config, source, o.weights)
        print(f"exported {o.export}", flush=True)
    usable = not o.from_scratch if o.adapts else o.export or result["checkpoint"]  # initial weights are not stored
    if finished and usable and dist.get_rank() == 0:
        print(f"try it      {command_that_samples(o, config, result['checkpoint'])}", flush=True)
    elif not finished and dist.get_rank() == 0:
        print(
            f"no samples  stopped at step {result['steps']} ({result['reason']}); the same command goes on", flush=True
        )
    dist.barrier()
