"""Tests the harness of the benchmarks: contenders in their own processes, the rows of a step, refused rows, and the
rates of file reading."""

import functools
import multiprocessing
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import wan_case
from ranks import forkserver

from common import bench, perf

pytestmark = pytest.mark.L1

LIBRARY = "megatron-core"  # any installed library, for its version; its model is not used

# -------------------------------------------------------------------------------------------------------- contenders


def step_of(loss: float):
    return lambda: torch.tensor(loss)


def fails_at_its_second_step(error: Exception):
    losses = iter([2.0])

    def step() -> torch.Tensor:
        for loss in losses:
            return torch.tensor(loss)
        raise error

    return step


def without_room():
    raise torch.OutOfMemoryError("tried to allocate 9 GiB\nof which some is in use")


def order_of_imports():
    """Returns a step whose loss is 1 if this process imported the device before megatron, else 0: megatron-core compiles
    its functions at once if the device was not there."""
    from megatron.core.fusions.fused_bias_swiglu import swiglu

    return step_of(float("common.device" in sys.modules and not hasattr(swiglu, "_torchdynamo_orig_callable")))


@pytest.fixture
def imported(monkeypatch):
    """Forks contenders from a process that has imported everything, instead of starting new ones."""
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda method: forkserver)


def asked(*args, steps: int = 3, **kwargs) -> bench.Contender:
    contender = bench.Contender("name", *args, **kwargs)
    for _ in range(steps):
        contender.step()
    contender.finish()
    return contender


def test_contender_imports_the_device_before_megatron_and_tells_seconds_losses_and_memory():
    result = asked(order_of_imports)
    assert result.losses == [1.0] * 3 and len(result.seconds) == 3 and min(result.seconds) > 0
    assert result.failure is None and result.memory >= 0 and result.process.exitcode == 0


def test_contender_without_room_says_so_and_the_others_go_on(imported):
    at_start = asked(without_room)
    assert at_start.failure == "does not fit: tried to allocate 9 GiB" and at_start.memory is None
    at_second_step = asked(functools.partial(fails_at_its_second_step, torch.OutOfMemoryError("9 GiB")), compiled=True)
    assert at_second_step.failure == "does not fit: 9 GiB" and at_second_step.losses == [2.0]


def test_failure_of_the_compiler_and_of_the_plain_peer_are_said_apart(imported):
    failing = functools.partial(fails_at_its_second_step, RuntimeError("no C++ compiler\nand more"))
    result = asked(failing, compiled=True)
    assert result.name == "name + torch.compile"
    assert result.failure == "torch.compile does not work here: RuntimeError: no C++ compiler"
    assert asked(failing).failure == "fails: RuntimeError: no C++ compiler"


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_contender_whose_process_is_killed_says_so_and_the_others_go_on(imported):
    result = asked(killed)
    assert result.failure == "its process was killed by SIGKILL; memory may have run out" and result.memory is None


# ------------------------------------------------------------------------------------------------------- rows of a step

FACTS = {"model": "Toy", "size": "tiny", "shape": "1 x 2", "precision": "fp32", "system": bench.OURS, "devices": 1}
FACTS |= {"hardware": "a CPU", "commit": "0123456789ab"}


def contender(compiled=False, losses=(2.0,), failure=None, mine=False, seconds=(0.4,)) -> SimpleNamespace:
    name = (bench.OURS if mine else f"{LIBRARY} 0") + f" + {bench.COMPILED}" * compiled
    return SimpleNamespace(name=name, mine=mine, compiled=compiled, seconds=[9.0, 9.0, 9.0, *seconds],
                           losses=list(losses), memory=1.0, failure=failure, warmup=3)  # fmt: skip


