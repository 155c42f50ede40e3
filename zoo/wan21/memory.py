"""Peak memory of a training step on one rank, by feature and by named layout: the second optimizer step of one video.

    .venv/bin/python -m zoo.wan21.memory [--size 14B] [--bucket 81x480x832] [--record]    --record: into perf.jsonl
    .venv/bin/python -m zoo.wan21.memory --layouts                    every layout of parallel.toml, as --dry-run sees it

The other ranks of a layout are imaginary: nothing is sent, but everything that a rank holds is there. On cpu nothing is
computed either: tensors are fake, and the bytes of all storages alive are counted at every operation. That is the same
on every machine, and what torch allocates for the reference ops: not what a kernel keeps inside, nor fragmentation, nor
host copies, nor the frozen VAE and text encoder. On cuda and npu it is the allocator's own peak.
"""

import argparse
import contextlib
import dataclasses
import datetime
import os
import re
import shlex
import sys
import tomllib
import weakref
from collections.abc import Iterator
from unittest import mock

from common import device  # isort: skip  (before megatron)
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from common import cli, lora, offload, ops, parallel, perf
from common import train as loop
from common.diffusion.buckets import Bucket

from . import model
from .config import SIZES, WanConfig, latent_grid, memory_estimate
from .model import WanBlock, build
from .options import HERE, LORA_RANK, TrainOptions, parse_buckets, trained_parameters
from .train import forward_step

FEATURES = {  # name -> (ranks, options)
    "plain": (1, {}),
    "recompute selective": (1, {"recompute": "selective"}),
    "recompute full": (1, {"recompute": "full"}),
    "offloaded activations": (1, {"offload_activations": True}),
    "bf16 moments": (1, {"moments": "bf16"}),
    "fsdp 2": (2, {"fsdp": True}),
    "tp 2, sequence parallel": (2, {"tp": 2, "sp": True}),
    "cp 2": (2, {"cp": 2}),
    "lora": (1, {"job": "lora", "lora_rank": LORA_RANK}),
    "lora, recompute full": (1, {"job": "lora", "lora_rank": LORA_RANK, "recompute": "full"}),
}


