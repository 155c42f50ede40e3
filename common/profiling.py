"""Shows where a training step's time goes: --profile-steps writes a chrome trace and a table.

torch.profiler sees the CPU and CUDA. On an NPU torch_npu.profiler takes its place, because torch's does not see that
device. Both write a chrome trace, so one reader serves all three devices. The NPU path follows the trace format in
torch_npu 2.13's published sources and has not been run on an NPU.

Ranges name a step's parts: `part(...)` in common/train.py, and megatron-core's own marks around forward, backward and
gradient synchronisation (`megatron_timer`). A range is a note on the host and never waits for the device.
"""

import json
import re
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.distributed as dist

from common import device, perf
from common.cli import TrainOptions

PREFIX = "zoo/"
PARTS = ("data", "prepare", "forward", "backward", "gradients", "optimizer")
ELSEWHERE = "elsewhere"  # outside PARTS: the schedule, the read of the loss, logging
COMMUNICATION = re.compile(r"^(nccl|hcom|gloo|c10d::)", re.IGNORECASE)
CPU_OP = re.compile(r"(?!autograd::|torch::|FSDP::)\w+::")
OPERATORS = 20  # rows of the table of operators


def part(name: str) -> torch.profiler.record_function:
    """Returns a context manager that marks a range of the step as one of PARTS."""
    return torch.profiler.record_function(PREFIX + name)


class _Timer:
    def __init__(self, name: str):
        self.name = name

    def start(self, barrier: bool = False) -> None:
        """Opens the range. megatron-core's own timers would wait here for the device, and for all ranks."""
        self.range = part(self.name)
        self.range.__enter__()

    def stop(self) -> None:
        self.range.__exit__(None, None, None)


_TIMERS = {
    name: _Timer(part)
    for name, part in {
        "forward-compute": "forward",
        "backward-compute": "backward",
        "all-grads-sync": "gradients",
    }.items()
}


def megatron_timer(name: str, log_level: int = 0) -> _Timer:
    """Returns the timer that megatron-core gets by `config.timers(name)` around the pieces of its schedules."""
    return _TIMERS.setdefault(name, _Timer(name))


def profiler():
    """Starts and returns a profiler of this device; `write` ends it."""
    if device.KIND == "npu":
        import torch_npu

        started = torch_npu.profiler.profile()
    else:
        started = torch.profiler.profile()  # recording shapes as well would slow a CPU step down twice as much
    started.start()
    return started


class Window:
    """The steps of a run that are profiled: --profile-steps, on --profile-ranks."""

    def __init__(self, o: TrainOptions):
        self.steps, self.folder, self.first, self.last = o.profile_steps, o.out / "profile", -1, -1
        if o.profile_steps:
            first, _, last = o.profile_steps.partition("-")
            self.first, self.last = int(first) - 1, min(int(last or first), o.steps)
        self.here = dist.get_rank() in {int(rank) for rank in o.profile_ranks.split(",")}
        self.running = None

    def begin(self, step: int, began: float) -> float:
        """Starts the profiler if the step after `step` is the first profiled one. began: when that step began. Returns
        when it begins, which is after the start of the profiler."""
        if not self.here or self.running or not self.first <= step < self.last:
            return began
        self.running = profiler()
        return time.perf_counter()

    def mark(self, step: int) -> dict:
        """Returns what a step's row of metrics.jsonl says of the profiler."""
        return {"profiled": True} if self.first < step <= self.last else {}

    def end(self, step: int, rows: list[dict]) -> str:
        """Writes the profile after the last profiled step and returns its table, else "". rows: of the steps so far."""
        if not self.running or step != self.last:
            return ""
        running, self.running = self.running, None
        return write(running, self.folder, dist.get_rank(), self.steps, perf.steady(rows))


