"""The shared parts of data loaders: seeded and resumable sampling by bucket, and worker processes that deliver one
training step at a time.

    sampler = BucketSampler(bucket_of_row, global_batch=8, micro_batch=1, dp_rank=0, dp_size=4, seed=0)
    for step in prefetch(dataset, sampler, start_step=100, end_step=200, workers=4):
        train(step.micro_batches)

Importing this module does not import torch, because data files and options are checked before torch is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common import processes

# ---- sampling ----


class BucketSampler:
    """Chooses the rows of each step. The choice is a pure function of the step, so the number of finished steps is the
    whole state.

    Every global batch comes from one bucket. The rows of a bucket form an endless stream of permutations, which is cut
    into global batches. Rows that do not fill a batch begin the bucket's next batch, in the next epoch. A bucket
    smaller than a batch repeats its rows. Over many epochs every row is seen equally often. Epoch e (bucket sizes n,
    global batch G) has the sum over buckets of floor((e + 1) n / G) - floor(e n / G) steps, in shuffled bucket order.
    The rows of a step do not depend on `dp_size` and `micro_batch`; only their distribution over ranks does.
    """

    def __init__(
        self,
        bucket_of_row: Sequence[int],
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool = True,
    ):
        if global_batch < 1 or micro_batch < 1 or global_batch % (micro_batch * dp_size):
            raise ValueError(
                f"global batch {global_batch} over {dp_size} data-parallel ranks of micro batch {micro_batch}; "
                f"expected a multiple of {micro_batch * dp_size}; fix: --global-batch or --micro-batch"
            )
        if not len(bucket_of_row):
            raise ValueError("no rows to sample; expected at least one; fix: --data")
        self.global_batch, self.micro_batch, self.dp_rank, self.dp_size = global_batch, micro_batch, dp_rank, dp_size
        self.seed, self.shuffle = seed, shuffle
        buckets = np.asarray(bucket_of_row)
        self._rows = {int(bucket): np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)}
        self._total = len(buckets)
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)
        self._order = functools.lru_cache(maxsize=2 * len(self._rows))(self._make_order)

    def _make_plan(self, epoch: int) -> np.ndarray:
        """Return the steps of an epoch, [steps, 2]: the bucket, and the index of the batch in the bucket's stream."""
        size = self.global_batch
        spans = {b: np.arange(epoch * len(r) // size, (epoch + 1) * len(r) // size) for b, r in self._rows.items()}
        plan = np.concatenate([np.stack([np.full_like(span, b), span], axis=1) for b, span in spans.items()])
        return np.random.default_rng([self.seed, epoch]).permutation(plan) if self.shuffle else plan

    def _make_order(self, bucket: int, turn: int) -> np.ndarray:
        """Return the rows of a bucket in the order of its `turn`-th permutation."""
        rows = self._rows[bucket]
        return np.random.default_rng([self.seed, turn, bucket]).permutation(rows) if self.shuffle else rows

    def _steps_before(self, epoch: int) -> int:
        return sum(epoch * len(rows) // self.global_batch for rows in self._rows.values())

    def epoch(self, step: int) -> int:
        epoch = step * self.global_batch // self._total  # a lower bound: rows carried over make epochs shorter
        while self._steps_before(epoch + 1) <= step:
            epoch += 1
        return epoch

    def batch(self, step: int) -> tuple[int, list[int]]:
        """Return the bucket and the row ids of the whole global batch of `step` (counted from 0)."""
        epoch = self.epoch(step)
        bucket, index = self._plan(epoch)[step - self._steps_before(epoch)].tolist()
        size = len(self._rows[bucket])
        places = range(index * self.global_batch, (index + 1) * self.global_batch)
        return bucket, [int(self._order(bucket, place // size)[place % size]) for place in places]

    def slots(self, micro: int) -> range:
        """Places of this rank's micro-batch `micro` in the global batch. Noise is seeded with (step, place)."""
        start = (micro * self.dp_size + self.dp_rank) * self.micro_batch
        return range(start, start + self.micro_batch)

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return the row ids of each micro-batch of this data-parallel rank."""
        rows = self.batch(step)[1]
        count = self.global_batch // (self.micro_batch * self.dp_size)
        return [[rows[place] for place in self.slots(micro)] for micro in range(count)]


# ---- loading ----


@dataclass(frozen=True)
class Step:
    """The data of one step on this rank: `micro_batches[i]` is the dataset's result for micro-batch `numbers[i]`."""

    step: int
    bucket: int
    numbers: list[int]
    micro_batches: list[Any]


class _MicroBatches:
    """Adapts a dataset's `fetch` to DataLoader, whose index is (rows, epoch) here. An error names the rows."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, task: tuple[list[int], int]) -> Any:
        rows, epoch = task
        try:
            return self.dataset.fetch(rows, epoch)
        except Exception as error:
            files = ", ".join(self.dataset.where(row) for row in rows)
            raise RuntimeError(f"reading rows {rows} ({files}) failed: {type(error).__name__}: {error}") from error


def start_decoding(worker: int) -> None:
    """Prepare a decoding process. It ends with its rank. It gets its own process group, because torchrun signals a
    rank's whole group, and a decoding process that dies of it would fail the rank before its checkpoint is written."""
    processes.die_with(multiprocessing.parent_process().pid)
    os.setpgrp()


@contextlib.contextmanager
def without_collecting_inherited() -> Iterator[None]:
    """Context in which forked processes never garbage-collect the objects that they inherit: destroying a scaler or
    codec would wait for its threads, which a fork does not copy."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def prefetch(
    dataset: Any,
    sampler: BucketSampler,
    start_step: int,
    end_step: int,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
    ahead: int = 2,
    timeout: float = 600,
) -> Iterator[Step]:
    """Yield the steps start_step .. end_step - 1 in order. Each worker process reads `ahead` micro-batches in advance.

    The data do not depend on `workers` (0 reads in this process). The dataset has `fetch(rows, epoch)`, which makes a
    micro-batch, and `where(row)`, which names a row. `share=(i, n)` takes only the micro-batches i, i + n, …, so that
    the n ranks of a model-parallel group divide the work. A worker silent for `timeout` seconds is an error.
    """
    from torch import Generator
    from torch.utils.data import DataLoader

    numbers = list(range(sampler.global_batch // (sampler.micro_batch * sampler.dp_size)))[share[0] :: share[1]]
    steps = range(start_step, end_step)
    shares = ((step, sampler.micro_batches(step)[share[0] :: share[1]]) for step in steps)
    tasks = ((rows, sampler.epoch(step)) for step, micro_batches in shares for rows in micro_batches)
    loader = DataLoader(
        _MicroBatches(dataset),
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        timeout=timeout if workers else 0,
        worker_init_fn=start_decoding,
        generator=Generator(),  # else DataLoader draws its base seed from the random state of training
    )
    with without_collecting_inherited():
        loader = iter(loader)
    for step in steps:
        yield Step(step, sampler.batch(step)[0], numbers, [next(loader) for _ in numbers])
