"""Benchmarks of this recipe on the machine it runs on, each against its peer in the same run.

    bash zoo/wan21/perf.sh                       all of them
    bash zoo/wan21/perf.sh --only step --size 1.3B
    bash zoo/wan21/perf.sh --record              and add the rows to perf.jsonl; needs a committed tree

step   a training step (forward, backward, clipping, optimizer) of this model through megatron-core, and of diffusers'
       WanTransformer3DModel with torch's fused AdamW. Both run plain and under torch.compile (--no-compiled-peer leaves
       that out; on several ranks only --compile compiles ours) on the same device, batch, weights and dtype: by turns
       on a CPU or on several ranks, one after another on one accelerator. Each row has its peak memory, which under
       torch.compile includes compiling. A contender that has another first loss, or does not fit, is refused. Rows
       published for the same workload are printed beside it: --size 1.3B and --size 14B run MindSpeed-MM's workloads,
       on any number of devices
run    the launcher as a user starts it: seconds to the first step and for --help; the share of a step spent waiting for
       videos that are really decoded; with cached latents, the share outside data, forward, backward and optimizer
generation
       sampling with each acceleration against a named baseline: seconds, and quality (perf_generation.py)
load   a released folder of constant 1.3B weights, loaded from disk into a model and converted to another folder: rates
       against reading and copying the same files, and memory beyond the model
decode frames per second of PyAV, and of decord if it is installed, at random places of a video

Each number is the median of its repeats, with the 10th and the 90th percentile. Repeats end early where they would take
longer than the time budget of common/bench.py.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.distributed as dist

from common import bench, checkpoint, device, perf
from common.bench import OURS, rounded
from common.diffusion.buckets import Bucket
from common.diffusion.videos import write_video
from common.video import decord_refusal, read_frames

from . import convert
from .config import SIZES, WanConfig, latent_grid, model_config
from .model import WanBlock, build, draw
from .options import HERE, PerfOptions, parse_buckets
from .perf_generation import generation
from .train import FlowMatching, forward_step


def main(o: PerfOptions) -> None:
    bench.report(rows(o), o.out, HERE / "perf.jsonl", o.record)


def rows(o: PerfOptions) -> Iterator[dict]:
    """Yields the rows of the chosen benchmarks as they come."""
    for name, benchmark in (
        ("step", step),
        ("generation", generation),
        ("run", run),
        ("load", load),
        ("decode", decode),
    ):
        if o.only in (name, "all") and (name in ("step", "generation") or dist.get_rank() == 0):
            yield from (facts(o) | row for row in benchmark(o))
        dist.barrier()


def facts(o: PerfOptions) -> dict:
    """Returns the fields that all rows of this call share."""
    return bench.facts(o, model=f"Wan2.1-{SIZES[o.size].task.upper()}", size=o.size, shape=o.buckets)


# -------------------------------------------------------------------------------------------------------------- step


def batch_of(o: PerfOptions, config: WanConfig) -> dict:
    """Draws a micro-batch of random latents [B, C, F, H, W] and text [B, T, D], and noises it as training does."""
    grid = latent_grid(parse_buckets(o.buckets)[0])
    where, generator = device.current(), torch.Generator().manual_seed(0)
    latents = torch.randn(o.micro_batch, config.out_dim, *grid, generator=generator).to(where)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[o.precision]
    text = torch.randn(o.micro_batch, config.text_len, config.text_dim, generator=generator).to(where, dtype)
    batch = FlowMatching(o).noised(latents, text, torch.zeros_like(text[0]), 0, range(o.micro_batch))
    if config.image_dim is not None:
        y = torch.randn(o.micro_batch, config.in_dim - config.out_dim, *grid, generator=generator)
        image = torch.randn(o.micro_batch, config.image_rows, config.image_dim, generator=generator)
        batch |= {"y": y.to(where), "image": image.to(where, dtype)}
    return batch


def draw_all(name: str, whole: torch.Tensor, generator: torch.Generator) -> None:
    """Draws the recipe's initial values, and noise where they are zero: with a zero head all models have the same
    loss."""
    draw(name, whole, generator)
    if not whole.any():
        whole.normal_(std=whole.shape[-1] ** -0.5, generator=generator)


def batches_of(o: PerfOptions, config: WanConfig) -> list[dict]:
    """Returns this rank's micro-batches of a step."""
    return [batch_of(o, config)] * o.micro_batches