def write(profiler, folder: Path, rank: int, steps: str, baseline: dict | None) -> str:
    """Ends a profiler and writes rank<N>.json (chrome trace) and rank<N>.md (table) into `folder`. Returns the table.

    baseline: `perf.steady` of the earlier steps, without the profiler, which itself takes time: half of a step
    on a CPU.
    """
    device.synchronize()  # the last step's kernels belong to the profile
    profiler.stop()
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"rank{rank}.json"
    profiler.export_chrome_trace(str(trace))
    text = profile_table(trace, f"Steps {steps} on rank {rank}", device.name(), baseline)
    trace.with_suffix(".md").write_text(text)
    return text


def profile_table(trace: Path, title: str, hardware: str, baseline: dict | None = None) -> str:
    """Renders a chrome trace of whole steps as Markdown: the parts of a step, then the operators with the most time."""
    summary = breakdown(trace)
    wall = summary["step_ms"]

    def share(ms: float) -> str:
        return f"{ms:.2f} | {100 * ms / wall:.1f} %"

    lines = [f"{title}: {wall:.2f} ms a step, mean of {summary['steps']}", "", perf.figures(hardware), ""]
    if baseline:
        median = baseline["step_time_ms"]["median"]
        lines += [
            f"Without the profiler, {baseline['window']}: {median:.2f} ms a step. Read the shares, not the sums.",
            "",
        ]
    lines += ["| part of a step | operators run, ms | share | range on the host, ms |", "|---|---|---|---|"]
    lines += [f"| {name} | {share(ms)} | {summary['host'].get(name, 0):.2f} |" for name, ms in summary["parts"].items()]
    lines += [f"| communication, nothing else running | {share(summary['communication'])} | |"]
    lines += [f"| nothing running: waiting for the host | {share(summary['idle'])} | |"]
    lines += [f"| the step | {share(wall)} | |", ""]
    lines += [f"Communication behind other work: {summary['hidden']:.2f} ms a step.", ""]
    lines += ["| operator | calls a step | self time, ms a step | share |", "|---|---|---|---|"]
    lines += [f"| {name} | {calls:.1f} | {share(ms)} |" for name, calls, ms in summary["operators"]]
    return "\n".join(lines) + "\n"


def breakdown(trace: Path) -> dict:
    """Sums up where the steps of a chrome trace spent their time, in ms per step.

    Returns {"steps", "step_ms", "parts": time of operators by part, "communication": time in which only collectives
    run, "idle": time in which nothing runs, "hidden": time of collectives beside other work, "host": length of the
    parts' ranges on the host, "operators": [(name, calls, self time)]}. parts, communication and idle add up to
    step_ms: no instant is counted twice.

    Operators are the device's kernels, each in the part that launched it. On a CPU they are the ops themselves, and
    idle is the time outside them (Python, waiting for data).
    """
    events = json.loads(trace.read_text())
    events = events if isinstance(events, list) else events["traceEvents"]  # torch_npu writes the bare list
    done = [e | {"ts": float(e["ts"]), "end": float(e["ts"]) + float(e["dur"])} for e in events if e.get("ph") == "X"]
    host = [e for e in done if e.get("cat") in ("cpu_op", "user_annotation")]
    ranges = sorted(
        (e["ts"], e["end"], e["name"].removeprefix(PREFIX)) for e in host if e["name"] in {PREFIX + p for p in PARTS}
    )
    begins = [start for start, _, name in ranges if name == "data"]
    if not begins:
        raise ValueError(f"{trace} holds no step: no range named {PREFIX}data; fix: profile with --profile-steps")
    tasks = _cuda_tasks(done) or _npu_tasks(events, done) or _cpu_tasks(host)
    begin, end = begins[0], max([stop for _, stop, _ in ranges] + [e["end"] for _, e in tasks])

    def part_at(when: float) -> str:
        i = bisect_right(ranges, (when, float("inf"), "")) - 1
        return ranges[i][2] if i >= 0 and when <= ranges[i][1] else ELSEWHERE

    work, collectives, operators = [], [], defaultdict(lambda: [0, 0.0])
    for launched, task in tasks:
        start, stop = max(task["ts"], begin), min(task["end"], end)
        if stop < start or launched < begin:
            continue
        if COMMUNICATION.search(task["name"]):
            collectives.append((start, stop, "communication"))
        else:
            work.append((start, stop, part_at(launched)))
        operators[task["name"]][0] += 1
        operators[task["name"]][1] += task["self"]

    ms = 1e-3 / len(begins)  # microseconds of all steps -> ms of one
    parts, covered = _covered(work), sum(_covered(work + collectives).values())
    busy, communicating = sum(parts.values()), sum(_covered(collectives).values())
    lengths = Counter()
    for start, stop, name in ranges:
        lengths[name] += stop - start
    top = sorted(operators.items(), key=lambda item: -item[1][1])[:OPERATORS]
    return {
        "steps": len(begins),
        "step_ms": (end - begin) * ms,
        "parts": {name: parts[name] * ms for name in (*PARTS, ELSEWHERE)},
        "communication": (covered - busy) * ms,
        "hidden": (communicating + busy - covered) * ms,
        "idle": (end - begin - covered) * ms,
        "host": {name: length * ms for name, length in lengths.items()},
        "operators": [(name, calls / len(begins), time * ms) for name, (calls, time) in top],
    }


