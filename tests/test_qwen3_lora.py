"""lora.sh: its adapters equal peft's, its layouts equal one process, its runs resume, and what it refuses."""

import functools
import json
import os
import subprocess
import sys

import pytest
import qwen_case as case
import test_qwen3 as oracle
import torch
import torch.distributed as dist
from layouts import whole_gradients
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_qwen3_layouts import my_batches

from common import checkpoint, lora, parallel, release, weights, worker
from common import train as loop

TOLERANCE = 1e-5


def draw_b(name: str, whole: torch.Tensor, generator: torch.Generator) -> None:
    whole.normal_(std=0.1, generator=generator)


def adapt(chunks, config, targets=None, **options) -> None:
    """Adds adapters to all linears, also of experts. B is drawn too, because a B of zero would hide A."""
    values = {"rank": 6, "alpha": 9, "seed": 7, "pieces": case.convert.expert_pieces(config)} | options
    lora.add(chunks, targets or case.config.adaptable(), **values)
    checkpoint.initialize(chunks, 8, draw_b, lambda name: name.endswith(".lora_B"))


# ------------------------------------------------------------------------------------------------------- against peft


def beside_peft(folder, which: str, rslora: bool) -> tuple[dict, list[str]]:
    """Returns {name: (ours, peft's)} of logits and merged weights, and the keys transformers misses or rejects."""
    import peft
    from transformers import AutoModelForCausalLM

    config = case.CONFIGS[which]
    parallel.initialize(case.options())
    case.save_oracle(folder / "base", config)
    model = oracle.ours(folder / "base")
    adapt([model], config, rslora=rslora)
    pieces = case.convert.expert_pieces(config)
    facts = {"pieces": pieces, "base": str(folder / "base"), "task": "CAUSAL_LM"}
    lora.save_adapter(folder / "adapter", [model], case.convert.released, **facts)
    tokens = torch.randint(96, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden, _ = model(tokens.flatten(), torch.arange(16).repeat(3), [0, 16, 32, 48])
        logits = (hidden.flatten(0, 1) @ model.output_weight.t()).view(3, 16, -1)
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        reference = peft.PeftModel.from_pretrained(base, folder / "adapter")
        pairs = {"logits": (logits, reference(input_ids=tokens).logits)}
        source = case.convert.open_source(folder / "base", config)
        source = release.merge_adapter(source, case.convert.adapter(folder / "adapter", config), pieces=pieces)
        case.convert.write_released(folder / "merged", config, source, None)
        reloaded = oracle.ours(folder / "merged")  # a strict load
        hidden, _ = reloaded(tokens.flatten(), torch.arange(16).repeat(3), [0, 16, 32, 48])
        pairs["merged logits"] = (hidden.flatten(0, 1) @ reloaded.output_weight.t()).view(3, 16, -1), pairs["logits"][1]
        want = reference.merge_and_unload().state_dict()
    got, info = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32, output_loading_info=True)
    pairs |= {name: (tensor, want[name]) for name, tensor in got.state_dict().items()}
    return pairs, [*info["missing_keys"], *info["unexpected_keys"]]


@pytest.mark.L2
@pytest.mark.parametrize(("which", "rslora"), [("dense", False), ("dense tied", True), ("moe", False)])
def test_adapter_and_merged_weights_equal_pefts(which, rslora, tmp_path):
    pairs, unexpected = run_ranks(1, beside_peft, tmp_path, which, rslora)[0]
    assert not unexpected
    assert not [name for name, (got, want) in pairs.items() if not oracle.close(got, want)]
    keys = weights.index(tmp_path / "base").keys()
    reader = weights.Reader()
    unchanged = [
        key for key in keys if torch.equal(*(reader.read(weights.index(tmp_path / f)[key]) for f in ("base", "merged")))
    ]
    assert not [key for key in unchanged if key.endswith(("q_proj.weight", "o_proj.weight"))]


# ------------------------------------------------------------------------------------------------------------- layouts

