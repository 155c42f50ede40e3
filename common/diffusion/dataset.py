"""Videos of the user's lists -> an index of buckets -> micro-batches.

A video is resampled to the training rate. The frame for a moment is the last one shown at or before it, so a lower rate
repeats frames and a variable one is followed. The centre window of the bucket's length is scaled to cover the bucket's
shape and centre-cropped. A still image is a video of one frame, an animated one (WebP, PNG, GIF) a video. A global batch
holds one bucket, so its shapes are equal on every rank.

The cost: the rest of a longer video is never seen (81 frames at 16 fps are 5.06 s). A 16:9 video in 832x480 loses 2.5 % of
its width. Step times differ by bucket. Rows that do not fill a batch wait for the next epoch.

Importing this module imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common import resume
from common.data import DropReport, check_drops, partial_name, write_lines
from common.video import VideoError, VideoInfo, decord_refusal, probe_video, read_frames, resampled_length, resize_crop

from .buckets import Bucket, choose_bucket, parse_buckets
from .lists import Row, read_pairs, read_rows

if TYPE_CHECKING:
    from torch import Tensor

MAX_REPLACED = 64  # undecodable videos in a row before it is the storage, not the videos


# ---- the index ----


@dataclass(frozen=True)
class IndexRow:
    """A video that passed the scan. `size` (bytes) and `mtime_ns` are as they were then; `frames`, `fps` and `duration` as
    in `VideoInfo`. `decoder`: which one reads it."""

    path: str
    caption: str
    where: str
    bucket: int
    frames: int
    fps: float
    size: int
    mtime_ns: int
    duration: float | None = None
    decoder: str = "pyav"


@dataclass(frozen=True)
class Index:
    """What a run trains on. A row's id is its place in `rows`. The index is kept in the run folder, so that a resumed run
    has the same ids whatever became of the files."""

    rows: list[IndexRow]
    buckets: list[Bucket]
    fps: float | None
    decoder: str = "pyav"
    list_content: str = ""  # of the list that was scanned

    def save(self, path: str | Path) -> None:
        head = {"kind": "index", "buckets": [str(bucket) for bucket in self.buckets], "fps": self.fps}
        head |= {"decoder": self.decoder, "list_content": self.list_content}
        write_lines(Path(path), [head, *map(asdict, self.rows)])

    @classmethod
    def load(cls, path: str | Path) -> Index:
        head, *rows = map(json.loads, Path(path).read_text(encoding="utf-8").split("\n")[:-1])
        buckets = parse_buckets(",".join(head["buckets"]), strides=None)
        decoder, content = head.get("decoder", "pyav"), head.get("list_content", "")
        return cls([IndexRow(**row) for row in rows], buckets, head["fps"], decoder, content)


def scan(
    rows: list[Row],
    buckets: list[Bucket],
    fps: float | None,
    report: DropReport,
    workers: int = 8,
    decoder: str = "pyav",
) -> Index:
    """Measure every file in `workers` threads and give it a bucket. The order of `rows` is kept.

    decoder: decord reads only the files that it reads right. How many others there are, and why, is printed.
    """
    from tqdm import tqdm

    def probe(row: Row) -> tuple[VideoInfo, os.stat_result, str | None] | Exception:
        try:
            stat = os.stat(row.path)
            return probe_video(row.path), stat, decord_refusal(row.path) if decoder == "decord" else None
        except (VideoError, OSError) as error:  # OSError: gone since the list was read
            return error

    kept, refused = [], DropReport()
    with ThreadPoolExecutor(workers) as pool:
        results = tqdm(pool.map(probe, rows), total=len(rows), desc="scanning videos", mininterval=1)
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, Exception):
                report.add("corrupt video", row.where, str(result))
                continue
            info, stat, refusal = result
            bucket = choose_bucket(info, buckets, fps)
            if isinstance(bucket, str):
                rate = f"{info.fps:.2f} fps" if info.duration is None else f"a variable rate in {info.duration:.2f} s"
                report.add(
                    bucket, row.where, f"{row.path}: {info.frames} frames at {rate} of {info.height}x{info.width}"
                )
                continue
            if refusal:
                refused.add(refusal, row.where, row.path)
            measured = {"frames": info.frames, "fps": info.fps, "duration": info.duration}
            facts = {"bucket": bucket, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            kept.append(IndexRow(**asdict(row), **facts, **measured, decoder="pyav" if refusal else decoder))
    if decoder == "decord":
        others = f", PyAV the others: {refused.reasons}" if refused.drops else ""
        print(f"decord reads {len(kept) - len(refused.drops)} of {len(kept)} videos{others}", flush=True)
    return Index(kept, list(buckets), fps, decoder)


def keep_pairs(index: Index, report: DropReport) -> Index:
    """Of the scanned rows of `read_pairs` the pairs both of whose videos go to one bucket, as two rows each."""
    places: dict[str, list[IndexRow]] = {}
    for row in index.rows:
        places.setdefault(row.where, []).append(row)
    kept = []
    for where, pair in places.items():
        if len(pair) < 2:  # the other one is in the report
            report.add("other of a pair dropped", where, pair[0].path)
        elif pair[0].bucket != pair[1].bucket:
            shapes = " and ".join(str(index.buckets[row.bucket]) for row in pair)
            for row in pair:
                report.add("pair of two buckets", where, f"{row.path}: {shapes}")
        else:
            kept += pair
    return dataclasses.replace(index, rows=kept)


def count_frames(index: Index, global_batch: int) -> str:
    """In words, by bucket: the frames that are trained on, of those that the videos have at the training rate."""
    lines, used, given = [], 0, 0
    for number, bucket in enumerate(index.buckets):
        rows = [row for row in index.rows if row.bucket == number]
        if rows:
            there = sum(resampled_length(row, index.fps) for row in rows)
            used, given = used + len(rows) * bucket.frames, given + there
            few = f"; fewer than a batch of {global_batch}, which repeats some" if len(rows) < global_batch else ""
            lines.append(f"  {bucket}: {len(rows)} videos, {len(rows) * bucket.frames} of {there} frames{few}")
    return "\n".join([f"buckets: {used} of {given} frames used ({used / given:.1%})", *lines])


def build_index(o, source: Path, buckets: list[Bucket], *, pairs: bool, name: str, drops: str) -> Index:
    """The index of the list `source` in the run folder. Rank 0 makes it once, then all ranks read it, also after a resume.

    It is made again if it is of another list, other buckets, another rate or decoder. (That a run with checkpoints goes on
    with the same ones is checked with the options.) With --features their index is copied instead. name, drops: the files
    in the run folder of the index and of the rows left out.
    """
    import torch.distributed as dist

    path = o.out / name
    if o.features:
        return _copy_index(o, path, drops)
    if dist.get_rank() == 0 and not _still_holds(path, source, buckets, o):
        rows, report = (read_pairs if pairs else read_rows)(source)
        index = scan(rows, buckets, o.fps or None, report, decoder=o.decoder)
        index = keep_pairs(index, report) if pairs else index
        o.out.mkdir(parents=True, exist_ok=True)
        report.save(o.out, drops)
        print(report, flush=True)
        report.check(len(index.rows) + sum(report.counts.values()), o.max_drop)
        print(count_frames(index, o.global_batch), flush=True)
        dataclasses.replace(index, list_content=resume.content([source])).save(path)
    dist.barrier()
    return Index.load(path)


def _copy_index(o, path: Path, drops: str) -> Index:
    """The index of a features folder. ValueError: the run folder's is of other data."""
    import torch.distributed as dist

    index = o.features / "index.jsonl"
    if path.is_file() and path.read_bytes() != index.read_bytes():
        raise ValueError(f"{path} is of other data than {index}; fix: --features, or another --out")
    dist.barrier()  # all have looked before one writes
    if dist.get_rank() == 0:
        o.out.mkdir(parents=True, exist_ok=True)
        shutil.copy(index, path)
        print(check_drops(o.features / drops, len(Index.load(index).rows), o.max_drop), flush=True)
    return Index.load(index)