def rows_of(*contenders, seconds=(0.2,), own_failure=None, **options) -> list[dict]:
    o = SimpleNamespace(**{"precision": "fp32", "compile": False, "global_batch": 4, "world": 1, "dp": 1} | options)
    workload = bench.Workload(library=LIBRARY, unit="SPS", units=1, digits=3, flops=10**9)
    own = bench.Own([9.0, 9.0, 9.0, *seconds], [2.0], 0.5, own_failure)
    return bench.step_rows(o, workload, own, list(contenders))


def test_step_rows_are_ours_every_peer_and_the_ratios():
    rows = rows_of(contender(), contender(compiled=True, losses=[2.00001]))
    assert [r["value"] for r in rows] == [20.0, 10.0, 2.0, 10.0, 2.0]
    assert rows[1]["raw"]["loss apart"] == 0 and rows[3]["raw"]["loss apart"] == pytest.approx(5e-6)
    assert rows[2]["raw"]["memory ratio"] == 0.5
    assert rows[4]["task"] == f"pretrain step, ratio to {LIBRARY} + torch.compile"


def test_ratio_is_the_median_of_the_turns():
    mine, theirs, ratio = rows_of(contender(seconds=(4.0, 2.0, 3.0)), seconds=(1.0, 2.0, 3.0))
    assert (mine["value"], theirs["value"], ratio["value"]) == (2.0, 1.333, 1.0)  # the medians' ratio is 1.5


def test_compiled_peer_is_compared_with_ours_compiled_where_that_ran():
    mine = contender(mine=True, compiled=True, seconds=(0.1,))
    rows = rows_of(mine, contender(), contender(compiled=True))
    assert [r["value"] for r in rows] == [20.0, 40.0, 10.0, 2.0, 10.0, 4.0]
    assert [r["system"] for r in (rows[3], rows[5])] == [bench.OURS, f"{bench.OURS} + {bench.COMPILED}"]
    mine.failure = "does not fit"
    rows = rows_of(mine, contender(), contender(compiled=True))
    assert rows[5]["value"] == 2.0 and rows[5]["system"] == bench.OURS
    rows = rows_of(contender(), contender(compiled=True), compile=True)
    assert [r["system"] for r in (rows[2], rows[4])] == [f"{bench.OURS} + {bench.COMPILED}"] * 2


def test_ratio_is_per_device():
    mine, theirs, ratio = rows_of(contender(), seconds=(0.1,), world=8, dp=2)
    assert (mine["value"], theirs["value"], ratio["value"]) == (40.0, 5.0, 1.0)


def test_contender_with_another_loss_is_refused_and_so_are_we_beside_it():
    mine, theirs, ratio = rows_of(contender(losses=[2.0001]))
    assert all("5.0e-05 apart, expected at most 1e-05" in row["refused"] for row in (mine, theirs, ratio))
    assert not any("refused" in row for row in rows_of(contender(losses=[2.0001]), precision="bf16"))


def test_loss_that_is_not_a_number_is_refused():
    assert all("refused" in row for row in rows_of(contender(losses=[float("nan")])))


def test_peers_are_measured_where_our_step_does_not_fit():
    mine = contender(mine=True, compiled=True, seconds=(0.1,))
    rows = rows_of(contender(), mine, contender(compiled=True), own_failure="does not fit: 9 GiB")
    assert rows[0] == {"task": "pretrain step", "unit": "SPS", "refused": "does not fit: 9 GiB"}
    assert [r["value"] for r in rows[1:]] == [10.0, 40.0, 10.0, 4.0]  # no ratio for the plain peer
    apart = rows_of(contender(), contender(compiled=True, losses=[3.0]), own_failure="does not fit: 9 GiB")
    assert apart[0]["refused"] == "does not fit: 9 GiB" and "refused" not in apart[1] and "refused" in apart[2]


@pytest.mark.parametrize(("step", "repeats", "steps"), [(0.1, 20, 23), (2.0, 20, 7), (9.0, 20, 5), (9.0, 2, 4)])
def test_steps_are_at_least_three_at_most_the_repeats_and_else_fit_the_budget(step, repeats, steps):
    """2 s and 9 s are over a tenth of a budget of 10 s: two steps of warm-up, not three."""
    seconds = []
    while bench.goes_on(seconds, repeats, budget=10.0):
        seconds.append(step if seconds else 99.0)
    assert len(seconds) == steps and bench.warmup(seconds, 10.0) == (3 if step == 0.1 else 2)


