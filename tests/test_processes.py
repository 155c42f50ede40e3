"""Tests processes that end together, folders that only one run writes at a time, and files that a kill has torn."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from importlib import import_module
from pathlib import Path

import pytest
import torch
import wan_case as case
from kills import kill, ranks, running, start, wait_until
from ranks import run_ranks

from common import checkpoint, jsonl, parallel, perf, processes, worker
from common import train as loop

pytestmark = pytest.mark.L4

ROOT = Path(__file__).parents[1]
FORK = multiprocessing.get_context("fork")


# ---- ending together ----

# Starts two ranks as torchrun does, each in its own session.
LAUNCHER = """
import json, os, subprocess, sys
os.environ |= {"ZOO_LAUNCHER": str(os.getpid()), "ZOO_WRITES": json.dumps([[sys.argv[1] + "/run", "", False]])}
os.environ["ZOO_OPTIONS"] = "{}"
command = [sys.executable, "-m", "common.worker", "busy", "job"]
ranks = [subprocess.Popen(command, env=os.environ | {"RANK": str(r)}, start_new_session=True) for r in range(2)]
for rank in ranks:
    rank.wait()
"""
BUSY = """
import os, time
from pathlib import Path
from common import cli

JOBS = {"job": (cli.LayoutOptions,)}

