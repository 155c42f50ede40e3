"""Peak memory of a training step on one rank, feature by feature: the second optimizer step of one row of tokens.

    .venv/bin/python -m zoo.qwen3.memory [--size 8B] [--seq-len 8192] [--record]      --record: into perf.jsonl

The other ranks of a layout are imaginary: nothing is sent, but everything that a rank holds is there. On cpu nothing is
computed either: tensors are fake, and the bytes of all storages alive are counted at every operation. That is the same
on every machine, and what torch allocates for the reference ops: not what a kernel keeps inside, nor fragmentation, nor
host copies; fused kernels save less (an output of attention and of the activation). Experts are computed, because how
many rows each gets is known only then. On cuda and npu it is the allocator's own peak.
"""

import argparse
import contextlib
import dataclasses
import datetime
import os
import shlex
import sys
import weakref
from collections.abc import Iterator
from unittest import mock

from common import device  # isort: skip  (before megatron)
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from common import cli, offload, ops, parallel, perf
from common import train as loop

from .config import SIZES, memory_estimate
from .model import Qwen3Block, build
from .options import HERE, TrainOptions, trained_parameters
from .train import forward_step, weighted

FEATURES = {  # name -> (ranks, options)
    "plain": (1, {}),
    "logits of all tokens at once": (1, {}),
    "recompute selective": (1, {"recompute": "selective"}),
    "recompute full": (1, {"recompute": "full"}),
    "offloaded activations": (1, {"offload_activations": True}),
    "bf16 moments": (1, {"moments": "bf16"}),
    "fsdp 2": (2, {"fsdp": True}),
    "tp 2, sequence parallel": (2, {"tp": 2, "sp": True}),
}


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


def measure(o: TrainOptions) -> tuple[int, int]:
    """(bytes at the peak of a step, bytes that stay between steps) of rank 0."""
    config, cpu = SIZES[o.size], device.KIND == "cpu"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=o.world)
    parallel.initialize(o)
    counting = counted(fake=not config.num_experts) if cpu else contextlib.nullcontext()

    def alike(out, mine, group=None):  # every rank says what this one does
        out[:] = [mine] * len(out)

    with mock.patch.object(dist, "all_gather_object", alike), counting as alive:
        chunks = build(o, config)
        for p in chunks[0].parameters():
            p.data.normal_(std=0.02)
        wrapped = parallel.wrap(chunks, o, Qwen3Block)
        optimizer = loop.build_optimizer(o, wrapped)
        wrapped[0].config.grad_scale_func = optimizer.scale_loss
        tokens = torch.zeros(o.seq_len, dtype=torch.int64, device=device.current())
        batch = {"tokens": tokens, "labels": tokens, "positions": tokens, "cu_seqlens": [0, o.seq_len], "rows": 1}
        for _ in range(2):
            if cpu:
                alive.peak = alive.bytes
            else:
                torch.cuda.reset_peak_memory_stats()
            get_forward_backward_func()(
                forward_step_func=forward_step, data_iterator=iter(weighted([batch], o.dp)), model=wrapped[0],
                num_microbatches=1, seq_length=o.seq_len, micro_batch_size=1,
            )  # fmt: skip
            optimizer.prepare_grads()
            optimizer.step_with_ready_grads()
            for each in (w for w in wrapped if hasattr(w, "zero_grad_buffer")):
                each.zero_grad_buffer()
            optimizer.zero_grad()
        found = (alive.peak, alive.bytes) if cpu else (torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated())
    parallel.shutdown()
    return found


def options(name: str, size: str, length: int, precision: str) -> TrainOptions:
    """Checked options of one micro-batch of one row."""
    ranks, layout = FEATURES[name]
    os.environ.update(WORLD_SIZE=str(ranks), RANK="0", LOCAL_RANK="0")
    values = {f.name: f.default for f in dataclasses.fields(TrainOptions)} | {"size": size, "seq_len": length} | layout
    o, config = TrainOptions(**values | {"precision": precision, "steps": 2, "lr": 1e-6}), SIZES[size]
    return cli.check_layout(o, heads=config.num_attention_heads, layers=config.num_hidden_layers, tokens=length)


def table(size: str, length: int, precision: str) -> Iterator[dict]:
    """A row of perf.jsonl for each feature."""
    for name, (ranks, _) in FEATURES.items():
        o = options(name, size, length, precision)
        with mock.patch.object(ops, "CHUNK", 2**62 if name.startswith("logits") else ops.CHUNK):
            peak, stays = measure(o)
        found = {
            "peak": peak,
            "between steps": stays,
            "estimate": memory_estimate(o, SIZES[size], length, trained_parameters(o, SIZES[size])),
        }
        gib = {key: round(value / 2**30, 2) for key, value in found.items()}
        yield {
            "source": "measured", "system": "this zoo", "model": "Qwen3", "task": "memory of a training step",
            "size": size, "hardware": "bytes counted" if device.KIND == "cpu" else device.name(), "devices": ranks,
            "layout": name, "precision": precision, "shape": length, "value": gib["peak"], "raw": gib, "mfu": None,
            "unit": f"peak GiB of a rank, {length} tokens", "commit": loop.commit(),
            "command": shlex.join(["python", "-m", __spec__.name, *sys.argv[1:]]), "date": datetime.date.today().isoformat(),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a training step on one rank, feature by feature.")
    parser.add_argument("--size", default="0.6B", choices=SIZES)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--record", action="store_true", help="add the rows to perf.jsonl; needs a committed tree")
    asked = parser.parse_args()
    rows = []
    for row in table(asked.size, asked.seq_len, asked.precision):
        print(f"{row['layout']:<30} {row['raw']} GiB", flush=True)
        rows.append(row)
    for row in rows if asked.record else ():  # at the end: a row in the record is an uncommitted change
        perf.append(HERE / "perf.jsonl", row)


if __name__ == "__main__":
    main()
