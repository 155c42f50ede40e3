"""The benchmark harness. It measures our training step in turn with a peer's (another library's step), the launcher as
a user starts it, and the reading of released weights, and makes their rows of the performance record.

A recipe's perf.py chooses the benchmarks and provides the model, the micro-batches and the peer. This module measures
seconds, memory and ratios, and refuses rows that must not be recorded.

Each contender of a step runs in its own process, so that its memory is measured alone. Such a process imports this
module before anything else. On a CPU the contenders take turns, because its speed changes over time. On one accelerator
they run one after another, because two published sizes do not fit in its memory at once.
"""

import dataclasses
import datetime
import functools
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import device  # isort: skip  (before megatron)
import torch
import torch.distributed as dist

from common import checkpoint, jsonl, parallel, perf, release, runlog, train

CLIP = 1.0
LOSS_BOUND = {"fp32": 1e-5, "bf16": 2e-3}  # relative; bf16: the peer keeps fp32 weights, we round them
OURS, COMPILED = "this zoo", "torch.compile"
# What a benchmark's timed steps may take in all. They are at least FEWEST each, and at most --repeats.
SECONDS, FEWEST = 60.0 if device.KIND == "cpu" else 30.0, 3


def rounded(values: dict) -> dict:
    """Round the floats among the values to four significant digits."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}


def timed(step: Callable) -> tuple[float, Any]:
    """Call `step`; return its seconds and its result. The device's queue is empty before and after the call."""
    device.synchronize()
    start = time.perf_counter()
    result = step()
    device.synchronize()
    return time.perf_counter() - start, result


def warmup(seconds: list[float], budget: float = SECONDS) -> int:
    """Return how many first steps do not count: perf.WARMUP, or one fewer where a step takes over a tenth of the budget.
    The first step, which builds and compiles, decides nothing."""
    return perf.WARMUP - (len(seconds) > 1 and seconds[1] > budget / 10)


def goes_on(seconds: list[float], repeats: int, budget: float = SECONDS) -> bool:
    """Tell whether another step is to be timed, after steps that took these seconds."""
    timed = seconds[warmup(seconds, budget) :]
    return len(timed) < min(FEWEST, repeats) or (len(timed) < repeats and sum(timed) < budget)


def agreed(seconds: float) -> float:
    """Return rank 0's seconds on all ranks, so that all of them count the same steps."""
    shared = torch.tensor(seconds, device=device.current())
    dist.broadcast(shared, 0)
    return shared.item()


def facts(o: train.TrainOptions, *, model: str, size: str, shape: str) -> dict:
    """Return the fields that all rows of one call of perf.sh share. A row's own fields replace these."""
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


def report(rows: Iterable[dict], out: Path, record: Path, append: bool) -> None:
    """Print every row as it comes and, below a row of our step, the published rows of the same workload. Add the rows
    that are not refused to `out`/rows.jsonl at once, so that a run that is cut off loses none; `python -m common.perf
    --add` takes them on another machine. With append, also add them to the record (a recipe's perf.jsonl). All ranks
    call it, because making the rows is collective; only rank 0 reports them."""
    if dist.is_initialized() and dist.get_rank():
        for _ in rows:
            pass
        return
    out.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if "refused" in row:
            print(f"{row['task']:<34} refused, not recorded: {row['system']}: {row['refused']}", flush=True)
            continue
        print(f"{row['task']:<34} {row['value']:>10.4g} {row['unit']:<28} {row['system']} {row['raw']}", flush=True)
        if row["task"] == "pretrain step" and row["system"].startswith(OURS):
            print("\n".join("  " + line for line in perf.compare(row, record)), flush=True)
        jsonl.append(out / "rows.jsonl", [{"recipe": record.parent.name} | row])
        if append:
            perf.append(record, row)
    print(f"rows        {out / 'rows.jsonl'}")
    if append:
        print(f"recorded in {record}; render the tables with: python -m common.perf")


