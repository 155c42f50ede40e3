"""What every data loader needs: reading videos and images, resize and crop, the drop report, seeded resumable sampling
by bucket, and worker processes that hand over one training step at a time.

    sampler = BucketSampler(bucket_of_row, global_batch=8, micro_batch=1, dp_rank=0, dp_size=4, seed=0)
    for step in prefetch(dataset, sampler, start_step=100, end_step=200, workers=4):
        train(step.micro_batches)

Importing this module does not import torch: data files and options are checked before it is loaded.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import processes

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


# ---- reading videos ----


class VideoError(Exception):
    """A file that cannot be decoded in full: missing, corrupt, truncated, or without a video stream."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)  # both in args, so that it survives pickling between processes
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class VideoInfo:
    """`frames` that a decoder will show, mean `fps` (0 for a still), height and width after the metadata's rotation."""

    frames: int
    fps: float
    height: int
    width: int


def probe_video(path: str | Path) -> VideoInfo:
    """Geometry and exact frame count from the container's index and one decoded frame; a still image has 1 frame.

    mp4, mov and avi carry an index, so the file is not read through; others (mkv, webm) are demuxed, not decoded.

    Raises:
        VideoError: missing, not a video, or truncated. Damage inside later frames shows only when they are read.
    """
    if Path(path).suffix.lower() in IMAGE_SUFFIXES:
        height, width, _ = _read_image(path).shape
        return VideoInfo(1, 0.0, height, width)
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError("no video stream")
            entries = list(stream.index_entries)
            if stream.frames and len(entries) == stream.frames:
                end, size = max(e.pos + e.size for e in entries), os.path.getsize(path)
                if end > size:
                    raise ValueError(f"truncated: {size} bytes, its index needs {end}")
                frames = sum(not e.is_discard for e in entries)
            else:
                frames = _count_packets(str(path), stream.index)
            stream.codec_context.thread_count = 1
            first, rate = next(container.decode(stream)), stream.average_rate or stream.guessed_rate
            if not frames or not rate or first.pts is None:
                raise ValueError(f"{frames} frames at {rate} fps, the first at time {first.pts}")
            height, width = (first.width, first.height) if first.rotation % 180 else (first.height, first.width)
            return VideoInfo(frames, float(rate), height, width)
    except Exception as error:  # PyAV raises its own errors, OSError, IndexError, StopIteration
        raise VideoError(path, f"{type(error).__name__}: {error}") from error


def _count_packets(path: str, index: int) -> int:
    import av

    frames, end = 0, 0.0
    with av.open(path) as container:
        for packet in container.demux():
            if packet.size:
                frames += packet.stream_index == index and not packet.is_discard
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        declared = (container.duration or 0) / 1e6
    if end < declared - max(1.0, 0.05 * declared):
        raise ValueError(f"truncated: {end:.1f} s of the declared {declared:.1f} s")
    return frames


def read_frames(
    path: str | Path, indices: Sequence[int], transform: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """Frames `indices` (any order, repeats allowed) as RGB uint8 [T, H, W, 3], upright.

    `transform` maps each [H, W, 3] frame as it is decoded, so that 81 frames of 4K (2 GB) never stand in memory.

    PyAV alone decodes, on every host the same pixels. decord, after a seek into an open group of pictures (x265's
    default), returns other frames than asked for; OpenCV skips damaged frames; neither says so.

    Raises:
        VideoError: not every frame asked for can be decoded.
    """
    info = probe_video(path)
    wanted, places = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
    if not len(wanted) or wanted[0] < 0 or wanted[-1] >= info.frames:
        raise VideoError(path, f"frames {list(indices)[:3]}… asked for, the file has {info.frames}")
    try:
        still = Path(path).suffix.lower() in IMAGE_SUFFIXES
        source = [_read_image(path)] if still else _decode(str(path), info.frames, wanted.tolist())
        return np.stack([transform(frame) if transform else frame for frame in source])[places]
    except Exception as error:
        raise VideoError(path, f"{type(error).__name__}: {error}") from error


def _decode(path: str, count: int, indices: list[int]) -> Iterator[np.ndarray]:
    """The frames of a sorted list of indices. One thread: DataLoader workers are the parallelism."""
    import av

    with av.open(path) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        shown = sorted(p.pts for p in container.demux(stream) if p.size and not p.is_discard)  # index -> timestamp
        if len(shown) != count:
            raise ValueError(f"{len(shown)} of {count} frames")
        # 16 frames early (the most that codecs reorder): frames leading the keyframe of an open GOP are lost by a seek
        container.seek(shown[max(0, indices[0] - 16)], stream=stream)
        frames = container.decode(stream)
        for index in indices:
            frame = next((f for f in frames if f.pts >= shown[index]), None)
            if frame is None or frame.is_corrupt or frame.pts != shown[index]:
                raise ValueError(f"frame {index} is damaged or missing")
            # the display matrix is left to us; its angle is counter-clockwise
            yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))


