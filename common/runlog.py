"""Writes the logs of a run: console lines, log.txt, config.toml, metrics.jsonl with its header, TensorBoard events."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import device, ops
from common.cli import TrainOptions, to_toml

# Options that say how the work is laid out. Runs that differ in one of them are not measured as one.
LAYOUT = ("layout", "tp", "sp", "pp", "vpp", "stages", "cp", "ulysses", "ep", "etp", "fsdp", "dp", "micro_batch",
          "global_batch", "recompute", "compile", "offload_activations", "fused_comm", "moments",
          "overlap_param_gather", "offload_optimizer", "master_remainders")  # fmt: skip


class Log:
    """Rank 0's log of a run: console, log.txt, metrics.jsonl, TensorBoard. It does nothing on other ranks."""

    def __init__(self, o: TrainOptions, header: dict, append: bool):
        self.main = dist.get_rank() == 0
        if not self.main:
            return
        o.out.mkdir(parents=True, exist_ok=True)
        self.text = open(o.out / "log.txt", "a")
        self.metrics = open(o.out / "metrics.jsonl", "a" if append else "w")
        write_config(o)
        self.record({"kind": "run", **header})
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(o.out / "tensorboard")

    def say(self, line: str) -> None:
        if self.main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
            self.text.write(line + "\n")
            self.text.flush()

    def record(self, row: dict) -> None:
        if self.main:
            self.metrics.write(json.dumps(row) + "\n")
            self.metrics.flush()

    def step(self, row: dict, o: TrainOptions, nan_steps: int) -> None:
        if not self.main:
            return
        self.record({"kind": "step", **row})
        for key, value in row.items():
            if isinstance(value, float):
                self.board.add_scalar(key, value, row["step"])
        if row["step"] % o.log_every == 0 or row["step"] == o.steps:
            self.say(console_line(row, o, nan_steps))


def write_config(o: TrainOptions) -> None:
    """Writes config.toml. That of an earlier call with other options is renamed to config.1.toml, config.2.toml, …"""
    path, text = o.out / "config.toml", to_toml(o)
    if path.is_file() and path.read_text() != text:
        earlier = len(list(o.out.glob("config.*.toml")))
        path.rename(o.out / f"config.{earlier + 1}.toml")
    path.write_text(text)


def console_line(row: dict, o: TrainOptions, nan_steps: int) -> str:
    """Formats the line that users' awk scripts read: field 5, split at ':', holds the step time in ms."""
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.3f}"
    return (
        f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration {row['step']:8d}/{o.steps:8d} |"
        f" consumed samples: {row['samples']:12d} |"
        f" elapsed time per iteration (ms): {row['step_time_ms']:.1f} | learning rate: {row['lr']:.3E} |"
        f" global batch size: {o.global_batch:5d} | loss: {row['loss']:.6E} | loss scale: 1.0 |"
        f" grad norm: {row['grad_norm']:.3f} | number of skipped iterations: {row['skipped']:3d} |"
        f" number of nan iterations: {nan_steps:3d} | samples/s: {row['samples_per_second']:.3f} |"
        f" tokens/s/device: {row['tokens_per_second_per_device']:.1f} |"
        f" TFLOP/s/device: {row['tflops_per_device']:.3f} | MFU: {mfu} | mem (GiB): {row['memory_gib']:.2f}"
    )


def run_header(
    o: TrainOptions, recipe: str, job: str, parameters: int, flops_per_sample: int, starts_from: str
) -> dict:
    """Returns the header row of metrics.jsonl."""
    import megatron.core

    return {
        "starts_from": starts_from,
        "command": os.environ.get("ZOO_COMMAND", " ".join(sys.argv)),
        "commit": commit(),
        "recipe": recipe,
        "job": job,
        "size": o.size,
        "layout": {name: getattr(o, name) for name in LAYOUT},
        "hardware": device.name(),
        "devices": o.world,
        "precision": o.precision,
        "attention": ops.attention_kernel(),
        "versions": {"torch": torch.__version__, "megatron-core": megatron.core.__version__},
        "model_parameters": parameters,
        "model_flops_per_sample": flops_per_sample,
    }


def commit() -> str:
    """Returns the commit of the checkout, with '-dirty' appended if tracked files differ; 'unknown' outside a checkout.
    The performance records may differ, because nothing that is measured reads them."""
    try:
        git = ["git", "-C", str(Path(__file__).parents[1])]
        revision = subprocess.check_output(
            [*git, "rev-parse", "--short=12", "HEAD"], stderr=subprocess.DEVNULL, text=True
        )
        changed = [*git, "status", "--porcelain", "-uno", "--", ".", ":(exclude)*perf.jsonl"]
        dirty = subprocess.check_output(changed, stderr=subprocess.DEVNULL, text=True)
        return revision.strip() + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
