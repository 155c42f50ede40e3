"""Measures the peak memory of a training step on one rank, by feature or by named layout: the second optimizer step.

    .venv/bin/python -m zoo.wan21.memory [--size 14B] [--bucket 81x480x832] [--record]    --record: into perf.jsonl
    .venv/bin/python -m zoo.wan21.memory --layouts                every layout of parallel.toml, as --dry-run sees it

A step has one micro-batch, of one video per sample. common/memory.py says how memory is counted. The frozen VAE and
text encoder are not loaded.
"""

import argparse
import dataclasses
import functools
import re
import tomllib
from collections.abc import Iterator

from common import device  # isort: skip  (before megatron)
import torch

from common import cli, lora, memory
from common.diffusion.buckets import Bucket
from common.jobs import LORA_RANK

from . import model
from .config import SIZES, WanConfig, latent_grid, memory_estimate
from .model import WanBlock, build
from .options import HERE, TrainOptions, parse_buckets, trained_parameters
from .train import forward_step

FEATURES = {  # name -> (ranks, options)
    "plain": (1, {}),
    "recompute selective": (1, {"recompute": "selective"}),
    "recompute full": (1, {"recompute": "full"}),
    "offloaded activations": (1, {"offload_activations": True}),
    "bf16 moments": (1, {"moments": "bf16"}),
    "offloaded optimizer": (1, {"offload_optimizer": True}),
    "fsdp 2": (2, {"fsdp": True}),
    "tp 2, sequence parallel": (2, {"tp": 2, "sp": True}),
    "cp 2": (2, {"cp": 2}),
    "lora": (1, {"job": "lora", "lora_rank": LORA_RANK}),
    "lora, recompute full": (1, {"job": "lora", "lora_rank": LORA_RANK, "recompute": "full"}),
}


def steps(o: TrainOptions, config: WanConfig, bucket: Bucket) -> Iterator[list[dict]]:
    """Yields the micro-batches of each step: one micro-batch of one video per sample."""
    with device.current():
        B, grid, t = o.micro_batch, latent_grid(bucket), torch.zeros(o.micro_batch)
        video, text = torch.zeros(B, config.out_dim, *grid), torch.zeros(B, config.text_len, config.text_dim)
        batch = {"x": video, "target": video, "t": t, "weight": t, "text": text}
        if config.given_frames:
            batch["y"] = torch.zeros(B, config.in_dim - config.out_dim, *grid)
            batch["image"] = torch.zeros(B, config.image_rows, config.image_dim)
    while True:
        yield [batch]


def adapt(chunks: list[torch.nn.Module], o: TrainOptions) -> None:
    lora.add(chunks, o.lora_targets.split(","), rank=o.lora_rank, alpha=o.lora_alpha, seed=0)


def measure(o: TrainOptions, config: WanConfig, bucket: Bucket) -> tuple[int, int]:
    """Measures (bytes at the peak of a step, bytes that stay between steps) of rank 0."""
    split = o.cp * (o.tp if o.sp else 1)
    model._ROPE_CACHE.clear()  # tensors of another run are not valid in this one
    bytes_measured = memory.measure(
        o, functools.partial(build, o, config), WanBlock, forward_step, functools.partial(steps, o, config, bucket),
        (config.tokens(latent_grid(bucket)) // split + config.context_rows) * split,
        adapt=functools.partial(adapt, o=o) if o.adapts else None,
    )  # fmt: skip
    model._ROPE_CACHE.clear()
    return bytes_measured


def options(ranks: int, layout: dict, config: WanConfig, bucket: Bucket) -> TrainOptions:
    """Returns checked options of a run on so many ranks, for videos of this bucket."""
    o, tokens = memory.options(TrainOptions, ranks, **layout), config.tokens(latent_grid(bucket))
    return cli.check_layout(o, heads=config.num_heads, layers=config.num_layers, tokens=tokens)


def cases(asked: argparse.Namespace) -> Iterator[tuple[str, int, dict, str]]:
    """Yields (name, ranks, options, bucket) of each case to measure."""
    if not asked.layouts:
        for name, (ranks, layout) in FEATURES.items():
            yield name, ranks, layout | {"size": asked.size, "precision": asked.precision}, asked.bucket
        return
    fields = {f.name for f in dataclasses.fields(TrainOptions)}
    for name, values in tomllib.loads((HERE / "parallel.toml").read_text()).items():
        stated = re.search(r"(\d+) devices?\b", values["source"])  # if not stated: 8 with FSDP, else 1
        ranks = int(stated[1]) if stated else 8 if values.get("fsdp") else 1
        layout = {"precision": "bf16"} | {k: v for k, v in values.items() if k in fields}
        yield name, ranks, layout, values["buckets"].split(",")[0]


def row(name: str, ranks: int, layout: dict, shape: str) -> dict:
    """Measures one case and returns its row of perf.jsonl."""
    config, (bucket,) = SIZES[layout["size"]], parse_buckets(shape)
    o = options(ranks, layout, config, bucket)
    measured = measure(o, config, bucket)
    estimate = memory_estimate(o, config, config.tokens(latent_grid(bucket)), trained_parameters(o, config))
    model_name = f"Wan2.1-{config.task.upper()}"
    return memory.row(o, model=model_name, layout=name, shape=shape, sample=shape, measured=measured, estimate=estimate)


def main() -> None:
    description = "Peak memory of a training step on one rank."
    parser = memory.parser(SIZES, description, size="1.3B", bucket="81x480x832", precision="bf16")
    parser.add_argument("--layouts", action="store_true", help="the named layouts of parallel.toml instead")
    args = parser.parse_args()
    rows = (row(*case) for case in cases(args))
    memory.report(rows, "{size:<6} {layout:<30} {raw} GiB", HERE / "perf.jsonl" if args.record else None)


if __name__ == "__main__":
    main()