# -------------------------------------------------------------------------------------------------------------- step


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The facts about a model that the rows of its step need."""

    library: str  # the peer's library, e.g. "diffusers"
    unit: str  # the unit of the rate
    units: int  # units in one sample: 1 for samples per second, its tokens for tokens per second
    digits: int  # digits of the rate after the decimal point
    flops: int  # FLOPs of one sample's forward


def own_step(
    o: train.TrainOptions,
    chunks: list[torch.nn.Module],
    draw: Callable,
    block: type,
    forward_step: Callable,
    sequence_length: int,
) -> Callable[[list[dict]], list[dict]]:
    """Return our training step, a function of its micro-batches. It does what `train.train` does between preparing them
    and logging, and returns this rank's losses, still on the device.

    draw: fills one parameter, as `checkpoint.initialize` calls it; the peer's are drawn on the same device, as a host
    would take minutes for a published size. block, forward_step, sequence_length: as `parallel.wrap` and `train.forward`
    take them.
    """
    checkpoint.initialize(chunks, o.seed, draw, drawn_on=device.current())
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
    """Return the peer's training step: the same step in plain torch on one device. It returns the loss, still on the
    device. In bf16 the weights are fp32 under autocast, as in the library's trainers.

    loss(forward): computes the mean loss of a micro-batch with `forward`, which calls the model.
    """
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, (o.beta1, o.beta2), weight_decay=o.weight_decay, fused=True)
    run, current = torch.compile(model) if compiled else model, device.current()

    def forward(*args, **kwargs):
        with torch.autocast(current.type, torch.bfloat16, enabled=o.precision == "bf16"):
            return run(*args, **kwargs)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), device=current)
        for _ in range(o.micro_batches):
            part = loss(forward) / o.micro_batches
            part.backward()
            total += part.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return total

    return step


def own_step_alone(o: train.TrainOptions, config, ours: Callable, batches_of: Callable) -> Callable[[], torch.Tensor]:
    """Build our step in a process that is not a rank of this job. It takes no arguments, like a peer's step."""
    dist.init_process_group(device.BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    parallel.initialize(o)
    step, batches = ours(o, config), batches_of(o, config)
    return lambda: torch.stack([r["loss"] for r in step(batches)]).sum() / o.micro_batches


def serve(pipe, build: Callable, compiled: bool) -> None:
    """Run a contender's process: one step for each request, then send by how many GiB its peak memory grew."""
    before, step = device.memory_gib(), None
    while pipe.recv():
        try:
            if step is None:
                step = build()
            seconds, loss = timed(step)
        except Exception as error:  # torch.compile fails at its first call, with errors that depend on the machine
            what = f"{COMPILED} does not work here" if compiled else "fails"
            reason = f"{what}: {type(error).__name__}: {error}"
            if device.is_out_of_memory(error):
                reason = f"does not fit: {error}"
            elif not compiled:
                traceback.print_exc()
            pipe.send(reason.splitlines()[0])
            return
        pipe.send((seconds, float(loss)))
    pipe.send(device.memory_gib() - before)


class Contender:
    """A contender in its own process, which runs one step per request. `failure` is None, or says why it failed."""

    def __init__(self, name: str, build: Callable, *, mine: bool = False, compiled: bool = False):
        """build: returns the step; it is called in the other process, so it must be a module's function or a partial of
        one. mine: the step is ours, not a peer's."""
        self.name, self.mine, self.compiled = name + f" + {COMPILED}" * compiled, mine, compiled
        self.seconds, self.losses, self.memory, self.failure, self.warmup = [], [], None, None, perf.WARMUP
        context = multiprocessing.get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=serve, args=(other_end, build, compiled), daemon=True)
        self.process.start()
        other_end.close()  # then `recv` fails here, and does not wait, when the process dies

    def ask(self, request: bool):
        """Return the process's answer. None: it has ended without one, and `failure` says how."""
        try:
            self.pipe.send(request)
            return self.pipe.recv()
        except (EOFError, OSError):  # OSError: a broken pipe
            self.process.join()
            code = self.process.exitcode
            ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            self.failure = f"its process {ended}" + "; memory may have run out" * (code == -signal.SIGKILL)

    def step(self) -> None:
        if self.failure is None:
            answer = self.ask(True)
            if isinstance(answer, str):
                self.failure = answer
            elif answer is not None:
                self.seconds.append(answer[0])
                self.losses.append(answer[1])

    def run(self, repeats: int, budget: float) -> None:
        """Run all steps, then end the process."""
        while self.failure is None and goes_on(self.seconds, repeats, budget):
            self.step()
        self.warmup = warmup(self.seconds, budget)
        self.finish()

    def finish(self) -> None:
        if self.failure is None:
            self.memory = self.ask(False)
        self.process.join()