# Copied from zoo.qwen3.memory.Alive
class Alive(TorchDispatchMode):
    """Counts the bytes of storages from the operation that makes them until they are freed."""

    def __init__(self):
        super().__init__()
        self.bytes, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for storage in (ops.local(t).untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if storage._cdata not in self.known:
                weakref.finalize(storage, self._count, storage._cdata, 0, gone=True)
                self._count(storage._cdata, storage.nbytes())
        return out

    def _count(self, address: int, size: int, gone: bool = False) -> None:
        self.bytes += size - self.known.get(address, 0)
        self.peak = max(self.peak, self.bytes)
        self.known[address] = size
        if gone:
            del self.known[address]

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        """FSDP empties and fills the storages of gathered weights."""
        _resize_(storage, size)
        if storage._cdata in self.known:
            self._count(storage._cdata, size)


_resize_, _to_host, _from_group = torch.UntypedStorage.resize_, offload.to_host, dist.DeviceMesh.from_group


# Copied from zoo.qwen3.memory.counted
@contextlib.contextmanager
def counted(fake: bool) -> Iterator[Alive]:
    """Tensors counted, and fake where asked for."""

    def mode():
        return FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()

    def to_host(flat):  # not counted
        with _disable_current_modes(), mode():
            return _to_host(flat)

    def from_group(*args, **kwargs):  # reads its ranks
        with unset_fake_temporarily():
            return _from_group(*args, **kwargs)

    with (
        mock.patch.object(offload, "to_host", to_host),
        mock.patch.object(dist.DeviceMesh, "from_group", from_group),
        mock.patch.object(torch.UntypedStorage, "resize_", lambda storage, size: alive.resized(storage, size)),
        mode(),
        Alive() as alive,
    ):
        yield alive


class OneByOne:
    """For megatron-core's `_coalescing_manager`: its joint reduce-scatter takes no fake tensors."""

    def __init__(self, group, async_ops):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def wait(self):
        pass


# Adapted from zoo.qwen3.memory.measure: a video instead of tokens, adapters, distributed optimizers of several ranks.
def measure(o: TrainOptions, config: WanConfig, bucket: Bucket) -> tuple[int, int]:
    """(bytes at the peak of a step, bytes that stay between steps) of rank 0."""
    cpu = device.KIND == "cpu"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=o.world)
    parallel.initialize(o)
    model._ROPE_CACHE.clear()  # what it holds of the run before is no tensor of this one
    counting = counted(fake=True) if cpu else contextlib.nullcontext()

    def alike(out, mine, group=None):  # every rank says what this one does
        out[:] = [mine] * len(out)

    several = mock.patch.object(param_and_grad_buffer, "_coalescing_manager", OneByOne)
    with mock.patch.object(dist, "all_gather_object", alike), several, counting as alive:
        chunks = build(o, config)
        for chunk in chunks:
            for p in chunk.parameters():
                p.data.normal_(std=0.02)
        if o.adapts:
            lora.add(chunks, o.lora_targets.split(","), rank=o.lora_rank, alpha=o.lora_alpha, seed=0)
        wrapped = parallel.wrap(chunks, o, WanBlock)
        optimizer = loop.build_optimizer(o, wrapped)
        wrapped[0].config.grad_scale_func = optimizer.scale_loss
        with device.current():
            B, grid, t = o.micro_batch, latent_grid(bucket), torch.zeros(o.micro_batch)
            video, text = torch.zeros(B, config.out_dim, *grid), torch.zeros(B, config.text_len, config.text_dim)
            batch = {"x": video, "target": video, "t": t, "weight": t, "text": text}
            if config.given_frames:
                batch["y"] = torch.zeros(B, config.in_dim - config.out_dim, *grid)
                batch["image"] = torch.zeros(B, config.image_rows, config.image_dim)
        split = o.cp * (o.tp if o.sp else 1)
        for _ in range(2):
            if cpu:
                alive.peak = alive.bytes
            else:
                torch.cuda.reset_peak_memory_stats()
            get_forward_backward_func()(
                forward_step_func=forward_step, data_iterator=iter([batch]), model=wrapped[0], num_microbatches=1,
                seq_length=(config.tokens(grid) // split + config.context_rows) * split, micro_batch_size=B,
            )  # fmt: skip
            optimizer.prepare_grads()
            optimizer.step_with_ready_grads()
            for each in (w for w in wrapped if hasattr(w, "zero_grad_buffer")):
                each.zero_grad_buffer()
            optimizer.zero_grad()
        found = (alive.peak, alive.bytes) if cpu else (torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated())
    parallel.shutdown()
    model._ROPE_CACHE.clear()
    return found


def options(ranks: int, layout: dict, config: WanConfig, bucket: Bucket) -> TrainOptions:
    """Checked options of one micro-batch of one video."""
    os.environ.update(WORLD_SIZE=str(ranks), RANK="0", LOCAL_RANK="0")
    values = {f.name: f.default for f in dataclasses.fields(TrainOptions)} | layout
    o = TrainOptions(**values | {"steps": 2, "lr": 1e-6})
    tokens = config.tokens(latent_grid(bucket))
    return cli.check_layout(o, heads=config.num_heads, layers=config.num_layers, tokens=tokens)


def cases(asked: argparse.Namespace) -> Iterator[tuple[str, int, dict, str]]:
    """(name, ranks, options, bucket) of each thing to measure."""
    if not asked.layouts:
        for name, (ranks, layout) in FEATURES.items():
            yield name, ranks, layout | {"size": asked.size, "precision": asked.precision}, asked.bucket
        return
    known = {f.name for f in dataclasses.fields(TrainOptions)}
    for name, named in tomllib.loads((HERE / "parallel.toml").read_text()).items():
        stated = re.search(r"(\d+) devices?\b", named["source"])  # else a node of 8 for what is sharded
        ranks = int(stated[1]) if stated else 8 if named.get("fsdp") else 1
        layout = {"precision": "bf16"} | {k: v for k, v in named.items() if k in known}
        yield name, ranks, layout, named["buckets"].split(",")[0]


def row(name: str, ranks: int, layout: dict, shape: str) -> dict:
    """A row of perf.jsonl."""
    config, (bucket,) = SIZES[layout["size"]], parse_buckets(shape)
    o = options(ranks, layout, config, bucket)
    peak, stays = measure(o, config, bucket)
    estimate = memory_estimate(o, config, config.tokens(latent_grid(bucket)), trained_parameters(o, config))
    gib = {k: round(v / 2**30, 2) for k, v in {"peak": peak, "between steps": stays, "estimate": estimate}.items()}
    return {
        "source": "measured", "system": "this zoo", "model": f"Wan2.1-{config.task.upper()}", "task": "memory of a training step",
        "size": o.size, "hardware": "bytes counted" if device.KIND == "cpu" else device.name(), "devices": ranks,
        "layout": name, "precision": o.precision, "shape": shape, "value": gib["peak"], "raw": gib, "mfu": None,
        "unit": f"peak GiB of a rank, {shape}", "commit": loop.commit(),
        "command": shlex.join(["python", "-m", __spec__.name, *sys.argv[1:]]), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a training step on one rank.")
    parser.add_argument("--size", default="1.3B", choices=SIZES)
    parser.add_argument("--bucket", default="81x480x832")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--layouts", action="store_true", help="the named layouts of parallel.toml instead")
    parser.add_argument("--record", action="store_true", help="add the rows to perf.jsonl; needs a committed tree")
    asked = parser.parse_args()
    rows = []
    for case in cases(asked):
        rows.append(row(*case))
        print(f"{rows[-1]['size']:<6} {rows[-1]['layout']:<30} {rows[-1]['raw']} GiB", flush=True)
    for each in rows if asked.record else ():  # at the end: a row in the record is an uncommitted change
        perf.append(HERE / "perf.jsonl", each)


if __name__ == "__main__":
    main()
