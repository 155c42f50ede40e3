"""Tests the performance record: its rows and tables, refused rows, and the device figures and FLOPs formula of every
MFU."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import wan_case as case
from ranks import run_ranks
from torch.utils.flop_counter import FlopCounterMode

from common import bench, parallel, perf, runlog

pytestmark = pytest.mark.L1


def test_tables_are_what_the_records_render_to():
    assert not [str(path) for path, text in perf.rendered().items() if path.read_text() != text]


@pytest.mark.parametrize("commit", ["unknown", "0123456789ab-dirty"])
def test_a_row_from_an_uncommitted_tree_is_refused(commit, tmp_path):
    with pytest.raises(ValueError, match="reproducible"):
        perf.append(tmp_path / "perf.jsonl", {"commit": commit})
    assert not list(tmp_path.iterdir())


def test_a_committed_row_is_appended(tmp_path):
    perf.append(tmp_path / "perf.jsonl", {"commit": "0123456789ab", "value": 1})
    assert json.loads((tmp_path / "perf.jsonl").read_text())["value"] == 1


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Writes rows.jsonl as a perf.sh on another machine does, in a checkout with one commit and an empty record."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y", "-C", str(tmp_path)]
    record = tmp_path / "zoo" / "qwen3" / "perf.jsonl"
    record.parent.mkdir(parents=True)
    record.write_text("")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(perf, "ROOT", tmp_path)
    head = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True).strip()

    def write(**changes) -> Path:
        row = {"recipe": "qwen3", "task": "pretrain step", "commit": head, "value": 1.0} | changes
        (tmp_path / "rows.jsonl").write_text(
            json.dumps({**row, "value": 2.0, "commit": head, "recipe": "qwen3"}) + "\n"
        )
        with open(tmp_path / "rows.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        return tmp_path / "rows.jsonl"

    return write


def test_rows_of_another_machine_are_added_once(elsewhere):
    file = elsewhere()
    perf.add(file)
    rows = perf.read(perf.ROOT / "zoo" / "qwen3" / "perf.jsonl")
    assert [(row["value"], "recipe" in row) for row in rows] == [(2.0, False), (1.0, False)]
    with pytest.raises(ValueError, match="has the row 'pretrain step' of .* already; fix: --add"):
        perf.add(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"commit": "0123456789ab"}, "commit 0123456789ab is not in this history"),
        ({"commit": "unknown"}, "its tree was not clean"),
        ({"recipe": "qwen4"}, "rows.jsonl:2: no recipe 'qwen4'"),
    ],
)
def test_one_bad_row_of_another_machine_adds_none(elsewhere, changes, message):
    with pytest.raises(ValueError, match=message):
        perf.add(elsewhere(**changes))
    assert perf.read(perf.ROOT / "zoo" / "qwen3" / "perf.jsonl") == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"recipe": "qwen3", "task": "pre', "malformed JSON"),
        ("[]", "is no row of a perf.sh"),
        ('{"recipe": "qwen3"}', "is no row of a perf.sh"),
    ],
)
def test_a_torn_or_foreign_line_of_another_machine_adds_none(elsewhere, line, message):
    file = elsewhere()
    file.write_text(file.read_text() + line)
    with pytest.raises(ValueError, match=f"rows.jsonl:3: .*{message}"):
        perf.add(file)
    assert perf.read(perf.ROOT / "zoo" / "qwen3" / "perf.jsonl") == []


@pytest.mark.parametrize("argv", [["--add"], ["--add", "no.jsonl"], ["--chek"]])
def test_a_wrong_call_of_the_record_ends_with_2_and_writes_nothing(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["perf", *argv])
    monkeypatch.setattr(Path, "write_text", None)
    with pytest.raises(SystemExit) as end:
        perf.main()
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reported", "bf16", "memory_gb", "link"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0, 80, 900),
        ("NVIDIA H100 PCIe", 756.0, 80, 600),
        ("NVIDIA H100 NVL", 835.0, 94, 600),
        ("NVIDIA H200", 989.0, 141, 900),
        ("NVIDIA H200 NVL", 835.0, 141, 900),
        ("NVIDIA H800", 989.0, 80, 400),
        ("A100-SXM4-80GB", 312.0, 80, 600),
        ("NVIDIA A100-PCIE-40GB", 312.0, 40, 600),
        ("NVIDIA A800-SXM4-80GB", 312.0, 80, 400),
        ("A800", 312.0, 80, 400),
        ("Ascend910B3", 313.0, 64, None),
        ("Ascend910_9392", 376.0, 64, 392),
    ],
)
def test_reported_name_finds_its_device(reported, bf16, memory_gb, link):
    device = perf.find_device(reported)
    assert (device.bf16, device.memory_gb, device.link_gb_s) == (bf16, memory_gb, link)
    assert perf.peak_tflops(reported, "bf16") == bf16
    assert device.source in perf.figures(reported)


@pytest.mark.parametrize(
    "reported", ["Some CPU", "NVIDIA H20", "NVIDIA GH200 480GB", "NVIDIA H800 PCIe", "NVIDIA A10", "Ascend910B4"]
)
def test_device_without_a_source_has_no_mfu(reported):
    assert perf.peak_tflops(reported, "bf16") is None


def test_peak_is_of_the_precision():
    assert perf.peak_tflops("NVIDIA H200", "fp32") == 67.0
    assert perf.peak_tflops("Ascend910B3", "fp32") is None


# ------------------------------------------------------------------------------------------------------ steady state


def test_steady_state_leaves_out_warm_up_and_profiled_steps():
    def row(step, ms, **extra):
        return {"step": step, "step_time_ms": ms, "samples_per_second": 1e3 / ms, "mfu": None} | extra

    rows = [row(i, 9e9) for i in (1, 2, 3)] + [row(4 + i, 10.0 + i) for i in range(11)]
    rows += [row(15, 9e9, profiled=True), row(16, 9e9, profiled=True), row(17, 15.0)]
    summary = perf.steady(rows)
    assert summary["window"] == "steps 4-17 without 2 profiled"
    assert summary["step_time_ms"] == {"median": 15.0, "p10": pytest.approx(11.1), "p90": pytest.approx(18.9), "n": 12}
    assert summary["samples_per_second"] == pytest.approx(1e3 / 15) and summary["mfu"] is None
    assert "15.0 ms a step (p10 11.1, p90 18.9)" in perf.steady_line(summary)


def test_run_within_its_warm_up_has_no_steady_state():
    assert perf.steady([{"step": 1}] * perf.WARMUP) is None
    assert "warm-up" in perf.steady_line(None)


def test_spread_of_one_value_is_that_value():
    assert perf.spread([2.0]) == {"median": 2.0, "p10": 2.0, "p90": 2.0, "n": 1}


# ---------------------------------------------------------------------------------------------------------- published

# (model, task, size) -> published values: of the Ascend machine and, if published, of the reference machine.
MINDSPEED_MM = {
    ("Wan2.1-T2V", "pretrain", "1.3B"): [0.918, 1.04],
    ("Wan2.1-T2V", "lora", "1.3B"): [0.954, 1.042],
    ("Wan2.1-T2V", "pretrain", "14B"): [0.16, 0.16],
    ("Wan2.1-T2V", "lora", "14B"): [0.179, 0.174],
    ("Wan2.1-I2V", "pretrain", "1.3B"): [0.76],
    ("Wan2.1-I2V", "pretrain", "14B"): [0.13],
    ("Wan2.1-I2V", "lora", "14B"): [0.179, 0.173],
}
MINDIE_SD = {
    1: [860.2, 631.7, 541.8, 516.9],
    2: [548.8, 502.8, 332.6, 327.6],
    4: [204.0, 175.8, 151.1, 147.9],
    8: [141.5, 102.9, 78.1, 76.4],
}
RECORD = perf.ROOT / "zoo" / "wan21" / "perf.jsonl"  # the original recipe's: a copied recipe starts without records


def test_no_published_figure_is_missing():
    published = [r for r in perf.read(RECORD) if r["source"] == "published"]
    training = [r for r in published if r["system"] == "MindSpeed-MM"]
    for (model, task, size), values in MINDSPEED_MM.items():
        rows = [r for r in training if (r["model"], r["task"], r["size"]) == (model, task, size)]
        assert [r["value"] for r in rows] == values
        assert all((r["unit"], r["devices"], r["precision"]) == ("SPS", 8, "bf16") for r in rows)
    sampling = [r for r in published if r["system"] == "MindIE-SD"]
    for devices, values in MINDIE_SD.items():
        assert [r["value"] for r in sampling if r["devices"] == devices] == values
    assert (len(training), len(sampling), len(published)) == (12, 16, 28)


def measured(**changes) -> dict:
    row = {"source": "measured", "system": "this zoo", "model": "Wan2.1-T2V", "task": "pretrain step", "size": "1.3B",
           "hardware": "NVIDIA H200", "devices": 1, "layout": "1.3B", "precision": "bf16", "shape": "81x480x832",
           "value": 0.46, "unit": "SPS", "mfu": 0.394, "commit": "0123456789ab", "command": "", "date": "",
           "raw": {"step s": {"median": 2.17, "p10": 2.16, "p90": 2.2, "n": 60}}}  # fmt: skip
    return row | changes


def test_measured_row_is_compared_with_the_published_ones_of_its_workload():
    lines = perf.compare(measured(), RECORD)
    assert lines[0] == (
        "published 0.918 SPS on 8 x Atlas 900 A2 PODc (MindSpeed-MM) = 0.115 per device; "
        "ours 0.46 on 1 x NVIDIA H200 = 0.46 per device, 4.01 x"
    )
    assert "published 1.04 SPS on 8 x unnamed reference machine" in lines[1] and lines[1].endswith("3.54 x")
    assert "the step alone" in lines[2] and len(lines) == 3


@pytest.mark.parametrize("other", [{"size": "tiny"}, {"shape": "13x48x48"}, {"precision": "fp32"}])
def test_another_workload_is_compared_with_nothing(other):
    (line,) = perf.compare(measured(**other), RECORD)
    assert line.startswith("no published row has this workload") and str(*other.values()) in line


def test_table_shows_spread_mfu_and_commit(tmp_path):
    record = tmp_path / "perf.jsonl"
    rows = [measured(), measured(task="launcher --help", mfu=None, raw={"median": 0.2, "p10": 0.1, "p90": 0.3, "n": 3})]
    record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = perf.table(record)
    assert "| SPS | median (p10-p90) | MFU | commit |" in text
    assert "| 0.46 | step s 2.17 (2.16-2.2) | 0.394 | 0123456 |" in text
    assert "| 0.2 (0.1-0.3) | - | 0123456 |" in text


def test_table_shows_what_a_speed_up_is_over_and_its_quality_and_keeps_units_apart(tmp_path):
    record, gain = tmp_path / "perf.jsonl", {"speed-up": 1.5, "baseline": "50 steps", "PSNR dB": 41.0, "SSIM": 0.997}
    rows = [measured(task="generation", unit="s per video", raw=gain), measured(task="generation", unit="s", raw={})]
    record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = perf.table(record)
    assert "| s per video | median (p10-p90) | speed-up | baseline | PSNR dB | SSIM | MFU |" in text
    assert "| 0.46 | - | 1.5 | 50 steps | 41.0 | 0.997 |" in text and "| s | median (p10-p90) | MFU |" in text


def test_a_commit_is_dirty_by_what_runs_and_not_by_its_record(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    files = [tmp_path / "common" / "train.py", tmp_path / "zoo" / "mine" / "perf.jsonl"]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(runlog, "__file__", str(files[0]))
    files[1].write_text("{}")
    assert re.fullmatch(r"[0-9a-f]{12}", runlog.commit())
    files[0].write_text("pass")
    assert re.fullmatch(r"[0-9a-f]{12}-dirty", runlog.commit())


# ------------------------------------------------------------------------------------------------- the step benchmark

recipe = importlib.import_module(f"zoo.{case.RECIPE}.perf")
build_peer = recipe.peer
TINY = ["--only", "step", "--buckets", "5x32x32", "--micro-batch", "2", "--global-batch", "2"]


def take(seconds: list[float]) -> None:
    """Makes each following step of this process seem to take the next of these seconds."""
    remaining = iter(seconds)
    bench.timed = lambda step: (next(remaining), step())


def without_room(*args):
    raise torch.OutOfMemoryError("tried to allocate 9 GiB")


def peer(o, config, compiled: bool):
    """Builds the recipe's peer, whose steps seem to take seconds chosen here. Raises OutOfMemoryError for a compiled
    peer."""
    if compiled:
        without_room()
    take([9.0, 9.0, 9.0, 4.0, 2.0, 3.0])
    return build_peer(o, config, False)


def step_rows(out: Path) -> list[dict]:
    o = case.jobs.parse("perf", [*TINY, "--repeats", "3", "--out", str(out)])
    parallel.initialize(o)
    timed = bench.timed
    take([9.0, 9.0, 9.0, 1.0, 2.0, 3.0])
    fork = bench.multiprocessing.get_context("fork")  # contenders need not import everything again
    try:
        with (
            mock.patch.object(bench.multiprocessing, "get_context", lambda method: fork),
            mock.patch.object(recipe, "peer", peer),
            mock.patch.object(bench, "own_step_alone", without_room),
        ):
            return [*recipe.step(o)]
    finally:
        bench.timed = timed


@pytest.mark.L4
def test_step_benchmark_outlives_contenders_without_room_and_takes_its_ratio_turn_by_turn(tmp_path):
    rows = run_ranks(1, step_rows, tmp_path / "run")[0]
    mine, theirs, ratio = (row for row in rows if "refused" not in row)
    compiled, theirs_compiled = (row for row in rows if "refused" in row)
    assert compiled["refused"] == theirs_compiled["refused"] == "does not fit: tried to allocate 9 GiB"
    assert compiled["system"] == "this zoo + torch.compile"
    assert theirs_compiled["system"].startswith("diffusers ") and theirs_compiled["system"].endswith(" + torch.compile")
    assert (mine["value"], theirs["value"], ratio["value"]) == (1.0, 0.667, 1.0)  # the medians' ratio is 1.5
    assert theirs["raw"]["loss apart"] < 1e-5 and ratio["task"] == "pretrain step, ratio to diffusers"


def test_equal_losses_say_something_about_the_weights(monkeypatch):
    """With the zero output head of fresh weights, every loss would be the same."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    o = case.options(buckets="9x32x64", micro_batch=2)
    batch = recipe.batch_of(o, case.CONFIG)
    monkeypatch.setattr(recipe, "batch_of", lambda *args: batch)  # the seed then changes the weights alone
    loss, same_seed, other_seed = (
        float(recipe.peer(dataclasses.replace(o, seed=seed), case.CONFIG, compiled=False)()) for seed in (0, 0, 1)
    )
    assert loss == same_seed and abs(loss - other_seed) / loss > 100 * bench.LOSS_BOUND["fp32"]


