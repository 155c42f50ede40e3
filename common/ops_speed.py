"""Self-test and speed table of `common.ops` on this device.

    python -m common.ops                  every op
    python -m common.ops --only rotary    those whose name contains "rotary"

A row has the op's errors (ops_check.py), and three times of forward and backward: of the op, of the same in plain torch,
and of that under torch.compile. Plain results are rounded to the op's dtypes. The rate that the op achieves follows from
the work that its case states. It stands beside a ceiling of this machine, measured before the first row: a copy in
memory for bytes, a matmul for FLOPs.

The inputs are drawn on the device. On an accelerator, matmuls keep it busy while the host queues the runs to be timed, so
a time is the device's own, without waiting for the host. torch.compile gets COMPILE_SECONDS for the whole table.
"""

import argparse
import itertools
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from common import device, ops
from common.ops_check import CASES, Case, Draw, gradients, self_test

MEDIUM = dict(L=1024, S=1024, B=1, H=8, K=4, E=64, D=512, F=1024, N=1024, G=8, TOP=2, V=8192, BLOCK=128)
LARGE = dict(L=8192, S=8192, B=1, H=16, K=8, E=128, D=2048, F=6144, N=8192, G=64, TOP=8, V=151936, BLOCK=128)
WARMUP, FEWEST, MOST, SECONDS = 3, 3, 20, 0.5  # runs before the clock starts, timed runs, and how long these may take
COMPILE_SECONDS = 60 if device.KIND == "cpu" else 40  # then the remaining rows have no time of torch.compile
LINE = "{:<38} {:<44} {:>10} {:>10} {:>9} {:>13} {:>11} {:>15} {:>10}"


@dataclass(frozen=True)
class Machine:
    """What this machine can do at most, as measured here."""

    bytes: float  # per second, read or written
    flops: float  # per second
    occupy: Callable[[], None]  # queues matmuls that take longer than the host needs to queue a few runs of an op


