"""Kills training runs at random moments, resumes them, and compares their final checkpoints with an unbroken run's.

    python tests/kills.py --rounds 12 --seed 0

The script adds to the tests, which kill only a few runs. First it trains the tiny text-to-video model without a break.
Then, in each round, it kills one run at three random moments, imports and saves included (the launcher, its process
group, a rank, or all processes), lets the run finish, and compares. This takes minutes.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

VICTIMS = ("launcher", "group", "worker", "everything")


def start(command: list[str], mark: str, **variables: str) -> subprocess.Popen:
    """Starts a launcher in a session of its own. All processes of the run have `mark` in their environment."""
    env = os.environ | {"NPROC": "1", "OMP_NUM_THREADS": "1", "RUN_MARK": mark} | variables
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    return subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def running(mark: str) -> dict[int, str]:
    """Returns {process id: command line} of the living processes of a run."""
    commands = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"RUN_MARK={mark}\0".encode() in (process / "environ").read_bytes():  # empty for a zombie
                commands[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:
            pass
    return commands


def ranks(mark: str, launcher: int) -> list[int]:
    """Returns the process ids of the ranks that torchrun has started."""
    return [pid for pid in running(mark) if pid != launcher and os.getsid(pid) == pid]


def kill(victim: str, launcher: subprocess.Popen, mark: str) -> None:
    if victim == "group":
        os.killpg(launcher.pid, signal.SIGKILL)
        return
    chosen = {"launcher": lambda: [launcher.pid], "everything": lambda: list(running(mark)),
              "worker": lambda: ranks(mark, launcher.pid)[:1] or [launcher.pid]}[victim]()  # fmt: skip
    for pid in chosen:
        os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """Waits until the condition holds and returns the seconds it took. Raises AssertionError after `seconds`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - began


def saving(out: Path, since: float) -> bool:
    """Returns whether the run has been writing a checkpoint after the time `since`."""
    return any(p.stat().st_mtime > since for p in out.glob("checkpoints/.partial-*") if p.is_dir())


def main() -> None:
    import tempfile

    import conftest  # noqa: F401  (sets sys.path, and adapts megatron-core)
    import test_resume as case
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, draw = Path(tempfile.mkdtemp()), random.Random(args.seed)
    clips = case.import_module(f"zoo.{case.case.RECIPE}.demo.make_data").make(folder / "clips" / "demo", 12, 0)
    clips, unbroken = clips / "train.jsonl", folder / "whole"
    began = time.monotonic()
    assert start(case.command(clips, unbroken), f"{folder}").wait() == 0
    longest = time.monotonic() - began
    for number in range(args.rounds):
        out, mark, kills = folder / f"run{number}", f"{folder}/{number}", []
        for _ in range(3):
            launcher, when = start(case.command(clips, out), mark), draw.choice(["saving", draw.uniform(0, longest)])
            began = time.time()
            while launcher.poll() is None and not (
                saving(out, began) if when == "saving" else time.time() > began + when
            ):
                time.sleep(0.01)
            victim = draw.choice(VICTIMS)
            if launcher.poll() is None:
                kill(victim, launcher, mark)
            seconds = wait_until(lambda mark=mark: not running(mark), 60)
            kills.append(f"{victim} {when if when == 'saving' else f'{when:.1f} s'} (gone in {seconds:.1f} s)")
        print(f"run {number}: {', '.join(kills)}", flush=True)
        assert start(case.command(clips, out), mark).wait() == 0
        want, got = (case.tensors(run / "checkpoints" / f"step-{case.STEPS:06d}") for run in (unbroken, out))
        assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
