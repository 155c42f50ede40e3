"""Processes that end together, and places that one run at a time writes to.

    die_with(os.getppid())                       this process does not outlive the one that started it
    die_with_me()                                nor does what it forks outlive this process
    with alone(Path("data/demo"), "settings"):   nobody else makes this folder meanwhile

Workers must be tied before they import anything heavy, and folders are locked before a process group is built, so there
is no torch here.
"""

import atexit
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# ---- ending together ----

PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal that a process gets when its parent dies
GRACE = 2.0  # seconds after which nothing of a killed run is left

_forking: int | None = None  # the process that is forking, from its main thread


def die_with(parent: int) -> None:
    """Have this process killed when `parent`, which has started it, is dead, in whatever way that died.

    Linux does it itself, so it does not matter what this process is busy with; elsewhere a thread looks.
    """
    asked = sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    if not asked:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # dead before this process could ask
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(GRACE / 8)
    os.kill(os.getpid(), signal.SIGKILL)


def die_with_me() -> None:
    """Have everything killed with this process that it forks from now on: decoders, writers of checkpoints, and what
    those fork. Not what another thread than the main one forks: Linux takes the end of that thread for its parent's."""
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def _before_fork() -> None:
    global _forking
    _forking = os.getpid() if threading.current_thread() is threading.main_thread() else None


def _after_fork() -> None:
    if _forking is not None:
        die_with(_forking)


# ---- one at a time ----

_held: dict[Path, tuple[int, int]] = {}  # lock file -> (its descriptor, the process that locked it)


def lock_file(out: Path, kind: str = "") -> Path:
    """Where the lock of a folder or file to write lies: beside it, for some must not exist before they are whole; in it
    where its own folder is not ours to write to."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.with_name(f".{out.name}.{kind}lock") if os.access(out.parent, os.W_OK) else out / f".{kind}lock"


def hold(out: Path, doing: str = "", wait: bool = False, kind: str = "") -> bool:
    """Lock `out` for this process, until `release` or its end: the lock dies with it, and no fork inherits it.

    doing: what is being made, as others are told. wait: whoever does the same is waited for, and has then made it. kind:
    names a lock of its own. Returns False if this process has it already. Where there are no locks, that is said.

    Raises:
        ValueError: another process has it, named with its host; a killed one's has GRACE seconds to disappear.
    """
    said, until = False, time.monotonic() + GRACE
    try:
        path = lock_file(out, kind)
        if path in _held:
            return False
        while (descriptor := _locked(path)) is None:
            holder = _holder(path)
            who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'another host')}"
            same = wait and holder.get("doing") == doing
            if same and not said:
                print(f"{out}: waiting for {who}, which makes the same", file=sys.stderr, flush=True)
                said = True
            if not same and time.monotonic() > until:
                raise ValueError(
                    f"{out} is in use by {who}; expected one run at a time; fix: another folder, or end it"
                )
            time.sleep(GRACE / 20)
    except OSError as error:
        print(f"warning: {out} cannot be locked ({error}): a second run in it would not be noticed", file=sys.stderr)
        return False
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "doing": doing}
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its words
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(facts).encode(), 0)
        os.fsync(descriptor)  # for other hosts
    _held[path] = descriptor, os.getpid()
    return True


def release(out: Path) -> None:
    _release(lock_file(out))


@contextlib.contextmanager
def alone(out: Path, doing: str) -> Iterator[None]:
    """Makes `out` while nobody else does; whoever makes the same is waited for, so look then whether it is there.

    Raises:
        ValueError: another process makes something else of it.
    """
    mine = hold(out, doing, wait=True)
    try:
        yield
    finally:
        if mine:
            release(out)


def _locked(path: Path) -> int | None:
    """The descriptor of the locked file; None: another process has it. OSError: there are no locks here.

    POSIX locks: they belong to one process alone, and work over NFS. Closing any descriptor of the file ends them.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return None
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # removed by who had it before


def _holder(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):  # it has not written yet, or has just ended
        return {}


def _release(path: Path) -> None:
    descriptor, owner = _held.pop(path, (None, None))
    if owner == os.getpid():
        path.unlink(missing_ok=True)  # while it is ours, so that no other's is removed
        os.close(descriptor)


@atexit.register
def _release_all() -> None:
    for path in list(_held):
        _release(path)
