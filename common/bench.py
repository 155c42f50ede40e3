"""The harness of the benchmarks: our training step and a peer's by turns, the launcher as a user starts it, the reading of
released weights, and the rows that all of them leave in the performance record.

A recipe's perf.py says which benchmarks it has, and hands in its model, its micro-batches and its peer. Seconds, memory,
ratios and refusals are taken here.

Each contender of a step runs in a process of its own, so that its memory is its own. The first thing that such a process
imports is this module.
"""

import dataclasses
import datetime
import functools
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import device  # isort: skip  (before megatron)
import torch
import torch.distributed as dist

from common import checkpoint, parallel, perf, release, runlog, train

CLIP = 1.0
LOSS_BOUND = {"fp32": 1e-5, "bf16": 2e-3}  # relative; bf16: the peer keeps fp32 weights, we round them
OURS, COMPILED = "this zoo", "torch.compile"


def rounded(values: dict) -> dict:
    """The values with four significant digits."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}


def timed(step: Callable) -> tuple[float, Any]:
    """Seconds of one call, the device's queue empty before and after, and what it returned."""
    device.synchronize()
    start = time.perf_counter()
    result = step()
    device.synchronize()
    return time.perf_counter() - start, result


def facts(o: train.TrainOptions, *, model: str, size: str, shape: str) -> dict:
    """What all rows of one call of perf.sh have in common. A row's own facts replace these."""
    return {
        "source": "measured",
        "system": OURS + (f" + {COMPILED}" if o.compile else ""),
        "model": model,
        "size": size,
        "hardware": device.name(),
        "devices": o.world,
        "layout": o.layout,
        "precision": o.precision,
        "shape": shape,
        "mfu": None,
        "commit": runlog.commit(),
        "command": os.environ.get("ZOO_COMMAND", ""),
        "date": datetime.date.today().isoformat(),
    }


def report(rows: list[dict], record: Path, append: bool) -> None:
    """Print every row, and beside a step the published rows of its workload. With append, add to the record (a recipe's
    perf.jsonl) all rows that are not refused."""
    for row in rows:
        if "refused" in row:
            print(f"{row['task']:<34} refused, not recorded: {row['system']}: {row['refused']}", flush=True)
            continue
        print(f"{row['task']:<34} {row['value']:>10.4g} {row['unit']:<28} {row['system']} {row['raw']}", flush=True)
        if row["task"] == "pretrain step" and row["system"].startswith(OURS):
            print("\n".join("  " + line for line in perf.compare(row, record)), flush=True)
    if append:
        for row in rows:
            if "refused" not in row:
                perf.append(record, row)
        print(f"recorded in {record}; render the tables with: python -m common.perf")


# -------------------------------------------------------------------------------------------------------------- step


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the rows of a step say of its model."""

    library: str  # of the peer, e.g. "diffusers"
    unit: str  # of a rate
    units: int  # in one sample: 1 for samples per second, its tokens for tokens per second
    digits: int  # of a rate, after the decimal point
    flops: int  # of one sample's forward


def own_step(
    o: train.TrainOptions,
    chunks: list[torch.nn.Module],
    draw: Callable,
    block: type,
    forward_step: Callable,
    sequence_length: int,
) -> Callable[[list[dict]], list[dict]]:
    """Our training step on the micro-batches that it is given, as `train.train` does it: everything between preparing
    them and logging. The step returns this rank's losses, still on the device.

    draw: fills one parameter, as `checkpoint.initialize` calls it. block, forward_step, sequence_length: as
    `parallel.wrap` and `train.forward` take them.
    """
    checkpoint.initialize(chunks, o.seed, draw)
    wrapped = parallel.wrap(chunks, o, block)
    optimizer = train.build_optimizer(o, wrapped)
    wrapped[0].config.grad_scale_func = optimizer.scale_loss

    def step(micro_batches: list[dict]) -> list[dict]:
        train.zero_gradients(wrapped, optimizer)
        results = train.forward(
            wrapped, forward_step, micro_batches, micro_batch=o.micro_batch, sequence_length=sequence_length
        )
        train.update(optimizer, CLIP, train.reduce_gradients(optimizer))
        return results

    return step


def peer_step(
    o: train.TrainOptions, model: torch.nn.Module, loss: Callable, compiled: bool
) -> Callable[[], torch.Tensor]:
    """The same step by plain torch on one device. It returns the loss, still on the device. bf16: fp32 weights under
    autocast, as the library's trainers have them.

    loss(forward): the mean loss of a micro-batch, forward being the model to call.
    """
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, (o.beta1, o.beta2), weight_decay=o.weight_decay, fused=True)
    run, where = torch.compile(model) if compiled else model, device.current()

    def forward(*args, **kwargs):
        with torch.autocast(where.type, torch.bfloat16, enabled=o.precision == "bf16"):
            return run(*args, **kwargs)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), device=where)
        for _ in range(o.micro_batches):
            part = loss(forward) / o.micro_batches
            part.backward()
            total += part.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return total

    return step


def own_step_alone(o: train.TrainOptions, config, ours: Callable, batches_of: Callable) -> Callable[[], torch.Tensor]:
    """Our step in a process that is no rank of this job, as a step of a peer is called."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(device.BACKEND, init_method=f"file://{folder}/store", rank=0, world_size=1)
        parallel.initialize(o)
    step, batches = ours(o, config), batches_of(o, config)
    return lambda: torch.stack([r["loss"] for r in step(batches)]).sum() / o.micro_batches