def _still_holds(path: Path, source: Path, buckets: list[Bucket], o) -> bool:
    """Whether the index in a run folder is of the list, buckets, rate and decoder asked for now. Says so if it is not."""
    if not path.is_file():
        return False
    kept = Index.load(path)
    now = (resume.content([source]), buckets, o.fps or None, o.decoder)
    if now == (kept.list_content, kept.buckets, kept.fps, kept.decoder):
        return True
    print(f"{path} is of another list, --buckets, --fps or --decoder: scanning again", flush=True)
    return False


# ---- micro-batches ----


class VideoTextDataset:
    """Micro-batches of an index: decoded videos, or the cached tensors that the frozen encoders made of them."""

    def __init__(
        self, index: Index, *, cache_dir: str | Path | None = None, encoder: str = "", random_start: int | None = None
    ):
        """
        Args:
            encoder: names whatever decides the cached tensors besides the data (VAE, text encoder, precision).
            random_start: a seed. The window then starts at random by (seed, epoch, row), not in the centre.
        """
        if cache_dir is not None and random_start is not None:
            raise ValueError(
                "a cache and random starts; expected one of them, a cached video has one window; fix: --cache"
            )
        self.index, self.encoder, self.random_start = index, encoder, random_start
        self.cache_dir = cache_dir and Path(cache_dir)
        self._bucket_rows = rows_by_bucket(index)

    def __len__(self) -> int:
        return len(self.index.rows)

    def where(self, row: int) -> str:
        return self.index.rows[row].path

    def key(self, row: int) -> str:
        """Name of the row's cache entry. A file that is gone keeps the name of the scan: its cache entry still serves."""
        entry = self.index.rows[row]
        try:
            stat = os.stat(entry.path)
            state = (stat.st_size, stat.st_mtime_ns)
        except OSError:
            state = (entry.size, entry.mtime_ns)
        bucket = str(self.index.buckets[entry.bucket])
        parts = [entry.path, *state, entry.caption, bucket, self.index.fps, self.encoder, "frames by time"]
        parts += [entry.decoder] if entry.decoder != "pyav" else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def fetch(self, rows: Sequence[int], epoch: int = 0) -> dict[str, Any]:
        """A micro-batch of rows of one bucket.

        Returns `rows` (those really read), `captions`, `keys` (cache names, or None without a cache) and `dropped` (rows
        that could not be decoded: why). Beside them either `latents` fp32 [B, C, f, h, w], `text` [B, longest n, D] and
        whatever else was cached with them, or `pixels` uint8 [B, 3, F, H, W]; the others are None.

        Cached tensors are returned only if every row has them. Else all rows are decoded: then the same batch is always
        encoded together, and a resumed run gets the same bits.
        """
        from torch import from_numpy, stack
        from torch.nn.utils.rnn import pad_sequence

        keys = [self.key(row) for row in rows] if self.cache_dir else None
        cached = load_cached(self.cache_dir, keys) if keys else None
        batch = {"rows": list(rows), "keys": keys, "dropped": {}, "pixels": None, "latents": None, "text": None}
        if cached is not None:
            batch |= {name: stack([c[name] for c in cached]) for name in cached[0] if name != "text"}
            batch["text"] = pad_sequence([c["text"] for c in cached], batch_first=True)
        else:
            read = [self._read_or_next(row, epoch, batch["dropped"]) for row in rows]
            batch["rows"], pixels = map(list, zip(*read, strict=True))
            batch["pixels"] = from_numpy(np.stack(pixels)).permute(0, 4, 1, 2, 3).contiguous()  # -> B 3 F H W
            batch["keys"] = keys and [self.key(row) for row in batch["rows"]]
        return batch | {"captions": [self.index.rows[row].caption for row in batch["rows"]]}

    def _read_or_next(self, row: int, epoch: int, dropped: dict[int, str]) -> tuple[int, np.ndarray]:
        """The row, or the next of its bucket that can be decoded, and its pixels uint8 [F, H, W, 3]. Those that cannot be
        decoded are added to `dropped`."""
        same = self._bucket_rows[self.index.rows[row].bucket]
        start = bisect_left(same, row)
        for turn in range(min(len(same), MAX_REPLACED)):
            candidate = same[(start + turn) % len(same)]
            try:
                return candidate, self.read(candidate, epoch)
            except VideoError as error:
                dropped[candidate] = last = str(error)
        raise ValueError(
            f"{turn + 1} of the {len(same)} videos of bucket {self.index.buckets[self.index.rows[row].bucket]} fail one "
            f"after another, the last is {last}; expected readable files; fix: these files, then delete the run's index"
        )

    def read(self, row: int, epoch: int = 0) -> np.ndarray:
        """Pixels uint8 [F, H, W, 3] of a row's window. VideoError: it cannot be decoded."""
        entry = self.index.rows[row]
        bucket, fps = self.index.buckets[entry.bucket], self.index.fps
        spare = resampled_length(entry, fps) - bucket.frames
        start = spare // 2
        if self.random_start is not None:
            start = int(np.random.default_rng([self.random_start, epoch, row]).integers(spare + 1))
        window = range(start, start + bucket.frames)
        fit = functools.partial(resize_crop, height=bucket.height, width=bucket.width)
        return read_frames(entry.path, window, lambda frame: fit(frame[None])[0], fps, entry.decoder)

    def drops(self, dropped: dict[int, str]) -> list[dict]:
        """For `note_drops`: rows that could not be decoded, and why."""
        return [self._drop(row, "corrupt video (decode)", why) for row, why in dropped.items()]

    def _drop(self, row: int, reason: str, detail: str) -> dict:
        entry = self.index.rows[row]
        return {"reason": reason, "where": entry.where, "detail": detail, "file": entry.path}


