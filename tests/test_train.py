"""The loop of common/train.py on a tiny model: which steps are applied, the averaged weights, what a step's row says, which
checkpoints stay. Runs of whole jobs are in test_resume.py and beside each recipe."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import wan_case as case
from ranks import run_ranks
from test_resume import tensors

from common import checkpoint, parallel
from common import train as loop

pytestmark = pytest.mark.L4

TOKENS, FLOPS = 24, 7e9  # of a sample, as the recipe states them
SETTINGS = {"lr": 1e-2, "lr_schedule": "linear", "weight_decay": 0.1, "workers": 0, "deterministic": True}
LAYOUTS = {"one": (1, {}), "dp2": (2, {}), "fsdp2": (2, {"fsdp": True}), "tp2 sp": (2, {"tp": 2, "sp": True})}


def run(out: Path, values: dict, ema: float = 0.0, faults: dict[int, str] | None = None) -> None:
    """On every rank: the loop over the tiny case, a batch of which may have one of FAULTS."""
    o = case.options(**SETTINGS | {"out": out} | values)
    parallel.initialize(o)
    chunks = case.model.build(o, case.CONFIG)
    case.load(chunks, case.random_state())
    wrapped = parallel.wrap(chunks, o, case.model.WanBlock)
    try:
        loop.train(
            o,
            wrapped,
            forward_step,
            lambda start: iter(range(start, o.steps)),
            lambda step: [batch | {"fault": (faults or {}).get(step + 1)} for batch in case.my_batches(o, step)],
            sequence_length=lambda batches: case.sequence_length(o),
            samples=lambda batches: (TOKENS, FLOPS),
            header={"hardware": "NVIDIA H200"},
            state={},
            ema_decay=ema,
        )
    finally:
        torch.use_deterministic_algorithms(False)


FAULTS = {  # what is wrong with -> (loss, the gradient of the output)
    "loss": (float("nan"), 1.0),
    "loss alone": (float("inf"), 1.0),
    "gradient alone": (0.0, float("inf")),
    "gradient alone, not a number": (0.0, float("nan")),
    "only the sum of the gradient's squares": (0.0, 1e30),
}


def forward_step(iterator, model):
    batch = next(iterator)
    output, loss = case.train.forward_step(iter([batch]), model)
    if batch["fault"] is None:
        return output, loss
    offset, factor = FAULTS[batch["fault"]]

    def spoilt(output):
        output.register_hook(lambda gradient: gradient * factor)
        value, report = loss(output)
        return value + offset, {"loss": report["loss"] + offset}

    return output, spoilt


def rows_of(out: Path) -> list[dict]:
    """The last row of each step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return list({row["step"]: row for row in rows if row["kind"] == "step"}.values())


def saved(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:06d}"


def cut(out: Path, last: int) -> Path:
    """The run as it would be had it died after checkpoint `last`."""
    other = shutil.copytree(out, out.with_name(f"{out.name}-cut"))
    for later in other.glob("checkpoints/step-*"):
        if int(later.name.removeprefix("step-")) > last:
            shutil.rmtree(later)
    return other


# ------------------------------------------------------------------------------------------------------- skipped steps


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_is_not_finite_changes_nothing_and_a_resumed_run_knows_that_it_was_skipped(fault, tmp_path):
    whole, values = tmp_path / "run", {"steps": 6, "save_every": 1, "keep": 9}
    run_ranks(1, run, whole, values, 0.75, {3: fault})
    rows = rows_of(whole)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1]
    before, after = (tensors(saved(whole, step)) for step in (2, 3))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    facts = [json.loads((saved(whole, step) / "state.json").read_text()) for step in range(1, 7)]
    assert [(f["step"], f["optimizer_steps"]) for f in facts] == [(1, 1), (2, 2), (3, 2), (4, 3), (5, 4), (6, 5)]
    rates = [row["lr"] for row in rows]
    assert rates[2] == rates[3] and len(set(rates)) == 5  # the schedule waits
    for last in (3, 5):
        parts = cut(whole, last)
        run_ranks(1, run, parts, values, 0.75, {3: fault})
        for key in ("lr", "loss", "grad_norm"):
            assert [row[key] for row in rows_of(parts)[3:]] == [row[key] for row in rows[3:]], key
        want, got = (tensors(saved(out, 6)) for out in (whole, parts))
        assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
        shutil.rmtree(parts)


# ----------------------------------------------------------------------------------------------------- averaged weights


@pytest.mark.parametrize("name", LAYOUTS)
def test_averaged_weights_follow_their_decay_from_the_first_weights_on_and_through_a_resume(name, tmp_path):
    world, layout = LAYOUTS[name]
    whole, values = tmp_path / "run", layout | {"steps": 4, "save_every": 1, "keep": 9}
    run_ranks(world, run, whole, values, 0.75)
    average = case.random_state()
    for step in range(1, 5):
        found = tensors(saved(whole, step))
        assert {key for key in found if key.startswith("ema.")} == {f"ema.{key}" for key in average}
        for key, value in average.items():
            average[key] = 0.75 * value + 0.25 * found[key]
            assert (found[f"ema.{key}"] - average[key]).abs().max() <= 1e-6 * average[key].abs().max(), (step, key)
    assert max((found[f"ema.{key}"] - found[key]).abs().max().item() for key in average) > 1e-3
    parts = cut(whole, 2)
    run_ranks(1, run, parts, {"steps": 4}, 0.75)  # on one process, whatever wrote the checkpoint
    again = tensors(saved(parts, 4))
    assert again.keys() == found.keys()
    for key in average:
        for kind in (key, f"ema.{key}"):
            assert (again[kind] - found[kind]).abs().max() <= 1e-5 * found[kind].abs().max(), kind


# ---------------------------------------------------------------------------------------------------------- rows, files


@pytest.mark.parametrize("name", LAYOUTS)
def test_rates_are_of_the_cluster_by_the_sample_and_of_one_device_by_the_token_and_operation(name, tmp_path):
    world, layout = LAYOUTS[name]
    run_ranks(world, run, tmp_path, layout | {"steps": 2, "save_every": 0})
    for row in rows_of(tmp_path):
        seconds, batch = row["step_time_ms"] / 1e3, case.GLOBAL_BATCH
        assert row["samples"] == row["step"] * batch and row["tokens"] == batch * TOKENS
        assert row["samples_per_second"] == pytest.approx(batch / seconds)
        assert row["tokens_per_second_per_device"] == pytest.approx(batch * TOKENS / seconds / world)
        # a step is a forward and a backward of twice its operations
        assert row["tflops_per_device"] == pytest.approx(3 * batch * FLOPS / seconds / world / 1e12)
        assert row["mfu"] == pytest.approx(row["tflops_per_device"] / 67.0)  # an H200's in fp32


def save_some(folder: Path, keep: int, steps: tuple[int, ...]) -> list[list[str]]:
    """The checkpoints after each save."""
    parallel.initialize(case.options())
    weight, found = torch.nn.Module(), []
    weight.weight = torch.nn.Parameter(torch.zeros(3))
    for step in steps:
        checkpoint.save(folder, step, [weight], None, {"step": step}, keep=keep)
        found.append(sorted(path.name for path in folder.glob("step-*")))
    return found


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_checkpoints_stay_as_asked_the_newest(keep, tmp_path):
    steps = (5, 10, 15, 20, 21)
    names = [f"step-{step:06d}" for step in steps]
    found = run_ranks(1, save_some, tmp_path, keep, steps)[0]
    assert found == [names[max(0, i + 1 - keep) : i + 1] for i in range(len(steps))]
    assert (tmp_path / "latest").read_text() == names[-1]
