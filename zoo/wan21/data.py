"""Text-video pairs for Wan2.1: the user's list of videos -> an index of buckets -> micro-batches.

Formats (`--data`), paths relative to the list's own folder:

    videos.jsonl   {"path": "a.mp4", "cap": "a red car"}     or a list of captions
    videos.json    [{"path": "a.mp4", "cap": "a red car", "num_frames": 81, "fps": 16.0}, …]      (MindSpeed-MM)
    videos.csv     a header line with the same names
    data.txt       folder,videos.json      a line per data set, paths relative to the folder      (MindSpeed-MM)

The path may also be called "video", "file_path" or "file_name", the caption "caption", "text" or "prompt"; of several of
these the first counts. Other keys are ignored; size, times and length are measured, not believed. A still image is a video
of one frame, an animated one (WebP, PNG, GIF) a video.

Bucket rule: a video goes to the nearest aspect ratio (5 % further counts as equal) among the buckets it has enough
frames for, of those to the longest; it is resampled to the training rate by the last frame shown at or before each
moment (a lower rate repeats frames, a variable one is followed), and the centre window is scaled to cover and
centre-cropped. A global batch holds one bucket, so its shapes are equal on every rank.
`--buckets auto:81x480x832` makes the buckets: of each usual aspect ratio the shape with sides in multiples of 16 that
loses least of 480*832 pixels, in lengths of 81 frames and 16 (1 s) fewer each, down to stills.
The cost: 81 frames at 16 fps show 5.06 s, and the rest of a longer video is never seen; a 16:9 video in 832x480 loses
2.5 % of its width; a step of 81x480x832 has 32,760 tokens and one of 49x480x832 has 20,280, so step times differ; rows
that do not fill a batch wait for the next epoch.

    pairs.jsonl    {"chosen": "a.mp4", "rejected": "b.mp4", "caption": "a red car"}               (dpo_t2v.sh, dpo_i2v.sh)

Reading the lists and choosing buckets works without torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.data import DropReport, partial_name, write_lines
from common.records import BadRow, read_csv, read_json, read_lines
from common.video import (
    VideoError,
    VideoInfo,
    decord_refusal,
    probe_video,
    read_frames,
    resampled_length,
    resize_crop,
)

if TYPE_CHECKING:
    from torch import Tensor

PATH_KEYS = ("path", "video", "file_path", "file_name")
CAPTION_KEYS = ("cap", "caption", "text", "prompt")
MAX_ASPECT = 2.0  # a video this much wider or taller than every bucket would lose half of its picture
SAME_ASPECT = 0.05  # aspects this near (in log) are one: 480x832 is as good for 16:9 as 720x1280
ASPECTS = (16 / 9, 3 / 2, 4 / 3, 1.0, 3 / 4, 2 / 3, 9 / 16)  # width / height of the buckets made by auto
LENGTH_STEP = 16  # frames between their lengths: at 16 fps a second, of which the latents have 4
MAX_REPLACED = 64  # undecodable videos in a row before it is the storage, not the videos


# ---- the user's lists ----


@dataclass(frozen=True)
class Row:
    path: str  # absolute
    caption: str
    where: str  # list file:line


def read_rows(path: str | Path, seed: int | None = None) -> tuple[list[Row], DropReport]:
    """Rows with a caption and an existing file; the others are in the report.

    Of a list of captions the first is taken, or with `seed` one at random, the same in every run.

    Raises:
        ValueError: the list itself is missing, malformed, or of an unknown kind; names file and line.
    """
    rows, report = [], DropReport()
    for where, item, folder in _items(Path(path).absolute(), report):
        video, captions = (next((item[k] for k in keys if item.get(k)), None) for keys in (PATH_KEYS, CAPTION_KEYS))
        captions = [captions] if isinstance(captions, str) else captions
        if video is None:
            report.add("no path", where, f"keys: {', '.join(map(str, item))}")
        elif captions is None:
            report.add("no caption", where, str(video))
        elif not isinstance(video, str) or not isinstance(captions, list) or None in item:
            report.add("bad row", where, "path or caption is not text, or the row has more fields than the header")
        elif not (captions := [_clean(c) for c in captions if isinstance(c, str) and c.strip()]):
            report.add("no caption", where, video)
        elif not os.path.isfile(file := os.path.abspath(folder / video)):
            report.add("missing file", where, file)
        else:
            caption = captions[0] if seed is None else random.Random(f"{seed} {where}").choice(captions)
            rows.append(Row(file, caption, where))
    return rows, report


def read_pairs(path: str | Path) -> tuple[list[Row], DropReport]:
    """The pairs of a .jsonl or .json list of {"chosen": "a.mp4", "rejected": "b.mp4", "caption": "…"}, two rows after
    another of each; those of which something is missing are in the report.

    Raises:
        ValueError: the list itself is missing, malformed, or of an unknown kind; names file and line.
    """
    path, rows, report = Path(path).absolute(), [], DropReport()
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"unknown kind of list of pairs: {path}; expected .jsonl or .json; fix: --data")
    for where, item, folder in _items(path, report):
        caption = next((item[k] for k in CAPTION_KEYS if item.get(k)), None)
        lacking = [key for key in ("chosen", "rejected") if not isinstance(item.get(key), str) or not item[key]]
        if lacking:
            report.add(f"no {lacking[0]}", where, f"keys: {', '.join(map(str, item))}")
        elif not isinstance(caption, str) or not caption.strip():
            report.add("no caption", where, item["chosen"])
        elif item["chosen"] == item["rejected"]:
            report.add("one video twice", where, item["chosen"])
        else:
            files = [os.path.abspath(folder / item[key]) for key in ("chosen", "rejected")]
            lost = [file for file in files if not os.path.isfile(file)]
            if lost:
                report.add("missing file", where, lost[0])
            else:
                rows += [Row(file, _clean(caption), where) for file in files]
    return rows, report


def _clean(caption: str) -> str:
    """Without the lone surrogates of scraped text, on which a tokenizer stops the run."""
    return caption.strip().encode(errors="replace").decode()


def _items(path: Path, report: DropReport) -> Iterator[tuple[str, dict, Path]]:
    """(file:line, row, folder of its paths) of any format; rows that cannot be read go to the report.

    Raises:
        ValueError: as of `_read_list`, or there is no row at all.
    """
    found = False
    for annotation, folder in _lists(path):
        for line, item in _read_list(path.parent / annotation):
            found, where = True, f"{annotation}:{line}"
            if isinstance(item, BadRow):
                report.add(item.args[0], where, item.args[1])
            else:
                yield where, item, folder
    if not found:
        raise ValueError(f"{path} holds no row; expected a row per video; fix: {path}")


def _lists(path: Path) -> Iterator[tuple[str, Path]]:
    """(name of a list, folder of its paths): the file itself, or what a data.txt names."""
    if path.suffix != ".txt":
        yield path.name, path.parent
        return
    for number, line in read_lines(path):
        folder, comma, annotation = (part.strip() for part in line.rpartition(","))
        if not line.strip():
            continue
        if not comma or not (path.parent / annotation).is_file():
            raise ValueError(f"{path}:{number}: no such list: {line!r}; expected folder,list.json; fix: {path}")
        yield annotation, path.parent / folder


def _read_list(path: Path) -> Iterator[tuple[int, dict | BadRow]]:
    """(line number, row) of a .jsonl, .json or .csv list. ValueError: it is malformed; names file and line."""
    if path.suffix not in (".jsonl", ".json", ".csv"):
        raise ValueError(f"unknown kind of list: {path}; expected .jsonl, .json, .csv or data.txt; fix: --data")
    if not path.is_file():
        raise ValueError(f"cannot read {path}: no such file; expected a list of clips; fix: --data")
    for line, item in read_csv(path, (PATH_KEYS, CAPTION_KEYS)) if path.suffix == ".csv" else read_json(path):
        if not isinstance(item, (dict, BadRow)):
            raise ValueError(f"{path}:{line}: the row is {str(item)[:40]!r}; expected an object; fix: {path}")
        yield line, item


# ---- buckets ----


@dataclass(frozen=True)
class Bucket:
    """Pixels of one shape of training video."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    def check(self, multiple: int = 16, flag: str = "--buckets") -> Bucket:
        """4n + 1 frames for the causal VAE; `multiple` is the VAE's stride of 8 by the patch of 2."""
        if self.frames < 1 or self.frames % 4 != 1:
            near = max(1, (self.frames - 1) // 4 * 4 + 1)
            raise ValueError(f"shape {self} has {self.frames} frames; expected 4n+1 ({near}, {near + 4}); fix: {flag}")
        for side in (self.height, self.width):
            if side < multiple or side % multiple:
                near = max(multiple, side // multiple * multiple)
                rule = f"a multiple of {multiple} ({near}, {near + multiple})"
                raise ValueError(f"shape {self} has a side of {side}; expected {rule}; fix: {flag}")
        return self


def parse_buckets(text: str, multiple: int = 16, flag: str = "--buckets") -> list[Bucket]:
    """`81x480x832,49x480x832`, which `flag` names -> buckets, frames x height x width."""
    buckets = []
    for part in text.split(","):
        numbers = part.strip().split("x")
        if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"shape {part.strip()!r}; expected FRAMESxHEIGHTxWIDTH such as 81x480x832; fix: {flag}")
        buckets.append(Bucket(*map(int, numbers)).check(multiple, flag))
    return buckets


def auto_buckets(text: str, split: int = 1) -> list[Bucket]:
    """`auto:81x480x832` -> buckets of at most so many frames and pixels, whose tokens (2x2 latents of 8x8 pixels) are a
    multiple of `split` in every frame."""
    largest, *more = parse_buckets(text.removeprefix("auto:"))
    if more:
        raise ValueError(f"{text} names {1 + len(more)} shapes; expected one, the largest; fix: --buckets")
    area = largest.height * largest.width
    sides = range(16, math.isqrt(2 * area) + 1, 16)
    shapes = [(h, w) for h in sides for w in sides if h * w <= area and h * w // 256 % split == 0]

    def lost(shape: tuple[int, int], aspect: float) -> float:
        """Of the picture by cropping, and of the area by being smaller, as logarithms."""
        return abs(math.log(shape[1] / shape[0] / aspect)) + math.log(area / shape[0] / shape[1])

    lengths = [*range(largest.frames, 1, -LENGTH_STEP), 1]
    best = dict.fromkeys(min(shapes, key=lambda shape, aspect=aspect: lost(shape, aspect)) for aspect in ASPECTS)
    return [Bucket(frames, *shape) for shape in best for frames in lengths]


def choose_bucket(info: VideoInfo, buckets: Sequence[Bucket], fps: float | None) -> int | str:
    """Number of the bucket, or the reason why none fits."""
    frames = resampled_length(info, fps)
    long_enough = [i for i, bucket in enumerate(buckets) if bucket.frames <= frames]
    aspect = {i: abs(math.log(info.width / info.height * buckets[i].height / buckets[i].width)) for i in long_enough}
    if not aspect:
        return "too short"
    if min(aspect.values()) > math.log(MAX_ASPECT):
        return "aspect"
    near = [i for i in long_enough if aspect[i] <= min(aspect.values()) + SAME_ASPECT]
    return min(near, key=lambda i: (-buckets[i].frames, aspect[i]))


# ---- the index ----


@dataclass(frozen=True)
class IndexRow:
    """A video that passed the scan; `size` (bytes) and `mtime_ns` as they were then, `frames`, `fps` and `duration` as in
    `VideoInfo`. `decoder`: which reads it."""

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
    """What a run trains on; a row's id is its place in `rows`. Kept in the run folder, so that a resumed run has the
    same ids whatever became of the files."""

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
        buckets = parse_buckets(",".join(head["buckets"]), 1)
        decoder, content = head.get("decoder", "pyav"), head.get("list_content", "")
        return cls([IndexRow(**row) for row in rows], buckets, head["fps"], decoder, content)


def scan(
    rows: Sequence[Row],
    buckets: Sequence[Bucket],
    fps: float | None,
    report: DropReport,
    workers: int = 8,
    decoder: str = "pyav",
) -> Index:
    """Measures every file in `workers` threads and gives it a bucket; the order of `rows` is kept. decoder: decord is to
    read what it reads right; of the other files it prints how many there are, and why."""
    from tqdm import tqdm

    def probe(row: Row) -> tuple[VideoInfo, os.stat_result, str | None] | Exception:
        try:
            stat = os.stat(row.path)
            return probe_video(row.path), stat, decord_refusal(row.path) if decoder == "decord" else None
        except (VideoError, OSError) as error:  # OSError: gone since the list was read
            return error

    kept, refused = [], DropReport()
    with ThreadPoolExecutor(workers) as pool:
        found = tqdm(pool.map(probe, rows), total=len(rows), desc="scanning videos", mininterval=1)
        for row, result in zip(rows, found, strict=True):
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


def fill(index: Index, global_batch: int) -> str:
    """What becomes of the videos' frames, by bucket: used of those there are at the training rate."""
    lines, used, given = [], 0, 0
    for number, bucket in enumerate(index.buckets):
        rows = [row for row in index.rows if row.bucket == number]
        if rows:
            there = sum(resampled_length(row, index.fps) for row in rows)
            used, given = used + len(rows) * bucket.frames, given + there
            few = f"; fewer than a batch of {global_batch}, which repeats some" if len(rows) < global_batch else ""
            lines.append(f"  {bucket}: {len(rows)} videos, {len(rows) * bucket.frames} of {there} frames{few}")
    return "\n".join([f"buckets: {used} of {given} frames used ({used / given:.1%})", *lines])


def scan_pairs(
    rows: Sequence[Row],
    buckets: Sequence[Bucket],
    fps: float | None,
    report: DropReport,
    workers: int = 8,
    decoder: str = "pyav",
) -> Index:
    """`scan` of the rows of `read_pairs`: the pairs both of whose videos go to one bucket, two rows after another."""
    found = scan(rows, buckets, fps, report, workers, decoder)
    places: dict[str, list[IndexRow]] = {}
    for row in found.rows:
        places.setdefault(row.where, []).append(row)
    kept = []
    for where, pair in places.items():
        if len(pair) < 2:  # the other one is in the report
            report.add("other of a pair dropped", where, pair[0].path)
        elif pair[0].bucket != pair[1].bucket:
            shapes = " and ".join(str(found.buckets[row.bucket]) for row in pair)
            for row in pair:
                report.add("pair of two buckets", where, f"{row.path}: {shapes}")
        else:
            kept += pair
    return Index(kept, found.buckets, fps, decoder)


# ---- micro-batches ----


class VideoTextDataset:
    """Micro-batches of an index, decoded, or out of the cache of what the frozen VAE and text encoder made of them."""

    def __init__(
        self,
        index: Index,
        *,
        cache_dir: str | Path | None = None,
        encoder: str = "",
        random_start: int | None = None,
    ):
        """
        Args:
            encoder: names whatever decides the cached tensors besides the data (VAE, text encoder, precision).
            random_start: a seed; the window then starts at random by (seed, epoch, row), not in the centre.
        """
        if cache_dir is not None and random_start is not None:
            raise ValueError(
                "a cache and random starts; expected one of them, a cached video has one window; fix: --cache"
            )
        self.index, self.encoder, self.random_start = index, encoder, random_start
        self.cache_dir = cache_dir and Path(cache_dir)
        self._bucket_rows: dict[int, list[int]] = {}
        for row, entry in enumerate(index.rows):
            self._bucket_rows.setdefault(entry.bucket, []).append(row)

    def __len__(self) -> int:
        return len(self.index.rows)

    def where(self, row: int) -> str:
        return self.index.rows[row].path

    def key(self, row: int) -> str:
        """Name of the row's cache entry. A file that is gone keeps the name of the scan: its cache still serves."""
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

        Returns `rows` (those really read), `captions`, `keys` (cache names, or None without a cache), `dropped` (rows
        that could not be decoded: why), and either `latents` fp32 [B, 16, f, h, w], `text` [B, longest n, D] and whatever
        else was stored with them (what image-to-video is conditioned on) or `pixels` uint8 [B, 3, F, H, W]; the others are
        None. Cached tensors are returned only if every row has them: else all rows are decoded, so that whoever encodes
        them always encodes the same batch, and a resumed run gets the same bits.
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
        """The row, or the next of its bucket that can be decoded, and its pixels uint8 [F, H, W, 3]; `dropped` gets those
        that cannot."""
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
        fitted = functools.partial(resize_crop, height=bucket.height, width=bucket.width)
        return read_frames(entry.path, window, lambda frame: fitted(frame[None])[0], fps, entry.decoder)

    def drops(self, dropped: dict[int, str]) -> list[dict]:
        """For `note_drops`: rows that could not be decoded, and why."""
        return [self._drop(row, "corrupt video (decode)", why) for row, why in dropped.items()]

    def _drop(self, row: int, reason: str, detail: str) -> dict:
        entry = self.index.rows[row]
        return {"reason": reason, "where": entry.where, "detail": detail, "file": entry.path}


class PairDataset(VideoTextDataset):
    """Micro-batches of pairs, of an index by `scan_pairs`: pair i is its rows 2i (chosen) and 2i + 1 (rejected)."""

    def __len__(self) -> int:
        return len(self.index.rows) // 2

    def where(self, pair: int) -> str:
        return self.index.rows[2 * pair].where

    def fetch(self, pairs: Sequence[int], epoch: int = 0) -> dict[str, Any]:
        """As `VideoTextDataset.fetch`: the chosen videos of all pairs, then the rejected ones. For a pair that cannot be
        decoded the next of its bucket stands in."""
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


# ---- the cache ----


def store(
    cache_dir: str | Path, key: str, latents: Tensor, text: Tensor, condition: dict[str, Tensor] | None = None
) -> None:
    """Keeps latents [16, f, h, w] and, of image-to-video, the condition in fp32, and the text embedding [T, D] without its
    zero rows; whole or not at all."""
    from safetensors.torch import save_file

    path = Path(cache_dir) / f"{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    tensors = {
        name: value.float().cpu().contiguous() for name, value in ({"latents": latents} | (condition or {})).items()
    }
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
