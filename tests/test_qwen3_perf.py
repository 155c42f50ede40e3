"""The benchmarks of zoo/qwen3 as a user starts them, at sizes that take seconds. Their figures depend on the machine,
so the test asserts only that the rows are complete and that both sides computed the same."""

import os
import subprocess
import sys

import pytest
import qwen_case as case

from common import perf

pytestmark = pytest.mark.L4

SMALL = ["--size", "tiny", "--repeats", "2", "--no-compiled"]
BENCHMARKS = {
    "step": (
        ["--size", "tiny-moe", "--seq-len", "64", "--global-batch", "4"],
        ["'loss apart': ", "pretrain step, ratio to transformers"],
    ),
    "sft": (["--seq-len", "128"], ["sft step on packed rows", "tokens that are no padding"]),
    "generate": ([], ["generate, batch 8, ratio to transformers", "'equal answers': '8 of 8'"]),
    "load": (["--layers", "1"], ["released weights, loading", "released weights, converting, memory"]),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_measures_both_sides_and_records_only_if_told(name, tmp_path):
    options, named = BENCHMARKS[name]
    record = perf.ROOT / "zoo" / case.RECIPE / "perf.jsonl"
    before = record.read_bytes()
    env = os.environ | {"ZOO_PYTHON": sys.executable, "ZOO_DEVICE": "cpu", "NPROC": "1", "OMP_NUM_THREADS": "1"}
    command = ["bash", f"zoo/{case.RECIPE}/perf.sh", "--only", name, *SMALL, *options]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], cwd=perf.ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused" not in done.stdout and all(text in done.stdout for text in named), done.stdout
    assert record.read_bytes() == before