def toy_ours(o, config):
    if config == "large":
        without_room()
    return lambda batches: [{"loss": torch.tensor(2.0)} for _ in batches]


def toy_batches(o, config):
    return [{}] * o.micro_batches


def toy_peer(o, config, compiled):
    return killed() if compiled else step_of(2.0)


@pytest.mark.parametrize("config", ["small", "large"])
def test_contenders_that_run_one_after_another_give_their_rows_as_they_come(config, imported, monkeypatch):
    """The last one is killed, and at another size ours has no room."""
    o = wan_case.options()
    object.__setattr__(o, "repeats", 1)
    monkeypatch.setattr(bench, "takes_turns", lambda o: False)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    workload = bench.Workload(library=LIBRARY, unit="SPS", units=1, digits=3, flops=10**9)
    rows = bench.step(o, config, workload, ours=toy_ours, batches_of=toy_batches, peer=toy_peer, compiled=True)
    mine, peer = next(rows), next(rows)
    assert len(multiprocessing.active_children()) == 2  # the compiled ones have not run yet
    assert ("refused" in mine) == (config == "large") and peer["value"] > 0
    rest = list(rows)
    if config == "large":
        assert [r["refused"][:12] for r in (mine, *rest)] == ["does not fit", "does not fit", "its process "]
    else:
        ratio, compiled, last = rest
        assert ratio["value"] > 0 and compiled["system"] == f"{bench.OURS} + {bench.COMPILED}" and compiled["value"] > 0
        assert last["refused"] == "its process was killed by SIGKILL; memory may have run out"


def test_rows_are_written_as_they_come(tmp_path):
    def cut_off():
        yield FACTS | rows_of()[0]
        raise KeyboardInterrupt

    (tmp_path / "perf.jsonl").write_text("")
    with pytest.raises(KeyboardInterrupt):
        bench.report(cut_off(), tmp_path, tmp_path / "perf.jsonl", append=True)
    assert len(perf.read(tmp_path / "rows.jsonl")) == len(perf.read(tmp_path / "perf.jsonl")) == 1


def test_refused_rows_are_printed_and_not_recorded(tmp_path, capsys):
    failed = contender(compiled=True, failure="torch.compile does not work here: no C++ compiler")
    rows, record = [FACTS | row for row in rows_of(failed)], tmp_path / "perf.jsonl"
    record.write_text("")
    bench.report(rows, tmp_path / "out", record, append=False)
    assert record.read_text() == ""
    bench.report(rows, tmp_path / "out", record, append=True)
    message = f"refused, not recorded: {LIBRARY} 0 + torch.compile: torch.compile does not work here"
    assert message in capsys.readouterr().out
    assert [r["system"] for r in perf.read(record)] == [bench.OURS]
    assert [r["system"] for r in perf.read(tmp_path / "out" / "rows.jsonl")] == [bench.OURS] * 2  # of both calls


# -------------------------------------------------------------------------------------------------------------- load


def test_race_gives_every_work_five_turns_and_clears_what_it_made(tmp_path):
    files, made, turns = [tmp_path / "a", tmp_path / "b"], tmp_path / "made", []
    for file in files:
        file.write_bytes(bytes(2**20))

    def copy() -> None:
        bench.copy_files(files, made)
        turns.append([(made / file.name).read_bytes() == file.read_bytes() for file in files])

    works = {"reading": lambda: turns.append(bench.read_files(files)), "copying": copy}
    rates, extras = bench.race(works, files, made)
    assert turns == [None, [True, True]] * 5 and not made.exists()
    assert all(len(rates[name]) == len(extras[name]) == 5 and min(rates[name]) > 0 for name in works)
