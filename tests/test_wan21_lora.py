"""lora_t2v.sh: its folder works in peft and diffusers, layouts equal one process; resume; merging; refusals."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_wan21_layouts as layouts
import torch
import wan_case as case
from layouts import whole_weights
from PIL import Image, ImageSequence
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from common import checkpoint, lora, parallel, release, weights

TOLERANCE = 1e-5
TARGETS = case.jobs.LORA_TARGETS.split(",")
DEMO = case.jobs.DEMO_WEIGHTS


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def draw_b(name: str, whole: torch.Tensor, generator: torch.Generator) -> None:
    whole.normal_(std=0.1, generator=generator)


def adapt(chunks, **options) -> None:
    """Adds adapters to the recipe's own targets. B is drawn too, because a B of zero would hide A."""
    lora.add(chunks, TARGETS, **{"rank": 6, "alpha": 9, "seed": 7} | options)
    checkpoint.initialize(chunks, 8, draw_b, lambda name: name.endswith(".lora_B"))


# ------------------------------------------------------------------------------------------ against peft and diffusers


def beside_others(folder: Path, task: str) -> dict[str, torch.Tensor]:
    """Returns velocities of the demo's model with random adapters: ours, and others' that read the folder we write."""
    import peft
    from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

    parallel.initialize(case.options())
    released = {"t2v": DEMO, "i2v": case.jobs.DEMO_I2V}[task]
    o = case.jobs.parse("train", ["--job", "lora", "--weights", str(released)])
    config = case.config.model_config(o)
    if config.given_frames:  # diffusers treats the last 512 rows as the text
        config = dataclasses.replace(config, text_len=512)
    model = case.model.build(o, config)[0]
    case.convert.fill([model], o, config, case.model.draw)
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
        merge_in_memory([model])
        out["merged here"] = model(x, t, text, *given)
        base = release.open_source(*case.convert.find_transformer(released, config))
        wide = release.Source(lambda name: 4, lambda name: base.read(name).float())
        wide = release.merge_adapter(wide, *case.convert.adapter(folder / "adapter", config))
        case.convert.write_released(folder / "merged", "diffusers", config, wide, released)
        kind = WanImageToVideoPipeline if given else WanPipeline
        pipeline = kind.from_pretrained(released, torch_dtype=torch.float32)
        pipeline.load_lora_weights(folder / "adapter")
        plain = WanTransformer3DModel.from_pretrained(released / "transformer", torch_dtype=torch.float32)
        readers = {
            "diffusers": pipeline.transformer,
            "peft": peft.PeftModel.from_pretrained(plain, folder / "adapter"),
            "merged weights in diffusers": WanTransformer3DModel.from_pretrained(folder / "merged" / "transformer"),
        }
        for name, reader in readers.items():
            inputs = {"hidden_states": theirs_x, "timestep": t, "encoder_hidden_states": text} | image
            velocity = reader(**inputs, return_dict=False)[0]
            out[name] = case.model.velocity_tokens(velocity, config.patch_size)
    return out


@pytest.mark.L2
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_adapter_folder_is_the_same_model_in_peft_and_in_diffusers(task, tmp_path):
    out = run_ranks(1, beside_others, tmp_path, task)[0]
    assert relative(out["base"], out["ours"]) > 0.1
    assert not {
        name: off for name in out if name != "base" and not (off := relative(out[name], out["ours"])) <= TOLERANCE
    }
    header = weights.read_json(tmp_path / "adapter" / "adapter_config.json")
    assert (header["r"], header["lora_alpha"], header["use_rslora"]) == (6, 9, True)


# ------------------------------------------------------------------------------------------------------------- layouts

LAYOUTS = {  # those in which a frozen base needs special care; test_lora.py has the others
    "recompute full": (1, {"recompute": "full"}),
    "offloaded, recompute full": (1, {"recompute": "full", "offload_activations": True}),
    "fsdp2 recompute full": (2, {"fsdp": True, "recompute": "full"}),
    "tp2 recompute selective": (2, {"tp": 2, "recompute": "selective"}),
    "cp2 ring recompute full": (2, {"cp": 2, "ulysses": 1, "recompute": "full"}),
    "pp2 recompute full": (2, {"pp": 2, "recompute": "full"}),
}


