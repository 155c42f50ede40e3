"""Resuming in a run folder: compares what its newest checkpoint says of the run with the options of this call.

A checkpoint's state.json holds under `start` what a run must not change (what it started from, and what decides its
data and their order), and under `options` every option of the call that wrote it. Options that are not part of `start`
may change; the changes are printed. This module does not import torch.
"""

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import cli, weights

SAMPLES, SAMPLE_BYTES = 256, 2**16  # samples of all files together, at least one of each file
NOT_REPORTED = {"out", "resume", "export", "merge", "dry_run", "print_config"}  # options that do not change a run


def content_hash(files: Iterable[Path]) -> str:
    """Returns a short hash of what files hold, whatever their names: of their sizes and samples of 64 KiB spread over
    each, 16 MiB together. Hashing a whole corpus would take as long as reading it."""
    digest, files = hashlib.sha256(), list(files)
    count = max(1, SAMPLES // max(1, len(files)))
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with open(path, "rb") as file:
            for i in range(count):
                file.seek(i * size // count)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a folder, those of the most steps first. If a run began anew here, checkpoints of an
    earlier, longer run come last: their numbers are above the one in `latest`, and they are older than that file."""

    def steps(name: str) -> tuple[int, str]:
        return len(name), name

    paths = sorted(folder.glob("step-*"), key=lambda path: steps(path.name), reverse=True)
    try:
        named, written = (folder / "latest").read_text(), (folder / "latest").stat().st_mtime_ns
    except FileNotFoundError:
        return paths

    def is_of_earlier_run(path: Path) -> bool:
        manifest = path / "manifest.json"
        return steps(path.name) > steps(named) and (not manifest.is_file() or manifest.stat().st_mtime_ns < written)

    return sorted(paths, key=is_of_earlier_run)  # the sort is stable


def newest_state(folder: Path) -> tuple[Path, dict] | None:
    """Returns (checkpoint, its state.json) for a checkpoint, or for the newest one in a folder; None if there is none.
    Does not check that the checkpoint is complete."""
    states = [path / "state.json" for path in checkpoints(folder)]
    for path in [folder / "state.json"] if (folder / "state.json").is_file() else states:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile: a newer one is written
            return path.parent, weights.read_json(path)
    return None


def check(o, start: dict[str, Any]) -> None:
    """Checks that a resumed run keeps the facts that it began with. start: facts by name. A fact {"path", "content"} is
    compared by its content, if that is known (None: demo data that are not made yet).

    Raises:
        ValueError: facts differ, each named with both values; or the run has already done more than --steps.
    """
    if o.resume == "never":
        return
    newest = newest_state(o.out / "checkpoints" if o.resume == "auto" else Path(o.resume))
    if newest is None:
        return
    folder, state = newest
    saved = state.get("start", {})
    names = {**saved, **start} if "job" in saved else saved  # older checkpoints lack some facts
    differing = [
        f"{name} {_shown(saved.get(name))} and not {_shown(start.get(name))}"
        for name in names
        if name != "weights" and not _equal(saved.get(name), start.get(name))
    ]
    if differing:
        began = "" if saved.get("base") == start.get("base") else f" (--weights {saved.get('weights')})"
        raise ValueError(
            f"{folder} was trained from {', '.join(differing)}; a run goes on with what it began with; fix: these options "
            f"as they were{began}, another --out, or --resume never"
        )
    if o.epochs is None and state["step"] > o.steps:  # with --epochs the steps are known only with the data
        raise ValueError(
            f"{folder} is at step {state['step']} already, steps={o.steps}; fix: --steps of at least {state['step']}, or "
            "--resume with an earlier checkpoint and another --out"
        )


def _equal(saved: Any, now: Any) -> bool:
    if isinstance(saved, dict) and isinstance(now, dict):
        return None in (saved["content"], now["content"]) or saved["content"] == now["content"]
    return saved == now


def _shown(fact: Any) -> str:
    return f"{fact['path']} (content {fact['content']})" if isinstance(fact, dict) else repr(fact)


def changes(saved: dict[str, Any], o) -> list[str]:
    """Lists as `name then -> now` the options that differ from those of the call that wrote the checkpoint."""
    now = cli.as_json(o)
    return [f"{n} {saved[n]} -> {now[n]}" for n in now if n not in NOT_REPORTED and n in saved and saved[n] != now[n]]