class PairDataset(VideoTextDataset):
    """Micro-batches of pairs, of an index by `keep_pairs`: pair i is its rows 2i (chosen) and 2i + 1 (rejected)."""

    def __len__(self) -> int:
        return len(self.index.rows) // 2

    def where(self, pair: int) -> str:
        return self.index.rows[2 * pair].where

    def fetch(self, pairs: Sequence[int], epoch: int = 0) -> dict[str, Any]:
        """As `VideoTextDataset.fetch`: the chosen videos of all pairs, then the rejected ones. A pair that cannot be
        decoded is replaced by the next of its bucket."""
        dropped = {}
        for _ in range(MAX_REPLACED):
            wanted = [2 * pair for pair in pairs] + [2 * pair + 1 for pair in pairs]
            batch = super().fetch(wanted, epoch)
            dropped |= batch["dropped"]
            damaged = {row // 2 for row, read in zip(wanted, batch["rows"], strict=True) if row != read}
            if not damaged:
                return batch | {"dropped": dropped}
            pairs = [self._next(pair) if pair in damaged else pair for pair in pairs]
        raise ValueError(f"{MAX_REPLACED} pairs of {self.where(pairs[0])} on cannot be decoded; fix: these files")

    def drops(self, dropped: dict[int, str]) -> list[dict]:
        """As `VideoTextDataset.drops`, each with the other video of its pair."""
        others = [row ^ 1 for row in dropped if row ^ 1 not in dropped]
        lost = [self._drop(row, "other of a pair dropped", self.index.rows[row].path) for row in others]
        return super().drops(dropped) + lost

    def _next(self, pair: int) -> int:
        same = self._bucket_rows[self.index.rows[2 * pair].bucket]
        return same[(bisect_left(same, 2 * pair) + 2) % len(same)] // 2


def rows_by_bucket(index: Index) -> dict[int, list[int]]:
    """The row ids of each bucket, ascending."""
    rows: dict[int, list[int]] = {}
    for row, entry in enumerate(index.rows):
        rows.setdefault(entry.bucket, []).append(row)
    return rows


# ---- the cache ----


def store(
    cache_dir: str | Path, key: str, latents: Tensor, text: Tensor, condition: dict[str, Tensor] | None = None
) -> None:
    """Keep latents [C, f, h, w] and the tensors of a condition in fp32, and the text embedding [T, D] without its zero
    rows. The file appears under its name only when it is whole."""
    from safetensors.torch import save_file

    path = Path(cache_dir) / f"{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    named = {"latents": latents} | (condition or {})
    tensors = {name: value.float().cpu().contiguous() for name, value in named.items()}
    save_file(tensors | {"text": without_padding(text)}, partial)
    os.replace(partial, path)


def without_padding(text: Tensor) -> Tensor:
    """A text embedding [T, D] without its zero rows, on the CPU."""
    text = text.cpu()
    return text[: int(text.any(-1).sum())].clone()


def load_cached(cache_dir: Path, keys: Sequence[str]) -> list[dict[str, Tensor]] | None:
    """The stored tensors of all `keys`, or None if one is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    paths = [cache_dir / f"{key}.safetensors" for key in keys]
    try:
        return [load_file(path) for path in paths]
    except (OSError, SafetensorError):
        return None