LAYOUTS = {
    "dp2": (2, {}),
    "fsdp2": (2, {"fsdp": True}),
    "tp2": (2, {"tp": 2}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "cp2 ring": (2, {"cp": 2, "ulysses": 1}),
    "tp2 sp recompute full": (2, {"tp": 2, "sp": True, "recompute": "full"}),
    "recompute selective": (1, {"recompute": "selective"}),
}


def run_layout(which: str, layout: dict) -> dict:
    """Runs the recipe's forward step over adapters on every rank, see `step`."""
    o, config = case.options(**layout), case.CONFIGS[which]
    parallel.initialize(o)
    chunks = case.model.build(o, config)
    case.load(chunks, case.random_state(config))
    adapt(chunks, config)
    return step(o, chunks)


def step(o, chunks) -> dict:
    """Runs a forward step and its backward. Rank 0 returns whole gradients, their norm, and the loss; the others {}."""
    wrapped = parallel.wrap(chunks, o, case.model.Qwen3Block)
    optimizer = loop.build_optimizer(o, wrapped)
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    batches = my_batches(o, 0, packed=True)
    shape = {"micro_batch": o.micro_batch, "sequence_length": case.LENGTH}
    results = loop.forward(wrapped, case.train.forward_step, batches, **shape)
    out = {"gradients": whole_gradients(o, wrapped), "loss": loop.global_loss(o, results, False)[0]}
    optimizer.prepare_grads()
    out["norm"] = optimizer.get_grad_norm()
    return out if dist.get_rank() == 0 else {}


@functools.cache
def single(which: str) -> dict:
    return run_ranks(1, run_layout, which, {})[0]


@pytest.mark.L3
@pytest.mark.parametrize(
    ("which", "name"),
    [*(("dense", n) for n in LAYOUTS), ("dense tied", "fsdp2"), ("moe", "tp2 sp"), ("moe", "fsdp2")],
)
def test_layout_equals_single_process(which, name):
    world, layout = LAYOUTS[name]
    got, want = run_ranks(world, run_layout, which, layout)[0], single(which)
    assert got["loss"] == pytest.approx(want["loss"], rel=TOLERANCE)
    assert got["norm"] == pytest.approx(want["norm"], rel=TOLERANCE)
    assert got["gradients"].keys() == want["gradients"].keys() and len(want["gradients"]) == 2 * 4 * 7
    worst = {k: ((got["gradients"][k] - g).abs().max() / g.abs().max()).item() for k, g in want["gradients"].items()}
    assert not {k: v for k, v in worst.items() if not v <= TOLERANCE}, layout


# ----------------------------------------------------------------------------------------------------------------- jobs


def chats(folder) -> list:
    rows = [{"instruction": f"Double {i}.", "output": f"{2 * i}"} for i in range(60)]
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--job", "lora", "--data", path, "--cache", folder / "cache", "--seq-len", "128", "--deterministic",
            "--save-every", "2", "--lr-schedule", "constant", "--warmup", "1", "--workers", "0"]  # fmt: skip