@dataclass
class Own:
    """Our step in the ranks of this job, with the attributes of a contender that the rows need."""

    seconds: list[float]
    losses: list[float]
    memory: float | None = None
    failure: str | None = None
    warmup: int = perf.WARMUP


def takes_turns(o: train.TrainOptions) -> bool:
    """Tell whether the contenders of a step run by turns. Else they run one after another, ours first."""
    return device.KIND == "cpu" or o.world > 1


def step(
    o: train.TrainOptions,
    config,
    workload: Workload,
    *,
    ours: Callable,
    batches_of: Callable,
    peer: Callable,
    compiled: bool,
) -> Iterator[dict]:
    """Measure a training step of this model, of the peer's model and, with `compiled`, of both under torch.compile.
    Yield the rows as soon as nothing can refuse them. All steps run on the same device. With several ranks, ours runs
    under torch.compile only if the whole job has --compile.

    ours(o, config): our step, from `own_step`. batches_of(o, config): this rank's micro-batches of a step.
    peer(o, config, compiled): the peer's step, from `peer_step`. Another process imports all three by their names.
    """
    is_main, contenders = dist.get_rank() == 0, []

    def add_ours(compiled: bool) -> Contender:
        alone = dataclasses.replace(o, compile=compiled or o.compile)
        return Contender(OURS, functools.partial(own_step_alone, alone, config, ours, batches_of), mine=True,
                         compiled=compiled)  # fmt: skip

    if is_main:
        name = f"{workload.library} {version(workload.library)}"
        build = functools.partial(peer, o, config)
        contenders.append(Contender(name, functools.partial(build, False)))
        if compiled and o.world == 1 and not o.compile:
            contenders.append(add_ours(compiled=True))
        if compiled:
            contenders.append(Contender(name, functools.partial(build, True), compiled=True))
    if takes_turns(o):
        own = run_turns(o, lambda: (ours(o, config), batches_of(o, config)), contenders)
        yield from step_rows(o, workload, own, contenders) if is_main else ()
        return
    own, done = add_ours(compiled=False), 0
    budget = SECONDS / (1 + len(contenders))
    own.run(o.repeats, budget)
    for i, contender in enumerate(contenders):
        contender.run(o.repeats, budget)
        rows = step_rows(o, workload, own, contenders[: i + 1])
        yield from rows[done:]
        done = len(rows)


def run_turns(o: train.TrainOptions, build: Callable[[], tuple], contenders: list[Contender]) -> Own:
    """Run our step, which `build` returns with its micro-batches, on all ranks, and those of the contenders, of which
    only rank 0 has any, by turns."""
    before, result, turns = device.memory_gib(), Own([], []), []
    own, batches = build()
    while goes_on(turns, o.repeats):
        dist.barrier()
        start = time.perf_counter()
        elapsed, results = timed(functools.partial(own, batches))
        result.seconds.append(elapsed)
        result.losses.append(train.global_loss(o, results, False)[0])
        for contender in contenders:
            contender.step()
        dist.barrier()  # our ranks wait while the contenders compute
        turns.append(agreed(time.perf_counter() - start))
    result.memory, result.warmup = device.memory_gib() - before, warmup(turns)
    for contender in contenders:
        contender.warmup = result.warmup
        contender.finish()
    return result


