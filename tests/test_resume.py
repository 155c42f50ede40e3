"""Tests runs that are killed, resumed, resumed on another layout, or whose checkpoints are torn.

The tests run the real training job (decoding, VAE, text, megatron-core) on a few demo clips. They use its launcher only
where they test it or a signal. Otherwise the job runs in the processes of `run_ranks`, which have imported everything.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import kills
import pytest
import torch
import wan_case as case
from ranks import run_ranks
from torch.distributed.checkpoint import FileSystemReader, load

from common import checkpoint, jsonl, perf, processes

pytestmark = pytest.mark.L4

STEPS = 6


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Makes a user's list of 12 demo clips."""
    folder = tmp_path_factory.mktemp("clips") / "demo"
    import_module(f"zoo.{case.RECIPE}.demo.make_data").make(folder, train=12, test=0)
    return folder / "train.jsonl"


def settings(clips: Path, out: Path, *options: str) -> list[str]:
    fixed = ["--size", "tiny", "--from-scratch", "--data", str(clips), "--cache", str(clips.parent.parent / "cache")]
    fixed += ["--micro-batch", "2", "--global-batch", "4", "--steps", str(STEPS), "--save-every", "2", "--keep", "9"]
    fixed += ["--workers", "1", "--deterministic", "--lr-schedule", "constant", "--lr", "1e-3", "--warmup", "2"]
    fixed += ["--sample-steps", "1"]
    return [*fixed, "--out", str(out), *options]


def command(clips: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "common.cli", f"zoo.{case.RECIPE}", "train", *settings(clips, out, *options)]


def ended(argv: list[str], largest_file: int) -> int:
    """Trains in this process, which may write files up to `largest_file` bytes, and returns the exit code."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        case.job("train", *argv)
    except SystemExit as end:
        return end.code
    return 0


def run(clips: Path, out: Path, *options: str, ranks: int = 1, code: int = 0, largest_file: int = -1) -> str:
    """Trains on `ranks` ranks, which must end with this exit code, and returns the log. largest_file: a limit in bytes,
    by default none."""
    assert run_ranks(ranks, ended, settings(clips, out, *options), largest_file) == [code] * ranks
    return (out / "log.txt").read_text()


def tensors(saved: Path) -> dict[str, torch.Tensor]:
    """Reads every tensor of a checkpoint: weights, master weights, both moments."""
    reader = FileSystemReader(saved)
    metadata = reader.read_metadata().state_dict_metadata
    entries = {key: metadata[key] for key in checkpoint.tensor_sizes(saved)}
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    load(state, storage_reader=reader, no_dist=True)  # all in one call, because each call reads the metadata again
    return state


def losses(out: Path) -> list[float]:
    file = out / "metrics.jsonl"
    rows = jsonl.read(file) if file.is_file() else []
    by_step = {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}
    return [by_step[step] for step in sorted(by_step)]


@pytest.fixture(scope="module")
def unbroken(clips, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    run(clips, out)
    return out


def copy_of(unbroken: Path, tmp_path: Path, last: int) -> Path:
    """Copies the unbroken run as if it had died after checkpoint `last`."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    for path in out.glob("checkpoints/step-*"):
        if int(path.name[-6:]) > last:
            shutil.rmtree(path)
    return out


