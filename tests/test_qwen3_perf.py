"""The benchmarks of zoo/qwen3 with the options of a user, at sizes that take seconds. Their figures depend on the machine,
so the test asserts only that the rows are complete and that both sides computed the same."""

import contextlib
import io
import multiprocessing
from unittest import mock

import pytest
import qwen_case as case
from ranks import run_ranks

from common import perf, worker

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


def printed(argv: list[str]) -> str:
    """Runs the benchmarks in this process and returns what they print. Contenders are forked, so they need not import
    everything again; test_perf.py starts them as a user's benchmark does."""
    fork = multiprocessing.get_context("fork")
    with (
        mock.patch.object(multiprocessing, "get_context", lambda method: fork),
        contextlib.redirect_stdout(io.StringIO()) as text,
    ):
        worker.run(f"zoo.{case.RECIPE}", "perf", case.jobs.parse("perf", argv))
    return text.getvalue()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_measures_both_sides_and_records_only_if_told(name, tmp_path):
    options, named = BENCHMARKS[name]
    record = perf.ROOT / "zoo" / case.RECIPE / "perf.jsonl"
    before = record.read_bytes()
    (text,) = run_ranks(1, printed, ["--only", name, *SMALL, *options, "--out", str(tmp_path / "run")])
    assert "refused" not in text and all(part in text for part in named), text
    assert record.read_bytes() == before
