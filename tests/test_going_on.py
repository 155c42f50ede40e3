"""What a resumed run may change. Facts that decide its data are compared with the checkpoint's before a process starts;
other options may change, and the run prints which did. The checkpoints here consist of state.json alone."""

import json
import os
import shutil
from pathlib import Path

import pytest
import qwen_case
import wan_case

from common import cli, resume

pytestmark = pytest.mark.L4

STEP = 8


def begin(case, folder: Path, argv: list[str]) -> list[str]:
    """Writes a checkpoint of step 8 under folder/run and returns the options of that run."""
    argv = [*map(str, argv), "--out", str(folder / "run")]
    o = case.jobs.parse("train", argv)
    facts = case.jobs.run_facts(o) if case is qwen_case else case.jobs.run_facts(o, case.jobs.model_config(o))
    checkpoint = folder / "run" / "checkpoints" / f"step-{STEP:06d}"
    checkpoint.mkdir(parents=True)
    state = {"step": STEP, "start": facts, "options": cli.as_json(o)}
    (checkpoint / "state.json").write_text(json.dumps(state))
    return argv


@pytest.fixture
def corpus(tmp_path) -> Path:
    for name in ("one", "two"):
        for suffix in (".bin", ".idx"):
            (tmp_path / f"{name}{suffix}").write_text(f"{name}{suffix}" * 100)
    return tmp_path / "one"


@pytest.fixture
def clips(tmp_path) -> Path:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"path": "one.jsonl", "cap": name}) + "\n")
    return tmp_path / "one.jsonl"


QWEN3_REFUSED = {
    "data": ["--data", "two"],
    "seq_len": ["--seq-len", "128"],
    "seed": ["--seed", "5"],
    "global_batch": ["--global-batch", "4"],
    "separate_documents": ["--no-separate-documents"],
    "tokenizer": ["--tokenizer", "other"],
}


@pytest.mark.parametrize("fact", QWEN3_REFUSED)
def test_language_run_does_not_go_on_with_other_rows(fact, corpus, tmp_path):
    argv = begin(qwen_case, tmp_path, ["--data", corpus])
    shutil.copytree(qwen_case.jobs.DEMO_TOKENIZER, tmp_path / "other")
    (tmp_path / "other" / "tokenizer_config.json").write_text("{}")
    flag, *value = QWEN3_REFUSED[fact]
    changed = [flag, *(str(tmp_path / v) if v in ("two", "other") else v for v in value)]
    with pytest.raises(ValueError, match=rf"step-000008 was trained from .*{fact} .* and not .*--resume never"):
        qwen_case.jobs.parse("train", [*argv, *changed])
    qwen_case.jobs.parse("train", [*argv, *changed, "--resume", "never"])


WAN_REFUSED = {
    "data": ["--data", "two.jsonl"],
    "buckets": ["--buckets", "9x48x48"],
    "fps": ["--fps", "8"],
    "seed": ["--seed", "5"],
    "global_batch": ["--global-batch", "32"],
}


@pytest.mark.parametrize("fact", WAN_REFUSED)
def test_video_run_does_not_go_on_with_other_videos(fact, clips, tmp_path):
    argv = begin(wan_case, tmp_path, ["--data", clips])
    flag, value = WAN_REFUSED[fact]
    changed = [flag, str(tmp_path / value) if fact == "data" else value]
    with pytest.raises(ValueError, match=rf"step-000008 was trained from .*{fact} .* and not .*--resume never"):
        wan_case.jobs.parse("train", [*argv, *changed])
    wan_case.jobs.parse("train", [*argv, *changed, "--resume", "never"])


def test_run_of_another_job_does_not_go_on(tmp_path, clips):
    argv = begin(wan_case, tmp_path, ["--data", clips])
    with pytest.raises(ValueError, match="job 'pretrain' and not 'finetune'"):
        wan_case.jobs.parse("train", [*argv, "--job", "finetune"])


def test_data_that_moved_go_on(corpus, tmp_path):
    argv = begin(qwen_case, tmp_path, ["--data", corpus])
    for suffix in (".bin", ".idx"):
        shutil.copyfile(f"{corpus}{suffix}", tmp_path / f"moved{suffix}")
    qwen_case.jobs.parse("train", [*argv, "--data", str(tmp_path / "moved")])


def test_what_may_change_is_said(corpus, tmp_path):
    argv = begin(qwen_case, tmp_path, ["--data", corpus])
    o = qwen_case.jobs.parse("train", [*argv, "--lr", "1e-4", "--steps", "900", "--warmup", "9", "--save-every", "3"])
    saved = json.loads((tmp_path / "run/checkpoints/step-000008/state.json").read_text())["options"]
    lr, steps, warmup, save_every = (saved[name] for name in ("lr", "steps", "warmup", "save_every"))
    assert sorted(resume.changes(saved, o)) == sorted(
        [f"lr {lr} -> 0.0001", f"steps {steps} -> 900", f"warmup {warmup} -> 9", f"save_every {save_every} -> 3"]
    )
    same = qwen_case.jobs.parse("train", [*argv, "--export", str(tmp_path / "new"), "--resume", "auto"])
    assert resume.changes(saved, same) == []


def test_fewer_steps_than_are_done_are_refused(corpus, tmp_path):
    argv = begin(qwen_case, tmp_path, ["--data", corpus])
    with pytest.raises(ValueError, match=r"step-000008 is at step 8 already, steps=4; fix: --steps of at least 8"):
        qwen_case.jobs.parse("train", [*argv, "--steps", "4"])
    assert qwen_case.jobs.parse("train", [*argv, "--steps", "8"]).steps == 8


def test_content_tells_files_apart_by_size_and_by_bytes_anywhere(tmp_path):
    whole = bytearray(b"\1" * 2**20)
    (tmp_path / "a").write_bytes(whole)
    (tmp_path / "b").write_bytes(whole)
    assert resume.content_hash([tmp_path / "a"]) == resume.content_hash([tmp_path / "b"])
    for place in (0, 2**19 + 7, 2**20 - 1):
        changed = bytearray(whole)
        changed[place] = 2
        (tmp_path / "b").write_bytes(changed)
        assert resume.content_hash([tmp_path / "a"]) != resume.content_hash([tmp_path / "b"])
    (tmp_path / "b").write_bytes(whole + b"\1")
    assert resume.content_hash([tmp_path / "a"]) != resume.content_hash([tmp_path / "b"])
    assert resume.content_hash([tmp_path / "a", tmp_path / "b"]) != resume.content_hash(
        [tmp_path / "b", tmp_path / "a"]
    )


def test_checkpoints_of_an_earlier_run_that_went_further_come_last(tmp_path):
    """Step numbers are ordered as numbers, also a million. A checkpoint that is newer than `latest` counts as this
    run's: a kill between the two writes leaves one."""
    for step in (3, 8, 999_999, 1_000_000):
        (tmp_path / f"step-{step:06d}").mkdir()
        (tmp_path / f"step-{step:06d}" / "manifest.json").write_text("{}")
        os.utime(tmp_path / f"step-{step:06d}" / "manifest.json", (50, 50))

    def order() -> list[int]:
        return [int(path.name[5:]) for path in resume.checkpoints(tmp_path)]

    assert order() == [1_000_000, 999_999, 8, 3]
    (tmp_path / "latest").write_text("step-000008")
    os.utime(tmp_path / "latest", (90, 90))
    assert order() == [8, 3, 1_000_000, 999_999]
    os.utime(tmp_path / "step-999999" / "manifest.json", (91, 91))
    assert order() == [999_999, 8, 3, 1_000_000]