def serve(pipe, build: Callable, compiled: bool) -> None:
    """What a contender's process runs: a step for each request, then its peak memory."""
    before, step = device.memory_gib(), None
    while pipe.recv():
        try:
            if step is None:
                step = build()
            seconds, loss = timed(step)
        except torch.OutOfMemoryError as error:
            pipe.send(f"does not fit: {error}".splitlines()[0])
            return
        except Exception as error:  # torch.compile fails at its first call, in as many ways as there are machines
            if not compiled:
                raise
            pipe.send(f"torch.compile does not work here: {type(error).__name__}: {error}".splitlines()[0])
            return
        pipe.send((seconds, float(loss)))
    pipe.send(device.memory_gib() - before)


class Contender:
    """A contender in a process of its own, asked for one step at a time. It has failed once `failure` says why."""

    def __init__(self, name: str, build: Callable, *, mine: bool = False, compiled: bool = False):
        """build: returns the step, in the other process. It must be a function of a module, or a partial of one."""
        self.name, self.mine, self.compiled = name + f" + {COMPILED}" * compiled, mine, compiled
        self.seconds, self.losses, self.memory, self.failure = [], [], None, None
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, build, compiled), daemon=True)
        self.process.start()
        theirs.close()  # so that a process that dies is noticed

    def step(self) -> None:
        if self.failure is None:
            self.pipe.send(True)
            answer = self.pipe.recv()
            if isinstance(answer, str):
                self.failure = answer
            else:
                self.seconds.append(answer[0])
                self.losses.append(answer[1])

    def finish(self) -> None:
        if self.failure is None:
            self.pipe.send(False)
            self.memory = self.pipe.recv()
        self.process.join()


def step(
    o: train.TrainOptions,
    config,
    workload: Workload,
    *,
    ours: Callable,
    batches_of: Callable,
    peer: Callable,
    compiled: bool,
) -> list[dict]:
    """The rows of a training step of this model, of the peer's model, and where `compiled` of both under torch.compile,
    all of them turn by turn on the same device. Several ranks measure ours under torch.compile with --compile.

    ours(o, config): our step, from `own_step`. batches_of(o, config): this rank's micro-batches of a step.
    peer(o, config, compiled): the peer's step, from `peer_step`. Another process imports all three by their names.
    """
    before = device.memory_gib()
    mine, batches = ours(o, config), batches_of(o, config)
    main, contenders = dist.get_rank() == 0, []
    if main and compiled and o.world == 1 and not o.compile:
        build = functools.partial(own_step_alone, dataclasses.replace(o, compile=True), config, ours, batches_of)
        contenders.append(Contender(OURS, build, mine=True, compiled=True))
    for also in (False, True)[: 1 + compiled] if main else ():
        build = functools.partial(peer, o, config, also)
        contenders.append(Contender(f"{workload.library} {version(workload.library)}", build, compiled=also))
    seconds, losses = [], []
    for _ in range(perf.WARMUP + o.repeats):
        dist.barrier()
        taken, results = timed(functools.partial(mine, batches))
        seconds.append(taken)
        losses.append(train.global_loss(o, results, False)[0])
        for contender in contenders:
            contender.step()
        dist.barrier()  # nobody computes while another does
    memory = device.memory_gib() - before
    for contender in contenders:
        contender.finish()
    return step_rows(o, workload, seconds, losses, memory, contenders) if main else []