@pytest.mark.L3
def test_layouts_equal_single_process():
    """Only blocks have adapters: no input of the first block needs a gradient, yet every adapter gets its gradient."""
    single = run_ranks(1, layouts.run_layout, {}, 2, True, adapt)[0]
    assert len(single["gradients"]) == 2 * 4 * (2 * 4 + 2) and all(g.any() for g in single["gradients"].values())
    for world, layout in LAYOUTS.values():
        layouts.compare(run_ranks(world, layouts.run_layout, layout, 2, True, adapt)[0], single, layout)


@torch.no_grad()
def merge_in_memory(chunks: list[torch.nn.Module]) -> None:
    """Adds s B A to W, in modules that hold all of W, and gives them back their plain forward."""
    for module in [m for chunk in chunks for m in chunk.modules() if type(m) in lora.PLAIN]:
        module.weight.copy_(lora.merge(module.weight, module.lora_A, module.lora_B, module.lora.scale))
        module.__class__ = lora.PLAIN[type(module)]
        del module.lora, module.lora_dropout, module.lora_A, module.lora_B


def merged(layout: dict, folder: Path) -> dict[str, torch.Tensor]:
    """Returns whole weights after `release.merge_into`. If `folder` is missing, this makes it and merges by hand."""
    o = case.options(**layout)
    parallel.initialize(o)
    chunks = case.model.build(o, case.CONFIG)
    case.load(chunks, case.random_state())
    if not folder.exists():
        adapt(chunks)
        lora.save_adapter(folder, chunks, case.convert.to_diffusers)
        merge_in_memory(chunks)
    else:
        release.merge_into(chunks, *case.convert.adapter(folder, case.CONFIG))
    return whole_weights(chunks)


@pytest.mark.L3
def test_adapters_merged_into_shards_equal_those_of_a_single_process(tmp_path):
    want = run_ranks(1, merged, {}, tmp_path / "a")[0]
    for world, layout in ((1, {}), (2, {"tp": 2, "sp": True}), (2, {"pp": 2})):
        got = run_ranks(world, merged, layout, tmp_path / "a")[0]
        assert want.keys() == got.keys() and all(relative(got[name], want[name]) < 1e-6 for name in want)
    assert not torch.equal(want["blocks.0.ffn.2.weight"], case.random_state()["blocks.0.ffn.2.weight"])


# --------------------------------------------------------------------------------------------------- other trainers'

