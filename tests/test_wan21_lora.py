"""lora_t2v.sh: its folder in peft and diffusers, layouts against one process, resume, merging, what it refuses."""

import dataclasses
import json
from pathlib import Path

import pytest
import test_wan21_layouts as layouts
import torch
import wan_case as case
from PIL import Image, ImageSequence
from ranks import run_ranks
from safetensors.torch import load_file

from common import checkpoint, lora, parallel, weights

TOLERANCE = 1e-5
TARGETS = case.jobs.LORA_TARGETS.split(",")
DEMO = case.jobs.DEMO_WEIGHTS


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def draw_b(name: str, whole: torch.Tensor, generator: torch.Generator) -> None:
    whole.normal_(std=0.1, generator=generator)


def adapt(chunks, **options) -> None:
    """The recipe's own targets; B drawn too, which would hide what A does while it is zero."""
    lora.add(chunks, TARGETS, **{"rank": 6, "alpha": 9, "seed": 7} | options)
    checkpoint.initialize(chunks, 8, draw_b, lambda name: name.endswith(".lora_B"))


# ------------------------------------------------------------------------------------------ against peft and diffusers


def beside_others(folder: Path, task: str) -> dict[str, torch.Tensor]:
    """Velocities of the demo's model with random adapters: ours, and in others from the folder we write."""
    import peft
    from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

    parallel.initialize(case.options())
    released = {"t2v": DEMO, "i2v": case.jobs.DEMO_I2V}[task]
    o = case.jobs.parse("train", ["--job", "lora", "--weights", str(released)])
    config = case.config.model_config(o)
    if config.given_frames:  # diffusers takes the last 512 rows for the text
        config = dataclasses.replace(config, text_len=512)
    model = case.model.build(o, config)[0]
    case.convert.fill([model], o, config)
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 16, 4, 6, 8, generator=g), torch.tensor([300.0, 800.0])
    text = torch.randn(2, config.text_len, config.text_dim, generator=g)
    given, image, theirs_x = (), {}, x
    if config.given_frames:
        y, rows = torch.randn(2, 20, 4, 6, 8, generator=g), torch.randn(2, 17, config.image_dim, generator=g)
        given, image, theirs_x = (y, rows), {"encoder_hidden_states_image": rows}, torch.cat((x, y), 1)
    with torch.no_grad():
        out = {"base": model(x, t, text, *given)}
        adapt([model], rslora=True)
        lora.save_adapter(folder / "adapter", [model], case.convert.to_diffusers, base=str(released))
        case.convert.write_pipeline_file(folder / "adapter")
        out["ours"] = model(x, t, text, *given)
        lora.merge_([model])
        out["merged here"] = model(x, t, text, *given)
        sizes, read = case.convert.source(released, config, ema=False)
        read = case.convert.merging(folder / "adapter", config, lambda name, read=read: read(name).float())
        case.convert.write_released(
            folder / "merged", "diffusers", config, {n: 2 * s for n, s in sizes.items()}, read, released
        )
        kind = WanImageToVideoPipeline if given else WanPipeline
        pipeline = kind.from_pretrained(released, torch_dtype=torch.float32)
        pipeline.load_lora_weights(folder / "adapter")
        plain = WanTransformer3DModel.from_pretrained(released / "transformer", torch_dtype=torch.float32)
        theirs = {
            "diffusers": pipeline.transformer,
            "peft": peft.PeftModel.from_pretrained(plain, folder / "adapter"),
            "merged weights in diffusers": WanTransformer3DModel.from_pretrained(folder / "merged" / "transformer"),
        }
        for name, other in theirs.items():
            inputs = {"hidden_states": theirs_x, "timestep": t, "encoder_hidden_states": text} | image
            velocity = other(**inputs, return_dict=False)[0]
            out[name] = case.model.velocity_tokens(velocity, config.patch_size)
    return out


@pytest.mark.L2
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_adapter_folder_is_the_same_model_in_peft_and_in_diffusers(task, tmp_path):
    out = run_ranks(1, beside_others, tmp_path, task)[0]
    assert relative(out["base"], out["ours"]) > 0.1
    assert not {name: off for name in out if name != "base" and (off := relative(out[name], out["ours"])) > TOLERANCE}
    header = weights.read_json(tmp_path / "adapter" / "adapter_config.json")
    assert (header["r"], header["lora_alpha"], header["use_rslora"]) == (6, 9, True)


# ------------------------------------------------------------------------------------------------------------- layouts

