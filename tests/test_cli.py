"""The option contract: which options are refused, with which message, what launchers guarantee. No process group is
built."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from wan_case import RECIPE, config, convert, jobs

from common import cli

pytestmark = pytest.mark.L4

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "zoo" / RECIPE
PUBLISHED = {"1.3B": 1_418_996_800, "14B": 14_288_491_584}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("WORLD_SIZE", "NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


def refusal(*argv, script: str = "train") -> str:
    """Returns the message that refuses these options. It must be one line and must say how to go on."""
    with pytest.raises(ValueError) as error:
        jobs.parse(script, [str(word) for word in argv])
    message = str(error.value)
    assert "\n" not in message and re.search(r"fix: |did you mean|see --help", message), message
    return message


def shell(*command, check: int | None = 0, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Runs a command with this interpreter behind the launchers. `check`: the exit code it must have; None: any."""
    env = {**os.environ, "ZOO_PYTHON": sys.executable, "ZOO_DEVICE": "cpu", "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert check is None or done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def released(folder: Path, size: str, layout: str = "diffusers", tamper=lambda header: None) -> Path:
    """Makes a released folder of a published size. Config and headers are true; the data take no room on the disk."""
    architecture = config.SIZES[size]
    weights_folder = folder / "transformer" if layout == "diffusers" else folder
    for part in (weights_folder, folder / "vae", folder / "text_encoder", folder / "tokenizer"):
        part.mkdir(parents=True, exist_ok=True)
    values = architecture.to_diffusers() if layout == "diffusers" else architecture.to_original()
    (weights_folder / "config.json").write_text(json.dumps(values))
    rename = convert.to_diffusers if layout == "diffusers" else str
    header = {rename(name): list(shape) for name, shape in convert.shapes(architecture).items()}
    tamper(header)
    end, described = 0, {}
    for name, shape in header.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        described[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(described).encode()
    file = weights_folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)
    return folder


# ------------------------------------------------------------------------------------------------ options and layouts

# name: (options, processes, parts of the message). The tiny model has 4 heads and 4 layers; GIVEN makes 36 tokens.
GIVEN = ["--buckets", "13x48x48", "--micro-batch", "32", "--global-batch", "32"]
REFUSED = {
    "unknown option": ("--setps 3", 1, ["'--setps'", "did you mean --steps?"]),
    "abbreviated option": ("--step 3", 1, ["did you mean --steps?"]),
    "stray word": ("tiny", 1, ["unknown option 'tiny'"]),
    "unknown size": ("--size tinny", 1, ["'tinny'", "did you mean tiny?"]),
    "unknown layout": ("--layout 14b", 1, ["'14b'", "did you mean 14B?"]),
    "layout of another size": ("--size tiny --layout 14B", 1, ["'14B' is for size 14B, not tiny"]),
    "unknown choice": ("--precision fp16", 1, ["fp16", "fp32", "bf16"]),
    "not a number": ("--steps 1.5", 1, ["--steps", "1.5"]),
    "heads by tp": ("--tp 3", 3, ["tp=3 does not divide 4 attention heads", "use 1, 2, 4", "--tp"]),
    "heads by ulysses": ("--cp 8", 8, ["ulysses=8 does not divide the 4 heads", "use 1, 2, 4", "--ulysses"]),
    "heads of a tp rank by ulysses": ("--tp 2 --cp 4", 8, ["ulysses=4 does not divide the 2 heads", "use 1, 2"]),
    "cp by ulysses": ("--cp 3 --ulysses 2", 3, ["ulysses=2 does not divide cp=3", "use 1, 3"]),
    "tokens by cp": ("--cp 8 --ulysses 1", 8, ["36 tokens", "not divisible by 8", "--cp"]),
    "tokens by cp and sp": ("--tp 2 --sp --cp 4 --ulysses 2", 8, ["36 tokens", "by 8", "sp over tp=2", "--no-sp"]),
    "layers by pp": ("--pp 3", 3, ["pp*vpp = 3*1 does not divide 4 layers", "use 1, 2, 4", "--pp"]),
    "layers by pp*vpp": ("--pp 2 --vpp 4", 2, ["pp*vpp = 2*4 does not divide 4 layers"]),
    "stages that are no numbers": ("--pp 2 --stages 3,x", 2, ["stages='3,x'", "10,12,14", "--stages"]),
    "stages by layers": ("--pp 2 --stages 3,2", 2, ["2 numbers with sum 5", "pp*vpp = 2 with sum 4", "--stages"]),
    "stages by pp*vpp": ("--pp 2 --vpp 2 --stages 2,2", 2, ["2 numbers with sum 4", "pp*vpp = 4 with sum 4"]),
    "sp without tp": ("--sp", 1, ["sp needs tp > 1", "--no-sp"]),
    "vpp without pp": ("--vpp 2", 1, ["vpp=2 needs pp > 1"]),
    "micro-batches of vpp": ("--pp 2 --vpp 2", 2, ["micro-batches (1)", "multiple of pp=2", "--global-batch"]),
    "fsdp with tp": ("--fsdp --tp 2", 2, ["fsdp with tp=2", "--no-fsdp"]),
    "fsdp with pp": ("--fsdp --pp 2", 2, ["fsdp with tp=1, pp=2"]),
    "global batch": ("--global-batch 30 --micro-batch 4", 1, ["global_batch=30", "micro_batch*dp = 4*1"]),
    "global batch of 3 ranks": ("--micro-batch 1", 3, ["global_batch=32", "micro_batch*dp = 1*3"]),
    "world": ("--tp 2", 3, ["tp*pp*cp = 2*1*1 = 2 does not divide 3 processes", "NPROC"]),
    "no processes": ("", 0, ["NPROC='0'", "at least 1"]),
    "processes in words": ("", "two", ["NPROC='two'"]),
    "frames of a bucket": ("--buckets 12x48x48", 1, ["12 frames", "4n+1 (9, 13)", "--buckets"]),
    "side of a bucket": ("--buckets 13x50x48", 1, ["a side of 50", "multiple of 16 (48, 64)"]),
    "shape of a bucket": ("--buckets 13x48", 1, ["'13x48'", "FRAMESxHEIGHTxWIDTH"]),
    "resume from nowhere": ("--resume no/such/run", 1, ["no/such/run", "--resume"]),
    "final learning rate": ("--min-lr 1", 1, ["min_lr=1.0 is above", "--min-lr"]),
    "gathering on one rank": ("--overlap-param-gather --tp 2", 2, ["with dp*cp = 1", "--no-overlap-param-gather"]),
    "gathering under FSDP": ("--overlap-param-gather --fsdp", 2, ["overlap_param_gather with fsdp", "--no-fsdp"]),
    "offloaded optimizer under FSDP": ("--offload-optimizer --fsdp", 2, ["fsdp", "--no-offload-optimizer"]),
    "remainders of fp32": ("--master-remainders --precision fp32", 1, ["precision=fp32", "--precision bf16"]),
    "remainders under FSDP": ("--master-remainders --precision bf16 --fsdp", 2, ["fsdp", "--no-master-remainders"]),
    "steps to profile": ("--profile-steps ten", 1, ["'ten'", "10-12"]),
    "ranks to profile": ("--profile-ranks all", 1, ["'all'", "0,8"]),
    "steps and epochs": ("--steps 3 --epochs 2", 1, ["--steps 3 and --epochs 2.0", "leave one out"]),
    "prompts to sample": ("--sample-prompts no.txt", 1, ["--sample-prompts no.txt does not exist"]),
    "weights folder": ("--weights no/such/folder", 1, ["no/such/folder", "--weights"]),
    "data file": ("--data no.jsonl", 1, ["no.jsonl", "--data"]),
    "kind of data file": ("--data no.parquet", 1, ["no.parquet", "expected .jsonl, .json, .csv or data.txt"]),
    "own data without weights": ("--size 14B --data my.jsonl", 1, ["--size 14B", "--weights DIR"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_options_are_refused_with_the_reason_and_the_fix(case, monkeypatch):
    options, processes, parts = REFUSED[case]
    monkeypatch.setenv("NPROC", str(processes))
    message = refusal(*GIVEN, *options.split())
    assert all(part in message for part in parts), message


# The same for sampling: the tiny model makes 13x48x48, 6 latent rows, in 20 steps with guidance 4.
REFUSED_TO_SAMPLE = {
    "no second branch": ("--cfg-parallel --cfg 1", 2, ["cfg=1, which has no second branch", "--no-cfg-parallel"]),
    "one rank for two branches": ("--cfg-parallel", 1, ["1 data-parallel ranks (1 processes", "an even number"]),
    "three ranks for two branches": ("--cfg-parallel --cp 2", 6, ["3 data-parallel ranks (6 processes", "NPROC"]),
    "strips of one rank": (
        "--vae-parallel",
        2,
        ["one rank to each of 2 videos", "--cfg-parallel", "--no-vae-parallel"],
    ),
    "strips of no row": ("--vae-parallel --tp 4 --cfg-parallel", 8, ["8 ranks of 6 latent rows"]),
    "strips and tiles": ("--vae-parallel --vae-tiling --cfg-parallel", 2, ["expected one of them", "--no-vae-tiling"]),
    "start after end": ("--cache attention --cache-start 9 --cache-end 9", 1, ["start < end < 20", "--cache-end"]),
    "end after the last step": ("--cache blocks --cache-end 20", 1, ["cache_end=20 of 20 sampling steps"]),
    "interval": ("--cache blocks --cache-interval 0", 1, ["cache_interval=0", "[1, inf)"]),
    "start of no cache": ("--cache-start 3", 1, ["cache_start without a cache", "--cache attention or blocks"]),
    "unknown cache": ("--cache block", 1, ["--cache", "'block'", "'attention', 'blocks'"]),
    "blocks of no block cache": ("--cache attention --cache-blocks 1-2", 1, ["'1-2' with --cache attention"]),
    "blocks beyond the last": ("--cache blocks --cache-blocks 1-4", 1, ["'1-4'", "within 0-3"]),
    "blocks backwards": ("--cache blocks --cache-blocks 2-1", 1, ["'2-1'", "FIRST-LAST"]),
    "nothing left": ("--sparse 1", 1, ["sparse=1.0", "[0, 1)"]),
    "sparse on a small grid": ("--sparse 0.5", 1, ["4x3x3 tokens (13x48x48)", "at least 5x128x128", "--sparse 0"]),
    "sparse on one frame": ("--sparse 0.5 --video 1x128x128", 1, ["1x8x8 tokens"]),
    "sparse after the last step": ("--sparse 0.5 --sparse-start 20 --video 5x128x128", 1, ["sparse_start=20 of 20"]),
    "sparse start of dense": ("--sparse-start 2", 1, ["sparse_start=2 with dense attention", "--sparse"]),
    "sparse ring": ("--sparse 0.5 --video 5x128x128 --cp 2 --ulysses 1", 2, ["a ring of 2", "--ulysses 2"]),
    "int8 shards": ("--quantize int8 --fsdp", 2, ["quantize=int8 with fsdp", "--no-fsdp"]),
    "offloaded shards": ("--cpu-offload --fsdp", 2, ["cpu_offload with fsdp", "--no-cpu-offload"]),
    "frames of a shape": ("--video 80x64x64", 1, ["80 frames", "4n+1 (77, 81)", "fix: --video"]),
    "two shapes": ("--video 13x48x48,5x48x48", 1, ["13x48x48,5x48x48 names 2 shapes; expected one", "fix: --video"]),
    "sampler": ("--sampler ddim", 1, ["'ddim'", "unipc", "dpm", "euler"]),
}


@pytest.mark.parametrize("case", REFUSED_TO_SAMPLE)
def test_impossible_sampling_is_refused_with_the_reason_and_the_fix(case, monkeypatch):
    options, processes, parts = REFUSED_TO_SAMPLE[case]
    monkeypatch.setenv("NPROC", str(processes))
    message = refusal(*options.split(), script="infer")
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("options", "processes", "parts"),
    [("--cache-start 3", 1, ["cache_start: search finds"]), ("", 2, ["2 videos at a time", "--cfg-parallel"])],
)
def test_impossible_search_is_refused(options, processes, parts, monkeypatch):
    monkeypatch.setenv("NPROC", str(processes))
    message = refusal(*options.split(), script="search")
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        *[(o, v, "[1, inf)") for o in ("steps", "keep", "log-every", "tp", "pp", "vpp", "cp", "ulysses") for v in "0"],
        *[(o, v, "[1, inf)") for o in ("micro-batch", "global-batch", "max-bad-steps", "sample-steps") for v in "0"],
        ("steps", "-1", "[1, inf)"),
        *[("lr", v, "(0, inf)") for v in ("0", "-1e-5", "nan", "inf")],
        *[(o, v, "[0, 1]") for o in ("max-drop", "caption-dropout") for v in ("-0.1", "1.1")],
        *[(o, "1", "[0, 1)") for o in ("beta1", "beta2", "ema")],
        *[(o, "-1", "[0, inf)") for o in ("min-lr", "warmup", "save-every", "workers", "weight-decay", "clip", "fps")],
        ("shift", "0", "(0, inf)"),
    ],
)
def test_number_that_makes_no_sense_is_refused(option, value, rule):
    message = refusal(f"--{option}={value}")
    assert f"{option.replace('-', '_')}=" in message and rule in message and f"fix: --{option}" in message


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("stepz = 3", ["unknown key 'stepz' in layout 'tiny'", "(steps?)"]),
        ('tp = "2"', ["tp='2'", "type int"]),
        ("sp = 1", ["sp=1", "type bool"]),
        ("tp = true", ["tp=True", "type int"]),
        ('recompute = "half"', ["recompute='half'", "none, selective, full"]),
        ("cp = 0", ["cp=0", "[1, inf)"]),
        ("steps =", ["line 2"]),
    ],
)
def test_layout_with_a_wrong_key_or_value_is_refused(line, parts, tmp_path, monkeypatch):
    (tmp_path / "parallel.toml").write_text(f'[tiny]\n{line}\nsize = "tiny"\n')
    monkeypatch.setattr(jobs, "HERE", tmp_path)
    with pytest.raises(ValueError) as error:
        jobs.parse("train", [])
    assert all(part in str(error.value) for part in parts), error.value


