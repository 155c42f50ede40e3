"""Processes that end together, and locks on what only one process at a time may write.

    die_with(os.getppid())                       this process is killed when the one that started it ends
    die_with_me()                                what this process forks is killed when this process ends
    with alone(Path("data/demo"), "settings"):   no other process writes this folder meanwhile

Workers call `die_with` before they import anything heavy, and folders are locked before a process group is built. So
this module does not import torch.
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
GRACE = 2.0  # seconds after which no process of a killed run is left

_forking: int | None = None  # id of the process that is forking; None if another thread than the main one forks


def die_with(parent: int) -> None:
    """Has this process killed when `parent`, which started it, dies for any reason.

    On Linux the kernel does so, whatever this process is busy with. Elsewhere a thread watches the parent.
    """
    requested = sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    if not requested:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # the parent died before the request
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(GRACE / 8)
    os.kill(os.getpid(), signal.SIGKILL)


def die_with_me() -> None:
    """Has everything that this process forks after this call killed with it: decoders, writers of checkpoints, and
    what those fork. Only forks of the main thread count: for another thread's, Linux would take the end of that thread
    for the end of the parent."""
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
    """Returns the path of the lock for a folder or file to write. It lies beside `out`, because some outputs must not
    exist before they are complete, or inside `out` if the parent folder is not writable."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.with_name(f".{out.name}.{kind}lock") if os.access(out.parent, os.W_OK) else out / f".{kind}lock"


def lock(out: Path, doing: str = "", wait: bool = False, kind: str = "") -> bool:
    """Locks `out` for this process until `release` or the end of the process. No fork inherits the lock.

    doing: what this process makes, stored in the lock file. wait: waits for a process with the same `doing`, which has
    then made `out`. kind: names a separate lock. Returns False if this process has the lock already, or with a warning
    if `out` cannot be locked.

    Raises:
        ValueError: another process, named with its host, has the lock. A killed process's lock has GRACE seconds to
            disappear.
    """
    announced, deadline = False, time.monotonic() + GRACE
    try:
        path = lock_file(out, kind)
        if path in _held:
            return False
        while (descriptor := _locked(path)) is None:
            holder = _holder(path)
            who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'another host')}"
            same = wait and holder.get("doing") == doing
            if same and not announced:
                print(f"{out}: waiting for {who}, which makes the same", file=sys.stderr, flush=True)
                announced = True
            if not same and time.monotonic() > deadline:
                raise ValueError(
                    f"{out} is in use by {who}; expected one run at a time; fix: another folder, or end it"
                )
            time.sleep(GRACE / 20)
    except OSError as error:
        print(f"warning: {out} cannot be locked ({error}): a second run in it would not be noticed", file=sys.stderr)
        return False
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "doing": doing}
    with contextlib.suppress(OSError):  # on a full disk the lock holds without these facts
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(facts).encode(), 0)
        os.fsync(descriptor)  # makes the facts visible to other hosts
    _held[path] = descriptor, os.getpid()
    return True


def release(out: Path) -> None:
    _release(lock_file(out))


@contextlib.contextmanager
def exclusive(out: Path, doing: str) -> Iterator[None]:
    """Holds the lock of `out`. If another process makes the same, waits for it: check then whether `out` exists.

    Raises:
        ValueError: another process makes something else at `out`.
    """
    acquired = lock(out, doing, wait=True)
    try:
        yield
    finally:
        if acquired:
            release(out)


def _locked(path: Path) -> int | None:
    """Returns the descriptor of the locked file, or None if another process has the lock. OSError: no locks here.

    These are POSIX locks: they belong to one process alone and work over NFS. Closing any descriptor of the file ends
    them.
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
        os.close(descriptor)  # the previous holder has removed this file


def _holder(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):  # the holder has not written it yet, or has just ended
        return {}


def _release(path: Path) -> None:
    descriptor, owner = _held.pop(path, (None, None))
    if owner == os.getpid():
        path.unlink(missing_ok=True)  # before the lock ends, so that no other process's file is removed
        os.close(descriptor)


@atexit.register
def _release_all() -> None:
    for path in list(_held):
        _release(path)
