"""Runs that are killed, and what is left of them. Beside the tests, which kill a few:

    python tests/kills.py --rounds 12 --seed 0

trains the tiny text-to-video model unbroken; then it kills as many runs as asked for, each at random moments, imports and
saves included (the launcher, its group, a rank, all processes), goes on with each until it ends, and compares. Minutes.
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
    """A launcher in a session of its own, whose processes, whatever starts them, are found by `mark`."""
    env = os.environ | {"NPROC": "1", "OMP_NUM_THREADS": "1", "RUN_MARK": mark} | variables
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    return subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def running(mark: str) -> dict[int, str]:
    """The living processes of a run, and their command lines."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"RUN_MARK={mark}\0".encode() in (process / "environ").read_bytes():  # a zombie has none
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:
            pass
    return found


def ranks(mark: str, launcher: int) -> list[int]:
    """Those of them that torchrun has started."""
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
    """How long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - began


def saving(out: Path, since: float) -> bool:
    """Whether a checkpoint is being written."""
    return any(p.stat().st_mtime > since for p in out.glob("checkpoints/.partial-*") if p.is_dir())


def main() -> None:
    import tempfile

    import conftest  # noqa: F401  (paths, and megatron's adapter)
    import test_resume as case
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, draw = Path(tempfile.mkdtemp()), random.Random(args.seed)
    clips = case.import_module(f"zoo.{case.case.RECIPE}.demo.make_data").make(folder / "clips" / "demo", 12, 0)
    clips, whole = clips / "train.jsonl", folder / "whole"
    began = time.monotonic()
    case.run(clips, whole)
    longest = time.monotonic() - began
    for number in range(args.rounds):
        out, mark, kills = folder / f"run{number}", f"{folder}/{number}", []
        for _ in range(3):
            launcher, at = start(case.command(clips, out), mark), draw.choice(["saving", draw.uniform(0, longest)])
            began = time.time()
            while launcher.poll() is None and not (saving(out, began) if at == "saving" else time.time() > began + at):
                time.sleep(0.01)
            victim = draw.choice(VICTIMS)
            if launcher.poll() is None:
                kill(victim, launcher, mark)
            left = wait_until(lambda mark=mark: not running(mark), 60)
            kills.append(f"{victim} {at if at == 'saving' else f'{at:.1f} s'} (gone in {left:.1f} s)")
        print(f"run {number}: {', '.join(kills)}", flush=True)
        done = case.run(clips, out, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        want, got = (case.tensors(run / "checkpoints" / f"step-{case.STEPS:06d}") for run in (whole, out))
        assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
