"""The jobs of Qwen3 as a user starts them: bad input, resume, and what a run leaves behind."""

import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import qwen_case as case
from ranks import run_ranks

from common import worker

pytestmark = pytest.mark.L4

ROOT = case.jobs.HERE.parents[1]


def launch(launcher: str, *options: str, processes: int = 1) -> subprocess.CompletedProcess:
    env = {**os.environ, "ZOO_PYTHON": sys.executable, "ZOO_DEVICE": "cpu", "NPROC": str(processes)}
    command = ["bash", f"zoo/{case.RECIPE}/{launcher}.sh", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def steps_of(folder) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}


WRONG = {
    "size": ("pretrain", ["--size", "7B"], "7B"),
    "no weights": ("pretrain", ["--size", "8B", "--data", "corpus"], "--weights"),
    "no data set": ("pretrain", ["--data", "nowhere/corpus"], "nowhere/corpus.bin"),
    "no conversations": ("sft", ["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "row longer than the model's positions": ("pretrain", ["--seq-len", "4096"], "2048 positions"),
    "tokenizer": ("pretrain", ["--tokenizer", "nowhere"], "tokenizer.json"),
    "balancing a dense model": ("pretrain", ["--aux", "0.1"], "--aux 0"),
    "prompts": ("generate", ["--prompts", "nowhere.txt"], "nowhere.txt"),
    "context parallel generation": ("generate", ["--cp", "2"], "--cp"),
    "positions made fewer": ("generate", ["--yarn", "0.5"], "[1, inf)"),
    "nothing to convert to": ("convert", ["--out", "x"], "--to"),
    "text": ("preprocess", ["--data", "nowhere.jsonl"], "nowhere.jsonl"),
}


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    tokenizer = json.loads((case.jobs.DEMO_TOKENIZER / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["id"] = 2048
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = launch("pretrain", "--tokenizer", tmp_path)
    assert done.returncode == 2 and "up to 2048" in done.stderr and "vocabulary of 2048" in done.stderr


def test_held_out_rows_that_fill_no_batch_stop_the_run_before_it_trains(tmp_path):
    with pytest.raises(AssertionError, match="a global batch takes 4096"):
        run_ranks(1, case.job, "--global-batch", "4096", "--out", tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_one_line_and_exit_code_2(name):
    launcher, options, named = WRONG[name]
    done = launch(launcher, *options)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and named in done.stderr


@pytest.mark.parametrize(
    ("job", "processes", "options", "named"),
    [
        ("pretrain", 20, ["--size", "14B", "--tp", "20", "--no-sp"], "tp=20 with 8 key-value heads"),
        ("pretrain", 5, ["--size", "14B", "--tp", "5", "--no-sp"], "tp=5 with 8 key-value heads"),
        ("pretrain", 2, ["--cp", "2", "--ulysses", "1", "--seq-len", "6", "--micro-batch", "1"], "zig-zag"),
        ("pretrain", 2, ["--ep", "2"], "tiny has no experts"),
        ("pretrain", 1, ["--aux", "1"], "tiny has no experts"),
        ("pretrain", 1, ["--size", "tiny-moe", "--dispatch", "allgather"], "with ep=1 no token travels"),
        ("pretrain", 2, ["--size", "tiny-moe", "--ep", "3"], "ep=3 does not divide 8 experts"),
        ("pretrain", 2, ["--size", "tiny-moe", "--ep", "8"], "does not divide the 2 processes"),
        ("pretrain", 2, ["--size", "tiny-moe", "--tp", "2", "--etp", "1"], "--sp"),
        ("pretrain", 2, ["--size", "tiny-moe", "--ep", "2", "--fsdp"], "expected tp=pp=ep=1"),
        ("generate", 2, [], "tp*pp*ep = 1 of which generate"),
        ("generate", 2, ["--pp", "2", "--vpp", "2"], "--vpp 1"),
    ],
)
def test_layout_this_model_cannot_have_is_refused(job, processes, options, named):
    done = launch(job, *options, processes=processes)
    assert done.returncode == 2 and named in done.stderr, done.stderr


@pytest.mark.parametrize("job", ["pretrain", "sft"])
def test_a_resumed_run_is_bitwise_the_unbroken_one(job, tmp_path):
    settings = ["--job", job, "--steps", "6", "--save-every", "3", "--deterministic", "--lr-schedule", "constant"]
    settings += ["--seq-len", "128", "--warmup", "1"]
    run_ranks(1, case.job, *settings, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")  # the folder of a run that died after step 3
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-000006")
    (tmp_path / "parts" / "result.json").unlink()
    rows = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "parts" / "metrics.jsonl").write_text("".join(rows[:4]))
    assert steps_of(tmp_path / "parts").keys() == {1, 2, 3}
    run_ranks(1, case.job, *settings, "--out", tmp_path / "parts")
    assert "resumed from" in (tmp_path / "parts" / "log.txt").read_text()
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole")
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result == json.loads((tmp_path / "parts" / "result.json").read_text())
    assert "perplexity" in result["lines"][0] and (tmp_path / "whole" / "loss.png").is_file()


def printed(*argv) -> str:
    """Generates in this process and returns what the job prints."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        worker.run(f"zoo.{case.RECIPE}", "infer", case.jobs.parse("infer", [*map(str, argv)]))
    return text.getvalue()


def test_an_exported_run_is_what_transformers_loads(tmp_path):
    """YaRN has lengthened its positions, and its config says so."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = ["--steps", "2", "--size", "tiny-moe", "--yarn", "2", "--out", tmp_path / "run"]
    short = ["--no-chat", "--max-new-tokens", "8"]
    run_ranks(1, case.job, *settings, "--export", tmp_path / "mine")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", dtype=torch.float32)
    assert model.num_parameters() == case.config.SIZES["tiny-moe"].parameters
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}
    assert model.config.rope_parameters.items() >= scaling.items()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mine")
    (generated,) = run_ranks(1, printed, "--weights", tmp_path / "mine", "--prompt", "Return the", *short)
    ids = tokenizer("Return the", return_tensors="pt").input_ids
    want = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :]
    assert generated.strip() == tokenizer.decode(want).strip()


def test_preprocessing_without_options_makes_the_demos_text_first(monkeypatch):
    made = []
    monkeypatch.setattr(importlib.import_module("common.language.demo.make_data"), "make", made.append)
    case.jobs.prepare(case.jobs.parse("preprocess", []))
    assert made == [case.jobs.DEMO_DATA / "text"]