def busy(name):
    (Path(os.environ["FOLDER"]) / f"{name}-{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(600)

if os.environ["MODE"] == "importing":
    busy("import")
"""
# Rank 0 waits for a pool, rank 1 for a DataLoader. Each has also forked a process in place of megatron-core's writers.
JOB = """
import multiprocessing, os
from busy.options import busy
from common.data import BucketSampler, prefetch
from common.language.pool import in_order

class Data:
    def fetch(self, rows, epoch):
        busy("loader")

multiprocessing.get_context("fork").Process(target=busy, args=("writer",)).start()
if os.environ["RANK"] == "0":
    next(in_order(lambda task: busy("pool"), [0, 1], 1))
next(prefetch(Data(), BucketSampler([0], 1, 1, 0, 1, 0), 0, 2, workers=1))
"""
READY = {"importing": ["import-0", "import-1"], "training": ["writer-0", "pool-0", "writer-1", "loader-1"]}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(("mode", "victim"), [("importing", "launcher"), ("training", "worker")])
def test_two_seconds_after_a_kill_no_process_of_the_run_is_left(mode, victim, tmp_path):
    """If the victim is a worker, the launcher is killed after it. test_resume.py kills the launcher of a whole run."""
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "options.py").write_text(BUSY)
    (tmp_path / "busy" / "job.py").write_text(JOB)
    mark, paths = str(tmp_path), os.pathsep.join([str(ROOT), str(tmp_path)])
    launcher = start([sys.executable, "-c", LAUNCHER, str(tmp_path)], mark, MODE=mode, FOLDER=mark, PYTHONPATH=paths)
    try:
        wait_until(lambda: all((tmp_path / name).is_file() for name in READY[mode]), 120)
        before = running(mark)
        assert len(before) == (3 if mode == "importing" else 7), before
        with pytest.raises(ValueError, match="in use by process"):
            processes.lock(tmp_path / "run")
        if victim == "worker":
            rank = ranks(mark, launcher.pid)[0]
            killed_group = {pid for pid in before if pid == rank or os.getsid(pid) == rank}
            kill("worker", launcher, mark)
            wait_until(lambda: not killed_group & set(running(mark)), processes.GRACE)
            assert len(killed_group) == 3 and launcher.poll() is None
        kill("launcher", launcher, mark)
        wait_until(lambda: not running(mark), processes.GRACE)
        assert processes.lock(tmp_path / "run")
        processes.release(tmp_path / "run")
    finally:
        kill("everything", launcher, mark)


def test_a_worker_whose_launcher_died_before_it_could_ask_ends_itself():
    call = "from common import processes; processes.die_with(2**22); print('alive')"
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


# A recipe that takes long to make its data.
OPTIONS = """
import os, time
from common import cli
parse = lambda script, argv: cli.LayoutOptions(size="tiny", layout="tiny")
prepare = lambda options: (print(os.getpid(), flush=True), time.sleep(600))
"""


@pytest.mark.parametrize("within", [True, False])
def test_a_launcher_that_a_worker_has_started_ends_with_it_and_another_with_nobody(within, tmp_path):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "options.py").write_text(OPTIONS)
    env = (
        os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
        | ({"ZOO_LAUNCHER": "1"} if within else {})
    )
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'common.cli', 'stub', 'train'])"
    started = subprocess.Popen([sys.executable, "-c", parent], env=env, stdout=subprocess.PIPE, text=True)
    pid = int(started.stdout.readline())
    started.kill()
    started.wait()
    if within:
        wait_until(lambda: not alive(pid), processes.GRACE)
    else:
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)


def test_where_the_system_has_no_signal_for_it_a_thread_watches_the_parent():
    watcher = "import os, sys, time; sys.platform = 'other'; from common import processes\n"
    watcher += "processes.die_with(os.getppid()); print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {watcher!r}])"
    started = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(started.stdout.readline())
    started.kill()
    started.wait()
    wait_until(lambda: not alive(pid), processes.GRACE)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.is_file() or state.read_text().rpartition(")")[2].split()[0] != "Z"


# ---- one at a time ----

# Holds a lock and has a child that outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from common import processes
processes.lock(Path(sys.argv[1]), "this", kind=sys.argv[2])
if child := os.fork():
    print(os.getpid(), child, flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(request, tmp_path):
    """Starts a process that locks tmp_path/run. Yields (the process, its child's pid)."""
    kind = getattr(request, "param", "")
    started = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run", kind], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    pid, child = map(int, started.stdout.readline().split())
    assert pid == started.pid
    yield started, child
    started.kill()
    os.kill(child, signal.SIGKILL)


def test_a_lock_dies_with_its_process_and_no_fork_keeps_it(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.3)
    started, child = holder
    with pytest.raises(ValueError, match=f"process {started.pid} on {socket.gethostname()};.*fix:"):
        processes.lock(tmp_path / "run")
    with pytest.raises(ValueError, match="in use"):  # the holder makes something else there
        processes.lock(tmp_path / "run", "that", wait=True)
    started.kill()
    started.wait()
    assert alive(child) and processes.lock(tmp_path / "run")
    assert not processes.lock(tmp_path / "run")  # this process has the lock already
    processes.release(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_killed_holder_has_a_moment_to_disappear_and_who_does_the_same_is_waited_for(holder, tmp_path, capfd):
    started, _ = holder
    killer = FORK.Process(target=lambda: (time.sleep(0.5), os.kill(started.pid, signal.SIGKILL)))
    killer.start()
    assert processes.lock(tmp_path / "run", "this", wait=True)
    killer.join()
    assert f"waiting for process {started.pid} on {socket.gethostname()}" in capfd.readouterr().err
    processes.release(tmp_path / "run")


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capfd):
    def lockf(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert not processes.lock(tmp_path / "run")
    assert "cannot be locked ([Errno 37] No locks available): a second run" in capfd.readouterr().err


def test_a_lock_on_a_file_that_its_holder_has_removed_meanwhile_is_none(tmp_path, monkeypatch):
    path, lockf, opened = processes.lock_file(tmp_path / "run"), fcntl.lockf, []

    def after_the_holder_has_gone(descriptor, how):
        opened.append(descriptor)
        if len(opened) == 1:
            path.unlink()
        lockf(descriptor, how)

    monkeypatch.setattr(fcntl, "lockf", after_the_holder_has_gone)
    assert processes.lock(tmp_path / "run") and len(opened) == 2 and path.is_file()
    processes.release(tmp_path / "run")


@pytest.mark.parametrize("holder", ["launcher.", ""], ids=["its launcher", "its rank 0"], indirect=True)
def test_a_second_run_is_refused_before_any_process_group(holder, tmp_path):
    command = [sys.executable, "-m", "common.cli", f"zoo.{case.RECIPE}", "train", "--out", str(tmp_path / "run")]
    trace = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(command, cwd=ROOT, env=trace, capture_output=True, text=True, timeout=60)
    messages = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(messages) == 1, done.stderr
    assert f"in use by process {holder[0].pid} on {socket.gethostname()}" in messages[0]
    assert "torch\n" not in done.stderr and not (tmp_path / "run").exists()


def together(function) -> list[int]:
    """Calls the function in two processes at the same time and returns their exit codes."""
    barrier = FORK.Barrier(2)
    workers = [FORK.Process(target=lambda: (barrier.wait(60), function())) for _ in range(2)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(60)
    return [process.exitcode for process in workers]


def note(file: Path) -> None:
    """Adds a character to a file and waits, so that another process has time to do the same."""
    with open(file, "a") as f:
        f.write("x")
    time.sleep(0.5)


def test_two_runs_in_a_fresh_checkout_make_the_demo_data_once(tmp_path, monkeypatch):
    clips, chats = (import_module(f"{where}.demo.make_data") for where in ("zoo.wan21", "common.language"))

    def write_split(folder: Path, split: str, *_):
        note(tmp_path / f"clips-{split}")
        (folder / f"{split}.jsonl").touch()

    monkeypatch.setattr(clips, "write_split", write_split)
    assert together(lambda: clips.make(tmp_path / "demo", 3, 2)) == [0, 0]
    assert [(tmp_path / f"clips-{split}").read_text() for split in ("train", "test")] == ["x", "x"]
    assert together(lambda: chats._make(tmp_path / "chats", {}, lambda _: note(tmp_path / "chats-log"))) == [0, 0]
    assert (tmp_path / "chats-log").read_text() == "x"


def test_two_preprocessings_into_one_prefix_make_it_once_and_another_is_refused(tmp_path, monkeypatch):
    preprocess, jobs = import_module("common.language.preprocess"), import_module("zoo.qwen3.options")
    monkeypatch.setattr(processes, "GRACE", 0.3)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"words {i}"}) + "\n" for i in range(6)))
    o = jobs.PreprocessOptions(data=tmp_path / "text.jsonl", workers=0)
    o, write_shard = preprocess.check(o, 2048, jobs.DEMO), preprocess._write_shard

    def slowly(base, *rest):
        note(tmp_path / "log")
        wait_until((tmp_path / "go").is_file, 60)
        return write_shard(base, *rest)

    monkeypatch.setattr(preprocess, "_write_shard", slowly)
    first = FORK.Process(target=preprocess.run, args=(o, 2048))
    first.start()
    wait_until((tmp_path / "log").is_file, 60)
    with pytest.raises(ValueError, match=f"{o.out} is in use by process {first.pid}"):
        preprocess.run(o, 4096)
    threading.Timer(0.5, (tmp_path / "go").touch).start()
    assert preprocess.run(o, 2048)["documents"] == 6  # waits for the first
    first.join()
    assert first.exitcode == 0 and (tmp_path / "log").read_text() == "x"


