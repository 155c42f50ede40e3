"""The loop of common/train.py on a tiny model: which steps are applied, the averaged weights, what a step's row holds,
and which checkpoints are kept. test_resume.py and the tests of each recipe run whole jobs."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import wan_case as case
from layouts import whole_weights
from ranks import run_ranks
from test_resume import tensors

from common import checkpoint, parallel, runlog
from common import train as loop

pytestmark = pytest.mark.L4

TOKENS, FLOPS, DECAY = 24, 7e9, 0.75  # the first two: of a sample, as a recipe states them
FAULTS = {  # what is wrong with a step -> (added to its loss, factor of the gradient)
    "loss": (float("nan"), float("nan")),
    "loss alone": (float("inf"), 1.0),
    "gradient alone": (0.0, float("inf")),
    "gradient alone, not a number": (0.0, float("nan")),
    "the gradient's norm alone": (0.0, 1e30),  # its square overflows fp32
}


def run(out: Path, values: dict, ema: float = 0.0, loaded: list[tuple[int, str]] | None = None) -> list[dict]:
    """Runs the loop on every rank. `loaded` lists (number of a batch, fault or "") of each step, by default the tiny
    case's own batches in order. Rank 0 returns the whole weights before each step."""
    settings = {"lr": 1e-2, "lr_schedule": "linear", "weight_decay": 0.1, "deterministic": True, "keep": 9, "out": out}
    o = case.options(**settings | values)
    parallel.initialize(o)
    chunks, snapshots = case.model.build(o, case.CONFIG), []
    case.load(chunks, case.random_state())
    wrapped = parallel.wrap(chunks, o, case.model.WanBlock)
    loaded = loaded or [(step, "") for step in range(o.steps)]

    def prepare(what: tuple[int, str]) -> list[dict]:
        number, fault = what
        snapshots.append(whole_weights(wrapped))
        return [batch | {"fault": fault} for batch in case.my_batches(o, number)]

    try:
        loop.train(
            o,
            wrapped,
            forward_step,
            lambda start: iter(loaded[start:]),
            prepare,
            sequence_length=lambda batches: case.sequence_length(o),
            samples=lambda batches: (TOKENS, FLOPS),
            header={"hardware": "NVIDIA H200", "starts_from": "drawn weights"},
            state={},
            ema_decay=ema,
        )
    finally:
        torch.use_deterministic_algorithms(False)
    return snapshots if dist.get_rank() == 0 else []


def forward_step(iterator, model):
    batch = next(iterator)
    output, loss = case.train.forward_step(iter([batch]), model)
    offset, factor = FAULTS.get(batch["fault"], (0.0, 1.0))

    def spoilt(output):
        output.register_hook(lambda gradient: gradient * factor)
        value, report = loss(output)
        return value, {"loss": report["loss"] + offset}

    return output, spoilt