def _read_image(path: str | Path) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:
        raise VideoError(path, f"{type(error).__name__}: {error}") from error


def resize_crop(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [T, H, W, 3] -> [T, height, width, 3]: scaled to cover (area down, bicubic up), then centre-cropped."""
    import cv2

    cv2.setNumThreads(0)  # its thread pool does not survive the fork of a DataLoader worker
    old_height, old_width = frames.shape[1:3]
    scale = max(height / old_height, width / old_width)
    new_height, new_width = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    top, left = (new_height - height) // 2, (new_width - width) // 2
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    scaled = (cv2.resize(frame, (new_width, new_height), interpolation=how) for frame in frames)
    return np.stack([frame[top : top + height, left : left + width] for frame in scaled])


# ---- the drop report ----


class DropReport:
    """Rows left out, each with a reason. Nothing is dropped without being counted, named and written down."""

    def __init__(self) -> None:
        self.drops: list[dict[str, str]] = []

    def add(self, reason: str, where: str, detail: str = "") -> None:
        """`where` finds the row again: `data.jsonl:17` or a path."""
        detail = detail.encode(errors="replace").decode()  # a lone surrogate cannot be printed
        self.drops.append({"reason": reason, "where": where, "detail": detail})

    @property
    def counts(self) -> dict[str, int]:
        """Drops per reason, the most frequent first."""
        return dict(Counter(drop["reason"] for drop in self.drops).most_common())

    def __str__(self) -> str:
        first = {drop["reason"]: drop for drop in reversed(self.drops)}
        parts = [
            f"{count} {reason} (first: {' '.join(filter(None, (first[reason]['where'], first[reason]['detail'])))})"
            for reason, count in self.counts.items()
        ]
        return f"dropped {len(self.drops)} rows" + (": " + ", ".join(parts) if parts else "")

    def check(self, total: int, max_drop: float = 0.05) -> None:
        """Raises ValueError when more than the fraction `max_drop` of `total` rows was dropped, or no row is left."""
        dropped = len(self.drops)
        if total == 0 or dropped >= total or dropped > max_drop * total:
            raise ValueError(
                f"{self}, of {total}; expected at most {max_drop:.1%} and one row left; fix: these rows, or --max-drop"
            )

    def save(self, folder: str | Path) -> None:
        """Writes `drops.jsonl`: a summary line, then a line a drop."""
        summary = {"kind": "summary", "dropped": len(self.drops), "reasons": self.counts}
        write_lines(Path(folder) / "drops.jsonl", [summary, *({"kind": "drop", **drop} for drop in self.drops)])

    @staticmethod
    def append(folder: str | Path, reason: str, where: str, detail: str = "") -> None:
        """Adds one drop found while training; one short write, so that workers of many ranks may share the file."""
        line = json.dumps({"kind": "drop", "reason": reason, "where": where, "detail": detail})
        with open(Path(folder) / "drops.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")


def partial_name(path: Path) -> Path:
    """Where to write what is then renamed to `path`; no two hosts or containers that share the folder choose the same."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def write_lines(path: Path, records: Sequence[dict]) -> None:
    """Writes a jsonl file that is there whole or not at all."""
    partial = partial_name(path)
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    os.replace(partial, path)


# ---- sampling ----


class BucketSampler:
    """Which rows train in which step: a pure function of the step, so the number of finished steps is all its state.

    Every global batch comes from one bucket. The rows of a bucket form an endless stream of permutations, one after
    another, cut into global batches: rows that do not fill a batch open the bucket's next one, in the next epoch, and
    a bucket smaller than a batch wraps around. Over many epochs every row is seen equally often. Epoch e (N rows,
    bucket sizes n, global batch G) has sum of floor((e + 1) n / G) - floor(e n / G) steps, in shuffled bucket order.
    The rows of a step do not depend on `dp_size` and `micro_batch`; only who gets which does.
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
        """[steps of the epoch, 2]: bucket, and which batch of that bucket's stream."""
        size = self.global_batch
        spans = {b: np.arange(epoch * len(r) // size, (epoch + 1) * len(r) // size) for b, r in self._rows.items()}
        plan = np.concatenate([np.stack([np.full_like(span, b), span], axis=1) for b, span in spans.items()])
        return np.random.default_rng([self.seed, epoch]).permutation(plan) if self.shuffle else plan

    def _make_order(self, bucket: int, turn: int) -> np.ndarray:
        """The rows of a bucket in the order of its `turn`-th permutation."""
        rows = self._rows[bucket]
        return np.random.default_rng([self.seed, turn, bucket]).permutation(rows) if self.shuffle else rows

    def _steps_before(self, epoch: int) -> int:
        return sum(epoch * len(rows) // self.global_batch for rows in self._rows.values())

    def epoch(self, step: int) -> int:
        epoch = step * self.global_batch // self._total  # never too late, early by the remainders carried over
        while self._steps_before(epoch + 1) <= step:
            epoch += 1
        return epoch

    def batch(self, step: int) -> tuple[int, list[int]]:
        """Bucket and the row ids of the whole global batch of `step` (counted from 0)."""
        epoch = self.epoch(step)
        bucket, number = self._plan(epoch)[step - self._steps_before(epoch)].tolist()
        size = len(self._rows[bucket])
        places = range(number * self.global_batch, (number + 1) * self.global_batch)
        return bucket, [int(self._order(bucket, place // size)[place % size]) for place in places]

    def slots(self, micro: int) -> range:
        """Places in the global batch of this rank's micro-batch `micro`: seed per-sample noise with (step, place)."""
        start = (micro * self.dp_size + self.dp_rank) * self.micro_batch
        return range(start, start + self.micro_batch)

    def micro_batches(self, step: int) -> list[list[int]]:
        """Row ids of each micro-batch of this data-parallel rank."""
        rows = self.batch(step)[1]
        count = self.global_batch // (self.micro_batch * self.dp_size)
        return [[rows[place] for place in self.slots(micro)] for micro in range(count)]


# ---- loading ----


@dataclass(frozen=True)
class Step:
    """One step's data on this rank: `micro_batches[i]` is what the dataset made of micro-batch number `taken[i]`."""

    step: int
    bucket: int
    taken: list[int]
    micro_batches: list[Any]


class _MicroBatches:
    """Adapts `fetch` to DataLoader, whose index is here (rows, epoch), and names the rows when it fails."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, task: tuple[list[int], int]) -> Any:
        rows, epoch = task
        try:
            return self.dataset.fetch(rows, epoch)
        except Exception as error:
            files = ", ".join(self.dataset.where(row) for row in rows)
            raise RuntimeError(f"reading rows {rows} ({files}) failed: {type(error).__name__}: {error}") from error


def _start(worker: int) -> None:
    """What a decoding process does first. It ends with its rank. torchrun signals a rank's whole process group, though, and
    a decoding process that died of it would take the checkpoint along: so it has a group of its own."""
    processes.die_with(multiprocessing.parent_process().pid)
    os.setpgrp()


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
    """Steps start_step .. end_step - 1 in order, read `ahead` micro-batches per worker process in advance.

    The data do not depend on `workers` (0 reads in this process). The dataset has `fetch(rows, epoch)`, which makes a
    micro-batch, and `where(row)`, which names a row. `share=(i, n)` takes the micro-batches i, i + n, … only, for the
    n ranks of a model-parallel group that divide the work. A worker silent for `timeout` seconds is an error.
    """
    from torch import Generator
    from torch.utils.data import DataLoader

    taken = list(range(sampler.global_batch // (sampler.micro_batch * sampler.dp_size)))[share[0] :: share[1]]
    steps = range(start_step, end_step)
    shares = ((step, sampler.micro_batches(step)[share[0] :: share[1]]) for step in steps)
    tasks = ((rows, sampler.epoch(step)) for step, micro_batches in shares for rows in micro_batches)
    loader = iter(
        DataLoader(
            _MicroBatches(dataset),
            batch_size=None,
            sampler=tasks,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            timeout=timeout if workers else 0,
            worker_init_fn=_start,
            generator=Generator(),  # else it draws its base seed from the training's random state
        )
    )
    for step in steps:
        yield Step(step, sampler.batch(step)[0], taken, [next(loader) for _ in taken])