# ---- torn lines ----


def test_a_line_torn_at_any_byte_is_cut_off_before_another_follows(tmp_path):
    file, line = tmp_path / "rows.jsonl", json.dumps({"step": 17, "text": "é\u2028"}, ensure_ascii=False).encode()
    for size in range(len(line) + 1):
        file.write_bytes(b'{"step": 16}\n' + line[:size])
        jsonl.mend(file)
        with open(file, "a") as f:
            f.write('{"step": 18}\n')
        assert [row["step"] for row in jsonl.read(file)] == ([16, 18] if size < len(line) else [16, 17, 18])
    file.write_bytes(line[:9])
    jsonl.mend(file)
    assert file.read_bytes() == b""
    file.write_bytes(b'{"step": 16}\n' + b"[" + b"1, " * jsonl.BLOCK)
    jsonl.mend(file)
    assert file.read_bytes() == b'{"step": 16}\n'


def test_a_torn_line_ends_no_reader_and_is_named_unless_it_is_the_last(tmp_path, capfd):
    file, row = tmp_path / "metrics.jsonl", {"kind": "step", "step": 1, "loss": 5.0}
    lines = [json.dumps({"kind": "run", "job": "sft"}), json.dumps(row), '{"kind": "st', json.dumps(row | {"step": 3})]
    file.write_text("\n".join([*lines, '{"kind": "step", "step"']))
    head, rows = perf.read_metrics(file)
    assert head["job"] == "sft" and [r["step"] for r in rows] == [1, 3]
    assert capfd.readouterr().err == f"warning: {file}:3 is torn and passed over\n"
    perf.plot_loss(file, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").is_file()
    file.write_text(lines[1] + "\n")  # its first line is lost
    assert perf.read_metrics(file) == ({}, [row])
    record = tmp_path / "perf.jsonl"
    record.write_text('{"commit": "a", "value": 1}\n{"comm')
    perf.append(record, {"commit": "0123456789ab", "value": 2})
    assert [r["value"] for r in perf.read(record)] == [1, 2]


def test_answers_torn_at_any_byte_are_asked_again(tmp_path, monkeypatch):
    for name in ("lm_eval", "lm_eval.api.model", "lm_eval.models.utils", "lm_eval.tasks", "lm_eval.utils"):
        monkeypatch.setitem(sys.modules, name, stub := types.ModuleType(name))
        for member in ("normalize_gen_kwargs", "TaskManager", "get_rolling_token_windows", "make_disjoint_window"):
            setattr(stub, member, None)
        stub.TemplateLM = object
    monkeypatch.delitem(sys.modules, "common.language.evaluate", raising=False)
    evaluate, file, about = import_module("common.language.evaluate"), tmp_path / "answers.jsonl", {"weights": "w"}
    sys.modules.pop("common.language.evaluate")
    ask = lambda requests: [len(r[0]) for r in requests]  # noqa: E731
    requests = [["a" * n] for n in (3, 2, 1)]
    answers = evaluate.Answers(file, about)
    assert answers.get(requests, ask, 1, "") == [3, 2, 1]
    answers.file.close()
    whole = file.read_bytes()
    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        answers = evaluate.Answers(file, about)
        assert len(answers.known) == whole[:size].count(b"]") and answers.get(requests, ask, 1, "") == [3, 2, 1]
        answers.file.close()
        assert file.read_bytes() == whole
    file.write_bytes(whole.partition(b"\n")[2])
    with pytest.raises(ValueError, match="answers of another run: weights None, not 'w'"):
        evaluate.Answers(file, about)


# ---- checkpoints that vanish, and that cannot be written ----

STEPS = 6


def trained(out: Path, fault: str = "") -> tuple[str, dict[str, torch.Tensor]]:
    """Trains the tiny case to step 6, from the newest checkpoint if there is one. Returns the path of the last
    checkpoint and the weights in memory. fault: "found" or "read" removes step 4's checkpoint once it is found or as it
    is read; "saved" makes the last save fail."""
    o = case.options(out=out, steps=STEPS, resume="auto", save_every=2, keep=9)
    parallel.initialize(o)
    chunks = case.model.build(o, case.CONFIG)
    case.load(chunks, case.random_state())
    newest, is_first = out / "checkpoints" / "step-000004", torch.distributed.get_rank() == 0
    originals = {"find": checkpoint.find, "load": checkpoint.dist_checkpointing.load, "_write": checkpoint._write}

    def find(*args):
        found = originals["find"](*args)
        if found == newest:
            shutil.rmtree(newest)
        return found

    def load(shards, folder, **kwargs):
        torch.distributed.barrier()
        if is_first and Path(folder) == newest:
            for shard in newest.glob("*.distcp"):
                shard.unlink()
        torch.distributed.barrier()
        return originals["load"](shards, folder, **kwargs)

    def _write(target, *args):
        if target.name == f"step-{STEPS:06d}":
            raise OSError(errno.ENOSPC, "No space left on device")
        return originals["_write"](target, *args)

    patches = {
        "found": (checkpoint, find),
        "read": (checkpoint.dist_checkpointing, load),
        "saved": (checkpoint, _write),
    }
    module, function = patches.get(fault, (None, None))
    if module:
        setattr(module, function.__name__, function)
    try:
        wrapped = parallel.wrap(chunks, o, case.model.WanBlock)
        result = loop.train(
            o, wrapped, case.train.forward_step, lambda start: iter(range(start, o.steps)),
            lambda step: case.my_batches(o, step), sequence_length=lambda batch: case.sequence_length(o),
            samples=lambda batch: (1, 1), header={"hardware": "cpu", "starts_from": "drawn weights"}, state={},
        )  # fmt: skip
    finally:
        if module:
            setattr(module, function.__name__, originals[function.__name__])
    return str(result["checkpoint"]), {name: p.detach().clone() for name, p in checkpoint.parameters(wrapped)}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, list]:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    return out, run_ranks(2, trained, out)


