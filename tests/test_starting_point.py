"""Defaults where the user names nothing: tokenizer, encoders, learning rates, warm-up. The demo's parts are defaults
for the demo's weights alone."""

import json
import os
import shutil

import pytest
import qwen_case
import torch
import wan_case
from safetensors.torch import save_file
from test_cli import released

from common import cli, train
from common.language.options import starts_from

pytestmark = pytest.mark.L4

qwen3, wan21 = qwen_case.jobs, wan_case.jobs


def release(folder, size: str = "0.6B"):
    """Makes a released Qwen3 with true config and headers, data that take no room on the disk, and no tokenizer."""
    folder.mkdir()
    config = qwen_case.config.SIZES[size]
    (folder / "config.json").write_text(json.dumps(config.to_released()))
    described, end = {}, 0
    for name, shape in qwen_case.convert.table(config).released_shapes().items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        described[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(described).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + end)
    return folder


# ---------------------------------------------------------------------------------------------------------- tokenizers

NEEDS_A_TOKENIZER = {
    "train": ["--data", "chats.jsonl", "--job", "sft"],
    "infer": ["--prompt", "x"],
    "evaluate": ["--tasks", "boolq"],
}


@pytest.mark.parametrize("script", NEEDS_A_TOKENIZER)
def test_weights_without_a_tokenizer_do_not_get_the_demos(script, tmp_path):
    weights = release(tmp_path / "weights")
    argv = [word.replace("chats", f"{tmp_path}/chats") for word in NEEDS_A_TOKENIZER[script]]
    (tmp_path / "chats.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    with pytest.raises(ValueError, match=r"weights has no tokenizer.json .*; fix: --tokenizer"):
        qwen3.parse(script, ["--weights", str(weights), *argv])
    named = qwen3.parse(script, ["--weights", str(weights), *argv, "--tokenizer", str(qwen3.DEMO_TOKENIZER)])
    assert named.tokenizer == qwen3.DEMO_TOKENIZER
    shutil.copyfile(qwen3.DEMO_TOKENIZER / "tokenizer.json", weights / "tokenizer.json")
    assert qwen3.parse(script, ["--weights", str(weights), *argv]).tokenizer == weights


def test_drawn_weights_of_a_published_size_get_the_demos_tokenizer_on_the_demos_data_alone(tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"corpus{suffix}").write_text("text")
    drawn = ["--size", "0.6B", "--from-scratch"]
    with pytest.raises(ValueError, match="size 0.6B has drawn weights and no tokenizer; fix: --tokenizer"):
        qwen3.parse("train", [*drawn, "--data", str(tmp_path / "corpus")])
    assert qwen3.parse("train", drawn).tokenizer == qwen3.DEMO_TOKENIZER
    with pytest.raises(ValueError, match="size 8B has no tokenizer of its own; fix: --tokenizer"):
        qwen3.parse("preprocess", ["--size", "8B", "--data", str(tmp_path)])


def test_demos_weights_have_the_demos_tokenizer_however_they_are_named(monkeypatch):
    monkeypatch.chdir(qwen3.HERE)
    for name in (qwen3.DEMO_WEIGHTS, "demo/weights", qwen3.HERE / "demo" / ".." / "demo" / "weights"):
        assert qwen3.parse("infer", ["--weights", str(name), "--prompt", "x"]).tokenizer == qwen3.DEMO_TOKENIZER


# ------------------------------------------------------------------------------------------ encoders beside a checkpoint


def checkpoint(folder, weights, config):
    """Writes a checkpoint, state.json and empty manifest, of a run that was trained with these encoders."""
    folder.mkdir(parents=True)
    start = {"weights": str(weights), **wan21.frozen_parts(weights, config)}
    values = {"step": 3, "start": start, "model": vars(config) | {"patch_size": list(config.patch_size)}}
    (folder / "state.json").write_text(json.dumps(values))
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def encoders(tmp_path):
    """Makes a folder of weights that is not the demo's. Its VAE and its text encoder hold one number each."""
    folder = released(tmp_path / "weights", "1.3B")
    for i, part in enumerate(("vae", "text_encoder")):
        save_file({"x": torch.tensor([float(i)])}, folder / part / "model.safetensors")
    return folder


def test_a_checkpoint_is_sampled_beside_the_encoders_of_its_run(encoders, tmp_path):
    run = checkpoint(tmp_path / "run" / "step-000003", encoders, wan_case.config.SIZES["1.3B"])
    for named in (run, run.parent):
        o = wan21.parse("infer", ["--checkpoint", str(named), "--prompt", "x"])
        assert (o.weights, o.size, o.video) == (encoders, "1.3B", "81x480x832")


def test_a_checkpoint_is_not_sampled_beside_other_encoders(encoders, tmp_path):
    run = checkpoint(tmp_path / "run" / "step-000003", encoders, wan_case.config.SIZES["1.3B"])
    argv = ["--checkpoint", str(run), "--prompt", "x"]
    other = tmp_path / "other"
    shutil.copytree(encoders, other, ignore=shutil.ignore_patterns("diffusion_pytorch_model*"))
    (other / "transformer" / "diffusion_pytorch_model.safetensors").symlink_to(
        encoders / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    save_file({"x": torch.tensor([7.0])}, other / "vae" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"another vae than {other} has; fix: --weights {encoders}"):
        wan21.parse("infer", [*argv, "--weights", str(other)])
    encoders.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=rf"the transformer alone, and {encoders} .* is not there; fix: --weights"):
        wan21.parse("infer", argv)
    assert wan21.parse("infer", [*argv, "--weights", str(tmp_path / "moved")]).weights == tmp_path / "moved"


# --------------------------------------------------------------------------------------------------- rates and warm-up


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
def test_without_options_every_device_runs_the_tiny_size(device, monkeypatch):
    monkeypatch.setenv("ZOO_DEVICE", device)
    assert qwen3.parse("train", []).size == qwen3.parse("infer", []).size == "tiny"
    assert wan21.parse("train", []).size == "tiny" and wan21.parse("infer", ["--task", "i2v"]).size == "tiny-i2v"


@pytest.mark.parametrize(
    ("argv", "lr", "min_lr"),
    [
        (["--job", "pretrain"], 1.25e-6, 1.25e-7),
        (["--job", "sft"], 1e-5, 1e-6),
        (["--job", "lora"], 1e-4, 1e-5),
        (["--job", "dpo"], 5e-7, 5e-8),
        (["--job", "dpo", "--lora-rank", "8"], 5e-6, 5e-7),
        (["--job", "lora", "--lr", "3e-5"], 3e-5, 3e-6),
        (["--job", "lora", "--layout", "8B-lora"], 1.25e-5, 1.25e-7),  # this layout is made for the job
        (["--job", "lora", "--layout", "8B-A3"], 1e-4, 1e-5),
        (["--job", "sft", "--layout", "8B-sft"], 1.25e-6, 1.25e-7),
    ],
)
def test_every_job_of_a_released_language_model_has_a_rate_of_its_own(argv, lr, min_lr, tmp_path, monkeypatch):
    monkeypatch.setenv("NPROC", "32")
    weights = release(tmp_path / "weights", "8B")
    data = tmp_path / "data.jsonl"
    pair = argv[1] == "dpo"
    data.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}' if pair else '{"instruction": "a", "output": "b"}'
    )
    for suffix in (".bin", ".idx"):
        (tmp_path / f"data.jsonl{suffix}").write_text("text")
    named = ["--weights", str(weights), "--tokenizer", str(qwen3.DEMO_TOKENIZER), "--data", str(data)]
    o = qwen3.parse("train", [*named, *argv])
    assert (o.lr, o.min_lr) == pytest.approx((lr, min_lr))