LAYOUTS = {  # those in which a frozen base asks something else of the layout; the rest in test_lora.py
    "recompute full": (1, {"recompute": "full"}),
    "recompute selective": (1, {"recompute": "selective"}),
    "offloaded, recompute full": (1, {"recompute": "full", "offload_activations": True}),
    "fsdp2 recompute full": (2, {"fsdp": True, "recompute": "full"}),
    "tp2 recompute selective": (2, {"tp": 2, "recompute": "selective"}),
    "tp2 sp recompute full": (2, {"tp": 2, "sp": True, "recompute": "full"}),
    "cp2 ring recompute full": (2, {"cp": 2, "ulysses": 1, "recompute": "full"}),
    "pp2 recompute full": (2, {"pp": 2, "recompute": "full"}),
}


@pytest.mark.L3
def test_layouts_equal_single_process():
    """Adapters on blocks alone: no input of the first block needs a gradient, yet every adapter has its own."""
    single = run_ranks(1, layouts.run_layout, {}, 3, True, adapt)[0]
    assert len(single["gradients"]) == 2 * 4 * (2 * 4 + 2) and all(g.any() for g in single["gradients"].values())
    for world, layout in LAYOUTS.values():
        layouts.compare(run_ranks(world, layouts.run_layout, layout, 3, True, adapt)[0], single, layout)


def merged(layout: dict, folder: Path) -> dict[str, torch.Tensor]:
    """Whole weights after `convert.merge_into`, of adapters that a group of one writes first."""
    o = case.options(**layout)
    parallel.initialize(o)
    chunks = case.model.build(o, case.CONFIG)
    case.load(chunks, case.random_state())
    if not folder.exists():
        adapt(chunks)
        lora.save_adapter(folder, chunks, case.convert.to_diffusers)
        lora.merge_(chunks)
    else:
        case.convert.merge_into(chunks, folder, case.CONFIG)
    return layouts.whole(o, chunks, gradient=False)


@pytest.mark.L3
def test_adapters_merged_into_shards_equal_those_of_a_single_process(tmp_path):
    want = run_ranks(1, merged, {}, tmp_path / "a")[0]
    for world, layout in ((1, {}), (2, {"tp": 2, "sp": True}), (2, {"pp": 2})):
        got = run_ranks(world, merged, layout, tmp_path / "a")[0]
        assert want.keys() == got.keys() and all(relative(got[name], want[name]) < 1e-6 for name in want)
    assert not torch.equal(want["blocks.0.ffn.2.weight"], case.random_state()["blocks.0.ffn.2.weight"])


# ---------------------------------------------------------------------------------------------------------------- jobs


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list:
    """Options of a run of lora_t2v.sh on twelve clips."""
    from importlib import import_module

    folder = tmp_path_factory.mktemp("clips") / "demo"
    import_module(f"zoo.{case.RECIPE}.demo.make_data").make(folder, train=12, test=0, blinking=True)
    return ["--job", "lora", "--data", folder / "train.jsonl", "--cache", folder.parent / "cache", "--global-batch", "4",
            "--workers", "0", "--save-every", "2", "--deterministic", "--lr-schedule", "constant", "--warmup", "1",
            "--sample-steps", "2", "--buckets", "13x48x48"]  # fmt: skip


@pytest.mark.L4
def test_a_resumed_run_with_dropout_is_bitwise_the_unbroken_one_and_its_checkpoints_hold_adapters_alone(
    settings, tmp_path
):
    mine = [*settings, "--lora-rank", "4", "--lora-dropout", "0.2"]
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        run_ranks(1, case.job, "train", *mine, "--out", tmp_path / out, "--steps", steps)
    assert case.steps_of(tmp_path / "parts") == case.steps_of(tmp_path / "whole")
    whole, parts = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    last = tmp_path / "whole" / "checkpoints" / "step-000004"
    names = checkpoint.tensor_sizes(last)
    assert names and all(".lora_" in name for name in names)
    for script, options in (
        ("infer", ["--checkpoint", str(last), "--prompt", "a"]),
        ("convert", ["--weights", str(last), "--to", "original", "--out", str(tmp_path / "o")]),
    ):
        with pytest.raises(ValueError, match="holds adapters of .* and no whole model; fix: .*--adapter"):
            case.jobs.parse(script, options)
    with pytest.raises(ValueError, match="was trained from r 4 and not 8"):
        case.jobs.parse("train", [*map(str, mine), "--lora-rank", "8", "--out", str(tmp_path / "whole")])


