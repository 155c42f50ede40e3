"""The profile of a run: a real one on CPU. The CUDA and Ascend readers are tested on traces that are written here in
those profilers' format."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import wan_case as case
from ranks import run_ranks

from common import parallel, perf, profiling, runlog
from common import train as loop

pytestmark = pytest.mark.L4

FIRST, LAST = 5, 10


def profiled_run(out: Path) -> None:
    """Runs ten steps of the tiny case on this rank and profiles the last six."""
    o = case.options(
        out=out, steps=LAST, profile_steps=f"{FIRST}-{LAST}", profile_ranks="0,1", resume="never", save_every=0
    )
    parallel.initialize(o)
    chunks = case.model.build(o, case.CONFIG)
    case.load(chunks, case.random_state())
    loop.train(
        o,
        parallel.wrap(chunks, o, case.model.WanBlock),
        case.train.forward_step,
        lambda start: iter(range(start, o.steps)),
        lambda step: case.my_batches(o, step),
        sequence_length=lambda batch: case.sequence_length(o),
        samples=lambda batch: (case.CONFIG.tokens(case.GRID), case.CONFIG.flops(case.GRID)),
        header=runlog.run_header(
            o, case.RECIPE, "pretrain", case.CONFIG.parameters, case.CONFIG.flops(case.GRID), "drawn weights"
        ),
        state={},
    )


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("profiled") / "run"
    run_ranks(2, profiled_run, out)
    return out


@pytest.mark.parametrize("rank", [0, 1])
def test_parts_communication_and_idle_add_up_to_the_step(rank, profiled):
    profile = profiling.breakdown(profiled / "profile" / f"rank{rank}.json")
    total = sum(profile["parts"].values()) + profile["communication"] + profile["idle"]
    assert total == pytest.approx(profile["step_ms"], rel=1e-6)
    assert profile["steps"] == LAST - FIRST + 1
    assert all(profile["parts"][name] > 0 for name in ("prepare", "forward", "backward", "optimizer"))
    assert profile["communication"] + profile["hidden"] > 0
    assert all(profile["host"][name] > 0 for name in profiling.PARTS)


def test_profiled_step_lasts_as_long_as_the_metrics_say(profiled):
    rows = perf.read_metrics(profiled / "metrics.jsonl")[1]
    times = [row["step_time_ms"] for row in rows if row.get("profiled")]
    assert len(times) == LAST - FIRST + 1
    profile = profiling.breakdown(profiled / "profile" / "rank0.json")
    # Two clocks measure the same steps. The trace ends with the last optimizer step: it lacks one of six loggings.
    assert profile["step_ms"] == pytest.approx(sum(times) / len(times), rel=0.1)


def test_table_names_the_parts_and_the_costliest_operators(profiled):
    table = (profiled / "profile" / "rank0.md").read_text()
    assert table in (profiled / "log.txt").read_text()
    parts, operators = table.split("| operator |")
    for name in (*profiling.PARTS, "the step"):
        assert f"| {name} |" in parts, name
    assert operators.count("aten::") + operators.count("gloo:") >= 3 and operators.count("\n") >= profiling.OPERATORS
    # On a busy machine communication may take a tiny model longer than attention; the trace has all operators.
    assert "scaled_dot_product" in (profiled / "profile" / "rank0.json").read_text()


def test_profiled_steps_are_not_in_the_steady_state(profiled):
    end = json.loads((profiled / "metrics.jsonl").read_text().splitlines()[-1])
    assert end["steady"]["window"] == f"steps {perf.WARMUP + 1}-{FIRST - 1}"


def test_a_range_waits_for_nothing(monkeypatch):
    def waits(*args, **kwargs):
        raise AssertionError("a range synchronised")

    monkeypatch.setattr(torch.cuda, "synchronize", waits)
    monkeypatch.setattr(profiling.device, "synchronize", waits)
    monkeypatch.setattr(dist, "barrier", waits)
    profiling.megatron_timer("forward-compute", log_level=2).start(barrier=True)
    with profiling.part("optimizer"):
        pass
    profiling.megatron_timer("forward-compute").stop()


def x(name: str, ts: float, dur: float, cat: str, tid: int = 1, **args) -> dict:
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "pid": 0, "tid": tid, "args": args}


def write(path: Path, events) -> Path:
    path.write_text(json.dumps(events))
    return path


def test_cpu_time_spent_waiting_for_a_rank_is_communication(tmp_path):
    """A Python function takes 300 us: it computes for 100 us, then waits for gloo's thread."""
    events = [
        x("zoo/data", 0, 100, "user_annotation"),
        x("zoo/forward", 100, 300, "user_annotation"),
        x("_RMSNorm", 100, 300, "cpu_op"),
        x("aten::linear", 100, 100, "cpu_op"),
        x("aten::addmm", 110, 80, "cpu_op"),
        x("gloo:all_reduce", 190, 190, "user_annotation", tid=2),
    ]
    profile = profiling.breakdown(write(tmp_path / "trace.json", {"traceEvents": events}))
    assert {name: ms for name, ms in profile["parts"].items() if ms} == pytest.approx({"forward": 0.1})
    assert (profile["communication"], profile["hidden"]) == (pytest.approx(0.18), pytest.approx(0.01))
    assert profile["idle"] == pytest.approx(0.12)
    times = {name: ms for name, _, ms in profile["operators"]}
    assert times == pytest.approx({"gloo:all_reduce": 0.19, "aten::addmm": 0.08, "aten::linear": 0.02})


