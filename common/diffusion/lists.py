"""Reads the user's lists of clips and of preference pairs as rows, each with a caption and an existing file.

Formats of clips; paths are relative to the list's own folder:

    videos.jsonl   {"path": "a.mp4", "cap": "a red car"}     or a list of captions
    videos.json    [{"path": "a.mp4", "cap": "a red car", "num_frames": 81, "fps": 16.0}, …]      (MindSpeed-MM)
    videos.csv     a header line with the same names
    data.txt       folder,videos.json      a line per data set, paths relative to the folder      (MindSpeed-MM)

The path may also be called "video", "file_path" or "file_name", the caption "caption", "text" or "prompt". If a row has
several of these, the first in this order counts. Other keys are ignored: size, rate and length are measured.

Format of pairs:

    pairs.jsonl    {"chosen": "a.mp4", "rejected": "b.mp4", "caption": "a red car"}               or .json

This module does not import torch.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.drops import DropReport
from common.records import BadRow, read_csv, read_json, read_lines

PATH_KEYS = ("path", "video", "file_path", "file_name")
CAPTION_KEYS = ("cap", "caption", "text", "prompt")


@dataclass(frozen=True)
class Row:
    path: str  # absolute
    caption: str
    where: str  # list file:line


def read_rows(path: str | Path, seed: int | None = None) -> tuple[list[Row], DropReport]:
    """Returns the rows that have a caption and an existing file, and a report of the others.

    From a list of captions the first is taken. With `seed`, one is drawn at random, the same in every run.

    Raises:
        ValueError: the list itself is missing, malformed, or of an unknown kind; the message names file and line.
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
    """Returns the pairs of a list, as two rows each (chosen video, then rejected one), and a report of the others.

    Raises:
        ValueError: the list itself is missing, malformed, or of an unknown kind; the message names file and line.
    """
    path, rows, report = Path(path).absolute(), [], DropReport()
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"unknown kind of list of pairs: {path}; expected .jsonl or .json; fix: --data")
    for where, item, folder in _items(path, report):
        caption = next((item[k] for k in CAPTION_KEYS if item.get(k)), None)
        missing_keys = [key for key in ("chosen", "rejected") if not isinstance(item.get(key), str) or not item[key]]
        if missing_keys:
            report.add(f"no {missing_keys[0]}", where, f"keys: {', '.join(map(str, item))}")
        elif not isinstance(caption, str) or not caption.strip():
            report.add("no caption", where, item["chosen"])
        elif item["chosen"] == item["rejected"]:
            report.add("one video twice", where, item["chosen"])
        else:
            files = [os.path.abspath(folder / item[key]) for key in ("chosen", "rejected")]
            missing_files = [file for file in files if not os.path.isfile(file)]
            if missing_files:
                report.add("missing file", where, missing_files[0])
            else:
                rows += [Row(file, _clean(caption), where) for file in files]
    return rows, report


def check_list(path: Path, max_drop: float, pairs: bool = False) -> None:
    """Reads a list and checks that at most the share `max_drop` of its rows, or pairs, is unusable.

    Raises:
        ValueError: more are unusable, or as `read_rows`.
    """
    rows, report = (read_pairs if pairs else read_rows)(path)
    report.check(len(rows) // (2 if pairs else 1) + len(report.drops), max_drop)


def _clean(caption: str) -> str:
    """Replaces the lone surrogates of scraped text, on which a tokenizer would fail, and strips the ends."""
    return caption.strip().encode(errors="replace").decode()


def _items(path: Path, report: DropReport) -> Iterator[tuple[str, dict, Path]]:
    """Yields (file:line, row, folder of its paths) of any format. Rows that cannot be read go to the report.

    Raises:
        ValueError: as `_read_list`, or there is no row at all.
    """
    empty = True
    for annotation, folder in _lists(path):
        for line, item in _read_list(path.parent / annotation):
            empty, where = False, f"{annotation}:{line}"
            if isinstance(item, BadRow):
                report.add(item.args[0], where, item.args[1])
            else:
                yield where, item, folder
    if empty:
        raise ValueError(f"{path} holds no row; expected a row per video; fix: {path}")


def _lists(path: Path) -> Iterator[tuple[str, Path]]:
    """Yields (name of a list, folder of its paths): the file itself, or the lists that a data.txt names."""
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
    """Yields (line number, row) of a .jsonl, .json or .csv list. Raises ValueError, which names file and line, if it is
    malformed."""
    if path.suffix not in (".jsonl", ".json", ".csv"):
        raise ValueError(f"unknown kind of list: {path}; expected .jsonl, .json, .csv or data.txt; fix: --data")
    if not path.is_file():
        raise ValueError(f"cannot read {path}: no such file; expected a list of clips; fix: --data")
    for line, item in read_csv(path, (PATH_KEYS, CAPTION_KEYS)) if path.suffix == ".csv" else read_json(path):
        if not isinstance(item, (dict, BadRow)):
            raise ValueError(f"{path}:{line}: the row is {str(item)[:40]!r}; expected an object; fix: {path}")
        yield line, item
