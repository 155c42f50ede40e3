"""Turns the videos of the user's lists into an index of buckets, and the index into micro-batches.

A video is resampled to the training rate. The frame for a moment is the last one shown at or before it, so a video of a
lower rate repeats frames, and a variable rate is followed. The centre window of the bucket's length is scaled to cover
the bucket's shape and centre-cropped. A still image is a video of one frame, an animated image (WebP, PNG, GIF) is a
video. A global batch holds one bucket, so its shapes are equal on every rank.

The cost: frames outside the window are not used (81 frames at 16 fps are 5.06 s). A 16:9 video in 832x480 loses 2.5 %
of its width. Step times differ by bucket. Rows that do not fill a batch wait for the next epoch.

Importing this module does not import torch.
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

from common import jsonl, resume
from common.drops import DropReport, check_drops
from common.video import VideoError, VideoInfo, decord_refusal, probe_video, read_frames, resampled_length, resize_crop

from .buckets import Bucket, choose_bucket, parse_buckets
from .lists import Row, read_pairs, read_rows

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MAX_REPLACED = 64  # so many undecodable videos in a row mean that the storage is at fault


# ---- the index ----


@dataclass(frozen=True)
class IndexRow:
    """A video that passed the scan. `size` (bytes) and `mtime_ns` are those at the scan. `frames`, `fps` and `duration`
    are as in `VideoInfo`. `decoder` names the decoder that reads it."""

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
    """The videos that a run trains on. A row's id is its place in `rows`. The run folder keeps the index, so that a
    resumed run has the same ids even if files have changed."""

    rows: list[IndexRow]
    buckets: list[Bucket]
    fps: float | None
    decoder: str = "pyav"
    list_content: str = ""  # `resume.content_hash` of the list that was scanned

    def save(self, path: str | Path) -> None:
        head = {"kind": "index", "buckets": [str(bucket) for bucket in self.buckets], "fps": self.fps}
        head |= {"decoder": self.decoder, "list_content": self.list_content}
        jsonl.write(Path(path), [head, *map(asdict, self.rows)])

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
    """Measures every file in `workers` threads and gives it a bucket. The order of `rows` is kept.

    decoder: "decord" reads only the files that it reads right. The number of the others, and the reasons, are printed.
    """
    from tqdm import tqdm

    def probe(row: Row) -> tuple[VideoInfo, os.stat_result, str | None] | Exception:
        try:
            stat = os.stat(row.path)
            return probe_video(row.path), stat, decord_refusal(row.path) if decoder == "decord" else None
        except (VideoError, OSError) as error:  # OSError: the file was removed after the list was read
            return error

    scanned, refused = [], DropReport()
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
            scanned.append(IndexRow(**asdict(row), **facts, **measured, decoder="pyav" if refusal else decoder))
    if decoder == "decord":
        others = f", PyAV the others: {refused.reasons}" if refused.drops else ""
        print(f"decord reads {len(scanned) - len(refused.drops)} of {len(scanned)} videos{others}", flush=True)
    return Index(scanned, list(buckets), fps, decoder)


def keep_pairs(index: Index, report: DropReport) -> Index:
    """Keeps the pairs whose videos both go to one bucket, as two rows each, from the scanned rows of `read_pairs`."""
    places: dict[str, list[IndexRow]] = {}
    for row in index.rows:
        places.setdefault(row.where, []).append(row)
    rows = []
    for where, pair in places.items():
        if len(pair) < 2:  # the report has the other one already
            report.add("other of a pair dropped", where, pair[0].path)
        elif pair[0].bucket != pair[1].bucket:
            shapes = " and ".join(str(index.buckets[row.bucket]) for row in pair)
            for row in pair:
                report.add("pair of two buckets", where, f"{row.path}: {shapes}")
        else:
            rows += pair
    return dataclasses.replace(index, rows=rows)


def count_frames(index: Index, global_batch: int) -> str:
    """Describes, by bucket, how many of the frames that the videos have at the training rate are trained on."""
    lines, used, total = [], 0, 0
    for number, bucket in enumerate(index.buckets):
        rows = [row for row in index.rows if row.bucket == number]
        if rows:
            available = sum(resampled_length(row, index.fps) for row in rows)
            used, total = used + len(rows) * bucket.frames, total + available
            note = f"; fewer than a batch of {global_batch}, which repeats some" if len(rows) < global_batch else ""
            lines.append(f"  {bucket}: {len(rows)} videos, {len(rows) * bucket.frames} of {available} frames{note}")
    return "\n".join([f"buckets: {used} of {total} frames used ({used / total:.1%})", *lines])


def build_index(o, source: Path, buckets: list[Bucket], *, pairs: bool, name: str, drops: str) -> Index:
    """Returns the run folder's index of the list `source`. Rank 0 makes it once; all ranks read it, after a resume too.

    It is made again if the list, the buckets, the rate or the decoder differ. (The checks of the options make sure that
    a run with checkpoints continues with the same ones.) With --features, the index of that folder is copied instead.
    name, drops: the files in the run folder for the index and for the rows left out.
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
        dataclasses.replace(index, list_content=resume.content_hash([source])).save(path)
    dist.barrier()
    return Index.load(path)