def step_rows(
    o: train.TrainOptions, workload: Workload, seconds: list, losses: list, memory: float, contenders: list[Contender]
) -> list[dict]:
    """The rows of one `step`. What must not be recorded says why in `refused`. Plain is compared with plain, and compiled
    with compiled where ours was run so."""
    task, unit = "pretrain step", workload.unit
    versions = {"torch": torch.__version__, workload.library: version(workload.library)}
    peak = perf.peak_tflops(device.name(), o.precision)

    def measured(seconds: list, memory: float, samples: float, devices: int, raw: dict) -> dict:
        taken = perf.spread(seconds[perf.WARMUP :])
        tflops = 3 * workload.flops * samples / taken["median"] / devices / 1e12
        raw = {"step s": rounded(taken), "TFLOP/s/device": float(f"{tflops:.4g}"), "memory GiB": round(memory, 3)} | raw
        value = round(samples * workload.units / taken["median"], workload.digits)
        mfu = round(tflops / peak, 4) if peak else None
        return {"task": task, "unit": unit, "value": value, "mfu": mfu, "raw": raw | versions}

    mine = measured(seconds, memory, o.global_batch, o.world, {"first loss": losses[0]})
    rows, alike = [mine], {o.compile: (seconds, memory, o.world)}
    for contender in contenders:
        who = {"task": task, "unit": unit, "system": contender.name}
        who |= {} if contender.mine else {"devices": 1, "layout": None}
        ratio = {"task": f"{task}, ratio to {workload.library}" + f" + {COMPILED}" * contender.compiled}
        ratio |= {"unit": "x per device"}
        if contender.failure:
            rows.append(who | {"refused": contender.failure})
            continue
        apart = abs(contender.losses[0] - losses[0]) / abs(losses[0])
        if not apart <= LOSS_BOUND[o.precision]:
            why = (
                f"its first loss is {contender.losses[0]:.8g}, ours {losses[0]:.8g}: {apart:.1e} apart, expected at most "
                f"{LOSS_BOUND[o.precision]:.0e} in {o.precision}; these are not the same step"
            )
            rows += [who | {"refused": why}, ratio | {"system": OURS, "refused": why}]
            if not contender.compiled:
                mine["refused"] = why.replace("its first loss", f"the first loss of {contender.name}")
            continue
        raw = {"first step s": float(f"{contender.seconds[0]:.4g}"), "loss apart": float(f"{apart:.1e}")}
        rows.append(measured(contender.seconds, contender.memory, o.global_batch / o.dp, 1, raw) | who)
        if contender.mine:
            alike[True] = (contender.seconds, contender.memory, 1)
            continue
        compiled = contender.compiled if contender.compiled in alike else o.compile
        ours_seconds, ours_memory, devices = alike[compiled]
        pairs = zip(contender.seconds[perf.WARMUP :], ours_seconds[perf.WARMUP :], strict=True)
        value = round(statistics.median(theirs / s for theirs, s in pairs) * o.dp / devices, 3)  # turn by turn
        raw = {"memory ratio": round(ours_memory / contender.memory, 3)}
        rows.append(ratio | {"system": OURS + f" + {COMPILED}" * compiled, "value": value, "raw": raw})
    return rows


# --------------------------------------------------------------------------------------------------------------- run