def killed_after_four_steps(unbroken: Path, out: Path) -> Path:
    shutil.copytree(unbroken, out)
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:06d}")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "ste')  # the kill has torn this line
    return out


@pytest.mark.parametrize("when", ["found", "read"])
def test_a_checkpoint_that_vanishes_once_found_is_passed_over_by_all_ranks(when, unbroken, tmp_path):
    out = killed_after_four_steps(unbroken[0], tmp_path / "run")
    ranks = run_ranks(2, trained, out, when)
    assert f"resumed from {out / 'checkpoints' / 'step-000002'} at step 2" in (out / "log.txt").read_text()
    for (_, got), (_, want) in zip(ranks, unbroken[1], strict=True):
        assert all(torch.equal(got[name], want[name]) for name in want)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]  # each line is whole
    assert rows[-1]["reason"] == "finished" and (out / "loss.png").is_file()


def test_a_last_step_that_is_not_on_disk_has_no_checkpoint_and_what_there_is_is_named(unbroken, tmp_path):
    out = killed_after_four_steps(unbroken[0], tmp_path / "run")
    assert [path for path, _ in run_ranks(2, trained, out, "saved")] == ["None", "None"]
    last = (out / "log.txt").read_text().splitlines()[-1]
    assert last.startswith("the weights of step 6 are not on disk") and last.endswith(f"{out}/checkpoints/step-000004")
    again = [path for path, _ in run_ranks(2, trained, out)]  # resumes from there; the disk has room
    assert again == [str(out / "checkpoints" / "step-000006")] * 2
    assert [path for path, _ in run_ranks(2, trained, out)] == again  # nothing is left to train; the last one is found