def measure_machine(dtype: torch.dtype, where: torch.device) -> Machine:
    """Times a large copy and a large matmul in the dtype of the table."""
    accelerated = device.KIND != "cpu"
    source = torch.zeros(2**30 if accelerated else 2**28, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3
    n = 8192 if accelerated else 2048
    a, out = torch.ones(n, n, dtype=dtype, device=where), torch.empty(n, n, dtype=dtype, device=where)
    multiplied = 2 * n**3 / milliseconds(lambda: torch.mm(a, a, out=out)) * 1e3

    def occupy() -> None:
        for _ in range(32 * accelerated):
            torch.mm(a, a, out=out)

    return Machine(copied, multiplied, occupy)


def milliseconds(run: Callable[[], object], occupy: Callable[[], None] = lambda: None) -> float:
    """Returns the median time of a run, after WARMUP runs or two slow ones. On an accelerator, events on the device are
    the clock."""
    for i in range(WARMUP):
        once = _seconds(run)
        if i and once > SECONDS:
            break
    count = min(MOST, max(FEWEST, int(SECONDS / once)))
    if device.KIND == "cpu":
        return statistics.median(_seconds(run) for _ in range(count)) * 1e3
    marks = [getattr(torch, device.KIND).Event(enable_timing=True) for _ in range(count + 1)]
    occupy()
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    device.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def _seconds(run: Callable[[], object]) -> float:
    device.synchronize()
    start = time.perf_counter()
    run()
    device.synchronize()
    return time.perf_counter() - start


def forward_and_backward(function: Callable, inputs: dict) -> Callable[[], None]:
    """Returns a function that computes the outputs, and the gradients for ones in their place."""
    directions: list[torch.Tensor] = []

    def run() -> None:
        outputs = function(**inputs)
        outputs = [*outputs] if isinstance(outputs, tuple) else [outputs]
        directions[:] = directions or [torch.ones_like(out) for out in outputs]
        gradients(outputs, directions, inputs)

    return run


def rounded_as_op(case: Case, inputs: dict) -> Callable:
    """Returns the plain version with results in the dtypes of the op's, so that both write as many bytes."""
    with torch.no_grad():
        outputs = case.op(**inputs)
    dtypes = [out.dtype for out in (outputs if isinstance(outputs, tuple) else (outputs,))]

    def plain(**inputs):
        outputs = case.plain(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(out.to(dtype) for out, dtype in zip(outputs, dtypes, strict=True))

    return plain


def time_or_reason(run: Callable[[], None], machine: Machine) -> float | str:
    """Returns the milliseconds of a run, or "out of memory"."""
    try:
        return milliseconds(run, machine.occupy)
    except (RuntimeError, MemoryError) as error:
        if not device.is_out_of_memory(error):
            raise
    if device.KIND != "cpu":  # after the except block, in which the error still holds tensors
        getattr(torch, device.KIND).empty_cache()
    return "out of memory"


def compiler_missing() -> str | None:
    """Returns what torch.compile lacks on this machine, or None."""
    if device.KIND != "cpu" and not find_spec("triton"):
        return "triton is not installed"
    variable, names = ("CXX", ("g++", "clang++", "c++")) if device.KIND == "cpu" else ("CC", ("gcc", "clang", "cc"))
    named = os.environ.get(variable)
    if any(shutil.which(name) for name in ([named] if named else names)):
        return None
    return f"no compiler is found ({named or ', '.join(names)}); fix: export {variable}=PATH"


def rate(case: Case, inputs: dict, milliseconds: float, machine: Machine) -> tuple[str, str]:
    """Returns the rate that an op achieves, with its unit, and its share of the machine's ceiling, as text."""
    if case.flops:
        done = case.flops(inputs) / milliseconds * 1e3
        return f"{done / 1e12:.3g} TFLOP/s", f"{done / machine.flops:.0%}"
    if case.traffic:
        first = next(iter(inputs.values()))
        done = case.traffic * first.numel() * first.element_size() / milliseconds * 1e3
        return f"{done / 1e9:.4g} GB/s", f"{done / machine.bytes:.0%}"
    return "-", "-"


class Compiler:
    """Times plain versions under torch.compile until COMPILE_SECONDS are spent. `notes` says what has no time, and why."""

    def __init__(self):
        missing = compiler_missing()
        self.left, self.notes = COMPILE_SECONDS, [missing] if missing else []
        self.is_missing = missing is not None

    def time(self, name: str, plain: Callable, inputs: dict, machine: Machine) -> float | str:
        if self.is_missing:
            return "refused"
        if self.left <= 0:
            self.notes.append(f"{name}: {COMPILE_SECONDS} s of compiling are spent; fix: --only")
            return "no time left"
        torch.compiler.reset()  # else every case counts as a recompilation of `plain`
        run = forward_and_backward(torch.compile(plain, dynamic=False), inputs)
        start = time.perf_counter()
        try:
            return time_or_reason(run, machine)
        except Exception as error:  # its errors depend on the machine
            self.notes.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
            return "failed"
        finally:
            self.left -= time.perf_counter() - start


def print_row(name: str, case: Case, machine: Machine, compiler: Compiler, draw: Draw) -> list[str]:
    """Tests and times a case, and prints its row. Returns what failed."""
    cells, failed = self_test(case, draw.where)
    inputs = case.make(draw)
    mine = time_or_reason(forward_and_backward(case.op, inputs), machine)
    achieved = ("-", "-") if isinstance(mine, str) else rate(case, inputs, mine, machine)
    times = [mine, "-", "-"]
    if not isinstance(mine, str):
        plain = rounded_as_op(case, inputs)
        times[1] = time_or_reason(forward_and_backward(plain, inputs), machine)
        times[2] = compiler.time(name, plain, inputs, machine) if case.compiles else "-"
    cells += [t if isinstance(t, str) else f"{t:.3f}" for t in times]
    print(LINE.format(name, case.backends[ops.BACKEND], *cells, *achieved), flush=True)
    return [f"{name} {what}" for what in failed]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m common.ops", description="Self-test and speed of every op.")
    parser.add_argument("--only", metavar="NAME", default="", help="only the ops whose name contains NAME")
    only = parser.parse_args().only
    cases = {name: case for name, case in CASES.items() if only in name}
    if not cases:
        parser.error(f"no op's name contains {only!r}; expected a part of one of {', '.join(CASES)}; fix: --only")
    where, sizes = device.current(), MEDIUM if device.KIND == "cpu" else LARGE
    dtype = torch.float32 if device.KIND == "cpu" else torch.bfloat16
    machine, compiler = measure_machine(dtype, where), Compiler()
    print(f"{device.name()}, torch {torch.__version__}, backend {ops.BACKEND}")
    print(
        f"ceilings, measured: {machine.bytes / 1e9:.4g} GB/s in a copy, {machine.flops / 1e12:.3g} TFLOP/s in a matmul"
    )
    print(f"error: largest, of the largest entry, forward and gradients, against fp64. speed: {dtype}, {sizes}")
    print("ms: forward and backward; plain: the same in plain torch; compiled: plain under torch.compile\n")
    heading = "op", "runs on", "error fp32", "error bf16", "ms", "plain ms", "compiled ms", "achieved", "of ceiling"
    print(LINE.format(*heading), flush=True)
    failed = []
    for name, case in cases.items():
        draw = Draw(sizes | case.fixed | {"L": sizes["L"]}, dtype, where, drawn_on=where)
        failed += print_row(name, case, machine, compiler, draw)
    if compiler.notes:
        print("\ntorch.compile: " + "\n               ".join(compiler.notes))
    if failed:
        sys.exit("\nfailed: " + "; ".join(failed))
