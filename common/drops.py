"""The report of rows that a data loader leaves out: every dropped row is counted, named and written down. Too many stop
the run.

    report = DropReport()
    report.add("no caption", "videos.jsonl:17")
    report.check(total=200, max_drop=0.05)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common import jsonl


class DropReport:
    """The rows left out, each with a reason. Every dropped row is counted, named and written down."""

    def __init__(self, drops: Sequence[dict[str, str]] = ()) -> None:
        self.drops = list(drops)

    def add(self, reason: str, where: str, detail: str = "") -> None:
        """Add a dropped row. `where` identifies it: `data.jsonl:17` or a path."""
        detail = detail.encode(errors="replace").decode()  # a lone surrogate cannot be printed
        self.drops.append({"reason": reason, "where": where, "detail": detail})

    @property
    def counts(self) -> dict[str, int]:
        """Drops per reason, the most frequent first."""
        return dict(Counter(drop["reason"] for drop in self.drops).most_common())

    @property
    def reasons(self) -> str:
        """Each reason with its count and its first row, as text."""
        first = {drop["reason"]: drop for drop in reversed(self.drops)}
        return ", ".join(
            f"{count} {reason} (first: {' '.join(filter(None, (first[reason]['where'], first[reason]['detail'])))})"
            for reason, count in self.counts.items()
        )

    def __str__(self) -> str:
        return f"dropped {len(self.drops)} rows" + (f": {self.reasons}" if self.drops else "")

    def check(self, total: int, max_drop: float = 0.05) -> None:
        """Raise ValueError if more than the fraction `max_drop` of `total` rows was dropped, or no row is left."""
        dropped = len(self.drops)
        if total == 0 or dropped >= total or dropped > max_drop * total:
            raise ValueError(
                f"{self}, of {total}; expected at most {max_drop:.1%} and one row left; fix: these rows, or --max-drop"
            )

    def save(self, folder: str | Path, name: str = "drops.jsonl") -> None:
        """Write a file of one summary line, then one line per drop."""
        summary = {"kind": "summary", "dropped": len(self.drops), "reasons": self.counts}
        jsonl.write(Path(folder) / name, [summary, *({"kind": "drop", **drop} for drop in self.drops)])

    @classmethod
    def load(cls, path: str | Path) -> DropReport:
        """Read a file that `save` and `note_drops` wrote. Without a file there are no drops. A line that a killed
        process left unfinished is skipped."""
        rows = jsonl.read(Path(path)) if Path(path).is_file() else []
        return cls([row for row in rows if row.pop("kind") == "drop"])


def note_drops(path: Path, drops: Sequence[dict], rows: int, max_drop: float) -> None:
    """Add drops found while decoding to a run's file of drops, and print the new ones. Each drop is added once, however
    many epochs, processes and nodes that share the folder find it.

    drops: dicts as in `DropReport`, with the `file` of each. rows: see `check_drops`.

    Raises:
        ValueError: as `check_drops`.
    """
    known = {(drop["where"], drop.get("file")) for drop in DropReport.load(path).drops}
    new = [drop for drop in drops if (drop["where"], drop["file"]) not in known]
    if new:
        last_line_ends = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
        lines = "".join(json.dumps({"kind": "drop", **drop}) + "\n" for drop in new)
        with open(path, "a", encoding="utf-8") as file:  # one short write, so that the ranks' lines do not mix
            file.write(lines if last_line_ends else "\n" + lines)
    for drop in new:
        print(f"dropped {drop['where']}: {drop['reason']}: {drop['detail']}", flush=True)
    check_drops(path, rows, max_drop)


def check_drops(path: Path, rows: int, max_drop: float) -> DropReport:
    """Return all drops of a run: those made before its `rows` rows were listed, and those found while decoding. Raise
    ValueError if they are more than the fraction `max_drop`."""
    report = DropReport.load(path)
    report.check(rows + sum("file" not in drop for drop in report.drops), max_drop)
    return report
