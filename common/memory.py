"""Measures the peak memory of a training step on one rank, in the second optimizer step.

The other ranks of a layout are imaginary: nothing is sent, but this rank holds everything that it would hold in the
real job. On cpu nothing is computed either: tensors are fake, and the bytes of all live storages are counted at every
operation. The count is the same on every machine and equals what torch allocates for the reference ops. It leaves out
memory inside kernels, fragmentation and host copies. On cuda and npu the result is the allocator's own peak.
"""

import argparse
import contextlib
import dataclasses
import datetime
import os
import shlex
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar
from unittest import mock

from common import device  # isort: skip  (before megatron)
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from common import offload, ops, parallel, perf, runlog, train

Options = TypeVar("Options", bound=train.TrainOptions)


class Alive(TorchDispatchMode):
    """Counts the bytes of storages from the operation that creates them until they are freed."""

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

    def leave_out(self, host: torch.Tensor) -> None:
        """Counts no bytes of a storage in host memory, whatever views are taken of it."""
        storage = host.untyped_storage()
        weakref.finalize(storage, self._count, storage._cdata, 0, gone=True)
        self._count(storage._cdata, 0)

    def _count(self, address: int, size: int, gone: bool = False) -> None:
        self.bytes += size - self.known.get(address, 0)
        self.peak = max(self.peak, self.bytes)
        self.known[address] = size
        if gone:
            del self.known[address]

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        """Resize a storage and count its new size: FSDP empties and refills the storages of gathered weights."""
        _resize_(storage, size)
        if storage._cdata in self.known:
            self._count(storage._cdata, size)


_resize_, _to_host, _from_group = torch.UntypedStorage.resize_, offload.to_host, dist.DeviceMesh.from_group


@contextlib.contextmanager
def counted(fake: bool) -> Iterator[Alive]:
    """Context that counts the tensors created in it. With `fake`, they are fake tensors."""

    def mode():
        return FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()

    def to_host(flat):
        with _disable_current_modes(), mode():
            host = _to_host(flat)
        alive.leave_out(host)
        return host

    def from_group(*args, **kwargs):  # reads the ranks from a tensor, which must be real
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
    """Replaces megatron-core's `_coalescing_manager`, whose joint reduce-scatter does not take fake tensors."""

    def __init__(self, group, async_ops):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def wait(self):
        pass


def measure(
    o: train.TrainOptions,
    build: Callable[[], list[torch.nn.Module]],
    block: type,
    forward_step: Callable,
    steps: Callable[[], Iterator[list[dict]]],
    sequence_length: int,
    *,
    adapt: Callable[[list[torch.nn.Module]], None] | None = None,
    fake: bool = True,
) -> tuple[int, int]:
    """Return (bytes at the peak of a step, bytes that stay between steps) of rank 0.

    build: makes this rank's model chunks. adapt: adds adapters to them. steps: yields the micro-batches of each step.
    block, forward_step, sequence_length: as `parallel.wrap` and `train.forward` take them. fake=False computes on cpu too,
    for a model whose shapes depend on its values.
    """
    cpu = device.KIND == "cpu"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=o.world)
    parallel.initialize(o)
    counting = counted(fake) if cpu else contextlib.nullcontext()

    def alike(out, mine, group=None):  # every imaginary rank sends the same as this one
        out[:] = [mine] * len(out)

    one_by_one = mock.patch.object(param_and_grad_buffer, "_coalescing_manager", OneByOne)
    with mock.patch.object(dist, "all_gather_object", alike), one_by_one, counting as alive:
        chunks = build()
        for chunk in chunks:
            for p in chunk.parameters():
                p.data.normal_(std=0.02)
        if adapt:
            adapt(chunks)
        wrapped = parallel.wrap(chunks, o, block)
        optimizer = train.build_optimizer(o, wrapped)
        wrapped[0].config.grad_scale_func = optimizer.scale_loss
        batches = steps()
        for _ in range(2):
            if cpu:
                alive.peak = alive.bytes
            else:
                torch.cuda.reset_peak_memory_stats()
            train.forward(
                wrapped, forward_step, next(batches), micro_batch=o.micro_batch, sequence_length=sequence_length
            )
            optimizer.prepare_grads()
            optimizer.step_with_ready_grads()
            train.zero_gradients(wrapped, optimizer)
        sizes = (alive.peak, alive.bytes) if cpu else (torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated())
    parallel.shutdown()
    return sizes


def options(cls: type[Options], ranks: int, **values) -> Options:
    """Return rank 0's options of a run on this number of imaginary ranks. The caller still checks the layout."""
    os.environ.update(WORLD_SIZE=str(ranks), RANK="0", LOCAL_RANK="0")
    return cls(**{f.name: f.default for f in dataclasses.fields(cls)} | values | {"steps": 2, "lr": 1e-6})


def row(
    o: train.TrainOptions, *, model: str, layout: str, shape: int | str, sample: str, measured: tuple, estimate: float
) -> dict:
    """Return a row of perf.jsonl. measured: the result of `measure`. sample: what a rank's micro-batch holds, in
    words."""
    counts = {"peak": measured[0], "between steps": measured[1], "estimate": estimate}
    gib = {key: round(value / 2**30, 2) for key, value in counts.items()}
    return {
        "source": "measured", "system": "this zoo", "model": model, "task": "memory of a training step",
        "size": o.size, "hardware": "bytes counted" if device.KIND == "cpu" else device.name(), "devices": o.world,
        "layout": layout, "precision": o.precision, "shape": shape, "value": gib["peak"], "raw": gib, "mfu": None,
        "unit": f"peak GiB of a rank, {sample}", "commit": runlog.commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def parser(sizes: Iterable[str], description: str, **defaults: int | str) -> argparse.ArgumentParser:
    """Return the argument parser of a recipe's memory.py: --size, --precision, --record, and the options of the shape.
    Each keyword is an option's default."""
    made = argparse.ArgumentParser(description=description)
    choices = {"size": list(sizes), "precision": ("fp32", "bf16")}
    for name, default in defaults.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, choices=choices.get(name))
    made.add_argument("--record", action="store_true", help="add the rows to perf.jsonl; needs a committed tree")
    return made


def report(rows: Iterable[dict], line: str, record: Path | None) -> None:
    """Print each row, in the format `line`, as soon as it is measured. At the end add all to the record, if given."""
    measured = []
    for each in rows:
        print(line.format(**each), flush=True)
        measured.append(each)
    for each in measured if record else ():  # at the end: a call that fails records nothing
        perf.append(record, each)