def test_size_that_only_parallel_toml_knows_is_refused(tmp_path, monkeypatch):
    (tmp_path / "parallel.toml").write_text('[9B]\nsize = "9B"\nbuckets = "13x48x48"\n')
    monkeypatch.setattr(jobs, "HERE", tmp_path)
    assert "unknown size '9B'; expected tiny, 1.3B, 14B" in refusal("--size", "9B")


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, ["is a FluxTransformer2DModel", "WanTransformer3DModel"]),
        ({"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36}, ["added_kv_proj_dim = 5120", "= 1536"]),
        ({"window": 3}, ["does not know: window"]),
        ({"num_layers": 31}, ["none of tiny, 1.3B, 14B", "nearest 1.3B: num_layers 31 != 30"]),
        ({"ffn_dim": None}, ["nearest 1.3B: ffn_dim None != 8960"]),
    ],
    ids=["other class", "image features of another width", "unknown key", "other depth", "no value"],
)
def test_weights_of_another_model_are_refused(values, parts, tmp_path):
    folder = released(tmp_path, "1.3B")
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    message = refusal("--weights", folder)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("kind", "part"), [("vace", "expected t2v, i2v or flf2v"), ("i2v", "nearest 14B: image_dim 1280 != None")]
)
def test_original_config_of_another_kind_of_model_is_refused(kind, part, tmp_path):
    folder = released(tmp_path, "14B", "original")
    values = json.loads((folder / "config.json").read_text()) | {"model_type": kind}
    (folder / "config.json").write_text(json.dumps(values))
    assert part in refusal("--weights", folder, "--to", "sharded", script="convert")