def test_a_run_holds_what_the_contract_says(unbroken):
    for name in ("config.toml", "metrics.jsonl", "loss.png", "log.txt", "checkpoints/latest", "drops.jsonl"):
        assert (unbroken / name).is_file(), name
    assert list((unbroken / "tensorboard").iterdir()) and list((unbroken / "samples").glob("*.gif"))
    rows = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["run", *["step"] * STEPS, "end"]
    header = "command commit recipe job size layout hardware devices precision versions model_parameters model_flops_per_sample"
    assert set(header.split()) <= rows[0].keys()
    fields = (
        "step loss lr grad_norm step_time_ms samples tokens samples_per_second tokens_per_second_per_device "
        "tflops_per_device mfu memory_gib data_wait_ms skipped"
    )
    assert set(fields.split()) <= rows[1].keys()
    end = rows[-1]
    assert (end["kind"], end["steps"], end["reason"]) == ("end", STEPS, "finished")
    times = [row["step_time_ms"] for row in rows[1 + perf.WARMUP : -1]]
    assert end["steady"]["window"] == f"steps {perf.WARMUP + 1}-{STEPS}"
    assert end["steady"]["step_time_ms"] == perf.spread(times)
    assert perf.steady_line(end["steady"]) in (unbroken / "log.txt").read_text()


def test_the_console_line_keeps_the_step_time_in_field_five(unbroken):
    line = next(line for line in (unbroken / "log.txt").read_text().splitlines() if "iteration" in line)
    row = json.loads((unbroken / "metrics.jsonl").read_text().splitlines()[1])
    assert float(line.split(":")[4].split("|")[0]) == pytest.approx(row["step_time_ms"], abs=0.051)


def test_kill_9_and_resume_is_bitwise_equal_to_the_unbroken_run(clips, unbroken, tmp_path):
    """The run is killed twice: first its launcher, at a random moment from step 3 on, then its rank during a save."""
    out, mark, draw = tmp_path / "run", str(tmp_path), random.Random(11)

    def killed(victim: str, moment) -> None:
        launcher, began = kills.start(command(clips, out), mark), time.time()
        kills.wait_until(lambda: moment(began) or launcher.poll() is not None, 200)
        assert launcher.poll() is None
        kills.kill(victim, launcher, mark)
        kills.wait_until(lambda: set(kills.running(mark)) <= {launcher.pid}, processes.GRACE)
        assert launcher.wait(60) in (-signal.SIGKILL, 128 + signal.SIGKILL)
        assert checkpoint.find(out / "checkpoints", "auto") is not None

    killed("launcher", lambda began: len(losses(out)) >= 3 and draw.random() < 0.1)
    killed("worker", lambda began: kills.saving(out, began))
    assert "resumed from" in run(clips, out)
    assert losses(out) == losses(unbroken)
    want, got = (tensors(run / "checkpoints" / f"step-{STEPS:06d}") for run in (unbroken, out))
    assert want.keys() == got.keys()
    assert not [key for key in want if not torch.equal(want[key], got[key])]


def test_resumed_image_to_video_out_of_the_cache_is_bitwise_equal_to_the_run_that_encoded(clips, tmp_path):
    options = ["--size", "tiny-i2v", "--cache", str(tmp_path / "cache"), "--steps", "4", "--sample-steps", "1"]
    run(clips, tmp_path / "unbroken", *options)
    out = copy_of(tmp_path / "unbroken", tmp_path, last=2)
    assert "resumed from" in run(clips, out, *options) and losses(out) == losses(tmp_path / "unbroken")
    want, got = (tensors(tmp_path / run / "checkpoints" / "step-000004") for run in ("unbroken", "run"))
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)


@pytest.mark.parametrize(
    "layout",
    [["--tp", "2", "--sp"], ["--pp", "2"], ["--fsdp"], []],
    ids=lambda layout: " ".join(layout) or "dp2",
)
def test_resume_on_another_layout_continues_the_same_run(layout, clips, unbroken, tmp_path):
    out = copy_of(unbroken, tmp_path, last=2)
    assert "step-000002 at step 2" in run(clips, out, *layout, ranks=2)
    # The layouts sum fp32 values in another order, for which 1e-6 of the loss is allowed.
    assert losses(out) == pytest.approx(losses(unbroken), rel=1e-6)


