"""Reads and repairs JSON-lines files that grow line by line. A kill or a full disk may leave half of the last line."""

import json
import os
import sys
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