def step_rows(
    o: train.TrainOptions, workload: Workload, own: Own | Contender, contenders: list[Contender]
) -> list[dict]:
    """Return the rows of one `step`. A row that must not be recorded has the reason under `refused`. A plain peer is
    compared with our plain step and a compiled one with our compiled step; if ours ran in one way only, with that."""
    task, unit = "pretrain step", workload.unit
    versions = {"torch": torch.__version__, workload.library: version(workload.library)}
    peak = perf.peak_tflops(device.name(), o.precision)

    def measured(ran: Own | Contender, samples: float, devices: int, raw: dict) -> dict:
        stats = perf.spread(ran.seconds[ran.warmup :])
        tflops = 3 * workload.flops * samples / stats["median"] / devices / 1e12
        raw = {"memory GiB": round(ran.memory, 3)} | raw
        raw = {"step s": rounded(stats), "TFLOP/s/device": float(f"{tflops:.4g}")} | raw
        value = round(samples * workload.units / stats["median"], workload.digits)
        mfu = round(tflops / peak, 4) if peak else None
        return {"task": task, "unit": unit, "value": value, "mfu": mfu, "raw": raw | versions}

    if own.failure:
        own_row, own_runs = {"task": task, "unit": unit, "refused": own.failure}, {}
    else:
        own_row = measured(own, o.global_batch, o.world, {"first loss": own.losses[0]})
        own_runs = {o.compile: (own, o.world)}  # by whether it was compiled
    rows = [own_row]
    first_loss = next((ran.losses[0] for ran in (own, *contenders) if not ran.failure), None)
    for contender in contenders:
        labels = {"task": task, "unit": unit, "system": contender.name}
        labels |= {} if contender.mine else {"devices": 1, "layout": None}
        ratio = {"task": f"{task}, ratio to {workload.library}" + f" + {COMPILED}" * contender.compiled}
        ratio |= {"unit": "x per device"}
        if contender.failure:
            rows.append(labels | {"refused": contender.failure})
            continue
        gap = abs(contender.losses[0] - first_loss) / abs(first_loss)
        if not gap <= LOSS_BOUND[o.precision]:
            reason = (
                f"its first loss is {contender.losses[0]:.8g}, {'the first' if own.failure else 'ours'} {first_loss:.8g}: "
                f"{gap:.1e} apart, expected at most {LOSS_BOUND[o.precision]:.0e} in {o.precision}; these are not the "
                "same step"
            )
            rows += [labels | {"refused": reason}, ratio | {"system": OURS, "refused": reason}]
            if not contender.compiled and not own.failure:
                own_row["refused"] = reason.replace("its first loss", f"the first loss of {contender.name}")
            continue
        raw = {"first step s": float(f"{contender.seconds[0]:.4g}"), "loss apart": float(f"{gap:.1e}")}
        rows.append(measured(contender, o.global_batch / o.dp, 1, raw) | labels)
        if contender.mine:
            own_runs[True] = (contender, 1)
        elif own_runs:
            compiled = contender.compiled if contender.compiled in own_runs else next(iter(own_runs))
            mine, devices = own_runs[compiled]
            value = round(_times_faster(mine, contender, takes_turns(o)) * o.dp / devices, 3)
            raw = {"memory ratio": round(mine.memory / contender.memory, 3)}
            rows.append(ratio | {"system": OURS + f" + {COMPILED}" * compiled, "value": value, "raw": raw})
    return rows


def _times_faster(mine: Own | Contender, theirs: Contender, by_turns: bool) -> float:
    """Return the median of the turns' ratios, or if the two did not run by turns, the ratio of the medians."""
    seconds, peer_seconds = (ran.seconds[ran.warmup :] for ran in (mine, theirs))
    if by_turns:
        return statistics.median(b / a for a, b in zip(seconds, peer_seconds, strict=True))
    return statistics.median(peer_seconds) / statistics.median(seconds)


# --------------------------------------------------------------------------------------------------------------- run


def user_environment() -> dict[str, str]:
    """Return this process's environment without what the launcher and torchrun added, but with its Python."""
    added = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "OMP_", "ZOO_COMMAND")
    return {k: v for k, v in os.environ.items() if not k.startswith(added)} | {"ZOO_PYTHON": sys.executable}


def time_help(launcher: Path, times: int = 3) -> list[float]:
    """Run a launcher with --help several times and return the seconds of each run."""
    command = ["bash", str(launcher), "--help"]
    return [
        timed(lambda: subprocess.run(command, env=user_environment(), check=True, stdout=subprocess.DEVNULL))[0]
        for _ in range(times)
    ]


def run_launcher(launcher: Path, out: Path, *options: str) -> tuple[float, list[dict]]:
    """Train as a user does. Return the seconds until the first step is in metrics.jsonl, and the rows of the steps
    after the fifth.

    Raises:
        RuntimeError: the run failed; the message ends with the end of its log.
    """
    command, log = ["bash", str(launcher), *options, "--out", str(out)], out.with_name(f"{out.name}.log")
    metrics, first_step, start = out / "metrics.jsonl", None, time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=user_environment(), stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if first_step is None and metrics.is_file() and '"kind": "step"' in metrics.read_text():
                first_step = time.perf_counter() - start
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return first_step, perf.steady_rows(perf.read_metrics(metrics)[1], warmup=5)