def test_resume_from_fsdp_on_one_process(clips, unbroken, tmp_path):
    out = tmp_path / "run"
    run(clips, out, "--fsdp", "--steps", "4", ranks=2)
    run(clips, out)
    assert losses(out) == pytest.approx(losses(unbroken), rel=1e-6)


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest"])
def test_a_torn_checkpoint_is_passed_over_and_named(damage, unbroken, tmp_path, capsys):
    out = copy_of(unbroken, tmp_path, last=STEPS)
    newest = out / "checkpoints" / f"step-{STEPS:06d}"
    shard = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    if damage == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "missing":
        shard.unlink()
    else:
        (newest / "manifest.json").unlink()
    chosen = checkpoint.find(out / "checkpoints", "auto")
    assert chosen.name == f"step-{STEPS - 2:06d}"
    assert str(newest) in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected a checkpoint folder"):
        checkpoint.find(out / "checkpoints", str(newest))


def test_all_checkpoints_torn_is_an_error_not_a_fresh_start(unbroken, tmp_path):
    out = copy_of(unbroken, tmp_path, last=2)
    (out / "checkpoints" / "step-000002" / "state.json").unlink()
    with pytest.raises(ValueError, match="--resume never"):
        checkpoint.find(out / "checkpoints", "auto")


def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_alive(clips, unbroken, tmp_path):
    out = copy_of(unbroken, tmp_path, last=2)
    log = run(clips, out, largest_file=2 * 2**20)  # a shard of this model is larger
    assert f"the weights of step {STEPS} are not on disk, their checkpoint could not be written; there is" in log
    assert [p.name for p in (out / "checkpoints").glob("step-*")] == ["step-000002"]
    assert checkpoint.find(out / "checkpoints", "auto").name == "step-000002"
    assert losses(out) == losses(unbroken)


def test_sigterm_leaves_a_checkpoint_and_the_reason(clips, tmp_path):
    out = tmp_path / "run"
    env = os.environ | {"NPROC": "1", "OMP_NUM_THREADS": "1"}
    env.pop("WORLD_SIZE", None)
    job = subprocess.Popen(
        command(clips, out, "--steps", "5000", "--save-every", "0"), env=env, stdout=subprocess.PIPE, text=True
    )
    metrics, deadline = out / "metrics.jsonl", time.time() + 200
    while not (metrics.is_file() and '"step": 2' in metrics.read_text()):
        assert time.time() < deadline and job.poll() is None
        time.sleep(0.02)
    job.terminate()
    job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM
    end = json.loads(metrics.read_text().splitlines()[-1])
    assert end["reason"] == "SIGTERM"
    assert checkpoint.find(out / "checkpoints", "auto").name == f"step-{end['steps']:06d}"


def test_bad_steps_are_skipped_counted_and_stop_the_run_with_the_batch_saved(clips, tmp_path):
    out = tmp_path / "run"
    run(clips, out, "--lr", "1e30", "--warmup", "0", "--max-bad-steps", "2", "--steps", "50", code=3)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["reason"].startswith("2 consecutive steps")
    assert rows[-2]["skipped"] == 2
    saved = list((out / "bad_batch").glob("*.json"))
    assert saved and "captions" in saved[0].read_text()


def test_another_global_batch_is_refused_because_the_data_position_would_be_lost(clips, unbroken, tmp_path):
    out = copy_of(unbroken, tmp_path, last=2)
    with pytest.raises(ValueError, match="global_batch 4 and not 2"):
        case.jobs.parse("train", settings(clips, out, "--global-batch", "2"))


def test_export_is_what_diffusers_loads(clips, tmp_path):
    from diffusers import WanTransformer3DModel

    out = tmp_path / "run"
    run(clips, out, "--steps", "2", "--warmup", "0", "--export", str(tmp_path / "export"))
    exported = WanTransformer3DModel.from_pretrained(tmp_path / "export" / "transformer").state_dict()
    saved = out / "checkpoints" / "step-000002"
    for name in case.convert.shapes(case.config.SIZES["tiny"]):
        assert torch.equal(exported[case.convert.to_diffusers(name)], checkpoint.read_tensor(saved, name)), name