@pytest.mark.parametrize("text", ["", "[1]", '{"dim": 5'])
def test_damaged_config_is_refused_by_name(text, tmp_path):
    folder = released(tmp_path, "1.3B")
    (folder / "transformer" / "config.json").write_text(text)
    assert "transformer/config.json" in refusal("--weights", folder)


def test_weights_of_another_size_are_refused_with_what_differs(tmp_path):
    message = refusal("--weights", released(tmp_path, "1.3B"), "--size", "14B")
    assert "not of size 14B" in message and "dim 1536 != 5120" in message and "num_layers 30 != 40" in message


def test_missing_extra_and_misshaped_tensors_are_listed(tmp_path):
    def tamper(header: dict) -> None:
        header["intruder"] = header.pop("proj_out.bias")
        header["blocks.29.ffn.net.2.weight"].reverse()

    message = refusal("--weights", released(tmp_path, "1.3B", tamper=tamper))
    for part in (
        "1 missing: proj_out.bias",
        "1 not of this model: intruder",
        "1 misshaped: blocks.29.ffn.net.2.weight",
    ):
        assert part in message


def test_truncated_safetensors_is_refused(tmp_path):
    folder = released(tmp_path, "1.3B")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert f"{file} is cut short" in refusal("--weights", folder)


def test_folder_with_only_pickles_is_refused(tmp_path):
    folder = released(tmp_path, "1.3B")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.bin"))
    assert "pickled weights (diffusion_pytorch_model.bin)" in refusal("--weights", folder)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_folder_without_the_frozen_parts_cannot_train_or_sample(part, tmp_path):
    folder = released(tmp_path, "1.3B")
    shutil.rmtree(folder / part)
    for script in ("train", "infer"):
        argv = ["--prompt", "x"] if script == "infer" else []
        assert f"no {part}/" in refusal("--weights", folder, *argv, script=script)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("size", [*PUBLISHED, "tiny-i2v", "14B-i2v", "14B-flf2v"])