@pytest.mark.L4
def test_a_run_goes_on_from_an_adapter_in_another_layout_and_merges_it_as_convert_does(settings, tmp_path):
    adapter, merged = tmp_path / "second" / "adapter", tmp_path / "merged" / "transformer"
    run_ranks(1, case.job, "train", *settings, "--steps", "2", "--out", tmp_path / "first", "--export", tmp_path / "a")
    second = ["--steps", "2", "--adapter", tmp_path / "a", "--out", tmp_path / "second", "--merge", tmp_path / "merged"]
    run_ranks(2, case.job, "train", *settings, *second, "--tp", "2", "--sp")
    convert = ["--weights", DEMO, "--adapter", adapter, "--to", "diffusers", "--out", tmp_path / "converted"]
    run_ranks(1, case.job, "convert", *convert)
    base, want = (load_file(next(folder.glob("*.safetensors"))) for folder in (DEMO / "transformer", merged))
    got = load_file(next((tmp_path / "converted" / "transformer").glob("*.safetensors")))
    assert got.keys() == want.keys() == base.keys() and all(torch.equal(got[key], want[key]) for key in want)
    factors = {
        k.removeprefix("base_model.model."): v for k, v in load_file(adapter / "adapter_model.safetensors").items()
    }
    for key, weight in base.items():  # W + s B A with s = 1, in fp32, rounded once to the release's bf16
        A, B = (factors.get(key.replace(".weight", f".lora_{part}.weight")) for part in "AB")
        assert got[key].dtype == weight.dtype == torch.bfloat16
        assert torch.equal(got[key], weight if A is None else (weight.float() + B @ A).bfloat16()), key
    assert not torch.equal(got["blocks.3.ffn.net.2.weight"], base["blocks.3.ffn.net.2.weight"])
    videos = []
    for where in (["--adapter", adapter], ["--weights", tmp_path / "merged"]):
        out = tmp_path / f"videos{len(videos)}"
        fast = ["--precision", "bf16", "--video", "5x48x48", "--sample-steps", "2", "--format", "gif", "--out", out]
        run_ranks(1, case.job, "infer", *where, *fast, "--prompt", "a handwritten three moves up")
        with Image.open(out / "0000.gif") as gif:
            videos.append([frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(gif)])
    assert videos[0] == videos[1]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An adapter folder of rank 4 for the demo's size, for which the tensors are written by hand."""
    from safetensors.torch import save_file

    where = tmp_path_factory.mktemp("adapter")
    (where / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["to_q"]})
    )
    tensors = {"lora_A": torch.zeros(4, 128), "lora_B": torch.zeros(128, 4)}
    names = [f"base_model.model.blocks.{i}.attn{j}.to_q" for i in range(4) for j in (1, 2)]
    save_file(
        {f"{n}.{p}.weight": t.clone() for n in names for p, t in tensors.items()}, where / "adapter_model.safetensors"
    )
    return where


WRONG = {
    "no linear": (["--lora-targets", "q,modulation"], "no linear is called 'modulation'; expected the ends of some of"),
    "an adapter's settings": (["--adapter", "a", "--lora-rank", "8"], "--lora-rank is of new adapters"),
    "no adapter": (["--adapter", "nowhere"], "adapter_config.json does not exist"),
    "another size's": (["--adapter", "FOLDER", "--size", "1.3B"], "is [4, 128]; expected [4, 1536] (rank 4"),
    "drawn weights": (["--from-scratch", "--merge", "m"], "--merge adds adapters to released weights"),
    "another job's": (["--job", "finetune", "--lora-rank", "8"], "--lora-rank is of lora_t2v.sh and lora_i2v.sh, and this is finetune"),
}  # fmt: skip


@pytest.mark.L4
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_meant_is_refused(name, folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    options, message = WRONG[name]
    with pytest.raises(ValueError) as error:
        case.jobs.parse("train", ["--job", "lora", *(str(folder) if o == "FOLDER" else o for o in options)])
    assert message in str(error.value) and "fix: " in str(error.value)


@pytest.mark.L4
@pytest.mark.parametrize("script", ["infer", "convert"])
def test_an_adapter_of_another_rank_than_its_config_says_is_refused_before_torch(script, folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    facts = json.loads((folder / "adapter_config.json").read_text())
    options = ["--to", "diffusers", "--out", "o", "--weights", str(DEMO)] if script == "convert" else ["--prompt", "a"]
    case.jobs.parse(script, [*options, "--adapter", str(folder)])
    (folder / "adapter_config.json").write_text(json.dumps(facts | {"r": 16}))
    try:
        with pytest.raises(ValueError, match=r"is \[4, 128\]; expected \[16, 128\]"):
            case.jobs.parse(script, [*options, "--adapter", str(folder)])
    finally:
        (folder / "adapter_config.json").write_text(json.dumps(facts))