# -------------------------------------------------------------------------------------------------------------- load


def unsplit(o: train.TrainOptions) -> train.TrainOptions:
    """Return the options with the whole model on one rank: the layout in which a rank reads the most weights."""
    layout = {"tp": 1, "sp": False, "pp": 1, "vpp": 1, "stages": "", "cp": 1, "ep": 1, "etp": 1, "fsdp": False}
    return dataclasses.replace(o, **layout)


class PeakMemory:
    """Context that records this process's largest anonymous memory, in bytes. Memory-mapped files do not count."""

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
    """Make the kernel drop the files' pages, so that the next read comes from disk."""
    for file in files:
        with open(file, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(files: list[Path]) -> None:
    """Read the files and keep nothing: the peer of loading."""
    buffer = bytearray(2**24)
    for file in files:
        with open(file, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def copy_files(files: list[Path], target: Path) -> None:
    """Copy the files to a new folder: the peer of converting."""
    target.mkdir()
    for file in files:
        with open(file, "rb", buffering=0) as f, open(target / file.name, "wb", buffering=0) as copy:
            shutil.copyfileobj(f, copy, 2**24)


def race(works: dict[str, Callable[[], None]], files: list[Path], made: Path | None = None) -> tuple[dict, dict]:
    """Run each of the works (name -> function) in turn on the files, which are read from disk each time: five times, or
    on a slow disk as often as the time budget allows. Return two dicts by name: GB of the files per second, and bytes of
    memory beyond what the process held before. The folder `made` is removed after each run."""
    total = sum(file.stat().st_size for file in files)
    rates, extras = ({name: [] for name in works} for _ in range(2))
    start_all = time.perf_counter()
    for turn in range(5):  # in turn, because a disk's rate changes over time
        if turn >= FEWEST and time.perf_counter() - start_all > SECONDS:
            break
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
    """Write a released folder of constant bf16 weights, and measure loading it into a model and writing it to another
    folder, against reading and copying the same files. Return the rows.

    chunks: the whole model on the CPU, in bf16, see `unsplit`.
    """
    largest = max(p.numel() * p.element_size() for p in chunks[0].parameters())
    constant = release.Source(lambda name: 2, lambda name: torch.full(table.shapes[name], 0.5, dtype=torch.bfloat16))
    with tempfile.TemporaryDirectory(dir=o.out.parent if o.out.parent.is_dir() else None) as folder:
        released, copy = Path(folder) / "released", Path(folder) / "again"
        release.write(released, table, constant)
        files = sorted(released.glob("*.safetensors"))
        for p in chunks[0].parameters():
            p.data.zero_()  # allocates its pages before the clock starts
        works = {
            "reading": lambda: read_files(files),
            "loading": lambda: release.load(chunks, table.entries(released), table),
            "copying": lambda: copy_files(files, copy),
            "converting": lambda: release.write(copy, table, release.open_source(released, table)),
        }
        rates, extras = race(works, files, made=copy)
    rows, shared = [], {"size": size, "layout": None, "precision": "bf16", "shape": None, "devices": 1}
    for work, peer in (("loading", "reading"), ("converting", "copying")):
        ratio = median_ratio(rates[work], rates[peer])
        raw = {f"{name} GB/s": rounded(perf.spread(rates[name])) for name in (work, peer)}
        task, extra = f"released weights, {work}", round(max(extras[work]) / largest, 3)
        rows += [
            shared | {"task": task, "value": ratio, "unit": f"x {peer} the files", "raw": raw},
            shared | {"task": f"{task}, memory", "value": extra, "unit": "x largest tensor",
                      "raw": {"largest tensor MiB": round(largest / 2**20, 1)}},
        ]  # fmt: skip
    return rows


def median_ratio(mine: list[float], theirs: list[float]) -> float:
    """Return the median over the turns of `mine / theirs`."""
    return round(statistics.median(a / b for a, b in zip(mine, theirs, strict=True)), 3)