def test_size_and_layout_follow_from_the_weights(size, layout, tmp_path):
    folder = released(tmp_path, size, layout)
    o = jobs.parse("convert", ["--weights", str(folder), "--to", "sharded"])
    assert (o.size, o.layout) == (size, size)


# ---------------------------------------------------------------------------------------------------- data and prompts


def test_malformed_row_is_refused_with_file_and_line(tmp_path):
    data = tmp_path / "videos.jsonl"
    data.write_text(json.dumps({"path": "videos.jsonl", "cap": "a"}) + '\n{"path": "b.mp4", "cap": }\n')
    assert f"{data}:2" in refusal("--data", data)


def test_help_and_readme_list_the_keys_a_row_may_have(capsys):
    with pytest.raises(SystemExit):
        jobs.parse("train", ["--help"])
    help_text, readme = capsys.readouterr().out, (FOLDER / "README.md").read_text()
    for key in ("path", "video", "file_path", "file_name", "cap", "caption", "text", "prompt", "chosen", "rejected"):
        assert re.search(rf"\b{key}\b", help_text.split("--data")[2].split("--validation")[0]), key
        assert f"`{key}`" in readme or f'"{key}":' in readme, key


def test_too_many_dropped_rows_are_refused_with_counts_and_the_first(tmp_path):
    data = tmp_path / "videos.jsonl"
    rows = [{"path": "videos.jsonl", "cap": "here"}, {"path": "gone.mp4", "cap": "gone"}, {"path": "videos.jsonl"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = refusal("--data", data)
    for part in ("1 missing file (first: videos.jsonl:2", "1 no caption (first: videos.jsonl:3", "--max-drop"):
        assert part in message
    assert jobs.parse("train", ["--data", str(data), "--max-drop", "0.7"]).max_drop == 0.7


@pytest.mark.parametrize(("text", "part"), [(None, "does not exist"), ("\n \n", "holds no prompt")])
@pytest.mark.parametrize(("script", "flag"), [("infer", "--prompts"), ("train", "--sample-prompts")])
def test_prompts_file_must_hold_a_prompt(text, part, script, flag, tmp_path):
    if text is not None:
        (tmp_path / "prompts.txt").write_text(text)
    assert part in refusal(flag, tmp_path / "prompts.txt", script=script)


def test_sampling_released_weights_needs_a_prompt_and_a_checkpoint_that_exists(tmp_path):
    folder = released(tmp_path, "1.3B")
    assert "--prompt" in refusal("--weights", folder, script="infer")
    assert "--checkpoint" in refusal("--checkpoint", tmp_path / "gone", script="infer")


@pytest.mark.parametrize(("script", "argv"), [("infer", ["--prompt", "x"]), ("convert", ["--to", "original"])])
def test_published_size_without_weights_cannot_be_sampled_or_converted(script, argv):
    assert "--size 14B" in refusal("--size", "14B", *argv, script=script)


def test_conversion_needs_a_target_kind_and_a_free_folder(tmp_path):
    assert "--to" in refusal(script="convert")
    (tmp_path / "file").touch()
    assert "not an empty folder" in refusal("--to", "original", "--out", tmp_path, script="convert")
    assert "--export" in refusal("--export", tmp_path)


def test_what_was_asked_for_is_not_replaced_by_the_demo():
    assert jobs.parse("train", ["--buckets", "5x32x48"]).buckets == "5x32x48"
    assert jobs.parse("infer", ["--video=5x32x48"]).video == "5x32x48"


# ----------------------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("options", [["--setps", "3"], ["--tp", "3"], ["--data", "no.jsonl"], ["--steps", "0"]])
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(options):
    done = shell(sys.executable, "-m", "common.cli", f"zoo.{RECIPE}", "train", *options, check=2)
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [["--help"], ["--print-config"], ["--dry-run"], ["--steps", "0"]])
@pytest.mark.parametrize("script", ["train", "infer"])
def test_torch_is_not_imported_to_check_options(script, options):
    code = (
        "import atexit, sys; from common import cli\n"
        "atexit.register(lambda: print('heavy:', *sorted({'torch', 'numpy', 'transformers', 'diffusers'} & set(sys.modules))))\n"
        f"sys.argv = ['cli', 'zoo.{RECIPE}', '{script}', *{options}]; cli.main()"
    )
    done = shell(sys.executable, "-c", code, check=None)
    assert done.stdout.splitlines()[-1] == "heavy:", done.stdout + done.stderr


@pytest.mark.parametrize("nodes", [{}, {"NODE_RANK": "1"}, {"MASTER_ADDR": "node0"}])
def test_several_nodes_without_a_meeting_place_are_refused(nodes):
    done = shell(
        sys.executable, "-m", "common.cli", f"zoo.{RECIPE}", "train", "--micro-batch", "1", check=2, NNODES="2", **nodes
    )
    assert all(name in done.stderr for name in {"NODE_RANK", "MASTER_ADDR"} - nodes.keys())


# --------------------------------------------------------------------------------------------- print-config and dry-run


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("train", ["--steps", "7", "--lr", "2e-5", "--no-deterministic", *GIVEN]),
        ("infer", ["--prompt", 'a "quoted"\\ line\n\tand é, 视频', "--cfg", "1"]),
        ("convert", ["--to", "original"]),
    ],
)
def test_printed_config_is_toml_that_gives_the_same_run_again(script, argv):
    o = jobs.parse(script, argv)
    values = tomllib.loads(cli.to_toml(o))
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(o).items() if v is not None}
    assert values == plain
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}={value}"]
    assert jobs.parse(script, flags) == o