IN_DIFFUSERS = {f"{ours}.{a}": f"{theirs}.{b}" for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
                for a, b in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)} | {
                "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}  # fmt: skip
DOWN_UP, A_B, DEFAULT = ("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora_A.default", "lora_B.default")
WRITERS = {  # trainer: (prefix of each name, names of linears, names of the factors, where the scale is)
    "peft": ("base_model.model.", "diffusers", A_B, "adapter_config.json"),
    "peft over the original code": ("base_model.model.", "original", A_B, "adapter_config.json"),
    "diffusers": ("transformer.", "diffusers", A_B, None),
    "diffusers with its header": ("transformer.", "diffusers", A_B, "header"),
    "diffusers with alphas": ("transformer.", "diffusers", A_B, "alpha"),
    "diffusers of old": ("transformer.", "diffusers", ("lora.down", "lora.up"), "alpha"),
    "diffusers, a transformer alone": ("", "diffusers", A_B, "header"),
    "diffusion-pipe": ("diffusion_model.", "original", A_B, "adapter_config.json"),
    "diffusion-pipe, its file for ComfyUI": ("diffusion_model.", "original", A_B, None),
    "lightx2v": ("diffusion_model.", "original", DOWN_UP, "alpha"),
    "musubi": ("lora_unet_", "underscored", DOWN_UP, "alpha"),
    "Wan-Fun": ("lora_unet__", "underscored", DOWN_UP, "alpha"),
    "DiffSynth": ("", "original", DEFAULT, None),
    "DiffSynth, the whole pipeline": ("pipe.dit.", "original", DEFAULT, None),
}


def factors(config=case.CONFIG) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Draws {linear of a block: (A, B, alpha)}. Ranks and alphas differ between blocks and between kinds of linears."""
    g, pairs = torch.Generator().manual_seed(5), {}
    for i in range(config.num_layers):
        for j, name in enumerate(IN_DIFFUSERS):
            outputs, inputs = case.convert.shapes(config)[f"blocks.{i}.{name}.weight"]
            r = 2 + (i + j) % 3
            A, B = torch.randn(r, inputs, generator=g), torch.randn(outputs, r, generator=g)
            pairs[f"blocks.{i}.{name}"] = (0.3 * A, 0.2 * B, 1.5 + i + 0.25 * j)
    return pairs


def write(path: Path, writer: str, found: dict, extra: dict | None = None) -> None:
    """Writes adapters as a trainer does. The names are made by hand here, not from the recipe's tables."""
    prefix, kind, (a, b), scale = WRITERS[writer]
    tensors, ranks, alphas = dict(extra or {}), {}, {}
    for linear, (A, B, alpha) in found.items():
        _, block, name = linear.split(".", 2)
        target = {"original": linear, "diffusers": f"blocks.{block}.{IN_DIFFUSERS.get(name)}",
                  "underscored": f"blocks_{block}_{name.replace('.', '_')}"}[kind]  # fmt: skip
        tensors |= {f"{prefix}{target}.{a}.weight": A.clone(), f"{prefix}{target}.{b}.weight": B.clone()}
        if scale == "alpha":
            tensors[f"{prefix}{target}.alpha"] = torch.tensor(alpha)
        ranks[target], alphas[target] = len(A), alpha
    facts = {"r": 9, "lora_alpha": 99, "rank_pattern": ranks, "alpha_pattern": alphas, "target_modules": list(ranks)}
    header = {"format": "pt"}
    if scale == "header":
        header["lora_adapter_metadata"] = json.dumps({prefix + key: value for key, value in facts.items()})
    if scale == "adapter_config.json":
        (path.parent / scale).write_text(json.dumps(facts | {"peft_type": "LORA"}))
    save_file(tensors, path, metadata=header)


def merged_from(path: Path, config, state: dict) -> dict[str, torch.Tensor]:
    source = release.merge_adapter(release.Source(None, state.__getitem__), *case.convert.adapter(path, config))
    return {name: source.read(name) for name in state}


@pytest.mark.L2
@pytest.mark.parametrize("writer", WRITERS)
def test_every_trainers_adapter_is_the_same_as_in_pefts_format(writer, tmp_path):
    adapters, state, scale = factors(), case.random_state(), WRITERS[writer][3]
    if scale is None:  # such a file does not hold alpha: it is the rank
        adapters = {name: (A, B, float(len(A))) for name, (A, B, _) in adapters.items()}
    for folder, trainer in (("theirs", writer), ("peft", "peft")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "adapter_model.safetensors", trainer, adapters)
    if scale != "adapter_config.json":  # the file may have any name
        (tmp_path / "theirs" / "adapter_model.safetensors").rename(tmp_path / "theirs" / "my [v2].safetensors")
    (file,) = (tmp_path / "theirs").glob("*.safetensors")
    config = case.CONFIG
    want, *got = (merged_from(path, config, state) for path in (tmp_path / "peft", file.parent, file))
    for name, weight in state.items():
        A, B, alpha = adapters.get(name.removesuffix(".weight"), (None, None, 0))
        exact = weight if A is None else (weight.double() + alpha / len(A) * (B.double() @ A.double()))
        for tensors in got:
            assert (
                relative(tensors[name], want[name]) <= 1e-6 and relative(tensors[name].double(), exact.double()) <= 1e-6
            )
        assert A is None or relative(weight, want[name]) > 0.1


@pytest.mark.L2
@pytest.mark.parametrize("writer", ["diffusers", "musubi", "lightx2v", "diffusion-pipe, its file for ComfyUI"])
def test_an_adapter_changes_the_weights_as_diffusers_reads_it(writer, tmp_path):
    from diffusers import WanPipeline

    write(tmp_path / "a.safetensors", writer, factors())
    pairs, reader = case.convert.adapter(tmp_path, case.CONFIG)[0], weights.Reader()
    diffusers_state = WanPipeline.lora_state_dict(str(tmp_path / "a.safetensors"))  # with the alphas in the factors
    assert len(diffusers_state) == 2 * len(pairs) == 2 * 4 * 10
    for linear, pair in pairs.items():
        _, block, name = linear.split(".", 2)
        A, B = (diffusers_state[f"transformer.blocks.{block}.{IN_DIFFUSERS[name]}.{part}.weight"] for part in A_B)
        assert relative(pair.settings.scale * (reader.read(pair.B) @ reader.read(pair.A)), B @ A) <= 1e-6


DIFFERENCES = {  # name in the file -> (our parameter, shape)
    "blocks.1.self_attn.q.diff_b": ("blocks.1.self_attn.q.bias", (48,)),
    "blocks.3.self_attn.norm_k.diff": ("blocks.3.self_attn.norm_k.weight", (48,)),
    "blocks.2.ffn.2.diff": ("blocks.2.ffn.2.weight", (48, 80)),  # beside factors of the same weight
    "blocks.2.ffn.0.diff_b": ("blocks.2.ffn.0.bias", (80,)),
    "blocks.0.diff_m": ("blocks.0.modulation", (1, 6, 48)),
    "head.modulation.diff": ("head.modulation", (1, 2, 48)),
    "patch_embedding.diff": ("patch_embedding.weight", (48, 16, 1, 2, 2)),
}


def distilled(path: Path) -> dict[str, torch.Tensor]:
    """Writes a file as lightx2v does. Returns the weights of `random_state` with that file merged."""
    g, state, adapters = torch.Generator().manual_seed(6), case.random_state(), factors()
    changes = {key: torch.randn(shape, generator=g) for key, (_, shape) in DIFFERENCES.items()}
    write(path, "lightx2v", adapters, {f"diffusion_model.{key}": value for key, value in changes.items()})
    for key, value in changes.items():
        state[DIFFERENCES[key][0]] += value
    for linear, (A, B, alpha) in adapters.items():
        state[f"{linear}.weight"] += alpha / len(A) * B @ A
    return state


@pytest.mark.L3
def test_whole_differences_of_a_distilled_adapter_are_added_in_every_layout(tmp_path):
    want = distilled(tmp_path / "a.safetensors")
    for got in (
        merged_from(tmp_path / "a.safetensors", case.CONFIG, case.random_state()),
        *(
            run_ranks(world, merged, layout, tmp_path / "a.safetensors")[0]
            for world, layout in ((1, {}), (2, {"tp": 2, "sp": True}), (2, {"pp": 2}))
        ),
    ):
        assert want.keys() == got.keys()
        assert not {name: off for name in want if (off := relative(got[name], want[name])) > 1e-6}


def continued(layout: dict, path: Path, copy: Path) -> None:
    """Loads the adapters of a file into a model that could train them, and writes them in our format."""
    o = case.options(**layout)
    parallel.initialize(o)
    chunks = case.model.build(o, case.CONFIG)
    lora.load_adapter(case.convert.adapter(path, case.CONFIG)[0], chunks)
    lora.save_adapter(copy, chunks, case.convert.to_diffusers)
    if torch.distributed.get_rank() == 0:
        case.convert.write_pipeline_file(copy)


@pytest.mark.L3
def test_each_linear_keeps_its_rank_and_scale_from_musubis_file_through_training_into_diffusers(tmp_path):
    from diffusers import WanPipeline, WanTransformer3DModel

    write(tmp_path / "a.safetensors", "musubi", factors())
    want, reader = case.convert.adapter(tmp_path / "a.safetensors", case.CONFIG)[0], weights.Reader()
    for world, layout in ((1, {}), (2, {"tp": 2, "sp": True}), (2, {"pp": 2})):
        copy = tmp_path / f"{world}{len(layout)}"
        run_ranks(world, continued, layout, tmp_path / "a.safetensors", copy)
        for path in (copy, copy / "pytorch_lora_weights.safetensors"):
            got = case.convert.adapter(path, case.CONFIG)[0]
            assert got.keys() == want.keys()
            for linear, pair in want.items():
                assert got[linear].settings == pair.settings
                for part in "AB":
                    assert torch.equal(*(reader.read(getattr(p, part)) for p in (pair, got[linear])))
    transformer = WanTransformer3DModel.from_config(case.CONFIG.to_diffusers())
    tensors, header = WanPipeline.lora_state_dict(copy, return_lora_metadata=True)
    transformer.load_lora_adapter(tensors, prefix="transformer", metadata=header)
    for linear, pair in want.items():
        module = transformer.get_submodule(case.convert.to_diffusers(f"{linear}.weight").removesuffix(".weight"))
        assert (module.r["default_0"], module.scaling["default_0"]) == (pair.settings.r, pair.settings.scale)


def of_the_demo(path: Path, *names: str, writer: str = "lightx2v", drop: str = "", dtype=torch.float32) -> Path:
    """Writes one linear's adapter for the tiny size, with further tensors `names`, without names that end in `drop`."""
    adapters = {"blocks.2.self_attn.v": (torch.ones(3, 128), torch.ones(128, 3), 2.0)}
    write(path, writer, adapters, {name: torch.ones(128) for name in names})
    tensors = {k: v.to(dtype) for k, v in load_file(path).items() if not drop or not k.endswith(drop)}
    save_file(tensors, path)
    return path


NOT_ADAPTERS = {
    "another model's blocks": (
        {"writer": "musubi", "names": ["lora_unet_blocks_9_self_attn_q.lora_down.weight"]},
        "read as musubi's or kohya's, has 1 not of this model: lora_unet_blocks_9_self_attn_q.lora_down.weight",
    ),
    "a text encoder's too": (
        {"writer": "musubi", "names": ["lora_te_mlp.lora_up.weight", "lora_te_mlp.alpha"]},
        "has 2 not of this model: lora_te_mlp.alpha, lora_te_mlp.lora_up.weight",
    ),
    "image-to-video's on text-to-video": (
        {"names": ["diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight"]},
        "has 1 not of this model: diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight",
    ),
    "DoRA": (
        {"writer": "musubi", "names": ["lora_unet_blocks_2_self_attn_v.dora_scale"]},
        "is more than an adapter, it has DoRA's magnitudes: lora_unet_blocks_2_self_attn_v.dora_scale",
    ),
    "LoHa": (
        {"writer": "musubi", "names": ["lora_unet_blocks_1_self_attn_v.hada_w1_a"]},
        "is more than an adapter, it has LoHa's factors: lora_unet_blocks_1_self_attn_v.hada_w1_a",
    ),
    "half of one": ({"drop": "lora_up.weight"}, "1 missing: B of diffusion_model.blocks.2.self_attn.v"),
    "a difference of another size": (
        {"names": ["diffusion_model.blocks.0.ffn.0.diff_b"]},
        "diffusion_model.blocks.0.ffn.0.diff_b is [128], expected [512]",
    ),
    "integers": ({"dtype": torch.int8}, "as I8, first diffusion_model.blocks.2.self_attn.v.alpha (I8)"),
}


@pytest.mark.L4
@pytest.mark.parametrize("name", NOT_ADAPTERS)
def test_every_tensor_of_an_adapter_is_accounted_for(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    values, message = NOT_ADAPTERS[name]
    file = of_the_demo(tmp_path / "a.safetensors", *values.pop("names", []), **values)
    with pytest.raises(ValueError) as error:
        case.jobs.parse("infer", ["--prompt", "a", "--adapter", str(file)])
    assert message in str(error.value) and "; fix: " in str(error.value)


@pytest.mark.L4
def test_whole_differences_are_merged_but_not_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    file = str(of_the_demo(tmp_path / "a.safetensors", "diffusion_model.blocks.0.self_attn.q.diff_b"))
    case.jobs.parse("infer", ["--prompt", "a", "--adapter", file])
    with pytest.raises(ValueError, match="1 whole parameters, first blocks.0.self_attn.q.bias, .* fix: convert.sh"):
        case.jobs.parse("train", ["--job", "lora", "--adapter", file])


@pytest.mark.L4
def test_a_run_from_a_file_counts_and_remembers_its_adapters(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    file = tmp_path / "a.safetensors"
    write(file, "musubi", factors(case.config.SIZES["tiny"]))
    o = case.jobs.parse("train", ["--job", "lora", "--adapter", str(file)])
    count = sum(A.numel() + B.numel() for A, B, _ in factors(case.config.SIZES["tiny"]).values())
    assert case.jobs.trained_parameters(o, case.config.model_config(o)) == count
    start = case.jobs.starting_point(o)
    assert start["r"] == [2, 3, 4] and start["alpha"][:2] == [1.5, 1.75] and len(start["alpha"]) == 22
    write(
        file, "musubi", {name: (A, B, 2 * alpha) for name, (A, B, alpha) in factors(case.config.SIZES["tiny"]).items()}
    )
    assert case.jobs.starting_point(o)["adapter"] != start["adapter"]


@pytest.mark.L4
def test_adapters_are_checked_without_torch(tmp_path):
    for i, writer in enumerate(("diffusers with its header", "diffusion-pipe", "musubi")):
        (tmp_path / str(i)).mkdir()
        write(tmp_path / str(i) / "adapter_model.safetensors", writer, factors(case.config.SIZES["tiny"]))
    code = (
        "import importlib, sys\n"
        "jobs = importlib.import_module(sys.argv[1])\n"
        "for script, argv in (('infer', ['--prompt', 'a']), ('train', ['--job', 'lora']), "
        "('convert', ['--to', 'diffusers', '--out', 'o'])):\n"
        "    for folder in sys.argv[2:]:\n"
        "        jobs.parse(script, [*argv, '--adapter', folder])\n"
        "assert not {'torch', 'safetensors'} & set(sys.modules)\n"
    )
    run = [sys.executable, "-c", code, f"zoo.{case.RECIPE}.options", *(str(tmp_path / str(i)) for i in range(3))]
    subprocess.run(run, check=True, env=os.environ | {"WORLD_SIZE": "1"})


# ---------------------------------------------------------------------------------------------------------------- jobs


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list:
    """Returns the options of a run of lora_t2v.sh on twelve clips."""
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
    for model in (["--adapter", adapter], ["--weights", tmp_path / "merged"]):
        out = tmp_path / f"videos{len(videos)}"
        fast = ["--precision", "bf16", "--video", "5x48x48", "--sample-steps", "2", "--format", "gif", "--out", out]
        run_ranks(1, case.job, "infer", *model, *fast, "--prompt", "a handwritten three moves up")
        with Image.open(out / "0000.gif") as gif:
            videos.append([frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(gif)])
    assert videos[0] == videos[1]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Writes an adapter folder of rank 4 for the demo's size, its tensors made by hand."""
    written = tmp_path_factory.mktemp("adapter")
    (written / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["to_q"]})
    )
    tensors = {"lora_A": torch.zeros(4, 128), "lora_B": torch.zeros(128, 4)}
    names = [f"base_model.model.blocks.{i}.attn{j}.to_q" for i in range(4) for j in (1, 2)]
    save_file(
        {f"{n}.{p}.weight": t.clone() for n in names for p, t in tensors.items()}, written / "adapter_model.safetensors"
    )
    return written


WRONG = {
    "no linear": (["--lora-targets", "q,modulation"], "no linear is called 'modulation'; expected the ends of some of"),
    "an adapter's settings": (["--adapter", "a", "--lora-rank", "8"], "--lora-rank is of new adapters"),
    "no adapter": (["--adapter", "nowhere"], "nowhere does not exist; expected an adapter's folder or .safetensors"),
    "another size's": (["--adapter", "FOLDER", "--size", "1.3B"], "is [4, 128], expected [4, 1536]"),
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
        with pytest.raises(ValueError, match=r"is \[4, 128\], expected \[16, 128\]"):
            case.jobs.parse(script, [*options, "--adapter", str(folder)])
    finally:
        (folder / "adapter_config.json").write_text(json.dumps(facts))