def test_cuda_kernels_count_where_they_were_launched(tmp_path):
    """One step takes 1000 us. The backward's kernel runs while the host is already in the optimizer."""
    events = [
        x("zoo/data", 0, 100, "user_annotation"),
        x("zoo/forward", 100, 100, "user_annotation"),
        x("zoo/backward", 200, 100, "user_annotation"),
        x("zoo/optimizer", 300, 100, "user_annotation"),
        x("zoo/forward", 150, 400, "gpu_user_annotation", tid=7),
        x("cudaLaunchKernel", 150, 5, "cuda_runtime", correlation=1),
        x("cudaLaunchKernel", 250, 5, "cuda_runtime", correlation=2),
        x("cudaLaunchKernel", 260, 5, "cuda_runtime", correlation=3),
        x("cudaLaunchKernel", 350, 5, "cuda_runtime", correlation=4),
        x("gemm", 160, 200, "kernel", tid=7, correlation=1),  # 160-360
        x("gemm", 400, 300, "kernel", tid=7, correlation=2),  # 400-700, after 40 idle
        x("ncclDevKernel_AllReduce_Sum_bf16", 600, 200, "kernel", tid=8, correlation=3),  # 100 hidden, 100 not
        x("adam", 800, 200, "kernel", tid=7, correlation=4),  # 800-1000
    ]
    profile = profiling.breakdown(write(tmp_path / "trace.json", {"traceEvents": events}))
    assert profile["steps"] == 1 and profile["step_ms"] == pytest.approx(1.0)
    parts = {name: ms for name, ms in profile["parts"].items() if ms}
    assert parts == pytest.approx({"forward": 0.2, "backward": 0.3, "optimizer": 0.2})
    assert (profile["communication"], profile["hidden"]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert profile["idle"] == pytest.approx(0.2)  # 160 before the first kernel, 40 between
    assert profile["operators"][0] == ("gemm", 2.0, pytest.approx(0.5))


def test_ascend_tasks_count_where_their_torch_op_was(tmp_path):
    """torch_npu writes a bare list, times as strings, and links torch ops to tasks by flow events."""
    events = [
        {"ph": "M", "name": "process_name", "pid": 5, "tid": 0, "args": {"name": "Ascend Hardware"}},
        {"ph": "M", "name": "process_name", "pid": 6, "tid": 0, "args": {"name": "Communication"}},
        {"ph": "M", "name": "process_name", "pid": 8, "tid": 0, "args": {"name": "Overlap Analysis"}},
        x("zoo/data", "0.0", 100, "cpu_op"),
        x("zoo/backward", "100.0", 100, "cpu_op"),
        x("aten::mm", "110.0", 20, "cpu_op"),
        {"ph": "s", "name": "torch_to_npu", "id": 42, "pid": 0, "tid": 1, "ts": "110.0", "cat": "async_npu"},
        {"ph": "f", "name": "torch_to_npu", "id": 42, "pid": 5, "tid": 2, "ts": "300.0", "cat": "async_npu"},
        {"ph": "X", "name": "MatMulV2", "pid": 5, "tid": 2, "ts": "300.0", "dur": 150.0, "args": {}},
        {"ph": "X", "name": "EVENT_WAIT", "pid": 5, "tid": 3, "ts": "0.0", "dur": 500.0, "args": {}},
        {"ph": "X", "name": "hcom_allReduce__1_0", "pid": 6, "tid": 1, "ts": "400.0", "dur": 100.0, "args": {}},
        {"ph": "X", "name": "Communication", "pid": 8, "tid": 1, "ts": "400.0", "dur": 100.0, "args": {}},
    ]
    profile = profiling.breakdown(write(tmp_path / "trace.json", events))
    assert profile["step_ms"] == pytest.approx(0.5)
    assert {name: ms for name, ms in profile["parts"].items() if ms} == pytest.approx({"backward": 0.15})
    assert (profile["communication"], profile["hidden"]) == (pytest.approx(0.05), pytest.approx(0.05))
    assert profile["idle"] == pytest.approx(0.3)


def test_a_trace_without_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--profile-steps"):
        profiling.breakdown(write(tmp_path / "trace.json", []))
