"""Reads, writes and repairs JSON-lines files. A kill or a full disk may leave half of the last line of a file that grows."""

import json
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLOCK = 1 << 16  # bytes read at a time from the end of a file


def read(path: Path) -> list[Any]:
    """Return the values of the lines. A line that is not JSON is skipped, with a warning unless it is the last one and
    unfinished: another process may be writing it."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError:
                if line.endswith(b"\n"):
                    print(f"warning: {path}:{number} is torn and passed over", file=sys.stderr, flush=True)
    return rows


def mend(path: Path) -> None:
    """Cut off a torn last line before lines are added to a file. A last line that only lacks its newline gets it."""
    if not path.is_file():
        return
    with open(path, "r+b") as file:
        start = end = file.seek(0, os.SEEK_END)
        tail = b""
        while start and b"\n" not in tail:
            start = max(0, start - BLOCK)
            file.seek(start)
            tail = file.read(end - start)
        last = tail[tail.rfind(b"\n") + 1 :]
        try:
            if last:
                json.loads(last)
                file.write(b"\n")
        except ValueError:
            file.truncate(end - len(last))


def partial_name(path: Path) -> Path:
    """Return a temporary path, to be renamed to `path` when it is written. Two hosts or containers that share the
    folder never choose the same one."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def append(path: Path, records: Sequence[dict]) -> None:
    """Add lines to a file, after a torn last line is cut off."""
    mend(path)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def write(path: Path, records: Sequence[dict]) -> None:
    """Write a jsonl file atomically: it exists whole or not at all."""
    partial = partial_name(path)
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    os.replace(partial, path)