def exported(recipe: str, argv: list, lost: str) -> int:
    """Trains in this process and returns the exit code. Writing the checkpoint `lost` fails."""
    write = checkpoint._write

    def _write(target, *args):
        if target.name == lost:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(target, *args)

    checkpoint._write = _write
    try:
        worker.run(f"zoo.{recipe}", "train", import_module(f"zoo.{recipe}.options").parse("train", [*map(str, argv)]))
    except SystemExit as end:
        return end.code
    finally:
        checkpoint._write = write
    return 0


@pytest.mark.parametrize("recipe", ["wan21", "qwen3"])
def test_no_older_step_is_exported_in_place_of_a_last_one_that_could_not_be_saved(recipe, tmp_path, capfd):
    fixed = ["--size", "tiny", "--from-scratch", "--steps", "2", "--save-every", "1", "--out", tmp_path / "run"]
    fixed += ["--global-batch", "2", "--micro-batch", "1", "--workers", "0", "--cache", tmp_path / "cache"]
    if recipe == "wan21":
        import_module("zoo.wan21.demo.make_data").make(tmp_path / "demo", train=4, test=0)
        fixed += ["--data", tmp_path / "demo" / "train.jsonl", "--sample-steps", "1"]
    else:
        chats = [{"instruction": f"Say {i}", "output": str(i)} for i in range(40)]
        (tmp_path / "chats.json").write_text(json.dumps(chats))
        fixed += ["--job", "sft", "--data", tmp_path / "chats.json", "--seq-len", "64"]
    argv = [*fixed, "--export", tmp_path / "export"]
    assert run_ranks(1, exported, recipe, argv, "step-000002") == [loop.NOT_SAVED_EXIT]
    assert not (tmp_path / "export").exists()
    assert "step 2 are not on disk" in (tmp_path / "run" / "log.txt").read_text()
    assert run_ranks(1, exported, recipe, argv, "none") == [0]
    assert (tmp_path / "export").is_dir()


def test_without_another_checkpoint_one_that_vanishes_while_it_is_read_is_an_error(unbroken, tmp_path):
    out = killed_after_four_steps(unbroken[0], tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "step-000002")
    with pytest.raises(AssertionError, match="step-000004 vanished while it was read, and no other is in"):
        run_ranks(2, trained, out, "found")