def user_environment() -> dict[str, str]:
    """This process's environment without what torchrun added."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "OMP_", "ZOO_COMMAND")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {"ZOO_PYTHON": sys.executable}


def time_help(launcher: Path, times: int = 3) -> list[float]:
    """Seconds that a launcher takes for --help."""
    command = ["bash", str(launcher), "--help"]
    return [
        timed(lambda: subprocess.run(command, env=user_environment(), check=True, stdout=subprocess.DEVNULL))[0]
        for _ in range(times)
    ]


def run_launcher(launcher: Path, out: Path, *options: str) -> tuple[float, list[dict]]:
    """Train as a user does. Returns the seconds until the first step is in metrics.jsonl, and the rows of the steps after
    the fifth.

    Raises:
        RuntimeError: the run failed; with the end of its log.
    """
    command, log = ["bash", str(launcher), *options, "--out", str(out)], out.with_name(f"{out.name}.log")
    metrics, first, start = out / "metrics.jsonl", None, time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=user_environment(), stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if first is None and metrics.is_file() and '"kind": "step"' in metrics.read_text():
                first = time.perf_counter() - start
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return first, perf.steady_rows(perf.read_metrics(metrics)[1], warmup=5)


# -------------------------------------------------------------------------------------------------------------- load


def unsplit(o: train.TrainOptions) -> train.TrainOptions:
    """The options with the whole model on one rank: the layout with the most to read."""
    layout = {"tp": 1, "sp": False, "pp": 1, "vpp": 1, "stages": "", "cp": 1, "ep": 1, "etp": 1, "fsdp": False}
    return dataclasses.replace(o, **layout)


class PeakMemory:
    """The largest anonymous memory of this process while inside, in bytes: mapped files do not count."""

    def __enter__(self):
        self.peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def __exit__(self, *args) -> None:
        self._done.set()
        self._thread.join()


def forget(files: list[Path]) -> None:
    """Make the kernel drop the files' pages, so that the next read is from disk."""
    for file in files:
        with open(file, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(files: list[Path]) -> None:
    """The peer of loading."""
    buffer = bytearray(2**24)
    for file in files:
        with open(file, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def copy_files(files: list[Path], target: Path) -> None:
    """The peer of converting."""
    target.mkdir()
    for file in files:
        with open(file, "rb", buffering=0) as f, open(target / file.name, "wb", buffering=0) as copy:
            shutil.copyfileobj(f, copy, 2**24)


def race(works: dict[str, Callable[[], None]], files: list[Path], made: Path | None = None) -> tuple[dict, dict]:
    """Five turns of every work on the files, which are read from disk each time. By work: GB of the files per second, and
    bytes of memory beyond what the process held before. The folder `made` is removed after each turn."""
    total = sum(file.stat().st_size for file in files)
    rates, extras = ({name: [] for name in works} for _ in range(2))
    for _ in range(5):  # turn by turn: a disk's rate wanders
        for name, work in works.items():
            forget(files)
            before, start = PeakMemory.now(), time.perf_counter()
            with PeakMemory() as memory:
                work()
            rates[name].append(total / (time.perf_counter() - start) / 1e9)
            extras[name].append(max(0, memory.peak - before))
            if made:
                shutil.rmtree(made, ignore_errors=True)
    return rates, extras


def load(o: train.TrainOptions, size: str, chunks: list[torch.nn.Module], table: release.Table) -> list[dict]:
    """The rows of a released folder of constant weights in bf16: loaded into a model, and written to another folder,
    against reading and copying the same files.

    chunks: the whole model on the CPU, in bf16, see `unsplit`.
    """
    largest = max(p.numel() * p.element_size() for p in chunks[0].parameters())
    halves = release.Source(lambda name: 2, lambda name: torch.full(table.shapes[name], 0.5, dtype=torch.bfloat16))
    with tempfile.TemporaryDirectory(dir=o.out.parent if o.out.parent.is_dir() else None) as folder:
        target, again = Path(folder) / "released", Path(folder) / "again"
        release.write(target, table, halves)
        files = sorted(target.glob("*.safetensors"))
        for p in chunks[0].parameters():
            p.data.zero_()  # its pages exist before the clock starts
        works = {
            "reading": lambda: read_files(files),
            "loading": lambda: release.load(chunks, table.entries(target), table),
            "copying": lambda: copy_files(files, again),
            "converting": lambda: release.write(again, table, release.open_source(target, table)),
        }
        rates, extras = race(works, files, made=again)
    rows, same = [], {"size": size, "layout": None, "precision": "bf16", "shape": None, "devices": 1}
    for mine, theirs in (("loading", "reading"), ("converting", "copying")):
        ratio = median_ratio(rates[mine], rates[theirs])
        raw = {f"{name} GB/s": rounded(perf.spread(rates[name])) for name in (mine, theirs)}
        task, extra = f"released weights, {mine}", round(max(extras[mine]) / largest, 3)
        rows += [
            same | {"task": task, "value": ratio, "unit": f"x {theirs} the files", "raw": raw},
            same | {"task": f"{task}, memory", "value": extra, "unit": "x largest tensor",
                    "raw": {"largest tensor MiB": round(largest / 2**20, 1)}},
        ]  # fmt: skip
    return rows


def median_ratio(mine: list[float], theirs: list[float]) -> float:
    """The median of the ratios turn by turn."""
    return round(statistics.median(a / b for a, b in zip(mine, theirs, strict=True)), 3)