@pytest.mark.L4
def test_step_benchmark_of_the_tiny_size_measures_both_and_compares(tmp_path):
    env = os.environ | {"ZOO_PYTHON": sys.executable, "NPROC": "1", "OMP_NUM_THREADS": "1"}
    command = ["bash", f"zoo/{case.RECIPE}/perf.sh", *TINY, "--repeats", "2", "--no-compiled-peer"]
    command += ["--out", str(tmp_path / "run")]
    record = perf.ROOT / "zoo" / case.RECIPE / "perf.jsonl"
    before = record.read_bytes()
    done = subprocess.run(command, cwd=perf.ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused" not in done.stdout and "'loss apart': " in done.stdout
    assert "no published row has this workload: Wan2.1-T2V, pretrain, tiny, 5x32x32, fp32" in done.stdout
    assert record.read_bytes() == before  # only --record writes


@pytest.mark.parametrize("size", ["tiny", "1.3B"])
def test_flops_formula_agrees_with_a_counted_run(size):
    from diffusers import WanTransformer3DModel

    config, grid = case.config.SIZES[size], (3, 8, 12)
    values = {k: v for k, v in config.to_diffusers().items() if not k.startswith("_")}
    with torch.device("meta"):
        model = WanTransformer3DModel(**values | {"patch_size": tuple(values["patch_size"])})
        inputs = torch.empty(1, 16, *grid), torch.empty(1), torch.empty(1, config.text_len, config.text_dim)
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
    assert config.flops(grid) == pytest.approx(counter.get_total_flops(), rel=0.01)
