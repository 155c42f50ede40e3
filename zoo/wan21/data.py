"""Text-video pairs for Wan2.1: the user's list of videos -> an index of buckets -> micro-batches.

Formats (`--data`), paths relative to the list's own folder:

    videos.jsonl   {"path": "a.mp4", "cap": "a red car"}              also "video"; "caption", "text"; a list of captions
    videos.json    [{"path": "a.mp4", "cap": "a red car", "num_frames": 81, "fps": 16.0}, …]           (MindSpeed-MM)
    videos.csv     a header line with the same names
    data.txt       folder,videos.json      a line per data set, paths relative to the folder           (MindSpeed-MM)

Unknown keys are ignored; size, rate and length are measured, not believed. A still image is a video of one frame.

Bucket rule: a video goes to the nearest aspect ratio (within 5 % counts as equal) among the buckets it has enough
frames for, then to the longest; it is resampled to the training rate by the nearest earlier frame, the centre window is
cut, scaled to cover and centre-cropped. A global batch holds one bucket, so its shapes are equal on every rank.
The cost: 81 frames at 16 fps show 5.06 s, and the rest of a longer video is never seen; a 16:9 video in 832x480 loses
2.5 % of its width; a step of 81x480x832 has 32,760 tokens and one of 49x480x832 has 20,280, so step times differ; rows
that do not fill a batch wait for the next epoch.

Reading the lists and choosing buckets works without torch.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.data import DropReport, VideoError, VideoInfo, probe_video, read_frames, resize_crop, write_lines

if TYPE_CHECKING:
    from torch import Tensor

PATH_KEYS, CAPTION_KEYS = ("path", "video"), ("cap", "caption", "text")
MAX_ASPECT = 2.0  # a video this much wider or taller than every bucket would lose half of its picture
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
    for where, item, folder in _items(Path(path).absolute()):
        video, captions = (next((item[k] for k in keys if item.get(k)), None) for keys in (PATH_KEYS, CAPTION_KEYS))
        captions = [captions] if isinstance(captions, str) else captions
        if video is None:
            report.add("no path", where, f"keys: {', '.join(map(str, item))}")
        elif captions is None:
            report.add("no caption", where, str(video))
        elif not isinstance(video, str) or not isinstance(captions, list) or None in item:
            report.add("bad row", where, "path or caption is not text, or the row has more fields than the header")
        elif not (captions := [c.strip() for c in captions if isinstance(c, str) and c.strip()]):
            report.add("no caption", where, video)
        elif not (folder / video).is_file():
            report.add("missing file", where, str(folder / video))
        else:
            caption = captions[0] if seed is None else random.Random(f"{seed} {where}").choice(captions)
            rows.append(Row(str(folder / video), caption, where))
    return rows, report


def _items(path: Path) -> Iterator[tuple[str, dict, Path]]:
    """(file:line, row, folder of its paths) of any format."""
    if path.suffix != ".txt":
        yield from ((where, item, path.parent) for where, item in _read_list(path))
        return
    for number, line in enumerate(_text(path).splitlines(), 1):
        folder, comma, annotation = (part.strip() for part in line.rpartition(","))
        if not line.strip():
            continue
        if not comma or not (path.parent / annotation).is_file():
            raise ValueError(f"{path}:{number}: no such list: {line!r}; expected folder,list.json; fix: {path}")
        yield from ((where, item, path.parent / folder) for where, item in _read_list(path.parent / annotation))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}; expected a UTF-8 text file; fix: --data") from error


def _read_list(path: Path) -> Iterator[tuple[str, dict]]:
    """(file:line, row) of a .jsonl, .json or .csv list."""
    readers = {".jsonl": _json_lines, ".json": _json_list, ".csv": _csv_rows}
    if path.suffix not in readers:
        raise ValueError(f"unknown kind of list: {path}; expected .jsonl, .json, .csv or data.txt; fix: --data")
    line = 1
    try:
        for line, item in readers[path.suffix](_text(path)):
            if not isinstance(item, dict):
                raise ValueError(f"{path}:{line}: the row is {str(item)[:40]!r}; expected an object; fix: {path}")
            yield f"{path.name}:{line}", item
    except json.JSONDecodeError as error:  # its line counts from where the parser began: after the last good row, or 1
        at = error.lineno + (line if path.suffix == ".jsonl" else 0)
        raise ValueError(f"{path}:{at}: {error.msg}; expected JSON; fix: {path}") from error


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    for line, row in enumerate(text.split("\n"), 1):
        if row.strip():
            yield line, json.loads(row)
