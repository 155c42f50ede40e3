"""The benchmarks of the language recipes with the options of a user, at sizes that take seconds. Their figures depend on the machine,
so the test asserts only that the rows are complete and that both sides computed the same."""

import contextlib
import importlib
import io
import multiprocessing
from unittest import mock

import pytest
from ranks import run_ranks

from common import perf, worker
from common.language import benchmarks

pytestmark = pytest.mark.L4

SMALL = ["--size", "tiny", "--repeats", "2", "--no-compiled"]
BENCHMARKS = {  # recipe and benchmark -> options, parts of what is printed
    ("qwen3", "step"): (
        ["--size", "tiny-moe", "--seq-len", "64", "--global-batch", "4"],
        ["'loss apart': ", "pretrain step, ratio to transformers"],
    ),
    ("qwen3", "sft"): (["--seq-len", "128"], ["sft step on packed rows", "tokens that are no padding"]),
    ("qwen3", "generate"): ([], ["generate, batch 8, ratio to transformers", "'equal answers': '8 of 8'"]),
    ("qwen3", "preprocess"): ([], ["preprocess", "tokenizer alone MB/s"]),
    ("qwen3", "load"): (["--layers", "1"], ["released weights, loading", "released weights, converting, memory"]),
    ("deepseek3", "step"): (
        ["--seq-len", "64", "--global-batch", "4"],
        ["'loss apart': ", "pretrain step, ratio to transformers"],
    ),
    ("deepseek3", "generate"): (
        [],
        ["generate, batch 8, ratio to transformers", "'equal answers': '8 of 8'", "generate with latents, ratio"],
    ),
}


def printed(recipe: str, argv: list[str]) -> str:
    """Runs the benchmarks in this process and returns what they print. Contenders are forked, so they need not import
    everything again; test_perf.py starts them as a user's benchmark does."""
    fork = multiprocessing.get_context("fork")
    with (
        mock.patch.object(multiprocessing, "get_context", lambda method: fork),
        mock.patch.object(benchmarks, "TEXT", 10_000),
        contextlib.redirect_stdout(io.StringIO()) as text,
    ):
        jobs = importlib.import_module(f"zoo.{recipe}.options")
        worker.run(f"zoo.{recipe}", "perf", jobs.parse("perf", argv))
    return text.getvalue()


@pytest.mark.parametrize(("recipe", "name"), BENCHMARKS)
def test_benchmark_measures_both_sides_and_records_only_if_told(recipe, name, tmp_path):
    options, named = BENCHMARKS[recipe, name]
    record = perf.ROOT / "zoo" / recipe / "perf.jsonl"
    before = record.read_bytes()
    (text,) = run_ranks(1, printed, recipe, ["--only", name, *SMALL, *options, "--out", str(tmp_path / "run")])
    assert "refused" not in text and all(part in text for part in named), text
    assert record.read_bytes() == before