@pytest.mark.parametrize(
    ("argv", "lr"),
    [
        (["--job", "finetune"], 5e-6),
        (["--job", "lora"], 1e-4),
        (["--job", "dpo"], 1e-5),
        (["--job", "dpo", "--full"], 5e-6),
    ],
)
def test_every_job_of_a_released_video_model_has_a_rate_of_its_own(argv, lr, encoders, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": "a", "chosen": "a", "rejected": "b", "cap": "c"}))
    assert wan21.parse("train", ["--weights", str(encoders), "--data", str(tmp_path / "list.jsonl"), *argv]).lr == lr


def test_a_layouts_warmup_is_at_most_a_tenth_of_a_shorter_run():
    assert qwen3.parse("train", ["--steps", "50"]).warmup == 5
    assert wan21.parse("train", ["--steps", "9"]).warmup == 0
    assert qwen3.parse("train", ["--steps", "50", "--warmup", "40"]).warmup == 40
    with pytest.raises(ValueError, match="warmup=50 of 50 steps; expected fewer; fix: --warmup or --steps"):
        qwen3.parse("train", ["--steps", "50", "--warmup", "50"])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "WSD"])
def test_no_step_trains_at_rate_zero(schedule):
    o = qwen_case.options(lr=1e-3, lr_schedule=schedule, steps=20, warmup=2)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    scheduler = train.build_scheduler(o, optimizer)
    rates = []
    scheduler.step(1)
    for _ in range(o.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    assert min(rates) == rates[-1] > 0 and max(rates) == pytest.approx(1e-3) and rates[0] == pytest.approx(5e-4)
    assert rates[-1] < 0.6 * max(rates) and optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_a_run_says_what_it_goes_on_with(tmp_path):
    """A real run's checkpoint holds its tokenizer, starting facts and options. Each call's config file is kept."""
    from ranks import run_ranks

    qwen3.prepare(qwen3.parse("train", []))
    for suffix in (".bin", ".idx"):
        shutil.copy(qwen3.DEMO_DATA / "text" / f"train{suffix}", tmp_path / f"mine{suffix}")
    run = ["--seq-len", "32", "--global-batch", "2", "--save-every", "0", "--workers", "0",
           "--data", tmp_path / "mine", "--out", tmp_path / "run"]  # fmt: skip
    run_ranks(1, qwen_case.job, *run, "--steps", "1")
    run_ranks(1, qwen_case.job, *run, "--steps", "2", "--lr", "1e-3")
    last = tmp_path / "run" / "checkpoints" / "step-000002"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (last / name).read_bytes() == (qwen3.DEMO_TOKENIZER / name).read_bytes()
    state = json.loads((last / "state.json").read_text())
    o = qwen3.parse("train", [*map(str, run), "--steps", "2", "--lr", "1e-3"])
    assert state["start"] == json.loads(json.dumps(qwen3.run_facts(o))) and state["options"] == cli.as_json(o)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "changed since then: " in log and "steps 1 -> 2" in log and "lr 0.005 -> 0.001" in log
    assert "steps = 1" in (tmp_path / "run" / "config.1.toml").read_text()
    assert "steps = 2" in (tmp_path / "run" / "config.toml").read_text()
    infer_options = qwen3.parse("infer", ["--weights", str(last), "--prompt", "x"])
    assert infer_options.tokenizer == last


# ------------------------------------------------------------------------------------------------------- words of a run


@pytest.mark.parametrize(("epochs", "steps", "warmup", "says"), [(None, 600, 60, "150.00"), (2.5, 10, 1, "2.50")])
def test_epochs_are_counted_and_may_stand_for_steps(epochs, steps, warmup, says, capsys, monkeypatch):
    monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
    o = qwen_case.options(steps=600, warmup=60, epochs=epochs)
    o = train.count_epochs(o, 15 if epochs is None else 16)  # samples; a step takes 4
    o = train.count_epochs(o, 16) if epochs is None else o
    assert (o.steps, o.warmup) == (steps, warmup)
    printed = capsys.readouterr().out
    assert (
        "an epoch is 4.0 steps (16 samples, 4 a step)" in printed
        and f"{steps} steps, {warmup} of them warm-up, are {says} epochs" in printed
    )


def test_what_a_run_starts_from_is_said(tmp_path):
    weights = release(tmp_path / "weights")
    own = ["--weights", str(weights), "--tokenizer", str(qwen3.DEMO_TOKENIZER)]
    starts = {
        "drawn weights, seed 3": ["--seed", "3"],
        "the demo's weights": ["--job", "lora"],
        f"released weights {weights}": own,
    }
    for words, argv in starts.items():
        assert starts_from(qwen3.parse("train", argv), qwen3.DEMO).startswith(words)
    assert wan21.starts_from(wan21.parse("train", [])).startswith("drawn weights, seed 0, beside the VAE")
    assert wan21.starts_from(wan21.parse("train", ["--job", "lora"])).startswith("the demo's weights")


def test_the_command_at_the_end_of_a_run_is_one_that_parses(tmp_path):
    """This holds for a run that trains adapters and for one that trains all parameters."""
    from types import SimpleNamespace

    adapted = qwen3.parse("train", ["--job", "lora", "--out", str(tmp_path)])
    command = qwen_case.train.command_that_generates(adapted, None)
    assert command.endswith(f"--weights {qwen3.DEMO_WEIGHTS} --adapter {tmp_path}/adapter "
                            f"--tokenizer {qwen3.DEMO_TOKENIZER} --prompt TEXT")  # fmt: skip
    whole = qwen3.parse("train", ["--out", str(tmp_path)])
    assert qwen_case.train.command_that_generates(whole, "c").endswith(
        "generate.sh --weights c --prompt TEXT --no-chat"
    )
    video, sizes = wan_case.train.command_that_samples, wan_case.config.SIZES
    o = SimpleNamespace(adapts=False, export=None, buckets="9x48x48,1x48x48")
    assert video(o, sizes["tiny-i2v"], "c").endswith(
        "infer_i2v.sh --checkpoint c --video 9x48x48 --image PICTURE --prompt TEXT"
    )


def test_captions_longer_than_the_text_encoder_are_named(capsys):
    from zoo.wan21.encoders import TextEncoder

    encoder = TextEncoder(wan21.DEMO_WEIGHTS, torch.device("cpu"), torch.float32, 16)
    short, long = "a handwritten three", "a handwritten three moves up " * 6
    encoder.encode([short, long, long])
    printed = capsys.readouterr().err
    length = len(encoder.tokenizer(long.strip()).input_ids)
    assert length > 16 and printed.count("warning") == 1
    assert f"the last {length - 16} of {length} are left out of '{long[:60]}'" in printed


def test_latents_that_are_not_finite_are_an_error_and_no_black_video(monkeypatch):
    from types import SimpleNamespace

    from zoo.wan21 import infer

    o = wan21.parse("infer", [])
    encoder = SimpleNamespace(model=torch.nn.Identity(), encode=lambda prompts: torch.zeros(len(prompts), 4, 2))
    parts = SimpleNamespace(encoder=encoder, frames=None, chunks=[], position=None, pair=None,
                            codec=SimpleNamespace(vae=torch.nn.Identity()))  # fmt: skip
    monkeypatch.setattr(infer, "sample", lambda *a, **k: torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="latents are not finite.*fix: --weights"):
        infer.latents_of(o, wan_case.config.SIZES["tiny"], parts, [SimpleNamespace(prompt="x")], [0])


def test_a_prompt_too_long_for_the_model_is_refused_before_anything_starts(tmp_path):
    rows = [{"prompt": "short"}, {"prompt": "a b " * 1200}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"prompts.jsonl:2 has \d+ tokens, and 256 of an answer .* 2048 positions"):
        qwen3.parse("infer", ["--prompts", str(tmp_path / "prompts.jsonl")])
    text = "word " * 400  # it has more bytes than positions are left, but fewer tokens
    assert qwen3.parse("infer", ["--prompt", text]).prompt == text


@pytest.mark.parametrize("targets", ["q_proj,", "q_proj,,v_proj"])
def test_an_empty_name_of_a_linear_is_called_one(targets):
    with pytest.raises(ValueError, match="adapters on an empty name; expected some of q_proj"):
        qwen3.parse("train", ["--job", "lora", "--lora-targets", targets])
    with pytest.raises(ValueError, match="no linear is called ''; expected"):
        wan21.parse("train", ["--job", "lora", "--lora-targets", targets.replace("_proj", "")])


def test_own_weights_are_evaluated_on_the_local_tasks(tmp_path):
    weights = release(tmp_path / "weights")
    o = qwen3.parse("evaluate", ["--weights", str(weights), "--tokenizer", str(qwen3.DEMO_TOKENIZER)])
    assert o.tasks == "sort_digits,sort_digits_choice" and o.task_folder == qwen3.DEMO_TASKS
