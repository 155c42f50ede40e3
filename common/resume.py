"""Going on in a run folder: what its newest checkpoint says of its run, compared with what is asked for now.

A checkpoint's state.json holds under `start` what the run cannot change any more (what it started from, and what decides
its data and their order) and under `options` every option of the call that wrote it. What is not under `start` may
change, and is printed. No torch here.
"""

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import cli, weights

SAMPLES, SAMPLE_BYTES = 256, 2**16  # read of all files together, if they are not more files than that
UNSAID = {"out", "resume", "export", "merge", "dry_run", "print_config"}  # options that change nothing of a run


def content(files: Iterable[Path]) -> str:
    """A short name for what files hold, whatever they are called: their sizes, and samples of 64 KiB spread over each
    (the whole of 16 MiB; hashing a corpus whole would take as long as reading it)."""
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
    """The checkpoints of a folder, those of the most steps first; but last those of an earlier run, which has gone further
    than the one that began anew here: numbered above what `latest` names and older than it."""

    def steps(name: str) -> tuple[int, str]:
        return len(name), name

    found = sorted(folder.glob("step-*"), key=lambda path: steps(path.name), reverse=True)
    try:
        named, written = (folder / "latest").read_text(), (folder / "latest").stat().st_mtime_ns
    except FileNotFoundError:
        return found

    def is_of_earlier_run(path: Path) -> bool:
        manifest = path / "manifest.json"
        return steps(path.name) > steps(named) and (not manifest.is_file() or manifest.stat().st_mtime_ns < written)

    return sorted(found, key=is_of_earlier_run)  # which keeps the order of equals


def newest_state(folder: Path) -> tuple[Path, dict] | None:
    """(checkpoint, its state.json) of a checkpoint or the newest of a folder of them, wholeness not looked at; None: there
    is none."""
    states = [path / "state.json" for path in checkpoints(folder)]
    for path in [folder / "state.json"] if (folder / "state.json").is_file() else states:
        with contextlib.suppress(FileNotFoundError):  # removed since: a newer one is written
            return path.parent, weights.read_json(path)
    return None


def check(o, start: dict[str, Any]) -> None:
    """A run goes on only from what it began with. start: facts by name; one that is {"path", "content"} is compared by
    its content, if that is known by now (None: demo data that are still to be made).

    Raises:
        ValueError: facts that differ, each with both values; or the run has already done more than --steps.
    """
    if o.resume == "never":
        return
    found = newest_state(o.out / "checkpoints" if o.resume == "auto" else Path(o.resume))
    if found is None:
        return
    folder, state = found
    saved = state.get("start", {})
    names = {**saved, **start} if "job" in saved else saved  # older checkpoints do not say all of it
    differs = [
        f"{name} {_shown(saved.get(name))} and not {_shown(start.get(name))}"
        for name in names
        if name != "weights" and not _equal(saved.get(name), start.get(name))
    ]
    if differs:
        began = "" if saved.get("base") == start.get("base") else f" (--weights {saved.get('weights')})"
        raise ValueError(
            f"{folder} was trained from {', '.join(differs)}; a run goes on with what it began with; fix: these options "
            f"as they were{began}, another --out, or --resume never"
        )
    if o.epochs is None and state["step"] > o.steps:  # how many steps epochs are the data will tell
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
    """`name then -> now` of the options that are not what they were when the checkpoint was written."""
    now = cli.as_json(o)
    return [f"{n} {saved[n]} -> {now[n]}" for n in now if n not in UNSAID and n in saved and saved[n] != now[n]]