@pytest.mark.L1
@pytest.mark.parametrize("size", PUBLISHED)
def test_dry_run_of_released_weights_says_the_published_parameter_count(size, tmp_path):
    folder = released(tmp_path, size)
    launcher = FOLDER / "pretrain_t2v.sh"
    batch = ["--micro-batch", "1", "--global-batch", "128"]
    done = shell("bash", launcher, "--weights", folder, *batch, "--dry-run", NPROC="8", NNODES="16")
    assert f"parameters: {PUBLISHED[size]:,}\n" in done.stdout
    assert "world 128: tp 1 cp 1 dp 128 pp 1" in done.stdout and "rank  127" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_dry_run_plans_a_published_size_on_a_cluster_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("NPROC", "8")
    monkeypatch.setenv("NNODES", "16")
    argv = [
        "--tp",
        "4",
        "--sp",
        "--pp",
        "4",
        "--cp",
        "2",
        "--global-batch",
        "64",
        "--no-fsdp",
        "--buckets",
        "81x480x832",
    ]
    text = jobs.dry_run(jobs.parse("train", ["--weights", str(released(tmp_path, "14B")), *argv]))
    assert "world 128: tp 4 cp 2 dp 4 pp 4" in text and "81x480x832: 32760 tokens" in text and "GiB" in text
    assert "rank  127: tp 3 cp 1 dp 3 pp 3" in text