@pytest.mark.L4
def test_a_resumed_run_with_dropout_is_bitwise_the_unbroken_one(tmp_path):
    """Its checkpoints hold the adapters alone, and its adapter folder is one that peft reads."""
    settings = [*chats(tmp_path), "--lora-rank", "4", "--lora-dropout", "0.2"]
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        run_ranks(1, case.job, *settings, "--out", tmp_path / out, "--steps", steps)
    assert case.steps_of(tmp_path / "parts") == case.steps_of(tmp_path / "whole")
    whole, parts = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    names = checkpoint.tensor_sizes(tmp_path / "whole" / "checkpoints" / "step-000004")
    assert names and all(".lora_" in name for name in names)
    assert json.loads((tmp_path / "whole" / "adapter" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.L4
def test_a_run_goes_on_from_an_adapter_in_another_layout_and_merges_it(tmp_path):
    settings = chats(tmp_path)
    first = [*settings, "--steps", "2", "--out", tmp_path / "first", "--export", tmp_path / "adapter"]
    run_ranks(1, case.job, *first)
    second = [
        "--steps",
        "2",
        "--adapter",
        tmp_path / "adapter",
        "--out",
        tmp_path / "second",
        "--merge",
        tmp_path / "m",
    ]
    run_ranks(2, case.job, *settings, *second, "--tp", "2", "--sp")
    assert case.steps_of(tmp_path / "second")[1]["loss"] < case.steps_of(tmp_path / "first")[1]["loss"]
    config = case.config.Qwen3Config.from_folder(tmp_path / "m")
    got = case.convert.table(config).entries(tmp_path / "m")
    assert {entry.dtype for entry in got.values()} == {"F32"}  # the dtype of the run, not the bf16 of the base
    reader, base = weights.Reader(), case.convert.table(config).entries(case.jobs.DEMO_WEIGHTS)
    adapter = load_file(tmp_path / "second" / "adapter" / "adapter_model.safetensors")
    key = "model.layers.3.mlp.down_proj"
    A, B = (adapter[f"base_model.model.{key}.lora_{part}.weight"].double() for part in "AB")
    want = reader.read(base[f"{key}.weight"]).double() + 32 / 16 * B @ A
    assert oracle.close(reader.read(got[f"{key}.weight"]).double(), want) and B.abs().max() > 0
    (tmp_path / "prompts.txt").write_text("Double 7.\nSort the digits: 10482\n")
    answers = []
    for model in (["--weights", tmp_path / "m"], ["--adapter", tmp_path / "second" / "adapter"]):
        run_ranks(1, generated, *model, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "answers")
        answers.append((tmp_path / "answers").read_text())
    assert answers[0] == answers[1]


def generated(*argv) -> None:
    worker.run(f"zoo.{case.RECIPE}", "infer", case.jobs.parse("infer", ["--max-new-tokens", "12", *map(str, argv)]))


@pytest.mark.L4
def test_quantising_without_bitsandbytes_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs bitsandbytes; fix: pip install bitsandbytes"):
        case.jobs.parse("train", ["--job", "lora", "--quantize", "nf4"])


WRONG = {
    "a linear that is not adapted": (
        ["--lora-targets", "q_proj,lm_head"],
        "adapters on lm_head; expected some of q_proj",
    ),
    "a router": (["--size", "tiny-moe", "--from-scratch", "--lora-targets", "gate"], "adapters on gate; expected some"),
    "an adapter's settings": (["--adapter", "a", "--lora-rank", "8"], "--lora-rank is of new adapters"),
    "no adapter": (["--adapter", "nowhere"], "nowhere does not exist; expected an adapter's folder or .safetensors"),
    "drawn weights": (["--from-scratch", "--merge", "m"], "--merge adds adapters to released weights"),
    "another job's": (["--beta", "1"], "--beta is of dpo.sh, not of lora.sh"),
    "adapters of sft": (["--job", "sft", "--lora-rank", "8"], "--lora-rank is of lora.sh and dpo.sh, not of sft.sh"),
    "another loss's margin": (["--job", "dpo", "--gamma", "1"], "--gamma is of --preference simpo"),
    "smoothed hinge": (["--job", "dpo", "--preference", "hinge", "--label-smoothing", "0.1"], "sigmoid or simpo"),
    "nothing to merge": (["--job", "dpo", "--merge", "m"], "--merge is of adapters"),
    "quantised shards": (["--quantize", "nf4", "--fsdp"], "with fsdp; expected neither FSDP"),
    "quantised and compiled": (["--quantize", "nf4", "--compile"], "fix: --no-compile, or --quantize none"),
    "balanced pairs": (["--job", "dpo", "--aux", "0.1"], "--aux 0"),
    "no weights": (["--size", "8B"], "size 8B has no weights; fix: --weights DIR"),
}


@pytest.mark.L4
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_meant_is_refused(name, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    options, message = WRONG[name]
    with pytest.raises(ValueError) as error:
        case.jobs.parse("train", ["--job", "lora", *options])
    assert message in str(error.value)


@pytest.mark.L4
def test_keys_and_values_of_fewer_heads_than_ranks_have_no_adapters(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    options = ["--job", "lora", "--tp", "4"]
    with pytest.raises(ValueError, match="k_proj, v_proj with tp=4, where every rank holds all 2 key-value heads"):
        case.jobs.parse("train", options)
    case.jobs.parse("train", [*options, "--lora-targets", "q_proj,o_proj"])


def adapter_folder(folder, *linears: str, **facts):
    """Writes a PEFT adapter of the demo's model. It adapts these linears of layer 1, with ranks 3, 4, …"""
    shapes = case.convert.shapes(case.config.SIZES["tiny"])
    tensors, ranks = {}, {name: 3 + i for i, name in enumerate(linears)}
    for name, r in ranks.items():
        outputs, inputs = shapes[f"layers.1.{name}.weight"]
        for part, shape in (("A", (r, inputs)), ("B", (outputs, r))):
            tensors[f"base_model.model.model.layers.1.{name}.lora_{part}.weight"] = torch.ones(shape)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 99, "lora_alpha": 7, "rank_pattern": ranks, "layers_to_transform": [1]}
    (folder / "adapter_config.json").write_text(json.dumps(values | {"target_modules": list(linears)} | facts))
    return folder


@pytest.mark.L4
def test_a_run_from_an_adapter_counts_its_own_tensors_whatever_lies_beside_them(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    folder = adapter_folder(tmp_path / "a", "self_attn.q_proj", "mlp.down_proj")
    other = {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(5, 8)}
    save_file(other, folder / "pytorch_lora_weights.safetensors")  # the name that diffusers' pipelines look for
    for path in (folder, folder / "adapter_model.safetensors"):
        o = case.jobs.parse("train", ["--job", "lora", "--adapter", str(path)])
        assert case.jobs.trained_parameters(o, case.config.model_config(o)) == 3 * (128 + 192) + 4 * (384 + 128)
        start = case.jobs.starting_point(o)
        assert (start["r"], start["alpha"]) == ([3, 4], 7)
        case.jobs.parse("infer", ["--adapter", str(path)])


MORE = {
    "whole modules": ({"modules_to_save": ["lm_head"]}, "not a plain LoRA: it has {'modules_to_save': ['lm_head']}"),
    "DoRA": ({"use_dora": True}, "not a plain LoRA: it has {'use_dora': True}"),
    "experts": ({"target_parameters": ["mlp.experts.down_proj"]}, "has {'target_parameters': ['mlp.experts.down"),
    "biases": ({"bias": "lora_only"}, "not a plain LoRA: it has {'bias': 'lora_only'}"),
    "other layers": ({"layers_to_transform": [2]}, "missing: A of base_model.model.model.layers.2.self_attn.q_proj, B"),
}


@pytest.mark.L4
@pytest.mark.parametrize("name", MORE)
def test_what_is_more_than_an_adapter_is_refused_by_name_in_every_job(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    facts, message = MORE[name]
    folder = str(adapter_folder(tmp_path / "a", "self_attn.q_proj", **facts))
    for script, argv in (("train", ["--job", "lora"]), ("train", ["--job", "dpo"]), ("infer", []),
                         ("convert", ["--to", "released", "--out", str(tmp_path / "o")])):  # fmt: skip
        with pytest.raises(ValueError) as error:
            case.jobs.parse(script, [*argv, "--adapter", folder])
        assert message in str(error.value)


@pytest.mark.L4
def test_an_adapter_is_checked_without_torch(tmp_path):
    folder = adapter_folder(tmp_path / "a", "self_attn.v_proj")
    code = (
        "import importlib, sys\n"
        "jobs = importlib.import_module(sys.argv[1])\n"
        "for script, argv in (('infer', []), ('train', ['--job', 'lora']), "
        "('convert', ['--to', 'released', '--out', 'o'])):\n"
        "    jobs.parse(script, [*argv, '--adapter', sys.argv[2]])\n"
        "assert not {'torch', 'safetensors'} & set(sys.modules)\n"
    )
    run = [sys.executable, "-c", code, f"zoo.{case.RECIPE}.options", str(folder)]
    subprocess.run(run, check=True, env=os.environ | {"WORLD_SIZE": "1"})


@pytest.mark.L4
def test_checkpoints_of_adapters_go_with_the_weights_they_were_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    mine = ["--job", "lora", "--out", str(tmp_path / "run")]
    start = case.jobs.run_facts(case.jobs.parse("train", [*mine]))
    step = tmp_path / "run" / "checkpoints" / "step-000002"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    values = {"model": case.config.Qwen3Config.from_folder(case.jobs.DEMO_WEIGHTS).__dict__}
    values |= {"step": 2, "start": start}
    (step / "state.json").write_text(json.dumps(values))
    case.jobs.parse("train", mine)
    for other, named in (
        (["--lora-rank", "8"], "r 16 and not 8"),
        (["--from-scratch"], "and not 'drawn with seed 0'"),
        (["--job", "sft"], f"(--weights {start['weights']})"),
    ):
        with pytest.raises(ValueError, match="was trained from") as error:
            case.jobs.parse("train", [*mine, *other])
        assert named in str(error.value)
    with pytest.raises(ValueError, match="holds adapters of .* and no whole model"):
        case.jobs.parse("infer", ["--weights", str(step)])