def _copy_index(o, path: Path, drops: str) -> Index:
    """Copies the index of a features folder to `path` and returns it. Raises ValueError if `path` is of other data."""
    import torch.distributed as dist

    index = o.features / "index.jsonl"
    if path.is_file() and path.read_bytes() != index.read_bytes():
        raise ValueError(f"{path} is of other data than {index}; fix: --features, or another --out")
    dist.barrier()  # every rank looks before rank 0 writes
    if dist.get_rank() == 0:
        o.out.mkdir(parents=True, exist_ok=True)
        shutil.copy(index, path)
        print(check_drops(o.features / drops, len(Index.load(index).rows), o.max_drop), flush=True)
    return Index.load(index)


def _still_holds(path: Path, source: Path, buckets: list[Bucket], o) -> bool:
    """Returns whether the index in a run folder has the options' list, buckets, rate and decoder. Prints if not."""
    if not path.is_file():
        return False
    saved = Index.load(path)
    requested = (resume.content_hash([source]), buckets, o.fps or None, o.decoder)
    if requested == (saved.list_content, saved.buckets, saved.fps, saved.decoder):
        return True
    print(f"{path} is of another list, --buckets, --fps or --decoder: scanning again", flush=True)
    return False


# ---- micro-batches ----


class VideoTextDataset:
    """Micro-batches of an index: decoded videos, or cached tensors that the frozen encoders made of them."""

    def __init__(
        self, index: Index, *, cache_dir: str | Path | None = None, encoder: str = "", random_start: int | None = None
    ):
        """
        Args:
            encoder: names everything that decides the cached tensors besides the data (VAE, text encoder, precision).
            random_start: a seed. The window then starts at a place drawn by (seed, epoch, row), not in the centre.
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
        """Returns the name of the row's cache entry. A file that is gone keeps its name: the entry still serves."""
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
        """Returns a micro-batch of rows of one bucket.

        It has `rows` (those really read), `captions`, `keys` (cache names, or None without a cache) and `dropped` (rows
        that could not be decoded -> the reason). It also has either `latents` fp32 [B, C, f, h, w],
        `text` [B, longest n, D] and whatever else was cached with them, or `pixels` uint8 [B, 3, F, H, W]. Others
        are None.

        Cached tensors are returned only if every row has them. Otherwise all rows are decoded, so that the same batch
        is always encoded together and a resumed run gets the same bits.
        """
        import numpy as np
        from torch import from_numpy, stack
        from torch.nn.utils.rnn import pad_sequence

        keys = [self.key(row) for row in rows] if self.cache_dir else None
        cached = load_cached(self.cache_dir, keys) if keys else None
        batch = {"rows": list(rows), "keys": keys, "dropped": {}, "pixels": None, "latents": None, "text": None}
        if cached is not None:
            batch |= {name: stack([c[name] for c in cached]) for name in cached[0] if name != "text"}
            batch["text"] = pad_sequence([c["text"] for c in cached], batch_first=True)
        else:
            decoded = [self._read_or_next(row, epoch, batch["dropped"]) for row in rows]
            batch["rows"], pixels = map(list, zip(*decoded, strict=True))
            batch["pixels"] = from_numpy(np.stack(pixels)).permute(0, 4, 1, 2, 3).contiguous()  # -> B 3 F H W
            batch["keys"] = keys and [self.key(row) for row in batch["rows"]]
        return batch | {"captions": [self.index.rows[row].caption for row in batch["rows"]]}

    def _read_or_next(self, row: int, epoch: int, dropped: dict[int, str]) -> tuple[int, np.ndarray]:
        """Returns the row, or the next of its bucket that can be decoded, and its pixels uint8 [F, H, W, 3]. Adds the
        rows that cannot be decoded to `dropped`."""
        rows = self._bucket_rows[self.index.rows[row].bucket]
        start = bisect_left(rows, row)
        for turn in range(min(len(rows), MAX_REPLACED)):
            candidate = rows[(start + turn) % len(rows)]
            try:
                return candidate, self.read(candidate, epoch)
            except VideoError as error:
                dropped[candidate] = last = str(error)
        raise ValueError(
            f"{turn + 1} of the {len(rows)} videos of bucket {self.index.buckets[self.index.rows[row].bucket]} fail one "
            f"after another, the last is {last}; expected readable files; fix: these files, then delete the run's index"
        )

    def read(self, row: int, epoch: int = 0) -> np.ndarray:
        """Returns pixels uint8 [F, H, W, 3] of a row's window. Raises VideoError if it cannot be decoded."""
        import numpy as np

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
        """Returns the rows that could not be decoded, with the reasons, in the form that `note_drops` takes."""
        return [self._drop(row, "corrupt video (decode)", why) for row, why in dropped.items()]

    def _drop(self, row: int, reason: str, detail: str) -> dict:
        entry = self.index.rows[row]
        return {"reason": reason, "where": entry.where, "detail": detail, "file": entry.path}