@pytest.mark.parametrize("processes, options, want", [(1, [], 64), (2, [], 32), (2, ["--pp", "2"], 64), (4, [], 16)])
def test_a_micro_batch_is_at_most_a_ranks_share_of_the_batch(processes, options, want, monkeypatch):
    monkeypatch.setenv("NPROC", str(processes))
    o = jobs.parse("train", ["--size", "tiny", *options])
    assert (o.global_batch, o.micro_batch, o.micro_batches) == (64, want, 1)


def test_rank_map_puts_every_rank_in_a_place_of_its_own(monkeypatch):
    monkeypatch.setenv("NPROC", "16")
    o = jobs.parse("train", ["--tp", "2", "--pp", "2", "--cp", "2", "--global-batch", "32", "--micro-batch", "1"])
    lines = cli.rank_map(o).splitlines()
    assert len(lines) == 16 and len({line.split(":")[1] for line in lines}) == 16


# ----------------------------------------------------------------------------------------------------------- launchers


def test_sampling_writes_a_video_for_every_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_text("a handwritten three moves up\n\na handwritten seven moves down\n")
    launcher = FOLDER / "infer_t2v.sh"
    shell("bash", launcher, "--prompts", "prompts.txt", "--out", "out", "--sample-steps", "1", cwd=tmp_path)
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"0000.mp4", "0000.gif", "0001.mp4", "0001.gif"}