def ours(o: PerfOptions, config: WanConfig) -> Callable[[list[dict]], list[dict]]:
    """Builds this model's training step."""
    tokens, split = config.tokens(latent_grid(parse_buckets(o.buckets)[0])), o.cp * (o.tp if o.sp else 1)
    length = (tokens // split + config.context_rows) * split
    return bench.own_step(o, build(o, config), draw_all, WanBlock, forward_step, length)


def peer(o: PerfOptions, config: WanConfig, compiled: bool) -> Callable[[], torch.Tensor]:
    """Builds diffusers' training step, with our weights."""
    values = {k: v for k, v in config.to_diffusers().items() if not k.startswith("_")}
    values["patch_size"] = tuple(values["patch_size"])
    with device.current():
        model = diffusers.WanTransformer3DModel(**values)
    parameters = dict(model.named_parameters())
    for name, shape in convert.shapes(config).items():
        whole = checkpoint.drawn(name, shape, o.seed, draw_all, device.current())
        parameters.pop(convert.to_diffusers(name)).data.copy_(whole)
    assert not parameters, f"not drawn: {', '.join(parameters)}"
    if o.recompute == "full":
        model.enable_gradient_checkpointing()
    batch = batch_of(o, config)
    x = torch.cat((batch["x"], batch["y"]), 1) if "y" in batch else batch["x"]

    def loss(forward: Callable) -> torch.Tensor:
        out = forward(x, batch["t"], batch["text"], batch.get("image"), return_dict=False)[0]
        error = (out.float() - batch["target"]).square().mean((1, 2, 3, 4))
        return (error * batch["weight"]).mean()

    return bench.peer_step(o, model, loss, compiled)


def workload(o: PerfOptions, config: WanConfig) -> bench.Workload:
    flops = config.flops(latent_grid(parse_buckets(o.buckets)[0]))
    return bench.Workload(library="diffusers", unit="SPS", units=1, digits=3, flops=flops)


def step(o: PerfOptions) -> Iterator[dict]:
    config = model_config(o)
    if config.image_dim is not None:  # diffusers always takes the last 512 rows of the context as text
        config = dataclasses.replace(config, text_len=512)
    described = workload(o, config)
    return bench.step(o, config, described, ours=ours, batches_of=batches_of, peer=peer, compiled=o.compiled_peer)


# --------------------------------------------------------------------------------------------------------------- run


STEPS = "30" if device.KIND == "cpu" else "12"  # of a run; those after the fifth count


def run(o: PerfOptions) -> list[dict]:
    launcher, firsts, runs = HERE / "pretrain_t2v.sh", [], []
    helps = bench.time_help(launcher)
    with tempfile.TemporaryDirectory() as folder:
        # Run 0 makes the demo data and fills the disk cache. Run 1 decodes. Run 2 reads the latents that run 1 cached.
        for i in range(3):
            options = ["--size", o.size, "--layout", o.layout, "--steps", STEPS if i else "1", "--save-every", "0"]
            options += ["--sample-steps", "1", "--cache", str(Path(folder) / ("cache" if i else "none"))]
            first, steady = bench.run_launcher(launcher, Path(folder) / f"run{i}", *options)
            firsts.append(first)
            runs.append(steady)
    _, decoded, cached = runs
    waits = [r["data_wait_ms"] / r["step_time_ms"] for r in decoded]
    encoding = [r["prepare_ms"] / r["step_time_ms"] for r in decoded]
    # prepare: reading the cached latents, drawing noise and timesteps
    overhead = [1 - (r["data_wait_ms"] + r["compute_ms"] - r["prepare_ms"]) / r["step_time_ms"] for r in cached]
    return [
        {"task": "launcher --help", "value": round(statistics.median(helps), 3), "unit": "s", "raw": rounded(perf.spread(helps))},
        {"task": "launcher to first step, warm", "value": round(firsts[1], 2), "unit": "s", "raw": {"cold": round(firsts[0], 2)}},
        {"task": "data wait, decoding every clip", "value": round(100 * statistics.median(waits), 3), "unit": "% of step",
         "raw": rounded(perf.spread(waits)) | {"of it encoding (VAE, text), not waiting": round(statistics.median(encoding), 4)}},
        {"task": "trainer overhead", "value": round(100 * statistics.median(overhead), 3), "unit": "% of step",
         "raw": rounded(perf.spread(overhead))},
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- load


def load(o: PerfOptions) -> list[dict]:
    config = SIZES["1.3B"]
    single = bench.unsplit(dataclasses.replace(o, size="1.3B", precision="bf16"))
    chunks = build(single, config, torch.device("cpu"))
    return bench.load(o, "1.3B", chunks, convert.table(config, diffusers=False))


def decode(o: PerfOptions) -> list[dict]:
    """Measures each decoder's frames per second on windows of 17 frames, at random places of a 10 s clip of 480x832."""
    bucket, frames = Bucket(17, 480, 832), 300
    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.default_rng(0).integers(0, 256, (frames // 10, 30, 52, 3), dtype=np.uint8)
        clip = np.stack([np.kron(noise[i // 10], np.ones((16, 16, 1), np.uint8)) for i in range(frames)])
        [path] = write_video(clip, Path(folder) / "clip", 30, "mp4")
        decoders = ["pyav"] + (["decord"] if find_spec("decord") and decord_refusal(path) is None else [])
        rates: dict[str, list[float]] = {name: [] for name in decoders}
        for start in np.random.default_rng(1).integers(0, 10 * 16 - bucket.frames, 20).tolist():
            for name, rate in rates.items():  # the decoders take turns
                start_time = time.perf_counter()
                read_frames(path, range(start, start + bucket.frames), fps=16.0, decoder=name)
                rate.append(bucket.frames / (time.perf_counter() - start_time))
    return [
        {"task": "decoding, random windows", "size": None, "layout": None, "precision": None, "shape": str(bucket),
         "system": f"{OURS}, {name} {version(name if name == 'decord' else 'av')}",
         "value": round(statistics.median(rate), 1), "unit": "frames/s", "raw": {"frames/s": rounded(perf.spread(rate))}}
        for name, rate in rates.items()
    ]  # fmt: skip