def rows_of(out: Path) -> list[dict]:
    """Returns the last row of each step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return list({row["step"]: row for row in rows if row["kind"] == "step"}.values())


def saved(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:06d}"


def cut(out: Path, last: int) -> Path:
    """Copies a run as it would be if it had died after checkpoint `last`."""
    copy = shutil.copytree(out, out.with_name(f"{out.name} cut"))
    for later in copy.glob("checkpoints/step-*"):
        if int(later.name.removeprefix("step-")) > last:
            shutil.rmtree(later)
    return copy


# ------------------------------------------------------------------------------------------------------- skipped steps


def test_steps_that_are_not_finite_leave_the_run_as_if_they_had_never_been_and_a_resumed_one_too(tmp_path):
    """This covers weights, averaged weights, moments and their bias corrections, and learning rates."""
    plain, faulty, n = tmp_path / "plain", tmp_path / "marred", len(FAULTS)
    run_ranks(1, run, plain, {"steps": 2 * n + 2, "save_every": n}, DECAY)
    loaded = [(number, fault) for number, name in enumerate(FAULTS) for fault in ("", name)]
    loaded += [(n, ""), (n + 1, "")]
    snapshots = run_ranks(1, run, faulty, {"steps": 2 * n + 2, "save_every": 2 * n}, DECAY, loaded)[0]
    unchanged = [all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(snapshots, snapshots[1:], strict=False)]
    assert unchanged == [fault != "" for _, fault in loaded[:-1]], dict(zip(FAULTS, unchanged[1::2], strict=False))
    rows = rows_of(faulty)
    assert [row["skipped"] for row in rows] == [*((i + 1) // 2 for i in range(2 * n)), n, n]
    want, got = tensors(saved(plain, n)), tensors(saved(faulty, 2 * n))
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    rates, applied = [row["lr"] for row in rows_of(plain)], [row["lr"] for row in rows]
    assert applied[0::2][:n] + applied[-2:] == rates[: n + 2] and len(set(rates)) > n
    states = [json.loads((saved(faulty, step) / "state.json").read_text()) for step in (2 * n, 2 * n + 2)]
    assert [(f["step"], f["optimizer_steps"]) for f in states] == [(2 * n, n), (2 * n + 2, n + 2)]

    parts = cut(faulty, 2 * n)
    run_ranks(1, run, parts, {"steps": 2 * n + 2}, DECAY, loaded)
    for key in ("lr", "loss", "grad_norm"):
        assert [row[key] for row in rows_of(parts)[-2:]] == [row[key] for row in rows[-2:]], key
    want, got = (tensors(saved(out, 2 * n + 2)) for out in (faulty, parts))
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)


# --------------------------------------------------------------------------------------------- averaged weights, rates

LAYOUTS = {"one": (1, {}), "fsdp2": (2, {"fsdp": True}), "tp2 sp": (2, {"tp": 2, "sp": True})}


@pytest.fixture(scope="module", params=LAYOUTS)
def averaging(request, tmp_path_factory) -> tuple[Path, int, list[dict]]:
    """Returns (folder of a run, number of its processes, weights before each step)."""
    (world, layout), out = LAYOUTS[request.param], tmp_path_factory.mktemp("run") / "run"
    return out, world, run_ranks(world, run, out, layout | {"steps": 4, "save_every": 2}, DECAY)[0]


def test_averaged_weights_follow_their_decay_from_the_first_weights_on_and_through_a_resume(averaging):
    out, _, seen = averaging
    parts = cut(out, 2)
    run_ranks(1, run, parts, {"steps": 4}, DECAY)  # on one process, whatever layout wrote the checkpoint
    half, final, resumed = tensors(saved(out, 2)), tensors(saved(out, 4)), tensors(saved(parts, 4))
    for key, average in case.random_state().items():
        for step, weight in enumerate([seen[1][key], seen[2][key], seen[3][key], final[key]], 1):
            average = DECAY * average + (1 - DECAY) * weight
            for state in {2: [half], 4: [final, resumed]}.get(step, []):
                assert (state[f"ema.{key}"] - average).abs().max() <= 1e-5 * average.abs().max(), (step, key)
    assert {key for key in final if key.startswith("ema.")} == {f"ema.{key}" for key in seen[0]}
    assert max((final[f"ema.{key}"] - final[key]).abs().max().item() for key in seen[0]) > 1e-3


def test_rates_are_of_the_cluster_by_the_sample_and_of_a_device_by_the_token_and_the_operation(averaging):
    out, world, _ = averaging
    for row in rows_of(out):
        seconds, batch = row["step_time_ms"] / 1e3, case.GLOBAL_BATCH
        assert row["samples"] == row["step"] * batch and row["tokens"] == batch * TOKENS
        assert row["samples_per_second"] == pytest.approx(batch / seconds)
        assert row["tokens_per_second_per_device"] == pytest.approx(batch * TOKENS / seconds / world)
        # A backward takes twice the operations of a forward. An H200 has 67 TFLOP/s in fp32.
        assert row["tflops_per_device"] == pytest.approx(3 * batch * FLOPS / seconds / world / 1e12)
        assert row["mfu"] == pytest.approx(row["tflops_per_device"] / 67.0)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def save_some(folder: Path, keep: int, steps: list[int]) -> list[list[str]]:
    """Returns the names of the checkpoints that exist after each save."""
    parallel.initialize(case.options())
    module, kept = torch.nn.Linear(2, 1), []
    for step in steps:
        checkpoint.save(folder, step, [module], None, {"step": step}, keep=keep)
        kept.append(sorted(path.name for path in folder.glob("step-*")))
    return kept


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_stay_as_asked_the_newest(keep, tmp_path):
    steps = [5, 10, 15, 20, 21][: keep + 2]
    names = [f"step-{step:06d}" for step in steps]
    kept = run_ranks(1, save_some, tmp_path, keep, steps)[0]
    assert kept == [names[max(0, i + 1 - keep) : i + 1] for i in range(len(steps))]
    assert (tmp_path / "latest").read_text() == names[-1]


def test_the_checkpoint_just_written_stays_though_an_earlier_run_left_later_ones(tmp_path):
    kept = run_ranks(1, save_some, tmp_path, 2, [20, 30, 5, 10])[0]
    assert kept[2:] == [["step-000005", "step-000030"], ["step-000005", "step-000010"]]  # its own are kept first
    assert (tmp_path / "latest").read_text() == "step-000010"


@pytest.mark.parametrize(
    "changed",
    [
        {"ep": 2},
        {"etp": 2},
        {"stages": "1,3"},
        {"micro_batch": 2},
        {"compile": True},
        {"moments": "bf16"},
        {"overlap_param_gather": True},
        {"offload_optimizer": True},
        {"master_remainders": True},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_runs_that_are_laid_out_otherwise_say_so_in_their_headers(changed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    o = case.options()
    layouts = [runlog.run_header(run, "mine", "pretrain", 1, 1, "")["layout"] for run in (o, replace(o, **changed))]
    assert {name for name in layouts[0] if layouts[0][name] != layouts[1][name]} >= {next(iter(changed))}


# ------------------------------------------------------------------------------------------------- collectives of one rank


def test_a_collective_of_one_rank_copies_and_starts_no_threads():
    run_ranks(1, copied_alone)


def copied_alone() -> None:
    """Checks results and the process's threads. A copy of this size uses several OpenMP threads."""
    dist.init_process_group("gloo")
    torch.set_num_threads(2)
    sent, objects = torch.randn(10**6), [None]
    torch.randn(10**6).sum()  # starts this thread's own
    before = len(os.listdir("/proc/self/task"))
    for collective, result in ((dist.gather, [torch.zeros(10**6)]), (dist.all_gather, [torch.zeros(10**6)])):
        collective(*((sent, result) if collective is dist.gather else (result, sent)))
        assert torch.equal(result[0], sent)
    received = torch.zeros(10**6)
    dist.scatter(received, [sent], src=0)
    assert torch.equal(received, sent)
    dist.gather_object({"bytes": b"x" * 10**6}, objects)
    assert objects == [{"bytes": b"x" * 10**6}]
    assert len(os.listdir("/proc/self/task")) == before