def _covered(intervals: list[tuple[float, float, str]]) -> Counter:
    """Returns the time that each label covers. Where intervals overlap, the one that began first gets the time."""
    total, until = Counter(), float("-inf")
    for start, stop, label in sorted(intervals):
        total[label] += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total


def _cuda_tasks(done: list[dict]) -> list[tuple[float, dict]]:
    """Returns (launch time, task) for every kernel and copy of a CUDA trace."""
    launches = {
        e["args"]["correlation"]: e["ts"]
        for e in done
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    kernels = [e for e in done if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return [(launches.get(e["args"].get("correlation"), e["ts"]), e | {"self": e["end"] - e["ts"]}) for e in kernels]


def _npu_tasks(events: list[dict], done: list[dict]) -> list[tuple[float, dict]]:
    """Does the same for an Ascend trace: tasks of its hardware that a torch op launched, and its collectives."""
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("ph") == "M" and e.get("name") == "process_name"}
    flows = [e for e in events if e.get("name") == "torch_to_npu"]
    starts = {e["id"]: float(e["ts"]) for e in flows if e["ph"] == "s"}
    launches = {(e["pid"], float(e["ts"])): starts[e["id"]] for e in flows if e["ph"] == "f" and e["id"] in starts}
    tasks = []
    for e in done:
        launched = launches.get((e["pid"], e["ts"]))
        collective = names.get(e["pid"]) == "Communication" and COMMUNICATION.search(e["name"])
        if launched is not None or collective:
            tasks.append((e["ts"] if launched is None else launched, e | {"self": e["end"] - e["ts"]}))
    return tasks


def _cpu_tasks(host: list[dict]) -> list[tuple[float, dict]]:
    """Does the same for a CPU trace: its ops. An op's self time leaves out the ops inside it on the same thread."""
    # Autograd's nodes, Python functions and FSDP's notes are left out: in those a thread also waits for other ranks.
    ops = [e for e in host if CPU_OP.match(e["name"]) or COMMUNICATION.search(e["name"])]
    open_ops: dict[tuple, list[dict]] = defaultdict(list)
    tasks = []
    for e in sorted(ops, key=lambda e: (e["ts"], -e["end"])):
        stack = open_ops[e["pid"], e["tid"]]
        while stack and stack[-1]["end"] <= e["ts"]:
            stack.pop()
        e = e | {"self": e["end"] - e["ts"]}
        if stack:
            stack[-1]["self"] -= e["self"]
        stack.append(e)
        tasks.append((e["ts"], e))
    return tasks