class PairDataset(VideoTextDataset):
    """Micro-batches of pairs from an index of `keep_pairs`: pair i is its rows 2i (chosen) and 2i + 1 (rejected)."""

    def __len__(self) -> int:
        return len(self.index.rows) // 2

    def where(self, pair: int) -> str:
        return self.index.rows[2 * pair].where

    def fetch(self, pairs: Sequence[int], epoch: int = 0) -> dict[str, Any]:
        """Works like `VideoTextDataset.fetch`; the chosen videos of all pairs come first, then the rejected ones. A
        pair that cannot be decoded is replaced by the next of its bucket."""
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
        """Works like `VideoTextDataset.drops`, and adds the other video of each pair."""
        others = [row ^ 1 for row in dropped if row ^ 1 not in dropped]
        lost = [self._drop(row, "other of a pair dropped", self.index.rows[row].path) for row in others]
        return super().drops(dropped) + lost

    def _next(self, pair: int) -> int:
        rows = self._bucket_rows[self.index.rows[2 * pair].bucket]
        return rows[(bisect_left(rows, 2 * pair) + 2) % len(rows)] // 2


def rows_by_bucket(index: Index) -> dict[int, list[int]]:
    """Returns the row ids of each bucket, ascending."""
    rows: dict[int, list[int]] = {}
    for row, entry in enumerate(index.rows):
        rows.setdefault(entry.bucket, []).append(row)
    return rows


# ---- the cache ----


def store(
    cache_dir: str | Path, key: str, latents: Tensor, text: Tensor, condition: dict[str, Tensor] | None = None
) -> None:
    """Writes latents [C, f, h, w] and the tensors of a condition in fp32, and the text embedding [T, D] without its
    zero rows. The file appears under its name only when it is complete."""
    from safetensors.torch import save_file

    path = Path(cache_dir) / f"{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = jsonl.partial_name(path)
    named = {"latents": latents} | (condition or {})
    tensors = {name: value.float().cpu().contiguous() for name, value in named.items()}
    save_file(tensors | {"text": without_padding(text)}, partial)
    os.replace(partial, path)


def without_padding(text: Tensor) -> Tensor:
    """Returns a text embedding [T, D] without its zero rows, on the CPU."""
    text = text.cpu()
    return text[: int(text.any(-1).sum())].clone()


def load_cached(cache_dir: Path, keys: Sequence[str]) -> list[dict[str, Tensor]] | None:
    """Returns the stored tensors of all `keys`, or None if one is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    paths = [cache_dir / f"{key}.safetensors" for key in keys]
    try:
        return [load_file(path) for path in paths]
    except (OSError, SafetensorError):
        return None