def test_launchers_work_from_any_directory_whatever_lies_there(tmp_path):
    for name in ("common", "zoo", "torch"):  # a user's folders must not shadow ours
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported from the current directory')")
    for launcher in sorted(FOLDER.glob("*.sh")):
        needed = ["--to", "original"] if launcher.name == "convert.sh" else []
        relative = os.path.relpath(launcher, tmp_path)
        done = shell("bash", relative, *needed, "--print-config", cwd=tmp_path, PYTHONPATH="")
        assert tomllib.loads(done.stdout)["size"].startswith("tiny")


@pytest.fixture
def recipe_copy():
    """Copies the recipe under another name, as `cp -r` does."""
    copy = FOLDER.with_name(f"_copy{os.getpid()}")
    try:
        yield Path(shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__")))
    finally:
        shutil.rmtree(copy)


def test_copied_recipe_works_at_once_and_exit_codes_reach_the_shell(recipe_copy, tmp_path):
    launcher = recipe_copy / "pretrain_t2v.sh"
    values = tomllib.loads(shell("bash", launcher, "--print-config").stdout)
    assert values["out"].startswith(f"runs/{recipe_copy.name}-")
    assert Path(values["weights"]).is_relative_to(recipe_copy) and recipe_copy.name in values["data"]
    data = tmp_path / "videos.jsonl"
    data.write_text(json.dumps({"path": "videos.jsonl", "cap": "never opened"}) + "\n")
    (recipe_copy / "train.py").write_text("import os, sys; print(os.environ['ZOO_COMMAND']); sys.exit(7)")
    argv = ["--data", data, "--out", tmp_path / "run", "--layout", "tiny"]
    done = shell("bash", launcher, *argv, check=7)
    typed_command = f"bash zoo/{recipe_copy.name}/{launcher.name} --data {data}"
    assert done.stdout.startswith(typed_command)
    assert "exit code 7" in done.stderr
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\necho "$ZOO_COMMAND"\n')
    interpreter.chmod(0o755)
    told = shell("bash", launcher, *argv, NPROC="2", ZOO_PYTHON=str(interpreter)).stdout
    assert told.startswith(f"NPROC=2 {typed_command}")


@pytest.mark.parametrize(
    ("death", "code"), [("sys.exit(9)", 9), (f"os.kill(os.getpid(), {signal.SIGKILL})", 128 + signal.SIGKILL)]
)
def test_exit_code_is_that_of_the_rank_that_failed_first(death, code, tmp_path):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "options.py").write_text(
        f"import os, sys, time\nif os.environ['RANK'] == '1': {death}\ntime.sleep(60)  # ended by torchrun"
    )
    launch = "cli._torchrun(['--standalone'], 'stub', 'job', cli.LayoutOptions(), [])"
    call = f"import sys; from common import cli; sys.exit({launch})"
    done = shell(sys.executable, "-c", call, check=code, NPROC="2", PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert "rank 1 failed first" in done.stderr
